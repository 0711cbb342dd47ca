"""The capability table: which backend runs which primitive for which dtype on which device, or why it does not.

It decides the backend of a call, and feeds the error texts, `robustkern.info()`, the docs and the test ids.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import platform
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

from robustkern.contract.primitives import PRIMITIVES, Kernels
from robustkern.contract.rows import DTYPES
from robustkern.errors import BackendUnavailable, SettingError, warn

__all__ = ["BACKENDS", "SystemInfo", "capabilities", "choose", "info", "load_backend", "use_backend"]


@dataclass(frozen=True)
class Backend:
    """One implementation of the primitives."""

    name: str
    module: str
    device: str
    dtypes: tuple[np.dtype[Any], ...]
    remedy: str


#: Best first: "auto" takes the first that is here and can run the call.
BACKENDS = (
    Backend(
        "cpp",
        "robustkern.backends.cpp",
        "cpu",
        DTYPES,
        "install a C++17 compiler with OpenMP, then robustkern again from its sources: pip install --force-reinstall .",
    ),
    Backend("numba", "robustkern.backends.numba", "cpu", DTYPES, "run: pip install 'robustkern[numba]'"),
    Backend("reference", "robustkern.backends.reference", "cpu", DTYPES, "always there"),
    Backend("cuda", "robustkern.backends.cuda", "cuda", DTYPES, "docs/gpu.md says what it needs"),
)

_BEST_DTYPES = frozenset(BACKENDS[0].dtypes)
_loaded: dict[str, Kernels | str] = {}  # the backend, or the reason why it is absent
_override: ContextVar[str | None] = ContextVar("robustkern_backend", default=None)
_warned = False


def _load(backend: Backend) -> Kernels | str:
    if backend.name not in _loaded:
        try:
            _loaded[backend.name] = importlib.import_module(backend.module).load()
        except SettingError:
            raise
        except Exception as error:  # an optional part that fails, however it does, is one that is not there
            said = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
            _loaded[backend.name] = f"{' '.join(said.split())[:300]} ({getattr(error, 'remedy', backend.remedy)})"
    return _loaded[backend.name]


def load_best() -> None:
    """Load the best backend, where it is installed, with the package.

    Not at the first call: a process that forked in the middle of that would leave to its child the lock of a module
    which is being imported, by a thread that the child does not have.
    """
    with contextlib.suppress(SettingError):  # which is told when somebody calls
        _load(BACKENDS[0])


def load_backend(name: str) -> Kernels:
    """Return a backend by name.

    Raises
    ------
    ValueError
        If there is no backend of that name.
    BackendUnavailable
        If it is not installed; the message says what to do.
    """
    backend = _by_name(name, "backend")
    loaded = _load(backend)
    if isinstance(loaded, str):
        raise BackendUnavailable(f"backend {name!r} is not available: {loaded}")
    return loaded


def _by_name(name: str, source: str) -> Backend:
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    known = ", ".join(["auto", *(b.name for b in BACKENDS)])
    raise ValueError(f"{source} must be one of {known}; got {name!r}")


def capabilities() -> list[dict[str, str]]:
    """Return one entry for each backend, primitive, dtype and device: "yes", or the reason why not."""
    table = []
    for backend in BACKENDS:
        loaded = _load(backend)
        for primitive in PRIMITIVES:
            for dtype in DTYPES:
                if isinstance(loaded, str):
                    answer = loaded
                elif dtype not in backend.dtypes:
                    answer = f"not for {dtype.name}"
                else:
                    answer = "yes"
                table.append(
                    {
                        "backend": backend.name,
                        "primitive": primitive,
                        "dtype": dtype.name,
                        "device": backend.device,
                        "available": answer,
                    }
                )
    return table


@functools.cache
def _from_environment() -> str | None:
    """Read ROBUSTKERN_BACKEND, once a process: small calls would feel it."""
    return os.environ.get("ROBUSTKERN_BACKEND") or None


def choose(name: str, dtypes: set[np.dtype[Any]], device: str = "cpu") -> Kernels:
    """Return the backend that runs a call.

    Parameters
    ----------
    name : str
        "auto", or one backend. "auto" obeys `use_backend`, then ``ROBUSTKERN_BACKEND``.
    dtypes : set of numpy dtypes
        Dtypes of the rows.
    device : str
        Where the rows are.

    Raises
    ------
    BackendUnavailable
        If none can; the message lists every backend with its reason.
    """
    source = "backend"
    if name == "auto":
        override = _override.get()
        if override is not None:
            name = override
        elif (wanted := _from_environment()) is not None:
            name, source = wanted, "ROBUSTKERN_BACKEND"
        else:  # the usual call: the best backend is here and can run it
            best = _loaded.get(BACKENDS[0].name, "")
            if not isinstance(best, str) and device == BACKENDS[0].device and dtypes <= _BEST_DTYPES:
                return best
    candidates = BACKENDS if name == "auto" else (_by_name(name, source),)
    reasons = []
    for backend in candidates:
        unsupported = dtypes.difference(backend.dtypes)
        if device != backend.device:
            reasons.append(f"{backend.name}: runs on {backend.device}, the rows are on {device}")
        elif unsupported:
            reasons.append(f"{backend.name}: not for {', '.join(sorted(d.name for d in unsupported))}")
        else:
            loaded = _load(backend)
            if not isinstance(loaded, str):
                if name == "auto":
                    _warn_of_fallback(backend)
                return loaded
            reasons.append(f"{backend.name}: {loaded}")
    raise BackendUnavailable(f"no backend for rows on {device}: " + "; ".join(reasons))


def _warn_of_fallback(backend: Backend) -> None:
    """Say once a process that the compiled backend is missing."""
    global _warned  # noqa: PLW0603
    if backend.name == BACKENDS[0].name or backend.device != BACKENDS[0].device or _warned:
        return
    _warned = True
    speed = {"numba": "2 to 5 times slower", "reference": "100 times slower and more"}[backend.name]
    reasons = "; ".join(
        f"{other.name}: {_load(other)}" for other in BACKENDS[: [b.name for b in BACKENDS].index(backend.name)]
    )
    warn(
        f"robustkern runs on its {backend.name} backend, {speed} than compiled code. Missing: {reasons}", RuntimeWarning
    )


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Let every call with ``backend="auto"`` in this context use one backend.

    Parameters
    ----------
    name : str
        "auto", "cpp", "numba", "reference" or "cuda". Also holds in the tasks started in the context (a context
        variable), and not in other threads.

    Raises
    ------
    ValueError, BackendUnavailable
        If there is no such backend, or it is not installed.
    """
    if name != "auto":
        load_backend(name)
    token = _override.set(name)
    try:
        yield
    finally:
        _override.reset(token)


