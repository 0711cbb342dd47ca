"""The devices that a study of scaling runs on: where rows lie, how a call is timed, and what it is compared with.

The yardstick of the CPU is the read pass of `robustkern.measure.reads`. On a GPU it is a copy from device memory to
device memory, of which every byte counts as one read and one write.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import robustkern
from robustkern.backends.registry import load_backend
from robustkern.measure.reads import Array, machine, read_pass

__all__ = ["DEVICES", "CupyCuda", "Device", "TorchCuda", "host_bytes", "open_cuda", "open_devices"]

#: At most so many bytes are copied for the yardstick of a GPU: 20 times its cache, and little beside the rows.
COPY_BYTES = 1 << 30
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")

Call = Callable[[], Any]


def host_bytes() -> int:
    """Return how many bytes of main memory are free, or allowed to this container if that is less."""
    try:
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text(encoding="utf-8").splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        free = min(free, int(CGROUP.read_text(encoding="utf-8")))
    return free


class Device:
    """The CPU; what is different on a GPU is overridden.

    Attributes
    ----------
    name : str
        As on the command line.
    transfers : bool
        Whether rows must be brought to it.
    """

    name = "cpu"
    transfers = False

    def __init__(self) -> None:
        load_backend("cpp")  # which holds the read pass

    def facts(self) -> dict[str, Any]:
        """Return what a reader must know of it."""
        here = machine()
        return {"name": here["cpu"], "threads": here["threads"], "isa": here["isa"], "free_bytes": self.free_bytes()}

    def free_bytes(self) -> int:
        """Return how many bytes of its memory are free."""
        return host_bytes()

    def put(self, host: Array) -> Any:
        """Return the array in this device's memory."""
        return host

    def get(self, array: Any) -> Array:
        """Return an array of this device as a NumPy array."""
        return np.asarray(array)

    def aggregate(self, rows: Any, rule: Any, f: int, out: Any) -> None:
        """Run the rule on rows of this device."""
        robustkern.aggregate(rows, rule, f=f, seed=0, out=out)

    def yardstick(self, rows: Any) -> tuple[Call, float]:
        """Return a call to compare with, and for how many reads of all the rows it stands."""
        return read_pass(rows), 1.0

    def refill(self, rows: Any, host: Array) -> None:
        """Bring the host's rows to this device again, into memory that is there."""
        raise NotImplementedError

    @contextlib.contextmanager
    def pinned(self, host: Array) -> Iterator[None]:
        """Pin the host's rows in place meanwhile: the device then fetches them itself."""
        yield

    def release(self) -> None:
        """Give back memory that a library keeps of arrays that are gone."""

    def synchronize(self) -> None:
        """Wait until all that was started is done."""

    def clock(self) -> float:
        """Return the time in seconds."""
        return time.perf_counter()

    def time(self, call: Call) -> float:
        """Return the seconds of one call, its work on the device included."""
        self.synchronize()
        started = self.clock()
        call()
        self.synchronize()
        return self.clock() - started


