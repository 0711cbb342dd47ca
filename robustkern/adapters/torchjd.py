"""The aggregators of TorchJD 0.18 that are robust rules: `Krum`, `KrumWeighting`, `TrimmedMean`.

``from robustkern.adapters.torchjd import Krum`` instead of from ``torchjd.aggregation``: subclasses of its own, so that
everything in TorchJD takes them. What differs: distances are of rows by their inner products, as there, but in float64;
a row with NaN or Inf counts as one of those that may be bad (there it makes the result NaN).
"""

from __future__ import annotations

from typing import Any

from robustkern.adapters import needs

with needs("torchjd"):
    import torch
    from torch import Tensor
    from torchjd import aggregation as theirs

from robustkern import kernels, rules
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
        self.weighting = self.gramian_weighting << _gramian

    def forward(self, matrix: Tensor, /) -> Tensor:
        """Return the (n,) result; rows of weight 0 are not multiplied, since 0 times NaN is NaN."""
        weights = self.weighting(matrix).to(matrix)
        used = weights != 0
        result: Tensor = weights[used] @ matrix[used]
        return result


def _gramian(matrix: Tensor) -> Tensor:
    """Return inner products of the rows in float64, in which those of float32 rows do not overflow.

    On the processor they are of rows seen from their median; on a GPU torch makes them, without a backend of ours.
    """
    rows = matrix.detach()
    return _products(rows) if rows.is_cuda else torch.as_tensor(kernels.gram(rows.cpu()))


def _products(rows: Tensor, at_once: int = 1 << 20) -> Tensor:
    """Return inner products, of which a part of the columns is in float64 at a time."""
    parts = (part.double() for part in torch.split(rows, at_once, dim=1))
    return torch.stack([part @ part.T for part in parts]).sum(dim=0)


class TrimmedMean(_TrimmedMean):  # type: ignore[misc]
    """Coordinate-wise mean without the `trim_number` smallest and largest values; one read of the data."""

    def forward(self, matrix: Tensor, /) -> Tensor:
        """Return the (n,) result."""
        self._check_matrix_has_enough_rows(matrix)
        return aggregate(matrix, "trimmed_mean", f=int(self.trim_number))
