"""How rules scale over ranks of torch.distributed, on this machine: beside torch's own collectives, in the same run.

Each rank is a process, on gloo; they share the processors, and no network lies between them.
"""

from __future__ import annotations

import csv
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from robustkern.measure import style
from robustkern.measure.reads import machine

__all__ = ["RULES", "RankPoint", "draw_ranks", "save_ranks", "sent_bytes", "study_ranks"]

RULES = ("mean", "median", "trimmed_mean", "krum", "geometric_median", "ctma(median)")
ROUNDS, LEAST_ROUNDS = 60, 3
CHECKED_COLUMNS = 1_000_000
TIMEOUT_S = 900.0


@dataclass(frozen=True)
class RankPoint:
    """One rule on one row for each rank, all rows alike in size: a line of ranks.csv.

    Attributes
    ----------
    how : str
        "rows" (`robustkern.distributed.aggregate_rows`) or "fsdp" (one module's reduce-scatter).
    rule, ranks, d, f : str, int, int, int
        What; d float32 numbers in a row.
    seconds : float
        Median over rounds of the slowest rank's time.
    over_parts : float
        Median of it over the time of all_to_all and all_gather of the same bytes; "fsdp": over that of reduce_scatter.
    over_all_reduce : float
        Median of it over the time of an all_reduce of the row.
    sent : int
        Bytes that a rank sends, by count.
    checked : bool
        Whether the result was compared with that of one process.
    rounds : int
        How often.
    """

    how: str
    rule: str
    ranks: int
    d: int
    f: int
    seconds: float
    over_parts: float
    over_all_reduce: float
    sent: int
    checked: bool
    rounds: int


