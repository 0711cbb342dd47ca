"""Arrays on a GPU: where they lie, on which stream their library works, and new ones of the same kind.

torch and CuPy are looked at through their own attributes, other libraries (JAX) through DLPack and the array API.
None of them is imported here before an array of it has come.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np
from array_api_compat import is_cupy_array, is_torch_array
from numpy.typing import NDArray

from robustkern.lazy import lazy

__all__ = ["DeviceArray", "Place", "view_of"]

LEGACY_STREAM = 1  # what CUDA and DLPack call the stream that waits for all others
CUDA_DEVICES = (2, 13)  # DLPack's numbers of device memory, and of memory that host and devices share


class Library(Protocol):
    """What is asked of an array library."""

    name: str
    #: Whether others than the library's own stream may use a result: the call then waits until it is there.
    waits: bool

    def view(self, x: Any, what: str) -> DeviceArray:
        """Describe an array."""

    def empty(self, shape: Sequence[int], dtype: np.dtype[Any], device: int, like: Any) -> Any:
        """Allocate an array."""

    def stream(self, device: int) -> int:
        """Return the handle of the stream that the library works on now."""

    def assign(self, target: Any, source: Any) -> None:
        """Copy an array of the library, or of NumPy, into one of the same shape."""

    def to_host(self, x: Any) -> NDArray[Any]:
        """Return a copy in NumPy."""


@dataclass(frozen=True)
class Place:
    """A device as one library sees it; what `Rows` know of where they lie."""

    library: Library
    device: int
    like: Any = field(compare=False, repr=False)  # some array there

    def __str__(self) -> str:
        return f"cuda:{self.device}"

    @property
    def waits(self) -> bool:
        """As `Library.waits`."""
        return self.library.waits

    def stream(self) -> int:
        """Return the handle of the stream that the caller works on."""
        return self.library.stream(self.device)

    def empty(self, shape: Sequence[int], dtype: np.dtype[Any]) -> DeviceArray:
        """Allocate an array there."""
        made = self.library.empty(tuple(shape), dtype, self.device, self.like)
        return self.library.view(made, "a new array")


class Flags(NamedTuple):
    """As NumPy's."""

    c_contiguous: bool
    writeable: bool
    aligned: bool


@dataclass(eq=False)
class DeviceArray:
    """An array on a device, described as NumPy describes its own; strides are in bytes."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype[Any]
    place: Place
    array: Any
    writeable: bool = True

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of a value."""
        return self.dtype.itemsize

    @property
    def flags(self) -> Flags:
        """What the address and the strides say."""
        step, contiguous = self.itemsize, True
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            contiguous &= size == 1 or stride == step
            step *= size
        return Flags(contiguous or self.size == 0, self.writeable, self.address % self.dtype.alignment == 0)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice) -> DeviceArray:
        """Return a part along the first axis."""
        return self.place.library.view(self.array[index], "a part of an array")


def _described(
    library: Library,
    x: Any,
    device: int,
    address: int,
    shape: Sequence[int],
    strides: Sequence[int],
    dtype: np.dtype[Any],
    writeable: bool = True,
) -> DeviceArray:
    place = Place(library, device, x)
    return DeviceArray(address, tuple(shape), tuple(strides), dtype, place, x, writeable)


class Torch:
    """CUDA tensors."""

    name = "torch"
    waits = False

    @lazy
    def _dtypes(self) -> dict[Any, np.dtype[Any]]:
        import torch

        names = ("float16", "float32", "float64", "bool", "uint8", "int8", "int16", "int32", "int64")
        known = {getattr(torch, name): np.dtype(name) for name in names}
        return known | {torch.bfloat16: np.dtype(ml_dtypes.bfloat16)}

    def view(self, x: Any, what: str) -> DeviceArray:
        """See `Library`."""
        import torch

        if x.device.type != "cuda" or torch.version.hip is not None:
            raise ValueError(f"{what} is a torch tensor on device {x.device}; expected cpu or cuda (pass x.cpu())")
        if getattr(x, "is_nested", False) or x.layout != torch.strided:
            raise TypeError(f"{what} is a torch tensor of layout {x.layout}; expected a dense one (pass x.to_dense())")
        dtype = self._dtypes.get(x.dtype)
        if dtype is None:
            raise TypeError(f"{what} has dtype {x.dtype}; expected float16, bfloat16, float32, float64 or an integer")
        try:
            x = x.detach()
            if x.is_neg():
                x = x.resolve_neg()
            address = x.data_ptr()
        except RuntimeError as error:  # what a transformation sees of a tensor
            raise TypeError(f"{what} is a torch tensor without memory of its own: {error}") from None
        strides = [step * dtype.itemsize for step in x.stride()]
        return _described(self, x, x.get_device(), address, tuple(x.shape), strides, dtype)

    def empty(self, shape: Sequence[int], dtype: np.dtype[Any], device: int, like: Any) -> Any:
        """See `Library`."""
        import torch

        return torch.empty(tuple(shape), dtype=getattr(torch, dtype.name), device=like.device)

    def stream(self, device: int) -> int:
        """See `Library`."""
        import torch

        return int(torch.cuda.current_stream(device).cuda_stream)

    def assign(self, target: Any, source: Any) -> None:
        """See `Library`."""
        import torch

        target.copy_(torch.from_numpy(source) if isinstance(source, np.ndarray) else source)

    def to_host(self, x: Any) -> NDArray[Any]:
        """See `Library`."""
        return np.asarray(x.cpu().numpy())


