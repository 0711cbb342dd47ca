"""Kinds of update files: what they hold, and reading any part of a tensor.

Only data is ever loaded: safetensors, npz and npy without pickles, and torch's files through its loader of weights
only. A header is read once, with limits, before anything is allocated for what it promises. A file is held open while
it is used and read by position, never mapped: one that shrinks is an error, not a signal.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import json
import math
import os
import re
import stat
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from robustkern.errors import RobustkernError, plain, shown
from robustkern.files.pickles import check_pickle

__all__ = [
    "CODES",
    "MAX_HEADER",
    "SUFFIXES",
    "TORCH",
    "WRITTEN",
    "FileError",
    "Held",
    "Reader",
    "Tensor",
    "found_in",
    "is_marked",
    "is_output",
    "is_same",
    "kind_of",
    "mark_of",
    "naming",
    "open_reader",
    "read_json",
    "sum_of",
]

T = TypeVar("T")

#: Files that torch writes; they are read, not written.
TORCH = (".pt", ".pth", ".bin", ".ckpt")
WRITTEN = (".safetensors", ".npz", ".npy")
SUFFIXES = (*WRITTEN, *TORCH)
#: Bytes of a header, or of an archive's directory: some 100,000 tensors. Parsed, they take some ten times as much.
MAX_HEADER = 1 << 24
#: Axes of a tensor, as in NumPy; entries of a torch file.
MAX_AXES, MAX_ENTRIES = 64, 1 << 17
#: Bytes of the pickle that says what a torch file holds.
MAX_PICKLE = 1 << 22
#: What marks a file that this package wrote, with a sum of what it holds: a key of metadata, or an archive's comment.
MARK = "robustkern"

#: What safetensors calls the dtypes.
CODES: dict[str, np.dtype[Any]] = {
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "C64": np.dtype(np.complex64),
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

    def __init__(self, message: str) -> None:
        super().__init__(plain(message, 1000))


@dataclass(frozen=True)
class Tensor:
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.size * self.dtype.itemsize


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn whatever a reader raises on a bad file into an error that names the file."""
    try:
        yield
    except (FileError, MemoryError, ImportError):
        raise
    except RecursionError:
        raise FileError(f"{path}: corrupt, truncated or no {path.suffix[1:]} file (nested too deeply)") from None
    except Exception as error:  # the libraries raise their own kinds for corrupt input
        said = plain(str(error), 300)
        raise FileError(f"{path}: corrupt, truncated or no {path.suffix[1:]} file ({said})") from error


def kind_of(path: Path) -> str:
    """Return a file's suffix, in lower case."""
    return path.suffix.lower()


def is_same(path: Path, other: Path) -> bool:
    """Tell whether two names are one file's; not where one of them leads nowhere, however long it is."""
    try:
        return os.path.samefile(path, other)
    except (OSError, ValueError):
        return False


# ---- a file that is held ---------------------------------------------------------------------------------------


