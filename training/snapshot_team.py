"""A run's policy as a team, for measurements beside training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from omcda_deploy.policy import Decision, Float
from omcda_deploy.training.distributions import TanhGaussian, divergence, policy_of
from omcda_deploy.training.run_folder import read_config, read_snapshot


class SnapshotTeam:
    """A run's policy at one step, in torch."""

    def __init__(self, run: Path, step: int) -> None:
        self.spec = read_config(run).spec
        self._snapshot = read_snapshot(run, step)

    def reset(self) -> None:
        """Do nothing: the policy has no state."""

    @torch.no_grad()
    def act(
        self,
        observations: Mapping[str, Float],
        *,
        noise: Mapping[str, Float] | None = None,
        action_masks: Mapping[str, NDArray[np.uint8]] | None = None,
    ) -> dict[str, Decision]:
        """Act with the mode of each agent's policy, or a sample with ``noise``, as its exported graph does."""
        agents = self.spec.agents
        rows = np.zeros(
            (len(observations[agents[0].name]), len(agents), self.spec.observation_size), np.float32
        )
        for i, agent in enumerate(agents):
            rows[:, i, : agent.observation_size] = observations[agent.name]
        shape = (len(rows), len(agents), self.spec.action_size)
        mask, chance = None, torch.zeros(shape)
        if action_masks is not None:
            mask = torch.zeros(shape, dtype=torch.uint8)
            for i, agent in enumerate(agents):
                mask[:, i, : agent.action.size] = torch.tensor(action_masks[agent.name])
        if noise is not None:
            for i, agent in enumerate(agents):
                chance[:, i, : agent.action.size] = torch.from_numpy(noise[agent.name])
        x = torch.from_numpy(rows)
        policy = policy_of(self._snapshot.policy, x, mask)
        kl = divergence(policy, policy_of(self._snapshot.behavior, x, mask)).numpy()
        if isinstance(policy, TanhGaussian):
            actions = torch.tanh(policy.mean + policy.log_std.exp() * chance).numpy()
            actions = self.spec.unsquashed(actions)
            return {a.name: Decision(actions[:, i, : a.action.size], kl[:, i]) for i, a in enumerate(agents)}
        choices = (policy.log_probs + chance).argmax(-1).numpy()
        return {a.name: Decision(choices[:, i], kl[:, i]) for i, a in enumerate(agents)}
