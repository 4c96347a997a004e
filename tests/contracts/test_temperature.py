"""The temperature of play: a factor of the noise, against the distributions that it stands for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from omcda_deploy.bundle import Bundle
from omcda_deploy.client.fallback import BehaviorTeam
from omcda_deploy.errors import ConfigError
from omcda_deploy.local import JointTeam, LocalPolicy, LocalTeam
from omcda_deploy.policy import (
    NoiseSource,
    checked_temperature,
    checked_temperatures,
    own_temperature,
)
from tests.support.bundles import continuous_spec, discrete_spec, write_test_bundle

ROWS = 40_000
TEMPERATURES = (0.0, 0.25, 0.5, 1.0, 2.0)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    root = tmp_path_factory.mktemp("bundles")
    specs = {"continuous": continuous_spec(), "discrete": discrete_spec()}
    return {kind: write_test_bundle(root / kind, spec, 3) for kind, spec in specs.items()}


def one_state(bundle: Bundle, rows: int = ROWS) -> dict[str, np.ndarray[Any, Any]]:
    """The same small observation in all rows: its actions stay far from the bounds."""
    generator = np.random.default_rng(1)
    return {
        agent.name: np.tile(0.2 * generator.standard_normal(agent.observation_size), (rows, 1)).astype(
            np.float32
        )
        for agent in bundle.spec.agents
    }


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_standard_deviation_of_a_gaussian_is_multiplied(
    bundles: dict[str, Bundle], temperature: float
) -> None:
    """Under the tanh the mean stays, and the variance is T^2 of the policy's."""
    bundle = bundles["continuous"]
    noise = NoiseSource(bundle.spec, 0, temperature).draw(ROWS)
    for name, decision in LocalTeam(bundle).act(one_state(bundle), noise=noise).items():
        mean, std = decision.parameters["mean"][0], np.exp(decision.parameters["log_std"][0])
        inside = np.clip(decision.action.astype(np.float64), -1 + 1e-7, 1 - 1e-7)
        beneath = np.arctanh(inside)
        near = temperature <= 0.5  # further out float32 runs out of digits next to the bound
        if near:
            assert beneath.mean(axis=0) == pytest.approx(mean, abs=5 * temperature / math.sqrt(ROWS) + 1e-4)
            assert beneath.std(axis=0) == pytest.approx(temperature * std, rel=0.02, abs=1e-4), name
        share = (np.abs(beneath - mean) < temperature * std).mean(axis=0)
        if temperature:
            assert share == pytest.approx(math.erf(1 / math.sqrt(2)), abs=0.015)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_logits_of_a_choice_are_divided(bundles: dict[str, Bundle], temperature: float) -> None:
    """T 0 is the argmax, T 1 has the policy's frequencies, and T those of softmax(logits / T)."""
    bundle = bundles["discrete"]
    noise = NoiseSource(bundle.spec, 0, temperature).draw(ROWS)
    for decision in LocalTeam(bundle).act(one_state(bundle), noise=noise).values():
        logits = decision.parameters["logits"][0].astype(np.float64)
        frequencies = np.bincount(decision.action, minlength=logits.size) / ROWS
        if temperature == 0.0:
            expected = np.eye(logits.size)[logits.argmax()]
        else:
            weights = np.exp((logits - logits.max()) / temperature)
            expected = weights / weights.sum()
        assert len(set(np.round(logits, 2))) > 1
        assert frequencies == pytest.approx(expected, abs=4 * 0.5 / math.sqrt(ROWS))


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_sources_of_one_seed_differ_by_the_factor_alone(bundles: dict[str, Bundle], kind: str) -> None:
    spec = bundles[kind].spec
    one, half, none = (NoiseSource(spec, 7, temperature) for temperature in (1.0, 0.5, 0.0))
    for rows in (3, 1, 5):
        whole, scaled, zeros = one.draw(rows), half.draw(rows), none.draw(rows)
        for name in spec.names:
            assert scaled[name].tobytes() == (np.float32(0.5) * whole[name]).tobytes()
            assert not zeros[name].any()
            assert scaled[name].dtype == np.float32


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
@pytest.mark.parametrize("make", [LocalTeam, JointTeam, BehaviorTeam])
def test_a_team_with_a_temperature_draws_its_own_noise(
    bundles: dict[str, Bundle], kind: str, make: Any
) -> None:
    bundle = bundles[kind]
    spec, plain = bundle.spec, make(bundle)
    team, source = make(bundle, temperature=0.5, seed=9), NoiseSource(spec, 9, 0.5)
    assert (own_temperature(team), own_temperature(plain)) == (0.5, 0.0)
    changed = False
    for rows in (4, None, 2):  # a batch, single vectors, a batch
        seen = one_state(bundle, rows or 1)
        noise: Any = source.draw(rows or 1)
        if rows is None:
            seen, noise = ({n: values[0] for n, values in each.items()} for each in (seen, noise))
        ours, theirs = team.act(seen), plain.act(seen, noise=noise)
        quiet = plain.act(seen)
        for name in spec.names:
            assert ours[name].action.tobytes() == theirs[name].action.tobytes()
            assert np.shape(ours[name].action) == np.shape(theirs[name].action)
            changed |= bool((ours[name].action != quiet[name].action).any())
    assert changed
    # Noise that a call brings is used as it is, zeros included.
    seen = one_state(bundle, 2)
    zeros = {name: np.zeros_like(values) for name, values in source.draw(2).items()}
    for given in (zeros, NoiseSource(spec, 1).draw(2)):
        ours, theirs = team.act(seen, noise=given), plain.act(seen, noise=given)
        assert all(ours[name].action.tobytes() == theirs[name].action.tobytes() for name in spec.names)


