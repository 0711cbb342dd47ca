"""Training in which workers do not wait for each other: one vector arrives at a time, and the others' last ones stay.

A worker that took its turn gets the parameters that came of it, and computes there until its next turn. Workers that
have made more updates know more: the rule weighs each by their number (Dahan and Levy, "Weight for Robustness: A
Comprehensive Approach towards Optimal Fault-Tolerant Asynchronous ML", NeurIPS 2024).
"""

from __future__ import annotations

import time
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from robustkern.server import Server
from robustkern.training.data import DataSet
from robustkern.training.settings import Settings
from robustkern.training.simulation import Simulation, Workers, byzantine_rows, share_of_attackers

__all__ = ["AsynchronousSimulation", "simulate"]


class AsynchronousSimulation(Simulation):
    """All workers in one process, of which one takes its turn in each round.

    Before the first round each has sent one vector, taken at the start. The attackers take the turns t in which
    ``byzantine_share * t`` reaches a whole number, the honest ones the others; which of them is drawn in proportion to
    1, 2, 3, ... or to the squares of these.

    Parameters
    ----------
    settings : Settings
        The run; `arrivals` is "id" or "id^2", and a round is a turn.
    data : DataSet
        What `load_data` returned.
    """

    def __init__(self, settings: Settings, data: DataSet) -> None:
        super().__init__(settings, data)
        n, d = settings.workers, self.task.d
        self.workers = Workers(self.task, range(n), self.times)
        start = self.task.start()
        #: Where each worker computes, and where it did so the turn before.
        self.at, self.previous = start.repeat(n, 1), start.repeat(n, 1)
        self.counts: NDArray[np.int64] = np.ones(n, dtype=np.int64)
        self.sent = self.workers.estimate(start, 1).copy()
        for worker in range(self.honest, n):
            self.sent[worker] = self._of_attacker(worker)
        assert self.sent.shape == (n, d)
        weights: Literal["counts"] | None = "counts" if settings.weights == "updates" else None
        f = None if weights else self.server.f
        self.received = Server(settings.rule, f=f, absent="stale", weights=weights, seed=settings.seed)
        self.received.add(self.sent)

    def turn(self, t: int) -> int:
        """Return whose turn t is."""
        settings = self.settings
        before, after = (settings.attackers_weight(0, k) for k in (t - 1, t))
        first, last = (self.honest, settings.workers) if after > before else (0, self.honest)
        law = np.arange(1, last - first + 1, dtype=np.float64) ** (2 if settings.arrivals == "id^2" else 1)
        random = np.random.default_rng([settings.seed, 4, t])
        return first + int(random.choice(last - first, p=law / law.sum()))

    def round(self) -> None:
        """Let one worker take its turn."""
        self.t += 1
        worker = self.turn(self.t)
        self.counts[worker] += 1
        one = slice(worker, worker + 1)
        if worker < self.honest or self.attack.trains:
            samples = self.task.samples(self.t)[one]
            self.workers.advance(one, self.at[worker], self.previous[worker], int(self.counts[worker]), samples)
        started = time.perf_counter()
        self.sent[worker] = self.workers.momenta[worker] if worker < self.honest else self._of_attacker(worker)
        self.times.attack += time.perf_counter() - started
        started = time.perf_counter()
        delta = (
            None if self._weights() is None else share_of_attackers(self.settings, self.server.f, self.t, self.counts)
        )
        found = self.received.aggregate(self.sent[one], workers=[worker], delta=delta)
        self.times.aggregation += time.perf_counter() - started
        self.server.move(found)
        self.previous[worker] = self.at[worker]
        self.at[worker] = self.server.x.detach()

    def _weights(self) -> NDArray[np.int64] | None:
        return self.counts if self.settings.weights == "updates" else None

    def _of_attacker(self, worker: int) -> NDArray[np.float32]:
        """Return what an attacker sends, who sees what the honest workers sent last."""
        settings = self.settings
        own, alive = self.workers.momenta[worker : worker + 1], settings.byzantine
        honest, weights = self.sent[: self.honest], self._weights()
        rows = byzantine_rows(settings, own, honest, [worker], alive, self.server.f, max(self.t, 1), weights)
        found: NDArray[np.float32] = rows[0]
        return found

    def state(self) -> dict[str, NDArray[Any]]:
        """Return everything that the coming turns depend on."""
        counts = self.received.state_dict()["counts"]  # with which it goes on as one that is restored does
        self.counts = np.array([counts[worker] for worker in range(len(self.counts))], dtype=np.int64)
        own = {"at": self.at.numpy(), "previous": self.previous.numpy(), "sent": self.sent, "counts": self.counts}
        return super().state() | own

    def restore(self, state: dict[str, NDArray[Any]], t: int, lost: dict[int, str]) -> None:
        """Go on as after turn t."""
        n, d = self.sent.shape
        every = {"momenta": (n, d), "at": (n, d), "previous": (n, d), "sent": (n, d), "counts": (n,), "ids": (n,)}
        self.server.restore(state, t, every)
        self.workers.momenta, self.sent, self.counts = (
            np.ascontiguousarray(state[name]) for name in ("momenta", "sent", "counts")
        )
        self.at, self.previous = torch.from_numpy(state["at"]), torch.from_numpy(state["previous"])
        counts = dict(enumerate(self.counts.tolist()))
        rows = {"rounds": t, "counts": counts, "rows": {worker: self.sent[worker].copy() for worker in range(n)}}
        self.received.load_state_dict(self.received.state_dict() | rows)
        self.t = t


def simulate(settings: Settings, data: DataSet) -> Simulation:
    """Return the simulation of these settings: in rounds of all workers, or in turns."""
    return (Simulation if settings.arrivals == "together" else AsynchronousSimulation)(settings, data)
