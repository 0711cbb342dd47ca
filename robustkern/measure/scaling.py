"""How rules scale over devices, dtypes, rows and columns: each result checked, nothing left out without a reason.

Rows repeat a few thousand random columns, whatever d is. Distances then only grow by a common factor, so the result
must repeat too, and a slow evaluation of the first columns checks them at every size.
"""

from __future__ import annotations

import csv
import functools
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

import robustkern
from robustkern.contract.rows import DTYPES
from robustkern.measure.devices import Device, host_bytes
from robustkern.measure.peers import plain_form
from robustkern.measure.reads import Array, check_close, machine, make_rows
from robustkern.measure.roofline import LABEL, MODELS, model_seconds
from robustkern.measure.suites import on_threads

__all__ = ["RULES", "Crossover", "Plan", "Point", "crossovers", "points_of", "repeated_rows", "save", "study"]

RULES = ("mean", "median", "trimmed_mean", "ctma(median)", "geometric_median", "ctma(geometric_median)", "krum")
#: Share of a memory that is free which rows may take; results and yardsticks need the rest.
SHARE = 0.6
#: Pairs of yardstick and rule at most.
ROUNDS = 25
#: Columns that rows repeat, and values; a slow evaluation of so many takes seconds.
BASE_COLUMNS, BASE_VALUES = 10_000, 640_000
#: Fewer of either make slow evaluations ambiguous: two rows have no one geometric median. More rows take them minutes.
LEAST_ROWS, LEAST_COLUMNS, MOST_ROWS = 3, 100, 4096


# ---- what is asked for -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a study measures.

    Attributes
    ----------
    devices, rules, dtypes, models : tuple of str
        Names; rules in their text form.
    n, d : tuple of int
        Rows and columns.
    seconds : float
        For each point, at least one measurement aside.
    """

    devices: tuple[str, ...]
    rules: tuple[str, ...]
    dtypes: tuple[str, ...]
    n: tuple[int, ...]
    d: tuple[int, ...]
    models: tuple[str, ...] = ()
    seconds: float = 1.0


# ---- what comes out --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One rule on one input: a line of results.csv.

    Attributes
    ----------
    kind : str
        "measured" or "model".
    part : str
        "sizes" or, where only the number of threads varies, "threads".
    device, rule, dtype, n, d, f : str, str, str, int, int, int
        What, where, on which rows.
    threads : int or None
        Of the CPU.
    seconds : float or None
        Median time, None where `reason` says why there is none.
    reads, low, high : float or None
        Median and quartiles of the time over that of one read of the rows by the yardstick right before.
    read_seconds : float or None
        Median time of that.
    rounds : int
        How often.
    pageable_seconds, pinned_seconds : float or None
        Time to bring the rows from ordinary and from pinned host memory to the device, besides `seconds`.
    checked : str
        What the result was compared with; "wrong" where it differed.
    reason : str
        Why a figure is missing.
    """

    kind: str
    part: str
    device: str
    rule: str
    dtype: str
    n: int
    d: int
    f: int
    threads: int | None = field(default=None)
    seconds: float | None = field(default=None)
    reads: float | None = field(default=None)
    low: float | None = field(default=None)
    high: float | None = field(default=None)
    read_seconds: float | None = field(default=None)
    rounds: int = field(default=0)
    pageable_seconds: float | None = field(default=None)
    pinned_seconds: float | None = field(default=None)
    checked: str = field(default="")
    reason: str = field(default="")

    @property
    def row_bytes(self) -> int:
        """Bytes of the rows."""
        return self.n * self.d * _itemsize(self.dtype)


def _itemsize(dtype: str) -> int:
    return next(known.itemsize for known in DTYPES if known.name == dtype)


# ---- rows whose result is known --------------------------------------------------------------------------------


