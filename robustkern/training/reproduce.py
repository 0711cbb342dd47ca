"""The paper's comparisons at a size that a laptop finishes: which runs, running them, and what the time goes to."""

from __future__ import annotations

import functools
import json
import os
import platform
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
import torch

import robustkern
from robustkern.errors import RobustkernError
from robustkern.measure.peers import naive_rules
from robustkern.training.data import DataSet, load_data
from robustkern.training.session import read_lines, replace_lines
from robustkern.training.settings import Settings
from robustkern.training.simulation import Simulation, Task, Workers

__all__ = ["BASES", "FORMS", "Plan", "Record", "measure_times", "reproduce", "train_once"]

BASES = ("mean", "median", "trimmed_mean", "geometric_median")
#: How a base rule is used, by name.
FORMS = {
    "alone": "{}",
    "+CTMA": "ctma({})",
    "+NNM": "nnm | {}",
    "+bucketing": "bucketing | {}",
    "NNM+CTMA": "ctma(nnm | {})",
}
WORKERS = 17
RESULTS, SESSIONS = "runs.jsonl", "sessions.jsonl"

Record = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """Which runs to make.

    Parameters
    ----------
    rounds : int
        Steps of each run.
    seeds : int
        Repetitions: seeds 0, 1, ...
    model : str
        See `make_model`; the data are digits.
    byzantine : tuple of int
        Attackers among the 17 workers: delta is 3/17 = 0.18 and 8/17 = 0.47.
    attacks, optimizers : tuple of str
        In their text forms.
    grid_optimizers : tuple of str
        Those with which all rules are compared, at learning rate `lr`.
    rates : tuple of float
        Learning rates, for `rate_rules` and all optimizers.
    """

    rounds: int = 750
    seeds: int = 3
    model: str = "softmax"
    byzantine: tuple[int, ...] = (3, 8)
    attacks: tuple[str, ...] = ("sign_flip", "label_flip", "ipm(epsilon=0.1)", "alie")
    optimizers: tuple[str, ...] = ("mu2sgd", "momentum", "sgd")
    grid_optimizers: tuple[str, ...] = ("mu2sgd", "momentum")
    lr: float = 0.1
    rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    rate_rules: tuple[str, ...] = ("ctma(median)",)

    @classmethod
    def quick(cls) -> Plan:
        """Return a small plan that shows in some minutes that everything works; it supports no claim."""
        return cls(
            rounds=100,
            seeds=2,
            byzantine=(3, 8),
            attacks=("sign_flip", "alie"),
            grid_optimizers=("mu2sgd",),
            rates=(0.01, 0.1, 1.0),
        )

    def _run(self, byzantine: int, attack: str, rule: str, optimizer: str, lr: float, seed: int) -> Settings:
        return Settings(
            model=self.model,
            workers=WORKERS,
            byzantine=byzantine,
            attack=attack,
            rule=rule,
            optimizer=optimizer,
            lr=lr,
            rounds=self.rounds,
            seed=seed,
        )

    def forms(self, byzantine: int) -> dict[str, str]:
        """Return the forms that exist: buckets of one row, all that 8 of 17 attackers allow, are no bucketing."""
        return {k: v for k, v in FORMS.items() if k != "+bucketing" or WORKERS // (2 * byzantine) > 1}

    def runs(self) -> list[Settings]:
        """Return all runs, each once."""
        found: dict[Settings, None] = {}
        for seed in range(self.seeds):
            for byzantine in self.byzantine:
                for attack in self.attacks:
                    for optimizer in self.grid_optimizers:
                        for base in BASES:
                            for form in self.forms(byzantine).values():
                                found[self._run(byzantine, attack, form.format(base), optimizer, self.lr, seed)] = None
                    for optimizer in self.optimizers:
                        for lr in self.rates:
                            for rule in self.rate_rules:
                                found[self._run(byzantine, attack, rule, optimizer, lr, seed)] = None
            for optimizer in self.optimizers:  # what training reaches when nobody attacks
                for lr in self.rates:
                    found[self._run(0, "none", "mean", optimizer, lr, seed)] = None
        return list(found)


@functools.cache
def _data(name: str) -> DataSet:
    return load_data(name)


def train_once(settings: Settings) -> Record:
    """Train, and return what came of it.

    Parameters
    ----------
    settings : Settings
        The run; its data need no files.

    Returns
    -------
    dict
        ``settings``; ``accuracy``, the mean of three tests in the last tenth of the rounds; ``loss`` at the end (None
        where not finite); ``failed``, None or why training ended early (the rule met more vectors with NaN or Inf than
        it tolerates: training has diverged); ``seconds``, in all and by part.
    """
    simulation, started = Simulation(settings, _data(settings.data)), time.perf_counter()
    tested = [settings.rounds - k * max(settings.rounds // 30, 1) for k in range(3)]
    accuracies, failed, loss = [], None, float("nan")
    for t in range(1, settings.rounds + 1):
        try:
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


def _recorded(lines: list[Record]) -> dict[str, Record]:
    """Return the runs among the lines of a file, by settings."""
    return {
        json.dumps(line["settings"], sort_keys=True): line
        for line in lines
        if isinstance(line.get("settings"), dict) and isinstance(line.get("accuracy"), float)
    }


def _key(settings: Settings) -> str:
    return json.dumps(settings.as_dict(), sort_keys=True)


def reproduce(
    plan: Plan, out: Path, *, jobs: int, progress: Callable[[int, int], None] | None = None
) -> tuple[list[Record], dict[str, Any]]:
    """Make all runs of a plan that the folder does not hold yet.

    Parameters
    ----------
    plan : Plan
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
        See `train_once`, in the order of the plan.
    facts : dict
        Machine, versions, and ``sessions``: runs made, seconds and runs at a time, now and before.
    """
    runs = plan.runs()
    found = _recorded(read_lines(out / RESULTS))  # those of other plans stay where they are
    missing = [settings for settings in runs if _key(settings) not in found]
    held = len(runs) - len(missing)
    if missing:
        replace_lines(out / RESULTS, list(found.values()))
        replace_lines(out / SESSIONS, read_lines(out / SESSIONS))
        made, started = 0, time.perf_counter()
        try:
            with (
                (out / RESULTS).open("a") as log,
                ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_start_worker) as pool,
            ):
                for record in _completed(pool, missing):
                    found[json.dumps(record["settings"], sort_keys=True)] = record
                    log.write(json.dumps(record) + "\n")
                    log.flush()
                    made += 1
                    if progress is not None:
                        progress(held + made, len(runs))
        finally:
            session = {"made": made, "seconds": round(time.perf_counter() - started, 1), "jobs": jobs}
            with (out / SESSIONS).open("a") as log:
                log.write(json.dumps(session) + "\n")
    facts = {
        "sessions": [line for line in read_lines(out / SESSIONS) if {"made", "seconds", "jobs"} <= line.keys()],
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "robustkern": robustkern.__version__,
        "isa": robustkern.info()["isa"],
    }
    return [found[_key(settings)] for settings in runs], facts


def _completed(pool: ProcessPoolExecutor, runs: list[Settings]) -> Iterator[Record]:
    """Train; Ctrl-C, which reaches all processes of a terminal, is this process's to answer: it ends the others."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # what they start with
    try:
        futures = [pool.submit(train_once, settings) for settings in runs]
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
                _median_s(lambda r=rows, k=rule: naive[k](r), 3),  # type: ignore[misc]
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
