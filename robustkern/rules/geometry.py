"""The input rows of one call, the passes over their data that rules may ask for, and what follows in n-space.

`Given` makes the passes and keeps what they found; `Geometry` holds inner products, with bounds of their errors.
"""

from __future__ import annotations

import functools
import math
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from robustkern.contract.counters import lower_median
from robustkern.contract.primitives import AveragingKernels, Kernels, Selected, Window
from robustkern.contract.rows import Matrix, Rows, Source, Vector
from robustkern.errors import NonFiniteError, plain
from robustkern.lazy import lazy

__all__ = [
    "Geometry",
    "Given",
    "Mask",
    "Mixture",
    "Point",
    "Reference",
    "Selection",
    "TooCloseError",
    "as_cells",
    "measurable",
    "share_of_origin",
    "sum_of",
    "unscaled",
]

Mask = NDArray[np.bool_]
#: A point that is there: a row, the caller's centre, or the origin.
Point = int | Literal["centre", "origin"]

#: From so many rows on, and with so many of them for each column, rows are known by their columns, not their products:
#: then the geometric median of 3000 x 20 takes 0.02 s instead of 0.4.
MANY_ROWS, ROWS_PER_COLUMN = 512, 8
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
MAX_SINGLE = 2.0**127  # of a sum of squares in float32
#: Runs of columns by which rows are judged before, and how wide; from so many columns, and values, on: a hundredth of
#: the time. And which share of the rows may be near others.
SAMPLE, LEAST_SAMPLED, SAMPLED_VALUES = (16, 32), 1 << 14, 1 << 22
MOST_NEAR = 0.125
FAR = 2.0**-70  # brings rows whose squares overflow float32 to where not even sums of the largest numbers' do;
SINGLE_LEAST = 2.0**-76  # and with it no row's mean square counts as less: what underflows is little of that
SINGLE_NOISE = 2.0**-24
#: How far float32 products may have moved a combination of the rows, in their middle distance to it.
MAX_SHIFT = 1e-6
#: Rows from which all are measured in float64 where float32 products leave a cut open, of all rows: with a quarter of
#: 32 rows that takes 1.6 reads, all float64 products 2.6; of 128 rows 3 and 11.
MOST_LINES = 0.25
VAGUE = 1e-6  # bounds of errors that are more of a squared distance tell little
UNIT_ROUNDING = 1e-9  # shares that sum to 1 but for it sum to 1
REMEASURE_COLUMNS = 1 << 20  # columns of an anchor held at a time while contenders are measured again
DROP_HINT = " (nonfinite='drop' goes on without them)"
NO_CENTRE = "centre holds NaN or Inf, or is 1e150 spreads away; expected a vector of finite numbers"


class CentreError(ValueError):
    """The caller's centre is no vector of finite numbers."""


class TooCloseError(Exception):
    """What a rule asks of the geometry is finer than float32 products: to be solved again on float64 ones."""


#: Of sums that are averages, so that nothing on the way vanishes or overflows; its reciprocal is the largest.
LEAST_DIVISOR = 2.0**-900


def are_divisors(divisors: Vector) -> bool:
    """Tell whether sums may be divided by these."""
    return bool(((divisors >= LEAST_DIVISOR) & (divisors <= 1 / LEAST_DIVISOR)).all())


class Mixture(NamedTuple):
    """Averages of rows: ``weights @ rows / divisors[:, None]``; what is missing of a sum of 1 lies on the origin.

    Attributes
    ----------
    weights : (m, n) float64
        Whole numbers wherever possible, so that sums are divided once.
    divisors : (m,) float64
        Positive.
    """

    weights: Matrix
    divisors: Vector

    @property
    def matrix(self) -> Matrix:
        """The shares."""
        return np.asarray(self.weights / self.divisors[:, None])

    def as_arrays(self) -> Mixture:
        """Return it as kernels take it, whatever sequences of numbers there are."""
        return Mixture(*(np.ascontiguousarray(part, dtype=np.float64) for part in self))

    def of(self, inner: Mixture | None) -> Mixture:
        """Return this mixture of rows that are themselves mixtures."""
        if inner is None:
            return self
        divisors = self.divisors * inner.divisors[0]
        if (inner.divisors == inner.divisors[0]).all() and are_divisors(divisors):
            return Mixture(np.ascontiguousarray(self.weights @ inner.weights), divisors)
        return Mixture(np.ascontiguousarray(self.weights @ inner.matrix), self.divisors)


class Selection(NamedTuple):
    """A window of each column of the rows or of mixtures of them, or the values nearest to it."""

    window: Window
    multiplicities: NDArray[np.int64] | None = None
    nearest: int | None = None
    mix: Mixture | None = None


