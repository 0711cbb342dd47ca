"""The public functions: `aggregate`, and one for each rule."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol, TypeVar, cast, overload

from numpy.typing import ArrayLike

from robustkern.contract.rows import Source
from robustkern.engine import Info, Limits, combining, joined, limits, run, write_mixed
from robustkern.engine import mix as solve_mixing
from robustkern.inputs.leaves import EVERYTHING, Choice
from robustkern.inputs.memory import MemorySource
from robustkern.inputs.rows import cut_alike, like_rows
from robustkern.inputs.trees import adapt
from robustkern.rules.base import Aggregator, Rule, as_aggregator, as_mixers
from robustkern.rules.coordinate import MeanAroundMedian, Median, TrimmedMean
from robustkern.rules.ctma import CTMA
from robustkern.rules.geometric_median import GeometricMedian
from robustkern.rules.krum import Krum, MultiKrum
from robustkern.rules.mean import Mean
from robustkern.rules.mixing import NNM, Bucketing
from robustkern.rules.text import parse
from robustkern.untraced import DYNAMO, untraced

__all__ = [
    "aggregate",
    "bucketing",
    "ctma",
    "geometric_median",
    "krum",
    "mean",
    "mean_around_median",
    "median",
    "mix",
    "multi_krum",
    "nnm",
    "trimmed_mean",
]


class Array(Protocol):
    """An array of any library."""

    @property
    def shape(self) -> Any:
        """Sizes of its axes."""

    @property
    def dtype(self) -> Any:
        """Of its values."""


Patterns = str | Sequence[str] | None
Scope = Literal["update", "leaf"]
NonFinite = Literal["error", "drop"]
T = TypeVar("T")  # one update: an array, or a pytree of them
A = TypeVar("A", bound=Array)  # n updates in one array, and their combination


# fmt: off
@overload
def aggregate(
    updates: Sequence[T], rule: Aggregator | str, /, *, f: int | None = ..., delta: float | None = ..., weights:
    ArrayLike | None = ..., centre: Any = ..., seed: int | None = ..., only: Patterns = ..., exclude: Patterns = ...,
    scope: Scope = ..., dtype: Any = ..., nonfinite: NonFinite = ..., out: Any = ..., backend: str = ..., return_info:
    Literal[False] = ...
) -> T: ...
@overload
def aggregate(
    updates: Sequence[T], rule: Aggregator | str, /, *, f: int | None = ..., delta: float | None = ..., weights:
    ArrayLike | None = ..., centre: Any = ..., seed: int | None = ..., only: Patterns = ..., exclude: Patterns = ...,
    scope: Scope = ..., dtype: Any = ..., nonfinite: NonFinite = ..., out: Any = ..., backend: str = ..., return_info:
    Literal[True]
) -> tuple[T, Info]: ...
@overload
def aggregate(
    updates: A, rule: Aggregator | str, /, *, f: int | None = ..., delta: float | None = ..., weights: ArrayLike |
    None = ..., centre: Any = ..., seed: int | None = ..., only: Patterns = ..., exclude: Patterns = ..., scope: Scope
    = ..., dtype: Any = ..., nonfinite: NonFinite = ..., out: Any = ..., backend: str = ..., return_info:
    Literal[False] = ...
) -> A: ...
@overload
def aggregate(
    updates: A, rule: Aggregator | str, /, *, f: int | None = ..., delta: float | None = ..., weights: ArrayLike |
    None = ..., centre: Any = ..., seed: int | None = ..., only: Patterns = ..., exclude: Patterns = ..., scope: Scope
    = ..., dtype: Any = ..., nonfinite: NonFinite = ..., out: Any = ..., backend: str = ..., return_info:
    Literal[True]
) -> tuple[A, Info]: ...
# fmt: on
def aggregate(
    updates: Any,
    rule: Aggregator | str,
    /,
    *,
    f: int | None = None,
    delta: float | None = None,
    weights: ArrayLike | None = None,
    centre: Any = None,
    seed: int | None = None,
    only: Patterns = None,
    exclude: Patterns = None,
    scope: Scope = "update",
    dtype: Any = None,
    nonfinite: NonFinite = "error",
    out: Any = None,
    backend: str = "auto",
    return_info: bool = False,
) -> Any:
    """Combine n updates into one, of which up to f may come from Byzantine workers.

    Parameters
    ----------
    updates : array of shape (n, ...), sequence of n arrays, or sequence of n pytrees of arrays
        One row a worker, 1 <= n <= 65535; NumPy (ml_dtypes included), torch, JAX on the processor, or on a GPU CuPy and
        what speaks DLPack; all on one device; float16, bfloat16, float32, float64, complex64 and complex128 (pairs of
        floats), float8; different leaves may differ; any strides; never written, never copied whole. Extra dimensions
        are part of a row. Integer and boolean leaves of pytrees (counters) take no part in distances and come back as
        their column-wise lower median, for `mean` as their mean, rounded half to even. Numbers and texts of Python come
        back as the value that the rows share, but for some that may be Byzantine (`Info.differing`). Mappings are
        matched by their keys; the result has row 0's structure. Two leaves that are one memory, in all rows but some
        that may be Byzantine, count once. Gradients are not recorded: updates that require them warn.
    rule : rule object or str
        Such as ``rk.CTMA(rk.Median())`` or ``"nnm | ctma(geometric_median)"``; see `parse_rule`.
    f : int, optional
        How many rows may be Byzantine, ``0 <= f`` and ``2 * f < n``; reaches every rule that needs it. With weights any
        f rows, so the rules cut the share of the weight that the f heaviest hold, which must be below half.
    delta : float, optional
        Instead of `f`: the share of Byzantine rows, f = floor(delta * n), ``0 <= delta < 0.5``. With weights the share
        of the weight, which the rules cut exactly (Dahan & Levy 2024, "Weight for Robustness", write lambda); equal
        weights are none.
    weights : array_like of shape (n,), optional
        Non-negative and finite, not all 0, for the rules that take weights.
    centre : like one update, optional
        A point that the rule measures from, such as the previous aggregate, for rules that take one.
    seed : int, optional
        Of what the rule draws (bucketing without a seed of its own); by default fresh randomness in every call, which
        `Info.seed` then repeats.
    only, exclude : str or sequence of str, optional
        Patterns of leaf names, as of files: ``layer1.*``, ``*.running_mean``; the name of a leaf is its keys with dots
        between. Leaves that are left out take no part in anything, and the result lacks them (in lists it has None);
        in `out` they stay as they are.
    scope : {"update", "leaf"}
        "leaf" applies the rule to each leaf by itself: the guarantee holds with the same constant, and a row is judged
        by each leaf alone; `Info.leaves` has what was found out.
    dtype : str or dtype, optional
        In which floating-point leaves are combined, and returned, whatever each row has; by default all rows must have
        the same, and float8 (e4m3fn, e5m2) is computed in float32 and rounded once. For `mean` also of integer leaves.
    nonfinite : {"error", "drop"}
        "drop" leaves out every row that holds a NaN or Inf, at the cost of one more read, and says so in
        `Info.dropped`: it leaves n, f does not shrink, and if 2f reaches what is left that is an error.
    out : like one update, optional
        Receives the result: same library, dtypes, shapes and structure; contiguous; apart from `updates`. Its content
        is undefined after an error. It may tie leaves that the updates tie.
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
        through; `median`, whose window f does not move, raises only where they reach its result. An infinity of one
        sign that all rows but f hold in a column, such as a mask's, is no such thing: the column leaves all distances,
        the result has the infinity (`Info.shared_inf`), at the cost of two more reads.
    BackendUnavailable
        If the backend is not installed or cannot run these dtypes.

    Notes
    -----
    Reads of the n x d data: 1 for mean, median, trimmed mean and mean around the median; 2 at most for everything
    else, however long the chain, but 3 where distances between the rows and to a selection, or to the origin and to a
    point, are needed (``nnm | ctma(median)``, ``ctma(cge)``); where a cut is too close for them, more, to measure the
    contenders exactly.
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
    return aggregate_untraced(
        updates,
        rule,
        f,
        delta,
        weights,
        centre,
        seed,
        only,
        exclude,
        scope,
        dtype,
        nonfinite,
        out,
        backend,
        return_info,
    )


