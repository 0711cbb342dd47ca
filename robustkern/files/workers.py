"""Who is a worker: the update files that the caller's paths stand for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from robustkern.files.formats import SUFFIXES, FileError

__all__ = ["expand"]


def expand(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Replace directories by the update files in them, in the order of their names.

    Raises
    ------
    FileError
        If a directory holds none.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and not p.name.startswith("."))
            if not found:
                raise FileError(f"{path}: the directory holds no {', '.join(SUFFIXES)} file")
            files += found
        else:
            files.append(path)
    return files
