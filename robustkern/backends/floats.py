"""The floating-point state of the calling thread: others change it, and all arithmetic here rests on it.

`torch.set_flush_denormal`, or a library built with -ffast-math that is merely loaded, makes subnormal numbers vanish;
other libraries change how sums are rounded. Compiled kernels see to themselves, in every thread of theirs; this is for
what NumPy and Numba compute.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import numpy as np

from robustkern.untraced import DYNAMO, untraced

__all__ = ["HALF_ULP", "LEAST_NORMAL", "in_usual_floats", "usual_floats"]

P = ParamSpec("P")
R = TypeVar("R")
#: Where the state is usual, ``LEAST_NORMAL / 2 > 0 and 1 + HALF_ULP == 1 == 1 - HALF_ULP``: written out where small
#: calls would feel a function.
LEAST_NORMAL, HALF_ULP = sys.float_info.min, 2.0**-55


@functools.cache
def _library() -> Any:
    """Return C's floating-point environment; None where it is not known how to reset it."""
    if not sys.platform.startswith("linux"):
        return None
    for name in (None, "libm.so.6"):
        with contextlib.suppress(OSError, AttributeError):
            library = ctypes.CDLL(name)
            library.fegetenv, library.fesetenv  # noqa: B018  (or AttributeError)
            return library
    return None


@contextlib.contextmanager
def usual_floats() -> Iterator[None]:
    """Round to nearest and keep subnormal numbers in this thread, for a while."""
    library = _library()
    if library is None:
        yield
        return
    before = ctypes.create_string_buffer(256)  # a fenv_t has 8 to 32 bytes
    library.fegetenv(before)
    try:  # whatever interrupts
        library.fesetenv(ctypes.c_void_p(-1))  # FE_DFL_ENV
        yield
    finally:
        library.fesetenv(before)


def in_usual_floats(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function run so, without NumPy's warnings and errors that its caller may have asked for, and untraced."""

    @functools.wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        if DYNAMO in sys.modules:
            result: R = untraced(computed)(*args, **options)
            return result
        return computed(*args, **options)

    def computed(*args: P.args, **options: P.kwargs) -> R:
        with np.errstate(all="ignore"):
            if LEAST_NORMAL / 2 > 0 and 1 + HALF_ULP == 1 == 1 - HALF_ULP:
                return function(*args, **options)
            with usual_floats():
                return function(*args, **options)

    return call
