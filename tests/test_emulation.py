"""A test of the tests: does the emulation of CUDA see the faults that it is there for, and do right kernels pass?"""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

#: What these tests build is built once, by one of the processes that run tests side by side.
pytestmark = pytest.mark.xdist_group("emulation")

ROOT = pathlib.Path(__file__).parent.parent
SCHEDULER = ROOT / "csrc" / "emulation" / "scheduler.cpp"
SOURCES = ROOT / "tests" / "emulation"

FLAGS = [
    "-std=c++17",
    "-O1",
    "-g",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-ffp-contract=off",
    "-DRK_EMULATED",
]
#: What kernels and what the scheduler are compiled with besides. The scheduler's own state is no kernel's: no -fsanitize=thread.
VARIANTS = {
    "plain": ([], []),
    "address": ([f := "-fsanitize=address,undefined", r := "-fno-sanitize-recover=all"], [f, r, "-DRK_EMULATION_ASAN"]),
    "thread": (["-fsanitize=thread"], ["-DRK_EMULATION_TSAN"]),
}
ORDERS = ("forward", "backward", "shuffled")

OVERFLOW = "AddressSanitizer: heap-buffer-overflow"
#: What each fault is caught by: a wrong result in some order, a sanitizer's report, a failure in every variant and order.
CAUGHT = {
    "block_barrier": {"orders": "wrong result", "thread": "data race"},
    "second_barrier": {"orders": "wrong result", "thread": "data race"},
    "warp_barrier": {"orders": "wrong result", "thread": "data race"},
    "shuffle_as_barrier": {"thread": "data race"},
    "global_read": {"address": OVERFLOW},
    "global_write": {"address": OVERFLOW},
    "shared_write": {"address": OVERFLOW},
    "dynamic_shared_write": {"address": OVERFLOW},
    "shared_of_another_block": {"address": "AddressSanitizer: heap-use-after-free"},
    "uninitialised_shared": {"failure": r"wrong result: out\[58\] is -?nan, not 6"},
    "misaligned_load": {"address": "misaligned address .* requires 16 byte alignment"},
    "divergent_barrier": {"failure": r"divergent barrier: 32 of 64 threads are there, the others have exited \[block \(0,0,0\)"},
    "barriers_in_branches": {"failure": r"divergent barrier: 32 threads wait at .*faults.cu:\d+ \[block .*, thread \(\d+,0,0\)\]"},
    "divergent_shuffle": {"failure": "__shfl_sync: (lane . waits for this thread, which has exited|lanes of the mask ffffffff have)"},
    "shuffles_in_branches": {"failure": r"divergent warp primitive: lane \d+ waits in __shfl_sync at .*faults.cu:\d+, this one"},
    "lane_not_in_mask": {"failure": r"__shfl_xor_sync: lane \d+ is not in its own mask 0000ffff"},
    "deadlock": {"failure": r"deadlock in __syncwarp with mask ffffffff: 62 threads wait at .*faults.cu:\d+, 0 have exited"},
    "racing_add": {"thread": "data race"},
    "racing_blocks": {"thread": "data race"},
    "last_block": {"thread": "data race"},
}  # fmt: skip


def run(program: pathlib.Path, *args: str, order: str = "forward") -> tuple[int, str]:
    environment = {
        **os.environ,
        "RK_EMULATION_ORDER": str(ORDERS.index(order)),
        "TSAN_OPTIONS": "atexit_sleep_ms=0",
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    command = [str(program), *args]
    for prefix in ([], ["setarch", "-R"]):
        done = subprocess.run(
            [*prefix, *command],
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=60,
        )
        # The sanitizer of GCC 12 and newer kernels disagree about where memory lies, unless it is not randomised.
        if "unexpected memory mapping" not in done.stderr:
            break
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with a program for each source and variant, and one that switches threads without assembly."""
    if sys.platform != "linux" or shutil.which("g++") is None:
        reason = "the emulation of CUDA needs Linux and g++"
        if "cuda-emulated" in os.environ.get("ROBUSTKERN_REQUIRE", "").split(","):
            pytest.fail(f"ROBUSTKERN_REQUIRE has cuda-emulated, but {reason}")
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("emulation")

    def build(variant: str, kernel_flags: list[str], scheduler_flags: list[str], names: tuple[str, ...]) -> None:
        scheduler = folder / f"scheduler-{variant}.o"
        commands = [["-c", str(SCHEDULER), *scheduler_flags, "-o", str(scheduler)]]
        for name in names:
            source, program = SOURCES / f"{name}.cu", folder / f"{name}-{variant}"
            commands.append(
                ["-x", "c++", str(source), "-x", "none", str(scheduler), *kernel_flags, "-pthread", "-o", str(program)]
            )
        for command in commands:
            done = subprocess.run(["g++", *FLAGS, *command], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr

    with ThreadPoolExecutor(2) as pool:
        both = ("faults", "behaviour")
        jobs = [pool.submit(build, variant, *flags, both) for variant, flags in VARIANTS.items()]
        jobs.append(pool.submit(build, "ucontext", [], ["-DRK_EMULATION_UCONTEXT"], ("behaviour",)))
        for job in jobs:
            job.result()
    return folder


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_right_kernels_pass(programs: pathlib.Path, variant: str, order: str) -> None:
    status, output = run(programs / f"faults-{variant}", "all", "right", order=order)
    assert (status, output) == (0, "".join(f"{name}: right\n" for name in CAUGHT))


@pytest.mark.parametrize(("fault", "means"), [(fault, means) for fault, caught in CAUGHT.items() for means in caught])
def test_faults_are_caught(programs: pathlib.Path, fault: str, means: str) -> None:
    pattern = CAUGHT[fault][means]
    if means == "orders":
        outputs = [run(programs / "faults-plain", fault, "wrong", order=order)[1] for order in ORDERS]
        assert any(re.search(pattern, output) for output in outputs), outputs
    elif means == "failure":
        for variant in VARIANTS:
            for order in ORDERS if variant == "plain" else ("backward",):
                status, output = run(programs / f"faults-{variant}", fault, "wrong", order=order)
                assert status == 1
                assert re.search(pattern, output), output
    else:
        status, output = run(programs / f"faults-{means}", fault, "wrong")
        assert status != 0
        assert re.search(pattern, output), output
        assert re.search(
            rf"faults\.cu:\d+.* in .*{fault}|in .*{fault}.* \S*faults\.cu:\d+|faults\.cu:\d+:\d+: runtime error", output
        ), output


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("variant", [*VARIANTS, "ucontext"])
def test_behaviour(programs: pathlib.Path, variant: str, order: str) -> None:
    """Indices, orders, warp primitives, atomics, memory, limits and errors of launches, host threads, intrinsics."""
    assert run(programs / f"behaviour-{variant}", order=order) == (0, "all right\n")
