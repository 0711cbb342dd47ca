"""Arrays on a GPU through the public functions: by emulation everywhere, on a real one where there is one (`gpu`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import emulated
import numpy as np
import pytest
import watched
from emulated import EMULATED_DEVICE, Device, EmulatedCuda, OnDevice, StagedCuda
from numpy.typing import NDArray
from support import EMULATED, KINDS, REQUIRED, assert_close, gpu_libraries, make_rows
from test_rules import RULES

import robustkern as rk
from robustkern.backends import cuda as cuda_backend
from robustkern.backends import registry
from robustkern.contract.primitives import Kernels, Window
from robustkern.contract.rows import DTYPES, Rows
from robustkern.inputs import devices as _devices
from robustkern.inputs.trees import adapt
from robustkern.rules import geometry

Array = NDArray[Any]

EMULATION_MISSING = EMULATED if isinstance(EMULATED, str) else None


@pytest.fixture(
    params=["emulated", pytest.param("torch", marks=pytest.mark.gpu), pytest.param("cupy", marks=pytest.mark.gpu)]
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """Each kind of array on a device, where "auto" finds the backend for it."""
    if request.param == "emulated":
        if EMULATION_MISSING:
            pytest.skip(EMULATION_MISSING)
        monkeypatch.setitem(registry._loaded, "cuda", EmulatedCuda(EMULATED, EMULATED.devices()))
        EMULATED.set_order(0)
        yield EMULATED_DEVICE
        return
    found = gpu_libraries()
    library = found[request.param]
    if not isinstance(library, str):
        yield library
    elif "cuda" in REQUIRED and all(isinstance(other, str) for other in found.values()):
        pytest.fail(f"ROBUSTKERN_REQUIRE=cuda, but: {library}")
    else:
        pytest.skip(library)


@pytest.fixture
def emulation(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Give the emulated module, with its backend as what runs for arrays on a device."""
    if EMULATION_MISSING:
        pytest.skip(EMULATION_MISSING)
    monkeypatch.setitem(registry._loaded, "cuda", EmulatedCuda(EMULATED, EMULATED.devices()))
    EMULATED.set_order(0)
    yield EMULATED
    EMULATED.set_most_blocks(2**31 - 1)


# ---- the same results as on the CPU -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
def test_rules_agree_with_the_cpu(device: Device, dtype: np.dtype[Any], kind: str) -> None:
    spoilt = kind in ("nan", "inf", "nan_and_inf")
    for n, d in ((7, 67), (10, 1030), (33, 40)):
        x = make_rows(kind, n, d, dtype, seed=n)
        f = (n - 1) // 2 if spoilt else n // 3
        on_device = device.put(x)
        for rule in RULES:
            if "bucketing" in rule and spoilt:
                continue  # too few buckets are left
            if "krum" in rule and n - f - 2 < 1:
                continue
            if kind == "extreme" and dtype == np.float64 and rule.startswith(("ctma", "nnm | ctma")):
                continue  # differences from the anchor overflow
            want, expected = rk.aggregate(x, rule, f=f, backend="cpp", return_info=True)
            got, info = rk.aggregate(on_device, rule, f=f, return_info=True)
            assert type(got) is type(on_device)
            assert info.nonfinite_rows == expected.nonfinite_rows
            values = device.take(got)
            if rule in ("median", "median(even='low')"):
                assert np.array_equal(values, want)  # a selection: to the last bit
            else:
                assert_close(values, want.astype(np.longdouble), x)
            if expected.kept is not None:
                assert np.array_equal(info.kept, expected.kept)
        assert np.array_equal(device.take(on_device).view(np.uint8), x.view(np.uint8))  # never written


