"""Exported graphs against numpy, float64 and straight from the formulas."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from omcda_deploy.bundle import TEAM, Bundle
from omcda_deploy.export.bundle import export_bundle
from omcda_deploy.local import JointTeam, LocalTeam
from omcda_deploy.training.networks import CategoricalActor, GaussianActor
from tests.support.exported import (
    RAGGED,
    Array,
    Export,
    Gaussian,
    M,
    gaussian,
    standardized,
    team_spec,
)


@pytest.mark.parametrize("team", [LocalTeam, JointTeam])
@pytest.mark.parametrize("sizes", [{}, RAGGED], ids=["equal", "ragged"])
@pytest.mark.parametrize("normalizer", ["none", "per-vector-standardize"])
def test_continuous_outputs_follow_the_formulas(
    export: Export, team: Any, sizes: Any, normalizer: Any
) -> None:
    exported = export(team_spec(normalizer=normalizer, low=-2.0, high=4.0, **sizes))
    noisy, still = exported.act(team), exported.act(team, noise=False)
    for i, agent in enumerate(exported.spec.agents):
        x = exported.rows[agent.name]
        x = standardized(x) if normalizer != "none" else x
        mean, log_std = gaussian(exported.policy, x, i, agent.action.size)
        mean_b, log_std_b = gaussian(exported.behavior, x, i, agent.action.size)
        kl = (
            log_std_b
            - log_std
            + (np.exp(2 * log_std) + (mean - mean_b) ** 2) / (2 * np.exp(2 * log_std_b))
            - 0.5
        )
        u = mean + np.exp(log_std) * exported.noise[agent.name]
        got = noisy[agent.name]
        np.testing.assert_allclose(got.action, 1 + 3 * np.tanh(u), atol=1e-5)
        np.testing.assert_allclose(still[agent.name].action, 1 + 3 * np.tanh(mean), atol=1e-5)
        np.testing.assert_allclose(got.parameters["behavior_action"], 1 + 3 * np.tanh(mean_b), atol=1e-5)
        np.testing.assert_allclose(got.divergence, kl.sum(-1), atol=1e-5, rtol=1e-5)
        np.testing.assert_array_equal(got.divergence, still[agent.name].divergence)
        for name, value in zip(
            ("mean", "log_std", "behavior_mean", "behavior_log_std"),
            (mean, log_std, mean_b, log_std_b),
            strict=True,
        ):
            np.testing.assert_allclose(got.parameters[name], value, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("team", [LocalTeam, JointTeam])
def test_neg_log_behavior_is_the_density_of_the_action_given(export: Export, team: Any) -> None:
    exported = export(team_spec(**RAGGED), "neg_log_behavior")
    for i, agent in enumerate(exported.spec.agents):
        decision = exported.act(team)[agent.name]
        mean, log_std = gaussian(
            exported.behavior, standardized(exported.rows[agent.name]), i, agent.action.size
        )
        action = decision.action.astype(np.float64)
        u = np.arctanh(action)
        log_density = -0.5 * ((u - mean) / np.exp(log_std)) ** 2 - log_std - 0.5 * math.log(2 * math.pi)
        log_density -= np.log1p(-(action**2))
        clear = (np.abs(action) < 0.99).all(-1)
        assert clear.sum() > M / 2
        np.testing.assert_allclose(
            decision.divergence[clear], -log_density.sum(-1)[clear], atol=1e-4, rtol=1e-5
        )


def test_saturated_actions_have_a_finite_density(export: Export) -> None:
    exported = export(team_spec(), "neg_log_behavior")
    noise = {name: np.full((1, 2), 60.0, np.float32) for name in exported.spec.names}
    rows = {name: rows[:1] for name, rows in exported.rows.items()}
    for decision in LocalTeam(exported.bundle).act(rows, noise=noise).values():
        assert (decision.action == 1.0).all()
        assert np.isfinite(decision.divergence).all()


@pytest.mark.parametrize("sizes", [{}, RAGGED], ids=["equal", "ragged"])
def test_raw_and_standardized_observations_act_alike(export: Export, sizes: Any) -> None:
    exported = export(team_spec(**sizes))
    normal = {name: standardized(rows).astype(np.float32) for name, rows in exported.rows.items()}
    for team in (LocalTeam(exported.bundle), JointTeam(exported.bundle)):
        raw, standard = team.act(exported.rows), team.act(normal)
        for name in exported.spec.names:
            assert not np.allclose(exported.rows[name], normal[name], atol=0.1)
            np.testing.assert_allclose(raw[name].action, standard[name].action, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, 100.1])
def test_a_constant_observation_counts_as_zeros(export: Export, value: float) -> None:
    exported = export(team_spec())
    team = LocalTeam(exported.bundle)
    constant = team.act({name: np.full(5, value, np.float32) for name in exported.spec.names})
    for i, name in enumerate(exported.spec.names):
        bias = exported.policy.bias.detach().numpy()[i, 0, :2]
        np.testing.assert_allclose(constant[name].action, np.tanh(bias), atol=1e-5)


@pytest.mark.parametrize("team", [LocalTeam, JointTeam])
@pytest.mark.parametrize(
    "sizes", [{"actions": (4, 4)}, {**RAGGED, "actions": (2, 4, 3)}], ids=["equal", "ragged"]
)
@pytest.mark.parametrize("kind", ["kl", "neg_log_behavior"])
def test_discrete_outputs_follow_the_formulas(export: Export, team: Any, sizes: Any, kind: Any) -> None:
    exported = export(team_spec("discrete", normalizer="none", **sizes), kind)
    decisions = exported.act(team)
    rows = np.arange(M)
    for i, agent in enumerate(exported.spec.agents):
        size, got = agent.action.size, decisions[agent.name]
        mask = exported.masks[:, i, :size].astype(bool)
        nothing_available = ~mask.any(-1)
        assert nothing_available.sum() >= 20
        mask[nothing_available, 0] = True

        def log_softmax(actor: Gaussian, i: int = i, mask: Array = mask, size: int = size) -> Array:
            name = exported.spec.names[i]
            logits = np.where(mask, gaussian(actor, exported.rows[name], i, size)[0] * 5, -np.inf)
            logits -= logits.max(-1, keepdims=True)
            result: Array = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            return result

        log_p, log_b = log_softmax(exported.policy), log_softmax(exported.behavior)
        scores = log_p + exported.noise[agent.name]
        assert got.action.dtype == np.int64
        assert got.action.shape == (M,)
        assert (got.action[nothing_available] == 0).all()
        assert mask[rows, got.action].all()
        np.testing.assert_allclose(scores[rows, got.action], scores.max(-1), atol=1e-4)
        np.testing.assert_allclose(log_b[rows, got.parameters["behavior_action"]], log_b.max(-1), atol=1e-4)
        if kind == "kl":
            with np.errstate(invalid="ignore"):
                terms = np.where(mask, np.exp(log_p) * (log_p - log_b), 0.0)
            np.testing.assert_allclose(got.divergence, terms.sum(-1), atol=1e-5, rtol=1e-5)
        else:
            np.testing.assert_allclose(got.divergence, -log_b[rows, got.action], atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(got.parameters["logits"][mask], log_p[mask], atol=1e-5)
        assert np.isfinite(got.parameters["logits"]).all()
        assert (np.exp(got.parameters["logits"][~mask]) == 0).all()


def test_a_behavior_policy_itself_is_computed_once_and_has_no_divergence(
    tmp_path: Path, export: Export
) -> None:
    spec = team_spec()
    two = export(spec)
    actor = Gaussian(spec, 1)
    nothing = dict.fromkeys(spec.names)
    one = export_bundle(
        tmp_path / "one",
        spec,
        actor,
        actor,
        observations=two.observations,
        divergence_kind="kl",
        budgets=nothing,
        alphas=nothing,
        provenance={},
    )

    def products(bundle: Bundle) -> int:
        graph = onnx.load(bundle.model_path("agent_0")).graph
        return sum(node.op_type in ("MatMul", "Gemm") for node in graph.node)

    assert (products(one), products(two.bundle)) == (1, 2)
    decision = LocalTeam(one).act(two.rows, noise=two.noise)["agent_1"]
    assert (decision.divergence == 0).all()
    np.testing.assert_array_equal(decision.parameters["mean"], decision.parameters["behavior_mean"])


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_trained_networks_leave_no_shape_arithmetic_to_the_request(tmp_path: Path, kind: Any) -> None:
    spec = team_spec(kind)
    network = GaussianActor if kind == "continuous" else CategoricalActor
    bundle = export_bundle(
        tmp_path / "b",
        spec,
        network(5, 2, 2, hidden=16),
        network(5, 2, 2, hidden=16),
        observations=np.random.default_rng(0).standard_normal((M, 2, 5)),
        action_masks=None if kind == "continuous" else np.ones((M, 2, 2), np.uint8),
        divergence_kind="kl",
        budgets=dict.fromkeys(spec.names),
        alphas=dict.fromkeys(spec.names),
        provenance={},
    )
    for model in (*spec.names, TEAM):
        operators = {node.op_type for node in onnx.load(bundle.model_path(model)).graph.node}
        assert not operators & {"Shape", "Expand", "ScatterND", "Range", "Pad"}
