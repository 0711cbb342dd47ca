"""What Byzantine workers send. They are omniscient: they see the honest vectors of the round."""

from __future__ import annotations

import ast
import dataclasses
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from robustkern.rules.text import make

__all__ = ["ATTACKS", "Attack", "Situation", "alie_z", "available_attacks", "parse_attack"]

Rows = NDArray[Any]
Vector = NDArray[Any]


@dataclass(frozen=True)
class Situation:
    """What attackers know of a round.

    Parameters
    ----------
    n, f : int
        Workers, and Byzantine ones among them, that training began with.
    alive : int
        Byzantine workers that are left.
    workers : tuple of int
        Whose vectors are asked for: some of the Byzantine workers.
    seed : tuple of int
        Of the round.
    aggregate : callable
        What the server makes of the honest vectors followed by those of the Byzantine workers that are left.
    weights : (h + alive,) int, optional
        Of all workers in the rule, the honest ones first, where they are not equal: how many updates each has made.
    """

    n: int
    f: int
    alive: int
    workers: tuple[int, ...]
    seed: tuple[int, ...]
    aggregate: Callable[[Sequence[Vector]], Vector]
    weights: NDArray[np.int64] | None = None

    def mean(self, honest: Rows) -> Vector:
        """Return the mean of the honest vectors as the rule weighs them, float64."""
        if self.weights is None:
            return np.asarray(honest.mean(axis=0, dtype=np.float64))
        return np.asarray(np.average(honest, axis=0, weights=self.weights[: len(honest)]))


@dataclass(frozen=True)
class Attack(ABC):
    """A frozen description of an attack; ``str`` of it is its text form."""

    name: ClassVar[str]
    #: Whether attackers train like honest workers first, and then send something made of their own vectors.
    trains: ClassVar[bool] = False
    #: Whether attackers train on wrong labels, C - 1 - y.
    flips_labels: ClassVar[bool] = False
    #: Whether they look at the honest vectors.
    looks: ClassVar[bool] = True

    def __str__(self) -> str:
        """Return the text form, which `parse_attack` reads back."""
        changed = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        inside = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in changed)
        return self.name + (f"({inside})" if inside else "")

    @abstractmethod
    def send(self, own: Rows, honest: Rows, situation: Situation) -> Rows:
        """Return what the situation's workers send.

        Parameters
        ----------
        own : (k, d) array
            Their own vectors where the attack `trains`; not modified.
        honest : (h, d) array
            The honest workers' vectors where it `looks`; not modified.
        situation : Situation
            The round.

        Returns
        -------
        (k, d) array
            May be read-only, and one vector k times over.
        """

    def _same(self, vector: Vector, honest: Rows, situation: Situation) -> Rows:
        return np.broadcast_to(vector.astype(honest.dtype), (len(situation.workers), len(vector)))


def _finite(attack: Attack, name: str, least: float | None = None) -> None:
    value = getattr(attack, name)
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if not good or (least is not None and value < least):
        wanted = "a finite number" if least is None else f"a finite number of at least {least:g}"
        raise ValueError(f"{attack.name}: {name} must be {wanted}; got {value!r}")


@dataclass(frozen=True)
class NoAttack(Attack):
    """Byzantine workers behave."""

    name: ClassVar[str] = "none"
    trains: ClassVar[bool] = True
    looks: ClassVar[bool] = False

    def send(self, own: Rows, honest: Rows, situation: Situation) -> Rows:
        """Return their own vectors."""
        return own


