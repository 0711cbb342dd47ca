"""``robustkern scaling``."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from robustkern.cli.console import CANNOT, Wrong, bar, command, fail, note, print_json, print_table
from robustkern.cli.options import RULES, Json, Rules, folder_to_write, names, numbers, rule_of, some
from robustkern.cli.rules import Import
from robustkern.contract.rows import DTYPES
from robustkern.measure import scaling as measured
from robustkern.measure.devices import DEVICES, Device, open_devices
from robustkern.measure.ranks import RankPoint
from robustkern.measure.roofline import MODELS
from robustkern.measure.scaling import Plan, Point

__all__ = ["plan_of", "scaling"]

NUMBERS = "1e4..1e9 are powers of ten, 1e4..1e9:2 two a decade; or 1e4,2e5"


@command(extra="bench")
def scaling(
    out: Annotated[Path, typer.Option(help="Folder for results.csv, results.json and the pictures.")],
    devices: Annotated[list[str], typer.Option(help=f"{', '.join(DEVICES)}.")] = ["cpu,cuda"],  # noqa: B006
    n: Annotated[list[str], typer.Option("--n", help="Rows: 8,16.")] = ["8,16,32,64"],  # noqa: B006
    d: Annotated[list[str], typer.Option("--d", help=f"Columns: {NUMBERS}.")] = ["1e4..1e9"],  # noqa: B006
    dtype: Annotated[list[str], typer.Option(help=f"{', '.join(known.name for known in DTYPES)}.")] = ["float32"],  # noqa: B006
    rules: Rules = None,
    own: Import = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(MODELS)}: what they could do at best, as a line that nobody measured."),
    ] = None,
    ranks: Annotated[
        list[str] | None,
        typer.Option(help="Instead: processes of torch.distributed on this machine, a row of --d numbers each: 2,4."),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Time for each point; one measurement is always made.")] = 1.0,
    as_json: Json = False,
) -> None:
    """Measure how rules scale over devices, rows, columns and dtypes, into a folder of tables and pictures.

    Every result is checked. Points that do not fit into memory, and whatever
    fails, are recorded with the reason. A device that is not here is named, and
    the rest goes on. Ctrl-C keeps what was measured. Exit code 1: none of the
    devices is here, or a result was wrong.
    """
    plan = plan_of(devices, n, d, dtype, rules, model, seconds)
    folder_to_write(out, "scaling")
    if ranks is not None:
        chosen = tuple(dict.fromkeys(str(rule_of(rule, "rules")) for rule in some(rules, "rules", RULES))) or None
        _over_ranks(numbers(ranks, "ranks", 1, 64), plan, chosen, own or (), out, as_json)
        return
    there, missing = open_devices(list(plan.devices))
    for name, reason in missing.items():
        note(f"{name} is not here: {reason}")
    points: list[Point] = []
    try:
        _measure(plan, there, points)
    finally:  # also after Ctrl-C
        facts = {device.name: device.facts() for device in there}
        saved = measured.save(plan, points, facts, missing, out)
        if as_json:
            print_json(saved)
        else:
            _print_points(points)
        files = [out / "results.csv", out / "results.json", *_draw(points, out, there)]
        if not as_json:
            print(f"{out}: {', '.join(path.name for path in files)}")
    if not there:
        fail(f"none of the devices is here ({', '.join(plan.devices)}); see above, or robustkern info", CANNOT)
    wrong = [point for point in points if point.checked == "wrong"]
    if wrong:
        fail(f"{len(wrong)} results are wrong, see results.csv; the first: {wrong[0].reason}", CANNOT)


def _over_ranks(
    sizes: Sequence[int], plan: Plan, rules: Sequence[str] | None, own: Sequence[Path], out: Path, as_json: bool
) -> None:
    """Measure ranks beside torch's own collectives."""
    import torch.distributed as dist

    from robustkern.measure import ranks as over

    if not dist.is_available():
        fail("torch has no distributed here", CANNOT)
    points: list[RankPoint] = []
    for point in over.study_ranks(sizes, plan.d, rules or over.RULES, plan.seconds, own):
        points.append(point)
    if not points:
        fail(f"none of the rules takes so few rows, one a rank ({', '.join(map(str, sizes))}; try --ranks 4)", CANNOT)
    saved = over.save_ranks(points, out)
    files = [out / "ranks.csv", out / "ranks.json"]
    try:
        files += over.draw_ranks(points, out)
    except ModuleNotFoundError as error:
        note(f"no pictures: {error} (run: pip install 'robustkern[plot]')")
    if as_json:
        print_json(saved)
        return
    print_table(
        "one row a rank; times over those of all_to_all and all_gather (fsdp: of reduce_scatter), and of all_reduce",
        ("how", "rule", "ranks", "d", "seconds", "over parts", "over all_reduce", "MB sent"),
        [_line(point) for point in points],
        numbers=("ranks", "d", "seconds", "over parts", "over all_reduce", "MB sent"),
    )
    print(f"{out}: {', '.join(path.name for path in files)}")


