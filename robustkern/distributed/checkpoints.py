"""Sharded checkpoints: n of them in, one out, by any number of ranks, of which each reads only the part it combines."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import ArrayLike
from torch import Tensor

from robustkern.contract.rows import Block, PlainLeaf, Undivided
from robustkern.distributed import dcp, shards
from robustkern.distributed.group import Group
from robustkern.distributed.ranks import Asked, call
from robustkern.distributed.together import Part, Ranks, Together, odd_ones
from robustkern.engine import Info, limits, run
from robustkern.errors import brief, plain, shown
from robustkern.files.output import check_place
from robustkern.files.pieces import check_bad_option, require_few
from robustkern.files.workers import Worker, distinct
from robustkern.functions import NonFinite, Patterns
from robustkern.inputs.leaves import Choice, computed
from robustkern.inputs.trees import adapt
from robustkern.rules.base import Aggregator, as_aggregator
from robustkern.scalars import as_int

__all__ = ["aggregate_checkpoints"]


class Checkpoint(Protocol):
    """One worker's checkpoint."""

    path: Path
    files: tuple[Path, ...]

    @property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes, in the order of names."""

    def read(self, name: str, low: int, high: int) -> Tensor:
        """Read [low, high) of a tensor's first axis, all of one without axes; nothing of it where that is empty."""


def aggregate_checkpoints(
    paths: Sequence[str | os.PathLike[str]],
    rule: Aggregator | str,
    /,
    *,
    out: str | os.PathLike[str],
    f: int | None = None,
    delta: float | None = None,
    weights: ArrayLike | None = None,
    seed: int | None = None,
    only: Patterns = None,
    exclude: Patterns = None,
    nonfinite: NonFinite = "error",
    memory: int = 1 << 30,
    shard_size: int | None = None,
    backend: str = "auto",
    bad: Literal["error", "count"] = "error",
    group: Any = None,
) -> Info:
    """Combine n checkpoints into one, on all ranks.

    Parameters
    ----------
    paths : sequence of path
        One a worker, the same in the same order on all ranks: a folder of torch.distributed.checkpoint (DCP), whatever
        number of ranks wrote it, or a safetensors file, or a folder with safetensors shards and their index, or the
        index.
    rule, f, delta, weights, seed, nonfinite, backend
        As for `robustkern.aggregate`, the same on all ranks.
    out : path
        Where the result goes, the same for all ranks: a name that ends in ".safetensors", or a folder that is not there
        yet, for a DCP checkpoint.
    only, exclude : str or sequence of str, optional
        Patterns of tensor names; the result lacks what is left out. Entries that are no tensors (step counters as
        numbers, names) are left out too: they are pickles.
    memory : int
        Most bytes of tensors that a rank reads at a time, over all checkpoints, but for at least one tensor's part.
    shard_size : int, optional
        Most bytes of the tensors in a safetensors file; more go to shards, "model.safetensors" to
        "model-00001-of-00002.safetensors" and "model.safetensors.index.json". A larger tensor has its own.
    bad : "error" or "count"
        With "count" a checkpoint that is none, cannot be read, has other tensors than most, or shares a file with
        another counts as one of the f, as a row of NaN would; which, and why, is in the Info. It is found before the
        call begins, for which each rank reads its part of DCP folders once more; what goes wrong later is an error.
    group : ProcessGroup, optional
        By default all ranks; without any process group this process does everything.

    Returns
    -------
    Info
        The same on all ranks.

    Raises
    ------
    FileExistsError
        If `out` is a folder that is there.
    TypeError, ValueError, NonFiniteError, RuntimeError
        As `robustkern.distributed.aggregate`; and where one is no checkpoint, holds what torch does not write, has
        other tensors than most, or changes while it is read; the message names it. With ``bad="count"`` if more than
        may be bad cannot be used.

    Notes
    -----
    Reads of each file: those of `robustkern.aggregate`, of a rank's part: tensors are cut along their first axis, as
    FSDP cuts them. A stored piece of DCP is read whole where a rank needs some of it. Results are held until all is
    done; safetensors are written by all ranks into files that appear complete at the end, on a disk that all see.

    Examples
    --------
    >>> aggregate_checkpoints(["a", "b", "c"], "median", out="merged")  # doctest: +SKIP
    """
    ranks: Ranks = Group(group) if dist.is_available() and dist.is_initialized() else _Alone()

    def work(together: Together) -> Info:
        plan = as_aggregator(rule)
        check_bad_option(bad, plan)
        choice = Choice.of(only, exclude, None)
        target, given = _checked_target(out), _checked_paths(paths)
        if (as_int(memory) or 0) < 1:
            raise ValueError(
                f"aggregate_checkpoints: memory must be a number of bytes, at least 1; got {brief(memory)}"
            )
        with ExitStack() as files:
            found = _Found(together, [Path(path) for path in given], files, bad == "count")
            _require_same_paths(together, list(map(str, given)))
            found.require_alike()
            found.require_distinct()
            form = found.first.tensors
            choice.check(form)
            sizes = {name: shape for name, (shape, _) in form.items() if choice.takes(name)}
            found.require_readable(sizes)
            require_few(
                limits(plan, len(given), str, f, delta, weights), [found.wrong.get(k) for k in range(len(given))]
            )
            checkpoints = found.checkpoints
            used = [file for one in checkpoints for file in (one.path, *one.files)]
            files_of, folders = [x for x in used if not x.is_dir()], [x for x in used if x.is_dir()]
            written = shards.Written.of(target, {name: form[name] for name in sizes}, files_of, folders, shard_size)
            if written is None:
                check_place(target, folders)
                if os.path.lexists(target):
                    raise FileExistsError(f"{plain(str(target), 200)}: is there already (name a folder that is not)")
            source = _Checkpoints(checkpoints, list(sizes), ranks, memory)
            asked = Asked(plan, f, delta, weights, seed, nonfinite).told()
            asked |= {
                "bad": bad,
                "out": str(target),
                "shard_size": str(shard_size),
                "the number of tensors": str(len(sizes)),
            }
            info = run(plan, Part.of(together, source, asked), f, delta, weights, seed, nonfinite, backend)
            if written is None:
                together.settle()
                dcp.save_folder(source.done, sizes, target, ranks)
            else:
                begins = {name: _my_range(size, ranks)[0] for name, size in sizes.items()}
                written.write(source.done, begins, together)
        assert info is not None
        return replace(info, bad={str(given[k]): reason for k, reason in sorted(found.wrong.items())})

    found: Info = call(ranks, work)
    return found


