"""Continuous actions as networks see them: in [-1, 1], and padded to the team's largest action.

A team's actions may differ in size: agent i has A_i entries of the A that shared networks give it, and those behind
them are padding. ``padding`` marks it, bool [N, A]; it is None for teams whose agents fill all A entries, for which
every function here does what it would do without. Padding counts nowhere: not in densities and divergences, not in
means over entries, and not in the critics, so what stands there changes nothing.

Shapes: R runs, B batch, N agents, A action.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omcda_deploy.spec import TeamSpec
from omcda_deploy.training.fleet import mean_per_run


def padding_of(spec: TeamSpec) -> Tensor | None:
    """Return the padding of a team's actions; None where there is none, and for choices, which have masks."""
    sizes = torch.tensor([agent.action.size for agent in spec.agents])
    if spec.action_kind == "discrete" or bool((sizes == spec.action_size).all()):
        return None
    return torch.arange(spec.action_size) >= sizes.unsqueeze(1)


def clear(values: Tensor, padding: Tensor | None, agent: int | None = None) -> Tensor:
    """Return ``values`` [..., (N,) A] with zeros as padding; with ``agent``, all are those of this agent alone."""
    if padding is None:
        return values
    return values.masked_fill(padding if agent is None else padding[agent], 0.0)


def entry_sum(terms: Tensor, padding: Tensor | None) -> Tensor:
    """Sum over the entries of each action: ``[..., N, A] -> [..., N]``."""
    return clear(terms, padding).sum(-1)


def entry_mean(values: Tensor, padding: Tensor | None) -> Tensor:
    """Return the mean over everything but runs, as often as there are entries: ``[R, ..., N, A] -> [R]``."""
    mean = mean_per_run(clear(values, padding))
    return mean if padding is None else mean / (1.0 - padding.float().mean())
