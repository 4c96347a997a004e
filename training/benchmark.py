"""Time of a training step beside its lower bound: the same matrix products alone, timed in the same run.

A step trains one or more runs side by side; figures are per run, and of CPU time, since machines are shared. The
products of one step are recorded as they are dispatched (shapes and memory layouts), then done again on operands
that stay in the cache. Steps and replays alternate, so that a machine that drifts drifts for both; the ratio of
their medians is the figure to quote.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from omcda_deploy.registry import load_algorithm
from omcda_deploy.spec import TeamSpec
from omcda_deploy.training.algorithm import Algorithm, create_algorithm
from omcda_deploy.training.batches import Batch
from omcda_deploy.training.distributions import policy_of
from omcda_deploy.training.networks import NetworkFactory
from omcda_deploy.training.products import LINEAR, product
from omcda_deploy.training.settings import build

LOG_EVERY = 100  # steps, as a run by default
_aten = torch.ops.aten
_PRODUCTS = {  # position of the first factor
    **dict.fromkeys((_aten.mm.default, _aten.mm.out, _aten.bmm.default, _aten.bmm.out), 0),
    **dict.fromkeys((_aten.addmm.default, _aten.addmm.out, _aten.addmm_.default), 1),
    **dict.fromkeys((_aten.baddbmm.default, _aten.baddbmm.out, _aten.baddbmm_.default), 1),
}


@dataclass(frozen=True)
class Contender:
    """Algorithm with settings, as so many runs side by side, that is timed."""

    algorithm: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    runs: int = 1

    def __str__(self) -> str:
        return ", ".join((self.algorithm, *(f"{name}={value}" for name, value in self.settings.items())))


@dataclass(frozen=True)
class StepCost:
    """Medians over rounds, in milliseconds of CPU per run and step."""

    contender: Contender
    step_ms: float
    products_ms: float  # the lower bound
    gflop: float  # matrix products of one run's step

    @property
    def ratio(self) -> float:
        """Time of a step in units of its lower bound."""
        return self.step_ms / self.products_ms


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the factors of every matrix product dispatched under it.

    Factors of one layout share a tensor, so the replay finds its operands in the cache: a strict lower bound.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.factors: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._operands: dict[Any, torch.Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is LINEAR:
            self.factors.append((self._like(args[0], "left"), self._like(args[1].mT, "right")))
        elif (first := _PRODUCTS.get(func)) is not None:
            self.factors.append((self._like(args[first], "left"), self._like(args[first + 1], "right")))
        return func(*args, **(kwargs or {}))

    def _like(self, tensor: torch.Tensor, side: str) -> torch.Tensor:
        key = (side, tuple(tensor.shape), tensor.stride())
        if key not in self._operands:
            # An expanded axis is made once and expanded again: torch refuses to fill memory that is shared.
            axes = zip(tensor.shape, tensor.stride(), strict=True)
            shape = [1 if stride == 0 else size for size, stride in axes]
            empty = torch.empty_strided(shape, tensor.stride(), dtype=tensor.dtype)
            self._operands[key] = empty.normal_().expand(tensor.shape)
        return self._operands[key]


def step_costs(
    spec: TeamSpec,
    contenders: Sequence[Contender],
    *,
    batch_size: int = 128,
    rounds: int = 5,
    repeats: int = 10,
) -> list[StepCost]:
    """Time one step of each contender on random batches of ``spec``, on the present number of torch threads.

    Runs side by side share the time of their step. Steps that do more than others, such as OMCDA's measurements of
    influence, count as often as in training: every tenth step begins one, so ``repeats`` is a multiple of ten.
    """
    prepared = [_prepare(spec, contender, batch_size, repeats) for contender in contenders]
    times: list[tuple[list[float], list[float]]] = [([], []) for _ in contenders]
    with torch.no_grad():
        for _, replay, _ in prepared:
            replay()
    for _ in range(rounds):
        for contender, (step, replay, _), (steps, products) in zip(contenders, prepared, times, strict=True):
            each = 1e3 / repeats / contender.runs
            start = time.process_time()
            for _ in range(repeats):
                step()
            middle = time.process_time()
            with torch.no_grad():
                replay()
            steps.append((middle - start) * each)
            products.append((time.process_time() - middle) * each)
    return [
        StepCost(contender, statistics.median(steps), statistics.median(products), gflop)
        for contender, (_, _, gflop), (steps, products) in zip(contenders, prepared, times, strict=True)
    ]


def _prepare(
    spec: TeamSpec, contender: Contender, batch_size: int, repeats: int
) -> tuple[Callable[[], None], Callable[[], None], float]:
    """Return a step, the replay of the products of ``repeats`` steps, and the GFLOP of one run's step."""
    settings = {**contender.settings, "batch_size": batch_size}
    config = build(load_algorithm(contender.algorithm).Config, settings)
    behavior = NetworkFactory(spec, config.hidden).actor().requires_grad_(False)
    algorithm = create_algorithm(
        contender.algorithm,
        spec,
        [behavior] * contender.runs,
        settings=[settings] * contender.runs,
        steps=10**9,
        seeds=range(contender.runs),
    )
    batches = [random_batch(spec, behavior, contender.runs, batch_size, seed) for seed in range(8)]
    step = functools.partial(_step, algorithm, batches)
    for _ in range(repeats - 1):  # warm-up; the recorded round then covers whole measuring intervals
        step()
    with _Products() as products:
        for _ in range(repeats):
            step()
    flop = sum(2 * a.numel() * b.shape[-1] for a, b in products.factors) / repeats / contender.runs
    return step, functools.partial(_replay, products.factors), flop / 1e9


def _step(algorithm: Algorithm, batches: list[Batch]) -> None:
    algorithm.update(batches[algorithm.step % len(batches)], algorithm.step % LOG_EVERY == 0)


def _replay(factors: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for a, b in factors:
        product(a, b)


def random_batch(spec: TeamSpec, behavior: nn.Module, runs: int, batch_size: int, seed: int) -> Batch:
    """Make a batch of the team's shapes with standard normal observations and rewards.

    As in training, ``behavior`` is not evaluated in the steps: its distributions are part of the batch.
    """
    generator = torch.Generator().manual_seed(seed)
    n, o, a = len(spec.agents), spec.observation_size, spec.action_size
    discrete = spec.action_kind == "discrete"

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(runs, batch_size, *shape, generator=generator)

    def actions() -> torch.Tensor:
        if discrete:
            return torch.randint(a, (runs, batch_size, n), generator=generator)
        return torch.tanh(normal(n, a))

    mask = torch.ones(runs, batch_size, n, a, dtype=torch.uint8) if discrete else None
    observation, next_observation = normal(n, o), normal(n, o)
    returns = normal()
    return Batch(
        observation=observation,
        action=actions(),
        reward=normal(),
        not_done=torch.ones(runs, batch_size),
        state=normal(spec.state_size),
        next_observation=next_observation,
        next_state=normal(spec.state_size),
        next_action=actions(),
        next_action_known=torch.ones(runs, batch_size),
        mask=mask,
        next_mask=mask,
        behavior=policy_of(behavior, observation, mask),
        next_behavior=policy_of(behavior, next_observation, mask),
        return_to_go=returns,
        return_range=torch.stack(returns.aminmax(dim=1), dim=1),
    )