def _checked_target(out: Any) -> Path:
    """Return where the result goes."""
    if not isinstance(out, (str, os.PathLike)):
        raise TypeError(f"aggregate_checkpoints: out is {type(out).__name__}; expected a path (pass str(out))")
    return Path(out)


def _checked_paths(paths: Any) -> list[str | os.PathLike[str]]:
    """Return the paths in their order, which weights and ties depend on."""
    if isinstance(paths, (str, bytes, os.PathLike, Set, Mapping)) or not isinstance(paths, Iterable):
        raise TypeError(
            f"aggregate_checkpoints: paths is {type(paths).__name__}; expected a list, one path a worker (pass "
            "[path, ...])"
        )
    found = list(paths)
    if not found:
        raise ValueError("aggregate_checkpoints: there are no checkpoints (pass at least one)")
    for k, path in enumerate(found):
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(
                f"aggregate_checkpoints: path {k} is {type(path).__name__}; expected a path (pass str(path))"
            )
    return found


def _require_same_paths(together: Together, names: list[str]) -> None:
    """Raise where the ranks list other checkpoints, or in another order: parts of different workers would be mixed."""
    digests = together.exchange("the paths", hashlib.sha256(json.dumps(names).encode()).hexdigest())
    if len(set(digests)) == 1:
        return
    told = together.exchange("all paths", names)
    rank = next(k for k, theirs in enumerate(digests) if theirs != digests[0])
    pairs = itertools.zip_longest(told[0], told[rank])
    number = next(k for k, (ours, theirs) in enumerate(pairs) if ours != theirs)
    ours, theirs = (shown(path[number], 200) if number < len(path) else "none" for path in (told[0], told[rank]))
    raise ValueError(
        f"aggregate_checkpoints: the ranks list different checkpoints, or in another order: path {number} is "
        f"{ours} on rank 0, and {theirs} on rank {rank} (pass the same list on all ranks, such as sorted(paths))"
    )


class _Alone:
    """The only rank."""

    rank, size = 0, 1

    def gather(self, payload: bytes) -> list[bytes]:
        """Return what it brings."""
        return [payload]

    def broadcast(self, payload: bytes) -> bytes:
        """Return what it says."""
        return payload

    def total(self, x: Any) -> Any:
        """Return the sum over one."""
        return x


# ---- what is read ----------------------------------------------------------------------------------------------------


def _opened(path: Path, files: ExitStack) -> Checkpoint:
    """Return the checkpoint at a path; raise ValueError where there is none."""
    return shards.Shards(path, files) if shards.is_one(path) else dcp.Folder(path, files)


