"""Rules as operators of torch: through autograd, under torch.compile, as modules.

Gradients are those of the rule as a function of the rows. A rule that keeps rows has weights that are constant around
almost every input, and passes ``weight * gradient`` to each; a window of each column passes the gradient to the values
in it; the geometric median is differentiated implicitly. Backward passes solve the rule again and make the n gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from robustkern.engine import Info
from robustkern.functions import aggregate as _aggregate
from robustkern.functions import mix
from robustkern.kernels import select_columns
from robustkern.rules import (
    ARC,
    CGE,
    CTMA,
    FABA,
    MDA,
    NNM,
    SMEA,
    Aggregator,
    Aksel,
    Bucketing,
    CentredClipping,
    Chain,
    Clipping,
    GeometricMedian,
    Krum,
    Mean,
    Median,
    Medoid,
    MoNNA,
    MultiKrum,
    Spectral,
    TrimmedMean,
    parse_rule,
)

__all__ = ["RobustAggregation", "aggregate"]

#: Rules whose result is a sum of rows by weights that do not change with small changes of the rows.
_KEEPING = (Mean, CTMA, Krum, MultiKrum, MDA, SMEA, Medoid, MoNNA, CGE, FABA, Aksel, Spectral)


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
    more in float32 or float64. Ties within a column share the gradient; rows that are not finite get none. There is no
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
    parts = list(rows.unbind(0)) if isinstance(rows, Tensor) else list(rows)
    text = rule if isinstance(rule, str) else str(rule)
    result: Tensor = _operator(parts, text, f, delta, weights, centre, seed)[0]
    return result


class RobustAggregation(torch.nn.Module):
    """`aggregate` as a module without parameters: rows in, one row out.

    Parameters
    ----------
    rule : rule object or str
        As for `robustkern.aggregate`.
    f, delta, seed
        As for `robustkern.aggregate`.
    """

    def __init__(
        self, rule: Aggregator | str, /, *, f: int | None = None, delta: float | None = None, seed: int | None = None
    ) -> None:
        super().__init__()
        self.rule = str(parse_rule(rule) if isinstance(rule, str) else rule)
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
    result, info = _solved([row.detach() for row in rows], rule, f, delta, weights, centre, seed)
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


def _solved(
    rows: Any,
    rule: Aggregator | str,
    f: int | None,
    delta: float | None,
    weights: Tensor | None,
    centre: Tensor | None,
    seed: int | None,
) -> tuple[Tensor, Info]:
    shares = None if weights is None else weights.detach().cpu().tolist()
    result, info = _aggregate(rows, rule, f=f, delta=delta, weights=shares, centre=centre, seed=seed, return_info=True)
    return result, info


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
    exact = torch.float64 if gradient.dtype == torch.float64 else torch.float32
    x = torch.stack([row.reshape(-1) for row in rows]).to(exact)
    options = _Options(f, delta, weights, centre, None if int(drawn) < 0 else int(drawn))
    found = _through_rule(x, gradient.reshape(-1).to(exact), parse_rule(rule), options)
    found[~torch.isfinite(x).all(dim=1)] = 0.0
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


# ---- from the gradient of a result to those of the rows it was made of ---------------------------------------------


class _Options(NamedTuple):
    f: int | None
    delta: float | None
    weights: Tensor | None
    centre: Tensor | None
    seed: int | None


def _through_rule(x: Tensor, gradient: Tensor, rule: Aggregator, options: _Options) -> Tensor:
    """Return (n, d) gradients of rows of which a rule made what has this gradient."""
    steps = rule.steps if isinstance(rule, Chain) else (rule,)
    if options.f is None and options.delta is not None and options.weights is None:
        options = options._replace(f=int(options.delta * len(x)), delta=None)
    if sum(isinstance(step, Bucketing) for step in steps) > 1:
        raise NotImplementedError("bucketing twice in a chain has no gradient here (detach the rows)")
    if len(steps) == 1:
        return _through_last(x, gradient, rule, options)
    first, rest = steps[0], steps[1] if len(steps) == 2 else Chain(steps[1:])
    assert isinstance(rest, Aggregator)
    if not isinstance(first, (NNM, Bucketing, Clipping, ARC)):
        raise NotImplementedError(f"{first}: it has no gradient here (detach the rows, or take another rule)")
    mixed, info = mix(x, first, f=options.f, seed=options.seed, return_info=True)
    inner = _through_rule(mixed, gradient, rest, options)
    inner[~torch.isfinite(mixed).all(dim=1)] = 0.0
    if isinstance(first, (NNM, Bucketing)):
        return torch.as_tensor(info.mixture, dtype=x.dtype, device=x.device).T @ inner
    if isinstance(first, Clipping):
        return _through_clipping(x, first.limit, inner)
    lengths, f = _lengths(x), options.f or 0
    order = lengths.argsort(stable=True)
    at = order[len(x) - 1 - 2 * f * (len(x) - f) // len(x)]
    limit = float(lengths[at])
    found = _through_clipping(x, limit, inner)
    longer = torch.isfinite(lengths) & (lengths > limit)
    if limit > 0:  # which is the length of a row itself
        found[at] += (x[longer] * inner[longer]).sum(dim=1).div(lengths[longer]).sum() * x[at] / limit
    return found


def _through_last(x: Tensor, gradient: Tensor, rule: Aggregator, options: _Options) -> Tensor:
    if isinstance(rule, _KEEPING):
        _, info = _solved(x, rule, *options)
        return torch.as_tensor(info.weights, dtype=x.dtype, device=x.device)[:, None] * gradient
    if isinstance(rule, (Median, TrimmedMean)) and options.weights is None:
        return _window_shares(x, *rule.window(len(x), options.f or 0)) * gradient
    found, finite = torch.zeros_like(x), torch.isfinite(x).all(dim=1)
    shares = torch.ones(len(x), dtype=x.dtype, device=x.device) if options.weights is None else options.weights.to(x)
    if isinstance(rule, GeometricMedian):
        used = finite & (shares > 0)
        found[used] = _through_geometric_median(x[used], gradient, rule, shares[used])
        return found
    if isinstance(rule, CentredClipping):
        centre = torch.zeros_like(gradient) if options.centre is None else options.centre.reshape(-1).to(x)
        found[finite] = _through_centred_clipping(x[finite], gradient, rule, centre, (shares / shares.sum())[finite])
        return found
    raise NotImplementedError(f"{rule}: it has no gradient here (detach the rows, or take another rule)")


def _lengths(x: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(x, dim=1)
    return lengths


def _through_clipping(x: Tensor, limit: float, gradients: Tensor) -> Tensor:
    """Return gradients of rows that were brought to a limit where they were longer."""
    lengths = _lengths(x)
    longer = torch.isfinite(lengths) & (lengths > limit)
    found = gradients.clone()
    unit = x[longer] / lengths[longer, None]
    along = (unit * gradients[longer]).sum(dim=1, keepdim=True)
    found[longer] = (limit / lengths[longer, None]) * (gradients[longer] - along * unit)
    return found


def _window_shares(x: Tensor, lo: int, hi: int) -> Tensor:
    """Return (n, d) shares of the values in the mean of the ranks [lo, hi) of each column; equal values share alike."""
    low, high = select_columns(x, (lo, lo + 1)), select_columns(x, (hi - 1, hi))
    at_low, at_high, inside = x == low, x == high, (x > low) & (x < high)
    of_low = ((x <= low).sum(dim=0) - lo) / at_low.sum(dim=0)
    of_high = (hi - (x < high).sum(dim=0)) / at_high.sum(dim=0)
    of_both = (hi - lo) / at_low.sum(dim=0)
    ends = torch.where(low == high, of_both * at_low, of_low * at_low + of_high * at_high)
    shares: Tensor = (inside + ends).to(x.dtype) / (hi - lo)
    return shares


def _through_centred_clipping(
    x: Tensor, gradient: Tensor, rule: CentredClipping, centre: Tensor, shares: Tensor
) -> Tensor:
    """Take the steps, then the way back through them."""
    places = [centre]
    for _ in range(rule.steps):
        away = x - places[-1]
        cut = away * (rule.tau / _lengths(away)).clamp_max(1.0).nan_to_num(1.0)[:, None]
        places.append(places[-1] + shares @ cut)
    found = torch.zeros_like(x)
    for y in places[-2::-1]:
        part = _through_clipping(x - y, rule.tau, shares[:, None] * gradient)
        found += part
        gradient = gradient - part.sum(dim=0)
    return found


def _through_geometric_median(x: Tensor, gradient: Tensor, rule: GeometricMedian, s: Tensor) -> Tensor:
    """Go back through steps where they are a few, and through the converged median by what makes it one.

    There the pulls cancel, sum s_i u_i = 0 with u_i = (x_i - y) / r_i; so a change dx of the rows moves it by the dy
    for which H dy = sum c_i (1 - u_i u_i^T) dx_i, where c = s / r and H = sum c_i (1 - u_i u_i^T), solved in n-space.
    """
    y, info = _aggregate(x, rule, weights=s.cpu().tolist(), return_info=True)
    if rule.nu > 0 or rule.max_iter is not None or rule.tol is not None:
        return _through_steps(x, gradient, rule, s, info.iterations or 0)
    if info.iterations == 0:  # it is a row, or between rows, and moves with them
        return torch.as_tensor(info.weights, dtype=x.dtype, device=x.device)[:, None] * gradient
    away = x - y
    r = _lengths(away)
    u, c = away / r[:, None], s / r
    # H = sum(c) - u^T diag(c) u, so v = H^-1 g = (g + u^T z) / sum(c) with z = c (u v).
    system = c.sum() * torch.eye(len(c), dtype=x.dtype, device=x.device) - c[:, None] * (u @ u.T)
    z = torch.linalg.solve(system, c * (u @ gradient))
    v = (gradient + z @ u) / c.sum()
    found: Tensor = c[:, None] * v - z[:, None] * u
    return found


def _through_steps(x: Tensor, gradient: Tensor, rule: GeometricMedian, s: Tensor, steps: int) -> Tensor:
    """Take Weiszfeld's steps, then the way back through them."""
    tiny = max(rule.nu, torch.finfo(x.dtype).tiny)
    places = [s @ x / s.sum() if rule.start == "mean" else torch.zeros_like(gradient)]
    for _ in range(steps):
        pull = s / _lengths(x - places[-1]).clamp_min(tiny)
        places.append(pull @ x / pull.sum())
    found = torch.zeros_like(x)
    for y, new in zip(places[-2::-1], places[:0:-1], strict=True):
        away = x - y
        r = _lengths(away)
        pull = s / r.clamp_min(tiny)
        of_pull = (x - new) @ gradient / pull.sum()
        of_length = torch.where(r > tiny, -of_pull * s / (r * r).clamp_min(tiny), torch.zeros_like(r))
        along = torch.where(r > 0, of_length / r.clamp_min(tiny), torch.zeros_like(r))[:, None] * away
        found += (pull / pull.sum())[:, None] * gradient + along
        gradient = -along.sum(dim=0)
    return found + (s / s.sum())[:, None] * gradient if rule.start == "mean" else found
