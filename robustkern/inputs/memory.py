"""From the caller's updates to rows as pointers, and from the result back to the caller's kind.

An update is an array or a pytree of arrays. Its floating-point leaves are cut into segments that are used where
they lie; leaves whose last axis is not contiguous are copied in blocks of bounded size. Integer and boolean
leaves (counters, such as BatchNorm's) are no coordinates: they take no part in any distance, and the result holds
their column-wise lower median, an actual value that at least half of the rows do not exceed.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np
from array_api_compat import is_numpy_array, is_torch_array
from numpy.typing import NDArray

from robustkern.contract.rows import DTYPES, MAX_ROWS, Rows, one_segment
from robustkern.errors import BackendUnavailable
from robustkern.inputs.addresses import address_of, addresses_of
from robustkern.inputs.devices import DeviceArray, Place, view_of

__all__ = ["Block", "MemorySource", "Source", "adapt", "name_of", "view_on_host"]

MIN_RUN_BYTES = 1024  # shorter contiguous runs are gathered into blocks: their addresses would take 1 % of memory
BLOCK_BYTES = 1 << 22

View = NDArray[Any] | DeviceArray


class Block(NamedTuple):
    """Some columns of all rows, one `Rows` for each dtype, and where their result goes."""

    rows: tuple[Rows, ...]
    out: tuple[Rows, ...]


class Source(Protocol):
    """n rows that come block by block: from memory all at once, from files one tensor after the other."""

    n: int
    dtypes: set[np.dtype[Any]]
    d: int
    device: str  # as in the capability table

    def blocks(self) -> Iterator[Block]:
        """Yield the blocks; may be called again for another pass."""

    def row_name(self, row: int) -> str:
        """Return how an error should call a row."""


@dataclass
class Leaf:
    """One leaf of all rows, and the memory of its result."""

    path: tuple[Any, ...]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    arrays: Any  # n, or one with a leading axis of n; views unless there are addresses
    out: Any
    addresses: NDArray[np.int64] | None = None  # (n + 1,), the result's last, where all are known to be contiguous
    place: Place | None = None

    @property
    def size(self) -> int:
        """Number of columns."""
        return math.prod(self.shape)

    def bounds(self) -> Iterator[tuple[NDArray[np.int64], int]]:
        """Yield first bytes of the rows, and how many bytes from there may be theirs."""
        if self.addresses is not None:
            yield self.addresses[:-1], self.size * self.dtype.itemsize
            return
        for source in self.arrays if isinstance(self.arrays, list) else [self.arrays]:
            reach = [(size - 1) * stride for size, stride in zip(source.shape, source.strides, strict=True)]
            low = sum(step for step in reach if step < 0)
            yield np.array([_address(source) + low]), sum(map(abs, reach)) + source.itemsize


class MemorySource:
    """Rows in memory."""

    @classmethod
    def of_rows(cls, rows: Rows, out: Rows) -> MemorySource:
        """Return the source of rows that lie in one piece each: the usual case, kept short for small calls."""
        source = cls.__new__(cls)
        source.n, source.d, source.dtypes = rows.n, rows.d, {rows.dtype}
        source.counters, source._strided, source._direct = [], [], Block((rows,), (out,))
        source.place, source.device = rows.place, "cpu" if rows.place is None else "cuda"
        return source

    def __init__(self, n: int, leaves: list[Leaf]) -> None:
        self.n = n
        floating = [leaf for leaf in leaves if leaf.dtype in DTYPES]
        self.counters = [leaf for leaf in leaves if leaf.dtype not in DTYPES]
        self.dtypes = {leaf.dtype for leaf in floating}
        self.d = sum(leaf.size for leaf in floating)
        self.place: Place | None = leaves[0].place
        self.device = "cpu" if self.place is None else "cuda"
        self._strided: list[Leaf] = []
        self._direct = self._group(floating)

    def _group(self, leaves: list[Leaf]) -> Block:
        """Join the segments of all leaves that can be used in place, by dtype."""
        parts: dict[np.dtype[Any], list[tuple[NDArray[np.int64], int]]] = {}
        for leaf in leaves:
            if leaf.size == 0:
                continue
            segments = _segments(leaf)
            if segments is None:
                self._strided.append(leaf)
            else:
                parts.setdefault(leaf.dtype, []).append(segments)
        rows, out = [], []
        for dtype, group in parts.items():
            tables, runs = zip(*group, strict=True)
            table = np.concatenate(tables).view(np.uint64)
            if len(table) == 1:
                offsets = one_segment(runs[0])
            else:
                offsets = np.zeros(len(table) + 1, dtype=np.int64)
                np.cumsum(np.repeat(runs, [len(each) for each in tables]), out=offsets[1:])
            rows.append(Rows(np.ascontiguousarray(table[:, :-1]), offsets, dtype, self, self.place))
            out.append(Rows(np.ascontiguousarray(table[:, -1:]), offsets, dtype, self, self.place))
        return Block(tuple(rows), tuple(out))

    def blocks(self) -> Iterator[Block]:
        """Yield what lies contiguous as one block, then copies of the rest."""
        if self._direct.rows:
            yield self._direct
        for leaf in self._strided:
            if leaf.place is not None:
                yield from _copied_blocks(leaf, leaf.place)
                continue
            columns = max(BLOCK_BYTES // (self.n * leaf.dtype.itemsize), 1)
            target = leaf.out.reshape(-1)
            for begin in range(0, target.size, columns):
                end = min(begin + columns, target.size)
                values = np.empty((self.n, end - begin), dtype=leaf.dtype)
                for i in range(self.n):
                    row = leaf.arrays[i]
                    values[i] = row[begin:end] if row.ndim == 1 else row.flat[begin:end]
                yield Block((Rows.of(values),), (Rows.of(target[None, begin:end]),))

    def row_name(self, row: int) -> str:
        """Return how an error should call a row."""
        return str(row)

    def combine_counters(self) -> None:
        """Write the column-wise lower median of integer and boolean leaves."""
        for leaf in self.counters:
            if leaf.place is not None:
                _combine_on_host(leaf, leaf.place)
                continue
            target = leaf.out.reshape(-1)
            columns = max(BLOCK_BYTES // (self.n * leaf.dtype.itemsize), 1)
            for begin in range(0, target.size, columns):
                end = min(begin + columns, target.size)
                values = np.stack([np.asarray(leaf.arrays[i]).flat[begin:end] for i in range(self.n)])
                target[begin:end] = lower_median(values)


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


def _combine_on_host(leaf: Leaf, place: Place) -> None:
    """Write the lower median of integers or booleans, which are few (counters) and go through the host."""
    values = np.stack([place.library.to_host(leaf.arrays[i].array) for i in range(len(leaf.arrays))])
    place.library.assign(leaf.out.array, lower_median(values).astype(leaf.dtype))


def lower_median(values: NDArray[Any]) -> NDArray[Any]:
    """Return the column-wise lower median of (n, m) integers or booleans."""
    middle = (len(values) - 1) // 2
    return np.asarray(np.partition(values, middle, axis=0)[middle])


def _segments(leaf: Leaf) -> tuple[NDArray[np.int64], int] | None:
    """Addresses (n_segments, n + 1) of equal contiguous runs and of their result, or None where there are none."""
    if leaf.addresses is not None:
        return leaf.addresses[None], leaf.size
    arrays, item = leaf.arrays, leaf.dtype.itemsize
    if isinstance(arrays, (np.ndarray, DeviceArray)):
        strides = [arrays.strides[1:]]
        base = _address(arrays) + arrays.strides[0] * np.arange(len(arrays), dtype=np.int64)
    else:
        strides = [a.strides for a in arrays]
        base = np.array([_address(a) for a in arrays], dtype=np.int64)
    axes = min(_contiguous_axes(leaf.shape, s, item) for s in set(strides))
    outer = leaf.shape[: len(leaf.shape) - axes]
    run = math.prod(leaf.shape[len(outer) :])
    if outer and run * item < MIN_RUN_BYTES:
        return None
    index = np.indices(outer, dtype=np.int64).reshape(len(outer), math.prod(outer))
    table = np.empty((index.shape[1], len(base) + 1), dtype=np.int64)
    # One row of strides serves all rows of one array.
    table[:, :-1] = (np.array(strides, dtype=np.int64)[:, : len(outer)] @ index).T + base
    table[:, -1] = _address(leaf.out) + run * item * np.arange(len(table), dtype=np.int64)
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


# ---- from and to the caller's arrays ---------------------------------------------------------------------------


def name_of(path: tuple[Any, ...]) -> str:
    """Return how an error should call a leaf."""
    return "".join(f"[{key!r}]" for key in path)


def _where(path: tuple[Any, ...]) -> str:
    return f", leaf {name_of(path)}" if path else ""


def _describe(x: Any) -> str:
    shape = getattr(x, "shape", None)
    if not isinstance(shape, (tuple, list)):
        return type(x).__name__
    return f"{type(x).__name__} of shape {tuple(shape)} and dtype {getattr(x, 'dtype', None)}"


def _address(view: View) -> int:
    return view.address if isinstance(view, DeviceArray) else address_of(view)


def _place(view: View) -> Place | None:
    return view.place if isinstance(view, DeviceArray) else None


def _view(x: Any, what: str) -> View:
    """Return an array in the host's memory as a NumPy view, one on a GPU as its description; nothing is copied."""
    if type(x) is np.ndarray:
        return x
    on_device = view_of(x, what)
    if on_device is not None:
        return on_device
    if is_torch_array(x):
        import torch

        if getattr(x, "is_nested", False) or x.layout != torch.strided:
            raise TypeError(f"{what} is a torch tensor of layout {x.layout}; expected a dense one (pass x.to_dense())")
        if x.is_quantized or x.is_complex():
            raise TypeError(f"{what} has dtype {x.dtype}; expected float16, bfloat16, float32, float64 or an integer")
        try:
            if x.requires_grad:
                x = x.detach()
            if x.is_neg():
                x = x.resolve_neg()
            array: NDArray[Any] = x.view(torch.int16).numpy() if x.dtype == torch.bfloat16 else x.numpy()
            return array.view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else array
        except (RuntimeError, TypeError) as error:  # tensors without memory of their own, dtypes NumPy lacks
            raise TypeError(f"{what} is a torch tensor that NumPy cannot view: {error}") from None
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{what} is a masked array, whose mask would be lost (pass x.filled(numpy.nan))")
    if is_numpy_array(x) or isinstance(x, np.generic):
        return np.asarray(x)
    raise TypeError(
        f"{what} is {_describe(x)}; expected a NumPy array, a torch tensor, or an array on a GPU that speaks DLPack "
        "(pass numpy.asarray(x))"
    )


