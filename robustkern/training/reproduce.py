"""The papers' comparisons at a size that a laptop finishes: which runs, running them, and what the time goes to."""

from __future__ import annotations

import functools
import itertools
import json
import os
import platform
import signal
import statistics
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

import robustkern
from robustkern.errors import RobustkernError
from robustkern.measure.peers import naive_rules
from robustkern.training.asynchronous import simulate
from robustkern.training.data import DataSet, load_data
from robustkern.training.mechanism import Measure, Measured, measured_rounds
from robustkern.training.session import read_lines, replace_lines
from robustkern.training.settings import Settings
from robustkern.training.simulation import Task, Workers

__all__ = [
    "FAMILIES",
    "FORMS",
    "PARTS",
    "QUICK",
    "WORKERS",
    "Grid",
    "Mechanism",
    "Part",
    "Rates",
    "Record",
    "Turns",
    "key_of",
    "measure_times",
    "reproduce",
    "runs_of",
    "train_once",
]

#: How a base rule is used, by name.
FORMS = {
    "alone": "{}",
    "+CTMA": "ctma({})",
    "+NNM": "nnm | {}",
    "+bucketing": "bucketing | {}",
    "NNM+CTMA": "ctma(nnm | {})",
}
#: Attacks by what they do: wrong gradients, small ones against the mean, and values just inside the spread.
FAMILIES = {
    "flips": ("sign_flip", "label_flip"),
    "IPM": ("ipm(epsilon=0.1)", "ipm(epsilon=0.5)"),
    "ALIE": ("alie",),
}
ATTACKS = tuple(attack for family in FAMILIES.values() for attack in family)
WORKERS = 17
RESULTS, SESSIONS = "runs.jsonl", "sessions.jsonl"
DIGITS = Settings(model="softmax", workers=WORKERS, byzantine=8, lr=0.1, rounds=750)
MNIST = replace(DIGITS, data="mnist5k", model="paper", rounds=600)
TURNS = replace(
    DIGITS, arrivals="id^2", byzantine_share=0.4, lr=0.05, batch=16, beta=0.25, gamma=0.1, clip=0, rounds=1500
)

Record = dict[str, Any]


@dataclass(frozen=True)
class Part(ABC):
    """Some of the runs, which a page shows together.

    Parameters
    ----------
    name : str
        On the command line and on the page.
    base : Settings
        What all of its runs have in common.
    seeds : int
        Repetitions: seeds 0, 1, ...
    attacks : tuple of str
        In their text forms.
    optimizers : tuple of str
        Those that are compared.
    """

    name: str
    base: Settings
    seeds: int
    attacks: tuple[str, ...]
    optimizers: tuple[str, ...] = ("mu2sgd", "momentum")

    #: Whether the rounds of its runs are measured.
    measured: ClassVar[bool] = False

    @abstractmethod
    def kinds(self) -> Iterator[Settings]:
        """Yield the settings of seed 0."""

    def runs(self) -> list[Settings]:
        """Return all runs, each once."""
        return [replace(kind, seed=seed) for kind in dict.fromkeys(self.kinds()) for seed in range(self.seeds)]


@dataclass(frozen=True)
class Grid(Part):
    """Rules compared: base rules in all forms, under all attacks, for several shares of attackers.

    Parameters
    ----------
    bases : tuple of str
        Base rules. The trimmed mean of 17 rows with 8 attackers is the median, so it is none.
    byzantine : tuple of int
        Attackers among the 17 workers: delta is 4/17 = 0.24 and 8/17 = 0.47.
    """

    bases: tuple[str, ...] = ("median", "geometric_median")
    byzantine: tuple[int, ...] = (4, 8)

    def forms(self, byzantine: int) -> dict[str, str]:
        """Return the forms that exist: buckets of one row, all that 8 of 17 attackers allow, are no bucketing."""
        return {k: v for k, v in FORMS.items() if k != "+bucketing" or WORKERS // (2 * byzantine) > 1}

    def at(self, byzantine: int, attack: str, rule: str, optimizer: str) -> Settings:
        """Return one kind of run."""
        return replace(self.base, byzantine=byzantine, attack=attack, rule=rule, optimizer=optimizer)

    def kinds(self) -> Iterator[Settings]:
        """Yield every combination."""
        for b, attack, optimizer, base in itertools.product(self.byzantine, self.attacks, self.optimizers, self.bases):
            for form in self.forms(b).values():
                yield self.at(b, attack, form.format(base), optimizer)


@dataclass(frozen=True)
class Rates(Part):
    """Optimizers compared over learning rates, with one rule."""

    rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)

    def at(self, attack: str, optimizer: str, lr: float) -> Settings:
        """Return one kind of run."""
        return replace(self.base, attack=attack, optimizer=optimizer, lr=lr)

    def kinds(self) -> Iterator[Settings]:
        """Yield every combination."""
        for attack, optimizer, lr in itertools.product(self.attacks, self.optimizers, self.rates):
            yield self.at(attack, optimizer, lr)


