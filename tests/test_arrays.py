"""Kinds of updates: what comes in goes out again, and what cannot be used is named."""

from __future__ import annotations

import collections
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from support import make_rows

import robustkern as rk
from robustkern.inputs import plain
from robustkern.inputs.arrays import address_of

torch = pytest.importorskip("torch", reason="torch is not installed")
from torch._subclasses import FakeTensorMode  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

TORCH_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


def as_torch(x: Any) -> Any:
    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def test_numpy_array(dtype: np.dtype[Any]) -> None:
    x = make_rows("normal", 5, 12, dtype)
    for shape in ((5, 12), (5, 3, 4), (5, 12, 1), (5, 1, 2, 6)):
        got = rk.median(x.reshape(shape))
        assert type(got) is np.ndarray
        assert got.dtype == dtype
        assert got.shape == shape[1:]


def test_torch_tensor_equals_numpy(dtype: np.dtype[Any]) -> None:
    x = make_rows("normal", 9, 60, dtype)
    for rule in ("median", "ctma(geometric_median)"):
        got = rk.aggregate(as_torch(x).reshape(9, 5, 12), rule, f=2)
        assert isinstance(got, torch.Tensor)
        assert got.dtype == TORCH_DTYPES[dtype.name]
        assert got.shape == (5, 12)
        assert torch.equal(got.reshape(-1), as_torch(rk.aggregate(x, rule, f=2)))


def test_torch_tensors_that_need_gradients_and_odd_strides() -> None:
    x = make_rows("normal", 7, 24, np.dtype(np.float32))
    want = rk.median(x)
    t = torch.from_numpy(x).clone().requires_grad_()
    with pytest.warns(UserWarning, match=r"updates require gradients, which do not flow .*pass x.detach\(\), or"):
        got = rk.median(t)
    assert not got.requires_grad
    with torch.no_grad():  # where nothing is recorded, nothing is lost
        assert torch.equal(rk.median(t), got)
    with pytest.warns(UserWarning, match="updates require gradients"):
        rk.median([{"w": row} for row in t])
    assert np.array_equal(got.numpy(), want)
    transposed = torch.from_numpy(np.ascontiguousarray(x.T)).T
    assert np.array_equal(rk.median(transposed).numpy(), want)
    rows = [torch.from_numpy(np.repeat(row, 2))[::2] for row in x]
    assert np.array_equal(rk.median(rows).numpy(), want)
    half = transposed.to(torch.bfloat16)
    assert torch.equal(rk.median(half), rk.median(half.contiguous()))


def test_sequences_of_arrays() -> None:
    x = make_rows("normal", 5, 12, np.dtype(np.float32))
    want = rk.median(x)
    assert np.array_equal(rk.median(list(x)), want)
    assert np.array_equal(rk.median(tuple(x.reshape(5, 3, 4))), want.reshape(3, 4))
    mixed_strides = [x[0], np.repeat(x[1], 2)[::2], x[2].copy(), np.asfortranarray(x[3]), x[4][::-1][::-1]]
    assert np.array_equal(rk.median(mixed_strides), want)


def test_noncontiguous_views_are_used_in_place() -> None:
    """Rows cut out of a larger array: contiguous runs become segments, short ones are gathered."""
    big = make_rows("normal", 7, 3 * 10 * 200, np.dtype(np.float32)).reshape(7, 3, 10, 200)
    for view in (
        big[:, :, :, :150],
        big[:, :, 2:9],
        big[:, ::2],
        big[:, :, :, ::3],
        big[:, :, :, :5],
        big[:, ::-1, ::2, 3:-3],
    ):
        assert np.array_equal(rk.median(view), np.median(view, axis=0))
        assert np.array_equal(rk.median(list(view)), np.median(view, axis=0))
    same = np.broadcast_to(big[0], big.shape)
    assert np.array_equal(rk.median(same), big[0])
    column = np.broadcast_to(big[:, :, :, :1], big.shape)
    assert np.array_equal(rk.median(column), np.median(column, axis=0))


def test_read_only_and_memory_mapped(tmp_path: Any) -> None:
    x = make_rows("normal", 5, 100, np.dtype(np.float32))
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    got = rk.ctma(mapped, f=1)
    assert np.array_equal(got, rk.ctma(x, f=1))
    rows = [np.frombuffer(row.tobytes(), dtype=np.float32) for row in x]
    assert np.array_equal(rk.ctma(rows, f=1), got)


