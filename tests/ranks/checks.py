"""What ranks of torch.distributed check, each in a process of its own; see `tests/test_distributed.py`."""

from __future__ import annotations

import functools
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel as DDP

import robustkern as rk
import robustkern.distributed as rd
from robustkern.distributed import ranks, shards
from robustkern.files import output
from robustkern.files.formats import is_output
from robustkern.measure.ranks import sent_bytes
from robustkern.training import Mu2Server, Mu2Worker, Settings, Simulation, load_data

Losses = list[float]


def everywhere(value: Any) -> list[Any]:
    """Return every rank's value."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def require_same_bits(x: torch.Tensor) -> None:
    held = everywhere(x.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    assert all(other == held[0] for other in held)


# ---- columns -----------------------------------------------------------------------------------------------------

RULES = (
    "mean", "median", "trimmed_mean", "mean_around_median", "krum", "multi_krum", "mda", "bulyan", "ctma(median)", "ctma(krum)",
    "geometric_median", "ctma(geometric_median)", "nnm | median", "nnm | ctma(trimmed_mean)", "bucketing(size=2) | krum", "caf", "faba",
)  # fmt: skip
CONTINUOUS = (
    "geometric_median",
    "caf",
    "ctma(geometric_median)",
)  # weights that follow from the Gram by more than a choice


def columns(rank: int, size: int) -> None:
    g = np.random.default_rng(0)
    for n, d, dtype in ((9, 203, np.float32), (19, 70_001, np.float32), (19, 501, np.float64), (9, 3, np.float64)):
        for kind in ("plain", "attacked", "copies", "nan"):
            x = 1 + 3e-3 * g.standard_normal((n, d))
            if kind == "attacked":
                x[:2] *= [[-1], [1e6]]
            if kind == "copies":
                x[1] = x[2] = x[3]
            if kind == "nan":
                x[0, d // 2] = np.nan
            x = x.astype(dtype)
            cuts = np.linspace(0, d, size + 1).astype(int)
            if kind == "attacked":
                cuts[1] = 0  # a rank with nothing
            mine = slice(cuts[rank], cuts[rank + 1])
            for rule in RULES:
                options: dict[str, Any] = {"f": 1 if rule == "bulyan" else 2, "seed": 3}
                want, told = rk.aggregate(x, rule, return_info=True, **options)
                got, info = rd.aggregate(x[:, mine], rule, return_info=True, **options)
                if rule in CONTINUOUS:
                    assert (np.abs(got - want[mine]) <= np.spacing(np.abs(want[mine]))).all(), (rule, kind)
                else:
                    assert np.array_equal(got, want[mine], equal_nan=True), (rule, kind, n, d)
                assert (info.d, info.nonfinite_rows, info.order) == (d, told.nonfinite_rows, told.order), (rule, kind)
                for name in ("weights", "sq_distances"):
                    ours, theirs = getattr(info, name), getattr(told, name)
                    assert (ours is None) == (theirs is None)
                    if ours is not None:
                        np.testing.assert_allclose(
                            ours, theirs, rtol=1e-12 if dtype == np.float64 else 1e-5, atol=1e-12
                        )
                assert len(set(map(str, everywhere(info.to_dict())))) == 1, rule


def pieces_of_everything(rank: int, size: int) -> None:
    """Several leaves of several dtypes, weights, a centre, out, scopes, infinities that are shared, a large Gram."""
    g = torch.Generator().manual_seed(0)
    rows = [
        {
            "w": torch.randn(8, 40, generator=g),
            "h": torch.randn(64, generator=g).to(torch.bfloat16),
            "n": torch.tensor([k, 9 - k]),
        }
        for k in range(9)
    ]

    def part(row: Any) -> Any:
        return {
            "w": row["w"][:, rank * 10 : (rank + 1) * 10],
            "h": row["h"][rank * 16 : (rank + 1) * 16],
            "n": row["n"],
        }

    local = [part(row) for row in rows]
    weights = np.arange(9) + 1.0
    for rule in ("median", "trimmed_mean", "ctma(median)", "krum", "mean"):
        options: dict[str, Any] = {"f": 2} if rule == "krum" else {"f": 1, "weights": weights}
        want, got = part(rk.aggregate(rows, rule, **options)), rd.aggregate(local, rule, **options)
        assert all(torch.equal(got[name], want[name]) for name in want), rule
    centre = {"w": torch.ones(8, 40), "h": torch.zeros(64, dtype=torch.bfloat16), "n": torch.tensor([0, 0])}
    for rule in ("centred_clipping(tau=3.0)", "ctma(centre)"):
        want = part(rk.aggregate(rows, rule, f=2, centre=centre))
        out = {name: torch.empty_like(x) for name, x in want.items()}
        rd.aggregate(local, rule, f=2, centre=part(centre), out=out)
        assert all(torch.equal(out[name], want[name]) for name in want), rule
    want, got = part(rk.aggregate(rows, "krum", f=2, scope="leaf")), rd.aggregate(local, "krum", f=2, scope="leaf")
    assert all(torch.equal(got[name], want[name]) for name in want)
    x = np.random.default_rng(1).standard_normal((9, 40)).astype(np.float32)
    x[:, 3] = -np.inf  # with rank 0 alone
    x[1, 20] = np.nan
    for nonfinite in ("error", "drop"):
        want = rk.aggregate(x, "krum", f=2, nonfinite=nonfinite)
        mine = x[:, rank * 10 : (rank + 1) * 10]
        got, info = rd.aggregate(mine, "krum", f=2, nonfinite=nonfinite, return_info=True)
        assert np.array_equal(got, want[rank * 10 : (rank + 1) * 10])
        assert info.shared_inf == 1
    x = np.random.default_rng(1).standard_normal((150, 400))  # a Gram of 180 KB
    got = rd.aggregate(x[:, rank * 100 : (rank + 1) * 100], "nnm | trimmed_mean", f=9)
    assert np.array_equal(got, rk.aggregate(x, "nnm | trimmed_mean", f=9)[rank * 100 : (rank + 1) * 100])


# ---- rows --------------------------------------------------------------------------------------------------------


def row_of(rank: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(rank)
    return {
        "w": torch.randn(3, 5, generator=g) * (1e6 if rank == 1 else 1),
        "h": torch.randn(7, generator=g).to(torch.bfloat16),
        "n": torch.tensor(rank),
        "none": torch.zeros(0),
    }


def hostile_rows(rank: int, size: int) -> None:
    """Of whom a word that all is well may be wrong at first."""
    x = np.random.default_rng(5).standard_normal((size, 11)).astype(np.float32)
    hostile = {"nothing": x, "a row": x.copy(), "a number": x.copy(), "a first number": x.copy(), "shared": x.copy()}
    hostile["a row"][3] = np.nan
    hostile["a number"][1, 7] = np.inf
    hostile["a first number"][1, 0] = np.nan
    hostile["shared"][:3, ::3] = -np.inf  # with every rank, and for its first number
    for kind, values in hostile.items():
        for rule in ("mean", "median", "trimmed_mean", "krum", "ctma(median)"):
            if rule == "mean" and kind == "shared":
                continue  # of which it makes NaN, or an error
            want, told = rk.aggregate(values, rule, f=1, return_info=True)
            got = rd.aggregate_rows(values[rank], rule, f=1)
            assert np.array_equal(got, want, equal_nan=True), (rule, kind)
            got, info = rd.aggregate_rows(values[rank], rule, f=1, return_info=True)
            assert np.array_equal(got, want, equal_nan=True), (rule, kind)
            assert info.shared_inf == told.shared_inf == (4 if kind == "shared" else 0), (rule, kind)


def rows(rank: int, size: int) -> None:
    hostile_rows(rank, size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks.Group, "direct", False)  # as on GPUs, by collectives
        hostile_rows(rank, size)
        mine = slice(rank * 10, (rank + 1) * 10)
        for n in (30, 60):  # a Gram of 7 KB, whose message has two parts; and one of 29 KB, which all add up
            x = np.random.default_rng(1).standard_normal((n, 40))
            assert np.array_equal(rd.aggregate(x[:, mine], "krum", f=9), rk.aggregate(x, "krum", f=9)[mine])
        with pytest.raises(ValueError, match="f is 1 on rank 0, and 0 on rank 3"):
            rd.aggregate_rows(np.ones(5), "median", f=int(rank < 3))
    everyone = [row_of(k) for k in range(size)]
    for rule in ("mean", "median", "krum", "ctma(median)", "geometric_median", "nnm | trimmed_mean"):
        want, told = rk.aggregate(everyone, rule, f=1, return_info=True)
        got, info = rd.aggregate_rows(row_of(rank), rule, f=1, return_info=True)
        for name, x in want.items():
            assert torch.equal(got[name], x) or rule == "geometric_median", (rule, name)
            require_same_bits(got[name])
        assert (info.order, info.d) == (told.order, told.d)
        quick = rd.aggregate_rows(row_of(rank), rule, f=1)  # without Info results go out with the word that all is well
        assert all(torch.equal(quick[name], got[name]) for name in want), rule
    for rule in ("median", "krum", "ctma(median)"):
        sent: list[int] = []

        send = ranks.Group.send

        def counted(group: Any, x: torch.Tensor, *to: int, sent: list[int] = sent, send: Any = send) -> Any:
            sent.append(x.nbytes)
            return send(group, x, *to)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ranks.Group, "send", counted)
            rd.aggregate_rows(np.ones(10_001) * rank**2, rule, f=0)
        spread = (size - 1) * 2501 * 8
        if rank == 0:
            assert sum(sent) + spread == sent_bytes(rule, size, 10_001, 8), rule
        else:
            assert sum(sent) + spread <= sent_bytes(rule, size, 10_001, 8), rule
    weights = [1.0, 2.0, 3.0, 1.0]
    want = rk.aggregate(everyone, "median", delta=0.3, weights=weights)
    got = rd.aggregate_rows(row_of(rank), "median", delta=0.3, weights=weights)
    assert torch.equal(got["w"], want["w"])
    centre = row_of(9)
    want = rk.aggregate(everyone, "ctma(centre)", f=1, centre=centre)
    got = rd.aggregate_rows(row_of(rank), "ctma(centre)", f=1, centre=centre)
    assert torch.equal(got["w"], want["w"])
    seeds = everywhere(rd.aggregate_rows(np.ones(5) * rank, "bucketing(size=2) | mean", f=1, return_info=True)[1].seed)
    assert len(set(seeds)) == 1  # drawn once
    for dtype in ("float16", "float64", "bfloat16"):
        kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
        stacked = np.random.default_rng(0).standard_normal((size, 11)).astype(kind)
        got = rd.aggregate_rows(stacked[rank], "median")
        assert got.dtype == kind
        assert got.tobytes() == rk.median(stacked).tobytes()
    zero = np.asarray(np.float64(rank), dtype=ml_dtypes.bfloat16)
    got = rd.aggregate_rows({"x": zero}, "median")["x"]
    assert (got.shape, got.dtype) == ((), zero.dtype)
    frozen, trained = torch.ones(2), torch.ones(2, requires_grad=True)
    trained.grad = torch.full((2,), float(rank))
    rd.aggregate_gradients([frozen, trained], "median", f=1)
    assert frozen.grad is None
    assert trained.grad.tolist() == [1.5, 1.5]
    alone = torch.nn.Parameter(torch.zeros(2))
    alone.grad = torch.full((2,), float(rank))
    rd.aggregate_gradients(alone, "median", f=1)
    assert alone.grad.tolist() == [1.5, 1.5]
    counted = [{"x": np.ones(2) * k, **({"n": np.array([k])} if rank == 0 else {})} for k in range(5)]
    assert rd.aggregate(counted, "median", return_info=True)[1].integers == 1  # on every rank
    pair = dist.new_group([1, 3])  # whose ranks have other numbers than among all
    if rank % 2:
        assert rd.aggregate_rows(np.array([float(rank), 5.0, rank]), "mean", group=pair).tolist() == [2.0, 5.0, 2.0]
    else:
        with pytest.raises(RuntimeError, match="this process is no member of the group"):
            rd.aggregate_rows(np.ones(1), "mean", group=pair)
    # A message of one's own that is expected meanwhile is not mixed up with ours.
    letter = torch.zeros(1)
    expected = dist.irecv(letter, (rank - 1) % size)
    assert rd.aggregate_rows(np.full(4, float(rank)), "mean").tolist() == [1.5] * 4
    sent = dist.isend(torch.full((1,), 7.0 + rank), (rank + 1) % size)
    expected.wait()
    sent.wait()
    assert letter.tolist() == [7.0 + (rank - 1) % size]


class Key:
    """One of a dict's, which all are shown alike."""

    def __repr__(self) -> str:
        return "key"


