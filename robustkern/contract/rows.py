"""Rows as pointers: n update vectors used where they lie, and where they come from.

A `Source` yields them block by block: from memory all at once, from files one tensor after the other, from ranks each
its own columns. All that an aggregation adds up over the columns goes through the source's `total` and `passed`, so
that columns which lie on several machines are one more source and nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

__all__ = [
    "DTYPES",
    "MAX_ROWS",
    "Block",
    "Matrix",
    "Place",
    "PlainLeaf",
    "Rows",
    "RowsInFiles",
    "Source",
    "Stretches",
    "Vector",
    "address_of",
    "one_segment",
]

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]
T = TypeVar("T")

#: The dtypes of rows, in the order of their codes in csrc/kernels.h.
DTYPES: tuple[np.dtype[Any], ...] = (
    np.dtype(np.float16),
    np.dtype(ml_dtypes.bfloat16),
    np.dtype(np.float32),
    np.dtype(np.float64),
)
MAX_ROWS = 65535


def address_of(array: NDArray[Any]) -> int:
    """Return where the first element of an array lies."""
    return int(array.__array_interface__["data"][0])


class _Memory:
    """Lets NumPy view memory that somebody else keeps alive."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__array_interface__ = {"version": 3, "shape": (nbytes,), "typestr": "|u1", "data": (address, False)}


class Place(Protocol):
    """A GPU, as the array library of the rows sees it."""

    @property
    def device(self) -> int:
        """Return its number."""

    @property
    def waits(self) -> bool:
        """Tell whether others than the caller's stream may use a result: the call then waits until it is there."""

    def stream(self) -> int:
        """Return the handle of the stream that the caller works on."""

    def empty(self, shape: Sequence[int], dtype: np.dtype[Any]) -> Any:
        """Allocate an array there; its `address` tells where."""


@functools.lru_cache(maxsize=64)
def one_segment(d: int) -> NDArray[np.int64]:
    """Return the offsets of d columns in one piece, shared by all rows of that length."""
    offsets = np.array([0, d], dtype=np.int64)
    offsets.flags.writeable = False
    return offsets


