"""krum, byzpy, TorchJD, geom_median and hdmedians over the rules; their own suites run by `tests/peers/suites.py`."""

from __future__ import annotations

import asyncio
import importlib
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support import make_rows

import robustkern as rk
from robustkern.adapters import hdmedians

torch = pytest.importorskip("torch")
from robustkern.adapters import geom_median, krum  # noqa: E402 - they import torch

Array = NDArray[Any]
X = make_rows("normal", 11, 20, np.dtype(np.float64), seed=5)
X[:2] += 4
T = torch.tensor(X)


# ---- krum --------------------------------------------------------------------------------------------------------------


def krum_scores(x: Array, f: int) -> Array:
    return np.sort(((x[:, None] - x) ** 2).sum(axis=2), axis=1)[:, 1 : len(x) - f - 1].sum(axis=1)


def krums_bulyan(x: Array, f: int, m: int) -> Array:
    left, means, n = list(range(len(x))), [], len(x)
    for i in range(n - 2 * f - 2):
        rows = x[left]
        squares = np.sort(((rows[:, None] - rows) ** 2).sum(axis=2), axis=1)
        scores = squares[:, 1 : n - i - f - 2 + 1].sum(axis=1)
        best = np.argsort(scores, kind="stable")[: min(m, n - f - 2 - i)]
        mean = rows[best].mean(axis=0)
        means.append(mean)
        left.pop(int(best[((rows[best] - mean) ** 2).sum(axis=1).argmin()]))
    return np.asarray(np.sort(np.array(means), axis=0)[f : len(means) - f].mean(axis=0))


NEAR = np.argsort(((X - X[4]) ** 2).sum(axis=1), kind="stable")
KRUM: list[tuple[Any, dict[str, Any], Array]] = [
    (krum.Average, {"n": 11, "f": 2}, X.mean(axis=0)),
    (krum.Median, {}, np.median(X, axis=0)),
    (krum.TrimmedMean, {"f": 2}, np.sort(X, axis=0)[2:9].mean(axis=0)),
    (krum.Krum, {"n": 11, "f": 2, "m": 7}, X[krum_scores(X, 2).argmin()]),
    (krum.MultiKrum, {"n": 11, "f": 2}, X[np.argsort(krum_scores(X, 2))[:4]].mean(axis=0)),
    (krum.MultiKrum, {"n": 11, "f": 2, "m": 11}, X.mean(axis=0)),
    (krum.Medoid, {"n": 11, "f": 2}, rk.Medoid().plain(X, 2)),
    (krum.Brute, {"n": 11, "f": 2}, rk.MDA().plain(X, 2)),
    (krum.Aksel, {"f": 2}, rk.CTMA(rk.Median()).plain(X, 2)),
    (krum.NearestNeighborAverage, {"num_closest": 3, "pivot": T[4]}, X[NEAR[:3]].mean(axis=0)),
    (krum.Bulyan, {"n": 11, "f": 2}, krums_bulyan(X, 2, 9)),
    (krum.Bulyan, {"n": 11, "f": 2, "m": 1}, krums_bulyan(X, 2, 1)),
    (krum.GeometricMedian, {"n": 11, "f": 2}, rk.GeometricMedian(0.1, 100, tol=1e-6).plain(X, 2)),
]


@pytest.mark.parametrize("case", KRUM, ids=lambda case: case[0].__name__)
def test_krums_aggregators(case: tuple[Any, dict[str, Any], Array]) -> None:
    rule, options, want = case
    for gradients in (T, list(T)):
        got = rule.aggregate(gradients, **options)
        np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-10)
    out = torch.empty(20, dtype=torch.float64)
    assert rule.aggregate(T, out, **options) is out
    np.testing.assert_allclose(out, want, rtol=1e-8, atol=1e-10)
    with pytest.raises(RuntimeError, match=r"out has shape \(3,\); expected \(20,\)"):
        rule.aggregate(T, torch.empty(3, dtype=torch.float64), **options)
    moving = T.clone().requires_grad_()
    rule.aggregate(moving, **options).sum().backward()
    np.testing.assert_allclose(moving.grad.sum(), 20.0, rtol=1e-6)  # weights add up to 1 in every column


