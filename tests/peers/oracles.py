"""Compare an adapter with the package it stands for, on random vectors: ``python tests/peers/oracles.py PACKAGE [cases]``.

PACKAGE is byzfl, krum, torchjd, geom_median, hdmedians, byzpy or flwr, and must be installed. A float32 result counts as
equal as well where it is theirs of the same numbers in float64: there distances in float32 decide which rows are taken.
Left out everywhere: vectors that are not finite, and rows that are equally near by construction (to a single neighbour;
by sums of distances on a line).

- byzfl: CAF and SMEA, which depend on random vectors there; the Optimal attacks, whose searches branch on last digits;
  tensors of float64, which become float32 there.
- krum: gradients of the geometric median, which are those of its steps there; Bulyan with f = 0 or m = 2, where both of
  two rows are equally near to their mean.
- torchjd: Krum of attacked rows in float32, whose products in float32 tell apart no rows that lie close together.
- geom_median: there steps stop early, so it is given 5000 of them, and ours may not be farther than theirs from the
  points by more than 1e-8, nor lie more than 1e-5 elsewhere (the latter in float64, and where 4f < n: between two halves
  the steps stall); fewer than 3 points, or points on a line, where medians are not unique.
- hdmedians: as geom_median, with 100000 steps and a small `eps`, and within 1e-7.
- byzpy: CAF, which takes a few power iterations there; the geometric median from the median, and drawn buckets, which
  are byzpy's own code in both. Geometric medians within 1e-8: next to a row steps of rounded products stop elsewhere.
- flwr: `to_keep` above n, where indices wrap around there; claims above ten times their median, which are capped.
"""

from __future__ import annotations

import copy
import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Call = Callable[[Any], Any]


class Case(NamedTuple):
    """What is called, theirs and ours; `loose` multiplies the tolerance, `exact` is theirs without float32 inside.

    With `least` only more than theirs counts as a difference.
    """

    name: str
    options: dict[str, Any]
    theirs: Call
    ours: Call
    loose: float = 1.0
    exact: Call | None = None
    least: bool = False


# ---- packages ----------------------------------------------------------------------------------------------------------


def byzfl(g: np.random.Generator, n: int, f: int, d: int, single: bool) -> Iterator[Case]:
    import byzfl as theirs

    import robustkern.adapters.byzfl as ours

    rules: list[tuple[str, dict[str, Any]]] = [
        (name, {"f": f}) for name in ("TrMean", "Krum", "MultiKrum", "Meamed", "NNM", "ARC")
    ]
    if n <= 12:
        rules.append(("MDA", {"f": f}))
    rules += [("MoNNA", {"f": f, "idx": n - 1}), ("Average", {}), ("Median", {}), ("Clipping", {"c": 3.0})]
    rules += [("GeometricMedian", {"nu": nu, "T": t}) for nu, t in ((0.1, 3), (1.0, 8), (0.1, 0))]
    rules += [("CenteredClipping", {"L": 2, "tau": tau}) for tau in (1.0, 100.0)]
    rules += [("SignFlipping", {}), ("InnerProductManipulation", {"tau": 1.5}), ("Mimic", {"epsilon": n - 1})]
    rules += [("Inf", {}), ("Bucketing", {"s": 2}), ("Gaussian", {"mu": 1.0, "sigma": 2.0})]
    rules += [("ALittleIsEnough", {"tau": 1.5})] if n > 1 else []

    def twice(rule: Call) -> Call:
        return lambda x: (rule(copy.deepcopy(x)), rule(x))[1]  # the second call sees what the first one left

    def exact(rule: Call) -> Call:
        return lambda x: rule(np.stack([np.asarray(row) for row in x]))  # tensors become float32

    for name, options in rules:
        both = [twice(getattr(module, name)(**options)) for module in (theirs, ours)]
        yield Case(name, options, *both, exact=exact(both[0]))
    for before, last in (("NNM", "TrMean"), ("NNM", "Median"), ("ARC", "Meamed"), ("Bucketing", "GeometricMedian")):
        options = {
            "aggregator_info": {"name": last, "parameters": {"f": 0 if before == "Bucketing" else f}},
            "pre_agg_list": [{"name": before, "parameters": {"f": f, "s": 2}}],
        }
        both = [module.RobustAggregator(**options).aggregate_vectors for module in (theirs, ours)]
        yield Case("RobustAggregator", options, *both, exact=exact(both[0]))


