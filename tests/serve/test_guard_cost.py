"""The price of a guard that acts, on a real server."""

from __future__ import annotations

import statistics
from contextlib import ExitStack, closing
from itertools import cycle
from pathlib import Path

import pytest

from omcda_deploy.bundle import TEAM
from omcda_deploy.serve.bench.http2 import Connection
from omcda_deploy.serve.bench.load import Line, Sockets, closed_loop
from omcda_deploy.serve.bench.measured_servers import ACT, Servers, requests_of, start_models
from tests.support.bundles import continuous_spec, write_test_bundle

SLICES, SLICE_S = 15, 0.1
MODES = ("observe", "fallback", "blend")


@pytest.mark.slow  # a figure that other load disturbs
@pytest.mark.parametrize("model", ["agent_0", TEAM])
def test_a_guard_that_acts_costs_at_most_half_as_much_again(tmp_path: Path, model: str) -> None:
    """Almost all rows are above the threshold. Servers are measured in turn, in short slices."""
    bundle = write_test_bundle(tmp_path / "bundle", continuous_spec(agents=6))
    requests = cycle(requests_of(bundle.spec, 0)[ACT, model])
    micros: dict[str, list[float]] = {mode: [] for mode in MODES}
    with ExitStack() as stack:
        servers: dict[str, Servers] = {}
        wires: dict[str, Sockets] = {}
        for mode in MODES:
            config = tmp_path / f"{mode}.toml"
            config.write_text(f'[guard]\nmode = "{mode}"\nthreshold = 0.01\n')
            servers[mode] = start_models(stack, bundle.path, [[model]], config)
            connection = Connection(servers[mode].endpoints[model], ACT)
            wires[mode] = stack.enter_context(closing(Sockets([[Line(connection, requests)]])))
            closed_loop(wires[mode], 1, SLICE_S)
        for turn in range(SLICES):
            for mode in MODES[turn % 3 :] + MODES[: turn % 3]:
                before = servers[mode].cpu_s()
                steps = closed_loop(wires[mode], 1, SLICE_S).latency.seconds.size
                micros[mode].append(1e6 * (servers[mode].cpu_s() - before) / steps)
    lowest = {mode: statistics.quantiles(values, n=4)[0] for mode, values in micros.items()}
    print({mode: f"{value:.0f} us, {value / lowest['observe']:.2f}" for mode, value in lowest.items()})
    assert lowest["fallback"] <= 1.5 * lowest["observe"]
    assert lowest["blend"] <= 1.5 * lowest["observe"]
