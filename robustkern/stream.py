"""Updates that arrive one after the other: what a rule needs of them is kept, in memory or on disk, and no more."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Hashable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from robustkern.engine import limits
from robustkern.errors import NonFiniteError, brief
from robustkern.functions import NonFinite, aggregate
from robustkern.inputs.arrays import array_view, empty, library_of, pairs
from robustkern.inputs.devices import DeviceArray
from robustkern.inputs.leaves import computed
from robustkern.inputs.trees import PLAIN, adapt, in_the_order_of, jax_array
from robustkern.rules import Mean, TrimmedMean
from robustkern.rules.base import Aggregator, as_aggregator
from robustkern.scalars import as_float, as_int

__all__ = ["Stream"]

#: Values that pass through all kept rows together, so that they stay in the processor's cache.
BLOCK_VALUES = 1 << 15
#: Where a row begins in the file: at a line of the caches.
LINE = 64
#: What a sum is multiplied with where it would overflow: 65535 numbers then stay finite.
ROOM = 2.0**-20
LARGE = 2.0**900


class Stream:
    """Combine updates that arrive one by one, without holding all of them in memory.

    The mean needs one row and the trimmed mean 2f + 1 (and sums in float64); for every other rule, and for weights with
    the trimmed mean, updates are kept in memory up to a limit, and beyond it in a folder.

    Parameters
    ----------
    rule : rule object or str
        As for `aggregate`.
    n : int
        How many updates come at most.
    f, delta
        As for `aggregate`, of n rows.
    memory : int
        Bytes of updates that are kept in memory, for rules that need all of them; others go to `directory`.
    directory : path, optional
        Where a temporary folder is made for them; by default the system's. It is removed with the stream.
    like : one update, optional
        What updates must look like, such as the model: without it the first one says so, whoever sent it.
    centre, seed, nonfinite, backend
        As for `aggregate`.

    Attributes
    ----------
    count : int
        How many updates there are so far.

    Raises
    ------
    TypeError, ValueError
        If a parameter is of the wrong kind or value.

    Notes
    -----
    Adding to a mean costs one read of the update, to a trimmed mean 2f comparisons of each value besides; others copy
    it. The mean is `aggregate`'s within one rounding, the trimmed mean within roundings of the spread of a column's
    values, in whatever order updates come; what is spooled gives its bits. Infinities that all share (masks) are errors
    in a streamed trimmed mean. Use it as a context manager, or `close` it. Threads may share it; it is neither copied
    nor pickled, and of no use in a forked child.

    Examples
    --------
    >>> import numpy as np, robustkern as rk
    >>> with rk.Stream("trimmed_mean", n=4, f=1) as stream:
    ...     for update in ([1.0, 2.0], [3.0, 5.0], [2.0, 3.0], [900.0, -900.0]):
    ...         stream.add(np.array(update))
    ...     stream.result()
    array([2.5, 2.5])
    """

    def __init__(
        self,
        rule: Aggregator | str,
        /,
        *,
        n: int,
        f: int | None = None,
        delta: float | None = None,
        memory: int = 1 << 30,
        directory: str | os.PathLike[str] | None = None,
        like: Any = None,
        centre: Any = None,
        seed: int | None = None,
        nonfinite: NonFinite = "error",
        backend: str = "auto",
    ) -> None:
        self.rule = as_aggregator(rule)
        rows, budget = as_int(n), as_int(memory)
        if rows is None or not 1 <= rows <= 65535:
            raise ValueError(f"Stream: n must be an integer from 1 to 65535; got {brief(n)}")
        if budget is None or budget < 0:
            raise ValueError(f"Stream: memory must be a number of bytes, at least 0; got {brief(memory)}")
        self.n, self.count = rows, 0
        self._f = limits(self.rule, rows, str, f, delta, None).f
        self._trims = self._f if isinstance(self.rule, TrimmedMean) else None
        if isinstance(self.rule, TrimmedMean) and self._f is None:
            raise ValueError(
                "trimmed_mean: f is required, the number of rows that may be Byzantine (pass f= or delta=)"
            )
        self._options: dict[str, Any] = {"f": f, "delta": delta, "centre": centre, "seed": seed}
        self._options |= {"nonfinite": nonfinite, "backend": backend}
        self._spool = _Spool(budget, directory)
        self._form: _Form | None = None if like is None else _Form.of(like)
        self._sums: list[_Mean] | None = None
        self._workers: set[Hashable] = set()
        self._weights: list[float] = []
        self._largest = 0.0  # of the weights in the sums
        self._bad: list[int] = []
        self._halfway = False  # while an update changes what is here
        self._lock, self._owner = threading.RLock(), os.getpid()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Forget the updates, and remove what is on disk."""
        if os.getpid() != self._owner:  # the parent's: its lock may be held by a thread that is not here
            return
        with self._lock:
            self._spool.clear()
            self._sums, self._workers, self._weights, self._bad, self.count = None, set(), [], [], 0
            self._largest, self._halfway = 0.0, False

    def __reduce__(self) -> NoReturn:
        """Refuse copies and pickles: two streams would write to one folder."""
        raise TypeError(
            "Stream: cannot be copied or pickled, what it keeps is in a folder of its own (make another one)"
        )

    def add(self, update: Any, /, *, worker: Hashable = None, weight: float | None = None) -> None:
        """Take one update, which may be changed afterwards.

        Parameters
        ----------
        update : array or pytree of arrays
            In the host's memory, as for `aggregate`; like the others.
        worker : hashable, optional
            Who sent it; each may do so once.
        weight : float, optional
            As one of `weights` of `aggregate`: for all updates, or for none.

        Raises
        ------
        TypeError, ValueError, OSError
            If it is not like the others, or there is no room for it. Then nothing has changed.
        RuntimeError
            If an earlier one was cut short, such as by Ctrl-C, when part of it was in the sums; and in a forked child.
        """
        self._check_owner()
        with self._lock:
            self._add(update, worker, weight)

    def _add(self, update: Any, worker: Hashable, weight: float | None) -> None:
        self._check_whole()
        if self.count == self.n:
            raise ValueError(f"Stream: n={self.n} updates have come already (make a stream of more)")
        if worker is not None and worker in self._workers:
            raise ValueError(f"Stream: worker {brief(worker)} has sent an update already")
        if self.count and (weight is None) != (not self._weights):
            raise ValueError("Stream: give a weight to all updates or to none")
        if weight is not None:
            if not self.rule.supports_weights:
                raise ValueError(f"{self.rule}: weights are not supported (drop weight=)")
            weight = _weight(weight)
        form = self._form if self._form is not None else _Form.of(update)
        leaves = form.leaves_of(update)
        streamed = isinstance(self.rule, Mean) or (self._trims is not None and weight is None)
        streamed = streamed and self._options["nonfinite"] == "error"
        floats = [_floats(leaf) if streamed else None for leaf in leaves]
        values = [x for x in floats if x is not None]
        sums = self._sums
        if streamed and sums is None:
            sums = [_Mean.of(x, self._trims or 0) for x in values]
        # All that is likely to fail comes before anything changes; of sums it would take copies to go back.
        row = self._spool.copied([leaf for leaf, x in zip(leaves, floats, strict=True) if x is None])
        self._halfway = True
        self._spool.append(row)
        if sums is not None:
            self._add_to_sums(sums, values, 1.0 if weight is None else weight)
        if worker is not None:
            self._workers.add(worker)
        if weight is not None:
            self._weights.append(weight)
        self._form, self._sums, self.count = form, sums, self.count + 1
        self._halfway = False

    def _add_to_sums(self, sums: list[_Mean], values: list[NDArray[Any]], weight: float) -> None:
        with np.errstate(all="ignore"):  # whatever the caller has asked NumPy to do
            before, self._largest = self._largest, max(self._largest, weight)
            power = _power(self._largest)
            if before and _power(before) < power:
                for total in sums:
                    total.shrink(_power(before) - power)
            finite = [total.add(x, math.ldexp(weight, -power)) for total, x in zip(sums, values, strict=True)]
        if not all(finite):
            self._bad.append(self.count)

    def _check_owner(self) -> None:
        if os.getpid() != self._owner:
            raise RuntimeError("Stream: was made in another process, of which this is a fork (make one here)")

    def _check_whole(self) -> None:
        if self._halfway:
            raise RuntimeError(
                "Stream: an add was cut short, and part of its update is here (make a new stream, and add all "
                "updates to it)"
            )

    def result(self, *, return_info: bool = False) -> Any:
        """Combine what has come so far; more may come afterwards.

        Parameters
        ----------
        return_info : bool
            Also return an `Info`; not where rows were not kept.

        Returns
        -------
        like one update

        Raises
        ------
        TypeError, ValueError, NonFiniteError
            As `aggregate`; and where none has come, or too few for f.
        RuntimeError
            As `add`.
        """
        self._check_owner()
        with self._lock:
            return self._result(return_info)

    def _result(self, return_info: bool) -> Any:
        self._check_whole()
        if self._form is None or not self.count:
            raise ValueError("Stream: no update has come (add some)")
        if self._f is not None and 2 * self._f >= self.count:
            raise ValueError(f"{self.rule}: 2*f must be below the number of updates; got f={self._f} with {self.count}")
        weights = self._weights or None
        if not self._sums:  # or nothing but integers, of which `aggregate` knows what to do
            rows = [self._form.tree(row) for row in self._spool.rows()]
            options = self._options if self._options["delta"] is not None else self._options | {"f": self._f}
            found, info = aggregate(rows, self.rule, weights=weights, return_info=True, **options)
            result = self._form.like(found)
            return (result, info) if return_info else result
        if return_info:
            raise ValueError(f"{self.rule}: its rows are not kept in a stream, so there is no Info (drop return_info)")
        count = float(self.count if self._trims is None else self.count - 2 * self._trims)
        if weights:
            if not any(weights):
                raise ValueError(f"{self.rule}: weights are all 0; at least one row must have some")
            power = _power(self._largest)
            count = math.fsum(math.ldexp(weight, -power) for weight in weights)
        with np.errstate(all="ignore"):
            means = [total.mean(count) for total in self._sums]
        if self._trims is not None and not all(np.isfinite(mean).all() for mean in means):
            names = ", ".join(map(str, self._bad[:20]))
            raise NonFiniteError(
                f"{self.rule}: {len(self._bad)} rows hold NaN or Inf (rows {names}), more than the f={self._f} that "
                "may be Byzantine; drop them, or raise f",
                tuple(self._bad),
            )
        rest = iter(self._others(weights))
        values = iter(means)
        leaves = [
            next(rest) if _floats(leaf) is None else _shaped(next(values), leaf) for leaf in self._form.empty_leaves
        ]
        with np.errstate(all="ignore"):  # what is rounded to a narrower dtype
            return self._form.like(self._form.tree(leaves))

    def _others(self, weights: list[float] | None) -> list[Any]:
        """Combine what are no floats: counters, and numbers and texts of Python."""
        rows = [list(row) for row in self._spool.rows()]
        if not rows[0]:
            return []
        plain = all(type(leaf) in PLAIN for leaf in rows[0])
        rows = [[*row, np.zeros(0, dtype=np.int64)] for row in rows] if plain else rows
        combine = Mean() if isinstance(self.rule, Mean) else "median"
        found = aggregate(rows, combine, f=self._f if combine == "median" else None, weights=weights)
        return list(found[: len(rows[0]) - plain])


