"""The page about the paper's claims: tables, pictures, and verdicts that are computed from the runs."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from robustkern.measure import style
from robustkern.training.reproduce import BASES, FORMS, WORKERS, Plan, Record

__all__ = ["Comparison", "Results", "claims", "compare", "write_page"]

PAGE, GRID_PICTURE, RATES_PICTURE = "reproduction.md", "reproduction-rules.png", "reproduction-rates.png"
#: A difference counts where it is at least a point of accuracy, and twice its standard error over the seeds.
LEAST = 0.01
NAMES = {"mu2sgd": "mu^2-SGD", "momentum": "momentum", "sgd": "SGD"}


class Comparison(NamedTuple):
    """Pairs of settings that differ in one thing: how often the first was better, worse, or neither."""

    better: int
    worse: int
    same: int
    mean: float  # of the differences in accuracy
    least: float
    most: float

    @property
    def pairs(self) -> int:
        """How many there are."""
        return self.better + self.worse + self.same

    def __str__(self) -> str:
        """Return the counts and the differences in points."""
        return (
            f"better in {self.better}, worse in {self.worse}, no clear difference in {self.same} of {self.pairs}; "
            f"on average {100 * self.mean:+.1f} points (from {100 * self.least:+.1f} to {100 * self.most:+.1f})"
        )


def compare(pairs: Iterable[tuple[list[float], list[float]]]) -> Comparison:
    """Compare accuracies over the same seeds, pair by pair.

    A difference is clear where its mean is at least a point and at least twice its standard error.
    """
    better = worse = same = 0
    means = []
    for first, second in pairs:
        differences = [a - b for a, b in zip(first, second, strict=True)]
        mean = statistics.fmean(differences)
        error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
        means.append(mean)
        if abs(mean) < max(LEAST, 2 * error):
            same += 1
        elif mean > 0:
            better += 1
        else:
            worse += 1
    if not means:
        return Comparison(0, 0, 0, float("nan"), float("nan"), float("nan"))
    return Comparison(better, worse, same, statistics.fmean(means), min(means), max(means))


class Results:
    """Accuracies of all seeds by what was run."""

    def __init__(self, plan: Plan, records: list[Record]) -> None:
        self.plan, self.records = plan, records
        self._found: dict[tuple[Any, ...], list[float]] = {}
        for record in records:
            s = record["settings"]
            key = (s["byzantine"], s["attack"], s["rule"], s["optimizer"], s["lr"])
            self._found.setdefault(key, []).append(record["accuracy"])

    def of(self, byzantine: int, attack: str, rule: str, optimizer: str, lr: float) -> list[float]:
        """Return the accuracies of all seeds."""
        return self._found[(byzantine, attack, rule, optimizer, lr)]

    def mean(self, *key: Any) -> float:
        """Return the mean over the seeds."""
        return statistics.fmean(self.of(*key))

    def pairs(
        self, first: str, second: str, bases: tuple[str, ...] = BASES[1:], byzantine: Iterable[int] | None = None
    ) -> list[tuple[list[float], list[float]]]:
        """Return accuracies of two forms, for each base rule, attack, share of attackers and optimizer of the grid."""
        plan = self.plan
        return [
            (
                self.of(b, attack, FORMS[first].format(base), optimizer, plan.lr),
                self.of(b, attack, FORMS[second].format(base), optimizer, plan.lr),
            )
            for b in (plan.byzantine if byzantine is None else byzantine)
            if first in plan.forms(b) and second in plan.forms(b)
            for optimizer in plan.grid_optimizers
            for attack in plan.attacks
            for base in bases
        ]

    def tolerant_rates(self, byzantine: int, attack: str, rule: str, optimizer: str, points: float) -> int:
        """Count the learning rates that come within so many points of the best that any optimizer reaches there."""
        best = max(self.mean(byzantine, attack, rule, o, lr) for o in self.plan.optimizers for lr in self.plan.rates)
        return sum(self.mean(byzantine, attack, rule, optimizer, lr) >= best - points for lr in self.plan.rates)


def _delta(byzantine: int) -> str:
    return f"{byzantine / WORKERS:.2f}"


def _cell(values: list[float], bold: bool = False) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    text = f"{100 * statistics.fmean(values):.1f} ± {100 * spread:.1f}"
    return f"**{text}**" if bold else text


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)


# ---- verdicts --------------------------------------------------------------------------------------------------


def _verdict(c: Comparison) -> str:
    """Say in a word what a comparison says about "the first is better"."""
    if c.pairs == 0:
        return "not tested"
    if 2 * c.better >= c.pairs and 10 * c.worse <= c.pairs:
        return "held"
    if 2 * c.worse >= c.pairs and 10 * c.better <= c.pairs:
        return "the opposite held"
    if 4 * (c.better + c.worse) < c.pairs:
        return "no clear difference"
    if c.better > 2 * c.worse:
        return "held in part"
    return "did not hold" if c.worse > 2 * c.better else "mixed"


def _no_worse(c: Comparison) -> str:
    """Say in a word what a comparison says about "the first is at least as good"."""
    if c.pairs == 0:
        return "not tested"
    if c.worse == 0:
        return "held"
    return "held mostly" if 4 * c.worse <= c.pairs else "mixed" if 2 * c.worse <= c.pairs else "did not hold"


def claims(plan: Plan, records: list[Record], times: list[Record]) -> list[list[str]]:
    """Return the paper's claims: each in words, what became of it here, and by how much; see `write_page`."""
    r = Results(plan, records)
    few, many = min(plan.byzantine), max(plan.byzantine)
    lifted = {b: compare(r.pairs("+CTMA", "alone", byzantine=[b])) for b in plan.byzantine}
    rows = [
        [
            f"CTMA lifts base aggregators (median, trimmed mean, geometric median), delta = {_delta(b)}",
            _verdict(c),
            str(c),
        ]
        for b, c in lifted.items()
    ]
    mean = compare(r.pairs("+CTMA", "alone", bases=("mean",)))
    rows.append(
        [
            "CTMA over the mean is no worse than the mean (the paper claims nothing: the mean is no robust anchor)",
            _no_worse(mean),
            str(mean),
        ]
    )
    for other in ("+NNM", "+bucketing"):
        c = compare(r.pairs("+CTMA", other))
        rows.append([f"CTMA is at least as good as {other[1:]}", _no_worse(c), str(c)])
    for other in ("+NNM", "+CTMA"):
        c = compare(r.pairs("NNM+CTMA", other))
        rows.append([f"NNM then CTMA is at least as good as {other[1:]} alone", _no_worse(c), str(c)])
    spent = {entry["d"]: (entry["rules"]["ctma(median)"], entry["rules"]["nnm | median"]) for entry in times}
    cheaper = [d for d, (ctma, nnm) in spent.items() if ctma[0] < nnm[0] and ctma[1] < nnm[1]]
    rows.append(
        [
            "CTMA costs less than NNM (over the median)",
            "held" if len(cheaper) == len(spent) else "mixed" if cheaper else "did not hold",
            "; ".join(
                f"d = {d:,}: {_ms(ctma[0])} against {_ms(nnm[0])} ms, in plain NumPy {_ms(ctma[1])} against "
                f"{_ms(nnm[1])} ms"
                for d, (ctma, nnm) in spent.items()
            ),
        ]
    )
    for other in (o for o in plan.grid_optimizers if o != "mu2sgd"):
        c = compare(
            (
                r.of(b, attack, form.format(base), "mu2sgd", plan.lr),
                r.of(b, attack, form.format(base), other, plan.lr),
            )
            for b in plan.byzantine
            for attack in plan.attacks
            for form in plan.forms(b).values()
            for base in BASES[1:]
        )
        rows.append(
            [
                f"mu^2-SGD beats {NAMES[other]} at the same learning rate ({plan.lr:g}), over all robust rules",
                _verdict(c),
                str(c),
            ]
        )
    for other in (o for o in plan.optimizers if o != "mu2sgd"):
        for b in plan.byzantine:
            c = compare(
                (_at_best(r, b, attack, rule, "mu2sgd"), _at_best(r, b, attack, rule, other))
                for attack in plan.attacks
                for rule in plan.rate_rules
            )
            rows.append(
                [
                    f"mu^2-SGD beats {NAMES[other]}, each at its best learning rate, delta = {_delta(b)}",
                    _verdict(c),
                    str(c),
                ]
            )
    counts = {
        o: [
            r.tolerant_rates(b, attack, rule, o, 0.05)
            for b in plan.byzantine
            for attack in plan.attacks
            for rule in plan.rate_rules
        ]
        for o in plan.optimizers
    }
    for other in (o for o in plan.optimizers if o != "mu2sgd"):
        pairs = list(zip(counts["mu2sgd"], counts[other], strict=True))
        more, fewer = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
        means = [statistics.fmean(counts[o]) for o in ("mu2sgd", other)]
        rows.append(
            [
                f"mu^2-SGD needs less tuning than {NAMES[other]}: more of the {len(plan.rates)} learning rates come "
                "within 5 points of the best accuracy that any optimizer reaches",
                _verdict(Comparison(more, fewer, len(pairs) - more - fewer, means[0] - means[1], 0.0, 0.0)),
                f"{means[0]:.1f} against {means[1]:.1f} rates on average; more in {more}, fewer in {fewer} of "
                f"{len(pairs)} attacks",
            ]
        )
    harder = compare(
        (r.of(few, attack, form.format(base), o, plan.lr), r.of(many, attack, form.format(base), o, plan.lr))
        for attack in plan.attacks
        for o in plan.grid_optimizers
        for name, form in plan.forms(many).items()
        if name in plan.forms(few)
        for base in BASES[1:]
    )
    rows.append(
        [f"Fewer attackers do less harm (delta = {_delta(few)} against {_delta(many)})", _verdict(harder), str(harder)]
    )
    return rows