def aggregate_untraced(*what: Any) -> Any:
    """Call `aggregated`, which torch's compiler must not look into."""
    return untraced(aggregated)(*what) if DYNAMO in sys.modules else aggregated(*what)


class Through(Protocol):
    """What makes of the rows that are here, or of one leaf of them, what is aggregated."""

    def __call__(self, source: MemorySource, leaf: str = ..., /) -> Source:
        """Return the source."""


def _as_it_is(source: MemorySource, leaf: str = "", /) -> Source:
    return source


def aggregated(
    updates: Any,
    rule: Aggregator | str,
    f: int | None,
    delta: float | None,
    weights: ArrayLike | None,
    centre: Any,
    seed: int | None,
    only: Patterns,
    exclude: Patterns,
    scope: Scope,
    dtype: Any,
    nonfinite: NonFinite,
    out: Any,
    backend: str,
    return_info: bool,
    through: Through = _as_it_is,
) -> Any:
    """Aggregate what `through` makes of the rows that are here: all, or some columns of rows held by several."""
    if not isinstance(backend, str):
        raise TypeError(f"backend must be a string; got {type(backend).__name__}")
    plan = parse(rule) if isinstance(rule, str) else rule
    if not isinstance(plan, Aggregator):
        plan = as_aggregator(plan)  # which says what is wrong
    if not isinstance(scope, str):
        raise ValueError(f"scope must be 'update' or 'leaf'; got {type(scope).__name__}")
    if scope not in ("update", "leaf"):
        raise ValueError(f"scope must be 'update' or 'leaf'; got {scope!r}")
    choice = EVERYTHING
    if only is not None or exclude is not None or dtype is not None:
        choice = Choice.of(only, exclude, dtype, isinstance(plan, Mean))

    def within(n: int) -> Limits:
        return limits(plan, n, str, f, delta, weights)

    source, result = adapt(updates, out, centre, choice, within, scope == "leaf")
    info: Info | None
    if scope == "update":
        info = run(plan, through(source), f, delta, weights, seed, nonfinite, backend, return_info)
    else:
        info = _leaf_by_leaf(plan, source, through, (f, delta, weights, seed, nonfinite, backend))
    if source.finish is not None:
        result = source.finish()
    if not return_info:
        return result
    assert info is not None
    return result, replace(info, integers=len(source.integers)) if source.integers else info


def _leaf_by_leaf(
    plan: Aggregator,
    source: MemorySource,
    through: Through,
    options: tuple[Any, ...],
) -> Info:
    if source.parts is None:
        raise ValueError("scope='leaf': the updates are arrays, which are one leaf (pass mappings, or scope='update')")
    f, delta, weights, seed, nonfinite, backend = options
    if not source.parts:  # integers only
        return cast(Info, run(plan, through(source), f, delta, weights, seed, nonfinite, backend))
    infos: dict[str, Info] = {}
    for name, part in source.parts.items():
        infos[name] = cast(Info, run(plan, through(part, name), f, delta, weights, seed, nonfinite, backend))
        seed = infos[name].seed if seed is None else seed  # of the first that drew: all draw the same
    if source.integers:  # which nobody is judged by: all rows vote
        rest = MemorySource.of(source.n, source.integers)
        rest.combine = combining(plan, limits(plan, source.n, str, f, delta, weights))
        for _ in rest.results():
            pass
    return joined(infos)


# ---- rows that are mixed, and stay rows ------------------------------------------------------------------------------


