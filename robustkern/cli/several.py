"""What ``robustkern aggregate`` leaves to several processes: checkpoint folders (torchrun), and files (Dask)."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from robustkern.cli.console import Wrong, bar, print_json
from robustkern.cli.report import facts, print_workers
from robustkern.cli.supervisor import launched_rank
from robustkern.engine import Info
from robustkern.files import Pool, Weights, find_workers
from robustkern.files.workers import Worker, natural
from robustkern.rules import Aggregator

__all__ = ["combine_in_pool", "combine_on_ranks", "for_ranks", "refuse"]


def _is_one(path: Path) -> bool:
    return os.path.isfile(path / ".metadata") and any(path.glob("*.distcp"))


def for_ranks(updates: Sequence[Path], out: Path, bad: str) -> Pool | None:
    """Return the workers that ranks of torch.distributed combine, None where this process does it.

    Checkpoint folders of torch.distributed, which paths are, or which a single folder holds (where bad ones count, most
    of them); and all else that several processes of torchrun are asked for.
    """
    folders = _folders_of(updates, bad)
    if folders is not None:
        return Pool(tuple(Worker(path.name, path) for path in folders), False)
    return None if launched_rank() is None else find_workers(updates, out, bad)


def _folders_of(updates: Sequence[Path], bad: str) -> list[Path] | None:
    if len(updates) == 1 and os.path.isdir(updates[0]) and not _is_one(updates[0]):
        inside = [path for path in updates[0].iterdir() if not path.name.startswith(".")]
        updates = sorted((path for path in inside), key=lambda path: natural(path.name))
        if not updates:
            return None
    ones = sum(map(_is_one, updates))
    enough = 2 * ones > len(updates) if bad == "count" else ones == len(updates)
    return list(updates) if len(updates) > 1 and enough else None


def combine_on_ranks(pool: Pool, plan: Aggregator, out: Path, options: dict[str, Any], as_json: bool) -> None:
    """Combine checkpoints, each rank of torchrun its part; rank 0 says what came of it.

    Parameters
    ----------
    pool : Pool
        The workers.
    plan, out, options
        As for `robustkern.distributed.aggregate_checkpoints`.
    as_json : bool
        Whether machines read it.
    """
    import torch.distributed as dist

    from robustkern.distributed import aggregate_checkpoints

    rank = launched_rank()
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        if rank is not None:
            dist.init_process_group("gloo")
            # Its threads, if they lived at the process's end, would abort it now and then.
            stack.callback(dist.destroy_process_group)
        info = aggregate_checkpoints([worker.path for worker in pool.workers], plan, out=out, **options)
    info = _named(info, [str(worker.path) for worker in pool.workers], pool)
    seconds = time.perf_counter() - started
    if rank:
        return
    _tell(info, pool, out, seconds, as_json)


def combine_in_pool(
    pool: Pool, plan: Aggregator, out: Path, address: str | None, options: dict[str, Any], as_json: bool
) -> None:
    """Combine files on a Dask cluster.

    Parameters
    ----------
    pool, plan, out, options
        As for `robustkern.distributed.dask_aggregate`; one file a worker.
    address : str or None
        Of the cluster; None: one of processes on this machine.
    as_json
        As for `combine_on_ranks`.
    """
    usable = [worker for worker in pool.workers if worker.wrong is None]
    several = next((worker for worker in usable if len(worker.files) != 1), None)
    if several is not None:
        raise Wrong(f"{several.name}: has {len(several.files)} files; with --processes and --dask a worker is one file")
    from distributed import Client

    from robustkern.distributed import dask_aggregate

    paths = [str(worker.path if worker.wrong is not None else worker.files[0]) for worker in pool.workers]
    started = time.perf_counter()
    with contextlib.ExitStack() as stack, bar("reading", 1) as shown:
        client = None
        if address is not None:
            try:
                client = stack.enter_context(Client(address, timeout=30))  # type: ignore[no-untyped-call]
            except ValueError as error:
                raise Wrong(f"--dask: expected an address such as tcp://host:8786; got {address!r} ({error})") from None
        info = dask_aggregate(
            paths, plan, out=str(out), client=client, progress=lambda name, done, total: shown.show(done, name, total),
            **options,
        )  # fmt: skip
    _tell(_named(info, paths, pool), pool, out, time.perf_counter() - started, as_json)


def _named(info: Info, paths: Sequence[str], pool: Pool) -> Info:
    """Call bad updates by their workers' names."""
    names = {path: worker.name for path, worker in zip(paths, pool.workers, strict=True)}
    return replace(info, bad={names[path]: reason for path, reason in info.bad.items()})


def refuse(others: dict[str, Any], what: str) -> None:
    """Raise where options were given that go with files in one process only."""
    given = ", ".join(f"--{name}" for name, was in others.items() if was)
    if given:
        raise Wrong(f"{given}: not with {what}")


def _tell(info: Info, pool: Pool, out: Path, seconds: float, as_json: bool) -> None:
    if as_json:
        print_json(facts(info, pool, Weights(), out, seconds))
    else:
        print_workers(info, pool, Weights(), out, seconds)
