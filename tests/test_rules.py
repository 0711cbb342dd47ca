"""Every rule against an independent definition, the hand check, the errors, and the known defects of other packages."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support import assert_close, make_rows

import robustkern as rk
from robustkern.backends import registry
from robustkern.backends.cpp import Cpp
from robustkern.rules import cuts, geometry, registered

Array = NDArray[Any]

HAND = np.array([[1.0, 2, 3], [2, 4, 1], [3, 0, 5], [100, -100, 7]])
HAND_RESULTS = {
    "mean": [26.5, -23.5, 4],
    "median(even='low')": [2, 0, 3],
    "median": [2.5, 1, 4],
    "median(even='high')": [3, 2, 5],
    "trimmed_mean": [2.5, 1, 4],
    # Medians 2.5, 1, 4; farthest are 100, -100, and of 1 and 7, which are equally far, the higher one.
    "mean_around_median": [2, 2, 3],
    "phocas": [2, 2, 3],  # trimmed means 2.5, 1, 4
    "ctma(mean)": [2, 2, 3],
    "ctma(median)": [2, 2, 3],
    "ctma(trimmed_mean)": [2, 2, 3],
    "ctma(geometric_median)": [2, 2, 3],
    "nnm | mean": [10 + 1 / 6, -20 / 3, 3.5],
    "rfa": [2.4719457806, 1.1316929687, 3.3343296584],
}

CHAINS = (
    "median(even='low')",
    "rfa",
    "ctma(mean)",
    "ctma(trimmed_mean)",
    "ctma(nnm | median)",
    "ctma(ctma(median))",
    "nnm | mean",
    "nnm | mean_around_median",
    "nnm | ctma(median)",
    "nnm | ctma(geometric_median)",
    "bucketing(seed=0) | median",
    "bucketing(seed=0) | trimmed_mean",
    "bucketing(seed=0) | nnm | krum(neighbours=1)",
    "ctma(bucketing(seed=0) | geometric_median)",
)
#: Rules that need more of n and f than the others, or look at where the origin is, or at the order of the rows.
SPECIAL = ("bulyan", "cge", "monna", "caf", "smea", "spectral", "faba", "aksel")
#: Every other rule that is registered, as its specification says how it is measured; and chains of them.
RULES = tuple(
    dict.fromkeys(
        case
        for rule in registered().values()
        for case in rule.goals
        if case not in ("mean", "weighted median", *SPECIAL)
    )
    | dict.fromkeys(CHAINS)
)


# ---- independent definitions, in longdouble and without n-space --------------------------------------------------


def slow_geometric_median(x: Array, weights: Array | None = None) -> Array:
    """Weiszfeld on the vectors themselves, in longdouble, until nothing moves."""
    s = np.ones(len(x), dtype=np.longdouble) if weights is None else weights.astype(np.longdouble)
    base = np.sort(x, axis=0)[len(x) // 2]
    x = x - base  # exact but for far attackers: a common offset would keep the last steps from getting any shorter
    for row in x:  # Kuhn's condition: the others do not outweigh the rows that are there
        r = np.sqrt(((x - row) ** 2).sum(axis=1))
        here = r <= 1e-16 * r.max()
        pull = ((s / np.where(here, 1, r))[:, None] * (x - row))[~here].sum(axis=0)
        if np.sqrt((pull**2).sum()) <= s[here].sum():
            return np.asarray(row + base)
    y = np.median(x.astype(np.float64), axis=0).astype(np.longdouble) + np.longdouble(1e-3)
    for _ in range(20000):
        r = np.sqrt(((x - y) ** 2).sum(axis=1))
        c = s / r
        new = (c[:, None] * x).sum(axis=0) / c.sum()
        step = np.sqrt(((new - y) ** 2).sum())
        y = new
        if step < 1e-17 * np.median(r):
            break
    return np.asarray(y + base)


def slow_nearest(x: Array, point: Array, count: int) -> list[int]:
    r = ((x - point) ** 2).sum(axis=1)
    return sorted(range(len(x)), key=lambda i: (r[i], i))[:count]


def slow_spreads(x: Array, shares: Array) -> tuple[Any, Array]:
    """Return the largest eigenvalue of the covariance, and squared parts along it, in longdouble by powers of it."""
    mean = shares @ x
    root = np.sqrt(shares)[:, None] * (x - mean)
    if np.abs(root).max() <= 1e-18 * np.abs(x).max():  # copies
        return 0, np.zeros(len(x))
    power = root @ root.T
    for _ in range(60):  # the 2^60th power: all but the largest eigenvalue vanish
        power = power / np.abs(power).max()
        power = power @ power
    direction = root.T @ power[:, np.abs(power).sum(axis=0).argmax()]
    direction = direction / np.sqrt((direction**2).sum())
    parts = ((x - mean) @ direction) ** 2
    return shares @ parts, parts


def slow_filtered(x: Array, f: int) -> Array:
    """CAF on the vectors."""
    weights, best, least = np.ones(len(x), dtype=np.longdouble), x.mean(axis=0), np.inf
    while weights.sum() > len(x) - 2 * f:
        spread, parts = slow_spreads(x, weights / weights.sum())
        if spread < least:
            best, least = weights @ x / weights.sum(), spread
        if not parts.any():
            break
        share = 1 - parts / parts[weights > 0].max()
        weights = weights * np.where(share > 1e-12, share, 0)  # rows mixed of the same are equal but for rounding
    return np.asarray(best)


_answers: dict[Any, Array] = {}  # every backend is asked the same


def slow(rule: str, x: Array, f: int) -> Array:
    """Evaluate a rule by its definition, once."""
    key = rule, x.tobytes(), x.shape, x.dtype, f
    if key not in _answers:
        _answers[key] = _slow(rule, x, f)
    return _answers[key]


def _slow(rule: str, x: Array, f: int) -> Array:
    x = x.astype(np.longdouble)
    n = len(x)
    if rule == "mean":
        return x.mean(axis=0)
    if rule == "median":
        return (np.sort(x, axis=0)[(n - 1) // 2] + np.sort(x, axis=0)[n // 2]) / 2
    if rule == "trimmed_mean":
        return np.sort(x, axis=0)[f : n - f].mean(axis=0)
    if rule == "mean_around_median":
        away = np.abs(x - (np.sort(x, axis=0)[(n - 1) // 2] + np.sort(x, axis=0)[n // 2]) / 2)
        order = np.lexsort((x, away), axis=0)[: n - f]
        return np.take_along_axis(x, order, axis=0).mean(axis=0)
    if rule == "phocas":
        away = np.abs(x - np.sort(x, axis=0)[f : n - f].mean(axis=0))
        order = np.lexsort((x, away), axis=0)[: n - f]
        return np.take_along_axis(x, order, axis=0).mean(axis=0)
    if rule == "geometric_median":
        return slow_geometric_median(x)
    if rule.startswith("bulyan"):
        left, chosen = list(range(n)), []
        while len(chosen) < n - 2 * f:
            scores = [np.sort(((x[left] - x[i]) ** 2).sum(axis=1))[: max(len(left) - f - 2, 1) + 1].sum() for i in left]
            best = sorted(range(len(left)), key=lambda k: (scores[k], k))[: n - 2 * f if "once" in rule else 1]
            chosen += [left[k] for k in best]
            left = [i for i in left if i not in chosen]
        y = x[sorted(chosen)]
        m = len(y)
        away = np.abs(y - (np.sort(y, axis=0)[(m - 1) // 2] + np.sort(y, axis=0)[m // 2]) / 2)
        return np.take_along_axis(y, np.lexsort((y, away), axis=0)[: m - 2 * f], axis=0).mean(axis=0)
    if rule == "medoid":
        sums = [np.sqrt(((x - row) ** 2).sum(axis=1)).sum() for row in x]
        return x[min(range(n), key=lambda i: (sums[i], i))]
    if rule == "cge":
        return x[slow_nearest(x, np.zeros(x.shape[1]), n - f)].mean(axis=0)
    if rule.startswith("monna"):
        return x[slow_nearest(x, x[int(rule[12:-1] or 0)], n - f)].mean(axis=0)
    if rule == "mda":
        squares = np.array([((x - row) ** 2).sum(axis=1) for row in x])
        subsets = itertools.combinations(range(n), n - f)
        return x[list(min(subsets, key=lambda s: squares[np.ix_(s, s)].max()))].mean(axis=0)
    if rule == "caf":
        return slow_filtered(x, f)
    if rule == "smea":
        subsets = [list(rows) for rows in itertools.combinations(range(n), n - f)]
        spreads = [slow_spreads(x[rows], np.full(n - f, 1 / np.longdouble(n - f)))[0] for rows in subsets]
        return x[subsets[int(np.argmin(spreads))]].mean(axis=0)
    if rule == "spectral":
        return x[np.argsort(slow_spreads(x, np.full(n, 1 / np.longdouble(n)))[1], kind="stable")[: n - f]].mean(axis=0)
    if rule == "faba":
        for _ in range(f):
            x = np.delete(x, ((x - x.mean(axis=0)) ** 2).sum(axis=1).argmax(), axis=0)
        return x.mean(axis=0)
    if rule == "aksel":
        middle = (np.sort(x, axis=0)[(n - 1) // 2] + np.sort(x, axis=0)[n // 2]) / 2
        return x[slow_nearest(x, middle, (n + 1) // 2)].mean(axis=0)
    if rule in ("krum", "multi_krum"):
        scores = []
        for i in range(n):
            others = np.sort(np.delete(((x - x[i]) ** 2).sum(axis=1), i))
            scores.append(others[: n - f - 2].sum())
        best = sorted(range(n), key=lambda i: (scores[i], i))
        return x[best[: 1 if rule == "krum" else n - f]].mean(axis=0)
    if rule.startswith("nnm | "):
        mixed = np.stack([x[slow_nearest(x, x[i], n - f)].mean(axis=0) for i in range(n)])
        return slow(rule.removeprefix("nnm | "), mixed, f)
    if rule.startswith("ctma("):
        anchor = slow(rule[5:-1], x, f)
        return x[slow_nearest(x, anchor, n - f)].mean(axis=0)
    raise AssertionError(rule)


@pytest.mark.parametrize(
    "rule",
    [
        "mean",
        "median",
        "trimmed_mean",
        "mean_around_median",
        "phocas",
        "geometric_median",
        "krum",
        "multi_krum",
        "bulyan",
        "bulyan(selection='once')",
        "mda",
        "medoid",
        "cge",
        "monna(pivot=4)",
        "caf",
        "smea",
        "spectral",
        "faba",
        "aksel",
        "ctma(caf)",
        "nnm | caf",
        "nnm | faba",
        "ctma(median)",
        "ctma(bulyan)",
        "ctma(mean_around_median)",
        "ctma(phocas)",
        "ctma(geometric_median)",
        "ctma(nnm | trimmed_mean)",
        "nnm | mean",
        "nnm | median",
        "nnm | geometric_median",
        "nnm | ctma(median)",
        "nnm | ctma(geometric_median)",
        "nnm | krum",
        "nnm | multi_krum",
    ],
)
@pytest.mark.parametrize("kind", ["normal", "offset", "attacked", "far_attack"])
def test_rules_match_their_definitions(backend: str, dtype: np.dtype[Any], rule: str, kind: str) -> None:
    for n, f, d in [(5, 1, 30), (8, 2, 41), (17, 8, 64), (20, 4, 257)]:
        if (rule == "monna(pivot=4)" and f > 4) or (rule == "cge" and kind == "offset" and dtype == np.float64):
            continue  # an attacker for a pivot; norms that differ by the last roundings
        if rule == "smea" and n > 8:
            continue  # thousands of subsets, for the definition
        if kind == "offset":
            x = make_rows("offset", n, d, dtype, seed=n)
        else:
            x = make_rows("normal", n, d, np.dtype(np.float64), seed=n)
            # Far enough to hurt a careless sum, near enough for every dtype.
            far = {"attacked": 3.0, "far_attack": 1e3 if dtype.itemsize == 2 else 1e12, "normal": 0.0}[kind]
            x[:f] += far
            x = x.astype(dtype)
        if ("krum" in rule and n - f - 2 < 1) or ("bulyan" in rule and n < 4 * f + 3) or (rule == "mda" and n == 17):
            continue
        got = rk.aggregate(x, rule, f=f)
        want = slow(rule, x, f)
        honest = x[f:] if kind != "offset" else x
        if rule == "mean" or ("mean" in rule and kind == "far_attack") or rule.startswith("nnm"):
            honest = x  # attackers are averaged in: their size sets the rounding
        assert_close(got, want, honest)


@pytest.mark.parametrize("rule", HAND_RESULTS)
def test_hand_check(backend: str, rule: str) -> None:
    np.testing.assert_allclose(rk.aggregate(HAND, rule, f=1), HAND_RESULTS[rule], rtol=1e-9)
    np.testing.assert_allclose(rk.aggregate(HAND.astype(np.float32), rule, f=1), HAND_RESULTS[rule], rtol=1e-6)


def test_functions_are_the_rules() -> None:
    x = make_rows("normal", 9, 20, np.dtype(np.float32))
    pairs = [
        (rk.mean(x), "mean"),
        (rk.median(x), "median"),
        (rk.median(x, even="high"), "median(even='high')"),
        (rk.trimmed_mean(x, f=2), "trimmed_mean"),
        (rk.mean_around_median(x, f=2), "mean_around_median"),
        (rk.geometric_median(x), "geometric_median"),
        (rk.geometric_median(x, nu=0.1, max_iter=3, start="zero"), "rfa"),
        (rk.krum(x, f=2), "krum"),
        (rk.krum(x, f=2, neighbours=6), "krum(neighbours=6)"),
        (rk.multi_krum(x, f=2, m=3), "multi_krum(m=3)"),
        (rk.ctma(x, f=2), "ctma(geometric_median)"),
        (rk.ctma(x, f=2, anchor=rk.Median()), "ctma(median)"),
        (rk.nnm(x, f=2), "nnm | mean"),
        (rk.nnm(x, f=2, then="ctma(median)"), "nnm | ctma(median)"),
        (rk.bucketing(x, f=2, seed=3, then=rk.Median()), "bucketing(seed=3) | median"),
    ]
    for got, rule in pairs:
        assert np.array_equal(got, rk.aggregate(x, rule, f=2)), rule


# ---- the geometric median ----------------------------------------------------------------------------------------


def cost(x: Array, y: Array) -> float:
    return float(np.sqrt(((x.astype(np.longdouble) - y) ** 2).sum(axis=1)).sum())


def test_geometric_median_at_a_row() -> None:
    """More than half of the rows in one place, or one row in the middle of the others."""
    x = np.random.default_rng(0).standard_normal((7, 5))
    x[:4] = x[0]
    result, info = rk.geometric_median(x, return_info=True)
    np.testing.assert_allclose(result, x[0], rtol=1e-15)
    assert info.converged
    star = np.concatenate([np.zeros((1, 3)), np.eye(3), -np.eye(3)])
    assert np.array_equal(rk.geometric_median(star + 5), np.full(3, 5.0))


@pytest.mark.parametrize("n", [2, 4, 6])
def test_geometric_median_on_a_line_is_the_middle(n: int) -> None:
    """Minimisers are not unique there: the mean of the two middle rows, as for the median."""
    t = np.sort(np.random.default_rng(n).standard_normal(n))
    x = t[:, None] * np.array([1.0, 2, -1])
    got = rk.geometric_median(x)
    np.testing.assert_allclose(got, np.median(t) * np.array([1.0, 2, -1]), atol=1e-12)


def test_geometric_median_of_one_column_is_the_median() -> None:
    for n in range(1, 12):
        x = np.random.default_rng(n).standard_normal((n, 1))
        np.testing.assert_allclose(rk.geometric_median(x), np.median(x, axis=0), atol=1e-12)


def test_geometric_median_close_to_a_row_still_converges() -> None:
    """Kuhn's condition fails by a hair: plain Weiszfeld crawls here."""
    for slack in (1e-2, 1e-4, 1e-6):
        angles = np.array([0.0, 2 * np.pi / 3, 4 * np.pi / 3])
        x = np.concatenate([np.zeros((1, 2)), np.stack([np.cos(angles), np.sin(angles)], axis=1)])
        x = np.concatenate([x, [[3.0, 0.0]], [[2 + slack, 1e-3]]])
        got, info = rk.geometric_median(x, return_info=True)
        assert info.converged
        want = slow_geometric_median(x.astype(np.longdouble))
        assert cost(x, got.astype(np.longdouble)) <= cost(x, want) * (1 + 1e-14)