def test_krums_bulyan_leaves_out_one_that_it_has_taken() -> None:
    """In its second round row 6, which it has not taken, is nearer to the mean than those that it has."""
    x = torch.tensor([[3, 10], [0, 5], [10, 2], [8, 8], [5, 11], [11, 0], [3, 2]], dtype=torch.float64)
    got = krum.Bulyan.aggregate(x, n=7, f=1, m=3)
    np.testing.assert_allclose(got, [16 / 3, 17 / 3], rtol=1e-12)  # as krum 0.9.1 has it


def test_krums_scores() -> None:
    np.testing.assert_allclose(krum.MultiKrum.score(T, n=11, f=2), krum_scores(X, 2), rtol=1e-10)
    mask = torch.ones(11, dtype=torch.bool)
    mask[3] = False
    got = krum.MultiKrum.score(T, n=11, f=2, num_peers=2, valid_mask=mask)
    assert torch.isinf(got).nonzero().tolist() == [[3]]
    np.testing.assert_allclose(np.delete(got.numpy(), 3), krum_scores(np.delete(X, 3, axis=0), 6), rtol=1e-10)


def with_bad_row(value: float) -> Any:
    x = T.clone()
    x[3] = value
    return x


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("m", [None, 3])
def test_a_bad_row_spoils_no_mean_of_bulyan_that_records_gradients(value: float, m: int | None) -> None:
    x = with_bad_row(value).requires_grad_()
    got = krum.Bulyan.aggregate(x, n=11, f=2, m=m)
    np.testing.assert_allclose(got.detach(), krum.Bulyan.aggregate(x.detach(), n=11, f=2, m=m))
    got.sum().backward()
    assert x.grad.isfinite().all()
    assert not x.grad[3].any()


def test_what_is_near_to_a_pivot_is_finite() -> None:
    with pytest.raises(ValueError, match=r"Expected a pivot of finite numbers, got NaN or Inf in it \(choose another"):
        krum.NearestNeighborAverage.aggregate(T, num_closest=2, pivot=T[0] * np.nan)
    x = with_bad_row(np.nan)
    x[2] = 1e200  # too far for its square
    for count in (9, 10):
        got = krum.NearestNeighborAverage.aggregate(x, num_closest=count, pivot=T[4])
        others = np.delete(x.numpy(), [2, 3] if count == 9 else 3, axis=0)
        np.testing.assert_allclose(got, others.mean(axis=0))
    with pytest.raises(
        rk.NonFiniteError,
        match=r"at least num_closest=11 gradients without NaN or Inf, got 10 of 11: row 3 holds some \(lower num_closest",
    ):
        krum.NearestNeighborAverage.aggregate(x, num_closest=11, pivot=T[4])


def test_scores_are_of_n_rows() -> None:
    with pytest.raises(ValueError, match=r"Expected 9 gradients, got 11"):
        krum.MultiKrum.score(T, n=9, f=2)
    with pytest.raises(ValueError, match=r"Expected valid_mask with shape \(11,\), got \(9,\)"):
        krum.MultiKrum.score(T, n=11, f=2, valid_mask=torch.ones(9, dtype=torch.bool))


