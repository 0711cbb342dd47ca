"""What may be wrong with an installation, and what to do about it: ``robustkern doctor``."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

import robustkern
from robustkern.backends.cpp import Cpp
from robustkern.backends.registry import BACKENDS, load_backend
from robustkern.backends.threads import requested_threads, usable_cores
from robustkern.contract.primitives import Kernels, Window
from robustkern.contract.rows import DTYPES, Rows
from robustkern.errors import BackendUnavailable, plain

__all__ = ["Check", "examine", "report"]

#: Seconds that a check in another process may take.
PATIENCE_S = 60.0
#: Libraries that bring an OpenMP runtime of their own, or use one before a fork.
NEIGHBOURS = ("torch", "sklearn", "numba")
_OPENMP = re.compile(r"/(lib(?:gomp|iomp5|omp)[^/ ]*\.so[^ \n]*)")
#: How far a kernel's float64 result may be from the reference's; one of its dtype's roundings besides.
CLOSE = 1e-9


class Check(NamedTuple):
    """One thing that was looked at.

    Attributes
    ----------
    name : str
        What.
    state : {"ok", "note", "wrong"}
        "wrong" is what should be mended; a note is a choice, or something that is not there and need not be.
    found : str
        What was found.
    remedy : str
        What to do, where there is anything.
    """

    name: str
    state: Literal["ok", "note", "wrong"]
    found: str
    remedy: str = ""


def examine(every: bool = False) -> Iterator[Check]:
    """Yield what is found out, one check after the other; takes some seconds.

    Parameters
    ----------
    every : bool
        Whether to try backends that the machine has and calls do not use: Numba compiles for half a minute.
    """
    for look in (_package, _compiled, _threads, _openmp, _fork, _gpu):
        yield from _safely(look)
    best = next((b.name for b in BACKENDS if b.device == "cpu" and not isinstance(_backend(b.name), str)), "reference")
    for backend in BACKENDS:
        if backend.name not in ("reference", "cuda") and (every or backend.name == best):
            yield from _safely(lambda name=backend.name: _kernels(name))  # type: ignore[misc]
    yield from _safely(_extras)


def _safely(look: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """Yield the checks; one that fails itself is something wrong."""
    try:
        yield from look()
    except Exception as error:  # whatever it is, the other checks go on
        name = getattr(look, "__name__", "check").strip("_")
        yield Check(name, "wrong", plain(f"{type(error).__name__}: {error}", 300), "please report this")


def _backend(name: str) -> Kernels | str:
    try:
        return load_backend(name)
    except (BackendUnavailable, ValueError) as error:
        return str(error)


# ---- what is installed -----------------------------------------------------------------------------------------------


def _package() -> Iterator[Check]:
    here = f"robustkern {robustkern.__version__} in {Path(robustkern.__file__).parent}, Python {sys.version.split()[0]}"
    try:
        installed = importlib.metadata.version("robustkern")
    except importlib.metadata.PackageNotFoundError:
        yield Check(
            "package", "wrong", f"{here}; it is not installed", "pip install robustkern, or pip install -e CLONE"
        )
        return
    if installed != robustkern.__version__:
        yield Check(
            "package",
            "wrong",
            f"{here}; its metadata say {installed}",
            "install it again: pip install --force-reinstall",
        )
        return
    yield Check("package", "ok", f"{here}, NumPy {np.__version__}")


def _compiled() -> Iterator[Check]:
    cpp = _backend("cpp")
    if isinstance(cpp, str):
        yield Check("compiled kernels", "wrong", cpp, "without them calls take 2 to 100 times as long")
        return
    assert isinstance(cpp, Cpp)
    best, forced = cpp.supported_isas()[0], os.environ.get("ROBUSTKERN_ISA", "")
    found = f"for {cpp.isa}, of {', '.join(cpp.supported_isas())}"
    if cpp.isa != best:
        yield Check("compiled kernels", "note", f"{found}: ROBUSTKERN_ISA={forced}", "unset it for the fastest")
    else:
        yield Check("compiled kernels", "ok", found)


def _threads() -> Iterator[Check]:
    cores = usable_cores()
    cpp = _backend("cpp")
    threads = requested_threads() or (cpp.max_threads() if isinstance(cpp, Cpp) else cores)
    quota = _quota()
    found = f"{threads}, on {cores} cores" + (f" of which a quota leaves {quota:g}" if quota < cores else "")
    if threads > math.ceil(min(cores, quota)):
        yield Check(
            "threads",
            "note",
            f"{found}: they wait for each other",
            f"ROBUSTKERN_NUM_THREADS={max(int(min(cores, quota)), 1)}",
        )
    elif threads < min(cores, quota):
        limits = {
            name: os.environ[name] for name in ("ROBUSTKERN_NUM_THREADS", "OMP_NUM_THREADS") if name in os.environ
        }
        said = ", ".join(f"{name}={plain(value, 20)}" for name, value in limits.items()) or "OpenMP allows no more"
        yield Check("threads", "note", f"{found} ({said})", "ROBUSTKERN_NUM_THREADS, or robustkern.set_num_threads")
    else:
        yield Check("threads", "ok", found)


def _quota() -> float:
    """Return how many cores a container may use at a time."""
    for place in (Path("/sys/fs/cgroup/cpu.max"), Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")):
        try:
            words = place.read_text().split()
            period = words[1] if len(words) > 1 else place.with_name("cpu.cfs_period_us").read_text()
            if words[0] not in ("max", "-1"):
                return int(words[0]) / int(period)
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return math.inf


# ---- in a process of its own -----------------------------------------------------------------------------------------

#: What the programs below begin with: everything that is installed beside this package.
_TOGETHER = """
import os, signal, sys
import numpy, robustkern
for name in sys.argv[1:]:
    try:
        __import__(name)
    except Exception:
        pass
