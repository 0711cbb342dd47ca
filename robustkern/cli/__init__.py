"""The command line: ``robustkern aggregate``, ``train``, ``reproduce``, ``bench``, ``scaling``, ``demo`` and ``info``.

Exit codes: 0 done; 1 the updates cannot be aggregated (corrupt or unlike files, too many rows with NaN, an n that the
rule does not allow); 2 the command was not understood, or an optional package is missing.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, NoReturn

try:
    import typer
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.table import Table
    from rich.text import Text
except ImportError as missing:
    print(f"robustkern: {missing}; the command line needs: pip install 'robustkern[cli]'", file=sys.stderr)
    raise SystemExit(2) from None

import robustkern
from robustkern.cli.report import facts, print_workers
from robustkern.errors import RobustkernError
from robustkern.files import aggregate_files, expand
from robustkern.rules import parse_rule

__all__ = ["app", "main"]

app = typer.Typer(
    name="robustkern",
    help="Byzantine-robust aggregation of updates at the speed of memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line."""
    app()


@app.command()
def aggregate(
    updates: Annotated[
        list[Path], typer.Argument(help="One safetensors, npz or npy file a worker; directories are searched.")
    ],
    out: Annotated[Path, typer.Option(help="Where the result goes; its suffix decides the kind.")],
    rule: Annotated[str, typer.Option(help="Such as 'median' or 'nnm | ctma(geometric_median)'.")] = (
        "ctma(geometric_median)"
    ),
    f: Annotated[int | None, typer.Option("--f", help="How many workers may be Byzantine.")] = None,
    delta: Annotated[float | None, typer.Option(help="Instead of f: their share.")] = None,
    weights: Annotated[str | None, typer.Option(help="Weights of the workers, separated by commas.")] = None,
    backend: Annotated[str, typer.Option(help="auto, cpp, numba or reference.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result's facts as JSON.")] = False,
) -> None:
    """Aggregate update files into one.

    Files are read tensor by tensor: memory is bounded by the largest tensor times the number of files. The output
    appears complete or not at all. Exit code 1: the updates cannot be aggregated; 2: the command is wrong.
    """
    _aggregate(updates, out, rule, f, delta, weights, backend, as_json)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for updates, results and the picture.")] = Path("demo-output"),
    rounds: Annotated[int, typer.Option(min=1, help="Training rounds.")] = 60,
    seed: Annotated[int, typer.Option(help="Seed of data split, batches and buckets.")] = 0,
) -> None:
    """Train with 17 workers of which 8 attack, and watch which rules survive."""
    from robustkern.cli.demo import run

    _guard(lambda: run(out, rounds=rounds, seed=seed))


@app.command()
def bench(
    rules: Annotated[
        list[str] | None,
        typer.Option(help="A rule in its text form, 'gram' or 'weighted median'; may be repeated. Default: all."),
    ] = None,
    n: Annotated[list[int] | None, typer.Option("--n", min=1, help="Rows; may be repeated.")] = None,
    d: Annotated[int | None, typer.Option("--d", min=1, help="Columns. Default: n * d = 1.6e8 for rules.")] = None,
    dtype: Annotated[str, typer.Option(help="float16, bfloat16, float32 or float64.")] = "float32",
    against: Annotated[
        list[str] | None,
        typer.Option(help="numpy, torch, byzfl, geom_median, bottleneck or scipy; may be repeated."),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help="rules, dtypes, calls, trees, memory, threads, momenta, numba or all; may be repeated. Default: rules."
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Pairs of what is measured and what it is compared with.")] = 7,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write machine and figures as JSON.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw reads against n.")] = None,
) -> None:
    """Measure what rules cost in read passes: the time of one streaming sum over the same rows, in the same run.

    That is --suite rules, the default. Other suites measure, beside their goals:
    16-bit and 64-bit rows against float32 (dtypes), small Python calls against
    NumPy and torch (calls), pytrees against one array (trees), memory besides
    the rows (memory), what threads bring (threads), the update of momenta
    against torch (momenta), Numba against compiled code (numba). --rules, --n,
    --dtype, --against and --plot are for rules alone.
    """
    _guard(lambda: _bench(rules, n, d, dtype, against or [], suite or ["rules"], rounds, json_file, plot_file))