@dataclass(eq=False, slots=True)
class Rows:
    """n rows of one dtype, cut into the same segments, used where they lie.

    Parameters
    ----------
    addresses : (n_segments, n) uint64
        Where each row's part of each segment begins: contiguous values, at any alignment.
    offsets : (n_segments + 1,) int64
        Running count of columns; ``offsets[0] == 0``, ``offsets[-1]`` is d.
    dtype : numpy dtype
        One of `DTYPES`.
    owner : object
        Keeps the memory alive.
    place : Place, optional
        The GPU that the addresses belong to; None: they are the host's.
    """

    addresses: NDArray[np.uint64]
    offsets: NDArray[np.int64]
    dtype: np.dtype[Any]
    owner: Any
    place: Place | None = None

    @classmethod
    def of(cls, arrays: NDArray[Any] | Sequence[NDArray[Any]]) -> Rows:
        """One segment: the contiguous rows of an (n, ...) array, or equally long contiguous 1-D arrays."""
        if isinstance(arrays, np.ndarray):
            n, first, step = len(arrays), address_of(arrays), arrays.strides[0]
            if step != 0:
                addresses = np.arange(first, first + n * step, step, dtype=np.uint64)
            else:
                addresses = np.full(n, first, dtype=np.uint64)
            return cls(addresses[None], one_segment(arrays.size // n), arrays.dtype, arrays)
        addresses = np.array([address_of(a) for a in arrays], dtype=np.uint64)
        return cls(addresses[None], one_segment(arrays[0].shape[0]), arrays[0].dtype, arrays)

    @property
    def n(self) -> int:
        """Number of rows."""
        return int(self.addresses.shape[1])

    @property
    def d(self) -> int:
        """Number of columns over all segments."""
        return int(self.offsets[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.n * self.d * self.dtype.itemsize

    def take(self, rows: NDArray[np.intp] | Sequence[int]) -> Rows:
        """Return the given rows only; no data is touched."""
        return Rows(np.ascontiguousarray(self.addresses[:, rows]), self.offsets, self.dtype, self.owner, self.place)

    def array(self, segment: int, row: int) -> NDArray[Any]:
        """Return one row's part of one segment as a NumPy view; only of rows in the host's memory."""
        count = int(self.offsets[segment + 1] - self.offsets[segment])
        memory = _Memory(int(self.addresses[segment, row]), count * self.dtype.itemsize)
        return np.asarray(memory).view(self.dtype)

    def matrix(self, segment: int) -> NDArray[Any]:
        """Return all rows' parts of one segment, (n, m): a copy; only of rows in the host's memory."""
        first, count = self.addresses[segment].astype(np.int64), int(self.offsets[segment + 1] - self.offsets[segment])
        step = int(first[1] - first[0]) if len(first) > 1 else 0
        if count and step >= count * self.dtype.itemsize and (np.diff(first) == step).all():  # of one array, perhaps
            begin, length = int(first[0]), step * (len(first) - 1) + count * self.dtype.itemsize
            result = np.empty((len(first), count), dtype=self.dtype)
            # Between rows that are not of one array anything may lie, the copy too; NumPy then cannot tell whether it
            # overlaps them, and makes copies of copies until its stack ends.
            if not begin - result.nbytes < address_of(result) < begin + length:
                memory = np.asarray(_Memory(begin, length))
                whole = np.lib.stride_tricks.as_strided(memory, (len(first), count * self.dtype.itemsize), (step, 1))
                result.view(np.uint8)[:] = whole
                return result
        return np.stack([self.array(segment, i) for i in range(self.n)])

    def sampled(self, runs: int, width: int) -> Rows:
        """Return some runs of at most so many columns, evenly spaced over all of them; no data is touched."""
        begins = (2 * np.arange(runs) + 1) * self.d // (2 * runs)
        at = np.searchsorted(self.offsets, begins, side="right") - 1
        counts = np.minimum(width, self.offsets[at + 1] - begins)
        addresses = self.addresses[at] + ((begins - self.offsets[at]) * self.dtype.itemsize).astype(np.uint64)[:, None]
        offsets = np.append(0, np.cumsum(counts))
        return Rows(np.ascontiguousarray(addresses), offsets, self.dtype, self.owner, self.place)

    def joined(self, others: Rows) -> Rows:
        """Return these rows and others with the same segments behind them; no data is touched."""
        addresses = np.concatenate([self.addresses, others.addresses], axis=1)
        return Rows(addresses, self.offsets, self.dtype, (self.owner, others.owner), self.place)

    def scratch(self) -> Rows:
        """Return new memory for one row with the same segments, where these lie."""
        memory: Any
        if self.place is None:
            memory = np.empty(self.d, dtype=self.dtype)
            first = address_of(memory)
        else:
            memory = self.place.empty((self.d,), self.dtype)
            first = memory.address
        addresses = (first + self.offsets[:-1] * self.dtype.itemsize).astype(np.uint64)
        return Rows(addresses[:, None], self.offsets, self.dtype, memory, self.place)

    def blocks(self, max_columns: int) -> Iterator[Rows]:
        """Cut the columns into consecutive blocks of at most `max_columns` within each segment."""
        for s, addresses in enumerate(self.addresses):
            for begin in range(0, int(self.offsets[s + 1] - self.offsets[s]), max_columns):
                end = min(begin + max_columns, int(self.offsets[s + 1] - self.offsets[s]))
                part = addresses + np.uint64(begin * self.dtype.itemsize)
                yield Rows(part[None], one_segment(end - begin), self.dtype, self.owner, self.place)


class Stretches(NamedTuple):
    """Where rows lie in files, a stretch of each, for compiled code that reads some of the columns at a time.

    Attributes
    ----------
    files, places : (n,) int64
        Descriptors, and where a row begins in its file.
    nbytes : int
        Of each row.
    part : int
        So many of them at a time: whole pages.
    key, point
        Of the hash of each part, see `robustkern.files.digest`; without a key nothing is hashed.
    digests : (parts, n) uint64
        Written.
    memory, memory_bytes : int
        Address, on a page's border, and size: for what is on the way from a file into a kernel, by any thread.
    """

    files: NDArray[np.int64]
    places: NDArray[np.int64]
    nbytes: int
    part: int
    key: NDArray[np.uint32] | None
    point: int
    digests: NDArray[np.uint64]
    memory: int
    memory_bytes: int


class RowsInFiles(Rows):
    """Rows of one segment that lie in files: read when somebody asks for their addresses, or by a kernel as it goes.

    Parameters
    ----------
    n, offsets, dtype, owner
        As of `Rows`.
    load : callable
        Reads them into memory, and returns the addresses.
    pass_by : callable
        Calls what it is given with `Stretches`, and returns false where not all could be read: `load` tells why.
    """

    __slots__ = ("_count", "_load", "_loaded", "_pass_by")

    def __init__(
        self,
        n: int,
        offsets: NDArray[np.int64],
        dtype: np.dtype[Any],
        owner: Any,
        load: Callable[[], NDArray[np.uint64]],
        pass_by: Callable[[Callable[[Stretches], bool]], bool],
    ) -> None:
        self.offsets, self.dtype, self.owner, self.place = offsets, dtype, owner, None
        self._count, self._load, self._pass_by = n, load, pass_by
        self._loaded: NDArray[np.uint64] | None = None

    @property
    def addresses(self) -> NDArray[np.uint64]:  # type: ignore[override]
        """Where each row begins, now that it is in memory."""
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    @property
    def n(self) -> int:
        """Number of rows."""
        return self._count

    def read_by(self, kernel: Callable[[Stretches], bool]) -> bool:
        """Have a kernel read the rows, each value once into its caches; false where their addresses are to be taken.

        For they are in memory, or something is wrong with them.
        """
        return self._loaded is None and self._pass_by(kernel)


class Block(NamedTuple):
    """Some columns of all rows, and where their result goes: one `Rows` for each dtype.

    Where the caller gave a centre, it is one more row behind the n of the source.
    """

    rows: tuple[Rows, ...]
    out: tuple[Rows, ...]


class PlainLeaf(NamedTuple):
    """A number or text of Python in all rows, such as an optimizer's settings.

    Attributes
    ----------
    name : str
        How an error calls it.
    value : number or text
        What most rows share, which the result has.
    differing : (n,) bool
        Rows that have something else.
    """

    name: str
    value: Any
    differing: NDArray[np.bool_]


class Source(Protocol):
    """n rows that come block by block, perhaps followed by a centre.

    Attributes
    ----------
    n, d : int
        Rows, and floating-point columns: all of them, wherever they lie.
    dtypes : set of numpy dtypes
        Of the rows.
    device : str
        Where they are, as in the capability table.
    has_centre : bool
        Whether the rows of a block are n + 1, the last of them a centre that the caller gave.
    divided : bool
        Whether others hold columns too; where not, nobody need ask for what they find.
    plain : sequence of PlainLeaf
        Leaves that are no arrays.
    combine : callable
        See `robustkern.contract.counters.Combine`; the engine sets it.
    """

    n: int
    d: int
    dtypes: set[np.dtype[Any]]
    device: str
    has_centre: bool
    plain: Sequence[PlainLeaf]
    combine: Any  # a `Combine`; as such mypy takes it for a method

    @property
    def divided(self) -> bool:
        """See above."""

    def blocks(self) -> Iterable[Block]:
        """Return the blocks; may be called again for another pass."""

    def results(self) -> Iterable[Block]:
        """Return the blocks once more to have results written, which the source may take when it is asked for more."""

    def row_name(self, row: int) -> str:
        """Return how an error should call a row."""

    def total(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the sum of a small array over all who hold columns, the same bits for each of them."""

    def passed(self, passes: Any, name: str, arguments: tuple[Any, ...], add: bool) -> list[NDArray[np.float64]]:
        """Make a pass over the data, a method of `passes`; return what it finds in the columns of each who holds some.

        In the order of the columns; those to `add`, if they are large, as the one that they add up to.
        """

    def once(self, work: Callable[[], T], passes: Any) -> T:
        """Return what `work` returns, or raise what it raises, for the one of all who hold columns whose word counts.

        It may make `passes`. So what follows from them is solved once: processors differ in last bits, and a choice
        must not.
        """


class Undivided:
    """What a `Source` is whose columns are all here."""

    __slots__ = ()
    divided: ClassVar[bool] = False

    def total(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the sum over all who hold columns: there is nobody else."""
        return x

    def passed(self, passes: Any, name: str, arguments: tuple[Any, ...], add: bool) -> list[NDArray[np.float64]]:
        """Make a pass over the data."""
        return [getattr(passes, name)(*arguments)]

    def once(self, work: Callable[[], T], passes: Any) -> T:
        """Return what `work` returns."""
        return work()
