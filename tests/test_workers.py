"""Who is a worker and what he weighs; what hostile clients put into files, and what must not come of it."""

from __future__ import annotations

import gc
import json
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_files import make_updates, read, write
from typer.testing import CliRunner

import robustkern as rk
from robustkern.cli import app
from robustkern.files import (
    FileError,
    aggregate_files,
    find_workers,
    formats,
    memory_of,
    output,
    pieces,
    read_weights,
)
from robustkern.files.digest import Digest


def save(folder: Path, values: dict[str, float], kind: str = "npz") -> list[Path]:
    """Write one tensor of a value for each name."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, value in values.items():
        paths.append(folder / f"{name}.{kind}")
        data = {"w": np.full(3, value, dtype=np.float32)}
        if kind == "npz":
            np.savez(paths[-1], **data)
        else:
            save_file(data, paths[-1])
    return paths


def value(path: Path) -> float:
    return float(read(path)["w"][0])


def command(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["aggregate", *map(str, arguments)])


# ---- who is a worker -----------------------------------------------------------------------------------------------


def test_a_pool_is_in_the_natural_order_of_names(tmp_path: Path) -> None:
    save(tmp_path / "pool", {f"client-{i}": i for i in (10, 2, 1, 33, 4)})
    pool = find_workers([tmp_path / "pool"])
    assert [worker.name for worker in pool.workers] == [f"client-{i}.npz" for i in (1, 2, 4, 10, 33)]
    assert pool.folder


@given(st.lists(st.text(st.sampled_from("ab09-."), max_size=6), max_size=8))
def test_the_natural_order_is_one(names: list[str]) -> None:
    from robustkern.files.workers import natural

    assert sorted(names, key=natural) == sorted(reversed(names), key=natural)


def test_what_lies_in_a_pool_and_is_no_worker_is_told(tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    save(pool, {"a": 1, "b": 2, "c": 3})
    save(pool, {"d": 4}, "safetensors")
    for name in (".hidden.npz", "a.npz~", "b.npz.part", "x.tmp", "notes.txt"):
        (pool / name).write_bytes(b"")
    out = pool / "merged.npz"
    for _ in range(2):  # the second time the result of the first is there
        result = command(pool, "--rule", "median", "--out", out)
        assert result.exit_code == 0, result.output
        assert "4 updates of 3 numbers" in result.stdout
    ignored = " ".join(result.stderr.split())
    for name in ("'.hidden.npz' (hidden or temporary)", "'notes.txt' (no update file)", "'merged.npz' (is --out)"):
        assert name in ignored
    result = command(pool, "--rule", "median", "--out", tmp_path / "other.safetensors")
    assert result.exit_code == 0
    assert "'merged.npz' (a result of an aggregation)" in " ".join(result.stderr.split())
    assert "4 updates" in result.stdout
    aggregate_files(pool, "median", out=pool / "more.safetensors")
    assert len(find_workers([pool]).workers) == 4  # nor is that of a safetensors file


def test_an_update_with_the_name_of_the_output_is_a_worker(tmp_path: Path) -> None:
    """Only what an aggregation wrote is left out and replaced: a name is no sign of that."""
    for kind in ("npz", "safetensors"):
        pool = tmp_path / kind
        save(pool, {f"client-{i}": i for i in range(5)}, kind)
        out = pool / f"client-0.{kind}"
        before = out.read_bytes()
        linked = tmp_path / f"link.{kind}"
        linked.symlink_to(out)
        for target in (out, linked):
            with pytest.raises(FileError, match=r"is one of the updates, which are never overwritten \(name another"):
                aggregate_files(pool, "median", f=1, out=target)
            result = command(pool, "--rule", "median", "--f", "1", "--out", target)
            assert result.exit_code == 2, result.output
        assert out.read_bytes() == before
    # Shards with an index are one worker's checkpoint, whatever the output is called.
    place = tmp_path / "sharded"
    save(place, {f"model-0000{k}-of-00002": k for k in (1, 2)}, "safetensors")
    index = place / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {f"w{k}": f"model-0000{k}-of-00002.safetensors" for k in (1, 2)}}))
    with pytest.raises(FileError, match="is one worker's checkpoint"):
        aggregate_files(place, "median", f=0, out=place / "model.safetensors")
    # An earlier output in shards is left out, and replaced, as it was.
    pool = tmp_path / "again"
    save(pool, {f"client-{i}": i for i in range(3)}, "safetensors")
    for _ in range(2):
        aggregate_files(pool, "median", f=1, out=pool / "out.safetensors", shard_size=4)


@pytest.mark.parametrize("name", ["none", "no-*.npz"])
def test_what_is_not_there_is_said_before_f_is_judged(tmp_path: Path, name: str) -> None:
    result = command(tmp_path / name, "--rule", "median", "--f", "1", "--out", tmp_path / "out.npz")
    assert result.exit_code == 1
    assert f"{name}: no such file or folder" in " ".join(result.stderr.split())


def test_a_folder_among_others_is_one_worker_or_refused(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / f"c{i}", {"adapter": i})
    folders = [tmp_path / f"c{i}" for i in range(3)]
    aggregate_files(folders, "median", f=1, out=tmp_path / "out.npz")
    assert value(tmp_path / "out.npz") == 1
    save(folders[2], {f"x{k}": 1e6 for k in range(5)})
    with pytest.raises(FileError, match=r"c2: a folder is one worker: expected one update file in it.*found 6: 'adap"):
        aggregate_files(folders, "median", f=1, out=tmp_path / "out.npz")
    info = aggregate_files(folders, "median", f=1, out=tmp_path / "out.npz", bad="count")
    assert info.bad.keys() == {"c2"}
    assert value(tmp_path / "out.npz") in (0, 0.5, 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match=r"empty: a folder is one worker: .*; found 0"):
        aggregate_files([*folders[:2], tmp_path / "empty"], "median", f=1, out=tmp_path / "out.npz")


def test_the_same_file_counts_once(tmp_path: Path) -> None:
    a, b, _ = save(tmp_path / "pool", {"a": 1, "b": 2, "c": 3})
    (tmp_path / "pool" / "d.npz").symlink_to(a)
    os.link(b, tmp_path / "pool" / "e.npz")
    for paths in ([a, b, a], [tmp_path / "pool"]):
        with pytest.raises(FileError, match=r"is the same file as .*, and no worker counts twice"):
            aggregate_files(paths, "median", out=tmp_path / "out.npz")
    info = aggregate_files(tmp_path / "pool", "median", f=2, out=tmp_path / "out.npz", bad="count")
    assert info.bad.keys() == {"d.npz", "e.npz"}
    assert info.nonfinite_rows == (3, 4)


def test_workers_with_the_same_name_are_called_by_their_paths(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"c{i}", {"adapter": i})[0] for i in range(3)]
    assert [worker.name for worker in find_workers(paths).workers] == [str(path) for path in paths]


def sharded(folder: Path, update: dict[str, Any], names: dict[str, str]) -> Path:
    folder.mkdir(parents=True)
    for shard in set(names.values()):
        save_file({k: update[k] for k in update if names[k] == shard}, folder / shard, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    return index


def test_checkpoints_in_shards_are_one_worker_each_and_one_output(tmp_path: Path) -> None:
    updates = make_updates(4)
    names = {k: f"model-{1 + (i % 3):05}-of-00003.safetensors" for i, k in enumerate(updates[0])}
    indices = [sharded(tmp_path / f"c{i}", update, names) for i, update in enumerate(updates)]
    want = rk.median(updates)
    folders = [index.parent for index in indices]
    for paths in (indices, folders):
        aggregate_files(paths, "median", out=tmp_path / "out.safetensors")
        got = load_file(tmp_path / "out.safetensors")
        assert all(np.array_equal(got[k], want[k]) for k in want)
    (tmp_path / "pool").mkdir()
    for folder in folders:
        folder.rename(tmp_path / "pool" / folder.name)
    assert aggregate_files(tmp_path / "pool", "median", out=tmp_path / "out.safetensors").n == 4
    with pytest.raises(FileError, match=r"c0: is one worker's checkpoint \('model.safetensors.index.json' says so\)"):
        aggregate_files(tmp_path / "pool" / "c0", "median", out=tmp_path / "out.safetensors")
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").write_bytes(b"")
    (tmp_path / "dcp" / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(FileError, match=r"dcp: is one worker's checkpoint \('.metadata' says so\)"):
        aggregate_files(tmp_path / "dcp", "median", out=tmp_path / "out.safetensors")

    aggregate_files(tmp_path / "pool", "median", out=tmp_path / "model.safetensors", shard_size=700)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    assert index["weight_map"].keys() == want.keys()
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in want.values())
    merged = {k: v for shard in shards for k, v in load_file(tmp_path / shard).items()}
    assert all(np.array_equal(merged[k], want[k]) for k in want)
    for shard in shards:
        tensors = load_file(tmp_path / shard)
        assert len(tensors) == 1 or sum(v.nbytes for v in tensors.values()) <= 700
    again = aggregate_files(
        [tmp_path / "model.safetensors.index.json"] * 1, "median", out=tmp_path / "again.safetensors"
    )
    assert again.n == 1
    with pytest.raises(FileError, match="only safetensors files are written in shards"):
        aggregate_files(tmp_path / "pool", "median", out=tmp_path / "m.npz", shard_size=700)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: save_file({"z": np.ones(1)}, d / "stray.safetensors"), "files that its index does not name: 'stray"),
        (lambda d: (d / "s1.safetensors").unlink(), "s1.safetensors: no such file"),
        (
            lambda d: save_file({"z": np.ones(1)}, d / "s1.safetensors"),
            "holds 'z', which the index does not find there",
        ),
        (
            lambda d: save_file({"a": np.ones(2), "b": np.ones(2)}, d / "s2.safetensors"),
            r"s2.safetensors: holds 'a', as another file of .*c does",
        ),
        (lambda d: save_file({}, d / "s1.safetensors"), "lacks 'a', which its index names"),
        (lambda d: rewrite(d, {"a": "../s1.safetensors"}), r"it names '../s1.safetensors', which is no update file"),
        (lambda d: rewrite(d, {"a": 3}), r"it names '3', which is no update file"),
        (lambda d: rewrite(d, []), "its weight_map is no table"),
        (lambda d: (d / "m.index.json").write_text("[" * 100_000), "nested too deeply"),
        (lambda d: (d / "m.index.json").write_text('{"weight_map":{"a":"x.npz","a":"y.npz"}}'), "the same name twice"),
    ],
)
def test_indices_that_do_not_fit(tmp_path: Path, spoil: Callable[[Path], Any], message: str) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    save_file({"a": np.ones(2)}, folder / "s1.safetensors")
    save_file({"b": np.ones(2)}, folder / "s2.safetensors")
    rewrite(folder, {"a": "s1.safetensors", "b": "s2.safetensors"})
    others = [save(tmp_path, {f"o{i}": 1})[0] for i in range(2)]
    spoil(folder)
    with pytest.raises(FileError, match=message):
        aggregate_files([folder, *others], "median", out=tmp_path / "out.npz")


def rewrite(folder: Path, names: Any) -> None:
    (folder / "m.index.json").write_text(json.dumps({"weight_map": names}))


# ---- kinds of files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["pt", "pth", "bin", "ckpt", "PT"])
def test_files_of_torch(tmp_path: Path, suffix: str) -> None:
    rows = []
    for seed in range(5):
        torch.manual_seed(seed)
        base = torch.randn(6, 4)
        rows.append(
            {
                "w": base,
                "tied": base,
                "turned": base.t(),
                "part": base[1:3],
                "half": torch.randn(3).bfloat16(),
                "z": torch.randn(2, dtype=torch.complex64),
                "steps": torch.tensor(seed),
                "more": {"deep": torch.nn.Parameter(torch.randn(2))},
                "epoch": 3,
            }
        )
        torch.save(rows[-1], tmp_path / f"{seed}.{suffix}")
    paths = [tmp_path / f"{seed}.{suffix}" for seed in range(5)]
    for rule in ("median", "ctma(median)"):
        info = aggregate_files(paths, rule, f=1, out=tmp_path / "out.safetensors")
        flat = [{k: r[k] for k in ("w", "turned", "part", "half", "z", "steps")} for r in rows]
        with torch.no_grad():
            want = rk.aggregate(
                [f | {"more.deep": r["more"]["deep"].data} for f, r in zip(flat, rows, strict=True)], rule, f=1
            )
        got = {}
        with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
            got = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        assert got.keys() == {*want, "tied"}
        for key, tensor in want.items():
            torch.testing.assert_close(got[key], tensor)
        assert torch.equal(got["tied"], got["w"])
        assert info.d == sum(t.numel() * (2 if t.is_complex() else 1) for k, t in want.items() if k != "steps")


def test_files_of_torch_that_are_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for content, message in (
        ([torch.ones(2)], "it holds a list; expected a dict of tensors"),
        ({"w": [1, 2]}, r"its entry 'w' is a list; expected tensors, or save those"),
        ({"w" * 70_000: 1}, r"it holds more than 131,072 entries, or names too long"),
        (dict.fromkeys(range(formats.MAX_ENTRIES + 1)), r"it holds more than 131,072 entries, or names too long"),
        ({"w": torch.ones(2).to_sparse()}, "_rebuild_sparse_tensor', which is no tensor"),
        ({"w": Path("x")}, "it holds 'pathlib PosixPath', which is no tensor"),
        ({"w": torch.ones(2, dtype=torch.float8_e8m0fnu)}, "tensor 'w' has the unsupported dtype float8_e8m0fnu"),
    ):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(FileError, match=message):
            aggregate_files([tmp_path / "a.pt"], "mean", out=tmp_path / "out.npz")
    torch.save({"w": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(FileError, match=r"old.pt: is no file of torch.save, or of a torch older than 1.6 \(convert it"):
        aggregate_files([tmp_path / "old.pt"], "mean", out=tmp_path / "out.npz")
    torch.save({"w": torch.arange(100.0)}, tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:-400])
    with pytest.raises(FileError, match=r"cut.pt: "):
        aggregate_files([tmp_path / "cut.pt"], "mean", out=tmp_path / "out.npz")
    torch.save({"w": torch.ones(2)}, tmp_path / "b.pt")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"b.pt: torch is needed to read it"):
        aggregate_files([tmp_path / "b.pt"], "mean", out=tmp_path / "out.npz")


def test_members_of_npz_in_every_way_that_numpy_writes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 4096)
    monkeypatch.setattr(pieces, "LEAST_PIECE", 64)
    rng = np.random.default_rng(0)
    rows = [
        {"a": rng.standard_normal((50, 20)), "f": np.asfortranarray(rng.standard_normal((30, 40)))} for _ in range(4)
    ]
    np.savez(tmp_path / "0.npz", **rows[0])
    np.savez_compressed(tmp_path / "1.npz", **rows[1])
    save_file({k: np.ascontiguousarray(v) for k, v in rows[2].items()}, tmp_path / "2.safetensors")
    np.savez_compressed(tmp_path / "3.NPZ.npz", **rows[3])
    (tmp_path / "3.NPZ.npz").rename(tmp_path / "3.NPZ")
    paths = [tmp_path / name for name in ("0.npz", "1.npz", "2.safetensors", "3.NPZ")]
    for rule in ("median", "ctma(geometric_median)"):
        aggregate_files(paths, rule, f=1, out=tmp_path / "out.npz")
        want = rk.aggregate(rows, rule, f=1)
        for key, got in read(tmp_path / "out.npz").items():
            np.testing.assert_allclose(got, want[key], rtol=1e-12)
    with pytest.raises(FileError, match="has its axes in another order, and is too large to be read whole"):
        aggregate_files(paths, "median", out=tmp_path / "out.npz", memory=20_000)
    contiguous = [tmp_path / f"c{i}.safetensors" for i in range(3)]
    for path in contiguous:
        save_file({k: np.ascontiguousarray(v) for k, v in rows[2].items()}, path)
    info = aggregate_files([*contiguous, paths[0]], "median", f=1, out=tmp_path / "out.npz", memory=20_000, bad="count")
    assert info.bad.keys() == {"0.npz"}


@pytest.mark.parametrize("compressed", [False, True])
def test_damaged_values_of_an_archive_are_found(tmp_path: Path, compressed: bool) -> None:
    save_archive = np.savez_compressed if compressed else np.savez
    for i in range(3):
        save_archive(tmp_path / f"{i}.npz", w=np.random.default_rng(i).standard_normal(5000))
    data = bytearray((tmp_path / "1.npz").read_bytes())
    data[20_000] ^= 1
    (tmp_path / "1.npz").write_bytes(data)
    with pytest.raises(FileError, match=r"1.npz: corrupt, truncated or no npz file"):
        aggregate_files([tmp_path / f"{i}.npz" for i in range(3)], "median", out=tmp_path / "out.npz")
    info = aggregate_files(
        [tmp_path / f"{i}.npz" for i in range(3)], "median", f=1, out=tmp_path / "o.npz", bad="count"
    )
    assert info.bad.keys() == {"1.npz"}


def test_dtypes_of_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    e4, e5 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
    rows = [
        {
            "e4": rng.standard_normal(50).astype(e4),
            "e5": rng.standard_normal(50).astype(e5),
            "z": (rng.standard_normal(50) + 1j * rng.standard_normal(50)).astype(np.complex64),
            "w": rng.standard_normal(50).astype(np.float32),
        }
        for _ in range(5)
    ]
    paths = [tmp_path / f"{i}.safetensors" for i in range(5)]
    for row, path in zip(rows, paths, strict=True):
        save_plain(path, row)
    for rule in ("median", "ctma(geometric_median)"):
        for dtype in (None, "float32", "bfloat16"):
            aggregate_files(paths, rule, f=1, dtype=dtype, out=tmp_path / "out.safetensors")
            want = rk.aggregate(rows, rule, f=1, dtype=dtype)
            got = load_plain(tmp_path / "out.safetensors")
            for key, found in got.items():
                assert found.dtype == want[key].dtype
                np.testing.assert_allclose(
                    found.astype(np.complex128),
                    want[key].astype(np.complex128),
                    rtol=1e-5 if dtype != "bfloat16" else 1e-2,
                )
    with pytest.raises(FileError, match="npz files cannot hold float8_e4m3fn"):
        aggregate_files(paths, "median", out=tmp_path / "out.npz")


def save_plain(
    path: Path, tensors: dict[str, Any], header: dict[str, Any] | None = None, size: int | None = None
) -> None:
    """Write a safetensors file without asking the library, which refuses what hostile clients write."""
    names = {np.dtype(v): k for k, v in formats.CODES.items()}
    entries: dict[str, Any] = {}
    at = 0
    for name, tensor in tensors.items():
        entries[name] = {"dtype": names[tensor.dtype], "shape": tensor.shape, "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(entries | (header or {})).encode()
    data = b"".join(tensor.tobytes() for tensor in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)


def load_plain(path: Path) -> dict[str, Any]:
    reader = formats.open_reader(path)
    found = {}
    for name, tensor in reader.tensors.items():
        data = np.empty(tensor.nbytes, dtype=np.uint8)
        reader.read_into(data, name, 0)
        found[name] = data.view(tensor.dtype).reshape(tensor.shape)
    return found


# ---- weights -------------------------------------------------------------------------------------------------------


def test_weights_by_name_reach_their_workers(tmp_path: Path) -> None:
    folder, out = tmp_path / "pool", tmp_path / "out.npz"
    save(folder, {f"client-{i}": i for i in range(1, 13)})
    weights = {f"client-{i}.npz" if i % 2 else f"client-{i}": float(i == 2) for i in range(1, 13)}
    aggregate_files(folder, "mean", weights=weights, out=out)
    assert value(out) == 2
    text = ",".join(f"{name}={weight:g}" for name, weight in weights.items())
    (tmp_path / "lines").write_text("\n".join(f"{name} = {weight}" for name, weight in weights.items()))
    (tmp_path / "table.csv").write_text("\n".join(f"{name},{weight}" for name, weight in weights.items()))
    (tmp_path / "json").write_text(json.dumps(weights))
    for given_weights in (text, tmp_path / "lines", tmp_path / "table.csv", tmp_path / "json"):
        out.unlink()
        result = command(folder, "--rule", "mean", "--weights", given_weights, "--out", out)
        assert result.exit_code == 0, result.output
        assert value(out) == 2
    for given_weights, message in (
        ("client-1=1", "worker 'client-2.npz' has none"),
        (text + ",client-99=1", "'client-99' is no worker (known: 'client-1.npz', "),
        ("client-99=1", "'client-99' is no worker (known: 'client-1.npz', "),
        (text + ",client-1=1", "'client-1' has one already, under another name (name it once)"),
        (text + ",client-1.npz=1", "names a worker twice"),
        ("client-1=x", "expected numbers with commas between"),
        (",".join("1" * 12), "a list of numbers does not say which worker of a folder each is for"),
    ):
        result = command(folder, "--rule", "mean", "--weights", given_weights, "--out", out)
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.split()), result.stderr
    with pytest.raises(
        ValueError, match="weights: a list of weights does not say which worker of a folder each is for"
    ):
        aggregate_files(folder, "mean", weights=[1] * 12, out=out)
    with pytest.raises(ValueError, match="weights: expected one for each of the 1 workers; got 2"):
        aggregate_files([folder / "client-1.npz"], "mean", weights=[1, 2], out=out)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("client-1=1\nclient-2", r"expected lines such as name=3\.5"),
        ("a line without a number", r"expected lines such as name=3\.5"),
        ("client-1=1\nclient-1=2", r"names a worker twice"),
        ("client-1=much", r"'client-1' has 'much'; expected a number"),
        ('{"client-1": [1]}', r"'client-1' has '\[1\]'; expected a number"),
        ('{"a":' * 200_000, r"is nested too deeply"),
    ],
    ids=["no sign", "no number", "twice", "no float", "a list", "nested"],
)
def test_files_that_hold_no_weights(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "weights"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"weights: {message}$"):
        read_weights(path)
    save(tmp_path / "pool", {"client-1": 1, "client-2": 2})
    result = command(tmp_path / "pool", "--rule", "mean", "--weights", path, "--out", tmp_path / "out.npz")
    assert result.exit_code == 2
    assert re.search(message, " ".join(result.stderr.split())), result.stderr
    assert not (tmp_path / "out.npz").exists()


def test_weights_that_updates_claim_are_capped_and_shown(tmp_path: Path) -> None:
    paths, out = [], tmp_path / "out.npz"
    for i, claim in enumerate(("10", "20", "10", "1e15")):
        paths.append(tmp_path / f"c{i}.safetensors")
        save_file({"w": np.full(3, float(i))}, paths[-1], metadata={"num_samples": claim})
    result = command(*paths, "--rule", "mean", "--weights-from", "num_samples", "--out", out, "--json")
    assert result.exit_code == 0, result.output
    workers = json.loads(result.stdout)["workers"]
    assert [w["claimed"] for w in workers] == [10, 20, 10, 1e15]
    assert [w["used"] for w in workers] == [10, 20, 10, 150]  # ten times their median
    assert read(out)["w"][0] == pytest.approx((20 + 20 + 450) / 190)
    shown = command(*paths, "--rule", "mean", "--weights-from", "num_samples", "--cap-weights", 1, "--out", out)
    assert "claimed" in shown.stdout
    assert "1e+15" in shown.stdout
    aggregate_files(paths, "mean", weights=[1, 1, 1, 99], cap_weights=2, out=out)
    assert read(out)["w"][0] == pytest.approx((0 + 1 + 2 + 6) / 5)
    for claim in ("nan", "-1", "inf", "many", "1e999"):
        save_file({"w": np.full(3, 9.0)}, paths[2], metadata={"num_samples": claim})
        with pytest.raises(
            FileError, match=rf"c2.safetensors: claims num_samples = '{claim}'; expected a finite number"
        ):
            aggregate_files(paths, "median", weights_from="num_samples", out=out)
        info = aggregate_files(paths, "median", weights_from="num_samples", delta=0.3, out=out, bad="count")
        assert info.bad.keys() == {"c2.safetensors"}
    save_file({"w": np.full(3, 9.0)}, paths[2])
    with pytest.raises(FileError, match=r"c2.safetensors: has no 'num_samples' in its metadata"):
        aggregate_files(paths, "median", weights_from="num_samples", out=out)
    for options, message in (
        ({"weights": [1, 1, 1, 1], "weights_from": "x"}, "weights_from='x': weights= says it already"),
        ({"cap_weights": 2}, "cap_weights=2: nothing to cap"),
        ({"weights": [1, 1, 1, 1], "cap_weights": 0.5}, "cap_weights must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            aggregate_files(paths, "mean", out=out, **options)  # type: ignore[arg-type]


# ---- one client cannot block a round -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: p.write_bytes(b""), "its header should have 0 bytes"),
        (lambda p: p.unlink(), "no such file"),
        (lambda p: (p.unlink(), os.mkfifo(p)), "is no regular file"),
        (lambda p: save_file({"w": np.ones(3), "x": np.ones(1)}, p), "adds 'x'"),
        (lambda p: save_file({"v": np.ones(3)}, p), "lacks 'w', adds 'v'"),
        (lambda p: save_file({"w": np.ones(4, np.float32)}, p), r"has shape \(4,\)"),
        (lambda p: save_file({"w": np.ones(3, np.float16)}, p), r"dtype float16.*\(dtype= combines such updates\)"),
        (lambda p: save_file({"w": np.ones(3, np.int32)}, p), "has shape .* and dtype int32"),
    ],
)
@pytest.mark.parametrize("who", [0, 3])
def test_a_bad_file_is_one_of_f_or_an_error(tmp_path: Path, spoil: Any, message: str, who: int) -> None:
    paths = save(tmp_path / "in", {f"c{i}": float(i) for i in range(5)}, "safetensors")
    out = tmp_path / "out.safetensors"
    spoil(paths[who])
    with pytest.raises(FileError, match=message) as error:
        aggregate_files(paths, "ctma(median)", f=1, out=out)
    assert f"c{who}.safetensors" in str(error.value)  # the one that differs from the majority, not the first
    info = aggregate_files(paths, "ctma(median)", f=1, out=out, bad="count")
    assert info.bad.keys() == {f"c{who}.safetensors"}
    assert info.nonfinite_rows == (who,)
    assert info.weights is not None
    assert info.weights[who] == 0
    result = command(*paths, "--rule", "median", "--f", 1, "--out", out, "--bad-files", "count")
    assert result.exit_code == 0, result.output
    assert "bad file" in result.stdout
    for other in (1, 2):
        paths[other].write_bytes(b"")
    with pytest.raises(FileError, match=r"3 of 5 updates cannot be used, more than f=1; the first: .*c"):
        aggregate_files(paths, "ctma(median)", f=1, out=out, bad="count")
    with pytest.raises(ValueError, match="mean: bad='count' needs a rule that tolerates bad rows"):
        aggregate_files(paths, "mean", out=out, bad="count")
    with pytest.raises(ValueError, match="bad must be 'error' or 'count'; got 'skip'"):
        aggregate_files(paths, "median", out=out, bad="skip")


def test_integers_of_bad_files_do_not_count(tmp_path: Path) -> None:
    paths = []
    for i in range(5):
        paths.append(tmp_path / f"{i}.npz")
        np.savez(paths[-1], w=np.full(3, float(i)), n=np.array(i))
    paths[4].write_bytes(b"")
    for nonfinite in ("error", "drop"):
        aggregate_files(paths, "median", f=1, out=tmp_path / "out.npz", bad="count", nonfinite=nonfinite)
        assert int(np.load(tmp_path / "out.npz")["n"]) == 1


# ---- leaves in files -----------------------------------------------------------------------------------------------


def test_tensors_that_take_no_part_come_from_the_base(tmp_path: Path) -> None:
    updates = make_updates(5)
    paths = write(tmp_path / "in", updates, "safetensors")
    out = tmp_path / "out.safetensors"
    server = make_updates(1, seed=9)[0]
    save_file(server, tmp_path / "server.safetensors")
    chosen = ("layer.weight", "layer.bias")
    want = rk.ctma([{k: u[k] for k in chosen} for u in updates], f=1)
    for options in ({"only": "layer.*"}, {"exclude": [k for k in server if not k.startswith("layer")]}):
        info = aggregate_files(paths, "ctma(geometric_median)", f=1, out=out, **options)  # type: ignore[arg-type]
        got = load_file(out)
        assert got.keys() == set(chosen)
        assert info.d == 620
        np.testing.assert_allclose(got["layer.weight"], want["layer.weight"], rtol=1e-6)
        aggregate_files(paths, "ctma(geometric_median)", f=1, out=out, base=tmp_path / "server.safetensors", **options)  # type: ignore[arg-type]
        got = load_file(out)
        assert got.keys() == server.keys()
        for key in server.keys() - set(chosen):
            assert np.array_equal(got[key], server[key])
    spoilt = {k: v for k, v in updates[0].items() if k != "half"} | {"wide": np.full(9, np.nan)}
    save_file(spoilt, paths[0])  # what takes no part may differ as it likes
    aggregate_files(paths, "ctma(geometric_median)", f=1, out=out, only="layer.*")
    result = command(*paths, "--f", 1, "--only", "layer.*", "--base", tmp_path / "server.safetensors", "--out", out)
    assert result.exit_code == 0, result.output
    with pytest.raises(ValueError, match=r"only: 'x\*' matches no leaf"):
        aggregate_files(paths, "ctma(geometric_median)", f=1, out=out, only="x*")


@pytest.mark.parametrize("rule", ["median", "ctma(geometric_median)", "mean"])
def test_scope_and_nonfinite_of_files_are_those_of_memory(tmp_path: Path, rule: str) -> None:
    updates = make_updates(9)
    updates[2]["layer.bias"][0] = np.nan
    paths = write(tmp_path / "in", updates, "safetensors")
    out = tmp_path / "out.safetensors"
    for options in ({"scope": "leaf"}, {"nonfinite": "drop"}, {"scope": "leaf", "nonfinite": "drop"}):
        info = aggregate_files(paths, rule, f=2, out=out, **options)  # type: ignore[arg-type]
        want, known = rk.aggregate(updates, rule, f=2, return_info=True, **options)  # type: ignore[call-overload]
        got = load_file(out)
        assert got.keys() == want.keys()
        for key, tensor in want.items():
            np.testing.assert_allclose(got[key].astype(float), tensor.astype(float), rtol=1e-2 if "r" in key else 1e-6)
        assert info.leaves.keys() == known.leaves.keys()
        assert info.dropped == known.dropped
        assert info.integers == known.integers == 2


# ---- memory and time -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [3_000, 20_000, "1MiB"])
@pytest.mark.parametrize("rule", ["median", "ctma(geometric_median)", "krum"])
def test_pieces_of_any_size_give_the_same(tmp_path: Path, memory: Any, rule: str) -> None:
    updates = make_updates(5)
    paths = write(tmp_path / "in", updates, "safetensors")
    aggregate_files(paths, rule, f=1, out=tmp_path / "all.safetensors")
    aggregate_files(paths, rule, f=1, out=tmp_path / "cut.safetensors", memory=memory)
    whole, cut = load_file(tmp_path / "all.safetensors"), load_file(tmp_path / "cut.safetensors")
    for key, tensor in whole.items():
        np.testing.assert_allclose(cut[key].astype(float), tensor.astype(float), rtol=1e-2 if "r" in key else 1e-6)


def test_too_little_memory_is_said() -> None:
    for text, number in (("1GiB", 2**30), ("2 kb", 2000), ("3", 3), (5, 5), ("1.5MiB", 3 * 2**19), ("1TB", 10**12)):
        assert memory_of(text) == number
    for wrong in ("", "x", "-1", "1XB", "nan", "inf", True, "1e999"):
        with pytest.raises(ValueError, match="expected a number of bytes such as 512MiB or 2GB; got"):
            memory_of(wrong)


def test_a_budget_that_is_too_small_is_an_error(tmp_path: Path) -> None:
    paths = save(tmp_path, {"a": 1, "b": 2})
    with pytest.raises(ValueError, match=r"memory: 100 bytes are too few for 2 rows \(allow 384\)"):
        aggregate_files(paths, "median", out=tmp_path / "out.npz", memory=100)
    result = command(*paths, "--rule", "median", "--out", tmp_path / "out.npz", "--memory", "much")
    assert result.exit_code == 2
    assert "--memory: expected a number of bytes such as 512MiB or 2GB; got 'much'" in result.stderr


def test_more_files_than_may_be_open(tmp_path: Path) -> None:
    paths = save(tmp_path / "in", {f"c{i:03}": float(i) for i in range(101)}, "safetensors")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (120, hard))
    try:
        aggregate_files(paths, "ctma(median)", f=10, out=tmp_path / "out.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert value(tmp_path / "out.safetensors") == 50


def test_many_small_tensors_take_linear_time(tmp_path: Path) -> None:
    """Least seconds of this process; 16 times the tensors took over 100 times as long when they were looked up in lists."""
    seconds: dict[tuple[str, int], float] = {}
    gc.collect()
    gc.freeze()  # what other tests left: the collector would look at it again and again
    for count, times in ((500, 5), (8000, 2)):
        for kind in ("safetensors", "npz"):
            for i in range(4):
                tensors = {f"layer.{k}.weight": np.full((4, 4), i + k, np.float32) for k in range(count)}
                path = tmp_path / f"{i}.{kind}"
                save_file(tensors, path) if kind == "safetensors" else np.savez(path, **tensors)  # type: ignore[arg-type]
            updates = [tmp_path / f"{i}.{kind}" for i in range(4)]
            for _ in range(times):
                started = time.process_time()
                aggregate_files(updates, "ctma(median)", f=1, out=tmp_path / f"o.{kind}")
                taken = time.process_time() - started
                seconds[kind, count] = min(taken, seconds.get((kind, count), taken))
    gc.unfreeze()
    for kind in ("safetensors", "npz"):
        assert seconds[kind, 8000] < 60 * seconds[kind, 500]


# ---- what was judged is what is added ------------------------------------------------------------------------------


@given(st.binary(max_size=3000), st.integers(0, 2999), st.integers(1, 255))
def test_the_digest_is_its_plain_form_and_feels_every_byte(data: bytes, place: int, change: int) -> None:
    digest = Digest()
    array = np.frombuffer(data, dtype=np.uint8).copy()
    assert digest(array) == digest.plain(array)
    assert not len(array) or digest(array) != Digest()(array)  # a key of its own
    assert digest(array) != digest(np.append(array, np.uint8(0)))
    if len(array):
        array[place % len(array)] ^= change
        assert digest(array) != digest(np.frombuffer(data, dtype=np.uint8))


def swap_between_passes(monkeypatch: pytest.MonkeyPatch, swap: Callable[[], None]) -> None:
    """Let a client act when everything has been measured and nothing was written."""
    original = pieces.Source.results

    def results(self: Any) -> Any:
        swap()
        return original(self)

    monkeypatch.setattr(pieces.Source, "results", results)


def written_over(path: Path, data: bytes) -> None:
    """Change a file in place, with the same length and the same time."""
    before = path.stat()
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("rule", ["ctma(median)", "geometric_median", "krum", "nnm | median"])
@pytest.mark.parametrize("kind", ["safetensors", "npz", "npy"])
@pytest.mark.parametrize("how", ["replaced", "in place", "same time", "shortened", "grown"])
@pytest.mark.parametrize("held", [True, False])
def test_a_file_that_is_swapped_between_the_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str, kind: str, how: str, held: bool
) -> None:
    rng = np.random.default_rng(0)

    def put(path: Path, values: Any) -> None:
        if kind == "npy":
            np.save(path, values)
        elif kind == "npz":
            np.savez(path, w=values)
        else:
            save_file({"w": values}, path)

    paths = [tmp_path / f"{i}.{kind}" for i in range(5)]
    for path in paths:
        put(path, rng.standard_normal(3000))
    put(tmp_path / f"evil.{kind}", np.full(3000, 1e30))
    evil = (tmp_path / f"evil.{kind}").read_bytes()

    def swap() -> None:
        if how == "replaced":
            os.replace(tmp_path / f"evil.{kind}", paths[2])
        elif how == "grown":
            with paths[2].open("ab") as file:
                file.write(bytes(8))
        elif how == "shortened":
            os.truncate(paths[2], 9000)
        elif how == "same time":
            written_over(paths[2], evil)
        else:
            time.sleep(0.01)
            paths[2].write_bytes(evil)

    swap_between_passes(monkeypatch, swap)
    if not held:
        monkeypatch.setattr(sys.modules["robustkern.files.merge"], "descriptors", lambda: 0)
    out = tmp_path / f"out.{kind}"
    with pytest.raises(FileError, match=rf"2.{kind}: .*(changed|truncated) while it was being read|Bad CRC-32"):
        aggregate_files(paths, rule, f=1, out=out)
    assert not out.exists()
    assert not list(tmp_path.glob(".robustkern-*"))


# ---- hostile headers -----------------------------------------------------------------------------------------------


def entry(**changes: Any) -> dict[str, Any]:
    return {"w": {"dtype": "F64", "shape": [3], "data_offsets": [0, 24]} | changes}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (entry(shape=[4]), "the place of 'w' does not fit its shape"),
        (entry(data_offsets=[8, 32]), "the place of 'w' does not fit its shape, or the others' places"),
        (entry(data_offsets=[0, 24, 24]), "corrupt"),
        (entry(shape=[-3]), "shape or place of 'w' are no whole numbers"),
        (entry(shape=[3.0]), "shape or place of 'w' are no whole numbers"),
        (entry(shape=[True] * 3), "shape or place of 'w' are no whole numbers"),
        (entry(shape=[2**62, 2**62]), "does not fit its shape"),
        (entry(dtype="F128"), "unsupported dtype 'F128'"),
        (entry(dtype=["F64"]), "corrupt"),
        (entry() | {"v": entry()["w"]}, "does not fit its shape, or the others' places"),
        (
            entry() | {"v": {"dtype": "F64", "shape": [1], "data_offsets": [24, 32]}},
            "truncated or too long: .* expected",
        ),
        (entry() | {"__metadata__": {"a": 1}}, "its metadata are no texts"),
        (entry() | {"__metadata__": "a"}, "its metadata are no texts"),
        ({"\ud800": entry()["w"]}, r"the name '\\ud800' is no text"),
        ({"w": 3}, "corrupt"),
    ],
)
def test_headers_of_safetensors_that_lie(tmp_path: Path, header: dict[str, Any], message: str) -> None:
    save_plain(tmp_path / "a.safetensors", {"w": np.ones(3)}, {})
    text = json.dumps(header).encode()
    (tmp_path / "b.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + np.ones(3).tobytes())
    with pytest.raises(FileError, match=message) as error:
        aggregate_files([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], "mean", out=tmp_path / "o.npz")
    assert "b.safetensors" in str(error.value)


def ending_too_soon(path: Path, values: Any) -> None:
    """Write a compressed member that holds half of what its directory says, with the sum of that half."""
    np.save(path.with_suffix(".npy"), values)
    data = path.with_suffix(".npy").read_bytes()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w.npy", data[: len(data) // 2])
    written = bytearray(path.read_bytes())
    at = written.rindex(b"PK\1\2") + 24
    written[at : at + 4] = struct.pack("<L", len(data))
    path.write_bytes(written)


def test_headers_that_are_too_long_or_nested_are_refused_at_once(tmp_path: Path) -> None:
    started = time.process_time()
    metadata = {f"k{i}": "x" * 10 for i in range(1_000_000)}
    save_plain(tmp_path / "many.safetensors", {"w": np.ones(3)}, {"__metadata__": metadata})
    made = time.process_time() - started
    with (tmp_path / "sparse.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 1 << 40))
        file.truncate((1 << 40) + 100)
    text = b'{"w":' + b"[" * 200_000
    (tmp_path / "deep.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    digits = b'{"w":{"dtype":"F64","shape":[' + b"9" * 100_000 + b'],"data_offsets":[0,24]}}'
    (tmp_path / "digits.safetensors").write_bytes(struct.pack("<Q", len(digits)) + digits + bytes(24))
    empty = b"{'descr': '<f8', 'fortran_order': False, 'shape': (0,)}".ljust(117) + b"\n"
    with zipfile.ZipFile(tmp_path / "twice.npz", "w") as archive:
        archive.writestr("w.npy", b"\x93NUMPY\x01\x00\x76\x00" + empty)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("w.npy", b"\x93NUMPY\x01\x00\x76\x00" + empty)
    with zipfile.ZipFile(tmp_path / "slow.npz", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("w.npy", b"\x93NUMPY\x01\x00\x76\x00" + empty)
    axes = json.dumps({"w": {"dtype": "F64", "shape": [1] * 100, "data_offsets": [0, 8]}}).encode()
    (tmp_path / "axes.safetensors").write_bytes(struct.pack("<Q", len(axes)) + axes + bytes(8))
    (tmp_path / "loop.npz").symlink_to("loop.npz")
    for name in ("begun.npz", "begun.pt"):  # shorter than the end of an archive, which is looked for
        (tmp_path / name).write_bytes(b"PK\3\4")
    ending_too_soon(tmp_path / "soon.npz", np.arange(1000.0))
    started = time.process_time()
    for name, message in (
        ("slow.npz", "its member 'w.npy' is encrypted, or compressed in an unusual way"),
        ("axes.safetensors", "tensor 'w' has 100 axes, more than 64"),
        ("loop.npz", r"loop.npz: (cannot be opened \(Too many levels of symbolic links\)|no such file)"),
        ("many.safetensors", "its header has .* bytes, more than 16,777,216"),
        ("sparse.safetensors", "its header has 1,099,511,627,776 bytes, more than 16,777,216"),
        ("deep.safetensors", "nested too deeply"),
        ("digits.safetensors", "corrupt, truncated or no safetensors file"),
        ("twice.npz", "it holds 'w' twice"),
        ("begun.npz", r"begun.npz: corrupt, truncated or no npz file \(File is not a zip file\)"),
        ("begun.pt", r"begun.pt: is no file of torch.save, or of a torch older than 1.6"),
        ("soon.npz", r"soon.npz: corrupt, truncated .* \(tensor 'w' ends too soon\)"),
    ):
        with pytest.raises(FileError, match=message) as error:
            aggregate_files([tmp_path / name], "mean", out=tmp_path / "o.npz")
        assert len(str(error.value)) < 600
    assert time.process_time() - started < max(made, 2)


def test_an_archive_that_claims_much_takes_little_memory(tmp_path: Path) -> None:
    """A member of 1 GiB of zeros is 1 MB; three rows of it are read in pieces."""
    script = f"""
