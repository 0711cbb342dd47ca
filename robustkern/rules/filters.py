"""Rules that filter out what lies far out: from the mean, from the median, or along the directions of largest spread.

Directions of largest spread are eigenvectors of the rows' covariance, which in n-space are those of the centred Gram.
Where the largest eigenvalue is multiple, as among equidistant rows, no direction is the one: a row's spread is then the
length of its part in their whole space, so that neither rounding nor the order of the rows chooses a direction.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from robustkern.contract.rows import Matrix, Vector
from robustkern.rules.base import Aggregator, Goals, keep_number, register
from robustkern.rules.cuts import smallest
from robustkern.rules.view import Solution, View

__all__ = ["CAF", "FABA", "SMEA", "Aksel", "Spectral"]

_TWO_READS = {16: 2.2, 32: 2.4, 64: 3.0}
#: Eigenvalues within it of the largest one count as equal to it, and so do spreads of rows or subsets.
SAME = 1e-9
#: Steps that the eigenvalues of all subsets may take, n-f cubed and a thousand for each: about a second.
MAX_WORK = 4e8
#: Rows up to which CAF is quick enough: a step takes n^3, and hostile rows may cost n steps.
MAX_ROWS = 256
BATCH = 4096  # subsets whose eigenvalues are computed at a time


def _spreads(gram: Matrix, shares: Vector) -> tuple[float, Vector]:
    """Return the largest eigenvalue of the covariance of rows by share, and the rows' squared parts along it.

    The parts are in units of the largest squared distance to the mean; 0 for rows without a share.
    """
    used = np.flatnonzero(shares)
    gram, shares, parts = gram[np.ix_(used, used)], shares[used], np.zeros(len(shares))
    across = gram @ shares
    inner = gram - across - across[:, None] + shares @ across
    unit = float(inner.diagonal().max())
    if unit <= 0:
        return 0.0, parts
    inner, roots = inner / unit, np.sqrt(shares)
    values, vectors = np.linalg.eigh(roots[:, None] * inner * roots)
    top = values >= values[-1] * (1 - SAME)
    parts[used] = ((inner @ (roots[:, None] * vectors[:, top])) ** 2).sum(axis=1) / values[-1]
    return float(values[-1]) * unit, parts


def _plain_spreads(x: NDArray[Any], shares: NDArray[Any]) -> tuple[float, NDArray[Any]]:
    """Return the same from the rows themselves, in units of theirs."""
    mean = shares @ x
    _, values, directions = np.linalg.svd(np.sqrt(shares)[:, None] * (x - mean), full_matrices=False)
    top = directions[values >= values[0] * (1 - SAME / 2)]
    return float(values[0] ** 2), (((x - mean) @ top.T) ** 2).sum(axis=1)


@register
@dataclass(frozen=True)
class CAF(Aggregator):
    """Covariance-bound agnostic filter: weights fall by the rows' spread until the covariance is least.

    Allouah, Guerraoui and Stephan 2025. All rows begin with weight 1. In each step a row's weight is multiplied by one
    less its squared part along the direction of largest spread, over the largest such part of a row that has weight; as
    long as the weights add up to more than n-2f. The result is the mean by the weights of whose covariance the largest
    eigenvalue was least.
    """

    name: ClassVar[str] = "caf"
    aliases: ClassVar[tuple[str, ...]] = ("covariance_agnostic_filter",)
    summary: ClassVar[str] = "mean by weights that fall along the direction of largest spread; no bound of it is needed"
    advice: ClassVar[str] = "no bound of the honest spread is known; weights instead of cuts, at most 256 rows"
    goals: ClassVar[Goals] = {"caf": _TWO_READS}

    def solve(self, view: View) -> Solution:
        """Filter in n-space."""
        view.require_no_weights(self.name)
        f = view.require_f(self.name)
        if view.n > MAX_ROWS:
            raise ValueError(
                f"caf: n={view.n} rows may take too long, at most {MAX_ROWS} are taken (take "
                "ctma(geometric_median), or spectral)"
            )
        geometry, weights = view.measured(self.name)
        best, least, steps = weights, math.inf, 0
        while not steps or weights.sum() > view.n - 2 * f:
            spread, parts = _spreads(geometry.gram, weights / weights.sum())
            if spread < least:
                best, least = weights, spread
            largest = parts[weights > 0].max()
            if largest == 0 or f == 0:
                break
            steps += 1
            weights = np.where(parts >= largest * (1 - SAME), 0.0, weights * (1 - parts / largest).clip(0.0))
            if not weights.any():
                break
        return Solution(best, math.fsum(best), kept=best > 0, iterations=steps)

    def plain(self, x: NDArray[Any], f: int) -> NDArray[Any]:
        """Filter the rows, one decomposition of them a step."""
        weights = np.ones(len(x))
        best, least = x.mean(axis=0), math.inf
        while f and weights.any() and weights.sum() > len(x) - 2 * f:
            shares = weights / weights.sum()
            spread, parts = _plain_spreads(x, shares)
            if spread < least:
                best, least = shares @ x, spread
            largest = parts[weights > 0].max()
            if largest == 0:
                break
            weights = np.where(parts >= largest * (1 - SAME), 0.0, weights * (1 - parts / largest).clip(0))
        return np.asarray(best)


def _subsets(rows: NDArray[np.intp], count: int) -> Iterator[NDArray[np.intp]]:
    """Yield all subsets of so many rows in lexicographic order, some thousands at a time."""
    subsets = itertools.combinations(rows.tolist(), count)
    while batch := list(itertools.islice(subsets, BATCH)):
        yield np.array(batch, dtype=np.intp)


@register
@dataclass(frozen=True)
class SMEA(Aggregator):
    """Mean of the n-f rows whose covariance has the smallest largest eigenvalue (Allouah et al. 2023).

    Exact, over all subsets: n and f decide whether a call is accepted. Eigenvalues that differ by less than a billionth
    count as equal, and the first of equal subsets in lexicographic order is taken.
    """

    name: ClassVar[str] = "smea"
    aliases: ClassVar[tuple[str, ...]] = ("smallest_maximum_eigenvalue_averaging",)
    summary: ClassVar[str] = "mean of the n-f rows of smallest largest eigenvalue; exact, for few rows"
    advice: ClassVar[str] = "few rows, best covariance; refused where subsets are too many"
    goals: ClassVar[Goals] = {"smea": {16: 2.2}}

    def solve(self, view: View) -> Solution:
        """Try all subsets of rows that are finite."""
        view.require_no_weights(self.name)
        f, n = view.require_f(self.name), view.n
        count = n - f
        # Of many rows, the log will do: the number itself would have thousands of digits.
        how_many = math.exp(min(math.lgamma(n + 1) - math.lgamma(f + 1) - math.lgamma(count + 1), 700.0))
        if how_many * (count**3 + 1000) > MAX_WORK:
            raise ValueError(
                f"smea: n={n} and f={f} may take too long, with {how_many:.3g} subsets of n-f rows (lower f, or take "
                "another rule: caf, nnm | trimmed_mean)"
            )
        geometry, _ = view.measured(self.name)
        finite = np.flatnonzero(geometry.finite)
        best, least = finite[:count], math.inf
        for subsets in _subsets(finite, count):
            inner = geometry.gram[subsets[:, :, None], subsets[:, None, :]]
            rounding = 1e-14 * np.einsum("kii->ki", inner).max(axis=1)
            across = inner.mean(axis=1)
            inner = inner - across[:, :, None] - across[:, None, :] + across.mean(axis=1)[:, None, None]
            spreads = np.maximum(np.linalg.eigvalsh(inner)[:, -1], rounding)
            at = int(np.argmax(spreads <= spreads.min() * (1 + SAME)))
            if spreads[at] < least * (1 - SAME):
                best, least = subsets[at], float(spreads[at])
        return view.mean_of(best)

    def rows_read_again(self, n: int, f: int) -> int:
        """Return n-f."""
        return n - f

    def plain(self, x: NDArray[Any], f: int) -> NDArray[Any]:
        """Decompose every subset."""
        subsets = [list(rows) for rows in itertools.combinations(range(len(x)), len(x) - f)]
        spreads = [np.linalg.svd(x[rows] - x[rows].mean(axis=0), compute_uv=False)[0] for rows in subsets]
        return np.asarray(x[subsets[int(np.argmin(spreads))]].mean(axis=0))


@register
@dataclass(frozen=True)
class Spectral(Aggregator):
    """Mean of the rows of least spread along the direction in which they spread most.

    On all columns what DnC (Shejwalkar and Houmansadr 2021) does on samples of them.

    Parameters
    ----------
    fraction : float
        floor(fraction * f) rows are filtered out.
    """

    fraction: float = 1.0

    name: ClassVar[str] = "spectral"
    aliases: ClassVar[tuple[str, ...]] = ("dnc", "divide_and_conquer")
    summary: ClassVar[str] = "mean without the f rows farthest along the direction of largest spread; `fraction`"
    advice: ClassVar[str] = "one direction of attack in many dimensions; not several at once: no bound"
    needs: ClassVar[str] = "no bound"
    goals: ClassVar[Goals] = {"spectral": _TWO_READS}

    def __post_init__(self) -> None:
        """Check the parameter."""
        keep_number(self, "fraction", lambda x: 0 < x <= 1e9, "a positive number")

    def _kept(self, n: int, f: int) -> int:
        kept = n - int(self.fraction * f)
        if kept < 1:
            raise ValueError(
                f"spectral: fraction * f must be below n; got fraction={self.fraction!r}, f={f} with n={n} rows (lower "
                "fraction)"
            )
        return kept

    def solve(self, view: View) -> Solution:
        """Cut by the rows' parts."""
        view.require_no_weights(self.name)
        kept = self._kept(view.n, view.require_f(self.name))
        geometry, weights = view.measured(self.name)
        _, parts = _spreads(geometry.gram, weights / weights.sum())
        parts[~geometry.finite] = math.inf
        errors = np.full(view.n, SAME * parts[geometry.finite].max())
        near = smallest(parts, errors, min(kept, int(geometry.finite.sum())), None)
        return view.mean_of(near)

    def bound_met(self, n: int, f: int | None) -> bool | None:
        """Hold no bound: what the mean is pulled by may hide in another direction."""
        return None if f is None else f == 0

    def plain(self, x: NDArray[Any], f: int) -> NDArray[Any]:
        """Sort the rows by their parts."""
        _, parts = _plain_spreads(x, np.full(len(x), 1 / len(x)))
        return np.asarray(x[np.argsort(parts, kind="stable")[: self._kept(len(x), f)]].mean(axis=0))


