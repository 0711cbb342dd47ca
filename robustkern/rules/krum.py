"""Krum and Multi-Krum: rows whose neighbours are near."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from robustkern.contract.rows import Matrix, Vector
from robustkern.rules.base import Aggregator, Goals, register
from robustkern.rules.geometry import unscaled
from robustkern.rules.view import Solution, View

__all__ = ["Krum", "MultiKrum", "sq_distances_between"]

_TWO_READS = {16: 2.2, 32: 2.4, 64: 3.0, 128: 4.5}


def sq_distances_between(x: NDArray[Any]) -> NDArray[Any]:
    """Return squared distances between all rows in plain NumPy, one row against all the others at a time."""
    return np.stack([((x - row) ** 2).sum(axis=1) for row in x])


def _best(view: View, name: str, neighbours: int | None, f: int, count: int) -> Solution:
    """Return the mean of the `count` rows of smallest Krum score."""
    view.require_no_weights(name)
    others = view.n - f - 2 if neighbours is None else neighbours
    if not 1 <= others <= view.n - 1:
        raise ValueError(
            f"{name}: neighbours must be between 1 and n-1 (by default n-f-2, so n-f >= 3); "
            f"got {others} with n={view.n} rows, f={f} (lower f, or pass neighbours=)"
        )
    geometry, _ = view.measured(name, quick=True)
    finite = np.flatnonzero(geometry.finite)
    # A row's distance to itself, 0, counts too. Rows that are not finite are infinitely far from all alike.
    counted = min(others + 1, len(finite))

    def scores(squares: Matrix) -> Vector:
        result = np.full(view.n, np.inf)
        nearest = np.sort(squares[finite], axis=1)[:, :counted]  # in one order, so that equal terms have equal sums
        result[finite] = nearest.sum(axis=1, dtype=np.longdouble)
        return result

    def pairs(row: int) -> NDArray[np.intp]:
        return np.column_stack([np.full_like(finite, row), finite])

    squares = geometry.sq_distances
    first = scores(squares)
    chosen = view.least(lambda others: first if others is squares else scores(others), count, pairs=pairs)
    return view.mean_of(chosen)._replace(scores=unscaled(first, geometry.scale))


def _check_neighbours(name: str, neighbours: int | None) -> None:
    if neighbours is not None and (isinstance(neighbours, bool) or not isinstance(neighbours, int) or neighbours < 1):
        raise ValueError(f"{name}: neighbours must be None or an integer of at least 1; got {neighbours!r}")


def _plain(x: NDArray[Any], neighbours: int, m: int) -> NDArray[Any]:
    scores = np.sort(sq_distances_between(x), axis=1)[:, 1 : neighbours + 1].sum(axis=1)
    return np.asarray(x[np.argsort(scores, kind="stable")[:m]].mean(axis=0))


@register
@dataclass(frozen=True)
class Krum(Aggregator):
    """The row with the least sum of squared distances to its nearest others (Blanchard et al. 2017).

    Parameters
    ----------
    neighbours : int or None
        How many others count; None: n-f-2 as in the paper (ByzFL takes n-f-1).
    """

    neighbours: int | None = None

    name: ClassVar[str] = "krum"
    summary: ClassVar[str] = "the row with the nearest neighbours; `neighbours`"
    needs: ClassVar[str] = "2f + 2 < n"
    goals: ClassVar[Goals] = {"krum": _TWO_READS}

    def __post_init__(self) -> None:
        """Check the parameters."""
        _check_neighbours(self.name, self.neighbours)

    def solve(self, view: View) -> Solution:
        """Keep the best row."""
        return _best(view, self.name, self.neighbours, view.require_f(self.name), 1)

    def rows_read_again(self, n: int, f: int) -> int:
        """Return 1."""
        return 1

    def bound_met(self, n: int, f: int | None) -> bool | None:
        """Krum's theorem needs 2f + 2 < n."""
        return None if f is None else 2 * f + 2 < n

    def kappa(self, n: int, f: int) -> float | None:
        """Return the constant of Allouah et al. 2023, of the paper's number of neighbours."""
        return 6 * (1 + f / (n - 2 * f)) if 2 * f < n and self.neighbours is None else None

    def plain(self, x: NDArray[Any], f: int) -> NDArray[Any]:
        """Sort each row's distances."""
        return _plain(x, len(x) - f - 2 if self.neighbours is None else self.neighbours, 1)


@register
@dataclass(frozen=True)
class MultiKrum(Aggregator):
    """Mean of the m rows of best Krum score.

    Parameters
    ----------
    m : int or None
        How many; None: n-f (as ByzFL; others use n-f-2).
    neighbours : int or None
        As for Krum.
    """

    m: int | None = None
    neighbours: int | None = None

    name: ClassVar[str] = "multi_krum"
    aliases: ClassVar[tuple[str, ...]] = ("multikrum",)
    summary: ClassVar[str] = "mean of the m rows with the nearest neighbours; `m`, `neighbours`"
    needs: ClassVar[str] = "2f + 2 < n"
    goals: ClassVar[Goals] = {"multi_krum": _TWO_READS}

    def __post_init__(self) -> None:
        """Check the parameters."""
        _check_neighbours(self.name, self.neighbours)
        if self.m is not None and (isinstance(self.m, bool) or not isinstance(self.m, int) or self.m < 1):
            raise ValueError(f"multi_krum: m must be None or an integer of at least 1; got {self.m!r}")

    def solve(self, view: View) -> Solution:
        """Average the best m rows."""
        f = view.require_f(self.name)
        m = view.n - f if self.m is None else self.m
        if m > view.n - f:
            raise ValueError(f"multi_krum: m must be at most n-f; got m={m} with n={view.n} rows, f={f} (lower m or f)")
        return _best(view, self.name, self.neighbours, f, m)

    def rows_read_again(self, n: int, f: int) -> int:
        """Return m."""
        return n - f if self.m is None else self.m

    def bound_met(self, n: int, f: int | None) -> bool | None:
        """As for Krum."""
        return None if f is None else 2 * f + 2 < n

    def plain(self, x: NDArray[Any], f: int) -> NDArray[Any]:
        """Sort each row's distances."""
        m = len(x) - f if self.m is None else self.m
        return _plain(x, len(x) - f - 2 if self.neighbours is None else self.neighbours, m)