def view_on_host(x: Any, what: str) -> NDArray[Any]:
    """Return an array of rows in the host's memory as a NumPy view; raise where it is no such array."""
    view = _view(x, what)
    if isinstance(view, DeviceArray):
        raise BackendUnavailable(f"{what} are on {view.place}; this runs on arrays in the host's memory only")
    _check_dtype(view.dtype, what, False)
    return view


@functools.lru_cache(maxsize=256)
def _check_dtype(dtype: np.dtype[Any], what: str, integers: bool) -> None:
    if dtype in DTYPES:
        return
    if integers and dtype.kind in "iub" and dtype.isnative:
        return
    known = "float16, bfloat16, float32 or float64" + (" (or an integer counter)" if integers else "")
    remedy = (
        "swap its bytes: x.astype(x.dtype.newbyteorder('='))"
        if not dtype.isnative
        else "convert it, x.astype('float32')"
    )
    raise TypeError(f"{what} has dtype {dtype}; expected {known} ({remedy})")


def _library(x: Any) -> str:
    if is_torch_array(x):
        return "torch"
    return "numpy" if is_numpy_array(x) or isinstance(x, np.generic) else type(x).__module__.partition(".")[0]


def _empty(shape: tuple[int, ...], like: Any, view: View) -> Any:
    if isinstance(view, DeviceArray):
        return view.place.empty(shape, view.dtype).array
    if isinstance(like, (np.ndarray, np.generic)):
        return np.empty(shape, dtype=like.dtype)
    return _empty_tensor(shape, like)


