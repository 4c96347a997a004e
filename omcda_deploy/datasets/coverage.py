"""Sum up how much of a task a dataset covers, in a few numbers.

* Policies: exp of the entropy of the transitions' shares by policy label, so K policies that recorded equally much
  count as K. None where episodes are not labelled.
* Distinct observation entries: entries of all agents whose standard deviation is above :data:`CONSTANT`, less those
  that are linear copies of an earlier one (a correlation of more than :data:`COPY`): what several agents see in the
  same way counts once. Over :data:`SAMPLE` transitions at equal distances.
* Effective dimensions: the participation ratio ``(sum_k l_k)^2 / sum_k l_k^2`` of the eigenvalues l of the
  correlation matrix of the distinct entries: K for K uncorrelated ones, towards 1 the more they move together.
* Action spread, continuous actions: the standard deviation of each of an agent's numbers; discrete: exp of the
  entropy of the agent's choices, the number of actions that it effectively uses.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.datasets import Dataset

CONSTANT = 1e-4  # standard deviation of an entry that is as good as constant
COPY = 0.9999
SAMPLE = 10_000  # transitions: a correlation matrix of all would take minutes on a wide team


def coverage(dataset: Dataset) -> dict[str, Any]:
    """Return the numbers of this module's description, as JSON values."""
    entries, correlation = _distinct_entries(dataset)
    eigenvalues = np.linalg.eigvalsh(correlation)
    names = dataset.spec.names
    if dataset.spec.action_kind == "continuous":
        spread = {
            name: values.tolist() for name, values in zip(names, _action_deviations(dataset), strict=True)
        }
    else:
        choices = dataset.actions[dataset.transitions]
        spread = {name: effective_number(np.bincount(choices[:, i])) for i, name in enumerate(names)}
    return {
        "policies": _policies(dataset),
        "observation_entries": entries,
        "distinct_observation_entries": len(correlation),
        "effective_dimensions": float(eigenvalues.sum() ** 2 / np.square(eigenvalues).sum())
        if len(correlation)
        else 0.0,
        "action_spread": spread,
    }


def effective_number(counts: NDArray[Any]) -> float:
    """Return exp of the entropy of the shares that ``counts`` are: K for K equal ones, 1 for a single one."""
    shares = counts[counts > 0] / counts.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _policies(dataset: Dataset) -> float | None:
    if dataset.episode_behaviors is None:
        return None
    return effective_number(np.bincount(dataset.episode_behaviors, weights=dataset.episode_length))


def _distinct_entries(dataset: Dataset) -> tuple[int, NDArray[np.float64]]:
    """Return the number of all entries, and the correlation matrix of the distinct ones."""
    count = dataset.transitions.size
    sample = dataset.transitions[np.linspace(0, count - 1, min(count, SAMPLE)).astype(np.int64)]
    rows = dataset.observations[sample].reshape(len(sample), -1).astype(np.float64)
    rows -= rows.mean(axis=0)
    deviations = np.sqrt(np.square(rows).mean(axis=0))
    varies = deviations > CONSTANT
    scaled = rows[:, varies] / deviations[varies]
    correlation = scaled.T @ scaled / len(sample)
    distinct = ~(np.abs(np.triu(correlation, 1)) > COPY).any(axis=0)
    return rows.shape[1], correlation[np.ix_(distinct, distinct)]


def _action_deviations(dataset: Dataset) -> NDArray[np.float64]:
    """Return the standard deviation [N, A] of each number of an action."""
    deviations: NDArray[np.float64] = dataset.actions[dataset.transitions].astype(np.float64).std(axis=0)
    return deviations
