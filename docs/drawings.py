"""The pictures of concepts.md, drawn by what they are about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.patches import Rectangle

import robustkern as rk
from robustkern.measure import style

__all__ = ["draw"]


def draw(folder: Path) -> None:
    """Draw all pictures that are not there."""
    for name, picture in (("pull", pull), ("columns", columns), ("nspace", nspace)):
        path = folder / f"{name}.png"
        if not path.exists() or path.stat().st_mtime < Path(__file__).stat().st_mtime:
            style.save(picture(), path)


def pull() -> Any:
    """Draw how far one hostile row of ten moves each result."""
    honest = np.random.default_rng(0).standard_normal((9, 100))
    aims = np.geomspace(1, 1e6, 25)
    rules = {"mean": None, "median": 1, "geometric_median": 1, "ctma(geometric_median)": 1}
    found: dict[str, list[float]] = {rule: [] for rule in rules}
    for aim in aims:
        x = np.concatenate([honest, np.full((1, 100), aim / 10)])
        for rule, f in rules.items():
            found[rule].append(float(np.linalg.norm(rk.aggregate(x, rule, f=f))))
    figure = style.figure(7, 3.6)
    axes = figure.subplots()
    looks = style.looks(rules)
    for rule, values in found.items():
        axes.plot(aims, values, **looks[rule] | {"marker": ""})
    axes.set(
        xscale="log", yscale="log", xlabel="how far the hostile row is", ylabel="distance from the truth", xlim=(1, 1e6)
    )
    style.plain_ticks(axes)
    style.name_ends(axes, [((1e6, values[-1]), rule, looks[rule]["color"]) for rule, values in found.items()])
    return figure


def columns() -> Any:
    """Draw rows, cut into blocks of columns that do not know each other."""
    figure = style.figure(7, 2.6)
    axes = figure.subplots()
    axes.axis("off")
    places = (
        (0, 3, "thread 1"),
        (3, 3, "thread 2"),
        (6.4, 2, "a leaf"),
        (8.8, 2.5, "a block of a file"),
        (11.7, 2, "a rank's shard"),
    )
    for k, (x, width, name) in enumerate(places):
        colour = style.COLOURS[1 + k]
        for row in range(5):
            axes.add_patch(Rectangle((x, row), width, 0.8, facecolor=colour, alpha=0.35, edgecolor=colour))
        axes.add_patch(Rectangle((x, -1.6), width, 0.8, facecolor=colour, edgecolor=colour))
        axes.annotate("", (x + width / 2, -0.75), (x + width / 2, -0.05), arrowprops={"arrowstyle": "->"})
        axes.text(x + width / 2, 5.1, name, ha="center", fontsize=9)
    axes.text(-0.2, 2.4, "n rows", ha="right", va="center")
    axes.text(-0.2, -1.2, "result", ha="right", va="center")
    axes.set(xlim=(-1.6, 13.9), ylim=(-1.8, 5.8))
    return figure


def nspace() -> Any:
    """Draw what rules on distances see of twelve rows, three of them hostile."""
    x = np.random.default_rng(2).standard_normal((12, 2000))
    x[[2, 7, 8]] += 1.5
    info: rk.Info
    _, info = rk.aggregate(x, "ctma(geometric_median)", f=3, return_info=True)
    gram = rk.kernels.gram(x)
    norms = np.diagonal(gram)
    figure = style.figure(7.5, 3)
    left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))
    shown = left.imshow(np.sqrt(np.maximum(norms[:, None] + norms - 2 * gram, 0)), cmap="cividis")
    figure.colorbar(shown, ax=left, shrink=0.85)
    left.set(title="distances: one read of n x d", xlabel="row", ylabel="row")
    assert info.weights is not None
    right.bar(range(12), info.weights, color=[style.COLOURS[1] if w else style.COLOURS[4] for w in info.weights])
    right.set(title="weights: n x n arithmetic", xlabel="row", xticks=range(12))
    return figure
