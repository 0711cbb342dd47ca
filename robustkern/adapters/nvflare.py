"""A model aggregator for NVFlare (2.9): any rule, and no client that ends a job.

``RobustAggregator("ctma(geometric_median)", f=2)`` where a ``ModelAggregator`` is asked for. Models that cannot be
used, because their parameters are no arrays, or have other names, shapes or dtypes than most, count as bad and are left
out: the rule runs on the other n-k with f-k. Where more than f cannot be used, the last result comes again, or for
differences zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from array_api_compat import is_torch_array

from robustkern.adapters import needs

with needs("nvflare"):
    from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
    from nvflare.app_common.aggregators.model_aggregator import ModelAggregator

from robustkern.adapters.replies import Read, checked_limit, checked_rule, sorted_out
from robustkern.engine import Info
from robustkern.errors import NonFiniteError, plain
from robustkern.functions import aggregate
from robustkern.inputs.arrays import array_view, check_dtype
from robustkern.rules import Aggregator

__all__ = ["RobustAggregator"]


class RobustAggregator(ModelAggregator):  # type: ignore[misc]
    """Combine the clients' models by a rule.

    Parameters
    ----------
    rule : rule object or str
        As for `robustkern.aggregate`; none that measures from a centre.
    f, delta
        How many models, or which share of them, may be bad; one of them is required.

    Attributes
    ----------
    info : Info or None
        What was found out in the last round.
    """

    def __init__(self, rule: Aggregator | str, f: int | None = None, delta: float | None = None) -> None:
        super().__init__()
        self.rule = checked_rule("RobustAggregator", rule, has_centre=False)
        self._limit = checked_limit("RobustAggregator", f, delta)
        self.info: Info | None = None
        self._models: list[FLModel] = []
        self._last: FLModel | None = None

    def accept_model(self, model: FLModel) -> None:
        """Take one client's model; what is lazy in it is loaded when all are combined."""
        self._models.append(model)

    def reset_stats(self) -> None:
        """Forget the models of this round."""
        self._models = []

    def aggregate_model(self) -> FLModel:
        """Combine the models of this round, and forget them."""
        models, self._models = self._models, []
        if not models:
            raise ValueError("RobustAggregator: there are no models to combine")
        good, bad = sorted_out(enumerate(models), _read, lambda pair: f"model {pair[0]}", self._say)
        f = self._limit(len(models))
        if bad <= f and good:
            try:
                params, self.info = aggregate([row for _, row in good], self.rule, f=f - bad, return_info=True)
            except ValueError as error:  # too many rows with NaN, or too few rows for f
                reason = str(error)
            else:
                return self._result(good[0][0], params)
        else:
            remedy = "raise f or delta, or look at them" if bad > f else "look at them"
            reason = f"{bad} of {len(models)} models cannot be used, f={f} ({remedy})"
        self._say(f"{reason}; nothing changes")
        if self._last is not None and self._last.params_type == ParamsType.DIFF:
            return self._result(self._last, _zeros(self._last.params))
        if good and good[0][0].params_type == ParamsType.DIFF:
            return self._result(good[0][0], _zeros(good[0][1]))
        if self._last is None:
            raise NonFiniteError(f"RobustAggregator: the first round's models cannot be used: {reason}", ())
        return self._last

    def _result(self, like: FLModel, params: dict[str, Any]) -> FLModel:
        self._last = FLModel(
            params_type=like.params_type,
            params=params,
            current_round=like.current_round,
            total_rounds=like.total_rounds,
        )
        return self._last

    def _say(self, message: str) -> None:
        if self.fl_ctx is not None:
            self.warning(message)


def _read(numbered: tuple[int, FLModel]) -> Read[tuple[FLModel, dict[str, Any]]]:
    model = numbered[1]
    params = _params(model)
    form = str(model.params_type), repr(sorted((n, tuple(x.shape), str(x.dtype)) for n, x in params.items()))
    return Read((model, params), form)


def _params(model: FLModel) -> dict[str, Any]:
    if not isinstance(model.params, dict) or not model.params:
        raise TypeError("its params are " + ("empty" if model.params == {} else type(model.params).__name__))
    params = {}
    for name, value in model.params.items():
        load = getattr(value, "materialize", None)
        x = load() if callable(load) else value
        if not isinstance(x, np.ndarray) and not is_torch_array(x):
            x = np.asarray(x)
        view = array_view(x, plain(str(name), 100), is_input=False)  # which refuses what has no memory to be read
        check_dtype(view.dtype, plain(str(name), 100), True)
        params[str(name)] = x
    return params


def _zeros(params: dict[str, Any]) -> dict[str, Any]:
    return {name: x.new_zeros(x.shape) if is_torch_array(x) else np.zeros_like(x) for name, x in params.items()}
