"""What the text forms of rules and attacks share: making the object that a name and its arguments stand for."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

__all__ = ["make"]

T = TypeVar("T")


def make(
    what: str,
    known: Sequence[str],
    kinds: Mapping[str, type[T]],
    name: str,
    arguments: list[Any],
    options: dict[str, Any],
) -> T:
    """Make an object of a named dataclass.

    Parameters
    ----------
    what : str
        How errors call it: "rule", "attack".
    known : sequence of str
        The names that errors list.
    kinds : mapping of str to dataclass
        By name.
    name, arguments, options
        What was written.

    Raises
    ------
    ValueError
        If there is no such name, or its parameters are others.
    """
    if name not in kinds:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{what}: {name!r} is not known{hint} (known: {', '.join(known)})")
    kind: Any = kinds[name]
    try:
        made: T = kind(*arguments, **options)
    except TypeError as error:
        fields = ", ".join(spec.name for spec in dataclasses.fields(kind)) or "none"
        raise ValueError(f"{what}: {name}: {error} (its parameters: {fields})") from None
    return made
