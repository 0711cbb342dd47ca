"""The primitives as plain NumPy in float64: their definition, and the oracle of every other backend."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustkern.contract.primitives import Selected, Window
from robustkern.contract.rows import DTYPES, Matrix, Rows, Vector

__all__ = ["Reference", "load"]

# Columns looked at together: bounds the memory of the stacked float64 copy.
BLOCK_VALUES = 1 << 20


def load() -> Reference:
    """Return the backend; it can always run."""
    return Reference()


class Reference:
    """See `robustkern.contract.primitives.Kernels`, which this spells out."""

    name = "reference"
    roundings = 384.0, 0.0  # sums of blocks are taken in 80 bits
    dtypes = DTYPES

    def takes_float32_products(self, rows: Rows) -> bool:
        """See the contract."""
        return False

    def select_columns(
        self,
        rows: Rows,
        window: Window,
        *,
        nearest: int | None = None,
        multiplicities: NDArray[np.int64] | None = None,
        mix: Matrix | None = None,
        mix_divisors: Vector | None = None,
        measure: Matrix | None = None,
        measure_divisors: Vector | None = None,
        scale: float = 1.0,
        distances: bool = False,
        out: Rows | None = None,
    ) -> Selected:
        """See the contract."""
        nonfinite = np.zeros(rows.n, dtype=np.bool_)
        total = np.zeros(rows.n if measure is None else len(measure), dtype=np.longdouble)
        compute = _compute_dtype(rows.dtype)
        with np.errstate(all="ignore"):
            for block, target in _blocks(rows, out):
                x = _stack(block)
                nonfinite |= ~np.isfinite(x).all(axis=1)
                chosen = x if mix is None else _mixed(mix, mix_divisors, x).astype(compute).astype(np.float64)
                if nearest is None:
                    mean = _window_mean(chosen, window, multiplicities)
                else:
                    mean = _nearest_mean(chosen, window, nearest)
                values = rounded(mean, rows.dtype)
                if target is not None:
                    target.array(0, 0)[:] = values
                if distances:
                    measured = x if measure is None else _mixed(measure, measure_divisors, x)
                    difference = (measured - values.astype(np.float64)) * scale
                    total += (difference * difference).sum(axis=1)
        with np.errstate(over="ignore"):
            return Selected(total.astype(np.float64) if distances else None, nonfinite)

    def gram(
        self,
        rows: Rows,
        *,
        multiplicities: NDArray[np.int64] | None = None,
        origin: bool = False,
        scale: float = 1.0,
        single: bool = False,
        lines: int | None = None,
    ) -> Matrix:
        """See the contract; products are always float64."""
        middle = (rows.n - 1 if multiplicities is None else int(multiplicities.sum()) - 1) // 2
        m = rows.n + origin
        total = np.zeros((m, m), dtype=np.longdouble)
        bad = np.zeros(m, dtype=np.bool_)
        with np.errstate(all="ignore"):
            for block, _ in _blocks(rows, None):
                x = _stack(block)
                centre = _window_mean(x, Window(middle, middle + 1), multiplicities)
                centre[~np.isfinite(centre)] = 0
                if origin:
                    x = np.vstack([x, np.zeros(x.shape[1])])
                finite = np.asarray(np.isfinite(x).all(axis=1))
                bad |= ~finite
                x = np.where(finite.reshape(-1, 1), x * scale - centre * scale, 0.0)
                for i in range(m):  # no BLAS: equal rows must have equal products
                    total[i, : i + 1] += (x[: i + 1] * x[i]).sum(axis=1)
        with np.errstate(over="ignore"):
            gram = (np.tril(total) + np.tril(total, -1).T).astype(np.float64)
        gram[bad, :] = np.nan
        gram[:, bad] = np.nan
        return gram[:lines]

    def row_sq_distances(self, rows: Rows, centres: Rows | None, *, scale: float = 1.0, exact: bool = True) -> Matrix:
        """See the contract: always exact, by 80-bit sums where the machine has them."""
        total = np.zeros((1 if centres is None else centres.n, rows.n), dtype=np.longdouble)
        with np.errstate(all="ignore"):
            for block, points in _blocks(rows, centres):
                x = _stack(block).astype(np.longdouble)
                for at, centre in enumerate([0.0] if points is None else _stack(points)):
                    difference = (x - centre) * scale
                    total[at] += (difference * difference).sum(axis=1)
        with np.errstate(over="ignore"):
            return total.astype(np.float64)

    def sq_distances_to_average(self, rows: Rows, shares: Vector) -> Vector:
        """See the contract: by 80-bit sums where the machine has them."""
        total, used = np.zeros(rows.n, dtype=np.longdouble), shares != 0
        with np.errstate(all="ignore"):
            for block, _ in _blocks(rows, None):
                x = _stack(block).astype(np.longdouble)
                x -= x[int(shares.argmax())].copy()
                x -= shares[used] @ x[used]
                total += (x * x).sum(axis=1)
            return total.astype(np.float64)

    def weighted_row_sum(self, rows: Rows, weights: Matrix, out: Rows, *, divisors: Vector | None = None) -> None:
        """See the contract."""
        used = np.flatnonzero((weights != 0).any(axis=0))
        rows, weights = rows.take(used), weights[:, used]
        with np.errstate(all="ignore"):
            for block, target in _blocks(rows, out):
                assert target is not None
                for j, row in enumerate(_mixed(weights, divisors, _stack(block))):
                    target.array(0, j)[:] = rounded(row, rows.dtype)

    def update_momenta(
        self,
        momenta: Rows,
        gradients: Rows,
        corrections: Rows | None,
        *,
        keep: float,
        gradient_scales: Vector,
        correction_scales: Vector | None,
    ) -> None:
        """See the contract."""
        columns = max(BLOCK_VALUES // momenta.n, 1)
        corrected = iter(()) if corrections is None else corrections.blocks(columns)
        with np.errstate(all="ignore"):
            for momentum, gradient in zip(momenta.blocks(columns), gradients.blocks(columns), strict=True):
                correction = next(corrected, None)
                new = gradient_scales[:, None] * _stack(gradient)
                if keep != 0:
                    old = _stack(momentum)
                    if correction is not None:
                        assert correction_scales is not None
                        old -= correction_scales[:, None] * _stack(correction)
                    new += keep * old
                for i, row in enumerate(new.astype(_compute_dtype(momenta.dtype)).astype(momenta.dtype)):
                    momentum.array(0, i)[:] = row


def _compute_dtype(dtype: np.dtype[Any]) -> type[np.floating[Any]]:
    return np.float64 if dtype == np.float64 else np.float32


def _blocks(rows: Rows, other: Rows | None) -> Iterator[tuple[Rows, Rows | None]]:
    columns = max(BLOCK_VALUES // max(rows.n, 1), 1)
    if other is None:
        yield from ((block, None) for block in rows.blocks(columns))
    else:
        yield from zip(rows.blocks(columns), other.blocks(columns), strict=True)


def _stack(block: Rows) -> Matrix:
    stacked = np.empty((block.n, block.d))
    for i in range(block.n):
        stacked[i] = block.array(0, i)
    return stacked


def rounded(values: Vector, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return float64 values in a dtype of rows, rounded once: what is cast by way of float32 would be twice."""
    if dtype.itemsize == 2:
        # To as many bits as float32 and 16 bits more than need, the last one set where others are lost.
        bits = np.ascontiguousarray(values).view(np.uint64)
        lost = np.uint64((1 << 40) - 1)
        odd = np.where(bits & lost, np.uint64(1 << 40), np.uint64(0))
        values = (bits & ~lost | odd).view(np.float64)
    return values.astype(dtype, copy=False)


