"""Rules on inner products alone: for those who have the Gram of their rows, and keep the rows to themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from robustkern.backends.registry import choose
from robustkern.contract.rows import MAX_ROWS, Block, Matrix, PlainLeaf, Undivided, Vector
from robustkern.engine import check_rest, limits
from robustkern.rules.base import Aggregator, as_aggregator
from robustkern.rules.geometry import EPSILON, MAX_SQUARE, Geometry, Given, Mixture, Reference
from robustkern.rules.view import View

__all__ = ["weights_of"]


class _Products(Undivided):
    """Rows of which nobody has the columns."""

    device = "cpu"
    has_centre = False
    plain: Sequence[PlainLeaf] = ()
    combine: Any = None

    def __init__(self, rule: Aggregator, n: int) -> None:
        self.n, self.d, self.dtypes = n, 0, {np.dtype(np.float64)}
        self._rule = rule

    def row_name(self, row: int) -> str:
        return str(row)

    def blocks(self) -> Iterator[Block]:
        raise ValueError(
            f"{self._rule}: it looks at columns, which inner products do not tell (use aggregate, or a rule on "
            "distances)"
        )

    results = blocks


def weights_of(
    rule: Aggregator | str,
    gram: ArrayLike,
    /,
    *,
    f: int | None = None,
    delta: float | None = None,
    weights: ArrayLike | None = None,
    seed: int | None = None,
) -> Vector:
    """Return which weighted sum of the rows a rule makes, from their inner products alone.

    Parameters
    ----------
    rule : rule or str
        Built on distances and averages: the geometric median, Krum and its kin, MDA, clipping, chains of them with NNM
        or bucketing, and CTMA over them.
    gram : (n, n) array_like
        Inner products of the rows, symmetric: ``x @ x.T``. Rows with a NaN or Inf among theirs count as not finite.
    f, delta, weights, seed
        As for `aggregate`.

    Returns
    -------
    (n,) float64
        Shares of the rows in the result, 0 for rows that are not finite. They sum to 1, or to less where the rule
        shortens rows.

    Raises
    ------
    TypeError, ValueError, NonFiniteError
        As `aggregate`; and where the rule needs columns (medians, trimmed means) or a centre, or the products are of no
        rows.

    Notes
    -----
    No read of the data: O(n^2) to O(n^3) steps. Distances are as good as the products: digits that a large common
    offset has cost are lost, and what is equal within their roundings goes to the lowest index.
    `robustkern.kernels.gram` makes products of centred rows, for which rules that measure from the origin cannot be
    used.

    Examples
    --------
    >>> import numpy as np, robustkern as rk
    >>> x = np.array([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [50.0, 50.0]])
    >>> rk.weights_of("multi_krum(m=2)", x @ x.T, f=1)
    array([0.5, 0.5, 0. , 0. ])
    """
    plan = as_aggregator(rule)
    products = np.array(gram, dtype=np.float64)
    n = len(products) if products.ndim == 2 else 0
    if not 0 < n <= MAX_ROWS or products.shape != (n, n):
        raise ValueError(f"{plan}: gram must have shape (n, n), products of 1 to {MAX_ROWS} rows; got {products.shape}")
    if "centre" in plan.points:
        raise ValueError(f"{plan}: centre is required, which inner products do not hold (use aggregate)")
    within = limits(plan, n, str, f, delta, weights)
    source = _Products(plan, n)
    drawn_from = check_rest(plan, source, within.weights, seed)
    given = Given(source, choose("auto", source.dtypes, "cpu"), n, *within, "origin" in plan.points, drawn_from)
    given.geometry = _geometry(plan, products)
    given.nonfinite = ~given.geometry.finite
    # As mixtures, rows are what nobody can measure again.
    view = View(given, n, *within, mix=Mixture(np.eye(n), np.ones(n)))
    with np.errstate(all="ignore"):
        solution = plan.solve(view)
        view.check(solution, plan)
    if solution.weights is None:
        source.blocks()
    assert solution.weights is not None
    return np.asarray(solution.weights / solution.divisor)


def _geometry(rule: Aggregator, gram: Matrix) -> Geometry:
    """Return the geometry of rows by their products, seen from the row of middle length."""
    norms = gram.diagonal()
    with np.errstate(all="ignore"):
        largest = np.sqrt(np.outer(norms, norms))
        finite = np.asarray((norms >= 0) & (norms <= MAX_SQUARE))
        finite &= np.isfinite(gram[:, finite]).all(axis=1) & np.isfinite(gram[finite]).all(axis=0)
        both = np.outer(finite, finite)
        wrong = both & ((abs(gram) > largest * (1 + 1e-6)) | (abs(gram - gram.T) > 1e-6 * largest))
    if (norms < 0).any() or wrong.any():
        raise ValueError(
            f"{rule}: gram holds no inner products of rows (expected x @ x.T: symmetric, positive diagonal)"
        )
    gram = np.where(both, (gram + gram.T) / 2, 0.0)
    rows = np.flatnonzero(finite)
    if not len(rows):
        return Geometry(gram, finite, np.zeros(len(gram)), EPSILON, False, 1.0, Reference(np.zeros(len(gram)), 0.0))
    middle = rows[np.argsort(norms[rows], kind="stable")[len(rows) // 2]]
    across, square = gram[middle], float(gram[middle, middle])
    seen = np.where(both, gram - across - across[:, None] + square, 0.0)
    np.fill_diagonal(seen, np.maximum(seen.diagonal(), 0.0))
    origin = Reference(np.where(finite, square - across, 0.0), square)
    lengths = np.where(finite, np.sqrt(np.maximum(norms, 0.0)), 0.0)
    return Geometry(seen, finite, lengths, 256 * EPSILON, False, 1.0, origin)
