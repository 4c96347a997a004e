"""The multilayer perceptron of all networks, for one run or for R runs at once.

Shapes: R runs, B batch, N agents, I inputs, H hidden units, K branches, W width of a branch, M rows.
Source: docs/baselines.md#networks-and-mixers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """Linear layer of one run, or of R runs beside each other: weight [R, out, in], bias [R, out]."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in] -> [..., out]``; with runs, row r of x [R, ..., in] meets the parameters of run r."""
        if self.weight.ndim == 2:
            return F.linear(x, self.weight, self.bias)
        rows = x.reshape(len(x), -1, x.shape[-1])
        return affine(rows, self.weight, self.bias).view(*x.shape[:-1], self.weight.shape[1])


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
            first, second, last = self.first, self.second, self.last
            output: Tensor = _StackedMLP.apply(  # type: ignore[no-untyped-call]
                x, self.identity, first.weight, first.bias, second.weight, second.bias, last.weight, last.bias
            )
            return output
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
        known, first = x.shape[-1], self.first
        if self.identity.ndim == 3:
            second, last = self.second, self.last
            output: Tensor = _StackedBranches.apply(  # type: ignore[no-untyped-call]
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
        identity = self.identity if agent is None else self.identity[agent]
        trunk = F.linear(x, first.weight[:, :known], first.bias) + identity
        hidden = (F.linear(branches, first.weight[:, known:]) + trunk).relu_()
        result: Tensor = self.last(self.second(hidden).relu_())
        return result


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a b`` run by run: [R, M, K], [R, K, N] -> [R, M, N].

    A single run with N = 1 would take torch's matrix-vector path, whose sums differ in the last bit from those of
    the same run in company; it is computed as two runs, so that a run's bits do not depend on R.
    """
    if len(a) == 1 and b.shape[-1] == 1:
        return torch.bmm(a.expand(2, -1, -1), b.expand(2, -1, -1))[:1]
    return torch.bmm(a, b)


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return ``x W^T + b`` run by run: [R, M, I], [R, H, I], [R, H] -> [R, M, H]."""
    if weight.shape[1] == 1:
        return product(x, weight.mT) + bias.unsqueeze(1)
    return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)


class _StackedMLP(torch.autograd.Function):
    """:class:`AgentMLP` of R runs with its backward written out.

    Autograd's own keeps and walks twice as many intermediate results, which costs a fifth to a third of a step
    (``omcda-deploy bench train``).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        identity: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
        w3: Tensor,
        b3: Tensor,
    ) -> Tensor:
        runs, batch, agents, inputs = x.shape
        rows = x.reshape(runs, batch * agents, inputs)
        h1 = torch.bmm(rows, w1.mT)
        h1.view(runs, batch, agents, -1).add_((identity + b1.unsqueeze(1)).unsqueeze(1)).relu_()
        h2 = torch.bmm(h1, w2.mT).add_(b2.unsqueeze(1)).relu_()
        ctx.save_for_backward(rows, h1, h2, w1, w2, w3)
        ctx.sizes = (runs, batch, agents)
        return affine(h2, w3, b3).view(runs, batch, agents, -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, h1, h2, w1, w2, w3 = ctx.saved_tensors
        runs, batch, agents = ctx.sizes
        d3 = gradient.reshape(runs, batch * agents, -1)
        d2 = torch.bmm(d3, w3)
        torch.ops.aten.threshold_backward.grad_input(d2, h2, 0, grad_input=d2)
        d1 = torch.bmm(d2, w2)
        torch.ops.aten.threshold_backward.grad_input(d1, h1, 0, grad_input=d1)
        dx = product(d1, w1).view(runs, batch, agents, -1) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[1:]):
            return dx, None, None, None, None, None, None, None
        identity = d1.view(runs, batch, agents, -1).sum(1)
        return (
            dx,
            identity,
            torch.bmm(d1.mT, rows),
            identity.sum(1),
            torch.bmm(d2.mT, h1),
            d2.sum(1),
            torch.bmm(d3.mT, h2),
            d3.sum(1),
        )


class _StackedBranches(torch.autograd.Function):
    """:meth:`AgentMLP.branch` of R runs with its backward written out, as :class:`_StackedMLP`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branches: Tensor,
        identity: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
        w3: Tensor,
        b3: Tensor,
    ) -> Tensor:
        runs, batch, agents, known = x.shape
        count, hidden = branches.shape[1], w1.shape[1]
        rows, points = x.flatten(1, 2), branches.flatten(1, 3)
        trunk = torch.bmm(rows, w1[..., :known].mT).view(runs, batch, agents, hidden)
        trunk.add_((identity + b1.unsqueeze(1)).unsqueeze(1))
        h1 = torch.bmm(points, w1[..., known:].mT)
        h1.view(runs, count, batch, agents, hidden).add_(trunk.unsqueeze(1)).relu_()
        h2 = torch.bmm(h1, w2.mT).add_(b2.unsqueeze(1)).relu_()
        ctx.save_for_backward(rows, points, h1, h2, w1, w2, w3)
        ctx.sizes = (runs, count, batch, agents)
        return affine(h2, w3, b3).view(runs, count, batch, agents, -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, points, h1, h2, w1, w2, w3 = ctx.saved_tensors
        runs, count, batch, agents = ctx.sizes
        known = rows.shape[-1]
        d3 = gradient.reshape(runs, count * batch * agents, -1)
        d2 = torch.bmm(d3, w3)
        torch.ops.aten.threshold_backward.grad_input(d2, h2, 0, grad_input=d2)
        d1 = torch.bmm(d2, w2)
        torch.ops.aten.threshold_backward.grad_input(d1, h1, 0, grad_input=d1)
        need_x, need_branches, *need_parameters = ctx.needs_input_grad
        d_branches = (
            product(d1, w1[..., known:]).view(runs, count, batch, agents, -1) if need_branches else None
        )
        if not need_x and not any(need_parameters):
            return None, d_branches, None, None, None, None, None, None, None
        trunk = d1.view(runs, count, batch * agents, -1).sum(1)
        dx = product(trunk, w1[..., :known]).view(runs, batch, agents, known) if need_x else None
        if not any(need_parameters):
            return dx, d_branches, None, None, None, None, None, None, None
        identity = trunk.view(runs, batch, agents, -1).sum(1)
        return (
            dx,
            d_branches,
            identity,
            torch.cat((torch.bmm(trunk.mT, rows), torch.bmm(d1.mT, points)), -1),
            identity.sum(1),
            torch.bmm(d2.mT, h1),
            d2.sum(1),
            torch.bmm(d3.mT, h2),
            d3.sum(1),
        )
