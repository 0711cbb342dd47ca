"""Each rule beside the versions of plain NumPy and of every other library that is installed, on the same data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import robustkern as rk
from robustkern.measure import reads as rb
from robustkern.measure.peers import PEERS, load

N, D = 20, 1_000_000
F = N // 4
RULES = rb.cases()


@pytest.fixture(scope="module")
def rows() -> rb.Array:
    return rb.make_rows(N, D)


@pytest.fixture(scope="module")
def read_s(rows: rb.Array) -> float:
    """Seconds of one read of the rows."""
    read = rb.read_pass(rows)
    return float(np.median([rb._time(read) for _ in range(9)]))


@pytest.fixture(scope="module")
def expected(rows: rb.Array) -> Callable[[str], rb.Array]:
    """Return our result of a rule, which `test_robustkern` compares with plain NumPy's."""
    known: dict[str, rb.Array] = {}

    def result(rule: str) -> rb.Array:
        if rule not in known:
            call, known[rule] = rb.job(rule, rows, F)
            call()
        return known[rule]

    return result


def note(benchmark: BenchmarkFixture, group: str, nbytes: int, read_s: float) -> None:
    info = rk.info()
    seconds = benchmark.stats.stats.median
    benchmark.group = group
    benchmark.extra_info.update(
        read_pass_s=read_s,
        reads=seconds / read_s,
        gb_per_s=nbytes / seconds / 1e9,
        isa=info["isa"],
        threads=info["threads"],
    )


@pytest.mark.parametrize("backend", ["cpp", "numba"])
@pytest.mark.parametrize("rule", RULES)
def test_robustkern(
    benchmark: BenchmarkFixture, rows: rb.Array, read_s: float, expected: Any, rule: str, backend: str
) -> None:
    call, out = rb.job(rule, rows, F, backend)
    benchmark.pedantic(call, rounds=9, warmup_rounds=2)
    note(benchmark, f"{rule} n={N} d={D} float32", rows.nbytes, read_s)
    naive = load("numpy", F)
    want = naive[rule](rows) if rule in naive else expected(rule)
    np.testing.assert_allclose(out, want, atol=2e-5 if rule != "gram" else 1e-3)


@pytest.mark.parametrize("library", PEERS)
@pytest.mark.parametrize("rule", [*RULES, "rfa"])
def test_peers(
    benchmark: BenchmarkFixture, rows: rb.Array, read_s: float, expected: Any, rule: str, library: str
) -> None:
    try:
        offered = load(library, F)
    except ImportError as error:
        pytest.skip(f"{library} is not installed: {error}")
    if rule not in offered:
        pytest.skip(f"{library} has no {rule}")
    got = benchmark.pedantic(offered[rule], (rows,), rounds=2)
    note(benchmark, f"{rule} n={N} d={D} float32", rows.nbytes, read_s)
    np.testing.assert_allclose(got, expected(rule), atol=2e-4)  # float32 sums, and looser stops, of their own
