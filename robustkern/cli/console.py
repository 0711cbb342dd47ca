"""What all commands share to speak with people: errors and exit codes, bars, tables."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import re
import signal
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from robustkern.cli.plain import stop_printing
from robustkern.errors import BackendUnavailable, RobustkernError, plain

__all__ = [
    "CANNOT",
    "INTERRUPTED",
    "WRONG",
    "Bar",
    "Wrong",
    "bar",
    "command",
    "errors",
    "fail",
    "in_options",
    "note",
    "print_json",
    "print_table",
    "said",
]

#: Exit codes besides 0: it cannot be done; the command was not understood; Ctrl-C; nobody reads the output any more.
CANNOT, WRONG, INTERRUPTED, UNREAD = 1, 2, 130, 141
#: Seconds between the lines that stand for a bar where there is no terminal.
LINES_S = 10.0
#: The most letters of a message.
MESSAGE = 2000
#: The least columns that a table of figures is cut to.
TABLE_COLUMNS = 120


# ---- errors and exit codes -------------------------------------------------------------------------------------


class Wrong(Exception):
    """The command was not understood; the message names the option."""


def note(text: str, style: str = "yellow") -> None:
    """Say something besides the result."""
    Console(stderr=True, soft_wrap=True).print(Text(plain(text, MESSAGE), style=style))


def fail(message: str, code: int) -> NoReturn:
    """Say what is wrong, and end."""
    Console(stderr=True, soft_wrap=True).print(Text.assemble(("error: ", "bold red"), plain(message, MESSAGE)))
    raise SystemExit(code)


def in_options(message: str, names: Collection[str]) -> str:
    """Return a message that speaks of Python arguments ("f=5", "f must") as one that speaks of options ("--f 5")."""
    if not names:
        return message
    known = "|".join(sorted(names, key=len, reverse=True))
    message = re.sub(rf"^({known})(?= must\b|:)", lambda found: "--" + found[1].replace("_", "-"), message)
    return re.sub(
        rf"(?<![\w/.\-])({known})=(?=(\S?))",
        lambda found: "--" + found[1].replace("_", "-") + (" " if re.match(r"[^\s),;]", found[2]) else ""),
        message,
    )


@contextlib.contextmanager
def errors(names: Collection[str] = (), extra: str = "cli", much: str = "this") -> Iterator[None]:
    """Turn what users can do something about into a message and an exit code; `names` are the options."""
    try:
        yield
    except KeyboardInterrupt:
        note("stopped")
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:
        stop_printing()
        raise SystemExit(UNREAD) from None
    except (Wrong, BackendUnavailable) as error:
        fail(in_options(str(error), names), WRONG)
    except ImportError as error:
        remedy = "" if "pip install" in str(error) else f"; install what it needs: pip install 'robustkern[{extra}]'"
        fail(f"{error}{remedy}", WRONG)
    except MemoryError as error:
        fail(f"not enough memory for {much} ({error})", CANNOT)
    except (RobustkernError, ValueError, TypeError, OSError) as error:
        fail(in_options(str(error), names), CANNOT)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM end the command as Ctrl-C does, so that what it has begun is cleaned up."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def command(extra: str = "demo", much: str = "one tensor of all files") -> Callable[[Any], Any]:
    """Make a function a command: what users can do something about becomes a message and an exit code.

    Parameters
    ----------
    extra : str
        What to install where a package is missing.
    much : str
        What memory is needed for.
    """

    def wrap(function: Any) -> Any:
        names = [name for name in inspect.signature(function).parameters if name != "out"]

        @functools.wraps(function)
        def run(*arguments: Any, **options: Any) -> None:
            with errors(names, extra, much), terminable():
                function(*arguments, **options)

        return run

    return wrap


@contextlib.contextmanager
def said(option: str) -> Iterator[None]:
    """Make what a function says about an option's value the command's error."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise Wrong(f"--{option}: {str(error).removeprefix(f'{option}: ').removeprefix('rule: ')}") from None


# ---- bars ------------------------------------------------------------------------------------------------------


class Bar:
    """How far a long work is: a bar on a terminal, elsewhere a line now and then."""

    def __init__(self, what: str, total: float, progress: Progress | None) -> None:
        self._what, self._total, self._progress = what, total, progress
        self._task = progress.add_task(what, total=total) if progress else None
        self._last = time.monotonic()

    def show(self, done: float, doing: str = "", total: float | None = None) -> None:
        """Show that so much is done."""
        self._total = max(total or self._total, done)
        what = f"{self._what}: {doing}" if doing else self._what
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, total=self._total, description=what)
        elif time.monotonic() - self._last >= LINES_S:
            self._last = time.monotonic()
            note(f"{done / self._total:4.0%} {what}", style="")

    def say(self, text: str) -> None:
        """Say something above the bar."""
        if self._progress is None:
            note(text)
        else:
            self._progress.console.print(Text(text, style="yellow"))


@contextlib.contextmanager
def bar(what: str, total: float, *, of_bytes: bool = False) -> Iterator[Bar]:
    """Show a bar on stderr while the block runs.

    Parameters
    ----------
    what : str
        What is done.
    total : float
        How many steps, or bytes.
    of_bytes : bool
        Whether it is bytes.
    """
    console = Console(stderr=True, soft_wrap=True)
    if not console.is_terminal:
        yield Bar(what, total, None)
        return
    figures = (DownloadColumn(), TransferSpeedColumn()) if of_bytes else (MofNCompleteColumn(), TaskProgressColumn())
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), *figures, TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bar(what, total, progress)


# ---- results ---------------------------------------------------------------------------------------------------


def print_json(facts: Any) -> None:
    """Print what ``--json`` asks for: all there is to know, and nothing else on stdout."""
    print(json.dumps(facts))


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str | Text]],
    numbers: Collection[str] = (),
    prose: Collection[str] = (),
) -> None:
    """Print a table.

    Parameters
    ----------
    title : str
        Above it.
    columns : sequence of str
        Their names.
    rows : sequence of sequences
        Their cells; plain text, no markup.
    numbers : collection of str
        Names of the columns that end on the right.
    prose : collection of str
        Names of the columns that may be broken into lines.
    """
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", no_wrap=column not in prose)
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    console = Console()
    width = console.width if console.is_terminal else max(console.width, TABLE_COLUMNS)
    Console(width=width).print(table)
