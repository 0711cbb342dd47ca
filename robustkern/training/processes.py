"""The same training with real processes: torchrun starts one for each worker, and gloo carries the vectors.

Rank 0 is the server and worker 0. Each of the others talks to it through a process group of their own, because a gloo
group is lost as a whole when one of its members crashes or lets the others wait too long; so only the worker is lost.
Attackers are shown the honest vectors by the server, which stands for their omniscience.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from robustkern.errors import RobustkernError
from robustkern.training.attacks import parse_attack
from robustkern.training.data import DataSet
from robustkern.training.settings import Settings
from robustkern.training.simulation import Floats, ModelServer, Task, Times, Workers, byzantine_rows

__all__ = ["ProcessServer", "work"]

STARTUP = timedelta(seconds=600)
FIRST_ROUND_S = 60.0  # more, while everybody compiles and loads what later rounds find there
GRACE_S = 10.0  # between the end of training and that of workers that have not noticed
STOP = -1

Group = Any


def _finished() -> str:
    """Return the key that says that training has ended, another one after each restart of all processes."""
    return (
        f"robustkern/finished/{os.environ['TORCHELASTIC_RUN_ID']}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    )


def _connect(settings: Settings, timeout_s: float) -> list[Group]:
    """Join the others; return the group of the server and each worker (None for worker 0)."""
    world = int(os.environ["WORLD_SIZE"])
    if world != settings.workers:
        raise ValueError(
            f"workers must be the number of processes; got workers={settings.workers} with {world} processes "
            "(torchrun --nproc-per-node)"
        )
    wait = timedelta(seconds=timeout_s)
    try:
        dist.init_process_group("gloo", timeout=STARTUP)
        return [None, *(dist.new_group([0, worker], timeout=wait) for worker in range(1, world))]
    except RuntimeError as error:
        raise RobustkernError(f"the {world} processes did not come together: {str(error).splitlines()[0]}") from None


def _wait(work: Any, limit: timedelta) -> None:
    work.wait(limit)


def _header(*values: int) -> torch.Tensor:
    return torch.tensor([*values, *[0] * (4 - len(values))], dtype=torch.int64, device="cpu")


# ---- the server ------------------------------------------------------------------------------------------------


class _Peer:
    """The server's side of the line to one worker."""

    def __init__(self, worker: int, group: Group) -> None:
        self.worker, self.group = worker, group
        self._sent: list[tuple[Any, torch.Tensor]] = []
        self._expected: list[tuple[Any, torch.Tensor]] = []

    def send(self, *tensors: torch.Tensor) -> None:
        """Start to send; raises RuntimeError where the line is known to be cut."""
        for tensor in tensors:
            self._sent.append((dist.isend(tensor, dst=self.worker, group=self.group), tensor))

    def expect(self, count: int, d: int) -> None:
        """Start to receive vectors."""
        for _ in range(count):
            vector = torch.empty(d, device="cpu")
            self._expected.append((dist.irecv(vector, src=self.worker, group=self.group), vector))

    def receive(self, deadline: float) -> list[Floats]:
        """Return the vectors that are expected; raises RuntimeError where they do not come in time."""
        vectors: list[Floats] = []
        for arrival, vector in self._expected:
            arrival.wait(timedelta(seconds=max(deadline - time.monotonic(), 0.01)))
            vectors.append(vector.numpy())
        self._sent.clear()  # it has answered, so it has read what came before
        self._expected.clear()
        return vectors


