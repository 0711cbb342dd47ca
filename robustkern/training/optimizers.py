"""mu^2-SGD as a pair of torch optimizers, and momentum, its baseline: a worker's estimate and the server's step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from robustkern.training.schedules import Schedule

__all__ = ["MomentumWorker", "Mu2Server", "Mu2Worker"]


def _check(name: str, value: float | None, what: str, *, optional: bool = True) -> None:
    if optional and value is None:
        return
    if not (isinstance(value, (int, float)) and 0 < value < math.inf):
        raise ValueError(f"{name}: {what} must be a finite number above 0; got {value!r}")


def _norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return the length of all tensors together, in float64, where squares of float32 cannot overflow."""
    return _length(torch.stack([_length(x) for x in tensors]))


def _length(x: torch.Tensor) -> torch.Tensor:
    wide = torch.complex128 if x.is_complex() else torch.float64
    if x.dtype != wide or not x.numel():
        short: torch.Tensor = torch.linalg.vector_norm(x, dtype=wide)
        return short
    # Squares of float64 can overflow: scaled to at most 1 first. The bounds let zeros stay zeros, and an Inf one.
    bounds = torch.finfo(torch.float64)
    largest = torch.linalg.vector_norm(x, ord=math.inf).clamp(bounds.tiny, bounds.max)
    length: torch.Tensor = largest * torch.linalg.vector_norm(x / largest)
    return length


class _Together(torch.optim.Optimizer):
    """Its groups of parameters are one vector: what is not in `OWN` is the same for all of them."""

    OWN: tuple[str, ...] = ()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, before the first step, with the options of the others; what is refused changes nothing."""
        name = type(self).__name__
        if isinstance(param_group, dict):
            if "steps" in param_group:
                raise ValueError(f"{name}: steps are counted, not set; got a group with {param_group['steps']!r}")
            param_group = dict(param_group)  # torch keeps the dictionary itself, which another optimizer may have too
        super().add_param_group(param_group)
        try:
            if self.param_groups[0]["steps"]:
                done = self.param_groups[0]["steps"]
                raise ValueError(f"{name}: parameters must be added before the first step; {done} are done")
            self._check_options(self.param_groups[-1])
            self._check_same()
        except BaseException:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the state of an optimizer of the same kind."""
        lacks = [option for option in self.defaults if any(option not in g for g in state_dict["param_groups"])]
        if lacks:
            name = type(self).__name__
            raise ValueError(f"{name}: expected the state_dict of a {name}; got one without {', '.join(lacks)}")
        super().load_state_dict(state_dict)

    def _check_options(self, group: dict[str, Any]) -> None:
        """Raise where an option of a group has a value that it cannot have."""

    def _check_same(self) -> None:
        """Raise where a group says something else than the first, which is the one that counts."""
        first, *others = self.param_groups
        for group in others:
            for option in first.keys() & self.defaults.keys() - set(self.OWN):
                if group[option] != first[option]:
                    raise ValueError(
                        f"{type(self).__name__}: {option} must be the same for all groups of parameters; got "
                        f"{first[option]!r} and {group[option]!r}"
                    )

    def _parameters(self) -> list[torch.Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _check_dense(self) -> None:
        for p in self._parameters():
            if p.grad is not None and p.grad.layout is not torch.strided:
                raise TypeError(
                    f"{type(self).__name__}: expected dense gradients; got {p.grad.layout} for a parameter of shape "
                    f"{tuple(p.shape)} (Embedding with sparse=False, or p.grad = p.grad.to_dense())"
                )


class _Worker(_Together):
    """Replaces gradients by what a worker sends; never moves the parameters."""

    def __init__(self, params: Iterable[Any], clip: float | None, **options: Any) -> None:
        super().__init__(params, {"clip": clip, "steps": 0, **options})

    def _check_options(self, group: dict[str, Any]) -> None:
        _check(type(self).__name__, group["clip"], "clip")

    def _gradients(self) -> list[torch.Tensor]:
        """Return copies of the gradients, clipped to the norm of all of them; zeros where a parameter has none."""
        self._check_dense()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in self._parameters()]
        clip = self.param_groups[0]["clip"]
        if clip is not None:
            norm = _norm(gradients)
            scale = torch.clamp(clip / norm, max=1.0)  # a NaN stays one
            for gradient in gradients:
                gradient.mul_(scale)  # which may be less than 16 bits hold
        return gradients

    def _publish(self, estimates: list[torch.Tensor]) -> None:
        for p, estimate in zip(self._parameters(), estimates, strict=True):
            self.state[p]["estimate"] = estimate
            p.grad = estimate.clone()
        for group in self.param_groups:
            group["steps"] += 1


