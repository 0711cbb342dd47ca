"""Rules in JAX: the same results compiled, gradients by differences, pytrees, and what is drawn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support import make_rows
from test_adapter_torch import SMOOTH

import robustkern as rk

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402

from robustkern.adapters.jax import _seed_of, _words_of, aggregate  # noqa: E402 - it imports jax

X = make_rows("normal", 9, 12, np.dtype(np.float32), seed=9)
X[:2] += 3


@pytest.mark.parametrize("rule", ["median", "ctma(geometric_median)", "nnm | trimmed_mean", "bucketing | median"])
def test_compiled_or_not_it_is_the_rule(rule: str) -> None:
    want = rk.aggregate(X, rule, f=2, seed=3)
    for call in (lambda x: aggregate(x, rule, f=2, seed=3), jax.jit(lambda x: aggregate(x, rule, f=2, seed=3))):
        got = call(jnp.asarray(X))
        assert isinstance(got, jax.Array)
        assert np.array_equal(got, want)
    assert np.array_equal(aggregate(list(jnp.asarray(X)), rk.parse_rule(rule), f=2, seed=3), want)


@pytest.mark.parametrize("rule", SMOOTH)
def test_gradients(rule: str) -> None:
    """Against those of torch, which are checked by differences."""
    torch = pytest.importorskip("torch")
    from robustkern.adapters.torch import aggregate as recorded

    direction = np.linspace(-1, 1, 12).astype(np.float32)
    x = torch.tensor(X, requires_grad=True)
    (recorded(x, rule, f=2) @ torch.tensor(direction)).backward()
    got = jax.jit(jax.grad(lambda rows: aggregate(rows, rule, f=2) @ direction))(jnp.asarray(X))
    np.testing.assert_allclose(got, x.grad, rtol=1e-4, atol=1e-5)


def test_pytrees_weights_and_a_centre() -> None:
    rows = [{"w": jnp.asarray(row[:8].reshape(2, 4)), "b": [jnp.asarray(row[8:])]} for row in X]
    got = jax.jit(lambda rows: aggregate(rows, "ctma(median)", f=2))(rows)
    want = rk.aggregate(X, "ctma(median)", f=2)
    assert np.array_equal(np.concatenate([got["w"].reshape(-1), got["b"][0]]), want)
    found = jax.grad(lambda rows: aggregate(rows, "ctma(median)", f=2)["b"][0].sum())(rows)
    kept = rk.aggregate(X, "ctma(median)", f=2, return_info=True)[1].kept
    for row, stays in zip(found, kept, strict=True):
        np.testing.assert_allclose(row["b"][0], np.full(4, 1 / 7 if stays else 0.0), rtol=1e-6)
        assert not row["w"].any()
    weights = jnp.arange(1, 10)
    got = jax.jit(lambda x, w: aggregate(x, "geometric_median", weights=w))(jnp.asarray(X), weights)
    assert np.array_equal(got, rk.geometric_median(X, weights=np.arange(1, 10)))
    centre = jnp.full(12, 0.1)
    step = jax.value_and_grad(lambda x, c: aggregate(x, "centred_clipping(tau=2.0)", centre=c).sum(), argnums=(0, 1))
    value, (of_rows, of_centre) = step(jnp.asarray(X), centre)
    want = rk.aggregate(X, "centred_clipping(tau=2.0)", centre=np.full(12, 0.1, np.float32))
    np.testing.assert_allclose(value, want.sum(), rtol=1e-5)
    assert of_rows.any()
    assert not of_centre.any()


def test_what_is_drawn_is_differentiated_as_it_was_drawn() -> None:
    for _ in range(5):
        value, gradient = jax.value_and_grad(lambda x: aggregate(x, "bucketing(size=3) | median", f=1).sum())(X)
        np.testing.assert_allclose((gradient * X).sum(), value, rtol=1e-4)  # homogeneous
    for seed in (None, 0, 1, 2**31, 2**62 + 2**31 + 5, 2**63 - 1):
        assert _seed_of(_words_of(seed)) == seed


def test_batches() -> None:
    batch = jnp.asarray(np.stack([X, X[::-1] * 2]))
    got = jax.vmap(lambda x: aggregate(x, "trimmed_mean", f=2))(batch)
    assert np.array_equal(got[0], rk.trimmed_mean(X, f=2))
    assert np.array_equal(got[1], rk.trimmed_mean(np.ascontiguousarray(X[::-1] * 2), f=2))


def test_errors_come_through() -> None:
    x: Any = jnp.asarray(X)
    with pytest.raises(Exception, match="f is required"):
        jax.block_until_ready(jax.jit(lambda x: aggregate(x, "krum"))(x))
    with pytest.raises(Exception, match="no gradient here"):
        jax.block_until_ready(jax.grad(lambda x: aggregate(x, "mean_around_median", f=2).sum())(x))
