"""Rules that bound how far a row may pull."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from robustkern.rules.base import Aggregator, Mixer, Rule, keep_count, keep_number, register
from robustkern.rules.view import Mixture, Solution, View

__all__ = ["ARC", "CentredClipping", "Clipping"]


def _keep_positive(rule: Rule, what: str) -> None:
    keep_number(rule, what, lambda x: 0 < x <= 1e308, "a positive finite number")


def _norms(view: View, rule: str) -> NDArray[np.float64]:
    """Return the rows' norms, inf of those that are too long to be measured, NaN of those that are not finite."""
    geometry, _ = view.measured(rule)
    assert geometry.origin is not None
    norms = np.asarray(np.sqrt(geometry.sq_distances_from(geometry.origin)) / geometry.scale)
    norms[view.holding_nonfinite()] = np.nan
    return norms


def _cut(norms: NDArray[np.float64], most: float) -> Mixture:
    """Return the rows, shortened where their norm is above `most`; those that are not finite stay as they are.

    Of rows that are too long to be measured nothing is left: most / inf. Rules that measure see them as not finite.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.where(norms > most, most / norms, 1.0)
    return Mixture(np.diag(shares), np.ones(len(norms)))


@register
@dataclass(frozen=True)
class Clipping(Mixer):
    """Rows longer than a limit are shortened to it.

    Parameters
    ----------
    limit : float
        Positive.
    """

    limit: float

    name: ClassVar[str] = "clipping"
    form: ClassVar[str] = "clipping(limit=...) | rule"
    aliases: ClassVar[tuple[str, ...]] = ("norm_clipping", "static_clipping")
    summary: ClassVar[str] = "rows of a norm above `limit` are shortened to it first"
    advice: ClassVar[str] = "before any rule, where a bound of honest norms is known"
    needs: ClassVar[str] = "its rule's"
    points: ClassVar[tuple[str, ...]] = ("origin",)

    def __post_init__(self) -> None:
        """Check the parameter."""
        _keep_positive(self, "limit")

    def mixing(self, view: View) -> Mixture:
        """Row i holds its own share only."""
        view.require_no_weights(self.name)
        return _cut(_norms(view, self.name), self.limit)

    def plain(self, x: NDArray[Any], f: int) -> NDArray[Any]:
        """Divide by the norms."""
        return np.asarray(x * np.minimum(1, self.limit / np.sqrt((x**2).sum(axis=1)))[:, None])


@register
@dataclass(frozen=True)
class ARC(Mixer):
    """Adaptive robust clipping: the floor(2 f (n-f) / n) longest rows are shortened to the next one (Allouah 2025)."""

    name: ClassVar[str] = "arc"
    form: ClassVar[str] = "arc | rule"
    summary: ClassVar[str] = "the floor(2f(n-f)/n) longest rows are shortened to the next one first"
    advice: ClassVar[str] = "before any rule, where norms differ by malice; adapts its limit to the rows"
    needs: ClassVar[str] = "its rule's"
    points: ClassVar[tuple[str, ...]] = ("origin",)

    def mixing(self, view: View) -> Mixture:
        """Row i holds its own share only."""
        view.require_no_weights(self.name)
        norms = _norms(view, self.name)
        return _cut(norms, self._limit(norms, view.require_f(self.name)))

    def _limit(self, norms: NDArray[np.float64], f: int) -> float:
        n = len(norms)
        return float(np.sort(norms)[n - 1 - 2 * f * (n - f) // n])

    def plain(self, x: NDArray[Any], f: int) -> NDArray[Any]:
        """Sort the norms."""
        norms = np.sqrt((x**2).sum(axis=1))
        return np.asarray(x * np.minimum(1, self._limit(norms, f) / np.where(norms > 0, norms, 1))[:, None])


@register
@dataclass(frozen=True)
class CentredClipping(Aggregator):
    """Steps from a centre, each the (weighted) mean of the rows' differences to it, cut to a length (Karimireddy 2021).

    Parameters
    ----------
    tau : float
        Longest difference of a row that counts in full; positive. It should be of the order of the honest spread.
    steps : int
        How many.
    start : {"centre", "zero"}
        The centre that the caller gives, such as the last round's result, or the origin.
    """

    tau: float
    steps: int = 1
    start: Literal["centre", "zero"] = "centre"

    name: ClassVar[str] = "centred_clipping"
    form: ClassVar[str] = "centred_clipping(tau=...)"
    aliases: ClassVar[tuple[str, ...]] = ("centered_clipping",)
    summary: ClassVar[str] = 'steps from `centre` (or `start="zero"`), no row pulls by more than `tau`; `steps`'
    advice: ClassVar[str] = "momentum with the last result as centre; not without a good centre and a tau of its size"
    needs: ClassVar[str] = "a good centre"
    supports_weights: ClassVar[bool] = True
    points: ClassVar[tuple[str, ...]] = ("centre",)

    def __post_init__(self) -> None:
        """Check the parameters."""
        _keep_positive(self, "tau")
        keep_count(self, "steps", 1, may_be_none=False)
        if not isinstance(self.start, str) or self.start not in ("centre", "zero"):
            raise ValueError(f"centred_clipping: start must be 'centre' or 'zero'; got {self.start!r}")
        object.__setattr__(self, "points", ("origin",) if self.start == "zero" else ("centre",))

    def compares(self) -> bool:
        """No: a row's pull is a continuous function of its distance."""
        return False

    def solve(self, view: View) -> Solution:
        """Step in n-space: shares of the rows, and what is left of the centre. Rows that are not finite do not pull."""
        everybody = view.weights_or_ones()
        pulling = everybody / math.fsum(everybody)
        shares, centre = np.zeros(view.n), 1.0 if self.start == "centre" else 0.0
        for step in range(self.steps):
            if step == 0 and self.steps == 1:  # one point: no inner products are needed
                found = view.distances_to(Solution(shares, centre_weight=centre))
                view.require_finite(self.name, np.isfinite(found.values))
                length = np.sqrt(found.values) / found.scale
            else:
                geometry, _ = view.measured(self.name)
                length = np.sqrt(geometry.sq_distances_to(shares, centre)) / geometry.scale
            pulling = np.where(np.isfinite(length), pulling, 0.0)
            with np.errstate(divide="ignore"):
                pull = np.where(pulling > 0, np.minimum(1.0, self.tau / length), 0.0) * pulling
            left = 1.0 - math.fsum(pull)
            shares, centre = shares * left + pull, centre * left
        return Solution(shares, centre_weight=centre, iterations=self.steps)

    def bound_met(self, n: int, f: int | None) -> bool | None:
        """Tell of n and f only: fewer than half."""
        return None if f is None else 2 * f < n

    def plain(self, x: NDArray[Any], f: int) -> NDArray[Any]:
        """Take the steps on the rows."""
        if self.start == "centre":
            raise NotImplementedError(f"{self} needs a centre, which plain forms are not given (start='zero' has one)")
        y = np.zeros(x.shape[1:])
        for _ in range(self.steps):
            away = x - y
            y = y + (away * np.minimum(1, self.tau / np.sqrt((away**2).sum(axis=1)))[:, None]).mean(axis=0)
        return y
