"""Behaviour cloning: its loss against numpy, and the distribution that it ends at."""

from __future__ import annotations

import numpy as np
import torch

from omcda_deploy.envs.tabular import OneStepGame, one_step_game
from omcda_deploy.training.algorithms.bc import Algorithm, Config
from tests.support import oracles
from tests.support.synthetic import continuous_spec, discrete_spec, make_learner, random_batch
from tests.support.tabular import TabularFactory, behavior_table, exact_batch, policy_table, rational


def test_the_continuous_loss_is_the_negative_log_likelihood_of_a_tanh_gaussian() -> None:
    spec = continuous_spec()
    learner, batch = make_learner("bc", spec), random_batch(spec)
    with torch.no_grad():
        mean, log_std = (x.double().numpy() for x in learner.policy(batch.observation))  # [R = 1, B, N, A]
    action = batch.action.double().numpy()
    u, std = np.arctanh(action), np.exp(log_std)
    normal = -0.5 * ((u - mean) / std) ** 2 - np.log(std * np.sqrt(2 * np.pi))
    log_prob = (normal - np.log(1 - action**2)).sum(-1)  # [R = 1, B, N]
    np.testing.assert_allclose(learner.update(batch)["loss/policy"].item(), -log_prob.mean(), rtol=1e-5)


def test_the_discrete_loss_is_the_cross_entropy_over_available_actions() -> None:
    spec = discrete_spec()
    learner, batch = make_learner("bc", spec), random_batch(spec)
    assert batch.mask is not None
    assert bool((batch.mask == 0).any())
    with torch.no_grad():
        logits = learner.policy.mlp(batch.observation).double().numpy()  # type: ignore[operator]
    weights = np.exp(logits) * batch.mask.numpy()
    chosen = np.take_along_axis(weights, batch.action.numpy()[..., None], -1)[..., 0]
    expected = -np.mean(np.log(chosen / weights.sum(-1)))
    np.testing.assert_allclose(learner.update(batch)["loss/policy"].item(), expected, rtol=1e-5)


def test_it_ends_at_the_frequencies_of_the_data() -> None:
    game = rational(one_step_game(3), 10)
    assert isinstance(game, OneStepGame)
    algorithm = Algorithm(
        [Config(lr=0.05, grad_clip=1e9)], TabularFactory(game), behavior_table(game), steps=1
    )
    batch = exact_batch(game)
    for _ in range(250):
        metrics = algorithm.update(batch)
    learned = np.stack([table[0] for table in policy_table(algorithm.policy, game)])
    np.testing.assert_allclose(learned, game.behavior, atol=1e-3)
    # The loss's lower bound is the entropy of behaviour, and nothing is left of the divergence.
    entropy = -(game.behavior * np.log(game.behavior)).sum(-1).mean()
    np.testing.assert_allclose(metrics["loss/policy"].item(), entropy, atol=1e-4)
    assert float(metrics["kl"].max()) < 1e-4
    assert oracles.kl(game.behavior, learned).max() < 1e-4
