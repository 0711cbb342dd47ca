"""Bytes that others wrote: what the fuzzer starts from, what it has found, and half a minute of it."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz.targets import TARGETS
from support import REQUIRED

FUZZER = Path(__file__).parent / "fuzz" / "run.py"
FOUND = sorted((FUZZER.parent / "found").glob("*/*"))
#: Of each target, in every run of the tests; `make fuzz` and `make check-all` give it more.
SECONDS = os.environ.get("ROBUSTKERN_FUZZ_SECONDS", "30")

needs_fuzzer = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None and "fuzzer" not in REQUIRED, reason="no Atheris for this Python"
)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_seeds_are_understood_and_pieces_of_them_are_not_worse(name: str) -> None:
    """A target that refuses everything would find nothing."""
    for seed in TARGETS[name].seeds():
        assert TARGETS[name].run(seed)
        for length in range(0, len(seed), 1 + len(seed) // 20):
            TARGETS[name].run(seed[:length])


@pytest.mark.parametrize("path", FOUND, ids=lambda path: f"{path.parent.name}-{path.name}")
@pytest.mark.timeout(30)
def test_what_was_found_is_refused(path: Path) -> None:
    assert not TARGETS[path.parent.name].run(path.read_bytes())


def fuzz(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, FUZZER, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@needs_fuzzer
def test_half_a_minute_of_each_finds_nothing(tmp_path: Path) -> None:
    """From one seed, so that no change is refused for what was there before it; `make fuzz` tries others."""
    done = fuzz("--seconds", SECONDS, "--seed", "1", "--corpus", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    tried = re.findall(r"^(\w+): (\d+) inputs, .* no finding$", done.stdout, flags=re.M)
    assert [name for name, _ in tried] == list(TARGETS), done.stdout
    assert min(int(inputs) for _, inputs in tried) > 100


@needs_fuzzer
def test_a_planted_fault_is_found(tmp_path: Path) -> None:
    """Four bytes, by what they reach: by chance one input in 2 ** 32 would have them."""
    done = fuzz("planted", "--seconds", "60", "--corpus", str(tmp_path))
    assert done.returncode == 1
    assert "a finding" in done.stdout
    assert "AssertionError: found" in done.stdout + done.stderr
    assert any(path.read_bytes().startswith(b"fuzz") for path in tmp_path.glob("planted-finding-*"))
