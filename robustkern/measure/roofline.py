"""A model of what a GPU could do at best: bytes over its bandwidth, against the operations of the kernels that select.

Nothing here is measured, and wherever it is shown it says so. The model knows no launch, no latency and no cache, nor
the products of the Gram matrix: a GPU is slower than its model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from robustkern.rules import Chain, parse_rule

__all__ = ["LABEL", "MODELS", "Gpu", "Operations", "model_seconds", "selection", "selection_network"]

LABEL = "model, not measured"


@dataclass(frozen=True)
class Gpu:
    """What makers publish of a GPU.

    Attributes
    ----------
    name : str
        Of the product.
    bandwidth, memory : float, float
        Of its memory: bytes per second, and bytes.
    multiprocessors : int
        Their number.
    hertz : float
        The highest clock.
    minmax, float64 : int, int
        Results per clock and multiprocessor: float32 minima and maxima, float64 operations.
    """

    name: str
    bandwidth: float
    memory: float
    multiprocessors: int
    hertz: float
    minmax: int
    float64: int


#: Data sheets; results per clock from the table of throughputs in the CUDA C++ Programming Guide.
MODELS = {
    "a100": Gpu("A100 SXM 80 GB", 2.039e12, 80e9, 108, 1.41e9, 64, 32),
    "h100": Gpu("H100 SXM 80 GB", 3.35e12, 80e9, 132, 1.98e9, 64, 64),
    "rtx4090": Gpu("RTX 4090", 1.008e12, 24e9, 128, 2.52e9, 64, 2),
}


def _merge(first: int, size: int, stride: int, n: int) -> Iterator[tuple[int, int]]:
    step = 2 * stride
    if step < size:
        yield from _merge(first, size, step, n)
        yield from _merge(first + stride, size, step, n)
        for i in range(first + stride, min(first + size, n) - stride, step):
            yield i, i + stride
    elif first + stride < n:
        yield first, first + stride


def _sort(first: int, size: int, n: int) -> Iterator[tuple[int, int]]:
    if size < 2 or first >= n:
        return
    yield from _sort(first, size // 2, n)
    yield from _sort(first + size // 2, size // 2, n)
    yield from _merge(first, size, 1, n)


def selection_network(n: int, lo: int, hi: int) -> tuple[int, int]:
    """Count Batcher's odd-even merge sort, pruned to the ranks [lo, hi), as `csrc/common/networks.h` makes it.

    Returns
    -------
    comparators, results : int, int
        How many comparators are left, and how many of their minima and maxima are needed (two each at most).
    """
    size = 1 << (n - 1).bit_length()
    needed = [lo <= i < hi for i in range(n)]
    comparators = results = 0
    for low, high in reversed(list(_sort(0, size, n))):
        if needed[low] or needed[high]:
            comparators += 1
            results += needed[low] + needed[high]
            needed[low] = needed[high] = True
    return comparators, results


class Operations(NamedTuple):
    """Of a selection in one column.

    Attributes
    ----------
    comparisons, results : float, float
        Pairs of values compared, and minima and maxima that are needed.
    alone : float
        Those of the results of which a thread takes one and another thread the other: a comparison and a selection,
        where a minimum or maximum is one instruction.
    """

    comparisons: float
    results: float
    alone: float = 0.0


#: As csrc/cuda has it: up to so many rows a thread sorts a column, up to so many a warp merges runs.
NETWORK_ROWS, RUN, MERGED_ROWS = 64, 32, 1024


def selection(n: int, lo: int, hi: int) -> Operations:
    """Count the operations of the kernel that finds the ranks [lo, hi) of n values, as `csrc/cuda` does it."""
    if n <= NETWORK_ROWS:
        return Operations(*selection_network(n, lo, hi))
    if n > MERGED_ROWS:  # the value of a rank is found bit by bit: a comparison and an addition for each
        ranks = 1 if hi - lo <= 2 else 2
        return Operations(32 * ranks * n, 32 * ranks * n, 32 * ranks * n)
    runs = 4
    while runs * RUN < n:
        runs *= 2
    median = lo >= (n - 1) // 2 and hi <= n // 2 + 1
    inside = runs * selection_network(RUN, 0, RUN)[0]
    between, group = 0, 2
    while group <= runs:
        last = median and group == runs  # told apart, and no longer sorted
        between += runs * RUN * (1 if last else group.bit_length() - 1)
        inside += 0 if last else runs * RUN // 2 * (RUN.bit_length() - 1)
        group *= 2
    return Operations(inside + between, 2 * inside + between, between)


def model_seconds(gpu: Gpu, rule: str, n: int, d: int, f: int, itemsize: int) -> float | None:
    """Return the least time of a rule by the model, None for a rule that it does not know.

    Parameters
    ----------
    gpu : Gpu
        One of `MODELS`.
    rule : str
        In its text form.
    n, d, f, itemsize : int
        Rows, columns, tolerated rows, bytes of a value.
    """
    try:
        plan = parse_rule(rule)
    except ValueError:
        return None
    if isinstance(plan, Chain):  # whose mixing is not modelled
        return None
    again, window = plan.rows_read_again(n, f), plan.window(n, f)
    moved = (n, again + 1) if again else (n + 1, 0)  # rows in the first pass and in the second, the result as one
    first, second = (rows * d * itemsize / gpu.bandwidth for rows in moved)
    if window is not None:
        found = selection(n, *window)
        if itemsize < 8:
            clocks = (found.results + found.alone) / gpu.minmax
        else:  # which has no minimum: one comparison, and selections of 32 bits beside it
            clocks = max(found.comparisons / gpu.float64, 2 * found.results / gpu.minmax)
        first = max(first, clocks * d / (gpu.multiprocessors * gpu.hertz))
    return first + second
