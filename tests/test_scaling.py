"""The study of scaling: all of its logic, on the CPU and on stand-ins for GPUs with a clock of their own."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import pytest
from support import IMPLEMENTATIONS
from typer.testing import CliRunner

import robustkern as rk
from robustkern.backends import registry
from robustkern.backends.threads import requested_threads
from robustkern.cli import app
from robustkern.cli.options import numbers
from robustkern.cli.scaling import plan_of
from robustkern.measure import devices, ranks, roofline, scaling
from robustkern.measure.devices import CupyCuda, Device, TorchCuda
from robustkern.measure.scaling import Plan, Point

pytestmark = pytest.mark.skipif(
    not any(name.startswith("cpp-") for name in IMPLEMENTATIONS), reason="the read pass is part of the compiled backend"
)


class Cpu(Device):
    """The CPU with a clock of its own: 10 GB/s."""

    speed, launch = 1e10, 0.0

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    def aggregate(self, rows: Any, rule: Any, f: int, out: Any) -> None:
        super().aggregate(rows, rule, f, out)
        self.now += self.launch + rows.nbytes / self.speed

    def yardstick(self, rows: Any) -> tuple[Any, float]:
        def read() -> None:
            self.now += rows.nbytes / self.speed

        return read, 1.0


class Gpu(Cpu):
    """A GPU: 1 TB/s after 100 microseconds, 50 GB/s from pinned and 5 GB/s from pageable memory."""

    name, transfers = "cuda", True
    speed, launch, link, memory = 1e12, 1e-4, 5e9, 10**9

    def facts(self) -> dict[str, Any]:
        return {"name": "stand-in", "memory_bytes": self.memory}

    def free_bytes(self) -> int:
        return self.memory

    def put(self, host: Any) -> Any:
        return host.copy()

    def refill(self, rows: Any, host: Any) -> None:
        rows[:] = host
        self.now += host.nbytes / self.link

    @contextlib.contextmanager
    def pinned(self, host: Any) -> Iterator[None]:
        self.link *= 10
        yield
        self.link /= 10

    def yardstick(self, rows: Any) -> tuple[Any, float]:
        read, _ = super().yardstick(rows)
        return lambda: (read(), read()), 2.0  # a copy reads and writes


def plan(**options: Any) -> Plan:
    asked = {"devices": "cpu,cuda", "n": "8", "d": "1e3", "dtype": "float32", "rules": ["median"], "model": None}
    return plan_of(**{**asked, "seconds": 1e-9, **options})


# ---- what is asked for -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("8", (8,)),
        ("64,8,8", (8, 64)),
        ("1e4..1e6", (10_000, 100_000, 1_000_000)),
        ("1e4..1e5:2", (10_000, 31_623, 100_000)),
        ("1e3..5e4", (1000, 10_000)),
        ("2e3..2e4,500", (500, 2000, 20_000)),
        ("1e4..1e9", tuple(10**k for k in range(4, 10))),
        ("1e4..1e9:3", tuple(round(10 ** (k / 3)) for k in range(12, 28))),
    ],
)
def test_numbers(text: str, want: tuple[int, ...]) -> None:
    assert numbers(text, "d", 3, 10**12) == want


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--d", "1e4..1e3"],
            "--d: expected whole numbers from 100 to 1,000,000,000,000 such as 1e4,2e5, or 1e4..1e9, or",
        ),
        (["--d", "1e4..1e9:0"], "got '1e4..1e9:0'"),
        (["--d", "1e4..1e9:x"], "got '1e4..1e9:x'"),
        (["--d", "1e4..1e5..1e6"], "got '1e4..1e5..1e6'"),
        (["--d", "many"], "got 'many'"),
        (["--d", "1e4..inf"], "got '1e4..inf'"),
        (["--d", "1e3..1e4:999999999"], "'1e3..1e4:999999999' means 1,000,000,000 numbers; expected at most 1,000"),
        (["--d", "nan"], "got nan"),
        (["--d", "1e13"], "got 1e+13"),
        (["--d", "99"], "got 99"),
        (["--d", "1000.5"], "got 1000.5"),
        (["--n", "2"], "--n: expected whole numbers from 3 to 4,096"),
        (["--n", ""], "--n: expected whole numbers"),
        (["--devices", ","], "--devices: expected some of cpu, cuda, with commas; got nothing"),
        (["--dtype", ""], "--dtype: expected some of float16, bfloat16, float32, float64, with commas; got nothing"),
        (["--devices", "cpu,gpu"], "--devices: 'gpu' is not known (known: cpu, cuda; several with commas)"),
        (["--dtype", "int8"], "--dtype: 'int8' is not known (known: float16, bfloat16, float32, float64"),
        (["--model", "v100"], "--model: 'v100' is not known (known: a100, h100, rtx4090"),
        (["--rules", ""], "--rules: expected rules such as median, with commas; got nothing"),
        (["--rules", "medain"], "did you mean 'median'"),
        (["--rules", "median(even='x')"], "even must be 'mean', 'low' or 'high'; got 'x'"),
        (["--seconds", "0"], "--seconds: expected a number above 0, the time of each point; got 0"),
        (["--seconds", "nan"], "--seconds: expected a number above 0, the time of each point; got nan"),
    ],
)
def test_a_wrong_command_is_exit_code_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    run = CliRunner().invoke(app, ["scaling", "--out", str(tmp_path / "study"), *arguments])
    assert run.exit_code == 2
    assert message in " ".join(run.output.split())
    assert not (tmp_path / "study").exists()


def test_a_folder_that_cannot_be_written_is_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        run = CliRunner().invoke(app, ["scaling", "--out", str(out)])
        assert run.exit_code == 2
        said = "".join(run.output.split())
        assert "--out:expectedafolderthatcanbewritten;got" in said
        assert "chooseanotherone" in said


# ---- ranks -------------------------------------------------------------------------------------------------------


def test_a_rank_that_fails_says_why() -> None:
    pytest.importorskip("torch.distributed")
    with pytest.raises(RuntimeError, match=r"(?s)^a rank failed: .*ValueError: expected non-negative integer"):
        list(ranks.study_ranks([1], [-1], ["median"], 0.01))


def test_rules_that_no_number_of_ranks_suffices_for(tmp_path: Path) -> None:
    pytest.importorskip("torch.distributed")
    asked = ("--rules", "bulyan", "--ranks", "1,2", "--d", "100", "--seconds", "0.01", "--out", str(tmp_path / "out"))
    run = CliRunner().invoke(app, ["scaling", *asked])
    assert run.exit_code == 1
    assert "none of the rules takes so few rows, one a rank (1, 2; try --ranks 4)" in " ".join(run.output.split())


@dataclass(frozen=True)
class Fickle(rk.Aggregator):
    """Takes another multiple of the mean in each call."""

    name: ClassVar[str] = "fickle"
    points: ClassVar[tuple[str, ...]] = ("origin",)
    calls: ClassVar[Iterator[int]] = itertools.count(1)

    def solve(self, view: rk.View) -> rk.Solution:
        return rk.Solution(np.full(view.n, 1 / view.n / (1 + next(self.calls))))


def test_ranks_that_find_something_else_are_an_error(own_rules: None, tmp_path: Path) -> None:
    distributed = pytest.importorskip("torch.distributed")
    rk.register(Fickle)
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        points = ranks._points_of(100, ["median", "mean"], 1e-9, 1, 0)
        assert [(point.how, point.rule, point.checked) for point in points] == [
            (how, rule, True) for how in ("rows", "fsdp") for rule in ("median", "mean")
        ]
        with pytest.raises(RuntimeError, match=r"^fickle: ranks give another result than one process$"):
            ranks._points_of(100, ["median", "fickle"], 1e-9, 1, 0)
    finally:
        distributed.destroy_process_group()


# ---- the model ---------------------------------------------------------------------------------------------------


def run_network(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    n = len(values)
    x = values.copy()
    for low, high in roofline._sort(0, 1 << (n - 1).bit_length(), n):
        x[[low, high]] = np.minimum(x[low], x[high]), np.maximum(x[low], x[high])
    return x


def test_comparators() -> None:
    for n, comparators in ((1, 0), (2, 1), (4, 5), (8, 19), (16, 63), (32, 191), (64, 543)):
        assert roofline.selection_network(n, 0, n) == (comparators, 2 * comparators)
    rng = np.random.default_rng(0)
    for n in (2, 3, 5, 8, 13, 32, 50):
        values = rng.standard_normal((n, 500))
        np.testing.assert_array_equal(run_network(values), np.sort(values, axis=0))
        full, _ = roofline.selection_network(n, 0, n)
        some, results = roofline.selection_network(n, (n - 1) // 2, n // 2 + 1)
        assert n - 1 <= some <= full
        assert some <= results <= 2 * some
    assert roofline.selection_network(8, 0, 1) == (7, 7)  # a minimum: one minimum less than values
    assert roofline.selection_network(4, 1, 3) == (5, 8)  # the last two merge the ends away


def test_the_model_counts_what_the_kernels_do() -> None:
    """Beyond 64 rows by hand: runs of 32 sorted by 191 comparators, merges of 2, 4, ... runs."""
    assert roofline.selection(64, 31, 33) == roofline.Operations(*roofline.selection_network(64, 31, 33))
    runs, steps = 4 * 191, 2 * 5 * 64  # of 4 runs; two merges end with five steps of 64 pairs each
    assert roofline.selection(65, 0, 65) == (runs + steps + 128 + 256, 2 * (runs + steps) + 384, 384)
    assert roofline.selection(128, 63, 65) == (runs + steps // 2 + 128 + 128, 2 * (runs + steps // 2) + 256, 256)
    assert roofline.selection(129, 0, 129).comparisons > 2 * roofline.selection(128, 0, 128).comparisons
    assert roofline.selection(1025, 512, 513) == (32 * 1025,) * 3
    assert roofline.selection(1025, 3, 1000) == (64 * 1025,) * 3
    gpu = roofline.MODELS["h100"]
    for n, measured in (128, 2.14), (256, 2.34), (512, 2.91), (1024, 3.51):  # medians on one, docs/gpu.md
        modelled = (roofline.model_seconds(gpu, "median", n, 10**6, 1, 4) or 0) / (n * 4e6 / gpu.bandwidth)
        assert modelled < measured < 2.1 * modelled


def test_in_the_model_the_larger_of_bytes_and_operations_wins() -> None:
    gpu = roofline.Gpu("one", bandwidth=1e9, memory=1e9, multiprocessors=1, hertz=1e9, minmax=1, float64=1)

    def seconds(rule: str, n: int, itemsize: int = 4) -> float:
        found = roofline.model_seconds(gpu, rule, n, 1000, n // 4, itemsize)
        assert found is not None
        return found

    assert seconds("mean", 8) == pytest.approx(9 * 4e-6)
    assert seconds("median", 8) == pytest.approx(9 * 4e-6)  # 28 results cost 28 microseconds
    assert seconds("median", 64) == pytest.approx(828e-6)
    assert seconds("median", 64, 2) == pytest.approx(828e-6)  # as many instructions as of float32
    assert seconds("median", 64, 8) == pytest.approx(2 * 828e-6)
    assert seconds("ctma(median)", 64) == pytest.approx(828e-6 + 49 * 4e-6)
    assert seconds("geometric_median", 8) == pytest.approx(17 * 4e-6)
    assert seconds("ctma(geometric_median)", 8) == pytest.approx(15 * 4e-6)
    assert seconds("krum", 8) == pytest.approx(10 * 4e-6)
    full = roofline.selection_network(64, 16, 48)[1]
    assert seconds("trimmed_mean", 64) == pytest.approx(full * 1e-6)
    assert roofline.model_seconds(gpu, "nnm | median", 8, 1000, 2, 4) is None
    assert roofline.model_seconds(gpu, "gram", 8, 1000, 2, 4) is None
    slow = roofline.MODELS["rtx4090"]  # whose float64 is slow: the operations win
    assert (roofline.model_seconds(slow, "median", 64, 1000, 16, 8) or 0) > 64 * 8e3 / slow.bandwidth * 1.3


# ---- rows whose result is known ----------------------------------------------------------------------------------


def test_repeated_rows() -> None:
    small = scaling.repeated_rows(8, 200, "float32")
    np.testing.assert_array_equal(small, scaling.make_rows(8, 200))
    rows = scaling.repeated_rows(8, 20_003, "bfloat16")
    width, times = scaling._tiles(8, 20_003)
    assert (rows.shape, rows.dtype, width, times) == ((8, 20_003), ml_dtypes.bfloat16, 6667, 3)
    for k in range(3):
        np.testing.assert_array_equal(rows[:, k * width : (k + 1) * width], scaling.make_rows(8, width, "bfloat16"))
    assert not rows[:, 3 * width :].any()
    for n, d in ((3, 10**9), (64, 10**9 + 7), (4096, 10**6), (8, 100)):
        width, times = scaling._tiles(n, d)
        assert 0 <= d - width * times < times
        assert d - width * times <= d / 100
        assert width * n <= max(scaling.BASE_VALUES, 200 * n)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_rule_and_dtype_is_checked(dtype: str) -> None:
    asked = plan(dtype=dtype, rules=None, devices="cpu", n="5,16", d="150,25000")
    points = list(scaling.study(asked, [Cpu()]))
    assert {p.rule for p in points} == set(scaling.RULES)
    sizes = [p for p in points if p.part == "sizes"]
    assert len(sizes) == 4 * len(scaling.RULES)
    assert {p.checked for p in points} == {"plain NumPy"}
    assert all(p.seconds and p.reads and not p.reason for p in points)


def test_rules_without_a_plain_form_are_compared_with_the_reference_where_rows_do_not_repeat() -> None:
    points = list(
        scaling.study(plan(rules=["bucketing | median", "bucketing | krum"], d="500,30000", devices="cpu"), [Cpu()])
    )
    checked = {(p.rule.split("(")[0], p.d): p.checked for p in points if p.part == "sizes"}
    assert checked == {
        ("bucketing | median", 500): "reference backend",
        ("bucketing | krum", 500): "reference backend",
        ("bucketing | median", 30_000): "not checked",
        ("bucketing | krum", 30_000): "not checked",
    }


@pytest.mark.parametrize("where", [0, 12_000, 24_999, 25_000])
def test_a_wrong_result_anywhere_looked_at_is_found(
    where: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Wrong(Cpu):
        def aggregate(self, rows: Any, rule: Any, f: int, out: Any) -> None:
            super().aggregate(rows, rule, f, out)
            if str(rule) == "median":
                out[where] += 1e-3

    monkeypatch.setitem(devices.DEVICES, "cpu", Wrong)
    arguments = ["--devices", "cpu", "--n", "8", "--d", "25001", "--rules", "median", "--rules", "mean"]
    run = CliRunner().invoke(app, ["scaling", "--out", str(tmp_path), "--seconds", "1e-9", *arguments])
    assert run.exit_code == 1
    assert "results are wrong, see results.csv; the first: median: the result differs by 1.0e-03" in run.output
    points = [Point(**each) for each in json.loads((tmp_path / "results.json").read_text())["points"]]
    assert {(p.rule, p.checked, p.seconds is None) for p in points} == {
        ("median", "wrong", True),
        ("mean", "plain NumPy", False),
    }


# ---- measuring ---------------------------------------------------------------------------------------------------


def test_reads_and_bandwidth() -> None:
    cpu, cuda, _ = (p for p in scaling.study(plan(d="1e5"), [Cpu(), Gpu()]) if p.part == "sizes" or p.threads == 1)
    size = 8 * 1e5 * 4
    assert (cpu.device, cpu.kind, cpu.threads, cpu.f) == ("cpu", "measured", rk.info()["threads"], 2)
    assert cpu.seconds == pytest.approx(size / 1e10)
    assert cpu.reads == cpu.low == cpu.high == pytest.approx(1)
    assert (cpu.pageable_seconds, cpu.pinned_seconds) == (None, None)
    assert cuda.threads is None
    assert cuda.seconds == pytest.approx(1e-4 + size / 1e12)
    assert cuda.read_seconds == pytest.approx(size / 1e12)
    assert cuda.reads == pytest.approx(1 + 1e-4 * 1e12 / size)
    assert cuda.pageable_seconds == pytest.approx(size / 5e9)
    assert cuda.pinned_seconds == pytest.approx(size / 5e10)
    assert scaling._bandwidth([cpu, cuda], "cuda") == pytest.approx(1e12)
    assert scaling._bandwidth([cpu], "cuda") is None


def test_the_time_of_a_point_is_bounded() -> None:
    size = 8 * 1000 * 4
    pair = 2 * size / 1e10
    rounds = {
        seconds: next(scaling.study(plan(devices="cpu", seconds=seconds), [Cpu()])).rounds
        for seconds in (1e-9, 4.5 * pair, 1.0)
    }
    assert list(rounds.values()) == [1, 4, scaling.ROUNDS]  # of which one pair warms up


def test_whatever_fails_is_a_reason_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Small(Gpu):
        memory = 200_000

        def put(self, host: Any) -> Any:
            if host.shape == (16, 500):
                raise MemoryError("nothing left")
            return super().put(host)

        def free_bytes(self) -> int:
            if len(asked.n) == 1:
                raise RuntimeError("an earlier kernel failed")
            return super().free_bytes()

        def get(self, array: Any) -> Any:
            if len(array) == 333:
                raise RuntimeError("cannot be fetched")
            return super().get(array)

        def refill(self, rows: Any, host: Any) -> None:
            if host.shape == (8, 500):
                raise OSError("no link")
            super().refill(rows, host)

        def aggregate(self, rows: Any, rule: Any, f: int, out: Any) -> None:
            if str(rule) == "mean" and rows.shape == (8, 1000):
                raise RuntimeError("CUDA out of memory")
            super().aggregate(rows, rule, f, out)

    krum = "krum(neighbours=5)"
    asked = plan(rules=["median", "mean", krum], n="4,8,16", d="500,1000,8000", model="h100")
    points = list(scaling.study(asked, [Cpu(), Small()]))
    assert sum(p.part == "sizes" for p in points) == 3 * 3 * 3 * 3  # none is dropped
    measured = [p for p in points if p.kind == "measured" and p.part == "sizes"]
    why = {(p.device, p.rule, p.n, p.d): p.reason for p in measured if p.reason}
    for device, d in (("cpu", 500), ("cpu", 1000), ("cpu", 8000), ("cuda", 500), ("cuda", 1000)):
        assert why.pop((device, krum, 4, d)).startswith("ValueError: krum")
    for rule in ("median", "mean", krum):
        assert why.pop(("cuda", rule, 16, 500)) == "MemoryError: nothing left"
        assert why.pop(("cuda", rule, 8, 500)) == "transfer: OSError: no link"
        for n in (4, 8, 16):
            reason = why.pop(("cuda", rule, n, 8000))
            assert reason == f"rows of {n * 32e-6:.3g} GB do not fit into 60% of the 0.0002 GB free in cuda's memory"
    assert why == {("cuda", "mean", 8, 1000): "RuntimeError: CUDA out of memory"}
    still = next(p for p in points if (p.device, p.rule, p.n, p.d) == ("cuda", "median", 8, 500))
    assert still.seconds
    assert still.pinned_seconds is None

    asked = plan(n="8,9", d="333", devices="cuda")
    assert {p.reason for p in scaling.study(asked, [Small()])} == {"RuntimeError: cannot be fetched"}
    asked = plan(devices="cuda")
    assert [p.reason for p in scaling.study(asked, [Small()])] == ["RuntimeError: an earlier kernel failed"]

    monkeypatch.setattr(scaling, "host_bytes", lambda: 100_000)
    points = list(scaling.study(plan(d="1e3,1e4"), [Cpu(), Gpu()]))
    reasons = [(p.device, p.d, p.reason) for p in points if p.reason]
    what = "rows of 0.00032 GB do not fit into 60% of the 0.0001 GB free in main memory"
    assert reasons == [("cpu", 10_000, what), ("cuda", 10_000, what)]


def test_models_know_their_memory_and_their_rules() -> None:
    asked = plan(rules=["median", "nnm | median"], d="1e3,1e12", devices="cpu", model="h100,rtx4090")
    points = [p for p in scaling.study(asked, [Cpu()]) if p.kind == "model"]
    assert len(points) == 8
    assert {p.checked for p in points} == {"model, not measured"}
    for p in points:
        if p.d == 10**12:
            assert f"GB free in the memory of {roofline.MODELS[p.device].name}" in p.reason
        elif p.rule == "nnm | median":
            assert p.reason == "the model does not know this rule"
        else:
            assert p.seconds == pytest.approx(9 * 4e3 / roofline.MODELS[p.device].bandwidth)
            assert p.reads == pytest.approx(9 / 8)


def test_threads_are_measured_on_the_largest_rows_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(Cpu):
        def aggregate(self, rows: Any, rule: Any, f: int, out: Any) -> None:
            super().aggregate(rows, rule, f, out)
            self.now += 1 / (requested_threads() or 6)

    assert scaling._threads()[0] == 1
    info = rk.info()
    monkeypatch.setattr(rk, "info", lambda: info | {"threads": 6})
    assert scaling._threads() == [1, 2, 4, 6]
    points = [p for p in scaling.study(plan(n="4,8", d="500,1000"), [Counting(), Gpu()]) if p.part == "threads"]
    assert [(p.device, p.n, p.d, p.threads) for p in points] == [("cpu", 8, 1000, k) for k in (1, 2, 4, 6)]
    assert [round(1 / (p.seconds or 0)) for p in points] == [1, 2, 4, 6]
    assert requested_threads() == 0


# ---- where a device overtakes ------------------------------------------------------------------------------------


def test_crossover() -> None:
    points = list(scaling.study(plan(d="1e3..1e6:4"), [Cpu(), Gpu()]))
    found = {each.transfer: each for each in scaling.crossovers(points)}
    assert {(each.device, each.rule, each.dtype, each.n) for each in found.values()} == {
        ("cuda", "median", "float32", 8)
    }
    none, pinned = ((1e-4 / slope) / 32 for slope in (1e-10 - 1e-12, 1e-10 - 1e-12 - 2e-11))
    assert found["none"].d == pytest.approx(none, rel=0.05)
    assert found["none"].said == f"faster from about d = {found['none'].d:,.0f}"
    assert found["pinned"].d == pytest.approx(pinned, rel=0.05)
    assert found["pageable"].d is None
    assert found["pageable"].said == "not faster at the largest d measured (1,000,000)"


def test_crossing() -> None:
    assert scaling._crossing([(100, 2.0), (1000, 3.0)]) == (100.0, "faster at every d measured (100 to 1,000)")
    assert scaling._crossing([(100, 0.5)]) == (None, "not faster at the largest d measured (100)")
    assert scaling._crossing([(100, 2.0), (1000, 1.0)])[0] is None  # equal is not faster
    d, said = scaling._crossing([(100, 2.0), (1000, 0.1), (100_000, 10.0), (1_000_000, 20.0)])  # for good
    assert d == pytest.approx(10_000)
    assert said == "faster from about d = 10,000"


def test_no_crossover_where_only_one_ran() -> None:
    assert scaling.crossovers(list(scaling.study(plan(), [Cpu()]))) == []
    assert scaling.crossovers(list(scaling.study(plan(), [Gpu()]))) == []


# ---- the command -------------------------------------------------------------------------------------------------


def test_both_devices_into_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(devices.DEVICES, "cpu", Cpu)
    monkeypatch.setitem(devices.DEVICES, "cuda", Gpu)
    info = rk.info()
    monkeypatch.setattr(rk, "info", lambda: info | {"threads": 2})
    arguments = ["--n", "4,8", "--d", "1e3..1e5", "--dtype", "float16,float32", "--model", "a100", "--seconds", "1e-9"]
    out = tmp_path / "new" / "study"
    rules = ["--rules", "median, krum", "--rules", "median"]
    run = CliRunner().invoke(app, ["scaling", "--out", str(out), *arguments, *rules])
    assert run.exit_code == 0, run.output
    assert "cuda, median, n=8, float32, transfer: pinned: faster from about d = " in run.output
    saved = json.loads((out / "results.json").read_text())
    assert {"date", "cpu", "isa", "robustkern", "memory_free_bytes", "backends"} <= set(saved["machine"])
    assert saved["plan"]["d"] == [1000, 10_000, 100_000]
    assert saved["devices"]["cuda"]["yardstick_bytes_per_second"] == pytest.approx(1e12)
    assert saved["devices"]["cuda"]["name"] == "stand-in"
    assert saved["missing"] == {}
    assert saved["models"]["a100"]["label"] == "model, not measured"
    assert saved["not_measured"] == {}
    assert len(saved["crossovers"]) == 2 * 2 * 2 * 3
    with open(out / "results.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(saved["points"]) == 2 * 2 * 3 * 2 * 3 + 2 * 2
    assert {(line["kind"], line["device"]) for line in lines} == {
        ("measured", "cpu"),
        ("measured", "cuda"),
        ("model", "a100"),
    }
    for line, point in zip(lines, saved["points"], strict=True):
        assert all(line[key] == ("" if value is None else str(value)) for key, value in point.items())
    names = {path.name for path in out.iterdir()} - {".robustkern"}
    assert names == {
        *("results.csv", "results.json", "threads.png"),
        *(
            f"{kind}-{dtype}.png"
            for kind in ("time", "reads", "rows", "cuda-over-cpu")
            for dtype in ("float16", "float32")
        ),
    }
    assert all((out / name).stat().st_size > 1000 for name in names)


def test_the_real_cpu_and_a_device_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> Device:
        raise RuntimeError("torch: sees no CUDA device; cupy is not here")

    monkeypatch.setitem(devices.DEVICES, "cuda", absent)
    arguments = ["--n", "8", "--d", "2e3", "--rules", "median", "--rules", "mean", "--seconds", "0.01"]
    run = CliRunner().invoke(app, ["scaling", "--out", str(tmp_path), *arguments])
    assert run.exit_code == 0, run.output
    assert "cuda is not here: torch: sees no CUDA device; cupy is not here" in run.output
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["missing"] == {"cuda": "torch: sees no CUDA device; cupy is not here"}
    assert set(saved["devices"]) == {"cpu"}
    assert saved["devices"]["cpu"]["yardstick_bytes_per_second"] > 1e6
    assert all(p["seconds"] > 0 and p["checked"] == "plain NumPy" for p in saved["points"])
    run = CliRunner().invoke(app, ["scaling", "--out", str(tmp_path), "--devices", "cuda", *arguments])
    assert run.exit_code == 1
    assert "none of the devices is here (cuda)" in run.output
    saved = json.loads((tmp_path / "results.json").read_text())
    assert (saved["points"], list(saved["missing"])) == ([], ["cuda"])


def test_without_matplotlib_there_are_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(devices.DEVICES, "cpu", Cpu)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    arguments = ["--devices", "cpu", "--n", "8", "--d", "500", "--rules", "median", "--seconds", "1e-9"]
    run = CliRunner().invoke(app, ["scaling", "--out", str(tmp_path), *arguments])
    assert run.exit_code == 0, run.output
    assert "no pictures: " in run.output
    assert "pip install 'robustkern[plot]'" in run.output
    assert {path.name for path in tmp_path.iterdir()} == {".robustkern", "results.csv", "results.json"}


def test_an_interrupted_study_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(Cpu):
        def aggregate(self, rows: Any, rule: Any, f: int, out: Any) -> None:
            if str(rule) == "mean":
                raise KeyboardInterrupt
            super().aggregate(rows, rule, f, out)

    monkeypatch.setitem(devices.DEVICES, "cpu", Interrupted)
    arguments = ["--devices", "cpu", "--n", "8", "--d", "500", "--rules", "median", "--rules", "mean"]
    run = CliRunner().invoke(app, ["scaling", "--out", str(tmp_path), "--seconds", "1e-9", *arguments])
    assert run.exit_code == 130
    assert "│ median" in run.stdout  # what was measured is shown
    assert "stopped" in run.stderr
    assert [p["rule"] for p in json.loads((tmp_path / "results.json").read_text())["points"]] == ["median"]


# ---- devices -----------------------------------------------------------------------------------------------------


def test_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.host_bytes() > 1e6
    monkeypatch.setattr(devices, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(devices, "CGROUP", tmp_path / "max")
    assert devices.host_bytes() > 1e6  # half of the machine's
    devices.MEMINFO.write_text("MemTotal: 30 kB\nMemAvailable: 20 kB\n")
    assert devices.host_bytes() == 20 * 1024
    devices.CGROUP.write_text("max\n")
    assert devices.host_bytes() == 20 * 1024
    devices.CGROUP.write_text("5000\n")
    assert devices.host_bytes() == 5000


def test_the_cpu_is_a_device() -> None:
    device = Device()
    rows = scaling.repeated_rows(8, 500, "float32")
    read, share = device.yardstick(device.put(rows))
    assert device.time(read) > 0
    assert share == 1
    assert device.facts()["free_bytes"] > 1e6
    with device.pinned(rows), pytest.raises(NotImplementedError):
        device.refill(rows, rows)


class FakeRuntime:
    """What both libraries ask of the CUDA runtime."""

    def __init__(self, status: int = 0) -> None:
        self.status = status
        self.calls: list[tuple[Any, ...]] = []

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.calls.append((address, size, flags))
        return self.status

    def cudaHostUnregister(self, address: int) -> int:
        self.calls.append((address,))
        return 0


def test_torch_as_a_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is asked of torch, with tensors on the CPU."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="sees no CUDA device"):
        TorchCuda()
    runtime = FakeRuntime()
    properties = SimpleNamespace(name="G", major=9, minor=0, total_memory=10**9)
    for name, value in {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_properties": lambda _: properties,
        "mem_get_info": lambda: (10**8, 10**9),
        "cudart": lambda: runtime,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(TorchCuda, "place", "cpu")
    monkeypatch.setattr(devices, "COPY_BYTES", 4 * 500)
    device = TorchCuda()
    facts = device.facts()
    assert (facts["name"], facts["compute_capability"], facts["memory_bytes"], facts["free_bytes"]) == (
        "G",
        "9.0",
        10**9,
        10**8,
    )
    assert facts["library"] == f"torch {torch.__version__}"
    points = list(scaling.study(plan(d="1e3", dtype="float32,bfloat16", rules=["median", "krum"]), [device]))
    assert [(p.device, p.checked, p.reason) for p in points] == [("cuda", "plain NumPy", "")] * 4
    assert all(p.pageable_seconds and p.pinned_seconds and p.reads for p in points)
    (address, size, flags), (same,) = runtime.calls[:2]
    assert (address, size, flags) == (same, 8 * 1000 * 4, 0)
    rows = device.put(np.arange(4000, dtype=np.float32).reshape(4, 1000))
    copy, share = device.yardstick(rows)
    assert share == pytest.approx(2 * 500 / 4000)
    assert device.time(copy) > 0
    device.refill(rows, np.ones((4, 1000), dtype=np.float32))
    assert device.get(rows).sum() == 4000
    runtime.status = 2
    with (
        pytest.raises(RuntimeError, match="cudaHostRegister answers 2 for 400 bytes"),
        device.pinned(np.ones(100, "f4")),
    ):
        pass


class Settable(np.ndarray[Any, Any]):
    def set(self, host: Any) -> None:
        self[...] = host


def test_cupy_as_a_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is asked of CuPy, with NumPy arrays."""
    calls: list[Any] = []
    properties = {"name": b"G", "major": 8, "minor": 9, "totalGlobalMem": 10**9}
    runtime = SimpleNamespace(
        getDeviceCount=lambda: 1,
        getDevice=lambda: 0,
        getDeviceProperties=lambda _: properties,
        runtimeGetVersion=lambda: 12040,
        driverGetVersion=lambda: 12060,
        memGetInfo=lambda: (10**8, 10**9),
        hostRegister=lambda *given: calls.append(given),
        hostUnregister=lambda *given: calls.append(given),
        deviceSynchronize=lambda: None,
    )
    cupy = SimpleNamespace(
        __version__="13",
        cuda=SimpleNamespace(runtime=runtime),
        asarray=lambda host: host.copy().view(Settable),
        asnumpy=np.asarray,
        empty_like=np.empty_like,
        copyto=np.copyto,
        get_default_memory_pool=lambda: SimpleNamespace(free_all_blocks=lambda: calls.append("freed")),
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    device = CupyCuda()
    facts = device.facts()
    assert (facts["name"], facts["library"], facts["driver"]) == ("G", "cupy 13", 12060)
    rows = np.random.default_rng(0).standard_normal((4, 600)).astype(np.float32)
    there = device.put(rows)
    there.set(0 * rows)
    with device.pinned(rows):
        device.refill(there, rows)
    np.testing.assert_array_equal(device.get(there), rows)
    assert calls == [(rows.ctypes.data, rows.nbytes, 0), (rows.ctypes.data,)]
    copy, share = device.yardstick(there)
    assert device.time(copy) > 0
    assert share == 2
    device.release()
    assert calls[-1] == "freed"
    assert device.free_bytes() == 10**8


def test_opening_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    info = rk.info()

    def backends(**states: str) -> None:
        monkeypatch.setattr(rk, "info", lambda: info | {"backends": {"cpp": "available", **states}})

    def absent() -> Device:
        raise ImportError("No module named 'torch'")

    def broken() -> Device:
        raise OSError("libcuda.so: cannot open shared object file")

    monkeypatch.setattr(devices, "TorchCuda", absent)
    monkeypatch.setattr(devices, "CupyCuda", broken)
    backends(cuda="no driver")
    with pytest.raises(RuntimeError) as raised:
        devices.open_cuda()
    assert str(raised.value) == (
        "no driver; torch is not here: No module named 'torch'; cupy: libcuda.so: cannot open shared object file"
    )
    backends()
    assert devices.open_devices(["cuda"]) == (
        [],
        {
            "cuda": "this version of robustkern has no CUDA backend; torch is not here: No module named 'torch'; "
            "cupy: libcuda.so: cannot open shared object file"
        },
    )
    monkeypatch.setattr(devices, "CupyCuda", Gpu)
    with pytest.raises(RuntimeError, match="has no CUDA backend"):
        devices.open_cuda()
    backends(cuda="available")
    assert isinstance(devices.open_cuda(), Gpu)
    assert math.isfinite(devices.open_cuda().clock())


def test_without_the_compiled_backend_there_is_no_cpu_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._loaded, "cpp", "no compiled module")
    there, missing = devices.open_devices(["cpu"])
    assert there == []
    assert missing == {"cpu": "backend 'cpp' is not available: no compiled module"}