class Held:
    """A regular file, which stays the same while it is used, or reading it is an error.

    Parameters
    ----------
    path : Path
        Of the file.
    hold : bool
        Whether to keep it open; where there are more files than the process may have open, each is opened anew for
        each piece, and must then be the same one.
    """

    def __init__(self, path: Path, hold: bool = True) -> None:
        self.path = path
        self._fd: int | None = None
        fd = self._open()
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise FileError(f"{path}: is no regular file (a pipe, a device or a folder cannot be an update)")
            self.identity, self.size = _identity(found), found.st_size
        except BaseException:
            os.close(fd)
            raise
        if hasattr(os, "posix_fadvise"):  # the system reads further ahead, while what is there is computed
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        if hold:
            self._fd = fd
        else:
            os.close(fd)

    def _open(self) -> int:
        try:
            # Without O_NONBLOCK the open of a pipe would wait for somebody to write.
            return os.open(self.path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
        except FileNotFoundError:
            raise FileError(f"{self.path}: no such file") from None
        except OSError as error:
            raise FileError(f"{self.path}: cannot be opened ({error.strerror})") from None

    @property
    def fileno(self) -> int | None:
        """The descriptor, where it is held open."""
        return self._fd

    def close(self) -> None:
        """Let the file go."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def check(self) -> None:
        """Raise where the file is another one than before, or was written to."""
        try:
            found = [os.stat(self.path), *([] if self._fd is None else [os.fstat(self._fd)])]
        except OSError as error:
            raise FileError(f"{self.path}: changed while it was being read ({error.strerror})") from None
        if any(_identity(each) != self.identity for each in found):
            raise FileError(f"{self.path}: changed while it was being read (updates must stay until the end)")

    def read_into(self, data: NDArray[np.uint8], offset: int) -> None:
        """Fill an array from a position on."""
        if offset < 0:  # -1 would be wherever the file was read last
            raise FileError(f"{self.path}: corrupt, something in it lies before its beginning")
        fd = self._fd
        if fd is None:
            self.check()
            fd = self._open()
        try:
            view, done = memoryview(data.data), 0
            while done < len(data):
                count = os.preadv(fd, [view[done:]], offset + done)
                if count == 0:
                    raise FileError(f"{self.path}: truncated while it was being read (updates must stay until the end)")
                done += count
        except OSError as error:
            raise FileError(f"{self.path}: cannot be read ({error.strerror})") from None
        finally:
            if fd != self._fd:
                os.close(fd)

    def read(self, offset: int, count: int) -> bytes:
        """Return some bytes."""
        data = np.empty(count, dtype=np.uint8)
        self.read_into(data, offset)
        return data.tobytes()


def _identity(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class _Stream(io.RawIOBase):
    """A held file for libraries that want one to seek and read in."""

    def __init__(self, held: Held) -> None:
        self._held, self._at = held, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        at = offset + (0, self._at, self._held.size)[whence]
        if at < 0:
            raise OSError(errno.EINVAL, "something lies before its beginning")  # which zipfile expects
        self._at = at
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(self._held.size - self._at, 0)
        count = left if size is None or size < 0 else size
        if count > MAX_HEADER:
            raise ValueError(f"its directory has {count:,} bytes, more than {MAX_HEADER:,}")
        count = min(count, left)
        data = self._held.read(self._at, count)
        self._at += count
        return data

    def readinto(self, buffer: Any) -> int:
        data = np.frombuffer(buffer, dtype=np.uint8)
        count = max(min(len(data), self._held.size - self._at), 0)
        self._held.read_into(data[:count], self._at)
        self._at += count
        return count


def read_json(held: Held, offset: int, count: int) -> Any:
    """Return what a part of a file says in JSON, in which no key may stand twice."""
    if count > MAX_HEADER:
        raise ValueError(f"its header has {count:,} bytes, more than {MAX_HEADER:,}")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("its header has the same name twice")
        return found

    # From bytes json takes UTF-16 and UTF-32 too, and a byte order mark.
    return json.loads(held.read(offset, count).decode(), object_pairs_hook=once)


# ---- readers ---------------------------------------------------------------------------------------------------


class Reader(Protocol):
    """Reads one file.

    Attributes
    ----------
    path : Path
        Of the file.
    held : Held
        The file.
    tensors : dict
        What it holds.
    metadata : dict
        Texts and numbers that it holds besides.
    """

    path: Path
    held: Held
    tensors: dict[str, Tensor]
    metadata: dict[str, Any]

    def in_pieces(self, name: str) -> bool:
        """Tell whether parts of a tensor can be read; one in another order of its axes is read whole."""

    def offset_of(self, name: str) -> int | None:
        """Return where in the file a tensor's bytes begin, where they lie there as they are."""

    def place_of(self, name: str) -> Any:
        """Return where a tensor lies: the same for two names of one memory."""

    def read_into(self, data: NDArray[np.uint8], name: str, begin: int) -> None:
        """Fill an array with bytes of a tensor, from the byte `begin` of its values in the order of C."""


class _Span(NamedTuple):
    """Where a tensor lies in its file: bytes from the beginning, and steps between values (None: in order of C)."""

    offset: int
    steps: tuple[int, ...] | None = None


class _Spans:
    """A reader of tensors that lie in the file as in memory."""

    def __init__(self, held: Held) -> None:
        self.path, self.held = held.path, held
        self.tensors: dict[str, Tensor] = {}
        self.metadata: dict[str, Any] = {}
        self.spans: dict[str, _Span] = {}

    def add(self, name: str, tensor: Tensor, span: _Span) -> None:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(f"the name {shown(name)} is no text") from None
        if name in self.tensors:
            raise ValueError(f"it holds {shown(name)} twice")
        if len(tensor.shape) > MAX_AXES:
            raise ValueError(f"tensor {shown(name)} has {len(tensor.shape)} axes, more than {MAX_AXES}")
        self.tensors[name], self.spans[name] = tensor, span

    def in_pieces(self, name: str) -> bool:
        return self.spans[name].steps is None

    def offset_of(self, name: str) -> int | None:
        offset, steps = self.spans[name]
        return offset if steps is None else None

    def place_of(self, name: str) -> Any:
        return self.spans[name]

    def read_into(self, data: NDArray[np.uint8], name: str, begin: int) -> None:
        offset, steps = self.spans[name]
        if steps is None:
            self.held.read_into(data, offset + begin)
            return
        tensor = self.tensors[name]
        if tensor.size == 0:
            return
        reach = _reach(tensor.shape, steps)
        raw = np.empty(reach * tensor.dtype.itemsize, dtype=np.uint8)
        self.held.read_into(raw, offset)
        strides = [step * tensor.dtype.itemsize for step in steps]
        # NumPy knows no strides of dtypes that are not its own.
        same = np.dtype(f"u{tensor.dtype.itemsize}") if tensor.dtype.isbuiltin != 1 else tensor.dtype
        values = np.lib.stride_tricks.as_strided(raw.view(same), tensor.shape, strides, writeable=False)
        whole = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        data[:] = whole[begin : begin + len(data)]


def _reach(shape: Sequence[int], steps: Sequence[int]) -> int:
    """Return how many values lie from the first to the last one."""
    return sum((size - 1) * step for size, step in zip(shape, steps, strict=True)) + 1


class _Safetensors(_Spans):
    def __init__(self, held: Held) -> None:
        super().__init__(held)
        (length,) = struct.unpack("<Q", held.read(0, 8)) if held.size >= 8 else (0,)
        if not 2 <= length <= held.size - 8:
            raise ValueError(f"its header should have {length} bytes, the file has {held.size}")
        header = read_json(held, 8, length)
        if not isinstance(header, dict):
            raise ValueError("its header is no table")
        if held.read(8, 1) != b"{":
            raise ValueError("its header does not begin with '{'")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("its metadata are no texts")
        self.metadata, at = metadata, 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            code, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            if code not in CODES:
                raise FileError(f"{self.path}: tensor {shown(name)} has the unsupported dtype {shown(str(code))}")
            if not all(type(number) is int and 0 <= number < 1 << 63 for number in [*shape, begin, end]):
                raise ValueError(f"shape or place of {shown(name)} are no whole numbers")
            if len(shape) > MAX_AXES:
                raise ValueError(f"tensor {shown(name)} has {len(shape)} axes, more than {MAX_AXES}")
            tensor = Tensor(tuple(shape), CODES[code])
            if begin != at or end - begin != tensor.nbytes:
                raise ValueError(f"the place of {shown(name)} does not fit its shape, or the others' places")
            self.add(name, tensor, _Span(8 + length + begin))
            at = end
        if 8 + length + at != held.size:
            raise ValueError(f"truncated or too long: {held.size} bytes, expected {8 + length + at}")


class _Npy(_Spans):
    def __init__(self, held: Held) -> None:
        super().__init__(held)
        tensor, offset, steps = _npy_header(held.read(0, min(held.size, 1 << 16)))
        _check_length(tensor, offset, held.size)
        self.add("array", tensor, _Span(offset, steps))


class _Npz(_Spans):
    """Stored members are read where they lie, and checked against their sums; compressed ones as a stream each."""

    def __init__(self, held: Held) -> None:
        super().__init__(held)
        self._archive = _archive(held)
        self._streams: dict[str, tuple[zipfile.ZipInfo, int]] = {}
        self._open: dict[str, tuple[Any, int]] = {}
        self._sums: dict[str, tuple[int, int]] = {}
        for member in self._archive.infolist():
            if not member.filename.endswith(".npy"):
                raise ValueError(f"its member {shown(member.filename)} is no array")
            name = member.filename[: -len(".npy")]
            if member.compress_type == zipfile.ZIP_DEFLATED:
                with self._archive.open(member) as file:
                    tensor, at, steps = _npy_header(_header_of(file.read))
                self._streams[name] = (member, at)
                span = _Span(0, steps)
            else:
                start = _begin_of(held, member)
                tensor, at, steps = _npy_header(held.read(start, min(member.file_size, 1 << 12)))
                span = _Span(start + at, steps)
            _check_length(tensor, at, member.file_size)
            self.add(name, tensor, span)
            if span.steps is None and name not in self._streams:
                self._sums[name] = (at, member.CRC)

    def offset_of(self, name: str) -> int | None:
        return None  # the sums are of members

    def place_of(self, name: str) -> Any:
        return name

    def read_into(self, data: NDArray[np.uint8], name: str, begin: int) -> None:
        if name not in self._streams:
            super().read_into(data, name, begin)
            self._add_up(data, name, begin)
            return
        if self.spans[name].steps is not None:
            whole = np.empty(self.tensors[name].nbytes, dtype=np.uint8)
            self._follow(whole, name, 0)
            values = whole.view(self.tensors[name].dtype).reshape(self.tensors[name].shape[::-1]).T
            data[:] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)[begin : begin + len(data)]
            return
        self._follow(data, name, begin)

    def _follow(self, data: NDArray[np.uint8], name: str, begin: int) -> None:
        """Read on in a compressed member, from its beginning where what is asked for lies behind."""
        stream, at = self._open.pop(name, (None, 0))
        if stream is None or at != begin:
            member, skip = self._streams[name]
            stream, at = self._archive.open(member), 0
            skip += begin
            while skip > 0:
                skip -= len(stream.read(min(skip, 1 << 20))) or skip
        view, done = memoryview(data.data), 0
        while done < len(data):
            count = stream.readinto(view[done:])
            if not count:
                raise ValueError(f"tensor {shown(name)} ends too soon")
            done += count
        if begin + done < self.tensors[name].nbytes:
            self._open[name] = (stream, begin + done)
        else:
            stream.read(1)  # compares the sum
            stream.close()

    def _add_up(self, data: NDArray[np.uint8], name: str, begin: int) -> None:
        """Compare the sum of a stored member, where it is read from the beginning on for the first time."""
        if name not in self._sums:
            return
        at, wanted = self._sums[name]
        done, value = self._open.get(name, (0, 0))
        if begin != done:
            return
        if begin == 0:
            value = zlib.crc32(self.held.read(self.spans[name].offset - at, at))
        value = zlib.crc32(data.data, value)
        self._open[name] = (done + len(data), value)
        if done + len(data) == self.tensors[name].nbytes:
            del self._sums[name], self._open[name]
            if value != wanted:
                raise ValueError(f"Bad CRC-32 of tensor {shown(name)}")


