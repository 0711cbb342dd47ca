"""Checkpoint folders of torch.distributed by one process, and hostile ones; by several: `test_distributed.py`."""

from __future__ import annotations

import os
import pickle
import re
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
    "nowhere": (rewritten(lambda index: index.storage_data.clear()), "is nowhere"),
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


def test_what_cannot_be_asked_for(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are no folders"):
        rd.aggregate_checkpoints([], "median", out=tmp_path / "out")
    with pytest.raises(ValueError, match="only: 'x' matches no leaf"):
        rd.aggregate_checkpoints(folders, "median", out=tmp_path / "out", only="x")
