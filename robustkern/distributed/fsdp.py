"""Fully sharded models (FSDP2): gradients are combined by a rule where FSDP reduces and scatters them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from numpy.typing import ArrayLike
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.tensor import DTensor

from robustkern.distributed.group import Group, padded, share_out
from robustkern.distributed.ranks import Asked, call
from robustkern.distributed.sharded import agreed, combine_shards, raise_after_backward
from robustkern.distributed.together import Together
from robustkern.engine import Info, limits
from robustkern.rules.base import Aggregator, as_aggregator

__all__ = ["RobustFSDP", "robust_fsdp"]


class RobustFSDP(ReduceScatter):
    """What combines the gradients of a sharded model, see `robust_fsdp`; it is FSDP's reduce-scatter.

    Attributes
    ----------
    info : Info or None
        With `return_info` what was found out about the last gradient, or module's; the same on all ranks. Its d counts
        the zeros with which FSDP fills up shards.
    """

    def __init__(self, model: torch.nn.Module, asked: Asked, whole: bool, group: Any) -> None:
        self.asked, self.whole = asked, whole
        self.info: Info | None = None
        self._model, self._group = model, group
        self._kept: list[tuple[Tensor, Tensor]] = []

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return memory for FSDP."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Spread the columns of one module's gradient, and combine them now or keep them for the whole."""
        ranks = Group(group)
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        rows = received.view(ranks.size, -1)
        if self.whole:
            output_tensor.zero_()
            self._kept.append((output_tensor, rows))
            return
        try:
            output_tensor.copy_(self._combined(ranks, [rows], [rows.numel()])[0])
        except Exception as error:
            raise_after_backward(error, [output_tensor])

    def _combined(
        self,
        ranks: Group,
        shards: list[Tensor],
        columns: list[int],
        check: Callable[[], None] | None = None,
        rows: list[Tensor] | None = None,
    ) -> list[Tensor]:
        def work(together: Together) -> tuple[list[Tensor], Info | None]:
            if check is not None:
                check()
            return combine_shards(together, ranks, shards, columns, self.asked, rows=rows)

        found: tuple[list[Tensor], Info | None] = call(ranks, work)
        self.info = found[1]
        return found[0]

    def over_replicas(self, shard: Tensor) -> None:
        """Combine a shard over replicas of the model, in place: FSDP's hook after its reduce-scatter."""
        ranks = Group(self._group)
        flat = padded([shard], ranks.size)
        received = torch.empty_like(flat)
        share_out(flat, received, ranks)
        try:
            self._combined(ranks, [received.view(ranks.size, -1)], [shard.numel()], rows=[flat])
        except Exception as error:
            raise_after_backward(error, [shard])
            return
        shard.copy_(received[: shard.numel()].view_as(shard))

    def finish(self) -> Info | None:
        """Combine the whole gradient, after ``backward`` and before the optimizer's step.

        Returns
        -------
        Info or None
            With `return_info` what was found out.

        Raises
        ------
        RuntimeError
            If there is nothing to combine.
        NonFiniteError, TypeError, ValueError
            As `robustkern.aggregate`, on all ranks.
        """
        kept, self._kept = self._kept, []
        if not kept and Group(self._group).size == 1:  # FSDP hands over nothing
            return None
        if not kept:
            raise RuntimeError("robust_fsdp: there is no gradient to combine (call finish once after each backward)")
        rows = [each for _, each in kept]
        check = functools.partial(self._require_views, [output for output, _ in kept])
        results = self._combined(Group(self._group), rows, [x.numel() for x in rows], check)
        for (output, _), result in zip(kept, results, strict=True):
            output.copy_(result)
        return self.info

    def _require_views(self, outputs: list[Tensor]) -> None:
        """Raise where FSDP's gradients are not in the memory that it handed over."""
        held = [_local(p.grad) for p in self._model.parameters() if p.grad is not None]
        places = {gradient.untyped_storage().data_ptr() for gradient in held}
        if any(output.untyped_storage().data_ptr() not in places for output in outputs):
            raise RuntimeError(
                "robust_fsdp: gradients were converted, added to others, or moved since they were reduced (with "
                "whole=True call finish after each backward pass and zero_grad(set_to_none=True) before it, accumulate "
                "under set_requires_gradient_sync(False), and let MixedPrecisionPolicy's reduce_dtype be that of the "
                "parameters)"
            )


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def robust_fsdp(
    model: torch.nn.Module,
    rule: Aggregator | str,
    /,
    *,
    f: int | None = None,
    delta: float | None = None,
    weights: ArrayLike | None = None,
    seed: int | None = None,
    whole: bool = False,
    return_info: bool = False,
    replicas: Any = None,
) -> RobustFSDP:
    """Have a model under ``fully_shard`` combine its gradients by a rule, instead of averaging them; on all ranks.

    Parameters
    ----------
    model : torch.nn.Module
        After ``fully_shard`` of it and its parts over one mesh dimension; each rank is one row.
    rule, f, delta, weights, seed
        As for `robustkern.aggregate`; n is the number of ranks.
    whole : bool
        Whether the rule judges the whole gradient: then ``finish()`` of what is returned must be called after each
        backward pass. By default it judges each module's by itself, as it comes: the same guarantee, and half of the
        bytes of an all_reduce.
    return_info : bool
        Whether to keep an `Info` of each gradient, at the cost of one more message.
    replicas : ProcessGroup, optional
        Of the ranks that hold the same shard, one of each replica of the model, where ``fully_shard`` was given only
        the mesh dimension within a replica: a replica, such as a node, is then one row, within which gradients are
        averaged as usual.

    Returns
    -------
    RobustFSDP
        With what was found out.

    Raises
    ------
    TypeError, ValueError
        If the model has no sharded module, or the rule measures from a centre, or the whole is asked of replicas.
    """
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not modules:
        raise TypeError("robust_fsdp: no module of the model is sharded (call fully_shard first)")
    group = replicas if replicas is not None else _group_of(modules[-1])

    def made() -> Asked:
        plan = as_aggregator(rule)
        if "centre" in plan.points:
            raise ValueError(f"robust_fsdp: {plan} measures from a centre, which shards have not (take another rule)")
        if whole and replicas is not None:
            raise ValueError("robust_fsdp: over replicas each module is judged by itself (drop whole=True)")
        limits(plan, Group(group).size, str, f, delta, weights)  # before a backward pass begins
        return Asked(plan, f, delta, weights, seed, return_info=return_info)

    asked = agreed(Group(group), made, {"whole": str(whole)})
    reduce = RobustFSDP(model, asked, whole, group)
    for module in modules:
        if replicas is not None:
            module.set_all_reduce_hook(reduce.over_replicas)
            continue
        module.set_custom_reduce_scatter(reduce)
        module.set_gradient_divide_factor(1.0)  # a rule averages by itself
        module.set_force_sum_reduction_for_comms(True)
    return reduce


def _group_of(module: torch.nn.Module) -> Any:
    """Return the ranks over which a module's parameters are sharded."""
    sharded = [p for p in module.parameters() if isinstance(p, DTensor)]
    if sharded and sharded[0].device_mesh.ndim > 1:
        raise ValueError(
            "robust_fsdp: the model is sharded over a mesh of several dimensions (give fully_shard the one within a "
            "replica, mesh['shard'], and pass replicas=mesh.get_group('replicate') here)"
        )
    return sharded[0].device_mesh.get_group() if sharded else None
