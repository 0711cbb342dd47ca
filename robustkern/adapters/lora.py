"""LoRA adapters by their products: exact distances of B A in r-space, and a concatenated adapter of what has weight.

The median of all A and of all B is not the median of the products. But inner products of products need no product:
``<B_i A_i, B_j A_j> = sum((B_i^T B_j) * (A_i A_j^T))``, for any ranks. So every rule that is built on distances and
averages gives weights, and the weighted sum of the products is exactly an adapter: the A of the rows with weight one
below the other, and their B, by weight, side by side.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from array_api_compat import is_torch_array
from numpy.typing import ArrayLike, NDArray

from robustkern.contract.rows import Vector
from robustkern.errors import brief, plain, warn
from robustkern.files.pieces import check_bad_option
from robustkern.inputs.arrays import array_view
from robustkern.products import weights_of
from robustkern.rules import Aggregator
from robustkern.rules.base import as_aggregator

__all__ = ["A", "aggregate_lora", "checked", "combined", "lora_gram"]

Adapter = Mapping[str, Any]
Pair = tuple[NDArray[Any], NDArray[Any]]
A, _B = ".lora_A.", ".lora_B."


def _factors(adapter: Adapter, row: int) -> dict[str, tuple[str, str]]:
    """Return the keys of A and B of each module."""
    found = {}
    for key in adapter:
        if A in key:
            other = key.replace(A, _B)
            if other not in adapter:
                raise ValueError(f"adapter {row} has {plain(key, 100)} and no {plain(other, 100)}")
            found[key.replace(A, ".")] = key, other
        elif _B not in key or key.replace(_B, A) not in adapter:
            raise ValueError(
                f"adapter {row} has {plain(key, 100)}, which is no pair of lora_A and lora_B (leave it out)"
            )
    if not found:
        raise ValueError(f"adapter {row} holds no lora_A and lora_B")
    return found


def _folded(a: NDArray[Any], b: NDArray[Any]) -> Pair:
    """Return factors of the same product with no more ranks than it can have: those that came are their sender's."""
    if a.shape[0] <= min(a.shape[1], b.shape[0]):
        return a, b
    with np.errstate(all="ignore"):
        product = b @ a
    if not np.isfinite(product).all():
        product = np.full_like(product, np.nan)  # and the identity beside it is finite: the row stays bad
    rows, columns = product.shape
    return (np.eye(columns), product) if columns < rows else (product, np.eye(rows))


def _pairs(adapter: Adapter, i: int) -> dict[str, Pair]:
    """Return A and B of each module of an adapter, in float64."""
    if not isinstance(adapter, Mapping):
        raise TypeError(f"adapter {i} is {type(adapter).__name__}; expected a mapping with lora_A and lora_B")
    pairs = {}
    for name, keys in _factors(adapter, i).items():
        a, b = (np.asarray(array_view(adapter[key], f"adapter {i}, {plain(key, 100)}")) for key in keys)
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise ValueError(
                f"adapter {i}, {plain(name, 100)}: A of shape {a.shape} and B of {b.shape} have no product"
            )
        if a.dtype.kind in "iubc" or b.dtype.kind in "iubc":
            raise TypeError(f"adapter {i}, {plain(name, 100)}: A has dtype {a.dtype} and B {b.dtype}; expected floats")
        pairs[name] = _folded(a.astype(np.float64), b.astype(np.float64))
    return pairs


def checked(
    adapters: Sequence[Adapter], bad: str = "error", unread: Mapping[int, str] | None = None
) -> list[dict[str, Pair]]:
    """Return A and B of each module of each adapter, in float64, of NaN where it cannot be used.

    That is those that have other modules or shapes than most, and the `unread`, with the reason.
    """
    if isinstance(adapters, (str, bytes, Mapping)) or not isinstance(adapters, Sequence) or not adapters:
        raise TypeError(f"adapters: expected a list of mappings with lora_A and lora_B; got {type(adapters).__name__}")
    rows: dict[int, dict[str, Pair]] = {}
    wrong = dict(unread or {})
    for i in sorted(set(range(len(adapters))) - set(wrong)):
        try:
            rows[i] = _pairs(adapters[i], i)
        except (TypeError, ValueError) as error:
            if bad == "error":
                raise
            wrong[i] = str(error)
    if not rows:
        raise ValueError(f"no adapter can be used; the first: {wrong[0]}")
    shapes = {i: tuple((m, len(b), a.shape[1]) for m, (a, b) in sorted(row.items())) for i, row in rows.items()}
    usual = Counter(shapes.values()).most_common(1)[0][0]
    for i, found in shapes.items():
        if found != usual:
            name = min(set(found) ^ set(usual))[0]
            wrong[i] = f"adapter {i} has other modules or shapes than most, first in {plain(name, 100)}"
            if bad == "error":
                raise ValueError(wrong[i])
    for i, reason in sorted(wrong.items()):
        warn(f"{reason} (it counts as one of the f that may be bad)", UserWarning)
        rows[i] = {m: (np.full((1, ins), np.nan), np.full((outs, 1), np.nan)) for m, outs, ins in usual}
    return [rows[i] for i in range(len(adapters))]


def lora_gram(adapters: Sequence[Adapter], *, scalings: ArrayLike | None = None) -> NDArray[np.float64]:
    """Return (n, n) inner products of the adapters' products, over all modules.

    Parameters
    ----------
    adapters : sequence of n mappings
        Of names ending in ``.lora_A.weight`` (r, in) and ``.lora_B.weight`` (out, r), NumPy or torch; ranks may differ.
    scalings : (n,) array_like, optional
        What each product is multiplied by, such as ``lora_alpha / r``; by default 1.

    Returns
    -------
    (n, n) float64
        O(n^2 r^2 (in + out)) operations a module; no product is ever formed.
    """
    rows = checked(adapters)
    return _gram_of(rows, _scales(rows, scalings))


