"""Rows that are mixed and stay rows, and servers that keep something between rounds."""

from __future__ import annotations

import copy
import pickle
import threading
import time
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support import assert_close, make_rows
from test_rules import slow_nearest

import robustkern as rk
from robustkern.backends.registry import load_backend
from robustkern.kept import LEAST_ROWS, KeptProducts

torch = pytest.importorskip("torch")
Array = NDArray[Any]


def nearest_mixed(x: Array, count: int) -> Array:
    wide = x.astype(np.longdouble)
    return np.stack([wide[slow_nearest(wide, row, count)].mean(axis=0) for row in wide])


# ---- mix -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "f", "d"), [(1, 0, 5), (9, 2, 41), (33, 10, 300)])
def test_mixed_rows_are_what_a_chain_sees(backend: str, dtype: np.dtype[Any], n: int, f: int, d: int) -> None:
    x = make_rows("normal", n, d, dtype, seed=n)
    got, info = rk.mix(x, "nnm", f=f, return_info=True)
    want = nearest_mixed(x, n - f)
    for mixed, row in zip(got, want, strict=True):
        assert_close(mixed, row, x)
    np.testing.assert_allclose(info.mixture.sum(axis=1), 1)
    assert (info.rule, info.n, info.d, info.f) == ("nnm", n, d, f)
    if dtype == np.float64:
        np.testing.assert_allclose(np.median(got, axis=0), rk.aggregate(x, "nnm | median", f=f), atol=1e-12)


def test_mixed_rows_come_back_as_they_came() -> None:
    x = make_rows("normal", 6, 24, np.dtype(np.float32)).reshape(6, 4, 6)
    want = rk.mix(x, "nnm", f=2)
    forms: dict[str, tuple[Any, Any]] = {
        "list": (list(x), np.stack),
        "tensor": (torch.tensor(x), np.asarray),
        "tensors": (list(torch.tensor(x)), lambda rows: np.stack([row.numpy() for row in rows])),
        "turned": ([torch.tensor(row).t() for row in x], lambda rows: np.stack([row.t().numpy() for row in rows])),
        "columns first": (np.asfortranarray(x), np.asarray),
        "every second row": (np.repeat(x, 2, axis=0)[::2], np.asarray),
        "trees": (
            [{"b": row[1:], "a": [row[0], row[:0]]} for row in x],
            lambda rows: np.stack([np.concatenate([row["a"][0][None], row["b"]]) for row in rows]),
        ),
        "big endian order of keys": (
            [{"a": x[0][:1], "b": x[0][1:]}, *({"b": row[1:], "a": row[:1]} for row in x[1:])],
            lambda rows: np.stack([np.concatenate([row["a"], row["b"]]) for row in rows]),
        ),
        "complex": (x[..., ::2] + 1j * x[..., 1::2], lambda z: np.stack([z.real, z.imag], axis=-1).reshape(x.shape)),
    }
    for name, (updates, back) in forms.items():
        got = rk.mix(updates, "nnm", f=2)
        assert type(got) is (type(updates) if name in ("tensor", "columns first", "complex") else type(got)), name
        assert np.array_equal(back(got), want), name
    wide = [{"w": row.astype(np.float64), "b": row} for row in x]
    got = rk.mix(wide, "nnm", f=2)
    assert [leaf.dtype for leaf in got[0].values()] == [np.float64, np.float32]
    assert np.array_equal(np.stack([row["b"] for row in got]), want)


def test_mixing_by_origin_and_by_chance() -> None:
    x = make_rows("normal", 9, 20, np.dtype(np.float64), seed=4) * np.arange(1, 10)[:, None]
    np.testing.assert_allclose(rk.mix(x, "arc", f=2), rk.ARC().plain(x, 2))
    np.testing.assert_allclose(rk.mix(x, rk.Clipping(3.0)), rk.Clipping(3.0).plain(x, 0))
    got, info = rk.mix(x, "bucketing(size=2) | nnm(count=2)", return_info=True)
    assert got.shape == (5, 20)
    assert np.array_equal(rk.mix(x, "bucketing(size=2) | nnm(count=2)", seed=info.seed), got)
    np.testing.assert_allclose(info.mixture @ x, got)