class Mu2Worker(_Worker):
    """A worker's corrected momentum: ``d_t = g_t + (1 - beta_t) (d_{t-1} - h_t)``, two gradients on one sample.

    ``g_t`` is the gradient at the parameters, ``h_t`` the gradient on the same sample where the parameters were at the
    step before.

    Parameters
    ----------
    params : iterable of torch.Tensor or of parameter groups
        The model's parameters; not moved (the server moves them).
    schedule : str
        "practical" or "theory", see `Schedule`.
    beta : float, optional
        A fixed value in (0, 1] instead of the schedule's.
    clip : float, optional
        Clip each gradient to this norm, of all parameters together, before it is used.

    Notes
    -----
    After ``step(closure)`` each ``p.grad`` holds the estimate, which the worker sends, or for a single worker
    `Mu2Server` uses as it is. The closure is called twice a step (once at the first, and where beta is 1), with the
    same state of torch's random numbers, so that dropout sees the same mask; what it does besides (BatchNorm's
    averages) it does twice. Memory: two copies of the parameters. ``state_dict`` resumes bit for bit.

    References
    ----------
    .. [1] Dahan and Levy, "Fault Tolerant ML: Efficient Meta-Aggregation and Synchronous Training", ICML 2024.

    Examples
    --------
    >>> model = torch.nn.Linear(3, 1)
    >>> worker, server = Mu2Worker(model.parameters()), Mu2Server(model.parameters(), lr=0.1)
    >>> images, labels = torch.ones(4, 3), torch.zeros(4, 1)
    >>> def closure():
    ...     worker.zero_grad()
    ...     loss = torch.nn.functional.mse_loss(model(images), labels)
    ...     loss.backward()
    ...     return loss
    >>> for _ in range(2):
    ...     loss = worker.step(closure)  # p.grad: what this worker sends
    ...     server.step()  # with p.grad: what the workers' estimates were combined to
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        schedule: str = "practical",
        beta: float | None = None,
        clip: float | None = None,
    ) -> None:
        super().__init__(params, clip, schedule=schedule, beta=beta)

    def _check_options(self, group: dict[str, Any]) -> None:
        super()._check_options(group)
        Schedule(group["schedule"], beta=group["beta"])

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Replace the gradients by the estimate; return the loss at the parameters.

        Parameters
        ----------
        closure : callable
            Clears the gradients, computes the loss of this step's sample and calls ``backward``; returns the loss.
        """
        if closure is None:
            raise ValueError("Mu2Worker: step needs a closure, because it takes two gradients on one sample; got None")
        self._check_same()
        group = self.param_groups[0]
        t = group["steps"] + 1
        keep = 1 - Schedule(group["schedule"], beta=group["beta"]).beta_at(t)
        parameters = self._parameters()
        before: list[torch.Tensor] | None = None
        here = [p.detach().clone() for p in parameters]
        evaluate = torch.enable_grad()(closure)
        if keep:  # otherwise nothing of the past is read: a NaN in it would stay for ever
            random = _random_state()
            self._move(parameters, [self.state[p]["previous"] for p in parameters])
            try:
                evaluate()
                before = self._gradients()
            finally:
                self._move(parameters, here)
            _restore_random_state(random)
        loss = evaluate()
        estimates = self._gradients()
        if before is not None:
            for p, estimate, correction in zip(parameters, estimates, before, strict=True):
                estimate.add_(self.state[p]["estimate"] - correction, alpha=keep)
        for p, point in zip(parameters, here, strict=True):
            self.state[p]["previous"] = point
        self._publish(estimates)
        return loss

    @staticmethod
    def _move(parameters: list[torch.Tensor], points: list[torch.Tensor]) -> None:
        with torch.no_grad():
            for p, point in zip(parameters, points, strict=True):
                p.copy_(point)


def _random_state() -> list[torch.Tensor]:
    in_use = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if in_use else [])]