@register
@dataclass(frozen=True)
class FABA(Aggregator):
    """Mean of what is left after f times the row farthest from the mean of the others and itself is taken away.

    Xia et al. 2019. Of equally far rows the last one goes.
    """

    name: ClassVar[str] = "faba"
    summary: ClassVar[str] = "mean without f rows, each the farthest from the mean of what was left"
    advice: ClassVar[str] = "few, far attackers; not against many that pull the mean to them"
    needs: ClassVar[str] = "no bound"
    goals: ClassVar[Goals] = {"faba": _TWO_READS}

    def solve(self, view: View) -> Solution:
        """Take rows away in n-space; rows that are not finite go first."""
        view.require_no_weights(self.name)
        kept = view.n - view.require_f(self.name)
        view.expect_double()  # one of so many cuts is finer than float32 nearly always
        geometry, _ = view.measured(self.name, quick=True)
        left = np.flatnonzero(geometry.finite)
        while len(left) > kept:
            shares = np.zeros(view.n)
            shares[left] = 1 / len(left)
            squares, errors = geometry.sq_distances_to(shares), geometry.errors_to(shares)
            near = smallest(squares[left], errors[left], len(left) - 1, geometry.undecided)
            left = left[np.sort(near)]
        return view.mean_of(left)

    def bound_met(self, n: int, f: int | None) -> bool | None:
        """Hold no bound: f rows may pull the mean so far that honest ones are the farthest."""
        return None if f is None else f == 0

    def rows_read_again(self, n: int, f: int) -> int:
        """Return n-f."""
        return n - f

    def plain(self, x: NDArray[Any], f: int) -> NDArray[Any]:
        """Take the rows away one by one."""
        left = x
        for _ in range(f):
            away = ((left - left.mean(axis=0)) ** 2).sum(axis=1)
            left = np.delete(left, len(left) - 1 - int(away[::-1].argmax()), axis=0)
        return np.asarray(left.mean(axis=0))


