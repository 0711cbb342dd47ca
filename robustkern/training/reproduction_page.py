"""The page about the papers' claims: tables, pictures, and verdicts that are computed from the runs."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from robustkern.measure import style
from robustkern.training.mechanism import Measure, thresholds
from robustkern.training.reproduce import (
    FAMILIES,
    FORMS,
    WORKERS,
    Grid,
    Mechanism,
    Part,
    Rates,
    Record,
    Turns,
    key_of,
    runs_of,
)
from robustkern.training.settings import Settings

__all__ = ["Claim", "Comparison", "Results", "claims", "compare", "write_page"]

PAGE, PICTURE = "reproduction.md", "reproduction-{}.png"
#: A difference counts from so many points of accuracy on, and from twice its standard error over the seeds.
LEAST = {"digits": 0.01, "mnist5k": 0.02}
NAMES = {"mu2sgd": "mu^2-SGD", "momentum": "momentum", "sgd": "SGD"}
#: Windows of rounds over which spreads are averaged.
WINDOWS = ((20, 40), (40, 80), (80, 160), (160, 320), (320, 640))
#: What mu^2-SGD's practical schedule leaves of the raw spread when it has stopped falling, and what momentum 0.9 does.
FLOOR, MOMENTUM = 0.005, 1 / 19
#: Ratios V / |m|^2 for the threshold chart, and the error that still counts as having rejected all attackers.
RATIOS = tuple(round(float(r), 4) for r in np.geomspace(0.02, 4, 24))
REJECTED = 1e-3

Errors = dict[tuple[int, float], dict[str, list[float]]]


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
            f"better in {self.better}, worse in {self.worse} of {self.pairs}; {100 * self.mean:+.1f} points "
            f"({100 * self.least:+.1f} to {100 * self.most:+.1f})"
        )


def compare(pairs: Iterable[tuple[list[float], list[float]]], least: float) -> Comparison:
    """Compare accuracies over the same seeds, pair by pair.

    A difference is clear where its mean is at least `least` and at least twice its standard error.
    """
    better = worse = same = 0
    means = []
    for first, second in pairs:
        differences = [a - b for a, b in zip(first, second, strict=True)]
        mean = statistics.fmean(differences)
        error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
        means.append(mean)
        if abs(mean) < max(least, 2 * error):
            same += 1
        elif mean > 0:
            better += 1
        else:
            worse += 1
    if not means:
        return Comparison(0, 0, 0, float("nan"), float("nan"), float("nan"))
    return Comparison(better, worse, same, statistics.fmean(means), min(means), max(means))


class Results:
    """The runs of a folder, by what was run."""

    def __init__(self, records: Iterable[Record]) -> None:
        self._found = {key_of(record["settings"], "measures" in record): record for record in records}

    def records(self, part: Part, kind: Settings) -> list[Record]:
        """Return a kind's runs, seed by seed."""
        kinds = (replace(kind, seed=seed) for seed in range(part.seeds))
        return [self._found[key_of(each.as_dict(), part.measured)] for each in kinds]

    def of(self, part: Part, kind: Settings) -> list[float]:
        """Return the accuracies of all seeds."""
        return [record["accuracy"] for record in self.records(part, kind)]

    def mean(self, part: Part, kind: Settings) -> float:
        """Return their mean."""
        return statistics.fmean(self.of(part, kind))


def _cell(values: list[float], bold: bool = False) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    text = f"{100 * statistics.fmean(values):.1f} ± {100 * spread:.1f}"
    return f"**{text}**" if bold else text


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)


def _delta(byzantine: int) -> str:
    return f"{byzantine / WORKERS:.2f}"


# ---- verdicts --------------------------------------------------------------------------------------------------


class Claim(NamedTuple):
    """A claim, where it was looked at, what became of it there, and by how much."""

    text: str
    where: str
    family: str  # of attacks; "" where that does not matter
    verdict: str
    by: str


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


def _families(part: Part) -> Iterator[tuple[str, list[str]]]:
    for family, attacks in FAMILIES.items():
        some = [attack for attack in part.attacks if attack in attacks]
        if some:
            yield family, some


def claims(parts: Sequence[Part], records: Iterable[Record], times: list[Record]) -> list[Claim]:
    """Return what became of the papers' claims."""
    results = Results(records)
    found: list[Claim] = []
    for part in parts:
        if isinstance(part, Mechanism):
            found += _mechanism_claims(part, results)
        elif isinstance(part, Grid):
            for b in part.byzantine:
                found += _grid_claims(part, results, b)
        elif isinstance(part, Rates):
            found += _rates_claims(part, results)
        elif isinstance(part, Turns):
            found += _turns_claims(part, results)
    return found + _cost_claims(times)


