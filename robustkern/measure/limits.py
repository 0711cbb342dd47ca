"""What a rule costs on its worst input, beside what it must cost at least on this machine.

The model of the limit: a pass takes the longer of two times. One moves its bytes: that of a read pass, times the share
of the rows that the pass reads, and for the result its share of a read. The other does its operations, at the rate at
which this machine multiplies matrices of the dtype (NumPy's BLAS, measured beside the rules): a minimum, a maximum, an
addition and a multiply-add are one each. Passes follow each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from robustkern.functions import aggregate
from robustkern.measure.reads import (
    VALUES,
    Array,
    Line,
    cases,
    check_close,
    compare,
    goal,
    job,
    make_rows,
    read_pass,
    seconds_of,
)
from robustkern.measure.roofline import selection_network
from robustkern.rules import CGE, Chain, MoNNA, parse_rule

__all__ = [
    "LAYOUTS",
    "SIZES",
    "Rates",
    "check_result",
    "gradient_rows",
    "inputs",
    "least_reads_of",
    "measured_rates",
    "worst",
]

#: Up to so many rows a network is the least known way to select, and counts; of more rows bytes count alone.
NETWORK_ROWS = 64
#: How often the limit a figure may be where the table of goals asks for less.
SLACK = 1.2
#: Columns of every result that are compared.
CHECKED = 1000
#: Rows.
SIZES = (8, 16, 32, 64, 128, 256, 1024)
LAYOUTS = ("stacked, odd d", "stacked, d a multiple of 4096", "apart")


class Rates(NamedTuple):
    """What a machine does in a second: multiply-adds of float32 and of float64."""

    single: float
    double: float


def measured_rates(size: int = 1536, rounds: int = 5) -> Rates:
    """Measure the rates of this machine, all its cores together."""

    def rate(dtype: Any) -> float:
        a = np.ones((size, size), dtype=dtype)
        return float(size**3 / min(seconds_of(lambda: a @ a) for _ in range(rounds)))

    return Rates(rate(np.float32), rate(np.float64))


class _Pass(NamedTuple):
    """Of one column: rows read, operations of float32 and of float64."""

    rows: float
    single: float
    double: float


def _selection(n: int, lo: int, hi: int) -> float:
    return selection_network(n, lo, hi)[1] if n <= NETWORK_ROWS else 0


def _passes(case: str, n: int, f: int) -> Iterator[_Pass]:
    if case == "weighted median":
        comparators = selection_network(n, 0, n)[0] if n <= NETWORK_ROWS else 0
        yield _Pass(n, 5 * comparators, 0)  # one comparison, and values and weights selected
        return
    gram = _Pass(n, n * (n + 1) / 2 + 2 * n, 0)  # float32 products of centred rows
    if case == "gram":
        yield gram
        return
    plan = parse_rule(case)
    window, again = plan.window(n, f), plan.rows_read_again(n, f)
    if window:
        mean = window[1] - window[0] if window[1] - window[0] > 2 else 0
        yield _Pass(n, _selection(n, *window), mean + (2 * n if again else 0))  # and distances to what was selected
    elif not again:
        yield _Pass(n, _selection(n, 0, n), n - f)  # nearest values: of all that are sorted, a mean
    elif isinstance(plan, (CGE, MoNNA)):
        yield _Pass(n, 0, 2 * n)  # distances from a point
    else:
        yield gram
    if isinstance(plan, Chain) and (selects := plan.last.window(n, f)):
        yield _Pass(n, _selection(n, *selects), n * n)  # in mixtures
    elif again:
        yield _Pass(again, 0, again)


def least_reads_of(case: str, n: int, f: int, rates: Rates, seconds_a_column: float) -> float:
    """Return what a rule must cost by the model, in read passes.

    Parameters
    ----------
    case : str
        As for `robustkern.measure.reads.job`.
    n, f : int
        Rows, and how many of them are tolerated.
    rates : Rates
        Of the machine.
    seconds_a_column : float
        Of the read pass of n rows.
    """
    seconds = 0.0
    for moved, single, double in _passes(case, n, f):
        seconds += max(moved / n * seconds_a_column, single / rates.single + double / rates.double)
    result = 0 if case == "gram" else 1 / n
    return seconds / seconds_a_column + result


def gradient_rows(n: int, d: int, seed: int = 0) -> Array:
    """Return gradients (n, d) of float32 of n workers: of one hidden layer as wide as it takes, on eight digits each.

    As in training's "mlp": 64 inputs, rectified units, 10 classes, cross entropy. Units that none of a worker's images
    reaches leave stretches of zeros.
    """
    rng = np.random.default_rng(seed)
    inputs, classes, batch = 64, 10, 8
    width = max(1, -(-d // (inputs + 1 + classes)))
    first = rng.standard_normal((inputs, width), dtype=np.float32) / np.float32(np.sqrt(inputs))
    second = rng.standard_normal((width, classes), dtype=np.float32) / np.float32(np.sqrt(width))
    rows = np.zeros((n, d), dtype=np.float32)
    for row in rows:
        images = np.maximum(rng.standard_normal((batch, inputs), dtype=np.float32), 0)
        hidden = np.maximum(images @ first, 0)
        logits = hidden @ second
        wrong = np.exp(logits - logits.max(axis=1, keepdims=True))
        wrong /= wrong.sum(axis=1, keepdims=True)
        wrong[np.arange(batch), rng.integers(classes, size=batch)] -= 1
        wrong /= batch
        back = (wrong @ second.T) * (hidden > 0)
        gradient = np.concatenate([(images.T @ back).ravel(), back.sum(axis=0), (hidden.T @ wrong).ravel()])
        row[: min(d, gradient.size)] = gradient[:d]
    return rows


def inputs(n: int, d: int) -> Iterator[tuple[str, Array]]:
    """Make each kind of input (n, d) in turn."""
    yield "normal", np.random.default_rng(1).standard_normal((n, d), dtype=np.float32)
    yield "attacked", make_rows(n, d)
    yield "gradients", gradient_rows(n, d)


def _laid_out(rows: Array, layout: str) -> Array | list[Array]:
    """Return the rows as a layout has them: as many columns, or up to 4096 fewer."""
    d = rows.shape[1]
    if layout == "apart":
        return [row.copy() for row in rows]
    return np.ascontiguousarray(rows[:, : d - 1 + d % 2 if "odd" in layout else d - d % 4096])


def check_result(case: str, rows: Array | list[Array], f: int, result: Array, what: str) -> None:
    """Compare the first columns of what is timed with what another call says of it, or with the definition."""
    part = np.stack([row[:CHECKED] for row in rows]).astype(np.float64)
    got: Any = result[:CHECKED]
    want: Any
    if case == "gram":
        got, want = result[0, 0] + result[1, 1] - 2 * result[0, 1], _sq_distance(rows[0], rows[1])
    elif case == "weighted median":
        want = _defined(part, "median", weights=np.arange(len(part)) % 7 + 1.0)
    else:
        _, info = aggregate(rows, case, f=f, return_info=True)
        mixed = part if info.mixture is None else info.mixture @ part
        want = info.weights @ part if info.weights is not None else _defined(mixed, str(_last(case)), f=f)
    check_close(what, got, want, atol=2e-5, rtol=1e-3 if case == "gram" else 2e-5)


def _last(case: str) -> Any:
    plan = parse_rule(case)
    return plan.last if isinstance(plan, Chain) else plan


def _defined(rows: Array, rule: str, **options: Any) -> Any:
    return aggregate(rows, rule, backend="reference", **options)


def _sq_distance(a: Array, b: Array) -> float:
    difference = a.astype(np.float64) - b
    return float(difference @ difference)


def worst(n: int, rounds: int, d: int | None) -> Iterator[Line]:
    """Measure every rule that has a goal for n rows on three inputs in three layouts; of each the slowest counts."""
    wanted = [case for case in cases() if goal(case, n) is not None]
    f, rates = n // 4, measured_rates()
    most: dict[str, tuple[float, str, float]] = {}
    for kind, values in inputs(n, max(d or VALUES // n, 4096)):
        for layout in LAYOUTS:
            rows = _laid_out(values, layout)
            columns = len(rows[0])
            read = read_pass(rows)
            for case in wanted:  # each in turn, while the rows are there
                call, result = job(case, rows, f)
                call()  # the memory of the result is there from now on
                check_result(case, rows, f, result, f"{case}, n={n}, {kind}, {layout}")
                calls, reads = compare(call, read, rounds)
                figure = float(np.median(np.array(calls) / np.array(reads)))
                if figure > most.get(case, (0.0, "", 0.0))[0]:
                    limit = least_reads_of(case, n, f, rates, float(np.median(reads)) / columns)
                    most[case] = figure, f"{kind}, {layout}", limit
    for case, (figure, where, limit) in most.items():
        asked = round(max(goal(case, n) or 0.0, SLACK * limit), 2)
        unit = f"reads on {where}: {figure / limit:.2f} times the limit, {limit:.2f}"
        yield Line("worst", f"{case}, n={n}", figure, unit, asked)
