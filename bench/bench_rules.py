"""Each rule beside its plain NumPy and torch versions, on the same data in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pytest_benchmark.fixture import BenchmarkFixture

import robustkern as rk
from robustkern.demo import naive_rules

Array = NDArray[np.float32]
N, D, F = 20, 1_000_000, 4
NAIVE = naive_rules(F)


@pytest.fixture(scope="module")
def rows() -> Array:
    x = np.random.default_rng(0).standard_normal((N, D), dtype=np.float32)
    x[:F] += 3
    return x


@pytest.fixture(scope="module")
def read_s(rows: Array) -> float:
    """Seconds of one read of the rows (and one write of the result)."""
    out = np.empty(D, dtype=np.float32)
    times = []
    for _ in range(9):
        started = time.perf_counter()
        rk.mean(rows, out=out)
        times.append(time.perf_counter() - started)
    return float(np.median(times))


@pytest.fixture(scope="module")
def expected(rows: Array) -> Callable[[str], Array]:
    known: dict[str, Array] = {}

    def result(rule: str) -> Array:
        if rule not in known:
            known[rule] = NAIVE[rule](rows)
        return known[rule]

    return result


def torch_rules() -> dict[str, Callable[[Any], Any]]:
    torch = pytest.importorskip("torch")

    def weiszfeld(x: Any) -> Any:
        y = x.mean(0)
        while True:
            r = (x - y).norm(dim=1)
            w = 1 / r
            new = (w[:, None] * x).sum(0) / w.sum()
            done = (new - y).norm() <= 1e-7 * r.square().mean().sqrt()
            y = new
            if done:
                return y

    def ctma(x: Any, anchor: Any) -> Any:
        return x[torch.argsort((x - anchor).square().sum(1), stable=True)[: N - F]].mean(0)

    def median(x: Any) -> Any:
        return x.quantile(0.5, dim=0) if N % 2 == 0 else x.median(0).values

    return {
        "median": median,
        "trimmed_mean": lambda x: x.sort(0).values[F : N - F].mean(0),
        "ctma(median)": lambda x: ctma(x, median(x)),
        "geometric_median": weiszfeld,
        "ctma(geometric_median)": lambda x: ctma(x, weiszfeld(x)),
    }


def note(benchmark: BenchmarkFixture, rule: str, read_s: float) -> None:
    info = rk.info()
    benchmark.group = f"{rule} n={N} d={D} float32"
    benchmark.extra_info.update(
        read_pass_s=read_s,
        reads=benchmark.stats.stats.median / read_s,
        isa=info["isa"],
        threads=info["threads"],
    )


@pytest.mark.parametrize("rule", NAIVE)
def test_robustkern(benchmark: BenchmarkFixture, rows: Array, read_s: float, expected: Any, rule: str) -> None:
    plan = rk.parse_rule(rule)
    got = benchmark.pedantic(rk.aggregate, (rows, plan), {"f": F}, rounds=15, warmup_rounds=2)
    note(benchmark, rule, read_s)
    np.testing.assert_allclose(got, expected(rule), atol=2e-6)


@pytest.mark.parametrize("rule", NAIVE)
def test_numpy(benchmark: BenchmarkFixture, rows: Array, read_s: float, expected: Any, rule: str) -> None:
    got = benchmark.pedantic(NAIVE[rule], (rows,), rounds=3)
    note(benchmark, rule, read_s)
    np.testing.assert_allclose(got, expected(rule), atol=2e-6)


@pytest.mark.parametrize("rule", NAIVE)
def test_torch(benchmark: BenchmarkFixture, rows: Array, read_s: float, expected: Any, rule: str) -> None:
    torch = pytest.importorskip("torch")
    got = benchmark.pedantic(torch_rules()[rule], (torch.from_numpy(rows),), rounds=3)
    note(benchmark, rule, read_s)
    np.testing.assert_allclose(got.numpy(), expected(rule), atol=2e-5)  # float32 sums of its own