def sent_bytes(rule: str, ranks: int, d: int, itemsize: int = 4) -> int:
    """Return how many bytes rank 0 sends for a rule, by count; it sends most.

    Columns go once to where they are combined and results once to all, as in a ring all_reduce. Rank 0 answers twice in
    messages of 4 KB: that all rows are alike, and, to rules that look at rows, what follows from their Gram; one that
    is larger than 64 KB over all ranks goes out and comes back in parts, at a third word.
    """
    from robustkern.distributed.group import FIRST
    from robustkern.distributed.together import LARGE_SUM
    from robustkern.rules import parse_rule

    others = ranks - 1
    sent = others * (2 * -(-d // ranks) * itemsize + FIRST)
    if not parse_rule(rule).looks_at_no_row:
        gram = 8 * (ranks + 1) * ranks if not rule.startswith("ctma(m") else 16 * ranks
        sent += others * max(FIRST, 500 + 26 * ranks)  # weights, and which rows in what order
        if gram * ranks > LARGE_SUM:
            sent += others * (2 * -(-gram // ranks) + FIRST)
    return sent


def study_ranks(
    ranks: Sequence[int], d: Sequence[int], rules: Sequence[str], seconds: float, own: Sequence[Path] = ()
) -> Iterator[RankPoint]:
    """Measure, one number of ranks after the other.

    Parameters
    ----------
    ranks, d : sequence of int
        Numbers of processes, and of float32 numbers in a row.
    rules : sequence of str
        In their text form; f is 1 from three ranks on, 0 for Krum of four rows (of which the nearest two always tie).
    seconds : float
        For each rule at each size.
    own : sequence of Path
        Python files that register rules, which every process runs.

    Raises
    ------
    RuntimeError
        If a rank fails; the message is what it wrote.
    """
    for size in ranks:
        with tempfile.TemporaryDirectory(prefix="robustkern-ranks-") as folder:
            files = [str(path.resolve()) for path in own]
            asked = json.dumps({"d": list(d), "rules": list(rules), "seconds": seconds, "own": files})
            command = [sys.executable, "-m", __name__, asked, folder, str(size)]
            logs = [open(Path(folder) / f"{rank}.log", "w+", encoding="utf-8") for rank in range(size)]  # noqa: SIM115
            running = [
                subprocess.Popen([*command, str(rank)], stdout=log, stderr=subprocess.STDOUT)
                for rank, log in enumerate(logs)
            ]
            try:
                end = time.monotonic() + TIMEOUT_S + 8 * seconds * len(d) * (len(rules) + 2)
                for process, log in zip(running, logs, strict=True):
                    if process.wait(timeout=max(end - time.monotonic(), 1)) != 0:
                        log.seek(0)
                        raise RuntimeError(f"a rank failed: {log.read()[-2000:]}")
            finally:
                for process, log in zip(running, logs, strict=True):
                    process.kill()
                    process.wait()
                    log.close()
            for line in json.loads((Path(folder) / "points.json").read_text(encoding="utf-8")):
                yield RankPoint(**line)


def save_ranks(points: Sequence[RankPoint], out: Path) -> list[dict[str, Any]]:
    """Write ranks.csv and ranks.json; return the points as JSON has them."""
    lines = [asdict(point) for point in points]
    with open(out / "ranks.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [spec.name for spec in fields(RankPoint)])
        writer.writeheader()
        writer.writerows(lines)
    (out / "ranks.json").write_text(json.dumps({"machine": machine(), "points": lines}, indent=1), encoding="utf-8")
    return lines


def draw_ranks(points: Sequence[RankPoint], out: Path) -> list[Path]:
    """Draw the times over those of the same bytes, against d, a panel for each number of ranks."""
    sizes = sorted({point.ranks for point in points})
    figure = style.figure(1.9 + 5.4 * len(sizes), 4.2)
    panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    looks = style.looks(point.rule for point in points)
    for panel, size in zip(panels, sizes, strict=True):
        for rule in dict.fromkeys(point.rule for point in points):
            line = sorted((p.d, p.over_parts) for p in points if (p.ranks, p.rule, p.how) == (size, rule, "rows"))
            if line:
                panel.plot(*zip(*line, strict=True), label=rule, **looks[rule])
        panel.axhline(1.0, color="0.6", linewidth=0.8)
        panel.set(xscale="log", xlabel="numbers in a row, float32", title=f"{size} ranks")
    panels[0].set(ylabel="time over all_to_all + all_gather")
    panels[-1].legend(fontsize="small")
    facts = machine()
    figure.suptitle(f"ranks on one machine (gloo): {facts['cpu']}, {facts['threads']} threads, {facts['date']}")
    path = out / "ranks.png"
    style.save(figure, path)
    return [path]


# ---- one rank --------------------------------------------------------------------------------------------------------


def _rank(asked: dict[str, Any], folder: Path, size: int, rank: int) -> None:
    import torch
    import torch.distributed as dist

    import robustkern as rk
    from robustkern.rules import names_in
    from robustkern.rules.own import load_file, load_offered

    for path in asked["own"]:
        load_file(Path(path))
    load_offered(name for rule in asked["rules"] for name in names_in(rule))
    torch.set_num_threads(1)
    rk.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=torch.distributed.FileStore(str(folder / "store"), size),  # type: ignore[attr-defined]
        rank=rank,
        world_size=size,
    )
    points = []
    for d in asked["d"]:
        points += _points_of(d, asked["rules"], asked["seconds"], size, rank)
    if rank == 0:
        (folder / "points.json").write_text(json.dumps([asdict(point) for point in points]), encoding="utf-8")
    dist.barrier()
    os._exit(0)  # torch's gloo may abort at exit


def _points_of(d: int, rules: Sequence[str], seconds: float, size: int, rank: int) -> list[RankPoint]:
    import torch
    import torch.distributed as dist

    from robustkern.distributed.fsdp import RobustFSDP
    from robustkern.distributed.group import all_gather
    from robustkern.distributed.ranks import Asked, aggregate_rows
    from robustkern.rules import parse_rule

    row = torch.from_numpy(np.random.default_rng([rank, d]).standard_normal(d, dtype=np.float32))
    width = -(-d // size)
    padded = torch.zeros(width * size)
    padded[:d] = row

    def parts() -> None:
        received = torch.empty(width * size)
        dist.all_to_all_single(received, padded)
        all_gather(torch.empty(width * size), received[:width].clone())

    world: Any = dist.group.WORLD
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

    def fsdp(rule: str) -> Callable[[], Any]:
        asked = Asked(parse_rule(rule), tolerated[rule], None, None, None)
        combine = RobustFSDP(torch.nn.Identity(), asked, False, None)
        return lambda: combine(torch.empty(width), padded, world, None)

    calls: dict[tuple[str, str], Callable[[], Any]] = {
        ("", "parts"): parts,
        ("", "all_reduce"): lambda: dist.all_reduce(row.clone()),
        ("", "scatter"): lambda: scatter(torch.empty(width), padded.clone()),
    }
    tolerated = {rule: _tolerated(rule, size) for rule in rules}
    kept = [rule for rule, f in tolerated.items() if _fits(rule, size, f)]
    calls |= {("rows", rule): functools.partial(aggregate_rows, row, rule, f=tolerated[rule]) for rule in kept}
    calls |= {("fsdp", rule): fsdp(rule) for rule in kept if parse_rule(rule).looks_at_no_row}
    checked = d <= CHECKED_COLUMNS and _check(row, {rule: tolerated[rule] for rule in kept}, size)
    names, order = list(calls), np.random.default_rng(0)  # the same on all ranks
    times: list[list[float]] = []
    end = time.perf_counter() + seconds * len(calls)
    while len(times) < LEAST_ROUNDS or (len(times) < ROUNDS and _all_have_time(end)):
        taken_by = dict.fromkeys(calls, 0.0)
        for k in order.permutation(len(names)):  # what a call leaves behind, in caches and memory, meets all others
            taken_by[names[k]] = _timed(calls[names[k]])
        times.append(list(taken_by.values()))
    taken = np.array(times[1:] or times)
    base = {name: taken[:, names.index(("", name))] for name in ("parts", "all_reduce", "scatter")}
    points = []
    for k, (how, rule) in enumerate(names):
        if how:
            parts_of = base["scatter" if how == "fsdp" else "parts"]
            sent = sent_bytes(rule, size, d) if how == "rows" else sent_bytes(rule, size, d) // 2
            seconds_of, over, over_reduce = (
                float(np.median(taken[:, k] / by)) for by in (1.0, parts_of, base["all_reduce"])
            )
            points.append(
                RankPoint(how, rule, size, d, tolerated[rule], seconds_of, over, over_reduce, sent, checked, len(taken))
            )
    return points


def _tolerated(rule: str, size: int) -> int:
    """Return f: 1 from three ranks on, but 0 for Krum of four rows, of which the nearest two always tie with 1."""
    return 0 if size < 3 or (size == 4 and rule.endswith("krum")) else 1


def _fits(rule: str, size: int, f: int) -> bool:
    import robustkern as rk

    try:
        rk.aggregate(np.zeros((size, 1), dtype=np.float32), rule, f=f)
    except ValueError:
        return False
    return True


def _all_have_time(end: float) -> bool:
    import torch
    import torch.distributed as dist

    left = torch.tensor([end - time.perf_counter()])
    dist.all_reduce(left, op=dist.ReduceOp.MIN)
    return bool(left > 0)


def _timed(work: Callable[[], Any]) -> float:
    """Return the slowest rank's seconds."""
    import torch
    import torch.distributed as dist

    dist.barrier()
    started = time.perf_counter()
    work()
    taken = torch.tensor([time.perf_counter() - started], dtype=torch.float64)
    dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    return float(taken)


def _check(row: Any, rules: dict[str, int], size: int) -> bool:
    """Compare results with those of one process; raise RuntimeError where they differ."""
    import torch

    import robustkern as rk
    from robustkern.distributed.group import Group, all_gather
    from robustkern.distributed.ranks import aggregate_rows

    rows = torch.empty(size * row.numel())
    all_gather(rows, row, group=Group().group)
    for rule, f in rules.items():
        want = rk.aggregate(rows.view(size, -1), rule, f=f)
        got = aggregate_rows(row, rule, f=f)
        if not torch.allclose(got, want, rtol=1e-6, atol=1e-6):
            raise RuntimeError(f"{rule}: ranks give another result than one process")
    return True


if __name__ == "__main__":
    _rank(json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
