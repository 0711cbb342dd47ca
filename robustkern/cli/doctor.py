"""``robustkern doctor``."""

from __future__ import annotations

from typing import Annotated

import typer

from robustkern.cli.console import command
from robustkern.cli.options import Json
from robustkern.cli.plain import diagnose

__all__ = ["doctor"]


@command()
def doctor(
    every: Annotated[bool, typer.Option("--all", help="Try backends too that calls do not use.")] = False,
    as_json: Json = False,
) -> None:
    """Check this installation: exit code 0 if nothing is wrong, else 1.

    Compiled parts, threads, OpenMP, forks, GPU, a self-test of the kernels
    against their definition, optional packages; with what to do.
    """
    diagnose(as_json, every)
