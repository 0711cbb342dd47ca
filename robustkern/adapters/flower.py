"""Strategies for Flower's message API (1.42) that no hostile client can stop: drop-ins, and any rule at all.

``from robustkern.adapters.flower import FedMedian, FedTrimmedAvg, Krum, MultiKrum, Bulyan`` instead of from
``flwr.serverapp.strategy``: the same parameters in the same order, the same bytes from honest clients. Besides,
`RobustStrategy` runs any rule of this library.

What a reply holds is used where it lies: nothing is decoded but its header. A reply that cannot be used, because it
cannot be decoded, its header lies, its keys, shapes or dtypes are not those that most replies share, or its metrics are
not numbers, is counted as one of the f bad ones, logged, and left out: the rule runs on the other n-k with f-k. Where
more than f cannot be used, the round changes nothing (the strategies return ``(None, None)``).
"""

from __future__ import annotations

import ast
import functools
import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from logging import WARNING
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from robustkern.adapters import needs

with needs("flower"):
    from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
    from flwr.serverapp import strategy as builtin
    from flwr.serverapp.strategy.multikrum import select_multikrum
    from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords
    from flwr.supercore import log

from robustkern.adapters.replies import CAP, Read, checked_limit, checked_rule, most_of, sorted_out
from robustkern.engine import Info
from robustkern.errors import NonFiniteError, brief, plain
from robustkern.functions import aggregate, mean_around_median
from robustkern.rules import Aggregator, Median, TrimmedMean
from robustkern.rules import MultiKrum as MultiKrumRule

__all__ = [
    "Bulyan",
    "FedMedian",
    "FedTrimmedAvg",
    "Krum",
    "MultiKrum",
    "RobustStrategy",
    "decoded",
    "median_metricrecords",
]

Layers = dict[str, NDArray[Any]]
AT_ONCE = 1 << 16  # values; 2^15 and 2^17 take as long, all at once a third longer
MAX_HEADER, MAX_DTYPE = 1 << 14, 64  # bytes of an array's description, of which NumPy's own has 128; and of a name


# ---- replies ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def _header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read the description of an array as NumPy writes it: shape, whether columns come first, dtype."""
    found = ast.literal_eval(data.decode("latin1"))
    shape, order, descr = found["shape"], found["fortran_order"], found["descr"]
    if found.keys() != {"shape", "fortran_order", "descr"} or not isinstance(shape, tuple):
        raise ValueError("its header is none of NumPy's")
    if any(type(size) is not int or size < 0 for size in shape) or not isinstance(descr, str):
        raise ValueError("its header holds a shape or dtype that is none")
    return shape, bool(order), np.dtype(descr)


def decoded(data: Any, stored: str = "") -> NDArray[Any]:
    """Return the array that bytes hold as NumPy writes it, as a view of them; raise ValueError where they hold none."""
    if not isinstance(data, bytes) or data[:6] != b"\x93NUMPY":
        raise ValueError("it is no array of NumPy's")
    version = data[6]
    begin = 12 if version >= 2 else 10
    length = int.from_bytes(data[8:begin], "little")
    if version not in (1, 2, 3) or length > MAX_HEADER:
        raise ValueError("its header is too long, or of an unknown version")
    shape, columns_first, dtype = _header(data[begin : begin + length])
    if dtype == np.dtype("V2") and stored == "bfloat16":
        dtype = np.dtype(ml_dtypes.bfloat16)
    if dtype.kind not in "fiubc" and dtype != ml_dtypes.bfloat16:
        raise ValueError(f"its dtype is {dtype}")
    count = math.prod(shape)
    if count * dtype.itemsize > len(data) - begin - length:
        raise ValueError(f"it holds fewer bytes than its shape {brief(shape)} takes")
    flat: NDArray[Any] = np.frombuffer(data, dtype, count, begin + length)
    if columns_first:  # copied: one such row would make all be read number by number
        flat = np.ascontiguousarray(flat.reshape(shape, order="F"))
    flat = flat.reshape(shape)
    return flat if dtype.isnative else flat.astype(dtype.newbyteorder("="))