def kinds_of_leaves(rank: int, size: int) -> None:
    """Keys that are shown alike, dtypes of eight bits, values that torch has yet to negate."""
    keys = [Key() for _ in range(3)]

    def row(r: int) -> dict[Any, Any]:
        values = [torch.full((2,), 1.0 + r), torch.full((3,), 100.0 + r), torch.tensor([1000 + r])]
        return dict(zip(keys, values, strict=True))

    got = rd.aggregate_rows(row(rank), "median", f=1)
    assert [got[key].tolist() for key in keys] == [[2.5] * 2, [101.5] * 3, [1001]]
    got = rd.aggregate_rows(row(rank), "ctma(centre)", f=1, centre=row(0))
    want = rk.aggregate([row(r) for r in range(size)], "ctma(centre)", f=1, centre=row(0))
    assert [got[key].tolist() for key in keys] == [want[key].tolist() for key in keys]
    x = np.random.default_rng(0).standard_normal((size, 11)).astype(np.float32)
    x[2, 0] = np.nan
    for name in ("float8_e4m3fn", "float8_e5m2"):
        stacked = x.astype(getattr(ml_dtypes, name))
        tensors = torch.from_numpy(stacked.view(np.uint8)).view(getattr(torch, name))
        for direct in (True, False):  # as on GPUs, by collectives
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(ranks.Group, "direct", direct)
                for rule in ("mean", "median", "krum"):
                    want = rk.aggregate(stacked, rule, f=1)
                    rows = {"of NumPy": stacked[rank], "of torch": tensors[rank]}
                    for options in ({}, {"return_info": True}):
                        got = rd.aggregate_rows(rows, rule, f=1, **options)
                        got = got[0] if options else got
                        assert got["of NumPy"].dtype == stacked.dtype
                        assert got["of NumPy"].tobytes() == want.tobytes()
                        assert got["of torch"].dtype == tensors.dtype
                        assert got["of torch"].view(torch.uint8).numpy().tobytes() == want.tobytes()
    negated = torch.complex(torch.zeros(3), torch.full((3,), float(rank))).conj().imag
    assert negated.is_neg()
    assert rd.aggregate_rows(negated, "median", f=1).tolist() == [-1.5] * 3


