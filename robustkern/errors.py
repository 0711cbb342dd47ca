"""Errors and warnings of robustkern: each says what came, what was expected and what to do."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

from robustkern.untraced import DYNAMO

__all__ = [
    "BackendUnavailable",
    "ConvergenceWarning",
    "NonFiniteError",
    "RobustkernError",
    "SettingError",
    "brief",
    "plain",
    "shown",
    "warn",
]

_PACKAGE = os.path.dirname(__file__) + os.sep


def plain(text: str, limit: int = 500) -> str:
    """Return a text as one line that a terminal can only show: nothing in it is obeyed, and its middle may be left out.

    Names of files and tensors are what a hostile client likes them to be.
    """
    if len(text) > limit:
        text = f"{text[: limit // 2]} ... {text[-(limit // 2) :]}"
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def shown(name: str, limit: int = 80) -> str:
    """Return a name in quotes, as `plain`."""
    return f"'{plain(name, limit)}'"


def brief(value: Any) -> str:
    """Return how an error should show a number or text, which may be as long as it likes."""
    try:
        return plain(repr(value), 60)
    except ValueError:  # an integer of more digits than Python writes
        return f"an integer of {value.bit_length()} bits"


class RobustkernError(Exception):
    """Base of the errors that only robustkern raises."""


class BackendUnavailable(RobustkernError, RuntimeError):
    """No backend can run the call; the message lists every backend with its reason."""


class SettingError(RobustkernError, ValueError):
    """An environment variable holds what it cannot; the message names it."""


class NonFiniteError(RobustkernError, ValueError):
    """More rows hold NaN or Inf than the rule tolerates.

    Attributes
    ----------
    rows : tuple of int
        Indices of the rows that hold a NaN or Inf (or, in float64, are too far away to be measured).
    """

    def __init__(self, message: str, rows: tuple[int, ...]) -> None:
        super().__init__(message)
        self.rows = rows

    def __reduce__(self) -> tuple[type[NonFiniteError], tuple[str, tuple[int, ...]]]:
        """Let it pass from process to process with its rows."""
        return type(self), (str(self), self.rows)


class ConvergenceWarning(UserWarning):
    """An iteration stopped before it met its tolerance."""


def warn(message: str, category: type[Warning]) -> None:
    """Warn of the line outside this package that made the call."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and (
        frame.f_code.co_filename.startswith(_PACKAGE) or frame.f_globals.get("__name__", "").startswith(DYNAMO)
    ):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