# ---- what updates look like ------------------------------------------------------------------------------------------


class _Form(NamedTuple):
    """What all updates look like.

    Attributes
    ----------
    example : one update
        Of memory that nobody has touched, so that it takes none.
    structure : optree structure
    empty_leaves : list
        Its leaves, as NumPy arrays, or numbers and texts.
    """

    example: Any
    structure: Any
    empty_leaves: list[Any]

    @classmethod
    def of(cls, update: Any) -> _Form:
        """Return the form of an update; raise where it is none."""
        import optree

        adapt([update])  # which says what is wrong with it
        example = optree.tree_map(_untouched, update)
        leaves, structure = optree.tree_flatten(example)
        return cls(example, structure, [leaf if type(leaf) in PLAIN else _view(leaf) for leaf in leaves])

    def leaves_of(self, update: Any) -> list[Any]:
        """Return an update's leaves as NumPy arrays, in the order of the form's; raise where it is not like it."""
        import optree

        adapt([self.example, update])
        leaves, structure = optree.tree_flatten(update)
        if structure != self.structure:  # mappings in another order
            leaves = optree.tree_leaves(
                optree.tree_map(lambda _, leaf: leaf, self.example, in_the_order_of(self.example, update))
            )
        return [leaf if type(leaf) in PLAIN else _view(leaf) for leaf in leaves]

    def tree(self, leaves: Any) -> Any:
        """Return an update with these leaves."""
        import optree

        return optree.tree_unflatten(self.structure, leaves)

    def like(self, found: Any) -> Any:
        """Return a result of NumPy arrays as arrays of the caller's library."""
        import optree

        return optree.tree_map(_filled, self.example, found)


