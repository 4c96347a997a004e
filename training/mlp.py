"""The multilayer perceptron of all networks, for one run or for R runs at once.

Shapes: R runs, B batch, N agents, I inputs, H hidden units, K branches, W width of a branch, M rows.
Source: docs/baselines.md#networks-and-mixers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omcda_deploy.training.products import affine, product

_BLOCK = 2**19  # hidden values at once: the layers of larger blocks leave the caches of a core
_RELU_BACKWARD = torch.ops.aten.threshold_backward.grad_input
_SHARED = 2**14  # hidden values of one run, up to which calls cost more than arithmetic


class Linear(nn.Linear):
    """Linear layer of one run, or of R runs beside each other: weight [R, out, in], bias [R, out]."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in] -> [..., out]``; with runs, row r of x [R, ..., in] meets the parameters of run r."""
        if self.weight.ndim == 2:
            return F.linear(x, self.weight, self.bias)
        rows = x.reshape(len(x), -1, x.shape[-1])
        return affine(rows, self.weight, self.bias).view(*x.shape[:-1], self.weight.shape[1])


def two_layers(first: Linear, second: Linear, x: Tensor) -> Tensor:
    """Evaluate two layers of R runs with a ReLU between them: ``x`` [R, B, I] -> [R, B, outputs]."""
    if first.weight.ndim == 2:
        result: Tensor = second(F.relu(first(x)))
        return result
    output: Tensor = _TwoLayers.apply(  # type: ignore[no-untyped-call]
        x, first.weight, first.bias, second.weight, second.bias
    )
    return output


class AgentMLP(nn.Module):
    """A ReLU MLP with one set of weights for all agents and an identity of each.

    Its input is the vector of agent i joined with the one-hot identity e_i. Since e_i enters the first layer only,
    it is added as one learned row per agent instead; layer and initialisation are those of ``nn.Linear(I + N,
    hidden)``. With ``agent``, all shapes here and in the actors lack N: the rows are those of this agent alone.

    Its parameters are those of one run, with which a policy is exported, or of R runs
    (:func:`omcda_deploy.training.fleet.stack`); then all shapes begin with R.
    """

    def __init__(self, inputs: int, outputs: int, agents: int, hidden: int = 256) -> None:
        super().__init__()
        self.first = Linear(inputs, hidden)
        self.identity = nn.Parameter(torch.empty(agents, hidden))
        bound = 1.0 / math.sqrt(inputs + agents)
        for parameter in (self.first.weight, self.first.bias, self.identity):
            nn.init.uniform_(parameter, -bound, bound)
        self.second = Linear(hidden, hidden)
        self.last = Linear(hidden, outputs)

    def forward(self, x: Tensor, agent: int | None = None) -> Tensor:
        """Map ``[B, (N,) I] -> [B, (N,) outputs]``, or ``[R, B, N, I] -> [R, B, N, outputs]``."""
        if self.identity.ndim == 3:
            return self._stacked(x, None).squeeze(-2)
        # In place where autograd allows it: these layers are bound by memory traffic, not by arithmetic.
        if agent is None:
            hidden = self.first(x).add_(self.identity).relu_()
        else:
            hidden = F.linear(x, self.first.weight, self.first.bias + self.identity[agent]).relu_()
        result: Tensor = self.last(self.second(hidden).relu_())
        return result

    def branch(self, x: Tensor, branches: Tensor, agent: int | None = None) -> Tensor:
        """Evaluate on x joined with each of K branches; x's part of the (linear) first layer is computed once.

        ``x`` [B, (N,) I - W], ``branches`` [K, B, (N,) W] or broadcastable -> [K, B, (N,) outputs]; or, with runs,
        ``x`` [R, B, N, I - W], ``branches`` [R, K, B, N, W] -> [R, K, B, N, outputs].
        """
        if self.identity.ndim == 3:
            return self._stacked(x, branches.movedim(1, 3).contiguous()).movedim(3, 1)
        known, first = x.shape[-1], self.first
        identity = self.identity if agent is None else self.identity[agent]
        trunk = F.linear(x, first.weight[:, :known], first.bias) + identity
        hidden = (F.linear(branches, first.weight[:, known:]) + trunk).relu_()
        result: Tensor = self.last(self.second(hidden).relu_())
        return result

    def _stacked(self, x: Tensor, branches: Tensor | None) -> Tensor:
        first, second, last = self.first, self.second, self.last
        output: Tensor = _StackedMLP.apply(  # type: ignore[no-untyped-call]
            torch.is_grad_enabled(),
            x,
            branches,
            self.identity,
            first.weight,
            first.bias,
            second.weight,
            second.bias,
            last.weight,
            last.bias,
        )
        return output


