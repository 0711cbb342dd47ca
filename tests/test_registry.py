"""Rule objects and their text, the choice of backend, threads, and what `info` says."""

from __future__ import annotations

import gc
import os
import pathlib
import pickle
import subprocess
import sys
import threading
import time
import warnings
from typing import Any

import numpy as np
import pytest
from support import FAST, IMPLEMENTATIONS, make_rows

import robustkern as rk
from robustkern.backends import registry, threads
from robustkern.contract.primitives import PRIMITIVES
from robustkern.contract.rows import DTYPES

PACKAGE = pathlib.Path(rk.__file__).parent


# ---- the text form -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rule", "printed"),
    [
        ("median", rk.Median(), "median"),
        (" median( ) ", rk.Median(), "median"),
        ("median(even='low')", rk.Median("low"), "median(even='low')"),
        ("ctma(trimmed_mean)", rk.CTMA(rk.TrimmedMean()), "ctma(trimmed_mean)"),
        ("ctma(anchor=trimmed_mean)", rk.CTMA(rk.TrimmedMean()), "ctma(trimmed_mean)"),
        ("nnm|krum(neighbours=3)", rk.NNM() | rk.Krum(3), "nnm | krum(neighbours=3)"),
        ("nnm | ctma(geometric_median)", rk.NNM() | rk.CTMA(rk.GeometricMedian()), "nnm | ctma(geometric_median)"),
        ("ctma(nnm | median)", rk.CTMA(rk.NNM() | rk.Median()), "ctma(nnm | median)"),
        ("nnm | (bucketing(2) | mean)", rk.NNM() | rk.Bucketing(2) | rk.Mean(), "nnm | bucketing(size=2) | mean"),
        ("rfa", rk.GeometricMedian.rfa(), "geometric_median(nu=0.1, max_iter=3, start='zero')"),
        ("multi_krum(m=2)", rk.MultiKrum(m=2), "multi_krum(m=2)"),
    ],
)
def test_text_form(text: str, rule: rk.Rule, printed: str) -> None:
    assert rk.parse_rule(text) == rule
    assert str(rule) == printed
    assert hash(rk.parse_rule(printed)) == hash(rule)
    assert pickle.loads(pickle.dumps(rule)) == rule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("medain", "'medain' is not known; did you mean 'median'.*known: aksel, arc, bucketing"),
        ("", "not in Python call syntax"),
        ("median(", "not in Python call syntax"),
        ("nnm", "nnm only mixes the rows; end it with a rule that combines them, e.g. 'nnm | mean'"),
        (
            "median | krum",
            "median leaves one row, so it must be the last rule of a chain; only arc, bucketing, clipping, nnm may come",
        ),
        ("median(odd=1)", r"median: .*unexpected keyword argument 'odd' \(its parameters: even\)"),
        ("mean(1)", "mean: .*its parameters: none"),
        ("clipping", r"clipping: missing a required argument: 'limit' \(its parameters: limit\)"),
        ("median(**{})", r"'\*\*' is not understood"),
        ("__import__('os').system('true')", r"cannot read .* in .*; expected names of rules, calls and '\|'"),
        (
            "ctma(median + mean)",
            r"cannot read 'median \+ mean' in 'ctma\(median \+ mean\)'; expected names of rules, calls and '\|'",
        ),
        ("ctma(median, mean)", "ctma: "),
        ("ctma(3)", "rule must be a rule object or its text form; got int"),
        ("ctma()", "ctma: .*missing"),
        ("(" * 400 + "median" + ")" * 400, "not in Python call syntax"),
        ("m" * 1001, "may have 1000 characters; got 1001"),
        ("krum(neighbours=__import__('os'))", "'__import__' is not known"),
        (
            "rfa(nu=1)",
            "'rfa' takes no parameters; write geometric_median\\(nu=0.1, max_iter=3, start='zero'\\) with others",
        ),
        ("median\ud800", "not in Python call syntax"),
        ("geometric_median(nu=1" + "0" * 400 + ")", "nu must be a finite number of at least 0"),
        ("median(even='middle')", "even must be 'mean', 'low' or 'high'; got 'middle'"),
    ],
)
def test_texts_that_are_no_rule(text: str, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        rk.parse_rule(text)


def test_rule_objects() -> None:
    assert rk.parse_rule("median") != rk.parse_rule("median(even='low')")
    with pytest.raises(AttributeError):
        rk.Median().even = "low"  # type: ignore[misc]
    with pytest.raises(TypeError, match="unsupported operand"):
        rk.NNM() | 3  # type: ignore[operator]
    with pytest.raises(TypeError, match="rule must be a rule object or its text form; got int"):
        rk.aggregate(np.ones((3, 2)), 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="rule must be a rule object or its text form; got list"):
        rk.parse_rule(["median"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a chain must end in a rule that combines the rows"):
        rk.aggregate(np.ones((3, 2)), rk.NNM() | rk.Bucketing(), f=1)
    assert set(rk.available_rules()) == {
        "aksel",
        "arc",
        "bucketing",
        "bulyan",
        "caf",
        "centre",
        "centred_clipping",
        "cge",
        "clipping",
        "ctma",
        "faba",
        "geometric_median",
        "krum",
        "mean",
        "mda",
        "mean_around_median",
        "median",
        "medoid",
        "monna",
        "multi_krum",
        "nnm",
        "phocas",
        "rfa",
        "smea",
        "spectral",
        "trimmed_mean",
    }


# ---- backends ----------------------------------------------------------------------------------------------------


def test_capability_table_is_what_runs() -> None:
    """Every "yes" runs, and there is an answer for every combination."""
    table = registry.capabilities()
    assert len(table) == len(registry.BACKENDS) * len(PRIMITIVES) * len(DTYPES)
    for entry in table:
        if entry["available"] == "yes":
            x = make_rows("normal", 3, 5, np.dtype(entry["dtype"]))
            rk.median(x, backend=entry["backend"])
        else:
            with pytest.raises(rk.BackendUnavailable):
                rk.median(np.ones((3, 2), dtype=entry["dtype"]), backend=entry["backend"])
    assert rk.info()["capabilities"] == table


def test_the_docs_table_is_the_capability_table() -> None:
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    rows = [f"| `{b.name}` | {b.device} | {', '.join(d.name for d in b.dtypes)} |" for b in registry.BACKENDS]
    assert "\n".join(rows) in text


def test_a_required_backend_that_is_missing_ends_the_tests() -> None:
    """A skip would hide it: what CI relies on."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); sys.modules['numba'] = None; import support"
    done = subprocess.run(
        [sys.executable, "-c", code, str(pathlib.Path(__file__).parent)],
        env={**os.environ, "ROBUSTKERN_REQUIRE": "cpp,numba"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "ROBUSTKERN_REQUIRE=cpp,numba, but missing: {'numba':" in done.stderr


def test_use_backend_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    x = make_rows("normal", 3, 5, np.dtype(np.float32))

    def used(**options: Any) -> str:
        return str(rk.median(x, return_info=True, **options)[1].backend)

    best = next(name for name in ("cpp", "numba", "reference") if any(k.startswith(name) for k in IMPLEMENTATIONS))
    assert used() == best
    monkeypatch.setenv("ROBUSTKERN_BACKEND", "reference")
    registry._from_environment.cache_clear()
    assert used() == "reference"
    with rk.use_backend("numba"):
        assert used() == "numba"
        assert used(backend="reference") == "reference"
        with rk.use_backend("auto"):
            assert used() == best
    monkeypatch.setenv("ROBUSTKERN_BACKEND", "fast")
    registry._from_environment.cache_clear()
    with pytest.raises(
        ValueError, match="ROBUSTKERN_BACKEND must be one of auto, cpp, numba, reference, cuda; got 'fast'"
    ):
        used()
    with pytest.raises(ValueError, match="backend must be one of"), rk.use_backend("gpu"):
        pass


def test_a_missing_backend_gives_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._loaded, "numba", "No module named 'numba' (run: pip install 'robustkern[numba]')")
    with pytest.raises(rk.BackendUnavailable, match=r"numba: No module named 'numba' \(run: pip install"):
        rk.median(np.ones((3, 2)), backend="numba")
    with pytest.raises(rk.BackendUnavailable, match="backend 'numba' is not available"), rk.use_backend("numba"):
        pass
    with pytest.raises(rk.BackendUnavailable, match="cpp: runs on cpu, the rows are on cuda"):
        registry.choose("auto", {np.dtype(np.float32)}, "cuda")
    assert "pip install" in rk.info()["backends"]["numba"]
    numba = pytest.importorskip("numba")
    monkeypatch.delitem(registry._loaded, "numba")
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    with pytest.raises(rk.BackendUnavailable, match=r"Numba's compiler is switched off \(unset NUMBA_DISABLE_JIT\)"):
        rk.median(np.ones((3, 2)), backend="numba")
    monkeypatch.setitem(registry._loaded, "cpp", "no compiled module")
    monkeypatch.setattr(registry, "_warned", False)
    with pytest.warns(RuntimeWarning, match="runs on its reference backend, .*slower.* Missing: cpp: no compiled"):
        rk.median(np.ones((3, 2)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rk.median(np.ones((3, 2)))  # said once


@pytest.mark.parametrize("isa", [name.removeprefix("cpp-") for name in FAST if name.startswith("cpp-")])
def test_isa_by_environment(isa: str) -> None:
    code = "import robustkern as rk, numpy as np; print(rk.info()['isa'], rk.median(np.eye(5))[0])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "ROBUSTKERN_ISA": isa},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [isa, "0.0"]


def test_bad_environment_is_named() -> None:
    for name, value, message in (
        ("ROBUSTKERN_ISA", "v9", "ROBUSTKERN_ISA must be one of"),
        ("ROBUSTKERN_NUM_THREADS", "many", "ROBUSTKERN_NUM_THREADS must be a positive integer up to 65536; got 'many'"),
        ("ROBUSTKERN_NUM_THREADS", "9" * 30, "ROBUSTKERN_NUM_THREADS must be a positive integer up to 65536; got"),
    ):
        code = "import robustkern as rk, numpy as np; rk.median(np.eye(5))"
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, name: value}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert message in done.stderr


def test_info() -> None:
    info = rk.info()
    assert info["version"] == rk.__version__
    assert set(info["backends"]) == {"cpp", "numba", "reference", "cuda"}
    assert info["threads"] >= 1
    assert info["isas"] == [name.removeprefix("cpp-") for name in FAST if name.startswith("cpp-")]


# ---- threads -----------------------------------------------------------------------------------------------------


def test_numba_keeps_the_threads_of_one_number() -> None:
    x = np.random.default_rng(0).standard_normal((20, 300_000))
    for k in (2, 3, np.int64(5), 4, 2):
        rk.set_num_threads(k)
        rk.median(x, backend="numba")
        gc.collect()
        for _ in range(200):  # the others end by themselves
            if (alive := sum(thread.name.startswith("robustkern") for thread in threading.enumerate())) <= k:
                break
            time.sleep(0.01)
        assert 0 < alive <= k


def test_where_the_system_does_not_say_which_processors_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert threads.usable_cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert threads.usable_cores() == os.cpu_count()
    x = np.random.default_rng(0).standard_normal((20, 50_000))
    np.testing.assert_allclose(rk.mean(x, backend="numba"), x.mean(axis=0), atol=1e-12)


@pytest.mark.parametrize("bad", [0, -1, 2**31])
def test_set_num_threads_bad_value(bad: int) -> None:
    with pytest.raises(ValueError, match=f"k must be between 1 and 65536; got {bad}"):
        rk.set_num_threads(bad)


@pytest.mark.parametrize("bad", [1.5, "2", True])
def test_set_num_threads_bad_type(bad: Any) -> None:
    with pytest.raises(TypeError, match="k must be an int or None; got"):
        rk.set_num_threads(bad)


def test_several_python_threads_at_once(backend: str) -> None:
    x = [make_rows("normal", 15, 40_000, np.dtype(np.float32), seed=s) for s in range(4)]
    rules = ("ctma(median)", "geometric_median", "nnm | trimmed_mean", "median")
    want = [rk.aggregate(x[i], rules[i], f=4, backend=backend) for i in range(4)]
    failures = []

    def work(i: int) -> None:
        for _ in range(5):
            if not np.array_equal(rk.aggregate(x[i], rules[i], f=4, backend=backend), want[i]):
                failures.append(i)

    workers = [threading.Thread(target=work, args=(i % 4,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def test_the_gil_is_released() -> None:
    """Another Python thread goes on while a kernel runs on one thread."""
    x = np.random.default_rng(0).standard_normal((300, 60_000)).astype(np.float32)
    rk.set_num_threads(1)
    ticks, stop = [0], threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks[0] += 1
            time.sleep(0.001)

    for name in ("cpp", "numba"):
        rk.kernels.gram(x[:, :100], backend=name)
        ticker = threading.Thread(target=tick)
        stop.clear()
        ticker.start()
        before, started = ticks[0], time.perf_counter()
        rk.kernels.gram(x, backend=name)
        elapsed = time.perf_counter() - started
        during = ticks[0] - before
        stop.set()
        ticker.join()
        assert elapsed > 0.02
        assert during >= 5


FORK = """
import os, signal, sys, numpy as np, robustkern as rk
x = np.random.default_rng(0).standard_normal((9, 400_000)).astype(np.float32)
want = rk.ctma(x, f=2, backend=sys.argv[1])      # the pool is in use
child = os.fork()
if child == 0:
    signal.alarm(60)
    ok = np.array_equal(rk.ctma(x, f=2, backend=sys.argv[1]), want)
    os._exit(0 if ok else 1)
_, status = os.waitpid(child, 0)
assert np.array_equal(rk.ctma(x, f=2, backend=sys.argv[1]), want)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_a_forked_child_does_not_hang(backend: str) -> None:
    if backend == "cuda-emulated":
        pytest.skip("only tests know it")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORK, backend], timeout=120, check=False)
    assert done.returncode == 0


def test_threadpoolctl_sees_and_limits_the_pool() -> None:
    threadpoolctl = pytest.importorskip("threadpoolctl")
    rk.median(np.ones((3, 2)), backend="cpp")
    with threadpoolctl.threadpool_limits(limits=1, user_api="openmp"):
        assert rk.info()["threads"] == 1
    if (os.cpu_count() or 1) > 1:
        assert rk.info()["threads"] > 1


# ---- the package -------------------------------------------------------------------------------------------------


def test_importing_is_quick_and_loads_no_framework() -> None:
    code = (
        "import sys, time, numpy; t = time.process_time(); import robustkern; t = time.process_time() - t\n"
        "heavy = {'torch', 'numba', 'jax', 'cupy', 'matplotlib', 'typer', 'rich', 'sklearn'} & set(sys.modules)\n"
        "print(t); assert not heavy, heavy"
    )
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(times) < 0.3


def test_public_names_are_the_documented_ones() -> None:
    assert len(rk.__all__) == len(set(rk.__all__))
    for name in rk.__all__:
        value = getattr(rk, name)
        if callable(value):
            assert (value.__doc__ or "").strip(), name
    for function in ("aggregate", "median", "krum", "ctma"):
        doc = getattr(rk, function).__doc__
        for section in ("Parameters", "Returns", "Notes", "References"):
            assert section in doc, (function, section)


def test_docstring_examples() -> None:
    import doctest

    import robustkern.functions

    for module in (rk, robustkern.functions):
        result = doctest.testmod(module)
        assert result.attempted > 0
        assert result.failed == 0


def test_versions_agree() -> None:
    import importlib.metadata

    from robustkern import _cpu

    assert rk.__version__ == importlib.metadata.version("robustkern") == _cpu.__version__
