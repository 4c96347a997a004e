"""BCQ against numpy: its VAE, targets and choices, and exact solutions of games restricted to likely actions."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from omcda_deploy.envs.tabular import ChainGame, Game, OneStepGame, chain_game, one_step_game
from omcda_deploy.errors import ConfigError
from omcda_deploy.export.graph import PolicyGraph
from omcda_deploy.export.parity import settle_ties
from omcda_deploy.spec import TeamSpec
from omcda_deploy.training.algorithms import bcq
from omcda_deploy.training.batches import Batch
from omcda_deploy.training.distributions import policy_of
from omcda_deploy.training.fleet import Noise, run_state
from omcda_deploy.training.networks import NetworkFactory
from tests.support.synthetic import (
    HIDDEN,
    behavior_actor,
    continuous_spec,
    discrete_spec,
    make_learner,
    random_batch,
)
from tests.support.tabular import TabularFactory, behavior_table, exact_batch, policy_table, rational

Float = NDArray[np.float64]


def learner(kind: str, **settings: Any) -> bcq.Algorithm:
    spec = continuous_spec() if kind == "continuous" else discrete_spec()
    algorithm = make_learner("bcq", spec, {"vae_hidden": 8, **settings})
    assert isinstance(algorithm, bcq.Algorithm)
    return algorithm


def exported(algorithm: bcq.Algorithm, spec: TeamSpec) -> Any:
    """The first run's policy, as it is exported."""
    policy = bcq.make_policy(algorithm.config, NetworkFactory(spec, HIDDEN))
    policy.load_state_dict(run_state(algorithm.policy, 0))
    return policy


def mlp(network: Any, *inputs: Tensor | Float) -> Float:
    """The first run's AgentMLP in numpy, on ``[inputs…, e_i]`` identity concatenated; [..., N, outputs]."""
    weights = {key: value.double().numpy() for key, value in run_state(network, 0).items()}
    rows = [np.asarray(x, np.float64) for x in inputs]
    shape = np.broadcast_shapes(*(x.shape[:-1] for x in rows))
    agents = weights["identity"].shape[0]
    x = np.concatenate(
        [np.broadcast_to(row, (*shape, row.shape[-1])) for row in (*rows, np.eye(agents))], axis=-1
    )
    first = np.concatenate((weights["first.weight"], weights["identity"].T), axis=1)
    for weight, bias in ((first, "first"), (weights["second.weight"], "second")):
        x = np.maximum(x @ weight.T + weights[f"{bias}.bias"], 0.0)
    output: Float = x @ weights["last.weight"].T + weights["last.bias"]
    return output


def total(mixer: nn.Module, values: Float, state: Tensor) -> Float:
    with torch.no_grad():
        w, b = (part[0].double().numpy() for part in mixer(state))
    mixed: Float = (w * values).sum(-1) + b
    return mixed


def test_vae_loss_is_reconstruction_and_half_the_kl_of_its_latent() -> None:
    rng = np.random.default_rng(0)
    mean, log_std = rng.normal(size=(4, 3, 2)), rng.normal(-0.5, 0.5, size=(4, 3, 2))
    action, reconstruction = rng.uniform(-1, 1, (2, 4, 3, 5))
    x = np.linspace(-12, 12, 4001)[:, None, None, None]

    def log_normal(m: Float | float, s: Float | float) -> Float:
        return np.asarray(-0.5 * ((x - m) / s) ** 2 - np.log(s) - 0.5 * np.log(2 * np.pi))

    p, q = log_normal(mean, np.exp(log_std)), log_normal(0.0, 1.0)
    kl = np.trapezoid(np.exp(p) * (p - q), x, axis=0)  # by quadrature, [4, 3, 2]
    for weight in (0.5, 2.0):
        expected = ((reconstruction - action) ** 2).mean() + weight * kl.mean()
        tensors = [torch.from_numpy(x)[None] for x in (reconstruction, action, mean, log_std)]
        got = bcq.vae_loss(tensors[0], tensors[1], tensors[2], tensors[3], torch.tensor([weight]), None)
        assert float(got) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("latent", ["action", "team"])
