"""The demonstration: real data, 17 workers of which 8 attack, and which rules survive.

A softmax model with hand-written gradients learns scikit-learn's handwritten digits. In every round the 9 honest
workers send their momentum, and the 8 attackers, who see those, all send minus ten times their mean.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.numpy import load_file, save_file

import robustkern as rk
from robustkern.cli.report import print_workers
from robustkern.files import aggregate_files
from robustkern.measure.peers import naive_rules

__all__ = ["run"]

WORKERS, BYZANTINE = 17, 8
LEARNING_RATE, MOMENTUM, BATCH, STRENGTH = 0.5, 0.9, 16, 10.0
RULES = ("mean", "median", "ctma(median)", "geometric_median", "ctma(geometric_median)")

Floats = NDArray[np.float32]
Update = dict[str, Floats]


@dataclass
class Digits:
    """Training and test images (m, 64) in [0, 1] and labels, and each honest worker's share."""

    images: Floats
    labels: NDArray[np.intp]
    test_images: Floats
    test_labels: NDArray[np.intp]
    shards: list[NDArray[np.intp]]


def load_digits(seed: int) -> Digits:
    """Load scikit-learn's digits, 1400 images for training and 397 for the test."""
    from sklearn.datasets import load_digits as sklearn_digits

    data = sklearn_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    images, labels = (data.data / 16).astype(np.float32)[order], data.target.astype(np.intp)[order]
    shards = np.array_split(np.arange(1400), WORKERS - BYZANTINE)
    return Digits(images[:1400], labels[:1400], images[1400:], labels[1400:], shards)


def gradient(model: Update, images: Floats, labels: NDArray[np.intp]) -> Update:
    """Gradient of the mean cross-entropy of a softmax model."""
    scores = images @ model["weight"].T + model["bias"]
    scores -= scores.max(axis=1, keepdims=True)
    errors = np.exp(scores)
    errors /= errors.sum(axis=1, keepdims=True)
    errors[np.arange(len(labels)), labels] -= 1
    errors /= len(labels)
    return {"weight": errors.T @ images, "bias": errors.sum(axis=0)}


class Workers:
    """Honest workers with momentum, and attackers who know what the honest ones send."""

    def __init__(self, digits: Digits, seed: int) -> None:
        self.digits = digits
        self.random = np.random.default_rng(seed)
        self.momenta: list[Update] = []

    def updates(self, model: Update) -> list[Update]:
        """Return what the 17 workers send in this round, honest ones first."""
        gradients = []
        for shard in self.digits.shards:
            batch = self.random.choice(shard, BATCH, replace=False)
            gradients.append(gradient(model, self.digits.images[batch], self.digits.labels[batch]))
        if self.momenta:
            pairs = zip(self.momenta, gradients, strict=True)
            self.momenta = [{k: MOMENTUM * m[k] + (1 - MOMENTUM) * g[k] for k in g} for m, g in pairs]
        else:
            self.momenta = gradients
        mean = {k: np.mean([m[k] for m in self.momenta], axis=0) for k in self.momenta[0]}
        attack = {k: (-STRENGTH * v).astype(np.float32) for k, v in mean.items()}
        return [{k: v.astype(np.float32) for k, v in m.items()} for m in self.momenta] + [attack] * BYZANTINE


def new_model() -> Update:
    """Return the start of training."""
    return {"weight": np.zeros((10, 64), np.float32), "bias": np.zeros(10, np.float32)}


def step(model: Update, update: Update) -> Update:
    """Take one step against the aggregated update."""
    return {k: model[k] - np.float32(LEARNING_RATE) * update[k] for k in model}


def accuracy(model: Update, digits: Digits) -> float:
    """Share of test images recognised."""
    scores = digits.test_images @ model["weight"].T + model["bias"]
    return float((scores.argmax(axis=1) == digits.test_labels).mean())


