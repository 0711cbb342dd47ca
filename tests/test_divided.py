"""Columns that lie with several owners: the same rules, on a source that only adds up through `total` and `passed`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support import make_rows
from test_rules import RULES, rows_around_a_geometric_median

import robustkern as rk
from robustkern.distributed.together import Part, Together
from robustkern.engine import Info, run
from robustkern.inputs.trees import adapt
from robustkern.rules import geometry

PARTS = 4


class Threads:
    """Ranks that are threads of this process."""

    size = PARTS

    def __init__(self, rank: int, barrier: threading.Barrier, held: list[Any]) -> None:
        self.rank, self.barrier, self.held = rank, barrier, held

    def _all(self, x: Any) -> list[Any]:
        self.held[self.rank] = x
        self.barrier.wait()
        everything = list(self.held)
        self.barrier.wait()
        return everything

    def gather(self, payload: bytes) -> list[bytes]:
        brought = self._all(payload)
        return [] if self.rank else brought

    def broadcast(self, payload: bytes) -> bytes:
        return bytes(self._all(payload)[0])

    def total(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.sum(self._all(x), axis=0)  # type: ignore[no-any-return]


def on_all(work: Callable[[Threads], Any]) -> list[Any]:
    """Return what each rank has in the end, or the error."""
    barrier, held = threading.Barrier(PARTS, timeout=60), [None] * PARTS

    def own(rank: int) -> Any:
        try:
            return work(Threads(rank, barrier, held))
        except (ValueError, MemoryError, rk.RobustkernError) as error:
            return error

    with ThreadPoolExecutor(PARTS) as pool:
        return list(pool.map(own, range(PARTS)))


def divided(x: NDArray[Any], rule: str, cuts: list[int], **options: Any) -> list[Any]:
    """Return what each owner has in the end: its columns and an Info, or the error."""
    plan = rk.parse_rule(rule)

    def own(ranks: Threads) -> Any:
        columns = np.ascontiguousarray(x[:, cuts[ranks.rank] : cuts[ranks.rank + 1]])
        source, result = adapt(columns)
        with Together(ranks) as together:
            info = run(plan, Part.of(together, source, {}), **options)
        return result, info

    return on_all(own)


def joined(parts: list[Any]) -> tuple[NDArray[Any], Info]:
    for part in parts:
        assert not isinstance(part, Exception), part
    return np.concatenate([columns for columns, _ in parts]), parts[0][1]


def rows_of(kind: str, dtype: Any) -> NDArray[Any]:
    x = make_rows("normal", 9, 203, np.dtype(np.float64), seed=1) * 3e-3 + 1
    if kind == "attacked":
        x[:2] *= [[-1], [1e6]]
    if kind == "copies":
        x[1] = x[2] = x[3]
    if kind == "nan":
        x[0, 150] = np.nan
    return x.astype(dtype)


#: Rules whose weights follow from the Gram by a continuous function, not by a choice among rows.
CONTINUOUS = ("geometric_median", "rfa")


@pytest.mark.parametrize("single", [False, True], ids=["double", "single first"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", ["plain", "attacked", "copies", "nan"])
@pytest.mark.parametrize("rule", ["mean", *RULES])
def test_four_owners(rule: str, kind: str, dtype: Any, single: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if single:
        monkeypatch.setattr(geometry, "SINGLE_VALUES", 0)
    x = rows_of(kind, dtype)
    options: dict[str, Any] = {"f": 2, "seed": 3}
    want, told = rk.aggregate(x, rule, return_info=True, **options)
    for cuts in ([0, 50, 101, 150, 203], [0, 0, 60, 203, 203]):  # also owners of nothing
        got, info = joined(divided(x, rule, cuts, **options))
        if rule.rsplit(" | ", maxsplit=1)[-1] in CONTINUOUS:
            spacing = np.spacing(np.abs(want))
            assert (np.abs(got - want) <= spacing).all()
        else:
            assert np.array_equal(got, want, equal_nan=True)
        assert info.nonfinite_rows == told.nonfinite_rows
        assert info.d == 203
        for name in ("kept", "order"):
            mine, theirs = getattr(info, name), getattr(told, name)
            assert (mine is None) == (theirs is None)
            assert mine is None or np.array_equal(mine, theirs)
        for name in ("weights", "sq_distances", "scores"):
            mine, theirs = getattr(info, name), getattr(told, name)
            assert (mine is None) == (theirs is None)
            if mine is not None:
                np.testing.assert_allclose(mine, theirs, rtol=1e-5 if single else 1e-9, atol=1e-12)


@pytest.mark.parametrize("rule", ["krum(neighbours=2)", "multi_krum(m=5, neighbours=2)"])
def test_rows_far_from_all_others_are_told_apart_together(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By products from their own middle, one pass more for all owners."""
    passes = []
    once = geometry.Given.products_pass
    monkeypatch.setattr(geometry.Given, "products_pass", lambda *given: passes.append(1) or once(*given))
    x = make_rows("normal", 31, 203, np.dtype(np.float64), seed=3)
    x[1:12] += 1e9
    want, told = rk.aggregate(x, rule, f=14, return_info=True)
    assert len(passes) == 1
    got, info = joined(divided(x, rule, [0, 50, 101, 150, 203], f=14))
    assert len(passes) == 1 + 4
    assert np.array_equal(got, want)
    assert np.array_equal(info.order, told.order)


