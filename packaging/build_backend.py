"""scikit-build-core, and a CUDA compiler from pip where there is an NVIDIA driver but no compiler."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path
from typing import Any

from scikit_build_core import build as _base
from scikit_build_core.build import *  # noqa: F403

#: What nvcc and CMake need of CUDA, about 0.3 GB; 13.0 works with every driver that 13.x does.
COMPILER = ["cuda-toolkit[nvcc,crt,nvvm,cudart,cccl]==13.0.*"]


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _has_compiler() -> bool:
    roots = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH", "CUDAToolkit_ROOT")] + ["/usr/local/cuda"]
    candidates = [Path(root, "bin", "nvcc") for root in roots if root]
    return "CUDACXX" in os.environ or shutil.which("nvcc") is not None or any(path.exists() for path in candidates)


def _wants_compiler(config_settings: dict[str, Any] | None) -> bool:
    wanted = (config_settings or {}).get("cmake.define.RK_CUDA") or os.environ.get("RK_CUDA") or "AUTO"
    return wanted == "AUTO" and _has_driver() and not _has_compiler()


def _prepare(config_settings: dict[str, Any] | None) -> None:
    if os.environ.get("RK_CUDA") == "ON":  # no quiet fallback to a package without compiled parts
        os.environ.setdefault("RK_REQUIRE_EXTENSION", "1")
    if _wants_compiler(config_settings):
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
    more = COMPILER if _wants_compiler(config_settings) else []
    return [*_base.get_requires_for_build_wheel(config_settings), *more]


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    """See PEP 660."""
    more = COMPILER if _wants_compiler(config_settings) else []
    return [*_base.get_requires_for_build_editable(config_settings), *more]


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
