"""The aggregators of TorchJD 0.18 that are robust rules: `Krum`, `KrumWeighting`, `TrimmedMean`.

``from robustkern.adapters.torchjd import Krum`` instead of from ``torchjd.aggregation``: subclasses of its own, so that
everything in TorchJD takes them. Distances are of rows by their inner products, as there, but in float64.
"""

from __future__ import annotations

from typing import Any

from robustkern.adapters import needs

with needs("torchjd"):
    import torch
    from torch import Tensor
    from torchjd import aggregation as theirs

from robustkern import rules
from robustkern.adapters.torch import aggregate
from robustkern.products import weights_of

__all__ = ["Krum", "KrumWeighting", "TrimmedMean"]

_Krum: Any = theirs.Krum
_KrumWeighting: Any = type(theirs.Krum(0).gramian_weighting)
_TrimmedMean: Any = theirs.TrimmedMean


class KrumWeighting(_KrumWeighting):  # type: ignore[misc]
    """Weights of the `n_selected` rows of best Krum score, distances not squared, from their inner products."""

    def forward(self, gramian: Tensor, /) -> Tensor:
        """Return (m,) shares of the rows; constant for gradients."""
        self._check_matrix_shape(gramian)
        m, f = len(gramian), self.n_byzantine
        rule = rules.MultiKrum(int(self.n_selected), neighbours=m - f - 2, squared=False)
        shares = weights_of(rule, gramian.detach().cpu().double().numpy(), f=min(f, (m - 1) // 2))
        return torch.as_tensor(shares, dtype=gramian.dtype, device=gramian.device)


class Krum(_Krum):  # type: ignore[misc]
    """Mean of the `n_selected` rows of best Krum score."""

    def __init__(self, n_byzantine: int, n_selected: int = 1) -> None:
        theirs.GramianWeightedAggregator.__init__(self, KrumWeighting(n_byzantine, n_selected))


class TrimmedMean(_TrimmedMean):  # type: ignore[misc]
    """Coordinate-wise mean without the `trim_number` smallest and largest values; one read of the data."""

    def forward(self, matrix: Tensor, /) -> Tensor:
        """Return the (n,) result."""
        self._check_matrix_has_enough_rows(matrix)
        return aggregate(matrix, "trimmed_mean", f=int(self.trim_number))
