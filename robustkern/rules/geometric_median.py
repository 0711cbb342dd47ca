"""The geometric median, solved on the rows' inner products."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from robustkern.contract.rows import Matrix, Vector
from robustkern.rules.base import Aggregator, Goals, keep_count, keep_number, register
from robustkern.rules.geometry import MANY_ROWS, MAX_SHIFT, SINGLE_NOISE
from robustkern.rules.least_distances import Products, converged_weights, shift_bound, smoothed_weights
from robustkern.rules.text import set_name
from robustkern.rules.view import Solution, View

__all__ = ["GeometricMedian"]


@register
@dataclass(frozen=True)
class GeometricMedian(Aggregator):
    """The point with the least (weighted) sum of distances to the rows.

    Parameters
    ----------
    nu : float
        Distances below it count as it (smoothed Weiszfeld), so that rows nearer than it pull in proportion to their
        distance: the Huber geometric median of that threshold. 0: the true geometric median.
    max_iter : int or None
        Number of Weiszfeld steps at most; 0: the start. None: until it has converged, without `tol` to where these
        steps lead, by other ones where they are slow.
    start : {"mean", "zero"}
        Where Weiszfeld starts. The converged median (no max_iter, no tol) does not depend on it.
    tol : float or None
        Weiszfeld ends with a step of at most this length. None: of 1e-10 of the rows' spread.
    """

    nu: float = 0.0
    max_iter: int | None = None
    start: Literal["mean", "zero"] = "mean"
    tol: float | None = None

    name: ClassVar[str] = "geometric_median"
    aliases: ClassVar[tuple[str, ...]] = ("geomed",)
    summary: ClassVar[str] = (
        "least sum of distances, converged; `nu` (Huber's), `max_iter`, `start`, `tol`; `rfa`: 3 steps"
    )
    advice: ClassVar[str] = (
        "without f, with weights, rotations do not matter; lift it by ctma against one-sided attacks"
    )
    supports_weights: ClassVar[bool] = True
    goals: ClassVar[Goals] = {"geometric_median": {16: 2.2, 32: 2.4, 64: 3.0, 128: 4.5}}

    def __post_init__(self) -> None:
        """Check the parameters."""
        for what in ("nu",) if self.tol is None else ("nu", "tol"):
            keep_number(self, what, lambda x: 0 <= x <= 1e308, "a finite number of at least 0")
        keep_count(self, "max_iter", 0)
        if not isinstance(self.start, str) or self.start not in ("mean", "zero"):
            raise ValueError(f"geometric_median: start must be 'mean' or 'zero'; got {self.start!r}")
        object.__setattr__(self, "points", () if self._converges or self.start == "mean" else ("origin",))

    @property
    def _converges(self) -> bool:
        """Whether it is the true geometric median, wherever it starts."""
        return self.nu == 0 and self.max_iter is None and self.tol is None

    @classmethod
    def rfa(cls) -> GeometricMedian:
        """Return the preset of RFA (Pillutla et al. 2022) and ByzFL: three smoothed steps from zero."""
        return cls(nu=0.1, max_iter=3, start="zero")

    def kappa(self, n: int, f: int) -> float | None:
        """Return the constant of Allouah et al. 2023."""
        return 4 * (1 + f / (n - 2 * f)) ** 2 if 2 * f < n else None

    def solve(self, view: View) -> Solution:
        """Solve on the rows that are finite."""
        converges = self._converges
        if converges and view.n >= MANY_ROWS and (columns := view.few_columns(self.name)) is not None:
            return _solve_in_columns(view, *columns)
        # A few steps depend on the first distances, from the origin too, more than any bound at the end could tell; and
        # float32 products never decide between two rows, of which every point between is as good.
        geometry, weights = view.measured(self.name, quick=converges and view.n > 2)
        if converges and (row := _majority(view, weights)) is not None:
            return view.mean_of([row])._replace(kept=None, order=None, iterations=0, converged=True, gap=0.0)
        used = np.flatnonzero(weights)
        inner = geometry.gram if len(used) == view.n else geometry.gram[np.ix_(used, used)]
        gap = None
        if converges:
            found, iterations, converged, gap = converged_weights(
                inner, weights[used], geometry.rounding, None if view.mix is None else geometry.lengths[used]
            )
        else:
            origin = None
            if geometry.origin is not None and self.points:
                origin = (geometry.origin.products[used], geometry.origin.square)
            nu = min(self.nu * geometry.scale, 1e150)  # above, all distances count as equal anyway
            tol = None if self.tol is None else self.tol * geometry.scale
            found, iterations, converged = smoothed_weights(inner, weights[used], nu, self.max_iter, origin, tol)
        if geometry.single:
            shift = shift_bound(inner, geometry.lengths[used], weights[used], found, SINGLE_NOISE)
            if iterations == 0 or shift > MAX_SHIFT or not converged:  # on a row, or blurred
                geometry.require_double()
        result = np.zeros(view.n)
        result[used] = found
        gave_up = not converged and self.max_iter is None
        # Shares add up to 1 but for rounding, which rows that are far from the origin would feel.
        total = math.fsum(found) or 1.0  # or all of it lies on the origin
        pulled_by = weights if converges else None
        return Solution(
            result, total, iterations=iterations, converged=converged, gap=gap, gave_up=gave_up, pulled_by=pulled_by
        )

    def plain(self, x: NDArray[Any], f: int) -> NDArray[Any]:
        """Plain Weiszfeld until a step is below 1e-7 of the spread; every step reads the data twice."""
        y, steps = x.mean(axis=0), 1000 if self.max_iter is None else self.max_iter
        if self.points:
            y = np.zeros_like(y)
        for _ in range(steps):
            r = np.linalg.norm(x - y, axis=1)
            w = 1 / np.maximum(r, self.nu)
            new = (w[:, None] * x).sum(axis=0) / w.sum()
            enough = 1e-7 * np.sqrt((r * r).mean()) if self.tol is None else self.tol
            done = (self.max_iter is None or self.tol is not None) and np.linalg.norm(new - y) <= enough
            y = new
            if done:
                break
        return np.asarray(y, dtype=x.dtype)


def _solve_in_columns(view: View, x: Matrix, finite: NDArray[np.bool_], rounding: float) -> Solution:
    """Solve for many rows of few columns."""
    used = np.flatnonzero(finite & (view.weights_or_ones() > 0))
    found, iterations, converged, gap = converged_weights(Products(x[used]), view.weights_or_ones()[used], rounding)
    weights = np.zeros(view.n)
    weights[used] = found
    total = math.fsum(found)
    squares = np.where(finite, ((x - weights @ x / total) ** 2).sum(axis=1), np.inf)
    return Solution(
        weights, total, sq_distances=squares, iterations=iterations, converged=converged, gap=gap, gave_up=not converged
    )


def _majority(view: View, weights: Vector) -> int | None:
    """Return a row that stands for more than half of the weight, as mixtures of the same rows do: no pull moves it."""
    if view.mix is None:
        return None
    _, first, group = np.unique(view.mix.matrix, axis=0, return_index=True, return_inverse=True)
    share = np.bincount(group.reshape(-1), weights)
    largest = int(share.argmax())
    return int(first[largest]) if 2 * share[largest] > share.sum() else None


set_name("rfa", GeometricMedian.rfa())
