"""Rows in memory: the floating-point leaves of updates, cut into segments that are used where they lie.

Leaves whose last axis is not contiguous, and those that are computed in another dtype, are copied in blocks of bounded
size. Integer and boolean leaves (counters, such as BatchNorm's) are no coordinates, see `robustkern.contract.counters`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustkern.contract.rows import DTYPES, Block, PlainLeaf, Rows, Undivided, one_segment
from robustkern.inputs.arrays import address, leaf_of, name_of
from robustkern.inputs.devices import DeviceArray, Place

__all__ = ["Leaf", "MemorySource", "check_disjoint", "plain_leaf"]

MIN_RUN_BYTES = 1024  # shorter contiguous runs are gathered into blocks: their addresses would take 1 % of memory
BLOCK_BYTES = 1 << 22


@dataclass(slots=True)
class Leaf:
    """One leaf of all rows, and the memory of its result.

    Values of another dtype than `dtype`, in which they are computed, are converted block by block; `size` is its number
    of columns.
    """

    path: tuple[Any, ...]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    arrays: Any  # n, or one with a leading axis of n; views unless there are addresses
    out: Any
    addresses: NDArray[np.int64] | None = None  # (n + 1,), the result's last, where all are known to be contiguous
    place: Place | None = None
    stored: np.dtype[Any] | None = None  # of row 0's values, where that is another one than `dtype`
    size: int = field(init=False)

    def __post_init__(self) -> None:
        self.size = math.prod(self.shape)

    @property
    def converted(self) -> bool:
        """Whether its values, or those of the result, are of another dtype than what is computed."""
        if self.addresses is not None:
            return False
        arrays = self.arrays if isinstance(self.arrays, list) else [self.arrays]
        return any(array.dtype != self.dtype for array in (*arrays, self.out))

    @property
    def out_address(self) -> int:
        """Where the result begins."""
        return address(self.out) if self.addresses is None else int(self.addresses[-1])

    def places(self) -> list[tuple[Any, ...]]:
        """Return where each row's values lie, and how: the same for two leaves that are one memory, seen alike."""
        kind = self.stored or self.dtype
        if self.addresses is not None:
            steps = [math.prod(self.shape[axis + 1 :]) * self.dtype.itemsize for axis in range(len(self.shape))]
            layout = _layout(self.shape, steps)
            return [(kind, int(first), layout, self.dtype) for first in self.addresses[:-1]]
        # A row of another dtype than row 0's is no tie, whatever lies in its memory.
        return [(kind, address(row), _layout(row.shape, row.strides), row.dtype) for row in self.arrays]

    @property
    def out_bytes(self) -> int:
        """How many bytes the result has."""
        return self.size * (self.dtype if self.addresses is not None else self.out.dtype).itemsize

    def bounds(self) -> list[tuple[NDArray[np.int64], int]]:
        """Return first bytes of the rows, and how many bytes from there may be theirs."""
        if self.addresses is not None:
            return [(self.addresses[:-1], self.size * self.dtype.itemsize)]
        bounds = []
        for source in self.arrays if isinstance(self.arrays, list) else [self.arrays]:
            reach = [(size - 1) * stride for size, stride in zip(source.shape, source.strides, strict=True)]
            low = sum(step for step in reach if step < 0)
            bounds.append((np.array([address(source) + low]), sum(map(abs, reach)) + source.itemsize))
        return bounds


