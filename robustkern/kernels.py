"""The four primitives on the caller's arrays, for frameworks that build rules of their own, and the update of momenta.

Each takes updates as `robustkern.aggregate` does; columns are the floating-point coordinates of all leaves.
"""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robustkern.backends.floats import in_usual_floats
from robustkern.backends.registry import choose
from robustkern.contract.primitives import Kernels, MomentumKernels, Window
from robustkern.contract.rows import Matrix, Rows, Vector
from robustkern.errors import brief
from robustkern.inputs.arrays import name_of, view_on_host
from robustkern.inputs.memory import MemorySource
from robustkern.inputs.trees import adapt
from robustkern.scalars import as_float, as_int

__all__ = ["gram", "row_sq_distances", "select_columns", "update_momenta", "weighted_row_sum"]


def _open(name: str, updates: Any, out: Any, backend: str) -> tuple[MemorySource, Any, Kernels]:
    source, result = adapt(updates, out)
    for counter in source.integers:
        raise TypeError(
            f"{name}: leaf {name_of(counter.path)} has dtype {counter.dtype}; the primitives take "
            "floating-point leaves only (leave it out, or use robustkern.aggregate)"
        )
    if source.finish is not None or any(leaf.converted for leaf in source.strided):
        raise TypeError(
            f"{name}: the primitives take float16, bfloat16, float32 and float64 of NumPy, torch or CuPy only (convert "
            "the rows, or use robustkern.aggregate)"
        )
    return source, result, choose(backend, source.dtypes, source.device)


def _scale(name: str, scale: Any) -> float:
    value = as_float(scale)
    if value is None or not 0 < value < math.inf or math.frexp(value)[0] != 0.5:
        raise ValueError(f"{name}: scale must be a power of two; got {brief(scale)}")
    return value


@in_usual_floats
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
        Average the so many values nearest to the window's mean instead, ``1 <= nearest <= n``.
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
    source, result, kernels = _open("select_columns", updates, out, backend)
    ranks = tuple(map(as_int, window)) if isinstance(window, (tuple, list, np.ndarray)) else ()
    lo, hi = ranks if len(ranks) == 2 else (None, None)
    if lo is None or hi is None or not 0 <= lo < hi <= source.n:
        raise ValueError(
            f"select_columns: window must satisfy 0 <= lo < hi <= n; got {brief(window)} with n={source.n} rows (two "
            "whole numbers)"
        )
    count = as_int(nearest)
    if nearest is not None and (count is None or not 1 <= count <= source.n):
        raise ValueError(
            f"select_columns: nearest must satisfy 1 <= nearest <= n; got nearest={brief(nearest)} with n={source.n} "
            "rows (a whole number)"
        )
    total = np.zeros(source.n)
    for block in source.blocks():
        for rows, target in zip(block.rows, block.out, strict=True):
            found = kernels.select_columns(
                rows,
                Window(lo, hi),
                nearest=count,
                distances=distances,
                scale=_scale("select_columns", scale),
                out=target,
            )
            if found.sq_distances is not None:
                total += found.sq_distances
    return (result, total) if distances else result


@in_usual_floats
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


@in_usual_floats
def row_sq_distances(updates: Any, centre: Any, /, *, scale: float = 1.0, backend: str = "auto") -> Vector:
    """Squared distance of each row to a centre, or to the origin.

    Parameters
    ----------
    updates : array of shape (n, ...), sequence of n arrays, or sequence of n pytrees of arrays
        The rows.
    centre : like one update, or None
        Same structure, shapes and dtypes; None: the origin.
    scale : float
        Power of two that multiplies rows and centre.
    backend : str
        As for `robustkern.aggregate`.

    Returns
    -------
    (n,) float64
        Correct to the last bit but for about 1e-30 relative; NaN or inf where a row or the centre is not finite.
        Squares of single values below 2**-1022 may count as 0: float64 rows that are as tiny want a `scale`.

    Raises
    ------
    TypeError, ValueError, BackendUnavailable
        As `robustkern.aggregate`.

    Notes
    -----
    One read of the data.
    """
    if centre is not None and hasattr(updates, "__iter__") and not isinstance(updates, (str, bytes, dict)):
        updates = [*updates, centre]
    source, _, kernels = _open("row_sq_distances", updates, None, backend)
    n = source.n - (centre is not None)
    total = np.zeros(n)
    for block in source.blocks():
        for rows in block.rows:
            there = None if centre is None else rows.take([n])
            found = kernels.row_sq_distances(rows.take(np.arange(n)), there, scale=_scale("row_sq_distances", scale))
            total += found[0]
    return total