def krum(g: np.random.Generator, n: int, f: int, d: int, single: bool) -> Iterator[Case]:
    import robustkern.adapters.krum as ours

    at, near, some = int(g.integers(n)), int(g.integers(1, n + 1)), {"n": n, "f": f}
    rules: list[tuple[str, str, dict[str, Any]]] = [("average", "Average", {}), ("median", "Median", {})]
    rules += [("trimmed_mean", "TrimmedMean", {"f": f}), ("aksel", "Aksel", {"f": f})]
    rules += [("nearest_neighbor_average", "NearestNeighborAverage", {"num_closest": near, "pivot": at})]
    steps = {"nu": float(g.choice([0.01, 0.1, 1.0])), "tol": 0.0, "max_iter": int(g.integers(1, 40))}
    rules += [("geometric_median", "GeometricMedian", some), ("geometric_median", "GeometricMedian", some | steps)]
    rules += [("brute", "Brute", some)] if n <= 10 else []
    rules += [("medoid", "Medoid", some)] if d > 1 else []
    if n >= 2 * f + 4:
        rules += [("krum", "Krum", some), ("multikrum", "MultiKrum", some | {"m": near})]
        rules += [("multikrum", "MultiKrum", some)]
    if n >= 4 * f + 3 and f > 0:
        rules += [("bulyan", "Bulyan", some | more) for more in ({}, {"m": near}) if near != 2 or not more]

    def combined(rule: Any, options: dict[str, Any]) -> Call:
        def call(x: Any) -> Any:
            return rule.aggregate(x, **options | ({"pivot": x[options["pivot"]] + 0} if "pivot" in options else {}))

        return call

    for module, name, options in rules:
        there = getattr(importlib.import_module(f"krum.primitives.aggregators.{module}"), name)
        both = [combined(rule, options) for rule in (there, getattr(ours, name))]
        yield Case(name, options, *both)
        if name != "GeometricMedian":
            yield Case(f"gradients of {name}", options, *map(gradient, both))
        if name == "MultiKrum":
            yield Case("MultiKrum.score", some, *(scored(rule.score, some) for rule in (there, getattr(ours, name))))


def scored(score: Call, options: dict[str, Any]) -> Call:
    import torch

    return lambda x: score(torch.stack(list(x)), **options)


def gradient(call: Call) -> Call:
    """Return what passes a gradient through a call, to the rows of a tensor or to several tensors."""
    import torch

    def back(x: Any) -> Any:
        leaf = torch.stack(list(x)).requires_grad_()
        result = call(leaf if isinstance(x, torch.Tensor) else list(leaf))
        (result * torch.linspace(-1, 1, result.numel(), dtype=leaf.dtype).reshape(result.shape)).sum().backward()
        return leaf.grad

    return back


def torchjd(g: np.random.Generator, n: int, f: int, d: int, single: bool) -> Iterator[Case]:
    import torch
    from torchjd import aggregation as theirs

    import robustkern.adapters.torchjd as ours

    rules = [("TrimmedMean", {"trim_number": f})]
    if n >= 4 and d > 1 and not (single and f):
        bad = int(g.integers(0, n - 3))
        rules += [("Krum", {"n_byzantine": bad, "n_selected": m}) for m in (1, int(g.integers(1, n + 1)))]
    for name, options in rules:
        both = [getattr(module, name)(**options) for module in (theirs, ours)]
        exact: Call | None = None
        if name == "Krum":
            weightings = [rule.gramian_weighting for rule in both]
            exact = weighing(weightings[0], torch.float32)
            yield Case("KrumWeighting", options, *map(weighing, weightings), exact=exact)
            exact = applied(exact)
        yield Case(name, options, *both, exact=exact)
        yield Case(f"gradients of {name}", options, *map(gradient, both), exact=exact and gradient(exact))


def weighing(weighting: Call, product: Any = None) -> Call:
    """Return weights by the products of the rows, which TorchJD takes in the dtype of the rows."""

    def weights(x: Any) -> Any:
        rows = x.detach().to(product)
        return weighting((rows @ rows.T).to(x.dtype))

    return weights


def applied(weights: Call) -> Call:
    return lambda x: weights(x) @ x


