"""Numbers as words of reports and tables."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def digits_of(returns: ArrayLike) -> int:
    """Decimals that tell such returns apart: 1 where they reach 100, 3 for SMAX's, which end at 2."""
    return 1 if np.abs(returns).max() >= 100 else 3
