"""The four primitives over dtypes and numbers of rows, in read passes of the same rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from robustkern.backends.registry import load_backend
from robustkern.contract.primitives import Window
from robustkern.contract.rows import Rows
from robustkern.measure import reads as rb

BYTES = 1 << 27
SIZES = (8, 16, 32, 64, 256)


@pytest.fixture(scope="module", params=[(n, dtype) for dtype in ("float32", "float64", "bfloat16") for n in SIZES])
def rows(request: pytest.FixtureRequest) -> rb.Array:
    n, dtype = request.param
    return rb.make_rows(n, BYTES // n // rb._dtype(dtype).itemsize, dtype)


def calls(rows: rb.Array, out: rb.Array) -> dict[str, tuple[Callable[[], Any], Callable[[Any, rb.Array], Any]]]:
    """Each primitive on the rows, and what it should give for the first columns of them."""
    kernels, pointers, result = load_backend("cpp"), Rows.of(rows), Rows.of(out)
    n = len(rows)
    median = Window((n - 1) // 2, n // 2 + 1)
    weights = np.full((1, n), 1 / n)
    zero = np.zeros_like(out)
    return {
        "select_columns": (
            lambda: kernels.select_columns(pointers, median, out=result),
            lambda got, x: np.testing.assert_allclose(out[0, : x.shape[1]], np.median(x, axis=0), rtol=1e-2, atol=1e-2),
        ),
        "select_columns with distances": (
            lambda: kernels.select_columns(pointers, median, out=result, distances=True),
            lambda got, x: np.testing.assert_array_less(0, got.sq_distances),
        ),
        "gram": (
            lambda: kernels.gram(pointers),
            lambda got, x: np.testing.assert_array_equal(got, got.T),
        ),
        "row_sq_distances": (
            lambda: kernels.row_sq_distances(pointers, Rows.of(zero)),
            lambda got, x: np.testing.assert_allclose(
                got[0, :3], [(rows[i].astype(np.float64) ** 2).sum() for i in range(3)], rtol=1e-9
            ),
        ),
        "weighted_row_sum": (
            lambda: kernels.weighted_row_sum(pointers, weights, result),
            lambda got, x: np.testing.assert_allclose(out[0, : x.shape[1]], x.mean(axis=0), rtol=1e-2, atol=1e-2),
        ),
    }


PRIMITIVES = tuple(calls(np.zeros((3, 4), np.float32), np.zeros((1, 4), np.float32)))


@pytest.mark.parametrize("primitive", PRIMITIVES)
def test_primitive(benchmark: BenchmarkFixture, rows: rb.Array, read_pass: Any, primitive: str) -> None:
    out = np.zeros((1, rows.shape[1]), dtype=rows.dtype)
    call, check = calls(rows, out)[primitive]
    read = read_pass(rows)
    got = benchmark.pedantic(call, rounds=5, warmup_rounds=1)
    benchmark.group = f"{primitive} {rows.dtype.name}"
    read.note(benchmark, input=rb.INPUT, limit=1)
    check(got, rows[:, :1000].astype(np.float64))