class SystemInfo(TypedDict):
    """What `info` returns."""

    version: str
    python: str
    numpy: str
    machine: str
    backends: dict[str, str]
    isa: str | None
    isas: list[str]
    threads: int
    gpus: list[dict[str, Any]]
    capabilities: list[dict[str, str]]


def info() -> SystemInfo:
    """Return versions, backends with the reason where one is absent, instruction set and threads.

    Returns
    -------
    dict
        ``version``, ``python``, ``numpy``, ``machine``, ``backends`` (name to "available" or the reason), ``isa`` and
        ``isas`` (in use, and available, best first; None and empty without the compiled backend), ``threads``
        (that a large call uses), ``gpus`` (name, compute capability, multiprocessors and memory of each, where the CUDA
        backend can run), ``capabilities``.
    """
    from robustkern import __version__
    from robustkern.backends.threads import requested_threads, usable_cores

    backends = {b.name: loaded if isinstance(loaded := _load(b), str) else "available" for b in BACKENDS}
    cpp: Any = _loaded["cpp"]
    cuda: Any = _loaded["cuda"]
    here = not isinstance(cpp, str)
    cores = usable_cores()
    return {
        "version": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
        "backends": backends,
        "isa": cpp.isa if here else None,
        "isas": cpp.supported_isas() if here else [],
        "threads": requested_threads() or (cpp.max_threads() if here else cores),
        "gpus": [] if isinstance(cuda, str) else cuda.devices,
        "capabilities": capabilities(),
    }
