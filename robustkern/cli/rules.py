"""``robustkern rules``, and where commands find rules that are not robustkern's own: files, and installed packages."""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated

import typer

from robustkern.cli.console import Wrong, command, print_json, print_table
from robustkern.rules import registered, table
from robustkern.rules.text import known_names

__all__ = ["GROUP", "Import", "load_named", "rules"]

#: The group of entry points by which packages offer rules: ``name = "package.module"`` or ``"package.module:Class"``.
GROUP = "robustkern.rules"


def load_file(path: Path) -> None:
    """Run a Python file that registers rules.

    Raises
    ------
    Wrong
        If it cannot be run.
    """
    if path.suffix != ".py" or not os.path.isfile(path):
        missing = ", which is not there" if not os.path.exists(path) else ""
        raise Wrong(f"--import: expected a Python file, FILE.py; got {path}{missing}")
    name = f"robustkern_import_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    try:
        spec.loader.exec_module(sys.modules[name])
    except Exception as error:  # whatever the file raises
        raise Wrong(f"--import: {path}: {type(error).__name__}: {error}") from error


def load_named(names: tuple[str, ...]) -> None:
    """Load the installed packages that offer rules of these names, where nothing else has them.

    Raises
    ------
    Wrong
        If a package cannot be loaded, or does not register the rule that it offers.
    """
    unknown = set(names) - known_names()
    for offer in entry_points(group=GROUP) if unknown else ():
        if offer.name in unknown:
            try:
                offer.load()
            except Exception as error:
                what = f"{offer.name} is offered by {offer.value}, which cannot be loaded"
                raise Wrong(f"--rule: {what}: {type(error).__name__}: {error}") from error
            if offer.name not in known_names():
                raise Wrong(f"--rule: {offer.value} offers a rule {offer.name!r}, and registers none of that name")


def _import(paths: list[Path] | None) -> list[Path] | None:
    from robustkern.cli.console import errors

    with errors():
        for path in paths or ():
            load_file(path)
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
    offers = {offer.name: offer.value for offer in entry_points(group=GROUP) if offer.name not in known_names()}
    if as_json:
        keys = ("rule", "what", "reads", "weights", "needs", "aliases")
        facts = [dict(zip(keys, [*row, aliases[row[0]]], strict=True)) for row in table()]
        print_json({"rules": facts, "offered": offers})
        return
    columns = ("rule", "reads", "weights", "guarantee needs", "what it is")
    rows = []
    for form, what, reads, weights, needs in table():
        also = f"; also: {', '.join(aliases[form])}" if aliases[form] else ""
        rows.append([form, reads, weights, needs, what + also])
    print_table("rules", columns, rows, prose=columns[-1:])
    for name, value in offers.items():
        print(f"{name}: offered by {value}, loaded when it is named")