def _grid_claims(part: Grid, results: Results, b: int) -> Iterator[Claim]:
    where, forms, least = f"{part.base.data}, delta = {_delta(b)}", part.forms(b), LEAST[part.base.data]
    for family, attacks in _families(part):

        def forms_compared(first: str, second: str, attacks: list[str] = attacks) -> Comparison:
            every = itertools.product(attacks, part.optimizers, part.bases)
            return compare(
                [
                    (
                        results.of(part, part.at(b, attack, forms[first].format(base), optimizer)),
                        results.of(part, part.at(b, attack, forms[second].format(base), optimizer)),
                    )
                    for attack, optimizer, base in every
                ],
                least,
            )

        c = forms_compared("+CTMA", "alone")
        yield Claim("CTMA lifts its base rule", where, family, _verdict(c), str(c))
        for first, second in (
            ("+CTMA", "+NNM"), ("+CTMA", "+bucketing"), ("NNM+CTMA", "+NNM"), ("NNM+CTMA", "+CTMA"),
        ):  # fmt: skip
            if second in forms:
                c = forms_compared(first, second)
                text = f"{first.replace('+C', 'C', first.startswith('+'))} is at least as good as {second[1:]}"
                yield Claim(text.replace("NNM+CTMA", "NNM then CTMA"), where, family, _no_worse(c), str(c))
        if {"mu2sgd", "momentum"} <= set(part.optimizers):
            rules = [form.format(base) for base in part.bases for form in forms.values()]
            c = compare(
                [
                    (
                        results.of(part, part.at(b, attack, rule, "mu2sgd")),
                        results.of(part, part.at(b, attack, rule, "momentum")),
                    )
                    for attack in attacks
                    for rule in rules
                ],
                least,
            )
            yield Claim("mu^2-SGD beats momentum at the same rate", where, family, _verdict(c), str(c))


def _rates_claims(part: Rates, results: Results) -> Iterator[Claim]:
    least, where = LEAST[part.base.data], f"{part.base.data}, delta = {_delta(part.base.byzantine)}"
    for family, attacks in _families(part):
        for other in (o for o in part.optimizers if o != "mu2sgd"):
            c = compare(
                [(_at_best(part, results, a, "mu2sgd"), _at_best(part, results, a, other)) for a in attacks], least
            )
            text = f"mu^2-SGD beats {NAMES[other]}, each at its best rate"
            yield Claim(text, where, family, _verdict(c), str(c))
            counts = [[tolerant_rates(part, results, a, o) for o in ("mu2sgd", other)] for a in attacks]
            more, fewer = (sum(sign * (a - b) > 0 for a, b in counts) for sign in (1, -1))
            verdict = _verdict(Comparison(more, fewer, len(counts) - more - fewer, 0.0, 0.0, 0.0))
            said = "; ".join(f"{attack}: {a} against {b}" for attack, (a, b) in zip(attacks, counts, strict=True))
            yield Claim(
                f"mu^2-SGD needs less tuning than {NAMES[other]} (rates within 5 points of the best of all)",
                where, family, verdict, f"{said} of {len(part.rates)} rates",
            )  # fmt: skip


def _at_best(part: Rates, results: Results, attack: str, optimizer: str) -> list[float]:
    """Accuracies at the learning rate of the best mean."""
    best = max(part.rates, key=lambda lr: results.mean(part, part.at(attack, optimizer, lr)))
    return results.of(part, part.at(attack, optimizer, best))


def tolerant_rates(part: Rates, results: Results, attack: str, optimizer: str, points: float = 0.05) -> int:
    """Count the learning rates that come within so many points of the best that any optimizer reaches there."""
    best = max(results.mean(part, part.at(attack, o, lr)) for o in part.optimizers for lr in part.rates)
    return sum(results.mean(part, part.at(attack, optimizer, lr)) >= best - points for lr in part.rates)


