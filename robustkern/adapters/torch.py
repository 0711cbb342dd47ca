"""Rules as operators of torch: through autograd, under torch.compile, as modules.

Gradients are those of the rule as a function of the rows, see `robustkern.adapters.gradients`. Backward passes solve
the rule again and make the n gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from robustkern.adapters import needs

with needs("torch"):
    import torch
    from torch import Tensor

from robustkern.adapters.gradients import Options, gradients_of_rows
from robustkern.adapters.replies import checked_limit
from robustkern.errors import brief
from robustkern.functions import aggregate as _aggregate
from robustkern.rules import Aggregator, parse_rule
from robustkern.rules.base import as_aggregator
from robustkern.scalars import as_int

__all__ = ["RobustAggregation", "aggregate"]


def aggregate(
    rows: Tensor | Sequence[Tensor],
    rule: Aggregator | str,
    /,
    *,
    f: int | None = None,
    delta: float | None = None,
    weights: Tensor | None = None,
    centre: Tensor | None = None,
    seed: int | None = None,
) -> Tensor:
    """Combine n tensors into one, recorded by autograd and left whole by ``torch.compile(fullgraph=True)``.

    Parameters
    ----------
    rows : tensor of shape (n, ...), or sequence of n tensors
        As for `robustkern.aggregate`: one shape, dtype and device.
    rule : rule object or str
        Under ``torch.compile`` its text form.
    f, delta, seed
        As for `robustkern.aggregate`.
    weights : (n,) tensor, optional
        Of the rows; constant.
    centre : tensor like one row, optional
        For rules that measure from one; constant.

    Returns
    -------
    tensor
        Like one row, on its device.

    Raises
    ------
    TypeError, ValueError, NonFiniteError
        As `robustkern.aggregate`.
    NotImplementedError
        In the backward pass, for a rule without a gradient: mean_around_median, bulyan, caf, rules of one's own,
        weighted medians and trimmed means.

    Notes
    -----
    A call takes some 100 microseconds more than `robustkern.aggregate`, which is for those who need no gradients. The
    backward pass solves the rule again (as many reads as forward) and writes n gradients; it holds the n rows once
    more in float64. Ties within a column share the gradient; rows that are not finite get none. There is no
    second derivative.

    Examples
    --------
    >>> import torch
    >>> from robustkern.adapters.torch import aggregate
    >>> rows = torch.tensor([[1.0, 5.0], [2.0, 4.0], [90.0, 6.0]], requires_grad=True)
    >>> aggregate(rows, "median").sum().backward()
    >>> rows.grad
    tensor([[0., 1.],
            [1., 0.],
            [0., 0.]])
    """
    if not isinstance(rows, Tensor) and hasattr(rows, "__iter__") and not isinstance(rows, (str, bytes, dict)):
        rows = list(rows)
    if not torch.compiler.is_compiling():
        _check(rows, rule, f, delta, weights, centre, seed)
    parts = list(rows.unbind(0)) if isinstance(rows, Tensor) else list(rows)
    text = rule if isinstance(rule, str) else str(rule)
    result: Tensor = _operator(parts, text, f, delta, weights, centre, seed)[0]
    return result


def _check(rows: Any, rule: Any, f: Any, delta: Any, weights: Any, centre: Any, seed: Any) -> None:
    """Raise what `robustkern.aggregate` does of what is no argument of an operator of torch."""
    stacked = isinstance(rows, Tensor)
    takes = rows.dim() > 0 if stacked else isinstance(rows, Sequence) and all(isinstance(x, Tensor) for x in rows)
    takes = takes and all(x is None or isinstance(x, Tensor) for x in (weights, centre))
    takes = takes and all(x is None or (_is(x, int, np.integer) and abs(x) < 1 << 63) for x in (f, seed))
    if takes and isinstance(rule, (str, Aggregator)) and (delta is None or _is(delta, int, float, np.number)):
        return
    _aggregate(rows.detach() if stacked else rows, rule, f=f, delta=delta, weights=weights, centre=centre, seed=seed)
    raise TypeError("rows, weights and centre must be torch tensors, and seed below 2**63 (pass torch.as_tensor(x))")


def _is(x: Any, *kinds: type[Any]) -> bool:
    return isinstance(x, kinds) and not isinstance(x, bool)


class RobustAggregation(torch.nn.Module):
    """`aggregate` as a module without parameters: rows in, one row out.

    Parameters
    ----------
    rule : rule object or str
        As for `robustkern.aggregate`.
    f, delta, seed
        As for `robustkern.aggregate`.

    Raises
    ------
    TypeError, ValueError
        If they are none that any call could take.
    """

    def __init__(
        self, rule: Aggregator | str, /, *, f: int | None = None, delta: float | None = None, seed: int | None = None
    ) -> None:
        super().__init__()
        self.rule = str(parse_rule(str(as_aggregator(rule))))
        if f is not None or delta is not None:
            checked_limit("RobustAggregation", f, delta)
        known = as_int(seed)
        if seed is not None and (known is None or known < 0):
            raise ValueError(f"RobustAggregation: seed must be None or an integer of at least 0; got {brief(seed)}")
        self.f, self.delta, self.seed = f, delta, seed

    def forward(
        self, rows: Tensor | Sequence[Tensor], weights: Tensor | None = None, centre: Tensor | None = None
    ) -> Tensor:
        """Combine the rows."""
        return aggregate(rows, self.rule, f=self.f, delta=self.delta, weights=weights, centre=centre, seed=self.seed)

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        limits = {"f": self.f, "delta": self.delta, "seed": self.seed}
        return ", ".join([repr(self.rule), *(f"{k}={v}" for k, v in limits.items() if v is not None)])


@torch.library.custom_op("robustkern::aggregate", mutates_args=())
def _operator(
    rows: Sequence[Tensor],
    rule: str,
    f: int | None,
    delta: float | None,
    weights: Tensor | None,
    centre: Tensor | None,
    seed: int | None,
) -> tuple[Tensor, Tensor]:
    """Return the result, and the seed of what was drawn, -1 where nothing was."""
    shares = None if weights is None else weights.detach().cpu().tolist()
    result, info = _aggregate(
        [row.detach() for row in rows],
        rule,
        f=f,
        delta=delta,
        weights=shares,
        centre=centre,
        seed=seed,
        return_info=True,
    )
    return result, torch.tensor(-1 if info.seed is None else info.seed, dtype=torch.int64, device="cpu")


@_operator.register_fake
def _(
    rows: Sequence[Tensor],
    rule: str,
    f: int | None,
    delta: float | None,
    weights: Tensor | None,
    centre: Tensor | None,
    seed: int | None,
) -> tuple[Tensor, Tensor]:
    return torch.empty(rows[0].shape, dtype=rows[0].dtype, device=rows[0].device), torch.empty(
        (), dtype=torch.int64, device="cpu"
    )


@torch.library.custom_op("robustkern::aggregate_backward", mutates_args=())
def _gradients(
    rows: Sequence[Tensor],
    gradient: Tensor,
    drawn: Tensor,
    rule: str,
    f: int | None,
    delta: float | None,
    weights: Tensor | None,
    centre: Tensor | None,
) -> Tensor:
    """Return (n, ...) gradients of the rows."""
    x = torch.stack([row.reshape(-1) for row in rows]).double()
    options = Options(
        f,
        delta,
        None if weights is None else weights.to(x),
        None if centre is None else centre.reshape(-1).to(x),
        None if int(drawn) < 0 else int(drawn),
    )
    found: Tensor = gradients_of_rows(x, gradient.reshape(-1).double(), parse_rule(rule), options)
    return found.to(gradient.dtype).reshape(len(rows), *gradient.shape)


@_gradients.register_fake
def _(
    rows: Sequence[Tensor],
    gradient: Tensor,
    drawn: Tensor,
    rule: str,
    f: int | None,
    delta: float | None,
    weights: Tensor | None,
    centre: Tensor | None,
) -> Tensor:
    return torch.empty((len(rows), *gradient.shape), dtype=gradient.dtype, device=gradient.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    rows, ctx.rule, ctx.f, ctx.delta, weights, centre, _ = inputs
    ctx.count = len(rows)
    ctx.save_for_backward(*rows, output[1], *(part for part in (weights, centre) if part is not None))
    ctx.has = (weights is not None, centre is not None)


def _backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Any, ...]:
    rows, (drawn, *rest) = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
    weights = rest.pop(0) if ctx.has[0] else None
    centre = rest.pop(0) if ctx.has[1] else None
    found = _gradients(rows, gradient.contiguous(), drawn, ctx.rule, ctx.f, ctx.delta, weights, centre)
    return list(found.unbind(0)), None, None, None, None, None, None


_operator.register_autograd(_backward, setup_context=_save)