class Reference(NamedTuple):
    """A point that is no row, such as the origin: its inner products with the rows, with itself, with the origin."""

    products: Vector
    square: float
    origin: float = 0.0


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
    origin, centre : Reference or None
        The origin and the caller's centre, for rules that use them.
    sharper : pair of (n, n) float64, or None
        Squared distances, and bounds of their errors, where more is known of them than `gram` tells.
    """

    gram: Matrix
    finite: Mask
    lengths: Vector
    rounding: float
    single: bool
    scale: float
    origin: Reference | None = None
    centre: Reference | None = None
    sharper: tuple[Matrix, Matrix] | None = None

    @lazy
    def sq_distances(self) -> Matrix:
        """(n, n) squared distances between the rows, inf from and to rows that are not finite."""
        if self.sharper is not None:
            return self.sharper[0]
        norms = self.gram.diagonal()
        result = np.maximum(norms[:, None] + norms - 2 * self.gram, 0.0)
        if np.count_nonzero(self.finite) < len(norms):
            result[~self.finite, :] = np.inf
            result[:, ~self.finite] = np.inf
        np.fill_diagonal(result, 0.0)
        return result

    def sq_distances_from(self, reference: Reference) -> Vector:
        """(n,) squared distances of the rows from the origin or the centre, inf where they cannot be measured."""
        with np.errstate(invalid="ignore", over="ignore"):
            result = np.maximum(self.gram.diagonal() - 2 * reference.products + reference.square, 0.0)
        return np.where(self.finite & np.isfinite(result), result, np.inf)

    def sq_distances_to(self, weights: Vector, centre_weight: float = 0.0) -> Vector:
        """(n,) squared distances of the rows to a combination of them, and of the centre.

        Where the weights do not sum to 1, the rest lies on the origin.
        """
        products = np.asarray(self.gram @ weights)
        square = 0.0
        rest = share_of_origin(weights, centre_weight)
        for reference, share in ((self.centre, centre_weight), (self.origin, rest)):
            if reference is not None and share != 0.0:
                square += share * float(weights @ reference.products)
                products = products + share * reference.products
        square += float(weights @ products)
        if self.centre is not None and centre_weight != 0.0:
            square += centre_weight * (centre_weight * self.centre.square + 2 * rest * self.centre.origin)
        if self.origin is not None and rest != 0.0:
            square += rest**2 * self.origin.square
        result = np.maximum(np.diagonal(self.gram) - 2 * products + square, 0.0)
        return np.where(self.finite, result, np.inf)

    # -- bounds of errors, and what to do where they are too wide: for `cuts` and `view` --------------------------

    def require_double(self) -> None:
        """Leave the rule where only float64 products can decide."""
        if self.single:
            raise TooCloseError

    def undecided(self, contenders: NDArray[np.intp]) -> None:
        """Stand for an exact measurement, which nothing can make in n-space."""
        self.require_double()

    @lazy
    def copies(self) -> NDArray[np.intp]:
        """(n,) for each row the first one whose products are the same to the last bit: mostly itself."""
        norms = self.gram.diagonal()
        # Products of rows that are not finite stand as 0, like those of a row at the centre.
        same = (self.gram == norms) & (self.gram == norms[:, None]) & self.finite
        np.fill_diagonal(same, True)
        return np.where(self.finite, same.argmax(axis=1), np.arange(len(norms)))

    def pair_errors(self, rows: slice | NDArray[np.intp] = slice(None)) -> Matrix:
        """Error bounds of `sq_distances[rows]`."""
        errors = np.asarray(self.rounding * (self.lengths[rows][:, None] + self.lengths) ** 2)
        return errors if self.sharper is None else np.minimum(errors, self.sharper[1][rows])

    def errors_from(self, rows: NDArray[np.intp]) -> Matrix:
        """Error bounds of what tells the distances from one row apart: the error of its own length is common to all."""
        errors = np.asarray(self.rounding * self.lengths * (self.lengths + 2 * self.lengths[rows, None]))
        errors += 4 * EPSILON * self.lengths[rows, None] ** 2  # but not what is rounded where it is added
        if self.sharper is not None:
            errors = np.minimum(errors, self.sharper[1][rows])
        errors[np.arange(len(rows)), rows] = 0.0
        return errors

    def errors_to(self, weights: Vector, centre_weight: float = 0.0) -> Vector:
        """Error bounds of what tells `sq_distances_to` apart: that of the combination's own square is common to all."""
        length = abs(weights) @ self.lengths
        rest = share_of_origin(weights, centre_weight)
        for reference, share in ((self.centre, centre_weight), (self.origin, rest)):
            if reference is not None and share != 0.0:
                length += abs(share) * math.sqrt(max(reference.square, 0.0))
        return np.asarray(self.rounding * self.lengths * (self.lengths + 2 * length) + 4 * EPSILON * length**2)