def _layout(shape: Sequence[int], strides: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return the axes that have steps, with these."""
    return tuple((size, step) for size, step in zip(shape, strides, strict=True) if size != 1)


def plain_leaf(path: tuple[Any, ...], values: Sequence[Any], weights: NDArray[np.float64] | None) -> PlainLeaf:
    """Return the leaf of n rows that hold numbers or texts of Python.

    Its value is what most rows, or most of the weight, have; of equals the first counts.
    """
    # A NaN is one, True is not 1, and an integer may have more digits than Python writes.
    keys = [(type(value), value if type(value) is int else repr(value)) for value in values]
    votes: dict[Any, float] = {}
    for k, key in enumerate(keys):
        votes[key] = votes.get(key, 0.0) + (1.0 if weights is None else float(weights[k]))
    most = max(votes, key=votes.__getitem__)
    return PlainLeaf(name_of(path), values[keys.index(most)], np.array([key != most for key in keys]))


@dataclass(slots=True, eq=False)
class MemorySource(Undivided):
    """Rows in memory.

    Attributes
    ----------
    n, d, dtypes, device, has_centre
        As `Source`.
    direct : Block
        What is used where it lies.
    strided, integers : list of Leaf
        Leaves that are copied in blocks, and leaves of integers and booleans.
    plain : sequence of PlainLeaf
        Leaves that are no arrays.
    combine : callable
        How integers are combined.
    parts : dict of str to MemorySource, or None
        The leaves of floats by name, each as a source of its own, where that was asked for.
    finish : callable or None
        Returns the result once everything is written, where its parts are not what was written to.
    floating : sequence of Leaf
        All leaves that are coordinates; tied ones once.
    """

    n: int
    d: int
    dtypes: set[np.dtype[Any]]
    device: str
    direct: Block
    strided: list[Leaf] = field(default_factory=list)
    integers: list[Leaf] = field(default_factory=list)
    has_centre: bool = False
    plain: Sequence[PlainLeaf] = ()
    combine: Any = None  # a `Combine`
    parts: dict[str, MemorySource] | None = None
    finish: Callable[[], Any] | None = None
    floating: Sequence[Leaf] = ()

    @classmethod
    def of(cls, n: int, leaves: list[Leaf], has_centre: bool = False, plain: Sequence[PlainLeaf] = ()) -> MemorySource:
        """Return the source of n rows, and perhaps a centre, that have these leaves."""
        floating = [leaf for leaf in leaves if leaf.dtype in DTYPES]
        direct, strided = _grouped(floating)
        return cls(
            n,
            sum(leaf.size for leaf in floating),
            {leaf.dtype for leaf in floating},
            "cpu" if leaves[0].place is None else "cuda",
            direct,
            strided,
            [leaf for leaf in leaves if leaf.dtype not in DTYPES],
            has_centre,
            plain,
            floating=floating,
        )

    @property
    def form(self) -> tuple[Any, ...]:
        """What its columns are, in their order: leaves, with their shapes and dtypes."""
        return (self.d, *map(str, self.dtypes), *((leaf.path, leaf.shape, leaf.dtype) for leaf in self.floating))

    def blocks(self) -> Iterable[Block]:
        """Return what lies contiguous as one block, then copies of the rest."""
        return self._copied(False) if self.strided else [self.direct]

    def _copied(self, write: bool) -> Iterator[Block]:
        yield self.direct
        for leaf in self.strided:
            if leaf.place is not None:
                yield from _copied_blocks(leaf, leaf.place)
                continue
            count = self.n + self.has_centre
            columns = max(BLOCK_BYTES // (count * leaf.dtype.itemsize), 1)
            target = leaf.out.reshape(-1)
            for begin in range(0, target.size, columns):
                end = min(begin + columns, target.size)
                values = np.empty((count, end - begin), dtype=leaf.dtype)
                for i in range(count):
                    row = leaf.arrays[i]
                    values[i] = row[begin:end] if row.ndim == 1 else row.flat[begin:end]
                if target.dtype == leaf.dtype:
                    yield Block((Rows.of(values),), (Rows.of(target[None, begin:end]),))
                    continue
                out = np.empty((1, end - begin), dtype=leaf.dtype)
                yield Block((Rows.of(values),), (Rows.of(out),))
                if write:
                    target[begin:end] = out[0].astype(target.dtype)

    def results(self) -> Iterable[Block]:
        """Return the blocks once more to have results written, besides those of the counters, which are written now."""
        for leaf in self.integers:
            if leaf.place is not None:
                values = np.stack([leaf.place.library.to_host(leaf.arrays[i].array) for i in range(self.n)])
                leaf.place.library.assign(leaf.out.array, self._combined(values, leaf))
                continue
            target = leaf.out.reshape(-1)
            columns = max(BLOCK_BYTES // (self.n * leaf.dtype.itemsize), 1)
            for begin in range(0, target.size, columns):
                end = min(begin + columns, target.size)
                values = np.stack([np.asarray(leaf.arrays[i]).flat[begin:end] for i in range(self.n)])
                target[begin:end] = self._combined(values, leaf)
        return self._copied(True) if self.strided else [self.direct]

    def _combined(self, values: NDArray[Any], leaf: Leaf) -> NDArray[Any]:
        """Combine integers; those on a GPU, which are few (counters), go through the host."""
        wanted: np.dtype[Any] = leaf.out.dtype
        return np.asarray(self.combine(values, None if wanted == leaf.dtype else wanted, None), dtype=wanted)

    def row_name(self, row: int) -> str:
        """Return how an error should call a row."""
        return str(row)


def _grouped(leaves: list[Leaf]) -> tuple[Block, list[Leaf]]:
    """Join the segments of all leaves that can be used in place, by dtype; return the other leaves apart."""
    parts: dict[np.dtype[Any], tuple[list[NDArray[np.int64]], list[int]]] = {}
    strided = []
    for leaf in leaves:
        if leaf.size == 0:
            continue
        table, run = (leaf.addresses[None], leaf.size) if leaf.addresses is not None else _segments(leaf)
        if table is None:
            strided.append(leaf)
            continue
        tables, runs = parts.setdefault(leaf.dtype, ([], []))
        tables.append(table)
        runs.append(run)
    rows, out = [], []
    for dtype, (tables, runs) in parts.items():
        table = np.concatenate(tables).view(np.uint64)
        if len(table) == 1:
            offsets = one_segment(runs[0])
        else:
            offsets = np.zeros(len(table) + 1, dtype=np.int64)
            np.cumsum(np.repeat(runs, [len(each) for each in tables]), out=offsets[1:])
        rows.append(Rows(np.ascontiguousarray(table[:, :-1]), offsets, dtype, leaves, leaves[0].place))
        out.append(Rows(np.ascontiguousarray(table[:, -1:]), offsets, dtype, leaves, leaves[0].place))
    return Block(tuple(rows), tuple(out)), strided


def _copied_blocks(leaf: Leaf, place: Place) -> Iterator[Block]:
    """Yield contiguous copies of some of a leaf at a time, cut along the first axis that is longer than 1."""
    lead = next((axis for axis, size in enumerate(leaf.shape) if size > 1), 0)
    inner = math.prod(leaf.shape[lead + 1 :])
    step = max(BLOCK_BYTES // (len(leaf.arrays) * inner * leaf.dtype.itemsize), 1)
    cut = (0,) * lead
    for begin in range(0, leaf.shape[lead], step):
        count = min(step, leaf.shape[lead] - begin)
        shape = (len(leaf.arrays), count, *leaf.shape[lead + 1 :])
        values = place.empty(shape, leaf.dtype)
        for i in range(len(leaf.arrays)):
            place.library.assign(values.array[i], leaf.arrays[i].array[(*cut, slice(begin, begin + count))])
        columns = count * inner
        width = columns * leaf.dtype.itemsize
        first = values.address + width * np.arange(len(leaf.arrays), dtype=np.uint64)
        target = np.array([[leaf.out.address + begin * inner * leaf.dtype.itemsize]], dtype=np.uint64)
        offsets = one_segment(columns)
        yield Block(
            (Rows(first.astype(np.uint64)[None], offsets, leaf.dtype, values, place),),
            (Rows(target, offsets, leaf.dtype, leaf.out, place),),
        )


def _segments(leaf: Leaf) -> tuple[NDArray[np.int64] | None, int]:
    """Addresses (n_segments, n + 1) of equal contiguous runs and of their result, or None; and the runs' columns."""
    if leaf.converted:
        return None, 0
    arrays, item = leaf.arrays, leaf.dtype.itemsize
    if isinstance(arrays, (np.ndarray, DeviceArray)):
        strides = [arrays.strides[1:]]
        base = address(arrays) + arrays.strides[0] * np.arange(len(arrays), dtype=np.int64)
    else:
        strides = [a.strides for a in arrays]
        base = np.array([address(a) for a in arrays], dtype=np.int64)
    axes = min(_contiguous_axes(leaf.shape, s, item) for s in set(strides))
    outer = leaf.shape[: len(leaf.shape) - axes]
    run = math.prod(leaf.shape[len(outer) :])
    if outer and run * item < MIN_RUN_BYTES:
        return None, 0
    index = np.indices(outer, dtype=np.int64).reshape(len(outer), math.prod(outer))
    table = np.empty((index.shape[1], len(base) + 1), dtype=np.int64)
    # One row of strides serves all rows of one array.
    table[:, :-1] = (np.array(strides, dtype=np.int64)[:, : len(outer)] @ index).T + base
    table[:, -1] = address(leaf.out) + run * item * np.arange(len(table), dtype=np.int64)
    return table, run


def _contiguous_axes(shape: tuple[int, ...], strides: tuple[int, ...], item: int) -> int:
    """How many trailing axes form one contiguous run."""
    expected, axes = item, 0
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            break
        expected *= size
        axes += 1
    return axes


def check_disjoint(leaves: list[Leaf], others: Sequence[Leaf] = ()) -> None:
    """Raise where the memory of a result overlaps an update's or another result's, as far as their bounds tell.

    Of `others` only the updates are looked at.
    """
    leaves = [leaf for leaf in leaves if leaf.size]
    if not leaves:
        return
    if len(leaves) == 1 and not others and leaves[0].addresses is not None:  # the usual case, kept short
        apart = np.abs(leaves[0].addresses[:-1] - leaves[0].addresses[-1])
        if apart.min() >= leaves[0].size * leaves[0].dtype.itemsize:
            return
    inputs = [*leaves, *(leaf for leaf in others if leaf.size)]
    starts, sizes = zip(*(bounds for leaf in inputs for bounds in leaf.bounds()), strict=True)
    low = np.concatenate(starts)
    high = low + np.repeat(sizes, [len(each) for each in starts])
    order = np.argsort(low)
    low, reach = low[order], np.maximum.accumulate(high[order])
    begin = np.array([leaf.out_address for leaf in leaves])
    end = begin + [leaf.out_bytes for leaf in leaves]
    order = np.argsort(begin)
    begin, end = begin[order], end[order]
    before = np.searchsorted(low, end)  # so many rows' parts begin before a result ends: does one reach into it?
    shared = (before > 0) & (reach[before - 1] > begin)
    twice = np.append(False, end[:-1] > begin[1:])
    for k in np.flatnonzero(shared | twice):
        what = "out" + leaf_of(leaves[order[k]].path)
        if shared[k]:
            raise ValueError(f"{what} shares memory with the updates, which are never written (pass a fresh array)")
        other = name_of(leaves[order[k - 1]].path)
        raise ValueError(f"{what} shares memory with leaf {other} of out (pass fresh arrays)")
