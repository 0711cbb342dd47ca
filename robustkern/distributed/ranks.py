"""The ranks of torch.distributed: columns sharded over them, or one row on each."""

from __future__ import annotations

import functools
import hashlib
import itertools
import pickle
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from array_api_compat import is_torch_array
from numpy.typing import ArrayLike
from torch import Tensor
from torch.distributed.tensor import DTensor

from robustkern.contract.rows import Source
from robustkern.distributed.dtensors import local_parts
from robustkern.distributed.group import Group, Messages, all_gather, as_sent, padded, share_out
from robustkern.distributed.together import Part, Ranks, Together, digest_of, require_alike
from robustkern.engine import solved_alone
from robustkern.errors import brief, plain
from robustkern.functions import NonFinite, Patterns, Scope, aggregated
from robustkern.inputs.arrays import array_view, check_dtype, name_of
from robustkern.inputs.memory import MemorySource
from robustkern.rules.base import Aggregator, as_aggregator
from robustkern.untraced import DYNAMO, untraced

__all__ = ["Asked", "Collecting", "aggregate", "aggregate_gradients", "aggregate_rows", "call"]


Function = TypeVar("Function", bound=Callable[..., Any])


def _untraced(function: Function) -> Function:
    """Have a function left alone by torch's compiler, to which messages between ranks are nothing it knows."""

    @functools.wraps(function)
    def called(*given: Any, **options: Any) -> Any:
        alone = untraced(function) if DYNAMO in sys.modules else function
        return alone(*given, **options)

    return cast(Function, called)


def call(ranks: Ranks, work: Callable[[Together], Any]) -> Any:
    """Do something that all ranks do, so that an error of one is an error of all."""
    with Together(ranks) as together:
        return work(together)


class Asked(NamedTuple):
    """What a call asks for, alike on all ranks; see `robustkern.aggregate`."""

    rule: Aggregator
    f: int | None
    delta: float | None
    weights: Any
    seed: int | None
    nonfinite: NonFinite = "error"
    return_info: bool = False

    def told(self) -> dict[str, str]:
        """Return what the ranks compare."""
        return {name: digest_of(value) if name == "weights" else str(value) for name, value in self._asdict().items()}


