"""Everything that decides a training run's result."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import Any

from robustkern.rules import parse_rule
from robustkern.training.attacks import parse_attack
from robustkern.training.data import DATA_SETS
from robustkern.training.models import MODELS
from robustkern.training.schedules import Schedule

__all__ = ["OPTIMIZERS", "Settings"]

OPTIMIZERS = ("mu2sgd", "momentum", "sgd")


@dataclass(frozen=True)
class Settings:
    """A training run. The same settings give the same result.

    Parameters
    ----------
    data, model : str
        See `load_data` and `make_model`.
    workers, byzantine : int
        How many workers, and how many of them, the last ones, attack.
    f : int, optional
        How many the rule tolerates; default `byzantine`.
    attack, rule : str
        In their text forms.
    optimizer : {"mu2sgd", "momentum", "sgd"}
        What workers send, and how the server steps.
    schedule, beta, gamma : str, float, float
        Of mu^2-SGD, see `Schedule`.
    radius : float, optional
        Of the ball around the start that mu^2-SGD's iterates are projected onto.
    momentum : float
        Of the momentum baseline.
    lr : float
        Learning rate.
    batch : int
        Samples of each worker in a round, drawn with replacement.
    clip : float
        Norm that each gradient is clipped to; 0: not at all.
    rounds : int
        Steps of the server.
    dirichlet : float, optional
        See `split`.
    failures : tuple of (int, int, str)
        Worker, round, and "crash" or "stall": what shall happen to it then.
    seed : int
        Of the model, the split and the batches.

    Raises
    ------
    TypeError, ValueError
        If something is out of its bounds; the message says which and why.
    """

    data: str = "digits"
    model: str = "mlp"
    workers: int = 17
    byzantine: int = 8
    f: int | None = None
    attack: str = "alie"
    rule: str = "ctma(median)"
    optimizer: str = "mu2sgd"
    schedule: str = "practical"
    beta: float | None = None
    gamma: float | None = None
    radius: float | None = None
    momentum: float = 0.9
    lr: float = 0.1
    batch: int = 4
    clip: float = 2.0
    rounds: int = 500
    dirichlet: float | None = None
    failures: tuple[tuple[int, int, str], ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        """Check everything that can be checked without data."""
        for name, known in (("data", DATA_SETS), ("model", MODELS), ("optimizer", OPTIMIZERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")
        for name, least in (("workers", 1), ("byzantine", 0), ("batch", 1), ("rounds", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}; got {value!r}")
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2**63; got {self.seed}")
        if 2 * self.byzantine >= self.workers:
            raise ValueError(
                f"2*byzantine must be below workers; got byzantine={self.byzantine} with workers={self.workers} "
                "(no rule survives a majority)"
            )
        if self.f is not None and (not isinstance(self.f, int) or not 0 <= 2 * self.f < self.workers):
            raise ValueError(f"f must satisfy 0 <= 2*f < workers; got f={self.f!r} with workers={self.workers}")
        for name, zero in (("lr", False), ("clip", True), ("radius", False), ("dirichlet", False)):
            value = getattr(self, name)
            if value is None and name in ("radius", "dirichlet"):
                continue
            good = isinstance(value, (int, float)) and (0 if zero else 5e-324) <= value <= sys.float_info.max
            if not good:
                raise ValueError(
                    f"{name} must be a finite number {'of at least' if zero else 'above'} 0; got {value!r}"
                )
        if not (isinstance(self.momentum, (int, float)) and 0 <= self.momentum < 1):
            raise ValueError(f"momentum must be in [0, 1); got {self.momentum!r}")
        Schedule(self.schedule, beta=self.beta, gamma=self.gamma)
        parse_attack(self.attack)
        parse_rule(self.rule)
        for failure in self.failures:
            worker, at, kind = failure
            if not 1 <= worker < self.workers or at < 1 or kind not in ("crash", "stall"):
                raise ValueError(
                    "failures must be (worker, round, 'crash' or 'stall') with 1 <= worker < workers and round >= 1 "
                    f"(worker 0 lives with the server); got {failure!r}"
                )

    @property
    def tolerated(self) -> int:
        """Return f."""
        return self.byzantine if self.f is None else self.f

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as JSON has them."""
        return dataclasses.asdict(self) | {"failures": [list(failure) for failure in self.failures]}

    def differences(self, other: dict[str, Any]) -> str:
        """Say what differs in settings from a file, but for the number of rounds; empty where nothing does."""
        mine = self.as_dict()
        names = [name for name in {**mine, **other} if name != "rounds" and mine.get(name) != other.get(name)]
        return ", ".join(f"{name}: {other.get(name)!r} there, {mine.get(name)!r} here" for name in names)
