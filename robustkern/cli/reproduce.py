"""``robustkern reproduce``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robustkern.backends.threads import usable_cores
from robustkern.cli.console import Wrong, bar, command, print_json
from robustkern.cli.options import Json, folder_to_write, some

__all__ = ["reproduce"]


@command(extra="train", much="the gradients of all workers")
def reproduce(
    out: Annotated[Path, typer.Option(help="Folder for the runs, the page and its pictures.")] = Path("reproduction"),
    part: Annotated[list[str] | None, typer.Option(help="Only these parts of the page, such as mechanism.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A small plan, some minutes: it supports no claim.")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Trainings at a time. Default: the number of cores.")] = None,
    as_json: Json = False,
) -> None:
    """Run the papers' comparisons, and write a page that says which of their claims held, and why.

    Some 2,000 short trainings, about 80 minutes on two cores; with --part only
    some of them. The same command again goes on where it was stopped.
    """
    from robustkern.training import reproduce as runs
    from robustkern.training.data import load_data
    from robustkern.training.reproduction_page import claims, write_page
    from robustkern.training.session import alone_in

    every = {each.name: each for each in (runs.QUICK if quick else runs.PARTS)}
    asked = some(part, "part", f"some of {', '.join(every)}") or list(every)
    for name in asked:
        if name not in every:
            raise Wrong(f"--part: {name!r} is not known (known: {', '.join(every)})")
    parts = [each for name, each in every.items() if name in asked]
    for data in dict.fromkeys(each.base.data for each in parts):
        load_data(data)  # or say now what is missing
    folder_to_write(out, "reproduce")
    total = len(runs.runs_of(parts))
    with alone_in(out), bar("training", total) as shown:
        records, facts = runs.reproduce(
            parts, out, jobs=jobs or usable_cores(), progress=lambda done, _: shown.show(done)
        )
        shown.show(total, "measuring times")
        times = runs.measure_times(rounds=1 if quick else 9)
        files = write_page(parts, records, times, facts, out)
    if as_json:
        found = [claim._asdict() for claim in claims(parts, records, times)]
        print_json({**facts, "runs": total, "claims": found, "files": list(map(str, files))})
    else:
        print(f"{out}: {', '.join(path.name for path in files)}")
