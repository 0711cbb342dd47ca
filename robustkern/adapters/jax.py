"""Rules in JAX: under ``jax.jit``, ``jax.grad`` and ``jax.vmap``, on the processor.

Compiled programs on the processor call the rule through XLA's foreign function interface, which hands it rows and
result where they lie. Elsewhere, and where robustkern was built without jaxlib's headers (`without_ffi` says why), by a
callback, for which rows and result are copied. Gradients are those of the rule as a function of the rows, see
`robustkern.adapters.gradients`.
"""

from __future__ import annotations

import ctypes
import functools
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from robustkern.adapters import needs

with needs("jax"):
    import jax
    import jax.numpy as jnp

from robustkern.adapters.gradients import Options, gradients_of_rows
from robustkern.errors import plain
from robustkern.functions import aggregate as _aggregate
from robustkern.rules import Aggregator, parse_rule

__all__ = ["aggregate", "without_ffi"]

_WORD = (1 << 31) - 1
_TARGET = "robustkern_call"
_Array = np.ndarray[Any, Any]
_Struct: Any = jax.ShapeDtypeStruct
#: XLA's numbers of dtypes (``XLA_FFI_DataType``).
_DTYPES = {
    2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.uint8, 7: np.uint16, 8: np.uint32, 9: np.uint64,
    1: np.bool_, 10: np.float16, 11: np.float32, 12: np.float64, 15: np.complex64, 18: np.complex128,
    16: ml_dtypes.bfloat16, 19: ml_dtypes.float8_e5m2, 20: ml_dtypes.float8_e4m3fn,
}  # fmt: skip


def _plain(x: Any) -> Any:
    """Return a number of NumPy's as Python's, which JSON takes."""
    return x.item() if isinstance(x, np.generic) else x


class _Call(NamedTuple):
    """What a call is besides its arrays; constants of the compiled function."""

    rule: str
    f: int | None
    delta: float | None
    seed: int | None
    rows: int  # that come one by one; 0: stacked
    names: Sequence[str] | None  # of a row's leaves; None: a row is an array
    weighted: bool
    centred: bool
    backward: bool = False


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
    stacked = hasattr(rows, "shape") and len(rows.shape) != 1  # numbers are rows one by one
    parts = jnp.asarray(rows) if stacked else tuple(rows)
    if not stacked and not parts:
        raise ValueError("rows: expected at least one; got none")
    first = None if stacked or hasattr(parts[0], "shape") else parts[0]
    names = None if first is None else sorted(_named(first))
    if names is not None:
        parts = tuple(_like_first(row, f"rows: row {i}", names) for i, row in enumerate(parts))
        centre = None if centre is None else _like_first(centre, "centre", names)
    if weights is not None:
        weights = jnp.asarray(weights, dtype=jnp.result_type(float))
    text = rule if isinstance(rule, str) else str(rule)
    count = 0 if stacked else len(parts)
    wanted = None if names is None else tuple(names)
    call = _Call(text, _plain(f), _plain(delta), _plain(seed), count, wanted, weights is not None, centre is not None)
    result, _ = _operator(call, parts, weights, centre)
    if names is None:
        return result
    structure = jax.tree_util.tree_structure(first)
    return jax.tree_util.tree_unflatten(structure, [result[name] for name in _named(first)])