@pytest.mark.parametrize("gap", [0.0, 1e-7, 3e-6])
def test_rows_around_the_cut_are_told_apart_together(gap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """By distances to the geometric median, one pass more for all owners, of whom some have nothing."""
    monkeypatch.setattr(geometry, "SINGLE_VALUES", 0)
    passes = []
    once = geometry.Given.average_pass
    monkeypatch.setattr(geometry.Given, "average_pass", lambda *given: passes.append(1) or once(*given))
    x, exact = rows_around_a_geometric_median(gap, 12)
    got, info = joined(divided(x, "ctma(geometric_median)", [0, 0, 501, 501, 1500], f=12, backend="cpp"))
    assert len(passes) == 4
    assert np.array_equal(np.flatnonzero(info.kept), np.sort(exact.argsort()[:28]))
    assert np.array_equal(got, rk.aggregate(x, "ctma(geometric_median)", f=12, backend="cpp"))


@pytest.mark.parametrize("rule", ["median", "trimmed_mean", "geometric_median", "ctma(median)", "nnm | krum"])
def test_all_owners_raise_alike(rule: str) -> None:
    x = rows_of("plain", np.float32)
    x[:5, 10] = np.nan  # all with the first owner
    parts = divided(x, rule, [0, 50, 101, 150, 203], f=2)
    assert all(isinstance(part, rk.NonFiniteError) for part in parts)
    assert {part.rows for part in parts} == {(0, 1, 2, 3, 4)}
    assert len({str(part) for part in parts}) == 1


def test_weights_and_the_mean() -> None:
    x = rows_of("nan", np.float64)
    weights = np.arange(9) + 1.0
    for rule in ("mean", "median", "ctma(median)", "geometric_median"):
        want, told = rk.aggregate(x, rule, f=2, weights=weights, return_info=True)
        got, info = joined(divided(x, rule, [0, 50, 101, 150, 203], f=2, weights=weights))
        np.testing.assert_array_almost_equal_nulp(got[np.isfinite(want)], want[np.isfinite(want)], 1)
        assert info.nonfinite_rows == told.nonfinite_rows == (0,)


class Fickle(rk.Aggregator):
    """Asks for other passes on other ranks, as rules may whose choice hangs on a last bit of the processor."""

    name = "fickle"
    ranks = threading.local()

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def solve(self, view: Any) -> Any:
        rank, x = self.ranks.rank, np.zeros(9)
        passes = {
            "same": 3, "more": 3 + rank % 2, "fewer": 3 - rank % 2, "none": 3 if rank == 0 else 0, "other": 3,
            "first": 3, "for nothing": 0 if rank == 0 else 3, "stubborn": 3,
        }[self.kind]  # fmt: skip
        for k in range(passes):
            point = k + (rank if self.kind in ("other", "first") and k == ("first", "other").index(self.kind) else 0)
            try:
                x += view._given.measure_point(point)[0]
            except BaseException:
                if self.kind != "stubborn":
                    raise
        if self.kind == "none" and rank == 2:
            raise ValueError("a rank that is not asked")
        return view.mean_of([int(np.argsort(x, kind="stable")[rank])])


@pytest.mark.parametrize("kind", ["same", "more", "fewer", "none", "other", "first", "for nothing", "stubborn"])
def test_rank_0_decides(kind: str) -> None:
    x = rows_of("plain", np.float32)

    def own(ranks: Threads) -> Any:
        Fickle.ranks.rank = ranks.rank
        source, result = adapt(np.ascontiguousarray(x[:, 50 * ranks.rank : 50 * ranks.rank + 50]))
        with Together(ranks) as together:
            info = run(Fickle(kind), Part.of(together, source, {}))
        return result, info

    found = on_all(own)
    Fickle.ranks.rank = 0
    want, told = rk.aggregate(x[:, :200], Fickle("for nothing" if kind == "for nothing" else "same"), return_info=True)
    assert told.weights is not None
    got, _info = joined(found)
    assert np.array_equal(got, want)
    assert all(np.array_equal(part[1].weights, told.weights) for part in found)


def test_all_make_a_pass_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first, and those that rank 0 asks for: it does not make its own before the others know."""
    point_pass = geometry.Given.point_pass
    began = [[threading.Event() for _ in range(PARTS)] for _ in range(3)]

    def waiting(self: geometry.Given, *arguments: Any) -> Any:
        rank = Fickle.ranks.rank
        events = began[Fickle.ranks.count]
        Fickle.ranks.count += 1
        events[rank].set()
        assert all(event.wait(20) for event in events)
        return point_pass(self, *arguments)

    monkeypatch.setattr(geometry.Given, "point_pass", waiting)
    x = rows_of("plain", np.float32)

    def own(ranks: Threads) -> Any:
        Fickle.ranks.rank, Fickle.ranks.count = ranks.rank, 0
        source, result = adapt(np.ascontiguousarray(x[:, 50 * ranks.rank : 50 * ranks.rank + 50]))
        with Together(ranks) as together:
            run(Fickle("same"), Part.of(together, source, {}), wants_info=False)
        return Fickle.ranks.count, result

    found = on_all(own)
    assert [count for count, _ in found] == [3] * PARTS


@pytest.mark.parametrize("who", [0, 2])
@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("rule", ["median", "krum", "ctma(median)", "nnm | median"])
def test_an_error_of_one_is_an_error_of_all(rule: str, at: int, who: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out on one rank, in a kernel's first, second, third or fourth call."""
    from robustkern.backends.cpp import Cpp

    calls = threading.local()
    for name in ("gram", "select_columns", "weighted_row_sum", "row_sq_distances"):
        kernel = getattr(Cpp, name)

        def failing(self: Any, *arguments: Any, kernel: Any = kernel, **options: Any) -> Any:
            calls.count = getattr(calls, "count", 0) + 1
            if getattr(calls, "rank", -1) == who and calls.count == at + 1:
                raise MemoryError("no memory is left")
            return kernel(self, *arguments, **options)

        monkeypatch.setattr(Cpp, name, failing)
    x = rows_of("plain", np.float32)

    def own(ranks: Threads) -> Any:
        calls.rank, calls.count = ranks.rank, 0
        source, _result = adapt(np.ascontiguousarray(x[:, 50 * ranks.rank : 50 * ranks.rank + 50]))
        with Together(ranks) as together:
            run(rk.parse_rule(rule), Part.of(together, source, {}), f=2, backend="cpp")
        return calls.count

    found = on_all(own)
    if all(isinstance(one, int) for one in found):
        assert max(found) <= at  # it was not called so often
    else:
        assert all(isinstance(one, MemoryError) for one in found)
        assert {str(one) for one in found} == {"no memory is left"}
