"""Who is a worker, and what each of them weighs.

A path is one worker. A file is one; a folder is one where it holds a checkpoint: one update file, or shards with their
index. A folder that is given alone is a pool, whose entries are the workers, in the natural order of their names.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from robustkern.errors import shown
from robustkern.files.formats import SUFFIXES, FileError, Held, is_output, is_same, kind_of, naming, read_json

__all__ = [
    "Pool",
    "Worker",
    "below_half",
    "capped",
    "claimed",
    "distinct",
    "find_workers",
    "named_weights",
    "read_weights",
    "worker_of",
]

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
    parts = re.split(r"([0-9]{1,18})", name)  # texts and numbers in turn
    return tuple((int(part), part) if k % 2 else (-1, part) for k, part in enumerate(parts)), name


def find_workers(paths: Sequence[str | os.PathLike[str]], out: Path | None = None, bad: str = "error") -> Pool:
    """Return the workers that the caller's paths stand for.

    Parameters
    ----------
    paths : sequence of paths
        One a worker, or one folder with an entry for each worker.
    out : Path, optional
        Where the result goes, which is no worker, nor are its shards and their index.
    bad : {"error", "count"}
        See `robustkern.aggregate_files`: whether an index in a pool is somebody's bad update, and a link to where the
        result goes.

    Raises
    ------
    FileError
        If there is none, or a single folder is one worker's.
    """
    given = [Path(path) for path in paths]
    if len(given) == 1 and os.path.isdir(given[0]):
        pool = _pool(given[0], out, bad)
    elif not given:
        raise FileError("no update files were given")
    else:
        pool = Pool(distinct([worker_of(path) for path in given]), False)
    if out is None or bad == "error":
        return pool
    return replace(pool, workers=tuple(_without_link_to(out, worker) for worker in pool.workers))


def _without_link_to(out: Path, worker: Worker) -> Worker:
    """Return a worker, as a bad one where a link leads from it to where the result goes: it would block every round."""
    place = Path(os.path.realpath(out.parent)) / out.name
    around = os.path.islink(worker.path) and Path(os.path.realpath(worker.path)) in place.parents
    linked = [file for file in worker.files if Path(os.path.realpath(file.parent)) / file.name != place]
    if worker.wrong is None and (around or (not os.path.islink(out) and any(is_same(file, out) for file in linked))):
        return Worker(worker.name, worker.path, wrong=f"{worker.path}: is a link to where the result goes, {out}")
    return worker


def _pool(folder: Path, out: Path | None, bad: str) -> Pool:
    entries, ignored = [], []
    names = sorted(os.listdir(folder), key=natural)
    for name in names:
        path = folder / name
        if name == ".metadata" and any(other.endswith(".distcp") for other in names) and bad == "error":
            raise FileError(_one_worker(folder, name))
        if name.startswith(".") or name.endswith(("~", ".tmp", ".part")):
            ignored.append(f"{shown(name)} (hidden or temporary)")
        elif out is not None and _is_of(path, out):
            ignored.append(f"{shown(name)} (is --out)")
        elif name.endswith(INDEX):
            if bad == "error":
                raise FileError(_one_worker(folder, name))
            entries.append(
                Worker(name, path, wrong=f"{path}: is an index, and this folder has an entry for each worker")
            )
        elif not os.path.isdir(path) and kind_of(path) not in SUFFIXES:
            ignored.append(f"{shown(name)} (no update file)")
        elif os.path.isfile(path) and is_output(path):
            ignored.append(f"{shown(name)} (a result of an aggregation)")
        else:
            entries.append(worker_of(path))
    if not entries:
        raise FileError(
            f"{folder}: the folder holds no worker: no {', '.join(SUFFIXES)} file, and no subdirectory with one"
        )
    return Pool(distinct(entries), True, tuple(ignored))


def _one_worker(folder: Path, name: str) -> str:
    return (
        f"{folder}: is one worker's checkpoint ({shown(name)} says so); expected a folder with one entry for each "
        "worker (name the workers' folders, or the folder that they are in)"
    )


def _is_of(path: Path, out: Path) -> bool:
    """Tell whether a file is an earlier output of this name, or one of its shards, or their index.

    What only has the name is somebody's update, or may be: then it is a worker, which no output replaces.
    """
    if path.parent.resolve() != out.parent.resolve():
        return is_same(path, out) and is_output(path)
    if path.name == out.name + INDEX:
        try:
            return all(map(is_output, _sharded(path, path).files))
        except FileError:
            return False
    shard = rf"{re.escape(out.stem)}-[0-9]{{5}}-of-[0-9]{{5}}{re.escape(out.suffix)}"
    return (path.name == out.name or re.fullmatch(shard, path.name) is not None) and is_output(path)


def worker_of(path: Path) -> Worker:
    """Return the worker of a path; what is wrong with it is told later, as it may be a bad row."""
    try:
        if os.path.isdir(path):
            return _folder(path)
        if path.name.endswith(INDEX):
            return _sharded(path, path)
        if kind_of(path) not in SUFFIXES and not os.path.exists(path):
            raise FileError(f"{path}: no such file or folder")
        return Worker(path.name, path, (path,))
    except FileError as error:
        return Worker(path.name, path, wrong=str(error))
    except OSError as error:  # such as a folder that may not be looked into
        return Worker(path.name, path, wrong=f"{path}: cannot be read ({error.strerror})")


def _folder(folder: Path) -> Worker:
    """Return the worker whose checkpoint is in a folder."""
    files = sorted(
        (p for p in folder.iterdir() if not p.name.startswith(".") and not os.path.isdir(p)),
        key=lambda p: natural(p.name),
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
                plain_name = isinstance(name, str) and name == Path(name).name and name.isprintable()
                if not plain_name or kind_of(Path(name)) not in SUFFIXES:
                    raise ValueError(f"it names {shown(str(name))}, which is no update file beside it")
    finally:
        held.close()
    shards = sorted(set(expected.values()), key=natural)
    name = path.name if path != index or not index.parent.name else index.parent.name
    return Worker(name, path, tuple(index.parent / shard for shard in shards), expected)


def distinct(workers: Sequence[Worker]) -> tuple[Worker, ...]:
    """Give every worker a name of its own, and let a file count once.

    Of workers that share a file the one that shares with most others loses, so that nobody pushes others out by linking
    to their files; of equals a link, or the later one.
    """
    names = Counter(worker.name for worker in workers)
    called = [w.name if names[w.name] == 1 else str(w.path) for w in workers]
    owners: dict[tuple[int, int], list[int]] = {}
    for k, worker in enumerate(workers):
        try:
            files = [path.stat() for path in worker.files] if worker.wrong is None else []
        except (OSError, ValueError):
            continue  # which is told when it is opened; such a one pushes nobody out
        for found in files:
            sharing = owners.setdefault((found.st_dev, found.st_ino), [])
            if k not in sharing:
                sharing.append(k)
    wrong = [worker.wrong for worker in workers]
    shared = [sharing for sharing in owners.values() if len(sharing) > 1]
    while shared:
        counts = Counter(k for sharing in shared for k in sharing for other in sharing if other != k)
        linked = {k: any(os.path.islink(path) for path in (workers[k].path, *workers[k].files)) for k in counts}
        worst = max(counts, key=lambda k: (counts[k], linked[k], k))
        other = next(k for sharing in shared if worst in sharing for k in sharing if k != worst)
        wrong[worst] = (
            f"{workers[worst].path}: is the same file as {called[other]}, and no worker counts twice (leave it out)"
        )
        shared = [left for sharing in shared if len(left := [k for k in sharing if k != worst]) > 1]
    return tuple(
        Worker(called[k], worker.path, worker.files, worker.expected, wrong[k]) for k, worker in enumerate(workers)
    )


# ---- weights ---------------------------------------------------------------------------------------------------


def named_weights(weights: Mapping[str, float], workers: Sequence[Worker]) -> list[float]:
    """Return the weights of workers in their order, from weights by name, with or without a suffix.

    Raises
    ------
    ValueError
        If a worker has none, or a name is none of theirs.
    """
    stems = Counter(Path(worker.name).stem for worker in workers)
    ways = [_ways(worker, stems) for worker in workers]
    known = {name for names in ways for name in names}
    for name in weights:
        if name not in known:
            raise ValueError(
                f"weights: {shown(name)} is no worker (known: "
                f"{', '.join(shown(worker.name) for worker in workers[:5])}{', ...' if len(workers) > 5 else ''})"
            )
    left, result = dict(weights), []
    for worker, names in zip(workers, ways, strict=True):
        found = next((name for name in names if name in left), None)
        if found is None:
            raise ValueError(f"weights: worker {shown(worker.name)} has none (expected one for each worker)")
        result.append(float(left.pop(found)))
    if left:
        raise ValueError(f"weights: {shown(next(iter(left)))} has one already, under another name (name it once)")
    return result


def _ways(worker: Worker, stems: Mapping[str, int]) -> tuple[str, ...]:
    """Return how a worker may be called."""
    stem = Path(worker.name).stem
    return (worker.name, str(worker.path), *([stem] if stems[stem] == 1 else []))


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
    limit = cap * float(np.median(weights))
    return [min(weight, limit) for weight in weights]


def below_half(weights: Sequence[float], cap: float, f: int | None) -> list[float]:
    """Return weights capped so that the f heaviest hold less than half: what one claims must not stop the others."""
    found = capped(weights, cap)
    low, high = 1.0, cap
    for _ in range(60 if f and 2 * f < len(weights) and _share(found, f) >= 0.5 else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if _share(capped(weights, middle), f or 0) < 0.5 else (low, middle)
        found = capped(weights, low)
    return found


def _share(weights: Sequence[float], f: int) -> float:
    return math.fsum(sorted(weights)[len(weights) - f :]) / (math.fsum(weights) or 1.0)


def read_weights(path: Path) -> dict[str, float]:
    """Return weights by name from a file of JSON, or of lines "name=3.5" or "name,3.5"."""
    text = path.read_text()
    if text.lstrip().startswith("{"):
        try:
            pairs = json.loads(text, object_pairs_hook=list)
        except RecursionError:
            raise ValueError(f"{path}: is nested too deeply") from None
    else:
        pairs = [re.split(r"[=,](?=[^=,]*$)", line.strip()) for line in text.splitlines() if line.strip()]
        if not all(len(pair) == 2 for pair in pairs):
            raise ValueError(f"{path}: expected lines such as name=3.5")
    found: dict[str, float] = {}
    for name, number in pairs:
        if name.strip() in found:
            raise ValueError(f"{path}: names a worker twice")
        try:
            found[name.strip()] = float(number)
        except (TypeError, ValueError):
            raise ValueError(f"{path}: {shown(name)} has {shown(str(number))}; expected a number") from None
    return found
