"""The caller's arrays as NumPy or as a description of device memory; nothing is copied."""

from __future__ import annotations

import functools
from typing import Any

import ml_dtypes
import numpy as np
from array_api_compat import is_numpy_array, is_torch_array
from numpy.typing import NDArray

from robustkern.contract.rows import DTYPES
from robustkern.errors import BackendUnavailable
from robustkern.inputs.addresses import address_of
from robustkern.inputs.devices import DeviceArray, Place, view_of

__all__ = [
    "ArrayView",
    "address",
    "array_view",
    "check_dtype",
    "checked_out",
    "described",
    "empty",
    "empty_tensor",
    "leaf_of",
    "library_of",
    "name_of",
    "place_of",
    "view_on_host",
    "where_is",
]

ArrayView = NDArray[Any] | DeviceArray


def name_of(path: tuple[Any, ...]) -> str:
    """Return how an error should call a leaf."""
    return "".join(f"[{key!r}]" for key in path)


def leaf_of(path: tuple[Any, ...]) -> str:
    """Return how an error should say of which leaf it speaks; nothing where there is but one."""
    return f", leaf {name_of(path)}" if path else ""


def described(x: Any) -> str:
    """Return how an error should call what came."""
    shape = getattr(x, "shape", None)
    if not isinstance(shape, (tuple, list)):
        return type(x).__name__
    return f"{type(x).__name__} of shape {tuple(shape)} and dtype {getattr(x, 'dtype', None)}"


def address(view: ArrayView) -> int:
    """Return where an array begins."""
    return view.address if isinstance(view, DeviceArray) else address_of(view)


def place_of(view: ArrayView) -> Place | None:
    """Return the GPU that an array is on, None for the host."""
    return view.place if isinstance(view, DeviceArray) else None


def array_view(x: Any, what: str) -> ArrayView:
    """Return an array in the host's memory as a NumPy view, one on a GPU as its description; nothing is copied."""
    if type(x) is np.ndarray:
        return x
    on_device = view_of(x, what)
    if on_device is not None:
        return on_device
    if is_torch_array(x):
        import torch

        if getattr(x, "is_nested", False) or x.layout != torch.strided:
            raise TypeError(f"{what} is a torch tensor of layout {x.layout}; expected a dense one (pass x.to_dense())")
        if x.is_quantized or x.is_complex():
            raise TypeError(f"{what} has dtype {x.dtype}; expected float16, bfloat16, float32, float64 or an integer")
        try:
            if x.requires_grad:
                x = x.detach()
            if x.is_neg():
                x = x.resolve_neg()
            array: NDArray[Any] = x.view(torch.int16).numpy() if x.dtype == torch.bfloat16 else x.numpy()
            return array.view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else array
        except (RuntimeError, TypeError) as error:  # tensors without memory of their own, dtypes NumPy lacks
            raise TypeError(f"{what} is a torch tensor that NumPy cannot view: {error}") from None
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{what} is a masked array, whose mask would be lost (pass x.filled(numpy.nan))")
    if is_numpy_array(x) or isinstance(x, np.generic):
        return np.asarray(x)
    raise TypeError(
        f"{what} is {described(x)}; expected a NumPy array, a torch tensor, or an array on a GPU that speaks DLPack "
        "(pass numpy.asarray(x))"
    )


def view_on_host(x: Any, what: str) -> NDArray[Any]:
    """Return an array of rows in the host's memory as a NumPy view; raise where it is no such array."""
    view = array_view(x, what)
    if isinstance(view, DeviceArray):
        raise BackendUnavailable(f"{what} are on {view.place}; this runs on arrays in the host's memory only")
    check_dtype(view.dtype, what, False)
    return view


@functools.lru_cache(maxsize=256)
def check_dtype(dtype: np.dtype[Any], what: str, integers: bool) -> None:
    """Raise where rows cannot be of a dtype; `integers` are for leaves that count."""
    if dtype in DTYPES:
        return
    if integers and dtype.kind in "iub" and dtype.isnative:
        return
    known = "float16, bfloat16, float32 or float64" + (" (or an integer counter)" if integers else "")
    remedy = (
        "swap its bytes: x.astype(x.dtype.newbyteorder('='))"
        if not dtype.isnative
        else "convert it, x.astype('float32')"
    )
    raise TypeError(f"{what} has dtype {dtype}; expected {known} ({remedy})")


def library_of(x: Any) -> str:
    """Return the name of an array's library."""
    if is_torch_array(x):
        return "torch"
    return "numpy" if is_numpy_array(x) or isinstance(x, np.generic) else type(x).__module__.partition(".")[0]


def empty(shape: tuple[int, ...], like: Any, view: ArrayView) -> Any:
    """Return a new array of the kind of another one, whose view is given too."""
    if isinstance(view, DeviceArray):
        return view.place.empty(shape, view.dtype).array
    if isinstance(like, (np.ndarray, np.generic)):
        return np.empty(shape, dtype=like.dtype)
    return empty_tensor(shape, like)


def empty_tensor(shape: tuple[int, ...], like: Any) -> Any:
    """Return a new torch tensor where another one is, whatever torch's default device."""
    import torch

    return torch.empty(shape, dtype=like.dtype, device=like.device)


def checked_out(out: Any, shape: tuple[int, ...], like: Any, view_like: ArrayView, what: str) -> Any:
    """Return the caller's array for the result, or raise where it cannot hold one like `like`."""
    if library_of(out) != library_of(like) or not (hasattr(out, "shape") and hasattr(out, "dtype")):
        raise TypeError(f"{what} is {described(out)}; expected a {library_of(like)} array like the updates")
    if tuple(out.shape) != shape or out.dtype != like.dtype:
        raise ValueError(
            f"{what} has shape {tuple(out.shape)} and dtype {out.dtype}; expected shape {shape} and dtype {like.dtype}"
        )
    view = array_view(out, what)
    if place_of(view) != place_of(view_like):
        raise ValueError(f"{what} is on {where_is(view)}; expected {where_is(view_like)} like the updates")
    if not view.flags.c_contiguous or not view.flags.writeable or not view.flags.aligned:
        raise ValueError(f"{what} must be contiguous, aligned and writeable (pass a fresh array)")
    return out


def where_is(view: ArrayView) -> str:
    """Return how an error should call the place of an array."""
    return "cpu" if isinstance(view, np.ndarray) else str(view.place)