@app.command()
def scaling(
    out: Annotated[Path, typer.Option(help="Folder for results.csv, results.json and the pictures.")],
    devices: Annotated[str, typer.Option(help="cpu, cuda; several with commas.")] = "cpu,cuda",
    n: Annotated[str, typer.Option("--n", help="Rows; several with commas.")] = "8,16,32,64",
    d: Annotated[
        str, typer.Option("--d", help="Columns: 1e4..1e9 are powers of ten, 1e4..1e9:2 two a decade; or with commas.")
    ] = "1e4..1e9",
    dtype: Annotated[str, typer.Option(help="float16, bfloat16, float32, float64; several with commas.")] = "float32",
    rules: Annotated[
        list[str] | None, typer.Option(help="A rule in its text form; may be repeated. Default: seven of them.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="a100, h100, rtx4090: what they could do at best, as a line that nobody measured.")
    ] = "",
    seconds: Annotated[float, typer.Option(help="Time for each point; one measurement is always made.")] = 1.0,
) -> None:
    """Measure how rules scale over devices, rows, columns and dtypes, into a folder of tables and pictures.

    Every result is checked. Points that do not fit into memory, and whatever
    fails, are recorded with the reason. A device that is not here is named, and
    the rest goes on. Exit code 1: none of the devices is here, or a result was
    wrong; 2: the command is wrong.
    """
    from robustkern.measure.scaling import Plan

    try:
        plan = Plan.of(devices=devices, n=n, d=d, dtype=dtype, rules=rules, model=model, seconds=seconds)
    except (ValueError, TypeError) as error:
        _fail(str(error), 2)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "results.csv").open("a").close()
    except OSError as error:
        _fail(f"--out: expected a folder that can be written; got {str(out)!r}: {error} (choose another one)", 2)
    _guard(lambda: _scaling(plan, out))


@app.command()
def train(
    out: Annotated[
        Path, typer.Option(help="Folder for log, checkpoint and picture; the same command goes on there.")
    ] = (Path("train-output")),
    data: Annotated[str, typer.Option(help="digits (no files needed), mnist or cifar10.")] = "digits",
    data_dir: Annotated[Path | None, typer.Option(help="Where the files of mnist or cifar10 are.")] = None,
    model: Annotated[str, typer.Option(help="softmax, mlp, cnn or resnet18.")] = "mlp",
    workers: Annotated[int, typer.Option(help="Workers, attackers included.")] = 17,
    byzantine: Annotated[int, typer.Option(help="How many of them attack.")] = 8,
    f: Annotated[
        int | None, typer.Option("--f", help="How many the rule tolerates. Default: as many as attack.")
    ] = None,
    attack: Annotated[
        str,
        typer.Option(
            help="none, sign_flip, label_flip, ipm, alie, mimic, gaussian, nan, inf, optimised; with parameters such "
            "as 'ipm(epsilon=0.1)'."
        ),
    ] = "alie",
    rule: Annotated[str, typer.Option(help="Such as 'ctma(median)' or 'nnm | geometric_median'.")] = "ctma(median)",
    optimizer: Annotated[str, typer.Option(help="mu2sgd, momentum or sgd.")] = "mu2sgd",
    schedule: Annotated[str, typer.Option(help="Of mu2sgd: practical or theory.")] = "practical",
    beta: Annotated[float | None, typer.Option(help="Of mu2sgd, fixed instead of the schedule's.")] = None,
    gamma: Annotated[float | None, typer.Option(help="Of mu2sgd, fixed instead of the schedule's.")] = None,
    radius: Annotated[float | None, typer.Option(help="Of mu2sgd: project onto this ball around the start.")] = None,
    momentum: Annotated[float, typer.Option(help="Of momentum.")] = 0.9,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 0.1,
    batch: Annotated[int, typer.Option(help="Samples of each worker in a round.")] = 4,
    clip: Annotated[float, typer.Option(help="Clip gradients to this norm; 0: not.")] = 2.0,
    rounds: Annotated[int, typer.Option(help="Steps.")] = 500,
    dirichlet: Annotated[
        float | None, typer.Option(help="Uneven split of the classes: 0.1 very, 100 hardly. Default: even.")
    ] = None,
    crash: Annotated[list[str] | None, typer.Option(help="3@20: worker 3 dies in round 20; may be repeated.")] = None,
    stall: Annotated[
        list[str] | None, typer.Option(help="3@20: worker 3 hangs from round 20; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of model, split, batches and attack.")] = 0,
    evaluate_every: Annotated[int, typer.Option(min=1, help="Rounds between tests.")] = 10,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Rounds between checkpoints.")] = 50,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start again, whatever the folder holds.")] = False,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that processes have for an answer.")] = 60.0,
) -> None:
    """Train with workers of which some attack: all in this process, or one process each.

    Log, checkpoint and picture go to a folder. The same command again goes on
    after a kill, with the same result as without it. For one process each:
    torchrun --nproc-per-node 17 -m robustkern train; a worker that crashes or
    stalls is dropped and counts as one of the f that are tolerated. Exit code 1:
    training failed; 2: the command is wrong.
    """
    _train(
        {
            "data": data,
            "model": model,
            "workers": workers,
            "byzantine": byzantine,
            "f": f,
            "attack": attack,
            "rule": rule,
            "optimizer": optimizer,
            "schedule": schedule,
            "beta": beta,
            "gamma": gamma,
            "radius": radius,
            "momentum": momentum,
            "lr": lr,
            "batch": batch,
            "clip": clip,
            "rounds": rounds,
            "dirichlet": dirichlet,
            "seed": seed,
        },
        [*((text, "crash") for text in crash or []), *((text, "stall") for text in stall or [])],
        out,
        data_dir,
        evaluate_every,
        checkpoint_every,
        overwrite,
        timeout,
    )


