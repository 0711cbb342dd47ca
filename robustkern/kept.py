"""Rows that stay from call to call while a few change: inner products of the others stay too, and are not taken again.

The centre of the products is a vector that stays as long as rows are near it; products with it are those of
`Kernels.gram` to the last digit that its bound promises, so that rules know no difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustkern.contract.filtered import Of
from robustkern.contract.primitives import Window
from robustkern.contract.rows import Block, Matrix, Rows, Source, Vector
from robustkern.rules.geometry import Given, as_cells

__all__ = ["KeptProducts"]

#: Rows whose products are taken together, those that changed among them; a row's new products are one read of all rows
#: then. On two cores of an EPYC with AVX-512, whose memory is fast, they take the time of 3 to 4 reads, with 8
#: rows as long, with 32 twice as long; a call on all rows takes 3 to 4 up to 32 rows, 6 at 96, 17 at 256.
GROUP = 16
#: Below so many rows all products cost no more: an arrival and its geometric median took 1.5 times a call on all rows
#: at 32 rows, 1.2 at 64, 0.9 at 96 and 128, 0.25 at 256; and Krum, which mostly asks for float64 products, 1.5, 0.4,
#: 0.9, 0.25 and 0.25.
LEAST_ROWS = 64
#: Up to which share of the rows may have changed before all products are taken again.
MOST_CHANGED = 0.25
#: How many times farther than at first rows may be from the centre, in squared distances between them: two digits.
DRIFT = 100.0
FARTHEST = 1e6  # and what that is at first at most: beyond it products are taken again in every call


class KeptProducts:
    """Inner products of the rows of one call after the other.

    Rows are known by being the same object as before, and must not be changed in place.
    """

    def __init__(self) -> None:
        self._rows: Sequence[Any] = ()
        self._form: Any = None
        self._centre: list[Rows] = []
        self._products: Matrix = np.zeros((0, 0))
        self._distance = 1.0

    def source(self, source: Source, rows: Sequence[Any], form: Any) -> Source:
        """Return a source whose products are kept.

        Parameters
        ----------
        source : Source
            Of these rows; without a centre.
        rows : sequence of objects
            One for each row: the same one as in the last call where the row is the same.
        form : object
            Whatever the order of the columns follows from; where it has changed, all products are taken again.
        """
        if source.n < LEAST_ROWS:
            return source
        return _Source(source, self, rows, (form, source.d, frozenset(map(str, source.dtypes))))

    def of(self, passes: Given, rows: Sequence[Any], form: Any) -> Matrix:
        """Return the products of these rows, of which those of new ones are taken."""
        before = {id(row): i for i, row in enumerate(self._rows)} if form == self._form else {}
        at = np.array([before.get(id(row), -1) for row in rows])
        changed = np.flatnonzero(at < 0)
        products = None
        if len(changed) <= MOST_CHANGED * len(rows):
            products = self._products[np.ix_(at, at)]
            self._take(passes, changed, products)
            if _distance(products) > DRIFT * max(self._distance, 1.0):
                products = None
        if products is None:
            self._centre, products = self._take_all(passes)
            self._distance = min(_distance(products), FARTHEST)
        self._products, self._rows, self._form = products, rows, form
        return products

    def _take_all(self, passes: Given) -> tuple[list[Rows], Matrix]:
        """Choose a new centre, the rows' median, and take all products."""
        n, weights = passes.n, passes.weights
        cells = np.ones(n, dtype=np.int64) if weights is None else as_cells(weights)
        middle = int((cells.sum() - 1) // 2)
        self._rows = ()  # so that nothing is known if this ends early
        centres, products = [], np.zeros((n, n))
        for columns in _columns(passes):
            centre = columns.scratch()
            passes.kernels.select_columns(
                columns, Window(middle, middle + 1), multiplicities=None if weights is None else cells, out=centre
            )
            centres.append(centre)
            products += self._gram(passes, columns, np.arange(n), centre)
        return centres, products

    def _take(self, passes: Given, changed: NDArray[np.intp], products: Matrix) -> None:
        """Take the products of rows that changed: of a few others with them at a time."""
        if not len(changed):
            return
        others = np.setdiff1d(np.arange(passes.n), changed)
        size = max(GROUP - 1 - len(changed), len(changed))
        groups = [np.append(changed, others[i : i + size]) for i in range(0, len(others), size)]
        sums = [np.zeros((len(group), len(group))) for group in groups]
        for columns, centre in zip(_columns(passes), self._centre, strict=True):
            for k, group in enumerate(groups):
                sums[k] += self._gram(passes, columns, group, centre)
        for group, total in zip(groups, sums, strict=True):
            products[np.ix_(group, changed)] = total[:, : len(changed)]
            products[np.ix_(changed, group)] = total[: len(changed)]

    @staticmethod
    def _gram(passes: Given, columns: Rows, group: NDArray[np.intp], centre: Rows) -> Matrix:
        """Products of some rows from the centre: the only row that counts for the median of `Kernels.gram`."""
        few = columns.take(group).joined(centre)
        cells = np.zeros(few.n, dtype=np.int64)
        cells[-1] = 1
        return passes.kernels.gram(few, multiplicities=cells)[:-1, :-1]


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
    """Return how far the middle row is from the centre, in the middle distance between rows (both squared)."""
    squares = products.diagonal()
    finite = np.flatnonzero(np.isfinite(squares))
    if len(finite) < 2:
        return 0.0
    inner, squares = products[np.ix_(finite, finite)], squares[finite]
    distances = (squares[:, None] + squares - 2 * inner)[np.triu_indices(len(finite), 1)]
    middle, between = float(np.median(squares)), float(np.median(distances))
    return middle / between if between > 0 else (np.inf if middle > 0 else 0.0)
