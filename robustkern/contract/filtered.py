"""Sources made of another source: some of its rows, or all of them without what an infinity shared by them would do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustkern.contract.counters import Combine
from robustkern.contract.rows import Block, Rows, Source, T

__all__ = ["Of", "SharedInfinities", "SomeRows"]

BLOCK_BYTES = 1 << 22


class Of:
    """A source that leaves most to another one."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.n, self.d, self.dtypes, self.device = source.n, source.d, source.dtypes, source.device
        self.has_centre, self.plain, self.divided = source.has_centre, source.plain, source.divided

    @property
    def combine(self) -> Combine:
        """How integers are combined."""
        how: Combine = self._source.combine
        return how

    @combine.setter
    def combine(self, how: Combine) -> None:
        self._source.combine = self._of_all(how)

    def _of_all(self, how: Combine) -> Combine:
        """Return how the other source combines all its rows, where this one combines its own so."""
        return how

    def row_name(self, row: int) -> str:
        """Return how an error should call a row."""
        return self._source.row_name(row)

    def total(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the sum over all who hold columns."""
        return self._source.total(x)

    def passed(self, passes: Any, name: str, arguments: tuple[Any, ...], add: bool) -> list[NDArray[np.float64]]:
        """Make a pass over the data, together with all who hold columns."""
        return self._source.passed(passes, name, arguments, add)

    def once(self, work: Callable[[], T], passes: Any) -> T:
        """Return what one of all who hold columns makes of the passes."""
        return self._source.once(work, passes)


class SomeRows(Of):
    """Some rows of a source; the others take no part in anything.

    Parameters
    ----------
    source : Source
        Of all rows.
    rows : (m,) int
        Which.
    """

    def __init__(self, source: Source, rows: NDArray[np.intp]) -> None:
        super().__init__(source)
        self.rows, self.n = rows, len(rows)
        self._with_centre = np.append(rows, source.n) if source.has_centre else rows
        self.plain = [leaf._replace(differing=leaf.differing[rows]) for leaf in source.plain]

    def _of_all(self, how: Combine) -> Combine:
        """Leave the others out."""
        rows = self.rows

        def of_rows(values: NDArray[Any], dtype: np.dtype[Any] | None, which: NDArray[np.intp] | None) -> NDArray[Any]:
            if which is None:
                return how(values[rows], dtype, None)
            return how(values[np.isin(which, rows)], dtype, np.flatnonzero(np.isin(rows, which)))

        return of_rows

    def row_name(self, row: int) -> str:
        """Return how an error should call a row."""
        return self._source.row_name(int(self.rows[row]))

    def _block(self, block: Block) -> Block:
        return Block(tuple(rows.take(self._with_centre) for rows in block.rows), block.out)

    def blocks(self) -> Iterator[Block]:
        """Yield the blocks."""
        return map(self._block, self._source.blocks())

    def results(self) -> Iterator[Block]:
        """Yield the blocks once more."""
        return map(self._block, self._source.results())


class SharedInfinities(Of):
    """The rows without columns in which enough of them hold the same infinity, such as attention masks.

    Such a column is no evidence against anybody: it is 0 here in every row that has the infinity or a finite number,
    so that it adds to no distance, and the result has the infinity. A NaN, or the other infinity, stays.

    Parameters
    ----------
    source : Source
        In the host's memory.
    enough : callable
        Takes (n, m) bool, says of which of the m columns enough rows hold an infinity.
    """

    def __init__(self, source: Source, enough: Callable[[NDArray[np.bool_]], NDArray[np.bool_]]) -> None:
        super().__init__(source)
        self._enough = enough
        here = sum(int(np.count_nonzero(sign)) for _, _, sign, _ in self._cut(source.blocks()))
        self.columns = int(source.total(np.array([float(here)]))[0])

    def _cut(self, blocks: Any) -> Iterator[tuple[Rows, Rows, NDArray[np.int8], NDArray[Any] | None]]:
        """Yield columns, where their result goes, the signs of shared infinities (0: none), and a copy if any is."""
        for block in blocks:
            for rows, out in zip(block.rows, block.out, strict=True):
                columns = max(BLOCK_BYTES // (rows.n * rows.dtype.itemsize), 1)
                for part, target in zip(rows.blocks(columns), out.blocks(columns), strict=True):
                    values = part.matrix(0)
                    sign = np.zeros(part.d, dtype=np.int8)
                    if not np.isfinite(values.astype(np.float32, copy=False)).all():
                        for value in (1, -1):
                            sign[self._enough(values[: self._source.n] == values.dtype.type(value * np.inf))] = value
                    yield part, target, sign, values if sign.any() else None

    def _blocks(self, blocks: Any, write: bool) -> Iterator[Block]:
        for part, target, sign, values in self._cut(blocks):
            if values is None:
                yield Block((part,), (target,))
                continue
            infinity = np.copysign(np.inf, sign).astype(values.dtype)
            shared = sign != 0
            nothing = shared & (np.isfinite(values) | (values == infinity))
            values[nothing] = 0
            yield Block((Rows.of(values),), (target,))
            if write:
                target.array(0, 0)[shared] = infinity[shared]

    def blocks(self) -> Iterator[Block]:
        """Yield the blocks."""
        return self._blocks(self._source.blocks(), False)

    def results(self) -> Iterator[Block]:
        """Yield the blocks once more."""
        return self._blocks(self._source.results(), True)
