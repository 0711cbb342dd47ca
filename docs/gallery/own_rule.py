"""Writing a rule.

A rule is one class. It sees inner products and distances, never the data, and so costs two reads whatever it does in
between; and it works at once in chains, on files, on ranks, and on the command line with `--import`.
"""

import itertools
import sys
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

import robustkern as rk


@rk.register
@dataclass(frozen=True)
class Tightest(rk.Aggregator):
    """Mean of the n-f rows of smallest diameter."""

    name: ClassVar[str] = "tightest"

    def solve(self, view):
        """Choose among all subsets; ties and roundings are `least`'s business."""
        view.measured(self.name, quick=True)  # raises where too many rows hold NaN or Inf
        subsets = np.array(list(itertools.combinations(range(view.n), view.n - view.require_f(self.name))))
        best = view.least(
            lambda squares: squares[subsets[:, :, None], subsets[:, None, :]].max(axis=(1, 2)),
            pairs=lambda k: np.array(list(itertools.combinations(subsets[k], 2))),
        )
        return view.mean_of(subsets[best[0]])


if __name__ == "__main__":  # and not where `--import` reads the rule
    from robustkern.measure import style

    x = np.random.default_rng(1).standard_normal((9, 2))
    x[:2] += [[4, 4], [5, 3.6]]
    result, info = rk.aggregate(x, "tightest", f=2, return_info=True)
    chained = rk.aggregate(x, "nnm | tightest", f=2)
    print(f"kept {np.flatnonzero(info.weights)}; alone {result.round(2)}, in a chain {chained.round(2)}")
    assert np.flatnonzero(info.weights).tolist() == list(range(2, 9))

    figure = style.figure(5.5, 3.6)
    axes = figure.subplots()
    axes.scatter(*x[2:].T, color=style.COLOURS[1], label="kept")
    axes.scatter(*x[:2].T, color=style.COLOURS[4], marker="s", label="left out")
    axes.scatter(*result, color=style.COLOURS[0], marker="*", s=140, label="tightest")
    axes.scatter(*x.mean(axis=0), color=style.COLOURS[0], marker="x", s=70, label="mean of all")
    axes.set_aspect("equal")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    style.save(figure, sys.argv[1] if len(sys.argv) > 1 else "own_rule.png")
