"""What counts besides reads: dtypes, calls, trees, memory, threads, arrivals, files, momenta, Numba, the worst inputs.

A suite is a function that measures one case and the tuple of its cases. Every case compares what it timed with another
result, and a ratio is the median over calls made in turn. Where something cannot be measured, its line says why.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from robustkern.backends.registry import load_backend
from robustkern.backends.threads import requested_threads, set_num_threads
from robustkern.contract.rows import address_of
from robustkern.errors import BackendUnavailable
from robustkern.files import aggregate_files
from robustkern.functions import aggregate
from robustkern.kernels import update_momenta
from robustkern.measure.limits import SIZES, worst
from robustkern.measure.peers import load
from robustkern.measure.reads import (
    VALUES,
    Array,
    Line,
    _dtype,
    cases,
    check_close,
    job,
    machine,
    make_rows,
    read_pass,
    seconds_of,
)
from robustkern.rules import available_rules, parse_rule
from robustkern.server import Server

__all__ = ["SUITES", "extra_memory", "on_threads", "tree_sizes"]

#: Values (n times d) where times are compared; `benchmark.VALUES` where memory is.
COMPARED = 80_000_000
#: Values of a row, as a tree and as one array.
TREE_VALUES = 4_000_000
#: Values of a file, and how long files may take, in reads of them.
FILE_VALUES = 25_000_000
FILE_GOALS = {"median": 1.3, "ctma(median)": 1.5}
STATUS = Path("/proc/self/status")

Call = Callable[[], Any]


def _times(*calls: Call, rounds: int) -> Array:
    """Return seconds (rounds, calls) of some calls made in turn: a slow spell of the machine falls on all of them."""
    return np.array([[seconds_of(call) for call in calls] for _ in range(rounds)])


def _ratio(call: Call, other: Call, rounds: int) -> float:
    """Return the median of the time of a call over that of another one right before it."""
    times = _times(other, call, rounds=rounds)
    return float(np.median(times[:, 1] / times[:, 0]))


# ---- dtypes ----------------------------------------------------------------------------------------------------


def dtypes(n: int, dtype: str, rounds: int, d: int | None) -> Iterator[Line]:
    """Compare a dtype with float32: 16 bits on as many bytes (the columns twice), float64 on as many values."""
    base = make_rows(n, d or COMPARED // n)
    half = _dtype(dtype).itemsize == 2
    rows = np.tile(base.astype(_dtype(dtype)), (1, 2 if half else 1))
    for rule in ("median", "trimmed_mean", "ctma(median)", "geometric_median"):
        what = f"{rule}, n={n}, {dtype}"
        (call, got), (single, want) = job(rule, rows, n // 4), job(rule, base, n // 4)
        call()
        single()
        # Rows of 16 bits are rounded before the rule and after it, by up to 2^-8 of a value.
        check_close(what, got[: base.shape[1]], want, atol=2e-2 if half else 2e-4, rtol=2**-7 if half else 0)
        unit = f"x float32's time for as many {'bytes' if half else 'values'}"
        yield Line("dtypes", what, _ratio(call, single, rounds), unit, 1.0 if half else 2.3)


# ---- small calls -----------------------------------------------------------------------------------------------


def calls(rule: str, d: int, rounds: int, most: int | None) -> Iterator[Line]:
    """Time a whole Python call on 10 NumPy rows of float32: alone, and in turn with plain NumPy and torch.

    In turn each finds the caches full of the others' work; that alone makes a call of ours some microseconds slower.
    """
    if most is not None and d > most:
        return
    what, rows, plan = f"{rule}, n=10, d={d}", make_rows(10, d), parse_rule(rule)
    run: dict[str, Call] = {}
    for library in ("torch", "numpy"):
        try:
            peer = load(library, 2)[rule]
        except ImportError as error:
            yield Line("calls", library, None, f"not measured: {error}")
        else:
            run[library] = lambda peer=peer: peer(rows)  # type: ignore[misc]
    run["robustkern"] = lambda: aggregate(rows, plan, f=2)
    want = run["robustkern"]()
    for library, call in run.items():
        check_close(f"{what}, {library}", call(), want, atol=1e-5)
    best, end = np.full(len(run), np.inf), time.perf_counter() + 0.1 * rounds
    for k in range(40 * rounds):
        best = np.minimum(best, _times(*run.values(), rounds=1)[0])
        if k >= rounds and time.perf_counter() > end:
            break
    least = dict(zip(run, best.tolist(), strict=True))
    ours = least.pop("robustkern")
    if d == 1000:
        alone = float(_times(run["robustkern"], rounds=100 * rounds).min())
        yield Line("calls", what, alone * 1e6, "microseconds", {"median": 10.0, "ctma(median)": 25.0}.get(rule))
    fastest = min(least, key=lambda library: least[library])
    yield Line("calls", f"{what}, beside others", ours / least[fastest], f"x {fastest}'s time", 1.0)


# ---- pytrees ---------------------------------------------------------------------------------------------------


def tree_sizes(total: int, leaves: int = 300) -> list[int]:
    """Return sizes of leaves, as many of each order of magnitude from 1 to some 100,000, about `total` in all."""
    sizes = np.exp(np.random.default_rng(0).uniform(0, np.log(1e6), leaves))
    return [max(int(size), 1) for size in sizes * (total / sizes.sum())]


def trees(rule: str, rounds: int, d: int | None) -> Iterator[Line]:
    """Compare rows in 300 leaves, each allocated apart, with the same rows in one array."""
    cuts = np.cumsum(tree_sizes(d or TREE_VALUES))
    flat = make_rows(10, int(cuts[-1]))

    def split(row: Array) -> dict[str, Array]:
        return {f"leaf {k}": leaf.copy() for k, leaf in enumerate(np.split(row, cuts[:-1]))}

    rows, plan = [split(row) for row in flat], parse_rule(rule)
    call, want = job(rule, flat, 2)
    out = split(want)

    def tree() -> None:
        aggregate(rows, plan, f=2, out=out)

    call()
    tree()
    what = f"{rule}, n=10, {len(cuts)} leaves"
    check_close(what, np.concatenate(list(out.values())), want, atol=1e-5)
    yield Line("trees", what, _ratio(tree, call, rounds), "x one array's time", 1.15)


# ---- memory ----------------------------------------------------------------------------------------------------


def _peak() -> int:
    """Return the most bytes this process has ever held, by the operating system's account."""
    found = next(line for line in STATUS.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
    return int(found.split()[1]) * 1024


def extra_memory(rule: str, n: int, d: int) -> float:
    """Return by how many percent of the rows a rule raises this process's peak, besides rows and result.

    For a process that has done nothing else: memory it freed before would hide what the rule takes.
    """
    base = make_rows(n, max(d // 16, 1))
    rows = np.empty((n, 16 * base.shape[1]), dtype=base.dtype)
    rows.reshape(n, 16, -1)[:] = base[:, None]  # in place: a temporary would be such memory
    job(rule, base[:, :1000], n // 4)[0]()  # libraries and threads are there before
    call, out = job(rule, rows, n // 4)
    out.fill(0)
    before = _peak()
    call()
    extra = _peak() - before
    narrow, want = job(rule, base, n // 4)
    narrow()
    if rule == "gram":
        check_close("gram", out / 16, want, atol=0.0, rtol=1e-4)
    else:
        check_close(rule, out[: base.shape[1]], want, atol=1e-4)
    return 100 * extra / rows.nbytes


def memory(rule: str, n: int, rounds: int, d: int | None) -> Iterator[Line]:
    """Measure the peak of a fresh process."""
    what = f"{rule}, n={n}"
    if not STATUS.exists():
        yield Line("memory", what, None, f"not measured: {STATUS} is not here")
        return
    script = (
        f"from robustkern.measure.suites import extra_memory; print(extra_memory({rule!r}, {n}, {d or VALUES // n}))"
    )
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    if child.returncode:
        raise RuntimeError(f"memory, {what}: {(child.stderr.strip() or f'exit {child.returncode}').splitlines()[-1]}")
    yield Line("memory", what, float(child.stdout), "% of the input", 2.0)


# ---- threads ---------------------------------------------------------------------------------------------------

THREAD_RULES = ("median", "ctma(median)", "geometric_median")


def on_threads(threads: int, call: Call) -> Call:
    """Return a call on so many threads."""

    def run() -> Any:
        before = requested_threads() or None
        set_num_threads(threads)
        try:
            return call()
        finally:
            set_num_threads(before)

    return run


def _speed_up(rows: Array, rounds: int) -> Iterator[Line]:
    """All threads against one; the read pass, which only reads, says what the machine has to give."""
    timed: dict[str, Call] = {"read pass": read_pass(rows)}
    for rule in THREAD_RULES:
        timed[rule], out = job(rule, rows, len(rows) // 4)
        timed[rule]()
        want = out.copy()
        on_threads(1, timed[rule])()
        check_close(f"{rule} on one thread", out, want, atol=0)
    pairs = [each for call in timed.values() for each in (on_threads(1, call), call)]
    times = _times(*pairs, rounds=rounds)
    ratios = np.median(times[:, ::2] / times[:, 1::2], axis=0).tolist()
    for name, ratio in zip(timed, ratios, strict=True):
        goal = None if name == "read pass" else 0.9 * ratios[0]
        yield Line("threads", f"{name}, all threads", ratio, "times as fast as one", goal, floor=True)


def _at_once(rows: Array, rounds: int) -> Iterator[Line]:
    """Two Python threads, each with half of the columns, against one after the other."""
    half = rows.shape[1] // 2
    with ThreadPoolExecutor(2) as pool:
        for rule in THREAD_RULES:
            jobs = [job(rule, part, len(rows) // 4) for part in (rows[:, :half], rows[:, half:])]

            def in_turn(jobs: Any = jobs) -> None:
                for call, _ in jobs:
                    call()

            def together(jobs: Any = jobs) -> None:
                list(pool.map(lambda job: job[0](), jobs))

            in_turn()
            want = [out.copy() for _, out in jobs]
            together()
            for (_, out), expected in zip(jobs, want, strict=True):
                check_close(f"two calls of {rule} at once", out, expected, atol=0)
            ratio = _ratio(together, in_turn, rounds)
            yield Line("threads", f"{rule}, two calls at once", ratio, "x their time one after the other", 1.15)


def _after_pools(rows: Array, rounds: int) -> Iterator[Line]:
    """Right after another library's threads have worked, which may still be spinning, against after a pause."""
    square = np.ones((700, 700), dtype=np.float32)
    pools: dict[str, Call] = {"numpy": lambda: square @ square}
    try:
        import torch
    except ImportError as error:
        yield Line("threads", "after torch's threads", None, f"not measured: {error}")
    else:
        tensor = torch.from_numpy(square)
        pools["torch"] = lambda: tensor @ tensor
    for rule, (library, pool) in itertools.product(THREAD_RULES, pools.items()):
        call, out = job(rule, rows, len(rows) // 4)
        call()
        want = out.copy()
        times = _times(lambda: time.sleep(0.05), call, pool, call, rounds=rounds)
        check_close(f"{rule} after {library}'s threads", out, want, atol=0)
        ratio = float(np.median(times[:, 3] / times[:, 1]))
        yield Line("threads", f"{rule}, after {library}'s threads", ratio, "x its time after a pause", 1.15)


def _oversubscribed(rows: Array, rounds: int) -> Iterator[Line]:
    """Twice as many threads as cores."""
    for rule in THREAD_RULES:
        call, out = job(rule, rows, len(rows) // 4)
        many = on_threads(2 * machine()["cores"], call)
        call()
        want = out.copy()
        ratio = _ratio(many, call, rounds)
        many()
        check_close(f"{rule} on twice the threads", out, want, atol=0)
        yield Line("threads", f"{rule}, two threads a core", ratio, "x its normal time", 1.15)


def threads(kind: str, rounds: int, d: int | None) -> Iterator[Line]:
    """Measure what threads do, on 16 rows."""
    measure = {
        "speed-up": _speed_up,
        "two calls at once": _at_once,
        "after other pools": _after_pools,
        "two threads a core": _oversubscribed,
    }
    return measure[kind](make_rows(16, d or COMPARED // 16), rounds)


# ---- Numba -----------------------------------------------------------------------------------------------------


def numba(n: int, rounds: int, d: int | None) -> Iterator[Line]:
    """Compare the Numba backend with the compiled one."""
    try:
        load_backend("numba")
    except BackendUnavailable as error:
        yield Line("numba", "all", None, f"not measured: {error}")
        return
    rows = make_rows(n, d or COMPARED // 2 // n)
    for rule in ("median", "trimmed_mean", "mean_around_median"):
        if rule not in available_rules():
            continue
        (call, got), (compiled, want) = (job(rule, rows, n // 4, backend) for backend in ("numba", "cpp"))
        call()
        compiled()
        check_close(f"{rule}, n={n}, numba", got, want, atol=1e-5)
        yield Line("numba", f"{rule}, n={n}", _ratio(call, compiled, rounds), "x the compiled time", 4.0)


# ---- momenta ---------------------------------------------------------------------------------------------------


def momenta(kind: str, rounds: int, d: int | None) -> Iterator[Line]:
    """Compare the update of 17 workers' momenta with torch, at once and by worker, and Numba with compiled code."""
    try:
        import torch
    except ImportError as error:
        yield Line("momenta", kind, None, f"not measured: {error}")
        return
    n, d = 17, d or 1_000_000
    what, corrected = f"{kind}, n={n}, d={d}", kind == "mu2sgd"
    start, gradients, corrections = (make_rows(n, d) + np.float32(k) for k in range(3))
    options: dict[str, Any] = {"keep": 0.9} if corrected else {"keep": 0.9, "gradient_scales": np.full(n, 0.1)}
    last = corrections if corrected else None
    held = {backend: start.copy() for backend in ("cpp", "numba")}
    held_plain, g, h = (torch.from_numpy(rows.copy()) for rows in (start, gradients, corrections))
    plain = list(held_plain.clone())

    def naive() -> None:
        nonlocal held_plain
        held_plain = g + 0.9 * (held_plain - h) if corrected else 0.9 * held_plain + 0.1 * g

    def by_worker() -> None:
        for i in range(n):
            plain[i] = g[i] + 0.9 * (plain[i] - h[i]) if corrected else 0.9 * plain[i] + 0.1 * g[i]

    ours: dict[str, Call] = {}
    for backend, rows in held.items():
        try:
            load_backend(backend)
        except BackendUnavailable as error:
            yield Line("momenta", f"{what}, {backend}", None, f"not measured: {error}")
            continue
        ours[backend] = lambda rows=rows, backend=backend: update_momenta(  # type: ignore[misc]
            rows, gradients, last, backend=backend, **options
        )
    naive()
    by_worker()
    check_close(f"{what}, torch", np.stack(plain), held_plain, atol=1e-5)
    for backend, call in ours.items():
        call()
        check_close(f"{what}, {backend}", held[backend], held_plain, atol=1e-5)
    if "cpp" in ours:
        for how, other, goal in (("naive torch", naive, 3.0), ("a worker at a time in torch", by_worker, 2.0)):
            ratio = 1 / _ratio(ours["cpp"], other, rounds)
            yield Line("momenta", f"{what}, against {how}", ratio, "x as fast", goal, floor=True)
    if len(ours) == 2:
        yield Line("momenta", f"{what}, numba", _ratio(ours["numba"], ours["cpp"], rounds), "x the compiled time", 4.0)


# ---- arrivals --------------------------------------------------------------------------------------------------


def arrivals(rule: str, n: int, rounds: int, d: int | None) -> Iterator[Line]:
    """Compare a server that one row arrives at, and combines it with the others' last ones, with a call on all rows."""
    rows = make_rows(n, d or COMPARED // n)
    plan, f = parse_rule(rule), n // 4
    server = Server(plan, f=f, absent="stale")
    server.aggregate(rows)
    turns = itertools.cycle(range(n))

    def arrive() -> Any:
        worker = next(turns)
        return server.aggregate(rows[worker : worker + 1], workers=[worker])

    def call() -> Any:
        return aggregate(rows, plan, f=f)

    what = f"{rule}, n={n}, an arrival and its result"
    check_close(what, arrive(), call(), atol=1e-5)
    reading, whole, arrival = _times(read_pass(rows), call, arrive, rounds=rounds + 1)[1:].T
    check_close(what, arrive(), call(), atol=1e-5)  # and after all that came
    yield Line("arrivals", what, float(np.median(arrival / reading)), "reads of all rows", None)
    goal = 0.5 if n >= 256 else 1.3  # below `LEAST_ROWS` of `robustkern.kept` it is a call, and a copy of the row
    yield Line("arrivals", what, float(np.median(arrival / whole)), "x a call on all rows", goal)


# ---- files -----------------------------------------------------------------------------------------------------


def files(rule: str, rounds: int, d: int | None) -> Iterator[Line]:
    """Compare the aggregation of 20 files in the page cache, to a file, with reading them on one thread.

    Each file into memory that is there for all of it; and, without a goal, all through a buffer that stays in the
    caches, which is the least that reading can take.
    """
    count, goal = 20, FILE_GOALS[rule]
    rows = make_rows(count, d or FILE_VALUES)
    reads = 1 if goal < 1.4 else 2
    with tempfile.TemporaryDirectory(prefix="robustkern-") as folder:
        paths = [Path(folder, f"{i}.npy") for i in range(count)]
        for path, row in zip(paths, rows, strict=True):
            np.save(path, row)
        out = Path(folder, "out.npy")
        memory = np.zeros(rows[0].nbytes + (2 << 12), dtype=np.uint8)
        memory = memory[-address_of(memory) % (1 << 12) :]  # whole pages, as copies to others can take far longer

        def read(most: int) -> None:
            for _ in range(reads):
                for path in paths:
                    with path.open("rb", buffering=0) as file:
                        while file.readinto(memory[:most].data):
                            pass

        def merge() -> None:
            aggregate_files(paths, rule, f=count // 4, out=out)

        os.sync()  # or the system writes the updates while they are read
        merge()
        check_close(f"{rule} of files", np.load(out), aggregate(rows, rule, f=count // 4), atol=1e-5)
        times = "the time to read them" if reads == 1 else "the time to read them twice"
        size = rows[0].nbytes / 1e6
        calls = (out.unlink, partial(read, 1 << 20), partial(read, len(memory)), merge)
        _, least, into, merged = _times(*calls, rounds=rounds + 1)[1:].T  # once to have all of them in the page cache
        what = f"{rule}, 20 files of {size:.4g} MB"
        yield Line("files", what, float(np.median(merged / into)), f"x {times}", goal)
        yield Line("files", f"{what}, through the caches", float(np.median(merged / least)), f"x {times}", None)


# ---- all -------------------------------------------------------------------------------------------------------

#: Each suite: what measures one case (called with it, the rounds, and the columns or None), and its cases.
SUITES: dict[str, tuple[Callable[..., Iterator[Line]], tuple[tuple[Any, ...], ...]]] = {
    "dtypes": (dtypes, tuple(itertools.product((10, 32), ("float16", "bfloat16", "float64")))),
    "calls": (
        calls,
        tuple(itertools.product(("median", "trimmed_mean", "ctma(median)"), (1, 10, 100, 1000, 10_000, 100_000))),
    ),
    "trees": (trees, (("median",), ("geometric_median",))),
    "memory": (memory, tuple(itertools.product(("mean", *cases()), (16, 128)))),
    "threads": (threads, (("speed-up",), ("two calls at once",), ("after other pools",), ("two threads a core",))),
    "arrivals": (arrivals, tuple(itertools.product(("krum", "geometric_median"), (16, 64, 256)))),
    "files": (files, tuple((rule,) for rule in FILE_GOALS)),
    "momenta": (momenta, (("mu2sgd",), ("momentum",))),
    "numba": (numba, ((8,), (16,), (32,), (64,))),
    "worst": (worst, tuple((n,) for n in SIZES)),
}
