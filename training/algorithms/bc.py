"""BC: behaviour cloning, ``L = -mean log pi_i(a_i|o_i)`` with one network for all agents.

Continuous policies are tanh-Gaussians, discrete ones are masked by availability (published codes mask only when
acting). The policy that is exported is cloned here for the run's own number of steps; the behaviour model that
its divergence is measured against is the dataset's (:mod:`omcda_deploy.training.behavior_model`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omcda_deploy.training.batches import Batch
from omcda_deploy.training.distributions import divergence, policy_of
from omcda_deploy.training.learner import Group, Learner, parameters_of
from omcda_deploy.training.networks import NetworkFactory
from omcda_deploy.training.settings import require

PAPER = "behaviour cloning (Pomerleau, 1989), with OMIGA's networks"
SUMMARY = "imitates the dataset"
ACTIONS = frozenset({"continuous", "discrete"})
DIVERGENCE = {"continuous": "kl", "discrete": "kl"}


@dataclass(frozen=True)
class Config:
    """Settings of BC."""

    lr: float = 5e-4
    grad_clip: float = 1.0
    batch_size: int = 128
    hidden: int = 256

    def __post_init__(self) -> None:
        require(
            self,
            lr=(0.0, 1.0),
            grad_clip=(1e-6, math.inf),
            batch_size=(1, 10**6),
            hidden=(1, 65536),
        )


def make_policy(config: Config, networks: NetworkFactory) -> nn.Module:
    """The module that is snapshotted and exported."""
    return networks.actor()


class Algorithm:
    """BC's learner: one :meth:`update` is one gradient step on a batch."""

    def __init__(
        self,
        config: Config,
        networks: NetworkFactory,
        behavior: nn.Module,
        *,
        steps: int,
        seed: int,
        device: str = "cpu",
    ) -> None:
        self.config = config
        self.policy = make_policy(config, networks).to(device)
        self.behavior = behavior.to(device).requires_grad_(False)
        self._learner = Learner([Group(parameters_of(self.policy), config.lr)], config.grad_clip)
        self.step = 0

    @property
    def budgets(self) -> None:
        """BC has no budget."""
        return None

    @property
    def alpha(self) -> None:
        return None

    def update(self, batch: Batch) -> dict[str, Tensor]:
        policy = policy_of(self.policy, batch.observation, batch.mask)
        loss = -policy.log_prob(batch.action).mean()
        self._learner.descend({"policy": loss})
        self.step += 1
        with torch.no_grad():
            behavior = policy_of(self.behavior, batch.observation, batch.mask)
            return {"loss/policy": loss.detach(), "kl": divergence(policy, behavior).mean(0)}

    def state_dict(self) -> dict[str, Any]:
        return {
            "policy": self.policy.state_dict(),
            "learner": self._learner.state_dict(),
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.policy.load_state_dict(state["policy"])
        self._learner.load_state_dict(state["learner"])
        self.step = state["step"]
