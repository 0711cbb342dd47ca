"""Which leaves take part, in what their values are computed, and what their result is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from robustkern.contract.rows import DTYPES
from robustkern.errors import shown

__all__ = ["EVERYTHING", "FLOAT8", "Choice", "Form", "computed"]

#: Floats of eight bits: read exactly as float32, in which they are computed, and rounded to at the end.
FLOAT8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))
#: Complex numbers are pairs of floats: distances of vectors of both are the same.
_PAIRS: dict[np.dtype[Any], np.dtype[Any]] = {
    np.dtype(np.complex64): np.dtype(np.float32),
    np.dtype(np.complex128): np.dtype(np.float64),
}


class Form(NamedTuple):
    """What a leaf of some dtype is computed in.

    Attributes
    ----------
    dtype : numpy dtype
        One of `DTYPES`.
    factor : int
        How many of its values stand for one of the leaf's: 2 for complex numbers.
    stored : numpy dtype
        Of the leaf's values, as so many.
    result : numpy dtype
        Of the result.
    """

    dtype: np.dtype[Any]
    factor: int
    stored: np.dtype[Any]
    result: np.dtype[Any]


def computed(dtype: np.dtype[Any]) -> Form | None:
    """Return how leaves of a dtype are computed, or None where it is none of floats."""
    if dtype in DTYPES:
        return Form(dtype, 1, dtype, dtype)
    if dtype in FLOAT8:
        return Form(np.dtype(np.float32), 1, dtype, dtype)
    if dtype in _PAIRS:
        return Form(_PAIRS[dtype], 2, _PAIRS[dtype], dtype)
    return None


@dataclass(frozen=True)
class Choice:
    """What a caller asked for about leaves.

    Attributes
    ----------
    only, exclude : tuple of str
        Patterns of names, as of files: "layer.*.weight".
    dtype : numpy dtype or None
        In which all leaves of floats are combined, and returned.
    integers : bool
        Whether leaves of integers are returned in `dtype` too.
    """

    only: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    dtype: np.dtype[Any] | None = None
    integers: bool = False

    @classmethod
    def of(cls, only: Any, exclude: Any, dtype: Any, integers: bool = False) -> Choice:
        """Check what the caller passed."""
        wanted = None if dtype is None else _dtype(dtype)
        return cls(_patterns(only, "only"), _patterns(exclude, "exclude"), wanted, integers and wanted is not None)

    def __str__(self) -> str:
        """Say it as an error does."""
        parts = [f"{k}={','.join(v)}" for k, v in (("only", self.only), ("exclude", self.exclude)) if v]
        return " and ".join(parts) or "all leaves"

    def takes(self, name: str) -> bool:
        """Tell whether a leaf takes part."""
        if self.only and not any(fnmatchcase(name, pattern) for pattern in self.only):
            return False
        return not any(fnmatchcase(name, pattern) for pattern in self.exclude)

    def check(self, names: Iterable[str]) -> None:
        """Raise where a pattern means none of the leaves, or all are left out."""
        known = list(names)
        for option, patterns in (("only", self.only), ("exclude", self.exclude)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in known):
                    leaves = ", ".join(map(shown, known[:5])) + (", ..." if len(known) > 5 else "")
                    raise ValueError(f"{option}: {shown(pattern)} matches no leaf (leaves: {leaves})")
        if not any(map(self.takes, known)):
            raise ValueError(f"{self} leaves no leaf to combine")

    def kind(self, dtype: np.dtype[Any]) -> str:
        """Return what must be the same in all rows: the dtype, where all floats are not combined in another."""
        found = computed(dtype)
        if found is None or self.dtype is None:
            return dtype.name if dtype.isnative else dtype.str
        return f"float{found.factor}"

    def form(self, dtype: np.dtype[Any]) -> Form | None:
        """Return how a leaf of a dtype is computed and returned; None: as integers."""
        found = computed(dtype)
        if found is None or self.dtype is None:
            return found
        wanted = computed(self.dtype)
        assert wanted is not None
        if found.factor == 1:
            return found._replace(dtype=wanted.dtype, result=wanted.result)
        pair: np.dtype[Any] = np.dtype(np.complex128 if wanted.dtype == np.float64 else np.complex64)
        return found._replace(dtype=_PAIRS[pair], result=pair)

    def result(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        """Return the dtype of a leaf's result."""
        found = self.form(dtype)
        if found is not None:
            return found.result
        return self.dtype if self.integers and self.dtype is not None else dtype


EVERYTHING = Choice()


def _patterns(given: Any, option: str) -> tuple[str, ...]:
    if given is None:
        return ()
    patterns = (given,) if isinstance(given, str) else given
    if (
        not patterns
        or not isinstance(patterns, Sequence)
        or not all(isinstance(p, str) for p in patterns)
        or not all(patterns)
    ):
        raise TypeError(f"{option} must be a pattern of leaf names, or a list of them; got {given!r:.80}")
    return tuple(patterns)


def _dtype(given: Any) -> np.dtype[Any]:
    name = str(given).removeprefix("torch.") if not isinstance(given, type) else np.dtype(given).name
    known: dict[str, np.dtype[Any]] = {dtype.name: dtype for dtype in (*DTYPES, *FLOAT8)}
    if name not in known:
        raise ValueError(f"dtype must be one of {', '.join(known)}; got {name!r:.80}")
    return known[name]
