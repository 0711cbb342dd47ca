"""Keeps one worker's end from ending the others: torchrun stops all processes as soon as one of them fails.

Only the standard library: a supervisor costs little beside the worker that it starts.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from types import FrameType

__all__ = ["HEARTBEAT", "launched_rank", "supervise"]

#: Names the environment variable with the pipe that a worker writes to while it lives.
HEARTBEAT = "ROBUSTKERN_HEARTBEAT"
STARTUP_S = 600.0


def launched_rank() -> int | None:
    """Return the rank that torchrun gave to this process; None where it did not start it."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else None


def supervise(arguments: list[str], silence_s: float) -> tuple[int, bool]:
    """Run a worker, wait for its end, and kill it where nothing is heard of it any more.

    Parameters
    ----------
    arguments : list of str
        Of ``python -m robustkern``.
    silence_s : float
        Seconds without a heartbeat after which a worker that has begun to send some is given up.

    Returns
    -------
    code : int
        How it ended: its exit code, negative for a signal.
    began : bool
        Whether it had begun to send heartbeats, so that the others can do without it.
    """
    read, write = os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-m", "robustkern", *arguments],
        env={**os.environ, HEARTBEAT: str(write)},
        pass_fds=[write],
    )
    os.close(write)

    def stop(number: int, frame: FrameType | None) -> None:
        child.kill()
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    patience = STARTUP_S
    while select.select([read], [], [], patience)[0]:
        if not os.read(read, 1024):  # closed: it has ended
            return child.wait(), patience == silence_s
        patience = silence_s
    child.kill()  # also where it is only stopped
    return child.wait(), patience == silence_s
