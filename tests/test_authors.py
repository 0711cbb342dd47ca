"""What the papers' authors' released code returns (tests/data/README.md), departures from the papers named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import robustkern as rk

DATA: dict[str, NDArray[Any]] = dict(np.load(Path(__file__).parent / "data" / "authors_outputs.npz"))
BASES = {"avg": "mean", "cwmed": "median(even='low')", "cwtm": "trimmed_mean", "rfa": "rfa"}
FORMS = {"": "{}", "ctma+": "ctma({})", "nnm+": "nnm | {}", "nnm+ctma+": "ctma(nnm | {})"}
CASES = [f"A{i:02d}" for i in range(1, 16)]
WEIGHTED_CASES = [f"W{i:02d}" for i in range(1, 11)]

#: CTMA with ties at the cut keeps more than h rows there and divides by h; the paper keeps exactly h.
KEEPS_TOO_MANY = {"A05", "A06"}
#: Weiszfeld without a floor divides by zero where it meets a row.
DIVIDES_BY_ZERO = {"A05", "A06", "A15"}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", FORMS)
def test_rules(backend: str, case: str, form: str) -> None:
    x, f = DATA[f"{case}/X"], int(DATA[f"{case}/b"])
    for base, rule in BASES.items():
        want = DATA[f"{case}/f64/{form}{base}"]
        got, info = rk.aggregate(x, FORMS[form].format(rule), f=f, return_info=True)
        if "ctma" in form:
            assert info.kept.sum() == len(x) - f
        if case in KEEPS_TOO_MANY and "ctma" in form and not np.allclose(got, want):
            # Ours: the mean of exactly h rows, so between the rows; theirs sums more than h.
            kept = x[info.kept]
            np.testing.assert_allclose(got, kept.mean(axis=0), rtol=1e-12)
            continue
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_weiszfeld_steps(case: str) -> None:
    for steps in (1, 2, 3, 10, 100):
        for nu in ("0.1", "1e-06", "0"):
            got = rk.geometric_median(DATA[f"{case}/X"], nu=float(nu), max_iter=steps, start="zero")
            want = DATA[f"{case}/f64/rfa_T{steps}_nu{nu}"]
            if np.isnan(want).any():
                assert case in DIVIDES_BY_ZERO
                assert np.isfinite(got).all()
                continue
            # A06 meets a row at 1e-6: squares that cancel in n-space show at their root.
            np.testing.assert_allclose(got, want, rtol=1e-8, atol=2e-7 if case == "A06" else 1e-8)


@pytest.mark.parametrize("case", [c for c in CASES if f"{c}/bucketing_seed123/perm" in DATA])
def test_bucketing(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    x, f = DATA[f"{case}/X"], int(DATA[f"{case}/b"])
    order, size = DATA[f"{case}/bucketing_seed123/perm"], int(DATA[f"{case}/bucketing_seed123/bucket_size"])

    class Fixed:
        def permutation(self, n: int) -> NDArray[Any]:
            assert n == len(order)
            return order

    monkeypatch.setattr(np.random, "default_rng", lambda seed: Fixed())
    for base, rule in BASES.items():
        key = f"{case}/f64/bucketing_seed123+{base}"
        if key in DATA:
            got = rk.aggregate(x, f"bucketing(size={size}) | {rule}", f=f)
            np.testing.assert_allclose(got, DATA[key], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", WEIGHTED_CASES)
def test_weighted_median(backend: str, case: str) -> None:
    """At exactly half their code returns the upper value (W07: or the lower, by rounding); the paper the mean."""
    x, w, want = DATA[f"{case}/X"], DATA[f"{case}/w"], DATA[f"{case}/f64/weighted_cwmed"]
    got, high, low = (rk.median(x, weights=w, even=even) for even in ("mean", "high", "low"))
    tie = high != low
    assert np.array_equal(got[~tie], want[~tie])
    np.testing.assert_allclose(got, (high + low) / 2, rtol=1e-15)
    assert np.array_equal(low if case == "W07" else high, want)


@pytest.mark.parametrize("case", WEIGHTED_CASES)
def test_weighted_weiszfeld(case: str) -> None:
    x, w = DATA[f"{case}/X"], DATA[f"{case}/w"]
    for key in (k for k in DATA if k.startswith(f"{case}/f64/weighted_rfa")):
        steps, nu = key.split("_T")[1].split("_nu")
        options = {"nu": float(nu), "max_iter": int(steps), "weights": w}
        results = [rk.geometric_median(x, start=start, **options) for start in ("mean", "zero")]
        if np.isnan(DATA[key]).any():
            assert all(np.isfinite(r).all() for r in results)
            continue
        assert min(np.abs(r - DATA[key]).max() for r in results) < 1e-7