def geom_median(g: np.random.Generator, n: int, f: int, d: int, single: bool) -> Iterator[Case]:
    import geom_median.numpy
    import geom_median.torch
    import torch

    import robustkern.adapters.geom_median as ours

    given, cut = g.uniform(0.5, 2.0, n), d // 2

    def call(form: str, weighted: bool, here: bool, what: str) -> Call:
        def median(x: Any) -> Any:
            there = geom_median.numpy if isinstance(x[0], np.ndarray) else geom_median.torch
            weights: Any = given if isinstance(x[0], np.ndarray) else torch.tensor(given, dtype=x[0].dtype)
            found = (ours if here else there).compute_geometric_median(
                x if form == "rows" else [[row[:cut], row[cut:]] for row in x],
                weights if weighted else None,
                per_component=form == "components",
                maxiter=5000,
            )
            if what == "median":
                return found.median
            return [logs[-1] for logs in found.logs] if form == "components" else found.logs[-1]

        return median

    for form in ("rows", "lists", "components") if n > 2 and d > 3 else ("rows",) if n > 2 and d > 1 else ():
        for weighted in (False, True):
            for what, loose in (
                ("cost", 1.0 if single else 1e2),
                *([("median", 1e5)] if 4 * f < n and not single else []),
            ):
                both = (call(form, weighted, here, what) for here in (False, True))
                yield Case(f"{what} of {form}", {"weighted": weighted}, *both, loose, least=what == "cost")


def hdmedians(g: np.random.Generator, n: int, f: int, d: int, single: bool) -> Iterator[Case]:
    import hdmedians as theirs

    import robustkern.adapters.hdmedians as ours

    rows = g.choice(n, int(g.integers(0, n)), replace=False)
    columns, whole = g.integers(0, d, len(rows)), np.setdiff1d(np.arange(n), rows)

    def call(module: Any, name: str, axis: int, more: dict[str, Any], cost: bool) -> Call:
        def median(x: Array) -> Any:
            options = dict(more)
            if name.endswith("geomedian") and module is theirs:
                options |= {"eps": (1e-8 if single else 1e-13) * abs(x).max(), "maxiters": 100000}
            if name.startswith("nan"):
                x[rows, columns] = np.nan
            found = getattr(module, name)(x if axis == 0 else np.ascontiguousarray(x.T), axis=axis, **options)
            return np.linalg.norm(x[~np.isnan(x).any(axis=1)] - np.asarray(found), axis=1).mean() if cost else found

        return median

    for axis in (0, 1) if d > 1 else ():
        for name in ("medoid", "nanmedoid"):
            for more in ({}, {"indexonly": True}):
                yield Case(
                    name, {"axis": axis} | more, *(call(module, name, axis, more, False) for module in (theirs, ours))
                )
        for name, used in (("geomedian", np.arange(n)), ("nangeomedian", whole)) if n > 2 else ():
            clear = 4 * (used < f).sum() < len(used) and not single
            for cost, loose in ((True, 1.0), (False, 1e3)) if clear else ((True, 1.0),):
                both = (call(module, name, axis, {}, cost) for module in (theirs, ours))
                yield Case(
                    f"cost of {name}" if cost else name, {"axis": axis, "holes": len(rows)}, *both, loose, least=cost
                )


def byzpy(g: np.random.Generator, n: int, f: int, d: int, single: bool) -> Iterator[Case]:
    from byzpy import aggregators, pre_aggregators

    import robustkern.adapters.byzpy as ours

    there = [aggregators.coordinate_wise, aggregators.geometric_wise, aggregators.norm_wise, pre_aggregators]
    rules: list[tuple[str, dict[str, Any]]] = [("CoordinateWiseMedian", {})]
    rules += [
        (name, {"f": f}) for name in ("CoordinateWiseTrimmedMean", "MeanOfMedians", "NearestNeighborMixing", "ARC")
    ]
    rules += [("ComparativeGradientElimination", {"f": f}), ("MoNNA", {"f": f, "reference_index": int(g.integers(n))})]
    if n - f > 2:
        rules += [("Krum", {"f": f}), ("MultiKrum", {"f": f, "q": int(g.integers(1, n - f + 1))})]
    rules += [("MinimumDiameterAveraging", {"f": f})] if n <= 10 else []
    rules += [("SMEA", {"f": f})] if n <= 8 else []
    steps = {"tol": 1e-300, "max_iter": int(g.integers(1, 60)), "eps": float(g.choice([1e-12, 0.1]))}
    rules += [("GeometricMedian", {"init": "mean"} | more) for more in ({}, steps)]
    rules += [
        ("CenteredClipping", {"c_tau": float(g.choice([0.0, 0.1, 10.0])), "M": int(g.integers(1, 12)), "init": init})
        for init in ("mean", "median", "zero")
    ]
    rules += [("Clipping", {"threshold": float(g.choice([0.0, 0.5, 5.0]))})]
    rules += [("Bucketing", {"bucket_size": int(g.integers(1, 5)), "perm": g.permutation(n).tolist()})]
    for name, options in rules:
        both = [
            getattr(next(place for place in places if hasattr(place, name)), name)(**options)
            for places in (there, [ours])
        ]
        calls = [rule.pre_aggregate if hasattr(rule, "pre_aggregate") else rule.aggregate for rule in both]
        yield Case(name, options, *calls, loose=1e2 if name == "GeometricMedian" else 1.0)


