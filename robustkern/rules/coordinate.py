"""Rules that take a window of each column's sorted values: one read of the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from robustkern.contract.primitives import Window
from robustkern.rules.base import Aggregator, check_f, register, require_no_weights
from robustkern.rules.view import Selection, Solution, View, as_cells

__all__ = ["MeanAroundMedian", "Median", "TrimmedMean"]


@register
@dataclass(frozen=True)
class Median(Aggregator):
    """Coordinate-wise median.

    Parameters
    ----------
    even : {"mean", "low", "high"}
        What an even number of values gives: the mean of the two middle ones, or one of them. With weights the same
        choice decides where half of the weight is reached exactly.
    """

    even: Literal["mean", "low", "high"] = "mean"

    name: ClassVar[str] = "median"
    supports_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the parameters."""
        if not isinstance(self.even, str) or self.even not in ("mean", "low", "high"):
            raise ValueError(f"median: even must be 'mean', 'low' or 'high'; got {self.even!r}")

    def solve(self, view: View) -> Solution:
        """Select the middle cell or cells."""
        cells = None if view.weights is None else as_cells(view.weights)
        total = view.n if cells is None else int(cells.sum())
        lo, hi = (total - 1) // 2, total // 2 + 1
        if self.even == "low":
            hi = lo + 1
        elif self.even == "high":
            lo = hi - 1
        return Solution(None, Selection(view, Window(lo, hi), cells))


@register
@dataclass(frozen=True)
class TrimmedMean(Aggregator):
    """Coordinate-wise mean without the f smallest and the f largest values; 2f < n.

    With weights, a share of f/n of their sum is cut from each end, splitting the row at the cut.
    """

    name: ClassVar[str] = "trimmed_mean"
    supports_weights: ClassVar[bool] = True

    def solve(self, view: View) -> Solution:
        """Select the cells between the cuts."""
        f = check_f(self, view)
        if view.weights is None:
            return Solution(None, Selection(view, Window(f, view.n - f)))
        cells = as_cells(view.weights)
        total = int(cells.sum())
        cut = (2 * f * total + view.n) // (2 * view.n)
        return Solution(None, Selection(view, Window(cut, total - cut), cells))


@register
@dataclass(frozen=True)
class MeanAroundMedian(Aggregator):
    """Coordinate-wise mean of the n-f values nearest to the median; 2f < n."""

    name: ClassVar[str] = "mean_around_median"

    def solve(self, view: View) -> Solution:
        """Select the middle, and the values around it."""
        f = check_f(self, view)
        require_no_weights(self, view)
        return Solution(None, Selection(view, Window((view.n - 1) // 2, view.n // 2 + 1), nearest=view.n - f))
