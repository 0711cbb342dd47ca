"""Where rules that are not robustkern's own are found: in files, and in installed packages that offer some."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from robustkern.rules.text import known_names

__all__ = ["load_file", "load_offered", "offers"]

#: The group of entry points by which packages offer rules: ``name = "package.module"`` or ``"package.module:Class"``.
GROUP = "robustkern.rules"


def load_file(path: Path) -> None:
    """Run a Python file that registers rules; whatever it raises is raised."""
    name = f"robustkern_import_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(sys.modules[name])


def offers() -> list[EntryPoint]:
    """Return what installed packages offer, of names that nothing else has."""
    return [offer for offer in entry_points(group=GROUP) if offer.name not in known_names()]


def load_offered(names: Iterable[str]) -> None:
    """Load the installed packages that offer rules of these names, where nothing else has them.

    Raises
    ------
    ImportError
        If a package cannot be loaded, or does not register the rule that it offers; the message says which.
    """
    unknown = set(names) - known_names()
    for offer in offers() if unknown else ():
        if offer.name in unknown:
            try:
                offer.load()
            except Exception as error:
                what = f"{offer.name} is offered by {offer.value}, which cannot be loaded"
                raise ImportError(f"{what}: {type(error).__name__}: {error}") from error
            if offer.name not in known_names():
                raise ImportError(f"{offer.value} offers a rule {offer.name!r}, and registers none of that name")
