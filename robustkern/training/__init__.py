"""Fault-tolerant training: double momentum (mu^2-SGD), attacks, and simulations of many workers.

`Mu2Worker` and `Mu2Server` are torch optimizers; `Simulation` trains all workers in one process, and
``torchrun -m robustkern train`` with one process for each. Needs torch: ``pip install 'robustkern[train]'``.
"""

from __future__ import annotations

try:
    import torch as _torch  # noqa: F401
except ImportError as missing:
    raise ImportError(f"{missing}; robustkern.training needs: pip install 'robustkern[train]'") from None

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
