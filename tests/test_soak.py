"""Half a minute of the soak; `make soak` takes an hour."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_half_a_minute_leaves_nothing_behind() -> None:
    command = [sys.executable, str(Path(__file__).with_name("soak.py")), "--minutes", "0.5", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing was wrong" in done.stdout
    for kind in ("call", "lists", "stream", "server", "files", "fork", "kill"):
        assert f"'{kind}': " in done.stdout
