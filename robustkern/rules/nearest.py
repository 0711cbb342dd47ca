"""Rules that trust a point: the rows nearest to the origin, to one of them, or to what the caller gives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from robustkern.contract.rows import Matrix, Vector
from robustkern.errors import NonFiniteError, brief
from robustkern.rules.base import Aggregator, Goals, register
from robustkern.rules.cuts import smallest, smallest_between
from robustkern.rules.geometry import EPSILON, middle_by_weight, unscaled
from robustkern.rules.krum import sq_distances_between
from robustkern.rules.view import Solution, View
from robustkern.scalars import as_int

__all__ = ["CGE", "Centre", "Medoid", "MoNNA"]

#: Rows so many times longer than the middle one drown what tells the sums of the others' distances apart.
FAR = 2.0**16


@register
@dataclass(frozen=True)
class Centre(Aggregator):
    """The caller's centre: nothing by itself, but ``ctma(centre)`` averages the n-f rows nearest to it."""

    name: ClassVar[str] = "centre"
    summary: ClassVar[str] = "the caller's `centre`, for `ctma(centre)`"
    advice: ClassVar[str] = "a point to measure from, inside `ctma(centre)`; nothing by itself"
    reads: ClassVar[str] = "0"
    needs: ClassVar[str] = "a good centre"
    points: ClassVar[tuple[str, ...]] = ("centre",)
    supports_weights: ClassVar[bool] = True

    def solve(self, view: View) -> Solution:
        """Give all weight to the centre."""
        return Solution(np.zeros(view.n), centre_weight=1.0)

    def rows_read_again(self, n: int, f: int) -> int:
        """Return 0."""
        return 0


@register
@dataclass(frozen=True)
class MoNNA(Aggregator):
    """Mean of the n-f rows nearest to a pivot that is trusted (Farhadkhani et al. 2023).

    Parameters
    ----------
    pivot : int or "centre"
        A row, which is among those that are averaged, or the centre that the caller gives.
    """

    pivot: int | Literal["centre"] = 0

    name: ClassVar[str] = "monna"
    aliases: ClassVar[tuple[str, ...]] = ("nna", "nearest_neighbour_averaging")
    summary: ClassVar[str] = 'mean of the n-f rows nearest to one that is trusted; `pivot=0`, or `"centre"`'
    advice: ClassVar[str] = "a row you know to be honest, such as your own; not where nobody is trusted"
    needs: ClassVar[str] = "2f < n, an honest pivot"
    goals: ClassVar[Goals] = {"monna": {16: 2.2, 32: 2.4, 64: 3.0, 128: 4.5}}

    def __post_init__(self) -> None:
        """Check the parameters."""
        row = as_int(self.pivot)
        if (row is None or row < 0) and not (isinstance(self.pivot, str) and self.pivot == "centre"):
            raise ValueError(
                f"monna: pivot must be a row, an integer of at least 0, or 'centre'; got {brief(self.pivot)}"
            )
        object.__setattr__(self, "pivot", "centre" if row is None else row)
        object.__setattr__(self, "points", ("centre",) if row is None else ())

    def solve(self, view: View) -> Solution:
        """Keep the rows that are near."""
        view.require_no_weights(self.name)
        kept = view.n - view.require_f(self.name)
        if isinstance(self.pivot, str):
            near, squares = view.nearest_to(Solution(np.zeros(view.n), centre_weight=1.0), kept, self.name)
            return view.mean_of(near)._replace(sq_distances=squares)
        if self.pivot >= view.n:
            raise ValueError(f"monna: pivot={self.pivot} is no row of n={view.n} (pass one below n)")
        distances = view.distances_to(view.mean_of([self.pivot]))
        if not math.isfinite(distances.values[self.pivot]):
            raise NonFiniteError(
                f"monna: row {self.pivot}, which is the pivot, holds NaN or Inf (choose a row to trust)", (self.pivot,)
            )
        view.require_finite(self.name, np.isfinite(distances.values))
        near = smallest(distances.values, distances.errors, kept, distances.again)
        return view.mean_of(near)._replace(sq_distances=unscaled(distances.values, distances.scale))

    def rows_read_again(self, n: int, f: int) -> int:
        """Return n-f."""
        return n - f

    def plain(self, x: NDArray[Any], f: int) -> NDArray[Any]:
        """Sort the rows by their distance to the pivot."""
        if isinstance(self.pivot, str):
            raise NotImplementedError(
                f"{self} needs a centre, which plain forms are not given (a row as pivot has one)"
            )
        away = ((x - x[self.pivot]) ** 2).sum(axis=1)
        return np.asarray(x[np.argsort(away, kind="stable")[: len(x) - f]].mean(axis=0))


@register
@dataclass(frozen=True)
class CGE(Aggregator):
    """Comparative gradient elimination: mean of the n-f shortest rows (Gupta and Vaidya 2020)."""

    name: ClassVar[str] = "cge"
    aliases: ClassVar[tuple[str, ...]] = ("norm_filter", "comparative_gradient_elimination")
    summary: ClassVar[str] = "mean of the n-f rows of smallest norm"
    advice: ClassVar[str] = "gradients near convergence against large attacks; not against short ones (sign flips, IPM)"
    needs: ClassVar[str] = "no bound"
    points: ClassVar[tuple[str, ...]] = ("origin",)
    goals: ClassVar[Goals] = {"cge": {16: 2.2, 32: 2.4, 64: 3.0, 128: 4.5}}

    def solve(self, view: View) -> Solution:
        """Keep the rows nearest to the origin."""
        view.require_no_weights(self.name)
        near, squares = view.nearest_to(Solution(np.zeros(view.n)), view.n - view.require_f(self.name), self.name)
        return view.mean_of(near)._replace(sq_distances=squares)

    def bound_met(self, n: int, f: int | None) -> bool | None:
        """Hold no bound against short attackers."""
        return None if f is None else f == 0

    def rows_read_again(self, n: int, f: int) -> int:
        """Return n-f."""
        return n - f

    def plain(self, x: NDArray[Any], f: int) -> NDArray[Any]:
        """Sort the rows by their norm."""
        return np.asarray(x[np.argsort((x**2).sum(axis=1), kind="stable")[: len(x) - f]].mean(axis=0))


