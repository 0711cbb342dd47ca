"""The primitives in Numba, for machines without the compiled module.

Serial kernels that release the GIL run over a fixed grid of column tasks in a plain thread pool: Numba's own
threading layers abort when several Python threads call at once, or in a forked child.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numba import carray, config, njit, types
from numba.extending import intrinsic, overload
from numpy.typing import NDArray

from robustkern.backends.reference import ROOM, lift, rounded
from robustkern.backends.threads import requested_threads, usable_cores
from robustkern.contract.primitives import Selected, Window
from robustkern.contract.rows import DTYPES, Matrix, Rows, Vector

__all__ = ["Numba", "load"]

TILE = 256  # columns sorted together: n rows of them stay in cache
TASK_VALUES = 1 << 19
GRAM_TASKS = 64
LANES = 8  # independent sums in a loop that the compiler may not reorder
LARGEST = float(np.finfo(np.float64).max)
NO_CELLS, NO_ROWS = np.empty(0, dtype=np.int64), np.empty((0, 0), dtype=np.int32)

T = TypeVar("T")


def _compiled(function: Any, **options: Any) -> Any:
    """Compile without the interpreter's lock, and keep the code where there is a place for it."""
    try:
        return njit(nogil=True, cache=True, **options)(function)
    except RuntimeError:  # neither beside the sources nor in a home: read-only containers
        return njit(nogil=True, **options)(function)


# ---- memory ----------------------------------------------------------------------------------------------------


@intrinsic
def _pointer(typingctx: Any, address: Any, like: Any) -> Any:
    """Turn an address into a pointer to the dtype of `like`."""
    pointer = types.CPointer(like.dtype)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return pointer(address, like), codegen


def _widen(value, table):  # type: ignore[no-untyped-def]
    """Return a stored value as it is computed; compiled code has what follows instead."""


@overload(_widen, inline="always")
def _widen_overload(value, table):  # type: ignore[no-untyped-def]
    """16-bit values are looked up in a table of float32, others are themselves."""
    if isinstance(value, types.Integer):
        return lambda value, table: table[value]
    return lambda value, table: value


@_compiled
def _read(addresses, first, count, like, table, tile):  # type: ignore[no-untyped-def]
    for i in range(len(addresses)):
        row = carray(_pointer(addresses[i] + np.uint64(first * like.itemsize), like), (count,))
        for j in range(count):
            tile[i, j] = _widen(row[j], table)


# ---- selection -------------------------------------------------------------------------------------------------


@_compiled
def _note_nonfinite(tile, count, nonfinite):  # type: ignore[no-untyped-def]
    for i in range(len(tile)):
        check = tile.dtype.type(0)
        for j in range(count):
            check += tile[i, j] - tile[i, j]
        if check != 0:
            nonfinite[i] = True


@_compiled
def _sort(x, low, high, count):  # type: ignore[no-untyped-def]
    for c in range(len(low)):
        a, b = x[low[c]], x[high[c]]
        for j in range(count):
            p, q = a[j], b[j]
            a[j] = p if p < q else q
            b[j] = q if p < q else p


@_compiled
def _sort_with_rows(x, rows, low, high, count):  # type: ignore[no-untyped-def]
    for c in range(len(low)):
        a, b, r, s = x[low[c]], x[high[c]], rows[low[c]], rows[high[c]]
        for j in range(count):
            if b[j] < a[j]:
                a[j], b[j] = b[j], a[j]
                r[j], s[j] = s[j], r[j]


@_compiled
def _two_sum(a, b):  # type: ignore[no-untyped-def]
    """Knuth's: a + b and what its rounding lost."""
    total = a + b
    virtual = total - a
    return total, (a - (total - virtual)) + (b - virtual)


@_compiled
def _product_error(a, b, product):  # type: ignore[no-untyped-def]
    """Return what the rounding of a * b lost (Dekker)."""
    a_split, b_split = a * 134217729.0, b * 134217729.0
    a_head, b_head = a_split - (a_split - a), b_split - (b_split - b)
    a_tail, b_tail = a - a_head, b - b_head
    return ((a_head * b_head - product) + a_head * b_tail + a_tail * b_head) + a_tail * b_tail


@_compiled
def _quotient(high, low, divisor):  # type: ignore[no-untyped-def]
    """(high + low) / divisor, rounded once."""
    near = high / divisor
    product = near * divisor
    return near + (((high - product) - _product_error(near, divisor, product)) + low) / divisor


