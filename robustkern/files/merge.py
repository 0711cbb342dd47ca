"""Aggregation of update files into one; the output appears complete or not at all."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from robustkern.engine import Info, Limits, combining, joined, limits, run
from robustkern.errors import NonFiniteError
from robustkern.files.formats import MARK, FileError
from robustkern.files.output import Output, Target
from robustkern.files.pieces import Files, Progress, Row, check_bad_option, descriptors
from robustkern.files.workers import Pool, Worker, below_half, capped, claimed, find_workers, named_weights
from robustkern.inputs.leaves import Choice
from robustkern.rules.base import Aggregator, as_aggregator
from robustkern.rules.mean import Mean

__all__ = ["Weights", "aggregate_files", "aggregate_pool", "memory_of", "touched"]


def memory_of(text: str | int) -> int:
    """Return a number of bytes from one, or from a text such as "512MiB" or "2GB"."""
    if isinstance(text, int) and not isinstance(text, bool):
        number, unit = float(text), ""
    else:
        letters = str(text).strip()
        digits = letters.rstrip("KMGTiBkmgtb ")
        unit = letters[len(digits) :].strip().lower().removesuffix("b")
        try:
            number = float(digits)
        except ValueError:
            number = -1.0
    powers = {
        "": 1,
        "k": 10**3,
        "m": 10**6,
        "g": 10**9,
        "t": 10**12,
        "ki": 2**10,
        "mi": 2**20,
        "gi": 2**30,
        "ti": 2**40,
    }
    if unit not in powers or not 0 < number * powers[unit] < 2**62:
        raise ValueError(f"expected a number of bytes such as 512MiB or 2GB; got {str(text)!r}")
    return int(number * powers[unit])


def aggregate_files(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    rule: Aggregator | str,
    /,
    *,
    out: str | os.PathLike[str],
    f: int | None = None,
    delta: float | None = None,
    weights: ArrayLike | Mapping[str, float] | None = None,
    weights_from: str | None = None,
    cap_weights: float | None = None,
    centre: str | os.PathLike[str] | None = None,
    seed: int | None = None,
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    base: str | os.PathLike[str] | None = None,
    scope: str = "update",
    dtype: Any = None,
    nonfinite: str = "error",
    bad: str = "error",
    memory: int | str = "1GiB",
    shard_size: int | str | None = None,
    backend: str = "auto",
    progress: Progress | None = None,
) -> Info:
    """Aggregate update files into one file.

    Parameters
    ----------
    paths : path, or sequence of paths
        One a worker: a safetensors, npz or npy file, a file of ``torch.save`` (extra ``torch``; only its weights are
        loaded), the index of a checkpoint in shards, or a folder with one of these. A single folder is a pool, with an
        entry for each worker, in natural order of their names ("client-2" before "client-10").
    rule, f, delta, seed, only, exclude, scope, dtype, nonfinite, backend
        As for `robustkern.aggregate`; leaves are called by their tensors' names.
    out : path
        Written under a temporary name beside it, looked at, and renamed when complete; the suffix decides the kind. An
        earlier output of this name is replaced as a whole: with its shards and their index.
    weights : array_like of shape (n,), or mapping of str to float, optional
        In the order of the paths, or by worker name; for a pool by name only.
    weights_from : str, optional
        Instead: the key of metadata under which the updates say how much they count, such as "num_samples". What they
        say is not trusted: `cap_weights` is 10 then, and a claim that is no weight makes the update a bad file.
    cap_weights : float, optional
        Cut each weight to so many times their median.
    centre : path, optional
        A file like the updates, for rules that measure from a centre.
    base : path, optional
        The model before this round, which supplies the tensors that take no part; the output lacks them otherwise.
    bad : {"error", "count"}
        What an update is that cannot be read, or has not the names, shapes and dtypes that at least n - f updates
        share: an error, or one of the f rows that may be Byzantine (`Info.bad`), so that no client can block a round.
    memory : int or str
        Most bytes of all buffers; larger tensors are read in pieces. Headers are not in it.
    shard_size : int or str, optional
        Write safetensors in shards of at most so many bytes, and their index.
    progress : callable, optional
        Called with what is being done, bytes read so far, and bytes of one read of all files.

    Returns
    -------
    Info

    Raises
    ------
    FileError
        If a file is corrupt, truncated, changes while it is read, or does not match the others, naming it. Nothing is
        written then.
    ImportError
        If a package is missing that a kind of file needs, naming it.
    TypeError, ValueError, NonFiniteError, BackendUnavailable
        As `robustkern.aggregate`; rows are called by their files.

    Notes
    -----
    Reads of the files: as `robustkern.aggregate`. Between two passes nothing may change: files are held open, and every
    piece is compared with what was read before by a hash under a secret key. Integer and boolean tensors come back as
    column-wise lower median, for `mean` as their rounded mean. Metadata that at least n - f updates share are kept.
    """
    given = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    pool = find_workers(given, Path(out), bad)
    info, _ = aggregate_pool(
        pool,
        as_aggregator(rule),
        out=Path(out),
        f=f,
        delta=delta,
        weights=weights,
        weights_from=weights_from,
        cap_weights=cap_weights,
        centre=centre,
        seed=seed,
        choice=Choice.of(only, exclude, dtype),
        base=base,
        scope=scope,
        nonfinite=nonfinite,
        bad=bad,
        memory=memory_of(memory),
        shard_size=None if shard_size is None else memory_of(shard_size),
        backend=backend,
        progress=progress,
    )
    return info


def aggregate_pool(
    pool: Pool,
    rule: Aggregator,
    *,
    out: Path,
    f: int | None,
    delta: float | None,
    weights: ArrayLike | Mapping[str, float] | None,
    weights_from: str | None,
    cap_weights: float | None,
    centre: str | os.PathLike[str] | None,
    seed: int | None,
    choice: Choice,
    base: str | os.PathLike[str] | None,
    scope: str,
    nonfinite: str,
    bad: str,
    memory: int,
    shard_size: int | None,
    backend: str,
    progress: Progress | None,
) -> tuple[Info, Weights]:
    """Aggregate workers that were found; see `aggregate_files`. Also return what they weigh."""
    check_bad_option(bad, rule)
    if scope not in ("update", "leaf"):
        raise ValueError(f"scope must be 'update' or 'leaf'; got {scope!r}")
    mean = isinstance(rule, Mean)
    others = [Path(path) for path in (centre, base) if path is not None]
    hold = sum(len(worker.files) for worker in pool.workers) + len(others) <= descriptors()
    with contextlib.ExitStack() as stack:
        rows = [Row.of(worker, hold) for worker in pool.workers]
        for row in rows:
            stack.callback(row.close)
        beside = [Row.of(Worker(str(path), path, (path,)), hold) for path in others]
        for row in beside:
            stack.callback(row.close)
            row.check()
        weighed = _weights(pool, rows, weights, weights_from, cap_weights, bad, f)
        within = limits(rule, len(rows), lambda i: rows[i].name, f, delta, weighed.used)
        files = Files(
            [*rows, *(beside[:1] if centre is not None else [])],
            len(rows),
            centre is not None,
            beside[-1] if base is not None else None,
            replace(choice, integers=mean and choice.dtype is not None),
            within,
            bad,
            scope == "leaf",
            memory,
            progress,
        )
        stack.callback(files.close)
        inputs, folders = touched(pool)
        metadata = _shared_metadata(rows, within)
        output = Output(out, files.out, metadata, [*inputs, *others], folders, shard_size)
        options = {"delta": delta, "f": f, "weights": weighed.used, "seed": seed}
        with Target(output) as files.target:
            try:
                info = _run(rule, files, scope, options | {"nonfinite": nonfinite, "backend": backend})
            except NonFiniteError:
                files.check_bad()  # which tells of files, where these were it
                raise
            files.check_bad()
        return replace(info, bad=files.bad_rows, integers=len(files.integers)), weighed


def touched(pool: Pool) -> tuple[list[Path], list[Path]]:
    """Return the files that workers have, and their folders: an output replaces none of these, and is in none.

    A link that is no update protects nothing, wherever it leads: nobody blocks a round by one to the output's folder.
    """
    workers = [worker for worker in pool.workers if worker.wrong is None or not os.path.islink(worker.path)]
    files = [path for worker in workers for path in (worker.path, *worker.files) if not os.path.isdir(path)]
    return files, [worker.path for worker in workers if os.path.isdir(worker.path)]


def _run(rule: Aggregator, files: Files, scope: str, options: dict[str, Any]) -> Info:
    """Run the rule on all tensors at once, or on each."""
    if scope == "update" or not files.floats:
        files.together()
        info = run(rule, files.source(), **options)
        assert info is not None
        return info
    leaves: dict[str, Info] = {}
    for name in files.out:
        source = files.source({name})
        if name in files.floats:
            found = run(rule, source, **options)
            assert found is not None
            leaves[name] = found
            options["seed"] = found.seed if options["seed"] is None else options["seed"]
        else:
            source.combine = combining(rule, files.within)
            for _ in source.results():
                pass
        files.commit()
    return joined(leaves)


class Weights(NamedTuple):
    """What workers say that they weigh, and what is used; None where there are none."""

    claimed: list[float] | None = None
    used: list[float] | None = None


def _weights(
    pool: Pool,
    rows: Sequence[Row],
    weights: ArrayLike | Mapping[str, float] | None,
    weights_from: str | None,
    cap: float | None,
    bad: str,
    f: int | None,
) -> Weights:
    if cap is not None and not cap >= 1:
        raise ValueError(f"cap_weights must be at least 1, so many times the median; got {cap}")
    if weights is not None and weights_from is not None:
        raise ValueError(f"weights_from={weights_from!r}: weights= says it already (pass one of them)")
    if weights_from is not None:
        said: list[float | None] = []
        for row in rows:
            said.append(None)
            if row.wrong is None:
                try:
                    said[-1] = claimed(row.metadata, weights_from)
                except ValueError as error:
                    row.wrong = f"{row.readers[0].path}: {error}"
        if bad == "error":
            for row in rows:
                row.check()
        known = [value for value in said if value is not None]
        if not known:
            raise FileError(f"no update can be used; the first: {rows[0].wrong}")
        middle = float(np.median(known))
        claims = [middle if value is None else value for value in said]
        return Weights(claims, below_half(claims, 10.0 if cap is None else cap, f))
    if weights is None:
        if cap is not None:
            raise ValueError(f"cap_weights={cap:g}: nothing to cap (pass weights= or weights_from=)")
        return Weights()
    if isinstance(weights, Mapping):
        claims = named_weights(weights, pool.workers)
    elif pool.folder:
        raise ValueError(
            "weights: a list of weights does not say which worker of a folder each is for (pass them by name, or "
            "weights_from=)"
        )
    else:
        claims = [float(value) for value in np.asarray(weights, dtype=np.float64).reshape(-1)]
    if len(claims) != len(rows):
        raise ValueError(f"weights: expected one for each of the {len(rows)} workers; got {len(claims)}")
    return Weights(claims, claims if cap is None else capped(claims, cap))


def _shared_metadata(rows: Sequence[Row], within: Limits) -> dict[str, str]:
    """Return the texts of metadata that enough updates share; no single worker decides them."""
    votes = Counter((k, v) for row in rows for k, v in row.metadata.items() if isinstance(v, str))
    found = {}
    for (key, text), count in votes.items():
        # Of a client's million keys none is looked at twice.
        if (
            2 * count > len(rows)
            and within.tolerates(np.array([row.metadata.get(key) != text for row in rows]))
            and key != MARK
        ):
            found[key] = text
    return found if sum(len(k) + len(v) for k, v in found.items()) <= 1 << 20 else {}
