"""Rows and columns that lie with the ranks of torch.distributed, or with a pool of Dask workers.

Nothing is imported before it is used: ranks need torch, pools dask and fsspec.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robustkern.distributed.checkpoints import aggregate_checkpoints
    from robustkern.distributed.ddp import DDPState, ddp_hook
    from robustkern.distributed.fsdp import RobustFSDP, robust_fsdp
    from robustkern.distributed.pool import dask_aggregate
    from robustkern.distributed.ranks import aggregate, aggregate_gradients, aggregate_rows

__all__ = [
    "DDPState",
    "RobustFSDP",
    "aggregate",
    "aggregate_checkpoints",
    "aggregate_gradients",
    "aggregate_rows",
    "dask_aggregate",
    "ddp_hook",
    "robust_fsdp",
]

_WHERE = {
    "DDPState": "ddp",
    "RobustFSDP": "fsdp",
    "aggregate": "ranks",
    "aggregate_checkpoints": "checkpoints",
    "aggregate_gradients": "ranks",
    "aggregate_rows": "ranks",
    "dask_aggregate": "pool",
    "ddp_hook": "ddp",
    "robust_fsdp": "fsdp",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_WHERE[name]}")
    except ModuleNotFoundError as error:
        missing, extra = str(error.name).partition(".")[0], "dask" if _WHERE[name] == "pool" else "torch"
        raise ImportError(
            f"robustkern.distributed.{name} needs {missing} (pip install 'robustkern[{extra}]')"
        ) from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