def test_a_bad_row_stays_alone() -> None:
    x = make_rows("normal", 7, 5, np.dtype(np.float32))
    x[3, 2] = np.nan
    got, info = rk.mix(x, "nnm", f=2, return_info=True)
    assert np.isnan(got).any(axis=1).tolist() == [i == 3 for i in range(7)]
    assert info.nonfinite_rows == (3,)
    with pytest.raises(rk.NonFiniteError, match=r"1 rows hold NaN or Inf.*drop them, or raise f$") as error:
        rk.mix(x, "nnm", f=0)
    assert error.value.rows == (3,)


def test_what_cannot_be_mixed() -> None:
    x = np.ones((4, 3), dtype=np.float32)
    for rule in ("median", "nnm | median", rk.Krum()):
        with pytest.raises(ValueError, match=r"combines the rows; expected rules that mix them, e\.g\. 'nnm'"):
            rk.mix(x, rule, f=1)
    with pytest.raises(TypeError, match="rule must be a rule object or its text form; got int"):
        rk.mix(x, 3, f=1)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="hold integers or texts, which are not mixed"):
        rk.mix([{"a": row, "k": np.int64(3)} for row in x], "nnm", f=1)
    with pytest.raises(TypeError, match="updates of float8 are not mixed"):
        rk.mix(torch.ones(4, 3).to(torch.float8_e5m2), "nnm", f=1)
    with pytest.raises(TypeError, match="backend must be a string; got int"):
        rk.mix(x, "nnm", f=1, backend=3)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="f is required"):
        rk.mix(x, "nnm")


# ---- servers ---------------------------------------------------------------------------------------------------------


def test_a_server_without_memory_is_aggregate() -> None:
    x = make_rows("normal", 7, 30, np.dtype(np.float32))
    server = rk.Server("ctma(median)", f=2)
    for rows in (x, torch.tensor(x), [{"w": row} for row in x]):
        got, info = server.aggregate(rows, return_info=True)
        want = rk.aggregate(rows, "ctma(median)", f=2)
        assert np.array_equal(
            np.asarray(got["w"] if isinstance(got, dict) else got),
            np.asarray(want["w"] if isinstance(want, dict) else want),
        )
        assert info.n == 7
    assert server.rounds == 3
    assert server.counts == dict.fromkeys(range(7), 3)
    weights = np.arange(1, 8)
    got = rk.Server("median").aggregate(x[::-1], workers=range(6, -1, -1), weights=weights[::-1])
    assert np.array_equal(got, rk.aggregate(x, "median", weights=weights))


def test_stale_rows_and_counts_make_asynchronous_rounds() -> None:
    x = make_rows("normal", 12, 30, np.dtype(np.float32))
    server = rk.Server("ctma(geometric_median)", delta=0.3, absent="stale", weights="counts")
    last = dict(enumerate(x[:5].copy()))
    counts = dict.fromkeys(range(5), 1)
    assert np.array_equal(server.aggregate(x[:5]), rk.aggregate(x[:5], "ctma(geometric_median)", delta=0.3))
    for turn, worker in enumerate((3, 3, 0, 4, 3, 1)):
        row = x[5 + turn].copy()
        got = server.aggregate(row[None], workers=[worker])
        row[:] = np.nan  # the server has its own
        last[worker], counts[worker] = x[5 + turn], counts[worker] + 1
        want = rk.aggregate(
            np.stack([last[k] for k in range(5)]), "ctma(geometric_median)", delta=0.3, weights=list(counts.values())
        )
        assert np.array_equal(got, want)
    assert server.counts == counts


def test_momentum_of_those_who_are_there() -> None:
    g = np.random.default_rng(0)
    server = rk.Server("trimmed_mean", f=1, momentum=0.9, absent="stale")
    rows: dict[int, Array] = {}
    for there in (range(5), (0, 2), (1, 3, 4), (2,)):
        updates = {k: g.standard_normal(20) for k in there}
        for k, update in updates.items():
            rows[k] = update if k not in rows else 0.9 * rows[k] + (1 - 0.9) * update
        got = server.aggregate(list(updates.values()), workers=list(there))
        np.testing.assert_allclose(got, rk.trimmed_mean(np.stack([rows[k] for k in range(5)]), f=1), rtol=1e-12)
    only_those = rk.Server("mean", momentum=0.5)
    only_those.aggregate([np.ones(3), np.zeros(3)])
    assert np.array_equal(only_those.aggregate([np.full(3, 2.0)], workers=[1]), np.full(3, 1.0))