class Cupy:
    """CuPy arrays."""

    name = "cupy"
    waits = False

    def view(self, x: Any, what: str) -> DeviceArray:
        """See `Library`."""
        return _described(self, x, x.device.id, x.data.ptr, x.shape, x.strides, np.dtype(x.dtype))

    def empty(self, shape: Sequence[int], dtype: np.dtype[Any], device: int, like: Any) -> Any:
        """See `Library`."""
        import cupy

        with cupy.cuda.Device(device):
            return cupy.empty(tuple(shape), dtype=dtype)

    def stream(self, device: int) -> int:
        """See `Library`."""
        import cupy

        return int(cupy.cuda.get_current_stream(device).ptr)

    def assign(self, target: Any, source: Any) -> None:
        """See `Library`."""
        import cupy

        with target.device:
            target[...] = cupy.asarray(source)

    def to_host(self, x: Any) -> NDArray[Any]:
        """See `Library`."""
        return np.asarray(x.get())


class _DLTensor(ctypes.Structure):
    """The head of what a DLPack capsule points at."""

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
    )


_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype, _pointer_of.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


class Dlpack:
    """Arrays of any other library that speaks DLPack and the array API."""

    waits = True

    def __init__(self, name: str) -> None:
        self.name = name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dlpack) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)

    def view(self, x: Any, what: str) -> DeviceArray:
        """See `Library`."""
        device = int(x.__dlpack_device__()[1])
        capsule = x.__dlpack__(stream=LEGACY_STREAM)
        tensor = _DLTensor.from_address(_pointer_of(capsule, b"dltensor"))
        codes = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 6: "bool"}
        name = codes.get(tensor.code, "unknown") + (str(tensor.bits) if tensor.code != 6 else "")
        try:
            dtype = np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
        except TypeError:
            raise TypeError(f"{what} has DLPack type code {tensor.code} of {tensor.bits} bits; expected float16, "
                            "bfloat16, float32, float64 or an integer") from None  # fmt: skip
        shape = tensor.shape[: tensor.ndim]
        strides = tensor.strides[: tensor.ndim] if tensor.strides else _c_strides(shape)
        # The array keeps its memory; the capsule only said where it is.
        address = int(tensor.data or 0) + int(tensor.byte_offset)
        return _described(self, x, device, address, shape, [s * dtype.itemsize for s in strides], dtype)

    def empty(self, shape: Sequence[int], dtype: np.dtype[Any], device: int, like: Any) -> Any:
        """See `Library`."""
        xp = like.__array_namespace__()
        return xp.empty(tuple(shape), dtype=getattr(xp, dtype.name), device=like.device)

    def stream(self, device: int) -> int:
        """See `Library`."""
        return LEGACY_STREAM

    def assign(self, target: Any, source: Any) -> None:
        """Refuse: such arrays may be immutable."""
        raise TypeError(
            f"{self.name} arrays must be contiguous and of a floating-point dtype (make a contiguous copy, leave "
            "integer leaves out)"
        )

    def to_host(self, x: Any) -> NDArray[Any]:
        """Refuse, as `assign`: it would have to be brought back."""
        self.assign(x, x)
        raise AssertionError


def _c_strides(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


_TORCH, _CUPY = Torch(), Cupy()


def view_of(x: Any, what: str) -> DeviceArray | None:
    """Describe an array on a device; None if it is something else.

    Raises
    ------
    TypeError, ValueError
        If it is on a device that is no GPU, or of a kind that nothing here can use.
    """
    if is_torch_array(x):
        return None if x.is_cpu else _TORCH.view(x, what)
    if is_cupy_array(x):
        return _CUPY.view(x, what)
    if not isinstance(x, np.ndarray) and hasattr(x, "__dlpack_device__") and x.__dlpack_device__()[0] in CUDA_DEVICES:
        return Dlpack(type(x).__module__.partition(".")[0]).view(x, what)
    return None