@dataclass(slots=True, eq=False)
class Given:
    """The input rows of one call, and what has been learnt about them.

    Parameters
    ----------
    source : Source
        The rows.
    kernels : Kernels
        The backend.
    n, f : int, int or None
        How many rows there are, and how many may be Byzantine.
    weights : (n,) float64 or None
        Of the rows.
    share : float or None
        Of the weight, which may be Byzantine.
    needs_origin : bool
        Whether the origin joins the Gram.
    seed : int or None
        Of whatever is drawn; None: fresh randomness.
    geometry, nonfinite : Geometry, (n,) bool, or None
        What has been found out; rows that hold a NaN or Inf.
    points_measured : int
        How often all rows were measured from a point.
    """

    source: Source
    kernels: Kernels
    n: int
    f: int | None
    weights: Vector | None
    share: float | None = None
    needs_origin: bool = False
    seed: int | None = None
    geometry: Geometry | None = None
    nonfinite: Mask | None = None
    points_measured: int = 0
    _needs_double: bool = False
    _measured_rows: int = 0
    _is_sharp: bool = False
    _has_lines: bool = False
    _known_pairs: Matrix | None = None
    _draws: int = 0

    def start_again(self) -> None:
        """Have the rule solved again, on products that tell more; what is drawn repeats itself."""
        if self.geometry is not None and self.geometry.single:
            self.geometry, self._needs_double = None, True
        self._draws = 0

    def expect_double(self) -> None:
        """Take float64 products in the first pass already, where none was made."""
        if self.geometry is None:
            self._needs_double = True

    def require_lengths(self) -> None:
        """Have the rule solved again where float32 products of most rows vanish: `Info` is to have digits of them."""
        geometry = self.geometry
        if geometry is not None and geometry.single and geometry.finite.any():
            squares = geometry.gram.diagonal()[geometry.finite]
            if np.median(squares) < SINGLE_LEAST * self.source.d:
                geometry.require_double()

    @property
    def rounding(self) -> float:
        """Bound of the relative error of sums over the columns."""
        always, each = self.kernels.roundings
        return EPSILON * (always + each * self.source.d)

    # -- randomness ------------------------------------------------------------------------------------------------

    def draw(self) -> np.random.Generator:
        """Return the generator of the next step that draws something."""
        if self.seed is None:
            self.seed = secrets.randbits(63)
        self._draws += 1
        return np.random.default_rng([self.seed, self._draws])

    @property
    def drawn_seed(self) -> int | None:
        """The seed, where anything was drawn from it."""
        return self.seed if self._draws else None

    # -- passes over the data --------------------------------------------------------------------------------------

    def measure(self, quick: bool) -> Geometry:
        """Return the geometry of the input rows; one read on the first call.

        Where `quick` products of large rows of 16 and 32 bits are float32; who asks for others leaves the rule then.
        """
        if self.geometry is not None:
            if not quick:
                self.geometry.require_double()
            return self.geometry
        n, source = self.n, self.source
        double = FLOAT64 in source.dtypes
        large = n * source.d >= SINGLE_VALUES
        gram, single = self._gram(1.0, quick and large and not double and not self._needs_double)
        scale = 1.0
        if double:
            norms = np.diagonal(gram)[:n]
            wanted = _better_scale(norms, self.weights)
            out_of_reach = wanted >= 1.0 and bool((norms > MAX_SQUARE).any())  # and not only NaN
            if out_of_reach and not tolerated(~measurable(norms), self.f, self.weights, self.share):
                wanted = 1 / RESCALE
            if wanted != 1.0:
                rescaled, _ = self._gram(wanted, False)
                if self._improves(wanted, norms, np.diagonal(rescaled)[:n], self.weights):
                    gram, scale = rescaled, wanted
        finite = measurable(gram.diagonal()[:n])
        inner = gram[:n, :n].copy()
        if np.count_nonzero(finite) < n:
            inner[~finite, :] = 0.0
            inner[:, ~finite] = 0.0
        origin = _reference(gram, len(gram) - 1, finite) if self.needs_origin else None
        centre = _reference(gram, n, finite) if source.has_centre else None
        if centre is not None and self.needs_origin:
            centre = centre._replace(origin=float(gram[n, -1]))
        if centre is not None and not measurable(np.array([centre.square])).all():
            raise CentreError(NO_CENTRE)
        rounding = self.rounding + (SINGLE_ROUNDING if single else 0.0)
        lengths = np.sqrt(np.maximum(inner.diagonal(), SINGLE_LEAST * source.d if single else 0.0))
        self.geometry = Geometry(inner, finite, lengths, rounding, single, scale, origin, centre)
        self.nonfinite = ~finite
        return self.geometry

    def few_columns(self) -> tuple[Matrix, Mask, float] | None:
        """Return the rows themselves, see `robustkern.rules.view.View.few_columns`."""
        n, source = self.n, self.source
        few = source.d * ROWS_PER_COLUMN <= n
        if not few or self.geometry is not None or source.device != "cpu" or source.divided or source.has_centre:
            return None
        parts = [
            rows.matrix(s).astype(np.float64)
            for block in source.blocks()
            for rows in block.rows
            for s in range(len(rows.addresses))
        ]
        x = np.concatenate([np.zeros((n, 0)), *parts], axis=1)
        finite = np.asarray(np.isfinite(x).all(axis=1))
        used = finite if self.weights is None else finite & (self.weights > 0)
        if not used.any():
            self.nonfinite = ~finite
            return x, finite, self.rounding
        x[finite] -= lower_median(x[used], None, None if self.weights is None else self.weights[used])
        x[~finite] = 0.0
        lengths = abs(x[used]).max(axis=1, initial=0.0)
        lengths = lengths[lengths > 0]
        if len(lengths) and not 1e-100 < np.median(lengths) <= lengths.max() < min(1e100, 1e140 * np.median(lengths)):
            return None  # squares need a scale, see `measure`
        self.nonfinite = ~finite
        return x, finite, self.rounding

    def _passed(self, name: str, arguments: tuple[Any, ...], add: bool) -> list[NDArray[np.float64]]:
        """Make a pass over the data: what was found by each who holds columns, see `Source.passed`."""
        if self.source.divided:
            return self.source.passed(self, name, arguments, add)
        return [getattr(self, name)(*arguments)]

    def _gram(self, scale: float, single: bool) -> tuple[Matrix, bool]:
        """Inner products, and whether float32 ones may be among them, as they may where `single`."""
        found = sum_of(self._passed("gram_pass", (scale, single), True))
        return found[:-1], bool(found[-1, 0])

    def gram_pass(self, scale: float, single: bool) -> Matrix:
        """Inner products, and in one more row whether float32 ones may be among them."""
        m = self.n + self.source.has_centre + self.needs_origin
        total = np.zeros((m + 1, m), dtype=np.longdouble)  # files may have thousands of blocks
        special: Matrix | None = None  # NaN and infinities: 80-bit arithmetic takes a hundred times as long with them
        cells = None if self.weights is None else as_cells(self.weights)
        if self.source.has_centre:  # which does not count for the median that the rows are centred on
            cells = np.append(np.ones(self.n, dtype=np.int64) if cells is None else cells, 0)
        for block in self.source.blocks():
            for rows in block.rows:
                found, quick = self._products(rows, cells, scale, single)
                numbers = np.isfinite(found)
                if not numbers.all():
                    special = np.where(numbers, 0.0, found) + (0.0 if special is None else special)
                    found = np.where(numbers, found, 0.0)
                total[:-1] += found
                total[-1] += quick
        result = _in_float64(total)
        if special is not None:
            result[:-1] += special
        return result

    def _products(self, rows: Rows, cells: NDArray[np.int64] | None, scale: float, single: bool) -> tuple[Matrix, bool]:
        """Inner products of some columns, and whether float32 ones may be among them."""
        take = functools.partial(self.kernels.gram, rows, multiplicities=cells, origin=self.needs_origin)
        if not single or not self.kernels.takes_float32_products(rows) or self._is_hostile(rows):
            return take(scale=scale), False
        found = take(scale=scale, single=True)
        far = np.isinf(found.diagonal())  # squares overflow float32
        if not far.any():
            return found, True
        if _many_are_near(found, rows.d):  # float64 products will be asked for
            return take(scale=scale), False
        again = found if _lost(found) else take(scale=scale * FAR, single=True) / FAR**2
        if np.isinf(again.diagonal()).any():  # differences overflow, too
            return take(scale=scale), False
        return np.where(far | far[:, None], again, found), True

    def _is_hostile(self, rows: Rows) -> bool:
        """Tell by some of many columns whether float32 products would be in vain; only what a call costs depends on it.

        Where squares of some row overflow float32, or float32 does not tell many rows from others near them. Who hides
        that from the sample costs a pass more.
        """
        if rows.d < LEAST_SAMPLED or rows.n * rows.d < SAMPLED_VALUES:
            return False
        sample = rows.sampled(*SAMPLE)
        gram = self.kernels.gram(sample.take(np.arange(self.n)))
        too_far = bool((gram.diagonal() * (rows.d / sample.d) > MAX_SINGLE).any())
        return too_far or _many_are_near(gram, sample.d)

    def measure_selection(self, selection: Selection, measured: Mixture | None) -> tuple[Vector, float]:
        """Squared distances of the rows, or of mixtures of them, to a selection, and the scale they are in."""
        scale = 1.0
        result = self._selection_distances(selection, measured, scale)
        if FLOAT64 in self.source.dtypes:
            # Mixed rows have no weights, and as many as the input or fewer: the middle one is found alike.
            weights = self.weights if measured is None else None
            wanted = _better_scale(result, weights)
            if wanted != 1.0:
                rescaled = self._selection_distances(selection, measured, wanted)
                if self._improves(wanted, result, rescaled, weights):
                    result, scale = rescaled, wanted
            result[~measurable(result)] = np.inf
        return result, scale

    def _selection_distances(self, selection: Selection, measured: Mixture | None, scale: float) -> Vector:
        found = sum_of(self._passed("selection_pass", (selection, measured, scale), True))
        self.nonfinite = found[: self.n] > 0
        return np.fmin(found[self.n :], np.inf)  # NaN is as far as it gets

    def selection_pass(self, selection: Selection, measured: Mixture | None, scale: float) -> Vector:
        """Which rows hold NaN or Inf, and the squared distances of all, or of mixtures of them, to a selection."""
        total = np.zeros(self.n if measured is None else len(measured.weights), dtype=np.longdouble)
        flags = np.zeros(self.n, dtype=np.bool_)
        for block in self.source.blocks():
            for rows in block.rows:
                found = self.select(selection, rows, None, distances=True, measured=measured, scale=scale)
                assert found.sq_distances is not None
                total += found.sq_distances
                flags |= found.nonfinite
        return _in_float64(np.append(flags, total))

    def select(
        self,
        selection: Selection,
        rows: Rows,
        out: Rows | None,
        *,
        distances: bool = False,
        measured: Mixture | None = None,
        scale: float = 1.0,
    ) -> Selected:
        """Call `select_columns` on some columns."""
        mix = selection.mix
        return self.kernels.select_columns(
            self.without_centre(rows),
            selection.window,
            nearest=selection.nearest,
            multiplicities=selection.multiplicities,
            mix=None if mix is None else mix.weights,
            mix_divisors=None if mix is None else mix.divisors,
            measure=None if measured is None else measured.weights,
            measure_divisors=None if measured is None else measured.divisors,
            distances=distances,
            scale=scale,
            out=out,
        )

    def without_centre(self, rows: Rows) -> Rows:
        """Return the rows of the workers only."""
        return rows.take(np.arange(self.n)) if self.source.has_centre else rows

    def exact_sq_distances_to(self, selection: Selection, scale: float, contenders: NDArray[np.intp]) -> Vector:
        """Exact squared distances of some input rows to a selection."""
        return _exact_sums(self._passed("exact_selection_pass", (selection, scale, contenders), False))

    def exact_selection_pass(self, selection: Selection, scale: float, contenders: NDArray[np.intp]) -> Matrix:
        """Distances to a selection, of which a few columns are held at a time: a row for each of these."""
        parts = []
        for block in self.source.blocks():
            for rows in block.rows:
                for piece in rows.blocks(REMEASURE_COLUMNS):
                    anchor = piece.scratch()
                    self.select(selection, piece, anchor)
                    parts.append(self.kernels.row_sq_distances(piece.take(contenders), anchor, scale=scale)[0])
        return np.array(parts).reshape(-1, len(contenders))

    def holding_nonfinite(self) -> Mask:
        """Return which rows hold a NaN or Inf, unlike those that are only too far away; one read of the data."""
        return sum_of(self._passed("nonfinite_pass", (), True)) > 0

    def nonfinite_pass(self) -> Vector:
        """1 for each row that holds a NaN or Inf."""
        flags = np.zeros(self.n, dtype=np.bool_)
        for block in self.source.blocks():
            for rows in block.rows:
                flags |= self.kernels.select_columns(self.without_centre(rows), Window(0, 1)).nonfinite
        return flags.astype(np.float64)

    def measure_point(self, point: Point) -> tuple[Vector, float] | None:
        """Squared distances of the rows to a point that is there, and the scale they are in; one read of the data.

        None for a centre from which they need a scale: only the rows' own distances tell whether it is out of reach.
        """
        self.points_measured += 1
        result, scale = self._point_distances(point, 1.0), 1.0
        if len(result) > self.n:  # the centre itself
            if result[-1] != 0:
                raise CentreError(NO_CENTRE)
            result = result[: self.n]
        if FLOAT64 in self.source.dtypes:
            wanted = _better_scale(result, self.weights)
            if wanted != 1.0 and point == "centre":
                return None
            if wanted != 1.0:
                rescaled = self._point_distances(point, wanted)[: self.n]
                if self._improves(wanted, result, rescaled, self.weights):
                    result, scale = rescaled, wanted
            result[~measurable(result)] = np.inf
        self.nonfinite = ~np.isfinite(result)
        return result, scale

    def _point_distances(self, point: Point, scale: float) -> Vector:
        """Squared distances of the rows, and of the centre where it is the point: 0, or it is none."""
        found = sum_of(self._passed("point_pass", (point, scale), True))
        return np.fmin(found, np.inf)  # NaN is as far as it gets

    def point_pass(self, point: Point, scale: float) -> Vector:
        """Squared distances to a point that is there."""
        every = np.arange(self.n + (point == "centre"))
        total = np.zeros(len(every), dtype=np.longdouble)
        for part in self._parts_from(point, every, scale, exact=False):
            total += part
        return _in_float64(total)

    def exact_from(self, point: Point, scale: float, rows: NDArray[np.intp]) -> Vector:
        """Exact squared distances of some input rows to one of them, to the centre or to the origin."""
        return _exact_sums(self._passed("exact_point_pass", (point, scale, rows), False))

    def exact_point_pass(self, point: Point, scale: float, rows: NDArray[np.intp]) -> Matrix:
        """Distances to a point that is there: a row for each run of columns."""
        return np.array(list(self._parts_from(point, rows, scale, exact=True))).reshape(-1, len(rows))

    def _parts_from(self, point: Point, rows: NDArray[np.intp], scale: float, *, exact: bool) -> Iterator[Vector]:
        for block in self.source.blocks():
            for columns in block.rows:
                there = None if point == "origin" else columns.take([self.n if point == "centre" else point])
                yield self.kernels.row_sq_distances(columns.take(rows), there, scale=scale, exact=exact)[0]

    @property
    def scale(self) -> float:
        """What `Geometry.scale` is; 1 where there is none."""
        return 1.0 if self.geometry is None else self.geometry.scale

    def known_pairs(self) -> Matrix:
        """(n, n) exact squared distances that were measured before, in the upper triangle; NaN elsewhere."""
        if self._known_pairs is None:
            self._known_pairs = np.full((self.n, self.n), np.nan)
        return self._known_pairs

    def afford(self, rows: int) -> bool:
        """Tell whether some more rows may be read for exact distances: in all no more than there are.

        Beyond, float64 products decide, those of rows that are near each other taken from where they are. What these
        leave open counts as equal: nobody chooses what a call costs.
        """
        if self._measured_rows + rows <= self.n:
            self._measured_rows += rows
            return True
        if self.geometry is not None:
            self.geometry.require_double()
            if not self._is_sharp:
                self._is_sharp = True
                sharper = self._sharpened(self.geometry)
                if sharper is not self.geometry:
                    self.geometry = sharper
                    raise TooCloseError
        return False

    def sharpen(self, rows: NDArray[np.intp]) -> bool:
        """Measure all rows from a few in float64, where all products are float32; one read, once in a call.

        False where that was done before, or the rows are so many that all float64 products would cost hardly more.
        """
        geometry = self.geometry
        if geometry is None or not geometry.single or self._has_lines or len(rows) > MOST_LINES * self.n:
            return False
        self._has_lines = True
        apart = sum_of(self._passed("lines_pass", (geometry.scale, rows), True))
        squares, errors = geometry.sq_distances.copy(), geometry.pair_errors()
        for row, line in zip(rows, apart, strict=True):
            known = measurable(line)
            squares[row, known] = squares[known, row] = line[known]
            errors[row, known] = errors[known, row] = self.rounding * line[known]
        self.geometry = replace(geometry, sharper=(squares, errors))
        return True

    def measure_average(self, shares: Vector) -> Vector | None:
        """Squared distances of all rows to an average of them, of 16 and 32 bits; one read. None where it is not had.

        Good to `rounding`, and one for each row.
        """
        if not isinstance(self.kernels, AveragingKernels):
            return None
        found = sum_of(self._passed("average_pass", (shares,), True))
        return np.fmin(found, np.inf)  # NaN is as far as it gets

    def average_pass(self, shares: Vector) -> Vector:
        """Squared distances to an average, which is not rounded."""
        assert isinstance(self.kernels, AveragingKernels)
        total = np.zeros(self.n, dtype=np.longdouble)
        for block in self.source.blocks():
            for rows in block.rows:
                total += self.kernels.sq_distances_to_average(self.without_centre(rows), shares)
        return _in_float64(total)

    def lines_pass(self, scale: float, some: NDArray[np.intp]) -> Matrix:
        """Squared distances of all rows from some of them."""
        every, total = np.arange(self.n), np.zeros((len(some), self.n), dtype=np.longdouble)
        for block in self.source.blocks():
            for rows in block.rows:
                total += self.kernels.row_sq_distances(rows.take(every), rows.take(some), scale=scale, exact=False)
        return _in_float64(total)

    def _sharpened(self, geometry: Geometry) -> Geometry:
        """Measure rows that lie near each other, for how far they are from the centre, from the middle of their own.

        Once, and again those of them that lie nearer still; in all no more rows are read than there are.
        """
        squares, errors = geometry.sq_distances.copy(), geometry.pair_errors()
        waiting, left, found = [np.flatnonzero(geometry.finite)], self.n, False
        while waiting:
            group = waiting.pop()
            among = np.ix_(group, group)
            for near in _connected(errors[among] > VAGUE * squares[among]):
                left -= len(near)
                if len(near) == len(group) or left < 0:
                    continue
                rows = group[near]
                gram = sum_of(self._passed("products_pass", (geometry.scale, rows), True))
                norms, lengths = gram.diagonal(), np.sqrt(gram.diagonal())
                apart = np.maximum(norms[:, None] + norms - 2 * gram, 0.0)
                np.fill_diagonal(apart, 0.0)
                bounds = np.asarray(self.rounding * (lengths[:, None] + lengths) ** 2)
                among = np.ix_(rows, rows)
                better = bounds < errors[among]
                squares[among] = np.where(better, apart, squares[among])
                errors[among] = np.where(better, bounds, errors[among])
                found = found or bool(better.any())
                waiting.append(rows)
        return replace(geometry, sharper=(squares, errors)) if found else geometry

    def products_pass(self, scale: float, some: NDArray[np.intp]) -> Matrix:
        """Inner products of some rows, from their own middle."""
        total = np.zeros((len(some), len(some)), dtype=np.longdouble)
        for block in self.source.blocks():
            for rows in block.rows:
                total += self.kernels.gram(rows.take(some), scale=scale)
        return _in_float64(total)

    # -- rows that are not finite ----------------------------------------------------------------------------------

    def nonfinite_error(self, rule: str, bad: NDArray[np.intp]) -> NonFiniteError:
        """Build the error that names rows which are not finite."""
        rows = bad if self.nonfinite is None or not self.nonfinite.any() else self.nonfinite.nonzero()[0]
        names = plain(", ".join(self.source.row_name(int(i)) for i in rows[:20]), 200) + (
            ", ..." if len(rows) > 20 else ""
        )
        what, limit = "rows", f"f={self.f}" if self.f is not None else f"fewer than half of n={self.n}"
        if self.weights is not None:
            held = float(self.weights[rows].sum() / self.weights.sum())
            what = f"rows with {held:.3g} of the weight"
            limit = "half of it" if self.share is None else f"{self.share:.3g} of it"
        far = " or are 1e150 spreads away" if FLOAT64 in self.source.dtypes else ""
        return NonFiniteError(
            f"{rule}: {len(rows)} {what} hold NaN or Inf (rows {names}){far}, more than the {limit} that may be "
            f"Byzantine; drop them, or raise {'f' if self.weights is None else 'f or delta'}{DROP_HINT}",
            tuple(int(i) for i in rows),
        )

    def _improves(self, scale: float, before: Vector, after: Vector, weights: Vector | None) -> bool:
        """Tell whether squares taken at another scale are better than those before.

        Downwards they are, where the middle one is out of reach or nobody's vanish. Upwards only if the middle one had
        vanished, rather than being 0, and if no more rows are lost than may be Byzantine: a few tiny rows must not push
        the honest ones out of reach.
        """
        if scale < 1:
            return not (middle_by_weight(before, weights) <= MAX_SQUARE and ((before > 0) & (after == 0)).any())
        return middle_by_weight(after, weights) > 0 and tolerated(
            measurable(before) & ~measurable(after), self.f, weights, self.share
        )


