"""A model of what a GPU could do at best: bytes over its bandwidth, against the operations of the selection network.

Nothing here is measured, and wherever it is shown it says so. The model knows no launch, no latency and no cache, nor
the products of the Gram matrix: a GPU is slower than its model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from robustkern.rules import Chain, parse_rule

__all__ = ["LABEL", "MODELS", "Gpu", "model_seconds", "selection_network"]

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
        comparators, results = selection_network(n, *window)
        # Two 16-bit values go together. float64 has no minimum: one comparison, and selections of 32 bits beside it.
        clocks = {
            2: results / 2 / gpu.minmax,
            4: results / gpu.minmax,
            8: max(comparators / gpu.float64, 2 * results / gpu.minmax),
        }[itemsize]
        first = max(first, clocks * d / (gpu.multiprocessors * gpu.hertz))
    return first + second