@_untraced
def aggregate(
    local_columns: Any,
    rule: Aggregator | str,
    /,
    *,
    f: int | None = None,
    delta: float | None = None,
    weights: ArrayLike | None = None,
    centre: Any = None,
    seed: int | None = None,
    only: Patterns = None,
    exclude: Patterns = None,
    scope: Scope = "update",
    dtype: Any = None,
    nonfinite: NonFinite = "error",
    out: Any = None,
    backend: str = "auto",
    return_info: bool = False,
    group: Any = None,
) -> Any:
    """Combine n updates whose columns are sharded over the ranks; each rank returns its own columns.

    Parameters
    ----------
    local_columns : array of shape (n, ...), sequence of n arrays, or sequence of n pytrees of arrays
        As for `robustkern.aggregate`: what this rank holds of each row, which may be nothing (arrays of size 0). Every
        column belongs to one rank; a leaf that several hold counts as often. In a sequence leaves may be DTensors,
        sharded over all of these ranks, alike in all rows.
    rule, f, delta, weights, seed, only, exclude, scope, dtype, nonfinite
        As for `robustkern.aggregate`, the same on all ranks. With ``scope="leaf"`` all ranks hold parts of the same
        leaves.
    centre, out
        As for `robustkern.aggregate`, this rank's columns of them.
    return_info : bool
        As for `robustkern.aggregate`, the same on all ranks.
    backend : str
        As for `robustkern.aggregate`; ranks may differ.
    group : ProcessGroup, optional
        By default all ranks.

    Returns
    -------
    one update
        This rank's columns, DTensors where row 0's are; with `return_info` a pair of them and an `Info`, the same on
        all ranks.

    Raises
    ------
    TypeError, ValueError, NonFiniteError, BackendUnavailable
        As `robustkern.aggregate`; and where the ranks do not call for the same, or a DTensor is not sharded over all of
        them. An error on one rank is raised on all.
    RuntimeError
        If there is no process group, or a rank has left it: within the group's timeout.

    Notes
    -----
    The reads of `robustkern.aggregate`, of a rank's own columns. To rank 0 go a Gram for each pass that takes one (n x
    n float64; from 64 KB on it is added up in parts by all ranks) and a few messages of 4 KB, and from it as many to
    all. Rank 0 alone solves what follows from them, so that bits do not depend on processors, and has the others make
    the passes that it needs. Results are those of one process, to the last bit where the rule selects rows or columns,
    and within a rounding or two of the rows' largest numbers where weights follow from the Gram.

    Hostile inputs on honest ranks are survived; a rank that lies about the columns it owns is not, see
    docs/distributed.md.

    Examples
    --------
    >>> import torch.distributed as dist  # doctest: +SKIP
    >>> dist.init_process_group("gloo")  # doctest: +SKIP
    >>> mine = aggregate(shard_of_all_rows, "ctma(geometric_median)", f=2)  # doctest: +SKIP
    """

    def work(together: Together) -> Any:
        asked = Asked(as_aggregator(rule), f, delta, weights, seed, nonfinite, return_info)
        told = asked.told() | {"scope": str(scope), "only": str(only), "exclude": str(exclude), "dtype": str(dtype)}
        rows, layouts = local_parts(local_columns, together.ranks)
        point, target = (None if x is None else local_parts([x], together.ranks)[0][0] for x in (centre, out))

        def through(source: MemorySource, leaf: str = "") -> Source:
            return Part.of(together, source, told | {"leaf": brief(leaf)})

        found = aggregated(
            rows, asked.rule, f, delta, weights, point, seed, only, exclude, scope, dtype, nonfinite, target,
            backend, return_info, through,
        )  # fmt: skip
        result, info = found if return_info else (found, None)
        result = layouts.spread(result) if out is None else out
        everywhere = together.exchange("the end", 0 if info is None else info.integers)
        together.settled = True
        return result if info is None else (result, replace(info, integers=sum(everywhere)))

    return call(Group(group), work)


# ---- one row on each rank --------------------------------------------------------------------------------------------


class _Piece(NamedTuple):
    """Floating-point leaves of one dtype, end to end, and how they are shared out.

    Attributes
    ----------
    leaves : list of int
        Which.
    flat : (ranks * width,) tensor
        Their values, and zeros behind.
    width : int
        Columns of a rank, of which the last ranks may have fewer.
    d : int
        Columns that are values.
    """

    leaves: list[int]
    flat: Tensor
    width: int
    d: int

    def count(self, rank: int) -> int:
        """Return how many columns a rank has."""
        return max(min(self.width, self.d - rank * self.width), 0)

    def parts(self, row: _Row, full: Tensor) -> dict[int, Tensor]:
        """Return the leaves of a whole row that lies end to end, by number, in the same memory."""
        found, at = {}, 0
        for k in self.leaves:
            shape = row.tensors[k].shape
            found[k] = full[at : at + shape.numel()].view(shape)
            at += shape.numel()
        return found