@register
@dataclass(frozen=True)
class Aksel(Aggregator):
    """Mean of the nearer half of the rows, floor((n+1)/2), to their coordinate-wise median (Boussetta et al. 2021)."""

    name: ClassVar[str] = "aksel"
    summary: ClassVar[str] = "mean of the nearer half of the rows to their median; f is not needed"
    advice: ClassVar[str] = "no f known, and half of the rows may be thrown away; otherwise `ctma(median)` keeps more"
    goals: ClassVar[Goals] = {"aksel": {16: 2.1, 32: 2.2, 64: 2.5, 128: 3.0}}

    def solve(self, view: View) -> Solution:
        """Measure the rows against the median, keep the nearest."""
        view.require_no_weights(self.name)
        n = view.n
        near, squares = view.nearest_to(view.window((n - 1) // 2, n // 2 + 1), (n + 1) // 2, self.name)
        return view.mean_of(near)._replace(sq_distances=squares)

    def window(self, n: int, f: int) -> tuple[int, int]:
        """Return the middle ranks."""
        return (n - 1) // 2, n // 2 + 1

    def rows_read_again(self, n: int, f: int) -> int:
        """Return floor((n+1)/2)."""
        return (n + 1) // 2

    def compares(self) -> bool:
        """No: distances to the median are measured from it."""
        return False

    def plain(self, x: NDArray[Any], f: int) -> NDArray[Any]:
        """Sort the rows by their distance to the median."""
        away = ((x - np.median(x, axis=0)) ** 2).sum(axis=1)
        return np.asarray(x[np.argsort(away, kind="stable")[: (len(x) + 1) // 2]].mean(axis=0))
