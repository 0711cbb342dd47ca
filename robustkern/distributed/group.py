"""Processes of torch.distributed: messages between them, and rows that are shared out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["FIRST", "Group", "Messages", "all_gather", "as_sent", "padded", "share_out"]

#: Bytes of a message that are sent at once with how many there are; what is longer takes a second step.
FIRST = 4096
#: Of results from rank to rank, so that nobody else's messages are taken for them; of what they exchange, one more.
TAG = 0x726F6275
#: Under its name before torch 2.13, too.
all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Messages(list[Any]):
    """Messages on their way."""

    def wait(self) -> None:
        """Return when all have come, or been sent; raise where a rank has gone."""
        for work in self:
            work.wait()


def _frame(payload: bytes) -> NDArray[np.uint8]:
    """Return bytes behind their number, `FIRST` of them at least."""
    data = np.zeros(max(FIRST, 8 + len(payload)), dtype=np.uint8)
    data[:8] = np.array([len(payload)], dtype=np.int64).view(np.uint8)
    data[8 : 8 + len(payload)] = np.frombuffer(payload, dtype=np.uint8)
    return data


def _length(head: NDArray[np.uint8]) -> int:
    """Return how long a frame is that begins so."""
    return max(FIRST, 8 + int(head[:8].view(np.int64)[0]))


def _payload(frame: NDArray[np.uint8]) -> bytes:
    return frame[8 : 8 + int(frame[:8].view(np.int64)[0])].tobytes()


class _Coming(NamedTuple):
    """The beginning of a frame that another rank sends, and the work that receives it."""

    head: Tensor
    other: int
    work: Any


class Group:
    """A process group, see `robustkern.distributed.together.Ranks`.

    Parameters
    ----------
    group : ProcessGroup, optional
        By default all ranks.

    Attributes
    ----------
    others : list of int
        The other ranks of the group, beginning behind this one.
    device : torch.device
        Where messages must be.

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
        self.others = [(self.rank + k) % self.size for k in range(1, self.size)]
        self._ends: Any = dist.group.WORLD if group is None else group
        backend = dist.get_backend(group)
        self.device = torch.device("cuda" if "nccl" in backend and "gloo" not in backend else "cpu")
        self._answer: list[_Coming] | None = None

    @property
    def direct(self) -> bool:
        """Whether messages go from rank to rank, as in main memory; else by collectives."""
        return self.device.type == "cpu"

    def gather(self, payload: bytes) -> list[bytes]:
        """Return on rank 0 what each rank brings."""
        if not self.direct:
            return self._each(payload)
        if self.rank:
            self._answer = self._coming([0])  # at once, so that rank 0 need not ask
            self._sent(payload, [0]).wait()
            return []
        try:
            return [payload, *self._received(self._coming(self.others))]
        except Exception:
            for other in self.others:  # who lives waits for a word
                with contextlib.suppress(Exception):
                    self._sent(b"", [other]).wait()
            raise

    def broadcast(self, payload: bytes) -> bytes:
        """Return what rank 0 says."""
        if not self.direct:
            return self._each(payload)[0]
        if self.rank:
            answer, self._answer = self._answer, None
            (payload,) = self._received(answer or self._coming([0]))
        else:
            self._sent(payload, self.others).wait()
        if not payload:
            raise RuntimeError("robustkern.distributed: a rank has gone, says rank 0")
        return payload

    def _each(self, payload: bytes) -> list[bytes]:
        """Return what each rank brings, to all: one all_gather of short messages, two of longer ones."""
        frame = _frame(payload)
        heads = self._gathered(frame[:FIRST])
        rest = np.zeros(max(_length(head) for head in heads) - FIRST, dtype=np.uint8)
        rest[: frame.size - FIRST] = frame[FIRST:]
        rests = self._gathered(rest) if rest.size else np.zeros((self.size, 0), dtype=np.uint8)
        return [_payload(np.concatenate(parts)) for parts in zip(heads, rests, strict=True)]

    def send(self, x: Tensor, other: int, tag: int = TAG) -> Any:
        """Send a tensor to a rank of the group: `torch.distributed.isend`, whose own Python takes as long as this."""
        return self._ends.send([as_sent(x)], other, tag)

    def take(self, x: Tensor, other: int, tag: int = TAG) -> Any:
        """Receive a tensor from a rank of the group, of the size that it sends."""
        return self._ends.recv([as_sent(x)], other, tag)

    def _sent(self, payload: bytes, to: Iterable[int]) -> Messages:
        """Send bytes to some of the others."""
        data = torch.from_numpy(_frame(payload))
        pieces = [piece for piece in (data[:FIRST], data[FIRST:]) if piece.numel()]
        return Messages(self.send(piece, other, TAG + 1) for other in to for piece in pieces)

    def _coming(self, others: Sequence[int]) -> list[_Coming]:
        """Return the frames that some of the others send."""
        heads = [torch.empty(FIRST, dtype=torch.uint8, device="cpu") for _ in others]
        return [_Coming(x, other, self.take(x, other, TAG + 1)) for x, other in zip(heads, others, strict=True)]

    def _received(self, coming: Sequence[_Coming]) -> list[bytes]:
        """Return the bytes of frames when they have come."""
        found = []
        for head, other, work in coming:
            work.wait()
            data = head.numpy()
            if _length(data) > FIRST:
                rest = torch.empty(_length(data) - FIRST, dtype=torch.uint8, device="cpu")
                self.take(rest, other, TAG + 1).wait()
                data = np.concatenate([data, rest.numpy()])
            found.append(_payload(data))
        return found

    def _gathered(self, mine: NDArray[Any]) -> NDArray[Any]:
        """Return (ranks, ...) arrays of one shape."""
        sent = torch.from_numpy(mine.reshape(-1)).to(self.device)
        got = torch.empty(self.size * mine.size, dtype=sent.dtype, device=self.device)
        all_gather(got, sent, group=self.group)
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


def share_out(flat: Tensor, received: Tensor, ranks: Group, *, asynchronous: bool = False) -> Any:
    """Send each rank its columns of this row; `received` becomes this rank's columns of all rows.

    Parameters
    ----------
    flat, received : (ranks * width,) tensor
        This rank's row; and a row of each rank's `width` columns after the other.
    ranks : Group
    asynchronous : bool
        Whether `received` is filled only when the work that is returned is done.
    """
    return dist.all_to_all_single(as_sent(received), as_sent(flat), group=ranks.group, async_op=asynchronous)


def as_sent(x: Tensor) -> Tensor:
    """Return a tensor as it is sent, in the same memory: float8, which collectives do not know, as bytes."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 and x.is_floating_point() else x


def padded(parts: Sequence[Tensor], ranks: int) -> Tensor:
    """Return tensors end to end, then zeros up to a multiple of the number of ranks; one that fits, as it is."""
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
