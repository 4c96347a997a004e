"""One gradient step on many losses of R runs at once, and the averages that follow it.

The losses of different groups send no gradient into each other (targets and weights are detached), so one backward
pass of their sum and one Adam over parameter groups do what an optimiser per network and run would, in a fraction
of the calls.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omcda_deploy.training.fleet import load_run_states, run_state

_MOMENTS = ("exp_avg", "exp_avg_sq")
_ALIGNMENT = 64  # numbers


@dataclass(frozen=True)
class Group:
    """Parameters [R, ...] that are clipped together, run by run, and share a learning rate."""

    parameters: list[nn.Parameter]
    lr: float


def parameters_of(*modules: nn.Module) -> list[nn.Parameter]:
    """List the parameters of all modules, in their order."""
    return [parameter for module in modules for parameter in module.parameters()]


@contextlib.contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Freeze the modules' parameters inside the block; gradients still flow to their inputs.

    For a policy's loss that climbs a critic it must not train.
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
    """Adam over groups, gradient norms clipped per group and run, then Polyak averages ``(average, source)``.

    The parameters of a group become views of one matrix [R, P], so that a step costs a few calls per group however
    many runs and networks there are. It owns the training state of ``modules`` (by the name of their entry in a
    checkpoint) beside its own.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        grad_clip: float,
        *,
        modules: Mapping[str, nn.Module],
        averages: Sequence[tuple[nn.Module, nn.Module]] = (),
        tau: float | Sequence[float] = 0.005,
    ) -> None:
        """``tau``: the step of all averages, or of each of them."""
        # A module without parameters (the identity mixer, a tabular stand-in) makes an empty group.
        self._groups = [group for group in groups if group.parameters]
        self._grad_clip = grad_clip
        self._modules = dict(modules)
        self._matrices = [_matrix(group.parameters) for group in self._groups]
        for matrix in self._matrices:
            matrix.grad = torch.zeros_like(matrix)
        self._parameters = [parameter for group in self._groups for parameter in group.parameters]
        self._gradients = [
            view
            for matrix, group in zip(self._matrices, self._groups, strict=True)
            for view in _views(matrix.grad, group.parameters)
        ]
        by_rate: dict[float, list[nn.Parameter]] = {}
        for matrix, group in zip(self._matrices, self._groups, strict=True):
            by_rate.setdefault(group.lr, []).append(matrix)
        self._adam = torch.optim.Adam(
            [{"params": matrices, "lr": lr} for lr, matrices in by_rate.items()],
            fused=True,
            capturable=self._matrices[0].is_cuda,  # by a CUDA graph
        )
        taus = [tau] * len(averages) if isinstance(tau, float) else tau
        average_of = {
            ours: (theirs, step)
            for (average, source), step in zip(averages, taus, strict=True)
            for ours, theirs in zip(source.parameters(), average.parameters(), strict=True)
        }
        # By their step: each costs one call.
        self._averages: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
        for matrix, group in zip(self._matrices, self._groups, strict=True):
            steps = {average_of[p][1] if p in average_of else None for p in group.parameters}
            if len(steps) == 1 and (step := steps.pop()) is not None:
                rows = _matrix([average_of.pop(parameter)[0] for parameter in group.parameters])
                self._average(rows, matrix, step)
        for source, (average, step) in average_of.items():  # of groups that are averaged in part
            self._average(average, source, step)

    def _average(self, average: Tensor, source: Tensor, step: float) -> None:
        both = self._averages.setdefault(step, ([], []))
        both[0].append(average)
        both[1].append(source)

    def descend(self, losses: Mapping[str, Tensor]) -> None:
        """Take one step on the sum of ``losses``, each [R]."""
        total = torch.stack(tuple(losses.values())).sum()
        torch._foreach_copy_(
            self._gradients, torch.autograd.grad(total, self._parameters, materialize_grads=True)
        )
        for matrix in self._matrices:
            gradient = matrix.grad
            assert gradient is not None
            norm = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
            gradient.mul_((self._grad_clip / (norm + 1e-6)).clamp_max(1.0))
        self._adam.step()
        with torch.no_grad():
            for step, (averages, sources) in self._averages.items():
                torch._foreach_lerp_(averages, sources, step)

    def state_dict(self, run: int) -> dict[str, Any]:
        """Return one run's states of the modules by name, and Adam's as ``learner``.

        Adam's has the form of ``torch.optim.Adam`` over that run's own parameters.
        """
        state: dict[int, dict[str, Tensor]] = {}
        param_groups = []
        first = 0
        for group, matrix in zip(self._groups, self._matrices, strict=True):
            count = len(group.parameters)
            param_groups.append({"params": list(range(first, first + count)), "lr": group.lr})
            if moments := self._adam.state.get(matrix):
                rows = {name: _pieces(moments[name][run], group.parameters) for name in _MOMENTS}
                for index in range(count):
                    state[first + index] = {
                        "step": moments["step"].clone(),
                        **{name: rows[name][index] for name in _MOMENTS},
                    }
            first += count
        modules = {name: run_state(module, run) for name, module in self._modules.items()}
        return modules | {"learner": {"state": state, "param_groups": param_groups}}

    def load_state_dicts(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Load the states of all runs, in their order; other entries of the states are left alone."""
        for name, module in self._modules.items():
            load_run_states(module, [state[name] for state in states])
        moments = [state["learner"]["state"] for state in states]
        first = 0
        for group, matrix in zip(self._groups, self._matrices, strict=True):
            indices = range(first, first + len(group.parameters))
            first += len(group.parameters)
            if not moments[0]:
                continue
            self._adam.state[matrix] = {
                "step": moments[0][indices[0]]["step"].clone().to(matrix.device),
                **{name: self._rows(matrix, moments, indices, name) for name in _MOMENTS},
            }

    @staticmethod
    def _rows(matrix: Tensor, moments: Sequence[Any], indices: Sequence[int], name: str) -> Tensor:
        """Join each run's ``moments`` of the parameters at ``indices`` to a row of the matrix's length."""
        rows = torch.stack(
            [torch.cat([run[index][name].reshape(-1) for index in indices]) for run in moments]
        )
        return F.pad(rows, (0, matrix.shape[1] - rows.shape[1])).to(matrix.device)


def _matrix(parameters: Sequence[nn.Parameter]) -> nn.Parameter:
    """[R, P]: the parameters of each run one after another, then zeros; they become views of it."""
    rows = torch.cat([p.detach().reshape(len(p), -1) for p in parameters], dim=1)
    # Whole vectors of the processor: its arithmetic on the rest of a row rounds differently, and where that rest
    # lies would depend on the number of runs.
    matrix = nn.Parameter(F.pad(rows, (0, -rows.shape[1] % _ALIGNMENT)))
    for parameter, view in zip(parameters, _views(matrix.data, parameters), strict=True):
        parameter.data = view
    return matrix


def _views(matrix: Tensor | None, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Parts of ``matrix`` [R, P] in the shapes of the parameters."""
    assert matrix is not None
    views, first = [], 0
    for parameter in parameters:
        width = parameter[0].numel()
        views.append(matrix[:, first : first + width].view(parameter.shape))
        first += width
    return views


def _pieces(row: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Split one run's row [P] of a matrix into values of the parameters' own shapes."""
    widths = [parameter[0].numel() for parameter in parameters]
    return [
        piece.reshape(parameter.shape[1:]).clone()
        for piece, parameter in zip(torch.split(row[: sum(widths)], widths), parameters, strict=True)
    ]
