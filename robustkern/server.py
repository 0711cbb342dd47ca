"""A server that keeps between rounds what a rule needs: its last result, the workers' last rows, and their counts.

Of stale rows it keeps the inner products too, so that an arrival costs one read of the rows and not all products.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from robustkern.engine import Info
from robustkern.errors import brief
from robustkern.functions import NonFinite, Patterns, Scope, Through, aggregate, aggregate_untraced
from robustkern.inputs.trees import PLAIN
from robustkern.kept import KeptProducts
from robustkern.rules.base import Aggregator, as_aggregator
from robustkern.scalars import as_float, as_int

__all__ = ["Server"]

_VERSION = 1


class Server:
    """Combine the updates of round after round, of all workers or of those who are there.

    Parameters
    ----------
    rule : rule object or str
        As for `aggregate`. A rule that measures from a centre gets the last round's result.
    f, delta, only, exclude, scope, dtype, nonfinite, backend
        As for `aggregate`; of the rows that a round combines.
    weights : {"counts"} or None
        "counts" weighs each worker by how many updates it has sent so far, this one included: asynchronous training
        (Dahan & Levy, "Weight for Robustness", NeurIPS 2024).
    absent : {"forget", "stale"}
        What becomes of workers who send nothing in a round: they are no rows, or their last row stands for them, as
        delayed momentum and asynchronous servers have it.
    momentum : float
        Share of a worker's row in its next one, ``row = momentum * row + (1 - momentum) * update``, in [0, 1); 0 keeps
        none. A worker's first update is its row, and so is one after a row that holds NaN or Inf.
    centre : like one update, optional
        The first round's, for rules that measure from one.
    seed : int, optional
        Of what the rule draws, another for each round; by default fresh randomness.

    Attributes
    ----------
    rounds : int
        How many there were.
    counts : dict
        How many updates each worker has sent.

    Raises
    ------
    TypeError, ValueError
        If a parameter is of the wrong kind or value.

    Notes
    -----
    Rows stand in the order of their workers, ascending, whoever came first. A round that raises changes nothing, and
    threads that share a server wait for each other. With momentum or stale rows the server keeps a copy of each
    worker's row: n updates in memory. Reads are those of `aggregate`, one more of the updates that are kept, and with
    momentum two more.

    With 32 stale rows and more, rules that judge by distances between rows take inner products only of the rows that
    are new since the last result (up to a quarter of them, in one read of all rows); those of the others stay, about a
    centre that is one more row in memory, and are float64. Not with ``scope="leaf"``, and not for rules that measure
    from the origin or a centre, which make all their passes.

    Examples
    --------
    >>> import numpy as np, robustkern as rk
    >>> server = rk.Server("ctma(median)", f=1, absent="stale")
    >>> server.aggregate([np.zeros(2), np.ones(2), np.full(2, 2.0)], workers=["a", "b", "c"])
    array([0.5, 0.5])
    >>> server.aggregate([np.full(2, 3.0)], workers=["a"])  # b and c are where they were
    array([2.5, 2.5])
    >>> again = rk.Server("ctma(median)", f=1, absent="stale")
    >>> again.load_state_dict(server.state_dict())
    >>> again.counts
    {'a': 2, 'b': 1, 'c': 1}
    """

    def __init__(
        self,
        rule: Aggregator | str,
        /,
        *,
        f: int | None = None,
        delta: float | None = None,
        weights: Literal["counts"] | None = None,
        absent: Literal["forget", "stale"] = "forget",
        momentum: float = 0.0,
        centre: Any = None,
        seed: int | None = None,
        only: Patterns = None,
        exclude: Patterns = None,
        scope: Scope = "update",
        dtype: Any = None,
        nonfinite: NonFinite = "error",
        backend: str = "auto",
    ) -> None:
        self.rule = as_aggregator(rule)
        if weights is not None and not (isinstance(weights, str) and weights == "counts"):
            raise ValueError(f"Server: weights must be None or 'counts' (or pass them to aggregate); got {weights!r}")
        if weights is not None and not self.rule.supports_weights:
            raise ValueError(f"Server: {self.rule} takes no weights (drop weights='counts')")
        if f is not None and delta is not None:
            raise ValueError(f"Server: pass f or delta, not both; got f={f}, delta={delta}")
        if not isinstance(absent, str) or absent not in ("forget", "stale"):
            raise ValueError(f"Server: absent must be 'forget' or 'stale'; got {absent!r}")
        kept, first_seed = as_float(momentum), as_int(seed)
        if kept is None or not 0 <= kept < 1:
            raise ValueError(f"Server: momentum must be a number in [0, 1); got {brief(momentum)}")
        if seed is not None and (first_seed is None or first_seed < 0):
            raise ValueError(f"Server: seed must be None or an integer of at least 0; got {brief(seed)}")
        self._measures = "centre" in self.rule.points
        if self._measures != (centre is not None):
            raise ValueError(
                f"Server: {self.rule} measures from a centre, the first of which is missing (pass centre=, such as "
                "zeros like one update)"
                if self._measures
                else f"Server: centre is given, but {self.rule} measures from none (drop centre=)"
            )
        self._leaves: dict[str, Any] = {"only": only, "exclude": exclude, "dtype": dtype}
        self._limits, self._scope, self._nonfinite = (f, delta), scope, nonfinite
        self._weights, self._absent, self._momentum, self._seed = weights, absent, kept, first_seed
        self._backend = backend
        self.rounds = 0
        self.counts: dict[Hashable, int] = {}
        self._rows: dict[Hashable, Any] = {}
        self._centre = None if centre is None else self._copy(centre)
        self._keeps_products = absent == "stale" and scope == "update" and not self.rule.points
        self._products = KeptProducts()
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles have: all but the lock."""
        with self._lock:
            return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take it, with a lock of its own."""
        vars(self).update(state)
        self._lock = threading.RLock()

    def add(self, updates: Any, /, *, workers: Sequence[Any] | None = None) -> None:
        """Take updates that arrive between two results, where stale rows are kept; see `aggregate`.

        Raises
        ------
        TypeError, ValueError
            As `aggregate`; an update that does not fit the others is refused by the next result only, or replaced.
        """
        if self._absent != "stale":
            raise ValueError("Server: add is for servers that keep rows (pass absent='stale', or updates to aggregate)")
        with self._lock:
            names = self._checked(updates, workers)
            rows = self._rows | {name: self._row(name, updates[i]) for i, name in enumerate(names)}
            self.counts, self._rows = self._counted(names), rows

    def aggregate(
        self,
        updates: Any = (),
        /,
        *,
        workers: Sequence[Any] | None = None,
        weights: ArrayLike | None = None,
        delta: float | None = None,
        return_info: bool = False,
    ) -> Any:
        """Combine one round's updates into one.

        Parameters
        ----------
        updates : array of shape (k, ...), sequence of k arrays, or sequence of k pytrees of arrays
            Of the workers who are there; none where stale rows are all that is combined.
        workers : sequence of int or of str, optional
            Who sent them, each once; by default 0 to k-1.
        weights : array_like of shape (k,), optional
            Of the updates, where the server has none and keeps no stale rows.
        delta : float, optional
            In this round, instead of the server's own f or delta.
        return_info : bool
            Also return an `Info`, whose rows are the round's, in the order of their workers.

        Returns
        -------
        one update
            As `aggregate`.

        Raises
        ------
        TypeError, ValueError, NonFiniteError, BackendUnavailable
            As `aggregate`; and where workers are no distinct integers or texts, one for each update.
        """
        with self._lock:
            result, info = self._aggregated(updates, workers, weights, delta)
        return (result, info) if return_info else result

    def _aggregated(
        self, updates: Any, workers: Sequence[Any] | None, weights: ArrayLike | None, delta: float | None
    ) -> tuple[Any, Info]:
        names = self._checked(updates, workers)
        if weights is not None and (self._weights is not None or self._absent == "stale"):
            raise ValueError("Server: weights= is for servers without weights of their own and without stale rows")
        counts = self._counted(names)
        keeps = self._momentum > 0 or self._absent == "stale"
        known = self._rows | {name: self._row(name, updates[i]) for i, name in enumerate(names)} if keeps else {}
        order = sorted(known if self._absent == "stale" else names)
        at = {name: i for i, name in enumerate(names)}
        rows = updates
        if keeps:
            rows = [known[name] for name in order]
        elif order != names:
            rows = [updates[at[name]] for name in order]
        if self._weights is not None:
            weights = [counts[name] for name in order]
        elif weights is not None:
            shares = np.asarray(weights)
            weights = shares[[at[name] for name in order]] if shares.shape == (len(names),) else shares
        limits = self._limits if delta is None else (None, delta)
        only, exclude, dtype = (None, None, None) if keeps else self._leaves.values()
        seed = None if self._seed is None else _seed_of(self._seed, self.rounds)
        options = (only, exclude, self._scope, dtype, self._nonfinite, None, self._backend, True)
        through = (self._through(rows),) if self._keeps_products else ()
        result, info = aggregate_untraced(rows, self.rule, *limits, weights, self._centre, seed, *options, *through)
        if self._measures:
            self._centre = aggregate([result], "mean", backend=self._backend)
        self.counts, self._rows, self.rounds = counts, known, self.rounds + 1
        return result, info

    def _checked(self, updates: Any, workers: Sequence[Any] | None) -> list[Any]:
        if isinstance(updates, (str, bytes, Mapping)) or not hasattr(updates, "__len__"):
            raise TypeError(f"updates is {type(updates).__name__}; expected an array of rows, or a list of updates")
        names = list(range(len(updates))) if workers is None else list(workers)
        kinds = {int if isinstance(name, (int, np.integer)) else type(name) for name in names}
        if not kinds <= {int} and not kinds <= {str}:
            raise TypeError(f"workers must be all integers or all texts; got {', '.join(k.__name__ for k in kinds)}")
        if kinds == {int}:
            names = [int(name) for name in names]
        if len(set(names)) != len(names) or len(names) != len(updates):
            raise ValueError(
                f"workers must be distinct, one for each update; got {len(names)} ({len(set(names))} of them distinct) "
                f"for {len(updates)} updates"
            )
        known = next(iter(self.counts), None)
        if known is not None and names and type(known) is not type(names[0]):
            raise TypeError(
                f"workers must be {type(known).__name__} as in earlier rounds; got {type(names[0]).__name__}"
            )
        return names

    def _counted(self, names: list[Any]) -> dict[Hashable, int]:
        return self.counts | {name: self.counts.get(name, 0) + 1 for name in names}

    def _through(self, rows: list[Any]) -> Through:
        """Return what has inner products kept, of rows that are the server's own."""
        return lambda source, _leaf="": self._products.source(source, rows, source.form)

    def _copy(self, update: Any) -> Any:
        return aggregate([update], "mean", backend=self._backend, **self._leaves)

    def _row(self, name: Hashable, update: Any) -> Any:
        """Return a worker's next row, in memory of its own."""
        last = self._rows.get(name)
        if self._momentum == 0 or last is None or not _is_finite(last, self._backend):
            return self._copy(update)
        if any(choice is not None for choice in self._leaves.values()):
            update = self._copy(update)  # which has the leaves that take part, in the dtype
        if hasattr(update, "shape"):
            return self._mixed(update, last)
        import optree

        # Settings and epochs are those of the update. Another order of keys, or another structure, the next line tells.
        with contextlib.suppress(ValueError):
            last = optree.tree_map(lambda new, old: new if type(new) in PLAIN else old, update, last)
        return self._mixed(update, last)

    def _mixed(self, update: Any, last: Any) -> Any:
        return aggregate([update, last], "mean", weights=[1 - self._momentum, self._momentum], backend=self._backend)

    # -- between processes -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what the coming rounds depend on; its arrays are the server's own and must not be changed."""
        with self._lock:
            # This server and that of the state take the same products in the next round.
            self._products = KeptProducts()
            return {
                "version": _VERSION,
                "rule": str(self.rule),
                "rounds": self.rounds,
                "counts": dict(self.counts),
                "rows": dict(self._rows),
                "centre": self._centre,
            }

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Go on as the server whose state it is: with the same parameters to the last bit, unless randomness is fresh.

        Raises
        ------
        TypeError, ValueError
            If it is no such state, or that of another rule.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be what state_dict returned; got {type(state).__name__}")
        missing = {"version", "rule", "rounds", "counts", "rows", "centre"} - state.keys()
        if missing:
            raise ValueError(f"state lacks {', '.join(sorted(missing))} (pass what state_dict returned)")
        if state["version"] != _VERSION or state["rule"] != str(self.rule):
            raise ValueError(
                f"state is of version {state['version']!r} and rule {state['rule']!r}; this server has version "
                f"{_VERSION} and rule {str(self.rule)!r}"
            )
        rounds, counts = state["rounds"], dict(state["counts"])
        if not isinstance(rounds, int) or rounds < 0 or not all(isinstance(k, int) and k > 0 for k in counts.values()):
            raise ValueError("state holds rounds or counts that are no positive integers")
        kinds = sorted({type(name).__name__ for name in counts})
        if kinds not in ([], ["int"], ["str"]):
            raise TypeError(
                f"state holds workers of {', '.join(kinds)}; expected all integers or all texts (pass what state_dict "
                "returned)"
            )
        if (state["centre"] is None) == self._measures or not counts.keys() >= dict(state["rows"]).keys():
            raise ValueError("state holds a centre too many or too few, or rows of workers without a count")
        with self._lock:
            self.rounds, self.counts, self._rows = rounds, counts, dict(state["rows"])
            self._products = KeptProducts()
            self._centre = state["centre"]


def _seed_of(seed: int, round_: int) -> int:
    """Return another seed for each round."""
    return int(np.random.SeedSequence([seed, round_]).generate_state(1, np.uint64)[0])


def _is_finite(update: Any, backend: str) -> bool:
    info: Info = aggregate([update], "mean", backend=backend, return_info=True)[1]
    return not info.nonfinite_rows
