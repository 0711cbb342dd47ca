"""The main job on files: formats, streaming, corrupt input."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file
from test_rules import RULES

import robustkern as rk
from robustkern.files import FileError, aggregate_files, formats

Update = dict[str, NDArray[Any]]


def make_updates(n: int = 9, seed: int = 0) -> list[Update]:
    rng = np.random.default_rng(seed)
    return [
        {
            "layer.weight": rng.standard_normal((20, 30)).astype(np.float32),
            "layer.bias": rng.standard_normal(20).astype(np.float32),
            "half": rng.standard_normal((7, 3)).astype(np.float16),
            "brain": rng.standard_normal(11).astype(ml_dtypes.bfloat16),
            "wide": rng.standard_normal((2, 2, 2)),
            "scalar": np.array(rng.standard_normal(), dtype=np.float32),
            "empty": np.zeros((0, 4), dtype=np.float32),
            "steps": np.array(100 + i),
            "mask": np.array([True, i % 2 == 0]),
        }
        for i in range(n)
    ]


def write(folder: Path, updates: list[Update], kind: str) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = []
    for i, update in enumerate(updates):
        path = folder / f"worker-{i}.{kind}"
        if kind == "safetensors":
            save_file(update, path)
        elif kind == "npz":
            np.savez(path, **update)
        else:
            np.save(path, update["layer.weight"])
        paths.append(path)
    return paths


def read(path: Path) -> Update:
    if path.suffix == ".safetensors":
        with safe_open(path, framework="numpy") as file:
            return {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    if path.suffix == ".npz":
        return dict(np.load(path))
    return {"array": np.load(path)}


@pytest.mark.parametrize("rule", [*RULES, "mean"])
def test_files_give_what_memory_gives(tmp_path: Path, rule: str) -> None:
    updates = make_updates()
    updates[3]["layer.weight"][2, 2] = np.nan if rule != "mean" else 5
    paths = write(tmp_path, updates, "safetensors")
    info = aggregate_files(paths, rule, out=tmp_path / "out.safetensors", f=2)
    want, want_info = rk.aggregate(updates, rule, f=2, return_info=True)
    got = read(tmp_path / "out.safetensors")
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert got[key].dtype == value.dtype
        assert got[key].shape == value.shape
        np.testing.assert_allclose(
            got[key].astype(float), value.astype(float), rtol=1e-2 if value.itemsize == 2 else 1e-6
        )
    assert info.nonfinite_rows == want_info.nonfinite_rows
    if want_info.kept is not None:
        assert np.array_equal(info.kept, want_info.kept)
    assert (info.n, info.d) == (want_info.n, want_info.d)
    if want_info.sq_distances is not None:
        np.testing.assert_allclose(info.sq_distances, want_info.sq_distances, rtol=1e-9)


@pytest.mark.parametrize("source", ["safetensors", "npz", "npy"])
@pytest.mark.parametrize("target", ["safetensors", "npz", "npy"])
def test_formats(tmp_path: Path, source: str, target: str) -> None:
    updates = make_updates()
    for update in updates:
        if "npz" in (source, target) or target == "npy" or source == "npy":
            del update["brain"]
        if target == "npy" and source != "npy":
            for key in list(update):
                if key != "layer.weight":
                    del update[key]
    paths = write(tmp_path / "in", updates, source)
    out = tmp_path / f"out.{target}"
    aggregate_files(paths, "median", out=out)
    got = read(out)
    want = np.median([u["layer.weight"] for u in updates], axis=0)
    name = "array" if "npy" in (source, target) else "layer.weight"
    assert np.array_equal(got[name], want)


def test_a_folder_is_a_pool_or_one_worker(tmp_path: Path) -> None:
    updates = make_updates()
    write(tmp_path / "a", updates[:4], "safetensors")
    (tmp_path / "a" / "notes.txt").write_text("not an update")
    (tmp_path / "a" / ".hidden.safetensors").write_bytes(b"not an update")
    info = aggregate_files(tmp_path / "a", "median", out=tmp_path / "out.safetensors")
    assert info.n == 4
    (tmp_path / "pool").mkdir()
    for i, update in enumerate(updates[:3]):
        write(tmp_path / "pool" / f"client_{i}", [update], "safetensors")
    assert aggregate_files([tmp_path / "pool"], "median", out=tmp_path / "out.safetensors").n == 3
    folders = [tmp_path / "pool" / f"client_{i}" for i in range(3)]
    assert aggregate_files(folders, "median", out=tmp_path / "out.safetensors").n == 3
    (tmp_path / "none").mkdir()
    with pytest.raises(
        FileError, match=r"none: the folder holds no worker: no .safetensors, .npz, .npy, .*subdirectory"
    ):
        aggregate_files([tmp_path / "none"], "median", out=tmp_path / "out.safetensors")


# ---- what cannot be used -----------------------------------------------------------------------------------------


def corrupt_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 40)


@pytest.mark.parametrize("kind", ["safetensors", "npz", "npy"])
@pytest.mark.parametrize("spoil", [corrupt_header, truncate, empty, garbage])
def test_a_broken_file_is_named_and_nothing_is_written(tmp_path: Path, kind: str, spoil: Any) -> None:
    updates = make_updates()
    for update in updates:
        del update["brain"]
    paths = write(tmp_path / "in", updates, kind)
    spoil(paths[4])
    out = tmp_path / "out" / f"merged.{kind}"
    out.parent.mkdir()
    with pytest.raises(FileError, match=rf"worker-4.{kind}: corrupt, truncated or no {kind} file \("):
        aggregate_files(paths, "ctma(median)", out=out, f=2)
    assert list(out.parent.iterdir()) == []


def test_a_file_that_breaks_while_it_is_read_leaves_the_old_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from robustkern.files import formats as files
    from robustkern.files import pieces

    paths = write(tmp_path / "in", make_updates(), "safetensors")
    out = tmp_path / "merged.safetensors"
    out.write_bytes(b"the output of yesterday")
    original = files.Held.read_into
    passes: list[str] = []

    def flaky(self: Any, data: Any, offset: int) -> Any:
        if passes:
            passes.append("read")
        if len(passes) > 20:  # in the middle of the second pass
            raise files.FileError(f"{self.path}: cannot be read (disk gone)")
        return original(self, data, offset)

    results = pieces.Source.results
    monkeypatch.setattr(pieces.Source, "results", lambda self: passes.append("judged") or results(self))
    monkeypatch.setattr(pieces.Files, "_is_stretch", lambda self, piece: False)
    monkeypatch.setattr(files.Held, "read_into", flaky)
    with pytest.raises(FileError, match="disk gone"):
        aggregate_files(paths, "ctma(median)", out=out, f=2)
    assert out.read_bytes() == b"the output of yesterday"
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["merged.safetensors"]


def test_nothing_lies_before_a_files_beginning(tmp_path: Path) -> None:
    """No file gets that far: `_check_end` refuses archives whose members would."""
    (tmp_path / "a.npy").write_bytes(b"12345678")
    for hold in (True, False):
        held = formats.Held(tmp_path / "a.npy", hold)
        with pytest.raises(FileError, match=r"a.npy: corrupt, something in it lies before its beginning$"):
            held.read(-1, 4)
        held.close()


def test_a_dtype_that_no_rule_reads(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F6_E2M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"12")
    with pytest.raises(FileError, match=r"a.safetensors: tensor 'x' has the unsupported dtype 'F6_E2M3'"):
        aggregate_files([tmp_path / "a.safetensors"], "mean", out=tmp_path / "out.safetensors")


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "owned"),)

    bomb = np.array([Bomb()], dtype=object)
    np.save(tmp_path / "a.npy", bomb, allow_pickle=True)
    np.savez(tmp_path / "b.npz", x=bomb)
    (tmp_path / "c.npy").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "d.pt").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "e.pkl").write_bytes(pickle.dumps(Bomb()))
    for name, message in (
        ("a.npy", "Python objects, which are never loaded"),
        ("b.npz", "Python objects, which are never loaded"),
        ("c.npy", "corrupt, truncated or no npy file"),
        ("d.pt", "d.pt: is no file of torch.save, or of a torch older than 1.6"),
        ("e.pkl", "e.pkl: unknown kind of file; expected one of .safetensors, .npz, .npy, .pt, .pth, .bin, .ckpt"),
    ):
        with pytest.raises(FileError, match=message):
            aggregate_files([tmp_path / name], "mean", out=tmp_path / "out.npz")
    assert not (tmp_path / "owned").exists()


def change(key: str, value: Any) -> Any:
    def apply(update: Update) -> None:
        if value is None:
            del update[key]
        else:
            update[key] = value

    return apply


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change("half", None), r"worker-2.safetensors: its tensors differ from .*worker-0.safetensors: lacks 'half'"),
        (change("more", np.ones(2)), r"worker-2.safetensors: its tensors differ .*: adds 'more'"),
        (
            change("wide", np.ones(3)),
            r"worker-2.safetensors: tensor 'wide' has shape \(3,\) and dtype float64; .*worker-0",
        ),
        (
            change("wide", np.ones((2, 2, 2), dtype=np.float32)),
            r"tensor 'wide' has shape \(2, 2, 2\) and dtype float32",
        ),
    ],
)
def test_files_that_do_not_match_are_named(tmp_path: Path, spoil: Any, message: str) -> None:
    updates = make_updates(4)
    spoil(updates[2])
    paths = write(tmp_path, updates, "safetensors")
    with pytest.raises(FileError, match=message):
        aggregate_files(paths, "median", out=tmp_path / "out.safetensors")


def test_bad_outputs(tmp_path: Path) -> None:
    paths = write(tmp_path, make_updates(3), "safetensors")
    for out, message in (
        (tmp_path / "out.pt", "unknown kind of output"),
        (tmp_path / "nowhere" / "out.npz", "the directory .*nowhere does not exist"),
        (paths[1], "is one of the updates, which are never overwritten"),
        (tmp_path / "out.npy", "an npy file holds one tensor, the updates have 9"),
        (tmp_path / "out.npz", "npz files cannot hold bfloat16"),
    ):
        with pytest.raises(FileError, match=message):
            aggregate_files(paths, "median", out=out)
    with pytest.raises(FileError, match="no update files were given"):
        aggregate_files([], "median", out=tmp_path / "out.npz")
    with pytest.raises(FileError, match=r"gone.npz: no such file"):
        aggregate_files([tmp_path / "gone.npz"], "median", out=tmp_path / "out.npz")
    save_file({}, tmp_path / "nothing.safetensors")
    np.savez(tmp_path / "nothing.npz")  # an archive of nothing but its end
    with pytest.raises(FileError, match=r"nothing.npz: holds no tensors"):
        aggregate_files([tmp_path / "nothing.npz"] * 3, "median", out=tmp_path / "out.npz")
    with pytest.raises(FileError, match=r"nothing.safetensors: holds no tensors"):
        aggregate_files([tmp_path / "nothing.safetensors"], "median", out=tmp_path / "out.npz")
    np.savez(tmp_path / "text.npz", x=np.array(["a"]))
    with pytest.raises(FileError, match=r"text.npz: tensor 'x' has dtype <U1; expected float16"):
        aggregate_files([tmp_path / "text.npz"], "median", out=tmp_path / "out.npz")
    with zipfile.ZipFile(tmp_path / "odd.npz", "w") as archive:
        archive.writestr("readme.txt", "no array")
    with pytest.raises(FileError, match=r"odd.npz: corrupt.*its member 'readme.txt' is no array"):
        aggregate_files([tmp_path / "odd.npz"], "median", out=tmp_path / "out.npz")


def npy_bytes(shape: str, data: bytes = b"") -> bytes:
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}}}".encode()
    header += b" " * (117 - len(header)) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


@pytest.mark.parametrize(
    "shape",
    [
        "(10**15,)".replace("10**15", str(10**15)),
        "(99999999999999999999,)",
        "(4294967296, 4294967296)",
        "(-1,)",
        "(5,)",
    ],
)
def test_headers_that_lie(tmp_path: Path, shape: str) -> None:
    (tmp_path / "a.npy").write_bytes(npy_bytes(shape, b"12345678"))
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("x.npy", npy_bytes(shape, b"12345678"))
    for name in ("a.npy", "b.npz"):
        with pytest.raises(FileError, match=rf"{name}: corrupt, truncated or no np. file"):
            aggregate_files([tmp_path / name], "mean", out=tmp_path / "out.npz")
    assert not (tmp_path / "out.npz").exists()


@pytest.mark.parametrize(
    ("encoding", "before"), [("utf-8-sig", ""), ("utf-16", ""), ("utf-16-le", ""), ("utf-32-be", ""), ("utf-8", " ")]
)
def test_headers_in_another_encoding(tmp_path: Path, encoding: str, before: str) -> None:
    save_file({"a": np.ones(2)}, tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = (before + whole[8 : 8 + length].decode()).encode(encoding)
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + whole[8 + length :])
    with pytest.raises(FileError, match=r"a\.safetensors: corrupt, truncated or no safetensors file"):
        aggregate_files([tmp_path / "a.safetensors"], "mean", out=tmp_path / "out.npz")


def test_names_that_a_format_cannot_hold(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **{"__metadata__": np.ones(2)})
    with pytest.raises(FileError, match="safetensors files cannot hold a tensor named '__metadata__'"):
        aggregate_files([tmp_path / "a.npz"], "mean", out=tmp_path / "out.safetensors")
    save_file({"a\0b": np.ones(2)}, tmp_path / "b.safetensors")
    with pytest.raises(FileError, match="npz files cannot hold a tensor named"):
        aggregate_files([tmp_path / "b.safetensors"], "mean", out=tmp_path / "out.npz")
    (tmp_path / "dir.npz").mkdir()
    with pytest.raises(FileError, match=r"is a directory \(name a file\)"):
        aggregate_files([tmp_path / "a.npz"], "mean", out=tmp_path / "dir.npz")
    long = tmp_path / ("n" * 245 + ".npz")
    aggregate_files([tmp_path / "a.npz"], "mean", out=long)
    assert long.exists()


def test_bad_rows_are_called_by_their_files(tmp_path: Path) -> None:
    updates = make_updates()
    for i in (1, 6, 7):
        updates[i]["wide"][0] = np.inf
    paths = write(tmp_path, updates, "safetensors")
    out = tmp_path / "out.safetensors"
    with pytest.raises(rk.NonFiniteError, match=r"3 rows hold NaN or Inf \(rows .*worker-1.*worker-6.*worker-7.*f=2"):
        aggregate_files(paths, "ctma(geometric_median)", out=out, f=2)
    for i in range(9):
        updates[i]["wide"][0] = np.nan
    paths = write(tmp_path, updates, "safetensors")
    with pytest.raises(rk.NonFiniteError, match="9 rows hold NaN or Inf"):
        aggregate_files(paths, "median", out=out)
    assert not out.exists()


def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path) -> None:
    """30 tensors of 2 MB in 8 files are 480 MB; one tensor of all files is 16 MB."""
    rng = np.random.default_rng(0)
    paths = []
    for i in range(8):
        paths.append(tmp_path / f"{i}.safetensors")
        save_file({f"t{k}": rng.standard_normal(500_000).astype(np.float32) for k in range(30)}, paths[-1])
    script = """
import sys, robustkern.files as files
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
import numpy as np, robustkern as rk, safetensors
rk.aggregate(np.ones((3, 5), dtype=np.float32), "ctma(geometric_median)", f=1)
before = peak()
files.aggregate_files(sys.argv[3:], sys.argv[1], out=sys.argv[2], f=2)
print(peak() - before)
"""
    largest = 8 * 500_000 * 4
    for rule in ("ctma(geometric_median)", "ctma(median)"):
        done = subprocess.run(
            [sys.executable, "-c", script, rule, str(tmp_path / "out.safetensors"), *map(str, paths)],
            capture_output=True,
            text=True,
            check=True,
        )
        # The tensor of all files, two more of it (result, one being read), and a few megabytes of libraries.
        assert int(done.stdout) <= largest * 10 / 8 + 10e6
