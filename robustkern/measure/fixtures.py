"""Fixtures for suites of pytest-benchmark: ``from robustkern.measure.fixtures import read_pass`` in a conftest.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from robustkern.measure import reads

__all__ = ["ReadPass", "read_pass"]

ROUNDS = 9


class ReadPass:
    """One streaming read of some rows, timed: what a benchmark's time is a multiple of.

    Parameters
    ----------
    rows : (n, d) array
        Of NumPy, of any dtype that the kernels take; what is measured should be larger than the caches.

    Attributes
    ----------
    seconds : float
        Median of some passes.
    """

    def __init__(self, rows: reads.Array) -> None:
        self._rows = rows
        read = reads.read_pass(rows)
        self.seconds = float(np.median([reads.seconds_of(read) for _ in range(ROUNDS)]))

    def note(self, benchmark: Any, *, input: str = "", limit: float | None = None) -> None:
        """Write into a benchmark that has run what its time is in reads, and on what.

        Parameters
        ----------
        benchmark : pytest_benchmark.fixture.BenchmarkFixture
            The fixture, after its call.
        input : str
            What the values are, such as "normal, a quarter of the rows far away".
        limit : float, optional
            The reads that what was measured needs at least.
        """
        if benchmark.stats is None:  # --benchmark-disable, or pytest-xdist: it ran, and nobody timed it
            return
        stats, here = benchmark.stats.stats, reads.machine()
        n, d = self._rows.shape
        benchmark.extra_info.update(
            read_pass_s=self.seconds,
            reads=stats.median / self.seconds,
            low=stats.q1 / self.seconds,
            high=stats.q3 / self.seconds,
            limit=limit,
            input=input,
            n=n,
            d=d,
            dtype=self._rows.dtype.name,
            gb_per_s=self._rows.nbytes / stats.median / 1e9,
            isa=here["isa"],
            threads=here["threads"],
        )


@pytest.fixture
def read_pass() -> Callable[[reads.Array], ReadPass]:
    """Return what times one read of rows, now: `ReadPass`.

    Examples
    --------
    In a ``conftest.py``, ``from robustkern.measure.fixtures import read_pass``; then::

        def test_mean(benchmark, read_pass):
            rows = np.random.default_rng(0).standard_normal((20, 1_000_000), dtype=np.float32)
            read = read_pass(rows)
            benchmark(rows.mean, axis=0)
            read.note(benchmark, input="normal", limit=1)
    """
    return ReadPass
