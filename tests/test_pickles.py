"""Pickles that others wrote, by what reading them would cost."""

from __future__ import annotations

import collections
import io
import pickle
import pickletools
import struct
import time
import zipfile
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robustkern.distributed.dcp import Folder
from robustkern.files.formats import FileError, open_reader
from robustkern.files.pickles import MOST_VISITS, check_pickle
from robustkern.training.data import _read_pickled

LEVELS = 60
#: A tuple of the same tuple twice, and so on; lists, filled from the inside or the outside; objects, filled afterwards.
TUPLES = b")" + b"".join(b"q%ch%c\x86" % (k, k) for k in range(LEVELS))
LISTS = b"".join(b"]q%c" % k + (b"(h%ch%ce0" % (k - 1, k - 1) if k else b"0") for k in range(LEVELS))
OUTSIDE_IN = b"".join(b"]q%c0" % k for k in range(LEVELS)) + b"".join(
    b"h%c(h%ch%ce0" % (k, k + 1, k + 1) for k in range(LEVELS - 1)
)
OBJECTS = b"ccollections\nOrderedDict\nq\xff0" + b"".join(
    b"h\xff)Rq%c" % k + (b"(h%ch%ctb0" % (k - 1, k - 1) if k else b"0") for k in range(LEVELS)
)
LAST = b"h%c" % (LEVELS - 1)
BOMBS = {"tuples": TUPLES, "lists": LISTS + LAST, "outside in": OUTSIDE_IN + b"h\0", "objects": OBJECTS + LAST}


def as_key(value: bytes) -> bytes:
    """Return the pickle of a dict with one key."""
    return b"\x80\x02}" + value + b"K\x01s."


@pytest.mark.parametrize("name", BOMBS)
def test_what_holds_the_same_in_itself_too_often_is_refused(name: str) -> None:
    pickletools.dis(as_key(BOMBS[name]), io.StringIO())  # they are pickles
    with pytest.raises(ValueError, match="holds the same objects in each other"):
        check_pickle(as_key(BOMBS[name]))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"]r\xff\xff\xff\x7f.", r"remembers an object as number 2147483647, of 7 bytes"),
        (b"]p-1\n.", r"remembers an object as number -1"),
        (b"]q\0h\0a.", "holds an object in itself"),
        (b"h\1.", "refers to an object number 1, which is not there"),
        (b"q\0.", "refers to an object that is not there"),
        (b"(q\0.", "refers to an object that is not there"),
        (b"2.", "refers to an object that is not there"),
        (b"R.", "REDUCE finds nothing to work on"),
        (b"(u.", "SETITEMS finds nothing to work on"),
        (b"u.", "SETITEMS finds no mark"),
        (b"K\1K\2a.", "APPEND finds nothing to put more into"),
        (b"B\xff\xff\xff\x7fabc.", "expected 2147483647 bytes"),
        (b"\x96\xff\xff\xff\xff\xff\xff\xff\x0fabc.", "expected"),
        (b"]", "exhausted before"),
        (b"\xff.", "unknown"),
    ],
)
def test_what_costs_too_much_or_is_no_pickle(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_pickle(data)


ATOMS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
HASHED = st.recursive(ATOMS, lambda inner: st.lists(inner, max_size=4).map(tuple), max_leaves=10)
VALUES = st.recursive(
    HASHED | st.frozensets(HASHED) | st.sets(HASHED),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(HASHED, inner, max_size=5) | st.tuples(inner, inner),
    max_leaves=30,
)


@given(value=VALUES, protocol=st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_usual_values_are_fine(value: Any, protocol: int) -> None:
    check_pickle(pickle.dumps([value, value, collections.OrderedDict(a=value)], protocol))


def test_what_is_named_is_told() -> None:
    data = pickle.dumps([np.float32(1), collections.OrderedDict()], 2)
    assert ("GLOBAL", "collections OrderedDict") in check_pickle(data)
    assert check_pickle(pickle.dumps({"a": [1]})) == []


def test_a_long_one_may_hold_as_much() -> None:
    """Also what many share: its limit grows with the data."""
    shared = list(range(100))
    check_pickle(pickle.dumps([shared] * 5000))
    with pytest.raises(ValueError, match="times"):
        check_pickle(pickle.dumps([[shared] * 100] * (MOST_VISITS // 5000)))


# ---- whoever reads pickles -------------------------------------------------------------------------------------


def torch_file(folder: Path, *pickles: bytes, called: str = "archive/data.pkl") -> Path:
    """Write a file of torch.save with other pickles."""
    usual = io.BytesIO()
    torch.save({"a": torch.ones(2)}, usual)
    path = folder / "update.pt"
    with zipfile.ZipFile(usual) as old, zipfile.ZipFile(path, "w") as new:
        for member in old.infolist():
            if not member.filename.endswith("data.pkl"):
                new.writestr(member.filename, old.read(member))
        for data in pickles:
            new.writestr(called, data)
    return path


@pytest.mark.parametrize("data", [as_key(TUPLES), b"\x80\x02}r\xff\xff\xff\x7f."], ids=["tuples", "number"])
def test_readers_refuse_them_at_once(tmp_path: Path, data: bytes) -> None:
    """Before, the first took a torch file's reader for ever, the second some 32 GiB of a checkpoint's."""
    started = time.perf_counter()
    with pytest.raises(FileError, match=r"in each other|remembers"):
        open_reader(torch_file(tmp_path, data))
    (tmp_path / ".metadata").write_bytes(data)
    with ExitStack() as files, pytest.raises(ValueError, match=r"in each other|remembers"):
        Folder(tmp_path, files)
    with pytest.raises(ValueError, match=r"in each other|remembers"):
        _read_pickled("data_batch_1", data)
    assert time.perf_counter() - started < 5


# Python and torch read archives each in a way of its own: a pickle that only torch finds would be read unchecked.

SEEN, HIDDEN = b"\x80\x02}X\4\0\0\0seenNs.", b"\x80\x02}X\6\0\0\0hiddenNs."


def in_capitals(folder: Path) -> Path:
    return torch_file(folder, as_key(TUPLES), called="archive/DATA.PKL")


def twice(folder: Path) -> Path:
    with pytest.warns(UserWarning, match="Duplicate name"):
        return torch_file(folder, SEEN, HIDDEN)


def called_otherwise(folder: Path) -> Path:
    """An entry's extra field may hold another name, which newer versions of Python go by."""
    path = torch_file(folder)
    with zipfile.ZipFile(path, "a") as archive:
        info = zipfile.ZipInfo("archive/data.pkl")
        name = b"archive/other"
        info.extra = struct.pack("<HHBL", 0x7075, 5 + len(name), 1, zlib.crc32(info.filename.encode())) + name
        archive.writestr(info, as_key(TUPLES))
    return path


def directory_of(data: bytes, shift: int) -> tuple[bytes, int]:
    """Return an archive's directory for members that stand elsewhere, and how many those are."""
    entries = b""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for member in archive.infolist():
            begin = archive.start_dir + len(entries)
            name = member.orig_filename.encode()
            entries += data[begin : begin + 42] + struct.pack("<L", member.header_offset + shift) + name
        return entries, len(archive.infolist())


def two_archives(folder: Path) -> tuple[bytes, bytes, int, bytes, int]:
    """Return what comes before the directories, and the directories: torch is to find the first."""
    hidden, seen = (torch_file(folder, data).read_bytes() for data in (HIDDEN, SEEN))
    first, count = directory_of(hidden, 0)
    return hidden + seen, first, count, seen, len(hidden)


def by_the_place_of_its_directory(folder: Path) -> Path:
    """Python goes by the directory's length and where it ends, and shifts all members by what is between."""
    members, first, count, seen, shift = two_archives(folder)
    second, _ = directory_of(seen, shift - len(first))
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(second), len(members), 0)
    path = folder / "update.pt"
    path.write_bytes(members + first + second + end)
    return path


def by_a_second_large_end(folder: Path) -> Path:
    """Python looks for it right before its locator, torch where the locator says."""
    members, first, count, seen, shift = two_archives(folder)

    def large(size: int, begin: int) -> bytes:
        return struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, begin)

    data = members + first
    place = len(data)
    data += large(len(first), len(members))
    second, _ = directory_of(seen, shift)
    data += second + large(len(second), len(data))
    data += struct.pack("<4sLQL", b"PK\6\7", 0, place, 1)
    path = folder / "update.pt"
    path.write_bytes(data + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 2**32 - 1, 2**32 - 1, 0))
    return path


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (by_the_place_of_its_directory, "its directory is not where its end says"),
        (by_a_second_large_end, "its directory is not where its end says"),
        (twice, "has 2 members called data.pkl; expected one"),
    ],
)
def test_a_pickle_that_only_torch_finds_is_refused(tmp_path: Path, write: Callable[[Path], Path], message: str) -> None:
    path = write(tmp_path)
    with zipfile.ZipFile(path) as archive:
        assert SEEN in [archive.read(member) for member in archive.infolist()]
    assert list(torch.load(path, weights_only=True)) in (["hidden"], ["seen"])
    with pytest.raises(FileError, match=message):
        open_reader(path)


