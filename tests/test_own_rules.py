"""Rules that somebody else writes: one file, and they work wherever a built-in one does."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray
from support import make_rows

import robustkern as rk
from robustkern.files import aggregate_files
from robustkern.measure import peers, reads, roofline
from robustkern.rules import comparison, registered, table
from robustkern.rules.geometry import share_of_origin

#: What a stranger writes: minimal-diameter averaging, centred clipping, and a mixer.
SOURCE = '''
import itertools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

import robustkern as rk


@rk.register
@dataclass(frozen=True)
class Tightest(rk.Aggregator):
    """Mean of the n-f rows of smallest diameter."""

    name: ClassVar[str] = "tightest"
    aliases: ClassVar[tuple[str, ...]] = ("minimal_diameter",)
    summary: ClassVar[str] = "mean of the n-f rows of smallest diameter"
    goals: ClassVar = {"tightest": {16: 2.4}}

    def solve(self, view):
        view.measured(self.name, quick=True)
        kept = view.n - view.require_f(self.name)
        subsets = np.array(list(itertools.combinations(range(view.n), kept)))

        def diameters(squares):
            return squares[subsets[:, :, None], subsets[:, None, :]].max(axis=(1, 2))

        def pairs(k):
            return np.array(list(itertools.combinations(subsets[k], 2))).reshape(-1, 2)

        return view.mean_of(subsets[view.least(diameters, pairs=pairs)[0]])

    def rows_read_again(self, n, f):
        return n - f

    def plain(self, x, f):
        squares = ((x[:, None] - x) ** 2).sum(axis=2)
        subsets = itertools.combinations(range(len(x)), len(x) - f)
        return x[list(min(subsets, key=lambda s: squares[np.ix_(s, s)].max()))].mean(axis=0)


@rk.register
@dataclass(frozen=True)
class CentredClipping(rk.Aggregator):
    """One step from the centre: rows are clipped to a distance of tau from it."""

    tau: float = 1.0

    name: ClassVar[str] = "centred_clipping_of_mine"
    points: ClassVar[tuple[str, ...]] = ("centre",)

    def solve(self, view):
        geometry, _ = view.measured(self.name)
        length = np.sqrt(geometry.sq_distances_from(geometry.centre)) / geometry.scale
        with np.errstate(divide="ignore"):
            share = np.where(np.isfinite(length), np.minimum(1.0, self.tau / length), 0.0) / view.n
        return rk.Solution(share, centre_weight=1 - share.sum())


@rk.register
@dataclass(frozen=True)
class Pairs(rk.Mixer):
    """Means of neighbours in the list."""

    name: ClassVar[str] = "pairs"

    def mixing(self, view):
        return rk.Mixture(np.eye(view.n) + np.roll(np.eye(view.n), 1, axis=1), np.full(view.n, 2.0))
'''


@pytest.fixture
def own(tmp_path: Path, own_rules: None) -> Iterator[Path]:
    """The file, loaded."""
    path = tmp_path / "stranger.py"
    path.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("stranger", path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules["stranger"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["stranger"])
    yield path
    del sys.modules["stranger"]


def attacked(n: int = 7, d: int = 30, f: int = 2, dtype: Any = np.float32) -> NDArray[Any]:
    x = make_rows("normal", n, d, np.dtype(np.float64), seed=3)
    x[:f] += 5
    return x.astype(dtype)


def test_a_rule_of_ones_own_works_everywhere(own: Path, backend: str) -> None:
    x = attacked()
    tightest = sys.modules["stranger"].Tightest()
    want = tightest.plain(x.astype(np.float64), 2)
    got, info = rk.aggregate(x, "tightest", f=2, return_info=True)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)
    assert info.kept.tolist() == [False] * 2 + [True] * 5
    assert info.order == (2, 3, 4, 5, 6)
    assert info.rule == "tightest"
    assert info.bound_met is True
    np.testing.assert_allclose(info.sq_distances, ((x - got) ** 2).sum(axis=1), rtol=1e-4)
    for rule in (tightest, "minimal_diameter", "tightest()"):
        assert np.array_equal(rk.aggregate(x, rule, f=2), got)
    for rule in (
        "nnm | tightest",
        "ctma(tightest)",
        "ctma(nnm | tightest)",
        "pairs | tightest",
        "bucketing(size=1, seed=0) | tightest",
    ):
        assert str(rk.parse_rule(rule)) == rule
        result, info = rk.aggregate(x, rule, f=2, return_info=True)
        np.testing.assert_allclose(info.weights @ x, result, rtol=1e-5, atol=1e-6)
    assert np.array_equal(rk.ctma(x, f=2, anchor="tightest"), rk.aggregate(x, rk.CTMA("tightest"), f=2))
    trees = [{"a": row[:10], "b": [row[10:].reshape(4, 5)]} for row in x]
    assert np.array_equal(rk.aggregate(trees, "tightest", f=2)["a"], got[:10])


def test_files_and_tables_know_it(own: Path, tmp_path: Path) -> None:
    x = attacked()
    for i, row in enumerate(x):
        np.save(tmp_path / f"{i}.npy", row)
    info = aggregate_files(
        [tmp_path / f"{i}.npy" for i in range(len(x))], "ctma(tightest)", out=tmp_path / "out.npy", f=2
    )
    assert np.array_equal(np.load(tmp_path / "out.npy"), rk.aggregate(x, "ctma(tightest)", f=2))
    assert info.rule == "ctma(tightest)"
    assert "tightest" in rk.available_rules()
    assert {"tightest", "pairs"} <= set(registered())
    assert ("tightest", "mean of the n-f rows of smallest diameter", "2", "no", "2f < n") in table()
    assert "tightest" in reads.cases()
    assert reads.goal("tightest", 10) == 2.4
    peer = peers.load("numpy", 2)["tightest"]
    np.testing.assert_allclose(peer(x), rk.aggregate(x, "tightest", f=2), atol=1e-6)
    model = roofline.model_seconds(roofline.MODELS["h100"], "tightest", 16, 10**6, 4, 4)
    assert model == pytest.approx((16 + 13) * 4e6 / 3.35e12)


def test_exact_ties_and_near_ties_are_not_decided_by_rounding(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two subsets whose diameters differ in the 13th digit, large offsets, float32 products first."""
    from robustkern.rules import geometry

    monkeypatch.setattr(geometry, "SINGLE_VALUES", 0)
    x = np.zeros((4, 3), dtype=np.float64)
    x[:, 0] = [0.0, 1.0, 2.0 + 2.0**-45, 3.0 + 2.0**-45 + 2.0**-44]
    x += 1000.0  # subsets of three: {0,1,2} has diameter 2 + 2^-45, {1,2,3} 2 + 2^-45 + 2^-44
    exact = [max(abs(x[i, 0] - x[j, 0]) for i, j in itertools.combinations(s, 2)) for s in [(0, 1, 2), (1, 2, 3)]]
    assert exact[0] < exact[1]
    _, info = rk.aggregate(x, "tightest", f=1, return_info=True)
    assert info.order == (0, 1, 2)
    _, info = rk.aggregate(x[::-1].copy(), "tightest", f=1, return_info=True)
    assert info.order == (1, 2, 3)
    single = np.array([[0.0], [1], [2], [3]], dtype=np.float32).repeat(50, axis=1)  # an exact tie: the first subset
    _, info = rk.aggregate(single, "tightest", f=1, return_info=True)
    assert info.order == (0, 1, 2)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_centre_comes_in_and_carries_weight(own: Path, backend: str, dtype: Any, tmp_path: Path) -> None:
    x = attacked(9, 41, 3, dtype)
    x[0] = np.nan
    centre = make_rows("normal", 1, 41, np.dtype(dtype), seed=9)[0]
    wide, c = x.astype(np.float64), centre.astype(np.float64)
    length = np.sqrt(((wide - c) ** 2).sum(axis=1))
    clipped = np.where(np.isnan(length), 0, np.minimum(1, 2.5 / length))
    want = c + np.nan_to_num((wide - c) * clipped[:, None]).sum(axis=0) / 9
    rule = "centred_clipping_of_mine(tau=2.5)"
    got, info = rk.aggregate(x, rule, f=3, centre=centre, return_info=True)
    tolerance = 2e-3 if dtype == np.float16 else 1e-6
    np.testing.assert_allclose(got.astype(np.float64), want, atol=tolerance)
    assert info.nonfinite_rows == (0,)
    np.testing.assert_allclose(info.sq_distances[1:], ((wide[1:] - want) ** 2).sum(axis=1), rtol=1e-3)
    rows = [{"w": row[:20].reshape(4, 5).T, "b": row[20:]} for row in x]  # strided leaves are copied with the centre
    tree = rk.aggregate(rows, rule, f=3, centre={"w": centre[:20].reshape(4, 5).T, "b": centre[20:]})
    np.testing.assert_allclose(np.concatenate([tree["w"].T.ravel(), tree["b"]]), got, rtol=1e-14, atol=1e-15)
    # Also under CTMA, after mixing, with weights, and from files.
    for chain in (f"ctma({rule})", f"nnm | {rule}"):
        result, info = rk.aggregate(x, chain, f=3, centre=centre, return_info=True)
        assert np.isfinite(result.astype(np.float64)).all()
        assert info.weights[0] == 0
    for i, row in enumerate([*x, centre]):
        np.save(tmp_path / f"{i}.npy", row)
    paths = [tmp_path / f"{i}.npy" for i in range(9)]
    aggregate_files(paths, rule, f=3, centre=tmp_path / "9.npy", out=tmp_path / "out.npy")
    assert np.array_equal(np.load(tmp_path / "out.npy"), got)