#: What a member's flags may say: how well it is compressed, its length stands behind it, its name is UTF-8.
_UTF_8 = 0x800
_FLAGS = 0x6 | 0x8 | _UTF_8
#: What makes a member a folder, of which torch reads nothing and leaves memory as it was.
_FOLDER = 0x10


def _archive(held: Held) -> zipfile.ZipFile:
    """Open an archive in which other readers find the same members, each in a way that all of them know.

    Its directory has a bounded length: `_Stream` reads no more at once.
    """
    if held.size < 4 or held.read(0, 4) not in (b"PK\3\4", b"PK\5\6"):
        raise zipfile.BadZipFile("it does not begin as an archive does")  # but maybe as a file of another kind
    archive = zipfile.ZipFile(_Stream(held))
    _check_end(held, held.size - 22 - len(archive.comment))
    for member in archive.infolist():
        if member.flag_bits & ~_FLAGS or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"its member {shown(member.filename)} is encrypted, or compressed in an unusual way")
        if member.file_size and (member.external_attr & _FOLDER or member.orig_filename.endswith("/")):
            raise ValueError(f"its member {shown(member.filename)} is a folder, and has bytes (save the file again)")
    return archive


def _check_end(held: Held, at: int) -> None:
    """Raise where readers could take different parts of a file for its directory.

    Some go by the place that the end states, others by the length, or by where a larger record should be.
    """
    end = held.read(at, 22)
    size, begin = struct.unpack("<LL", end[12:20])
    if at >= 20 and (locator := held.read(at - 20, 20)).startswith(b"PK\6\7"):
        at -= 20 + 56
        large = held.read(at, 56) if at >= 0 else b""
        if not large.startswith(b"PK\6\6") or struct.unpack("<Q", locator[8:16]) != (at,):
            raise ValueError("its directory is not where its end says")
        size, begin = struct.unpack("<QQ", large[40:])
    if not end.startswith(b"PK\5\6") or begin + size != at:
        raise ValueError("its directory is not where its end says")