def left_alone(rank: int, size: int) -> None:
    """A default device, and torch's compiler, change nothing."""
    with torch.device("meta"):
        assert rd.aggregate_rows(np.full(3, float(rank)), "median", f=1).tolist() == [1.5] * 3
        assert rd.aggregate(np.arange(5.0)[:, None] ** 2, "ctma(median)", f=1).tolist() == [3.5]
        x, mine = np.random.default_rng(1).standard_normal((30, 40)), slice(rank * 10, (rank + 1) * 10)
        got = rd.aggregate(x[:, mine], "krum", f=9)  # a long message
        assert np.array_equal(got, rk.aggregate(x, "krum", f=9)[mine])
        rd.DDPState("median", f=1, weights=np.ones(size))
    parameter = torch.nn.Parameter(torch.zeros(2))

    def step(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x * 2
        parameter.grad = y[:2]
        rd.aggregate_gradients([parameter], "median", f=1)
        return rd.aggregate_rows(y, "median", f=1) + 1, rd.aggregate([y, y + 1, y + 5], "median") + 1

    if rank == 1:  # which loads as much as Python's own start
        step = torch.compile(step, backend="eager")
    for _ in range(2):
        whole, columns = step(torch.full((4,), float(rank)))
        assert whole.tolist() == [4.0] * 4
        assert columns.tolist() == [2.0 * rank + 2] * 4
        assert parameter.grad is not None
        assert parameter.grad.tolist() == [3.0] * 2


def _is_used(where: str, rule: str) -> bool:
    """Tell whether an aggregation of numbers by this rule gets there."""

    def come(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"robustkern.{where}", come)
        try:
            rk.aggregate(np.arange(20.0).reshape(4, 5) ** 2, rule, f=1)
        except KeyboardInterrupt:
            return True
    return False


class OwnRule(rk.Aggregator):
    """Catches what it should not, or returns what does not pickle."""

    name = "own"

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def solve(self, view: Any) -> Any:
        rows = [0]
        if self.kind == "fin":
            try:
                geometry = view.geometry()
            finally:
                rows = [int(geometry.gram.diagonal().argmax())]  # UnboundLocalError where it was not measured
        elif self.kind == "swallow":
            for _ in range(3):
                try:
                    rows = [int(view.geometry().gram.diagonal().argmax())]
                except:  # noqa: E722
                    rows = [1]
        elif self.kind == "fallback":
            try:
                view.geometry()
            except MemoryError:
                view.geometry()
        solution = view.mean_of(rows)
        return solution._replace(scores=np.array([lambda: 0] * view.n)) if self.kind == "unpicklable" else solution


class Liar(rk.rules.coordinate.Median):
    """Inherits that it looks at no row."""

    def solve(self, view: Any) -> Any:
        view.geometry()
        return super().solve(view)


def own_rules(rank: int) -> list[tuple[type[Exception], str, Callable[[], Any]]]:
    """Rules that would have left the ranks out of step."""
    x = np.ones(5)

    def failing(who: int, error: Exception, rule: rk.Aggregator) -> Any:
        def fail(*_: Any, **__: Any) -> None:
            raise error

        with pytest.MonkeyPatch.context() as patch:
            if rank == who:
                patch.setattr("robustkern.backends.cpp.Cpp.gram", fail)
            return rd.aggregate_rows(x * rank, rule, f=1)

    if rank == 1:  # a class that the others do not know
        known_here = type("KnownHere", (Exception,), {"__module__": __name__})
        globals()["KnownHere"] = known_here
        error: Exception = known_here("from rank 1")
    else:
        error = ValueError("of nobody")
    return [
        (MemoryError, "none is left", functools.partial(failing, who, MemoryError("none is left"), rule))
        for who in (0, 2)
        for rule in (OwnRule("fallback"), Liar())
    ] + [
        (TypeError, r"what rank 0 found cannot go to the other ranks: .*lambda.* \(return arrays and numbers only\)", lambda: rd.aggregate_rows(x, OwnRule("unpicklable"), f=1)),
        (Exception, "from rank 1", lambda: failing(1, error, OwnRule("fin"))),
    ]  # fmt: skip


def errors(rank: int, size: int) -> None:
    """An error of one is an error of all, and the next call works."""
    x = np.ones(5)

    class Local(Exception):
        """Does not pickle."""

    class Failing(rk.Aggregator):
        name = "failing"

        def __init__(self, error: Exception) -> None:
            self.error = error

        def solve(self, view: Any) -> Any:
            raise self.error

    def out_of_memory(*_: Any, **__: Any) -> None:
        raise MemoryError("none is left")

    def patched(where: str, work: Callable[[], Any], who: int = 1) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            if rank == who:
                patch.setattr(f"robustkern.{where}", out_of_memory)
            return work()

    alike = (
        "the rows of ranks 2 and 0 are not alike: leaf the update of (6,) torch.float64 against leaf the update of (5,)"
    )
    tree = {"a": np.ones((5, 2)), "b": np.ones((5, 3))}
    trees = [{name: v[i] for name, v in tree.items()} for i in range(5)]
    shorter = [{"a": row["a"]} for row in trees]
    renamed = [{"a": row["a"], "c": row["b"]} for row in trees]
    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (ValueError, re.escape(alike), lambda: rd.aggregate_rows(x if rank != 2 else np.ones(6), "median", f=1)),
        (ValueError, r"leaf \['b'\] of .* against leaf \['a'\] of", lambda: rd.aggregate_rows({"a" if rank < 3 else "b": x}, "median", f=1)),
        (ValueError, "f is 1 on rank 0, and 0 on rank 3", lambda: rd.aggregate_rows(x, "median", f=int(rank < 3))),
        (ValueError, "return_info is True on rank 0, and False on rank 1", lambda: rd.aggregate_rows(x, "krum", f=1, return_info=rank == 0)),
        (ValueError, "return_info is True on rank 0, and False on rank 1", lambda: rd.aggregate(np.ones((5, 2)), "krum", f=1, return_info=rank == 0)),
        (ValueError, "rule is median on rank 0, and mean on rank 1", lambda: rd.aggregate(np.ones((5, 2)), "mean" if rank == 1 else "median", f=1)),
        (ValueError, "weights is \\[1.0, 1.0, 1.0, 2.0\\] on rank 0", lambda: rd.aggregate_rows(x, "mean", weights=[1, 1, 1, 2 + (rank == 3)])),
        (ValueError, "'means' is not known", lambda: rd.aggregate_rows(x, "means" if rank == 1 else "mean")),
        (ValueError, "'means' is not known", lambda: rd.aggregate(np.ones((5, 2)), "means" if rank == 1 else "mean")),
        (ValueError, "the number of rows is 5 on rank 0, and 6 on rank 1", lambda: rd.aggregate(np.ones((5 + (rank == 1), 2)), "median", f=1)),
        (ValueError, "only is a on rank 0, and b on rank 3", lambda: rd.aggregate(trees, "median", only="b" if rank == 3 else "a")),
        (ValueError, "dtype is None on rank 0, and float32 on rank 3", lambda: rd.aggregate(trees, "median", dtype="float32" if rank == 3 else None)),
        (ValueError, "rank 0 is at the end, rank 1 at a call|rank 0 is at a call, rank 1 at the end", lambda: rd.aggregate(shorter if rank == 0 else trees, "median", scope="leaf")),
        (ValueError, "leaf is .*b.* on rank 0, and .*c.* on rank 2", lambda: rd.aggregate(renamed if rank == 2 else trees, "median", scope="leaf")),
        (ValueError, "rank 0 is at a row, rank 2 at a call", lambda: rd.aggregate(np.ones((5, 2)), "median") if rank == 2 else rd.aggregate_rows(x, "median")),
        (TypeError, "leaf the update is str; expected a NumPy array", lambda: rd.aggregate_rows(x if rank != 3 else "text", "median", f=1)),
        (TypeError, r"leaf the update is complex \(pass its real and its imaginary part as two leaves\)", lambda: rd.aggregate_rows(x if rank else x * 1j, "median", f=1)),
        (TypeError, r"is a torch tensor of layout torch.sparse_coo; expected a dense one \(pass x.to_dense\(\)\)", lambda: rd.aggregate_rows(torch.ones(5).to_sparse() if rank == 1 else torch.ones(5), "median", f=1)),
        (rk.NonFiniteError, r"krum: 2 rows hold NaN or Inf \(rows 2, 3\)", lambda: rd.aggregate_rows(x * (np.nan if rank > 1 else 1), "krum", f=1)),
        (rk.NonFiniteError, r"median: 3 rows hold NaN or Inf \(rows 0, 1, 2\)", lambda: rd.aggregate(np.array([[np.nan if rank == 2 and i < 3 else 1.0] for i in range(5)]), "median", f=2)),
        (ValueError, "2\\*f must be below n", lambda: rd.aggregate_rows(x, "median", f=2)),
        (ValueError, r"the centre is not like the row: leaf \[0\] of .* against leaf the update", lambda: rd.aggregate_rows(x, "ctma(centre)", f=1, centre=[x, x] if rank == 1 else x)),
        (ValueError, "the centre is not like the row", lambda: rd.aggregate_rows([np.ones(3), np.ones(2)], "ctma(centre)", f=1, centre=[np.ones(2), np.ones(3)])),
        (ValueError, "centre is required", lambda: rd.aggregate_rows(x, "ctma(centre)", f=1)),
        (ValueError, "centre holds NaN or Inf", lambda: rd.aggregate_rows(x, "ctma(centre)", f=1, centre=x * np.nan)),
        (ValueError, "failing here", lambda: rd.aggregate_rows(x, Failing(ValueError("failing here", np.ones(3))))),
        (RuntimeError, "Local: failing there", lambda: rd.aggregate_rows(x, Failing(Local("failing there")))),
        (MemoryError, "none is left", lambda: patched("distributed.ranks.padded", lambda: rd.aggregate_rows(x, "median"))),
        (MemoryError, "none is left", lambda: patched("distributed.ranks._like", lambda: rd.aggregate_rows(x, "median"))),
        (MemoryError, "none is left", lambda: patched("distributed.ranks.aggregated", lambda: rd.aggregate(np.ones((5, 2)), "krum", f=1))),
    ]  # fmt: skip
    cases += [
        (MemoryError, "none is left", functools.partial(patched, where, functools.partial(rd.aggregate_rows, x + rank, rule, f=1), who))
        for who in (0, 2)
        for rule in ("mean", "median", "krum", "ctma(median)")
        for where in (
            "engine.choose", "engine.View", "rules.coordinate.Median.solve", "rules.krum.Krum.solve", "rules.mean.Mean.solve",
            "backends.cpp.Cpp.gram", "backends.cpp.Cpp.select_columns", "backends.cpp.Cpp.weighted_row_sum",
        )
        if _is_used(where, rule)
        and (who == 0 or not where.endswith("solve") or rule in ("mean", "median"))  # else rank 0 alone solves
    ]  # fmt: skip
    mine = {"w": x}
    mesh = init_device_mesh("cpu", (size,))
    linear = torch.nn.Linear(2, 2)
    refused: dict[str, tuple[type[Exception], Any]] = {
        r"leaf \['w'\] is a masked array, whose mask would be lost": (TypeError, np.ma.masked_array(x, mask=x > 0)),
        r"leaf \['w'\] has dtype object; expected .* \(convert it, x.astype": (TypeError, np.array([1.0, None])),
        r"leaf \['w'\] has dtype >f8; expected .* \(swap its bytes": (TypeError, np.ones(3, ">f8")),
        r"leaf \['w'\] has dtype float128; expected .* \(convert it": (TypeError, np.ones(3, np.longdouble)),
        r"leaf \['w'\] is a torch tensor on device meta; expected cpu or cuda": (ValueError, torch.ones(3, device="meta")),
        r"leaf \['w'\] is a DTensor; expected .*x.full_tensor\(\).* has robust_fsdp": (TypeError, distribute_tensor(torch.ones(8), mesh, [Shard(0)])),
        r"leaf \['w'\] is a torch tensor that NumPy cannot view": (TypeError, torch.ones(3).to(torch.float8_e4m3fnuz)),
    }  # fmt: skip
    cases += [
        (kind, message, functools.partial(lambda bad: rd.aggregate_rows({"w": bad} if rank == 1 else mine, "median"), bad))
        for message, (kind, bad) in refused.items()
    ]  # fmt: skip
    cases += [
        (TypeError, r"aggregate_gradients: parameters is Linear; expected tensors \(pass model.parameters\(\)\)", lambda: rd.aggregate_gradients(linear if rank == 1 else linear.parameters(), "median")),
        (TypeError, r"parameter 0 is tuple; expected a tensor \(pass model.parameters\(\)\)", lambda: rd.aggregate_gradients(linear.named_parameters() if rank == 1 else linear.parameters(), "median")),
    ]  # fmt: skip
    cases += own_rules(rank)
    for kind, message, work in cases:
        with pytest.raises(kind, match=message):
            work()
        assert rd.aggregate_rows(x * rank, "median", f=1).tolist() == [1.5] * 5
    for rule in ("fin", "swallow"):  # whatever a rule catches, it works as in one process
        got = rd.aggregate_rows(x * rank**2, OwnRule(rule), f=1)
        assert np.array_equal(got, rk.aggregate(np.outer(np.arange(4.0) ** 2, x), OwnRule(rule), f=1)), rule

    def late(*given: Any) -> None:
        end(*given)
        raise MemoryError("when all others are done")

    end = ranks.Collecting.end
    for options in ({}, {"return_info": True}):
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr(ranks.Collecting, "end", late)
                with pytest.raises(MemoryError, match="when all others are done"):
                    rd.aggregate_rows(x, "median", f=1, **options)
            else:
                rd.aggregate_rows(x, "median", f=1, **options)
        assert rd.aggregate_rows(x * rank, "median", f=1).tolist() == [1.5] * 5
    counts = [{"x": np.ones((5, 2)) * k, "n": np.array([k, 9])} for k in range(5)]
    assert rd.aggregate(counts, "median", scope="leaf", return_info=True)[1].integers == size  # one of each rank
    assert rd.aggregate_rows({"n": np.array([rank, 7])}, "median")["n"].tolist() == [1, 7]


