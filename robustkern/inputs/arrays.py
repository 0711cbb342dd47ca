"""The caller's arrays as NumPy or as a description of device memory; nothing is copied."""

from __future__ import annotations

import functools
from typing import Any

import ml_dtypes
import numpy as np
from array_api_compat import is_jax_array, is_numpy_array, is_torch_array
from numpy.typing import NDArray

from robustkern.errors import BackendUnavailable, warn
from robustkern.inputs.devices import DeviceArray, Place, view_of
from robustkern.inputs.leaves import FLOAT8, computed

try:  # small calls would feel the difference
    from robustkern._cpu import address_of
except ImportError:
    from robustkern.contract.rows import address_of

__all__ = [
    "ArrayView",
    "address",
    "address_of",
    "array_view",
    "check_dtype",
    "checked_out",
    "described",
    "empty",
    "empty_tensor",
    "has_memory",
    "leaf_of",
    "library_of",
    "name_of",
    "pairs",
    "place_of",
    "refuse_traced",
    "view_on_host",
    "warn_of_gradients",
    "where_is",
]

ArrayView = NDArray[Any] | DeviceArray


TRACED = (
    "traced or transformed by torch, which cannot follow the kernels (call robustkern outside of it, or "
    "robustkern.adapters.torch.aggregate, an operator that torch knows)"
)


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


def array_view(x: Any, what: str, *, is_input: bool = True) -> ArrayView:
    """Return an array in the host's memory as a NumPy view, one on a GPU as its description; nothing is copied.

    Inputs that require gradients, which are not recorded, warn.
    """
    if type(x) is np.ndarray:
        return x
    on_device = view_of(x, what)
    if on_device is not None:
        return on_device
    if is_torch_array(x):
        import torch

        if getattr(x, "is_nested", False) or x.layout != torch.strided:
            raise TypeError(f"{what} is a torch tensor of layout {x.layout}; expected a dense one (pass x.to_dense())")
        if x.is_quantized:
            raise TypeError(f"{what} has dtype {x.dtype}; expected floats or integers (pass x.dequantize())")
        if torch._is_functional_tensor(x):
            raise TypeError(f"{what} is a torch tensor without memory of its own, of a function that is {TRACED}")
        if not is_input and (x.is_neg() or x.is_conj()):
            raise ValueError(
                f"{what} is a view that torch negates or conjugates as it is read, and the result would go to a copy "
                "(pass a fresh tensor)"
            )
        if not has_memory(x):
            raise TypeError(f"{what} is a torch tensor whose storage was freed (gather it first)")
        try:
            if x.requires_grad:
                if is_input:
                    warn_of_gradients()
                x = x.detach()
            x = x.resolve_conj().resolve_neg()
            bits = _torch_bits().get(x.dtype)
            array: NDArray[Any] = x.numpy() if bits is None else x.view(bits[0]).numpy().view(bits[1])
            return array
        except (RuntimeError, TypeError) as error:  # tensors without memory of their own, dtypes NumPy lacks
            raise TypeError(f"{what} is a torch tensor that NumPy cannot view: {error}") from None
    if is_jax_array(x):
        return np.asarray(x)  # where it is, on the processor
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{what} is a masked array, whose mask would be lost (pass x.filled(numpy.nan))")
    if is_numpy_array(x) or isinstance(x, np.generic):
        return np.asarray(x)
    raise TypeError(
        f"{what} is {described(x)}; expected a NumPy array, a torch tensor, a JAX array, or an array on a GPU that "
        "speaks DLPack (pass numpy.asarray(x))"
    )


@functools.cache
def _torch_bits() -> dict[Any, tuple[Any, np.dtype[Any]]]:
    """Dtypes of torch that its NumPy lacks: as which integers they are viewed, and what NumPy calls them."""
    import torch

    return {
        torch.bfloat16: (torch.int16, np.dtype(ml_dtypes.bfloat16)),
        torch.float8_e4m3fn: (torch.uint8, FLOAT8[0]),
        torch.float8_e5m2: (torch.uint8, FLOAT8[1]),
    }


def warn_of_gradients() -> None:
    """Say that gradients are dropped, where torch records them."""
    import torch

    if torch.is_grad_enabled():
        warn(
            "updates require gradients, which do not flow through robustkern (pass x.detach(), or call it under "
            "torch.no_grad())",
            UserWarning,
        )


def has_memory(tensor: Any) -> bool:
    """Tell whether a tensor's storage is there, and was not freed under it, as libraries that shard models do."""
    try:
        reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        wanted = (tensor.storage_offset() + reach) * tensor.element_size()
        return bool(tensor.numel() == 0 or tensor.untyped_storage().nbytes() >= wanted)
    except RuntimeError:  # it never had one: whoever views it says why
        return True