# fmt: off
@overload
def mix(
    updates: Sequence[T], rule: Rule | str, /, *, f: int | None = ..., delta: float | None = ..., seed: int | None =
    ..., backend: str = ..., return_info: Literal[False] = ...
) -> list[T]: ...
@overload
def mix(
    updates: Sequence[T], rule: Rule | str, /, *, f: int | None = ..., delta: float | None = ..., seed: int | None =
    ..., backend: str = ..., return_info: Literal[True]
) -> tuple[list[T], Info]: ...
@overload
def mix(
    updates: A, rule: Rule | str, /, *, f: int | None = ..., delta: float | None = ..., seed: int | None = ...,
    backend: str = ..., return_info: Literal[False] = ...
) -> A: ...
@overload
def mix(
    updates: A, rule: Rule | str, /, *, f: int | None = ..., delta: float | None = ..., seed: int | None = ...,
    backend: str = ..., return_info: Literal[True]
) -> tuple[A, Info]: ...
# fmt: on
def mix(
    updates: Any,
    rule: Rule | str,
    /,
    *,
    f: int | None = None,
    delta: float | None = None,
    seed: int | None = None,
    backend: str = "auto",
    return_info: bool = False,
) -> Any:
    """Return the rows that rules which mix make of n updates: what the last rule of a chain sees.

    In a chain (``aggregate(updates, "nnm | median")``) mixed rows are never stored, which costs less; this is for those
    who go on with the rows themselves.

    Parameters
    ----------
    updates : array of shape (n, ...), sequence of n arrays, or sequence of n pytrees of arrays
        As for `aggregate`, of floating-point leaves only; what is not contiguous is copied.
    rule : rule object or str
        Such as ``rk.NNM()``, ``"arc"`` or ``"bucketing | nnm"``.
    f, delta, seed, backend
        As for `aggregate`.
    return_info : bool
        Also return an `Info`, of which `mixture` has the shares of the rows.

    Returns
    -------
    array of shape (m, ...), or list of m updates
        Of the caller's kind, dtypes and device; m is n but for bucketing. A row that holds NaN or Inf stays alone.

    Raises
    ------
    TypeError, ValueError, NonFiniteError, BackendUnavailable
        As `aggregate`; and where the rule combines the rows, or a leaf holds integers.

    Notes
    -----
    At most two reads of the data, and one write of m rows. Bits do not depend on the number of threads.

    References
    ----------
    .. [1] Allouah et al., "Fixing by Mixing: A Recipe for Optimal Byzantine ML under Heterogeneity", AISTATS 2023.

    Examples
    --------
    >>> import numpy as np, robustkern as rk
    >>> rk.mix(np.array([[1.0, 2], [3, 4], [100, -100]]), "nnm", f=1)
    array([[  2. ,   3. ],
           [  2. ,   3. ],
           [ 50.5, -49. ]])
    """
    asked = (updates, rule, f, delta, seed, backend, return_info)
    return untraced(_mixed)(*asked) if DYNAMO in sys.modules else _mixed(*asked)


def _mixed(
    updates: Any, rule: Any, f: int | None, delta: float | None, seed: int | None, backend: str, return_info: bool
) -> Any:
    if not isinstance(backend, str):
        raise TypeError(f"backend must be a string; got {type(backend).__name__}")
    mixers = as_mixers(rule)
    source, _ = adapt(updates)
    if source.integers or source.plain:
        raise TypeError(f"{mixers}: the updates hold integers or texts, which are not mixed (leave those leaves out)")
    mixture, info = solve_mixing(mixers, source, f, delta, seed, backend)
    target, finish = like_rows(updates, len(mixture.weights))
    write_mixed(mixture, cut_alike(updates, source, target), target, backend)
    result = finish()
    return (result, info) if return_info else result


# ---- one function per rule: `aggregate` with the rule made from parameters -----------------------------------------


# fmt: off
@overload
def mean(
    updates: Sequence[T], /, *, f: int | None = ..., delta: float | None = ..., weights: ArrayLike | None = ...,
    centre: Any = ..., seed: int | None = ..., only: Patterns = ..., exclude: Patterns = ..., scope: Scope = ...,
    dtype: Any = ..., nonfinite: NonFinite = ..., out: Any = ..., backend: str = ..., return_info: Literal[False] =
    ...
) -> T: ...
@overload
def mean(
    updates: Sequence[T], /, *, f: int | None = ..., delta: float | None = ..., weights: ArrayLike | None = ...,
    centre: Any = ..., seed: int | None = ..., only: Patterns = ..., exclude: Patterns = ..., scope: Scope = ...,
    dtype: Any = ..., nonfinite: NonFinite = ..., out: Any = ..., backend: str = ..., return_info: Literal[True]
) -> tuple[T, Info]: ...
@overload
def mean(
    updates: A, /, *, f: int | None = ..., delta: float | None = ..., weights: ArrayLike | None = ..., centre: Any =
    ..., seed: int | None = ..., only: Patterns = ..., exclude: Patterns = ..., scope: Scope = ..., dtype: Any = ...,
    nonfinite: NonFinite = ..., out: Any = ..., backend: str = ..., return_info: Literal[False] = ...
) -> A: ...
@overload
def mean(
    updates: A, /, *, f: int | None = ..., delta: float | None = ..., weights: ArrayLike | None = ..., centre: Any =
    ..., seed: int | None = ..., only: Patterns = ..., exclude: Patterns = ..., scope: Scope = ..., dtype: Any = ...,
    nonfinite: NonFinite = ..., out: Any = ..., backend: str = ..., return_info: Literal[True]
) -> tuple[A, Info]: ...
# fmt: on
def mean(
    updates: Any,
    /,
    *,
    f: int | None = None,
    delta: float | None = None,
    weights: ArrayLike | None = None,
    centre: Any = None,
    seed: int | None = None,
    only: Patterns = None,
    exclude: Patterns = None,
    scope: Scope = "update",
    dtype: Any = None,
    nonfinite: NonFinite = "error",
    out: Any = None,
    backend: str = "auto",
    return_info: bool = False,
) -> Any:
    """(Weighted) mean of the rows: not robust, and lets NaN and Inf through.

    Parameters
    ----------
    updates : array of shape (n, ...), sequence of n arrays, or sequence of n pytrees of arrays
        One row a worker.
    f, delta, weights, centre, seed, only, exclude, scope, dtype, nonfinite, out, backend, return_info
        As for `aggregate`, which also tells the errors.

    Returns
    -------
    one update
        Of the caller's kind.

    Notes
    -----
    One read of the data; summed in float64.
    """
    return aggregate_untraced(
        updates,
        Mean(),
        f,
        delta,
        weights,
        centre,
        seed,
        only,
        exclude,
        scope,
        dtype,
        nonfinite,
        out,
        backend,
        return_info,
    )


