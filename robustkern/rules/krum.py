"""Krum, Multi-Krum and Bulyan: rows whose neighbours are near."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from robustkern.contract.rows import Matrix, Vector
from robustkern.errors import NonFiniteError
from robustkern.rules.base import Aggregator, Goals, keep_count, register
from robustkern.rules.geometry import unscaled
from robustkern.rules.view import Mixture, Solution, View

__all__ = ["Bulyan", "Krum", "MultiKrum", "sq_distances_between"]

_TWO_READS = {16: 2.2, 32: 2.4, 64: 3.0, 128: 4.5}


def sq_distances_between(x: NDArray[Any]) -> NDArray[Any]:
    """Return squared distances between all rows in plain NumPy, one row against all the others at a time."""
    return np.stack([((x - row) ** 2).sum(axis=1) for row in x])


class _Scored(Aggregator):
    """What rules have in common that keep rows of good Krum scores."""

    neighbours: int | None
    squared: bool

    needs: ClassVar[str] = "2f + 2 < n"

    def __post_init__(self) -> None:
        """Check the parameters."""
        keep_count(self, "neighbours", 0)
        if not isinstance(self.squared, bool):
            raise ValueError(f"{self.name}: squared must be True or False; got {self.squared!r}")

    def best(self, view: View, f: int, count: int) -> Solution:
        """Return the mean, by weight, of the `count` rows of best score."""
        others = view.n - f - 2 if self.neighbours is None else self.neighbours
        if not (self.neighbours is None) <= others <= view.n - 1:
            raise ValueError(
                f"{self.name}: neighbours must be between 0 and n-1 (by default n-f-2, so n-f >= 3); "
                f"got {others} with n={view.n} rows, f={f} (lower f, or pass neighbours=)"
            )
        geometry, weights = view.measured(self.name, quick=True)
        finite = np.flatnonzero(geometry.finite)
        if count > len(finite):
            bad = np.flatnonzero(~geometry.finite).tolist()
            raise NonFiniteError(
                f"{self.name}: m={count} of n={view.n} rows are to be averaged, but {len(bad)} hold NaN or Inf, one of "
                f"them row {bad[0]} (lower m, or drop them)",
                tuple(bad),
            )

        def scores(squares: Matrix) -> Vector:
            return krum_scores(squares, finite, others, self.squared)

        first = scores(geometry.sq_distances)
        chosen = view.least(
            lambda squares: first if squares is geometry.sq_distances else scores(squares),
            count,
            pairs=lambda row: np.column_stack([np.full_like(finite, row), finite]),
        )
        scale = geometry.scale if self.squared else math.sqrt(geometry.scale)
        solution = view.mean_of(chosen)._replace(scores=unscaled(first, scale))
        if view.weights is None:
            return solution
        assert solution.weights is not None
        shares = solution.weights * weights
        if not shares.any():
            raise ValueError(f"{self.name}: the rows that are kept have no weight (raise m, or their weights)")
        return solution._replace(weights=shares, divisor=math.fsum(shares))

    def bound_met(self, n: int, f: int | None) -> bool | None:
        """Krum's theorem needs 2f + 2 < n."""
        return None if f is None else 2 * f + 2 < n

    def plain_best(self, x: NDArray[Any], f: int, count: int) -> NDArray[Any]:
        """Sort each row's distances, and the rows by what the nearest ones add up to."""
        neighbours = len(x) - f - 2 if self.neighbours is None else self.neighbours
        away = sq_distances_between(x) if self.squared else np.sqrt(sq_distances_between(x))
        scores = np.sort(away, axis=1)[:, 1 : neighbours + 1].sum(axis=1)
        return np.asarray(x[np.argsort(scores, kind="stable")[:count]].mean(axis=0))


