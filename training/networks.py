"""Networks of the OMIGA family: one MLP per role, shared by all agents, and state-conditioned mixers.

Shapes: R runs, B batch, N agents, O observation, A action, S flattened state. Networks of one run, as they are
exported, map ``[B, N, ...]``; those of R runs, as they are trained, ``[R, B, N, ...]``.
Sources: docs/baselines.md#networks-and-mixers (layers, sizes), docs/derivation.md#value-decomposition (divergence
mixer).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omcda_deploy.spec import TeamSpec
from omcda_deploy.training.actions import clear, padding_of
from omcda_deploy.training.fleet import stack
from omcda_deploy.training.losses import elu, mix
from omcda_deploy.training.mlp import AgentMLP, Linear, two_layers

M = TypeVar("M", bound=nn.Module)

LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0
MEAN_LIMIT = 9.0
TIE = 1e-5  # relative: values of float32 networks nearer than this may change order in another runtime


class GaussianActor(nn.Module):
    """Tanh-Gaussian policy: parameters of the Gaussian under the tanh.

    Source: docs/baselines.md#densities-and-divergences.
    """

    padding: Tensor | None

    def __init__(
        self, observation: int, action: int, agents: int, hidden: int = 256, padding: Tensor | None = None
    ) -> None:
        super().__init__()
        self.mlp = AgentMLP(observation, 2 * action, agents, hidden)
        self.register_buffer("padding", padding, persistent=False)

    def forward(self, observation: Tensor, agent: int | None = None) -> tuple[Tensor, Tensor]:
        """Map ``[B, (N,) O] -> (mean [B, (N,) A] in [-9, 9], log_std [B, (N,) A] in [-5, 2])``."""
        # Sizes as numbers, not as shapes of tensors: the exported graph would compute those on every request.
        mean, log_std = self.mlp(observation, agent).split(self.mlp.last.out_features // 2, dim=-1)
        return mean.clamp(-MEAN_LIMIT, MEAN_LIMIT), log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)


class CategoricalActor(nn.Module):
    """Masked categorical policy: normalised log-probabilities of the available actions."""

    def __init__(self, observation: int, action: int, agents: int, hidden: int = 256) -> None:
        super().__init__()
        self.mlp = AgentMLP(observation, action, agents, hidden)

    def forward(self, observation: Tensor, mask: Tensor, agent: int | None = None) -> Tensor:
        """Map ``[B, (N,) O], mask [B, (N,) A] -> log-probabilities [B, (N,) A]``."""
        return masked_log_softmax(self.mlp(observation, agent), mask)


class ContinuousQ(nn.Module):
    """Critics ``Q_i(o_i, a_i)`` of continuous actions, whose padding they do not see."""

    padding: Tensor | None

    def __init__(
        self, observation: int, action: int, agents: int, hidden: int = 256, padding: Tensor | None = None
    ) -> None:
        super().__init__()
        self.action = action
        self.mlp = AgentMLP(observation + action, 1, agents, hidden)
        self.register_buffer("padding", padding, persistent=False)

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        """Map ``[B, N, O], [B, N, A] -> [B, N]``."""
        values: Tensor = self.mlp(torch.cat((observation, clear(action, self.padding)), -1))
        return values.squeeze(-1)

    def candidates(self, observation: Tensor, actions: Tensor, agent: int | None = None) -> Tensor:
        """Evaluate K actions per state, in the shapes of :meth:`AgentMLP.branch` without the outputs' axis."""
        return self.mlp.branch(observation, clear(actions, self.padding, agent), agent).squeeze(-1)


class DiscreteQ(nn.Module):
    """Critics ``Q_i(o_i, .)`` of discrete actions."""

    def __init__(self, observation: int, action: int, agents: int, hidden: int = 256) -> None:
        super().__init__()
        self.mlp = AgentMLP(observation, action, agents, hidden)

    def values(self, observation: Tensor, agent: int | None = None) -> Tensor:
        """Map ``[B, (N,) O] -> [B, (N,) A]``, all actions."""
        values: Tensor = self.mlp(observation, agent)
        return values

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        """Map ``[B, N, O], int64 [B, N] -> [B, N]``."""
        return self.values(observation).gather(-1, action.unsqueeze(-1)).squeeze(-1)


class StateValue(nn.Module):
    """State values ``V_i(o_i)``."""

    def __init__(self, observation: int, agents: int, hidden: int = 256) -> None:
        super().__init__()
        self.mlp = AgentMLP(observation, 1, agents, hidden)

    def forward(self, observation: Tensor) -> Tensor:
        """Map ``[B, N, O] -> [B, N]``."""
        values: Tensor = self.mlp(observation)
        return values.squeeze(-1)