# ---- models ------------------------------------------------------------------------------------------------------


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = (
        torch.nn.Linear(301, 200),
        torch.nn.Tanh(),
        torch.nn.Linear(200, 100),
        torch.nn.Tanh(),
        torch.nn.Linear(100, 7),
    )
    return torch.nn.Sequential(*layers)


def loss_of(m: Any, rank: int, step: int, liar: int) -> torch.Tensor:
    torch.manual_seed(100 * rank + step)
    loss: torch.Tensor = ((m(torch.randn(16, 301)) - torch.randn(16, 7)) ** 2).mean()
    return -1000 * loss if rank == liar else loss


def gradients(m: torch.nn.Module) -> torch.Tensor:
    parts = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in m.parameters()]
    return torch.cat([part.reshape(-1) for part in parts])


def rows_of(rank: int, size: int, step: int, autocast: Any = None) -> torch.Tensor:
    """Return the gradients of all ranks, each of whom computes them all."""
    found = []
    for other in range(size):
        m = model()
        loss_of(m, other, step, size - 1).backward()
        found.append(gradients(m))
    return torch.stack(found)


def data_parallel(rank: int, size: int) -> None:
    for rule, per_bucket, wrap in (
        ("median", False, False), ("median", True, False), ("krum", False, False), ("ctma(geometric_median)", False, True),
        ("nnm | trimmed_mean", False, False), ("centred_clipping(tau=0.1)", False, False),
    ):  # fmt: skip
        m = DDP(model(), bucket_cap_mb=0.05, gradient_as_bucket_view=True)
        state = rd.DDPState(rule, f=1, per_bucket=per_bucket, return_info=True)
        m.register_comm_hook(state, fp16_compress_wrapper(rd.ddp_hook) if wrap else rd.ddp_hook)
        last: torch.Tensor | None = None
        for step in range(3):
            m.zero_grad()
            loss_of(m, rank, step, size - 1).backward()
            x = rows_of(rank, size, step)
            if wrap:
                x = x.half()
            options = {}
            if "centred" in rule:
                options["centre"] = torch.zeros_like(x[0]) if last is None else last
            last = rk.aggregate(x, rule, f=1, **options)
            got = gradients(m)
            torch.testing.assert_close(got, last.float(), rtol=1e-6 if not wrap else 1e-3, atol=0 if not wrap else 1e-6)
            require_same_bits(got)
        assert state.info is not None
    m = DDP(model())
    m.register_comm_hook(rd.DDPState("median", f=1), rd.ddp_hook)
    with m.no_sync():
        loss_of(m, rank, 0, size - 1).backward()
    loss_of(m, rank, 1, size - 1).backward()
    both = rows_of(rank, size, 0) + rows_of(rank, size, 1)
    torch.testing.assert_close(gradients(m), rk.median(both), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="rule is median on rank 0, and mean on rank 1"):
        rd.DDPState("mean" if rank == 1 else "median")
    with pytest.raises(ValueError, match="'means' is not known"):
        rd.DDPState("means" if rank == 1 else "median")
    for per_bucket in (
        False,
        True,
    ):  # an error of the rule comes when the backward pass has ended, and the next step works
        m = DDP(model(), bucket_cap_mb=0.05)
        m.register_comm_hook(rd.DDPState("krum", f=1, per_bucket=per_bucket), rd.ddp_hook)
        for step in range(4):
            m.zero_grad()
            loss = loss_of(m, rank, step, size - 1)
            if step == 1:
                with pytest.raises(rk.NonFiniteError, match="2 rows hold NaN or Inf"):
                    (loss * (torch.nan if rank > 1 else 1)).backward()
                assert gradients(m).isnan().any()
                continue
            loss.backward()
            if not per_bucket:
                torch.testing.assert_close(
                    gradients(m), rk.aggregate(rows_of(rank, size, step), "krum", f=1), rtol=1e-6, atol=0
                )
            require_same_bits(gradients(m))
    with pytest.raises(ValueError, match=r"DDPState: ctma\(centre\) measures from a centre, which buckets lack"):
        rd.DDPState("ctma(centre)", f=1, per_bucket=True)
    with pytest.raises(ValueError, match=r"median: 2\*f must be below n"):
        rd.DDPState("median", f=2)
    with pytest.raises(TypeError, match=r"the state is dict; expected a DDPState \(pass it to register_comm_hook"):
        rd.ddp_hook({}, None)  # type: ignore[arg-type]
    static_graphs(rank, size)