@in_usual_floats
def weighted_row_sum(
    updates: Any, weights: ArrayLike, /, *, divisor: float = 1.0, out: Any = None, backend: str = "auto"
) -> Any:
    """Weighted sum of the rows over a divisor.

    Parameters
    ----------
    updates : array of shape (n, ...), sequence of n arrays, or sequence of n pytrees of arrays
        The rows.
    weights : array_like of shape (n,)
        Finite; rows of weight exactly 0 are never read.
    divisor : float
        Positive and finite. Means are sums divided once: weights of 1 and their number as the divisor give equal rows
        back as they are, and whole numbers' means as near as the dtype can; weights of 1/n do not.
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
        As `robustkern.aggregate`; or if the weights are not n finite numbers, or the divisor is not one above 0.

    Notes
    -----
    Summed in float64 in row order (of float64 rows with what the roundings lose), divided and rounded once. One read of
    the rows that have some weight.
    """
    source, result, kernels = _open("weighted_row_sum", updates, out, backend)
    try:
        values = np.asarray(weights, dtype=np.float64).copy()
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # RuntimeError: a tensor with gradients
        raise TypeError(f"weighted_row_sum: weights must be numbers, one for each row ({error})") from None
    if values.shape != (source.n,) or not np.isfinite(values).all():
        raise ValueError(
            f"weighted_row_sum: weights must be {source.n} finite numbers, one for each row; got shape {values.shape}"
        )
    by = as_float(divisor)
    if by is None or not 0 < by < math.inf:
        raise ValueError(f"weighted_row_sum: divisor must be a finite number above 0; got {brief(divisor)}")
    if not 2.0**-900 < by < 2.0**900:  # products of it are to be numbers
        exponent = math.frexp(by)[1]
        values, by = np.ldexp(values, -exponent), math.ldexp(by, -exponent)
        if not np.isfinite(values).all():
            raise ValueError(
                f"weighted_row_sum: weights over the divisor must be finite numbers; got weights of up to "
                f"{abs(np.asarray(weights, dtype=np.float64)).max():.3g} over {divisor!r} "
                "(divide both by a power of two)"
            )
    divisors = np.array([by])
    for block in source.blocks():
        for rows, target in zip(block.rows, block.out, strict=True):
            kernels.weighted_row_sum(rows, values[None], target, divisors=divisors)
    return result


@in_usual_floats
def update_momenta(
    momenta: Any,
    gradients: Any,
    corrections: Any = None,
    /,
    *,
    keep: float,
    gradient_scales: ArrayLike | None = None,
    correction_scales: ArrayLike | None = None,
    backend: str = "auto",
) -> None:
    """Update the momenta of n workers in place: ``gradient + keep * (momentum - correction)``, in one pass.

    With ``keep = 1 - beta``, and as correction the gradient on the same sample at the previous point, this is the
    corrected momentum of mu^2-SGD; without corrections, with ``keep = b`` and gradients scaled by ``1 - b``, it is
    momentum.

    Parameters
    ----------
    momenta : array of shape (n, ...)
        C-contiguous NumPy array or torch tensor on the CPU, written in place; float16, bfloat16, float32 or float64.
    gradients, corrections : like momenta
        Same shape and dtype, C-contiguous. Without `corrections` nothing is subtracted.
    keep : float
        How much of the old momentum stays, finite. Where it is 0 neither old momenta nor corrections are read, so that
        a first step can start from memory that was never set.
    gradient_scales, correction_scales : array_like of shape (n,), optional
        Factors of each worker's gradient and correction, such as those that clip them; default 1. A NaN or Inf among
        them spoils that worker's momentum only.
    backend : str
        As for `robustkern.aggregate`, but for "cuda", which has no such kernel.

    Raises
    ------
    TypeError, ValueError, BackendUnavailable
        As `robustkern.aggregate`; if `keep` is not finite, the scales are not n numbers, or an array is not contiguous,
        differs in shape or dtype from the momenta, or shares memory with them; if momenta are read-only; or if the
        arrays are on a GPU.

    Notes
    -----
    Computed in float64, rounded to the arrays' dtype. A NaN or Inf stays in its own row and coordinate. Three reads and
    a write of n x d (momentum: two reads), no extra memory.

    References
    ----------
    .. [1] Dahan and Levy, "Fault Tolerant ML: Efficient Meta-Aggregation and Synchronous Training", ICML 2024.
    """
    name = "update_momenta"
    kept = as_float(keep)
    if kept is None or not math.isfinite(kept):
        raise ValueError(f"{name}: keep must be a finite number; got {brief(keep)}")
    target = _in_place(name, "momenta", momenta, None)
    if not target.flags.writeable:
        raise ValueError(f"{name}: momenta are read-only, and the update is in place (pass a copy)")
    added = _in_place(name, "gradients", gradients, target)
    removed = None if corrections is None else _in_place(name, "corrections", corrections, target)
    n = len(target)
    scales = []
    for what, given in (("gradient_scales", gradient_scales), ("correction_scales", correction_scales)):
        values = np.ones(n) if given is None else np.array(given, dtype=np.float64)
        if values.shape != (n,):
            raise ValueError(f"{name}: {what} must be {n} numbers, one for each row; got shape {values.shape}")
        scales.append(values)
    kernels = cast(MomentumKernels, choose(backend, {target.dtype}))
    if not target.size:
        return
    kernels.update_momenta(
        Rows.of(target),
        Rows.of(added),
        None if removed is None else Rows.of(removed),
        keep=kept,
        gradient_scales=scales[0],
        correction_scales=None if removed is None else scales[1],
    )


def _in_place(name: str, what: str, x: Any, momenta: NDArray[Any] | None) -> NDArray[Any]:
    """Return a contiguous array in the host's memory as a NumPy view, checked against the momenta."""
    array = view_on_host(x, f"{name}: {what}", is_input=momenta is not None)
    if array.ndim < 2 or len(array) < 1 or not array.flags.c_contiguous:
        raise ValueError(
            f"{name}: {what} must be a C-contiguous array of shape (n, ...) with n >= 1; got shape {array.shape} and "
            f"strides {array.strides} (pass a contiguous copy)"
        )
    if momenta is None:
        return array
    if array.shape != momenta.shape or array.dtype != momenta.dtype:
        raise ValueError(
            f"{name}: {what} must have the momenta's shape {momenta.shape} and dtype {momenta.dtype}; got "
            f"{array.shape} "
            f"and {array.dtype}"
        )
    if np.may_share_memory(array, momenta):
        raise ValueError(f"{name}: {what} share memory with the momenta, which are written (pass a copy)")
    return array
