"""Two saved runs of benchmarks, compared by their ratios to the read pass, so that load and machines matter little."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Change", "Figure", "changes", "saved"]


@dataclass(frozen=True)
class Figure:
    """Median and quartiles of a benchmark, in read passes of its rows."""

    reads: float
    low: float
    high: float


@dataclass(frozen=True)
class Change:
    """One benchmark of two runs.

    Attributes
    ----------
    name : str
        Of the benchmark.
    before, after : Figure
        Its figures.
    slower : bool
        Whether it got slower by more than the slack, and by more than both runs' quartiles overlap.
    """

    name: str
    before: Figure
    after: Figure
    slower: bool

    @property
    def ratio(self) -> float:
        """After over before."""
        return self.after.reads / self.before.reads


def saved(path: Path) -> dict[str, Figure]:
    """Read a run that ``robustkern bench --save`` or ``pytest --benchmark-json`` wrote.

    Raises
    ------
    ValueError
        If it is neither, or holds nothing that was measured in read passes.
    """
    try:
        run = json.loads(path.read_text())
        found = dict(_ours(run) if "results" in run else _of_pytest(run))
        values = [value for figure in found.values() for value in (figure.reads, figure.low, figure.high)]
        if not all(math.isfinite(value) and value > 0 for value in values):
            raise ValueError("its figures are no positive numbers")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        said = f"lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: is no saved benchmark ({said})") from None
    if not found:
        raise ValueError(f"{path}: holds nothing that was measured in read passes (see the fixture read_pass)")
    return found


def _ours(run: dict[str, Any]) -> list[tuple[str, Figure]]:
    return [
        (f"{r['rule']}, {r['library']}, n={r['n']}, d={r['d']}, {r['dtype']}", Figure(r["reads"], r["low"], r["high"]))
        for r in run["results"]
    ]


def _of_pytest(run: dict[str, Any]) -> list[tuple[str, Figure]]:
    noted = [(each["fullname"], each["extra_info"]) for each in run["benchmarks"]]
    return [(name, Figure(info["reads"], info["low"], info["high"])) for name, info in noted if "reads" in info]


def changes(before: dict[str, Figure], after: dict[str, Figure], slack: float) -> list[Change]:
    """Compare what both runs hold, what got slower most first.

    Parameters
    ----------
    before, after : dict of str to Figure
        By name.
    slack : float
        The share by which a figure may grow, such as 0.1.
    """
    found = []
    for name in before.keys() & after.keys():
        old, new = before[name], after[name]
        found.append(Change(name, old, new, new.reads > (1 + slack) * old.reads and new.low > old.high))
    return sorted(found, key=lambda change: (-change.ratio, change.name))
