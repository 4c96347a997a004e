"""The divergence guard against closed forms: actions, weights, and outputs that stay as they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from omcda_deploy.errors import ConfigError
from omcda_deploy.guard import DataReference, Guard, GuardSetting
from omcda_deploy.spec import ActionSpec, Normalizer, TeamSpec
from tests.support.bundles import continuous_spec, discrete_spec

B = 64
Arrays = dict[str, NDArray[Any]]


def gaussian_outputs(spec: TeamSpec, generator: np.random.Generator, noise: NDArray[Any]) -> Arrays:
    """Outputs of a team graph: random Gaussians, their KL per agent, and samples."""
    width = sum(agent.action.size for agent in spec.agents)
    mean, mean_b = generator.normal(size=(2, B, width)).astype(np.float32)
    log_std, log_std_b = generator.uniform(-1.5, 0.3, size=(2, B, width)).astype(np.float32)
    kl = gaussian_kl(mean, np.exp(2 * log_std), mean_b, np.exp(2 * log_std_b))
    return {
        "mean": mean,
        "log_std": log_std,
        "behavior_mean": mean_b,
        "behavior_log_std": log_std_b,
        "divergence": np.stack([kl[:, part].sum(1) for part in slices(spec)], axis=1).astype(np.float32),
        "action": np.tanh(mean + np.exp(log_std) * noise).astype(np.float32),
        "behavior_action": np.tanh(mean_b).astype(np.float32),
    }


def gaussian_kl(mean: Any, var: Any, mean_b: Any, var_b: Any) -> NDArray[np.float64]:
    terms: NDArray[np.float64] = 0.5 * (var / var_b + (mean - mean_b) ** 2 / var_b - 1 - np.log(var / var_b))
    return terms


def slices(spec: TeamSpec) -> list[slice]:
    ends = np.cumsum([agent.action.size for agent in spec.agents]).tolist()
    return [slice(end - agent.action.size, end) for end, agent in zip(ends, spec.agents, strict=True)]


def guard(
    spec: TeamSpec, references: dict[str, DataReference] | None = None, **settings: GuardSetting
) -> Guard:
    return Guard(spec, spec.agents, "kl", settings, references or {})


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(3)


@pytest.mark.parametrize("noisy", [False, True])
def test_fallback_is_the_behaviour_policy_where_the_threshold_is_exceeded(
    generator: np.random.Generator, noisy: bool
) -> None:
    spec = continuous_spec()
    width = sum(agent.action.size for agent in spec.agents)
    noise = generator.normal(size=(B, width)).astype(np.float32) * noisy
    outputs = gaussian_outputs(spec, generator, noise)
    threshold = float(
        np.sort(outputs["divergence"][:, 1])[B // 2]
    )  # a row's own divergence does not exceed it
    originals = {name: values.copy() for name, values in outputs.items()}
    result = guard(spec, agent_1=GuardSetting("fallback", threshold))(noise, outputs)
    above = outputs["divergence"][:, 1] > threshold
    assert 10 < above.sum() < B - 10
    columns = slices(spec)[1]
    behavior = np.tanh(outputs["behavior_mean"] + np.exp(outputs["behavior_log_std"]) * noise)
    np.testing.assert_allclose(result.action[above, columns], behavior[above, columns], atol=1e-6)
    np.testing.assert_array_equal(result.policy_weight[:, 1], np.where(above, 0.0, 1.0))
    # All other actions are the policy's, bit for bit, and the graph's outputs are unchanged.
    np.testing.assert_array_equal(result.action[~above], outputs["action"][~above])
    others = np.ones(width, bool)
    others[columns] = False
    np.testing.assert_array_equal(result.action[:, others], outputs["action"][:, others])
    assert (result.policy_weight[:, [0, 2]] == 1.0).all()
    assert all((values == originals[name]).all() for name, values in outputs.items())


def test_a_gaussian_blend_spends_the_threshold(generator: np.random.Generator) -> None:
    """Its weight w makes KL(pi_w || pi_b) the threshold; pi_w is computed here from the product of densities."""
    spec = continuous_spec()
    noise = generator.normal(size=(B, sum(agent.action.size for agent in spec.agents))).astype(np.float32)
    outputs = gaussian_outputs(spec, generator, noise)
    result = guard(spec, agent_2=GuardSetting("blend", 0.4))(noise, outputs)
    above, columns = outputs["divergence"][:, 2] > 0.4, slices(spec)[2]
    assert above.sum() > 10
    assert (result.policy_weight[~above, 2] == 1.0).all()
    w = result.policy_weight[above, 2].astype(np.float64)[:, None]
    assert ((w > 0) & (w < 1)).all()
    mean, mean_b, var, var_b = (
        outputs["mean"][above, columns].astype(np.float64),
        outputs["behavior_mean"][above, columns].astype(np.float64),
        np.exp(2.0 * outputs["log_std"][above, columns].astype(np.float64)),
        np.exp(2.0 * outputs["behavior_log_std"][above, columns].astype(np.float64)),
    )
    # The product of densities pi_b^(1-w) pi^w, with the square completed.
    var_w = 1.0 / ((1 - w) / var_b + w / var)
    mean_w = var_w * ((1 - w) * mean_b / var_b + w * mean / var)
    np.testing.assert_allclose(gaussian_kl(mean_w, var_w, mean_b, var_b).sum(1), 0.4, atol=1e-6)
    np.testing.assert_allclose(
        result.action[above, columns], np.tanh(mean_w + np.sqrt(var_w) * noise[above, columns]), atol=1e-6
    )


def test_a_categorical_blend_spends_the_threshold_and_stays_available(generator: np.random.Generator) -> None:
    spec = discrete_spec()
    width = sum(agent.action.size for agent in spec.agents)
    columns = slices(spec)[1]
    logits, behavior = np.full((2, B, width), np.finfo(np.float32).min / 4, np.float32)
    for part in slices(spec):
        for array in (logits, behavior):
            scores = generator.normal(size=(B, part.stop - part.start - 1)) * 2.0  # the last is unavailable
            array[:, part.start : part.stop - 1] = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    kl = np.stack(
        [(np.exp(logits[:, p]) * (logits[:, p] - behavior[:, p])).sum(1) for p in slices(spec)], axis=1
    )
    noise = generator.gumbel(size=(B, width)).astype(np.float32)
    action = np.stack([(logits + noise)[:, p].argmax(1) for p in slices(spec)], axis=1)
    outputs = {"logits": logits, "behavior_logits": behavior, "divergence": kl, "action": action}
    result = guard(spec, agent_1=GuardSetting("blend", 0.5))(noise, outputs)
    above = kl[:, 1] > 0.5
    assert above.sum() > 10
    w = result.policy_weight[above, 1].astype(np.float64)[:, None]
    unnormalised = np.exp(behavior[above, columns]) ** (1 - w) * np.exp(logits[above, columns]) ** w
    blend = unnormalised / unnormalised.sum(1, keepdims=True)
    inside = blend[:, :-1]
    spent = (inside * np.log(inside / np.exp(behavior[above, columns][:, :-1]))).sum(1)
    np.testing.assert_allclose(spent, 0.5, atol=1e-5)
    assert (blend[:, -1] == 0.0).all()
    np.testing.assert_array_equal(
        result.action[above, 1], np.argmax(np.log(inside) + noise[above, columns][:, :-1], axis=1)
    )
    np.testing.assert_array_equal(result.action[:, 0], action[:, 0])


def test_observing_changes_nothing_and_counts(generator: np.random.Generator) -> None:
    spec = continuous_spec()
    noise = np.zeros((B, sum(agent.action.size for agent in spec.agents)), np.float32)
    outputs = gaussian_outputs(spec, generator, noise)
    references = {name: DataReference(0.3 * (i + 1), 2.0, [0.0], [1.0]) for i, name in enumerate(spec.names)}
    references = {
        agent.name: replace(
            references[agent.name],
            observation_mean=[0.0] * agent.observation_size,
            observation_std=[1.0] * agent.observation_size,
        )
        for agent in spec.agents
    }
    result = guard(spec, references)(noise, outputs)
    assert result.action is outputs["action"]
    assert (result.policy_weight == 1.0).all()
    above = guard(spec, references).exceeded(outputs["divergence"])
    np.testing.assert_array_equal(above, outputs["divergence"] > [0.3, 0.6, 0.9])


@pytest.mark.parametrize("kind", ["none", "per-vector-standardize"])
def test_distance_is_the_root_mean_square_of_standardised_entries(
    generator: np.random.Generator, kind: Any
) -> None:
    spec = replace(continuous_spec(), normalizer=Normalizer(kind))
    data = {a.name: generator.normal(2.0, 3.0, size=(500, a.observation_size)) for a in spec.agents}
    data["agent_0"][:, 0] = 1.5  # constant in the data
    references = {
        agent.name: DataReference.of(spec, agent, data[agent.name], np.linspace(0.0, 1.0, 500))
        for agent in spec.agents
    }
    assert references["agent_0"].divergence_p99 == pytest.approx(0.99)
    rows = np.concatenate([data[name][:B] for name in spec.names], axis=1).astype(np.float32)
    distance = guard(spec, references).distance(rows)
    assert distance is not None
    for index, name in enumerate(spec.names):
        whole = data[name]
        if kind != "none":
            whole = (whole - whole.mean(1, keepdims=True)) / whole.std(1, keepdims=True)
        mean, std = whole.mean(0), whole.std(0)
        std = np.maximum(std, 0.1 * np.sqrt((std**2).mean()))
        expected = np.sqrt((((whole - mean) / std) ** 2).mean(1))
        np.testing.assert_allclose(distance[:, index], expected[:B], rtol=1e-5)
        assert references[name].distance_p99 == pytest.approx(np.percentile(expected, 99))
    if kind == "none":  # agent 0 alone moves far from the data
        far = rows.copy()
        far[:, : spec.agents[0].observation_size] += 30.0
        moved = guard(spec, references).distance(far)
        assert moved is not None
        assert (moved[:, 0] > 5.0).all()
        np.testing.assert_array_equal(moved[:, 1:], distance[:, 1:])


def test_sampled_actions_are_scaled_to_their_range(generator: np.random.Generator) -> None:
    spec = continuous_spec()
    agents = tuple(replace(a, action=ActionSpec("continuous", a.action.size, -2.0, 6.0)) for a in spec.agents)
    spec = replace(spec, agents=agents)
    noise = generator.normal(size=(B, sum(agent.action.size for agent in spec.agents))).astype(np.float32)
    outputs = gaussian_outputs(spec, generator, noise)
    guarded = guard(spec, agent_0=GuardSetting("fallback", 0.0))(noise, outputs)
    columns = slices(spec)[0]
    sample = np.tanh(outputs["behavior_mean"] + np.exp(outputs["behavior_log_std"]) * noise)
    np.testing.assert_allclose(guarded.action[:, columns], 2.0 + 4.0 * sample[:, columns], atol=1e-5)


def test_without_noise_the_fallback_is_the_graphs_behavior_action(generator: np.random.Generator) -> None:
    """Both tensors of an answer must hold one action, equal to the bit."""
    spec = continuous_spec()
    noise = generator.normal(size=(B, sum(agent.action.size for agent in spec.agents))).astype(np.float32)
    noise[::2] = 0.0
    outputs = gaussian_outputs(spec, generator, noise)
    outputs["behavior_action"] = generator.uniform(-1, 1, size=noise.shape).astype(np.float32)
    guarded = guard(spec, agent_1=GuardSetting("fallback", 0.0))(noise, outputs)
    columns = slices(spec)[1]
    same = guarded.action[:, columns] == outputs["behavior_action"][:, columns]
    assert same[::2].all()
    assert not same[1::2].any()


def test_what_cannot_be_guarded_is_refused() -> None:
    spec = continuous_spec()
    with pytest.raises(ConfigError, match="expected one of observe, fallback, blend, got 'clip'"):
        GuardSetting("clip")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="threshold: expected a number from 0 on, got -1"):
        GuardSetting("fallback", -1)
    with pytest.raises(ConfigError, match="agent_1: the bundle states no threshold"):
        guard(spec, agent_1=GuardSetting("fallback"))
    with pytest.raises(ConfigError, match=r"agent_1: blend expects a policy with a density.*use fallback"):
        Guard(spec, spec.agents, "neg_log_behavior", {"agent_1": GuardSetting("blend", 0.1)}, {})
