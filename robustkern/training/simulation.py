"""A round of training: workers' estimates, what attackers make of them, the aggregate, the server's step.

`Workers` and `ModelServer` are used alike by the simulation of all workers in one process (`Simulation`) and by real
processes (`processes.py`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.func import functional_call, grad, vmap

from robustkern.errors import RobustkernError
from robustkern.functions import aggregate
from robustkern.kernels import update_momenta
from robustkern.training.attacks import Situation, parse_attack
from robustkern.training.data import DataSet, split
from robustkern.training.models import make_model
from robustkern.training.optimizers import Mu2Server
from robustkern.training.schedules import Schedule
from robustkern.training.settings import Settings

__all__ = ["ModelServer", "Simulation", "Times", "TooManyLost", "Workers", "byzantine_rows"]

Floats = NDArray[np.float32]
EVALUATED_TOGETHER = 1024


class TooManyLost(RobustkernError):
    """More workers were lost than the rule tolerates."""


@dataclass
class Times:
    """Seconds spent in each part of the rounds so far."""

    gradients: float = 0.0
    momenta: float = 0.0
    attack: float = 0.0
    aggregation: float = 0.0


@dataclass
class Task:
    """A model, the data, and which samples each worker draws from."""

    settings: Settings
    data: DataSet
    model: torch.nn.Module | None = None  # default: the settings'
    shards: list[NDArray[np.intp]] = field(init=False)

    def __post_init__(self) -> None:
        """Make the model, and say who draws from which data."""
        channels, height, width = self.data.images.shape[1:]
        self._module = self.model or make_model(
            self.settings.model, (channels, height, width), self.data.classes, self.settings.seed
        )
        self.shards = split(self.data.labels, self.settings.workers, seed=self.settings.seed, how=self.settings.split)
        self._images = torch.from_numpy(self.data.images)
        self._labels = torch.from_numpy(self.data.labels)
        self._names = [name for name, _ in self._module.named_parameters()]
        self._shapes = [p.shape for _, p in self._module.named_parameters()]
        self._sizes = [p.numel() for _, p in self._module.named_parameters()]
        self.d = sum(self._sizes)
        self._per_worker = vmap(grad(self._loss), in_dims=(None, 0, 0))

    def start(self) -> torch.Tensor:
        """Return the parameters that training starts from, (d,) float32."""
        return torch.cat([p.detach().reshape(-1) for p in self._module.parameters()])

    def _unflatten(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        parts = torch.split(x, self._sizes)
        return {name: part.view(shape) for name, part, shape in zip(self._names, parts, self._shapes, strict=True)}

    def _loss(self, parameters: dict[str, torch.Tensor], images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        scores = functional_call(self._module, parameters, (images,))
        return torch.nn.functional.cross_entropy(scores, labels)

    def samples(self, t: int) -> NDArray[np.intp]:
        """Return which training samples each worker draws in round t, (workers, batch)."""
        sizes = np.array([len(shard) for shard in self.shards])
        random = np.random.default_rng([self.settings.seed, 2, t])
        picks = random.integers(0, sizes[:, None], (len(sizes), self.settings.batch))
        return np.stack([shard[row] for shard, row in zip(self.shards, picks, strict=True)])

    def gradients(self, x: torch.Tensor, samples: NDArray[np.intp], flipped: NDArray[np.bool_]) -> Floats:
        """Return the gradient of each worker's samples (k, batch) at x, (k, d); some on labels C - 1 - y."""
        index = torch.from_numpy(samples)
        labels = self._labels[index]
        if flipped.any():
            wrong = torch.from_numpy(flipped)
            labels[wrong] = self.data.classes - 1 - labels[wrong]
        if len(samples) == 1:  # without what it takes to have many at once, five times the time of small models
            with torch.enable_grad():
                at = x.detach().requires_grad_()
                one = torch.autograd.grad(self._loss(self._unflatten(at), self._images[index[0]], labels[0]), at)
            alone: Floats = one[0].numpy()[None]
            return alone
        with torch.no_grad():
            found = self._per_worker(self._unflatten(x), self._images[index], labels)
            flat: Floats = torch.cat([found[name].reshape(len(samples), -1) for name in self._names], dim=1).numpy()
        return flat

    @torch.no_grad()
    def evaluate(self, x: torch.Tensor) -> tuple[float, float]:
        """Return accuracy and mean loss on the test images."""
        parameters = self._unflatten(x)
        right, loss = 0, 0.0
        for begin in range(0, len(self.data.test_labels), EVALUATED_TOGETHER):
            labels = torch.from_numpy(self.data.test_labels[begin : begin + EVALUATED_TOGETHER])
            images = torch.from_numpy(self.data.test_images[begin : begin + EVALUATED_TOGETHER])
            scores = functional_call(self._module, parameters, (images,))
            right += int((scores.argmax(dim=1) == labels).sum())
            loss += float(torch.nn.functional.cross_entropy(scores, labels, reduction="sum"))
        return right / len(self.data.test_labels), loss / len(self.data.test_labels)