def _restore_random_state(states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if states[1:]:
        torch.cuda.set_rng_state_all(states[1:])


class MomentumWorker(_Worker):
    """A worker's momentum ``m_t = b m_{t-1} + (1 - b) g_t``, started at the first gradient; b = 0 is SGD.

    Parameters
    ----------
    params : iterable of torch.Tensor or of parameter groups
        The model's parameters; not moved.
    momentum : float
        b, in [0, 1).
    clip : float, optional
        Clip each gradient to this norm, of all parameters together.

    Notes
    -----
    After ``backward`` and ``step`` each ``p.grad`` holds the momentum; the server's step is ``torch.optim.SGD``.
    """

    def __init__(self, params: Iterable[Any], *, momentum: float = 0.9, clip: float | None = None) -> None:
        super().__init__(params, clip, momentum=momentum)

    def _check_options(self, group: dict[str, Any]) -> None:
        super()._check_options(group)
        momentum = group["momentum"]
        if not (isinstance(momentum, (int, float)) and 0 <= momentum < 1):
            raise ValueError(f"MomentumWorker: momentum must be in [0, 1); got {momentum!r}")

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Replace the gradients by the momentum; with a closure call it first, and return its loss."""
        self._check_same()
        loss = None if closure is None else torch.enable_grad()(closure)()
        b = self.param_groups[0]["momentum"]
        estimates = self._gradients()
        if b and self.param_groups[0]["steps"]:  # without b nothing of the past is read: a NaN in it would stay
            for p, estimate in zip(self._parameters(), estimates, strict=True):
                estimate.mul_(1 - b).add_(self.state[p]["estimate"], alpha=b)
        self._publish(estimates)
        return loss


class Mu2Server(_Together):
    """The server's step: iterates w move along the aggregate, and the parameters are their weighted average x.

    ``w_{t+1} = proj(w_t - lr alpha_t d_t)`` and ``x_{t+1} = (1 - gamma_t) x_t + gamma_t w_{t+1}``, from w_1 = x_1.

    Parameters
    ----------
    params : iterable of torch.Tensor or of parameter groups
        The model's parameters, which hold x: where gradients are taken, and the result.
    lr : float
        Learning rate; with ``schedule="theory"`` it is multiplied with t.
    schedule : str
        "practical" or "theory", see `Schedule`.
    gamma : float, optional
        A fixed value in (0, 1] instead of the schedule's.
    radius : float, optional
        Project w onto the ball of this radius around the start (all parameters together).

    Notes
    -----
    ``step`` takes the aggregate from ``p.grad``; parameters whose gradient is None stay where they are; with
    `radius`, once they have moved, they are taken along as with a gradient of 0, so that all together stay in the ball.
    Memory: a copy of the parameters, two with `radius`. ``state_dict`` resumes bit for bit.

    References
    ----------
    .. [1] Dahan and Levy, "Fault Tolerant ML: Efficient Meta-Aggregation and Synchronous Training", ICML 2024.
    """

    OWN = ("lr",)

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        schedule: str = "practical",
        gamma: float | None = None,
        radius: float | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "schedule": schedule, "gamma": gamma, "radius": radius, "steps": 0})

    def _check_options(self, group: dict[str, Any]) -> None:
        Schedule(group["schedule"], gamma=group["gamma"])
        _check("Mu2Server", group["lr"], "lr", optional=False)
        _check("Mu2Server", group["radius"], "radius")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step along the aggregate in ``p.grad``; with a closure call it first, and return its loss."""
        self._check_same()
        loss = None if closure is None else torch.enable_grad()(closure)()
        self._check_rates()  # before anything has moved
        self._check_dense()
        radius = self.param_groups[0]["radius"]
        moved = []
        for group in self.param_groups:
            schedule = Schedule(group["schedule"], gamma=group["gamma"])
            group["steps"] += 1
            t = group["steps"]
            for p in group["params"]:
                if p.grad is None and (radius is None or p not in self.state):
                    continue
                state = self.state[p]
                if not state:
                    state["iterate"] = p.detach().clone()
                    if radius is not None:
                        state["start"] = p.detach().clone()
                moved.append((p, state, group["lr"] * schedule.alpha_at(t), schedule.gamma_at(t)))
        if radius is None or not self._project(moved, radius):
            for p, state, rate, _ in moved:
                if p.grad is not None:
                    state["iterate"].add_(p.grad, alpha=-rate)
        for p, state, _, gamma in moved:
            p.mul_(1 - gamma).add_(state["iterate"], alpha=gamma)
        return loss

    def _check_rates(self) -> None:
        for group in self.param_groups:
            t = group["steps"] + 1
            rate = group["lr"] * Schedule(group["schedule"]).alpha_at(t)
            for p in group["params"]:
                if p.grad is not None and rate > torch.finfo(p.dtype).max:
                    raise ValueError(
                        f"Mu2Server: the learning rate of step {t} is {rate:g} (lr={group['lr']:g}), more than "
                        f"{p.dtype} holds (lower lr)"
                    )

    @staticmethod
    def _project(moved: list[tuple[torch.Tensor, dict[str, torch.Tensor], float, float]], radius: float) -> bool:
        """Where the step leads out of the ball, take it to the ball's border, and return whether it does."""
        if not moved:
            return False
        large = max(1.0, *(rate for _, _, rate, _ in moved))  # divided by it the step does not overflow
        away = []
        for p, state, rate, _ in moved:
            wide = torch.promote_types(p.dtype, torch.float32)  # of 16 bits the division would leave too few
            a = (state["iterate"].to(wide) - state["start"]).div_(large)
            away.append(a if p.grad is None else a.add_(p.grad, alpha=-rate / large))
        norm = _norm(away)
        if not norm > radius / large:
            return False
        for (_, state, _, _), a in zip(moved, away, strict=True):
            torch.add(state["start"], a.mul_(radius / norm), out=state["iterate"])
        return True
