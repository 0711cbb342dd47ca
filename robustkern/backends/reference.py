"""The primitives as plain NumPy in float64: their definition, and the oracle of every other backend."""

from __future__ import annotations

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
    dtypes = DTYPES

    def select_columns(
        self,
        rows: Rows,
        window: Window,
        *,
        nearest: int | None = None,
        multiplicities: NDArray[np.int64] | None = None,
        mix: Matrix | None = None,
        measure: Matrix | None = None,
        scale: float = 1.0,
        distances: bool = False,
        out: Rows | None = None,
    ) -> Selected:
        """See the contract."""
        nonfinite = np.zeros(rows.n, dtype=np.bool_)
        total = np.zeros(rows.n if measure is None else len(measure))
        compute = _compute_dtype(rows.dtype)
        with np.errstate(all="ignore"):
            for block, target in _blocks(rows, out):
                x = _stack(block)
                nonfinite |= ~np.isfinite(x).all(axis=1)
                chosen = x if mix is None else _mixed(mix, x).astype(compute).astype(np.float64)
                mean = _window_mean(chosen, window, multiplicities).astype(compute)
                if nearest is not None:
                    mean = _nearest_mean(chosen.astype(compute), mean, nearest).astype(compute)
                values = mean.astype(rows.dtype)
                if target is not None:
                    target.array(0, 0)[:] = values
                if distances:
                    measured = x if measure is None else _mixed(measure, x)
                    difference = (measured - values.astype(np.float64)) * scale
                    total += (difference * difference).sum(axis=1)
        return Selected(total if distances else None, nonfinite)

    def gram(
        self,
        rows: Rows,
        *,
        multiplicities: NDArray[np.int64] | None = None,
        origin: bool = False,
        scale: float = 1.0,
        single: bool = False,
    ) -> Matrix:
        """See the contract; products are always float64."""
        middle = (rows.n - 1 if multiplicities is None else int(multiplicities.sum()) - 1) // 2
        m = rows.n + origin
        total = np.zeros((m, m))
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
        total = np.tril(total) + np.tril(total, -1).T
        total[bad, :] = np.nan
        total[:, bad] = np.nan
        return total

    def row_sq_distances(self, rows: Rows, centre: Rows, *, scale: float = 1.0) -> Vector:
        """See the contract: 80-bit sums where the machine has them."""
        total = np.zeros(rows.n, dtype=np.longdouble)
        with np.errstate(all="ignore"):
            for block, point in _blocks(rows, centre):
                assert point is not None
                difference = (_stack(block).astype(np.longdouble) - _stack(point)) * scale
                total += (difference * difference).sum(axis=1)
        return total.astype(np.float64)

    def weighted_row_sum(self, rows: Rows, weights: Matrix, out: Rows) -> None:
        """See the contract."""
        used = np.flatnonzero((weights != 0).any(axis=0))
        rows, weights = rows.take(used), weights[:, used]
        with np.errstate(all="ignore"):
            for block, target in _blocks(rows, out):
                assert target is not None
                for j, row in enumerate(_mixed(weights, _stack(block))):
                    target.array(0, j)[:] = row.astype(_compute_dtype(rows.dtype)).astype(rows.dtype)

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


def _mixed(weights: Matrix, x: Matrix) -> Matrix:
    """Return weights @ x in row order without ever multiplying by a weight of 0."""
    mixed = np.zeros((len(weights), x.shape[1]))
    for r, row in enumerate(weights):
        for i in np.flatnonzero(row):
            mixed[r] += row[i] * x[i]
    return mixed


def _nearest_mean(x: NDArray[Any], centre: NDArray[Any], nearest: int) -> Vector:
    """Mean of the values of each column nearest to its centre, with differences in the dtype of both."""
    ranked = np.sort(x, axis=0)
    low, high = ranked[: len(x) - nearest], ranked[nearest:]
    # True for the first ranks of a column only: the values above it take the places of those below.
    nearer = (high - centre < centre - low) | (np.isneginf(low) & (high < np.inf))
    taken = np.arange(nearest)[:, None] + nearer.sum(axis=0)
    mean = _window_mean(np.take_along_axis(ranked, taken, axis=0).astype(np.float64), Window(0, nearest), None)
    return np.where(np.isfinite(centre) | np.isnan(ranked[nearest - 1]), mean, centre)


def _window_mean(x: Matrix, window: Window, multiplicities: NDArray[np.int64] | None) -> Vector:
    """Mean over the cells [lo, hi) of each column's sorted values; NaN ranks last."""
    order = np.argsort(x, axis=0, kind="stable")
    ranked = np.take_along_axis(x, order, axis=0)
    cells = np.ones(len(x), dtype=np.int64) if multiplicities is None else multiplicities
    end = np.cumsum(cells[order], axis=0)
    begin = end - cells[order]
    covered = np.clip(np.minimum(end, window.hi) - np.maximum(begin, window.lo), 0, None)
    share = covered / (window.hi - window.lo)
    used = covered > 0
    first = np.take_along_axis(ranked, used.argmax(axis=0)[None], axis=0)[0]
    # Relative to the smallest value used, so that a common offset costs nothing; plainly where that is not finite.
    centred = first + np.where(used, covered * (ranked - first), 0.0).sum(axis=0) / (window.hi - window.lo)
    plain = np.where(used, share * ranked, 0.0).sum(axis=0)
    mean = np.where(np.isfinite(centred), centred, plain)
    two = (used.sum(axis=0) == 2) & (np.where(used, share, 0.5) == 0.5).all(axis=0)
    last = np.take_along_axis(ranked, (len(x) - 1 - used[::-1].argmax(axis=0))[None], axis=0)[0]
    middle = (first + last) * 0.5
    middle = np.where(np.isfinite(middle), middle, first * 0.5 + last * 0.5)
    return np.asarray(np.where(two, middle, np.where(used.sum(axis=0) == 1, first, mean)))
