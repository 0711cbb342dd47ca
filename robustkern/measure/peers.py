"""The rules as plain NumPy, plain torch and other libraries compute them: what benchmarks and the demo compare with.

Every function takes an (n, d) array and returns (d,). A library is imported when its rules are asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from robustkern.rules import parse_rule, registered

__all__ = ["PEERS", "Peer", "load", "naive_rules", "plain_form"]

Peer = Callable[[Any], Any]


# ---- plain NumPy -----------------------------------------------------------------------------------------------


def plain_form(rule: str, f: int) -> Peer | None:
    """Return a rule as one would write it in NumPy; None for one that has no such form, or is none."""
    try:
        plan = parse_rule(rule)
        plan.plain(np.random.default_rng(0).standard_normal((2 * f + 3, 2)), f)
    except (ValueError, NotImplementedError):
        return None
    return lambda x: plan.plain(x, f)


def naive_rules(f: int) -> dict[str, Peer]:
    """Return the rules that are measured, each as one would write it in NumPy."""
    measured = [case for rule in registered().values() for case in rule.goals]
    return {case: peer for case in measured if (peer := plain_form(case, f)) is not None}


# ---- others ----------------------------------------------------------------------------------------------------


def _torch_rules(f: int) -> dict[str, Peer]:
    import torch

    def weiszfeld(x: Any) -> Any:
        y = x.mean(0)
        while True:
            r = (x - y).norm(dim=1)
            w = 1 / r
            new = (w[:, None] * x).sum(0) / w.sum()
            done = (new - y).norm() <= 1e-7 * r.square().mean().sqrt()
            y = new
            if done:
                return y

    def ctma(x: Any, anchor: Any) -> Any:
        return x[torch.argsort((x - anchor).square().sum(1), stable=True)[: len(x) - f]].mean(0)

    def median(x: Any) -> Any:
        if len(x) % 2:
            return x.median(0).values
        middle = x.sort(0).values[len(x) // 2 - 1 : len(x) // 2 + 1]
        return middle.mean(0)

    def of(rule: Peer) -> Peer:
        return lambda x: rule(torch.from_numpy(x)).numpy()

    return {
        "median": of(median),
        "trimmed_mean": of(lambda x: x.sort(0).values[f : len(x) - f].mean(0)),
        "ctma(median)": of(lambda x: ctma(x, median(x))),
        "geometric_median": of(weiszfeld),
        "ctma(geometric_median)": of(lambda x: ctma(x, weiszfeld(x))),
    }


def _byzfl_rules(f: int) -> dict[str, Peer]:
    import byzfl

    # Its geometric median is three smoothed steps from zero, our preset "rfa".
    return {
        "median": byzfl.Median(),
        "trimmed_mean": byzfl.TrMean(f=f),
        "rfa": byzfl.GeometricMedian(nu=0.1, T=3),
        "nnm | median": lambda x: byzfl.Median()(byzfl.NNM(f=f)(x)),
    }


def _geom_median_rules(f: int) -> dict[str, Peer]:
    from geom_median.numpy import compute_geometric_median

    return {"geometric_median": lambda x: compute_geometric_median(list(x), eps=1e-12, ftol=1e-14).median}


def _bottleneck_rules(f: int) -> dict[str, Peer]:
    import bottleneck

    return {"median": lambda x: bottleneck.median(x, axis=0)}


def _scipy_rules(f: int) -> dict[str, Peer]:
    from scipy.stats import trim_mean

    return {"trimmed_mean": lambda x: trim_mean(x, (f + 0.5) / len(x), axis=0)}


#: What each library offers of our rules, for f Byzantine rows.
PEERS: dict[str, Callable[[int], dict[str, Peer]]] = {
    "numpy": naive_rules,
    "torch": _torch_rules,
    "byzfl": _byzfl_rules,
    "geom_median": _geom_median_rules,
    "bottleneck": _bottleneck_rules,
    "scipy": _scipy_rules,
}


def load(library: str, f: int) -> dict[str, Peer]:
    """Return a library's versions of our rules.

    Raises
    ------
    ValueError
        If the library is none of `PEERS`.
    ImportError
        If it is not installed here.
    """
    if library not in PEERS:
        raise ValueError(f"against: {library!r} is not known (known: {', '.join(PEERS)})")
    return PEERS[library](f)