def test_a_nan_does_not_stay_in_the_momentum() -> None:
    server = rk.Server("median", f=1, momentum=0.9, absent="stale")
    x = np.ones((3, 4))
    x[2] = np.nan
    assert np.array_equal(server.aggregate(x), np.ones(4))
    assert server.aggregate(np.full((3, 4), 2.0), return_info=True)[1].nonfinite_rows == ()
    assert np.array_equal(server.state_dict()["rows"][2], np.full(4, 2.0))
    assert np.array_equal(server.aggregate(np.full((1, 4), 4.0), workers=[2]), np.full(4, 0.9 * 1 + 0.1 * 2))
    np.testing.assert_allclose(server.state_dict()["rows"][2], np.full(4, 0.9 * 2 + 0.1 * 4))


def test_the_centre_is_the_last_result() -> None:
    x = make_rows("normal", 6, 20, np.dtype(np.float32))
    for form in (np.asarray, torch.tensor):
        centre: Any = form(np.zeros(20, dtype=np.float32))
        server = rk.Server("centred_clipping(tau=2.0)", centre=centre)
        for k in range(3):
            rows = form(x + k)
            got = server.aggregate(rows)
            centre = rk.aggregate(rows, "centred_clipping(tau=2.0)", centre=centre)
            assert np.array_equal(np.asarray(got), np.asarray(centre))
            got[:] = 77  # the server has its own


@pytest.mark.parametrize(
    "options",
    [
        {"rule": "ctma(median)", "f": 1, "absent": "stale", "weights": "counts"},
        {"rule": "bucketing(size=2) | median", "f": 0, "seed": 5, "momentum": 0.9},
        {"rule": "centred_clipping(tau=1.0)", "f": 1, "centre": np.zeros(8, dtype=np.float32), "momentum": 0.5},
    ],
)
def test_a_server_goes_on_to_the_last_bit(options: dict[str, Any]) -> None:
    rule = options.pop("rule")
    rounds = [make_rows("normal", 5, 8, np.dtype(np.float32), seed=k) for k in range(6)]
    through = rk.Server(rule, **options)
    want = [
        through.aggregate(x[: 5 - k % 3], workers=[f"w{i}" for i in range(5 - k % 3)]) for k, x in enumerate(rounds)
    ]
    server = rk.Server(rule, **options)
    for k, x in enumerate(rounds):
        resumed = rk.Server(rule, **options)
        resumed.load_state_dict(pickle.loads(pickle.dumps(server.state_dict())))
        server = resumed
        assert np.array_equal(server.aggregate(x[: 5 - k % 3], workers=[f"w{i}" for i in range(5 - k % 3)]), want[k])


def test_a_round_that_raises_changes_nothing() -> None:
    server = rk.Server("median", f=1, absent="stale", momentum=0.9, weights="counts")
    server.aggregate(np.ones((3, 4)))
    before = pickle.dumps(server.state_dict())
    for rows in (np.ones((3, 5)), np.full((3, 4), np.nan)):
        with pytest.raises(ValueError):  # noqa: PT011 - of any kind
            server.aggregate(rows)
    with pytest.raises(ValueError, match=r"has the unexpected leaves \(the update itself\)"):
        server.aggregate([{"w": np.ones(4)}], workers=[1])
    assert pickle.dumps(server.state_dict()) == before


def test_leaves_that_a_server_leaves_out() -> None:
    rows = [{"w": np.full(3, float(k)), "n.mean": np.full(2, np.nan)} for k in range(3)]
    for server in (rk.Server("median", exclude="n.*"), rk.Server("median", only="w", absent="stale", momentum=0.5)):
        for _ in range(2):
            assert {name: leaf.tolist() for name, leaf in server.aggregate(rows).items()} == {"w": [1.0] * 3}


