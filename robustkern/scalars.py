"""Single numbers that users pass, Python's or NumPy's, as Python's. A truth value is no number."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

__all__ = ["as_float", "as_int"]


def as_int(x: Any) -> int | None:
    """Return a whole number; None where it is none."""
    return None if isinstance(x, (bool, np.timedelta64)) or not isinstance(x, (int, np.integer)) else int(x)


def as_float(x: Any) -> float | None:
    """Return a number, an infinity where it is too large for a float; None where it is none."""
    if isinstance(x, (bool, np.timedelta64)) or not isinstance(x, (int, float, np.integer, np.floating)):
        return None
    try:
        return float(x)
    except OverflowError:
        return math.inf if x > 0 else -math.inf
