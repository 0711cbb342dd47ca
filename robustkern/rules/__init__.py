"""Rules: plans over the four primitives, and what rules of one's own are made of.

A rule is a frozen dataclass derived from `Aggregator` or `Mixer`, made known by `register`; it sees a `View` of the
rows and returns a `Solution` or a `Mixture`. Rules import no array library but NumPy, and no backend.
"""

from __future__ import annotations

from robustkern.rules.base import Aggregator, Chain, Mixer, Rule, parse_rule, register
from robustkern.rules.clipping import ARC, CentredClipping, Clipping
from robustkern.rules.coordinate import MeanAroundMedian, Median, TrimmedMean
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
