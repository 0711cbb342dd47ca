"""What the command line shows of an aggregation: each worker, kept or dropped, and why."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.text import Text

from robustkern.cli.console import note, print_table
from robustkern.engine import Info
from robustkern.errors import plain
from robustkern.files import Pool, Weights

__all__ = ["facts", "print_workers"]


def _verdicts(info: Info, pool: Pool) -> list[tuple[str, str, int | None]]:
    """For each worker: kept, dropped, or counted, and why; and which entry of the facts is its, if any is."""
    ranks = None
    if info.sq_distances is not None:
        order = sorted(range(info.n), key=lambda i: (info.sq_distances[i], i))  # type: ignore[index]
        ranks = {row: rank + 1 for rank, row in enumerate(order)}
    result: list[tuple[str, str, int | None]] = []
    dropped = set(info.dropped)
    left = iter(range(info.n))
    for k, worker in enumerate(pool.workers):
        i = None if k in dropped else next(left)
        at = f"nearest {ranks[i]} of {info.n}" if ranks and i is not None else ""
        if worker.name in info.bad:
            result.append(("bad file", info.bad[worker.name], i))
        elif i is None:
            result.append(("dropped", "holds NaN or Inf, and is left out", None))
        elif i in info.nonfinite_rows:
            result.append(("dropped" if info.rule != "mean" else "counted", "holds NaN or Inf", i))
        elif info.kept is not None:
            kept = bool(info.kept[i])
            result.append(("kept", at, i) if kept else ("dropped", f"{at}, {int(info.kept.sum())} are kept", i))
        elif info.weights is not None:
            result.append(("counted", at or "as its weight says", i))
        else:
            votes = "votes in each coordinate" if not info.leaves else "judged by each tensor"
            result.append(("counted", f"{votes}{'; ' + at if at else ''}", i))
    return result


def _number(values: Any, i: int | None) -> float | None:
    return float(values[i]) if values is not None and i is not None and math.isfinite(values[i]) else None


def facts(info: Info, pool: Pool, weighed: Weights, out: Path, seconds: float) -> dict[str, Any]:
    """Return the same as `print_workers` shows, for machines; what is not a number is None."""
    return {
        "rule": info.rule,
        "n": info.n,
        "d": info.d,
        "f": info.f,
        "bound_met": info.bound_met,
        "backend": info.backend,
        "iterations": info.iterations,
        "converged": info.converged,
        "integers": info.integers,
        "shared_inf": info.shared_inf,
        "out": str(out),
        "seconds": seconds,
        "ignored": list(pool.ignored),
        "workers": [
            {
                "file": str(worker.path),
                "sq_distance": _number(info.sq_distances, i),
                "weight": _number(info.weights, i),
                "claimed": _number(weighed.claimed, k),
                "used": _number(weighed.used, k),
                "finite": i is not None and i not in info.nonfinite_rows,
                "verdict": verdict,
                "why": why,
            }
            for k, (worker, (verdict, why, i)) in enumerate(zip(pool.workers, _verdicts(info, pool), strict=True))
        ],
    }


def print_workers(info: Info, pool: Pool, weighed: Weights, out: Path, seconds: float) -> None:
    """Print the table of the workers: distance, weight, kept or dropped, and why."""
    colours = {"kept": "green", "dropped": "red", "bad file": "red", "counted": ""}
    weights = ("claimed", "used") if weighed.claimed is not None else ()
    print_table(
        f"{info.rule}, f = {info.f}" if info.f is not None else info.rule,
        ("worker", "distance", *weights, "weight", "verdict", "why"),
        [
            (
                plain(worker.name, 60),
                "" if info.sq_distances is None or i is None else f"{math.sqrt(info.sq_distances[i]):.4g}",
                *(f"{values[k]:.4g}" for values in weighed if values is not None),
                "" if info.weights is None or i is None else f"{info.weights[i]:.4f}",
                Text(verdict, style=colours[verdict]),
                plain(why, 200),
            )
            for k, (worker, (verdict, why, i)) in enumerate(zip(pool.workers, _verdicts(info, pool), strict=True))
        ],
        numbers=("distance", *weights, "weight"),
        prose=("why",),
    )
    if info.bound_met is False:
        note(f"n = {info.n}, f = {info.f} do not satisfy what this rule's guarantee needs.")
    if info.integers:
        how = "mean, rounded" if info.rule == "mean" else "lower median"
        tensors = "tensor of integers is" if info.integers == 1 else "tensors of integers are"
        note(f"{info.integers} {tensors} no coordinates: the result has their {how}.")
    if info.shared_inf:
        note(f"{info.shared_inf} columns in which enough workers hold the same infinity have it in the result.")
    if pool.ignored:
        more = f", and {len(pool.ignored) - 10} more" if len(pool.ignored) > 10 else ""
        note(f"not workers: {', '.join(pool.ignored[:10])}{more}")
    print(f"{info.n} updates of {info.d:,} numbers -> {plain(str(out))} in {seconds:.2f} s ({info.backend})")
