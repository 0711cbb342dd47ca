"""Byzantine-robust aggregation of updates at the speed of memory.

>>> import numpy as np, robustkern as rk
>>> updates = np.array([[1.0, 2, 3], [2, 4, 1], [3, 0, 5], [100, -100, 7]])  # 4 workers, one of them hostile
>>> rk.aggregate(updates, "ctma(geometric_median)", f=1)
array([2., 2., 3.])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from robustkern import kernels
from robustkern.backends.registry import info, load_best, use_backend
from robustkern.backends.threads import set_num_threads
from robustkern.engine import Info
from robustkern.errors import BackendUnavailable, ConvergenceWarning, NonFiniteError, RobustkernError
from robustkern.functions import (
    aggregate,
    bucketing,
    ctma,
    geometric_median,
    krum,
    mean,
    mean_around_median,
    median,
    mix,
    multi_krum,
    nnm,
    trimmed_mean,
)
from robustkern.products import weights_of
from robustkern.rules import (
    ARC,
    CAF,
    CGE,
    CTMA,
    FABA,
    MDA,
    NNM,
    SMEA,
    Aggregator,
    Aksel,
    Bucketing,
    Bulyan,
    Centre,
    CentredClipping,
    Chain,
    Clipping,
    GeometricMedian,
    Krum,
    Mean,
    MeanAroundMedian,
    Median,
    Medoid,
    Mixer,
    Mixture,
    MoNNA,
    MultiKrum,
    Phocas,
    Rule,
    Solution,
    Spectral,
    TrimmedMean,
    View,
    available_rules,
    parse_rule,
    register,
)
from robustkern.server import Server
from robustkern.stream import Stream

if TYPE_CHECKING:
    from robustkern.files import FileError, aggregate_files

__version__ = "0.1.0"

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
    "BackendUnavailable",
    "Bucketing",
    "Bulyan",
    "Centre",
    "CentredClipping",
    "Chain",
    "Clipping",
    "ConvergenceWarning",
    "FileError",
    "GeometricMedian",
    "Info",
    "Krum",
    "Mean",
    "MeanAroundMedian",
    "Median",
    "Medoid",
    "Mixer",
    "Mixture",
    "MoNNA",
    "MultiKrum",
    "NonFiniteError",
    "Phocas",
    "RobustkernError",
    "Rule",
    "Server",
    "Solution",
    "Spectral",
    "Stream",
    "TrimmedMean",
    "View",
    "__version__",
    "aggregate",
    "aggregate_files",
    "available_rules",
    "bucketing",
    "ctma",
    "geometric_median",
    "info",
    "kernels",
    "krum",
    "mean",
    "mean_around_median",
    "median",
    "mix",
    "multi_krum",
    "nnm",
    "parse_rule",
    "register",
    "set_num_threads",
    "trimmed_mean",
    "use_backend",
    "weights_of",
]


def __getattr__(name: str) -> Any:
    """Load what is for files when it is asked for."""
    if name in ("FileError", "aggregate_files"):
        from robustkern import files

        return getattr(files, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


load_best()
