"""What several processes do together on columns of which each holds some; how they hand things on is somebody else's.

There is one kind of step: every process tells rank 0 something, or an error, and rank 0 answers all. So an error of one
is an error of all, and nobody waits for who has left; and each says in which step it is, so that different calls on
different processes are an error too.
"""

from __future__ import annotations

import hashlib
import pickle
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from robustkern.contract.rows import Source, T

__all__ = ["Part", "Ranks", "Together", "digest_of", "odd_ones", "require_alike"]

#: In which step, an error, what is brought.
_Message = tuple[str, "_Sent | None", Any]
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

    def gather(self, payload: bytes) -> list[bytes]:
        """Return on rank 0 what each of them brings, in their order; nothing on the others."""

    def broadcast(self, payload: bytes) -> bytes:
        """Return what rank 0 says; what others pass is ignored."""

    def total(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the sum of large arrays of one shape, added in the order of the ranks: the same bits everywhere."""


class Together:
    """A call that all ranks make: its context ends on all of them, with a result or with the same error.

    Attributes
    ----------
    settled : bool
        Whether all know that nothing has gone wrong, nor can any more; else the end of the context is one more
        exchange.
    handed_out : bool
        Whether `hand_out` has brought all ranks what is written.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.settled = self.handed_out = False
        self._known: BaseException | None = None  # an error that all have
        self._solving = False  # while rank 0 decides which pass is next
        self._waited_for = False  # on rank 0: whether the others wait for its word
        self._hand_out: Callable[[bool], bool] | None = None
        self._decided = False  # whether writing the result is next, and nothing before it
        self._begun: NDArray[np.float64] | None = None  # elsewhere: what the first pass has found
        self._behind: Any = None  # passes that were made for rank 0, which alone knows what was found

    def __enter__(self) -> Together:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.settle()
        elif isinstance(error, Exception) and error is not self._known and not self.settled:
            self._tell(error)

    def settle(self) -> None:
        """Raise where anything has gone wrong with any rank so far."""
        if not self.settled:
            self.exchange("the end", None)
        self.settled = True

    def exchange(self, step: str, value: Any) -> list[Any]:
        """Return what each rank brings to a step; raise where any of them brings an error, or is in another step."""
        return [part for _, _, part in self._judged(self._told((step, None, value)))]

    def _judged(self, parts: list[_Message]) -> list[_Message]:
        """Return what all ranks brought; raise what all of them must."""
        for rank, (_, sent, _) in enumerate(parts):
            if sent is not None:
                self._known = error = sent.error()
                raise error from (None if rank == self.ranks.rank else RuntimeError(f"on rank {rank}"))
        for rank, (theirs, _, _) in enumerate(parts):
            if theirs != parts[0][0]:
                self._known = ValueError(
                    f"the ranks call different functions, or with different leaves: rank 0 is at {parts[0][0]}, rank "
                    f"{rank} at {theirs} (make the same calls in the same order on all ranks)"
                )
                raise self._known
        return parts

    def _tell(self, error: Exception) -> None:
        """Bring an error to the step that the others are in; raise where a rank before this one brings another."""
        self._known = error
        self._all_well(False)
        parts = self._told(("an error", _Sent.of(error), None))
        rank, first = next((k, sent) for k, (_, sent, _) in enumerate(parts) if sent is not None)
        if rank != self.ranks.rank:
            self._known = other = first.error()
            raise other from RuntimeError(f"on rank {rank}")

    def _told(self, message: _Message) -> list[_Message]:
        """Return what all ranks bring, to all of them."""
        if self.ranks.size == 1:
            return [message]
        if self.ranks.rank:
            self._bring(message)
            kind, parts = self._word()
            assert kind == "parts"
            return self._all(parts)
        return self._answered(self._brought(message))

    # What goes between the ranks, by turns: all bring a message, then rank 0 has a word for all.

    def _bring(self, message: _Message) -> list[bytes]:
        with self._whole():
            return self.ranks.gather(pickle.dumps(message))

    def _brought(self, message: _Message) -> list[bytes]:
        """Return on rank 0 what all bring; who waits for its word already brings nothing more."""
        if self._waited_for:
            return [pickle.dumps(message), *[pickle.dumps((message[0], None, None))] * (self.ranks.size - 1)]
        found = self._bring(message)
        self._waited_for = True
        return found

    def _word(self, *said: Any) -> Any:
        """Return rank 0's word: what kind of one, and what it says."""
        with self._whole():
            self._waited_for = False
            return pickle.loads(self.ranks.broadcast(pickle.dumps(said)))

    def _answered(self, brought: list[bytes]) -> list[_Message]:
        """Let all ranks know what all bring, from rank 0."""
        different = {part: k for k, part in enumerate(dict.fromkeys(brought))}  # mostly all bring the same
        return self._all(self._word("parts", (list(different), [different[part] for part in brought]))[1])

    @staticmethod
    def _all(parts: tuple[list[bytes], list[int]]) -> list[_Message]:
        different, which = parts
        return [pickle.loads(different[k]) for k in which]

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Remember where a rank has gone, that nobody is told of it."""
        try:
            yield
        except BaseException as broken:
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
    # Rank 0 alone solves what follows: processors differ in a last bit that may decide something. The others begin the
    # same work, so that its first pass needs no word, and from then on make those that rank 0 asks for.

    def passed(self, passes: Any, name: str, arguments: tuple[Any, ...], add: bool) -> list[NDArray[np.float64]]:
        """Make a pass with all ranks, see `robustkern.contract.rows.Source.passed`."""
        asked = pickle.dumps((name, arguments, add))
        if self._solving and self._known is not None:
            raise self._known  # once more: a rule has gone on after it
        if self._begun is not None:
            raise _Begun
        if self._solving and self._waited_for:
            self._word("pass", asked)
        mine = self._made(passes, name, arguments)
        large = add and self._is_large(mine)
        brought = ("a pass", None, (asked, None if large else mine))
        if not self._solving:
            if name == "write_pass" and self._all_well(not mine[0]):  # the rest is for an Info
                self.handed_out = True
                return [mine]
            parts = self._judged(self._told(brought))
            return [self.ranks.total(mine)] if large else [part for _, _, (_, part) in parts]
        if self.ranks.rank:
            self._bring(brought)
            self._begun = mine
            raise _Begun
        parts = self._alike(brought)
        if any(what != asked for _, _, (what, _) in parts):  # somebody began with another one, or with none
            self._word("pass", asked)
            parts = self._alike(brought)
        if large:
            self._word("sum", None)
            self._waited_for = True
            return [self.ranks.total(mine)]
        return [part for _, _, (_, part) in parts]

    def hand_out(self, results: Callable[[bool], bool], decided: bool) -> None:
        """Have all ranks' results go to all with the word whether all is well, instead of an exchange after writing.

        For calls without an Info, for which more would have to be added up.

        Parameters
        ----------
        results : callable
            Sends what is written, with a word; returns whether all ranks' words are good. It is called once.
        decided : bool
            Whether there is nothing to solve, and no exchange before the writing.
        """
        self._hand_out, self._decided = results, decided

    def _all_well(self, here: bool) -> bool:
        """Hand results out where that is next; tell whether all is well everywhere."""
        if self._hand_out is None or not self._decided:
            return False
        hand_out, self._hand_out = self._hand_out, None
        with self._whole():
            return hand_out(here)

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
        if self.ranks.size == 1:
            return work()
        self._solving, self._known = True, None
        try:
            found = self._outcome(self._served(work, passes) if self.ranks.rank else self._solved(work))
        finally:
            self._solving = False
        self._decided = True
        return found  # type: ignore[no-any-return]

    def _solved(self, work: Callable[[], Any]) -> Any:
        """Do the work on rank 0."""
        outcome: Any
        try:
            outcome = (work(), None)
        except Exception as error:
            outcome = (None, _Sent.of(error))
        try:
            told = pickle.dumps(outcome)
        except Exception as error:
            unsent = TypeError(
                f"what rank 0 found cannot go to the other ranks: {error} (return arrays and numbers only)"
            )
            outcome = (None, _Sent.of(unsent))
            told = pickle.dumps(outcome)
        if self._known is not None:  # whatever the rule has made of it
            raise self._known
        if not self._waited_for:
            self._alike(("a pass", None, (None, None)))
        self._word("done", told)
        return outcome

    def _alike(self, message: _Message) -> list[_Message]:
        """Return on rank 0 what all bring to its pass, and leave them waiting; raise, all, where anything is wrong."""
        brought = self._brought(message)
        parts: list[_Message] = [pickle.loads(part) for part in brought]
        if any(error is not None or step != message[0] for step, error, _ in parts):
            self._judged(self._answered(brought))
        return parts

    def _served(self, work: Callable[[], Any], passes: Any) -> Any:
        """Begin the work elsewhere, make the passes that rank 0 asks for, and return its outcome."""
        try:
            if passes is not self._behind:
                self._behind = passes
                work()
        except (_Begun, Exception):  # rank 0's counts
            pass
        if self._known is not None:
            raise self._known
        mine, self._begun = self._begun, None
        if mine is None:
            self._bring(("a pass", None, (None, None)))
        while True:
            kind, what = self._word()
            if kind == "done":
                return pickle.loads(what)
            if kind == "parts":
                self._judged(self._all(what))
            elif kind == "sum":
                assert mine is not None
                self.ranks.total(mine)
            else:
                name, arguments, add = pickle.loads(what)
                mine = self._made(passes, name, arguments)
                self._bring(("a pass", None, (what, None if add and self._is_large(mine) else mine)))

    def _outcome(self, outcome: tuple[Any, _Sent | None]) -> Any:
        result, sent = outcome
        if sent is not None:
            self._known = error = sent.error()
            raise error
        return result


class _Sent(NamedTuple):
    """An error on its way to other processes, and what it says for those that do not know it."""

    data: bytes
    text: str

    @classmethod
    def of(cls, error: Exception) -> _Sent:
        """Return what goes."""
        text = f"{type(error).__name__}: {error}"
        try:
            return cls(pickle.dumps(error), text)
        except Exception:
            return cls(b"", text)

    def error(self) -> Exception:
        """Return the error, or one that says the same."""
        try:
            found = pickle.loads(self.data)
        except Exception:
            found = None
        return found if isinstance(found, Exception) else RuntimeError(self.text)


class _Begun(BaseException):
    """The first pass is made; what rank 0 makes of it, only rank 0 goes on to."""


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
    last : bool
        Whether the call is over, with nothing more to be exchanged, when all have written the result.
    """

    def __init__(
        self, together: Together, inner: Source, d: int, dtypes: set[np.dtype[Any]], last: bool = False
    ) -> None:
        self._inner, self._together, self._last = inner, together, last
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
        self._together.settled = self._together.handed_out = False
        return self._inner.results()

    def row_name(self, row: int) -> str:
        """Return how an error should call a row."""
        return self._inner.row_name(row)

    def passed(self, passes: Any, name: str, arguments: tuple[Any, ...], add: bool) -> list[NDArray[np.float64]]:
        """Make a pass with all ranks; after the last one nothing has gone wrong with what was written."""
        found = self._together.passed(passes, name, arguments, add)
        self._together.settled = self._last and name == "write_pass" and not any(part[0] for part in found)
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