# fmt: off
@overload
def median(
    updates: Sequence[T], /, *, even: Literal["mean", "low", "high"] = ..., f: int | None = ..., delta: float | None =
    ..., weights: ArrayLike | None = ..., centre: Any = ..., seed: int | None = ..., only: Patterns = ..., exclude:
    Patterns = ..., scope: Scope = ..., dtype: Any = ..., nonfinite: NonFinite = ..., out: Any = ..., backend: str =
    ..., return_info: Literal[False] = ...
) -> T: ...
@overload
def median(
    updates: Sequence[T], /, *, even: Literal["mean", "low", "high"] = ..., f: int | None = ..., delta: float | None =
    ..., weights: ArrayLike | None = ..., centre: Any = ..., seed: int | None = ..., only: Patterns = ..., exclude:
    Patterns = ..., scope: Scope = ..., dtype: Any = ..., nonfinite: NonFinite = ..., out: Any = ..., backend: str =
    ..., return_info: Literal[True]
) -> tuple[T, Info]: ...
@overload
def median(
    updates: A, /, *, even: Literal["mean", "low", "high"] = ..., f: int | None = ..., delta: float | None = ...,
    weights: ArrayLike | None = ..., centre: Any = ..., seed: int | None = ..., only: Patterns = ..., exclude:
    Patterns = ..., scope: Scope = ..., dtype: Any = ..., nonfinite: NonFinite = ..., out: Any = ..., backend: str =
    ..., return_info: Literal[False] = ...
) -> A: ...
@overload
def median(
    updates: A, /, *, even: Literal["mean", "low", "high"] = ..., f: int | None = ..., delta: float | None = ...,
    weights: ArrayLike | None = ..., centre: Any = ..., seed: int | None = ..., only: Patterns = ..., exclude:
    Patterns = ..., scope: Scope = ..., dtype: Any = ..., nonfinite: NonFinite = ..., out: Any = ..., backend: str =
    ..., return_info: Literal[True]
) -> tuple[A, Info]: ...
# fmt: on
def median(
    updates: Any,
    /,
    *,
    even: Literal["mean", "low", "high"] = "mean",
    f: int | None = None,
    delta: float | None = None,
    weights: ArrayLike | None = None,
    centre: Any = None,
    seed: int | None = None,
    only: Patterns = None,
    exclude: Patterns = None,
    scope: Scope = "update",
    dtype: Any = None,
    nonfinite: NonFinite = "error",
    out: Any = None,
    backend: str = "auto",
    return_info: bool = False,
) -> Any:
    """Coordinate-wise (weighted) median.

    Parameters
    ----------
    updates : array of shape (n, ...), sequence of n arrays, or sequence of n pytrees of arrays
        One row a worker.
    even : {"mean", "low", "high"}
        What an even number of values gives: the mean of the two middle ones, or one of them.
    f, delta, weights, centre, seed, only, exclude, scope, dtype, nonfinite, out, backend, return_info
        As for `aggregate`, which also tells the errors.

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
    return aggregate_untraced(
        updates,
        Median(even),
        f,
        delta,
        weights,
        centre,
        seed,
        only,
        exclude,
        scope,
        dtype,
        nonfinite,
        out,
        backend,
        return_info,
    )


# fmt: off
@overload
def trimmed_mean(
    updates: Sequence[T], /, *, f: int | None = ..., delta: float | None = ..., weights: ArrayLike | None = ...,
    centre: Any = ..., seed: int | None = ..., only: Patterns = ..., exclude: Patterns = ..., scope: Scope = ...,
    dtype: Any = ..., nonfinite: NonFinite = ..., out: Any = ..., backend: str = ..., return_info: Literal[False] =
    ...
) -> T: ...
@overload
def trimmed_mean(
    updates: Sequence[T], /, *, f: int | None = ..., delta: float | None = ..., weights: ArrayLike | None = ...,
    centre: Any = ..., seed: int | None = ..., only: Patterns = ..., exclude: Patterns = ..., scope: Scope = ...,
    dtype: Any = ..., nonfinite: NonFinite = ..., out: Any = ..., backend: str = ..., return_info: Literal[True]
) -> tuple[T, Info]: ...
@overload
def trimmed_mean(
    updates: A, /, *, f: int | None = ..., delta: float | None = ..., weights: ArrayLike | None = ..., centre: Any =
    ..., seed: int | None = ..., only: Patterns = ..., exclude: Patterns = ..., scope: Scope = ..., dtype: Any = ...,
    nonfinite: NonFinite = ..., out: Any = ..., backend: str = ..., return_info: Literal[False] = ...
) -> A: ...
@overload
def trimmed_mean(
    updates: A, /, *, f: int | None = ..., delta: float | None = ..., weights: ArrayLike | None = ..., centre: Any =
    ..., seed: int | None = ..., only: Patterns = ..., exclude: Patterns = ..., scope: Scope = ..., dtype: Any = ...,
    nonfinite: NonFinite = ..., out: Any = ..., backend: str = ..., return_info: Literal[True]
) -> tuple[A, Info]: ...
# fmt: on
def trimmed_mean(
    updates: Any,
    /,
    *,
    f: int | None = None,
    delta: float | None = None,
    weights: ArrayLike | None = None,
    centre: Any = None,
    seed: int | None = None,
    only: Patterns = None,
    exclude: Patterns = None,
    scope: Scope = "update",
    dtype: Any = None,
    nonfinite: NonFinite = "error",
    out: Any = None,
    backend: str = "auto",
    return_info: bool = False,
) -> Any:
    """Coordinate-wise mean without the f smallest and f largest values.

    Parameters
    ----------
    updates : array of shape (n, ...), sequence of n arrays, or sequence of n pytrees of arrays
        One row a worker.
    f, delta, weights, centre, seed, only, exclude, scope, dtype, nonfinite, out, backend, return_info
        As for `aggregate`, which also tells the errors; `f` or `delta` is required.

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
    return aggregate_untraced(
        updates,
        TrimmedMean(),
        f,
        delta,
        weights,
        centre,
        seed,
        only,
        exclude,
        scope,
        dtype,
        nonfinite,
        out,
        backend,
        return_info,
    )