def _gram_of(rows: Sequence[Mapping[str, Pair]], scale: Vector) -> NDArray[np.float64]:
    gram = np.zeros((len(rows), len(rows)))
    with np.errstate(all="ignore"):
        for name in rows[0]:
            for i, row in enumerate(rows):
                for j in range(i + 1):
                    (a, b), (c, d) = row[name], rows[j][name]
                    gram[i, j] += ((b.T @ d) * (a @ c.T)).sum() * scale[i] * scale[j]
    return np.asarray(np.tril(gram) + np.tril(gram, -1).T)


def _scales(rows: Sequence[Any], scalings: ArrayLike | None) -> Vector:
    scale = np.ones(len(rows)) if scalings is None else np.asarray(scalings, dtype=np.float64)
    if scale.shape != (len(rows),) or not np.isfinite(scale).all():
        raise ValueError(f"scalings: expected {len(rows)} finite numbers; got {brief(scalings)}")
    return scale


def aggregate_lora(
    adapters: Sequence[Adapter],
    rule: Aggregator | str,
    /,
    *,
    f: int | None = None,
    delta: float | None = None,
    weights: ArrayLike | None = None,
    scalings: ArrayLike | None = None,
    seed: int | None = None,
    bad: str = "error",
) -> tuple[dict[str, Any], Vector]:
    """Combine n LoRA adapters, of any ranks, into one.

    Parameters
    ----------
    adapters, scalings
        As for `lora_gram`.
    rule : rule object or str
        Built on distances and averages, see `robustkern.weights_of`.
    f, delta, weights, seed
        As for `robustkern.aggregate`.
    bad : {"error", "count"}
        What an adapter is that holds anything else than pairs of matrices of floats, or other modules or shapes than
        most: an error, or one of the f that may be bad, with a warning that says why, so that no client can block a
        round.

    Returns
    -------
    adapter : dict
        Like the first adapter that has weight in names and library, of scaling 1; float32, or float64 where an adapter
        that has weight is.
        Its rank, the same in all modules, is the sum of the ranks of the adapters that have weight, but no more than
        the largest module's product can have.
    weights : (n,) float64
        Of the adapters in it; 0 for those that hold NaN or Inf, or are bad.

    Raises
    ------
    TypeError, ValueError, NonFiniteError
        As `robustkern.weights_of`; where adapters differ in modules or shapes, or hold anything else, and are not
        counted; and where the result is too large for its dtype.

    Examples
    --------
    >>> import numpy as np
    >>> from robustkern.adapters.lora import aggregate_lora
    >>> def adapter(x):
    ...     return {"q.lora_A.weight": np.array([[1.0, x]]), "q.lora_B.weight": np.array([[1.0], [0.0]])}
    >>> merged, weights = aggregate_lora([adapter(x) for x in (1, 2, 2, 90)], "multi_krum(m=2)", f=1)
    >>> merged["q.lora_B.weight"] @ merged["q.lora_A.weight"]
    array([[1., 2.],
           [0., 0.]])
    """
    check_bad_option(bad, as_aggregator(rule))
    rows = checked(adapters, bad)
    return combined(adapters, rows, rule, scalings, f=f, delta=delta, weights=weights, seed=seed)


def combined(
    adapters: Sequence[Adapter],
    rows: Sequence[Mapping[str, Pair]],
    rule: Aggregator | str,
    scalings: ArrayLike | None,
    *,
    f: int | None,
    delta: float | None,
    weights: ArrayLike | None,
    seed: int | None,
) -> tuple[dict[str, Any], Vector]:
    """Combine adapters that were checked."""
    scale = _scales(rows, scalings)
    shares = weights_of(rule, _gram_of(rows, scale), f=f, delta=delta, weights=weights, seed=seed)
    kept: list[int] = np.flatnonzero(shares).tolist()
    pairs: dict[str, Pair] = {}
    for name in rows[0]:
        below = np.concatenate([rows[i][name][0] for i in kept])
        beside = np.concatenate([rows[i][name][1] * (shares[i] * scale[i]) for i in kept], axis=1)
        pairs[name] = _folded(below, beside)
    rank = max(len(a) for a, _ in pairs.values())
    double = any(str(x.dtype).endswith("float64") for i in kept for x in adapters[i].values())
    dtype = np.dtype(np.float64 if double else np.float32)
    merged: dict[str, Any] = {}
    like = adapters[kept[0]]
    for name, (key_a, key_b) in _factors(like, kept[0]).items():
        a, b = pairs[name]
        more = rank - len(a)
        merged[key_a] = _like(np.pad(a, ((0, more), (0, 0))), dtype, like[key_a], name)
        merged[key_b] = _like(np.pad(b, ((0, 0), (0, more))), dtype, like[key_b], name)
    return merged, shares


def _like(x: NDArray[Any], dtype: np.dtype[Any], other: Any, name: str) -> Any:
    with np.errstate(over="ignore"):
        x = np.ascontiguousarray(x, dtype=dtype)
    if not np.isfinite(x).all():  # rows that are not finite have no weight
        raise ValueError(f"the combination is too large for {dtype} in {plain(name, 100)} (pass float64 adapters)")
    if is_torch_array(other):
        import torch

        return torch.from_numpy(x).to(device=other.device)
    return x