def _tiles(n: int, d: int) -> tuple[int, int]:
    """Return how many random columns there are, and how often they are repeated."""
    times = -(-d // max(min(BASE_COLUMNS, BASE_VALUES // n), LEAST_COLUMNS))
    return d // times, times


def repeated_rows(n: int, d: int, dtype: str) -> Array:
    """Return rows of `benchmark.make_rows` for few columns, repeated; columns left over (less than 1 %) are 0.

    Parameters
    ----------
    n, d : int
        Rows and columns.
    dtype : str
        float16, bfloat16, float32 or float64.
    """
    width, times = _tiles(n, d)
    base = make_rows(n, width, dtype)
    rows = np.zeros((n, d), dtype=base.dtype)
    rows[:, : width * times].reshape(n, times, width)[:] = base[:, None]
    return rows


@functools.lru_cache(maxsize=256)
def _wanted(rule: str, n: int, width: int, dtype: str, f: int) -> tuple[Array, str]:
    """Return the result on the first columns by another way, and which."""
    base = make_rows(n, width, dtype)
    naive = plain_form(rule, f)
    if naive is not None:
        return np.asarray(naive(base.astype(np.float64))), "plain NumPy"
    slow = robustkern.aggregate(base, robustkern.parse_rule(rule), f=f, seed=0, backend="reference")
    return np.asarray(slow, dtype=np.float64), "reference backend"


def _parts(point: Point, device: Device, out: Any) -> list[Array]:
    """Return the first, the middle and the last repetition of a result, and what is left over."""
    width, times = _tiles(point.n, point.d)
    tiles = sorted({0, times // 2, times - 1})
    return [device.get(out[tile * width : (tile + 1) * width]) for tile in tiles] + [device.get(out[times * width :])]


def _checked(point: Point, parts: list[Array]) -> str:
    """Compare parts of a result with another one; return with which.

    Raises
    ------
    RuntimeError
        If it differs.
    """
    width, times = _tiles(point.n, point.d)
    want, by = _wanted(point.rule, point.n, width, point.dtype, point.f)
    if by != "plain NumPy" and times > 1:  # a rule with parameters of a length (nu) need not repeat its result
        return "not checked"
    half = _itemsize(point.dtype) == 2
    for part in parts[:-1]:
        check_close(point.rule, part, want, atol=2e-2 if half else 2e-4, rtol=2**-7 if half else 0)
    check_close(point.rule, parts[-1], 0, atol=0)
    return by


# ---- measuring -------------------------------------------------------------------------------------------------


def _in_turn(device: Device, read: Callable[[], Any], call: Callable[[], Any], seconds: float) -> Array:
    """Return the seconds of yardstick and call, made in turn after one call to warm up: (rounds, 2)."""
    end = device.clock() + seconds
    device.time(read)
    device.time(call)
    times: list[list[float]] = []
    while not times or (len(times) < ROUNDS and device.clock() < end):
        times.append([device.time(read), device.time(call)])
    return np.array(times)


def _measure(point: Point, device: Device, rows: Any, seconds: float) -> Point:
    """Measure a rule on the device's rows; whatever goes wrong becomes the point's reason."""
    try:
        out = device.put(np.zeros(point.d, dtype=next(known for known in DTYPES if known.name == point.dtype)))
        plan = robustkern.parse_rule(point.rule)
        read, share = device.yardstick(rows)
        times = _in_turn(device, read, lambda: device.aggregate(rows, plan, point.f, out), seconds)
        parts = _parts(point, device, out)
    except Exception as error:  # out of memory, no backend, a rule that needs more rows: the study goes on
        return replace(point, reason=f"{type(error).__name__}: {error}")
    try:
        by = _checked(point, parts)
    except RuntimeError as error:
        return replace(point, checked="wrong", reason=str(error))
    reads = times[:, 0] / share
    low, middle, high = (float(q) for q in np.quantile(times[:, 1] / reads, [0.25, 0.5, 0.75]))
    return replace(
        point,
        seconds=float(np.median(times[:, 1])),
        reads=middle,
        low=low,
        high=high,
        read_seconds=float(np.median(reads)),
        rounds=len(times),
        checked=by,
    )


def _transfers(device: Device, rows: Any, host: Array, seconds: float) -> dict[str, Any]:
    """Time the way of the rows to the device, from ordinary and from pinned memory."""

    def fill() -> None:
        device.refill(rows, host)

    result: dict[str, Any] = {}
    try:
        result["pageable_seconds"] = float(np.median(_in_turn(device, fill, fill, seconds)))
        with device.pinned(host):
            result["pinned_seconds"] = float(np.median(_in_turn(device, fill, fill, seconds)))
    except Exception as error:
        result["reason"] = f"transfer: {type(error).__name__}: {error}"
    return result


def _too_large(needed: int, free: int, where: str) -> str:
    if needed <= SHARE * free:
        return ""
    return f"rows of {needed / 1e9:.3g} GB do not fit into {SHARE:.0%} of the {free / 1e9:.3g} GB free in {where}"


def _on_device(device: Device, host: Array, points: list[Point], seconds: float) -> Iterator[Point]:
    """Measure points that have the same rows."""
    reason, rows = "", None
    try:
        if device.transfers:
            device.release()  # what a library keeps of rows that are gone is free
            reason = _too_large(host.nbytes, device.free_bytes(), f"{device.name}'s memory")
        rows = None if reason else device.put(host)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    if reason:
        yield from (replace(point, reason=reason) for point in points)
        return
    moved = _transfers(device, rows, host, seconds) if device.transfers else {}
    for point in points:
        measured = _measure(point, device, rows, seconds)
        yield measured if measured.seconds is None else replace(measured, **moved)


def _threads() -> list[int]:
    most = robustkern.info()["threads"]
    return sorted({most, *(2**k for k in range(most.bit_length()))})


def _speed_up(device: Device, largest: Point, plan: Plan) -> Iterator[Point]:
    """Measure all rules on 1, 2, 4, ... and all threads, on rows like those of a point."""
    n, d, f, dtype = largest.n, largest.d, largest.f, largest.dtype
    rows = repeated_rows(n, d, dtype)
    for rule, threads in itertools.product(plan.rules, _threads()):
        point = Point("measured", "threads", device.name, rule, dtype, n, d, f, threads)
        yield on_threads(threads, functools.partial(_measure, point, device, rows, plan.seconds))()


def study(plan: Plan, devices: Sequence[Device]) -> Iterator[Point]:
    """Measure all points of a plan, then the threads of the CPU on the largest of its points; yield them as they come.

    Parameters
    ----------
    plan : Plan
        What to measure.
    devices : sequence of Device
        Those of the plan that are there.
    """
    largest: Point | None = None
    for dtype, n, d in itertools.product(plan.dtypes, plan.n, plan.d):
        f = n // 4
        needed = n * d * _itemsize(dtype)
        reason = _too_large(needed, host_bytes(), "main memory")
        host = None if reason else repeated_rows(n, d, dtype)
        for device in devices:
            threads = None if device.transfers else robustkern.info()["threads"]
            points = [
                Point("measured", "sizes", device.name, rule, dtype, n, d, f, threads, reason=reason)
                for rule in plan.rules
            ]
            for point in points if host is None else _on_device(device, host, points, plan.seconds):
                yield point
                if not device.transfers and point.seconds and (largest is None or point.row_bytes > largest.row_bytes):
                    largest = point
        del host
        yield from _models(plan, n, d, f, dtype)
    for device in devices:
        if not device.transfers and largest is not None:
            yield from _speed_up(device, largest, plan)


def points_of(plan: Plan, devices: Sequence[Device]) -> int:
    """Return how many points `study` yields at most."""
    cases = len(plan.dtypes) * len(plan.n) * len(plan.d) * (len(devices) + len(plan.models))
    return len(plan.rules) * (cases + len(_threads()) * sum(not device.transfers for device in devices))


def _models(plan: Plan, n: int, d: int, f: int, dtype: str) -> Iterator[Point]:
    for name, rule in itertools.product(plan.models, plan.rules):
        gpu, itemsize = MODELS[name], _itemsize(dtype)
        point = Point("model", "sizes", name, rule, dtype, n, d, f, checked=LABEL)
        reason = _too_large(point.row_bytes, int(gpu.memory), f"the memory of {gpu.name}")
        seconds = model_seconds(gpu, rule, n, d, f, itemsize)
        if reason or seconds is None:
            yield replace(point, reason=reason or "the model does not know this rule")
            continue
        read = point.row_bytes / gpu.bandwidth
        yield replace(point, seconds=seconds, reads=seconds / read, read_seconds=read)


# ---- where a device overtakes ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Crossover:
    """From which d on a device is faster than the CPU.

    Attributes
    ----------
    device, rule, dtype, n : str, str, str, int
        What.
    transfer : str
        "none" where the rows are on the device already, else how they come there: "pinned", "pageable".
    d : float or None
        None where there is no such d among those measured.
    said : str
        The same in words.
    """

    device: str
    rule: str
    dtype: str
    n: int
    transfer: str
    d: float | None
    said: str


def _total(point: Point, transfer: str) -> float | None:
    """Return the time of a point with the transfer of its rows."""
    extra = {"none": 0.0, "pinned": point.pinned_seconds, "pageable": point.pageable_seconds}[transfer]
    return None if point.seconds is None or extra is None else point.seconds + extra


def ratios(
    points: Sequence[Point], device: str, transfer: str, rule: str, dtype: str, n: int
) -> list[tuple[int, float]]:
    """Return, for each d that both have measured, the CPU's time over that of the device.

    Parameters
    ----------
    points : sequence of Point
        What was measured.
    device, transfer, rule, dtype, n : str, str, str, str, int
        As in `Crossover`.
    """
    here = [p for p in points if (p.kind, p.part, p.rule, p.dtype, p.n) == ("measured", "sizes", rule, dtype, n)]
    cpu = {p.d: p.seconds for p in here if p.device == "cpu" and p.seconds}
    other = {p.d: _total(p, transfer) for p in here if p.device == device}
    return [(d, cpu[d] / seconds) for d, seconds in sorted(other.items()) if seconds and d in cpu]


def _crossing(faster: list[tuple[int, float]]) -> tuple[float | None, str]:
    """Return where the ratio rises above 1 for good, between two measurements on a straight line of logarithms."""
    (first, _), (last, _) = faster[0], faster[-1]
    slow = [k for k, (_, ratio) in enumerate(faster) if ratio <= 1]
    if not slow:
        return float(first), f"faster at every d measured ({first:,} to {last:,})"
    if slow[-1] == len(faster) - 1:
        return None, f"not faster at the largest d measured ({last:,})"
    (d0, r0), (d1, r1) = faster[slow[-1]], faster[slow[-1] + 1]
    d = math.exp(math.log(d0) + math.log(d1 / d0) * -math.log(r0) / math.log(r1 / r0))
    return d, f"faster from about d = {d:,.0f}"


def crossovers(points: Sequence[Point]) -> list[Crossover]:
    """Return from which d on each device beside the CPU is faster, with and without transfer, where both ran."""
    measured = [p for p in points if p.kind == "measured" and p.part == "sizes" and p.device != "cpu"]
    found = []
    for device, rule, dtype, n in dict.fromkeys((p.device, p.rule, p.dtype, p.n) for p in measured):
        for transfer in ("none", "pinned", "pageable"):
            faster = ratios(points, device, transfer, rule, dtype, n)
            if faster:
                found.append(Crossover(device, rule, dtype, n, transfer, *_crossing(faster)))
    return found


# ---- reports ---------------------------------------------------------------------------------------------------


def _bandwidth(points: Sequence[Point], device: str) -> float | None:
    """Return bytes per second of the yardstick on the device's largest rows."""
    read = [p for p in points if (p.kind, p.part, p.device) == ("measured", "sizes", device) and p.read_seconds]
    if not read:
        return None
    largest = max(read, key=lambda p: p.row_bytes)
    return largest.row_bytes / (largest.read_seconds or math.inf)


def save(
    plan: Plan, points: Sequence[Point], devices: dict[str, dict[str, Any]], missing: dict[str, str], out: Path
) -> dict[str, Any]:
    """Write results.csv and results.json, and return what the latter holds.

    Parameters
    ----------
    plan : Plan
        What was asked for.
    points : sequence of Point
        What came out.
    devices : dict
        Facts of each device.
    missing : dict
        Why others are not there.
    out : Path
        A folder.
    """
    with open(out / "results.csv", "w", newline="", encoding="utf-8") as file:
        lines = csv.DictWriter(file, [each.name for each in fields(Point)])
        lines.writeheader()
        lines.writerows(asdict(point) for point in points)
    here = robustkern.info()
    saved = {
        "machine": machine() | {"memory_free_bytes": host_bytes(), "backends": here["backends"]},
        "plan": asdict(plan),
        "devices": {
            name: facts | {"yardstick_bytes_per_second": _bandwidth(points, name)} for name, facts in devices.items()
        },
        "missing": missing,
        "models": {name: {"label": LABEL, **asdict(MODELS[name])} for name in plan.models},
        "not_measured": Counter(p.reason for p in points if p.reason),
        "crossovers": [asdict(each) for each in crossovers(points)],
        "points": [asdict(point) for point in points],
    }
    (out / "results.json").write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")
    return saved
