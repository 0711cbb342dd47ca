"""What a rule sees: rows (perhaps mixtures of the input rows), their geometry in n-space, and nothing of d.

A rule asks its `View` for distances and cuts, and returns a `Solution` that the view makes: a combination of the rows,
or a window of each column. The pass over the data that writes the result comes afterwards, in `robustkern.engine`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robustkern.contract.primitives import Window
from robustkern.contract.rows import Matrix, Vector
from robustkern.rules.cuts import TIE, Again, Distances, contending, smallest, smallest_between, weighted_share
from robustkern.rules.geometry import (
    EPSILON,
    FLOAT64,
    LEAST_DIVISOR,
    MAX_SHIFT,
    SINGLE_ROUNDING,
    UNIT_ROUNDING,
    Geometry,
    Given,
    Mask,
    Mixture,
    Point,
    Reference,
    Selection,
    are_divisors,
    as_cells,
    cells_of_share,
    share_of_origin,
    tolerated,
    unscaled,
)
from robustkern.rules.least_distances import moved_to_median

__all__ = ["Mixture", "Solution", "View"]


class HasPoints(Protocol):
    """A rule, of which only this matters here."""

    @property
    def points(self) -> tuple[str, ...]:
        """See `robustkern.rules.base.Rule`."""


class Solution(NamedTuple):
    """A rule's answer for the rows of a view: their weights, or what `View.window` makes.

    Attributes
    ----------
    weights : (n,) float64 or None
        Of the view's rows in the result, to be divided by `divisor`.
    divisor : float
        Positive: sums of rows are divided once.
    centre_weight : float
        Share of the caller's centre in the result. Where all shares do not sum to 1, the rest lies on the origin.
    selection : Selection or None
        A window of each column instead.
    kept : (n,) bool or None
        Rows that were kept, where the rule drops some.
    order : (n or fewer,) int or None
        Rows in the order in which they were selected, best first.
    scores : (n,) float64 or None
        What the rows were judged by; least is best.
    sq_distances : (n,) float64 or None
        Squared distances of the rows to what the rule measured them from; None: to the result, where geometry tells.
    iterations, converged, gap : int, bool, float, or None
        Of rules that iterate: steps, whether they sufficed, and a bound of what is left, see `Info`.
    gave_up : bool
        It should have converged, and did not: the caller is warned.
    pulled_by : (n,) float64 or None
        Of the geometric median, the weights in the sum of distances that it minimises, 0 for rows that are not finite.
    mixture : (m, n) float64 or None
        Shares of the input rows in the rows that were mixed on the way.
    """

    weights: Vector | None = None
    divisor: float = 1.0
    centre_weight: float = 0.0
    selection: Selection | None = None
    kept: Mask | None = None
    order: NDArray[np.intp] | None = None
    scores: Vector | None = None
    sq_distances: Vector | None = None
    iterations: int | None = None
    converged: bool | None = None
    gap: float | None = None
    gave_up: bool = False
    pulled_by: Vector | None = None
    mixture: Matrix | None = None


@dataclass(slots=True, eq=False)
class View:
    """The n rows that a rule sees: the input rows, or mixtures of them.

    Attributes
    ----------
    n : int
        Number of rows.
    f : int or None
        How many of the rows may be Byzantine.
    weights : (n,) float64 or None
        Weights of the rows, where the caller gave any and they are not all equal.
    share : float or None
        Which share of the weight may be Byzantine, where there are weights, and f or delta.
    mix : Mixture or None
        What the rows are of the input rows; None: these themselves.
    """

    _given: Given = field(repr=False)
    n: int
    f: int | None
    weights: Vector | None = None
    share: float | None = None
    mix: Mixture | None = None
    _known: tuple[Geometry, Geometry] | None = field(default=None, repr=False)  # of the input rows, and of these

    # -- what the rule was given -----------------------------------------------------------------------------------

    def require_f(self, rule: str) -> int:
        """Return f, or raise if it is missing or too large for the rows the rule sees."""
        if self.f is None:
            raise ValueError(f"{rule}: f is required, the number of rows that may be Byzantine (pass f= or delta=)")
        if 2 * self.f >= self.n:
            raise ValueError(f"{rule}: 2*f must be below n; got f={self.f} with n={self.n} rows (lower f, or add rows)")
        return self.f

    def require_no_weights(self, rule: str) -> None:
        """Raise where the caller gave weights to a rule that has no weighted form."""
        if self.weights is not None:
            raise ValueError(f"{rule}: weights are not supported (drop weights=, or this rule)")

    def weights_or_ones(self) -> Vector:
        """Return the rows' weights, all 1 where the caller gave none."""
        return np.ones(self.n) if self.weights is None else self.weights

    def random(self, seed: int | None = None) -> np.random.Generator:
        """Return a generator: of the rule's own seed, or of the call's, or fresh; `Info.seed` repeats the call's."""
        return self._given.draw() if seed is None else np.random.default_rng(seed)

    # -- geometry --------------------------------------------------------------------------------------------------

    def expect_double(self) -> None:
        """Have float64 products taken from the beginning: float32 ones are known to leave something open."""
        self._given.expect_double()

    def geometry(self, *, quick: bool = False) -> Geometry:
        """Return inner products and distances of the rows; one read of the data for all that a call asks for.

        Parameters
        ----------
        quick : bool
            Products of large rows of 16 and 32 bits may be float32, good to about six digits: for rules that only cut
            through the view, or that ask for others where these leave something open.
        """
        base = self._given.measure(quick)
        if self.mix is None:
            return base
        if self._known is None or self._known[0] is not base:  # n^3 operations, which cuts ask for again and again
            self._known = base, self._geometry_of(base, self.mix)
        return self._known[1]

    def _geometry_of(self, base: Geometry, mixture: Mixture) -> Geometry:
        mix = mixture.matrix
        finite = ~((mix != 0) & ~base.finite).any(axis=1)
        if not base.finite.all():  # what clipping leaves of rows that are too long to be measured: nothing
            finite &= (mix != 0).any(axis=1)
        mix = np.where(finite[:, None], mix, 0.0)
        mixed = replace(
            base,
            gram=mix @ base.gram @ mix.T,
            finite=finite,
            lengths=abs(mix) @ base.lengths,
            rounding=base.rounding + 4 * self._given.n * EPSILON,
            origin=_mixed(mix, base.origin),
            centre=_mixed(mix, base.centre),
            sharper=None,
        )
        rest = np.where(finite, 1.0 - mix.sum(axis=1), 0.0)
        rest[abs(rest) <= UNIT_ROUNDING] = 0.0
        return _with_rest(mixed, rest) if rest.any() else mixed

    def holding_nonfinite(self) -> Mask:
        """Return which rows hold a NaN or Inf, of those that the geometry has no distances for; mostly no read."""
        found = ~self.geometry().finite
        source = self._given.source
        if not found.any() or not source.d or FLOAT64 not in source.dtypes:  # of products alone nobody has columns
            return found
        broken = self._given.holding_nonfinite()
        return broken if self.mix is None else ((self.mix.weights != 0) & broken).any(axis=1)

    def few_columns(self, rule: str) -> tuple[Matrix, Mask, float] | None:
        """Return the rows where they are many of few columns, which then cost less than their inner products.

        One read of the data.

        Returns
        -------
        x : (n, d) float64
            The rows less their column-wise middle; 0 where they are not finite.
        finite : (n,) bool
            Rows that hold no NaN or Inf.
        rounding : float
            As `Geometry.rounding`.

        Raises
        ------
        NonFiniteError
            If more rows are not finite than may be Byzantine.
        """
        found = None if self.mix is not None else self._given.few_columns()
        if found is not None:
            self.require_finite(rule, found[1])
        return found

    def measured(self, rule: str, *, quick: bool = False) -> tuple[Geometry, Vector]:
        """Return the geometry, and the rows' weights, which are 0 for rows that are not finite.

        Raises
        ------
        NonFiniteError
            If more rows are not finite than may be Byzantine.
        """
        geometry = self.geometry(quick=quick)
        self.require_finite(rule, geometry.finite)
        return geometry, np.where(geometry.finite, 1.0 if self.weights is None else self.weights, 0.0)

    def require_finite(self, rule: str, finite: Mask) -> None:
        """Raise if more rows, or more of the weight, are not finite than may be Byzantine (without f: below half)."""
        if np.count_nonzero(finite) < len(finite) and not tolerated(~finite, self.f, self.weights, self.share):
            raise self._given.nonfinite_error(rule, np.flatnonzero(~finite))

    # -- cuts ------------------------------------------------------------------------------------------------------

    def nearest_to_row(self, row: int, count: int) -> NDArray[np.intp]:
        """Return the `count` rows nearest to one of them, itself included, nearest first; ties by the lowest index."""
        nearest: NDArray[np.intp] = self.nearest_to_rows(np.array([row]), count)[0]
        return nearest

    def nearest_to_rows(self, rows: NDArray[np.intp], count: int) -> NDArray[np.intp]:
        """Return (len(rows), count) rows, for each of some rows what `nearest_to_row` returns."""
        geometry = self.geometry(quick=True)
        squares, errors = geometry.sq_distances[rows], geometry.errors_from(rows)
        order = squares.argsort(axis=1, kind="stable")
        if count < self.n:
            inside, outside = np.take_along_axis(squares, order[:, count - 1 : count + 1], axis=1).T
            for k in np.flatnonzero(~(inside + errors.max(axis=1) < outside - errors.max(axis=1))):
                again = functools.partial(self._measure_from, int(rows[k]))
                order[k, :count] = smallest(squares[k], errors[k], count, again)
        return order[:, :count]

    def nearest_to(self, solution: Solution, count: int, rule: str) -> tuple[NDArray[np.intp], Vector]:
        """Return the `count` rows nearest to a solution, nearest first, and all rows' squared distances to it.

        Ties go to the lowest index. Raises `NonFiniteError` if more rows are not finite than may be Byzantine.
        """
        distances = self.distances_to(solution)
        self.require_finite(rule, np.isfinite(distances.values))
        rows = smallest(distances.values, distances.errors, count, distances.again)
        return rows, unscaled(distances.values, distances.scale)

    def weights_nearest_to(self, solution: Solution, rule: str) -> tuple[Vector, Vector]:
        """Return weights of the rows nearest to a solution, the last one split: what is not Byzantine of the weight.

        Otherwise as `nearest_to`.
        """
        share = 1 - (self.require_f(rule) / self.n if self.share is None else self.share)
        distances = self.distances_to(solution)
        self.require_finite(rule, np.isfinite(distances.values))
        return weighted_share(self.weights_or_ones(), share, distances), unscaled(distances.values, distances.scale)

    def least(
        self,
        scores: Callable[[Matrix], ArrayLike],
        count: int = 1,
        *,
        pairs: Callable[[int], NDArray[np.intp]] | None = None,
    ) -> NDArray[np.intp]:
        """Return the `count` candidates of least score, least first; equal scores by the lowest index.

        Candidates are whatever the scores are of: rows, subsets of rows. Rounding does not decide: where it could, the
        distances that the contenders' scores rest on are measured exactly. That takes reading no more rows than there
        are; where more would be needed, what float64 products leave open counts as equal.

        Parameters
        ----------
        scores : callable
            Takes (n, n) squared distances (inf from and to rows that are not finite) and returns (m,) scores, one for
            each candidate, of which none may fall where a distance rises.
        count : int
            How many, ``1 <= count <= m``.
        pairs : callable, optional
            Takes a candidate's index, returns the (k, 2) pairs of rows that its score depends on; by default all.
        """
        geometry = self.geometry(quick=True)
        squares = geometry.sq_distances
        values = _as_scores(scores(squares))
        if not 1 <= count <= len(values):
            raise ValueError(f"least: count must be between 1 and the {len(values)} candidates; got {count}")
        if count == len(values):
            return values.argsort(kind="stable")
        errors = geometry.pair_errors()
        np.fill_diagonal(errors, 0.0)
        low, high = (_as_scores(scores(np.maximum(squares + e, 0.0))) for e in (-errors, errors))
        if geometry.single and self._measured_further(contending(values, low, high, count)[1], pairs):
            return self.least(scores, count, pairs=pairs)

        def again(contenders: NDArray[np.intp]) -> Vector | None:
            finite = geometry.finite
            same = np.arange(self.n) if geometry.single else geometry.copies
            # Pairs by their numbers: thousands of rows have millions, and each contender its own.
            wanted = []
            for k in contenders if pairs is not None else [0]:
                first, second = np.triu_indices(self.n, 1) if pairs is None else pairs(k).T
                both = finite[first] & finite[second]
                first, second = same[first[both]], same[second[both]]
                wanted.append(np.minimum(first, second) * self.n + np.maximum(first, second))
            if not geometry.single and pairs is not None:
                least = np.sort(wanted[0])
                if all(len(least) == len(other) and np.array_equal(least, np.sort(other)) for other in wanted[1:]):
                    return None  # they differ in copies of the same rows only
            if _are_rows(contenders, pairs):
                apart = self._apart(contenders)
                if apart is not None and _equal_scores(scores, squares, contenders, apart):
                    return None
            exact = self._measured_exactly(np.stack(np.divmod(np.concatenate(wanted), self.n), axis=1))
            # Copies are as far as their originals.
            return None if exact is None else _as_scores(scores(exact[np.ix_(same, same)]))[contenders]

        return smallest_between(values, low, high, count, again)

    def _measured_further(self, contenders: NDArray[np.intp], pairs: Callable[[int], NDArray[np.intp]] | None) -> bool:
        """Measure contenders that are rows, and no near copies, in float64, which rarely leaves anything open."""
        if self.mix is not None or not len(contenders) or not _are_rows(contenders, pairs):
            return False
        geometry, first = self.geometry(quick=True), contenders[:1]
        if (geometry.sq_distances[first, contenders] <= geometry.pair_errors(first)[0, contenders]).all():
            return False
        return self._given.sharpen(contenders)

    def exact_between(self, pairs: NDArray[np.intp], always: bool = True) -> Matrix | None:
        """Return (n, n) squared distances, of some (k, 2) pairs of finite rows to the last bit but for rounding.

        None for mixed rows, which are not there to measure, and, unless `always`, where that would read more rows than
        there are: what float64 products leave open counts as equal then.
        """
        geometry = self.geometry(quick=True)
        same = np.arange(self.n) if geometry.single else geometry.copies
        exact = self._measured_exactly(np.sort(same[pairs], axis=1), always)
        return None if exact is None else exact[np.ix_(same, same)]

    def _measured_exactly(self, pairs: NDArray[np.intp], always: bool = False) -> Matrix | None:
        """Measure pairs, of which the first row is the lower one; None where that is not to be had, or not cheap."""
        known = self._known_exactly(pairs, always)
        if known is None:
            return None
        exact = self.geometry(quick=True).sq_distances.copy()
        first, second = pairs[pairs[:, 0] != pairs[:, 1]].T
        exact[first, second] = exact[second, first] = known[first, second]
        return exact

    def _known_exactly(self, pairs: NDArray[np.intp], always: bool = False) -> Matrix | None:
        """Measure what is not known of pairs yet, and return all that is, see `Given.known_pairs`."""
        if self._is_mixed():
            return None
        known = self._given.known_pairs()
        needed = np.zeros(known.shape, dtype=np.bool_)  # thousands of rows have millions of pairs: they are not sorted
        needed[tuple(pairs.T)] = True
        np.fill_diagonal(needed, False)
        needed &= np.isnan(known)
        rows = np.flatnonzero(needed.any(axis=1))
        if not self._given.afford(int(np.count_nonzero(needed)) + len(rows)) and not always:
            return None
        for row in rows:
            others = np.flatnonzero(needed[row])
            known[row, others] = self._given.exact_from(int(row), self._given.scale, others)
        return known

    def distances_to(self, solution: Solution) -> Distances:
        """Measure this view's rows against a solution: in n-space, or in one read of the data."""
        selection = solution.selection
        again: Again | None
        if selection is None:
            point = _point_of(solution)
            known = self.mix is not None or self._given.geometry is not None or self._given.points_measured
            if point is not None and not known:
                # One read, where the Gram costs n^2 operations a column; but not again and again.
                measured = self._given.measure_point(point)
                if measured is not None:
                    values, scale = measured
                    again = functools.partial(self._given.exact_from, point, scale)
                    return Distances(values, _relative(values, self._given.rounding), again, scale)
            geometry = self._given.geometry if self.mix is None else None
            geometry = geometry or self.geometry(quick=True)
            shares, centre = _shares(solution), solution.centre_weight
            values = geometry.sq_distances_to(shares, centre)
            again = geometry.undecided
            if self.mix is None and point == "origin":
                again = functools.partial(self._given.exact_from, point, self._given.scale)
            elif self.mix is None and geometry.single and centre == 0.0 and share_of_origin(shares, centre) == 0.0:
                again = functools.partial(self._told_apart, solution, values)
            return Distances(values, geometry.errors_to(shares, centre), again, geometry.scale)
        values, scale = self._given.measure_selection(selection, self.mix)
        errors = _relative(values, self._given.rounding)
        again = functools.partial(self._given.exact_sq_distances_to, selection, scale) if self.mix is None else None
        return Distances(values, errors, again, scale)

    def _told_apart(self, solution: Solution, values: Vector, contenders: NDArray[np.intp]) -> Vector:
        """Squared distances of some rows to a combination of all, good to float64; equal where these leave it open."""
        geometry, shares = self.geometry(quick=True), _shares(solution)
        squares = None if (shares < 0).any() else self._given.measure_average(shares)
        if squares is None:
            return self._told_apart_by_lines(solution, values, contenders)
        assert solution.weights is not None
        doubt, left = np.zeros(self.n), 0.0
        shift = MAX_SHIFT * math.sqrt(float(np.median(squares[shares > 0])))
        if solution.pulled_by is not None:
            wrong = 4 * SINGLE_ROUNDING
            squares, moved, left = moved_to_median(geometry.gram, solution.pulled_by, shares, squares, wrong)
            doubt = wrong * moved * np.sqrt(squares)
            if not moved <= shift:  # it is none
                geometry.require_double()
        elif (solution.weights != np.rint(solution.weights)).any():  # they may follow from float32 products
            left = shift
        order = contenders[squares[contenders].argsort()]
        apart = np.sqrt(geometry.sq_distances[order[1:], order[:-1]])
        certain = (self._given.rounding + self.n * EPSILON) * (squares[order[1:]] + squares[order[:-1]])
        steps = np.diff(squares[order])
        equal = steps <= certain
        if (~equal & (steps <= certain + 2 * left * apart + doubt[order[1:]] + doubt[order[:-1]])).any():
            geometry.require_double()
        # One of rows that are equally far stands for them.
        first = order[np.maximum.accumulate(np.where(np.append(False, equal), 0, np.arange(len(order))))]
        squares[order] = squares[first]
        return np.asarray(values[order[0]] + (squares[contenders] - squares[order[0]]))

    def _told_apart_by_lines(self, solution: Solution, values: Vector, contenders: NDArray[np.intp]) -> Vector:
        """Squared distances of some rows to a combination of all, by float64 distances between the former and all.

        What these add to each, the combination's own square, is common to all. Where rounding, or that the combination
        may be off by `shift` middle distances, could still decide, all products have to be float64.
        """
        geometry, shares = self.geometry(quick=True), _shares(solution)
        used, shift = np.flatnonzero(shares), 0.0 if _point_of(solution) is not None else MAX_SHIFT
        among = np.ix_(contenders, contenders)
        blur = 2 * shift * math.sqrt(float(np.median(values[used])))

        def clear(squares: Vector, errors: Vector) -> bool:
            order = squares.argsort()
            apart = np.sqrt(geometry.sq_distances[among][order[1:], order[:-1]])
            return bool((np.diff(squares[order]) > errors[order[1:]] + errors[order[:-1]] + blur * apart).all())

        # What float32 products tell is better than its bound: where it is no use to measure, that shows.
        same = geometry.sq_distances[among] <= geometry.pair_errors(contenders)[:, contenders]
        hopeless = np.count_nonzero(same) > len(contenders) or not clear(values[contenders], np.zeros(len(contenders)))
        if hopeless or not self._given.sharpen(contenders):
            geometry.require_double()
        geometry = self.geometry(quick=True)
        sums = geometry.sq_distances[np.ix_(contenders, used)] @ shares[used]
        if not clear(sums, geometry.pair_errors(contenders)[:, used] @ abs(shares[used])):
            geometry.require_double()
        return np.asarray(values[contenders[0]] + (sums - sums[0]))

    def _measure_from(self, row: int, contenders: NDArray[np.intp]) -> Vector | None:
        """Exact squared distances from a row to some others; None where these count as equal."""
        geometry = self.geometry(quick=True)
        if not geometry.single and len(np.unique(geometry.copies[contenders])) == 1:
            return None  # equal, whatever the last digits say
        apart = self._apart(contenders)
        if apart is not None:
            nearest = math.sqrt(geometry.sq_distances[row, contenders].min())
            if 4 * apart.max() * (nearest + apart.max()) <= TIE * nearest**2:
                return None
        if self._is_mixed() or not self._given.afford(len(contenders) + 1):
            return None
        return self._given.exact_from(row, self._given.scale, contenders)

    def _apart(self, contenders: NDArray[np.intp]) -> Vector | None:
        """Exact distances of some rows to the first of them, where products cannot tell any from it; else None.

        Attackers may send rows that differ in their last digits only. What differs between such rows is no more than
        what lies between them, so one read of them tells what as many pairs as there are would.
        """
        if self.mix is not None:
            return None
        geometry, first = self.geometry(quick=True), contenders[:1]
        if (geometry.sq_distances[first, contenders] > geometry.pair_errors(first)[0, contenders]).any():
            return None
        known = self._known_exactly(np.column_stack([np.full_like(contenders, first[0]), contenders]))
        return None if known is None else np.sqrt(np.append(0.0, known[first, contenders[1:]]))

    def _is_mixed(self) -> bool:
        """Tell whether the rows are not there to measure; then only float64 products decide what is left open."""
        if self.mix is None:
            return False
        self.geometry(quick=True).require_double()
        return True

    # -- solutions -------------------------------------------------------------------------------------------------

    def window(self, lo: int, hi: int, *, nearest: int | None = None) -> Solution:
        """Return the mean of each column's sorted values of the ranks [lo, hi), or of the values nearest to it."""
        return Solution(selection=Selection(Window(lo, hi), None, nearest, self.mix))

    def weighted_window(self, window: Callable[[int, int], tuple[int, int]]) -> Solution:
        """Return a window of cells, where a row stands for cells as its weight says.

        `window` is told how many there are, and how many may be Byzantine (0 without f or delta).
        """
        cells = as_cells(self.weights_or_ones())
        total = int(cells.sum())
        bad = 0 if self.share is None else cells_of_share(cells, self.share)
        return Solution(selection=Selection(Window(*window(total, bad)), cells, None, self.mix))

    def mean_of(self, rows: Sequence[int] | NDArray[np.intp]) -> Solution:
        """Return the mean of some rows, given in the order in which they were chosen."""
        weights = np.zeros(self.n)
        weights[np.asarray(rows, dtype=np.intp)] = 1.0
        order = np.asarray(rows, dtype=np.intp)
        return Solution(weights, float(len(order)), kept=weights > 0, order=order)

    def check(self, solution: object, rule: HasPoints) -> None:
        """Raise where a rule returned what nobody can go on with."""
        if isinstance(solution, Solution):
            weights = solution.weights
            if weights is None and solution.selection is not None:
                return
            if (
                isinstance(weights, np.ndarray)
                and solution.selection is None
                and weights.shape == (self.n,)
                and weights.dtype == FLOAT64
                and math.isfinite(abs(weights).sum())
                and LEAST_DIVISOR <= solution.divisor <= 1 / LEAST_DIVISOR
                and math.isfinite(solution.centre_weight)
            ):
                total = float(weights.sum()) / solution.divisor + solution.centre_weight
                if abs(1 - total) <= UNIT_ROUNDING or "origin" in rule.points:
                    return
                raise ValueError(
                    f"{rule}: the weights sum to {total:.6g} instead of 1, so that the rest lies on the origin (name "
                    "it in the rule's points: 'origin')"
                )
        raise TypeError(
            f"{rule}: solve(view) must return a Solution with finite float64 weights ({self.n},) and a divisor between "
            f"2**-900 and 2**900, or one that view.mean_of or view.window makes; got {solution!r:.120}"
        )

    # -- mixing ----------------------------------------------------------------------------------------------------

    def mixed(self, mixture: Mixture, rule: str) -> View:
        """Return the view of mixtures of the rows."""
        if not isinstance(mixture, Mixture) or not _is_mixture(mixture, self.n, self._given.needs_origin):
            raise TypeError(
                f"{rule}: mixing(view) must return a Mixture: finite weights (m, {self.n}) whose rows sum to their "
                f"divisors (m,), all between 2**-900 and 2**900 (to others only with 'origin' in points); got "
                f"{_described(mixture)}"
            )
        return View(self._given, len(mixture.weights), self.f, mix=mixture.as_arrays().of(self.mix))

    def sq_distances_in(self, solution: Solution) -> Vector | None:
        """Return what `Info` shows: the rows' squared distances as the rule says, or to its result by the geometry."""
        geometry = self._given.geometry
        if solution.sq_distances is not None or solution.weights is None or geometry is None:
            return solution.sq_distances
        geometry = self.geometry(quick=True)
        return unscaled(geometry.sq_distances_to(_shares(solution), solution.centre_weight), geometry.scale)

    def carried_back(self, solution: Solution, mixture: Mixture) -> Solution:
        """Return a solution for this view's rows as one for the rows that they are mixtures of."""
        assert self.mix is not None
        solution = solution._replace(mixture=self.mix.matrix, scores=None, order=None, pulled_by=None)
        if solution.weights is None:
            return solution
        kept = None if solution.kept is None else (mixture.weights[solution.kept] != 0).any(axis=0)
        carried = Mixture(solution.weights[None], np.array([solution.divisor])).of(mixture)
        weights, divisor = carried.weights[0], float(carried.divisors[0])
        whole = (weights == np.rint(weights)).all() and weights.any()
        if whole and abs(weights).max() < 2**53:  # the smallest whole numbers lose least
            common = float(np.gcd.reduce(weights.astype(np.int64)))
            weights, divisor = weights / common, divisor / common
        elif solution.centre_weight == 0 and abs(math.fsum(weights) / divisor - 1) <= UNIT_ROUNDING:
            divisor = math.fsum(weights)  # they add up to 1 but for rounding, which rows far from the origin would feel
        distances = self.sq_distances_in(solution) if self.n == mixture.weights.shape[1] else None
        return solution._replace(weights=weights, divisor=divisor, kept=kept, sq_distances=distances)