def _connected(pairs: NDArray[np.bool_]) -> list[NDArray[np.intp]]:
    """Return the groups of two or more that pairs connect, each in order."""
    left, groups = np.ones(len(pairs), dtype=np.bool_), []
    for first in np.flatnonzero(pairs.any(axis=1)):
        if not left[first]:
            continue
        group = np.zeros(len(pairs), dtype=np.bool_)
        front = group.copy()
        front[first] = True
        while front.any():
            group |= front
            front = pairs[front].any(axis=0) & ~group
        left &= ~group
        if np.count_nonzero(group) > 1:
            groups.append(np.flatnonzero(group))
    return groups


def _in_float64(total: NDArray[np.longdouble]) -> NDArray[np.float64]:
    """Round sums of many blocks, which are taken in 80 bits where the machine has them."""
    with np.errstate(over="ignore"):
        return np.asarray(total, dtype=np.float64)


def share_of_origin(weights: Vector, centre_weight: float) -> float:
    """Return what shares leave for the origin; none where they sum to 1 but for rounding, which far rows would feel."""
    rest = 1.0 - float(weights.sum()) - centre_weight
    return rest if abs(rest) > UNIT_ROUNDING else 0.0


def _reference(gram: Matrix, at: int, finite: Mask) -> Reference:
    n = len(finite)
    return Reference(np.where(finite, gram[at, :n], 0.0), float(gram[at, at]))


