"""Other frameworks' own names and conventions over the rules: a module a framework, each an optional extra."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def needs(extra: str | None) -> Iterator[None]:
    """Say which extra brings a package whose import fails in here; None: no extra does."""
    try:
        yield
    except ModuleNotFoundError as error:
        name = str(error.name).partition(".")[0]
        remedy = f"pip install 'robustkern[{extra}]'" if extra else f"pip install {name}"
        message = f"this adapter needs {name}, which is not installed ({remedy})"
        raise ModuleNotFoundError(message, name=name) from None