@pytest.mark.parametrize(
    ("rule", "options", "error", "message"),
    [
        (
            krum.Krum,
            {"n": "9", "f": 1},
            TypeError,
            "Invalid total number of workers, got n='9', expected a positive int",
        ),
        (krum.Krum, {"n": 9, "f": 1.0}, TypeError, "got f=1.0, expected a non-negative int"),
        (krum.Krum, {"n": 0, "f": 0}, ValueError, "Expected a list of at least one gradient to aggregate, got n=0"),
        (krum.Krum, {"n": 9, "f": -1}, ValueError, "got f=-1, expected 0 ≤ f"),
        (krum.Krum, {"n": 9, "f": 10}, ValueError, "got f=10, expected f ≤ n = 9"),
        (krum.Krum, {"n": 9, "f": 4}, ValueError, "got f=4, expected 0 ≤ f ≤ 3"),
        (krum.Bulyan, {"n": 9, "f": 2}, ValueError, "got f=2, expected 0 ≤ f ≤ 1"),
        (krum.Bulyan, {"n": 11, "f": 2, "m": 1.0}, TypeError, "got m=1.0, expected a positive int"),
        (krum.Bulyan, {"n": 11, "f": 2, "m": 12}, ValueError, "got m=12, expected 1 ≤ m ≤ 11"),
        (krum.MultiKrum, {"n": 7, "f": 2}, ValueError, "got m=0, expected 1 ≤ m ≤ 7"),
        (krum.MultiKrum, {"n": 9, "f": 2}, ValueError, "Expected 9 gradients, got 11"),
        (krum.Medoid, {"n": 0, "f": 2}, ValueError, "Expected a list of at least one gradient to aggregate, got 0"),
        (krum.Medoid, {"n": 9, "f": -1}, ValueError, "got f = -1, expected 0 ≤ f"),
        (krum.Medoid, {"n": 9, "f": 10}, ValueError, "got f = 10, expected f ≤ n = 9"),
        (krum.Brute, {"n": 9, "f": 5}, ValueError, "got f = 5, expected 0 ≤ f ≤ 4"),
        (krum.GeometricMedian, {"n": 11, "f": 2, "nu": 0}, ValueError, "Expected smoothing nu to be positive, got 0"),
        (
            krum.GeometricMedian,
            {"n": 11, "f": 2, "tol": -1},
            ValueError,
            "Expected tolerance to be non-negative, got -1",
        ),
        (krum.GeometricMedian, {"n": 11, "f": 2, "max_iter": 0}, ValueError, "at least one Weiszfeld iteration, got 0"),
        (krum.TrimmedMean, {"f": -1}, ValueError, "got f = -1, expected 0 ≤ f"),
        (krum.TrimmedMean, {"f": 6}, ValueError, r"At least 2f\+1 = 13 gradients required, got 11"),
        (krum.Aksel, {"f": -1}, ValueError, "got f = -1, expected 0 ≤ f"),
        (krum.Aksel, {"f": 6}, ValueError, r"At least 2f\+1 = 13 gradients required, got 11"),
        (krum.NearestNeighborAverage, {"num_closest": 0, "pivot": T[0]}, ValueError, "to be at least 1, got 0"),
        (krum.NearestNeighborAverage, {"num_closest": 12, "pivot": T[0]}, ValueError, "at least num_closest=12"),
        (krum.NearestNeighborAverage, {"num_closest": 2, "pivot": T}, ValueError, r"Expected pivot with shape \(20,\)"),
    ],
)
def test_what_krum_refuses(rule: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rule.aggregate(T, **options)


# ---- geom_median -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_geometric_medians_of_lists(weighted: bool) -> None:
    weights = np.arange(1.0, 12) if weighted else None
    want = rk.geometric_median(X, weights=weights)
    for points in (list(X), list(T), [[row[:5], row[5:]] for row in X], [(row[:5], row[5:]) for row in T]):
        found = geom_median.compute_geometric_median(points, weights)
        whole = (
            np.concatenate([np.asarray(part) for part in found.median])
            if isinstance(points[0], (list, tuple))
            else found.median
        )
        np.testing.assert_allclose(whole, want, rtol=1e-5, atol=1e-6)
        assert found.termination == "function value converged within tolerance"
        cost = np.average(np.sqrt(((X - want) ** 2).sum(axis=1)), weights=weights)
        np.testing.assert_allclose(found.logs[-1], cost)
        assert hasattr(found, "new_weights") == (
            points[0] is not X[0]
            and not isinstance(points[0], list)
            and found.median is not None
            and not isinstance(found.median, np.ndarray)
        )
    apart = geom_median.compute_geometric_median([[row[:5], row[5:]] for row in X], weights, per_component=True)
    np.testing.assert_allclose(
        apart.median[0], rk.geometric_median(np.ascontiguousarray(X[:, :5]), weights=weights), rtol=1e-5, atol=1e-6
    )
    assert len(apart.termination) == len(apart.logs) == 2
    few = geom_median.compute_geometric_median(list(X), weights, maxiter=1)
    assert few.termination == "maximum iterations reached"
    with pytest.raises(ValueError, match="points: expected at least one; got none"):
        geom_median.compute_geometric_median([])


def test_points_have_as_many_components_each() -> None:
    message = r"points: expected lists of as many components each \(pass as many in every point\)"
    with pytest.raises(ValueError, match=message):
        geom_median.compute_geometric_median([[X[0], X[1]], [X[0]]], per_component=True)


def test_geometric_medians_pass_gradients_by_their_weights() -> None:
    rows = [row.clone().requires_grad_() for row in T]
    found = geom_median.compute_geometric_median(rows)
    found.median.sum().backward()
    np.testing.assert_allclose([float(row.grad[0]) for row in rows], found.new_weights)
    pairs = [[row[:5].clone().requires_grad_(), row[5:]] for row in T]
    geom_median.compute_geometric_median(pairs).median[0].sum().backward()
    assert all(pair[0].grad is not None for pair in pairs)


# ---- hdmedians ---------------------------------------------------------------------------------------------------------


def test_medians_of_columns() -> None:
    np.testing.assert_allclose(hdmedians.geomedian(X.T), rk.geometric_median(X))
    np.testing.assert_allclose(hdmedians.geomedian(X, axis=0), rk.geometric_median(X))
    at = hdmedians.medoid(X, axis=0, indexonly=True)
    assert np.array_equal(hdmedians.medoid(X, axis=0), X[at])
    assert np.array_equal(hdmedians.medoid(X.T), rk.aggregate(X, "medoid"))
    whole = (X * 100).astype(np.int64)
    assert hdmedians.medoid(whole, axis=0).dtype == np.int64
    holes = X.copy()
    holes[at, 3] = np.nan
    others = np.delete(X, at, axis=0)
    assert np.array_equal(hdmedians.nanmedoid(holes, axis=0), rk.aggregate(others, "medoid"))
    np.testing.assert_allclose(hdmedians.nangeomedian(holes, axis=0), rk.geometric_median(others))
    few = np.array([[1.0, 2], [np.nan, 5], [3, 4]])
    assert hdmedians.nangeomedian(few, axis=0).tolist() == [2, 4]
    for call in (hdmedians.nangeomedian, hdmedians.nanmedoid):
        with pytest.raises(ValueError, match="All-NaN slice encountered"):
            call(few * np.nan)
    with pytest.raises(IndexError, match="axis 2 out of bounds"):
        hdmedians.geomedian(X, axis=2)
    with pytest.raises(ValueError, match="expected an array of 2 axes; got 1"):
        hdmedians.medoid(X[0])


# ---- TorchJD and byzpy ---------------------------------------------------------------------------------------------------


def test_torchjds_aggregators() -> None:
    pytest.importorskip("torchjd")
    from torchjd import aggregation as theirs

    from robustkern.adapters import torchjd as ours

    for name, arguments in (("Krum", (2,)), ("Krum", (2, 4)), ("TrimmedMean", (2,))):
        mine, other = getattr(ours, name)(*arguments), getattr(theirs, name)(*arguments)
        assert isinstance(mine, type(other))
        assert (repr(mine), str(mine)) == (repr(other), str(other))
        torch.testing.assert_close(mine(T), other(T))
        assert mine(T.float()).dtype == torch.float32
        x, y = T.clone().requires_grad_(), T.clone().requires_grad_()
        mine(x).sum().backward()
        other(y).sum().backward()
        torch.testing.assert_close(x.grad, y.grad)
    far = ours.Krum(1, 4)
    far.n_byzantine = 2
    assert far.gramian_weighting.n_byzantine == 2
    torch.testing.assert_close(far(T), theirs.Krum(2, 4)(T))
    with pytest.raises(ValueError, match="should have at least"):
        ours.Krum(12)(T)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_a_bad_row_spoils_no_result_of_torchjds_krum(value: float) -> None:
    pytest.importorskip("torchjd")
    from robustkern.adapters import torchjd as ours

    x = with_bad_row(value).float().requires_grad_()
    seen: list[Any] = []
    rule = ours.Krum(2, 4)
    rule.gramian_weighting.register_forward_hook(lambda *call: seen.append(call[2]))
    got = rule(x)
    want = rk.multi_krum(x.detach().double(), f=2, m=4, squared=False)
    torch.testing.assert_close(got, want.float())
    got.sum().backward()
    np.testing.assert_array_equal(x.grad[:, 0], seen[0])
    assert seen[0][3] == 0


def test_torchjds_krum_takes_rows_whose_products_overflow() -> None:
    pytest.importorskip("torchjd")
    from robustkern.adapters import torchjd as ours

    x, rule = T.float() * 1e25, ours.Krum(2, 4)
    torch.testing.assert_close(rule(x), rule(T.float()) * 1e25)
    products = ours._products(x, at_once=7)  # as on a GPU
    torch.testing.assert_close((rule.gramian_weighting(products) @ x.double()).float(), rule(x))


BYZPY = {
    "byzpy.aggregators.coordinate_wise": ["CoordinateWiseMedian", "CoordinateWiseTrimmedMean", "MeanOfMedians"],
    "byzpy.aggregators.geometric_wise": [
        "GeometricMedian",
        "Krum",
        "MinimumDiameterAveraging",
        "MoNNA",
        "MultiKrum",
        "SMEA",
    ],
    "byzpy.aggregators.norm_wise": ["CAF", "CenteredClipping", "ComparativeGradientElimination"],
    "byzpy.pre_aggregators": ["ARC", "Bucketing", "Clipping", "NearestNeighborMixing"],
}


class OfByzpy:
    """As much of byzpy's classes as the adapter uses: methods of their own in whose results a NaN spreads."""

    def __init__(self, f: int | None = None, **options: Any) -> None:
        vars(self).update({"f": f} if f is not None else {"init": "median", "c_tau": 1.0, "M": 10} | options)

    input_key = "rows"

    def aggregate(self, rows: Any) -> Any:
        return torch.stack(list(rows)).mean(dim=0)

    def pre_aggregate(self, rows: Any) -> Any:
        return list(torch.stack(list(rows)) * 0 + self.aggregate(rows))

    def compute(self, inputs: Any, *, context: Any) -> Any:
        return self.aggregate(inputs[self.input_key])

    def create_subtasks(self, inputs: Any, *, context: Any) -> Any:
        return ["a chunk"]

    async def run_barriered_subtasks(self, inputs: Any, *, context: Any, pool: Any) -> Any:
        return self.aggregate(inputs[self.input_key])


@pytest.fixture
def byzpy(monkeypatch: pytest.MonkeyPatch) -> Any:
    try:
        importlib.import_module("byzpy")
    except ImportError:
        for name in ("byzpy", "byzpy.aggregators", *BYZPY):
            made = types.ModuleType(name)
            vars(made).update({each: type(each, (OfByzpy,), {}) for each in BYZPY.get(name, ())})
            monkeypatch.setitem(sys.modules, name, made)
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, made)
    monkeypatch.delitem(sys.modules, "robustkern.adapters.byzpy", raising=False)
    yield importlib.import_module("robustkern.adapters.byzpy")
    sys.modules.pop("robustkern.adapters.byzpy", None)


