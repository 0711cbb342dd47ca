"""How many threads the kernels may use."""

from __future__ import annotations

import os

__all__ = ["requested_threads", "set_num_threads"]


def _from_environment() -> int:
    text = os.environ.get("ROBUSTKERN_NUM_THREADS", "")
    if not text:
        return 0
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"ROBUSTKERN_NUM_THREADS must be a positive integer; got {text!r} (unset it for all cores)")
    return int(text)


_requested: int | None = None


def requested_threads() -> int:
    """Return the number of threads asked for, 0 where the backend decides."""
    return _from_environment() if _requested is None else _requested


def set_num_threads(k: int | None, /) -> None:
    """Set how many threads the kernels of this process use at most.

    Parameters
    ----------
    k : int or None
        At least 1. None goes back to ``ROBUSTKERN_NUM_THREADS``, or without it to what OpenMP allows.

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
        if isinstance(k, bool) or not isinstance(k, int):
            raise TypeError(f"set_num_threads: k must be an int or None; got {type(k).__name__}")
        if k < 1:
            raise ValueError(f"set_num_threads: k must be at least 1; got {k} (None for the default)")
    _requested = k
