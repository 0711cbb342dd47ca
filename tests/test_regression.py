"""Saved runs of benchmarks, compared; and the fixture that others put into their own suites."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from robustkern.cli.commands import app
from robustkern.measure.reads import least_reads
from robustkern.measure.regression import Figure, changes, saved

#: What a framework author's suite looks like, as docs/performance.md has it.
DOCUMENTED = Path(__file__).parents[1] / "docs" / "performance.md"


def run_of(**reads: float) -> str:
    """Return a saved run of `robustkern bench`."""
    common = {
        "library": "robustkern",
        "n": 8,
        "d": 1000,
        "f": 2,
        "dtype": "float32",
        "seconds": 1.0,
        "read_seconds": 1.0,
    }
    results = [common | {"rule": rule, "reads": x, "low": x * 0.98, "high": x * 1.02} for rule, x in reads.items()]
    return json.dumps({"machine": {}, "results": results, "lines": []})


def compare(folder: Path, before: str, after: str, *options: str) -> Any:
    (folder / "before.json").write_text(before)
    (folder / "after.json").write_text(after)
    files = [str(folder / "before.json"), str(folder / "after.json")]
    return CliRunner().invoke(app, ["bench", "--compare", *files, *options], env={"COLUMNS": "200"})


def test_what_got_slower_is_named(tmp_path: Path) -> None:
    done = compare(tmp_path, run_of(median=1.0, mean=1.0, krum=2.0), run_of(median=1.3, mean=1.05, ctma=2.0))
    assert done.exit_code == 1
    (slower,) = [line for line in done.stdout.splitlines() if "SLOWER" in line]
    assert "median" in slower
    assert "1.00 (0.98-1.02)" in slower
    assert "1.30" in slower
    assert "only in" in done.stderr
    assert "krum" in done.stderr
    assert "ctma" in done.stderr


def test_nothing_slower_is_exit_code_0(tmp_path: Path) -> None:
    assert compare(tmp_path, run_of(median=1.0), run_of(median=1.05)).exit_code == 0
    assert compare(tmp_path, run_of(median=1.0), run_of(median=0.5)).exit_code == 0
    assert compare(tmp_path, run_of(median=1.0), run_of(median=1.3), "--slack", "0.4").exit_code == 0


def test_facts_for_machines(tmp_path: Path) -> None:
    done = compare(tmp_path, run_of(median=1.0, mean=1.0), run_of(median=1.5, krum=1.0), "--json")
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    (change,) = found["changes"]
    assert change["slower"]
    assert change["ratio"] == 1.5
    assert change["after"]["reads"] == 1.5
    assert [name.split(",")[0] for name in found["only_before"]] == ["mean"]
    assert [name.split(",")[0] for name in found["only_after"]] == ["krum"]


@pytest.mark.parametrize(
    ("before", "message"),
    [
        ("", "is no saved benchmark"),
        ("[]", "is no saved benchmark"),
        ("[" * 100_000, "is no saved benchmark"),
        ('{"results": [{"rule": "median"}]}', "lacks 'library'"),
        ('{"benchmarks": []}', "holds nothing that was measured in read passes"),
        (run_of(median=float("nan")), "no positive numbers"),
        (run_of(median=0.0), "no positive numbers"),
        (run_of(mean=1.0), "no benchmark in common"),
    ],
)
def test_files_that_cannot_be_compared_are_exit_code_2(tmp_path: Path, before: str, message: str) -> None:
    done = compare(tmp_path, before, run_of(median=1.0))
    assert done.exit_code == 2, done.output
    assert message in done.stderr


FIGURES = st.floats(0.1, 100).flatmap(
    lambda x: st.tuples(st.floats(0.5, 1), st.floats(1, 2)).map(lambda q: Figure(x, x * q[0], x * q[1]))
)


@given(
    before=st.dictionaries(st.sampled_from("abcd"), FIGURES), after=st.dictionaries(st.sampled_from("abcd"), FIGURES)
)
def test_slower_is_never_the_same_and_never_both_ways(before: dict[str, Figure], after: dict[str, Figure]) -> None:
    assert not any(change.slower for change in changes(before, before, 0))
    forth = {change.name: change for change in changes(before, after, 0.1)}
    back = {change.name: change for change in changes(after, before, 0.1)}
    assert forth.keys() == back.keys() == before.keys() & after.keys()
    assert not any(forth[name].slower and back[name].slower for name in forth)
    for change in forth.values():
        if change.slower:
            assert change.after.reads > 1.1 * change.before.reads
            assert change.after.low > change.before.high


def test_the_documented_suite_runs_and_is_compared(tmp_path: Path) -> None:
    """As a framework's author has it: a conftest of one line, and a benchmark of something else than ours."""
    pytest.importorskip("pytest_benchmark")
    blocks = DOCUMENTED.read_text().split("```python\n")[1:]
    conftest, suite = (block.split("```")[0] for block in blocks if "read_pass" in block)
    (tmp_path / "conftest.py").write_text(conftest)
    (tmp_path / "test_speed.py").write_text(suite)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-json", "run.json"]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    for options in (["--benchmark-disable"], []):
        run = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, check=False, env=alone)
        assert run.returncode == 0, run.stdout + run.stderr
    (noted,) = [each["extra_info"] for each in json.loads((tmp_path / "run.json").read_text())["benchmarks"]]
    assert 0 < noted["low"] <= noted["reads"] <= noted["high"]
    assert noted["limit"] == 1
    assert noted["input"] == "normal"
    (figure,) = saved(tmp_path / "run.json").values()
    assert figure.reads == noted["reads"]
    text = (tmp_path / "run.json").read_text()
    assert compare(tmp_path, text, text).exit_code == 0


@pytest.mark.parametrize(
    ("rule", "least"),
    [
        ("median", 1),
        ("weighted median", 1),
        ("gram", 1),
        ("mean", 1),
        ("ctma(median)", 1.75),
        ("krum", 1.05),
        ("geometric_median", 2),
        ("nnm | median", 2),
    ],
)
def test_limits_in_reads_are_what_tests_count(rule: str, least: float) -> None:
    """As `tests/test_blocks.py::test_reads_of_the_data` counts bytes."""
    assert least_reads(rule, 20, 5) == pytest.approx(least)
