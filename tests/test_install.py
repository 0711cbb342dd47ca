"""Installing: sdist to wheel, small, and usable without a compiler. Builds in a temporary folder, from PyPI's tools."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import subprocess
import sys
import tarfile
import types
import zipfile
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parent.parent

CHECK = """
import sys, warnings
blocked = sys.argv[1:]
for name in blocked:
    sys.modules[name] = None
import numpy as np, robustkern as rk
assert rk.__file__.startswith(sys.path[0]), rk.__file__
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        value, info = rk.ctma(np.arange(12.0).reshape(4, 3), f=1, anchor="median", return_info=True)
assert np.allclose(value, [3, 4, 5]), value
print(info.backend, len([c for c in caught if "robustkern runs on" in str(c.message)]), *(c.message for c in caught))
print(rk.info()["backends"]["cuda"])
"""


def build(folder: pathlib.Path, source: pathlib.Path, **environment: str) -> pathlib.Path:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source)],
        env={**os.environ, **environment},
        check=True,
        timeout=280,
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


def check(wheel: pathlib.Path, site: pathlib.Path, *blocked: str) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    done = subprocess.run(
        # -S would lose the dependencies; the folder given first wins over the editable install's finder.
        [sys.executable, "-c", "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in "
         "type(f).__module__]; sys.path.insert(0, sys.argv.pop(1))\n" + CHECK, str(site), *blocked],
        capture_output=True,
        text=True,
        check=False,
        cwd=site,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split(maxsplit=2)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("sdist")
    subprocess.run(
        [sys.executable, "-m", "build", "--sdist", "--outdir", str(folder), str(ROOT)],
        check=True,
        timeout=280,
        capture_output=True,
    )
    (path,) = folder.glob("*.tar.gz")
    return path


def test_sdist_holds_the_sources_and_nothing_else(sdist: pathlib.Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {"/".join(name.split("/")[1:]) for name in archive.getnames()}
    assert {
        "csrc/kernels.h",
        "csrc/cpu/select.cpp",
        "csrc/cuda/select.cu",
        "csrc/cuda/cuda.cmake",
        "packaging/build_backend.py",
        "robustkern/api.py",
        "CMakeLists.txt",
        "LICENSE",
        "README.md",
    } <= names
    assert not [
        name for name in names if name.endswith((".so", ".pyc", ".png")) or name.startswith((".venv", "build/"))
    ]


@pytest.mark.slow
def test_wheel_from_the_sdist(sdist: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Without a CUDA compiler, which is no reason to fail, but one to be told."""
    wheel = build(tmp_path, sdist, RK_REQUIRE_EXTENSION="1", RK_CUDA="AUTO", CUDACXX="/bin/false")
    site = tmp_path / "site"
    backend, warnings, text = check(wheel, site)
    assert (backend, warnings) == ("cpp", "0")
    assert text.startswith("not built: there was no CUDA compiler that works (install CUDA 12.8 or newer")
    assert not list(site.glob("robustkern/_cuda*.so"))
    assert sum(p.stat().st_size for p in site.rglob("*") if p.is_file()) < 10e6
    assert not list(site.rglob("*.cpp"))


@pytest.mark.slow
def test_install_without_a_compiler(sdist: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """A pure Python wheel; Numba, or without it NumPy; one warning that says what to do."""
    wheel = build(tmp_path, sdist, CXX="/bin/false", CC="/bin/false", RK_CUDA="OFF")
    assert "py3-none-any" in wheel.name
    backend, warnings, text = check(wheel, tmp_path / "with_numba")
    assert (backend, warnings) == ("numba", "1")
    assert "install a C++17 compiler" in text
    assert "not built: robustkern was installed without its compiled part" in text
    backend, warnings, text = check(wheel, tmp_path / "without_numba", "numba")
    assert (backend, warnings) == ("reference", "1")
    assert "pip install 'robustkern[numba]'" in text


def test_cuda_that_is_insisted_on_fails_loudly(sdist: pathlib.Path, tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(sdist)]
    environment = {**os.environ, "RK_CUDA": "ON", "CUDACXX": "/bin/false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    said = " ".join((done.stdout + done.stderr).split())
    assert "RK_CUDA=ON, but: there was no CUDA compiler that works. Install CUDA 12.8 or newer" in said
    assert not list(tmp_path.glob("*.whl"))


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give the build backend, on a machine that has nothing of CUDA."""
    spec = importlib.util.spec_from_file_location("build_backend", ROOT / "packaging" / "build_backend.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "CUDAToolkit_ROOT", "RK_CUDA", "RK_REQUIRE_EXTENSION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "_has_driver", lambda: False)
    monkeypatch.setattr(module, "_has_compiler", lambda: False)
    return module


@pytest.mark.parametrize("hook", ["get_requires_for_build_wheel", "get_requires_for_build_editable"])
@pytest.mark.parametrize(
    ("driver", "compiler", "environment", "settings", "asked"),
    [
        (True, False, None, None, True),
        (True, False, "AUTO", {"cmake.define.RK_WERROR": "ON"}, True),
        (True, True, None, None, False),
        (False, False, None, None, False),
        (True, False, "OFF", None, False),
        (True, False, "ON", None, False),  # then a missing compiler is an error
        (True, False, None, {"cmake.define.RK_CUDA": "OFF"}, False),
    ],
)
def test_a_compiler_comes_from_pip_where_only_it_is_missing(
    backend: Any,
    monkeypatch: pytest.MonkeyPatch,
    hook: str,
    driver: bool,
    compiler: bool,
    environment: str | None,
    settings: dict[str, str] | None,
    asked: bool,
) -> None:
    monkeypatch.setattr(backend, "_has_driver", lambda: driver)
    monkeypatch.setattr(backend, "_has_compiler", lambda: compiler)
    if environment:
        monkeypatch.setenv("RK_CUDA", environment)
    requires = getattr(backend, hook)(settings)
    assert any(name.startswith("cuda-toolkit[nvcc") for name in requires) == asked


def test_cmake_is_pointed_at_what_pip_brought(
    backend: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    root = tmp_path / "nvidia" / "cu13"
    for name in ("bin/nvcc", "lib/libcudart.so.13"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    module = types.ModuleType("nvidia")
    module.__path__ = [str(tmp_path / "nvidia")]
    monkeypatch.setitem(sys.modules, "nvidia", module)
    monkeypatch.setattr(backend, "_has_driver", lambda: True)
    monkeypatch.setenv("CUDACXX", "")  # so that what is set is taken back
    monkeypatch.setenv("CUDAToolkit_ROOT", "")
    for _ in range(2):
        backend._prepare(None)
    assert os.environ["CUDACXX"] == str(root / "bin" / "nvcc")
    assert os.environ["CUDAToolkit_ROOT"] == str(root)
    assert (root / "lib64" / "libcudart.so").resolve() == root / "lib" / "libcudart.so.13"


def test_insisting_on_cuda_insists_on_the_extension(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RK_CUDA", "ON")
    monkeypatch.setenv("RK_REQUIRE_EXTENSION", "")
    monkeypatch.delenv("RK_REQUIRE_EXTENSION")
    backend._prepare(None)
    assert os.environ.pop("RK_REQUIRE_EXTENSION") == "1"


def test_a_required_extension_fails_loudly(sdist: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        build(tmp_path, sdist, CXX="/bin/false", CC="/bin/false", RK_CUDA="OFF", RK_REQUIRE_EXTENSION="1")