def test_state_dicts_of_mixed_dtypes() -> None:
    """Floats of several dtypes together, BatchNorm's counter as lower median, order and type of the dict kept."""
    rng = np.random.default_rng(0)

    def client(i: int) -> Any:
        return collections.OrderedDict(
            weight=torch.from_numpy(rng.standard_normal((4, 3)).astype(np.float32)),
            half=torch.from_numpy(rng.standard_normal(7).astype(np.float16)),
            brain=torch.randn(5, generator=torch.Generator().manual_seed(i)).to(torch.bfloat16),
            empty=torch.zeros(0, 3),
            num_batches_tracked=torch.tensor(100 + i),
            mask=torch.tensor([i % 2 == 0, True]),
        )

    clients = [client(i) for i in range(6)]
    result, info = rk.ctma(clients, f=2, return_info=True)
    assert list(result) == list(clients[0])
    assert type(result) is collections.OrderedDict
    for key, value in result.items():
        assert value.dtype == clients[0][key].dtype
        assert value.shape == clients[0][key].shape
    assert result["num_batches_tracked"] == 102
    assert result["mask"].tolist() == [False, True]
    assert info.d == 12 + 7 + 5
    # The same as one float64 matrix, within the dtypes' rounding.
    flat = np.stack(
        [np.concatenate([c[k].double().numpy().ravel() for k in ("weight", "half", "brain")]) for c in clients]
    )
    want, want_info = rk.ctma(flat, f=2, return_info=True)
    assert np.array_equal(info.kept, want_info.kept)
    np.testing.assert_allclose(info.sq_distances, want_info.sq_distances, rtol=1e-9)
    np.testing.assert_allclose(result["weight"].numpy().ravel(), want[:12], rtol=1e-6)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_leaves_of_all_layouts_together(library: str) -> None:
    """Contiguous leaves are not looked at one by one, all others are; both in one tree, in and out."""
    x = make_rows("normal", 6, 4 * 300, np.dtype(np.float32)).reshape(6, 4, 300)

    def tree(row: Any, i: int) -> dict[str, Any]:
        row = torch.from_numpy(row) if library == "torch" else row
        turned = row.T.clone().T if library == "torch" else np.asfortranarray(row)
        leaves = {"plain": row, "turned": turned, "cut": row[:, :290], "some": turned if i == 3 else row}
        return {**leaves, "none": row[:0], "one": row[0, 0], "few": row[:, :5]}

    rows = [tree(row, i) for i, row in enumerate(x)]
    want = tree(np.median(x, axis=0), 0)
    out = {key: (value + 0).reshape(-1).reshape(value.shape) for key, value in want.items()}
    if library == "numpy":
        out["one"] = np.zeros((), dtype=np.float32)
        rows[2] = pickle.loads(pickle.dumps(rows[2]))  # its dtypes are equal, not identical
    else:
        out["turned"], out["cut"], out["few"] = (out[key].contiguous() for key in ("turned", "cut", "few"))
        rows[1]["plain"] = torch.nn.Parameter(rows[1]["plain"])
        rows[1]["some"] = rows[1]["some"].clone().requires_grad_()
    with torch.no_grad():
        both = rk.median(rows), rk.median(rows, out=out)
    for got in both:
        for key, value in want.items():
            assert np.array_equal(np.asarray(got[key]), np.asarray(value)), key
    out["plain"] = rows[4]["plain"]
    with torch.no_grad(), pytest.raises(ValueError, match=r"out, leaf \['plain'\] shares memory with the updates"):
        rk.median(rows, out=out)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_without_memory_in_a_tree() -> None:
    imaginary = torch.conj(torch.ones(4, dtype=torch.complex64) * 1j).imag
    assert rk.median([{"a": imaginary}] * 3)["a"].tolist() == [-1, -1, -1, -1]
    with pytest.raises(ValueError, match=r"row 0, leaf \['a'\] is a torch tensor on device meta"):
        rk.median([{"a": torch.ones(4, device="meta")}] * 3)
    with pytest.raises(TypeError, match=r"row 0, leaf \['a'\] is a torch tensor that NumPy cannot view"):
        torch.func.vmap(lambda x: rk.median([{"a": x}] * 3)["a"])(torch.ones(2, 3))
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.strided)
    with pytest.raises(TypeError, match=r"row 0, leaf \['a'\] is a torch tensor of layout"):
        rk.median([{"a": nested}] * 3)
    zero = torch._efficientzerotensor((4,))
    with pytest.raises(TypeError, match=r"row 0, leaf \['a'\] is a torch tensor that NumPy cannot view"):
        rk.median([{"a": zero}] * 3)


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_tensors_that_torch_transforms() -> None:
    """Their addresses are nobody's memory: what came was garbage, or ended the process."""
    x = torch.randn(5, 4)
    traced = "traced or transformed by torch, which cannot follow the kernels"
    for what, call in (
        ("updates is a torch tensor without memory", rk.median),
        ("row 0 is a torch tensor without memory", lambda y: rk.ctma(list(y), f=1)),
        (r"row 0, leaf \['a'\] is a torch tensor without memory", lambda y: rk.median([{"a": row} for row in y])),
        ("tensors are not made in memory here", lambda y: rk.median(x) + y[0]),
    ):
        with pytest.raises(TypeError, match=f"{what}.*{traced}"):
            torch.func.functionalize(call)(x)
    with pytest.raises(TypeError, match=traced):
        torch.func.grad(lambda y: (y * rk.median(x)).sum())(x[0])
    with FakeTensorMode():
        for call in (rk.median, lambda y: rk.kernels.weighted_row_sum(y, [1.0] * 5)):
            with pytest.raises(TypeError, match=f"tensors are not made in memory here.*{traced}"):
                call(x)
    with pytest.raises(TypeError, match=traced):
        torch.jit.trace(lambda y: rk.median(y, backend="auto"), (x,))
    with pytest.raises(TypeError, match=traced):
        make_fx(lambda y: rk.median(y) + 0)(x)
    with FlopCounterMode(display=False):
        assert np.array_equal(rk.median(x).numpy(), rk.median(x.numpy()))


