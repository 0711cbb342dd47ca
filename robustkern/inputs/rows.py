"""Rows that are written: memory for m updates like the caller's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from array_api_compat import is_torch_array

from robustkern.inputs.arrays import array_view, empty, library_of
from robustkern.inputs.memory import MemorySource
from robustkern.inputs.trees import adapt, jax_array

__all__ = ["cut_alike", "like_rows"]


def like_rows(updates: Any, m: int) -> tuple[MemorySource, Callable[[], Any]]:
    """Return memory for m updates like the n that came, as a source, and what returns them once they are written."""
    import optree

    made: Any
    stacked = hasattr(updates, "shape")
    if stacked:
        view = array_view(updates, "updates", is_input=False)
        made = empty((m, *view.shape[1:]), updates, view)
    else:
        made = [optree.tree_map(_like, updates[0]) for _ in range(m)]
    leaf = updates if stacked else optree.tree_leaves(updates[0])[0]

    def finish() -> Any:
        return optree.tree_map(jax_array, made) if library_of(leaf) == "jax" else made

    return adapt(made)[0], finish


def _like(leaf: Any) -> Any:
    view = array_view(leaf, "row 0", is_input=False)
    return empty(tuple(view.shape), leaf, view)


def cut_alike(updates: Any, source: MemorySource, target: MemorySource) -> MemorySource:
    """Return the source of the updates in the segments of another one, from copies of what is not contiguous."""
    if not _alike(source, target):
        import optree

        source = adapt(optree.tree_map(_contiguous, updates))[0]
        if not _alike(source, target):
            raise TypeError("updates of float8 are not mixed (convert them: x.astype('float32'), in torch x.float())")
    return source


def _alike(source: MemorySource, target: MemorySource) -> bool:
    pairs = zip(source.direct.rows, target.direct.rows, strict=True)
    return not source.strided and all(np.array_equal(rows.offsets, mixed.offsets) for rows, mixed in pairs)


def _contiguous(leaf: Any) -> Any:
    if is_torch_array(leaf):
        return leaf.detach().contiguous()
    return leaf if not hasattr(leaf, "flags") or leaf.flags.c_contiguous else leaf.copy(order="C")