def _decoded(array: Array) -> NDArray[Any]:
    """Return what an array of a reply holds; raise where it is not what it says."""
    if array.stype != "numpy.ndarray" or not isinstance(array.dtype, str) or len(array.dtype) > MAX_DTYPE:
        raise ValueError(f"its stype is {brief(array.stype)}")
    found = decoded(array.data, array.dtype)
    if tuple(array.shape) != found.shape or np.dtype(array.dtype).newbyteorder("=") != found.dtype:
        raise ValueError(
            f"it says {brief(array.shape)} of {brief(array.dtype)}, and holds {found.shape} of {found.dtype}"
        )
    return found


class _Reply(NamedTuple):
    """A reply that can be used.

    Attributes
    ----------
    content : RecordDict
        As it came.
    name : str
        Of its record of arrays.
    layers : dict of str to array
        Its arrays, by key.
    examples : float
        How many it claims to have; 1 where it need not say.
    """

    content: RecordDict
    name: str
    layers: Layers
    examples: float


def _read(message: Message, weighted_by_key: str, arrays: bool) -> Read[_Reply]:
    """Read a reply; whatever is wrong with it is an exception that says so."""
    content = message.content
    found = {name: record for name, record in content.items() if isinstance(record, ArrayRecord)}
    metrics = {name: record for name, record in content.items() if isinstance(record, MetricRecord)}
    if len(metrics) != 1 or (arrays and len(found) != 1):
        raise ValueError(f"it holds {len(found)} records of arrays and {len(metrics)} of metrics")
    name, record = next(iter(found.items())) if arrays else ("", {})
    layers = {key: _decoded(array) for key, array in record.items()}
    if arrays and not layers:
        raise ValueError("it holds no arrays")
    ((metric_name, metric_record),) = metrics.items()
    kinds = []
    for key, value in metric_record.items():
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
            raise ValueError(f"its metric {plain(repr(key), 80)} is not a finite number")
        kinds.append((key, len(value) if isinstance(value, list) else None))
    examples = metric_record.get(weighted_by_key)
    if not isinstance(examples, (int, float)) or examples < 0:
        raise ValueError(f"its {weighted_by_key} is {brief(examples)}")
    form = (name, frozenset((key, x.shape, x.dtype) for key, x in layers.items()), metric_name)
    reply = _Reply(content, name, layers, float(examples))
    return Read(reply, (form, repr(sorted(kinds, key=repr))), reply.examples)


def _sorted(messages: Sequence[Message], weighted_by_key: str, arrays: bool) -> tuple[list[_Reply], int]:
    """Return the replies that can be used, and how many cannot, which are logged."""
    heard: set[int] = set()

    def read(message: Message) -> Read[_Reply]:
        node = _node(message)
        if node in heard:
            raise ValueError("it has replied before")
        heard.update(() if node is None else (node,))
        return _read(message, weighted_by_key, arrays)

    def sender(message: Message) -> str:
        return f"node {_node(message)}"

    return sorted_out(messages, read, sender, functools.partial(log, WARNING))


def _node(message: Message) -> int | None:
    node = getattr(getattr(message, "metadata", None), "src_node_id", None)
    return node if isinstance(node, int) else None


# ---- from rows to a record -----------------------------------------------------------------------------------------


def _floats(rows: list[Layers]) -> list[Layers]:
    """Return the rows with layers of integers as float64, as the built-in strategies take and return them."""
    whole = [key for key, x in rows[0].items() if x.dtype.kind in "iub"]
    return [{**row, **{key: row[key].astype(np.float64) for key in whole}} for row in rows] if whole else rows


def _encoded(layers: Layers) -> ArrayRecord:
    record = {}
    for key, value in layers.items():
        x = np.asarray(value)
        if x.dtype == ml_dtypes.bfloat16:
            plain = Array(np.asarray(x).view("V2"))
            record[key] = Array("bfloat16", x.shape, plain.stype, plain.data)
        else:
            record[key] = Array(x)
    return ArrayRecord(record)


