"""The measurement of speed: its yardstick, its reports, and that the regression check catches what it is for."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from support import IMPLEMENTATIONS
from typer.testing import CliRunner

import robustkern as rk
from robustkern.backends import registry
from robustkern.backends.cpp import Cpp
from robustkern.cli import app
from robustkern.contract.rows import DTYPES, Rows
from robustkern.measure import limits, peers, roofline, suites
from robustkern.measure import reads as benchmark
from robustkern.measure.reads import Line
from robustkern.rules import Median

BENCH = Path(__file__).parent.parent / "bench"

ISAS = [name.removeprefix("cpp-") for name in IMPLEMENTATIONS if name.startswith("cpp-")]

pytestmark = pytest.mark.skipif(not ISAS, reason="the read pass is part of the compiled backend")


def words(row: np.ndarray[Any, Any]) -> int:
    """Sum of a row's bytes as 64-bit words, the last one filled with zeros."""
    data = row.tobytes()
    return sum(int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8))


@pytest.mark.parametrize("isa", ISAS)
def test_the_read_pass_reads_every_byte(isa: str) -> None:
    rng = np.random.default_rng(0)
    for dtype in DTYPES:
        for n, d in ((1, 1), (3, 7), (2, 63), (5, 1000), (2, 70_001)):
            x = rng.standard_normal((n, d)).astype(dtype)
            assert Cpp(isa).read_pass(Rows.of(x)) == sum(words(row) for row in x) % 2**64
    two = Rows(
        np.array([[x.ctypes.data], [x.ctypes.data + 8 * x.itemsize]], dtype=np.uint64),
        np.array([0, 8, 20], dtype=np.int64),
        x.dtype,
        x,
    )
    assert Cpp(isa).read_pass(two) == (words(x[0, :8]) + words(x[0, 8:20])) % 2**64


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_check_fails_for_a_slowdown_and_forgives_a_disturbance(capsys: pytest.CaptureFixture[str]) -> None:
    check = load_script("check")
    limits = {
        "slack": 1.5,
        "rows": [
            {"rule": "median", "n": 10, "dtype": "float32", "reads": {"v3": 1.0, "v4": 0.8}},
            {"rule": "gram", "n": 10, "dtype": "float32", "reads": {"v3": 2.0}},
        ],
    }
    calls: list[str] = []

    def steady(rule: str, n: int, dtype: str) -> float:
        calls.append(rule)
        return {"median": 1.1, "gram": 2.9}[rule]

    assert check.slow_rows(limits, "v4", steady) == []
    assert calls == ["median", "gram"]  # no second attempt where the first is good

    def disturbed(rule: str, n: int, dtype: str) -> float:
        calls.append(rule)
        return 9.0 if len(calls) % 2 else 1.0

    calls.clear()
    assert check.slow_rows(limits, "v3", disturbed) == []
    assert calls == ["median", "median", "gram", "gram"]

    def planted(rule: str, n: int, dtype: str) -> float:
        return {"median": 1.6, "gram": 2.0}[rule]

    failed = check.slow_rows(limits, "v3", planted)
    assert len(failed) == 1
    assert "median" in failed[0]
    assert "1.60, 1.60, 1.60, 1.60 reads; limit 1.50" in failed[0]
    assert "SLOW  median" in capsys.readouterr().out
    limits["rows"][0]["reads"]["v4 AMD"] = 1.2  # type: ignore[index]
    assert check.slow_rows(limits, "v4 AMD", planted) == []
    assert len(check.slow_rows(limits, "v4 Intel", planted)) == 1
    assert check.kind_of({"isa": "v4", "cpu": "Intel(R) Xeon(R) Processor"}) == "v4 Intel"
    assert check.kind_of({"isa": "v4", "cpu": "AMD EPYC"}) == "v4 AMD"
    assert check.kind_of({"isa": "v3"}) == "v3"


@pytest.fixture
def own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure this process's time on one thread: other tests that run beside this one cost it none."""

    def seconds(call: Callable[[], Any]) -> float:
        started = time.process_time()
        call()
        return time.process_time() - started

    monkeypatch.setattr(benchmark, "seconds_of", seconds)
    monkeypatch.setattr(benchmark, "VALUES", 4_000_000)
    rk.set_num_threads(1)


