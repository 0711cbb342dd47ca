"""Calls that torch.compile leaves alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

__all__ = ["DYNAMO", "untraced"]

#: What traces; a program that does not compile never loads it.
DYNAMO = "torch._dynamo"


_known: dict[Callable[..., Any], Callable[..., Any]] = {}


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with a break of the graph before and after it, and nothing traced inside.

    It would be NumPy's algebra and addresses, of which torch's tracer makes operations on tensors, and fails. Call this
    only where `DYNAMO` is among ``sys.modules``.
    """
    if function not in _known:  # no functools.cache, of which the tracer warns
        _known[function] = sys.modules[DYNAMO].disable(function)
    return _known[function]