def _begin_of(held: Held, member: zipfile.ZipInfo) -> int:
    """Return where the bytes of a stored member begin, which its own header has to agree with."""
    at, called = member.header_offset, member.orig_filename.encode("utf-8" if member.flag_bits & _UTF_8 else "cp437")
    header = held.read(at, 30 + len(called)) if at + 30 + len(called) <= held.size else b""
    if (
        not header.startswith(b"PK\3\4")
        or header[30:] != called
        or struct.unpack("<H", header[26:28]) != (len(called),)
        or (struct.unpack("<H", header[6:8])[0] ^ member.flag_bits) & _UTF_8
        or member.compress_size != member.file_size
    ):
        raise ValueError(f"its member {shown(member.filename)} is not where the directory says")
    at += 30 + int(sum(struct.unpack("<HH", header[26:30])))
    if at + member.file_size > held.size:
        raise ValueError(f"truncated: its member {shown(member.filename)} goes beyond the end")
    return at


def _header_of(read: Callable[[int], bytes]) -> bytes:
    """Return the header of an array, and no more, from a stream."""
    start = read(12)
    if len(start) < 12 or not start.startswith(b"\x93NUMPY"):
        raise ValueError("a member is no array")
    (length,) = struct.unpack("<H", start[8:10]) if start[6] == 1 else struct.unpack("<I", start[8:12])
    return start + read(min(length, 1 << 16))


