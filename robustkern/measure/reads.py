"""What each rule costs, in read passes: the time of one streaming sum over the same rows in the same run.

A ratio of two measurements taken one right after the other says what an absolute time on a shared machine cannot.
"""

from __future__ import annotations

import datetime
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import robustkern
from robustkern.backends.cpp import Cpp
from robustkern.backends.registry import choose, load_backend
from robustkern.backends.threads import usable_cores
from robustkern.contract.rows import Rows
from robustkern.measure import style
from robustkern.measure.peers import Peer, load
from robustkern.rules import registered
from robustkern.rules.base import Goals

__all__ = [
    "INPUT",
    "VALUES",
    "Line",
    "Measured",
    "cases",
    "check_close",
    "facts",
    "goal",
    "goals",
    "least_reads",
    "machine",
    "make_rows",
    "measure",
    "measure_peers",
    "plot",
    "save",
    "seconds_of",
]

#: Values (n times d) of a measurement: 640 MB in float32, beyond any cache.
VALUES = 160_000_000
#: What `make_rows` makes.
INPUT = "normal values, a quarter of the rows three standard deviations away"
#: Values against which slower libraries are measured.
PEER_VALUES = 24_000_000

#: The goals of a primitive; those of rules stand in their classes.
GRAM_GOALS: Goals = {"gram": {16: 1.2, 32: 1.4, 64: 2.0, 128: 3.5}}

Array = NDArray[Any]


def goals() -> Goals:
    """Return the goals in read passes of all rules that are registered, and of the Gram."""
    return {case: limits for rule in registered().values() for case, limits in rule.goals.items()} | dict(GRAM_GOALS)


def cases() -> tuple[str, ...]:
    """Return what is measured: the rules, in their text form, that have goals, and the Gram."""
    return tuple(case for case, limits in goals().items() if limits)


def goal(rule: str, n: int) -> float | None:
    """Return the goal of a rule for n rows: that of the next larger n in the table."""
    limits = goals().get(rule, {})
    known = [most for most in limits if most >= n]
    return limits[min(known)] if known else None


def least_reads(rule: str, n: int, f: int) -> float:
    """Return how often a rule must read the data: once, and the rows again that its result is made of; see `job`."""
    if rule in ("gram", "weighted median"):
        return 1.0
    return 1 + robustkern.parse_rule(rule).rows_read_again(n, f) / n


@dataclass(frozen=True)
class Measured:
    """One rule on one input.

    Attributes
    ----------
    rule, library : str
        What ran; "robustkern" or a peer.
    n, d, f, dtype : int, int, int, str
        On which rows.
    reads, low, high : float
        Median and quartiles of its time over that of the read pass just before it.
    seconds, read_seconds : float
        Medians.
    goal : float or None
        In reads, where there is one.
    """

    rule: str
    library: str
    n: int
    d: int
    f: int
    dtype: str
    reads: float
    low: float
    high: float
    seconds: float
    read_seconds: float
    goal: float | None = field(default=None)

    @property
    def gb_per_s(self) -> float:
        """Input bytes over time."""
        return self.n * self.d * _dtype(self.dtype).itemsize / self.seconds / 1e9


@dataclass(frozen=True)
class Line:
    """One figure of `robustkern.measure.suites`.

    Attributes
    ----------
    name, what : str
        The suite, and what of it.
    figure : float or None
        None where it could not be measured; `unit` then says why.
    unit : str
        Of figure and goal.
    goal : float or None
        The most the figure should be, where there is a goal.
    floor : bool
        The least instead.
    """

    name: str
    what: str
    figure: float | None
    unit: str
    goal: float | None = field(default=None)
    floor: bool = field(default=False)

    @property
    def missed(self) -> bool:
        """Whether there is a goal, and the figure misses it."""
        if self.figure is None or self.goal is None:
            return False
        return self.figure < self.goal if self.floor else self.figure > self.goal

    @property
    def wanted(self) -> str:
        """The goal as text."""
        return "" if self.goal is None else f"{'>=' if self.floor else '<='} {self.goal:.3g}"


