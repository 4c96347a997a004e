"""A learned policy as tables, for games whose observations can be listed."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from omcda_deploy.envs.tabular import Game, Table, team_spec


@torch.no_grad()
def policy_tables(actor: nn.Module, game: Game) -> list[Table]:
    """Return the probabilities [X, K] of a discrete actor under the game's masks, one table per agent."""
    spec = team_spec("", game)
    agents, states = len(spec.agents), spec.observation_size
    observation = torch.eye(states)[:, None].expand(states, agents, states)  # one-hot, as agents see
    mask = torch.zeros(states, agents, spec.action_size, dtype=torch.uint8)
    for i, chain in enumerate(game.chains):
        rows, actions = chain.available.shape
        mask[:rows, i, :actions] = torch.from_numpy(chain.available)
    probabilities = actor(observation, mask).double().exp().numpy()
    return [
        np.ascontiguousarray(probabilities[: chain.rewards.shape[0], i, : chain.rewards.shape[1]])
        for i, chain in enumerate(game.chains)
    ]
