"""The command line: ``robustkern`` with aggregate, train, reproduce, bench, scaling, rules, demo, info and doctor.

Exit codes: 0 done; 1 it cannot be done (corrupt or unlike files, too many rows with NaN); 2 the command was not
understood, or an optional package is missing; 130 after Ctrl-C.
"""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["app", "main"]


def __getattr__(name: str) -> Any:
    """Import the commands where they are asked for: without what the extra `cli` brings there is only `main`."""
    if name == "app":
        from robustkern.cli.commands import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main() -> None:
    """Run the command line."""
    try:
        from robustkern.cli import plain

        plain.prepare()
        try:
            try:
                from robustkern.cli.commands import app as run
            except ModuleNotFoundError as missing:
                if str(missing.name).partition(".")[0] not in ("typer", "rich", "safetensors"):
                    raise
                plain.main(sys.argv[1:], missing)
            else:
                run()
        finally:
            plain.flush()
    except KeyboardInterrupt:  # before a command has begun, which says so itself
        print("stopped", file=sys.stderr)
        sys.exit(130)
