"""Why rules hold or fall: the spread of honest vectors, its ratio to their mean, and which rule lets attackers in when.

Everything that a rule's theorem speaks of is measured in a training's rounds: with m the mean of the honest vectors and
V the mean of their squared distances to it, a rule with anchor x0 promises ``|result - m|^2 <= 4 delta / (1 - delta)
(V + |x0 - m|^2)``. Where that is above ``|m|^2`` nothing promises that a step along the result descends.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustkern.functions import aggregate
from robustkern.rules import CTMA, parse_rule
from robustkern.training.data import DataSet
from robustkern.training.settings import Settings
from robustkern.training.simulation import Floats, Simulation

__all__ = ["THRESHOLD_RULES", "Measure", "Measured", "measured_rounds", "thresholds"]

Measure = dict[str, float]
#: Rules whose threshold against IPM is looked for.
THRESHOLD_RULES = (
    "median",
    "geometric_median",
    "ctma(median)",
    "ctma(geometric_median)",
    "nnm | median",
    "ctma(nnm | median)",
)


def measured_rounds(rounds: int) -> set[int]:
    """Return the rounds that are measured: the first twenty, and every fifth."""
    return {t for t in range(1, rounds + 1) if t <= 20 or t % 5 == 0}


class Measured(Simulation):
    """A simulation that measures rounds; its rule is ``ctma(...)``, whose anchor is measured too."""

    def __init__(self, settings: Settings, data: DataSet) -> None:
        super().__init__(settings, data)
        rule = parse_rule(settings.rule)
        assert isinstance(rule, CTMA)
        self._anchor, self._rows = rule.anchor, np.empty((0, 0), dtype=np.float32)

    def _attacked(self, own: Floats) -> list[Floats]:
        rows = super()._attacked(own)
        self._rows = np.stack(rows)
        return rows

    def measured_round(self) -> Measure:
        """Train for one round, and return what there was: see `measure`; ``raw`` is V of fresh clipped gradients."""
        x = self.server.x.detach().clone()
        self.round()
        samples = self.task.samples(self.t + 1_000_000)[: self.honest]
        fresh = self.task.gradients(x, samples, np.zeros(self.honest, dtype=np.bool_))
        raw = fresh * self.workers.clipping(fresh)[:, None]
        assert self.server.x.grad is not None
        anchor = aggregate(self._rows, self._anchor, f=self.server.f)
        found = measure(self._rows, self.honest, self.server.x.grad.numpy(), anchor)
        return {"round": self.t, "raw": _spread(raw)[1], **found}


def measure(rows: Floats, honest: int, result: Floats, anchor: Floats) -> Measure:
    """Measure a round.

    Returns
    -------
    dict
        ``spread`` V, ``square`` |m|^2, ``error`` |result - m|^2, ``bound`` of it, and ``kept``, how many of the n-f
        rows nearest to the anchor are attackers'.
    """
    n = len(rows)
    delta = (n - honest) / n
    mean, spread = _spread(rows[:honest])
    away = _square(anchor - mean)
    near = ((rows.astype(np.float64) - anchor) ** 2).sum(axis=1).argsort(kind="stable")[:honest]
    return {
        "spread": spread,
        "square": _square(mean),
        "error": _square(result - mean),
        "bound": 4 * delta / (1 - delta) * (spread + away),
        "kept": float((near >= honest).sum()),
    }


def _spread(rows: NDArray[Any]) -> tuple[NDArray[np.float64], float]:
    mean = rows.mean(axis=0, dtype=np.float64)
    return mean, float(((rows - mean) ** 2).sum(axis=1).mean())


def _square(x: NDArray[Any]) -> float:
    return float((x.astype(np.float64) ** 2).sum())


def thresholds(
    ratios: Sequence[float], *, byzantine: Iterable[int] = (4, 8), epsilons: Iterable[float] = (0.1, 0.5),
    workers: int = 17, d: int = 1000, seeds: int = 3,
) -> dict[tuple[int, float], dict[str, list[float]]]:  # fmt: skip
    """Measure at which ratio V / |m|^2 rules begin to reject IPM: honest rows m + normal noise, the others -epsilon m.

    Parameters
    ----------
    ratios : sequence of float
        Of V to |m|^2.
    byzantine, epsilons
        How many attack, and how strongly.
    workers, d, seeds : int
        Rows, columns, repetitions.

    Returns
    -------
    dict
        (byzantine, epsilon) to rule to the mean of |result - m|^2 / |m|^2 at each ratio.
    """
    found: dict[tuple[int, float], dict[str, list[float]]] = {}
    for b in byzantine:
        for epsilon in epsilons:
            errors = {rule: [0.0] * len(ratios) for rule in THRESHOLD_RULES}
            for seed in range(seeds):
                random = np.random.default_rng([seed, 5])
                direction = random.standard_normal(d)
                direction /= np.linalg.norm(direction)
                noise = random.standard_normal((workers - b, d)) / d**0.5
                for k, ratio in enumerate(ratios):
                    rows = np.concatenate([direction + noise * ratio**0.5, np.zeros((b, d))]).astype(np.float32)
                    mean, spread = _spread(rows[: workers - b])
                    # The noise moves the mean and loses spread: both are measured, and the ratio is made exact.
                    rows[: workers - b] = mean + (rows[: workers - b] - mean) * (ratio * _square(mean) / spread) ** 0.5
                    rows[workers - b :] = -epsilon * mean
                    for rule, at in errors.items():
                        error = _square(aggregate(rows, rule, f=b) - mean) / _square(mean)
                        at[k] += error / seeds
            found[b, epsilon] = errors
    return found
