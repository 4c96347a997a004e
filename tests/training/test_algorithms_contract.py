"""The contract that every algorithm of the registry keeps."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from omcda_deploy import registry
from omcda_deploy.errors import ConfigError, UnknownNameError
from omcda_deploy.export.bundle import export_bundle
from omcda_deploy.local import LocalTeam
from omcda_deploy.plugins import columns_of, curves_of, per_run_settings, scan_of
from omcda_deploy.spec import ActionKind
from omcda_deploy.training.algorithm import Algorithm, create_algorithm
from omcda_deploy.training.checkpoint import load_state, save_state
from omcda_deploy.training.fleet import run_state
from omcda_deploy.training.networks import NetworkFactory
from omcda_deploy.training.settings import build, describe, plain_types
from tests.support.synthetic import (
    HIDDEN,
    behavior_actor,
    differing,
    make_learner,
    random_batch,
    spec_of,
    teams_of,
)

ALGORITHMS = registry.algorithms()
KINDS: tuple[ActionKind, ...] = ("continuous", "discrete")
CASES = [(name, team) for name in ALGORITHMS for team in teams_of(name)]
UPDATES = 5

Metrics = list[dict[str, torch.Tensor]]


def learner(name: str, team: str, **changes: Any) -> Algorithm:
    return make_learner(name, spec_of(team), **changes)


def update(algorithm: Algorithm, team: str, first: int = 0, count: int = UPDATES) -> Metrics:
    return [algorithm.update(random_batch(spec_of(team), seed=seed)) for seed in range(first, first + count)]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_module_says_what_it_is(name: str) -> None:
    module = registry.load_algorithm(name)
    assert module.ACTIONS
    assert set(KINDS) >= module.ACTIONS
    assert set(module.DIVERGENCE) == module.ACTIONS
    assert module.SUMMARY == module.SUMMARY.strip() != ""
    assert module.PAPER
    assert module.__doc__ is not None
    config = module.Config()
    assert config.hidden > 0
    assert config.batch_size > 0
    assert set(getattr(module, "PER_RUN", ())) <= plain_types(module.Config).keys()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden = 1


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_page_lists_the_settings_in_which_runs_side_by_side_may_differ(name: str) -> None:
    page = Path(__file__).parents[2] / "docs/training-speed.md"
    settings = per_run_settings(registry.load_algorithm(name))
    listed = ", ".join(f"`{setting}`" for setting in settings) or "none"
    assert f"\n| {name} | {listed} |\n" in page.read_text()


@pytest.mark.parametrize(("name", "team"), CASES)
def test_updates_count_steps_change_the_policy_and_report_finite_numbers(name: str, team: str) -> None:
    algorithm = learner(name, team)
    agents = len(spec_of(team).agents)
    before = algorithm.state_dict(0)["policy"]
    history = update(algorithm, team)
    assert algorithm.step == UPDATES
    assert differing(before, algorithm.state_dict(0)["policy"])
    for metrics in history:
        assert any(key.startswith("loss/") for key in metrics)
        for key, value in metrics.items():
            assert value.shape in ((1,), (1, agents)), key
            assert bool(torch.isfinite(value).all()), key
            assert not value.requires_grad, f"{key} keeps the whole graph of its step in memory"
    for values in (algorithm.budgets, algorithm.alpha):
        assert values is None or (values.shape == (1, agents) and bool((values > 0).all()))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_declared_columns_and_curves_are_logged_in_their_shapes(name: str) -> None:
    module = registry.load_algorithm(name)
    logged: set[str] = set()
    for team in teams_of(name):
        metrics = update(learner(name, team), team)[0]
        logged |= metrics.keys()
        for column in columns_of(module):
            if column.metric in metrics:
                agents = (len(spec_of(team).agents),) if column.per_agent else ()
                assert metrics[column.metric].shape == (1, *agents), column
    section, scan = curves_of(module), scan_of(module)
    curves = section.curves if section else ()
    assert {column.metric for column in columns_of(module)} | {curve.metric for curve in curves} <= logged
    assert columns_of(module)
    if scan:
        assert {scan.setting, scan.group} <= plain_types(module.Config).keys()


@pytest.mark.parametrize(("name", "team"), CASES)
def test_equal_seeds_give_equal_learners(name: str, team: str) -> None:
    first, second = learner(name, team), learner(name, team)
    ours = update(first, team)
    torch.manual_seed(99)  # the process's own generator must not matter
    theirs = [second.update(random_batch(spec_of(team), seed=seed)) for seed in range(UPDATES)]
    assert all(differing(a, b) == set() for a, b in zip(ours, theirs, strict=True))
    assert differing(first.state_dict(0), second.state_dict(0)) == set()
    other = learner(name, team, seed=1)
    update(other, team)
    assert differing(first.state_dict(0), other.state_dict(0))


@pytest.mark.parametrize(("name", "team"), CASES)
def test_a_saved_learner_goes_on_as_if_never_stopped(name: str, team: str, tmp_path: Path) -> None:
    algorithm = learner(name, team)
    update(algorithm, team)
    save_state(tmp_path / "resume.pt", algorithm.state_dict(0))
    ahead = update(algorithm, team, first=UPDATES, count=12)
    resumed = learner(name, team)
    update(resumed, team, first=50, count=3)  # nothing of which may survive
    resumed.load_state_dicts([load_state(tmp_path / "resume.pt")])
    assert resumed.step == UPDATES
    again = update(resumed, team, first=UPDATES, count=12)
    for a, b in zip(ahead, again, strict=True):
        assert differing(a, b) == set()
    assert differing(algorithm.state_dict(0), resumed.state_dict(0)) == set()


@pytest.mark.parametrize(("name", "team"), CASES)
def test_training_leaves_the_behavior_model_alone(name: str, team: str) -> None:
    """Neither the model that a learner is given, nor its distributions in the batches."""
    spec, behavior = spec_of(team), behavior_actor(spec_of(team))
    before = {key: value.clone() for key, value in behavior.state_dict().items()}
    algorithm = create_algorithm(name, spec, [behavior], settings=[{"hidden": HIDDEN}], steps=1000, seeds=[0])
    batch, untouched = random_batch(spec), random_batch(spec)
    for _ in range(UPDATES):
        algorithm.update(batch)
    assert differing(before, behavior.state_dict()) == set()
    assert not any(parameter.requires_grad for parameter in behavior.parameters())
    for ours, theirs in (
        (batch.behavior, untouched.behavior),
        (batch.next_behavior, untouched.next_behavior),
    ):
        assert differing(vars(ours), vars(theirs)) == set()


@pytest.mark.parametrize(("name", "team"), CASES)
def test_its_policy_is_exported_with_parity_and_acts(name: str, team: str, tmp_path: Path) -> None:
    spec, algorithm = spec_of(team), learner(name, team)
    update(algorithm, team)
    module = registry.load_algorithm(name)
    # The module that a snapshot is read back into takes the learner's weights.
    config = build(module.Config, {"hidden": HIDDEN})
    policy = module.make_policy(config, NetworkFactory(spec, HIDDEN))
    policy.load_state_dict(run_state(algorithm.policy, 0))
    batch = random_batch(spec, size=1000)
    bundle = export_bundle(
        tmp_path / "bundle",
        spec,
        policy,
        behavior_actor(spec),
        observations=batch.observation[0].numpy(),
        action_masks=None if batch.mask is None else batch.mask[0].numpy(),
        divergence_kind=module.DIVERGENCE[spec.action_kind],
        budgets=dict.fromkeys(spec.names),
        alphas=dict.fromkeys(spec.names),
        provenance={"algorithm": name},
    )
    served = LocalTeam(bundle)
    observations = {
        agent.name: batch.observation[0, :8, i, : agent.observation_size].numpy()
        for i, agent in enumerate(spec.agents)
    }
    masks = None
    if batch.mask is not None:
        masks = {a.name: batch.mask[0, :8, i, : a.action.size].numpy() for i, a in enumerate(spec.agents)}
    for agent in spec.agents:
        decision = served.act(observations, action_masks=masks)[agent.name]
        assert np.isfinite(decision.divergence).all()
        if masks is None:
            assert decision.action.shape == (8, agent.action.size)
            assert (np.abs(decision.action) <= 1.0).all()
        else:
            assert masks[agent.name][np.arange(8), decision.action].all(), "an unavailable action"


NUMBERS = [
    (name, field)
    for name in ALGORITHMS
    for field, kind in plain_types(registry.load_algorithm(name).Config).items()
    if kind in (int, float)
]


@pytest.mark.parametrize(("name", "field"), NUMBERS)
def test_numbers_out_of_range_are_refused_by_name_and_value(name: str, field: str) -> None:
    config = registry.load_algorithm(name).Config
    whole = plain_types(config)[field] is int
    for value in (-1, 10**12) if whole else (-1.0, math.nan, math.inf):
        expected = rf"^{name}\.{field}: expected .*, got {re.escape(repr(value))}$"
        with pytest.raises(ConfigError, match=expected):
            config(**{field: value})
    with pytest.raises(ConfigError, match=rf"^{name}\.{field}: expected (int|float), got 'many'$"):
        build(config, {field: "many"})
    default = getattr(config(), field)
    assert getattr(build(config, {field: str(default)}), field) == default  # as --set and recipes give it


@pytest.mark.parametrize("name", ALGORITHMS)
def test_unknown_settings_are_refused_with_the_nearest_name(name: str) -> None:
    config = registry.load_algorithm(name).Config
    with pytest.raises(
        UnknownNameError, match=f"unknown setting of {name} 'batchsize': did you mean 'batch_size'"
    ):
        build(config, {"batchsize": 4})


def test_switches_are_true_or_false() -> None:
    config = registry.load_algorithm("omcda").Config
    assert build(config, {"decoupled": "False"}).decoupled is False
    assert build(config, {"decoupled": True}).decoupled is True
    with pytest.raises(ConfigError, match=r"omcda\.decoupled: expected bool, got 'maybe'"):
        build(config, {"decoupled": "maybe"})


@pytest.mark.parametrize(
    "settings",
    [{"allocation": name} for name in ("uniform", "random", "optimal")]
    + [
        {"decoupled": False},
        {"divergence_mixer": "identity"},
        {"metric": "fisher"},
        {"value_start": "zero"},
    ],
)
@pytest.mark.parametrize("team", ["continuous", "unequal", "discrete"])
def test_every_variant_of_omcda_trains_and_resumes(
    settings: dict[str, Any], team: str, tmp_path: Path
) -> None:
    algorithm = learner("omcda", team, settings=settings)
    update(algorithm, team)
    save_state(tmp_path / "resume.pt", algorithm.state_dict(0))
    ahead = update(algorithm, team, first=UPDATES)
    resumed = learner("omcda", team, settings=settings)
    resumed.load_state_dicts([load_state(tmp_path / "resume.pt")])
    again = update(resumed, team, first=UPDATES)
    assert all(differing(a, b) == set() for a, b in zip(ahead, again, strict=True))
    assert all(bool(torch.isfinite(v).all()) for metrics in ahead for v in metrics.values())


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_setting_says_its_range_and_what_it_means(name: str) -> None:
    """``omcda-deploy settings`` shows both."""
    for setting in describe(registry.load_algorithm(name).Config):
        assert setting.range, setting.name
        assert setting.meaning.strip(), setting.name
        assert not setting.meaning.endswith("."), setting.name
