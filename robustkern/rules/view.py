"""What a rule sees: rows (perhaps mixtures of the input rows), their geometry in n-space, and nothing of d.

A rule solves its problem here and returns a `Solution`: weights of the rows, or a window of each column. The one
pass over the data that writes the result comes afterwards, in `emit`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from robustkern.contract.primitives import Kernels, Selected, Window
from robustkern.contract.rows import Matrix, Rows, Vector
from robustkern.errors import NonFiniteError
from robustkern.inputs.memory import Block, Source

__all__ = [
    "Distances",
    "Geometry",
    "Mask",
    "Selection",
    "Solution",
    "TooCloseError",
    "View",
    "as_cells",
    "emit",
    "smallest",
    "start",
    "unscaled",
]

Mask = NDArray[np.bool_]
T = TypeVar("T", np.float64, np.bool_)

FLOAT64 = np.dtype(np.float64)
EPSILON = 2.0**-53
#: Powers of two that bring float64 rows of any magnitude to where squares neither overflow nor vanish.
RESCALE = 2.0**540
#: Squared distances above it count as infinite: sums of 65535 times four of them are still finite numbers.
MAX_SQUARE = 1e302
_CELL_BITS = 50  # a weight is read as a multiple of 2^-50 of the largest, so that sums and ties are exact
#: Products of rows of 16 and 32 bits are first taken in float32, from so many values on; what that leaves open is
#: decided on float64 products. Error bound of an entry (`Kernels.gram`), in |x_i| |x_j|; and what a continuous function
#: of the entries is granted, by experience: errors of random rows are 0.05 roundings, those of rows that are constant
#: over the columns up to 8, but alike, so that they move a geometric median by less than a tenth of one.
SINGLE_VALUES = 1 << 18
SINGLE_ROUNDING = 40 * 2.0**-24
SINGLE_NOISE = 2.0**-24
REMEASURE_COLUMNS = 1 << 20  # columns of an anchor held at a time while contenders are measured again


class TooCloseError(Exception):
    """What a rule asks of the geometry is finer than float32 products: to be solved again on float64 ones."""


@dataclass(frozen=True)
class Geometry:
    """Inner products of the rows a rule sees, centred robustly, and what follows from them.

    Attributes
    ----------
    gram : (n, n) float64
        Zero in the rows and columns of rows that are not finite.
    finite : (n,) bool
        False for rows that hold a NaN or Inf, or (float64 only) are 1e150 spreads away.
    lengths : (n,) float64
        Of the rows, or for mixtures the mean of the lengths of what they mix.
    rounding : float
        Bound of the error of entry i, j in units of ``lengths[i] * lengths[j]``.
    single : bool
        Whether products were taken in float32.
    scale : float
        Power of two by which the rows were multiplied; 1 but for extreme float64 rows.
    origin : (n,) float64 and float, or None
        Inner products of the rows with the origin, and of the origin with itself.
    """

    gram: Matrix
    finite: Mask
    lengths: Vector
    rounding: float
    single: bool
    scale: float
    origin: tuple[Vector, float] | None

    @functools.cached_property
    def sq_distances(self) -> Matrix:
        """(n, n) squared distances between the rows, inf from and to rows that are not finite."""
        norms = self.gram.diagonal()
        result = np.maximum(norms[:, None] + norms - 2 * self.gram, 0.0)
        if np.count_nonzero(self.finite) < len(norms):
            result[~self.finite, :] = np.inf
            result[:, ~self.finite] = np.inf
        np.fill_diagonal(result, 0.0)
        return result

    def require_double(self) -> None:
        """Leave the rule where only float64 products can decide."""
        if self.single:
            raise TooCloseError

    def undecided(self, contenders: NDArray[np.intp]) -> None:
        """Stand for an exact measurement, which nothing can make in n-space."""
        self.require_double()

    def are_copies(self, rows: NDArray[np.intp]) -> bool:
        """Tell whether some rows are all the same: their products are then equal to the last bit."""
        inner = self.gram[np.ix_(rows, rows)]
        return bool((inner == inner[0, 0]).all())

    def pair_errors(self) -> Matrix:
        """Error bounds of `sq_distances`."""
        return np.asarray(self.rounding * (self.lengths[:, None] + self.lengths) ** 2)

    def errors_from(self, row: int) -> Vector:
        """Error bounds of what tells the distances from one row apart: the error of its own length is common to all."""
        errors = np.asarray(self.rounding * self.lengths * (self.lengths + 2 * self.lengths[row]))
        errors[row] = 0.0
        return errors

    def sq_distances_to(self, weights: Vector) -> Vector:
        """Squared distances of the rows to the combination of them with these weights (of sum 1)."""
        products = self.gram @ weights
        result = np.maximum(np.diagonal(self.gram) - 2 * products + weights @ products, 0.0)
        return np.where(self.finite, result, np.inf)

    def errors_to(self, weights: Vector) -> Vector:
        """Error bounds of `sq_distances_to`."""
        return np.asarray(self.rounding * (self.lengths + abs(weights) @ self.lengths) ** 2)


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
    again: Callable[[NDArray[np.intp]], Vector | None] | None
    scale: float


@dataclass
class _Input:
    """The input rows of one call and what has been learnt about them."""

    source: Source
    kernels: Kernels
    needs_origin: bool
    f: int | None
    weights: Vector | None
    geometry: Geometry | None = None
    nonfinite: Mask | None = None
    needs_double: bool = False
    measured_rows: int = 0

    def better_scale(self, squares: Vector) -> float:
        """Return the power of two at which the middle row (by weight) has an ordinary square."""
        middle = self._middle(squares)
        if middle > MAX_SQUARE:
            return 1 / RESCALE
        return RESCALE if middle < 1e-250 else 1.0

    def improves(self, scale: float, before: Vector, after: Vector) -> bool:
        """Tell whether squares taken at another scale are better than those before.

        Downwards they always are. Upwards only if the middle one had vanished, rather than being 0, and if no more rows
        are lost than may be Byzantine: a few tiny rows must not push the honest ones out of reach.
        """
        return scale < 1 or (
            self._middle(after) > 0 and tolerated(measurable(before) & ~measurable(after), self.f, self.weights)
        )

    def _middle(self, squares: Vector) -> float:
        order = np.argsort(np.where(np.isnan(squares), np.inf, squares), kind="stable")
        weights = np.ones(len(squares)) if self.weights is None else self.weights
        share = np.cumsum(weights[order])
        return float(squares[order[int(np.searchsorted(share, share[-1] / 2))]])


class View(NamedTuple):
    """The n rows that a rule sees: the input rows, or ``mix @`` them.

    Attributes
    ----------
    f : int or None
        How many of the rows may be Byzantine.
    weights : (n,) float64 or None
        Weights of the rows, where the caller gave any and they are not all equal.
    mix : (n, input rows) float64 or None
        None: the input rows themselves.
    """

    data: _Input
    n: int
    f: int | None
    weights: Vector | None = None
    mix: Matrix | None = None

    def remixed(self, weights: Matrix) -> View:
        """Return the view of the rows ``weights @ rows``."""
        mix = weights if self.mix is None else weights @ self.mix
        return self._replace(n=len(weights), mix=np.ascontiguousarray(mix))

    # -- geometry ------------------------------------------------------------------------------------------------

    def geometry(self, *, double: bool = False) -> Geometry:
        """Return the geometry, on request of float64 products; one read on the first call, shared by all views."""
        if double and self.data.geometry is not None:
            self.data.geometry.require_double()
        self.data.needs_double |= double
        if self.data.geometry is None:
            self.data.geometry = _measure(self.data)
            self.data.nonfinite = ~self.data.geometry.finite
        base = self.data.geometry
        if self.mix is None:
            return base
        used = self.mix != 0
        finite = ~(used & ~base.finite).any(axis=1)
        mix = np.where(finite[:, None], self.mix, 0.0)
        origin = None if base.origin is None else (mix @ base.origin[0], base.origin[1])
        return replace(
            base,
            gram=mix @ base.gram @ mix.T,
            finite=finite,
            lengths=abs(mix) @ base.lengths,
            rounding=base.rounding + 4 * self.data.source.n * EPSILON,
            origin=origin,
        )

    def require_finite(self, rule: str, finite: Mask) -> None:
        """Raise if more rows are not finite than the rule tolerates (f, or without f fewer than half)."""
        if np.count_nonzero(finite) < len(finite) and not tolerated(~finite, self.f, self.weights):
            raise self.nonfinite_error(rule, np.flatnonzero(~finite))

    def nonfinite_error(self, rule: str, bad: NDArray[np.intp]) -> NonFiniteError:
        """Build the error that names rows which are not finite."""
        rows = bad if self.data.nonfinite is None or not self.data.nonfinite.any() else self.data.nonfinite.nonzero()[0]
        names = ", ".join(self.data.source.row_name(int(i)) for i in rows[:20]) + (", ..." if len(rows) > 20 else "")
        limit = f"f={self.f}" if self.f is not None else f"fewer than half of n={self.n}"
        far = " or are 1e150 spreads away" if FLOAT64 in self.data.source.dtypes else ""
        return NonFiniteError(
            f"{rule}: {len(rows)} rows hold NaN or Inf (rows {names}){far}, more than the {limit} that may be "
            "Byzantine; drop them, or raise f",
            tuple(int(i) for i in rows),
        )

    def afford(self, rows: int) -> None:
        """Allow to read some rows for exact distances, unless float64 products are the cheaper way to decide."""
        self.data.measured_rows += rows
        if self.data.measured_rows > self.data.source.n:
            self.geometry().require_double()

    # -- distances -----------------------------------------------------------------------------------------------

    def distances_to(self, solution: Solution) -> Distances:
        """Measure this view's rows against a solution: in n-space, or in one read of the data."""
        if solution.weights is not None:
            geometry = self.geometry()
            values, errors = geometry.sq_distances_to(solution.weights), geometry.errors_to(solution.weights)
            return Distances(values, errors, geometry.undecided, geometry.scale)
        selection = solution.selection
        assert selection is not None
        scale = 1.0
        result = self._selection_distances(selection, scale)
        if FLOAT64 in self.data.source.dtypes:
            # Mixed rows have no weights, and as many as the input or fewer: the middle one is found alike.
            choice = self.data if self.mix is None else replace(self.data, weights=None)
            scale = choice.better_scale(result)
            if scale != 1.0:
                rescaled = self._selection_distances(selection, scale)
                if choice.improves(scale, result, rescaled):
                    result = rescaled
                else:
                    scale = 1.0
            result[~measurable(result)] = np.inf
        errors = result * _rounding(self.data.source.d)
        errors[np.isinf(errors)] = 0.0
        again = functools.partial(self._measure_again, selection, scale) if self.mix is None else None
        return Distances(result, errors, again, scale)

    def _selection_distances(self, selection: Selection, scale: float) -> Vector:
        total, flags = None, None
        for block in self.data.source.blocks():
            for rows in block.rows:
                found = selection.run(self.data.kernels, rows, None, measure=self.mix, distances=True, scale=scale)
                total, flags = _plus(total, found.sq_distances), _plus(flags, found.nonfinite)
        self.data.nonfinite = np.zeros(self.data.source.n, dtype=np.bool_) if flags is None else flags
        if total is None:  # no columns
            return np.zeros(self.n)
        return np.fmin(total, np.inf)  # NaN is as far as it gets

    def _measure_again(self, selection: Selection, scale: float, contenders: NDArray[np.intp]) -> Vector:
        """Exact squared distances of some input rows to a selection, a few columns of which are held at a time."""
        parts = []
        for block in self.data.source.blocks():
            for rows in block.rows:
                for piece in rows.blocks(REMEASURE_COLUMNS):
                    anchor = piece.scratch()
                    selection.run(self.data.kernels, piece, anchor)
                    parts.append(self.data.kernels.row_sq_distances(piece.take(contenders), anchor, scale=scale))
        return _exact_sums(parts, len(contenders))

    def exact_sq_distances(self, row: int, others: NDArray[np.intp]) -> Vector | None:
        """Exact squared distances from one input row to others; None for mixed rows, which are not there to measure."""
        if self.mix is not None:
            self.geometry().require_double()
            return None
        scale = self.geometry().scale
        parts = [
            self.data.kernels.row_sq_distances(rows.take(others), rows.take([row]), scale=scale)
            for block in self.data.source.blocks()
            for rows in block.rows
        ]
        return _exact_sums(parts, len(others))


