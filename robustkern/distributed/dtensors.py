"""DTensors as updates: each rank's local parts take part, and results are DTensors laid out alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import optree
import torch
from torch.distributed.tensor import DTensor, Shard

from robustkern.distributed.together import Ranks
from robustkern.errors import plain
from robustkern.inputs.arrays import name_of

__all__ = ["Layouts", "local_parts"]


class _Layout(NamedTuple):
    """How a leaf is spread over the ranks."""

    mesh: Any
    placements: tuple[Any, ...]
    shape: torch.Size
    stride: tuple[int, ...]


class Layouts(NamedTuple):
    """How the leaves of an update are spread, by their paths; those that are no DTensors are not there."""

    of: dict[tuple[Any, ...], _Layout]

    def spread(self, result: Any) -> Any:
        """Return a result of local parts as DTensors."""
        if not self.of:
            return result
        paths, leaves, structure = optree.tree_flatten_with_path(result)
        return optree.tree_unflatten(structure, map(self._spread, paths, leaves))

    def _spread(self, path: tuple[Any, ...], part: Any) -> Any:
        layout = self.of.get(path)
        if layout is None:
            return part
        mesh, placements, shape, stride = layout
        return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)


def local_parts(updates: Any, ranks: Ranks) -> tuple[Any, Layouts]:
    """Return what this rank holds of updates, and how their leaves are spread.

    Parameters
    ----------
    updates : as for `aggregate`
        Of which any leaves may be DTensors, spread alike in all rows.
    ranks : Ranks
        Who calls.

    Raises
    ------
    TypeError, ValueError
        If a leaf is on other ranks, or more than one of them has the same of its columns.
    """
    if isinstance(updates, DTensor):
        raise TypeError("local_columns is one DTensor (pass a list of n of them, one a row)")
    if not isinstance(updates, Sequence):
        return updates, Layouts({})
    every: list[Any] = optree.tree_leaves(list(updates))  # type: ignore[arg-type]
    if not any(isinstance(x, DTensor) for x in every):
        return updates, Layouts({})
    layouts: list[dict[tuple[Any, ...], _Layout]] = []
    rows = []
    for k, row in enumerate(updates):
        paths, leaves, structure = optree.tree_flatten_with_path(row)
        found = {path: _layout(x, path, ranks) for path, x in zip(paths, leaves, strict=True) if isinstance(x, DTensor)}
        layouts.append(found)
        for path in sorted(found.keys() | layouts[0].keys(), key=str):
            if found.get(path) != layouts[0].get(path):
                raise ValueError(
                    f"leaf {name_of(path)} of row {k} is spread over the ranks in another way than row 0's, "
                    f"{_told(found.get(path))} and {_told(layouts[0].get(path))} (redistribute it)"
                )
        rows.append(optree.tree_unflatten(structure, [x.to_local() if isinstance(x, DTensor) else x for x in leaves]))
    return rows, Layouts(layouts[0])


def _layout(x: DTensor, path: tuple[Any, ...], ranks: Ranks) -> _Layout:
    mesh = x.device_mesh
    shared = all(isinstance(placement, Shard) or mesh.size(k) == 1 for k, placement in enumerate(x.placements))
    if not shared:
        raise ValueError(
            f"leaf {name_of(path)} is a DTensor with placements {plain(str(tuple(x.placements)), 100)}; each column "
            "must be on one rank (redistribute it to Shard(0))"
        )
    if mesh.size() != ranks.size:
        raise ValueError(
            f"leaf {name_of(path)} is a DTensor on {mesh.size()} ranks; expected the {ranks.size} of the group"
        )
    return _Layout(mesh, tuple(x.placements), x.shape, tuple(x.stride()))


def _told(layout: _Layout | None) -> str:
    return "no DTensor" if layout is None else plain(f"{tuple(layout.placements)} of {tuple(layout.shape)}", 100)