def _turns_claims(part: Turns, results: Results) -> Iterator[Claim]:
    least, where = LEAST[part.base.data], f"{part.base.data}, lambda = {part.base.byzantine_share:g}"

    def pairs(attacks: list[str], rules: dict[str, str], weights: tuple[str, str]) -> Comparison:
        return compare(
            [
                (
                    results.of(part, part.at(attack, optimizer, both[0], weights[0])),
                    results.of(part, part.at(attack, optimizer, both[1], weights[1])),
                )
                for attack in attacks
                for optimizer in part.optimizers
                for both in rules.items()
            ],
            least,
        )

    for family, attacks in _families(part):
        c = pairs(attacks, {rule: rule for rule in part.rules}, ("updates", "equal"))
        yield Claim("Weights beat no weights", where, family, _verdict(c), str(c))
        lifted = {f"ctma({rule})": rule for rule in part.rules if f"ctma({rule})" in part.rules}
        c = pairs(attacks, lifted, ("updates", "updates"))
        yield Claim("Weighted CTMA lifts its weighted base rule", where, family, _verdict(c), str(c))
        for other in (o for o in part.optimizers if o != "mu2sgd"):
            c = compare(
                [
                    (
                        results.of(part, part.at(attack, "mu2sgd", rule, "updates")),
                        results.of(part, part.at(attack, other, rule, "updates")),
                    )
                    for attack in attacks
                    for rule in part.rules
                ],
                least,
            )
            yield Claim(f"mu^2-SGD beats {NAMES[other]} (weighted rules)", where, family, _verdict(c), str(c))


def _cost_claims(times: list[Record]) -> list[Claim]:
    spent = {entry["d"]: (entry["rules"]["ctma(median)"], entry["rules"]["nnm | median"]) for entry in times}
    cheaper = [d for d, (ctma, nnm) in spent.items() if ctma[0] < nnm[0] and ctma[1] < nnm[1]]
    verdict = "held" if len(cheaper) == len(spent) else "mixed" if cheaper else "did not hold"
    by = "; ".join(
        f"d = {d:,}: {_ms(ctma[0])} against {_ms(nnm[0])} ms, in plain NumPy {_ms(ctma[1])} against {_ms(nnm[1])} ms"
        for d, (ctma, nnm) in spent.items()
    )
    return [Claim("CTMA costs less than NNM (over the median)", "time of a call", "", verdict, by)]


# ---- the mechanism ---------------------------------------------------------------------------------------------


def _windows(part: Mechanism, results: Results, split: str, optimizer: str) -> list[tuple[int, int, float]]:
    """Return for each window of rounds, of those there are, V over the raw V: means over rounds and seeds."""
    measures = [m for record in results.records(part, part.at(split, optimizer)) for m in record["measures"]]
    found = []
    for first, last in WINDOWS:
        some = [m for m in measures if first < m["round"] <= last]
        if last <= part.base.rounds and some:
            found.append((first, last, sum(m["spread"] for m in some) / sum(m["raw"] for m in some)))
    return found


def _expected(first: int, last: int, optimizer: str) -> float:
    if optimizer == "momentum":
        return MOMENTUM
    return statistics.fmean(max(1 / t, FLOOR) for t in range(first + 1, last + 1))


def _mechanism_claims(part: Mechanism, results: Results) -> Iterator[Claim]:
    attack, data = part.attacks[0], part.base.data
    where = f"{data}, delta = {_delta(part.base.byzantine)}, {attack}"
    measures = [m for kind in part.kinds() for record in results.records(part, kind) for m in record["measures"]]
    closest = max(m["error"] / m["bound"] for m in measures)
    yield Claim(
        "The error never exceeds the theorem's bound", where, "", "held" if closest <= 1 else "did not hold",
        f"{len(measures)} rounds, both splits; at most {closest:.2f} of the bound",
    )  # fmt: skip
    for optimizer, factor, law in (("mu2sgd", 2, f"max(1/t, {FLOOR:g})"), ("momentum", 1.5, "1/19")):
        ratios = [(w[2], _expected(w[0], w[1], optimizer)) for w in _windows(part, results, "iid", optimizer)]
        held = all(max(a / b, b / a) <= factor for a, b in ratios)
        yield Claim(
            f"{NAMES[optimizer]}'s V over the raw V is {law}, within {factor:g} x", f"{where}, iid", "",
            "not tested" if not ratios else "held" if held else "did not hold",
            "; ".join(
                f"rounds {w[0] + 1} to {w[1]}: {a:.4f} ({b:.4f})"
                for w, (a, b) in zip(_windows(part, results, "iid", optimizer), ratios, strict=True)
            ),
        )  # fmt: skip