import resource, sys, numpy as np
from robustkern.files import aggregate_files
for i in range(3):
    np.savez_compressed(r"{tmp_path}/%d.npz" % i, w=np.zeros(1 << 24, dtype=np.float32))
aggregate_files([r"{tmp_path}/0.npz"], "median", out=r"{tmp_path}/o.npz")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    script = f"""
import resource
from robustkern.files import aggregate_files
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
aggregate_files([r"{tmp_path}/%d.npz" % i for i in range(3)], "median", out=r"{tmp_path}/o.npz", memory="8MiB")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 40_000  # KiB; a whole row is 65,536


def test_metadata_that_enough_share_are_kept_and_nobody_elses(tmp_path: Path) -> None:
    paths = []
    for i in range(5):
        paths.append(tmp_path / f"{i}.safetensors")
        own = {"format": "pt", "who": str(i)} if i else {"who": "0", "huge": "x" * 3_000_000}
        save_file({"w": np.full(3, float(i))}, paths[-1], metadata=own)
    out = tmp_path / "out.safetensors"
    aggregate_files(paths, "median", f=1, out=out)
    with safe_open(out, framework="numpy") as file:
        metadata = file.metadata()
        assert metadata.pop("robustkern").startswith("aggregated ")
        assert metadata == {"format": "pt"}
    assert out.stat().st_size < 1000
    aggregate_files(paths, "median", f=0, out=out)
    with safe_open(out, framework="numpy") as file:
        assert file.metadata().keys() == {"robustkern"}


# ---- names ---------------------------------------------------------------------------------------------------------

ESCAPES = "\x1b[2J\x1b]0;owned\x07\u202eevil\nline"


@pytest.mark.parametrize("name", ["../../../x", "/x", "a/../b", "C:/x", "..\\x", "n" * 70_000, "a\0b", ""])
def test_names_that_would_lead_who_unpacks_elsewhere(tmp_path: Path, name: str) -> None:
    save_plain(tmp_path / "a.safetensors", {name: np.ones(3)})
    with pytest.raises(FileError, match=r"o.npz: npz files cannot hold a tensor named '.*\(use another kind") as error:
        aggregate_files([tmp_path / "a.safetensors"], "mean", out=tmp_path / "o.npz")
    assert len(str(error.value)) < 500
    aggregate_files([tmp_path / "a.safetensors"], "mean", out=tmp_path / "o.safetensors")


def test_nothing_hostile_reaches_the_terminal(tmp_path: Path) -> None:
    folder = tmp_path / "pool"
    folder.mkdir()
    for i in range(3):
        save_plain(folder / f"{i}{ESCAPES}.safetensors", {f"w{ESCAPES}": np.full(3, float(i))})
    out = tmp_path / "out.safetensors"
    outputs = [command(folder, "--rule", "median", "--out", out)]
    assert outputs[0].exit_code == 0, outputs[0].output
    save_plain(folder / f"1{ESCAPES}.safetensors", {f"other{ESCAPES}" + "x" * 1_000_000: np.ones(3)})
    outputs.append(command(folder, "--rule", "median", "--out", out))
    outputs.append(command(folder, "--rule", "median", "--f", 1, "--out", out, "--bad-files", "count"))
    (folder / f"2{ESCAPES}.safetensors").write_bytes(b"\x1b[2J" * 40)
    outputs.append(command(folder, "--rule", "median", "--out", out))
    (folder / f"{ESCAPES}.txt").write_text("")
    outputs.append(command(folder, "--rule", "median", "--f", 1, "--out", out))
    for result in outputs:
        assert result.exit_code in (0, 1)
        text = result.stdout + result.stderr
        assert not any(letter in text for letter in ("\x1b", "\x07", "\u202e"))
        assert len(text) < 6000
        assert "Traceback" not in text


# ---- the output ----------------------------------------------------------------------------------------------------


def test_pipes_and_devices_are_refused_and_not_waited_for(tmp_path: Path) -> None:
    paths = save(tmp_path, {"a": 1, "b": 2})
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(FileError, match=r"pipe.npz: is no regular file \(a pipe, a device or a folder"):
        aggregate_files([*paths, tmp_path / "pipe.npz"], "median", out=tmp_path / "o.npz")
    result = command(*paths, "--rule", "median", "--out", tmp_path / "pipe.npz")
    assert result.exit_code == 2
    assert "pipe.npz: is no regular file, which are all that is ever replaced" in " ".join(result.stderr.split())
    (tmp_path / "zero.npz").symlink_to("/dev/zero")
    with pytest.raises(FileError, match=r"zero.npz: is no regular file"):
        aggregate_files([*paths, tmp_path / "zero.npz"], "median", out=tmp_path / "o.npz")


@pytest.mark.parametrize("link", [os.link, lambda a, b: b.symlink_to(a)])
def test_an_update_is_not_destroyed_through_a_link(tmp_path: Path, link: Any) -> None:
    paths = save(tmp_path, {"a": 1, "b": 2})
    before = paths[0].read_bytes()
    link(paths[0], tmp_path / "out.npz")
    with pytest.raises(FileError, match="is one of the updates, which are never overwritten"):
        aggregate_files(paths, "median", out=tmp_path / "out.npz")
    assert paths[0].read_bytes() == before


def test_what_was_written_is_looked_at_before_it_replaces_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = save(tmp_path, {"a": 1, "b": 2}, "safetensors")
    out, other = tmp_path / "out.safetensors", tmp_path / "other.safetensors"
    save_file({"w": np.ones(4)}, other)
    out.write_bytes(b"yesterday")
    monkeypatch.setattr(output._SafetensorsWriter, "put", lambda self, data: None)
    with pytest.raises(FileError, match=r"what was written cannot be read \(.*\); nothing was replaced"):
        aggregate_files(paths, "median", out=out)
    assert out.read_bytes() == b"yesterday"
    monkeypatch.undo()
    monkeypatch.setattr(output, "open_reader", lambda path, kind: formats.open_reader(other))
    with pytest.raises(FileError, match="what was written is not what was to be written; nothing was replaced"):
        aggregate_files(paths, "median", out=out)
    assert out.read_bytes() == b"yesterday"


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, data: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output._SafetensorsWriter, "put", full)
    with pytest.raises(FileError, match=r"out.safetensors: cannot be written \(No space left on device\)"):
        aggregate_files(save(tmp_path, {"a": 1, "b": 2}), "median", out=tmp_path / "out.safetensors")
    assert not list(tmp_path.glob(".robustkern-*"))


@pytest.mark.parametrize("killed", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_leaves_nothing_for_long(tmp_path: Path, killed: signal.Signals) -> None:
    for i in range(3):
        save_file({"w": np.full(1000, float(i))}, tmp_path / f"{i}.safetensors")
    script = """
