"""``hdmedians`` 0.14: `geomedian`, `medoid`, `nangeomedian` and `nanmedoid` of arrays whose columns are observations.

``from robustkern.adapters import hdmedians as hd``. `axis` is the one along which observations lie, 1 by default as
there. What differs: results are arrays of their own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustkern.functions import aggregate
from robustkern.rules import GeometricMedian, Medoid

__all__ = ["geomedian", "medoid", "nangeomedian", "nanmedoid"]


def _rows(a: Any, axis: int) -> NDArray[Any]:
    x = np.asarray(a)
    if axis not in (0, 1):
        raise IndexError(f"axis {axis} out of bounds")
    if x.ndim != 2:
        raise ValueError(f"expected an array of 2 axes; got {x.ndim}")
    x = x.T if axis == 1 else x
    return x.astype(np.float64) if x.dtype.kind in "biu" else x


def geomedian(a: Any, axis: int = 1, eps: float = 1e-8, maxiters: int = 1000) -> NDArray[Any]:
    """Return the geometric median of the observations, converged: `eps` and `maxiters` need not stop it."""
    return np.asarray(aggregate(_rows(a, axis), GeometricMedian()))


def nangeomedian(a: Any, axis: int = 1, eps: float = 1e-7, maxiters: int = 500) -> NDArray[Any]:
    """Return the geometric median of the observations without NaN; of fewer than 3 such, the median of each number."""
    x = _rows(a, axis)
    whole = x[~np.isnan(x).any(axis=1)]
    if not len(whole):
        raise ValueError("All-NaN slice encountered")
    return np.asarray(np.nanmedian(x, axis=0)) if len(whole) < 3 else geomedian(whole, 0)


def _nearest(a: Any, axis: int, indexonly: bool, rows: NDArray[np.intp]) -> Any:
    _, info = aggregate(_rows(a, axis)[rows], Medoid(), return_info=True)
    assert info.order is not None
    at = rows[info.order[0]]
    return at if indexonly else np.asarray(a).take(at, axis=axis)


def medoid(a: Any, axis: int = 1, indexonly: bool = False) -> Any:
    """Return the observation with the least sum of distances to the others, or its index."""
    return _nearest(a, axis, indexonly, np.arange(len(_rows(a, axis))))


def nanmedoid(a: Any, axis: int = 1, indexonly: bool = False) -> Any:
    """Return the medoid of the observations without NaN, or its index."""
    x = _rows(a, axis)
    rows = np.flatnonzero(~np.isnan(x).any(axis=1))
    if not len(rows):
        raise ValueError("All-NaN slice encountered")
    return _nearest(a, axis, indexonly, rows)