def _rejects(errors: list[float]) -> str:
    """Say between which ratios a rule stops to reject all attackers."""
    good = [k for k, error in enumerate(errors) if error > REJECTED]
    if not good:
        return f"above {RATIOS[-1]:g}"
    return "never quite" if good[0] == 0 else f"{RATIOS[good[0] - 1]:.2g} to {RATIOS[good[0]]:.2g}"


def _why(part: Mechanism, results: Results, errors: Errors, size: int) -> list[str]:
    """Return the paragraphs that explain."""
    rule, attack = part.base.rule, part.attacks[0]
    epsilon = 0.1
    limit = _rejects(errors[part.base.byzantine, epsilon][rule])

    def told(split: str, optimizer: str) -> list[str]:
        records = results.records(part, part.at(split, optimizer))
        late = [m for record in records for m in record["measures"] if m["round"] > part.base.rounds / 2]
        ratios = _smooth(_means(records, "spread", "square"))
        kept = _smooth(_means(records, "kept"), 9)
        return [
            f"{sum(m['spread'] for m in late) / sum(m['raw'] for m in late):.4f}",
            f"{min(ratios):.2f}",
            f"{min(kept):.1f}",
            f"{100 * statistics.fmean(record['accuracy'] for record in records):.1f}",
        ]

    shard = size / WORKERS
    rows = [[split, NAMES[o], *told(split, o)] for split, o in itertools.product(part.splits, part.optimizers)]
    return [
        f"All that a rule has to go by is how the honest vectors spread (V, the mean of their squared distances to "
        f"their mean m) beside how far away attackers stay, which for IPM goes with |m|. With {part.base.byzantine} of "
        f"{WORKERS} attackers and `{attack}`, `{rule}` rejects all of them while V / |m|^2 is small, and takes nearly "
        f"all of them in where it is not: its threshold lies at {limit} (table below).",
        "Momentum shrinks V to a fixed share, 1/19, of what single gradients have. mu^2-SGD shrinks it more with every "
        "round, gets below the threshold while m is still large, rejects the attackers there and trains; when training "
        "is nearly done m gets small, the ratio rises again, and little is left to spoil.",
        f"That needs workers that draw from the same data. Where each owns a shard of {shard:.0f} images, the means of "
        f"shards differ for good, and V cannot fall below batch / shard = {part.base.batch / shard:.3f} of the raw V, "
        f"about what momentum reaches anyway: then mu^2-SGD cannot show what it is for.",
        f"![Spread, ratio and attackers kept, over the rounds]({PICTURE.format('mechanism')})",
        f"V over raw V in the second half of the rounds; the least V / |m|^2 and the fewest attackers kept (smoothed "
        f"as in the figure) at any time; accuracy in the end. Means of {part.seeds} seeds.",
        _table(["draws", "optimizer", "V / raw V", "least V / abs(m)^2", "fewest attackers kept", "accuracy, %"], rows),
        f"![Error of rules over V / |m|^2]({PICTURE.format('thresholds')})",
        "Where rules stop to reject all attackers of IPM, as V / |m|^2 grows (m with normal noise, no training). "
        "Below, the error is 0 but for rounding; above, with 8 of 17, it is about that of following the attackers. "
        "The anchor is what gets captured. Median and geometric median by themselves follow the attackers a little at "
        "any ratio. The theorem's bound holds throughout: above the threshold it exceeds |m|^2 and promises no "
        "descent.",
        _table(
            ["rule", *(f"{b} of {WORKERS}, epsilon {e:g}" for b, e in errors)],
            [[rule, *(_rejects(found[rule]) for found in errors.values())] for rule in next(iter(errors.values()))],
        ),
    ]


# ---- tables ----------------------------------------------------------------------------------------------------


