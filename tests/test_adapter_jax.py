"""Rules in JAX, by XLA's foreign function interface and by callbacks: the same results compiled, gradients, pytrees."""

from __future__ import annotations

import collections
import concurrent.futures
import sys
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from support import REQUIRED, make_rows
from test_adapter_torch import SMOOTH

import robustkern as rk

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402

from robustkern.adapters import jax as adapter  # noqa: E402 - it imports jax
from robustkern.adapters.jax import _seed_of, _words_of, aggregate  # noqa: E402

X = make_rows("normal", 9, 12, np.dtype(np.float32), seed=9)
X[:2] += 3


@pytest.fixture(autouse=True, params=["ffi", "callback"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """How compiled programs call a rule; what was compiled for the other way is forgotten."""
    if request.param == "callback":
        monkeypatch.setattr(adapter, "without_ffi", lambda: "a test's wish")
    elif (reason := adapter.without_ffi()) is not None:
        if "jax-ffi" in REQUIRED:
            pytest.fail(f"ROBUSTKERN_REQUIRE has jax-ffi, but {reason}")
        pytest.skip(reason)
    adapter._called.clear_cache()
    yield request.param
    adapter._called.clear_cache()


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


def test_leaves_match_by_name() -> None:
    """In whatever order and class of mapping; the result, and each row's gradient, has its own structure."""
    plain = [{"w": jnp.asarray(row[:8]), "b": jnp.asarray(row[8:])} for row in X]
    mixed: list[Any] = [collections.OrderedDict(list(row.items())[:: (-1) ** i]) for i, row in enumerate(plain)]
    got = jax.jit(lambda rows: aggregate(rows, "ctma(median)", f=2))(mixed)
    assert list(got) == ["w", "b"]
    want = rk.aggregate(X, "ctma(median)", f=2)
    assert np.array_equal(np.concatenate([got["w"], got["b"]]), want)
    near = aggregate(mixed, "centred_clipping(tau=2.0)", centre=mixed[1])
    wanted = rk.aggregate(X, "centred_clipping(tau=2.0)", centre=X[1])
    assert np.array_equal(np.concatenate([near["w"], near["b"]]), wanted)
    for rows in (mixed, plain):
        found = jax.grad(lambda rows: aggregate(rows, "mean")["w"].sum())(rows)
        assert all((row["w"] == jnp.float32(1 / 9)).all() and not row["b"].any() for row in found)
    with pytest.raises(ValueError, match=r"rows: row 3 has other leaves than row 0, first \['b'\]"):
        aggregate([*plain[:3], {"w": plain[3]["w"], "c": plain[3]["b"]}], "mean")
    with pytest.raises(ValueError, match=r"centre has other leaves than row 0, first \['b'\]"):
        aggregate(plain, "mean", centre={"w": plain[0]["w"]})
    with pytest.raises(ValueError, match=r"rows: expected at least one; got none"):
        aggregate([], "mean")
    with pytest.raises(Exception, match=r"leaf|shape"):
        jax.block_until_ready(aggregate([*plain[:3], {"w": plain[3]["w"], "b": plain[3]["b"][:2]}], "mean"))


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
    rows = [{"w": row} for row in x.at[3, 2].set(jnp.nan)]
    step = jax.jit(lambda rows: aggregate(rows, "ctma(median)", f=0))
    with pytest.raises(Exception, match=r"NonFiniteError: ctma: .*NaN or Inf \(rows 3\), more than the f=0"):
        jax.block_until_ready(step(rows))
    jax.block_until_ready(jax.jit(lambda x: aggregate(x, "krum", f=2))(x))  # and leave nothing behind


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.complex64])
@pytest.mark.parametrize("shape", [(5,), (5, 0), (5, 3), (7, 2, 40_000)])
def test_dtypes_and_shapes(dtype: Any, shape: tuple[int, ...]) -> None:
    rows = np.random.default_rng(1).standard_normal(shape).astype(dtype)
    want = rk.trimmed_mean(list(rows), f=1)
    jax.config.update("jax_enable_x64", True)  # as a context it is this thread's alone, and callbacks may have another
    try:
        got = jax.jit(lambda x: aggregate(x, "trimmed_mean", f=1))(jnp.asarray(rows))
        assert got.dtype == dtype
        assert np.array_equal(got, want)
        assert np.array_equal(jax.jit(lambda x: aggregate(list(x), "trimmed_mean", f=1))(jnp.asarray(rows)), want)
    finally:
        jax.config.update("jax_enable_x64", False)


def test_numbers_that_numpy_made() -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((7, 3)), dtype=jnp.float32)
    want = aggregate(x, "bucketing | trimmed_mean", f=1, seed=3)
    for call in (
        aggregate,
        jax.jit(aggregate, static_argnames=("f", "seed"), static_argnums=1),
    ):
        got = call(x, "bucketing | trimmed_mean", f=np.int64(1), seed=np.uint32(3))
        assert np.array_equal(got, want)
    assert np.array_equal(aggregate(x, "krum", delta=np.float32(0.25)), aggregate(x, "krum", delta=0.25))