def test_a_centre_that_does_not_fit(own: Path) -> None:
    x, rule = attacked(), "centred_clipping_of_mine"
    for centre, error, message in [
        (None, ValueError, "centre is required, a vector like one update"),
        (np.zeros(29, np.float32), ValueError, r"centre has shape \(29,\).*row 0 has shape \(30,\)"),
        (np.zeros(30), ValueError, "centre has shape .* dtype float64"),
        (np.full(30, np.nan, np.float32), ValueError, "centre holds NaN or Inf"),
        ("zero", TypeError, "centre is str"),
    ]:
        with pytest.raises(error, match=message):
            rk.aggregate(x, rule, f=2, centre=centre)
    with pytest.raises(ValueError, match=r"median: centre is given, but this rule measures from none \(drop centre=\)"):
        rk.median(x, centre=x[0])
    centre = np.zeros(30, np.float32)
    with pytest.raises(ValueError, match="out shares memory with the updates"):
        rk.aggregate(x, rule, f=2, centre=centre, out=centre)


# ---- nonsense --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Returns(rk.Aggregator):
    what: Any = None

    name: ClassVar[str] = "returns"

    def solve(self, view: rk.View) -> Any:
        return self.what(view) if callable(self.what) else self.what


@pytest.mark.parametrize(
    "what",
    [
        None,
        np.ones(5),
        rk.Solution(),
        rk.Solution(np.ones(4)),
        rk.Solution(np.full(5, np.nan)),
        rk.Solution(np.ones(5, dtype=np.float32)),
        rk.Solution([1.0] * 5),  # type: ignore[arg-type]
        rk.Solution(np.ones(5), divisor=0.0),
        rk.Solution(np.full(5, 1e-310), divisor=5e-310),
        rk.Solution(np.full(5, 1e290), divisor=5e290),
        rk.Solution(np.ones(5), centre_weight=np.inf),
        lambda view: view.window(0, 1)._replace(weights=np.ones(5)),
    ],
)
def test_nonsense_is_said(what: Any) -> None:
    said = r"^returns.*: solve\(view\) must return a Solution with finite float64 weights \(5,\)"
    for rule in (Returns(what), rk.NNM() | Returns(what), rk.CTMA(Returns(what))):
        with pytest.raises(TypeError, match=said):
            rk.aggregate(np.eye(5), rule, f=1)


