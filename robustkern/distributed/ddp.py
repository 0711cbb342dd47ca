"""A communication hook for DistributedDataParallel: gradients are combined by a rule instead of averaged.

``model.register_comm_hook(DDPState("ctma(geometric_median)", f=1), ddp_hook)``. Each rank's gradient is one row.
"""

# torch reads the annotations of a hook, so they are not postponed here.

from typing import Any, NamedTuple

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.distributed import GradBucket  # type: ignore[attr-defined]

from robustkern.distributed.group import Group, padded, share_out
from robustkern.distributed.ranks import Asked, call
from robustkern.distributed.sharded import agreed, combine_shards, raise_after_backward
from robustkern.distributed.together import Together
from robustkern.engine import Info, limits
from robustkern.rules.base import Aggregator, as_aggregator

__all__ = ["DDPState", "ddp_hook"]


class _Sent(NamedTuple):
    """A bucket whose columns are on their way."""

    future: torch.futures.Future[Tensor]
    work: Any
    rows: Tensor
    flat: Tensor  # which must live until it is sent
    d: int
    parameters: list[Tensor]  # whose gradients are in it, one after the other


class DDPState:
    """What `ddp_hook` needs, and keeps between buckets; to be made on all ranks, which compare what it asks for.

    Parameters
    ----------
    rule : rule object or str
        As for `robustkern.aggregate`; one that measures from a centre takes the last combined gradient, at first zeros.
    f, delta, weights, seed
        As for `robustkern.aggregate`; n is the number of ranks.
    per_bucket : bool
        Whether the rule judges each bucket by itself, as soon as all ranks have it, instead of the whole gradient after
        the last one. The guarantee is the same; a rank is judged by each bucket alone, and which parameters share one
        is DDP's to say, and changes after the first step.
    return_info : bool
        Whether to keep an `Info` of each gradient, at the cost of one more message.
    group : ProcessGroup, optional
        DDP's; by default all ranks.

    Attributes
    ----------
    info : Info or None
        With `return_info` what was found out about the last gradient, or bucket; the same on all ranks.
    """

    def __init__(
        self,
        rule: Aggregator | str,
        /,
        *,
        f: int | None = None,
        delta: float | None = None,
        weights: ArrayLike | None = None,
        seed: int | None = None,
        per_bucket: bool = False,
        return_info: bool = False,
        group: Any = None,
    ) -> None:
        def asked() -> Asked:
            plan = as_aggregator(rule)
            limits(plan, self.ranks.size, str, f, delta, weights)  # before a backward pass begins
            if per_bucket and "centre" in plan.points:
                raise ValueError(f"DDPState: {plan} measures from a centre, which buckets lack (per_bucket=False)")
            return Asked(plan, f, delta, weights, seed, return_info=return_info)

        self.ranks = Group(group)
        self.asked = agreed(self.ranks, asked, {"per_bucket": str(per_bucket)})
        self.per_bucket = per_bucket
        self.info: Info | None = None
        self._sent: list[_Sent] = []
        self._pass = -1  # which backward pass the last bucket 0 was of
        self._unnumbered = False  # whether all buckets of this pass are called 0
        self._measures = "centre" in self.asked.rule.points
        self._centre: dict[Tensor, Tensor] = {}  # by parameter: DDP makes other buckets after the first step

    def take(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Send one bucket's columns on their way; with the last one, combine what has come."""
        buffer = bucket.buffer()
        if bucket.index() == 0:
            # With static_graph=True torch calls all buckets of the first pass 0, and none of them the last.
            before, self._pass = self._pass, torch._C._current_graph_task_id()
            self._unnumbered = before >= 0 and self._pass == before
            if not self._unnumbered:
                self._sent = []  # of a backward pass that did not end
        flat = padded([buffer], self.ranks.size)
        received = torch.empty_like(flat)
        work = share_out(flat, received, self.ranks, asynchronous=True)
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        self._sent.append(
            _Sent(future, work, received.view(self.ranks.size, -1), flat, buffer.numel(), bucket.parameters())
        )
        if self._unnumbered:
            for each in self._sent:
                self._finish([each])
            self._sent = []
        elif bucket.is_last() or self.per_bucket:
            sent, self._sent = self._sent, []
            self._finish(sent)
        return future

    def _finish(self, sent: list[_Sent]) -> None:
        """Combine buckets, or have the backward pass raise when it has ended."""
        try:
            self._combine(sent)
        except Exception as error:
            raise_after_backward(error, [each.rows for each in sent])
            for each in sent:
                each.future.set_result(each.rows.view(-1)[: each.d])

    def _combine(self, sent: list[_Sent]) -> None:
        """Combine the buckets, and fulfil their futures; all collectives are made here, in the order of the buckets."""
        for each in sent:
            each.work.wait()
        shards = [each.rows for each in sent]
        columns = [each.d for each in sent]
        rows = [each.flat for each in sent]

        def work(together: Together) -> Any:
            if self._unnumbered and self._measures:
                raise ValueError(
                    f"DDPState: {self.asked.rule} measures from a centre, which the buckets lack that torch makes of "
                    "the first gradient with static_graph=True, one for each dtype (drop static_graph=True, or have "
                    "all parameters of one dtype)"
                )
            centre = [self._centre_of(each) for each in sent] if self._measures else None
            return combine_shards(together, self.ranks, shards, columns, self.asked, centre, rows)

        _, self.info = call(self.ranks, work)
        for each in sent:
            full = each.rows.view(-1)
            if self._measures:
                parts = torch.split(full[: each.d].clone(), [p.numel() for p in each.parameters])
                self._centre |= dict(zip(each.parameters, parts, strict=True))
            each.future.set_result(full[: each.d])

    def _centre_of(self, sent: _Sent) -> Tensor:
        """Return this rank's columns of what the last gradient was combined to, for one bucket."""
        parts = [self._centre.get(p, p.new_zeros(p.numel())).to(sent.flat.dtype) for p in sent.parameters]
        width = sent.rows.shape[1]
        return padded(parts, self.ranks.size)[self.ranks.rank * width :][:width]


def ddp_hook(state: DDPState, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """Combine gradients by a rule: for ``DistributedDataParallel.register_comm_hook(state, ddp_hook)``.

    Columns are spread while the backward pass goes on (all_to_all); the rule runs when the last bucket has come, and
    the result is collected (all_gather): the bytes of DDP's own all_reduce. Under ``no_sync`` DDP calls no hook, and
    the rule sees the accumulated gradient. With ``static_graph=True`` and parameters of several dtypes the first
    gradient is judged dtype by dtype, as torch does not say which bucket is the last. Beside it work DDP's wrappers
    that compress: ``fp16_compress_wrapper(ddp_hook)``, and where torch takes it (not on gloo)
    ``bf16_compress_wrapper(ddp_hook)``.

    Parameters
    ----------
    state : DDPState
        One for each model.
    bucket : GradBucket
        Of this rank's gradients.

    Returns
    -------
    Future of tensor
        The combined gradient of the bucket: the rule's result, not divided by anything.

    Raises
    ------
    NonFiniteError, TypeError, ValueError
        As `robustkern.aggregate`, on all ranks, when the backward pass has ended: gradients are NaN then, and the next
        step works.
    """
    if not isinstance(state, DDPState):
        raise TypeError(
            f"ddp_hook: the state is {type(state).__name__}; expected a DDPState (pass it to register_comm_hook: "
            "model.register_comm_hook(DDPState(rule, f=1), ddp_hook))"
        )
    return state.take(bucket)
