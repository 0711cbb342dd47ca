"""Mixed rows that torch's autograd records, for the adapters of frameworks that mix rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robustkern.functions import mix
from robustkern.rules import Mixer

__all__ = ["recorded_mix"]


def recorded_mix(x: Tensor, mixer: Mixer, f: int | None) -> Tensor:
    """Return what `robustkern.mix` makes of rows of shape (n, ...); gradients flow with the shares held constant.

    Right for mixers whose shares do not change with small changes of the rows: averages of some of them. A row without
    a share is not multiplied, since 0 times NaN is NaN, and mixed rows that are not finite pass no gradient on.
    """
    result: Tensor = _Mix.apply(x, mixer, f)  # type: ignore[no-untyped-call]
    return result


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mixer: Mixer, f: int | None) -> Tensor:
        mixed, info = mix(x.detach(), mixer, f=f, return_info=True)
        finite = mixed.reshape(len(mixed), -1).isfinite().all(dim=1)
        ctx.save_for_backward(torch.as_tensor(info.mixture, dtype=x.dtype, device=x.device)[finite], finite)
        result: Tensor = mixed
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        shares, finite = ctx.saved_tensors
        found = shares.T @ gradient[finite].reshape(len(shares), -1)
        return found.reshape(-1, *gradient.shape[1:]), None, None
