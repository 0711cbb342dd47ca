# What csrc/bindings/module_cpu.cpp exports; addresses and offsets as in robustkern.contract.rows.Rows.
from typing import Any

from numpy import bool_, float64, int64, uint8, uint32, uint64
from numpy.typing import NDArray

from robustkern.contract.rows import Stretches

__version__: str
compiler: str
cuda: str

def supported_isas() -> list[str]: ...
def max_threads() -> int: ...
def address_of(array: NDArray[Any]) -> int: ...
def look_at(
    columns: list[Any],
    inputs: int,
    ndarray: type,
    torch: tuple[Any, tuple[type, ...], bool, int] | None,
    begins: NDArray[int64],
) -> bytes: ...
def select_columns(
    isa: str,
    data: NDArray[uint64] | Stretches,
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
    threads: int,
) -> bool: ...
def gram(
    isa: str,
    data: NDArray[uint64],
    offsets: NDArray[int64],
    dtype: int,
    multiplicities: NDArray[int64] | None,
    origin: bool,
    scale: float,
    single: bool,
    out: NDArray[float64],
    threads: int,
) -> None: ...
def row_sq_distances(
    isa: str,
    data: NDArray[uint64],
    offsets: NDArray[int64],
    dtype: int,
    centres: NDArray[uint64] | None,
    scale: float,
    exact: bool,
    out: NDArray[float64],
    threads: int,
) -> None: ...
def sq_distances_to_average(
    isa: str,
    data: NDArray[uint64],
    offsets: NDArray[int64],
    dtype: int,
    shares: NDArray[float64],
    out: NDArray[float64],
    threads: int,
) -> None: ...
def weighted_row_sum(
    isa: str,
    data: NDArray[uint64] | Stretches,
    offsets: NDArray[int64],
    dtype: int,
    weights: NDArray[float64],
    divisors: NDArray[float64] | None,
    out: NDArray[uint64],
    threads: int,
) -> bool: ...
def update_momenta(
    isa: str,
    data: NDArray[uint64],
    offsets: NDArray[int64],
    dtype: int,
    corrections: NDArray[uint64] | None,
    keep: float,
    gradient_scales: NDArray[float64],
    correction_scales: NDArray[float64] | None,
    momenta: NDArray[uint64],
    threads: int,
) -> None: ...
def digest(isa: str, data: NDArray[uint8], key: NDArray[uint32], point: int) -> int: ...
def read_rows(isa: str, data: Stretches, out: NDArray[uint64], threads: int) -> bool: ...
def read_pass(isa: str, data: NDArray[uint64], offsets: NDArray[int64], dtype: int, threads: int) -> int: ...
