"""`robustkern doctor`: what is well is said to be, and each thing that is planted is found."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tomllib
from typer.testing import CliRunner

from robustkern import doctor
from robustkern.backends import registry
from robustkern.backends.cpp import Cpp
from robustkern.cli import app, plain

pytestmark = pytest.mark.skipif(not registry.info()["isas"], reason="no compiled backend")


def only(checks: Any) -> doctor.Check:
    (check,) = checks
    return check  # type: ignore[no-any-return]


def test_the_command() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    found = json.loads(result.output)
    wrong = [check for check in found["checks"] if check["state"] == "wrong"]
    assert result.exit_code == 0, wrong
    assert found["ok"]
    names = [check["name"] for check in found["checks"]]
    for name in ("package", "compiled kernels", "threads", "fork", "GPU", "[cli]", "[torch]"):
        assert name in names
    assert [name for name in names if name.startswith("self-test")] == [
        f"self-test: cpp {isa}" for isa in registry.info()["isas"]
    ]
    assert all(set(check) == {"name", "state", "found", "remedy"} for check in found["checks"])


def test_without_the_extra_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    checks = [doctor.Check("a", "ok", "b"), doctor.Check("c", "wrong", "d\x1b[31m", "e")]
    monkeypatch.setattr(doctor, "examine", lambda every: checks[: 1 + every])
    plain.main(["doctor"], ImportError("no typer"))
    assert capsys.readouterr().out == "    ok  a: b\nnothing is wrong\n"
    with pytest.raises(SystemExit, match="1"):
        plain.main(["doctor", "--all"], ImportError("no typer"))
    out = capsys.readouterr().out
    assert "-> e\nsomething is wrong" in out
    assert "\x1b" not in out
    with pytest.raises(SystemExit, match="2"):
        plain.main(["doctor", "--none"], ImportError("no typer"))
    assert "all commands but `robustkern info` and `robustkern doctor` need" in capsys.readouterr().err


def test_wrong_kernels_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for primitive, what in (("gram", "gram"), ("row_sq_distances", "row distances")):
        with monkeypatch.context() as patch:
            right = getattr(Cpp, primitive)
            patch.setattr(Cpp, primitive, lambda *a, right=right, **k: right(*a, **k) * (1 + 1e-6))
            checks = list(doctor._kernels("cpp"))
            assert {check.state for check in checks} == {"wrong"}
            assert f"{what} of 9 rows of float32" in checks[0].found
            assert checks[0].remedy == "please report this"
    with monkeypatch.context() as patch:
        sums = Cpp.weighted_row_sum

        def lossy(self: Cpp, rows: Any, weights: Any, out: Any, **options: Any) -> None:
            sums(self, rows, weights, out, **options)
            out.array(0, 0)[3] = 0

        patch.setattr(Cpp, "weighted_row_sum", lossy)
        assert "sum of 1 rows of float16" in next(doctor._kernels("cpp")).found
    assert {check.state for check in doctor._kernels("cpp")} == {"ok"}


def test_a_missing_compiled_part_and_a_lower_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(doctor._compiled()).state == "ok"
    monkeypatch.setenv("ROBUSTKERN_ISA", "baseline")
    monkeypatch.setattr(doctor, "_backend", lambda name: Cpp("baseline"))
    check = only(doctor._compiled())
    if len(registry.info()["isas"]) > 1:
        assert (check.state, check.remedy) == ("note", "unset it for the fastest")
    monkeypatch.setattr(doctor, "_backend", lambda name: "backend 'cpp' is not available: why (remedy)")
    assert only(doctor._compiled())[1:3] == ("wrong", "backend 'cpp' is not available: why (remedy)")


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = len(doctor.os.sched_getaffinity(0))
    monkeypatch.setattr(doctor, "_quota", lambda: math.inf)
    monkeypatch.setattr(doctor, "requested_threads", lambda: cores)
    assert only(doctor._threads()).state == "ok"
    monkeypatch.setattr(doctor, "requested_threads", lambda: cores + 1)
    assert "they wait for each other" in only(doctor._threads()).found
    monkeypatch.setattr(doctor, "_quota", lambda: 0.5)
    monkeypatch.setattr(doctor, "requested_threads", lambda: 2)
    check = only(doctor._threads())
    assert "of which a quota leaves 0.5" in check.found
    assert check.remedy == "ROBUSTKERN_NUM_THREADS=1"
    if cores > 1:
        monkeypatch.setattr(doctor, "_quota", lambda: math.inf)
        monkeypatch.setattr(doctor, "requested_threads", lambda: 1)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert "OMP_NUM_THREADS=1" in only(doctor._threads()).found


def test_the_quota_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Places:
        def __new__(cls, place: str) -> Any:
            return tmp_path / place.rsplit("/", maxsplit=1)[-1]

    monkeypatch.setattr(doctor, "Path", Places)
    assert doctor._quota() == math.inf
    for text, want in (("max 100000", math.inf), ("150000 100000\n", 1.5), ("x y", math.inf), ("5 0", math.inf)):
        (tmp_path / "cpu.max").write_text(text)
        assert doctor._quota() == want
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu.cfs_quota_us").write_text("200000\n")
    (tmp_path / "cpu.cfs_period_us").write_text("100000\n")
    assert doctor._quota() == 2


def test_runtimes_of_two_makers(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = "7f0 r-xp 1 /usr/lib/libgomp.so.1.0.0\n7f1 r-xp 1 /x/torch/lib/libiomp5.so\n7f1 r--p 1 /x/torch/lib/libiomp5.so\n"
    monkeypatch.setattr(doctor, "_elsewhere", lambda program: maps)
    check = only(doctor._openmp())
    assert check.state == "note"
    assert check.found.startswith("libgomp.so.1.0.0, libiomp5.so: runtimes of two makers")
    monkeypatch.setattr(doctor, "_elsewhere", lambda program: "/a/libgomp.so.1 \n/b/libgomp-e985bcbb.so.1.0.0\n")
    assert only(doctor._openmp()).state == "ok"


def test_a_child_that_does_not_return(monkeypatch: pytest.MonkeyPatch) -> None:
    def hung(program: str) -> str:
        raise subprocess.TimeoutExpired("python", 1)

    monkeypatch.setattr(doctor, "_elsewhere", hung)
    assert only(doctor._fork()).state == "wrong"
    monkeypatch.setattr(doctor, "_elsewhere", lambda program: "768\n")
    assert "status 768" in only(doctor._fork()).found


def test_a_driver_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_backend", lambda name: "no CUDA part")
    monkeypatch.setattr(doctor.Path, "exists", lambda path: True)
    assert only(doctor._gpu()).found == "there is a driver, but no CUDA part"
    monkeypatch.setattr(doctor.Path, "exists", lambda path: False)
    assert only(doctor._gpu()).state == "note"


def test_a_check_that_fails_is_wrong_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_elsewhere", lambda program: (_ for _ in ()).throw(RuntimeError("out of\x1b memory")))
    checks = {check.name: check for check in doctor.examine()}
    assert checks["openmp"] == ("openmp", "wrong", "RuntimeError: out of\\x1b memory", "please report this")
    assert "[cli]" in checks
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="exit code 3"):
        doctor._elsewhere("raise SystemExit(3)")


def test_metadata_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(doctor._package()).state == "ok"
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9")
    assert "its metadata say 9.9" in only(doctor._package()).found

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert "it is not installed" in only(doctor._package()).found


def test_extras_are_those_of_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    extras = {
        name
        for name, needs in project["optional-dependencies"].items()
        if name not in ("test", "bench", "dev", "docs", "peers")
        and not all(re.match(r"robustkern\[", x) for x in needs)
    }
    assert {check.name for check in doctor._extras()} == {f"[{name}]" for name in extras}
    versions = {"torch": "2.0.1+cu118", "flwr": "2.0", "jax": "0.4.35"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: versions.get(name, "99.0"))
    checks = {check.name: check for check in doctor._extras()}
    assert checks["[torch]"][1:] == (
        "wrong",
        "torch 2.0.1+cu118, expected >=2.1",
        "pip install --upgrade 'robustkern[torch]'",
    )
    assert checks["[flower]"].state == "wrong"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    checks |= {"without": next(check for check in doctor._extras() if check.name == "[jax]")}
    assert checks["without"].state == "note"
    assert "jax 0.4.35; compiled functions copy rows into callbacks" in checks["without"].found
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert next(check for check in doctor._extras() if check.name == "[jax]").state == "ok"
    assert doctor._version_of("x", "==1.2")[1] is False