@_compiled
def _moved(base, total, divisor):  # type: ignore[no-untyped-def]
    """Return base + total / divisor, rounded once."""
    near = total / divisor
    product = near * divisor
    result, lost = _two_sum(base, near)
    return result + (lost + ((total - product) - _product_error(near, divisor, product)) / divisor)


@_compiled
def _middle(a, b):  # type: ignore[no-untyped-def]
    total = a + b
    if total - total == 0:
        return total * 0.5
    return a * 0.5 + b * 0.5


@_compiled
def _careful_mean(x, rows, multiplicities, lo, hi, j):  # type: ignore[no-untyped-def]
    """Mean of the cells [lo, hi) of a sorted column of which sums overflow, or meet an infinity."""
    high = low = 0.0
    before = 0
    for r in range(len(x)):
        after = before + (multiplicities[rows[r, j]] if len(multiplicities) else 1)
        count = min(after, hi) - max(before, lo)
        before = after
        if count > 0:
            value = np.float64(x[r, j]) * ROOM
            product = count * value
            high, lost = _two_sum(high, product)
            low += lost + _product_error(np.float64(count), value, product)
    return _quotient(high, low, np.float64(hi - lo)) / ROOM if high - high == 0 else high


@_compiled
def _store_mean(x, lo, hi, count, out):  # type: ignore[no-untyped-def]
    """Sum differences from the smallest float64 value, or float32 values, whose sums float64 holds."""
    if hi - lo == 1:
        for j in range(count):
            out[j] = x[lo, j]
    elif hi - lo == 2:
        for j in range(count):
            out[j] = _middle(np.float64(x[lo, j]), np.float64(x[lo + 1, j]))
    else:
        base = np.zeros(count)
        if x.itemsize == 8:
            for j in range(count):
                base[j] = x[lo, j]
        total = np.zeros(count)
        for r in range(lo, hi):
            for j in range(count):
                total[j] += np.float64(x[r, j]) - base[j]
        for j in range(count):
            mean = _moved(base[j], total[j], np.float64(hi - lo))
            out[j] = mean
            total[j] = mean - mean
        careful = False
        for j in range(count):
            careful |= total[j] != 0
        if careful:
            for j in range(count):
                if total[j] != 0:
                    out[j] = _careful_mean(x, NO_ROWS, NO_CELLS, lo, hi, j)


@_compiled
def _doubled_mean(x, lo, hi, j):  # type: ignore[no-untyped-def]
    """Return the mean of a column's ranks, and what its rounding lost."""
    base = np.float64(x[lo, j])
    total = 0.0
    for r in range(lo + 1, hi):
        total += np.float64(x[r, j]) - base
    mean = _moved(base, total, np.float64(hi - lo))
    if mean - mean != 0:
        return _careful_mean(x, NO_ROWS, NO_CELLS, lo, hi, j), 0.0
    near = total / np.float64(hi - lo)
    product = near * np.float64(hi - lo)
    rest = ((total - product) - _product_error(near, np.float64(hi - lo), product)) / np.float64(hi - lo)
    rough, lost = _two_sum(base, near)
    return mean, (lost + rest) - (mean - rough)


@_compiled
def _store_nearest_mean(x, lo, hi, nearest, count, out):  # type: ignore[no-untyped-def]
    """Let ranks `nearest` apart compete by exact distances for a place in the last rows of the sorted x."""
    first, last = x[lo].copy(), x[hi - 1].copy()
    scale, middle, middle_lost = np.empty_like(first), np.empty_like(first), np.empty_like(first)
    rest, one, half = np.zeros(count), x.dtype.type(1), x.dtype.type(0.5)
    for j in range(count):
        lost = 0.0
        if hi - lo > 2:
            mean, lost = _doubled_mean(x, lo, hi, j)
            first[j] = last[j] = mean
            lost += mean - np.float64(first[j]) if mean - mean == 0 else 0.0
        scale[j] = one if (first[j] + last[j]) - (first[j] + last[j]) == 0 else half  # halves do not overflow
        middle[j], middle_lost[j] = _two_sum(first[j] * scale[j], last[j] * scale[j])
        if hi - lo > 2:  # float32 may not hold what its rounding lost
            rough, more = np.float64(middle[j]), lost * np.float64(scale[j] + scale[j])
            middle[j] = rough + more
            rest[j] = (rough - np.float64(middle[j])) + more
    for k in range(len(x) - nearest):
        low, high = x[k], x[k + nearest]
        for j in range(count):
            total, lost = _two_sum(low[j] * scale[j], high[j] * scale[j])
            nearer = (total < middle[j]) | ((total == middle[j]) & (lost < middle_lost[j]))
            if hi - lo > 2 and total == middle[j]:
                nearer = np.float64(lost) < rest[j]
            high[j] = high[j] if nearer else low[j]
    _store_mean(x, len(x) - nearest, len(x), count, out)
    for j in range(count):
        if first[j] - first[j] != 0 or last[j] - last[j] != 0:
            out[j] = np.float64(first[j]) + np.float64(last[j])