def test_losses_of_a_continuous_step_are_those_of_numpy(latent: str) -> None:
    algorithm = learner("continuous", latent=latent, phi=0.3)
    spec, batch = continuous_spec(), random_batch(continuous_spec())
    n, size = len(spec.agents), 2 * (spec.action_size if latent == "action" else len(spec.agents))
    policy, parts = algorithm.policy, algorithm._losses
    assert isinstance(policy, bcq.GenerativeActor)
    assert isinstance(parts, bcq.GenerativeLosses)
    # Targets unlike the networks they follow, so that taking one for the other shows.
    with torch.no_grad():
        for parameter in parts.target.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    o, o2, a = batch.observation[0], batch.next_observation[0], batch.action[0].double().numpy()
    noise = torch.Generator().manual_seed(0)
    epsilon = torch.randn((32, n, size), generator=noise).double().numpy()
    z_target = torch.randn((10, 32, n, size), generator=noise).double().numpy().clip(-0.5, 0.5)
    z_own = torch.randn((1, 32, n, size), generator=noise).double().numpy().clip(-0.5, 0.5)

    mean, log_std = np.split(mlp(parts.encoder, o, a), 2, axis=-1)
    log_std = log_std.clip(-4.0, 15.0)
    reconstruction = np.tanh(mlp(policy.decoder, o, mean + np.exp(log_std) * epsilon))
    kl = 0.5 * (mean**2 + np.exp(2 * log_std) - 1.0 - 2 * log_std)
    vae = ((reconstruction - a) ** 2).mean() + 0.5 * kl.mean()

    decoded = np.tanh(mlp(policy.decoder, o2, z_target))
    moved = (decoded + 0.3 * np.tanh(mlp(parts.perturbation_target, o2, decoded))).clip(-1, 1)
    q1, q2 = (mlp(q.mlp, o2, moved)[..., 0] for q in (parts.q1_target, parts.q2_target))
    best = np.empty((32, n))
    for row in range(32):
        for i in range(n):
            pairs = list(zip(q1[:, row, i], q2[:, row, i], strict=True))
            best[row, i] = max(0.75 * min(pair) + 0.25 * max(pair) for pair in pairs)
    y = batch.reward[0].numpy() + 0.99 * batch.not_done[0].numpy() * total(
        parts.mixer_target, best, batch.next_state
    )
    critic = sum(
        ((total(parts.mixer, mlp(q.mlp, o, a)[..., 0], batch.state) - y) ** 2).mean()
        for q in (policy.q, parts.q2)
    )

    perturbed = np.tanh(mlp(policy.decoder, o, z_own))
    perturbed = (perturbed + 0.3 * np.tanh(mlp(policy.perturbation, o, perturbed))).clip(-1, 1)
    climbed = -mlp(policy.q.mlp, o, perturbed).mean()

    metrics = algorithm.update(batch)
    assert float(metrics["loss/vae"]) == pytest.approx(vae, rel=1e-5)
    assert float(metrics["loss/critic"]) == pytest.approx(critic, rel=1e-5)
    assert float(metrics["loss/policy"]) == pytest.approx(climbed, rel=1e-4)


@pytest.mark.parametrize(
    ("loss", "trained"),
    [("policy", {"perturbation"}), ("critic", {"q", "q2", "mixer"}), ("vae", {"encoder", "decoder"})],
)
def test_each_loss_trains_its_own_networks_alone(loss: str, trained: set[str]) -> None:
    algorithm = learner("continuous")
    policy, parts = algorithm.policy, algorithm._losses
    assert isinstance(parts, bcq.GenerativeLosses)
    losses, _ = parts(random_batch(continuous_spec()), Noise([0]).at(0))
    losses[loss].backward()  # type: ignore[no-untyped-call]
    networks = {
        **{name: getattr(policy, name) for name in ("q", "decoder", "perturbation")},
        **{name: getattr(parts, name) for name in ("q2", "encoder", "mixer")},
    }
    reached = {name for name, net in networks.items() if any(p.grad is not None for p in net.parameters())}
    assert reached == trained