def test_policies_of_one_seed_act_as_their_team(bundles: dict[str, Bundle]) -> None:
    bundle = bundles["continuous"]
    team = LocalTeam(bundle, temperature=1.0, seed=4)
    policies = {name: LocalPolicy(bundle, name, temperature=1.0, seed=4) for name in bundle.spec.names}
    for rows in (3, 1):
        seen = one_state(bundle, rows)
        for name, decision in team.act(seen).items():
            assert policies[name].act(seen[name]).action.tobytes() == decision.action.tobytes()


@pytest.mark.parametrize(
    "value", [-0.1, math.nan, math.inf, 10.5, "0.5", None, True, np.float64("nan"), [0.5]]
)
def test_what_is_no_temperature_is_refused(bundles: dict[str, Bundle], value: Any) -> None:
    bundle = bundles["continuous"]
    for make in (
        lambda: checked_temperature(value),
        lambda: checked_temperatures([0.0, value]),
        lambda: NoiseSource(bundle.spec, 0, value),
        lambda: LocalTeam(bundle, temperature=value),
        lambda: JointTeam(bundle, temperature=value),
    ):
        with pytest.raises(
            ConfigError, match=r"^temperature: expected a number from 0 .* to 10, got"
        ) as info:
            make()
        assert "\n" not in str(info.value)


@pytest.mark.parametrize("value", [1e-7, 1e-310])
def test_what_would_be_zero_where_it_is_used_is_refused(value: float) -> None:
    with pytest.raises(
        ConfigError, match=r"^temperature: expected 0 \(deterministic\) or a number from 1e-06 on"
    ):
        checked_temperature(value)
    assert checked_temperature(1e-6) == 1e-6


def test_lists_of_temperatures() -> None:
    assert checked_temperatures([1, 0.25, 0]) == (0.0, 0.25, 1.0)
    assert checked_temperatures([float(np.float32(0.5))]) == (0.5,)
    assert math.copysign(1.0, checked_temperature(-0.0)) == 1.0
    for values, message in (
        ([], "one or more"),
        ([0, 0.5, 0.5], r"each once, got 0\.5 twice"),
        ([0, -0.0], "0 twice"),
    ):
        with pytest.raises(ConfigError, match=message):
            checked_temperatures(values)
