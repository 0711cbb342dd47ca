"""Arrays of the usual kind: where they begin, found out for thousands at a time without a view of each.

By the compiled part where it is here, because small calls and models of many leaves would feel the difference.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import is_torch_array
from numpy.typing import NDArray

from robustkern.contract.rows import DTYPES
from robustkern.inputs.arrays import address_of, empty_tensor, refuse_traced, warn_of_gradients

try:
    from robustkern._cpu import look_at as compiled
except ImportError:
    compiled = None  # type: ignore[assignment]

__all__ = ["Plain", "look", "new_like"]

#: Below it tensors have no memory: where it was taken away, or is a transformation's, they begin so far from 0 as in
#: their storage. Whoever is there nevertheless is looked at more closely.
UNUSUAL_ADDRESS = 1 << 40
OTHER, PLAIN, RECORDED = range(3)  # as csrc/bindings/leaves.h has them


class Plain(NamedTuple):
    """Contiguous arrays in the host's memory, all alike.

    Attributes
    ----------
    dtype : numpy dtype
        One of `DTYPES`.
    begins : (m,) int64
        Where they begin; longer by what was asked for.
    """

    dtype: np.dtype[Any]
    begins: NDArray[np.int64]


class _Torch(NamedTuple):
    """What is asked of torch once."""

    classes: tuple[type, ...]
    dtypes: dict[Any, np.dtype[Any]]
    dense: Any
    exchange: Any  # DLPack's table of functions; None in old versions


@functools.cache
def _torch() -> _Torch:
    import torch

    dtypes = {getattr(torch, dtype.name): dtype for dtype in DTYPES}
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    return _Torch((torch.Tensor, torch.nn.Parameter), dtypes, torch.strided, exchange)


def look(columns: Sequence[Sequence[Any]], inputs: int, more: int = 0) -> list[Plain | None]:
    """Look at columns of arrays, each of the same leaf of m rows.

    Parameters
    ----------
    columns : sequence of sequences of m objects
        As they came.
    inputs : int
        Of how many in each column gradients may be recorded, which are dropped with a warning.
    more : int
        Places that `begins` has besides.

    Returns
    -------
    list
        None for a column of anything else, which is for others to use or to refuse with words.
    """
    begins = np.empty((len(columns), len(columns[0]) + more), dtype=np.int64)
    kinds = {type(column[0]): column[0] for column in columns}
    with_torch, records = any(map(is_torch_array, kinds.values())), False
    if with_torch:
        import torch

        refuse_traced()
        records = torch.is_grad_enabled()
    if compiled is not None and not (with_torch and _torch().exchange is None):
        known = (_torch().exchange, _torch().classes, records, UNUSUAL_ADDRESS) if with_torch else None
        looks: Sequence[int] = compiled(list(columns), inputs, np.ndarray, known, begins)
    else:
        looks = [_look_at(column, inputs, records, line) for column, line in zip(columns, begins, strict=True)]
    if RECORDED in looks:
        warn_of_gradients()
    found: list[Plain | None] = []
    for seen, column, line in zip(looks, columns, begins, strict=True):
        dtype = _dtype_of(column[0]) if seen else None
        found.append(None if dtype is None else Plain(dtype, line))
    return found


def _dtype_of(x: Any) -> np.dtype[Any] | None:
    """Return the dtype of a plain array as NumPy has it; None where it is none of floats."""
    if type(x) is np.ndarray:
        return x.dtype if x.dtype in DTYPES else None
    return _torch().dtypes.get(x.dtype)


def new_like(x: Any) -> tuple[Any, int]:
    """Return a new array like a plain one, and where it begins."""
    if type(x) is np.ndarray:
        result = np.empty(x.shape, x.dtype)
        return result, address_of(result)
    import torch

    made = torch.empty_like(x, memory_format=torch.contiguous_format)
    begin = 0 if type(made) is not torch.Tensor else made.data_ptr()
    if begin < UNUSUAL_ADDRESS:
        made = empty_tensor(tuple(x.shape), x)  # or words
        begin = made.data_ptr()
    return made, begin


_TORCH_LOOK = operator.attrgetter("dtype", "shape", "layout", "is_cpu")


def _look_at(column: Sequence[Any], inputs: int, records: bool, begins: NDArray[np.int64]) -> int:
    """Do in Python what the compiled part does, in ten times the time."""
    first = column[0]
    if type(first) is np.ndarray:
        for i, x in enumerate(column):
            if (
                type(x) is not np.ndarray
                or x.dtype != first.dtype
                or x.shape != first.shape
                or not x.flags.c_contiguous
            ):
                return OTHER
            begins[i] = address_of(x)
        return PLAIN
    if not is_torch_array(first) or not set(map(type, column)).issubset(_torch().classes):
        return OTHER
    try:
        looks = [*map(_TORCH_LOOK, column)]
        if looks.count(looks[0]) != len(looks) or looks[0][2:] != (_torch().dense, True):
            return OTHER
        if not all(x.is_contiguous() and not x.is_neg() for x in column):
            return OTHER
        begins[: len(column)] = [x.data_ptr() for x in column]
    except (RuntimeError, OverflowError):  # no shape (nested tensors), or no memory of its own
        return OTHER
    if begins[: len(column)].min() < UNUSUAL_ADDRESS:
        return OTHER
    return RECORDED if records and any(x.requires_grad for x in column[:inputs]) else PLAIN
