"""Rules that replace the rows by averages of rows, in n-space: no mixed row is ever stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from robustkern.contract.rows import Matrix, Vector
from robustkern.rules.base import Mixer, check_f, register, require_no_weights
from robustkern.rules.view import View, smallest

__all__ = ["NNM", "Bucketing"]


@register
@dataclass(frozen=True)
class NNM(Mixer):
    """Nearest-neighbour mixing: each row becomes the mean of the n-f rows nearest to it, itself included.

    A row that is not finite is far from everything: no other row mixes it in, and it stays alone.
    """

    name: ClassVar[str] = "nnm"

    def mixing(self, view: View) -> Matrix:
        """Row i holds 1/(n-f) at the nearest rows of row i."""
        require_no_weights(self, view)
        kept = view.n - check_f(self, view)
        geometry = view.geometry()
        view.require_finite(self.name, geometry.finite)
        weights = np.zeros((view.n, view.n))
        for i in range(view.n):
            if not geometry.finite[i]:
                weights[i, i] = 1.0
                continue
            to_others = geometry.sq_distances[i]
            errors = geometry.errors_from(i)

            def again(contenders: NDArray[np.intp], row: int = i) -> Vector | None:
                view.afford(len(contenders) + 1)
                if not geometry.single and geometry.are_copies(contenders):
                    return None  # equal, whatever the last digits say
                return view.exact_sq_distances(row, contenders)

            weights[i, smallest(to_others, errors, kept, again)] = 1.0 / kept
        return weights


@register
@dataclass(frozen=True)
class Bucketing(Mixer):
    """Means of random buckets of rows (Karimireddy et al. 2022).

    Parameters
    ----------
    size : int or None
        Rows of a bucket; the last may be shorter. None: the largest size up to floor(n/(2f)) that leaves more than
        2f buckets (the paper's floor(n/(2f)) can leave exactly 2f, which no rule survives); 1 where f is 0.
    seed : int
        Of the permutation. Pass another one each round: with a known permutation attackers choose their buckets.
    """

    size: int | None = None
    seed: int = 0

    name: ClassVar[str] = "bucketing"

    def __post_init__(self) -> None:
        """Check the parameters."""
        if self.size is not None and (isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1):
            raise ValueError(f"bucketing: size must be None or an integer of at least 1; got {self.size!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"bucketing: seed must be an integer of at least 0; got {self.seed!r}")

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

    def mixing(self, view: View) -> Matrix:
        """Row b holds the reciprocal of the bucket's size at its members."""
        require_no_weights(self, view)
        if self.size is None:
            check_f(self, view)
        size = self._size(view.n, view.f)
        order = np.random.default_rng(self.seed).permutation(view.n)
        weights = np.zeros((self.rows_after(view.n, view.f), view.n))
        for b in range(len(weights)):
            members = order[b * size : (b + 1) * size]
            weights[b, members] = 1.0 / len(members)
        return weights