def run(out: Path, *, rounds: int, seed: int) -> dict[str, list[float]]:
    """Run the demonstration; return the accuracy curve of each rule.

    Parameters
    ----------
    out : path
        Folder, made if need be; receives ``updates/``, ``merged.safetensors`` and ``accuracy.png``.
    rounds : int
        Training rounds for each rule.
    seed : int
        Of the data split and the batches.
    """
    console = Console()
    out.mkdir(parents=True, exist_ok=True)
    digits = load_digits(seed)
    _one_round_through_files(out, digits, seed, console)
    curves = {}
    for rule in track(RULES, description="training", console=Console(stderr=True), transient=True):
        workers, model = Workers(digits, seed), new_model()
        curve = []
        for _ in range(rounds):
            model = step(model, rk.aggregate(workers.updates(model), rule, f=BYZANTINE))
            curve.append(accuracy(model, digits))
        curves[rule] = curve
    speed = compare_speed()
    table = Table(title=f"after {rounds} rounds, {BYZANTINE} of {WORKERS} workers attack", title_justify="left")
    table.add_column("rule")
    table.add_column("test accuracy", justify="right")
    for rule, curve in curves.items():
        good = curve[-1] > 0.9
        table.add_row(rule, f"[{'green' if good else 'red'}]{curve[-1]:.1%}[/]")
    console.print(table)
    _print_speed(console, speed)
    _plot(curves, out / "accuracy.png")
    console.print(f"picture: {out / 'accuracy.png'}", soft_wrap=True)
    return curves


def _one_round_through_files(out: Path, digits: Digits, seed: int, console: Console) -> None:
    """Write one round's updates, merge them through the main job, and check it against the library call."""
    folder = out / "updates"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("worker-*.safetensors"):
        old.unlink()
    updates = Workers(digits, seed).updates(new_model())
    for i, update in enumerate(updates):
        save_file(update, folder / f"worker-{i:02d}.safetensors")
    merged = out / "merged.safetensors"
    rule = "ctma(geometric_median)"
    console.print(
        f"$ robustkern aggregate {folder} --rule '{rule}' --f {BYZANTINE} --out {merged}",
        soft_wrap=True,
        highlight=False,
    )
    started = time.perf_counter()
    info = aggregate_files([folder], rule, out=merged, f=BYZANTINE)
    files = sorted(folder.iterdir())
    print_workers(info, files, merged, time.perf_counter() - started)
    want, got = rk.aggregate(updates, rule, f=BYZANTINE), load_file(merged)
    if any(not np.allclose(got[k], want[k], rtol=1e-6, atol=1e-7) for k in want):
        raise RuntimeError("the merged file differs from the library's result; please report this as a bug")


# ---- speed -----------------------------------------------------------------------------------------------------


def compare_speed(n: int = 20, d: int = 1_000_000, f: int = 4) -> list[tuple[str, float, float, float]]:
    """Time every rule against plain NumPy on the same float32 data and check that they agree.

    Returns
    -------
    list of (rule, our seconds, NumPy's seconds, largest difference)
    """
    x = np.random.default_rng(0).standard_normal((n, d), dtype=np.float32)
    x[:f] += 3  # the attackers
    rows = []
    naive_of = naive_rules(f)
    for rule in RULES[1:]:
        naive = naive_of[rule]
        plan = rk.parse_rule(rule)
        started = time.perf_counter()
        want = naive(x)
        naive_s = time.perf_counter() - started
        times = []
        for _ in range(6):
            started = time.perf_counter()
            got = rk.aggregate(x, plan, f=f)
            times.append(time.perf_counter() - started)
        difference = float(np.abs(got - want).max())
        if difference > 1e-5:
            raise RuntimeError(f"{rule}: the NumPy version differs by {difference}; please report this as a bug")
        rows.append((rule, float(np.median(times[1:])), naive_s, difference))
    return rows


def _print_speed(console: Console, rows: list[tuple[str, float, float, float]]) -> None:
    table = Table(title="n = 20, d = 1,000,000, float32, against plain NumPy in this run", title_justify="left")
    for column in ("rule", "robustkern", "NumPy", "ratio", "largest difference"):
        table.add_column(column, justify="left" if column == "rule" else "right")
    for rule, ours, naive, difference in rows:
        table.add_row(
            rule, f"{ours * 1e3:.1f} ms", f"{naive * 1e3:.0f} ms", f"{naive / ours:.0f} x", f"{difference:.1e}"
        )
    console.print(table)


def _plot(curves: dict[str, list[float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    styles = {"mean": ("0.5", "-"), "median": ("C0", "--"), "geometric_median": ("C1", "--")}
    for rule, curve in curves.items():
        base = rule.removeprefix("ctma(").removesuffix(")")
        colour, dashes = styles[base]
        axes.plot(
            range(1, len(curve) + 1),
            curve,
            color=colour,
            linestyle="-" if rule != base else dashes,
            label=rule,
            linewidth=2,
        )
    axes.set(
        xlabel="round",
        ylabel="test accuracy",
        ylim=(0, 1),
        title=f"Digits, {WORKERS} workers, {BYZANTINE} of them send {-STRENGTH:g} x the honest mean",
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="center right")
    figure.savefig(path, dpi=120)