class ProcessServer:
    """The server of real processes; a `robustkern.training.session.Runner` like `Simulation`.

    Parameters
    ----------
    settings : Settings
        The run; as many workers as processes.
    data : DataSet
        What `load_data` returned.
    timeout_s : float
        How long the server waits for a worker in a round before it goes on without it for good.
    checkpoint_every : int
        Rounds after which workers tell the server their momenta.
    """

    def __init__(self, settings: Settings, data: DataSet, *, timeout_s: float, checkpoint_every: int) -> None:
        self.settings, self.times, self.t = settings, Times(), 0
        self.task = Task(settings, data)
        self.server = ModelServer(self.task, self.times)
        self.workers = Workers(self.task, [0], self.times)
        self.honest = settings.workers - settings.byzantine
        self.attack = parse_attack(settings.attack)
        self._timeout_s, self._checkpoint_every = timeout_s, checkpoint_every
        self._trains = range(settings.workers if self.attack.trains else self.honest)
        self._momenta = {worker: np.zeros(self.task.d, dtype=np.float32) for worker in self._trains}
        groups = _connect(settings, timeout_s)
        self.peers = {worker: _Peer(worker, groups[worker]) for worker in range(1, settings.workers)}
        self._told = False

    def _each(self, workers: Sequence[int], action: Any) -> dict[int, Any]:
        """Do something with each worker; those with which it fails are lost."""
        results = {}
        for worker in workers:
            if worker not in self.peers:
                continue
            try:
                results[worker] = action(self.peers[worker])
            except RuntimeError as error:
                del self.peers[worker]
                self._momenta.pop(worker, None)
                late = "imed out" in str(error)
                reason = f"no answer within {self._timeout_s:g} s" if late else "the connection was lost"
                self.server.lose(worker, f"{reason} in round {self.t}")
        return results

    def _tell_start(self) -> None:
        """Tell workers where training begins."""
        if self._told:
            return
        self._told = True

        def tell(peer: _Peer) -> None:
            resumed = self.t > 0 and peer.worker in self._momenta
            peer.send(_header(self.t, resumed))
            if resumed:
                peer.send(torch.from_numpy(self._momenta[peer.worker]), self._previous())

        self._each(list(self.peers), tell)

    def _previous(self) -> torch.Tensor:
        previous = self.workers.previous
        return previous if previous.numel() else torch.zeros(self.task.d, device="cpu")

    def round(self) -> None:
        """Train for one round."""
        first = not self._told
        self._tell_start()
        self.t += 1
        d, x = self.task.d, self.server.x.detach().clone()
        report = self.t % self._checkpoint_every == 0 or self.t == self.settings.rounds
        later = range(self.honest, self.settings.workers) if self.attack.looks else range(0)
        at_once = [worker for worker in self.peers if worker not in later]
        self._each(list(self.peers), lambda peer: peer.send(_header(self.t, report), x))
        self._each(at_once, lambda peer: peer.expect(1 + report, d))
        self._each(later, lambda peer: peer.expect(1, 1))  # that it is there, before the attack is planned
        own = self.workers.estimate(x, self.t)
        deadline = time.monotonic() + self._timeout_s + (FIRST_ROUND_S if first else 0)
        arrived = self._each(at_once, lambda peer: peer.receive(deadline))
        rows = {0: own[0], **{worker: vectors[0] for worker, vectors in arrived.items()}}
        if report:
            self._momenta = {0: own[0].copy(), **{worker: vectors[1] for worker, vectors in arrived.items()}}
        self._each(later, lambda peer: peer.receive(deadline))
        attackers = [worker for worker in later if worker in self.peers]
        if attackers:
            started = time.perf_counter()
            honest = torch.from_numpy(np.stack([rows[worker] for worker in sorted(rows)]))
            told = _header(len(honest), len(attackers), self.server.f)
            self._each(attackers, lambda peer: (peer.send(told, honest), peer.expect(1, d)))
            deadline = time.monotonic() + self._timeout_s + (FIRST_ROUND_S if first else 0)
            arrived = self._each(attackers, lambda peer: peer.receive(deadline))
            rows |= {worker: vectors[0] for worker, vectors in arrived.items()}
            self.times.attack += time.perf_counter() - started
        self.server.step([rows[worker] for worker in sorted(rows)], self.t)

    def evaluate(self) -> tuple[float, float]:
        """Return accuracy and loss on the test images."""
        return self.task.evaluate(self.server.x.detach())

    def state(self) -> dict[str, NDArray[Any]]:
        """Return everything that the coming rounds depend on; only after rounds in which workers tell their momenta."""
        ids = sorted(self._momenta)
        return {
            **self.server.state(),
            "momenta": np.stack([self._momenta[worker] for worker in ids]),
            "ids": np.array(ids, dtype=np.int64),
            "previous": self.workers.previous.numpy(),
        }

    def restore(self, state: dict[str, NDArray[Any]], t: int, lost: dict[int, str]) -> None:
        """Go on as after round t; workers that were lost stay so."""
        self.t = t
        for worker, reason in lost.items():
            self._each([worker], lambda peer: peer.send(_header(STOP)))
            self.peers.pop(worker, None)
            self.server.lose(worker, reason)
        ids = state["ids"]
        shapes = self.workers.shapes() | {"ids": ids.shape, "momenta": (len(ids), self.task.d)}
        self.server.restore(state, t, shapes)
        self._momenta = {int(i): row for i, row in zip(state["ids"], state["momenta"].copy(), strict=True)}
        self.workers.momenta[0] = self._momenta[0]
        self.workers.previous = torch.from_numpy(state["previous"])

    def finish(self) -> None:
        """Let the workers go, also those that do not listen."""
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        store.set(_finished(), "1")
        if not self._told:
            self._tell_start()
        for peer in self.peers.values():
            try:
                peer.send(_header(STOP))
                for sent, _ in peer._sent:
                    sent.wait(timedelta(seconds=1))
            except RuntimeError:  # it has ended by itself
                continue


