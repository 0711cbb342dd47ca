"""Rules that trust a point: the rows nearest to the origin, to one of them, or to what the caller gives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from robustkern.contract.rows import Matrix, Vector
from robustkern.errors import NonFiniteError
from robustkern.rules.base import Aggregator, Goals, register
from robustkern.rules.cuts import smallest
from robustkern.rules.geometry import unscaled
from robustkern.rules.krum import sq_distances_between
from robustkern.rules.view import Solution, View

__all__ = ["CGE", "Centre", "Medoid", "MoNNA"]


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
        row = isinstance(self.pivot, int) and not isinstance(self.pivot, bool) and self.pivot >= 0
        if not row and not (isinstance(self.pivot, str) and self.pivot == "centre"):
            raise ValueError(f"monna: pivot must be a row, an integer of at least 0, or 'centre'; got {self.pivot!r}")
        object.__setattr__(self, "points", () if row else ("centre",))

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
        return view.mean_of(view.least(scores, pairs=pairs))._replace(scores=found)

    def rows_read_again(self, n: int, f: int) -> int:
        """Return 1."""
        return 1

    def plain(self, x: NDArray[Any], f: int) -> NDArray[Any]:
        """Add up each row's distances."""
        return np.asarray(x[np.sqrt(sq_distances_between(x)).sum(axis=1).argmin()])