def test_the_generative_policy_takes_the_candidate_that_its_own_q_values_most() -> None:
    algorithm = learner("continuous", phi=0.3, candidates=40)
    batch = random_batch(continuous_spec())
    for _ in range(20):
        algorithm.update(batch)
    policy, o = algorithm.policy, batch.observation[0]
    assert isinstance(policy, bcq.GenerativeActor)
    latents = policy.latents.double().numpy()[:, None, None]
    assert np.abs(latents).max() == 0.5
    decoded = np.tanh(mlp(policy.decoder, o, latents))
    actions = (decoded + 0.3 * np.tanh(mlp(policy.perturbation, o, decoded))).clip(-1, 1)
    best = mlp(policy.q.mlp, o, actions)[..., 0].argmax(0)
    expected = np.take_along_axis(actions, best[None, ..., None], 0)[0].clip(-0.999, 0.999)
    alone = exported(algorithm, continuous_spec())
    with torch.no_grad():
        mean, log_std = alone(o)
        np.testing.assert_allclose(np.tanh(mean.numpy()), expected, atol=1e-5)
        assert float(log_std.exp().max()) < 1e-8  # noise changes nothing
        for i in range(3):
            torch.testing.assert_close(alone(o[:, i], i)[0], mean[:, i])
        in_fleet, _ = policy(batch.observation)
        np.testing.assert_allclose(np.tanh(in_fleet[0].numpy()), expected, atol=1e-5)
    torch.manual_seed(77)  # the latents are the same in every process
    fresh = bcq.make_policy(algorithm.config, NetworkFactory(continuous_spec(), HIDDEN))
    assert torch.equal(fresh.state_dict()["latents"], policy.latents)


def test_a_saturated_choice_stays_where_float32_can_tell_it() -> None:
    policy = learner("continuous", phi=0.0).policy
    with torch.no_grad():
        policy.decoder.last.bias.fill_(20.0)  # type: ignore[union-attr, operator]
        mean, _ = policy(random_batch(continuous_spec()).observation)
    np.testing.assert_allclose(np.tanh(mean.numpy()), 0.999, atol=1e-6)


def allowed_actions(behavior: Float, mask: Float, threshold: float) -> list[int]:
    """The definition, in words of its perturbed."""
    available = [a for a in range(len(mask)) if mask[a]] or [0]
    most = max(behavior[a] for a in available)
    return [a for a in available if behavior[a] / most >= threshold]


@pytest.mark.parametrize("threshold", [0.0, 0.4, 0.9, 1.0])
def test_loss_and_choices_of_a_discrete_step_are_those_of_numpy(threshold: float) -> None:
    algorithm = learner("discrete", threshold=threshold)
    batch = random_batch(discrete_spec())
    assert batch.mask is not None
    assert batch.next_mask is not None
    batch.next_mask[0, 3, 1] = 0  # no action at all: action 0
    policy, parts = algorithm.policy, algorithm._losses
    assert isinstance(policy, bcq.RestrictedActor)
    assert isinstance(parts, bcq.RestrictedLosses)
    cloned: Any = behavior_actor(discrete_spec())
    with torch.no_grad():
        for behavior in (policy.behavior, cloned):
            behavior.mlp.last.weight.mul_(8.0)  # sharper than at birth
        batch.behavior = policy_of(cloned, batch.observation, batch.mask)
        batch.next_behavior = policy_of(cloned, batch.next_observation, batch.next_mask)
        for parameter in parts.target.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        q = policy.greedy.q(batch.observation, batch.action)[0].double().numpy()
        online = policy.greedy.q.values(batch.next_observation)[0].double().numpy()
        target = parts.q_target.values(batch.next_observation)[0].double().numpy()
        likelihood = cloned(batch.next_observation, batch.next_mask)[0].exp().double().numpy()
        chosen = policy(batch.next_observation, batch.next_mask)[0].argmax(-1).numpy()
    best, expected = np.empty((32, 2)), np.empty((32, 2), int)
    for row in range(32):
        for i in range(2):
            among = allowed_actions(likelihood[row, i], batch.next_mask[0, row, i].numpy(), threshold)
            expected[row, i] = max(among, key=lambda a: online[row, i, a])
            best[row, i] = target[row, i, expected[row, i]]
    np.testing.assert_array_equal(chosen, expected)
    assert expected[3, 1] == 0
    y = batch.reward[0].numpy() + 0.99 * batch.not_done[0].numpy() * total(
        parts.mixer_target, best, batch.next_state
    )
    loss = ((total(parts.mixer, q, batch.state) - y) ** 2).mean()
    assert float(algorithm.update(batch)["loss/critic"]) == pytest.approx(loss, rel=1e-5)