def pairs(view: ArrayView) -> NDArray[Any]:
    """Return complex numbers as pairs of floats, in the same memory, which is the host's."""
    assert isinstance(view, np.ndarray)
    parts = view.real
    strides = (*parts.strides, parts.itemsize)
    return np.lib.stride_tricks.as_strided(parts, (*parts.shape, 2), strides, writeable=view.flags.writeable)


def view_on_host(x: Any, what: str, *, is_input: bool = True) -> NDArray[Any]:
    """Return an array of rows in the host's memory as a NumPy view; raise where it is no such array."""
    view = array_view(x, what, is_input=is_input)
    if isinstance(view, DeviceArray):
        raise BackendUnavailable(f"{what} are on {view.place}; this runs on arrays in the host's memory only")
    check_dtype(view.dtype, what, False)
    return view


@functools.lru_cache(maxsize=256)
def check_dtype(dtype: np.dtype[Any], what: str, integers: bool, library: str = "numpy") -> None:
    """Raise where rows cannot be of a dtype; `integers` are for leaves that count."""
    if computed(dtype) is not None:
        return
    if integers and dtype.kind in "iub" and dtype.isnative:
        return
    known = "float16, bfloat16, float32 or float64" + (" (or an integer counter)" if integers else "")
    if not dtype.isnative:
        remedy = "swap its bytes: x.astype(x.dtype.newbyteorder('='))"
    else:
        remedy = "convert it, " + ("x.to(torch.float32)" if library == "torch" else "x.astype('float32')")
    raise TypeError(f"{what} has dtype {dtype}; expected {known} ({remedy})")


def library_of(x: Any) -> str:
    """Return the name of an array's library."""
    if is_torch_array(x):
        return "torch"
    if is_jax_array(x):
        return "jax"
    return "numpy" if is_numpy_array(x) or isinstance(x, np.generic) else type(x).__module__.partition(".")[0]


def empty(shape: tuple[int, ...], like: Any, view: ArrayView, dtype: np.dtype[Any] | None = None) -> Any:
    """Return a new array of the kind of another one, whose view is given too, perhaps of another dtype."""
    if isinstance(view, DeviceArray):
        return view.place.empty(shape, view.dtype).array
    if is_torch_array(like):
        return empty_tensor(shape, like, dtype)
    return np.empty(shape, dtype=view.dtype if dtype is None else dtype)  # JAX's arrays are made of it at the end


def empty_tensor(shape: tuple[int, ...], like: Any, dtype: np.dtype[Any] | None = None) -> Any:
    """Return a new torch tensor where another one is, whatever torch's default device, perhaps of another dtype."""
    import torch

    wanted = like.dtype if dtype is None else getattr(torch, dtype.name)
    made = torch.empty(shape, dtype=wanted, device=like.device)
    wrapped = torch._is_functional_tensor(made) or torch._C._functorch.is_functorch_wrapped_tensor(made)
    if wrapped or type(made) is not torch.Tensor:
        raise TypeError(f"tensors are not made in memory here: the call is {TRACED}")
    return made


def refuse_traced() -> None:
    """Raise where torch records operations, of which what the kernels do would be none: the result would be lost."""
    import torch

    recorded = torch._C._get_tracing_state() is not None
    if not recorded and torch._C._len_torch_dispatch_stack():
        from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

        recorded = any(type(mode).__name__ == "ProxyTorchDispatchMode" for mode in _get_current_dispatch_mode_stack())
    if recorded:
        raise TypeError(f"the call is {TRACED}")


def checked_out(
    out: Any, shape: tuple[int, ...], like: Any, view_like: ArrayView, what: str, dtype: np.dtype[Any] | None = None
) -> Any:
    """Return the caller's array for the result, or raise where it cannot hold one like `like`, or of another dtype."""
    if library_of(out) == "jax":
        raise TypeError(f"{what} is a JAX array, which cannot be written (drop out=)")
    if isinstance(out, np.generic):
        raise TypeError(f"{what} is a number, which cannot be written (pass numpy.asarray(x))")
    if library_of(out) != library_of(like) or not (hasattr(out, "shape") and hasattr(out, "dtype")):
        raise TypeError(f"{what} is {described(out)}; expected a {library_of(like)} array like the updates")
    view = None if tuple(out.shape) != shape else array_view(out, what, is_input=False)
    wanted = view_like.dtype if dtype is None else dtype
    if view is None or view.dtype != wanted:
        name = like.dtype if dtype is None else dtype
        raise ValueError(
            f"{what} has shape {tuple(out.shape)} and dtype {out.dtype}; expected shape {shape} and dtype {name}"
        )
    if place_of(view) != place_of(view_like):
        raise ValueError(f"{what} is on {where_is(view)}; expected {where_is(view_like)} like the updates")
    if not view.flags.c_contiguous or not view.flags.writeable or not view.flags.aligned:
        raise ValueError(f"{what} must be contiguous, aligned and writeable (pass a fresh array)")
    return out


def where_is(view: ArrayView) -> str:
    """Return how an error should call the place of an array."""
    return "cpu" if isinstance(view, np.ndarray) else str(view.place)
