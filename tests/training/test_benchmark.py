"""The benchmark of training steps, on every algorithm and both kinds of actions."""

from __future__ import annotations

import pytest

from omcda_deploy.registry import algorithms
from omcda_deploy.training.benchmark import Contender, step_costs
from tests.support.synthetic import continuous_spec, discrete_spec


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_steps_of_every_algorithm_are_timed(kind: str) -> None:
    spec = continuous_spec() if kind == "continuous" else discrete_spec()
    contenders = [Contender(name, {"hidden": 8}, runs) for name in algorithms() for runs in (1, 2)]
    costs = step_costs(spec, contenders, batch_size=8, rounds=1)
    assert [cost.contender for cost in costs] == contenders
    for cost in costs:
        assert cost.step_ms > 0, cost.contender
        assert cost.gflop > 0, cost.contender
