"""The process around a call: what other libraries set, start, load or lack must not reach a result, nor hang it."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import dataclasses
import os
import pickle
import subprocess
import sys
import textwrap
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import robustkern as rk
from robustkern.backends import floats
from robustkern.rules import registered

torch = pytest.importorskip("torch")

Array = NDArray[Any]
RULES = ("mean", "median", "trimmed_mean", "mean_around_median", "geometric_median", "krum", "ctma(median)",
         "ctma(geometric_median)", "nnm | median")  # fmt: skip


def run(code: str, *, timeout: float = 200, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=timeout,
                          check=False, env={**os.environ, **environment})  # fmt: skip


# ---- states of the calling thread --------------------------------------------------------------------------------

LIBM = ctypes.CDLL("libm.so.6") if sys.platform.startswith("linux") else None
ROUNDING = {"down": 0x400, "up": 0x800, "to zero": 0xC00}


@contextlib.contextmanager
def state(name: str) -> Iterator[None]:
    """Put this thread into a state that another library could leave it in."""
    if name == "subnormals vanish":
        if not torch.set_flush_denormal(True):
            pytest.skip("torch cannot flush subnormal numbers on this processor")
        try:
            yield
        finally:
            torch.set_flush_denormal(False)
    elif name.startswith("round"):
        if LIBM is None or os.uname().machine != "x86_64":
            pytest.skip("how to set rounding is known on x86-64 Linux only")
        LIBM.fesetround(ROUNDING[name.removeprefix("round ")])
        try:
            yield
        finally:
            LIBM.fesetround(0)
    elif name == "numpy raises":
        with np.errstate(all="raise"):
            yield
    elif name == "warnings are errors":
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    else:
        torch.set_default_device("meta")
        try:
            yield
        finally:
            torch.set_default_device(None)


STATES = ("subnormals vanish", "round down", "round up", "round to zero", "numpy raises", "warnings are errors",
          "torch's default device is another")  # fmt: skip


def hard_rows(n: int, d: int) -> Array:
    """Ordinary rows, with subnormal columns, equal ones, and ones near the largest number."""
    x = np.random.default_rng(n).standard_normal((n, d)).astype(np.float32)
    x[:, ::7] *= np.float32(1e-40)
    x[:, 3::11] = 0.3
    x[:, 5::13] *= np.float32(3e37)
    return x


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("backend", ["cpp", "numba", "reference"])
def test_a_call_gives_the_same_bits_in_any_state(name: str, backend: str) -> None:
    try:
        rk.median(np.ones((3, 2)), backend=backend)
    except rk.BackendUnavailable as missing:
        pytest.skip(str(missing))
    with state(name):
        before = (sys.float_info.min / 2, 1 + 2.0**-53 * 1.5, 1 - 2.0**-55)
    inputs = [hard_rows(9, 400), hard_rows(40, 67)] + ([hard_rows(300, 131)] if backend != "reference" else [])
    for x in inputs:
        for rule in RULES:
            want, told = rk.aggregate(x, rule, f=2, backend=backend, return_info=True)
            with state(name):
                got, info = rk.aggregate(x, rule, f=2, backend=backend, return_info=True)
                least = sys.float_info.min
                after = (least / 2, 1 + 2.0**-53 * 1.5, 1 - 2.0**-55)
            assert np.array_equal(got, want), rule
            assert info.to_dict() == told.to_dict(), rule
            assert after == before  # what the caller has set stays
    values, distances = rk.kernels.select_columns(x, (1, 3), distances=True, backend=backend)
    with state(name):
        again, measured = rk.kernels.select_columns(x, (1, 3), distances=True, backend=backend)
    assert np.array_equal(values, again)
    assert np.array_equal(distances, measured)


@pytest.mark.parametrize(("n", "d"), [(300, 1001), (1024, 58_593), (1024, 7), (400, 64)])
@pytest.mark.parametrize("rule", ["median", "trimmed_mean", "mean_around_median"])
def test_selections_end_where_subnormals_vanish(n: int, d: int, rule: str) -> None:
    """Searches never ended above 256 rows; d is no multiple of the vector, and large enough for several threads."""
    x = np.random.default_rng(0).standard_normal((n, d)).astype(np.float32)
    want = rk.aggregate(x, rule, f=2)
    with state("subnormals vanish"):
        assert np.array_equal(rk.aggregate(x, rule, f=2), want)


def test_threads_that_others_left_in_a_state_compute_as_usual() -> None:
    """OpenMP's own threads, which keep what a library of -ffast-math sets in them."""
    x = hard_rows(12, 1_000_003)
    want = rk.median(x)
    done = run(
        """
        import numpy as np, robustkern as rk, torch
        from test_process_state import hard_rows
        x = hard_rows(12, 1_000_003)
        torch.set_flush_denormal(True)  # before any thread starts: they inherit it
        rk.set_num_threads(2)
        print(rk.median(x).view(np.uint32).sum(dtype=np.uint64))
        """,
        PYTHONPATH=os.path.dirname(__file__),
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == int(want.view(np.uint32).sum(dtype=np.uint64))


def test_without_a_way_to_reset_the_state_calls_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floats, "_library", lambda: None)
    with state("round up"):
        assert np.allclose(rk.geometric_median(hard_rows(5, 3)), rk.geometric_median(hard_rows(5, 3)))


