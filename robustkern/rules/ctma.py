"""The Centered Trimmed Meta Aggregator: lifts any robust rule to the optimal order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from robustkern.contract.rows import Vector
from robustkern.rules.base import Aggregator, as_aggregator, check_f, register
from robustkern.rules.view import Distances, Solution, View, smallest, unscaled
from robustkern.rules.weights import Mean

__all__ = ["CTMA"]


@register
@dataclass(frozen=True)
class CTMA(Aggregator):
    """Mean of the n-f rows nearest to the result of another rule (Dahan & Levy, ICML 2024).

    The anchor only selects: exactly n-f rows are kept, ties by the lowest index. With weights s (Dahan & Levy, NeurIPS
    2024) the nearest rows are kept up to a share of 1 - f/n of the sum of the weights, the last one split.

    Parameters
    ----------
    anchor : rule
        Any rule that combines the rows, also a chain: ``ctma(nnm | median)`` trims and averages the original rows,
        ``nnm | ctma(median)`` the mixed ones.
    """

    anchor: Aggregator

    name: ClassVar[str] = "ctma"
    supports_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the anchor."""
        as_aggregator(self.anchor)

    def needs_origin(self) -> bool:
        """As the anchor."""
        return self.anchor.needs_origin()

    def bound_met(self, n: int, f: int | None) -> bool | None:
        """As the anchor, and 2f < n."""
        return None if f is None else bool(2 * f < n and self.anchor.bound_met(n, f) is not False)

    def solve(self, view: View) -> Solution:
        """Measure the distances to the anchor, keep the nearest rows."""
        f = check_f(self, view)
        anchor = self.anchor.over_finite(view) if isinstance(self.anchor, Mean) else self.anchor.solve(view)
        distances = view.distances_to(anchor)
        view.require_finite(self.name, np.isfinite(distances.values))
        if view.weights is None:
            weights = np.zeros(view.n)
            weights[smallest(distances.values, distances.errors, view.n - f, distances.again)] = 1.0 / (view.n - f)
        else:
            weights = _weighted_cut(view.weights, f / view.n, distances)
        return Solution(
            weights=weights,
            kept=weights > 0,
            sq_distances=unscaled(distances.values, distances.scale),
            iterations=anchor.iterations,
            converged=anchor.converged,
            gave_up=anchor.gave_up,
        )


def _weighted_cut(s: Vector, share: float, distances: Distances) -> Vector:
    """Weights of the nearest rows taken until 1 - share of the sum of s is reached, the last one split.

    Rows whose error bounds reach across the last one are measured exactly. What is left of a split below a rounding of
    the sum is dropped: an infinite row times 1e-16 is still infinite.
    """
    total = float(s.sum())
    values, finite = distances.values.copy(), np.isfinite(distances.values)
    order = values.argsort(kind="stable")[: np.count_nonzero(finite)]
    last = order[min(int(np.searchsorted(np.cumsum(s[order]), (1 - share) * total)), len(order) - 1)]
    apart = abs(values[finite] - values[last]) - distances.errors[finite] - distances.errors[last]
    contenders = np.flatnonzero(finite)[apart <= 0]
    if len(contenders) > 1 and distances.again is not None:
        exact = distances.again(contenders)
        if exact is not None:
            values[contenders] = exact
            order = values.argsort(kind="stable")[: len(order)]
    budget = (1 - share) * total
    taken = np.zeros_like(s)
    for i in order:
        if budget <= 1e-14 * total:
            break
        taken[i] = min(s[i], budget)
        budget -= taken[i]
    return np.asarray(taken / taken.sum())