def _two_sum(a: NDArray[Any], b: NDArray[Any]) -> tuple[Matrix, Matrix]:
    """Return a + b and what its rounding lost (Knuth)."""
    total = a + b
    virtual = total - a
    return total, (a - (total - virtual)) + (b - virtual)


def _product(a: NDArray[Any], b: NDArray[Any]) -> tuple[Matrix, Matrix]:
    """Return a * b and what its rounding lost (Dekker)."""
    product = a * b
    a_head, b_head = ((x * 134217729.0) - ((x * 134217729.0) - x) for x in (a, b))
    a_tail, b_tail = a - a_head, b - b_head
    return product, ((a_head * b_head - product) + a_head * b_tail + a_tail * b_head) + a_tail * b_tail


def _sum(high: Matrix, low: Matrix) -> tuple[Vector, Vector]:
    """Return the sum of rows of doubled numbers, two by two."""
    while len(high) > 1:
        half = len(high) // 2
        total, lost = _two_sum(high[:half], high[half : 2 * half])
        low = np.concatenate([low[:half] + low[half : 2 * half] + lost, low[2 * half :]])
        high = np.concatenate([total, high[2 * half :]])
    return high[0], low[0]


def _quotient(high: NDArray[Any], low: NDArray[Any], divisor: NDArray[Any] | float) -> Matrix:
    """Return (high + low) / divisor, rounded once; an infinity or a NaN stays."""
    near = high / divisor
    product, lost = _product(near, np.broadcast_to(divisor, near.shape))
    return np.where(np.isfinite(high), near + (((high - product) - lost) + low) / divisor, high)


# By this values are multiplied where sums of them overflow.
ROOM = 2.0**-96


