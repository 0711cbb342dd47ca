"""Strategies for Flower's older API (``flwr.server.strategy``), and its functions over ``[(layers, examples)]``.

``from robustkern.adapters.flower_server import FedMedian, FedTrimmedAvg, Krum, Bulyan``: same parameters, same results
from honest clients. Results that cannot be used are counted as bad, logged and left out as in
`robustkern.adapters.flower`; where more than f cannot be used a round returns ``(None, {})``, which changes nothing.
"""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from logging import WARNING
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustkern.adapters import needs

with needs("flower"):
    from flwr.common import EvaluateRes, FitRes, Parameters, Scalar, ndarrays_to_parameters
    from flwr.server import strategy as builtin
    from flwr.server.client_proxy import ClientProxy
    from flwr.server.strategy.aggregate import aggregate_krum as builtin_krum
    from flwr.supercore import log

from robustkern.adapters.flower import decoded, krum_order
from robustkern.adapters.replies import Read, most_of, sorted_out
from robustkern.functions import aggregate as combine
from robustkern.rules import Bulyan as BulyanRule
from robustkern.rules import Median, TrimmedMean

__all__ = [
    "Bulyan",
    "FedMedian",
    "FedTrimmedAvg",
    "Krum",
    "aggregate_bulyan",
    "aggregate_krum",
    "aggregate_median",
    "aggregate_trimmed_avg",
]

Layers = list[NDArray[Any]]
Results = list[tuple[Layers, int]]


# ---- functions over results ------------------------------------------------------------------------------------------


def _rows(results: Results) -> list[Layers]:
    """Return the layers, those of integers as float64 as Flower returns them."""
    whole = [k for k, x in enumerate(results[0][0]) if np.asarray(x).dtype.kind in "iub"]
    if not whole:
        return [[np.asarray(x) for x in layers] for layers, _ in results]
    return [[np.asarray(x, np.float64 if k in whole else None) for k, x in enumerate(layers)] for layers, _ in results]


def aggregate_median(results: Results) -> Layers:
    """Return the coordinate-wise median of each layer; one read of the data."""
    return combine(_rows(results), Median())


def aggregate_trimmed_avg(results: Results, proportiontocut: float) -> Layers:
    """Return the coordinate-wise mean without int(proportiontocut n) values at each end; one read of the data."""
    if not 0 <= proportiontocut < 0.5:
        raise ValueError(f"proportiontocut must satisfy 0 <= proportiontocut < 0.5; got {proportiontocut!r}")
    return combine(_rows(results), TrimmedMean(), f=int(proportiontocut * len(results)))


def aggregate_krum(results: Results, num_malicious: int, to_keep: int) -> Layers:
    """Return the layers of best Krum score, or the mean by examples of the `to_keep` best, at most all."""
    order = krum_order(_rows(results), num_malicious, to_keep)
    if to_keep <= 0:
        return results[order[0]][0]
    kept = [results[i] for i in reversed(order)]  # Flower adds the worst one first
    claims = [examples for _, examples in kept]
    if not any(claims):
        claims = [1] * len(kept)
    total = sum(claims)
    layers = [[layer * examples for layer in row] for (row, _), examples in zip(kept, claims, strict=True)]
    return [np.asarray(sum(column[1:], column[0]) / total) for column in zip(*layers, strict=True)]


def aggregate_bulyan(
    results: Results, num_malicious: int, aggregation_rule: Callable[..., Layers] = aggregate_krum, **kwargs: Any
) -> Layers:
    """Return per coordinate the mean around the median of n-2f results that Krum selects one by one; n >= 4f + 3."""
    n, f = len(results), num_malicious
    if n < 4 * f + 3:
        raise ValueError(f"aggregate_bulyan: 4*f + 3 must be at most n; got f={f} with n={n} results (lower f)")
    _check_first_rule("aggregate_bulyan", aggregation_rule, kwargs)
    return combine(_rows(results), BulyanRule(), f=f)


def _check_first_rule(owner: str, rule: Callable[..., Layers], options: dict[str, Any]) -> None:
    if rule not in (aggregate_krum, builtin_krum):
        raise ValueError(f"{owner}: only aggregate_krum is supported as the first rule")
    if options.get("to_keep", 0) > 0:
        raise ValueError(f"{owner}: to_keep must be 0; got {options['to_keep']}")


# ---- strategies ------------------------------------------------------------------------------------------------------


def _sorted(results: Sequence[tuple[ClientProxy, Any]]) -> tuple[list[tuple[Layers, Any]], int]:
    """Return the results that can be used, of fits with their layers, and how many cannot, which are logged."""
    good, bad = sorted_out(
        results, _read, lambda pair: f"client {getattr(pair[0], 'cid', '?')}", functools.partial(log, WARNING)
    )
    return [(layers, _claiming(result, good)) for layers, result in good], bad


