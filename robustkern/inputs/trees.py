"""From the caller's updates to a source of rows, and from the result back to the caller's kind."""

from __future__ import annotations

import functools
import operator
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from array_api_compat import is_torch_array
from numpy.typing import NDArray

from robustkern.contract.rows import DTYPES, MAX_ROWS, Block, Rows, one_segment
from robustkern.inputs.addresses import address_of, addresses_of
from robustkern.inputs.arrays import (
    array_view,
    check_dtype,
    checked_out,
    described,
    empty,
    empty_tensor,
    leaf_of,
    library_of,
    name_of,
    place_of,
    where_is,
)
from robustkern.inputs.memory import Leaf, MemorySource, check_disjoint, plain_leaf

__all__ = ["adapt"]

#: Leaves that are no arrays: an update may carry settings, epochs, names.
PLAIN = (bool, int, float, complex, str, bytes)
#: Kinds of mappings that stand for one another.
MAPPINGS = (dict, OrderedDict, defaultdict)


def _check_count(n: int) -> None:
    if not 1 <= n <= MAX_ROWS:
        raise ValueError(f"updates: expected between 1 and {MAX_ROWS} rows; got {n}")


def adapt(updates: Any, out: Any = None, centre: Any = None) -> tuple[MemorySource, Any]:
    """Turn updates into rows.

    Parameters
    ----------
    updates : array of shape (n, ...), sequence of n arrays, or sequence of n pytrees of arrays
        NumPy (ml_dtypes included), torch, or on a GPU CuPy and what speaks DLPack; never written, never copied whole.
    out : like one update, optional
        Receives the result.
    centre : like one update, optional
        Joins the rows of the source as one more.

    Returns
    -------
    source : MemorySource
        The rows.
    result : like one update
        Where the result goes, in the caller's kind.

    Raises
    ------
    TypeError, ValueError
        If the updates are not of one kind, structure, shape and dtype; the message names the row and leaf.
    """
    if (
        type(updates) is np.ndarray
        and out is None
        and centre is None
        and updates.dtype in DTYPES
        and updates.ndim >= 2
        and 0 < len(updates) <= MAX_ROWS
        and updates.size > 0
        and updates.flags.c_contiguous
    ):
        return _adapt_plain(updates)
    if isinstance(updates, np.ndarray) or is_torch_array(updates) or hasattr(updates, "__dlpack_device__"):
        if centre is None:
            return _adapt_stacked(updates, out)
        updates = [updates[i] for i in range(_rows_of(array_view(updates, "updates").shape))]
    if isinstance(updates, (str, bytes, Mapping)) or not isinstance(updates, Sequence):
        raise TypeError(
            f"updates is {described(updates)}; expected an array of shape (n, ...) or a list with one array or "
            "one pytree of arrays for each of the n workers"
        )
    n = len(updates)
    _check_count(n)
    if centre is not None:
        updates = [*updates, centre]
    if all(type(u) is np.ndarray for u in updates):
        leaf, result = _make_leaf(updates, n, (), out)
        if out is not None:
            check_disjoint([leaf])
        return MemorySource.of(n, [leaf], centre is not None), result
    try:
        return _adapt_trees(updates, n, out)
    except RecursionError:
        raise ValueError("updates: a pytree is nested too deeply, or contains itself") from None


def _rows_of(shape: tuple[int, ...]) -> int:
    """Return n of an array of rows."""
    if len(shape) < 2:
        raise ValueError(
            f"updates: expected an array of shape (n, ...) with at least 2 axes; got shape {shape} "
            "(for one number a row pass x[:, None])"
        )
    _check_count(shape[0])
    return shape[0]


def _adapt_stacked(updates: Any, out: Any) -> tuple[MemorySource, Any]:
    array = array_view(updates, "updates")
    n = _rows_of(array.shape)
    check_dtype(array.dtype, "updates", False)
    shape = array.shape[1:]
    result = empty(shape, updates, array) if out is None else checked_out(out, shape, updates, array, "out")
    target = array_view(result, "out")
    leaf = Leaf((), shape, array.dtype, array, target, place=place_of(array))
    if out is not None:
        check_disjoint([leaf])
    return MemorySource.of(n, [leaf]), result


def _adapt_plain(updates: NDArray[Any]) -> tuple[MemorySource, NDArray[Any]]:
    """Adapt rows of one contiguous array: the usual case, kept short for small calls."""
    n, dtype = len(updates), updates.dtype
    d = updates.size // n
    result = np.empty(updates.shape[1:], dtype=dtype)
    first, step, offsets = address_of(updates), d * dtype.itemsize, one_segment(d)
    addresses = np.arange(first, first + n * step, step, dtype=np.uint64)
    rows = Rows(addresses[None], offsets, dtype, updates)
    target = Rows(np.array([[address_of(result)]], dtype=np.uint64), offsets, dtype, result)
    return MemorySource(n, d, {dtype}, "cpu", Block((rows,), (target,))), result


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


def _name_of_row(i: int, n: int) -> str:
    return f"row {i}" if i < n else "centre"