@pytest.mark.parametrize("apart", [10.0**-k for k in range(4, 30, 2)])
def test_geometric_median_leaves_two_rows_that_are_nearly_one(apart: float) -> None:
    """A step from one to the other is no sign of convergence."""
    for near in ([apart, 0.0], [0.3 * apart, apart]):
        x = np.array([near, [1, 0], [1, 0], [0, 1], [0, 0]])
        got = rk.geometric_median(x).astype(np.longdouble)
        far = np.array([[0, 0], [1, 0], [1, 0], [0, 1], [0, 0.0]])
        assert cost(x, got) <= cost(x, slow_geometric_median(far.astype(np.longdouble))) + 4 * apart * apart + 1e-14


def test_geometric_median_far_attackers_cost_no_digits() -> None:
    x = np.random.default_rng(0).standard_normal((9, 50))
    want = None
    for far in (1e9, 1e12, 1e15):
        y = x.copy()
        y[0] = far
        y[1] = -far
        got = rk.geometric_median(y)
        # Attackers at infinity pull with unit force whatever their distance.
        want = got if want is None else want
        np.testing.assert_allclose(got, want, atol=1e-7)


def test_no_convergence_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from robustkern.rules import least_distances

    monkeypatch.setattr(least_distances, "MAX_STEPS", 1)
    x = np.random.default_rng(0).standard_normal((9, 50))
    with pytest.warns(rk.ConvergenceWarning, match="geometric_median: no convergence after 1 steps"):
        _, info = rk.geometric_median(x, return_info=True)
    assert info.converged is False


