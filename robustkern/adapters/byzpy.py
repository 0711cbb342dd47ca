"""byzpy's aggregators and pre-aggregators (0.1): subclasses of its own that combine here, in its graphs as well.

``from robustkern.adapters.byzpy import CoordinateWiseTrimmedMean`` instead of from ``byzpy.aggregators``: constructors,
checks, chunking and graphs are inherited; ``aggregate`` and ``pre_aggregate`` are ours. What differs: a row with NaN or
Inf counts as one of the f bad ones; equal distances go to the lowest index; `CAF` and `SMEA` are exact. Where f is too
large for our rules (2f >= n, which byzpy allows for some) byzpy's own method runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from robustkern.adapters import needs

with needs(None):
    import torch
    from byzpy import pre_aggregators as before
    from byzpy.aggregators import coordinate_wise, geometric_wise, norm_wise

from robustkern import rules
from robustkern.adapters.torch import aggregate as recorded
from robustkern.functions import aggregate, mix
from robustkern.rules import Aggregator, Mixer

__all__ = [
    "ARC",
    "CAF",
    "SMEA",
    "Bucketing",
    "CenteredClipping",
    "Clipping",
    "ComparativeGradientElimination",
    "CoordinateWiseMedian",
    "CoordinateWiseTrimmedMean",
    "GeometricMedian",
    "Krum",
    "MeanOfMedians",
    "MinimumDiameterAveraging",
    "MoNNA",
    "MultiKrum",
    "NearestNeighborMixing",
]

Rows = Sequence[torch.Tensor]


def _like_first(rows: Rows) -> list[torch.Tensor] | None:
    """Return floating-point rows in the dtype and place of the first, None where they are something else."""
    if not isinstance(rows, (list, tuple)) or not all(isinstance(row, torch.Tensor) for row in rows):
        return None
    if not rows or not rows[0].is_floating_point() or any(row.shape != rows[0].shape for row in rows):
        return None
    return [row.to(rows[0]) for row in rows]


def _combined(rows: list[torch.Tensor], rule: Aggregator, f: int | None = None, centre: Any = None) -> torch.Tensor:
    recording = torch.is_grad_enabled() and any(row.requires_grad for row in rows)
    found: torch.Tensor = (recorded if recording else aggregate)(rows, rule, f=f, centre=centre)
    return found


class _Combining(ABC):
    """Aggregates by a rule of ours where it has one for n rows."""

    @abstractmethod
    def _rule(self, n: int) -> Aggregator | None:
        """Return the rule for n rows, None where byzpy's own method runs."""

    def aggregate(self, gradients: Rows) -> Any:
        """Combine the gradients into one like the first."""
        rows = _like_first(gradients)
        f = getattr(self, "f", None)
        rule = None if rows is None or (f is not None and 2 * f >= len(rows)) else self._rule(len(rows))
        if rows is None or rule is None:
            return super().aggregate(gradients)  # type: ignore[misc]
        return _combined(rows, rule, f)


class CoordinateWiseMedian(_Combining, coordinate_wise.CoordinateWiseMedian):  # type: ignore[misc]
    """Coordinate-wise median, of an even number the lower of the two middle values; one read of the data."""

    def _rule(self, n: int) -> Aggregator:
        return rules.Median("low")


class CoordinateWiseTrimmedMean(_Combining, coordinate_wise.CoordinateWiseTrimmedMean):  # type: ignore[misc]
    """Coordinate-wise mean without the f smallest and largest values; one read of the data."""

    def _rule(self, n: int) -> Aggregator:
        return rules.TrimmedMean()


class MeanOfMedians(_Combining, coordinate_wise.MeanOfMedians):  # type: ignore[misc]
    """Coordinate-wise mean of the n-f values nearest to the lower median; one read of the data."""

    def _rule(self, n: int) -> Aggregator:
        return rules.MeanAroundMedian(n - self.f, "low")


class MultiKrum(_Combining, geometric_wise.MultiKrum):  # type: ignore[misc]
    """Mean of the q rows of best Krum score, n-f-1 neighbours; two reads of the data at most."""

    def _rule(self, n: int) -> Aggregator | None:
        return rules.MultiKrum(int(self.q), n - self.f - 1) if self.q <= n - self.f else None


class Krum(_Combining, geometric_wise.Krum):  # type: ignore[misc]
    """The row of best Krum score, n-f-1 neighbours; two reads of the data at most."""

    def _rule(self, n: int) -> Aggregator:
        return rules.Krum(n - self.f - 1)


class MinimumDiameterAveraging(_Combining, geometric_wise.MinimumDiameterAveraging):  # type: ignore[misc]
    """Mean of the n-f rows of smallest diameter; two reads of the data at most."""

    def _rule(self, n: int) -> Aggregator:
        return rules.MDA()