#: What the pickle of a dict of tensors names; torch's loader of weights allows more, such as arrays of any size.
_NAMES = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|tensor_v3|parameter)"
    r"|torch (Size|device|dtype|\w+Storage)|torch\.storage (TypedStorage|UntypedStorage)|torch [a-z0-9_]+"
)


def _check_weights(data: bytes) -> None:
    """Raise where a pickle names what no dict of tensors needs: nothing else can take memory that the file has not."""
    for operation, name in check_pickle(data):
        if operation != "GLOBAL" or not _NAMES.fullmatch(str(name)):
            raise ValueError(f"it holds {shown(str(name or operation))}, which is no tensor")


class _Torch(_Spans):
    """Files of ``torch.save``: its loader of weights tells what lies where, and runs no code of the file."""

    def __init__(self, held: Held) -> None:
        super().__init__(held)
        try:
            import torch
        except ImportError as error:
            raise ImportError(f"{held.path}: torch is needed to read it ({error})") from error
        try:
            archive = _archive(held)
        except zipfile.BadZipFile:
            raise FileError(
                f"{held.path}: is no file of torch.save, or of a torch older than 1.6 (convert it: "
                "torch.save(torch.load(path, weights_only=True), path))"
            ) from None
        self._members: dict[int, int] = {}  # lengths, by where they begin
        with archive:
            # As torch takes names: without regard to case, and to what else an entry of the directory says of them.
            names = [member.orig_filename.rpartition("/")[2].lower() for member in archive.infolist()]
            if names.count("data.pkl") != 1:
                raise ValueError(f"it has {names.count('data.pkl')} members called data.pkl; expected one")
            for name, member in zip(names, archive.infolist(), strict=True):
                if member.compress_type != zipfile.ZIP_STORED or (name == "data.pkl" and member.file_size > MAX_PICKLE):
                    raise ValueError(f"its member {shown(member.filename)} is compressed, or too long")
                self._members[_begin_of(held, member)] = member.file_size
                if name == "data.pkl":
                    _check_weights(archive.read(member))
                elif name == "byteorder" and archive.read(member).strip() != sys.byteorder.encode():
                    raise ValueError(
                        "it was written on a machine with another order of bytes (save it again on this one)"
                    )
        # On the device "meta" storages have no memory, but know where in the file their bytes are.
        loaded = torch.load(io.BufferedReader(_Stream(held)), map_location="meta", weights_only=True)
        if isinstance(loaded, torch.Tensor):
            loaded = {"array": loaded}
        if not isinstance(loaded, dict):
            raise ValueError(f"it holds a {type(loaded).__name__}; expected a dict of tensors")
        self._entries = 0
        self._flatten(loaded, "")

    def _flatten(self, values: dict[Any, Any], prefix: str) -> None:
        import torch

        for key, value in values.items():
            self._entries += 1
            name = f"{prefix}{key}"
            if self._entries > MAX_ENTRIES or len(name) > 1 << 16:
                raise ValueError(f"it holds more than {MAX_ENTRIES:,} entries, or names too long")
            if isinstance(value, torch.Tensor):
                self._add_tensor(name, value)
            elif isinstance(value, dict):
                self._flatten(value, name + ".")
            elif isinstance(value, (str, int, float, bool)):
                self.metadata[name] = value
            elif value is not None:
                raise ValueError(
                    f"its entry {shown(name)} is a {type(value).__name__}; expected tensors, or save those"
                )

    def _add_tensor(self, name: str, value: Any) -> None:
        import torch

        if value.layout != torch.strided or value.is_quantized or value.is_conj() or value.is_neg():
            raise ValueError(f"tensor {shown(name)} is sparse, quantized or lazy; expected a dense one")
        code = str(value.dtype).removeprefix("torch.")
        known = {dtype.name: dtype for dtype in (*CODES.values(), np.dtype(np.complex128))}
        if code not in known:
            raise FileError(f"{self.path}: tensor {shown(name)} has the unsupported dtype {code}")
        tensor, storage = Tensor(tuple(value.shape), known[code]), value.untyped_storage()
        place = getattr(storage, "_checkpoint_offset", None)
        if place is None:
            raise ValueError("this torch does not tell where tensors lie in a file (it takes torch 2.7, or newer)")
        steps = None if value.is_contiguous() else tuple(value.stride())
        count = tensor.size if steps is None or not tensor.size else _reach(tensor.shape, steps)
        end = (value.storage_offset() + count) * tensor.dtype.itemsize
        if place not in self._members:  # torch reckons where its own writer would have put them
            raise ValueError(
                f"tensor {shown(name)} is not where torch.save puts it: another program packed the file again (save it "
                "anew: torch.save(torch.load(path, weights_only=True), path))"
            )
        if end > storage.nbytes() or storage.nbytes() > self._members[place]:
            raise ValueError(f"truncated: tensor {shown(name)} goes beyond the end")
        self.add(name, tensor, _Span(place + value.storage_offset() * tensor.dtype.itemsize, steps))