def test_truncated_weiszfeld_does_not_warn() -> None:
    x = np.random.default_rng(0).standard_normal((9, 50))
    _, info = rk.geometric_median(x, max_iter=2, return_info=True)
    assert info.iterations == 2
    assert info.converged is False


# ---- weights -----------------------------------------------------------------------------------------------------

WEIGHTED = (
    "mean",
    "median",
    "median(even='low')",
    "trimmed_mean",
    "geometric_median",
    "ctma(median)",
    "ctma(geometric_median)",
    "medoid",
    "centred_clipping(tau=4.0, start='zero')",
)


@pytest.mark.parametrize("rule", WEIGHTED)
def test_equal_weights_are_no_weights(backend: str, rule: str) -> None:
    x = make_rows("normal", 18, 40, np.dtype(np.float32))
    for w in (0.1, 3.0, 1e-300, 1e300):
        assert np.array_equal(rk.aggregate(x, rule, f=5, weights=np.full(18, w)), rk.aggregate(x, rule, f=5))


@pytest.mark.parametrize("rule", WEIGHTED)
def test_integer_weights_are_copies(backend: str, dtype: np.dtype[Any], rule: str) -> None:
    x = make_rows("normal", 6, 40, dtype)
    weights = np.array([1, 2, 3, 1, 4, 1])
    copies = np.repeat(x, weights, axis=0)
    got, want = rk.aggregate(x, rule, delta=1 / 3, weights=weights), rk.aggregate(copies, rule, f=4)
    if "ctma" not in rule:
        assert_close(got, want.astype(np.longdouble), x)
        return
    # A split row: the copies kept of it are the share of its weight.
    _, info = rk.aggregate(x, rule, delta=1 / 3, weights=weights, return_info=True)
    assert_close(got, want.astype(np.longdouble), x)
    np.testing.assert_allclose(info.weights.sum(), 1)


def test_weighted_median_at_exactly_half() -> None:
    x = np.array([[1.0], [2], [3], [4]])
    weights = [4, 1, 2, 1]
    assert rk.median(x, weights=weights)[0] == 1.5
    assert rk.median(x, weights=weights, even="low")[0] == 1
    assert rk.median(x, weights=weights, even="high")[0] == 2
    # 18 equal weights that are no binary fractions: sums in floating point miss the half.
    assert rk.median(np.arange(1.0, 19)[:, None], weights=np.full(18, 1 / 18))[0] == 9.5


def test_weighted_ctma_splits_the_last_row() -> None:
    x = np.array([[0.0], [1.0], [2.0], [100.0]])
    # Three quarters of the weight 7 are 5.25: the row at the median, the first of two equally far, 1.25 of the other.
    result, info = rk.ctma(x, delta=0.25, anchor="median", weights=[2, 2, 2, 1], return_info=True)
    np.testing.assert_allclose(info.weights, np.array([2, 2, 1.25, 0]) / 5.25)
    np.testing.assert_allclose(result, (2 * 1 + 1.25 * 2) / 5.25)
    # Three quarters of the weight 8 are 6: the row at the median, and nothing of a row beyond it.
    result, info = rk.ctma(x, delta=0.25, anchor="median", weights=[1, 1, 6, 0], return_info=True)
    assert result[0] == 2
    assert info.kept.tolist() == [False, False, True, False]


@pytest.mark.parametrize("n", [3, 2047, 2048, 4096, 20_001, 65_535])
def test_cells_of_many_rows_never_overflow(n: int) -> None:
    """Their sum is that of whole numbers of 64 bits, of the heaviest weights that can be, too."""
    for weights in (np.ones(n), np.nextafter(np.full(n, 2.0), 0), np.full(n, 5e-324)):
        cells = geometry.as_cells(weights).tolist()
        assert cells[0] > 0
        assert len(set(cells)) == 1
        assert sum(cells) < 2**62
    x = np.random.default_rng(n).permutation(n).astype(np.float64)[:, None]
    assert rk.aggregate(x, "median", weights=np.ones(n)) == (n - 1) / 2


@pytest.mark.parametrize("rule", ["median", "geometric_median", "rfa"])
def test_without_f_less_than_half_of_the_weight_may_be_bad(backend: str, rule: str) -> None:
    x = np.arange(12.0).reshape(4, 3)
    x[0] = np.nan
    assert np.isfinite(rk.aggregate(x, rule, weights=[2, 1, 1, 0.5])).all()
    for first in (2.5, 3, 5):  # half, and more
        with pytest.raises(rk.NonFiniteError, match=r"of the weight hold NaN or Inf \(rows 0\).*the half of it"):
            rk.aggregate(x, rule, weights=[first, 1, 1, 0.5])
    x[1] = np.inf
    with pytest.raises(rk.NonFiniteError, match=r"of the weight hold NaN or Inf \(rows 0, 1\).*the half of it"):
        rk.aggregate(x, rule, weights=[1, 1, 1, 0.5])  # half only together


def test_a_split_residue_is_dropped() -> None:
    """1e-16 times an infinite row is still infinite."""
    x = np.random.default_rng(0).standard_normal((10, 4))
    x[9] = np.inf
    for seed in range(100):
        weights = np.random.default_rng(seed).random(10)
        weights[9] = weights[:9].sum() / 9 * (1 - 4e-16)  # a tenth of the weight: nine finite rows are the rest
        result, info = rk.ctma(x, delta=0.1, anchor="median", weights=weights, return_info=True)
        assert np.isfinite(result).all()
        assert info.weights[9] == 0


@pytest.mark.parametrize("rule", ["geometric_median", "median", "trimmed_mean", "ctma(geometric_median)"])
def test_many_rows_of_little_weight_cost_no_digits(backend: str, rule: str) -> None:
    """Most rows are hostile and far away, but carry little of the weight."""
    x = make_rows("normal", 12, 40, np.dtype(np.float64))
    weights = np.where(np.arange(12) < 8, 0.05, 1.0)
    near = x.copy()
    near[:8] *= 10
    results = []
    for far in (1e6, 1e12):
        y = near.copy()
        y[:8] = far
        results.append(rk.aggregate(y, rule, delta=0.25, weights=weights))
    np.testing.assert_allclose(results[0], results[1], rtol=0, atol=1e-5)
    honest = x[8:]
    assert (np.abs(results[1] - honest.mean(axis=0)) < 5).all()
    zero = np.where(np.arange(12) < 8, 0.0, np.arange(12.0))
    got = rk.aggregate(y, rule, f=0, weights=zero)
    assert_close(got, rk.aggregate(honest, rule, f=0, weights=zero[8:]).astype(np.longdouble), honest)


ROBUST = ("median", "trimmed_mean", "geometric_median", "ctma(median)", "ctma(geometric_median)")


@pytest.mark.parametrize("rule", ROBUST)
def test_delta_is_the_exact_share_of_the_weight(backend: str, rule: str) -> None:
    """Eight honest rows of weight 1, and an attacker with two fifths of all weight, exactly and but for rounding."""
    x = np.zeros((9, 3))
    x[8] = 1e300
    for scale in (1, 0.1, 1 / 3, 7e-200):
        weights = np.append(np.ones(8), 16 / 3) * scale
        result, info = rk.aggregate(x, rule, delta=0.4, weights=weights, return_info=True)
        assert (result == 0).all()
        assert info.share == 0.4
        assert info.bound_met
    x[8] = np.inf
    assert (rk.aggregate(x, rule, delta=0.4, weights=weights) == 0).all()
    if rule == "median":  # which finds finite values in the middle
        return
    with pytest.raises(rk.NonFiniteError, match=r"1 rows with 0.4 of the weight hold NaN or Inf \(rows 8\).*more than"
                                                r" the 0.39 of it that may be Byzantine; drop them, or raise f or"):  # fmt: skip
        rk.aggregate(x, rule, delta=0.39, weights=weights)