@_compiled
def _store_weighted_mean(x, rows, multiplicities, lo, hi, count, out):  # type: ignore[no-untyped-def]
    for j in range(count):
        before, used = 0, 0
        base = total = last = 0.0
        first_count = last_count = 0
        for r in range(len(x)):
            after = before + multiplicities[rows[r, j]]
            begin, end = max(before, lo), min(after, hi)
            before = after
            if end > begin:
                last_count = end - begin
                last = np.float64(x[r, j])
                if used == 0:
                    base, first_count = last, last_count
                used += 1
                total += last_count * (last - base)
            if before >= hi:
                break
        if used == 1:
            out[j] = base
        elif used == 2 and first_count == last_count:
            out[j] = _middle(base, last)
        else:
            mean = _moved(base, total, np.float64(hi - lo))
            out[j] = mean if mean - mean == 0 else _careful_mean(x, rows, multiplicities, lo, hi, j)


@_compiled
def _select_tile(x, low, high, lo, hi, nearest, multiplicities, total, count, out, nonfinite):  # type: ignore[no-untyped-def]
    """Sorts x in place; NaN sort as +inf, and columns whose window reaches one are spoilt afterwards."""
    check = np.zeros(count, dtype=x.dtype)  # one for each column: a single sum could not be vectorised
    for i in range(len(x)):
        row = x[i]
        for j in range(count):
            check[j] += row[j] - row[j]
    careful = False
    for j in range(count):
        careful |= check[j] != 0
    nan_cells = np.zeros(count if careful else 0, dtype=np.int64)
    if careful:
        _note_nonfinite(x, count, nonfinite)
        for i in range(len(x)):
            cells = multiplicities[i] if len(multiplicities) else 1
            for j in range(count):
                if x[i, j] != x[i, j]:
                    x[i, j] = np.inf
                    nan_cells[j] += cells
    if len(multiplicities):
        rows = np.empty((len(x), count), dtype=np.int32)
        for i in range(len(x)):
            rows[i] = i
        _sort_with_rows(x, rows, low, high, count)
        _store_weighted_mean(x, rows, multiplicities, lo, hi, count, out)
    else:
        _sort(x, low, high, count)
        if nearest:
            _store_nearest_mean(x, lo, hi, nearest, count, out)
        else:
            _store_mean(x, lo, hi, count, out)
    if careful:
        for j in range(count):
            if nan_cells[j] and max(hi, nearest) > total - nan_cells[j]:
                out[j] = np.nan


@_compiled
def _add_products(weights, tile, scale, count, high, low):  # type: ignore[no-untyped-def]
    """Make of high + low the weighted sum of the tile's values, with what the roundings lose."""
    high[:count] = 0.0
    low[:count] = 0.0
    for i in range(len(tile)):
        if weights[i] != 0:
            for j in range(count):
                value = np.float64(tile[i, j]) * scale
                product = weights[i] * value
                high[j], lost = _two_sum(high[j], product)
                low[j] += lost + _product_error(weights[i], value, product)


@_compiled
def _mend(weights, divisor, tile, count, result):  # type: ignore[no-untyped-def]
    """Compute quotients that are no numbers again, in sums that do not overflow."""
    careful = False
    for j in range(count):
        careful |= result[j] - result[j] != 0
    if not careful:
        return
    average = np.abs(weights).sum() <= divisor * (1 + 2.0**-40)
    high, low = np.empty(count), np.empty(count)
    _add_products(weights, tile, ROOM, count, high, low)
    for j in range(count):
        if result[j] - result[j] != 0:
            value = high[j] / divisor / ROOM
            if value - value == 0:
                value = _quotient(high[j], low[j], divisor) / ROOM
            bounded = average and high[j] - high[j] == 0  # the weights may have been rounded up
            result[j] = min(max(value, -LARGEST), LARGEST) if bounded else value


