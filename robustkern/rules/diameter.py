"""Minimal-diameter averaging, exactly: what is left out is a vertex cover of the pairs that are too far apart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from robustkern.contract.rows import Matrix
from robustkern.rules.base import Aggregator, Goals, register
from robustkern.rules.geometry import EPSILON
from robustkern.rules.krum import sq_distances_between
from robustkern.rules.view import Solution, View

__all__ = ["MDA"]

#: How many branches of the search for a cover, times rows that each looks at, a call may take at most: about a second.
MAX_WORK = 5e6
#: Branches of a cover of f rows are at most its f-th power: one row is taken, or its three or more neighbours are.
GROWTH = 1.4656


@register
@dataclass(frozen=True)
class MDA(Aggregator):
    """Mean of the n-f rows of smallest diameter, the first such rows in lexicographic order (El Mhamdi et al. 2018).

    Exact; but where more than 2n pairs are as far apart as the diameter to the last digits of float64 products, as
    among equidistant rows, these count as equal. The time grows with 1.47^f, whatever the rows are; n and f decide
    whether a call is accepted.
    """

    name: ClassVar[str] = "mda"
    aliases: ClassVar[tuple[str, ...]] = ("minimum_diameter_averaging",)
    summary: ClassVar[str] = "mean of the n-f rows of smallest diameter; exact, for small f"
    advice: ClassVar[str] = "small f, exact subset; refused where the search would grow with 1.47^f"
    needs: ClassVar[str] = "2f < n"
    goals: ClassVar[Goals] = {"mda": {16: 2.2, 32: 2.4}}

    def solve(self, view: View) -> Solution:
        """Find the diameter between the bounds of errors, and measure exactly what lies there."""
        view.require_no_weights(self.name)
        f, n = view.require_f(self.name), view.n
        if GROWTH**f * n * (n + 2 * math.log2(n)) > MAX_WORK:
            raise ValueError(
                f"mda: n={n} and f={f} may take too long, as the search for the subset grows with 1.47^f (lower f, or "
                "take another rule: ctma(geometric_median), nnm | trimmed_mean)"
            )
        geometry, _ = view.measured(self.name, quick=True)
        rows = np.flatnonzero(geometry.finite)
        out, inner = f - (n - len(rows)), np.ix_(rows, rows)
        squares, errors = geometry.sq_distances[inner], geometry.pair_errors()[inner]
        np.fill_diagonal(errors, 0.0)
        low, high = np.maximum(squares - errors, 0.0), squares + errors
        least, most = (_smallest_diameter(bound, out) for bound in (low, high))
        open_pairs = rows[np.argwhere(np.triu((low <= most) & (high >= least), 1))]
        if len(open_pairs) > 2 * n:  # which would be reads of the data
            geometry.require_double()
            return view.mean_of(rows[_first_subset(low, out, most)])
        exact = view.exact_between(open_pairs) if len(open_pairs) > 1 else None
        squares = squares if exact is None else exact[inner]
        return view.mean_of(rows[_first_subset(squares, out, _with_ties(squares, out))])

    def rows_read_again(self, n: int, f: int) -> int:
        """Return n-f."""
        return n - f

    def plain(self, x: NDArray[Any], f: int) -> NDArray[Any]:
        """Find the subset from the distances as they are."""
        squares = sq_distances_between(x)
        return np.asarray(x[_first_subset(squares, f, _with_ties(squares, f))].mean(axis=0))


def _smallest_diameter(squares: Matrix, out: int) -> float:
    """Return the least diameter of the rows that are left without `out` of them."""
    values = np.unique(squares)
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        if _can_cover(_apart(squares, values[middle]), (1 << len(squares)) - 1, out):
            high = middle
        else:
            low = middle + 1
    return float(values[high])


def _with_ties(squares: Matrix, out: int) -> float:
    """Return the least diameter, and a few roundings more: what differs by no more is a tie."""
    return _smallest_diameter(squares, out) * (1 + 16 * EPSILON)


def _first_subset(squares: Matrix, out: int, diameter: float) -> list[int]:
    """Return all rows but `out` of them, none farther apart than a diameter, the first ones in lexicographic order."""
    n = len(squares)
    apart = _apart(squares, diameter)
    taken: list[int] = []
    covered, everybody = 0, (1 << n) - 1
    for row in range(n):
        if len(taken) == n - out:
            break
        if covered >> row & 1:
            continue
        # With this row, all that are too far from it are left out.
        wanted = covered | apart[row]
        rest = everybody & ~wanted & ~sum(1 << k for k in (*taken, row))
        if wanted.bit_count() <= out and _can_cover(apart, rest, out - wanted.bit_count()):
            taken.append(row)
            covered = wanted
        else:
            covered |= 1 << row
    return taken


def _apart(squares: Matrix, diameter: float) -> list[int]:
    """Return for each row the set of those that are farther away, as bits."""
    bits = np.packbits(squares > diameter, axis=1, bitorder="little")
    return [int.from_bytes(row.tobytes(), "little") for row in bits]


def _can_cover(apart: list[int], rows: int, budget: int) -> bool:
    """Tell whether without `budget` of some rows no two of them are apart."""
    while True:
        degrees = {row: degree for row in _members(rows) if (degree := (apart[row] & rows).bit_count())}
        if not degrees:
            return True
        row = max(degrees, key=degrees.__getitem__)
        degree = degrees[row]
        if sum(degrees.values()) > 2 * budget * degree:
            return False
        rows &= sum(1 << k for k in degrees)
        if degree <= 2:
            return _least_cover_of_paths(apart, rows) <= budget
        without = rows & ~(1 << row)
        if degree <= budget and _can_cover(apart, without & ~apart[row], budget - degree):
            return True
        rows, budget = without, budget - 1


def _least_cover_of_paths(apart: list[int], rows: int) -> int:
    """Return the size of the least cover where nobody has more than two that are apart: paths and rings."""
    size = 0
    while rows:
        part, front = 0, rows & -rows
        while front:
            part |= front
            near = 0
            for row in _members(front):
                near |= apart[row]
            front = near & rows & ~part
        members = _members(part)
        pairs = sum((apart[row] & part).bit_count() for row in members) // 2
        size += (len(members) + (pairs == len(members))) // 2
        rows &= ~part
    return size


def _members(rows: int) -> list[int]:
    """Return the numbers of the bits that are set."""
    found = []
    while rows:
        lowest = rows & -rows
        found.append(lowest.bit_length() - 1)
        rows ^= lowest
    return found
