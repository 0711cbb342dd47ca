"""Who is a worker, and what each of them weighs.

A path is one worker. A file is one; a folder is one where it holds a checkpoint: one update file, or shards with their
index. A folder that is given alone is a pool, whose entries are the workers, in the natural order of their names.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from robustkern.errors import shown
from robustkern.files.formats import SUFFIXES, FileError, Held, is_output, kind_of, naming, read_json

__all__ = ["Pool", "Worker", "capped", "claimed", "find_workers", "named_weights", "read_weights"]

INDEX = ".index.json"


@dataclass(frozen=True)
class Worker:
    """One worker's update.

    Attributes
    ----------
    name : str
        How it is called: the name of its file or folder, or its whole path where two have the same name.
    path : Path
        As it was given, or found in the pool.
    files : tuple of Path
        What holds its tensors.
    expected : dict or None
        Of shards: which file each tensor is in, as the index says.
    wrong : str or None
        Why it is no update, where it is none.
    """

    name: str
    path: Path
    files: tuple[Path, ...] = ()
    expected: Mapping[str, str] | None = field(default=None, compare=False)
    wrong: str | None = None


@dataclass(frozen=True)
class Pool:
    """All workers, and what lies beside them and is none.

    Attributes
    ----------
    workers : tuple of Worker
        In order.
    folder : bool
        Whether they were found in a folder.
    ignored : tuple of str
        Names in the folder that are no workers, with the reason.
    """

    workers: tuple[Worker, ...]
    folder: bool
    ignored: tuple[str, ...] = ()


def natural(name: str) -> tuple[Any, ...]:
    """Return a key that sorts "client-2" before "client-10"."""
    return tuple((int(part), part) if part.isdigit() else (-1, part) for part in re.split(r"(\d{1,18})", name)), name


def find_workers(paths: Sequence[str | os.PathLike[str]], out: Path | None = None) -> Pool:
    """Return the workers that the caller's paths stand for.

    Parameters
    ----------
    paths : sequence of paths
        One a worker, or one folder with an entry for each worker.
    out : Path, optional
        Where the result goes, which is no worker.

    Raises
    ------
    FileError
        If there is none, or a single folder is one worker's.
    """
    given = [Path(path) for path in paths]
    if len(given) == 1 and given[0].is_dir():
        return _pool(given[0], out)
    if not given:
        raise FileError("no update files were given")
    return Pool(_distinct([_worker(path) for path in given]), False)


def _pool(folder: Path, out: Path | None) -> Pool:
    entries, ignored = [], []
    names = sorted(os.listdir(folder), key=natural)
    for name in names:
        if name.endswith(INDEX) or name == ".metadata":
            raise FileError(
                f"{folder}: is one worker's checkpoint ({shown(name)} says so); expected a folder with one entry for "
                "each worker (name the workers' folders, or the folder that they are in)"
            )
    for name in names:
        path = folder / name
        if name.startswith(".") or name.endswith(("~", ".tmp", ".part")):
            ignored.append(f"{shown(name)} (hidden or temporary)")
        elif out is not None and out.exists() and path.exists() and path.samefile(out):
            ignored.append(f"{shown(name)} (is --out)")
        elif not path.is_dir() and kind_of(path) not in SUFFIXES:
            ignored.append(f"{shown(name)} (no update file)")
        elif path.is_file() and is_output(path):
            ignored.append(f"{shown(name)} (a result of an aggregation)")
        else:
            entries.append(_worker(path))
    if not entries:
        raise FileError(
            f"{folder}: the folder holds no worker: no {', '.join(SUFFIXES)} file, and no subdirectory with one"
        )
    return Pool(_distinct(entries), True, tuple(ignored))


def _worker(path: Path) -> Worker:
    """Return the worker of a path; what is wrong with it is told later, as it may be a bad row."""
    try:
        if path.is_dir():
            return _folder(path)
        if path.name.endswith(INDEX):
            return _sharded(path, path)
        return Worker(path.name, path, (path,))
    except FileError as error:
        return Worker(path.name, path, wrong=str(error))


def _folder(folder: Path) -> Worker:
    """Return the worker whose checkpoint is in a folder."""
    files = sorted(
        (p for p in folder.iterdir() if not p.name.startswith(".") and not p.is_dir()), key=lambda p: natural(p.name)
    )
    indices = [path for path in files if path.name.endswith(INDEX)]
    updates = [path for path in files if kind_of(path) in SUFFIXES]
    if len(indices) == 1:
        worker = _sharded(folder, indices[0])
        strays = [path.name for path in updates if path not in worker.files]
        if not strays:
            return worker
        found = f"files that its index does not name: {', '.join(map(shown, strays[:5]))}"
    elif len(updates) == 1 and not indices:
        return Worker(folder.name, folder, tuple(updates))
    else:
        names = [path.name for path in (*indices, *updates)]
        found = f"{len(names)}" + (f": {', '.join(map(shown, names[:5]))}" if names else "")
        found += ", ..." if len(names) > 5 else ""
    raise FileError(
        f"{folder}: a folder is one worker: expected one update file in it, or shards and their index; found {found}"
    )


def _sharded(path: Path, index: Path) -> Worker:
    """Return the worker whose tensors an index finds in several files."""
    held = Held(index)
    try:
        with naming(index):
            said = read_json(held, 0, held.size)
            expected = said["weight_map"]
            if not isinstance(expected, dict) or not expected:
                raise ValueError("its weight_map is no table")
            for name in expected.values():
                if not isinstance(name, str) or name != Path(name).name or kind_of(Path(name)) not in SUFFIXES:
                    raise ValueError(f"it names {shown(str(name))}, which is no update file beside it")
    finally:
        held.close()
    shards = sorted(set(expected.values()), key=natural)
    name = path.name if path != index or not index.parent.name else index.parent.name
    return Worker(name, path, tuple(index.parent / shard for shard in shards), expected)


def _distinct(workers: Sequence[Worker]) -> tuple[Worker, ...]:
    """Give every worker a name of its own, and let a file count once."""
    names = Counter(worker.name for worker in workers)
    seen: dict[tuple[int, int], str] = {}
    result: list[Worker] = []
    for worker in workers:
        name = worker.name if names[worker.name] == 1 else str(worker.path)
        wrong = worker.wrong
        for path in worker.files:
            try:
                found = path.stat()
            except OSError:
                continue  # which is told when it is opened
            first = seen.setdefault((found.st_dev, found.st_ino), name)
            if wrong is None and (first != name or name in [other.name for other in result]):
                wrong = f"{path}: is the same file as {first}, and no worker counts twice (leave it out)"
        result.append(Worker(name, worker.path, worker.files, worker.expected, wrong))
    return tuple(result)


# ---- weights ---------------------------------------------------------------------------------------------------


def named_weights(weights: Mapping[str, float], workers: Sequence[Worker]) -> list[float]:
    """Return the weights of workers in their order, from weights by name, with or without a suffix.

    Raises
    ------
    ValueError
        If a worker has none, or a name is none of theirs.
    """
    left, result = dict(weights), []
    for worker in workers:
        found = next((name for name in (worker.name, Path(worker.name).stem, str(worker.path)) if name in left), None)
        if found is None:
            raise ValueError(f"weights: worker {shown(worker.name)} has none (expected one for each worker)")
        result.append(float(left.pop(found)))
    if left:
        raise ValueError(
            f"weights: {shown(next(iter(left)))} is no worker (known: "
            f"{', '.join(shown(worker.name) for worker in workers[:5])}{', ...' if len(workers) > 5 else ''})"
        )
    return result


def claimed(metadata: Mapping[str, Any], key: str) -> float:
    """Return a weight that an update claims for itself; raise where it is no number that a weight can be."""
    if key not in metadata:
        raise ValueError(f"has no {shown(key)} in its metadata")
    try:
        value = float(metadata[key])
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError(f"claims {key} = {shown(str(metadata[key]))}; expected a finite number, not negative")
    return value


def capped(weights: Sequence[float], cap: float) -> list[float]:
    """Return weights of which none is more than `cap` times their median: nobody says how much he counts."""
    return [min(weight, cap * statistics.median(weights)) for weight in weights]


def read_weights(path: Path) -> dict[str, float]:
    """Return weights by name from a file of JSON, or of lines "name=3.5" or "name,3.5"."""
    text = path.read_text()
    if text.lstrip().startswith("{"):
        found = json.loads(text)
    else:
        pairs = [re.split(r"[=,](?=[^=,]*$)", line.strip()) for line in text.splitlines() if line.strip()]
        if not all(len(pair) == 2 for pair in pairs):
            raise ValueError(f"{path}: expected lines such as name=3.5")
        found = {name.strip(): number for name, number in pairs}
        if len(found) < len(pairs):
            raise ValueError(f"{path}: names a worker twice")
    return {name: float(number) for name, number in found.items()}
