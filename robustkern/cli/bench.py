"""``robustkern bench``."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from robustkern.cli.console import Wrong, bar, command, note, print_json, print_table
from robustkern.cli.options import RULES, Json, Rules, file_to_write, names, numbers, rule_of, some
from robustkern.cli.rules import Import
from robustkern.contract.rows import DTYPES
from robustkern.measure import peers, reads, regression
from robustkern.measure.style import SUFFIXES
from robustkern.measure.suites import SUITES

__all__ = ["bench"]

#: Cases that are no rules.
OTHERS = ("gram", "weighted median")
SIZES = (8, 16, 32, 64, 128, 256, 1024)


@command(extra="bench")
def bench(
    rules: Rules = None,
    own: Import = None,
    n: Annotated[list[str] | None, typer.Option("--n", help="Rows: 8,16. Default: 8 to 1024.")] = None,
    d: Annotated[str | None, typer.Option("--d", help="Columns. Default: n * d = 1.6e8 for rules.")] = None,
    dtype: Annotated[str, typer.Option(help=f"{', '.join(known.name for known in DTYPES)}.")] = "float32",
    against: Annotated[list[str] | None, typer.Option(help=f"Others: {', '.join(peers.PEERS)}.")] = None,
    suite: Annotated[
        list[str] | None, typer.Option(help=f"rules, {', '.join(SUITES)}, or all. Default: rules.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Pairs of what is measured and what it is compared with.")] = 7,
    as_json: Json = False,
    save: Annotated[Path | None, typer.Option(help="Write machine and figures to this .json file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw reads against n into this picture.")] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="BEFORE AFTER", help="Compare two saved runs; measure nothing."),
    ] = None,
    slack: Annotated[float, typer.Option(min=0.0, help="With --compare: the share that a figure may grow by.")] = 0.1,
) -> None:
    """Measure what rules cost in read passes: the time of one streaming sum over the same rows, in the same run.

    That is --suite rules, the default; --rules may also name gram and
    'weighted median'. Other suites measure, beside their goals: 16-bit and
    64-bit rows against float32 (dtypes), small Python calls against NumPy and
    torch (calls), pytrees against one array (trees), memory besides the rows
    (memory), what threads bring (threads), the update of momenta against torch
    (momenta), Numba against compiled code (numba), every rule on the worst of
    three inputs in three layouts against the machine's limit (worst: minutes).
    --rules, --n, --dtype, --against and --plot are for rules alone. Ctrl-C
    keeps what was measured.

    --compare takes two files, each of --save or of pytest --benchmark-json. It
    exits with 1 where something got slower: by more than --slack, and by more
    than the quartiles of both runs overlap.
    """
    if not math.isfinite(slack):
        raise Wrong(f"--slack: expected a share such as 0.1; got {slack:g}")
    if compare is not None:
        _compare(*compare, slack, as_json)
        return
    known = ("rules", *SUITES)
    wanted = names(suite or ["rules"], "suite", (*known, "all"))
    chosen = [name for name in known if name in wanted or "all" in wanted]
    if plot is not None and "rules" not in chosen:
        raise Wrong("--plot draws the rules (add --suite rules)")
    if len(names([dtype], "dtype", [each.name for each in DTYPES])) != 1:
        raise Wrong(f"--dtype: one at a time; got {dtype!r}")
    asked = some(rules, "rules", RULES)
    for rule in asked:
        if rule not in OTHERS:
            rule_of(rule, "rules")
    libraries = names(against, "against", tuple(peers.PEERS))
    sizes = SIZES if n is None else numbers(n, "n", 1, 65_535)
    columns = None if d is None else numbers(d, "d", 1, 10**12)[0]
    file_to_write(save, "save", (".json",))
    file_to_write(plot, "plot", SUFFIXES)
    for library in libraries:
        peers.load(library, 1)
    jobs = [
        (rule, size)
        for size in sizes
        for rule in asked or reads.cases()
        if "rules" in chosen and (asked or reads.goal(rule, size) is not None)
    ]
    cases = [(name, case) for name in chosen if name in SUITES for case in SUITES[name][1]]
    results: list[reads.Measured] = []
    lines: list[reads.Line] = []
    try:
        _measure(jobs, cases, dtype, libraries, columns, rounds, results, lines)
    finally:  # also after Ctrl-C, or where one case fails
        lines = list(dict.fromkeys(lines))  # what is missing is said once
        if save is not None:
            reads.save(results, save, lines)
        if plot is not None and results:
            reads.plot(results, plot)
        if as_json:
            print_json(reads.facts(results, lines))
        else:
            _print_rules(results)
            _print_lines(lines)


def _measure(
    jobs: list[tuple[str, int]],
    cases: list[tuple[str, tuple[Any, ...]]],
    dtype: str,
    libraries: tuple[str, ...],
    d: int | None,
    rounds: int,
    results: list[reads.Measured],
    lines: list[reads.Line],
) -> None:
    """Measure, and append what comes out."""
    held: tuple[int, Any] = (0, None)
    with bar("benchmark", len(jobs) + len(cases)) as shown:
        for k, (rule, n) in enumerate(jobs):
            shown.show(k, f"{rule}, n={n}")
            if held[0] != n:
                held = (0, None)  # one set of rows at a time
                held = (n, reads.make_rows(n, d or max(reads.VALUES // n, 1), dtype))
            results.append(reads.measure(rule, held[1], rounds=rounds))
            results.extend(reads.measure_peers(rule, held[1], libraries))
        held = (0, None)
        for k, (name, case) in enumerate(cases, len(jobs)):
            shown.show(k, f"{name}: {', '.join(map(str, case))}")
            lines.extend(SUITES[name][0](*case, rounds, d))


def _compare(before: Path, after: Path, slack: float, as_json: bool) -> None:
    try:
        old, new = regression.saved(before), regression.saved(after)
    except ValueError as error:
        raise Wrong(f"--compare: {error}") from None
    found = regression.changes(old, new, slack)
    alone = [sorted(old.keys() - new.keys()), sorted(new.keys() - old.keys())]
    if not found:
        raise Wrong(f"--compare: {before} and {after} have no benchmark in common")
    if as_json:
        changed = [asdict(change) | {"ratio": change.ratio} for change in found]
        print_json({"changes": changed, "only_before": alone[0], "only_after": alone[1]})
    else:
        print_table(
            f"in read passes (quartiles); slower: by more than {slack:.0%}, and beyond the quartiles",
            ("benchmark", "before", "after", "ratio", ""),
            [
                (c.name, *map(_with_quartiles, (c.before, c.after)), f"{c.ratio:.2f}", "SLOWER" if c.slower else "")
                for c in found
            ],
            numbers=("before", "after", "ratio"),
        )
        for path, names_ in zip((before, after), alone, strict=True):
            if names_:
                note(f"only in {path}: {', '.join(names_)}")
    if any(change.slower for change in found):
        raise typer.Exit(1)


def _with_quartiles(figure: regression.Figure) -> str:
    return f"{figure.reads:.2f} ({figure.low:.2f}-{figure.high:.2f})"


def _print_rules(results: list[reads.Measured]) -> None:
    if not results:
        return
    rows = []
    for r in results:
        figure = Text(f"{r.reads:.2f}")
        if r.goal is not None:
            figure.stylize("green" if r.reads <= r.goal else "yellow")
        goal = "" if r.goal is None else f"{r.goal:g}"
        spread = f"{r.low:.2f}-{r.high:.2f}"
        rows.append((r.rule, r.library, str(r.n), f"{r.d:,}", figure, spread, goal, f"{r.gb_per_s:.1f}"))
    print_table(
        "in read passes of the same rows (median of the rounds, quartiles)",
        ("rule", "library", "n", "d", "reads", "quartiles", "goal", "GB/s"),
        rows,
        numbers=("n", "d", "reads", "quartiles", "goal", "GB/s"),
    )


def _print_lines(lines: list[reads.Line]) -> None:
    if not lines:
        return
    rows = []
    for line in lines:
        figure = Text("" if line.figure is None else f"{line.figure:.3g}{'*' if line.missed else ' '}")
        if line.goal is not None:
            figure.stylize("yellow" if line.missed else "green")
        rows.append((line.name, line.what, figure, line.wanted, line.unit))
    print_table(
        "medians of ratios; of calls, the least times; * misses its goal",
        ("suite", "what", "figure", "goal", "unit"),
        rows,
        numbers=("figure", "goal"),
    )