def _mixed(mix: Matrix, point: Reference | None) -> Reference | None:
    return None if point is None else point._replace(products=mix @ point.products)


def _with_rest(mixed: Geometry, rest: Vector) -> Geometry:
    """Put what is missing of each mixture on the origin."""
    origin, centre = mixed.origin, mixed.centre
    assert origin is not None  # or the mixtures would not have been taken
    across = np.multiply.outer(origin.products, rest)
    gram = mixed.gram + across + across.T + origin.square * np.multiply.outer(rest, rest)
    np.fill_diagonal(gram, np.maximum(gram.diagonal(), 0.0))  # what cancels may be below
    return replace(
        mixed,
        gram=gram,
        lengths=mixed.lengths + abs(rest) * math.sqrt(max(origin.square, 0.0)),
        origin=origin._replace(products=origin.products + rest * origin.square),
        centre=None if centre is None else centre._replace(products=centre.products + rest * centre.origin),
    )


def _point_of(solution: Solution) -> Point | None:
    """Return which row, centre or origin a solution is, None where it is something in between."""
    assert solution.weights is not None
    rows = np.flatnonzero(solution.weights)
    if not len(rows):
        return "origin" if solution.centre_weight == 0 else "centre" if solution.centre_weight == 1 else None
    one = len(rows) == 1 and solution.weights[rows[0]] == solution.divisor and solution.centre_weight == 0
    return int(rows[0]) if one else None