"""
_LIBRARIES = """
robustkern.median(numpy.ones((3, 200_000), dtype=numpy.float32))
print(open("/proc/self/maps").read() if sys.platform == "linux" else "")
"""

_FORK = """
x = numpy.ones((5, 400_000), dtype=numpy.float32)
robustkern.median(x)
child = os.fork()
if child == 0:
    signal.alarm(20)
    os._exit(0 if robustkern.ctma(x, f=1)[0] == 1 else 3)
print(os.waitpid(child, 0)[1])
"""


def _elsewhere(program: str) -> str:
    """Return what a program prints in a fresh interpreter, with the neighbours that are installed."""
    names = [name for name in NEIGHBOURS if importlib.util.find_spec(name) is not None]
    command = [sys.executable, "-W", "ignore", "-c", _TOGETHER + program, *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return done.stdout


def _openmp() -> Iterator[Check]:
    if sys.platform != "linux":
        return
    found = sorted(set(_OPENMP.findall(_elsewhere(_LIBRARIES))))
    kinds = {re.match(r"lib(gomp|iomp5|omp)", name)[1] for name in found}  # type: ignore[index]
    said = ", ".join(found) or "none"
    if len(kinds) > 1:
        yield Check(
            "OpenMP", "note", f"{said}: runtimes of two makers beside {' and '.join(NEIGHBOURS)}, which are known to "
            "hang or to crash each other", "install all from one source (pip or conda)",
        )  # fmt: skip
    else:
        yield Check("OpenMP", "ok", said)


def _fork() -> Iterator[Check]:
    if not hasattr(os, "fork"):
        return
    try:
        status = int(_elsewhere(_FORK))
    except subprocess.TimeoutExpired:
        status = -1
    if status != 0:
        yield Check("fork", "wrong", f"a forked child does not return (status {status})", "use spawn, and report this")
    else:
        yield Check("fork", "ok", "a forked child runs")


def _gpu() -> Iterator[Check]:
    cuda = _backend("cuda")
    there = Path("/dev/nvidia0").exists() or Path("/proc/driver/nvidia/version").exists()
    if not isinstance(cuda, str):
        devices = getattr(cuda, "devices", [])
        yield Check("GPU", "ok", ", ".join(str(device["name"]) for device in devices) or "none that can be used")
    elif there:
        yield Check("GPU", "wrong", f"there is a driver, but {cuda}", "RK_CUDA=ON pip install ... says what is missing")
    else:
        yield Check("GPU", "note", "none", "")


# ---- kernels against their definition --------------------------------------------------------------------------------


def _kernels(name: str) -> Iterator[Check]:
    kernels = load_backend(name)
    variants = [Cpp(isa) for isa in kernels.supported_isas()] if isinstance(kernels, Cpp) else [kernels]
    for variant in variants:
        what = f"{name} {variant.isa}" if isinstance(variant, Cpp) else name
        wrong = [text for dtype in DTYPES for n in (1, 9, 70) for text in _compared(variant, n, dtype)]
        if wrong:
            yield Check(f"self-test: {what}", "wrong", plain("; ".join(wrong[:3]), 300), "please report this")
        else:
            yield Check(f"self-test: {what}", "ok", f"agrees with its definition on {len(DTYPES) * 3} inputs")


def _compared(kernels: Kernels, n: int, dtype: np.dtype[np.generic]) -> Iterator[str]:
    """Yield where a backend and the reference differ on n rows with a NaN, a tie and a far value."""
    x = np.random.default_rng(n).standard_normal((n, 1037)).astype(dtype)
    x[n // 2, 5], x[-1, 7], x[:, 11] = np.nan, dtype.type(6e4), dtype.type(1)
    rows, reference = Rows.of(x), load_backend("reference")
    window = Window(n // 4, n - n // 4)
    shares = np.random.default_rng(1).random((1, n))
    found = []
    for one in (kernels, reference):
        middle, mean = np.empty((1, x.shape[1]), dtype=dtype), np.empty((1, x.shape[1]), dtype=dtype)
        distances = one.select_columns(rows, window, distances=True, out=Rows.of(middle)).sq_distances
        one.weighted_row_sum(rows, shares, Rows.of(mean), divisors=shares.sum(axis=1))
        found.append((middle, distances, mean, one.gram(rows), one.row_sq_distances(rows, Rows.of(x[:1]))[0]))
    unit = 0.0 if dtype == np.float64 else float(2 * np.abs(np.spacing(dtype.type(1))))
    for what, got, want in zip(("selection", "distances", "sum", "gram", "row distances"), *found, strict=True):
        assert got is not None
        assert want is not None
        a, b = np.asarray(got, dtype=np.float64), np.asarray(want, dtype=np.float64)
        scale = CLOSE * float(np.nanmax(np.where(np.isfinite(b), np.abs(b), 0.0), initial=1.0))
        if not np.allclose(a, b, rtol=unit + CLOSE, atol=scale, equal_nan=True):
            yield f"{what} of {n} rows of {dtype.name}"


# ---- extras ----------------------------------------------------------------------------------------------------------


def _extras() -> Iterator[Check]:
    """Yield which optional packages are here, of those that the installed metadata name."""
    wanted: dict[str, list[tuple[str, str]]] = {}
    for line in importlib.metadata.requires("robustkern") or []:
        match = re.match(r"([\w.-]+)(?:\[[^]]*\])?\s*([^;]*);.*extra == ['\"]([\w-]+)['\"]", line)
        if match and match[1] != "robustkern" and match[3] not in ("test", "bench", "dev", "docs", "peers"):
            wanted.setdefault(match[3], []).append((match[1], match[2].strip(" ()")))
    for extra, packages in sorted(wanted.items()):
        states = [_version_of(name, limits) for name, limits in packages]
        old = [text for text, fits in states if fits is False]
        if old:
            yield Check(f"[{extra}]", "wrong", ", ".join(old), f"pip install --upgrade 'robustkern[{extra}]'")
        elif any(fits is None for _, fits in states):
            missing = ", ".join(text for text, fits in states if fits is None)
            yield Check(f"[{extra}]", "note", f"not here: {missing}", f"pip install 'robustkern[{extra}]'")
        elif extra == "jax" and importlib.util.find_spec("robustkern._jax") is None:
            found = f"{states[0][0]}; compiled functions copy rows into callbacks: built without the headers of jaxlib"
            yield Check("[jax]", "note", found, "install again from the source, with RK_JAX=ON in the environment")
        else:
            yield Check(f"[{extra}]", "ok", ", ".join(text for text, _ in states))


def _version_of(name: str, limits: str) -> tuple[str, bool | None]:
    """Return a package and its version, and whether it is in its limits; None where it is not here."""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return name, None
    numbers = _numbers(version)
    for sign, limit in re.findall(r"(>=|<|==)\s*([\d.]+)", limits):
        least = _numbers(limit)
        fits = {">=": numbers >= least, "<": numbers < least, "==": numbers[: len(least)] == least}[sign]
        if not fits:
            return f"{name} {version}, expected {limits}", False
    return f"{name} {version}", True


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[a-z+]", version, maxsplit=1)[0]))


# ---- what is printed -------------------------------------------------------------------------------------------------


def report(as_json: bool, every: bool) -> bool:
    """Print the checks as they are made; tell whether nothing is wrong."""
    checks = []
    for check in examine(every):
        checks.append(check)
        if not as_json:
            remedy = f"\n{'':8}-> {check.remedy}" if check.remedy else ""
            print(f"{check.state:>6}  {check.name}: {plain(check.found, 500)}{remedy}", flush=True)
    well = all(check.state != "wrong" for check in checks)
    if as_json:
        print(json.dumps({"ok": well, "checks": [check._asdict() for check in checks]}))
    else:
        print("nothing is wrong" if well else "something is wrong, see above")
    return well