def _view(leaf: Any) -> NDArray[Any]:
    view = array_view(leaf, "an update")
    if isinstance(view, DeviceArray):
        raise TypeError(f"an update is on {view.place}; streams take arrays in the host's memory (move it there)")
    return view


def _untouched(leaf: Any) -> Any:
    if type(leaf) in PLAIN:
        return leaf
    view = _view(leaf)
    return empty(tuple(view.shape), leaf, view)


def _filled(like: Any, value: Any) -> Any:
    if type(like) in PLAIN:
        return value
    view = _view(like)
    target = empty(tuple(view.shape), like, view)
    np.copyto(_view(target), np.asarray(value), casting="unsafe")
    return jax_array(target) if library_of(like) == "jax" else target


def _floats(leaf: Any) -> NDArray[Any] | None:
    """Return a leaf's floats end to end, None where it has none."""
    if type(leaf) in PLAIN:
        return None
    form = computed(leaf.dtype)
    if form is None:
        return None
    x = pairs(leaf) if form.factor == 2 else leaf
    return np.asarray(x.reshape(-1) if x.dtype == form.dtype else x.reshape(-1).astype(form.dtype))


def _shaped(values: NDArray[np.float64], like: NDArray[Any]) -> NDArray[Any]:
    """Return floats that lay end to end as a leaf has them."""
    return (values.view(np.complex128) if like.dtype.kind == "c" else values).reshape(like.shape)


