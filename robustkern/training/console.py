"""What ``robustkern train`` shows: a progress bar with the accuracy, a table, where the files are."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from robustkern.training import session
from robustkern.training.data import load_data
from robustkern.training.settings import Settings
from robustkern.training.simulation import Simulation

__all__ = ["train"]


def train(
    settings: Settings,
    out: Path,
    data_dir: Path | None,
    evaluate_every: int,
    checkpoint_every: int,
    overwrite: bool,
    rank: int | None,
    timeout_s: float,
) -> None:
    """Train in a folder.

    Parameters
    ----------
    settings : Settings
        The run.
    out, data_dir : path
        Folder of the run, made if need be, and of the data.
    evaluate_every, checkpoint_every : int
        In rounds.
    overwrite : bool
        Start again, whatever the folder holds.
    rank : int, optional
        Of this process where torchrun started it.
    timeout_s : float
        How long processes have for an answer.
    """
    data = load_data(settings.data, data_dir)
    if rank:
        from robustkern.training.processes import work

        reason = work(settings, data, timeout_s=timeout_s)
        if reason != "training has ended":
            print(f"worker {rank} has ended: {reason}", file=sys.stderr)
        _leave()
    out.mkdir(parents=True, exist_ok=True)
    errors = Console(stderr=True, soft_wrap=True)
    with session.alone_in(out):
        found = None if overwrite else session.last_checkpoint(settings, out)
        runner: session.Runner
        if rank is None:
            runner = Simulation(settings, data)
        else:
            from robustkern.training.processes import ProcessServer

            runner = ProcessServer(settings, data, timeout_s=timeout_s, checkpoint_every=checkpoint_every)
        if overwrite:  # only now that the new run is known to be possible
            for name in (session.LOG, session.CHECKPOINT, session.PICTURE):
                (out / name).unlink(missing_ok=True)
        if found is not None and found[1]:
            errors.print(Text(f"going on after round {found[1]} of {settings.rounds} ({out / session.CHECKPOINT})"))
        try:
            with _progress(settings.rounds, errors) as progress:
                lines = session.run(
                    runner,
                    out,
                    evaluate_every=evaluate_every,
                    checkpoint_every=checkpoint_every,
                    found=found,
                    progress=progress,
                )
        finally:
            runner.finish()
        _print_summary(settings, lines)
        _print_files(lines, out, errors)
    if rank is not None:
        _leave()


@contextlib.contextmanager
def _progress(rounds: int, console: Console) -> Iterator[Callable[[int, session.Line], None]]:
    """Show a bar with the accuracy, and above it whoever is lost."""
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=console, transient=True) as bar:
        task = bar.add_task("", total=rounds)
        lost: set[str] = set()

        def show(t: int, line: session.Line) -> None:
            said = f"accuracy {line['accuracy']:.1%}" if "accuracy" in line else ""
            bar.update(task, completed=t, description=said)
            for worker, reason in line.get("lost", {}).items():
                if worker not in lost:
                    lost.add(worker)
                    bar.console.print(Text(f"worker {worker} is lost: {reason}", style="yellow"))

        yield show


def _leave() -> None:
    """End this process without waiting for lines to workers that do not answer."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _print_summary(settings: Settings, lines: list[session.Line]) -> None:
    last, best = lines[-1], max(lines[1:], key=lambda line: line["accuracy"])
    seconds = last["seconds"]
    loss = "not finite" if last["loss"] is None else f"{last['loss']:.3f}"
    lost = ", ".join(f"worker {worker} ({reason})" for worker, reason in last["lost"].items()) or "none"
    table = Table(
        title=f"{settings.data}, {settings.model}, {settings.rounds} rounds", title_justify="left", show_header=False
    )
    attackers = f"{settings.byzantine} of {settings.workers} workers, {settings.attack}"
    for name, value in (
        ("attack", attackers if settings.byzantine else "none"),
        ("rule", f"{settings.rule}, f = {settings.tolerated}"),
        ("optimizer", f"{settings.optimizer}, lr = {settings.lr:g}"),
        ("test accuracy", f"{last['accuracy']:.1%} (best {best['accuracy']:.1%} in round {best['round']})"),
        ("test loss", loss),
        ("lost workers", lost),
        (
            "seconds",
            f"{seconds['total']:.1f}: " + ", ".join(f"{k} {v:.1f}" for k, v in seconds.items() if k != "total"),
        ),
    ):
        table.add_row(name, Text(value))
    console = Console()
    Console(width=max(console.width, min(120, shutil.get_terminal_size((120, 24)).columns))).print(table)


def _print_files(lines: list[session.Line], out: Path, errors: Console) -> None:
    names = [session.LOG, session.CHECKPOINT]
    try:
        session.draw(lines, out / session.PICTURE)
        names.append(session.PICTURE)
    except ModuleNotFoundError as error:
        errors.print(Text(f"no picture: {error} (run: pip install 'robustkern[plot]')", style="yellow"))
    print(f"{out}: {', '.join(names)}")
