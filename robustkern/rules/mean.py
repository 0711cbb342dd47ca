"""The mean: not robust, and what robust rules build on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from robustkern.rules.base import Aggregator, Goals, register
from robustkern.rules.view import Solution, View

__all__ = ["Mean"]


@register
@dataclass(frozen=True)
class Mean(Aggregator):
    """(Weighted) mean of the rows; not robust, and the only rule that lets NaN and Inf through."""

    name: ClassVar[str] = "mean"
    summary: ClassVar[str] = "not robust; lets NaN through"
    advice: ClassVar[str] = "no hostile rows; one hostile row owns it"
    reads: ClassVar[str] = "1"
    looks_at_no_row: ClassVar[bool] = True
    needs: ClassVar[str] = "f = 0"
    supports_weights: ClassVar[bool] = True
    goals: ClassVar[Goals] = {"mean": {}}

    def solve(self, view: View) -> Solution:
        """Equal weights, or the caller's; mixed rows that are not finite are left out."""
        if view.mix is not None:
            return self.over_finite(view)
        weights = view.weights_or_ones()
        return Solution(weights, math.fsum(weights))

    def over_finite(self, view: View) -> Solution:
        """Leave out the rows that are not finite: what a rule that builds on the mean needs."""
        _, weights = view.measured(self.name, quick=True)
        return Solution(weights, math.fsum(weights))

    def bound_met(self, n: int, f: int | None) -> bool | None:
        """Tolerate no Byzantine row."""
        return None if f is None else f == 0

    def kappa(self, n: int, f: int) -> float | None:
        """Return 0 where all rows are honest."""
        return 0.0 if f == 0 else None

    def rows_read_again(self, n: int, f: int) -> int:
        """Return 0."""
        return 0

    def plain(self, x: NDArray[Any], f: int) -> NDArray[Any]:
        """As NumPy has it."""
        return np.asarray(x.mean(axis=0))