class Mixed(torch.nn.Module):
    """Parameters of three dtypes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        kinds = (torch.float32, torch.bfloat16, torch.float64)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(6, 6).to(kind) for kind in kinds)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x.to(layer.weight.dtype))
        return x


def static_graphs(rank: int, size: int) -> None:
    """Of the first pass over a static graph torch calls all buckets 0, one for each dtype, and none of them the last."""

    def gradients_of(m: torch.nn.Module, who: int, step: int) -> dict[str, Any]:
        torch.manual_seed(10 * who + step)
        m(torch.randn(2, 6)).sum().backward()
        return {name.removeprefix("module."): p.grad for name, p in m.named_parameters()}

    for rule, per_bucket in (("median", False), ("krum", False), ("krum", True), ("ctma(centre)", False)):
        m = DDP(Mixed(), static_graph=True)
        m.register_comm_hook(rd.DDPState(rule, f=1, per_bucket=per_bucket), rd.ddp_hook)
        for step in range(3):
            m.zero_grad()
            if rule == "ctma(centre)":
                if step == 0:
                    with pytest.raises(ValueError, match=r"which the buckets lack .* \(drop static_graph=True"):
                        gradients_of(m, rank, step)
                else:
                    gradients_of(m, rank, step)
                    require_same_bits(torch.cat([p.grad.double().reshape(-1) for p in m.parameters()]))
                continue
            got = gradients_of(m, rank, step)
            everyone = [gradients_of(Mixed(), other, step) for other in range(size)]
            by_bucket = step == 0 or per_bucket
            for layer in range(3):
                names = [name for name in got if not by_bucket or name.startswith(f"layers.{layer}.")]
                want = rk.aggregate([{name: row[name] for name in names} for row in everyone], rule, f=1)
                assert all(torch.equal(got[name], want[name]) for name in names), (rule, per_bucket, step)


def sharded_model(mesh: Any, **options: Any) -> Any:
    m = model()
    for layer in m:
        if isinstance(layer, torch.nn.Linear):
            fully_shard(layer, mesh=mesh, **options)
    return fully_shard(m, mesh=mesh, **options)


def fully_sharded(rank: int, size: int) -> None:
    mesh = init_device_mesh("cpu", (size,))
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in model() if isinstance(layer, torch.nn.Linear)]
    for rule, whole in (
        ("median", False),
        ("ctma(geometric_median)", False),
        ("krum", True),
        ("ctma(geometric_median)", True),
    ):
        m = sharded_model(mesh)
        combining = rd.robust_fsdp(m, rule, f=1, whole=whole, return_info=True)
        for step in range(2):
            m.zero_grad()
            loss_of(m, rank, step, size - 1).backward()
            if whole:
                assert combining.finish() is combining.info
            x = rows_of(rank, size, step)
            parts = [x] if whole else [part.contiguous() for part in x.split(sizes, dim=1)]
            want = torch.cat([rk.aggregate(part, rule, f=1) for part in parts])
            torch.testing.assert_close(gradients(m), want, rtol=1e-6, atol=1e-12)
    m2 = sharded_model(mesh)
    rd.robust_fsdp(m2, "krum", f=1)
    for step in range(4):
        m2.zero_grad()
        loss = loss_of(m2, rank, step, size - 1)
        if step in (1, 2):
            with pytest.raises(rk.NonFiniteError, match="2 rows hold NaN or Inf"):
                (loss * (torch.nan if rank > 1 else 1)).backward()
            continue
        loss.backward()
        x = rows_of(rank, size, step)
        want = torch.cat([rk.aggregate(part.contiguous(), "krum", f=1) for part in x.split(sizes, dim=1)])
        torch.testing.assert_close(gradients(m2), want, rtol=1e-6, atol=1e-12)
    with pytest.raises(ValueError, match="f is 1 on rank 0, and 0 on rank 1"):
        rd.robust_fsdp(m2, "krum", f=int(rank != 1))
    with pytest.raises(RuntimeError, match="there is no gradient to combine"):
        combining.finish()
    loss_of(m, rank, 0, size - 1).backward()  # without zero_grad: added to the last one
    with pytest.raises(RuntimeError, match="gradients were converted, added to others, or moved"):
        combining.finish()
    m = sharded_model(mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    combining = rd.robust_fsdp(m, "krum", f=1, whole=True, return_info=True)
    loss_of(m, rank, 0, size - 1).backward()
    combining.finish()
    x = rows_of(rank, size, 0)
    chosen = combining.info.order[0]
    assert chosen != size - 1
    assert torch.nn.functional.cosine_similarity(gradients(m), x[chosen], dim=0) > 0.99
    with pytest.raises(TypeError, match="no module of the model is sharded"):
        rd.robust_fsdp(model(), "median")
    with pytest.raises(ValueError, match="measures from a centre, which shards have not"):
        rd.robust_fsdp(m, "ctma(centre)", f=1)


def replicas(rank: int, size: int) -> None:
    """Two ranks hold one replica of the model; here two replicas, of which each is a row."""
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
    m = sharded_model(mesh["shard"])
    rd.robust_fsdp(m, "trimmed_mean", f=0, replicas=mesh.get_group("replicate"))
    loss_of(m, rank, 0, -1).backward()
    found = []
    for other in range(size):
        alone = model()
        loss_of(alone, other, 0, -1).backward()
        found.append(gradients(alone))
    x = torch.stack(found).reshape(2, size // 2, -1).mean(dim=1)
    torch.testing.assert_close(gradients(m), rk.mean(x), rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match="sharded over a mesh of several dimensions"):
        rd.robust_fsdp(sharded_model(mesh), "median")
    with pytest.raises(ValueError, match="over replicas each module is judged by itself"):
        rd.robust_fsdp(m, "median", f=0, whole=True, replicas=mesh.get_group("replicate"))


# ---- training ----------------------------------------------------------------------------------------------------

ROUNDS = 100
LIES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "scaled": lambda g: -1e4 * g,
    "flipped": lambda g: -3 * g,
    "NaN": lambda g: torch.where(torch.arange(g.numel()).reshape(g.shape) == 0, torch.nan, g),
    "bit flips": lambda g: (g.contiguous().view(torch.int32) ^ (1 << 30)).view(torch.float32),
}


class Lying(torch.autograd.Function):
    """What a liar's gradient of one tensor becomes."""

    lie: Callable[[torch.Tensor], torch.Tensor] = staticmethod(lambda g: g)

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return Lying.lie(gradient)