def _weight(weight: Any) -> float:
    """Return a weight as a float; raise where it is none."""
    number = as_float(weight)
    if number is not None and 0 <= number < math.inf:
        return number
    raise ValueError(f"Stream: weight must be finite and not negative; got {brief(weight)}")


# ---- sums ------------------------------------------------------------------------------------------------------------


def _power(largest: float) -> int:
    """Return the power of two of the largest weight, by which all are divided: sums stay finite, and 1 stays 1."""
    return math.frexp(largest)[1] - 1 if largest else 0


class _Mean:
    """The mean of what is left of one leaf's values without the f smallest and the f largest of each column."""

    def __init__(self, d: int, dtype: np.dtype[Any], f: int) -> None:
        self.f, self.count = f, 0
        self.low, self.high = np.empty((f, d), dtype=dtype), np.empty((f, d), dtype=dtype)
        self.sum = np.zeros(d)
        self.lost = np.zeros(d) if dtype == np.float64 else None  # what sums of float64 lose by rounding
        self.scale = 1.0

    @classmethod
    def of(cls, x: NDArray[Any], f: int) -> _Mean:
        """Return the mean of no values like these."""
        kept = x.dtype if x.dtype in (np.float32, np.float64) else np.dtype(np.float32)
        return cls(x.size, kept, f)

    def add(self, x: NDArray[Any], weight: float) -> bool:
        """Take one more value of each column; tell whether all are finite. What has no weight is not looked at."""
        if weight == 0:
            self.count += 1
            return True
        finite = True
        for begin in range(0, x.size, BLOCK_VALUES):
            part = slice(begin, min(begin + BLOCK_VALUES, x.size))
            values = x[part].astype(self.low.dtype)
            finite &= bool(np.isfinite(values).all())
            rest = self._trimmed(values, part)
            if rest is not None:
                self._add(rest, part, weight)
        self.count += 1
        return finite

    def _trimmed(self, x: NDArray[Any], part: slice) -> NDArray[Any] | None:
        """Keep what is among the smallest or largest so far; return what is neither any more. A NaN is the largest."""
        if self.count < self.f:
            self.low[self.count, part] = x
            return None
        for row in self.low[:, part]:
            x, row[:] = np.maximum(row, x), np.fmin(row, x)
        if self.count < 2 * self.f:
            self.high[self.count - self.f, part] = x
            return None
        for row in self.high[:, part]:
            x, row[:] = np.fmin(row, x), np.maximum(row, x)
        return x

    def shrink(self, power: int) -> None:
        """Multiply what is there with a power of two, as weights are."""
        self.sum = np.ldexp(self.sum, power)
        if self.lost is not None:
            self.lost = np.ldexp(self.lost, power)

    def _add(self, x: NDArray[Any], part: slice, weight: float) -> None:
        if self.lost is None:
            self.sum[part] += x if weight == 1 else x * np.float64(weight)
            return
        factor = weight * self.scale
        term = x * factor
        total = self.sum[part] + term
        if self.scale == 1 and (np.isinf(total) & np.isfinite(x)).any():
            self.scale = ROOM
            self.sum *= ROOM
            self.lost *= ROOM
            self._add(x, part, weight)
            return
        back = total - term
        lost = (self.sum[part] - back) + (term - (total - back))
        if math.frexp(factor)[0] != 0.5:
            lost += _product_error(x, factor)
        self.lost[part] += np.where(np.isfinite(lost), lost, 0.0)
        self.sum[part] = total

    def mean(self, count: float) -> NDArray[np.float64]:
        """Return the sum over a count or a weight, rounded once."""
        if self.lost is None:
            return np.asarray(self.sum / count)
        shrunk = np.where(np.abs(self.sum) > LARGE, 2.0**-180, 1.0)  # so that no product below overflows
        total, lost = self.sum * shrunk, self.lost * shrunk
        quotient = total / count
        head = quotient * 134217729.0  # in two halves, of which products with a count are exact
        head -= head - quotient
        rest = (total - head * count) - (quotient - head) * count
        better = quotient + (rest + lost) / count
        return np.where(np.isfinite(better), better, quotient) / shrunk / self.scale