def _make_leaf(values: Sequence[Any], n: int, path: tuple[Any, ...], out: Any) -> tuple[Leaf, Any]:
    """Check that all n rows, and what follows them, have the same leaf, and allocate its result."""
    like = values[0]
    looked = _look(values if out is None else (*values, out))
    if looked is not None:
        dtype, addresses = looked
        shape = tuple(like.shape)
        result = out
        if out is None:
            result = np.empty(shape, dtype=like.dtype) if type(like) is np.ndarray else empty_tensor(shape, like)
            addresses.append(address_of(result) if isinstance(result, np.ndarray) else result.data_ptr())
        writeable = out is None or type(out) is not np.ndarray or out.flags.writeable
        if writeable and addresses[-1] % dtype.alignment == 0:
            return Leaf(path, shape, dtype, values, result, np.array(addresses, dtype=np.int64)), result
    where, arrays = leaf_of(path), []
    for i, value in enumerate(values):
        row = _name_of_row(i, n)
        array = array_view(value, f"{row}{where}")
        if i == 0:
            first = array
            check_dtype(array.dtype, f"row 0{where}", bool(path))
        elif type(value) is not type(like) and library_of(value) != library_of(like):
            raise TypeError(
                f"{row}{where} is a {library_of(value)} array, row 0 a {library_of(like)} array (convert one)"
            )
        elif place_of(array) != place_of(first):
            raise ValueError(f"{row}{where} is on {where_is(array)}, row 0 on {where_is(first)} (move one)")
        elif array.shape != first.shape or array.dtype != first.dtype:
            raise ValueError(
                f"{row}{where} has shape {array.shape} and dtype {array.dtype}; "
                f"row 0 has shape {first.shape} and dtype {first.dtype}"
            )
        arrays.append(array)
    shape = first.shape
    result = empty(shape, like, first) if out is None else checked_out(out, shape, like, first, f"out{where}")
    return Leaf(path, shape, first.dtype, arrays, array_view(result, f"out{where}"), place=place_of(first)), result


def _adapt_trees(updates: Sequence[Any], n: int, out: Any) -> tuple[MemorySource, Any]:
    import optree

    paths, leaves, spec = optree.tree_flatten_with_path(updates[0])
    if not leaves:
        raise ValueError("row 0 holds no arrays; expected an array or a pytree of arrays")
    # What is an array needs no look into optree's registry, which is most of its time.
    is_leaf = functools.partial(type.__instancecheck__, type(leaves[0]))
    rows = [leaves]
    for i, update in enumerate(updates[1:], start=1):
        row, row_spec = optree.tree_flatten(update, is_leaf)
        if row_spec != spec:  # mappings are matched by their keys, whatever their kind and order
            row, row_spec = optree.tree_flatten(_in_the_order_of(updates[0], update), is_leaf)
        if row_spec != spec:
            name = _name_of_row(i, n)
            raise ValueError(f"{name} {_difference(paths, update)} (structure {row_spec}, in row 0 {spec})")
        rows.append(row)
    targets: list[Any] = [None] * len(leaves)
    if out is not None:
        targets, out_spec = optree.tree_flatten(_in_the_order_of(updates[0], out), is_leaf)
        if out_spec != spec:
            raise ValueError(f"out {_difference(paths, out)} (structure {out_spec}, in the updates {spec})")
    made, plain, results = [], [], []
    for column, path, target in zip(zip(*rows, strict=True), paths, targets, strict=True):
        if type(column[0]) in PLAIN and all(type(value) in PLAIN for value in column):
            plain.append(plain_leaf(path, column[:n]))
            results.append(plain[-1].value)
        else:
            leaf, result = _make_leaf(column, n, path, target)
            made.append(leaf)
            results.append(result)
    if not made:
        raise ValueError(
            "row 0 holds no arrays, only numbers or texts of Python (pass numpy.asarray(x) of each number)"
        )
    if out is not None:
        check_disjoint(made)
    arrays = [leaf for leaf in leaves if type(leaf) not in PLAIN]
    libraries = sorted({library_of(leaf) for leaf in {type(leaf): leaf for leaf in arrays}.values()})
    if len(libraries) > 1:
        raise TypeError(f"row 0 mixes {' and '.join(libraries)} leaves (convert them to one library)")
    for leaf in made:
        if leaf.place != made[0].place:
            here, there = (str(place or "cpu") for place in (leaf.place, made[0].place))
            first = name_of(made[0].path)
            raise ValueError(f"row 0{leaf_of(leaf.path)} is on {here}, leaf {first} on {there} (move one)")
    return MemorySource.of(n, made, len(updates) > n, plain), optree.tree_unflatten(spec, results)


def _in_the_order_of(first: Any, other: Any) -> Any:
    """Return a tree with mappings of the kind and the order of keys that another tree has, where the keys are equal."""
    if isinstance(first, Mapping) and isinstance(other, Mapping):
        if first.keys() != other.keys() or type(first) not in MAPPINGS or type(other) not in MAPPINGS:
            return other
        items = ((key, _in_the_order_of(first[key], other[key])) for key in first)
        kind: Any = type(first)
        return kind(first.default_factory, items) if isinstance(first, defaultdict) else kind(items)
    if type(first) is type(other) and type(other) in (list, tuple) and len(first) == len(other):
        return type(other)(_in_the_order_of(*pair) for pair in zip(first, other, strict=True))
    return other


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
