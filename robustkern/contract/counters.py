"""Leaves of integers and booleans, such as BatchNorm's counters of batches: they are no coordinates.

They take no part in distances, so a row that a rule chose by distances may hold any integers: the result has the
column-wise lower median, whatever the rule, an actual value that at least half of the rows (of the weight) do not
exceed. Only `mean`,
which trusts everybody, has their mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Combine", "lower_median", "rounded_mean"]

#: From (k, m) integers to (m,), in their dtype, or in that of floats where it is given; and which of the rows these k
#: are (None: all).
Combine = Callable[[NDArray[Any], "np.dtype[Any] | None", "NDArray[np.intp] | None"], NDArray[Any]]


def lower_median(
    values: NDArray[Any], dtype: np.dtype[Any] | None = None, weights: NDArray[np.float64] | None = None
) -> NDArray[Any]:
    """Return the column-wise lower median of (n, m) integers, or of finite floats; `dtype` changes nothing.

    With weights: the first value up to which there is at least half of the weight.
    """
    if weights is None:
        middle = (len(values) - 1) // 2
        return np.asarray(np.partition(values, middle, axis=0)[middle])
    order = values.argsort(axis=0, kind="stable")
    reached = 2 * weights[order].cumsum(axis=0) >= weights.sum()
    return np.asarray(np.take_along_axis(values, order, axis=0)[reached.argmax(axis=0), np.arange(values.shape[1])])


def rounded_mean(
    values: NDArray[Any], dtype: np.dtype[Any] | None = None, weights: NDArray[np.float64] | None = None
) -> NDArray[Any]:
    """Return the column-wise mean of (n, m) integers or booleans, rounded half to even, or as floats of a dtype.

    Without weights it is exact before it is rounded. With weights, sums are taken in the widest float there is.
    """
    n = len(values)
    if weights is not None:
        wide = weights.astype(np.longdouble)
        mean = (wide @ values.astype(np.longdouble)) / wide.sum()
        return np.asarray(mean, dtype=dtype) if dtype is not None else _within(np.rint(mean), values.dtype)
    # Sums of halves of 32 bits, so that none overflows: high * 2^32 + low.
    low = (values.astype(np.uint64) & np.uint64(0xFFFFFFFF)).astype(np.int64).sum(axis=0)
    high = (values >> 32 if values.dtype.itemsize == 8 else -(values < 0).astype(np.int64)).astype(np.int64).sum(axis=0)
    quotient_high, rest = np.divmod(high, n)
    quotient, rest = np.divmod((rest << 32) + low, n)
    if dtype is not None:
        whole = quotient_high.astype(np.longdouble) * 2**32 + quotient
        return np.asarray(whole + rest.astype(np.longdouble) / n, dtype=dtype)
    up = (2 * rest > n) | ((2 * rest == n) & (quotient % 2 == 1))
    total = (quotient_high.astype(np.uint64) << np.uint64(32)) + (quotient + up).astype(np.uint64)
    return np.asarray(total.astype(values.dtype) if values.dtype != np.bool_ else total == 1)


def _within(values: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Convert whole numbers that a dtype holds; the widest floats round beyond its ends."""
    if dtype == np.bool_:
        return np.asarray(values != 0)
    limits = np.iinfo(dtype)
    low, high = values <= limits.min, values >= limits.max
    result = np.where(low | high, 0, values).astype(dtype)
    return np.where(low, dtype.type(limits.min), np.where(high, dtype.type(limits.max), result))
