"""What several processes do together on columns of which each holds some; how they hand things on is somebody else's.

There is one kind of step, an exchange, to which every process brings something or an error. So an error of one is an
error of all, and nobody waits for who has left.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from robustkern.contract.rows import Source, T

__all__ = ["Part", "Ranks", "Together", "digest_of", "require_alike"]

#: Sums of more bytes go piece by piece to whoever adds them up, instead of all to all.
LARGE_SUM = 1 << 16


class Ranks(Protocol):
    """The processes, as each of them sees them.

    Attributes
    ----------
    rank, size : int
        Which one this is, and how many there are.
    """

    rank: int
    size: int

    def exchange(self, payload: bytes) -> list[bytes]:
        """Return what each of them brings, in their order."""

    def total(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the sum of large arrays of one shape, added in the order of the ranks: the same bits everywhere."""


class Together:
    """A call that all ranks make: its context ends on all of them, with a result or with the same error."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.settled = False  # whether all know that nothing has gone wrong so far
        self._known: BaseException | None = None

    def __enter__(self) -> Together:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.settle()
        elif isinstance(error, Exception) and error is not self._known:
            self._tell(error)

    def settle(self) -> None:
        """Raise where anything has gone wrong with any rank so far."""
        if not self.settled:
            self.exchange(None)

    def exchange(self, value: Any) -> list[Any]:
        """Return what each rank brings; raise where any of them brings an error."""
        return self._exchange(None, value)

    def _tell(self, error: Exception) -> None:
        """Bring an error to the exchange that the others are in; raise where a rank before this one brings another."""
        told: Exception = error
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            told = RuntimeError(f"{type(error).__name__}: {error}")
        try:
            self._exchange(told, None)
        except Exception as first:
            if first.args != told.args or type(first) is not type(told):
                raise
        self._known = error

    def _exchange(self, error: Exception | None, value: Any) -> list[Any]:
        if self.ranks.size == 1:
            if error is not None:
                self._known = error
                raise error
            return [value]
        payload = pickle.dumps((error, value))
        try:
            parts = [pickle.loads(part) for part in self.ranks.exchange(payload)]
        except BaseException as broken:
            self._known = broken
            raise
        for rank, (found, _) in enumerate(parts):
            if found is not None:
                self._known = found
                raise found from (None if rank == self.ranks.rank else RuntimeError(f"on rank {rank}"))
        self.settled = True
        return [part for _, part in parts]

    def total(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the sum over all ranks, in their order."""
        if self._is_large(x):
            self.exchange(None)
            return self.ranks.total(x)
        parts = self.exchange(x)
        return sum(parts[1:], start=np.asarray(parts[0]))

    def _is_large(self, x: NDArray[np.float64]) -> bool:
        return self.ranks.size > 1 and x.nbytes * self.ranks.size > LARGE_SUM

    # -- passes over the data, and what follows from them ------------------------------------------------------------
    #
    # All ranks do the same work, and so ask for the same passes, unless their processors differ in a last bit that
    # decides something. Then rank 0 goes on, and whoever asked for another pass only makes those that rank 0 asks for.

    def passed(self, passes: Any, name: str, arguments: tuple[Any, ...], add: bool) -> list[NDArray[np.float64]]:
        """Make a pass with all ranks, see `robustkern.contract.rows.Source.passed`."""
        asked = pickle.dumps((name, arguments, add))
        mine = self._made(passes, name, arguments)
        large = add and self._is_large(mine)
        brought = ("pass", asked, None if large else mine)
        parts = self.exchange(brought)
        what, wanted, _ = parts[0]
        if what == "done":
            raise _Decided(wanted)
        if wanted != asked:
            raise _Diverged(wanted)
        if any(part[:2] != parts[0][:2] for part in parts):
            parts = self.exchange(brought)  # the others have made it by now
        return [self.ranks.total(mine)] if large else [part for _, _, part in parts]

    def _made(self, passes: Any, name: str, arguments: tuple[Any, ...]) -> NDArray[np.float64]:
        try:
            found: NDArray[np.float64] = getattr(passes, name)(*arguments)
        except Exception as error:
            self._tell(error)
            raise
        return found

    def once(self, work: Callable[[], T], passes: Any) -> T:
        """Return what the work gives on rank 0, see `robustkern.contract.rows.Source.once`."""
        outcome: Any
        try:
            outcome = (work(), None)
        except _Decided as decided:
            outcome = decided.outcome
            return _given(outcome)  # type: ignore[no-any-return]
        except _Diverged as diverged:
            outcome = self._serve(passes, diverged.wanted)
            return _given(outcome)  # type: ignore[no-any-return]
        except Exception as error:
            if error is self._known:
                raise
            outcome = (None, error)
        what, word, _ = self.exchange(("done", outcome if self.ranks.rank == 0 else None, None))[0]
        if self.ranks.rank != 0:
            outcome = word if what == "done" else self._serve(passes, word)
        return _given(outcome)  # type: ignore[no-any-return]

    def _serve(self, passes: Any, wanted: bytes) -> tuple[Any, Exception | None]:
        """Make the passes that rank 0 asks for, until it is done."""
        while True:
            name, arguments, add = pickle.loads(wanted)
            mine = self._made(passes, name, arguments)
            large = add and self._is_large(mine)
            self.exchange(("pass", wanted, None if large else mine))
            if large:
                self.ranks.total(mine)
            what, wanted, _ = self.exchange(("done", None, None))[0]
            if what == "done":
                outcome: Any = wanted
                return outcome  # type: ignore[no-any-return]