class TeamValue(nn.Module):
    """One value of the centralised state: Linear(S, hidden) -> ReLU -> Linear(hidden, 1)."""

    def __init__(self, state: int, hidden: int = 64) -> None:
        super().__init__()
        self.trunk = Linear(state, hidden)
        self.head = Linear(hidden, 1)

    def forward(self, state: Tensor) -> Tensor:
        """Map ``state`` [R, B, S] -> [R, B]."""
        return two_layers(self.trunk, self.head, state).squeeze(-1)


class LinearMixer(nn.Module):
    """The mixer ``Q_tot = sum_i w_i(s) q_i + b(s)`` with ``w_i = |.| >= 0``: Linear(S, 64) -> ReLU -> two heads."""

    def __init__(self, state: int, agents: int, hidden: int = 64) -> None:
        super().__init__()
        self.agents = agents
        self.trunk = Linear(state, hidden)
        self.heads = Linear(hidden, agents + 1)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``state`` [R, B, S] -> (w [R, B, N], b [R, B])."""
        heads = two_layers(self.trunk, self.heads, state)
        return heads[..., : self.agents].abs(), heads[..., self.agents]


class VdnMixer(nn.Module):
    """The mixer ``Q_tot = sum_i q_i``: linear, with unit weights and no bias."""

    def __init__(self, agents: int) -> None:
        super().__init__()
        self.agents = agents

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``state`` [R, B, S] -> (ones [R, B, N], zeros [R, B])."""
        return state.new_ones(*state.shape[:-1], self.agents), state.new_zeros(state.shape[:-1])


class QmixMixer(nn.Module):
    """QMIX's monotone mixer, ``ELU(q W1 + b1) W2 + b2`` with hypernetworks of the state.

    Not linear in q: only algorithms that need Q_tot alone can use it.
    """

    def __init__(self, state: int, agents: int, hidden: int = 64, embed: int = 32) -> None:
        super().__init__()
        self.agents, self.embed = agents, embed
        self.w1 = nn.Sequential(Linear(state, hidden), nn.ReLU(), Linear(hidden, agents * embed))
        self.b1 = Linear(state, embed)
        self.w2 = nn.Sequential(Linear(state, hidden), nn.ReLU(), Linear(hidden, embed))
        self.b2 = nn.Sequential(Linear(state, embed), nn.ReLU(), Linear(embed, 1))

    def total(self, values: Tensor, state: Tensor) -> Tensor:
        """Map ``values`` [R, B, N], ``state`` [R, B, S] -> Q_tot [R, B]."""
        w1 = self.w1(state).abs().unflatten(-1, (self.agents, self.embed))
        hidden = elu((values.unsqueeze(-1) * w1).sum(-2) + self.b1(state))
        total: Tensor = (hidden * self.w2(state).abs()).sum(-1) + self.b2(state).squeeze(-1)
        return total


def total_value(mixer: nn.Module, values: Tensor, state: Tensor) -> Tensor:
    """Return ``Q_tot`` [R, B] of agent values [R, B, N] under any mixer."""
    if isinstance(mixer, QmixMixer):
        return mixer.total(values, state)
    weights, bias = mixer(state)
    return mix(weights, values, bias)


class GreedyActor(nn.Module):
    """Choose ``argmax_a q_i(o_i, a)`` over available actions, as a degenerate categorical policy.

    Its log-probabilities are 0 at the best action and the lowest float elsewhere, so noise changes nothing and
    ``KL(pi || pi_b) = -log pi_b(a|o)``.
    """

    def __init__(self, q: DiscreteQ) -> None:
        super().__init__()
        self.q = q

    def forward(self, observation: Tensor, mask: Tensor, agent: int | None = None) -> Tensor:
        """Map ``[B, (N,) O], mask [B, (N,) A] -> log-probabilities [B, (N,) A]``."""
        scores = masked_log_softmax(self.q.values(observation, agent), mask)
        lowest = torch.full_like(scores, torch.finfo(scores.dtype).min)
        return lowest.scatter(-1, scores.argmax(-1, keepdim=True), 0.0)

    def as_good(self, observation: Tensor, mask: Tensor, action: Tensor, agent: int | None = None) -> Tensor:
        """Test if ``action`` int64 [B, (N)] is the best up to rounding, bool [B, (N)], for the check at export."""
        q = self.q.values(observation, agent)
        scores = masked_log_softmax(q, mask)
        behind = scores.amax(-1) - scores.gather(-1, action.unsqueeze(-1)).squeeze(-1)
        return behind <= TIE * (1.0 + q.abs().amax(-1))


