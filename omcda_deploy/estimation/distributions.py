"""The distributions of a team at every row of a dataset, in float64 and without torch.

Shapes: R rows, N agents, A the size of one agent's action or the number of its choices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.bundle import Bundle
from omcda_deploy.datasets import Dataset, blocks
from omcda_deploy.datasets.fingerprints import TrainingEpisodes
from omcda_deploy.errors import BundleError, ConfigError, DatasetError
from omcda_deploy.local import LocalPolicy
from omcda_deploy.policy import checked_temperature
from omcda_deploy.spec import require_same_contract

Values: TypeAlias = NDArray[np.float64]

# Actions are held below it: nobody knows how far beyond it the variable under the tanh was.
_EDGE = 1.0 - 1e-6
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(24)  # expectations over one Gaussian entry
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()


@dataclass(frozen=True)
class Gaussian:
    """``a = tanh(u)``, ``u ~ N(mean, exp(log_std)^2)`` of one agent; both [R, A]. Longer actions are cut to A."""

    mean: Values
    log_std: Values

    def log_density(self, action: NDArray[Any]) -> Values:
        """Return the log-density [R] of ``u`` at actions [R, A] in [-1, 1]; tanh's Jacobian cancels in ratios."""
        u = np.arctanh(np.clip(self._own(action), -_EDGE, _EDGE))
        z = (u - self.mean) * np.exp(-self.log_std)
        return np.asarray((-0.5 * z * z - self.log_std).sum(-1))

    def divergence(self, other: Gaussian) -> Values:
        """Return ``KL(self || other)`` [R], nats."""
        gap = other.log_std - self.log_std
        spread = np.exp(-2.0 * gap) + ((self.mean - other.mean) * np.exp(-other.log_std)) ** 2
        return np.asarray((gap + 0.5 * (spread - 1.0)).sum(-1))

    def at_temperature(self, temperature: float) -> Gaussian:
        """Return the distribution of actions whose noise is multiplied."""
        return Gaussian(self.mean, self.log_std + np.log(temperature))

    def features(self) -> Values:
        """Return the expectations of :meth:`features_of` [R, 2 A]."""
        moments = np.zeros((2, *self.mean.shape))
        for node, weight in zip(_NODES, _WEIGHTS, strict=True):
            action = np.tanh(self.mean + node * np.exp(self.log_std))
            moments += weight * np.stack([action, action * action])
        return np.concatenate(list(moments), axis=-1)

    def features_of(self, action: NDArray[Any]) -> Values:
        """Return what values may depend on, of actions [R, A]: the action and its square."""
        values = self._own(action)
        return np.concatenate([values, values * values], axis=-1)

    def _own(self, action: NDArray[Any]) -> Values:
        return np.asarray(action[:, : self.mean.shape[1]], np.float64)


@dataclass(frozen=True)
class Categorical:
    """Log-probabilities [R, A] of one agent's choices, normalised; lowest where one is not available."""

    log_probs: Values

    def log_density(self, action: NDArray[Any]) -> Values:
        """Return the log-probability [R] of choices [R]."""
        return np.asarray(self.log_probs[np.arange(len(action)), action])

    def divergence(self, other: Categorical) -> Values:
        """Return ``KL(self || other)`` [R], nats."""
        probability = np.exp(self.log_probs)
        gap = np.where(probability > 0, self.log_probs - other.log_probs, 0.0)
        return np.asarray((probability * gap).sum(-1))

    def at_temperature(self, temperature: float) -> Categorical:
        """Return the distribution of actions whose noise is multiplied."""
        return Categorical(_normalized(self.log_probs / temperature))

    def features(self) -> Values:
        """Return the expectations of :meth:`features_of`: the probabilities [R, A]."""
        return np.asarray(np.exp(self.log_probs))

    def features_of(self, action: NDArray[Any]) -> Values:
        """Return what values may depend on, of choices [R]: one-hot [R, A]."""
        return np.asarray(np.eye(self.log_probs.shape[1])[action])