@dataclass(frozen=True)
class Mechanism(Part):
    """What the theorems speak of, measured in the rounds, with draws from all data and from shards."""

    splits: tuple[str, ...] = ("iid", "shards")

    measured: ClassVar[bool] = True

    def at(self, split: str, optimizer: str) -> Settings:
        """Return one kind of run."""
        return replace(self.base, attack=self.attacks[0], split=split, optimizer=optimizer)

    def kinds(self) -> Iterator[Settings]:
        """Yield every combination."""
        for split, optimizer in itertools.product(self.splits, self.optimizers):
            yield self.at(split, optimizer)


@dataclass(frozen=True)
class Turns(Part):
    """Asynchronous training: rules that weigh workers by their updates, and the same without weights."""

    rules: tuple[str, ...] = ("median", "geometric_median", "ctma(median)", "ctma(geometric_median)")

    def at(self, attack: str, optimizer: str, rule: str, weights: str) -> Settings:
        """Return one kind of run."""
        return replace(self.base, attack=attack, optimizer=optimizer, rule=rule, weights=weights)

    def kinds(self) -> Iterator[Settings]:
        """Yield every combination."""
        for attack, optimizer, rule in itertools.product(self.attacks, self.optimizers, self.rules):
            for weights in ("equal", "updates"):
                yield self.at(attack, optimizer, rule, weights)


_ALL = ("mu2sgd", "momentum", "sgd")
_LIFTED = replace(DIGITS, rule="ctma(median)")
#: The whole page, about 80 minutes on two cores.
PARTS: tuple[Part, ...] = (
    Mechanism("mechanism", _LIFTED, 3, ("ipm(epsilon=0.1)",), _ALL),
    Grid("digits-rules", DIGITS, 5, ATTACKS),
    Rates("digits-rates", _LIFTED, 3, ("sign_flip", "label_flip", "ipm(epsilon=0.1)", "alie"), _ALL),
    Turns("asynchronous", TURNS, 3, ("sign_flip", "ipm(epsilon=0.1)", "alie"), _ALL),
    Grid("mnist-rules", MNIST, 3, ("label_flip", "ipm(epsilon=0.1)", "alie"), bases=("median",), byzantine=(8,)),
    Rates("mnist-rates", replace(MNIST, rule="ctma(median)"), 3, ("ipm(epsilon=0.1)", "alie"), _ALL, (0.03, 0.1, 0.3)),
)
_SHORT = replace(DIGITS, rounds=60)
#: Some minutes, to see that everything works; it supports no claim.
QUICK: tuple[Part, ...] = (
    Mechanism("mechanism", replace(_SHORT, rule="ctma(median)"), 1, ("ipm(epsilon=0.1)",)),
    Grid("digits-rules", _SHORT, 2, ("sign_flip", "alie"), ("mu2sgd", "momentum"), ("median",)),
    Rates("digits-rates", replace(_SHORT, rule="ctma(median)"), 2, ("alie",), _ALL, (0.01, 0.1)),
    Turns("asynchronous", replace(TURNS, rounds=100), 2, ("sign_flip",), ("mu2sgd",), ("median", "ctma(median)")),
)


@functools.cache
def _data(name: str) -> DataSet:
    return load_data(name)