@register
@dataclass(frozen=True)
class Medoid(Aggregator):
    """The row with the least (weighted) sum of distances to the others; f is not needed."""

    name: ClassVar[str] = "medoid"
    summary: ClassVar[str] = "the row with the least sum of distances to the others"
    advice: ClassVar[str] = "an actual row, without f; not for accuracy: it averages nobody"
    supports_weights: ClassVar[bool] = True
    goals: ClassVar[Goals] = {"medoid": {16: 2.2, 32: 2.4, 64: 3.0, 128: 4.5}}

    def solve(self, view: View) -> Solution:
        """Keep the best row."""
        geometry, weights = view.measured(self.name, quick=True)
        finite = np.flatnonzero(geometry.finite)

        def scores(squares: Matrix) -> Vector:
            result = np.full(view.n, np.inf)
            terms = np.sqrt(squares[np.ix_(finite, finite)]) * weights[finite]
            result[finite] = np.sort(terms, axis=1).sum(axis=1, dtype=np.longdouble)  # equal terms have equal sums
            return result

        def pairs(row: int) -> NDArray[np.intp]:
            return np.column_stack([np.full_like(finite, row), finite])

        found = unscaled(scores(geometry.sq_distances), math.sqrt(geometry.scale))
        lengths = np.sqrt(np.maximum(geometry.gram.diagonal()[finite], 0.0))
        near = lengths <= FAR * middle_by_weight(lengths, weights[finite])
        if not near.all():
            best = _least_beside_far(view, finite, weights[finite], near)
        else:
            best = view.least(scores, pairs=pairs)
        return view.mean_of(best)._replace(scores=found)

    def rows_read_again(self, n: int, f: int) -> int:
        """Return 1."""
        return 1

    def plain(self, x: NDArray[Any], f: int) -> NDArray[Any]:
        """Add up each row's distances."""
        return np.asarray(x[np.sqrt(sq_distances_between(x)).sum(axis=1).argmin()])


def _least_beside_far(view: View, rows: NDArray[np.intp], weights: Vector, near: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Return the row with the least sum of distances to `rows`, which are finite: the sums less that of one of them.

    A distance to a far row has its digits; how much less it is than another's follows from the inner products of the
    far row with what lies between the two: (square - square) / (distance + distance). What is left open is measured
    where that takes reading no more rows than there are.
    """
    geometry = view.geometry(quick=True)
    geometry.require_double()
    gram, lengths, each = geometry.gram[np.ix_(rows, rows)], geometry.lengths[rows], np.arange(len(rows))
    squares, wrong = geometry.sq_distances[np.ix_(rows, rows)], geometry.pair_errors(rows)[:, rows]
    away = np.sqrt(squares)
    base = int(np.argmin(np.where(near, away[:, near] @ weights[near], np.inf)))

    def less(away: Matrix, unsure: Matrix) -> tuple[Vector, Vector]:
        """Return the sums less the base's, by distances and the errors of their squares, and bounds of their errors."""
        both = away + away[base]
        both[both == 0] = 1.0
        roots = _root_errors(away, unsure)
        norms, reach = gram.diagonal(), (lengths + lengths[base])[:, None]
        by_products = ((norms - norms[base])[:, None] - 2 * (gram - gram[base])) / both
        off = (geometry.rounding * reach * (reach + 2 * lengths) + abs(by_products) * (roots + roots[base])) / both
        direct, direct_off = away - away[base], EPSILON * both + roots + roots[base]
        better = direct_off < off
        terms, errors = np.where(better, direct, by_products), np.where(better, direct_off, off)
        # How far a row is from the base itself stands in the columns of both, with opposite signs.
        terms[:, base], terms[each, each] = away[base], -away[base]
        errors[:, base] = errors[each, each] = 0.0
        own = (roots[base] + EPSILON * away[base]) * abs(weights - weights[base])
        return terms @ weights, (errors + 4 * EPSILON * abs(terms)) @ weights + own

    values, errors = less(away, wrong)

    def again(contenders: NDArray[np.intp]) -> Vector | None:
        first, second = np.meshgrid(np.append(contenders, base), np.flatnonzero(near), indexing="ij")
        pairs = np.column_stack([rows[first.ravel()], rows[second.ravel()]])
        exact = view.exact_between(pairs, always=False)
        if exact is None:
            return None
        known = np.zeros_like(wrong, dtype=np.bool_)
        known[first, second] = True
        among = exact[np.ix_(rows, rows)]
        found, off = less(np.sqrt(np.where(known, among, squares)), np.where(known, 4 * EPSILON * among, wrong))
        least = float((found + off)[contenders].min())
        return np.where((found - off)[contenders] <= least, 0.0, 1.0)  # what this cannot tell apart is a tie

    return rows[smallest_between(values, values - errors, values + errors, 1, again)]


def _root_errors(roots: Matrix, errors: Matrix) -> Matrix:
    """Return bounds of the errors of square roots of numbers that are not negative."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(errors > 0, np.minimum(errors / roots, np.sqrt(errors)), 0.0)