class Selection(NamedTuple):
    """A window of each column of a view's rows, or the values nearest to it."""

    view: View
    window: Window
    multiplicities: NDArray[np.int64] | None = None
    nearest: int | None = None

    def run(
        self,
        kernels: Kernels,
        rows: Rows,
        out: Rows | None,
        *,
        measure: Matrix | None = None,
        distances: bool = False,
        scale: float = 1.0,
    ) -> Selected:
        """Call `select_columns` on some columns."""
        return kernels.select_columns(
            rows,
            self.window,
            nearest=self.nearest,
            multiplicities=self.multiplicities,
            mix=self.view.mix,
            measure=measure,
            distances=distances,
            scale=scale,
            out=out,
        )


class Solution(NamedTuple):
    """A rule's answer for the rows of a view.

    Exactly one of `weights` (of the view's rows) and `selection` is set; the rest is for `Info`.
    """

    weights: Vector | None = None
    selection: Selection | None = None
    kept: Mask | None = None
    sq_distances: Vector | None = None
    iterations: int | None = None
    converged: bool | None = None
    gave_up: bool = False  # it should have converged, and did not


def emit(view: View, solution: Solution, block: Block, distances: bool) -> tuple[Vector | None, Mask | None]:
    """Write the result of some columns: the last pass over the data.

    Returns
    -------
    sq_distances : (n,) float64 or None
        Of the input rows to the result, where `distances` asks for them and the pass selects.
    nonfinite : (n,) bool or None
        Rows in which a selecting pass met a NaN or Inf.
    """
    total: Vector | None = None
    flags: Mask | None = None
    for rows, out in zip(block.rows, block.out, strict=True):
        if solution.weights is not None:
            weights = solution.weights if view.mix is None else solution.weights @ view.mix
            view.data.kernels.weighted_row_sum(rows, np.ascontiguousarray(weights[None]), out)
        else:
            assert solution.selection is not None
            found = solution.selection.run(view.data.kernels, rows, out, distances=distances)
            flags = _plus(flags, found.nonfinite)
            total = _plus(total, found.sq_distances)
        if rows.dtype == FLOAT64 and rows.place is None:  # on a GPU its kernels do, so that nobody waits for them
            _clamp(rows, out)
    return total, flags