def _claiming(reply: _Reply, most: float, weighted_by_key: str) -> RecordDict:
    """Return a reply's content, in which it claims so many examples at most."""
    if reply.examples <= most:
        return reply.content
    ((name, metrics),) = reply.content.metric_records.items()
    changed = MetricRecord({**metrics, weighted_by_key: most})
    return RecordDict({key: changed if key == name else record for key, record in reply.content.items()})


def median_metricrecords(records: list[RecordDict], weighting_metric_name: str) -> MetricRecord:
    """Return the median of each metric, whoever claims how many examples; lists elementwise.

    For ``train_metrics_aggr_fn`` and ``evaluate_metrics_aggr_fn``: what fewer than half of the clients report does not
    move it beyond what the others report.

    Parameters
    ----------
    records : list of RecordDict
        Of which each has one record of metrics, with the same keys.
    weighting_metric_name : str
        A key that the result lacks, as in Flower's own.

    Returns
    -------
    MetricRecord
        By the same keys.
    """
    metrics = [next(iter(record.metric_records.values())) for record in records]
    found = {
        key: np.median(np.array([m[key] for m in metrics], dtype=np.float64), axis=0).tolist()
        for key in metrics[0]
        if key != weighting_metric_name
    }
    return MetricRecord(found)


# ---- strategies ------------------------------------------------------------------------------------------------------


class _Robust(builtin.FedAvg):
    """What all strategies here have in common: replies that cannot be used do not end a run."""

    @abstractmethod
    def _limit(self, n: int) -> int:
        """Return how many of n replies may be bad."""

    @abstractmethod
    def _combined(self, replies: list[_Reply], f: int) -> tuple[Layers, list[_Reply]]:
        """Return the new layers, and the replies whose metrics count, given that f more may be bad."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Combine one round's replies; ``(None, None)`` where more cannot be used than may be bad."""
        messages, _ = self._check_and_log_replies(replies, is_train=True, validate=False)
        good, bad = _sorted(messages, self.weighted_by_key, True)
        f = self._limit(len(messages))
        if not good or bad > f:
            if messages:
                log(
                    WARNING, "robustkern: %d of %d replies cannot be used, f=%d; nothing changes", bad, len(messages), f
                )
            return None, None
        try:
            layers, counted = self._combined(good, f - bad)
        except ValueError as error:  # too many rows with NaN, or too few rows for f
            log(WARNING, "robustkern: %s; nothing changes", error)
            return None, None
        order = Counter(tuple(reply.layers) for reply in good).most_common(1)[0][0]
        arrays = _encoded({key: layers[key] for key in order})
        return arrays, self._metrics(self.train_metrics_aggr_fn, counted, _most(good))

    def _metrics(
        self, combine: Callable[[list[RecordDict], str], MetricRecord], replies: list[_Reply], most: float
    ) -> MetricRecord:
        """Combine metrics, by claims of so many examples at most; where all claim none, by their median."""
        if combine is aggregate_metricrecords and not any(min(reply.examples, most) for reply in replies):
            combine = median_metricrecords
        contents = [_claiming(reply, most, self.weighted_by_key) for reply in replies]
        return combine(contents, self.weighted_by_key)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Combine the metrics of one round's replies; None where half or more cannot be used."""
        messages, _ = self._check_and_log_replies(replies, is_train=False, validate=False)
        good, bad = _sorted(messages, self.weighted_by_key, False)
        if not good or bad > (len(messages) - 1) // 2:
            return None
        return self._metrics(self.evaluate_metrics_aggr_fn, good, _most(good))


class FedMedian(_Robust, builtin.FedMedian):
    """Coordinate-wise median: up to (n-1)//2 replies may be bad."""

    def _limit(self, n: int) -> int:
        return (n - 1) // 2

    def _combined(self, replies: list[_Reply], f: int) -> tuple[Layers, list[_Reply]]:
        return aggregate(_floats([reply.layers for reply in replies]), Median(), f=f), replies


