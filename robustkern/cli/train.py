"""``robustkern train``: its options come from the fields of `Settings`."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import os
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import robustkern
from robustkern.cli.console import Wrong, bar, command, note, print_json, print_table
from robustkern.cli.options import Json, folder_to_write, rule_of, some
from robustkern.cli.rules import Import
from robustkern.cli.supervisor import HEARTBEAT, launched_rank, supervise
from robustkern.training.settings import Settings

if TYPE_CHECKING:
    from robustkern.training.session import Line

__all__ = ["train"]


def _with_settings(function: Any) -> Any:
    """Give a command an option for each field of `Settings` but `failures`, which ``--crash`` and ``--stall`` write."""
    kinds = typing.get_type_hints(Settings)
    options = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=Annotated[
                kinds[field.name], typer.Option(f"--{field.name.replace('_', '-')}", help=field.metadata["help"])
            ],
        )
        for field in dataclasses.fields(Settings)
        if field.name != "failures"
    ]
    signature = inspect.signature(function, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    function.__signature__ = signature.replace(parameters=[own[0], *options, *own[1:]])
    function.__annotations__ = {p.name: p.annotation for p in function.__signature__.parameters.values()}
    return function


@command(extra="train", much="the gradients of all workers")
@_with_settings
def train(
    *,
    out: Annotated[
        Path, typer.Option(help="Folder for log, checkpoint and picture; the same command goes on there.")
    ] = Path("train-output"),
    own: Import = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where the files of mnist or cifar10 are.")] = None,
    crash: Annotated[list[str] | None, typer.Option(help="3@20,5@30: worker 3 dies in round 20, 5 in 30.")] = None,
    stall: Annotated[list[str] | None, typer.Option(help="3@20: worker 3 hangs from round 20.")] = None,
    evaluate_every: Annotated[int, typer.Option(min=1, help="Rounds between tests.")] = 10,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Rounds between checkpoints.")] = 50,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start the folder's run again.")] = False,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that processes have for an answer.")] = 60.0,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Train with workers of which some attack: all in this process, or one process each.

    Log, checkpoint and picture go to a folder. The same command again goes on
    after a kill, with the same result as without it. For one process each:
    torchrun --nproc-per-node 17 -m robustkern train; a worker that crashes or
    stalls is dropped and counts as one of the f that are tolerated.
    """
    if not math.isfinite(timeout):
        raise Wrong(f"--timeout: expected a number of seconds from 0.1 on; got {timeout:g}")
    rank = launched_rank()
    if rank and HEARTBEAT not in os.environ:  # torchrun would end all workers with the first that fails
        _supervise(rank, timeout)
        return
    rule_of(settings["rule"])
    fates = (("crash", crash), ("stall", stall))
    failures = tuple(
        _failure(text, kind) for kind, given in fates for text in some(given, kind, "worker@round such as 3@20")
    )
    try:
        run = Settings(**settings, failures=failures)
    except (ValueError, TypeError) as error:
        said = str(error).removeprefix("schedule: ")
        raise Wrong(said.replace("failures must", "--crash and --stall must", 1)) from None
    if rank is not None and run.arrivals != "together":
        raise Wrong(f"--arrivals {run.arrivals}: torchrun's processes train in rounds (drop torchrun, or --arrivals)")
    _take_one_thread(run)
    from robustkern.training import session
    from robustkern.training.data import load_data

    if rank:
        _work(run, load_data(run.data, data_dir), rank, timeout)
        return
    folder_to_write(out, "train")
    data = load_data(run.data, data_dir)
    with session.alone_in(out):
        found = None if overwrite else session.last_checkpoint(run, out)
        runner: session.Runner
        if rank is None:
            from robustkern.training.asynchronous import simulate

            runner = simulate(run, data)
        else:
            from robustkern.training.processes import ProcessServer

            runner = ProcessServer(run, data, timeout_s=timeout, checkpoint_every=checkpoint_every)
        if overwrite:  # only now that the new run is known to be possible
            for name in (session.LOG, session.CHECKPOINT, session.PICTURE):
                (out / name).unlink(missing_ok=True)
        if found is not None and found[1]:
            note(f"going on after round {found[1]} of {run.rounds} ({out / session.CHECKPOINT})", style="")
        try:
            with _shown(run.rounds) as progress:
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
        files = [out / session.LOG, out / session.CHECKPOINT]
        try:
            session.draw(lines, out / session.PICTURE)
            files.append(out / session.PICTURE)
        except ModuleNotFoundError as error:
            note(f"no picture: {error} (run: pip install 'robustkern[plot]')")
    if as_json:
        print_json({"settings": run.as_dict(), "tests": lines[1:], "files": list(map(str, files))})
    else:
        _print_summary(run, lines)
        print(f"{out}: {', '.join(path.name for path in files)}")
    if rank is not None:
        _leave()


