"""The CPU kernels, watched by the address, undefined-behaviour and thread sanitizers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import watched
from support import REQUIRED

TESTS = Path(__file__).parent
#: What runs: rows at every kind of value, size, offset and alignment through every primitive; and whole rules.
FILES = "test_blocks.py::test_rows_that_cpp_reads_from_files_by_any_threads"
KERNELS = ["-k", "cpp and not 4096", *(str(TESTS / name) for name in ("test_kernels.py", "test_momenta.py", FILES))]
ALL = [
    "-k",
    "cpp",
    *(str(TESTS / name) for name in ("test_kernels.py", "test_momenta.py", "test_means.py", "test_rules.py", FILES)),
]
#: Several threads that share a call's work, and several calls at once. Not programs of their own, as that of a forked
#: child is: they load the build that is installed, whose OpenMP the sanitizer does not see through.
THREADS = [
    "-k",
    "cpp and (threads or momenta)",
    *(str(TESTS / f"test_{name}.py") for name in ("blocks", "momenta", "registry")),
]
#: With how many tests there are at least; some 1,350 of each instruction set in the second.
VARIANTS = {"address": (KERNELS, 500), "address-levels": (ALL, 2500), "thread": (THREADS, 10)}


def require(variant: str) -> None:
    """Go on where a build is there; `make test` makes and requires that of the address sanitizer, check-all the others."""
    if list((watched.BUILD / "watched" / variant).glob("_cpu*.so")):
        return
    if f"watched-{variant}" in REQUIRED:
        pytest.fail(
            f"ROBUSTKERN_REQUIRE=watched-{variant}, but it is not built (run: make build/watched/{variant}/built)"
        )
    pytest.skip(f"not built (run: make build/watched/{variant}/built)")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("variant", VARIANTS)
def test_sanitizers_find_nothing(variant: str) -> None:
    require(variant)
    variables = {"ROBUSTKERN_WATCHED": variant, "ROBUSTKERN_REQUIRE": "cpp", "HYPOTHESIS_PROFILE": "few"}
    tests, least = VARIANTS[variant]
    done = watched.run(variant.partition("-")[0], tests, variables)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed
    assert int(passed[1]) >= least


#: By sanitizer: code with a fault where {} is 1, and what is said of it.
FAULTS = {
    "address": (
        "x = np.zeros((1, 100), dtype=np.float32)\n"
        "rows = Rows(Rows.of(x).addresses, np.array([0, 100 + {}]), x.dtype, x)\n"  # a read beyond the end
        "Cpp('baseline').gram(rows)",
        "heap-buffer-overflow",
    ),
    "thread": (
        "x = Rows.of(np.zeros((3, 500000), dtype=np.float32))\n"
        "outs = [Rows.of(np.zeros((1, 500000), dtype=np.float32)) for _ in range(2)]\n"
        "run = lambda out: [Cpp('baseline').weighted_row_sum(x, np.ones((1, 3)), out) for _ in range(20)]\n"
        "threads = [threading.Thread(target=run, args=(outs[k * (1 - {})],)) for k in range(2)]\n"  # one result of two
        "[thread.start() for thread in threads], [thread.join() for thread in threads]",
        "data race",
    ),
}
IMPORTS = (
    f"import sys; sys.path.insert(0, {str(TESTS)!r})\n"
    "import watched, threading, numpy as np\n"
    "from robustkern.backends.cpp import Cpp\n"
    "from robustkern.contract.rows import Rows\n"
)


@pytest.mark.parametrize("sanitizer", FAULTS)
def test_a_planted_fault_is_seen(sanitizer: str) -> None:
    require(sanitizer)
    code, said = FAULTS[sanitizer]
    for fault in (False, True):
        done = watched.python(sanitizer, ["-c", IMPORTS + code.format(int(fault))], {"ROBUSTKERN_WATCHED": sanitizer})
        assert (done.returncode != 0) == fault, done.stderr
        assert (said in done.stderr) == fault