def _better_scale(squares: Vector, weights: Vector | None) -> float:
    """Return the power of two at which the middle row (by weight) has an ordinary square."""
    middle = middle_by_weight(squares, weights)
    if middle > MAX_SQUARE:
        return 1 / RESCALE
    return RESCALE if middle < 1e-250 else 1.0


def middle_by_weight(squares: Vector, weights: Vector | None) -> float:
    """Return the lower median by weight; NaN is as far as it gets."""
    squares = np.where(np.isnan(squares), np.inf, squares)
    order = np.argsort(squares, kind="stable")
    share = np.cumsum(np.ones(len(squares)) if weights is None else weights[order])
    return float(squares[order[int(np.searchsorted(share, share[-1] / 2))]])


def _many_are_near(gram: Matrix, d: int) -> bool:
    """Tell whether float32 products of d columns do not tell many rows from others; who is too far is near nobody."""
    norms = gram.diagonal()
    lengths = np.sqrt(np.maximum(norms, SINGLE_LEAST * d))
    with np.errstate(invalid="ignore"):
        near = norms[:, None] + norms - 2 * gram <= SINGLE_ROUNDING * (lengths[:, None] + lengths) ** 2
    near &= np.isfinite(norms)
    np.fill_diagonal(near, False)
    return bool(np.count_nonzero(near.any(axis=1)) > MOST_NEAR * len(norms))


