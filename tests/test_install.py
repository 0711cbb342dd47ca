"""Installing: sdist to wheel, small, and usable without a compiler. Builds in a temporary folder, from PyPI's tools."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tarfile
import zipfile

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
    wheel = build(tmp_path, sdist, RK_REQUIRE_EXTENSION="1")
    site = tmp_path / "site"
    backend, warnings, *_ = check(wheel, site)
    assert (backend, warnings) == ("cpp", "0")
    assert sum(p.stat().st_size for p in site.rglob("*") if p.is_file()) < 10e6
    assert not list(site.rglob("*.cpp"))


@pytest.mark.slow
def test_install_without_a_compiler(sdist: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """A pure Python wheel; Numba, or without it NumPy; one warning that says what to do."""
    wheel = build(tmp_path, sdist, CXX="/bin/false", CC="/bin/false")
    assert "py3-none-any" in wheel.name
    backend, warnings, text = check(wheel, tmp_path / "with_numba")
    assert (backend, warnings) == ("numba", "1")
    assert "install a C++17 compiler" in text
    backend, warnings, text = check(wheel, tmp_path / "without_numba", "numba")
    assert (backend, warnings) == ("reference", "1")
    assert "pip install 'robustkern[numba]'" in text


def test_a_required_extension_fails_loudly(sdist: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        build(tmp_path, sdist, CXX="/bin/false", CC="/bin/false", RK_REQUIRE_EXTENSION="1")