def _npy_header(start: bytes) -> tuple[Tensor, int, tuple[int, ...] | None]:
    """Return what an array is, where its values begin, and their steps where they are not in the order of C."""
    version = np.lib.format.read_magic(io.BytesIO(start[:8]))
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"its format has the version {version}; NumPy writes (1, 0), (2, 0) and (3, 0)")
    size, code = (10, "<H") if version == (1, 0) else (12, "<I")
    (length,) = struct.unpack(code, start[8:size])
    return _parsed(start[: size + length])


@functools.lru_cache(maxsize=4096)  # tensors of one shape have equal headers, in all files
def _parsed(header: bytes) -> tuple[Tensor, int, tuple[int, ...] | None]:
    file = io.BytesIO(header)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, fortran, dtype = read(file)
    except MemoryError:  # how Python says that an expression is nested too deeply
        raise ValueError("its header is nested too deeply") from None
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are never loaded")
    if dtype.subdtype is not None or dtype.itemsize == 0:
        raise ValueError(f"its dtype {plain(str(dtype), 60)} is not that of a number")
    if any(type(size) is not int or not 0 <= size < 1 << 63 for size in shape) or len(shape) > MAX_AXES:
        raise ValueError(f"its shape {plain(str(shape), 60)} is negative, too large, or no whole numbers")
    steps = None
    if fortran and sum(size != 1 for size in shape) > 1:
        steps = tuple(math.prod(shape[:axis]) for axis in range(len(shape)))
    return Tensor(shape, dtype), len(header), steps


