"""A training run in a folder: log, checkpoints, resuming after a kill, picture."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from robustkern.errors import plain
from robustkern.measure import style
from robustkern.training.settings import Settings
from robustkern.training.simulation import ModelServer, Times

__all__ = ["Runner", "alone_in", "draw", "last_checkpoint", "read_lines", "replace_lines", "run"]

LOG, CHECKPOINT, PICTURE, LOCK = "log.jsonl", "checkpoint.safetensors", "accuracy.png", ".lock"
NEW = ".new"  # while it is written

State = dict[str, NDArray[Any]]
Line = dict[str, Any]


class Runner(Protocol):
    """What trains: a `Simulation`, or the server of real processes."""

    settings: Settings
    server: ModelServer
    times: Times
    t: int

    def round(self) -> None:
        """Train for one round."""

    def evaluate(self) -> tuple[float, float]:
        """Return accuracy and loss on the test images."""

    def state(self) -> State:
        """Return everything that the coming rounds depend on."""

    def restore(self, state: State, t: int, lost: dict[int, str]) -> None:
        """Go on as after round t."""

    def finish(self) -> None:
        """Let the workers go, whether training has ended or failed."""


def last_checkpoint(settings: Settings, out: Path) -> tuple[State, int, dict[int, str]] | None:
    """Return state, round and lost workers of the last checkpoint of these settings; None where there is none.

    Raises
    ------
    ValueError
        If the folder holds a run with other settings, or its checkpoint cannot be read; the message says what to do.
    """
    path = out / CHECKPOINT
    _check_regular(path)
    if not path.exists():
        if (out / LOG).exists():
            lines = _read_log(out / LOG)
            if not lines or "settings" not in lines[0]:
                raise ValueError(
                    f"{out / LOG} is no log of a training (choose another --out, or start again with --overwrite)"
                )
            _check_settings(settings, lines[0]["settings"], out)
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            facts = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        missing = {"x", "momenta", "ids", "previous"} - state.keys()
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        theirs, t = json.loads(facts["settings"]), int(facts["round"])
        lost = {int(worker): str(reason) for worker, reason in json.loads(facts["lost"]).items()}
        if t < 0 or not all(1 <= worker < settings.workers for worker in lost):
            raise ValueError(f"round {t} and lost workers {sorted(lost)} cannot be")
    except (SafetensorError, OSError, KeyError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read: {plain(str(error))} (start again with --overwrite)") from None
    _check_settings(settings, theirs, out)
    if t > settings.rounds:
        raise ValueError(
            f"{out} holds {t} rounds, more than the {settings.rounds} that are asked for (ask for more, choose another "
            "--out, or start again with --overwrite)"
        )
    return state, t, lost


def _check_regular(path: Path) -> None:
    """Raise where something else than a file has a name of ours: to open a pipe waits for somebody at its other end."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError(f"{path}: is no regular file (remove it, or choose another --out)")


def _check_settings(settings: Settings, theirs: Any, out: Path) -> None:
    different = settings.differences(theirs) if isinstance(theirs, dict) else f"{plain(repr(theirs), 100)} there"
    if different:
        raise ValueError(
            f"{out} holds a run with other settings ({different}); choose another --out, or start again with "
            "--overwrite"
        )