def _relative(values: Vector, rounding: float) -> Vector:
    """Return error bounds of sums of squares."""
    errors = values * rounding
    errors[np.isinf(errors)] = 0.0
    return errors


def _equal_scores(
    scores: Callable[[Matrix], ArrayLike], squares: Matrix, rows: NDArray[np.intp], apart: Vector
) -> bool:
    """Tell whether rows that lie so far apart from the first of them have equal scores, but for a few roundings."""
    same, reach = np.arange(len(squares)), np.zeros(len(squares))
    same[rows], reach[rows] = rows[0], apart
    away, further = np.sqrt(squares[np.ix_(same, same)]), reach[:, None] + reach
    low, high = (_as_scores(scores(np.maximum(away + sign * further, 0.0) ** 2))[rows] for sign in (-1, 1))
    return bool(high.max() - low.min() <= TIE * low.min())


def _are_rows(candidates: NDArray[np.intp], pairs: Callable[[int], NDArray[np.intp]] | None) -> bool:
    """Tell whether candidates are rows, each with the pairs of its own."""
    return pairs is not None and all((pairs(int(k))[:, 0] == k).all() for k in candidates)


def _shares(solution: Solution) -> Vector:
    assert solution.weights is not None
    return np.asarray(solution.weights / solution.divisor)


def _as_scores(scores: ArrayLike) -> Vector:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or not len(values) or np.isnan(values).any():
        raise ValueError(f"least: scores must be a vector of numbers without NaN; got {_described(values)}")
    return values


def _is_mixture(mixture: Mixture, n: int, has_origin: bool) -> bool:
    try:
        weights, divisors = map(np.asarray, mixture)
        if weights.dtype.kind not in "iuf" or divisors.dtype.kind not in "iuf":
            return False
    except ValueError:  # lists of unequal lengths
        return False
    return (
        weights.ndim == 2
        and weights.shape[1] == n
        and divisors.shape == weights.shape[:1]
        and len(weights) > 0
        and bool(np.isfinite(weights).all())
        and are_divisors(divisors)
        and (has_origin or bool((abs(weights.sum(axis=1) - divisors) <= UNIT_ROUNDING * divisors).all()))
    )


def _described(x: object) -> str:
    """Say what came instead of what was expected."""
    if isinstance(x, Mixture) and isinstance(x.weights, np.ndarray):
        return f"weights of shape {np.shape(x.weights)} that sum to {np.sum(x.weights, axis=-1)!s:.60}"
    return f"an array of shape {x.shape}" if isinstance(x, np.ndarray) else repr(x)[:60]