def _dtype(name: str) -> np.dtype[Any]:
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def make_rows(n: int, d: int, dtype: str = "float32", seed: int = 0) -> Array:
    """Return honest rows of normal values and floor(n/4) attackers three standard deviations away.

    Parameters
    ----------
    n, d : int
        Rows and columns.
    dtype : str
        float16, bfloat16, float32 or float64.
    seed : int
        Of the values.
    """
    rng = np.random.default_rng(seed)
    rows = np.empty((n, d), dtype=_dtype(dtype))
    for i in range(n):
        row = rng.standard_normal(d, dtype=np.float32)
        if i < n // 4:
            row += 3
        rows[i] = row
    return rows


def _cpp() -> Cpp:
    kernels = load_backend("cpp")
    assert isinstance(kernels, Cpp)
    return kernels


def read_pass(rows: Array | Sequence[Array]) -> Callable[[], Any]:
    """Return the yardstick for these rows; it reads them all, once, with all threads.

    Raises
    ------
    BackendUnavailable
        If the compiled backend, which holds it, is not there.
    """
    kernels, pointers = _cpp(), Rows.of(rows)
    return lambda: kernels.read_pass(pointers)


def job(rule: str, rows: Array | Sequence[Array], f: int, backend: str = "auto") -> tuple[Callable[[], Any], Array]:
    """Return a call that runs a rule on the rows, and the array that receives its result.

    Parameters
    ----------
    rule : str
        A rule in its text form, or "gram", or "weighted median".
    rows : (n, d) array, or n arrays
        The updates.
    f : int
        Tolerated Byzantine rows.
    backend : str
        As for `aggregate`.
    """
    n, d, dtype = len(rows), len(rows[0]), rows[0].dtype
    if rule == "gram":
        kernels = choose(backend, {dtype})
        pointers, gram = Rows.of(rows), np.empty((n, n))

        def run_gram() -> None:
            gram[:] = kernels.gram(pointers, single=True)  # what rules ask for first

        return run_gram, gram
    options: dict[str, Any] = {"f": f, "out": np.zeros(d, dtype=dtype), "backend": backend}
    if rule == "weighted median":
        rule, options["weights"] = "median", np.arange(n) % 7 + 1.0
    plan = robustkern.parse_rule(rule)
    return lambda: robustkern.aggregate(rows, plan, **options), options["out"]


