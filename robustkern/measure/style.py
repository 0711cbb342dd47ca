"""How all pictures look: colours that print and colour-blind readers tell apart, and names where lines end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["COLOURS", "MARKERS", "SUFFIXES", "figure", "looks", "name_ends", "plain_ticks", "save"]

#: What pictures can be saved as.
SUFFIXES = (".png", ".pdf", ".svg")
#: Okabe and Ito's colours but yellow, which is hardly seen on white.
COLOURS = ("#000000", "#0072B2", "#009E73", "#56B4E9", "#D55E00", "#E69F00", "#CC79A7")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
LINES = ("-", "--", "-.")
#: These have the same colour in every picture.
KNOWN = ("mean", "median", "trimmed_mean", "ctma(median)", "geometric_median", "ctma(geometric_median)", "krum")
#: Least distance of two names, in heights of the type.
SPACING = 1.15


def figure(width: float, height: float) -> Any:
    """Return an empty figure; sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def looks(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return colour, line and marker of each name: earlier ones are wider, so that they show under later ones."""
    found = list(dict.fromkeys(names))
    order = [name for name in KNOWN if name in found]
    places = {name: KNOWN.index(name) for name in order}
    free = [k for k in range(len(COLOURS) * len(LINES)) if k not in places.values()]
    for name in found:
        if name not in places:
            places[name] = free.pop(0) if free else len(places)
    widest = 4.0 if len(found) <= 5 else 3.2
    widths = {name: widest - (widest - 1.2) * k / max(len(found) - 1, 1) for k, name in enumerate(found)}
    return {
        name: {
            "color": COLOURS[places[name] % len(COLOURS)],
            "linestyle": LINES[places[name] // len(COLOURS) % len(LINES)],
            "marker": MARKERS[places[name] % len(MARKERS)],
            "markersize": 3 + widths[name],
            "linewidth": widths[name],
        }
        for name in found
    }


def plain_ticks(axes: Any) -> None:
    """Grid, no minor ticks across, and plain numbers up, some between the powers of ten where those are few."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    axes.grid(alpha=0.3)
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    if axes.get_yscale() == "log" and high / low < 1000:
        plain = FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "12357" else "")
        axes.yaxis.set_major_formatter(plain)
        axes.yaxis.set_minor_formatter(plain)


def name_ends(axes: Any, ends: Sequence[tuple[tuple[float, float], str, str]], fontsize: float = 8, *,
              laid_out: bool = False) -> None:  # fmt: skip
    """Write names to the right of the axes, each as high as its line ends or as near as the others let it.

    Parameters
    ----------
    axes : matplotlib axes
        With everything drawn, and scales and limits as they stay.
    ends : sequence of ((float, float), str, str)
        Where a line ends, its name and its colour.
    fontsize : float
        In points.
    laid_out : bool
        Whether the figure has been drawn since its parts got their sizes, which takes a second where there are many.
    """
    if not ends:
        return
    figure = axes.figure
    if not laid_out:
        figure.draw_without_rendering()  # sizes are known only now
    box = axes.get_window_extent()
    step = SPACING * fontsize * figure.dpi / 72 / box.height
    to_share = axes.transAxes.inverted().transform(axes.transData.transform([at for at, _, _ in ends]))
    order = sorted(range(len(ends)), key=lambda k: to_share[k][1])
    heights = _apart([float(to_share[k][1]) for k in order], step)
    for k, height in zip(order, heights, strict=True):
        (x, y), name, colour = ends[k]
        axes.annotate(
            name,
            xy=(x, y),
            xytext=(1.03, height),
            textcoords=axes.transAxes,
            color=_darker(colour),
            fontsize=fontsize,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.6,
                "alpha": 0.6,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 3,
            },
        )


def _darker(colour: str) -> str:
    """Return a colour that thin type on white can have."""
    return "#" + "".join(f"{int(0.7 * int(colour[k : k + 2], 16)):02X}" for k in (1, 3, 5))


def _apart(heights: Sequence[float], step: float) -> list[float]:
    """Return ascending heights in [0, 1] moved as little as needed to be `step` apart: groups share their middle."""
    groups: list[tuple[float, list[float]]] = []  # middle, members
    for height in heights:
        members = [height]
        middle = height
        while groups and middle - step * len(members) / 2 < groups[-1][0] + step * len(groups[-1][1]) / 2:
            members = groups.pop()[1] + members
            half = step * len(members) / 2
            middle = max(min(sum(members) / len(members), 1 - half), half)
        groups.append((middle, members))
    return [middle + step * (k - (len(each) - 1) / 2) for middle, each in groups for k in range(len(each))]


def save(figure: Any, path: Path) -> None:
    """Write a picture."""
    figure.savefig(path, dpi=120)