def _empty_tensor(shape: tuple[int, ...], like: Any) -> Any:
    import torch

    return torch.empty(shape, dtype=like.dtype)


def _check_out(out: Any, shape: tuple[int, ...], like: Any, view_like: View, what: str) -> Any:
    if _library(out) != _library(like) or not (hasattr(out, "shape") and hasattr(out, "dtype")):
        raise TypeError(f"{what} is {_describe(out)}; expected a {_library(like)} array like the updates")
    if tuple(out.shape) != shape or out.dtype != like.dtype:
        raise ValueError(
            f"{what} has shape {tuple(out.shape)} and dtype {out.dtype}; expected shape {shape} and dtype {like.dtype}"
        )
    view = _view(out, what)
    if _place(view) != _place(view_like):
        raise ValueError(f"{what} is on {_where_is(view)}; expected {_where_is(view_like)} like the updates")
    if not view.flags.c_contiguous or not view.flags.writeable or not view.flags.aligned:
        raise ValueError(f"{what} must be contiguous, aligned and writeable (pass a fresh array)")
    return out


def _where_is(view: View) -> str:
    return "cpu" if isinstance(view, np.ndarray) else str(view.place)


def _check_disjoint(leaves: list[Leaf]) -> None:
    """Raise where the memory of a result overlaps an update's or another result's, as far as their bounds tell."""
    leaves = [leaf for leaf in leaves if leaf.size]
    if not leaves:
        return
    starts, sizes = zip(*(bounds for leaf in leaves for bounds in leaf.bounds()), strict=True)
    low = np.concatenate(starts)
    high = low + np.repeat(sizes, [len(each) for each in starts])
    order = np.argsort(low)
    low, reach = low[order], np.maximum.accumulate(high[order])
    begin = np.array([_address(leaf.out) if leaf.addresses is None else leaf.addresses[-1] for leaf in leaves])
    end = begin + [leaf.size * leaf.dtype.itemsize for leaf in leaves]
    order = np.argsort(begin)
    begin, end = begin[order], end[order]
    before = np.searchsorted(low, end)  # so many rows' parts begin before a result ends: does one reach into it?
    shared = (before > 0) & (reach[before - 1] > begin)
    twice = np.append(False, end[:-1] > begin[1:])
    for k in np.flatnonzero(shared | twice):
        what = "out" + _where(leaves[order[k]].path)
        if shared[k]:
            raise ValueError(f"{what} shares memory with the updates, which are never written (pass a fresh array)")
        other = name_of(leaves[order[k - 1]].path)
        raise ValueError(f"{what} shares memory with leaf {other} of out (pass fresh arrays)")