def _read(pair: tuple[ClientProxy, Any]) -> Read[tuple[Layers, Any]]:
    """Read a result; whatever is wrong with it is an exception that says so."""
    result = pair[1]
    if not _is_number(result.num_examples) or result.num_examples < 0:
        raise ValueError("its num_examples is no count")
    bad = [name for name, value in result.metrics.items() if isinstance(value, float) and not _is_number(value)]
    if bad or (isinstance(result, EvaluateRes) and not _is_number(result.loss)):
        raise ValueError("its metrics hold NaN or Inf")
    layers = [decoded(data) for data in result.parameters.tensors] if isinstance(result, FitRes) else []
    if isinstance(result, FitRes) and not layers:
        raise ValueError("it holds no layers")
    kinds = sorted((name, isinstance(value, (int, float))) for name, value in result.metrics.items())
    return Read((layers, result), repr(([(x.shape, x.dtype.str) for x in layers], kinds)), result.num_examples)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _claiming(result: Any, good: list[tuple[Layers, Any]]) -> Any:
    """Return a result that claims ten times the median of all claims at most; where that is 0, all claim 1."""
    most = most_of(other.num_examples for _, other in good)
    if most == 0:
        return replace(result, num_examples=1)
    return result if result.num_examples <= most else replace(result, num_examples=int(most))


class _Robust(builtin.FedAvg):
    """What all strategies here have in common: results that cannot be used do not end a run."""

    @abstractmethod
    def _limit(self, n: int) -> int:
        """Return how many of n results may be bad."""

    @abstractmethod
    def _combined(self, results: Results, f: int) -> Layers:
        """Return the new layers, given that f more may be bad."""

    def aggregate_fit(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, FitRes]],
        failures: list[tuple[ClientProxy, FitRes] | BaseException],
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Combine one round's results; ``(None, {})`` where more cannot be used than may be bad."""
        if not results or (failures and not self.accept_failures):
            return None, {}
        good, bad = _sorted(results)
        f = self._limit(len(results))
        if not good or bad > f:
            log(WARNING, "robustkern: %d of %d results are bad, f=%d; nothing changes", bad, len(results), f)
            return None, {}
        try:
            layers = self._combined([(layers, result.num_examples) for layers, result in good], f - bad)
        except ValueError as error:  # too many rows with NaN, or too few rows for f
            log(WARNING, "robustkern: %s; nothing changes", error)
            return None, {}
        metrics: dict[str, Scalar] = {}
        if self.fit_metrics_aggregation_fn:
            metrics = self.fit_metrics_aggregation_fn([(result.num_examples, result.metrics) for _, result in good])
        elif server_round == 1:
            log(WARNING, "No fit_metrics_aggregation_fn provided")
        return ndarrays_to_parameters(layers), metrics

    def aggregate_evaluate(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, EvaluateRes]],
        failures: list[tuple[ClientProxy, EvaluateRes] | BaseException],
    ) -> tuple[float | None, dict[str, Scalar]]:
        """Combine one round's losses and metrics; ``(None, {})`` where half or more cannot be used."""
        good, bad = _sorted(results)
        if not good or bad > (len(results) - 1) // 2:
            return None, {}
        pairs: Any = [(proxy, result) for (proxy, _), (_, result) in zip(results, good, strict=False)]
        found: tuple[float | None, dict[str, Scalar]] = super().aggregate_evaluate(server_round, pairs, failures)
        return found


class FedMedian(_Robust, builtin.FedMedian):
    """Coordinate-wise median: up to (n-1)//2 results may be bad."""

    def _limit(self, n: int) -> int:
        return (n - 1) // 2

    def _combined(self, results: Results, f: int) -> Layers:
        return aggregate_median(results)


class FedTrimmedAvg(_Robust, builtin.FedTrimmedAvg):
    """Coordinate-wise mean without int(beta n) values at each end, which may be bad."""

    def _limit(self, n: int) -> int:
        return int(self.beta * n)

    def _combined(self, results: Results, f: int) -> Layers:
        return combine(_rows(results), TrimmedMean(), f=f)


class Krum(_Robust, builtin.Krum):
    """The result of best Krum score, or the mean by examples of the `num_clients_to_keep` best."""

    def _limit(self, n: int) -> int:
        return max(int(self.num_malicious_clients), 0)

    def _combined(self, results: Results, f: int) -> Layers:
        return aggregate_krum(results, f, int(self.num_clients_to_keep))


class Bulyan(_Robust, builtin.Bulyan):
    """Per coordinate, around the median of n-2f results that Krum selects one by one; n >= 4f + 3."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        _check_first_rule("Bulyan", self.first_aggregation_rule, self.aggregation_rule_kwargs)

    def _limit(self, n: int) -> int:
        return max(int(self.num_malicious_clients), 0)

    def _combined(self, results: Results, f: int) -> Layers:
        return aggregate_bulyan(results, f, self.first_aggregation_rule, **self.aggregation_rule_kwargs)
