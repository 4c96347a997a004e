"""One gradient step on several losses at once, and the averages that follow it.

The losses of these algorithms share no parameters (targets and weights are detached), so one backward pass of
their sum and one optimiser over parameter groups do what an optimiser per network would, in a fraction of the
calls.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omcda_deploy.training.distributions import polyak


@dataclass(frozen=True)
class Group:
    """Parameters that are clipped together and share a learning rate."""

    parameters: list[nn.Parameter]
    lr: float


def parameters_of(*modules: nn.Module) -> list[nn.Parameter]:
    """List the parameters of all modules, in their order."""
    return [parameter for module in modules for parameter in module.parameters()]


@contextlib.contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Freeze the modules' parameters inside the block; gradients still flow to their inputs.

    A policy's loss that climbs a critic must not train the critic.
    """
    parameters = [p for p in parameters_of(*modules) if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def loss_metrics(losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name the losses as metrics, ``loss/<name>``, detached from the graph of their step."""
    return {f"loss/{name}": loss.detach() for name, loss in losses.items()}


class JointOptimizer:
    """Adam over groups, gradient norms clipped per group, then Polyak averages ``(average, source)``.

    It owns the training state of ``modules`` (by the name of their entry in a checkpoint) beside its own.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        grad_clip: float,
        *,
        modules: Mapping[str, nn.Module],
        averages: Sequence[tuple[nn.Module, nn.Module]] = (),
        tau: float = 0.005,
    ) -> None:
        # A module without parameters (the identity mixer, a tabular stand-in) makes an empty group.
        self._groups = [group.parameters for group in groups if group.parameters]
        self._grad_clip, self._tau = grad_clip, tau
        self._modules = dict(modules)
        self.adam = torch.optim.Adam(
            [{"params": group.parameters, "lr": group.lr} for group in groups if group.parameters],
            fused=True,
        )
        self._averages: list[Tensor] = [p for average, _ in averages for p in average.parameters()]
        self._sources: list[Tensor] = [p for _, source in averages for p in source.parameters()]

    def descend(self, losses: Mapping[str, Tensor]) -> None:
        """Take one gradient step on the sum of the losses, then update the averages."""
        self.adam.zero_grad(set_to_none=True)
        torch.stack(tuple(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
        for group in self._groups:
            nn.utils.clip_grad_norm_(group, self._grad_clip, foreach=True)
        self.adam.step()
        if self._averages:
            polyak(self._averages, self._sources, self._tau)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the modules by name, and Adam's as ``learner``."""
        return {name: module.state_dict() for name, module in self._modules.items()} | {
            "learner": self.adam.state_dict()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` returned; other entries of ``state`` are left alone."""
        for name, module in self._modules.items():
            module.load_state_dict(state[name])
        self.adam.load_state_dict(state["learner"])