class DivergenceMixer(nn.Module):
    """The mixer ``Q^{c,k} = sum_j w^{c,k}_j(s) Q^c_j + b^{c,k}(s)`` for every constraint k.

    Row k of w belongs to the constraint of agent k. The diagonal is fixed to one, without which the loss has the
    trivial minimiser w = 0; off the diagonal ``|.| >= 0``. Source: docs/derivation.md#value-decomposition.
    """

    def __init__(self, state: int, agents: int, hidden: int = 64) -> None:
        super().__init__()
        self.agents = agents
        self.trunk = Linear(state, hidden)
        self.heads = Linear(hidden, agents * agents + agents)
        self.eye: Tensor
        self.register_buffer("eye", torch.eye(agents), persistent=False)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``state`` [R, B, S] -> (w [R, B, N(k), N(j)], b [R, B, N(k)])."""
        n = self.agents
        heads = two_layers(self.trunk, self.heads, state)
        free = heads[..., : n * n].abs().view(*heads.shape[:-1], n, n)
        return free * (1.0 - self.eye) + self.eye, heads[..., n * n :]


class IdentityDivergenceMixer(nn.Module):
    """The mixer ``W^c = I``, ``b^c = 0``: V^{c,k} is minus agent k's discounted KL, whatever the alphas are."""

    def __init__(self, agents: int) -> None:
        super().__init__()
        self.eye: Tensor
        self.register_buffer("eye", torch.eye(agents), persistent=False)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``state`` [R, B, S] -> (w [R, B, N, N], b [R, B, N])."""
        n = len(self.eye)
        return self.eye.expand(*state.shape[:-1], n, n), state.new_zeros(*state.shape[:-1], n)


class NetworkFactory:
    """Factory of the networks of one team. The oracles of the tests replace it by a tabular one.

    Without ``seeds`` its networks are those of one run, as a policy is exported. With them they are those of R
    runs, stacked: run r starts from the random numbers of ``seeds[r]``, whatever its company. The order of calls
    decides which of them a network starts from: an algorithm must make the networks that its variants share
    first.
    """

    def __init__(self, spec: TeamSpec, hidden: int = 256, seeds: Sequence[int] | None = None) -> None:
        self.spec, self.hidden = spec, hidden
        self.seeds = None if seeds is None else tuple(seeds)
        self._random_states = [torch.Generator().manual_seed(seed).get_state() for seed in seeds or ()]

    def make(self, build: Callable[[], M]) -> M:
        """Call ``build``, once for each run, with its random numbers, and stack the modules."""
        if self.seeds is None:
            return build()
        modules = []
        with torch.random.fork_rng(devices=[]):
            for run, state in enumerate(self._random_states):
                torch.set_rng_state(state)
                modules.append(build())
                self._random_states[run] = torch.get_rng_state()
        return stack(modules)

    def _of_actions(
        self, continuous: Callable[..., nn.Module], discrete: Callable[..., nn.Module], zero: bool = False
    ) -> nn.Module:
        """Make networks for the team's kind of actions; ``zero``: their outputs are 0 at first."""
        spec = self.spec
        sizes = (spec.observation_size, spec.action_size, len(spec.agents), self.hidden)
        if spec.action_kind == "discrete":
            return self.make(lambda: _from_zero(discrete(*sizes), zero))
        return self.make(lambda: _from_zero(continuous(*sizes, padding_of(spec)), zero))

    def actor(self) -> nn.Module:
        """Make a policy for the team's kind of actions."""
        return self._of_actions(GaussianActor, CategoricalActor)

    def q(self, zero: bool = False) -> nn.Module:
        """Make critics Q_i for the team's kind of actions; ``zero``: all values are 0 at first."""
        return self._of_actions(ContinuousQ, DiscreteQ, zero)

    def v(self) -> nn.Module:
        """Make state values V_i."""
        spec = self.spec
        return self.make(lambda: StateValue(spec.observation_size, len(spec.agents), self.hidden))

    def team_value(self, hidden: int) -> nn.Module:
        """Make one value of the centralised state."""
        return self.make(lambda: TeamValue(self.spec.state_size, hidden))

    def mixer(self, hidden: int, kind: str = "linear") -> nn.Module:
        """Make a mixer: ``linear``, ``vdn`` or ``qmix``."""
        agents, state = len(self.spec.agents), self.spec.state_size
        if kind == "vdn":
            return VdnMixer(agents)
        if kind == "qmix":
            return self.make(lambda: QmixMixer(state, agents, hidden))
        return self.make(lambda: LinearMixer(state, agents, hidden))

    def divergence_mixer(self, kind: str, hidden: int) -> nn.Module:
        """Make a divergence mixer: ``learned`` or ``identity``."""
        agents, state = len(self.spec.agents), self.spec.state_size
        if kind == "identity":
            return IdentityDivergenceMixer(agents)
        return self.make(lambda: DivergenceMixer(state, agents, hidden))


def _from_zero(network: M, zero: bool) -> M:
    """Return ``network``, its last layer set to 0 where ``zero``."""
    if zero:
        last = network.get_submodule("mlp.last")
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
    return network


def masked_log_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Return the log-softmax over available actions; a row without any counts as one with action 0 alone."""
    available = mask.bool()
    none = ~available.any(dim=-1, keepdim=True)
    available = torch.cat([available[..., :1] | none, available[..., 1:]], dim=-1)
    return F.log_softmax(logits.masked_fill(~available, torch.finfo(logits.dtype).min), dim=-1)