def train(game: Game, threshold: float, steps: int) -> bcq.Algorithm:
    config = bcq.Config(threshold=threshold, lr=0.1, tau=0.2, gamma=0.9, grad_clip=1e9)
    algorithm = bcq.Algorithm([config], TabularFactory(game), behavior_table(game), steps=10**6)
    batch = exact_batch(game)
    torch.set_num_threads(1)
    for _ in range(steps):
        algorithm.update(batch)
    return algorithm


def test_the_best_action_outside_the_allowed_set_is_never_taken() -> None:
    rewards = np.array([[1.0, 5.0, 2.0, 0.0], [9.0, 0.0, 3.0, 4.0]])
    behavior = np.array(
        [[0.4, 0.1, 0.3, 0.2], [0.1, 0.4, 0.2, 0.3]]
    )  # the best action of each: a quarter of max
    game = OneStepGame(rewards, behavior)
    restricted = policy_table(train(game, 0.4, 150).policy, game)
    assert [int(table[0].argmax()) for table in restricted] == [2, 3]
    assert [float(table[0].max()) for table in restricted] == [1.0, 1.0]
    free = policy_table(train(game, 0.2, 150).policy, game)
    assert [int(table[0].argmax()) for table in free] == [1, 0]


def restricted_values(game: ChainGame, threshold: float) -> list[Float]:
    """Value iteration over likely actions alone, per chain [X, K]."""
    solved = []
    for chain in game.chains:
        q = np.zeros_like(chain.rewards)
        likely = chain.behavior >= threshold * chain.behavior.max(-1, keepdims=True)
        for _ in range(500):
            v = np.where(likely, q, -np.inf).max(-1)
            q = chain.rewards + game.gamma * (1.0 - game.stop) * chain.transitions @ v
        solved.append(np.where(likely, q, -np.inf))
    return solved


def test_chains_are_solved_over_likely_actions_only() -> None:
    game = rational(chain_game(7, states=3, actions=3, branching=1, stop=0.0), 6)
    assert isinstance(game, ChainGame)
    algorithm = train(game, 0.4, 700)
    exact, free = restricted_values(game, 0.4), restricted_values(game, 0.0)
    tables = policy_table(algorithm.policy, game)
    for solution, table in zip(exact, tables, strict=True):
        np.testing.assert_array_equal(table.argmax(-1), solution.argmax(-1))
    assert any((a.argmax(-1) != b.argmax(-1)).any() for a, b in zip(exact, free, strict=True))
    q = algorithm.policy.state_dict()["greedy.q.table"][0].double().numpy()
    # Constants move between agents; the sum over agents is what is learned.
    for x in np.ndindex(3, 3):
        best = [int(solution[state].argmax()) for solution, state in zip(exact, x, strict=True)]
        learned = sum(q[i, state, a] for i, (state, a) in enumerate(zip(x, best, strict=True)))
        expected = sum(solution[state].max() for solution, state in zip(exact, x, strict=True))
        assert learned == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_greedy_team_beats_the_behavior_on_a_one_step_game(seed: int) -> None:
    game = rational(one_step_game(seed), 10)
    assert isinstance(game, OneStepGame)
    tables = policy_table(train(game, 0.4, 150).policy, game)
    reward = sum(float(table[0] @ row) for table, row in zip(tables, game.rewards, strict=True))
    assert reward > float((game.behavior * game.rewards).sum())