def _claims_table(found: list[Claim]) -> str:
    """Return a table with a column for each family of attacks."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for claim in found:
        rows.setdefault((claim.text, claim.where), {})[claim.family] = f"**{claim.verdict}**: {claim.by}"
    order = list(dict.fromkeys(text for text, _ in rows))
    return _table(
        ["claim", "where", *FAMILIES],
        [
            [text, where, *(rows[text, where].get(family, "") for family in FAMILIES)]
            for text, where in sorted(rows, key=lambda row: order.index(row[0]))
        ],
    )


def _grid(part: Grid, results: Results, b: int, optimizer: str) -> str:
    rows = []
    for base in part.bases:
        forms = part.forms(b).items()
        found = {
            name: [results.of(part, part.at(b, attack, form.format(base), optimizer)) for attack in part.attacks]
            for name, form in forms
        }
        best = [max(statistics.fmean(cells[k]) for cells in found.values()) for k in range(len(part.attacks))]
        for name, cells in found.items():
            bold = [statistics.fmean(values) >= top for values, top in zip(cells, best, strict=True)]
            rows.append([base, name, *(_cell(v, it) for v, it in zip(cells, bold, strict=True))])
    return _table(["base", "form", *part.attacks], rows)


def _rates(part: Rates, results: Results) -> str:
    return _table(
        ["attack", "optimizer", *(f"{lr:g}" for lr in part.rates)],
        [
            [attack, NAMES[o], *(_cell(results.of(part, part.at(attack, o, lr))) for lr in part.rates)]
            for attack in part.attacks
            for o in part.optimizers
        ],
    )


def _turns(part: Turns, results: Results, optimizer: str) -> str:
    return _table(
        ["rule", "weights", *part.attacks],
        [
            [rule, weights, *(_cell(results.of(part, part.at(a, optimizer, rule, weights))) for a in part.attacks)]
            for rule in part.rules
            for weights in ("equal", "updates")
        ],
    )


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
    head = ["model", "gradients, ms", "rule", "ours, ms", "plain NumPy, ms", "ratio"]
    return _table([*head, "share of a round, ours", "share, naive"], rows)


# ---- pictures --------------------------------------------------------------------------------------------------


def _means(records: list[Record], top: str, bottom: str = "") -> list[float]:
    """Return for each measured round the mean over seeds of one measure, or of the ratio of two."""
    runs: list[list[Measure]] = [record["measures"] for record in records]
    return [
        statistics.fmean(run[k][top] / (run[k][bottom] if bottom else 1) for run in runs)
        for k in range(min(map(len, runs)))
    ]


def _smooth(values: list[float], width: int = 5) -> list[float]:
    """Return running means."""
    padded = np.pad(values, width // 2, mode="edge")
    return [float(v) for v in np.convolve(padded, np.ones(width) / width, "valid")]


def _draw_mechanism(part: Mechanism, results: Results, errors: Errors, size: int, path: Path) -> None:
    looks = style.looks(NAMES)
    figure = style.figure(13, 3.6 * len(part.splits) + 0.4)
    grid = figure.subplots(len(part.splits), 3, sharex=True, sharey="col", squeeze=False)
    good = [k for k, e in enumerate(errors[part.base.byzantine, 0.1][part.base.rule]) if e <= REJECTED]
    threshold = RATIOS[good[-1]] if good else None
    kept = f"attackers of {WORKERS - part.base.byzantine} kept"
    grey = {"color": "0.4", "linewidth": 0.9}
    named_ends: list[tuple[Any, list[Any]]] = []
    for row, split in zip(grid, part.splits, strict=True):
        ends: list[list[Any]] = [[], [], []]
        for axes, title in zip(row, ("V / raw V", "V / |m|²", kept), strict=True):
            axes.set_title(f"{title}; {'all draw from all data' if split == 'iid' else split}", fontsize=10)
            axes.grid(alpha=0.3)
        for axes in row[:2]:
            axes.set_yscale("log")
        for o in part.optimizers:
            records = results.records(part, part.at(split, o))
            rounds = [m["round"] for m in records[0]["measures"]]
            look = {k: v for k, v in looks[o].items() if k in ("color", "linestyle")} | {"linewidth": 1.6}
            named = f"{NAMES[o]}: {100 * results.mean(part, part.at(split, o)):.0f} % right"
            for k, (top, bottom) in enumerate((("spread", "raw"), ("spread", "square"), ("kept", ""))):
                shown = _smooth(_means(records, top, bottom), 5 if bottom else 9)
                row[k].plot(rounds, shown, **look)
                ends[k].append(((rounds[-1], shown[-1]), named if k == 2 else NAMES[o], looks[o]["color"]))
        t = np.arange(1, part.base.rounds + 1)
        row[0].plot(t, np.maximum(1 / t, FLOOR), linestyle=":", **grey)
        row[0].axhline(MOMENTUM, linestyle="--", **grey)
        ends[0].append(((t[-1], FLOOR), f"max(1/t, {FLOOR:g})", "#666666"))
        ends[0].append(((t[-1], MOMENTUM), "1/19", "#666666"))
        if split == "shards":
            floor = part.base.batch * WORKERS / size
            row[0].axhline(floor, linestyle="-.", **grey)
            ends[0].append(((t[-1], floor), f"batch / shard = {floor:.3f}", "#666666"))
        if threshold is not None:
            row[1].set_ylim(bottom=threshold / 3)
            row[1].axhspan(threshold / 3, threshold, color="0.5", alpha=0.15, linewidth=0)
            row[1].text(0, threshold * 0.95, "all attackers are rejected here", fontsize=8, va="top")
        named_ends += zip(row, ends, strict=True)
    for axes in grid[-1]:
        axes.set_xlabel("round")
    figure.draw_without_rendering()
    for axes, each in named_ends:
        style.name_ends(axes, each, fontsize=7, laid_out=True)
    style.save(figure, path)


def _draw_thresholds(errors: Errors, path: Path) -> None:
    figure = style.figure(13, 3.8)
    looks = style.looks(next(iter(errors.values())))
    for k, (axes, ((b, epsilon), found)) in enumerate(
        zip(figure.subplots(1, len(errors), sharey=True, squeeze=False)[0], errors.items(), strict=True)
    ):
        ends = []
        for rule, values in found.items():
            shown = [max(value, 1e-4) for value in values]
            axes.plot(RATIOS, shown, **looks[rule] | {"markersize": 3.5})
            ends.append(((RATIOS[-1], shown[-1]), rule, looks[rule]["color"]))
        axes.set(xscale="log", yscale="log", xlabel="V / |m|²")
        axes.set_title(f"{b} of {WORKERS}, epsilon {epsilon:g}", fontsize=10)
        axes.grid(alpha=0.3)
        if k == 0:
            axes.set_ylabel("|result - m|² / |m|²\n(1e-4: or less)")
        if k == len(errors) - 1:
            style.name_ends(axes, ends)
    style.save(figure, path)


def _draw_grid(part: Grid, results: Results, family: str, attacks: list[str], path: Path) -> None:
    names = [f"{base} {name}" if name != "alone" else base for base in part.bases for name in FORMS]
    rules = [(name, form.format(base)) for base in part.bases for name, form in FORMS.items()]
    columns = list(itertools.product(part.byzantine, part.optimizers, attacks))
    values = [
        [
            100 * results.mean(part, part.at(b, attack, rule, o)) if name in part.forms(b) else math.nan
            for b, o, attack in columns
        ]
        for name, rule in rules
    ]
    figure = style.figure(3.4 + 1.05 * len(columns), 2.2 + 0.36 * len(names))
    axes = figure.add_subplot()
    image = axes.imshow(values, vmin=0, vmax=100, cmap="cividis", aspect="auto")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            said = "none" if math.isnan(value) else f"{value:.0f}"  # buckets of one row are no bucketing
            colour = "0.6" if math.isnan(value) else "w" if value < 55 else "k"
            axes.text(j, i, said, ha="center", va="center", fontsize=8, color=colour)
    labels = [f"{attack}\n{NAMES[o]}\ndelta {_delta(b)}" for b, o, attack in columns]
    axes.set_xticks(range(len(columns)), labels, rotation=45, ha="right", rotation_mode="anchor", fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_title(f"{part.base.data}: {family}", fontsize=10)
    for border in range(len(FORMS), len(names), len(FORMS)):
        axes.axhline(border - 0.5, color="w", linewidth=2)
    for border in range(len(attacks), len(columns), len(attacks)):
        axes.axvline(border - 0.5, color="w", linewidth=2)
    figure.colorbar(image, ax=axes, label="test accuracy, %")
    style.save(figure, path)


def _draw_rates(part: Rates, results: Results, path: Path) -> None:
    looks = style.looks(NAMES)
    figure = style.figure(2.6 * len(part.attacks) + 1.6, 3.2)
    row = figure.subplots(1, len(part.attacks), sharex=True, sharey=True, squeeze=False)[0]
    for column, (axes, attack) in enumerate(zip(row, part.attacks, strict=True)):
        ends = []
        for o in part.optimizers:
            seeds = [results.of(part, part.at(attack, o, lr)) for lr in part.rates]
            means = [100 * statistics.fmean(s) for s in seeds]
            spread = [100 * statistics.stdev(s) if len(s) > 1 else 0.0 for s in seeds]
            low, high = ([m + sign * d for m, d in zip(means, spread, strict=True)] for sign in (-1, 1))
            axes.fill_between(part.rates, low, high, color=looks[o]["color"], alpha=0.15, linewidth=0)
            axes.plot(part.rates, means, **looks[o])
            ends.append(((part.rates[-1], means[-1]), NAMES[o], looks[o]["color"]))
        axes.set(xscale="log", ylim=(0, 100), xlabel="learning rate")
        axes.set_title(attack, fontsize=9)
        style.plain_ticks(axes)
        axes.set_xticks(part.rates, [f"{lr:g}" for lr in part.rates], fontsize=7)
        if column == 0:
            axes.set_ylabel(f"{part.base.data}: test accuracy, %")
        if column == len(part.attacks) - 1:
            style.name_ends(axes, ends)
    style.save(figure, path)


# ---- the page --------------------------------------------------------------------------------------------------


def write_page(
    parts: Sequence[Part], records: list[Record], times: list[Record], facts: dict[str, Any], out: Path
) -> list[Path]:
    """Write the page and its pictures into a folder.

    Parameters
    ----------
    parts : sequence of Part
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
    results, sections, pictures = Results(records), [], []
    errors = thresholds(RATIOS)

    def picture(name: str) -> Path:
        pictures.append(out / PICTURE.format(name))
        return pictures[-1]

    for part in parts:
        if isinstance(part, Mechanism):
            size = facts["samples"][part.base.data]
            _draw_mechanism(part, results, errors, size, picture("mechanism"))
            _draw_thresholds(errors, picture("thresholds"))
            sections.append("\n\n".join(["## Why", *_why(part, results, errors, size)]))
        elif isinstance(part, Grid):
            sections.append(f"## Rules: {part.base.data}\n\n{_described(part)}")
            for family, attacks in _families(part):
                path = picture(f"{part.name}-{family.lower()}")
                _draw_grid(part, results, family, attacks, path)
                sections.append(f"![{part.base.data}, {family}]({path.name})")
            for b, o in itertools.product(part.byzantine, part.optimizers):
                title = f"### {part.base.data}, {NAMES[o]}, delta = {_delta(b)}"
                sections.append(f"{title}\n\nBold: the best form of its base rule.\n\n{_grid(part, results, b, o)}")
        elif isinstance(part, Rates):
            path = picture(part.name)
            _draw_rates(part, results, path)
            sections.append(
                f"## Learning rates: {part.base.data}, `{part.base.rule}`\n\n{_described(part)}\n\n"
                f"![Accuracy over learning rates]({path.name})\n\n{_rates(part, results)}"
            )
        elif isinstance(part, Turns):
            tables = [f"### {NAMES[o]}\n\n{_turns(part, results, o)}" for o in part.optimizers]
            sections.append("\n\n".join([f"## Asynchronous training\n\n{_described(part)}", _ABOUT_TURNS, *tables]))
    page = _page(parts, records, times, facts, sections)
    (out / PAGE).write_text(page)
    return [out / PAGE, *pictures]