def _given(outcome: tuple[Any, Exception | None]) -> Any:
    result, error = outcome
    if error is not None:
        raise error
    return result


class _Decided(BaseException):
    """Rank 0 is done."""

    def __init__(self, outcome: tuple[Any, Exception | None]) -> None:
        self.outcome = outcome


class _Diverged(BaseException):
    """Rank 0 asks for another pass."""

    def __init__(self, wanted: bytes) -> None:
        self.wanted = wanted


class Part:
    """The columns that are here, of a source whose columns lie with all ranks.

    Parameters
    ----------
    together : Together
        The call.
    inner : Source
        The columns that are here; d may be 0.
    d, dtypes
        Of all columns.
    """

    def __init__(self, together: Together, inner: Source, d: int, dtypes: set[np.dtype[Any]]) -> None:
        self._inner, self._together = inner, together
        self.n, self.device, self.has_centre, self.plain = inner.n, inner.device, inner.has_centre, inner.plain
        self.d, self.dtypes = d, dtypes
        self.divided = together.ranks.size > 1
        self.total, self.passed, self.once = together.total, together.passed, together.once

    @classmethod
    def of(cls, together: Together, inner: Source, asked: dict[str, str]) -> Part:
        """Return the part, given what all ranks must ask for alike; raise ValueError where they do not."""
        mine = {"rows": str(inner.n), "centre": str(inner.has_centre), **asked}
        calls = together.exchange((mine, inner.d, inner.dtypes))
        require_alike([call for call, _, _ in calls])
        dtypes: set[np.dtype[Any]] = set().union(*(dtypes for _, _, dtypes in calls))
        return cls(together, inner, sum(d for _, d, _ in calls), dtypes)

    @property
    def combine(self) -> Any:
        """How integers are combined, by whoever holds them."""
        return self._inner.combine

    @combine.setter
    def combine(self, how: Any) -> None:
        self._inner.combine = how

    def blocks(self) -> Any:
        """Return the blocks of the columns that are here."""
        return self._inner.blocks()

    def results(self) -> Any:
        """Return them once more to have results written."""
        self._together.settled = False
        return self._inner.results()

    def row_name(self, row: int) -> str:
        """Return how an error should call a row."""
        return self._inner.row_name(row)


def require_alike(calls: list[dict[str, str]]) -> None:
    """Raise where the ranks ask for different things."""
    for rank, theirs in enumerate(calls):
        for name, value in theirs.items():
            if value != calls[0].get(name):
                raise ValueError(
                    f"the ranks call for different things: {name} is {calls[0].get(name)} on rank 0, and {value} on "
                    f"rank {rank} (pass the same on all)"
                )


def digest_of(values: Any) -> str:
    """Return a text that tells arrays of numbers apart, however many there are."""
    if values is None:
        return "None"
    try:
        return hashlib.sha256(np.asarray(values, dtype=np.float64).tobytes()).hexdigest()[:16]
    except (TypeError, ValueError):
        return repr(type(values))