def learning(rank: int, size: int) -> dict[str, float]:
    """Of four ranks one lies: the model learns with the hook, and does not without; returns accuracies."""
    data = load_data("digits")
    images = torch.from_numpy(data.images).reshape(len(data.labels), -1)
    labels, test = torch.from_numpy(data.labels), torch.from_numpy(data.test_images).reshape(len(data.test_labels), -1)
    found = {}
    for name, lie in LIES.items():
        for hooked in (True, False):
            torch.manual_seed(0)
            m = DDP(torch.nn.Linear(images.shape[1], data.classes))
            if hooked:
                m.register_comm_hook(rd.DDPState("ctma(median)", f=1), rd.ddp_hook)
            if rank == size - 1:
                for p in list(m.parameters())[: 1 if name == "bit flips" else 2]:
                    p.register_hook(lie)
            optimizer = torch.optim.SGD(m.parameters(), lr=0.5)
            g = torch.Generator().manual_seed(rank)
            for _ in range(60):
                picks = torch.randint(len(labels), (32,), generator=g)
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(m(images[picks]), labels[picks]).backward()
                optimizer.step()
            right = (m.module(test).argmax(dim=1).numpy() == data.test_labels).mean()
            found[f"{name}, {'hook' if hooked else 'mean'}"] = float(right)
    return found


def curves(rank: int, size: int) -> dict[str, list[Losses]]:
    """Train by the hook, and by mu^2-SGD with aggregate_gradients; return the loss of each round, and the simulation's."""
    data = load_data("digits")
    found = {}
    for optimizer in ("sgd", "mu2sgd"):
        settings = Settings(
            data="digits", model="softmax", workers=size, byzantine=1, attack="sign_flip", rule="ctma(median)",
            optimizer=optimizer, lr=0.1, batch=8, clip=0.0, rounds=ROUNDS, seed=1,
        )  # fmt: skip
        simulation = Simulation(settings, data)
        theirs: Losses = []
        for _ in range(ROUNDS):
            simulation.round()
            theirs.append(simulation.evaluate()[1])
        found[optimizer] = [list(trained(simulation, settings, data, rank)), theirs]
    return found


def trained(simulation: Simulation, settings: Settings, data: Any, rank: int) -> Iterable[float]:
    task = simulation.task
    m = DDP(task._module)
    if settings.optimizer == "sgd":
        m.register_comm_hook(rd.DDPState(settings.rule, f=1), rd.ddp_hook)
        server: torch.optim.Optimizer = torch.optim.SGD(m.parameters(), lr=settings.lr)
    else:
        worker, server = Mu2Worker(m.parameters()), Mu2Server(m.parameters(), lr=settings.lr)
    images, labels = torch.from_numpy(data.images), torch.from_numpy(data.labels)
    sign = -1.0 if rank == settings.workers - 1 else 1.0
    for t in range(1, ROUNDS + 1):
        picks = torch.from_numpy(task.samples(t)[rank])

        def closure(picks: torch.Tensor = picks) -> torch.Tensor:
            m.zero_grad()
            loss: torch.Tensor = sign * torch.nn.functional.cross_entropy(m(images[picks]), labels[picks])
            loss.backward()
            return loss

        if settings.optimizer == "sgd":
            closure()
        else:
            with m.no_sync():
                worker.step(closure)
            rd.aggregate_gradients(m.parameters(), settings.rule, f=1)
        server.step()
        yield task.evaluate(task.start())[1]


# ---- checkpoints -------------------------------------------------------------------------------------------------


