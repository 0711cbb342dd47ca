"""Checkpoint folders of torch.distributed.checkpoint (DCP).

A folder's index is a pickle, which could run code: it is read by a reader that knows the few classes of torch's that
belong there and nothing else; tensors are read as torch reads weights only.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from robustkern.distributed.group import Group
from robustkern.distributed.together import Ranks
from robustkern.errors import plain, shown
from robustkern.files.formats import MAX_AXES
from robustkern.files.pickles import check_pickle

__all__ = ["Folder", "save_folder"]

INDEX, MAX_INDEX = ".metadata", 1 << 28


class Folder:
    """One folder; see `robustkern.distributed.checkpoints.Checkpoint`.

    Parameters
    ----------
    path : Path
        Of the folder.
    files : ExitStack
        Closes its files.

    Raises
    ------
    ValueError
        If it is none.
    """

    def __init__(self, path: Path, files: ExitStack) -> None:
        self.path, self._files = path, files
        self.files: tuple[Path, ...] = (path / INDEX,)
        self._opened: dict[str, tuple[BinaryIO, tuple[int, ...]]] = {}
        name = plain(str(path), 200)
        try:
            with open(path / INDEX, "rb") as file:
                data = file.read(MAX_INDEX + 1)
        except OSError as error:
            raise ValueError(f"{name}: is no checkpoint of torch.distributed: {plain(str(error), 200)}") from None
        try:
            if len(data) > MAX_INDEX:
                raise ValueError(f"its index has more than {MAX_INDEX} bytes")
            check_pickle(data)
            found = _Safe(io.BytesIO(data)).load()
            self._tensors = {
                str(key): _checked(found.state_dict_metadata[key])
                for key in sorted(found.state_dict_metadata)
                if isinstance(found.state_dict_metadata[key], TensorStorageMetadata)
            }
            self._places = {}
            for index, info in found.storage_data.items():
                if index.offset is None:
                    continue
                place = info.relative_path
                if info.transform_descriptors or type(place) is not str or os.path.basename(place) != place:
                    raise ValueError(f"a piece lies in {shown(str(place))}")
                self._places[index.fqn, tuple(index.offset)] = (info.relative_path, int(info.offset), int(info.length))
        except Exception as error:  # a pickle can fail in any way
            raise ValueError(
                f"{name}: its index cannot be read: {plain(str(error), 200) or type(error).__name__}"
            ) from None
        if not self._tensors:
            raise ValueError(f"{name}: holds no tensors")

    @property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes, in the order of names."""
        return {name: (tuple(x.size), x.properties.dtype) for name, x in self._tensors.items()}

    def read(self, name: str, low: int, high: int) -> Tensor:
        """Read some of a tensor, from the pieces that reach into it."""
        tensor = self._tensors[name]
        first = (low, *[0] * (len(tensor.size) - 1)) if len(tensor.size) else ()
        shape = (high - low, *tensor.size[1:]) if len(tensor.size) else ()
        kind = tensor.properties.dtype
        part = torch.empty(shape if high > low or len(tensor.size) else (0,), dtype=kind, device="cpu")
        if part.numel() == 0:
            return part
        # Whatever lies in memory would come out where no piece is.
        overlapping = (
            f"{plain(str(self.path), 200)}: tensor {shown(name)}: its pieces overlap and leave numbers out (leave "
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
        seen = torch.zeros(shape, dtype=torch.bool, device="cpu") if len(boxes) > 1 else None
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
            piece = self._piece(name, tuple(chunk.offsets), tuple(chunk.sizes), tensor.properties.dtype)
            part[there] = piece[tuple(slice(a - o, b - o) for a, b, o in zip(begin, end, chunk.offsets, strict=True))]
        return part

    def _piece(self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Read a stored piece."""
        where = f"{plain(str(self.path), 200)}: tensor {shown(name)}"
        if (name, offsets) not in self._places:
            raise ValueError(f"{where}: its piece at {offsets} is nowhere")
        file_name, begin, length = self._places[name, offsets]
        limit = math.prod(sizes) * dtype.itemsize + (1 << 20)  # torch adds some 1.5 KB
        if not (begin >= 0 and 0 <= length <= limit):
            raise ValueError(
                f"{where}: its piece at {offsets} says it takes {length} bytes, where {limit} are too many"
            )
        try:
            file, before = self._open(file_name)
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

    def _open(self, name: str) -> tuple[BinaryIO, tuple[int, ...]]:
        """Return a file, and what it was when it was first opened; it stays open, so that no other takes its place."""
        if name not in self._opened:
            descriptor = os.open(self.path / name, os.O_RDONLY | os.O_NONBLOCK)  # which waits for no FIFO
            file = self._files.enter_context(os.fdopen(descriptor, "rb"))
            self._opened[name] = (file, _identity(file))
        return self._opened[name]


def _identity(file: BinaryIO) -> tuple[int, ...]:
    stat = os.fstat(file.fileno())
    return stat.st_size, stat.st_mtime_ns


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


def _checked(tensor: TensorStorageMetadata) -> TensorStorageMetadata:
    """Return a tensor's description if it is one: pieces inside of it, of as many numbers as it has.

    That they do not overlap is seen where they are read.
    """
    size = tuple(tensor.size)
    if len(size) > MAX_AXES or not all(type(number) is int and number < 1 << 63 for number in size):
        raise ValueError(f"a tensor of {len(size)} axes, or of sizes that are no whole numbers")
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


def save_folder(done: Mapping[str, Tensor], sizes: Mapping[str, tuple[int, ...]], target: Path, ranks: Ranks) -> None:
    """Write a checkpoint: all ranks, each its part of tensors of these sizes along their first axis."""
    if ranks.size == 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that there is one process
            save(dict(done), checkpoint_id=target, no_dist=True)
        return
    assert isinstance(ranks, Group)
    members = dist.get_process_group_ranks(ranks.group or dist.group.WORLD)
    mesh = DeviceMesh("cpu", members, _init_backend=False)
    state: dict[str, Any] = {}
    for name, part in done.items():
        size = torch.Size(sizes[name])
        if len(size):
            stride = torch.empty(size, device="meta").stride()
            state[name] = DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=size, stride=stride)
        elif ranks.rank == 0:
            state[name] = part
    with torch.device("cpu"):  # where torch makes what it needs meanwhile
        save(state, checkpoint_id=target, process_group=ranks.group)