class TorchCuda(Device):
    """The current CUDA device, by torch."""

    name = "cuda"
    transfers = True
    place = "cuda"

    def __init__(self) -> None:
        import torch

        if not torch.cuda.is_available():
            raise RuntimeError(f"torch {torch.__version__} sees no CUDA device")
        self.torch = torch

    def facts(self) -> dict[str, Any]:
        """Return name, memory and versions."""
        cuda = self.torch.cuda
        here = cuda.get_device_properties(cuda.current_device())
        return {
            "name": here.name,
            "compute_capability": f"{here.major}.{here.minor}",
            "memory_bytes": here.total_memory,
            "free_bytes": self.free_bytes(),
            "library": f"torch {self.torch.__version__}",
            "runtime": self.torch.version.cuda,
            "driver": getattr(self.torch._C, "_cuda_getDriverVersion", lambda: None)(),
        }

    def free_bytes(self) -> int:
        """Return how many bytes of its memory are free."""
        return int(self.torch.cuda.mem_get_info()[0])

    def _tensor(self, host: Array) -> Any:
        if host.dtype.name == "bfloat16":  # which torch does not take from NumPy
            return self.torch.from_numpy(host.view(np.int16)).view(self.torch.bfloat16)
        return self.torch.from_numpy(host)

    def put(self, host: Array) -> Any:
        """Return the array as a tensor of the device."""
        return self._tensor(host).to(self.place)

    def get(self, array: Any) -> Array:
        """Return a tensor as a NumPy array; bfloat16 as float32."""
        return np.asarray((array.float() if array.dtype == self.torch.bfloat16 else array).cpu().numpy())

    def refill(self, rows: Any, host: Array) -> None:
        """Copy the host's rows into the tensor."""
        rows.copy_(self._tensor(host), non_blocking=True)

    def yardstick(self, rows: Any) -> tuple[Call, float]:
        """Return a copy of as many of the rows' bytes as `COPY_BYTES` allows."""
        part = rows.reshape(-1)[: max(COPY_BYTES // rows.element_size(), 1)]
        scratch = self.torch.empty_like(part)
        return lambda: scratch.copy_(part), 2 * part.numel() / rows.numel()

    @contextlib.contextmanager
    def pinned(self, host: Array) -> Iterator[None]:
        """Pin the host's rows in place meanwhile."""
        runtime: Any = self.torch.cuda.cudart()  # type: ignore[no-untyped-call]
        status = int(runtime.cudaHostRegister(host.ctypes.data, host.nbytes, 0))
        if status:
            raise RuntimeError(f"cudaHostRegister answers {status} for {host.nbytes:,} bytes")
        try:
            yield
        finally:
            runtime.cudaHostUnregister(host.ctypes.data)

    def release(self) -> None:
        """Give back what torch keeps."""
        self.torch.cuda.empty_cache()

    def synchronize(self) -> None:
        """Wait for the device."""
        self.torch.cuda.synchronize()


class CupyCuda(Device):
    """The current CUDA device, by CuPy."""

    name = "cuda"
    transfers = True

    def __init__(self) -> None:
        import cupy

        self.cupy, self.runtime = cupy, cupy.cuda.runtime
        self.runtime.getDeviceCount()  # raises where there is none

    def facts(self) -> dict[str, Any]:
        """Return name, memory and versions."""
        here = self.runtime.getDeviceProperties(self.runtime.getDevice())
        return {
            "name": here["name"].decode(),
            "compute_capability": f"{here['major']}.{here['minor']}",
            "memory_bytes": int(here["totalGlobalMem"]),
            "free_bytes": self.free_bytes(),
            "library": f"cupy {self.cupy.__version__}",
            "runtime": self.runtime.runtimeGetVersion(),
            "driver": self.runtime.driverGetVersion(),
        }

    def free_bytes(self) -> int:
        """Return how many bytes of its memory are free."""
        return int(self.runtime.memGetInfo()[0])

    def put(self, host: Array) -> Any:
        """Return the array in the device's memory."""
        return self.cupy.asarray(host)

    def get(self, array: Any) -> Array:
        """Return an array of the device as a NumPy array."""
        return np.asarray(self.cupy.asnumpy(array))

    def refill(self, rows: Any, host: Array) -> None:
        """Copy the host's rows into the device's."""
        rows.set(host)

    def yardstick(self, rows: Any) -> tuple[Call, float]:
        """Return a copy of as many of the rows' bytes as `COPY_BYTES` allows."""
        part = rows.reshape(-1)[: max(COPY_BYTES // rows.itemsize, 1)]
        scratch = self.cupy.empty_like(part)
        return lambda: self.cupy.copyto(scratch, part), 2 * part.size / rows.size

    @contextlib.contextmanager
    def pinned(self, host: Array) -> Iterator[None]:
        """Pin the host's rows in place meanwhile."""
        self.runtime.hostRegister(host.ctypes.data, host.nbytes, 0)
        try:
            yield
        finally:
            self.runtime.hostUnregister(host.ctypes.data)

    def release(self) -> None:
        """Give back what CuPy keeps."""
        self.cupy.get_default_memory_pool().free_all_blocks()

    def synchronize(self) -> None:
        """Wait for the device."""
        self.runtime.deviceSynchronize()


def open_cuda() -> Device:
    """Return the CUDA device by torch or by CuPy, whichever has it.

    Raises
    ------
    RuntimeError
        If none has; with all reasons.
    """
    state = robustkern.info()["backends"].get("cuda", "this version of robustkern has no CUDA backend")
    reasons = [] if state == "available" else [state]
    for library, kind in (("torch", TorchCuda), ("cupy", CupyCuda)):
        try:
            device = kind()
        except ImportError as error:
            reasons.append(f"{library} is not here: {error}")
        except Exception as error:  # each library and driver has errors of its own
            reasons.append(f"{library}: {error}")
        else:
            if state == "available":
                return device
    raise RuntimeError("; ".join(reasons))


#: Each device that can be asked for, and what opens it or says why it is not there.
DEVICES: dict[str, Callable[[], Device]] = {"cpu": Device, "cuda": open_cuda}


def open_devices(names: list[str]) -> tuple[list[Device], dict[str, str]]:
    """Return the devices that are there, and of the others why they are not."""
    there, missing = [], {}
    for name in names:
        try:
            there.append(DEVICES[name]())
        except RuntimeError as error:
            missing[name] = str(error)
    return there, missing
