"""The four primitives on the caller's arrays, for frameworks that build rules of their own.

Each takes updates as `robustkern.aggregate` does; columns are the floating-point coordinates of all leaves.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from robustkern._arrays import MemorySource, adapt, name_of
from robustkern._kernels import Kernels, Matrix, Vector, Window
from robustkern._registry import choose

__all__ = ["gram", "row_sq_distances", "select_columns", "weighted_row_sum"]


def _open(name: str, updates: Any, out: Any, backend: str) -> tuple[MemorySource, Any, Kernels]:
    source, restore = adapt(updates, out)
    for counter in source.counters:
        raise TypeError(
            f"{name}: leaf {name_of(counter.path)} has dtype {counter.dtype}; the primitives take "
            "floating-point leaves only (leave it out, or use robustkern.aggregate)"
        )
    return source, restore, choose(backend, source.dtypes, source.device)


def _scale(name: str, scale: float) -> float:
    if not (isinstance(scale, (int, float)) and scale > 0 and math.frexp(scale)[0] == 0.5):
        raise ValueError(f"{name}: scale must be a power of two; got {scale!r}")
    return float(scale)


def select_columns(
    updates: Any,
    window: tuple[int, int],
    /,
    *,
    nearest: int | None = None,
    distances: bool = False,
    scale: float = 1.0,
    out: Any = None,
    backend: str = "auto",
) -> Any:
    """Mean of a window of each column's sorted values, or of the values nearest to it.

    Parameters
    ----------
    updates : array of shape (n, ...), sequence of n arrays, or sequence of n pytrees of arrays
        The rows.
    window : (int, int)
        Ranks [lo, hi), ``0 <= lo < hi <= n``.
    nearest : int, optional
        Average the so many values nearest to the window's mean instead, ``1 <= nearest <= n``; the window then has one
        or two ranks.
    distances : bool
        Also return the squared distance of each row to the result, from the same pass.
    scale : float
        Power of two by which differences are multiplied before they are squared.
    out : like one update, optional
        Receives the result.
    backend : str
        As for `robustkern.aggregate`.

    Returns
    -------
    one update, or with `distances` a pair of it and (n,) float64
        Distances are NaN or inf for rows that are not finite.

    Raises
    ------
    TypeError, ValueError, BackendUnavailable
        As `robustkern.aggregate`; or if the window is not a range of ranks, or `nearest` does not go with it.

    Notes
    -----
    NaN ranks above +inf; a window that reaches a NaN gives NaN. Of two values equally near on either side the lower one
    is taken first; infinite values are farther than any number, and NaN are farthest. One read of the data.
    """
    source, restore, kernels = _open("select_columns", updates, out, backend)
    lo, hi = window
    if not 0 <= lo < hi <= source.n:
        raise ValueError(
            f"select_columns: window must satisfy 0 <= lo < hi <= n; got ({lo}, {hi}) with n={source.n} rows"
        )
    if nearest is not None and not (1 <= nearest <= source.n and hi - lo <= 2):
        raise ValueError(
            "select_columns: nearest must satisfy 1 <= nearest <= n, with a window of one or two ranks; got "
            f"nearest={nearest} and ({lo}, {hi}) with n={source.n} rows"
        )
    total = np.zeros(source.n)
    for block in source.blocks():
        for rows, target in zip(block.rows, block.out, strict=True):
            found = kernels.select_columns(
                rows,
                Window(int(lo), int(hi)),
                nearest=None if nearest is None else int(nearest),
                distances=distances,
                scale=_scale("select_columns", scale),
                out=target,
            )
            if found.sq_distances is not None:
                total += found.sq_distances
    return (restore(), total) if distances else restore()


def gram(updates: Any, /, *, origin: bool = False, scale: float = 1.0, backend: str = "auto") -> Matrix:
    """Inner products of the rows, centred on their column-wise lower median.

    Parameters
    ----------
    updates : array of shape (n, ...), sequence of n arrays, or sequence of n pytrees of arrays
        The rows.
    origin : bool
        Append the origin as one more row.
    scale : float
        Power of two that multiplies the centred rows.
    backend : str
        As for `robustkern.aggregate`.

    Returns
    -------
    (m, m) float64, m = n + origin
        NaN in the row and column of each row that holds a NaN or Inf.

    Raises
    ------
    TypeError, ValueError, BackendUnavailable
        As `robustkern.aggregate`.

    Notes
    -----
    Squared distances are ``G[i, i] + G[j, j] - 2 * G[i, j]``, without the cancellation that uncentred products suffer.
    One read of the data, products and sums in float64.
    """
    source, _, kernels = _open("gram", updates, None, backend)
    total = np.zeros((source.n + bool(origin), source.n + bool(origin)))
    for block in source.blocks():
        for rows in block.rows:
            total += kernels.gram(rows, origin=bool(origin), scale=_scale("gram", scale))
    return total


def row_sq_distances(updates: Any, centre: Any, /, *, scale: float = 1.0, backend: str = "auto") -> Vector:
    """Squared distance of each row to a centre.

    Parameters
    ----------
    updates : array of shape (n, ...), sequence of n arrays, or sequence of n pytrees of arrays
        The rows.
    centre : like one update
        Same structure, shapes and dtypes.
    scale : float
        Power of two that multiplies rows and centre.
    backend : str
        As for `robustkern.aggregate`.

    Returns
    -------
    (n,) float64
        Correct to the last bit but for about 1e-30 relative; NaN or inf where a row or the centre is not finite.

    Raises
    ------
    TypeError, ValueError, BackendUnavailable
        As `robustkern.aggregate`.

    Notes
    -----
    One read of the data.
    """
    rows_of = list(updates) if not isinstance(updates, (str, bytes, dict)) else updates
    source, _, kernels = _open("row_sq_distances", [*rows_of, centre], None, backend)
    n = source.n - 1
    total = np.zeros(n)
    for block in source.blocks():
        for rows in block.rows:
            total += kernels.row_sq_distances(
                rows.take(np.arange(n)), rows.take([n]), scale=_scale("row_sq_distances", scale)
            )
    return total


def weighted_row_sum(updates: Any, weights: ArrayLike, /, *, out: Any = None, backend: str = "auto") -> Any:
    """Weighted sum of the rows.

    Parameters
    ----------
    updates : array of shape (n, ...), sequence of n arrays, or sequence of n pytrees of arrays
        The rows.
    weights : array_like of shape (n,)
        Finite; rows of weight exactly 0 are never read.
    out : like one update, optional
        Receives the result.
    backend : str
        As for `robustkern.aggregate`.

    Returns
    -------
    one update
        Of the caller's kind.

    Raises
    ------
    TypeError, ValueError, BackendUnavailable
        As `robustkern.aggregate`; or if the weights are not n finite numbers.

    Notes
    -----
    Summed in float64 in row order, rounded once. One read of the rows that have some weight. For several weighted sums
    call it several times, or use ``mix`` of the backend's primitive.
    """
    source, restore, kernels = _open("weighted_row_sum", updates, out, backend)
    values = np.ascontiguousarray(np.asarray(weights, dtype=np.float64))
    if values.shape != (source.n,) or not np.isfinite(values).all():
        raise ValueError(
            f"weighted_row_sum: weights must be {source.n} finite numbers, one for each row; got shape {values.shape}"
        )
    for block in source.blocks():
        for rows, target in zip(block.rows, block.out, strict=True):
            kernels.weighted_row_sum(rows, values[None], target)
    return restore()