@_compiled
def _sum_tile(weights, divisors, tile, count, total):  # type: ignore[no-untyped-def]
    """Weighted sums over their divisors; of float64 rows as exact as sums of twice as many digits."""
    low = np.empty(count)
    for r in range(len(weights)):
        result = total[r]
        if tile.itemsize == 8:
            _add_products(weights[r], tile, 1.0, count, result, low)
            for j in range(count):
                result[j] = _quotient(result[j], low[j], divisors[r])
            _mend(weights[r], divisors[r], tile, count, result)
        else:
            result[:count] = 0.0
            for i in range(len(tile)):
                if weights[r, i] != 0:
                    for j in range(count):
                        result[j] += weights[r, i] * tile[i, j]
            for j in range(count):
                result[j] /= divisors[r]


@_compiled
def _mix(weights, divisors, tile, count, mixed):  # type: ignore[no-untyped-def]
    """Weighted sums over their divisors; of float64 rows by differences from one of most weight, as fast as sums."""
    if tile.itemsize < 8:
        _sum_tile(weights, divisors, tile, count, mixed)
        return
    for r in range(len(weights)):
        result, first = mixed[r], -1
        result[:count] = 0.0
        whole = lost = 0.0
        for i in range(len(tile)):  # a row of little weight may be far away, and cost the others' digits
            if weights[r, i] != 0 and (first < 0 or abs(weights[r, i]) > abs(weights[r, first])):
                first = i
        for i in range(len(tile)):
            if weights[r, i] != 0:
                whole, more = _two_sum(whole, weights[r, i])
                lost += more
                for j in range(count):
                    result[j] += weights[r, i] * (tile[i, j] - tile[first, j])
        if first >= 0:
            whole = (whole + lost) / divisors[r]
            for j in range(count):
                result[j] = _moved(tile[first, j] * whole, result[j], divisors[r])
            _mend(weights[r], divisors[r], tile, count, result)


@_compiled
def _add_sq_distances(x, centre, scale, count, total):  # type: ignore[no-untyped-def]
    part = np.zeros(LANES)
    for i in range(len(x)):
        part[:] = 0.0
        whole = count // LANES * LANES
        for j in range(0, whole, LANES):
            for lane in range(LANES):
                difference = (np.float64(x[i, j + lane]) - np.float64(centre[j + lane])) * scale
                part[lane] += difference * difference
        for j in range(whole, count):
            difference = (np.float64(x[i, j]) - np.float64(centre[j])) * scale
            part[0] += difference * difference
        for lane in range(LANES):
            total[i] += part[lane]


@_compiled
def _select_piece(  # type: ignore[no-untyped-def]
    addresses,
    first,
    count,
    like,
    table,
    network,
    window,
    multiplicities,
    mix,
    mix_divisors,
    measure,
    measure_divisors,
    remeasure,
    scale,
    rounding,
    empty,
    out,
    distances,
    nonfinite,
):
    low, high = network
    lo, hi, nearest, total = window
    n = len(addresses)
    tile = np.empty((n, TILE), dtype=empty.dtype)
    k = len(mix) if len(mix) else n
    work = np.empty((k, TILE), dtype=empty.dtype)
    mixed = np.empty((len(mix), TILE))
    measured = np.empty((len(measure), TILE))
    mixed_nonfinite = np.zeros(k, dtype=np.bool_)
    for begin in range(0, count, TILE):
        width = min(TILE, count - begin)
        target = out[begin : begin + width]
        _read(addresses, first + begin, width, like, table, tile)
        if len(mix):
            _mix(mix, mix_divisors, tile, width, mixed)
            mixed_nonfinite[:] = False
            for i in range(k):
                for j in range(width):
                    work[i, j] = mixed[i, j]
            _select_tile(work, low, high, lo, hi, nearest, multiplicities, total, width, target, mixed_nonfinite)
            if mixed_nonfinite.any():
                _note_nonfinite(tile, width, nonfinite)
        elif len(distances):
            for i in range(n):
                for j in range(width):
                    work[i, j] = tile[i, j]
            _select_tile(work, low, high, lo, hi, nearest, multiplicities, total, width, target, nonfinite)
        else:  # nobody needs the rows any more
            _select_tile(tile, low, high, lo, hi, nearest, multiplicities, total, width, target, nonfinite)
        if len(distances):
            for j in range(width):  # distances are to what is stored
                target[j] = _rounded(target[j], rounding) if len(rounding) else empty.dtype.type(target[j])
            if not len(measure):
                _add_sq_distances(tile, target, scale, width, distances)
            elif remeasure:
                _mix(measure, measure_divisors, tile, width, measured)
                _add_sq_distances(measured, target, scale, width, distances)
            else:
                _add_sq_distances(mixed, target, scale, width, distances)