def flwr(g: np.random.Generator, n: int, f: int, d: int, single: bool) -> Iterator[Case]:
    import flwr.server.strategy as older
    import flwr.serverapp.strategy as newer
    from flwr.server.strategy import aggregate as functions

    from robustkern.adapters import flower, flower_server

    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    cut, keep = float(g.uniform(0, 0.49)), int(g.integers(1, n + 1))
    calls: list[tuple[str, dict[str, Any]]] = [("median", {}), ("trimmed_avg", {"proportiontocut": cut})]
    models: list[tuple[Any, Any, str, dict[str, Any]]] = []
    for there, here in ((older, flower_server), (newer, flower)):
        models += [(there, here, "FedMedian", {}), (there, here, "FedTrimmedAvg", {"beta": cut})]
    if n >= f + 4:
        calls += [("krum", {"num_malicious": f, "to_keep": k}) for k in (0, 1, keep)]
        models += [(older, flower_server, "Krum", {"num_malicious_clients": f, "num_clients_to_keep": keep})]
        models += [(newer, flower, "Krum", {"num_malicious_nodes": f})]
        models += [(newer, flower, "MultiKrum", {"num_malicious_nodes": f, "num_nodes_to_select": keep})]
    if n >= 4 * f + 3:
        calls += [("bulyan", {"num_malicious": f, "aggregation_rule": functions.aggregate_krum, "to_keep": 0})]
        models += [(older, flower_server, "Bulyan", {"num_malicious_clients": f, "to_keep": 0})]
        models += [(newer, flower, "Bulyan", {"num_malicious_nodes": f})]

    def called(function: Any, options: dict[str, Any]) -> Call:
        return lambda results: function(results, **options)

    for name, options in calls:
        both = (called(getattr(module, f"aggregate_{name}"), options) for module in (functions, flower_server))
        yield Case(f"aggregate_{name}", options, *both)
    for there, here, name, options in models:
        run = fitted if there is older else trained
        yield Case(f"{there.__name__}.{name}", options, *(run(getattr(m, name)(**options)) for m in (there, here)))


def fitted(strategy: Any) -> Call:
    """Return a round of a strategy of Flower's older API."""
    from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays

    def round_(results: Any) -> Any:
        sent = [FitRes(Status(Code.OK, ""), ndarrays_to_parameters(x), count, {}) for x, count in results]
        return parameters_to_ndarrays(strategy.aggregate_fit(2, [(SimpleNamespace(cid=""), x) for x in sent], [])[0])

    return round_


def trained(strategy: Any) -> Call:
    """Return a round of a strategy of Flower's message API."""
    from flwr.app import Array as Sent
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1

    def round_(results: Any) -> Any:
        replies = []
        for node, (layers, count) in enumerate(results):
            arrays = ArrayRecord({f"layer {k}": Sent(layer) for k, layer in enumerate(layers)})
            metrics = MetricRecord({"num-examples": count, "loss": 1 / (node + 1)})
            asked = Message(RecordDict(), dst_node_id=node + 1, message_type="train")
            replies.append(Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=asked))
        arrays, metrics = strategy.aggregate_train(2, replies)
        return [*arrays.to_numpy_ndarrays(), metrics["loss"]]

    return round_


