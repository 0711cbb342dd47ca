"""Sharded checkpoints: n of them in, one out, by any number of ranks, of which each reads only the part it combines."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import ArrayLike
from torch import Tensor

from robustkern.contract.rows import Block, PlainLeaf, Undivided
from robustkern.distributed import dcp, shards
from robustkern.distributed.ranks import Asked, Group, call
from robustkern.distributed.together import Part, Ranks, Together, odd_ones
from robustkern.engine import Info, run
from robustkern.errors import plain, shown
from robustkern.files.output import check_place
from robustkern.functions import NonFinite, Patterns
from robustkern.inputs.leaves import Choice, computed
from robustkern.inputs.trees import adapt
from robustkern.rules.base import Aggregator, as_aggregator

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
    group: Any = None,
) -> Info:
    """Combine n checkpoints into one, on all ranks.

    Parameters
    ----------
    paths : sequence of path
        One a worker: a folder of torch.distributed.checkpoint (DCP), whatever number of ranks wrote it, or a
        safetensors file, or a folder with safetensors shards and their index, or the index.
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
        other tensors than most, or changes while it is read; the message names it.

    Notes
    -----
    Reads of each file: those of `robustkern.aggregate`, of a rank's part: tensors are cut along their first axis, as
    FSDP cuts them. A stored piece of DCP is read whole where a rank needs some of it. Results are held until all is
    done; safetensors are written by all ranks into files that appear complete at the end, on a disk that all see.

    Examples
    --------
    >>> aggregate_checkpoints(["a", "b", "c"], "median", out="merged")  # doctest: +SKIP
    """
    target = Path(out)
    ranks: Ranks = Group(group) if dist.is_available() and dist.is_initialized() else _Alone()

    def work(together: Together) -> Info:
        plan = as_aggregator(rule)
        with ExitStack() as files:
            checkpoints = [_opened(Path(path), files) for path in paths]
            if not checkpoints:
                raise ValueError("aggregate_checkpoints: there are no checkpoints (pass at least one)")
            _require_alike(checkpoints)
            _require_distinct(checkpoints)
            form = checkpoints[0].tensors
            choice = Choice.of(only, exclude, None)
            choice.check(form)
            sizes = {name: shape for name, (shape, _) in form.items() if choice.takes(name)}
            used = [file for one in checkpoints for file in (one.path, *one.files)]
            files_of, folders = [x for x in used if not x.is_dir()], [x for x in used if x.is_dir()]
            written = shards.Written.of(target, {name: form[name] for name in sizes}, files_of, folders, shard_size)
            if written is None:
                check_place(target, folders)
                if os.path.lexists(target):
                    raise FileExistsError(f"{plain(str(target), 200)}: is there already (name a folder that is not)")
            source = _Checkpoints(checkpoints, list(sizes), ranks, memory)
            asked = Asked(plan, f, delta, weights, seed, nonfinite).told()
            asked |= {"out": str(target), "shard_size": str(shard_size), "the number of tensors": str(len(sizes))}
            info = run(plan, Part.of(together, source, asked), f, delta, weights, seed, nonfinite, backend)
            if written is None:
                together.settle()
                dcp.save_folder(source.done, sizes, target, ranks)
            else:
                begins = {name: _my_range(size, ranks)[0] for name, size in sizes.items()}
                written.write(source.done, begins, together)
        assert info is not None
        return info

    found: Info = call(ranks, work)
    return found


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


def _require_distinct(checkpoints: Sequence[Checkpoint]) -> None:
    """Raise where two have a file in common, through links too: nobody counts twice."""
    seen: dict[tuple[int, int], Checkpoint] = {}
    for one in checkpoints:
        for file in one.files:
            stat = file.stat()
            other = seen.setdefault((stat.st_dev, stat.st_ino), one)
            if other is not one:
                raise ValueError(
                    f"{plain(str(one.path), 200)}: has the same file as {plain(str(other.path), 200)}, and no worker "
                    "counts twice (leave one of them out)"
                )


def _require_alike(checkpoints: Sequence[Checkpoint]) -> None:
    """Raise where one has other tensors than most."""
    tables = [{name: (size, str(dtype)) for name, (size, dtype) in one.tensors.items()} for one in checkpoints]
    odd = next(odd_ones(tables), None)
    if odd is not None:
        k, name, ours, theirs = odd
        raise ValueError(
            f"{plain(str(checkpoints[k].path), 200)}: tensor {shown(name)} is {ours}, where most checkpoints have "
            f"{theirs} (leave this one out)"
        )


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
