"""BC: behaviour cloning, ``L_pi = -mean log pi_i(a_i|o_i)`` with one network for all agents.

Continuous policies are tanh-Gaussians, discrete ones are masked by availability (published codes mask only when
acting). The policy that is exported is cloned here for the run's own number of steps; the behaviour model that
its divergence is measured against is the dataset's (:mod:`omcda_deploy.training.behavior_model`).

Source: docs/baselines.md#bc.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omcda_deploy.training.batches import Batch
from omcda_deploy.training.distributions import divergence, policy_of
from omcda_deploy.training.fleet import mean_per_run
from omcda_deploy.training.metrics import KL
from omcda_deploy.training.networks import NetworkFactory
from omcda_deploy.training.optimizer import Group, JointOptimizer, loss_metrics, parameters_of
from omcda_deploy.training.settings import BatchSize, GradientNorm, LearningRate, Width, check

PAPER = "behaviour cloning (Pomerleau, 1989), with OMIGA's networks"
SUMMARY = "imitates the dataset"
ACTIONS = frozenset({"continuous", "discrete"})
DIVERGENCE = {"continuous": "kl", "discrete": "kl"}
COLUMNS = (KL,)


@dataclass(frozen=True)
class Config:
    """Settings of BC."""

    lr: LearningRate = 5e-4
    grad_clip: GradientNorm = 1.0
    batch_size: BatchSize = 128
    hidden: Width = 256

    def __post_init__(self) -> None:
        check(self)


def make_policy(config: Config, networks: NetworkFactory) -> nn.Module:
    """Make the module that is snapshotted and exported."""
    return networks.actor()


class Algorithm:
    """Train R runs by BC: one :meth:`update` is one gradient step of each on its batch."""

    budgets = alpha = noise = None

    def __init__(
        self,
        configs: Sequence[Config],
        networks: NetworkFactory,
        behavior: nn.Module,
        *,
        steps: int,
        device: str = "cpu",
    ) -> None:
        config = self.config = configs[0]
        self.policy = make_policy(config, networks).to(device)
        self._optimizer = JointOptimizer(
            [Group(parameters_of(self.policy), config.lr)], config.grad_clip, modules={"policy": self.policy}
        )
        self.step = 0

    def update(self, batch: Batch, watched: bool = True) -> dict[str, Tensor]:
        return self.compute(batch, self.begin(watched))

    def begin(self, watched: bool) -> tuple[()]:
        self.step += 1
        return ()  # every step is like the others

    def compute(self, batch: Batch, plan: tuple[()]) -> dict[str, Tensor]:
        policy = policy_of(self.policy, batch.observation, batch.mask)
        losses = {"policy": -mean_per_run(batch.log_prob(policy))}  # L_pi
        self._optimizer.descend(losses)
        with torch.no_grad():
            return {**loss_metrics(losses), "kl": divergence(policy, batch.behavior).mean(1)}

    def state_dict(self, run: int) -> dict[str, Any]:
        return {**self._optimizer.state_dict(run), "step": self.step}

    def load_state_dicts(self, states: Sequence[dict[str, Any]]) -> None:
        self._optimizer.load_state_dicts(states)
        self.step = states[0]["step"]
