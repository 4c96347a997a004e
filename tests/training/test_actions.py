"""Actions of unequal sizes: the padded computation against each agent's own by hand, where there is no padding."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from omcda_deploy import registry
from omcda_deploy.datasets.formats.omiga_hdf5 import read
from omcda_deploy.errors import ConfigError
from omcda_deploy.experiments.export import export
from omcda_deploy.experiments.train import train
from omcda_deploy.local import LocalTeam
from omcda_deploy.spec import ActionSpec, TeamSpec
from omcda_deploy.training.actions import (
    clear,
    entry_mean,
    entry_sum,
    padding_of,
)
from omcda_deploy.training.algorithms.bcq import make_policy
from omcda_deploy.training.batches import Batch, TransitionSampler
from omcda_deploy.training.distributions import TanhGaussian, divergence, gaussian_of
from omcda_deploy.training.fleet import Noise, run_state
from omcda_deploy.training.influence import influence
from omcda_deploy.training.networks import NetworkFactory
from omcda_deploy.training.snapshot_team import SnapshotTeam
from tests.support.synthetic import (
    HIDDEN,
    behavior_actor,
    continuous_spec,
    differing,
    make_learner,
    random_batch,
    unequal_spec,
    write_dataset,
)

SPEC = unequal_spec()
SIZES = [agent.action.size for agent in SPEC.agents]  # 1 and 2
ALGORITHMS = [name for name in registry.algorithms() if "continuous" in registry.load_algorithm(name).ACTIONS]
Array = NDArray[np.float64]


def array(tensor: Tensor) -> Array:
    """A tensor of one run without the axis of runs, in float64."""
    values: Array = tensor.detach().double().numpy()[0]
    return values


def own(tensor: Tensor, agent: int) -> Array:
    """An agent's own entries of [1, ..., N, A]."""
    return array(tensor)[..., agent, : SIZES[agent]]


def mlp(network: nn.Module, x: Array, agent: int) -> Array:
    """An AgentMLP's answer to one agent, whose input ``x`` is as long as the agent's own entries.

    Weights of entries that the agent does not have are not multiplied by zero: they are left out.
    """
    state = {name: values.double().numpy() for name, values in run_state(network, 0).items()}
    hidden = x @ state["first.weight"][:, : x.shape[-1]].T + state["first.bias"] + state["identity"][agent]
    hidden = np.maximum(hidden, 0.0) @ state["second.weight"].T + state["second.bias"]
    output: Array = np.maximum(hidden, 0.0) @ state["last.weight"].T + state["last.bias"]
    return output


def of_action(network: nn.Module, o: Array, action: Array, agent: int) -> Array:
    """The answer to an observation [B, O] and the agent's own action [(K,) B, A_i]."""
    rows = np.broadcast_to(o, (*action.shape[:-1], o.shape[-1]))
    return mlp(network, np.concatenate([rows, action], -1), agent)


def q(critic: Any, o: Array, action: Array, agent: int) -> Array:
    return of_action(critic.mlp, o, action, agent)[..., 0]


def gaussian(actor: Any, o: Array, agent: int) -> tuple[Array, Array]:
    """Mean and log_std of the agent's own entries."""
    mean, log_std = np.split(mlp(actor.mlp, o, agent), 2, -1)
    return mean[..., : SIZES[agent]].clip(-9, 9), log_std[..., : SIZES[agent]].clip(-5, 2)


def log_density(action: NDArray[Any], mean: Array, log_std: Array) -> Array:
    """The change of variables from a normal u to tanh(u), entry by entry."""
    standard = (np.arctanh(action) - mean) / np.exp(log_std)
    terms = -0.5 * standard**2 - log_std - 0.5 * np.log(2.0 * np.pi) - np.log(1.0 - action**2)
    return np.asarray(terms.sum(-1))


def kl(mean: Array, log_std: Array, mean_b: Array, log_std_b: Array) -> Array:
    variance, variance_b = np.exp(2 * log_std), np.exp(2 * log_std_b)
    terms = log_std_b - log_std + (variance + (mean - mean_b) ** 2) / (2 * variance_b) - 0.5
    return np.asarray(terms.sum(-1))


def each(values: Any) -> Array:
    """Join what was computed agent by agent: [..., N]."""
    return np.stack(list(values), -1)