import sys, time
from robustkern.files import output
def slow(self, data):
    print("writing", flush=True)
    time.sleep(60)
output._SafetensorsWriter.put = slow
from robustkern.cli import app
app(["aggregate", *sys.argv[1:]])
"""
    out = tmp_path / "out.safetensors"
    arguments = [*(str(tmp_path / f"{i}.safetensors") for i in range(3)), "--rule", "median", "--out", str(out)]
    with subprocess.Popen([sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "writing\n"
        assert len(list(tmp_path.glob(".robustkern-*.part"))) == 1
        aggregate_files([tmp_path / f"{i}.safetensors" for i in range(3)], "median", out=tmp_path / "other.safetensors")
        assert len(list(tmp_path.glob(".robustkern-*.part"))) == 1  # somebody is at it
        run.send_signal(killed)
        run.wait(30)
    assert not out.exists()
    left = len(list(tmp_path.glob(".robustkern-*.part")))
    assert left == (0 if killed == signal.SIGTERM else 1)
    aggregate_files([tmp_path / f"{i}.safetensors" for i in range(3)], "median", out=out)
    assert not list(tmp_path.glob(".robustkern-*.part"))


# ---- what a review found -------------------------------------------------------------------------------------------


def honest(folder: Path, n: int = 5, **more: Any) -> list[Path]:
    """Updates of a tensor of floats and a counter."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i in range(n):
        paths.append(folder / f"h{i}.safetensors")
        save_file(
            {"w": np.random.default_rng(i).standard_normal(50).astype(np.float32), "n": np.array(i)} | more, paths[-1]
        )
    return paths