# ---- a worker --------------------------------------------------------------------------------------------------


def _beat(finished_host: str, port: int, pipe: int | None) -> None:
    """Tell who listens that this process lives, and end it where training has ended without its notice."""
    store = TCPStore(finished_host, port, is_master=False)
    left = GRACE_S
    while True:
        try:
            if pipe is not None:
                os.write(pipe, b".")
            over = store.check([_finished()])
        except (RuntimeError, OSError):  # torchrun itself, or who listens, has ended
            over = True
        if over:
            left -= 1
        if left < 0:
            os._exit(0)
        time.sleep(1)


def work(settings: Settings, data: DataSet, *, timeout_s: float, heartbeat: int | None = None) -> str:
    """Be the worker of this process's rank until the server ends the training; return why it ended.

    Parameters
    ----------
    settings, data, timeout_s
        As for `ProcessServer`.
    heartbeat : int, optional
        Of a pipe, into which a byte a second is written.
    """
    rank = int(os.environ["RANK"])
    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    task = Task(settings, data)
    group = _connect(settings, timeout_s)[rank]
    threading.Thread(target=_beat, args=(*address, heartbeat), daemon=True).start()
    honest = settings.workers - settings.byzantine
    attack = parse_attack(settings.attack)
    attacks = rank >= honest
    workers = Workers(task, [rank] if not attacks or attack.trains else [])

    def receive(like: torch.Tensor) -> torch.Tensor:
        _wait(dist.irecv(like, src=0, group=group), STARTUP)
        return like

    def send(row: Floats) -> None:
        _wait(dist.isend(torch.from_numpy(np.array(row)), dst=0, group=group), timedelta(seconds=timeout_s))

    try:
        begin, resumed, *_ = receive(_header()).tolist()
        if begin == STOP:
            return "it was lost before"
        if resumed:
            workers.momenta[0] = receive(torch.empty(task.d, device="cpu")).numpy()
            workers.previous = receive(torch.empty(task.d, device="cpu"))
        while True:
            t, report, *_ = receive(_header()).tolist()
            if t == STOP:
                return "training has ended"
            x = receive(torch.empty(task.d, device="cpu"))
            for worker, at, kind in settings.failures:
                if (worker, at) == (rank, t):
                    os.kill(os.getpid(), signal.SIGKILL if kind == "crash" else signal.SIGSTOP)
            own = workers.estimate(x, t)
            if not attacks:
                send(own[0])
            else:
                seen, alive, f = np.empty((0, task.d), dtype=np.float32), settings.byzantine, settings.tolerated
                if attack.looks:
                    send(np.zeros(1, dtype=np.float32))
                    count, alive, f, _ = receive(_header()).tolist()
                    seen = receive(torch.empty(count, task.d, device="cpu")).numpy()
                send(byzantine_rows(settings, own, seen, [rank], alive, f, t)[0])
            if report and len(own) and not (attacks and attack.looks):
                send(own[0])
    except RuntimeError as error:
        return f"the server is gone or has dropped it ({str(error).splitlines()[0][:80]})"