class Workers:
    """Some of the workers: their momenta, and where they took gradients last.

    Parameters
    ----------
    task : Task
        Model, data and settings.
    ids : sequence of int
        Which workers these are.
    times : Times, optional
        Receives where the time goes.
    """

    def __init__(self, task: Task, ids: Sequence[int], times: Times | None = None) -> None:
        settings = task.settings
        self.task, self.ids, self.times = task, np.array(ids, dtype=np.intp), times or Times()
        self.momenta: Floats = np.zeros((len(ids), task.d), dtype=np.float32)
        self.previous: torch.Tensor = torch.empty(0)
        self._schedule = Schedule(settings.schedule, beta=settings.beta, gamma=settings.gamma)
        honest = settings.workers - settings.byzantine
        self._flipped = (self.ids >= honest) & parse_attack(settings.attack).flips_labels

    def estimate(self, x: torch.Tensor, t: int) -> Floats:
        """Return what these workers would send honestly in round t, (k, d): their momenta, updated in place."""
        if not len(self.ids):
            return self.momenta
        self.advance(slice(None), x, self.previous, t, self.task.samples(t)[self.ids])
        if self.task.settings.optimizer == "mu2sgd":
            self.previous = x.clone()
        return self.momenta

    def advance(self, which: slice, x: torch.Tensor, previous: torch.Tensor, t: int, samples: NDArray[np.intp]) -> None:
        """Update the momenta of some of the workers at x: for each of them it is update t.

        Parameters
        ----------
        which : slice
            Of these workers.
        x, previous : (d,) tensor
            Where they take gradients, and where they took them last, which only mu^2-SGD looks at, for t > 1.
        t : int
            From 1.
        samples : (k, batch) int
            Of the training data, for each of them.
        """
        settings, flipped = self.task.settings, self._flipped[which]
        started = time.perf_counter()
        gradients = self.task.gradients(x, samples, flipped)
        corrections = None
        if settings.optimizer == "mu2sgd":
            keep = 1 - self._schedule.beta_at(t)
            if t > 1 and keep:
                corrections = self.task.gradients(previous, samples, flipped)
        else:
            keep = settings.momentum if settings.optimizer == "momentum" and t > 1 else 0.0
        taken = time.perf_counter()
        scales = self.clipping(gradients)
        update_momenta(
            self.momenta[which],
            gradients,
            corrections,
            keep=keep,
            gradient_scales=scales if settings.optimizer == "mu2sgd" else scales * (1 - keep),
            correction_scales=None if corrections is None else self.clipping(corrections),
        )
        self.times.gradients += taken - started
        self.times.momenta += time.perf_counter() - taken

    def clipping(self, gradients: Floats) -> NDArray[np.float64]:
        """Return the factors that bring each row to the norm it is clipped to."""
        clip = self.task.settings.clip
        if not clip:
            return np.ones(len(gradients))
        # In float64, where squares of float32 cannot overflow.
        norms = torch.linalg.vector_norm(torch.from_numpy(gradients), dim=1, dtype=torch.float64).numpy()
        scales: NDArray[np.float64] = np.minimum(clip / np.maximum(norms, 1e-30), 1.0)  # a NaN stays one
        return scales

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return what of a checkpoint is theirs."""
        d = self.task.d
        before = d if self.task.settings.optimizer == "mu2sgd" else 0
        return {"ids": self.ids.shape, "momenta": (len(self.ids), d), "previous": (before,)}

    def keep_only(self, alive: NDArray[np.bool_]) -> None:
        """Forget workers that were lost."""
        self.ids, self.momenta, self._flipped = self.ids[alive], self.momenta[alive], self._flipped[alive]


def byzantine_rows(
    settings: Settings,
    own: Floats,
    honest: Floats,
    workers: Sequence[int],
    alive: int,
    f: int,
    t: int,
    weights: NDArray[np.int64] | None = None,
) -> Floats:
    """Return what some of the Byzantine workers send in round t.

    Parameters
    ----------
    settings : Settings
        Attack, rule and seed.
    own, honest : (k, d), (h, d) float32
        Their own estimates, where the attack trains, and the honest workers'.
    workers : sequence of int
        The k workers.
    alive, f : int
        How many Byzantine workers are left, and how many the server still tolerates.
    t : int
        The round.
    weights : (h + alive,) int, optional
        How many updates each has made, where that is its weight.
    """
    attack = parse_attack(settings.attack)
    situation = Situation(
        n=settings.workers,
        f=settings.byzantine,
        alive=alive,
        workers=tuple(workers),
        seed=(settings.seed, 3, t),
        aggregate=lambda rows: combined(settings, rows, f, t, weights),
        weights=weights,
    )
    with np.errstate(all="ignore"):  # overflow and NaN are what attackers deal in
        return attack.send(own, honest, situation)


def combined(
    settings: Settings, rows: Sequence[Floats], f: int, t: int, weights: NDArray[np.int64] | None = None
) -> Floats:
    """Return what the rule makes of the rows in round t: with weights, for the share of it that f of them may hold."""
    seed = settings.seed * 1_000_003 + t  # fresh buckets in every round, the same when a run is resumed
    if weights is None:
        return aggregate(rows, settings.rule, f=f, seed=seed)
    return aggregate(rows, settings.rule, delta=share_of_attackers(settings, f, t, weights), weights=weights, seed=seed)


def share_of_attackers(settings: Settings, f: int, t: int, weights: NDArray[np.int64]) -> float:
    """Return which share of the weight f attackers may hold in turn t."""
    return settings.attackers_weight(f, t) / int(weights.sum())


class ModelServer:
    """The parameters, the step along the aggregate, and which workers were lost."""

    def __init__(self, task: Task, times: Times | None = None) -> None:
        self.task, self.times = task, times or Times()
        settings = task.settings
        self.x = torch.nn.Parameter(task.start())
        self.optimizer: torch.optim.Optimizer
        if settings.optimizer == "mu2sgd":
            self.optimizer = Mu2Server(
                [self.x], lr=settings.lr, schedule=settings.schedule, gamma=settings.gamma, radius=settings.radius
            )
        else:
            self.optimizer = torch.optim.SGD([self.x], lr=settings.lr)
        self.lost: dict[int, str] = {}

    @property
    def f(self) -> int:
        """Return how many more faulty workers the rule tolerates: those lost count as faulty."""
        return self.task.settings.tolerated - len(self.lost)

    def lose(self, worker: int, reason: str) -> None:
        """Drop a worker; raise where more are lost than the rule tolerates."""
        self.lost[worker] = reason
        if self.f < 0:
            lost = "; ".join(f"worker {i}: {why}" for i, why in sorted(self.lost.items()))
            raise TooManyLost(
                f"{len(self.lost)} workers are lost, more than the f={self.task.settings.tolerated} that are "
                f"tolerated ({lost})"
            )

    def step(self, rows: Sequence[Floats], t: int) -> None:
        """Combine a vector from each worker, in their order, in round t, and take the server's step."""
        started = time.perf_counter()
        found = combined(self.task.settings, rows, self.f, t)
        self.times.aggregation += time.perf_counter() - started
        self.move(found)

    def move(self, along: Floats) -> None:
        """Take the server's step along what the rows were combined to."""
        self.x.grad = torch.from_numpy(np.ascontiguousarray(along, dtype=np.float32))
        self.optimizer.step()

    def state(self) -> dict[str, NDArray[Any]]:
        """Return what a checkpoint needs of the server."""
        kept = {f"server.{k}": v.numpy().copy() for k, v in self.optimizer.state[self.x].items() if torch.is_tensor(v)}
        return {"x": self.x.detach().numpy().copy(), **kept}

    def restore(self, state: dict[str, NDArray[Any]], t: int, workers: dict[str, tuple[int, ...]]) -> None:
        """Go on as after round t; `workers` says which arrays besides its own the state must hold, and their shapes."""
        settings, d = self.task.settings, self.task.d
        double = settings.optimizer == "mu2sgd"
        expected: dict[str, tuple[int, ...]] = {
            "x": (d,),
            **workers,
            **({"server.iterate": (d,)} if double else {}),
            **({"server.start": (d,)} if double and settings.radius is not None else {}),
        }
        whole = {name for name, values in state.items() if values.dtype == np.int64}
        found = {name: values.shape for name, values in state.items() if name in whole or values.dtype == np.float32}
        if found != expected or set(state) != set(expected) or whole != {"ids", "counts"} & set(expected):
            given = {name: (values.shape, values.dtype.name) for name, values in state.items()}
            raise ValueError(
                f"checkpoint: expected float32 of {expected} (int64: ids, counts); got {given} (start again with "
                "--overwrite)"
            )
        with torch.no_grad():
            self.x.copy_(torch.from_numpy(state["x"]))
        kept = {k.removeprefix("server."): torch.from_numpy(v) for k, v in state.items() if k.startswith("server.")}
        if kept:
            self.optimizer.state[self.x] = kept
        if isinstance(self.optimizer, Mu2Server):
            self.optimizer.param_groups[0]["steps"] = t


