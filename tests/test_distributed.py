"""Columns and rows on ranks of torch.distributed: real processes on gloo, judged by what each of them wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch.distributed.checkpoint")

RUN = Path(__file__).parent / "ranks" / "run.py"


def on_ranks(check: str, folder: Path, size: int = 4, seconds: float = 120.0, dead: int | None = None) -> list[Any]:
    """Return what a check of `ranks/checks.py` returned on each rank that lives; raise where one failed."""
    commands = [
        [sys.executable, str(RUN), check, str(rank), str(size), str(folder), str(seconds)] for rank in range(size)
    ]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for command in commands]
    try:
        said = [process.communicate(timeout=seconds + 60)[0].decode() for process in running]
    finally:
        for process in running:
            process.kill()
    found = []
    for rank in range(size):
        if rank == dead:
            continue
        file = folder / f"{rank}.json"
        assert file.exists(), said[rank]
        one = json.loads(file.read_text())
        assert one["error"] is None, one["error"]
        found.append(one["value"])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("check", ["everything_sharded", "models"])
def test_on_four_ranks(check: str, tmp_path: Path) -> None:
    on_ranks(check, tmp_path)


@pytest.mark.slow
def test_a_model_that_learns_beside_a_liar(tmp_path: Path) -> None:
    found = on_ranks("training", tmp_path)
    assert all(other == found[0] for other in found)  # all ranks have the same model
    for name, accuracy in found[0]["learning"].items():
        assert accuracy > 0.85 if name.endswith("hook") else accuracy < 0.6, found[0]["learning"]
    for optimizer, (ours, theirs) in found[0]["curves"].items():
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, err_msg=optimizer)
        assert ours[-1] < 0.6 * ours[0]


def test_messages_are_in_main_memory_whatever_the_default_device() -> None:
    import torch

    from robustkern.training import processes

    with torch.device("meta"):
        assert processes._header(3, 1).tolist() == [3, 1, 0, 0]
        taken: list[torch.Tensor] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(processes.dist, "irecv", lambda x, **_: taken.append(x))
            processes._Peer(1, None).expect(2, 5)
    assert [(x.device.type, tuple(x.shape)) for x in taken] == [("cpu", (5,))] * 2


@pytest.mark.slow
@pytest.mark.parametrize(("when", "who"), [("killed", 2), ("killed_first", 0), ("killed_while_collecting", 2)])
def test_a_rank_that_dies(when: str, who: int, tmp_path: Path) -> None:
    ranks = on_ranks(when, tmp_path, size=3, seconds=10.0, dead=who)
    for found in ranks:
        assert found["seconds"] < 30
        assert found["error"].startswith("RuntimeError: ")
    if when == "killed":  # rank 1 waits for rank 0 alone, which sees it
        assert ranks[1]["error"] == "RuntimeError: robustkern.distributed: a rank has gone, says rank 0"