def _at_best(r: Results, byzantine: int, attack: str, rule: str, optimizer: str) -> list[float]:
    """Accuracies at the learning rate of the best mean."""
    best = max(r.plan.rates, key=lambda lr: r.mean(byzantine, attack, rule, optimizer, lr))
    return r.of(byzantine, attack, rule, optimizer, best)


# ---- tables ----------------------------------------------------------------------------------------------------


def _grid(r: Results, byzantine: int, optimizer: str) -> str:
    rows = []
    for base in BASES:
        keys = list(r.plan.forms(byzantine).items())
        best = [
            max(r.mean(byzantine, attack, form.format(base), optimizer, r.plan.lr) for _, form in keys)
            for attack in r.plan.attacks
        ]
        for name, form in keys:
            rule = form.format(base)
            cells = [r.of(byzantine, attack, rule, optimizer, r.plan.lr) for attack in r.plan.attacks]
            bold = [statistics.fmean(values) >= top for values, top in zip(cells, best, strict=True)]
            rows.append([base, name, *(_cell(v, b) for v, b in zip(cells, bold, strict=True))])
    return _table(["base", "form", *r.plan.attacks], rows)


def _rates(r: Results, byzantine: int, attack: str, rule: str) -> list[list[str]]:
    return [
        [attack, NAMES[o], *(_cell(r.of(byzantine, attack, rule, o, lr)) for lr in r.plan.rates)]
        for o in r.plan.optimizers
    ]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


