"""Checkpoint folders of torch.distributed by one process, and hostile ones; by several: `test_distributed.py`."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import robustkern as rk
from robustkern.cli import app

pytest.importorskip("torch.distributed.checkpoint")
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

import robustkern.distributed as rd


def saved(state: Any, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def states() -> list[dict[str, Any]]:
    g = torch.Generator().manual_seed(0)
    made = [
        {
            "m": {"w": torch.randn(50, 3, generator=g), "b": torch.randn((), generator=g).to(torch.bfloat16)},
            "n": torch.tensor([k, 7]),
        }
        for k in range(5)
    ]
    made[1]["m"]["w"] *= 1e6
    return made


def flat(state: dict[str, Any]) -> dict[str, Any]:
    return {"m.b": state["m"]["b"], "m.w": state["m"]["w"], "n": state["n"]}


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [saved({**state, "step": k, "name": "x"}, tmp_path / f"client-{k}") for k, state in enumerate(states())]


def loaded(folder: Path) -> dict[str, Any]:
    found = {name: torch.empty_like(x) for name, x in flat(states()[0]).items()}
    dcp.load(found, checkpoint_id=folder, no_dist=True)
    return found


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("rule", ["median", "krum", "ctma(geometric_median)", "nnm | trimmed_mean"])
def test_checkpoints_of_one_process(rule: str, folders: list[Path], tmp_path: Path) -> None:
    info = rd.aggregate_checkpoints(folders, rule, f=1, out=tmp_path / "out")
    want, told = rk.aggregate([flat(state) for state in states()], rule, f=1, return_info=True)
    found = loaded(tmp_path / "out")
    assert all(torch.equal(found[name], x) for name, x in want.items())
    assert (info.d, info.order) == (told.d, told.order)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_command(folders: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "new"
    command = ["aggregate", *map(str, folders), "--rule", "ctma(median)", "--f", "1", "--out"]
    result = CliRunner().invoke(app, [*command, str(out)])
    assert result.exit_code == 0, result.output
    assert "client-1" in result.output
    assert "dropped" in result.output
    found = loaded(out)
    want = rk.aggregate([flat(state) for state in states()], "ctma(median)", f=1)
    assert torch.equal(found["m.w"], want["m.w"])
    again = CliRunner().invoke(app, [*command, str(out)])
    assert again.exit_code != 0
    assert "is there already" in again.output
    inside = tmp_path / "pool"
    inside.mkdir()
    for folder in folders:
        folder.rename(inside / folder.name)
    result = CliRunner().invoke(
        app, ["aggregate", str(inside), "--rule", "median", "--json", "--out", str(tmp_path / "of pool")]
    )
    assert result.exit_code == 0, result.output
    refused = CliRunner().invoke(app, ["aggregate", str(inside), "--scope", "leaf", "--out", str(tmp_path / "x")])
    assert refused.exit_code != 0
    assert "--scope: not with checkpoint folders" in refused.output


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def index_of(folder: Path) -> Any:
    with open(folder / ".metadata", "rb") as file:
        return pickle.load(file)


def rewritten(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        index = index_of(folder)
        change(index)
        (folder / ".metadata").write_bytes(pickle.dumps(index))

    return damage


def places(**fields: Any) -> Callable[[Any], None]:
    def change(index: Any) -> None:
        index.storage_data = {
            key: _StorageInfo(**{**vars(value), **fields}) if key.offset is not None else value
            for key, value in index.storage_data.items()
        }

    return change


def overlapping(index: Any) -> None:
    """Two pieces of half of a tensor, both its first half: as many numbers as it has."""
    chunks = index.state_dict_metadata["m.w"].chunks
    chunks[:] = [ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([25, 3])) for _ in range(2)]


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "code": (lambda folder: (folder / ".metadata").write_bytes(pickle.dumps(Evil())), "it names posix.system, which torch does not write"),
    "code in the index": (rewritten(lambda index: setattr(index, "planner_data", Evil())), "it names posix.system"),
    "no pickle": (lambda folder: (folder / ".metadata").write_bytes(b"\x1b[31mtext"), "its index cannot be read"),
    "empty": (lambda folder: (folder / ".metadata").write_bytes(b""), "its index cannot be read"),
    "no index": (lambda folder: (folder / ".metadata").unlink(), "is no checkpoint of torch.distributed"),
    "another object": (lambda folder: (folder / ".metadata").write_bytes(pickle.dumps([1])), "its index cannot be read"),
    "no tensors": (rewritten(lambda index: index.state_dict_metadata.clear()), "holds no tensors"),
    "other places": (rewritten(places(relative_path="../client-0/__0_0.distcp")), "a piece lies in '../client-0/__0_0.distcp'"),
    "beyond the file": (rewritten(places(offset=1 << 40)), "cannot be read"),
    "much memory": (rewritten(places(length=1 << 40)), "says it takes 1099511627776 bytes"),
    "nowhere": (rewritten(lambda index: index.storage_data.clear()), r"tensor 'm.b': its piece at \(\) is nowhere"),
    "another key": (rewritten(lambda index: index.state_dict_metadata.pop("n")), r"tensor 'n' is none, where most checkpoints have \(\(2,\), 'torch.int64'\)"),
    "holes": (rewritten(lambda index: index.state_dict_metadata["m.w"].chunks.clear()), r"the pieces of a tensor of \(50, 3\) hold 0 of its numbers"),
    "outside": (rewritten(lambda index: setattr(index.state_dict_metadata["m.w"].chunks[0], "offsets", torch.Size([9, 0]))), "lies outside of a tensor"),
    "overlap": (rewritten(overlapping), "its pieces overlap and leave numbers out"),
    "no numbers": (rewritten(lambda index: setattr(index.state_dict_metadata["m.w"].chunks[0], "sizes", [50.0, 3])), "are no whole numbers"),
    "truncated": (lambda folder: (folder / "__0_0.distcp").write_bytes((folder / "__0_0.distcp").read_bytes()[:3000]), "cannot be read"),
    "no file": (lambda folder: (folder / "__0_0.distcp").unlink(), "cannot be read"),
    "a FIFO": (lambda folder: ((folder / "__0_0.distcp").unlink(), os.mkfifo(folder / "__0_0.distcp")), "cannot be read"),
    "another tensor": (rewritten(places(offset=0, length=1261)), "cannot be read|is not the tensor"),
}  # fmt: skip


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_hostile_checkpoints(damage: str, folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    change, message = DAMAGES[damage]
    change(folders[3])
    with pytest.raises(ValueError, match=message) as caught:
        rd.aggregate_checkpoints(folders, "median", out=tmp_path / "out")
    assert "client-3" in str(caught.value)
    assert len(str(caught.value)) < 600
    assert "\x1b" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "ran").exists()


def with_nan(*bad: int) -> list[dict[str, Any]]:
    """All updates as tensors by name, some of them NaN, with the integers of the first."""
    rows = [flat(state) for state in states()]
    for k in bad:
        rows[k] = {name: torch.full_like(x, torch.nan) if x.is_floating_point() else x for name, x in rows[0].items()}
    return rows


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("damage", list(DAMAGES))
def test_hostile_checkpoints_that_count(
    damage: str, folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    change, message = DAMAGES[damage]
    change(folders[3])
    info = rd.aggregate_checkpoints(folders, "ctma(median)", f=1, out=tmp_path / "out", bad="count")
    assert list(info.bad) == [str(folders[3])]
    assert re.search(message, info.bad[str(folders[3])])
    assert "\x1b" not in info.bad[str(folders[3])]
    assert (info.n, info.nonfinite_rows) == (5, (3,))
    want = rk.aggregate(with_nan(3), "ctma(median)", f=1)
    found = loaded(tmp_path / "out")
    assert all(torch.equal(found[name], x) for name, x in want.items())
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_command_counts(folders: list[Path], tmp_path: Path) -> None:
    (folders[3] / ".metadata").unlink()  # so that it is not even seen as one
    DAMAGES["truncated"][0](folders[4])
    pool = tmp_path / "pool"
    pool.mkdir()
    places = [folder.rename(pool / folder.name) for folder in folders]
    for updates in ([pool], places):
        out = tmp_path / f"out-{len(updates)}"
        command = ["aggregate", *map(str, updates), "--rule", "median", "--f", "2", "--out", str(out), "--json"]
        result = CliRunner().invoke(app, [*command, "--bad-files", "count"])
        assert result.exit_code == 0, result.output
        workers = json.loads(result.output)["workers"]
        bad = [Path(worker["file"]).name for worker in workers if worker["verdict"] == "bad file"]
        assert bad == ["client-3", "client-4"]
        found = loaded(out)
        want = rk.aggregate(with_nan(3, 4), "median", f=2)
        assert all(torch.equal(found[name], x) for name, x in want.items())
    refused = CliRunner().invoke(app, [*command[:-3], str(tmp_path / "never")])
    assert refused.exit_code != 0
    assert not (tmp_path / "never").exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_counts_as_bad(folders: list[Path], tmp_path: Path) -> None:
    def attempt(match: str, paths: list[Path], rule: str = "median", f: int | None = 1, bad: Any = "count") -> None:
        with pytest.raises(ValueError, match=match):
            rd.aggregate_checkpoints(paths, rule, f=f, out=tmp_path / "out", bad=bad)
        assert not (tmp_path / "out").exists()

    attempt("bad must be 'error' or 'count'; got 'drop'", folders, bad="drop")
    attempt("mean: bad='count' needs a rule that tolerates bad rows", folders, "mean", None)
    info = rd.aggregate_checkpoints([*folders, folders[1]], "median", f=1, out=tmp_path / "twice", bad="count")
    assert [info.n, *info.bad] == [6, str(folders[1])]
    assert "no worker counts twice" in info.bad[str(folders[1])]
    missing = tmp_path / "none"
    attempt("2 of 7 updates cannot be used, more than f=1; the first: .*none: is no", [*folders, missing, folders[0]])
    attempt("no checkpoint can be used; the first: .*none: is no checkpoint", [missing, missing])
    for k in (3, 4):
        DAMAGES["truncated"][0](folders[k])
    attempt("2 of 5 updates cannot be used, more than f=1; the first: .*client-3: tensor '.*': cannot be read", folders)
    hidden = folders[2].rename(tmp_path / "client-\x1b[31m2")
    (hidden / ".metadata").unlink()
    info = rd.aggregate_checkpoints([*folders[:2], hidden], "median", f=1, out=tmp_path / "three", bad="count")
    (reason,) = info.bad.values()
    assert "\x1b" not in reason


def test_a_file_that_changes_between_passes(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from robustkern.distributed.checkpoints import _Checkpoints

    results = _Checkpoints.results

    def changing(self: Any) -> Any:
        data = (folders[3] / "__0_0.distcp").read_bytes()
        (folders[3] / "__0_0.distcp").write_bytes(data + b"\0")
        return results(self)

    monkeypatch.setattr(_Checkpoints, "results", changing)
    with pytest.raises(ValueError, match=re.escape("'__0_0.distcp' has changed while it was read")):
        rd.aggregate_checkpoints(folders, "krum", f=1, out=tmp_path / "out")


def as_shards(folder: Path, state: dict[str, Any]) -> Path:
    folder.mkdir()
    names = list(state)
    files = {name: f"model-{1 + (k > 0)}.safetensors" for k, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: state[name] for name in names if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


def test_safetensors_of_one_process(folders: list[Path], tmp_path: Path) -> None:
    """Shards, whole files and DCP folders are one checkpoint each, whatever the others are; and are written as asked."""
    rows = [{**flat(state), "mask": torch.tensor([k < 4, False])} for k, state in enumerate(states())]
    places = [as_shards(tmp_path / f"s{k}", row) for k, row in enumerate(rows)]
    save_file(rows[1], tmp_path / "whole.safetensors")
    saved(rows[2], tmp_path / "dcp")
    paths = [
        *places[:1],
        tmp_path / "whole.safetensors",
        tmp_path / "dcp",
        places[3] / "model.safetensors.index.json",
        places[4],
    ]
    out = tmp_path / "new.safetensors"
    rd.aggregate_checkpoints(paths, "ctma(median)", f=1, out=out, memory=1)
    want = rk.aggregate(rows, "ctma(median)", f=1)
    found = load_file(out)
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], x) for name, x in want.items())
    rk.aggregate_files([*places[:4], tmp_path / "s4"], "ctma(median)", f=1, out=tmp_path / "other.safetensors")
    assert out.read_bytes() == (tmp_path / "other.safetensors").read_bytes()
    rd.aggregate_checkpoints(places, "median", f=1, out=out, only="n")  # an output is replaced, as the command does
    assert load_file(out).keys() == {"n"}


def test_bytes_of_booleans_are_read_as_such(tmp_path: Path) -> None:
    for k in range(3):
        save_file({"b": torch.tensor([k > 0, False])}, tmp_path / f"{k}.safetensors")
    data = (tmp_path / "1.safetensors").read_bytes()
    (tmp_path / "1.safetensors").write_bytes(data[:-2] + b"\x07\x00")
    rd.aggregate_checkpoints(
        [tmp_path / f"{k}.safetensors" for k in range(3)], "mean", out=tmp_path / "out.safetensors"
    )
    assert load_file(tmp_path / "out.safetensors")["b"].tolist() == [True, False]


SHARDS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda folder: (folder / "model-2.safetensors").write_bytes((folder / "model-2.safetensors").read_bytes()[:-1]), "model-2.safetensors: corrupt, truncated"),
    "a shard less": (lambda folder: (folder / "model-2.safetensors").unlink(), "no such file"),
    "a stray": (lambda folder: (folder / "model-3.safetensors").write_bytes(b""), "files that its index does not name"),
    "another index": (lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"m.w": "../x.safetensors"}}'), "which is no update file beside it"),
    "another kind": (lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"m.w": "x.npy"}}'), "x.npy: no such file|files that its index does not name"),
    "another shape": (lambda folder: save_file({"m.b": torch.zeros(2)}, folder / "model-1.safetensors"), r"tensor 'm.b' is \(\(2,\), 'torch.float32'\), where most checkpoints have \(\(\), 'torch.bfloat16'\)"),
    "nothing": (lambda folder: [path.unlink() for path in folder.iterdir()], "is no checkpoint of torch.distributed"),
}  # fmt: skip


@pytest.mark.parametrize("damage", list(SHARDS))
def test_hostile_shards(damage: str, tmp_path: Path) -> None:
    places = [as_shards(tmp_path / f"client-{k}", flat(state)) for k, state in enumerate(states())]
    change, message = SHARDS[damage]
    change(places[3])
    with pytest.raises(ValueError, match=message) as caught:
        rd.aggregate_checkpoints(places, "median", f=1, out=tmp_path / "out.safetensors")
    assert "client-3" in str(caught.value)
    assert len(str(caught.value)) < 600
    assert not (tmp_path / "out.safetensors").exists()
    assert not list(tmp_path.glob(".*"))


def test_where_safetensors_cannot_go(tmp_path: Path) -> None:
    places = [as_shards(tmp_path / f"client-{k}", flat(state)) for k, state in enumerate(states())]
    (tmp_path / "x.npy").write_bytes(b"")
    for options, message in (
        ({"out": places[0] / "x.safetensors"}, "is in the folder of a worker"),
        ({"out": tmp_path / "no" / "x.safetensors"}, "does not exist"),
        ({"out": tmp_path / "x", "shard_size": 5}, r"shard_size is for safetensors \(name out something.safetensors\)"),
        ({"out": tmp_path / "x.safetensors", "shard_size": 0}, "shard_size must be None or a number of bytes, at least 1; got 0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            rd.aggregate_checkpoints(places, "median", **options)  # type: ignore[arg-type]


def test_no_shard_of_an_index_is_replaced(tmp_path: Path) -> None:
    places = [as_shards(tmp_path / f"client-{k}", flat(state)) for k, state in enumerate(states())]
    indexes = [place / "model.safetensors.index.json" for place in places]
    before = (places[1] / "model-2.safetensors").read_bytes()
    with pytest.raises(ValueError, match="is one of the updates, which are never overwritten"):
        rd.aggregate_checkpoints(indexes, "median", out=places[1] / "model-2.safetensors")
    assert (places[1] / "model-2.safetensors").read_bytes() == before
    with pytest.raises(ValueError, match="is in the folder of a worker"):
        rd.aggregate_checkpoints(places, "median", out=places[0] / "new")
    with pytest.raises(ValueError, match=r"ranks write safetensors, or DCP folders \(name it something.safetensors\)"):
        rd.aggregate_checkpoints(places, "median", out=tmp_path / "new.npz")
    assert not (places[0] / "new").exists()


def test_no_file_counts_twice(folders: list[Path], tmp_path: Path) -> None:
    for k, state in enumerate(states()):
        save_file(flat(state), tmp_path / f"{k}.safetensors")
    os.link(tmp_path / "3.safetensors", tmp_path / "5.safetensors")
    os.symlink(tmp_path / "2.safetensors", tmp_path / "6.safetensors")
    for number, other in ((5, 3), (6, 2)):
        paths = [tmp_path / f"{k}.safetensors" for k in (0, 1, 2, 3, number)]
        with pytest.raises(
            ValueError, match=rf"{number}.safetensors: is the same file as .*{other}.safetensors, and no"
        ):
            rd.aggregate_checkpoints(paths, "median", f=1, out=tmp_path / "out.safetensors")
    with pytest.raises(ValueError, match=r"client-1: is the same file as .*client-1, and no worker counts twice"):
        rd.aggregate_checkpoints([*folders[:3], folders[1]], "median", f=1, out=tmp_path / "out")


def test_a_shape_that_is_none_for_torch(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [0, 1 << 62, 1 << 62], "data_offsets": [0, 0]}}).encode()
    paths = [tmp_path / f"{k}.safetensors" for k in range(3)]
    for path in paths:
        path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match=r"0.safetensors: tensor 'a' of shape \(0, .*\) is none for torch"):
        rd.aggregate_checkpoints(paths, "median", out=tmp_path / "out.safetensors")


def test_a_shard_that_changes_between_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = [as_shards(tmp_path / f"client-{k}", flat(state)) for k, state in enumerate(states())]
    from robustkern.distributed.checkpoints import _Checkpoints

    results = _Checkpoints.results

    def changing(self: Any) -> Any:
        file = places[3] / "model-2.safetensors"
        file.write_bytes(file.read_bytes())
        return results(self)

    monkeypatch.setattr(_Checkpoints, "results", changing)
    with pytest.raises(ValueError, match=r"model-2.safetensors: changed while it was being read"):
        rd.aggregate_checkpoints(places, "krum", f=1, out=tmp_path / "out.safetensors")


def test_the_command_on_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun starts it: then ranks read safetensors too, and write shards."""
    inside = tmp_path / "pool"
    inside.mkdir()
    for k, state in enumerate(states()):
        save_file(flat(state), inside / f"client-{k}.safetensors")
    out = tmp_path / "out.safetensors"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "robustkern", "aggregate"]
    command += [str(inside), "--rule", "krum", "--f", "1", "--shard-size", "500", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "client-1" in done.stdout
    found = {name: x for file in sorted(tmp_path.glob("out-*.safetensors")) for name, x in load_file(file).items()}
    want = rk.aggregate([flat(state) for state in states()], "krum", f=1)
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], x) for name, x in want.items())
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("RANK", "0")
    refused = CliRunner().invoke(app, ["aggregate", str(inside), "--scope", "leaf", "--out", str(out)])
    assert refused.exit_code == 2
    assert "--scope: not with checkpoint folders" in refused.output


