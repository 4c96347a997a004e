"""Products of layers against float64, in every layout that training gives them, and run by run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from omcda_deploy.training import products
from omcda_deploy.training.products import affine, product

SIZES = [
    (61, 67, 1),
    (61, 67, 3),
    (61, 1, 67),
    (61, 67, 130),
    (130, 61, 128),
    (3, 67, 130),
    (16, 16, 16),
]  # M, I, H


def layouts(a: Tensor) -> list[Tensor]:
    """The same matrices row by row, column by column, and with gaps between rows or columns."""
    gaps = torch.cat((a, a), -1)[..., : a.shape[-1]]
    return [a, a.mT.contiguous().mT, gaps, torch.cat((a.mT, a.mT), -1)[..., : a.shape[-2]].mT]


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SIZES)
@pytest.mark.parametrize("runs", [0, 1, 3])
def test_products_are_right_in_every_layout(rows: int, inputs: int, outputs: int, runs: int) -> None:
    torch.manual_seed(0)
    shape = (runs,) if runs else ()
    a, b, bias = (
        torch.randn(*shape, rows, inputs),
        torch.randn(*shape, inputs, outputs),
        torch.randn(*shape, outputs),
    )
    exact = a.double() @ b.double()
    for left in layouts(a):
        for right in layouts(b):
            torch.testing.assert_close(product(left, right).double(), exact, rtol=1e-5, atol=1e-4)
            for offset in (None, bias):
                layer = exact if offset is None else exact + offset.double().unsqueeze(-2)
                for relu in (False, True):
                    expected = layer.relu() if relu else layer
                    result = affine(left, right.mT, offset, relu=relu)
                    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("columns", [1, 3])
def test_products_of_one_run_have_the_bits_of_company(columns: int) -> None:
    torch.manual_seed(0)
    a, b, bias = torch.randn(5, 61, 67), torch.randn(5, 67, columns), torch.randn(5, columns)
    together, layers = product(a, b), affine(a, b.mT, bias)
    for run in range(5):
        one = slice(run, run + 1)
        assert torch.equal(product(a[one], b[one]), together[one])
        assert torch.equal(affine(a[one], b[one].mT, bias[one]), layers[one])


def test_a_torch_without_onednn_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(130, 64), torch.randn(128, 64), torch.randn(128)
    ours = affine(x, weight, bias, relu=True), product(x, weight.mT)
    monkeypatch.setattr(products, "LINEAR", None)
    theirs = affine(x, weight, bias, relu=True), product(x, weight.mT)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
