"""Columns that have come to this rank from all, as the hooks of DDP and FSDP have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from robustkern.contract.rows import Source
from robustkern.distributed.ranks import Group
from robustkern.distributed.together import Part, Together
from robustkern.engine import Info
from robustkern.functions import aggregated
from robustkern.rules.base import Aggregator

__all__ = ["combine_shards"]


def combine_shards(
    together: Together,
    ranks: Group,
    shards: Sequence[Tensor],
    columns: Sequence[int],
    rule: Aggregator,
    options: Mapping[str, Any],
    centre: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], Info | None]:
    """Combine columns, of which each rank has some in each shard.

    Parameters
    ----------
    together : Together
        The call.
    ranks : Group
        Between which the shards are.
    shards : sequence of (ranks, width) tensors
        All rows' columns that are this rank's; zeros where the last ranks have fewer.
    columns : sequence of int
        How many columns of each shard are values, over all ranks.
    rule, options
        As for `robustkern.aggregate`, the same on all ranks: f, delta, weights, seed, return_info.
    centre : sequence of (width,) tensors, optional
        This rank's columns of it.

    Returns
    -------
    list of (width,) tensors, Info or None
        The results, with zeros where there are no columns; and with `return_info` what was found out.
    """
    counts = [max(min(x.shape[1], d - ranks.rank * x.shape[1]), 0) for x, d in zip(shards, columns, strict=True)]
    results = [x.new_zeros(x.shape[1]) for x in shards]
    rows = [
        {str(k): x[i, :count] for k, (x, count) in enumerate(zip(shards, counts, strict=True))}
        for i in range(ranks.size)
    ]
    out = {str(k): x[:count] for k, (x, count) in enumerate(zip(results, counts, strict=True))}
    point = None
    if centre is not None:
        point = {str(k): x[:count] for k, (x, count) in enumerate(zip(centre, counts, strict=True))}

    def through(source: Source) -> Source:
        return Part(together, source, sum(columns), source.dtypes)

    wants_info = options["return_info"]
    found = aggregated(
        rows, rule, options["f"], options["delta"], options["weights"], point, options["seed"], None, None, "update",
        None, "error", out, "auto", wants_info, through,
    )  # fmt: skip
    return results, found[1] if wants_info else None
