"""What a call costs, whatever comes: nobody who sends some of the rows chooses it. Processor time, on one thread."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from test_rules import long_geometric_median

import robustkern as rk

Array = NDArray[Any]
MOST = 5.0  # times honest rows; what is tested here was 8 to 100


def seconds(call: Callable[[], object]) -> float:
    found = []
    for _ in range(5):
        began = time.process_time()
        call()
        found.append(time.process_time() - began)
    return min(found)


def one_huge(x: Array, f: int) -> None:
    x[0, 0] = 1e30


def tiny(share: float) -> Callable[[Array, int], None]:
    def spoil(x: Array, f: int) -> None:
        x[:f] = (x[:f].astype(np.float64) * share).astype(x.dtype)

    return spoil


def copies(x: Array, f: int) -> None:
    x[:f] = x[-1]


def infinite(x: Array, f: int) -> None:
    x[:f] = np.inf


def some_nan(x: Array, f: int) -> None:
    x[:f, ::7] = np.nan


@pytest.mark.parametrize(
    ("rule", "dtype", "n", "d", "f", "attack"),
    [
        # Products of float32 that vanish, beside squares that overflow.
        ("krum", "float32", 17, 200_000, 4, one_huge),
        ("nnm | mean", "float32", 17, 200_000, 4, one_huge),
        ("ctma(geometric_median)", "bfloat16", 17, 200_000, 4, one_huge),
        # Subnormal numbers, and such whose products are.
        ("krum", "float32", 64, 20_000, 12, tiny(1e-42)),
        ("krum", "float32", 64, 20_000, 12, tiny(1e-22)),
        ("krum", "bfloat16", 64, 20_000, 12, tiny(1e-39)),
        ("krum", "float64", 17, 100_000, 4, tiny(1e-310)),
        ("multi_krum", "float64", 64, 10_000, 12, tiny(1e-155)),
        ("cge", "float64", 17, 100_000, 4, tiny(1e-310)),
        ("ctma(median)", "float64", 17, 100_000, 4, tiny(1e-310)),
        ("nnm | median", "float64", 17, 50_000, 4, tiny(1e-310)),
        ("bucketing(seed=1) | trimmed_mean", "float64", 40, 50_000, 8, tiny(1e-310)),
        # What n-space does for each row of them.
        ("clipping(limit=5.0) | nnm | mean", "float32", 400, 100, 160, copies),
        ("arc | nnm | mean", "float32", 300, 100, 149, lambda x, f: x[:f].fill(0)),
        # Rows that are no numbers.
        ("bucketing(seed=1) | median", "float32", 257, 10_000, 50, infinite),
        ("bucketing(seed=1) | trimmed_mean", "float32", 129, 20_000, 25, some_nan),
        ("rfa", "float64", 500, 5, 200, lambda x, f: x[:f].fill(np.nan)),
    ],
)
def test_attackers_do_not_choose_what_a_call_costs(
    rule: str, dtype: str, n: int, d: int, f: int, attack: Callable[[Array, int], None]
) -> None:
    rk.set_num_threads(1)
    honest = np.random.default_rng(0).standard_normal((n, d)).astype(np.dtype(dtype))
    hostile = honest.copy()
    attack(hostile, f)
    ratio = np.inf
    for _ in range(4):  # other work may come in between
        once, again = (seconds(lambda x=x: rk.aggregate(x, rule, f=f, backend="cpp")) for x in (honest, hostile))
        ratio = min(ratio, again / once)
        if ratio < MOST:
            break
    assert ratio < MOST


@pytest.mark.parametrize("nu", [1e-6, 0.1])
@pytest.mark.parametrize("kind", ["ray", "line", "clusters"])
def test_smoothed_medians_take_few_steps(backend: str, kind: str, nu: float) -> None:
    """Weiszfeld alone takes 1179 steps where some lie on a ray, and has not ended after 10,000 of rows near a line."""
    n, d = 60, 400
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, d))
    if kind == "ray":
        x[:29] = np.outer(np.linspace(1, 2, 29), np.full(d, 10.0))
    elif kind == "line":
        x = np.outer(np.linspace(-1, 1, n), np.ones(d)) + 1e-3 * x
    else:
        x = 1e-3 * x + np.where(np.arange(n) < n // 2, 1, -1)[:, None]
    result, info = rk.aggregate(x, f"geometric_median(nu={nu})", return_info=True)
    assert info.converged
    assert info.iterations is not None
    assert info.iterations <= 60
    spread = float(np.median(np.linalg.norm(x - result, axis=1)))
    if kind == "ray":
        assert np.linalg.norm(result - long_geometric_median(x, 3000)) < 1e-7 * spread
    r = np.linalg.norm(x - result, axis=1)
    assert r.min() > nu  # so it is the geometric median, where the rows pull equally
    assert np.linalg.norm(((x - result) / r[:, None]).sum(axis=0)) < 1e-5


def test_steps_that_are_not_weiszfelds_go_downhill() -> None:
    """From two clusters of uneven weights, and on a line of rows, of which one is the median."""
    rng = np.random.default_rng(3)
    worst = 0
    for n, d, power in ((60, 60, 1), (100, 100, 2), (40, 3, 3), (200, 1, 2)):
        for nu in (1e-9, 1e-2, 1.0):
            x = rng.standard_normal((n, d))
            x[: n // 2] += 100
            weights = rng.random(n) ** power
            costs = []
            for rule in (f"geometric_median(nu={nu}, start='zero')", f"geometric_median(nu={nu})", "geometric_median"):
                result, info = rk.aggregate(x, rule, weights=weights, return_info=True)
                assert info.converged
                worst = max(worst, info.iterations)
                costs.append(float(weights @ np.maximum(np.linalg.norm(x - result, axis=1), nu)))
            assert costs[0] == pytest.approx(costs[1], rel=1e-9)
            assert costs[0] <= costs[2] * (1 + 1e-9) + nu * n
    assert worst < 2000


def test_a_step_that_lands_beside_a_row_is_no_end() -> None:
    values = [100.99174132143689, 100.27823990183794, 98.48664088166372, 100.11307077648665]
    values += [-0.532485742627603, -1.5792598236137336, -0.3425168465118284, -1.4057950106278378]
    weights = [0.8695661603490892, 0.8418855695448523, 0.30484668894074374, 0.39908774718413764]
    weights += [0.9960133277728745, 0.435460602870294, 0.3483739953251924, 0.31498510163975246]
    x = np.array([[0, value] for value in values])
    for rule in ("geometric_median(nu=1e-9)", "geometric_median"):
        assert rk.aggregate(x, rule, weights=weights)[1] == pytest.approx(98.48664088166372, abs=1e-7)
