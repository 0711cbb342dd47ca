"""``robustkern aggregate``."""

from __future__ import annotations

import contextlib
import math
import os
import re
import time
import warnings
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

import robustkern
from robustkern.cli.console import Wrong, bar, command, print_json, said
from robustkern.cli.options import BadFiles, BadFilesOption, Json, TolerateOption, file_to_write, rule_of, some
from robustkern.cli.report import facts, print_workers
from robustkern.cli.rules import Import
from robustkern.cli.several import combine_in_pool, combine_on_ranks, for_ranks, refuse
from robustkern.errors import ConvergenceWarning, NonFiniteError
from robustkern.files import (
    WRITTEN,
    FileError,
    Pool,
    aggregate_pool,
    check_target,
    find_workers,
    memory_of,
    named_weights,
    read_weights,
    touched,
)
from robustkern.inputs.leaves import Choice
from robustkern.rules import Aggregator, available_rules

__all__ = ["aggregate"]


class Scope(Enum):
    """What a rule is applied to."""

    update = "update"
    leaf = "leaf"


class NonFinite(Enum):
    """What rows that hold NaN or Inf are."""

    error = "error"
    drop = "drop"


@command(extra="cli")
def aggregate(
    updates: Annotated[
        list[Path],
        typer.Argument(
            help="One path a worker: a safetensors, npz or npy file, a torch file, or a folder with one update file or "
            "with shards and their index. A single folder holds one worker an entry. Checkpoint folders of "
            "torch.distributed are workers too; then --out is a new folder, or safetensors. torchrun may run the "
            "command on these and on safetensors: each process reads its part."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Where the result goes; its suffix decides the kind.")],
    rule: Annotated[str, typer.Option(help=f"Such as 'nnm | ctma(median)', of {', '.join(available_rules())}.")] = (
        "ctma(geometric_median)"
    ),
    own: Import = None,
    f: TolerateOption = None,
    delta: Annotated[float | None, typer.Option(help="Instead of --f: their share (of --weights).")] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="Weights of the workers: 1,1,0.5,... or name=1,... or a file of lines name=1, or JSON."),
    ] = None,
    weights_from: Annotated[
        str | None, typer.Option(help="Or the key of metadata with which updates say it, such as num_samples.")
    ] = None,
    cap_weights: Annotated[
        float | None,
        typer.Option(min=1, help="Cut each weight to so many times their median. With --weights-from 10 by default."),
    ] = None,
    centre: Annotated[Path | None, typer.Option(help="A file like the updates, for rules that need one.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of what the rule draws. Default: fresh.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Patterns of the tensors that take part: 'layer1.*'.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Patterns of tensors that take no part: '*.bn.*'.")] = None,
    base: Annotated[
        Path | None, typer.Option(help="The model before this round: supplies the tensors that take no part.")
    ] = None,
    scope: Annotated[Scope, typer.Option(help="The rule over whole updates, or leaf by leaf.")] = Scope.update,
    dtype: Annotated[str | None, typer.Option(help="Combine floats of any dtype in this one, such as float32.")] = None,
    nonfinite: Annotated[
        NonFinite, typer.Option(help="What updates with NaN or Inf are, more than f of them: an error, or left out.")
    ] = NonFinite.error,
    bad_files: BadFilesOption = BadFiles.error,
    memory: Annotated[str, typer.Option(help="Most memory for tensors; larger ones are read in pieces.")] = "1GiB",
    shard_size: Annotated[
        str | None, typer.Option(help="Write shards of at most so much, and their index: 5GB.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Read by so many processes of Dask, a block of all files at a time.")
    ] = None,
    dask: Annotated[str | None, typer.Option(help="Or by the workers of a Dask cluster: tcp://host:8786.")] = None,
    backend: Annotated[str, typer.Option(help="auto, cpp, numba or reference.")] = "auto",
    as_json: Json = False,
) -> None:
    """Aggregate update files into one.

    Files are read in pieces of bounded size, and may not change meanwhile. The
    output appears complete or not at all.
    """
    plan = rule_of(rule)
    with said("memory"):
        most = memory_of(memory)
    patterns: dict[str, Any] = {
        option: some(given, option, "patterns such as 'layer1.*'") or None
        for option, given in (("only", only), ("exclude", exclude))
    }
    options: dict[str, Any] = {"f": f, "delta": delta, "seed": seed, "backend": backend}
    files_only = {
        "weights-from": weights_from,
        "cap-weights": cap_weights,
        "centre": centre,
        "base": base,
        "scope": scope is Scope.leaf,
        "dtype": dtype,
    }
    if processes is not None or dask is not None:
        if processes is not None and dask is not None:
            raise Wrong("--processes and --dask: one of them says where the files are read (drop the other)")
        files_only |= {"nonfinite": nonfinite is NonFinite.drop, "shard-size": shard_size}
        refuse(files_only, "--processes and --dask (drop it, or them)")
        file_to_write(out, "out", (".safetensors", ".npy"))
        pool = find_workers(updates, out, bad_files.value)
        _check_out(out, pool)
        options["weights"] = _weights(weights, pool)
        _check(plan, len(pool.workers), options)
        more: dict[str, Any] = {"processes": processes, "bad": bad_files.value}
        with _understood():
            combine_in_pool(pool, plan, out, dask, options | patterns | more, as_json)
        return
    with said("shard-size"):
        shard = None if shard_size is None else memory_of(shard_size)
    on_ranks = for_ranks(updates, out, bad_files.value)
    if on_ranks is not None:
        refuse(
            files_only,
            "checkpoint folders of torch.distributed, or torchrun (drop it, or use one process and safetensors)",
        )
        options["weights"] = _weights(weights, on_ranks)
        _check(plan, len(on_ranks.workers), options)
        more = {"memory": most, "nonfinite": nonfinite.value, "shard_size": shard, "bad": bad_files.value}
        with _understood():
            combine_on_ranks(on_ranks, plan, out, options | patterns | more, as_json)
        return
    file_to_write(out, "out", WRITTEN)
    with said("dtype"):
        choice = Choice.of(**patterns, dtype=dtype)
    pool = find_workers(updates, out, bad_files.value)
    missing = next((path for path in updates if not os.path.exists(path)), None)
    if missing is not None and bad_files is BadFiles.error:  # before anything is said of their number
        raise FileError(f"{missing}: no such file or folder")
    n = len(pool.workers)
    _check_out(out, pool, *(path for path in (centre, base) if path is not None))
    shares = _weights(weights, pool)
    options["weights"] = shares
    point = None if centre is None else np.zeros(1, dtype=np.float32)
    _check(plan, n, options | {"centre": point})
    started = time.perf_counter()
    with bar("reading", 1, of_bytes=True) as shown, _understood():
        info, weighed = aggregate_pool(
            pool,
            plan,
            out=out,
            f=f,
            delta=delta,
            weights=shares if shares is None or pool.folder is False else dict(zip(_names(pool), shares, strict=True)),
            weights_from=weights_from,
            cap_weights=cap_weights,
            centre=centre,
            seed=seed,
            choice=choice,
            base=base,
            scope=scope.value,
            nonfinite=nonfinite.value,
            bad=bad_files.value,
            memory=most,
            shard_size=shard,
            backend=backend,
            progress=lambda phase, done, total: shown.show(done, phase, total),
        )
    seconds = time.perf_counter() - started
    if as_json:
        print_json(facts(info, pool, weighed, out, seconds))
    else:
        print_workers(info, pool, weighed, out, seconds)


