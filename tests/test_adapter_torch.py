"""Rules as operators of torch: gradients by gradcheck, whole graphs, modules."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from support import make_rows

import robustkern as rk

torch = pytest.importorskip("torch")
from robustkern.adapters.torch import RobustAggregation, aggregate  # noqa: E402 - it imports torch

#: Rules whose result is a function with a derivative at almost every input.
SMOOTH = [
    "mean",
    "median",
    "median(even='low')",
    "trimmed_mean",
    "geometric_median",
    "rfa",
    "geometric_median(nu=3.0)",
    "geometric_median(max_iter=2)",
    "krum",
    "multi_krum",
    "multi_krum(m=3)",
    "mda",
    "medoid",
    "monna(pivot=8)",
    "cge",
    "faba",
    "aksel",
    "spectral",
    "smea",
    "ctma(median)",
    "ctma(geometric_median)",
    "ctma(nnm | median)",
    "nnm | mean",
    "nnm | median",
    "nnm | trimmed_mean",
    "nnm | geometric_median",
    "nnm | ctma(geometric_median)",
    "bucketing(size=2, seed=3) | geometric_median",
    "clipping(limit=4.0) | mean",
    "clipping(limit=4.0) | geometric_median",
    "arc | median",
    "arc | nnm | trimmed_mean",
    "centred_clipping(tau=3.0, steps=2, start='zero')",
]


def rows_of(n: int = 9, d: int = 12) -> Any:
    x = make_rows("normal", n, d, np.dtype(np.float64), seed=n)
    x[:2] += 3
    return torch.tensor(x, requires_grad=True)


@pytest.mark.parametrize("rule", SMOOTH)
def test_gradients_are_those_of_the_rule(rule: str) -> None:
    """Differences of the rule itself, in float64."""
    x = rows_of()
    assert torch.autograd.gradcheck(lambda rows: aggregate(rows, rule, f=2), (x,), eps=1e-6, atol=1e-5)
    assert np.array_equal(aggregate(x, rule, f=2).detach(), rk.aggregate(x.detach(), rule, f=2))


def test_gradients_with_weights_and_a_centre() -> None:
    x, weights = rows_of(), torch.tensor([1.0, 2, 3, 1, 2, 3, 1, 2, 3])
    centre = torch.full((12,), 0.1, dtype=torch.float64)
    for rule, options in (
        ("mean", {}),
        ("geometric_median", {}),
        ("geometric_median(nu=2.0)", {}),
        ("ctma(geometric_median)", {"f": 2}),
        ("multi_krum(m=3)", {"f": 2}),
        ("centred_clipping(tau=2.0, steps=3)", {"centre": centre}),
    ):
        assert torch.autograd.gradcheck(
            lambda rows, rule=rule, options=options: aggregate(rows, rule, weights=weights, **options), (x,), atol=1e-5
        )
    assert torch.autograd.gradcheck(lambda rows: aggregate(rows, "ctma(centre)", f=2, centre=centre), (x,))
    assert torch.autograd.gradcheck(lambda rows: aggregate(rows, "arc | trimmed_mean", delta=0.25), (x,), atol=1e-5)


def test_lists_of_rows_of_any_shape_and_dtype() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        rows = [
            torch.randn(3, 4, generator=torch.Generator().manual_seed(k)).to(dtype).requires_grad_() for k in range(5)
        ]
        result = aggregate(rows, "ctma(median)", f=1)
        assert result.shape == (3, 4)
        assert result.dtype == dtype
        result.sum().backward()
        info = rk.aggregate([row.detach() for row in rows], "ctma(median)", f=1, return_info=True)[1]
        for row, kept in zip(rows, info.kept, strict=True):
            torch.testing.assert_close(row.grad, torch.full((3, 4), 0.25 if kept else 0.0, dtype=dtype))


def test_equal_values_share_the_gradient() -> None:
    x = torch.tensor([[1.0, 1, 1, 0], [2, 1, 2, 0], [2, 2, 2, 0], [3, 2, 2, 0], [4, 3, 2, 0]], requires_grad=True)
    aggregate(x, "median").sum().backward()
    want = [[0, 0, 0, 0.2], [0.5, 0, 0.25, 0.2], [0.5, 0.5, 0.25, 0.2], [0, 0.5, 0.25, 0.2], [0, 0, 0.25, 0.2]]
    torch.testing.assert_close(x.grad, torch.tensor(want))
    x.grad = None
    aggregate(x, "trimmed_mean", f=1).sum().backward()  # ranks 1 to 3
    torch.testing.assert_close(x.grad.sum(dim=0), torch.ones(4))
    torch.testing.assert_close(x.grad[:, 0], torch.tensor([0.0, 1, 1, 1, 0]) / 3)
    torch.testing.assert_close(x.grad[:, 1], torch.tensor([0.5, 0.5, 1, 1, 0]) / 3)


def test_rows_that_are_not_finite_get_no_gradient() -> None:
    for rule in (
        "trimmed_mean",
        "geometric_median",
        "rfa",
        "ctma(median)",
        "nnm | geometric_median",
        "arc | mean",
        "centred_clipping(tau=1.0, start='zero')",
    ):
        x = rows_of().detach().clone()
        x[4, 3] = float("nan")
        x[7] = float("inf")
        if rule == "arc | mean":
            x[[4, 7]] = 1e3
        x.requires_grad_()
        aggregate(x, rule, f=2).sum().backward()
        assert torch.isfinite(x.grad).all(), rule
        assert x.grad[:3].any()
        if rule != "arc | mean":
            assert not x.grad[[4, 7]].any()


@pytest.mark.parametrize(
    "rule", ["rfa", "arc | mean", "clipping(limit=1.0) | mean", "geometric_median(nu=0.1, max_iter=3)"]
)
def test_far_rows_of_float32_do_not_overflow(rule: str) -> None:
    wide = rows_of().detach().clone()
    wide[0] = 1e25
    x, y = wide.float().requires_grad_(), wide.float().double().requires_grad_()
    for rows in (x, y):
        aggregate(rows, rule, f=2).sum().backward()
    torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-4, atol=1e-6)


def test_mixtures_of_a_row_that_is_not_finite() -> None:
    x = rows_of().detach().clone()
    x[4, 3] = float("nan")
    x.requires_grad_()
    result, info = rk.aggregate(x.detach(), "nnm | mean", f=2, return_info=True)
    found = aggregate(x, "nnm | mean", f=2)
    assert torch.equal(found.detach(), result) or torch.isnan(result).any()
    found.sum().backward()
    torch.testing.assert_close(x.grad[:, 0], torch.as_tensor(info.weights) * (torch.arange(9) != 4))


def test_a_share_of_bad_rows_is_the_same_number_both_ways() -> None:
    x = torch.randn(100, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    aggregate(x, "trimmed_mean", delta=0.29).sum().backward()
    assert [int((x.grad[:, k] != 0).sum()) for k in range(3)] == [42] * 3


def test_a_geometric_median_on_a_row_moves_with_it() -> None:
    x = torch.tensor([[0.0, 0], [0, 0], [0, 0], [1, 0], [0, 1]], dtype=torch.float64, requires_grad=True)
    aggregate(x, "geometric_median").sum().backward()
    torch.testing.assert_close(x.grad.sum(), torch.tensor(2.0, dtype=torch.float64))
    assert not x.grad[3:].any()


def test_what_is_drawn_is_differentiated_as_it_was_drawn() -> None:
    x = rows_of(8)
    for _ in range(5):
        x.grad = None
        result = aggregate(x, "bucketing(size=3) | median", f=1)
        (gradient,) = torch.autograd.grad(result.sum(), x)
        moved = (gradient * x.detach()).sum()  # homogeneous: <gradient, x> is the result
        torch.testing.assert_close(moved, result.detach().sum())


@pytest.mark.parametrize(
    "rule", ["mean_around_median", "bulyan", "caf", "bucketing(size=1) | bucketing(size=1) | mean"]
)
def test_rules_without_a_gradient_say_so(rule: str) -> None:
    x = torch.randn(11, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    result = aggregate(x, rule, f=2)
    with pytest.raises(NotImplementedError, match="no gradient here"):
        result.sum().backward()


def test_weighted_windows_and_own_mixers_have_no_gradient() -> None:
    x = rows_of()
    with pytest.raises(NotImplementedError, match="median: it has no gradient here"):
        aggregate(x, "median", weights=torch.arange(1.0, 10)).sum().backward()


@pytest.mark.parametrize("rule", ["ctma(geometric_median)", "nnm | median", "geometric_median", "bucketing | median"])
def test_whole_graphs(rule: str) -> None:
    module = RobustAggregation(rule, f=2, seed=1)

    def step(x: Any) -> Any:
        return (module(x * 2.0) ** 2).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    x, y = rows_of(), rows_of()
    compiled(x).backward()
    step(y).backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_the_operator_keeps_torchs_own_rules() -> None:
    x = rows_of()
    torch.library.opcheck(
        torch.ops.robustkern.aggregate.default,
        ([row for row in x], "ctma(median)", 2, None, None, None, None),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_rows_that_come_one_by_one() -> None:
    x = torch.randn(5, 3)
    want = aggregate(x, "median")
    for rows in ((row for row in x), torch.nn.ParameterList(list(x)), dict(enumerate(x)).values(), tuple(x)):
        assert torch.equal(aggregate(rows, "median"), want)  # type: ignore[arg-type]


def test_errors_are_those_of_the_rule() -> None:
    x = torch.ones(5, 3)
    plain: Any = aggregate  # of which types say the same
    cases: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((torch.tensor(3.0), "median"), {}),
        ((x[:0], "median"), {}),
        (([], "median"), {}),
        ((None, "median"), {}),
        ((x, "median"), {"f": "x"}),
        ((x, "median"), {"f": 1.5}),
        ((x, "median"), {"f": 1.0}),
        ((x, "median"), {"f": True}),
        ((x, "median"), {"f": 2**70}),
        ((x, "median"), {"delta": "x"}),
        ((x, "bucketing(size=2) | mean"), {"seed": "x"}),
        ((x, "ctma(centre)"), {"f": 1, "centre": np.ones(3)}),
        ((x, 3), {}),
    ]
    for arguments, options in cases:
        with pytest.raises((TypeError, ValueError)) as want:
            rk.aggregate(*arguments, **options)
        with pytest.raises(type(want.value), match=f"^{re.escape(str(want.value))}$"):
            plain(*arguments, **options)
    for arguments, options in (((x.numpy(), "median"), {}), (([{"w": x[0]}] * 3, "median"), {}), ((x, "median"), {"weights": [1, 2, 3, 4, 5]}), ((x, "median"), {"seed": 2**70})):  # fmt: skip
        with pytest.raises(
            TypeError, match=r"must be torch tensors, and seed below 2\*\*63 \(pass torch.as_tensor\(x\)\)"
        ):
            plain(*arguments, **options)
    assert plain(x, "median", f=np.int64(1), delta=None).tolist() == [1.0] * 3


def test_modules() -> None:
    module = RobustAggregation(rk.NNM() | rk.CTMA(rk.Median()), f=2)
    assert repr(module) == "RobustAggregation('nnm | ctma(median)', f=2)"
    assert not list(module.parameters())
    x = rows_of()
    assert torch.equal(module(list(x)), torch.as_tensor(rk.aggregate(x.detach(), "nnm | ctma(median)", f=2)))
    with pytest.raises(ValueError, match="'medain' is not known"):
        RobustAggregation("medain")
    with pytest.raises(ValueError, match="f is required"):
        RobustAggregation("krum")(x)


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        (3, {}, r"rule must be a rule object or its text form; got int"),
        (rk.NNM(), {}, r"nnm only mixes the rows"),
        ("median", {"f": -1}, r"RobustAggregation: f must be an integer of at least 0; got -1"),
        ("median", {"f": 1, "delta": 0.1}, r"RobustAggregation: pass f or delta; got f=1, delta=0.1"),
        ("median", {"delta": 0.7}, r"RobustAggregation: delta must satisfy 0 <= delta < 0.5; got 0.7"),
        ("median", {"seed": -1}, r"RobustAggregation: seed must be None or an integer of at least 0; got -1"),
    ],
)
def test_modules_refuse_what_no_call_takes(rule: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        RobustAggregation(rule, **options)


def test_gradients_beside_a_row_too_far_to_be_measured() -> None:
    x = rows_of().detach().clone()
    x[3] = 1e160
    x.requires_grad_()
    aggregate(x, "geometric_median(nu=0.1, max_iter=5)").sum().backward()
    assert x.grad.isfinite().all()
    assert not x.grad[3].any()
