"""The converged geometric median: against higher precision, in degenerate positions, and whatever the last bits are."""

from __future__ import annotations

import math
import time
from typing import Any

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import robustkern as rk
from robustkern.rules import geometry
from robustkern.rules import least_distances as solver
from robustkern.rules.least_distances import Median, converged_weights

Array = NDArray[Any]
ROUNDING = 384 * 2.0**-53  # of so few columns
Wide = NDArray[np.longdouble]


def centred(x: Array) -> Wide:
    """Rows as the geometry sees them: less their column-wise lower median."""
    return x.astype(np.longdouble) - np.sort(x, axis=0)[(len(x) - 1) // 2]


def gram_of(x: Array) -> Array:
    y = centred(x).astype(np.float64)
    return y @ y.T


def solve(x: Array, s: Array | None = None) -> Median:
    weights = np.ones(len(x)) if s is None else np.asarray(s, dtype=np.float64)
    found = converged_weights(gram_of(x), weights, ROUNDING)
    assert found.steps <= solver.MAX_STEPS
    assert found.weights.sum() == pytest.approx(1, abs=1e-12)
    return found


def point(x: Array, found: Median) -> Wide:
    return found.weights.astype(np.longdouble) @ centred(x)


def cost(x: Array, y: Wide, s: Array | None = None) -> np.longdouble:
    r = np.sqrt(((centred(x) - y) ** 2).sum(axis=1))
    return np.longdouble((r if s is None else r * s).sum())


def unit(x: Array, y: Wide, s: Array | None = None) -> float:
    """What the gap is measured in: the weight times the middle distance, by weight."""
    r = np.sqrt(((centred(x) - y) ** 2).sum(axis=1))
    weights = np.ones(len(x)) if s is None else s
    order = np.argsort(r)
    share = np.cumsum(weights[order])
    k = min(int(np.searchsorted(share, share[-1] * (0.5 + 1e-9), side="right")), len(x) - 1)
    return float(r[order[k]] * share[-1])


def oracle(x: Array, y: Wide, s: Array | None = None) -> Wide:
    """The minimiser to 30 digits: the best row if Kuhn says so, or by Newton in coordinates, from a point near by."""
    rows, weights = centred(x), np.ones(len(x)) if s is None else s
    best = min(range(len(x)), key=lambda k: cost(x, rows[k], s))
    with mpmath.workdps(50):
        points = [mpmath.matrix([mpmath.mpf(float(v)) for v in row]) for row in rows.astype(np.float64)]
        w = [mpmath.mpf(float(v)) for v in weights]

        def pulls(at: Any) -> tuple[Any, list[Any], Any]:
            away = [p - at for p in points]
            r = [mpmath.norm(u) for u in away]
            total = mpmath.matrix(len(at), 1)
            for u, ri, wi in zip(away, r, w, strict=True):
                if ri > 0:
                    total += u * (wi / ri)
            return total, r, away

        total, r, _ = pulls(points[best])
        if mpmath.norm(total) <= sum(wi for wi, ri in zip(w, r, strict=True) if ri == 0):
            return rows[best]
        at = mpmath.matrix([mpmath.mpf(float(v)) for v in y])
        if min(pulls(at)[1]) == 0:
            at += (sum(points[1:], points[0]) / len(points) - at) * mpmath.mpf(10) ** -12
        for _ in range(60):
            total, r, away = pulls(at)
            if mpmath.norm(total) < mpmath.mpf(10) ** -38 * sum(w):
                break
            hessian = mpmath.eye(len(at)) * sum(wi / ri for wi, ri in zip(w, r, strict=True))
            for u, ri, wi in zip(away, r, w, strict=True):
                hessian -= (u * u.T) * (wi / ri**3)
            try:
                step = mpmath.lu_solve(hessian, total)
            except ZeroDivisionError:  # flat
                break
            now, share = mpmath.fsum(a * b for a, b in zip(w, r, strict=True)), mpmath.mpf(1)
            while share > mpmath.mpf(10) ** -30:
                after = [mpmath.norm(p - at - step * share) for p in points]
                if mpmath.fsum(a * b for a, b in zip(w, after, strict=True)) <= now:
                    break
                share /= 2
            at += step * share
        return np.array([np.longdouble(mpmath.nstr(v, 30)) for v in at])


# ---- kinds of input ----------------------------------------------------------------------------------------------


def random_rows(rng: Any, n: int, d: int) -> Array:
    return np.asarray(rng.standard_normal((n, d)))


def clusters(rng: Any, n: int, d: int, spread: float, count: int = 2) -> Array:
    centres = np.arange(2)[:, None] * np.ones(d) if count == 2 else rng.standard_normal((count, d))
    return np.asarray(spread * rng.standard_normal((n, d)) + centres[np.arange(n) % count])


def along_a_line(rng: Any, n: int, d: int, off: float) -> Array:
    return np.asarray(rng.standard_normal((n, 1)) * rng.standard_normal(d) + off * rng.standard_normal((n, d)))


def corner(rng: Any, n: int, d: int, excess: float) -> tuple[Array, Array]:
    """A row whose weight the others outweigh by this much."""
    x = rng.standard_normal((n, d))
    away = x[1:] - x[0]
    s = np.ones(n)
    s[0] = np.sqrt(((away / np.sqrt((away**2).sum(axis=1))[:, None]).sum(axis=0) ** 2).sum()) - excess
    return x, s


def wanderer() -> Array:
    """Four corners of a long quadrilateral, on whose diagonal rounding once wandered for 300 steps."""
    x = np.ones((4, 37))
    x[0, 1] = x[1, 1] = 0
    x[1, 35], x[2, 35] = 4207, 2378
    return x


def any_input(rng: Any) -> tuple[Array, Array]:
    n, d = int(rng.choice([2, 3, 4, 5, 8, 9, 13])), int(rng.choice([1, 2, 3, 6]))
    size = 10.0 ** rng.uniform(-14, 0)
    s = np.ones(n)
    kind = rng.integers(9)
    if kind == 0:
        x = random_rows(rng, n, d)
    elif kind in (1, 2):
        x = clusters(rng, n, d, size, 2 + (kind == 2))
    elif kind == 3:
        x = along_a_line(rng, n, d, size)
    elif kind == 4:
        x = random_rows(rng, max(n // 2, 1), d)[rng.integers(0, max(n // 2, 1), n)]
        x = x + size * rng.integers(0, 2) * rng.standard_normal((n, d))
    elif kind == 5:
        x, s = corner(rng, max(n, 3), d, size * rng.choice([-1, 1]))
        s[0] = max(s[0], 1e-3)
    elif kind == 6:
        x = random_rows(rng, n, d)
        x[: (n - 1) // 2] *= 10.0 ** rng.uniform(3, 15)
    elif kind == 7:
        x, s = np.round(3 * random_rows(rng, n, d)), rng.integers(1, 4, n).astype(np.float64)
    else:
        x = random_rows(rng, n, d)
        s[0] = n - 1 + size * rng.choice([0, 1, -1])
    return np.asarray(x, dtype=np.float64), s


# ---- convergence -------------------------------------------------------------------------------------------------


def test_two_balanced_clusters_always_converge() -> None:
    """What half honest, half colluding workers look like: the issue's 200 inputs."""
    for seed in range(200):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((40, 300)).astype(np.float32)
        x = x * np.float32(1e-4) + (np.arange(40) % 2)[:, None].astype(np.float32)
        found = solve(x)
        assert found.converged
        assert found.gap <= 1e-12
        assert 1 <= found.steps <= 20
        if seed % 50 == 0:
            for rule in ("geometric_median", "ctma(geometric_median)"):
                _, info = rk.aggregate(x, rule, f=12, return_info=True)
                assert rule != "geometric_median" or info.converged


@pytest.mark.parametrize("spread", [10.0**-k for k in range(2, 9)])
def test_clusters_of_any_spread(spread: float) -> None:
    for seed in range(10):
        rng = np.random.default_rng(seed)
        for n, d in ((4, 3), (10, 5), (40, 30), (41, 30)):
            for count in (2, 3):
                found = solve(clusters(rng, n, d, spread, count))
                assert found.converged
                assert found.steps <= 30
                assert found.gap <= 1e-4


@pytest.mark.parametrize("off", [10.0**-k for k in range(1, 15)])
def test_rows_almost_on_a_line(off: float) -> None:
    for n in (3, 4, 5, 8, 9, 40):
        for seed in range(20):
            found = solve(along_a_line(np.random.default_rng(seed), n, 6, off))
            assert found.converged
            assert found.steps <= 20
            assert found.gap <= 1e-7


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 9, 40, 41])
def test_rows_on_a_line_give_the_middle_of_the_middle_rows(n: int) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        t = rng.standard_normal(n)
        x = t[:, None] * np.array([1.0, 2, -1])
        got, info = rk.geometric_median(x, return_info=True)
        assert info.converged
        assert info.iterations == 0
        np.testing.assert_allclose(got, np.median(t) * np.array([1.0, 2, -1]), rtol=0, atol=1e-12)


def test_exact_clusters_meet_in_the_middle() -> None:
    x = np.repeat([[0.0, 1, 2], [3, 3, 3]], 5, axis=0)
    np.testing.assert_allclose(rk.geometric_median(x), x[[0, -1]].mean(axis=0), rtol=1e-15)
    got, info = rk.geometric_median(x[1:], return_info=True)
    assert np.array_equal(got, x[-1])
    assert info.converged


def test_a_wanderer_stops_early() -> None:
    x = wanderer()
    found = solve(x)
    assert found.converged
    assert found.steps <= 10
    assert found.gap <= 1e-12
    crossing = 4206 / 6583  # of the diagonals
    assert point(x, found)[35] - centred(x)[3, 35] == pytest.approx(2377 * crossing, rel=1e-7)


def test_few_rows() -> None:
    x = np.array([[1.0, 2], [1, 2], [1, 5], [9, 9]])
    assert solve(x[:1]) == (1.0, 0, True, 0.0)
    assert solve(x[1:3]).weights.tolist() == [0.5, 0.5]
    assert solve(x[:2]).weights.tolist() == [1, 0]
    assert solve(x[:3]).weights.tolist() == [1, 0, 0]
    assert solve(x[1:]).converged


@pytest.mark.parametrize(("n", "singles"), [(2, [False]), (3, [True])])
def test_two_rows_are_measured_once(n: int, singles: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64: of two rows float32 products decide nothing, so asking for them was a read in vain."""
    monkeypatch.setattr(geometry, "SINGLE_VALUES", 0)
    asked, gram_pass = [], geometry.Given.gram_pass

    def counted(self: geometry.Given, scale: float, single: bool) -> Any:
        asked.append(single)
        return gram_pass(self, scale, single)

    monkeypatch.setattr(geometry.Given, "gram_pass", counted)
    x = np.random.default_rng(3).standard_normal((n, 1000)).astype(np.float32)
    got = rk.aggregate(x, "geometric_median", f=0)
    assert asked == singles
    if n == 2:
        assert got.tobytes() == x.mean(axis=0, dtype=np.float64).astype(np.float32).tobytes()


@pytest.mark.parametrize(("others", "row"), [(1.0, True), (1 + 1e-6, False), (1 - 1e-6, True)])
def test_weight_of_exactly_half(others: float, row: bool) -> None:
    """The heavy row, unless it is outweighed in one direction; equal weights on both sides leave the way open."""
    x = np.array([[0.0, 0], [1, 0], [1, 0], [1, 0]])
    s = np.array([3.0, 1, 1, 1])
    assert solve(x, s).weights.tolist() == [0.5, 0.5, 0, 0]
    s[1:] = others
    if others != 1:
        assert solve(x, s).weights.tolist() == ([1, 0, 0, 0] if row else [0, 1, 0, 0])
    spread = random_rows(np.random.default_rng(0), 6, 3)
    assert solve(spread, np.array([5 * 1.0, 1, 1, 1, 1, 1])).weights.tolist() == [1, 0, 0, 0, 0, 0]


def test_far_attackers_cost_no_digits() -> None:
    for far in (1e9, 1e12, 1e15):
        for seed in range(10):
            x = random_rows(np.random.default_rng(seed), 11, 4)
            x[:5] *= far
            found = solve(x)
            assert found.converged
            assert found.gap <= 1e-9
            y = oracle(x, point(x, found))
            assert float(cost(x, point(x, found)) - cost(x, y)) <= 1e-12 * far * 2.0**-10 + 1e-9


def test_wide_magnitudes() -> None:
    """A row's own unit neither overflows nor vanishes."""
    x = random_rows(np.random.default_rng(0), 9, 4)
    want = solve(x).weights
    for scale in (1e-120, 1e-60, 1e60, 1e145):
        np.testing.assert_allclose(solve(x * scale).weights, want, atol=1e-12)
    x[:4] *= 1e150
    assert solve(x).converged


# ---- against higher precision --------------------------------------------------------------------------------------


@pytest.mark.parametrize("excess", [1e-1, 1e-3, 1e-6, 1e-9, -1e-9, -1e-3])
def test_a_minimiser_beside_a_row(excess: float) -> None:
    """Vardi's and Zhang's corner: plain Weiszfeld crawls here."""
    for seed in range(5):
        x, s = corner(np.random.default_rng(seed), 7, 3, excess)
        found = solve(x, s)
        assert found.converged
        y = point(x, found)
        want = oracle(x, y, s)
        assert float(np.sqrt(((y - want) ** 2).sum())) <= 1e-10
        if excess < 0:
            assert found.steps == 0
            assert found.weights[0] == 1


@pytest.mark.parametrize("apart", [10.0**-k for k in range(2, 16, 2)])
def test_copies_that_are_none(apart: float) -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        x = random_rows(rng, 9, 3)
        x[1] = x[0] + apart * rng.standard_normal(3)
        x[4:6] = x[3] + apart * rng.standard_normal((2, 3))
        found = solve(x)
        assert found.converged
        y = point(x, found)
        assert float(cost(x, y) - cost(x, oracle(x, y))) / unit(x, y) <= 1e-10


@pytest.mark.parametrize("exponent", range(14, 48))
@pytest.mark.parametrize("many", [False, True])
def test_the_median_among_rows_that_hardly_differ(exponent: int, many: bool) -> None:
    """Squares of distances of 1e-38 are nothing beside 1, and steps between such rows went nowhere."""
    for n, entries in (
        (7, [(0, 0, 1), (2, 2, 1), (3, 1, 0), (5, 0, 1), (6, 1, 1)]),
        (6, [(1, 0, 0), (2, 1, 1), (3, 0, 1), (5, 1, 1)]),
        (6, [(1, 0, 0), (2, 0, 1), (3, 1, 1), (5, 2, 1)]),
    ):
        x = np.zeros((n, 5))
        for row, column, value in entries:
            x[row, column] = value or 10.0**-exponent
        x = np.repeat(x, 40, axis=0) if many else x
        for size in (1.0, 1e-3, 1e10):
            got, info = rk.geometric_median(x * size, return_info=True)
            assert info.converged
            assert info.gap < 1e-12
            # It lies among the rows that hardly differ, which are less than half.
            assert np.abs(got).max() <= size * 10.0**-exponent


def test_random_rows_to_the_promise() -> None:
    for seed, n in enumerate((3, 4, 5, 8, 12, 20)):
        x = random_rows(np.random.default_rng(seed), n, 4)
        found = solve(x)
        y = point(x, found)
        want = oracle(x, y)
        spread = float(np.median(np.sqrt(((centred(x) - want) ** 2).sum(axis=1))))
        assert float(np.sqrt(((y - want) ** 2).sum())) <= 1e-10 * spread


def test_cluster_points_to_the_promise_their_curvature_permits() -> None:
    """Rounding moves a minimiser by as much as it moves the gradient, divided by the curvature: spread^2."""
    for spread in (1e-1, 1e-2, 1e-3, 1e-4):
        for seed in range(3):
            x = clusters(np.random.default_rng(seed), 8, 3, spread)
            y = point(x, solve(x))
            want = oracle(x, y)
            assert float(np.sqrt(((y - want) ** 2).sum())) <= max(1e-10, 1e-13 / spread**2)


def test_the_gap_bounds_what_the_cost_can_fall() -> None:
    rng = np.random.default_rng(7)
    for _ in range(40):
        x, s = any_input(rng)
        found = solve(x, s)
        y = point(x, found)
        fall = float(cost(x, y, s) - min(cost(x, oracle(x, y, s), s), *(cost(x, row, s) for row in centred(x))))
        assert fall <= (found.gap + 1e-17) * unit(x, y, s) + 1e-300


def test_a_gap_of_too_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound holds wherever the solver stops, and is what says that it stopped too early."""
    x = random_rows(np.random.default_rng(0), 9, 5)
    for steps in (1, 2):
        monkeypatch.setattr(solver, "MAX_STEPS", steps)
        found = solve(x)
        y = point(x, found)
        fall = float(cost(x, y) - cost(x, oracle(x, y))) / unit(x, y)
        assert fall <= found.gap <= 1e-1
        assert found.steps == steps
        assert not found.converged
        with pytest.warns(rk.ConvergenceWarning, match=f"geometric_median: no convergence after {steps} steps"):
            rk.geometric_median(x)


# ---- many rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [199, 200, 201, 256, 257])
def test_factorised_and_by_products_agree(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    for x in (random_rows(np.random.default_rng(n), n, 6), clusters(np.random.default_rng(n), n, 6, 1e-2)):
        got = []
        for rows in (0, 10_000):
            monkeypatch.setattr(solver, "SOLVED_ROWS", rows)
            found = solve(x)
            assert found.converged
            got.append(point(x, found))
        np.testing.assert_allclose(got[0].astype(float), got[1].astype(float), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["random", "clusters", "line"])
@pytest.mark.parametrize("n", [1000, pytest.param(4096, marks=pytest.mark.slow)])
def test_many_rows(kind: str, n: int) -> None:
    rng = np.random.default_rng(0)
    x = {
        "random": lambda: random_rows(rng, n, 8),
        "clusters": lambda: clusters(rng, n, 8, 1e-4),
        "line": lambda: along_a_line(rng, n, 6, 1e-6),
    }[kind]()
    began = time.perf_counter()
    found = solve(x)
    assert found.converged
    assert found.gap <= 1e-10
    assert time.perf_counter() - began < 60


def test_products_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver, "SOLVED_ROWS", 0)
    monkeypatch.setattr(solver, "MAX_PRODUCTS", 5)
    x = random_rows(np.random.default_rng(0), 30, 5)
    found = solve(x)
    assert not found.converged
    y = point(x, found)
    monkeypatch.undo()
    best = point(x, solve(x))
    assert float(cost(x, y) - cost(x, best)) / unit(x, y) <= found.gap


# ---- last bits ---------------------------------------------------------------------------------------------------


class Shaky(np.ndarray[Any, Any]):
    """An array whose matrix products end in random bits, as those of another BLAS kernel do."""

    rng = np.random.default_rng(0)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        plain = [a.view(np.ndarray) if isinstance(a, Shaky) else a for a in inputs]
        if "out" in kwargs:
            kwargs["out"] = tuple(a.view(np.ndarray) for a in kwargs["out"])
        if isinstance(kwargs.get("where"), Shaky):
            kwargs["where"] = kwargs["where"].view(np.ndarray)
        result = getattr(ufunc, method)(*plain, **kwargs)
        if ufunc is np.matmul:
            result = result * (1 + self.rng.integers(-2, 3, np.shape(result)) * 2.0**-53)
        return result.view(Shaky) if isinstance(result, np.ndarray) else result


def shaken(gram: Array, rng: Any) -> Array:
    bits = np.triu(rng.integers(-2, 3, gram.shape))
    return gram * (1 + (bits + np.triu(bits, 1).T) * 2.0**-53)


def same_within_the_promise(x: Array, s: Array, one: Median, other: Median) -> None:
    """Equal verdicts; points as far apart as their gaps leave them, or closer than the promise."""
    assert one.converged == other.converged
    a, b = point(x, one), point(x, other)
    away = abs(float(cost(x, a, s) - cost(x, b, s)))
    assert away <= (max(one.gap, other.gap) + 1e-15) * max(unit(x, a, s), unit(x, b, s)) + 1e-300


@pytest.mark.parametrize("seed", range(10))
def test_last_bits_decide_nothing(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    rng = np.random.default_rng(seed)
    plain = np.linalg.solve

    def solve_shaken(a: Any, b: Any) -> Any:
        return plain(np.asarray(a), np.asarray(b)) * (1 + rng.integers(-2, 3, b.shape) * 2.0**-53)

    for _ in range(40):
        x, s = any_input(rng)
        gram, rounding = gram_of(x), ROUNDING
        want = converged_weights(gram, s, rounding)
        assert want.converged
        same_within_the_promise(x, s, want, converged_weights(shaken(gram, rng), s, rounding))
        with monkeypatch.context() as patch:
            patch.setattr(np.linalg, "solve", solve_shaken)
            found = converged_weights(gram.copy().view(Shaky), s, rounding)
        same_within_the_promise(x, s, want, found)


@pytest.mark.parametrize("seed", range(5))
def test_last_bits_move_no_point_where_there_is_curvature(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cases = [(random_rows(rng, n, d), 1e-12) for n, d in ((5, 3), (10, 50), (40, 6))]
    cases += [
        (clusters(rng, n, 30, spread), max(1e-12, 1e-14 / spread**2)) for n in (10, 40) for spread in (1e-2, 1e-4)
    ]
    cases += [(along_a_line(rng, 9, 5, off), 1e-12) for off in (1e-2, 1e-8, 0.0)]
    cases += [(along_a_line(rng, 8, 5, off), 1e-12) for off in (1e-10, 0.0)]  # the middle of two rows
    for x, tolerance in cases:
        s = np.ones(len(x))
        gram, rounding = gram_of(x), ROUNDING
        want = point(x, converged_weights(gram, s, rounding))
        spread = float(np.median(np.sqrt(((centred(x) - want) ** 2).sum(axis=1))))
        for _ in range(5):
            for other in (shaken(gram, rng), gram.copy().view(Shaky)):
                got = point(x, converged_weights(other, s, rounding))
                assert float(np.sqrt(((got - want) ** 2).sum())) <= tolerance * spread


# ---- made-up inputs ------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1))
def test_degenerate_positions_converge(seed: int) -> None:
    x, s = any_input(np.random.default_rng(seed))
    found = solve(x, s)
    assert found.converged
    assert 0 <= found.gap < math.inf
    y = point(x, found)
    least = min(float(cost(x, row, s)) for row in centred(x))
    assert float(cost(x, y, s)) <= least + (found.gap + 1e-10) * max(unit(x, y, s), 1e-300)


@given(
    st.lists(
        st.tuples(*[st.one_of(st.sampled_from([0.0, 1.0, -1.0]), st.floats(-1e6, 1e6, width=32))] * 3),
        min_size=1,
        max_size=12,
    )
)
def test_any_rows_converge(rows: list[tuple[float, ...]]) -> None:
    x = np.array(rows)
    _, info = rk.geometric_median(x, return_info=True)  # a ConvergenceWarning is an error here
    assert info.converged


@pytest.mark.parametrize("size", [1e-309, 1e-200, 1e-155, 1e-100, 1e100, 1e150])
def test_rows_of_any_size(size: float) -> None:
    for seed in range(4):
        x = np.random.default_rng(seed).standard_normal((3, 2))
        got, info = rk.geometric_median(x * size, return_info=True)
        assert info.converged
        assert info.gap < 1e-10
        want = rk.geometric_median(x)
        np.testing.assert_allclose(got / size, want, atol=1e-9 if size > 1e-300 else 1e-5)


# ---- many rows of few columns --------------------------------------------------------------------------------------


def in_columns(x: Array, s: Array) -> Median:
    return converged_weights(solver.Products(centred(x).astype(np.float64)), s, ROUNDING)


@given(st.integers(0, 2**32 - 1))
def test_in_columns_as_by_products(seed: int) -> None:
    x, s = any_input(np.random.default_rng(seed))
    found, want = in_columns(x, s), converged_weights(gram_of(x), s, ROUNDING)
    difference = float(cost(x, point(x, found), s) - cost(x, point(x, want), s))
    promised = (found.gap + want.gap + 1e-9) * unit(x, point(x, want), s)
    assert abs(difference) <= promised + 1e-13 * float(cost(x, point(x, want), s))


def kinds_of_many(rng: Any, n: int, d: int) -> dict[str, Array]:
    copies = random_rows(rng, 40, d)[rng.integers(0, 40, n)]
    half = random_rows(rng, n, d)
    half[: n // 2 + 1] = half[0]
    far = random_rows(rng, n, d)
    far[: n // 3] *= 1e12
    return {
        "random": random_rows(rng, n, d),
        "two clusters": clusters(rng, n, d, 1e-4),
        "three clusters": clusters(rng, n, d, 1e-3, 3),
        "line": along_a_line(rng, n, d, 0.0),
        "almost a line": along_a_line(rng, n, d, 1e-6),
        "copies": copies,
        "half of them copies": half,
        "far": far,
        "two points": np.repeat([[0.0] * d, [1.0] * d], n // 2, axis=0),
        "whole numbers": np.round(2 * random_rows(rng, n, d)),
    }


@pytest.mark.parametrize("n", [512, 601])
@pytest.mark.parametrize("kind", list(kinds_of_many(np.random.default_rng(0), 8, 2)))
def test_many_rows_of_few_columns(monkeypatch: pytest.MonkeyPatch, n: int, kind: str) -> None:
    for d in (1, 3, 20):
        x = kinds_of_many(np.random.default_rng(d), n, d)[kind]
        got, info = rk.geometric_median(x, return_info=True)
        with monkeypatch.context() as patch:
            patch.setattr(geometry, "ROWS_PER_COLUMN", 10**9)
            want, known = rk.geometric_median(x, return_info=True)
        assert info.converged
        y, z = (np.longdouble(1) * p - np.sort(x, axis=0)[(len(x) - 1) // 2] for p in (got, want))
        assert abs(float(cost(x, y) - cost(x, z))) <= (1e-9 + info.gap + known.gap) * (unit(x, z) or 1) + 1e-12 * float(
            cost(x, z)
        )
        np.testing.assert_allclose(info.sq_distances, ((x - got) ** 2).sum(axis=1), rtol=1e-6, atol=1e-9)


def test_few_columns_know_bad_rows_and_weights() -> None:
    x = random_rows(np.random.default_rng(0), 600, 5)
    s = np.random.default_rng(1).integers(0, 5, 600).astype(float)
    bad = x.copy()
    bad[:50, 2], bad[50:60] = np.nan, np.inf
    got, info = rk.geometric_median(bad, f=60, weights=s, delta=None, return_info=True)
    assert info.nonfinite_rows == tuple(range(60))
    assert info.weights is not None
    assert not info.weights[:60].any()
    np.testing.assert_allclose(got, rk.geometric_median(x[60:], weights=s[60:]), rtol=1e-9)
    with pytest.raises(rk.NonFiniteError, match="60 rows hold NaN or Inf"):
        rk.geometric_median(bad, f=59)
    for scale in (1e-200, 1e150):  # squares need a scale: by products
        np.testing.assert_allclose(rk.geometric_median(x * scale) / scale, rk.geometric_median(x), rtol=1e-9)
    float32 = [{"a": row[:2].astype(np.float32), "b": row[2:]} for row in x]
    got = rk.geometric_median(float32)
    np.testing.assert_allclose(np.concatenate([got["a"], got["b"]]), rk.geometric_median(x), rtol=1e-5)
    want, mine = rk.ctma(x, f=60, anchor="geometric_median", return_info=True)
    near = np.argsort(((x - rk.geometric_median(x)) ** 2).sum(axis=1))[:540]
    assert mine.kept is not None
    assert set(np.flatnonzero(mine.kept)) == set(near.tolist())
    np.testing.assert_allclose(want, x[near].mean(axis=0), atol=1e-12)


def test_many_rows_of_few_columns_take_little_time() -> None:
    """Against plain Weiszfeld on the columns, in one run; it took n^3 steps of Python's, 5.6 s and 570 MB."""
    x = np.random.default_rng(1).standard_normal((3000, 20)).astype(np.float32)

    def plain() -> None:
        rows = x.astype(float)
        y = np.median(rows, axis=0)
        for _ in range(300):
            w = 1 / np.maximum(np.sqrt(((rows - y) ** 2).sum(axis=1)), 1e-12)
            new = w @ rows / w.sum()
            done = abs(new - y).max() < 1e-12
            y = new
            if done:
                break

    def seconds(call: Any) -> float:
        times = []
        for _ in range(5):
            started = time.process_time()
            call()
            times.append(time.process_time() - started)
        return min(times)

    assert seconds(lambda: rk.geometric_median(x)) < 20 * seconds(plain)


def test_few_columns_are_centred_on_who_has_weight() -> None:
    g = np.random.default_rng(0)
    x = g.standard_normal((600, 5)) * 1e-3
    x[:400] += 1e5
    weights = np.r_[np.zeros(400), np.ones(200)]
    np.testing.assert_allclose(rk.geometric_median(x, weights=weights), rk.geometric_median(x[400:]), atol=1e-12)
    tiny = g.standard_normal((600, 5)) * 1e-170
    tiny[0] = 1
    np.testing.assert_allclose(
        rk.geometric_median(tiny, f=1), rk.geometric_median(tiny * 1e170, f=1) * 1e-170, atol=1e-171
    )


@pytest.mark.parametrize("n", [512, 600, 1000])
def test_few_columns_meet_in_the_middle(n: int) -> None:
    x = np.zeros((n, 3))
    x[n // 2 :] = 1
    for rows in (x, x[::-1], x[np.random.default_rng(0).permutation(n)]):
        np.testing.assert_allclose(rk.geometric_median(rows), 0.5, rtol=1e-15)
    line = np.random.default_rng(1).standard_normal((n, 1))
    line[: n // 3] = 1e30
    np.testing.assert_allclose(rk.geometric_median(line), np.median(line), rtol=1e-12)
    np.testing.assert_allclose(rk.geometric_median(line[::-1]), np.median(line), rtol=1e-12)