def test_a_real_slowdown_is_caught(own_time: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real measurement, with a kernel that selects everything four times."""
    check = load_script("check")
    measure = check.measure_reads({})
    honest = min(measure("median", 10, "float32") for _ in range(3))
    limits = {
        "slack": 1.5,
        "rows": [{"rule": "median", "n": 10, "dtype": "float32", "reads": {"v3": honest, "v4": honest}}],
    }
    once = Cpp.select_columns

    def four_times(self: Cpp, *args: Any, **options: Any) -> Any:
        for _ in range(3):
            once(self, *args, **options)
        return once(self, *args, **options)

    monkeypatch.setattr(Cpp, "select_columns", four_times)
    assert len(check.slow_rows(limits, benchmark.machine()["isa"], measure)) == 1


def test_a_planted_delay_fails_the_whole_check(
    own_time: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From measuring the limits to the exit status, as CI runs it; the delay is in Python, where no kernel sees it."""
    check = load_script("check")
    row = {"n": 10, "dtype": "float32", "reads": {"v3": 1}}
    worst = {"times": 2.5, "cases": [["trimmed_mean", 300, "copies"], ["krum", 64, "tiny noise"]]}
    limits = {"slack": 4.0, "rows": [{"rule": rule, **row} for rule in ("median", "trimmed_mean")], "worst": worst}
    monkeypatch.setattr(check, "LIMITS", tmp_path / "limits.json")
    monkeypatch.setattr(benchmark, "machine", lambda: {"isa": "v3"})
    check.LIMITS.write_text(json.dumps(limits))
    monkeypatch.setattr(sys, "argv", ["check.py", "--update"])
    assert check.main() == 0
    measured = json.loads(check.LIMITS.read_text())
    assert measured["slack"] == 4
    assert measured["worst"] == worst
    assert all(row["reads"]["v3"] != 1 for row in measured["rows"])
    monkeypatch.setattr(sys, "argv", ["check.py"])
    assert check.main() == 0
    call = Median.solve

    def late(self: Median, view: Any) -> Any:
        until = time.process_time() + 0.2  # for a read pass of a few milliseconds
        while time.process_time() < until:
            pass
        return call(self, view)

    monkeypatch.setattr(Median, "solve", late)
    capsys.readouterr()
    assert check.main() == 1
    printed = capsys.readouterr().out
    assert "SLOW  median" in printed
    assert "ok    trimmed_mean" in printed
    assert "ok    krum" in printed
    assert "slower than bench/limits.json allows" in printed


def test_the_check_fails_where_hostile_rows_cost_more(
    own_time: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real measurement, with a kernel that selects from copies forty times more."""
    check = load_script("check")
    monkeypatch.setattr(check, "WORST_VALUES", 640_000)
    limits = {"slack": 1.5, "worst": {"times": 2.2, "cases": [["median", 64, "copies"], ["median", 64, "tiny noise"]]}}
    assert check.dear_inputs(limits, check.measure_worst) == []
    call = Cpp.select_columns

    def dear(self: Cpp, rows: Rows, *args: Any, **options: Any) -> Any:
        for _ in range(40 * bool((rows.array(0, 0) == rows.array(0, 1)).all())):
            call(self, rows, *args, **options)
        return call(self, rows, *args, **options)

    monkeypatch.setattr(Cpp, "select_columns", dear)
    capsys.readouterr()
    (failed,) = check.dear_inputs(limits, check.measure_worst)
    assert re.fullmatch(
        r"SLOW  median +n=64 +copies +(\d+\.\d\d, ){3}\d+\.\d\d times honest rows; limit 3.30 = 2.20 x slack", failed
    )
    assert "ok    median" in capsys.readouterr().out


def test_a_wrong_result_is_an_error_of_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    check = load_script("check")
    monkeypatch.setattr(check, "WORST_VALUES", 64_000)
    assert check.measure_worst("median", 64, "copies") > 0
    call = Cpp.select_columns

    def wrong(self: Cpp, rows: Rows, *args: Any, out: Rows | None = None, **options: Any) -> Any:
        found = call(self, rows, *args, out=out, **options)
        if out is not None and (rows.array(0, 0) == rows.array(0, 1)).all():
            out.array(0, 0)[5] += 1
        return found

    monkeypatch.setattr(Cpp, "select_columns", wrong)
    with pytest.raises(RuntimeError, match=r"median, n=64, copies: the result differs by 1\.0e\+00 from another one"):
        check.measure_worst("median", 64, "copies")


def test_the_worst_inputs_are_what_they_are_called() -> None:
    check, f = load_script("check"), 5
    x = np.random.default_rng(0).standard_normal((16, 9000)).astype(np.float32)
    made = {kind: make(x, f) for kind, make in check.INPUTS.items()}
    assert (made["copies"][:f] == x[-1]).all()
    away = abs(made["near copies"][:f] / x[-1] - 1)
    assert 0 < away.max() <= 10 * 2**-23
    for kind, size in (("tiny noise", 1e-30), ("huge noise", 1e30)):
        assert 0.5 * size < np.median(abs(made[kind][:f].astype(np.float64))) < size
    assert made.pop("aligned").shape == (16, 8192)
    for kind, rows in made.items():
        assert rows.dtype == np.float32, kind
        assert np.array_equal(rows[f:], x[f:]), kind
    limits = json.loads((BENCH / "limits.json").read_text())
    assert {kind for _, _, kind in limits["worst"]["cases"]} == set(check.INPUTS)
    assert limits["worst"]["times"] <= 2.2
    for rule, n, _ in limits["worst"]["cases"]:
        benchmark.job(rule, x[: min(n, 16)], 5)[0]()


def test_limits_name_rules_that_exist_and_figures_for_v3() -> None:
    limits = json.loads((BENCH / "limits.json").read_text())
    assert 1 < limits["slack"] <= 2
    for row in limits["rows"]:
        call, _ = benchmark.job(row["rule"], benchmark.make_rows(row["n"], 20, row["dtype"]), row["n"] // 4)
        call()
        assert row["reads"]["v3"] > 0


def test_goals_hold_up_to_the_next_n_of_the_table() -> None:
    assert benchmark.goal("median", 3) == 1.1
    assert benchmark.goal("median", 16) == 1.1
    assert benchmark.goal("median", 17) == 1.25
    assert benchmark.goal("median", 2000) is None
    assert benchmark.goal("nnm | median", 128) is None
    assert benchmark.goal("rfa", 8) is None


@pytest.mark.parametrize("rule", peers.naive_rules(2))
def test_naive_rules_agree_with_ours(rule: str) -> None:
    x = benchmark.make_rows(10, 300)
    call, ours = benchmark.job(rule, x, 2)
    call()
    np.testing.assert_allclose(ours, peers.naive_rules(2)[rule](x), atol=1e-5)


def test_a_peer_that_differs_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.PEERS, "numpy", lambda f: {"median": lambda x: x[0]})
    with pytest.raises(RuntimeError, match=r"numpy's median differs from ours by .* at n=5"):
        list(benchmark.measure_peers("median", benchmark.make_rows(5, 50), ["numpy"]))


def test_bench_command(tmp_path: Path) -> None:
    run = CliRunner().invoke(
        app,
        [
            *("bench", "--rules", "median,gram", "--rules", "weighted median", "--n", "4,9"),
            *("--d", "500", "--rounds", "2", "--against", "numpy", "--save", str(tmp_path / "r.json")),
            *("--plot", str(tmp_path / "r.png")),
        ],
    )
    assert run.exit_code == 0, run.output
    assert "numpy" in run.output
    saved = json.loads((tmp_path / "r.json").read_text())
    assert {(r["rule"], r["library"], r["n"]) for r in saved["results"]} == {
        *((rule, "robustkern", n) for rule in ("median", "gram", "weighted median") for n in (4, 9)),
        *(("median", "numpy", n) for n in (4, 9)),
    }
    assert all(r["reads"] > 0 and r["low"] <= r["reads"] <= r["high"] for r in saved["results"])
    assert {"date", "cpu", "isa", "threads"} <= set(saved["machine"])
    assert (tmp_path / "r.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "int8"], "--dtype: 'int8' is not known (known: float16, bfloat16, float32, float64"),
        (["--dtype", "float16,float32"], "--dtype: one at a time; got 'float16,float32'"),
        (["--against", "nothing"], "--against: 'nothing' is not known (known: numpy, torch, byzfl,"),
        (
            ["--suite", "speed"],
            "--suite: 'speed' is not known (known: rules, dtypes, calls, trees, memory, threads,",
        ),
        (["--suite", "trees", "--plot", "x.png"], "--plot draws the rules (add --suite rules)"),
        (["--rules", "median,medain"], "--rules: 'medain' is not known; did you mean 'median'"),
        (["--n", "0"], "--n: expected whole numbers from 1 to 65,535"),
        (["--d", "x"], "--d: expected whole numbers from 1"),
        (["--plot", "x.csv"], "--plot: x.csv: unknown kind of output; expected one of .png, .pdf, .svg"),
        (["--save", "nowhere/x.json"], "--save: nowhere/x.json: the directory nowhere does not exist"),
        (["--rounds", "0"], "Invalid value for '--rounds'"),
    ],
)
def test_bench_errors(arguments: list[str], message: str) -> None:
    run = CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "200"})
    assert run.exit_code == 2
    assert message in " ".join(run.output.split())


def test_bench_prints_json_and_nothing_else() -> None:
    run = CliRunner().invoke(app, ["bench", "--rules", "median", "--n", "4", "--d", "500", "--rounds", "1", "--json"])
    assert run.exit_code == 0, run.output
    printed = json.loads(run.stdout)
    assert [(r["rule"], r["n"], r["d"]) for r in printed["results"]] == [("median", 4, 500)]
    assert {"date", "cpu"} <= set(printed["machine"])


def test_an_interrupted_bench_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = benchmark.measure

    def interrupted(rule: str, *arguments: Any, **options: Any) -> Any:
        if rule == "gram":
            raise KeyboardInterrupt
        return measure(rule, *arguments, **options)

    monkeypatch.setattr(benchmark, "measure", interrupted)
    saved, drawn = tmp_path / "r.json", tmp_path / "r.png"
    files = ["--save", str(saved), "--plot", str(drawn)]
    run = CliRunner().invoke(
        app, ["bench", "--rules", "median,gram", "--n", "4", "--d", "500", "--rounds", "1", *files]
    )
    assert run.exit_code == 130
    assert run.stderr.strip() == "stopped"
    assert "│ median" in run.stdout
    assert [r["rule"] for r in json.loads(saved.read_text())["results"]] == ["median"]
    assert drawn.stat().st_size > 1000


# ---- suites ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", suites.SUITES)
def test_each_suite_yields_figures_and_goals(suite: str) -> None:
    measure, cases = suites.SUITES[suite]
    for case in cases if suite in ("calls", "threads") else cases[:2]:
        lines = list(measure(*case, 1, 2000))
        assert lines or (suite == "calls" and case[1] > 2000)
        for line in lines:
            assert line.name == suite
            assert line.figure is not None
            # Few pages are touched for rows so small; a time is never zero.
            assert line.figure >= 0 if suite == "memory" else line.figure > 0
            assert line.unit
            compared = line.what.startswith(("read pass", "trimmed_mean, n=10, d=1000"))
            compared |= line.unit == "reads of all rows" or line.what.endswith("through the caches")
            assert line.goal is not None or compared
            assert line.floor == line.what.endswith(("all threads", "torch"))


def test_the_limit_counts_bytes_and_operations() -> None:
    """By hand: what is read and written where operations cost nothing, and the operations where bytes do not."""
    free, slow = limits.Rates(1e30, 1e30), limits.Rates(1e3, 1e3)
    for case, reads in {
        "gram": 1,
        "median": 1 + 1 / 8,
        "weighted median": 1 + 1 / 8,
        "mean_around_median": 1 + 1 / 8,
        "ctma(median)": 1 + 6 / 8 + 1 / 8,
        "krum": 1 + 1 / 8 + 1 / 8,
        "multi_krum": 1 + 6 / 8 + 1 / 8,
        "geometric_median": 2 + 1 / 8,
        "nnm | median": 2 + 1 / 8,
    }.items():
        assert limits.least_reads_of(case, 8, 2, free, 1e-9) == pytest.approx(reads)
    network = sum(1 for _ in roofline._sort(0, 8, 8))
    assert network == 19
    median = roofline.selection_network(8, 3, 5)[1]
    for case, operations in {
        "gram": 36 + 16,
        "median": median,
        "weighted median": 5 * network,
        "mean_around_median": 2 * network + 6,
        "ctma(median)": median + 16 + 6,
        "multi_krum": 36 + 16 + 6,
        "cge": 16 + 6,
        "nnm | median": 36 + 16 + median + 64,
    }.items():
        assert limits.least_reads_of(case, 8, 2, slow, 1e-9) * 1e-6 == pytest.approx(operations, rel=1e-5)
    assert limits.least_reads_of("median", 128, 2, slow, 1e-9) == pytest.approx(1 + 1 / 128)  # bytes alone
    assert 1e8 < limits.measured_rates(256, 2).double < 1e14


def test_gradients_of_workers_are_those_of_torch() -> None:
    torch = pytest.importorskip("torch")
    d, width = 300, 4
    rows = limits.gradient_rows(3, d, seed=5)
    rng = np.random.default_rng(5)
    first, second = (
        torch.tensor(rng.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(shape[0])), requires_grad=True)
        for shape in ((64, width), (width, 10))
    )
    bias = torch.zeros(width, requires_grad=True)
    for row in rows:
        images = torch.relu(torch.tensor(rng.standard_normal((8, 64), dtype=np.float32)))
        labels = torch.tensor(rng.integers(10, size=8))
        loss = torch.nn.functional.cross_entropy(torch.relu(images @ first + bias) @ second, labels)
        found = torch.cat([part.ravel() for part in torch.autograd.grad(loss, (first, bias, second))])
        np.testing.assert_allclose(row, found[:d], atol=1e-6)


def test_a_wrong_result_on_the_worst_inputs_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(rule: str, rows: Any, f: int) -> tuple[Any, Any]:
        call, result = benchmark.job(rule, rows, f)

        def run() -> None:
            call()
            result[0] += 0.01 * (rule == "krum")

        return run, result

    monkeypatch.setattr(limits, "cases", lambda: ("median", "krum"))
    monkeypatch.setattr(limits, "job", wrong)
    with pytest.raises(RuntimeError, match=r"krum, n=8, normal, stacked, odd d: the result differs by 1.0e-02 from "):
        list(limits.worst(8, 1, 5000))


def test_layouts_are_what_they_say() -> None:
    rows = limits.gradient_rows(3, 8300)
    odd, multiple, apart = (limits._laid_out(rows, layout) for layout in limits.LAYOUTS)
    assert odd.shape == (3, 8299)
    assert odd.strides[0] == 8299 * 4
    assert multiple.shape == (3, 8192)
    assert isinstance(apart, list)
    assert [row.base is None for row in apart] == [True] * 3


def test_a_floor_is_missed_from_below() -> None:
    assert Line("a", "b", 1.2, "x", 1.1).missed
    assert not Line("a", "b", 1.1, "x", 1.1).missed
    assert Line("a", "b", 0.8, "x", 0.9, floor=True).missed
    assert not Line("a", "b", 0.95, "x", 0.9, floor=True).missed
    assert not Line("a", "b", 9.0, "x").missed
    assert not Line("a", "b", None, "why", 1.0).missed
    assert Line("a", "b", 0.8, "x", 0.9, floor=True).wanted == ">= 0.9"


def test_leaves_are_of_every_size_and_the_same_each_time() -> None:
    sizes = suites.tree_sizes(4_000_000)
    assert sizes == suites.tree_sizes(4_000_000)
    assert len(sizes) == 300
    assert min(sizes) == 1
    assert 100_000 < max(sizes) < 1_000_000
    assert abs(sum(sizes) - 4_000_000) < 1000


def test_a_suite_measures_its_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A delay planted in what is measured is in the figure, and one in a result is an error."""
    load = peers.PEERS["numpy"]

    def late(f: int) -> dict[str, peers.Peer]:
        def median(x: Any) -> Any:
            time.sleep(0.05)
            return np.median(x, axis=0)

        return {**load(f), "median": median}

    monkeypatch.setattr(suites, "load", lambda library, f: late(f))
    (line,) = suites.calls("median", 10, 1, None)
    assert line.figure is not None
    assert line.figure < 0.2
    monkeypatch.setattr(suites, "load", lambda library, f: {"median": lambda x: x[0]})
    with pytest.raises(RuntimeError, match=r"median, n=10, d=10, torch: the result differs by .* please report this"):
        list(suites.calls("median", 10, 1, None))
    with pytest.raises(RuntimeError, match=r"memory, nothing, n=16: ValueError: .*nothing"):
        list(suites.memory("nothing", 16, 1, 100))


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(registry._loaded, "numba", "No module named 'numba'")
    monkeypatch.setattr(suites, "STATUS", tmp_path / "status")
    *rest, _ = suites.calls("median", 10, 1, None)
    assert [(line.what, line.figure) for line in rest] == [("torch", None)]
    assert "not measured: import of torch halted" in rest[0].unit
    said = [*suites.numba(8, 1, 100), *suites.threads("after other pools", 1, 100), *suites.memory("median", 16, 1, 9)]
    assert [line.unit.split(": ", 1)[1] for line in said if line.figure is None] == [
        "backend 'numba' is not available: No module named 'numba'",
        "import of torch halted; None in sys.modules",
        f"{tmp_path / 'status'} is not here",
    ]


def test_the_page_shows_both_groups_of_several_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = CliRunner().invoke(
        app,
        [
            *("bench", "--suite", "rules,trees,numba", "--rules", "median", "--n", "8"),
            *("--d", "500", "--rounds", "1", "--save", str(tmp_path / "v3.json")),
        ],
    )
    assert run.exit_code == 0, run.output
    assert "x one array's time" in run.output
    saved = json.loads((tmp_path / "v3.json").read_text())
    assert {line["name"] for line in saved["lines"]} == {"trees", "numba"}
    for line, figure in zip(saved["lines"], (1.3, 1.0), strict=False):
        line["figure"] = figure
    saved["machine"] |= {"isa": "v3", "cpu": "One", "cores": 2}
    (tmp_path / "v3.json").write_text(json.dumps(saved))
    saved["machine"] |= {"isa": "v4", "cpu": "Other", "cores": 16}
    saved["results"] = []
    saved["lines"] = [
        {"name": "unknown", "what": "thing | part", "figure": 0.5, "unit": "x", "goal": 0.9, "floor": True},
        {"name": "worst", "what": "nnm | median, n=8", "figure": 4.5, "unit": "x", "goal": 4.0, "floor": False},
        {"name": "worst", "what": "gram, n=16", "figure": 1.1, "unit": "x", "goal": 1.2, "floor": False},
        {"name": "calls", "what": "torch", "figure": None, "unit": "not measured: why", "goal": None, "floor": False},
    ]
    (tmp_path / "v4.json").write_text(json.dumps(saved))
    page = load_script("page")
    reasons = json.loads((BENCH / "reasons.json").read_text())
    monkeypatch.setattr(page, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(sys, "argv", ["page.py", str(tmp_path / "v3.json"), str(tmp_path / "v4.json")])
    page.main()
    text = page.PAGE.read_text()
    rules, lines, slowest, other = text.split("\n## ")[1:]
    assert slowest.startswith("v4: Other, ")
    assert "| `nnm \\| median` | 4.50* / 4 |  |" in slowest
    assert "| `gram` |  | 1.10 / 1.2 |" in slowest
    assert f"- *: {reasons['worst']}" in slowest
    assert rules.startswith("v3: One, ")
    assert "2 cores. Read passes / goal." in rules
    assert "/ 1.1 |" in rules
    assert lines.startswith("v3: One, ")
    assert "| trees | median, n=10, 300 leaves | 1.3* | <= 1.15 | x one array's time |" in lines
    assert "| trees | geometric_median, n=10, 300 leaves | 1 | <= 1.15 | x one array's time |" in lines
    assert f"- trees*: {reasons['trees']}" in lines
    assert other.startswith("v4: Other, ")
    assert "16 cores" in other
    assert "| unknown | thing \\| part | 0.5* | >= 0.9 | x |" in other
    assert "| calls | torch |  |  | not measured: why |" in other
    assert f"- thing | part*: {reasons['default']}" in other
    assert set(suites.SUITES) <= set(reasons)