def close(ours: Tensor, expected: Any) -> None:
    np.testing.assert_allclose(ours.detach().numpy().squeeze(0), expected, rtol=2e-4, atol=1e-5)


def behavior_parameters(batch: Batch) -> list[tuple[Array, Array]]:
    """Mean and log_std of the behaviour policy, of each agent's own entries."""
    behavior = batch.behavior
    assert isinstance(behavior, TanhGaussian)
    return [(own(behavior.mean, i), own(behavior.log_std, i)) for i in range(2)]


def learner(name: str, **settings: Any) -> tuple[Any, Batch]:
    """A learner that has taken three steps, and a batch that it has not seen."""
    algorithm: Any = make_learner(name, SPEC, settings)
    for seed in range(3):
        algorithm.update(random_batch(SPEC, seed=seed))
    return algorithm, random_batch(SPEC, seed=9)


def test_densities_and_divergences_are_those_of_an_agents_own_entries() -> None:
    algorithm, batch = learner("bc")
    o = array(batch.observation)
    policy = gaussian_of(algorithm.policy, batch.observation)
    parameters = [gaussian(algorithm.policy, o[:, i], i) for i in range(2)]
    densities = each(log_density(own(batch.action, i), *parameters[i]) for i in range(2))
    close(batch.log_prob(policy), densities)
    close(policy.log_prob(batch.action), densities)
    cloned = behavior_parameters(batch)
    close(divergence(policy, batch.behavior), each(kl(*parameters[i], *cloned[i]) for i in range(2)))
    close(algorithm.update(batch)["loss/policy"], -densities.mean())


@pytest.mark.parametrize("metric", ["euclidean", "fisher"])
def test_influence_is_that_of_an_agents_own_entries(metric: str) -> None:
    algorithm, batch = learner("bc")
    policy, cloned = gaussian_of(algorithm.policy, batch.observation), behavior_parameters(batch)
    gradient = (torch.randn_like(policy.mean), torch.randn_like(policy.mean))
    expected = []
    for i in range(2):
        mean, log_std, (mean_b, log_std_b) = own(policy.mean, i), own(policy.log_std, i), cloned[i]
        variance, variance_b = np.exp(2 * log_std), np.exp(2 * log_std_b)
        pairs = [  # gradient of the value, of the divergence, weight of the entry
            (own(gradient[0], i), (mean - mean_b) / variance_b, variance),
            (own(gradient[1], i), variance / variance_b - 1, np.full_like(variance, 0.5)),
        ]
        weights = [weight if metric == "fisher" else 1.0 for *_, weight in pairs]
        product = sum((w * v * k).sum(-1) for w, (v, k, _) in zip(weights, pairs, strict=True)).mean()
        square = sum((w * k * k).sum(-1) for w, (_, k, _) in zip(weights, pairs, strict=True)).mean()
        expected.append(product / square)
    close(influence(policy, batch.behavior, gradient, metric), np.array(expected))


def test_omcda_computes_its_losses_from_own_entries_alone() -> None:
    algorithm, batch = learner("omcda", value_start="zero")
    critic, config = algorithm.critic, algorithm.config
    o, alpha = array(batch.observation), array(algorithm.alpha)
    w_r, w_c = (array(m(batch.state)[0]) for m in (critic.mixer_r_target, critic.mixer_c_target))
    kappa = ((alpha[:, None] * w_c).sum(-2) / alpha).clip(max=config.kappa_max)
    v_r, v_c = (array(v(batch.observation)) for v in (critic.v_r, critic.v_c))
    values = {
        name: each(q(getattr(critic, name), o[:, i], own(batch.action, i), i) for i in range(2))
        for name in ("q_r", "q_r_target", "q_c_target")
    }
    z = w_r / alpha * (values["q_r_target"] - v_r) + kappa * (values["q_c_target"] - v_c)
    rho = np.exp(z.clip(max=config.z_max))
    densities = each(
        log_density(own(batch.action, i), *gaussian(algorithm.actor, o[:, i], i)) for i in range(2)
    )
    w, b = (array(part) for part in critic.mixer_r(batch.state))
    w2, b2 = (array(part) for part in critic.mixer_r_target(batch.next_state))
    next_value = (w2 * array(critic.v_r_target(batch.next_observation))).sum(-1) + b2
    y = array(batch.reward) + config.gamma * array(batch.not_done) * next_value
    metrics = algorithm.update(batch)
    close(metrics["loss/policy"], -(rho * densities).mean())
    close(metrics["loss/reward_value"], (rho * (values["q_r_target"] - v_r) ** 2).mean())
    close(metrics["loss/reward_critic"], (((w * values["q_r"]).sum(-1) + b - y) ** 2).mean())
    after = [gaussian(algorithm.policy, o[:, i], i) for i in range(2)]
    cloned = behavior_parameters(batch)
    close(metrics["kl"], each(kl(*after[i], *cloned[i]).mean() for i in range(2)))


