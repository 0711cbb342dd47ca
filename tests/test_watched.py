"""The CPU kernels, watched by the address, undefined-behaviour and thread sanitizers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import watched
from support import REQUIRED

TESTS = Path(__file__).parent
#: What runs: rows at every kind of value, size, offset and alignment through every primitive; and whole rules.
KERNELS = ["-k", "cpp and not 4096", *(str(TESTS / name) for name in ("test_kernels.py", "test_momenta.py"))]
ALL = [
    "-k",
    "cpp",
    *(str(TESTS / name) for name in ("test_kernels.py", "test_momenta.py", "test_means.py", "test_rules.py")),
]
#: Several threads that share a call's work, and several calls at once.
THREADS = [
    "-k",
    "cpp and (threads or forked or momenta)",
    *(str(TESTS / f"test_{name}.py") for name in ("blocks", "momenta", "registry")),
]
VARIANTS = {"address": (KERNELS, 500), "address-levels": (ALL, 5000), "thread": (THREADS, 10)}


@pytest.mark.skipif(bool(watched.WATCHED), reason="is watched already")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("variant", VARIANTS)
def test_sanitizers_find_nothing(variant: str) -> None:
    if not list((watched.BUILD / "watched" / variant).glob("_cpu*.so")):
        if f"watched-{variant}" in REQUIRED:
            pytest.fail(f"ROBUSTKERN_REQUIRE=watched-{variant}, but it is not built")
        pytest.skip(f"not built (run: make build/watched/{variant}/built)")
    variables = {"ROBUSTKERN_WATCHED": variant, "ROBUSTKERN_REQUIRE": "cpp", "HYPOTHESIS_PROFILE": "few"}
    tests, least = VARIANTS[variant]
    done = watched.run(variant.partition("-")[0], tests, variables)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed
    assert int(passed[1]) >= least


@pytest.mark.skipif(bool(watched.WATCHED), reason="is watched already")
def test_the_sanitizer_sees_a_read_beyond_the_end() -> None:
    if not list((watched.BUILD / "watched" / "address").glob("_cpu*.so")):
        pytest.skip("not built (run: make build/watched/address/built)")
    code = (
        "import watched, numpy as np\n"
        "from robustkern.backends.cpp import Cpp\n"
        "from robustkern.contract.rows import Rows\n"
        "x = np.zeros((1, 100), dtype=np.float32)\n"
        "rows = Rows(Rows.of(x).addresses, np.array([0, 100 + {}]), x.dtype, x)\n"
        "print(Cpp('baseline').gram(rows))"
    )
    variables = os.environ | watched.environment("address") | {"ROBUSTKERN_WATCHED": "address"}
    for beyond in (0, 1):
        command = [sys.executable, "-c", code.format(beyond)]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, cwd=TESTS)
        assert (done.returncode != 0) == bool(beyond), done.stderr
        assert ("heap-buffer-overflow" in done.stderr) == bool(beyond)


@pytest.mark.skipif(bool(watched.WATCHED), reason="is watched already")
def test_the_sanitizer_sees_two_calls_that_write_one_result() -> None:
    if not list((watched.BUILD / "watched" / "thread").glob("_cpu*.so")):
        pytest.skip("not built (run: make build/watched/thread/built)")
    code = (
        "import watched, threading, numpy as np\n"
        "from robustkern.backends.cpp import Cpp\n"
        "from robustkern.contract.rows import Rows\n"
        "x = Rows.of(np.zeros((3, 500000), dtype=np.float32))\n"
        "outs = [Rows.of(np.zeros((1, 500000), dtype=np.float32)) for _ in range(2)]\n"
        "run = lambda out: [Cpp('baseline').weighted_row_sum(x, np.ones((1, 3)), out) for _ in range(20)]\n"
        "threads = [threading.Thread(target=run, args=(outs[k * {}],)) for k in range(2)]\n"
        "[thread.start() for thread in threads], [thread.join() for thread in threads]"
    )
    variables = os.environ | watched.environment("thread") | {"ROBUSTKERN_WATCHED": "thread"}
    for apart in (1, 0):
        command = ["setarch", "-R", sys.executable, "-c", code.format(apart)]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, cwd=TESTS)
        assert (done.returncode == 0) == bool(apart), done.stderr
        assert ("data race" in done.stderr) != bool(apart)