def krum_scores(squares: Matrix, rows: NDArray[np.intp], others: int, squared: bool = True) -> Vector:
    """Return (n,) sums of distances from some rows, in ascending order, to so many others of them, inf for the rest.

    Rows that are not among them are infinitely far from all alike.
    """
    among = squares if len(rows) == len(squares) else squares[np.ix_(rows, rows)]
    # A row's distance to itself, 0, counts too; sorted, so that equal terms have equal sums.
    nearest = np.sort(among, axis=1)[:, : min(others + 1, len(rows))]
    sums = np.asarray((nearest if squared else np.sqrt(nearest)).sum(axis=1, dtype=np.longdouble), dtype=np.float64)
    if among is squares:
        return sums
    result = np.full(len(squares), np.inf)
    result[rows] = sums
    return result


@register
@dataclass(frozen=True)
class Krum(_Scored):
    """The row with the least sum of squared distances to its nearest others (Blanchard et al. 2017).

    Parameters
    ----------
    neighbours : int or None
        How many others count; None: n-f-2 as in the paper (ByzFL takes n-f-1).
    squared : bool
        Whether distances are squared before they are added.
    """

    neighbours: int | None = None
    squared: bool = True

    name: ClassVar[str] = "krum"
    summary: ClassVar[str] = "the row with the nearest neighbours; `neighbours`, `squared`"
    advice: ClassVar[str] = "an actual row is wanted; not for accuracy: it averages nobody"
    goals: ClassVar[Goals] = {"krum": _TWO_READS}

    def solve(self, view: View) -> Solution:
        """Keep the best row."""
        view.require_no_weights(self.name)
        return self.best(view, view.require_f(self.name), 1)

    def rows_read_again(self, n: int, f: int) -> int:
        """Return 1."""
        return 1

    def kappa(self, n: int, f: int) -> float | None:
        """Return the constant of Allouah et al. 2023, of the paper's number of neighbours."""
        known = 2 * f < n and self.neighbours is None and self.squared
        return 6 * (1 + f / (n - 2 * f)) if known else None

    def plain(self, x: NDArray[Any], f: int) -> NDArray[Any]:
        """Take the first one."""
        return self.plain_best(x, f, 1)


@register
@dataclass(frozen=True)
class MultiKrum(_Scored):
    """Mean of the m rows of best Krum score; with weights their weighted mean, the scores know none.

    Parameters
    ----------
    m : int or None
        How many rows; None: n-f (as ByzFL; others use n-f-2). More than n-f are bound to let attackers in.
    neighbours, squared
        As for Krum.
    """

    m: int | None = None
    neighbours: int | None = None
    squared: bool = True

    name: ClassVar[str] = "multi_krum"
    aliases: ClassVar[tuple[str, ...]] = ("multikrum",)
    summary: ClassVar[str] = "mean of the m rows with the nearest neighbours; `m`, `neighbours`, `squared`"
    advice: ClassVar[str] = "as krum, averaging m rows; m above n-f lets attackers in"
    supports_weights: ClassVar[bool] = True
    goals: ClassVar[Goals] = {"multi_krum": _TWO_READS}

    def __post_init__(self) -> None:
        """Check the parameters."""
        super().__post_init__()
        keep_count(self, "m", 1)

    def solve(self, view: View) -> Solution:
        """Average the best m rows."""
        f = view.require_f(self.name)
        m = view.n - f if self.m is None else self.m
        if m > view.n:
            raise ValueError(f"multi_krum: m must be at most n; got m={m} with n={view.n} rows (lower m)")
        return self.best(view, f, m)

    def bound_met(self, n: int, f: int | None) -> bool | None:
        """As for Krum, and m at most n-f."""
        return None if f is None else 2 * f + 2 < n and (self.m is None or self.m <= n - f)

    def rows_read_again(self, n: int, f: int) -> int:
        """Return m."""
        return n - f if self.m is None else self.m

    def plain(self, x: NDArray[Any], f: int) -> NDArray[Any]:
        """Average the first ones."""
        return self.plain_best(x, f, len(x) - f if self.m is None else self.m)


