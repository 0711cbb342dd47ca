"""What leaves users have: complex, eight bits, mixed precision, tied, left out, masks of infinities, integers."""

from __future__ import annotations

import collections
import subprocess
import sys
from collections import OrderedDict
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_rules import RULES

import robustkern as rk
from robustkern.contract.counters import rounded_mean

RNG = np.random.default_rng(7)


def states(n: int = 7, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [
        {"w": rng.standard_normal((5, 8)).astype(np.float32), "b": rng.standard_normal(5).astype(np.float32)}
        for _ in range(n)
    ]


# ---- complex numbers, eight bits, mixed precision ------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
def test_complex_numbers_are_pairs_of_floats(backend: str, rule: str, dtype: Any) -> None:
    z = (RNG.standard_normal((9, 4, 3)) + 1j * RNG.standard_normal((9, 4, 3))).astype(dtype)
    real = z.view(z.real.dtype)
    want = rk.aggregate(real, rule, f=2, seed=3)
    for rows in (z, list(z), [{"z": row} for row in z], torch.from_numpy(z)):
        got = rk.aggregate(rows, rule, f=2, seed=3)
        got = got["z"] if isinstance(got, dict) else got
        assert np.asarray(got).dtype == dtype
        assert np.array_equal(np.ascontiguousarray(got).view(real.dtype), want)
    out = {"z": np.zeros((4, 3), dtype=dtype)}
    turned = [{"z": np.asfortranarray(row)} for row in z]
    rk.aggregate(turned, rule, f=2, seed=3, out=out)
    assert np.array_equal(out["z"].view(real.dtype), want)


def test_lazy_conjugates_of_torch_are_conjugates() -> None:
    z = torch.complex(torch.arange(12.0).reshape(3, 4), torch.ones(3, 4))
    assert torch.equal(rk.median([row.conj() for row in z]), z[1].conj().resolve_conj())


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_eight_bits_are_read_exactly_and_rounded_once(backend: str, name: str) -> None:
    dtype = np.dtype(getattr(ml_dtypes, name))
    every = np.arange(256, dtype=np.uint8).view(dtype)
    every = every[np.isfinite(every.astype(np.float32))]
    rows = np.stack([np.roll(every, k) for k in range(5)])
    want = np.median(rows.astype(np.float32), axis=0).astype(dtype)
    got = rk.median(rows)
    assert got.dtype == dtype
    assert np.array_equal(got.astype(float), want.astype(float))
    mean = rk.mean([{"w": row} for row in rows[:, :100]])["w"]
    exact = rows[:, :100].astype(np.float64).mean(axis=0).astype(np.float32).astype(dtype)
    assert np.array_equal(mean.astype(float), exact.astype(float))
    tensors = torch.from_numpy(rows.view(np.uint8).copy()).view(getattr(torch, name))
    back = rk.median(list(tensors))
    assert back.dtype == tensors.dtype
    assert np.array_equal(back.float().numpy(), want.astype(np.float32))


def test_clients_of_mixed_precision_are_combined_in_the_dtype_that_is_asked_for(backend: str) -> None:
    x = RNG.standard_normal((5, 300)).astype(np.float32)
    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float32)
    rows = [{"w": torch.from_numpy(row).to(kind)} for row, kind in zip(x, kinds, strict=True)]
    with pytest.raises(ValueError, match=r"row 1, leaf \['w'\] has shape .*pass dtype='float32' .*x.to\(row0.dtype\)"):
        rk.median(rows)
    for rule in ("median", "ctma(median)", "geometric_median", "mean"):
        for dtype in ("float32", torch.float32):
            got = rk.aggregate(rows, rule, f=1, dtype=dtype)["w"]
            want = rk.aggregate(np.stack([row["w"].float().numpy() for row in rows]), rule, f=1)
            assert got.dtype == torch.float32
            assert np.array_equal(got.numpy(), want)
    assert rk.median(rows, dtype="bfloat16")["w"].dtype == torch.bfloat16
    assert rk.median([row.astype(np.float16) for row in x], dtype="float64").dtype == np.float64
    assert rk.median(x.astype(np.complex64), dtype="float64").dtype == np.complex128
    assert rk.median(x, dtype="float8_e5m2").dtype == ml_dtypes.float8_e5m2
    out = np.zeros(300, dtype=np.float64)
    assert rk.median(x, dtype="float64", out=out) is out
    assert np.array_equal(out, np.median(x, axis=0).astype(np.float64))
    with pytest.raises(ValueError, match=r"out has shape \(300,\) and dtype float64; expected shape .* dtype float32"):
        rk.median(x.astype(np.float64), dtype="float32", out=out)
    with pytest.raises(ValueError, match=r"dtype must be one of float16, bfloat16, float32, .*; got 'int8'"):
        rk.median(x, dtype="int8")