_ABOUT_TURNS = (
    "One worker at a time takes its turn: honest ones in proportion to the squares of their ids, so that some know "
    "much and others little; attackers take the share lambda of the turns. `equal` counts each worker as one vector, "
    "of which 8 of 17 may be Byzantine; `updates` weighs it by the number of its updates, of which the attackers' "
    "share is that of their turns and first vectors (from 0.47 down to lambda). ALIE and IPM are weighted too."
)


def _described(part: Part) -> str:
    base = part.base
    draws = {"iid": "every worker draws from all data", "shards": "each worker owns a shard"}.get(
        base.split, base.split
    )
    if isinstance(part, Mechanism):
        draws = " or ".join(part.splits)
    clip = f"gradients clipped to norm {base.clip:g}" if base.clip else "gradients not clipped"
    kind = f"{base.rounds} {'rounds' if base.arrivals == 'together' else 'turns'}"
    return (
        f"Data `{base.data}`, model `{base.model}`, batch {base.batch}, {clip}, {kind}, {part.seeds} seeds; {draws}"
        + (f"; learning rate {base.lr:g}" if not isinstance(part, Rates) else "")
        + (f"; beta {base.beta:g}, gamma {base.gamma:g}" if base.beta is not None and base.gamma is not None else "")
        + "."
    )