def test_byzpys_aggregators() -> None:
    pytest.importorskip("byzpy")  # it pins an older torch: `tests/peers/suites.py` runs its own tests
    from robustkern.adapters import byzpy

    np.testing.assert_allclose(byzpy.MultiKrum(2, 4).aggregate(list(T)), rk.multi_krum(X, f=2, m=4, neighbours=8))
    np.testing.assert_allclose(byzpy.CoordinateWiseMedian().aggregate(list(T)), rk.median(X, even="low"))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("recording", [False, True])
def test_byzpys_neighbours_do_not_mix_in_a_bad_row(byzpy: Any, value: float, recording: bool) -> None:
    x = with_bad_row(value).requires_grad_(recording)
    got = torch.stack(byzpy.NearestNeighborMixing(2).pre_aggregate(list(x)))
    np.testing.assert_allclose(got.detach(), rk.mix(x.detach(), "nnm", f=2))
    assert (~got.isfinite()).any(dim=1).nonzero().tolist() == [[3]]
    if recording:
        (got**2).sum().backward()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_byzpys_own_methods_see_finite_rows(byzpy: Any, value: float) -> None:
    x = with_bad_row(value)
    others = [row for i, row in enumerate(x) if i != 3]
    for rule in (byzpy.GeometricMedian(), byzpy.CenteredClipping(c_tau=0.0), byzpy.CenteredClipping(c_tau=1e9, init="mean", M=200)):  # fmt: skip
        torch.testing.assert_close(rule.aggregate(list(x)), rule.aggregate(others), rtol=1e-4, atol=1e-4)
    x[:6] = np.nan
    for rule in (byzpy.GeometricMedian(), byzpy.CenteredClipping(c_tau=1.0, init="mean")):
        with pytest.raises(
            rk.NonFiniteError,
            match=r"6 of n=11 rows hold NaN or Inf, the first row 0; expected fewer than half \(drop them\)",
        ) as caught:
            rule.aggregate(list(x))
        assert caught.value.rows == (0, 1, 2, 3, 4, 5)
    with pytest.raises(
        rk.NonFiniteError,
        match=r"Krum: 6 of n=11 rows .* with f=6 no rule tolerates them \(drop them, or choose f with 2f < n\)",
    ):
        byzpy.Krum(6).aggregate(list(x))