@pytest.fixture(params=["compiled", "python", "torch of old"])
def looks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who finds out where arrays begin: the compiled part; Python without it, or where torch has no table for it."""
    assert plain.compiled is not None
    assert plain._torch().exchange is not None
    if request.param == "python":
        monkeypatch.setattr(plain, "compiled", None)
    elif request.param == "torch of old":
        old = plain._torch()._replace(exchange=None)
        monkeypatch.setattr(plain, "_torch", lambda: old)


class Array(np.ndarray):  # type: ignore[type-arg]
    pass


class Tensor(torch.Tensor):  # type: ignore[misc]
    pass


@pytest.mark.usefixtures("looks")
def test_arrays_that_are_plain(dtype: np.dtype[Any]) -> None:
    x = make_rows("normal", 4, 15, dtype).reshape(4, 3, 5)
    equal = pickle.loads(pickle.dumps(x[0]))  # its dtype need not be the same object
    numpy = [*x, equal, np.zeros((3, 5), dtype)]
    odd = np.zeros(15 * dtype.itemsize + 1, np.uint8)[1:].view(dtype).reshape(3, 5)  # an odd address is no trouble
    tensors = [as_torch(row.copy()) for row in (*x, equal)]
    tensors += [torch.nn.Parameter(tensors[0]), tensors[1].clone().share_memory_()]
    flat = [as_torch(row.copy()).as_strided((1, 15), (99, 1)) for row in x]  # the step of one row is none
    for column, begins in (
        (numpy, [address_of(y) for y in numpy]),
        ([odd] * 2, [address_of(odd)] * 2),
        (tensors, [y.data_ptr() for y in tensors]),
        (flat, [y.data_ptr() for y in flat]),
    ):
        with torch.no_grad():
            (found,) = plain.look([column], len(column), more=2)
        assert found is not None
        assert found.dtype == dtype
        assert found.begins.shape == (len(column) + 2,)
        assert found.begins[: len(column)].tolist() == begins
    whole = plain.look([(a, b) for a, b in zip(numpy, numpy[::-1], strict=True)], 2)
    assert [each.begins.tolist() for each in whole if each] == [
        [address_of(a), address_of(b)] for a, b in zip(numpy, numpy[::-1], strict=True)
    ]


@pytest.mark.usefixtures("looks")
def test_tensors_of_which_gradients_are_recorded() -> None:
    """One warning for all of them, as far as they are inputs."""
    x, recorded = torch.ones(3), torch.ones(3, requires_grad=True)
    for columns, inputs, expected in (
        ([(x, x), (x, x)], 2, 0),
        ([(x, recorded), (recorded, x), (x, x)], 2, 1),
        ([(x, recorded)], 1, 0),  # the result's place
        ([(torch.nn.Parameter(x),)], 1, 1),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert all(plain.look(columns, inputs))
        assert [str(w.message)[:25] for w in caught] == ["updates require gradients"] * expected
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")
            assert all(plain.look(columns, inputs))


@pytest.mark.usefixtures("looks")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_arrays_that_are_not_plain() -> None:
    """Whatever is said about them is said by others; nothing here may read their memory, nor raise."""
    a, t = np.ones((3, 5), np.float32), torch.ones(3, 5)
    freed, part = torch.ones(3, 5), torch.ones(100, 5)[40:43]
    freed.untyped_storage().resize_(0)
    part.untyped_storage().resize_(0)
    arrays: list[Any] = [
        a[:2], a.T, a.reshape(5, 3), a.view(np.int32), a.view(Array), a.astype(">f4"), a.astype(np.float64), a[:, ::-1],
        np.ma.masked_array(a), np.float32(1), 1, None, "text", t, np.zeros((3, 5, 1), np.float32),
    ]  # fmt: skip
    tensors: list[Any] = [
        t[:2], t.T, torch.ones(5, 3).T, t.double(), t.bfloat16(), t.view(torch.int32), t.to(torch.complex64),
        t.as_subclass(Tensor), t.to_sparse(), t.to_mkldnn(), t.to("meta"), torch._neg_view(t), freed, part,
        torch.zeros(3, 5, dtype=torch.complex64).conj().imag, torch._to_functional_tensor(t),
        torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), torch._efficientzerotensor((3, 5)),
        torch.nested.nested_tensor([t, t]), FakeTensorMode().from_tensor(t), 1, None, a, t.unsqueeze(2),
    ]  # fmt: skip
    for usual, others in ((a, arrays), (t, tensors)):
        for other in others:
            assert plain.look([(usual, other)], 2) == [None], other
        columns = [(usual, usual), (usual, others[0]), (others[1], usual), (usual, usual)]
        assert [each is not None for each in plain.look(columns, 2)] == [True, False, False, True]
    for other in (*arrays, *tensors):
        alone = plain.look([(other,)], 1)[0]  # is as the others are, and may be plain
        assert alone is None or alone.dtype in (np.float32, np.float64, ml_dtypes.bfloat16)
    seen = []
    torch.func.vmap(lambda x: (seen.append(plain.look([(x, x)], 2)), x)[1])(t)
    torch.func.grad(lambda x: (seen.append(plain.look([(x, x)], 2)), x.sum())[1])(t)
    assert seen == [[None], [None]]


def test_what_the_compiled_part_is_told_must_fit() -> None:
    a, begins = np.ones(3), np.zeros((1, 2), np.int64)
    for columns, torch_, error, words in (
        ([], None, ValueError, "one line of begins for each column"),
        ([(a,) * 3], None, ValueError, "a line of begins is too short"),
        ([()], None, ValueError, "a line of begins is too short"),
        ([5], None, TypeError, "a column must be a sequence"),
        ([(a,)], (None, (), False, 0), ValueError, "PyCapsule_GetPointer called with invalid PyCapsule object"),
    ):
        with pytest.raises(error, match=words):
            plain.compiled(columns, 1, np.ndarray, torch_, begins)


def test_out_that_torch_would_negate() -> None:
    x = torch.ones(5, 4)
    words = "is a view that torch negates or conjugates as it is read"
    for out in (torch._neg_view(torch.zeros(4)), torch.zeros(4, dtype=torch.complex64).conj().imag):
        with pytest.raises(ValueError, match=rf"out {words}.*pass a fresh tensor"):
            rk.median(x, out=out)
        with pytest.raises(ValueError, match=rf"out, leaf \['a'\] {words}"):
            rk.median([{"a": row} for row in x], out={"a": out})
        with pytest.raises(ValueError, match=f"out {words}"):
            rk.kernels.weighted_row_sum(x, [1.0] * 5, out=out)
    with pytest.raises(ValueError, match=f"out {words}"):
        rk.median(x.to(torch.complex64), out=torch.zeros(4, dtype=torch.complex64).conj())
    with pytest.raises(ValueError, match=f"update_momenta: momenta {words}"):
        rk.kernels.update_momenta(torch._neg_view(torch.zeros(5, 4)), x, keep=0.5)


def test_tensors_whose_storage_was_freed() -> None:
    x = torch.randn(5, 40_000)
    rows, strided = list(x), [row[::2] for row in x]
    x.untyped_storage().resize_(0)
    for updates, what in ((x, "updates"), (rows, "row 0"), (rows[1:], "row 0"), (strided, "row 0")):
        with pytest.raises(TypeError, match=rf"{what} is a torch tensor whose storage was freed \(gather it first\)"):
            rk.median(updates)


def test_read_only_out_of_a_tree() -> None:
    out = np.zeros(4, dtype=np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match=r"out, leaf \['a'\] must be contiguous, aligned and writeable"):
        rk.median([{"a": X[0]}] * 3, out={"a": out})


def test_counters_survive_hostile_values() -> None:
    rows = [{"w": np.ones(3), "n": np.array([5], dtype=np.int64)} for _ in range(5)]
    rows[0]["n"][:] = np.iinfo(np.int64).min
    rows[1]["n"][:] = np.iinfo(np.int64).max
    assert rk.trimmed_mean(rows, f=2)["n"].tolist() == [5]
    assert rk.mean(rows)["n"].tolist() == [3]  # of 14 / 5: who asks for a mean trusts everybody


def test_only_counters() -> None:
    assert rk.median([{"n": np.array([i])} for i in (3, 1, 2)])["n"].tolist() == [2]


def test_no_columns() -> None:
    for rule in ("mean", "median", "ctma(median)", "ctma(geometric_median)", "nnm | krum(neighbours=1)"):
        assert rk.aggregate(np.zeros((5, 0), dtype=np.float32), rule, f=1).shape == (0,)


def test_one_row() -> None:
    x = make_rows("normal", 1, 9, np.dtype(np.float64))
    for rule in (
        "mean",
        "median",
        "trimmed_mean",
        "geometric_median",
        "ctma(median)",
        "nnm | mean",
        "bucketing(seed=0) | mean",
    ):
        assert np.array_equal(rk.aggregate(x, rule, f=0), x[0])


def test_mappings_are_matched_by_their_keys() -> None:
    """As state dicts come that were filled in another order, or went through JSON."""
    rng = np.random.default_rng(0)
    rows = [{"b": rng.standard_normal(3), "a": [rng.standard_normal(2), {"y": rng.standard_normal(4), "x": np.arange(2)}]}
            for _ in range(5)]  # fmt: skip

    def turned(tree: Any) -> Any:
        if isinstance(tree, dict):
            return collections.OrderedDict((key, turned(tree[key])) for key in reversed(tree))
        return [turned(part) for part in tree] if isinstance(tree, list) else tree

    ordered = [
        collections.OrderedDict(b=row["b"], a=[row["a"][0], collections.OrderedDict(row["a"][1])]) for row in rows
    ]
    want = rk.median(ordered)
    for mixed in ([ordered[0], *map(turned, rows[1:])], [*ordered[:4], turned(rows[4])]):
        got = rk.median(mixed)
        assert list(got) == ["b", "a"]  # as the first row has them
        assert list(got["a"][1]) == ["y", "x"]
        assert np.array_equal(got["b"], want["b"])
        assert np.array_equal(got["a"][1]["y"], want["a"][1]["y"])
    out = turned(rk.median(rows))
    result = rk.median(ordered, out=out)
    assert np.array_equal(out["b"], want["b"])
    assert list(result) == ["b", "a"]
    with pytest.raises(ValueError, match=r"row 1 lacks the leaves \['b'\]"):
        rk.median([ordered[0], {"a": rows[1]["a"]}])
    assert np.array_equal(rk.median([ordered[0], *rows[1:]])["b"], want["b"])  # nor does their kind matter
    with pytest.raises(ValueError, match="row 1 has another structure than row 0"):
        rk.median([rows[0], {"b": rows[1]["b"], "a": tuple(rows[1]["a"])}])


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_out(library: str) -> None:
    x = make_rows("normal", 5, 12, np.dtype(np.float32))
    updates: Any = torch.from_numpy(x) if library == "torch" else x
    out: Any = torch.zeros(12) if library == "torch" else np.zeros(12, dtype=np.float32)
    result = rk.median(updates, out=out)
    assert result is out
    assert np.array_equal(np.asarray(out), rk.median(x))
    trees = [{"a": u[:5], "b": u[5:]} for u in updates]
    target = {"a": out[:5], "b": out[5:]}
    out[:] = 0
    assert rk.median(trees, out=target)["a"] is target["a"]
    assert np.array_equal(np.asarray(out), rk.median(x))


X = np.ones((3, 4), dtype=np.float32)


@pytest.mark.parametrize(
    ("updates", "error", "message"),
    [
        ([], ValueError, "expected between 1 and 65535 rows; got 0"),
        (np.ones((0, 4)), ValueError, "expected between 1 and 65535 rows; got 0"),
        (np.ones(4), ValueError, r"at least 2 axes; got shape \(4,\) .*pass x\[:, None\]"),
        ({"a": X}, TypeError, "updates is dict; expected an array of shape"),
        ("abc", TypeError, "updates is str; expected an array"),
        (None, TypeError, "updates is NoneType"),
        (iter([X[0]]), TypeError, "expected an array of shape .* or a list"),
        (
            X.astype(int),
            TypeError,
            r"updates has dtype int64; expected float16, bfloat16, float32 or float64 \(convert",
        ),
        (X.astype(object), TypeError, "updates has dtype object"),
        (X.astype(">f4"), TypeError, "updates has dtype >f4; .*swap its bytes"),
        (X.astype(np.longdouble), TypeError, "expected float16, bfloat16, float32 or float64"),
        (np.ma.masked_array(X), TypeError, r"masked array, whose mask would be lost \(pass x.filled"),
        ([X[0], X[1][:3]], ValueError, r"row 1 has shape \(3,\) and dtype float32; row 0 has shape \(4,\)"),
        ([X[0], X[1].astype(np.float64)], ValueError, "row 1 has shape .* and dtype float64; row 0 .* dtype float32"),
        ([X[0], torch.ones(4)], TypeError, "row 1.* is a torch array, row 0 a numpy array"),
        ([{"a": X[0]}, {"b": X[0]}], ValueError, r"row 1 lacks the leaves \['a'\], has the unexpected leaves \['b'\]"),
        ([{"a": X[0]}, {"a": [X[0]]}], ValueError, "row 1 lacks the leaves"),
        ([{"a": X[0]}, {"a": X[0][:2]}], ValueError, r"row 1, leaf \['a'\] has shape \(2,\)"),
        ([{"a": 1.0}, {"a": 2.0}], ValueError, "row 0 holds no arrays, only numbers or texts of Python"),
        ([{"a": X[0]}, {"a": 2.0}], TypeError, r"row 1, leaf \['a'\] is float; expected a NumPy array"),
        ([{"a": X[0], "b": object()}], TypeError, r"row 0, leaf \['b'\] is object"),
        ([{}, {}], ValueError, "row 0 holds no arrays"),
        ([{"a": X[0], "b": torch.ones(2)}], TypeError, "row 0 mixes numpy and torch leaves"),
        (torch.ones(3, 4).to_sparse(), TypeError, r"layout torch.sparse_coo; expected a dense one \(pass x.to_dense"),
        (
            torch.ones(3, 4, device="meta"),
            ValueError,
            r"on device meta; expected cpu or cuda \(pass x.cpu",
        ),
    ],
)
def test_unusable_updates(updates: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rk.median(updates)


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (np.zeros(3, dtype=np.float32), ValueError, r"out has shape \(3,\) and dtype float32; expected shape \(4,\)"),
        (np.zeros(4), ValueError, "out has shape .* dtype float64; expected .* dtype float32"),
        (np.zeros(8, dtype=np.float32)[::2], ValueError, "out must be contiguous, aligned and writeable"),
        (X[0], ValueError, "out shares memory with the updates"),
        (torch.zeros(4), TypeError, "out is Tensor .*; expected a numpy array"),
        ([0.0] * 4, TypeError, "out is list; expected a numpy array"),
    ],
)
def test_unusable_out(out: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rk.median(X, out=out)


def test_out_must_not_be_another_leaf_of_the_updates() -> None:
    rows = [{"a": np.full(3, float(i)), "b": np.full(3, 10.0 + i)} for i in range(5)]
    with pytest.raises(ValueError, match=r"out, leaf \['a'\] shares memory with the updates"):
        rk.median(rows, out={"a": rows[0]["b"], "b": np.zeros(3)})
    same = np.zeros(4)
    with pytest.raises(ValueError, match=r"out, leaf \['b'\] shares memory with leaf \['a'\] of out"):
        rk.median(rows, out={"a": same[:3], "b": same[1:]})
    assert rows[0]["b"].tolist() == [10, 10, 10]


@pytest.mark.parametrize("kind", [np.asarray, list, torch.from_numpy, lambda x: list(torch.from_numpy(x))])
def test_out_beside_the_updates_in_one_array(kind: Callable[[Any], Any]) -> None:
    memory = np.random.default_rng(0).standard_normal(80)
    rows = memory[20:60].reshape(5, 8)
    updates, want, before = kind(rows), np.median(rows, axis=0), rows.copy()
    for begin in range(len(memory) - 8 + 1):
        out = memory[begin : begin + 8]
        target = torch.from_numpy(out) if torch.is_tensor(updates[0]) else out
        if begin + 8 <= 20 or begin >= 60:
            assert rk.median(updates, out=target) is target
            assert np.array_equal(out, want)
        else:
            with pytest.raises(ValueError, match="out shares memory with the updates"):
                rk.median(updates, out=target)
    assert np.array_equal(rows, before)


@pytest.mark.parametrize("kind", [np.asarray, list])
def test_out_that_cannot_be_written_to_as_it_is(kind: Callable[[Any], Any]) -> None:
    updates, closed = kind(X.copy()), X[0].copy()
    closed.flags.writeable = False
    shifted = np.zeros(4 * 4 + 1, dtype=np.uint8)[1:].view(np.float32)
    for out in (closed, shifted, np.zeros(8, dtype=np.float32)[::2]):
        with pytest.raises(ValueError, match="out must be contiguous, aligned and writeable"):
            rk.median(updates, out=out)


@pytest.mark.parametrize("divisor", [1e-300, 2.0**-901, 2.0**899, 2.0**901, 1e300, 1.7e308])
def test_sums_over_any_divisor(backend: str, dtype: np.dtype[Any], divisor: float) -> None:
    x = np.arange(12).reshape(4, 3).astype(dtype)
    weights = np.array([1.0, 2, 3, 4]) * min(divisor, 1e290)
    want = (weights / divisor) @ x.astype(np.longdouble)
    got = rk.kernels.weighted_row_sum(x, weights, divisor=divisor)
    np.testing.assert_allclose(
        got.astype(float), want.astype(dtype).astype(float), rtol=float(ml_dtypes.finfo(dtype).eps)
    )


def test_pytrees_without_end() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ValueError, match="nested too deeply, or contains itself"):
        rk.median([loop, loop])


def test_things_that_only_look_like_arrays() -> None:
    class Shaped:
        shape = (3, 2)

    for updates in (Shaped(), [Shaped(), Shaped()]):
        with pytest.raises(TypeError, match="is Shaped of shape"):
            rk.median(updates)
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    with pytest.raises(TypeError, match="layout"):
        rk.median(nested)
    with pytest.raises(TypeError, match="torch tensor that NumPy cannot view"):
        rk.median(torch.ones(3, 4).to(torch.float8_e8m0fnu))
    imaginary = torch.conj(torch.ones(3, 4, dtype=torch.complex64) * 1j).imag
    assert rk.median(imaginary).tolist() == [-1, -1, -1, -1]


def test_out_tree_of_another_structure() -> None:
    with pytest.raises(ValueError, match=r"out lacks the leaves \['a'\]"):
        rk.median([{"a": X[0]}] * 3, out={"c": X[0].copy()})


def test_primitives_take_updates_too() -> None:
    x = make_rows("normal", 7, 30, np.dtype(np.float32))
    value, distances = rk.kernels.select_columns(torch.from_numpy(x), (2, 5), distances=True)
    np.testing.assert_allclose(value.numpy(), np.sort(x, axis=0)[2:5].mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(distances, rk.kernels.row_sq_distances(x, value.numpy()), rtol=1e-12)
    squares = [math.fsum(row.astype(np.float64) ** 2) for row in x]
    for updates in (x, torch.from_numpy(x), list(x), [{"a": row} for row in x]):
        assert rk.kernels.row_sq_distances(updates, None).tolist() == squares
    for other in ({"a": x[0]}, "rows"):
        with pytest.raises(TypeError, match=f"updates is {type(other).__name__}; expected an array of shape"):
            rk.kernels.row_sq_distances(other, x[0])
    np.testing.assert_allclose(rk.kernels.weighted_row_sum(x, np.full(7, 1 / 7)), x.mean(axis=0), rtol=1e-5, atol=1e-6)
    assert rk.kernels.gram(x, origin=True).shape == (8, 8)
    with pytest.raises(ValueError, match=r"window must satisfy 0 <= lo < hi <= n; got \(3, 3\) with n=7 rows"):
        rk.kernels.select_columns(x, (3, 3))
    assert np.array_equal(rk.kernels.select_columns(x, (3, 4), nearest=5), rk.mean_around_median(x, f=2))
    assert np.array_equal(rk.kernels.select_columns(x, (2, 5), nearest=5), rk.aggregate(x, "phocas", f=2))
    for nearest in (0, 8):
        with pytest.raises(ValueError, match=f"nearest must satisfy 1 <= nearest <= n; got nearest={nearest} with n=7"):
            rk.kernels.select_columns(x, (3, 4), nearest=nearest)
    with pytest.raises(ValueError, match="weights must be 7 finite numbers, one for each row; got shape"):
        rk.kernels.weighted_row_sum(x, np.ones(6))
    for bad in (torch.ones(7, requires_grad=True), [10**400] * 7, ["a"] * 7):
        with pytest.raises(TypeError, match="weighted_row_sum: weights must be numbers, one for each row"):
            rk.kernels.weighted_row_sum(x, bad)
    for divisor in (0, -1.0, np.nan, np.inf, 10**400, True, "1"):
        with pytest.raises(ValueError, match="weighted_row_sum: divisor must be a finite number above 0; got"):
            rk.kernels.weighted_row_sum(x, np.ones(7), divisor=divisor)
    with pytest.raises(
        ValueError, match=r"weights over the divisor must be finite numbers; got weights of up to 1e\+200"
    ):
        rk.kernels.weighted_row_sum(x, [1e200] * 7, divisor=1e-300)
    for window in ((0.5, 2.5), None, ("a", "b"), (0, 1, 2), np.array([[0, 1]]), (True, 2), (2, 2), (0, 8)):
        with pytest.raises(
            ValueError, match=r"window must satisfy 0 <= lo < hi <= n; got .* rows \(two whole numbers\)"
        ):
            rk.kernels.select_columns(x, window)
    for nearest in (1.5, 0, 8, "1", True):
        with pytest.raises(ValueError, match=r"nearest must satisfy 1 <= nearest <= n; got .* rows \(a whole number\)"):
            rk.kernels.select_columns(x, (3, 4), nearest=nearest)
    for scale in (2**2000, 3, 0.0, -2.0, np.nan, True, "2"):
        with pytest.raises(ValueError, match="gram: scale must be a power of two; got"):
            rk.kernels.gram(x, scale=scale)
    assert np.array_equal(rk.kernels.gram(x, scale=np.float32(2)), rk.kernels.gram(x, scale=2.0))
    with pytest.raises(TypeError, match="updates is int; expected an array of shape"):
        rk.kernels.row_sq_distances(5, x[0])
    for rule, options, error, words in (
        (
            "median",
            {"weights": np.full(7, 1j)},
            TypeError,
            r"weights must be numbers, one for each row \(complex numbers came",
        ),
        (
            "median",
            {"weights": np.ma.masked_less(np.arange(7.0), 2)},
            TypeError,
            "weights are a masked array, whose mask",
        ),
        ("median", {"scope": np.array([1, 2])}, ValueError, "scope must be 'update' or 'leaf'; got ndarray"),
        ("median(even='low', even='high')", {}, ValueError, "gives a parameter twice"),
    ):
        with pytest.raises(error, match=words):
            rk.aggregate(x, rule, **options)
    with pytest.raises(
        ValueError, match="with a centre, which is one row more, expected at most 65534 rows; got 65535"
    ):
        rk.aggregate(np.zeros((65535, 1)), "centre", centre=np.zeros(1))
    big, sums = np.ones((3000, 3000)), np.arange(3000.0)
    rk.kernels.weighted_row_sum(big, sums, out=sums)  # the weights are read before they are written
    assert (sums == 3000 * 2999 / 2).all()
    with pytest.raises(ValueError, match="scale must be a power of two; got 3"):
        rk.kernels.gram(x, scale=3)
    with pytest.raises(
        TypeError, match=r"gram: leaf \['n'\] has dtype int64; the primitives take floating-point leaves"
    ):
        rk.kernels.gram([{"n": np.arange(3)}] * 3)
    with pytest.raises(ValueError, match="row 7 has shape"):
        rk.kernels.row_sq_distances(x, x[0, :3])


# ---- leaves that are no arrays -------------------------------------------------------------------------------------


def test_numbers_and_texts_come_back_as_the_rows_share_them() -> None:
    rows: list[Any] = [{"w": np.full(3, float(i)), "epoch": 7, "name": "net", "on": True, "nan": float("nan")}
                       for i in range(5)]  # fmt: skip
    result, info = rk.median(rows, f=1, return_info=True)
    assert {k: v for k, v in result.items() if k not in ("w", "nan")} == {"epoch": 7, "name": "net", "on": True}
    assert np.isnan(result["nan"])
    assert info.differing == {}
    rows[0] |= {"epoch": 10**9, "on": 1}  # row 0 is hostile; 1 is not True
    rows[3]["name"] = "evil"
    result, info = rk.median(rows, f=1, return_info=True)
    assert (result["epoch"], result["name"], result["on"]) == (7, "net", True)
    assert result["on"] is True
    assert info.differing == {"['epoch']": (0,), "['on']": (0,), "['name']": (3,)}
    assert info.to_dict()["differing"] == {"['epoch']": [0], "['on']": [0], "['name']": [3]}
    assert rk.median(rows)["epoch"] == 7  # without f: fewer than half
    rows[1]["epoch"] = 8
    with pytest.raises(ValueError, match=r"leaf \['epoch'\] is no array, and 2 of 5 rows differ from the others' 7 "
                                         r"\(rows 0, 1\), more than may be Byzantine"):  # fmt: skip
        rk.median(rows, f=1)
    assert rk.median(rows, f=2)["epoch"] == 7
    rows[3]["name"] = "net"
    assert rk.median(rows, weights=[0.1, 0.1, 1, 1, 1.2], delta=0.1)["epoch"] == 7  # by weight
    with pytest.raises(ValueError, match="differ from the others'"):
        rk.median(rows, weights=[1, 1, 1, 1, 1.2], delta=0.1)
    with pytest.raises(ValueError, match="holds no arrays, only numbers or texts"):
        rk.median([{"epoch": 1}] * 3)
    out = {"w": np.empty(3), "epoch": 0, "name": "", "on": False, "nan": 0.0}
    assert rk.median(rows, f=2, out=out)["name"] == "net"
    assert np.array_equal(out["w"], [2, 2, 2])


def test_states_of_optimizers_come_back() -> None:
    torch = pytest.importorskip("torch")
    states = []
    for seed in range(5):
        torch.manual_seed(seed)
        model = torch.nn.Linear(3, 2)
        adam = torch.optim.Adam(model.parameters(), lr=0.01)
        model(torch.ones(1, 3)).sum().backward()
        adam.step()
        states.append(adam.state_dict())
    result = rk.ctma(states, f=1, anchor="median")
    assert result["param_groups"] == states[0]["param_groups"]
    adam.load_state_dict(result)
    assert result["state"][0]["exp_avg"].shape == (2, 3)


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions.*:UserWarning")
def test_quantized_tensors_are_refused() -> None:
    x = torch.quantize_per_tensor(torch.ones(3, 4), 0.1, 0, torch.qint8)
    with pytest.raises(TypeError, match=r"dtype torch.qint8; expected floats or integers \(pass x.dequantize\(\)\)"):
        rk.median(x)