@dataclass(frozen=True)
class Mixes(rk.Mixer):
    what: Any = None

    name: ClassVar[str] = "mixes"

    def mixing(self, view: rk.View) -> Any:
        return self.what


@pytest.mark.parametrize(
    "what",
    [
        np.eye(5),
        rk.Mixture(np.ones((2, 4)), np.full(2, 4.0)),
        rk.Mixture(np.ones((2, 5)), np.full(2, 4.0)),
        rk.Mixture(np.zeros((2, 5)), np.zeros(2)),
        rk.Mixture(np.full((2, 5), 1e-310), np.full(2, 5e-310)),
        rk.Mixture([[1.0, 2], [3]], [1.0, 1]),  # type: ignore[arg-type]
        rk.Mixture([["1"] * 5], ["5"]),  # type: ignore[arg-type]
        rk.Mixture([[10**400] * 5], [5 * 10**400]),  # type: ignore[arg-type]
        rk.Mixture(np.full((1, 5), np.nan), np.ones(1)),
        rk.Mixture(np.ones((0, 5)), np.ones(0)),
    ],
)
def test_nonsense_mixtures_are_said(what: Any) -> None:
    with pytest.raises(TypeError, match=r"mixes: mixing\(view\) must return a Mixture: finite weights \(m, 5\)"):
        rk.aggregate(np.eye(5), Mixes(what) | rk.Mean())