def _check_length(tensor: Tensor, offset: int, length: int) -> None:
    """Hold what a header promises against what is there."""
    expected = offset + tensor.nbytes
    if length < expected:
        raise ValueError(f"truncated: {length} bytes, expected {expected} for shape {tensor.shape}")


_READERS: dict[str, Callable[[Held], Reader]] = {
    ".safetensors": _Safetensors,
    ".npz": _Npz,
    ".npy": _Npy,
    **dict.fromkeys(TORCH, _Torch),
}


def open_reader(path: Path, hold: bool = True, kind: str | None = None) -> Reader:
    """Look at what a file of a kind holds; raise a `FileError` where it cannot be read."""
    kind = kind or kind_of(path)
    if kind not in _READERS:
        raise FileError(f"{path}: unknown kind of file; expected one of {', '.join(SUFFIXES)}")
    held = Held(path, hold)
    try:
        with naming(path):
            return _READERS[kind](held)
    except BaseException:
        held.close()
        raise


def reader_of(held: Any, kind: str) -> Reader:
    """Look at what a file holds that is not of this machine: an object with `Held`'s path, size and reads."""
    with naming(held.path):
        return _READERS[kind](held)


def found_in(path: Path, look: Callable[[Held], T]) -> T | None:
    """Return what is found in a file; None where it cannot be read, or is no file of its kind."""
    try:
        held = Held(path)
    except FileError:
        return None
    try:
        with naming(path):
            return look(held)
    except (FileError, MemoryError):
        return None
    finally:
        held.close()


def is_marked(path: Path) -> bool:
    """Tell whether a safetensors file says that this package wrote it: only its header is read."""
    return bool(found_in(path, lambda held: MARK in _Safetensors(held).metadata))


def is_output(path: Path) -> bool:
    """Tell whether this package wrote a file, and nobody changed it since, as far as the file itself says it."""

    def look(held: Held) -> bool:
        if kind_of(path) == ".npz":
            archive = _archive(held)
            return archive.comment == mark_of(sum_of(archive))
        reader = _Safetensors(held)
        begin = 8 + struct.unpack("<Q", held.read(0, 8))[0]
        return MARK in reader.metadata and reader.metadata[MARK].encode() == mark_of(_sum(held, begin))

    return kind_of(path) in (".safetensors", ".npz") and bool(found_in(path, look))


def mark_of(value: int) -> bytes:
    """Return the mark of a file whose values have a sum."""
    return f"aggregated {value:08x}".encode()


def sum_of(archive: zipfile.ZipFile) -> int:
    """Return a sum of what an archive holds, from its directory."""
    return zlib.crc32(b"".join(struct.pack("<L", member.CRC) for member in archive.infolist()))


def _sum(held: Held, begin: int) -> int:
    value, data = 0, np.empty(1 << 20, dtype=np.uint8)
    while begin < held.size:
        part = data[: min(len(data), held.size - begin)]
        held.read_into(part, begin)
        value = zlib.crc32(part.data, value)
        begin += len(part)
    return value
