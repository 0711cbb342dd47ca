"""Fails where a rule has become slower than `limits.json` allows, in read passes: python bench/check.py [--update]

A shared machine slows both the read pass and the rule, so only their ratio counts. A disturbance can still fall on one
of the two; so a row that is over its limit is measured again, and only one that is over it in every attempt fails. The
limits are the figures measured when they were last updated, times the slack that the file states: for an instruction
set, or for the set and the maker of the processor, whose memory may be twice as fast beside its arithmetic.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from robustkern.measure import reads as benchmark

LIMITS = Path(__file__).with_name("limits.json")
ATTEMPTS, ROUNDS = 4, 5

Measure = Callable[[str, int, str], float]


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


def slow_rows(limits: dict[str, Any], kind: str, measure: Measure) -> list[str]:
    """Return a line for each row that stayed over its limit, and print every row."""
    failed = []
    for row in limits["rows"]:
        rule, n, dtype = row["rule"], row["n"], row["dtype"]
        # A maker without figures of its own is held to those of the instruction set, and this to the next lower one's.
        figure = row["reads"].get(kind) or row["reads"].get(kind.split(maxsplit=1)[0], row["reads"]["v3"])
        limit = figure * limits["slack"]
        seen: list[float] = []
        while len(seen) < ATTEMPTS and (not seen or min(seen) > limit):
            seen.append(measure(rule, n, dtype))
        verdict = "ok" if min(seen) <= limit else "SLOW"
        tried = ", ".join(f"{reads:.2f}" for reads in seen)
        line = f"{verdict:4}  {rule:24} n={n:<5} {dtype:9} {tried} reads; limit {limit:.2f} = {figure:.2f} x slack"
        print(line, flush=True)
        if verdict != "ok":
            failed.append(line)
    return failed


def update(limits: dict[str, Any], kind: str, measure: Measure) -> None:
    """Replace the figures of this kind of machine by the median of three attempts here."""
    for row in limits["rows"]:
        row["reads"][kind] = round(sorted(measure(row["rule"], row["n"], row["dtype"]) for _ in range(3))[1], 2)
        print(row, flush=True)
    rows = ",\n".join("    " + json.dumps(row) for row in limits["rows"])
    LIMITS.write_text(f'{{\n  "slack": {limits["slack"]},\n  "rows": [\n{rows}\n  ]\n}}\n')


def main() -> int:
    limits, kind = json.loads(LIMITS.read_text()), kind_of(benchmark.machine())
    measure = measure_reads({})
    if "--update" in sys.argv[1:]:
        update(limits, kind, measure)
        return 0
    failed = slow_rows(limits, kind, measure)
    if failed:
        print("slower than bench/limits.json allows:", *failed, sep="\n  ")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
