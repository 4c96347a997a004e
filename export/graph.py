"""The exported computation, from a dataset's observation to the simulator-ready action, as one torch module.

:class:`PolicyGraph` wraps a policy's and a behaviour policy's actor; its inputs and outputs are those that
:mod:`omcda_deploy.bundle` documents. Padding, normalisation, availability mask, squashing, scaling and the
divergence are inside, so a server only moves arrays.

Shapes: B batch, N agents, W observation padded to the largest agent's, A actions. Inner tensors are ``[B, N, ...]``
in the graph of a team and ``[B, ...]`` in the graph of an agent, written ``[B, (N,) ...]``. An agent's graph has no
axis of length 1 because onnxruntime runs a linear layer on matrices as one operator, bias and ReLU included, and on
more dimensions as three.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omcda_deploy.bundle import DivergenceKind
from omcda_deploy.spec import LEAST_VARIANCE, TeamSpec

_HALF_LOG_TAU = 0.5 * math.log(2.0 * math.pi)


class ContinuousActor(Protocol):
    """Tanh-Gaussian policy of all agents; gives the parameters of the Gaussian under the tanh."""

    def __call__(self, observation: Tensor, agent: int | None) -> tuple[Tensor, Tensor]:
        """Map ``[B, N, W]``, or ``[B, W]`` of ``agent`` alone, to mean and log_std, each ``[B, (N,) A]``."""
        ...


class DiscreteActor(Protocol):
    """Categorical policy of all agents; gives normalised log-probabilities of the available actions.

    In a row without an available action, action 0 counts as available.
    """

    def __call__(self, observation: Tensor, mask: Tensor, agent: int | None) -> Tensor:
        """Map ``[B, (N,) W]`` and ``mask`` ``[B, (N,) A]``, 1 where available, to ``[B, (N,) A]``."""
        ...


class PolicyGraph(nn.Module):
    """Graph of one agent, or, with ``agent=None``, of the whole team on joined vectors.

    ``policy`` and ``behavior``: :class:`ContinuousActor` or :class:`DiscreteActor` modules, according to the spec's
    action kind. They may be the same module, which is then computed once.

    Divergences, in nats per agent: ``kl`` is KL(pi_i || pi_b^i), independent of the noise; ``neg_log_behavior`` is
    -log pi_b^i(a|o) at the output action, for continuous actions the density of the squashed action in
    [-1, 1]^A, before it is scaled to the simulator's range.
    """

    center: Tensor  # [sum A]
    half_range: Tensor  # [sum A]

    def __init__(
        self,
        spec: TeamSpec,
        policy: nn.Module,
        behavior: nn.Module,
        divergence_kind: DivergenceKind,
        agent: int | None = None,
    ) -> None:
        super().__init__()
        self.policy, self.behavior = policy, behavior
        self.agent = agent
        self.discrete = spec.action_kind == "discrete"
        self.standardize = spec.normalizer.kind == "per-vector-standardize"
        self.kl = divergence_kind == "kl"
        agents = spec.agents if agent is None else spec.agents[agent : agent + 1]
        team = agent is None
        self.observations = _Layout([a.observation_size for a in agents], spec.observation_size, team)
        self.actions = _Layout([a.action.size for a in agents], spec.action_size, team)
        low = torch.tensor([a.action.low for a in agents for _ in range(a.action.size)])
        high = torch.tensor([a.action.high for a in agents for _ in range(a.action.size)])
        self.scaled = not self.discrete and bool((low != -1.0).any() or (high != 1.0).any())
        self.register_buffer("center", (high + low) / 2.0)
        self.register_buffer("half_range", (high - low) / 2.0)

    def forward(
        self, observation: Tensor, noise: Tensor, action_mask: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Map ``bundle.input_names`` to ``bundle.output_names``, both in their order."""
        rows = self._rows(observation)
        if self.discrete:
            assert action_mask is not None  # export_bundle traces discrete specs with a mask
            return self._discrete(rows, noise, self.actions.split(action_mask))
        return self._continuous(rows, noise)

    def as_good(self, observation: Tensor, action: Tensor, action_mask: Tensor | None) -> Tensor:
        """Return bool [B], True where ``action`` is as good as the policy's own choice, up to rounding.

        For the graph of one agent. ``action``: squashed [B, A], or int64 [B]. Policies that take the best of
        several actions implement a method ``as_good``: the arguments of their ``forward``, with the action before
        ``agent``. For policies without that method the answer is False.
        """
        as_good = getattr(self.policy, "as_good", None)
        if as_good is None:
            return torch.zeros(len(observation), dtype=torch.bool)
        rows = self._rows(observation)
        if action_mask is None:
            good: Tensor = as_good(rows, self.actions.split(action), self.agent)
        else:
            good = as_good(rows, self.actions.split(action_mask), action, self.agent)
        return good

    def _rows(self, observation: Tensor) -> Tensor:
        """Return the actors' input ``[B, (N,) W]`` from joined observations."""
        rows = self.observations.split(observation)
        return _standardize(rows, self.observations) if self.standardize else rows

    def _continuous(self, rows: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        policy: ContinuousActor = self.policy
        behavior: ContinuousActor = self.behavior
        join = self.actions.join
        mean, log_std = map(join, policy(rows, self.agent))  # [B, sum A]
        if behavior is policy:
            mean_b, log_std_b = mean, log_std
        else:
            mean_b, log_std_b = map(join, behavior(rows, self.agent))
        divergence = self.divergence(noise, mean, log_std, mean_b, log_std_b)
        action = self._scale(mean + log_std.exp() * noise)
        return action, divergence, self._scale(mean_b), mean, log_std, mean_b, log_std_b

    def divergence(
        self, noise: Tensor, mean: Tensor, log_std: Tensor, mean_b: Tensor, log_std_b: Tensor
    ) -> Tensor:
        """Compute the continuous divergence ``[B, (N)]`` from the graph's outputs ``[B, sum A]``."""
        if self.kl:
            terms = _gaussian_kl(mean, log_std, mean_b, log_std_b)
        else:
            terms = _negative_log_density(mean + log_std.exp() * noise, mean_b, log_std_b)
        return self.actions.sum(terms)

    def _discrete(self, rows: Tensor, noise: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        policy: DiscreteActor = self.policy
        behavior: DiscreteActor = self.behavior
        logits = policy(rows, mask, self.agent)  # [B, (N,) A]
        logits_b = logits if behavior is policy else behavior(rows, mask, self.agent)
        action = (logits + self.actions.split(noise)).argmax(-1)  # [B, (N)]
        if self.kl:
            # An unavailable action has probability 0 under both; its log-probabilities are finite and cancel.
            divergence = (logits.exp() * (logits - logits_b)).sum(-1)
        else:
            divergence = -logits_b.gather(-1, action.unsqueeze(-1)).squeeze(-1)
        return (
            action,
            divergence,
            logits_b.argmax(-1),
            self.actions.join(logits),
            self.actions.join(logits_b),
        )

    def _scale(self, u: Tensor) -> Tensor:
        # onnxruntime's tanh exceeds 1 by up to two units in the last place.
        squashed = torch.tanh(u).clamp(-1.0, 1.0)
        if not self.scaled:
            return squashed
        return self.center + self.half_range * squashed


class _Layout(nn.Module):
    """Conversion between joined vectors ``[B, sum of sizes]`` and the actors' padded ``[B, (N,) width]``."""

    counts: Tensor  # [(N,) 1]
    valid: Tensor  # [(N,) width], 1 for an agent's entries, 0 for padding
    padded_from: Tensor  # [N * width]
    joined_from: Tensor  # [sum]

    def __init__(self, sizes: Sequence[int], width: int, team: bool) -> None:
        super().__init__()
        self.agents, self.width, self.team = len(sizes), width, team
        self.uniform = all(size == width for size in sizes)
        counts = torch.tensor(sizes).unsqueeze(1)  # [N, 1]
        valid = torch.arange(width) < counts  # [N, width]
        # Padding reads the same agent's first entry times zero, so that one agent's infinity cannot reach another.
        source = counts.cumsum(0) - counts + torch.arange(width) * valid
        self.register_buffer("counts", (counts if team else counts[0]).float())
        self.register_buffer("valid", (valid if team else valid[0]).float())
        self.register_buffer("padded_from", source.reshape(-1))
        self.register_buffer("joined_from", valid.reshape(-1).nonzero().reshape(-1))

    def split(self, joined: Tensor) -> Tensor:
        """Map ``[B, sum]`` to ``[B, (N,) width]``, short vectors followed by zeros."""
        rows = joined if self.uniform else joined.float().index_select(1, self.padded_from)
        if self.team:
            rows = rows.reshape(-1, self.agents, self.width)
        return rows if self.uniform else rows * self.valid

    def join(self, padded: Tensor) -> Tensor:
        """Map ``[B, (N,) width]`` to ``[B, sum]``, the inverse of :meth:`split`."""
        rows = padded.reshape(-1, self.agents * self.width) if self.team else padded
        return rows if self.uniform else rows.index_select(1, self.joined_from)

    def sum(self, joined: Tensor) -> Tensor:
        """Map ``[B, sum]`` to ``[B, (N)]``, the sum over each agent's entries."""
        if self.width == 1:
            return joined if self.team else joined.squeeze(-1)
        return self.split(joined).sum(-1)


def _standardize(rows: Tensor, layout: _Layout) -> Tensor:
    """Compute ``(x - mean(x)) / std(x)`` over each agent's entries; padding stays zero.

    It does not use LayerNormalization, whose variance onnxruntime computed for years as ``E[x^2] - E[x]^2``, which
    cancels.
    """
    if layout.uniform:
        centered = rows - rows.mean(-1, keepdim=True)
    else:
        centered = (rows - rows.sum(-1, keepdim=True) / layout.counts) * layout.valid
    deviation: Tensor = centered.norm(dim=-1, keepdim=True) * layout.counts.rsqrt()
    return centered / deviation.clamp(min=math.sqrt(LEAST_VARIANCE))


def _gaussian_kl(mean: Tensor, log_std: Tensor, mean_b: Tensor, log_std_b: Tensor) -> Tensor:
    """Compute KL(N(mean, std) || N(mean_b, std_b)) per entry; the tanh, a bijection, does not change it."""
    log_ratio = log_std - log_std_b
    distance = (mean - mean_b) * torch.exp(-log_std_b)
    return 0.5 * (torch.exp(2.0 * log_ratio) + distance * distance - 1.0) - log_ratio


def _negative_log_density(u: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Compute -log density of tanh(u) per entry, from u because atanh of a saturated float32 is infinite."""
    z = (u - mean) * torch.exp(-log_std)
    jacobian = 2.0 * (math.log(2.0) - u - F.softplus(-2.0 * u))
    return 0.5 * z * z + log_std + _HALF_LOG_TAU + jacobian