# ---- integers ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.sampled_from("bBhHiIlLqQ?"), st.data())
def test_means_of_integers_round_half_to_even(n: int, code: str, data: st.DataObject) -> None:
    dtype = np.dtype(code)
    ends = (0, 1) if code == "?" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    columns = data.draw(st.lists(st.lists(st.integers(*ends), min_size=n, max_size=n), min_size=1, max_size=4))
    values = np.array(columns, dtype=dtype).T
    got = rounded_mean(values)
    exact = [Fraction(sum(column), n) for column in columns]
    assert got.dtype == dtype
    assert [int(v) for v in got] == [round(v) for v in exact]
    np.testing.assert_allclose(rounded_mean(values, np.dtype(np.float64)), [float(v) for v in exact], rtol=1e-15)
    weights = np.array(data.draw(st.lists(st.integers(0, 9), min_size=n, max_size=n)), dtype=float)
    weights[0] += 1
    weighed = [sum(int(w) * v for w, v in zip(weights, c, strict=True)) / Fraction(int(weights.sum())) for c in columns]
    for found, want in zip(rounded_mean(values, None, weights).tolist(), weighed, strict=True):
        assert abs(int(found) - want) <= Fraction(1, 2) + abs(want) / 2**62


def test_integers_are_averaged_by_the_mean_only() -> None:
    rows = [{"w": np.zeros(2), "n": np.array([v, 10 * v], dtype=np.int8)} for v in (0, 1, 8)]
    assert rk.mean(rows)["n"].tolist() == [3, 30]
    assert rk.mean(rows, weights=[0, 0, 1])["n"].tolist() == [8, 80]
    got = rk.mean(rows, dtype="float64")["n"]
    assert got.dtype == np.float64
    assert got.tolist() == [3, 30]
    for rule in RULES:
        got, info = rk.aggregate(rows, rule, f=0, return_info=True)
        assert got["n"].tolist() == [1, 10], rule
        assert info.integers == 1
    integers = [{"n": row["n"]} for row in rows]
    assert rk.mean(integers)["n"].tolist() == [3, 30]
    assert rk.median(integers)["n"].tolist() == [1, 10]
    with pytest.raises(TypeError, match=r"krum: the updates hold integers only, which count .*x.astype\('float32'\)"):
        rk.krum(integers, f=0)


# ---- what takes part -----------------------------------------------------------------------------------------------


def test_leaves_that_are_left_out_take_part_in_nothing(backend: str) -> None:
    rows = states()
    for i, row in enumerate(rows):
        row["bn"] = {"mean": np.full(3, np.nan if i == 0 else 1e30 * i), "steps": np.array(i)}
        row["list"] = [np.full(2, float(i)), np.full(2, 2.0 * i)]
    want = rk.ctma([{"w": row["w"], "b": row["b"]} for row in rows], f=2)
    for options in ({"only": ["w", "b"]}, {"exclude": ["bn.*", "list.*"]}, {"only": "?"}):
        got = rk.ctma(rows, f=2, **options)  # type: ignore[arg-type]
        assert got.keys() == {"w", "b"}
        assert all(np.array_equal(got[key], want[key]) for key in want)
    got = rk.median(rows, exclude=["bn.mean", "list.0"])
    assert got["bn"].keys() == {"steps"}
    assert got["list"][0] is None
    out = {key: np.zeros_like(value) for key, value in want.items()} | {"bn": {"mean": np.full(3, 7.0)}}
    out["bn"]["steps"], out["list"] = np.array(9), [np.full(2, 5.0)] * 2
    got = rk.ctma(rows, f=2, only="?", out=out)
    assert np.array_equal(out["w"], want["w"])
    assert got.keys() == out.keys()
    assert got["w"] is out["w"]
    assert got["bn"]["mean"].tolist() == [7, 7, 7]  # as the server had it, and no worker's
    assert got["list"][1].tolist() == [5, 5]
    for options, message in (
        ({"only": "layer*"}, r"only: 'layer\*' matches no leaf \(leaves: 'w', 'b', "),
        ({"exclude": "*"}, r"exclude=\* leaves no leaf to combine"),
    ):
        with pytest.raises(ValueError, match=message):
            rk.median(rows, **options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="only must be a pattern of leaf names, or a list of them; got 3"):
        rk.median(rows, only=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"only=w: the updates are arrays, which have no named leaves"):
        rk.median(np.zeros((3, 4)), only="w")
    pair = [{"p": collections.namedtuple("Pair", "x y")(np.ones(2), np.ones(2))} for _ in range(3)]
    with pytest.raises(
        TypeError, match=r"only= and exclude= look into dicts, lists and tuples; leaf \['p'\] is a Pair"
    ):
        rk.median(pair, only="p*")


