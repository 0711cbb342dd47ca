"""Rules whose result is a weighted sum of the rows, solved on their geometry in n-space."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from robustkern._kernels import Vector
from robustkern.rules._base import Aggregator, check_f, register, register_preset, require_no_weights, weights_of
from robustkern.rules._geometric_median import converged_weights, shift_bound, smoothed_weights
from robustkern.rules._view import SINGLE_NOISE, Geometry, Solution, View, smallest, unscaled

__all__ = ["GeometricMedian", "Krum", "Mean", "MultiKrum"]

#: How far float32 products may have moved the geometric median, in middle distances of the rows.
MAX_SHIFT = 1e-6


@register
@dataclass(frozen=True)
class Mean(Aggregator):
    """(Weighted) mean of the rows; not robust, and the only rule that lets NaN and Inf through."""

    name: ClassVar[str] = "mean"
    supports_weights: ClassVar[bool] = True

    def solve(self, view: View) -> Solution:
        """Equal weights, or the caller's; mixed rows that are not finite are left out."""
        if view.mix is not None:
            return self.over_finite(view)
        weights = weights_of(view)
        return Solution(weights=weights / math.fsum(weights))

    def over_finite(self, view: View) -> Solution:
        """Leave out the rows that are not finite: what a rule that builds on the mean needs."""
        finite = view.geometry().finite
        view.require_finite(self.name, finite)
        weights = np.where(finite, weights_of(view), 0.0)
        return Solution(weights=weights / math.fsum(weights))

    def bound_met(self, n: int, f: int | None) -> bool | None:
        """Tolerate no Byzantine row."""
        return None if f is None else f == 0