def states() -> list[dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    shapes = {"wide": (301, 7), "deep": (5, 3, 4), "b": (2,), "scalar": (), "half": (9, 11)}
    made = [{name: torch.randn(shape, generator=g) for name, shape in shapes.items()} for _ in range(6)]
    for k, state in enumerate(made):
        state["half"] = state["half"].to(torch.bfloat16)
        state["count"] = torch.tensor([k, 2 * k, 3])
    made[2]["wide"] *= 1e6
    made[4]["scalar"].fill_(torch.nan)
    return made


def checkpoints(rank: int, size: int) -> None:
    """Checkpoints that four ranks wrote or one, read by four ranks or one."""
    folder = Path(os.environ["RANKS_FOLDER"])
    mesh = init_device_mesh("cpu", (size,))
    for k, state in enumerate(states()):
        if k % 2:
            if rank == 0:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    dcp.save(state, checkpoint_id=folder / f"c{k}", no_dist=True)
        else:
            sharded = {name: distribute_tensor(x, mesh, [Shard(0)]) if x.ndim else x for name, x in state.items()}
            dcp.save(sharded, checkpoint_id=folder / f"c{k}")
    dist.barrier()
    folders = [folder / f"c{k}" for k in range(6)]
    alone = dist.new_group([0])
    for turn, (rule, memory) in enumerate(
        (("median", 1), ("krum", 1 << 30), ("ctma(median)", 1 << 12), ("mean", 5000))
    ):
        options: dict[str, Any] = {"f": 2} if rule != "mean" else {"exclude": "scalar"}
        rows = [{name: x for name, x in state.items() if rule != "mean" or name != "scalar"} for state in states()]
        want, told = rk.aggregate(rows, rule, f=options.get("f"), return_info=True)
        out = folder / f"out{turn}"
        info = rd.aggregate_checkpoints(folders, rule, out=out, memory=memory, **options)
        assert (info.d, info.order, info.nonfinite_rows) == (told.d, told.order, told.nonfinite_rows)
        if rank == 0:
            rd.aggregate_checkpoints(folders, rule, out=folder / f"alone{turn}", group=alone, **options)
        dist.barrier()
        for place in (out, folder / f"alone{turn}"):
            found = {name: torch.empty_like(x) for name, x in want.items()}
            dcp.load(found, checkpoint_id=place, no_dist=True)
            for name, x in want.items():
                assert torch.equal(found[name], x), (rule, name, place)
    with pytest.raises(FileExistsError, match="out0: is there already"):
        rd.aggregate_checkpoints(folders, "median", out=folder / "out0")
    with pytest.raises(ValueError, match="is no checkpoint of torch"):
        rd.aggregate_checkpoints(folders if rank != 2 else [folder], "median", out=folder / "never")
    assert not (folder / "never").exists()
    with pytest.raises(
        ValueError,
        match=r"different checkpoints, or in another order: path 0 is '.*c0' on rank 0, and '.*c5' on rank 3 \(pass .* sorted",
    ):
        rd.aggregate_checkpoints(folders if rank != 3 else folders[::-1], "krum", f=1, out=folder / "never")
    with pytest.raises(ValueError, match=r"path 5 is '.*c5' on rank 0, and none on rank 1"):
        rd.aggregate_checkpoints(folders if rank != 1 else folders[:5], "krum", f=1, out=folder / "never")
    with pytest.raises(TypeError, match=r"out is NoneType; expected a path"):
        rd.aggregate_checkpoints(folders, "median", out=None if rank == 1 else folder / "never")  # type: ignore[arg-type]
    with torch.device("meta"):
        rd.aggregate_checkpoints(folders, "krum", f=2, out=folder / "beside")
    found = {name: torch.empty_like(x) for name, x in states()[0].items()}
    dcp.load(found, checkpoint_id=folder / "beside", no_dist=True)
    assert all(torch.equal(found[name], x) for name, x in rk.aggregate(states(), "krum", f=2).items())
    if rank == 0:  # what only the last rank finds out
        (folder / "c2" / "__3_0.distcp").write_bytes(b"no longer")
    dist.barrier()
    paths = [*folders, folder / "none"]
    rows = [*states(), states()[0]]
    for k in (2, 6):
        rows[k] = {name: torch.full_like(x, torch.nan) if x.is_floating_point() else x for name, x in rows[0].items()}
    want, told = rk.aggregate(rows, "median", f=3, return_info=True)
    info = rd.aggregate_checkpoints(paths, "median", f=3, out=folder / "counted", bad="count")
    assert (list(info.bad), info.nonfinite_rows) == ([str(paths[2]), str(paths[6])], told.nonfinite_rows)
    assert len(set(everywhere(str(info.bad)))) == 1
    found = {name: torch.empty_like(x) for name, x in want.items()}
    dcp.load(found, checkpoint_id=folder / "counted", no_dist=True)
    assert all(torch.equal(found[name], x) for name, x in want.items())
    for options in ({"f": 1, "bad": "count"}, {"f": 2}):
        with pytest.raises(ValueError, match=r"2 of 7 updates cannot be used, more than f=1|is no checkpoint of torch"):
            rd.aggregate_checkpoints(paths, "median", out=folder / "never", **options)
    with pytest.raises(ValueError, match="the ranks call different functions"):
        rd.aggregate_checkpoints(folders, "median", f=2, out=folder / "never", bad="error" if rank == 1 else "count")
    assert not (folder / "never").exists()
    if rank == 0:  # for who reads them next
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(states()[2], checkpoint_id=folder / "c2", no_dist=True)
    dist.barrier()


def safetensors(rank: int, size: int) -> None:
    """Safetensors in shards and whole, and DCP folders among them, read and written by four ranks or one."""
    folder = Path(os.environ["RANKS_FOLDER"]) / "safetensors"
    paths = [folder / f"c{k}" for k in range(5)]
    if rank == 0:
        folder.mkdir()
        for path, state in zip(paths, states(), strict=False):
            path.mkdir()
            groups = [list(state)[:2], list(state)[2:]]
            files = [f"model-{k + 1}.safetensors" for k in range(2)]
            for file, names in zip(files, groups, strict=True):
                save_file({name: state[name] for name in names}, path / file)
            places = {name: file for file, names in zip(files, groups, strict=True) for name in names}
            (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        paths[3].joinpath("model.safetensors.index.json").rename(folder / "x")  # one file instead of shards
        for file in paths[3].iterdir():
            file.unlink()
        (folder / "x").unlink()
        save_file(states()[3], paths[3] / "all.safetensors")
    paths[3] = paths[3] / "all.safetensors"
    paths.append(Path(os.environ["RANKS_FOLDER"]) / "c5")  # a DCP folder
    dist.barrier()
    alone = dist.new_group([0])
    want = rk.aggregate(states(), "ctma(median)", f=2)
    for k, (shard_size, memory) in enumerate(((None, 1 << 30), (500, 1))):
        out = folder / f"out{k}.safetensors"
        info = rd.aggregate_checkpoints(paths, "ctma(median)", f=2, out=out, shard_size=shard_size, memory=memory)
        assert info.nonfinite_rows == (4,)
        if rank == 0:
            options: dict[str, Any] = {"shard_size": shard_size, "group": alone}
            rd.aggregate_checkpoints(paths, "ctma(median)", f=2, out=folder / f"alone{k}.safetensors", **options)
        dist.barrier()
        for name in (f"out{k}", f"alone{k}"):
            files = sorted(folder.glob(f"{name}*.safetensors"))
            assert len(files) == (1 if shard_size is None else 3), files
            found = {key: x for file in files for key, x in load_file(file).items()}
            assert found.keys() == want.keys()
            assert all(torch.equal(found[key], x) for key, x in want.items())
            assert all(is_output(file) for file in files)
        index = folder / f"out{k}.safetensors.index.json"
        assert index.exists() == (shard_size is not None)
    assert not list(folder.glob(".*"))
    with torch.device("meta"):
        rd.aggregate_checkpoints(paths, "ctma(median)", f=2, out=folder / "beside.safetensors")
    beside = load_file(folder / "beside.safetensors")
    assert all(torch.equal(beside[name], x) for name, x in want.items())
    dcp_out = folder / "as dcp"
    rd.aggregate_checkpoints(paths, "ctma(median)", f=2, out=dcp_out)
    found = {name: torch.empty_like(x) for name, x in want.items()}
    dcp.load(found, checkpoint_id=dcp_out, no_dist=True)
    assert all(torch.equal(found[name], x) for name, x in want.items())
    with pytest.raises(ValueError, match="is in the folder of a worker"):
        rd.aggregate_checkpoints(paths, "median", out=paths[0] / "x.safetensors")
    with pytest.raises(ValueError, match="the ranks call for different things: shard_size"):
        rd.aggregate_checkpoints(paths, "median", out=folder / "y.safetensors", shard_size=rank + 1)
    with pytest.raises(ValueError, match="does not exist"):  # of one rank, as if it had another disk
        rd.aggregate_checkpoints(paths, "median", out=folder / ("z.safetensors" if rank else "no/z.safetensors"))
    if rank == 2:
        broken = shards._put
        shards._put = lambda *_: (_ for _ in ()).throw(ValueError("no space"))
    with pytest.raises(ValueError, match="no space"):
        rd.aggregate_checkpoints(paths, "median", out=folder / "full.safetensors")
    if rank == 2:
        shards._put = broken
    dist.barrier()
    assert not (folder / "full.safetensors").exists()
    finish = output.Output._finish
    for name in ("late", "failing"):  # rank 0 is slow to put it there, or cannot

        def last(self: Any, stack: Any, made: Any, name: str = name) -> None:
            time.sleep(0.5)
            if name == "failing":
                raise output.FileError("the disk is full")
            finish(self, stack, made)

        output.Output._finish = last  # type: ignore[method-assign]
        if name == "failing":
            with pytest.raises(ValueError, match="the disk is full"):
                rd.aggregate_checkpoints(paths, "median", f=2, out=folder / f"{name}.safetensors")
        else:
            rd.aggregate_checkpoints(paths, "median", f=2, out=folder / f"{name}.safetensors")
        assert (folder / f"{name}.safetensors").exists() == (name == "late")
    output.Output._finish = finish  # type: ignore[method-assign]
    assert not list(folder.glob(".*"))


def dtensors(rank: int, size: int) -> None:
    """DTensors in and out, in one axis and in two, uneven and with empty parts."""
    g = torch.Generator().manual_seed(3)
    line = init_device_mesh("cpu", (size,))
    square = init_device_mesh("cpu", (2, 2))
    rows = [{"a": torch.randn(7, 6, generator=g), "b": [torch.randn(5, generator=g)]} for _ in range(7)]
    rows[2]["a"] *= 1e8

    def spread(row: Any, what: Any = line, how: Any = None) -> Any:
        how = how or [Shard(0)]
        return {"a": distribute_tensor(row["a"], what, how), "b": [distribute_tensor(row["b"][0], line, [Shard(0)])]}

    for rule in ("median", "krum", "nnm | ctma(geometric_median)"):
        want = rk.aggregate(rows, rule, f=2)
        for what, how in ((line, [Shard(0)]), (line, [Shard(1)]), (square, [Shard(0), Shard(1)])):
            found, info = rd.aggregate([spread(row, what, how) for row in rows], rule, f=2, return_info=True)
            assert info.d == 47
            assert tuple(found["a"].placements) == tuple(how)
            torch.testing.assert_close(found["a"].full_tensor(), want["a"], rtol=2e-7, atol=0)
            torch.testing.assert_close(found["b"][0].full_tensor(), want["b"][0], rtol=2e-7, atol=0)
    out = spread(rows[0])
    assert rd.aggregate([spread(row) for row in rows], "median", out=out) is out
    assert torch.equal(out["a"].full_tensor(), rk.aggregate(rows, "median")["a"])
    centre = spread(rows[0])
    found = rd.aggregate([spread(row) for row in rows], "centered_clipping(tau=1.0)", centre=centre)
    plain = rk.aggregate(rows, "centered_clipping(tau=1.0)", centre=rows[0])
    torch.testing.assert_close(found["a"].full_tensor(), plain["a"], rtol=2e-7, atol=0)
    with pytest.raises(ValueError, match=r"leaf \['a'\] is a DTensor with placements \(Replicate\(\),\); each column"):
        rd.aggregate([spread(row, line, [Replicate()]) for row in rows], "median")
    with pytest.raises(ValueError, match=r"leaf \['a'\] of row 1 is spread over the ranks in another way than row 0's"):
        rd.aggregate([spread(row, line, [Shard(k % 2)]) for k, row in enumerate(rows)], "median")
    with pytest.raises(ValueError, match=r"leaf \['a'\] of row 1 is .*no DTensor and"):
        rd.aggregate([spread(rows[0]), rows[1]], "median")
    with pytest.raises(TypeError, match=r"local_columns is one DTensor \(pass a list of n of them"):
        rd.aggregate(distribute_tensor(rows[0]["a"], line, [Shard(0)]), "median")
    part, whole = dist.new_group([0, 1]), [spread(row) for row in rows]
    if rank < 2:
        with pytest.raises(ValueError, match="is a DTensor on 4 ranks; expected the 2 of the group"):
            rd.aggregate(whole, "median", group=part)


# ---- ranks that die ----------------------------------------------------------------------------------------------


def killed(rank: int, size: int, who: int = -1) -> dict[str, Any]:
    """The last rank dies in the middle of a call: the others' calls end with an error, well before the test does."""
    rd.aggregate_rows(np.ones(4), "median", f=1)
    started = time.monotonic()
    if rank == who % size:
        os._exit(9)
    try:
        while True:
            rd.aggregate_rows(np.ones(4), "krum", f=1)
    except RuntimeError as error:
        found = {"error": f"{type(error).__name__}: {error}", "seconds": time.monotonic() - started}
    others = [Path(os.environ["RANKS_FOLDER"]) / f"{k}.json" for k in range(1, size) if k != who % size]
    while rank == 0 and not all(map(Path.exists, others)) and time.monotonic() < started + 20:
        time.sleep(0.05)  # whoever ends resets connections, with a word in them that nobody has read yet
    return found


def killed_first(rank: int, size: int) -> dict[str, Any]:
    """Rank 0 dies, to which all others bring their messages."""
    return killed(rank, size, 0)


def killed_while_collecting(rank: int, size: int) -> dict[str, Any]:
    """The last rank dies when all have their columns of the result."""

    def die(*_: Any, **__: Any) -> None:
        os._exit(9)

    rd.aggregate_rows(np.ones(4), "median", f=1)
    started = time.monotonic()
    if rank == size - 1:
        ranks.Collecting._collect = die  # type: ignore[method-assign]
    try:
        rd.aggregate_rows(np.ones(1_000_000), "median", f=1)
    except RuntimeError as error:
        return {"error": f"{type(error).__name__}: {error}", "seconds": time.monotonic() - started}
    raise AssertionError("a result without the last rank's columns")


def models(rank: int, size: int) -> None:
    data_parallel(rank, size)
    fully_sharded(rank, size)
    replicas(rank, size)


def everything_sharded(rank: int, size: int) -> None:
    columns(rank, size)
    kinds_of_leaves(rank, size)
    pieces_of_everything(rank, size)
    rows(rank, size)
    checkpoints(rank, size)
    safetensors(rank, size)
    dtensors(rank, size)
    errors(rank, size)
    left_alone(rank, size)


def training(rank: int, size: int) -> dict[str, Any]:
    return {"learning": learning(rank, size), "curves": curves(rank, size)}
