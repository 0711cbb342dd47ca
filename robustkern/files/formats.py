"""Kinds of update files: what they hold, reading one tensor, writing one after the other.

Only data is ever loaded: safetensors, and npz and npy without pickles.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from robustkern.errors import RobustkernError

__all__ = [
    "SUFFIXES",
    "FileError",
    "Reader",
    "Tensor",
    "Writer",
    "complete_or_absent",
    "naming",
    "open_reader",
    "writer_for",
]

SUFFIXES = (".safetensors", ".npz", ".npy")

_SAFETENSORS_DTYPES: dict[str, np.dtype[Any]] = {
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "U8": np.dtype(np.uint8),
    "U16": np.dtype(np.uint16),
    "U32": np.dtype(np.uint32),
    "U64": np.dtype(np.uint64),
    "BOOL": np.dtype(np.bool_),
}


class FileError(RobustkernError, ValueError):
    """A file cannot be used; the message names it and says why."""


@dataclass(frozen=True)
class Tensor:
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


# ---- readers ---------------------------------------------------------------------------------------------------


class Reader(Protocol):
    """Reads one file.

    Attributes
    ----------
    path : Path
        Of the file.
    tensors : dict
        What it holds.
    metadata : dict
        Texts that it holds besides.
    """

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    def read(self, name: str) -> NDArray[Any]:
        """Return one tensor."""


class _SafetensorsReader:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors = {}
        with self._open() as file:
            self.metadata = dict(file.metadata() or {})
            for name in file.keys():  # noqa: SIM118  (no mapping)
                part = file.get_slice(name)
                code = part.get_dtype()
                if code not in _SAFETENSORS_DTYPES:
                    raise FileError(f"{path}: tensor {name!r} has the unsupported dtype {code}")
                self.tensors[name] = Tensor(tuple(part.get_shape()), _SAFETENSORS_DTYPES[code])

    def _open(self) -> Any:
        from safetensors import safe_open

        return safe_open(self.path, framework="numpy")

    def read(self, name: str) -> NDArray[Any]:
        with self._open() as file:  # opened anew, so that pages of the mapping do not pile up
            return np.asarray(file.get_tensor(name))


class _NpyReader:
    metadata: dict[str, str] = {}  # noqa: RUF012  (never changed)

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            tensor, offset = _npy_header(file)
        _check_length(tensor, offset, path.stat().st_size)
        self.tensors = {"array": tensor}

    def read(self, name: str) -> NDArray[Any]:
        return np.asarray(np.load(self.path, allow_pickle=False))


class _NpzReader:
    metadata: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors = {}
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                if not member.endswith(".npy"):
                    raise ValueError(f"its member {member!r} is no array")
                with archive.open(member) as file:
                    tensor, offset = _npy_header(file)
                _check_length(tensor, offset, archive.getinfo(member).file_size)
                self.tensors[member[: -len(".npy")]] = tensor

    def read(self, name: str) -> NDArray[Any]:
        with zipfile.ZipFile(self.path) as archive, archive.open(name + ".npy") as file:
            return np.asarray(np.lib.format.read_array(file, allow_pickle=False))


def _npy_header(file: IO[bytes]) -> tuple[Tensor, int]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are never loaded")
    if any(size < 0 for size in shape):
        raise ValueError(f"its shape {shape} is negative")
    return Tensor(shape, dtype), file.tell()


def _check_length(tensor: Tensor, offset: int, length: int) -> None:
    """Hold what a header promises against what is there."""
    expected = offset + tensor.size * tensor.dtype.itemsize
    if length < expected:
        raise ValueError(f"truncated: {length} bytes, expected {expected} for shape {tensor.shape}")


def open_reader(path: Path) -> Reader:
    """Look at what a file holds; raise a `FileError` where it cannot be read."""
    readers: dict[str, Callable[[Path], Reader]] = {
        ".safetensors": _SafetensorsReader,
        ".npz": _NpzReader,
        ".npy": _NpyReader,
    }
    if path.suffix not in readers:
        raise FileError(f"{path}: unknown kind of file; expected one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise FileError(f"{path}: no such file")
    with naming(path):
        return readers[path.suffix](path)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn whatever a reader raises on a bad file into an error that names the file."""
    try:
        yield
    except (FileError, MemoryError):
        raise
    except Exception as error:  # the libraries raise their own kinds for corrupt input
        raise FileError(f"{path}: corrupt, truncated or no {path.suffix[1:]} file ({error})") from error