def _times(times: list[Record]) -> str:
    rows = []
    for entry in times:
        for rule, (ours, naive) in entry["rules"].items():
            update, plain = entry["momenta"], entry["momenta_naive"]
            rows.append(
                [
                    f"{entry['model']} (d = {entry['d']:,})",
                    _ms(entry["gradients"]),
                    rule,
                    _ms(ours),
                    _ms(naive),
                    f"{naive / ours:.0f}",
                    f"{100 * ours / (entry['gradients'] + update + ours):.1f} %",
                    f"{100 * naive / (entry['gradients'] + plain + naive):.0f} %",
                ]
            )
    return _table(
        [
            "model",
            "gradients, ms",
            "rule",
            "ours, ms",
            "plain NumPy, ms",
            "ratio",
            "share of a round, ours",
            "share, naive",
        ],
        rows,
    )


# ---- pictures --------------------------------------------------------------------------------------------------


def _draw_grid(r: Results, path: Path) -> None:
    plan = r.plan
    shown = [(b, o) for b in plan.byzantine for o in plan.grid_optimizers]
    labels = [f"{base} {name}" if name != "alone" else base for base in BASES for name in FORMS]
    figure = style.figure(3.4 * len(shown) + 2, 7.5)
    for k, (axes, (b, o)) in enumerate(zip(figure.subplots(1, len(shown), squeeze=False).flat, shown, strict=True)):
        values = [
            [
                100 * r.mean(b, attack, form.format(base), o, plan.lr) if name in plan.forms(b) else float("nan")
                for attack in plan.attacks
            ]
            for base in BASES
            for name, form in FORMS.items()
        ]
        image = axes.imshow(values, vmin=0, vmax=100, cmap="cividis", aspect="auto")
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                said = "none" if math.isnan(value) else f"{value:.0f}"  # buckets of one row are no bucketing
                colour = "0.6" if math.isnan(value) else "w" if value < 55 else "k"
                axes.text(j, i, said, ha="center", va="center", fontsize=8, color=colour)
        axes.set_xticks(range(len(plan.attacks)), plan.attacks, rotation=60, ha="right", fontsize=8)
        axes.set_yticks(range(len(labels)), labels if k == 0 else [], fontsize=8)
        axes.set_title(f"{NAMES[o]}, delta = {_delta(b)}", fontsize=10)
        for border in range(len(FORMS), len(labels), len(FORMS)):
            axes.axhline(border - 0.5, color="w", linewidth=2)
    figure.colorbar(image, ax=figure.axes, label="test accuracy, %", shrink=0.6)
    style.save(figure, path)


