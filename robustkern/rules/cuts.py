"""Cuts: which rows or candidates are the least, where rounding must not decide.

Values whose error bounds reach across the cut are contenders, which are measured exactly; equal ones go to the lowest
index. Rules cut through the methods of a `View` and never see a bound.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from robustkern.contract.rows import Vector
from robustkern.rules.geometry import EPSILON

__all__ = ["TIE", "Distances", "contending", "smallest", "smallest_between", "weighted_share"]

Again = Callable[[NDArray[np.intp]], Vector | None]
#: What differs by no more, relative to the value at the cut, is a tie: a few roundings of a sum.
TIE = 8 * EPSILON


class Distances(NamedTuple):
    """Squared distances of a view's rows to a point, in units of 1/scale^2.

    Attributes
    ----------
    values, errors : (n,) float64
        Inf for rows that are not finite; bounds of the errors.
    again : callable or None
        Measures some rows exactly.
    scale : float
        As in `Geometry`.
    """

    values: Vector
    errors: Vector
    again: Again | None
    scale: float


def smallest(values: Vector, errors: Vector, count: int, again: Again | None) -> NDArray[np.intp]:
    """Find exactly `count` smallest values: their indices, ascending by value; equal ones by the lowest index.

    What `again` cannot measure, or finds equal within rounding, counts as equal.
    """
    order = values.argsort(kind="stable")
    if count >= len(values):
        return order
    largest = errors.max()
    if values[order[count - 1]] + largest < values[order[count]] - largest:
        return order[:count]  # nearly always
    return smallest_between(values, values - errors, values + errors, count, again)


def smallest_between(values: Vector, low: Vector, high: Vector, count: int, again: Again | None) -> NDArray[np.intp]:
    """Find exactly `count` smallest values, of which each is known to lie between two bounds; see `smallest`."""
    order = values.argsort(kind="stable")
    if count >= len(values):
        return order
    certain, contenders = contending(values, low, high, count)
    if not len(contenders):
        return order[:count]
    missing = count - len(certain)
    if (high - low)[contenders].max() <= 2 * TIE * values[order[count - 1]]:
        exact: Vector | None = values[contenders]  # as good as measured: what rounding could confuse is a tie
    else:
        exact = again(contenders) if again is not None else None
    if exact is None:
        chosen = contenders[:missing]
    else:
        # What still differs by a few roundings only is a tie.
        at_cut = np.sort(exact)[missing - 1]
        tolerance = TIE * at_cut
        away = exact - at_cut
        below, ties = contenders[away < -tolerance], contenders[abs(away) <= tolerance]
        chosen = np.concatenate([below, ties[: missing - len(below)]])
    parts = (part[np.argsort(values[part], kind="stable")] for part in (certain, chosen))
    return np.concatenate(list(parts))


def contending(values: Vector, low: Vector, high: Vector, count: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return which values are among the `count` smallest for certain, and which may be: none where all is certain."""
    # The count-th smallest true value is at most the count-th upper bound, the next one at least the next lower bound.
    inside = high < np.sort(low)[count]
    contenders = np.flatnonzero(~inside & (low <= np.sort(high)[count - 1]))
    certain = np.flatnonzero(inside)
    if len(certain) + len(contenders) == count or not np.isfinite(np.partition(values, count)[count]):
        return certain, contenders[:0]
    return certain, contenders


def weighted_share(s: Vector, share: float, distances: Distances) -> Vector:
    """Weights of the nearest rows taken until a share of the sum of s is reached, the last one split.

    Rows whose error bounds reach across the last one are measured exactly. What is left of a split below a rounding of
    the sum is dropped: an infinite row times 1e-16 is still infinite.
    """
    total = float(s.sum())
    values, finite = distances.values.copy(), np.isfinite(distances.values)
    order = values.argsort(kind="stable")[: np.count_nonzero(finite)]
    last = order[min(int(np.searchsorted(np.cumsum(s[order]), share * total)), len(order) - 1)]
    apart = abs(values[finite] - values[last]) - distances.errors[finite] - distances.errors[last]
    contenders = np.flatnonzero(finite)[apart <= 0]
    if len(contenders) > 1 and distances.again is not None:
        exact = distances.again(contenders)
        if exact is not None:
            values[contenders] = exact
            order = values.argsort(kind="stable")[: len(order)]
    budget = share * total
    taken = np.zeros_like(s)
    for i in order:
        if budget <= 1e-14 * total:
            break
        taken[i] = min(s[i], budget)
        budget -= taken[i]
    return taken
