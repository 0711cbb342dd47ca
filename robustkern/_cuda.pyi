# What csrc/bindings/module_cuda.cpp exports; addresses and offsets as in contract.rows.Rows, on the device.
from collections.abc import Callable
from typing import Any

from numpy import bool_, float64, int64, uint64
from numpy.typing import NDArray

__version__: str
architectures: str

def devices() -> list[dict[str, Any]]: ...
def synchronize(device: int, stream: int) -> None: ...
def runtime_version() -> int: ...
def driver_version() -> int: ...
def select_columns(
    device: int,
    stream: int,
    allocate: Callable[[int], int],
    data: NDArray[uint64],
    offsets: NDArray[int64],
    dtype: int,
    lo: int,
    hi: int,
    nearest: int,
    multiplicities: NDArray[int64] | None,
    mix: NDArray[float64] | None,
    mix_divisors: NDArray[float64] | None,
    measure: NDArray[float64] | None,
    measure_divisors: NDArray[float64] | None,
    scale: float,
    out: NDArray[uint64] | None,
    sq_distances: NDArray[float64] | None,
    nonfinite: NDArray[bool_],
) -> None: ...
def gram(
    device: int,
    stream: int,
    allocate: Callable[[int], int],
    data: NDArray[uint64],
    offsets: NDArray[int64],
    dtype: int,
    multiplicities: NDArray[int64] | None,
    origin: bool,
    scale: float,
    single: bool,
    out: NDArray[float64],
) -> None: ...
def row_sq_distances(
    device: int,
    stream: int,
    allocate: Callable[[int], int],
    data: NDArray[uint64],
    offsets: NDArray[int64],
    dtype: int,
    centres: NDArray[uint64] | None,
    scale: float,
    out: NDArray[float64],
) -> None: ...
def weighted_row_sum(
    device: int,
    stream: int,
    allocate: Callable[[int], int],
    data: NDArray[uint64],
    offsets: NDArray[int64],
    dtype: int,
    weights: NDArray[float64],
    divisors: NDArray[float64] | None,
    out: NDArray[uint64],
) -> None: ...
