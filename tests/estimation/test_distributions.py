"""Distributions at every row, against torch's, sampling, and what bundles answer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from omcda_deploy.datasets import Dataset
from omcda_deploy.envs import tabular
from omcda_deploy.errors import BundleError, ConfigError, ContractError, DatasetError
from omcda_deploy.estimation import Categorical, Gaussian, TeamDistributions
from omcda_deploy.experiments.promotions import record
from omcda_deploy.local import LocalTeam
from omcda_deploy.policy import NoiseSource
from omcda_deploy.training import distributions as torch_distributions
from tests.support.bundles import continuous_spec, write_test_bundle

TASK = "toy/chain-mixed"  # agents see and choose unequally much
GAME = tabular.game(TASK)
GENERATOR = np.random.default_rng(3)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    policies = [chain.behavior for chain in GAME.chains]
    return record(GAME, TASK, policies, 40, np.random.default_rng(0))


def gaussians() -> tuple[Gaussian, Gaussian]:
    shape = (5, 2)
    one, other = (
        Gaussian(GENERATOR.normal(size=shape), GENERATOR.normal(size=shape) * 0.3) for _ in range(2)
    )
    return one, other


def test_gaussians_are_those_of_training() -> None:
    """Log-density ratios and divergences, in float64; the Jacobian cancels."""
    one, other = gaussians()
    action = np.tanh(GENERATOR.normal(size=(5, 3)))  # one entry more than the agent's
    of_torch = [
        torch_distributions.TanhGaussian(*(torch.from_numpy(v)[None] for v in (g.mean, g.log_std)))
        for g in (one, other)
    ]
    given = torch.from_numpy(action[:, :2])[None]
    ratio = of_torch[0].log_prob(given) - of_torch[1].log_prob(given)
    np.testing.assert_allclose(one.log_density(action) - other.log_density(action), ratio[0], atol=1e-9)
    np.testing.assert_allclose(one.divergence(other), of_torch[0].kl(of_torch[1])[0], atol=1e-9)


def test_choices_are_those_of_training() -> None:
    logits = torch.from_numpy(GENERATOR.normal(size=(2, 6, 4)))
    logits[:, 2:, 3] = torch.finfo(torch.float32).min
    one, other = (torch.log_softmax(part, -1) for part in logits)
    ours = [Categorical(part.numpy()) for part in (one, other)]
    expected = torch_distributions.Categorical(one).kl(torch_distributions.Categorical(other)).numpy()
    np.testing.assert_allclose(ours[0].divergence(ours[1]), expected, atol=1e-9)
    np.testing.assert_allclose(
        ours[0].log_density(np.array([0, 1, 2, 0, 1, 2])), one[range(6), [0, 1, 2] * 2]
    )


def test_expected_features_are_means_over_samples() -> None:
    one, _ = gaussians()
    action = np.tanh(one.mean + np.exp(one.log_std) * np.random.default_rng(0).normal(size=(200_000, 5, 2)))
    sampled = np.concatenate([action.mean(0), (action**2).mean(0)], -1)
    np.testing.assert_allclose(one.features(), sampled, atol=6e-3)
    choices = Categorical(np.log([[0.2, 0.3, 0.5]]))
    np.testing.assert_allclose(choices.features(), [[0.2, 0.3, 0.5]])
    np.testing.assert_array_equal(choices.features_of(np.array([2, 0])), [[0, 0, 1], [1, 0, 0]])


def test_a_temperature_is_that_of_the_noise(dataset: Dataset, tmp_path: Path) -> None:
    """Shares of choices of a team that plays at T, at one state, against the distribution's."""
    bundle = write_test_bundle(tmp_path / "bundle", dataset.spec, seed=4)
    team = TeamDistributions.of_bundle(bundle, dataset, 0.5)
    local, draws = LocalTeam(bundle), 20_000
    noise = NoiseSource(bundle.spec, 0, 0.5).draw(draws)
    assert dataset.action_masks is not None
    observations, masks = {}, {}
    for i, agent in enumerate(bundle.spec.agents):
        seen = dataset.observations[0, i, : agent.observation_size]
        observations[agent.name] = np.tile(seen, (draws, 1))
        masks[agent.name] = np.tile(dataset.action_masks[0, i, : agent.action.size], (draws, 1))
    decisions = local.act(observations, noise=noise, action_masks=masks)
    for agent, distribution in zip(bundle.spec.agents, team.agents, strict=True):
        shares = np.bincount(decisions[agent.name].action, minlength=agent.action.size) / draws
        np.testing.assert_allclose(distribution.features()[0], shares, atol=0.015)


def test_no_choice_behind_an_end_is_the_first_choice(dataset: Dataset, tmp_path: Path) -> None:
    """As graphs take it, though a policy that is to act refuses such a mask."""
    bundle = write_test_bundle(tmp_path / "bundle", dataset.spec, seed=4)
    masks = np.array(dataset.action_masks)
    final = dataset.episode_start + dataset.episode_length
    masks[final] = 0
    answered = TeamDistributions.of_bundle(bundle, dataclasses.replace(dataset, action_masks=masks))
    masks[final, :, 0] = 1
    same = TeamDistributions.of_bundle(bundle, dataclasses.replace(dataset, action_masks=masks))
    for one, other in zip(answered.agents, same.agents, strict=True):
        np.testing.assert_array_equal(one.features(), other.features())


def test_a_recording_is_its_own_distribution(dataset: Dataset) -> None:
    acted = TeamDistributions.of_recording(dataset)
    rows = dataset.transitions
    assert dataset.behavior is not None
    expected = dataset.behavior["log_prob"].sum(1)[rows]
    np.testing.assert_allclose(acted.log_density(dataset.actions)[rows], expected, atol=1e-5)
    assert (acted.divergence(acted) == 0.0).all()


def test_what_has_no_weights_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    good = write_test_bundle(tmp_path / "good", dataset.spec)
    with pytest.raises(ConfigError, match="a deterministic policy has no density"):
        TeamDistributions.of_bundle(good, dataset, 0.0)
    with pytest.raises(ConfigError, match="temperature: expected a number"):
        TeamDistributions.of_bundle(good, dataset, float("nan"))
    other = write_test_bundle(tmp_path / "other", continuous_spec())
    with pytest.raises(ContractError, match="other"):
        TeamDistributions.of_bundle(other, dataset)
    point = write_test_bundle(tmp_path / "point", dataset.spec, divergence_kind="neg_log_behavior")
    with pytest.raises(BundleError, match="expected a policy with a density"):
        TeamDistributions.of_bundle(point, dataset)
    with pytest.raises(DatasetError, match="serve --record"):
        TeamDistributions.of_recording(dataclasses.replace(dataset, behavior=None))
