"""``geom_median`` 0.1: `compute_geometric_median` of arrays or tensors, converged instead of stopped.

``from robustkern.adapters.geom_median import compute_geometric_median`` serves ``geom_median.torch`` and
``geom_median.numpy`` alike. `eps` floors distances as there; `maxiter` bounds the steps. Gradients flow as there: with
the weights of the result held constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from array_api_compat import is_torch_array

from robustkern.functions import aggregate
from robustkern.rules import GeometricMedian

__all__ = ["compute_geometric_median"]


def compute_geometric_median(
    points: Sequence[Any],
    weights: Any = None,
    per_component: bool = False,
    skip_typechecks: bool = False,
    eps: float = 1e-6,
    maxiter: int = 100,
    ftol: float = 1e-20,
) -> SimpleNamespace:
    """Return the geometric median of n points, as ``geom_median`` does.

    Parameters
    ----------
    points : sequence of n arrays or tensors, or of n lists of them
        In lists, a point is all of its components, unless `per_component`.
    weights : (n,) array or tensor, optional
        Of the points.
    per_component : bool
        Whether each component has a median of its own.
    skip_typechecks, ftol
        Ignored: kinds are always checked, and the iteration ends where it has converged.
    eps : float
        Distances below it count as it.
    maxiter : int
        Steps at most.

    Returns
    -------
    namespace
        `median`, like one point; `termination`; `logs`, the weighted mean distance to it (there one for each step); and
        for tensors `new_weights`, shares of the points in it. With `per_component` lists of these, without the last.

    Notes
    -----
    Two reads of the data whatever the number of steps.
    """
    rows = list(points)
    if not rows:
        raise ValueError("points: expected at least one; got none")
    nested = isinstance(rows[0], (list, tuple))
    shares = None if weights is None else [float(w) for w in weights]
    if nested and per_component:
        if len({len(row) for row in rows}) > 1:
            raise ValueError("points: expected lists of as many components each (pass as many in every point)")
        found = [_median([row[k] for row in rows], shares, eps, maxiter) for k in range(len(rows[0]))]
        return SimpleNamespace(
            median=[one.median for one in found],
            termination=[one.termination for one in found],
            logs=[one.logs for one in found],
        )
    return _median(rows, shares, eps, maxiter)


def _median(rows: list[Any], weights: list[float] | None, eps: float, maxiter: int) -> SimpleNamespace:
    rule = GeometricMedian(nu=float(eps), max_iter=int(maxiter))
    fixed = [_detached(row) for row in rows]
    result, info = aggregate(fixed, rule, weights=weights, return_info=True)
    done = "function value converged within tolerance" if info.converged else "maximum iterations reached"
    assert info.weights is not None
    assert info.sq_distances is not None
    masses = np.ones(len(rows)) if weights is None else np.array(weights)
    cost = float(masses @ np.sqrt(np.where(info.weights > 0, info.sq_distances, 0.0)) / masses.sum())
    first = rows[0][0] if isinstance(rows[0], (list, tuple)) else rows[0]
    if not is_torch_array(first):
        return SimpleNamespace(median=result, termination=done, logs=[cost])
    import torch

    shares = torch.as_tensor(info.weights, dtype=first.dtype, device=first.device)
    if any(_requires_grad(row) for row in rows) and torch.is_grad_enabled():
        result = _summed(rows, shares)
    return SimpleNamespace(median=result, new_weights=shares, termination=done, logs=[cost])


def _detached(row: Any) -> Any:
    if isinstance(row, (list, tuple)):
        return [_detached(part) for part in row]
    return row.detach() if is_torch_array(row) else row


def _requires_grad(row: Any) -> bool:
    return any(map(_requires_grad, row)) if isinstance(row, (list, tuple)) else bool(row.requires_grad)


def _summed(rows: list[Any], shares: Any) -> Any:
    """Return the sum of the rows by share, which autograd records; rows without a share are never multiplied."""
    used = [(row, share) for row, share in zip(rows, shares, strict=True) if share > 0]
    if isinstance(rows[0], (list, tuple)):
        return [sum(row[k] * share for row, share in used) for k in range(len(rows[0]))]
    return sum(row * share for row, share in used)
