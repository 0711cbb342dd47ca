"""The aggregators of ``krum`` 0.9: stateless classes with ``aggregate(gradients, /, out=None, *, n=, f=, ...)``.

``from robustkern.adapters.krum import MultiKrum`` instead of from ``krum.primitives.aggregators.multikrum``: same
keywords, checks and results, gradients included. What differs: a row with NaN or Inf counts as one of the f bad ones in
all but `Average` (there it poisons medians and the geometric median); a pivot with one is refused (there the first rows
are the nearest to it); equal distances go to the lowest index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from robustkern.adapters import needs

with needs("torch"):
    import torch
    from torch import Tensor

from robustkern import kernels, rules
from robustkern.adapters.mixing import recorded_mix
from robustkern.adapters.torch import aggregate as recorded
from robustkern.errors import NonFiniteError
from robustkern.functions import aggregate
from robustkern.rules import Aggregator as Rule
from robustkern.rules import Chain, Mixer, Mixture, View
from robustkern.rules.krum import krum_scores

__all__ = [
    "Aggregator",
    "Aksel",
    "Average",
    "Brute",
    "Bulyan",
    "GeometricMedian",
    "Krum",
    "Median",
    "Medoid",
    "MultiKrum",
    "NearestNeighborAverage",
    "TrimmedMean",
]

Gradients = Tensor | Sequence[Tensor]


class Aggregator:
    """A rule without state: ``aggregate(gradients, /, out=None, *, ...)``; unknown keywords are ignored, as there."""


def _stacked(gradients: Gradients) -> Tensor:
    return gradients if isinstance(gradients, Tensor) else torch.stack(list(gradients))


def _combined(x: Tensor, rule: Rule, f: int | None, out: Tensor | None) -> Tensor:
    combine = recorded if x.requires_grad and torch.is_grad_enabled() else aggregate
    return _written(combine(x, rule, f=f), out)


def _written(found: Tensor, out: Tensor | None) -> Tensor:
    if out is None:
        return found
    if out.shape != found.shape:
        raise RuntimeError(f"out has shape {tuple(out.shape)}; expected {tuple(found.shape)}")
    with torch.no_grad():
        return out.copy_(found)


_BAD = "Invalid number of Byzantine gradients to tolerate, got"


def _check_count(x: Tensor, n: int) -> None:
    if len(x) != n:
        raise ValueError(f"Expected {n} gradients, got {len(x)}")


def _check_whole(n: Any, f: Any, most: int) -> None:
    """Check what (Multi-)Krum and Bulyan check: most is by what 2f+3, or 4f+3, must not exceed n."""
    if not isinstance(n, int):
        raise TypeError(f"Invalid total number of workers, got {n=!r}, expected a positive int")
    if not isinstance(f, int):
        raise TypeError(f"{_BAD} {f=!r}, expected a non-negative int")
    if n < 1:
        raise ValueError(f"Expected a list of at least one gradient to aggregate, got {n=!r}")
    if f < 0:
        raise ValueError(f"{_BAD} {f=!r}, expected 0 ≤ f")
    if f > n:
        raise ValueError(f"{_BAD} {f=!r}, expected f ≤ n = {n!r}")
    if most * f + 3 > n:
        raise ValueError(f"{_BAD} {f=!r}, expected 0 ≤ f ≤ {(n - 3) // most}")


def _check_plain(n: int, f: int) -> None:
    if n < 1:
        raise ValueError(f"Expected a list of at least one gradient to aggregate, got {n!r}")
    if f < 0:
        raise ValueError(f"{_BAD} f = {f!r}, expected 0 ≤ f")
    if f > n:
        raise ValueError(f"{_BAD} f = {f!r}, expected f ≤ n = {n!r}")


class Average(Aggregator):
    """Mean; one read of the data."""

    @classmethod
    def aggregate(cls, gradients: Gradients, /, out: Tensor | None = None, **specialized: Any) -> Tensor:
        """Combine."""
        return _combined(_stacked(gradients), rules.Mean(), None, out)


class Median(Aggregator):
    """Coordinate-wise median, of an even number the mean of the two middle values; one read of the data."""

    @classmethod
    def aggregate(cls, gradients: Gradients, /, out: Tensor | None = None, **specialized: Any) -> Tensor:
        """Combine."""
        return _combined(_stacked(gradients), rules.Median(), None, out)


class TrimmedMean(Aggregator):
    """Coordinate-wise mean without the f smallest and largest values; one read of the data."""

    @classmethod
    def aggregate(cls, gradients: Gradients, /, out: Tensor | None = None, *, f: int, **specialized: Any) -> Tensor:
        """Combine."""
        if f < 0:
            raise ValueError(f"{_BAD} f = {f!r}, expected 0 ≤ f")
        x = _stacked(gradients)
        if len(x) < 2 * f + 1:
            raise ValueError(f"At least 2f+1 = {2 * f + 1} gradients required, got {len(x)}")
        return _combined(x, rules.TrimmedMean(), f, out)


class MultiKrum(Aggregator):
    """Mean of the m rows of best Krum score, by default n-2f-3; two reads of the data at most."""

    @classmethod
    def aggregate(
        cls,
        gradients: Gradients,
        /,
        out: Tensor | None = None,
        *,
        n: int,
        f: int,
        m: int | None = None,
        **specialized: Any,
    ) -> Tensor:
        """Combine."""
        _check_whole(n, f, 2)
        m = n - 2 * f - 3 if m is None else m
        if not 1 <= m <= n:
            raise ValueError(f"Invalid number of selected gradients, got {m=!r}, expected 1 ≤ m ≤ {n}")
        x = _stacked(gradients)
        _check_count(x, n)
        return _combined(x, rules.MultiKrum(int(m)), f, out)

    @staticmethod
    def score(
        stacked: Tensor, *, n: int, f: int, num_peers: int | None = None, valid_mask: Tensor | None = None
    ) -> Tensor:
        """Return (n,) sums of squared distances to the nearest others; inf for rows that are masked out."""
        _check_count(stacked, n)
        if valid_mask is not None and valid_mask.shape != (n,):
            raise ValueError(f"Expected valid_mask with shape {(n,)!r}, got {tuple(valid_mask.shape)!r}")
        gram = kernels.gram(stacked.detach())
        squares = np.maximum(gram.diagonal()[:, None] + gram.diagonal() - 2 * gram, 0.0)
        np.fill_diagonal(squares, 0.0)
        valid = np.ones(n, dtype=np.bool_) if valid_mask is None else valid_mask.cpu().numpy().astype(np.bool_)
        squares[~valid] = squares[:, ~valid] = np.inf
        np.fill_diagonal(squares, 0.0)
        others = n - f - 2 if num_peers is None else num_peers
        scores = krum_scores(squares, np.arange(n), others)
        scores[~valid] = np.inf
        return torch.as_tensor(scores, dtype=stacked.dtype, device=stacked.device)


class Krum(Aggregator):
    """The row of best Krum score, n-f-2 neighbours; two reads of the data at most."""

    @classmethod
    def aggregate(
        cls, gradients: Gradients, /, out: Tensor | None = None, *, n: int, f: int, **specialized: Any
    ) -> Tensor:
        """Combine."""
        return MultiKrum.aggregate(gradients, out, n=n, f=f, m=1)


class Medoid(Aggregator):
    """The row with the least sum of distances to the others; two reads of the data at most."""

    @classmethod
    def aggregate(
        cls, gradients: Gradients, /, out: Tensor | None = None, *, n: int, f: int, **specialized: Any
    ) -> Tensor:
        """Combine."""
        _check_plain(n, f)
        x = _stacked(gradients)
        _check_count(x, n)
        return _combined(x, rules.Medoid(), None, out)


class GeometricMedian(Aggregator):
    """Smoothed Weiszfeld steps from the mean; two reads of the data."""

    @classmethod
    def aggregate(
        cls,
        gradients: Gradients,
        /,
        out: Tensor | None = None,
        *,
        n: int,
        f: int,
        nu: float = 0.1,
        tol: float = 1e-6,
        max_iter: int = 100,
        **specialized: Any,
    ) -> Tensor:
        """Combine."""
        _check_plain(n, f)
        if nu <= 0:
            raise ValueError(f"Expected smoothing nu to be positive, got {nu!r}")
        if tol < 0:
            raise ValueError(f"Expected tolerance to be non-negative, got {tol!r}")
        if max_iter < 1:
            raise ValueError(f"Expected at least one Weiszfeld iteration, got {max_iter!r}")
        x = _stacked(gradients)
        _check_count(x, n)
        return _combined(x, rules.GeometricMedian(float(nu), max_iter, tol=float(tol)), None, out)


class Brute(Aggregator):
    """Mean of the n-f rows of smallest diameter; two reads of the data at most."""

    @classmethod
    def aggregate(
        cls, gradients: Gradients, /, out: Tensor | None = None, *, n: int, f: int, **specialized: Any
    ) -> Tensor:
        """Combine."""
        _check_plain(n, f)
        if 2 * f >= n:
            raise ValueError(f"{_BAD} f = {f!r}, expected 0 ≤ f ≤ {(n - 1) // 2}")
        x = _stacked(gradients)
        _check_count(x, n)
        return _combined(x, rules.MDA(), f, out)


class Aksel(Aggregator):
    """Mean of the n-f rows nearest to the coordinate-wise median; two reads of the data at most."""

    @classmethod
    def aggregate(cls, gradients: Gradients, /, out: Tensor | None = None, *, f: int, **specialized: Any) -> Tensor:
        """Combine."""
        if f < 0:
            raise ValueError(f"{_BAD} f = {f!r}, expected 0 ≤ f")
        x = _stacked(gradients)
        if len(x) < 2 * f + 1:
            raise ValueError(f"At least 2f+1 = {2 * f + 1} gradients required, got {len(x)}")
        return _combined(x, rules.CTMA(rules.Median()), f, out)


class NearestNeighborAverage(Aggregator):
    """Mean of the `num_closest` rows nearest to a pivot; two reads of the data at most."""

    @classmethod
    def aggregate(
        cls,
        gradients: Gradients,
        /,
        out: Tensor | None = None,
        *,
        num_closest: int,
        pivot: Tensor,
        **specialized: Any,
    ) -> Tensor:
        """Combine."""
        if num_closest < 1:
            raise ValueError(f"Expected num_closest to be at least 1, got {num_closest!r}")
        x = torch.stack(list(gradients))
        n = len(x)
        if n < num_closest:
            raise ValueError(f"Expected at least num_closest={num_closest} gradients, got {n!r}")
        if pivot.shape != x.shape[1:]:
            raise ValueError(f"Expected pivot with shape {tuple(x.shape[1:])!r}, got {tuple(pivot.shape)!r}")
        centre = pivot.detach().to(x)
        if not centre.isfinite().all():
            raise ValueError("Expected a pivot of finite numbers, got NaN or Inf in it (choose another pivot)")
        finite = x.detach().reshape(n, -1).isfinite().all(dim=1).cpu().numpy()
        bad = np.flatnonzero(~finite).tolist()
        if n - len(bad) < num_closest:
            raise NonFiniteError(
                f"Expected at least num_closest={num_closest} gradients without NaN or Inf, got {n - len(bad)} of {n}: "
                f"row {bad[0]} holds some (lower num_closest)",
                tuple(bad),
            )
        squares = np.where(finite, kernels.row_sq_distances(x.detach(), centre), np.inf)
        near = np.lexsort((squares, ~finite))[:num_closest]
        return _combined(x[torch.as_tensor(near.copy())], rules.Mean(), None, out)


@dataclass(frozen=True)
class _BulyanMeans(Mixer):
    """The n-2f-2 means that Bulyan collects: each of the best by Krum's score, of which the nearest to it then goes."""

    m: int
    name: ClassVar[str] = "bulyan_means"

    def mixing(self, view: View) -> Mixture:
        """Row i is what round i averages."""
        f, n = view.require_f(self.name), view.n
        geometry, _ = view.measured(self.name)
        left = np.flatnonzero(geometry.finite)
        shares = np.zeros((n - 2 * f - 2, n))
        for i in range(len(shares)):
            rows, others = left, n - i - f - 2
            best = view.least(
                lambda squares, rows=rows, others=others: krum_scores(squares, rows, others),  # type: ignore[misc]
                min(self.m, n - f - 2 - i),
            )
            shares[i, best] = 1.0
            away = geometry.sq_distances_to(shares[i] / len(best))[best]
            left = left[left != best[int(away.argmin())]]
        return Mixture(shares, shares.sum(axis=1))

    def rows_after(self, n: int, f: int | None) -> int:
        """Return how many means there are."""
        return n - 2 * (f or 0) - 2


class Bulyan(Aggregator):
    """Trimmed mean of n-2f-2 means, each of m rows that Krum selects among those that are left; two reads."""

    @classmethod
    def aggregate(
        cls,
        gradients: Gradients,
        /,
        out: Tensor | None = None,
        *,
        n: int,
        f: int,
        m: int | None = None,
        **specialized: Any,
    ) -> Tensor:
        """Combine."""
        _check_whole(n, f, 4)
        if m is not None and not isinstance(m, int):
            raise TypeError(f"Invalid number of selected gradients, got {m=!r}, expected a positive int")
        m = n - f if m is None else m
        if not 1 <= m <= n:
            raise ValueError(f"Invalid number of selected gradients, got {m=!r}, expected 1 ≤ m ≤ {n}")
        x = _stacked(gradients)
        _check_count(x, n)
        if not (x.requires_grad and torch.is_grad_enabled()):
            return _combined(x, Chain((_BulyanMeans(m), rules.TrimmedMean())), f, out)
        return _combined(recorded_mix(x, _BulyanMeans(m), f), rules.TrimmedMean(), f, out)
