"""What the command line can do without typer and rich: ``robustkern info`` and ``robustkern doctor``."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Sequence

import robustkern

__all__ = ["diagnose", "flush", "main", "prepare", "print_info", "stop_printing"]


def prepare() -> None:
    """Make printing no error: where stdout or stderr is closed, or its encoding lacks a letter, which is escaped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", errors="backslashreplace"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_info(as_json: bool) -> None:
    """Print versions, backends (and why one is absent), instruction sets and threads."""
    here = robustkern.info()
    if as_json:
        print(json.dumps(here))
        return
    print(f"robustkern {here['version']}, Python {here['python']}, NumPy {here['numpy']}, {here['machine']}")
    print("backends:")
    for name, state in here["backends"].items():
        dtypes = sorted({c["dtype"] for c in here["capabilities"] if c["backend"] == name and c["available"] == "yes"})
        print(f"  {name:<10} {state}{': ' if dtypes else ''}{', '.join(dtypes)}")
    isas = ", ".join(here["isas"]) or "none"
    print(f"instruction sets: {isas} (in use: {here['isa']}; ROBUSTKERN_ISA forces a lower one)")
    print(f"threads: {here['threads']} (ROBUSTKERN_NUM_THREADS, robustkern.set_num_threads)")
    gpus = [f"{gpu['name']} ({gpu['memory_bytes'] / 1e9:.0f} GB)" for gpu in here["gpus"]]
    print(f"GPUs: {', '.join(gpus) or 'none that can be used'}")


def diagnose(as_json: bool, every: bool) -> None:
    """Print what may be wrong with the installation; exit code 1 where something is."""
    from robustkern.doctor import report

    if not report(as_json, every):
        raise SystemExit(1)


def main(arguments: Sequence[str], missing: ImportError) -> None:
    """Answer what needs no other package; for the rest say what is missing."""
    if arguments and arguments[0] == "info" and set(arguments[1:]) <= {"--json"}:
        print_info("--json" in arguments)
    elif arguments and arguments[0] == "doctor" and set(arguments[1:]) <= {"--json", "--all"}:
        diagnose("--json" in arguments, "--all" in arguments)
    elif list(arguments) == ["--version"]:
        print(f"robustkern {robustkern.__version__}")
    else:
        print(
            f"robustkern: {missing}; all commands but `robustkern info` and `robustkern doctor` need: "
            "pip install 'robustkern[cli]'",
            file=sys.stderr,
        )
        raise SystemExit(2)


def stop_printing() -> None:
    """Let what is still to be printed go nowhere: nobody reads it any more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def flush() -> None:
    """Print what is left; where nobody reads it, not a word about that."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        stop_printing()
