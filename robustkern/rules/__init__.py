"""Rules: plans over the four primitives. They import no array library but NumPy, and no backend."""

from __future__ import annotations

from robustkern.rules.base import Aggregator, Chain, Mixer, Rule, available_rules, parse_rule
from robustkern.rules.coordinate import MeanAroundMedian, Median, TrimmedMean
from robustkern.rules.ctma import CTMA
from robustkern.rules.mixing import NNM, Bucketing
from robustkern.rules.weights import GeometricMedian, Krum, Mean, MultiKrum

__all__ = [
    "CTMA",
    "NNM",
    "Aggregator",
    "Bucketing",
    "Chain",
    "GeometricMedian",
    "Krum",
    "Mean",
    "MeanAroundMedian",
    "Median",
    "Mixer",
    "MultiKrum",
    "Rule",
    "TrimmedMean",
    "available_rules",
    "parse_rule",
]
