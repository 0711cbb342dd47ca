"""Each primitive of each implementation against an oracle of higher precision, on hard inputs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import ml_dtypes
import numpy as np
import pytest
from emulated import EmulatedCuda, multiplies_float32
from numpy.typing import NDArray
from support import IMPLEMENTATIONS, KINDS, assert_close, make_rows, one_row

from robustkern.contract.primitives import AveragingKernels, Kernels, Window
from robustkern.contract.rows import DTYPES, Rows, Stretches
from robustkern.inputs.arrays import address_of

SIZES = [
    (1, 5),
    (2, 1),
    (3, 16),
    (4, 17),
    (5, 0),
    (9, 64),
    (16, 33),
    (17, 1000),
    (31, 15),
    (33, 100),
    (64, 31),
    (130, 70),
    (257, 3),
]
#: Every unrolled network, the first sizes beyond, all ways of cutting in two parts, and where counting begins.
ALL_N = [*range(1, 41), 47, 48, 49, 63, 64, 65, 80, 81, 96, 127, 128, 129, 144, 145, 160, 192, 193, 255, 256, 257, 300]

Array = NDArray[Any]


P = ParamSpec("P")


def remembered(oracle: Callable[Concatenate[Array, P], Array]) -> Callable[Concatenate[Array, P], Array]:
    """Let an oracle answer once about rows that every backend is asked about."""
    answers: dict[Any, Array] = {}

    def content(x: Array) -> int:
        values = np.ascontiguousarray(x)
        padded = values.dtype == np.longdouble and np.finfo(np.longdouble).nmant == 63  # 10 bytes of 16
        return hash((values.view(np.uint8).reshape(-1, 16)[:, :10] if padded else values).tobytes())

    @functools.wraps(oracle)
    def answer(x: Array, /, *asked: P.args, **options: P.kwargs) -> Array:
        assert not options
        rest = (content(each) if isinstance(each, np.ndarray) else each for each in asked)
        key = x.dtype, x.shape, content(x), *rest
        if key not in answers:
            answers[key] = oracle(x, *asked, **options)
        return answers[key].copy()

    return answer


@remembered
def oracle_select(x: Array, window: Window, multiplicities: Array | None = None) -> Array:
    """Sort in longdouble and average the cells; a NaN ranks last."""
    wide = x.astype(np.longdouble)
    if multiplicities is None:
        with np.errstate(invalid="ignore"):
            return np.asarray((np.sort(wide, axis=0)[window.lo : window.hi] / (window.hi - window.lo)).sum(axis=0))
    result = np.empty(x.shape[1], dtype=np.longdouble)
    cells = [int(m) for m in multiplicities]
    with np.errstate(invalid="ignore"):
        for j in range(x.shape[1]):
            order = sorted(range(len(x)), key=lambda i: (bool(np.isnan(wide[i, j])), wide[i, j]))
            total, before = np.longdouble(0), 0
            for i in order:
                after = before + cells[i]
                share = min(after, window.hi) - max(before, window.lo)
                if share > 0:
                    total += wide[i, j] * np.longdouble(share) / np.longdouble(window.hi - window.lo)
                before = after
            result[j] = total
    return result


@remembered
def oracle_nearest(x: Array, window: Window, nearest: int) -> Array:
    """Order each column by distance, lower side first, then by rank, and average, all in longdouble."""
    lo, hi = window
    with np.errstate(all="ignore"):
        wide = np.sort(x.astype(np.longdouble), axis=0)
        centre = (wide[lo] + wide[hi - 1]) / 2
        if hi - lo > 2:
            centre = wide[lo:hi].sum(axis=0) / (hi - lo)
        away = np.abs(wide - centre)
        above = wide > centre
        rank = np.broadcast_to(np.arange(len(x))[:, None], x.shape)
        order = np.lexsort((np.where(above, rank, -rank), above, away, np.isnan(wide)), axis=0)
        mean = (np.take_along_axis(wide, order[:nearest], axis=0) / nearest).sum(axis=0)
        return np.asarray(np.where(np.isfinite(centre) | np.isnan(wide[nearest - 1]), mean, centre))


def windows(n: int) -> list[Window]:
    """Return the median in its variants, a trimmed window, extremes and everything."""
    middle = [(n - 1) // 2, n // 2 + 1]
    found = {
        (middle[0], middle[1]),
        (middle[0], middle[0] + 1),
        (middle[1] - 1, middle[1]),
        (n // 4, n - n // 4),
        (0, 1),
        (n - 1, n),
        (0, n),
    }
    return [Window(lo, hi) for lo, hi in sorted(found) if lo < hi]


@pytest.mark.parametrize("kind", KINDS)
def test_select_columns_matches_the_oracle(kernels: Kernels, dtype: np.dtype[Any], kind: str) -> None:
    for n, d in SIZES:
        x = make_rows(kind, n, d, dtype, seed=n)
        before = x.tobytes()
        for window in windows(n):
            got, out = one_row(d, dtype)
            found = kernels.select_columns(Rows.of(x), window, out=out)
            assert found.sq_distances is None
            assert np.array_equal(found.nonfinite, ~np.isfinite(x.astype(np.float64)).all(axis=1))
            assert_close(got, oracle_select(x, window), x)
        assert x.tobytes() == before


def test_a_column_does_not_depend_on_its_neighbours(kernels: Kernels) -> None:
    """One column's sums overflow; those beside it are averaged as if it were not there."""
    for dtype in (np.dtype(np.float32), np.dtype(np.float64)):
        largest, tiny = np.finfo(dtype).max, np.finfo(dtype).smallest_subnormal
        for overflowing, column in (
            ([-largest, largest, largest], [largest, largest, largest]),
            ([largest, largest], [tiny, 3 * tiny]),
        ):
            x = np.repeat(np.array(column, dtype=dtype)[:, None], 40, axis=1)
            x[:, ::20] = np.array(overflowing, dtype=dtype)[:, None]
            got, out = one_row(40, dtype)
            kernels.select_columns(Rows.of(x), Window(0, len(x)), out=out)
            assert (got[np.arange(40) % 20 > 0] == (largest if len(x) == 3 else 2 * tiny)).all()


