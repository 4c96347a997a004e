"""Contract of every task in the registry with collectors, evaluators and users' own loops."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omcda_deploy import registry
from omcda_deploy.envs import Environment, smac
from omcda_deploy.errors import ContractError, MissingExtraError
from omcda_deploy.policy import NoiseSource
from omcda_deploy.spec import TeamSpec

STEPS = 15
# Over a stand-in for the simulator.
OPTIONS: dict[str, Any] = {
    task: {
        "python": sys.executable,
        "factory": "fake_smac:StarCraft2Env",
        "path": str(Path(__file__).parents[1] / "support"),
    }
    for task in smac.TASKS
}


SLOW = {"smax/6h_vs_8z", "smax/corridor"}  # each compiles for seconds; smax/5m_vs_6m covers the same code
# Maps of SMAC differ in their sizes alone, and each starts processes: with and without shields and unit types.
SLOW |= {*smac.TASKS} - {f"smac/{name}" for name in ("3m", "5m_vs_6m", "6h_vs_8z", "corridor", "MMM2")}


@pytest.fixture(
    params=[pytest.param(task, marks=pytest.mark.slow) if task in SLOW else task for task in registry.tasks()]
)
def environment(request: pytest.FixtureRequest) -> Iterator[Environment]:
    try:
        task_environment = registry.make_environment(request.param, **OPTIONS.get(request.param, {}))
    except MissingExtraError as error:
        pytest.skip(str(error))
    yield task_environment
    task_environment.close()


def _actions(spec: TeamSpec, noise: NoiseSource, infos: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Random legal actions in the form of policies': float32 [A] in [-1, 1], or ints that the mask allows."""
    draw = {name: values[0] for name, values in noise.draw(1).items()}
    if spec.action_kind == "continuous":
        return {name: np.tanh(values) for name, values in draw.items()}
    return {
        name: int(np.where(infos[name]["action_mask"], values, -np.inf).argmax())
        for name, values in draw.items()
    }


def _record(environment: Environment, seed: int, noise_seed: int = 0) -> list[dict[str, Any]]:
    """Record a seeded episode of at most STEPS steps."""
    noise = NoiseSource(environment.spec, noise_seed)
    observations, infos = environment.reset(seed=seed)
    steps: list[dict[str, Any]] = [
        {"observations": observations, "infos": infos, "state": environment.state(), "over": False}
    ]
    while len(steps) <= STEPS and not steps[-1]["over"]:
        actions = _actions(environment.spec, noise, steps[-1]["infos"])
        observations, rewards, terminations, truncations, infos = environment.step(actions)
        steps.append(
            {
                "observations": observations,
                "rewards": rewards,
                "terminations": terminations,
                "truncations": truncations,
                "infos": infos,
                "state": environment.state(),
                "over": any(terminations.values()) or any(truncations.values()),
            }
        )
    return steps


def test_spec_describes_what_comes(environment: Environment) -> None:
    spec = environment.spec
    assert (
        list(environment.possible_agents)
        == list(spec.names)
        == [f"agent_{i}" for i in range(len(spec.agents))]
    )
    assert spec.control_rate > 0
    assert TeamSpec.from_json(spec.to_json()).contract_hash == spec.contract_hash
    for step in _record(environment, seed=0):
        assert list(step["observations"]) == list(spec.names)
        assert list(step["infos"]) == list(spec.names)
        assert step["state"].shape == (spec.state_size,)
        assert step["state"].dtype == np.float32
        for agent in spec.agents:
            observation = step["observations"][agent.name]
            assert observation.shape == (agent.observation_size,)
            assert observation.dtype == np.float32
            assert np.isfinite(observation).all()
            mask = step["infos"][agent.name].get("action_mask")
            if spec.action_kind == "discrete":
                assert mask.shape == (agent.action.size,)
                assert mask.dtype == np.uint8
                assert set(mask.tolist()) <= {0, 1}
                assert mask.any()
            else:
                assert mask is None


def test_the_team_shares_reward_and_end(environment: Environment) -> None:
    spec = environment.spec
    for step in _record(environment, seed=1)[1:]:
        for name, kind in (("rewards", float), ("terminations", bool), ("truncations", bool)):
            values = step[name]
            assert list(values) == list(spec.names)
            assert len(set(values.values())) == 1
            assert all(type(value) is kind for value in values.values())
        first = spec.names[0]
        assert not (step["terminations"][first] and step["truncations"][first])


def _equal(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> bool:
    return len(first) == len(second) and all(
        np.array_equal(a["state"], b["state"])
        and all(np.array_equal(a["observations"][n], b["observations"][n]) for n in a["observations"])
        and a.get("rewards") == b.get("rewards")
        and a.get("terminations") == b.get("terminations")
        for a, b in zip(first, second, strict=True)
    )


def test_seeds_repeat_episodes(environment: Environment) -> None:
    if environment.spec.task in smac.TASKS:
        pytest.skip("SMAC takes one seed, when its game starts")
    first = _record(environment, seed=11)
    _record(environment, seed=12, noise_seed=5)
    assert _equal(first, _record(environment, seed=11))
    other = registry.make_environment(environment.spec.task)
    assert _equal(first, _record(other, seed=11))
    other.close()
    assert not all(_equal(first, _record(environment, seed=seed, noise_seed=seed)) for seed in range(20, 28))


def test_results_are_the_callers_own(environment: Environment) -> None:
    """Arrays that a step returned do not change when the episode goes on."""
    steps = _record(environment, seed=2)
    copies = [{name: values.copy() for name, values in step["observations"].items()} for step in steps]
    states = [step["state"].copy() for step in steps]
    _record(environment, seed=3)
    for step, copy, state in zip(steps, copies, states, strict=True):
        assert all(np.array_equal(step["observations"][name], copy[name]) for name in copy)
        np.testing.assert_array_equal(step["state"], state)
    steps[-1]["observations"][environment.spec.names[0]][:] = 77.0
    assert not (environment.state() == 77.0).any()


def test_actions_that_do_not_fit_are_refused(environment: Environment) -> None:
    spec = environment.spec
    _, infos = environment.reset(seed=0)
    good = _actions(spec, NoiseSource(spec, 0), infos)
    last = spec.agents[-1]
    wrong: Any = (
        last.action.size if spec.action_kind == "discrete" else np.zeros(last.action.size + 1, np.float32)
    )
    for actions in ({}, {**good, "nobody": good[last.name]}, {**good, last.name: wrong}):
        with pytest.raises(ContractError, match="expected"):
            environment.step(actions)
    environment.step(good)
