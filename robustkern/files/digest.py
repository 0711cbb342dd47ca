"""Whether a piece of a file is what it was when it was read before: a hash under a key that nobody else knows.

The polynomial hash of NH (Black et al. 1999, "UMAC") with 2^-32 chance for two different pieces to look alike, whatever
they are, as long as the key is secret; the compiled one runs at the speed of memory.
"""

from __future__ import annotations

import contextlib
import secrets

import numpy as np
from numpy.typing import NDArray

from robustkern.backends.cpp import Cpp
from robustkern.backends.registry import load_backend
from robustkern.errors import BackendUnavailable

__all__ = ["Digest"]

WORDS = 256  # of 32 bits in a block
PRIME = (1 << 61) - 1


class Digest:
    """A keyed hash of contiguous bytes; every object has a key of its own."""

    def __init__(self) -> None:
        self.key = np.frombuffer(secrets.token_bytes(4 * WORDS), dtype=np.uint32)
        self.point = secrets.randbelow(PRIME)
        self.compiled: Cpp | None = None
        with contextlib.suppress(BackendUnavailable):
            found = load_backend("cpp")
            self.compiled = found if isinstance(found, Cpp) else None

    def __call__(self, data: NDArray[np.uint8]) -> int:
        """Return the hash, below 2^61 - 1."""
        if self.compiled is not None:
            return self.compiled.digest(data, self.key, self.point)
        return self.plain(data)

    def plain(self, data: NDArray[np.uint8]) -> int:
        """Return the same in NumPy: the reference."""
        blocks = -(-len(data) // (4 * WORDS))
        padded = np.zeros(blocks * 4 * WORDS, dtype=np.uint8)
        padded[: len(data)] = data
        words = padded.view("<u4").reshape(blocks, 2, WORDS // 2)
        left, right = ((words[:, k] + self.key.reshape(2, -1)[k]).astype(np.uint64) for k in range(2))
        value = len(data) % PRIME
        for hashed in (left * right).sum(axis=1, dtype=np.uint64).tolist():
            value = (value * self.point + hashed % PRIME) % PRIME
        return value