def hostile_npy(path: Path, shape: str) -> None:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)


def npy_of_version(path: Path, version: int, *shape: int) -> None:
    np.save(path, np.ones(shape, dtype=np.float32))
    data = path.read_bytes()
    length = struct.unpack("<H", data[8:10])[0]
    path.write_bytes(data[:6] + bytes([version, 0]) + struct.pack("<I", length) + data[10:])


class Big:
    def __reduce__(self) -> Any:
        return bytearray, (2**50,)


def swapped_torch(path: Path) -> None:
    torch.save({"w": torch.ones(50), "n": torch.tensor(0)}, path)
    with zipfile.ZipFile(path) as source:
        members = [(m.filename, source.read(m)) for m in source.infolist()]
    with zipfile.ZipFile(path, "w") as target:
        for name, data in members:
            target.writestr(name, b"big" if name.endswith("byteorder") else data)


def bomb_of_dicts(path: Path) -> None:
    x: Any = {}
    for _ in range(40):
        x = {"a": x, "b": x}
    torch.save(x, path)


def index_of(folder: Path, shards: list[str]) -> None:
    folder.mkdir()
    text = json.dumps({"weight_map": {f"t{k}": shard for k, shard in enumerate(shards)}})
    (folder / "x.index.json").write_text(text)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("a.npy", lambda p: hostile_npy(p, "(" + "-" * 9000 + "1,)")),
        ("a.npy", lambda p: hostile_npy(p, f"({'1,' * 70})")),
        ("a.pt", lambda p: torch.save({"w": Big()}, p)),
        ("a.pt", swapped_torch),
        ("a.pt", bomb_of_dicts),
        ("a.pt", lambda p: torch.save({"w": torch.ones(1).expand(2**40)}, p)),
        ("a", lambda p: index_of(p, ["a\0.npz"])),
        ("a", lambda p: index_of(p, ["\ud800.npz"])),
        ("a", lambda p: index_of(p, ["x" * 300 + ".safetensors"])),
        ("a.safetensors", lambda p: p.symlink_to("/" + "y" * 300)),
        ("a", lambda p: p.symlink_to("/")),
        ("a", lambda p: p.symlink_to("..")),
        ("a", lambda p: p.symlink_to(".")),
        ("a", lambda p: index_of(p, ["\u00b21.npz"])),
        ("a\u00b2.safetensors", lambda p: p.write_bytes(b"")),
        ("a.index.json", lambda p: p.write_text("{}")),
        (
            "a.safetensors",
            lambda p: save_plain(
                p, {"w": np.ones(3)}, {"w": {"dtype": "F64", "shape": [2**63 - 1] * 40_000, "data_offsets": [0, 24]}}
            ),
        ),
        ("a.npz", lambda p: np.savez(p, w=np.ones(50, dtype=">f4"), n=np.array(1))),
        ("a.safetensors", lambda p: save_file({"v": np.ones(3)}, p)),
    ],
)
@pytest.mark.filterwarnings("ignore:.*pickle:UserWarning")
def test_no_hostile_file_blocks_a_round(tmp_path: Path, name: str, make: Any) -> None:
    pool = tmp_path / "pool"
    honest(pool)
    make(pool / name)
    started = time.process_time()
    info = aggregate_files(pool, "ctma(median)", f=1, out=tmp_path / "out.safetensors", bad="count")
    assert len(info.bad) == 1
    assert next(iter(info.bad)).startswith("a")
    with pytest.raises(FileError) as error:
        aggregate_files(pool, "ctma(median)", f=1, out=tmp_path / "out.safetensors")
    assert "pool/a" in str(error.value) or "checkpoint ('a.index.json' says so)" in str(error.value)
    assert time.process_time() - started < 5