def _draw_rates(r: Results, path: Path) -> None:
    plan, rule = r.plan, r.plan.rate_rules[0]
    looks = style.looks(NAMES)
    figure = style.figure(2.6 * len(plan.attacks) + 1.6, 2.6 * len(plan.byzantine) + 0.6)
    grid = figure.subplots(len(plan.byzantine), len(plan.attacks), sharex=True, sharey=True, squeeze=False)
    for (row, b), (column, attack) in itertools.product(enumerate(plan.byzantine), enumerate(plan.attacks)):
        axes, ends = grid[row][column], []
        for o in plan.optimizers:
            seeds = [r.of(b, attack, rule, o, lr) for lr in plan.rates]
            means = [100 * statistics.fmean(s) for s in seeds]
            spread = [100 * statistics.stdev(s) if len(s) > 1 else 0.0 for s in seeds]
            low, high = ([m + sign * d for m, d in zip(means, spread, strict=True)] for sign in (-1, 1))
            axes.fill_between(plan.rates, low, high, color=looks[o]["color"], alpha=0.15, linewidth=0)
            axes.plot(plan.rates, means, **looks[o])
            ends.append(((plan.rates[-1], means[-1]), NAMES[o], looks[o]["color"]))
        axes.set(xscale="log", ylim=(0, 100))
        axes.set_title(f"{attack}, delta = {_delta(b)}", fontsize=9)
        style.plain_ticks(axes)
        if column == 0:
            axes.set_ylabel("test accuracy, %")
        if row == len(plan.byzantine) - 1:
            axes.set_xlabel("learning rate")
        if column == len(plan.attacks) - 1:
            style.name_ends(axes, ends)
    style.save(figure, path)


# ---- the page --------------------------------------------------------------------------------------------------


def write_page(plan: Plan, records: list[Record], times: list[Record], facts: dict[str, Any], out: Path) -> list[Path]:
    """Write the page and its pictures into a folder.

    Parameters
    ----------
    plan : Plan
        What was run.
    records, facts
        What `reproduce` returned.
    times : list of dict
        What `measure_times` returned.
    out : path
        Folder, which exists.

    Returns
    -------
    list of path
        The files.
    """
    r = Results(plan, records)
    _draw_grid(r, out / GRID_PICTURE)
    _draw_rates(r, out / RATES_PICTURE)
    (out / PAGE).write_text(_page(r, times, facts))
    return [out / PAGE, out / GRID_PICTURE, out / RATES_PICTURE]


