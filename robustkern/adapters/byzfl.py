"""ByzFL's aggregators, pre-aggregators and attacks (0.0.11): same names, parameters, state and errors.

``from robustkern.adapters.byzfl import TrMean, NNM, RobustAggregator`` instead of from ``byzfl``. What differs, unless
`strict` is set:

- torch tensors keep their dtype (there all become float32), and so does `Inf` (float64 there);
- a row with NaN or Inf counts as one of the f bad ones, and more of them are a `NonFiniteError` (there they poison the
  result, or drop out in the geometric median only);
- `Clipping` and `ARC` leave their argument alone (there they write it), `Krum` and `CenteredClipping` return memory of
  their own;
- `CAF` and `SMEA` take exact eigenvectors, so that equal calls give equal results (there a step from a random vector);
  `CAF` refuses more than 256 rows and returns the mean for f = 0 (there None); `SMEA` and `MDA` refuse n and f that
  would take too long;
- `CenteredClipping` takes a centre (there ``m=`` always raises);
- equally near rows go to the lowest index (there to whatever a partition leaves first).

With ``robustkern.adapters.byzfl.strict = True`` dtypes, writing of arguments and the centre that is refused are as
there; the rest stays, because it cannot be otherwise: randomness, NaN and ties.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from array_api_compat import array_namespace, is_torch_array

from robustkern import rules
from robustkern.functions import aggregate, mix
from robustkern.kernels import row_sq_distances
from robustkern.rules import Aggregator, Mixer

__all__ = [
    "ARC",
    "CAF",
    "MDA",
    "NNM",
    "SMEA",
    "ALittleIsEnough",
    "Average",
    "Bucketing",
    "CenteredClipping",
    "Clipping",
    "Gaussian",
    "GeometricMedian",
    "Inf",
    "InnerProductManipulation",
    "Krum",
    "Meamed",
    "Median",
    "Mimic",
    "MoNNA",
    "MultiKrum",
    "Optimal_ALittleIsEnough",
    "Optimal_InnerProductManipulation",
    "RobustAggregator",
    "SignFlipping",
    "TrMean",
]

#: Whether dtypes, writing of arguments and refusals are those of ByzFL.
strict = False


# ---- vectors ---------------------------------------------------------------------------------------------------------


def _vectors(vectors: Any) -> Any:
    """Return n vectors in one array or tensor of floats, as ByzFL stacks them."""
    first = vectors[0] if isinstance(vectors, list) and vectors else vectors
    if not isinstance(vectors, (list, np.ndarray)) and not is_torch_array(vectors):
        first = None
    if isinstance(first, np.ndarray):
        x = np.array(vectors) if isinstance(vectors, list) else vectors
        return x.astype(np.float64) if x.dtype.kind in "biu" else x
    if is_torch_array(first):
        import torch

        x = torch.stack(vectors) if isinstance(vectors, list) else vectors
        return x.float() if strict or not (x.is_floating_point() or x.is_complex()) else x
    raise TypeError(
        "'vectors' should be a 'list' of ('np.ndarray' or 'torch.Tensor') or 'np.ndarray' or 'torch.Tensor'"
    )


def _check_some(n: int) -> None:
    if not n:
        raise ValueError("'vectors' must hold at least one vector; got none")


def _wants_gradients(x: Any) -> bool:
    if not is_torch_array(x) or not x.requires_grad:
        return False
    import torch

    return torch.is_grad_enabled()


def _combined(x: Any, rule: Aggregator, f: int | None = None, centre: Any = None) -> Any:
    """Apply a rule to stacked vectors of any number of axes; gradients flow where torch records them."""
    flat = x[:, None] if x.ndim == 1 else x
    if _wants_gradients(x):
        from robustkern.adapters.torch import aggregate as recorded

        result = recorded(flat, rule, f=f, centre=centre)
    else:
        result = aggregate(flat, rule, f=f, centre=centre)
    return result[0] if x.ndim == 1 else result


def _mixed(x: Any, mixer: Mixer, f: int | None) -> Any:
    """Apply a mixer to stacked vectors; gradients flow where torch records them."""
    if not _wants_gradients(x):
        return mix(x, mixer, f=f)
    from robustkern.adapters.mixing import recorded_mix

    return recorded_mix(x, mixer, f)


def _zeros_like(x: Any) -> Any:
    if is_torch_array(x):
        import torch

        return torch.zeros_like(x)
    return np.zeros_like(x)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and value >= 0


def _check_f(f: Any) -> None:
    if not _whole(f):
        raise ValueError("f must be a non-negative integer")


def _check_half(f: int, n: int) -> None:
    if 2 * f >= n:
        raise ValueError(f"Cannot tolerate 2f ≥ n. Got f={f}, n={n}")


# ---- aggregators -----------------------------------------------------------------------------------------------------


class _Aggregator(ABC):
    """A rule of n and f, and how it is called."""

    f: int

    @abstractmethod
    def _rule(self, n: int) -> Aggregator:
        """Return the rule for n vectors."""

    def _check(self, n: int) -> None:
        """Raise what ByzFL raises at the call."""
        _check_half(getattr(self, "f", 0), n)

    def __call__(self, vectors: Any) -> Any:
        """Combine n vectors into one."""
        x = _vectors(vectors)
        self._check(len(x))
        return _combined(x, self._rule(len(x)), getattr(self, "f", None))


class _WithF(_Aggregator):
    def __init__(self, f: int = 0) -> None:
        _check_f(f)
        self.f = f


class Average(_Aggregator):
    """Mean; one read of the data."""

    def _rule(self, n: int) -> Aggregator:
        return rules.Mean()


class Median(_Aggregator):
    """Coordinate-wise median, of an even number the mean of the two middle values; one read of the data."""

    def _rule(self, n: int) -> Aggregator:
        return rules.Median()


class TrMean(_WithF):
    """Coordinate-wise mean without the f smallest and largest values; one read of the data."""

    def _rule(self, n: int) -> Aggregator:
        return rules.TrimmedMean()


class GeometricMedian(_Aggregator):
    """T smoothed Weiszfeld steps from zero; two reads of the data."""

    def __init__(self, nu: float = 0.1, T: int = 3) -> None:
        if not isinstance(nu, float):
            raise TypeError("f must be a float")
        if not _whole(T):
            raise ValueError("T must be a non-negative integer")
        self.nu, self.T = nu, T

    def _rule(self, n: int) -> Aggregator:
        return rules.GeometricMedian(max(self.nu, 0.0), self.T, "zero")


class Krum(_WithF):
    """The row with the least sum of squared distances to its n-f-1 nearest others; two reads of the data at most."""

    def _rule(self, n: int) -> Aggregator:
        return rules.Krum(n - self.f - 1)


class MultiKrum(_WithF):
    """Mean of the n-f rows of best Krum score; two reads of the data at most."""

    def _rule(self, n: int) -> Aggregator:
        return rules.MultiKrum(n - self.f, n - self.f - 1)


class CenteredClipping(_Aggregator):
    """L steps from the last result, each the mean of the differences to it, cut to length tau; two reads."""

    def __init__(self, m: Any = None, L: int = 1, tau: float = 100.0) -> None:
        known = isinstance(m, np.ndarray) or is_torch_array(m)
        if m is not None and (strict or not known):
            raise TypeError("m must be of type np.ndarray or torch.Tensor")
        if known and not bool(array_namespace(m).isfinite(m).all()):
            raise ValueError("m must hold finite numbers, but got NaN or Inf in it (leave it out to start from zero)")
        if not _whole(L):
            raise ValueError("L must be a non-negative integer")
        if not isinstance(tau, float) or tau < 0:
            raise ValueError("tau must be a non-negative float")
        self.m, self.L, self.tau = m, L, tau

    def _rule(self, n: int) -> Aggregator:
        return rules.CentredClipping(self.tau, self.L)

    def __call__(self, vectors: Any) -> Any:
        """Combine n vectors into one, which the next call starts from."""
        x = _vectors(vectors)
        _check_some(len(x))
        if self.m is None:
            self.m = _zeros_like(x[0])
        if self.L > 0 and self.tau > 0:
            self.m = _combined(x, self._rule(len(x)), centre=self.m)
        return self.m if strict else self.m + 0


class MDA(_WithF):
    """Mean of the n-f rows of smallest diameter; two reads of the data at most."""

    def _rule(self, n: int) -> Aggregator:
        return rules.MDA()


class MoNNA(_Aggregator):
    """Mean of the n-f rows nearest to row idx; two reads of the data at most."""

    def __init__(self, f: int = 0, idx: int = 0) -> None:
        _check_f(f)
        if not _whole(idx):
            raise ValueError("idx must be a non-negative integer")
        self.f, self.idx = f, idx

    def _check(self, n: int) -> None:
        super()._check(n)
        if self.idx >= n:
            raise ValueError(f"idx must be smaller than n, but got idx={self.idx} and n={n}")

    def _rule(self, n: int) -> Aggregator:
        return rules.MoNNA(int(self.idx))


class Meamed(_WithF):
    """Coordinate-wise mean of the n-f values nearest to the median; one read of the data."""

    def _rule(self, n: int) -> Aggregator:
        return rules.MeanAroundMedian(n - self.f)


class CAF(_WithF):
    """Mean by weights that fall along the direction of largest spread; two reads of the data."""

    def _rule(self, n: int) -> Aggregator:
        return rules.CAF()


class SMEA(_WithF):
    """Mean of the n-f rows of smallest largest eigenvalue; two reads of the data."""

    def _check(self, n: int) -> None:
        if 2 * self.f >= n:
            raise ValueError(f"Too many Byzantine clients (2f >= n). Got f={self.f}, n={n}")

    def _rule(self, n: int) -> Aggregator:
        return rules.SMEA()


# ---- pre-aggregators -------------------------------------------------------------------------------------------------


class _PreAggregator(ABC):
    @abstractmethod
    def _mixer(self, x: Any) -> Mixer | None:
        """Return the rule for these vectors, None where no rule of ours has such parameters."""

    def __call__(self, vectors: Any) -> Any:
        """Return the vectors, mixed or shortened, in one array."""
        x = _vectors(vectors)
        mixer = self._mixer(x)
        return _zeros_like(x) if mixer is None else _mixed(x, mixer, _tolerated(self, len(x)))


def _tolerated(step: Any, n: int) -> int:
    """Return how many of n vectors may be bad, as far as rules take it."""
    return min(getattr(step, "f", (n - 1) // 2), (n - 1) // 2)


class NNM(_PreAggregator):
    """Each row becomes the mean of its n-f nearest, itself included; two reads of the data, one write."""

    def __init__(self, f: int = 0) -> None:
        _check_f(f)
        self.f = f

    def _mixer(self, x: Any) -> Mixer:
        if self.f >= len(x):
            raise ValueError(f"f must be smaller than len(vectors), but got f={self.f} and len(vectors)={len(x)}")
        return rules.NNM(len(x) - self.f)


class Bucketing(_PreAggregator):
    """Means of buckets of s rows, in an order from the global generator of NumPy or torch; one read, one write."""

    def __init__(self, s: int = 1) -> None:
        if not isinstance(s, int) or s < 1:
            raise ValueError("f must be a positive integer")
        self.s = s

    def _mixer(self, x: Any) -> Mixer:
        if is_torch_array(x):
            import torch

            order = torch.randperm(len(x)).tolist()
        else:
            order = np.random.permutation(len(x)).tolist()  # noqa: NPY002 - as ByzFL draws
        return rules.Bucketing(int(self.s), order=tuple(order))


class _Shortening(_PreAggregator):
    @abstractmethod
    def _limit(self, norms: Any) -> Any:
        """Return what norms are brought to, of a tensor of them."""

    def _recorded(self, x: Any) -> Any:
        """Shorten by torch's own operations, through which gradients flow; rows that are not finite stay as they are.

        What does not count is replaced before it is divided by: its gradient would be 0 times NaN.
        """
        import torch

        _check_some(len(x))
        flat = x.reshape(len(x), -1)
        finite = flat.isfinite().all(dim=1)
        norms = torch.linalg.vector_norm(
            flat.where(finite[:, None], flat.new_zeros(())), dim=1, dtype=torch.promote_types(x.dtype, torch.float64)
        )
        limit = self._limit(norms.where(finite, norms.new_tensor(math.inf)))
        longer = finite & (norms > limit)
        ones = torch.ones_like(norms)
        shares = (limit / norms.where(longer, ones)).where(longer, ones)
        return (x * shares.reshape(-1, *[1] * (x.ndim - 1))).to(x.dtype)

    def __call__(self, vectors: Any) -> Any:
        """Return the vectors, of which some are shortened."""
        x = _vectors(vectors)
        result = self._recorded(x) if _wants_gradients(x) else super().__call__(x)
        if strict and (isinstance(vectors, np.ndarray) or vectors is x):
            vectors[...] = result
            return vectors
        return result


class Clipping(_Shortening):
    """Rows longer than c are shortened to it; two reads of the data, one write."""

    def __init__(self, c: float = 2.0) -> None:
        if not isinstance(c, float) or c < 0:
            raise ValueError("c must be a non-negative float")
        self.c = c

    def _mixer(self, x: Any) -> Mixer | None:
        return rules.Clipping(float(self.c)) if self.c > 0 else None

    def _limit(self, norms: Any) -> Any:
        return norms.new_tensor(self.c)


class ARC(_Shortening):
    """The int((2f/n)(n-f)) longest rows are shortened to the next one; two reads of the data, one write."""

    def __init__(self, f: int = 0) -> None:
        _check_f(f)
        self.f = f

    def _check(self, n: int) -> None:
        _check_some(n)
        if self.f > n:
            raise ValueError(f"f must be smaller than len(vectors)+1, but got f={self.f} and len(vectors)={n}")

    def _limit(self, norms: Any) -> Any:
        n = len(norms)
        self._check(n)
        return norms.sort().values[n - int((2 * self.f / n) * (n - self.f)) - 1]

    def _mixer(self, x: Any) -> Mixer | None:
        n = len(x)
        self._check(n)
        if 2 * self.f < n:
            return rules.ARC()
        lengths = np.sqrt(row_sq_distances(x, None))
        norms = np.sort(np.where(np.isnan(lengths), np.inf, lengths))
        limit = float(norms[n - int((2 * self.f / n) * (n - self.f)) - 1])
        if limit == math.inf:  # nothing is longer: each row stays alone
            return rules.Bucketing(1, order=tuple(range(n)))
        return rules.Clipping(limit) if limit > 0 else None


# ---- aggregators behind pre-aggregators ------------------------------------------------------------------------------


class RobustAggregator:
    """Pre-aggregators, then an aggregator, by name: ``{"name": "TrMean", "parameters": {"f": 2}}``.

    What has a chain of rules (all but `CenteredClipping`) reads the data twice and stores no mixed vectors.
    """

    def __init__(self, aggregator_info: dict[str, Any], pre_agg_list: Sequence[dict[str, Any]] = []) -> None:
        if not isinstance(aggregator_info, dict):
            raise TypeError(f"'aggregator_info' must be of type dict, but got {type(aggregator_info).__name__}")
        if not isinstance(pre_agg_list, list) or not all(isinstance(info, dict) for info in pre_agg_list):
            raise TypeError("'pre_agg_list' must be must be a list of dict")
        self.aggregator = _made(aggregator_info, _AGGREGATORS, "aggregators")
        self.pre_agg_list = [_made(info, _PRE_AGGREGATORS, "preaggregators") for info in pre_agg_list]

    def aggregate_vectors(self, vectors: Any) -> Any:
        """Combine n vectors into one."""
        x = _vectors(vectors)
        chain = None if strict else self._chain(x)
        if chain is None:
            for step in self.pre_agg_list:
                vectors = step(vectors)
            return self.aggregator(vectors)
        return _combined(x, chain, getattr(self.aggregator, "f", None))

    def _chain(self, x: Any) -> Aggregator | None:
        """Return one rule for everything, None where it takes several calls."""
        if not self.pre_agg_list or x.ndim < 2 or isinstance(self.aggregator, CenteredClipping):
            return None
        f = getattr(self.aggregator, "f", None)
        if any(isinstance(step, (ARC, Bucketing)) for step in self.pre_agg_list[1:]):
            return None  # they look at the rows before them
        if any(isinstance(step, ARC) and step.f != f for step in self.pre_agg_list):
            return None
        n, steps = len(x), []
        for step in self.pre_agg_list:
            mixer = step._mixer(x[:n])
            if mixer is None:
                return None
            steps.append(mixer)
            n = mixer.rows_after(n, f)
        self.aggregator._check(n)
        rule: Aggregator = rules.Chain((*steps, self.aggregator._rule(n)))
        return rule


def _made(info: dict[str, Any], classes: dict[str, Any], module: str) -> Any:
    name = info["name"]
    if name not in classes:
        raise AttributeError(f"module 'byzfl.aggregators.{module}' has no attribute {name!r}")
    known = inspect.signature(classes[name].__init__).parameters
    return classes[name](**{key: value for key, value in info["parameters"].items() if key in known})


_DEFENCE = Average()

_AGGREGATORS = {
    made.__name__: made
    for made in (
        Average,
        Median,
        TrMean,
        GeometricMedian,
        Krum,
        MultiKrum,
        CenteredClipping,
        MDA,
        MoNNA,
        Meamed,
        CAF,
        SMEA,
    )
}
_PRE_AGGREGATORS = {made.__name__: made for made in (NNM, Bucketing, Clipping, ARC)}


# ---- attacks ---------------------------------------------------------------------------------------------------------


def _mean(honest_vectors: Any) -> Any:
    return _combined(_vectors(honest_vectors), rules.Mean())


def _check_float(name: str, value: Any) -> None:
    if not isinstance(value, float):
        raise TypeError(f"{name} must be a float.")


class SignFlipping:
    """The mean of the honest vectors, negated."""

    def __call__(self, honest_vectors: Any) -> Any:
        """Return what every attacker sends."""
        return -_mean(honest_vectors)


class InnerProductManipulation:
    """The mean of the honest vectors times -tau."""

    def __init__(self, tau: float = 2.0) -> None:
        _check_float("tau", tau)
        self.tau = tau

    def __call__(self, honest_vectors: Any) -> Any:
        """Return what every attacker sends."""
        return _mean(honest_vectors) * -self.tau


class ALittleIsEnough:
    """The mean of the honest vectors plus tau standard deviations (of n-1)."""

    def __init__(self, tau: float = 1.5) -> None:
        _check_float("tau", tau)
        self.tau = tau

    def __call__(self, honest_vectors: Any) -> Any:
        """Return what every attacker sends."""
        x = _vectors(honest_vectors)
        spread = x.std(dim=0, correction=1) if is_torch_array(x) else x.std(axis=0, ddof=1)
        return _mean(x) + self.tau * spread


class Mimic:
    """The honest vector number epsilon."""

    def __init__(self, epsilon: int = 0) -> None:
        if not _whole(epsilon):
            raise ValueError("epsilon must be a non-negative int.")
        self.epsilon = epsilon

    def __call__(self, honest_vectors: Any) -> Any:
        """Return what every attacker sends."""
        n = len(honest_vectors)
        if self.epsilon >= n:
            raise ValueError(
                "epsilon must be smaller than len(honest_vectors), but got "
                f"epsilon={self.epsilon} and len(honest_vectors)={n}"
            )
        return honest_vectors[self.epsilon]


class Inf:
    """Infinity in every coordinate."""

    def __call__(self, honest_vectors: Any) -> Any:
        """Return what every attacker sends."""
        row = _vectors(honest_vectors)[0]
        if is_torch_array(row):
            import torch

            return torch.full_like(row, float("inf"), dtype=torch.float64 if strict else None)
        return np.full_like(row, np.inf, dtype=np.float64 if strict else None)


class Gaussian:
    """Normal numbers from the global generator of NumPy or torch."""

    def __init__(self, mu: float = 0.0, sigma: float = 1.0) -> None:
        _check_float("mu", mu)
        if not isinstance(sigma, float) or sigma < 0:
            raise ValueError("sigma must be a non-negative float.")
        self.mu, self.sigma = mu, sigma

    def __call__(self, honest_vectors: Any) -> Any:
        """Return what every attacker sends."""
        x = _vectors(honest_vectors)
        if is_torch_array(x):
            import torch

            drawn = torch.randn(x.shape[1]) * self.sigma + self.mu
            return drawn if strict else drawn.to(x)
        drawn = np.random.normal(loc=self.mu, scale=self.sigma, size=x.shape[1])  # noqa: NPY002 - as ByzFL draws
        return drawn if strict else drawn.astype(x.dtype)


class _Optimal:
    """The attack whose strength leads a defence farthest from the honest mean, by a line search."""

    _attack: Callable[[float], Any]

    def __init__(
        self,
        agg: Callable[[Any], Any] = _DEFENCE,
        pre_agg_list: Sequence[Callable[[Any], Any]] = [Clipping()],
        f: int = 1,
        evals: int = 20,
        start: float = 0.0,
        delta: float = 10.0,
        ratio: float = 0.8,
    ) -> None:
        _check_f(f)
        if not isinstance(evals, int) or evals <= 0:
            raise ValueError("evals must be a positive integer")
        if not isinstance(start, float):
            raise ValueError("start must be a float.")
        if not isinstance(delta, float) or delta == 0:
            raise ValueError("delta must be a non-zero float.")
        if not isinstance(ratio, float) or not 0.5 < ratio < 1:
            raise ValueError("ratio must be a float in (0.5, 1) exclusive.")
        self.agg, self.pre_agg_list, self.f, self.evals = agg, pre_agg_list, f, evals
        self.start, self.delta, self.ratio = start, delta, ratio

    def _evaluate(self, honest_vectors: Any, avg_honest_vector: Any, current_tau: float) -> float:
        """Return how far the defence ends from the honest mean."""
        attack = self._attack(current_tau)(honest_vectors)
        vectors: Any
        if is_torch_array(honest_vectors):
            import torch

            vectors = torch.cat([honest_vectors, attack.expand(self.f, *attack.shape)])
        else:
            vectors = np.concatenate([honest_vectors, np.broadcast_to(attack, (self.f, *attack.shape))])
        for step in self.pre_agg_list:
            vectors = step(vectors)
        away = self.agg(vectors) - avg_honest_vector
        return math.sqrt(float((away * away).sum()))

    def __call__(self, honest_vectors: Any) -> Any:
        """Return what every attacker sends: the best of `evals` strengths."""
        x = _vectors(honest_vectors)
        mean, left = _mean(x), self.evals
        tau, step = self.start, self.delta
        best = self._evaluate(x, mean, tau)
        left -= 1
        growing = True
        while left > 0:
            found = self._evaluate(x, mean, tau + step)
            left -= 1
            better = found > best
            if better:
                tau, best = tau + step, found
            growing = growing and better
            step *= 2 if growing else self.ratio
        return self._attack(tau)(honest_vectors)


class Optimal_InnerProductManipulation(_Optimal):
    """`InnerProductManipulation` of the strength that does most harm."""

    _attack = InnerProductManipulation


class Optimal_ALittleIsEnough(_Optimal):
    """`ALittleIsEnough` of the strength that does most harm."""

    _attack = ALittleIsEnough
