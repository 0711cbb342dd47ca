"""``robustkern rules``, and where commands find rules that are not robustkern's own: files, and installed packages."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from robustkern.cli.console import Wrong, command, print_json, print_table
from robustkern.rules import registered, table
from robustkern.rules.own import load_file, load_offered, offers

__all__ = ["Import", "load_named", "rules"]


def load_named(names: tuple[str, ...]) -> None:
    """Load what installed packages offer under these names; an error is one of --rule."""
    try:
        load_offered(names)
    except ImportError as error:
        raise Wrong(f"--rule: {error}") from error


def _load(path: Path) -> None:
    if path.suffix != ".py" or not os.path.isfile(path):
        missing = ", which is not there" if not os.path.exists(path) else ""
        raise Wrong(f"--import: expected a Python file, FILE.py; got {path}{missing}")
    try:
        load_file(path)
    except Exception as error:  # whatever the file raises
        raise Wrong(f"--import: {path}: {type(error).__name__}: {error}") from error


def _import(paths: list[Path] | None) -> list[Path] | None:
    from robustkern.cli.console import errors

    with errors():
        for path in paths or ():
            _load(path)
    return paths


Import = Annotated[
    list[Path] | None,
    typer.Option("--import", callback=_import, is_eager=True, help="FILE.py with rules of your own; may be repeated."),
]


@command()
def rules(
    own: Import = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all facts as JSON on stdout.")] = False,
) -> None:
    """List the rules: how often they read the data, what their guarantee needs, what they are.

    Packages offer more rules by entry points of the group robustkern.rules,
    which are loaded where their name is used; --import FILE.py brings in those
    of a file.
    """
    aliases = {rule.form or rule.name: list(rule.aliases) for rule in registered().values()}
    offered = {offer.name: offer.value for offer in offers()}
    if as_json:
        keys = ("rule", "what", "reads", "weights", "needs", "aliases")
        facts = [dict(zip(keys, [*row, aliases[row[0]]], strict=True)) for row in table()]
        print_json({"rules": facts, "offered": offered})
        return
    columns = ("rule", "reads", "weights", "guarantee needs", "what it is")
    rows = []
    for form, what, reads, weights, needs in table():
        also = f"; also: {', '.join(aliases[form])}" if aliases[form] else ""
        rows.append([form, reads, weights, needs, what + also])
    print_table("rules", columns, rows, prose=columns[-1:])
    for name, value in offered.items():
        print(f"{name}: offered by {value}, loaded when it is named")
