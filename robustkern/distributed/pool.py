"""Pools of files on Dask: blocks of columns are tasks, of which each reads its part of every file.

The grid of blocks depends on the files alone, so results have the same bits on any pool; tasks write nothing, so that
one that is lost is done again elsewhere.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from distributed import Client, LocalCluster
from distributed.protocol.pickle import dumps, loads
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import ArrayLike, NDArray

from robustkern.backends.floats import usual_floats
from robustkern.backends.registry import choose
from robustkern.contract.rows import Block, PlainLeaf, T, Undivided
from robustkern.distributed.together import odd_ones
from robustkern.engine import Info, Limits, Passes, combining, limits, run
from robustkern.errors import brief, plain, shown
from robustkern.files.formats import FileError, Reader, Tensor, reader_of
from robustkern.files.output import Output, Target, in_order
from robustkern.files.pieces import check_bad_option, require_few
from robustkern.files.workers import Worker, distinct
from robustkern.functions import Patterns
from robustkern.inputs.leaves import Choice, computed
from robustkern.inputs.trees import adapt
from robustkern.rules.base import Aggregator, as_aggregator
from robustkern.scalars import as_int

__all__ = ["dask_aggregate"]

Progress = Callable[[str, int, int], None]
#: Which facts of a file tell that it was written to, whoever keeps it.
STAMPS = ("mtime", "LastModified", "last_modified", "ETag", "etag", "updated", "created")


def dask_aggregate(
    paths: Sequence[str],
    rule: Aggregator | str,
    /,
    *,
    out: str,
    f: int | None = None,
    delta: float | None = None,
    weights: ArrayLike | None = None,
    seed: int | None = None,
    only: Patterns = None,
    exclude: Patterns = None,
    bad: str = "error",
    client: Client | None = None,
    processes: int | None = None,
    block: int = 1 << 26,
    backend: str = "auto",
    progress: Progress | None = None,
) -> Info:
    """Combine update files into one, on the workers of a Dask cluster.

    Parameters
    ----------
    paths : sequence of str
        One a worker: safetensors or npy files, as paths or as URLs that fsspec knows, which all of Dask's workers can
        read.
    rule, f, delta, weights, seed, backend
        As for `robustkern.aggregate`.
    out : str
        Path or URL of the result, a safetensors or npy file, written by this process when all of it is there.
    only, exclude
        As for `robustkern.aggregate`: patterns of tensor names.
    bad : {"error", "count"}
        What an update is that cannot be read when the call begins, has other tensors than most, or is the same file as
        another one: an error, or one of the f rows that may be Byzantine (`Info.bad`, by path), so that no client can
        block a round: NaN, and in tensors of integers what the first file that can be used has.
    client : distributed.Client, optional
        Of the cluster; by default one of `processes` processes on this machine, which ends with the call.
    processes : int, optional
        How many, 2 by default.
    block : int
        Bytes of all files that a task reads at a time, but for at least one value of each: what it takes in memory.
    progress : callable, optional
        Takes the name of a pass, how many of its tasks are done, and how many there are.

    Returns
    -------
    Info

    Raises
    ------
    FileError
        If a file cannot be used, has other tensors than most, or is the same as another, and is not counted; if more
        than f are; or if one changes between two passes; the message names it.
    TypeError, ValueError, NonFiniteError
        As `robustkern.aggregate`; infinities that rows share are not looked for.

    Notes
    -----
    Each task is done up to three times where its worker is lost. Dask's own protocol is not for untrusted networks.
    """
    plan = as_aggregator(rule)
    paths = _checked_paths(paths)
    if client is not None and not isinstance(client, Client):
        raise TypeError(
            f"dask_aggregate: client is {brief(client)}; expected a distributed.Client (pass "
            "distributed.Client('tcp://host:8786'))"
        )
    if processes is not None and (as_int(processes) or 0) < 1:
        raise ValueError(f"dask_aggregate: processes must be None or an integer, at least 1; got {brief(processes)}")
    if len(set(paths)) < len(paths):
        raise ValueError(
            f"dask_aggregate: {shown(Counter(paths).most_common(1)[0][0])} is there twice (one path a worker)"
        )
    if (as_int(block) or 0) < 1:
        raise ValueError(f"dask_aggregate: block must be a number of bytes, at least 1; got {brief(block)}")
    choice = Choice.of(only, exclude, None)
    within = limits(plan, len(paths), str, f, delta, weights)
    check_bad_option(bad, plan)
    files, wrong = _opened(paths, bad)
    require_few(within, [wrong.get(k) for k in range(len(paths))])
    known = _reader(next(file for k, file in enumerate(files) if k not in wrong)).tensors
    choice.check(known)
    tensors = {name: known[name] for name in in_order(known) if choice.takes(name)}
    with contextlib.ExitStack() as stack:
        if client is None:
            options = {"n_workers": as_int(processes) or 2, "threads_per_worker": 1, "dashboard_address": None}
            cluster = stack.enter_context(LocalCluster(**options))  # type: ignore[no-untyped-call]
            client = stack.enter_context(Client(cluster))  # type: ignore[no-untyped-call]
        here, there = url_to_fs(out)
        if any(type(system) is type(here) and path == there for system, path in map(url_to_fs, paths)):
            raise FileError(f"{out}: is one of the updates, which are never overwritten (name another file)")
        mine = [Path(path) for system, path in map(url_to_fs, paths) if isinstance(system, LocalFileSystem)]
        local = _local(out, stack)
        target = stack.enter_context(Target(Output(local, tensors, {}, mine)))
        asked = _Asked(files, frozenset(wrong), plan, within, backend)
        source = _Pool(asked, tensors, block, client, target, progress)
        info = run(plan, source, f, delta, weights, seed, "error", backend)
    assert info is not None
    return replace(info, bad={paths[k]: reason for k, reason in sorted(wrong.items())})


def _checked_paths(paths: Any) -> list[str]:
    """Return the paths in their order, which weights and ties depend on."""
    found = [] if isinstance(paths, (str, Set)) or not isinstance(paths, Iterable) else list(paths)
    if not found or not all(isinstance(path, str) for path in found):
        raise TypeError("dask_aggregate: paths must be a list of texts, one a worker (pass [str(path), ...])")
    return found


def _local(out: str, stack: contextlib.ExitStack) -> Path:
    """Return where the result is written, from where it goes to its place in the end if that is elsewhere."""
    system, path = url_to_fs(out)
    if isinstance(system, LocalFileSystem):
        return Path(path)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="robustkern-pool-")))
    local = folder / PurePosixPath(path).name
    stack.callback(lambda: system.put_file(str(local), path) if local.exists() else None)
    return local


# ---- files -----------------------------------------------------------------------------------------------------------


class _File(NamedTuple):
    """A file, and what it was when the call began."""

    url: str
    size: int
    stamp: str

    @classmethod
    def of(cls, url: str) -> _File:
        """Look at a file."""
        try:
            system, path = url_to_fs(url)
            facts = system.info(path)
        except Exception as error:  # each file system has its own
            raise FileError(f"{url}: cannot be read ({error})") from None
        if facts.get("type") != "file" or not isinstance(facts.get("size"), int):
            raise FileError(f"{url}: is no file of a known size")
        return cls(url, facts["size"], "|".join(str(facts[name]) for name in STAMPS if facts.get(name) is not None))


class _Remote:
    """A file as readers want it, see `robustkern.files.formats.Held`."""

    def __init__(self, file: _File) -> None:
        self.file, self.path, self.size = file, Path(file.url), file.size
        self._system, self._at = url_to_fs(file.url)

    def check(self) -> None:
        """Raise where the file was written to since the call began."""
        if _File.of(self.file.url) != self.file:
            raise FileError(f"{self.file.url}: changed while it was being read (updates must stay until the end)")

    def read(self, offset: int, count: int) -> bytes:
        """Return some bytes."""
        try:
            data: bytes = self._system.cat_file(self._at, start=offset, end=offset + count)
        except Exception as error:
            raise FileError(f"{self.file.url}: cannot be read ({error})") from None
        if len(data) != count:
            raise FileError(f"{self.file.url}: truncated while it was being read (updates must stay until the end)")
        return data

    def read_into(self, data: NDArray[np.uint8], offset: int) -> None:
        """Fill an array from a position on."""
        data[:] = np.frombuffer(self.read(offset, len(data)), dtype=np.uint8)


@functools.lru_cache(maxsize=1024)
def _reader(file: _File) -> Reader:
    suffix = PurePosixPath(file.url).suffix.lower()
    if suffix not in (".safetensors", ".npy"):
        raise FileError(f"{file.url}: unknown kind of file; expected .safetensors or .npy (convert it)")
    return reader_of(_Remote(file), suffix)


def _opened(paths: Sequence[str], bad: str) -> tuple[list[_File], dict[int, str]]:
    """Look at all files; return them, and which cannot be used, differ from most, or are another one; why."""
    files: list[_File] = []
    wrong: dict[int, str] = {}
    forms: dict[int, dict[str, Any]] = {}
    for k, path in enumerate(paths):
        files.append(_File(path, 0, ""))
        try:
            files[k] = _File.of(path)
            forms[k] = {name: (x.shape, x.dtype.name) for name, x in _reader(files[k]).tensors.items()}
        except FileError as error:
            if bad == "error":
                raise
            wrong[k] = plain(str(error), 1000)
    if not forms:
        raise FileError(f"no update can be used; the first: {wrong[0]}")
    for at, name, ours, theirs in odd_ones(list(forms.values())):
        k = list(forms)[at]
        wrong[k] = f"{files[k].url}: tensor {shown(name)} is {ours}, where most files have {theirs}"
        if bad == "error":
            raise FileError(f"{wrong[k]} (leave this one out)")
    places = [url_to_fs(path) if k not in wrong else (None, "") for k, path in enumerate(paths)]
    here = [(Path(place),) if isinstance(system, LocalFileSystem) else () for system, place in places]
    for k, worker in enumerate(
        distinct([Worker(path, Path(path), own) for path, own in zip(paths, here, strict=True)])
    ):
        if worker.wrong is not None:
            if bad == "error":
                raise FileError(worker.wrong)
            wrong[k] = worker.wrong
    return files, wrong


# ---- blocks ----------------------------------------------------------------------------------------------------------


class _Asked(NamedTuple):
    """What tasks must know of the call; rows that are `wrong` are not read."""

    files: Sequence[_File]
    wrong: frozenset[int]
    rule: Aggregator
    within: Limits
    backend: str


class _Range(NamedTuple):
    """Values [low, high) of a tensor, end to end."""

    name: str
    low: int
    high: int


def _grid(tensors: dict[str, Tensor], most: int) -> list[list[_Range]]:
    """Return blocks of at most so many bytes of each file; small tensors share one."""
    blocks: list[list[_Range]] = [[]]
    held = 0
    for name, tensor in tensors.items():
        step = max(most // tensor.dtype.itemsize, 1)
        for low in range(0, tensor.size, step) if tensor.size else [0]:
            high = min(low + step, tensor.size)
            nbytes = (high - low) * tensor.dtype.itemsize
            if held and held + nbytes > most:
                blocks.append([])
                held = 0
            blocks[-1].append(_Range(name, low, high))
            held += nbytes
    return blocks


def _rows(asked: _Asked, block: Sequence[_Range]) -> list[dict[str, NDArray[Any]]]:
    rows: list[dict[str, NDArray[Any]]] = [{} for _ in asked.files]
    good = [k for k in range(len(rows)) if k not in asked.wrong]
    for k in good:
        reader = _reader(asked.files[k])
        for part in block:
            tensor = reader.tensors[part.name]
            values = np.empty(part.high - part.low, dtype=tensor.dtype)
            reader.read_into(values.view(np.uint8), part.name, part.low * tensor.dtype.itemsize)
            rows[k][part.name] = values
        reader.held.check()
    for k in asked.wrong:
        for name, values in rows[good[0]].items():
            rows[k][name] = values if computed(values.dtype) is None else np.full_like(values, np.nan)
    return rows


def _task(
    block: Sequence[_Range], asked: _Asked, given: dict[str, Any], name: str, arguments: Any
) -> tuple[NDArray[np.float64], list[NDArray[Any]] | None]:
    """Make a pass over a block: what it found, and where it writes the result, that."""
    with np.errstate(all="ignore"), usual_floats():
        source, result = adapt(_rows(asked, block))
        source.combine = combining(asked.rule, asked.within)
        kernels = choose(asked.backend, source.dtypes, "cpu")
        found: NDArray[np.float64] = getattr(Passes(source, kernels, **given), name)(*arguments)
    if name != "write_pass":
        return found, None
    if source.finish is not None:
        result = source.finish()
    return found, [result[part.name] for part in block]


class _Pool(Undivided):
    """A source whose columns lie in blocks that workers of Dask read."""

    divided = True

    def __init__(
        self, asked: _Asked, tensors: dict[str, Tensor], block: int, client: Client, target: Target,
        progress: Progress | None,
    ) -> None:  # fmt: skip
        self.n, self.device, self.has_centre = len(asked.files), "cpu", False
        self.plain: Sequence[PlainLeaf] = ()
        self.combine: Any = None
        forms = [(tensor, computed(tensor.dtype)) for tensor in tensors.values()]
        self.d = sum(tensor.size * form.factor for tensor, form in forms if form is not None)
        self.dtypes: set[np.dtype[Any]] = {form.dtype for _, form in forms if form is not None}
        self._asked, self._tensors = asked, tensors
        self._client: Any = client
        self._blocks = _grid(tensors, max(block // self.n, 1))
        self._target, self._progress = target, progress

    def row_name(self, row: int) -> str:
        """Return how an error should call a file."""
        return plain(PurePosixPath(self._asked.files[row].url).name, 100)

    def blocks(self) -> Iterator[Block]:
        """Return nothing: no column is here."""
        return iter(())

    results = blocks

    def once(self, work: Callable[[], T], passes: Any) -> T:
        """Return what `work` returns: this process decides."""
        return work()

    def passed(self, passes: Any, name: str, arguments: tuple[Any, ...], add: bool) -> list[NDArray[np.float64]]:
        """Have all blocks looked at; write what comes of it in the order of the file."""
        given = {"n": self.n, "f": passes.f, "weights": passes.weights, "share": passes.share}
        given["needs_origin"] = passes.needs_origin
        # A task, not scattered data: what a worker that dies has held is made again.
        told = dumps((self._asked, given, name, arguments))  # type: ignore[no-untyped-call]
        shared = self._client.submit(bytes, told, pure=False)
        futures = [self._client.submit(_in_task, block, shared, pure=False, retries=2) for block in self._blocks]
        found = []
        try:
            for k, future in enumerate(futures):
                part, results = future.result()
                future.release()
                found.append(part)
                if results is not None:
                    self._write(self._blocks[k], results)
                if self._progress is not None:
                    self._progress(name.removesuffix("_pass"), k + 1, len(futures))
        finally:
            self._client.cancel(futures[len(found) :])  # nobody waits for them after an error
        return found

    def _write(self, block: Sequence[_Range], results: list[NDArray[Any]]) -> None:
        writer = self._target.writer()
        for part, values in zip(block, results, strict=True):
            if part.low == 0:
                writer.start(part.name, self._tensors[part.name])
            writer.put(np.ascontiguousarray(values).reshape(-1).view(np.uint8))


def _in_task(block: Sequence[_Range], shared: bytes) -> Any:
    asked, given, name, arguments = loads(shared)  # type: ignore[no-untyped-call]
    return _task(block, asked, given, name, arguments)
