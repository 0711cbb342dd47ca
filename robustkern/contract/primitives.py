"""The four primitives that every backend implements alike.

`backends/reference.py` is this text as plain NumPy and the oracle of the tests; `csrc/kernels.h` is the same
contract on raw pointers. Over a split of the columns `select_columns` and `weighted_row_sum` concatenate while
`gram`, `row_sq_distances` and the distances of `select_columns` add: the column-block law, which threads, leaves of
a pytree, blocks of a file and shards on several machines all rest on.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from robustkern.contract.rows import Matrix, Rows, Vector

__all__ = ["PRIMITIVES", "AveragingKernels", "Kernels", "MomentumKernels", "Selected", "Window"]

PRIMITIVES = ("select_columns", "gram", "row_sq_distances", "weighted_row_sum")


class Window(NamedTuple):
    """Half-open range of ranks [lo, hi) in a column's sorted values."""

    lo: int
    hi: int


class Selected(NamedTuple):
    """What `Kernels.select_columns` returns besides the values it writes."""

    sq_distances: Vector | None
    nonfinite: NDArray[np.bool_]


class Kernels(Protocol):
    """The four primitives. All sums are float64 whatever the rows' dtype; inputs are never written.

    The same input gives the same bits for any number of threads and from run to run.

    Attributes
    ----------
    name : str
        As in the registry.
    roundings : (float, float)
        Bound of the relative error of plain distances, and of `gram` in the lengths of an entry's two rows: so many
        units of 2**-53, and so many for each column, as the backend orders its sums. Rows that are constant over the
        columns come near it.
    """

    name: str
    roundings: tuple[float, float]

    def takes_float32_products(self, rows: Rows) -> bool:
        """Whether `gram` of such rows may have float32 products where it is asked for `single` ones."""

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
        """Mean of a window of each column's sorted values or of those nearest to it; on request the rows' distances.

        Parameters
        ----------
        rows : Rows
            n rows of d columns.
        window : Window
            Ranks [lo, hi) that are averaged, ``0 <= lo < hi <=`` number of cells. A row is one cell, or with
            `multiplicities` as many equal cells as its entry says.
        nearest : int, optional
            Average the so many values nearest to the window's middle instead; at least 1, at most the number of
            selected rows, and not together with `multiplicities`.
        multiplicities : (k,) int64, optional
            Non-negative, one for each selected row; the sum is below 2**62.
        mix : (k, n) float64, optional
            Select over the rows ``mix @ rows / mix_divisors[:, None]`` instead, made tile by tile and rounded to
            float32 (of float64 rows to float64). An entry that is exactly 0 is never multiplied, so that a NaN or Inf
            in a left-out row stays out.
        mix_divisors : (k,) float64, optional
            Positive and finite; all 1 by default.
        measure : (m, n) float64, optional
            With `distances`: measure the rows ``measure @ rows / measure_divisors[:, None]`` (float64) instead of the
            rows themselves. Where they are the very arrays of the mix, mixed rows are made once.
        measure_divisors : (m,) float64, optional
            Positive and finite; all 1 by default.
        scale : float
            A power of two by which differences are multiplied before they are squared (float64 rows whose
            squares would overflow or vanish).
        distances : bool
            Also return the squared distance of each measured row to the result as it is stored.
        out : Rows, optional
            One row that receives the result; without it only the distances are computed.

        Returns
        -------
        Selected
            `sq_distances` (n or m,) float64 or None, NaN or inf where a row is not finite; `nonfinite` (n,) bool,
            True for each row that holds a NaN or Inf.

        Notes
        -----
        NaN ranks above +inf; a window that reaches a NaN gives NaN. One read of the data; extra memory of one column
        tile per thread.

        Means, of windows and of mixed rows, are sums divided once and then rounded once: equal values give that value,
        and whole numbers the number nearest to their mean, as long as float64 holds the sum of their differences
        (subnormal float64 results are within one unit). They lose nothing to a common offset: of float64 values
        differences are summed, from the smallest of a window or from a row that is mixed, so that roundings are those
        of the values' spread. They do not overflow: an average of numbers is a number.

        Nearest values: distances to the middle of a and b are compared exactly, whatever the dtype, so that all
        backends take the same values. Of a window of one or two cells a and b are the ends; of a wider one a + b is
        twice its mean, to within the rounding of a float64 sum of the differences from the smallest (and of subnormal
        float64 values to a unit). Of two values
        equally far on either side the lower one is taken first, of several on one side the one next to the middle in
        rank: `nearest` consecutive ranks are taken, the lowest ones [k, k + nearest) for which ``x[k] + x[k + nearest]
        < a + b`` is false. An infinite value is farther than any number; a NaN is farthest, and where one would be
        taken the result is NaN. Otherwise, where a + b is no number because a or b is none, it is itself the result.
        """

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
        """Inner products of the rows centred on their column-wise lower median.

        Parameters
        ----------
        rows : Rows
            n rows of d columns.
        multiplicities : (n,) int64, optional
            For the median a row stands for so many equal ones: many rows of little weight cannot move the centre. Where
            one row alone counts it is the centre, and costs no more than that.
        origin : bool
            Append the origin as one more row (after centring it is minus the median).
        scale : float
            A power of two that multiplies the centred rows.
        single : bool
            Products of rows other than float64 may be taken in float32, in sums of at most 32, and the centre may be
            the median of every so many rows. The error of an entry then stays within 40 * 2**-24 times the lengths of
            its two centred rows, of which none counts as shorter than 2**-50 sqrt(d); where squares overflow float32
            the diagonal is inf, and the row's other entries mean nothing. Attackers on the rows that give the centre
            can only make those lengths, and with them the bound, larger.
        lines : int, optional
            Products of the first so many rows only, with all: lines * n operations a column instead of n * n / 2.

        Returns
        -------
        (m, m) float64, m = n + origin, or (lines, m)
            Row and column i are NaN where row i holds a NaN or Inf; the median, a finite number wherever fewer
            than half of a column's values are NaN or Inf (0 elsewhere), keeps it from touching the others.

        Notes
        -----
        Products below 2**-1022 may count as 0, with `single` those below 2**-126: numbers like these take the processor
        a hundred times as long. Without `single` up to half of the rows cannot move the centre beyond the other rows,
        so no choice of rows costs the others digits; with it half of those that give the centre can, and the lengths
        tell. One read of the data.
        """

    def row_sq_distances(self, rows: Rows, centres: Rows | None, *, scale: float = 1.0, exact: bool = True) -> Matrix:
        """Squared distance of each row to each centre, correct to the last bit but for about 1e-30 relative.

        Parameters
        ----------
        rows : Rows
            n rows of d columns.
        centres : Rows or None
            k rows with the same segments and dtype; None: the origin, which is one.
        scale : float
            A power of two that multiplies rows and centres.
        exact : bool
            Otherwise sums may be plain float64 ones, good to `roundings`, which take half of the time.

        Returns
        -------
        (k, n) float64
            NaN or inf where the row or the centre is not finite.

        Notes
        -----
        Sums carry their rounding errors (doubled float64), so equal distances come out equal in whatever order
        the same terms are met. Squares below 2**-1022 may count as 0; `scale` brings tiny rows out of there. One read
        of the data (on a GPU one for each centre).
        """

    def weighted_row_sum(self, rows: Rows, weights: Matrix, out: Rows, *, divisors: Vector | None = None) -> None:
        """Write ``weights @ rows / divisors[:, None]``.

        Parameters
        ----------
        rows : Rows
            n rows of d columns.
        weights : (k, n) float64
            Rows of weight exactly 0 are never read.
        out : Rows
            k rows with the same segments and dtype, written.
        divisors : (k,) float64, optional
            Between 2**-900 and 2**900; all 1 by default.

        Notes
        -----
        Summed in float64, divided once, and then rounded once: equal rows of weight 1 over their number
        are that row, whole numbers give the number nearest to their mean, however many they are. Of float64 rows sums
        carry their rounding errors (doubled float64), so that errors are those of one rounding whatever n. An average
        (weights that are not negative and add up to the divisor) of finite rows is finite: where sums overflow they
        are taken again, scaled by a power of two. The sign of a zero is not kept. One read of the rows that have some
        weight (on a GPU one for each sum).
        """


