"""What all tests share: the implementations that are here, inputs, and the one table of tolerances."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any

import emulated
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from robustkern.backends import registry
from robustkern.backends.cpp import Cpp
from robustkern.contract.primitives import Kernels
from robustkern.contract.rows import Rows

#: Every implementation that can run here: the backends, the compiled one once for each instruction set, and the CUDA
#: kernels run on this processor.
IMPLEMENTATIONS: dict[str, Kernels] = {}
MISSING: dict[str, str] = {}
for _backend in registry.BACKENDS:
    _loaded = registry._load(_backend)
    if isinstance(_loaded, str):
        MISSING[_backend.name] = _loaded
    elif _backend.device != "cpu":
        continue  # its rows are not the host's: tests/test_cuda.py
    elif isinstance(_loaded, Cpp):
        IMPLEMENTATIONS.update({f"cpp-{isa}": Cpp(isa) for isa in _loaded.supported_isas()})
    else:
        IMPLEMENTATIONS[_backend.name] = _loaded
EMULATED = emulated.load()
if isinstance(EMULATED, str):
    MISSING["cuda-emulated"] = EMULATED
else:
    IMPLEMENTATIONS["cuda-emulated"] = emulated.EmulatedCuda(EMULATED, EMULATED.devices())


@functools.cache
def gpu_libraries() -> dict[str, Any]:
    """Return the libraries that can put arrays on a GPU that the CUDA backend runs on, or the reasons why not."""
    found: dict[str, Any] = {}
    for name, load in (("torch", emulated.torch_device), ("cupy", emulated.cupy_device)):
        try:
            found[name] = f"no CUDA backend: {MISSING['cuda']}" if "cuda" in MISSING else load()
        except Exception as error:  # each library has reasons of its own
            found[name] = f"{name} has no GPU: {error}"
    return found


for _device in gpu_libraries().values():
    if not isinstance(_device, str):
        _loaded = registry.load_backend("cuda")
        IMPLEMENTATIONS["cuda"] = emulated.StagedCuda(_loaded._cuda, _loaded.devices, _device)
FAST = {name: kernels for name, kernels in IMPLEMENTATIONS.items() if name != "reference"}

#: What may not be skipped: backends, and cuda-static (tests/test_cuda_budget.py).
REQUIRED = [name for name in os.environ.get("ROBUSTKERN_REQUIRE", "").split(",") if name]
_absent = {name: MISSING[name] for name in REQUIRED if name in MISSING}
if _absent:
    raise RuntimeError(f"ROBUSTKERN_REQUIRE={','.join(REQUIRED)}, but missing: {_absent}")


# ---- tolerances: the only place -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tolerance:
    """`spread` in units of the rows' root mean square distance to the result; `ulps` of the result's own rounding."""

    spread: float
    ulps: float


TOLERANCE = {
    "float64": Tolerance(1e-12, 2),
    "float32": Tolerance(1e-6, 1),
    # 16-bit results are rounded to float32 first: an ulp where that falls on a tie.
    "float16": Tolerance(1e-6, 1),
    "bfloat16": Tolerance(1e-6, 1),
}


def ulp(x: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Spacing of a dtype at x, in longdouble."""
    info = ml_dtypes.finfo(dtype)
    with np.errstate(all="ignore"):
        exponent = np.floor(np.log2(np.maximum(np.abs(x).astype(np.longdouble), np.longdouble(info.smallest_normal))))
    return np.exp2(exponent) * np.longdouble(info.eps)


def assert_close(got: NDArray[Any], want: NDArray[Any], rows: NDArray[Any]) -> None:
    """Compare a result with an oracle's in units of the spread of the finite rows."""
    dtype = rows.dtype
    assert got.dtype == dtype
    x = rows.astype(np.longdouble)
    use = np.isfinite(x).all(axis=tuple(range(1, x.ndim)))
    got, want = got.astype(np.longdouble), want.astype(np.longdouble)
    assert np.array_equal(np.isnan(got), np.isnan(want))
    special = ~np.isfinite(want)
    assert np.array_equal(got[special & ~np.isnan(want)], want[special & ~np.isnan(want)])
    ok = ~special
    if not ok.any():
        return
    tolerance = TOLERANCE[dtype.name]
    difference = (x[use][:, ok] - want[ok]) if use.any() else np.zeros((1, int(ok.sum())))
    spread = np.sqrt((difference**2).sum(axis=1).mean())
    # Each coordinate within the rounding of the result; what exceeds it, in norm, within the share of the spread.
    excess = np.maximum(np.abs(got[ok] - want[ok]) - tolerance.ulps * ulp(want[ok], dtype), 0)
    assert np.sqrt((excess**2).sum()) <= tolerance.spread * spread


# ---- inputs ---------------------------------------------------------------------------------------------------

KINDS = (
    "normal",
    "constant",
    "ties",
    "sorted",
    "offset",
    "one_huge",
    "extreme",
    "subnormal",
    "nan",
    "inf",
    "nan_and_inf",
    "signed_zeros",
)


def make_rows(kind: str, n: int, d: int, dtype: np.dtype[Any], seed: int = 0) -> NDArray[Any]:
    """Rows of one kind of hard input; the kinds with NaN or Inf spoil at most (n-1)//2 rows."""
    rng = np.random.default_rng(seed)
    info = ml_dtypes.finfo(dtype)
    x = rng.standard_normal((n, d))
    bad = (n - 1) // 2
    if kind == "constant":
        x[:] = x[0]
    elif kind == "ties":
        x = rng.integers(-2, 3, (n, d)).astype(np.float64)
    elif kind == "sorted":
        x = np.sort(x, axis=0)[::-1].copy()
    elif kind == "offset":
        x = 1.0 + x * 32 * float(info.eps)
    elif kind == "one_huge":
        x[rng.integers(n)] *= float(info.max) / 64
    elif kind == "extreme":
        x = rng.choice([-1.0, 1.0], (n, d)) * float(info.max) * rng.choice([1.0, 0.5], (n, d))
    elif kind == "subnormal":
        x = x * float(info.smallest_subnormal) * 8
    elif kind == "signed_zeros":
        x = rng.choice([-0.0, 0.0, 1.0], (n, d))
    with np.errstate(over="ignore"):
        rows = x.astype(dtype)
    if d:
        for i in rng.choice(n, bad, replace=False):
            column = rng.integers(d)
            if kind == "nan" or (kind == "nan_and_inf" and i % 2):
                rows[i, column] = np.nan
            elif kind in ("inf", "nan_and_inf"):
                rows[i, column] = rng.choice([-np.inf, np.inf])
    return rows


def one_row(d: int, dtype: np.dtype[Any]) -> tuple[NDArray[Any], Rows]:
    """Memory for a result, filled with a value that no test expects."""
    out = np.full((1, d), 77, dtype=dtype)
    return out[0], Rows.of(out)