# ---- torch ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["list", "stacked", "strided", "dicts", "bfloat16", "counters"])
def test_results_are_where_the_rows_are_whatever_the_default_device(kind: str) -> None:
    rows = [torch.randn(4, 3) for _ in range(5)]
    given = {
        "list": rows,
        "stacked": torch.stack(rows),
        "strided": [torch.randn(3, 4).t() for _ in rows],
        "dicts": [{"w": row, "b": row[0]} for row in rows],
        "bfloat16": [row.bfloat16() for row in rows],
        "counters": [{"w": row, "n": torch.tensor(3)} for row in rows],
    }[kind]
    for rule in ("mean", "median", "krum", "ctma(geometric_median)"):
        want = rk.aggregate(given, rule, f=1)
        with state("torch's default device is another"):
            got = rk.aggregate(given, rule, f=1)
        for a, b in zip(*(tree.values() if isinstance(tree, dict) else [tree] for tree in (want, got)), strict=True):
            assert b.device.type == "cpu"
            assert torch.equal(a, b)
    if kind != "counters":
        with state("torch's default device is another"):
            values = rk.kernels.select_columns(given, (0, 1))
        assert all(v.device.type == "cpu" for v in (values.values() if isinstance(values, dict) else [values]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["list", "stacked", "dicts"])
def test_calls_break_the_graph_of_torch_compile_and_nothing_else(kind: str) -> None:
    x = torch.randn(7, 6)
    give = {"list": list, "stacked": lambda t: t, "dicts": lambda t: [{"w": row} for row in t]}[kind]
    for rule in RULES:

        def step(t: Any, rule: str = rule) -> Any:
            result = rk.aggregate(give(t * 2), rule, f=1)
            return (result["w"] if kind == "dicts" else result) + 1

        torch._dynamo.reset()
        compiled = torch.compile(step, backend="eager")
        assert torch.equal(compiled(x), step(x)), rule
    torch._dynamo.reset()
    assert torch.equal(
        torch.compile(lambda t: rk.geometric_median(t) * 2, backend="eager")(x), rk.geometric_median(x) * 2
    )
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: rk.kernels.select_columns(t, (1, 2)) * 2, backend="eager")
    assert torch.equal(compiled(x), rk.kernels.select_columns(x, (1, 2)) * 2)


# ---- forks ---------------------------------------------------------------------------------------------------------

FORK = """
import ctypes, os, sys, time
import numpy as np
{first}
x = np.random.default_rng(0).standard_normal((20, 300_000)).astype(np.float32)
import robustkern as rk
{second}
want = rk.median(x, backend="reference")
for _ in range(3):
    child = os.fork()
    if not child:
        ok = np.array_equal(rk.median(x), want) and np.isfinite(rk.geometric_median(x)).all()
        os._exit(0 if ok else 3)
    deadline = time.monotonic() + 60
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(child, 9)
            sys.exit("the child hangs")
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(status) == 0, status
"""
ANOTHER = """
library = ctypes.CDLL("libgomp.so.1")
body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda data: None)
library.GOMP_parallel(body, None, 2, 0)  # what "#pragma omp parallel num_threads(2)" of any library is
"""
OURS = "rk.set_num_threads(2); rk.median(x); rk.geometric_median(x)"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize(("first", "second"), [(ANOTHER, ""), ("", ANOTHER), ("", OURS), (ANOTHER, OURS)],
                         ids=["another before us", "another after us", "we", "both"])  # fmt: skip