@register
@dataclass(frozen=True)
class GeometricMedian(Aggregator):
    """The point with the least (weighted) sum of distances to the rows.

    Parameters
    ----------
    nu : float
        Distances below it count as it (smoothed Weiszfeld); 0: the true geometric median.
    max_iter : int or None
        Number of Weiszfeld steps at most. None: until it has converged.
    start : {"mean", "zero"}
        Where Weiszfeld starts. The converged median (nu = 0, no max_iter) does not depend on it.
    """

    nu: float = 0.0
    max_iter: int | None = None
    start: Literal["mean", "zero"] = "mean"

    name: ClassVar[str] = "geometric_median"
    supports_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the parameters."""
        if isinstance(self.nu, bool) or not isinstance(self.nu, (int, float)) or not 0 <= self.nu <= 1e308:
            raise ValueError(f"geometric_median: nu must be a finite number of at least 0; got {self.nu!r}")
        if self.max_iter is not None and (
            isinstance(self.max_iter, bool) or not isinstance(self.max_iter, int) or self.max_iter < 1
        ):
            raise ValueError(
                f"geometric_median: max_iter must be None or an integer of at least 1; got {self.max_iter!r}"
            )
        if not isinstance(self.start, str) or self.start not in ("mean", "zero"):
            raise ValueError(f"geometric_median: start must be 'mean' or 'zero'; got {self.start!r}")

    @classmethod
    def rfa(cls) -> GeometricMedian:
        """Return the preset of RFA (Pillutla et al. 2022) and ByzFL: three smoothed steps from zero."""
        return cls(nu=0.1, max_iter=3, start="zero")

    def needs_origin(self) -> bool:
        """Only where Weiszfeld starts there."""
        return self.start == "zero" and (self.nu > 0 or self.max_iter is not None)

    def solve(self, view: View) -> Solution:
        """Solve on the rows that are finite."""
        converges = self.nu == 0 and self.max_iter is None
        # A few steps depend on the first distances, from the origin too, more than any bound at the end could tell.
        geometry = view.geometry(double=not converges)
        view.require_finite(self.name, geometry.finite)
        weights = np.where(geometry.finite, weights_of(view), 0.0)
        if converges and (row := _majority(view, weights)) is not None:
            return _mean_of(view, geometry, np.array([row]))._replace(kept=None, iterations=0, converged=True)
        used = np.flatnonzero(weights)
        inner = geometry.gram if len(used) == view.n else geometry.gram[np.ix_(used, used)]
        if converges:
            found, iterations, converged, _ = converged_weights(inner, weights[used], geometry.rounding)
        else:
            origin = None
            if self.needs_origin():
                assert geometry.origin is not None
                origin = (geometry.origin[0][used], geometry.origin[1])
            nu = min(self.nu * geometry.scale, 1e150)  # above, all distances count as equal anyway
            found, iterations, converged = smoothed_weights(inner, weights[used], nu, self.max_iter, origin)
        if geometry.single:
            shift = shift_bound(inner, geometry.lengths[used], weights[used], found, SINGLE_NOISE)
            if iterations == 0 or shift > MAX_SHIFT or not converged:  # on a row, or blurred
                geometry.require_double()
        result = np.zeros(view.n)
        result[used] = found
        return Solution(
            weights=result,
            sq_distances=unscaled(geometry.sq_distances_to(result), geometry.scale),
            iterations=iterations,
            converged=converged,
            gave_up=not converged and self.max_iter is None,
        )


def _majority(view: View, weights: Vector) -> int | None:
    """Return a row that stands for more than half of the weight, as mixtures of the same rows do: no pull moves it."""
    if view.mix is None:
        return None
    _, first, group = np.unique(view.mix, axis=0, return_index=True, return_inverse=True)
    share = np.bincount(group.reshape(-1), weights)
    largest = int(share.argmax())
    return int(first[largest]) if 2 * share[largest] > share.sum() else None


def _krum_order(rule: Krum | MultiKrum, view: View, count: int) -> tuple[Geometry, NDArray[np.intp]]:
    """Return the `count` rows of smallest Krum score, best first."""
    require_no_weights(rule, view)
    f = check_f(rule, view)
    neighbours = view.n - f - 2 if rule.neighbours is None else rule.neighbours
    if not 1 <= neighbours <= view.n - 1:
        raise ValueError(
            f"{rule.name}: neighbours must be between 1 and n-1 (by default n-f-2, so n-f >= 3); "
            f"got {neighbours} with n={view.n} rows, f={f} (lower f, or pass neighbours=)"
        )
    geometry = view.geometry()
    view.require_finite(rule.name, geometry.finite)
    distances = geometry.sq_distances

    finite = np.flatnonzero(geometry.finite)
    # A row's distance to itself, 0, counts too. Rows that are not finite are infinitely far from all alike.
    counted = min(neighbours + 1, len(finite))

    nearest = finite[:, None], distances[finite].argsort(axis=1, kind="stable")[:, :counted]
    scores = np.full(view.n, np.inf)
    scores[finite] = [math.fsum(row) for row in distances[nearest].tolist()]
    # The neighbours that truly count may be others: any whose distance may lie below the cut.
    pair_errors = geometry.pair_errors()[finite]
    reach = np.partition(distances[finite] + pair_errors, counted - 1, axis=1)[:, counted - 1 : counted]
    candidates = np.where(distances[finite] - pair_errors <= reach, pair_errors, 0.0)
    errors = np.zeros(view.n)
    errors[finite] = np.sort(candidates, axis=1)[:, -counted:].sum(axis=1)

    def again(contenders: NDArray[np.intp]) -> Vector | None:
        view.afford(len(contenders) * len(finite))
        if not geometry.single and geometry.are_copies(contenders):
            return None  # equal, whatever the last digits say
        exact = []
        for i in contenders:
            row = np.full(view.n, np.inf)
            measured = view.exact_sq_distances(int(i), finite)
            if measured is None:
                return None
            row[finite] = measured
            exact.append(math.fsum(np.sort(row)[:counted]))
        return np.array(exact)

    return geometry, smallest(scores, errors, count, again)


def _check_neighbours(name: str, neighbours: int | None) -> None:
    if neighbours is not None and (isinstance(neighbours, bool) or not isinstance(neighbours, int) or neighbours < 1):
        raise ValueError(f"{name}: neighbours must be None or an integer of at least 1; got {neighbours!r}")


def _mean_of(view: View, geometry: Geometry, chosen: NDArray[np.intp]) -> Solution:
    weights = np.zeros(view.n)
    weights[chosen] = 1.0 / len(chosen)
    distances = unscaled(geometry.sq_distances_to(weights), geometry.scale)
    return Solution(weights=weights, kept=weights > 0, sq_distances=distances)


@register
@dataclass(frozen=True)
class Krum(Aggregator):
    """The row with the least sum of squared distances to its nearest others (Blanchard et al. 2017).

    Parameters
    ----------
    neighbours : int or None
        How many others count; None: n-f-2 as in the paper (ByzFL takes n-f-1).
    """

    neighbours: int | None = None

    name: ClassVar[str] = "krum"

    def __post_init__(self) -> None:
        """Check the parameters."""
        _check_neighbours(self.name, self.neighbours)

    def solve(self, view: View) -> Solution:
        """Keep the best row."""
        return _mean_of(view, *_krum_order(self, view, 1))

    def bound_met(self, n: int, f: int | None) -> bool | None:
        """Krum's theorem needs 2f + 2 < n."""
        return None if f is None else 2 * f + 2 < n


@register
@dataclass(frozen=True)
class MultiKrum(Aggregator):
    """Mean of the m rows of best Krum score.

    Parameters
    ----------
    m : int or None
        How many; None: n-f (as ByzFL; others use n-f-2).
    neighbours : int or None
        As for Krum.
    """

    m: int | None = None
    neighbours: int | None = None

    name: ClassVar[str] = "multi_krum"

    def __post_init__(self) -> None:
        """Check the parameters."""
        _check_neighbours(self.name, self.neighbours)
        if self.m is not None and (isinstance(self.m, bool) or not isinstance(self.m, int) or self.m < 1):
            raise ValueError(f"multi_krum: m must be None or an integer of at least 1; got {self.m!r}")

    def solve(self, view: View) -> Solution:
        """Average the best m rows."""
        f = check_f(self, view)
        m = view.n - f if self.m is None else self.m
        if m > view.n - f:
            raise ValueError(f"multi_krum: m must be at most n-f; got m={m} with n={view.n} rows, f={f} (lower m or f)")
        return _mean_of(view, *_krum_order(self, view, m))

    def bound_met(self, n: int, f: int | None) -> bool | None:
        """As for Krum."""
        return None if f is None else 2 * f + 2 < n


register_preset("rfa", GeometricMedian.rfa())