def lift(weights: Vector) -> float:
    """Return a power of two with which weights add up to about 2**64.

    Products do not vanish then, and sums of numbers times ROOM do not overflow.
    """
    exponent = math.frexp(float((np.abs(weights) * 2.0**-16).sum()))[1]
    return math.ldexp(1.0, min(48 - exponent, 948))


def _mixed(weights: Matrix, divisors: Vector | None, x: Matrix) -> Matrix:
    """Return weights @ x / divisors in doubled float64, without ever multiplying by a weight of 0."""
    mixed = np.zeros((len(weights), x.shape[1]))
    for r, row in enumerate(weights):
        used = row != 0
        if not used.any():
            continue
        divisor = 1.0 if divisors is None else float(divisors[r])
        by, factors, values = divisor * lift(row), row[used, None] * lift(row), x[used]
        mixed[r] = _quotient(*_sum(*_product(factors, values)), by)
        if np.isfinite(mixed[r]).all():
            continue
        high, low = _sum(*_product(factors, values * ROOM))
        plain = high / by / ROOM
        grown = np.where(np.isfinite(plain), _quotient(high, low, by) / ROOM, plain)
        if np.abs(factors).sum() <= by * (1 + 2.0**-40):
            # An average is within the largest numbers, whatever the rounding of its weights says.
            largest = np.finfo(np.float64).max
            grown = np.where(np.isfinite(high), np.clip(grown, -largest, largest), grown)
        mixed[r] = np.where(np.isfinite(mixed[r]), mixed[r], grown)
    return mixed


def _nearest_mean(x: Matrix, window: Window, nearest: int) -> Vector:
    """Mean of the values of each column nearest to its window's middle or mean, by exact distances."""
    ranked = np.sort(x, axis=0)
    first, last = ranked[window.lo], ranked[window.hi - 1]
    rest = np.zeros(x.shape[1])
    if window.hi - window.lo > 2:
        first = last = _window_mean(x, window, None)
        high, low = _sum(ranked[window.lo : window.hi], np.zeros((window.hi - window.lo, x.shape[1])))
        product, lost = _product(first, np.full(len(first), float(window.hi - window.lo)))
        rest = (((high - product) - lost) + low) / (window.hi - window.lo)
        rest[~np.isfinite(rest)] = 0.0
    low, high = ranked[: len(x) - nearest], ranked[nearest:]
    # Halves of sums do not overflow; they are taken only where sums do, because halves may vanish.
    half = np.where(np.isfinite(first + last), 1.0, 0.5)
    middle, middle_lost = _two_sum(first * half, last * half)
    middle_lost += rest * (half + half)
    total, lost = _two_sum(low * half, high * half)
    # True for the first ranks of a column only: the values above it take the places of those below.
    nearer = (total < middle) | ((total == middle) & (lost < middle_lost))
    taken = np.arange(nearest)[:, None] + nearer.sum(axis=0)
    mean = _window_mean(np.take_along_axis(ranked, taken, axis=0), Window(0, nearest), None)
    finite = np.isfinite(first) & np.isfinite(last)
    return np.where(finite | np.isnan(ranked[nearest - 1]), mean, first + last)


def _window_mean(x: Matrix, window: Window, multiplicities: NDArray[np.int64] | None) -> Vector:
    """Mean over the cells [lo, hi) of each column's sorted values; NaN ranks last."""
    order = np.argsort(x, axis=0, kind="stable")
    ranked = np.take_along_axis(x, order, axis=0)
    cells = np.ones(len(x), dtype=np.int64) if multiplicities is None else multiplicities
    end = np.cumsum(cells[order], axis=0)
    begin = end - cells[order]
    covered = np.clip(np.minimum(end, window.hi) - np.maximum(begin, window.lo), 0, None)

    def mean(room: float) -> Vector:
        product, lost = _product(covered.astype(np.float64), ranked * room)
        high, low = _sum(np.where(covered, product, 0.0), np.where(covered, lost, 0.0))
        return _quotient(high, low, float(window.hi - window.lo)) / room

    plain = mean(1.0)
    if not np.isfinite(plain).all():
        plain = np.where(np.isfinite(plain), plain, mean(ROOM))
    # A middle of two equal parts is theirs alone, and so is a single value: their counts need not be exact numbers.
    used = covered > 0
    first = np.take_along_axis(ranked, used.argmax(axis=0)[None], axis=0)[0]
    last = np.take_along_axis(ranked, (len(x) - 1 - used[::-1].argmax(axis=0))[None], axis=0)[0]
    two = (used.sum(axis=0) == 2) & (2 * covered.max(axis=0) == window.hi - window.lo)
    middle = (first + last) * 0.5
    middle = np.where(np.isfinite(middle), middle, first * 0.5 + last * 0.5)
    return np.asarray(np.where(used.sum(axis=0) == 1, first, np.where(two, middle, plain)))