@contextlib.contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Keep others out of a folder that this process writes to; raise where another one is there."""
    for name in (LOCK, LOG, LOG + NEW, CHECKPOINT, CHECKPOINT + NEW):
        _check_regular(out / name)
    with (out / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            where = f"{out}: another process is writing there"
            raise ValueError(f"{where} (wait for it, or choose another --out)") from None
        yield


def replace_lines(path: Path, lines: list[Line]) -> None:
    """Write lines of JSON, complete or not at all."""
    fresh = path.with_name(path.name + NEW)
    with fresh.open("w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def _save_checkpoint(runner: Runner, out: Path) -> None:
    """Write it complete or not at all, and to the disk before the old one goes."""
    from safetensors.numpy import save

    facts = {
        "settings": json.dumps(runner.settings.as_dict()),
        "round": str(runner.t),
        "lost": json.dumps(runner.server.lost),
    }
    state = {name: np.ascontiguousarray(values) for name, values in runner.state().items()}
    path, fresh = out / CHECKPOINT, out / (CHECKPOINT + NEW)
    with fresh.open("wb") as file:
        file.write(save(state, metadata=facts))
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def read_lines(path: Path) -> list[Line]:
    """Return the lines that hold a JSON object; a kill may have cut the last one."""
    _check_regular(path)
    lines = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def _read_log(path: Path) -> list[Line]:
    """Return the settings, and the tests that are complete; whatever else stands there is left out."""
    return [line for line in read_lines(path) if line.keys() == {"settings"} or _is_test(line)]


def _is_test(line: Line) -> bool:
    seconds, loss = line.get("seconds"), line.get("loss", "")
    return (
        "settings" not in line
        and type(line.get("round")) is int
        and isinstance(line.get("accuracy"), float)
        and (loss is None or isinstance(loss, float))
        and isinstance(line.get("lost"), dict)
        and isinstance(seconds, dict)
        and "total" in seconds
        and all(isinstance(value, (int, float)) for value in seconds.values())
    )


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN


def run(
    runner: Runner,
    out: Path,
    *,
    evaluate_every: int,
    checkpoint_every: int,
    found: tuple[State, int, dict[int, str]] | None = None,
    progress: Callable[[int, Line], None] | None = None,
) -> list[Line]:
    """Train to the end, and keep log and checkpoints in a folder.

    Parameters
    ----------
    runner : Runner
        What trains.
    out : path
        The folder, which exists.
    evaluate_every, checkpoint_every : int
        In rounds; both happen at the end too.
    found : optional
        What `last_checkpoint` returned: go on from there.
    progress : callable, optional
        Called after each round with the round and the last line of the log.

    Returns
    -------
    list of dict
        The log: settings first, then ``round``, ``accuracy``, ``loss`` (None where not finite), ``lost`` and
        ``seconds``.
    """
    rounds = runner.settings.rounds
    lines: list[Line] = [{"settings": runner.settings.as_dict()}]
    if found is not None:
        state, t, lost = found
        if t:
            runner.restore(state, t, lost)
        if (out / LOG).exists():
            lines += [line for line in _read_log(out / LOG) if "round" in line and line["round"] <= t]
    began, before = time.perf_counter(), lines[-1].get("seconds", {}).get("total", 0.0)
    parts = {name: lines[-1].get("seconds", {}).get(name, 0.0) for name in asdict(runner.times)}

    def test() -> None:
        accuracy, loss = runner.evaluate()
        spent = {name: parts[name] + value for name, value in asdict(runner.times).items()}
        lines.append(
            {
                "round": runner.t,
                "accuracy": accuracy,
                "loss": _number(loss),
                "lost": {str(worker): reason for worker, reason in runner.server.lost.items()},
                "seconds": {
                    "total": round(before + time.perf_counter() - began, 3),
                    **{name: round(value, 3) for name, value in spent.items()},
                },
            }
        )
        log.write(json.dumps(lines[-1]) + "\n")
        log.flush()

    replace_lines(out / LOG, lines)
    with (out / LOG).open("a") as log:
        if found is None:
            _save_checkpoint(runner, out)
        while runner.t < rounds:
            runner.round()
            if runner.t % evaluate_every == 0 or runner.t == rounds:
                test()
            if runner.t % checkpoint_every == 0 or runner.t == rounds:
                _save_checkpoint(runner, out)
            if progress is not None:
                progress(runner.t, lines[-1])
        if lines[-1].get("round") != rounds:  # there was nothing left to do, and the log was gone
            test()
    return lines


def draw(lines: list[Line], path: Path) -> None:
    """Draw accuracy and, below it, loss over the rounds."""
    settings, points = lines[0]["settings"], lines[1:]
    figure = style.figure(8, 5.5)
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    rounds = [line["round"] for line in points]
    accuracy, loss = style.looks(["accuracy", "loss"]).values()
    thin = {"linewidth": 2, "markersize": 5, "markevery": max(len(rounds) // 25, 1)}
    upper.plot(rounds, [line["accuracy"] for line in points], **accuracy | thin)
    lower.plot(rounds, [math.nan if line["loss"] is None else line["loss"] for line in points], **loss | thin)
    upper.set(ylabel="test accuracy", ylim=(0, 1))
    lower.set(ylabel="test loss", xlabel="round")
    upper.set_title(
        f"{settings['data']}, {settings['model']}, {settings['optimizer']}: {settings['byzantine']} of "
        f"{settings['workers']} workers attack ({settings['attack']}), {settings['rule']}",
        fontsize="medium",
        wrap=True,
    )
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    style.save(figure, path)
