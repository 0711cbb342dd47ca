"""The command line: what each command is told, what it answers, its exit codes, and what it leaves alone."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support import make_rows
from test_files import make_updates, read, write
from typer.testing import CliRunner

import robustkern as rk
from robustkern.cli import app, console, options
from robustkern.measure import style

PACKAGE = Path(rk.__file__).parent


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


def said(result: Any) -> str:
    """What was said, whatever the lines."""
    return " ".join((result.stdout + result.stderr).split())


# ---- aggregate ---------------------------------------------------------------------------------------------------


def test_command(tmp_path: Path) -> None:
    updates = make_updates()
    updates[2]["wide"] += 100
    updates[5]["wide"][0] = np.nan
    write(tmp_path / "in", updates, "safetensors")
    out = tmp_path / "merged.safetensors"
    result = run("aggregate", tmp_path / "in", "--f", 2, "--rule", "ctma(geometric_median)", "--out", out)
    assert result.exit_code == 0, result.output
    for word in ("worker-2", "dropped", "kept", "holds NaN", "nearest 1 of 9", "0.1429"):
        assert word in result.output
    assert out.exists()
    result = run("aggregate", tmp_path / "in", "--f", 2, "--out", out, "--json")
    facts = json.loads(result.stdout)
    assert facts["rule"] == "ctma(geometric_median)"
    assert [w["verdict"] for w in facts["workers"]].count("kept") == 7
    assert facts["workers"][5] == {
        "file": str(tmp_path / "in" / "worker-5.safetensors"),
        "sq_distance": None,
        "weight": 0.0,
        "claimed": None,
        "used": None,
        "finite": False,
        "verdict": "dropped",
        "why": "holds NaN or Inf",
    }
    result = run("aggregate", tmp_path / "in", "--delta", 0.25, "--rule", "median", "--out", out, "--json")
    facts = json.loads(result.stdout)
    assert facts["f"] == 2
    assert "votes in each coordinate" in facts["workers"][0]["why"]
    weights = ",".join(f"worker-{i}={1 + (i == 8)}" for i in reversed(range(9)))
    result = run("aggregate", tmp_path / "in", "--rule", "mean", "--weights", weights, "--out", out, "--json")
    assert json.loads(result.stdout)["workers"][8]["weight"] == pytest.approx(0.2)
    assert json.loads(result.stdout)["workers"][5]["verdict"] == "counted"


def test_texts_that_are_longer_than_a_name_of_a_file(tmp_path: Path) -> None:
    paths = write(tmp_path, make_updates(), "safetensors")
    out, much = tmp_path / "out.safetensors", "x" * 300
    common = [*paths, "--rule", "mean", "--out", out, "--json"]
    digits = [f"{k + 1}.{'0' * 40}" for k in range(9)]
    named = [f"{path.name}={digit}" for path, digit in zip(paths, digits, strict=True)]
    for weights in (digits, named):
        result = run("aggregate", *common, "--weights", ",".join(weights))
        assert result.exit_code == 0, result.output
        found = [worker["weight"] for worker in json.loads(result.stdout)["workers"]]
        assert found == pytest.approx([(k + 1) / 45 for k in range(9)])
    for arguments, message in (
        ([*paths, "--out", out, "--weights", much], f"--weights: expected numbers with commas between, such as 1,1,0.5, or name=1,...; got '{much[:10]}"),
        ([*paths, "--out", out, "--weights", "=" + much], "--weights: expected numbers with commas between"),
        ([*paths, "--out", tmp_path / (much + ".safetensors")], "cannot be written there: [Errno 36] File name too long"),
        ([*paths, "--out", out, "--import", much + ".py"], "--import: expected a Python file, FILE.py; got xxx"),
    ):  # fmt: skip
        result = run("aggregate", *arguments, "--rule", "mean")
        assert result.exit_code == 2, result.output
        assert message in said(result)
    result = run("aggregate", much, *paths, "--rule", "mean", "--out", out)
    assert result.exit_code == 1
    assert "no such file or folder" in said(result)
    result = run("train", "--data", "mnist", "--data-dir", much, "--out", tmp_path / "run")
    assert "File name too long" not in said(result)
    assert result.exit_code == 1


@pytest.mark.parametrize("more", [[], ["--schedule", "theory"], ["--optimizer", "momentum"]])
def test_a_learning_rate_that_float32_does_not_hold(tmp_path: Path, more: list[str]) -> None:
    lr = "1e37" if "theory" in more else "1e300"
    result = run("train", "--rounds", 100, "--lr", lr, "--out", tmp_path / "run", *more)
    assert result.exit_code == 2
    assert said(result).startswith("error: --lr must give learning rates that float32 holds; got 1e+3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rule", "medain"], "--rule: 'medain' is not known; did you mean 'median'"),
        (["--rule", "nnm"], "--rule: nnm only mixes the rows; end it with a rule"),
        (["--rule", "median("], "--rule: "),
        (
            ["--weights", "1,a"],
            "--weights: expected numbers with commas between, such as 1,1,0.5, or name=1,...; got '1,a'",
        ),
        (["--f", "1", "--weights", "1,1,1"], "--weights has 3 numbers for 9 workers"),
        (["--f", "1", "--weights", "1,1,1,1,1,1,1,1,-1"], "--weights must be finite, not negative, and not all 0"),
        (["--f", "1", "--weights", "0,0,0,0,0,0,0,0,0"], "--weights must be finite, not negative, and not all 0"),
        (["--f", "1", "--weights", "1,1,1,1,1,1,1,1,nan"], "--weights must be finite, not negative, and not all 0"),
        (
            ["--f", "1", "--weights", "1,1,1,1,1,1,1,1,9"],
            "--f 1: the 1 heaviest of the 9 workers hold 0.529 of the weight, which is not below half (lower --f",
        ),
        (
            ["--f", "1", "--rule", "krum", "--weights", "1,1,1,1,1,1,1,1,2"],
            "--weights: krum takes none",
        ),
        (
            [],
            "--f is missing: ctma(geometric_median) must know how many of the 9 workers may be Byzantine (or --delta)",
        ),
        (["--f", "5"], "--f 5: must be at least 0, and 2 * f below the number of workers, 9"),
        (["--f", "-1"], "--f -1: must be at least 0"),
        (["--delta", "0.5"], "--delta 0.5: must be at least 0 and below 0.5"),
        (["--delta", "nan"], "--delta nan: must be at least 0"),
        (["--f", "1", "--delta", "0.1"], "--f 1 --delta 0.1: one of them says it already"),
        (
            ["--f", "3", "--rule", "bucketing(size=3) | krum"],
            "--f 3: too many of 9 workers for bucketing(size=3) | krum",
        ),
        (["--delta", "0.4", "--rule", "bucketing(size=3) | krum"], "--delta 0.4: too many of 9 workers for bucketing"),
        (["--f", "1", "--backend", "fast"], "--backend must be one of"),
        (["--f", "1", "--backend", "cuda"], "cuda"),
        (["--f", "x"], "Invalid value for '--f'"),
        (["--f", "1", "--only", ""], "--only: expected patterns such as 'layer1.*', with commas; got nothing"),
        (["--f", "1", "--exclude", ","], "--exclude: expected patterns"),
        (["--f", "1", "--only", "*", "--exclude", "*"], "--only * and --exclude * leaves no leaf"),
        (["--f", "1", "--cap-weights", "2"], "--cap-weights 2: nothing to cap (pass --weights or --weights-from)"),
        (
            ["--f", "1", "--weights", "1,1,1,1,1,1,1,1,1", "--weights-from", "x"],
            "--weights-from 'x': --weights says it already (pass one of them)",
        ),
    ],
)
def test_options_that_do_not_fit_are_exit_code_2(tmp_path: Path, arguments: list[str], message: str) -> None:
    paths = write(tmp_path / "in", make_updates(), "safetensors")
    out = tmp_path / "out.safetensors"
    result = run("aggregate", *paths, "--out", out, *arguments)
    assert result.exit_code == 2, result.output
    assert message in said(result)
    assert not re.search(r"\b(f|delta|weights|backend)=", said(result))
    assert "Traceback" not in said(result)
    assert not out.exists()


def test_what_must_be_given(tmp_path: Path) -> None:
    for arguments, message in (
        (["aggregate", "--out", tmp_path / "x.npz"], "Missing argument 'updates"),
        (["aggregate", tmp_path / "x.npz"], "Missing option '--out'"),
        (["scaling"], "Missing option '--out'"),
        (["dance"], "No such command 'dance'"),
        (["info", "--loud"], "No such option"),
        (["--version", "x"], "No such command 'x'"),
        (["--version", "info"], "--version is asked for alone"),
        (["--"], "Missing command"),
        (["bench", "--rules", ""], "--rules: expected rules such as median, with commas; got nothing"),
        (["bench", "--d", ""], "--d: expected whole numbers"),
        (["bench", "--slack", "nan"], "--slack: expected a share such as 0.1; got nan"),
        (["reproduce", "--part", ","], "--part: expected some of"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2
        assert message.lower() in said(result).lower()  # typers differ


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("out.pt", "unknown kind of output; expected one of .safetensors, .npz, .npy"),
        ("nowhere/out.npz", "nowhere does not exist"),
        ("in/worker-1.safetensors", "is one of the updates, which are never overwritten"),
        ("folder.npz", "is a directory (name a file)"),
    ],
)
def test_the_output_is_looked_at_before_any_update(tmp_path: Path, out: str, message: str) -> None:
    paths = write(tmp_path / "in", make_updates(), "safetensors")
    paths[3].write_bytes(b"garbage")
    (tmp_path / "folder.npz").mkdir()
    result = run("aggregate", *paths, "--f", 1, "--out", tmp_path / out)
    assert result.exit_code == 2
    assert message in said(result)
    assert "--out" in said(result)


def test_updates_that_cannot_be_aggregated_are_exit_code_1(tmp_path: Path) -> None:
    updates = make_updates()
    for i in (1, 6, 7):
        updates[i]["wide"][0] = np.nan
    paths = write(tmp_path / "in", updates, "safetensors")
    out = tmp_path / "out.safetensors"
    (tmp_path / "none").mkdir()
    result = run("aggregate", *paths, "--out", out, "--f", 2)
    assert result.exit_code == 1
    assert "3 rows hold NaN or Inf" in said(result)
    assert "worker-6" in said(result)
    assert "f=2" not in said(result)
    for files, message in (
        ([tmp_path / "gone.npy"], "gone.npy: no such file"),
        ([tmp_path / "none"], "the folder holds no worker: no .safetensors, .npz, .npy"),
    ):
        result = run("aggregate", *files, "--out", out, "--f", 0)
        assert result.exit_code == 1
        assert message in said(result)
    paths[3].write_bytes(b"garbage")
    result = run("aggregate", *paths, "--out", out, "--f", 2)
    assert result.exit_code == 1
    assert "worker-3.safetensors: corrupt, truncated or no safetensors file" in said(result)
    assert not out.exists()


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "stopped"),
        (MemoryError("1 GB"), 1, "not enough memory for one tensor of all files (1 GB)"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (ImportError("No module named safetensors"), 2, "install what it needs: pip install 'robustkern[cli]'"),
        (rk.BackendUnavailable("no backend for float16"), 2, "no backend for float16"),
        (BrokenPipeError(), 141, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_what_goes_wrong_underway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise error

    module = sys.modules["robustkern.cli.aggregate"]
    monkeypatch.setattr(module, "aggregate_pool", fails)
    monkeypatch.setattr(console, "stop_printing", lambda: None)
    paths = write(tmp_path / "in", make_updates(), "safetensors")
    result = run("aggregate", *paths, "--f", 1, "--out", tmp_path / "out.npz")
    assert result.exit_code == code
    assert message in said(result)
    assert "Traceback" not in said(result)


# ---- what all commands share -------------------------------------------------------------------------------------


def test_messages_speak_of_options() -> None:
    names = ("f", "weights", "checkpoint_every", "lr")
    for text, want in (
        (
            "f must satisfy; got f=5 with weights=3 (pass f= or lr=)",
            "--f must satisfy; got --f 5 with --weights 3 (pass --f or --lr)",
        ),
        ("checkpoint_every must be 1", "--checkpoint-every must be 1"),
        ("runs/f=2/worker.npz: gone; half=3", "runs/f=2/worker.npz: gone; half=3"),
        ("for f= alone, of f: nothing", "for --f alone, of f: nothing"),
        ("lr=* and f=[a] are none", "--lr * and --f [a] are none"),
    ):
        assert console.in_options(text, names) == want


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (None, []),
        ("", []),
        ("median,ctma(median)", ["median", "ctma(median)"]),
        (["a, b", "c", "a"], ["a", "b", "c"]),
        (
            "geometric_median(nu=0.1, max_iter=3),nnm | ctma(median)",
            ["geometric_median(nu=0.1, max_iter=3)", "nnm | ctma(median)"],
        ),
        ("median(even=','),krum", ["median(even=',')", "krum"]),
        ("f([1,2],{3,4}),g", ["f([1,2],{3,4})", "g"]),
        ("a),b", ["a)", "b"]),
    ],
)
def test_lists_are_split_at_commas_outside_brackets(given: Any, parts: list[str]) -> None:
    assert options.listed(given) == parts


def test_version_and_short_help() -> None:
    assert run("--version").stdout.strip() == f"robustkern {rk.__version__}"
    for command in ("aggregate", "bench", "scaling", "train", "reproduce", "demo", "info"):
        long, short = run(command, "--help"), run(command, "-h")
        assert long.exit_code == short.exit_code == 0
        assert long.stdout == short.stdout
        assert "--json" in short.stdout
    result = run()
    assert result.exit_code == 2
    assert "reproduce" in result.output
    assert "--show-completion" in run("-h").stdout


def test_help_fits_into_80_columns() -> None:
    for command in ("aggregate", "bench", "scaling", "train", "reproduce", "demo", "info"):
        text = CliRunner().invoke(app, [command, "-h"], env={"COLUMNS": "80"}).stdout
        assert max(map(len, text.splitlines())) <= 80
        assert "…" not in text


def test_completion() -> None:
    done = python(_ROBUSTKERN_COMPLETE="complete_bash", COMP_WORDS="robustkern sc", COMP_CWORD="1", entry=True)
    assert "scaling" in done.stdout


def python(*arguments: str, entry: bool = False, cwd: Path | None = None, **environment: str) -> Any:
    command = [str(Path(sys.executable).with_name("robustkern"))] if entry else [sys.executable, "-m", "robustkern"]
    return subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        timeout=250,
        env={**os.environ, **environment},
    )


def test_train_has_an_option_for_each_setting_and_needs_no_torch_to_say_so(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('No module named torch')")
    done = python("train", "--help", PYTHONPATH=str(tmp_path), COLUMNS="300")
    assert done.returncode == 0, done.stderr
    from robustkern.training.settings import MODELS, OPTIMIZERS, Settings

    for field in dataclasses.fields(Settings):
        if field.name != "failures":
            line = next(line for line in done.stdout.splitlines() if f" --{field.name.replace('_', '-')} " in line)
            assert field.metadata["help"].split(";")[0] in line
            assert field.default is None or f"[default: {field.default}]" in line
    from robustkern.training.attacks import available_attacks
    from robustkern.training.data import DATA_SETS

    for name in (*available_attacks(), *DATA_SETS, *MODELS, *OPTIMIZERS):
        assert name in done.stdout
    assert "bomb" in done.stdout


def test_info_command() -> None:
    result = run("info")
    assert result.exit_code == 0
    for word in ("cpp", "numba", "reference", "available", "instruction sets", "threads"):
        assert word in result.output
    assert json.loads(run("info", "--json").stdout)["version"] == rk.__version__


def test_without_the_packages_of_the_command_line(tmp_path: Path) -> None:
    for package in ("typer", "rich", "safetensors"):
        blocked = tmp_path / package
        blocked.mkdir()
        (blocked / f"{package}.py").write_text(
            f"raise ModuleNotFoundError('No module named {package}', name='{package}')"
        )

        def without(*arguments: str, path: Path = blocked) -> Any:
            return python(*arguments, PYTHONPATH=str(path))

        done = without("info")
        assert done.returncode == 0, done.stderr
        assert f"robustkern {rk.__version__}" in done.stdout
        assert "threads: " in done.stdout
        assert json.loads(without("info", "--json").stdout)["version"] == rk.__version__
        assert without("--version").stdout == f"robustkern {rk.__version__}\n"
        for arguments in (("aggregate", "x.npz"), (), ("info", "--loud")):
            done = without(*arguments)
            assert done.returncode == 2
            assert done.stdout == ""
            assert (
                "all commands but `robustkern info` and `robustkern doctor` need: pip install 'robustkern[cli]'"
                in done.stderr
            )
            assert "Traceback" not in done.stderr


def test_what_starts_quickly_imports_nothing_heavy() -> None:
    code = (
        "import sys, robustkern.cli.commands; "
        "assert not {'torch', 'matplotlib', 'sklearn', 'numba'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    code = (
        "import sys; sys.modules['torch'] = None; import robustkern.cli.supervisor; assert 'typer' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_below_imports_the_command_line() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "cli" and path.name != "__main__.py":
            for node in ast.walk(ast.parse(path.read_text())):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
                assert not any(name.startswith("robustkern.cli") for name in names), path
                if path.parent.name == "measure":
                    assert not any(name.startswith("robustkern.training") for name in names), path


# ---- bars --------------------------------------------------------------------------------------------------------


def test_without_a_terminal_a_bar_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "LINES_S", 0.0)
    with console.bar("training", 4) as shown:
        shown.show(1, "median")
        shown.say("worker 3 is lost")
        shown.show(8)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [" 25% training: median", "worker 3 is lost", "100% training"]
    monkeypatch.setattr(console, "LINES_S", 100.0)
    with console.bar("training", 4) as bar:
        bar.show(3)
    assert capsys.readouterr().err == ""


def test_on_a_terminal_there_is_a_bar(tmp_path: Path) -> None:
    code = "from robustkern.cli.console import bar\nwith bar('training', 4) as b:\n    b.show(2, '[/x]')\n    b.say('lost [/x]')\n    import time; time.sleep(0.3)"
    main, other = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", code], stderr=other, env={**os.environ, "TERM": "xterm", "COLUMNS": "120"}, check=True
    )
    os.close(other)
    text = os.read(main, 100_000).decode()
    os.close(main)
    assert done.returncode == 0
    for part in ("training: [/x]", "2/4", "lost [/x]"):
        assert part in text


# ---- facts for machines ------------------------------------------------------------------------------------------


def test_scaling_prints_json_and_nothing_else(tmp_path: Path) -> None:
    arguments = ["--devices", "cpu", "--n", 8, "--d", "500", "--rules", "median", "--seconds", "1e-9"]
    result = run("scaling", "--out", tmp_path / "study", *arguments, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads((tmp_path / "study" / "results.json").read_text())


def test_train_prints_json_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    result = run("train", "--out", tmp_path / "run", "--model", "softmax", "--rounds", 20, "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["settings"]["rounds"] == 20
    assert [test["round"] for test in printed["tests"]] == [10, 20]
    assert printed["files"][0] == str(tmp_path / "run" / "log.jsonl")


def test_reproduce_prints_json_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from test_reproduce import TINY, as_promised, fake_times, made_up, measures_of

    from robustkern.training import reproduce

    facts = {name: "x" for name in ("cores", "machine", "isa", "python", "torch", "numpy", "robustkern")}
    facts |= {"sessions": [{"made": 1, "seconds": 60.0, "jobs": 2}], "samples": {"digits": 1400}}
    records = made_up(TINY, lambda s: 0.5, measures_of(as_promised))
    monkeypatch.setattr(reproduce, "QUICK", TINY)
    monkeypatch.setattr(reproduce, "reproduce", lambda *_, **__: (records, facts))
    monkeypatch.setattr(reproduce, "measure_times", lambda rounds: fake_times())
    for _ in range(2):  # the command goes on in its own folder
        result = run("reproduce", "--quick", "--out", tmp_path / "here", "--json")
        assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["runs"] == len(reproduce.runs_of(TINY))
    assert {"text", "where", "family", "verdict", "by"} == set(printed["claims"][0])
    assert Path(printed["files"][0]).name == "reproduction.md"


# ---- Ctrl-C, and readers that go away ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--rounds", "100000", "--model", "softmax", "--out", "o"),
        ("reproduce", "--jobs", "2", "--out", "o"),
        ("demo", "--rounds", "100000", "--out", "o"),
        ("bench", "--rules", "median", "--n", "4", "--d", "100000", "--rounds", "1000000", "--save", "o.json"),
        ("scaling", "--n", "64", "--d", "1e3..1e6:100", "--rules", "median", "--devices", "cpu", "--out", "o"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_an_interrupt_is_exit_code_130_without_a_traceback(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """As a terminal sends it: to the whole group of processes."""
    listening = (  # whatever started the tests: a job in the background ignores interrupts, and so do its children
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
        "os.execv(sys.executable, [sys.executable, '-m', 'robustkern', *sys.argv[1:]])"
    )
    started = subprocess.Popen(
        [sys.executable, "-c", listening, *arguments],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    made = {
        "train": "o/log.jsonl",
        "reproduce": "o/runs.jsonl",
        "demo": "o/merged.safetensors",
        "scaling": "o/.robustkern",
    }
    deadline = time.monotonic() + 100
    while arguments[0] in made and not (tmp_path / made[arguments[0]]).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(3)
    os.killpg(started.pid, signal.SIGINT)
    _, errors = started.communicate(timeout=60)
    assert started.returncode == 130, errors
    assert "Traceback" not in errors
    assert errors.splitlines()[-1] == "stopped"


def test_an_interrupt_before_the_command_begins() -> None:
    code = (
        "import sys\n"
        "class Pressed:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'robustkern.cli.commands': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Pressed())\n"
        "from robustkern.cli import main\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_are_no_error(tmp_path: Path, closed: str) -> None:
    write(tmp_path / "in", make_updates(), "safetensors")
    command = f"{sys.executable} -m robustkern"
    for arguments in ("aggregate in --f 2 --out out.safetensors", "rules", "info --json", "--version"):
        done = subprocess.run(
            ["sh", "-c", f"{command} {arguments} {closed}"],
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
    assert set(read(tmp_path / "out.safetensors")) == set(make_updates()[0])


def test_a_name_that_the_terminal_cannot_show_is_escaped(tmp_path: Path) -> None:
    np.save(tmp_path / "\u2603.npy", np.ones(3))
    arguments = ("aggregate", "\u2603.npy", "--rule", "mean", "--out", "\xfc.npy")
    done = python(*arguments, cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "\\u2603.npy" in done.stdout
    assert "-> \\xfc.npy" in done.stdout


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    for arguments in (
        ["info", "--json"],
        ["bench", "--rules", "median", "--n", "4", "--d", "100", "--rounds", "1"],
        ["-h"],
    ):
        read_end, write_end = os.pipe()
        os.close(read_end)
        started = subprocess.Popen(
            [sys.executable, "-m", "robustkern", *arguments], stdout=write_end, stderr=subprocess.PIPE, text=True
        )
        os.close(write_end)
        _, errors = started.communicate(timeout=100)
        assert "Traceback" not in errors
        assert "Broken" not in errors


# ---- folders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["demo", "train", "reproduce", "scaling"])
def test_a_folder_of_others_is_refused_and_left_alone(tmp_path: Path, command: str) -> None:
    names = ("updates/worker-00.safetensors", "updates/worker-99.safetensors", "merged.safetensors", "accuracy.png")
    names += ("log.jsonl", "runs.jsonl", "results.csv", "results.json", "checkpoint.safetensors")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    result = run(command, "--out", tmp_path, *(["--overwrite"] if command == "train" else []))
    assert result.exit_code == 2
    assert f"holds files of somebody else, which `robustkern {command}` does not touch (choose another" in said(result)
    assert sorted(tmp_path.rglob("*")) == before
    assert all((tmp_path / name).read_text() == "mine" for name in names)


@pytest.mark.parametrize("command", ["demo", "train", "reproduce", "scaling"])
def test_a_folder_of_another_command_or_none(tmp_path: Path, command: str) -> None:
    (tmp_path / ".robustkern").write_text("aggregate\n")
    result = run(command, "--out", tmp_path)
    assert result.exit_code == 2
    assert f"holds files of aggregate, which `robustkern {command}` does not touch" in said(result)
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        result = run(command, "--out", out)
        assert result.exit_code == 2
        assert "--out: expected a folder that can be written; got" in said(result)
        assert "choose another one" in said(result)


# ---- figures -----------------------------------------------------------------------------------------------------


def test_names_at_the_ends_of_lines_stay_apart_and_inside() -> None:
    for heights in ([0.5], [0.2, 0.21, 0.8], [0.99, 1.0, 1.0, 1.0], [0.0, 0.0, 0.01], list(np.linspace(0.4, 0.41, 9))):
        placed = style._apart(heights, 0.05)
        assert len(placed) == len(heights)
        assert min(np.diff(placed), default=1) >= 0.05 - 1e-12
        assert min(placed) >= 0
        assert max(placed) <= 1
    assert style._apart([0.1, 0.5, 0.9], 0.05) == [0.1, 0.5, 0.9]


def test_each_line_has_a_look_of_its_own() -> None:
    rules = [*style.KNOWN, "gram", "nnm | median", "multi_krum", "x", "y"]
    looks = style.looks(rules)
    assert len({(look["color"], look["linestyle"]) for look in looks.values()}) == len(rules)
    assert len({look["marker"] for look in looks.values()}) == len(rules)
    widths = [looks[rule]["linewidth"] for rule in rules]
    assert widths == sorted(widths, reverse=True)  # later ones are drawn over earlier ones
    assert style.looks(["median"])["median"]["color"] == looks["median"]["color"]
    assert len(style.looks(map(str, range(40)))) == 40


# ---- the demonstration -------------------------------------------------------------------------------------------


def test_demo(tmp_path: Path) -> None:
    result = run("demo", "--out", tmp_path / "demo", "--rounds", 60)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "demo" / "accuracy.png").read_bytes()[:4] == b"\x89PNG"
    assert len(list((tmp_path / "demo" / "updates").iterdir())) == 17
    merged = read(tmp_path / "demo" / "merged.safetensors")
    assert {k: v.shape for k, v in merged.items()} == {"weight": (10, 64), "bias": (10,)}
    assert result.output.count("dropped") == 8
    for others in ("updates/worker-99.safetensors", "notes.txt"):
        (tmp_path / "demo" / others).write_text("mine")
    again = run("demo", "--out", tmp_path / "demo", "--rounds", 2, "--json")
    assert again.exit_code == 0, again.output
    for others in ("updates/worker-99.safetensors", "notes.txt"):
        assert (tmp_path / "demo" / others).read_text() == "mine"
    printed = json.loads(again.stdout)
    assert len(printed["aggregate"]["workers"]) == 17
    assert {len(curve) for curve in printed["accuracy"].values()} == {2}
    assert all(row["seconds"] > 0 for row in printed["speed"])


def test_demo_shows_what_it_claims(tmp_path: Path) -> None:
    """CTMA lifts both bases under the attack; the mean and the bases alone do not learn."""
    from robustkern.cli.demo import BYZANTINE, Workers, accuracy, load_digits, new_model, step

    digits = load_digits(1)
    final = {}
    for rule in ("mean", "median", "geometric_median", "ctma(median)", "ctma(geometric_median)"):
        workers, model = Workers(digits, 1), new_model()
        for _ in range(60):
            model = step(model, rk.aggregate(workers.updates(model), rule, f=BYZANTINE))
        final[rule] = accuracy(model, digits)
    assert min(final["ctma(median)"], final["ctma(geometric_median)"]) > 0.85
    assert max(final["mean"], final["median"], final["geometric_median"]) < 0.8


def test_demo_gradient_is_the_derivative() -> None:
    from robustkern.cli.demo import gradient

    rng = np.random.default_rng(0)
    x, y = rng.random((6, 64)).astype(np.float32), rng.integers(0, 10, 6)
    model = {"weight": rng.standard_normal((10, 64)).astype(np.float32), "bias": np.zeros(10, np.float32)}

    def loss(weight: NDArray[Any]) -> float:
        scores = x.astype(float) @ weight.T.astype(float)
        return float((np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(6), y]).mean())

    direction = make_rows("normal", 10, 64, np.dtype(np.float64))
    ahead, behind = loss(model["weight"] + 1e-4 * direction), loss(model["weight"] - 1e-4 * direction)
    slope = (gradient(model, x, y)["weight"] * direction).sum()
    assert slope == pytest.approx((ahead - behind) / 2e-4, rel=1e-3)
