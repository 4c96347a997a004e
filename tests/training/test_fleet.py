"""Fleets: what a run computes in company is what it computes alone, to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omcda_deploy import registry
from omcda_deploy.spec import ActionKind
from omcda_deploy.training.algorithm import Algorithm
from omcda_deploy.training.checkpoint import load_state, save_state
from omcda_deploy.training.prices import Dual
from tests.support.synthetic import (
    PAPER,
    differing,
    make_fleet,
    make_learner,
    random_batch,
    spec_of,
    stacked,
    teams_of,
)

ALGORITHMS = registry.algorithms()
KINDS: tuple[ActionKind, ...] = ("continuous", "discrete")
CASES = [
    (name, kind) for name in ALGORITHMS for kind in KINDS if kind in registry.load_algorithm(name).ACTIONS
]
SWEPT = [
    (name, setting)
    for name in ALGORITHMS
    for setting in getattr(registry.load_algorithm(name), "PER_RUN", ())
]
UPDATES = 15
# OMCDA moves its shares and its prices within the updates of a test.
QUICK: Mapping[str, Mapping[str, Any]] = {
    "omcda": {
        "reallocate_every": 4,
        "warmup": 0.005,
        "lr_alpha": 0.05,
        "lr": 3e-3,
        "tau": 0.5,
        "tau_policy": 0.5,
    }
}


def trained(
    name: str,
    team: str,
    seeds: Sequence[int],
    *settings: Mapping[str, Any],
    size: int = 32,
    updates: int = UPDATES,
) -> tuple[Algorithm, list[dict[str, Tensor]]]:
    """A fleet after some updates, and their metrics. The batches of a run depend on its seed alone."""
    every = [{**QUICK.get(name, {}), **values} for values in settings or [{}]]
    every *= len(seeds) // len(every)
    fleet = make_fleet(name, spec_of(team), every, seeds=seeds)
    history = [
        fleet.update(
            stacked(*(random_batch(spec_of(team), size, seed=1000 * seed + step) for seed in seeds)),
            watched=step % 5 == 0,
        )
        for step in range(updates)
    ]
    return fleet, history


def of_run(history: Sequence[Mapping[str, Tensor]], run: int) -> list[dict[str, Tensor]]:
    return [{name: values[run] for name, values in metrics.items()} for metrics in history]


# -- bits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "team", "hidden", "size"),
    [
        (name, team, *sizes)
        for name in ALGORITHMS
        for team in teams_of(name)
        for sizes in ([(16, 32)] if team == "unequal" else [(16, 32), (64, 61)])
    ],
)
def test_a_runs_bits_do_not_depend_on_its_company(name: str, team: str, hidden: int, size: int) -> None:
    settings = {"hidden": hidden}
    alone, history = trained(name, team, [0], settings, size=size)
    for seeds in ([0, 1], [0, 1, 2, 3, 4], [3, 1, 4, 0, 2]):
        fleet, together = trained(name, team, seeds, settings, size=size)
        run = seeds.index(0)
        assert differing(alone.state_dict(0), fleet.state_dict(run)) == set(), seeds
        for ours, theirs in zip(of_run(history, 0), of_run(together, run), strict=True):
            assert differing(ours, theirs) == set(), seeds
    # Another seed is another run: the comparison above is one of numbers that differ between runs.
    assert differing(fleet.state_dict(0)["policy"], fleet.state_dict(1)["policy"])


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_fleet_is_resumed_in_parts_and_in_any_order(name: str, kind: ActionKind, tmp_path: Path) -> None:
    fleet, _ = trained(name, kind, [0, 1, 2], updates=5)
    for run in range(3):
        save_state(tmp_path / f"{run}.pt", fleet.state_dict(run))
    later = [random_batch(spec_of(kind), seed=100 + run) for run in range(3)]
    for _ in range(3):
        fleet.update(stacked(*later))
    for order in ([2, 0, 1], [1, 2], [1]):
        part = make_fleet(name, spec_of(kind), [QUICK.get(name, {})] * len(order), seeds=order)
        part.load_state_dicts([load_state(tmp_path / f"{run}.pt") for run in order])
        for _ in range(3):
            part.update(stacked(*(later[run] for run in order)))
        for index, run in enumerate(order):
            assert differing(fleet.state_dict(run), part.state_dict(index)) == set(), order


SPECIAL: dict[str, tuple[Any, ...]] = {
    "allocation": ("random", "optimal", "uniform", "influence"),
    "settled": (1e9,),
    "d_tot": (1e-3, 30.0),
    "pessimism": (0.25, 1.0),
    "threshold": (0.95, 1.0),  # a behaviour model that was not trained is nearly uniform
    "rho_max": (1.0,),  # weights begin near one
    "weight_max": (1.0, 1.001),
}


@pytest.mark.parametrize(("name", "setting"), SWEPT)
def test_settings_per_run_are_those_of_the_runs_alone(name: str, setting: str) -> None:
    module = registry.load_algorithm(name)
    default = getattr(module.Config(), setting)
    values = (default, *SPECIAL.get(setting, ()))
    if setting not in SPECIAL:
        values += (0.5 * default, 2.0 * default) if default else (0.25, 1.0)
    changes = set()
    for kind in sorted(module.ACTIONS):
        settings = [{setting: value} for value in values]
        if setting == "settled":
            settings = [{**each, "warmup": 1.0} for each in settings]  # else the dual starts all the same
        if setting == "share_temperature":
            settings = [{**each, "allocation": "influence"} for each in settings]
        fleet, history = trained(name, kind, [4] * len(values), *settings)  # one seed: equal but for it
        for run, own in enumerate(settings):
            alone, alone_history = trained(name, kind, [4], own)
            assert differing(alone.state_dict(0), fleet.state_dict(run)) == set(), own
            for ours, theirs in zip(of_run(alone_history, 0), of_run(history, run), strict=True):
                assert differing(ours, theirs) == set(), own
            changes |= {run} if differing(fleet.state_dict(0), fleet.state_dict(run)) else set()
    assert changes == set(range(1, len(values))) - {i for i, value in enumerate(values) if value == default}


def test_prices_do_not_depend_on_the_number_of_runs() -> None:
    """More runs than a vector of the processor has numbers, and many steps: each run's corrections are its own."""
    generator = torch.Generator().manual_seed(0)
    runs, agents = 37, 3
    first = 0.5 + torch.rand(runs, 1, generator=generator)
    single = [run % 4 == 3 for run in range(runs)]
    together = Dual(agents, first, lr=0.5, single_price=single)
    alone = [Dual(agents, first[[run]], lr=0.5, single_price=[single[run]]) for run in range(runs)]
    for step in range(350):
        budgets, divergence = torch.rand(2, runs, agents, generator=generator)
        active = torch.tensor([step >= run % 5 for run in range(runs)])
        loss = together.descend(budgets, divergence, active)
        for run, dual in enumerate(alone):
            assert torch.equal(dual.descend(budgets[[run]], divergence[[run]], active[[run]])[0], loss[run])
    for run, dual in enumerate(alone):
        assert differing(dual.state_dict(0), together.state_dict(run)) == set(), run