def _take_one_thread(settings: Settings) -> None:
    """Train small models on one thread, unless the environment says how many.

    Their operations are too short to share: threads that wait for each other at the end of each cost more than they
    gain, and where another process has one of the cores they wait for that. A round on 2 cores, quiet and beside a busy
    process: softmax 3.3 and 4.9 ms on one thread, 5.8 and 12.6 on two; paper 46 and 53 ms on one, 33 and 217 on two.
    """
    if settings.model != "resnet18" and "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(1)
        robustkern.set_num_threads(1)


def _failure(text: str, kind: str) -> tuple[int, int, str]:
    worker, _, at = text.partition("@")
    if not (worker.isdecimal() and at.isdecimal()):
        raise Wrong(f"--{kind} must be worker@round, such as 3@20; got {text!r}")
    return int(worker), int(at), kind


@contextlib.contextmanager
def _shown(rounds: int) -> Iterator[Callable[[int, Line], None]]:
    """Show a bar with the accuracy, and above it whoever is lost."""
    with bar("training", rounds) as shown:
        lost: set[str] = set()

        def show(t: int, line: Line) -> None:
            shown.show(t, f"accuracy {line['accuracy']:.1%}" if "accuracy" in line else "")
            for worker, reason in line.get("lost", {}).items():
                if worker not in lost:
                    lost.add(worker)
                    shown.say(f"worker {worker} is lost: {reason}")

        yield show


def _supervise(rank: int, timeout: float) -> None:
    code, began = supervise(sys.argv[1:], silence_s=2 * timeout + 5)
    if code:
        print(f"worker {rank} has ended: {f'signal {-code}' if code < 0 else f'exit code {code}'}", file=sys.stderr)
    if code and not began:  # the others would wait for it
        raise SystemExit(1)


def _work(settings: Settings, data: Any, rank: int, timeout: float) -> None:
    from robustkern.training.processes import work

    reason = work(settings, data, timeout_s=timeout, heartbeat=int(os.environ[HEARTBEAT]))
    if reason != "training has ended":
        print(f"worker {rank} has ended: {reason}", file=sys.stderr)
    _leave()


def _leave() -> None:
    """End this process without waiting for lines to workers that do not answer."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _print_summary(settings: Settings, lines: list[Line]) -> None:
    last, best = lines[-1], max(lines[1:], key=lambda line: line["accuracy"])
    seconds = last["seconds"]
    attackers = f"{settings.byzantine} of {settings.workers} workers, {settings.attack}"
    spent = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items() if name != "total")
    print_table(
        "",
        (f"{settings.data}, {settings.model}", f"{settings.rounds} rounds"),
        [
            ("attack", attackers if settings.byzantine else "none"),
            ("rule", f"{settings.rule}, f = {settings.tolerated}"),
            ("optimizer", f"{settings.optimizer}, lr = {settings.lr:g}"),
            ("test accuracy", f"{last['accuracy']:.1%} (best {best['accuracy']:.1%} in round {best['round']})"),
            ("test loss", "not finite" if last["loss"] is None else f"{last['loss']:.3f}"),
            ("lost workers", ", ".join(f"worker {w} ({reason})" for w, reason in last["lost"].items()) or "none"),
            ("seconds", f"{seconds['total']:.1f}: {spent}"),
        ],
    )
