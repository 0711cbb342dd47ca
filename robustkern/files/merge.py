"""Aggregation of update files tensor by tensor: memory is bounded by the largest tensor times the number of files.

By the column-block law a file read piece by piece is the same thing as leaves of a pytree, so every rule works. Only
data is ever loaded: safetensors, and npz and npy without pickles. The output appears complete or not at all.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

from robustkern.backends.registry import choose
from robustkern.contract.rows import DTYPES, Rows
from robustkern.errors import RobustkernError
from robustkern.functions import Info, Task, check_f, check_weights
from robustkern.inputs.memory import Block, lower_median
from robustkern.rules import Aggregator, parse_rule
from robustkern.rules.base import as_aggregator

__all__ = ["FileError", "aggregate_files", "expand"]

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


class _Reader(Protocol):
    path: Path
    tensors: dict[str, Tensor]

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


def _open_reader(path: Path) -> _Reader:
    readers: dict[str, Callable[[Path], _Reader]] = {
        ".safetensors": _SafetensorsReader,
        ".npz": _NpzReader,
        ".npy": _NpyReader,
    }
    if path.suffix not in readers:
        raise FileError(f"{path}: unknown kind of file; expected one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise FileError(f"{path}: no such file")
    with _naming(path):
        return readers[path.suffix](path)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn whatever a reader raises on a bad file into an error that names the file."""
    try:
        yield
    except (FileError, MemoryError):
        raise
    except Exception as error:  # the libraries raise their own kinds for corrupt input
        raise FileError(f"{path}: corrupt, truncated or no {path.suffix[1:]} file ({error})") from error


def expand(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Replace directories by the update files in them, in the order of their names.

    Raises
    ------
    FileError
        If a directory holds none.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and not p.name.startswith("."))
            if not found:
                raise FileError(f"{path}: the directory holds no {', '.join(SUFFIXES)} file")
            files += found
        else:
            files.append(path)
    return files


# ---- the rows --------------------------------------------------------------------------------------------------


