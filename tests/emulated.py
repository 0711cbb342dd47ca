"""The CUDA backend in tests: built for this processor (csrc/emulation), with arrays in the host's memory that say they
are on a GPU; and on a real one, as torch and CuPy see it."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import watched
from numpy.typing import NDArray

from robustkern.backends.cuda import Cuda
from robustkern.contract.primitives import Kernels, Selected, Window
from robustkern.contract.rows import Matrix, Rows, Vector
from robustkern.inputs.devices import Dlpack, Place, view_of

#: Which build: plain, address or thread (the sanitizers; Python must then have been started with their library).
VARIANT = os.environ.get("ROBUSTKERN_EMULATION", "plain")
FOLDER = watched.BUILD / "emulation" / VARIANT


def load() -> Any:
    """Return the emulated robustkern._cuda, or the reason why there is none."""
    found = watched.load(FOLDER, "_cuda")
    return f"{found} (run: make emulation)" if isinstance(found, str) else found


class OnDevice:
    """Memory of the host that says it is that of GPU 0, by DLPack and the array API."""

    def __init__(self, values: NDArray[Any], device: int = 0) -> None:
        self.values = values
        self.device = device
        self.dtype, self.shape, self.ndim = values.dtype, values.shape, values.ndim

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.device

    def __dlpack__(self, *, stream: int | None = None) -> Any:
        assert stream == 1
        return _capsule(self.values, self.device)

    def __array_namespace__(self) -> Any:
        return Namespace

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Any) -> OnDevice:
        return OnDevice(self.values[index], self.device)

    def __iter__(self) -> Any:
        return (OnDevice(row, self.device) for row in self.values)


class Namespace:
    """What is asked of an array library: new arrays, in memory that begins as garbage."""

    float16, float32, float64, uint8, int64 = np.float16, np.float32, np.float64, np.uint8, np.int64
    bfloat16 = ml_dtypes.bfloat16

    @staticmethod
    def empty(shape: tuple[int, ...], *, dtype: Any, device: int) -> OnDevice:
        made = np.empty(shape, dtype=dtype)
        made.view(np.uint8).fill(0xFF)  # of floats: NaN
        return OnDevice(made, device)


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


_new = ctypes.pythonapi.PyCapsule_New
_new.restype, _new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_capsules: list[Any] = []  # what the latest capsules point at


def _capsule(values: NDArray[Any], device: int) -> Any:
    axes = ctypes.c_int64 * max(values.ndim, 1)
    shape, strides = axes(*values.shape), axes(*(step // values.itemsize for step in values.strides))
    code = {"f": 2, "i": 0, "u": 1, "b": 6}.get(values.dtype.kind, 4)
    address = values.__array_interface__["data"][0]
    # Half of the address as an offset: a reader must add it.
    tensor = _Tensor(address - 64, 2, device, values.ndim, code, values.itemsize * 8, 1, shape, strides, 64, None, None)
    _capsules.append((tensor, shape, strides))
    del _capsules[:-4096]
    return _new(ctypes.addressof(tensor), b"dltensor", None)


@dataclass(frozen=True)
class Device:
    """How a test puts an array on a device and takes it back."""

    name: str
    put: Callable[[NDArray[Any]], Any]
    take: Callable[[Any], NDArray[Any]]


EMULATED_DEVICE = Device("emulated", lambda values: OnDevice(values.copy()), lambda x: x.values)


def torch_device() -> Device:
    """Return how torch does it; raises where it cannot."""
    torch = importlib.import_module("torch")

    def put(values: NDArray[Any]) -> Any:
        if values.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(values.view(np.int16)).to("cuda").view(torch.bfloat16)
        return torch.from_numpy(values).to("cuda")

    def take(x: Any) -> NDArray[Any]:
        if x.dtype == torch.bfloat16:
            return np.asarray(x.view(torch.int16).cpu().numpy().view(ml_dtypes.bfloat16))
        return np.asarray(x.cpu().numpy())

    put(np.zeros(1, dtype=np.float32))
    return Device("torch", put, take)


def cupy_device() -> Device:
    """Return how CuPy does it; raises where it cannot."""
    cupy = importlib.import_module("cupy")
    cupy.zeros(1)
    return Device("cupy", cupy.asarray, cupy.asnumpy)


@contextlib.contextmanager
def _that_takes(kernels: Cuda, options: dict[str, Any]) -> Iterator[None]:
    """Emulate, for `single` products, a device that takes them."""
    fast = kernels.devices[0]["fast_doubles"]
    emulated = hasattr(kernels._cuda, "set_fast_doubles")
    if emulated:
        kernels._cuda.set_fast_doubles(fast and not options.get("single", False))
    try:
        yield
    finally:
        if emulated:
            kernels._cuda.set_fast_doubles(fast)


def multiplies_float32(kernels: Kernels, rows: Rows) -> bool:
    """Tell whether `single` products of rows are float32 here: where rules ask for them, and in the emulation."""
    emulated = hasattr(getattr(kernels, "_cuda", None), "set_fast_doubles")
    return kernels.takes_float32_products(rows) or (emulated and rows.dtype != np.float64)


class StagedCuda(Cuda):
    """The backend, for rows in the host's memory: copies of them go to a device, and results come back."""

    def __init__(self, module: Any, devices: list[dict[str, Any]], device: Device) -> None:
        super().__init__(module, devices)
        self.device = device

    def _there(self, rows: Rows, used: NDArray[np.bool_] | None = None) -> Rows:
        """Copy the rows; those that are not used may be nowhere, and keep their addresses."""
        empty = np.zeros(0, dtype=rows.dtype)
        held = [
            [self.device.put(rows.array(s, i).copy() if used is None or used[i] else empty) for i in range(rows.n)]
            for s in range(len(rows.addresses))
        ]
        views = [[view_of(x, "a row") for x in segment] for segment in held]
        addresses = np.array([[view.address for view in segment] for segment in views], dtype=np.uint64)
        if used is not None:
            addresses[:, ~used] = rows.addresses[:, ~used]
        return Rows(addresses, rows.offsets, rows.dtype, held, views[0][0].place)

    def _back(self, there: Rows, rows: Rows) -> None:
        for s, segment in enumerate(there.owner):
            for i, x in enumerate(segment):
                rows.array(s, i)[:] = self.device.take(x)

    def select_columns(self, rows: Rows, window: Window, *, out: Rows | None = None, **options: Any) -> Selected:
        """See the base class."""
        target = None if out is None else self._there(out)
        found = super().select_columns(self._there(rows), window, out=target, **options)
        if out is not None and target is not None:
            self._back(target, out)
        return found

    def takes_float32_products(self, rows: Rows) -> bool:
        """See the base class."""
        return not self.devices[0]["fast_doubles"]

    def gram(self, rows: Rows, **options: Any) -> Matrix:
        """See the base class."""
        with _that_takes(self, options):
            return super().gram(self._there(rows), **options)

    def row_sq_distances(self, rows: Rows, centres: Rows | None, **options: Any) -> Matrix:
        """See the base class."""
        there = None if centres is None else self._there(centres)
        return super().row_sq_distances(self._there(rows), there, **options)

    def weighted_row_sum(self, rows: Rows, weights: Matrix, out: Rows, *, divisors: Vector | None = None) -> None:
        """See the base class."""
        target = self._there(out)
        super().weighted_row_sum(self._there(rows, weights.any(axis=0)), weights, target, divisors=divisors)
        self._back(target, out)


class EmulatedCuda(Cuda):
    """The backend, for rows in the host's memory too."""

    name = "cuda-emulated"

    def gram(self, rows: Rows, **options: Any) -> Matrix:
        """See the base class."""
        with _that_takes(self, options):
            return super().gram(rows, **options)

    def place_of(self, rows: Rows) -> Place:
        """See the base class."""
        return rows.place or Place(Dlpack("tests"), 0, OnDevice(np.empty(1, dtype=np.float32)))
