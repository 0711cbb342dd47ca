"""How options are written: those that several commands have, lists, numbers, rules, files and folders to be written."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from robustkern.cli.console import Wrong, said
from robustkern.cli.rules import load_named
from robustkern.files.formats import TORCH
from robustkern.rules import Aggregator, names_in, parse_rule

__all__ = [
    "RULES",
    "BadFiles",
    "BadFilesOption",
    "Json",
    "Rules",
    "TolerateOption",
    "file_to_write",
    "folder_to_write",
    "listed",
    "names",
    "numbers",
    "rule_of",
    "some",
]

Json = Annotated[bool, typer.Option("--json", help="Print all facts as JSON on stdout, and nothing else there.")]
TolerateOption = Annotated[int | None, typer.Option("--f", help="How many workers may be Byzantine.")]


class BadFiles(Enum):
    """What files that cannot be used are."""

    error = "error"
    count = "count"


BadFilesOption = Annotated[
    BadFiles,
    typer.Option("--bad-files", help="What an update is that cannot be used: an error, or one of the f bad ones."),
]
Rules = Annotated[list[str] | None, typer.Option("--rules", help="Rules, with commas: 'median,ctma(median)'.")]

#: What `--rules` is, where it says nothing.
RULES = "rules such as median"
#: The most numbers that "1e4..1e9:2" stands for.
MOST_NUMBERS = 1000
#: What a command leaves in a folder of its own; and what keeps two of them apart, which says nothing.
MARK, LOCK = ".robustkern", ".lock"


# ---- text ------------------------------------------------------------------------------------------------------


def rule_of(text: str, option: str = "rule") -> Aggregator:
    """Read a rule; every command does it here."""
    with said(option):
        load_named(names_in(text))
        return parse_rule(text)


def listed(given: Sequence[str] | str | None) -> list[str]:
    """Split at the commas outside brackets and quotes; an option that is repeated goes on with its list."""
    parts, depth, quote = [""], 0, ""
    for letter in given if isinstance(given, str) else ",".join(given or ()):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth <= 0 and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return list(dict.fromkeys(part.strip() for part in parts if part.strip()))


def some(given: Sequence[str] | str | None, option: str, what: str) -> list[str]:
    """Split a list that says something where it is given."""
    found = listed(given)
    if given is not None and not found:
        raise Wrong(f"--{option}: expected {what}, with commas; got nothing")
    return found


def names(given: Sequence[str] | str | None, option: str, known: Sequence[str]) -> tuple[str, ...]:
    """Read a list of names."""
    found = tuple(some(given, option, f"some of {', '.join(known)}"))
    for name in found:
        if name not in known:
            raise Wrong(f"--{option}: {name!r} is not known (known: {', '.join(known)}; several with commas)")
    return found


def numbers(given: Sequence[str] | str | None, option: str, least: int, most: int) -> tuple[int, ...]:
    """Read "8,16" or "1e4..1e9" (powers of ten) or "1e4..1e9:2" (two a decade)."""
    what = f"--{option}: expected whole numbers from {least} to {most:,} such as 1e4,2e5, or 1e4..1e9, or 1e4..1e9:2"
    text = given if isinstance(given, str) else ",".join(given or ())
    found: list[float] = []
    try:
        for part in text.split(","):
            ends, _, steps = part.partition(":")
            if ".." not in ends:
                found.append(float(part))
                continue
            low, high = (float(end) for end in ends.split(".."))
            each = int(steps or 1)
            if not (least <= low <= high <= most and each >= 1):
                raise ValueError
            count = math.floor(each * math.log10(high / low) + 1e-9) + 1
            if len(found) + count > MOST_NUMBERS:
                raise Wrong(f"--{option}: {part!r} means {count:,} numbers; expected at most {MOST_NUMBERS:,} in all")
            found.extend(round(low * 10 ** (k / each)) for k in range(count))
    except (ValueError, OverflowError):
        raise Wrong(f"{what}; got {text!r}") from None
    for number in found:
        if not (least <= number <= most and number == int(number)):
            raise Wrong(f"{what}; got {number:g}")
    return tuple(sorted({int(number) for number in found}))


# ---- what is written, looked at before anything begins ---------------------------------------------------------


def _try_to_write(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder):
        pass


def file_to_write(path: Path | None, option: str, suffixes: Sequence[str]) -> None:
    """Raise where a file cannot be written, or its name is no such file's."""
    if path is None:
        return
    if path.suffix.lower() not in suffixes:
        torch = " (convert it afterwards; torch reads safetensors)" if path.suffix.lower() in TORCH else ""
        raise Wrong(f"--{option}: {path}: unknown kind of output; expected one of {', '.join(suffixes)}{torch}")
    if os.path.isdir(path):
        raise Wrong(f"--{option}: {path}: is a directory (name a file)")
    if not os.path.isdir(path.parent):
        raise Wrong(f"--{option}: {path}: the directory {path.parent} does not exist")
    try:
        with contextlib.suppress(FileNotFoundError):
            path.lstat()  # which a name that is too long has not
        _try_to_write(path.parent)
    except OSError as error:
        raise Wrong(f"--{option}: {path}: cannot be written there: {error}") from None


def folder_to_write(out: Path, command: str) -> None:
    """Make a folder of a command's own, or find that it is one; commands touch nothing in others.

    Parameters
    ----------
    out : path
        The folder.
    command : str
        Whose.

    Raises
    ------
    Wrong
        If it cannot be written, or holds what another command or somebody else has put there.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        _try_to_write(out)
        mark = out / MARK
        if mark.is_file():
            owner = mark.read_text(errors="replace").strip()
        elif any(path.name != LOCK for path in out.iterdir()):
            owner = "somebody else"
        else:
            mark.write_text(command + "\n")
            owner = command
    except OSError as error:
        raise Wrong(
            f"--out: expected a folder that can be written; got {str(out)!r}: {error} (choose another one)"
        ) from None
    if owner != command:
        raise Wrong(
            f"--out: {out} holds files of {owner}, which `robustkern {command}` does not touch (choose another folder, "
            "new or empty)"
        )