def test_cql_computes_its_losses_from_own_entries_alone() -> None:
    algorithm, batch = learner("cql", importance_correction=True, samples=4, alpha=0.7)
    config, shape = algorithm.config, batch.action.shape[1:]
    o, o2 = array(batch.observation), array(batch.next_observation)
    w, bias = (array(part) for part in algorithm.mixer(batch.state))
    w2, bias2 = (array(part) for part in algorithm.mixer_target(batch.next_state))
    noise = Noise((0,)).at(algorithm.step)
    uniform = 2.0 * noise.uniform(4, *shape) - 1.0
    present, following, next_noise, policy_noise = (noise.normal(*k, *shape) for k in ((4,), (4,), (1,), ()))
    penalty, policy_loss, value, next_value = [], [], [], []
    for i in range(2):
        (mean, log_std), (mean2, log_std2) = (gaussian(algorithm.policy, x[:, i], i) for x in (o, o2))
        std, std2 = np.exp(log_std), np.exp(log_std2)
        sampled = np.tanh(mean + std * own(present, i)), np.tanh(mean2 + std2 * own(following, i))
        candidates = np.concatenate([own(uniform, i), *sampled])
        flat = np.full(own(uniform, i).shape[:-1], -SIZES[i] * np.log(2.0))
        densities = np.concatenate(
            [flat, log_density(sampled[0], mean, log_std), log_density(sampled[1], mean2, log_std2)]
        )
        scores = w[:, i] * q(algorithm.q, o[:, i], candidates, i) - densities
        data_value = q(algorithm.q, o[:, i], own(batch.action, i), i)
        penalty.append(np.log(np.exp(scores).sum(0)) - w[:, i] * data_value)
        value.append(data_value)
        next_action = np.tanh(mean2 + std2 * own(next_noise, i)[0])
        next_value.append(q(algorithm.q_target, o2[:, i], next_action, i))
        action = np.tanh(mean + std * own(policy_noise, i))
        climbed = w[:, i] * q(algorithm.q, o[:, i], action, i)
        policy_loss.append(log_density(action, mean, log_std) - climbed)
    y = array(batch.reward) + config.gamma * array(batch.not_done) * ((w2 * each(next_value)).sum(-1) + bias2)
    metrics = algorithm.update(batch)
    close(metrics["loss/conservative"], 0.7 * each(penalty).sum(-1).mean())
    close(metrics["loss/policy"], each(policy_loss).mean())
    close(metrics["loss/critic"], (((w * each(value)).sum(-1) + bias - y) ** 2).mean())


