"""byzpy's aggregators and pre-aggregators (0.1): subclasses of its own that combine here, in its graphs as well.

``from robustkern.adapters.byzpy import CoordinateWiseTrimmedMean`` instead of from ``byzpy.aggregators``: constructors,
checks, chunking and graphs are inherited; ``aggregate`` and ``pre_aggregate`` are ours. What differs: a row with NaN or
Inf counts as one of the f bad ones, and a graph that meets one calls ours instead of byzpy's chunks; equal distances go
to the lowest index; `CAF` and `SMEA` are exact. Where f is too large for our rules (2f >= n, which byzpy allows for
some) byzpy's own method runs, on finite rows only.
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
from robustkern.adapters.mixing import recorded_mix
from robustkern.adapters.torch import aggregate as recorded
from robustkern.errors import NonFiniteError
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


def _recording(rows: list[torch.Tensor]) -> bool:
    return torch.is_grad_enabled() and any(row.requires_grad for row in rows)


def _combined(rows: list[torch.Tensor], rule: Aggregator, f: int | None = None, centre: Any = None) -> torch.Tensor:
    found: torch.Tensor = (recorded if _recording(rows) else aggregate)(rows, rule, f=f, centre=centre)
    return found


def _nonfinite(rows: Any) -> tuple[int, ...]:
    """Return the tensors that hold NaN or Inf."""
    if not isinstance(rows, (list, tuple)):
        return ()
    return tuple(i for i, row in enumerate(rows) if isinstance(row, torch.Tensor) and not bool(row.isfinite().all()))


def _finite_rows(name: str, rows: Rows, f: int | None) -> Rows:
    """Return what byzpy's own method may see, in whose result a NaN would spread: the rows without NaN or Inf.

    Without f fewer than half may hold some, and with 2f >= n none. With a smaller f that method refuses the call.
    """
    bad = _nonfinite(rows)
    if not bad or (f is not None and 2 * f < len(rows)):
        return rows
    if f is not None:
        raise NonFiniteError(
            f"{name}: {len(bad)} of n={len(rows)} rows hold NaN or Inf, the first row {bad[0]}; with f={f} no rule "
            "tolerates them (drop them, or choose f with 2f < n)",
            bad,
        )
    if 2 * len(bad) >= len(rows):
        raise NonFiniteError(
            f"{name}: {len(bad)} of n={len(rows)} rows hold NaN or Inf, the first row {bad[0]}; expected fewer than "
            "half (drop them)",
            bad,
        )
    return [row for i, row in enumerate(rows) if i not in bad]


class _Chunked:
    """Leaves to byzpy's chunks, which graphs with several workers run, finite rows only."""

    def create_subtasks(self, inputs: Any, *, context: Any) -> Any:
        """Return byzpy's; none where a row is not finite, after which a graph calls `compute`."""
        if _nonfinite(inputs.get(self.input_key)):  # type: ignore[attr-defined]
            return []
        return super().create_subtasks(inputs, context=context)  # type: ignore[misc]

    async def run_barriered_subtasks(self, inputs: Any, *, context: Any, pool: Any) -> Any:
        """Run byzpy's; `compute` where a row is not finite."""
        if _nonfinite(inputs.get(self.input_key)):  # type: ignore[attr-defined]
            return self.compute(inputs, context=context)  # type: ignore[attr-defined]
        return await super().run_barriered_subtasks(inputs, context=context, pool=pool)  # type: ignore[misc]


class _Combining(_Chunked, ABC):
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
            return super().aggregate(_finite_rows(type(self).__name__, gradients, f))  # type: ignore[misc]
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
    """Weiszfeld steps from the mean of the rows, two reads of the data; from the median byzpy's own, of finite rows."""

    def _rule(self, n: int) -> Aggregator | None:
        if self.init != "mean":
            return None
        return rules.GeometricMedian(nu=float(self.eps), max_iter=int(self.max_iter), tol=float(self.tol))


class CenteredClipping(_Chunked, norm_wise.CenteredClipping):  # type: ignore[misc]
    """M clipping steps from the mean or the lower median of the finite rows, or zero; three reads at most."""

    def aggregate(self, gradients: Rows) -> Any:
        """Combine the gradients into one like the first."""
        rows = _like_first(gradients)
        if rows is None or self.c_tau == 0:
            return norm_wise.CenteredClipping.aggregate(self, _finite_rows("CenteredClipping", gradients, None))
        if self.init == "zero":
            return _combined(rows, rules.CentredClipping(float(self.c_tau), int(self.M), "zero"))
        start = rules.Mean() if self.init == "mean" else rules.Median("low")
        finite = _finite_rows("CenteredClipping", rows, None)
        centre = aggregate([row.detach() for row in finite], start)
        return _combined(rows, rules.CentredClipping(float(self.c_tau), int(self.M)), centre=centre)


class _Mixing(_Chunked, ABC):
    """Pre-aggregates by a rule of ours."""

    @abstractmethod
    def _mixer(self, n: int) -> Mixer | None:
        """Return the rule for n rows, None where byzpy's own method runs."""

    def pre_aggregate(self, xs: Rows) -> Any:
        """Return a list of rows like the first; gradients flow where they do in byzpy, through means of rows."""
        rows = _like_first(xs)
        mixer = None if rows is None else self._mixer(len(rows))
        if rows is None or mixer is None:
            return super().pre_aggregate(xs)  # type: ignore[misc]
        f = min(getattr(self, "f", (len(rows) - 1) // 2), (len(rows) - 1) // 2)
        if _recording(rows) and isinstance(mixer, (rules.NNM, rules.Bucketing)):
            return list(recorded_mix(torch.stack(rows), mixer, f))
        found = mix([row.detach().reshape(-1) for row in rows], mixer, f=f)
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