class FedTrimmedAvg(_Robust, builtin.FedTrimmedAvg):
    """Coordinate-wise mean without int(beta n) values at each end, which may be bad."""

    def _limit(self, n: int) -> int:
        return int(self.beta * n)

    def _combined(self, replies: list[_Reply], f: int) -> tuple[Layers, list[_Reply]]:
        return aggregate(_floats([reply.layers for reply in replies]), TrimmedMean(), f=f), replies


def krum_order(rows: Sequence[Any], f: int, count: int) -> tuple[int, ...]:
    """Return the rows of best Krum score by Flower's conventions, best first: `count`, or all without NaN if fewer."""
    n = len(rows)
    rule = MultiKrumRule(m=min(max(count, 1), n), neighbours=min(max(1, n - f - 2), n - 1))
    f = min(max(f, 0), (n - 1) // 2)
    try:
        info: Info = aggregate(rows, rule, f=f, return_info=True)[1]
    except NonFiniteError as error:
        if len(error.rows) > f:
            raise
        info = aggregate(rows, replace(rule, m=n - len(error.rows)), f=f, return_info=True)[1]
    assert info.order is not None
    return info.order


def _selected(replies: list[_Reply], f: int, count: int) -> list[_Reply]:
    return [replies[i] for i in krum_order(_floats([reply.layers for reply in replies]), f, count)]


def _weighted_mean(replies: list[_Reply], most: float) -> Layers:
    """Return the mean by claimed examples, of which so many count at most, summed in order as Flower does."""
    claims = np.minimum([reply.examples for reply in replies], most)
    if not claims.any():
        claims = np.ones(len(claims))
    shares = [float(claim) / float(claims.sum()) for claim in claims]
    result: Layers = {}
    for key, first in replies[0].layers.items():
        rows = [reply.layers[key].reshape(-1) for reply in replies]
        total = rows[0] * shares[0]
        for begin in range(0, total.size, AT_ONCE):  # a part of the sum stays in the caches until all rows are in it
            part = slice(begin, begin + AT_ONCE)
            for row, share in zip(rows[1:], shares[1:], strict=True):
                total[part] += row[part] * share
        result[key] = total.reshape(first.shape)
    return result


def _finite(replies: list[_Reply], f: int) -> tuple[list[_Reply], int]:
    """Return the replies without NaN or Inf, which a rule that is not ours need not stand, and how many more are bad.

    Raises
    ------
    NonFiniteError
        If more than f hold some.
    """
    bad = [i for i, reply in enumerate(replies) if not all(np.isfinite(x).all() for x in reply.layers.values())]
    if len(bad) > f:
        raise NonFiniteError(
            f"{len(bad)} of {len(replies)} replies hold NaN or Inf, f={f} (raise num_malicious_nodes, or look at them)",
            tuple(bad),
        )
    return [reply for i, reply in enumerate(replies) if i not in bad], f - len(bad)


def _most(replies: list[_Reply]) -> float:
    return most_of(reply.examples for reply in replies)


def _capped(claims: NDArray[np.float64], f: int) -> NDArray[np.float64]:
    """Return claims as weights: at most `CAP` times their median, and so that any f of them stay below half of all."""
    middle = float(np.median(claims))
    for cap in (CAP, CAP / 2, CAP / 5, CAP / 10):
        weights = np.minimum(claims, cap * middle)
        if 2 * np.sort(weights)[len(weights) - f :].sum() < 0.98 * weights.sum():
            return weights
    return np.ones(len(claims))


class MultiKrum(_Robust, builtin.MultiKrum):
    """Mean, by claimed examples, of the `num_nodes_to_select` replies of best Krum score."""

    def _limit(self, n: int) -> int:
        return max(int(self.num_malicious_nodes), 0)

    def _combined(self, replies: list[_Reply], f: int) -> tuple[Layers, list[_Reply]]:
        selected = _selected(replies, f, max(int(self.num_nodes_to_select), 1))
        return _weighted_mean(selected, _most(replies)), selected


class Krum(MultiKrum, builtin.Krum):
    """The reply of best Krum score."""


class Bulyan(_Robust, builtin.Bulyan):
    """Per coordinate, around the median of n-2f replies that Krum, or `selection_rule`, selects; n >= 4f + 3.

    What `selection_rule` gets holds neither NaN nor Inf.
    """

    def _limit(self, n: int) -> int:
        return max(int(self.num_malicious_nodes), 0)

    def _combined(self, replies: list[_Reply], f: int) -> tuple[Layers, list[_Reply]]:
        if self.selection_rule is select_multikrum:
            selected = _selected(replies, f, len(replies) - 2 * f)
        else:
            replies, f = _finite(replies, f)
            chosen = self.selection_rule([reply.content for reply in replies], f, len(replies) - 2 * f)
            by_content = {id(reply.content): reply for reply in replies}
            selected = [by_content[id(content)] for content in chosen]
        rows = _floats([reply.layers for reply in selected])
        return mean_around_median(rows, count=max(len(rows) - 2 * f, 1)), selected

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Combine one round's replies; ``(None, None)`` where fewer than 4f + 3 came."""
        replies = list(replies)
        came, f = sum(not reply.has_error() for reply in replies), self._limit(len(replies))
        if came < 4 * f + 3:
            log(WARNING, "Bulyan needs at least 4f + 3 = %d replies; got %d", 4 * f + 3, came)
            return None, None
        return super().aggregate_train(server_round, replies)


class RobustStrategy(_Robust):
    """Any rule: ``RobustStrategy("ctma(geometric_median)", f=2)``.

    Parameters
    ----------
    rule : rule object or str
        As for `robustkern.aggregate`; one that measures from a centre gets the arrays that were sent.
    f, delta
        How many replies, or which share of them, may be bad; one of them is required.
    weighted : bool
        Whether rows weigh as many examples as they claim, for rules that take weights: at most ten times the median of
        the claims, or so much less that any f rows stay below half of the weight, the share that the rule then cuts.
    train_metrics_aggr_fn, evaluate_metrics_aggr_fn : callable, optional
        By default `median_metricrecords`.
    **kwargs
        As for ``flwr.serverapp.strategy.FedAvg``.

    Attributes
    ----------
    info : Info or None
        What was found out in the last round.

    Raises
    ------
    TypeError, ValueError
        If the rule is none, or neither f nor delta is given.
    """

    def __init__(
        self,
        rule: Aggregator | str,
        /,
        *,
        f: int | None = None,
        delta: float | None = None,
        weighted: bool = False,
        train_metrics_aggr_fn: Callable[[list[RecordDict], str], MetricRecord] | None = None,
        evaluate_metrics_aggr_fn: Callable[[list[RecordDict], str], MetricRecord] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            train_metrics_aggr_fn=train_metrics_aggr_fn or median_metricrecords,
            evaluate_metrics_aggr_fn=evaluate_metrics_aggr_fn or median_metricrecords,
            **kwargs,
        )
        self.rule = checked_rule("RobustStrategy", rule, has_centre=True)
        self._count = checked_limit("RobustStrategy", f, delta)
        if weighted and not self.rule.supports_weights:
            raise ValueError(f"RobustStrategy: {self.rule} takes no weights (drop weighted=True)")
        self.f, self.delta, self.weighted = f, delta, weighted
        self.info: Info | None = None
        self._sent: Layers | None = None

    def _limit(self, n: int) -> int:
        return self._count(n)

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Any) -> Any:
        """Send the arrays, which rules with a centre measure from."""
        if "centre" in self.rule.points:
            self._sent = {key: _decoded(array) for key, array in arrays.items()}
        return super().configure_train(server_round, arrays, config, grid)

    def _combined(self, replies: list[_Reply], f: int) -> tuple[Layers, list[_Reply]]:
        weights = None
        if self.weighted:
            weights = _capped(np.array([reply.examples for reply in replies]), f)
        result, self.info = aggregate(
            [reply.layers for reply in replies],
            self.rule,
            f=f,
            weights=weights,
            centre=self._sent if "centre" in self.rule.points else None,
            return_info=True,
        )
        return result, replies