@contextlib.contextmanager
def _understood() -> Iterator[None]:
    """Make an error of the command of what `_check` could not know, such as a backend that lacks a dtype."""
    try:
        yield
    except ValueError as error:
        if isinstance(error, (FileError, NonFiniteError)):
            raise
        raise Wrong(re.sub(r"^bad=", "--bad-files ", str(error))) from None


def _names(pool: Pool) -> list[str]:
    return [worker.name for worker in pool.workers]


def _check_out(out: Path, pool: Pool, *others: Path) -> None:
    """Raise where the result would replace something that is read."""
    inputs, folders = touched(pool)
    try:
        check_target(out, [*inputs, *others], folders)
    except FileError as error:
        raise Wrong(f"--out: {error}") from None


def _weights(text: str | None, pool: Pool) -> list[float] | None:
    """Read weights in the order of the workers, or by name, or from a file."""
    if text is None:
        return None
    wrong = f"--weights: expected numbers with commas between, such as 1,1,0.5, or name=1,...; got {text!r:.200}"
    try:
        if "=" in text and not os.path.isfile(text):
            pairs = [part.rpartition("=") for part in text.split(",")]
            named = {name.strip(): float(number) for name, _, number in pairs}
            if len(named) < len(pairs):
                raise Wrong("--weights: names a worker twice")
        elif os.path.isfile(text):
            named = read_weights(Path(text))
        else:
            listed_weights = [float(part) for part in text.split(",")]
            if pool.folder:
                raise Wrong(
                    "--weights: a list of numbers does not say which worker of a folder each is for (write name=1,..., "
                    "or a file of such lines, or --weights-from)"
                )
            return listed_weights
    except (ValueError, OSError) as error:
        raise Wrong(f"{wrong} ({error})" if "=" in str(error) or os.path.isfile(text) else wrong) from None
    with said("weights"):
        return named_weights(named, pool.workers)