def test_errors_outside_of_compiled_functions_are_the_rules_own() -> None:
    x = jnp.ones((5, 3))
    constant: Any = np.full((5, 3), np.nan, dtype=np.float32)
    cases: list[tuple[type[Exception], str, Any]] = [
        (rk.NonFiniteError, r"median: 5 rows hold NaN or Inf", lambda: aggregate(x * jnp.nan, "median", f=1)),
        (rk.NonFiniteError, r"median: 5 rows hold NaN or Inf", lambda: aggregate(list(constant), "median", f=1)),
        (TypeError, "updates has dtype int32; expected float16", lambda: aggregate(x.astype(jnp.int32), "median")),
        (TypeError, "row 0 has dtype int32", lambda: aggregate([jnp.ones(3, jnp.int32)] * 5, "median")),
        (ValueError, "expected between 1 and 65535 rows; got 0", lambda: aggregate(x[:0], "median")),
        (ValueError, r"2\*f must be below n", lambda: aggregate(x, "median", f=3)),
        (TypeError, "median: f must be an integer; got str", lambda: aggregate(x, "median", f="x")),  # type: ignore[arg-type]
        (ValueError, "'medain' is not known", lambda: aggregate(x, "medain")),
        (ValueError, r"weights must have shape \(5,\)", lambda: aggregate(x, "median", weights=[1, 2, 3])),
        (ValueError, r"row 1 has shape \(4,\)", lambda: aggregate([jnp.ones(3), jnp.ones(4)], "median")),
        (NotImplementedError, "caf: it has no gradient", lambda: jax.grad(lambda x: aggregate(x, "caf", f=1).sum())(x)),
        (ValueError, r"with at least 2 axes; got shape \(\)", lambda: aggregate(jnp.float32(3), "median")),
    ]  # fmt: skip
    for kind, message, work in cases:
        with pytest.raises(kind, match=message) as caught:
            work()
        assert type(caught.value) is kind
    # Within a compiled function it is JAX's, whether or not the rows are its arguments.
    for work in (lambda y: aggregate(constant, "median", f=1) + y, lambda y: aggregate(y * x * jnp.nan, "median", f=1)):
        with pytest.raises(jax.errors.JaxRuntimeError, match="NonFiniteError: median: 5 rows hold NaN"):
            jax.block_until_ready(jax.jit(work)(1.0))


def test_a_dtype_that_no_rule_takes() -> None:
    with pytest.raises(Exception, match=r"cast the rows to float32|dtype"):
        jax.block_until_ready(aggregate(jnp.asarray(X).astype(jnp.float8_e4m3fnuz), "median"))


def test_rows_are_not_copied(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where XLA calls, the rule reads the array's own memory and writes where the result then lies."""
    seen = []
    run = adapter._run

    def spy(call: Any, operands: Any, results: Any) -> None:
        seen.append((operands[0].ctypes.data, results[0].ctypes.data))
        run(call, operands, results)

    monkeypatch.setattr(adapter, "_run", spy)
    x = jnp.asarray(np.zeros((9, 5000), np.float32))
    result = jax.jit(lambda x: aggregate(x, "median"))(x)
    here = (x.unsafe_buffer_pointer(), result.unsafe_buffer_pointer())
    assert (seen == [here]) == (way == "ffi")


def test_threads_call_at_once() -> None:
    step = jax.jit(lambda x: aggregate(x, "ctma(geometric_median)", f=2))
    inputs = [jnp.asarray(X * (i + 1)) for i in range(8)]
    wanted = [rk.aggregate(X * np.float32(i + 1), "ctma(geometric_median)", f=2) for i in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for _ in range(10):
            for got, want in zip(pool.map(step, inputs), wanted, strict=True):
                assert np.array_equal(got, want)


def test_why_there_is_no_ffi(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """A handler that does not fit is refused, and JAX goes on: registered before there is a backend, it would not."""
    if way == "callback":
        return
    order: list[str] = []
    monkeypatch.setattr(jax, "devices", order.append)

    def refuse(*_: Any, **__: Any) -> None:
        order.append("registered")
        raise RuntimeError("the handler's API version (0.3) is incompatible with the framework's API version (0.1)")

    monkeypatch.setattr(jax.ffi, "register_ffi_target", refuse)
    reason = str(adapter.without_ffi.__wrapped__())
    assert reason.startswith("this jaxlib does not take version (0, ")
    assert reason.endswith("the framework's API version (0.1)")
    assert order == ["cpu", "registered"]
    monkeypatch.setitem(sys.modules, "robustkern._jax", None)
    monkeypatch.delattr(rk, "_jax", raising=False)
    reason = str(adapter.without_ffi.__wrapped__())
    assert "without the headers of jaxlib (install it from its source, with RK_JAX=ON" in reason
