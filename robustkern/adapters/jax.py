"""Rules in JAX: under ``jax.jit``, ``jax.grad`` and ``jax.vmap``, by a callback to the processor.

The rows leave the compiled program for the call and the result comes back, without a copy where they are on the
processor. Gradients are those of the rule as a function of the rows, see `robustkern.adapters.gradients`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from robustkern.adapters import needs

with needs("jax"):
    import jax
    import jax.numpy as jnp

from robustkern.adapters.gradients import Options, gradients_of_rows
from robustkern.functions import aggregate as _aggregate
from robustkern.rules import Aggregator, parse_rule

__all__ = ["aggregate"]

_WORD = (1 << 31) - 1
_Struct: Any = jax.ShapeDtypeStruct


class _Static(NamedTuple):
    rule: str
    f: int | None
    delta: float | None
    seed: int | None


def aggregate(
    rows: Any,
    rule: Aggregator | str,
    /,
    *,
    f: int | None = None,
    delta: float | None = None,
    weights: Any = None,
    centre: Any = None,
    seed: int | None = None,
) -> Any:
    """Combine n arrays or pytrees into one, inside or outside of compiled functions.

    Parameters
    ----------
    rows : array of shape (n, ...), or sequence of n arrays or pytrees of arrays
        As for `robustkern.aggregate`, of floating-point leaves.
    rule : rule object or str
        A constant of the compiled function, as are `f`, `delta` and `seed`.
    f, delta, seed
        As for `robustkern.aggregate`.
    weights : (n,) array, optional
        Of the rows; gradients do not flow to it.
    centre : like one row, optional
        For rules that measure from one; gradients do not flow to it.

    Returns
    -------
    like one row
        A JAX array, or a pytree of them.

    Raises
    ------
    TypeError, ValueError, NonFiniteError
        As `robustkern.aggregate`; in compiled functions when they run, as JAX's runtime error with the text.
    NotImplementedError
        In gradients, for rules without one: see `robustkern.adapters.torch.aggregate`.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from robustkern.adapters.jax import aggregate
    >>> rows = jnp.array([[1.0, 5.0], [2.0, 4.0], [90.0, 6.0]])
    >>> jax.jit(lambda x: aggregate(x, "median"))(rows)
    Array([2., 5.], dtype=float32)
    >>> jax.grad(lambda x: aggregate(x, "median").sum())(rows)
    Array([[0., 1.],
           [1., 0.],
           [0., 0.]], dtype=float32)
    """
    stacked = hasattr(rows, "shape")
    parts = tuple(rows[i] for i in range(rows.shape[0])) if stacked else tuple(rows)
    if weights is not None:
        weights = jnp.asarray(weights, dtype=jnp.result_type(float))
    static = _Static(rule if isinstance(rule, str) else str(rule), f, delta, seed)
    result, _ = _operator(static, parts, weights, centre)
    return result


def _shape_of(leaf: Any) -> Any:
    return _Struct(jnp.shape(leaf), jnp.result_type(leaf))


def _solve(static: _Static, rows: Sequence[Any], weights: Any, centre: Any) -> Any:
    """Run on the host: return the result, and the seed of what was drawn."""
    on_host = [jax.tree_util.tree_map(np.asarray, row) for row in rows]
    result, info = _aggregate(
        on_host,
        static.rule,
        f=static.f,
        delta=static.delta,
        weights=None if weights is None else np.asarray(weights),
        centre=None if centre is None else jax.tree_util.tree_map(np.asarray, centre),
        seed=static.seed,
        return_info=True,
    )
    return result, _words_of(info.seed)


def _words_of(seed: int | None) -> np.ndarray[Any, Any]:
    """Return a seed in words that JAX has without 64 bits, of 31; -1 for none."""
    return np.array([-1] * 3 if seed is None else [seed >> 62, seed >> 31 & _WORD, seed & _WORD], dtype=np.int32)


def _seed_of(words: Any) -> int | None:
    high, middle, low = (int(word) for word in np.asarray(words))
    return None if low < 0 else high << 62 | middle << 31 | low


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _operator(static: _Static, rows: Any, weights: Any, centre: Any) -> Any:
    shapes = jax.tree_util.tree_map(_shape_of, rows[0]), _Struct((3,), jnp.int32)
    solve = functools.partial(_solve, static)
    return jax.pure_callback(solve, shapes, rows, weights, centre, vmap_method="sequential")


def _forward(static: _Static, rows: Any, weights: Any, centre: Any) -> Any:
    found = _operator(static, rows, weights, centre)
    return found, (rows, weights, centre, found[1])


def _flat(tree: Any) -> np.ndarray[Any, Any]:
    leaves = [np.asarray(leaf).reshape(-1).astype(np.float64) for leaf in jax.tree_util.tree_leaves(tree)]
    return np.concatenate(leaves) if leaves else np.zeros(0)


def _gradients(static: _Static, rows: Sequence[Any], weights: Any, centre: Any, drawn: Any, gradient: Any) -> Any:
    """Run on the host: return the gradient of each row."""
    x = np.stack([_flat(row) for row in rows])
    options = Options(
        static.f,
        static.delta,
        None if weights is None else np.asarray(weights, dtype=x.dtype),
        None if centre is None else _flat(centre).astype(x.dtype),
        _seed_of(drawn),
    )
    found = gradients_of_rows(x, _flat(gradient).astype(x.dtype), parse_rule(static.rule), options)
    leaves, structure = jax.tree_util.tree_flatten(rows[0])
    ends = np.cumsum([np.size(leaf) for leaf in leaves])
    result = []
    for row in found:
        parts = np.split(row, ends[:-1])
        shaped = [part.reshape(np.shape(leaf)).astype(leaf.dtype) for part, leaf in zip(parts, leaves, strict=True)]
        result.append(jax.tree_util.tree_unflatten(structure, shaped))
    return tuple(result)


def _backward(static: _Static, saved: Any, gradient: Any) -> Any:
    rows, weights, centre, drawn = saved
    shapes = jax.tree_util.tree_map(_shape_of, rows)
    solve = functools.partial(_gradients, static)
    found = jax.pure_callback(solve, shapes, rows, weights, centre, drawn, gradient[0], vmap_method="sequential")
    return found, *(jax.tree_util.tree_map(jnp.zeros_like, constant) for constant in (weights, centre))


_operator.defvjp(_forward, _backward)
