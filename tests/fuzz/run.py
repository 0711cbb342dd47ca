"""Fuzz targets guided by coverage (Atheris): `python tests/fuzz/run.py [TARGET ...] --seconds 60`.

Each target has a process of its own and a corpus that grows in build/fuzz, where the next run goes on. An input that
breaks a promise is left there as `finding-*`; kept in tests/fuzz/found/TARGET it is tried by every `make test`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[2]
CORPUS = ROOT / "build" / "fuzz"
#: Whose branches are watched: the readers, and what of the standard library they hand input to.
WATCHED = ["robustkern", "zipfile", "fuzz"]


def targets() -> dict[str, Any]:
    """Import all targets so that Atheris sees their branches, once for all of them: it takes ten seconds."""
    import atheris
    from watched import take_sources

    take_sources(ROOT)  # an editable installation's importer is one that Atheris does not see through
    with redirect_stderr(io.StringIO()), atheris.instrument_imports(include=WATCHED):  # which names each module
        from fuzz.planted import PLANTED
        from fuzz.targets import TARGETS
    return {**TARGETS, **PLANTED}


def fuzz(name: str, target: Any, seconds: int, corpus: Path, seed: int) -> None:
    """Fuzz one target in this process, which ends with it."""
    import atheris

    corpus.mkdir(parents=True, exist_ok=True)
    for data in target.seeds():
        (corpus / hashlib.sha1(data).hexdigest()).write_bytes(data)
    words = corpus.with_name(f"{name}-words")
    escaped = ["".join(f"\\x{byte:02x}" for byte in word.encode("latin1")) for word in target.words]
    words.write_text("".join(f'"{word}"\n' for word in escaped))
    options = [
        f"-max_total_time={seconds}",
        f"-seed={seed}",
        "-timeout=20",  # seconds of one input
        "-rss_limit_mb=4096",
        "-max_len=65536",
        f"-artifact_prefix={corpus.parent}/{name}-finding-",
        *([f"-dict={words}"] if target.words else []),
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], lambda data: target.run(data) and None)
    atheris.Fuzz()


def in_a_child(work: Callable[[], None], stderr: IO[str]) -> int:
    """Return how a child of this process ended that did some work."""
    child = os.fork()
    if child == 0:
        os.dup2(stderr.fileno(), 2)
        work()
        sys.exit(1)  # a fuzzer ends its process itself; a finding is written as Python ends
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> int:
    """Fuzz targets one after the other; 1 where one has a finding."""
    sys.path.insert(0, str(ROOT / "tests"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", nargs="*")
    parser.add_argument("--seconds", type=int, default=60, help="of each target")
    parser.add_argument("--corpus", type=Path, default=CORPUS)
    parser.add_argument("--seed", type=int, default=0, help="of what is tried; 0 for another one in each run")
    given = parser.parse_args()
    known = targets()
    failed = False
    for name in given.target or [name for name in known if name != "planted"]:
        with tempfile.TemporaryFile("w+", errors="replace") as stderr:
            work = partial(fuzz, name, known[name], given.seconds, given.corpus / name, given.seed)
            code = in_a_child(work, stderr)
            stderr.seek(0)
            lines = stderr.read().splitlines()
        said = dict(line[len("stat::") :].split(":", 1) for line in lines if line.startswith("stat::"))
        tried = said.get("number_of_executed_units", "?").strip()
        kept = len(list((given.corpus / name).glob("*")))
        print(f"{name}: {tried} inputs, corpus of {kept}, {'a finding' if code else 'no finding'}", flush=True)
        if code:
            said_last = [line for line in lines if not line.startswith(("INFO", "WARNING", "#"))]
            print("\n".join(said_last)[-6000:], file=sys.stderr)
        failed |= code != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
