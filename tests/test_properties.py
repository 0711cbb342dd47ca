"""Properties of the rules on inputs that hypothesis makes up, in every backend."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from support import IMPLEMENTATIONS, one_row
from test_kernels import oracle_select
from test_rules import RULES

import robustkern as rk
from robustkern.contract.primitives import Window
from robustkern.contract.rows import DTYPES, Rows

Array = NDArray[Any]
BACKENDS = [name for name in ("cpp", "numba", "reference") if any(k.split("-")[0] == name for k in IMPLEMENTATIONS)]


@st.composite
def rows_and_f(draw: st.DrawFn, max_value: float = 1e6) -> tuple[Array, int]:
    """Finite float64 rows, many of their values equal, and an f they bear."""
    n = draw(st.integers(3, 12))
    d = draw(st.integers(1, 40))
    values = st.one_of(st.sampled_from([0.0, 1.0, -1.0, 2.5]), st.floats(-max_value, max_value, width=32))
    x = draw(hnp.arrays(np.float64, (n, d), elements=values))
    return x, draw(st.integers(0, (n - 1) // 2))


def spread(x: Array) -> float:
    return float(np.abs(x - np.median(x, axis=0)).max()) + 1e-300


def unambiguous(rule: str, x: Array, f: int) -> bool:
    """Tell whether a rule that picks rows has no near ties to pick among: then it must not depend on rounding."""
    base = rk.aggregate(x, rule, f=f)
    for seed in range(4):
        noise = np.random.default_rng(seed).standard_normal(x.shape) * 1e-9 * spread(x)
        for moved in (x + noise, x - noise, (x + noise)[::-1]):
            if np.abs(rk.aggregate(moved, rule, f=f) - base).max() >= 1e-7 * spread(x):
                return False
    return True


def applicable(rule: str, n: int, f: int) -> bool:
    return not ("krum" in rule and n - f - 2 < 1) and not ("bucketing" in rule and n < 2 * f + 1)


@given(rows_and_f(), st.sampled_from(RULES), st.sampled_from(BACKENDS), st.randoms(use_true_random=False))
def test_permutation(case: tuple[Array, int], rule: str, backend: str, random: Any) -> None:
    x, f = case
    assume(applicable(rule, len(x), f) and "bucketing" not in rule and unambiguous(rule, x, f))
    order = list(range(len(x)))
    random.shuffle(order)
    got, want = (rk.aggregate(y, rule, f=f, backend=backend) for y in (x[order], x))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * spread(x))


@given(rows_and_f(), st.sampled_from(RULES), st.sampled_from(BACKENDS), st.floats(-1e3, 1e3))
def test_translation(case: tuple[Array, int], rule: str, backend: str, shift: float) -> None:
    x, f = case
    assume(applicable(rule, len(x), f) and rule != "rfa" and unambiguous(rule, x, f))
    moved = x + shift
    assume(unambiguous(rule, moved, f))
    got = rk.aggregate(moved, rule, f=f, backend=backend) - shift
    np.testing.assert_allclose(
        got, rk.aggregate(x, rule, f=f, backend=backend), rtol=1e-14, atol=1e-6 * spread(x) + 1e-9 * abs(shift)
    )


@given(rows_and_f(), st.sampled_from(RULES), st.sampled_from(BACKENDS), st.integers(-60, 60))
def test_scaling_by_powers_of_two_is_exact(case: tuple[Array, int], rule: str, backend: str, power: int) -> None:
    x, f = case
    assume(applicable(rule, len(x), f) and rule != "rfa")
    assume(not ((x != 0) & (np.abs(x) < 1e-250)).any())
    factor = 2.0**power
    got, want = (rk.aggregate(y, rule, f=f, backend=backend) for y in (x * factor, x))
    np.testing.assert_allclose(got / factor, want, rtol=1e-10, atol=1e-12 * spread(x))


@given(rows_and_f(), st.sampled_from(RULES), st.sampled_from(BACKENDS))
def test_results_lie_between_the_rows(case: tuple[Array, int], rule: str, backend: str) -> None:
    x, f = case
    assume(applicable(rule, len(x), f) and rule != "rfa")
    got = rk.aggregate(x, rule, f=f, backend=backend)
    slack = 1e-12 * np.abs(x).max(axis=0)
    assert (got >= x.min(axis=0) - slack).all()
    assert (got <= x.max(axis=0) + slack).all()


@given(rows_and_f(), st.sampled_from(RULES), st.sampled_from(BACKENDS))
def test_equal_rows_come_back(case: tuple[Array, int], rule: str, backend: str) -> None:
    x, f = case
    assume(applicable(rule, len(x), f))
    same = np.broadcast_to(x[0], x.shape)
    got = rk.aggregate(same, rule, f=f, backend=backend)
    if rule != "rfa":
        np.testing.assert_allclose(got, x[0], rtol=1e-14)


@given(rows_and_f(), st.sampled_from(["trimmed_mean", "ctma(median)", "ctma(geometric_median)", "nnm | mean"]))
def test_nothing_to_tolerate_is_the_mean(case: tuple[Array, int], rule: str) -> None:
    x, _ = case
    np.testing.assert_allclose(rk.aggregate(x, rule, f=0), x.mean(axis=0), rtol=1e-9, atol=1e-11 * spread(x))


@given(
    rows_and_f(),
    st.sampled_from(["mean", "median", "geometric_median", "krum(neighbours=1)", "nnm | trimmed_mean", "ctma(median)"]),
    st.sampled_from(BACKENDS),
    st.data(),
)
def test_ctma_inequality(case: tuple[Array, int], anchor: str, backend: str, data: st.DataObject) -> None:
    """For any anchor and any h = n-f rows, sample by sample (Dahan & Levy 2024)."""
    x, f = case
    n, h = len(x), len(x) - f
    honest = sorted(data.draw(st.permutations(range(n)))[:h])
    result = rk.aggregate(x, f"ctma({anchor})", f=f, backend=backend)
    point = rk.aggregate(x, anchor, f=f, backend=backend)
    mean = x[honest].mean(axis=0)
    delta = f / n
    variance = ((x[honest] - mean) ** 2).sum() / h
    right = 4 * delta / (1 - delta) * (variance + ((point - mean) ** 2).sum())
    assert ((result - mean) ** 2).sum() <= right * (1 + 1e-9) + 1e-18 * (1 + np.abs(x).max() ** 2)


@given(rows_and_f(), st.sampled_from(["mean", "median", "trimmed_mean", "geometric_median"]), st.data())
def test_weighted_is_replicated(case: tuple[Array, int], rule: str, data: st.DataObject) -> None:
    x, _ = case
    weights = np.array(data.draw(st.lists(st.integers(0, 4), min_size=len(x), max_size=len(x))))
    assume(weights.any())
    copies = np.repeat(x, weights, axis=0)
    # trimmed mean: the same share of the weight is cut only where it is a whole number of copies.
    got = rk.aggregate(x, rule, f=0, weights=weights)
    want = rk.aggregate(copies, rule, f=0)
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9 * spread(x))


@given(rows_and_f(), st.sampled_from(BACKENDS))
def test_geometric_median_beats_every_other_point(case: tuple[Array, int], backend: str) -> None:
    x, _ = case
    got = rk.geometric_median(x, backend=backend)

    def cost(y: Array) -> float:
        return math.fsum(np.sqrt(((x - y) ** 2).sum(axis=1)))

    rng = np.random.default_rng(0)
    others = [x.mean(axis=0), np.median(x, axis=0), *x]
    others += [got + rng.standard_normal(x.shape[1]) * spread(x) * 10.0**-k for k in range(8)]
    assert cost(got) <= min(map(cost, others)) * (1 + 1e-9) + 1e-12


@st.composite
def any_rows(draw: st.DrawFn) -> Array:
    """Whatever bits of whatever dtype: NaN, Inf and subnormals included."""
    dtype = draw(st.sampled_from(DTYPES))
    n, d = draw(st.integers(1, 40)), draw(st.integers(0, 70))
    bits = np.dtype(f"u{dtype.itemsize}")
    interesting = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0]
    pool = np.array(interesting).astype(dtype).view(bits).tolist()
    words = st.one_of(st.sampled_from(pool), st.integers(0, 2 ** (8 * dtype.itemsize) - 1))
    return np.asarray(draw(hnp.arrays(bits, (n, d), elements=words, fill=words)).view(dtype))


@example(np.array([[np.inf], [-np.inf]]), "cpp-v4", 0, 2)
@given(any_rows(), st.sampled_from(list(IMPLEMENTATIONS)), st.integers(0, 39), st.integers(1, 40))
def test_selection_of_any_bits(x: Array, name: str, lo: int, size: int) -> None:
    """Selected values are exact for any bits; longer windows are finite where the oracle is."""
    assume(name in IMPLEMENTATIONS)
    n, d = x.shape
    lo = lo % n
    window = Window(lo, min(lo + size, n))
    got, out = one_row(d, x.dtype)
    with np.errstate(all="ignore"):
        found = IMPLEMENTATIONS[name].select_columns(Rows.of(x), window, out=out)
        want = oracle_select(x, window)
        assert np.array_equal(found.nonfinite, ~np.isfinite(x.astype(np.float64)).all(axis=1))
        assert np.array_equal(np.isnan(got.astype(np.float64)), np.isnan(want.astype(np.float64)))
        if window.hi - window.lo == 1:
            assert np.array_equal(got.astype(np.float64), want.astype(np.float64), equal_nan=True)


@given(any_rows(), st.sampled_from(RULES), st.sampled_from(BACKENDS), st.integers(0, 19))
def test_any_bits_give_a_finite_result_or_an_error(x: Array, rule: str, backend: str, f: int) -> None:
    n = len(x)
    f = min(f, (n - 1) // 2)
    assume(applicable(rule, n, f))
    with np.errstate(invalid="ignore"):  # signalling NaN, which only the library has to bear
        wide = x.astype(np.float64)
    finite = np.isfinite(wide).all(axis=1)
    try:
        result = rk.aggregate(x, rule, f=f, backend=backend)
    except rk.NonFiniteError as error:
        allowed = (~finite).any() or x.dtype == np.float64
        if not (allowed and error.rows):
            raise
        return
    shared = [(wide == sign).sum(axis=0) >= n - f for sign in (np.inf, -np.inf)]  # which are no evidence
    expected = np.where(shared[0], np.inf, np.where(shared[1], -np.inf, 0.0))
    finite_result = np.isfinite(result.astype(np.float64))
    assert (finite_result | (result.astype(np.float64) == expected)).all()
    assert result.dtype == x.dtype


@pytest.mark.parametrize("rule", RULES)
def test_rules_survive_their_own_text(rule: str) -> None:
    parsed = rk.parse_rule(rule)
    assert rk.parse_rule(str(parsed)) == parsed
    assert str(rk.parse_rule(str(parsed))) == str(parsed)