def test_what_cannot_be_asked_for(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are no checkpoints"):
        rd.aggregate_checkpoints([], "median", out=tmp_path / "out")
    with pytest.raises(ValueError, match="only: 'x' matches no leaf"):
        rd.aggregate_checkpoints(folders, "median", out=tmp_path / "out", only="x")
    for paths, kind in ((str(folders[0]), "str"), (folders[0], "PosixPath"), (set(folders), "set"), (3, "int")):
        with pytest.raises(
            TypeError, match=rf"paths is {kind}; expected a list, one path a worker \(pass \[path, ...\]\)"
        ):
            rd.aggregate_checkpoints(paths, "median", out=tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"path 5 is int; expected a path \(pass str\(path\)\)"):
        rd.aggregate_checkpoints([*folders, 3], "median", out=tmp_path / "out")  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"out is NoneType; expected a path \(pass str\(out\)\)"):
        rd.aggregate_checkpoints(folders, "median", out=None)  # type: ignore[arg-type]
    for memory in ("1GB", 0, 1.5, True):
        with pytest.raises(ValueError, match=rf"memory must be a number of bytes, at least 1; got {memory!r}"):
            rd.aggregate_checkpoints(folders, "median", out=tmp_path / "out", memory=memory)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_paths_that_are_made_one_by_one(folders: list[Path], tmp_path: Path) -> None:
    rd.aggregate_checkpoints((path for path in folders), "median", f=1, out=tmp_path / "out")  # type: ignore[arg-type]
    want = rk.aggregate([flat(state) for state in states()], "median", f=1)
    assert torch.equal(loaded(tmp_path / "out")["m.w"], want["m.w"])
