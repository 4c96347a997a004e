"""Networks of the OMIGA family: one MLP per role, shared by all agents, and state-conditioned mixers.

Shapes: B batch, N agents, O observation, A action, S flattened state. Every network maps ``[B, N, ...]``.
Sources: baselines.md 0.1 (layers, sizes), omcda.md section 1 (divergence mixer).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0
MEAN_LIMIT = 9.0


class AgentMLP(nn.Module):
    """``[B, k, I] -> [B, k, H]``: a ReLU MLP on ``[x_i, e_i]`` with one set of weights for all agents.

    The one-hot identity e_i enters the first layer only, so it is added as one learned row per agent instead of
    being concatenated; layer and initialisation are those of ``nn.Linear(I + N, hidden)``.
    """

    def __init__(self, inputs: int, outputs: int, agents: int, hidden: int = 256) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, hidden)
        self.identity = nn.Parameter(torch.empty(agents, hidden))
        bound = 1.0 / math.sqrt(inputs + agents)
        for parameter in (self.first.weight, self.first.bias, self.identity):
            nn.init.uniform_(parameter, -bound, bound)
        self.second = nn.Linear(hidden, hidden)
        self.last = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor, agent: int | None = None) -> Tensor:
        """``x`` [B, N, I], or [B, 1, I] holding the rows of ``agent`` alone."""
        identity = self.identity if agent is None else self.identity[agent : agent + 1]
        hidden = F.relu(self.first(x) + identity)
        output: Tensor = self.last(F.relu(self.second(hidden)))
        return output


class GaussianActor(nn.Module):
    """Tanh-Gaussian policy (baselines.md 0.2): parameters of the Gaussian under the tanh."""

    def __init__(self, observation: int, action: int, agents: int, hidden: int = 256) -> None:
        super().__init__()
        self.mlp = AgentMLP(observation, 2 * action, agents, hidden)

    def forward(self, observation: Tensor, agent: int | None = None) -> tuple[Tensor, Tensor]:
        """``[B, k, O] -> (mean [B, k, A] in [-9, 9], log_std [B, k, A] in [-5, 2])``."""
        mean, log_std = self.mlp(observation, agent).chunk(2, dim=-1)
        return mean.clamp(-MEAN_LIMIT, MEAN_LIMIT), log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)


class CategoricalActor(nn.Module):
    """Masked categorical policy: normalised log-probabilities of the available actions."""

    def __init__(self, observation: int, action: int, agents: int, hidden: int = 256) -> None:
        super().__init__()
        self.mlp = AgentMLP(observation, action, agents, hidden)

    def forward(self, observation: Tensor, mask: Tensor, agent: int | None = None) -> Tensor:
        """``[B, k, O], mask [B, k, A] -> log-probabilities [B, k, A]``."""
        return masked_log_softmax(self.mlp(observation, agent), mask)


class LinearMixer(nn.Module):
    """``Q_tot = sum_i w_i(s) q_i + b(s)`` with ``w_i = |.| >= 0``: Linear(S, 64) -> ReLU -> two heads."""

    def __init__(self, state: int, agents: int, hidden: int = 64) -> None:
        super().__init__()
        self.agents = agents
        self.trunk = nn.Linear(state, hidden)
        self.heads = nn.Linear(hidden, agents + 1)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """``state`` [B, S] -> (w [B, N], b [B])."""
        heads = self.heads(F.relu(self.trunk(state)))
        return heads[:, : self.agents].abs(), heads[:, self.agents]


class DivergenceMixer(nn.Module):
    """``Q^{c,k} = sum_j w^{c,k}_j(s) Q^c_j + b^{c,k}(s)`` for every constraint k (omcda.md section 1).

    Row k of w belongs to the constraint of agent k. The diagonal is fixed to one, without which the loss has the
    trivial minimiser w = 0; off the diagonal ``|.| >= 0``.
    """

    def __init__(self, state: int, agents: int, hidden: int = 64) -> None:
        super().__init__()
        self.agents = agents
        self.trunk = nn.Linear(state, hidden)
        self.heads = nn.Linear(hidden, agents * agents + agents)
        self.register_buffer("eye", torch.eye(agents), persistent=False)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """``state`` [B, S] -> (w [B, N(k), N(j)], b [B, N(k)])."""
        n = self.agents
        heads = self.heads(F.relu(self.trunk(state)))
        free = heads[:, : n * n].abs().view(-1, n, n)
        eye: Tensor = self.eye  # type: ignore[assignment]
        return free * (1.0 - eye) + eye, heads[:, n * n :]


def masked_log_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Log-softmax over available actions; a row without any is treated as having action 0 alone."""
    available = mask.bool()
    none = ~available.any(dim=-1, keepdim=True)
    first = torch.zeros_like(available)
    first[..., 0] = True
    available = available | (none & first)
    return F.log_softmax(logits.masked_fill(~available, torch.finfo(logits.dtype).min), dim=-1)