@dataclass(frozen=True)
class TeamDistributions:
    """One distribution per agent, at every row of a dataset."""

    agents: Sequence[Gaussian | Categorical]

    @classmethod
    def of_bundle(cls, bundle: Bundle, dataset: Dataset, temperature: float = 1.0) -> TeamDistributions:
        """Compute a bundle's policies at a dataset's observations, at a temperature of play.

        Raises :class:`ContractError` for another team, :class:`ConfigError` for temperature 0 or out of range, and
        :class:`BundleError` for policies without a density.
        """
        require_same_contract(dataset.spec, bundle.spec, "the dataset", f"bundle {bundle.path}")
        if checked_temperature(temperature) == 0.0:
            raise ConfigError(
                "temperature: expected more than 0: a deterministic policy has no density, so recorded actions "
                "carry no weight for it. Estimate at the least temperature that the data support, or play it"
            )
        if bundle.divergence_kind != "kl":
            raise BundleError(
                f"{bundle.path}: expected a policy with a density, this one "
                f"({training_of(bundle).get('algorithm', 'unknown')}) has none, so recorded actions "
                "carry no weight for it: evaluate it by playing"
            )
        agents = _answered(bundle, dataset, "")
        return cls([agent.at_temperature(temperature) for agent in agents])

    @classmethod
    def of_clone(cls, bundle: Bundle, dataset: Dataset) -> TeamDistributions:
        """Compute the behaviour policies in a bundle, a clone of what acted, at a dataset's observations.

        Raises :class:`ContractError` for another team.
        """
        require_same_contract(dataset.spec, bundle.spec, "the dataset", f"bundle {bundle.path}")
        return cls(_answered(bundle, dataset, "behavior_"))

    @classmethod
    def of_recording(cls, dataset: Dataset) -> TeamDistributions:
        """Take the exact distributions that acted.

        Raises :class:`DatasetError` where the dataset does not have them.
        """
        if dataset.behavior is None:
            raise DatasetError(
                "expected a dataset with the exact distributions that acted, this one has none: record with "
                " serve --record  at a temperature above 0 and join (docs/recording.md)"
            )
        return cls.of_arrays(dataset, dataset.behavior)

    @classmethod
    def of_arrays(cls, dataset: Dataset, arrays: Any) -> TeamDistributions:
        """Take arrays [R, N, A] by name, as of :mod:`omcda_deploy.datasets.behavior`."""
        names = ("logits",) if dataset.spec.action_kind == "discrete" else ("mean", "log_std")
        return cls(
            [
                _distribution([np.asarray(arrays[name])[:, index, : agent.action.size] for name in names])
                for index, agent in enumerate(dataset.spec.agents)
            ]
        )

    def log_density(self, actions: NDArray[Any]) -> Values:
        """Return the joint log-density [R] of actions [R, N, A] in [-1, 1], or of choices [R, N]."""
        parts = [agent.log_density(actions[:, index]) for index, agent in enumerate(self.agents)]
        return np.asarray(np.sum(parts, axis=0))

    def divergence(self, other: TeamDistributions) -> Values:
        """Return ``sum_i KL(self_i || other_i)`` [R], nats."""
        return np.asarray(
            np.sum([a.divergence(b) for a, b in zip(self.agents, other.agents, strict=True)], axis=0)  # type: ignore[arg-type]
        )


def training_of(bundle: Bundle) -> Mapping[str, Any]:
    """Return the provenance of a bundle's training; empty for a bundle that says nothing of it."""
    training: Mapping[str, Any] = bundle.manifest.get("training", {})
    return training


def trained_share(bundle: Bundle, dataset: Dataset) -> float | None:
    """Return the share of a dataset's episodes that trained a bundle, 0 to 1; None where the bundle does not tell.

    Raises :class:`BundleError` for fingerprints of episodes that cannot be read.
    """
    training = training_of(bundle)
    if training.get("dataset_digest") in dataset.digests.values():
        return 1.0
    if training and not training.get("dataset_digest"):
        return 0.0  # by playing, as policies that record data are
    if not (text := training.get("episodes")):
        return None
    try:
        return TrainingEpisodes.from_text(text).share_of(dataset)
    except DatasetError as error:
        raise BundleError(f"{bundle.path}: {error}: export the run again") from error


def _answered(bundle: Bundle, dataset: Dataset, prefix: str) -> list[Gaussian | Categorical]:
    """Return what a bundle says of each agent at every row, in outputs whose names begin with ``prefix``."""
    names = ("logits",) if dataset.spec.action_kind == "discrete" else ("mean", "log_std")
    agents = []
    for index, agent in enumerate(dataset.spec.agents):
        policy = LocalPolicy(bundle, agent.name)
        parts: list[list[NDArray[Any]]] = []
        for rows in blocks(len(dataset.observations)):
            mask = None
            if dataset.action_masks is not None:
                mask = dataset.action_masks[rows, index, : agent.action.size].copy()
                mask[~mask.any(axis=1), 0] = 1  # behind an episode's end no choice may be left; graphs take 0
            decision = policy.act(
                dataset.observations[rows, index, : agent.observation_size], action_mask=mask
            )
            parts.append([decision.parameters[prefix + name] for name in names])
        agents.append(_distribution([np.concatenate(part) for part in zip(*parts, strict=True)]))
    return agents


def _distribution(arrays: Sequence[NDArray[Any]]) -> Gaussian | Categorical:
    values = [np.asarray(array, np.float64) for array in arrays]
    return Categorical(_normalized(values[0])) if len(values) == 1 else Gaussian(values[0], values[1])


def _normalized(logits: Values) -> Values:
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))