@pytest.mark.parametrize("rule", ROBUST)
def test_f_with_weights_is_any_f_rows(backend: str, rule: str) -> None:
    """One row with a third of the weight counts as one row, and so it is cut whole."""
    x = np.zeros((9, 3))
    x[8] = 1e6
    weights = [1] * 8 + [4]
    result, info = rk.aggregate(x, rule, f=1, weights=weights, return_info=True)
    assert (result == 0).all()
    assert info.share == pytest.approx(1 / 3)
    assert info.bound_met
    x[8] = np.nan
    assert (rk.aggregate(x, rule, f=1, weights=weights) == 0).all()
    # Rows of little weight are more rows than f, but no more of the weight.
    x[6:] = np.nan
    assert (rk.aggregate(x, rule, f=1, weights=[1] * 6 + [0.1] * 3) == 0).all()
    with pytest.raises(ValueError, match=r"any f=2 rows may be Byzantine, and the heaviest \(rows 8, 0\) hold 0.588 of "
                                         r"the weight, which is not below half \(lower f, lower or cap the weights"):  # fmt: skip
        rk.aggregate(x, rule, f=2, weights=[1] * 8 + [9])


def test_no_share_cuts_nothing() -> None:
    """Also of weights that are rounded, where any other share rounds up."""
    weights = np.random.default_rng(0).random(30)
    assert geometry.cells_of_share(geometry.as_cells(weights), 0.0) == 0
    assert geometry.cells_of_share(geometry.as_cells(weights), 1e-3) > 0
    x = np.random.default_rng(1).standard_normal((30, 5))
    x[0] = 1e30
    for options in ({"f": 0}, {"delta": 0.0}):
        trimmed = rk.trimmed_mean(x, weights=weights, **options)  # type: ignore[arg-type]
        np.testing.assert_allclose(trimmed, rk.mean(x, weights=weights), rtol=4e-15)


def test_what_info_says_of_the_share() -> None:
    x = make_rows("normal", 9, 4, np.dtype(np.float64))
    assert rk.median(x, return_info=True)[1].share is None
    assert rk.median(x, weights=range(1, 10), return_info=True)[1].share is None
    assert rk.median(x, weights=range(1, 10), return_info=True)[1].bound_met is None
    assert rk.median(x, f=3, return_info=True)[1].share == 3 / 9
    assert rk.median(x, delta=0.4, return_info=True)[1].share == 3 / 9  # of equal rows no part can be cut
    assert rk.mean(x, delta=0.01, weights=range(1, 10), return_info=True)[1].bound_met is False
    assert rk.mean(x, delta=0.0, weights=range(1, 10), return_info=True)[1].bound_met is True


@settings(max_examples=200, deadline=None)
@given(
    weights=st.lists(st.floats(1e-3, 1.0), min_size=3, max_size=30),
    delta=st.floats(0.01, 0.49),
    whole=st.booleans(),
)
def test_rows_of_the_share_never_reach_the_result(weights: list[float], delta: float, whole: bool) -> None:
    """However weights and share are rounded: attackers hold no more than delta, and are far away."""
    s = np.rint(np.array(weights) * 100) + 1 if whole else np.array(weights)
    bad = np.cumsum(s) <= delta * s.sum()
    x = np.where(bad, 1e30, np.linspace(-1, 1, len(s)))[:, None]
    for rule in ROBUST:
        assert abs(rk.aggregate(x, rule, delta=delta, weights=s)[0]) <= 1, rule


@pytest.mark.parametrize(
    "rule", ["krum", "mda", "mean_around_median", "nnm | median", "bucketing | median", "ctma(nnm | median)"]
)
def test_rules_without_a_weighted_form_say_so(rule: str) -> None:
    x = make_rows("normal", 9, 4, np.dtype(np.float64))
    with pytest.raises(ValueError, match="weights are not supported"):
        rk.aggregate(x, rule, f=2, weights=np.arange(1, 10))


# ---- hostile rows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_rows_never_reach_the_result(backend: str, dtype: np.dtype[Any], rule: str, bad: float) -> None:
    n, f = 11, 3
    x = make_rows("normal", n, 30, dtype)
    clean = x[f:]
    x[:f, ::7] = bad
    result, info = rk.aggregate(x, rule, f=f, return_info=True)
    assert np.isfinite(result.astype(float)).all()
    assert set(range(f)) <= set(info.nonfinite_rows)
    if info.weights is not None and "bucketing" not in rule:
        assert (info.weights[:f] == 0).all()
    low, high = clean.astype(float).min(axis=0), clean.astype(float).max(axis=0)
    if "rfa" not in rule:
        assert ((result.astype(float) >= low - 1e-2) & (result.astype(float) <= high + 1e-2)).all()
    # Where the bad rows stand does not matter.
    if "bucketing" not in rule:
        moved = rk.aggregate(np.roll(x, 4, axis=0), rule, f=f)
        np.testing.assert_allclose(
            moved.astype(float), result.astype(float), rtol=1e-2 if dtype.itemsize == 2 else 1e-5
        )


@pytest.mark.parametrize("rule", RULES)
def test_too_many_bad_rows_are_named(backend: str, rule: str) -> None:
    x = make_rows("normal", 11, 30, np.dtype(np.float32))
    x[[1, 4, 5, 6, 7, 9], 3] = np.nan
    with pytest.raises(
        rk.NonFiniteError, match=r"rows hold NaN or Inf \(rows 1, 4, 5, 6, 7, 9\).*drop them, or raise f"
    ) as error:
        rk.aggregate(x, rule, f=3)
    assert error.value.rows == (1, 4, 5, 6, 7, 9)


def test_the_mean_lets_nan_through_and_says_so() -> None:
    x = make_rows("normal", 5, 10, np.dtype(np.float32))
    x[2, 3] = np.nan
    x[4, 4] = np.inf
    result, info = rk.mean(x, return_info=True)
    assert np.isnan(result[3])
    assert result[4] == np.inf
    assert np.isfinite(np.delete(result, [3, 4])).all()
    assert info.nonfinite_rows == (2, 4)


def test_nnm_leaves_a_bad_row_alone() -> None:
    """No other row mixes it in, and it mixes in no other: it must not spoil more rows than itself."""
    from robustkern.inputs.trees import adapt
    from robustkern.rules.geometry import Given

    x = make_rows("normal", 7, 5, np.dtype(np.float32))
    x[3, 2] = np.nan
    view = rk.View(Given(adapt(x)[0], registry.load_backend("reference"), 7, 2, None), 7, 2)
    mixture = rk.NNM().mixing(view)
    mix = mixture.matrix
    assert np.array_equal(mix[3], np.eye(7)[3])
    assert not mix[[0, 1, 2, 4, 5, 6], 3].any()
    np.testing.assert_allclose(mix.sum(axis=1), 1)
    assert np.flatnonzero(~view.mixed(mixture, "nnm").geometry().finite).tolist() == [3]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("magnitude", [3e38, 1e-40])
def test_any_finite_float32(backend: str, rule: str, magnitude: float) -> None:
    base = make_rows("normal", 11, 30, np.dtype(np.float64))
    base /= np.abs(base).max()
    x = (base * magnitude).astype(np.float32)
    got = rk.aggregate(x, rule, f=3)
    if rule == "rfa":  # its nu is a length: not scale-equivariant
        assert np.isfinite(got).all()
        return
    want = rk.aggregate(x.astype(np.float64), rule, f=3, backend="reference")
    assert_close(got, want.astype(np.longdouble), x)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("magnitude", [1e300, 1e-300, 1e-200])
def test_any_finite_float64(backend: str, rule: str, magnitude: float) -> None:
    """Squares overflow or vanish: the pass is done again, scaled by a power of two."""
    power = 2.0 ** round(math.log2(magnitude))
    base = make_rows("normal", 11, 30, np.dtype(np.float64))
    got = rk.aggregate(base * power, rule, f=3)
    if rule == "rfa":
        assert np.isfinite(got).all()
        return
    want = rk.aggregate(base, rule, f=3)
    np.testing.assert_allclose(got / power, want, rtol=1e-9, atol=1e-12)


def test_huge_attackers_among_ordinary_float64_rows_are_out_of_reach(backend: str) -> None:
    x = make_rows("normal", 11, 30, np.dtype(np.float64))
    want = rk.aggregate(x[3:], "mean")
    x[:3] = 1e300
    for rule in ("ctma(median)", "ctma(geometric_median)", "multi_krum"):
        result, info = rk.aggregate(x, rule, f=3, return_info=True)
        np.testing.assert_allclose(result, want, rtol=1e-12)
        assert info.kept.tolist() == [False] * 3 + [True] * 8
        assert np.isinf(info.sq_distances[:3]).all()