@dataclass(frozen=True)
class SignFlip(Attack):
    """They send minus their own vector, times `scale`."""

    scale: float = 1.0

    name: ClassVar[str] = "sign_flip"
    trains: ClassVar[bool] = True
    looks: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the parameters."""
        _finite(self, "scale")

    def send(self, own: Rows, honest: Rows, situation: Situation) -> Rows:
        """Return ``-scale * own``."""
        return -own if self.scale == 1 else (-self.scale * own).astype(own.dtype)


@dataclass(frozen=True)
class LabelFlip(NoAttack):
    """They train on labels C - 1 - y and send what comes of it."""

    name: ClassVar[str] = "label_flip"
    flips_labels: ClassVar[bool] = True


@dataclass(frozen=True)
class IPM(Attack):
    """Inner product manipulation: all send ``-epsilon`` times the honest mean (Xie et al. 2020)."""

    epsilon: float = 0.5

    name: ClassVar[str] = "ipm"

    def __post_init__(self) -> None:
        """Check the parameters."""
        _finite(self, "epsilon")

    def send(self, own: Rows, honest: Rows, situation: Situation) -> Rows:
        """Return copies of one vector."""
        return self._same(-self.epsilon * situation.mean(honest), honest, situation)


def alie_z(n: int, f: int) -> float:
    """Return how many standard deviations a little is enough: the normal quantile of (n - f - s) / (n - f).

    ``s = floor(n/2 + 1) - f`` honest workers are what f attackers need to be a majority with; 1.2206 for n = 17, f = 8,
    and negative where the attackers are few.

    Parameters
    ----------
    n, f : int
        Workers, and Byzantine ones among them; ``1 <= f``, ``2 f < n``.

    References
    ----------
    .. [1] Baruch, Baruch and Goldberg, "A Little Is Enough: Circumventing Defenses For Distributed Learning", NeurIPS
       2019.
    """
    if not 1 <= f < n / 2:
        raise ValueError(f"alie: f must be at least 1 and 2*f below n; got f={f} with n={n} workers")
    return NormalDist().inv_cdf((n - f - (n // 2 + 1 - f)) / (n - f))


@dataclass(frozen=True)
class ALIE(Attack):
    """A little is enough: all send the honest mean minus z standard deviations of each coordinate (ddof 1).

    Where workers have weights, mean and deviations (these without the ddof) are weighted, and z counts updates.

    Parameters
    ----------
    z : float, optional
        Default: `alie_z` of n and f.
    """

    z: float | None = None

    name: ClassVar[str] = "alie"

    def __post_init__(self) -> None:
        """Check the parameters."""
        if self.z is not None:
            _finite(self, "z")

    def send(self, own: Rows, honest: Rows, situation: Situation) -> Rows:
        """Return copies of one vector."""
        mean, spread = _mean_and_std(honest, situation)
        return self._same(mean - self._z(situation) * spread, honest, situation)

    def _z(self, situation: Situation) -> float:
        if self.z is not None:
            return self.z
        if situation.weights is None:
            return alie_z(situation.n, situation.f)
        total = int(situation.weights.sum())
        return alie_z(total, int(situation.weights[len(situation.weights) - situation.alive :].sum()))


def _mean_and_std(honest: Rows, situation: Situation) -> tuple[Vector, Vector]:
    mean = situation.mean(honest)
    if len(honest) < 2:
        return mean, np.zeros_like(mean)
    if situation.weights is None:
        return mean, honest.std(axis=0, ddof=1, dtype=np.float64)
    return mean, np.sqrt(np.average((honest - mean) ** 2, axis=0, weights=situation.weights[: len(honest)]))


@dataclass(frozen=True)
class Mimic(Attack):
    """All copy one honest worker, whose share of the data then counts for more (Karimireddy et al. 2022).

    Parameters
    ----------
    worker : int
        Which one, counted among the honest workers; beyond the last one: the last one.
    """

    worker: int = 0

    name: ClassVar[str] = "mimic"

    def __post_init__(self) -> None:
        """Check the parameters."""
        if isinstance(self.worker, bool) or not isinstance(self.worker, int) or self.worker < 0:
            raise ValueError(f"mimic: worker must be an integer of at least 0; got {self.worker!r}")

    def send(self, own: Rows, honest: Rows, situation: Situation) -> Rows:
        """Return copies of the worker's vector."""
        return self._same(honest[min(self.worker, len(honest) - 1)], honest, situation)


@dataclass(frozen=True)
class Gaussian(Attack):
    """Each sends normal noise of standard deviation `sigma` in every coordinate."""

    sigma: float = 10.0

    name: ClassVar[str] = "gaussian"

    def __post_init__(self) -> None:
        """Check the parameters."""
        _finite(self, "sigma", 0)

    def send(self, own: Rows, honest: Rows, situation: Situation) -> Rows:
        """Return noise that depends on the round and the worker only."""
        noise = [
            np.random.default_rng([*situation.seed, worker]).standard_normal(honest.shape[1]) * self.sigma
            for worker in situation.workers
        ]
        return np.array(noise).astype(honest.dtype)


