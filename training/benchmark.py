"""Time of a training step beside its lower bound: the same matrix products alone, timed in the same run.

The products of one step are recorded as they are dispatched (shapes and memory layouts), then replayed on
preallocated tensors. Steps and replays alternate, so that a machine that drifts drifts for both; the ratio of
their medians is the figure to quote.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from omcda_deploy.registry import load_algorithm
from omcda_deploy.spec import TeamSpec
from omcda_deploy.training.batches import Batch
from omcda_deploy.training.loop import Algorithm, create_algorithm
from omcda_deploy.training.networks import NetworkFactory

_PRODUCTS = {
    torch.ops.aten.mm.default: 0,
    torch.ops.aten.bmm.default: 0,
    torch.ops.aten.addmm.default: 1,  # position of the first factor
    torch.ops.aten.baddbmm.default: 1,
}


@dataclass(frozen=True)
class StepCost:
    """Medians over rounds, in milliseconds."""

    algorithm: str
    step_ms: float
    products_ms: float  # the lower bound
    gflop: float  # matrix products of one step

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
        first = _PRODUCTS.get(func)
        if first is not None:
            self.factors.append((self._like(args[first], "left"), self._like(args[first + 1], "right")))
        return func(*args, **(kwargs or {}))

    def _like(self, tensor: torch.Tensor, side: str) -> torch.Tensor:
        key = (side, tuple(tensor.shape), tensor.stride())
        if key not in self._operands:
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            self._operands[key] = empty.normal_()
        return self._operands[key]


def step_costs(
    spec: TeamSpec, algorithms: Sequence[str], *, batch_size: int = 128, rounds: int = 7, repeats: int = 20
) -> list[StepCost]:
    """Time one step of each algorithm on random batches of ``spec``, on the present number of torch threads.

    Steps that do more than others, such as OMCDA's measurements of influence, count as often as in training.
    """
    contenders: list[tuple[str, functools.partial[None], functools.partial[None], float]] = []
    for name in algorithms:
        settings = {"batch_size": batch_size}
        hidden = load_algorithm(name).Config().hidden
        behavior = NetworkFactory(spec, hidden).actor()
        algorithm = create_algorithm(name, spec, behavior, settings=settings, steps=10**9, seed=0)
        batches = [random_batch(spec, batch_size, seed) for seed in range(8)]

        step = functools.partial(_step, algorithm, batches)
        for _ in range(repeats - 1):  # warm-up; the recorded round then covers whole measuring intervals
            step()
        with _Products() as products:
            for _ in range(repeats):
                step()
        outs: dict[Any, torch.Tensor] = {}
        results = [outs.setdefault((a.shape[0], *b.shape), torch.matmul(a, b)) for a, b in products.factors]

        replay = functools.partial(_replay, products.factors, results)
        flop = sum(2 * a.numel() * b.shape[-1] for a, b in products.factors) / repeats
        contenders.append((name, step, replay, flop / 1e9))
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name, *_ in contenders}
    with torch.no_grad():
        for _, _, replay, _ in contenders:
            replay()
    for _ in range(rounds):
        for name, step, replay, _ in contenders:
            start = time.perf_counter()
            for _ in range(repeats):
                step()
            middle = time.perf_counter()
            with torch.no_grad():
                replay()
            times[name][0].append((middle - start) / repeats * 1e3)
            times[name][1].append((time.perf_counter() - middle) / repeats * 1e3)
    return [
        StepCost(name, statistics.median(times[name][0]), statistics.median(times[name][1]), gflop)
        for name, _, _, gflop in contenders
    ]


def _step(algorithm: Algorithm, batches: list[Batch]) -> None:
    algorithm.update(batches[algorithm.step % len(batches)])


def _replay(factors: list[tuple[torch.Tensor, torch.Tensor]], results: list[torch.Tensor]) -> None:
    for (a, b), out in zip(factors, results, strict=True):
        torch.matmul(a, b, out=out)


def random_batch(spec: TeamSpec, batch_size: int, seed: int) -> Batch:
    """Make a batch of the team's shapes with standard normal observations and rewards."""
    generator = torch.Generator().manual_seed(seed)
    n, o, a = len(spec.agents), spec.observation_size, spec.action_size
    discrete = spec.action_kind == "discrete"

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def actions() -> torch.Tensor:
        if discrete:
            return torch.randint(a, (batch_size, n), generator=generator)
        return torch.tanh(normal(batch_size, n, a))

    mask = torch.ones(batch_size, n, a, dtype=torch.uint8) if discrete else None
    return Batch(
        observation=normal(batch_size, n, o),
        action=actions(),
        reward=normal(batch_size),
        not_done=torch.ones(batch_size),
        state=normal(batch_size, spec.state_size),
        next_observation=normal(batch_size, n, o),
        next_state=normal(batch_size, spec.state_size),
        next_action=actions(),
        next_action_known=torch.ones(batch_size),
        mask=mask,
        next_mask=mask,
    )
