"""Numbers as text for reports, tables and figures.

All functions but :func:`count` group thousands with a narrow no-break space, write a true minus sign, and show a
value that is not known (None or nan) as :data:`UNKNOWN`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

UNKNOWN = "\u2013"

_Number = float | np.floating[Any]


def number(value: _Number | None, digits: int = 1) -> str:
    """``value`` with ``digits`` decimals: ``1 234.5``."""
    return UNKNOWN if value is None else _text(value, f",.{digits}f")


def significant(value: _Number | None) -> str:
    """``value`` with as many digits as it needs, at most four, and all those before the decimal point."""
    if value is None:
        return UNKNOWN
    if value == 0:
        return "0"  # never -0
    return _text(value, ",.0f" if math.fabs(value) >= 1000 else ".4g")


def percent(share: _Number | None) -> str:
    """A share in percent with one decimal: ``12.5 %``."""
    return UNKNOWN if share is None or math.isnan(share) else f"{_text(100 * share, ',.1f')} %"


def count(quantity: int, noun: str) -> str:
    """A quantity of a thing with a regular plural: ``1 episode``, ``2 episodes``."""
    return f"{quantity} {noun}" if quantity == 1 else f"{quantity} {noun}s"


def digits_of(returns: ArrayLike) -> int:
    """Decimals that tell returns of this size apart: 1 where they reach 100, 3 for SMAX's, which end at 2.

    Those of less than 0.1 have three digits that count.
    """
    largest = float(np.abs(returns).max())
    if largest >= 100:
        return 1
    return max(3, 2 - math.floor(math.log10(largest))) if largest > 0 else 3


def _text(value: _Number, layout: str) -> str:
    if math.isnan(value):
        return UNKNOWN
    text = f"{value:{layout}}" if math.isfinite(value) else f"{'-' if value < 0 else ''}\u221e"
    return text.replace(",", "\u202f").replace("-", "\u2212")
