"""Rules that take a window of each column's sorted values: one read of the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from robustkern.rules.base import Aggregator, Goals, keep_count, register
from robustkern.rules.view import Solution, View

__all__ = ["MeanAroundMedian", "Median", "Phocas", "TrimmedMean"]

_SELECTION: Mapping[int, float] = {16: 1.1, 32: 1.25, 64: 1.5, 128: 2.0, 256: 2.5, 1024: 4.0}


#: What an even number of values gives: the mean of the two middle ones, or one of them.
Even = Literal["mean", "low", "high"]


def _check_even(rule: str, even: Any) -> None:
    if not isinstance(even, str) or even not in ("mean", "low", "high"):
        raise ValueError(f"{rule}: even must be 'mean', 'low' or 'high'; got {even!r}")


def _middle(cells: int, even: Even) -> tuple[int, int]:
    lo, hi = (cells - 1) // 2, cells // 2 + 1
    return (lo, lo + 1) if even == "low" else (hi - 1, hi) if even == "high" else (lo, hi)


class _Selection(Aggregator):
    """What these rules have in common: the first pass writes the result."""

    reads: ClassVar[str] = "1"
    looks_at_no_row: ClassVar[bool] = True

    def rows_read_again(self, n: int, f: int) -> int:
        """Return 0."""
        return 0


@register
@dataclass(frozen=True)
class Median(_Selection):
    """Coordinate-wise median.

    Parameters
    ----------
    even : {"mean", "low", "high"}
        What an even number of values gives: the mean of the two middle ones, or one of them. With weights the same
        choice decides where half of the weight is reached exactly.
    """

    even: Even = "mean"

    name: ClassVar[str] = "median"
    aliases: ClassVar[tuple[str, ...]] = ("cwmed",)
    summary: ClassVar[str] = 'per coordinate; `even="mean"/"low"/"high"`'
    advice: ClassVar[str] = "no f known, one read; biased where honest rows differ much and d is large"
    supports_weights: ClassVar[bool] = True
    goals: ClassVar[Goals] = {"median": _SELECTION, "weighted median": {16: 2.0, 32: 3.0}}

    def __post_init__(self) -> None:
        """Check the parameters."""
        _check_even(self.name, self.even)

    def solve(self, view: View) -> Solution:
        """Select the middle cell or cells."""
        if view.weights is None:
            return view.window(*_middle(view.n, self.even))
        return view.weighted_window(lambda cells, _: _middle(cells, self.even))

    def window(self, n: int, f: int) -> tuple[int, int]:
        """Return the middle ranks."""
        return _middle(n, self.even)

    def kappa(self, n: int, f: int) -> float | None:
        """Return the constant of Allouah et al. 2023."""
        return 4 * (1 + f / (n - 2 * f)) ** 2 if 2 * f < n else None

    def plain(self, x: NDArray[Any], f: int) -> NDArray[Any]:
        """As NumPy has it."""
        if self.even != "mean":
            return np.asarray(np.sort(x, axis=0)[_middle(len(x), self.even)[0]])
        return np.asarray(np.median(x, axis=0))


@register
@dataclass(frozen=True)
class TrimmedMean(_Selection):
    """Coordinate-wise mean without the f smallest and the f largest values; 2f < n.

    With weights, the share of their sum that may be Byzantine is cut from each end, splitting the row at the cut.
    """

    name: ClassVar[str] = "trimmed_mean"
    aliases: ClassVar[tuple[str, ...]] = ("cwtm", "trmean")
    summary: ClassVar[str] = "per coordinate, without the f smallest and largest"
    advice: ClassVar[str] = "one read, accurate where attackers are few; its constant grows with f/(n-2f)"
    supports_weights: ClassVar[bool] = True
    goals: ClassVar[Goals] = {"trimmed_mean": _SELECTION}

    def solve(self, view: View) -> Solution:
        """Select the cells between the cuts."""
        f, n = view.require_f(self.name), view.n
        if view.weights is None:
            return view.window(f, n - f)
        return view.weighted_window(lambda cells, bad: (bad, cells - bad))

    def window(self, n: int, f: int) -> tuple[int, int]:
        """Return the ranks between the cuts."""
        return f, n - f

    def kappa(self, n: int, f: int) -> float | None:
        """Return the constant of Allouah et al. 2023."""
        return 6 * f / (n - 2 * f) * (1 + f / (n - 2 * f)) if 2 * f < n else None

    def plain(self, x: NDArray[Any], f: int) -> NDArray[Any]:
        """Sort, and average the middle."""
        return np.asarray(np.sort(x, axis=0)[f : len(x) - f].mean(axis=0))


@register
@dataclass(frozen=True)
class MeanAroundMedian(_Selection):
    """Coordinate-wise mean of the values nearest to the median; 2f < n.

    Parameters
    ----------
    count : int or None
        How many values. None: n-f. With a count, f is not needed.
    even : {"mean", "low", "high"}
        What an even number of values has as its median: the mean of the two middle ones, or one of them.
    """

    count: int | None = None
    even: Even = "mean"

    name: ClassVar[str] = "mean_around_median"
    aliases: ClassVar[tuple[str, ...]] = ("meamed",)
    summary: ClassVar[str] = "per coordinate, of the n-f values nearest to the median; `count`, `even`"
    advice: ClassVar[str] = "one read, close to the mean without attackers; no constant is known"
    goals: ClassVar[Goals] = {"mean_around_median": {16: 1.3, 32: 1.6, 64: 2.0}}

    def __post_init__(self) -> None:
        """Check the parameters."""
        keep_count(self, "count", 1)
        _check_even(self.name, self.even)

    def solve(self, view: View) -> Solution:
        """Select the middle, and the values around it."""
        count = self.count if self.count is not None else view.n - view.require_f(self.name)
        if count > view.n:
            raise ValueError(f"mean_around_median: count={count} is more than n={view.n} values (pass n at most)")
        view.require_no_weights(self.name)
        return view.window(*_middle(view.n, self.even), nearest=count)

    def plain(self, x: NDArray[Any], f: int) -> NDArray[Any]:
        """Sort by the distance to the median; of equally far values the lower one comes first."""
        ranked, (lo, hi) = np.sort(x, axis=0), _middle(len(x), self.even)
        away = np.abs(ranked - ranked[lo:hi].astype(np.float64).mean(axis=0))
        nearest = np.argsort(away, axis=0, kind="stable")[: self.count or len(x) - f]
        return np.asarray(np.take_along_axis(ranked, nearest, axis=0).mean(axis=0))


@register
@dataclass(frozen=True)
class Phocas(_Selection):
    """Coordinate-wise mean of the n-f values nearest to the trimmed mean; 2f < n (Xie, Koyejo & Gupta 2018)."""

    name: ClassVar[str] = "phocas"
    summary: ClassVar[str] = "per coordinate, of the n-f values nearest to the trimmed mean"
    advice: ClassVar[str] = "as `mean_around_median`, around a centre of less variance; no constant is known"
    goals: ClassVar[Goals] = {"phocas": {16: 1.3, 32: 1.6, 64: 2.0}}

    def solve(self, view: View) -> Solution:
        """Select the cells between the cuts, and the values around their mean."""
        view.require_no_weights(self.name)
        f = view.require_f(self.name)
        return view.window(f, view.n - f, nearest=view.n - f)

    def plain(self, x: NDArray[Any], f: int) -> NDArray[Any]:
        """Sort by the distance to the trimmed mean; of equally far values the lower one comes first."""
        ranked = np.sort(x, axis=0)
        away = np.abs(ranked - ranked[f : len(x) - f].astype(np.float64).mean(axis=0))
        nearest = np.argsort(away, axis=0, kind="stable")[: len(x) - f]
        return np.asarray(np.take_along_axis(ranked, nearest, axis=0).mean(axis=0))