# fmt: off
@overload
def mean_around_median(
    updates: Sequence[T], /, *, count: int | None = ..., even: Literal["mean", "low", "high"] = ...,
    f: int | None = ..., delta: float | None = ..., weights: ArrayLike | None = ...,
    centre: Any = ..., seed: int | None = ..., only: Patterns = ..., exclude: Patterns = ..., scope: Scope = ...,
    dtype: Any = ..., nonfinite: NonFinite = ..., out: Any = ..., backend: str = ..., return_info: Literal[False] =
    ...
) -> T: ...
@overload
def mean_around_median(
    updates: Sequence[T], /, *, count: int | None = ..., even: Literal["mean", "low", "high"] = ...,
    f: int | None = ..., delta: float | None = ..., weights: ArrayLike | None = ...,
    centre: Any = ..., seed: int | None = ..., only: Patterns = ..., exclude: Patterns = ..., scope: Scope = ...,
    dtype: Any = ..., nonfinite: NonFinite = ..., out: Any = ..., backend: str = ..., return_info: Literal[True]
) -> tuple[T, Info]: ...
@overload
def mean_around_median(
    updates: A, /, *, count: int | None = ..., even: Literal["mean", "low", "high"] = ...,
    f: int | None = ..., delta: float | None = ..., weights: ArrayLike | None = ..., centre: Any =
    ..., seed: int | None = ..., only: Patterns = ..., exclude: Patterns = ..., scope: Scope = ..., dtype: Any = ...,
    nonfinite: NonFinite = ..., out: Any = ..., backend: str = ..., return_info: Literal[False] = ...
) -> A: ...
@overload
def mean_around_median(
    updates: A, /, *, count: int | None = ..., even: Literal["mean", "low", "high"] = ...,
    f: int | None = ..., delta: float | None = ..., weights: ArrayLike | None = ..., centre: Any =
    ..., seed: int | None = ..., only: Patterns = ..., exclude: Patterns = ..., scope: Scope = ..., dtype: Any = ...,
    nonfinite: NonFinite = ..., out: Any = ..., backend: str = ..., return_info: Literal[True]
) -> tuple[A, Info]: ...
# fmt: on
def mean_around_median(
    updates: Any,
    /,
    *,
    count: int | None = None,
    even: Literal["mean", "low", "high"] = "mean",
    f: int | None = None,
    delta: float | None = None,
    weights: ArrayLike | None = None,
    centre: Any = None,
    seed: int | None = None,
    only: Patterns = None,
    exclude: Patterns = None,
    scope: Scope = "update",
    dtype: Any = None,
    nonfinite: NonFinite = "error",
    out: Any = None,
    backend: str = "auto",
    return_info: bool = False,
) -> Any:
    """Coordinate-wise mean of the n-f values nearest to the median ("MeaMed").

    Parameters
    ----------
    updates : array of shape (n, ...), sequence of n arrays, or sequence of n pytrees of arrays
        One row a worker.
    count : int, optional
        How many values are averaged, instead of n-f; between 1 and n.
    even : {"mean", "low", "high"}
        What an even number of values has as its median: the mean of the two middle ones, or one of them.
    f, delta, weights, centre, seed, only, exclude, scope, dtype, nonfinite, out, backend, return_info
        As for `aggregate`, which also tells the errors; `f`, `delta` or `count` is required, there are no weights.

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
    return aggregate_untraced(
        updates,
        MeanAroundMedian(count, even),
        f,
        delta,
        weights,
        centre,
        seed,
        only,
        exclude,
        scope,
        dtype,
        nonfinite,
        out,
        backend,
        return_info,
    )


# fmt: off
@overload
def geometric_median(
    updates: Sequence[T], /, *, nu: float = ..., max_iter: int | None = ..., start: Literal["mean", "zero"] = ...,
    tol: float | None = ..., f: int | None = ..., delta: float | None = ..., weights: ArrayLike | None = ...,
    centre: Any = ..., seed: int | None = ..., only: Patterns = ..., exclude: Patterns = ..., scope: Scope = ...,
    dtype: Any = ..., nonfinite: NonFinite = ..., out: Any = ..., backend: str = ..., return_info: Literal[False] =
    ...
) -> T: ...
@overload
def geometric_median(
    updates: Sequence[T], /, *, nu: float = ..., max_iter: int | None = ..., start: Literal["mean", "zero"] = ...,
    tol: float | None = ..., f: int | None = ..., delta: float | None = ..., weights: ArrayLike | None = ...,
    centre: Any = ..., seed: int | None = ..., only: Patterns = ..., exclude: Patterns = ..., scope: Scope = ...,
    dtype: Any = ..., nonfinite: NonFinite = ..., out: Any = ..., backend: str = ..., return_info: Literal[True]
) -> tuple[T, Info]: ...
@overload
def geometric_median(
    updates: A, /, *, nu: float = ..., max_iter: int | None = ..., start: Literal["mean", "zero"] = ..., tol: float
    | None = ..., f: int | None = ..., delta: float | None = ..., weights: ArrayLike | None = ..., centre: Any =
    ..., seed: int | None = ..., only: Patterns = ..., exclude: Patterns = ..., scope: Scope = ..., dtype: Any =
    ..., nonfinite: NonFinite = ..., out: Any = ..., backend: str = ..., return_info: Literal[False] = ...
) -> A: ...
@overload
def geometric_median(
    updates: A, /, *, nu: float = ..., max_iter: int | None = ..., start: Literal["mean", "zero"] = ..., tol: float
    | None = ..., f: int | None = ..., delta: float | None = ..., weights: ArrayLike | None = ..., centre: Any =
    ..., seed: int | None = ..., only: Patterns = ..., exclude: Patterns = ..., scope: Scope = ..., dtype: Any =
    ..., nonfinite: NonFinite = ..., out: Any = ..., backend: str = ..., return_info: Literal[True]
) -> tuple[A, Info]: ...
# fmt: on
def geometric_median(
    updates: Any,
    /,
    *,
    nu: float = 0.0,
    max_iter: int | None = None,
    start: Literal["mean", "zero"] = "mean",
    tol: float | None = None,
    f: int | None = None,
    delta: float | None = None,
    weights: ArrayLike | None = None,
    centre: Any = None,
    seed: int | None = None,
    only: Patterns = None,
    exclude: Patterns = None,
    scope: Scope = "update",
    dtype: Any = None,
    nonfinite: NonFinite = "error",
    out: Any = None,
    backend: str = "auto",
    return_info: bool = False,
) -> Any:
    """(Weighted) geometric median, by default converged.

    Parameters
    ----------
    updates : array of shape (n, ...), sequence of n arrays, or sequence of n pytrees of arrays
        One row a worker.
    nu : float
        Distances below it count as it (smoothed Weiszfeld), so that rows nearer than it pull in proportion to their
        distance: the Huber geometric median of that threshold. 0: the true geometric median.
    max_iter : int, optional
        Number of Weiszfeld steps at most, 0 for the start itself; by default until it has converged.
    start : {"mean", "zero"}
        Where Weiszfeld starts; without effect where nu is 0 and neither max_iter nor tol is given. ``nu=0.1,
        max_iter=3, start="zero"`` is RFA as ByzFL has it (`GeometricMedian.rfa`).
    tol : float, optional
        Weiszfeld ends with a step of at most this length; by default of 1e-10 of the rows' spread.
    f, delta, weights, centre, seed, only, exclude, scope, dtype, nonfinite, out, backend, return_info
        As for `aggregate`, which also tells the errors.

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
    return aggregate_untraced(
        updates,
        GeometricMedian(nu, max_iter, start, tol),
        f,
        delta,
        weights,
        centre,
        seed,
        only,
        exclude,
        scope,
        dtype,
        nonfinite,
        out,
        backend,
        return_info,
    )


