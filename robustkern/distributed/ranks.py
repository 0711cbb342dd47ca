"""The ranks of torch.distributed: columns sharded over them, or one row on each."""

from __future__ import annotations

import functools
import hashlib
import math
import pickle
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from array_api_compat import is_torch_array
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from robustkern.contract.rows import Source
from robustkern.distributed.together import Part, Ranks, Together, digest_of, require_alike
from robustkern.functions import NonFinite, Patterns, Scope, aggregated
from robustkern.rules.base import Aggregator, as_aggregator

__all__ = ["Group", "aggregate", "aggregate_gradients", "aggregate_rows", "asked_of", "call"]

#: Bytes of a message that are sent at once with how many there are; what is longer takes a second step.
FIRST = 4096
#: Up to so many bytes gloo's all_to_all, which sends to all at once, takes 0.9 ms where its all_gather, which sends
#: round the ring, takes 3.8 (four ranks on two cores).
SMALL = 1 << 16
# Their names before torch 2.13.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Group:
    """A process group, see `robustkern.distributed.together.Ranks`.

    Parameters
    ----------
    group : ProcessGroup, optional
        By default all ranks.

    Raises
    ------
    RuntimeError
        If there are none, or this process is not one of them.
    """

    def __init__(self, group: Any = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError("robustkern.distributed: there is no process group (call dist.init_process_group first)")
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise RuntimeError("robustkern.distributed: this process is no member of the group (call on members only)")
        backend = dist.get_backend(group)
        self.device = torch.device("cuda" if "nccl" in backend and "gloo" not in backend else "cpu")

    def exchange(self, payload: bytes) -> list[bytes]:
        """Return what each rank brings: one all_gather of small messages, two of larger ones."""
        head = FIRST - 8
        first = np.zeros(FIRST, dtype=np.uint8)
        first[:8] = np.array([len(payload)], dtype=np.int64).view(np.uint8)
        first[8 : 8 + min(len(payload), head)] = np.frombuffer(payload[:head], dtype=np.uint8)
        heads = self._gathered(first)
        sizes = heads[:, :8].copy().view(np.int64)[:, 0]
        longest = int(sizes.max())
        if longest <= head:
            return [part[8 : 8 + size].tobytes() for part, size in zip(heads, sizes, strict=True)]
        rest = np.zeros(longest - head, dtype=np.uint8)
        rest[: max(len(payload) - head, 0)] = np.frombuffer(payload[head:], dtype=np.uint8)
        rests = self._gathered(rest)
        parts = zip(heads, rests, sizes, strict=True)
        return [first[8 : 8 + size].tobytes() + rest[: max(size - head, 0)].tobytes() for first, rest, size in parts]

    def _gathered(self, mine: NDArray[Any]) -> NDArray[Any]:
        """Return (ranks, ...) arrays of one shape."""
        sent = torch.from_numpy(mine.reshape(-1)).to(self.device)
        got = torch.empty(self.size * mine.size, dtype=sent.dtype, device=self.device)
        if self.device.type == "cpu" and mine.nbytes <= SMALL:
            dist.all_to_all_single(got, sent.repeat(self.size), group=self.group)
        else:
            _all_gather(got, sent, group=self.group)
        return np.asarray(got.cpu().numpy().reshape(self.size, *mine.shape))

    def total(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the sum of arrays, of which each rank adds up a part, in the order of the ranks."""
        width = -(-x.size // self.size)
        sent = np.zeros(width * self.size)
        sent[: x.size] = x.reshape(-1)
        got = torch.empty(width * self.size, dtype=torch.float64, device=self.device)
        dist.all_to_all_single(got, torch.from_numpy(sent).to(self.device), group=self.group)
        parts = got.cpu().numpy().reshape(self.size, width)
        mine = parts[0].copy()
        for part in parts[1:]:
            mine += part
        return self._gathered(mine).reshape(-1)[: x.size].reshape(x.shape)


def call(ranks: Ranks, work: Callable[[Together], Any]) -> Any:
    """Do something that all ranks do, so that an error of one is an error of all."""
    with Together(ranks) as together:
        return work(together)


def asked_of(plan: Aggregator, f: Any, delta: Any, weights: Any, seed: Any, nonfinite: Any) -> dict[str, str]:
    """Return what all ranks must ask for alike."""
    return {
        "rule": str(plan),
        "f": str(f),
        "delta": str(delta),
        "weights": digest_of(weights),
        "seed": str(seed),
        "nonfinite": str(nonfinite),
    }


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
        column belongs to one rank; a leaf that several hold counts as often.
    rule, f, delta, weights, seed, only, exclude, scope, dtype, nonfinite
        As for `robustkern.aggregate`, the same on all ranks. With ``scope="leaf"`` all ranks hold parts of the same
        leaves.
    centre, out
        As for `robustkern.aggregate`, this rank's columns of them.
    backend, return_info
        As for `robustkern.aggregate`; ranks may differ in the backend.
    group : ProcessGroup, optional
        By default all ranks.

    Returns
    -------
    one update
        This rank's columns; with `return_info` a pair of them and an `Info`, the same on all ranks.

    Raises
    ------
    TypeError, ValueError, NonFiniteError, BackendUnavailable
        As `robustkern.aggregate`; and where the ranks do not call for the same. An error on one rank is raised on all.
    RuntimeError
        If there is no process group, or a rank has left it: within the group's timeout.

    Notes
    -----
    The reads of `robustkern.aggregate`, of a rank's own columns. Between ranks go a Gram for each pass that takes one
    (n x n float64, from 64 KB on once there and once back instead of to all) and a few messages of 4 KB. What follows
    from them is solved on rank 0, and its solution is every rank's: bits do not depend on processors. Results are those
    of one process, to the last bit where the rule selects rows or columns, and within a rounding where weights follow
    from the Gram.

    Hostile inputs on honest ranks are survived; a rank that lies about the columns it owns is not, see
    docs/distributed.md.

    Examples
    --------
    >>> import torch.distributed as dist  # doctest: +SKIP
    >>> dist.init_process_group("gloo")  # doctest: +SKIP
    >>> mine = aggregate(shard_of_all_rows, "ctma(geometric_median)", f=2)  # doctest: +SKIP
    """
    plan = as_aggregator(rule)

    def work(together: Together) -> Any:
        asked = asked_of(plan, f, delta, weights, seed, nonfinite) | {"scope": str(scope)}
        through = functools.partial(Part.of, together, asked=asked)
        return aggregated(
            local_columns, plan, f, delta, weights, centre, seed, only, exclude, scope, dtype, nonfinite, out, backend,
            return_info, through,
        )  # fmt: skip

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


def share_out(flat: Tensor, ranks: Group, *, asynchronous: bool = False) -> tuple[Tensor, Any]:
    """Send each rank its columns of this row; return this rank's columns of all rows, (ranks, width), and work.

    Parameters
    ----------
    flat : (ranks * width,) tensor
        This rank's row.
    ranks : Group
    asynchronous : bool
        Whether the tensor is filled when the work is done.
    """
    got = torch.empty_like(flat)
    work = dist.all_to_all_single(got, flat, group=ranks.group, async_op=asynchronous)
    return got.view(ranks.size, -1), work


def padded(parts: Sequence[Tensor], ranks: int) -> Tensor:
    """Return tensors end to end, with zeros up to a multiple of the number of ranks."""
    count = sum(part.numel() for part in parts)
    width = -(-count // ranks)
    if len(parts) == 1 and count == width * ranks:
        return parts[0].reshape(-1)
    flat = parts[0].new_empty(width * ranks)
    at = 0
    for part in parts:
        flat[at : at + part.numel()] = part.reshape(-1)
        at += part.numel()
    flat[at:] = 0
    return flat


def bring_together(mine: Tensor, full: Tensor, ranks: Group, *, asynchronous: bool = False) -> Any:
    """Collect all ranks' columns of the result in a (ranks * width,) tensor; return the work."""
    return _all_gather(full, mine, group=ranks.group, async_op=asynchronous)


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
        This rank's update: NumPy or torch, of the same structure, shapes and dtypes on all ranks.
    rule, f, delta, seed, nonfinite
        As for `robustkern.aggregate`, the same on all ranks; n is the number of ranks.
    weights : array_like of shape (ranks,), optional
        Of all rows, the same on all ranks: a rank that said its own weight could say any.
    centre : like one update, optional
        For rules that measure from one, the same on all ranks.
    backend, return_info, group
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
    collect the result (all_gather): the bytes of a ring all_reduce, besides those of `aggregate`. Extra memory: two
    rows and a result.
    """
    plan = as_aggregator(rule)
    ranks = Group(group)
    return call(ranks, lambda together: _rows(together, ranks, my_row, plan, f, delta, weights, centre, seed, nonfinite,
                                              backend, return_info))  # fmt: skip


def _rows(
    together: Together,
    ranks: Group,
    my_row: Any,
    plan: Aggregator,
    f: int | None,
    delta: float | None,
    weights: ArrayLike | None,
    centre: Any,
    seed: int | None,
    nonfinite: NonFinite,
    backend: str,
    return_info: bool,
) -> Any:
    import optree

    leaves, structure = optree.tree_flatten(my_row)
    tensors = [_tensor(leaf, ranks) for leaf in leaves]
    layout = [(tuple(x.shape), str(x.dtype)) for x in tensors]
    asked = {
        "the number of leaves": str(len(layout)),
        "the number of values": str(sum(math.prod(shape) for shape, _ in layout)),
        "the structure": hashlib.sha256(pickle.dumps((str(structure), layout))).hexdigest()[:8],
        **asked_of(plan, f, delta, weights, seed, nonfinite),
    }
    require_alike(together.exchange(asked))
    pieces = _pieces(tensors, ranks)
    columns: dict[str, Tensor] = {}
    received = [share_out(piece.flat, ranks)[0] for piece in pieces]
    results = [piece.flat.new_zeros(piece.width) for piece in pieces]
    for k, piece in enumerate(pieces):
        columns[f"piece {k}"] = received[k][:, : piece.count(ranks.rank)]
    integers = {f"leaf {k}": x for k, x in enumerate(tensors) if not x.is_floating_point()}
    for name, x in integers.items():
        others = together.exchange(x.cpu().numpy())
        columns[name] = torch.stack([torch.from_numpy(part) for part in others]).to(x.device)
    own = [{name: rows[i] for name, rows in columns.items()} for i in range(ranks.size)]
    out = {f"piece {k}": results[k][: piece.count(ranks.rank)] for k, piece in enumerate(pieces)}
    out |= {name: torch.empty_like(x) for name, x in integers.items()}
    point = None if centre is None else _columns_of(centre, structure, ranks, integers)
    d = sum(piece.d for piece in pieces)

    def through(source: Source) -> Source:
        return Part(together, source, d, source.dtypes)

    found = aggregated(
        own, plan, f, delta, weights, point, seed, None, None, "update", None, nonfinite, out, backend, return_info,
        through,
    )  # fmt: skip
    together.settle()
    done: list[Any] = [None] * len(leaves)
    for k, piece in enumerate(pieces):
        full = received[k].view(-1)  # whose columns are not needed any more
        bring_together(results[k], full, ranks)
        at = 0
        for leaf in piece.leaves:
            count = tensors[leaf].numel()
            done[leaf] = full[at : at + count].reshape(tensors[leaf].shape)
            at += count
    for name in integers:
        done[int(name.split()[1])] = out[name]
    made = optree.tree_unflatten(structure, [_like(x, leaf) for x, leaf in zip(done, leaves, strict=True)])
    return (made, found[1]) if return_info else made


def _tensor(leaf: Any, ranks: Group) -> Tensor:
    """Return a leaf as a tensor where the ranks' messages go."""
    if is_torch_array(leaf):
        x: Tensor = leaf.detach()
    elif isinstance(leaf, (np.ndarray, np.generic)):
        array = np.asarray(leaf)
        if array.dtype.name == "bfloat16":
            x = torch.from_numpy(np.ascontiguousarray(array).view(np.int16)).view(torch.bfloat16)
        else:
            x = torch.from_numpy(np.array(array, order="C"))
    else:
        raise TypeError(f"aggregate_rows: leaves must be NumPy or torch arrays; got {type(leaf).__name__}")
    if x.is_complex():
        raise TypeError("aggregate_rows: complex leaves are not taken (pass torch.view_as_real of them)")
    return x.to(ranks.device).contiguous()


def _like(x: Tensor, leaf: Any) -> Any:
    """Return a result as what the leaf was."""
    if is_torch_array(leaf):
        return x.to(leaf.device)
    if x.dtype == torch.bfloat16:
        return x.cpu().view(torch.int16).numpy().view(np.asarray(leaf).dtype)
    return x.cpu().numpy()


def _pieces(tensors: list[Tensor], ranks: Group) -> list[_Piece]:
    """Return the floating-point leaves by dtype."""
    kinds: dict[torch.dtype, list[int]] = {}
    for k, x in enumerate(tensors):
        if x.is_floating_point():
            kinds.setdefault(x.dtype, []).append(k)
    pieces = []
    for leaves in kinds.values():
        flat = padded([tensors[k] for k in leaves], ranks.size)
        count = sum(tensors[k].numel() for k in leaves)
        pieces.append(_Piece(leaves, flat, flat.numel() // ranks.size, count))
    return pieces


def _columns_of(centre: Any, structure: Any, ranks: Group, integers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return this rank's columns of a centre that every rank has."""
    import optree

    leaves, found = optree.tree_flatten(centre)
    if found != structure:
        raise ValueError("aggregate_rows: centre must have the structure of the rows")
    tensors = [_tensor(leaf, ranks) for leaf in leaves]
    columns = {}
    for k, piece in enumerate(_pieces(tensors, ranks)):
        first = ranks.rank * piece.width
        columns[f"piece {k}"] = piece.flat[first : first + piece.count(ranks.rank)]
    return columns | integers


def aggregate_gradients(parameters: Iterable[Tensor], rule: Aggregator | str, /, **options: Any) -> Any:
    """Replace each rank's gradients by what the rule makes of all ranks': for training with estimates of one's own.

    Such as those of mu^2-SGD: ``with model.no_sync(): worker.step(closure)``, then this, then ``server.step()``, see
    `robustkern.training`. A model whose plain gradients are combined has `ddp_hook`.

    Parameters
    ----------
    parameters : iterable of tensor
        The model's; a parameter without a gradient counts as one of zeros.
    rule, **options
        As for `aggregate_rows`.

    Returns
    -------
    None, or Info
        With ``return_info``.

    Raises
    ------
    TypeError, ValueError, NonFiniteError, RuntimeError
        As `aggregate_rows`.
    """
    held = list(parameters)
    own = [torch.zeros_like(p) if p.grad is None else p.grad for p in held]
    found = aggregate_rows(own, rule, **options)
    info = None
    if options.get("return_info"):
        found, info = found
    for p, gradient in zip(held, found, strict=True):
        p.grad = gradient
    return info
