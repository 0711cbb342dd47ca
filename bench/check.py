"""Fails where a rule has become slower than `limits.json` allows, in read passes: python bench/check.py [--update]

A shared machine slows both the read pass and the rule, so only their ratio counts. A disturbance can still fall on one
of the two; so a row that is over its limit is measured again, and only one that is over it in every attempt fails. The
limits are the figures measured when they were last updated, times the slack that the file states: for an instruction
set, or for the set and the maker of the processor, whose memory may be twice as fast beside its arithmetic.

Then the worst inputs: how many times as long as honest rows other ones take, of attackers or in another layout. The
limit of these is the contract's, times the slack.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustkern.measure import limits as worst
from robustkern.measure import reads as benchmark

LIMITS = Path(__file__).with_name("limits.json")
ATTEMPTS, ROUNDS = 4, 5
WORST_VALUES = 6_400_000  # large enough for float32 products, quick enough for many cases

Measure = Callable[[str, int, str], float]
Rows = NDArray[np.float32]


def copies(x: Rows, f: int) -> Rows:
    """Attackers send an honest row."""
    return np.concatenate([np.repeat(x[-1:], f, axis=0), x[f:]])


def near_copies(x: Rows, f: int) -> Rows:
    """Attackers send an honest row, a few last digits changed."""
    changed = 1 + np.random.default_rng(1).integers(-9, 9, (f, x.shape[1])) * np.finfo(np.float32).eps
    return np.concatenate([x[-1:] * changed.astype(np.float32), x[f:]])


def noise(x: Rows, f: int, size: float) -> Rows:
    """Attackers send noise of some size."""
    return np.concatenate(
        [(size * np.random.default_rng(1).standard_normal((f, x.shape[1]))).astype(np.float32), x[f:]]
    )


def aligned(x: Rows, f: int) -> Rows:
    """Columns are a multiple of 4096, so that all rows fall into the same places of the caches."""
    return np.ascontiguousarray(x[:, : x.shape[1] // 4096 * 4096])


INPUTS: dict[str, Callable[[Rows, int], Rows]] = {
    "copies": copies,
    "near copies": near_copies,
    "tiny noise": lambda x, f: noise(x, f, 1e-30),
    "huge noise": lambda x, f: noise(x, f, 1e30),
    "aligned": aligned,
}


def measure_reads(held: dict[tuple[int, str], Any]) -> Measure:
    """Return the real measurement; it keeps the rows of one n and dtype in `held`."""

    def measure(rule: str, n: int, dtype: str) -> float:
        if (n, dtype) not in held:
            held.clear()
            held[n, dtype] = benchmark.make_rows(n, benchmark.VALUES // n, dtype)
        return benchmark.measure(rule, held[n, dtype], rounds=ROUNDS).reads

    return measure


def kind_of(machine: dict[str, Any]) -> str:
    """Return whose figures a machine has: instruction set and maker of the processor."""
    maker = machine.get("cpu", "").split("(")[0].split()[:1]  # "Intel(R) Xeon(R) Processor", "AMD EPYC"
    return " ".join([machine["isa"], *maker])


def missed(what: str, figure: float, slack: float, unit: str, measure: Callable[[], float]) -> list[str]:
    """Measure until the limit holds, some times at most, and print how it went; return that line where it never did."""
    limit, seen = figure * slack, [measure()]
    while len(seen) < ATTEMPTS and min(seen) > limit:
        seen.append(measure())
    verdict = "ok" if min(seen) <= limit else "SLOW"
    tried = ", ".join(f"{value:.2f}" for value in seen)
    line = f"{verdict:4}  {what} {tried} {unit}; limit {limit:.2f} = {figure:.2f} x slack"
    print(line, flush=True)
    return [] if verdict == "ok" else [line]


def slow_rows(limits: dict[str, Any], kind: str, measure: Measure) -> list[str]:
    """Return a line for each row that stayed over its limit, and print every row."""
    lines = []
    for row in limits["rows"]:
        rule, n, dtype = row["rule"], row["n"], row["dtype"]
        # A maker without figures of its own is held to those of the instruction set, and this to the next lower one's.
        figure = row["reads"].get(kind) or row["reads"].get(kind.split(maxsplit=1)[0], row["reads"]["v3"])
        call = functools.partial(measure, rule, n, dtype)
        lines += missed(f"{rule:24} n={n:<5} {dtype:11}", figure, limits["slack"], "reads", call)
    return lines


def measure_worst(rule: str, n: int, kind: str) -> float:
    """Return how many times as long as honest rows a kind of input takes, of which nearly half are attackers."""
    f, honest = (n - 3) // 2, benchmark.make_rows(n, WORST_VALUES // n + 1)
    honest[: n // 4] = -honest[-(n // 4) :][::-1]  # no attackers but those of the kind
    other = INPUTS[kind](honest, f)
    calls = []
    for rows in (other, honest):
        call, result = benchmark.job(rule, rows, f)
        call()
        worst.check_result(rule, rows, f, result, f"{rule}, n={n}, {kind}")
        calls.append(call)
    ratios = np.divide(*benchmark.compare(*calls, ROUNDS))
    return float(np.median(ratios)) * honest.shape[1] / other.shape[1]


def dear_inputs(limits: dict[str, Any], measure: Measure) -> list[str]:
    """Return a line for each of the worst inputs that stayed over its limit, and print every one."""
    lines = []
    for rule, n, kind in limits["worst"]["cases"]:
        call = functools.partial(measure, rule, n, kind)
        times, slack = limits["worst"]["times"], limits["slack"]
        lines += missed(f"{rule:24} n={n:<5} {kind:11}", times, slack, "times honest rows", call)
    return lines


def update(limits: dict[str, Any], kind: str, measure: Measure) -> None:
    """Replace the figures of this kind of machine by the median of three attempts here."""
    for row in limits["rows"]:
        row["reads"][kind] = round(sorted(measure(row["rule"], row["n"], row["dtype"]) for _ in range(3))[1], 2)
        print(row, flush=True)
    rows = ",\n".join("    " + json.dumps(row) for row in limits["rows"])
    cases = ",\n".join("      " + json.dumps(case) for case in limits["worst"]["cases"])
    LIMITS.write_text(
        f'{{\n  "slack": {limits["slack"]},\n  "rows": [\n{rows}\n  ],\n'
        f'  "worst": {{\n    "times": {limits["worst"]["times"]},\n    "cases": [\n{cases}\n    ]\n  }}\n}}\n'
    )


def main() -> int:
    limits, kind = json.loads(LIMITS.read_text()), kind_of(benchmark.machine())
    measure = measure_reads({})
    if "--update" in sys.argv[1:]:
        update(limits, kind, measure)
        return 0
    failed = slow_rows(limits, kind, measure) + dear_inputs(limits, measure_worst)
    if failed:
        print("slower than bench/limits.json allows:", *failed, sep="\n  ")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