def test_no_link_to_the_output_blocks_a_round(tmp_path: Path) -> None:
    """The second round has an output to link to; the first one that folder only, and what lies in it."""
    for name in ("out.safetensors", "out.npy"):
        pool, out = tmp_path / name / "pool", tmp_path / name / name
        honest(pool)
        for path in pool.iterdir():
            np.save(path.with_suffix(".npy"), load_file(path)["w"])
            path.unlink()
        (pool / "a").symlink_to("..")
        np.save(tmp_path / name / "one.npy", np.ones(50, dtype=np.float32))
        info = aggregate_files(pool, "median", f=1, out=out, bad="count")
        assert info.bad == {"a": f"{pool}/a: is a link to where the result goes, {out}"}
        (pool / "a").unlink()
        (pool / "a").mkdir()
        (pool / "a" / name).symlink_to(out)
        for paths in (pool, sorted(pool.iterdir())):
            info = aggregate_files(paths, "median", f=1, out=out, bad="count")
            assert info.bad == {"a": f"{pool}/a: is a link to where the result goes, {out}"}
        with pytest.raises(FileError, match="is one of the updates, which are never overwritten"):
            aggregate_files(pool, "median", f=1, out=out)


@pytest.mark.parametrize("processes", [[], ["--processes", 2]])
def test_no_name_that_is_too_long_blocks_a_round(tmp_path: Path, processes: list[Any]) -> None:
    if processes:
        pytest.importorskip("distributed")
    pool, out = tmp_path / "pool", tmp_path / "out.safetensors"
    honest(pool)
    index_of(pool / "a", ["x" * 300 + ".safetensors"])
    (pool / "nowhere").symlink_to("/" + "y" * 300)  # no update file, as any link that leads nowhere
    given = [pool, "--rule", "median", "--f", 1, "--bad-files", "count", "--out", out, "--json", *processes]
    result = command(*given)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert [worker["file"] for worker in told["workers"] if worker["verdict"] == "bad file"] == [str(pool / "a")]
    assert "File name too long" in result.stdout


