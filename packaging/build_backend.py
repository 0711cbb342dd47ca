"""scikit-build-core, and from pip jaxlib's headers on request and a CUDA compiler where only that is missing."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path
from typing import Any

from scikit_build_core import build as _base
from scikit_build_core.build import *  # noqa: F403

#: nvcc and what it and CMake need, about 0.3 GB; 13.0 works with every driver that 13.x does.
COMPILER = ["cuda-toolkit[nvcc,crt,nvvm,cudart,cccl]==13.0.*"]
DEFAULT_ROOT = "/usr/local/cuda"


def _driver() -> int:
    """Return the newest CUDA that the driver runs, 13000 for 13.0, or 0 where there is no driver."""
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value


def _compiler() -> str | None:
    """Return nvcc, also where CMake does not look for it."""
    roots = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH", "CUDAToolkit_ROOT")] + [DEFAULT_ROOT]
    inside = [str(path) for root in roots if root and (path := Path(root, "bin", "nvcc")).is_file()]
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or (inside[0] if inside else None)


def _wanted(option: str, config_settings: dict[str, Any] | None) -> str:
    settings = config_settings or {}
    names = (f"cmake.define.{option}", f"skbuild.cmake.define.{option}")
    wanted = next((settings[name] for name in names if name in settings), os.environ.get(option) or "AUTO")
    if wanted not in ("AUTO", "ON", "OFF"):  # here, because a build that fails falls back to pure Python
        raise ValueError(f"{option} must be AUTO, ON or OFF; got {wanted!r}")
    return str(wanted)


def _wants_compiler(config_settings: dict[str, Any] | None) -> bool:
    """Tell whether pip shall bring nvcc. Not where the driver is too old for what it would build."""
    return _wanted("RK_CUDA", config_settings) == "AUTO" and _driver() >= 13000 and _compiler() is None


def _more(config_settings: dict[str, Any] | None) -> list[str]:
    """Return what pip shall bring besides."""
    jaxlib = ["jaxlib>=0.4.35"] if _wanted("RK_JAX", config_settings) == "ON" else []
    return jaxlib + (COMPILER if _wants_compiler(config_settings) else [])


def _prepare(config_settings: dict[str, Any] | None) -> None:
    for option in ("RK_CUDA", "RK_JAX"):
        wanted = os.environ[option] = _wanted(option, config_settings)  # which pyproject.toml hands to CMake
        if wanted == "ON":  # no quiet fallback to a package without compiled parts
            os.environ["RK_REQUIRE_EXTENSION"] = "1"
    compiler = _compiler()
    if os.environ["RK_CUDA"] != "OFF" and compiler is not None:
        os.environ["CUDACXX"] = compiler
    elif _wants_compiler(config_settings):
        _use_compiler()


def _use_compiler() -> None:
    """Point CMake at what pip has brought, in the layout that it looks for."""
    try:
        import nvidia
    except ImportError:  # built without isolation: whoever does that brings what is needed
        return
    for root in (found for folder in nvidia.__path__ for found in sorted(Path(folder).glob("cu*"))):
        if not (root / "bin" / "nvcc").exists():
            continue
        if not (root / "lib64").exists():
            (root / "lib64").symlink_to("lib")
        for library in sorted((root / "lib").glob("libcudart.so.*"))[:1]:
            if not (root / "lib" / "libcudart.so").exists():
                (root / "lib" / "libcudart.so").symlink_to(library.name)
        os.environ["CUDACXX"] = str(root / "bin" / "nvcc")
        os.environ["CUDAToolkit_ROOT"] = str(root)
        return


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """See PEP 517."""
    return [*_base.get_requires_for_build_wheel(config_settings), *_more(config_settings)]


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    """See PEP 660."""
    return [*_base.get_requires_for_build_editable(config_settings), *_more(config_settings)]


def build_wheel(
    wheel_directory: str, config_settings: dict[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    """See PEP 517."""
    _prepare(config_settings)
    return _base.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: dict[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    """See PEP 660."""
    _prepare(config_settings)
    return _base.build_editable(wheel_directory, config_settings, metadata_directory)
