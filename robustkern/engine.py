"""One aggregation: validate, solve in n-space, write the result, and tell what was found out.

It knows rows only as a `Source`, in memory, in files, or on ranks; what is added up over the columns goes through it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robustkern.backends.floats import HALF_ULP, LEAST_NORMAL, usual_floats
from robustkern.backends.registry import choose
from robustkern.contract.counters import Combine, lower_median, rounded_mean
from robustkern.contract.filtered import SharedInfinities, SomeRows
from robustkern.contract.primitives import Kernels, Window
from robustkern.contract.rows import Matrix, Rows, Source, Vector
from robustkern.errors import ConvergenceWarning, NonFiniteError, brief, warn
from robustkern.rules.base import Aggregator, Chain, mixed_by
from robustkern.rules.coordinate import Median
from robustkern.rules.geometry import (
    DROP_HINT,
    EPSILON,
    CentreError,
    Given,
    Mask,
    Mixture,
    Selection,
    TooCloseError,
    sum_of,
    tolerated,
)
from robustkern.rules.mean import Mean
from robustkern.rules.view import Solution, View
from robustkern.scalars import as_float, as_int

__all__ = [
    "Info",
    "Limits",
    "Passes",
    "check_rest",
    "combining",
    "count_of_share",
    "joined",
    "limits",
    "mix",
    "run",
    "solved_alone",
    "write_mixed",
]

T = TypeVar("T")


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
    share : float or None
        Which share of the weight the rule takes to be Byzantine: f/n, with weights that of the f heaviest rows, or
        delta; None without f and delta.
    bound_met : bool or None
        Whether n and f, with weights `share`, satisfy what the rule's theorem needs; None without f and delta.
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
        Steps of the geometric median, and whether the inner products prove that its cost, the sum of distances, can
        fall by no more than 1e-10 in the unit of `gap`, or leave no more than their own errors explain. With a number
        of steps or `nu`: whether the last step was below 1e-10 of the spread.
    gap : float or None
        Of the converged geometric median: how much lower the cost could be at another point at most, by duality, in
        units of the total weight times the middle distance of the rows (by weight); errors of the inner products
        included.
    scores : (n,) float64 or None
        Krum's scores, of which the least are best; as good as `sq_distances`.
    order : tuple of int, or None
        Rows that were kept, in the order of selection: best score, or nearest, first.
    mixture : (m, n) float64 or None
        Shares of the rows in the m rows that `nnm` and `bucketing` made of them.
    seed : int or None
        Passed to the call as ``seed``, it draws the same again; None where nothing was drawn from the call's.
    differing : dict of str to tuple of int
        Leaves that are no arrays (numbers and texts of Python) in which some rows differ from the value that the others
        share, which the result has: which rows.
    integers : int
        Leaves of integers or booleans, which are no coordinates: the result has their column-wise lower median, for
        `mean` their mean.
    shared_inf : int
        Columns in which enough rows hold the same infinity; the result has it.
    dropped : tuple of int
        With ``nonfinite="drop"`` the rows that were left out; `n` counts the others, and all that has an entry for each
        row, or names some, speaks of the others, in order. With ``scope="leaf"`` too those that some leaves left out:
        what stands here then speaks of all rows, what stands in `leaves` of the others.
    bad : dict of str to str
        Of files with ``bad="count"``: updates that could not be used, and why; they count as rows that hold NaN.
    leaves : dict of str to Info
        With ``scope="leaf"`` what was found out for each leaf; what stands here is of all of them then.
    """

    rule: str
    n: int
    d: int
    f: int | None
    backend: str
    share: float | None
    bound_met: bool | None
    weights: Vector | None = field(default=None, compare=False)
    kept: NDArray[np.bool_] | None = field(default=None, compare=False)
    sq_distances: Vector | None = field(default=None, compare=False)
    nonfinite_rows: tuple[int, ...] = ()
    iterations: int | None = None
    converged: bool | None = None
    gap: float | None = None
    scores: Vector | None = field(default=None, compare=False)
    order: tuple[int, ...] | None = None
    mixture: NDArray[np.float64] | None = field(default=None, compare=False)
    seed: int | None = None
    differing: dict[str, tuple[int, ...]] = field(default_factory=dict, compare=False)
    integers: int = 0
    shared_inf: int = 0
    dropped: tuple[int, ...] = ()
    bad: dict[str, str] = field(default_factory=dict, compare=False)
    leaves: dict[str, Info] = field(default_factory=dict, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON has it: lists for arrays, None for what is not a finite number."""
        return {spec.name: _as_json(getattr(self, spec.name)) for spec in fields(self)}


def _as_json(value: Any) -> Any:
    if isinstance(value, Info):
        return value.to_dict()
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_as_json(part) for part in value]
    if isinstance(value, dict):
        return {key: _as_json(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Limits(NamedTuple):
    """How many of the rows may be Byzantine.

    Attributes
    ----------
    f : int or None
        So many.
    weights : (n,) float64 or None
        Their weights, where there are any and they are not all equal.
    share : float or None
        With weights: so much of the weight.
    """

    f: int | None
    weights: Vector | None
    share: float | None

    def tolerates(self, bad: NDArray[np.bool_]) -> bool:
        """Tell whether these rows may all be Byzantine: at most f; without f, fewer than half."""
        return tolerated(bad, self.f, self.weights, self.share)

    def enough(self, held: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Tell for each of the m columns of (n, m) bool whether all other rows may be Byzantine."""
        if self.weights is None:
            count = held.sum(axis=0)
            return np.asarray(len(held) - count <= self.f if self.f is not None else 2 * count > len(held))
        missing = self.weights @ ~held
        total = self.weights.sum()
        return np.asarray(
            missing <= total * self.share * (1 + 1e-12) if self.share is not None else missing < total / 2
        )


def limits(
    rule: Aggregator, n: int, row_name: Callable[[int], str], f: Any, delta: Any, weights: ArrayLike | None
) -> Limits:
    """Check f, delta and weights of n rows, and return what follows from them; errors as `robustkern.aggregate`."""
    count = _checked_f(rule, n, f, delta)
    shares = _checked_weights(rule, n, weights)
    share = None if shares is None else _byzantine_share(rule, row_name, shares, count, delta)
    return Limits(count, shares, share)


def run(
    rule: Aggregator,
    source: Source,
    f: Any = None,
    delta: Any = None,
    weights: ArrayLike | None = None,
    seed: Any = None,
    nonfinite: str = "error",
    backend: str = "auto",
    wants_info: bool = True,
) -> Info | None:
    """Aggregate a source: solve the rule, then have every block's result written.

    Parameters
    ----------
    rule : Aggregator
        What to do.
    source : Source
        The rows, and where the result goes.
    f, delta, weights, seed, nonfinite, backend
        As for `robustkern.aggregate`.
    wants_info : bool
        Whether to return an `Info`; without it distances that only it shows are not computed.

    Raises
    ------
    TypeError, ValueError, NonFiniteError, BackendUnavailable
        As `robustkern.aggregate`.
    """
    asked = (rule, source, f, delta, weights, seed, nonfinite, backend, wants_info)
    with np.errstate(all="ignore"):  # whatever the caller has asked NumPy to do
        if LEAST_NORMAL / 2 > 0 and 1 + HALF_ULP == 1 == 1 - HALF_ULP:
            return _run(*asked)
        with usual_floats():
            return _run(*asked)


def _run(
    rule: Aggregator,
    source: Source,
    f: Any,
    delta: Any,
    weights: ArrayLike | None,
    seed: Any,
    nonfinite: str,
    backend: str,
    wants_info: bool,
) -> Info | None:
    if not isinstance(nonfinite, str) or nonfinite not in ("error", "drop"):
        raise ValueError(f"{rule}: nonfinite must be 'error' or 'drop'; got {nonfinite!r}")
    if not source.dtypes and not isinstance(rule, (Mean, Median)):  # which are what integers are combined by
        raise TypeError(
            f"{rule}: the updates hold integers only, which count and are no coordinates (convert them: "
            "x.astype('float32'), in torch x.float())"
        )
    within = limits(rule, source.n, source.row_name, f, delta, weights)
    drawn_from = check_rest(rule, source, within.weights, seed)
    kernels: Kernels = choose(backend, source.dtypes, source.device)
    if nonfinite == "drop":
        return _run_without(rule, source, kernels, within, drawn_from, wants_info)
    try:
        return _solved(rule, source, kernels, within, drawn_from, wants_info)
    except (NonFiniteError, CentreError):
        if source.device != "cpu":
            raise
        without = SharedInfinities(source, within.enough)
        if not without.columns:
            raise
    info = _solved(rule, without, kernels, within, drawn_from, wants_info)
    return None if info is None else replace(info, shared_inf=without.columns)


def _run_without(
    rule: Aggregator,
    source: Source,
    kernels: Kernels,
    within: Limits,
    seed: int | None,
    wants_info: bool,
) -> Info | None:
    """Run without the rows that hold NaN or Inf; f does not shrink."""
    n, columns = source.n, 0
    broken = _broken(source, kernels)
    if source.device == "cpu" and broken.any():
        # Infinities may be shared by all who hold no NaN.
        nans = _holding_nan(source)
        rest = SomeRows(source, np.flatnonzero(~nans)) if nans.any() else source
        shared = SharedInfinities(rest, _left(within, ~nans).enough) if rest.n else None
        if shared is not None and shared.columns:
            columns = shared.columns
            broken = nans.copy()
            broken[~nans] = _broken(shared, kernels)
    kept = np.flatnonzero(~broken)
    if len(kept) < n:
        left = _left(within, ~broken)
        too_few = len(kept) == 0 or 2 * (within.f or 0) >= len(kept)
        if too_few or (left.weights is not None and not left.weights.any()) or (left.share or 0) >= 0.5:
            raise NonFiniteError(
                f"{rule}: {n - len(kept)} of {n} rows hold NaN or Inf, and without them too few are left for "
                f"f={within.f} (2*f must be below what is left, with weights the share below half)",
                tuple(np.flatnonzero(broken).tolist()),
            )
        within = left
        source = SomeRows(source, kept)
    if columns:
        source = SharedInfinities(source, within.enough)
    try:
        info = _solved(rule, source, kernels, within, seed, wants_info)
    except NonFiniteError as error:  # too far away to be measured
        # Dropping is what was done.
        message = str(error).removesuffix(DROP_HINT)
        raise NonFiniteError(message, tuple(kept[list(error.rows)].tolist())) from None
    dropped = tuple(np.flatnonzero(broken).tolist())
    return None if info is None else replace(info, shared_inf=columns, dropped=dropped)


def _left(within: Limits, kept: NDArray[np.bool_]) -> Limits:
    """Return the limits of some of the rows: as many, and as much weight, may be Byzantine among them as among all."""
    weights = within.weights
    if weights is None or kept.all():
        return within
    left = weights[kept]
    share = within.share
    if share is not None:
        share = share * float(weights.sum()) / float(left.sum()) if left.any() else 1.0
    return Limits(within.f, left, share)


def _holding_nan(source: Source) -> NDArray[np.bool_]:
    """Return which rows hold a NaN: one read of the data, in the host's memory."""
    found = np.zeros(source.n, dtype=np.bool_)
    for block in source.blocks():
        for rows in block.rows:
            for part in rows.blocks(max((1 << 22) // (rows.n * rows.dtype.itemsize), 1)):
                found |= np.isnan(part.matrix(0)[: source.n]).any(axis=1)
    return source.total(found.astype(np.float64)) > 0 if source.divided else found


def _broken(source: Source, kernels: Kernels) -> NDArray[np.bool_]:
    """Return which rows hold a NaN or Inf: one read of the data."""
    found = np.zeros(source.n, dtype=np.bool_)
    for block in source.blocks():
        for rows in block.rows:
            found |= _broken_rows(kernels, rows, source.n)
    return source.total(found.astype(np.float64)) > 0 if source.divided else found


def _solved(
    rule: Aggregator, source: Source, kernels: Kernels, within: Limits, seed: int | None, wants_info: bool
) -> Info | None:
    differing = _differing(rule, source, within.tolerates) if source.plain else {}
    given = Passes(source, kernels, source.n, within.f, within.weights, within.share, "origin" in rule.points, seed)
    view = View(given, source.n, within.f, within.weights, within.share)

    def solve() -> Solution:
        solution = _until_told_apart(given, lambda: _solution(rule, view, given, wants_info))
        view.check(solution, rule)
        return solution if wants_info else solution._replace(mixture=None)  # n x n, which ranks would be sent

    solution = source.once(solve, given) if source.divided and not solved_alone(rule) else solve()
    if solution.gave_up:
        what = f"no convergence after {solution.iterations} steps; the result is the last of them"
        if solution.iterations == 0:  # on a row
            what = "that the result is the minimum cannot be proven to the promised accuracy (see Info.gap)"
        warn(f"{rule}: {what}", ConvergenceWarning)
    source.combine = combining(rule, within)
    nonfinite, sq_distances = _write(rule, given, solution, wants_info)
    if not wants_info:
        return None
    found = rule, given, view, solution, nonfinite, sq_distances, differing
    return source.once(lambda: _info(*found), given) if source.divided else _info(*found)


def _solution(rule: Aggregator, view: View, given: Given, wants_info: bool) -> Solution:
    solution = rule.solve(view)
    if wants_info:
        given.require_lengths()
    return solution


def solved_alone(rule: Aggregator) -> bool:
    """Tell whether all who hold columns solve a rule alike, with no pass.

    A class of somebody else's may inherit that it looks at no row, and look.
    """
    return rule.looks_at_no_row and type(rule).__module__.startswith("robustkern.")


def _until_told_apart(given: Given, solve: Callable[[], T]) -> T:
    """Solve, again where only float64 products can decide, and again where these are needed from nearer by."""
    for _ in range(2):
        try:
            return solve()
        except TooCloseError:
            given.start_again()
    return solve()


class Mixed(NamedTuple):
    """What mixers make of the rows: their shares, and what `Info` says of it."""

    mixture: Mixture
    info: Info


def mix(mixers: Chain, source: Source, f: Any, delta: Any, seed: Any, backend: str) -> Mixed:
    """Solve rules that mix; errors as `robustkern.mix`."""
    with np.errstate(all="ignore"), usual_floats():
        within = limits(mixers, source.n, source.row_name, f, delta, None)
        drawn_from = check_rest(mixers, source, None, seed)
        kernels = choose(backend, source.dtypes, source.device)
        given = Given(source, kernels, source.n, within.f, None, None, "origin" in mixers.points, drawn_from)
        view = View(given, source.n, within.f)
        try:
            _, mixture = _until_told_apart(given, lambda: mixed_by(mixers.steps, view))
        except NonFiniteError as error:  # nobody asked `mix` for anything else
            raise NonFiniteError(str(error).removesuffix(DROP_HINT), error.rows) from None
    assert mixture is not None
    nonfinite = () if given.nonfinite is None else tuple(np.flatnonzero(given.nonfinite).tolist())
    share = None if within.f is None else within.f / source.n
    info = Info(
        str(mixers),
        source.n,
        source.d,
        within.f,
        kernels.name,
        share,
        None,
        nonfinite_rows=nonfinite,
        mixture=mixture.matrix,
        seed=given.drawn_seed,
    )
    return Mixed(mixture, info)


def write_mixed(mixture: Mixture, source: Source, target: Source, backend: str) -> None:
    """Write mixed rows: one read of the rows, whatever their number."""
    kernels = choose(backend, source.dtypes, source.device)
    alone = mixture.weights.shape[0] == source.n and not (mixture.weights - np.diag(mixture.weights.diagonal())).any()
    with np.errstate(all="ignore"), usual_floats():
        for block, out in zip(source.blocks(), target.blocks(), strict=True):
            for rows, mixed in zip(block.rows, out.rows, strict=True):
                if alone:  # shares of one row each
                    for k in range(source.n):
                        share, divisor = mixture.weights[k : k + 1, k : k + 1].copy(), mixture.divisors[k : k + 1]
                        kernels.weighted_row_sum(rows.take([k]), share, mixed.take([k]), divisors=divisor)
                    continue
                kernels.weighted_row_sum(rows, np.ascontiguousarray(mixture.weights), mixed, divisors=mixture.divisors)


def combining(rule: Aggregator, within: Limits) -> Combine:
    """Return how leaves of integers are combined."""
    of = rounded_mean if isinstance(rule, Mean) else lower_median

    def combine(values: NDArray[Any], dtype: np.dtype[Any] | None, rows: NDArray[np.intp] | None) -> NDArray[Any]:
        weights = within.weights
        if weights is not None and rows is not None:
            weights = weights[rows]
        return of(values, dtype, weights if weights is None or weights.any() else None)

    return combine


def joined(leaves: dict[str, Info]) -> Info:
    """Return what was found out about all leaves of one aggregation, leaf by leaf.

    It is of all rows: leaves may have dropped different ones.
    """
    first = next(iter(leaves.values()))
    met = [info.bound_met for info in leaves.values()]
    n = first.n + len(first.dropped)

    def of_all(info: Info, rows: tuple[int, ...]) -> tuple[int, ...]:
        left = np.delete(np.arange(n), info.dropped)
        return tuple(left[list(rows)].tolist())

    return Info(
        first.rule,
        n,
        sum(info.d for info in leaves.values()),
        first.f,
        first.backend,
        first.share,
        None if None in met else all(met),
        seed=next((info.seed for info in leaves.values() if info.seed is not None), None),
        differing={name: of_all(info, rows) for info in leaves.values() for name, rows in info.differing.items()},
        nonfinite_rows=tuple(sorted({row for info in leaves.values() for row in of_all(info, info.nonfinite_rows)})),
        dropped=tuple(sorted({row for info in leaves.values() for row in info.dropped})),
        shared_inf=sum(info.shared_inf for info in leaves.values()),
        leaves=leaves,
    )


# ---- validation ------------------------------------------------------------------------------------------------


def count_of_share(delta: float, n: int) -> int:
    """Return how many of n rows a share of them is: floor(delta * n), and fewer than half."""
    return min(math.floor(delta * n + 1e-9), (n - 1) // 2)  # 0.29 * 100 is 28.999999999999996


def _checked_f(rule: Aggregator, n: int, f: Any, delta: Any) -> int | None:
    """Return the number of tolerated rows from f or delta."""
    if delta is not None:
        if f is not None:
            raise ValueError(f"{rule}: pass f or delta, not both; got f={f}, delta={delta}")
        share = as_float(delta)
        if share is None:
            raise TypeError(f"{rule}: delta must be a number; got {type(delta).__name__}")
        if not 0 <= share < 0.5:
            raise ValueError(f"{rule}: delta must satisfy 0 <= delta < 0.5; got {brief(delta)}")
        return count_of_share(share, n)
    if f is None:
        return None
    count = f if type(f) is int else as_int(f)
    if count is None:
        raise TypeError(f"{rule}: f must be an integer; got {type(f).__name__}")
    if count < 0 or 2 * count >= n:
        raise ValueError(
            f"{rule}: 2*f must be below n, and f at least 0; got f={brief(count)} with n={n} rows (lower f, or add "
            "rows)"
        )
    return count


def _checked_weights(rule: Aggregator, n: int, weights: ArrayLike | None) -> Vector | None:
    """Return the weights as float64, None where there are none or all are equal."""
    if weights is None:
        return None
    if isinstance(weights, np.ma.MaskedArray):
        raise TypeError(f"{rule}: weights are a masked array, whose mask would be lost (pass weights.filled(0))")
    try:
        if np.iscomplexobj(weights):
            raise TypeError("complex numbers came")
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


def _differing(
    rule: Aggregator, source: Source, may_be_byzantine: Callable[[NDArray[np.bool_]], bool]
) -> dict[str, tuple[int, ...]]:
    """Return the rows that differ from the others in leaves that are no arrays; raise where they are too many."""
    found = {}
    for leaf in source.plain:
        rows = np.flatnonzero(leaf.differing)
        if len(rows) and not may_be_byzantine(leaf.differing):
            names = ", ".join(source.row_name(int(i)) for i in rows[:20]) + (", ..." if len(rows) > 20 else "")
            raise ValueError(
                f"{rule}: leaf {leaf.name} is no array, and {len(rows)} of {source.n} rows differ from the others' "
                f"{brief(leaf.value)} (rows {names}), more than may be Byzantine (leave it out, make it an array, or "
                "raise f)"
            )
        if len(rows):
            found[leaf.name] = tuple(rows.tolist())
    return found


def _byzantine_share(
    rule: Aggregator, row_name: Callable[[int], str], weights: Vector, f: int | None, delta: float | None
) -> float | None:
    """Return which share of the weight may be Byzantine: delta, or what the f heaviest rows hold."""
    if delta is not None or f is None:
        return None if delta is None else float(delta)
    heaviest = np.argsort(-weights, kind="stable")[:f]
    share = math.fsum(weights[heaviest]) / math.fsum(weights)
    if share >= 0.5:
        names = ", ".join(row_name(int(i)) for i in heaviest[:5]) + (", ..." if f > 5 else "")
        raise ValueError(
            f"{rule}: any f={f} rows may be Byzantine, and the heaviest (rows {names}) hold {share:.3g} of the weight, "
            "which is not below half (lower f, lower or cap the weights, or pass delta=, the share that may be)"
        )
    return share


def check_rest(rule: Aggregator, source: Source, weights: Vector | None, seed: Any) -> int | None:
    """Return the seed; raise where it is none, the rule knows no weights, or there is a centre too many or too few."""
    if weights is not None and not rule.supports_weights:
        raise ValueError(
            f"{rule}: weights are not supported (drop weights=; mean, median, trimmed_mean, geometric_median "
            "and ctma over them take weights)"
        )
    drawn_from = None if seed is None else as_int(seed)
    if seed is not None and (drawn_from is None or drawn_from < 0):
        raise ValueError(f"{rule}: seed must be None or an integer of at least 0; got {brief(seed)}")
    if source.has_centre != ("centre" in rule.points):
        if source.has_centre:
            raise ValueError(f"{rule}: centre is given, but this rule measures from none (drop centre=)")
        raise ValueError(f"{rule}: centre is required, a vector like one update (pass centre=)")
    return drawn_from


# ---- writing ---------------------------------------------------------------------------------------------------


def _write(
    rule: Aggregator, given: Passes, solution: Solution, wants_info: bool
) -> tuple[NDArray[np.bool_], Vector | None]:
    """Make the last pass over the data; return which rows are not finite, and distances where it measured any.

    Raises
    ------
    NonFiniteError
        If they broke the result.
    """
    measures = wants_info and solution.selection is not None and solution.sq_distances is None
    weights = None
    if solution.weights is not None:
        weights = solution.weights
        if solution.iterations is not None:  # they are good to rounding themselves, unlike those that somebody gave
            weights = _adding_up_to(solution.divisor, weights)
        if given.source.has_centre:
            weights = np.append(weights, solution.centre_weight * solution.divisor)
        weights = np.ascontiguousarray(weights[None])
    looks = wants_info and isinstance(rule, Mean)
    nonfinite, poisoned, squares = given.write(weights, solution.divisor, solution.selection, measures, looks)
    if poisoned:
        given.nonfinite = nonfinite
        raise given.nonfinite_error(str(rule), np.flatnonzero(nonfinite))
    return nonfinite, squares if measures else None


def _adding_up_to(divisor: float, weights: Vector) -> Vector:
    """Return weights whose sum, rounded, is the divisor as some whose sum it is to a few more digits.

    What the divisor's rounding leaves goes to the largest: an average is then rounded once, where it would be a unit
    off.
    """
    rest = math.fsum((*weights, -divisor))
    if rest == 0 or abs(rest) > EPSILON * divisor:
        return weights
    weights, largest = weights.copy(), int(weights.argmax())
    weights[largest] -= rest
    return weights


class Passes(Given):
    """All passes over the data: those that rules may ask for, and the one that writes the result."""

    __slots__ = ()

    def write(
        self, weights: Matrix | None, divisor: float, selection: Selection | None, measures: bool, looks: bool
    ) -> tuple[Mask, bool, Vector]:
        """Write the result: a combination of the rows (and the centre), or a selection.

        Parameters
        ----------
        weights, divisor : (1, n + has_centre) float64 or None, float
            Of the combination.
        selection : Selection or None
            Instead of it.
        measures : bool
            Whether to measure the rows from a selection.
        looks : bool
            Whether to look for rows that hold NaN or Inf where a combination does.

        Returns
        -------
        (n,) bool, bool, (n,) float64
            Rows that hold NaN or Inf, as far as they were met; whether they broke a selection; squared distances.
        """
        asked = weights, divisor, selection, measures, looks
        if not self.source.divided:
            return self._written(*asked)
        found = sum_of(self.source.passed(self, "write_pass", asked, True))
        return found[1 : self.n + 1] > 0, bool(found[0]), found[self.n + 1 :]

    def write_pass(self, *asked: Any) -> Vector:
        """Write the columns that are here; return whether they are broken, and for an `Info` what else `write` does."""
        nonfinite, poisoned, squares = self._written(*asked)
        return np.concatenate([[poisoned], nonfinite, squares])

    def _written(
        self, weights: Matrix | None, divisor: float, selection: Selection | None, measures: bool, looks: bool
    ) -> tuple[Mask, bool, Vector]:
        nonfinite, poisoned, squares = np.zeros(self.n, dtype=np.bool_), False, np.zeros(self.n)
        divisors = np.array([divisor])
        for block in self.source.results():
            for rows, out in zip(block.rows, block.out, strict=True):
                if weights is not None:
                    self.kernels.weighted_row_sum(rows, weights, out, divisors=divisors)
                    if looks and not self._is_finite(out):
                        nonfinite |= self.kernels.select_columns(self.without_centre(rows), Window(0, 1)).nonfinite
                    continue
                assert selection is not None
                found = self.select(selection, rows, out, distances=measures)
                if np.count_nonzero(found.nonfinite):
                    nonfinite |= found.nonfinite
                    poisoned |= not self._is_finite(out)
                if found.sq_distances is not None:
                    squares += found.sq_distances
        return nonfinite, poisoned, squares

    def _is_finite(self, out: Rows) -> bool:
        """Tell whether a result is; one that is has distance 0 to itself."""
        return not self.kernels.row_sq_distances(out, out, exact=False).any()


def _broken_rows(kernels: Kernels, rows: Rows, n: int) -> NDArray[np.bool_]:
    return np.asarray(kernels.select_columns(rows, Window(0, 1)).nonfinite[:n])


def _info(
    rule: Aggregator,
    given: Given,
    view: View,
    solution: Solution,
    nonfinite: NDArray[np.bool_],
    sq_distances: Vector | None,
    differing: dict[str, tuple[int, ...]],
) -> Info:
    if given.nonfinite is not None:
        nonfinite = nonfinite | given.nonfinite
    if sq_distances is None:
        sq_distances = view.sq_distances_in(solution)
    else:
        sq_distances = np.where(np.isnan(sq_distances), np.inf, sq_distances)
    return Info(
        rule=str(rule),
        n=given.n,
        d=given.source.d,
        f=given.f,
        backend=given.kernels.name,
        share=given.f / given.n if given.weights is None and given.f is not None else given.share,
        bound_met=_bound_met(rule, given),
        weights=None if solution.weights is None else solution.weights / solution.divisor,
        kept=solution.kept,
        sq_distances=sq_distances,
        nonfinite_rows=tuple(np.flatnonzero(nonfinite).tolist()),
        iterations=solution.iterations,
        converged=solution.converged,
        gap=solution.gap,
        scores=solution.scores,
        order=None if solution.order is None else tuple(np.asarray(solution.order).tolist()),
        mixture=solution.mixture,
        seed=given.drawn_seed,
        differing=differing,
    )


def _bound_met(rule: Aggregator, given: Given) -> bool | None:
    """Ask the rule; weights stand for copies of the rows, very many so that their share is met closely."""
    if given.weights is None:
        return rule.bound_met(given.n, given.f)
    copies = 2**40
    return rule.bound_met(copies, None if given.share is None else math.ceil(given.share * copies))
