"""All commands together."""

from __future__ import annotations

from typing import Annotated

import typer

from robustkern import __version__
from robustkern.cli.aggregate import aggregate
from robustkern.cli.bench import bench
from robustkern.cli.demo import demo
from robustkern.cli.doctor import doctor
from robustkern.cli.info import info
from robustkern.cli.lora import lora
from robustkern.cli.reproduce import reproduce
from robustkern.cli.rules import rules
from robustkern.cli.scaling import scaling
from robustkern.cli.train import train

__all__ = ["app"]

app = typer.Typer(
    name="robustkern",
    no_args_is_help=True,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _robustkern(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Byzantine-robust aggregation of updates at the speed of memory.

    Exit codes: 0 done; 1 it cannot be done; 2 the command was not understood, or a package is missing; 130 Ctrl-C.
    """
    if version:
        if context.invoked_subcommand is not None:
            context.fail("--version is asked for alone")
        print(f"robustkern {__version__}")
    elif context.invoked_subcommand is None:
        context.fail("Missing command.")


for _command in (aggregate, lora, demo, bench, scaling, train, reproduce, rules, info, doctor):
    app.command()(_command)