class Collecting(NamedTuple):
    """Columns that become results, in the same memory: of each rank's row this rank's, then of the result each rank's.

    Results go out with the word whether all is well, where nobody asks for more. That saves an exchange, which at 1e6
    numbers and four ranks on two cores is a tenth of a call.

    Attributes
    ----------
    ranks : Group
    rows : list of (ranks * width,) tensors
        This rank's, which stay.
    columns : list of (ranks * width,) tensors
        What `share_out` makes of them.
    spare : list of (width,) tensors
        Room for results: nothing may fail between messages.
    """

    ranks: Group
    rows: list[Tensor]
    columns: list[Tensor]
    spare: list[Tensor]

    @classmethod
    def of(cls, ranks: Group, rows: list[Tensor], columns: list[Tensor]) -> Collecting:
        """Make it ready."""
        return cls(ranks, rows, columns, [x.new_empty(x.numel() // ranks.size) for x in columns])

    @property
    def results(self) -> list[Tensor]:
        """Where this rank's go: in the place of the columns that it has in its own row."""
        return [self._parts(x)[self.ranks.rank] for x in self.columns]

    def of_rank(self, rank: int) -> list[Tensor]:
        """Return this rank's columns of another rank's row, or its own."""
        return [self._parts(x)[rank] for x in (self.rows if rank == self.ranks.rank else self.columns)]

    def _parts(self, x: Tensor) -> Tensor:
        return x.view(self.ranks.size, -1)

    def begin(self, together: Together, asked: Asked) -> None:
        """Have it done when results are written; to be called before anything may fail on one rank, as others wait."""
        if self.ranks.size > 1 and asked.nonfinite == "error" and not asked.return_info and self._first is not None:
            together.hand_out(self._with_a_word, solved_alone(asked.rule))

    def end(self, together: Together) -> None:
        """Do it now, unless it is done; raise where anything has gone wrong with any rank."""
        together.settle()
        if not together.handed_out:
            self._collect()

    @property
    def _first(self) -> int | None:
        return next((k for k, x in enumerate(self.columns) if x.numel()), None)

    def _with_a_word(self, well: bool) -> bool:
        """Collect results, of which those that begin with NaN may say that something is wrong; tell whether none do.

        Where one does, the columns are there again.
        """
        first = self._first
        assert first is not None
        if not well:
            self.results[first][:1] = torch.nan
        self._collect()
        if not self._parts(self.columns[first])[:, 0].isnan().any():
            return True
        for row, columns, result, spare in zip(self.rows, self.columns, self.results, self.spare, strict=True):
            spare.copy_(result)
            share_out(row, columns, self.ranks)
            result.copy_(spare)
        return False

    def _collect(self) -> None:
        """Collect results: in main memory each goes straight to all others.

        gloo's all_gather, which goes round the ring, takes 1.4 times as long at 1e6 numbers of four ranks, and 2.5 to 3
        times at 1e7 and above.
        """
        if not self.ranks.direct:
            for result, full in zip(self.results, self.columns, strict=True):
                all_gather(as_sent(full), as_sent(result), group=self.ranks.group)
            return
        work = Messages()
        for full in filter(torch.numel, self.columns):
            parts = self._parts(full)
            work += [self.ranks.take(parts[other], other) for other in reversed(self.ranks.others)]
            work += [self.ranks.send(parts[self.ranks.rank], other) for other in self.ranks.others]
        work.wait()


class _Later(NamedTuple):
    """A row that is made in the call, so that an error in it is an error of all ranks."""

    make: Callable[[], Any]


@_untraced
def aggregate_rows(
    my_row: Any,
    rule: Aggregator | str,
    /,
    *,
    f: int | None = None,
    delta: float | None = None,
    weights: ArrayLike | None = None,
    centre: Any = None,
    seed: int | None = None,
    nonfinite: NonFinite = "error",
    backend: str = "auto",
    return_info: bool = False,
    group: Any = None,
) -> Any:
    """Combine the updates of all ranks, one row on each; every rank returns the result.

    Parameters
    ----------
    my_row : array, or pytree of arrays
        This rank's update: NumPy or torch, of the same structure, shapes and dtypes on all ranks. A tensor that is
        there under two names counts twice.
    rule, f, delta, seed, nonfinite
        As for `robustkern.aggregate`, the same on all ranks; n is the number of ranks.
    weights : array_like of shape (ranks,), optional
        Of all rows, the same on all ranks: a rank that said its own weight could say any.
    centre : like one update, optional
        For rules that measure from one, the same on all ranks.
    return_info, backend, group
        As for `aggregate`.

    Returns
    -------
    like `my_row`
        The same bits on all ranks; with `return_info` a pair of it and an `Info`.

    Raises
    ------
    TypeError, ValueError, NonFiniteError, BackendUnavailable, RuntimeError
        As `aggregate`; and where the rows are not alike.

    Notes
    -----
    Each rank sends and receives (ranks - 1) / ranks of a row twice, once to spread the columns (all_to_all) and once to
    collect the result: the bytes of a ring all_reduce, besides those of `aggregate`. Without an Info the result goes
    out with the word that all is well, a NaN for its first number where it is not: a mean that begins with NaN goes
    twice, as do the columns. Extra memory: a row, and one more where its leaves must be laid end to end.
    """
    ranks = Group(group)

    def work(together: Together) -> Any:
        asked = Asked(as_aggregator(rule), f, delta, weights, seed, nonfinite, return_info)
        row = my_row.make() if isinstance(my_row, _Later) else my_row
        return _rows(together, ranks, row, asked, centre, backend)

    return call(ranks, work)


def _rows(together: Together, ranks: Group, my_row: Any, asked: Asked, centre: Any, backend: str) -> Any:
    row = _Row.of(my_row, ranks)
    point = None if centre is None else _Row.of(centre, ranks)
    if point is not None:
        point.require_like(row)
    # All memory first: nothing may fail between what the ranks have agreed on and the messages that follow.
    pieces = row.pieces(ranks)
    received = [torch.empty_like(piece.flat) for piece in pieces]
    collecting = Collecting.of(ranks, [piece.flat for piece in pieces], received)
    elsewhere = row.require_everywhere(together, asked, ranks.device)
    for piece, target in zip(pieces, received, strict=True):
        share_out(piece.flat, target, ranks)
    integers = row.integers
    counted = {k: together.exchange("a counter", x.cpu().numpy()) for k, x in integers.items()}
    d = sum(piece.d for piece in pieces)
    collecting.begin(together, asked)

    def values_of(parts: Sequence[Tensor]) -> list[Tensor]:
        return [part[: piece.count(ranks.rank)] for piece, part in zip(pieces, parts, strict=True)]

    own: Any = [values_of(collecting.of_rank(rank)) for rank in range(ranks.size)]
    out = values_of(collecting.results)
    done: dict[int, Tensor] = {}  # results by the numbers of their leaves
    for k, x in integers.items():
        for one, part in zip(own, counted[k], strict=True):
            one.append(torch.from_numpy(part).to(x.device))
        done[k] = torch.empty_like(x)
        out.append(done[k])
    for piece, full in zip(pieces, received, strict=True):  # whose columns are not needed in the end
        done |= piece.parts(row, full)
    made = None if elsewhere else row.like(done)  # views of what the ranks' messages fill
    mine: Any = out
    at: Any = None if point is None else point.columns(ranks)
    if len(out) == 1 and not integers:  # which saves a fifth of what small calls take
        (mine,) = out
        own = [one[0] for one in own]
        at = None if at is None else at[0]

    def through(source: MemorySource, leaf: str = "") -> Source:
        return Part(together, source, d, source.dtypes, not asked.return_info)

    found = aggregated(
        own, asked.rule, asked.f, asked.delta, asked.weights, at, asked.seed, None, None, "update", None,
        asked.nonfinite, mine, backend, asked.return_info, through,
    )  # fmt: skip
    collecting.end(together)
    if elsewhere:
        together.settled = False
        made = row.like(done)
    return (made, found[1]) if asked.return_info else made


class _Row(NamedTuple):
    """One update, leaf by leaf.

    Attributes
    ----------
    leaves, tensors : list
        As they came; and as tensors where the ranks' messages go.
    names : list of str
        Of the leaves, for errors: keys that are not the same may be shown alike.
    structure : optree structure
    """

    leaves: list[Any]
    tensors: list[Tensor]
    names: list[str]
    structure: Any

    @classmethod
    def of(cls, update: Any, ranks: Group) -> _Row:
        """Return an update's leaves; raise where some are no arrays."""
        import optree

        paths, leaves, structure = optree.tree_flatten_with_path(update)
        names = [name_of(path) if path else "the update" for path in paths]
        tensors = [_tensor(leaf, plain(name, 60), ranks) for leaf, name in zip(leaves, names, strict=True)]
        return cls(leaves, tensors, names, structure)

    @property
    def layout(self) -> list[tuple[str, tuple[int, ...], str]]:
        """Name, shape and dtype of each leaf."""
        return [(name, tuple(x.shape), str(x.dtype)) for name, x in zip(self.names, self.tensors, strict=True)]

    @property
    def integers(self) -> dict[int, Tensor]:
        """The leaves of integers, by number."""
        return {k: x for k, x in enumerate(self.tensors) if not x.is_floating_point()}

    def require_like(self, row: _Row) -> None:
        """Raise where a centre is not like a row."""
        difference = _first_difference(self.layout, row.layout)
        if difference:
            raise ValueError(f"aggregate_rows: the centre is not like the row: {difference}")

    def require_everywhere(self, together: Together, asked: Asked, device: torch.device) -> bool:
        """Raise where the ranks ask for different things, or their rows are not alike.

        Returns
        -------
        bool
            Whether a rank's results must go elsewhere than where messages come.
        """
        digest = hashlib.sha256(pickle.dumps(self.layout)).hexdigest()
        elsewhere = any(x.device.type != device.type for x in self.leaves if is_torch_array(x))
        calls = together.exchange("a row", (digest, asked.told(), elsewhere))
        if any(theirs != calls[0][0] for theirs, _, _ in calls):
            layouts = together.exchange("the leaves", self.layout)
            rank = next(k for k, (theirs, _, _) in enumerate(calls) if theirs != calls[0][0])
            difference = _first_difference(layouts[rank], layouts[0])
            raise ValueError(f"aggregate_rows: the rows of ranks {rank} and 0 are not alike: {difference}")
        require_alike([told for _, told, _ in calls])
        return any(elsewhere for _, _, elsewhere in calls)

    def pieces(self, ranks: Group) -> list[_Piece]:
        """Return the floating-point leaves by dtype."""
        kinds: dict[torch.dtype, list[int]] = {}
        for k, x in enumerate(self.tensors):
            if x.is_floating_point():
                kinds.setdefault(x.dtype, []).append(k)
        made = []
        for leaves in kinds.values():
            flat = padded([self.tensors[k] for k in leaves], ranks.size)
            count = sum(self.tensors[k].numel() for k in leaves)
            made.append(_Piece(leaves, flat, flat.numel() // ranks.size, count))
        return made

    def columns(self, ranks: Group) -> list[Tensor]:
        """Return this rank's columns of a point that every rank has, then its integers."""
        found = []
        for piece in self.pieces(ranks):
            first = ranks.rank * piece.width
            found.append(piece.flat[first : first + piece.count(ranks.rank)])
        return [*found, *self.integers.values()]

    def like(self, done: dict[int, Tensor]) -> Any:
        """Return results by the numbers of their leaves as an update like this one."""
        import optree

        made = [_like(done[k], leaf) for k, leaf in enumerate(self.leaves)]
        return optree.tree_unflatten(self.structure, made)


def _first_difference(
    ours: list[tuple[str, tuple[int, ...], str]], theirs: list[tuple[str, tuple[int, ...], str]]
) -> str:
    for mine, other in itertools.zip_longest(ours, theirs):
        if mine != other:
            return " against ".join(
                "no further leaf" if one is None else f"leaf {plain(one[0], 60)} of {one[1]} {one[2]}"
                for one in (mine, other)
            )
    return ""


#: Dtypes of NumPy that torch's NumPy lacks, and integers of their size.
_BITS = {"bfloat16": torch.int16, "float8_e4m3fn": torch.int8, "float8_e5m2": torch.int8}


def _tensor(leaf: Any, name: str, ranks: Group) -> Tensor:
    """Return a leaf as a tensor where the ranks' messages go."""
    what = f"aggregate_rows: leaf {name}"
    if isinstance(leaf, DTensor):
        raise TypeError(
            f"{what} is a DTensor; expected this rank's whole update (pass x.full_tensor(), or all rows' DTensors to "
            "aggregate; a model under fully_shard has robust_fsdp)"
        )
    is_torch = is_torch_array(leaf)
    if not is_torch and not isinstance(leaf, (np.ndarray, np.generic)):
        raise TypeError(f"{what} is {type(leaf).__name__}; expected a NumPy array or a torch tensor")
    view = array_view(leaf.detach() if is_torch else leaf, what)
    if view.dtype.kind == "c":
        raise TypeError(f"{what} is complex (pass its real and its imaginary part as two leaves)")
    check_dtype(view.dtype, what, True, "torch" if is_torch else "numpy")
    x: Tensor
    if is_torch:
        x = leaf.detach().resolve_neg()
    else:
        assert isinstance(view, np.ndarray)
        if not (view.flags.c_contiguous and view.flags.writeable):  # torch takes no others without a warning
            view = np.array(view, order="C")
        bits = _BITS.get(view.dtype.name)
        x = torch.from_numpy(view if bits is None else view.view(f"i{view.itemsize}"))
        if bits is not None:
            x = x.view(getattr(torch, view.dtype.name))
    return x.to(ranks.device).contiguous()


def _like(x: Tensor, leaf: Any) -> Any:
    """Return a result as what the leaf was."""
    if is_torch_array(leaf):
        return x.to(leaf.device)
    dtype = np.asarray(leaf).dtype
    bits = _BITS.get(dtype.name)
    return x.cpu().numpy() if bits is None else x.cpu().view(bits).numpy().view(dtype)


@_untraced
def aggregate_gradients(parameters: Tensor | Iterable[Tensor], rule: Aggregator | str, /, **options: Any) -> Any:
    """Replace each rank's gradients by what the rule makes of all ranks': for training with estimates of one's own.

    Such as those of mu^2-SGD: ``with model.no_sync(): worker.step(closure)``, then this, then ``server.step()``, see
    `robustkern.training`. A model whose plain gradients are combined has `ddp_hook`.

    Parameters
    ----------
    parameters : iterable of tensor, or tensor
        The model's; of those that train, one without a gradient counts as one of zeros.
    rule, **options
        As for `aggregate_rows`.

    Returns
    -------
    None, or Info
        With ``return_info``.

    Raises
    ------
    TypeError, ValueError, NonFiniteError, RuntimeError
        As `aggregate_rows`; and where these are no parameters.
    """
    held: list[Tensor] = []

    def gradients() -> list[Tensor]:
        held.extend(p for p in _parameters(parameters) if p.requires_grad)
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in held]

    found = aggregate_rows(_Later(gradients), rule, **options)
    info = None
    if options.get("return_info"):
        found, info = found
    for p, gradient in zip(held, found, strict=True):
        p.grad = gradient
    return info


def _parameters(given: Any) -> list[Tensor]:
    """Return a model's parameters; raise where they are something else."""
    remedy = "(pass model.parameters())"
    if isinstance(given, torch.nn.Module) or not isinstance(given, Iterable):
        raise TypeError(f"aggregate_gradients: parameters is {type(given).__name__}; expected tensors {remedy}")
    found = [given] if isinstance(given, Tensor) else list(given)
    for k, p in enumerate(found):
        if not isinstance(p, Tensor):
            raise TypeError(f"aggregate_gradients: parameter {k} is {type(p).__name__}; expected a tensor {remedy}")
    return found