def test_leaf_by_leaf_is_the_rule_on_each_leaf(backend: str) -> None:
    rows = states()
    rows[1]["w"] += 50
    rows[2]["b"] += 50
    for i, row in enumerate(rows):
        row["n"], row["epoch"] = np.array(i), 3
    for rule in RULES:
        got, info = rk.aggregate(rows, rule, f=2, seed=1, scope="leaf", return_info=True)
        for key in ("w", "b"):
            want = rk.aggregate([{key: row[key]} for row in rows], rule, f=2, seed=1)
            assert np.array_equal(got[key], want[key])
        assert (int(got["n"]), got["epoch"]) == (3, 3)
        assert info.leaves.keys() == {"w", "b"}
        assert (info.n, info.d) == (7, 45)
    _, info = rk.aggregate(rows, "ctma(median)", f=2, scope="leaf", return_info=True)
    kept = {name: leaf.kept for name, leaf in info.leaves.items()}
    assert not kept["w"][1]
    assert not kept["b"][2]
    assert info.to_dict()["leaves"]["w"]["n"] == 7
    with pytest.raises(ValueError, match="scope must be 'update' or 'leaf'; got 'layer'"):
        rk.median(rows, scope="layer")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="scope='leaf': the updates are arrays, which are one leaf"):
        rk.median(np.zeros((3, 4)), scope="leaf")


# ---- tied leaves ---------------------------------------------------------------------------------------------------


def tied_states(n: int = 7) -> list[dict[str, torch.Tensor]]:
    rows = []
    for seed in range(n):
        torch.manual_seed(seed)
        weight = torch.randn(6, 5)
        rows.append({"emb": weight, "head": weight, "b": torch.randn(4)})
    return rows


@pytest.mark.parametrize("rule", RULES)
def test_tied_leaves_count_once(rule: str) -> None:
    rows = tied_states()
    want, once = rk.aggregate([{"emb": r["emb"], "b": r["b"]} for r in rows], rule, f=2, seed=1, return_info=True)
    got, info = rk.aggregate(rows, rule, f=2, seed=1, return_info=True)
    assert got["head"] is got["emb"]
    assert torch.equal(got["emb"], want["emb"])
    assert info.d == once.d == 34
    assert np.array_equal(info.sq_distances, once.sq_distances)
    out = {"emb": torch.zeros(6, 5), "b": torch.zeros(4)}
    out["head"] = out["emb"]
    assert torch.equal(rk.aggregate(rows, rule, f=2, seed=1, out=out)["head"], want["emb"])
    apart = {"emb": torch.zeros(6, 5), "head": torch.zeros(6, 5), "b": torch.zeros(4)}
    assert torch.equal(rk.aggregate(rows, rule, f=2, seed=1, out=apart)["head"], want["emb"])


def test_a_row_that_unties_is_judged_by_the_first_name() -> None:
    rows = tied_states()
    rows[3]["head"] = rows[3]["head"] * 1e9
    got, info = rk.ctma(rows, f=2, return_info=True)
    want = rk.ctma([{"emb": r["emb"], "b": r["b"]} for r in rows], f=2)
    assert torch.equal(got["head"], want["emb"])
    assert info.d == 34
    for i in (0, 1):  # more than f: then they are two leaves
        rows[i]["head"] = rows[i]["head"].clone()
    got, info = rk.ctma(rows, f=2, return_info=True)
    assert info.d == 64
    assert got["head"] is not got["emb"]