def test_bcq_computes_its_losses_from_own_entries_alone() -> None:
    algorithm, batch = learner("bcq", phi=2.0)
    policy, losses = algorithm.policy, algorithm._losses
    o, rows = array(batch.observation), len(array(batch.reward))
    noise = Noise((0,)).at(algorithm.step)
    latents = noise.normal(rows, 2, policy.latent)
    noise.normal(algorithm.config.target_samples, rows, 2, policy.latent)
    free = array(noise.normal(1, rows, 2, policy.latent))[0].clip(-0.5, 0.5)
    errors, prior, climbed = [], [], []
    for i in range(2):
        recorded, size = own(batch.action, i), SIZES[i]
        mean, log_std = np.split(of_action(losses.encoder, o[:, i], recorded, i), 2, -1)
        log_std = log_std.clip(-4.0, 15.0)
        latent = mean + np.exp(log_std) * array(latents)[:, i]
        decoded = np.tanh(of_action(policy.decoder, o[:, i], latent, i)[..., :size])
        errors.append((decoded - recorded) ** 2)
        prior.append(0.5 * (mean**2 + np.exp(2 * log_std) - 1.0) - log_std)
        action = np.tanh(of_action(policy.decoder, o[:, i], free[:, i], i)[..., :size])
        move = np.tanh(of_action(policy.perturbation, o[:, i], action, i)[..., :size])
        climbed.append(q(policy.q, o[:, i], (action + algorithm.config.phi * move).clip(-1, 1), i))
    metrics = algorithm.update(batch)
    reconstruction = np.concatenate([error.ravel() for error in errors]).mean()  # each entry counts once
    close(metrics["loss/vae"], reconstruction + algorithm.config.kl_weight * np.mean(prior))
    close(metrics["loss/policy"], -each(climbed).mean())


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("garbage", [1e9, float("nan")])
def test_what_stands_in_the_padding_changes_nothing(name: str, garbage: float) -> None:
    def trained(fill: float) -> tuple[Any, list[Any]]:
        algorithm: Any = make_learner(name, SPEC)
        history = []
        for seed in range(3):
            batch = random_batch(SPEC, seed=seed)
            for field in ("action", "next_action"):
                getattr(batch, field)[..., padding_of(SPEC)] = fill
            batch.u = batch.log_jacobian = None
            history.append(algorithm.update(batch))
        return algorithm, history

    (ours, our_metrics), (theirs, their_metrics) = trained(0.0), trained(garbage)
    assert all(differing(a, b) == set() for a, b in zip(our_metrics, their_metrics, strict=True))
    assert differing(ours.state_dict(0), theirs.state_dict(0)) == set()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_noise_in_the_padding_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained() -> tuple[Any, list[Any]]:
        algorithm: Any = make_learner(name, SPEC)
        return algorithm, [algorithm.update(random_batch(SPEC, seed=seed)) for seed in range(3)]

    ours, our_metrics = trained()
    padding, drawn = padding_of(SPEC), Noise._drawn
    assert padding is not None

    def with_garbage(self: Noise, *arguments: Any) -> Tensor:
        noise = drawn(self, *arguments)
        return noise.masked_fill(padding, 50.0) if noise.shape[-2:] == padding.shape else noise

    monkeypatch.setattr(Noise, "_drawn", with_garbage)
    theirs, their_metrics = trained()
    assert all(differing(a, b) == set() for a, b in zip(our_metrics, their_metrics, strict=True))
    assert differing(ours.state_dict(0), theirs.state_dict(0)) == set()


def test_bcq_recognises_its_own_choice_of_an_agent_with_fewer_entries() -> None:
    """Its candidates have zeros as padding, as the action has that the check at export puts to it."""
    algorithm, batch = learner("bcq")
    policy: Any = make_policy(algorithm.config, NetworkFactory(SPEC, HIDDEN))
    policy.load_state_dict(run_state(algorithm.policy, 0))
    with torch.no_grad():
        for agent in range(2):
            rows = batch.observation[0, :, agent]
            mean, _ = policy(rows, agent)
            assert mean[:, SIZES[agent] :].eq(0.0).all()
            assert policy.as_good(rows, torch.tanh(mean), agent).all()
            assert not policy.as_good(rows, torch.tanh(mean + 1.0), agent).any()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_padding_that_hides_nothing_changes_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = continuous_spec()

    def trained() -> tuple[Any, list[Any]]:
        algorithm: Any = make_learner(name, spec)
        return algorithm, [algorithm.update(random_batch(spec, seed=seed)) for seed in range(3)]

    ours, our_metrics = trained()
    for module in ("networks", "algorithms.bcq"):
        imported = importlib.import_module(f"omcda_deploy.training.{module}")
        monkeypatch.setattr(imported, "padding_of", lambda team: torch.zeros(3, 2, dtype=torch.bool))
    theirs, their_metrics = trained()
    assert theirs.policy.padding is not None
    assert all(differing(a, b) == set() for a, b in zip(our_metrics, their_metrics, strict=True))
    assert differing(ours.state_dict(0), theirs.state_dict(0)) == set()