def _plus(total: NDArray[T] | None, more: NDArray[T] | None) -> NDArray[T] | None:
    """Add what some columns give to what others gave; flags are joined."""
    return more if total is None or more is None else total + more


def _clamp(rows: Rows, out: Rows) -> None:
    """Bring results back that rounding pushed beyond the largest float64: averages of finite rows are finite."""
    largest = np.finfo(np.float64).max
    for s in range(len(out.addresses)):
        result = out.array(s, 0)
        over = np.isinf(result)
        if over.any() and all(np.isfinite(rows.array(s, i)).all() for i in range(rows.n)):
            result[over] = np.copysign(largest, result[over])


def smallest(
    values: Vector,
    errors: Vector,
    count: int,
    again: Callable[[NDArray[np.intp]], Vector | None] | None,
) -> NDArray[np.intp]:
    """Find exactly `count` smallest values: their indices, ascending by value; equal ones by the lowest index.

    Values whose error bounds reach across the cut are contenders, which `again` measures exactly; what it cannot
    measure, or finds equal within rounding, counts as equal.
    """
    order = values.argsort(kind="stable")
    if count >= len(values):
        return order
    largest = errors.max()
    if values[order[count - 1]] + largest < values[order[count]] - largest:
        return order[:count]  # nearly always
    low, high = values - errors, values + errors
    # The count-th smallest true value is at most the count-th upper bound, the next one at least the next lower bound.
    inside = high < np.sort(low)[count]
    contenders = np.flatnonzero(~inside & (low <= np.sort(high)[count - 1]))
    certain = np.flatnonzero(inside)
    missing = count - len(certain)
    if len(contenders) == missing or not np.isfinite(values[order[count]]):
        return order[:count]
    exact = again(contenders) if again is not None else None
    if exact is None:
        chosen = contenders[:missing]
    else:
        # Correctly rounded sums: what still differs by a few roundings only is a tie.
        at_cut = np.sort(exact)[missing - 1]
        tolerance = 8 * EPSILON * at_cut
        below = contenders[exact < at_cut - tolerance]
        ties = contenders[np.abs(exact - at_cut) <= tolerance]
        chosen = np.concatenate([below, ties[: missing - len(below)]])
    return np.concatenate([certain, chosen[np.argsort(values[chosen], kind="stable")]])