# ---- writers ---------------------------------------------------------------------------------------------------


class Writer(Protocol):
    """Writes tensors one by one."""

    order: list[str]

    def write(self, name: str, values: NDArray[Any]) -> None:
        """Write one tensor; they come in `order`."""

    def close(self) -> None:
        """Write what comes last."""


class _SafetensorsWriter:
    """Writes tensors one by one behind a header that is known beforehand."""

    def __init__(self, file: IO[bytes], tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        codes = {dtype: code for code, dtype in _SAFETENSORS_DTYPES.items()}
        # Aligned for its readers: wider dtypes first.
        self.order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
        header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        offset = 0
        for name in self.order:
            tensor = tensors[name]
            end = offset + tensor.size * tensor.dtype.itemsize
            header[name] = {
                "dtype": codes[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file.write(struct.pack("<Q", len(text)) + text)
        self._file = file

    def write(self, name: str, values: NDArray[Any]) -> None:
        self._file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)

    def close(self) -> None:
        pass


class _NpzWriter:
    def __init__(self, file: IO[bytes], tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        self.order = list(tensors)
        self._archive = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True)

    def write(self, name: str, values: NDArray[Any]) -> None:
        with self._archive.open(name + ".npy", "w", force_zip64=True) as member:
            np.lib.format.write_array(member, values, allow_pickle=False)

    def close(self) -> None:
        self._archive.close()


class _NpyWriter:
    def __init__(self, file: IO[bytes], tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        self.order = list(tensors)
        self._file = file

    def write(self, name: str, values: NDArray[Any]) -> None:
        np.lib.format.write_array(self._file, values, allow_pickle=False)

    def close(self) -> None:
        pass


def writer_for(
    out: Path, tensors: dict[str, Tensor], inputs: list[Path]
) -> Callable[[IO[bytes], dict[str, Tensor], dict[str, str]], Writer]:
    """Return what writes a file of these tensors; raise where it cannot be written, or is one of the inputs."""
    if out.suffix not in SUFFIXES:
        raise FileError(f"{out}: unknown kind of output; expected one of {', '.join(SUFFIXES)}")
    if out.is_dir():
        raise FileError(f"{out}: is a directory (name a file)")
    if not out.parent.is_dir():
        raise FileError(f"{out}: the directory {out.parent} does not exist")
    if out.exists() and any(out.samefile(path) for path in inputs):
        raise FileError(f"{out}: is one of the updates, which are never overwritten")
    if out.suffix == ".npy" and len(tensors) != 1:
        raise FileError(f"{out}: an npy file holds one tensor, the updates have {len(tensors)} (use .npz)")
    if out.suffix != ".safetensors" and any(t.dtype == ml_dtypes.bfloat16 for t in tensors.values()):
        raise FileError(f"{out}: {out.suffix[1:]} files cannot hold bfloat16 (use .safetensors)")
    for name in tensors:
        if (out.suffix == ".safetensors" and name == "__metadata__") or (out.suffix == ".npz" and "\0" in name):
            raise FileError(f"{out}: {out.suffix[1:]} files cannot hold a tensor named {name!r}")
    writers: dict[str, Callable[[IO[bytes], dict[str, Tensor], dict[str, str]], Writer]] = {
        ".safetensors": _SafetensorsWriter,
        ".npz": _NpzWriter,
        ".npy": _NpyWriter,
    }
    return writers[out.suffix]


@contextlib.contextmanager
def complete_or_absent(target: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside the target that replaces it at the end, and is removed after an error."""
    handle, name = tempfile.mkstemp(prefix=".robustkern-", suffix=".part", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp's files are private, an ordinary output is not
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