def test_a_result_may_not_tie_what_the_updates_do_not() -> None:
    rows = [{"a": torch.ones(3), "b": torch.ones(3)} for _ in range(3)]
    both = torch.zeros(3)
    with pytest.raises(ValueError, match=r"out, leaf \['b'\] shares memory with leaf \['a'\] of out"):
        rk.median(rows, out={"a": both, "b": both})


# ---- infinities ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_shared_infinities_are_no_evidence(backend: str, rule: str, dtype: str) -> None:
    rows = states()
    mask = np.triu(np.full((6, 6), -np.inf), 1)
    mask[5, 0] = np.inf
    want = rk.aggregate(rows, rule, f=2, seed=1, dtype=dtype)
    full = [row | {"mask": mask.astype(np.float32)} for row in rows]
    got, info = rk.aggregate(full, rule, f=2, seed=1, dtype=dtype, return_info=True)
    assert np.array_equal(got["mask"], mask)
    for key in want:
        np.testing.assert_allclose(got[key].astype(float), want[key].astype(float), rtol=1e-2, atol=1e-6)
    assert info.shared_inf == 16
    assert info.nonfinite_rows == ()


def test_an_attacker_who_changes_a_mask_is_judged_and_blocks_nobody(backend: str) -> None:
    rows = [row | {"mask": np.array([-np.inf, 0.0, -np.inf], dtype=np.float32)} for row in states()]
    for value, bad in ((np.nan, (4,)), (np.inf, (4,)), (1e30, ())):
        rows[4]["mask"] = np.array([value, 0.0, -np.inf], dtype=np.float32)
        for rule in ("median", "ctma(median)", "krum"):
            got, info = rk.aggregate(rows, rule, f=1, return_info=True)
            assert got["mask"].tolist() == [-np.inf, 0, -np.inf]
            assert info.nonfinite_rows == bad
            assert info.shared_inf == 2
    for i in (2, 4):
        rows[i]["mask"] = np.array([5.0, 0.0, -np.inf], dtype=np.float32)
    with pytest.raises(rk.NonFiniteError, match="5 rows hold NaN or Inf"):
        rk.ctma(rows, f=1)
    got = rk.ctma(rows, f=1, weights=[1, 1, 0.1, 1, 0.1, 1, 1])  # less of the weight than one row may hold
    assert got["mask"].tolist() == [-np.inf, 0, -np.inf]


def test_infinities_that_are_not_shared_stay_evidence() -> None:
    rows = states()
    for i in range(4):
        rows[i]["b"][0] = np.inf if i % 2 else -np.inf
    with pytest.raises(rk.NonFiniteError, match="4 rows hold NaN or Inf"):
        rk.geometric_median(rows, f=2)
    nans = [row | {"mask": np.full(3, np.nan, dtype=np.float32)} for row in states()]
    with pytest.raises(rk.NonFiniteError, match="7 rows hold NaN or Inf"):
        rk.median(nans, f=2)


@pytest.mark.parametrize("rule", [*RULES, "mean"])
def test_rows_that_are_not_finite_can_be_left_out(backend: str, rule: str) -> None:
    rows = states(9)
    rows[0]["w"][0, 0], rows[5]["b"][1] = np.nan, np.inf
    for i, row in enumerate(rows):
        row["n"] = np.array(i)
    left = [row for i, row in enumerate(rows) if i not in (0, 5)]
    want = rk.aggregate(left, rule, f=1, seed=1)
    got, info = rk.aggregate(rows, rule, f=1, seed=1, nonfinite="drop", return_info=True)
    assert info.dropped == (0, 5)
    assert (info.n, info.f, info.nonfinite_rows) == (7, 1, ())
    for key in want:
        assert np.array_equal(got[key], want[key]), key