def test_a_centre_lacks_what_is_left_out() -> None:
    rows = [{"w": np.full(3, float(k)), "head": np.full(2, float(k))} for k in range(5)]
    for options in ({"exclude": "head"}, {"only": "w", "momentum": 0.5}):
        server = rk.Server("ctma(centre)", f=1, centre=rows[0], **options)  # type: ignore[arg-type]
        for _ in range(3):
            assert server.aggregate(rows)["w"].tolist() == [1.5] * 3


def test_settings_are_those_of_the_update() -> None:
    for momentum in (0.3, 0.5, 0.9):
        server = rk.Server("mean", momentum=momentum)
        for epoch in range(3):
            assert server.aggregate([{"w": np.ones(2), "epoch": epoch, "name": "x"}] * 3)["epoch"] == epoch


def test_what_a_server_refuses() -> None:
    for options, error, message in (
        ({"weights": "samples"}, ValueError, r"weights must be None or 'counts' \(or pass them to aggregate\)"),
        ({"absent": "drop"}, ValueError, "absent must be 'forget' or 'stale'; got 'drop'"),
        ({"momentum": 1.0}, ValueError, r"momentum must be a number in \[0, 1\); got 1.0"),
        ({"seed": -1}, ValueError, "seed must be None or an integer of at least 0; got -1"),
        ({"centre": np.ones(3)}, ValueError, "centre is given, but median measures from none"),
        ({"f": 1, "delta": 0.1}, ValueError, "pass f or delta, not both; got f=1, delta=0.1"),
    ):
        with pytest.raises(error, match=message):
            rk.Server("median", **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="krum takes no weights"):
        rk.Server("krum", f=1, weights="counts")
    with pytest.raises(ValueError, match="measures from a centre, the first of which is missing"):
        rk.Server("ctma(centre)", f=1)
    server, x = rk.Server("median"), np.ones((3, 2))
    for workers, error, message in (
        ([0, 1], ValueError, r"must be distinct, one for each update; got 2 \(2 of them distinct\) for 3 updates"),
        ([0, 1, 1], ValueError, r"got 3 \(2 of them distinct\)"),
        ([0, "a", 1], TypeError, "workers must be all integers or all texts; got "),
        ([0.5, 1.5, 2.5], TypeError, "workers must be all integers or all texts; got float"),
    ):
        with pytest.raises(error, match=message):
            server.aggregate(x, workers=workers)  # type: ignore[arg-type]
    server.aggregate(x)
    with pytest.raises(TypeError, match="workers must be int as in earlier rounds; got str"):
        server.aggregate(x, workers=["a", "b", "c"])
    with pytest.raises(TypeError, match="updates is dict; expected an array of rows, or a list of updates"):
        server.aggregate({"a": x})
    with pytest.raises(ValueError, match="weights= is for servers without weights of their own"):
        rk.Server("median", absent="stale").aggregate(x, weights=[1, 2, 3])
    with pytest.raises(ValueError, match="weights"):
        server.aggregate(x, weights=[1, 2])


def test_states_that_are_none() -> None:
    server = rk.Server("median", f=1, absent="stale")
    server.aggregate(np.ones((3, 2)))
    state = server.state_dict()
    fresh = rk.Server("median", f=1, absent="stale")
    with pytest.raises(TypeError, match="state must be what state_dict returned; got list"):
        fresh.load_state_dict([])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="state lacks counts, rows"):
        fresh.load_state_dict({k: v for k, v in state.items() if k not in ("rows", "counts")})
    with pytest.raises(
        ValueError, match="state is of version 1 and rule 'median'; this server has version 1 and rule 'mean'"
    ):
        rk.Server("mean").load_state_dict(state)
    with pytest.raises(TypeError, match=r"state holds workers of int, str; expected all integers or all texts \(pass"):
        fresh.load_state_dict(state | {"counts": {0: 1, "a": 1}})
    with pytest.raises(TypeError, match="state holds workers of float; expected all integers or all texts"):
        fresh.load_state_dict(state | {"counts": {0.5: 1}, "rows": {}})
    for wrong in ({"rounds": -1}, {"counts": {0: 0}}, {"counts": {0: "x"}}):
        with pytest.raises(ValueError, match="state holds rounds or counts that are no positive integers"):
            fresh.load_state_dict({**state, **wrong})
    for wrong in ({"centre": np.ones(2)}, {"counts": {}}):
        with pytest.raises(ValueError, match="a centre too many or too few, or rows of workers without a count"):
            fresh.load_state_dict({**state, **wrong})
    assert fresh.rounds == 0