@app.command()
def reproduce(
    out: Annotated[Path, typer.Option(help="Folder for the runs, the page and its pictures.")] = Path("reproduction"),
    quick: Annotated[bool, typer.Option("--quick", help="A small plan, some minutes: it supports no claim.")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Trainings at a time. Default: the number of cores.")] = None,
) -> None:
    """Run the paper's comparisons, and write a page that says which of its claims held.

    About 1400 short trainings, less than half an hour on two cores. The same
    command again goes on where it was stopped.
    """
    _guard(lambda: _reproduce(out, quick, jobs), "train", "the gradients of all workers")


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Show versions, backends (and why one is absent), instruction sets and threads."""
    _info(as_json)


def _fail(message: str, code: int) -> NoReturn:
    Console(stderr=True, soft_wrap=True).print(Text.assemble(("error: ", "bold red"), message))
    raise SystemExit(code)


def _guard(run: Any, extra: str = "demo", much: str = "one tensor of all files") -> Any:
    """Run a command; turn what users can do something about into a message and an exit code."""
    try:
        return run()
    except ImportError as error:
        remedy = "" if "pip install" in str(error) else f"; install what it needs: pip install 'robustkern[{extra}]'"
        _fail(f"{error}{remedy}", 2)
    except MemoryError as error:
        _fail(f"not enough memory for {much} ({error})", 1)
    except (RobustkernError, ValueError, TypeError, OSError) as error:
        _fail(str(error), 1)


def _aggregate(
    updates: list[Path],
    out: Path,
    rule: str,
    f: int | None,
    delta: float | None,
    weights: str | None,
    backend: str,
    as_json: bool,
) -> None:

    try:
        plan = parse_rule(rule)
        shares = None if weights is None else [float(w) for w in weights.split(",")]
    except ValueError as error:
        _fail(str(error), 2)
    files = _guard(lambda: expand(updates))
    started = time.perf_counter()
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        tasks: dict[str, Any] = {}

        def progress(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total)
            bar.update(tasks[phase], completed=done, total=max(total, done))

        info = _guard(
            lambda: aggregate_files(
                files, plan, out=out, f=f, delta=delta, weights=shares, backend=backend, progress=progress
            )
        )
    seconds = time.perf_counter() - started
    if as_json:
        print(json.dumps(facts(info, files, out, seconds)))
    else:
        print_workers(info, files, out, seconds)


def _failure(text: str, kind: str) -> tuple[int, int, str]:
    worker, _, at = text.partition("@")
    if not (worker.isdecimal() and at.isdecimal()):
        raise ValueError(f"--{kind} must be worker@round, such as 3@20; got {text!r}")
    return int(worker), int(at), kind


def _train(
    values: dict[str, Any],
    failures: list[tuple[str, str]],
    out: Path,
    data_dir: Path | None,
    evaluate_every: int,
    checkpoint_every: int,
    overwrite: bool,
    timeout: float,
) -> None:
    from robustkern.cli.supervisor import HEARTBEAT, launched_rank, supervise

    rank = launched_rank()
    if rank and HEARTBEAT not in os.environ:  # torchrun would end all workers with the first that fails
        code, began = supervise(sys.argv[1:], silence_s=2 * timeout + 5)
        if code:
            print(f"worker {rank} has ended: {f'signal {-code}' if code < 0 else f'exit code {code}'}", file=sys.stderr)
        if code and not began:  # the others would wait for it
            raise SystemExit(1)
        return
    try:
        from robustkern.training.settings import Settings

        settings = Settings(**values, failures=tuple(_failure(*failure) for failure in failures))
    except (ImportError, ValueError, TypeError) as error:
        _fail(str(error), 2)
    from robustkern.training.console import train as run

    _guard(
        lambda: run(settings, out, data_dir, evaluate_every, checkpoint_every, overwrite, rank, timeout),
        "train",
        "the gradients of all workers",
    )


def _reproduce(out: Path, quick: bool, jobs: int | None) -> None:
    from robustkern.training.reproduce import Plan, measure_times, reproduce
    from robustkern.training.reproduction_page import write_page
    from robustkern.training.session import alone_in

    plan = Plan.quick() if quick else Plan()
    out.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with alone_in(out), Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("training", total=len(plan.runs()))
        records, facts = reproduce(
            plan, out, jobs=jobs or _cores(), progress=lambda done, total: bar.update(task, completed=done)
        )
        bar.update(task, description="measuring times", completed=len(records))
        files = write_page(plan, records, measure_times(), facts, out)
    print(f"{out}: {', '.join(path.name for path in files)}")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _bench(
    rules: list[str] | None,
    sizes: list[int] | None,
    d: int | None,
    dtype: str,
    against: list[str],
    wanted: list[str],
    rounds: int,
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    from robustkern.measure import peers
    from robustkern.measure import reads as benchmark
    from robustkern.measure.suites import SUITES

    known = ("rules", *SUITES)
    for name in wanted:
        if name not in (*known, "all"):
            raise ValueError(f"--suite: {name!r} is not known (known: {', '.join(known)}, all)")
    chosen = [name for name in known if name in wanted or "all" in wanted]
    if plot_file is not None and "rules" not in chosen:
        raise ValueError("--plot draws the rules (add --suite rules)")
    if dtype not in ("float16", "bfloat16", "float32", "float64"):
        raise ValueError(f"--dtype must be float16, bfloat16, float32 or float64; got {dtype!r}")
    for library in against:
        peers.load(library, 1)
    jobs = [
        (rule, n)
        for n in sizes or (8, 16, 32, 64, 128, 256, 1024)
        for rule in rules or benchmark.cases()
        if "rules" in chosen and (rules or benchmark.goal(rule, n) is not None)
    ]
    cases = [(name, case) for name in chosen if name in SUITES for case in SUITES[name][1]]
    results: list[benchmark.Measured] = []
    lines: list[benchmark.Line] = []
    held: tuple[int, Any] = (0, None)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task("benchmark", total=len(jobs) + len(cases))
        for rule, n in jobs:
            bar.update(task, description=f"{rule}, n={n}")
            if held[0] != n:
                held = (0, None)  # one set of rows at a time
                held = (n, benchmark.make_rows(n, d or max(benchmark.VALUES // n, 1), dtype))
            results.append(benchmark.measure(rule, held[1], rounds=rounds))
            results.extend(benchmark.measure_peers(rule, held[1], against))
            bar.advance(task)
        held = (0, None)
        for name, case in cases:
            bar.update(task, description=f"{name}: {', '.join(map(str, case))}")
            lines.extend(SUITES[name][0](*case, rounds, d))
            bar.advance(task)
    lines = list(dict.fromkeys(lines))  # what is missing is said once
    if results:
        _print_bench(results)
    if lines:
        _print_lines(lines)
    if json_file is not None:
        benchmark.save(results, json_file, lines)
    if plot_file is not None:
        benchmark.plot(results, plot_file)


def _print_bench(results: list[Any]) -> None:
    table = Table(title="in read passes of the same rows (median of the rounds, quartiles)", title_justify="left")
    for column in ("rule", "library", "n", "d", "reads", "quartiles", "goal", "GB/s"):
        table.add_column(column, justify="left" if column in ("rule", "library") else "right", no_wrap=True)
    for r in results:
        reads = Text(f"{r.reads:.2f}")
        if r.goal is not None:
            reads.stylize("green" if r.reads <= r.goal else "yellow")
        wanted = "" if r.goal is None else f"{r.goal:g}"
        spread = f"{r.low:.2f}-{r.high:.2f}"
        table.add_row(r.rule, r.library, str(r.n), f"{r.d:,}", reads, spread, wanted, f"{r.gb_per_s:.1f}")
    console = Console()
    Console(width=max(console.width, 120)).print(table)


def _print_lines(lines: list[Any]) -> None:
    table = Table(title="medians of ratios; of calls, the least times; * misses its goal", title_justify="left")
    for column in ("suite", "what", "figure", "goal", "unit"):
        table.add_column(column, justify="right" if column in ("figure", "goal") else "left", no_wrap=True)
    for line in lines:
        figure = Text("" if line.figure is None else f"{line.figure:.3g}{'*' if line.missed else ' '}")
        if line.goal is not None:
            figure.stylize("yellow" if line.missed else "green")
        table.add_row(line.name, line.what, figure, line.wanted, Text(line.unit))
    console = Console()
    Console(width=max(console.width, 120)).print(table)


def _scaling(plan: Any, out: Path) -> None:
    from robustkern.measure.devices import open_devices
    from robustkern.measure.scaling import Point, crossovers, save, study

    there, missing = open_devices(plan.devices)
    errors = Console(stderr=True, soft_wrap=True)
    for name, reason in missing.items():
        errors.print(Text(f"{name} is not here: {reason}", style="yellow"))
    facts = {device.name: device.facts() for device in there}
    points: list[Point] = []
    with Progress(TextColumn("{task.description}"), BarColumn(), console=Console(stderr=True), transient=True) as bar:
        cases = len(plan.dtypes) * len(plan.n) * len(plan.d) * len(plan.rules)
        task = bar.add_task("scaling", total=cases * (len(there) + len(plan.models)))
        try:
            for point in study(plan, there):
                points.append(point)
                bar.update(task, advance=1, description=f"{point.device}: {point.rule}, n={point.n}, d={point.d:,}")
        finally:  # an interrupted study keeps what it has
            save(plan, points, facts, missing, out)
    _print_scaling(points)
    for crossover in crossovers(points):
        what = (
            f"{crossover.device}, {crossover.rule}, n={crossover.n}, {crossover.dtype}, transfer: {crossover.transfer}"
        )
        print(f"{what}: {crossover.said}")
    try:
        from robustkern.measure.pictures import draw

        pictures = draw(points, out, {device.name: facts[device.name]["name"] for device in there if device.transfers})
    except ModuleNotFoundError as error:
        errors.print(Text(f"no pictures: {error} (run: pip install 'robustkern[plot]')", style="yellow"))
        pictures = []
    print(f"{out}: {', '.join(path.name for path in (out / 'results.csv', out / 'results.json', *pictures))}")
    if not there:
        _fail(f"none of the devices is here ({', '.join(plan.devices)}); see above, or robustkern info", 1)
    wrong = [point for point in points if point.checked == "wrong"]
    if wrong:
        _fail(f"{len(wrong)} results are wrong, see results.csv; the first: {wrong[0].reason}", 1)


def _print_scaling(points: list[Any]) -> None:
    """Print the largest d of each rule, device and n, and the reasons why other points have no figures."""
    table = Table(title="at the largest d that was measured", title_justify="left")
    for column in ("device", "rule", "dtype", "n", "d", "seconds", "reads", "checked"):
        table.add_column(column, justify="right" if column in ("n", "d", "seconds", "reads") else "left", no_wrap=True)
    largest = {
        (p.device, p.rule, p.dtype, p.n): p for p in points if (p.kind, p.part) == ("measured", "sizes") and p.seconds
    }
    for (device, rule, dtype, n), p in largest.items():
        table.add_row(device, rule, dtype, str(n), f"{p.d:,}", f"{p.seconds:.3g}", f"{p.reads:.2f}", p.checked)
    console = Console()
    Console(width=max(console.width, 120)).print(table)
    for reason, times in Counter(p.reason for p in points if p.reason).items():
        console.print(Text(f"{times} points: {reason}"), soft_wrap=True)


def _info(as_json: bool) -> None:
    here = robustkern.info()
    if as_json:
        print(json.dumps(here))
        return
    console = Console(soft_wrap=True)
    console.print(f"robustkern {here['version']}, Python {here['python']}, NumPy {here['numpy']}, {here['machine']}")
    table = Table("backend", "state", "dtypes")
    for name, state in here["backends"].items():
        dtypes = sorted({c["dtype"] for c in here["capabilities"] if c["backend"] == name and c["available"] == "yes"})
        table.add_row(name, Text(state), ", ".join(dtypes))
    console.print(table)
    isas = ", ".join(here["isas"]) or "none"
    console.print(f"instruction sets: {isas} (in use: {here['isa']}; ROBUSTKERN_ISA forces a lower one)")
    console.print(f"threads: {here['threads']} (ROBUSTKERN_NUM_THREADS, robustkern.set_num_threads)")
    gpus = [f"{gpu['name']} ({gpu['memory_bytes'] / 1e9:.0f} GB)" for gpu in here["gpus"]]
    console.print(f"GPUs: {', '.join(gpus) or 'none that can be used'}")