def test_byzpys_chunks_see_finite_rows(byzpy: Any) -> None:
    for rule in (byzpy.CoordinateWiseTrimmedMean(2), byzpy.NearestNeighborMixing(2)):
        for rows, chunked in ((T, True), (with_bad_row(np.nan), False)):
            tasks = rule.create_subtasks({rule.input_key: list(rows)}, context=None)
            assert bool(list(tasks)) == chunked
    for rule in (byzpy.GeometricMedian(), byzpy.CenteredClipping(c_tau=1.0, init="mean")):
        rows = list(with_bad_row(np.nan))
        found = asyncio.run(rule.run_barriered_subtasks({rule.input_key: rows}, context=None, pool=None))
        torch.testing.assert_close(found, rule.aggregate(rows))


def test_the_guide_runs() -> None:
    """Every example of docs/adapters.md, in order."""
    text = (Path(rk.__file__).parent.parent / "docs" / "adapters.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert len(blocks) == 6
    names: dict[str, Any] = {}
    for block in blocks:
        if "flower" in block:
            pytest.importorskip("flwr")
        exec(block, names)
    assert names["f"] == 1
    assert len(names["mixed"]) == 7


def test_suites_run_unchanged(tmp_path: Path) -> None:
    """A test as a package has it, of a package that is not here."""
    (tmp_path / "test_theirs.py").write_text(
        "import byzfl, numpy as np, torch\n"
        "def test_it():\n"
        "    assert byzfl.TrMean(f=1)(np.array([[1.0], [2.0], [9.0]])) == 2\n"
        "    assert byzfl.Median()(torch.ones(3, 2, dtype=torch.float64)).dtype == torch.float32\n"
    )
    script = Path(__file__).parent / "peers" / "suites.py"
    run = [sys.executable, str(script), "byzfl", str(tmp_path / "test_theirs.py"), "-p", "no:cacheprovider"]
    found = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, env=os.environ, check=False)
    assert "1 passed" in found.stdout, found.stdout + found.stderr
    (tmp_path / "test_krum.py").write_text(
        "import torch\nfrom krum.primitives.aggregators.krum import Krum\n"
        "def test_it():\n    assert Krum.aggregate(torch.zeros(5, 2), n=5, f=1).tolist() == [0, 0]\n"
    )
    run[2:4] = ["krum", str(tmp_path / "test_krum.py")]
    found = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, env=os.environ, check=False)
    assert "1 passed" in found.stdout, found.stdout + found.stderr
    assert subprocess.run([sys.executable, str(script), "none"], capture_output=True, check=False).returncode == 2