def _named(row: Any) -> dict[str, Any]:
    """Return a pytree's leaves by where they are."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(row)[0]}


def _like_first(row: Any, what: str, names: Sequence[str]) -> dict[str, Any]:
    """Return leaves by name, in the order in which JAX takes them; raise where they are not those of the first row."""
    found = _named(row)
    if odd := sorted(found.keys() ^ set(names)):
        raise ValueError(f"{what} has other leaves than row 0, first {plain(odd[0], 100)}")
    return {name: found[name] for name in names}


# ---- compiled programs -----------------------------------------------------------------------------------------


def _shape_of(leaf: Any) -> Any:
    return _Struct(jnp.shape(leaf), jnp.result_type(leaf))


def _first_of(rows: Any) -> Any:
    """Return shapes like one row."""
    if not isinstance(rows, tuple):
        return _Struct(rows.shape[1:], rows.dtype)
    return jax.tree_util.tree_map(_shape_of, rows[0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _operator(call: _Call, rows: Any, weights: Any, centre: Any) -> Any:
    """Return the result, and the seed of what was drawn."""
    shapes, structure = jax.tree_util.tree_flatten((_first_of(rows), _Struct((3,), jnp.int32)))
    found = _asked(call, tuple(shapes), jax.tree_util.tree_leaves((rows, weights, centre)))
    return jax.tree_util.tree_unflatten(structure, found)


def _forward(call: _Call, rows: Any, weights: Any, centre: Any) -> Any:
    found = _operator(call, rows, weights, centre)
    return found, (rows, weights, centre, found[1])


def _backward(call: _Call, saved: Any, gradient: Any) -> Any:
    rows, weights, centre, _ = saved
    shapes, structure = jax.tree_util.tree_flatten(jax.tree_util.tree_map(_shape_of, rows))
    operands = jax.tree_util.tree_leaves((*saved, gradient[0]))
    found = _asked(call._replace(backward=True), tuple(shapes), operands)
    of_constants = (jax.tree_util.tree_map(jnp.zeros_like, constant) for constant in (weights, centre))
    return jax.tree_util.tree_unflatten(structure, found), *of_constants


_operator.defvjp(_forward, _backward)


def _asked(call: _Call, shapes: Sequence[Any], operands: Sequence[Any]) -> Any:
    """Return what `_called` does; outside of compiled functions raise what the rule raises, where JAX has its text."""
    if any(isinstance(x, jax.core.Tracer) for x in operands):
        return _called(call, shapes, *operands)
    try:
        found = _called(call, shapes, *operands)
        return jax.block_until_ready(found)  # type: ignore[no-untyped-call]  # an error comes when it is ready
    except jax.errors.JaxRuntimeError:
        try:
            _returned(call, shapes, *operands)
        except Exception as error:  # the same, of its own kind
            raise error from None
        raise


@functools.partial(jax.jit, static_argnums=(0, 1))
def _called(call: _Call, shapes: Sequence[Any], *operands: Any) -> Any:
    """Return what `_run` does, as arrays of these shapes."""

    def by_callback(*operands: Any) -> Any:
        return jax.pure_callback(
            functools.partial(_returned, call, shapes), shapes, *operands, vmap_method="sequential"
        )

    def by_ffi(*operands: Any) -> Any:
        on_processor = jax.ffi.ffi_call(_TARGET, shapes, vmap_method="sequential")
        return on_processor(*operands, call=json.dumps(call._asdict()))

    if without_ffi() is not None:
        return by_callback(*operands)
    return jax.lax.platform_dependent(*operands, cpu=by_ffi, default=by_callback)


@functools.cache
def without_ffi() -> str | None:
    """Return why compiled programs on the processor do not call rules directly; None where they do.

    Asked for the first time it makes JAX's backends: what does not fit a backend that is there is refused with an
    error, but what waits for one that it does not fit would leave JAX without that.
    """
    try:
        from robustkern import _jax
    except ImportError:
        remedy = "install it from its source, with RK_JAX=ON in the environment"
        return f"robustkern was built without the headers of jaxlib ({remedy})"
    try:
        jax.devices("cpu")
        jax.ffi.register_ffi_target(_TARGET, _jax.handler(_in_place), platform="cpu")
    except Exception as error:  # whatever a jaxlib of another time says
        text = plain(str(error), 300)
        return f"this jaxlib does not take version {_jax.api_version} of its interface (jax {jax.__version__}): {text}"
    return None


# ---- on the host -----------------------------------------------------------------------------------------------


def _returned(call: _Call, shapes: Sequence[Any], *operands: Any) -> Sequence[_Array]:
    """Be the callback."""
    results = [np.empty(shape.shape, shape.dtype) for shape in shapes]
    _run(call, [np.asarray(x) for x in operands], results)
    return results


@functools.lru_cache
def _call_of(text: str) -> _Call:
    return _Call(**json.loads(text))


def _in_place(text: str, operands: Sequence[Any], results: Sequence[Any]) -> None:
    """Be what XLA calls, with (address, number of the dtype, shape) of each array."""

    def array_of(place: tuple[int, int, tuple[int, ...]]) -> _Array:
        address, number, shape = place
        if number not in _DTYPES:
            raise TypeError(f"XLA's dtype number {number} is none that rules take (cast the rows to float32)")
        dtype, size = np.dtype(_DTYPES[number]), math.prod(shape)
        if not size:
            return np.empty(shape, dtype)
        memory: Any = (ctypes.c_char * (size * dtype.itemsize)).from_address(address)
        return np.frombuffer(memory, dtype).reshape(shape)

    _run(_call_of(text), [array_of(place) for place in operands], [array_of(place) for place in results])


def _run(call: _Call, operands: Sequence[_Array], results: Sequence[_Array]) -> None:
    """Write the rule's result and the seed of what was drawn, or gradients of the rows."""
    given = iter(operands)
    rows = [_row(call, given) for _ in range(call.rows)] if call.rows else next(given)
    weights = next(given) if call.weighted else None
    centre = _row(call, given) if call.centred else None
    if call.backward:
        drawn = _seed_of(next(given))
        _write_gradients(call, rows, weights, centre, drawn, _row(call, given), results)
        return
    _, info = _aggregate(
        rows,
        call.rule,
        f=call.f,
        delta=call.delta,
        weights=weights,
        centre=centre,
        seed=call.seed,
        out=_row(call, iter(results)),
        return_info=True,
    )
    results[-1][:] = _words_of(info.seed)


def _row(call: _Call, given: Iterator[_Array]) -> Any:
    """Take what is one row."""
    return next(given) if call.names is None else {name: next(given) for name in call.names}


def _words_of(seed: int | None) -> _Array:
    """Return a seed in words that JAX has without 64 bits, of 31; -1 for none."""
    return np.array([-1] * 3 if seed is None else [seed >> 62, seed >> 31 & _WORD, seed & _WORD], dtype=np.int32)


def _seed_of(words: _Array) -> int | None:
    high, middle, low = (int(word) for word in words)
    return None if low < 0 else high << 62 | middle << 31 | low


def _flat(row: Any) -> _Array:
    leaves = list(row.values()) if isinstance(row, dict) else [row]
    return np.concatenate([leaf.reshape(-1).astype(np.float64) for leaf in leaves] or [np.zeros(0)])


def _write_gradients(
    call: _Call, rows: Any, weights: Any, centre: Any, drawn: int | None, gradient: Any, results: Sequence[_Array]
) -> None:
    x = np.stack([_flat(row) for row in rows])
    options = Options(
        call.f,
        call.delta,
        None if weights is None else weights.astype(x.dtype),
        None if centre is None else _flat(centre),
        drawn,
    )
    found = gradients_of_rows(x, _flat(gradient), parse_rule(call.rule), options)
    if not call.rows:
        results[0][...] = found.reshape(results[0].shape)
        return
    given = iter(results)
    for row in found:
        begin = 0
        for _ in range(1 if call.names is None else len(call.names)):
            leaf = next(given)
            leaf[...] = row[begin : begin + leaf.size].reshape(leaf.shape)
            begin += leaf.size