@pytest.mark.parametrize("write", [in_capitals, called_otherwise])
def test_a_pickle_is_one_whatever_its_name_looks_like(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    with pytest.raises(FileError, match=r"in each other"):
        open_reader(write(tmp_path))


def test_a_file_without_a_pickle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"has 0 members called data.pkl; expected one"):
        open_reader(torch_file(tmp_path))


def test_a_file_that_was_packed_again_is_refused_and_not_misread(tmp_path: Path) -> None:
    """On the device "meta" torch reckons where values are, by how it aligns them: the second tensor's were others'."""
    torch.save({"a": torch.ones(5), "b": torch.arange(7)}, tmp_path / "usual.pt")
    path = tmp_path / "again.pt"
    with zipfile.ZipFile(tmp_path / "usual.pt") as old, zipfile.ZipFile(path, "w") as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    with pytest.raises(FileError, match=r"tensor 'b' is not where torch.save puts it: .* packed the file again"):
        open_reader(path)
    torch.save(torch.load(path, weights_only=True), path)
    assert list(open_reader(path).tensors) == ["a", "b"]


@pytest.mark.parametrize("suffix", [".pt", ".npz"])
def test_a_folder_that_has_bytes_is_refused(tmp_path: Path, suffix: str) -> None:
    """By its attributes: torch reads nothing of it and returns whatever the memory held."""
    path = tmp_path / f"x{suffix}"
    if suffix == ".pt":
        torch.save({"a": torch.full((5,), 7.0)}, path)
    else:
        np.savez(path, a=np.full(5, 7.0))
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        names = [member.orig_filename.encode() for member in archive.infolist()]
    (last,) = (name for name in names if name.endswith((b"data/0", b"a.npy")))
    entry = data.rindex(last) - 46
    assert data[entry : entry + 4] == b"PK\1\2"
    data[entry + 38] |= 0x10
    path.write_bytes(data)
    with pytest.raises(FileError, match=r"its member .* is a folder, and has bytes"):
        open_reader(path)