@pytest.mark.parametrize("far", [6e153, 1.2e154, -1.2e154, 7e153, 1e150, 1e200, 1.7e308])
@pytest.mark.parametrize("rule", RULES)
def test_float64_attackers_whose_squares_just_overflow(rule: str, far: float) -> None:
    """Squares that are finite numbers, but sums of two of them are not."""
    honest = make_rows("normal", 9, 4, np.dtype(np.float64))
    for attack in ((far, far), (far, -far)):
        x = np.vstack([np.full((1, 4), attack[0]), np.full((1, 4), attack[1]), honest])
        result = rk.aggregate(x, rule, f=2)
        assert np.isfinite(result).all()
        if "bucketing" not in rule and rule not in (
            "rfa",
            "nnm | mean",
        ):  # which average attackers in, whatever their size
            assert (np.abs(result) <= np.abs(honest).max() + 1e-9).all()


@pytest.mark.parametrize("neighbours", [3, 4, 5, 6])
def test_krum_with_more_neighbours_than_finite_rows(neighbours: int) -> None:
    x = np.array([[np.nan], [np.nan], [0.0], [1], [2], [3], [4]])
    assert rk.krum(x, f=2, neighbours=neighbours)[0] in (1, 2, 3)
    assert np.isfinite(rk.multi_krum(x, f=2, neighbours=neighbours)).all()


@pytest.mark.parametrize("rule", ["ctma(median)", "geometric_median", "multi_krum", "nnm | mean"])
def test_tiny_rows_do_not_push_honest_rows_out_of_reach(rule: str) -> None:
    """Some honest rows are zero, f hostile ones almost: the middle one must not set the scale for all."""
    x = np.array([[0.0], [0], [1e-200], [1e-200], [1e-200], [1], [2], [3], [4]])
    assert 0 <= rk.aggregate(x, rule, f=3)[0] <= 4


@pytest.mark.parametrize(
    "rule",
    ["geometric_median", "mean_around_median", "ctma(median)", "krum", "nnm | mean", "mean", "bucketing | median"],
)
@pytest.mark.parametrize(
    "value", [1e146, 1e150, 1e300, float(np.finfo(np.float64).max), -float(np.finfo(np.float64).max)]
)
@pytest.mark.parametrize("n", [7, 11, 12])
def test_equal_rows_of_any_magnitude(rule: str, value: float, n: int) -> None:
    got = rk.aggregate(np.full((n, 3), value), rule, f=2)
    np.testing.assert_allclose(got, value, rtol=1e-15)


@pytest.mark.parametrize("rule", ["geometric_median", "ctma(geometric_median)", "krum", "nnm | median", "medoid"])
def test_half_of_the_rows_at_the_centre_do_not_set_the_scale(rule: str) -> None:
    """Rows whose squares overflow are no attackers where nobody else is nearer than they, or NaN is somebody's."""
    x = np.array([[1.0], [1.0], [3.0], [3.0]])
    assert rk.aggregate(x * 1e160, rule, f=1) == pytest.approx(rk.aggregate(x, rule, f=1) * 1e160, rel=1e-12)
    spoilt = np.array([[1.0], [2], [np.nan], [4], [7], [-np.inf], [5]])
    assert rk.aggregate(spoilt * 1e160, rule, f=2) == pytest.approx(rk.aggregate(spoilt, rule, f=2) * 1e160, rel=1e-9)
    with pytest.raises(rk.NonFiniteError, match=r"2 rows hold NaN or Inf .* or are 1e150 spreads away"):
        rk.aggregate(np.array([[0.0], [0], [1e-30], [1e160], [1e160], [1e-30]]), rule, f=1)


def test_one_row_of_the_largest_number() -> None:
    x = np.full((1, 2), np.finfo(np.float64).max)
    assert np.array_equal(rk.geometric_median(x), x[0])


def test_the_scale_follows_the_weights() -> None:
    rng = np.random.default_rng(0)
    x = np.vstack([rng.normal(size=(4, 3)), 1e200 * rng.normal(size=(5, 3))])
    got, info = rk.geometric_median(x, weights=[100] * 4 + [1] * 5, return_info=True)
    want = rk.geometric_median(x[:4])
    assert (info.weights[4:] == 0).all()
    np.testing.assert_allclose(got, want, atol=0.1)