class _Found:
    """Checkpoints at some paths, and which cannot be used; why.

    Parameters
    ----------
    together : Together
        The call.
    paths : list of Path
    files : ExitStack
        Closes their files.
    counts : bool
        Whether those that cannot be used are kept account of, instead of an error.

    Attributes
    ----------
    wrong : dict of int to str
        The same on all ranks.
    """

    def __init__(self, together: Together, paths: list[Path], files: ExitStack, counts: bool) -> None:
        self._together, self._counts, self.wrong = together, counts, dict[int, str]()
        self._paths, self._opened = paths, dict[int, Checkpoint]()
        for k, path in enumerate(paths):
            with self._kept(k):
                self._opened[k] = _opened(path, files)
        self._agree()

    @contextmanager
    def _kept(self, k: int) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError) as error:
            if not self._counts:
                raise
            self.wrong.setdefault(k, plain(str(error), 1000))

    def _agree(self) -> None:
        """Set aside on all ranks what one of them cannot use."""
        if self._counts:
            told = self._together.exchange("what cannot be used", self.wrong)
            self.wrong = {k: reason for theirs in reversed(told) for k, reason in theirs.items()}
        if len(self.wrong) == len(self._paths):
            raise ValueError(f"no checkpoint can be used; the first: {self.wrong[0]}")

    @property
    def _good(self) -> dict[int, Checkpoint]:
        return {k: one for k, one in self._opened.items() if k not in self.wrong}

    @property
    def first(self) -> Checkpoint:
        """The first that can be used."""
        return next(iter(self._good.values()))

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """All of them; those that cannot be used are NaN."""
        good = self._good
        return [good[k] if k in good else _Unusable(path, self.first) for k, path in enumerate(self._paths)]

    def require_alike(self) -> None:
        """Set aside who has other tensors than most."""
        good = list(self._good.items())
        tables = [{name: (size, str(dtype)) for name, (size, dtype) in one.tensors.items()} for _, one in good]
        for at, name, ours, theirs in odd_ones(tables):
            k, one = good[at]
            with self._kept(k):
                raise ValueError(
                    f"{plain(str(one.path), 200)}: tensor {shown(name)} is {ours}, where most checkpoints have "
                    f"{theirs} (leave this one out)"
                )

    def require_distinct(self) -> None:
        """Set aside who shares a file with another, through links too: nobody counts twice."""
        workers = [Worker(plain(str(one.path), 200), one.path, one.files) for one in self._good.values()]
        for k, worker in zip(list(self._good), distinct(workers), strict=True):
            with self._kept(k):
                if worker.wrong is not None:
                    raise ValueError(plain(worker.wrong, 1000))

    def require_readable(self, sizes: Mapping[str, tuple[int, ...]]) -> None:
        """Set aside who cannot be read, if that is asked for: safetensors are, as their headers say."""
        if not self._counts:
            return
        for k, one in self._good.items():
            with self._kept(k):
                for name, size in sizes.items() if isinstance(one, dcp.Folder) else ():
                    one.read(name, *_my_range(size, self._together.ranks))
        self._agree()


class _Unusable:
    """What stands for a checkpoint that cannot be used: NaN, and for integers what another one has."""

    files: tuple[Path, ...] = ()

    def __init__(self, path: Path, like: Checkpoint) -> None:
        self.path, self._like = path, like

    @property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Those of the other one."""
        return self._like.tensors

    def read(self, name: str, low: int, high: int) -> Tensor:
        """Return NaN in the shape of the other one's."""
        part = self._like.read(name, low, high)
        return part if computed(shards.numpy_dtype(part.dtype)) is None else torch.full_like(part, torch.nan)


# ---- rows ------------------------------------------------------------------------------------------------------------


def _my_range(size: Sequence[int], ranks: Ranks) -> tuple[int, int]:
    """Return which of a tensor's first axis is this rank's: as torch cuts it; a tensor without axes is rank 0's."""
    length = size[0] if len(size) else 1
    width = -(-length // ranks.size) if len(size) else 1
    return min(ranks.rank * width, length), min((ranks.rank + 1) * width, length)


class _Checkpoints(Undivided):
    """A source of n checkpoints: this rank's part of them, some tensors at a time."""

    def __init__(self, checkpoints: list[Checkpoint], names: list[str], ranks: Ranks, memory: int) -> None:
        self._checkpoints, self._ranks = checkpoints, ranks
        self.n, self.device, self.has_centre = len(checkpoints), "cpu", False
        self.plain: Sequence[PlainLeaf] = ()
        self.combine: Any = None
        self.d = 0
        self.dtypes: set[np.dtype[Any]] = set()
        self.done: dict[str, Tensor] = {}
        self._batches: list[list[str]] = [[]]
        held, forms = 0, checkpoints[0].tensors
        for name in names:
            size, dtype = forms[name]
            low, high = _my_range(size, ranks)
            count = (high - low) * math.prod(size[1:])
            form = computed(shards.numpy_dtype(dtype))
            if form is not None:
                self.d += count * form.factor
                self.dtypes.add(form.dtype)
            nbytes = count * dtype.itemsize * self.n
            if held and held + nbytes > memory:
                self._batches.append([])
                held = 0
            self._batches[-1].append(name)
            held += nbytes

    def row_name(self, row: int) -> str:
        """Return how an error should call a checkpoint."""
        return plain(self._checkpoints[row].path.name, 100)

    def blocks(self) -> Iterator[Block]:
        """Read the tensors, some at a time."""
        for names in self._batches:
            yield from adapt(self._rows(names))[0].blocks()

    def results(self) -> Iterator[Block]:
        """Read the tensors again, and keep what they are combined to."""
        for names in self._batches:
            source, result = adapt(self._rows(names))
            source.combine = self.combine
            yield from source.results()
            self.done |= source.finish() if source.finish is not None else result

    def _rows(self, names: list[str]) -> list[dict[str, Tensor]]:
        sizes = {name: size for name, (size, _) in self._checkpoints[0].tensors.items()}
        ranges = {name: _my_range(sizes[name], self._ranks) for name in names}
        return [{name: one.read(name, *ranges[name]) for name in names} for one in self._checkpoints]