class FileSource:
    """Rows that are read tensor by tensor into one reused buffer."""

    device = "cpu"

    def __init__(self, paths: Sequence[Path], on_tensor: Callable[[int], None] | None = None) -> None:
        self.readers = [_open_reader(path) for path in paths]
        self.n = len(paths)
        self.tensors = self.readers[0].tensors
        self._check()
        self.floats = {name: t for name, t in self.tensors.items() if t.dtype in DTYPES}
        self.counters = {name: t for name, t in self.tensors.items() if t.dtype not in DTYPES}
        self.dtypes = {t.dtype for t in self.floats.values()}
        self.d = sum(t.size for t in self.floats.values())
        self.nbytes = self.n * sum(t.size * t.dtype.itemsize for t in self.floats.values())
        largest = max((t.size * t.dtype.itemsize for t in self.tensors.values()), default=0)
        self._rows = np.empty((self.n, -(-largest // 64) * 64), dtype=np.uint8)
        self._out = np.empty(self._rows.shape[1], dtype=np.uint8)
        self._on_tensor = on_tensor

    def _check(self) -> None:
        first = self.readers[0]
        if not first.tensors:
            raise FileError(f"{first.path}: holds no tensors")
        for name, tensor in first.tensors.items():
            if tensor.dtype not in DTYPES and (tensor.dtype.kind not in "iub" or not tensor.dtype.isnative):
                raise FileError(
                    f"{first.path}: tensor {name!r} has dtype {tensor.dtype}; expected float16, bfloat16, float32, "
                    "float64 or native integers"
                )
        for other in self.readers[1:]:
            missing = sorted(first.tensors.keys() - other.tensors.keys())
            extra = sorted(other.tensors.keys() - first.tensors.keys())
            if missing or extra:
                parts = [f"lacks {', '.join(map(repr, missing[:5]))}"] if missing else []
                parts += [f"adds {', '.join(map(repr, extra[:5]))}"] if extra else []
                raise FileError(f"{other.path}: its tensors differ from {first.path}: {', '.join(parts)}")
            for name, tensor in first.tensors.items():
                if other.tensors[name] != tensor:
                    theirs = other.tensors[name]
                    raise FileError(
                        f"{other.path}: tensor {name!r} has shape {theirs.shape} and dtype {theirs.dtype}; "
                        f"{first.path} has shape {tensor.shape} and dtype {tensor.dtype}"
                    )

    def row_name(self, row: int) -> str:
        """Return the file's name."""
        return str(self.readers[row].path)

    def blocks(self) -> Iterator[Block]:
        """Yield one tensor of all files after the other."""
        for name in self.floats:
            yield self.block(name)

    def block(self, name: str) -> Block:
        """Read one tensor of all files."""
        tensor = self.tensors[name]
        rows = self.load(name)
        out = self._out[: tensor.size * tensor.dtype.itemsize].view(tensor.dtype)
        if self._on_tensor:
            self._on_tensor(rows.nbytes)
        return Block((Rows.of(rows),), (Rows.of(out[None]),))

    def load(self, name: str) -> NDArray[Any]:
        """Return one tensor of all files as (n, size) in the reused buffer."""
        tensor = self.tensors[name]
        rows = self._rows[:, : tensor.size * tensor.dtype.itemsize].view(tensor.dtype)
        for i, reader in enumerate(self.readers):
            with _naming(reader.path):
                values = reader.read(name)
                if values.shape != tensor.shape or values.dtype != tensor.dtype:
                    raise ValueError(f"tensor {name!r} changed while it was being read")
                rows[i] = values.reshape(-1)
        return rows

    def result(self, name: str) -> NDArray[Any]:
        """Return the result of the block that was emitted last."""
        tensor = self.tensors[name]
        return self._out[: tensor.size * tensor.dtype.itemsize].view(tensor.dtype).reshape(tensor.shape)


# ---- writers ---------------------------------------------------------------------------------------------------


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


def _check_out(out: Path, source: FileSource) -> type[_SafetensorsWriter] | type[_NpzWriter] | type[_NpyWriter]:
    if out.suffix not in SUFFIXES:
        raise FileError(f"{out}: unknown kind of output; expected one of {', '.join(SUFFIXES)}")
    if out.is_dir():
        raise FileError(f"{out}: is a directory (name a file)")
    if not out.parent.is_dir():
        raise FileError(f"{out}: the directory {out.parent} does not exist")
    if out.exists() and any(out.samefile(reader.path) for reader in source.readers):
        raise FileError(f"{out}: is one of the updates, which are never overwritten")
    if out.suffix == ".npy" and len(source.tensors) != 1:
        raise FileError(f"{out}: an npy file holds one tensor, the updates have {len(source.tensors)} (use .npz)")
    if out.suffix != ".safetensors" and any(t.dtype == ml_dtypes.bfloat16 for t in source.tensors.values()):
        raise FileError(f"{out}: {out.suffix[1:]} files cannot hold bfloat16 (use .safetensors)")
    for name in source.tensors:
        if (out.suffix == ".safetensors" and name == "__metadata__") or (out.suffix == ".npz" and "\0" in name):
            raise FileError(f"{out}: {out.suffix[1:]} files cannot hold a tensor named {name!r}")
    return {".safetensors": _SafetensorsWriter, ".npz": _NpzWriter, ".npy": _NpyWriter}[out.suffix]  # type: ignore[return-value]


def aggregate_files(
    paths: Sequence[str | os.PathLike[str]],
    rule: Aggregator | str,
    /,
    *,
    out: str | os.PathLike[str],
    f: int | None = None,
    delta: float | None = None,
    weights: ArrayLike | None = None,
    backend: str = "auto",
    progress: Callable[[str, int, int], None] | None = None,
) -> Info:
    """Aggregate update files into one file.

    Parameters
    ----------
    paths : sequence of paths
        One update each: safetensors, npz or npy with the same tensors; a directory stands for the files in it.
    rule, f, delta, weights, backend
        As for `robustkern.aggregate`.
    out : path
        Written under a temporary name beside it and renamed when complete; the suffix decides the kind.
    progress : callable, optional
        Called with what is being done, bytes read so far, and bytes of one read of all files.

    Returns
    -------
    Info

    Raises
    ------
    FileError
        If a file is corrupt, truncated or does not match the others, naming it. Nothing is written then.
    TypeError, ValueError, NonFiniteError, BackendUnavailable
        As `robustkern.aggregate`; rows are called by their files.

    Notes
    -----
    Memory: the largest tensor times n + 2. Integer and boolean tensors come back as column-wise lower median.
    """
    plan = parse_rule(rule) if isinstance(rule, str) else as_aggregator(rule)
    files = expand(paths)
    if not files:
        raise FileError("no update files were given")
    phase, done = "measuring", 0

    def on_tensor(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(phase, done, source.nbytes)

    source = FileSource(files, on_tensor)
    target = Path(out)
    make_writer = _check_out(target, source)
    count = check_f(plan, source.n, f, delta)
    task = Task(plan, source, choose(backend, source.dtypes), count, check_weights(plan, source.n, weights))
    task.solve()
    phase, done = "writing", 0
    metadata = getattr(source.readers[0], "metadata", {})
    with _complete_or_absent(target) as file:
        with contextlib.closing(make_writer(file, source.tensors, metadata)) as writer:
            for name in writer.order:
                if name in source.counters:
                    values = lower_median(source.load(name)).reshape(source.tensors[name].shape)
                else:
                    task.emit(source.block(name), distances=True)
                    values = source.result(name)
                writer.write(name, values)
        if task.poisoned:
            task.raise_nonfinite()
    return task.info()


@contextlib.contextmanager
def _complete_or_absent(target: Path) -> Iterator[IO[bytes]]:
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