@pytest.mark.parametrize(
    ("module", "framework", "remedy"),
    [
        ("flower", "flwr", "'robustkern[flower]'"),
        ("flower_server", "flwr", "'robustkern[flower]'"),
        ("jax", "jax", "'robustkern[jax]'"),
        ("torch", "torch", "'robustkern[torch]'"),
        ("krum", "torch", "'robustkern[torch]'"),
        ("torchjd", "torchjd", "'robustkern[torchjd]'"),
        ("nvflare", "nvflare", "'robustkern[nvflare]'"),
        ("mergekit", "mergekit", "'robustkern[mergekit]'"),
        ("byzpy", "byzpy", "byzpy"),
    ],
)
def test_a_framework_that_is_missing_is_named_with_what_brings_it(
    monkeypatch: pytest.MonkeyPatch, module: str, framework: str, remedy: str
) -> None:
    for name in [name for name in sys.modules if name.startswith(f"{framework}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, framework, None)
    monkeypatch.delitem(sys.modules, f"robustkern.adapters.{module}", raising=False)
    message = rf"this adapter needs {framework}, which is not installed \(pip install {re.escape(remedy)}\)"
    with pytest.raises(ModuleNotFoundError, match=message):
        importlib.import_module(f"robustkern.adapters.{module}")