def test_candidates_of_equal_value_may_be_exchanged_and_nothing_else() -> None:
    spec = continuous_spec()
    algorithm = learner("continuous", phi=0.3, candidates=20)
    policy, first = exported(algorithm, spec), random_batch(spec).observation[0]
    assert isinstance(policy, bcq.GenerativeActor)
    with torch.no_grad():
        policy.q.mlp.last.weight.zero_()  # all candidates are worth the same
        actions, _ = policy.candidates(first[:, 0], 0)
    graph = PolicyGraph(spec, policy, behavior_actor(spec), "neg_log_behavior", 0)
    observation, noise = first[:, 0], torch.zeros(32, spec.action_size)
    feed = {"observation": observation.numpy(), "noise": noise.numpy()}
    names = (
        "action",
        "divergence",
        "behavior_action",
        "mean",
        "log_std",
        "behavior_mean",
        "behavior_log_std",
    )
    with torch.no_grad():
        want = {key: value.numpy() for key, value in zip(names, graph(observation, noise), strict=True)}
    got = copy.deepcopy(want)
    other, stranger = actions[7, 0].numpy(), actions[7, 1].numpy() + 0.01
    for row, action in ((0, other), (1, stranger)):
        got["action"][row], got["mean"][row], got["divergence"][row] = action, np.arctanh(action), 5.0
    settled = settle_ties(graph, feed, got, want)
    assert settled["divergence"][0] == 5.0
    np.testing.assert_array_equal(settled["action"][0], other)
    for key in names:
        np.testing.assert_array_equal(settled[key][1:], want[key][1:])
    with torch.no_grad():
        policy.q.mlp.last.weight.normal_()  # now they differ in worth
        assert int(policy.as_good(observation, actions[7], 0).sum()) < 8


def test_choices_on_the_threshold_or_of_equal_value_may_fall_either_way() -> None:
    spec = discrete_spec()
    policy = exported(learner("discrete", threshold=0.5), spec)
    assert isinstance(policy, bcq.RestrictedActor)
    observation = torch.zeros(1, spec.observation_size)
    mask = torch.tensor([[1, 1, 1, 0]], dtype=torch.uint8)

    def good(g: list[float], q: list[float]) -> list[bool]:
        with torch.no_grad():
            for network, values in ((policy.behavior.mlp, torch.tensor(g).log()), (policy.greedy.q.mlp, q)):
                network.last.weight.zero_()
                network.last.bias.copy_(torch.as_tensor(values))
            return [bool(policy.as_good(observation, mask, torch.tensor([a]), 0)) for a in range(4)]

    assert good([0.5, 0.4, 0.1, 0.0001], [1.0, 2.0, 9.0, 99.0]) == [False, True, False, False]
    assert good([0.5, 0.4, 0.1, 0.0001], [2.0, 2.0 + 1e-6, 9.0, 99.0]) == [True, True, False, False]
    assert good([0.5, 0.25 + 1e-7, 0.1, 0.0001], [1.0, 2.0, 9.0, 99.0]) == [True, True, False, False]
    assert good([0.5, 0.25 - 1e-7, 0.1, 0.0001], [1.0, 2.0, 9.0, 99.0]) == [True, True, False, False]
    assert good([0.5, 0.24, 0.1, 0.0001], [1.0, 2.0, 9.0, 99.0]) == [True, False, False, False]


@pytest.mark.parametrize("mixer", ["vdn", "qmix"])
@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_other_mixers_fit_their_targets(kind: str, mixer: str) -> None:
    algorithm = learner(kind, mixer=mixer)
    spec = continuous_spec() if kind == "continuous" else discrete_spec()
    batch: Batch = random_batch(spec)
    before = float(algorithm.update(batch)["loss/critic"])
    for _ in range(60):
        after = float(algorithm.update(batch)["loss/critic"])
    assert after < 0.9 * before


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"threshold: expected 0 to 1, got 1\.2"):
        bcq.Config(threshold=1.2)
    with pytest.raises(ConfigError, match="latent: expected one of action, team"):
        bcq.Config(latent="state")
