"""Rules that measure from a point somebody gives, search for a subset, or follow a convention of another package."""

from __future__ import annotations

import doctest
import itertools
import time
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
from numpy.typing import NDArray
from support import assert_close, make_rows
from test_rules import SPECIAL, slow, slow_nearest

import robustkern as rk
from robustkern import products
from robustkern.files import aggregate_files
from robustkern.rules import diameter, filters, geometry

Array = NDArray[Any]


def attacked(n: int, d: int, f: int, dtype: Any) -> Array:
    x = make_rows("normal", n, d, np.dtype(np.float64), seed=n)
    x[:f] += 3
    return x.astype(dtype)


# ---- minimal diameter --------------------------------------------------------------------------------------------


def smallest(squares: Array, out: int) -> list[int]:
    subsets = itertools.combinations(range(len(squares)), len(squares) - out)
    return list(min(subsets, key=lambda s: squares[np.ix_(s, s)].max()))


@pytest.mark.parametrize("kind", ["points", "few distances", "two distances", "copies"])
def test_the_subset_of_least_diameter_is_the_first_one(kind: str) -> None:
    """Any symmetric distances will do, so that graphs of every shape are met; ties by the order of subsets."""
    g = np.random.default_rng(len(kind))
    for _ in range(400):
        n = int(g.integers(1, 11))
        out = int(g.integers(0, (n - 1) // 2 + 1))
        if kind in ("points", "copies"):
            x = g.standard_normal((n, 3))
            x = x[g.integers(0, n, n)] if kind == "copies" else x
            squares = ((x[:, None] - x) ** 2).sum(axis=2)
        else:
            squares = g.integers(0, 2 if kind == "two distances" else 5, (n, n)).astype(float)
        squares = np.maximum(squares, squares.T)
        np.fill_diagonal(squares, 0)
        found = diameter._first_subset(squares, out, diameter._with_ties(squares, out))
        assert found == smallest(squares, out)


@pytest.mark.parametrize(("n", "f"), [(30, 8), (40, 15), (100, 10)])
def test_no_rows_make_the_search_long(n: int, f: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not timed: branches of the search, for graphs from sparse to dense, rings, and equidistant rows."""
    asked = 0
    once = diameter._can_cover

    def counted(*what: Any) -> bool:
        nonlocal asked
        asked += 1
        return once(*what)

    monkeypatch.setattr(diameter, "_can_cover", counted)
    g = np.random.default_rng(0)
    ring = np.zeros((n, n))
    ring[np.arange(n), (np.arange(n) + 1) % n] = 1
    for share in (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, "ring"):
        near = ring if share == "ring" else (g.random((n, n)) < share) + 0.001 * g.random((n, n))
        squares = np.maximum(near, near.T)
        np.fill_diagonal(squares, 0)
        asked = 0
        diameter._first_subset(squares, f, diameter._with_ties(squares, f))
        assert asked <= diameter.GROWTH**f * (n + 2 * np.log2(n))
    for x in (np.eye(n), np.ones((n, 3)), np.repeat(np.eye(3), n, axis=0)[:n]):
        assert np.isfinite(rk.aggregate(x, "mda", f=f)).all()


def test_diameters_that_are_nearly_equal_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "SINGLE_VALUES", 0)
    x = np.zeros((4, 3))
    x[:, 0] = [0.0, 1.0, 2.0 + 2.0**-45, 3.0 + 2.0**-45 + 2.0**-44]
    x += 1000.0
    assert rk.aggregate(x, "mda", f=1, return_info=True)[1].order == (0, 1, 2)
    assert rk.aggregate(x[::-1].copy(), "mda", f=1, return_info=True)[1].order == (1, 2, 3)
    tied = np.arange(4, dtype=np.float32)[:, None].repeat(50, axis=1)
    assert rk.aggregate(tied, "mda", f=1, return_info=True)[1].order == (0, 1, 2)
    equidistant = np.eye(30, dtype=np.float32) * 0.3  # more pairs than are measured
    assert rk.aggregate(equidistant, "mda", f=8, return_info=True)[1].order == tuple(range(22))


# ---- a centre ----------------------------------------------------------------------------------------------------


def clipped(x: Array, y: Array, tau: float, steps: int, weights: Array) -> Array:
    """Centred clipping on the vectors, in longdouble; rows with NaN do not pull."""
    x, y = x.astype(np.longdouble), y.astype(np.longdouble)
    finite = np.isfinite(x).all(axis=1)
    for _ in range(steps):
        away = np.where(finite[:, None], x - y, 0)
        length = np.sqrt((away**2).sum(axis=1))
        share = np.minimum(1, tau / np.where(length > 0, length, 1)) * weights / weights.sum()
        y = y + (share[:, None] * away).sum(axis=0)
    return y


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_centred_clipping(backend: str, dtype: np.dtype[Any], steps: int, weighted: bool) -> None:
    x = attacked(9, 41, 3, dtype)
    x[1] = np.nan
    centre = make_rows("normal", 1, 41, dtype, seed=9)[0]
    weights = np.array([1.0, 2, 1, 3, 3, 2, 4, 3, 3]) if weighted else None
    ones = np.ones(9) if weights is None else weights
    options = {"f": 3, "weights": weights}
    for tau in (0.5, 6.0, 1e3):
        rule = f"centred_clipping(tau={tau}, steps={steps})"
        got, info = rk.aggregate(x, rule, centre=centre, return_info=True, **options)  # type: ignore[call-overload]
        want = clipped(x, centre, tau, steps, ones)
        honest = np.concatenate([x[2:], centre[None]])
        assert_close(got, want, honest)
        assert info.iterations == steps
        assert info.nonfinite_rows == (1,)
        assert info.weights[1] == 0
        zero = rk.aggregate(x, f"{rule[:-1]}, start='zero')", **options)  # type: ignore[call-overload]
        assert_close(zero, clipped(x, centre * 0, tau, steps, ones), x[2:])
    at = rk.aggregate(np.stack([centre] * 5), "centred_clipping(tau=1)", centre=centre)  # no row is anywhere else
    assert np.array_equal(at, centre)


@pytest.mark.parametrize("rule", ["ctma(centre)", "monna(pivot='centre')", "nnm | ctma(centre)"])
def test_rows_nearest_to_a_centre(backend: str, dtype: np.dtype[Any], rule: str, tmp_path: Path) -> None:
    x = attacked(9, 41, 2, dtype)
    centre = make_rows("normal", 1, 41, dtype, seed=9)[0]
    got, info = rk.aggregate(x, rule, f=2, centre=centre, return_info=True)
    wide = x.astype(np.longdouble)
    if rule.startswith("nnm"):
        wide = np.stack([wide[slow_nearest(wide, row, 7)].mean(axis=0) for row in wide])
    near = slow_nearest(wide, centre.astype(np.longdouble), 7)
    assert_close(got, wide[near].mean(axis=0), x)
    if not rule.startswith("nnm"):
        assert info.order == tuple(near)
        x[0] = np.nan
        assert np.isfinite(rk.aggregate(x, rule, f=2, centre=centre).astype(np.float64)).all()
    with pytest.raises(ValueError, match="centre is required, a vector like one update"):
        rk.aggregate(x, rule, f=2)
    if dtype == np.float32:
        for i, row in enumerate([*x, centre]):
            np.save(tmp_path / f"{i}.npy", row)
        paths = [tmp_path / f"{i}.npy" for i in range(9)]
        aggregate_files(paths, rule, f=2, centre=tmp_path / "9.npy", out=tmp_path / "out.npy")
        assert np.array_equal(np.load(tmp_path / "out.npy"), rk.aggregate(x, rule, f=2, centre=centre))


def test_the_centre_is_what_was_given() -> None:
    x = attacked(5, 4, 1, np.float32)
    assert np.array_equal(rk.aggregate(x, "centre", centre=x[3] + 1), x[3] + 1)


def test_plain_forms_know_no_centre() -> None:
    for rule in ("centred_clipping(tau=1.0)", "monna(pivot='centre')"):
        with pytest.raises(NotImplementedError, match="needs a centre"):
            rk.parse_rule(rule).plain(np.ones((3, 2)), 1)
    x = attacked(9, 20, 2, np.float64)
    clipping = rk.parse_rule("centred_clipping(tau=2.0, steps=3, start='zero')")
    np.testing.assert_allclose(rk.aggregate(x, clipping, f=2), clipping.plain(x, 2), atol=1e-12)
    with pytest.raises(NotImplementedError, match="centre has no plain NumPy form"):
        rk.parse_rule("centre").plain(x, 1)


# ---- rules that need more ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [*SPECIAL, "bulyan(selection='once')", "monna(pivot=6)", "medoid", "mda"])
def test_rows_that_are_not_finite_stay_out(backend: str, dtype: np.dtype[Any], rule: str) -> None:
    x = attacked(11, 37, 2, dtype)
    for bad in (np.nan, np.inf, -np.inf):
        y = x.copy()
        y[[3, 5]] = bad
        y[5, 1:] = 0
        got, info = rk.aggregate(y, rule, f=2, return_info=True)
        assert np.isfinite(got.astype(np.float64)).all()
        assert not info.kept[[3, 5]].any()
        assert info.nonfinite_rows == (3, 5)
        y[8, 0] = bad
        with pytest.raises(rk.NonFiniteError, match=r"3 rows hold NaN or Inf \(rows 3, 5, 8\)"):
            rk.aggregate(y, rule, f=2)


def test_bulyan_says_what_it_selected(backend: str) -> None:
    x = attacked(15, 60, 3, np.float32)
    got, info = rk.aggregate(x, "bulyan", f=3, return_info=True)
    assert info.kept.sum() == 9
    assert sorted(info.order) == np.flatnonzero(info.kept).tolist()
    assert info.weights is None
    assert info.bound_met
    np.testing.assert_allclose(info.sq_distances, ((x - got) ** 2).sum(axis=1), rtol=1e-5)
    mixed, info = rk.aggregate(x, "bucketing(size=1, seed=3) | bulyan", f=3, return_info=True)
    np.testing.assert_allclose(mixed, got, atol=1e-6)
    assert info.mixture.shape == (15, 15)
    assert np.array_equal(np.sort(info.mixture.argmax(axis=1)), np.arange(15))
    lifted, info = rk.aggregate(x, "ctma(bulyan)", f=3, return_info=True)
    assert info.kept.sum() == 12
    assert_close(lifted, slow("ctma(bulyan)", x, 3), x)


def test_krum_with_no_neighbours_and_with_one_row(backend: str) -> None:
    x = attacked(6, 9, 0, np.float32)
    for rule in ("krum(neighbours=0)", "multi_krum(m=1, neighbours=0)"):
        assert np.array_equal(rk.aggregate(x, rule, f=0), x[0])
        assert np.array_equal(rk.aggregate(x[:1], rule, f=0), x[0])


def test_distances_that_are_not_squared(backend: str) -> None:
    """One far neighbour counts for more when it is squared."""
    x = np.array([[0.0], [1], [2.6], [3.5], [8]])
    sums = [np.sort(abs(x - row), axis=0)[1:4, 0].sum() for row in x]
    squares = [(np.sort(abs(x - row), axis=0)[1:4, 0] ** 2).sum() for row in x]
    assert np.argmin(sums) != np.argmax(squares)
    got, info = rk.krum(x, f=0, neighbours=3, return_info=True)
    np.testing.assert_allclose(info.scores, squares)
    assert got == x[np.argmin(squares)]
    got, info = rk.krum(x, f=0, neighbours=3, squared=False, return_info=True)
    assert np.array_equal(got, rk.multi_krum(x, f=0, m=1, neighbours=3, squared=False))
    np.testing.assert_allclose(info.scores, sums)
    assert got == x[np.argmin(sums)]
    far = x * 1e200  # squares overflow
    got, info = rk.aggregate(far, "krum(neighbours=3, squared=False)", f=0, return_info=True)
    np.testing.assert_allclose(info.scores, np.array(sums) * 1e200)
    got, info = rk.aggregate(far, "medoid", return_info=True)
    np.testing.assert_allclose(info.scores, [abs(far - row).sum() for row in far])


def test_multi_krum_of_all_rows_is_the_mean(backend: str) -> None:
    x = attacked(7, 30, 2, np.float64)
    got, info = rk.multi_krum(x, f=2, m=7, return_info=True)
    np.testing.assert_allclose(got, x.mean(axis=0), atol=1e-14)
    assert info.bound_met is False
    assert len(info.order) == 7


def test_multi_krum_weighs_the_rows_that_it_keeps(backend: str, dtype: np.dtype[Any]) -> None:
    x, weights = attacked(9, 30, 2, dtype), np.array([5.0, 4, 3, 1, 2, 3, 4, 5, 6])
    _, plain = rk.multi_krum(x, f=2, m=4, return_info=True)
    got, info = rk.multi_krum(x, f=2, m=4, weights=weights, return_info=True)
    assert info.order == plain.order  # scores know no weights
    kept = list(plain.order)
    assert_close(got, np.average(x[kept].astype(np.longdouble), axis=0, weights=weights[kept]), x)
    np.testing.assert_allclose(info.weights[kept], weights[kept] / weights[kept].sum())
    with pytest.raises(ValueError, match=r"any f=2 rows may be Byzantine, and the heaviest .* hold"):
        rk.multi_krum(x, f=2, weights=[1, 1, 1, 1, 1, 1, 1, 9, 9])


def test_a_medoid_by_weight(backend: str) -> None:
    x = np.array([[0.0], [1], [2], [10]])
    assert rk.aggregate(x, "medoid") == 1
    assert rk.aggregate(x, "medoid", weights=[1, 1, 1, 4]) == 10


def exact_medoid(x: Array, weights: Any = None) -> tuple[int, float]:
    """Return the medoid, and how much better it is than the next one."""
    with mpmath.workdps(120):
        points = [[mpmath.mpf(float(value)) for value in row] for row in x]
        shares = [1.0] * len(x) if weights is None else [float(weight) for weight in weights]
        sums = []
        for p in points:
            away = (mpmath.sqrt(mpmath.fsum((a - b) ** 2 for a, b in zip(p, q, strict=True))) for q in points)
            sums.append(mpmath.fsum(share * a for share, a in zip(shares, away, strict=True)))
        ordered = sorted(sums)
        return sums.index(ordered[0]), float(ordered[1] - ordered[0])


@pytest.mark.parametrize("far", [1e6, 1e12, 1e20, 3e38])
@pytest.mark.parametrize("kept", [np.float32, np.float64])
def test_a_far_row_does_not_hide_the_medoid(backend: str, kept: Any, far: float) -> None:
    """In plain sums all distances to it are equal, and whoever stands first is the medoid, wherever it is."""
    for seed in range(8):
        g = np.random.default_rng(seed)
        x = g.standard_normal((11, 4)).astype(kept)
        x[10], x[0] = far, far / 1e3
        weights = None if seed % 4 < 2 else g.integers(1, 4, 11).astype(float)
        if seed % 2:
            x[9], x[3] = -x[10], x[4]
        if seed % 4 == 3:  # most rows are far, and hold little of the weight
            assert weights is not None
            x[5:10], weights[5:], weights[0] = x[10] * g.uniform(0.5, 1, (5, 1)).astype(kept), 0.01, 0
        _, info = rk.aggregate(x, "medoid", weights=weights, return_info=True)
        assert info.order == (exact_medoid(x, weights)[0],)


def test_medoids_that_are_nearly_equal_beside_far_rows() -> None:
    """Errors of distances to near copies are much larger than those of their squares."""
    for seed in range(200):
        g = np.random.default_rng(seed)
        x = g.standard_normal((8, 2))
        x[1] = -x[0] * (1 + 1e-9 * g.standard_normal())  # almost as good a candidate
        x[2:4] = x[:2] * (1 + 1e-9 * g.standard_normal((2, 2)))
        x[6:] = 1e6 * g.standard_normal((2, 2))
        want, better = exact_medoid(x)
        assert rk.aggregate(x, "medoid", return_info=True)[1].order == (want,) or better < 1e-11


def test_a_medoid_of_tiny_rows_does_not_depend_on_what_is_told() -> None:
    x = np.random.default_rng(0).standard_normal((9, 40_000)).astype(np.float32) * np.float32(1e-25)
    x[0] = x[8] = 1e-8
    want = rk.aggregate(x.astype(np.float64) * 1e25, "medoid", return_info=True)[1].order[0]
    assert rk.aggregate(x, "medoid", return_info=True)[1].order == (want,)
    assert np.array_equal(rk.aggregate(x, "medoid"), x[want])


def test_rows_that_are_shortened_onto_each_other(backend: str) -> None:
    """What cancels leaves squares below 0."""
    lines = np.array([[-0.52274844], [-0.52274844], [-0.41306354], [-2.44146738]])
    assert rk.aggregate(lines, "arc | geometric_median", f=1) == lines[0]
    for seed in range(40):
        g = np.random.default_rng(seed)
        x = g.standard_normal((9, 3))
        x[:4] = x[4] * 0.6 * np.array([[1.0], [1], [3], [5]])
        limit = float(np.linalg.norm(x[0]))
        cut = x * np.minimum(1, limit / np.linalg.norm(x, axis=1, keepdims=True))
        for rule in ("geometric_median", "ctma(geometric_median)", "geometric_median(nu=0.1)"):
            assert np.isfinite(rk.aggregate(x, f"arc | {rule}", f=4)).all()
            got = rk.aggregate(x, f"clipping(limit={limit!r}) | {rule}", f=4)
            np.testing.assert_allclose(got, rk.aggregate(cut, rule, f=4), atol=1e-6)


def test_norms_that_products_cannot_tell_apart_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are of rows that lie far from the origin, so their bound of errors is wide."""
    x = np.full((9, 300), 1000.0)
    x[:, 0] += np.arange(9)[::-1] * 1e-6
    for single in (0, 1 << 30):
        monkeypatch.setattr(geometry, "SINGLE_VALUES", single)
        assert rk.aggregate(x, "cge", f=2, return_info=True)[1].kept.tolist() == [False] * 2 + [True] * 7
    y = (x * 64).astype(np.float32)
    y[:, 0] = 64000 + np.arange(9)[::-1]
    assert rk.aggregate(y, "cge", f=2, return_info=True)[1].kept.tolist() == [False] * 2 + [True] * 7


@pytest.mark.parametrize("rule", ["cge", "monna(pivot=4)", "ctma(centre)", "centred_clipping(tau=2.0)"])
def test_one_point_takes_no_inner_products(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One read for the distances, which the Gram gives alike; and the scale that float64 rows need."""
    x = attacked(9, 40, 2, np.float64)
    for power in (0,) if "centre" in rk.parse_rule(rule).points else (0, 700, -700):
        rows = x * 2.0**power
        tau = 2.0 * 2.0**power
        named = rule.replace("2.0", repr(tau))
        centre = {"centre": rows[5] * 0.9} if "centre" in rk.parse_rule(named).points else {}
        via_gram = rk.aggregate(
            rows, named.replace(")", ", steps=2)") if "tau" in rule else f"nnm(count=1) | {named}", f=2, **centre
        )
        with monkeypatch.context() as patch:
            patch.setattr(geometry.Given, "measure", None)
            got, info = rk.aggregate(rows, named, f=2, return_info=True, **centre)
        if "tau" not in rule:
            np.testing.assert_allclose(got, via_gram, rtol=1e-12)
        else:
            want = clipped(rows * 2.0**-power, rows[5] * 2.0**-power * np.longdouble(0.9), 2.0, 1, np.ones(9))
            np.testing.assert_allclose(got * 2.0**-power, want.astype(float), rtol=1e-9)
        assert info.nonfinite_rows == ()
    if "centre" in rk.parse_rule(rule).points:
        for bad in (np.nan, np.inf):
            with pytest.raises(ValueError, match="centre holds NaN or Inf"):
                rk.aggregate(x, rule, f=2, centre=np.full(40, bad))


# ---- clipping ------------------------------------------------------------------------------------------------------


def shortened(rule: str, x: Array, f: int) -> Array:
    """Clip the vectors, in longdouble."""
    norms = np.sqrt((x**2).sum(axis=1))
    limit = 5.0 if rule.startswith("clipping") else np.sort(norms)[len(x) - 1 - 2 * f * (len(x) - f) // len(x)]
    return np.asarray(x * np.minimum(1, limit / norms)[:, None])


@pytest.mark.parametrize("even", ["mean", "low", "high"])
@pytest.mark.parametrize("n", [1, 2, 5, 8, 33])
def test_means_of_any_count_around_any_median(backend: str, dtype: np.dtype[Any], n: int, even: str) -> None:
    x = make_rows("ties" if n == 8 else "normal", n, 40, dtype, seed=n)
    ranked = np.sort(x.astype(np.longdouble), axis=0)
    middle = {"mean": (ranked[(n - 1) // 2] + ranked[n // 2]) / 2, "low": ranked[(n - 1) // 2], "high": ranked[n // 2]}
    order = np.argsort(abs(ranked - middle[even]), axis=0, kind="stable")
    for count in sorted({1, (n + 1) // 2, n}):
        want = np.take_along_axis(ranked, order[:count], axis=0).mean(axis=0)
        rule = f"mean_around_median(count={count}, even='{even}')"
        assert_close(rk.aggregate(x, rule, backend=backend), want, x)
        assert_close(rk.mean_around_median(x, count=count, even=even, backend=backend), want, x)
    if n == 33:
        assert_close(rk.mean_around_median(x, f=4, backend=backend), rk.aggregate(x, "meamed(count=29)"), x)


def test_parameters_that_numpy_made() -> None:
    rule = rk.NNM(np.int64(3)) | rk.MultiKrum(m=np.int32(2), neighbours=np.int8(3))
    assert rule == rk.parse_rule("nnm(count=3) | multi_krum(m=2, neighbours=3)")
    assert str(rule) == "nnm(count=3) | multi_krum(m=2, neighbours=3)"
    assert str(rk.GeometricMedian(nu=np.float32(0.5), max_iter=np.uint8(3))) == "geometric_median(nu=0.5, max_iter=3)"
    assert str(rk.CentredClipping(tau=np.float64(2), steps=np.int64(2))) == "centred_clipping(tau=2.0, steps=2)"
    assert rk.MoNNA(np.int64(1)) == rk.MoNNA(1)
    assert rk.Bucketing(np.int64(2), seed=np.uint64(7)) == rk.Bucketing(2, seed=7)


def test_counts_that_are_none() -> None:
    x = np.ones((4, 3))
    with pytest.raises(ValueError, match=r"count=5 is more than n=4 values \(pass n at most\)"):
        rk.mean_around_median(x, count=5)
    for count in (0, -1, 1.0, True):
        with pytest.raises(ValueError, match="count must be None or an integer of at least 1; got "):
            rk.mean_around_median(x, count=count)
    with pytest.raises(ValueError, match="mean_around_median: even must be 'mean', 'low' or 'high'; got 'upper'"):
        rk.mean_around_median(x, f=1, even="upper")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="f"):
        rk.mean_around_median(x)


def test_buckets_in_a_given_order(backend: str) -> None:
    x = make_rows("normal", 7, 9, np.dtype(np.float64))
    order = (3, 0, 6, 1, 5, 2, 4)
    rule = f"bucketing(size=3, order={order}) | median"
    want = np.median([x[[3, 0, 6]].mean(axis=0), x[[1, 5, 2]].mean(axis=0), x[4]], axis=0)
    np.testing.assert_allclose(rk.aggregate(x, rule, f=1, backend=backend), want, rtol=1e-12)
    assert str(rk.parse_rule(rule)) == rule
    np.testing.assert_allclose(rk.parse_rule(rule).plain(x, 1), want, rtol=1e-12)
    with pytest.raises(ValueError, match="order has 7 rows, but there are n=6"):
        rk.aggregate(x[:6], rule, f=1)
    for order_, message in (
        ("(0, 0, 1)", r"order must be a tuple of the rows 0 to n-1, each once; got \(0, 0, 1\)"),
        ("(0, 'a')", r"order must be a tuple of the rows"),
        ("[0, 1]", r"order must be a tuple of the rows"),
        ("(0, 1), seed=1", "bucketing: pass seed or order, not both"),
    ):
        with pytest.raises(ValueError, match=message):
            rk.parse_rule(f"bucketing(order={order_}) | median")


@pytest.mark.parametrize("mixer", ["clipping(limit=5.0)", "arc"])
@pytest.mark.parametrize(
    "last",
    ["mean", "median", "trimmed_mean", "geometric_median", "multi_krum", "nnm | median", "ctma(median)", "medoid"],
)
def test_clipping_comes_first(backend: str, dtype: np.dtype[Any], mixer: str, last: str) -> None:
    for n, d, f, offset in ((9, 41, 2, 0.0), (12, 64, 3, 3.0)):
        if last == "ctma(median)" and dtype.itemsize == 2 and offset:
            continue  # two rows are equally far from the median but for its rounding
        x = (attacked(n, d, f, np.float64) + offset).astype(dtype)
        got, info = rk.aggregate(x, f"{mixer} | {last}", f=f, return_info=True)
        rows = shortened(mixer, x.astype(np.longdouble), f)
        if last.startswith("nnm"):
            want = slow(last, rows, f)
        elif last == "ctma(median)":
            want = rows[slow_nearest(rows, np.median(rows.astype(float), axis=0), n - f)].mean(axis=0)
        else:
            want = slow(last, rows, f)
        assert_close(got, want, x)
        if not last.startswith("nnm"):
            np.testing.assert_allclose(info.mixture @ x.astype(float), rows.astype(float), rtol=1e-5, atol=1e-5)
        if info.weights is not None:
            np.testing.assert_allclose(info.weights @ x.astype(float), want.astype(float), rtol=5e-3, atol=5e-3)
        if info.sq_distances is not None and last in ("mean", "geometric_median", "ctma(median)"):
            point = want if last != "ctma(median)" else np.median(rows.astype(float), axis=0)
            np.testing.assert_allclose(info.sq_distances, ((rows - point) ** 2).sum(axis=1).astype(float), rtol=2e-2)


def test_clipping_anchors_and_centres(backend: str) -> None:
    x = attacked(11, 40, 3, np.float64) + 1
    centre = make_rows("normal", 1, 40, np.dtype(np.float64), seed=2)[0] + 1
    rows = shortened("arc", x, 3)
    near = slow_nearest(x, np.median(rows, axis=0), 8)
    got, info = rk.aggregate(x, "ctma(arc | median)", f=3, return_info=True)  # the original rows are averaged
    assert info.order == tuple(near)
    np.testing.assert_allclose(got, x[near].mean(axis=0))
    got, info = rk.aggregate(x, "arc | centred_clipping(tau=4.0, steps=2)", f=3, centre=centre, return_info=True)
    want = clipped(rows, centre, 4.0, 2, np.ones(11)).astype(float)
    np.testing.assert_allclose(got, want)
    np.testing.assert_allclose(info.sq_distances, ((rows - want) ** 2).sum(axis=1))
    got = rk.aggregate(x, "clipping(limit=5.0) | ctma(centre)", f=3, centre=centre)
    rows = shortened("clipping", x, 3)
    np.testing.assert_allclose(got, rows[slow_nearest(rows, centre, 8)].mean(axis=0))


def test_rows_too_long_to_be_measured_are_shortened_too(backend: str) -> None:
    x = attacked(7, 5, 0, np.float64)
    x[0], x[1] = 1e300, -1e200
    x[2, 3] = np.nan
    for rule in ("clipping(limit=2.0)", "arc"):
        got = rk.mix(x, rule, f=3)
        assert not got[:2].any()
        assert np.isnan(got[2]).sum() == 1
        assert np.isfinite(rk.aggregate(x, f"{rule} | trimmed_mean", f=3)).all()
    assert np.isfinite(rk.aggregate(x, "nnm(count=2) | clipping(limit=2.0) | median", f=3)).all()


def test_a_centre_out_of_reach_is_named(backend: str) -> None:
    x = attacked(7, 5, 0, np.float64)
    for rule in ("ctma(centre)", "centred_clipping(tau=1.0)", "centred_clipping(tau=1.0, steps=2)"):
        with pytest.raises(ValueError, match="centre holds NaN or Inf, or is 1e150 spreads away"):
            rk.aggregate(x, rule, f=2, centre=np.full(5, 1e300))


@pytest.mark.parametrize("last", ["median", "trimmed_mean", "mean_around_median", "ctma(median)"])
@pytest.mark.parametrize("mixer", ["clipping(limit=5.0)", "arc"])
@pytest.mark.parametrize("size", [1e8, 1e12, 1e20, 1e80, 1e148])
def test_a_huge_row_that_is_clipped_costs_no_digits(backend: str, mixer: str, last: str, size: float) -> None:
    """Wherever it stands: its share is tiny, and differences from it would leave nothing of the others."""
    n, f = 11, 2
    y = np.random.default_rng(2).standard_normal((n, 40))
    want = None
    for place in range(n):
        x = y.copy()
        x[0] *= size
        order = np.roll(np.arange(n), place)
        got = rk.aggregate(x[order], f"{mixer} | nnm | {last}", f=f)
        rows = shortened(mixer, x[order].astype(np.longdouble), f)
        assert np.linalg.norm(got) <= float(np.linalg.norm(rows.astype(float), axis=1).max())
        want = got if want is None else want
        np.testing.assert_allclose(got, want, atol=1e-12)
        if last in ("median", "trimmed_mean"):
            np.testing.assert_allclose(got, slow(f"nnm | {last}", rows, f).astype(float), atol=1e-12)


@pytest.mark.parametrize(
    "rule", ["krum", "medoid", "multi_krum", "multi_krum(m=1)", "geometric_median", "cge", "ctma(krum)"]
)
@pytest.mark.parametrize("mixer", ["clipping(limit=1.0)", "arc"])
def test_a_row_too_long_to_be_measured_is_not_kept(backend: str, mixer: str, rule: str) -> None:
    """Of it nothing is left, but it is no row at the origin either."""
    x = np.random.default_rng(0).standard_normal((9, 3))
    for place in (0, 4):
        spoilt, broken = x.copy(), x.copy()
        spoilt[place], broken[place] = 1e200, np.nan
        got, info = rk.aggregate(spoilt, f"{mixer} | {rule}", f=1, return_info=True)
        assert np.array_equal(got, rk.aggregate(broken, f"{mixer} | {rule}", f=1))
        assert info.nonfinite_rows == (place,)
        assert info.kept is None or not info.kept[place]
    assert np.linalg.norm(rk.mix(spoilt, mixer, f=1)[place]) == 0


def test_clipping_of_rows_that_are_not_finite(backend: str) -> None:
    x = attacked(9, 20, 2, np.float32)
    x[[0, 4]] = np.inf
    for rule in ("clipping(limit=1.0) | median", "arc | geometric_median", "arc | nnm | trimmed_mean"):
        got, info = rk.aggregate(x, rule, f=2, return_info=True)
        assert np.isfinite(got).all()
        assert info.nonfinite_rows == (0, 4)
        with pytest.raises(rk.NonFiniteError):
            rk.aggregate(x, rule, f=1)
    zeros = np.zeros((5, 4), dtype=np.float32)
    assert np.array_equal(rk.aggregate(zeros, "arc | mean", f=2), zeros[0])
    assert np.array_equal(rk.aggregate(zeros, "clipping(limit=0.5) | mean"), zeros[0])
    for rule, f in (("clipping(limit=5.0)", 2), ("arc", 2)):
        y = attacked(9, 20, 2, np.float64)
        np.testing.assert_allclose(rk.aggregate(y, f"{rule} | mean", f=f), rk.parse_rule(f"{rule} | mean").plain(y, f))
    for limit in (0, -1.0, np.inf, True, "1"):
        with pytest.raises(ValueError, match="clipping: limit must be a positive finite number; got"):
            rk.Clipping(limit)
    with pytest.raises(ValueError, match="arc: f is required"):
        rk.aggregate(y, "arc | mean")
    with pytest.raises(ValueError, match="weights are not supported"):
        rk.aggregate(y, "arc | mean", f=2, weights=np.arange(1.0, 10))


def test_no_pair_is_measured_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equidistant rows, of which every one is a contender in each of Bulyan's rounds."""
    measured = []
    once = geometry.Given.exact_from

    def counted(self: geometry.Given, row: int, scale: float, others: Array) -> Array:
        measured.extend((row, int(other)) for other in others)
        return once(self, row, scale, others)

    monkeypatch.setattr(geometry.Given, "exact_from", counted)
    monkeypatch.setattr(geometry.Given, "afford", lambda self, rows: True)  # which would give up soon
    x = np.repeat(np.eye(19, dtype=np.float32), 100, axis=1)
    assert np.isfinite(rk.aggregate(x, "bulyan", f=4)).all()
    assert 0 < len(measured) == len(set(measured)) <= 19 * 18 / 2


def test_what_is_no_read_is_not_for_attackers_to_choose_either() -> None:
    """Thousands of near copies have millions of pairs: 7.5 times the honest time where these were sorted, 3.1 now."""
    n, rng = 1000, np.random.default_rng(0)
    honest = rng.standard_normal((n, 2000)).astype(np.float32)
    attacked = honest.copy()
    attacked[: (n - 3) // 2] *= 1e-13

    def seconds(x: Array) -> float:
        begin = time.process_time()
        rk.aggregate(x, "krum", f=(n - 3) // 2)
        return time.process_time() - begin

    assert min(seconds(attacked) for _ in range(3)) < 5 * min(seconds(honest) for _ in range(3))


@pytest.mark.parametrize("rule", ["krum(neighbours=1)", "medoid", "mda", "multi_krum(m=1, neighbours=1)"])
def test_a_row_at_the_centre_is_no_copy_of_one_that_is_not_finite(
    backend: str, dtype: np.dtype[Any], rule: str
) -> None:
    for rows in ([np.nan, 0, 2.0**-24], [np.nan, 1, 2], [np.inf, 0, 3]):
        x = np.array(rows)[:, None].astype(dtype)
        got = rk.aggregate(x, rule, f=1)
        assert got == (x[1] if rule != "mda" else x[1:].astype(float).mean(axis=0).astype(dtype))


# ---- inner products alone -------------------------------------------------------------------------------------------

ON_PRODUCTS = (
    "mean", "geometric_median", "rfa", "krum", "multi_krum", "mda", "medoid", "cge", "monna(pivot=5)", "ctma(mean)",
    "ctma(geometric_median)", "nnm | mean", "nnm | ctma(geometric_median)", "ctma(nnm | krum)", "arc | geometric_median",
    "clipping(limit=4.0) | mean", "bucketing(seed=1, size=2) | nnm | krum(neighbours=2)",
    "centred_clipping(tau=3.0, start='zero', steps=2)",
)  # fmt: skip


@pytest.mark.parametrize("rule", ON_PRODUCTS)
def test_weights_from_products_are_the_rules(rule: str) -> None:
    for offset in (0.0, 20.0):
        x = attacked(11, 50, 2, np.float64) + offset
        _, info = rk.aggregate(x, rule, f=2, return_info=True)
        np.testing.assert_allclose(rk.weights_of(rule, x @ x.T, f=2), info.weights, atol=1e-9)
    x[3] = np.nan
    x[7, 0] = np.inf
    _, info = rk.aggregate(x, rule if rule != "mean" else "ctma(mean)", f=2, return_info=True)
    with np.errstate(invalid="ignore"):
        gram = x @ x.T
    got = rk.weights_of(rule if rule != "mean" else "ctma(mean)", gram, f=2)
    np.testing.assert_allclose(got, info.weights, atol=1e-9)
    assert not got[[3, 7]].any()
    with pytest.raises(rk.NonFiniteError, match=r"2 rows hold NaN or Inf \(rows 3, 7\)"):
        rk.weights_of(rule, gram, f=1)


def test_products_with_weights() -> None:
    x, s = attacked(9, 30, 2, np.float64), np.arange(4.0, 13)
    for rule in ("geometric_median", "medoid", "ctma(geometric_median)", "multi_krum"):
        _, info = rk.aggregate(x, rule, f=2, weights=s, return_info=True)
        np.testing.assert_allclose(rk.weights_of(rule, x @ x.T, f=2, weights=s), info.weights, atol=1e-9)


@pytest.mark.parametrize(
    ("rule", "gram", "message"),
    [
        ("median", np.eye(4), "median: it looks at columns, which inner products do not tell"),
        ("nnm | trimmed_mean", np.eye(4), "it looks at columns"),
        ("ctma(median)", np.eye(4), "it looks at columns"),
        ("bulyan", np.eye(7), "it looks at columns"),
        ("ctma(centre)", np.eye(4), "centre is required, which inner products do not hold"),
        ("krum", np.ones((4, 3)), r"gram must have shape \(n, n\), products of 1 to 65535 rows; got \(4, 3\)"),
        ("krum", np.ones(4), r"got \(4,\)"),
        ("krum", np.zeros((0, 0)), r"got \(0, 0\)"),
        ("krum", -np.eye(4), "gram holds no inner products of rows"),
        ("krum", np.eye(4) + np.triu(np.ones((4, 4)), 1) / 2, "gram holds no inner products of rows"),
        ("krum", np.eye(4) + 3 * (1 - np.eye(4)), "gram holds no inner products of rows"),
        ("median", np.eye(4), r"\(use aggregate, or a rule on distances\)"),
    ],
)
def test_products_that_are_none(rule: str, gram: Array, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rk.weights_of(rule, gram, f=1)
    with pytest.raises(ValueError, match="seed must be None or an integer of at least 0; got -1"):
        rk.weights_of("bucketing | mean", np.eye(5), f=1, seed=-1)
    with pytest.raises(ValueError, match="krum: weights are not supported"):
        rk.weights_of("krum", np.eye(5), f=1, weights=[1, 2, 3, 4, 5])


def test_the_example_runs() -> None:
    assert doctest.testmod(products, raise_on_error=True).attempted == 3


# ---- filters -------------------------------------------------------------------------------------------------------


def test_no_direction_is_chosen_among_equidistant_rows(backend: str) -> None:
    """Their largest eigenvalue is n-1 times there: all rows spread alike, and the first ones stay."""
    x = np.eye(12)
    for rule, kept in (("smea", 9), ("spectral", 9), ("faba", 9)):
        assert np.array_equal(rk.aggregate(x, rule, f=3), x[:kept].mean(axis=0)), rule
    assert np.array_equal(rk.aggregate(x, "caf", f=3), x.mean(axis=0))
    turned = x @ np.linalg.qr(np.random.default_rng(0).standard_normal((12, 12)))[0]
    assert rk.aggregate(turned, "spectral", f=3, return_info=True)[1].kept.tolist() == [True] * 9 + [False] * 3
    assert rk.aggregate(turned, "smea", f=3, return_info=True)[1].order == tuple(range(9))


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_the_subset_of_smea_is_the_best_of_all_batches(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    """By definition, and however many subsets are looked at at a time."""
    monkeypatch.setattr(filters, "BATCH", batch)
    for seed in range(10):
        x = np.random.default_rng(seed).standard_normal((9, 4))
        spreads = {
            kept: np.linalg.norm(x[list(kept)] - x[list(kept)].mean(axis=0), 2)
            for kept in itertools.combinations(range(9), 6)
        }
        want = min(spreads, key=lambda kept: spreads[kept])
        assert np.flatnonzero(rk.aggregate(x, "smea", f=3, return_info=True)[1].kept).tolist() == list(want)


def test_filters_of_copies_and_of_one_row(backend: str) -> None:
    for rule in ("caf", "smea", "spectral", "faba", "aksel"):
        same = np.full((7, 5), 0.1, dtype=np.float32)
        assert np.array_equal(rk.aggregate(same, rule, f=3), same[0])
        assert np.array_equal(rk.aggregate(same[:1], rule, f=0), same[0])
        two = np.vstack([same[:4], same[:3] + 1])  # the majority is one place
        if rule != "spectral":
            assert np.array_equal(rk.aggregate(two, rule, f=3), same[0]), rule


def test_a_row_far_away_has_no_weight_left(backend: str) -> None:
    x = attacked(10, 30, 0, np.float64)
    x[[2, 6]] = [[1e30], [-1e20]]
    for rule in ("caf", "smea", "faba", "aksel"):  # spectral looks once: one far row hides a less far one
        got, info = rk.aggregate(x, rule, f=2, return_info=True)
        assert not info.kept[[2, 6]].any(), rule
        assert not info.weights[[2, 6]].any()
        assert np.abs(got).max() < 5


def test_what_filters_say() -> None:
    x = attacked(11, 20, 3, np.float64)
    _, info = rk.aggregate(x, "caf", f=3, return_info=True)
    assert 1 <= info.iterations <= 11
    assert info.weights[:3].sum() < 0.05
    assert rk.aggregate(x, "caf", f=0, return_info=True)[1].iterations == 0
    _, info = rk.aggregate(x, "spectral(fraction=1.5)", f=3, return_info=True)
    assert info.kept.sum() == 7
    assert info.bound_met is False
    with pytest.raises(ValueError, match=r"fraction \* f must be below n; got fraction=5, f=3 with n=11 rows"):
        rk.aggregate(x, "spectral(fraction=5)", f=3)
    with pytest.raises(ValueError, match="caf: n=257 rows may take too long, at most 256 are taken"):
        rk.aggregate(np.ones((257, 2)), "caf", f=3)
    assert rk.aggregate(np.ones((256, 2)), "caf", f=3).tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"smea: n=40 and f=8 may take too long, with 7.69e\+07 subsets"):
        rk.aggregate(np.ones((40, 2)), "smea", f=8)


def test_subsets_of_very_many_rows_are_refused_in_a_line() -> None:
    for n, f in ((3000, 1400), (20_000, 9999), (5000, 1)):
        with pytest.raises(ValueError, match=rf"smea: n={n} and f={f} may take too long, with [0-9.e+]+ subsets"):
            rk.aggregate(np.ones((n, 1)), "smea", f=f)


def test_no_rows_make_caf_take_more_steps_than_there_are_rows() -> None:
    x = np.random.default_rng(0).standard_normal((60, 400))
    x[:29] *= 2.0 ** np.arange(29)[:, None]
    assert rk.aggregate(x, "caf", f=29, return_info=True)[1].iterations <= 60


# ---- conventions of other packages -----------------------------------------------------------------------------------


def test_weiszfeld_that_ends_with_a_short_step_or_takes_none(backend: str) -> None:
    x = attacked(9, 30, 3, np.float64)
    got, info = rk.geometric_median(x, max_iter=0, return_info=True)
    np.testing.assert_allclose(got, x.mean(axis=0))
    assert info.iterations == 0
    got, info = rk.geometric_median(x, max_iter=0, start="zero", return_info=True)
    assert not got.any()
    assert not info.weights.any()
    for tol in (1.0, 1e-3, 1e-6):
        y, steps = x.mean(axis=0), 0
        while True:
            w = 1 / np.sqrt(((x - y) ** 2).sum(axis=1))
            new, steps = w @ x / w.sum(), steps + 1
            length, y = np.sqrt(((new - y) ** 2).sum()), new
            if length <= tol:
                break
        for options in ({}, {"max_iter": 100}):
            got, info = rk.geometric_median(x, tol=tol, return_info=True, **options)  # type: ignore[call-overload]
            assert info.iterations == steps
            assert info.converged
            np.testing.assert_allclose(got, y, rtol=1e-9)
            far, info = rk.geometric_median(x * 2.0**600, tol=tol * 2.0**600, return_info=True, **options)  # type: ignore[call-overload]
            assert info.iterations == steps
            np.testing.assert_allclose(far * 2.0**-600, got, rtol=1e-9)
        np.testing.assert_allclose(rk.parse_rule(f"geometric_median(tol={tol})").plain(x, 3), y, rtol=1e-9)
    _, info = rk.geometric_median(x, tol=1e-9, max_iter=2, return_info=True)
    assert info.iterations == 2
    assert not info.converged


def test_the_huber_geometric_median_is_nu(backend: str) -> None:
    """Least sum of Huber's losses: squares within nu, distances beyond."""
    x = attacked(9, 6, 2, np.float64)
    got = rk.geometric_median(x, nu=2.5)

    def cost(y: Array) -> float:
        r = np.sqrt(((x - y) ** 2).sum(axis=1))
        return float(np.where(r < 2.5, r**2 / 5, r - 1.25).sum())

    g = np.random.default_rng(0)
    assert all(cost(got) <= cost(got + 1e-3 * g.standard_normal(6)) for _ in range(200))


@pytest.mark.parametrize("count", [1, 3, 9])
def test_nnm_of_any_count(backend: str, dtype: np.dtype[Any], count: int) -> None:
    x = attacked(9, 30, 3, dtype)
    wide = x.astype(np.longdouble)
    mixed = np.stack([wide[slow_nearest(wide, row, count)].mean(axis=0) for row in wide])
    assert_close(rk.aggregate(x, f"nnm(count={count}) | mean"), mixed.mean(axis=0), x)
    assert_close(rk.aggregate(x, f"nnm(count={count}) | median"), slow("median", mixed, 0), x)
    if dtype == np.float64:
        np.testing.assert_allclose(rk.NNM(count).plain(x, 3), mixed.astype(float), rtol=1e-12)


def test_counts_of_nnm_that_are_none() -> None:
    x = attacked(5, 4, 1, np.float64)
    with pytest.raises(ValueError, match="nnm: count must be at most n; got count=6 with n=5 rows"):
        rk.aggregate(x, "nnm(count=6) | mean")
    x[2] = np.nan
    with pytest.raises(rk.NonFiniteError, match="count=5 of n=5 rows are to be averaged, but 1 hold NaN or Inf, one"):
        rk.aggregate(x, "nnm(count=5) | median", f=1)
    assert np.isfinite(rk.aggregate(x, "nnm(count=4) | median", f=1)).all()
    assert rk.NNM(3).kappa_after(1.0, 9, 2) is None