class _TwoLayers(torch.autograd.Function):
    """:func:`two_layers` with its backward written out; x needs no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        hidden = affine(x, w1, b1, relu=True)
        ctx.save_for_backward(x, hidden, w2)
        return affine(hidden, w2, b2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, w2 = ctx.saved_tensors
        d_hidden = _through_relu(product(gradient, w2), hidden)
        return (
            None,
            product(d_hidden.mT, x),
            d_hidden.sum(1),
            product(gradient.mT, hidden),
            gradient.sum(1),
        )


class _StackedMLP(torch.autograd.Function):
    """:class:`AgentMLP` of R runs, at x or at x joined with branches, with its backward written out.

    Autograd's own keeps and walks twice as many intermediate results. Layers are computed in blocks that stay in
    the cache of a core: whole layers of many branches take many megabytes, and the memory for them costs more than
    half as much as their products. The second is kept for the backward, and of the first what x adds to it:
    branches are short, so their part is cheaper to compute again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        keep: bool,
        x: Tensor,
        branches: Tensor | None,
        identity: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
        w3: Tensor,
        b3: Tensor,
    ) -> Tensor:
        """Map ``x`` [R, B, N, I - W], ``branches`` [R, B, N, K, W] to [R, B, N, K, outputs]; without, K is 1."""
        known, count = x.shape[-1], 1 if branches is None else branches.shape[3]
        identities = identity.unsqueeze(1)
        layers, outputs = [], []
        for at in _blocks(x, count * w1.shape[1]):
            run, states = at[0], x[at]
            trunk = affine(states.flatten(-3, -2), w1[run, :, :known], b1[run])
            trunk.view(*states.shape[:-1], -1).add_(identities[run])
            h1 = trunk.relu_() if branches is None else _branched(trunk, branches[at], w1[run, :, known:])
            h2 = affine(h1, w2[run], b2[run], relu=True)
            outputs.append(affine(h2, w3[run], b3[run]))
            if keep:
                layers += [trunk, h2]
            del trunk, h1, h2  # the next block's take their place, which is in the cache
        if keep:
            ctx.save_for_backward(x, branches, w1, w2, w3, *layers)
        return _joined(outputs, (*x.shape[:3], count, w3.shape[1]))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, branches, w1, w2, w3, *layers = ctx.saved_tensors
        known, agents = x.shape[-1], x.shape[2]
        _, need_x, need_branches, *need_parameters = ctx.needs_input_grad
        d_x: list[Tensor] = []
        d_branches: list[Tensor] = []
        d_parameters: list[list[Tensor]] = []  # of each run
        for at, trunk, h2 in zip(
            _blocks(x, gradient.shape[3] * w1.shape[1]), layers[::2], layers[1::2], strict=True
        ):
            run, d3 = at[0], gradient[at].flatten(-4, -2)
            h1 = trunk if branches is None else _branched(trunk, branches[at], w1[run, :, known:])
            d2 = _through_relu(product(d3, w3[run]), h2)
            d1 = _through_relu(product(d2, w2[run]), h1)
            d_trunk = d1 if branches is None else d1.view(*trunk.shape[:-1], -1, trunk.shape[-1]).sum(-2)
            if need_branches:
                d_branches.append(product(d1, w1[run, :, known:]))
            if need_x:
                d_x.append(product(d_trunk, w1[run, :, :known]))
            if any(need_parameters):
                d_w1 = product(x[at].flatten(-3, -2).mT, d_trunk)
                if branches is not None:
                    d_w1 = torch.cat((d_w1, product(branches[at].flatten(-4, -2).mT, d1)), -2)
                d_identity = d_trunk.view(*x[at].shape[:-1], -1).sum(-3)
                parts = [d_identity, d_w1, product(d2.mT, h1), d2.sum(-2), product(d3.mT, h2)]
                if at[1].start:  # not the run's first block
                    torch._foreach_add_(d_parameters[-1], parts)
                else:
                    d_parameters.append(parts)
            del h1, d1, d2, d_trunk
        inputs = (
            _joined(d_x, x.shape) if need_x else None,
            _joined(d_branches, branches.shape) if need_branches else None,
        )
        if not d_parameters:
            return None, *inputs, None, None, None, None, None, None, None
        shapes = ((agents, -1), w1.mT.shape[1:], w2.shape[1:], w2.shape[1:2], w3.shape[1:])
        d_identity, d_w1, d_w2, d_b2, d_w3 = (
            _joined(parts, (len(w1), *shape))
            for parts, shape in zip(zip(*d_parameters, strict=True), shapes, strict=True)
        )
        d_b3 = gradient.flatten(1, 3).sum(1)
        return None, *inputs, d_identity, d_w1.mT, d_identity.sum(1), d_w2, d_b2, d_w3, d_b3


def _joined(parts: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Join what the blocks of :func:`_blocks`, or their runs, gave in their order."""
    return (parts[0] if len(parts) == 1 else torch.cat(list(parts))).view(shape)


def _blocks(x: Tensor, width: int) -> list[tuple[int | slice, slice]]:
    """Divide x [R, B, N, ...] into blocks: their runs and their states. Both are independent of R.

    A block is of one run, in whose layers every row of x has ``width`` values. Small runs share their operations,
    and so do all on a GPU, which has other caches.
    """
    runs, batch, agents = x.shape[:3]
    size = batch * agents * width
    if size <= _SHARED or not x.is_cpu:
        return [(slice(None), slice(None))]
    states = -(-batch // -(-size // _BLOCK))
    return [(run, slice(first, first + states)) for run in range(runs) for first in range(0, batch, states)]


def _branched(trunk: Tensor, branches: Tensor, weight: Tensor) -> Tensor:
    """Return the first hidden layer [(R,) B N K, H] at ``branches`` [(R,) B, N, K, W].

    ``trunk`` [(R,) B N, H]: what x adds to it.
    """
    layer = affine(branches.flatten(-4, -2), weight)
    layer.view(*trunk.shape[:-1], branches.shape[-2], -1).add_(trunk.unsqueeze(-2)).relu_()
    return layer


def _through_relu(gradient: Tensor, layer: Tensor) -> Tensor:
    """Take the gradient of a ReLU's output ``layer`` back to its input, in place."""
    _RELU_BACKWARD(gradient, layer, 0, grad_input=gradient)
    return gradient
