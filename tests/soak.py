"""Everything at once, for long: `python tests/soak.py --minutes 60`.

Threads call rules, servers, streams and files, while backends and thread counts change under them, children are forked,
and commands that write are killed. Every result is held against the one that was computed at the start; at the end the
process must hold no more memory, descriptors, threads or temporary files than after a fifth of the time.

NumPy's OpenBLAS gets one thread: with more, a fork waits for ever where another thread multiplies matrices (two threads
of `a @ a` and one of `os.fork` hang within seconds, without robustkern).
"""

from __future__ import annotations

import argparse
import collections
import gc
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

import robustkern as rk

RULES = ("median", "trimmed_mean", "krum", "geometric_median", "ctma(median)", "nnm | ctma(geometric_median)")
SHAPES = ((5, 3), (9, 1000), (12, 40_000), (40, 5_000), (300, 70))
MEMBERS = 6
#: Mebibytes more than after the first part of the time: allocators keep some of what came and went.
MOST_GROWTH = 64


class Work:
    """What threads do, and what must come out."""

    def __init__(self, folder: Path, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.folder = folder
        self.rows = [rng.standard_normal(shape).astype(dtype) for shape in SHAPES for dtype in ("f4", "f8")]
        with rk.use_backend("reference"):
            self.wanted = {
                (i, rule): rk.aggregate(x, rule, f=len(x) // 5) for i, x in enumerate(self.rows) for rule in RULES
            }
        self.pool = folder / "pool"
        self.pool.mkdir()
        for i in range(MEMBERS):
            update = {"a": rng.standard_normal((200, 300)).astype("f4"), "b": rng.standard_normal(7).astype("f2")}
            safetensors.numpy.save_file(update, self.pool / f"client-{i}.safetensors")
        rk.aggregate_files(self.pool, "ctma(median)", f=1, out=folder / "wanted.safetensors")
        self.file = (folder / "wanted.safetensors").read_bytes()
        self.counts: collections.Counter[str] = collections.Counter()
        self.errors: list[str] = []

    def call(self, rng: random.Random) -> None:
        """Compute one of the results."""
        i, rule = rng.choice(list(self.wanted))
        self._same(rk.aggregate(self.rows[i], rule, f=len(self.rows[i]) // 5), i, rule)

    def lists(self, rng: random.Random) -> None:
        """Compute it from rows of their own memory, in two leaves."""
        i, rule = rng.choice(list(self.wanted))
        x = self.rows[i]
        cut = x.shape[1] // 2
        got = rk.aggregate([{"a": row[:cut].copy(), "b": row[cut:].copy()} for row in x], rule, f=len(x) // 5)
        self._same(np.concatenate([got["a"], got["b"]]), i, rule)

    def stream(self, rng: random.Random) -> None:
        """Compute it from rows that arrive."""
        i, rule = rng.choice([key for key in self.wanted if key[1] in ("median", "trimmed_mean", "krum")])
        x = self.rows[i]
        with rk.Stream(rule, n=len(x), f=len(x) // 5) as stream:
            for row in x:
                stream.add(row)
            self._same(stream.result(), i, rule)

    def server(self, rng: random.Random) -> None:
        """Compute it by a server that keeps rows."""
        i, rule = rng.choice([key for key in self.wanted if key[1] in ("krum", "geometric_median")])
        x = self.rows[i]
        server = rk.Server(rule, f=len(x) // 5, absent="stale")
        for k, row in enumerate(x):
            server.add([row], workers=[k])
        self._same(server.aggregate(), i, rule)

    def files(self, rng: random.Random) -> None:
        """Combine files."""
        out = self.folder / f"out-{threading.get_ident()}.safetensors"
        rk.aggregate_files(self.pool, "ctma(median)", f=1, out=out, memory=rng.choice(["100KiB", "1MiB", "1GiB"]))
        if out.read_bytes() != self.file:
            raise AssertionError("a file differs")

    def errors_end_alike(self, rng: random.Random) -> None:
        """Meet an error, which must leave nothing behind."""
        x = self.rows[rng.randrange(len(self.rows))].copy()
        x[: len(x) // 2 + 1] = np.nan
        try:
            rk.aggregate(x, rng.choice(RULES), f=len(x) // 5)
        except rk.NonFiniteError:
            return
        raise AssertionError("most rows were NaN")

    def fork(self, rng: random.Random) -> None:
        """Compute in a child."""
        i, rule = rng.choice(list(self.wanted))
        child = os.fork()
        if child == 0:
            status = 1
            try:
                self._same(rk.aggregate(self.rows[i], rule, f=len(self.rows[i]) // 5), i, rule)
                status = 0
            finally:
                os._exit(status)
        deadline = time.monotonic() + 60
        while (done := os.waitpid(child, os.WNOHANG))[0] == 0:
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                raise AssertionError("a child hangs")
            time.sleep(0.01)
        if done[1]:
            raise AssertionError(f"a child ended with {done[1]}")

    def kill(self, rng: random.Random) -> None:
        """Kill the command in the middle; what is there is whole, and what is left is cleaned up by the next."""
        out = self.folder / f"killed-{threading.get_ident()}" / "out.safetensors"
        out.parent.mkdir(exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "robustkern",
            "aggregate",
            str(self.pool),
            "--rule",
            "ctma(median)",
            "--f",
            "1",
        ]
        started = subprocess.Popen([*command, "--out", str(out), "--json"], stdout=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.2, 1.5))
        started.kill()
        started.wait()
        if out.exists() and out.read_bytes() != self.file:
            raise AssertionError("a killed command left half a file")
        rk.aggregate_files(self.pool, "ctma(median)", f=1, out=out)
        if [path.name for path in out.parent.iterdir()] != [out.name]:
            raise AssertionError(f"leftovers: {sorted(os.listdir(out.parent))}")

    def change(self, rng: random.Random) -> None:
        """Change the number of threads for everybody."""
        rk.set_num_threads(rng.choice([None, 1, 2, 3, 7]))

    def _same(self, got: Any, i: int, rule: str) -> None:
        want = self.wanted[i, rule]
        spread = float(np.abs(self.rows[i]).max())
        if got.dtype != want.dtype or not np.allclose(
            got, want, rtol=0, atol=spread * 4 * float(np.finfo(want.dtype).eps)
        ):
            raise AssertionError(f"{rule} of {self.rows[i].shape} {want.dtype}: {np.abs(got - want).max()} off")


def state() -> dict[str, int]:
    """Return what the process holds."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "MiB": pages * os.sysconf("SC_PAGE_SIZE") >> 20,
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "temporary files": len([name for name in os.listdir(tempfile.gettempdir()) if "robustkern" in name]),
    }


def keep_busy(work: Work, seconds: float, seed: int, threads: int) -> None:
    """Let threads do all kinds of work for some time."""
    kinds: list[tuple[Callable[[random.Random], None], int]] = [
        (work.call, 60), (work.lists, 20), (work.stream, 5), (work.server, 5), (work.files, 5), (work.errors_end_alike, 5),
        (work.fork, 2), (work.kill, 1), (work.change, 4),
    ]  # fmt: skip
    end = time.monotonic() + seconds

    def run(k: int) -> None:
        rng = random.Random(1000 * seed + k)
        while time.monotonic() < end and not work.errors:
            (kind,) = rng.choices([kind for kind, _ in kinds], [weight for _, weight in kinds])
            backend = rng.choice(["cpp", "cpp", "cpp", "auto", "numba"])
            try:
                with rk.use_backend(backend):
                    kind(rng)
            except BaseException as error:
                work.errors.append(f"{kind.__name__} on {backend}: {type(error).__name__}: {error}")
                return
            work.counts[kind.__name__] += 1

    running = [threading.Thread(target=run, args=(k,)) for k in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()


def soak(
    seconds: float, seed: int, threads: int = 4
) -> tuple[dict[str, int], dict[str, int], dict[str, int], list[str]]:
    """Return how often what was done, what the process held after a fifth of the time and at the end, and errors."""
    warnings.simplefilter("ignore", DeprecationWarning)  # that a process with threads forks, which is the point
    with tempfile.TemporaryDirectory() as name:
        everything = Work(Path(name), seed)
        rk.set_num_threads(7)  # as many as they are ever given: pools are filled before they are counted
        for backend in ("cpp", "numba"):
            with rk.use_backend(backend):
                for i, rule in everything.wanted:
                    rk.aggregate(everything.rows[i], rule, f=len(everything.rows[i]) // 5)
                everything.files(random.Random(0))
        keep_busy(everything, seconds / 5, seed, threads)
        before = state()
        keep_busy(everything, seconds * 4 / 5, seed + 1, threads)
        after = state()
    rk.set_num_threads(None)
    errors = list(everything.errors)
    for what, most in (("MiB", MOST_GROWTH), ("descriptors", 0), ("threads", 8), ("temporary files", 0)):
        if after[what] > before[what] + most:
            errors.append(f"{what}: {before[what]} after a fifth of the time, {after[what]} at the end")
    return dict(everything.counts), before, after, errors


def main() -> int:
    """Soak; 1 where something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    given = parser.parse_args()
    if os.environ.get("OPENBLAS_NUM_THREADS") != "1":
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"OPENBLAS_NUM_THREADS": "1"})
    counts, before, after, errors = soak(60 * given.minutes, given.seed)
    print(f"seed {given.seed}: {counts}\nafter a fifth: {before}\nat the end:    {after}")
    print("\n".join(errors) or "nothing was wrong")
    return int(bool(errors))


if __name__ == "__main__":
    sys.exit(main())
