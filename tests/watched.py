"""Builds of compiled backends that a sanitizer watches, or that count what they reach: what runs them, and on what.

With ROBUSTKERN_WATCHED=VARIANT in the environment the CPU backend is that of build/watched/VARIANT, not the installed one;
with ROBUSTKERN_SOURCES=FOLDER the package is that of a folder, such as a copy with a fault in it.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build"
WATCHED = os.environ.get("ROBUSTKERN_WATCHED", "")
LIBRARIES = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}


def load(folder: Path, name: str) -> ModuleType | str:
    """Return a compiled module out of a folder, or why there is none."""
    found = sorted(folder.glob(f"{name}*.so"))
    if not found:
        return f"{folder} holds no {name} module"
    spec = importlib.util.spec_from_file_location(f"robustkern.{name}", found[0])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def environment(variant: str) -> dict[str, str]:
    """Return what Python must be started with so that it can load a build that a sanitizer watches."""
    found = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in LIBRARIES[variant]
    ]
    return {
        "LD_PRELOAD": " ".join(found),
        "PYTHONMALLOC": "malloc",  # every object with red zones of its own
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own are many
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1 atexit_sleep_ms=0",
    }


def python(sanitizer: str, arguments: list[str], variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a Python that a sanitizer watches."""
    command, environ = [sys.executable, *arguments], os.environ | environment(sanitizer) | variables
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if "unexpected memory mapping" in done.stderr:  # GCC 12's thread sanitizer where addresses are very random
        done = subprocess.run(["setarch", "-R", *command], env=environ, capture_output=True, text=True, check=False)
    return done


def run(sanitizer: str, arguments: list[str], variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run tests in a Python that a sanitizer watches."""
    return python(sanitizer, ["-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", *arguments], variables)


def take_sources(folder: Path) -> None:
    """Import robustkern from a folder; an editable installation's own importer is left with what was compiled."""
    sys.meta_path.sort(key=lambda finder: "editable" in type(finder).__module__)
    sys.path.insert(0, str(folder))


if "ROBUSTKERN_SOURCES" in os.environ:
    take_sources(Path(os.environ["ROBUSTKERN_SOURCES"]))
if WATCHED:
    _cpu = load(BUILD / "watched" / WATCHED, "_cpu")
    if isinstance(_cpu, str):
        raise RuntimeError(f"ROBUSTKERN_WATCHED={WATCHED}, but {_cpu} (run: make build/watched/{WATCHED}/built)")
    sys.modules["robustkern._cpu"] = _cpu