def _check(plan: Aggregator, n: int, options: dict[str, Any]) -> None:
    """Raise where the options do not fit the rule and so many workers; n is known before any file is opened."""
    f, delta, weights = options["f"], options["delta"], options["weights"]
    if f is not None and delta is not None:
        raise Wrong(f"--f {f} --delta {delta:g}: one of them says it already")
    if f is not None and not 0 <= 2 * f < n:
        raise Wrong(f"--f {f}: must be at least 0, and 2 * f below the number of workers, {n}")
    if delta is not None and not 0 <= delta < 0.5:
        raise Wrong(f"--delta {delta:g}: must be at least 0 and below 0.5")
    if weights is not None:
        if len(weights) != n:
            raise Wrong(f"--weights has {len(weights)} numbers for {n} workers")
        if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
            raise Wrong("--weights must be finite, not negative, and not all 0")
        held = sum(sorted(weights)[n - f :]) / sum(weights) if f else 0.0
        if held >= 0.5:
            raise Wrong(
                f"--f {f}: the {f} heaviest of the {n} workers hold {held:.3g} of the weight, which is not below half "
                "(lower --f, lower or cap --weights, or use --delta, the share that may be Byzantine)"
            )
    wrong = _failure(plan, n, options)
    if wrong is None:
        return
    if f is None and delta is None and _failure(plan, n, options | {"f": 0}) is None:
        raise Wrong(f"--f is missing: {plan} must know how many of the {n} workers may be Byzantine (or --delta)")
    if weights is not None and _failure(plan, n, options | {"weights": None}) is None:
        raise Wrong(f"--weights: {plan} takes none ({wrong})")
    if (f or delta) and _failure(plan, n, options | {"f": 0, "delta": None}) is None:
        raise Wrong(f"{f'--f {f}' if f else f'--delta {delta:g}'}: too many of {n} workers for {plan} ({wrong})")
    raise Wrong(str(wrong))


def _failure(plan: Aggregator, n: int, options: dict[str, Any]) -> Exception | None:
    """Return what is wrong with options for a rule, as it says itself of n rows of one number."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            robustkern.aggregate(np.arange(n, dtype=np.float32).reshape(n, 1), plan, **options)
    except (ValueError, TypeError, robustkern.BackendUnavailable) as error:
        return error
    return None
