"""Values of many candidate actions per agent and state, in blocks that stay in the cache of a core.

Shapes as in :mod:`omcda_deploy.training.mlp`; K candidate actions per agent and state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from omcda_deploy.training.networks import ContinuousQ

_CHUNK = 2**17  # hidden values at once: a few such blocks stay in the second-level cache of a core


def candidate_values(q: Any, observation: Tensor, actions: Tensor) -> Tensor:
    """Return ``q.candidates(observation, actions)``, in less time and memory where the actions are many.

    ``observation`` [R, B, N, O], ``actions`` [R, K, B, N, A] -> [R, K, B, N].
    """
    if not isinstance(q, ContinuousQ):
        values: Tensor = q.candidates(observation, actions)
        return values
    first, second, last = q.mlp.first, q.mlp.second, q.mlp.last
    rows = actions.movedim(1, 3).contiguous()  # [R, B, N, K, A]
    output: Tensor = _Candidates.apply(  # type: ignore[no-untyped-call]
        torch.is_grad_enabled(),
        observation,
        rows,
        q.mlp.identity,
        first.weight,
        first.bias,
        second.weight,
        second.bias,
        last.weight,
        last.bias,
    )
    return output.movedim(3, 1)


class _Candidates(torch.autograd.Function):
    """:meth:`AgentMLP.branch` with one output, in blocks of rows whose hidden layers stay in the cache.

    Whole layers of K candidates take many megabytes, and the memory for them costs more than half as much as their
    products. One layer is kept for the backward; the first is cheaper to compute again, since actions are short.
    Blocks belong to one run, and their sizes do not depend on R.
    """

    @staticmethod
    def forward(
        ctx: Any,
        keep: bool,
        x: Tensor,
        actions: Tensor,
        identity: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
        w3: Tensor,
        b3: Tensor,
    ) -> Tensor:
        runs, batch, agents, known = x.shape
        count, hidden = actions.shape[3], w1.shape[1]
        points = actions.view(runs, batch * agents, count, -1)
        rows = x.flatten(1, 2)
        trunk = torch.bmm(rows, w1[..., :known].mT)
        trunk.view(runs, batch, agents, hidden).add_((identity + b1.unsqueeze(1)).unsqueeze(1))
        values = x.new_empty(runs, batch * agents * count, 1)
        # One tensor per run: larger ones would go back to the system at every step.
        h2 = [x.new_empty(batch * agents * count, hidden) for _ in range(runs)] if keep else []
        buffers = _buffers(points, hidden, 1 if keep else 2)
        for run, part, block in _blocks(points, hidden):
            h1 = _first_layer(points[run, part], trunk[run, part], w1[run, :, known:], buffers[0])
            second = h2[run][block] if keep else buffers[1][: len(h1)]
            torch.addmm(b2[run], h1, w2[run].mT, out=second).relu_()
            torch.addmm(b3[run], second, w3[run].mT, out=values[run, block])
        if keep:
            ctx.save_for_backward(rows, points, trunk, w1, w2, w3, *h2)
        return values.view(runs, batch, agents, count)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, points, trunk, w1, w2, w3, *h2 = ctx.saved_tensors
        runs, batch, agents, count = gradient.shape
        known, hidden = rows.shape[-1], trunk.shape[-1]
        d3 = gradient.reshape(runs, -1, 1)
        d_points = torch.empty_like(points) if ctx.needs_input_grad[2] else None
        d_trunk = torch.empty_like(trunk)
        d_w1, d_w2, d_w3 = torch.zeros_like(w1), torch.zeros_like(w2), torch.zeros_like(w3)
        d_b2 = w2.new_zeros(runs, hidden)
        buffers = _buffers(points, hidden, 3)
        for run, part, block in _blocks(points, hidden):
            point, weight = points[run, part], w1[run, :, known:]
            second, d_values = h2[run][block], d3[run, block]
            h1 = _first_layer(point, trunk[run, part], weight, buffers[0])
            d2, d1 = buffers[1][: len(h1)], buffers[2][: len(h1)]
            torch.mul(d_values, w3[run], out=d2)
            torch.ops.aten.threshold_backward.grad_input(d2, second, 0, grad_input=d2)
            torch.mm(d2, w2[run], out=d1)
            torch.ops.aten.threshold_backward.grad_input(d1, h1, 0, grad_input=d1)
            d_w3[run].addmm_(d_values.mT, second)
            d_w2[run].addmm_(d2.mT, h1)
            d_b2[run].add_(d2.sum(0))
            d_w1[run, :, known:].addmm_(d1.mT, point.flatten(0, 1))
            torch.sum(d1.view(-1, count, hidden), 1, out=d_trunk[run, part])
            if d_points is not None:
                torch.mm(d1, weight, out=d_points[run, part].flatten(0, 1))
        torch.bmm(d_trunk.mT, rows, out=d_w1[..., :known])
        d_identity = d_trunk.view(runs, batch, agents, hidden).sum(1)
        return (
            None,
            torch.bmm(d_trunk, w1[..., :known]).view(runs, batch, agents, known)
            if ctx.needs_input_grad[1]
            else None,
            None if d_points is None else d_points.view(runs, batch, agents, count, -1),
            d_identity,
            d_w1,
            d_identity.sum(1),
            d_w2,
            d_b2,
            d_w3,
            d3.sum(1),
        )


def _blocks(points: Tensor, hidden: int) -> Iterator[tuple[int, slice, slice]]:
    """Yield runs, with blocks of their states and the rows that the candidates of those states are."""
    runs, states, count, _ = points.shape
    size = max(1, _CHUNK // (count * hidden))
    for run in range(runs):
        for first in range(0, states, size):
            last = min(first + size, states)
            yield run, slice(first, last), slice(first * count, last * count)


def _buffers(points: Tensor, hidden: int, number: int) -> list[Tensor]:
    """Make room for ``number`` layers of one block of :func:`_blocks`."""
    count = points.shape[2]
    return [points.new_empty(max(1, _CHUNK // (count * hidden)) * count, hidden) for _ in range(number)]


def _first_layer(points: Tensor, trunk: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """Return the first hidden layer [M·K, H], in ``out``, of actions [M, K, A] and their states' part [M, H]."""
    states, count, _ = points.shape
    layer = out[: states * count]
    torch.mm(points.flatten(0, 1), weight.mT, out=layer)
    layer.view(states, count, -1).add_(trunk.unsqueeze(1)).relu_()
    return layer