def test_mixtures_of_mixtures_keep_to_numbers() -> None:
    mixer = Mixes(rk.Mixture(np.eye(5) * 2.0**700, np.full(5, 2.0**700)))
    x = make_rows("normal", 5, 40, np.dtype(np.float64))
    for rule in ("mean", "median", "geometric_median"):
        np.testing.assert_allclose(
            rk.aggregate(x, mixer | mixer | rk.parse_rule(rule), f=1), rk.aggregate(x, rule, f=1)
        )


@pytest.mark.parametrize("form", [np.asfortranarray, lambda w: w.astype(int), lambda w: w.tolist()])
@pytest.mark.parametrize("rule", ["median", "ctma(median)", "geometric_median"])
def test_mixtures_in_any_form(form: Any, rule: str) -> None:
    weights, x = np.eye(5) + np.roll(np.eye(5), 1, axis=1), make_rows("normal", 5, 40, np.dtype(np.float64))
    mixes = Mixes(rk.Mixture(form(weights), form(np.full(5, 2.0))))
    want = rk.aggregate(weights @ x / 2, rule, f=1)
    np.testing.assert_allclose(rk.aggregate(x, mixes | rk.parse_rule(rule), f=1), want, atol=1e-9)


@dataclass(frozen=True)
class Shrunk(rk.Aggregator):
    """Half of the mean: the other half lies on the origin."""

    name: ClassVar[str] = "shrunk"
    points: ClassVar[tuple[str, ...]] = ("origin",)

    def solve(self, view: rk.View) -> rk.Solution:
        view.measured(self.name)
        return rk.Solution(np.full(view.n, 0.5), float(view.n))


