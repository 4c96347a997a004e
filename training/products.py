"""Matrix products of layers, for one run or for R runs at once.

Shapes: R runs, M rows, I inputs, H outputs. Runs have the axis (R,) in front of the others; one run alone lacks it.

torch leaves its products to MKL, which uses half of the vectors' width of processors that are not Intel's. So large
products of one run are given to oneDNN, where torch has it; that adds a layer's bias and takes its ReLU on the way.

On Intel's processors MKL sums in an order that depends on how many products are in a batch, so that a run would not
have the same bits alone and in company. ``MKL_CBWR``, which MKL reads at its first product, forbids that.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
# What torch.compile calls for a linear layer: (x, weight, bias, "none" or "relu", [], "").
LINEAR: Any = getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)
_LEAST = 16  # rows, inputs and outputs: a call of oneDNN costs more than smaller products
_LEAST_TRANSPOSED = 128  # outputs, where the left factor is transposed


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a b``, for one run or run by run: [(R,) M, I], [(R,) I, H] -> [(R,) M, H].

    A single run of R = 1 with H = 1 would take torch's matrix-vector path, whose sums differ in the last bit from
    those of the same run in company; it is computed as two runs, so that a run's bits do not depend on R.
    """
    if a.shape[-1] == 1:
        return a * b
    if a.ndim == 2:
        return _linear(a, b.mT, None, "none") if _is_large(a, b.shape[1]) else torch.mm(a, b)
    if len(a) == 1 and b.shape[-1] == 1:
        return torch.bmm(a.expand(2, -1, -1), b.expand(2, -1, -1))[:1]
    return torch.bmm(a, b)


def affine(x: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """Return ``x W^T + b``, or its ReLU: [(R,) M, I], [(R,) H, I], [(R,) H] -> [(R,) M, H]; None: b = 0."""
    if x.ndim == 2 and _is_large(x, len(weight)):
        return _linear(x, weight, bias, "relu" if relu else "none")
    if bias is None:
        result = product(x, weight.mT)
    elif x.ndim == 2:
        result = torch.addmm(bias, x, weight.mT)
    elif weight.shape[1] == 1:
        result = product(x, weight.mT) + bias.unsqueeze(1)
    else:
        result = torch.baddbmm(bias.unsqueeze(1), x, weight.mT)
    return result.relu_() if relu else result


def _is_large(a: Tensor, outputs: int) -> bool:
    """Test if oneDNN multiplies ``a`` [M, I] by a matrix [I, outputs] in less time than MKL."""
    rows, inputs = a.shape
    return (
        rows >= _LEAST
        and inputs >= _LEAST
        and outputs >= _LEAST
        and (outputs >= _LEAST_TRANSPOSED or a.is_contiguous())
        and a.dtype == torch.float32
        and a.is_cpu
        and LINEAR is not None
    )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    result: Tensor = LINEAR(_dense(x), _dense(weight), bias, activation, [], "")
    return result


def _dense(a: Tensor) -> Tensor:
    """Copy a matrix with gaps between its rows, for which oneDNN would take hundreds of times as long."""
    return a if a.is_contiguous() or a.mT.is_contiguous() else a.contiguous()
