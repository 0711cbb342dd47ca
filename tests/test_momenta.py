"""The update of all workers' momenta: each implementation on the CPU against an oracle of higher precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support import IMPLEMENTATIONS, KINDS, make_rows, ulp

import robustkern as rk
from robustkern.backends import registry
from robustkern.contract.primitives import MomentumKernels
from robustkern.contract.rows import Rows

Array = NDArray[Any]
ON_CPU: dict[str, Any] = {name: k for name, k in IMPLEMENTATIONS.items() if hasattr(k, "update_momenta")}
SIZES = [(1, 1), (2, 5), (3, 16), (4, 17), (5, 0), (9, 64), (17, 1000), (31, 15), (3, 4099), (257, 3)]


@pytest.fixture(params=list(ON_CPU))
def on_cpu(request: pytest.FixtureRequest) -> MomentumKernels:
    return ON_CPU[request.param]


def test_every_backend_of_the_cpu_has_it() -> None:
    there = {b.name for b in registry.BACKENDS if b.device == "cpu" and not isinstance(registry._load(b), str)}
    assert {name.partition("-")[0] for name in ON_CPU} == there


def oracle(m: Array, g: Array, h: Array | None, keep: float, gs: Array, hs: Array) -> Array:
    wide = [x.astype(np.longdouble) for x in (m, g)]
    with np.errstate(all="ignore"):
        new = gs[:, None] * wide[1]
        if keep != 0:
            old = wide[0] if h is None else wide[0] - hs[:, None] * h.astype(np.longdouble)
            new = new + np.longdouble(keep) * old
    return new


def check(kernels: MomentumKernels, m: Array, g: Array, h: Array | None, keep: float, gs: Array, hs: Array) -> None:
    want, got = oracle(m, g, h, keep, gs, hs), m.copy()
    before = (g.tobytes(), None if h is None else h.tobytes())
    kernels.update_momenta(
        Rows.of(got),
        Rows.of(g),
        None if h is None else Rows.of(h),
        keep=keep,
        gradient_scales=gs,
        correction_scales=None if h is None else hs,
    )
    assert before == (g.tobytes(), None if h is None else h.tobytes())
    with np.errstate(all="ignore"):
        terms = np.abs(gs[:, None] * g.astype(np.longdouble))
        if keep != 0:
            terms += abs(keep) * np.abs(m.astype(np.longdouble))
            terms += 0 if h is None else abs(keep) * np.abs(hs[:, None] * h.astype(np.longdouble))
        stored = want.astype(np.float64 if m.dtype == np.float64 else np.float32).astype(m.dtype)
    bad = ~np.isfinite(stored)
    assert np.array_equal(np.isnan(got[bad]), np.isnan(stored[bad]))
    assert np.array_equal(got[bad & ~np.isnan(stored)], stored[bad & ~np.isnan(stored)])
    # An ulp of the result in the rows' dtype, and the rounding of the terms in float64.
    allowed = ulp(want[~bad], m.dtype) + 4 * ulp(terms[~bad], np.dtype(np.float64))
    assert (np.abs(got[~bad].astype(np.longdouble) - want[~bad]) <= allowed).all()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "extreme"])
@pytest.mark.parametrize("corrected", [True, False])
def test_matches_the_oracle(on_cpu: MomentumKernels, dtype: np.dtype[Any], kind: str, corrected: bool) -> None:
    for n, d in SIZES:
        m, g, h = (make_rows(kind, n, d, dtype, seed=n + k) for k in range(3))
        rng = np.random.default_rng(n)
        for keep in (0.0, 0.3, 1.0):
            check(on_cpu, m, g, h if corrected else None, keep, rng.random(n), rng.random(n))


def test_the_largest_numbers(on_cpu: MomentumKernels) -> None:
    """What overflows in the dtype overflows to infinity, and only that."""
    big = np.finfo(np.float32).max
    m = np.array([[big, big, -big, 1.0] * 5], dtype=np.float32)
    g = np.array([[big, -big, -big, 2.0] * 5], dtype=np.float32)
    on_cpu.update_momenta(Rows.of(m), Rows.of(g), None, keep=1.0, gradient_scales=np.ones(1), correction_scales=None)
    assert np.array_equal(m[0], np.array([np.inf, 0, -np.inf, 3.0] * 5, dtype=np.float32))


def test_nothing_is_read_where_nothing_is_kept(on_cpu: MomentumKernels, dtype: np.dtype[Any]) -> None:
    """With keep 0 momenta may hold anything, and corrections need not be memory at all."""
    g = np.ones((2, 37), dtype=dtype)
    m = np.full((2, 37), np.nan, dtype=dtype)
    nowhere = Rows(np.full((1, 2), 8, dtype=np.uint64), np.array([0, 37]), dtype, None)
    on_cpu.update_momenta(
        Rows.of(m), Rows.of(g), nowhere, keep=0.0, gradient_scales=np.array([1.0, 2.0]), correction_scales=np.ones(2)
    )
    assert (m.astype(float) == [[1.0], [2.0]]).all()


def test_a_bad_value_stays_where_it_is(on_cpu: MomentumKernels, dtype: np.dtype[Any]) -> None:
    m, g, h = (np.ones((3, 50), dtype=dtype) for _ in range(3))
    g[1, 7], h[2, 9] = np.nan, np.inf
    on_cpu.update_momenta(
        Rows.of(m), Rows.of(g), Rows.of(h), keep=0.5, gradient_scales=np.ones(3), correction_scales=np.ones(3)
    )
    bad = np.zeros((3, 50), dtype=bool)
    bad[1, 7] = bad[2, 9] = True
    assert np.array_equal(~np.isfinite(m.astype(float)), bad)
    assert (m[~bad].astype(float) == 1).all()


def test_segments_concatenate(on_cpu: MomentumKernels, dtype: np.dtype[Any]) -> None:
    """The column-block law."""
    n, d, borders = 4, 2300, [0, 1, 17, 900, 900, 2300]
    m, g, h = (make_rows("normal", n, d, dtype, seed=k) for k in range(3))
    whole, cut = m.copy(), m.copy()
    options: dict[str, Any] = {"keep": 0.7, "gradient_scales": np.ones(n), "correction_scales": np.ones(n)}

    def segments(x: Array) -> Rows:
        starts = Rows.of(x).addresses[0] + np.array(borders[:-1], dtype=np.uint64)[:, None] * np.uint64(dtype.itemsize)
        return Rows(np.ascontiguousarray(starts), np.array(borders, dtype=np.int64), dtype, x)

    on_cpu.update_momenta(Rows.of(whole), Rows.of(g), Rows.of(h), **options)
    on_cpu.update_momenta(segments(cut), segments(g), segments(h), **options)
    assert np.array_equal(whole, cut)


def test_threads_change_nothing() -> None:
    m, g, h = (make_rows("normal", 7, 200_001, np.dtype(np.float32), seed=k) for k in range(3))
    results = []
    for threads in (1, 2, 3):
        rk.set_num_threads(threads)
        for backend in ("cpp", "numba"):
            got = m.copy()
            rk.kernels.update_momenta(got, g, h, keep=0.9, backend=backend)
            results.append(got)
    assert all(np.array_equal(results[k], results[k % 2]) for k in range(6))


@given(keep=st.floats(-2, 2), n=st.integers(1, 5), d=st.integers(1, 40), seed=st.integers(0, 1000))
def test_any_keep(keep: float, n: int, d: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    m, g, h = rng.standard_normal((3, n, d))
    for kernels in ON_CPU.values():
        check(kernels, m, g, h, keep, rng.random(n), rng.random(n))


# ---- the public function ---------------------------------------------------------------------------------------


def test_arrays_and_tensors() -> None:
    torch = pytest.importorskip("torch")
    m, g, h = np.random.default_rng(0).standard_normal((3, 4, 2, 3)).astype(np.float32)
    want = g + np.float32(0.5) * (m - h)
    tensor = torch.from_numpy(m.copy())
    assert rk.kernels.update_momenta(tensor, torch.from_numpy(g), torch.from_numpy(h), keep=0.5) is None
    rk.kernels.update_momenta(m, g, h, keep=0.5)
    np.testing.assert_allclose(m, want, rtol=1e-6, atol=1e-6)
    assert np.array_equal(tensor.numpy(), m)
    half = torch.ones((2, 9), dtype=torch.bfloat16)
    rk.kernels.update_momenta(half, half.clone(), keep=0.5)
    assert (half == 1.5).all()


def test_scales() -> None:
    m, g, h = np.random.default_rng(0).standard_normal((3, 4, 30))
    want = np.array([1.0, 0.5, 0, 2])[:, None] * g + 0.25 * (m - np.array([1.0, 3, 0, 0.5])[:, None] * h)
    rk.kernels.update_momenta(m, g, h, keep=0.25, gradient_scales=[1, 0.5, 0, 2], correction_scales=[1, 3, 0, 0.5])
    np.testing.assert_allclose(m, want, rtol=1e-12, atol=1e-12)


def test_nothing_to_do() -> None:
    rk.kernels.update_momenta(np.empty((3, 0)), np.empty((3, 0)), keep=1)


M, G = np.ones((3, 4)), np.ones((3, 4))
READ_ONLY = np.ones((3, 4))
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    ("momenta", "gradients", "options", "error", "message"),
    [
        (M, G, {"keep": np.nan}, ValueError, "keep must be a finite number; got nan"),
        (M, G, {"keep": "1"}, ValueError, "keep must be a finite number; got '1'"),
        (M, G, {"keep": True}, ValueError, "keep must be a finite number; got True"),
        (READ_ONLY, G, {}, ValueError, "momenta are read-only.*pass a copy"),
        (np.ones(4), G, {}, ValueError, r"momenta must be a C-contiguous array of shape \(n, ...\).*got shape \(4,\)"),
        (np.ones((4, 3)).T, G, {}, ValueError, r"momenta must be a C-contiguous .*strides \(8, 24\)"),
        (np.ones((0, 3)), G, {}, ValueError, "with n >= 1"),
        (M, np.ones((3, 5)), {}, ValueError, r"gradients must have the momenta's shape \(3, 4\).*got \(3, 5\)"),
        (M, G.astype(np.float32), {}, ValueError, "dtype float64; got .* and float32"),
        (M, M, {}, ValueError, "gradients share memory with the momenta"),
        (M, G, {"gradient_scales": [1, 2]}, ValueError, r"gradient_scales must be 3 numbers.*got shape \(2,\)"),
        (M, G, {"correction_scales": 1}, ValueError, r"correction_scales must be 3 numbers.*got shape \(\)"),
        ([[1.0]], G, {}, TypeError, "momenta is list; expected a NumPy array"),
        (np.ones((3, 4), dtype=int), G, {}, TypeError, "momenta has dtype int64; expected float16"),
        (M, G, {"backend": "cuda"}, rk.BackendUnavailable, "cuda: runs on cuda, the rows are on cpu"),
        (M, G, {"backend": "fast"}, ValueError, "backend must be one of"),
    ],
)
def test_errors(momenta: Any, gradients: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rk.kernels.update_momenta(momenta, gradients, **{"keep": 0.5, **options})
    assert (M == 1).all()


def test_corrections_are_checked_too() -> None:
    with pytest.raises(ValueError, match=r"corrections must have the momenta's shape"):
        rk.kernels.update_momenta(M, G, np.ones((3, 3)), keep=0.5)


def test_bindings_check_shapes() -> None:
    """What the Python side cannot get wrong is checked there all the same."""
    _cpu = pytest.importorskip("robustkern._cpu")
    rows = Rows.of(np.ones((3, 4)))
    one, three = np.ones(1), np.ones(3)
    isa = _cpu.supported_isas()[0]

    def call(corrections: Any, gs: Any, hs: Any, momenta: Any) -> None:
        _cpu.update_momenta(isa, rows.addresses, rows.offsets, 3, corrections, 1.0, gs, hs, momenta, 1)

    with pytest.raises(ValueError, match="momenta and corrections must have the rows' segments"):
        call(None, three, None, rows.addresses[:, :2].copy())
    with pytest.raises(ValueError, match="momenta and corrections must have the rows' segments"):
        call(rows.addresses[:, :2].copy(), three, three, rows.addresses)
    with pytest.raises(ValueError, match="one scale for each gradient"):
        call(None, one, None, rows.addresses)
    with pytest.raises(ValueError, match="one scale for each correction"):
        call(rows.addresses, three, None, rows.addresses)