# -- runs of before fleets --------------------------------------------------------------------------------------


def old_layout(state: dict[str, Any]) -> dict[str, Any]:
    """A single run's state as training wrote it before fleets."""
    adam = torch.optim.Adam([nn.Parameter(torch.zeros(1))]).state_dict()["param_groups"][0]

    def with_options(optimizer: dict[str, Any]) -> dict[str, Any]:
        groups = optimizer.get("param_groups", [{"params": [0], "lr": 3e-3}])
        return {**optimizer, "param_groups": [{**adam, **group, "fused": True} for group in groups]}

    old = {**state, "learner": with_options(state["learner"])}
    if "dual" in state:
        optimizer = with_options(state["dual"]["optimizer"])
        if not state["dual_active"]:  # an Adam that has taken no step has no moments
            optimizer["state"] = {}
        old["dual"] = {**state["dual"], "optimizer": optimizer}
    return old


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_run_trained_before_fleets_goes_on(name: str, kind: ActionKind, tmp_path: Path) -> None:
    for updates in (3, UPDATES):
        settings = {**PAPER, **QUICK["omcda"]} if name == "omcda" else {}  # there was no other dual
        algorithm, _ = trained(name, kind, [0], settings, updates=updates)
        save_state(tmp_path / "resume.pt", old_layout(algorithm.state_dict(0)))
        resumed = make_learner(name, spec_of(kind), settings)
        resumed.load_state_dicts([load_state(tmp_path / "resume.pt")])
        later: Callable[[], Any] = lambda: random_batch(spec_of(kind), seed=77)  # noqa: E731
        for _ in range(3):
            ours, theirs = algorithm.update(later()), resumed.update(later())
            assert differing(ours, theirs) == set()
        assert differing(algorithm.state_dict(0), resumed.state_dict(0)) == set()