@runtime_checkable
class AveragingKernels(Kernels, Protocol):
    """What the C++ backend and the reference do besides, to tell apart what float32 products leave open, see `gram`."""

    def sq_distances_to_average(self, rows: Rows, shares: Vector) -> Vector:
        """Squared distance of each row to an average of them, which is not rounded.

        Parameters
        ----------
        rows : Rows
            n rows of d columns.
        shares : (n,) float64
            Not negative, of sum 1 but for rounding; rows of share exactly 0 are not in the average.

        Returns
        -------
        (n,) float64
            NaN or inf where the row is not finite, everywhere where one that has a share is not.

        Notes
        -----
        Sums of differences from the row of the largest share, in float64: good to `roundings` and n more. One read of
        the data.
        """


class MomentumKernels(Kernels, Protocol):
    """What the backends on the CPU do besides: the update of all workers' momenta that training needs."""

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
        """Replace each momentum by ``gradient_scale * gradient + keep * (momentum - correction_scale * correction)``.

        Parameters
        ----------
        momenta : Rows
            n rows of d columns, written in place; no row may overlap any other memory given here.
        gradients, corrections : Rows
            n rows with the same segments and dtype. Without corrections: ``gradient_scale * gradient + keep *
            momentum``.
        keep : float
            Where it is 0, momenta and corrections are never read: a NaN or Inf in them is forgotten.
        gradient_scales, correction_scales : (n,) float64
            One factor for each row (a clipped gradient's).

        Notes
        -----
        Each value is computed in float64 and stored in the dtype of the rows; NaN and Inf stay in their row and column.
        Three reads and one write of n x d (with `keep` 0: one read and one write), no extra memory. Over a split of the
        columns it concatenates.
        """
