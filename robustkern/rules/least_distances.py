"""The geometric median of rows known by their inner products: a step costs n^2 or n^3, and nothing of d.

Of many rows of few columns it costs n d: their products with a vector are taken in the space of the columns.

The median is the point y = sum w_i x_i (sum w = 1) of least cost sum s_i |x_i - y|. With r_i = |x_i - y|, c = s / r and
C = sum c, it is where the rows pull equally: the resultant sum c_i (x_i - y) vanishes. As coefficients of the rows the
resultant is g = c - C w, which is small where the resultant is small, so that nothing cancels near the end.

- Rows first. The best row is the median where the others' pulls do not outweigh its own weight (Kuhn 1973). Where they
  balance it to rounding, the cost is flat from there to the next row (two clusters; rows on a line, even n), and the
  middle of the flat stretch is returned.
- Otherwise a step leaves the best row downhill (Vardi and Zhang 2000), and since the cost only falls from there on, no
  later point can be a row. Newton steps follow in the span of the rows: for few rows by a factorisation, for many by
  conjugate gradients, which cost n^2 each. Along a step all distances are known from two numbers a row, so searching
  the line for where its slope vanishes costs n a trial; a valley between two clusters takes long steps.
- It ends where the slope along Newton's own step is rounding: then the cost falls no further. How far it could fall at
  most is said by duality: any u_i with |u_i| <= s_i and sum u_i = 0 prove that no point costs less than
  sum <u_i, x_i>. The pulls c_i (x_i - y) are such u_i, once near rows have absorbed what is left of the resultant.

Kuhn, "A note on Fermat's problem", Mathematical Programming 4 (1973); Vardi and Zhang, "The multivariate L1-median and
associated data depth", PNAS 97 (2000).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from robustkern.contract.rows import Matrix, Vector

__all__ = ["Median", "Products", "converged_weights", "moved_to_median", "shift_bound", "smoothed_weights"]

MAX_STEPS = 100
MAX_PRODUCTS = 400  # of a large Gram matrix and a vector
MAX_SMOOTHED_STEPS = 10_000
BESIDE = 0.1  # of the least distance to a row: as much nearer a step may come that is not Weiszfeld's
PLAIN_STEPS, KEPT_STEPS = 20, 6  # of Weiszfeld, before others (honest rows take a few), and how many these rest on
MAX_TRIALS = 60  # on one line
MAX_DOUBLINGS = 2200  # more than there are powers of two
MAX_INNER = 60  # products for one Newton step
CANDIDATES, CANDIDATE_STEPS = 16, 100  # rows of few columns that may be the median, and steps to find them
SOLVED_ROWS = 200  # from more on, conjugate gradients are the faster way to a Newton step
FAIR_SHARE = 0.1  # of a Newton step
ENOUGH = 1e-11  # resultant of the pulls, of the weight, below which rounding ends the descent
EXACT = 1e-14  # of the weight, or of the rows' harmonic mean distance: no further step is worth its while
TOLERANCE = 1e-10  # of the middle distance of the rows
NEAR = 1e-4  # squared distance to a row, in its squared distance to the origin, at which it becomes the origin
EPSILON = 2.0**-53
SMALL = 1e-60  # in the square of the rows' middle distance: less counts as it


class Median(NamedTuple):
    """Weights of a geometric median, and what is known of it.

    Attributes
    ----------
    weights : (n,) float64
        Of sum 1; the median is the sum of the rows times them.
    steps : int
        Newton steps; 0 on a row, or in the middle of rows that are equally good.
    converged : bool
        Whether the inner products as given prove that the cost can fall by no more than `TOLERANCE` (in the unit of
        `gap`), or what is left of the resultant is no more than their errors may have made.
    gap : float
        The cost less a lower bound of the least cost, in units of the total weight times the middle distance (of a row
        to the median, by weight). What errors of the inner products may add is included; distances that they cannot
        tell from 0 count as 0.
    """

    weights: Vector
    steps: int
    converged: bool
    gap: float


class Products:
    """Inner products of n rows of few columns: what is asked of their (n, n) matrix, in the space of the columns."""

    __array_ufunc__ = None  # so that an array leaves `array @ products` to this class

    def __init__(self, x: Matrix) -> None:
        self.x = x

    def diagonal(self) -> Vector:
        """Return the squared lengths of the rows."""
        return np.asarray(np.einsum("ij,ij->i", self.x, self.x))

    def __matmul__(self, weights: Vector) -> Vector:
        return np.asarray(self.x @ (self.x.T @ weights))

    __rmatmul__ = __matmul__  # it is symmetric

    def __getitem__(self, row: int) -> Vector:
        return np.asarray(self.x @ self.x[row])


Gram = Matrix | Products


def converged_weights(gram: Gram, s: Vector, rounding: float, sizes: Vector | None = None) -> Median:
    """Find the minimiser of sum s_i |x_i - y|, given inner products whose errors are rounding * size_i * size_j.

    Sizes are the lengths of the rows, where nothing else is said: those of what they are mixtures of may be larger.
    """
    distances: Matrix | _Distances
    if isinstance(gram, Products):
        some = _near_the_median(gram.x, s)
        costs = np.full(len(s), math.inf)
        distances = _Distances(gram.x, rounding)
        costs[some] = _relative_costs_of(gram.x, s, some)
        norms = gram.diagonal()
        lengths = np.sqrt(norms)
    else:
        gram, unit = _of_ordinary_size(gram)
        norms = np.maximum(gram.diagonal(), 0.0)  # of mixtures whose parts cancel they may be below
        lengths = np.sqrt(norms) if sizes is None else np.maximum(np.sqrt(norms), unit * sizes)
        squares = norms[:, None] + norms - 2 * gram
        lines = np.sqrt(np.maximum(squares, 0.0))
        lines[lines <= np.sqrt(rounding) * (lengths[:, None] + lengths)] = 0.0
        distances, costs = lines, _relative_costs(gram, s, lines)
    best = int(np.argmin(costs))
    # From here on the best row is the origin: close to it, where squares cancel most, nothing is left to cancel.
    gram = _seen_from(gram, best)
    from_best = np.sqrt(np.maximum(gram.diagonal(), 0.0))
    # Rows at the best one, as far as rounding and what counts as a distance can tell.
    least = 1e3 * math.sqrt(SMALL) * _middle(from_best)
    here = from_best <= np.maximum(math.sqrt(rounding) * (lengths + lengths[best]), least)
    pull = np.divide(s, from_best, out=np.zeros_like(s), where=~here)
    weight_here = float(s[here].sum())
    at_best = np.zeros_like(s)
    at_best[best] = 1.0
    squared = float(pull @ gram @ pull)
    balance = weight_here**2
    # What rounding may have changed. Where that is much, because rows are near, inner products are taken at their word.
    doubt = rounding * float(pull @ (lengths + lengths[best])) ** 2
    slack = min(doubt, ENOUGH * float(s.sum()) * weight_here)
    if squared <= balance + doubt:
        w, risen = None, 0.0
        if squared <= max(balance - doubt, 0.0):
            w = _shared(here, distances)
        else:
            tied = costs - costs[best] <= max(16 * rounding, 1e-12) * float(s.sum()) * _middle(from_best)
            if np.count_nonzero(tied & ~here):
                w, risen = _shared(tied | here, distances), float((costs - costs[best])[tied].max())
            elif squared <= balance + slack:
                w, risen = _flat_middle(gram, s, pull, here, slack)
        if w is not None:
            judged = _judged(gram, s, at_best, lengths, rounding, 0, risen, True)
            return judged._replace(weights=w)

    # Rows so near the best one that a step to them would pass for convergence are left together with it, if possible.
    middle = _middle(from_best)
    near = from_best <= 10 * TOLERANCE * middle
    resultant = math.sqrt(squared)
    if np.count_nonzero(near & ~here):
        outside = np.where(near, 0.0, pull)
        if (resultant_outside := _length(gram, outside)) > float(s[near].sum()):
            pull, resultant, weight_here = outside, resultant_outside, float(s[near].sum())
    change = pull * ((1 - weight_here / resultant) / pull.sum())
    change[best] -= change.sum()
    if resultant < 2 * weight_here:  # the step is short, and may be far too short
        moved = gram @ change
        squared = max(float(change @ moved), 0.0)
        slope = (resultant - weight_here) * math.sqrt(squared)
        r, q = (np.where(here, 0.0, a) for a in (from_best, moved))
        change *= _line_search(s, r, q, squared, slope, 0.0) or 1.0
    gram, w, steps = _descend(gram, s, at_best + change, max(SMALL * middle**2, 1e-290))
    return _judged(gram, s, w, lengths, rounding, steps, 0.0, False)


def _of_ordinary_size(gram: Matrix) -> tuple[Matrix, float]:
    """Bring tiny squares to about 1, by a power of two: products of them would vanish. Weights do not feel it.

    Returns what lengths are multiplied with, too.
    """
    norms = gram.diagonal()
    ranked = np.sort(norms[norms > 0])
    if not len(ranked) or ranked[len(ranked) // 2] > 1e-100:
        return gram, 1.0
    room = 1000 - math.frexp(float(ranked[-1]))[1]  # above the largest one
    power = min(-math.frexp(float(ranked[len(ranked) // 2]))[1], room)
    return np.asarray(np.ldexp(gram, power)), 2.0 ** (power / 2)


def _relative_costs(gram: Matrix, s: Vector, distances: Matrix) -> Vector:
    """Sum of distances from each row to all, less the same sum for the row nearest to the centre.

    A sum of differences, (a^2 - b^2) / (a + b): in plain sums far rows would drown what tells the others apart.
    """
    norms = gram.diagonal()
    base = int(np.argmin(norms))
    squares = (norms - norms[base])[:, None] - 2 * (gram - gram[base])
    lengths = distances + distances[base]
    return np.asarray(np.divide(squares, lengths, out=np.zeros_like(squares), where=lengths > 0) @ s)


class _Distances:
    """Distances of rows of few columns, computed where they are asked for; what rounding may have made counts as 0."""

    def __init__(self, x: Matrix, rounding: float) -> None:
        self._x, self._least = x, math.sqrt(rounding)
        self._lengths = np.sqrt(np.einsum("ij,ij->i", x, x))

    def __getitem__(self, pair: tuple[int, int]) -> float:
        i, j = pair
        found = float(np.linalg.norm(self._x[i] - self._x[j]))
        return found if found > self._least * float(self._lengths[i] + self._lengths[j]) else 0.0


def _near_the_median(x: Matrix, s: Vector) -> NDArray[np.intp]:
    """Return distinct rows nearest to where some steps of Weiszfeld lead: if the median is a row, it is one of them.

    The rows are less their column-wise middle, where the steps begin.
    """
    y = np.zeros(x.shape[1])
    for _ in range(CANDIDATE_STEPS):
        r = np.linalg.norm(x - y, axis=1)
        pull = s / np.maximum(r, EPSILON * (_middle(r) or 1.0))
        moved = pull @ x / pull.sum()
        still = float(np.linalg.norm(moved - y)) <= 1e-3 * TOLERANCE * _middle(r)
        y = moved
        if still:
            break
    r = np.linalg.norm(x - y, axis=1)
    some = r.argsort(kind="stable")[: 4 * CANDIDATES]
    first = np.unique(x[some], axis=0, return_index=True)[1]
    if len(first) < min(CANDIDATES, len(x)):  # copies: look at all rows
        some = np.arange(len(x))
        first = np.unique(x, axis=0, return_index=True)[1]
    distinct = some[first]
    return np.sort(distinct[r[distinct].argsort(kind="stable")[:CANDIDATES]])


def _relative_costs_of(x: Matrix, s: Vector, some: NDArray[np.intp]) -> Vector:
    """As `_relative_costs`, of some of the rows of few columns, less that of the first of them."""
    base = np.linalg.norm(x - x[some[0]], axis=1)
    costs = []
    for i in some:
        lengths = np.linalg.norm(x - x[i], axis=1) + base
        # |x_i - x_j|^2 - |b - x_j|^2 = <x_i - b, x_i + b - 2 x_j>
        squares = (x[i] - x[some[0]]) @ (x[i] + x[some[0]] - 2 * x).T
        costs.append(float(np.divide(squares, lengths, out=np.zeros_like(squares), where=lengths > 0) @ s))
    return np.array(costs)


def _descend(gram: Gram, s: Vector, w: Vector, least: float) -> tuple[Gram, Vector, int]:
    """Take Newton steps until none descends; squared distances count as no smaller than `least`.

    Returns
    -------
    gram, w : arrays
        The inner products from the row that is the origin in the end, and the weights.
    steps : int
        How many steps there were.
    """
    norms = gram.diagonal()
    weight = float(s.sum())
    products_left = MAX_PRODUCTS
    length = last_length = math.inf
    for step in range(MAX_STEPS):
        at = _Point.of(gram, s, w, norms, least)
        near = int(at.r.argmin())
        if at.r[near] ** 2 <= NEAR * norms[near]:
            gram = _seen_from(gram, near)
            norms = gram.diagonal()
            products_left -= 8
            at = _Point.of(gram, s, w, norms, least)
        if products_left <= 0:
            return gram, w, step
        steepness = math.sqrt(max(float(at.g @ at.h), 0.0))
        # After two whole Newton steps the next one's length is known: they shrink quadratically.
        expected = (length / last_length) ** 2 * length
        if steepness <= EXACT * weight and expected * at.total <= EXACT * weight:
            return gram, at.c / at.total, step
        last_length, length = length, math.inf
        taken, damping = None, 0.0
        for method in (_newton, _newton, _weiszfeld):
            change, used = method(gram, at, damping, products_left)
            products_left -= used
            moved = gram @ change
            slope, squared = float(at.g @ moved), float(change @ moved)
            size = math.sqrt(max(squared, 0.0))
            noise = 4 * EPSILON * weight * size
            if not (slope > noise and squared > 0):
                if steepness <= ENOUGH * weight:
                    break
                continue  # Newton's step is lost in rounding
            share = _line_search(s, at.r, moved - w @ moved, squared, slope, noise)
            if share > 0:
                taken, length = share * change, size if share == 1 else math.inf
            if share >= FAIR_SHARE:
                break
            # Beside a row the direction from it must be right before the distance can be: shorten only the soft part.
            damping = slope / squared / max(share, EPSILON)
        if taken is None:
            return gram, at.c / at.total, step  # with these weights least cancels in what follows
        w = w + taken
    return gram, w, MAX_STEPS


class _Point(NamedTuple):
    """A point y = sum w_i x_i between the rows.

    Attributes
    ----------
    products, square
        Inner products of the rows with y, and of y with itself.
    r, c, total, others
        Distances, pulls per distance s / r, their sum, and for each row the sum of the others'.
    g, h
        The resultant of the pulls as a combination of the rows (sum g = 0), and its inner products with the x_i - y.
    """

    w: Vector
    products: Vector
    square: float
    r: Vector
    c: Vector
    total: float
    others: Vector
    g: Vector
    h: Vector

    @classmethod
    def of(cls, gram: Gram, s: Vector, w: Vector, norms: Vector, least: float) -> _Point:
        """Measure; squared distances count as no smaller than `least`."""
        products = gram @ w
        square = float(w @ products)
        r = np.sqrt(np.maximum(norms - 2 * products + square, least))
        c = s / r
        total = float(c.sum())
        others = total - c
        near = int(c.argmax())
        if 2 * c[near] > total:  # the others are not lost in its sum
            others[near] = float(c[:near].sum()) + float(c[near + 1 :].sum())
        g = c - total * w
        pulled = gram @ g
        return cls(w, products, square, r, c, total, others, g, pulled - w @ pulled)


def _weiszfeld(gram: Gram, at: _Point, damping: float, products_left: int) -> tuple[Vector, int]:
    """Change of the weights by a Weiszfeld step: down the gradient."""
    return at.g / at.total, 0


def _newton(gram: Gram, at: _Point, damping: float, products_left: int) -> tuple[Vector, int]:
    """Change of the weights by a Newton step, and how many products it took.

    With u_i = x_i - y and b = c / r^2 the Hessian is C I - sum b_i u_i u_i^T. For the step v and z_i = sqrt(b_i)
    <u_i, v> that is (C I - sqrt(b) K sqrt(b)) z = sqrt(b) h, where K holds the inner products of the u_i; and C v =
    sum g_i x_i + sum sqrt(b_i) z_i u_i. Damping adds to C. The matrix is scaled to a diagonal of ones: beside a row,
    whose own pull dwarfs the others', rounding would hide these otherwise.
    """
    scale = np.sqrt(at.c / (at.others + damping)) / at.r
    if len(scale) > SOLVED_ROWS or isinstance(gram, Products):
        z, used = _conjugate_gradients(gram, at, scale, products_left)
    else:
        z, used = _solved(gram, at, scale), 0
    pulls = scale * z
    return (at.g + pulls - pulls.sum() * at.w) / (at.total + damping), used


def _solved(gram: Matrix, at: _Point, scale: Vector) -> Vector:
    matrix = gram - at.products[:, None]
    matrix -= at.products - at.square
    matrix *= scale[:, None]
    matrix *= -scale
    matrix.flat[:: len(scale) + 1] = 1 + 8 * EPSILON
    try:
        return np.asarray(np.linalg.solve(matrix, scale * at.h))
    except np.linalg.LinAlgError:  # all rows on a line through y
        return np.zeros_like(scale)


def _conjugate_gradients(gram: Gram, at: _Point, scale: Vector, products_left: int) -> tuple[Vector, int]:
    own = 1 + (scale * at.r) ** 2
    z = np.zeros_like(scale)
    direction = residual = scale * at.h
    size = float(residual @ residual)
    enough = 1e-12 * size
    used = 0
    while size > enough and used < min(products_left, MAX_INNER):
        used += 1
        v = scale * direction
        image = gram @ v - float(v.sum()) * (at.products - at.square) - float(at.products @ v)
        image = own * direction - scale * image
        curvature = float(direction @ image)
        if curvature <= 8 * EPSILON * float(direction @ direction):
            break
        z = z + size / curvature * direction
        residual = residual - size / curvature * image
        before, size = size, float(residual @ residual)
        direction = residual + size / before * direction
    return z, used


def _line_search(s: Vector, r: Vector, q: Vector, squared: float, slope: float, noise: float) -> float:
    """Return the share of a step v at which the cost is less and its slope has halved at least; 0 where there is none.

    Distances change with q_i = <x_i - y, v> and |v|^2 alone.
    """
    low, high, share = 0.0, math.inf, 1.0
    length = math.sqrt(squared)
    towards, squares, least = q / (length or 1.0), r * r, SMALL * squared
    for _ in range(MAX_TRIALS if squared > 0 else 0):
        difference = share * (share * squared - 2 * q)
        along = share * length - towards
        # No row is nearer than its distance along the line, which rounding must not undercut.
        reached = np.sqrt(np.maximum(squares + difference, along * along) + least)
        rise = float(s @ (along / reached)) * length
        if rise > slope / 2 or float(s @ (difference / (r + reached))) > noise:
            high = share
        elif rise < -slope / 8:
            low = share
        else:
            return share
        share = 4 * low if math.isinf(high) else high / 4 if low == 0 else (low + high) / 2
    return low


def _flat_middle(gram: Gram, s: Vector, pull: Vector, here: NDArray[np.bool_], slack: float) -> tuple[Vector, float]:
    """Weights of the middle of the stretch from a row, where the others pull, on which the cost is flat to rounding.

    Also how far the cost may have risen on the way.
    """
    norms = gram.diagonal()
    least = max(SMALL * _middle(norms), 1e-290)
    moved = gram @ pull
    resultant = math.sqrt(float(pull @ moved))
    q = moved / resultant
    weight_here = float(s[here].sum())
    others = np.where(here, 0.0, s)

    def radii(t: float) -> Vector:
        return np.asarray(np.sqrt(np.maximum(norms + t * (t - 2 * q), (t - q) ** 2) + least))

    def rises(t: float) -> bool:
        return weight_here + float(others @ ((t - q) / radii(t))) > slack / (2 * resultant)

    low, high = 0.0, _middle(np.sqrt(norms[others > 0]))
    for _ in range(MAX_DOUBLINGS):
        if rises(high):
            break
        low, high = high, 2 * high
    for _ in range(MAX_TRIALS):
        middle = (low + high) / 2
        low, high = (low, middle) if rises(middle) else (middle, high)
    w = s / radii(low / 2)  # Weiszfeld's next point is the same, and weights that are all positive cost no digits
    return w / w.sum(), low * slack / (4 * resultant)


def _judged(
    gram: Gram,
    s: Vector,
    w: Vector,
    lengths: Vector,
    rounding: float,
    steps: int,
    risen: float,
    on_row: bool,
) -> Median:
    """Say how much lower than here the cost can be.

    Where the pulls u_i = c_i (x_i - y) leave a resultant of length l, rows N that are more than half of the weight
    absorb it: (1 - t) u_i + s_i v, with the same v for all of them, is no longer than s_i where |v| <= t. All u_i
    then sum to 0 with t = l / (s(N) - |sum of u over N|), at most l / (2 s(N) - s - l), and the bound is lower than the
    cost by at most 2 t sum s_i r_i over N. Rows at y take any pull up to their weight at no cost.
    """
    products = gram @ w
    r = np.sqrt(np.maximum(gram.diagonal() - 2 * products + w @ products, 0.0))
    errors = rounding * (lengths + float(abs(w) @ lengths)) ** 2  # of the squares
    at_row = r <= np.sqrt(errors) if on_row else np.zeros(len(r), dtype=np.bool_)
    order = r.argsort()
    share = s[order].cumsum()
    total = float(share[-1])
    middle_row = order[min(int(share.searchsorted(total * (0.5 + 1e-9), side="right")), len(r) - 1)]
    middle = float(r[middle_row])
    if at_row[middle_row] or middle == 0:  # at least half of the weight is here
        return Median(w, steps, True, 0.0)
    if not on_row:
        r = np.maximum(r, SMALL**0.5 * middle)
    room = 2 * share - total
    paths = (2 * s * r)[order].cumsum()

    def price(resultant: float) -> float:
        enough = room > resultant
        return float((paths[enough] / (room[enough] - resultant)).min(initial=math.inf))

    def bounds(here: NDArray[np.bool_]) -> tuple[float, float, bool]:
        pull = np.divide(s, r, out=np.zeros_like(s), where=~here)
        g = pull - float(pull.sum()) * w
        squared = max(float(g @ gram @ g), 0.0)
        weight = float(s[here].sum())
        left = (squared - weight**2) / (math.sqrt(squared) + weight) if squared > weight**2 else 0.0
        # Errors change the pulls by this much, and may part from y what seems to be there.
        changed = float((s * np.minimum(errors / (2 * r * r + (r == 0)), 1))[~here].sum())
        uncertain = math.sqrt(squared + rounding * float(abs(g) @ lengths) ** 2) - weight + changed
        proven = left * price(left) if left > 0 else 0.0
        gap = uncertain * price(uncertain) if uncertain > 0 else 0.0
        if weight > 0:
            away, apart = here & ~at_row, here & (r > 0)
            proven += 2 * float(s[away] @ r[away])
            gap += 2 * float(s[apart] @ (r + np.sqrt(errors))[apart])
        return proven, gap, left <= changed

    proven, gap, lost = bounds(at_row)
    nearest = float(r.min())
    if nearest * math.sqrt(nearest / middle) <= math.sqrt(float(errors.max())):
        # Pulls there are known so badly that it costs less to go there.
        near = r * np.sqrt(r / middle) <= np.sqrt(errors)
        proven, gap = np.minimum((proven, gap), bounds(near | at_row)[:2]).tolist()
    unit = total * middle
    proven, gap = (proven + risen) / unit, min(gap + risen, float(paths[-1])) / unit
    return Median(w, steps, proven <= TOLERANCE or lost, gap)


def _seen_from(gram: Gram, row: int) -> Gram:
    """Inner products of the rows less one of them; its own are exactly 0."""
    if isinstance(gram, Products):
        return Products(gram.x - gram.x[row])
    result = gram - gram[row]
    result -= result[:, [row]]
    return np.asarray(result)


def _shared(tied: NDArray[np.bool_], distances: Matrix | _Distances) -> Vector:
    """Equal weights for the distinct ones of some rows."""
    distinct: list[int] = []
    for i in np.flatnonzero(tied).tolist():
        if all(distances[i, j] > 0 for j in distinct):
            distinct.append(i)
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


def _length(gram: Gram, change: Vector) -> float:
    return math.sqrt(max(float(change @ gram @ change), 0.0))


def smoothed_weights(
    gram: Matrix,
    s: Vector,
    nu: float,
    max_iter: int | None,
    origin: tuple[Vector, float] | None,
    tol: float | None = None,
) -> tuple[Vector, int, bool]:
    """Weights after Weiszfeld steps with distances below nu counted as nu, from the mean or from the origin.

    At a row, with nu = 0, the Vardi-Zhang step is taken. `converged` tells whether the last step was no longer than
    `tol` (None: 1e-10 of the spread), where it stops unless only a number of steps is asked for.
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
    free = max_iter is None and tol is None  # to take other steps than Weiszfeld's to where these lead
    converged = False
    iteration, last = 0, math.inf
    taken: list[tuple[Vector, Vector]] = []
    while iteration < limit:
        iteration += 1
        new = _smoothed_step(gram, s, r, nu)
        step = math.inf if w is None else _length(gram, new - w)
        if w is not None and free and iteration > PLAIN_STEPS:
            if step > 2 * last:  # too far: back to the step before
                w, last = taken[-1][1], math.inf
                taken.clear()
                r = _radii(gram, w)
                continue
            taken, last = [*taken[1 - KEPT_STEPS :], (w, new)], step
        w = new
        r = _radii(gram, w)
        converged = step <= (TOLERANCE * _middle(r) if tol is None else tol)
        if step == 0 or (converged and (max_iter is None or tol is not None)):
            break
        if len(taken) > 1:
            further = _further(gram, taken)
            radii = _radii(gram, further)
            # Only downhill, and not to a row: steps are short beside one, wherever the rows pull.
            downhill = _smoothed_cost(s, radii, nu) <= _smoothed_cost(s, r, nu) * (1 + 8 * EPSILON)
            if downhill and radii.min() >= BESIDE * r.min():
                w, r = further, radii
    return np.zeros_like(s) if w is None else w, iteration, converged


