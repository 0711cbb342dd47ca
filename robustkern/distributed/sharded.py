"""Columns that have come to this rank from all, as the hooks of DDP and FSDP have them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from robustkern.contract.rows import Source
from robustkern.distributed.group import Group
from robustkern.distributed.ranks import Asked, Collecting, call
from robustkern.distributed.together import Part, Together, require_alike
from robustkern.engine import Info
from robustkern.functions import aggregated
from robustkern.inputs.memory import MemorySource

__all__ = ["agreed", "combine_shards", "raise_after_backward"]


def combine_shards(
    together: Together,
    ranks: Group,
    shards: Sequence[Tensor],
    columns: Sequence[int],
    asked: Asked,
    centre: Sequence[Tensor] | None = None,
    rows: list[Tensor] | None = None,
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
    asked : Asked
        The rule, and with what.
    centre : sequence of (width,) tensors, optional
        This rank's columns of it.
    rows : list of (ranks * width,) tensors, optional
        This rank's, where all ranks' results are to be collected, in the memory of `shards`.

    Returns
    -------
    list of (width,) tensors, Info or None
        This rank's results, with zeros where there are no columns; and with `return_info` what was found out.
    """
    counts = [max(min(x.shape[1], d - ranks.rank * x.shape[1]), 0) for x, d in zip(shards, columns, strict=True)]
    collecting = None
    if rows is None:
        results = [x.new_zeros(x.shape[1]) for x in shards]
        found_by = [[x[rank] for x in shards] for rank in range(ranks.size)]
    else:
        collecting = Collecting.of(ranks, rows, [x.view(-1) for x in shards])
        collecting.begin(together, asked)
        results = collecting.results
        found_by = [collecting.of_rank(rank) for rank in range(ranks.size)]

    def named(parts: Sequence[Tensor]) -> dict[str, Tensor]:
        return {str(k): x[:count] for k, (x, count) in enumerate(zip(parts, counts, strict=True))}

    point = None if centre is None else named(centre)

    def through(source: MemorySource, leaf: str = "") -> Source:
        return Part(together, source, sum(columns), source.dtypes, not asked.return_info)

    own = [named(parts) for parts in found_by]
    found = aggregated(
        own, asked.rule, asked.f, asked.delta, asked.weights, point, asked.seed, None, None, "update", None,
        asked.nonfinite, named(results), "auto", asked.return_info, through,
    )  # fmt: skip
    if collecting is not None:
        collecting.end(together)
    return results, found[1] if asked.return_info else None


def agreed(ranks: Group, made: Callable[[], Asked], what: dict[str, str]) -> Asked:
    """Return what a hook asks for; raise on all ranks where they do not ask alike, or one cannot be made."""

    def work(together: Together) -> Asked:
        asked = made()
        require_alike(together.exchange("a hook", asked.told() | what))
        return asked

    found: Asked = call(ranks, work)
    return found


def raise_after_backward(error: Exception, tensors: Iterable[Tensor]) -> None:
    """Have a backward pass come to its end, with NaN for gradients, and raise then: earlier would leave torch broken.

    Parameters
    ----------
    error : Exception
        What is raised when the pass that is going on has ended.
    tensors : iterable of tensors
        What becomes NaN.
    """
    for x in tensors:
        x.fill_(torch.nan)
    engine: Any = torch.autograd.Variable._execution_engine

    def raising() -> None:
        raise error

    engine.queue_callback(lambda: engine.queue_callback(raising))  # after what DDP and FSDP do in the end
