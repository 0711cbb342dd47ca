"""What mu^2-SGD multiplies with at each step."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SCHEDULES", "Schedule"]

SCHEDULES = ("theory", "practical")


@dataclass(frozen=True)
class Schedule:
    """Importance weights alpha_t, momentum weights beta_t and averaging weights gamma_t, for steps t = 1, 2, ...

    Parameters
    ----------
    name : {"practical", "theory"}
        "theory": alpha_t = t, beta_t = 1/t, gamma_t = alpha_{t+1} / (alpha_1 + ... + alpha_{t+1}) = 2/(t+2); learning
        rates are then small, of the order of 1/(4 L T) for smoothness L and T steps. "practical", as the paper's
        authors run it: alpha_t = 1, beta_t = 1/t and gamma_t = 2/(t+1), rounded to three digits and at least 0.01.
    beta, gamma : float, optional
        Fixed values in (0, 1] in place of the schedule's own (the authors': 0.25 and 0.1).

    Raises
    ------
    ValueError
        If the name is not known, or a fixed value is not in (0, 1].

    Notes
    -----
    The estimate of the first step is its gradient, whatever beta is.

    References
    ----------
    .. [1] Dahan and Levy, "Fault Tolerant ML: Efficient Meta-Aggregation and Synchronous Training", ICML 2024.
    """

    name: str = "practical"
    beta: float | None = None
    gamma: float | None = None

    def __post_init__(self) -> None:
        """Check the parameters."""
        if self.name not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}; got {self.name!r}")
        for what, value in (("beta", self.beta), ("gamma", self.gamma)):
            if value is not None and not (isinstance(value, (int, float)) and 0 < value <= 1):
                raise ValueError(f"schedule: {what} must be in (0, 1], or None for the schedule's own; got {value!r}")

    def alpha_at(self, t: int) -> float:
        """Return what the server's step t is multiplied with, besides the learning rate."""
        return float(t) if self.name == "theory" else 1.0

    def beta_at(self, t: int) -> float:
        """Return how much of the past a worker's estimate t drops; 1 at the first step."""
        if t == 1:
            return 1.0
        if self.beta is not None:
            return float(self.beta)
        return 1 / t if self.name == "theory" else max(round(1 / t, 3), 0.01)

    def gamma_at(self, t: int) -> float:
        """Return the share of the iterate w_{t+1} in the query point x_{t+1}."""
        if self.gamma is not None:
            return float(self.gamma)
        return 2 / (t + 2) if self.name == "theory" else max(round(2 / (t + 1), 3), 0.01)