def _smoothed_cost(s: Vector, r: Vector, nu: float) -> float:
    return float(s @ np.where(r < nu, (r * (r / nu if nu else 0.0) + nu) / 2, r))


def _further(gram: Matrix, taken: list[tuple[Vector, Vector]]) -> Vector:
    """Where some steps from points to their images may lead: the combination of the images that leaves least to go.

    Anderson, "Iterative procedures for nonlinear integral equations", Journal of the ACM 12 (1965).
    """
    points, images = (np.array(part) for part in zip(*taken, strict=True))
    steps = images - points
    apart = steps[:-1] - steps[-1]
    across = apart @ gram
    left = np.linalg.lstsq(across @ apart.T, across @ steps[-1], rcond=1e-12)[0]
    return np.asarray(images[-1] - left @ (images[:-1] - images[-1]))


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


def moved_to_median(gram: Matrix, s: Vector, w: Vector, squares: Vector, wrong: float) -> tuple[Vector, float, float]:
    """Squared distances of the rows to the median, by exact ones to a point beside it.

    One Newton step, of which the inner products need few digits, leaves its square over the least distance, and as much
    of it as the inner products are wrong by.

    Parameters
    ----------
    gram : (n, n) float64
        Inner products of the rows, 0 for rows that are not finite.
    s, w : (n,) float64
        Weights of the distances in the sum, and of the rows in the point, of sum 1; 0 for rows that are not finite.
    squares : (n,) float64
        The rows' squared distances to the point.
    wrong : float
        Errors of the inner products, in units of the rows' lengths.

    Returns
    -------
    (n,) float64, float, float
        Squared distances; how long the step was, and how far the median may still be.
    """
    used = np.flatnonzero(s)
    products = gram @ w
    square = float(w @ products)
    inner = gram[np.ix_(used, used)]
    r = np.sqrt(squares[used])
    c = s[used] / r
    total = float(c.sum())
    g = c - total * w[used]
    pulled = inner @ g
    at = _Point(w[used], products[used], square, r, c, total, total - c, g, pulled - w[used] @ pulled)
    change = np.zeros_like(w)
    change[used], _ = _newton(inner, at, 0.0, MAX_PRODUCTS)
    moved = gram @ change
    length = math.sqrt(max(float(change @ moved), 0.0))
    left = 4 * length * (length / float(r.min()) + wrong)
    return np.maximum(squares - 2 * (moved - w @ moved) + length**2, 0.0), length, left


def _smoothed_step(gram: Matrix, s: Vector, r: Vector, nu: float) -> Vector:
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
