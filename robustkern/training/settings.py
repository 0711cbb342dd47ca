"""Everything that decides a training run's result. Without torch: the command line reads its options here."""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass, field
from typing import Any

from robustkern.errors import brief, plain
from robustkern.rules import parse_rule
from robustkern.scalars import as_int
from robustkern.training.attacks import available_attacks, parse_attack
from robustkern.training.data import DATA_SETS, dirichlet_of
from robustkern.training.schedules import SCHEDULES, Schedule

__all__ = ["ARRIVALS", "MODELS", "OPTIMIZERS", "Settings"]

MODELS = ("softmax", "mlp", "cnn", "paper", "paper_groupnorm", "resnet18")
ARRIVALS = ("together", "id", "id^2")
OPTIMIZERS = ("mu2sgd", "momentum", "sgd")
#: The largest number of float32, which models are in.
FLOAT32 = (2 - 2.0**-23) * 2.0**127


def _setting(default: Any, said: str) -> Any:
    """Make a field; what it is said to be is also the help of its option in ``robustkern train``."""
    return field(default=default, metadata={"help": said})


@dataclass(frozen=True)
class Settings:
    """A training run. The same settings give the same result.

    The fields say of themselves what they are: ``dataclasses.fields(Settings)``, or ``robustkern train --help``.

    Raises
    ------
    TypeError, ValueError
        If something is out of its bounds; the message says which and why.
    """

    data: str = _setting("digits", f"{', '.join(DATA_SETS)}; see load_data.")
    model: str = _setting("mlp", f"{', '.join(MODELS)}; see make_model.")
    workers: int = _setting(17, "Workers, attackers included.")
    byzantine: int = _setting(8, "How many of them, the last ones, attack.")
    f: int | None = _setting(None, "How many the rule tolerates. Default: as many as attack.")
    attack: str = _setting("alie", f"{', '.join(available_attacks())}; with parameters such as 'ipm(epsilon=0.1)'.")
    rule: str = _setting("ctma(median)", "Such as 'ctma(median)' or 'nnm | geometric_median'.")
    optimizer: str = _setting("mu2sgd", f"{', '.join(OPTIMIZERS)}: what workers send, and how the server steps.")
    schedule: str = _setting("practical", f"Of mu2sgd: {', '.join(SCHEDULES)}.")
    beta: float | None = _setting(None, "Of mu2sgd, fixed instead of the schedule's.")
    gamma: float | None = _setting(None, "Of mu2sgd, fixed instead of the schedule's.")
    radius: float | None = _setting(None, "Of mu2sgd: project the iterates onto this ball around the start.")
    momentum: float = _setting(0.9, "Of momentum.")
    lr: float = _setting(0.1, "Learning rate.")
    batch: int = _setting(4, "Samples of each worker in a round, drawn with replacement.")
    clip: float = _setting(2.0, "Clip each gradient to this norm; 0: not at all.")
    rounds: int = _setting(500, "Steps of the server.")
    split: str = _setting("iid", "Workers draw from all data (iid), from equal parts (shards) or dirichlet(0.1) ones.")
    arrivals: str = _setting("together", "Or one worker a round, likely in proportion to its id, or id^2.")
    byzantine_share: float | None = _setting(None, "Of such arrivals, the attackers'. Default: as many as they are.")
    weights: str = _setting("updates", "Of such workers, in the rule: their number of updates, or equal.")
    failures: tuple[tuple[int, int, str], ...] = _setting((), "Worker, round, and 'crash' or 'stall': its fate then.")
    seed: int = _setting(0, "Of the model, the split, the batches and the attack.")

    def __post_init__(self) -> None:
        """Check everything that can be checked without data."""
        for name, known in (
            ("data", DATA_SETS),
            ("model", MODELS),
            ("optimizer", OPTIMIZERS),
            ("arrivals", ARRIVALS),
            ("weights", ("updates", "equal")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")
        for name, least in (("workers", 1), ("byzantine", 0), ("batch", 1), ("rounds", 1), ("seed", 0)):
            value = as_int(getattr(self, name))
            if value is None or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}; got {brief(getattr(self, name))}")
            object.__setattr__(self, name, value)
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2**63; got {self.seed}")
        if 2 * self.byzantine >= self.workers:
            raise ValueError(
                f"2*byzantine must be below workers; got byzantine={self.byzantine} with workers={self.workers} "
                "(no rule survives a majority)"
            )
        f = as_int(self.f)
        if self.f is not None and (f is None or not 0 <= 2 * f < self.workers):
            raise ValueError(f"f must satisfy 0 <= 2*f < workers; got f={brief(self.f)} with workers={self.workers}")
        object.__setattr__(self, "f", f)
        for name, zero in (("lr", False), ("clip", True), ("radius", False)):
            value = getattr(self, name)
            if value is None and name == "radius":
                continue
            good = isinstance(value, (int, float)) and (0 if zero else 5e-324) <= value <= sys.float_info.max
            if not good:
                raise ValueError(
                    f"{name} must be a finite number {'of at least' if zero else 'above'} 0; got {value!r}"
                )
        schedule = Schedule(self.schedule, beta=self.beta, gamma=self.gamma)
        largest = self.lr * (schedule.alpha_at(self.rounds) if self.optimizer == "mu2sgd" else 1)
        if largest > FLOAT32:
            raise ValueError(
                f"lr must give learning rates that float32 holds; got {self.lr!r}, in round {self.rounds} {largest:g} "
                "(lower it)"
            )
        if not (isinstance(self.momentum, (int, float)) and 0 <= self.momentum < 1):
            raise ValueError(f"momentum must be in [0, 1); got {self.momentum!r}")
        parse_attack(self.attack)
        rule = parse_rule(self.rule)
        if "centre" in rule.points:
            raise ValueError(f"rule: {rule} measures from a centre, and training gives none (take another rule)")
        if self.arrivals != "together" and self.weights == "updates" and not rule.supports_weights:
            raise ValueError(f"weights must be 'equal' with arrivals={self.arrivals!r}: {rule} takes none")
        dirichlet_of(self.split)
        share = self.byzantine_share
        if share is not None and not (isinstance(share, (int, float)) and 0 <= share < 0.5):
            raise ValueError(f"byzantine_share must be None or in [0, 0.5); got {share!r}")
        if self.arrivals != "together" and self.failures:
            raise ValueError(f"failures must be none with arrivals={self.arrivals!r}; got {self.failures!r}")
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

    def attackers_weight(self, f: int, t: int) -> int:
        """Return how many updates f workers, with the share of turns that is theirs, have made up to arrival t.

        All workers make one before the first turn.
        """
        share = self.byzantine / self.workers if self.byzantine_share is None else self.byzantine_share
        share = share if self.byzantine else 0.0
        return f + math.floor(share * t + 1e-9)

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as JSON has them."""
        return dataclasses.asdict(self) | {"failures": [list(failure) for failure in self.failures]}

    def differences(self, other: dict[str, Any]) -> str:
        """Say what differs in settings from a file, but for the number of rounds; empty where nothing does."""
        mine = self.as_dict()
        if "split" not in other and "dirichlet" in other:  # version 0.1 knew no draws from all data, and no arrivals
            alpha = other["dirichlet"]
            old = "shards" if alpha is None else f"dirichlet({alpha})"
            if old == self.split:
                other = {"split": old, "arrivals": "together", "byzantine_share": None, "weights": "updates"} | other
                other.pop("dirichlet")
            else:
                return f"split: {old!r} there, as in all runs of version 0.1, {self.split!r} here"
        names = [name for name in {**mine, **other} if name != "rounds" and mine.get(name) != other.get(name)]
        return ", ".join(
            f"{plain(name, 50)}: {plain(repr(other.get(name)), 100)} there, {mine.get(name)!r} here"
            for name in names[:5]
        ) + (f", and {len(names) - 5} more" if len(names) > 5 else "")