# fmt: off
@overload
def krum(
    updates: Sequence[T], /, *, neighbours: int | None = ..., squared: bool = ..., f: int | None = ..., delta: float |
    None = ..., weights: ArrayLike | None = ..., centre: Any = ..., seed: int | None = ..., only: Patterns = ...,
    exclude: Patterns = ..., scope: Scope = ..., dtype: Any = ..., nonfinite: NonFinite = ..., out: Any = ..., backend:
    str = ..., return_info: Literal[False] = ...
) -> T: ...
@overload
def krum(
    updates: Sequence[T], /, *, neighbours: int | None = ..., squared: bool = ..., f: int | None = ..., delta: float |
    None = ..., weights: ArrayLike | None = ..., centre: Any = ..., seed: int | None = ..., only: Patterns = ...,
    exclude: Patterns = ..., scope: Scope = ..., dtype: Any = ..., nonfinite: NonFinite = ..., out: Any = ..., backend:
    str = ..., return_info: Literal[True]
) -> tuple[T, Info]: ...
@overload
def krum(
    updates: A, /, *, neighbours: int | None = ..., squared: bool = ..., f: int | None = ..., delta: float | None = ...,
    weights: ArrayLike | None = ..., centre: Any = ..., seed: int | None = ..., only: Patterns = ..., exclude: Patterns
    = ..., scope: Scope = ..., dtype: Any = ..., nonfinite: NonFinite = ..., out: Any = ..., backend: str = ...,
    return_info: Literal[False] = ...
) -> A: ...
@overload
def krum(
    updates: A, /, *, neighbours: int | None = ..., squared: bool = ..., f: int | None = ..., delta: float | None = ...,
    weights: ArrayLike | None = ..., centre: Any = ..., seed: int | None = ..., only: Patterns = ..., exclude: Patterns
    = ..., scope: Scope = ..., dtype: Any = ..., nonfinite: NonFinite = ..., out: Any = ..., backend: str = ...,
    return_info: Literal[True]
) -> tuple[A, Info]: ...
# fmt: on
def krum(
    updates: Any,
    /,
    *,
    neighbours: int | None = None,
    squared: bool = True,
    f: int | None = None,
    delta: float | None = None,
    weights: ArrayLike | None = None,
    centre: Any = None,
    seed: int | None = None,
    only: Patterns = None,
    exclude: Patterns = None,
    scope: Scope = "update",
    dtype: Any = None,
    nonfinite: NonFinite = "error",
    out: Any = None,
    backend: str = "auto",
    return_info: bool = False,
) -> Any:
    """Return the row with the least sum of squared distances to its nearest others.

    Parameters
    ----------
    updates : array of shape (n, ...), sequence of n arrays, or sequence of n pytrees of arrays
        One row a worker.
    neighbours : int, optional
        How many others count; by default n-f-2 as in the paper (ByzFL takes n-f-1).
    squared : bool
        Whether distances are squared before they are added.
    f, delta, weights, centre, seed, only, exclude, scope, dtype, nonfinite, out, backend, return_info
        As for `aggregate`, which also tells the errors; `f`, `delta` or `count` is required, there are no weights.

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
    return aggregate_untraced(
        updates,
        Krum(neighbours, squared),
        f,
        delta,
        weights,
        centre,
        seed,
        only,
        exclude,
        scope,
        dtype,
        nonfinite,
        out,
        backend,
        return_info,
    )


# fmt: off
@overload
def multi_krum(
    updates: Sequence[T], /, *, m: int | None = ..., neighbours: int | None = ..., squared: bool = ..., f: int | None =
    ..., delta: float | None = ..., weights: ArrayLike | None = ..., centre: Any = ..., seed: int | None = ..., only:
    Patterns = ..., exclude: Patterns = ..., scope: Scope = ..., dtype: Any = ..., nonfinite: NonFinite = ..., out: Any
    = ..., backend: str = ..., return_info: Literal[False] = ...
) -> T: ...
@overload
def multi_krum(
    updates: Sequence[T], /, *, m: int | None = ..., neighbours: int | None = ..., squared: bool = ..., f: int | None =
    ..., delta: float | None = ..., weights: ArrayLike | None = ..., centre: Any = ..., seed: int | None = ..., only:
    Patterns = ..., exclude: Patterns = ..., scope: Scope = ..., dtype: Any = ..., nonfinite: NonFinite = ..., out: Any
    = ..., backend: str = ..., return_info: Literal[True]
) -> tuple[T, Info]: ...
@overload
def multi_krum(
    updates: A, /, *, m: int | None = ..., neighbours: int | None = ..., squared: bool = ..., f: int | None = ...,
    delta: float | None = ..., weights: ArrayLike | None = ..., centre: Any = ..., seed: int | None = ..., only:
    Patterns = ..., exclude: Patterns = ..., scope: Scope = ..., dtype: Any = ..., nonfinite: NonFinite = ..., out: Any
    = ..., backend: str = ..., return_info: Literal[False] = ...
) -> A: ...
@overload
def multi_krum(
    updates: A, /, *, m: int | None = ..., neighbours: int | None = ..., squared: bool = ..., f: int | None = ...,
    delta: float | None = ..., weights: ArrayLike | None = ..., centre: Any = ..., seed: int | None = ..., only:
    Patterns = ..., exclude: Patterns = ..., scope: Scope = ..., dtype: Any = ..., nonfinite: NonFinite = ..., out: Any
    = ..., backend: str = ..., return_info: Literal[True]
) -> tuple[A, Info]: ...
# fmt: on
def multi_krum(
    updates: Any,
    /,
    *,
    m: int | None = None,
    neighbours: int | None = None,
    squared: bool = True,
    f: int | None = None,
    delta: float | None = None,
    weights: ArrayLike | None = None,
    centre: Any = None,
    seed: int | None = None,
    only: Patterns = None,
    exclude: Patterns = None,
    scope: Scope = "update",
    dtype: Any = None,
    nonfinite: NonFinite = "error",
    out: Any = None,
    backend: str = "auto",
    return_info: bool = False,
) -> Any:
    """Return the mean of the m rows of best Krum score.

    Parameters
    ----------
    updates : array of shape (n, ...), sequence of n arrays, or sequence of n pytrees of arrays
        One row a worker.
    m : int, optional
        How many, at most n; by default n-f, and more are bound to let attackers in.
    neighbours, squared
        As for `krum`.
    f, delta, weights, centre, seed, only, exclude, scope, dtype, nonfinite, out, backend, return_info
        As for `aggregate`, which also tells the errors; `f` or `delta` is required. Weights count in the mean of the
        rows that are kept, not in the scores.

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
    return aggregate_untraced(
        updates,
        MultiKrum(m, neighbours, squared),
        f,
        delta,
        weights,
        centre,
        seed,
        only,
        exclude,
        scope,
        dtype,
        nonfinite,
        out,
        backend,
        return_info,
    )


