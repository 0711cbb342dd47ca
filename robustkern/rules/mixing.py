"""Rules that replace the rows by averages of rows, in n-space: no mixed row is ever stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from robustkern.errors import NonFiniteError
from robustkern.rules.base import Goals, Mixer, keep_count, register
from robustkern.rules.krum import sq_distances_between
from robustkern.rules.view import Mixture, View

__all__ = ["NNM", "Bucketing"]


@register
@dataclass(frozen=True)
class NNM(Mixer):
    """Nearest-neighbour mixing: each row becomes the mean of the n-f rows nearest to it, itself included.

    A row that is not finite is far from everything: no other row mixes it in, and it stays alone.

    Parameters
    ----------
    count : int or None
        How many rows are averaged. None: n-f. With a count, f is not needed.
    """

    count: int | None = None

    name: ClassVar[str] = "nnm"
    blurs: ClassVar[bool] = True
    form: ClassVar[str] = "nnm | rule"
    summary: ClassVar[str] = "each row becomes the mean of its n-f nearest first; `count`"
    advice: ClassVar[str] = "before a rule, where honest rows differ much (heterogeneous data): their spread shrinks"
    needs: ClassVar[str] = "its rule's"
    goals: ClassVar[Goals] = {
        "nnm | geometric_median": {16: 2.2, 32: 2.4, 64: 3.0, 128: 4.5},
        "nnm | median": {16: 2.5, 32: 3.0, 64: 4.5},
    }

    def __post_init__(self) -> None:
        """Check the parameter."""
        keep_count(self, "count", 1)

    def mixing(self, view: View) -> Mixture:
        """Row i holds 1 at the nearest rows of row i."""
        view.require_no_weights(self.name)
        kept = self.count if self.count is not None else view.n - view.require_f(self.name)
        geometry, _ = view.measured(self.name, quick=True)
        finite = np.flatnonzero(geometry.finite)
        if kept > view.n:
            raise ValueError(f"nnm: count must be at most n; got count={kept} with n={view.n} rows (lower count)")
        if kept > len(finite):
            bad = np.flatnonzero(~geometry.finite).tolist()
            raise NonFiniteError(
                f"nnm: count={kept} of n={view.n} rows are to be averaged, but {len(bad)} hold NaN or Inf, one of them "
                f"row {bad[0]} (lower count, or drop them)",
                tuple(bad),
            )
        weights = np.diag(np.where(geometry.finite, 0.0, kept))
        weights[finite[:, None], view.nearest_to_rows(finite, kept)] = 1.0
        return Mixture(weights, np.full(view.n, float(kept)))

    def kappa_after(self, kappa: float | None, n: int, f: int) -> float | None:
        """Return the constant of Allouah et al. 2023, of n-f rows."""
        return None if kappa is None or self.count is not None else 8 * f / (n - f) * (kappa + 1)

    def plain(self, x: NDArray[Any], f: int) -> NDArray[Any]:
        """Sort each row's distances."""
        nearest = np.argsort(sq_distances_between(x), axis=1, kind="stable")[:, : self.count or len(x) - f]
        return np.stack([x[rows].mean(axis=0) for rows in nearest])


@register
@dataclass(frozen=True)
class Bucketing(Mixer):
    """Means of random buckets of rows (Karimireddy et al. 2022).

    Parameters
    ----------
    size : int or None
        Rows of a bucket; the last may be shorter. None: the largest size up to floor(n/(2f)) that leaves more than
        2f buckets (the paper's floor(n/(2f)) can leave exactly 2f, which no rule survives); 1 where f is 0.
    seed : int or None
        Of the permutation, the same in every call: attackers who know it choose their buckets. None: drawn from the
        call's `seed`, and without one afresh.
    order : tuple of int or None
        The rows 0 to n-1, each once, in the order in which they fill the buckets, instead of a drawn one.
    """

    size: int | None = None
    seed: int | None = None
    order: tuple[int, ...] | None = None

    name: ClassVar[str] = "bucketing"
    form: ClassVar[str] = "bucketing | rule"
    summary: ClassVar[str] = "means of random buckets first; `size`, `seed`, `order`"
    advice: ClassVar[str] = "before a rule, fewer and smoother rows at random; costs f relative to n"
    reads: ClassVar[str] = "its rule's"
    needs: ClassVar[str] = "more than 2f buckets"

    def __post_init__(self) -> None:
        """Check the parameters."""
        keep_count(self, "size", 1)
        keep_count(self, "seed", 0)
        if self.order is None:
            return
        if self.seed is not None:
            raise ValueError("bucketing: pass seed or order, not both")
        rows = isinstance(self.order, tuple) and all(isinstance(i, int) and i >= 0 for i in self.order)
        if not rows or sorted(self.order) != list(range(len(self.order))):
            raise ValueError(f"bucketing: order must be a tuple of the rows 0 to n-1, each once; got {self.order!r}")

    def _size(self, n: int, f: int | None) -> int:
        if self.size is not None:
            return min(self.size, n)
        if not f:
            return 1
        size = max(n // (2 * f), 1)
        while size > 1 and -(-n // size) <= 2 * f:
            size -= 1
        return size

    def rows_after(self, n: int, f: int | None) -> int:
        """Return the number of buckets."""
        return -(-n // self._size(n, f))

    def mixing(self, view: View) -> Mixture:
        """Row b holds 1 at the bucket's members."""
        view.require_no_weights(self.name)
        if self.size is None:
            view.require_f(self.name)
        if self.order is not None and len(self.order) != view.n:
            raise ValueError(f"bucketing: order has {len(self.order)} rows, but there are n={view.n}")
        order = view.random(self.seed).permutation(view.n) if self.order is None else np.array(self.order)
        return self._mixture(view.n, view.f, order)

    def _mixture(self, n: int, f: int | None, order: NDArray[np.intp]) -> Mixture:
        size = self._size(n, f)
        weights = np.zeros((self.rows_after(n, f), n))
        weights[np.arange(n) // size, order] = 1.0
        return Mixture(weights, weights.sum(axis=1))

    def plain(self, x: NDArray[Any], f: int) -> NDArray[Any]:
        """Average the buckets."""
        if self.order is not None:
            order = np.array(self.order)
        elif self.seed is not None:
            order = np.random.default_rng(self.seed).permutation(len(x))
        else:
            raise NotImplementedError(f"{self} draws other buckets in every call")
        return np.asarray(self._mixture(len(x), f, order).matrix @ x)