# ---- inner products that are kept ------------------------------------------------------------------------------------


class Counted:
    """How often products were taken, of all rows or of some, while a server worked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.all, self.some = 0, []  # type: tuple[int, list[int]]
        take_all, take = KeptProducts._take_all, KeptProducts._take

        def counting_all(products: KeptProducts, passes: Any) -> Any:
            self.all += 1
            return take_all(products, passes)

        def counting(products: KeptProducts, passes: Any, changed: Array, *rest: Any) -> None:
            self.some.append(len(changed))
            take(products, passes, changed, *rest)

        monkeypatch.setattr(KeptProducts, "_take_all", counting_all)
        monkeypatch.setattr(KeptProducts, "_take", counting)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


@pytest.mark.parametrize("n", [LEAST_ROWS - 1, LEAST_ROWS, LEAST_ROWS + 9])
@pytest.mark.parametrize("rule", ["krum", "geometric_median", "ctma(geometric_median)", "nnm | median", "median"])
def test_arrivals_are_combined_as_all_rows_are(rule: str, n: int, dtype: np.dtype[Any], backend: str, counted: Counted) -> None:  # fmt: skip
    f, d = n // 4, 40
    g = np.random.default_rng(n)
    last = make_rows("normal", n, d, dtype, seed=n) + np.asarray(3, dtype=dtype)
    server = rk.Server(rule, f=f, absent="stale", backend=backend)
    server.aggregate(last)
    for turn in range(8):
        for worker in g.choice(n, 1 + turn % 3, replace=False):
            row = (g.standard_normal(d) * (100 if turn % 3 == 1 else 1) + 3).astype(dtype)
            row[0] = [row[0], np.nan, np.inf, row[0]][turn % 4]
            row = last[(worker + 1) % n] if turn == 7 else row  # a copy
            last[worker] = row
            server.add(row[None], workers=[worker])
        got, info = server.aggregate(return_info=True)
        want, told = rk.aggregate(last, rule, f=f, backend=backend, return_info=True)
        assert (info.nonfinite_rows, info.order, info.n) == (told.nonfinite_rows, told.order, n)
        if "geometric" in rule and info.kept is None:
            np.testing.assert_allclose(got.astype(np.float64), want.astype(np.float64), rtol=2 * np.finfo(dtype).eps if dtype.kind == "f" else 1e-2)  # fmt: skip
            np.testing.assert_allclose(info.weights, told.weights, atol=1e-9)
        else:
            assert np.array_equal(got, want)
    assert (counted.all, counted.some) == ((0, []) if n < LEAST_ROWS or rule == "median" else (1, [1, 2, 3] * 2 + [1, 2]))  # fmt: skip


def test_kept_products_are_as_good_as_all_of_them(backend: str) -> None:
    """Against the exact products, from the centre that is kept: within the bound that rules count on."""
    n, d = 2 * LEAST_ROWS, 333
    rows = list(make_rows("normal", n, d, np.dtype(np.float64), seed=2) + 1e3)
    server = rk.Server("krum", f=3, absent="stale", backend=backend)
    server.aggregate(np.stack(rows))
    centre = np.sort(rows, axis=0)[(n - 1) // 2].astype(np.longdouble)
    for worker, far in ((3, 1.0), (n - 1, 1e7), (5, 1e-3), (3, 1e3), (7, 0.0)):
        rows[worker] = rows[0] + far * make_rows("normal", 1, d, np.dtype(np.float64), seed=worker)[0]
        server.aggregate(rows[worker][None], workers=[worker])
    x = np.stack(rows).astype(np.longdouble) - centre
    exact, lengths = x @ x.T, np.sqrt((x * x).sum(axis=1)).astype(np.float64)
    errors = np.abs(server._products._known.products - exact).astype(np.float64)
    assert (errors <= 2.0**-53 * 256 * lengths[:, None] * lengths).all()


def test_rows_that_go_away_get_another_centre(counted: Counted) -> None:
    n = LEAST_ROWS
    server = rk.Server("geometric_median", f=9, absent="stale")
    rows = make_rows("normal", n, 50, np.dtype(np.float64))
    server.aggregate(rows)
    for worker in range(n):
        rows[worker] += 1e4
        got = server.aggregate(rows[worker : worker + 1], workers=[worker])
    assert counted.all == 2  # the first, and when half of them were away
    np.testing.assert_allclose(got, rk.aggregate(rows, "geometric_median", f=9), rtol=1e-13)
    server.aggregate(rows[: n // 2])  # more at once than are taken one by one
    assert counted.all == 3
    # Nobody who is far away makes products of all rows be taken.
    for turn in range(6):
        server.aggregate(rows[:1] * 10.0 ** (3 * turn), workers=[turn])
    assert counted.all == 3


def test_workers_who_join_and_other_orders_of_leaves(counted: Counted) -> None:
    n = LEAST_ROWS + 6
    x = make_rows("normal", n, 30, np.dtype(np.float32))
    trees: list[Any] = [OrderedDict(b=row[:15], a=row[15:]) for row in x]
    server = rk.Server("multi_krum(m=3)", f=4, absent="stale")
    server.aggregate(trees[3 : n - 3], workers=range(3, n - 3))
    server.add(trees[n - 3 :], workers=range(n - 3, n))
    got = server.aggregate()
    want = rk.aggregate(trees[3:], "multi_krum(m=3)", f=4)
    assert (counted.all, counted.some) == (1, [3])
    assert np.array_equal(got["a"], want["a"])
    turned: Any = OrderedDict(a=x[0][15:], b=x[0][:15])  # row 0's order is the order of the columns
    got = server.aggregate([turned, trees[1]], workers=[0, 1])
    want = rk.aggregate([turned, trees[1], *trees[3:]], "multi_krum(m=3)", f=4)
    assert counted.all == 2
    assert list(got) == ["a", "b"]
    assert np.array_equal(got["a"], want["a"])
    assert np.array_equal(got["b"], want["b"])


def test_what_is_judged_by_some_rows_or_columns_takes_products_of_these() -> None:
    n = LEAST_ROWS
    x = make_rows("normal", n + 9, 30, np.dtype(np.float32))
    x[:, 4] = np.inf  # which all rows share
    for options, rule in (({}, "krum"), ({"nonfinite": "drop"}, "krum"), ({"weights": "counts"}, "geometric_median"), ({"scope": "leaf"}, "krum"), ({}, "cge")):  # fmt: skip
        server = rk.Server(rule, f=5, absent="stale", **options)  # type: ignore[arg-type]
        rows = {k: x[k] for k in range(n)}
        server.aggregate([{"w": row} for row in x[:n]])
        for turn in range(9):
            rows[turn] = x[n + turn]
            if turn == 3:
                rows[turn] = np.where(np.arange(30) == 7, np.nan, rows[turn])
            got = server.aggregate([{"w": rows[turn]}], workers=[turn])
        more: Any = {"weights": [2] * 9 + [1] * (n - 9)} if "weights" in options else options
        want = rk.aggregate([{"w": row} for row in rows.values()], rule, f=5, **more)
        np.testing.assert_allclose(got["w"], want["w"], rtol=1e-6)


def test_a_call_that_ends_early_leaves_no_wrong_products(monkeypatch: pytest.MonkeyPatch) -> None:
    n = LEAST_ROWS
    x = make_rows("normal", n, 30, np.dtype(np.float32))
    server = rk.Server("krum", f=5, absent="stale")
    server.aggregate(x)
    for name in ("_take", "_take_all"):
        with monkeypatch.context() as patch:
            patch.setattr(KeptProducts, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            rows = -x[:1] if name == "_take" else -x[: n // 2]
            with pytest.raises(KeyboardInterrupt):
                server.aggregate(rows)
        assert server.rounds == 1
        assert np.array_equal(server.aggregate(), rk.aggregate(x, "krum", f=5))
        server.rounds = 1


def test_a_server_with_kept_products_goes_on_to_the_last_bit() -> None:
    n = LEAST_ROWS
    x = make_rows("normal", n + 4, 30, np.dtype(np.float64))
    server = rk.Server("geometric_median", f=5, absent="stale")
    server.aggregate(x[:n])
    server.aggregate(x[n : n + 2] * 30, workers=[0, 9])
    again = rk.Server("geometric_median", f=5, absent="stale")
    again.load_state_dict(pickle.loads(pickle.dumps(server.state_dict())))
    for turn in (2, 3):
        row = x[n + turn : n + turn + 1]
        assert np.array_equal(server.aggregate(row, workers=[turn]), again.aggregate(row, workers=[turn]))


def test_many_rows_of_few_columns_need_no_products(counted: Counted) -> None:
    for d, want in ((20, 0), (81, 1)):
        x = make_rows("normal", 640, d, np.dtype(np.float64))
        server = rk.Server("geometric_median", f=9, absent="stale")
        assert np.array_equal(server.aggregate(x), rk.aggregate(x, "geometric_median", f=9))
        assert counted.all == want


def test_copies_of_a_server_know_nothing_of_its_memory() -> None:
    n, x = 2 * LEAST_ROWS, make_rows("normal", 2 * LEAST_ROWS, 3000, np.dtype(np.float64))
    server = rk.Server("geometric_median", f=9, absent="stale")
    server.aggregate(x)
    for again in (copy.deepcopy(server), pickle.loads(pickle.dumps(server))):
        assert len(again._products._known.rows) == 0
        y = x.copy()
        y[3] = -x[3]
        got = again.aggregate(y[3:4], workers=[3])
        np.testing.assert_allclose(got, rk.aggregate(y, "geometric_median", f=9), rtol=1e-13, atol=1e-16)
    assert len(server._products._known.rows) == n


@pytest.mark.parametrize("far", [1e145, 1e160, 1e200])
def test_a_centre_that_is_out_of_reach_is_left(far: float) -> None:
    n, x = LEAST_ROWS, make_rows("normal", LEAST_ROWS, 30, np.dtype(np.float64))
    for rule in ("geometric_median", "krum"):
        rows = x * far
        server = rk.Server(rule, f=5, absent="stale")
        server.aggregate(rows)
        for worker in range(n):
            rows[worker] = x[worker]
            answers = []
            for ask in (lambda w=worker: server.aggregate(rows[w : w + 1], workers=[w]), lambda: rk.aggregate(rows, rule, f=5)):  # noqa: B023  # fmt: skip
                try:
                    answers.append(ask())
                except rk.NonFiniteError as error:
                    answers.append(error.rows)
                    if len(answers) == 1:
                        server.add(rows[worker : worker + 1], workers=[worker])
            got, want = answers
            assert type(got) is type(want), worker
            if rule == "krum" or isinstance(want, tuple):
                assert np.array_equal(got, want), worker
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-15)


def test_ties_that_move_are_other_columns() -> None:
    g, n, f, k = np.random.default_rng(3), LEAST_ROWS, LEAST_ROWS // 2 - 1, 20
    v, c = torch.from_numpy(g.standard_normal((n, k))), torch.from_numpy(5 * g.standard_normal((n, k)))

    def first(i: int) -> dict[str, Any]:
        a = v[i].clone()
        return {"a": a, "b": a, "c": c[i].clone()}

    def last(i: int) -> dict[str, Any]:
        b = c[i].clone()
        return {"a": v[i].clone(), "b": b, "c": b}

    rows = [first(i) if i < f + 2 else last(i) for i in range(n)]
    server = rk.Server("krum", f=f, absent="stale")
    server.aggregate(rows)
    new = [last(i) for i in range(n // 4)]
    got = server.aggregate(new, workers=range(n // 4))
    want = rk.aggregate([*new, *rows[n // 4 :]], "krum", f=f)
    assert all(torch.equal(got[name], want[name]) for name in "abc")


def test_threads_leave_products_of_the_rows() -> None:
    n = 2 * LEAST_ROWS
    server = rk.Server("geometric_median", f=9, absent="stale")
    server.aggregate(make_rows("normal", n, 500, np.dtype(np.float64)))

    def arrive(first: int) -> None:
        g = np.random.default_rng(first)
        for _ in range(30):
            server.add(3 * g.standard_normal((1, 500)), workers=[int(g.integers(first, first + 16))])
            server.aggregate()

    threads = [threading.Thread(target=arrive, args=(first,)) for first in (0, 16, 32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = np.stack([server._rows[i] for i in range(n)])
    np.testing.assert_allclose(server.aggregate(), rk.aggregate(rows, "geometric_median", f=9), rtol=1e-12, atol=1e-15)


def test_threads_share_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits where another would take its place, and copies are free of its lock."""
    taken = rk.Server._row

    def slow(server: rk.Server, *update: Any) -> Any:
        row = taken(server, *update)
        time.sleep(1e-3)
        return row

    monkeypatch.setattr(rk.Server, "_row", slow)
    server = rk.Server("median", absent="stale")
    server.add([np.zeros(3)], workers=[0])

    def arrive(first: int) -> None:
        for k in range(first, first + 10):
            server.add([np.full(3, float(k))], workers=[k])
            server.aggregate([np.zeros(3)], workers=[0])

    threads = [threading.Thread(target=arrive, args=(first,)) for first in (1, 11, 21, 31)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.counts == {0: 41} | dict.fromkeys(range(1, 41), 1)
    assert server.rounds == 40
    for again in (copy.copy(server), copy.deepcopy(server), pickle.loads(pickle.dumps(server))):
        assert again.aggregate().tolist() == [20.0] * 3
        assert again.rounds == 41
    assert server.rounds == 40


@pytest.mark.parametrize("rule", ["ctma(geometric_median)", "ctma(krum)", "multi_krum(m=5)"])
def test_copies_that_arrive_are_in_the_order_of_rows(rule: str, dtype: np.dtype[Any]) -> None:
    for seed in range(15):
        g, n = np.random.default_rng(seed), LEAST_ROWS + 20
        x = (make_rows("normal", n, 100, dtype, seed=seed) + np.asarray(3, dtype=dtype)).astype(dtype)
        server = rk.Server(rule, f=5, absent="stale")
        server.aggregate(x)
        for worker in g.choice(n, 4, replace=False):
            x[worker] = x[g.integers(n)]
            server.add(x[worker : worker + 1], workers=[int(worker)])
        got, want = server.aggregate(return_info=True)[1], rk.aggregate(x, rule, f=5, return_info=True)[1]
        assert got.order == want.order
        assert np.array_equal(got.weights, want.weights)


def test_copies_cost_one_read_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many of them arrive at once."""
    n, f = 2 * LEAST_ROWS, LEAST_ROWS - 1
    x = make_rows("normal", n, 200, np.dtype(np.float32))
    x[:f] = x[0]
    server = rk.Server("geometric_median", f=f, absent="stale", backend="reference")
    server.aggregate(x)
    kernels, looked = load_backend("reference"), []
    measure = type(kernels).row_sq_distances

    def counting(self: Any, rows: Any, centre: Any, **options: Any) -> Any:
        looked.append(rows.n)
        return measure(self, rows, centre, **options)

    monkeypatch.setattr(type(kernels), "row_sq_distances", counting)
    server.aggregate(x[: n // 4])  # all of them copies
    assert 0 < sum(looked) <= n + 1  # and one look at whether the result is finite, at most


def test_add_is_for_servers_that_keep_rows() -> None:
    server = rk.Server("median")
    with pytest.raises(ValueError, match=r"add is for servers that keep rows \(pass absent='stale'"):
        server.add(np.zeros((3, 2)))
    server = rk.Server("median", f=0, absent="stale")
    server.add(np.zeros((3, 2)))
    with pytest.raises(TypeError, match="workers must be int as in earlier rounds"):
        server.add(np.zeros((1, 2)), workers=["a"])
    assert server.counts == {0: 1, 1: 1, 2: 1}
    assert server.aggregate().tolist() == [0, 0]
    assert server.aggregate(np.ones((2, 2)), delta=0.3).tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"0 <= delta < 0\.5"):
        server.aggregate(delta=0.7)
