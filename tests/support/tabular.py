"""Tabular stand-ins for networks, and batches that hold a game's expectation exactly.

With tables instead of networks and mixers fixed to their true weights, an algorithm has no approximation error
left, so what it converges to can be held against the closed forms of :mod:`tests.support.oracles`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from omcda_deploy.envs.tabular import Chain, ChainGame, Game, OneStepGame, team_spec, transitions
from omcda_deploy.spec import TeamSpec
from omcda_deploy.training.batches import Batch
from omcda_deploy.training.networks import IdentityDivergenceMixer, NetworkFactory, masked_log_softmax
from tests.support.synthetic import with_behavior


def quantised(behavior: NDArray[np.float64], parts: int) -> NDArray[np.float64]:
    """The distribution with probabilities k / parts near ``behavior`` [K], k >= 1 where it is above 0."""
    counts = np.maximum(behavior > 0, np.floor(behavior * parts)).astype(int)
    while counts.sum() > parts:
        counts[counts.argmax()] -= 1
    while counts.sum() < parts:
        counts[np.argmax(behavior * parts - counts)] += 1
    return counts / parts


def rational(game: Game, parts: int) -> Game:
    """The same game with behaviour probabilities that are multiples of 1 / parts."""
    if isinstance(game, OneStepGame):
        behavior = np.stack([quantised(row, parts) for row in game.behavior])
        return OneStepGame(game.rewards, behavior, game.state_scales)
    chains = tuple(
        Chain(c.rewards, c.transitions, np.stack([quantised(row, parts) for row in c.behavior]), c.start)
        for c in game.chains
    )
    return ChainGame(chains, game.gamma, game.stop)


def exact_batch(game: Game) -> Batch:
    """A batch whose means are the game's expectations under behaviour; see :func:`rational`.

    Next actions are drawn from behaviour, one per row: means over them are sampled, not exact.
    """
    rows = transitions(game)
    counts = rows.weights / rows.weights.min()
    whole = np.rint(counts).astype(int)
    assert np.allclose(counts, whole, rtol=1e-6), "the game's probabilities have no small common denominator"
    rows = rows.take(np.repeat(np.arange(len(rows)), whole))
    draw = np.random.default_rng(0).random((len(rows), len(game.chains), 1))
    successors = rows.next_observations.argmax(-1)
    next_action = np.stack(
        [
            (c.behavior.cumsum(-1)[successors[:, i], :-1] < draw[:, i]).sum(-1)
            for i, c in enumerate(game.chains)
        ],
        axis=1,
    )
    return with_behavior(
        behavior_table(game),
        observation=torch.from_numpy(rows.observations),
        action=torch.from_numpy(rows.actions),
        reward=torch.from_numpy(rows.rewards),
        not_done=1.0 - torch.from_numpy(rows.terminals.astype(np.float32)),
        state=torch.from_numpy(rows.states),
        next_observation=torch.from_numpy(rows.next_observations),
        next_state=torch.from_numpy(rows.next_states),
        next_action=torch.from_numpy(next_action),
        next_action_known=torch.ones(len(rows)),
        mask=torch.from_numpy(rows.action_masks),
        next_mask=torch.from_numpy(rows.next_action_masks),
    )


class ActorTable(nn.Module):
    def __init__(self, agents: int, states: int, actions: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(agents, states, actions))

    def forward(self, observation: Tensor, mask: Tensor, agent: int | None = None) -> Tensor:
        assert agent is None  # tables are never exported
        return masked_log_softmax(torch.einsum("...bnx,...nxk->...bnk", observation, self.logits), mask)


class QTable(nn.Module):
    def __init__(self, agents: int, states: int, actions: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(agents, states, actions))

    def values(self, observation: Tensor, agent: int | None = None) -> Tensor:
        assert agent is None  # tables are never exported
        return torch.einsum("...bnx,...nxk->...bnk", observation, self.table)

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        return self.values(observation).gather(-1, action.unsqueeze(-1)).squeeze(-1)


class VTable(nn.Module):
    def __init__(self, agents: int, states: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(agents, states))

    def forward(self, observation: Tensor) -> Tensor:
        return torch.einsum("...bnx,...nx->...bn", observation, self.table)


class KnownMixer(nn.Module):
    """``w_i(s)`` read off the state's last entries (one-hot of the hidden state), or one; b = 0."""

    def __init__(self, agents: int, state_scales: Sequence[float]) -> None:
        super().__init__()
        self._agents = agents
        self._scales = torch.tensor(np.asarray(state_scales), dtype=torch.float32)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        hidden = len(self._scales)
        weight = state[..., -hidden:] @ self._scales if hidden > 1 else state.new_ones(state.shape[:-1])
        return weight.unsqueeze(-1).expand(*weight.shape, self._agents), torch.zeros_like(weight)


class TeamTable(nn.Module):
    """A value that is linear in the state, whose entries are one-hot per agent."""

    def __init__(self, state: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(state, 1))

    def forward(self, state: Tensor) -> Tensor:
        return torch.matmul(state, self.table).squeeze(-1)


class TabularFactory(NetworkFactory):
    """Tables for a game; the divergence mixer is the identity."""

    def __init__(self, game: Game, seeds: Sequence[int] = (0,)) -> None:
        super().__init__(team_spec("toy/test", game), seeds=seeds)
        self._scales = game.state_scales
        self._shape = (len(self.spec.agents), self.spec.observation_size, self.spec.action_size)

    def actor(self) -> ActorTable:
        return self.make(lambda: ActorTable(*self._shape))

    def q(self, zero: bool = False) -> QTable:  # tables start at 0 always
        return self.make(lambda: QTable(*self._shape))

    def v(self, zero: bool = False) -> VTable:
        return self.make(lambda: VTable(*self._shape[:2]))

    def team_value(self, hidden: int) -> TeamTable:
        return self.make(lambda: TeamTable(self.spec.state_size))

    def mixer(self, hidden: int, kind: str = "linear") -> KnownMixer:
        return KnownMixer(self._shape[0], list(self._scales))

    def divergence_mixer(self, kind: str, hidden: int) -> IdentityDivergenceMixer:
        assert kind == "identity"
        return IdentityDivergenceMixer(self._shape[0])


def behavior_table(game: Game) -> ActorTable:
    """The behaviour policies themselves as an actor: no cloning error."""
    spec: TeamSpec = team_spec("toy/test", game)
    table = ActorTable(len(spec.agents), spec.observation_size, spec.action_size)
    with torch.no_grad():
        for i, chain in enumerate(game.chains):
            states, actions = chain.behavior.shape
            table.logits[i, :states, :actions] = torch.from_numpy(
                np.log(np.where(chain.available, chain.behavior, 1.0))
            ).float()
    return table


def policy_table(actor: nn.Module, game: Game) -> list[NDArray[np.float64]]:
    """The probabilities of an actor of one run, one [X, K] per agent."""
    spec = team_spec("toy/test", game)
    n, x, k = len(spec.agents), spec.observation_size, spec.action_size
    observation = torch.eye(x)[:, None, :].expand(x, n, x)
    mask = torch.zeros(x, n, k, dtype=torch.uint8)
    for i, chain in enumerate(game.chains):
        states, actions = chain.available.shape
        mask[:states, i, :actions] = torch.from_numpy(chain.available)
    with torch.no_grad():
        probabilities = actor(observation.unsqueeze(0), mask.unsqueeze(0))[0].exp().double().numpy()
    return [probabilities[: c.rewards.shape[0], i, : c.rewards.shape[1]] for i, c in enumerate(game.chains)]