def seconds_of(call: Callable[[], Any]) -> float:
    """Time one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def check_close(what: str, got: Any, want: Any, atol: float, rtol: float = 0.0) -> None:
    """Compare the result of what was timed with another one.

    Raises
    ------
    RuntimeError
        If they differ.
    """
    got, want = np.asarray(got, dtype=np.float64), np.asarray(want, dtype=np.float64)
    if not np.allclose(got, want, atol=atol, rtol=rtol):
        worst = float(np.abs(got - want).max())
        raise RuntimeError(f"{what}: the result differs by {worst:.1e} from another one; please report this")


def compare(call: Callable[[], Any], read: Callable[[], Any], rounds: int) -> tuple[list[float], list[float]]:
    """Time a call and the read pass before it, in turn; return both lists of seconds."""
    calls, reads = [], []
    for _ in range(rounds):
        reads.append(seconds_of(read))
        calls.append(seconds_of(call))
    return calls, reads


def _measured(rule: str, library: str, rows: Array, f: int, calls: list[float], reads: list[float]) -> Measured:
    ratios = np.array(calls) / np.array(reads)
    low, middle, high = (float(q) for q in np.quantile(ratios, [0.25, 0.5, 0.75]))
    n, d = rows.shape
    wanted = goal(rule, n) if library == "robustkern" and rows.dtype == np.float32 else None
    seconds, read_seconds = float(np.median(calls)), float(np.median(reads))
    return Measured(rule, library, n, d, f, rows.dtype.name, middle, low, high, seconds, read_seconds, wanted)


def measure(rule: str, rows: Array, *, rounds: int = 7, backend: str = "auto") -> Measured:
    """Measure a rule on the rows, f = floor(n/4).

    Parameters
    ----------
    rule : str
        As for `job`.
    rows : (n, d) array
        The updates.
    rounds : int
        How many pairs of read pass and rule; their median ratio counts.
    backend : str
        As for `aggregate`.
    """
    f = len(rows) // 4
    call, _ = job(rule, rows, f, backend)
    read = read_pass(rows)
    call()
    calls, reads = compare(call, read, rounds)
    return _measured(rule, "robustkern", rows, f, calls, reads)


def measure_peers(rule: str, rows: Array, libraries: Sequence[str]) -> Iterator[Measured]:
    """Measure what the libraries make of a rule on the first columns of the rows, and check that they agree with us.

    Parameters
    ----------
    rule : str
        As for `job`; libraries that do not have it yield nothing.
    rows : (n, d) array
        The updates; at most `PEER_VALUES` of them are used.
    libraries : sequence of str
        Names in `robustkern.measure.peers.PEERS`.

    Raises
    ------
    RuntimeError
        If a library's result is another one than ours.
    """
    n, f = len(rows), len(rows) // 4
    part = np.ascontiguousarray(rows[:, : PEER_VALUES // n])
    for library in libraries:
        offered = load(library, f)
        if rule not in offered:
            continue
        call, ours = job(rule, part, f)
        call()
        theirs, got = offered[rule], [None]

        def peer(theirs: Peer = theirs, got: list[Any] = got) -> None:
            got[0] = theirs(part)

        calls, reads = compare(peer, read_pass(part), 2)
        wide = np.asarray(got[0], dtype=np.float64)
        if not np.allclose(wide, ours.astype(np.float64), atol=1e-2 if part.dtype.itemsize == 2 else 2e-4):
            worst = float(np.abs(wide - ours.astype(np.float64)).max())
            raise RuntimeError(f"{library}'s {rule} differs from ours by {worst:.1e} at n={n}; please report this")
        yield _measured(rule, library, part, f, calls, reads)


# ---- reports ---------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Return what a reader must know of the machine, and the date."""
    here = robustkern.info()
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    except OSError:
        pass
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": model,
        "cores": usable_cores(),
        "threads": here["threads"],
        "isa": here["isa"],
        "robustkern": here["version"],
        "python": here["python"],
        "numpy": here["numpy"],
        "system": here["machine"],
    }


def facts(results: Sequence[Measured], lines: Sequence[Line] = ()) -> dict[str, Any]:
    """Return the machine's facts and what was measured."""
    return {
        "machine": machine(),
        "results": [asdict(result) for result in results],
        "lines": [asdict(line) for line in lines],
    }


def save(results: Sequence[Measured], path: Path, lines: Sequence[Line] = ()) -> None:
    """Write `facts` as JSON."""
    path.write_text(json.dumps(facts(results, lines), indent=1) + "\n")


def plot(results: Sequence[Measured], path: Path) -> None:
    """Draw reads against n: ours as lines, peers as thin dotted ones, each named where it ends."""
    figure = style.figure(9.5, 5.5)
    axes = figure.add_subplot()
    looks = style.looks(r.rule for r in results)
    ends = []
    for rule, library in dict.fromkeys((r.rule, r.library) for r in results):
        points = sorted((r.n, r.reads) for r in results if (r.rule, r.library) == (rule, library))
        ours = library == "robustkern"
        look = looks[rule] if ours else looks[rule] | {"linestyle": ":", "linewidth": 1, "markersize": 3}
        axes.plot(*zip(*points, strict=True), **look)
        ends.append((points[-1], rule if ours else f"{rule}, {library}", look["color"]))
    axes.axhline(1, color="0.5", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="n rows", ylabel="read passes of the same rows", title=_title(results))
    ticks = sorted({r.n for r in results})
    axes.set_xticks(ticks, [str(n) for n in ticks])
    style.plain_ticks(axes)
    style.name_ends(axes, ends)
    style.save(figure, path)


def _title(results: Sequence[Measured]) -> str:
    here = machine()
    return f"{results[0].dtype}, {here['cpu']}, {here['threads']} threads, {here['isa']}, {here['date']}"
