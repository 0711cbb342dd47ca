"""Prints the files of the package that a call passes through: python tests/call_path.py"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

import robustkern as rk

ROOT = str(Path(rk.__file__).parent) + "/"
X = np.random.default_rng(0).standard_normal((10, 1000)).astype(np.float32)
CALLS: dict[str, Callable[[], Any]] = {
    "aggregate(x, 'median')": lambda: rk.aggregate(X, "median"),
    "aggregate(x, 'geometric_median', f=1)": lambda: rk.aggregate(X, "geometric_median", f=1),
    "aggregate(x, 'ctma(median)', f=1)": lambda: rk.aggregate(X, "ctma(median)", f=1),
    "aggregate(x, 'nnm | ctma(geometric_median)', f=1)": lambda: rk.aggregate(X, "nnm | ctma(geometric_median)", f=1),
}


def path_of(call: Callable[[], Any]) -> list[str]:
    """Return the files that a call is in, one after the other, each entered by a call or by a return to it."""
    call()  # whatever happens once
    seen: list[str] = []

    def profile(frame: FrameType, event: str, _: Any) -> None:
        here: FrameType | None = frame if event == "call" else frame.f_back if event == "return" else None
        if frame.f_code.co_filename.startswith(ROOT) and here is not None:
            name = here.f_code.co_filename
            if name.startswith(ROOT) and (not seen or seen[-1] != name.removeprefix(ROOT)):
                seen.append(name.removeprefix(ROOT))

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return seen


if __name__ == "__main__":
    for name, call in CALLS.items():
        path = path_of(call)
        print(f"{name}: {len(path) - 1} changes of file, {len(set(path))} files\n  {' > '.join(path)}")