@register
@dataclass(frozen=True)
class Bulyan(Aggregator):
    """Per coordinate, of n-2f rows that Krum selects, the mean of the n-4f values nearest to their median.

    El Mhamdi et al. 2018.

    Parameters
    ----------
    selection : {"iterative", "once"}
        Whether the rows that are left are scored again after each that is taken, as in the paper, at n^3 steps; or the
        n-2f best scores are taken at once.
    """

    selection: Literal["iterative", "once"] = "iterative"

    name: ClassVar[str] = "bulyan"
    summary: ClassVar[str] = 'per coordinate, around the median of n-2f rows that Krum selects; `selection="once"`'
    advice: ClassVar[str] = "few attackers in many dimensions; not above f = (n-3)/4, nor for large n (n^3)"
    reads: ClassVar[str] = "2"
    needs: ClassVar[str] = "4f + 3 <= n"

    def __post_init__(self) -> None:
        """Check the parameters."""
        if not isinstance(self.selection, str) or self.selection not in ("iterative", "once"):
            raise ValueError(f"bulyan: selection must be 'iterative' or 'once'; got {self.selection!r}")

    def solve(self, view: View) -> Solution:
        """Select rows, then a window of them."""
        f, n = view.require_f(self.name), view.n
        view.require_no_weights(self.name)
        if 4 * f + 3 > n:
            raise ValueError(f"bulyan: 4*f + 3 must be at most n; got f={f} with n={n} rows (lower f, or add rows)")
        if self.selection != "once":
            view.expect_double()  # one of so many cuts is finer than float32 nearly always
        geometry, _ = view.measured(self.name, quick=True)
        chosen: list[int] = []
        left, rounds = np.flatnonzero(geometry.finite), n - 2 * f
        while len(chosen) < rounds:
            count = rounds if self.selection == "once" else 1
            others = max(n - len(chosen) - f - 2, 1)
            rows = left
            best = view.least(
                lambda squares, rows=rows, others=others: krum_scores(squares, rows, others),  # type: ignore[misc]
                count,
                pairs=lambda row, rows=rows: np.column_stack([np.full_like(rows, row), rows]),  # type: ignore[misc]
            )
            chosen += best.tolist()
            left = np.setdiff1d(left, best)
        taken = np.zeros((rounds, n))
        taken[np.arange(rounds), np.sort(chosen)] = 1.0
        inner = view.mixed(Mixture(taken, np.ones(rounds)), self.name)
        window = inner.window((rounds - 1) // 2, rounds // 2 + 1, nearest=rounds - 2 * f)
        return window._replace(kept=taken.sum(axis=0) > 0, order=np.array(chosen))

    def bound_met(self, n: int, f: int | None) -> bool | None:
        """Bulyan's theorem needs 4f + 3 <= n."""
        return None if f is None else 4 * f + 3 <= n

    def rows_read_again(self, n: int, f: int) -> int:
        """Return n-2f."""
        return n - 2 * f

    def plain(self, x: NDArray[Any], f: int) -> NDArray[Any]:
        """Take row after row, then average around the median."""
        squares, left, taken = sq_distances_between(x), list(range(len(x))), len(x) - 2 * f
        chosen: list[int] = []
        while len(chosen) < taken:
            others = max(len(left) - f - 2, 1)
            scores = np.sort(squares[np.ix_(left, left)], axis=1)[:, 1 : others + 1].sum(axis=1)
            best = np.argsort(scores, kind="stable")[: taken if self.selection == "once" else 1]
            chosen += [left[k] for k in best]
            left = [row for row in left if row not in chosen]
        rows = x[sorted(chosen)]
        ranked = np.sort(rows, axis=0)
        away = np.abs(ranked - np.median(rows.astype(np.float64), axis=0))
        nearest = np.argsort(away, axis=0, kind="stable")[: taken - 2 * f]
        return np.asarray(np.take_along_axis(ranked, nearest, axis=0).mean(axis=0))