def test_weighted_ctma_at_the_border_of_what_is_tolerated() -> None:
    for n, scale in ((3000, 0.7), (90, 1 / 3)):
        weights = np.tile([1.0, 2, 3], n // 3) * scale
        x = np.random.default_rng(0).standard_normal((n, 2))
        x[1::3] = np.nan  # a third of the weight, all that is tolerated
        result, info = rk.ctma(x, delta=1 / 3, anchor="median", weights=weights, return_info=True)
        assert np.isfinite(result).all()
        assert not info.weights[1::3].any()


def test_huge_nu_is_a_mean() -> None:
    x = make_rows("normal", 5, 3, np.dtype(np.float64)) * 1e-200
    np.testing.assert_allclose(rk.geometric_median(x, nu=1e200), x.mean(axis=0), rtol=1e-9)


# ---- exact cuts --------------------------------------------------------------------------------------------------


def test_weighted_ctma_decides_nothing_that_is_too_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cut falls among rows whose distances differ by less than float32 products tell."""
    rng = np.random.default_rng(0)
    n, d = 20, 2000
    x = (0.3 * rng.standard_normal((n, d))).astype(np.float32)
    x[12:] = (rng.standard_normal(d) * rng.choice([-1, 1], (8, d))).astype(np.float32)
    weights = np.ones(n)
    weights[3] = 2
    got = []
    for from_values in (1 << 60, 0):
        monkeypatch.setattr(geometry, "SINGLE_VALUES", from_values)
        for _ in range(4 if not got else 0):  # bring the rows to the same distance
            y = rk.geometric_median(x, weights=weights).astype(np.float64)
            squares = ((x[12:] - y) ** 2).sum(axis=1)
            x[12:] = (y + (x[12:] - y) * np.sqrt(squares.mean() / squares)[:, None]).astype(np.float32)
        got.append(rk.aggregate(x, "ctma(geometric_median)", f=5, weights=weights, return_info=True)[1].weights)
    assert np.array_equal(got[0] > 0, got[1] > 0)


@pytest.mark.parametrize("rule", ["rfa", "geometric_median(max_iter=2, start='zero')", "geometric_median(nu=1e-9)"])
def test_weiszfeld_steps_are_taken_on_float64_products(monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    """A row close to the origin, where the steps start: its first distance decides, and is all cancellation."""
    x = (10 * (1 + 0.3 * np.random.default_rng(0).standard_normal((20, 2000)))).astype(np.float32)
    x[0] = 0.2 / np.sqrt(2000)
    results = []
    for from_values in (0, 1 << 60):
        monkeypatch.setattr(geometry, "SINGLE_VALUES", from_values)
        results.append(rk.aggregate(x, rule))
    assert np.array_equal(results[0], results[1])


def rows_around_a_geometric_median(gap: float, f: int) -> tuple[Array, Array]:
    """Return 40 rows, and their squared distances to it; five of them, of which three are kept, are `gap` apart.

    Along its ray from the geometric median a row moves without moving that: any distances can be had, but for what
    float32 rounds, some 1e-9 of them.
    """
    rng = np.random.default_rng(int(1e9 * gap))
    n, d = 40, 1500
    x = rng.standard_normal((n, d))
    z = long_geometric_median(x)
    radii = np.linspace(0.9, 1.1, n)
    radii[n - f - 3 : n - f + 2] = radii[n - f - 3] * (1 + gap * np.arange(5))
    away = (x - z) / np.linalg.norm((x - z).astype(np.float64), axis=1, keepdims=True)
    rows = (z + np.sqrt(d) * rng.permutation(radii)[:, None] * away).astype(np.float32)
    return rows, ((rows - long_geometric_median(rows)) ** 2).sum(axis=1)


def long_geometric_median(x: Array, steps: int = 30) -> Any:
    """Weiszfeld in 80 bits; among normal rows of many columns a step leaves a thirtieth."""
    z = x.astype(np.longdouble).mean(axis=0)
    for _ in range(steps):
        pull = 1 / np.sqrt(((x - z) ** 2).sum(axis=1))
        z = pull @ x / pull.sum()
    return z


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("gap", "kind", "averages", "lines", "restarts"),
    [
        (1e-4, "", 0, 0, 0),  # float32 products tell
        (3e-6, "", 1, 0, 0),  # the distances from the average tell, moved to the median
        (1e-7, "", 1, 0, 0),
        (0.0, "", 1, 0, 0),
        (1e-7, "far", 1, 0, 1),  # it seems to be far away: only float64 products can tell
        (3e-6, "no averages", 0, 1, 0),  # what is measured in float64 from five rows tells
        (3e-6, "useless lines", 0, 1, 1),  # or does not
        (1e-7, "no averages", 0, 0, 1),
        (0.0, "no averages", 0, 0, 1),
    ],
)
def test_rows_as_far_from_a_geometric_median_are_told_apart(
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    gap: float,
    kind: str,
    averages: int,
    lines: int,
    restarts: int,
    weighted: bool,
) -> None:
    made: list[str] = []

    def counted(name: str, change: Callable[[Any], Any] = lambda found: found) -> None:
        once = getattr(geometry.Given, name)
        monkeypatch.setattr(geometry.Given, name, lambda *given: made.append(name) or change(once(*given)))

    monkeypatch.setattr(geometry, "SINGLE_VALUES", 0)
    noise = 1 + 1e-3 * np.random.default_rng(0).standard_normal(40)
    counted("average_pass", (lambda found: found * noise) if kind == "far" else lambda found: found)
    counted("lines_pass", np.ones_like if kind == "useless lines" else lambda found: found)
    counted("start_again")
    if kind in ("no averages", "useless lines"):  # as on GPUs
        monkeypatch.delattr(Cpp, "sq_distances_to_average")
    f = 12
    rows, exact = rows_around_a_geometric_median(gap, f)
    n = len(rows)
    options: dict[str, Any] = {"delta": f / n, "weights": np.ones(n)} if weighted else {"f": f}
    _, info = rk.aggregate(rows, "ctma(geometric_median)", backend=backend, return_info=True, **options)
    wanted = (averages, lines, restarts) if backend == "cpp" else (0, 0, 0)  # others take float64 products at once
    assert (made.count("average_pass"), made.count("lines_pass"), made.count("start_again")) == wanted
    assert np.array_equal(np.flatnonzero(info.kept), np.sort(exact.argsort()[: n - f]))


@pytest.mark.parametrize("offset", [0, 1000])
def test_rows_as_far_from_an_average_are_told_apart(monkeypatch: pytest.MonkeyPatch, offset: int) -> None:
    """Whole numbers of rows, and copies among those that are as far: these count as equal."""
    rng = np.random.default_rng(0)
    n, f, d = 30, 8, 1200
    x = rng.standard_normal((n, d)).astype(np.float32)
    x[12:] *= 40
    made: list[str] = []
    once = geometry.Given.average_pass
    monkeypatch.setattr(geometry.Given, "average_pass", lambda *given: made.append("") or once(*given))
    monkeypatch.setattr(geometry, "SINGLE_VALUES", 0)
    anchor = rk.MultiKrum(m=12)
    centre = x[:12].astype(np.longdouble).mean(axis=0)
    away = x[12:] - centre
    away *= 30 * np.sqrt(d) / np.sqrt((away**2).sum(axis=1, keepdims=True))
    x[12:] = (centre + away).astype(np.float32)
    x[20] = x[15]
    x += np.float32(offset)
    _, info = rk.ctma(x, f=f, anchor=anchor, backend="cpp", return_info=True)
    exact = ((x - x[:12].astype(np.longdouble).mean(axis=0)) ** 2).sum(axis=1)
    assert len(made) == 1
    assert np.array_equal(np.flatnonzero(info.kept), np.sort(exact.argsort(kind="stable")[: n - f]))


KINDS_OF_CUT = [
    "ordinary",
    "attackers give the centre",
    "attackers give the centre, from afar",
    "squares overflow",
    "tiny rows",
    "copies",
    "clusters",
    "nearly a tie",
    "beside a row",
]


@pytest.mark.parametrize("kind", KINDS_OF_CUT)
@pytest.mark.parametrize("rule", ["geometric_median", "krum", "multi_krum", "ctma(geometric_median)", "nnm | median"])
def test_float32_products_decide_nothing_that_is_too_close(
    monkeypatch: pytest.MonkeyPatch, rule: str, kind: str
) -> None:
    """The same rows are kept as on float64 products, and the same point is found."""
    rng = np.random.default_rng(0)
    n, f = 40, 12
    x = rng.standard_normal((n, 300)).astype(np.float32)
    if kind == "attackers give the centre":
        x[::3] = 1e6
        x[::3] += rng.standard_normal((14, 300)).astype(np.float32)
        f = 14
    elif kind == "attackers give the centre, from afar":
        x[::3] *= np.float32(1e30)
        f = 14
    elif kind == "squares overflow":
        x[5:17] *= np.float32(1e30)
        x[8, :10] = 3e38
    elif kind == "tiny rows":
        x[5:17] *= np.float32(1e-30)
    elif kind == "copies":
        x[20:32] = x[3]
    elif kind == "clusters":
        x = x * np.float32(1e-4) + (np.arange(n) % 2)[:, None].astype(np.float32)
    elif kind == "nearly a tie":
        x[1:] = x[0] * (1 + 1e-6 * rng.permutation(n - 1))[:, None]
        x[: n // 2] *= -1
    elif kind == "beside a row":
        directions = rng.standard_normal((n // 2, 300))
        x[: n // 2], x[n // 2 : 2 * (n // 2)] = directions, -directions
        x[0] = 1e-3
    got = []
    for from_values in (0, 1 << 60):
        monkeypatch.setattr(geometry, "SINGLE_VALUES", from_values)
        result, info = rk.aggregate(x, rule, f=f, return_info=True)
        got.append((result.astype(np.float64), info))
    if info.kept is not None:
        assert np.array_equal(got[0][1].kept, info.kept)
    spread = np.sqrt(np.median(((x - got[1][0]) ** 2).sum(axis=1)))
    assert np.sqrt(((got[0][0] - got[1][0]) ** 2).sum()) <= 1e-6 * spread


@pytest.mark.parametrize("values", [(1e19, 1e20), (1e30,), (3e38,), (-3.4e38, 1e38), (1e20, 3e38)])
@pytest.mark.parametrize("rule", ["geometric_median", "nnm | mean", "ctma(mean)", "krum"])
def test_rows_as_large_as_float32_goes_are_rows(monkeypatch: pytest.MonkeyPatch, rule: str, values: Any) -> None:
    """Squares of theirs overflow float32, in many columns too, and they count as the rows that they are."""
    x = np.random.default_rng(1).standard_normal((11, 3000)).astype(np.float32)
    for row, value in enumerate(values):
        x[row] = value
    x[len(values), :100] = 1e25
    got = []
    for from_values in (0, 1 << 60):
        monkeypatch.setattr(geometry, "SINGLE_VALUES", from_values)
        got.append(rk.aggregate(x, rule, f=4, backend="cpp", return_info=True))
    spread = np.linalg.norm(np.median(x.astype(np.float64), axis=0) - x[-1])
    one, other = (result.astype(np.float64) for result, _ in got)
    assert np.linalg.norm(one - other) <= 1e-6 * max(spread, np.linalg.norm(other))
    assert got[0][1].nonfinite_rows == got[1][1].nonfinite_rows == ()
    assert got[1][1].kept is None or np.array_equal(got[0][1].kept, got[1][1].kept)


@pytest.mark.parametrize("rule", ["ctma(median)", "ctma(mean)", "ctma(geometric_median)"])
def test_equal_distances_go_to_the_lowest_index(backend: str, dtype: np.dtype[Any], rule: str) -> None:
    """Rows mirrored at the anchor: exactly n-f are kept, the first of the equal ones."""
    v = np.random.default_rng(0).integers(1, 5, 40).astype(dtype)
    x = np.stack([v, -v, 0 * v, v, -v, 0 * v])
    for shift in range(6):
        rows = np.roll(x, shift, axis=0)
        _, info = rk.aggregate(rows, rule, f=2, return_info=True)
        zeros = {i for i in range(6) if not rows[i].astype(float).any()}
        others = [i for i in range(6) if i not in zeros]
        assert set(np.flatnonzero(info.kept)) == zeros | set(others[:2])


def test_ties_that_float64_sums_would_break_are_measured_again(backend: str) -> None:
    """Rows with the same entries in another order are equally far; rounding must not choose among them."""
    rng = np.random.default_rng(0)
    v = (rng.standard_normal(3000) * np.exp(3 * rng.standard_normal(3000))).astype(np.float32)
    for seed in range(5):
        order = np.random.default_rng(seed)
        far = [order.permutation(v) for _ in range(8)]
        x = np.stack([*far, *([np.zeros_like(v)] * 9)])
        _, info = rk.ctma(x, f=4, anchor="median", return_info=True)
        assert np.flatnonzero(info.kept).tolist() == [0, 1, 2, 3, *range(8, 17)]


def test_near_ties_go_to_the_truly_nearer_row(backend: str) -> None:
    """Two distances that differ by less than a float64 sum can tell."""
    d = 20000
    rng = np.random.default_rng(3)
    v = rng.standard_normal(d)
    nearer = v.copy()
    k = int(np.argmin(np.abs(v)))
    nearer[k] *= 0.5  # changes the squared distance by about 1e-13 of it
    for first, second, kept in ((v, nearer, 1), (nearer, v, 0)):
        x = np.stack([rng.permutation(first), rng.permutation(second), np.zeros(d), np.zeros(d), np.zeros(d)])
        _, info = rk.ctma(x, f=1, anchor="median", return_info=True)
        assert bool(info.kept[kept])
        assert not info.kept[1 - kept]


@pytest.mark.parametrize("rule", ["krum", "multi_krum", "nnm | mean"])
def test_copies_are_chosen_by_index(backend: str, rule: str) -> None:
    x = make_rows("normal", 12, 30, np.dtype(np.float32))
    x[[2, 5, 7, 9]] = x[2]
    got = rk.aggregate(x, rule, f=3)
    assert_close(got, slow(rule, x, 3), x)


@pytest.mark.parametrize(
    "rule", ["krum(neighbours=2)", "multi_krum(m=5, neighbours=2)", "nnm(count=3) | mean", "medoid"]
)
@pytest.mark.parametrize("away", [1e6, 1e9])
def test_rows_far_from_all_others_are_told_apart(backend: str, rule: str, away: float) -> None:
    """Whose distances to each other are nothing beside the rounding of their own lengths; and clusters within them."""
    for dtype in (np.float32, np.float64):
        x = make_rows("normal", 31, 40, np.dtype(np.float64), seed=3)
        x[1:12] += 1e4 if dtype == np.float32 else away
        x[1:5] = x[1] + (1e-2 if dtype == np.float32 else 1e-4) * x[20:24]
        x = x.astype(dtype)
        assert_close(rk.aggregate(x, rule, f=14), rk.parse_rule(rule).plain(x.astype(np.longdouble), 14), x)


@pytest.mark.parametrize("rule", ["krum", "multi_krum", "nnm | median"])
@pytest.mark.parametrize("noise", [1e-30, 1e-15, 1e-13])
def test_near_copies_are_equal(backend: str, rule: str, noise: float) -> None:
    """More of them than are measured one by one: whichever is taken, it is what all of them are."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((41, 60))
    rows[:19] = noise * rng.standard_normal((19, 60))
    for dtype in (np.float32, np.float64):
        x = rows.astype(dtype)
        assert_close(rk.aggregate(x, rule, f=19), slow(rule, x, 19), x)


@given(
    st.lists(st.integers(0, 40), min_size=2, max_size=12), st.integers(1, 11), st.sampled_from([0.0, 1.0, 3.0, 100.0])
)
def test_a_cut_is_as_many_as_were_asked_for(ulps: list[int], count: int, error: float) -> None:
    """Values a few roundings apart, on both sides of what counts as a tie."""
    values = 1 + np.array(ulps) * 2.0**-52
    count = min(count, len(values))
    errors = np.full(len(values), error * 2.0**-53)
    for again in (None, lambda rows: values[rows]):
        chosen = cuts.smallest(values, errors, count, again)
        assert len(set(chosen.tolist())) == count
        assert values[chosen].max() - np.sort(values)[count - 1] <= 2 * (error + 8) * 2.0**-52


# ---- conditions and errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("f", "n"), [(3, 6), (1, 2), (5, 5)])
def test_f_too_large(f: int, n: int) -> None:
    with pytest.raises(ValueError, match=rf"trimmed_mean: 2\*f must be below n, .*got f={f} with n={n} rows"):
        rk.trimmed_mean(np.ones((n, 3)), f=f)


@pytest.mark.parametrize(
    "rule",
    ["trimmed_mean", "mean_around_median", "krum", "multi_krum", "nnm | mean", "bucketing | mean", "ctma(median)"],
)
def test_f_missing(rule: str) -> None:
    with pytest.raises(ValueError, match=r"f is required.*pass f= or delta="):
        rk.aggregate(np.ones((5, 3)), rule)


def test_f_of_a_bucketed_view_is_checked() -> None:
    with pytest.raises(ValueError, match=r"trimmed_mean: 2\*f must be below n; got f=2 with n=4 rows"):
        rk.aggregate(np.ones((12, 3)), "bucketing(size=3) | trimmed_mean", f=2)


@pytest.mark.parametrize(("delta", "f"), [(0, 0), (0.29, 29), (0.2, 20), (0.4999999999999, 49), (0.3, 30)])
def test_delta_stands_for_f(delta: float, f: int) -> None:
    x = make_rows("normal", 100, 3, np.dtype(np.float64))
    _, info = rk.trimmed_mean(x, delta=delta, return_info=True)
    assert info.f == f


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"f": -1}, ValueError, "f at least 0; got f=-1"),
        ({"f": 1.0}, TypeError, "f must be an integer; got float"),
        ({"f": True}, TypeError, "f must be an integer; got bool"),
        ({"f": 1, "delta": 0.1}, ValueError, "pass f or delta, not both"),
        ({"delta": 0.5}, ValueError, "delta must satisfy 0 <= delta < 0.5; got 0.5"),
        ({"delta": math.nan}, ValueError, "delta must satisfy"),
        ({"delta": "a"}, TypeError, "delta must be a number; got str"),
        ({"f": 1, "weights": [1, 2]}, ValueError, r"weights must have shape \(5,\).*got shape \(2,\)"),
        ({"f": 1, "weights": [1, 1, -1, 1, 1]}, ValueError, "not negative; got -1.0 for row 2"),
        ({"f": 1, "weights": [1, 1, 1, np.nan, 1]}, ValueError, "finite and not negative; got nan for row 3"),
        ({"f": 1, "weights": [0, 0, 0, 0, 0]}, ValueError, "weights are all 0"),
        ({"f": 1, "weights": [10**400, 1, 1, 1, 1]}, TypeError, "weights must be numbers"),
        ({"f": 1, "weights": ["a"] * 5}, TypeError, "weights must be numbers"),
        ({"f": 1, "backend": "gpu"}, ValueError, "backend must be one of auto, cpp, numba, reference, cuda; got 'gpu'"),
        ({"f": 1, "backend": 3}, TypeError, "backend must be a string; got int"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rk.aggregate(np.ones((5, 3)), "median", **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rk.Median("middle"), "median: even must be 'mean', 'low' or 'high'; got 'middle'"),
        (lambda: rk.GeometricMedian(nu=-1), "geometric_median: nu must be a finite number of at least 0; got -1"),
        (lambda: rk.GeometricMedian(nu=math.inf), "nu must be a finite number"),
        (lambda: rk.GeometricMedian(nu=10**400), "nu must be a finite number"),
        (lambda: rk.Median(np.array(["mean", "low"])), "even must be 'mean', 'low' or 'high'"),
        (lambda: rk.nnm(np.ones((4, 2)), f=1, then=rk.NNM()), "nnm only mixes the rows"),
        (lambda: rk.GeometricMedian(max_iter=-1), "max_iter must be None or an integer of at least 0; got -1"),
        (lambda: rk.GeometricMedian(tol=-1.0), "tol must be a finite number of at least 0; got -1.0"),
        (lambda: rk.NNM(0), "nnm: count must be None or an integer of at least 1; got 0"),
        (lambda: rk.Spectral(0), "spectral: fraction must be a positive number; got 0"),
        (lambda: rk.Spectral(True), "spectral: fraction must be a positive number; got True"),
        (lambda: rk.GeometricMedian(start="median"), "start must be 'mean' or 'zero'; got 'median'"),
        (lambda: rk.Krum(-1), "krum: neighbours must be None or an integer of at least 0; got -1"),
        (lambda: rk.Krum(squared=1), "krum: squared must be True or False; got 1"),
        (lambda: rk.MultiKrum(0), "multi_krum: m must be None or an integer of at least 1; got 0"),
        (lambda: rk.Bucketing(0), "bucketing: size must be None or an integer of at least 1; got 0"),
        (lambda: rk.Bucketing(seed=-1), "bucketing: seed must be None or an integer of at least 0; got -1"),
        (lambda: rk.Bucketing(seed=True), "bucketing: seed must be None or an integer of at least 0; got True"),
        (lambda: rk.Bucketing(seed=1.5), "bucketing: seed must be None or an integer of at least 0; got 1.5"),
        (lambda: rk.CTMA(rk.NNM()), "nnm only mixes the rows; end it with a rule that combines them"),
        (lambda: rk.Median() | rk.Krum(), "median leaves one row, so it must be the last rule of a chain"),
        (lambda: rk.krum(np.ones((4, 2)), f=1, neighbours=4), "krum: neighbours must be between 0 and n-1.*got 4"),
        (lambda: rk.krum(np.ones((3, 2)), f=1), "krum: neighbours must be between 0 and n-1.*got 0 with n=3 rows, f=1"),
        (lambda: rk.multi_krum(np.ones((5, 2)), f=1, m=6), "multi_krum: m must be at most n; got m=6 with n=5 rows"),
        (
            lambda: rk.multi_krum(np.array([[np.nan], [1], [2], [3], [4]]), f=1, m=5),
            r"multi_krum: m=5 of n=5 rows are to be averaged, but 1 hold NaN or Inf, one of them row 0 \(lower m, or drop",
        ),
        (
            lambda: rk.multi_krum(np.arange(5.0)[:, None], f=1, m=1, weights=[1, 0, 1, 1, 1]),
            r"multi_krum: the rows that are kept have no weight \(raise m, or their weights\)",
        ),
        (lambda: rk.Bulyan("twice"), "bulyan: selection must be 'iterative' or 'once'; got 'twice'"),
        (
            lambda: rk.aggregate(np.ones((6, 2)), "bulyan", f=1),
            r"bulyan: 4\*f \+ 3 must be at most n; got f=1 with n=6",
        ),
        (lambda: rk.MoNNA(-1), "monna: pivot must be a row, an integer of at least 0, or 'centre'; got -1"),
        (lambda: rk.MoNNA("center"), "monna: pivot must be a row.*got 'center'"),  # type: ignore[arg-type]
        (
            lambda: rk.aggregate(np.ones((5, 2)), "monna(pivot=5)", f=1),
            r"monna: pivot=5 is no row of n=5 \(pass one below",
        ),
        (
            lambda: rk.aggregate(np.array([[np.nan], [1], [2]]), "monna", f=1),
            r"monna: row 0, which is the pivot, holds NaN or Inf \(choose a row to trust\)",
        ),
        (lambda: rk.CentredClipping(0), "centred_clipping: tau must be a positive finite number; got 0"),
        (lambda: rk.CentredClipping(math.inf), "centred_clipping: tau must be a positive finite number; got inf"),
        (lambda: rk.CentredClipping(1, 0), "centred_clipping: steps must be an integer of at least 1; got 0"),
        (lambda: rk.CentredClipping(1, start="mean"), "centred_clipping: start must be 'centre' or 'zero'; got 'mean'"),
        (
            lambda: rk.aggregate(np.ones((60, 2)), "mda", f=29),
            r"mda: n=60 and f=29 may take too long, as the search for the subset grows with 1.47\^f \(lower f, or take",
        ),
    ],
)
def test_bad_parameters(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("rule", "n", "f", "met"),
    [
        ("mean", 5, 0, True),
        ("mean", 5, 1, False),
        ("median", 5, 2, True),
        ("median", 5, None, None),
        ("krum", 7, 2, True),
        ("krum", 6, 2, False),
        ("ctma(krum)", 6, 2, False),
        ("ctma(median)", 6, 2, True),
        ("bucketing(size=3) | median", 12, 2, False),
        ("bucketing | median", 20, 2, True),
        ("nnm | krum", 7, 2, True),
    ],
)
def test_bound_met(rule: str, n: int, f: int | None, met: bool | None) -> None:
    _, info = rk.aggregate(make_rows("normal", n, 3, np.dtype(np.float64)), rule, f=f, return_info=True)
    assert info.bound_met is met


