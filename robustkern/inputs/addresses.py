"""Where arrays begin: by the compiled part where it is here, because small calls would feel the difference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

try:
    from robustkern._cpu import address_of, addresses_of
except ImportError:  # the same, in three times the time
    from robustkern.contract.rows import address_of

    def addresses_of(arrays: Sequence[Any]) -> list[int] | None:
        """Return where arrays begin; None unless all are C-contiguous and of one class, dtype and shape."""
        first = arrays[0]
        for x in arrays:
            if type(x) is not type(first) or x.dtype != first.dtype or x.shape != first.shape:
                return None
            if not x.flags.c_contiguous:
                return None
        return [address_of(x) for x in arrays]


__all__ = ["address_of", "addresses_of"]
