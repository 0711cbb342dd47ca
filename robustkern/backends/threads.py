"""How many threads the kernels may use."""

from __future__ import annotations

import functools
import os

from robustkern.errors import brief
from robustkern.scalars import as_int

__all__ = ["requested_threads", "set_num_threads", "usable_cores"]

MAX_THREADS = 65536


_requested: int | None = None


def usable_cores() -> int:
    """Return how many processors this process may run on; where the system does not say, how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def requested_threads() -> int:
    """Return the number of threads asked for, 0 where the backend decides; found out once, as small calls feel it."""
    if _requested is not None:
        return _requested
    text = os.environ.get("ROBUSTKERN_NUM_THREADS", "")
    if not text:
        return 0
    if not (text.isascii() and text.isdecimal() and len(text) < 6 and 1 <= int(text) <= MAX_THREADS):
        raise ValueError(
            f"ROBUSTKERN_NUM_THREADS must be a positive integer up to {MAX_THREADS}; got {text!r} (unset: all cores)"
        )
    return int(text)


def set_num_threads(k: int | None, /) -> None:
    """Set how many threads the kernels of this process use at most.

    Parameters
    ----------
    k : int or None
        Between 1 and 65536. None goes back to ``ROBUSTKERN_NUM_THREADS``, or without it to what OpenMP allows.

    Raises
    ------
    TypeError, ValueError
        If `k` is not a positive integer or None.

    Notes
    -----
    Results do not depend on it: the same input gives the same bits for any number of threads.
    """
    global _requested  # noqa: PLW0603  (one setting a process, like OpenMP's own)
    if k is not None:
        count = as_int(k)
        if count is None:
            raise TypeError(f"set_num_threads: k must be an int or None; got {type(k).__name__}")
        if not 1 <= count <= MAX_THREADS:
            raise ValueError(
                f"set_num_threads: k must be between 1 and {MAX_THREADS}; got {brief(k)} (None for the default)"
            )
    _requested = as_int(k)
    requested_threads.cache_clear()