def _check_count(n: int) -> None:
    if not 1 <= n <= MAX_ROWS:
        raise ValueError(f"updates: expected between 1 and {MAX_ROWS} rows; got {n}")


def adapt(updates: Any, out: Any = None) -> tuple[MemorySource, Callable[[], Any]]:
    """Turn updates into rows.

    Parameters
    ----------
    updates : array of shape (n, ...), sequence of n arrays, or sequence of n pytrees of arrays
        NumPy (ml_dtypes included), torch, or on a GPU CuPy and what speaks DLPack; never written, never copied whole.
    out : like one update, optional
        Receives the result.

    Returns
    -------
    source : MemorySource
        The rows.
    restore : callable
        Returns the result in the caller's kind, once it has been computed.

    Raises
    ------
    TypeError, ValueError
        If the updates are not of one kind, structure, shape and dtype; the message names the row and leaf.
    """
    if isinstance(updates, np.ndarray) or is_torch_array(updates) or hasattr(updates, "__dlpack_device__"):
        return _adapt_stacked(updates, out)
    if isinstance(updates, (str, bytes, Mapping)) or not isinstance(updates, Sequence):
        raise TypeError(
            f"updates is {_describe(updates)}; expected an array of shape (n, ...) or a list with one array or "
            "one pytree of arrays for each of the n workers"
        )
    _check_count(len(updates))
    if all(type(u) is np.ndarray for u in updates):
        leaf, result = _make_leaf(updates, (), out)
        if out is not None:
            _check_disjoint([leaf])
        return MemorySource(len(updates), [leaf]), lambda: result
    try:
        return _adapt_trees(updates, out)
    except RecursionError:
        raise ValueError("updates: a pytree is nested too deeply, or contains itself") from None