@dataclass(frozen=True)
class Bomb(Attack):
    """The honest mean with a NaN or infinite value in a share of the coordinates, in one at least.

    Parameters
    ----------
    value : str
        "nan", "inf" or "-inf".
    share : float
        In (0, 1].
    """

    value: str = "nan"
    share: float = 1.0

    name: ClassVar[str] = "bomb"

    def __post_init__(self) -> None:
        """Check the parameters."""
        if self.value not in ("nan", "inf", "-inf"):
            raise ValueError(f"bomb: value must be 'nan', 'inf' or '-inf'; got {self.value!r}")
        _finite(self, "share", 0)
        if not 0 < self.share <= 1:
            raise ValueError(f"bomb: share must be in (0, 1]; got {self.share!r}")

    def send(self, own: Rows, honest: Rows, situation: Situation) -> Rows:
        """Return copies of one vector."""
        vector = situation.mean(honest)
        vector[: max(round(self.share * len(vector)), 1)] = float(self.value)
        return self._same(vector, honest, situation)


@dataclass(frozen=True)
class Optimised(Attack):
    """ALIE or IPM of the strength that moves the aggregate farthest from the honest mean, found anew each round.

    All send ``mean + strength * direction``, where the direction is minus the standard deviations ("alie") or minus the
    mean ("ipm"; both: the better one). The strength is searched against the rule in use: powers of two first, then
    between the neighbours of the best (Shejwalkar and Houmansadr 2021).

    Parameters
    ----------
    direction : str
        "alie", "ipm" or "both".
    steps : int
        Aggregations for the second part of the search, for each direction; 12 go before.
    """

    direction: str = "both"
    steps: int = 6

    name: ClassVar[str] = "optimised"

    def __post_init__(self) -> None:
        """Check the parameters."""
        if self.direction not in ("alie", "ipm", "both"):
            raise ValueError(f"optimised: direction must be 'alie', 'ipm' or 'both'; got {self.direction!r}")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 0:
            raise ValueError(f"optimised: steps must be an integer of at least 0; got {self.steps!r}")

    def send(self, own: Rows, honest: Rows, situation: Situation) -> Rows:
        """Return copies of the vector that did most harm."""
        mean, spread = _mean_and_std(honest, situation)
        best: tuple[float, Vector] = (-1.0, mean)
        for name, direction in (("alie", -spread), ("ipm", -mean)):
            if self.direction in (name, "both"):
                best = max(best, self._search(mean, direction, honest, situation), key=lambda found: found[0])
        return self._same(best[1], honest, situation)

    def _search(self, mean: Vector, direction: Vector, honest: Rows, situation: Situation) -> tuple[float, Vector]:
        def harm(strength: float) -> float:
            sent = (mean + strength * direction).astype(honest.dtype)
            moved = float(np.linalg.norm(situation.aggregate([*honest, *[sent] * situation.alive]) - mean))
            return moved if math.isfinite(moved) else -1.0

        found = {strength: harm(strength) for strength in (2.0**k for k in range(-4, 8))}
        for _ in range(self.steps):
            tried = sorted(found)
            at = tried.index(max(found, key=found.__getitem__))
            low, best, high = tried[max(at - 1, 0)], tried[at], tried[min(at + 1, len(tried) - 1)]
            middle = (best + high) / 2 if high - best >= best - low else (low + best) / 2
            if middle in found:
                break
            found[middle] = harm(middle)
        strength = max(found, key=found.__getitem__)
        return found[strength], mean + strength * direction


#: By name; "nan" and "inf" are bombs.
ATTACKS: dict[str, type[Attack]] = {
    kind.name: kind for kind in (NoAttack, SignFlip, LabelFlip, IPM, ALIE, Mimic, Gaussian, Bomb, Optimised)
}
_SHORT: dict[str, Attack] = {"nan": Bomb("nan"), "inf": Bomb("inf")}


def available_attacks() -> tuple[str, ...]:
    """Return the names that `parse_attack` knows."""
    return tuple(sorted([*ATTACKS, *_SHORT]))


def parse_attack(text: str, /) -> Attack:
    """Read the text form of an attack: a name, or a call with literal arguments such as ``"ipm(epsilon=0.1)"``.

    Raises
    ------
    ValueError
        If the text is no attack; the message says what is known.
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
        if isinstance(node, ast.Name):
            name, arguments, options = node.id, [], {}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            name, arguments = node.func.id, [ast.literal_eval(a) for a in node.args]
            options = {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
            if len(options) < len(node.keywords):
                raise ValueError("a parameter is there twice")
        else:
            raise ValueError("neither a name nor a call")
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"attack: {text[:100]!r} is not in Python call syntax, such as 'ipm(epsilon=0.1)' ({error})"
        ) from None
    if name in _SHORT and not arguments and not options:
        return _SHORT[name]
    return make("attack", available_attacks(), ATTACKS, name, arguments, options)