def _product_error(x: NDArray[np.float64], factor: float) -> NDArray[np.float64]:
    """Return what the rounding of products with a factor loses (Dekker): of numbers too large for it, smaller ones."""
    shrunk = np.where(np.abs(x) > LARGE, 2.0**-180, 1.0)
    values = x * shrunk
    head, factor_head = ((y * 134217729.0) - ((y * 134217729.0) - y) for y in (values, np.float64(factor)))
    tail, factor_tail = values - head, factor - factor_head
    lost = ((head * factor_head - values * factor) + head * factor_tail + tail * factor_head) + tail * factor_tail
    return np.asarray(lost / shrunk)


# ---- rows that are kept ----------------------------------------------------------------------------------------------


class _Row(NamedTuple):
    """A row that is kept.

    Attributes
    ----------
    leaves : list
        In memory its leaves; in the file numbers and texts, and shapes and dtypes of arrays.
    begin : int or None
        Where it begins in the file, if it is there.
    nbytes : int
        Of its arrays.
    """

    leaves: list[Any]
    begin: int | None
    nbytes: int


class _Spool:
    """Rows of leaves, in memory up to a limit and then in a file, in a folder of its own."""

    def __init__(self, memory: int, directory: str | os.PathLike[str] | None) -> None:
        self._memory, self._directory, self._held, self._end = memory, directory, 0, 0
        self._rows: list[_Row] = []
        self._file: Path | None = None
        self._remove: Any = None

    def copied(self, leaves: list[Any]) -> _Row:
        """Return a copy of a row; it is kept once it is appended, and overwritten by the next one otherwise."""
        nbytes = sum(leaf.nbytes for leaf in leaves if type(leaf) not in PLAIN)
        if self._held + nbytes <= self._memory:
            return _Row([leaf if type(leaf) in PLAIN else np.array(leaf, order="C") for leaf in leaves], None, nbytes)
        if self._file is None:
            folder = Path(tempfile.mkdtemp(prefix="robustkern-stream-", dir=self._directory))
            self._remove = weakref.finalize(self, _removed, folder, os.getpid())
            open(folder / "updates.rows", "xb").close()  # never somebody else's
            self._file = folder / "updates.rows"
        begin = -(-self._end // LINE) * LINE
        try:
            with open(self._file, "r+b") as file:
                file.seek(begin)
                for leaf in leaves:
                    if type(leaf) not in PLAIN:
                        file.write(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
        except OSError as error:
            if error.filename is None:
                raise OSError(error.errno, error.strerror, str(self._file)) from None
            raise
        kinds = [leaf if type(leaf) in PLAIN else (leaf.shape, leaf.dtype) for leaf in leaves]
        return _Row(kinds, begin, nbytes)

    def append(self, row: _Row) -> None:
        """Keep a copied row."""
        self._rows.append(row)
        if row.begin is None:
            self._held += row.nbytes
        else:
            self._end = row.begin + row.nbytes

    def rows(self) -> list[list[Any]]:
        """Return the rows; those in the file as parts of one memory map."""
        data = np.zeros(0, dtype=np.uint8)
        if self._file is not None and self._end:
            data = np.asarray(np.memmap(self._file, dtype=np.uint8, mode="r", shape=(self._end,)))
        return [row.leaves if row.begin is None else _found(data, row.begin, row.leaves) for row in self._rows]

    def clear(self) -> None:
        """Forget all rows."""
        self._rows, self._held, self._end, self._file = [], 0, 0, None
        if self._remove is not None:
            self._remove()


def _found(data: NDArray[np.uint8], at: int, kinds: list[Any]) -> list[Any]:
    """Return a row's leaves in the file's bytes."""
    leaves: list[Any] = []
    for kind in kinds:
        if type(kind) in PLAIN:
            leaves.append(kind)
            continue
        shape, dtype = kind
        count = math.prod(shape) * dtype.itemsize
        leaves.append(data[at : at + count].view(dtype).reshape(shape))
        at += count
    return leaves


def _removed(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked child's stream is its parent's
        shutil.rmtree(folder, ignore_errors=True)