@_compiled
def _rounded(value, finite):  # type: ignore[no-untyped-def]
    """Nearest entry of the sorted finite values of a 16-bit dtype, the even one in a tie."""
    if value - value != 0:
        return value
    magnitude = abs(value)
    at = np.searchsorted(finite, magnitude)  # finite[k] is the value with bits k
    if at == len(finite):
        # Above the largest: it or infinity, whichever is nearer in the format's spacing.
        spacing = finite[at - 1] - finite[at - 2]
        nearest = finite[at - 1] if magnitude < finite[at - 1] + spacing / 2 else np.inf
    elif finite[at] == magnitude:
        return value
    else:
        down, up = magnitude - finite[at - 1], finite[at] - magnitude
        nearest = finite[at - 1] if down < up or (down == up and (at - 1) % 2 == 0) else finite[at]
    return nearest if value > 0 else -nearest


# ---- sums ------------------------------------------------------------------------------------------------------


@functools.partial(_compiled, fastmath={"reassoc", "contract"})
def _add_gram(x, count, gram):  # type: ignore[no-untyped-def]
    for i in range(len(x)):
        for k in range(min(i + 1, len(gram))):
            a, b = x[i], x[k]
            total = 0.0
            for j in range(count):
                total += a[j] * b[j]
            gram[k, i] += total


@_compiled
def _gram_piece(  # type: ignore[no-untyped-def]
    addresses, first, count, like, table, network, window, cells, origin, scale, empty, centre, gram, nonfinite
):
    low, high = network
    middle, total_cells, lone = window
    n = len(addresses)
    tile = np.empty((n, TILE), dtype=empty.dtype)
    work = np.empty((n, TILE), dtype=empty.dtype)
    x = np.zeros((n + origin, TILE))
    seen = np.zeros(n, dtype=np.bool_)
    for begin in range(0, count, TILE):
        width = min(TILE, count - begin)
        _read(addresses, first + begin, width, like, table, tile)
        seen[:] = False
        if lone >= 0:
            centre[:width] = tile[lone, :width]
            for i in range(n):
                check = np.float64(0.0)
                for j in range(width):
                    check += np.float64(tile[i, j]) * 0.0
                seen[i] = check != 0.0
        else:
            for i in range(n):
                for j in range(width):
                    work[i, j] = tile[i, j]
            _select_tile(work, low, high, middle, middle + 1, 0, cells, total_cells, width, centre, seen)
        if seen.any():
            for j in range(width):
                if centre[j] - centre[j] != 0:
                    centre[j] = 0
        for i in range(n):
            nonfinite[i] |= seen[i]
            for j in range(width):
                x[i, j] = 0.0 if seen[i] else np.float64(tile[i, j]) * scale - np.float64(centre[j]) * scale
        if origin:
            for j in range(width):
                x[n, j] = np.float64(centre[j]) * -scale
        _add_gram(x, width, gram)


@_compiled
def _add_doubled(high, low, more, more_low):  # type: ignore[no-untyped-def]
    total = high + more
    virtual = total - high
    return total, low + ((high - (total - virtual)) + (more - virtual)) + more_low


@functools.partial(_compiled, fastmath={"reassoc", "contract"})
def _sq_distance(a, b, count, scale):  # type: ignore[no-untyped-def]
    total = 0.0
    for j in range(count):
        difference = np.float64(a[j]) * scale - np.float64(b[j]) * scale
        total += difference * difference
    return total


@_compiled
def _add_exactly(x, centre, count, scale, total, lost):  # type: ignore[no-untyped-def]
    for j in range(count):
        a, b = np.float64(x[j]) * scale, -np.float64(centre[j]) * scale
        difference = a + b
        virtual = difference - a
        rest = (a - (difference - virtual)) + (b - virtual)
        square = difference * difference
        split = difference * 134217729.0
        head = split - (split - difference)
        tail = difference - head
        square_lost = ((head * head - square) + 2.0 * head * tail) + tail * tail
        total, lost = _add_doubled(total, lost, square, square_lost + 2.0 * difference * rest)
    return total, lost


