"""What the command line shows of an aggregation: each worker, kept or dropped, and why."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.text import Text

from robustkern.cli.console import note, print_table
from robustkern.engine import Info

__all__ = ["facts", "print_workers"]


def _verdicts(info: Info) -> list[tuple[str, str]]:
    """For each worker: kept, dropped, or counted, and why."""
    ranks = None
    if info.sq_distances is not None:
        order = sorted(range(info.n), key=lambda i: (info.sq_distances[i], i))  # type: ignore[index]
        ranks = {row: rank + 1 for rank, row in enumerate(order)}
    result = []
    for i in range(info.n):
        at = f"nearest {ranks[i]} of {info.n}" if ranks else ""
        if i in info.nonfinite_rows:
            result.append(("dropped" if info.rule != "mean" else "counted", "holds NaN or Inf"))
        elif info.kept is not None:
            result.append(("kept", at) if info.kept[i] else ("dropped", f"{at}, {int(info.kept.sum())} are kept"))
        elif info.weights is not None:
            result.append(("counted", at or "as its weight says"))
        else:
            result.append(("counted", f"votes in each coordinate{'; ' + at if at else ''}"))
    return result


def facts(info: Info, files: list[Path], out: Path, seconds: float) -> dict[str, Any]:
    """Return the same as `print_workers` shows, for machines; what is not a number is None."""

    def number(values: Any, i: int) -> float | None:
        return float(values[i]) if values is not None and math.isfinite(values[i]) else None

    return {
        "rule": info.rule,
        "n": info.n,
        "d": info.d,
        "f": info.f,
        "bound_met": info.bound_met,
        "backend": info.backend,
        "iterations": info.iterations,
        "converged": info.converged,
        "out": str(out),
        "seconds": seconds,
        "workers": [
            {
                "file": str(files[i]),
                "sq_distance": number(info.sq_distances, i),
                "weight": number(info.weights, i),
                "finite": i not in info.nonfinite_rows,
                "verdict": verdict,
                "why": why,
            }
            for i, (verdict, why) in enumerate(_verdicts(info))
        ],
    }


def print_workers(info: Info, files: list[Path], out: Path, seconds: float) -> None:
    """Print the table of the workers: distance, weight, kept or dropped, and why."""
    colours = {"kept": "green", "dropped": "red", "counted": ""}
    print_table(
        f"{info.rule}, f = {info.f}" if info.f is not None else info.rule,
        ("worker", "distance", "weight", "verdict", "why"),
        [
            (
                files[i].name,
                "" if info.sq_distances is None else f"{math.sqrt(info.sq_distances[i]):.4g}",
                "" if info.weights is None else f"{info.weights[i]:.4f}",
                Text(verdict, style=colours[verdict]),
                why,
            )
            for i, (verdict, why) in enumerate(_verdicts(info))
        ],
        numbers=("distance", "weight"),
    )
    if info.bound_met is False:
        note(f"n = {info.n}, f = {info.f} do not satisfy what this rule's guarantee needs.")
    print(f"{info.n} updates of {info.d:,} numbers -> {out} in {seconds:.2f} s ({info.backend})")
