"""The geometric median of rows known by their inner products: a step costs n^2 or n^3, and nothing of d."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from robustkern.contract.rows import Matrix, Vector

__all__ = ["converged_weights", "shift_bound", "smoothed_weights"]

MAX_STEPS = 300
MAX_SMOOTHED_STEPS = 10_000
TOLERANCE = 1e-10  # of the middle distance of the rows
NEWTON_SHARES = tuple(4.0**-k for k in range(12))  # a whole step overshoots beside a row, or almost on a line


def converged_weights(gram: Matrix, s: Vector, rounding: float) -> tuple[Vector, int, bool]:
    """Weights of the minimiser of sum s_i |x_i - y|, the number of steps, and whether they converged.

    Starts at the best row: if no point is better (Kuhn's condition) that row is the median, and rows that are as good
    share the weight, since on a line every point between them is a minimiser too. Otherwise the Vardi-Zhang step leaves
    that row downhill, so no later iterate can meet a row; Newton steps in the span of the rows follow, or a Weiszfeld
    step where Newton's does not descend.
    """
    norms = gram.diagonal()
    distances = np.sqrt(np.maximum(norms[:, None] + norms - 2 * gram, 0.0))
    noise = np.sqrt(rounding) * (np.sqrt(norms)[:, None] + np.sqrt(norms))
    distances[distances <= noise] = 0.0
    costs = _relative_costs(gram, s, distances)
    best = int(np.argmin(costs))
    here = distances[best] == 0
    pull = np.divide(s, distances[best], out=np.zeros_like(s), where=~here)
    # Inner products of x_i - x_best; the resultant of the unit vectors towards the other rows.
    inner = gram - gram[best] - gram[:, [best]] + gram[best, best]
    squared = float(pull @ inner @ pull)
    resultant = math.sqrt(max(squared, 0.0))
    weight_here = float(s[here].sum())
    slack = rounding * float(pull @ (np.sqrt(norms) + math.sqrt(norms[best]))) ** 2  # what rounding may have added
    if squared <= weight_here**2 + slack:
        scale = float(s.sum()) * _middle(distances[best])
        return _shared(costs - costs[best] <= max(16 * rounding, 1e-12) * scale, distances), 0, True

    # Rows so near the best one that a step to them would pass for convergence are left together with it, if possible.
    near = distances[best] <= 10 * TOLERANCE * _middle(distances[best])
    outside = np.where(near, 0.0, pull)
    resultant_outside = _length(inner, outside)
    if resultant_outside > float(s[near].sum()):
        pull, resultant, weight_here = outside, resultant_outside, float(s[near].sum())

    # From here on the best row is the origin: close to it, where squares cancel most, nothing is left to cancel.
    gram = inner
    w = pull / pull.sum()
    stay = weight_here / resultant
    w = (1 - stay) * w
    w[best] += stay
    at_best = np.zeros_like(w)
    at_best[best] = 1.0
    step = _length(gram, w - at_best)
    total = float(s.sum())
    r = _radii(gram, w)
    for iteration in range(1, MAX_STEPS + 1):
        spread = _middle(r)  # no few far rows can loosen the tolerance
        previous_step, step = step, math.inf
        for method, shares in ((_newton, NEWTON_SHARES), (_weiszfeld, (1.0,))):
            direction = method(gram, s, w, r)
            for share in shares if direction is not None else ():
                assert direction is not None
                candidate = w + share * direction
                length = _length(gram, share * direction)
                reached = _radii(gram, candidate)
                if _cost_change(gram, s, w, r, candidate, reached) <= 1e-15 * length * total:
                    w, r, step = candidate, reached, length
                    break
            if not math.isinf(step):
                break
        if math.isinf(step):  # nothing descends any more: what is left is rounding
            weiszfeld = _weiszfeld(gram, s, w, r)
            left = 0.0 if weiszfeld is None else _length(gram, weiszfeld)
            return w, iteration, min(left, previous_step) <= TOLERANCE * spread
        # Newton's steps shrink quadratically: once they stop shrinking, the rest is rounding.
        if step <= 1e-15 * spread or (step <= TOLERANCE * spread and step >= previous_step / 2):
            return w, iteration, True
    return w, MAX_STEPS, step <= TOLERANCE * spread


def _relative_costs(gram: Matrix, s: Vector, distances: Matrix) -> Vector:
    """Sum of distances from each row to all, less the same sum for the row nearest to the centre.

    A sum of differences, (a^2 - b^2) / (a + b): in plain sums far rows would drown what tells the others apart.
    """
    norms = gram.diagonal()
    base = int(np.argmin(norms))
    squares = (norms - norms[base])[:, None] - 2 * (gram - gram[base])
    lengths = distances + distances[base]
    return np.asarray(np.divide(squares, lengths, out=np.zeros_like(squares), where=lengths > 0) @ s)


def _cost_change(gram: Matrix, s: Vector, w: Vector, r: Vector, new: Vector, new_r: Vector) -> float:
    """Change of the sum of distances from one point to another, as a sum of differences like `_relative_costs`."""
    change = new - w
    moved = gram @ change
    squares = change @ moved - 2 * (moved - w @ moved)
    lengths = r + new_r
    return float(np.divide(squares, lengths, out=np.zeros_like(squares), where=lengths > 0) @ s)


def _shared(tied: NDArray[np.bool_], distances: Matrix) -> Vector:
    """Equal weights for the distinct ones of some rows."""
    distinct: list[int] = []
    for i in np.flatnonzero(tied):
        if all(distances[i, j] > 0 for j in distinct):
            distinct.append(int(i))
    w = np.zeros(len(tied))
    w[distinct] = 1.0 / len(distinct)
    return w


def _radii(gram: Matrix, w: Vector) -> Vector:
    products = gram @ w
    return np.sqrt(np.maximum(gram.diagonal() - 2 * products + w @ products, 0.0))


def _middle(values: Vector) -> float:
    """Return the median: `np.median` takes as long as a Newton step of few rows."""
    ranked = np.sort(values)
    return float(ranked[(len(ranked) - 1) // 2] + ranked[len(ranked) // 2]) / 2


def _length(gram: Matrix, change: Vector) -> float:
    return math.sqrt(max(float(change @ gram @ change), 0.0))


def _weiszfeld(gram: Matrix, s: Vector, w: Vector, r: Vector) -> Vector | None:
    """Change of the weights by a Weiszfeld step, None on a row."""
    if np.count_nonzero(r) < len(r):
        return None
    pull = s / r
    return np.asarray(pull / pull.sum() - w)


def _newton(gram: Matrix, s: Vector, w: Vector, r: Vector) -> Vector | None:
    """Change of the weights by a Newton step, a combination of the x_i - v; None where there is none.

    With u = x_i - v, c = s/r and b = c/r^2 the Hessian is sum(c) I - sum b_i u_i u_i^T and the downhill gradient
    sum c_i u_i; for a step sum a_i u_i, a = sqrt(b) z, that is (sum(c) I - sqrt(b) K sqrt(b)) z = r sqrt(c).
    """
    if np.count_nonzero(r) < len(r):
        return None
    products = gram @ w
    k = gram - products[:, None] - products + w @ products
    np.fill_diagonal(k, r * r)
    c = s / r
    root = np.sqrt(c) / r
    matrix = c.sum() * np.eye(len(s)) - root[:, None] * k * root
    try:
        a = root * np.linalg.solve(matrix, r * np.sqrt(c))
    except np.linalg.LinAlgError:  # all rows on a line through v
        return None
    if not np.isfinite(a).all():
        return None
    return np.asarray(a - a.sum() * w)


def smoothed_weights(
    gram: Matrix, s: Vector, nu: float, max_iter: int | None, origin: tuple[Vector, float] | None
) -> tuple[Vector, int, bool]:
    """Weights after Weiszfeld steps with distances below nu counted as nu, from the mean or from the origin.

    At a row, with nu = 0, the Vardi-Zhang step is taken. `converged` tells whether the last step was below 1e-10 of the
    spread, where it stops unless a number of steps is asked for.
    """
    norms = gram.diagonal()
    w: Vector | None
    if origin is None:
        w = s / s.sum()
        r = _radii(gram, w)
    else:
        w = None
        with np.errstate(invalid="ignore", over="ignore"):
            r = np.sqrt(np.maximum(norms - 2 * origin[0] + origin[1], 0.0))
        if not np.isfinite(r).all():  # the origin is 1e150 spreads away: every row equally far
            r = np.full_like(r, math.sqrt(np.finfo(np.float64).max))
    limit = MAX_SMOOTHED_STEPS if max_iter is None else max_iter
    converged = False
    iteration = 0
    while iteration < limit:
        iteration += 1
        new = _smoothed_step(gram, s, w, r, nu)
        step = math.inf if w is None else _length(gram, new - w)
        w = new
        r = _radii(gram, w)
        converged = step <= TOLERANCE * _middle(r)
        if step == 0 or (converged and max_iter is None):
            break
    assert w is not None
    return w, iteration, converged


def shift_bound(gram: Matrix, lengths: Vector, s: Vector, w: Vector, noise: float) -> float:
    """How far errors of noise * lengths[i] * lengths[j] in the inner products may have moved the minimiser w.

    In units of the middle distance; inf where they leave it open. They change the squared radii by at most e, and so
    the resultant of the pulls by sum(s e / 2 r^2); divided by the least curvature that is a length. The curvature is
    sum(s / r) less the largest eigenvalue of a matrix, which no row sum of absolute values falls short of.
    """
    products = gram @ w
    inner = gram - products[:, None] - products + w @ products
    r = np.sqrt(np.maximum(inner.diagonal(), 0.0))
    e = noise * (lengths + abs(w) @ lengths) ** 2
    if not (e < r * r / 16).all():
        return math.inf
    pull = s / r
    curvature = float(pull.sum() - (abs(inner) / r[:, None] @ (pull / r)).max())
    if curvature <= 0:
        return math.inf
    return float((s * e / (2 * r * r)).sum()) / curvature / _middle(r)


def _smoothed_step(gram: Matrix, s: Vector, w: Vector | None, r: Vector, nu: float) -> Vector:
    floored = np.maximum(r, nu)
    here = floored == 0
    if not here.any():
        pull = s / floored
        return np.asarray(pull / pull.sum())
    # On a row: move only as far as the other rows outweigh it (Vardi and Zhang 2000).
    row = int(np.flatnonzero(here)[0])
    at_row = np.zeros_like(s)
    at_row[row] = 1.0
    pull = np.divide(s, r, out=np.zeros_like(s), where=~here)
    if not pull.any():
        return at_row
    inner = gram - gram[row] - gram[:, [row]] + gram[row, row]
    resultant = math.sqrt(max(float(pull @ inner @ pull), 0.0))
    stay = min(1.0, float(s[here].sum()) / resultant) if resultant > 0 else 1.0
    return np.asarray((1 - stay) * pull / pull.sum() + stay * at_row)