# fmt: off
@overload
def ctma(
    updates: Sequence[T], /, *, anchor: Aggregator | str = ..., f: int | None = ..., delta: float | None = ...,
    weights: ArrayLike | None = ..., centre: Any = ..., seed: int | None = ..., only: Patterns = ..., exclude:
    Patterns = ..., scope: Scope = ..., dtype: Any = ..., nonfinite: NonFinite = ..., out: Any = ..., backend: str =
    ..., return_info: Literal[False] = ...
) -> T: ...
@overload
def ctma(
    updates: Sequence[T], /, *, anchor: Aggregator | str = ..., f: int | None = ..., delta: float | None = ...,
    weights: ArrayLike | None = ..., centre: Any = ..., seed: int | None = ..., only: Patterns = ..., exclude:
    Patterns = ..., scope: Scope = ..., dtype: Any = ..., nonfinite: NonFinite = ..., out: Any = ..., backend: str =
    ..., return_info: Literal[True]
) -> tuple[T, Info]: ...
@overload
def ctma(
    updates: A, /, *, anchor: Aggregator | str = ..., f: int | None = ..., delta: float | None = ..., weights:
    ArrayLike | None = ..., centre: Any = ..., seed: int | None = ..., only: Patterns = ..., exclude: Patterns = ...,
    scope: Scope = ..., dtype: Any = ..., nonfinite: NonFinite = ..., out: Any = ..., backend: str = ..., return_info:
    Literal[False] = ...
) -> A: ...
@overload
def ctma(
    updates: A, /, *, anchor: Aggregator | str = ..., f: int | None = ..., delta: float | None = ..., weights:
    ArrayLike | None = ..., centre: Any = ..., seed: int | None = ..., only: Patterns = ..., exclude: Patterns = ...,
    scope: Scope = ..., dtype: Any = ..., nonfinite: NonFinite = ..., out: Any = ..., backend: str = ..., return_info:
    Literal[True]
) -> tuple[A, Info]: ...
# fmt: on
def ctma(
    updates: Any,
    /,
    *,
    anchor: Aggregator | str = "geometric_median",
    f: int | None = None,
    delta: float | None = None,
    weights: ArrayLike | None = None,
    centre: Any = None,
    seed: int | None = None,
    only: Patterns = None,
    exclude: Patterns = None,
    scope: Scope = "update",
    dtype: Any = None,
    nonfinite: NonFinite = "error",
    out: Any = None,
    backend: str = "auto",
    return_info: bool = False,
) -> Any:
    """Mean of the n-f rows nearest to the result of another rule.

    Parameters
    ----------
    updates : array of shape (n, ...), sequence of n arrays, or sequence of n pytrees of arrays
        One row a worker.
    anchor : rule object or str
        Any rule that combines the rows, also a chain such as ``"nnm | median"``; it only selects.
    f, delta, weights, centre, seed, only, exclude, scope, dtype, nonfinite, out, backend, return_info
        As for `aggregate`, which also tells the errors; `f` or `delta` is required.

    Returns
    -------
    one update
        Of the caller's kind.

    Notes
    -----
    Two reads of the data at most; three over an anchor that takes two and is no combination of rows. Exactly n-f rows
    are kept, equal distances by the lowest index; distances to a selection are to what is rounded to the rows' dtype.
    For any anchor, any n-f rows G and delta = f/n:
    ``|ctma - mean_G|^2 <= 4 delta/(1-delta) * (mean_G |x_i - mean_G|^2 + |anchor - mean_G|^2)``.

    References
    ----------
    .. [1] Dahan & Levy, "Fault Tolerant ML: Efficient Meta-Aggregation and Synchronous Training", ICML 2024.
    .. [2] Dahan & Levy, "Weight for Robustness", NeurIPS 2024 (the weighted form).
    """
    return aggregate_untraced(
        updates,
        CTMA(anchor),
        f,
        delta,
        weights,
        centre,
        seed,
        only,
        exclude,
        scope,
        dtype,
        nonfinite,
        out,
        backend,
        return_info,
    )


