"""``robustkern reproduce``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from robustkern.cli.console import bar, command, print_json
from robustkern.cli.options import Json, folder_to_write

__all__ = ["reproduce"]


@command(extra="train", much="the gradients of all workers")
def reproduce(
    out: Annotated[Path, typer.Option(help="Folder for the runs, the page and its pictures.")] = Path("reproduction"),
    quick: Annotated[bool, typer.Option("--quick", help="A small plan, some minutes: it supports no claim.")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Trainings at a time. Default: the number of cores.")] = None,
    as_json: Json = False,
) -> None:
    """Run the paper's comparisons, and write a page that says which of its claims held.

    About 1400 short trainings, less than half an hour on two cores. The same
    command again goes on where it was stopped.
    """
    from robustkern.training import reproduce as runs
    from robustkern.training.reproduction_page import claims, write_page
    from robustkern.training.session import alone_in

    plan = runs.Plan.quick() if quick else runs.Plan()
    folder_to_write(out, "reproduce")
    total = len(plan.runs())
    with alone_in(out), bar("training", total) as shown:
        records, facts = runs.reproduce(plan, out, jobs=jobs or _cores(), progress=lambda done, _: shown.show(done))
        shown.show(total, "measuring times")
        times = runs.measure_times()
        files = write_page(plan, records, times, facts, out)
    if as_json:
        found = [dict(zip(("claim", "verdict", "by"), row, strict=True)) for row in claims(plan, records, times)]
        print_json({**facts, "runs": len(records), "claims": found, "files": list(map(str, files))})
    else:
        print(f"{out}: {', '.join(path.name for path in files)}")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