def _page(
    parts: Sequence[Part], records: list[Record], times: list[Record], facts: dict[str, Any], sections: list[str]
) -> str:
    wanted = runs_of(parts)
    shown = [record for record in records if key_of(record["settings"], "measures" in record) in wanted]
    failed = [record for record in shown if record["failed"]]
    spent = sum(record["seconds"]["total"] for record in shown)
    sessions = facts["sessions"]
    minutes, made = sum(s["seconds"] for s in sessions) / 60, sum(s["made"] for s in sessions)
    rest = " (that of the others was lost when they were stopped)" if made < len(shown) else ""
    shards = "; ".join(
        f"{data}: {size} images, so shards of {size / WORKERS:.0f} and a floor of batch / shard = "
        f"{4 * WORKERS / size:.3f} of the raw spread"
        for data, size in facts["samples"].items()
    )
    found = claims(parts, records, times)
    hard = [claim for claim in found if not claim.family]
    texts: list[str] = [
        "# The papers' claims, run here",
        "Written by `robustkern reproduce` from its runs, verdicts included: nothing here is edited by hand.\n"
        'The papers: Dahan and Levy, "Fault Tolerant ML: Efficient Meta-Aggregation and Synchronous Training", ICML '
        '2024; "Weight for Robustness: A Comprehensive Approach towards Optimal Fault-Tolerant Asynchronous ML", '
        "NeurIPS 2024.",
        "## What was run",
        f"{len(shown)} trainings of {WORKERS} workers: parts {', '.join(part.name for part in parts)}, described "
        f"where they stand. Data: scikit-learn's digits; `mnist5k`, 4,000 real images of MNIST to train on and 1,000 "
        f"to test, with the network of the paper's authors. Momentum is 0.9; mu^2-SGD has the practical schedule. "
        f"**Workers draw every batch afresh from all training data, as the theory has it (`--split iid`)**; shards of "
        f"their own are shown under Why ({shards}). Accuracy is the mean of three tests in the last tenth of the "
        f"rounds; tables give mean and standard deviation over the seeds, in percent.",
        f"Machine: {facts['cores']} cores, {facts['machine']}, {facts['isa']}; Python {facts['python']}, torch "
        f"{facts['torch']}, NumPy {facts['numpy']}, robustkern {facts['robustkern']}. {made} trainings were made in "
        f"{minutes:.1f} minutes, {' and '.join(sorted({str(s['jobs']) for s in sessions}))} at a time{rest}; those of "
        f"this page took {spent / 60:.1f} minutes of one thread.",
        f"{len(failed)} trainings ended early, because more vectors held a NaN or Inf than the rule tolerates "
        f"(training had diverged); they count with the accuracy that they had then."
        if failed
        else "None of the trainings ended early.",
        f"**What this is not.** The papers train on all of MNIST and on CIFAR-10, for longer. Fewer images and rounds "
        f"show directions, not their figures. Rules are compared at one learning rate. The trimmed mean is left out: "
        f"of {WORKERS} rows with 8 attackers it is the median. Bucketing is the paper's only where {WORKERS} workers "
        f"give buckets of more than one row, so with 4 attackers.",
        "## Claims",
        "A pair is one attack, optimizer and base rule (or rule), over the same seeds. A difference is clear where "
        "it is at least 1 point of accuracy on digits, 2 on MNIST, and at least twice its standard error. `flips`: "
        "sign and label flips; `IPM`: epsilon 0.1 and 0.5 where both were run.",
        _claims_table([claim for claim in found if claim.family]),
        _table(["claim", "where", "here it", "by"], [[c.text, c.where, f"**{c.verdict}**", c.by] for c in hard]),
        *sections,
        "## Where the time goes",
        f"A round of {WORKERS} workers, 8 of them attackers, batch 4, mu^2-SGD (two gradients for each worker), on the "
        "threads that torch and the kernels use by themselves; medians, in this run. Shares are of gradients, update "
        "of momenta and rule.",
        _times(times),
        "The update of all momenta: "
        + "; ".join(
            f"d = {t['d']:,}: {_ms(t['momenta'])} ms, as a torch expression for each worker "
            f"{_ms(t['momenta_naive'])} ms ({t['momenta_naive'] / t['momenta']:.1f} x)"
            for t in times
        )
        + ".",
        "## Again",
        "    pip install '.[train,mnist]'\n"
        "    robustkern reproduce --out reproduction    # goes on where it was stopped\n"
        "    robustkern reproduce --part mechanism     # or any of the parts above\n"
        "    robustkern reproduce --quick              # a few minutes, supports no claim",
    ]
    return "\n\n".join(texts) + "\n"
