"""``robustkern lora``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from robustkern.cli.console import command, note, print_json, print_table
from robustkern.cli.options import BadFiles, BadFilesOption, Json, TolerateOption, rule_of
from robustkern.cli.rules import Import
from robustkern.errors import plain

__all__ = ["lora"]


@command(extra="cli")
def lora(
    adapters: Annotated[
        list[Path], typer.Argument(help="Folders with adapter_config.json and adapter_model.safetensors, one a worker.")
    ],
    out: Annotated[Path, typer.Option(help="A new folder for the combined adapter.")],
    rule: Annotated[str, typer.Option(help="Built on distances and averages: krum, ctma, geometric_median, ...")] = (
        "ctma(geometric_median)"
    ),
    own: Import = None,
    f: TolerateOption = None,
    bad_files: BadFilesOption = BadFiles.error,
    as_json: Json = False,
) -> None:
    """Combine LoRA adapters of one model, of any ranks, by their products; the ranks of those with weight add up."""
    from robustkern.adapters.peft import aggregate_lora_folders

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        shares = aggregate_lora_folders(adapters, rule_of(rule), f=f, out=out, bad=bad_files.value)
    for warning in told:
        note(str(warning.message))
    if as_json:
        weights = dict.fromkeys(map(str, adapters), 0.0)
        for path, share in zip(adapters, shares.tolist(), strict=True):
            weights[str(path)] += share  # one that is named again has none then
        print_json({"rule": rule, "out": str(out), "weights": weights})
        return
    rows = [[plain(str(path), 80), f"{share:.4f}"] for path, share in zip(adapters, shares, strict=True)]
    print_table(f"{rule}: {plain(str(out), 80)}", ["adapter", "weight"], rows, numbers=["weight"])