def _lost(gram: Matrix) -> bool:
    """Tell whether the centre is so far from most rows that float32 products cannot tell these apart.

    Half of the rows that give it may be hostile.
    """
    norms = gram.diagonal()
    with np.errstate(invalid="ignore"):
        squares = np.nan_to_num(norms[:, None] + norms - 2 * gram, nan=np.inf)
    middle = (len(norms) - 1) // 2
    near = np.partition(squares, middle, axis=1)[:, middle]
    length = np.sort(norms)[middle]  # NaN and inf come last
    return not np.isfinite(length) or bool(np.sort(near)[middle] < 16 * SINGLE_ROUNDING * length)


def measurable(squares: Vector) -> Mask:
    """Tell which squared distances are numbers that arithmetic on them cannot make overflow."""
    with np.errstate(invalid="ignore"):
        return np.asarray(squares <= MAX_SQUARE)


def tolerated(bad: Mask, f: int | None, weights: Vector | None, share: float | None) -> bool:
    """Tell whether these rows may all be Byzantine: at most f, or the share of the weight; without them, below half."""
    if weights is None:
        return int(bad.sum()) <= (f if f is not None else (len(bad) - 1) // 2)
    spoilt, total = float(weights[bad].sum()), float(weights.sum())
    return spoilt <= total * share * (1 + 1e-12) if share is not None else spoilt < total / 2


def cells_of_share(cells: NDArray[np.int64], share: float) -> int:
    """Return how many cells a share of them is, below half; rows of that share never hold more.

    Where weights are no small whole numbers, cells and share are rounded, and a cell that an attacker kept would be
    one too many: so these round up, by no more than one for each row.
    """
    if share == 0:
        return 0
    total, unit = int(cells.sum()), int(np.gcd.reduce(cells))
    parts = share * (total // unit)
    if total // unit < 2**20 and abs(parts - round(parts)) < 1e-9:
        return min(round(parts) * unit, (total - 1) // 2)
    return min(math.ceil(share * total * (1 + 4 * EPSILON)) + len(cells), (total - 1) // 2)


def sum_of(parts: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Return the sum of what each who holds columns found, in their order."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _exact_sums(parts: list[Matrix]) -> Vector:
    columns = np.concatenate(parts)
    finite = np.asarray(np.isfinite(columns).all(axis=0))
    return np.array([math.fsum(columns[:, i]) if finite[i] else math.inf for i in range(len(finite))])


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
