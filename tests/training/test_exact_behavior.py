"""Datasets that know the distributions which acted: pi_b in training, the clone's target, and their files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from omcda_deploy.datasets import Dataset, Episode
from omcda_deploy.datasets.merging import concatenate
from omcda_deploy.datasets.writer import write_dataset as write
from omcda_deploy.errors import DatasetError
from omcda_deploy.registry import read_dataset
from omcda_deploy.spec import TeamSpec
from omcda_deploy.training.batches import TransitionSampler
from omcda_deploy.training.behavior_model import BehaviorConfig, fit
from omcda_deploy.training.distributions import Categorical, TanhGaussian, divergence, policy_of
from tests.support.synthetic import behavior_actor, continuous_spec, discrete_spec, unequal_spec

SPECS = {"continuous": continuous_spec, "unequal": unequal_spec, "discrete": discrete_spec}


def episodes(spec: TeamSpec, count: int = 4, steps: int = 12, seed: int = 0) -> list[Episode]:
    """Episodes with distributions that depend on the observation in a way that a small network can learn."""
    draw = np.random.default_rng(seed)
    agents, size = len(spec.agents), spec.action_size
    sizes = np.array([[agent.action.size] for agent in spec.agents])
    valid = np.arange(size) < sizes
    made = []
    for number in range(count):
        observations = draw.normal(size=(steps + 1, agents, spec.observation_size)).astype(np.float32)
        for index, agent in enumerate(spec.agents):
            observations[:, index, agent.observation_size :] = 0
        lean = np.tanh(observations[:-1, :, :1])
        masks = None
        if spec.action_kind == "discrete":
            masks = np.repeat(valid[None], steps + 1, axis=0).astype(np.uint8)
            logits = np.where(valid, lean * np.arange(size), -np.inf)
            logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
            behavior = {"logits": np.maximum(logits, np.finfo(np.float32).min).astype(np.float32)}
            actions = (logits + draw.gumbel(size=logits.shape)).argmax(-1)
            log_prob = np.take_along_axis(logits, actions[..., None], -1)[..., 0]
        else:
            mean = np.where(valid, lean, 0.0).astype(np.float32)
            behavior = {"mean": mean, "log_std": np.where(valid, -0.7, 0.0).astype(np.float32) + 0 * mean}
            noise = draw.normal(size=mean.shape)
            actions = np.where(valid, np.tanh(mean + np.exp(-0.7) * noise), 0.0).astype(np.float32)
            log_prob = (-0.5 * noise**2).sum(-1)
        behavior["log_prob"] = log_prob
        states = draw.normal(size=(steps + 1, spec.state_size)).astype(np.float32)
        rewards = draw.normal(size=steps)
        timeout = number % 2 == 0
        made.append(Episode(observations, states, actions, rewards, timeout, masks, behavior=behavior))
    return made


def recorded(path: Path, spec: TeamSpec, **size: int) -> Dataset:
    write(path, spec, episodes(spec, **size))
    return read_dataset(path)


@pytest.mark.parametrize("kind", SPECS)
def test_batches_hold_the_distributions_that_acted(tmp_path: Path, kind: str) -> None:
    spec = SPECS[kind]()
    dataset = recorded(tmp_path / "d.hdf5", spec)
    clone = behavior_actor(spec)
    batch = TransitionSampler(dataset, 4, [0], behaviors=[clone]).gather(
        torch.arange(len(dataset.transitions))[None]
    )
    rows = dataset.transitions
    assert dataset.behavior is not None
    cloned = policy_of(clone, batch.next_observation, batch.next_mask)
    known = batch.next_action_known[0].bool()
    assert not known.all()
    names = ("log_probs",) if kind == "discrete" else ("mean", "log_std")
    for name in names:
        array = torch.from_numpy(dataset.behavior["logits" if kind == "discrete" else name])
        ours, following = (getattr(field, name)[0] for field in (batch.behavior, batch.next_behavior))
        assert torch.equal(ours, array[rows])
        assert torch.equal(following[known], array[rows + 1][known])
        assert torch.equal(following[~known], getattr(cloned, name)[0][~known]), "nobody acted there"
    plain = TransitionSampler(replace(dataset, behavior=None), 4, [0], behaviors=[clone]).gather(
        torch.arange(6)[None]
    )
    assert torch.equal(
        getattr(plain.behavior, names[0]), getattr(policy_of(clone, plain.observation, plain.mask), names[0])
    )


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_the_clone_is_fitted_to_the_distributions_and_not_to_samples(tmp_path: Path, kind: str) -> None:
    spec = SPECS[kind]()
    exact = recorded(tmp_path / "d.hdf5", spec, count=20)
    config = BehaviorConfig(steps=150, batch_size=64, hidden=16, lr=1e-2, check_every=50)
    everything = TransitionSampler(exact, 1, [0]).gather(torch.arange(len(exact.transitions))[None])

    def distance(dataset: Dataset) -> tuple[float, set[str]]:
        model, report = fit(dataset, config)
        with torch.no_grad():
            policy = policy_of(model, everything.observation, everything.mask)
            assert isinstance(everything.behavior, TanhGaussian | Categorical)
            return float(divergence(everything.behavior, policy).mean()), set(report)

    ours, report = distance(exact)
    by_samples, other = distance(replace(exact, behavior=None))
    assert ours < 0.5 * by_samples
    assert report ^ other == {"held_out_kl", "held_out_nll"}


@pytest.mark.parametrize("kind", SPECS)
def test_files_keep_the_distributions(tmp_path: Path, kind: str) -> None:
    spec = SPECS[kind]()
    dataset = recorded(tmp_path / "d.hdf5", spec)
    for number, episode in enumerate(episodes(spec)):
        kept = dataset.episode(number).behavior
        assert kept is not None
        assert episode.behavior is not None
        for name, values in episode.behavior.items():
            assert np.array_equal(kept[name], values)
    without = tmp_path / "without.hdf5"
    write(without, spec, [replace(episode, behavior=None) for episode in episodes(spec)])
    other = read_dataset(without)
    assert other.behavior is None
    assert other.digest != dataset.digest
    assert other.digests[1] == dataset.digests[1]
    concatenate([tmp_path / "d.hdf5"], tmp_path / "again.hdf5")
    assert read_dataset(tmp_path / "again.hdf5").digest == dataset.digest
    others = [replace(episode, behavior=None) for episode in episodes(spec, seed=1)]
    write(tmp_path / "others.hdf5", spec, others)
    concatenate([tmp_path / "d.hdf5", tmp_path / "others.hdf5"], tmp_path / "mixed.hdf5")
    assert read_dataset(tmp_path / "mixed.hdf5").behavior is None


def test_wrong_distributions_are_refused(tmp_path: Path) -> None:
    spec = continuous_spec()
    first, second, *_ = episodes(spec)
    assert second.behavior is not None
    wrong = {
        "expected shape": {**second.behavior, "mean": second.behavior["mean"][1:]},
        "expected mean, log_std, log_prob": {"mean": second.behavior["mean"]},
        "expected finite": {**second.behavior, "log_std": np.full_like(second.behavior["log_std"], -np.inf)},
        "of all episodes, or of none": None,
    }
    for message, behavior in wrong.items():
        with pytest.raises(DatasetError, match=message):
            write(tmp_path / "never.hdf5", spec, [first, replace(second, behavior=behavior)])
    assert not (tmp_path / "never.hdf5").exists()
