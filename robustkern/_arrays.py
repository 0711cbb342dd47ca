"""From the caller's updates to rows as pointers, and from the result back to the caller's kind.

An update is an array or a pytree of arrays. Its floating-point leaves are cut into segments that are used where
they lie; leaves whose last axis is not contiguous are copied in blocks of bounded size. Integer and boolean
leaves (counters, such as BatchNorm's) are no coordinates: they take no part in any distance, and the result holds
their column-wise lower median, an actual value that at least half of the rows do not exceed.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np
from array_api_compat import is_numpy_array, is_torch_array
from numpy.typing import NDArray

from robustkern._kernels import DTYPES, MAX_ROWS, Rows, address_of, one_segment

__all__ = ["Block", "MemorySource", "Source", "adapt"]

MIN_RUN_BYTES = 1024  # shorter contiguous runs are gathered into blocks: their addresses would take 1 % of memory
BLOCK_BYTES = 1 << 22


class Block(NamedTuple):
    """Some columns of all rows, one `Rows` for each dtype, and where their result goes."""

    rows: tuple[Rows, ...]
    out: tuple[Rows, ...]


class Source(Protocol):
    """n rows that come block by block: from memory all at once, from files one tensor after the other."""

    n: int
    dtypes: set[np.dtype[Any]]
    d: int

    def blocks(self) -> Iterator[Block]:
        """Yield the blocks; may be called again for another pass."""

    def row_name(self, row: int) -> str:
        """Return how an error should call a row."""


@dataclass
class Leaf:
    """One leaf of all rows, and the memory of its result."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    arrays: Sequence[NDArray[Any]] | NDArray[Any]  # n arrays, or one with a leading axis of n
    out: NDArray[Any]


