"""The demonstration: real data, 17 workers of which 8 attack, and which rules survive.

A softmax model with hand-written gradients learns scikit-learn's handwritten digits. In every round the 9 honest
workers send their momentum, and the 8 attackers, who see those, all send minus ten times their mean.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.text import Text
from safetensors.numpy import load_file, save_file

import robustkern as rk
from robustkern.cli.console import bar, command, print_json, print_table
from robustkern.cli.options import Json, folder_to_write
from robustkern.cli.report import facts, print_workers
from robustkern.files import Weights, aggregate_files, find_workers
from robustkern.measure import style
from robustkern.measure.peers import naive_rules
from robustkern.training.data import carried_digits

__all__ = ["demo"]

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
    all_images, all_labels = carried_digits()
    order = np.random.default_rng(seed).permutation(len(all_labels))
    images = (all_images.reshape(-1, 64) / 16).astype(np.float32)[order]
    labels = all_labels.astype(np.intp)[order]
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


@command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for updates, results and the picture.")] = Path("demo-output"),
    rounds: Annotated[int, typer.Option(min=1, help="Training rounds.")] = 60,
    seed: Annotated[int, typer.Option(min=0, help="Seed of data split and batches.")] = 0,
    as_json: Json = False,
) -> None:
    """Train with 17 workers of which 8 attack, and watch which rules survive."""
    folder_to_write(out, "demo")
    digits = load_digits(seed)
    merged = _one_round_through_files(out, digits, seed, as_json)
    curves = _train(digits, rounds, seed)
    speed = compare_speed()
    picture = out / "accuracy.png"
    _plot(curves, picture)
    if as_json:
        names = ("rule", "seconds", "numpy_seconds", "difference")
        timed = [dict(zip(names, row, strict=True)) for row in speed]
        print_json({"aggregate": merged, "accuracy": curves, "speed": timed, "picture": str(picture)})
        return
    print_table(
        f"after {rounds} rounds, {BYZANTINE} of {WORKERS} workers attack",
        ("rule", "test accuracy"),
        [
            (rule, Text(f"{curve[-1]:.1%}", style="green" if curve[-1] > 0.9 else "red"))
            for rule, curve in curves.items()
        ],
        numbers=("test accuracy",),
    )
    print_table(
        "n = 20, d = 1,000,000, float32, against plain NumPy in this run",
        ("rule", "robustkern", "NumPy", "ratio", "largest difference"),
        [
            (rule, f"{ours * 1e3:.1f} ms", f"{naive * 1e3:.0f} ms", f"{naive / ours:.0f} x", f"{difference:.1e}")
            for rule, ours, naive, difference in speed
        ],
        numbers=("robustkern", "NumPy", "ratio", "largest difference"),
    )
    print(f"picture: {picture}")


def _train(digits: Digits, rounds: int, seed: int) -> dict[str, list[float]]:
    """Train with each rule; return its accuracy after each round."""
    curves: dict[str, list[float]] = {}
    with bar("training", len(RULES) * rounds) as shown:
        for k, rule in enumerate(RULES):
            workers, model = Workers(digits, seed), new_model()
            curves[rule] = []
            for t in range(rounds):
                shown.show(k * rounds + t, rule)
                model = step(model, rk.aggregate(workers.updates(model), rule, f=BYZANTINE))
                curves[rule].append(accuracy(model, digits))
    return curves


def _one_round_through_files(out: Path, digits: Digits, seed: int, quiet: bool) -> dict[str, Any]:
    """Write one round's updates, merge them through the main job, and check it against the library call."""
    folder = out / "updates"
    folder.mkdir(exist_ok=True)
    updates = Workers(digits, seed).updates(new_model())
    files = [folder / f"worker-{i:02d}.safetensors" for i in range(len(updates))]
    for update, file in zip(updates, files, strict=True):
        save_file(update, file)
    merged = out / "merged.safetensors"
    rule = "ctma(geometric_median)"
    if not quiet:
        print(f"$ robustkern aggregate {folder} --rule '{rule}' --f {BYZANTINE} --out {merged}")
    pool, weighed = find_workers(files), Weights()
    started = time.perf_counter()
    info = aggregate_files(files, rule, out=merged, f=BYZANTINE)
    seconds = time.perf_counter() - started
    if not quiet:
        print_workers(info, pool, weighed, merged, seconds)
    want, got = rk.aggregate(updates, rule, f=BYZANTINE), load_file(merged)
    if any(not np.allclose(got[k], want[k], rtol=1e-6, atol=1e-7) for k in want):
        raise RuntimeError("the merged file differs from the library's result; please report this as a bug")
    return facts(info, pool, weighed, merged, seconds)


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


def _plot(curves: dict[str, list[float]], path: Path) -> None:
    figure = style.figure(9, 4.5)
    axes = figure.add_subplot()
    looks = style.looks(curves)
    for k, (rule, curve) in enumerate(curves.items()):
        every = max(len(curve) // 10, 1)
        axes.plot(range(1, len(curve) + 1), curve, **looks[rule], markevery=(k * every // len(curves), every))
    axes.set(
        xlabel="round",
        ylabel="test accuracy",
        ylim=(-0.03, 1),  # what learns nothing is seen too
        title=f"Digits, {WORKERS} workers, {BYZANTINE} of them send {-STRENGTH:g} x the honest mean",
    )
    axes.grid(alpha=0.3)
    style.name_ends(axes, [((len(curve), curve[-1]), rule, looks[rule]["color"]) for rule, curve in curves.items()])
    style.save(figure, path)