# fmt: off
@overload
def nnm(
    updates: Sequence[T], /, *, then: Aggregator | str = ..., count: int | None = ..., f: int | None = ..., delta:
    float | None = ..., weights: ArrayLike | None = ..., centre: Any = ..., seed: int | None = ..., only: Patterns =
    ..., exclude: Patterns = ..., scope: Scope = ..., dtype: Any = ..., nonfinite: NonFinite = ..., out: Any = ...,
    backend: str = ..., return_info: Literal[False] = ...
) -> T: ...
@overload
def nnm(
    updates: Sequence[T], /, *, then: Aggregator | str = ..., count: int | None = ..., f: int | None = ..., delta:
    float | None = ..., weights: ArrayLike | None = ..., centre: Any = ..., seed: int | None = ..., only: Patterns =
    ..., exclude: Patterns = ..., scope: Scope = ..., dtype: Any = ..., nonfinite: NonFinite = ..., out: Any = ...,
    backend: str = ..., return_info: Literal[True]
) -> tuple[T, Info]: ...
@overload
def nnm(
    updates: A, /, *, then: Aggregator | str = ..., count: int | None = ..., f: int | None = ..., delta: float |
    None = ..., weights: ArrayLike | None = ..., centre: Any = ..., seed: int | None = ..., only: Patterns = ...,
    exclude: Patterns = ..., scope: Scope = ..., dtype: Any = ..., nonfinite: NonFinite = ..., out: Any = ...,
    backend: str = ..., return_info: Literal[False] = ...
) -> A: ...
@overload
def nnm(
    updates: A, /, *, then: Aggregator | str = ..., count: int | None = ..., f: int | None = ..., delta: float |
    None = ..., weights: ArrayLike | None = ..., centre: Any = ..., seed: int | None = ..., only: Patterns = ...,
    exclude: Patterns = ..., scope: Scope = ..., dtype: Any = ..., nonfinite: NonFinite = ..., out: Any = ...,
    backend: str = ..., return_info: Literal[True]
) -> tuple[A, Info]: ...
# fmt: on
def nnm(
    updates: Any,
    /,
    *,
    then: Aggregator | str = "mean",
    count: int | None = None,
    f: int | None = None,
    delta: float | None = None,
    weights: ArrayLike | None = None,
    centre: Any = None,
    seed: int | None = None,
    only: Patterns = None,
    exclude: Patterns = None,
    scope: Scope = "update",
    dtype: Any = None,
    nonfinite: NonFinite = "error",
    out: Any = None,
    backend: str = "auto",
    return_info: bool = False,
) -> Any:
    """Nearest-neighbour mixing, then another rule.

    Parameters
    ----------
    updates : array of shape (n, ...), sequence of n arrays, or sequence of n pytrees of arrays
        One row a worker.
    then : rule object or str
        What combines the mixed rows.
    count : int, optional
        How many rows are averaged, instead of n-f; between 1 and n.
    f, delta, weights, centre, seed, only, exclude, scope, dtype, nonfinite, out, backend, return_info
        As for `aggregate`, which also tells the errors; `f`, `delta` or `count` is required, there are no weights.

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
    return aggregate_untraced(
        updates,
        NNM(count) | as_aggregator(then),
        f,
        delta,
        weights,
        centre,
        seed,
        only,
        exclude,
        scope,
        dtype,
        nonfinite,
        out,
        backend,
        return_info,
    )


# fmt: off
@overload
def bucketing(
    updates: Sequence[T], /, *, then: Aggregator | str = ..., size: int | None = ..., f: int | None = ..., delta:
    float | None = ..., weights: ArrayLike | None = ..., centre: Any = ..., seed: int | None = ..., only: Patterns =
    ..., exclude: Patterns = ..., scope: Scope = ..., dtype: Any = ..., nonfinite: NonFinite = ..., out: Any = ...,
    backend: str = ..., return_info: Literal[False] = ...
) -> T: ...
@overload
def bucketing(
    updates: Sequence[T], /, *, then: Aggregator | str = ..., size: int | None = ..., f: int | None = ..., delta:
    float | None = ..., weights: ArrayLike | None = ..., centre: Any = ..., seed: int | None = ..., only: Patterns =
    ..., exclude: Patterns = ..., scope: Scope = ..., dtype: Any = ..., nonfinite: NonFinite = ..., out: Any = ...,
    backend: str = ..., return_info: Literal[True]
) -> tuple[T, Info]: ...
@overload
def bucketing(
    updates: A, /, *, then: Aggregator | str = ..., size: int | None = ..., f: int | None = ..., delta: float | None =
    ..., weights: ArrayLike | None = ..., centre: Any = ..., seed: int | None = ..., only: Patterns = ..., exclude:
    Patterns = ..., scope: Scope = ..., dtype: Any = ..., nonfinite: NonFinite = ..., out: Any = ..., backend: str =
    ..., return_info: Literal[False] = ...
) -> A: ...
@overload
def bucketing(
    updates: A, /, *, then: Aggregator | str = ..., size: int | None = ..., f: int | None = ..., delta: float | None =
    ..., weights: ArrayLike | None = ..., centre: Any = ..., seed: int | None = ..., only: Patterns = ..., exclude:
    Patterns = ..., scope: Scope = ..., dtype: Any = ..., nonfinite: NonFinite = ..., out: Any = ..., backend: str =
    ..., return_info: Literal[True]
) -> tuple[A, Info]: ...
# fmt: on
def bucketing(
    updates: Any,
    /,
    *,
    then: Aggregator | str = "mean",
    size: int | None = None,
    f: int | None = None,
    delta: float | None = None,
    weights: ArrayLike | None = None,
    centre: Any = None,
    seed: int | None = None,
    only: Patterns = None,
    exclude: Patterns = None,
    scope: Scope = "update",
    dtype: Any = None,
    nonfinite: NonFinite = "error",
    out: Any = None,
    backend: str = "auto",
    return_info: bool = False,
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
    f, delta, weights, centre, seed, only, exclude, scope, dtype, nonfinite, out, backend, return_info
        As for `aggregate`, which also tells the errors; there are no weights.

    Returns
    -------
    one update
        Of the caller's kind.

    Notes
    -----
    The permutation is drawn from `seed`, by default afresh in every call. No reads of the data beyond those of the rule
    that follows.

    References
    ----------
    .. [1] Karimireddy, He & Jaggi, "Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing", ICLR 2022.
    """
    return aggregate_untraced(
        updates,
        Bucketing(size, seed) | as_aggregator(then),
        f,
        delta,
        weights,
        centre,
        seed,
        only,
        exclude,
        scope,
        dtype,
        nonfinite,
        out,
        backend,
        return_info,
    )