def _is_plain(array: NDArray[Any], out: Any) -> bool:
    return out is None and array.flags.c_contiguous and array.size > 0


def _adapt_stacked(updates: Any, out: Any) -> tuple[MemorySource, Callable[[], Any]]:
    array = _view(updates, "updates")
    if array.ndim < 2:
        raise ValueError(
            f"updates: expected an array of shape (n, ...) with at least 2 axes; got shape {array.shape} "
            "(for one number a row pass x[:, None])"
        )
    _check_count(array.shape[0])
    _check_dtype(array.dtype, "updates", False)
    shape = array.shape[1:]
    result = _empty(shape, updates, array) if out is None else _check_out(out, shape, updates, array, "out")
    target = _view(result, "out")
    if isinstance(array, np.ndarray) and isinstance(target, np.ndarray) and _is_plain(array, out):
        return MemorySource.of_rows(Rows.of(array), Rows.of(target.reshape(1, -1))), lambda: result
    leaf = Leaf((), shape, array.dtype, array, target, place=_place(array))
    if out is not None:
        _check_disjoint([leaf])
    return MemorySource(array.shape[0], [leaf]), lambda: result


_TORCH_LOOK = operator.attrgetter("__class__", "dtype", "shape", "layout", "is_cpu")


@functools.cache
def _torch_kinds() -> tuple[frozenset[Any], dict[Any, np.dtype[Any]], Any]:
    """Classes of plain tensors, NumPy's names of torch's dtypes, and the dense layout."""
    import torch

    dtypes = {getattr(torch, dtype.name): dtype for dtype in DTYPES}
    return frozenset((torch.Tensor, torch.nn.Parameter)), dtypes, torch.strided


def _look(values: Sequence[Any]) -> tuple[np.dtype[Any], list[int]] | None:
    """Return dtype and addresses of plain contiguous arrays that are all alike: the usual case, without a view of each.

    None sends all others to `_make_leaf`'s loop, which also finds the words for what cannot be used.
    """
    first = values[0]
    if type(first) is np.ndarray:
        found = addresses_of(values) if first.dtype in DTYPES else None
        return None if found is None else (first.dtype, found)
    if not is_torch_array(first):
        return None
    classes, dtypes, dense = _torch_kinds()
    if first.dtype not in dtypes or not classes.issuperset(map(type, values)):
        return None
    try:
        looks = [*map(_TORCH_LOOK, values)]
        if looks.count(looks[0]) != len(looks) or looks[0][3:] != (dense, True):
            return None
        if not all(value.is_contiguous() and not value.is_neg() for value in values):
            return None
        addresses = [value.data_ptr() for value in values]
    except RuntimeError:  # no shape (nested tensors), or no memory of its own
        return None
    return (dtypes[first.dtype], addresses) if all(addresses) else None


