"""Safetensors checkpoints, whole or in shards: each rank reads its part of the tensors, and writes it to the result."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustkern.distributed.together import Together
from robustkern.errors import brief, shown
from robustkern.files.formats import SUFFIXES, FileError, kind_of
from robustkern.files.formats import Tensor as Form
from robustkern.files.output import Output, in_order
from robustkern.files.pieces import Row
from robustkern.files.workers import INDEX, worker_of
from robustkern.scalars import as_int

__all__ = ["Shards", "Written", "is_one", "numpy_dtype"]

KIND = ".safetensors"


def is_one(path: Path) -> bool:
    """Tell whether a path is a safetensors file, an index of some, or a folder with them."""
    if path.is_dir():
        return not (path / ".metadata").exists() and any(map(_is_named_so, path.iterdir()))
    return _is_named_so(path)


def _is_named_so(path: Path) -> bool:
    return kind_of(path) == KIND or path.name.endswith(INDEX)


def numpy_dtype(dtype: torch.dtype) -> np.dtype[np.generic]:
    """Return a dtype of torch as NumPy has it."""
    name = str(dtype).removeprefix("torch.")
    return np.dtype(getattr(ml_dtypes, name)) if hasattr(ml_dtypes, name) else np.dtype(name)


class Shards:
    """One checkpoint; see `robustkern.distributed.checkpoints.Checkpoint`.

    Parameters
    ----------
    path : Path
        Of a file, an index, or a folder.
    files : ExitStack
        Closes its files.

    Raises
    ------
    FileError
        If it is none.
    """

    def __init__(self, path: Path, files: ExitStack) -> None:
        self.path = path
        self._row = Row.of(worker_of(path), hold=True)
        files.callback(self._row.close)
        self._row.check()
        self.files: tuple[Path, ...] = tuple(reader.path for reader in self._row.readers)
        other = next((reader.path for reader in self._row.readers if kind_of(reader.path) != KIND), None)
        if other is not None:
            raise FileError(f"{other}: is no safetensors file, which are all that ranks read (convert it)")
        self.tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            name: (tensor.shape, getattr(torch, tensor.dtype.name))
            for name, (_, tensor) in sorted(self._row.tensors.items())
        }
        for name, (size, dtype) in self.tensors.items():
            try:
                torch.empty(size, dtype=dtype, device="meta")
            except RuntimeError as error:
                raise FileError(f"{path}: tensor {shown(name)} of shape {size} is none for torch ({error})") from None

    def read(self, name: str, low: int, high: int) -> Tensor:
        """Read some of a tensor."""
        reader, _ = self._row.tensors[name]
        size, dtype = self.tensors[name]
        shape = (high - low, *size[1:]) if size else () if high > low else (0,)
        part = torch.empty(shape, dtype=dtype, device="cpu")
        if part.numel():
            data = _bytes_of(part)
            reader.read_into(data, name, low * (part[0].nbytes if size else 0))
            if dtype == torch.bool:  # of which nobody says that they are 0 or 1
                np.not_equal(data, 0, out=data.view(np.bool_))
        reader.held.check()
        return part


class Written:
    """A result in safetensors files, which all ranks write to.

    Parameters
    ----------
    output : Output
        Where it goes.
    """

    def __init__(self, output: Output) -> None:
        self._output = output

    @classmethod
    def of(
        cls,
        target: Path,
        forms: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        files: Sequence[Path],
        folders: Sequence[Path],
        shard_size: int | None,
    ) -> Written | None:
        """Return the result under a name, None where it does not say safetensors; raise where it cannot be there."""
        if kind_of(target) != KIND:
            if kind_of(target) in SUFFIXES:
                raise ValueError(f"{target}: ranks write safetensors, or DCP folders (name it something{KIND})")
            if shard_size is not None:
                raise ValueError(f"shard_size is for safetensors (name out something{KIND})")
            return None
        if shard_size is not None and (as_int(shard_size) or 0) < 1:
            raise ValueError(f"shard_size must be None or a number of bytes, at least 1; got {brief(shard_size)}")
        tensors = {name: Form(size, numpy_dtype(dtype)) for name, (size, dtype) in forms.items()}
        ordered = {name: tensors[name] for name in in_order(tensors)}
        return cls(Output(target, ordered, {}, files, folders, shard_size))

    def write(self, done: Mapping[str, Tensor], begins: Mapping[str, int], together: Together) -> None:
        """Write each rank's part of the tensors, from these places of their first axes on."""
        with ExitStack() as stack:
            places = None
            if together.ranks.rank == 0:
                found = stack.enter_context(self._output.laid_out())
                places = {name: (str(path), at) for name, (path, at) in found.items()}
            places = together.exchange("where results go", places)[0]
            for name, part in done.items():
                if part.numel():
                    path, at = places[name]
                    _put(part, Path(path), at + (begins[name] * part[0].nbytes if part.ndim else 0))
            together.exchange("results are written", None)
        together.exchange("the result is there", None)  # or rank 0 says why it is not


def _put(x: Tensor, path: Path, at: int) -> None:
    """Write a tensor to a place in a file that is there."""
    data = memoryview(_bytes_of(x.contiguous()).data)
    try:
        with path.open("rb+", buffering=0) as file:
            while data:
                count = os.pwrite(file.fileno(), data, at)
                data, at = data[count:], at + count
            os.fsync(file.fileno())
    except OSError as error:
        raise FileError(f"{path.parent}: the result cannot be written ({error.strerror})") from None


def _bytes_of(x: Tensor) -> NDArray[np.uint8]:
    """Return the memory of a contiguous tensor that is not empty."""
    return np.asarray(x.reshape(-1).view(torch.uint8).numpy())
