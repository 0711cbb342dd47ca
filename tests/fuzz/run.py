"""Fuzz targets guided by coverage (Atheris): `python tests/fuzz/run.py [TARGET ...] --seconds 60`.

Each target has a process of its own and a corpus that grows in build/fuzz, where the next run goes on. An input that
breaks a promise is left there as `finding-*`; kept in tests/fuzz/found/TARGET it is tried by every `make test`.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CORPUS = ROOT / "build" / "fuzz"
#: Whose branches are watched: the readers, and what of the standard library they hand input to.
WATCHED = ["robustkern", "zipfile", "fuzz"]


def fuzz(name: str, seconds: int, corpus: Path, seed: int) -> None:
    """Fuzz one target in this process, which ends with it."""
    import atheris
    from watched import take_sources

    take_sources(ROOT)  # an editable installation's importer is one that Atheris does not see through
    with atheris.instrument_imports(include=WATCHED):
        from fuzz.planted import PLANTED
        from fuzz.targets import TARGETS
    target = (TARGETS | PLANTED)[name]
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


def main() -> int:
    """Fuzz targets one after the other; 1 where one has a finding."""
    sys.path.insert(0, str(ROOT / "tests"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", nargs="*")
    parser.add_argument("--seconds", type=int, default=60, help="of each target")
    parser.add_argument("--corpus", type=Path, default=CORPUS)
    parser.add_argument("--seed", type=int, default=0, help="of what is tried; 0 for another one in each run")
    parser.add_argument("--here", action="store_true", help="one target, in this process")
    given = parser.parse_args()
    if given.here:
        fuzz(given.target[0], given.seconds, given.corpus / given.target[0], given.seed)
    names = given.target
    if not names:  # or it takes seconds to import for nothing
        from fuzz.targets import TARGETS

        names = list(TARGETS)
    failed = False
    for name in names:
        command = [sys.executable, __file__, name, "--here", "--corpus", given.corpus]
        command += ["--seconds", str(given.seconds), "--seed", str(given.seed)]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
        said = dict(
            line[len("stat::") :].split(":", 1) for line in done.stderr.splitlines() if line.startswith("stat::")
        )
        tried = said.get("number_of_executed_units", "?").strip()
        kept = len(list((given.corpus / name).iterdir()))
        print(
            f"{name}: {tried} inputs, corpus of {kept}, {'a finding' if done.returncode else 'no finding'}", flush=True
        )
        if done.returncode:
            said_last = [line for line in done.stderr.splitlines() if not line.startswith(("INFO", "WARNING", "#"))]
            print("\n".join(said_last)[-6000:], file=sys.stderr)
        failed |= done.returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
