"""Rules: plans over the four primitives, and what rules of one's own are made of.

A rule is a frozen dataclass derived from `Aggregator` or `Mixer`, made known by `register`; it sees a `View` of the
rows and returns a `Solution` or a `Mixture`. Rules import no array library but NumPy, and no backend.
"""

from __future__ import annotations

from robustkern.rules.base import Aggregator, Chain, Mixer, Rule, parse_rule, register
from robustkern.rules.clipping import ARC, CentredClipping, Clipping
from robustkern.rules.coordinate import MeanAroundMedian, Median, Phocas, TrimmedMean
from robustkern.rules.ctma import CTMA
from robustkern.rules.diameter import MDA
from robustkern.rules.filters import CAF, FABA, SMEA, Aksel, Spectral
from robustkern.rules.geometric_median import GeometricMedian
from robustkern.rules.geometry import Geometry, Reference
from robustkern.rules.krum import Bulyan, Krum, MultiKrum
from robustkern.rules.mean import Mean
from robustkern.rules.mixing import NNM, Bucketing
from robustkern.rules.nearest import CGE, Centre, Medoid, MoNNA
from robustkern.rules.text import available_rules, names_in, registered
from robustkern.rules.view import Mixture, Solution, View

__all__ = [
    "ARC",
    "CAF",
    "CGE",
    "CTMA",
    "FABA",
    "MDA",
    "NNM",
    "SMEA",
    "Aggregator",
    "Aksel",
    "Bucketing",
    "Bulyan",
    "Centre",
    "CentredClipping",
    "Chain",
    "Clipping",
    "GeometricMedian",
    "Geometry",
    "Krum",
    "Mean",
    "MeanAroundMedian",
    "Median",
    "Medoid",
    "Mixer",
    "Mixture",
    "MoNNA",
    "MultiKrum",
    "Phocas",
    "Reference",
    "Rule",
    "Solution",
    "Spectral",
    "TrimmedMean",
    "View",
    "available_rules",
    "names_in",
    "parse_rule",
    "register",
    "registered",
    "table",
]


def table() -> list[tuple[str, str, str, str, str]]:
    """Return what is known of each rule: form, what it is, reads of the data, weights, what its guarantee needs."""
    rules = sorted(registered().values(), key=lambda rule: (issubclass(rule, Mixer), rule.reads, rule.name))
    return [
        (rule.form or rule.name, rule.summary, rule.reads, "yes" if rule.supports_weights else "no", rule.needs)
        for rule in rules
    ]


def comparison() -> str:
    """Return docs/rules.md: all rules side by side, from what their classes say."""
    rules = [rule for rule in registered().values() if rule.advice]
    combining = sorted((rule for rule in rules if not issubclass(rule, Mixer)), key=lambda rule: rule.name)
    lines = [
        "# The rules compared",
        "",
        "Made by `python -m robustkern.rules`. n rows, up to f of them Byzantine; reads of the n x d data at most.",
        "The constant is kappa of (f, kappa)-robustness, `|result - m|^2 <= kappa * mean |x_i - m|^2` over any n-f",
        "rows with mean m, at n = 20. No rule can go below f/(n-2f), which is 0.06, 0.33 and 2 there. A dash: none is",
        "known to us, or the rule's condition is not met. An f that is too small is fatal, one too large costs little.",
        "",
        "| rule | needs | f = 1 | f = 4 | f = 8 | reads | weights | for what, and when not |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for rule in combining:
        made = _example(rule)
        constants = [made.kappa(20, f) if made.bound_met(20, f) else None for f in (1, 4, 8)]
        shown = " | ".join("-" if k is None else f"{k:.2f}" for k in constants)
        lines.append(
            f"| `{rule.form or rule.name}` | {rule.needs} | {shown} | {rule.reads} | "
            f"{'yes' if rule.supports_weights else 'no'} | {rule.advice} |"
        )
    lines += [
        "",
        "What is lifted or mixed first has the constants that follow from these:",
        "",
        "| chain | f = 1 | f = 4 | f = 8 |",
        "|---|---|---|---|",
    ]
    for text in ("ctma(median)", "ctma(geometric_median)", "nnm | median", "nnm | trimmed_mean", "nnm | krum"):
        chain = parse_rule(text)
        constants = [chain.kappa(20, f) if chain.bound_met(20, f) else None for f in (1, 4, 8)]
        shown = " | ".join("-" if k is None else f"{k:.2f}" for k in constants)
        lines.append(f"| `{text}` | {shown} |")
    lines += [
        "",
        "Rules that change the rows before another one:",
        "",
        "| rule | weights | for what, and when not |",
        "|---|---|---|",
    ]
    for mixer in sorted((rule for rule in rules if issubclass(rule, Mixer)), key=lambda rule: rule.name):
        lines.append(f"| `{mixer.form or mixer.name}` | no | {mixer.advice} |")
    return "\n".join(lines).replace(" | rule`", " \\| rule`").replace("nnm | ", "nnm \\| ") + "\n"


def _example(rule: type[Rule]) -> Aggregator:
    if issubclass(rule, CTMA):
        return CTMA(Median())
    if issubclass(rule, CentredClipping):
        return CentredClipping(1.0)
    made = rule()
    assert isinstance(made, Aggregator)
    return made
