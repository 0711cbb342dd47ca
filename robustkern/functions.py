"""The public functions: validate, adapt, choose, run, restore."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robustkern.backends.registry import choose
from robustkern.contract.primitives import Kernels, Window
from robustkern.contract.rows import Rows, Vector
from robustkern.errors import ConvergenceWarning
from robustkern.inputs.memory import Block, Source, adapt
from robustkern.rules import (
    CTMA,
    NNM,
    Aggregator,
    Bucketing,
    GeometricMedian,
    Krum,
    Mean,
    MeanAroundMedian,
    Median,
    MultiKrum,
    TrimmedMean,
    parse_rule,
)
from robustkern.rules.base import as_aggregator
from robustkern.rules.view import Solution, TooCloseError, View, emit, start

__all__ = [
    "Info",
    "aggregate",
    "bucketing",
    "ctma",
    "geometric_median",
    "krum",
    "mean",
    "mean_around_median",
    "median",
    "multi_krum",
    "nnm",
    "trimmed_mean",
]


@dataclass(frozen=True)
class Info:
    """What a call to `aggregate` found out besides its result.

    Attributes
    ----------
    rule : str
        The rule's text form.
    n, d, f : int
        Rows, floating-point coordinates of a row, tolerated Byzantine rows (None where it was not given).
    backend : str
        Which backend ran.
    bound_met : bool or None
        Whether n and f satisfy what the rule's theorem needs; None without f.
    weights : (n,) float64 or None
        Weights of the rows in the result, where it is a weighted sum of rows.
    kept : (n,) bool or None
        Rows that a selecting rule (Krum, Multi-Krum, CTMA) kept.
    sq_distances : (n,) float64 or None
        Squared distances of the rows to the anchor of CTMA, and to the result of other rules; of the mixed rows after
        `nnm`; None for `mean`, and after `bucketing`. Where they follow from the Gram of large rows of 16 or 32 bits
        they are good to about six digits, unless a cut needed more.
    nonfinite_rows : tuple of int
        Rows that hold a NaN or Inf (or, in float64, are too far away to be measured).
    iterations, converged : int, bool or None
        Steps of the geometric median, and whether its last one met the tolerance.
    """

    rule: str
    n: int
    d: int
    f: int | None
    backend: str
    bound_met: bool | None
    weights: Vector | None = field(default=None, compare=False)
    kept: NDArray[np.bool_] | None = field(default=None, compare=False)
    sq_distances: Vector | None = field(default=None, compare=False)
    nonfinite_rows: tuple[int, ...] = ()
    iterations: int | None = None
    converged: bool | None = None


def aggregate(
    updates: Any,
    rule: Aggregator | str,
    /,
    *,
    f: int | None = None,
    delta: float | None = None,
    weights: ArrayLike | None = None,
    out: Any = None,
    backend: str = "auto",
    return_info: bool = False,
) -> Any:
    """Combine n updates into one, of which up to f may come from Byzantine workers.

    Parameters
    ----------
    updates : array of shape (n, ...), sequence of n arrays, or sequence of n pytrees of arrays
        One row a worker, 1 <= n <= 65535; NumPy (ml_dtypes included), torch, or on a GPU CuPy and what speaks DLPack;
        all on one device; float16, bfloat16, float32 or float64, different leaves may differ; any strides; never
        written, never copied whole. Extra dimensions are part of a row. Integer and boolean leaves of pytrees
        (counters) take no part in distances and come back as their column-wise lower median, whatever the rule.
    rule : rule object or str
        Such as ``rk.CTMA(rk.Median())`` or ``"nnm | ctma(geometric_median)"``; see `parse_rule`.
    f : int, optional
        How many rows may be Byzantine, ``0 <= f`` and ``2 * f < n``; reaches every rule that needs it.
    delta : float, optional
        Instead of `f`: the share of Byzantine rows, f = floor(delta * n), ``0 <= delta < 0.5``.
    weights : array_like of shape (n,), optional
        Non-negative and finite, not all 0, for the rules that take weights.
    out : like one update, optional
        Receives the result: same library, dtypes, shapes and structure; contiguous; apart from `updates`. Its content
        is undefined after an error.
    backend : {"auto", "cpp", "numba", "reference", "cuda"}
        Implementation; "auto" takes the best that is installed for where the rows are, or what `use_backend` or
        ``ROBUSTKERN_BACKEND`` names.
    return_info : bool
        Also return an `Info`.

    Returns
    -------
    one update
        Of the caller's kind, structure, shapes, dtypes and device; with `return_info` a pair of it and an `Info`.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind or value; the message names it, what came, and the remedy.
    NonFiniteError
        If more rows hold NaN or Inf than f (without f: than fewer than half), naming them. `mean` alone lets them
        through.
    BackendUnavailable
        If the backend is not installed or cannot run these dtypes.

    Notes
    -----
    Reads of the n x d data: 1 for mean, median, trimmed mean and mean around the median; 2 at most for everything
    else, however long the chain (where a cut is too close for the first, more, to measure the contenders exactly).
    The result is within 1e-6 (float32) or 1e-12 (float64) of the rows' spread of the exact one, besides its own
    rounding, and has the same bits for any number of threads. A NaN ranks above +inf in a column; a row with a NaN or
    Inf is infinitely far from all others, is never kept and never multiplied. Equal distances go to the lowest row
    index.

    References
    ----------
    .. [1] Dahan & Levy, "Fault Tolerant ML: Efficient Meta-Aggregation and Synchronous Training", ICML 2024.

    Examples
    --------
    >>> import numpy as np, robustkern as rk
    >>> x = np.array([[1.0, 2, 3], [2, 4, 1], [3, 0, 5], [100, -100, 7]])
    >>> rk.aggregate(x, "ctma(median)", f=1)
    array([2., 2., 3.])
    """
    # Validate what does not need the rows.
    if not isinstance(backend, str):
        raise TypeError(f"backend must be a string; got {type(backend).__name__}")
    plan = parse_rule(rule) if isinstance(rule, str) else as_aggregator(rule)
    # Adapt.
    source, restore = adapt(updates, out)
    count = check_f(plan, source.n, f, delta)
    row_weights = check_weights(plan, source.n, weights)
    # Choose.
    kernels = choose(backend, source.dtypes, source.device)
    # Run.
    task = Task(plan, source, kernels, count, row_weights)
    task.solve()
    for block in source.blocks():
        task.emit(block, distances=return_info)
    source.combine_counters()
    # Restore.
    if task.poisoned:
        task.raise_nonfinite()
    result = restore()
    return (result, task.info()) if return_info else result


class Task:
    """One aggregation of a source of rows, in memory or in files: solve, then emit every block."""

    solution = Solution()
    poisoned = False
    _sq_distances: Vector | None = None

    def __init__(self, rule: Aggregator, source: Source, kernels: Any, f: int | None, weights: Vector | None) -> None:
        self.rule = rule
        self.source = source
        self.view: View = start(source, kernels, f, weights, rule.needs_origin())
        self._nonfinite = np.zeros(source.n, dtype=np.bool_)

    def solve(self) -> None:
        """Find the weights or the window; reads the data at most once, plus where a cut is a tie."""
        if self.view.weights is not None and not self.rule.supports_weights:
            raise ValueError(
                f"{self.rule}: weights are not supported (drop weights=; mean, median, trimmed_mean, geometric_median "
                "and ctma over them take weights)"
            )
        try:
            self.solution = self.rule.solve(self.view)
        except TooCloseError:  # one more pass, on float64 products
            data = self.view.data
            data.needs_double, data.geometry = True, None
            self.solution = self.rule.solve(self.view)
        if self.solution.gave_up:
            warnings.warn(
                f"{self.rule}: no convergence after {self.solution.iterations} steps; the result is the last of them",
                ConvergenceWarning,
                stacklevel=3,
            )

    def emit(self, block: Block, *, distances: bool) -> None:
        """Write the result of some columns."""
        sq_distances, nonfinite = emit(self.view, self.solution, block, distances)
        if sq_distances is not None:
            self._sq_distances = sq_distances if self._sq_distances is None else self._sq_distances + sq_distances
        if nonfinite is not None and np.count_nonzero(nonfinite):
            self._nonfinite |= nonfinite
            self.poisoned |= not all(_is_finite(self.view.data.kernels, out) for out in block.out)
        elif nonfinite is None and distances and isinstance(self.rule, Mean):
            self._nonfinite |= _nonfinite_rows(self.view.data.kernels, block)

    def raise_nonfinite(self) -> None:
        """Raise the error that names the rows which broke the result."""
        data = self.view.data
        data.nonfinite = self._nonfinite
        raise self.view.nonfinite_error(str(self.rule), np.flatnonzero(self._nonfinite))

    def info(self) -> Info:
        """Return what was found out; valid after the last block."""
        solution, view = self.solution, self.view
        nonfinite = self._nonfinite.copy()
        if view.data.nonfinite is not None:
            nonfinite |= view.data.nonfinite
        distances = solution.sq_distances
        if distances is None and self._sq_distances is not None:
            distances = np.where(np.isnan(self._sq_distances), np.inf, self._sq_distances)
        return Info(
            rule=str(self.rule),
            n=self.source.n,
            d=self.source.d,
            f=view.f,
            backend=view.data.kernels.name,
            bound_met=self.rule.bound_met(self.source.n, view.f),
            weights=solution.weights,
            kept=solution.kept,
            sq_distances=distances,
            nonfinite_rows=tuple(int(i) for i in np.flatnonzero(nonfinite)),
            iterations=solution.iterations,
            converged=solution.converged,
        )


def _is_finite(kernels: Kernels, out: Rows) -> bool:
    """Tell whether a result is; one that is has distance 0 to itself."""
    return not kernels.row_sq_distances(out, out).any()


def _nonfinite_rows(kernels: Kernels, block: Block) -> NDArray[np.bool_]:
    """Which rows hold a NaN or Inf; looked at only where the result of a mean does."""
    flags = np.zeros(block.rows[0].n if block.rows else 0, dtype=np.bool_)
    for rows, out in zip(block.rows, block.out, strict=True):
        if not _is_finite(kernels, out):
            flags |= kernels.select_columns(rows, Window(0, 1)).nonfinite
    return flags


def check_f(rule: Aggregator, n: int, f: Any, delta: Any) -> int | None:
    """Return the number of tolerated rows from f or delta.

    Raises
    ------
    TypeError, ValueError
        If both are given, or one is out of range.
    """
    if delta is not None:
        if f is not None:
            raise ValueError(f"{rule}: pass f or delta, not both; got f={f}, delta={delta}")
        if isinstance(delta, bool) or not isinstance(delta, (int, float, np.integer, np.floating)):
            raise TypeError(f"{rule}: delta must be a number; got {type(delta).__name__}")
        if not 0 <= delta < 0.5:
            raise ValueError(f"{rule}: delta must satisfy 0 <= delta < 0.5; got {delta}")
        return min(math.floor(float(delta) * n + 1e-9), (n - 1) // 2)  # 0.29 * 100 is 28.999999999999996
    if f is None:
        return None
    if isinstance(f, (bool, np.bool_)) or not isinstance(f, (int, np.integer)):
        raise TypeError(f"{rule}: f must be an integer; got {type(f).__name__}")
    if f < 0 or 2 * f >= n:
        raise ValueError(
            f"{rule}: 2*f must be below n, and f at least 0; got f={f} with n={n} rows (lower f, or add rows)"
        )
    return int(f)


def check_weights(rule: Aggregator, n: int, weights: ArrayLike | None) -> Vector | None:
    """Return the weights as float64, None where there are none or all are equal.

    Raises
    ------
    TypeError, ValueError
        If they are not n non-negative finite numbers with a positive sum.
    """
    if weights is None:
        return None
    try:
        values = np.asarray(weights, dtype=np.float64)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # RuntimeError: a tensor with gradients
        raise TypeError(f"{rule}: weights must be numbers, one for each row ({error})") from None
    if values.shape != (n,):
        raise ValueError(f"{rule}: weights must have shape ({n},), one for each row; got shape {values.shape}")
    if not np.isfinite(values).all() or (values < 0).any():
        bad = int(np.flatnonzero(~(np.isfinite(values) & (values >= 0)))[0])
        raise ValueError(f"{rule}: weights must be finite and not negative; got {values[bad]} for row {bad}")
    largest = float(values.max())
    if largest == 0:
        raise ValueError(f"{rule}: weights are all 0; at least one row must have some")
    if (values == largest).all():
        return None
    # Only proportions matter: a power of two keeps whole numbers exact and every sum finite.
    return np.asarray(np.ldexp(values, -math.frexp(largest)[1]))


# ---- one function per rule -------------------------------------------------------------------------------------


def mean(updates: Any, /, **options: Any) -> Any:
    """(Weighted) mean of the rows: not robust, and lets NaN and Inf through.

    Parameters
    ----------
    updates : array of shape (n, ...), sequence of n arrays, or sequence of n pytrees of arrays
        One row a worker.
    **options
        `weights`, `out`, `backend`, `return_info` of `aggregate`, which also tells the errors.

    Returns
    -------
    one update
        Of the caller's kind.

    Notes
    -----
    One read of the data; summed in float64.
    """
    return aggregate(updates, Mean(), **options)


def median(updates: Any, /, *, even: Literal["mean", "low", "high"] = "mean", **options: Any) -> Any:
    """Coordinate-wise (weighted) median.

    Parameters
    ----------
    updates : array of shape (n, ...), sequence of n arrays, or sequence of n pytrees of arrays
        One row a worker.
    even : {"mean", "low", "high"}
        What an even number of values gives: the mean of the two middle ones, or one of them.
    **options
        `f`, `delta`, `weights`, `out`, `backend`, `return_info` of `aggregate`, which also tells the errors.

    Returns
    -------
    one update
        Of the caller's kind.

    Notes
    -----
    One read of the data. NaN ranks above +inf; a median that is not finite raises `NonFiniteError`. Weighted: the first
    value whose cumulative weight passes half, at exactly half `even` decides; weights count in steps of 2^-50 of the
    largest, so that ties are exact.

    References
    ----------
    .. [1] Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018.
    """
    return aggregate(updates, Median(even), **options)


def trimmed_mean(updates: Any, /, **options: Any) -> Any:
    """Coordinate-wise mean without the f smallest and f largest values.

    Parameters
    ----------
    updates : array of shape (n, ...), sequence of n arrays, or sequence of n pytrees of arrays
        One row a worker.
    **options
        `f` (or `delta`; required), `weights`, `out`, `backend`, `return_info` of `aggregate`, which tells the errors.

    Returns
    -------
    one update
        Of the caller's kind.

    Notes
    -----
    One read of the data. NaN ranks above +inf, so up to f of them in a column are cut; a window that reaches one raises
    `NonFiniteError`. Never a sum minus extremes: one value of 1e38 costs the others no digits.

    References
    ----------
    .. [1] Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018.
    """
    return aggregate(updates, TrimmedMean(), **options)


def mean_around_median(updates: Any, /, **options: Any) -> Any:
    """Coordinate-wise mean of the n-f values nearest to the median ("MeaMed").

    Parameters
    ----------
    updates : array of shape (n, ...), sequence of n arrays, or sequence of n pytrees of arrays
        One row a worker.
    **options
        `f` (or `delta`; required), `out`, `backend`, `return_info` of `aggregate`, which also tells the errors.

    Returns
    -------
    one update
        Of the caller's kind.

    Notes
    -----
    One read of the data. Distances to the median are compared in float32 (rows of 16 and 32 bits) or float64; of two
    values equally far on either side the lower one is taken first, so that the order of the rows does not matter. An
    infinite value is farther than any number and a NaN is farthest, so up to f of them in a column are left out; a
    result that is not finite raises `NonFiniteError`.

    References
    ----------
    .. [1] Xie, Koyejo & Gupta, "Generalized Byzantine-tolerant SGD", arXiv:1802.10116, 2018.
    """
    return aggregate(updates, MeanAroundMedian(), **options)


def geometric_median(
    updates: Any,
    /,
    *,
    nu: float = 0.0,
    max_iter: int | None = None,
    start: Literal["mean", "zero"] = "mean",
    **options: Any,
) -> Any:
    """(Weighted) geometric median, by default converged.

    Parameters
    ----------
    updates : array of shape (n, ...), sequence of n arrays, or sequence of n pytrees of arrays
        One row a worker.
    nu : float
        Distances below it count as it (smoothed Weiszfeld); 0: the true geometric median.
    max_iter : int, optional
        Number of Weiszfeld steps at most; by default until the last step is below 1e-10 of the rows' spread.
    start : {"mean", "zero"}
        Where Weiszfeld starts; without effect where nu is 0 and max_iter is None. ``nu=0.1, max_iter=3,
        start="zero"`` is RFA as ByzFL has it (`GeometricMedian.rfa`).
    **options
        `f`, `delta`, `weights`, `out`, `backend`, `return_info` of `aggregate`, which also tells the errors.

    Returns
    -------
    one update
        Of the caller's kind.

    Notes
    -----
    Two reads of the data whatever the number of steps: they are taken on the n x n inner products. Where minimisers are
    not unique (rows on a line, even n) the middle of those that are rows. Rows that are not finite have weight 0.

    References
    ----------
    .. [1] Pillutla, Kakade & Harchaoui, "Robust Aggregation for Federated Learning", IEEE TSP 2022.
    .. [2] Vardi & Zhang, "The multivariate L1-median and associated data depth", PNAS 2000.
    """
    return aggregate(updates, GeometricMedian(nu, max_iter, start), **options)


def krum(updates: Any, /, *, neighbours: int | None = None, **options: Any) -> Any:
    """Return the row with the least sum of squared distances to its nearest others.

    Parameters
    ----------
    updates : array of shape (n, ...), sequence of n arrays, or sequence of n pytrees of arrays
        One row a worker.
    neighbours : int, optional
        How many others count; by default n-f-2 as in the paper (ByzFL takes n-f-1).
    **options
        `f` (or `delta`; required), `out`, `backend`, `return_info` of `aggregate`, which also tells the errors.

    Returns
    -------
    one update
        Of the caller's kind.

    Notes
    -----
    One read of the data and one of a row. Equal scores go to the lowest row index.

    References
    ----------
    .. [1] Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS 2017.
    """
    return aggregate(updates, Krum(neighbours), **options)


def multi_krum(updates: Any, /, *, m: int | None = None, neighbours: int | None = None, **options: Any) -> Any:
    """Return the mean of the m rows of best Krum score.

    Parameters
    ----------
    updates : array of shape (n, ...), sequence of n arrays, or sequence of n pytrees of arrays
        One row a worker.
    m : int, optional
        How many, at most n-f; by default n-f.
    neighbours : int, optional
        As for `krum`.
    **options
        `f` (or `delta`; required), `out`, `backend`, `return_info` of `aggregate`, which also tells the errors.

    Returns
    -------
    one update
        Of the caller's kind.

    Notes
    -----
    One read of the data and one of the m rows.

    References
    ----------
    .. [1] Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS 2017.
    """
    return aggregate(updates, MultiKrum(m, neighbours), **options)


def ctma(updates: Any, /, *, anchor: Aggregator | str = "geometric_median", **options: Any) -> Any:
    """Mean of the n-f rows nearest to the result of another rule.

    Parameters
    ----------
    updates : array of shape (n, ...), sequence of n arrays, or sequence of n pytrees of arrays
        One row a worker.
    anchor : rule object or str
        Any rule that combines the rows, also a chain such as ``"nnm | median"``; it only selects.
    **options
        `f` (or `delta`; required), `weights`, `out`, `backend`, `return_info` of `aggregate`, which tells the errors.

    Returns
    -------
    one update
        Of the caller's kind.

    Notes
    -----
    Two reads of the data at most. Exactly n-f rows are kept, equal distances by the lowest index. For any anchor, any
    n-f rows G and delta = f/n:
    ``|ctma - mean_G|^2 <= 4 delta/(1-delta) * (mean_G |x_i - mean_G|^2 + |anchor - mean_G|^2)``.

    References
    ----------
    .. [1] Dahan & Levy, "Fault Tolerant ML: Efficient Meta-Aggregation and Synchronous Training", ICML 2024.
    .. [2] Dahan & Levy, "Weight for Robustness", NeurIPS 2024 (the weighted form).
    """
    return aggregate(updates, CTMA(parse_rule(anchor) if isinstance(anchor, str) else anchor), **options)


def nnm(updates: Any, /, *, then: Aggregator | str = "mean", **options: Any) -> Any:
    """Nearest-neighbour mixing, then another rule.

    Parameters
    ----------
    updates : array of shape (n, ...), sequence of n arrays, or sequence of n pytrees of arrays
        One row a worker.
    then : rule object or str
        What combines the mixed rows.
    **options
        `f` (or `delta`; required), `out`, `backend`, `return_info` of `aggregate`, which also tells the errors.

    Returns
    -------
    one update
        Of the caller's kind.

    Notes
    -----
    Two reads of the data; mixed rows are never stored.

    References
    ----------
    .. [1] Allouah et al., "Fixing by Mixing: A Recipe for Optimal Byzantine ML under Heterogeneity", AISTATS 2023.
    """
    return aggregate(updates, NNM() | (parse_rule(then) if isinstance(then, str) else as_aggregator(then)), **options)


def bucketing(
    updates: Any, /, *, then: Aggregator | str = "mean", size: int | None = None, seed: int = 0, **options: Any
) -> Any:
    """Means of random buckets of rows, then another rule.

    Parameters
    ----------
    updates : array of shape (n, ...), sequence of n arrays, or sequence of n pytrees of arrays
        One row a worker.
    then : rule object or str
        What combines the buckets.
    size : int, optional
        Rows of a bucket; by default the largest up to floor(n/(2f)) that leaves more than 2f buckets.
    seed : int
        Of the permutation; pass another one each round.
    **options
        `f` (or `delta`), `out`, `backend`, `return_info` of `aggregate`, which also tells the errors.

    Returns
    -------
    one update
        Of the caller's kind.

    Notes
    -----
    No reads of the data beyond those of the rule that follows.

    References
    ----------
    .. [1] Karimireddy, He & Jaggi, "Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing", ICLR 2022.
    """
    last = parse_rule(then) if isinstance(then, str) else as_aggregator(then)
    return aggregate(updates, Bucketing(size, seed) | last, **options)
