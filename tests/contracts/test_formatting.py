"""Numbers as text: one spelling of each, also of those that are not known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from omcda_deploy.formatting import count, digits_of, number, percent, significant


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0.0, 1, "0.0"),
        (-1234.56, 1, "\u22121\u202f234.6"),
        (1234567.0, 0, "1\u202f234\u202f567"),
        (np.float64(0.25), 4, "0.2500"),
        (math.inf, 1, "\u221e"),
        (-math.inf, 1, "\u2212\u221e"),
    ],
)
def test_numbers_with_fixed_decimals(value: float, digits: int, text: str) -> None:
    assert number(value, digits) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (-0.0, "0"),
        (0.25, "0.25"),
        (123.456, "123.5"),
        (-1234567.0, "\u22121\u202f234\u202f567"),
        (1e-9, "1e\u221209"),
        (math.inf, "\u221e"),
    ],
)
def test_numbers_with_as_many_digits_as_they_need(value: float, text: str) -> None:
    assert significant(value) == text


def test_unknown_numbers_are_a_dash_everywhere() -> None:
    spellings = [form(value) for form in (number, significant, percent) for value in (None, math.nan)]
    assert spellings == ["\u2013"] * 6


def test_shares_are_percentages() -> None:
    assert [percent(share) for share in (0.0, 0.125, 1.0)] == ["0.0 %", "12.5 %", "100.0 %"]
    assert [percent(share) for share in (-0.1, 12.5)] == ["\u221210.0 %", "1\u202f250.0 %"]


def test_nouns_follow_their_count() -> None:
    assert [count(n, "step") for n in (0, 1, 2)] == ["0 steps", "1 step", "2 steps"]


def test_small_returns_keep_three_digits_that_count() -> None:
    assert [digits_of(returns) for returns in ([1.9, 0.2], [-100.0, 1.0], [99.9])] == [3, 1, 3]
    assert [digits_of(returns) for returns in ([0.0], [0.03, -0.09], [4e-4])] == [3, 4, 6]
    assert number(4e-4, digits_of([4e-4])) == "0.000400"
