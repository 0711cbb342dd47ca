"""Flower's strategies: honest rounds give its own bytes, and no hostile client ends a run; real rounds, no Ray."""

from __future__ import annotations

import io
import logging
import struct
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import robustkern as rk

pytest.importorskip("flwr")
import flwr.server.strategy as older
import flwr.serverapp.strategy as builtin
import ml_dtypes
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.common import Code, EvaluateRes, FitRes, Parameters, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from robustkern.adapters import flower, flower_server

TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
SHAPES = {"w": (3, 4), "b": (4,), "s": ()}
Values = dict[str, NDArray[Any]]
Metrics = dict[str, Any]


def honest(seed: int) -> Values:
    g = np.random.default_rng(seed)
    return {key: np.asarray(g.normal(size=shape), np.float32) for key, shape in SHAPES.items()}


def record(arrays: Values) -> ArrayRecord:
    return ArrayRecord({key: Array(np.asarray(value)) for key, value in arrays.items()})


def reply(arrays: Values, metrics: Metrics) -> RecordDict:
    return RecordDict({"arrays": record(arrays), "metrics": MetricRecord(metrics)})


def npy(descr: str, shape: tuple[int, ...], payload: bytes = b"") -> bytes:
    """Return an array as NumPy writes it, with any header."""
    head = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}".encode()
    head += b" " * (-(len(head) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + payload


def with_array(data: Any, dtype: str = "float32", shape: tuple[int, ...] = (3, 4), stype: str = "numpy.ndarray") -> Any:
    def made(arrays: Values, metrics: Metrics) -> RecordDict:
        found = reply(arrays, metrics)
        bytes_ = data(Array(arrays["w"]).data) if callable(data) else data
        next(iter(found.array_records.values()))["w"] = Array(dtype, shape, stype, bytes_)
        return found

    return made


def with_arrays(change: Callable[[Values], Values]) -> Any:
    return lambda arrays, metrics: reply(change(arrays), metrics)


def with_metrics(**change: Any) -> Any:
    def made(arrays: Values, metrics: Metrics) -> RecordDict:
        metrics = metrics | {key.replace("_", "-"): value for key, value in change.items()}
        return reply(arrays, {key: value for key, value in metrics.items() if value is not None})

    return made


def smuggled(arrays: Values, metrics: Metrics) -> RecordDict:
    found = reply(arrays, metrics)
    next(iter(found.metric_records.values())).__dict__["_data"]["loss"] = "text"
    return found


def npz(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.savez(file, a=array)
    return file.getvalue()


#: What a hostile client may send.
HOSTILE: dict[str, Callable[[Values, Metrics], Any]] = {
    "nan": with_arrays(lambda a: {**a, "w": a["w"] * np.nan}),
    "inf": with_arrays(lambda a: {**a, "w": a["w"] * np.inf}),
    "huge": with_arrays(lambda a: {**a, "w": np.full((3, 4), 1e30, np.float32)}),
    "key missing": with_arrays(lambda a: {key: value for key, value in a.items() if key != "b"}),
    "key extra": with_arrays(lambda a: {**a, "z": a["b"]}),
    "keys in another order": with_arrays(lambda a: dict(reversed(a.items()))),
    "shape": with_arrays(lambda a: {**a, "w": a["w"].T.copy()}),
    "shape that broadcasts": with_arrays(lambda a: {**a, "b": a["b"][:1].copy()}),
    "empty": with_arrays(lambda a: {**a, "b": a["b"][:0].copy()}),
    "float64": with_arrays(lambda a: {key: value.astype(np.float64) for key, value in a.items()}),
    "integers": with_arrays(lambda a: {key: value.astype(np.int64) for key, value in a.items()}),
    "big endian": with_arrays(lambda a: {key: value.astype(">f4") for key, value in a.items()}),
    "texts": with_arrays(lambda a: {**a, "w": a["w"].astype("<U8")}),
    "records": with_arrays(lambda a: {**a, "w": np.zeros((3, 4), [("x", "f4")])}),
    "columns first": with_arrays(lambda a: {**a, "w": np.asfortranarray(a["w"])}),
    "no bytes": with_array(b""),
    "garbage": with_array(b"garbage" * 9),
    "cut off": with_array(lambda data: data[:-5]),
    "pickle": with_array(npy("|O", (3, 4), b"\x80\x04K\x01.")),
    "npz": with_array(npz(np.ones((3, 4), np.float32))),
    "4 GB header": with_array(npy("<f4", (10**9,), b"\0" * 48)),
    "1e30 header": with_array(npy("<f4", (10**30,), b"\0" * 48)),
    "negative header": with_array(npy("<f4", (-1,), b"\0" * 48)),
    "60 kB header": with_array(b"\x93NUMPY\x01\x00" + struct.pack("<H", 60000) + b" " * 60000),
    "version 9": with_array(b"\x93NUMPY\x09\x00" + b"\0" * 60),
    "odd header": with_array(b"\x93NUMPY\x01\x00\x02\x00{}"),
    "code in the header": with_array(b"\x93NUMPY\x01\x00\x10\x00__import__('os')"),
    "shape lies": with_array(lambda data: data, shape=(10**9, 7)),
    "dtype lies": with_array(lambda data: data, dtype="int8"),
    "other stype": with_array(lambda data: data, stype="torch.Tensor"),
    "no arrays": lambda arrays, metrics: RecordDict({"metrics": MetricRecord(metrics)}),
    "no metrics": lambda arrays, metrics: RecordDict({"arrays": record(arrays)}),
    "nothing": lambda arrays, metrics: RecordDict(),
    "two records of arrays": lambda arrays, metrics: RecordDict(
        {"arrays": record(arrays), "more": record(arrays), "metrics": MetricRecord(metrics)}
    ),
    "record of no arrays": lambda arrays, metrics: RecordDict(
        {"arrays": ArrayRecord(), "metrics": MetricRecord(metrics)}
    ),
    "another name": lambda arrays, metrics: RecordDict({"model": record(arrays), "metrics": MetricRecord(metrics)}),
    "settings for arrays": lambda arrays, metrics: RecordDict(
        {"arrays": ConfigRecord({"w": "text"}), "metrics": MetricRecord(metrics)}
    ),
    "loss nan": with_metrics(loss=float("nan")),
    "loss inf": with_metrics(loss=float("inf")),
    "loss missing": with_metrics(loss=None),
    "metric extra": with_metrics(extra=1.0),
    "loss a list": with_metrics(loss=[1.0, 2.0]),
    "list too long": with_metrics(hist=[1.0, 2.0, 3.0]),
    "loss a text": smuggled,
    "examples missing": with_metrics(num_examples=None),
    "examples a list": with_metrics(num_examples=[1.0]),
    "examples 1e15": with_metrics(num_examples=10**15, loss=1e9),
    "examples 1e400": with_metrics(num_examples=10**400),
    "examples 0": with_metrics(num_examples=0),
    "examples negative": with_metrics(num_examples=-60),
    "examples nan": with_metrics(num_examples=float("nan")),
    "error": lambda arrays, metrics: Error(0, "boom"),
    "silence": lambda arrays, metrics: None,
    "twice": lambda arrays, metrics: [reply(arrays, metrics)] * 2,
}


class OwnGrid(Grid):
    """Clients in this process, of which one is hostile."""

    def __init__(self, nodes: int, hostile: int | None, send: Any, evaluates: bool = False) -> None:
        self.ids, self.hostile, self.send, self.evaluates = list(range(100, 100 + nodes)), hostile, send, evaluates

    def set_run(self, run: Any) -> None:
        """Need none."""

    @property
    def run(self) -> Any:
        """Return none."""

    def create_message(self, *asked: Any, **options: Any) -> Any:
        """Not asked for."""

    def get_node_ids(self) -> Iterable[int]:
        """Return all."""
        return list(self.ids)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Not asked for."""
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Not asked for."""
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Answer at once, in the order of the nodes."""
        return [
            found for message in sorted(messages, key=lambda m: m.metadata.dst_node_id) for found in self.of(message)
        ]

    def of(self, message: Message) -> list[Message]:
        """Return a client's replies."""
        node, trains = message.metadata.dst_node_id, message.metadata.message_type != MessageType.EVALUATE
        round_ = int(message.content["config"]["server-round"])  # type: ignore[index]
        metrics = {"num-examples": 10, "loss": 0.5 + 0.01 * (node - 100), "hist": [1.0, 2.0]}
        arrays = honest(1000 * round_ + node)
        content: Any = reply(arrays, metrics) if trains else RecordDict({"metrics": MetricRecord(metrics)})
        if self.hostile is not None and node == 100 + self.hostile and trains != self.evaluates:
            content = self.send(arrays, metrics)
            if not trains and isinstance(content, RecordDict):
                content = RecordDict(
                    {"metrics": metric} if (metric := next(iter(content.metric_records.values()), None)) else {}
                )
        contents = content if isinstance(content, list) else [content]
        return [Message(each, reply_to=message) for each in contents if each is not None]


def trained(
    strategy: Any, hostile: int | None = None, send: Any = None, nodes: int = 7, evaluates: bool = False
) -> Any:
    grid = OwnGrid(nodes, hostile, send, evaluates)
    return strategy.start(grid, record({key: np.zeros(s, np.float32) for key, s in SHAPES.items()}), num_rounds=2)


MAKE: dict[str, Callable[[], Any]] = {
    "FedMedian": flower.FedMedian,
    "FedTrimmedAvg": flower.FedTrimmedAvg,
    "Krum": lambda: flower.Krum(num_malicious_nodes=1),
    "MultiKrum": lambda: flower.MultiKrum(num_malicious_nodes=1, num_nodes_to_select=4),
    "Bulyan": lambda: flower.Bulyan(num_malicious_nodes=1),
    "RobustStrategy": lambda: flower.RobustStrategy("ctma(geometric_median)", f=1),
    "weighted": lambda: flower.RobustStrategy("ctma(median)", delta=0.2, weighted=True),
    "centred": lambda: flower.RobustStrategy("centred_clipping(tau=10.0)", f=1),
}


@pytest.fixture(autouse=True)
def quiet() -> Any:
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    yield
    logging.getLogger("flwr").setLevel(logging.INFO)


def described(head: bytes) -> bytes:
    """Return an array with any description at all."""
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head


#: What is no array, and why.
NO_ARRAYS: dict[str, tuple[Any, str]] = {
    "garbage": (b"garbage" * 9, r"it is no array of NumPy's"),
    "a text": ("text", r"it is no array of NumPy's"),
    "version 9": (b"\x93NUMPY\x09\x00" + b"\0" * 60, r"its header is too long, or of an unknown version"),
    "60 kB header": (described(b" " * 60000), r"its header is too long, or of an unknown version"),
    "another key": (described(b"{'descr': '<f4', 'fortran_order': False, 'shape': (3,), 'more': 1}"), r"its header is none of NumPy's"),
    "shape a list": (described(b"{'descr': '<f4', 'fortran_order': False, 'shape': [3]}"), r"its header is none of NumPy's"),
    "negative shape": (npy("<f4", (-1,), b"\0" * 48), r"its header holds a shape or dtype that is none"),
    "dtype a list": (described(b"{'descr': [('x', '<f4')], 'fortran_order': False, 'shape': (3,)}"), r"its header holds a shape or dtype that is none"),
    "texts": (npy("<U8", (3,), b"\0" * 96), r"its dtype is <U8"),
    "pickle": (npy("|O", (3,), b"\x80\x04K\x01."), r"its dtype is object"),
    "cut off": (npy("<f4", (3, 5), b"\0" * 59), r"it holds fewer bytes than its shape \(3, 5\) takes"),
    "1e30 header": (npy("<f4", (10**30,), b"\0" * 48), r"it holds fewer bytes than its shape \(10+,\) takes"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NO_ARRAYS)
def test_what_is_no_array_says_why(kind: str) -> None:
    data, message = NO_ARRAYS[kind]
    with pytest.raises(ValueError, match=f"^{message}$"):
        flower.decoded(data)


def test_who_replies_twice_is_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "flwr")
    rows = messages([honest(k) for k in range(5)])
    arrays, _ = flower.FedMedian().aggregate_train(1, [*rows, rows[3]])
    assert arrays is not None
    want = np.median([honest(k)["w"] for k in range(5)], axis=0)  # he counts once
    np.testing.assert_allclose(arrays["w"].numpy(), want, rtol=1e-6)
    text = "robustkern: a reply is left out, and counted as a bad one: node 103: it has replied before"
    assert caplog.messages.count(text) == 1


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("place", [0, 3])
def test_no_client_ends_a_run(name: str, kind: str, place: int) -> None:
    result = trained(MAKE[name](), place, HOSTILE[kind], nodes=8)
    rows = [honest(2000 + 100 + k) for k in range(8) if k != place]
    assert list(result.arrays) == list(SHAPES)
    for key, array in result.arrays.items():
        x = array.numpy()
        assert x.dtype == np.float32
        assert x.shape == SHAPES[key]
        stacked = np.stack([row[key] for row in rows])
        if kind != "twice" and name != "centred":  # which is not a place between the honest ones, nor a bad one
            assert (x >= stacked.min(axis=0) - 1e-6).all()
            assert (x <= stacked.max(axis=0) + 1e-6).all()
        assert np.isfinite(x).all()
    metrics = dict(result.train_metrics_clientapp[2])
    assert set(metrics) == {"loss", "hist"}
    assert 0.5 <= metrics["loss"] <= 0.58
    np.testing.assert_allclose(metrics["hist"], [1, 2])


@pytest.mark.parametrize(
    "kind",
    [
        kind
        for kind in HOSTILE
        if kind.startswith(("loss", "examples", "metric", "list", "error", "silence", "no metrics", "nothing"))
    ],
)
@pytest.mark.parametrize("name", ["FedMedian", "Krum", "RobustStrategy"])
def test_no_client_ends_an_evaluation(name: str, kind: str) -> None:
    result = trained(MAKE[name](), 0, HOSTILE[kind], evaluates=True)
    metrics = dict(result.evaluate_metrics_clientapp[2])
    assert 0.5 <= metrics["loss"] <= 0.58
    assert set(metrics) == {"loss", "hist"}


@pytest.mark.parametrize("name", ["FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum"])
@pytest.mark.parametrize("nodes", [2, 5, 7, 8])
def test_honest_rounds_give_flowers_bytes(name: str, nodes: int) -> None:
    """`object_id` is a hash of all bytes, dtypes and the order of keys."""
    options = {"Krum": {"num_malicious_nodes": 1}, "MultiKrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 4}}
    want, got = (trained(getattr(module, name)(**options.get(name, {})), nodes=nodes) for module in (builtin, flower))
    if name == "FedTrimmedAvg":  # float64 sums here
        for key, array in got.arrays.items():
            np.testing.assert_allclose(array.numpy(), want.arrays[key].numpy(), rtol=1e-6)
    else:
        assert got.arrays.object_id == want.arrays.object_id
    assert dict(got.train_metrics_clientapp[2]) == dict(want.train_metrics_clientapp[2])
    assert dict(got.evaluate_metrics_clientapp[2]) == dict(want.evaluate_metrics_clientapp[2])


@pytest.mark.parametrize("at_once", [1, 5, 11, 12, 13])
def test_a_mean_in_parts_has_flowers_bytes(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(flower, "AT_ONCE", at_once)  # 12 values in the longest layer
    test_honest_rounds_give_flowers_bytes("MultiKrum", 7)


def test_bulyan_is_flowers() -> None:
    want, got = (trained(module.Bulyan(num_malicious_nodes=1), nodes=9) for module in (builtin, flower))
    for key, array in got.arrays.items():
        np.testing.assert_allclose(array.numpy(), want.arrays[key].numpy(), rtol=1e-5, atol=1e-6)
    few = flower.Bulyan(num_malicious_nodes=2)
    assert few.aggregate_train(1, messages([honest(k) for k in range(10)])) == (None, None)

    def first(contents: list[RecordDict], f: int, count: int) -> list[RecordDict]:
        return contents[:count]

    chosen = flower.Bulyan(num_malicious_nodes=1, selection_rule=first)
    rows = [honest(k) for k in range(9)]
    arrays, _ = chosen.aggregate_train(1, messages(rows))
    assert arrays is not None
    want_w = rk.mean_around_median(np.stack([row["w"] for row in rows[:7]]), count=5)
    np.testing.assert_allclose(arrays["w"].numpy(), want_w, rtol=1e-6)


def test_another_selection_rule_sees_finite_replies() -> None:
    seen = []

    def first(contents: list[RecordDict], f: int, count: int) -> list[RecordDict]:
        seen.append((len(contents), f, count))
        return contents[:count]

    chosen = flower.Bulyan(num_malicious_nodes=1, selection_rule=first)
    rows = [honest(k) for k in range(9)]
    rows[2]["b"] = np.full(4, np.inf, np.float32)
    arrays, _ = chosen.aggregate_train(1, messages(rows))
    assert seen == [(8, 0, 8)]
    assert arrays is not None
    want = np.mean([row["w"] for k, row in enumerate(rows) if k != 2], axis=0)
    np.testing.assert_allclose(arrays["w"].numpy(), want, rtol=1e-5, atol=1e-6)
    rows[3] = rows[2]
    assert chosen.aggregate_train(1, messages(rows)) == (None, None)
    assert len(seen) == 1


def messages(rows: list[Values], examples: list[Any] | None = None) -> list[Message]:
    """Return replies of nodes that nobody asked."""
    found = []
    for k, arrays in enumerate(rows):
        asked = Message(RecordDict(), 100 + k, MessageType.TRAIN)
        found.append(
            Message(reply(arrays, {"num-examples": examples[k] if examples else 10, "loss": 0.5}), reply_to=asked)
        )
    return found


def test_more_bad_replies_than_f_change_nothing() -> None:
    bad = [{"w": np.ones(k, np.float32)} for k in (1, 2)]
    for strategy in (
        flower.Krum(num_malicious_nodes=1),
        flower.RobustStrategy("krum", f=1),
        flower.FedTrimmedAvg(beta=0.2),
    ):
        assert strategy.aggregate_train(1, messages([honest(k) for k in range(5)] + bad)) == (None, None)
        assert strategy.aggregate_train(1, []) == (None, None)
    nan = {key: value * np.nan for key, value in honest(0).items()}
    assert flower.Krum(num_malicious_nodes=1).aggregate_train(1, messages([honest(1), honest(2), honest(3), nan])) != (
        None,
        None,
    )
    assert flower.RobustStrategy("krum", f=1).aggregate_train(
        1, messages([honest(k) for k in range(5)] + [nan] * 2)
    ) == (None, None)
    assert flower.FedMedian().aggregate_evaluate(1, messages(bad + bad, [-1, -1, 10, 10])) is None


def test_too_few_replies_change_nothing() -> None:
    """One client that only says that it failed makes n too small for f."""
    for rule, f, count in (("ctma(median)", 2, 4), ("bulyan", 1, 6), ("krum", 1, 3), ("krum", 1, 2)):
        found = flower.RobustStrategy(rule, f=f).aggregate_train(1, messages([honest(k) for k in range(count)]))
        assert found == (None, None)


def test_integers_tell_clients_apart() -> None:
    rows = [{"q": np.full(50, k, np.int8), "s": np.float32([1 + k / 100])} for k in range(9)]
    rows[4] = {"q": np.full(50, 127, np.int8), "s": np.float32([1.04])}
    arrays, _ = flower.Krum(num_malicious_nodes=3).aggregate_train(1, messages(rows))
    assert arrays is not None
    assert arrays["q"].numpy().max() < 10


def test_one_claim_among_few_selected_owns_nothing() -> None:
    rows = [{"w": np.full(3, 1 + k / 1000, np.float32)} for k in range(8)]
    arrays, metrics = flower.MultiKrum(num_malicious_nodes=1, num_nodes_to_select=2).aggregate_train(
        1, messages(rows, [9999, *[10] * 7])
    )
    assert arrays is not None
    plain = flower.MultiKrum(num_malicious_nodes=1, num_nodes_to_select=2)
    order = plain.aggregate_train(1, messages(rows))[0]
    assert order is not None
    assert abs(arrays["w"].numpy() - order["w"].numpy()).max() < 0.001
    replies = messages(rows, [9999, *[10] * 7])
    next(iter(replies[0].content.metric_records.values()))["loss"] = 9.0
    _, metrics = flower.FedMedian().aggregate_train(1, replies)
    assert metrics is not None
    assert metrics["loss"] == pytest.approx((100 * 9 + 7 * 10 * 0.5) / 170)


def test_rows_with_nan_do_not_freeze_a_mean_of_many() -> None:
    rows = [honest(k) for k in range(10)]
    for k in range(3):
        rows[k] = {key: value * np.nan for key, value in rows[k].items()}
    arrays, _ = flower.MultiKrum(num_malicious_nodes=3, num_nodes_to_select=9).aggregate_train(1, messages(rows))
    assert arrays is not None
    results = [fitted(list(row.values())) for row in [{k: np.atleast_1d(v) for k, v in row.items()} for row in rows]]
    got, _ = flower_server.Krum(num_malicious_clients=3, num_clients_to_keep=9).aggregate_fit(2, results, [])
    assert got is not None


def test_a_row_by_columns_is_copied_alone() -> None:
    data = Array(np.asfortranarray(np.ones((3, 4), np.float32))).data
    assert flower.decoded(data).flags.c_contiguous
    with pytest.raises(ValueError, match="its stype is"):
        flower._decoded(Array("f8," * 1_000_000, (3,), "numpy.ndarray", data))


def test_a_centre_of_bfloat16_is_decoded() -> None:
    half = np.ones(3, np.float32).astype(ml_dtypes.bfloat16)
    plain = Array(half.view("V2"))
    sent = ArrayRecord({"w": Array("bfloat16", (3,), plain.stype, plain.data)})
    strategy = flower.RobustStrategy("ctma(centre)", f=1)
    strategy.configure_train(1, sent, ConfigRecord({}), OwnGrid(3, None, None))
    assert strategy._sent is not None
    assert strategy._sent["w"].dtype == ml_dtypes.bfloat16


def test_f_shrinks_by_what_is_left_out() -> None:
    rows = [honest(k) for k in range(9)]
    strategy = flower.RobustStrategy("trimmed_mean", f=2)
    arrays, _ = strategy.aggregate_train(1, messages([*rows, {"w": np.ones(1, np.float32)}]))
    assert arrays is not None
    assert strategy.info is not None
    assert (strategy.info.n, strategy.info.f) == (9, 1)
    np.testing.assert_allclose(arrays["w"].numpy(), rk.trimmed_mean(np.stack([row["w"] for row in rows]), f=1))


def test_claims_are_capped() -> None:
    rows = [honest(k) for k in range(5)]
    claims = [10, 20, 30, 40, 900]
    for f, weights in ((0, [10, 20, 30, 40, 300]), (1, [10, 20, 30, 40, 60]), (2, [1, 1, 1, 1, 1])):
        strategy = flower.RobustStrategy("mean", f=f, weighted=True)
        arrays, _ = strategy.aggregate_train(1, messages(rows, claims))
        assert arrays is not None
        assert strategy.info is not None
        np.testing.assert_allclose(strategy.info.weights, np.array(weights) / sum(weights))
    zero, _ = flower.RobustStrategy("median", f=1, weighted=True).aggregate_train(1, messages(rows, [0, 0, 0, 0, 9]))
    assert zero is not None
    want = np.average([row["w"] for row in rows], axis=0, weights=[10, 20, 30, 40, 300])
    arrays, _ = flower.MultiKrum(num_nodes_to_select=5).aggregate_train(1, messages(rows, claims))
    assert arrays is not None
    np.testing.assert_allclose(arrays["w"].numpy(), want, rtol=1e-5)


def test_layers_of_integers_and_of_bfloat16() -> None:
    rows = [
        {"w": honest(k)["w"], "count": np.asarray(k), "half": honest(k)["b"].astype(ml_dtypes.bfloat16)}
        for k in range(4)
    ]

    def sent(row: Values) -> RecordDict:
        plain = Array(row["half"].view("V2"))
        half = Array("bfloat16", row["half"].shape, plain.stype, plain.data)
        return RecordDict(
            {
                "arrays": ArrayRecord({"w": Array(row["w"]), "count": Array(row["count"]), "half": half}),
                "metrics": MetricRecord({"num-examples": 1}),
            }
        )

    asked = Message(RecordDict(), 1, MessageType.TRAIN)
    replies = [SimpleNamespace(content=sent(row), metadata=None, has_error=lambda: False) for row in rows]
    arrays, _ = flower.FedMedian().aggregate_train(1, replies)  # type: ignore[arg-type]
    assert asked is not None
    assert arrays is not None
    assert arrays["count"].numpy() == 1.5
    assert arrays["count"].numpy().dtype == np.float64  # as Flower's
    assert arrays["half"].dtype == "bfloat16"
    want = rk.median(np.stack([row["half"] for row in rows]))
    assert np.array_equal(arrays["half"].numpy().view(ml_dtypes.bfloat16), want)
    arrays, _ = flower.RobustStrategy("median", f=1).aggregate_train(1, replies)  # type: ignore[arg-type]
    assert arrays is not None
    assert arrays["count"].numpy() == 1  # an actual value
    only = [
        SimpleNamespace(
            content=reply({"k": np.arange(3) + 10 * (k == 2)}, {"num-examples": 1}),
            metadata=None,
            has_error=lambda: False,
        )
        for k in range(5)
    ]
    arrays, _ = flower.Krum(num_malicious_nodes=1).aggregate_train(1, only)  # type: ignore[arg-type]
    assert arrays is not None
    assert np.array_equal(arrays["k"].numpy(), np.arange(3))


def test_nothing_is_decoded_but_headers() -> None:
    data = Array(np.arange(12, dtype=np.float32).reshape(3, 4)).data
    view = flower.decoded(data)
    assert np.array_equal(view, np.arange(12).reshape(3, 4))
    assert np.shares_memory(view, np.frombuffer(data, np.uint8))
    turned = flower.decoded(Array(np.asfortranarray(view)).data)
    assert np.array_equal(turned, view)
    assert turned.flags.c_contiguous


def test_metrics_by_their_median() -> None:
    records = [
        RecordDict({"m": MetricRecord({"num-examples": n, "loss": x, "hist": [x, 1.0]})})
        for n, x in ((1, 0.5), (9**9, 1e300), (2, 0.7))
    ]
    assert dict(flower.median_metricrecords(records, "num-examples")) == {"loss": 0.7, "hist": [0.7, 1.0]}
    zero = messages([honest(k) for k in range(3)], [0, 0, 0])
    assert flower.FedMedian().aggregate_train(1, zero)[1] == MetricRecord({"loss": 0.5})


def test_what_a_strategy_refuses() -> None:
    for options, message in (
        ({}, "pass f or delta; got f=None, delta=None"),
        ({"f": 1, "delta": 0.1}, "pass f or delta; got f=1, delta=0.1"),
        ({"f": -1}, "f must be an integer of at least 0; got -1"),
        ({"delta": 0.5}, "delta must satisfy 0 <= delta < 0.5; got 0.5"),
        ({"f": 1, "weighted": True}, r"krum takes no weights \(drop weighted=True\)"),
    ):
        with pytest.raises(ValueError, match=message):
            flower.RobustStrategy("krum", **options)  # type: ignore[arg-type]
    for rule in ("monna", "nnm | monna(pivot=2)", "ctma(monna)"):
        with pytest.raises(ValueError, match="trusts a row by its number"):
            flower.RobustStrategy(rule, f=1)
    assert flower.RobustStrategy("monna(pivot='centre')", f=1).rule.points == ("centre",)
    with pytest.raises(ValueError, match="'medain' is not known"):
        flower.RobustStrategy("medain", f=1)


# ---- the older API -----------------------------------------------------------------------------------------------------


def fitted(layers: list[NDArray[Any]], examples: Any = 10, tensors: list[bytes] | None = None) -> Any:
    parameters = ndarrays_to_parameters(layers)
    if tensors is not None:
        parameters = Parameters(tensors, parameters.tensor_type)
    return SimpleNamespace(cid="7"), FitRes(Status(Code.OK, ""), parameters, examples, {"loss": 0.5})


def layers_of(seed: int) -> list[NDArray[Any]]:
    return [np.atleast_1d(value) for value in honest(seed).values()]


OLDER: dict[str, dict[str, Any]] = {
    "FedMedian": {},
    "FedTrimmedAvg": {"beta": 0.25},
    "Krum": {"num_malicious_clients": 1},
    "Bulyan": {"num_malicious_clients": 1, "to_keep": 0},
}


@pytest.mark.parametrize("name", OLDER)
def test_older_strategies_are_flowers(name: str) -> None:
    results = [fitted(layers_of(k), 10 + k) for k in range(9)]
    options = OLDER[name] | {"fit_metrics_aggregation_fn": lambda metrics: {"count": len(metrics)}}
    found = [getattr(module, name)(**options).aggregate_fit(1, results, []) for module in (older, flower_server)]
    (want, metrics), (got, ours) = found
    assert ours == metrics == {"count": 9}
    for a, b in zip(parameters_to_ndarrays(got), parameters_to_ndarrays(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
        assert a.dtype == b.dtype
    strategy = getattr(flower_server, name)(**OLDER[name])
    assert repr(strategy) == f"{name}(accept_failures=True)"
    assert strategy.aggregate_fit(1, [], []) == (None, {})
    strategy.accept_failures = False
    assert strategy.aggregate_fit(1, results, [ValueError()]) == (None, {})


@pytest.mark.parametrize("name", OLDER)
@pytest.mark.parametrize("bad", ["garbage", "shape", "examples", "negative", "nan"])
def test_no_older_result_ends_a_run(name: str, bad: str) -> None:
    results = [fitted(layers_of(k)) for k in range(8)]
    hostile = {
        "garbage": lambda: fitted(layers_of(0), tensors=[b"garbage"] * 3),
        "shape": lambda: fitted([np.ones(2, np.float32)]),
        "examples": lambda: fitted(layers_of(0), 10**15),
        "negative": lambda: fitted(layers_of(0), -5),
        "nan": lambda: fitted([x * np.nan for x in layers_of(0)]),
    }[bad]()
    strategy = getattr(flower_server, name)(**OLDER[name])
    got, _ = strategy.aggregate_fit(2, [hostile, *results], [])
    if name == "Bulyan" and bad == "nan":
        assert got is not None
    for k, x in enumerate(parameters_to_ndarrays(got)):
        rows = np.stack([layers_of(i)[k] for i in range(8)])
        assert ((x >= rows.min(axis=0) - 1e-6) & (x <= rows.max(axis=0) + 1e-6)).all()
    few = getattr(flower_server, name)(**OLDER[name])
    worst = [fitted([np.ones(k, np.float32)]) for k in range(1, 12)]
    assert few.aggregate_fit(1, worst, []) == (None, {})
    nans = [fitted([x * np.nan for x in layers_of(0)])] * 5
    assert few.aggregate_fit(1, [*nans, *results[:3]], []) == (None, {})


@pytest.mark.parametrize(
    ("hostile", "reason"),
    [
        (lambda: fitted(layers_of(0), -5), "its num_examples is no count"),
        (lambda: fitted(layers_of(0), "many"), "its num_examples is no count"),
        (lambda: fitted(layers_of(0), float("nan")), "its num_examples is no count"),
        (lambda: fitted([]), "it holds no layers"),
        (lambda: fitted(layers_of(0), tensors=[npy("<U8", (3,), b"\0" * 96)]), "its dtype is <U8"),
    ],
)
def test_older_results_that_cannot_be_used_say_why(
    hostile: Callable[[], Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "flwr")
    results = [fitted(layers_of(k)) for k in range(4)]
    got, _ = flower_server.FedMedian().aggregate_fit(2, [hostile(), *results], [])
    for k, x in enumerate(parameters_to_ndarrays(got)):
        np.testing.assert_allclose(x, np.median([layers_of(i)[k] for i in range(4)], axis=0), rtol=1e-6)
    assert f"robustkern: a reply is left out, and counted as a bad one: client 7: {reason}" in caplog.messages


@pytest.mark.parametrize("bad", ["negative", "nan loss", "nan metric", "no metric", "absurd"])
def test_no_older_evaluation_ends_a_run(bad: str) -> None:
    def evaluated(loss: float = 0.5, examples: int = 10, metrics: Any = None) -> Any:
        return SimpleNamespace(cid="7"), EvaluateRes(
            Status(Code.OK, ""), loss, examples, {"acc": 0.1} if metrics is None else metrics
        )

    hostile = {
        "negative": evaluated(examples=-20),
        "nan loss": evaluated(float("nan")),
        "nan metric": evaluated(metrics={"acc": float("nan")}),
        "no metric": evaluated(metrics={}),
        "absurd": evaluated(9e9, 10**15),
    }[bad]
    strategy = flower_server.FedMedian(
        evaluate_metrics_aggregation_fn=lambda pairs: {
            "acc": sum(n * m["acc"] for n, m in pairs) / sum(n for n, _ in pairs)
        }
    )
    loss, metrics = strategy.aggregate_evaluate(2, [evaluated(), hostile, evaluated(), evaluated()], [])
    assert loss == 0.5
    assert metrics == {"acc": pytest.approx(0.1)}
    if bad in ("negative", "nan loss", "nan metric"):  # what all send alike is no evidence against any
        assert strategy.aggregate_evaluate(2, [hostile, hostile], []) == (None, {})


def test_older_claims_are_capped() -> None:
    results = [fitted([np.full(3, 1 + k / 100, np.float32)]) for k in range(8)]
    for claim in (0, 0.5, 9999):
        results[3][1].num_examples = claim
        got, _ = flower_server.Krum(num_malicious_clients=1, num_clients_to_keep=5).aggregate_fit(2, results, [])
        assert np.isfinite(parameters_to_ndarrays(got)[0]).all()
        one, _ = flower_server.Krum(num_malicious_clients=1, num_clients_to_keep=1).aggregate_fit(2, results, [])
        assert np.isfinite(parameters_to_ndarrays(one)[0]).all()
    assert abs(parameters_to_ndarrays(got)[0][0] - 1.03) < 0.02
    few = flower_server.Bulyan(num_malicious_clients=1, to_keep=0)
    assert few.aggregate_fit(2, results[:6], []) == (None, {})


def test_functions_over_results() -> None:
    results = [(layers_of(k), 10 + k) for k in range(9)]
    before = [[x.copy() for x in layers] for layers, _ in results]
    from flwr.server.strategy import aggregate as functions

    for ours, theirs in (
        (flower_server.aggregate_median(results), functions.aggregate_median(results)),
        (flower_server.aggregate_trimmed_avg(results, 0.25), functions.aggregate_trimmed_avg(results, 0.25)),
        (flower_server.aggregate_krum(results, 1, 0), functions.aggregate_krum(results, 1, 0)),
        (flower_server.aggregate_krum(results, 1, 4), functions.aggregate_krum(results, 1, 4)),
        (
            flower_server.aggregate_bulyan(results, 1),
            functions.aggregate_bulyan(list(results), 1, functions.aggregate_krum, to_keep=0),
        ),
    ):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    everybody = flower_server.aggregate_krum(results, 1, 20)  # more than there are: all of them
    np.testing.assert_allclose(everybody[0], functions.aggregate(results)[0], rtol=1e-5)
    assert all(
        np.array_equal(a, b)
        for (layers, _), old in zip(results, before, strict=True)
        for a, b in zip(layers, old, strict=True)
    )
    whole = [([np.array([k, 2 * k])], 1) for k in range(4)]
    assert flower_server.aggregate_median(whole)[0].tolist() == [1.5, 3.0]
    for call, message in (
        (lambda: flower_server.aggregate_bulyan(results[:6], 1), r"4\*f \+ 3 must be at most n; got f=1 with n=6"),
        (lambda: flower_server.aggregate_bulyan(results, 1, max), "only aggregate_krum is supported as the first rule"),
        (lambda: flower_server.aggregate_bulyan(results, 1, to_keep=2), "to_keep must be 0; got 2"),
        (lambda: flower_server.Bulyan(first_aggregation_rule=max), "Bulyan: only aggregate_krum is supported as the"),
        (lambda: flower_server.Bulyan(to_keep=2), "Bulyan: to_keep must be 0; got 2"),
        (
            lambda: flower_server.aggregate_trimmed_avg(results, 0.5),
            "proportiontocut must satisfy 0 <= proportiontocut",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
