"""Streams give what `aggregate` gives, from rows in memory or on disk, and a refused update changes nothing."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import robustkern as rk
from robustkern.stream import _Mean, _Spool

BF16 = np.dtype(ml_dtypes.bfloat16)


def streamed(x: Any, rule: str, **options: Any) -> Any:
    with rk.Stream(rule, n=len(x), **options) as stream:
        for row in x:
            stream.add(row)
        return stream.result()


def exact(x: NDArray[Any], f: int) -> NDArray[Any]:
    """Return the trimmed mean, rounded once to longdouble; NaN is the largest."""
    ranked = np.sort(x.astype(np.float64), axis=0)[f : len(x) - f]
    if not np.isfinite(ranked).all():
        return np.asarray(ranked.astype(np.longdouble).sum(axis=0) / len(ranked))
    means = [sum(map(Fraction, column)) / len(ranked) for column in ranked.T.tolist()]
    high = np.array([float(mean) for mean in means])
    low = [float(mean - Fraction(value)) for mean, value in zip(means, high.tolist(), strict=True)]
    return np.asarray(high.astype(np.longdouble) + np.array(low))


@pytest.mark.parametrize("dtype", [np.float16, BF16, np.float32, np.float64], ids=str)
@pytest.mark.parametrize("kind", ["normal", "ties", "attacked", "large", "offset", "integers"])
@pytest.mark.parametrize(("n", "f"), [(1, 0), (2, 0), (3, 1), (9, 0), (9, 2), (9, 4), (33, 7)])
def test_means(n: int, f: int, kind: str, dtype: Any) -> None:
    g = np.random.default_rng([n, f])
    x = g.standard_normal((n, 33_001 if (n, f, kind, dtype) == (9, 2, "normal", np.float32) else 57))
    if kind == "ties":
        x = np.round(x)
    if kind == "attacked" and f:
        x[:f] = np.resize([np.nan, np.inf, -np.inf, 1e30], f)[:, None]
    if kind == "large":  # sums of float64 overflow
        x *= {2: 1e4, 4: 4e37, 8: 4e307}[np.dtype(dtype).itemsize] if dtype != BF16 else 4e37
    if kind == "offset":
        x = 1000 + x * 1e-3
    if kind == "integers":
        x = g.integers(-100, 100, x.shape).astype(float)
    with np.errstate(all="ignore"):
        x = x.astype(dtype)
    if kind != "attacked":
        x = np.where(np.isfinite(x), x, np.ones((), dtype=dtype)).astype(dtype)
    got = streamed(x, "trimmed_mean", f=f)
    assert got.dtype == x.dtype
    want = exact(x, f)
    unit = np.spacing(np.maximum(np.abs(want).astype(np.float64), float(np.finfo(np.float64).tiny)).astype(np.float64))
    if np.dtype(dtype) != np.float64:
        unit = np.maximum(
            np.abs(want).astype(np.float64) * float(ml_dtypes.finfo(dtype).eps),
            float(ml_dtypes.finfo(dtype).smallest_subnormal),
        )
    assert (np.abs(got.astype(np.longdouble) - want) <= unit).all()
    if kind == "integers" and np.dtype(dtype).itemsize >= 4:
        assert np.array_equal(got, want.astype(dtype))
    if kind != "attacked" or not f:
        mean = streamed(x, "mean")
        assert (
            np.abs(mean.astype(np.longdouble) - exact(x, 0))
            <= np.maximum(
                unit,
                np.abs(exact(x, 0)).astype(np.float64) * 2.0**-52
                if dtype == np.float64
                else 2 * np.abs(exact(x, 0)).astype(np.float64) * float(ml_dtypes.finfo(dtype).eps),
            )
        ).all()


@given(st.data())
def test_any_order_gives_the_trimmed_mean(data: st.DataObject) -> None:
    f = data.draw(st.integers(0, 4))
    n = data.draw(st.integers(2 * f + 1, 2 * f + 6))
    value = st.floats(width=32, allow_nan=False, allow_infinity=False)
    rows = data.draw(st.lists(st.lists(value, min_size=3, max_size=3), min_size=n, max_size=n))
    bad = data.draw(st.lists(st.sampled_from([np.nan, np.inf, -np.inf]), max_size=f))
    x = np.array(rows, dtype=np.float32)
    x[: len(bad)] = np.array(bad, dtype=np.float32)[:, None]
    x = x[data.draw(st.permutations(range(n)))]
    got, want = streamed(x, "trimmed_mean", f=f), rk.trimmed_mean(x, f=f)
    assert np.isfinite(got).all()
    largest = np.minimum(np.maximum(np.abs(want), np.abs(got)), np.float32(2.0**127))  # above, it overflows on the way
    assert (np.abs(got - want) <= np.spacing(largest)).all()


@pytest.mark.parametrize("memory", [0, 3000, 1 << 30])
@pytest.mark.parametrize(
    "rule", ["median", "krum", "ctma(geometric_median)", "nnm | median", "bucketing(size=2, seed=1) | mean"]
)
def test_rules_that_need_all_rows(rule: str, memory: int, tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((9, 100)).astype(np.float32)
    x[1] *= 1e6
    with rk.Stream(rule, n=9, f=2, memory=memory, directory=tmp_path) as stream:
        for k, row in enumerate(x):
            mine = row.copy()
            stream.add(mine, worker=f"w{k}")
            mine[:] = 0  # the caller's again
        files = list(tmp_path.rglob("*.rows"))
        count = {0: 9, 3000: 2, 1 << 30: 0}[memory]
        assert len(files) == (count > 0)
        assert sum(path.stat().st_size for path in files) == (448 * (count - 1) + 400 if count else 0)
        got, info = stream.result(return_info=True)
        assert np.array_equal(stream.result(), got)
    want, told = rk.aggregate(x, rule, f=2, return_info=True)
    assert np.array_equal(got, want)
    assert info.order == told.order
    assert list(tmp_path.iterdir()) == []


def tree(k: int, torch: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(k)
    return {
        "w": torch.randn(3, 4, generator=g).T, "h": torch.randn(5, generator=g).to(torch.bfloat16), "n": torch.tensor([k, 7]),
        "c": torch.randn(2, generator=g, dtype=torch.complex64), "epoch": 3, "none": torch.zeros(0),
    }  # fmt: skip


@pytest.mark.parametrize("memory", [0, 1 << 20])
@pytest.mark.parametrize("rule", ["mean", "trimmed_mean", "median", "krum", "ctma(median)"])
def test_trees(rule: str, memory: int) -> None:
    torch = pytest.importorskip("torch")
    rows = [tree(k, torch) for k in range(7)]
    reordered = [dict(reversed(row.items())) if k == 3 else row for k, row in enumerate(rows)]
    want = rk.aggregate(rows, rule, f=2)
    got = streamed(reordered, rule, f=2, memory=memory)
    assert got.keys() == want.keys()
    for name, x in want.items():
        if name == "epoch":
            assert got[name] == x
            continue
        assert got[name].dtype == x.dtype
        torch.testing.assert_close(got[name], x, rtol=1e-6 if name != "h" else 1e-2, atol=0)


def test_weights() -> None:
    x, weights = np.random.default_rng(0).standard_normal((7, 50)), [1.0, 2.0, 0.0, 3.5, 1.0, 1.0, 1.0]
    for rule in ("mean", "trimmed_mean", "median", "ctma(geometric_median)"):
        with rk.Stream(rule, n=7, delta=0.3) as stream:
            for row, weight in zip(x, weights, strict=True):
                stream.add(row, weight=weight)
            want = rk.aggregate(x, rule, delta=0.3, weights=weights)
            np.testing.assert_allclose(stream.result(), want, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize(
    "weights",
    [
        [1e308] * 5,
        [1e300] * 5,
        [5e-324] * 5,
        [1e-320, 2e-320, 0.0, 0.0, 3e-320],
        [0.0, 1e-300, 1.0, 7.0, 1e308],
        [3, 1, 2, 1000, 5],
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_weights_of_any_size(weights: list[float], dtype: Any) -> None:
    largest = np.finfo(dtype).max
    x = np.array([[0.5, 1, 3], [0.25, 1, -2], [-0.5, 1, 4], [0.125, 1, 7], [0.75, 1, 1]], dtype=dtype)
    x *= np.array([largest, largest, 1], dtype=dtype)
    with rk.Stream("mean", n=5) as stream:
        for row, weight in zip(x, weights, strict=True):
            stream.add(row, weight=weight)
        got = stream.result()
    np.testing.assert_allclose(got, rk.aggregate(x, "mean", weights=weights), rtol=4 * np.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_row_without_weight_is_not_looked_at(dtype: Any) -> None:
    with rk.Stream("mean", n=3) as stream:
        for row, weight in (([1, 2], 1), ([np.nan, np.inf], 0), ([3, 4], 1)):
            stream.add(np.array(row, dtype=dtype), weight=weight)
        assert stream.result().tolist() == [2, 3]


@pytest.mark.parametrize("size", [1.0, 1e305, 1e-200])
def test_weighted_means_of_float64_are_rounded_once(size: float) -> None:
    g = np.random.default_rng(3)
    x, weights = g.standard_normal((9, 200)) * size, g.uniform(0.1, 1, 9)
    x[8] = -(weights[:8] @ x[:8]) / weights[8] * (1 + 1e-9)  # most cancels
    with rk.Stream("mean", n=9) as stream:
        for row, weight in zip(x, weights, strict=True):
            stream.add(row, weight=weight)
        got = stream.result()
    total = sum(map(Fraction, weights))
    want = [
        float(sum(Fraction(w) * Fraction(v) for w, v in zip(weights, column, strict=True)) / total) for column in x.T
    ]
    np.testing.assert_allclose(got, want, rtol=2.0**-51)  # the sum of the weights is rounded, too


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.float32, float])
def test_weights_that_numpy_made(kind: Any) -> None:
    with rk.Stream("mean", n=2) as stream:
        stream.add(np.ones(2), weight=kind(1))
        stream.add(np.full(2, 5.0), weight=kind(3))
        assert stream.result().tolist() == [4, 4]


@pytest.mark.parametrize("rule", ["mean", "trimmed_mean", "median"])
def test_integers_alone(rule: str) -> None:
    rows = [{"n": np.array([k, 7])} for k in range(5)]
    answers = []
    for work in (lambda: rk.aggregate(rows, rule, f=1), lambda: streamed(rows, rule, f=1)):
        try:
            answers.append(work()["n"].tolist())
        except TypeError as error:
            answers.append(str(error))
    assert answers[0] == answers[1]
    assert ("hold integers only" in str(answers[0])) == (rule == "trimmed_mean")


def test_a_refused_update_changes_nothing(tmp_path: Path) -> None:
    for rule in ("mean", "trimmed_mean", "median"):
        with rk.Stream(rule, n=5, f=1, memory=0, directory=tmp_path) as stream:
            with pytest.raises(ValueError, match="no update has come"):
                stream.result()
            for k in range(3):
                stream.add({"w": np.full(3, float(k)), "n": np.array([k])}, worker=k)
            before = stream.result()
            cases: list[tuple[type[Exception], str, Any, dict[str, Any]]] = [
                (ValueError, "shape", {"w": np.ones(4), "n": np.array([1])}, {}),
                (ValueError, "dtype", {"w": np.ones(3, dtype=np.float32), "n": np.array([1])}, {}),
                (ValueError, "lacks|leaf|keys", {"w": np.ones(3)}, {}),
                (TypeError, "expected", {"w": "text", "n": np.array([1])}, {}),
                (
                    ValueError,
                    "worker 1 has sent an update already",
                    {"w": np.ones(3), "n": np.array([1])},
                    {"worker": 1},
                ),
                (
                    ValueError,
                    "a weight to all updates or to none",
                    {"w": np.ones(3), "n": np.array([1])},
                    {"weight": 1.0},
                ),
            ]
            for kind, message, update, options in cases:
                with pytest.raises(kind, match=message):
                    stream.add(update, **options)
                assert stream.count == 3
                after = stream.result()
                assert all(np.array_equal(after[name], before[name]) for name in before)
            stream.add({"n": np.array([9]), "w": np.ones(3)}, worker=1.5)
            stream.add({"n": np.array([9]), "w": np.ones(3)})
            with pytest.raises(ValueError, match="n=5 updates have come already"):
                stream.add({"n": np.array([9]), "w": np.ones(3)})
    assert list(tmp_path.iterdir()) == []


MANY = """
import resource, sys
import numpy as np
import robustkern as rk

resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
with rk.Stream("ctma(median)", n=100, f=10, memory=0, directory=sys.argv[1]) as stream:
    for k in range(100):
        stream.add({"n": np.int8(k), "w": np.full(3, float(k))})
    assert stream.result()["w"].tolist() == [49.5] * 3, stream.result()
"""


def test_rows_on_disk_take_one_descriptor(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", MANY, str(tmp_path)], check=True, timeout=60)


def test_a_row_that_was_cut_short_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with rk.Stream("median", n=5, memory=0, directory=tmp_path) as stream:
        stream.add(np.zeros(3))
        with monkeypatch.context() as patch:
            patch.setattr("robustkern.stream._Row", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                stream.add(np.full(3, 9.0))
        for value in (1.0, 2.0):
            stream.add(np.full(3, value))
        assert stream.result().tolist() == [1.0] * 3
        assert [path.stat().st_size for path in tmp_path.rglob("*.rows")] == [64 * 2 + 24]


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with rk.Stream("median", n=5, memory=0, directory=tmp_path) as stream:
        stream.add(np.ones(3))

        class Full:
            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: object) -> None:
                return None

            def seek(self, at: int) -> None:
                assert at == 64

            def write(self, data: Any) -> None:
                raise OSError(28, "No space left on device")

        monkeypatch.setattr("builtins.open", lambda *_, **__: Full())
        with pytest.raises(OSError, match=r"No space left on device: .*updates\.rows"):
            stream.add(np.ones(3))
        monkeypatch.undo()
        assert stream.count == 1
        stream.add(np.full(3, 3.0))
        assert stream.result().tolist() == [2.0] * 3


def test_a_first_add_that_failed_leaves_no_sums() -> None:
    stream = rk.Stream("mean", n=5, memory=0, directory="/nonexistent/x")
    with pytest.raises(OSError, match="No such file or directory"):
        stream.add({"n": np.arange(3), "w": np.ones(10, dtype=np.float32)})
    stream.add({"w": np.full(10, 1e300)})
    stream.add({"w": np.full(10, 1e-300)})
    assert stream.result()["w"].tolist() == [5e299] * 10


@pytest.mark.parametrize("rule", ["mean", "trimmed_mean"])
def test_an_add_that_is_cut_short(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with rk.Stream(rule, n=9, f=1) as stream:
        for k in range(3):
            stream.add([np.full(2, float(k)), np.full(2, float(k))])
        whole, calls = _Mean.add, []

        def cut(total: _Mean, x: Any, weight: Any) -> bool:
            calls.append(x)
            if len(calls) == 2:  # one leaf is in the sums
                raise KeyboardInterrupt
            return whole(total, x, weight)

        with monkeypatch.context() as patch:
            patch.setattr(_Mean, "add", cut)
            with pytest.raises(KeyboardInterrupt):
                stream.add([np.ones(2), np.ones(2)])
        for work in (lambda: stream.add([np.ones(2), np.ones(2)]), stream.result):
            with pytest.raises(RuntimeError, match=r"an add was cut short.*\(make a new stream, and add all updates"):
                work()
        stream.close()  # which forgets them all
        stream.add([np.ones(2), np.ones(2)])
        assert stream.count == 1


def test_what_cannot_be_asked_for() -> None:
    cases: list[tuple[str, Any]] = [
        ("n must be an integer from 1 to 65535; got 0", lambda: rk.Stream("mean", n=0)),
        ("memory must be a number of bytes", lambda: rk.Stream("mean", n=1, memory=-1)),
        (r"2\*f must be below n", lambda: rk.Stream("median", n=4, f=2)),
        ("trimmed_mean: f is required", lambda: rk.Stream("trimmed_mean", n=4)),
        ("weight must be finite and not negative; got -1", lambda: rk.Stream("mean", n=2).add(np.ones(1), weight=-1)),
        ("weight must be finite and not negative; got 1000", lambda: rk.Stream("mean", n=2).add(1, weight=10**400)),
        ("weight must be finite and not negative; got inf", lambda: rk.Stream("mean", n=2).add(1, weight=math.inf)),
        ("krum: weights are not supported", lambda: rk.Stream("krum", n=5, f=1).add(np.ones(1), weight=1)),
    ]
    for message, work in cases:
        with pytest.raises(ValueError, match=message):
            work()
    stream = rk.Stream("trimmed_mean", n=5, f=2)
    for _ in range(3):
        stream.add(np.ones(2))
    with pytest.raises(ValueError, match=r"2\*f must be below the number of updates; got f=2 with 3"):
        stream.result()
    stream.add(np.ones(2))
    stream.add(np.ones(2))
    with pytest.raises(ValueError, match="there is no Info"):
        stream.result(return_info=True)
    zero = rk.Stream("mean", n=2)
    zero.add(np.ones(2), weight=0)
    with pytest.raises(ValueError, match="weights are all 0"):
        zero.result()
    bad = rk.Stream("trimmed_mean", n=3, f=1)
    for value in (np.nan, np.nan, 1.0):
        bad.add(np.full(2, value))
    with pytest.raises(rk.NonFiniteError, match=r"2 rows hold NaN or Inf \(rows 0, 1\), more than the f=1") as caught:
        bad.result()
    assert caught.value.rows == (0, 1)
    like = rk.Stream("mean", n=2, like=np.zeros(3))
    with pytest.raises(ValueError, match="shape"):
        like.add(np.ones(4))  # the attacker came first


def test_sums_that_overflow_come_back() -> None:
    x = np.array([[1.7e308, -1.7e308, 3.0], [1.7e308, 1.7e308, 1e-300], [1.7e308, 1.0, -3.0]])
    np.testing.assert_allclose(streamed(x, "mean"), rk.mean(x), rtol=1e-15)


def test_a_stream_is_not_copied() -> None:
    with rk.Stream("median", n=3, memory=0) as stream:
        stream.add(np.ones(3))
        for work in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match=r"Stream: cannot be copied or pickled.*\(make another one\)"):
                work(stream)


@pytest.mark.parametrize("rule", ["mean", "trimmed_mean", "median"])
def test_threads_share_a_stream(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits where another would take its place."""
    copied = _Spool.copied

    def slow(spool: _Spool, leaves: list[Any]) -> Any:
        row = copied(spool, leaves)
        time.sleep(1e-3)
        return row

    monkeypatch.setattr(_Spool, "copied", slow)
    with rk.Stream(rule, n=40, f=3, memory=0) as stream:

        def send(first: int) -> None:
            for k in range(first, first + 10):
                stream.add(np.full(100, float(k)), worker=k)

        threads = [threading.Thread(target=send, args=(first,)) for first in range(0, 40, 10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert stream.count == 40
        assert stream.result().tolist() == [19.5] * 100


FORKING = """
import os, sys
import numpy as np
import robustkern as rk

with rk.Stream("median", n=3, memory=0, directory=sys.argv[1]) as stream:
    stream.add(np.ones(3))
    child = os.fork()
    if child == 0:
        said = []
        for work in (lambda: stream.add(np.zeros(3)), stream.result):
            try:
                work()
            except RuntimeError as error:
                said.append("of which this is a fork (make one here)" in str(error))
        stream.close()
        os._exit(0 if said == [True, True] else 1)
    assert os.waitpid(child, 0)[1] == 0
    stream.add(np.ones(3))
    assert stream.result().tolist() == [1.0] * 3
assert os.listdir(sys.argv[1]) == []
"""


def test_a_forked_childs_end_leaves_the_folder(tmp_path: Path) -> None:
    """In a process of its own: other libraries that are loaded here say something when it forks."""
    subprocess.run([sys.executable, "-c", FORKING, str(tmp_path)], check=True, timeout=60)
