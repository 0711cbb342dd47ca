"""The compiled backend: hands pointers to `robustkern._cpu`, one instruction set at a time."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from robustkern.backends.threads import requested_threads
from robustkern.contract.primitives import Selected, Window
from robustkern.contract.rows import DTYPES, Matrix, Rows, RowsInFiles, Stretches, Vector
from robustkern.errors import SettingError

__all__ = ["Cpp", "load"]

_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}


class SourceTreeError(ImportError):
    """Python found the source tree, which has no compiled part, before an installed package."""

    def __init__(self, message: str, clone: Path) -> None:
        super().__init__(message)
        self.remedy = f"start Python in another folder than {clone}, or install it in place: pip install -e {clone}"


def load() -> Cpp:
    """Return the backend for the best instruction set, or the one that ``ROBUSTKERN_ISA`` names."""
    try:
        from robustkern import _cpu
    except ImportError as error:
        clone = Path(__file__).parents[2]
        if not (clone / "pyproject.toml").is_file():
            raise
        raise SourceTreeError(f"Python imported the source tree {clone}, not an installed package", clone) from error

    supported = _cpu.supported_isas()
    isa = os.environ.get("ROBUSTKERN_ISA", "") or supported[0]
    if isa not in supported:
        raise SettingError(f"ROBUSTKERN_ISA must be one of {', '.join(supported)} on this machine; got {isa!r}")
    return Cpp(isa)


class Cpp:
    """See `robustkern.contract.primitives.Kernels`."""

    name = "cpp"
    roundings = 384.0, 2.0**-15
    dtypes = DTYPES

    def __init__(self, isa: str) -> None:
        from robustkern import _cpu

        self._cpu = _cpu
        self.isa = isa

    def supported_isas(self) -> list[str]:
        """Return the instruction sets that can run here, best first."""
        return list(self._cpu.supported_isas())

    def max_threads(self) -> int:
        """Return how many threads OpenMP would use."""
        return int(self._cpu.max_threads())

    def takes_float32_products(self, rows: Rows) -> bool:
        """See the contract."""
        return True

    def select_columns(
        self,
        rows: Rows,
        window: Window,
        *,
        nearest: int | None = None,
        multiplicities: NDArray[np.int64] | None = None,
        mix: Matrix | None = None,
        mix_divisors: Vector | None = None,
        measure: Matrix | None = None,
        measure_divisors: Vector | None = None,
        scale: float = 1.0,
        distances: bool = False,
        out: Rows | None = None,
    ) -> Selected:
        """See the contract."""
        n = rows.n
        nonfinite = np.zeros(n, dtype=np.bool_)
        sq_distances = np.zeros(n if measure is None else len(measure)) if distances else None
        call = (
            rows.offsets,
            _CODES[rows.dtype],
            window.lo,
            window.hi,
            nearest or 0,
            multiplicities,
            mix,
            mix_divisors,
            measure,
            measure_divisors,
            scale,
            None if out is None else out.addresses,
            sq_distances,
            nonfinite,
            requested_threads(),
        )
        select = self._cpu.select_columns
        if not isinstance(rows, RowsInFiles) or not rows.read_by(lambda where: select(self.isa, where, *call)):
            select(self.isa, rows.addresses, *call)
        return Selected(sq_distances, nonfinite)

    def gram(
        self,
        rows: Rows,
        *,
        multiplicities: NDArray[np.int64] | None = None,
        origin: bool = False,
        scale: float = 1.0,
        single: bool = False,
        lines: int | None = None,
    ) -> Matrix:
        """See the contract."""
        m = rows.addresses.shape[1] + origin
        out = np.zeros((m if lines is None else lines, m))
        self._cpu.gram(
            self.isa,
            rows.addresses,
            rows.offsets,
            _CODES[rows.dtype],
            multiplicities,
            origin,
            scale,
            single,
            out,
            requested_threads(),
        )
        return out

    def row_sq_distances(self, rows: Rows, centres: Rows | None, *, scale: float = 1.0, exact: bool = True) -> Matrix:
        """See the contract."""
        out = np.zeros((1 if centres is None else centres.n, rows.n))
        self._cpu.row_sq_distances(
            self.isa,
            rows.addresses,
            rows.offsets,
            _CODES[rows.dtype],
            None if centres is None else centres.addresses,
            scale,
            exact,
            out,
            requested_threads(),
        )
        return out

    def sq_distances_to_average(self, rows: Rows, shares: Vector) -> Vector:
        """See the contract."""
        out = np.zeros(rows.n)
        self._cpu.sq_distances_to_average(
            self.isa, rows.addresses, rows.offsets, _CODES[rows.dtype], shares, out, requested_threads()
        )
        return out

    def weighted_row_sum(self, rows: Rows, weights: Matrix, out: Rows, *, divisors: Vector | None = None) -> None:
        """See the contract."""
        call = rows.offsets, _CODES[rows.dtype], weights, divisors, out.addresses, requested_threads()
        add = self._cpu.weighted_row_sum
        if not isinstance(rows, RowsInFiles) or not rows.read_by(lambda where: add(self.isa, where, *call)):
            add(self.isa, rows.addresses, *call)

    def update_momenta(
        self,
        momenta: Rows,
        gradients: Rows,
        corrections: Rows | None,
        *,
        keep: float,
        gradient_scales: Vector,
        correction_scales: Vector | None,
    ) -> None:
        """See the contract."""
        self._cpu.update_momenta(
            self.isa,
            gradients.addresses,
            gradients.offsets,
            _CODES[gradients.dtype],
            None if corrections is None else corrections.addresses,
            keep,
            gradient_scales,
            correction_scales,
            momenta.addresses,
            requested_threads(),
        )

    def digest(self, data: NDArray[np.uint8], key: NDArray[np.uint32], point: int) -> int:
        """Hash contiguous bytes; see `robustkern.files.digest`."""
        return int(self._cpu.digest(self.isa, data, key, point))

    def read_rows(self, where: Stretches, out: NDArray[np.uint64]) -> bool:
        """Read rows that lie in files into memory, and hash them; false where some could not be read."""
        return bool(self._cpu.read_rows(self.isa, where, out, requested_threads()))

    def read_pass(self, rows: Rows) -> int:
        """Sum the rows as 64-bit words: one read of the data, which the benchmarks measure in."""
        return int(self._cpu.read_pass(self.isa, rows.addresses, rows.offsets, _CODES[rows.dtype], requested_threads()))
