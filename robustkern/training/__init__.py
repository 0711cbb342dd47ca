"""Fault-tolerant training: double momentum (mu^2-SGD), attacks, and simulations of many workers.

`Mu2Worker` and `Mu2Server` are torch optimizers; `Simulation` trains all workers in one process, and
``torchrun -m robustkern train`` with one process for each. Needs torch: ``pip install 'robustkern[train]'``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robustkern.training.attacks import Attack, Situation, alie_z, available_attacks, parse_attack
    from robustkern.training.data import DataSet, load_data, split
    from robustkern.training.models import make_model
    from robustkern.training.optimizers import MomentumWorker, Mu2Server, Mu2Worker
    from robustkern.training.schedules import Schedule
    from robustkern.training.settings import Settings
    from robustkern.training.simulation import Simulation, TooManyLost

__all__ = [
    "Attack",
    "DataSet",
    "MomentumWorker",
    "Mu2Server",
    "Mu2Worker",
    "Schedule",
    "Settings",
    "Simulation",
    "Situation",
    "TooManyLost",
    "alie_z",
    "available_attacks",
    "load_data",
    "make_model",
    "parse_attack",
    "split",
]

#: Where the names are; from "models" on, torch is needed.
_MODULES = ("attacks", "data", "schedules", "settings", "models", "optimizers", "simulation")


def __getattr__(name: str) -> Any:
    """Import what is asked for: settings and attacks are there before torch, and without it."""
    if name in __all__:
        for module in _MODULES:
            try:
                names = vars(import_module(f"{__name__}.{module}"))
            except ImportError as missing:
                raise ImportError(f"{missing}; robustkern.training needs: pip install 'robustkern[train]'") from None
            if name in names:
                return names[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
