"""Writing the result: tensor by tensor, complete or not at all, and looked at before it replaces anything."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from robustkern.errors import shown
from robustkern.files.formats import (
    CODES,
    MARK,
    WRITTEN,
    FileError,
    Held,
    Tensor,
    found_in,
    is_marked,
    is_same,
    kind_of,
    mark_of,
    open_reader,
    read_json,
    sum_of,
)

try:
    import fcntl as locks
except ImportError:  # no Unix
    locks = None  # type: ignore[assignment]
LOCKS: Any = locks

__all__ = ["Output", "Target", "Writer", "check_target", "in_order"]

PART = ".part"
#: Bytes that are sent to the disk together.
SENT = 1 << 23
_CODES = {dtype: code for code, dtype in CODES.items()}


def in_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return names in the order of a file: wider dtypes first, so that readers find every value aligned."""
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


class Writer(Protocol):
    """Writes tensors one by one."""

    def start(self, name: str, tensor: Tensor) -> None:
        """Go on to the next tensor."""

    def put(self, data: NDArray[np.uint8]) -> None:
        """Write its next bytes."""


class Closing(Writer, Protocol):
    """A writer of one file."""

    def close(self) -> None:
        """Write what comes last."""


class _SafetensorsWriter:
    """Writes behind a header that is known beforehand."""

    def __init__(self, file: IO[bytes], tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
        header: dict[str, Any] = {"__metadata__": {**metadata, MARK: mark_of(0).decode()}}
        offset, self._sum = 0, 0
        for name, tensor in tensors.items():
            end = offset + tensor.nbytes
            header[name] = {
                "dtype": _CODES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file.write(struct.pack("<Q", len(text)) + text)
        self._file, self._header = file, text

    def start(self, name: str, tensor: Tensor) -> None:
        pass

    def put(self, data: NDArray[np.uint8]) -> None:
        self._sum = zlib.crc32(data.data, self._sum)
        self._file.write(data.data)

    def read_back(self) -> None:
        """Take the bytes behind the header as if they had been put."""
        self._file.seek(8 + len(self._header))
        while data := self._file.read(1 << 20):
            self._sum = zlib.crc32(data, self._sum)

    def close(self) -> None:
        end = self._file.tell()
        self._file.seek(8 + self._header.index(mark_of(0), self._header.index(b'"__metadata__"')))
        self._file.write(mark_of(self._sum))
        self._file.seek(end)


class _NpzWriter:
    def __init__(self, file: IO[bytes], tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
        self._archive = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True)
        self._member: IO[bytes] | None = None

    def start(self, name: str, tensor: Tensor) -> None:
        self._end()
        # The time of a member would make two outputs of the same updates differ.
        self._member = self._archive.open(zipfile.ZipInfo(name + ".npy"), "w", force_zip64=True)
        _write_npy_header(self._member, tensor)

    def put(self, data: NDArray[np.uint8]) -> None:
        assert self._member is not None
        self._member.write(data.data)

    def _end(self) -> None:
        if self._member is not None:
            self._member.close()
            self._member = None

    def close(self) -> None:
        self._end()
        self._archive.comment = mark_of(sum_of(self._archive))
        self._archive.close()


class _NpyWriter:
    def __init__(self, file: IO[bytes], tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
        self._file = file

    def start(self, name: str, tensor: Tensor) -> None:
        _write_npy_header(self._file, tensor)

    def put(self, data: NDArray[np.uint8]) -> None:
        self._file.write(data.data)

    def close(self) -> None:
        pass


def _write_npy_header(file: IO[bytes], tensor: Tensor) -> None:
    fields = {"descr": np.lib.format.dtype_to_descr(tensor.dtype), "fortran_order": False, "shape": tensor.shape}
    np.lib.format.write_array_header_1_0(file, fields)


_WRITERS: dict[str, type[_SafetensorsWriter] | type[_NpzWriter] | type[_NpyWriter]] = {
    ".safetensors": _SafetensorsWriter,
    ".npz": _NpzWriter,
    ".npy": _NpyWriter,
}


class Output:
    """Where a result goes: one file, or shards of a bounded size with an index.

    It takes the place of an earlier output of that name as a whole, of which nothing stays.

    Parameters
    ----------
    out : Path
        The file, or what shards are named after: "model.safetensors" makes "model-00001-of-00002.safetensors" and
        "model.safetensors.index.json".
    tensors : dict
        What is to be written, in this order.
    metadata : dict
        Texts for formats that have some.
    inputs : sequence of paths
        Files that must not be replaced.
    folders : sequence of paths
        Folders that must not be written to.
    shard_size : int, optional
        Most bytes of the tensors in a shard; a larger tensor has a shard of its own.

    Raises
    ------
    FileError
        If it cannot be written so.
    """

    def __init__(
        self,
        out: Path,
        tensors: Mapping[str, Tensor],
        metadata: dict[str, str],
        inputs: Sequence[Path],
        folders: Sequence[Path] = (),
        shard_size: int | None = None,
    ) -> None:
        self.out, self.tensors = out, dict(tensors)
        self.metadata = metadata
        kind = kind_of(out)
        if kind not in WRITTEN:
            raise FileError(
                f"{out}: unknown kind of output; expected one of {', '.join(WRITTEN)} (convert it afterwards: torch "
                "reads safetensors, and they hold no code)"
            )
        if shard_size is not None and kind != ".safetensors":
            raise FileError(f"{out}: only safetensors files are written in shards (use .safetensors)")
        self._index: Path | None = None
        self._files = self._shards(shard_size)
        self._old = self._replaced() if kind == ".safetensors" else []
        for path in [*self._files, *([self._index] if self._index else []), *self._old]:
            check_target(path, inputs, folders)
        if kind == ".npy" and len(tensors) != 1:
            raise FileError(f"{out}: an npy file holds one tensor, the updates have {len(tensors)} (use .npz)")
        for name, tensor in tensors.items():
            _check_name(out, kind, name)
            if kind != ".safetensors" and tensor.dtype.isbuiltin != 1:
                raise FileError(f"{out}: {kind[1:]} files cannot hold {tensor.dtype} (use .safetensors)")
            if kind == ".safetensors" and tensor.dtype not in _CODES:
                raise FileError(f"{out}: safetensors files cannot hold {tensor.dtype} (use .npz)")

    def _shards(self, limit: int | None) -> dict[Path, dict[str, Tensor]]:
        groups: list[dict[str, Tensor]] = [{}]
        held = 0
        for name, tensor in self.tensors.items():
            if limit is not None and groups[-1] and held + tensor.nbytes > limit:
                groups.append({})
                held = 0
            groups[-1][name] = tensor
            held += tensor.nbytes
        if len(groups) == 1:
            return {self.out: groups[0]}
        self._index = self._place_of_index()
        names = (f"{self.out.stem}-{k + 1:05}-of-{len(groups):05}{self.out.suffix}" for k in range(len(groups)))
        return dict(zip(map(self.out.with_name, names), groups, strict=True))

    def _place_of_index(self) -> Path:
        return self.out.with_name(self.out.name + ".index.json")

    def _replaced(self) -> list[Path]:
        """Return the files of an earlier output beside the new ones, in which readers would find a second model."""
        index = self._place_of_index()
        shard = re.compile(rf"{re.escape(self.out.stem)}-[0-9]{{5}}-of-[0-9]{{5}}{re.escape(self.out.suffix)}")
        listed = _listed(index)
        shards = [self.out.with_name(name) for name in listed or () if shard.fullmatch(name)]
        shards = [path for path in shards if os.path.lexists(path)]
        if os.path.lexists(index) and (listed is None or len(shards) < len(listed) or not all(map(is_marked, shards))):
            raise FileError(
                f"{index}: names files that are no output of this kind, beside which {self.out.name} would be a second "
                "model (remove them, or choose another name)"
            )
        new = {*self._files, self._index}
        # The index first: whoever finds it finds all shards.
        old = [path for path in (index, self.out, *shards) if path not in new]
        return [path for path in old if os.path.lexists(path) and not os.path.isdir(path)]

    @contextlib.contextmanager
    def open(self) -> Iterator[Writer]:
        """Open what takes the tensors in order; everything appears under its name at the end, or nothing does."""
        remove_leftovers(self.out.parent)
        with contextlib.ExitStack() as stack:
            parts = _Parts(stack, self._files, self.metadata)
            try:
                yield parts
            except BaseException:
                with contextlib.suppress(Exception):  # what is half written is thrown away
                    parts.close()
                raise
            parts.close()
            self._finish(stack, parts.made)

    @contextlib.contextmanager
    def laid_out(self) -> Iterator[dict[str, tuple[Path, int]]]:
        """Open safetensors files that others write to: yield in which file, and from where on, each tensor's bytes go.

        Everything appears under its name at the end, or nothing does.
        """
        remove_leftovers(self.out.parent)
        with contextlib.ExitStack() as stack:
            made: dict[Path, tuple[IO[bytes], dict[str, Tensor]]] = {}
            places: dict[str, tuple[Path, int]] = {}
            writers = []
            for path, tensors in self._files.items():
                part = stack.enter_context(_part(path))
                made[path] = (part, tensors)
                writers.append(_SafetensorsWriter(part, tensors, self.metadata))
                at = part.tell()
                for name, tensor in tensors.items():
                    places[name] = Path(part.name).absolute(), at
                    at += tensor.nbytes
                part.truncate(at)
                part.flush()
            yield places
            for writer in writers:
                writer.read_back()
                writer.close()
            self._finish(stack, made)

    def _finish(self, stack: contextlib.ExitStack, made: dict[Path, tuple[IO[bytes], dict[str, Tensor]]]) -> None:
        """Look at what was written, write an index of shards, and let all files appear."""
        for path, (part, tensors) in made.items():
            _look_at(path, part, tensors)
        if self._index is not None:
            text = json.dumps(
                {
                    "metadata": {**self.metadata, "total_size": sum(t.nbytes for t in self.tensors.values())},
                    "weight_map": {name: path.name for path, group in self._files.items() for name in group},
                },
                indent=2,
            )
            part = stack.enter_context(_part(self._index))
            part.write(text.encode())
            made[self._index] = (part, {})
        for path, (part, _) in made.items():  # the index last
            _replace(part, path)
        for path in self._old:
            path.unlink(missing_ok=True)


class Target:
    """An output that may be begun again; used as a context, at whose end it is complete or absent."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._stack = contextlib.ExitStack()
        self._writer: Writer | None = None

    def writer(self) -> Writer:
        """Return what takes the tensors, opened when it is first asked for."""
        if self._writer is None:
            self._writer = self._stack.enter_context(self._output.open())
        return self._writer

    def restart(self) -> None:
        """Throw away what was written."""
        if self._writer is not None:
            self._writer = None
            with contextlib.suppress(_Again):
                self._stack.__exit__(_Again, _Again(), None)

    def __enter__(self) -> Target:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._stack.__exit__(kind, error, trace)


class _Again(Exception):
    """Ends an output that is begun again."""


class _Parts:
    """Writes one file after the other."""

    def __init__(
        self, stack: contextlib.ExitStack, files: Mapping[Path, dict[str, Tensor]], metadata: dict[str, str]
    ) -> None:
        self.made: dict[Path, tuple[IO[bytes], dict[str, Tensor]]] = {}
        self._stack, self._metadata = stack, metadata
        self._left = list(files.items())
        self._writer: Closing | None = None
        self._next()

    def _next(self) -> None:
        if self._writer is not None:
            self._writer.close()
        path, tensors = self._left.pop(0)
        part = self._stack.enter_context(_part(path))
        self.made[path] = (part, tensors)
        self._names = set(tensors)
        self._writer = _WRITERS[kind_of(path)](part, tensors, self._metadata)
        self._unsent = 0

    def start(self, name: str, tensor: Tensor) -> None:
        if name not in self._names:
            self._next()
        assert self._writer is not None
        self._writer.start(name, tensor)

    def put(self, data: NDArray[np.uint8]) -> None:
        assert self._writer is not None
        self._writer.put(data)
        self._unsent += data.nbytes
        if self._unsent > SENT:
            _send(next(reversed(self.made.values()))[0], self._unsent)
            self._unsent = 0

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _listed(index: Path) -> set[str] | None:
    """Return the files that an index names; None where it is a link, or no such index."""

    def look(held: Held) -> set[str]:
        return set(map(str, read_json(held, 0, held.size)["weight_map"].values()))

    return None if os.path.islink(index) else found_in(index, look)


def check_place(path: Path, folders: Sequence[Path]) -> None:
    """Raise where something would be written into one of the workers' folders."""
    parents = Path(os.path.realpath(path)).parents  # which says nothing of links in a circle, as `resolve` does
    for folder in folders:
        if Path(os.path.realpath(folder)) in parents:
            raise FileError(f"{path}: is in the folder of a worker, {folder}, which is never written to")


def check_target(path: Path, inputs: Sequence[Path], folders: Sequence[Path] = ()) -> None:
    """Raise where a file cannot be replaced, or must not be: one of the inputs, or in one of the workers' folders."""
    check_place(path, folders)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        mode = None
    except (OSError, ValueError) as error:
        raise FileError(f"{path}: cannot be written ({getattr(error, 'strerror', error)})") from None
    if mode is not None and stat.S_ISDIR(mode):
        raise FileError(f"{path}: is a directory (name a file)")
    if not os.path.isdir(path.parent):
        raise FileError(f"{path}: the directory {path.parent} does not exist")
    if mode is not None:
        if not stat.S_ISREG(mode):
            raise FileError(f"{path}: is no regular file, which are all that is ever replaced")
        if any(is_same(path, other) for other in inputs):
            raise FileError(f"{path}: is one of the updates, which are never overwritten (name another file)")


def _check_name(out: Path, kind: str, name: str) -> None:
    """Raise where a file cannot hold a tensor of that name, or somebody who unpacks it would be led elsewhere."""
    bad = kind == ".safetensors" and name == "__metadata__"
    if kind == ".npz":
        steps = name.replace("\\", "/").split("/")
        bad = (
            "\0" in name
            or len(name.encode()) > 65_000
            or not name
            or steps[0] == ""
            or ".." in steps
            or ":" in steps[0]
            or name.endswith(".npy")
        )
    if bad:
        raise FileError(f"{out}: {kind[1:]} files cannot hold a tensor named {shown(name)} (use another kind of file)")


# ---- temporary files -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _part(target: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside the target, which is locked while it is written, and removed if it is left."""
    file = None
    try:
        while file is None or not _is_ours(file):
            path = target.with_name(f".{MARK}-{secrets.token_hex(8)}{PART}")
            file = path.open("xb+")
        with file:
            yield file
    except BrokenPipeError:
        raise
    except OSError as error:
        raise FileError(f"{target}: cannot be written ({error.strerror})") from None
    finally:
        with contextlib.suppress(OSError, UnboundLocalError):
            path.unlink()


def _is_ours(file: IO[bytes]) -> bool:
    """Lock a new temporary file; whoever removes leftovers may have taken it for one before."""
    if LOCKS is None:
        return True
    try:
        LOCKS.flock(file, LOCKS.LOCK_EX | LOCKS.LOCK_NB)
        return os.stat(file.name).st_ino == os.fstat(file.fileno()).st_ino
    except (BlockingIOError, FileNotFoundError):
        return False


def _send(part: IO[bytes], count: int) -> None:
    """Have the last bytes go to the disk while the next ones are computed: nobody waits for them here."""
    if hasattr(os, "posix_fadvise"):
        part.flush()
        with contextlib.suppress(OSError):
            # It drops no page that still has to be written, but has it written.
            os.posix_fadvise(part.fileno(), part.tell() - count, count, os.POSIX_FADV_DONTNEED)


def _look_at(target: Path, part: IO[bytes], tensors: dict[str, Tensor]) -> None:
    """Read what was written as a reader will, before it replaces anything."""
    part.flush()
    os.fsync(part.fileno())
    try:
        reader = open_reader(Path(part.name), kind=kind_of(target))
        reader.held.close()
    except FileError as error:
        raise FileError(f"{target}: what was written cannot be read ({error}); nothing was replaced") from None
    found = reader.tensors if kind_of(target) != ".npy" else dict(zip(tensors, reader.tensors.values(), strict=True))
    if found != tensors:
        raise FileError(f"{target}: what was written is not what was to be written; nothing was replaced")


def _replace(part: IO[bytes], target: Path) -> None:
    part.flush()
    os.fsync(part.fileno())
    os.replace(part.name, target)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of runs that were killed: nobody holds their locks."""
    if LOCKS is None:
        return
    for name in os.listdir(folder):
        if not re.fullmatch(rf"\.{MARK}-[0-9a-f]{{16}}\{PART}", name):
            continue
        with contextlib.suppress(OSError):
            fd = os.open(folder / name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            try:
                if stat.S_ISREG(os.fstat(fd).st_mode):
                    LOCKS.flock(fd, LOCKS.LOCK_EX | LOCKS.LOCK_NB)
                    os.unlink(folder / name)
            finally:
                os.close(fd)