def test_too_few_rows_left_is_an_error() -> None:
    rows = states(5)
    for i in range(3):
        rows[i]["w"][0, 0] = np.nan
    with pytest.raises(
        rk.NonFiniteError, match=r"3 of 5 rows hold NaN or Inf, and without them too few .*f=1"
    ) as error:
        rk.median(rows, f=1, nonfinite="drop")
    assert error.value.rows == (0, 1, 2)
    assert rk.median(rows, f=0, nonfinite="drop")["w"].shape == (5, 8)
    weights = [1, 1, 1, 0, 2]
    got = rk.trimmed_mean(rows, delta=0.1, weights=weights, nonfinite="drop")
    assert np.array_equal(got["w"], rk.trimmed_mean(rows[3:], delta=0.25, weights=[0, 2])["w"])  # half a unit of weight
    with pytest.raises(ValueError, match="nonfinite must be 'error' or 'drop'; got 'skip'"):
        rk.median(rows, nonfinite="skip")  # type: ignore[call-overload]


# ---- JAX -----------------------------------------------------------------------------------------------------------


JAX = """
import jax, numpy as np, robustkern as rk

x = np.random.default_rng(0).standard_normal((5, 4, 3)).astype(np.float32)
want = rk.ctma(x, f=1, anchor="median")
stacked = jax.numpy.asarray(x)
for rows in (stacked, list(stacked), [{"w": row} for row in stacked]):
    got = rk.ctma(rows, f=1, anchor="median")
    got = got["w"] if isinstance(got, dict) else got
    assert isinstance(got, jax.Array)
    assert np.array_equal(np.asarray(got), want)
half = rk.median(stacked.astype(jax.numpy.bfloat16))
assert isinstance(half, jax.Array) and half.dtype == jax.numpy.bfloat16
got = rk.median([{"a": stacked[i], "epoch": 3, "b": [stacked[i], stacked[i]]} for i in range(3)])
assert got["epoch"] == 3 and isinstance(got["b"][1], jax.Array)
assert np.array_equal(got["a"], np.median(x[:3], axis=0))
for call in (lambda: rk.median(list(stacked), out=stacked[0]), lambda: rk.kernels.gram(stacked)):
    try:
        call()
    except TypeError as error:
        print(error)
"""