@_compiled
def _sq_distances_piece(  # type: ignore[no-untyped-def]
    addresses, centre_addresses, first, count, like, table, empty, scale, exact, high, low
):
    n = len(addresses)
    tile = np.empty((n, TILE), dtype=empty.dtype)
    centres = np.zeros((len(high), TILE), dtype=empty.dtype)
    for begin in range(0, count, TILE):
        width = min(TILE, count - begin)
        _read(addresses, first + begin, width, like, table, tile)
        if len(centre_addresses):
            _read(centre_addresses, first + begin, width, like, table, centres)
        for c in range(len(high)):
            for i in range(n):
                total, lost = high[c, i], low[c, i]
                if exact:
                    total, lost = _add_exactly(tile[i], centres[c], width, scale, total, lost)
                else:
                    total, lost = _add_doubled(total, lost, _sq_distance(tile[i], centres[c], width, scale), 0.0)
                high[c, i], low[c, i] = total, lost


@_compiled
def _weighted_piece(addresses, first, count, like, table, weights, divisors, empty, out):  # type: ignore[no-untyped-def]
    tile = np.empty((len(addresses), TILE), dtype=empty.dtype)
    total = np.empty((len(weights), TILE))
    for begin in range(0, count, TILE):
        width = min(TILE, count - begin)
        _read(addresses, first + begin, width, like, table, tile)
        _sum_tile(weights, divisors, tile, width, total)
        for r in range(len(weights)):
            for j in range(width):
                out[r, begin + j] = total[r, j]


@_compiled
def _momenta_piece(  # type: ignore[no-untyped-def]
    momenta, gradients, corrections, first, count, like, table, keep, gradient_scales, correction_scales, out
):
    """Compute a piece of all rows into `out`, or where that is empty in place, by way of a tile that allows vectors."""
    tile = np.empty(TILE)
    for i in range(len(gradients)):
        for begin in range(0, count, TILE):
            width = min(TILE, count - begin)
            start = np.uint64((first + begin) * like.itemsize)
            gradient, scale = carray(_pointer(gradients[i] + start, like), (width,)), gradient_scales[i]
            for j in range(width):
                tile[j] = scale * np.float64(_widen(gradient[j], table))
            momentum = carray(_pointer(momenta[i] + start, like), (width,))
            if keep != 0 and len(corrections) == 0:
                for j in range(width):
                    tile[j] += keep * np.float64(_widen(momentum[j], table))
            elif keep != 0:
                correction, factor = carray(_pointer(corrections[i] + start, like), (width,)), correction_scales[i]
                for j in range(width):
                    rest = np.float64(_widen(momentum[j], table)) - factor * np.float64(_widen(correction[j], table))
                    tile[j] += keep * rest
            if len(out) == 0:
                for j in range(width):
                    momentum[j] = tile[j]
            else:
                for j in range(width):
                    out[i, begin + j] = tile[j]


# ---- the grid --------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _network(n: int, lo: int, hi: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Batcher's merge exchange over n wires (Knuth, TAOCP 5.2.2), cut to what the ranks [lo, hi) need."""
    layers: list[tuple[NDArray[np.intp], int]] = []
    top = 1 << max((n - 1).bit_length() - 1, 0)
    p = top if n > 1 else 0
    while p > 0:
        q, r, d = top, 0, p
        while True:
            wires = np.arange(n - d)
            layers.append((wires[(wires & p) == r], d))
            if q == p:
                break
            d, q, r = q - p, q // 2, p
        p //= 2
    needed = np.zeros(n, dtype=np.bool_)
    needed[lo:hi] = True
    low: list[NDArray[np.intp]] = []
    high: list[NDArray[np.intp]] = []
    for wires, d in reversed(layers):  # the comparators of a layer touch different wires
        kept = wires[needed[wires] | needed[wires + d]]
        needed[kept] = needed[kept + d] = True
        low.append(kept)
        high.append(kept + d)
    empty = [np.empty(0, dtype=np.intp)]
    return (
        np.concatenate(low[::-1] or empty).astype(np.int32),
        np.concatenate(high[::-1] or empty).astype(np.int32),
    )


@functools.lru_cache(maxsize=4)
def _storage(dtype: np.dtype[Any]) -> tuple[Any, Any, Any, Any]:
    """Return for a dtype: an empty array of the storage type and of the compute type, table, finite values."""
    if dtype.itemsize > 2:
        empty = np.empty(0, dtype=dtype)
        return empty, empty, np.empty(0, dtype=np.float32), np.empty(0)
    table = np.arange(65536, dtype=np.uint16).view(dtype).astype(np.float32)
    finite = table[:32768]
    return np.empty(0, dtype=np.uint16), np.empty(0, dtype=np.float32), table, finite[np.isfinite(finite)].astype(float)