class MemorySource:
    """Rows in memory."""

    @classmethod
    def of_rows(cls, rows: Rows, out: Rows) -> MemorySource:
        """Return the source of rows that lie in one piece each: the usual case, kept short for small calls."""
        source = cls.__new__(cls)
        source.n, source.d, source.dtypes = rows.n, rows.d, {rows.dtype}
        source.counters, source._strided, source._direct = [], [], Block((rows,), (out,))
        return source

    def __init__(self, n: int, leaves: list[Leaf]) -> None:
        self.n = n
        floating = [leaf for leaf in leaves if leaf.dtype in DTYPES]
        self.counters = [leaf for leaf in leaves if leaf.dtype not in DTYPES]
        self.dtypes = {leaf.dtype for leaf in floating}
        self.d = sum(leaf.out.size for leaf in floating)
        self._strided: list[Leaf] = []
        self._direct = self._group(floating)

    def _group(self, leaves: list[Leaf]) -> Block:
        """Join the segments of all leaves that can be used in place, by dtype."""
        parts: dict[np.dtype[Any], list[tuple[NDArray[np.uint64], NDArray[np.uint64], int]]] = {}
        for leaf in leaves:
            if leaf.out.size == 0:
                continue
            segments = _segments(leaf)
            if segments is None:
                self._strided.append(leaf)
            else:
                parts.setdefault(leaf.dtype, []).append(segments)
        rows, out = [], []
        for dtype, group in parts.items():
            if len(group) == 1 and len(group[0][0]) == 1:  # one array a row: nothing to join
                addresses, target, run = group[0]
                offsets = one_segment(run)
                rows.append(Rows(addresses, offsets, dtype, self))
                out.append(Rows(target[None], offsets, dtype, self))
                continue
            lengths = np.concatenate([np.full(len(addresses), run, dtype=np.int64) for addresses, _, run in group])
            offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
            rows.append(Rows(np.concatenate([addresses for addresses, _, _ in group]), offsets, dtype, self))
            out.append(Rows(np.concatenate([target for _, target, _ in group]).reshape(-1, 1), offsets, dtype, self))
        return Block(tuple(rows), tuple(out))

    def blocks(self) -> Iterator[Block]:
        """Yield what lies contiguous as one block, then copies of the rest."""
        if self._direct.rows:
            yield self._direct
        for leaf in self._strided:
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
            target = leaf.out.reshape(-1)
            columns = max(BLOCK_BYTES // (self.n * leaf.dtype.itemsize), 1)
            for begin in range(0, target.size, columns):
                end = min(begin + columns, target.size)
                values = np.stack([np.asarray(leaf.arrays[i]).flat[begin:end] for i in range(self.n)])
                target[begin:end] = lower_median(values)


def lower_median(values: NDArray[Any]) -> NDArray[Any]:
    """Return the column-wise lower median of (n, m) integers or booleans."""
    middle = (len(values) - 1) // 2
    return np.asarray(np.partition(values, middle, axis=0)[middle])


def _segments(leaf: Leaf) -> tuple[NDArray[np.uint64], NDArray[np.uint64], int] | None:
    """Addresses (n_segments, n) of equal contiguous runs and of their results, or None where there are none."""
    arrays, item = leaf.arrays, leaf.dtype.itemsize
    target = address_of(leaf.out)
    if isinstance(arrays, np.ndarray):
        strides = {arrays.strides[1:]}
        n, first = len(arrays), address_of(arrays)
        base = first + arrays.strides[0] * np.arange(n, dtype=np.int64)
    else:
        strides = {a.strides for a in arrays}
        base = np.array([address_of(a) for a in arrays], dtype=np.int64)
    axes = min(_contiguous_axes(leaf.shape, s, item) for s in strides)
    outer, inner = leaf.shape[: len(leaf.shape) - axes], leaf.shape[len(leaf.shape) - axes :]
    run = math.prod(inner)
    if outer and run * item < MIN_RUN_BYTES:
        return None
    if not outer:
        return base.astype(np.uint64)[None], np.array([target], dtype=np.uint64), run
    index = np.indices(outer, dtype=np.int64).reshape(len(outer), math.prod(outer))
    if isinstance(arrays, np.ndarray):
        addresses = np.array(arrays.strides[1 : 1 + len(outer)], dtype=np.int64) @ index
        addresses = addresses[:, None] + base
    else:
        addresses = np.stack([np.array(a.strides[: len(outer)], dtype=np.int64) @ index for a in arrays], axis=1) + base
    targets = target + run * item * np.arange(len(addresses), dtype=np.int64)
    return np.ascontiguousarray(addresses.astype(np.uint64)), targets.astype(np.uint64), run


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


def _describe(x: Any) -> str:
    shape = getattr(x, "shape", None)
    if not isinstance(shape, (tuple, list)):
        return type(x).__name__
    return f"{type(x).__name__} of shape {tuple(shape)} and dtype {getattr(x, 'dtype', None)}"


def _as_numpy(x: Any, what: str) -> NDArray[Any]:
    """Return a NumPy or CPU torch array as a NumPy view without copying."""
    if type(x) is np.ndarray:
        return x
    if is_torch_array(x):
        import torch

        if not x.is_cpu:
            raise ValueError(
                f"{what} is a torch tensor on device {x.device}; this version aggregates on the CPU (pass x.cpu())"
            )
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
    raise TypeError(f"{what} is {_describe(x)}; expected a NumPy array or a torch CPU tensor (pass numpy.asarray(x))")


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
    return "torch" if is_torch_array(x) else "numpy"


def _empty(shape: tuple[int, ...], like: Any) -> Any:
    if isinstance(like, (np.ndarray, np.generic)):
        return np.empty(shape, dtype=like.dtype)
    import torch

    return torch.empty(shape, dtype=like.dtype)


def _check_out(out: Any, shape: tuple[int, ...], like: Any, what: str) -> Any:
    if _library(out) != _library(like) or not (hasattr(out, "shape") and hasattr(out, "dtype")):
        raise TypeError(f"{what} is {_describe(out)}; expected a {_library(like)} array like the updates")
    if tuple(out.shape) != shape or out.dtype != like.dtype:
        raise ValueError(
            f"{what} has shape {tuple(out.shape)} and dtype {out.dtype}; expected shape {shape} and dtype {like.dtype}"
        )
    view = _as_numpy(out, what)
    if not view.flags.c_contiguous or not view.flags.writeable or not view.flags.aligned:
        raise ValueError(f"{what} must be contiguous, aligned and writeable (pass a fresh array)")
    return out


def _check_disjoint(leaves: list[Leaf]) -> None:
    """Raise where the memory of a result overlaps an update's or another result's, as far as their bounds tell."""
    taken = []
    for leaf in leaves:
        sources = [leaf.arrays] if isinstance(leaf.arrays, np.ndarray) else leaf.arrays
        taken += [_bounds(source) for source in sources if source.size]
    taken.sort()
    highest = -1
    merged: list[tuple[int, int]] = []  # disjoint and ascending
    for low, high in taken:
        if low < highest:
            highest = max(highest, high)
            merged[-1] = (merged[-1][0], highest)
        else:
            merged.append((low, high))
            highest = high
    starts = [low for low, _ in merged]
    results = sorted((*_bounds(leaf.out), leaf.path) for leaf in leaves if leaf.out.size)
    for k, (low, high, path) in enumerate(results):
        at = bisect.bisect_left(starts, high) - 1
        what = f"out, leaf {path}" if path else "out"
        if at >= 0 and merged[at][1] > low:
            raise ValueError(f"{what} shares memory with the updates, which are never written (pass a fresh array)")
        if k and results[k - 1][1] > low:
            raise ValueError(f"{what} shares memory with leaf {results[k - 1][2]} of out (pass fresh arrays)")


def _bounds(x: NDArray[Any]) -> tuple[int, int]:
    """First byte of an array, and the first one behind it."""
    low = high = address_of(x)
    for size, stride in zip(x.shape, x.strides, strict=True):
        if stride < 0:
            low += (size - 1) * stride
        else:
            high += (size - 1) * stride
    return low, high + x.itemsize


def _check_count(n: int) -> None:
    if not 1 <= n <= MAX_ROWS:
        raise ValueError(f"updates: expected between 1 and {MAX_ROWS} rows; got {n}")


def adapt(updates: Any, out: Any = None) -> tuple[MemorySource, Callable[[], Any]]:
    """Turn updates into rows.

    Parameters
    ----------
    updates : array of shape (n, ...), sequence of n arrays, or sequence of n pytrees of arrays
        NumPy (ml_dtypes included) or torch CPU; never written, never copied whole.
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
    if isinstance(updates, np.ndarray) or is_torch_array(updates):
        return _adapt_stacked(updates, out)
    if isinstance(updates, (str, bytes, Mapping)) or not isinstance(updates, Sequence):
        raise TypeError(
            f"updates is {_describe(updates)}; expected an array of shape (n, ...) or a list with one array or "
            "one pytree of arrays for each of the n workers"
        )
    _check_count(len(updates))
    if all(type(u) is np.ndarray for u in updates):
        leaf, result = _make_leaf(updates, "", out)
        if out is not None:
            _check_disjoint([leaf])
        return MemorySource(len(updates), [leaf]), lambda: result
    try:
        return _adapt_trees(updates, out)
    except RecursionError:
        raise ValueError("updates: a pytree is nested too deeply, or contains itself") from None


def _adapt_stacked(updates: Any, out: Any) -> tuple[MemorySource, Callable[[], Any]]:
    array = _as_numpy(updates, "updates")
    if array.ndim < 2:
        raise ValueError(
            f"updates: expected an array of shape (n, ...) with at least 2 axes; got shape {array.shape} "
            "(for one number a row pass x[:, None])"
        )
    _check_count(array.shape[0])
    _check_dtype(array.dtype, "updates", False)
    shape = array.shape[1:]
    result = _empty(shape, updates) if out is None else _check_out(out, shape, updates, "out")
    target = _as_numpy(result, "out")
    if out is None and array.flags.c_contiguous and array.size:
        return MemorySource.of_rows(Rows.of(array), Rows.of(target.reshape(1, -1))), lambda: result
    leaf = Leaf("", shape, array.dtype, array, target)
    if out is not None:
        _check_disjoint([leaf])
    return MemorySource(array.shape[0], [leaf]), lambda: result


def _make_leaf(values: Sequence[Any], path: str, out: Any) -> tuple[Leaf, Any]:
    """Check that all rows have the same leaf, and allocate its result."""
    where = f", leaf {path}" if path else ""
    like, arrays = values[0], []
    for i, value in enumerate(values):
        array = _as_numpy(value, f"row {i}{where}")
        if i == 0:
            first = array
            _check_dtype(array.dtype, f"row 0{where}", bool(path))
        elif type(value) is not type(like) and _library(value) != _library(like):
            raise TypeError(
                f"row {i}{where} is a {_library(value)} array, row 0 a {_library(like)} array (convert one)"
            )
        elif array.shape != first.shape or array.dtype != first.dtype:
            raise ValueError(
                f"row {i}{where} has shape {array.shape} and dtype {array.dtype}; "
                f"row 0 has shape {first.shape} and dtype {first.dtype}"
            )
        arrays.append(array)
    name = f"out, leaf {path}" if path else "out"
    result = _empty(first.shape, like) if out is None else _check_out(out, first.shape, like, name)
    return Leaf(path, first.shape, first.dtype, arrays, _as_numpy(result, name)), result


def _adapt_trees(updates: Sequence[Any], out: Any) -> tuple[MemorySource, Callable[[], Any]]:
    import optree

    paths, leaves, spec = optree.tree_flatten_with_path(updates[0])
    names = ["".join(f"[{key!r}]" for key in path) for path in paths]
    columns: list[list[Any]] = [[leaf] for leaf in leaves]
    if not leaves:
        raise ValueError("row 0 holds no arrays; expected an array or a pytree of arrays")
    for i, update in enumerate(updates[1:], start=1):
        row, row_spec = optree.tree_flatten(update)
        if row_spec != spec:
            raise ValueError(f"row {i} {_difference(names, update)} (structure {row_spec}, in row 0 {spec})")
        for column, leaf in zip(columns, row, strict=True):
            column.append(leaf)
    targets: list[Any] = [None] * len(leaves)
    if out is not None:
        targets, out_spec = optree.tree_flatten(out)
        if out_spec != spec:
            raise ValueError(f"out {_difference(names, out)} (structure {out_spec}, in the updates {spec})")
    made = [_make_leaf(c, name, target) for c, name, target in zip(columns, names, targets, strict=True)]
    libraries = {_library(leaf) for leaf in leaves}
    if out is not None:
        _check_disjoint([leaf for leaf, _ in made])
    if len(libraries) > 1:
        raise TypeError("row 0 mixes NumPy and torch leaves (convert them to one library)")
    return MemorySource(len(updates), [leaf for leaf, _ in made]), lambda: optree.tree_unflatten(
        spec, [r for _, r in made]
    )


def _difference(names: list[str], other: Any) -> str:
    """Say which leaves another tree lacks or adds."""
    import optree

    paths, _, _ = optree.tree_flatten_with_path(other)
    theirs = {"".join(f"[{key!r}]" for key in path) for path in paths}
    missing, extra = sorted(set(names) - theirs), sorted(theirs - set(names))
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