def _make_leaf(values: Sequence[Any], path: tuple[Any, ...], out: Any) -> tuple[Leaf, Any]:
    """Check that all rows have the same leaf, and allocate its result."""
    like = values[0]
    looked = _look(values if out is None else (*values, out))
    if looked is not None:
        dtype, addresses = looked
        shape = tuple(like.shape)
        result = out
        if out is None:
            result = np.empty(shape, dtype=like.dtype) if type(like) is np.ndarray else _empty_tensor(shape, like)
            addresses.append(address_of(result) if isinstance(result, np.ndarray) else result.data_ptr())
        writeable = out is None or type(out) is not np.ndarray or out.flags.writeable
        if writeable and addresses[-1] % dtype.alignment == 0:
            return Leaf(path, shape, dtype, values, result, np.array(addresses, dtype=np.int64)), result
    where, arrays = _where(path), []
    for i, value in enumerate(values):
        array = _view(value, f"row {i}{where}")
        if i == 0:
            first = array
            _check_dtype(array.dtype, f"row 0{where}", bool(path))
        elif type(value) is not type(like) and _library(value) != _library(like):
            raise TypeError(
                f"row {i}{where} is a {_library(value)} array, row 0 a {_library(like)} array (convert one)"
            )
        elif _place(array) != _place(first):
            raise ValueError(f"row {i}{where} is on {_where_is(array)}, row 0 on {_where_is(first)} (move one)")
        elif array.shape != first.shape or array.dtype != first.dtype:
            raise ValueError(
                f"row {i}{where} has shape {array.shape} and dtype {array.dtype}; "
                f"row 0 has shape {first.shape} and dtype {first.dtype}"
            )
        arrays.append(array)
    shape = first.shape
    result = _empty(shape, like, first) if out is None else _check_out(out, shape, like, first, f"out{where}")
    return Leaf(path, shape, first.dtype, arrays, _view(result, f"out{where}"), place=_place(first)), result


def _adapt_trees(updates: Sequence[Any], out: Any) -> tuple[MemorySource, Callable[[], Any]]:
    import optree

    paths, leaves, spec = optree.tree_flatten_with_path(updates[0])
    if not leaves:
        raise ValueError("row 0 holds no arrays; expected an array or a pytree of arrays")
    # What is an array needs no look into optree's registry, which is most of its time.
    is_leaf = functools.partial(type.__instancecheck__, type(leaves[0]))
    rows = [leaves]
    for i, update in enumerate(updates[1:], start=1):
        row, row_spec = optree.tree_flatten(update, is_leaf)
        if row_spec != spec:
            raise ValueError(f"row {i} {_difference(paths, update)} (structure {row_spec}, in row 0 {spec})")
        rows.append(row)
    targets: list[Any] = [None] * len(leaves)
    if out is not None:
        targets, out_spec = optree.tree_flatten(out, is_leaf)
        if out_spec != spec:
            raise ValueError(f"out {_difference(paths, out)} (structure {out_spec}, in the updates {spec})")
    columns = zip(*rows, strict=True)
    made = [_make_leaf(c, path, target) for c, path, target in zip(columns, paths, targets, strict=True)]
    if out is not None:
        _check_disjoint([leaf for leaf, _ in made])
    libraries = sorted({_library(leaf) for leaf in {type(leaf): leaf for leaf in leaves}.values()})
    if len(libraries) > 1:
        raise TypeError(f"row 0 mixes {' and '.join(libraries)} leaves (convert them to one library)")
    for leaf, _ in made:
        if leaf.place != made[0][0].place:
            here, there = (str(place or "cpu") for place in (leaf.place, made[0][0].place))
            raise ValueError(f"row 0{_where(leaf.path)} is on {here}, leaf {name_of(paths[0])} on {there} (move one)")
    return MemorySource(len(updates), [leaf for leaf, _ in made]), lambda: optree.tree_unflatten(
        spec, [r for _, r in made]
    )


def _difference(paths: list[tuple[Any, ...]], other: Any) -> str:
    """Say which leaves another tree lacks or adds."""
    import optree

    names, theirs = (set(map(name_of, p)) for p in (paths, optree.tree_flatten_with_path(other)[0]))
    missing, extra = sorted(names - theirs), sorted(theirs - names)
    if missing or extra:
        return ", ".join(
            text
            for text in (
                f"lacks the leaves {', '.join(missing[:5])}" if missing else "",
                f"has the unexpected leaves {', '.join(extra[:5])}" if extra else "",
            )
            if text
        )
    return "has another structure than row 0"
