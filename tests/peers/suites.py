"""Run another package's own tests, unchanged, against our adapter of it.

    python tests/peers/suites.py byzfl path/to/byzfl/tests/*.py
    python tests/peers/suites.py krum path/to/krum/tests

Whoever has the suites points here at them; the package itself must be installed (ByzFL, hdmedians and krum need not be).
Our classes are put where the package's tests import them from, before they are collected. Arguments after the paths go
to pytest.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import types
from collections.abc import Sequence
from typing import Any

#: By package: where its tests import which of our names from.
_KRUM = {
    "average": "Average",
    "median": "Median",
    "trimmed_mean": "TrimmedMean",
    "krum": "Krum",
    "multikrum": "MultiKrum",
    "bulyan": "Bulyan",
    "brute": "Brute",
    "aksel": "Aksel",
    "medoid": "Medoid",
    "geometric_median": "GeometricMedian",
    "nearest_neighbor_average": "NearestNeighborAverage",
}
_FLOWER = {"fedmedian": "FedMedian", "fedtrimmedavg": "FedTrimmedAvg", "krum": "Krum", "bulyan": "Bulyan"}
PLACES: dict[str, dict[str, tuple[str, Sequence[str]]]] = {
    "byzfl": {"byzfl": ("byzfl", ())},
    "hdmedians": {"hdmedians": ("hdmedians", ())},
    "krum": {f"krum.primitives.aggregators.{module}": ("krum", (name,)) for module, name in _KRUM.items()},
    "torchjd": {
        "torchjd.aggregation": ("torchjd", ("Krum", "KrumWeighting", "TrimmedMean")),
        "torchjd.aggregation._krum": ("torchjd", ("Krum", "KrumWeighting")),
        "torchjd.aggregation._trimmed_mean": ("torchjd", ("TrimmedMean",)),
    },
    "byzpy": {
        "byzpy.aggregators.coordinate_wise": (
            "byzpy",
            ("CoordinateWiseMedian", "CoordinateWiseTrimmedMean", "MeanOfMedians"),
        ),
        "byzpy.aggregators.coordinate_wise.median": ("byzpy", ("CoordinateWiseMedian",)),
        "byzpy.aggregators.coordinate_wise.trimmed_mean": ("byzpy", ("CoordinateWiseTrimmedMean",)),
        "byzpy.aggregators.coordinate_wise.mean_of_medians": ("byzpy", ("MeanOfMedians",)),
        "byzpy.aggregators.geometric_wise": (
            "byzpy",
            ("Krum", "MultiKrum", "GeometricMedian", "MinimumDiameterAveraging", "MoNNA", "SMEA"),
        ),
        "byzpy.aggregators.geometric_wise.krum": ("byzpy", ("Krum", "MultiKrum")),
        "byzpy.aggregators.geometric_wise.geometric_median": ("byzpy", ("GeometricMedian",)),
        "byzpy.aggregators.geometric_wise.monna": ("byzpy", ("MoNNA",)),
        "byzpy.aggregators.norm_wise": ("byzpy", ("CenteredClipping", "ComparativeGradientElimination", "CAF")),
        "byzpy.aggregators.norm_wise.caf": ("byzpy", ("CAF",)),
        "byzpy.pre_aggregators": ("byzpy", ("Bucketing", "NearestNeighborMixing", "Clipping", "ARC")),
        "byzpy.pre_aggregators.clipping": ("byzpy", ("Clipping",)),
    },
    "flwr": {
        "flwr.serverapp.strategy": ("flower", (*_FLOWER.values(), "MultiKrum")),
        "flwr.serverapp.strategy.multikrum": ("flower", ("MultiKrum",)),
        **{f"flwr.serverapp.strategy.{module}": ("flower", (name,)) for module, name in _FLOWER.items()},
        "flwr.server.strategy": ("flower_server", tuple(_FLOWER.values())),
        **{f"flwr.server.strategy.{module}": ("flower_server", (name,)) for module, name in _FLOWER.items()},
    },
}
#: Packages that our adapter replaces as a whole, and those of which a few modules are enough where they are missing.
WHOLE, BARE = ("byzfl", "hdmedians"), ("krum",)


def replace(package: str) -> None:
    """Put our names where the package's tests look for them."""
    for place, (adapter, names) in PLACES[package].items():
        ours: Any = importlib.import_module(f"robustkern.adapters.{adapter}")
        if package in WHOLE:
            sys.modules[place] = ours
            if package == "byzfl":
                ours.strict = True
            continue
        there = _module(place, package in BARE)
        for name in names:
            setattr(there, name, getattr(ours, name))


def _module(name: str, may_be_made: bool) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        if not may_be_made:
            raise
    parent, _, child = name.rpartition(".")
    made = types.ModuleType(name)
    made.__path__ = []
    sys.modules[name] = made
    if parent:
        setattr(_module(parent, True), child, made)
    if name == "krum.primitives.aggregators":
        made.Aggregator = importlib.import_module("robustkern.adapters.krum").Aggregator  # type: ignore[attr-defined]
    return made


if "ROBUSTKERN_PEER" in os.environ:  # as a plugin of pytest
    replace(os.environ["ROBUSTKERN_PEER"])


def main(arguments: list[str]) -> int:
    """Run pytest on the paths with this file as a plugin; return its exit code."""
    if not arguments or arguments[0] not in PLACES:
        print(__doc__)
        return 2
    here = os.path.dirname(os.path.abspath(__file__))
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"ROBUSTKERN_PEER": arguments[0], "PYTHONPATH": path}
    command = [sys.executable, "-m", "pytest", "-p", "suites", "-q", "-c", os.devnull, "--rootdir", ".", *arguments[1:]]
    return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
