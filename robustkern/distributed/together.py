"""What several processes do together on columns of which each holds some; how they hand things on is somebody else's.

There is one kind of step, an exchange, to which every process brings something or an error. So an error of one is an
error of all, and nobody waits for who has left; and each says in which step it is, so that different calls on different
processes are an error too.
"""

from __future__ import annotations

import hashlib
import pickle
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from robustkern.contract.rows import Source, T

__all__ = ["Part", "Ranks", "Together", "digest_of", "odd_ones", "require_alike"]

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
    """A call that all ranks make: its context ends on all of them, with a result or with the same error.

    Attributes
    ----------
    settled : bool
        Whether all know that nothing has gone wrong, nor can any more; else the end of the context is one more
        exchange.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.settled = False
        self._known: BaseException | None = None  # an error that all have

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
            self.exchange("the end", None)
        self.settled = True

    def exchange(self, step: str, value: Any) -> list[Any]:
        """Return what each rank brings to a step; raise where any of them brings an error, or is in another step."""
        parts = self._exchanged(step, None, value)
        for rank, (_, error, _) in enumerate(parts):
            if error is not None:
                self._known = error
                raise error from (None if rank == self.ranks.rank else RuntimeError(f"on rank {rank}"))
        for rank, (theirs, _, _) in enumerate(parts):
            if theirs != parts[0][0]:
                self._known = ValueError(
                    f"the ranks call different functions, or with different leaves: rank 0 is at {parts[0][0]}, rank "
                    f"{rank} at {theirs} (make the same calls in the same order on all ranks)"
                )
                raise self._known
        return [part for _, _, part in parts]

    def _tell(self, error: Exception) -> None:
        """Bring an error to the exchange that the others are in; raise where a rank before this one brings another."""
        self._known = error
        parts = self._exchanged("an error", _sendable(error), None)
        rank = next(k for k, (_, found, _) in enumerate(parts) if found is not None)
        if rank != self.ranks.rank:
            first = parts[rank][1]
            assert first is not None
            self._known = first
            raise first from RuntimeError(f"on rank {rank}")

    def _exchanged(self, step: str, error: Exception | None, value: Any) -> list[tuple[str, Exception | None, Any]]:
        if self.ranks.size == 1:
            return [(step, error, value)]
        try:
            return [pickle.loads(part) for part in self.ranks.exchange(pickle.dumps((step, error, value)))]
        except BaseException as broken:  # a rank has gone
            self._known = broken
            raise

    def total(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the sum over all ranks, in their order."""
        if self._is_large(x):
            self.exchange("a sum", None)
            return self.ranks.total(x)
        parts = self.exchange("a sum", x)
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
        parts = self.exchange("a pass", brought)
        what, wanted, _ = parts[0]
        if what == "done":
            raise _Decided(wanted)
        if wanted != asked:
            raise _Diverged(wanted)
        if any(part[:2] != parts[0][:2] for part in parts):
            parts = self.exchange("a pass", brought)  # the others have made it by now
        return [self.ranks.total(mine)] if large else [part for _, _, part in parts]

    def _made(self, passes: Any, name: str, arguments: tuple[Any, ...]) -> NDArray[np.float64]:
        try:
            found: NDArray[np.float64] = getattr(passes, name)(*arguments)
        except Exception as error:
            self._tell(error)
            raise
        return found

    def once(self, work: Callable[[], T], passes: Any) -> T:
        """Return what the work gives on rank 0, see `robustkern.contract.rows.Source.once`.

        An error in it counts if it is rank 0's.
        """
        outcome: Any
        try:
            outcome = (work(), None)
        except _Decided as decided:
            return self._outcome(decided.outcome)  # type: ignore[no-any-return]
        except _Diverged as diverged:
            return self._outcome(self._serve(passes, diverged.wanted))  # type: ignore[no-any-return]
        except Exception as error:
            if error is self._known:
                raise
            outcome = (None, _sendable(error))
        what, word, _ = self.exchange("a pass", ("done", outcome if self.ranks.rank == 0 else None, None))[0]
        return self._outcome(word if what == "done" else self._serve(passes, word))  # type: ignore[no-any-return]

    def _serve(self, passes: Any, wanted: bytes) -> Any:
        """Make the passes that rank 0 asks for, until it is done."""
        while True:
            name, arguments, add = pickle.loads(wanted)
            mine = self._made(passes, name, arguments)
            large = add and self._is_large(mine)
            self.exchange("a pass", ("pass", wanted, None if large else mine))
            if large:
                self.ranks.total(mine)
            what, wanted, _ = self.exchange("a pass", ("done", None, None))[0]
            if what == "done":
                return wanted

    def _outcome(self, outcome: tuple[Any, Exception | None]) -> Any:
        result, error = outcome
        if error is not None:
            self._known = error
            raise error
        return result


def _sendable(error: Exception) -> Exception:
    """Return an error, or one that says the same where it cannot go to other processes."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


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
        self.once, self.total = together.once, together.total

    @classmethod
    def of(cls, together: Together, inner: Source, asked: dict[str, str]) -> Part:
        """Return the part, given what all ranks must ask for alike; raise ValueError where they do not."""
        mine = {"the number of rows": str(inner.n), "centre": str(inner.has_centre), **asked}
        calls = together.exchange("a call", (mine, inner.d, inner.dtypes))
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

    def passed(self, passes: Any, name: str, arguments: tuple[Any, ...], add: bool) -> list[NDArray[np.float64]]:
        """Make a pass with all ranks; after the last one nothing has gone wrong with what was written."""
        found = self._together.passed(passes, name, arguments, add)
        self._together.settled = name == "write_pass"
        return found


def require_alike(calls: list[dict[str, str]]) -> None:
    """Raise where the ranks ask for different things."""
    for rank, theirs in enumerate(calls):
        for name, value in theirs.items():
            if value != calls[0].get(name):
                raise ValueError(
                    f"the ranks call for different things: {name} is {calls[0].get(name)} on rank 0, and {value} on "
                    f"rank {rank} (pass the same on all)"
                )


def odd_ones(tables: Sequence[Mapping[str, Hashable]]) -> Iterator[tuple[int, str, Any, Any]]:
    """Yield the tables that are not what most are: which, the first name that differs, and both its values."""
    keys = [tuple(sorted(table.items())) for table in tables]
    usual = tables[keys.index(Counter(keys).most_common(1)[0][0])]
    for k, table in enumerate(tables):
        if table != usual:
            name = min(name for name in {**usual, **table} if table.get(name) != usual.get(name))
            yield k, name, table.get(name, "none"), usual.get(name, "none")


def digest_of(values: Any) -> str:
    """Return a text that tells arrays of numbers apart, however many there are; what is none is checked later."""
    if values is None:
        return "None"
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except Exception:
        return type(values).__name__
    return hashlib.sha256(numbers.tobytes()).hexdigest()[:16] if numbers.size > 8 else str(numbers.tolist())