@pytest.mark.parametrize(
    "n",
    [
        1,
        2,
        3,
        5,
        8,
        9,
        16,
        31,
        32,
        33,
        48,
        49,
        63,
        64,
        65,
        96,
        127,
        128,
        129,
        255,
        256,
        257,
        511,
        512,
        513,
        1023,
        1024,
        1025,
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
def test_medians_agree_to_the_last_bit(device: Device, dtype: np.dtype[Any], n: int) -> None:
    for kind in ("normal", "ties", "extreme", "nan_and_inf", "subnormal"):
        for d in (1, 130 if n < 100 else 33):
            x = make_rows(kind, n, d, dtype, seed=n + d)
            for even in ("low", "mean", "high"):
                got = device.take(rk.median(device.put(x), even=even))
                assert np.array_equal(got, rk.median(x, even=even, backend="cpp"))


def test_weights_agree_with_the_cpu(device: Device) -> None:
    for dtype in DTYPES:
        for n in (5, 8, 9, 17, 24, 25, 32, 33, 48, 49, 70, 130):
            x = make_rows("normal", n, 300 if n < 9 else 77, dtype, seed=n)
            weights = np.random.default_rng(n).integers(1, 9, n)
            for rule in ("mean", "median", "trimmed_mean", "geometric_median", "ctma(median)"):
                got = device.take(rk.aggregate(device.put(x), rule, delta=0.3, weights=weights))
                assert_close(got, rk.aggregate(x, rule, delta=0.3, weights=weights).astype(np.longdouble), x)


@pytest.fixture(params=[True, False], ids=["tensor", "plain"])
def fast_doubles(request: pytest.FixtureRequest, emulation: Any) -> Iterator[bool]:
    """GPUs of data centres, which have tensor instructions for float64, and others."""
    emulation.set_fast_doubles(request.param)
    kernels = EmulatedCuda(emulation, emulation.devices())
    assert kernels.takes_float32_products(Rows.of(np.zeros((1, 1), dtype=np.float32))) != request.param
    yield request.param
    emulation.set_fast_doubles(True)


@pytest.mark.usefixtures("fast_doubles")
def test_large_rows_are_multiplied_in_float32_or_at_once_in_float64(
    emulation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry._loaded, "cuda", EmulatedCuda(emulation, emulation.devices()))
    _large_rows(EMULATED_DEVICE, monkeypatch)


def test_large_rows_are_first_multiplied_in_float32(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    _large_rows(device, monkeypatch)


def _large_rows(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "SINGLE_VALUES", 0)
    for dtype in DTYPES[:3]:
        for n in (9, 40, 66):
            x = make_rows("offset", n, 1111, dtype, seed=n)
            for rule in ("krum", "geometric_median", "nnm | ctma(median)"):
                got = device.take(rk.aggregate(device.put(x), rule, f=3))
                assert_close(got, rk.aggregate(x, rule, f=3).astype(np.longdouble), x)


@pytest.mark.usefixtures("fast_doubles")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
@pytest.mark.parametrize("n", [1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 96, 97])
def test_products_of_every_number_of_rows(emulation: Any, dtype: np.dtype[Any], n: int) -> None:
    """On both sides of every size at which another kernel takes over, for any end and alignment of the rows."""
    kernels = EmulatedCuda(emulation, emulation.devices())
    cells = np.random.default_rng(n).integers(0, 3, n)
    cells[0] = 2
    for kind, d in (("normal", 1), ("offset", 70), ("nan_and_inf", 261)):
        x = make_rows(kind, n, d, dtype, seed=n)
        shifted = np.zeros(n * d + 1, dtype=dtype)[1:].reshape(n, d)
        shifted[:] = x
        y = x.astype(np.longdouble)
        bad = ~np.isfinite(y).all(axis=1)
        for options in ({}, {"origin": True}, {"multiplicities": cells}):
            if bad.sum() * 2 >= n or (options.get("multiplicities") is not None and kind == "nan_and_inf"):
                continue
            got = kernels.gram(Rows.of(x), **options)
            assert np.array_equal(got, kernels.gram(Rows.of(shifted), **options), equal_nan=True)
            filled = np.where(np.isnan(y), np.inf, y)
            centre = np.sort(np.repeat(filled, options.get("multiplicities", np.ones(n, dtype=int)), axis=0), axis=0)
            rows = np.vstack([y, np.zeros(d)]) if options.get("origin") else y
            rows = rows - centre[(len(centre) - 1) // 2]
            lengths = np.sqrt((np.where(np.isfinite(rows), rows, 0) ** 2).sum(axis=1))
            use = np.isfinite(rows).all(axis=1)
            assert np.array_equal(np.isnan(got), ~(use[:, None] & use))
            error = abs(got - np.where(use[:, None], rows, 0) @ np.where(use[:, None], rows, 0).T)
            assert (error[np.ix_(use, use)] <= 1e-13 * np.outer(lengths, lengths)[np.ix_(use, use)]).all()


@pytest.mark.usefixtures("fast_doubles")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
@pytest.mark.parametrize(
    ("n", "k"), [(1, 1), (5, 16), (17, 17), (33, 9), (64, 32), (40, 33), (64, 64), (65, 8), (20, 65)]
)
def test_mixtures_of_every_number_of_rows(emulation: Any, dtype: np.dtype[Any], n: int, k: int) -> None:
    kernels, reference = EmulatedCuda(emulation, emulation.devices()), registry.load_backend("reference")
    rng = np.random.default_rng(n + k)
    mix = rng.random((k, n)) * (rng.random((k, n)) < 0.5)
    mix[:, 0] += 1
    for spoil in ("nothing", "a row without weight", "a row of some mixtures"):
        x = make_rows("offset", n, 75, dtype, seed=k)
        weights = mix.copy()
        if spoil != "nothing":
            x[-1, [3, 40, 74]] = np.nan, np.inf, -np.inf
            weights[: k if spoil == "a row without weight" else k // 2, -1] = 0
        divisors = weights.sum(axis=1) + (weights.sum(axis=1) == 0)
        shifted = np.zeros(n * 75 + 1, dtype=dtype)[1:].reshape(n, 75)
        shifted[:] = x
        for options in (
            {"window": Window((k - 1) // 2, k // 2 + 1)},
            {"window": Window(k // 4, k - k // 4)},
            {"window": Window((k - 1) // 2, k // 2 + 1), "nearest": k // 2 + 1},
            {"window": Window(k // 4, k - k // 4), "nearest": k - k // 4},
        ):
            results = []
            for backend, rows in ((kernels, x), (kernels, shifted), (reference, x)):
                out = np.full((1, 75), 7, dtype=dtype)
                with np.errstate(all="ignore"):
                    found = backend.select_columns(
                        Rows.of(rows), mix=weights, mix_divisors=divisors, out=Rows.of(out), **options
                    )
                results.append((out, found.nonfinite))
            (got, flags), (again, _), (want, expected) = results
            assert np.array_equal(flags, expected)
            assert got.tobytes() == again.tobytes()
            # Mixtures are rounded to float32 before they are selected from.
            step = {"float16": 2.0**-10, "bfloat16": 2.0**-7}.get(dtype.name, 3e-7)  # one of the result's last bits
            close = {"rtol": step, "atol": 1e-6, "equal_nan": True}
            np.testing.assert_allclose(got.astype(np.float64), want.astype(np.float64), **close)


def test_the_primitives_take_arrays_on_a_device(device: Device) -> None:
    x = make_rows("normal", 6, 300, np.dtype(np.float32))
    on_device = device.put(x)
    got, distances = rk.kernels.select_columns(on_device, (2, 4), distances=True)
    want, expected = rk.kernels.select_columns(x, (2, 4), distances=True)
    assert np.array_equal(device.take(got), want)
    np.testing.assert_allclose(distances, expected, rtol=1e-13)
    np.testing.assert_allclose(rk.kernels.gram(on_device, origin=True), rk.kernels.gram(x, origin=True), rtol=1e-9)
    squares = rk.kernels.row_sq_distances(on_device, device.put(x[0]))
    assert np.array_equal(squares, rk.kernels.row_sq_distances(x, x[0]))  # correct to the last bit
    weights = np.arange(6.0)
    assert np.array_equal(
        device.take(rk.kernels.weighted_row_sum(on_device, weights)), rk.kernels.weighted_row_sum(x, weights)
    )
    with pytest.raises(
        rk.BackendUnavailable, match=r"momenta are on .*; this runs on arrays in the host's memory only"
    ):
        rk.kernels.update_momenta(on_device, on_device, keep=0.5)


def test_rows_of_the_host_are_taken_there_and_back(emulation: Any) -> None:
    """How all of tests/test_kernels.py runs on a GPU."""
    kernels = StagedCuda(emulation, emulation.devices(), EMULATED_DEVICE)
    for dtype in DTYPES:
        x = make_rows("normal", 9, 70, dtype)
        assert list(_everything(kernels, x)) == list(_everything(EmulatedCuda(emulation, emulation.devices()), x))


def test_results_do_not_depend_on_the_order_of_threads(emulation: Any) -> None:
    """No sum is added to in whatever order blocks, warps and lanes come."""
    kernels = EmulatedCuda(emulation, emulation.devices())
    for dtype in DTYPES:
        for n in (6, 40, 80):
            x = make_rows("normal", n, 3000 if n < 50 else 200, dtype, seed=n)
            results = []
            for order in range(3):
                emulation.set_order(order)
                results.append(b"".join(_everything(kernels, x)))
            assert results[0] == results[1] == results[2]
    emulation.set_order(0)


def _everything(kernels: Kernels, x: Array) -> Iterator[bytes]:
    """The bytes of what every kernel makes of some rows."""
    rows, n, d = Rows.of(x), len(x), x.shape[1]
    rng = np.random.default_rng(n)
    mix = rng.random((n // 2 + 1, n))
    mix /= mix.sum(axis=1, keepdims=True)
    cells = rng.integers(0, 5, n)
    cells[0] = 3
    total, half = int(cells.sum()), len(mix) // 2
    selections: list[dict[str, Any]] = [
        {"window": Window((n - 1) // 2, n // 2 + 1)},
        {"window": Window(n // 4, n - n // 4)},
        {"window": Window((n - 1) // 2, n // 2 + 1), "nearest": n // 2 + 1},
        {"window": Window(n // 4, n - n // 4), "nearest": n - n // 4},
        {"window": Window((total - 1) // 2, total // 2 + 1), "multiplicities": cells},
        {"window": Window(half, half + 1), "mix": mix, "measure": mix},
        {"window": Window(half, half + 1), "mix": mix},
        {"window": Window(0, n), "measure": mix},
        {"window": Window(half, half + 1), "mix": mix, "distances": False},
        {"window": Window(0, half + 1), "mix": mix, "distances": False},
    ]
    for options in selections:
        out = np.full((1, d), 7, dtype=x.dtype)
        distances = options.pop("distances", True)
        found = kernels.select_columns(rows, options.pop("window"), distances=distances, out=Rows.of(out), **options)
        yield from (out.tobytes(), found.nonfinite.tobytes())
        assert (found.sq_distances is not None) == distances
        if found.sq_distances is not None:
            yield found.sq_distances.tobytes()
    for single in (False, True):
        yield kernels.gram(rows, single=single).tobytes()
    yield kernels.gram(rows, multiplicities=cells, origin=True).tobytes()
    yield kernels.row_sq_distances(rows, rows.take([0])).tobytes()
    for weights in (mix, mix[:1]):
        out = np.full((len(weights), d), 7, dtype=x.dtype)
        kernels.weighted_row_sum(rows, np.ascontiguousarray(weights), Rows.of(out))
        yield out.tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
@pytest.mark.parametrize("n", [1, 3, 9, 66])
def test_every_kernel_on_small_shapes(emulation: Any, dtype: np.dtype[Any], n: int) -> None:
    """What the sanitizers look at: rows at any alignment, exact ends of memory, NaN, pieces of some segments."""
    kernels, reference = EmulatedCuda(emulation, emulation.devices()), registry.load_backend("reference")
    for kind in ("normal", "nan_and_inf"):
        for d in (1, 37):
            x = make_rows(kind, n, d, dtype, seed=n)
            shifted = np.zeros(n * d + 1, dtype=dtype)[1:].reshape(n, d)
            shifted[:] = x
            for rows in (x, shifted):
                got, want = list(_everything(kernels, rows)), list(_everything(reference, rows))
                assert [len(part) for part in got] == [len(part) for part in want]
                assert got[0] == want[0]  # the median
    pieces = Rows.of([np.ones(8, dtype=dtype)] * n)
    segments = Rows(np.repeat(pieces.addresses, 5, axis=0), np.array([0, 8, 16, 16, 17, 20]), dtype, pieces)
    assert kernels.row_sq_distances(segments, segments.take([0])).tolist() == [[0.0] * n]
    assert kernels.gram(segments, origin=True)[n, n] == 20
    assert kernels.gram(segments, origin=True, multiplicities=np.ones(n, dtype=np.int64))[n, n] == 20


def test_every_kernel_without_tensor_instructions(emulation: Any) -> None:
    """Also for the sanitizers; results: `test_products_of_every_number_of_rows`."""
    emulation.set_fast_doubles(False)
    try:
        kernels = EmulatedCuda(emulation, emulation.devices())
        for n, dtype in ((9, np.float32), (9, np.float64), (66, np.float32)):
            x = make_rows("normal", n, 37, np.dtype(dtype), seed=n)
            for options in ({}, {"single": True}, {"origin": True, "multiplicities": np.ones(n, dtype=np.int64)}):
                gram = kernels.gram(Rows.of(x), **options)
                assert np.isfinite(gram).all()
                assert np.array_equal(gram, gram.T)
    finally:
        emulation.set_fast_doubles(True)


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), np.dtype(np.float64)], ids=lambda d: d.name)
@pytest.mark.parametrize(("n", "d"), [(5, 1100), (66, 100)])
def test_every_kernel_on_several_tiles(emulation: Any, dtype: np.dtype[Any], n: int, d: int) -> None:
    """Also for the sanitizers: one block walks over all the tiles, and only the order of sums over columns may differ."""
    kernels = EmulatedCuda(emulation, emulation.devices())
    x = make_rows("normal", n, d, dtype)
    want = list(_everything(kernels, x))
    emulation.set_most_blocks(1)
    got = list(_everything(kernels, x))
    for one, other in zip(got, want, strict=True):
        if len(one) % 8 or one == other:
            assert one == other
        else:
            np.testing.assert_allclose(np.frombuffer(one), np.frombuffer(other), rtol=1e-6)


def test_pairs_of_tiles_in_several_launches(emulation: Any) -> None:
    """More pairs than a launch may have blocks for, as of 23,100 rows on a GPU."""
    kernels = EmulatedCuda(emulation, emulation.devices())
    x = Rows.of(make_rows("normal", 200, 150, np.dtype(np.float32)))
    for fast in (True, False):
        emulation.set_fast_doubles(fast)
        want, before = kernels.gram(x), emulation.launches()
        kernels.gram(x)
        usual = emulation.launches() - before
        emulation.set_most_blocks(1)
        before = emulation.launches()
        np.testing.assert_allclose(kernels.gram(x), want, rtol=1e-12, atol=1e-12 * abs(want).max())
        assert emulation.launches() - before > usual
        emulation.set_most_blocks(2**31 - 1)
    emulation.set_fast_doubles(True)


@pytest.mark.slow
@pytest.mark.skipif(emulated.VARIANT != "plain", reason="runs under a sanitizer already")
@pytest.mark.timeout(900)  # some minutes for threads that are watched, beside the other process that runs tests
@pytest.mark.parametrize("variant", ["address", "thread"])
def test_sanitizers_find_nothing(variant: str) -> None:
    if not list(emulated.FOLDER.with_name(variant).glob("_cuda*.so")):
        if f"emulated-{variant}" in REQUIRED:
            pytest.fail(f"ROBUSTKERN_REQUIRE=emulated-{variant}, but it is not built (run: make emulation)")
        pytest.skip("no build to watch (run: make emulation)")
    variables = {"ROBUSTKERN_EMULATION": variant, "ROBUSTKERN_REQUIRE": "cuda-emulated"}
    done = watched.run(variant, ["-k", "test_every_kernel", __file__], variables)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "21 passed" in done.stdout


# ---- every kind of input -----------------------------------------------------------------------------------------


def test_lists_and_trees_of_arrays(device: Device) -> None:
    x = make_rows("normal", 5, 24, np.dtype(np.float32))
    want = rk.ctma(x, f=1, anchor="median")
    assert np.array_equal(device.take(rk.ctma([device.put(row) for row in x], f=1, anchor="median")), want)
    trees = [{"w": device.put(row[:20].reshape(4, 5)), "b": [device.put(row[20:])]} for row in x]
    got = rk.ctma(trees, f=1, anchor="median")
    assert got["w"].shape == (4, 5)
    assert np.array_equal(device.take(got["w"]).ravel(), want[:20])
    assert np.array_equal(device.take(got["b"][0]), want[20:])


def test_segments_of_strided_arrays(device: Device) -> None:
    """Runs of 1 KiB and more are used where they lie."""
    x = make_rows("normal", 5, 3 * 600, np.dtype(np.float32)).reshape(5, 3, 600)
    wide = np.zeros((5, 3, 700), dtype=np.float32)
    wide[:, :, 30:630] = x
    got = rk.trimmed_mean(device.put(wide)[:, :, 30:630], f=1)
    assert got.shape == (3, 600)
    assert_close(device.take(got).ravel(), rk.trimmed_mean(x, f=1).ravel().astype(np.longdouble), x.reshape(5, -1))


def test_out_receives_the_result(device: Device) -> None:
    x = make_rows("normal", 5, 24, np.dtype(np.float32))
    out = device.put(np.zeros(24, dtype=np.float32))
    assert rk.median(device.put(x), out=out) is out
    assert np.array_equal(device.take(out), rk.median(x))


def test_no_columns(device: Device) -> None:
    for rule in ("median", "ctma(median)", "mean"):
        assert device.take(rk.aggregate(device.put(np.zeros((5, 0), dtype=np.float32)), rule, f=1)).shape == (0,)
    kernels = registry.load_backend("cuda")
    place = adapt(device.put(np.zeros((5, 3), dtype=np.float32)))[0].direct.rows[0].place
    empty = Rows(np.zeros((1, 5), dtype=np.uint64), np.array([0, 0]), np.dtype(np.float32), None, place)
    assert kernels.gram(empty).tolist() == np.zeros((5, 5)).tolist()
    assert kernels.row_sq_distances(empty, empty.take([0])).tolist() == [[0] * 5]
    found = kernels.select_columns(empty, Window(0, 5), distances=True, measure=np.eye(5))
    assert found.sq_distances is not None
    assert found.sq_distances.tolist() == [0] * 5


def test_averages_of_the_largest_numbers_stay_numbers(device: Device) -> None:
    """Rounding may not make an infinity of finite float64 rows."""
    x = np.full((3, 5), np.finfo(np.float64).max)
    for rule in ("mean", "median", "trimmed_mean", "geometric_median", "nnm | median", "nnm | mean", "krum"):
        assert np.isfinite(device.take(rk.aggregate(device.put(x), rule, f=0))).all(), rule
        assert np.isfinite(device.take(rk.aggregate(device.put(-x), rule, f=0))).all(), rule
    with np.errstate(over="ignore"):
        assert np.isposinf(device.take(rk.kernels.weighted_row_sum(device.put(x), [1, 1, 0]))).all()  # no average


def test_too_many_bad_rows_are_named(device: Device) -> None:
    x = make_rows("normal", 5, 24, np.dtype(np.float32))
    x[1:4, 7] = np.nan
    with pytest.raises(rk.NonFiniteError, match=r"median: 3 rows hold NaN or Inf \(rows 1, 2, 3\)"):
        rk.median(device.put(x))


def test_the_mean_lets_nan_through_and_says_so(device: Device) -> None:
    x = make_rows("normal", 5, 24, np.dtype(np.float32))
    x[3, 7] = np.inf
    got, info = rk.aggregate(device.put(x), "mean", return_info=True)
    assert np.isposinf(device.take(got)[7])
    assert info.nonfinite_rows == (3,)


def test_ties_are_measured_again_on_the_device(device: Device) -> None:
    x = np.random.default_rng(0).standard_normal((6, 4000)).astype(np.float32)
    x[5] = x[1][::-1]  # columns reversed: the same distance to a constant anchor, summed in another order
    x[[0, 2, 3]] = 0
    x[4] = 100
    _, info = rk.aggregate(device.put(x), "ctma(median)", f=2, return_info=True)
    assert info.kept.tolist() == [True, True, True, True, False, False]


# ---- errors ------------------------------------------------------------------------------------------------------


def test_mixed_devices_are_errors(device: Device) -> None:
    row = np.zeros(4, dtype=np.float32)
    with pytest.raises((ValueError, TypeError), match=r"row 1 is (on cuda:0, row 0 on cpu|a \w+ array, row 0 a \w+)"):
        rk.median([row if device.name != "torch" else pytest.importorskip("torch").zeros(4), device.put(row)])
    with pytest.raises((ValueError, TypeError), match="out is"):
        rk.median(device.put(np.zeros((3, 4), dtype=np.float32)), out=row)
    with pytest.raises(rk.BackendUnavailable, match="cpp: runs on cpu, the rows are on cuda"):
        rk.median(device.put(np.zeros((3, 4), dtype=np.float32)), backend="cpp")
    with pytest.raises(rk.BackendUnavailable, match="cuda: runs on cuda, the rows are on cpu"):
        rk.median(np.zeros((3, 4), dtype=np.float32), backend="cuda")


def test_two_devices_are_an_error(emulation: Any) -> None:
    row = np.zeros(4, dtype=np.float32)
    with pytest.raises(ValueError, match=r"row 1 is on cuda:1, row 0 on cuda:0 \(move one\)"):
        rk.median([OnDevice(row), OnDevice(row, 1)])
    with pytest.raises(ValueError, match=r"out is on cuda:1; expected cuda:0 like the updates"):
        rk.median([OnDevice(row)] * 3, out=OnDevice(row.copy(), 1))
    with pytest.raises(ValueError, match=r"row 0, leaf \['b'\] is on cuda:1, leaf \['a'\] on cuda:0 \(move one\)"):
        rk.median([{"a": OnDevice(row), "b": OnDevice(row, 1)}] * 3)


def test_a_device_that_is_not_there(emulation: Any) -> None:
    row = np.zeros(4, dtype=np.float32)
    with pytest.raises(RuntimeError, match=r"choosing the device failed for n=3 rows of d=4 float32 columns on device 5: "
                       r"invalid device ordinal"):  # fmt: skip
        rk.median([OnDevice(row, 5)] * 3)
    assert rk.median([OnDevice(row)] * 3).shape == (4,)


CASES: dict[str, Callable[[Any], Any]] = {
    "select_by_network": rk.median,
    "select_weighted": lambda x: rk.median(x, weights=[1, 2, 3]),
    "select_by_merging": rk.median,
    "select_by_counting": lambda x: rk.median(x, weights=np.arange(1, 67)),
    "gram_of_few": rk.geometric_median,
    "weighted_sums": rk.mean,
    "row_sq_distances_of": lambda x: rk.kernels.row_sq_distances(x, x[0]),
}


@pytest.mark.parametrize("kernel", CASES)
def test_a_launch_that_fails_names_kernel_and_sizes(emulation: Any, kernel: str) -> None:
    n = 66 if kernel in ("select_by_merging", "select_by_counting") else 3
    x = OnDevice(np.arange(4 * n, dtype=np.float32).reshape(n, 4))
    expected = CASES[kernel](x)
    emulation.fail_launch(1, 719)
    with pytest.raises(RuntimeError, match=rf"{kernel} failed for n={n} rows of d=4 float32 columns on device 0: "
                       r"unspecified launch failure \(cudaErrorLaunchFailure\)"):  # fmt: skip
        CASES[kernel](x)
    again = CASES[kernel](x)  # the process goes on
    assert np.array_equal(getattr(again, "values", again), getattr(expected, "values", expected))


def test_a_stream_in_capture_is_refused(emulation: Any) -> None:
    emulation.set_capturing(True)
    try:
        with pytest.raises(RuntimeError, match=r"the stream is being captured into a CUDA graph.* for n=3 rows of d=4"):
            rk.mean(OnDevice(np.zeros((3, 4), dtype=np.float32)))
    finally:
        emulation.set_capturing(False)


@pytest.mark.parametrize(
    ("rule", "waits"), [("mean", 0), ("median", 1), ("ctma(median)", 1), ("geometric_median", 1), ("nnm | median", 2)]
)
def test_how_often_a_rule_waits(emulation: Any, monkeypatch: pytest.MonkeyPatch, rule: str, waits: int) -> None:
    """Once for each pass whose numbers the host goes on with; the last pass of weighted rules is only queued."""
    monkeypatch.setattr(_devices.Dlpack, "waits", False)
    x = OnDevice(make_rows("normal", 9, 500, np.dtype(np.float32)))
    before = emulation.waits()
    rk.aggregate(x, rule, f=2)
    assert emulation.waits() - before == waits


def test_no_memory_names_primitive_and_sizes(emulation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x = OnDevice(np.zeros((3, 4), dtype=np.float32))
    place_empty = _devices.Dlpack.empty

    def empty(self: Any, shape: Any, dtype: Any, *rest: Any) -> Any:
        if dtype == np.uint8:
            raise RuntimeError("out of memory")
        return place_empty(self, shape, dtype, *rest)

    monkeypatch.setattr(_devices.Dlpack, "empty", empty)
    with pytest.raises(MemoryError, match=r"gram: no \d+ bytes of workspace on cuda:0 for n=3 rows of d=4 float32 "
                       r"columns: out of memory"):  # fmt: skip
        rk.geometric_median(x)
    monkeypatch.undo()


def test_libraries_whose_arrays_nobody_can_write_say_so(emulation: Any) -> None:
    x = OnDevice(np.asfortranarray(np.zeros((3, 40), dtype=np.float32)))
    with pytest.raises(TypeError, match=r"emulated arrays must be contiguous and of a floating-point dtype"):
        rk.median(x)
    with pytest.raises(TypeError, match=r"emulated arrays must be contiguous and of a floating-point dtype"):
        rk.median([{"a": OnDevice(np.zeros(3, dtype=np.float32)), "n": OnDevice(np.zeros(1, dtype=np.int64))}] * 3)


def test_dtypes_are_not_converted_on_a_device(emulation: Any) -> None:
    x = OnDevice(np.zeros((3, 4), dtype=np.float32))
    with pytest.raises(
        TypeError, match=r"^updates are on cuda:0, where float32 is not combined as float64 \(convert\)$"
    ):
        rk.median(x, dtype="float64")
    with pytest.raises(
        TypeError, match=r"^row 0 is on cuda:0, where float32 is not combined as float64 \(convert it\)$"
    ):
        rk.median(list(x), dtype="float64")
    named = [{"a": row} for row in x]
    with pytest.raises(
        TypeError, match=r"^row 0, leaf \['a'\] is on cuda:0, where float32 is not combined as float64 \(convert it\)$"
    ):
        rk.median(named, dtype="float64")


def test_dtypes_that_nothing_can_use(emulation: Any) -> None:
    with pytest.raises(TypeError, match=r"updates has dtype int64; expected float16, bfloat16, float32 or float64"):
        rk.median(OnDevice(np.zeros((3, 4), dtype=np.int64)))
    strange = OnDevice(np.zeros((3, 4), dtype=np.complex64))
    with pytest.raises(TypeError, match=r"updates has DLPack type code \d+ of 64 bits|updates has dtype"):
        rk.median(strange)


# ---- torch and CuPy, as far as they can be seen without a GPU ------------------------------------------------------


def test_torch_tensors_on_a_device(emulation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors in the host's memory that say they are CUDA's: pointers, strides, dtypes, stream and results."""
    torch = pytest.importorskip("torch")
    streams = []

    class Tensor(torch.Tensor):  # type: ignore[misc]
        is_cpu = property(lambda self: False)
        device = property(lambda self: torch.device("cuda", 0))

        def get_device(self) -> int:
            return 0

    def empty(shape: Any, *, dtype: Any, device: Any) -> Any:
        assert str(device) == "cuda:0"
        return make(shape, dtype=dtype).fill_(7).as_subclass(Tensor)

    def current_stream(device: int) -> Any:
        streams.append(device)
        return type("Stream", (), {"cuda_stream": 0})

    make = torch.empty
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        host = torch.arange(40).reshape(5, 8).to(dtype)
        for x in (host, host.T.contiguous().T, [*host]):
            rows = [row.as_subclass(Tensor) for row in x] if isinstance(x, list) else x.as_subclass(Tensor)
            got = rk.trimmed_mean(rows, f=1)
            assert type(got) is Tensor
            assert got.as_subclass(torch.Tensor).tolist() == [16.0 + i for i in range(8)]
    trees = [{"w": host[i].as_subclass(Tensor), "n": torch.tensor([i]).as_subclass(Tensor)} for i in range(5)]
    assert rk.median(trees)["n"].as_subclass(torch.Tensor).tolist() == [2]
    assert set(streams) == {0}
    with pytest.raises(TypeError, match=r"updates has dtype torch.complex64; expected float16"):
        rk.median(torch.zeros((3, 4), dtype=torch.complex64).as_subclass(Tensor))

    def data_ptr(self: Any) -> int:
        raise RuntimeError("no storage")

    monkeypatch.setattr(Tensor, "data_ptr", data_ptr)
    with pytest.raises(TypeError, match=r"updates is a torch tensor without memory of its own: no storage"):
        rk.median(host.as_subclass(Tensor))


def test_torch_tensors_on_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match=r"updates is a torch tensor on device meta; expected cpu or cuda"):
        rk.median(torch.zeros((3, 4), device="meta"))


def test_cupy_arrays(emulation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An object that says about itself what a CuPy array does."""
    library = _devices.Cupy()

    class Fake:
        def __init__(self, values: Array) -> None:
            self.values, self.shape, self.strides, self.dtype = values, values.shape, values.strides, values.dtype
            self.data = type("Memory", (), {"ptr": values.ctypes.data})
            self.device = type("Device", (), {"id": 0})

    monkeypatch.setattr(_devices, "is_cupy_array", lambda x: isinstance(x, Fake))
    monkeypatch.setattr(_devices.Cupy, "empty", lambda self, shape, dtype, device, like: Fake(np.empty(shape, dtype)))
    monkeypatch.setattr(_devices.Cupy, "stream", lambda self, device: 0)
    x = np.arange(40, dtype=np.float32).reshape(5, 8)
    got = rk.median([Fake(row) for row in x])
    assert isinstance(got, Fake)
    assert np.array_equal(got.values, x[2])
    view = library.view(Fake(x[:, ::2]), "x")
    assert (view.shape, view.strides, view.flags.c_contiguous) == ((5, 4), (32, 8), False)


# ---- why it is absent ----------------------------------------------------------------------------------------------


def test_info_tells_the_devices(emulation: Any) -> None:
    info = rk.info()
    assert info["backends"]["cuda"] == "available"
    assert [gpu["name"] for gpu in info["gpus"]] == ["emulated"]
    assert {c["dtype"] for c in info["capabilities"] if c["backend"] == "cuda" and c["available"] == "yes"} == {
        d.name for d in DTYPES
    }


def test_absence_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = rk.info()["backends"]["cuda"]
    if reason != "available":
        assert "not built" in reason or "no GPU can be used" in reason
        with pytest.raises(rk.BackendUnavailable, match="backend 'cuda' is not available"):
            rk.use_backend("cuda").__enter__()


@pytest.mark.parametrize(
    ("driver", "remedy"),
    [
        (0, "built with CUDA 13.0, and there is no NVIDIA driver. Install one for CUDA 13 or newer"),
        (
            12040,
            "built with CUDA 13.0, driver for CUDA 12.4. Update the driver, or reinstall robustkern with an older CUDA",
        ),
        (13010, "built with CUDA 13.0, driver for CUDA 13.1. See that nvidia-smi lists a GPU"),
    ],
)
def test_no_driver_is_a_reason(monkeypatch: pytest.MonkeyPatch, driver: int, remedy: str) -> None:
    class NoDriver:
        @staticmethod
        def devices() -> None:
            raise RuntimeError("CUDA driver version is insufficient (cudaErrorInsufficientDriver)")

        runtime_version = staticmethod(lambda: 13000)
        driver_version = staticmethod(lambda: driver)

    monkeypatch.setitem(__import__("sys").modules, "robustkern._cuda", NoDriver)
    monkeypatch.setattr(rk, "_cuda", NoDriver, raising=False)
    said = f"no GPU can be used: CUDA driver version is insufficient (cudaErrorInsufficientDriver); {remedy}"
    with pytest.raises(ImportError, match=re.escape(said)):
        cuda_backend.load()
