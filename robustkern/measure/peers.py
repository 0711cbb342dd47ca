"""The rules as plain NumPy, plain torch and other libraries compute them: what benchmarks and the demo compare with.

Every function takes an (n, d) array and returns (d,). A library is imported when its rules are asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["PEERS", "Peer", "load", "naive_rules"]

Array = NDArray[Any]
Peer = Callable[[Any], Any]


# ---- plain NumPy -----------------------------------------------------------------------------------------------


def naive_geometric_median(x: Array) -> Array:
    """Plain Weiszfeld in NumPy until a step is below 1e-7 of the spread; every step reads the data twice."""
    y = x.mean(axis=0)
    while True:
        r = np.linalg.norm(x - y, axis=1)
        w = 1 / r
        new = (w[:, None] * x).sum(axis=0) / w.sum()
        done = np.linalg.norm(new - y) <= 1e-7 * np.sqrt((r * r).mean())
        y = new
        if done:
            return np.asarray(y, dtype=x.dtype)


def naive_ctma(x: Array, f: int, anchor: Array) -> Array:
    """Mean of the n-f rows nearest to the anchor, in NumPy."""
    nearest = np.argsort(((x - anchor) ** 2).sum(axis=1), kind="stable")[: len(x) - f]
    return np.asarray(x[nearest].mean(axis=0))


def naive_sq_distances(x: Array) -> Array:
    """Squared distances between all rows, one row against all the others at a time."""
    return np.stack([((x - row) ** 2).sum(axis=1) for row in x])


def naive_multi_krum(x: Array, f: int, m: int) -> Array:
    """Mean of the m rows of least sum of squared distances to their n-f-2 nearest others."""
    distances = np.sort(naive_sq_distances(x), axis=1)
    scores = distances[:, 1 : len(x) - f - 1].sum(axis=1)
    return np.asarray(x[np.argsort(scores, kind="stable")[:m]].mean(axis=0))


def naive_nnm(x: Array, f: int) -> Array:
    """Each row's mean with its nearest rows, n-f in all."""
    nearest = np.argsort(naive_sq_distances(x), axis=1, kind="stable")[:, : len(x) - f]
    return np.stack([x[rows].mean(axis=0) for rows in nearest])


def naive_mean_around_median(x: Array, f: int) -> Array:
    """Mean of each column's n-f values nearest to its median, in NumPy."""
    ranked = np.sort(x, axis=0)  # so that of equally far values the lower one comes first
    nearest = np.argsort(np.abs(ranked - np.median(x, axis=0)), axis=0, kind="stable")[: len(x) - f]
    return np.asarray(np.take_along_axis(ranked, nearest, axis=0).mean(axis=0))


def naive_rules(f: int) -> dict[str, Peer]:
    """Return each rule as one would write it in NumPy."""
    return {
        "mean": lambda x: x.mean(axis=0),
        "median": lambda x: np.median(x, axis=0),
        "trimmed_mean": lambda x: np.sort(x, axis=0)[f : len(x) - f].mean(axis=0),
        "mean_around_median": lambda x: naive_mean_around_median(x, f),
        "ctma(median)": lambda x: naive_ctma(x, f, np.median(x, axis=0)),
        "geometric_median": naive_geometric_median,
        "ctma(geometric_median)": lambda x: naive_ctma(x, f, naive_geometric_median(x)),
        "krum": lambda x: naive_multi_krum(x, f, 1),
        "multi_krum": lambda x: naive_multi_krum(x, f, len(x) - f),
        "nnm | geometric_median": lambda x: naive_geometric_median(naive_nnm(x, f)),
        "nnm | median": lambda x: np.median(naive_nnm(x, f), axis=0),
    }


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
