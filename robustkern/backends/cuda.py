"""The backend for rows on a GPU: hands pointers, the caller's stream and workspace to `robustkern._cuda`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustkern.contract.primitives import Selected, Window
from robustkern.contract.rows import DTYPES, Matrix, Place, Rows, Vector

__all__ = ["Cuda", "load"]

_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
_BYTES = np.dtype(np.uint8)


def load() -> Cuda:
    """Return the backend.

    Raises
    ------
    ImportError
        If it was not built, or there is no GPU or no driver that it can use.
    """
    try:
        from robustkern import _cuda
    except ImportError as error:
        try:
            from robustkern._cpu import cuda as built
        except ImportError:
            built = (
                "not built: robustkern was installed without its compiled part. Install a C++17 compiler with OpenMP "
                "and CUDA 12.8 or newer, then reinstall robustkern"
            )
        raise ImportError(built if built.startswith("not built") else f"{built}, but: {error}") from None
    try:
        devices = _cuda.devices()
    except RuntimeError as error:
        remedy = _remedy(_cuda.runtime_version(), _cuda.driver_version())
        raise ImportError(f"no GPU can be used: {error}; {remedy}") from None
    return Cuda(_cuda, devices)


def _remedy(runtime: int, driver: int) -> str:
    """Say what makes a GPU usable. Versions are CUDA's, 13000 for 13.0; the driver's is 0 where there is none."""
    built = f"built with CUDA {runtime // 1000}.{runtime % 1000 // 10}"
    if not driver:
        return f"{built}, and there is no NVIDIA driver. Install one for CUDA {runtime // 1000} or newer"
    versions = f"{built}, driver for CUDA {driver // 1000}.{driver % 1000 // 10}"
    if driver // 1000 < runtime // 1000:
        return f"{versions}. Update the driver, or reinstall robustkern with an older CUDA (12.8 or newer)"
    return f"{versions}. See that nvidia-smi lists a GPU, and that CUDA_VISIBLE_DEVICES does not hide it"


class Cuda:
    """See `contract.primitives.Kernels`. Waits for the caller's stream once a call, where it returns numbers."""

    name = "cuda"
    roundings = 384.0, 0.25  # of more than a thousand rows four blocks of threads share the columns; of fewer, more
    dtypes = DTYPES

    def __init__(self, module: Any, devices: list[dict[str, Any]]) -> None:
        self._cuda = module
        self.devices = devices

    def place_of(self, rows: Rows) -> Place:
        """Return where rows lie."""
        place: Place | None = rows.place
        assert place is not None
        return place

    def _call(self, primitive: str, rows: Rows, *arguments: Any) -> None:
        place = self.place_of(rows)
        kept = []

        def allocate(nbytes: int) -> int:
            try:
                memory = place.empty((nbytes,), _BYTES)
            except Exception as error:  # each library has a class of its own
                raise MemoryError(
                    f"{primitive}: no {nbytes} bytes of workspace on {place} for n={rows.n} rows of d={rows.d} "
                    f"{rows.dtype.name} columns: {error}"
                ) from error
            kept.append(memory)
            return int(memory.address)

        stream = place.stream()
        getattr(self._cuda, primitive)(
            place.device, stream, allocate, rows.addresses, rows.offsets, _CODES[rows.dtype], *arguments
        )
        if place.waits:
            self._cuda.synchronize(place.device, stream)

    def takes_float32_products(self, rows: Rows) -> bool:
        """See the contract; data centres' GPUs multiply float64 at the speed of their memory."""
        return not self.devices[self.place_of(rows).device]["fast_doubles"]

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
        nonfinite = np.zeros(rows.n, dtype=np.bool_)
        sq_distances = np.zeros(rows.n if measure is None else len(measure)) if distances else None
        self._call(
            "select_columns",
            rows,
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
        )
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
        m = rows.n + origin
        out = np.zeros((m if lines is None else lines, m))
        self._call("gram", rows, multiplicities, origin, scale, single, out)
        return out

    def row_sq_distances(self, rows: Rows, centres: Rows | None, *, scale: float = 1.0, exact: bool = True) -> Matrix:
        """See the contract; always exact."""
        out = np.zeros((1 if centres is None else centres.n, rows.n))
        self._call("row_sq_distances", rows, None if centres is None else centres.addresses, scale, out)
        return out

    def weighted_row_sum(self, rows: Rows, weights: Matrix, out: Rows, *, divisors: Vector | None = None) -> None:
        """See the contract."""
        self._call("weighted_row_sum", rows, weights, divisors, out.addresses)
