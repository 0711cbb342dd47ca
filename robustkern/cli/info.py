"""``robustkern info``."""

from __future__ import annotations

from robustkern.cli.console import command
from robustkern.cli.options import Json
from robustkern.cli.plain import print_info

__all__ = ["info"]


@command()
def info(as_json: Json = False) -> None:
    """Show versions, backends (and why one is absent), instruction sets and threads."""
    print_info(as_json)
