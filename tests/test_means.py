"""Means and nearest values against exact arithmetic: whole numbers and fractions, rounded once."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from support import TOLERANCE, one_row

import robustkern as rk
from robustkern.contract.primitives import Kernels, Window
from robustkern.contract.rows import Rows

Array = NDArray[Any]

#: Both sides of every threshold: rows taken 4 at a time, networks, merges, counting (on GPUs from 65 on), tables.
SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 13, 32, 33, 64, 65, 100, 128, 129, 255, 256, 257, 1100]
#: Tails of vectors and of tiles.
COLUMNS = {1: 1, 2: 2051, 5: 1029, 9: 17, 33: 65}


def rounded(exact: Fraction, dtype: np.dtype[Any]) -> float:
    """Return the number of a dtype that is nearest to a fraction, the even one in a tie."""
    if exact == 0:
        return 0.0
    info = ml_dtypes.finfo(dtype)
    exponent = exact.numerator.bit_length() - exact.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > abs(exact)
    unit = max(exponent, int(info.minexp)) - int(info.nmant)
    value = Fraction(round(exact / Fraction(2) ** unit)) * Fraction(2) ** unit
    return float(value) if abs(value) <= Fraction(float(info.max)) else math.copysign(math.inf, value)


def nearest_of(column: list[Fraction], lo: int, hi: int, nearest: int) -> list[Fraction]:
    """Return the values nearest to the middle of a window of a sorted column: by distance, the lower side first."""
    middle = (column[lo] + column[hi - 1]) / 2
    return sorted(column, key=lambda x: (abs(x - middle), x > middle))[:nearest]


_answers: dict[Any, list[Fraction]] = {}  # every implementation is asked the same


def exact_means(x: Array, weights: Any, divisor: float, taken: tuple[int, ...] = ()) -> list[Fraction]:
    """Return weighted means of columns; or means of a window of their sorted values, or of so many nearest to it."""
    key = x.dtype, x.shape, hash(x.tobytes()), tuple(weights), divisor, taken
    if key not in _answers:
        columns = [[Fraction(value) for value in column] for column in x.T.astype(np.float64).tolist()]
        if len(taken) == 2:
            columns = [sorted(column)[taken[0] : taken[1]] for column in columns]
        elif taken:
            columns = [nearest_of(sorted(column), *taken) for column in columns]
        if all(weight == 1 for weight in weights):
            sums = [sum(column, Fraction(0)) for column in columns]
        else:
            exact = [Fraction(weight) for weight in weights]
            sums = [sum(map(Fraction.__mul__, exact, column), Fraction(0)) for column in columns]
        _answers[key] = [value / Fraction(divisor) for value in sums]
    return _answers[key]


def assert_means(got: Array, x: Array, weights: Any, divisor: float, taken: tuple[int, ...] = ()) -> None:
    """Compare with exact means, rounded once."""
    want = [rounded(value, got.dtype) for value in exact_means(x, weights, divisor, taken)]
    assert got.astype(np.float64).tolist() == want


def whole_numbers(n: int, d: int, dtype: np.dtype[Any], seed: int = 0) -> Array:
    """All that a dtype has none missing between, and in some columns larger ones beside small ones."""
    rng = np.random.default_rng(seed)
    info = ml_dtypes.finfo(dtype)
    most = 2.0 ** (int(info.nmant) + 1)
    x = np.rint(rng.uniform(-1, 1, (n, d)) * most * np.exp2(-rng.integers(0, int(info.nmant), (n, d))))
    large = min(most * 2.0**12, float(info.max) / 2) if dtype.itemsize < 8 else most
    x[:, ::3] = np.where(rng.random((n, len(x[0, ::3]))) < 0.5, large, x[:, ::3])
    return x.astype(dtype)


def hard_rows(d: int, dtype: np.dtype[Any]) -> dict[str, Array]:
    """Rows that plain sums of n equal ones do not give back."""
    info = ml_dtypes.finfo(dtype)
    normal = np.random.default_rng(d).standard_normal(d)
    return {
        "normal": normal.astype(dtype),
        "large": (float(info.max) * np.where(normal > 0, 1, -1)).astype(dtype),
        "near the largest": (float(info.max) * (1 - np.abs(normal) / 8)).astype(dtype),
        "subnormal": (normal * 8 * float(info.smallest_subnormal)).astype(dtype),
        "whole": np.rint(normal * 100).astype(dtype),
    }


# ---- weighted sums -----------------------------------------------------------------------------------------------


def test_equal_rows_are_their_mean(kernels: Kernels, dtype: np.dtype[Any]) -> None:
    for n in SIZES:
        d = COLUMNS.get(n, 19)
        for kind, row in hard_rows(d, dtype).items():
            x = np.tile(row, (n, 1))
            for times in (1.0, 3.0):
                got, out = one_row(d, dtype)
                kernels.weighted_row_sum(Rows.of(x), np.full((1, n), times), out, divisors=np.array([n * times]))
                assert np.array_equal(got, row), (n, kind)


def test_whole_numbers_have_the_nearest_mean(kernels: Kernels, dtype: np.dtype[Any]) -> None:
    rng = np.random.default_rng(0)
    for n in SIZES:
        x = whole_numbers(n, 23, dtype, seed=n)
        weights = np.stack([np.ones(n), rng.integers(0, 6, n).astype(np.float64)])
        weights[1, 0] += 1
        out = np.full((2, 23), 77, dtype=dtype)
        kernels.weighted_row_sum(Rows.of(x), weights, Rows.of(out), divisors=weights.sum(axis=1))
        for got, w in zip(out, weights, strict=True):
            assert_means(got, x, w.tolist(), float(w.sum()))


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_errors_do_not_grow_with_the_number_of_rows(kernels: Kernels, offset: float) -> None:
    """Of float64: sums of random rows with random weights are rounded once, as far as anybody can see."""
    for n in SIZES:
        rng = np.random.default_rng(n)
        x = offset + rng.standard_normal((n, 11)) * (1e-7 if offset else 1)
        weights = np.stack([np.ones(n), np.exp(rng.standard_normal(n) * 3), rng.standard_normal(n)])
        divisors = np.array([n, 3.7, 1.0])
        out = np.empty((3, 11))
        kernels.weighted_row_sum(Rows.of(x), weights, Rows.of(out), divisors=divisors)
        for got, w, divisor in zip(out, weights, divisors, strict=True):
            assert_means(got, x, w.tolist(), float(divisor))


def test_averages_of_numbers_are_numbers(kernels: Kernels, dtype: np.dtype[Any]) -> None:
    """Sums overflow, on both sides and back; weights of any size; an average whose weights are rounded up is none above."""
    largest = float(ml_dtypes.finfo(dtype).max)
    rng = np.random.default_rng(0)
    for n in (2, 3, 7, 33, 130):
        x = (rng.choice([-1, -0.75, 0.5, 1], (n, 21)) * largest).astype(dtype)
        for size in (1.0, 2.0**900, 2.0**-900) if dtype == np.float64 else (1.0,):
            weights = rng.integers(1, 9, n) * size
            got, out = one_row(21, dtype)
            kernels.weighted_row_sum(Rows.of(x), weights[None], out, divisors=weights[None].sum(axis=1))
            for value, want in zip(got, exact_means(x, weights.tolist(), float(weights.sum())), strict=True):
                # Where little is left of large numbers, doubled ones have so many digits.
                digits = abs(want) > Fraction(largest) / 2**40
                assert float(value) == rounded(want, dtype) or not digits, (n, size)
        same = np.full((n, 21), largest).astype(dtype)
        weights = rng.random(n)
        weights /= weights.sum()
        for sign in (1, -1):
            for up in (1, 1 + 2**-50):
                got, out = one_row(21, dtype)
                kernels.weighted_row_sum(Rows.of(same * dtype.type(sign)), weights[None] * up, out)
                assert np.isfinite(got.astype(np.float64)).all()
    got, out = one_row(21, dtype)
    kernels.weighted_row_sum(Rows.of(same), np.ones((1, n)), out)  # no average
    assert np.isposinf(got.astype(np.float64)).all()


def test_special_values_stay_in_their_column(kernels: Kernels, dtype: np.dtype[Any]) -> None:
    """Also beside columns whose sums overflow, and in rows of weight 0; the others have the same bits as without."""
    rng = np.random.default_rng(0)
    n, d = 9, 70
    largest = float(ml_dtypes.finfo(dtype).max)
    x = rng.standard_normal((n, d)).astype(dtype)
    spoilt = x.copy()
    spoilt[3, 5], spoilt[1, 20], spoilt[2, 20], spoilt[6, 50], spoilt[8, 69] = np.nan, np.inf, -np.inf, -np.inf, np.inf
    spoilt[:, 30] = largest
    spoilt[4] = np.nan
    weights = rng.integers(1, 4, (2, n)).astype(np.float64)
    weights[:, 4] = 0
    divisors = weights.sum(axis=1)
    touched = [5, 20, 30, 50, 69]
    rest = [j for j in range(d) if j not in touched]

    def results(rows: Array) -> Array:
        sums = np.empty((2, d), dtype=dtype)
        kernels.weighted_row_sum(Rows.of(rows), weights, Rows.of(sums), divisors=divisors)
        mixed = np.empty((2, d), dtype=dtype)
        for r in range(2):
            kernels.select_columns(
                Rows.of(rows), Window(r, r + 1), mix=weights, mix_divisors=divisors, out=Rows.of(mixed[r : r + 1])
            )
        return np.concatenate([sums, mixed])

    with np.errstate(invalid="ignore"):
        got, want = results(spoilt), results(x)
    assert got[:, rest].tobytes() == want[:, rest].tobytes()
    got = got.astype(np.float64)
    assert np.isnan(got[:, [5, 20]]).all()
    assert (got[:, 30] == largest).all()
    assert np.isneginf(got[:, 50]).all()
    assert np.isposinf(got[:, 69]).all()


def test_public_form_takes_a_divisor(dtype: np.dtype[Any]) -> None:
    x = whole_numbers(7, 30, dtype)
    assert_means(rk.kernels.weighted_row_sum(x, np.ones(7), divisor=7), x, [1] * 7, 7)
    for bad in (0, -1.0, math.inf, math.nan, True, "2", None):
        with pytest.raises(ValueError, match="weighted_row_sum: divisor must be a finite number above 0; got"):
            rk.kernels.weighted_row_sum(x, np.ones(7), divisor=bad)  # type: ignore[arg-type]


# ---- mixed rows --------------------------------------------------------------------------------------------------


def mixtures(n: int, k: int, rng: np.random.Generator) -> Array:
    """Weights 0 and more: of most rows, of few, of rows that no other mixture takes, of none but one."""
    mix = (rng.random((k, n)) < 0.8).astype(np.float64) * rng.integers(1, 4, (k, n))
    for r in range(0, k, 3):
        mix[r] = np.arange(n) // max(n // 4, 1) == r % 4
    mix[np.arange(k), rng.integers(0, n, k)] = 1
    return mix


def test_mixtures_of_equal_rows_are_that_row(kernels: Kernels, dtype: np.dtype[Any]) -> None:
    for n in (1, 3, 4, 9, 33, 70, 1100):
        d, k = 37, min(n, 7)
        mix = mixtures(n, k, np.random.default_rng(n))
        divisors = mix.sum(axis=1)
        for kind, row in hard_rows(d, dtype).items():
            x = np.tile(row, (n, 1))
            got, out = one_row(d, dtype)
            for measure, measure_divisors in ((mix, divisors), (mix.copy(), divisors.copy())):
                found = kernels.select_columns(
                    Rows.of(x),
                    Window(0, k),
                    mix=mix,
                    mix_divisors=divisors,
                    measure=measure,
                    measure_divisors=measure_divisors,
                    distances=True,
                    out=out,
                )
                assert np.array_equal(got, row), (n, kind)
                assert found.sq_distances is not None
                assert (found.sq_distances == 0).all(), (n, kind)


def test_mixtures_of_whole_numbers_are_the_nearest(kernels: Kernels) -> None:
    """Where float64 holds the sums of differences."""
    for dtype, most in ((np.dtype(np.float32), 2.0**24), (np.dtype(np.float64), 2.0**40), (np.dtype(np.float64), 9.0)):
        for n in (1, 3, 8, 40, 300):
            rng = np.random.default_rng(n)
            x = np.rint(rng.uniform(-most, most, (n, 13)) + (2.0**52 if most == 2.0**40 else 0)).astype(dtype)
            mix = mixtures(n, min(n, 6), rng)
            divisors = mix.sum(axis=1)
            for r in range(len(mix)):
                got, out = one_row(13, dtype)
                # Of equal mixtures every rank is that mixture.
                repeated, by = np.repeat(mix[r : r + 1], 5, axis=0), np.repeat(divisors[r], 5)
                kernels.select_columns(Rows.of(x), Window(2, 3), mix=repeated, mix_divisors=by, out=out)
                assert_means(got, x, mix[r].tolist(), float(divisors[r]))


def test_mixtures_of_the_largest_numbers_are_numbers(kernels: Kernels, dtype: np.dtype[Any]) -> None:
    largest = float(ml_dtypes.finfo(dtype).max)
    for n in (3, 8, 40):
        rng = np.random.default_rng(n)
        x = (rng.choice([-1, -0.75, 0.5, 1], (n, 21)) * largest).astype(dtype)
        mix = mixtures(n, 3, rng)
        divisors = mix.sum(axis=1)
        for r in range(3):
            got, out = one_row(21, dtype)
            by = divisors[r : r + 1]
            kernels.select_columns(Rows.of(x), Window(0, 1), mix=mix[r : r + 1], mix_divisors=by, out=out)
            exact = exact_means(x, mix[r].tolist(), float(by[0]))
            single = np.dtype(np.float64) if dtype == np.float64 else np.dtype(np.float32)
            want = np.array([rounded(value, single) for value in exact]).astype(single).astype(dtype)
            assert np.array_equal(got, want)


# ---- windows -----------------------------------------------------------------------------------------------------


def windows(n: int) -> list[Window]:
    """Return windows of one, two, few, most and all ranks."""
    found = {
        (0, n),
        (n // 4, n - n // 4),
        ((n - 1) // 2, n // 2 + 1),
        (n // 2, min(n, n // 2 + 3)),
        (max(n - 33, 0), n),
    }
    return [Window(lo, hi) for lo, hi in sorted(found)]


def test_windows_of_equal_values_are_that_value(kernels: Kernels, dtype: np.dtype[Any]) -> None:
    for n in SIZES:
        for kind, row in hard_rows(37, dtype).items():
            x = np.tile(row, (n, 1))
            x[0] = -x[0]  # or one of them is another
            value = np.sort(x, axis=0)
            for window in windows(n):
                got, out = one_row(37, dtype)
                kernels.select_columns(Rows.of(x), window, out=out)
                same = (value[window.lo] == value[window.hi - 1]) | (row == 0)
                assert np.array_equal(got[same], value[window.lo, same]), (n, kind, window)
            for nearest in {1, n // 2 + 1, n - n // 4}:
                got, out = one_row(37, dtype)
                x[0] = row
                kernels.select_columns(Rows.of(x), Window((n - 1) // 2, n // 2 + 1), nearest=nearest, out=out)
                assert np.array_equal(got, row), (n, kind, nearest)


def test_windows_of_whole_numbers_are_the_nearest(kernels: Kernels, dtype: np.dtype[Any]) -> None:
    for n in SIZES:
        x = whole_numbers(n, 23, dtype, seed=n)
        if dtype == np.float64:
            x = np.rint(x / 2.0**12) + 2.0**52  # sums of differences are exact
        for lo, hi in windows(n):
            got, out = one_row(23, dtype)
            kernels.select_columns(Rows.of(x), Window(lo, hi), out=out)
            assert_means(got, x, [1] * (hi - lo), hi - lo, (lo, hi))


def test_weighted_windows_of_whole_numbers_are_the_nearest(kernels: Kernels, dtype: np.dtype[Any]) -> None:
    for n in (3, 8, 33, 70):
        rng = np.random.default_rng(n)
        x = np.rint(whole_numbers(n, 9, dtype, seed=n).astype(np.float64) / 2.0 ** (14 if dtype == np.float64 else 0))
        x = x.astype(dtype)
        cells = rng.integers(0, 5, n)
        cells[0] += 1
        total = int(cells.sum())
        repeated = np.repeat(x, cells, axis=0)
        for lo, hi in windows(total):
            got, out = one_row(9, dtype)
            kernels.select_columns(Rows.of(x), Window(lo, hi), multiplicities=cells, out=out)
            assert_means(got, repeated, [1] * (hi - lo), hi - lo, (lo, hi))


def test_windows_of_the_largest_numbers_are_numbers(kernels: Kernels, dtype: np.dtype[Any]) -> None:
    """What a window reaches lies between its ends, though differences and sums overflow."""
    largest = float(ml_dtypes.finfo(dtype).max)
    for n in (3, 8, 32, 33, 70, 257, 300):
        rng = np.random.default_rng(n)
        x = (rng.choice([-1, -0.75, 0.5, 1], (n, 21)) * largest).astype(dtype)
        for lo, hi in windows(n):
            got, out = one_row(21, dtype)
            kernels.select_columns(Rows.of(x), Window(lo, hi), out=out)
            exact = exact_means(x, [1] * (hi - lo), hi - lo, (lo, hi))
            close = max(abs(Fraction(float(g)) - e) for g, e in zip(got.astype(float), exact, strict=True))
            assert close <= Fraction(largest) * Fraction(float(ml_dtypes.finfo(dtype).eps))


# ---- nearest values ----------------------------------------------------------------------------------------------


def nearest_sizes(n: int) -> set[int]:
    return {1, 2, n // 2 + 1, n - n // 4, n - 1} - {0}


@pytest.mark.parametrize("spread", [84, 3])  # in units of the last place: 1 + 1e-5 times normal numbers of float32
def test_nearest_values_are_nearest_to_the_exact_middle(kernels: Kernels, dtype: np.dtype[Any], spread: int) -> None:
    """With an even number of values the middle often lies between two numbers of the dtype."""
    unit = float(ml_dtypes.finfo(dtype).eps)
    for n in [*range(2, 17), 31, 32, 33, 34, 64, 65, 66, 129, 130, 255, 256, 257, 258, 1100]:
        d = 40 if n <= 40 else 9
        x = (1 + np.rint(np.random.default_rng(n).standard_normal((n, d)) * spread) * unit).astype(dtype)
        lo, hi = (n - 1) // 2, n // 2 + 1
        for nearest in nearest_sizes(n):
            got, out = one_row(d, dtype)
            kernels.select_columns(Rows.of(x), Window(lo, hi), nearest=nearest, out=out)
            assert_means(got, x, [1] * nearest, nearest, (lo, hi, nearest))


def test_nearest_values_of_any_size(kernels: Kernels, dtype: np.dtype[Any]) -> None:
    """Exponents all over the range: distances and sums are rounded in every dtype, and the choice is not."""
    info = ml_dtypes.finfo(dtype)
    for n in [2, 3, 4, 6, 9, 12, 32, 33, 66, 130, 257, 300]:
        rng = np.random.default_rng(n)
        size = np.exp2(rng.uniform(int(info.minexp), int(info.maxexp) - 1, (n, 15)))
        x = (size * rng.choice([-1.0, 1], (n, 15))).astype(dtype)
        x[:, ::4] = rng.choice([1.0, float(info.eps) / 4, 2, 3, 0], (n, 4)).astype(dtype)  # x - 1 is often the same
        x[:, 1] = (float(info.max) * rng.choice([-1, 0.75, 1], n)).astype(dtype)  # differences overflow
        lo, hi = (n - 1) // 2, n // 2 + 1
        for nearest in nearest_sizes(n):
            got, out = one_row(15, dtype)
            kernels.select_columns(Rows.of(x), Window(lo, hi), nearest=nearest, out=out)
            taken = exact_means(x, [1] * nearest, nearest, (lo, hi, nearest))
            sizes = exact_means(abs(x), [1], 1, (n - 1, n))
            for value, want, size in zip(got.astype(np.float64).tolist(), taken, sizes, strict=True):
                if nearest == 1:
                    assert value == want
                near = size * Fraction(TOLERANCE[dtype.name].spread) + abs(want) * Fraction(float(info.eps))
                assert abs(Fraction(value) - want) <= near + Fraction(float(info.smallest_subnormal)), (n, nearest)


def test_weights_that_somebody_gave_are_exact() -> None:
    """However rows cancel: no rounding of the divisor may go to a weight."""
    for x, want in (([1e16, -1e16, 0], 0), ([-1e16, 1e16, 0], 0), ([1e300, -1e300, 1], 0.3)):
        got = rk.aggregate(np.array(x, dtype=np.float64)[:, None], "mean", weights=[0.35, 0.35, 0.3])
        assert got.tolist() == [pytest.approx(want, rel=1e-15)]


@pytest.mark.parametrize("rule", ["geometric_median", "nnm | geometric_median"])
def test_averages_by_weights_that_are_no_whole_numbers_are_rounded_once(rule: str) -> None:
    """Divided by their rounded sum they were up to 1.3 units off."""
    for seed in range(40):
        x = 1 + 1e-3 * np.random.default_rng(seed).standard_normal((9, 30))
        got, info = rk.aggregate(x, rule, f=2, return_info=True)
        shares = [Fraction(w) for w in info.weights]
        for column, value in zip(x.T, got, strict=True):
            exact = sum(w * Fraction(v) for w, v in zip(shares, column, strict=True)) / sum(shares)
            assert abs(Fraction(float(value)) - exact) <= Fraction(0.65) * Fraction(float(np.spacing(value)))
