"""Sharded checkpoints of torch.distributed.checkpoint: n folders in, one out, by any number of ranks.

A folder's index is a pickle, which could run code: it is read by a reader that knows the few classes of torch's that
belong there and nothing else; tensors are read as torch reads weights only. Each rank reads of every checkpoint only
the part that it combines.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import ArrayLike
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from robustkern.contract.rows import Block, PlainLeaf, Undivided
from robustkern.distributed.ranks import Asked, Group, call
from robustkern.distributed.together import Part, Ranks, Together, odd_one
from robustkern.engine import Info, run
from robustkern.errors import plain, shown
from robustkern.functions import NonFinite, Patterns
from robustkern.inputs.leaves import Choice, computed
from robustkern.inputs.trees import adapt
from robustkern.rules.base import Aggregator, as_aggregator

__all__ = ["aggregate_checkpoints"]

INDEX, MAX_INDEX = ".metadata", 1 << 28


def aggregate_checkpoints(
    folders: Sequence[str | os.PathLike[str]],
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
    backend: str = "auto",
    group: Any = None,
) -> Info:
    """Combine n checkpoints of torch.distributed.checkpoint (DCP) into one.

    Parameters
    ----------
    folders : sequence of path
        One a worker, whatever number of ranks wrote it.
    rule, f, delta, weights, seed, nonfinite, backend
        As for `robustkern.aggregate`, the same on all ranks.
    out : path
        A folder that is not there yet; the same on all ranks.
    only, exclude : str or sequence of str, optional
        Patterns of tensor names; the result lacks what is left out. Entries that are no tensors (step counters as
        numbers, names) are left out too: they are pickles.
    memory : int
        Most bytes of tensors that a rank reads at a time, over all checkpoints, but for at least one tensor's part.
    group : ProcessGroup, optional
        By default all ranks; without any process group this process does everything.

    Returns
    -------
    Info
        The same on all ranks.

    Raises
    ------
    FileExistsError
        If `out` is there.
    TypeError, ValueError, NonFiniteError, RuntimeError
        As `robustkern.distributed.aggregate`; and where a folder is no checkpoint, holds what torch does not write, has
        other tensors than most, or changes while it is read; the message names it.

    Notes
    -----
    Reads of each file: those of `robustkern.aggregate`, of a rank's part: tensors are cut along their first axis, as
    FSDP cuts them. A stored piece is read whole where a rank needs some of it. Results are held until all is done.

    Examples
    --------
    >>> aggregate_checkpoints(["a", "b", "c"], "median", out="merged")  # doctest: +SKIP
    """
    target = Path(out)
    ranks: Ranks = Group(group) if dist.is_available() and dist.is_initialized() else _Alone()

    def work(together: Together) -> Info:
        plan = as_aggregator(rule)
        if os.path.lexists(target):
            raise FileExistsError(f"{plain(str(target), 200)}: is there already (name a folder that is not)")
        choice = Choice.of(only, exclude, None)
        indexes = [_Index.read(Path(folder)) for folder in folders]
        if not indexes:
            raise ValueError("aggregate_checkpoints: there are no folders (pass at least one)")
        _require_alike(indexes)
        choice.check(indexes[0].tensors)
        names = [name for name in indexes[0].tensors if choice.takes(name)]
        with ExitStack() as files:
            source = _Checkpoints(indexes, names, ranks, memory, files)
            asked = Asked(plan, f, delta, weights, seed, nonfinite).told()
            asked |= {"out": str(target), "the number of tensors": str(len(names))}
            info = run(plan, Part.of(together, source, asked), f, delta, weights, seed, nonfinite, backend)
        together.settle()
        _save(source, indexes[0], target, ranks)
        assert info is not None
        return info

    found: Info = call(ranks, work)
    return found


class _Alone:
    """The only rank."""

    rank, size = 0, 1

    def exchange(self, payload: bytes) -> list[bytes]:
        """Return what it brings."""
        return [payload]

    def total(self, x: Any) -> Any:
        """Return the sum over one."""
        return x


# ---- what a folder holds -------------------------------------------------------------------------------------------


class _Safe(pickle.Unpickler):
    """Reads what torch writes in an index, and refuses all else."""

    KNOWN: ClassVar[dict[str, set[str]]] = {
        "torch.distributed.checkpoint.metadata": {
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size", *(name for name in vars(torch) if isinstance(getattr(torch, name), torch.dtype))},
        "pathlib": {"Path", "PosixPath", "PurePath", "PurePosixPath"},
        "pathlib._local": {"Path", "PosixPath", "PurePath", "PurePosixPath"},
        "collections": {"OrderedDict"},
    }

    def find_class(self, module: str, name: str) -> Any:
        """Return a class that may be there."""
        if name not in self.KNOWN.get(module, ()):
            raise pickle.UnpicklingError(
                f"it names {plain(module, 100)}.{plain(name, 100)}, which torch does not write"
            )
        return super().find_class(module, name)


@dataclass
class _Index:
    """What one folder holds.

    Attributes
    ----------
    folder : Path
    tensors : dict of str to TensorStorageMetadata
        In the order of names.
    places : dict
        Of each stored piece, by name and offset: file, first byte, length.
    """

    folder: Path
    tensors: dict[str, TensorStorageMetadata]
    places: dict[tuple[str, tuple[int, ...]], tuple[str, int, int]]

    @classmethod
    def read(cls, folder: Path) -> _Index:
        """Read a folder's index; raise ValueError where it is none."""
        name = plain(str(folder), 200)
        try:
            with open(folder / INDEX, "rb") as file:
                data = file.read(MAX_INDEX + 1)
        except OSError as error:
            raise ValueError(f"{name}: is no checkpoint of torch.distributed: {plain(str(error), 200)}") from None
        try:
            if len(data) > MAX_INDEX:
                raise ValueError(f"its index has more than {MAX_INDEX} bytes")
            found = _Safe(io.BytesIO(data)).load()
            tensors = {
                str(key): _checked(found.state_dict_metadata[key])
                for key in sorted(found.state_dict_metadata)
                if isinstance(found.state_dict_metadata[key], TensorStorageMetadata)
            }
            places = {}
            for index, info in found.storage_data.items():
                if index.offset is None:
                    continue
                if info.transform_descriptors or os.path.basename(info.relative_path) != info.relative_path:
                    raise ValueError(f"a piece lies in {shown(str(info.relative_path))}")
                places[index.fqn, tuple(index.offset)] = (info.relative_path, int(info.offset), int(info.length))
        except Exception as error:  # a pickle can fail in any way
            raise ValueError(
                f"{name}: its index cannot be read: {plain(str(error), 200) or type(error).__name__}"
            ) from None
        if not tensors:
            raise ValueError(f"{name}: holds no tensors")
        return cls(folder, tensors, places)


