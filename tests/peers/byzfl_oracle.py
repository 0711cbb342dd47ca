"""Compare robustkern.adapters.byzfl with an installed ByzFL on random vectors: ``python byzfl_oracle.py [cases]``.

CAF and SMEA are left out: there they depend on random vectors. Equally near rows are left out too (random floats have
none), and vectors that are not finite, which poison ByzFL's results.
"""

from __future__ import annotations

import sys
from typing import Any

import byzfl as theirs
import numpy as np
import torch

import robustkern.adapters.byzfl as ours


def cases(n: int, f: int) -> list[tuple[str, dict[str, Any]]]:
    """Return names and parameters that n and f allow."""
    rules = [(name, {"f": f}) for name in ("TrMean", "Krum", "MultiKrum", "Meamed", "NNM", "ARC")]
    if n <= 12:
        rules.append(("MDA", {"f": f}))
    rules += [("MoNNA", {"f": f, "idx": n - 1}), ("Average", {}), ("Median", {}), ("Clipping", {"c": 3.0})]
    rules += [("GeometricMedian", {"nu": nu, "T": t}) for nu, t in ((0.1, 3), (1.0, 8), (0.1, 0))]
    rules += [("CenteredClipping", {"L": 2, "tau": tau}) for tau in (1.0, 100.0)]
    rules += [("SignFlipping", {}), ("InnerProductManipulation", {"tau": 1.5}), ("Mimic", {"epsilon": n - 1})]
    rules += [("Inf", {}), ("Bucketing", {"s": 2}), ("Gaussian", {"mu": 1.0, "sigma": 2.0})]
    return rules + ([("ALittleIsEnough", {"tau": 1.5})] if n > 1 else [])


def main(count: int) -> int:
    """Return how many results differ by more than rounding."""
    g, wrong, compared = np.random.default_rng(0), 0, 0
    for case in range(count):
        n = int(g.integers(1, 30))
        f, d = int(g.integers(0, (n - 1) // 2 + 1)), int(g.integers(1, 60))
        x = g.standard_normal((n, d)) * 10.0 ** g.integers(-3, 4)
        x[:f] += 10 * g.standard_normal()
        vectors = [x, x.astype(np.float32), torch.tensor(x, dtype=torch.float32), list(x)][case % 4]
        for name, options in cases(n, f):
            results = []
            for module in (theirs, ours):
                np.random.seed(case)  # noqa: NPY002 - what both draw from
                torch.manual_seed(case)
                rule = getattr(module, name)(**options)
                copied = [row.copy() for row in vectors] if isinstance(vectors, list) else vectors + 0
                rule(copied)
                results.append(rule([row.copy() for row in vectors] if isinstance(vectors, list) else vectors + 0))
            want, got = (np.asarray(result, dtype=np.float64) for result in results)
            compared += 1
            single = not isinstance(vectors, list) and vectors.dtype in (np.float32, torch.float32)
            scale = np.abs(x).max() * (2e-5 if single else 1e-10)
            if got.shape != want.shape or not np.allclose(got, want, rtol=1e-5, atol=scale):
                wrong += 1
                print(f"case {case}: {name}{options} of {n} x {d}, {type(vectors).__name__}")
    print(f"{compared} results compared, {wrong} differ")
    return wrong


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 300) > 0)
