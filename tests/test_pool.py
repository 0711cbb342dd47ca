"""Pools of files on Dask: the bits of one process, whatever the grid and the pool, and workers that die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("distributed")
pytest.importorskip("fsspec")
import fsspec
from distributed import Client, LocalCluster
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import robustkern as rk
from robustkern.cli import app
from robustkern.distributed import dask_aggregate
from robustkern.files import FileError

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # Dask's own
    pytest.mark.xdist_group("dask"),
]


@pytest.fixture(scope="module")
def threads() -> Iterator[Client]:
    with (
        LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        yield client


def updates(seed: int = 0) -> list[dict[str, Any]]:
    g = np.random.default_rng(seed)
    made = [
        {
            "w": g.standard_normal((30, 41)).astype(np.float32),
            "b": g.standard_normal(7),
            "n": np.array([k, 5]),
            "none": np.zeros((0, 3), dtype=np.float32),
        }
        for k in range(7)
    ]
    made[1]["w"] *= 1e6
    made[4]["b"][2] = np.nan
    return made


def saved(folder: Path, seed: int = 0) -> list[str]:
    paths = []
    for k, update in enumerate(updates(seed)):
        save_file(update, folder / f"c{k}.safetensors")
        paths.append(str(folder / f"c{k}.safetensors"))
    return paths


@pytest.mark.parametrize(
    "rule", ["median", "trimmed_mean", "krum", "multi_krum", "ctma(median)", "nnm | trimmed_mean", "geometric_median"]
)
@pytest.mark.parametrize("block", [1, 3000, 1 << 26])
def test_bits(rule: str, block: int, threads: Client, tmp_path: Path) -> None:
    paths, out = saved(tmp_path), str(tmp_path / "out.safetensors")
    if block == 1 and rule != "median":  # a task for each value
        block = 500
    info = dask_aggregate(paths, rule, f=2, out=out, client=threads, block=block, seed=1)
    want, told = rk.aggregate(updates(), rule, f=2, return_info=True)
    found = load_file(out)
    for name, x in want.items():
        if rule == "geometric_median" and x.dtype.kind == "f":
            assert (np.abs(found[name] - x) <= np.spacing(np.abs(x).max(initial=0))).all()
        else:
            assert np.array_equal(found[name], x), name
    assert (info.d, info.order, info.nonfinite_rows) == (told.d, told.order, told.nonfinite_rows)


def test_no_update_is_replaced(threads: Client, tmp_path: Path) -> None:
    paths = saved(tmp_path)
    (tmp_path / "link.safetensors").symlink_to(paths[1])
    before = Path(paths[1]).read_bytes()
    for out in (paths[1], f"file://{paths[1]}", str(tmp_path / "link.safetensors")):
        with pytest.raises(ValueError, match="is one of the updates, which are never overwritten"):
            dask_aggregate(paths, "median", f=1, out=out, client=threads)
    assert Path(paths[1]).read_bytes() == before
    system, places = fsspec.filesystem("memory"), [f"memory://never/{k}.npy" for k in range(3)]
    for place in places:
        with system.open(place, "wb") as file:
            np.save(file, np.ones(3))
    with pytest.raises(ValueError, match="is one of the updates, which are never overwritten"):
        dask_aggregate(places, "median", f=1, out=places[2], client=threads)


def test_urls_weights_and_progress(threads: Client) -> None:
    system = fsspec.filesystem("memory")
    x = np.random.default_rng(0).standard_normal((5, 1000)).astype(np.float32)
    for k, row in enumerate(x):
        with system.open(f"/pool/{k}.npy", "wb") as file:
            np.save(file, row)
    seen: list[tuple[str, int, int]] = []
    paths, weights = [f"memory://pool/{k}.npy" for k in range(5)], [1.0, 2.0, 1.0, 1.0, 0.5]
    out = "memory://pool/out.npy"
    dask_aggregate(
        paths,
        "ctma(median)",
        delta=0.3,
        weights=weights,
        out=out,
        client=threads,
        block=8000,
        progress=lambda *now: seen.append(now),
    )
    with system.open("/pool/out.npy", "rb") as file:
        assert np.array_equal(np.load(file), rk.aggregate(x, "ctma(median)", delta=0.3, weights=weights))
    assert {name for name, _, _ in seen} == {"selection", "write"}
    assert seen[-1][1] == seen[-1][2] == 3
    with system.open("/pool/0.npy", "wb") as file:  # the same path, another update: nothing is remembered
        np.save(file, x[0] + 1)
    dask_aggregate(paths, "mean", out=out, client=threads)
    with system.open("/pool/out.npy", "rb") as file:
        assert np.array_equal(np.load(file), rk.mean(np.vstack([x[:1] + 1, x[1:]])))


def test_paths_that_are_made_one_by_one(threads: Client, tmp_path: Path) -> None:
    out = str(tmp_path / "out.safetensors")
    dask_aggregate((path for path in saved(tmp_path)), "median", f=2, out=out, client=threads)
    assert np.array_equal(load_file(out)["w"], rk.aggregate(updates(), "median", f=2)["w"])


def test_a_worker_that_is_killed(tmp_path: Path) -> None:
    paths, out = saved(tmp_path), str(tmp_path / "out.safetensors")
    killed = []

    def progress(name: str, done: int, total: int) -> None:
        if not killed:
            killed.append(next(iter(client.run(os.getpid).values())))
            os.kill(killed[0], signal.SIGKILL)

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        dask_aggregate(paths, "krum", f=2, out=out, client=client, block=2000, progress=progress)
    want = rk.aggregate(updates(), "krum", f=2)
    assert killed
    assert all(np.array_equal(x, want[name]) for name, x in load_file(out).items())


def test_a_cluster_of_its_own(tmp_path: Path) -> None:
    paths, out = saved(tmp_path), str(tmp_path / "out.safetensors")
    dask_aggregate(paths, "median", out=out, processes=1, only=["w", "n"])
    want = rk.aggregate(updates(), "median", only=["w", "n"])
    found = load_file(out)
    assert found.keys() == want.keys()
    assert all(np.array_equal(x, want[name]) for name, x in found.items())


def test_the_command(tmp_path: Path) -> None:
    paths, out = saved(tmp_path), str(tmp_path / "out.safetensors")
    command = ["aggregate", *paths, "--rule", "krum", "--f", "2", "--processes", "1", "--out", out]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "c1.safetensors" in result.output
    want = rk.aggregate(updates(), "krum", f=2)
    assert all(np.array_equal(x, want[name]) for name, x in load_file(out).items())
    refused = CliRunner().invoke(app, [*command, "--scope", "leaf"])
    assert refused.exit_code != 0
    assert "--scope: not with --processes and --dask" in refused.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["--f", "4"],
        ["--f", "1", "--weights", "1,1"],
        [],
        ["--f", "1", "--delta", "0.2"],
        ["--delta", "0.7"],
        ["--f", "1", "--only", "zzz"],
        ["--f", "1", "--backend", "x"],
        ["--f", "1", "--rule", "ctma(centre)"],
    ],
)
def test_what_the_command_does_not_understand_is_the_same(arguments: list[str], tmp_path: Path) -> None:
    """With processes, with a cluster and without them."""
    command = ["aggregate", *saved(tmp_path), "--out", str(tmp_path / "out.safetensors"), *arguments]
    alone, pool = CliRunner().invoke(app, command), CliRunner().invoke(app, [*command, "--processes", "1"])
    assert alone.exit_code == pool.exit_code == 2, pool.output
    assert alone.output == pool.output


def test_addresses_that_are_none(tmp_path: Path) -> None:
    command = ["aggregate", *saved(tmp_path), "--f", "2", "--out", str(tmp_path / "out.safetensors"), "--dask"]
    for address in ("here", "", "tcp://here:x", "bogus://here:1"):
        result = CliRunner().invoke(app, [*command, address])
        assert result.exit_code == 2, result.output
        assert f"--dask: expected an address such as tcp://host:8786; got '{address}'" in result.output
    result = CliRunner().invoke(app, [*command, "tcp://here:1", "--processes", "1"])
    assert result.exit_code == 2
    assert "--processes and --dask: one of them" in result.output


def spoil(path: str, how: str) -> None:
    """Make of an update what nobody can use."""
    if how == "gone":
        Path(path).unlink()
    elif how == "garbage":
        Path(path).write_bytes(b"x" * 100)
    elif how == "cut":
        Path(path).write_bytes(Path(path).read_bytes()[:-8])
    elif how == "folder":
        Path(path).unlink()
        Path(path).mkdir()
    else:
        save_file({"w": np.ones(3)}, path)


@pytest.mark.parametrize("rule", ["median", "krum", "ctma(median)"])
def test_no_client_ends_a_round(rule: str, threads: Client, tmp_path: Path) -> None:
    """Files that cannot be used are rows of NaN, among the f: as rows of NaN that were sent."""
    paths, out = saved(tmp_path), str(tmp_path / "out.safetensors")
    rows = updates()
    for k, how in ((0, "gone"), (2, "garbage"), (3, "other"), (5, "cut"), (6, "folder")):
        spoil(paths[k], how)
        sent = [
            {name: np.full_like(x, np.nan) if x.dtype.kind == "f" else rows[1 if k == 0 else 0][name] for name, x in row.items()}
            if i == k else row for i, row in enumerate(rows)
        ]  # fmt: skip
        want, told = rk.aggregate(sent, rule, f=2, return_info=True)
        info = dask_aggregate(paths, rule, f=2, out=out, client=threads, block=3000, bad="count")
        found = load_file(out)
        assert all(np.array_equal(found[name], x) for name, x in want.items())
        assert (list(info.bad), info.nonfinite_rows) == ([paths[k]], told.nonfinite_rows)
        assert Path(paths[k]).name in info.bad[paths[k]]
        if how == "folder":
            Path(paths[k]).rmdir()
        save_file(rows[k], paths[k])


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_no_worker_counts_twice(link: Any, threads: Client, tmp_path: Path) -> None:
    paths, out = saved(tmp_path), str(tmp_path / "out.safetensors")
    Path(paths[6]).unlink()
    link(paths[2], paths[6])
    with pytest.raises(
        FileError, match=r"c6.safetensors: is the same file as .*c2.safetensors, and no worker counts twice"
    ):
        dask_aggregate(paths, "median", f=2, out=out, client=threads)
    info = dask_aggregate(paths, "median", f=2, out=out, client=threads, bad="count")
    assert list(info.bad) == [paths[6]]
    command = [
        "aggregate",
        *paths,
        "--rule",
        "median",
        "--f",
        "2",
        "--processes",
        "1",
        "--bad-files",
        "count",
        "--json",
    ]
    result = CliRunner().invoke(app, [*command, "--out", out])
    workers = json.loads(result.stdout)["workers"]
    assert [worker["verdict"] for worker in workers].count("bad file") == 1
    assert "is the same file as" in workers[6]["why"]


def test_more_clients_than_may_be_bad(threads: Client, tmp_path: Path) -> None:
    paths, out = saved(tmp_path), tmp_path / "out.safetensors"

    def attempt(match: str, kind: type[Exception], rule: str = "median", bad: str = "count") -> None:
        with pytest.raises(kind, match=match):
            dask_aggregate(paths, rule, f=None if rule == "mean" else 2, out=str(out), client=threads, bad=bad)
        assert not out.exists()

    attempt("bad must be 'error' or 'count'; got 'drop'", ValueError, bad="drop")
    attempt("mean: bad='count' needs a rule that tolerates bad rows", ValueError, "mean")
    for k, how in ((6, "gone"), (3, "other"), (5, "cut")):
        spoil(paths[k], how)
    attempt("3 of 7 updates cannot be used, more than f=2; the first: .*c3.safetensors: tensor", FileError)
    for k in (0, 1, 2, 4):
        spoil(paths[k], "gone")
    for k in (3, 5):
        spoil(paths[k], "garbage")
    attempt("no update can be used; the first: .*c0.safetensors", FileError)


def test_the_command_counts_what_cannot_be_used(tmp_path: Path) -> None:
    paths, out = saved(tmp_path), str(tmp_path / "out.safetensors")
    spoil(paths[3], "garbage")
    command = ["aggregate", str(tmp_path), "--rule", "krum", "--f", "2", "--processes", "1", "--out", out]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 1
    assert "c3.safetensors" in refused.output
    result = CliRunner().invoke(app, [*command, "--bad-files", "count", "--json"])
    assert result.exit_code == 0, result.output
    workers = {Path(worker["file"]).name: worker for worker in json.loads(result.stdout)["workers"]}
    assert [name for name, worker in workers.items() if worker["verdict"] == "bad file"] == ["c3.safetensors"]


def test_what_cannot_be_done(threads: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, out = saved(tmp_path), str(tmp_path / "out.safetensors")

    def attempt(
        match: str, kind: type[Exception] = ValueError, files: Any = paths, rule: str = "median", **options: Any
    ) -> None:
        with pytest.raises(kind, match=match):
            dask_aggregate(files, rule, **{"out": out, "client": threads, "f": 2} | options)
        assert not Path(out).exists()

    attempt("paths must be a list of texts", TypeError, paths[0])
    attempt("paths must be a list of texts", TypeError, set(paths))
    attempt(r"client is 'tcp://host:8786'; expected a distributed.Client \(pass", TypeError, client="tcp://host:8786")
    for processes in (-3, 0, 1.5, "2", True):
        attempt(
            rf"processes must be None or an integer, at least 1; got {processes!r}", client=None, processes=processes
        )
    attempt("is there twice", files=[*paths, paths[0]])
    attempt("block must be a number of bytes", block=0)
    attempt("cannot be read", FileError, [*paths, str(tmp_path / "nobody.npy")])
    attempt("is no file", FileError, [*paths, str(tmp_path)])
    (tmp_path / "out.txt").write_text("x")
    attempt("unknown kind of file", FileError, [str(tmp_path / "out.txt"), *paths])
    attempt("only: 'x' matches no leaf", only="x")
    attempt(r"2\*f must be below n", f=4)
    spoilt = load_file(tmp_path / "c5.safetensors")
    spoilt["b"][0] = np.inf
    save_file(spoilt, tmp_path / "c5.safetensors")
    attempt("krum: 2 rows hold NaN or Inf", rk.NonFiniteError, rule="krum", f=1)
    save_file({"w": np.ones(3)}, tmp_path / "c6.safetensors")
    attempt(r"c6.safetensors: tensor .* is .*, where most files have .* \(leave this one out\)$", FileError)
    data = (tmp_path / "c3.safetensors").read_bytes()
    (tmp_path / "c3.safetensors").write_bytes(data[:-8])
    attempt("truncated or too long", FileError)


@pytest.mark.parametrize(
    ("name", "missing", "extra"),
    [("dask_aggregate", "distributed", "dask"), ("dask_aggregate", "fsspec", "dask"), ("aggregate", "torch", "torch")],
)
def test_what_is_missing_is_named_with_what_brings_it(name: str, missing: str, extra: str) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None\nimport robustkern.distributed as d\n"
        f"try:\n    d.{name}\nexcept ImportError as error:\n    print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == f"robustkern.distributed.{name} needs {missing} (pip install 'robustkern[{extra}]')\n"


def test_a_file_that_changes_between_passes(threads: Client, tmp_path: Path) -> None:
    paths, out = saved(tmp_path), tmp_path / "out.safetensors"

    def progress(name: str, done: int, total: int) -> None:
        if (name, done) == ("gram", total):
            save_file(updates(1)[2], paths[2])

    with pytest.raises(FileError, match=r"c2.safetensors: changed while it was being read"):
        dask_aggregate(paths, "krum", f=2, out=str(out), client=threads, progress=progress)
    assert not out.exists()