def _rounding(d: int) -> float:
    """Bound of the relative error of float64 sums over d columns, as the kernels order them."""
    return EPSILON * (256 + d / 2**15)


def _exact_sums(parts: list[Vector], n: int) -> Vector:
    return np.array([math.fsum(part[i] for part in parts) if _all_finite(parts, i) else math.inf for i in range(n)])


def _all_finite(parts: list[Vector], i: int) -> bool:
    return all(math.isfinite(part[i]) for part in parts)


def measurable(squares: Vector) -> Mask:
    """Tell which squared distances are numbers that arithmetic on them cannot make overflow."""
    with np.errstate(invalid="ignore"):
        return np.asarray(squares <= MAX_SQUARE)


def tolerated(bad: Mask, f: int | None, weights: Vector | None) -> bool:
    """Tell whether these rows may all be Byzantine: at most f (of the weight: f/n), without f fewer than half."""
    if weights is None:
        return int(bad.sum()) <= (f if f is not None else (len(bad) - 1) // 2)
    spoilt, total = float(weights[bad].sum()), float(weights.sum())
    return spoilt <= total * f / len(bad) * (1 + 1e-12) if f is not None else spoilt < total / 2


def _measure(data: _Input) -> Geometry:
    n = data.source.n
    double = FLOAT64 in data.source.dtypes
    single = not double and not data.needs_double and n * data.source.d >= SINGLE_VALUES
    gram = _gram_pass(data, 1.0, single)
    scale = 1.0
    if double:
        norms = np.diagonal(gram)[:n]
        scale = data.better_scale(norms)
        if scale != 1.0:
            rescaled = _gram_pass(data, scale, False)
            if data.improves(scale, norms, np.diagonal(rescaled)[:n]):
                gram = rescaled
            else:
                scale = 1.0
    finite = measurable(gram.diagonal()[:n])
    inner = gram[:n, :n].copy()
    if np.count_nonzero(finite) < n:
        inner[~finite, :] = 0.0
        inner[:, ~finite] = 0.0
    origin = (np.where(finite, gram[n, :n], 0.0), float(gram[n, n])) if data.needs_origin else None
    rounding = _rounding(data.source.d) + (SINGLE_ROUNDING if single else 0.0)
    return Geometry(inner, finite, np.sqrt(inner.diagonal()), rounding, single, scale, origin)


def _gram_pass(data: _Input, scale: float, single: bool) -> Matrix:
    m = data.source.n + data.needs_origin
    total = np.zeros((m, m))
    cells = None if data.weights is None else as_cells(data.weights)
    for block in data.source.blocks():
        for rows in block.rows:
            total += data.kernels.gram(rows, multiplicities=cells, origin=data.needs_origin, scale=scale, single=single)
    return total


def unscaled(sq_distances: Vector, scale: float) -> Vector:
    """Return squared distances in the rows' own units, which may overflow or vanish."""
    if scale == 1:
        return sq_distances
    with np.errstate(over="ignore", under="ignore"):
        return np.asarray(sq_distances / scale / scale)


def as_cells(weights: Vector) -> NDArray[np.int64]:
    """Return whole numbers in the proportion of the weights: exact for integers and for equal weights."""
    _, exponent = math.frexp(float(weights.max()))
    bits = min(_CELL_BITS, 62 - len(weights).bit_length())  # the sum stays below 2^62
    return np.rint(np.ldexp(weights, bits - exponent)).astype(np.int64)


def start(source: Source, kernels: Kernels, f: int | None, weights: Vector | None, needs_origin: bool) -> View:
    """Return the view of the input rows themselves."""
    return View(_Input(source, kernels, needs_origin, f, weights), source.n, f, weights)