def test_select_columns_for_every_number_of_rows(fast: Kernels) -> None:
    for dtype in (np.dtype(np.float32), np.dtype(np.float64)):
        for n in ALL_N:
            x = np.random.default_rng(n).standard_normal((n, 67)).astype(dtype)
            ranked = np.sort(x, axis=0)
            for r in range(n) if n <= 65 else sorted({0, 1, 2, n // 4, n // 2 - 1, n // 2, n - n // 4, n - 2, n - 1}):
                got, out = one_row(67, dtype)
                fast.select_columns(Rows.of(x), Window(r, r + 1), out=out)
                assert np.array_equal(got, ranked[r]), (n, r)


def test_every_zero_one_input_is_sorted(fast: Kernels) -> None:
    """The 0-1 principle: a network that ranks all 0-1 inputs ranks everything. All of them up to 12 rows."""
    for n in range(1, 13):
        x = ((np.arange(2**n)[None, :] >> np.arange(n)[:, None]) & 1).astype(np.float32)
        ones = x.sum(axis=0)
        for r in range(n):
            got, out = one_row(2**n, x.dtype)
            fast.select_columns(Rows.of(x), Window(r, r + 1), out=out)
            assert np.array_equal(got, (n - r <= ones).astype(np.float32))


def test_counting_finds_any_rank_of_any_distribution(fast: Kernels) -> None:
    """Columns made to mislead interpolation: heavy tails, few values, one far value, neighbouring numbers, infinities."""
    rng = np.random.default_rng(0)
    n, each = 401, 6
    for dtype in (np.dtype(np.float32), np.dtype(np.float64)):
        big, tiny = np.finfo(dtype).max, np.finfo(dtype).smallest_subnormal
        normal = rng.standard_normal((n, each))
        exponents = rng.uniform(np.log2(float(tiny)), np.log2(float(big)) - 1, (n, each))
        kinds = [
            normal,
            np.exp2(exponents) * np.sign(normal),
            np.exp2(-np.abs(exponents)),
            np.where(normal > 0.5, normal, 0.0),
            np.sign(normal),
            np.where(np.arange(n)[:, None] == 7, big, normal),
            np.where(normal > 0, big, -big),
            1 + np.floor(normal * 3) * np.finfo(dtype).eps,
            np.where(normal > 0, 0.0, -0.0),
            np.where(normal > 0.8, np.inf, np.where(normal < -0.8, -np.inf, normal)),
            np.floor(normal * 4) * tiny,
            np.cumprod(np.full((n, each), 0.7), axis=0) * (1 + np.arange(each)),
        ]
        x = np.concatenate(kinds, axis=1).astype(dtype)
        x = np.ascontiguousarray(x[:, rng.permutation(x.shape[1])])  # neighbours have nothing to do with each other
        ranked = np.sort(x, axis=0)
        for r in (0, 1, 5, 100, 133, 199, 200, 201, 267, 300, 399, 400):
            got, out = one_row(x.shape[1], dtype)
            fast.select_columns(Rows.of(x), Window(r, r + 1), out=out)
            assert np.array_equal(got, ranked[r]), r
        finite = np.isfinite(ranked).all(axis=0)
        for lo, hi in ((100, 301), (0, 201), (200, 401), (7, 9), (0, 401)):
            got, out = one_row(x.shape[1], dtype)
            fast.select_columns(Rows.of(x), Window(lo, hi), out=out)
            want = ranked[lo:hi, finite].astype(np.longdouble).mean(axis=0)
            assert_close(got[finite], want, x[:, finite])


def test_selections_are_the_same_bits_in_every_backend(fast: Kernels, dtype: np.dtype[Any]) -> None:
    """Where a value or the middle of two is selected, there is nothing to round differently."""
    from robustkern.backends.reference import Reference

    for kind in KINDS:
        for n in (1, 2, 7, 8, 21, 40, 260):
            x = make_rows(kind, n, 50, dtype, seed=n)
            want, out = one_row(50, dtype)
            Reference().select_columns(Rows.of(x), Window((n - 1) // 2, n // 2 + 1), out=out)
            got, out = one_row(50, dtype)
            fast.select_columns(Rows.of(x), Window((n - 1) // 2, n // 2 + 1), out=out)
            same = (got == want) | (np.isnan(got.astype(float)) & np.isnan(want.astype(float)))
            assert same.all(), (kind, n)


@pytest.mark.parametrize("kind", ["normal", "ties", "offset", "extreme", "nan", "nan_and_inf"])
def test_select_columns_with_multiplicities(kernels: Kernels, dtype: np.dtype[Any], kind: str) -> None:
    for n, d in [(1, 3), (2, 9), (5, 33), (12, 70), (40, 17)]:
        x = make_rows(kind, n, d, dtype, seed=n)
        m = np.random.default_rng(n).integers(0, 4, n)
        m[0] += 1
        total = int(m.sum())
        for window in windows(total):
            got, out = one_row(d, dtype)
            kernels.select_columns(Rows.of(x), window, multiplicities=m, out=out)
            assert_close(got, oracle_select(x, window, m), x)


@pytest.mark.parametrize("factor", [1, 3, 2**45])
def test_every_weighted_rank_for_every_number_of_rows(fast: Kernels, factor: int) -> None:
    """Multiplicities that share a factor, that share none and fill 50 bits, and that are 0."""
    for dtype in (np.dtype(np.float32), np.dtype(np.float64)):
        for n in range(1, 35):
            rng = np.random.default_rng(n)
            x = rng.integers(-9, 9, (n, 21)).astype(dtype)
            m = rng.integers(0, 9, n) * factor
            m[rng.integers(n)] += factor if n % 2 else 2**45 + 1
            total = int(m.sum())
            order = np.argsort(x, axis=0, kind="stable")
            up_to = np.cumsum(m[order], axis=0)
            for cell in {
                0,
                1,
                total // 4,
                (total - 1) // 2,
                total // 2,
                total - 2,
                total - 1,
                *up_to[:, 0],
                *up_to[:, 1] - 1,
            }:
                if not 0 <= cell < total:
                    continue
                got, out = one_row(21, dtype)
                fast.select_columns(Rows.of(x), Window(int(cell), int(cell) + 1), multiplicities=m, out=out)
                at = (up_to > cell).argmax(axis=0)
                assert np.array_equal(got, np.take_along_axis(np.sort(x, axis=0), at[None], 0)[0]), (n, cell)


@pytest.mark.parametrize("kind", KINDS)
def test_nearest_values_match_the_oracle(kernels: Kernels, dtype: np.dtype[Any], kind: str) -> None:
    for n, d in [*SIZES, (32, 20), (34, 17), (65, 9), (256, 7), (300, 17)]:
        x = make_rows(kind, n, d, dtype, seed=n)
        before = x.tobytes()
        for window in {*(Window(lo, n // 2 + 1) for lo in ((n - 1) // 2, n // 2)), Window(n // 4, n - n // 4)}:
            if window.hi - window.lo > 2 and kind == "subnormal" and dtype == np.float64:
                continue  # of which means are within one unit, says the contract
            for nearest in {1, (n + 2) // 3, n // 2 + 1, n - n // 4, n}:
                got, out = one_row(d, dtype)
                found = kernels.select_columns(Rows.of(x), window, nearest=nearest, out=out)
                assert found.sq_distances is None
                assert np.array_equal(found.nonfinite, ~np.isfinite(x.astype(np.float64)).all(axis=1))
                assert_close(got, oracle_nearest(x, window, nearest), x)
                if kind == "constant":
                    assert np.array_equal(got, x[0])
        assert x.tobytes() == before


def test_nearest_values_for_every_number_of_rows(fast: Kernels) -> None:
    """Whole numbers, so that many values are equally far, at every way of cutting."""
    for dtype in (np.dtype(np.float32), np.dtype(np.float64)):
        for n in ALL_N:
            x = np.random.default_rng(n).integers(-9, 10, (n, 67)).astype(dtype)
            for nearest in range(1, n + 1) if n <= 40 else {1, 2, n // 5, n // 2, n - n // 3, n - 2, n - 1, n}:
                for window in (Window((n - 1) // 2, n // 2 + 1), Window(n // 3, n - n // 3)):
                    got, out = one_row(67, dtype)
                    fast.select_columns(Rows.of(x), window, nearest=nearest, out=out)
                    assert_close(got, oracle_nearest(x, window, nearest), x)


@pytest.mark.parametrize("n", [7, 40, 300])
def test_of_equally_far_values_the_lower_are_taken_first(kernels: Kernels, dtype: np.dtype[Any], n: int) -> None:
    """In whatever order the rows come: a third at 0, two at -1, three at 1, and two as far as 100 on either side."""
    zeros = n // 3 if n > 7 else 1
    column = np.concatenate([np.zeros(zeros), [-1, -1, 1, 1, 1], np.tile([100.0, -100], n)])[:n]
    rng = np.random.default_rng(n)
    x = np.stack([rng.permutation(column) for _ in range(40)], axis=1).astype(dtype)
    centre = int((column < 0).sum())  # the lowest zero
    for more, total in enumerate([0, -1, -2, -1, 0, 1][: n - zeros + 1]):
        got, out = one_row(40, dtype)
        nearest = zeros + more
        kernels.select_columns(Rows.of(x), Window(centre, centre + 1), nearest=nearest, out=out)
        assert_close(got, np.full(40, total / nearest), x)


@pytest.mark.parametrize("copies", [1, 9, 70])
@pytest.mark.parametrize("sign", [1, -1])
def test_numbers_are_nearer_than_infinities(kernels: Kernels, dtype: np.dtype[Any], copies: int, sign: int) -> None:
    """Also numbers at the other end of the range, whose differences from the centre overflow."""
    largest = float(ml_dtypes.finfo(dtype).max) * sign
    n = 5 * copies
    for values, nearest, want in [
        ([-np.inf * sign, -largest, -largest, -largest, largest], 4, -largest / 2),
        ([-np.inf * sign, -largest, -largest, -largest, largest], 5, -np.inf * sign),
        ([np.inf * sign, -largest, -largest, -largest, largest], 4, -largest / 2),
        ([np.inf, -np.inf, 0, 0, 1], 3, 1 / 3),
        ([np.inf, -np.inf, 0, 0, 1], 4, -np.inf),
        ([np.inf, -np.inf, 0, 0, 1], 5, np.nan),
        ([np.inf, np.inf, np.inf, 0, -np.inf], 5, np.inf),
        ([-np.inf, -np.inf, -np.inf, 0, np.inf], 4, -np.inf),
        ([np.nan, np.nan, np.inf, 0, -np.inf], 3, np.inf),
        ([np.nan, np.nan, np.inf, 0, -np.inf], 4, np.nan),
        ([np.nan, 0, 0, 0, -np.inf], 4, -np.inf),
    ]:
        x = np.repeat(np.array(values).astype(dtype)[:, None], 40, axis=1)
        x = np.ascontiguousarray(np.repeat(x, copies, axis=0)[np.random.default_rng(0).permutation(n)])
        got, out = one_row(40, dtype)
        kernels.select_columns(Rows.of(x), Window((n - 1) // 2, n // 2 + 1), nearest=nearest * copies, out=out)
        assert_close(got, np.full(40, want), x)


def test_nearest_values_that_would_be_nan(kernels: Kernels) -> None:
    """Column j holds j NaN: the result is one as soon as fewer than the nearest, or not the centre, are numbers."""
    for n in (6, 50, 270):
        x = np.random.default_rng(n).standard_normal((n, n)).astype(np.float32)
        x[np.tri(n, k=-1, dtype=bool)] = np.nan
        x = np.ascontiguousarray(x[::-1])
        assert np.isnan(x).sum(axis=0).tolist() == list(range(n - 1, -1, -1))
        for lo, nearest in [(0, 1), (0, n // 2), (n // 2, 2), (n // 2, n - n // 4), (0, n)]:
            for window in (Window(lo, lo + 1), Window(lo, min(lo + 5, n))):
                got, out = one_row(n, x.dtype)
                kernels.select_columns(Rows.of(x), window, nearest=nearest, out=out)
                numbers = np.arange(1, n + 1)
                assert np.array_equal(np.isnan(got), numbers < max(nearest, window.hi))
                assert_close(got, oracle_nearest(x, window, nearest), x)


@pytest.mark.parametrize("kind", ["normal", "offset", "one_huge", "nan", "inf"])
def test_select_columns_distances(kernels: Kernels, dtype: np.dtype[Any], kind: str) -> None:
    for n, d in SIZES:
        x = make_rows(kind, n, d, dtype, seed=n)
        got, out = one_row(d, dtype)
        found = kernels.select_columns(Rows.of(x), Window((n - 1) // 2, n // 2 + 1), out=out, distances=True)
        with np.errstate(all="ignore"):
            want = ((x.astype(np.longdouble) - got.astype(np.longdouble)) ** 2).sum(axis=1).astype(np.float64)
        assert found.sq_distances is not None
        finite = np.isfinite(want)
        np.testing.assert_allclose(found.sq_distances[finite], want[finite], rtol=1e-13)
        assert not np.isfinite(found.sq_distances[~finite]).any()
        # Without an output the distances are the same bits.
        again = kernels.select_columns(Rows.of(x), Window((n - 1) // 2, n // 2 + 1), distances=True)
        assert np.array_equal(again.sq_distances, found.sq_distances, equal_nan=True)


def test_select_columns_of_mixed_rows(kernels: Kernels, dtype: np.dtype[Any]) -> None:
    rng = np.random.default_rng(0)
    for n, k, d in [(3, 2, 20), (6, 6, 65), (9, 4, 300), (40, 35, 33)]:
        x = make_rows("normal", n, d, dtype, seed=n)
        mix = np.where(rng.random((k, n)) < 0.6, 0.0, rng.random((k, n)))
        mix[np.arange(k), rng.integers(0, n, k)] = 0.5
        mix /= mix.sum(axis=1, keepdims=True)
        measure = rng.random((3, n))
        mixed = mix @ x.astype(np.float64)
        window = Window((k - 1) // 2, k // 2 + 1)
        for measured, expected in (
            (None, x.astype(np.float64)),
            (mix, mixed),
            (measure, measure @ x.astype(np.float64)),
        ):
            for nearest in (None, k - k // 4):
                got, out = one_row(d, dtype)
                found = kernels.select_columns(
                    Rows.of(x), window, nearest=nearest, mix=mix, measure=measured, distances=True, out=out
                )
                single = mixed.astype(np.float32 if dtype.itemsize < 8 else np.float64)
                selected = oracle_nearest(single, window, nearest) if nearest else oracle_select(single, window)
                assert_close(got, selected, x)
                want = ((expected - got.astype(np.float64)) ** 2).sum(axis=1)
                np.testing.assert_allclose(found.sq_distances, want, rtol=1e-12)


@pytest.mark.parametrize("size", [1e10, 1e20, 1e100, 1e300])
def test_rows_of_little_weight_cost_a_mix_no_digits(kernels: Kernels, size: float) -> None:
    """They may be as far away as they like: the honest values' digits are not those of differences from them."""
    rng = np.random.default_rng(0)
    for n, k, d in [(5, 1, 9), (6, 3, 20), (9, 9, 65), (30, 6, 33)]:
        x = rng.standard_normal((n, d))
        weights = rng.random((k, n)) + 0.5
        weights[:, ::3] *= 0.3 / size
        x[::3] *= size
        divisors = weights.sum(axis=1)
        exact = (weights.astype(np.longdouble) @ x.astype(np.longdouble)) / divisors[:, None].astype(np.longdouble)
        for r in range(k):
            got, out = one_row(d, np.dtype(np.float64))
            kernels.select_columns(
                Rows.of(x),
                Window(r, r + 1),
                mix=np.ascontiguousarray(weights),
                mix_divisors=divisors,
                out=out,
            )
            np.testing.assert_allclose(got, np.sort(exact, axis=0)[r].astype(float), atol=1e-14)


@pytest.mark.parametrize("beside", ["nothing", "zeros", "ordinary", "huge", "infinite"])
def test_averages_of_subnormal_numbers(kernels: Kernels, beside: str) -> None:
    """Of float64 rows they are lifted, unless numbers beside them leave no room; to a unit they are right anyway."""
    rng = np.random.default_rng(0)
    unit = 5e-324
    for n, k, d in [(1, 1, 1), (2, 1, 9), (5, 3, 17), (9, 8, 65), (20, 4, 1030)]:
        x = rng.standard_normal((n, d)) * 10.0 ** rng.uniform(-324, -305, (n, 1))
        x[0, ::2] = unit * rng.integers(-3, 4, x[0, ::2].shape)
        last = {"zeros": 0.0, "ordinary": rng.standard_normal(d), "huge": 1e305, "infinite": np.inf}.get(beside)
        if last is not None and n > 1:
            x[-1, : max(d // 2, 1)] = last if np.ndim(last) == 0 else last[: max(d // 2, 1)]
        weights = np.where(rng.random((k, n)) < 0.5, 1.0, 0.0)
        weights[:, 0] = 1.0
        divisors = weights.sum(axis=1)
        got = np.full((k, d), 77.0)
        kernels.weighted_row_sum(Rows.of(x), weights, Rows.of(got), divisors=divisors)
        wide = x.astype(np.longdouble)
        want = np.array([wide[w != 0].sum(axis=0) / by for w, by in zip(weights, divisors, strict=True)])
        spread = np.array([abs(wide[w != 0]).max(axis=0) for w in weights])
        order = np.argsort(want, axis=0, kind="stable")
        for found, exact, reach in [
            (got, want, spread),
            *(
                (
                    mixed_at(kernels, x, weights, divisors, r),
                    np.take_along_axis(want, order, 0)[r],
                    spread.max(axis=0),
                )
                for r in range(k)
            ),
        ]:
            assert np.array_equal(np.isfinite(found), np.isfinite(exact))
            finite = np.isfinite(found)
            assert np.array_equal(found[~finite], exact[~finite].astype(float))
            assert (abs(found[finite] - exact[finite]) <= unit + 2.0**-52 * np.sqrt(n) * reach[finite]).all()


@pytest.mark.parametrize("power", [-1074, -1040, -1022, -1021, -1000, -970, -950, -902, -899, 0, 970])
def test_averages_of_any_size(kernels: Kernels, power: int) -> None:
    """Results that are tiny though no number is subnormal; equal rows come back whatever lies beside them."""
    rng = np.random.default_rng(0)
    rows = np.ldexp(rng.uniform(1, 2, 1030), power)
    rows[7:9], rows[20:30] = 0.0, -rows[20:30]
    for beside in (0.0, 5e-324, 1e305):
        x = np.tile(rows, (3, 1))
        x[:, 1029] = beside
        got = np.full((1, 1030), 77.0)
        kernels.weighted_row_sum(Rows.of(x), np.ones((1, 3)), Rows.of(got), divisors=np.array([3.0]))
        assert np.array_equal(got[0], x[0])
    least = 2.0**-1022
    for column, mean in (([3, -4], -0.5), ([4, 0, 0, 0, 0, 0, 0], 4 / 7), ([1, 1, -1, 0], 0.25)):
        x = np.array(column)[:, None] * least
        got = np.full((1, 1), 77.0)
        kernels.weighted_row_sum(Rows.of(x), np.ones((1, len(x))), Rows.of(got), divisors=np.array([float(len(x))]))
        assert abs(got[0, 0] - mean * least) <= 5e-324


def test_averages_that_cancel_beside_subnormal_numbers(kernels: Kernels) -> None:
    for x, mean in (
        ([[-1.7e308, 5e-324], [1.7e308, 5e-324]], [0, 5e-324]),
        ([[-1e300, 0, 5e-324], [1e300, 0, 0], [0, 0, 0]], [0, 0, 0]),
    ):
        rows, got = np.array(x), np.full((1, len(mean)), 77.0)
        kernels.weighted_row_sum(Rows.of(rows), np.ones((1, len(x))), Rows.of(got), divisors=np.array([float(len(x))]))
        np.testing.assert_allclose(got[0], mean, rtol=0, atol=5e-324)


@pytest.mark.parametrize("power", [0, 50, 100, 200, 400])
def test_sums_that_are_no_averages_of_subnormal_numbers(kernels: Kernels, power: int) -> None:
    x = np.array([[2.0**-1023], [2.0**-1000]])
    for weight, divisor in ((2.0**power, 1.0), (1.0, 2.0**-power)):
        got = np.full((1, 1), 77.0)
        kernels.weighted_row_sum(Rows.of(x), np.full((1, 2), weight), Rows.of(got), divisors=np.array([divisor]))
        assert got[0, 0] == x.sum() * 2.0**power
        found, out = one_row(1, np.dtype(np.float64))
        mix, by = np.full((1, 2), weight), np.array([divisor])
        kernels.select_columns(Rows.of(x), Window(0, 1), mix=mix, mix_divisors=by, out=out)
        assert found[0] == x.sum() * 2.0**power


def mixed_at(kernels: Kernels, x: Array, weights: Array, divisors: Array, rank: int) -> Array:
    """Return the mixed rows' values of one rank."""
    got, out = one_row(x.shape[1], x.dtype)
    kernels.select_columns(Rows.of(x), Window(rank, rank + 1), mix=weights, mix_divisors=divisors, out=out)
    return got


def test_a_row_left_out_of_the_mix_is_never_multiplied(kernels: Kernels) -> None:
    x = np.array([[1.0, 2], [3, 4], [np.inf, np.nan]], dtype=np.float32)
    mix = np.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    got, out = one_row(2, x.dtype)
    found = kernels.select_columns(Rows.of(x), Window(1, 2), mix=mix, out=out)
    assert got.tolist() == [2, 3]
    mix[1] = [0, 0, 1]
    found = kernels.select_columns(Rows.of(x), Window(0, 1), mix=mix, out=out)
    assert got.tolist() == [2, 3]
    assert found.nonfinite.tolist() == [False, False, True]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("origin", [False, True], ids=["", "origin"])
@pytest.mark.parametrize("single", [False, True], ids=["double", "single"])
def test_gram_matches_the_oracle(kernels: Kernels, dtype: np.dtype[Any], kind: str, origin: bool, single: bool) -> None:
    for n, d in SIZES:
        x = make_rows(kind, n, d, dtype, seed=n)
        scale = 2.0**-540 if kind in ("extreme", "one_huge") and dtype == np.float64 else 1.0
        got = kernels.gram(Rows.of(x), origin=origin, scale=scale, single=single)
        wide = x.astype(np.longdouble)
        finite = np.isfinite(wide).all(axis=1)
        with np.errstate(all="ignore"):
            centre = oracle_select(x, Window((n - 1) // 2, (n - 1) // 2 + 1))
        centre[~np.isfinite(centre)] = 0
        if origin:
            wide = np.vstack([wide, np.zeros(d, dtype=np.longdouble)])
            finite = np.append(finite, True)
        assert got.shape == (len(wide), len(wide))
        assert np.isnan(got[~finite]).all()
        assert np.isnan(got[:, ~finite]).all()
        want = oracle_products((wide[finite] - centre) * np.longdouble(scale))
        lengths = np.sqrt(np.diagonal(want))
        inner = got[np.ix_(finite, finite)]
        assert np.array_equal(inner, inner.T, equal_nan=True)
        if single and dtype != np.float64:
            near = np.flatnonzero(~np.isinf(inner.diagonal()))
            assert len(near) == len(inner) or multiplies_float32(kernels, Rows.of(x))
            assert_sq_distances(inner[np.ix_(near, near)], wide[finite][near])
        else:
            assert (np.abs(inner - want) <= 1e-13 * np.outer(lengths, lengths) + 1e-300).all()


@remembered
def oracle_products(y: Array) -> Array:
    return np.asarray(y @ y.T)


@remembered
def oracle_sq_distances(x: Array) -> Array:
    wide = x.astype(np.longdouble)
    return np.asarray(((wide[:, None] - wide) ** 2).sum(axis=2))


def assert_sq_distances(gram: Any, rows: Any) -> None:
    """Check what float32 products promise: distances within 40 roundings of the rows' lengths, whatever the centre."""
    want = oracle_sq_distances(rows)
    norms = gram.diagonal()
    lengths = np.sqrt(np.maximum(norms, 2.0**-100 * rows.shape[1]))
    got = norms[:, None] + norms - 2 * gram
    assert (abs(got - want) <= 40 * 2.0**-24 * (lengths[:, None] + lengths) ** 2 + 1e-300).all()


@pytest.mark.parametrize("columns", ["alike", "falling", "one"])
def test_gram_of_float32_products_keeps_its_bound(fast: Kernels, columns: str) -> None:
    """Columns that round alike, so that errors add up, and sums whose first term all later ones are rounded to."""
    d = 4096
    shape = {"alike": np.ones(d), "falling": 2.0 ** -(np.arange(d) // 256 % 12), "one": np.eye(1, d)[0] + 1e-4}[columns]
    for seed in range(20):
        x = (np.random.default_rng(seed).standard_normal((9, 1)) * shape).astype(np.float32)
        assert_sq_distances(fast.gram(Rows.of(x), single=True), x)


@pytest.mark.parametrize("magnitude", [1e30, 5e37, 1e-24, 1e-40])
def test_gram_where_float32_products_overflow_or_vanish(kernels: Kernels, magnitude: float) -> None:
    """Who finds an infinite diagonal asks again for what is left, from afar."""
    rng = np.random.default_rng(0)
    for rows in (slice(None), slice(1)):  # all rows, or one of them
        x = rng.standard_normal((6, 500)).astype(np.float32)
        x[rows] *= np.float32(magnitude)
        got = kernels.gram(Rows.of(x), single=True)
        far = np.isinf(got.diagonal())
        beyond = magnitude > 1 and multiplies_float32(kernels, Rows.of(x))
        assert far.tolist() == [beyond and i in range(6)[rows] for i in range(6)]
        assert_sq_distances(got[np.ix_(~far, ~far)], x[~far])
        again = kernels.gram(Rows.of(x), single=True, scale=2.0**-66) * 2.0**132
        assert_sq_distances(np.where(far | far[:, None], again, got), x)


@pytest.mark.parametrize("n", [25, 40, 64, 130])
def test_gram_of_float32_products_survives_attackers_on_its_centre(fast: Kernels, n: int) -> None:
    """Rows that sit where the centre of many rows is taken from move it: the lengths, and so the bounds, tell."""
    x = np.random.default_rng(n).standard_normal((n, 700)).astype(np.float32)
    x[:: -(-n // 16)] += 1e4
    x[1, 3], x[n - 1, 5] = np.nan, -np.inf
    got = fast.gram(Rows.of(x), single=True)
    finite = np.isfinite(x).all(axis=1)
    assert np.array_equal(np.isnan(got.diagonal()), ~finite)
    assert_sq_distances(got[np.ix_(finite, finite)], x[finite])


def test_gram_with_multiplicities_is_centred_on_the_weighted_median(kernels: Kernels, dtype: np.dtype[Any]) -> None:
    for n, d in [(3, 5), (9, 70), (140, 33)]:
        x = make_rows("nan", n, d, dtype, seed=n)
        m = np.random.default_rng(n).integers(0, 9, n)
        m[0] += 1
        middle = (int(m.sum()) - 1) // 2
        got = kernels.gram(Rows.of(x), multiplicities=m, origin=True)
        finite = np.append(np.isfinite(x.astype(float)).all(axis=1), True)
        centre = oracle_select(x, Window(middle, middle + 1), m)
        centre[~np.isfinite(centre)] = 0
        y = np.vstack([x.astype(np.longdouble), np.zeros((1, d))])[finite] - centre
        want = (y @ y.T).astype(np.float64)
        np.testing.assert_allclose(got[np.ix_(finite, finite)], want, rtol=1e-12, atol=1e-12 * np.abs(want).max())
        assert np.isnan(got[~finite]).all()


@pytest.mark.parametrize(("n", "segments"), [(3, 2000), (40, 400), (129, 200)])
def test_sums_of_rows_that_are_constant_keep_the_bound(n: int, segments: int) -> None:
    """Their roundings are all alike. On both sides of where a Gram is shared; what is summed is the same memory again."""
    x = np.random.default_rng(n).standard_normal((n, 1)).astype(np.float32)
    block = np.repeat(x, 4096, axis=1)
    d = 4096 * segments
    rows = Rows(np.repeat(Rows.of(block).addresses, segments, axis=0), np.arange(0, d + 1, 4096), block.dtype, block)
    wide = x[:, 0].astype(np.float64)
    centre = np.sort(wide)[(n - 1) // 2]
    away = [Fraction(v) - Fraction(centre) for v in wide]
    for name in sorted({*IMPLEMENTATIONS} - {"reference", "cuda-emulated"}):  # which take too long
        kernels = IMPLEMENTATIONS[name]
        always, each = kernels.roundings
        bound = Fraction(2.0**-53 * (always + each * d)) * d
        gram = kernels.gram(rows)
        for i in range(n):
            for j in range(i + 1):
                assert abs(Fraction(gram[i, j]) - away[i] * away[j] * d) <= bound * abs(away[i] * away[j])
        window = Window((n - 1) // 2, (n - 1) // 2 + 1)
        squares = kernels.select_columns(rows, window, distances=True).sq_distances
        plain = kernels.row_sq_distances(rows, rows.take([0]), exact=False)[0]
        for i in range(n):
            assert abs(Fraction(squares[i]) - away[i] ** 2 * d) <= bound * away[i] ** 2
            assert abs(Fraction(plain[i]) - (away[i] - away[0]) ** 2 * d) <= bound * (away[i] - away[0]) ** 2


def test_lines_of_a_gram_are_those_of_the_whole(kernels: Kernels, dtype: np.dtype[Any]) -> None:
    """For few and many lines, on both sides of a block of rows and of where a Gram is shared among threads."""
    for n, d in [(1, 5), (3, 70), (9, 300), (33, 70), (65, 33), (140, 300)]:
        x = make_rows("normal", n, d, dtype, seed=n)
        for origin, single in [(False, False), (True, False), (False, True)]:
            whole = kernels.gram(Rows.of(x), origin=origin, single=single)
            for lines in sorted({1, min(n, 2), min(n, 5), (n + 1) // 2, n, n + origin}):
                got = kernels.gram(Rows.of(x), origin=origin, single=single, lines=lines)
                assert got.shape == (lines, n + origin)
                assert np.array_equal(got[:, :lines], got[:, :lines].T)
                lengths = np.sqrt(whole.diagonal())
                bound = (40 * 2.0**-24 if single and dtype != np.float64 else 1e-13) * np.outer(lengths, lengths)
                assert (abs(got - whole[:lines]) <= 2 * bound[:lines] + 1e-300).all()


def test_a_row_that_counts_alone_is_the_centre(kernels: Kernels, dtype: np.dtype[Any]) -> None:
    """NaN and Inf in it count as 0 there, and stay in the lines of the rows that hold them."""
    for n, d in [(1, 5), (4, 70), (33, 300), (140, 33)]:
        x = make_rows("nan", n, d, dtype, seed=n)
        wide = x.astype(np.longdouble)
        finite = np.isfinite(wide).all(axis=1)
        for lone in {0, n - 1, int(np.argmin(finite))}:
            cells = np.zeros(n, dtype=np.int64)
            cells[lone] = 7
            got = kernels.gram(Rows.of(x), multiplicities=cells, lines=(n + 1) // 2)
            y = wide[finite] - np.where(np.isfinite(wide[lone]), wide[lone], 0)
            want = np.full((n, n), np.nan)
            want[np.ix_(finite, finite)] = y @ y.T
            want = want[: (n + 1) // 2]
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12 * np.nanmax(abs(want), initial=1e-300))


def test_equal_rows_have_equal_products(kernels: Kernels, dtype: np.dtype[Any]) -> None:
    """Copies of a row are found at distance exactly 0, wherever they stand."""
    for n, d in [(5, 100), (13, 333), (140, 600)]:
        x = make_rows("normal", n, d, dtype)
        x[n // 2] = x[n - 1] = x[1]
        g = kernels.gram(Rows.of(x))
        for i in (n // 2, n - 1):
            assert g[i, i] == g[1, 1] == g[i, 1]


@pytest.mark.parametrize("kind", ["normal", "offset", "one_huge", "extreme", "subnormal"])
def test_row_sq_distances_are_exact(kernels: Kernels, dtype: np.dtype[Any], kind: str) -> None:
    for n, d in SIZES:
        x = make_rows(kind, n + 1, d, dtype, seed=n)
        scale = 1.0
        if dtype == np.float64:
            scale = {"extreme": 2.0**-540, "one_huge": 2.0**-540, "subnormal": 2.0**540}.get(kind, 1.0)
        wide = x.astype(np.longdouble)
        for centres, points in ((Rows.of(x[n:]), wide[n:]), (Rows.of(x[-6:]), wide[-6:]), (None, 0 * wide[:1])):
            got = kernels.row_sq_distances(Rows.of(x[:n]), centres, scale=scale)
            want = (((wide[:n] - points[:, None]) * np.longdouble(scale)) ** 2).sum(axis=2)
            np.testing.assert_allclose(got, want.astype(np.float64), rtol=4e-16, atol=1e-320)
            got = kernels.row_sq_distances(Rows.of(x[:n]), centres, scale=scale, exact=False)
            np.testing.assert_allclose(got, want.astype(np.float64), rtol=256 * 2.0**-53, atol=1e-320)


def test_row_sq_distances_in_plain_sums_stay_good_in_many_columns(fast: Kernels) -> None:
    """Columns that round alike, on both sides of a tile and of a task; five centres, which are more than one group."""
    for n, d in [(1, 1023), (2, 1025), (3, 2049), (300, 1100), (9, 600_000)]:
        x = np.full((n, d), 0.1, dtype=np.float32)
        x *= np.arange(1, n + 1, dtype=np.float32)[:, None]
        centres = np.repeat(np.float32([[0], [1], [-1], [0.1], [1e-3]]), d, axis=1)
        got = fast.row_sq_distances(Rows.of(x), Rows.of(centres), exact=False)
        want = d * (x[:, 0].astype(np.longdouble) - centres[:, :1]) ** 2
        np.testing.assert_allclose(got, want.astype(np.float64), rtol=256 * 2.0**-53)


def test_row_sq_distances_do_not_depend_on_the_order_of_columns(fast: Kernels) -> None:
    """A plain float64 sum differs in the last digits here; the primitive must not."""
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float64):
        x = rng.standard_normal((1, 4000)).astype(dtype) * np.exp(rng.standard_normal((1, 4000)) * 4).astype(dtype)
        rows = np.concatenate([x[:, rng.permutation(4000)] for _ in range(20)])
        got = fast.row_sq_distances(Rows.of(rows), Rows.of(np.zeros((1, 4000), dtype=dtype)))[0]
        assert (got == math.fsum(x[0].astype(np.float64) ** 2) if dtype == np.float32 else got == got[0]).all()
        assert len(set(((rows.astype(np.float64)) ** 2).sum(axis=1))) > 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_row_sq_distances_of_rows_that_are_not_finite(kernels: Kernels, dtype: np.dtype[Any], bad: float) -> None:
    x = np.ones((4, 40), dtype=dtype)
    x[2, 17] = bad
    for exact in (True, False):
        got = kernels.row_sq_distances(Rows.of(x[1:]), Rows.of(x[:1]), exact=exact)[0]
        assert got[0] == got[2] == 0
        assert not np.isfinite(got[1])
        assert not np.isfinite(kernels.row_sq_distances(Rows.of(x[:1]), Rows.of(x[2:3]), exact=exact))
        assert np.isfinite(kernels.row_sq_distances(Rows.of(x), None, exact=exact)).tolist() == [
            [True, True, False, True]
        ]


AVERAGING = {name: k for name, k in IMPLEMENTATIONS.items() if isinstance(k, AveragingKernels)}


@pytest.fixture(params=list(AVERAGING))
def averaging(request: pytest.FixtureRequest) -> AveragingKernels:
    return AVERAGING[request.param]


def test_which_backends_measure_from_averages() -> None:
    """On the CPU those that take float32 products, whose questions this answers, and the reference."""
    assert {name.partition("-")[0] for name in AVERAGING} == {"cpp", "reference"}


@pytest.mark.parametrize("kind", ["normal", "offset", "one_huge", "extreme", "subnormal"])
def test_sq_distances_to_an_average_match_the_oracle(
    averaging: AveragingKernels, dtype: np.dtype[Any], kind: str
) -> None:
    rng = np.random.default_rng(1)
    for n, d in [*SIZES, (5, 1023), (6, 1025), (300, 1100), (9, 40_000)]:
        x = make_rows(kind, n, d, dtype, seed=n)
        if dtype == np.float64 and kind != "normal":
            x = np.clip(x, -1e100, 1e100)
        shares = rng.random(n) * (rng.random(n) < 0.7)
        shares[rng.integers(n)] = 1.0
        shares /= shares.sum()
        wide, exact = x.astype(np.longdouble), shares.astype(np.longdouble)
        want = (((wide - wide[0]) - (exact / exact.sum()) @ (wide - wide[0])) ** 2).sum(axis=1).astype(np.float64)
        got = averaging.sq_distances_to_average(Rows.of(x), shares)
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12 * np.median(want))


def test_sq_distances_to_averages_of_one_row_and_of_rows_far_from_the_origin(
    averaging: AveragingKernels, dtype: np.dtype[Any]
) -> None:
    """An average that was rounded to float64 would be half a unit of the rows off, in every column alike."""
    x = np.full((4, 3000), 1, dtype=dtype)
    x[1:] = np.nextafter(x[1:], dtype.type(2)) if dtype.name != "bfloat16" else 1.0078125
    step = float(x[1, 0]) - 1
    got = averaging.sq_distances_to_average(Rows.of(x), np.full(4, 0.25))
    np.testing.assert_allclose(got, 3000 * np.array([0.5625, 0.0625, 0.0625, 0.0625]) * step**2, rtol=1e-13)
    got = averaging.sq_distances_to_average(Rows.of(x), np.array([0, 0, 1.0, 0]))
    assert got.tolist() == [3000 * step**2, 0, 0, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_sq_distances_to_an_average_of_rows_that_are_not_finite(
    averaging: AveragingKernels, dtype: np.dtype[Any], bad: float
) -> None:
    x = np.ones((6, 70), dtype=dtype)
    x[2, 67] = bad
    for shares, finite in (([0.5, 0.25, 0, 0.25, 0, 0], [0, 1, 3, 4, 5]), ([0.5, 0.25, 0.25, 0, 0, 0], [])):
        got = averaging.sq_distances_to_average(Rows.of(x), np.array(shares))
        assert np.flatnonzero(np.isfinite(got)).tolist() == finite
        assert not got[finite].any()


@pytest.mark.parametrize("kind", ["normal", "offset", "one_huge", "subnormal", "signed_zeros"])
def test_weighted_row_sum_matches_the_oracle(kernels: Kernels, dtype: np.dtype[Any], kind: str) -> None:
    rng = np.random.default_rng(1)
    for n, d in SIZES:
        x = make_rows(kind, n, d, dtype, seed=n)
        weights = rng.random((3, n))
        weights[1] = 1.0
        weights[2, 1:] *= rng.random(n - 1) < 0.5
        weights /= weights.sum(axis=1, keepdims=True)
        out = np.full((3, d), 77, dtype=dtype)
        kernels.weighted_row_sum(Rows.of(x), weights, Rows.of(out))
        want = weights.astype(np.longdouble) @ x.astype(np.longdouble)
        for row, expected in zip(out, want, strict=True):
            assert_close(row, expected, x)


def test_weighted_row_sum_never_reads_rows_of_weight_zero(kernels: Kernels, dtype: np.dtype[Any]) -> None:
    x = np.ones((4, 100), dtype=dtype)
    x[1] = np.nan
    rows = Rows.of(x)
    addresses = rows.addresses.copy()
    addresses[0, 3] = 8  # nobody's memory: reading it would end the process
    out = np.zeros((1, 100), dtype=dtype)
    rows = Rows(addresses, rows.offsets, rows.dtype, x)
    kernels.weighted_row_sum(rows, np.array([[0.5, 0.0, 1.5, 0.0]]), Rows.of(out))
    assert (out.astype(float) == 2).all()


def test_misaligned_rows(fast: Kernels, dtype: np.dtype[Any]) -> None:
    """Rows at odd addresses, each at another one."""
    n, d = 7, 203
    x = make_rows("normal", n, d, dtype)
    memory = np.zeros(n * (d * dtype.itemsize + 16), dtype=np.uint8)
    base = memory.__array_interface__["data"][0]
    addresses = []
    for i in range(n):
        at = i * (d * dtype.itemsize + 16) + 2 * i + 1
        memory[at : at + d * dtype.itemsize] = x[i].view(np.uint8)
        addresses.append(base + at)
    odd = Rows(np.array([addresses], dtype=np.uint64), np.array([0, d]), dtype, memory)
    for found, expected in (
        (fast.gram(odd), fast.gram(Rows.of(x))),
        (fast.row_sq_distances(odd, odd.take([2])), fast.row_sq_distances(Rows.of(x), Rows.of(x[2:3]))),
    ):
        assert np.array_equal(found, expected)
    if isinstance(fast, AveragingKernels):
        shares = np.full(n, 1 / n)
        assert np.array_equal(*(fast.sq_distances_to_average(rows, shares) for rows in (odd, Rows.of(x))))
    got, out = one_row(d, dtype)
    want, expected_out = one_row(d, dtype)
    for nearest in (None, 5):
        fast.select_columns(odd, Window(3, 4), nearest=nearest, out=out)
        fast.select_columns(Rows.of(x), Window(3, 4), nearest=nearest, out=expected_out)
        assert np.array_equal(got, want)
    fast.weighted_row_sum(odd, np.full((1, n), 1 / n), out)
    fast.weighted_row_sum(Rows.of(x), np.full((1, n), 1 / n), expected_out)
    assert np.array_equal(got, want)


@pytest.mark.parametrize("n", [1024, 4096])
def test_thousands_of_rows(fast: Kernels, n: int) -> None:
    d = 9 if isinstance(fast, EmulatedCuda) and n > 1024 else 70  # a minute less
    x = np.random.default_rng(0).standard_normal((n, d)).astype(np.float32)
    got, out = one_row(d, x.dtype)
    found = fast.select_columns(Rows.of(x), Window((n - 1) // 2, n // 2 + 1), out=out, distances=True)
    assert np.array_equal(got, np.median(x, axis=0))
    np.testing.assert_allclose(found.sq_distances, ((x.astype(np.float64) - got) ** 2).sum(axis=1), rtol=1e-12)
    y = x.astype(np.float64) - np.partition(x, (n - 1) // 2, axis=0)[(n - 1) // 2]
    np.testing.assert_allclose(fast.gram(Rows.of(x)), y @ y.T, rtol=1e-12, atol=1e-10)


def test_half_conversions_are_exact(fast: Kernels) -> None:
    """Every float16 and bfloat16 value goes through a copy (one row of weight 1) unchanged."""
    for dtype in DTYPES[:2]:
        x = np.arange(65536, dtype=np.uint16).view(dtype)[None]
        out = np.zeros_like(x)
        fast.weighted_row_sum(Rows.of(x), np.ones((1, 1)), Rows.of(out))
        wide, got = x.astype(np.float32), out.astype(np.float32)
        assert np.array_equal(wide, got, equal_nan=True)
        # Rounding to nearest even of the middle of neighbours, as NumPy does it.
        pair = np.stack([x[0], np.roll(x[0], -1)])
        ok = np.isfinite(pair.astype(np.float32)).all(axis=0)
        pair = np.ascontiguousarray(pair[:, ok])
        got_middle, rows_out = one_row(pair.shape[1], dtype)
        fast.weighted_row_sum(Rows.of(pair), np.array([[0.5, 0.5]]), rows_out)
        want = (pair.astype(np.float64).mean(axis=0)).astype(np.float32).astype(dtype)
        assert np.array_equal(got_middle.astype(np.float32), want.astype(np.float32))


def test_bindings_refuse_other_arrays() -> None:
    """What the bindings take for pointers is checked there too: dtype, axes, order, access, shape."""
    _cpu = pytest.importorskip("robustkern._cpu")
    x, flags = np.zeros((4, 8), dtype=np.float32), np.zeros(4, dtype=np.bool_)
    rows, out = Rows.of(x), Rows.of(np.zeros((1, 8), dtype=np.float32))
    frozen = flags.copy()
    frozen.flags.writeable = False

    def call(
        addresses: Any = rows.addresses,
        offsets: Any = rows.offsets,
        flags: Any = flags,
        hi: int = 3,
        nearest: int = 0,
        multiplicities: Any = None,
        mixes: Any = (None, None, None, None),
    ) -> None:
        others = (multiplicities, *mixes, 1.0, out.addresses, None)
        _cpu.select_columns(_cpu.supported_isas()[0], addresses, offsets, 2, 1, hi, nearest, *others, flags, 1)

    call()
    for addresses in (rows.addresses.view(np.int64), rows.addresses[0], [1, 2, 3, 4], 0):
        with pytest.raises(TypeError, match=r"rows must be \(n_segments, n\) addresses"):
            call(addresses=addresses)
    with pytest.raises(TypeError, match=r"rows must be \(n_segments, n\) addresses"):
        call(addresses=np.zeros((4, 2), dtype=np.uint64).T)
    for bad in (rows.offsets.astype(np.float64), rows.offsets.astype(np.int32), rows.offsets.byteswap().view(">i8")):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            call(offsets=bad)
    for bad in (frozen, flags.view(np.uint8), np.zeros(8, dtype=np.bool_)[::2]):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            call(flags=bad)
    with pytest.raises(ValueError, match="one flag for each row"):
        call(flags=flags[:3])
    with pytest.raises(ValueError, match="one entry more"):
        call(offsets=rows.offsets[:1])
    call(nearest=4)
    for few in (-1, 5):
        with pytest.raises(ValueError, match="no more values can be near than are selected"):
            call(nearest=few)
    call(hi=4, nearest=2)
    with pytest.raises(ValueError, match="nearest values are taken without multiplicities"):
        call(nearest=2, multiplicities=np.ones(4, dtype=np.int64))
    for cells, message in (
        (np.zeros(4, dtype=np.int64), "some row must have"),
        (np.arange(-1, 3), "must not be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            _cpu.gram(
                _cpu.supported_isas()[0], rows.addresses, rows.offsets, 2, cells, False, 1.0, False, np.zeros((4, 4)), 1
            )
    for shape in ((5, 4), (0, 4), (4, 5)):
        with pytest.raises(ValueError, match="out must have a column for each row and the origin, and at most as many"):
            _cpu.gram(
                _cpu.supported_isas()[0], rows.addresses, rows.offsets, 2, None, False, 1.0, False, np.zeros(shape), 1
            )
    for centres, shape, message in (
        (rows.addresses[:, :2], (1, 4), "one distance for each centre and row"),
        (None, (2, 4), "one distance for each centre and row"),
        (rows.addresses[:, :0], (0, 4), "the centres must have the rows' segments"),
        (np.zeros((2, 1), dtype=np.uint64), (1, 4), "the centres must have the rows' segments"),
    ):
        at = None if centres is None else np.ascontiguousarray(centres)
        with pytest.raises(ValueError, match=message):
            _cpu.row_sq_distances(
                _cpu.supported_isas()[0], rows.addresses, rows.offsets, 2, at, 1.0, True, np.zeros(shape), 1
            )
    for sizes in ((3, 4), (5, 4), (4, 3)):
        shares, found = map(np.ones, sizes)
        with pytest.raises(ValueError, match="one share and one distance for each row"):
            _cpu.sq_distances_to_average(_cpu.supported_isas()[0], rows.addresses, rows.offsets, 2, shares, found, 1)
    with pytest.raises(ValueError, match="multiplicities must not be negative"):
        call(multiplicities=np.arange(-1, 3))
    mix, divisors = np.ones((4, 4)), np.ones(4)
    call(mixes=(mix, divisors, mix, divisors))
    for bad in (0.0, -1.0, np.inf, np.nan):
        for mixes in ((mix, np.full(4, bad), None, None), (None, None, mix, np.full(4, bad))):
            with pytest.raises(ValueError, match="divisors must be positive and finite"):
                call(mixes=mixes)
    for mixes in ((mix, divisors[:3], None, None), (None, divisors, None, None)):
        with pytest.raises(ValueError, match="one divisor for each row of weights"):
            call(mixes=mixes)


def test_bindings_refuse_rows_in_files_that_do_not_fit(tmp_path: Path) -> None:
    _cpu = pytest.importorskip("robustkern._cpu")
    isa, x, page = _cpu.supported_isas()[0], np.arange(4000, dtype=np.float32).reshape(2, 2000), 4096
    (tmp_path / "x").write_bytes(x.tobytes())
    memory, out, key = np.zeros(8 * page, dtype=np.uint8), np.zeros((1, 2000), dtype=np.float32), np.zeros(256, "u4")
    with (tmp_path / "x").open("rb") as file:
        right = Stretches(
            np.full(2, file.fileno()),
            np.array([0, 8000]),
            8000,
            page,
            key,
            3,
            np.zeros((2, 2), dtype=np.uint64),
            address_of(memory) // page * page + page,
            6 * page,
        )

        def call(offsets: Any = (0, 2000), **wrong: Any) -> bool:
            where, weights = right._replace(**wrong), np.array([[1.0, 3.0]])
            done: bool = _cpu.weighted_row_sum(
                isa, where, np.array(offsets), 2, weights, None, Rows.of(out).addresses, 1
            )
            return done

        assert call()
        assert np.array_equal(out[0], x[0] + 3 * x[1])
        assert right.digests.all()
        assert not call(places=np.array([0, 8004]))  # beyond the end
        assert not call(files=np.array([file.fileno(), -1]))
        for wrong, message in (
            ({"places": np.array([0])}, "one place for each file"),
            (
                {"files": np.array([], dtype=np.int64), "places": np.array([], dtype=np.int64)},
                "one place for each file",
            ),
            ({"part": 5000}, "parts must be whole pages"),
            ({"part": 0}, "parts must be whole pages"),
            ({"nbytes": -1}, "parts must be whole pages"),
            ({"digests": right.digests[:1]}, "one hash for each part and row"),
            ({"key": key[:5]}, "the key must have the words of a block"),
            ({"memory_bytes": 2 * page}, "the memory must hold a part of each row"),
            ({"offsets": (0, 1999)}, "rows in files are one segment of as many bytes"),
            ({"offsets": (0, 5, 2000)}, "rows in files are one segment of as many bytes"),
        ):
            with pytest.raises(ValueError, match=message):
                call(**wrong)
        with pytest.raises(ValueError, match="rows in files take nine entries"):
            _cpu.read_rows(isa, tuple(right)[:8], Rows.of(x).addresses[0], 1)
        with pytest.raises(ValueError, match="one place for each row"):
            _cpu.read_rows(isa, right, Rows.of(x).addresses[0, :1], 1)


def test_addresses() -> None:
    arrays: list[Array] = [np.zeros((3, 5), dtype=DTYPES[1]), np.zeros((6, 5))[::-2], np.zeros((0, 4)), np.array(1.0)]
    for x in arrays:
        x.flags.writeable = False
        assert address_of(x) == x.__array_interface__["data"][0]