def train_once(settings: Settings, measured: bool = False) -> Record:
    """Train, and return what came of it.

    Parameters
    ----------
    settings : Settings
        The run; its data need no folder.
    measured : bool
        Whether to measure rounds, see `robustkern.training.mechanism`.

    Returns
    -------
    dict
        ``settings``; ``accuracy``, the mean of three tests in the last tenth of the rounds; ``loss`` at the end (None
        where not finite); ``failed``, None or why training ended early (the rule met more vectors with NaN or Inf than
        it tolerates: training has diverged); ``seconds``, in all and by part; ``measures`` of rounds where asked for.
    """
    data = _data(settings.data)
    simulation = Measured(settings, data) if measured else simulate(settings, data)
    started = time.perf_counter()
    tested = [settings.rounds - k * max(settings.rounds // 30, 1) for k in range(3)]
    looked_at = measured_rounds(settings.rounds) if measured else set()
    accuracies, failed, loss = [], None, float("nan")
    measures: list[Measure] = []
    for t in range(1, settings.rounds + 1):
        try:
            if isinstance(simulation, Measured) and t in looked_at:
                measures.append(simulation.measured_round())
            else:
                simulation.round()
        except RobustkernError as error:
            failed = f"round {t}: {error}"
            accuracies = [simulation.evaluate()[0]]
            break
        if t in tested:
            accuracy, loss = simulation.evaluate()
            accuracies.append(accuracy)
    return {
        "settings": settings.as_dict(),
        "accuracy": statistics.fmean(accuracies),
        "loss": loss if np.isfinite(loss) else None,
        "failed": failed,
        "seconds": {
            "total": round(time.perf_counter() - started, 4),
            **{name: round(value, 4) for name, value in vars(simulation.times).items()},
        },
        **({"measures": measures} if measured else {}),
    }


def _start_worker() -> None:
    """Give each of the parallel runs one thread, and let it end with the process that started it."""
    torch.set_num_threads(1)
    robustkern.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End where the parent was killed, which leaves a pool's processes waiting for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def key_of(settings: dict[str, Any], measured: bool) -> str:
    """Return what tells runs apart."""
    return json.dumps([settings, measured], sort_keys=True)


def runs_of(parts: Sequence[Part]) -> dict[str, tuple[Settings, bool]]:
    """Return the runs of some parts, each once, and whether they are measured."""
    return {key_of(s.as_dict(), part.measured): (s, part.measured) for part in parts for s in part.runs()}


def _recorded(lines: list[Record]) -> dict[str, Record]:
    """Return the runs among the lines of a file."""
    return {
        key_of(line["settings"], "measures" in line): line
        for line in lines
        if isinstance(line.get("settings"), dict) and isinstance(line.get("accuracy"), float)
    }


def reproduce(
    parts: Sequence[Part], out: Path, *, jobs: int, progress: Callable[[int, int], None] | None = None
) -> tuple[list[Record], dict[str, Any]]:
    """Make all runs of some parts that the folder does not hold yet.

    Parameters
    ----------
    parts : sequence of Part
        What to run.
    out : path
        Folder, which exists; receives ``runs.jsonl``, a line for each run, and ``sessions.jsonl``, a line for each
        time that runs were made. Runs that are there are not made again.
    jobs : int
        Runs at a time, each on one thread.
    progress : callable, optional
        Called with the number of runs that are done, and of all.

    Returns
    -------
    records : list of dict
        See `train_once`; all that the folder holds, of other parts too.
    facts : dict
        Machine, versions, ``samples``, how many images there are to train on, and ``sessions``: runs made, seconds and
        runs at a time, now and before.
    """
    wanted = runs_of(parts)
    found = _recorded(read_lines(out / RESULTS))
    missing = [run for key, run in wanted.items() if key not in found]
    held = len(wanted) - len(missing)
    if missing:
        replace_lines(out / RESULTS, list(found.values()))
        before, made, started = read_lines(out / SESSIONS), 0, time.perf_counter()
        with (
            (out / RESULTS).open("a") as log,
            ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_start_worker) as pool,
        ):
            for record in _completed(pool, missing):
                found[key_of(record["settings"], "measures" in record)] = record
                log.write(json.dumps(record) + "\n")
                log.flush()
                made += 1
                session = {"made": made, "seconds": round(time.perf_counter() - started, 1), "jobs": jobs}
                replace_lines(out / SESSIONS, [*before, session])  # now, as a kill leaves no time
                if progress is not None:
                    progress(held + made, len(wanted))
    facts = {
        "sessions": [line for line in read_lines(out / SESSIONS) if {"made", "seconds", "jobs"} <= line.keys()],
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "robustkern": robustkern.__version__,
        "isa": robustkern.info()["isa"],
        "samples": {name: len(_data(name).labels) for name in dict.fromkeys(part.base.data for part in parts)},
    }
    return list(found.values()), facts


def _completed(pool: ProcessPoolExecutor, runs: list[tuple[Settings, bool]]) -> Iterator[Record]:
    """Train; Ctrl-C, which reaches all processes of a terminal, is this process's to answer: it ends the others."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # what they start with
    try:
        futures = [pool.submit(train_once, *run) for run in runs]
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        for future in futures:
            yield future.result()
    except BaseException:
        for process in active_children():
            process.terminate()
        raise


# ---- what the time goes to -------------------------------------------------------------------------------------


def _wide(hidden: int) -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Flatten(),
        torch.nn.Linear(64, hidden),
        torch.nn.ReLU(),
        torch.nn.Linear(hidden, hidden),
        torch.nn.ReLU(),
        torch.nn.Linear(hidden, 10),
    )


def _median_s(call: Callable[[], Any], rounds: int) -> float:
    """Return the median time of a call, after one that is not counted."""
    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def measure_times(*, rounds: int = 9) -> list[Record]:
    """Measure what a round of 17 workers, 8 of them attackers, spends on gradients, on momenta and in the rules.

    Returns
    -------
    list of dict
        For each model: ``model``, ``d``, ``gradients`` (both of mu^2-SGD), ``momenta`` and ``momenta_naive`` (a torch
        expression for each worker), and ``rules``: name to (our seconds, plain NumPy's seconds). All on the threads
        that torch and the kernels use by themselves, medians over the rounds; rules' results are compared.
    """
    data, f = load_data("digits"), 8
    naive = naive_rules(f)
    found = []
    for name, model in (("mlp", None), ("cnn", None), ("two hidden layers of 950", _wide(950))):
        settings = Settings(model="cnn" if name == "cnn" else "mlp", byzantine=0, attack="none", rule="mean")
        task = Task(settings, data) if model is None else Task(settings, data, model)
        workers = Workers(task, range(WORKERS))
        x, samples, flipped = task.start(), task.samples(1), np.zeros(WORKERS, dtype=np.bool_)
        gradients = _median_s(lambda t=task, x=x, s=samples, w=flipped: t.gradients(x, s, w), rounds)  # type: ignore[misc]
        g = task.gradients(x, samples, flipped)
        h = task.gradients(x * 0.9, samples, flipped)
        momenta = workers.estimate(x, 1)

        each = [[torch.from_numpy(row) for row in rows] for rows in (momenta.copy(), g, h)]

        def fused(m: Any = momenta, g: Any = g, h: Any = h) -> None:
            robustkern.kernels.update_momenta(m, g, h, keep=0.9)

        def plain(each: Any = each) -> None:
            for i in range(WORKERS):
                each[0][i] = each[1][i] + 0.9 * (each[0][i] - each[2][i])

        rows = g.copy()
        rows[WORKERS - f :] = -0.5 * rows[: WORKERS - f].mean(axis=0)
        rules = {}
        for rule in (
            "median",
            "trimmed_mean",
            "geometric_median",
            "ctma(median)",
            "ctma(geometric_median)",
            "nnm | median",
        ):
            plan = robustkern.parse_rule(rule)
            want, got = naive[rule](rows), robustkern.aggregate(rows, plan, f=f)
            if not np.abs(got - want).max() <= 1e-4 * np.abs(rows).max():
                raise RuntimeError(f"{rule}: the plain NumPy version differs; please report this as a bug")
            rules[rule] = (
                _median_s(lambda r=rows, p=plan: robustkern.aggregate(r, p, f=f), rounds),  # type: ignore[misc]
                _median_s(lambda r=rows, k=rule: naive[k](r), min(rounds, 3)),  # type: ignore[misc]
            )
        found.append(
            {
                "model": name,
                "d": task.d,
                "gradients": 2 * gradients,
                "momenta": _median_s(fused, rounds),
                "momenta_naive": _median_s(plain, rounds),
                "rules": rules,
            }
        )
    return found