def _page(r: Results, times: list[Record], facts: dict[str, Any]) -> str:
    plan = r.plan
    failed = [record for record in r.records if record["failed"]]
    spent = sum(record["seconds"]["total"] for record in r.records)
    peace = _table(
        ["optimizer", *(f"{lr:g}" for lr in plan.rates)],
        [[NAMES[o], *(_cell(r.of(0, "none", "mean", o, lr)) for lr in plan.rates)] for o in plan.optimizers],
    )
    sessions = facts["sessions"]
    minutes, made = sum(s["seconds"] for s in sessions) / 60, sum(s["made"] for s in sessions)
    parts: list[str] = [
        "# The paper's claims, run here",
        "Written by `robustkern reproduce` from its runs, verdicts included: nothing here is edited by hand.\n"
        'The paper: Dahan and Levy, "Fault Tolerant ML: Efficient Meta-Aggregation and Synchronous Training", ICML '
        "2024.",
        "## What was run",
        f"{len(r.records)} trainings: scikit-learn's digits (1400 images to train on, 397 to test), model "
        f"`{plan.model}`, "
        f"{WORKERS} workers with equal shares, batch 4 each, gradients clipped to norm 2, momentum 0.9, mu^2-SGD "
        f"with the practical schedule, {plan.rounds} rounds, {plan.seeds} seeds. Attackers: "
        f"{' and '.join(map(str, plan.byzantine))} of "
        f"{WORKERS} (delta = {' and '.join(_delta(b) for b in plan.byzantine)}). Accuracy is the mean of three tests "
        f"in the last tenth of the rounds; tables give mean and standard deviation over the seeds, in percent.",
        f"Machine: {facts['cores']} cores, {facts['machine']}, {facts['isa']}; Python {facts['python']}, torch "
        f"{facts['torch']}, NumPy {facts['numpy']}, robustkern {facts['robustkern']}. "
        f"{made} trainings were made in {minutes:.1f} minutes, "
        f"{' and '.join(sorted({str(s['jobs']) for s in sessions}))} at a "
        f"time; those of this page took {spent / 60:.1f} minutes of one thread.",
        f"{len(failed)} trainings ended early, because more vectors held a NaN or Inf than the rule tolerates "
        f"(training had diverged); they count with the accuracy that they had then."
        if failed
        else "None of the trainings ended early.",
        "**What this is not.** The paper trains convolutional networks on MNIST and CIFAR-10 for longer. Small "
        "models on small "
        "data show directions, not its figures. All workers draw from the same distribution, as in the paper's "
        "theory. The "
        f"rules are compared at one learning rate ({plan.lr:g}). Bucketing is the paper's only where {WORKERS} "
        f"workers give "
        f"buckets of more than one row, so with {min(plan.byzantine)} attackers. `mean` is there for comparison: no "
        f"theory says that anything built on it survives.",
        "## Claims",
        f"A pair is one base rule, attack, share of attackers and optimizer, with {plan.seeds} seeds. A difference "
        f"is clear where it is at "
        f"least {100 * LEAST:g} point of accuracy and at least twice its standard error over the seeds.",
        _table(["claim", "here it", "by how much"], claims(plan, r.records, times)),
        "## Rules",
        f"![Accuracy of all rules under all attacks]({GRID_PICTURE})",
    ]
    for b in plan.byzantine:
        for o in plan.grid_optimizers:
            parts += [
                f"### {NAMES[o]}, delta = {_delta(b)}, learning rate {plan.lr:g}",
                "Bold: the best form of its base rule.",
                _grid(r, b, o),
            ]
    parts += ["## Learning rates", f"![Accuracy over learning rates]({RATES_PICTURE})"]
    for rule in plan.rate_rules:
        for b in plan.byzantine:
            rows = [row for attack in plan.attacks for row in _rates(r, b, attack, rule)]
            parts += [
                f"### `{rule}`, delta = {_delta(b)}",
                _table(["attack", "optimizer", *(f"{lr:g}" for lr in plan.rates)], rows),
            ]
    parts += ["### Nobody attacks, `mean`", peace]
    parts += [
        "## Where the time goes",
        f"A round of {WORKERS} workers, 8 of them attackers, batch 4, mu^2-SGD (two gradients for each worker), on "
        f"the threads "
        "that torch and the kernels use by themselves; medians, in this run. Shares are of gradients, update of "
        "momenta and rule.",
        _times(times),
        "The update of all momenta: "
        + "; ".join(
            f"d = {t['d']:,}: {_ms(t['momenta'])} ms, as a torch expression for each worker "
            f"{_ms(t['momenta_naive'])} ms ({t['momenta_naive'] / t['momenta']:.1f} x)"
            for t in times
        )
        + ".",
        "## Again",
        "    pip install '.[train]'\n    robustkern reproduce --out reproduction    # goes on where it was stopped\n"
        "    robustkern reproduce --quick              # a few minutes, supports no claim",
    ]
    return "\n\n".join(parts) + "\n"
