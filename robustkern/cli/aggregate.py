"""``robustkern aggregate``."""

from __future__ import annotations

import math
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

import robustkern
from robustkern.cli.console import Wrong, bar, command, print_json
from robustkern.cli.options import Json, TolerateOption, file_to_write, rule_of
from robustkern.cli.report import facts, print_workers
from robustkern.cli.rules import Import
from robustkern.errors import ConvergenceWarning, NonFiniteError
from robustkern.files import FileError, aggregate_files, expand
from robustkern.rules import Aggregator, available_rules

__all__ = ["aggregate"]

SUFFIXES = (".safetensors", ".npz", ".npy")


@command(extra="cli")
def aggregate(
    updates: Annotated[
        list[Path], typer.Argument(help="One safetensors, npz or npy file a worker; directories are searched.")
    ],
    out: Annotated[Path, typer.Option(help="Where the result goes; its suffix decides the kind.")],
    rule: Annotated[str, typer.Option(help=f"Such as 'nnm | ctma(median)', of {', '.join(available_rules())}.")] = (
        "ctma(geometric_median)"
    ),
    own: Import = None,
    f: TolerateOption = None,
    delta: Annotated[float | None, typer.Option(help="Instead of --f: their share (of --weights).")] = None,
    weights: Annotated[str | None, typer.Option(help="Weights of the workers: 1,1,0.5,...")] = None,
    centre: Annotated[Path | None, typer.Option(help="A file like the updates, for rules that need one.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of what the rule draws. Default: fresh.")] = None,
    backend: Annotated[str, typer.Option(help="auto, cpp, numba or reference.")] = "auto",
    as_json: Json = False,
) -> None:
    """Aggregate update files into one.

    Files are read tensor by tensor: memory is bounded by the largest tensor
    times the number of files. The output appears complete or not at all.
    """
    plan = rule_of(rule)
    shares = _weights(weights)
    file_to_write(out, "out", SUFFIXES)
    files = expand(updates)
    if out.exists() and any(path.exists() and out.samefile(path) for path in files):
        raise Wrong(f"--out: {out}: is one of the updates, which are never overwritten")
    options: dict[str, Any] = {"f": f, "delta": delta, "weights": shares, "seed": seed, "backend": backend}
    point = None if centre is None else np.zeros(1, dtype=np.float32)
    _check(plan, len(files), options | {"centre": point})
    started = time.perf_counter()
    with bar("reading", 1, of_bytes=True) as shown:
        try:
            info = aggregate_files(
                files,
                plan,
                out=out,
                centre=centre,
                **options,
                progress=lambda phase, done, total: shown.show(done, phase, total),
            )
        except ValueError as error:  # what `_check` could not know: such as a backend that lacks a dtype
            if isinstance(error, (FileError, NonFiniteError)):
                raise
            raise Wrong(str(error)) from None
    seconds = time.perf_counter() - started
    if as_json:
        print_json(facts(info, files, out, seconds))
    else:
        print_workers(info, files, out, seconds)


def _weights(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise Wrong(f"--weights: expected numbers with commas between, such as 1,1,0.5; got {text!r}") from None


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