def test_bucketing_default_leaves_more_than_2f_buckets() -> None:
    for n, f in itertools.product(range(3, 60), range(1, 12)):
        if 2 * f < n:
            assert rk.Bucketing().rows_after(n, f) > 2 * f


# ---- defects of other packages (each one was found in a released library) ------------------------------------------


def test_defect_1_krum_with_large_common_weights(backend: str) -> None:
    """An uncentred float32 Gram is 605 % off here and picks the attackers."""
    rng = np.random.default_rng(0)
    n, f, d = 10, 3, 200_000
    weights = rng.normal(0, 0.05, d).astype(np.float32)
    x = weights + rng.normal(0, 3e-5, (n, d)).astype(np.float32)
    x[:f] = weights + rng.normal(0, 6e-5, (f, d)).astype(np.float32)
    for rule in ("krum", "multi_krum", "ctma(geometric_median)"):
        _, info = rk.aggregate(x, rule, f=f, return_info=True)
        assert not info.kept[:f].any()
        g = rk.kernels.gram(x)
        exact = ((x[4].astype(np.float64) - x[7]) ** 2).sum()
        assert abs(g[4, 4] + g[7, 7] - 2 * g[4, 7] - exact) <= 1e-12 * exact


def test_defect_2_nan_clients_win() -> None:
    """See also `test_bad_rows_never_reach_the_result`: argmin over NaN returned the NaN client."""
    x = make_rows("normal", 7, 5, np.dtype(np.float32))
    for row in range(7):
        y = x.copy()
        y[row] = np.nan
        for rule in ("krum", "median", "geometric_median", "ctma(median)"):
            assert np.isfinite(rk.aggregate(y, rule, f=1)).all()


