"""The kernels for other processors: compiled for 64-bit Arm and executed by QEMU, they give the bits that they give here.

What is compiled is the one version that every processor runs, of which all tests of kernels run the bits here
("baseline"). Where a cross compiler and QEMU are (Debian: g++-aarch64-linux-gnu, qemu-user-static); two minutes.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support import REQUIRED

ROOT = Path(__file__).parents[1]
KERNELS = (
    "select",
    "select_columns",
    "gram",
    "weighted_row_sum",
    "distances",
    "momenta",
    "read_pass",
    "digest",
    "table",
)
#: As CMakeLists.txt has it, in less time.
FLAGS = ("-std=c++17", "-O1", "-ffp-contract=off", "-Wno-psabi", "-fopenmp")
DEFINED = ("-DRK_ISA=baseline", '-DRK_ISA_NAME="baseline"', "-DRK_VECTOR_BYTES=16")


def built(compiler: str, folder: Path) -> Path:
    """Return a program that prints digests of results, linked statically."""
    folder.mkdir()
    sources = [ROOT / "csrc" / "cpu" / f"{name}.cpp" for name in (*KERNELS, "dispatch")]
    sources.append(Path(__file__).parent / "arm" / "kernels.cpp")
    objects = [folder / f"{source.stem}-{k}.o" for k, source in enumerate(sources)]

    def compile_one(source: Path, target: Path) -> None:
        defined = DEFINED if source.stem in KERNELS and source.parent.name == "cpu" else ()
        _run([compiler, *FLAGS, *defined, "-c", str(source), "-o", str(target)])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, sources, objects))
    program = folder / "kernels"
    _run([compiler, "-fopenmp", "-static", *map(str, objects), "-o", str(program)])
    return program


def _run(command: Sequence[str]) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr[-3000:]}"
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_arm_computes_the_same_bits(tmp_path: Path) -> None:
    compiler = shutil.which("aarch64-linux-gnu-g++")
    qemu = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if compiler is None or qemu is None:
        reason = "no aarch64-linux-gnu-g++, or no qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user-static)"
        if "arm" in REQUIRED:
            pytest.fail(f"ROBUSTKERN_REQUIRE=arm, but there is {reason}")
        pytest.skip(reason)
    native = shutil.which("g++") or shutil.which("c++")
    assert native is not None
    here = _run([str(built(native, tmp_path / "here"))])
    there = _run([qemu, str(built(compiler, tmp_path / "arm"))])
    assert len(here) == 4 * 6 * 13 * 2
    assert len({line.split(": ")[1] for line in here}) > 600  # other inputs, other results
    differing = [f"{a} here, {b} there" for a, b in zip(here, there, strict=True) if a != b]
    assert not differing, "\n".join(differing[:10])