#: By package: its cases, and the kinds of vectors it takes, in turn.
PACKAGES: dict[str, tuple[Callable[..., Iterator[Case]], tuple[str, ...]]] = {
    "byzfl": (byzfl, ("float64 array", "float32 array", "float32 tensor", "float64 arrays", "float32 tensors")),
    "krum": (krum, ("float64 tensor", "float32 tensor", "float64 tensors", "float32 tensors")),
    "torchjd": (torchjd, ("float64 tensor", "float32 tensor")),
    "geom_median": (geom_median, ("float64 arrays", "float64 tensors", "float32 tensors", "float64 array")),
    "hdmedians": (hdmedians, ("float64 array", "float32 array")),
    "byzpy": (byzpy, ("float64 tensors", "float32 tensors", "float64 matrices", "float32 matrices")),
    "flwr": (flwr, ("float64 results", "float32 results")),
}


# ---- comparison --------------------------------------------------------------------------------------------------------


def made(x: Array, kind: str) -> Any:
    """Return the rows of x in a dtype and a container; results are pairs of two layers and a number of examples."""
    dtype, form = kind.split()
    rows = x.astype(dtype)
    if form == "results":
        cut = len(rows[0]) // 2
        return [([row[:cut].copy(), row[cut:].reshape(1, -1).copy()], 10 + k % 7) for k, row in enumerate(rows)]
    if form.startswith("array"):
        return rows if form == "array" else [row.copy() for row in rows]
    import torch

    tensor = torch.tensor(rows[:, None] if form == "matrices" else rows)
    return tensor if form == "tensor" else [row.clone() for row in tensor]


def parts(result: Any) -> list[Array]:
    """Return what a result holds, in float64."""
    if isinstance(result, (list, tuple)):
        return [part for each in result for part in parts(each)]
    return [np.asarray(result.detach() if hasattr(result, "detach") else result, dtype=np.float64)]


def found(call: Call, vectors: Any, seed: int) -> list[Array]:
    """Return what a call makes of vectors, with the generators that it may draw from seeded."""
    np.random.seed(seed)  # noqa: NPY002
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)
    return parts(call(vectors))


def apart(want: list[Array], got: list[Array]) -> float:
    """Return the largest difference, infinite where shapes differ."""
    if [a.shape for a in want] != [b.shape for b in got]:
        return np.inf
    with np.errstate(invalid="ignore"):
        return max(
            (float(np.where(a == b, 0.0, abs(a - b)).max(initial=0.0)) for a, b in zip(want, got, strict=True)),
            default=0.0,
        )


def main(package: str, count: int) -> int:
    """Return how many results differ by more than rounding."""
    cases, kinds = PACKAGES[package]
    g, compared, rounded, wrong = np.random.default_rng(0), 0, 0, 0
    for number in range(count):
        n = int(g.integers(1, 30 if number % 3 else 15))  # a third are small: there decisions are close
        f, d = int(g.integers(0, (n - 1) // 2 + 1)), int(g.integers(1, 60 if number % 3 else 4))
        x = g.standard_normal((n, d)) * 10.0 ** g.integers(-3, 4)
        x[:f] += 10 * g.standard_normal()
        kind = kinds[number % len(kinds)]
        x = x.astype(kind.split()[0]).astype(np.float64)
        single = kind.startswith("float32")
        for case in cases(g, n, f, d, single):
            got = found(case.ours, made(x, kind), number)
            want = found(case.theirs, made(x, kind), number)
            got = [np.maximum(a, b) for a, b in zip(want, got, strict=True)] if case.least else got
            size = max((abs(a).max(initial=0.0, where=np.isfinite(a)) for a in [x, *want]), default=0.0)
            most = size * (1e-6 if single else 1e-10) * case.loose
            compared += 1
            off = apart(want, got)
            if off > most and single:
                exact = found(case.exact or case.theirs, made(x, kind.replace("float32", "float64")), number)
                off = min(off, apart(exact, got))
                rounded += off <= most
            if not off <= most:
                wrong += 1
                print(f"case {number}: {case.name} {case.options} of {n} x {d}, f={f}, {kind}: {off:.1e} apart")
    if rounded:
        print(f"{rounded} results in float32 are theirs in float64, and not theirs in float32")
    print(f"{package}: {compared} results compared, {wrong} differ")
    return wrong


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in PACKAGES:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 300) > 0)