@pytest.mark.parametrize("offset", [0.0, 1e9])
def test_what_weights_leave_lies_on_the_origin(offset: float) -> None:
    x = make_rows("normal", 7, 12, np.dtype(np.float64)) + offset
    got, info = rk.aggregate(x, Shrunk(), return_info=True)
    np.testing.assert_allclose(got, x.mean(axis=0) / 2, rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(info.sq_distances, ((x - got) ** 2).sum(axis=1), rtol=1e-9)
    kept = rk.aggregate(x, rk.CTMA(Shrunk()), f=2)
    nearest = np.argsort(((x - got) ** 2).sum(axis=1), kind="stable")[:5]
    np.testing.assert_allclose(kept, x[np.sort(nearest)].mean(axis=0), rtol=1e-14, atol=1e-14)
    with pytest.raises(ValueError, match=r"returns.*: the weights sum to 0.5 instead of 1, so that the rest lies on"):
        rk.aggregate(x, Returns(lambda view: rk.Solution(np.full(7, 0.5), 7.0)))
    assert share_of_origin(np.full(7, 1 / 7), 1e-16) == 0  # sums of 1 but for rounding leave nothing there


def test_rows_near_a_row() -> None:
    x = attacked(9, 20, dtype=np.float64)
    x[4] = x[2]  # ties go to the lowest index
    for row in range(9):
        squares = ((x - x[row]) ** 2).sum(axis=1)
        want = np.argsort(squares, kind="stable")[:4]
        rule = Returns(lambda view, row=row: view.mean_of(view.nearest_to_row(row, 4)))
        got, info = rk.aggregate(x, rule, return_info=True)
        assert info.order == tuple(want)
        np.testing.assert_allclose(got, x[np.sort(want)].mean(axis=0), rtol=1e-14, atol=1e-15)


def test_scores_that_are_none_are_said() -> None:
    for scores, message in [
        (lambda squares: squares, "scores must be a vector"),
        (lambda squares: np.full(3, np.nan), "without NaN"),
        (lambda squares: np.zeros(0), "scores must be a vector"),
    ]:
        with pytest.raises(ValueError, match=message):
            rk.aggregate(np.eye(5), Returns(lambda view, s=scores: view.mean_of(view.least(s))))
    with pytest.raises(ValueError, match="count must be between 1 and the 2 candidates; got 3"):
        rk.aggregate(np.eye(5), Returns(lambda view: view.mean_of(view.least(lambda squares: [1.0, 2.0], 3))))


def test_what_cannot_be_registered(own: Path) -> None:
    class NotFrozen(rk.Aggregator):
        name: ClassVar[str] = "not_frozen"

    with pytest.raises(TypeError, match=r"NotFrozen must be a frozen dataclass \(put @dataclass\(frozen=True\) under"):
        rk.register(NotFrozen)
    for value in (rk.Median(), dict, 3):
        with pytest.raises(TypeError, match="expected a class derived from Aggregator or Mixer; got"):
            rk.register(value)  # type: ignore[type-var]
    for name, message in [("median", "the name 'median' stands for"), ("no name", "must be a Python identifier")]:
        bad = dataclass(frozen=True)(type("Bad", (rk.Aggregator,), {"name": name, "__module__": __name__}))
        with pytest.raises(ValueError, match=message):
            rk.register(bad)
    cwmed = dataclass(frozen=True)(type("Other", (rk.Aggregator,), {"name": "cwmed", "__module__": __name__}))
    message = r"^rule: the name 'cwmed' stands for 'median' already \(choose another name\)$"
    with pytest.raises(ValueError, match=message):
        rk.register(cwmed)
    assert (
        rk.register(sys.modules["stranger"].Tightest) is sys.modules["stranger"].Tightest
    )  # once more: as reloading does
    with pytest.raises(TypeError, match=r"got Median, a class \(make an object of it\)"):
        rk.aggregate(np.eye(5), rk.Median)  # type: ignore[call-overload]
    with pytest.raises(NotImplementedError, match=r"Empty must define solve\(self, view\)"):
        rk.aggregate(np.eye(5), dataclass(frozen=True)(type("Empty", (rk.Aggregator,), {"name": "empty"}))())


# ---- the rules that are here, by the same specification -----------------------------------------------------------


def test_aliases_and_text() -> None:
    for alias, name in [("cwmed", "median"), ("meamed", "mean_around_median"), ("trmean", "trimmed_mean")]:
        assert rk.parse_rule(alias) == rk.parse_rule(name)
        assert str(rk.parse_rule(f"ctma({alias})")) == f"ctma({name})"
    assert rk.CTMA("median") == rk.CTMA(rk.Median())
    assert rk.NNM() | "median" == rk.NNM() | rk.Median()
    assert "nnm" | rk.Median() == rk.NNM() | rk.Median()
    assert rk.NNM() | "nnm | median" == rk.NNM() | rk.NNM() | rk.Median()
    with pytest.raises(TypeError, match="unsupported operand"):
        _ = rk.NNM() | 3  # type: ignore[operator]


def test_constants() -> None:
    """Allouah et al. 2023, and the lemma of CTMA; the least that any rule can have is f/(n-2f)."""
    n, f = 20, 4
    ratio = 1 + f / (n - 2 * f)
    known = {
        "median": 4 * ratio**2,
        "geometric_median": 4 * ratio**2,
        "trimmed_mean": 6 * f / (n - 2 * f) * ratio,
        "krum": 6 * ratio,
        "nnm | median": 8 * f / (n - f) * (4 * ratio**2 + 1),
        "ctma(median)": 4 * f / (n - f) * (1 + 4 * ratio**2),
        "nnm | ctma(krum)": 8 * f / (n - f) * (4 * f / (n - f) * (1 + 6 * ratio) + 1),
        "mean": None,
        "multi_krum": None,
        "bucketing | median": None,
    }
    for rule, kappa in known.items():
        assert rk.parse_rule(rule).kappa(n, f) == pytest.approx(kappa), rule
        assert kappa is None or kappa >= f / (n - 2 * f)
    assert rk.Mean().kappa(n, 0) == 0


@pytest.mark.parametrize("rule", ["median", "trimmed_mean", "geometric_median", "krum", "nnm | median", "ctma(median)"])
def test_constants_hold(rule: str) -> None:
    """Sample by sample: no subset of n-f rows is farther from the result than kappa allows."""
    rng = np.random.default_rng(5)
    for _ in range(20):
        x = rng.standard_normal((7, 5)) * rng.choice([1.0, 30.0], (7, 1))
        f = 2
        got, kappa = rk.aggregate(x, rule, f=f), rk.parse_rule(rule).kappa(7, f)
        assert kappa is not None
        for honest in itertools.combinations(range(7), 5):
            mean = x[list(honest)].mean(axis=0)
            variance = ((x[list(honest)] - mean) ** 2).sum(axis=1).mean()
            assert ((got - mean) ** 2).sum() <= kappa * variance * (1 + 1e-9)


@pytest.mark.parametrize("case", [case for rule in registered().values() for case in rule.goals])
def test_plain_forms_are_the_rules(case: str) -> None:
    plain = peers.plain_form(case, 2)
    if case == "weighted median":  # no rule, but a way to call one
        assert plain is None
        return
    assert plain is not None
    x = attacked(9, 50)
    np.testing.assert_allclose(plain(x), rk.aggregate(x, case, f=2), atol=1e-5)


def test_the_page_that_compares_the_rules_is_made_from_them() -> None:
    """`python -m robustkern.rules > docs/rules.md`."""
    page = (Path(rk.__file__).parent.parent / "docs" / "rules.md").read_text()
    assert page == comparison()
    assert all(rule.advice for rule in registered().values() if rule.__module__.startswith("robustkern.rules"))


def test_the_table_of_the_readme_is_the_rules() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    rows = [line for line in readme.splitlines() if line.startswith("| `")]
    want = ["| `" + form.replace("|", "\\|") + "` | " + " | ".join(rest) + " |" for form, *rest in table()]
    assert [row for row in rows if row in want] == want


# ---- randomness ------------------------------------------------------------------------------------------------------


def test_seeds() -> None:
    x = make_rows("normal", 12, 20, np.dtype(np.float64))
    rule = "bucketing(size=3) | median"
    results = [rk.aggregate(x, rule, f=1, return_info=True) for _ in range(6)]
    assert len({result.tobytes() for result, _ in results}) > 1  # fresh in every call
    for result, info in results:
        assert np.array_equal(rk.aggregate(x, rule, f=1, seed=info.seed), result)
    _, info = rk.aggregate(x, rule, f=1, seed=5, return_info=True)
    assert info.seed == 5
    own, info = rk.aggregate(x, "bucketing(size=3, seed=7) | median", f=1, seed=5, return_info=True)
    assert info.seed is None  # the rule's own seed wins
    assert np.array_equal(own, rk.aggregate(x, "bucketing(size=3, seed=7) | median", f=1))
    two = rk.parse_rule("bucketing(size=2) | bucketing(size=2) | median")
    first, info = rk.aggregate(x, two, f=1, seed=5, return_info=True)
    assert np.array_equal(first, rk.aggregate(x, two, f=1, seed=5))
    assert info.mixture.shape == (3, 12)
    np.testing.assert_allclose(np.median(info.mixture @ x, axis=0), first)
    for seed in (-1, 1.5, True, "5"):
        with pytest.raises(ValueError, match="seed must be None or an integer of at least 0; got"):
            rk.aggregate(x, rule, f=1, seed=seed)  # type: ignore[call-overload]


def test_what_is_drawn_repeats_when_a_rule_is_solved_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 products that leave a cut open make a second pass: on the same buckets."""
    from robustkern.rules import geometry

    x = np.ones((12, 40), dtype=np.float32)
    x += np.random.default_rng(0).standard_normal(x.shape).astype(np.float32) * 1e-6
    rule = "bucketing(size=2) | krum(neighbours=1)"
    want = rk.aggregate(x, rule, f=1, seed=3)
    solved = []
    again = geometry.Given.start_again
    monkeypatch.setattr(geometry, "SINGLE_VALUES", 0)
    monkeypatch.setattr(geometry.Given, "start_again", lambda self: solved.append(1) or again(self))
    assert np.array_equal(rk.aggregate(x, rule, f=1, seed=3), want)
    assert solved


# ---- Info ------------------------------------------------------------------------------------------------------------


def test_info_is_ready_for_json() -> None:
    x = attacked(9, 20)
    x[8, 3] = np.nan
    for rule in ("multi_krum", "ctma(median)", "nnm | geometric_median", "bucketing | median", "mean"):
        _, info = rk.aggregate(x, rule, f=3, return_info=True)
        told = json.loads(json.dumps(info.to_dict(), allow_nan=False))
        assert told["rule"] == rule
        assert told["nonfinite_rows"] == [8]
        assert (told["weights"] is None) == (info.weights is None)
        if info.sq_distances is not None and rule != "bucketing | median":
            assert told["sq_distances"][8] is None  # infinitely far


def test_scores_and_order_of_krum() -> None:
    x = attacked(9, 20, dtype=np.float64)
    _, info = rk.multi_krum(x, f=2, m=4, return_info=True)
    squares = ((x[:, None] - x) ** 2).sum(axis=2)
    want = np.sort(squares, axis=1)[:, 1:6].sum(axis=1)
    np.testing.assert_allclose(info.scores, want, rtol=1e-12)
    assert info.order == tuple(np.argsort(want)[:4])
    _, info = rk.ctma(x, f=2, anchor="median", return_info=True)
    assert info.order == tuple(np.argsort(info.sq_distances, kind="stable")[:7])


def test_a_script_of_its_own_needs_nothing_but_the_file(own: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(own.parent)!r}); import stranger, numpy as np, robustkern as rk; " + (
        "print(rk.aggregate(np.array([[0.0], [1], [2], [9]]), 'ctma(tightest)', f=1))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[1.]"


# ---- the command line ------------------------------------------------------------------------------------------------


def robustkern(*arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "robustkern", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "180", **environment}
    )


def test_a_file_of_rules_on_the_command_line(tmp_path: Path) -> None:
    own = tmp_path / "stranger.py"
    own.write_text(SOURCE)
    x = attacked()
    for i, row in enumerate(x):
        np.save(tmp_path / f"{i}.npy", row)
    paths = [tmp_path / f"{i}.npy" for i in range(len(x))]
    out = tmp_path / "out" / "merged.npy"
    out.parent.mkdir()
    done = robustkern(
        "aggregate", *paths, "--import", own, "--rule", "ctma(tightest)", "--f", 2, "--out", out, "--json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rule"] == "ctma(tightest)"
    assert [w["verdict"] for w in json.loads(done.stdout)["workers"]] == ["dropped"] * 2 + ["kept"] * 5
    done = robustkern("rules", "--import", own, "--json")
    assert "tightest" in [rule["rule"] for rule in json.loads(done.stdout)["rules"]]
    done = robustkern("rules", "--import", own)
    assert "mean of the n-f rows of smallest diameter; also: minimal_diameter" in done.stdout
    done = robustkern(
        *("scaling", "--import", own, "--rules", "tightest", "--ranks", 2, "--d", 1000, "--seconds", 0.01, "--json"),
        *("--out", tmp_path / "ranks"),
    )
    assert done.returncode == 0, done.stderr
    assert [(p["rule"], p["how"], p["checked"]) for p in json.loads(done.stdout)] == [("tightest", "rows", True)]
    done = robustkern("bench", "--import", own, "--n", 8, "--d", 20000, "--rounds", 1, "--against", "numpy", "--json")
    assert done.returncode == 0, done.stderr
    measured = [(result["rule"], result["library"], result["goal"]) for result in json.loads(done.stdout)["results"]]
    assert ("tightest", "robustkern", 2.4) in measured
    assert ("tightest", "numpy", None) in measured


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "which is not there"),
        ("1 +", "SyntaxError: invalid syntax"),
        ("raise RuntimeError('no luck')", "RuntimeError: no luck"),
        (
            "import robustkern as rk\nfrom dataclasses import dataclass\n@rk.register\n@dataclass(frozen=True)\n"
            "class M(rk.Aggregator):\n    name = 'median'",
            "the name 'median' stands for",
        ),
    ],
)
def test_files_of_rules_that_cannot_be_used(tmp_path: Path, content: str | None, message: str) -> None:
    own = tmp_path / "bad.py"
    if content is not None:
        own.write_text(content)
    done = robustkern("rules", "--import", own)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_rules_that_packages_offer(tmp_path: Path) -> None:
    """Entry points: loaded where their name is used, and only there; the text form itself imports nothing."""
    (tmp_path / "offered.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("raise RuntimeError('no luck')")
    facts = tmp_path / "offers-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: offers\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(
        "[robustkern.rules]\ntightest = offered:Tightest\nbroken = broken\nabsent = offered\n"
    )
    for i, row in enumerate(attacked()):
        np.save(tmp_path / f"{i}.npy", row)
    common = ("aggregate", *(tmp_path / f"{i}.npy" for i in range(7)), "--f", 2, "--out", tmp_path / "out.npy")
    done = robustkern(*common, "--rule", "ctma(tightest)", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    done = robustkern(*common, "--rule", "median", PYTHONPATH=str(tmp_path))  # a broken offer is nobody's business
    assert done.returncode == 0, done.stderr
    for rule, message in [
        ("broken", "--rule: broken is offered by broken, which cannot be loaded: RuntimeError: no luck"),
        ("absent", "--rule: offered offers a rule 'absent', and registers none of that name"),
        ("nobody", "--rule: 'nobody' is not known"),
    ]:
        done = robustkern(*common, "--rule", rule, PYTHONPATH=str(tmp_path))
        assert done.returncode == 2
        assert message in " ".join(done.stderr.split())
    done = robustkern("rules", PYTHONPATH=str(tmp_path))
    assert "tightest: offered by offered:Tightest, loaded when it is named" in done.stdout
    code = "import robustkern as rk; rk.parse_rule('tightest')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert "ValueError: rule: 'tightest' is not known" in done.stderr


def test_a_centre_with_the_mask_of_the_rows(own: Path) -> None:
    x, rule = attacked(), "centred_clipping_of_mine"
    rows = [{"a": row, "m": np.array([0, -np.inf], dtype=np.float32)} for row in x]
    previous = rk.median(rows, f=1)
    got = rk.aggregate(rows, rule, centre=previous, f=1)
    np.testing.assert_allclose(got["a"], rk.aggregate(x, rule, centre=previous["a"], f=1), rtol=1e-6)
    assert got["m"].tolist() == [0, -np.inf]
    previous["a"][0] = np.nan
    with pytest.raises(ValueError, match="centre holds NaN or Inf"):
        rk.aggregate(rows, rule, centre=previous, f=1)