class SMEA(_Combining, geometric_wise.SMEA):  # type: ignore[misc]
    """Mean of the n-f rows of smallest largest eigenvalue; two reads of the data."""

    def _rule(self, n: int) -> Aggregator:
        return rules.SMEA()


class CAF(_Combining, norm_wise.CAF):  # type: ignore[misc]
    """Mean by weights that fall along the direction of largest spread, exact and in one piece; two reads."""

    supports_subtasks = False

    def create_subtasks(self, inputs: Any, *, context: Any) -> list[Any]:
        """Return none: chunks of byzpy's, which take a few power iterations, would give something else."""
        return []

    def reduce_subtasks(self, partials: Any, inputs: Any, *, context: Any) -> Any:
        """Combine the gradients."""
        return self.aggregate(inputs[self.input_key])

    def _rule(self, n: int) -> Aggregator:
        return rules.CAF()


class ComparativeGradientElimination(_Combining, norm_wise.ComparativeGradientElimination):  # type: ignore[misc]
    """Mean of the n-f shortest rows; two reads of the data at most."""

    def _rule(self, n: int) -> Aggregator:
        return rules.CGE()


class MoNNA(_Combining, geometric_wise.MoNNA):  # type: ignore[misc]
    """Mean of the n-f rows nearest to one that is trusted; two reads of the data at most."""

    def _rule(self, n: int) -> Aggregator | None:
        return rules.MoNNA(int(self.reference_index)) if self.reference_index < n else None


class GeometricMedian(_Combining, geometric_wise.GeometricMedian):  # type: ignore[misc]
    """Weiszfeld steps from the mean of the rows, two reads of the data; from their median byzpy's own method runs."""

    def _rule(self, n: int) -> Aggregator | None:
        if self.init != "mean":
            return None
        return rules.GeometricMedian(nu=float(self.eps), max_iter=int(self.max_iter), tol=float(self.tol))


class CenteredClipping(norm_wise.CenteredClipping):  # type: ignore[misc]
    """M clipping steps from the mean, the lower median or zero; three reads of the data at most."""

    def aggregate(self, gradients: Rows) -> Any:
        """Combine the gradients into one like the first."""
        rows = _like_first(gradients)
        if rows is None or self.c_tau == 0:
            return norm_wise.CenteredClipping.aggregate(self, gradients)
        if self.init == "zero":
            return _combined(rows, rules.CentredClipping(float(self.c_tau), int(self.M), "zero"))
        fixed = [row.detach() for row in rows]
        centre = aggregate(fixed, rules.Mean() if self.init == "mean" else rules.Median("low"))
        return _combined(rows, rules.CentredClipping(float(self.c_tau), int(self.M)), centre=centre)


class _Mixing(ABC):
    """Pre-aggregates by a rule of ours."""

    @abstractmethod
    def _mixer(self, n: int) -> Mixer | None:
        """Return the rule for n rows, None where byzpy's own method runs."""

    def pre_aggregate(self, xs: Rows) -> Any:
        """Return a list of rows like the first."""
        rows = _like_first(xs)
        recording = rows is not None and torch.is_grad_enabled() and any(row.requires_grad for row in rows)
        mixer = None if rows is None or recording else self._mixer(len(rows))
        if rows is None or mixer is None:
            return super().pre_aggregate(xs)  # type: ignore[misc]
        flat = [row.reshape(-1) for row in rows]
        found = mix(flat, mixer, f=min(getattr(self, "f", (len(rows) - 1) // 2), (len(rows) - 1) // 2))
        return [row.reshape(rows[0].shape) for row in found]


class NearestNeighborMixing(_Mixing, before.NearestNeighborMixing):  # type: ignore[misc]
    """Each row becomes the mean of its n-f nearest, itself included; two reads of the data, one write."""

    def _mixer(self, n: int) -> Mixer | None:
        return rules.NNM(n - self.f) if 0 <= self.f < n else None


class Bucketing(_Mixing, before.Bucketing):  # type: ignore[misc]
    """Means of buckets of rows in the order `perm`; drawn ones are byzpy's own."""

    def _mixer(self, n: int) -> Mixer | None:
        if self.perm is None or sorted(self.perm) != list(range(n)):
            return None
        return rules.Bucketing(int(self.bucket_size), order=tuple(int(i) for i in self.perm))


class Clipping(_Mixing, before.Clipping):  # type: ignore[misc]
    """Rows longer than the threshold are shortened to it; two reads of the data, one write."""

    def _mixer(self, n: int) -> Mixer | None:
        return rules.Clipping(float(self.threshold)) if self.threshold > 0 else None


class ARC(_Mixing, before.ARC):  # type: ignore[misc]
    """The floor((2f/n)(n-f)) longest rows are shortened to the next one; two reads of the data, one write."""

    def _mixer(self, n: int) -> Mixer | None:
        return rules.ARC() if 2 * self.f < n else None