@pytest.mark.parametrize("target", ["out.safetensors", "out.npz", "out.npy"])
@pytest.mark.parametrize("spoil", [lambda p: hostile_npy(p, "(True, 12)"), lambda p: npy_of_version(p, 9, 1, 12)])
def test_a_header_that_numpy_would_not_write_is_bad(tmp_path: Path, spoil: Any, target: str) -> None:
    paths = [tmp_path / f"{k}.npy" for k in range(5)]
    for path in paths[1:]:
        np.save(path, np.ones((1, 12), dtype=np.float32))
    spoil(paths[0])
    with paths[0].open("ab") as file:
        file.write(np.ones(12, dtype=np.float32).tobytes())
    info = aggregate_files(paths, "median", f=1, out=tmp_path / target, bad="count")
    assert info.bad.keys() == {"0.npy"}


def test_a_server_without_torch_is_not_blocked_by_a_torch_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest(tmp_path / "pool")
    torch.save({"w": torch.ones(50)}, tmp_path / "pool" / "a.pt")
    monkeypatch.setitem(sys.modules, "torch", None)
    info = aggregate_files(tmp_path / "pool", "median", f=1, out=tmp_path / "out.npz", bad="count")
    assert "torch is needed" in info.bad["a.pt"]


def test_links_to_everybody_push_nobody_out(tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    paths = honest(pool)
    index_of(pool / "a-evil", [f"s{k}.safetensors" for k in range(5)])
    for k, path in enumerate(paths):
        os.link(path, pool / "a-evil" / f"s{k}.safetensors")
    info = aggregate_files(pool, "median", f=1, out=tmp_path / "out.npz", bad="count")
    assert info.bad.keys() == {"a-evil"}


def test_an_index_that_names_a_missing_file_pushes_nobody_out(tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    paths = honest(pool)
    index_of(pool / "a-evil", ["s.safetensors", "missing.safetensors"])
    os.link(paths[0], pool / "a-evil" / "s.safetensors")
    info = aggregate_files(pool, "median", f=1, out=tmp_path / "out.npz", bad="count")
    assert info.bad.keys() == {"a-evil"}


def test_patterns_are_those_of_all_updates_not_of_the_first(tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    paths = honest(pool)
    save_file({"w": np.ones(50, dtype=np.float32)}, paths[0])
    info = aggregate_files(pool, "median", f=1, exclude="n", out=tmp_path / "out.npz")
    assert info.n == 5


@pytest.mark.parametrize("n", [3, 5, 9, 11])
def test_what_one_client_claims_to_weigh_blocks_nobody(tmp_path: Path, n: int) -> None:
    paths = []
    for i in range(n):
        paths.append(tmp_path / f"{i}.safetensors")
        save_file({"w": np.full(3, float(i))}, paths[-1], metadata={"samples": "1e9" if i == 1 else "10"})
    aggregate_files(paths, "median", f=1, weights_from="samples", out=tmp_path / "out.npz")
    result = command(
        *paths, "--rule", "median", "--f", 1, "--weights-from", "samples", "--out", tmp_path / "o.npz", "--json"
    )
    used = [worker["used"] for worker in json.loads(result.stdout)["workers"]]
    assert used[1] < sum(used) / 2
    assert used[1] <= 100


def test_clients_who_keep_the_models_metadata_are_workers(tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    aggregate_files(honest(pool, 3), "median", out=tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        metadata = file.metadata()
    for path in list(pool.iterdir()):
        save_file(load_file(path), path, metadata=metadata)
    assert len(find_workers([pool]).workers) == 3
    save_file(load_file(pool / "h0.safetensors"), pool / "x.safetensors", metadata={"robustkern": ""})
    assert len(find_workers([pool]).workers) == 4


@pytest.mark.parametrize("rule", ["geometric_median", "ctma(median)", "median"])
@pytest.mark.parametrize("nonfinite", ["error", "drop"])
@pytest.mark.parametrize("scope", ["update", "leaf"])
def test_integers_that_break_after_the_floats_were_judged(
    tmp_path: Path, rule: str, nonfinite: str, scope: str
) -> None:
    rows, paths = [], []
    for i in range(5):
        rows.append({"step": np.array(1000 + i), "w": np.random.default_rng(i).standard_normal(50).astype(np.float32)})
        paths.append(tmp_path / f"{i}.npz")
        np.savez(paths[-1], **rows[-1])  # type: ignore[arg-type]
    data = bytearray(paths[0].read_bytes())
    with zipfile.ZipFile(paths[0]) as archive:
        crc = struct.pack("<L", archive.getinfo("step.npy").CRC)
    data = data.replace(crc, struct.pack("<L", 7))
    paths[0].write_bytes(data)
    out = tmp_path / "out.npz"
    info = aggregate_files(paths, rule, f=1, out=out, bad="count", nonfinite=nonfinite, scope=scope)
    assert info.bad.keys() == {"0.npz"}
    got = read(out)
    np.testing.assert_allclose(got["w"], rk.aggregate([row["w"] for row in rows], rule, f=1), rtol=1e-6)
    assert int(got["step"]) == 1002  # the lower median of the four that can be read


def test_reading_errors_are_told_as_what_they_are(tmp_path: Path) -> None:
    paths = []
    for i in range(5):
        paths.append(tmp_path / f"{i}.npz")
        np.savez(paths[-1], w=np.random.default_rng(i).standard_normal(5000))
        if i < 2:
            data = bytearray(paths[-1].read_bytes())
            data[20_000] ^= 1
            paths[-1].write_bytes(data)
    for rule in ("ctma(median)", "geometric_median", "median"):
        with pytest.raises(FileError, match=r"2 of 5 updates cannot be used, more than f=1; the first: .*0.npz: .*CRC"):
            aggregate_files(paths, rule, f=1, out=tmp_path / "out.npz", bad="count")
    assert not list(tmp_path.glob(".robustkern-*"))


@pytest.mark.parametrize("kind", ["safetensors", "npz", "npy", "shards"])
@pytest.mark.parametrize("rule", ["median", "ctma(median)", "krum"])
@pytest.mark.parametrize("scope", ["update", "leaf"])
def test_masks_in_files_of_every_kind(tmp_path: Path, kind: str, rule: str, scope: str) -> None:
    paths, rows = [], []
    for i in range(5):
        x = np.random.default_rng(i).standard_normal(300)
        x[3] = np.inf
        rows.append({"w": x, "v": x[::-1].copy()} if kind != "npy" else {"array": x})
        paths.append(tmp_path / f"{i}.{'safetensors' if kind == 'shards' else kind}")
        if kind == "npy":
            np.save(paths[-1], x)
        elif kind == "npz":
            np.savez(paths[-1], **rows[-1])  # type: ignore[arg-type]
        else:
            save_file(rows[-1], paths[-1])
    out = tmp_path / f"out.{'safetensors' if kind == 'shards' else kind}"
    size = 2500 if kind == "shards" else None
    info = aggregate_files(paths, rule, f=1, out=out, scope=scope, shard_size=size)
    assert info.shared_inf == len(rows[0])
    want = rk.aggregate(rows, rule, f=1, scope=scope)  # type: ignore[call-overload]
    files = sorted(tmp_path.glob("out-*")) if kind == "shards" else [out]
    got = {k: v for file in files for k, v in read(file).items()}
    for key in want:
        np.testing.assert_array_equal(got[key], want[key])
    assert not list(tmp_path.glob(".robustkern-*"))


def test_what_belongs_to_a_worker_is_never_written(tmp_path: Path) -> None:
    paths = honest(tmp_path / "in")
    evil = tmp_path / "in" / "evil.safetensors"
    evil.write_bytes(b"unreadable")
    with pytest.raises(FileError, match="is one of the updates, which are never overwritten"):
        aggregate_files([*paths, evil], "median", f=1, bad="count", out=evil)
    assert evil.read_bytes() == b"unreadable"
    pool = tmp_path / "pool"
    for i in range(3):
        save(pool / f"c{i}", {"a": i}, "safetensors")
    save(pool / "e", {"a": 1, "b": 2}, "safetensors")
    for folder in ("c1", "e"):
        out = pool / folder / "a.safetensors"
        for paths_given in ([pool], [pool / "c0", pool / "c1", pool / "e"]):
            with pytest.raises(FileError, match=r"is in the folder of a worker, .*, which is never written to"):
                aggregate_files(paths_given, "median", f=1, bad="count", out=out)
        result = command(pool, "--rule", "median", "--f", 1, "--bad-files", "count", "--out", out)
        assert result.exit_code == 2


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--processes", 2],
        ["--only", "w", "--base"],
        ["--rule", "centred_clipping(tau=1)", "--centre"],
    ],
)
def test_an_output_that_is_an_input_is_not_understood(tmp_path: Path, more: list[Any]) -> None:
    paths = honest(tmp_path)
    before = paths[0].read_bytes()
    given = paths if not str(more[-1:]).startswith("['--") else paths[1:]
    rule = [] if "--rule" in more else ["--rule", "median"]
    last = [paths[0]] if given is not paths else []
    result = command(*given, *rule, "--f", 1, "--out", paths[0], *more, *last)
    assert result.exit_code == 2
    assert "is one of the updates, which are never overwritten" in " ".join(result.stderr.split())
    assert paths[0].read_bytes() == before


def test_an_output_that_is_a_link_to_itself(tmp_path: Path) -> None:
    for k in range(3):
        save(tmp_path / f"c{k}", {"a": k}, "safetensors")
    out = tmp_path / "out.safetensors"
    out.symlink_to(out)
    with pytest.raises(FileError, match=r"out\.safetensors: cannot be written \(Too many levels of symbolic links\)"):
        aggregate_files([tmp_path / f"c{k}" for k in range(3)], "median", out=out)


def test_shards_beside_the_updates_are_no_workers_next_time(tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    honest(pool)
    for _ in range(3):
        info = aggregate_files(pool, "median", out=pool / "model.safetensors", shard_size=100)
        assert info.n == 5
    assert len(list(pool.glob("model*"))) == 3


def test_an_output_takes_the_place_of_an_earlier_one_as_a_whole(tmp_path: Path) -> None:
    paths, out = honest(tmp_path / "pool"), tmp_path / "m" / "model.safetensors"
    out.parent.mkdir()
    others = [out.with_name(name) for name in ("model-1.safetensors", "model-00001-of-00009.safetensors", "x")]
    for other in others:
        other.write_text("mine")
    for size, files in ((100, 3), (None, 1), (10**6, 1), (1, 3), (100, 3), (None, 1)):
        aggregate_files(paths, "median", out=out, shard_size=size)
        assert len({path for path in out.parent.iterdir() if path not in others}) == files
    assert all(other.read_text() == "mine" for other in others)


@pytest.mark.parametrize("size", [None, 100])
def test_models_of_others_in_shards_stay(tmp_path: Path, size: int | None) -> None:
    """Whose index and shards have the names that the output's would have, as a model's of transformers."""
    paths, out = honest(tmp_path / "pool"), tmp_path / "m" / "model.safetensors"
    out.parent.mkdir()
    shard, index = out.with_name("model-00001-of-00002.safetensors"), Path(f"{out}.index.json")
    save_file({"a": np.ones(3)}, shard)
    elsewhere = tmp_path / "model-00001-of-00002.safetensors"
    aggregate_files(paths, "median", out=elsewhere)
    linked = tmp_path / "linked.json"
    linked.write_text(json.dumps({"weight_map": {}}))
    for content in (
        [shard.name],
        ["x"],
        [f"../{elsewhere.name}"],
        ["model-00002-of-00002.safetensors"],
        [1],
        None,
        "link",
    ):
        index.unlink(missing_ok=True)
        if content == "link":
            index.symlink_to(linked)
        else:
            index.write_text("{" if content is None else json.dumps({"weight_map": dict(enumerate(content))}))
        before = {path: path.read_bytes() for path in out.parent.iterdir()}
        with pytest.raises(FileError, match=r"index\.json: names files that are no output .* choose another name\)"):
            aggregate_files(paths, "median", out=out, shard_size=size)
        assert {path: path.read_bytes() for path in out.parent.iterdir()} == before
    assert elsewhere.exists()


def test_an_earlier_output_that_is_an_update_stays(tmp_path: Path) -> None:
    paths, out = honest(tmp_path / "pool"), tmp_path / "model.safetensors"
    aggregate_files(paths, "median", out=out)
    with pytest.raises(FileError, match=r"model\.safetensors: is one of the updates, which are never overwritten"):
        aggregate_files([*paths, out], "median", out=out, shard_size=100)
    aggregate_files(paths, "median", out=out, shard_size=100)
    shard = sorted(tmp_path.glob("model-*"))[0]
    with pytest.raises(FileError, match=r"model-00001-of-.* is one of the updates, which are never overwritten"):
        aggregate_files([*paths, shard], "median", f=1, out=out, bad="count")
    assert len(list(tmp_path.glob("model*"))) == 3


def test_integers_only_leaf_by_leaf(tmp_path: Path) -> None:
    for i in range(3):
        np.savez(tmp_path / f"{i}.npz", a=np.arange(3) + i, b=np.arange(2) * i)
    for suffix in ("npz", "safetensors"):
        out = tmp_path / f"out.{suffix}"
        aggregate_files([tmp_path / f"{i}.npz" for i in range(3)], "median", scope="leaf", out=out)
        assert read(out)["a"].tolist() == [1, 2, 3]
        with pytest.raises(TypeError, match="the updates hold integers only"):
            aggregate_files([tmp_path / f"{i}.npz" for i in range(3)], "krum", f=0, scope="leaf", out=out)


def test_a_float8_tensor_that_is_turned(tmp_path: Path) -> None:
    for dtype in (torch.float8_e5m2, torch.float8_e4m3fn, torch.bfloat16, torch.complex64):
        rows = []
        for i in range(3):
            torch.manual_seed(i)
            rows.append(torch.randn(4, 3).to(dtype).t())
            torch.save({"w": rows[-1]}, tmp_path / f"{i}.pt")
        aggregate_files([tmp_path / f"{i}.pt" for i in range(3)], "median", out=tmp_path / "out.safetensors")
        want = rk.median([{"w": row.contiguous()} for row in rows])["w"]
        with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
            assert torch.equal(file.get_tensor("w").to(torch.complex64), want.to(torch.complex64))


def test_a_directory_of_an_archive_is_bounded_however_it_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.comment = b""
        for k in range(3):
            archive.writestr(f"{k}" * 60_000 + ".npy", b"")
    data = (tmp_path / "a.npz").read_bytes()
    at = data.rfind(b"PK\5\6")
    size, place = struct.unpack_from("<LL", data, at + 12)
    assert size > 180_000
    monkeypatch.setattr(formats, "MAX_HEADER", 150_000)
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 3, 3, size, place)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, at, 1)
    end = data[at : at + 12] + struct.pack("<LL", 0, 0) + data[at + 20 :]
    (tmp_path / "a.npz").write_bytes(data[:at] + record + locator + end)
    with pytest.raises(FileError, match=r"its directory has 18\d,\d+ bytes, more than 150,000"):
        aggregate_files([tmp_path / "a.npz"], "mean", out=tmp_path / "o.npz")


def test_what_only_looks_like_a_leftover_is_left(tmp_path: Path) -> None:
    paths = honest(tmp_path)
    os.mkfifo(tmp_path / f".robustkern-{'a' * 16}.part")
    (tmp_path / ".robustkern-notes.partial.txt").write_text("mine")
    aggregate_files(paths, "median", out=tmp_path / "out.npz")
    assert (tmp_path / ".robustkern-notes.partial.txt").read_text() == "mine"


def test_weights_in_files_that_are_none(tmp_path: Path) -> None:
    paths = honest(tmp_path, 2)
    for text, message in (
        ('{"h0": 1, "h0": 2, "h1": 1}', "names a worker twice"),
        ('{"h0": null, "h1": 1}', "'h0' has 'None'; expected a number"),
        ("[" * 100_000, "expected"),
        ('{"a":' * 100_000, "is nested too deeply"),
        ("h0=1\nh1=x", "'h1' has 'x'; expected a number"),
    ):
        (tmp_path / "weights").write_text(text)
        result = command(*paths, "--rule", "mean", "--weights", tmp_path / "weights", "--out", tmp_path / "o.npz")
        assert result.exit_code == 2, result.output
        assert message in " ".join(result.stderr.split())
        assert "Traceback" not in result.output
    result = command(tmp_path / "nope", "--rule", "mean", "--out", tmp_path / "o.npz")
    assert "nope: no such file or folder" in " ".join(result.stderr.split())


def test_many_keys_of_metadata_cost_little(tmp_path: Path) -> None:
    paths = honest(tmp_path, 30)
    keys = {f"k{i}": "x" for i in range(200_000)}
    save_file(load_file(paths[0]), paths[0], metadata=keys)
    started = time.process_time()
    aggregate_files(paths, "median", f=1, out=tmp_path / "out.npz")
    assert time.process_time() - started < 5