def test_a_forked_child_runs_whoever_used_openmp_before(first: str, second: str) -> None:
    done = run(FORK.format(first=first, second=second))
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_children_forked_in_the_middle_of_a_call_run() -> None:
    """No lock that another thread holds at that moment may be needed: OpenMP's, or functools.cached_property's."""
    done = run(
        """
        import os, sys, threading, time
        import numpy as np, robustkern as rk
        rk.set_num_threads(2)
        x = np.random.default_rng(0).standard_normal((40, 60_000)).astype(np.float32)
        x[3, 5] = np.nan
        rules = ("median", "ctma(geometric_median)", "krum")
        stop = []
        def work():
            while not stop:
                for rule in rules:
                    rk.aggregate(x, rule, f=2)
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        hung = 0
        for k in range(25):
            time.sleep(0.003 * k % 0.02)
            child = os.fork()
            if not child:
                for rule in rules:
                    rk.aggregate(x, rule, f=2)
                os._exit(0)
            deadline = time.monotonic() + 30
            while not os.waitpid(child, os.WNOHANG)[0]:
                if time.monotonic() > deadline:
                    hung += 1
                    os.kill(child, 9)
                    os.waitpid(child, 0)
                    break
                time.sleep(0.005)
            if hung:
                break
        stop.append(1)
        for thread in threads:
            thread.join()
        sys.exit(f"{hung} children hang" if hung else 0)
        """,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


# ---- optional parts that fail --------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", ["ImportError('gone')", "RuntimeError('no')", "SystemError('bad')", "KeyError('x')"])
def test_a_numba_that_fails_to_import_is_absent_with_its_reason(error: str) -> None:
    done = run(
        f"""
        import sys
        class Broken:
            def find_spec(self, name, path=None, target=None):
                if name == "numba":
                    raise {error}
        sys.meta_path.insert(0, Broken())
        import numpy as np, robustkern as rk
        print(rk.info()["backends"]["numba"])
        assert rk.median(np.ones((3, 2))).tolist() == [1, 1]
        try:
            rk.median(np.ones((3, 2)), backend="numba")
        except rk.BackendUnavailable as missing:
            print(missing)
        """
    )
    assert done.returncode == 0, done.stderr
    said = error.partition("'")[2].rstrip("')")
    assert all(said in line and "numba" in line for line in done.stdout.splitlines())
    assert len(done.stdout.splitlines()) == 2


def test_without_a_place_for_numbas_cache() -> None:
    """Read-only installations, no home: Numba compiles anew in every process, and everything works."""
    pytest.importorskip("numba")
    done = run(
        """
        import numba.core.caching as caching
        for name in ("CacheImpl", "_CacheImpl"):
            if hasattr(caching, name):
                getattr(caching, name)._locator_classes = []
        import numpy as np, robustkern as rk
        assert rk.info()["backends"]["numba"] == "available", rk.info()
        assert (rk.median(np.ones((3, 50), np.float32), backend="numba") == 1).all()
        """
    )
    assert done.returncode == 0, done.stderr


# ---- objects that cross processes ----------------------------------------------------------------------------------


def public_objects() -> list[Any]:
    rules = [kind() for kind in registered().values() if not any(
        f.default is dataclasses.MISSING for f in dataclasses.fields(kind))]  # fmt: skip
    chain = rk.parse_rule("nnm | ctma(geometric_median(max_iter=3))")
    info = rk.aggregate(np.eye(5), "ctma(geometric_median)", f=1, return_info=True)[1]
    errors = [
        kind("what happened", (1, 2)) if kind is rk.NonFiniteError else kind("what happened")
        for kind in vars(rk).values()
        if isinstance(kind, type) and issubclass(kind, (Exception, Warning))
    ]
    from robustkern.files import FileError  # type: ignore[attr-defined]

    return [*rules, chain, info, *errors, FileError("what happened")]


@pytest.mark.parametrize("there_and_back", [pickle.dumps, copy.deepcopy, copy.copy], ids=["pickle", "deepcopy", "copy"])
def test_public_objects_cross_processes(there_and_back: Any) -> None:
    found = public_objects()
    assert len(found) > 15
    for thing in found:
        other = there_and_back(thing)
        other = pickle.loads(other) if isinstance(other, bytes) else other
        assert type(other) is type(thing)
        if isinstance(thing, BaseException):
            assert str(other) == str(thing)
            assert vars(other) == vars(thing)
        else:
            assert other == thing
            assert str(other) == str(thing)


# ---- mappings ------------------------------------------------------------------------------------------------------


def test_mappings_are_matched_by_key_whatever_their_kind_and_order() -> None:
    rng = np.random.default_rng(0)
    w, b = rng.standard_normal((3, 4)), rng.standard_normal((3, 2))
    default: Any = defaultdict(list)
    default.update({"b": b[2], "w": w[2]})
    rows: list[Any] = [OrderedDict(w=w[0], b=b[0]), {"b": b[1], "w": w[1]}, default]
    for first in range(3):
        given = rows[first:] + rows[:first]
        out = {"b": np.empty(2), "w": np.empty(4)}
        for result in (rk.median(given), rk.median(given, out=out)):
            assert type(result) is type(given[0])
            assert list(result) == list(given[0])
            assert np.array_equal(result["w"], np.median(w, axis=0))
            assert np.array_equal(result["b"], np.median(b, axis=0))
        assert np.array_equal(out["w"], np.median(w, axis=0))
    nested = [{"a": [OrderedDict(x=w[0], y=b[0])]}, OrderedDict(a=[{"y": b[1], "x": w[1]}])]
    assert list(rk.mean(nested)["a"][0]) == ["x", "y"]  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"row 1 lacks the leaves \['b'\]"):
        rk.median([{"w": w[0], "b": b[0]}, OrderedDict(w=w[1])])


def test_a_sub_interpreter_gets_an_honest_import_error() -> None:
    """Or works: NumPy loads once a process, and says so."""
    script = """
try:
    import _xxsubinterpreters as interpreters
except ImportError:
    import _interpreters as interpreters
import robustkern
inner = interpreters.create()
interpreters.run_string(inner, '''
try:
    import numpy as np, robustkern as rk
    print(rk.median(np.eye(3)).tolist())
except ImportError as error:
    print("ImportError", error)
''')
print("end")
"""
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    first, end = done.stdout.splitlines()
    assert first.startswith("ImportError") or first == "[0.0, 0.0, 0.0]"
    assert end == "end"
    assert done.returncode == 0
