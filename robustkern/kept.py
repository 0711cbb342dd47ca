"""Rows that stay from call to call while a few change: inner products of the others stay too, and are not taken again.

The centre of the products is a vector that stays as long as rows are near it; products with it are those of
`Kernels.gram` to the last digit that its bound promises, so that rules know no difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from robustkern.contract.filtered import Of
from robustkern.contract.primitives import Window
from robustkern.contract.rows import Block, Matrix, Rows, Source, Vector
from robustkern.rules.geometry import ROWS_PER_COLUMN, Given, as_cells, measurable

__all__ = ["KeptProducts"]

#: Below so many rows all products cost no more: an arrival and its geometric median took 1.3 times a call on all rows
#: at 16 rows, 0.87 at 32, 0.65 at 64, 0.3 at 256: the new row's products are one read of all, the result another.
LEAST_ROWS = 32
#: Up to which share of the rows may have changed before all products are taken again.
MOST_CHANGED = 0.25
#: How many times farther than at first rows may be from the centre, in squared distances between them: two digits.
DRIFT = 100.0
FARTHEST = 1e6  # and what that is at first at most: beyond it products are taken again in every call


class _Known(NamedTuple):
    """What is known after a call.

    Attributes
    ----------
    rows : sequence of objects
        Those of the call.
    form : object
        Its columns, and their order.
    centres : list of Rows
        The centre, for each run of columns.
    products : (n, n) float64
        From the centre.
    distance : float
        `_distance` when the centre was chosen.
    """

    rows: Sequence[Any] = ()
    form: Any = None
    centres: Sequence[Rows] = ()
    products: Matrix = np.zeros((0, 0))
    distance: float = 1.0


class KeptProducts:
    """Inner products of the rows of one call after the other.

    Rows are known by being the same object as before, and must not be changed in place. Copies, and what comes out of a
    pickle, know nothing. Calls of several threads each see what one of them has left.
    """

    def __init__(self) -> None:
        self._known = _Known()

    def __reduce__(self) -> tuple[Any, ...]:
        return KeptProducts, ()

    def source(self, source: Source, rows: Sequence[Any], form: Any) -> Source:
        """Return a source whose products are kept.

        Parameters
        ----------
        source : Source
            Of these rows; without a centre.
        rows : sequence of objects
            One for each row: the same one as in the last call where the row is the same.
        form : object
            The columns, and their order; where it has changed, all products are taken again.
        """
        if source.n < LEAST_ROWS or source.d * ROWS_PER_COLUMN <= source.n:  # which are known by their columns
            return source
        return _Source(source, self, rows, form)

    def of(self, passes: Given, rows: Sequence[Any], form: Any) -> Matrix:
        """Return the products of these rows, of which those of new ones are taken."""
        known = self._known
        before = {id(row): i for i, row in enumerate(known.rows)} if form == known.form else {}
        at = np.array([before.get(id(row), -1) for row in rows])
        changed = np.flatnonzero(at < 0)
        found: _Known | None = None
        if len(changed) <= MOST_CHANGED * len(rows):
            products = known.products[np.ix_(at, at)]
            self._take(passes, changed, known.centres, products)
            if _distance(products) <= DRIFT * max(known.distance, 1.0):
                found = known._replace(rows=rows, products=products)
        if found is None:
            centres, products = self._take_all(passes)
            found = _Known(rows, form, centres, products, min(_distance(products), FARTHEST))
        self._known = found
        return found.products

    def _take_all(self, passes: Given) -> tuple[list[Rows], Matrix]:
        """Choose a new centre, the rows' median, and take all products."""
        n, weights = passes.n, passes.weights
        cells = np.ones(n, dtype=np.int64) if weights is None else as_cells(weights)
        middle = int((cells.sum() - 1) // 2)
        centres, products = [], np.zeros((n, n))
        for columns in _columns(passes):
            centre = columns.scratch()
            passes.kernels.select_columns(
                columns, Window(middle, middle + 1), multiplicities=None if weights is None else cells, out=centre
            )
            centres.append(centre)
            products += self._gram(passes, columns, np.arange(n), centre, n)
        return centres, products

    def _take(self, passes: Given, changed: NDArray[np.intp], centres: Sequence[Rows], products: Matrix) -> None:
        """Take the products of rows that changed, with all."""
        if not len(changed):
            return
        order = np.append(changed, np.setdiff1d(np.arange(passes.n), changed))
        total = np.zeros((len(changed), passes.n))
        for columns, centre in zip(_columns(passes), centres, strict=True):
            total += self._gram(passes, columns, order, centre, len(changed))
        products[np.ix_(changed, order)] = total
        products[np.ix_(order, changed)] = total.T
        self._make_copies_alike(passes, changed, products)

    @staticmethod
    def _make_copies_alike(passes: Given, changed: NDArray[np.intp], products: Matrix) -> None:
        """Give copies of a row its products: taken at other times, or in other company, they differ in last bits.

        At most as many rows are looked at as there are, first those that did not change, whatever attackers send.
        """
        squares = products.diagonal()
        lengths = np.sqrt(np.maximum(squares, 0.0))
        fresh = np.isin(np.arange(passes.n), changed)
        left, pairs = passes.n, []
        for i in changed:
            bound = 4 * passes.rounding * (lengths + lengths[i]) ** 2
            with np.errstate(invalid="ignore"):
                near = np.flatnonzero(squares + squares[i] - 2 * products[i] <= bound)
            near = near[near != i]
            near = near[np.argsort(fresh[near], kind="stable")][:left]
            left -= len(near)
            if len(near):
                pairs.append((int(i), near, np.zeros(len(near))))
        for columns in _columns(passes) if pairs else ():
            for i, near, apart in pairs:
                np.add(apart, passes.kernels.row_sq_distances(columns.take(near), columns.take([i]))[0], out=apart)
        for i, near, apart in pairs:
            for j in near[apart == 0][:1]:
                products[i], products[i, i] = products[j], products[j, j]
                products[:, i] = products[i]

    @staticmethod
    def _gram(passes: Given, columns: Rows, order: NDArray[np.intp], centre: Rows, lines: int) -> Matrix:
        """Products of the first rows in an order with all: the centre alone counts for the median of `Kernels.gram`."""
        rows = columns.take(order).joined(centre)
        cells = np.zeros(rows.n, dtype=np.int64)
        cells[-1] = 1
        return passes.kernels.gram(rows, multiplicities=cells, lines=lines)[:, :-1]


class _Source(Of):
    """A source that answers the pass for products itself, as far as they are kept."""

    def __init__(self, source: Source, products: KeptProducts, rows: Sequence[Any], form: Any) -> None:
        super().__init__(source)
        self._kept = products, rows, form
        self.divided = True  # so that it is asked for every pass

    def blocks(self) -> Iterator[Block]:
        """Yield the blocks."""
        return iter(self._source.blocks())

    def results(self) -> Iterator[Block]:
        """Yield the blocks once more."""
        return iter(self._source.results())

    def passed(self, passes: Any, name: str, arguments: tuple[Any, ...], add: bool) -> list[Vector]:
        """Make a pass over the data, or return what is known of it."""
        # Who asks for some of the rows or columns, for another scale or for the origin is answered as anybody is.
        if name != "gram_pass" or arguments[0] != 1.0 or passes.source is not self or passes.needs_origin:
            return [getattr(passes, name)(*arguments)]
        products, rows, form = self._kept
        return [np.concatenate([products.of(passes, rows, form), np.zeros((1, self.n))])]


def _columns(passes: Given) -> Iterator[Rows]:
    return (columns for block in passes.source.blocks() for columns in block.rows)


def _distance(products: Matrix) -> float:
    """Return how far the middle row is from the centre, in the middle distance between rows (both squared).

    Infinite where half of the rows are too far from it to be measured.
    """
    squares = products.diagonal()
    near = np.flatnonzero(measurable(squares))
    if 2 * len(near) <= len(squares):
        return np.inf
    inner, squares = products[np.ix_(near, near)], squares[near]
    distances = (squares[:, None] + squares - 2 * inner)[np.triu_indices(len(near), 1)]
    middle, between = float(np.median(squares)), float(np.median(distances))
    return middle / between if between > 0 else (np.inf if middle > 0 else 0.0)