_pools: dict[int, tuple[int, ThreadPoolExecutor]] = {}  # by process, as a forked child makes its own: its threads


def _run(tasks: int, body: Callable[[int], T]) -> list[T]:
    """Run body(0..tasks-1) in threads; results in task order."""
    threads = requested_threads() or usable_cores()
    if min(threads, tasks) <= 1:
        return [body(task) for task in range(tasks)]
    size, pool = _pools.get(os.getpid(), (0, None))
    if pool is None or size != threads:  # the one before ends when no call uses it any more
        pool = ThreadPoolExecutor(threads, thread_name_prefix="robustkern")
        _pools[os.getpid()] = threads, pool
    return list(pool.map(body, range(tasks)))


def _pieces(rows: Rows, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Segment, first column within it and count for each piece of the columns [begin, end)."""
    s = int(np.searchsorted(rows.offsets, begin, side="right")) - 1
    while begin < end:
        stop = min(end, int(rows.offsets[s + 1]))
        if stop > begin:
            yield s, begin - int(rows.offsets[s]), stop - begin
        begin = max(begin, stop)
        s += 1


def _tasks(rows: Rows, columns: int) -> tuple[int, Callable[[int], Iterator[tuple[int, int, int]]]]:
    return -(-rows.d // columns), lambda task: _pieces(rows, task * columns, min((task + 1) * columns, rows.d))


def _task_columns(rows: Rows) -> int:
    return max(TASK_VALUES // rows.n // TILE, 4) * TILE


def _lifted(weights: Matrix | None, divisors: Vector | None, n: int) -> tuple[Matrix, Vector]:
    """Return weights and divisors times a power of two with which products do not vanish."""
    if weights is None:
        return np.empty((0, n)), np.empty(0)
    by = np.array([lift(row) for row in weights])
    return np.ascontiguousarray(weights * by[:, None]), by if divisors is None else divisors * by


class Numba:
    """See `robustkern.contract.primitives.Kernels`."""

    name = "numba"
    roundings = 512.0, 2.0**-8
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
        like, empty, table, finite = _storage(rows.dtype)
        k = rows.n if mix is None else len(mix)
        whole = nearest is not None or multiplicities is not None
        network = _network(k, 0, k) if whole else _network(k, window.lo, window.hi)
        cells = k if multiplicities is None else int(multiplicities.sum())
        n_measured = rows.n if measure is None else len(measure)
        mixing, measuring = _lifted(mix, mix_divisors, rows.n), _lifted(measure, measure_divisors, rows.n)
        same = measure is mix and measure_divisors is mix_divisors
        n_tasks, pieces = _tasks(rows, _task_columns(rows))

        def run(task: int) -> tuple[Vector, NDArray[np.bool_]]:
            total = np.zeros(n_measured if distances else 0)
            nonfinite = np.zeros(rows.n, dtype=np.bool_)
            for s, first, count in pieces(task):
                values = np.empty(count)
                _select_piece(
                    rows.addresses[s],
                    first,
                    count,
                    like,
                    table,
                    network,
                    (window.lo, window.hi, nearest or 0, cells),
                    np.empty(0, dtype=np.int64) if multiplicities is None else multiplicities,
                    *mixing,
                    *measuring,
                    not same,
                    scale,
                    finite,
                    empty,
                    values,
                    total,
                    nonfinite,
                )
                if out is not None:
                    with np.errstate(all="ignore"):
                        out.array(s, 0)[first : first + count] = rounded(values, rows.dtype)
            return total, nonfinite

        parts = _run(n_tasks, run)
        flags = np.zeros(rows.n, dtype=np.bool_)
        sums = np.zeros(n_measured)
        for part, nonfinite in parts:
            flags |= nonfinite
            if distances:
                sums += part
        return Selected(sums if distances else None, flags)

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
        like, empty, table, _ = _storage(rows.dtype)
        m = rows.n + origin
        lines = m if lines is None else lines
        used = np.arange(rows.n) if multiplicities is None else np.flatnonzero(multiplicities)
        lone = -1 if multiplicities is None or len(used) > 1 else int(used[0])
        total_cells = rows.n if multiplicities is None else int(multiplicities.sum())
        middle = (total_cells - 1) // 2
        if multiplicities is None:
            network = _network(rows.n, middle, middle + 1)
        else:
            network = _network(1 if lone >= 0 else rows.n, 0, 1 if lone >= 0 else rows.n)
        cells = np.empty(0, dtype=np.int64) if multiplicities is None else multiplicities
        # Few partial Grams, so that thousands of rows do not need gigabytes.
        most = max(min(GRAM_TASKS, (1 << 20) // (lines * m)), 1)
        columns = max(-(-rows.d // most // TILE) * TILE, TILE)
        n_tasks, pieces = _tasks(rows, columns)

        def run(task: int) -> tuple[Matrix, NDArray[np.bool_]]:
            total = np.zeros((lines, m))
            nonfinite = np.zeros(rows.n, dtype=np.bool_)
            centre = np.empty(TILE, dtype=empty.dtype)
            for s, first, count in pieces(task):
                _gram_piece(
                    rows.addresses[s],
                    first,
                    count,
                    like,
                    table,
                    network,
                    (middle, total_cells, lone),
                    cells,
                    int(origin),
                    scale,
                    empty,
                    centre,
                    total,
                    nonfinite,
                )
            return total, nonfinite

        gram = np.zeros((lines, m))
        flags = np.zeros(m, dtype=np.bool_)
        for part, nonfinite in _run(n_tasks, run):
            gram += part
            flags[: rows.n] |= nonfinite
        gram[:, :lines] += np.triu(gram[:, :lines], 1).T
        gram[flags[:lines], :] = np.nan
        gram[:, flags] = np.nan
        return gram

    def row_sq_distances(self, rows: Rows, centres: Rows | None, *, scale: float = 1.0, exact: bool = True) -> Matrix:
        """See the contract."""
        like, empty, table, _ = _storage(rows.dtype)
        n_tasks, pieces = _tasks(rows, _task_columns(rows))
        none = np.empty((len(rows.addresses), 0), dtype=np.uint64)
        at = none if centres is None else centres.addresses
        shape = 1 if centres is None else centres.n, rows.n

        def run(task: int) -> tuple[Matrix, Matrix]:
            high, low = np.zeros(shape), np.zeros(shape)
            for s, first, count in pieces(task):
                _sq_distances_piece(rows.addresses[s], at[s], first, count, like, table, empty, scale, exact, high, low)
            return high, low

        high, low, plain = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        with np.errstate(all="ignore"):
            for part, part_low in _run(n_tasks, run):
                high, low = _add_doubled.py_func(high, low, part, part_low)
                plain += part
            return np.where(np.isfinite(plain), high + low, plain)

    def weighted_row_sum(self, rows: Rows, weights: Matrix, out: Rows, *, divisors: Vector | None = None) -> None:
        """See the contract."""
        like, empty, table, _ = _storage(rows.dtype)
        used = np.flatnonzero((weights != 0).any(axis=0))
        rows, (weights, by) = rows.take(used), _lifted(weights[:, used], divisors, len(used))
        n_tasks, pieces = _tasks(out, _task_columns(out))

        def run(task: int) -> None:
            for s, first, count in pieces(task):
                values = np.empty((len(weights), count))
                _weighted_piece(rows.addresses[s], first, count, like, table, weights, by, empty, values)
                with np.errstate(all="ignore"):
                    for r, row in enumerate(rounded(values, out.dtype)):
                        out.array(s, r)[first : first + count] = row

        _run(n_tasks, run)

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
        like, empty, table, _ = _storage(momenta.dtype)
        n_tasks, pieces = _tasks(momenta, _task_columns(momenta))
        nothing = np.empty(0, dtype=np.uint64)
        factors = gradient_scales if correction_scales is None else correction_scales
        narrow = momenta.dtype.itemsize < 4  # rounded by NumPy, not in place

        def run(task: int) -> None:
            for s, first, count in pieces(task):
                values = np.empty((momenta.n if narrow else 0, count), dtype=empty.dtype)
                removed = nothing if corrections is None else corrections.addresses[s]
                _momenta_piece(
                    momenta.addresses[s],
                    gradients.addresses[s],
                    removed,
                    first,
                    count,
                    like,
                    table,
                    keep,
                    gradient_scales,
                    factors,
                    values,
                )
                with np.errstate(all="ignore"):
                    for i, row in enumerate(values.astype(momenta.dtype)):
                        momenta.array(s, i)[first : first + count] = row

        _run(n_tasks, run)


class _SwitchedOff(ImportError):
    remedy = "unset NUMBA_DISABLE_JIT"


def load() -> Numba:
    """Return the backend; importing Numba takes about half a second."""
    if config.DISABLE_JIT:
        raise _SwitchedOff("Numba's compiler is switched off")
    return Numba()