def test_defect_3_trimmed_mean_is_no_sum_minus_extremes(backend: str) -> None:
    x = make_rows("normal", 9, 100, np.dtype(np.float32))
    want = rk.trimmed_mean(x, f=1)
    x[np.argmax(x, axis=0), np.arange(100)] = 1e8
    assert np.array_equal(rk.trimmed_mean(x, f=1), want)
    x[np.argmax(x, axis=0), np.arange(100)] = np.inf
    assert np.array_equal(rk.trimmed_mean(x, f=1), want)


def test_defect_4_no_zero_times_infinity(backend: str) -> None:
    x = make_rows("normal", 7, 20, np.dtype(np.float32))
    x[3] = np.inf
    assert np.isfinite(rk.ctma(x, f=1, anchor="median")).all()


def test_defect_5_the_default_geometric_median_is_shift_equivariant(backend: str) -> None:
    x = make_rows("normal", 9, 50, np.dtype(np.float64))
    np.testing.assert_allclose(rk.geometric_median(x + 100) - 100, rk.geometric_median(x), atol=1e-12)
    assert np.abs(rk.aggregate(x + 100, "rfa", f=1) - 100 - rk.aggregate(x, "rfa", f=1)).max() > 1e-3


def test_defect_6_dtype_is_kept_and_inputs_are_not_written(dtype: np.dtype[Any]) -> None:
    x = make_rows("normal", 9, 50, dtype)
    before = x.tobytes()
    x.flags.writeable = False
    for rule in RULES:
        assert rk.aggregate(x, rule, f=2).dtype == dtype
    assert x.tobytes() == before


def test_defect_7_more_than_96_rows(backend: str) -> None:
    for n in (96, 97, 200):
        x = make_rows("normal", n, 20, np.dtype(np.float32))
        assert np.array_equal(rk.median(x), np.median(x, axis=0))


def test_defect_8_one_nan_does_not_end_the_round(backend: str) -> None:
    """The other half, a GIL held for the whole call: `test_registry.py::test_the_gil_is_released`."""
    x = make_rows("normal", 9, 20, np.dtype(np.float32))
    x[4, 7] = np.nan
    for rule in RULES:
        result, info = rk.aggregate(x, rule, f=2, return_info=True)
        assert np.isfinite(result).all()
        assert info.nonfinite_rows == (4,)


def test_defect_9_extra_dimensions_are_part_of_a_row(backend: str) -> None:
    x = make_rows("normal", 7, 6, np.dtype(np.float32))
    for rule in RULES:
        if "krum" in rule and "nnm" in rule:
            continue
        want = rk.aggregate(x, rule, f=1)
        got = rk.aggregate(x.reshape(7, 2, 3), rule, f=1)
        assert got.shape == (2, 3)
        assert np.array_equal(got.reshape(-1), want)


def test_defect_10_sums_keep_their_digits(backend: str) -> None:
    """Many rows, and many columns: a float32 running sum of ones stops at 2^24."""
    x = np.ones((2000, 3), dtype=np.float32) * np.float32(0.1)
    assert np.array_equal(rk.mean(x), x[0])
    tall = np.full((3, 1 << 22), 0.1, dtype=np.float32)
    tall[2] = 0.2
    _, distances = rk.kernels.select_columns(tall, (1, 2), distances=True)
    exact = (float(np.float32(0.2)) - float(np.float32(0.1))) ** 2 * tall.shape[1]
    np.testing.assert_allclose(distances, [0, 0, exact], rtol=1e-12)
