"""Each rule beside the versions of plain NumPy and of every other library that is installed, on the same data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from robustkern.measure import reads as rb
from robustkern.measure.peers import PEERS, load

N, D = 20, 1_000_000
F = N // 4
RULES = rb.cases()


@pytest.fixture(scope="module")
def rows() -> rb.Array:
    return rb.make_rows(N, D)


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


@pytest.mark.parametrize("backend", ["cpp", "numba"])
@pytest.mark.parametrize("rule", RULES)
def test_robustkern(
    benchmark: BenchmarkFixture, rows: rb.Array, read_pass: Any, expected: Any, rule: str, backend: str
) -> None:
    call, out = rb.job(rule, rows, F, backend)
    read = read_pass(rows)
    benchmark.pedantic(call, rounds=9, warmup_rounds=2)
    benchmark.group = f"{rule} n={N} d={D} float32"
    read.note(benchmark, input=rb.INPUT, limit=rb.least_reads(rule, N, F))
    naive = load("numpy", F)
    want = naive[rule](rows) if rule in naive else expected(rule)
    np.testing.assert_allclose(out, want, atol=2e-5 if rule != "gram" else 1e-3)


@pytest.mark.parametrize("library", PEERS)
@pytest.mark.parametrize("rule", [*RULES, "rfa"])
def test_peers(
    benchmark: BenchmarkFixture, rows: rb.Array, read_pass: Any, expected: Any, rule: str, library: str
) -> None:
    try:
        offered = load(library, F)
    except ImportError as error:
        pytest.skip(f"{library} is not installed: {error}")
    if rule not in offered:
        pytest.skip(f"{library} has no {rule}")
    read = read_pass(rows)
    got = benchmark.pedantic(offered[rule], (rows,), rounds=2)
    benchmark.group = f"{rule} n={N} d={D} float32"
    read.note(benchmark, input=rb.INPUT, limit=rb.least_reads(rule, N, F))
    np.testing.assert_allclose(got, expected(rule), atol=2e-4)  # float32 sums, and looser stops, of their own
