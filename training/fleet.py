"""Runs of equal shapes as one computation: R runs side by side, the first axis of every tensor.

Each step of a small network is bound by the overhead of its operations, which R runs share: products are batched
over R, norms, Adam and averages are taken once for all. Runs never mix: no operation sums over R, each run draws
its own random numbers, and the shapes of a run's own products do not depend on its company, so its bits do not
either. A single run is a fleet of one; there is no other code for it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def stack(modules: Sequence[M]) -> M:
    """One module whose parameters are those of R equal modules beside each other: [...] each -> [R, ...]."""
    together = copy.deepcopy(modules[0])
    states = [dict(module.named_parameters()) for module in modules]
    for name, parameter in list(together.named_parameters()):
        owner_name, _, leaf = name.rpartition(".")
        values = torch.stack([state[name].detach() for state in states])
        owner = together.get_submodule(owner_name)
        setattr(owner, leaf, nn.Parameter(values, requires_grad=parameter.requires_grad))
    return together


def run_state(module: nn.Module, run: int) -> dict[str, Tensor]:
    """The state dict of one run's own module; buffers are common to all runs."""
    stacked = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return {
        name: (values[run] if name in stacked else values).detach().clone()
        for name, values in module.state_dict().items()
    }


def load_run_states(module: nn.Module, states: Sequence[Mapping[str, Tensor]]) -> None:
    """Load the state dicts of all runs, in their order, into a stacked module."""
    stacked = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    module.load_state_dict(
        {
            name: torch.stack([state[name] for state in states]) if name in stacked else states[0][name]
            for name in states[0]
        }
    )


def mean_per_run(values: Tensor) -> Tensor:
    """The mean over everything but runs: [R, ...] -> [R]."""
    return values.flatten(1).mean(1)


def batch_mean(values: Tensor) -> Tensor:
    """The mean over the batch: [R, B, N] -> [R, N], over contiguous rows, whose sums do not depend on R."""
    return values.mT.contiguous().mean(-1)


def column(configs: Sequence[Any], field: str, device: str = "cpu") -> Tensor:
    """A setting that may differ between runs, as float32 [R, 1]."""
    return torch.tensor([[float(getattr(config, field))] for config in configs], device=device)


class Noise:
    """Random numbers of R runs, each from its own seed: row r holds what run r would draw alone."""

    def __init__(self, seeds: Sequence[int], device: str = "cpu") -> None:
        self._seeds, self._device = tuple(seeds), device
        self.generators = [torch.Generator(device) for _ in self._seeds]

    def at(self, step: int) -> Noise:
        """Begin the numbers of a step anew, so that a resumed run draws them as an uninterrupted one does."""
        for seed, generator in zip(self._seeds, self.generators, strict=True):
            generator.manual_seed(seed * 1_000_003 + step)
        return self

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers [R, *shape]."""
        return self._drawn(torch.randn, shape)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers [R, *shape] in [0, 1)."""
        return self._drawn(torch.rand, shape)

    def _drawn(self, draw: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        return torch.stack([draw(shape, generator=g, device=self._device) for g in self.generators])