def _line(p: RankPoint) -> tuple[str, ...]:
    ratios = f"{p.over_parts:.2f}", f"{p.over_all_reduce:.2f}"
    return p.how, p.rule, str(p.ranks), f"{p.d:,}", f"{p.seconds:.3g}", *ratios, f"{p.sent / 1e6:.3g}"


def plan_of(
    devices: Sequence[str],
    n: Sequence[str],
    d: Sequence[str],
    dtype: Sequence[str],
    rules: Sequence[str] | None,
    model: Sequence[str] | None,
    seconds: float,
) -> Plan:
    """Read the options."""
    if not 0 < seconds < math.inf:
        raise Wrong(f"--seconds: expected a number above 0, the time of each point; got {seconds:g}")
    return Plan(
        devices=names(devices, "devices", tuple(DEVICES)),
        rules=tuple(
            dict.fromkeys(str(rule_of(rule, "rules")) for rule in some(rules, "rules", RULES) or measured.RULES)
        ),
        dtypes=names(dtype, "dtype", [known.name for known in DTYPES]),
        n=numbers(n, "n", measured.LEAST_ROWS, measured.MOST_ROWS),
        d=numbers(d, "d", measured.LEAST_COLUMNS, 10**12),
        models=names(model, "model", tuple(MODELS)),
        seconds=seconds,
    )


def _measure(plan: Plan, there: Sequence[Device], points: list[Point]) -> None:
    """Measure, and append what comes out."""
    with bar("scaling", measured.points_of(plan, there)) as shown:
        for point in measured.study(plan, there):
            points.append(point)
            shown.show(len(points), f"{point.device}: {point.rule}, n={point.n}, d={point.d:,}")


def _draw(points: Sequence[Point], out: Path, there: Sequence[Device]) -> list[Path]:
    try:
        from robustkern.measure.pictures import draw

        return draw(points, out, {device.name: device.facts()["name"] for device in there if device.transfers})
    except ModuleNotFoundError as error:
        note(f"no pictures: {error} (run: pip install 'robustkern[plot]')")
        return []


def _print_points(points: Sequence[Point]) -> None:
    """Print the largest d of each rule, device and n, why other points have no figures, and where devices overtake."""
    largest = {
        (p.device, p.rule, p.dtype, p.n): p for p in points if (p.kind, p.part) == ("measured", "sizes") and p.seconds
    }
    print_table(
        "at the largest d that was measured",
        ("device", "rule", "dtype", "n", "d", "seconds", "reads", "checked"),
        [
            (device, rule, dtype, str(n), f"{p.d:,}", f"{p.seconds:.3g}", f"{p.reads:.2f}", p.checked)
            for (device, rule, dtype, n), p in largest.items()
        ],
        numbers=("n", "d", "seconds", "reads"),
    )
    for reason, times in Counter(p.reason for p in points if p.reason).items():
        print(f"{times} points: {reason}")
    for each in measured.crossovers(points):
        print(f"{each.device}, {each.rule}, n={each.n}, {each.dtype}, transfer: {each.transfer}: {each.said}")