def _checked(tensor: TensorStorageMetadata) -> TensorStorageMetadata:
    """Return a tensor's description if it is one: pieces inside of it, of as many numbers as it has.

    That they do not overlap is seen where they are read.
    """
    size = tuple(tensor.size)
    covered = 0
    if not all(type(number) is int for chunk in tensor.chunks for number in (*size, *chunk.offsets, *chunk.sizes)):
        raise ValueError("sizes of a tensor are no whole numbers")
    for chunk in tensor.chunks:
        inside = len(chunk.offsets) == len(chunk.sizes) == len(size) and all(
            a >= 0 and b >= 0 and a + b <= c for a, b, c in zip(chunk.offsets, chunk.sizes, size, strict=True)
        )
        if not inside:
            raise ValueError(
                f"a piece of {tuple(chunk.sizes)} at {tuple(chunk.offsets)} lies outside of a tensor of {size}"
            )
        covered += math.prod(chunk.sizes)
    if covered != math.prod(size) or not isinstance(tensor.properties.dtype, torch.dtype):
        raise ValueError(f"the pieces of a tensor of {size} hold {covered} of its numbers")
    return tensor


def _require_alike(indexes: list[_Index]) -> None:
    """Raise where a folder has other tensors than most."""
    odd = odd_one(
        [{name: (tuple(x.size), str(x.properties.dtype)) for name, x in index.tensors.items()} for index in indexes]
    )
    if odd is not None:
        k, name, ours, theirs = odd
        raise ValueError(
            f"{plain(str(indexes[k].folder), 200)}: tensor {shown(name)} is {ours}, where most checkpoints have "
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

    def __init__(self, indexes: list[_Index], names: list[str], ranks: Ranks, memory: int, files: ExitStack) -> None:
        self._indexes, self._ranks, self._files = indexes, ranks, files
        self.n, self.device, self.has_centre = len(indexes), "cpu", False
        self.plain: Sequence[PlainLeaf] = ()
        self.combine: Any = None
        self.d = 0
        self.dtypes: set[np.dtype[Any]] = set()
        self.done: dict[str, Tensor] = {}
        self._opened: dict[Path, tuple[BinaryIO, tuple[int, ...]]] = {}
        self._batches: list[list[str]] = [[]]
        held = 0
        for name in names:
            tensor = indexes[0].tensors[name]
            low, high = _my_range(tensor.size, ranks)
            count = (high - low) * math.prod(tensor.size[1:])
            form = computed(_numpy_dtype(tensor.properties.dtype))
            if form is not None:
                self.d += count * form.factor
                self.dtypes.add(form.dtype)
            nbytes = count * tensor.properties.dtype.itemsize * self.n
            if held and held + nbytes > memory:
                self._batches.append([])
                held = 0
            self._batches[-1].append(name)
            held += nbytes

    def row_name(self, row: int) -> str:
        """Return how an error should call a checkpoint."""
        return plain(self._indexes[row].folder.name, 100)

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
        return [{name: self._read(index, name) for name in names} for index in self._indexes]

    def _read(self, index: _Index, name: str) -> Tensor:
        """Read this rank's part of a tensor, from the pieces that reach into it."""
        tensor = index.tensors[name]
        low, high = _my_range(tensor.size, self._ranks)
        first = (low, *[0] * (len(tensor.size) - 1)) if len(tensor.size) else ()
        shape = (high - low, *tensor.size[1:]) if len(tensor.size) else ()
        part = torch.empty(shape if high > low or len(tensor.size) else (0,), dtype=tensor.properties.dtype)
        if part.numel() == 0:
            return part
        # Whatever lies in memory would come out where no piece is.
        overlapping = (
            f"{plain(str(index.folder), 200)}: tensor {shown(name)}: its pieces overlap and leave numbers out (leave "
            "this checkpoint out)"
        )
        boxes = []
        for chunk in tensor.chunks:
            begin = [max(a, b) for a, b in zip(chunk.offsets, first, strict=True)]
            end = [
                min(a + size, b + length)
                for a, size, b, length in zip(chunk.offsets, chunk.sizes, first, shape, strict=True)
            ]
            if all(a < b for a, b in zip(begin, end, strict=True)):
                boxes.append((chunk, begin, end))
        theres = [
            tuple(slice(a - o, b - o) for a, b, o in zip(begin, end, first, strict=True)) for _, begin, end in boxes
        ]
        seen = torch.zeros(shape, dtype=torch.bool) if len(boxes) > 1 else None
        filled = 0
        for there in theres:
            if seen is not None:
                if seen[there].any():
                    raise ValueError(overlapping)
                seen[there] = True
            filled += part[there].numel()
        if filled != part.numel():
            raise ValueError(overlapping)
        for (chunk, begin, end), there in zip(boxes, theres, strict=True):
            piece = self._piece(index, name, tuple(chunk.offsets), tuple(chunk.sizes), tensor.properties.dtype)
            part[there] = piece[tuple(slice(a - o, b - o) for a, b, o in zip(begin, end, chunk.offsets, strict=True))]
        return part

    def _piece(
        self, index: _Index, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        """Read a stored piece."""
        where = f"{plain(str(index.folder), 200)}: tensor {shown(name)}"
        if (name, offsets) not in index.places:
            raise ValueError(f"{where}: its piece at {offsets} is nowhere")
        file_name, begin, length = index.places[name, offsets]
        limit = math.prod(sizes) * dtype.itemsize + (1 << 20)  # torch adds some 1.5 KB
        if not (begin >= 0 and 0 <= length <= limit):
            raise ValueError(
                f"{where}: its piece at {offsets} says it takes {length} bytes, where {limit} are too many"
            )
        try:
            file, before = self._open(index.folder / file_name)
            file.seek(begin)
            found = torch.load(io.BytesIO(file.read(length)), map_location="cpu", weights_only=True)
            now = _identity(file)
        except Exception as error:  # torch fails in many ways
            raise ValueError(f"{where}: cannot be read: {plain(str(error), 200) or type(error).__name__}") from None
        if now != before:
            raise ValueError(f"{where}: {shown(file_name)} has changed while it was read (leave it alone meanwhile)")
        if not isinstance(found, Tensor) or tuple(found.shape) != sizes or found.dtype != dtype or found.is_sparse:
            raise ValueError(
                f"{where}: its piece at {offsets} is not the tensor of {sizes} of {dtype} that the index says"
            )
        return found

    def _open(self, path: Path) -> tuple[BinaryIO, tuple[int, ...]]:
        """Return a file, and what it was when it was first opened; it stays open, so that no other takes its place."""
        if path not in self._opened:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # which waits for no FIFO
            file = self._files.enter_context(os.fdopen(descriptor, "rb"))
            self._opened[path] = (file, _identity(file))
        return self._opened[path]


def _identity(file: BinaryIO) -> tuple[int, ...]:
    stat = os.fstat(file.fileno())
    return stat.st_size, stat.st_mtime_ns


def _numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    import ml_dtypes

    name = str(dtype).removeprefix("torch.")
    return np.dtype(getattr(ml_dtypes, name)) if hasattr(ml_dtypes, name) else np.dtype(name)


def _save(source: _Checkpoints, like: _Index, target: Path, ranks: Ranks) -> None:
    """Write the result: by all ranks, each its part."""
    if ranks.size == 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that there is one process
            save(source.done, checkpoint_id=target, no_dist=True)
        return
    assert isinstance(ranks, Group)
    members = dist.get_process_group_ranks(ranks.group or dist.group.WORLD)
    mesh = DeviceMesh("cpu", members, _init_backend=False)
    state: dict[str, Any] = {}
    for name, part in source.done.items():
        size = like.tensors[name].size
        if len(size):
            stride = torch.empty(size, device="meta").stride()
            state[name] = DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=size, stride=stride)
        elif ranks.rank == 0:
            state[name] = part
    save(state, checkpoint_id=target, process_group=ranks.group)