class Simulation:
    """All workers in one process.

    Parameters
    ----------
    settings : Settings
        The run.
    data : DataSet
        What `load_data` returned.
    """

    def __init__(self, settings: Settings, data: DataSet) -> None:
        self.settings, self.times, self.t = settings, Times(), 0
        self.task = Task(settings, data)
        self.server = ModelServer(self.task, self.times)
        self.honest = settings.workers - settings.byzantine
        self.attack = parse_attack(settings.attack)
        training = settings.workers if self.attack.trains else self.honest
        self.workers = Workers(self.task, range(training), self.times)

    def round(self) -> None:
        """Train for one round."""
        self.t += 1
        for worker, at, kind in self.settings.failures:
            if at == self.t:
                self.lose(worker, f"{kind} in round {at}")
        own = self.workers.estimate(self.server.x.detach(), self.t)
        self.server.step(self._attacked(own), self.t)

    def lose(self, worker: int, reason: str) -> None:
        """Drop a worker."""
        self.server.lose(worker, reason)
        self.workers.keep_only(self.workers.ids != worker)

    def _attacked(self, own: Floats) -> list[Floats]:
        """Return what each worker sends: the honest ones, which come first, their momenta themselves."""
        started = time.perf_counter()
        byzantine = [i for i in range(self.honest, self.settings.workers) if i not in self.server.lost]
        first = int((self.workers.ids < self.honest).sum())
        honest, theirs = own[:first], own[first:]
        rows = list(honest)
        if byzantine:
            rows.extend(byzantine_rows(self.settings, theirs, honest, byzantine, len(byzantine), self.server.f, self.t))
        self.times.attack += time.perf_counter() - started
        return rows

    def finish(self) -> None:
        """Nobody waits for the end."""

    def evaluate(self) -> tuple[float, float]:
        """Return accuracy and loss on the test images."""
        return self.task.evaluate(self.server.x.detach())

    def state(self) -> dict[str, NDArray[Any]]:
        """Return everything that the coming rounds depend on."""
        return {
            **self.server.state(),
            "momenta": self.workers.momenta,
            "ids": self.workers.ids.astype(np.int64),
            "previous": self.workers.previous.numpy(),
        }

    def restore(self, state: dict[str, NDArray[Any]], t: int, lost: dict[int, str]) -> None:
        """Go on as after round t."""
        for worker, reason in lost.items():
            self.lose(worker, reason)
        if not np.array_equal(state["ids"], self.workers.ids):
            raise ValueError(f"checkpoint: holds workers {state['ids'].tolist()}; expected {self.workers.ids.tolist()}")
        self.server.restore(state, t, self.workers.shapes())
        self.workers.momenta = np.ascontiguousarray(state["momenta"])
        self.workers.previous = torch.from_numpy(state["previous"])
        self.t = t
