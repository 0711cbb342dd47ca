"""Gradients of rules by their rows, for frameworks that differentiate; of NumPy arrays and torch tensors alike.

A rule that keeps rows has weights that are constant around almost every input, and passes ``weight * gradient`` to
each; a window of each column passes the gradient to the values in it; the geometric median is differentiated
implicitly; what clips or takes a few steps is gone through backwards.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace, device

from robustkern.engine import Info, count_of_share
from robustkern.functions import aggregate, mix
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
)

__all__ = ["Options", "gradients_of_rows"]

Array = Any  # a NumPy array or torch tensor
#: Rules whose result is a sum of rows by weights that do not change with small changes of the rows.
KEEPING = (Mean, CTMA, Krum, MultiKrum, MDA, SMEA, Medoid, MoNNA, CGE, FABA, Aksel, Spectral)


class Options(NamedTuple):
    """What the rule was called with; weights (n,) and centre (d,) are of the rows' kind and dtype.

    The seed is what the call drew from.
    """

    f: int | None
    delta: float | None
    weights: Array | None
    centre: Array | None
    seed: int | None


def gradients_of_rows(x: Array, gradient: Array, rule: Aggregator, options: Options) -> Array:
    """Return gradients of rows of which a rule made what has this gradient.

    Parameters
    ----------
    x : (n, d) float64
        The rows, in which lengths of float32 rows do not overflow.
    gradient : (d,)
        Of the result.
    rule : Aggregator
        What was done.
    options : Options
        And how.

    Returns
    -------
    (n, d)
        0 for rows that are not finite. Equal values of a column share alike.

    Raises
    ------
    NotImplementedError
        If the rule has no gradient here.

    Notes
    -----
    The rule is solved again: as many reads of the data as forward, and one write.
    """
    found = _through_rule(x, gradient, rule, options)
    found[~_finite(x)] = 0.0
    return found


def _finite(x: Array) -> Array:
    xp = array_namespace(x)
    return xp.all(xp.isfinite(x), axis=1)


def _like(values: Any, x: Array) -> Array:
    return array_namespace(x).asarray(values, dtype=x.dtype, device=device(x))


def _listed(x: Array) -> list[float]:
    return [float(value) for value in x]


def _solved(x: Array, rule: Aggregator, options: Options) -> tuple[Array, Info]:
    weights = None if options.weights is None else _listed(options.weights)
    found: tuple[Array, Info] = aggregate(
        x,
        rule,
        f=options.f,
        delta=options.delta,
        weights=weights,
        centre=options.centre,
        seed=options.seed,
        return_info=True,
    )
    return found


def _through_rule(x: Array, gradient: Array, rule: Aggregator, options: Options) -> Array:
    steps = rule.steps if isinstance(rule, Chain) else (rule,)
    if options.f is None and options.delta is not None and options.weights is None:
        options = options._replace(f=count_of_share(options.delta, len(x)), delta=None)
    if sum(isinstance(step, Bucketing) for step in steps) > 1:
        raise NotImplementedError("bucketing twice in a chain has no gradient here (detach the rows)")
    if len(steps) == 1:
        return _through_last(x, gradient, rule, options)
    if isinstance(steps[-1], KEEPING) and all(isinstance(step, (NNM, Bucketing)) for step in steps[:-1]):
        return _like(_solved(x, rule, options)[1].weights, x)[:, None] * gradient
    first, rest = steps[0], steps[1] if len(steps) == 2 else Chain(steps[1:])
    assert isinstance(rest, Aggregator)
    if not isinstance(first, (NNM, Bucketing, Clipping, ARC)):
        raise NotImplementedError(f"{first}: it has no gradient here (detach the rows, or take another rule)")
    mixed, info = mix(x, first, f=options.f, seed=options.seed, return_info=True)
    inner = _through_rule(mixed, gradient, rest, options)
    inner[~array_namespace(x).isfinite(mixed)] = 0.0
    if isinstance(first, (NNM, Bucketing)):
        return _like(info.mixture, x).T @ inner
    if isinstance(first, Clipping):
        return _through_clipping(x, first.limit, inner)
    xp, lengths, f = array_namespace(x), _lengths(x), options.f or 0
    order = xp.argsort(lengths, stable=True)
    at = int(order[len(x) - 1 - 2 * f * (len(x) - f) // len(x)])
    limit = float(lengths[at])
    found = _through_clipping(x, limit, inner)
    longer = xp.isfinite(lengths) & (lengths > limit)
    if limit > 0:  # which is the length of a row itself
        along = xp.sum(x[longer] * inner[longer], axis=1) / lengths[longer]
        found[at] += xp.sum(along) * x[at] / limit
    return found


def _through_last(x: Array, gradient: Array, rule: Aggregator, options: Options) -> Array:
    xp = array_namespace(x)
    if isinstance(rule, KEEPING):
        return _like(_solved(x, rule, options)[1].weights, x)[:, None] * gradient
    if isinstance(rule, (Median, TrimmedMean)) and options.weights is None:
        return _window_shares(x, *rule.window(len(x), options.f or 0)) * gradient
    found, finite = xp.zeros_like(x), _finite(x)
    shares = _like(np.ones(len(x)), x) if options.weights is None else options.weights
    if isinstance(rule, GeometricMedian):
        used = finite & (shares > 0)
        found[used] = _through_geometric_median(x[used], gradient, rule, shares[used])
        return found
    if isinstance(rule, CentredClipping):
        centre = xp.zeros_like(gradient) if options.centre is None else options.centre
        found[finite] = _through_centred_clipping(x[finite], gradient, rule, centre, (shares / xp.sum(shares))[finite])
        return found
    raise NotImplementedError(f"{rule}: it has no gradient here (detach the rows, or take another rule)")


def _lengths(x: Array) -> Array:
    return array_namespace(x).linalg.vector_norm(x, axis=1)


def _through_clipping(x: Array, limit: float, gradients: Array) -> Array:
    """Return gradients of rows that were brought to a limit where they were longer."""
    xp, lengths = array_namespace(x), _lengths(x)
    longer = xp.isfinite(lengths) & (lengths > limit)
    found = gradients + 0.0
    unit = x[longer] / lengths[longer][:, None]
    along = xp.sum(unit * gradients[longer], axis=1)[:, None]
    found[longer] = (limit / lengths[longer][:, None]) * (gradients[longer] - along * unit)
    return found


def _window_shares(x: Array, lo: int, hi: int) -> Array:
    """Return (n, d) shares of the values in the mean of the ranks [lo, hi) of each column; equal values share alike."""
    xp = array_namespace(x)
    low, high = select_columns(x, (lo, lo + 1)), select_columns(x, (hi - 1, hi))
    at_low, at_high = _like(x == low, x), _like(x == high, x)
    inside = _like((x > low) & (x < high), x)
    ties = xp.sum(at_low, axis=0)
    of_low = (xp.sum(_like(x <= low, x), axis=0) - lo) / ties
    of_high = (hi - xp.sum(_like(x < high, x), axis=0)) / xp.sum(at_high, axis=0)
    ends = xp.where(low == high, ((hi - lo) / ties) * at_low, of_low * at_low + of_high * at_high)
    return (inside + ends) / (hi - lo)


def _through_centred_clipping(x: Array, gradient: Array, rule: CentredClipping, centre: Array, shares: Array) -> Array:
    """Take the steps, then the way back through them."""
    xp = array_namespace(x)
    places = [centre]
    for _ in range(rule.steps):
        away = x - places[-1]
        lengths = _lengths(away)
        cut = xp.where(lengths > rule.tau, rule.tau / xp.where(lengths > 0, lengths, 1.0), 1.0)
        places.append(places[-1] + (shares * cut) @ away)
    found = xp.zeros_like(x)
    for y in places[-2::-1]:
        part = _through_clipping(x - y, rule.tau, shares[:, None] * gradient)
        found = found + part
        gradient = gradient - xp.sum(part, axis=0)
    return found


def _through_geometric_median(x: Array, gradient: Array, rule: GeometricMedian, s: Array) -> Array:
    """Go back through steps where they are a few, and through the converged median by what makes it one.

    There the pulls cancel, sum s_i u_i = 0 with u_i = (x_i - y) / r_i; so a change dx of the rows moves it by the dy
    for which H dy = sum c_i (1 - u_i u_i^T) dx_i, where c = s / r and H = sum c_i (1 - u_i u_i^T), solved in n-space.
    """
    xp = array_namespace(x)
    y, info = aggregate(x, rule, weights=_listed(s), return_info=True)
    if rule.nu > 0 or rule.max_iter is not None or rule.tol is not None:
        found, measured = xp.zeros_like(x), _like(info.weights, x) > 0  # others are too far away to take part
        found[measured] = _through_steps(x[measured], gradient, rule, s[measured], info.iterations or 0)
        return found
    if info.iterations == 0:  # it is a row, or between rows, and moves with them
        return _like(info.weights, x)[:, None] * gradient
    away = x - y
    r = _lengths(away)
    u, c = away / r[:, None], s / r
    # H = sum(c) - u^T diag(c) u, so v = H^-1 g = (g + u^T z) / sum(c) with z = c (u v).
    system = xp.sum(c) * _like(np.eye(len(c)), x) - c[:, None] * (u @ u.T)
    z = xp.linalg.solve(system, (c * (u @ gradient))[:, None])[:, 0]
    v = (gradient + z @ u) / xp.sum(c)
    return c[:, None] * v - z[:, None] * u


def _through_steps(x: Array, gradient: Array, rule: GeometricMedian, s: Array, steps: int) -> Array:
    """Take Weiszfeld's steps, then the way back through them."""
    xp = array_namespace(x)
    least = max(rule.nu, float(xp.finfo(x.dtype).smallest_normal))

    def pulls(r: Array) -> Array:
        return s / xp.where(r > least, r, least)

    places = [s @ x / xp.sum(s) if rule.start == "mean" else xp.zeros_like(gradient)]
    for _ in range(steps):
        pull = pulls(_lengths(x - places[-1]))
        places.append(pull @ x / xp.sum(pull))
    found = xp.zeros_like(x)
    for y, new in zip(places[-2::-1], places[:0:-1], strict=True):
        away = x - y
        r = _lengths(away)
        pull = pulls(r)
        of_pull = (x - new) @ gradient / xp.sum(pull)
        of_length = xp.where(r > least, -of_pull * pull * pull / s, 0.0 * r)
        along = (of_length / xp.where(r > 0, r, 1.0))[:, None] * away
        found = found + (pull / xp.sum(pull))[:, None] * gradient + along
        gradient = -xp.sum(along, axis=0)
    return found + (s / xp.sum(s))[:, None] * gradient if rule.start == "mean" else found