def test_arrays_of_jax_come_back_as_arrays_of_jax() -> None:
    """In a process of its own: JAX's threads would warn every test that forks."""
    done = subprocess.run([sys.executable, "-c", JAX], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "out is a JAX array, which cannot be written (drop out=)"
    assert second.startswith("gram: the primitives take float16, bfloat16, float32 and float64 of NumPy, torch or CuPy")


# ---- errors --------------------------------------------------------------------------------------------------------


def test_errors_of_large_trees_are_short() -> None:
    rows = [{f"model.layers.{k}.self_attn.q_proj.weight": np.ones(2) for k in range(3000)} for _ in range(3)]
    other = {f"{key}.absmax": value for key, value in rows[0].items()}
    for updates in ([*rows, other], [*rows, dict(list(rows[0].items())[:-1])], [*rows, [np.ones(2)] * 3000]):
        with pytest.raises(ValueError, match="row 3 ") as error:
            rk.median(updates)
        assert len(str(error.value)) <= 500
    many = [{"w": np.full(2, np.nan)} for _ in range(3000)]
    with pytest.raises(rk.NonFiniteError) as broken:
        rk.median(many)
    assert len(str(broken.value)) <= 500
    settings = [{"w": np.ones(2), "name": str(i) * 5000} for i in range(3000)]
    with pytest.raises(ValueError, match="is no array") as text:
        rk.median(settings)
    assert len(str(text.value)) <= 500


def test_remedies_fit_the_library() -> None:
    with pytest.raises(TypeError, match=r"updates has dtype int64; expected .*\(convert it, x.to\(torch.float32\)\)"):
        rk.median(torch.arange(6).reshape(3, 2))
    with pytest.raises(TypeError, match=r"updates has dtype int64; expected .*\(convert it, x.astype\('float32'\)\)"):
        rk.median(np.arange(6).reshape(3, 2))


# ---- what a review found --------------------------------------------------------------------------------------------


def test_names_that_collide_lose_no_leaf() -> None:
    rows = [{"a": {"b": np.full(3, float(i))}, "a.b": np.full(3, 10.0 + i), "n": np.array(i)} for i in range(5)]
    got, info = rk.median(rows, scope="leaf", return_info=True)
    assert got["a"]["b"].tolist() == [2, 2, 2]
    assert got["a.b"].tolist() == [12, 12, 12]
    assert int(got["n"]) == 2
    assert list(info.leaves) == ["a.b", "['a.b']"]
    assert int(rk.median([{"e": np.array(i)} for i in range(5)], scope="leaf")["e"]) == 2


def test_what_scope_draws_can_be_drawn_again() -> None:
    rows = [row | {"e": 3 if i else 4} for i, row in enumerate(states(8))]
    got, info = rk.aggregate(rows, "bucketing | median", f=1, scope="leaf", return_info=True)
    assert info.differing == {"['e']": (0,)}
    again = rk.aggregate(rows, "bucketing | median", f=1, scope="leaf", seed=info.seed)
    assert all(np.array_equal(again[key], got[key]) for key in ("w", "b"))


def test_what_may_be_byzantine_does_not_shrink_with_the_rows() -> None:
    x = RNG.standard_normal((10, 3)) * 0.01
    x[:3], x[3:6] = np.nan, 1e6
    weights = np.ones(10)
    weights[9] = 1.01
    assert abs(rk.trimmed_mean(x, delta=0.31, weights=weights, nonfinite="drop")).max() < 0.1
    with pytest.raises(rk.NonFiniteError, match="without them too few are left"):
        rk.trimmed_mean(x, delta=0.36, weights=weights, nonfinite="drop")
    far = RNG.standard_normal((7, 3))
    far[0], far[3] = np.nan, 1e200
    with pytest.raises(rk.NonFiniteError, match=r"\(rows 3\).*drop them, or raise f$") as error:
        rk.geometric_median(far, f=0, nonfinite="drop")
    assert error.value.rows == (3,)


def test_leaves_that_drop_other_rows_speak_of_all() -> None:
    rows = [{"a": RNG.standard_normal(4), "b": RNG.standard_normal(4), "s": "same"} for _ in range(10)]
    rows[0]["a"][1], rows[7]["b"][2], rows[5]["s"], rows[8]["b"] = np.nan, np.inf, "odd", np.full(4, 1e200)
    _, info = rk.aggregate(rows, "geometric_median", f=2, scope="leaf", nonfinite="drop", return_info=True)
    assert (info.n, info.dropped, info.nonfinite_rows) == (10, (0, 7), (8,))
    assert info.leaves["b"].nonfinite_rows == (7,)
    assert set(info.differing.values()) == {(5,)}
    assert {name: (leaf.n, leaf.dropped) for name, leaf in info.leaves.items()} == {"a": (9, (0,)), "b": (9, (7,))}


def test_a_row_of_nan_does_not_hide_a_mask() -> None:
    rows = [{"w": RNG.standard_normal(4), "m": np.array([0, -np.inf])} for _ in range(7)]
    rows[2] = {"w": np.full(4, np.nan), "m": np.full(2, np.nan)}
    for rule in ("median", "mean", "ctma(median)"):
        got, info = rk.aggregate(rows, rule, f=0, nonfinite="drop", return_info=True)
        assert info.dropped == (2,)
        assert info.shared_inf == 1
        assert got["m"].tolist() == [0, -np.inf]


@pytest.mark.parametrize("odd", [lambda w: w.T.contiguous().T, lambda w: w.clone().requires_grad_()])
def test_a_row_of_another_layout_unties_nobody_else(odd: Any) -> None:
    rows = tied_states()
    rows[3]["head"] = odd(rows[3]["head"])
    with torch.no_grad():
        got, info = rk.ctma(rows, f=2, return_info=True)
        assert info.d == 34
        out = {"emb": torch.zeros(6, 5), "b": torch.zeros(4)}
        out["head"] = out["emb"]
        assert torch.equal(rk.ctma(rows, f=2, out=out)["head"], got["emb"])


def test_one_memory_seen_as_two_dtypes_is_no_tie() -> None:
    rows = []
    for i in range(5):
        z = torch.complex(torch.ones(3) * i, torch.ones(3))
        bits = np.full(4, i, dtype=np.uint8)
        rows.append({"z": z, "real": torch.view_as_real(z)})
        views = {"a": bits.view(ml_dtypes.float8_e4m3fn), "b": bits.view(ml_dtypes.float8_e5m2)}
        got = rk.median([views] * 3)
        assert got["a"].dtype != got["b"].dtype
        assert np.array_equal(got["b"].astype(float), views["b"].astype(float))
    for dtype in (None, "float64"):
        result = rk.median(rows, dtype=dtype)
        assert not result["real"].is_complex()
        assert result["real"].shape == (3, 2)


def test_three_tied_leaves_and_tied_integers_into_any_out() -> None:
    rows = [{"a": w, "b": w, "c": w} for w in np.random.default_rng(0).standard_normal((5, 3))]
    want, shared = np.median([row["a"] for row in rows], axis=0), np.zeros(3)
    for out in ({"a": shared, "b": shared, "c": np.zeros(3)}, {"a": np.zeros(3), "b": shared, "c": shared}):
        got = rk.median(rows, out=out)
        assert all(np.array_equal(got[key], want) for key in "abc")
    counts = [{"n": k, "m": k, "w": np.ones(2)} for k in (np.array([i, 2]) for i in range(5))]
    got = rk.median(counts, out={"n": np.zeros(2, int), "m": np.zeros(2, int), "w": np.zeros(2)})
    assert got["m"].tolist() == got["n"].tolist() == [2, 2]


def test_updates_are_not_written_through_leaves_that_take_no_part() -> None:
    rows = [{"w": np.ones(2) * (i + 1), "b": np.ones(2)} for i in range(3)]
    with pytest.raises(ValueError, match=r"out, leaf \['w'\] shares memory with the updates"):
        rk.median(rows, exclude="b", out={"w": rows[1]["b"]})
    tied = [{"a": w, "b": w} for w in RNG.standard_normal((5, 3))]
    tied[3]["b"] = tied[3]["b"].copy()
    with pytest.raises(ValueError, match=r"shares memory with the updates"):
        rk.median(tied, f=1, out={"a": tied[3]["b"], "b": tied[3]["b"]})
    with pytest.raises(TypeError, match=r"out, leaf \['a'\] is a number, which cannot be written"):
        rk.median([{"a": np.float32(i), "w": np.ones(2)} for i in range(3)], out={"a": np.float32(-1), "w": np.ones(2)})


def test_masks_are_never_written_and_come_back_every_time() -> None:
    x = RNG.standard_normal((5, 50)).astype(np.float32)
    x[:, 3] = np.inf
    before = x.copy()
    for rule in RULES:
        assert rk.aggregate(x, rule, f=1)[3] == np.inf
        assert np.array_equal(x, before)


def test_weights_decide_what_is_no_coordinate_too() -> None:
    rows: list[Any] = [{"w": np.ones(2) * i, "n": np.array(5 if i < 3 else 999), "e": i < 3} for i in range(7)]
    got, info = rk.median(rows, delta=0.1, weights=[1, 1, 1, 0, 0, 0, 0], return_info=True)
    assert int(got["n"]) == 5
    assert got["e"] is True
    assert info.differing == {"['e']": (3, 4, 5, 6)}
    assert rk.median(rows[:6], weights=[1, 1, 1, 1, 1, 1.5])["n"] == 999


def test_a_number_of_any_length_blocks_nobody() -> None:
    rows: list[Any] = [{"e": 3, "w": np.ones(2) * i} for i in range(5)]
    rows[2]["e"] = 10**5000
    got, info = rk.median(rows, f=1, return_info=True)
    assert got["e"] == 3
    assert info.differing == {"['e']": (2,)}
    for i, row in enumerate(rows):
        row["e"] = 10**5000 + i // 3
    with pytest.raises(ValueError, match="differ from the others' an integer of 16610 bits"):
        rk.median(rows, f=1)


def test_small_things_about_out_and_patterns() -> None:
    rows = states(3)
    with pytest.raises(TypeError, match="only must be a pattern of leaf names, or a list of them; got \\[\\]"):
        rk.median(rows, only=[])
    tensors = [{"w": torch.ones(2) * i} for i in range(3)]
    got = rk.median(tensors, out={"w": torch.nn.Parameter(torch.zeros(2))})  # no warning: it is no update
    assert got["w"].tolist() == [1, 1]
    ordered = OrderedDict((key, np.zeros_like(value)) for key, value in rows[0].items())
    assert type(rk.median(rows, exclude="b", out=ordered)) is OrderedDict
    rows[1] |= {"h": {}}
    rows[2] |= {"h": {"x": np.ones(2)}}
    rows[0] |= {"h": {"y": np.ones(3)}}
    assert rk.median(rows, exclude="h.*").keys() == {"w", "b"}
