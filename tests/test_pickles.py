"""Pickles that others wrote, by what reading them would cost."""

from __future__ import annotations

import collections
import io
import pickle
import pickletools
import time
import zipfile
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


def torch_file(folder: Path, data: bytes) -> Path:
    """Write a file of torch.save with another pickle."""
    usual = io.BytesIO()
    torch.save({"a": torch.ones(2)}, usual)
    path = folder / "update.pt"
    with zipfile.ZipFile(usual) as old, zipfile.ZipFile(path, "w") as new:
        for member in old.infolist():
            new.writestr(member.filename, data if member.filename.endswith("data.pkl") else old.read(member))
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
