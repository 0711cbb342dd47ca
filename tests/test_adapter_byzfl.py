"""ByzFL's names over the rules: parameters, kinds, state, errors; `tests/peers/oracles.py` compares with ByzFL."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support import make_rows

import robustkern as rk
from robustkern.adapters import byzfl

torch = pytest.importorskip("torch")
Array = NDArray[Any]
X = make_rows("normal", 9, 20, np.dtype(np.float64), seed=3)
X[:2] += 4


@pytest.fixture
def strictly() -> Iterator[None]:
    byzfl.strict = True
    yield
    byzfl.strict = False


def smoothed(x: Array, nu: float, steps: int) -> Array:
    y = np.zeros(x.shape[1])
    for _ in range(steps):
        w = 1 / np.maximum(np.sqrt(((x - y) ** 2).sum(axis=1)), nu)
        y = w @ x / w.sum()
    return y


def clipped(x: Array, y: Array, tau: float, steps: int) -> Array:
    for _ in range(steps):
        away = x - y
        length = np.maximum(np.sqrt((away**2).sum(axis=1)), 1e-300)
        y = y + (away * np.minimum(1, tau / length)[:, None]).mean(axis=0)
    return y


def krum_order(x: Array, f: int) -> Array:
    """Scores are of the n-f-1 nearest others."""
    squares = np.sort(((x[:, None] - x) ** 2).sum(axis=2), axis=1)
    return np.argsort(squares[:, 1 : len(x) - f].sum(axis=1), kind="stable")


def nearest(x: Array, point: Array, count: int) -> Array:
    return np.argsort(((x - point) ** 2).sum(axis=1), kind="stable")[:count]


NORMS = np.sqrt((X**2).sum(axis=1))
RESULTS: list[tuple[Any, Array]] = [
    (byzfl.Average(), X.mean(axis=0)),
    (byzfl.Median(), np.median(X, axis=0)),
    (byzfl.TrMean(2), np.sort(X, axis=0)[2:7].mean(axis=0)),
    (byzfl.TrMean(), X.mean(axis=0)),
    (byzfl.GeometricMedian(), smoothed(X, 0.1, 3)),
    (byzfl.GeometricMedian(nu=2.0, T=7), smoothed(X, 2.0, 7)),
    (byzfl.GeometricMedian(nu=-1.0, T=0), np.zeros(20)),
    (byzfl.Krum(2), X[krum_order(X, 2)[0]]),
    (byzfl.MultiKrum(2), X[krum_order(X, 2)[:7]].mean(axis=0)),
    (byzfl.CenteredClipping(), clipped(X, np.zeros(20), 100.0, 1)),
    (byzfl.CenteredClipping(m=X[8], L=3, tau=2.0), clipped(X, X[8], 2.0, 3)),
    (byzfl.CenteredClipping(m=X[8], L=0), X[8]),
    (byzfl.CenteredClipping(m=X[8], tau=0.0), X[8]),
    (byzfl.MDA(2), rk.MDA().plain(X, 2)),
    (byzfl.MoNNA(2, 8), X[nearest(X, X[8], 7)].mean(axis=0)),
    (byzfl.Meamed(2), rk.MeanAroundMedian().plain(X, 2)),
    (byzfl.CAF(2), rk.CAF().plain(X, 2)),
    (byzfl.CAF(), X.mean(axis=0)),
    (byzfl.SMEA(2), rk.SMEA().plain(X, 2)),
    (byzfl.NNM(2), np.stack([X[nearest(X, row, 7)].mean(axis=0) for row in X])),
    (byzfl.NNM(8), X),
    (byzfl.Clipping(), X * np.minimum(1, 2 / NORMS)[:, None]),
    (byzfl.Clipping(0.0), X * 0),
    (byzfl.ARC(2), X * np.minimum(1, np.sort(NORMS)[5] / NORMS)[:, None]),
    (byzfl.ARC(6), X * np.minimum(1, np.sort(NORMS)[4] / NORMS)[:, None]),
    (byzfl.ARC(9), X),
    (byzfl.SignFlipping(), -X.mean(axis=0)),
    (byzfl.InnerProductManipulation(3.0), -3 * X.mean(axis=0)),
    (byzfl.ALittleIsEnough(), X.mean(axis=0) + 1.5 * X.std(axis=0, ddof=1)),
    (byzfl.Mimic(4), X[4]),
    (byzfl.Inf(), np.full(20, np.inf)),
]


@pytest.mark.parametrize("case", RESULTS, ids=lambda case: type(case[0]).__name__)
@pytest.mark.parametrize("kind", ["array", "list", "tensor", "tensors", "float32", "bfloat16"])
def test_results_are_what_byzfl_defines(case: tuple[Any, Array], kind: str) -> None:
    rule, want = case
    if isinstance(rule, byzfl.CenteredClipping):
        m = rule.m if kind in ("array", "list") or rule.m is None else torch.tensor(rule.m)
        m = m if kind not in ("float32", "bfloat16") or m is None else m.to(getattr(torch, kind))
        if isinstance(m, np.ndarray) and kind == "float32":
            m = m.astype(np.float32)
        rule = byzfl.CenteredClipping(m, rule.L, rule.tau)
    vectors: Any = {
        "array": X,
        "list": list(X),
        "tensor": torch.tensor(X),
        "tensors": list(torch.tensor(X)),
        "float32": torch.tensor(X, dtype=torch.float32),
        "bfloat16": torch.tensor(X, dtype=torch.bfloat16),
    }[kind]
    before = X.copy()
    got = rule(vectors)
    assert np.array_equal(before, X)
    assert isinstance(got, np.ndarray) == (kind in ("array", "list"))
    assert got.dtype == vectors[0].dtype
    tolerance = {"float32": 1e-5, "bfloat16": 0.15}.get(kind, 1e-10)
    if kind != "bfloat16" or not isinstance(rule, (byzfl.MDA, byzfl.MultiKrum, byzfl.Krum, byzfl.MoNNA, byzfl.SMEA)):
        np.testing.assert_allclose(
            np.asarray(got.to(torch.float64) if kind not in ("array", "list") else got),
            want,
            rtol=tolerance,
            atol=tolerance,
        )


def test_a_centre_is_kept() -> None:
    for form in (np.asarray, torch.tensor):
        rule = byzfl.CenteredClipping(tau=1.0, L=2)
        assert rule.m is None
        y = np.zeros(20)
        for k in range(3):
            got = rule(form(X + k))
            y = clipped(X + k, y, 1.0, 2)
            np.testing.assert_allclose(np.asarray(got), y)
            got *= 0  # the rule has its own
    nan = X.copy()
    nan[0] = np.nan
    assert np.isfinite(byzfl.CenteredClipping()(nan)).all()


def test_global_generators_draw() -> None:
    np.random.seed(5)  # noqa: NPY002
    got = byzfl.Bucketing(4)(X)
    np.random.seed(5)  # noqa: NPY002
    order = np.random.permutation(9)  # noqa: NPY002
    np.testing.assert_allclose(got, [X[order[:4]].mean(axis=0), X[order[4:8]].mean(axis=0), X[order[8]]])
    assert byzfl.Bucketing(100)(X).shape == (1, 20)
    torch.manual_seed(5)
    got = byzfl.Bucketing(9)(torch.tensor(X))
    np.testing.assert_allclose(got[0], X.mean(axis=0))
    torch.manual_seed(5)
    drawn = byzfl.Gaussian(1.0, 0.0)(torch.tensor(X))
    assert drawn.dtype == torch.float64
    assert (drawn == 1).all()
    np.random.seed(5)  # noqa: NPY002
    got = byzfl.Gaussian()(X.astype(np.float32))
    np.random.seed(5)  # noqa: NPY002
    np.testing.assert_array_equal(got, np.random.normal(size=20).astype(np.float32))  # noqa: NPY002


@pytest.mark.parametrize("pre", [[], ["NNM"], ["Clipping", "NNM"], ["ARC", "NNM"], ["NNM", "ARC"], ["Bucketing"]])
@pytest.mark.parametrize("name", ["TrMean", "GeometricMedian", "MultiKrum", "CenteredClipping", "Average"])
def test_robust_aggregators_are_their_parts(pre: list[str], name: str) -> None:
    parameters: dict[str, dict[str, Any]] = {
        "NNM": {"f": 2},
        "ARC": {"f": 2},
        "Clipping": {"c": 5.0},
        "Bucketing": {"s": 1},
    }
    info = {"name": name, "parameters": {"f": 2, "unknown": 3}}
    whole = byzfl.RobustAggregator(info, [{"name": step, "parameters": parameters[step]} for step in pre])
    for form in (np.asarray, torch.tensor):
        vectors = form(X)
        got = whole.aggregate_vectors(list(vectors))
        for step in pre:
            vectors = getattr(byzfl, step)(**parameters[step])(vectors)
        made = getattr(byzfl, name)
        want = (made(2) if hasattr(whole.aggregator, "f") else made())(vectors)
        if name == "CenteredClipping":
            whole.aggregator.m = None
        np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=1e-9, atol=1e-12)


def test_a_chain_stores_no_mixed_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = byzfl.RobustAggregator(
        {"name": "TrMean", "parameters": {"f": 2}}, [{"name": "NNM", "parameters": {"f": 2}}]
    )
    monkeypatch.setattr(byzfl, "mix", None)
    np.testing.assert_allclose(whole.aggregate_vectors(X), rk.aggregate(X, "nnm | trimmed_mean", f=2))


def test_gradients_flow_through_tensors() -> None:
    for rule in (
        byzfl.Average(),
        byzfl.Median(),
        byzfl.TrMean(2),
        byzfl.GeometricMedian(),
        byzfl.Krum(2),
        byzfl.NNM(2),
        byzfl.Clipping(),
        byzfl.MultiKrum(2),
        byzfl.CenteredClipping(tau=3.0),
    ):
        x = torch.tensor(X, requires_grad=True)
        got = rule(x)
        assert got.requires_grad, rule
        got.sum().backward()
        assert torch.isfinite(x.grad).all()
        assert x.grad.any()
    with torch.no_grad():
        assert not byzfl.Median()(x).requires_grad


@pytest.mark.parametrize("rule", [byzfl.Clipping(3.0), byzfl.ARC(2), byzfl.NNM(2), byzfl.Bucketing(9)])
def test_gradients_of_pre_aggregators(rule: Any) -> None:
    x = torch.tensor(X, requires_grad=True)
    assert torch.autograd.gradcheck(rule, (x,), atol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
@pytest.mark.parametrize("rule", [byzfl.NNM(2), byzfl.ARC(2), byzfl.ARC(5), byzfl.ARC(9), byzfl.Clipping(3.0)])
def test_gradients_of_pre_aggregators_beside_a_bad_row(rule: Any, value: float) -> None:
    x = torch.tensor(X)
    x[3] = value
    want = rule(x)
    x.requires_grad_()
    got = rule(x)
    torch.testing.assert_close(got.detach(), want, equal_nan=True)
    (got**2).sum().backward()
    at = [i for i in range(9) if i != 3 or value == 0]
    assert x.grad[at].isfinite().all()


@pytest.mark.parametrize("rule", [byzfl.ARC(2), byzfl.ARC(8), byzfl.Clipping(3.0)])
def test_lengths_of_float32_do_not_overflow(rule: Any) -> None:
    x = torch.tensor(X, dtype=torch.float32)
    x[3] = 1e30
    want = rule(x.double()).float()
    for recording in (False, True):
        torch.testing.assert_close(rule(x.clone().requires_grad_(recording)).detach(), want)


def test_arc_that_shortens_nothing() -> None:
    x = X.copy()
    for value in (np.nan, np.inf, 1e200):
        x[3] = value
        np.testing.assert_array_equal(byzfl.ARC(9)(x), x)


def test_vectors_of_other_shapes_and_of_integers() -> None:
    cube = X.reshape(9, 4, 5)
    assert byzfl.Median()(cube).shape == (4, 5)
    assert byzfl.Clipping()(cube).shape == cube.shape
    assert byzfl.Average()(np.arange(4)) == 1.5
    assert byzfl.Average()(np.arange(8).reshape(4, 2)).tolist() == [3.0, 4.0]
    assert byzfl.Median()(torch.arange(8).reshape(4, 2)).dtype == torch.float32


def test_a_bad_row_counts_against_f() -> None:
    x = X.copy()
    x[3] = np.nan
    for rule in (
        byzfl.TrMean(2),
        byzfl.Krum(2),
        byzfl.MultiKrum(2),
        byzfl.GeometricMedian(),
        byzfl.Meamed(2),
        byzfl.CAF(2),
        byzfl.SMEA(2),
        byzfl.MDA(2),
        byzfl.MoNNA(2, 8),
        byzfl.Median(),
    ):
        assert np.isfinite(rule(x)).all()
    with pytest.raises(rk.NonFiniteError):
        byzfl.Krum(0)(x)
    assert np.isfinite(np.delete(byzfl.NNM(2)(x), 3, axis=0)).all()


def test_the_strongest_attack_is_searched() -> None:
    """Each strength is tried on the defence; f copies stand behind the honest vectors."""
    seen = []

    def defence(vectors: Array) -> Array:
        assert vectors.shape == (11, 20)
        assert np.array_equal(vectors[:9], X)
        assert np.array_equal(vectors[9], vectors[10])
        strength = -vectors[9] @ X.mean(axis=0) / (X.mean(axis=0) @ X.mean(axis=0))
        seen.append(strength)
        return X.mean(axis=0) * (1 + min(strength, 30 - strength))  # best at 15

    attack = byzfl.Optimal_InnerProductManipulation(defence, [], f=2, evals=8)
    got = attack(X)
    np.testing.assert_allclose(seen[:3], [0, 10, 30])  # twice as far while it pays
    assert len(seen) == 8
    np.testing.assert_allclose(seen[3:7], 10 + 20 * 0.8 ** np.arange(1, 5))  # then nearer and nearer, from 10
    np.testing.assert_allclose(seen[7], seen[6] + 20 * 0.8**5)  # the last one was better
    best = max(seen, key=lambda s: min(s, 30 - s))
    np.testing.assert_allclose(got, -best * X.mean(axis=0))
    for form in (np.asarray, torch.tensor):
        found = byzfl.Optimal_ALittleIsEnough(byzfl.TrMean(2), [byzfl.NNM(2)], f=2)(form(X))
        assert found.shape == (20,)
    assert byzfl.Optimal_InnerProductManipulation(f=0)(X).shape == (20,)


CALLS: list[tuple[Any, type[Exception], str]] = [
    (lambda: byzfl.TrMean(-1), ValueError, "f must be a non-negative integer"),
    (lambda: byzfl.Krum(np.int64(1)), ValueError, "f must be a non-negative integer"),
    (lambda: byzfl.NNM(1.0), ValueError, "f must be a non-negative integer"),
    (lambda: byzfl.GeometricMedian(nu=1), TypeError, "f must be a float"),
    (lambda: byzfl.GeometricMedian(T=-1), ValueError, "T must be a non-negative integer"),
    (lambda: byzfl.CenteredClipping(m=3), TypeError, "m must be of type np.ndarray or torch.Tensor"),
    (lambda: byzfl.CenteredClipping(m=X[0] * np.nan), ValueError, "m must hold finite numbers, but got NaN or Inf"),
    (lambda: byzfl.CenteredClipping(m=torch.tensor([np.inf])), ValueError, "m must hold finite numbers"),
    (lambda: byzfl.CenteredClipping(L=-1), ValueError, "L must be a non-negative integer"),
    (lambda: byzfl.CenteredClipping(tau=1), ValueError, "tau must be a non-negative float"),
    (lambda: byzfl.MoNNA(1, -1), ValueError, "idx must be a non-negative integer"),
    (lambda: byzfl.Bucketing(0), ValueError, "f must be a positive integer"),
    (lambda: byzfl.Clipping(1), ValueError, "c must be a non-negative float"),
    (lambda: byzfl.Mimic(-1), ValueError, "epsilon must be a non-negative int."),
    (lambda: byzfl.InnerProductManipulation(2), TypeError, "tau must be a float."),
    (lambda: byzfl.Gaussian(1), TypeError, "mu must be a float."),
    (lambda: byzfl.Gaussian(0.0, -1.0), ValueError, "sigma must be a non-negative float."),
    (lambda: byzfl.Optimal_ALittleIsEnough(f=-1), ValueError, "f must be a non-negative integer"),
    (lambda: byzfl.Optimal_ALittleIsEnough(evals=0), ValueError, "evals must be a positive integer"),
    (lambda: byzfl.Optimal_ALittleIsEnough(start=0), ValueError, "start must be a float."),
    (lambda: byzfl.Optimal_ALittleIsEnough(delta=0.0), ValueError, "delta must be a non-zero float."),
    (lambda: byzfl.Optimal_ALittleIsEnough(ratio=0.5), ValueError, r"ratio must be a float in \(0.5, 1\) exclusive."),
    (lambda: byzfl.TrMean(5)(X), ValueError, "Cannot tolerate 2f ≥ n. Got f=5, n=9"),
    (lambda: byzfl.MoNNA(5)(X), ValueError, "Cannot tolerate 2f ≥ n. Got f=5, n=9"),
    (lambda: byzfl.SMEA(5)(X), ValueError, r"Too many Byzantine clients \(2f >= n\). Got f=5, n=9"),
    (lambda: byzfl.MoNNA(1, 9)(X), ValueError, "idx must be smaller than n, but got idx=9 and n=9"),
    (lambda: byzfl.NNM(9)(X), ValueError, r"f must be smaller than len\(vectors\), but got f=9 and len\(vectors\)=9"),
    (lambda: byzfl.ARC()(X[:0]), ValueError, "'vectors' must hold at least one vector; got none"),
    (lambda: byzfl.ARC()(torch.ones(0, 3, requires_grad=True)), ValueError, "'vectors' must hold at least one vector"),
    (lambda: byzfl.CenteredClipping()(X[:0]), ValueError, "'vectors' must hold at least one vector; got none"),
    (lambda: byzfl.ARC(10)(X), ValueError, r"f must be smaller than len\(vectors\)\+1, but got f=10"),
    (lambda: byzfl.Mimic(9)(X), ValueError, r"epsilon must be smaller than len\(honest_vectors\), but got epsilon=9"),
    (
        lambda: byzfl.Median()(tuple(X)),
        TypeError,
        r"'vectors' should be a 'list' of \('np.ndarray' or 'torch.Tensor'\)",
    ),
    (lambda: byzfl.Median()([[1.0, 2.0]]), TypeError, "'vectors' should be a 'list'"),
    (lambda: byzfl.RobustAggregator("TrMean"), TypeError, "'aggregator_info' must be of type dict, but got str"),
    (lambda: byzfl.RobustAggregator({}, ()), TypeError, "'pre_agg_list' must be must be a list of dict"),
    (lambda: byzfl.RobustAggregator({}), KeyError, "name"),
    (
        lambda: byzfl.RobustAggregator({"name": "NNM", "parameters": {}}),
        AttributeError,
        "module 'byzfl.aggregators.aggregators' has no attribute 'NNM'",
    ),
]


@pytest.mark.parametrize("case", CALLS, ids=range(len(CALLS)))
def test_errors(case: tuple[Any, type[Exception], str]) -> None:
    call, error, message = case
    with pytest.raises(error, match=message):
        call()


@pytest.mark.usefixtures("strictly")
def test_strictly_as_there() -> None:
    assert byzfl.Median()(torch.tensor(X)).dtype == torch.float32
    assert byzfl.Inf()(X.astype(np.float32)).dtype == np.float64
    assert byzfl.Inf()(torch.tensor(X)).dtype == torch.float64
    x = X.copy()
    assert byzfl.Clipping()(x) is x
    assert np.sqrt((x**2).sum(axis=1)).max() < 2 + 1e-9
    t = torch.tensor(X, dtype=torch.float32)
    assert byzfl.ARC(2)(t) is t
    with pytest.raises(TypeError, match="m must be of type"):
        byzfl.CenteredClipping(m=X[0])
    rule = byzfl.CenteredClipping()
    assert rule(X) is rule.m
