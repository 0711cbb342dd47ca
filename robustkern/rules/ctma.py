"""The Centered Trimmed Meta Aggregator: lifts any robust rule to the optimal order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from robustkern.rules.base import Aggregator, Goals, as_aggregator, register
from robustkern.rules.mean import Mean
from robustkern.rules.view import Solution, View

__all__ = ["CTMA"]


@register
@dataclass(frozen=True)
class CTMA(Aggregator):
    """Mean of the n-f rows nearest to the result of another rule (Dahan & Levy, ICML 2024).

    The anchor only selects: exactly n-f rows are kept, ties by the lowest index. With weights s (Dahan & Levy, NeurIPS
    2024) the nearest rows are kept until what is left may be Byzantine, a share of their sum; the last one is split.

    Parameters
    ----------
    anchor : rule or str
        Any rule that combines the rows, also a chain: ``ctma(nnm | median)`` trims and averages the original rows,
        ``nnm | ctma(median)`` the mixed ones.
    """

    anchor: Aggregator

    name: ClassVar[str] = "ctma"
    form: ClassVar[str] = "ctma(rule)"
    summary: ClassVar[str] = "mean of the n-f rows nearest to the rule's result: lifts any rule to the optimal order"
    advice: ClassVar[str] = "the optimal order over any other rule, for one more read of n-f rows: the default choice"
    needs: ClassVar[str] = "its rule's"
    supports_weights: ClassVar[bool] = True
    goals: ClassVar[Goals] = {
        "ctma(median)": {16: 2.1, 32: 2.2, 64: 2.5, 128: 3.0},
        "ctma(geometric_median)": {16: 2.2, 32: 2.4, 64: 3.0, 128: 4.5},
    }

    def __init__(self, anchor: Aggregator | str) -> None:
        object.__setattr__(self, "anchor", as_aggregator(anchor))
        object.__setattr__(self, "points", self.anchor.points)

    def bound_met(self, n: int, f: int | None) -> bool | None:
        """As the anchor, and 2f < n."""
        return None if f is None else bool(2 * f < n and self.anchor.bound_met(n, f) is not False)

    def kappa(self, n: int, f: int) -> float | None:
        """Return 4 delta / (1 - delta) (1 + the anchor's constant), delta = f/n: the paper's Lemma for any anchor."""
        kappa = self.anchor.kappa(n, f)
        return None if kappa is None else 4 * f / (n - f) * (1 + kappa)

    def window(self, n: int, f: int) -> tuple[int, int] | None:
        """As the anchor."""
        return self.anchor.window(n, f)

    def rows_read_again(self, n: int, f: int) -> int:
        """Return n-f."""
        return n - f

    def compares(self) -> bool:
        """As the anchor: distances to a window of the columns are measured from it."""
        return self.anchor.compares()

    def solve(self, view: View) -> Solution:
        """Solve for the anchor, measure the rows against it, keep the nearest."""
        f, n = view.require_f(self.name), view.n
        anchor = self.anchor.over_finite(view) if isinstance(self.anchor, Mean) else self.anchor.solve(view)
        view.check(anchor, self.anchor)
        if view.weights is None:
            kept, sq_distances = view.nearest_to(anchor, n - f, self.name)
            solution = view.mean_of(kept)
        else:
            taken, sq_distances = view.weights_nearest_to(anchor, self.name)
            solution = Solution(taken, float(taken.sum()), kept=taken > 0)
        return solution._replace(
            sq_distances=sq_distances,
            iterations=anchor.iterations,
            converged=anchor.converged,
            gap=anchor.gap,
            gave_up=anchor.gave_up,
        )

    def plain(self, x: NDArray[Any], f: int) -> NDArray[Any]:
        """Sort the rows by their distance to the anchor."""
        away = ((x - self.anchor.plain(x, f)) ** 2).sum(axis=1)
        return np.asarray(x[np.argsort(away, kind="stable")[: len(x) - f]].mean(axis=0))
