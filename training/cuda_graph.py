"""Training steps on a GPU as CUDA graphs.

The networks are so small that a GPU finishes a kernel before the host has launched the next. So a step's operations
(the gathering of its batch, both passes, Adam, averages, metrics) are captured once and launched as one graph from
then on. They find their inputs where they were at the capture: the batch's positions in a buffer; weights, moments
and other states in tensors that are written in place; random numbers in registered generators, which every step
seeds. Steps that differ in their plan (:meth:`omcda_deploy.training.algorithm.Algorithm.begin`) have graphs of
their own.

This file has never run on a GPU. Its bookkeeping, and whether a step can be replayed at all, are tested on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from omcda_deploy.training.algorithm import Algorithm
from omcda_deploy.training.batches import TransitionSampler

Operations: TypeAlias = Callable[[], dict[str, Tensor]]  # returns metrics

WARM_UP = 3  # steps of a plan before its capture, in which Adam and libraries make what they keep


class Recorder(Protocol):
    """Executor and recorder of operations: :class:`CudaRecorder`, or a stand-in in tests."""

    def execute(self, operations: Operations) -> dict[str, Tensor]:
        """Run operations that will be captured later."""
        ...

    def capture(self, operations: Operations, generators: Sequence[torch.Generator]) -> Operations:
        """Capture operations without running them; return what runs them, with the results in the same tensors.

        ``generators``: those that they draw from.
        """
        ...


class CudaRecorder:
    """Captures operations as CUDA graphs of one device."""

    def __init__(self, device: str) -> None:
        self._device = device
        # Graphs cannot be captured on the default stream.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def execute(self, operations: Operations) -> dict[str, Tensor]:
        """Run operations on the stream of the captures."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            metrics = operations()
        current.wait_stream(self._stream)
        return metrics

    def capture(self, operations: Operations, generators: Sequence[torch.Generator]) -> Operations:
        """Capture operations as a graph with memory of its own."""
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph, stream=self._stream):
            metrics = operations()

        def replay() -> dict[str, Tensor]:
            graph.replay()
            return metrics

        return replay


class GraphedSteps:
    """The steps of an algorithm, each plan captured after :data:`WARM_UP` steps.

    The metrics that a step returns are valid until the next one.
    """

    def __init__(self, algorithm: Algorithm, sampler: TransitionSampler, recorder: Recorder) -> None:
        self._algorithm, self._sampler, self._recorder = algorithm, sampler, recorder
        self._positions = sampler.positions(algorithm.step).clone()
        self._executed: dict[Hashable, int] = {}
        self._captured: dict[Hashable, Operations] = {}

    def __call__(self, watched: bool) -> dict[str, Tensor]:
        """Take one step; return its metrics."""
        algorithm = self._algorithm
        self._positions.copy_(self._sampler.positions(algorithm.step))
        plan = algorithm.begin(watched)

        def operations() -> dict[str, Tensor]:
            return algorithm.compute(self._sampler.gather(self._positions), plan)

        if plan not in self._captured:
            executed = self._executed.setdefault(plan, 0)
            if executed < WARM_UP:
                self._executed[plan] += 1
                return self._recorder.execute(operations)
            generators = algorithm.noise.generators if algorithm.noise else ()
            self._captured[plan] = self._recorder.capture(operations, generators)
        return self._captured[plan]()