def test_a_team_of_equal_sizes_has_no_padding() -> None:
    assert padding_of(continuous_spec()) is None
    padding = padding_of(SPEC)
    assert padding is not None
    assert padding.tolist() == [[False, True], [False, False]]
    values = torch.arange(8.0).view(1, 2, 2, 2)
    assert clear(values, padding).tolist() == [[[[0, 0], [2, 3]], [[4, 0], [6, 7]]]]
    assert clear(values[0, :, 0], padding, 0).tolist() == [[0, 0], [4, 0]]
    assert entry_sum(values, padding).tolist() == [[[0, 5], [4, 13]]]
    assert entry_mean(values, padding).item() == pytest.approx((0 + 2 + 3 + 4 + 6 + 7) / 6)
    for same in (clear(values, None), continuous_spec().squashed(values.numpy())):
        assert same is values or np.shares_memory(same, values.numpy())


def scaled_spec() -> TeamSpec:
    base, arm = SPEC.agents
    return dataclasses.replace(
        SPEC,
        agents=(
            dataclasses.replace(base, action=ActionSpec("continuous", 1, 0.0, 10.0)),
            dataclasses.replace(arm, action=ActionSpec("continuous", 2, -0.4, 0.4)),
        ),
    )


def test_batches_hold_actions_as_policies_see_them(tmp_path: Path) -> None:
    """In [-1, 1] whatever the simulator's range, with zeros as padding and densities of own entries."""
    dataset = read(write_dataset(tmp_path / "data.hdf5", scaled_spec(), [6, 4]))
    squashed = np.random.default_rng(0).uniform(-0.9, 0.9, dataset.actions.shape).astype(np.float32)
    native = dataset.spec.unsquashed(squashed)
    assert native[:, 0, 0].min() > 0.0
    assert native[:, 0, 0].max() > 1.0
    assert np.abs(native[:, 1]).max() < 0.4
    native[:, 0, 1] = 77.0
    behavior = behavior_actor(SPEC)
    sampler = TransitionSampler(dataclasses.replace(dataset, actions=native), 5, (0,), behaviors=[behavior])
    positions = torch.arange(10).unsqueeze(0)
    batch = sampler.gather(positions)
    rows = dataset.transitions
    expected = squashed[rows]
    expected[:, 0, 1] = 0.0
    close(batch.action, expected)
    assert batch.action[0, :, 0, 1].tolist() == [0.0] * 10
    assert batch.u is not None
    assert batch.log_jacobian is not None
    close(batch.u, np.arctanh(expected.astype(np.float64)))
    close(batch.log_jacobian, np.log(1 - expected.astype(np.float64) ** 2).sum(-1))
    cloned = behavior_parameters(batch)
    densities = each(log_density(expected[:, i, : SIZES[i]], *cloned[i]) for i in range(2))
    close(batch.behavior.log_prob(batch.action), densities)
    close(batch.log_prob(batch.behavior), densities)


def test_a_run_acts_as_its_bundle_does_in_the_simulators_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a dataset in the simulator's units to actions in them, beside training and exported."""
    monkeypatch.setenv("OMCDA_CACHE", str(tmp_path))
    spec = scaled_spec()
    path = write_dataset(tmp_path / "data.hdf5", spec, [30, 30])
    small = {"hidden": 8, "batch_size": 8}
    run = train(path, "bc", tmp_path / "run", steps=20, settings=small, behavior={"steps": 20})
    bundle = export(run, tmp_path / "bundle")
    observations = {
        agent.name: np.random.default_rng(0).normal(size=(50, agent.observation_size)).astype(np.float32)
        for agent in spec.agents
    }
    beside, exported = SnapshotTeam(run, 20).act(observations), LocalTeam(bundle).act(observations)
    for agent in spec.agents:
        action = exported[agent.name].action
        assert action.shape == (50, agent.action.size)
        assert agent.action.admits(action)
        np.testing.assert_allclose(beside[agent.name].action, action, atol=1e-4)
        np.testing.assert_allclose(beside[agent.name].divergence, exported[agent.name].divergence, atol=1e-4)
    assert exported["base"].action.mean() > 1.0  # of a range from 0 to 10


@pytest.mark.parametrize("bounds", [(1.0, 1.0), (1.0, -1.0), (-np.inf, 1.0), (0.0, np.nan)])
def test_bounds_that_leave_no_range_are_refused(bounds: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="expected finite bounds with low < high"):
        ActionSpec("continuous", 1, *bounds)
