"""Errors of robustkern: each says what came, what was expected and what to do."""

from __future__ import annotations

__all__ = ["BackendUnavailable", "ConvergenceWarning", "NonFiniteError", "RobustkernError"]


class RobustkernError(Exception):
    """Base of the errors that only robustkern raises."""


class BackendUnavailable(RobustkernError, RuntimeError):
    """No backend can run the call; the message lists every backend with its reason."""


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


class ConvergenceWarning(UserWarning):
    """An iteration stopped before it met its tolerance."""
