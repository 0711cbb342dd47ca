"""The column-block law, the number of reads, 64-bit sizes, bounded memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray
from support import make_rows, one_row
from test_rules import RULES, long_geometric_median

import robustkern as rk
from robustkern import engine
from robustkern.backends import registry
from robustkern.contract.primitives import AveragingKernels, Kernels, Selected, Window
from robustkern.contract.rows import Matrix, Rows, Vector
from robustkern.files import aggregate_files, pieces
from robustkern.rules import geometry


def cut(x: NDArray[Any], borders: list[int]) -> Rows:
    """Present the rows as one segment for each part between borders."""
    d = x.shape[1]
    ends = [*borders, d]
    starts = [0, *borders]
    base = Rows.of(x).addresses[0]
    addresses = np.stack([base + np.uint64(s * x.itemsize) for s in starts])
    return Rows(addresses, np.array([0, *ends], dtype=np.int64), x.dtype, x)


@pytest.mark.parametrize("borders", [[0], [1], [64], [7, 8, 9, 500], [0, 0, 3, 3, 999], list(range(1, 1000, 3))])
def test_segments_are_columns(kernels: Kernels, dtype: np.dtype[Any], borders: list[int]) -> None:
    """Selections and weighted sums concatenate to the same bits; Grams and distances add up."""
    x = make_rows("nan", 7, 1000, dtype)
    segmented = cut(x, borders)
    for window, nearest in ((Window(3, 4), None), (Window(2, 5), None), (Window(3, 4), 5), (Window(2, 5), 5)):
        want, whole_out = one_row(1000, dtype)
        whole = kernels.select_columns(Rows.of(x), window, nearest=nearest, out=whole_out, distances=True)
        got = np.full((1, 1000), 77, dtype=dtype)
        parts = kernels.select_columns(segmented, window, nearest=nearest, out=cut(got, borders), distances=True)
        assert np.array_equal(got[0].astype(float), want.astype(float), equal_nan=True)
        assert np.array_equal(parts.nonfinite, whole.nonfinite)
        np.testing.assert_allclose(parts.sq_distances, whole.sq_distances, rtol=1e-13)
    y = make_rows("normal", 7, 1000, dtype)
    np.testing.assert_allclose(kernels.gram(cut(y, borders)), kernels.gram(Rows.of(y)), rtol=1e-12, atol=1e-10)
    np.testing.assert_allclose(
        kernels.row_sq_distances(cut(y, borders), cut(y, borders).take([4])),
        kernels.row_sq_distances(Rows.of(y), Rows.of(y[4:5])),
        rtol=1e-15,
    )
    out = np.zeros((2, 1000), dtype=dtype)
    want_out = np.zeros((2, 1000), dtype=dtype)
    weights = np.random.default_rng(0).random((2, 7))
    kernels.weighted_row_sum(cut(y, borders), weights, cut(out, borders))
    kernels.weighted_row_sum(Rows.of(y), weights, Rows.of(want_out))
    assert np.array_equal(out, want_out)


@pytest.mark.parametrize("rule", RULES)
def test_pytrees_and_strided_rows_are_columns(rule: str) -> None:
    x = make_rows("normal", 11, 600, np.dtype(np.float64))
    want = rk.aggregate(x, rule, f=2)
    trees = [{"a": row[:1], "b": [row[1:100].reshape(9, 11), row[100:300]], "c": row[300:]} for row in x]
    got = rk.aggregate(trees, rule, f=2)
    flat = np.concatenate([got["a"], got["b"][0].ravel(), got["b"][1], got["c"]])
    np.testing.assert_allclose(flat, want, rtol=1e-11, atol=1e-13)
    for strided in (
        np.asfortranarray(x),
        np.repeat(x, 3, axis=1)[:, ::3],
        x[:, ::-1][:, ::-1],
        x[:, ::-1].copy()[:, ::-1],
    ):
        np.testing.assert_allclose(rk.aggregate(strided, rule, f=2), want, rtol=1e-11, atol=1e-13)


# ---- reads -------------------------------------------------------------------------------------------------------


class Counting:
    """Counts the calls and the bytes they read."""

    def __init__(self, inner: Kernels) -> None:
        self.inner, self.name = inner, inner.name
        self.calls: list[str] = []
        self.nbytes = 0

    def takes_float32_products(self, rows: Rows) -> bool:
        return self.inner.takes_float32_products(rows)

    @property
    def roundings(self) -> tuple[float, float]:
        return self.inner.roundings

    def select_columns(self, rows: Rows, window: Window, **options: Any) -> Selected:
        self.calls.append("select_columns")
        self.nbytes += rows.nbytes
        return self.inner.select_columns(rows, window, **options)

    def gram(self, rows: Rows, **options: Any) -> Matrix:
        self.calls.append("gram")
        self.nbytes += rows.nbytes
        return self.inner.gram(rows, **options)

    def row_sq_distances(self, rows: Rows, centres: Rows | None, **options: Any) -> Matrix:
        self.calls.append("row_sq_distances")
        self.nbytes += rows.nbytes
        return self.inner.row_sq_distances(rows, centres, **options)

    def sq_distances_to_average(self, rows: Rows, shares: Vector) -> Vector:
        self.calls.append("sq_distances_to_average")
        self.nbytes += rows.nbytes
        return cast(AveragingKernels, self.inner).sq_distances_to_average(rows, shares)

    def weighted_row_sum(self, rows: Rows, weights: Matrix, out: Rows, *, divisors: Vector | None = None) -> None:
        self.calls.append("weighted_row_sum")
        self.nbytes += rows.nbytes * int((weights != 0).any(axis=0).sum()) // rows.n
        self.inner.weighted_row_sum(rows, weights, out, divisors=divisors)


@pytest.mark.parametrize(
    ("rule", "calls", "reads"),
    [
        ("mean", ["weighted_row_sum", "row_sq_distances"], 1.05),  # Info looks whether the result, one row, is finite
        ("median", ["select_columns"], 1),
        ("trimmed_mean", ["select_columns"], 1),
        ("mean_around_median", ["select_columns"], 1),
        ("ctma(median)", ["select_columns", "weighted_row_sum"], 1.8),
        ("geometric_median", ["gram", "weighted_row_sum"], 2),
        ("rfa", ["gram", "weighted_row_sum"], 2),
        ("krum", ["gram", "weighted_row_sum"], 1.05),
        ("multi_krum", ["gram", "weighted_row_sum"], 1.8),
        ("ctma(geometric_median)", ["gram", "weighted_row_sum"], 1.8),
        ("nnm | median", ["gram", "select_columns"], 2),
        ("bucketing | median", ["select_columns"], 1),
        ("bucketing | ctma(median)", ["select_columns", "weighted_row_sum"], 2),
        ("nnm | ctma(geometric_median)", ["gram", "weighted_row_sum"], 2),
        ("bucketing | nnm | ctma(ctma(geometric_median))", ["gram", "weighted_row_sum"], 2),
        ("ctma(nnm | ctma(krum))", ["gram", "weighted_row_sum"], 1.8),
        ("nnm | ctma(median)", ["gram", "select_columns", "weighted_row_sum"], 3),
        ("ctma(nnm | median)", ["gram", "select_columns", "weighted_row_sum"], 2.8),
        ("arc | ctma(median)", ["gram", "select_columns", "weighted_row_sum"], 3),
        ("ctma(bulyan)", ["gram", "select_columns", "weighted_row_sum"], 2.8),
        ("ctma(cge)", ["row_sq_distances", "gram", "weighted_row_sum"], 2.8),
    ],
)
def test_reads_of_the_data(monkeypatch: pytest.MonkeyPatch, rule: str, calls: list[str], reads: float) -> None:
    x = make_rows("normal", 20, 5000, np.dtype(np.float32))
    counting = Counting(registry.load_backend("reference"))
    monkeypatch.setitem(registry._loaded, "reference", counting)
    _, info = rk.aggregate(x, rule, f=4, backend="reference", return_info=True)
    assert counting.calls == calls
    assert counting.nbytes <= reads * x.nbytes
    assert info.backend == "reference"


#: Rows that f attackers send beside honest ones, by name or by the size of their noise.
ATTACKS: list[float | str] = [
    1e-30,
    1e-16,
    1e-12,
    1e-8,
    1e6,
    1e12,
    1e18,
    1e20,
    1e30,
    "copies",
    "mirrored",
    "far cluster",
]


def attacked(honest: NDArray[Any], f: int, attack: float | str) -> NDArray[Any]:
    x = honest.copy()
    if attack == "copies":
        x[:f] = honest[-1]
    elif attack == "mirrored":
        x[:f] = -honest[-f:]
    elif attack == "far cluster":
        x[:f] += 1e6
    else:
        noise = np.random.default_rng(1).standard_normal((f, honest.shape[1]))
        x[:f] = (float(attack) * noise).astype(honest.dtype)
    return x


@pytest.mark.parametrize("rule", ["multi_krum", "ctma(mean)", "ctma(geometric_median)"])
@pytest.mark.parametrize("size", [1e-24, 1e-30])
def test_info_of_tiny_rows_has_digits(rule: str, size: float) -> None:
    """Float32 products of them vanish, where nothing is cut and nothing else asks for others."""
    x = np.random.default_rng(0).standard_normal((17, 20_000)).astype(np.float32)
    want = rk.aggregate(x.astype(np.float64), rule, f=0, return_info=True)[1]
    got = rk.aggregate(x * np.float32(size), rule, f=0, return_info=True)[1]
    np.testing.assert_allclose(got.sq_distances / size / size, want.sq_distances, rtol=1e-5)
    assert got.order == want.order


@pytest.mark.parametrize("attack", [None, "offset", *ATTACKS])
@pytest.mark.parametrize("n", [8, 20, 40])
def test_chains_read_large_rows_twice(monkeypatch: pytest.MonkeyPatch, n: int, attack: float | str | None) -> None:
    """Above the size where products are float32 first: of averages of most rows they would leave something open."""
    kernels = registry.load_backend("cpp")
    honest = np.random.default_rng(n).standard_normal((n, 400_000 // n)).astype(np.float32)
    f = n // 4
    x = (
        honest
        if attack is None
        else honest * np.float32(1e-4) + 1
        if attack == "offset"
        else attacked(honest, f, attack)
    )
    for rule in (
        "nnm | geometric_median",
        "nnm | ctma(geometric_median)",
        "ctma(nnm | geometric_median)",
        "nnm | krum",
        "nnm | multi_krum",
        "nnm | spectral",
    ):
        counting = Counting(kernels)
        monkeypatch.setattr(engine, "choose", lambda *_, counting=counting, **__: counting)
        rk.aggregate(x, rule, f=f)
        assert counting.calls.count("gram") == 1
        assert counting.nbytes <= 2 * x.nbytes, (rule, counting.calls)


@pytest.mark.parametrize("gap", [0.0, 1e-7, 3e-6])
@pytest.mark.parametrize("n", [16, 32, 64, 130])
def test_attackers_around_the_cut_cost_a_read(monkeypatch: pytest.MonkeyPatch, gap: float, n: int) -> None:
    """Those who know all: on rays from the geometric median, which they so do not move, as far as the last that counts.

    What float32 products leave open is measured from the median, in one read; they were two, and float64 products.
    """
    counting = Counting(registry.load_backend("cpp"))
    monkeypatch.setitem(registry._loaded, "cpp", counting)
    honest = make_rows("normal", n, 300_000 // n, np.dtype(np.float32))
    f = (n - 3) // 2
    z = long_geometric_median(honest)
    away = honest - z
    r = np.sqrt((away**2).sum(axis=1))
    k = n // 4
    x = honest.copy()
    x[:k] = z + away[:k] * (np.sort(r)[n - f - 1] / r[:k] * (1 + gap * np.arange(k)))[:, None]
    rk.aggregate(x, "ctma(geometric_median)", f=f, backend="cpp")
    assert counting.calls == ["gram", "sq_distances_to_average", "weighted_row_sum"]
    assert counting.nbytes <= 3 * x.nbytes - f * x.nbytes // n  # where nothing is left open a read less


def reads_more(counting: Counting, rule: str, f: int, honest: NDArray[Any], hostile: NDArray[Any]) -> float:
    """Return how many reads of the data more hostile rows cost than honest ones."""
    nbytes = []
    for x in (honest, hostile):
        counting.nbytes = 0
        rk.aggregate(x, rule, f=f, backend="cpp")
        nbytes.append(counting.nbytes)
    return (nbytes[1] - nbytes[0]) / honest.nbytes


def nearly_equal(honest: NDArray[Any], f: int, attack: str) -> NDArray[Any]:
    """Rows of attackers who know all others, which tell apart in their last digits."""
    x, g, eps = honest.copy(), np.random.default_rng(1), np.finfo(honest.dtype).eps
    if attack == "copies at the cut":
        x[:f] = honest[-1] * honest.dtype.type(2.77)
    elif attack == "near each":
        x[:f] = np.resize(honest[f:], x[:f].shape) * (1 + eps * g.integers(-1, 2, x[:f].shape))
    else:
        x[:f] = honest[-1] * (1 + eps * g.integers(-2, 3, x[:f].shape))
        if attack == "near one, and a far number":
            x[0, -1] = 1e30
    return x


@pytest.mark.parametrize("attack", ["near one", "near each", "near one, and a far number", "copies at the cut"])
@pytest.mark.parametrize("n", [16, 64, 130])
def test_nearly_equal_rows_do_not_choose_it_either(monkeypatch: pytest.MonkeyPatch, attack: str, n: int) -> None:
    counting = Counting(registry.load_backend("cpp"))
    monkeypatch.setitem(registry._loaded, "cpp", counting)
    rules = (
        "krum",
        "multi_krum",
        "medoid",
        "geometric_median",
        "cge",
        "nnm | median",
        "nnm | krum",
        "nnm | ctma(median)",
    )
    lifted = ("nnm | median", "median", "krum", "geometric_median", "mean")
    for dtype, most in ((np.dtype(np.float64), 1.5), (np.dtype(np.float32), 2.0)):
        honest = make_rows("normal", n, 300_000 // n, dtype)
        f = (n - 3) // 2
        for rule in (*rules, *(f"ctma({anchor})" for anchor in lifted)):
            assert reads_more(counting, rule, f, honest, nearly_equal(honest, f, attack)) <= most, (rule, dtype.name)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("n", [16, 24, 64, 130])
def test_attackers_do_not_choose_how_often_the_data_is_read(
    monkeypatch: pytest.MonkeyPatch, attack: float | str, n: int
) -> None:
    """As many as may be, beside honest rows; from where float32 products come first on."""
    counting = Counting(registry.load_backend("cpp"))
    monkeypatch.setitem(registry._loaded, "cpp", counting)
    for dtype, most in ((np.dtype(np.float64), 1.15), (np.dtype(np.float32), 2.2)):
        honest = make_rows("normal", n, 300_000 // n, dtype)
        for rule in (
            "krum",
            "multi_krum",
            "medoid",
            "bulyan",
            "geometric_median",
            "nnm | median",
            "ctma(nnm | median)",
        ):
            f = (n - 3) // (4 if rule == "bulyan" else 2)
            assert reads_more(counting, rule, f, honest, attacked(honest, f, attack)) <= most, (rule, dtype.name)


class Asked(Counting):
    """Which Grams are asked for: of a sample, of float32 or float64 products; and distances from how many rows."""

    def gram(self, rows: Rows, **options: Any) -> Matrix:
        kind = "sample" if rows.d <= 512 else "single" if options.get("single") else "double"
        self.calls.append(kind)
        self.nbytes += rows.nbytes
        return self.inner.gram(rows, **options)

    def row_sq_distances(self, rows: Rows, centres: Rows | None, **options: Any) -> Matrix:
        self.calls.append("exact" if options.get("exact", True) else f"from {0 if centres is None else centres.n}")
        self.nbytes += rows.nbytes
        return self.inner.row_sq_distances(rows, centres, **options)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    asked = Asked(registry.load_backend("cpp"))
    monkeypatch.setitem(registry._loaded, "cpp", asked)
    return asked


@pytest.mark.parametrize("attack", [1e-30, 1e-16, "copies", "ulps", 1e20, 1e30])
@pytest.mark.parametrize("rule", ["krum", "geometric_median", "nnm | median"])
def test_a_sample_tells_where_float32_products_would_be_in_vain(asked: Asked, rule: str, attack: float | str) -> None:
    """As large as it takes to look at one, and a column less; and what is hidden from it changes the cost alone."""
    n, f, d = 256, 126, geometry.SAMPLED_VALUES // 256
    honest = np.random.default_rng(0).standard_normal((n, d), dtype=np.float32)
    hostile = attacked(honest, f, "copies" if attack == "ulps" else attack)
    if attack == "ulps":
        hostile[:f] *= 1 + np.random.default_rng(1).integers(-9, 9, (f, d)).astype(np.float32) * np.float32(2**-23)
    hidden, width = hostile.copy(), geometry.SAMPLE[1]
    for begin in (2 * np.arange(geometry.SAMPLE[0]) + 1) * d // (2 * geometry.SAMPLE[0]):
        hidden[:, begin : begin + width] = honest[:, begin : begin + width]
    for x, want in (
        (honest, ["sample", "single"]),
        (honest[:, 1:], ["single"]),
        (hostile, ["sample", "double"]),
        (hidden, ["sample", "single"]),
    ):
        asked.calls.clear()
        got, info = rk.aggregate(x, rule, f=f, backend="cpp", return_info=True)
        assert asked.calls[: len(want)] == want
        if x is hostile:
            assert "single" not in asked.calls
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(geometry, "SINGLE_VALUES", 1 << 60)
            same, doubled = rk.aggregate(x, rule, f=f, backend="cpp", return_info=True)
        if info.kept is not None:
            assert np.array_equal(info.kept, doubled.kept)
        np.testing.assert_allclose(got, same, rtol=1e-4, atol=1e-5)


def test_samples_are_spread_over_segments(dtype: np.dtype[Any]) -> None:
    x = np.arange(2000, dtype=np.float64).reshape(2, 1000).astype(dtype)
    for borders in ([], [1], [100, 130, 131, 900], list(range(1, 1000, 3))):
        rows = cut(x, borders)
        sample = rows.sampled(5, 32)
        begins = [100, 300, 500, 700, 900]
        ends = [min(next(b for b in [*borders, 1000] if b > begin), begin + 32) for begin in begins]
        want = np.concatenate([x[:, a:b] for a, b in zip(begins, ends, strict=True)], axis=1)
        assert sample.d == want.shape[1]
        got = np.concatenate([sample.matrix(s) for s in range(5)], axis=1)
        assert np.array_equal(got.astype(float), want.astype(float))


def test_rows_of_two_places_are_copied() -> None:
    """With the copy between them NumPy makes copies of copies until its stack ends; it was the process's end."""
    script = """
import numpy as np
from robustkern.contract.rows import Rows
mapped, g, kept = np.zeros(1 << 24, np.float32), np.random.default_rng(0), []
for t in range(4000):
    m, k = int(g.choice([1, 5, 9, 17, 63, 203])), int(g.integers(0, 1 << 23))
    a, b = np.full(m, 1, np.float32), mapped[k : k + m] if t % 2 else np.full(m, 2, np.float32)
    kept = [np.empty(int(size), np.uint8) for size in g.integers(1, 3000, 3)]
    x = Rows.of([a, b]).matrix(0)
    assert np.array_equal(x[0], a) and np.array_equal(x[1], b)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("rule", ["krum", "multi_krum", "medoid"])
def test_what_few_rows_leave_open_takes_one_read_more(asked: Asked, rule: str) -> None:
    """Pairs of rows with the same values in other places have the same score, but for some last digits of one."""
    for seed in range(3):
        halves = np.random.default_rng(seed).standard_normal((2, 32, 10_000), dtype=np.float32)
        x = np.concatenate([np.concatenate(halves, axis=1), np.concatenate(halves[::-1], axis=1)])
        x[:32, :1000] *= np.float32(1 + 2**-22)
        asked.calls.clear()
        asked.nbytes = 0
        _, info = rk.aggregate(x, rule, f=21, backend="cpp", return_info=True)
        assert asked.calls[:2] == ["single", "from 2"]
        assert not {"double", "exact"} & set(asked.calls)
        assert asked.nbytes <= (2.7 if rule == "multi_krum" else 2.1) * x.nbytes
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(geometry, "SINGLE_VALUES", 1 << 60)
            _, doubled = rk.aggregate(x, rule, f=21, backend="cpp", return_info=True)
        assert info.order[-1] == doubled.order[-1] >= 32
        assert np.array_equal(info.kept, doubled.kept)


# ---- reproducible bits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [9, 40, 150])
@pytest.mark.parametrize("backend", ["cpp", "numba"], indirect=True)  # the reference has no threads
def test_bits_do_not_depend_on_threads(backend: str, dtype: np.dtype[Any], n: int) -> None:
    x = make_rows("normal", n, 2_400_000 // n + 13, dtype)  # enough for several threads even of 16 bits
    for rule in ("mean", "mean_around_median", "ctma(median)", "ctma(geometric_median)", "nnm | trimmed_mean"):
        results = []
        for threads in (1, 2, 3, 7):
            rk.set_num_threads(threads)
            value, info = rk.aggregate(x, rule, f=n // 5, return_info=True)
            results.append((value.tobytes(), b"" if info.sq_distances is None else info.sq_distances.tobytes()))
        assert len(set(results)) == 1, rule
    grams = []
    for threads in (1, 2, 5, 5):
        rk.set_num_threads(threads)
        grams.append(rk.kernels.gram(x).tobytes())
    assert len(set(grams)) == 1


@pytest.mark.parametrize("d", [450_000, 480_000])
def test_each_task_is_done_once(d: int) -> None:
    """Below 16 MiB each of up to 16 threads begins with a part of its own; above, all take the next task."""
    kernels, x = registry.load_backend("cpp"), Rows.of(make_rows("normal", 9, d, np.dtype(np.float32)))
    assert (x.n * d * 4 <= 1 << 24) == (d == 450_000)
    found = []
    for threads in (1, 2, 3, 15, 16, 17, 40):
        rk.set_num_threads(threads)
        out = Rows.of(np.zeros((1, d), dtype=np.float32))
        selected = kernels.select_columns(x, Window(4, 5), out=out, distances=True)
        assert selected.sq_distances is not None
        total = Rows.of(np.zeros((1, d), dtype=np.float32))
        kernels.weighted_row_sum(x, np.full((1, 9), 1 / 9), total)
        found.append([out.array(0, 0).tobytes(), selected.sq_distances.tobytes(), total.array(0, 0).tobytes()])
        found[-1] += [kernels.gram(x).tobytes(), kernels.row_sq_distances(x, None).tobytes()]
        assert isinstance(kernels, AveragingKernels)
        found[-1].append(kernels.sq_distances_to_average(x, np.arange(9) / 36).tobytes())
    assert all(one == found[0] for one in found)


# ---- sizes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [1, 1023, 4097, 10_301])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("n", [3, 130])
def test_rows_that_cpp_reads_from_files_by_any_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: int, dtype: str, n: int
) -> None:
    """Few and many steps of a piece, whole and with a rest, and several pieces; the same bits for any threads."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", n * 5 * pieces.PAGE)
    monkeypatch.setattr(pieces, "STEP_BYTES", n * pieces.PAGE)
    rows = np.random.default_rng(0).standard_normal((n, values)).astype(dtype)
    rows[n // 2, values // 2 :: 5] = np.nan
    paths = [tmp_path / f"{i}.npy" for i in range(n)]
    for path, row in zip(paths, rows, strict=True):
        np.save(path, row)
    loaded, load = [], pieces.Files._load
    monkeypatch.setattr(pieces.Files, "_load", lambda self, *asked: loaded.append(rule) or load(self, *asked))
    for rule in ("median", "trimmed_mean", "ctma(median)", "krum", "nnm | median", "mean"):
        f = None if rule == "mean" else max((n - 1) // 3, 1)
        if rule in ("krum", "nnm | median") and n < 5:
            continue
        if rule == "mean":
            rows[n // 2] = np.nan_to_num(rows[n // 2])
            np.save(paths[n // 2], rows[n // 2])
        want, told = rk.aggregate(rows, rule, f=f, return_info=True)
        found = set()
        for threads in (1, 2, 3):
            rk.set_num_threads(threads)
            info = aggregate_files(paths, rule, f=f, out=tmp_path / "out.npy")
            found.add((tmp_path / "out.npy").read_bytes())
            assert info.nonfinite_rows == told.nonfinite_rows, rule
            if told.sq_distances is not None:
                assert info.sq_distances is not None
                np.testing.assert_allclose(info.sq_distances, told.sq_distances, rtol=1e-6)
        assert len(found) == 1, rule
        got = np.load(tmp_path / "out.npy")
        if rule in ("median", "trimmed_mean", "ctma(median)", "krum", "mean"):
            assert np.array_equal(got, want), rule
        else:
            np.testing.assert_allclose(got, want, rtol=1e-2 if dtype == "float16" else 1e-6, atol=1e-6)
    if values * rows.itemsize >= pieces.PAGE:
        assert set(loaded) <= {"krum", "nnm | median"}
    aggregate_files(paths, "mean", out=tmp_path / "out.npy", backend="reference")  # which knows nothing of files
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), want, rtol=2e-3 if dtype == "float16" else 1e-6)


@pytest.mark.slow
def test_beyond_2_to_the_31_columns_in_a_sparse_file(tmp_path: Path) -> None:
    """Two rows of 2^31 + 96 float16 values, overlapping in one sparse file; what counts lies beyond 2^31.

    Once, in the compiled backend's best instruction set; every implementation is in the test that follows.
    """
    fast = registry.load_backend("cpp")
    d = 2**31 + 96
    path = tmp_path / "sparse.f16"
    with path.open("wb") as file:
        file.truncate(2 * (d + 1))
    memory = np.memmap(path, dtype=np.float16, mode="r+")
    memory[-50:-10] = 3
    first, second = memory[:d], memory[1 : d + 1]
    rows = Rows.of([first, second])
    difference = float(((first[-100:].astype(float) - second[-100:].astype(float)) ** 2).sum())
    assert difference == 18
    g = fast.gram(rows)
    assert g[0, 0] + g[1, 1] - 2 * g[0, 1] == difference
    assert fast.row_sq_distances(rows, rows.take([0])).tolist() == [[0, difference]]
    found = fast.select_columns(rows, Window(0, 1), distances=True)
    assert found.sq_distances is not None
    assert found.sq_distances.sum() == difference


def test_beyond_2_to_the_31_columns_in_segments(fast: Kernels) -> None:
    """2^31 + 2^20 columns that are the same memory again and again, outputs too."""
    piece, segments = 1 << 20, 2049
    x = np.ones((1, piece), dtype=np.float32)  # float16 takes the baseline ten times as long
    out = np.zeros((1, piece), dtype=np.float32)
    offsets = np.arange(segments + 1, dtype=np.int64) * piece
    rows = Rows(np.repeat(Rows.of(x).addresses, segments, axis=0), offsets, x.dtype, x)
    target = Rows(np.repeat(Rows.of(out).addresses, segments, axis=0), offsets, out.dtype, out)
    assert rows.d > 2**31
    if fast.name in ("cpp", "cuda-emulated"):
        fast.weighted_row_sum(rows, np.array([[2.0]]), target)
        assert (out == 2).all()
    if fast.name == "cpp":
        zero = np.zeros((1, piece), dtype=np.float32)
        centre = Rows(np.repeat(Rows.of(zero).addresses, segments, axis=0), offsets, zero.dtype, zero)
        assert fast.row_sq_distances(rows, centre)[0, 0] == rows.d
    elif fast.name != "cuda-emulated":  # which has no hours
        assert fast.gram(rows, origin=True)[1, 1] == rows.d


def test_extra_memory_is_small() -> None:
    """A rule may need 2 % of the input besides the result, by the operating system's own accounting."""
    if sys.platform != "linux":
        pytest.skip("reads /proc/self/status")
    script = """
import sys, numpy as np, robustkern as rk
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
x = np.ones((50, 4_000_000), dtype=np.float32)
x[:] = np.random.default_rng(0).standard_normal(4_000_000, dtype=np.float32)
x *= np.arange(1, 51, dtype=np.float32)[:, None]
out = np.zeros(4_000_000, dtype=np.float32)
rk.aggregate(x[:, :1000], sys.argv[1], f=10)
before = peak()
rk.aggregate(x, sys.argv[1], f=10, out=out)
print((peak() - before) / x.nbytes)
"""
    for rule in ("mean", "median", "ctma(median)", "geometric_median", "nnm | trimmed_mean", "ctma(geometric_median)"):
        done = subprocess.run([sys.executable, "-c", script, rule], capture_output=True, text=True, check=True)
        assert float(done.stdout) <= 0.02, (rule, done.stdout)
