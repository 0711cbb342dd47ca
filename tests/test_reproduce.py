"""The reproduction of the paper's comparisons: its plan, its runs and its page, at a size for tests."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from robustkern.training import reproduce as reproduction
from robustkern.training.reproduce import Plan, Record, measure_times, reproduce, train_once
from robustkern.training.reproduction_page import Comparison, Results, _no_worse, _verdict, compare, write_page
from robustkern.training.settings import Settings

TINY = Plan(
    rounds=6,
    seeds=2,
    attacks=("sign_flip", "alie"),
    optimizers=("mu2sgd", "momentum"),
    grid_optimizers=("mu2sgd", "momentum"),
    rates=(0.01, 0.1),
)


def made_up(plan: Plan, accuracy: Any) -> list[Record]:
    """Records of runs that nobody made."""
    return [
        {"settings": s.as_dict(), "accuracy": accuracy(s), "loss": 1.0, "failed": None, "seconds": {"total": 1.0}}
        for s in plan.runs()
    ]


def test_the_plan_is_the_papers_grid() -> None:
    runs = Plan().runs()
    assert len(runs) == len(set(runs))
    assert {(s.workers, s.byzantine) for s in runs} == {(17, 0), (17, 3), (17, 8)}
    assert {s.optimizer for s in runs} == {"mu2sgd", "momentum", "sgd"}
    assert {s.seed for s in runs} == {0, 1, 2}
    assert {s.attack for s in runs} == {"none", "sign_flip", "label_flip", "ipm(epsilon=0.1)", "alie"}
    rates = {s.lr for s in runs}
    assert max(rates) / min(rates) == 1000
    rules = {s.rule for s in runs if s.byzantine == 3}
    for base in ("mean", "median", "trimmed_mean", "geometric_median"):
        assert {base, f"ctma({base})", f"nnm | {base}", f"bucketing | {base}", f"ctma(nnm | {base})"} <= rules
    assert not any("bucketing" in s.rule for s in runs if s.byzantine == 8)  # buckets of one row


def test_runs_are_made_once_and_a_cut_file_is_mended(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    records, facts = reproduce(TINY, tmp_path, jobs=2, progress=lambda done, total: seen.append((done, total)))
    runs = TINY.runs()
    assert [record["settings"] for record in records] == [s.as_dict() for s in runs]
    assert seen[-1] == (len(runs), len(runs))
    assert [s["made"] for s in facts["sessions"]] == [len(runs)]
    path = tmp_path / "runs.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-2], '{"other": 1}', lines[-2][:30]]))
    (tmp_path / "sessions.jsonl").write_text((tmp_path / "sessions.jsonl").read_text() + '{"made": 7, "sec')
    again, facts = reproduce(TINY, tmp_path, jobs=1)
    assert [s["made"] for s in facts["sessions"]] == [len(runs), 2]
    other = dataclasses.replace(TINY, seeds=1, rounds=7, attacks=("alie",), byzantine=(3,), rates=(0.1,))
    reproduce(other, tmp_path, jobs=1)
    (tmp_path / "sessions.jsonl").unlink()
    assert reproduce(TINY, tmp_path, jobs=1)[1]["sessions"] == []  # nothing was lost, and nothing is made
    for a, b in zip(records, again, strict=True):
        assert (a["settings"], a["accuracy"]) == (b["settings"], b["accuracy"])  # also in another process
    pages = write_page(TINY, again, fake_times(), facts, tmp_path)
    text = pages[0].read_text()
    assert f"{len(runs) + 2} trainings were made in" in text
    for picture in pages[1:]:
        assert picture.stat().st_size > 10_000
        assert f"({picture.name})" in text
    for heading in ("## Claims", "### mu^2-SGD, delta = 0.18, learning rate 0.1", "### `ctma(median)`, delta = 0.47"):
        assert heading in text
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table
    assert "None of the trainings ended early." in text


def fake_times() -> list[Record]:
    rules = {rule: (0.001, 0.02) for rule in ("median", "ctma(median)")} | {"nnm | median": (0.004, 0.03)}
    return [{"model": "m", "d": 1000, "gradients": 0.01, "momenta": 1e-4, "momenta_naive": 5e-4, "rules": rules}]


def facts() -> dict[str, Any]:
    names = ("cores", "machine", "isa", "python", "torch", "numpy", "robustkern")
    return {**dict.fromkeys(names, "x"), "sessions": [{"made": 1, "seconds": 60.0, "jobs": 2}]}


def claims(text: str) -> dict[str, str]:
    table = text.split("## Claims")[1].split("## Rules", maxsplit=1)[0]
    rows = [re.split(r"(?<!\\)\|", line) for line in table.splitlines() if line.startswith("| ") and "---" not in line]
    return {row[1].strip(): row[2].strip() for row in rows[1:]}


def test_verdicts_follow_the_runs(tmp_path: Path) -> None:
    """Made-up runs in which every claim is true, and others in which every one is false."""
    worth = {"mu2sgd": 0.1, "momentum": 0.05, "sgd": 0.0}

    def good(s: Settings) -> float:
        form = 0.3 if s.rule.startswith("ctma(nnm") else 0.2 if "ctma" in s.rule else 0.15 if "|" in s.rule else 0.0
        steady = 0 if s.optimizer == "mu2sgd" or s.lr == 0.1 else -0.3
        return 0.5 + form + worth[s.optimizer] + steady - s.byzantine / 100

    plan = dataclasses.replace(TINY, optimizers=("mu2sgd", "momentum", "sgd"))
    held = claims(write_page(plan, made_up(plan, good), fake_times(), facts(), tmp_path)[0].read_text())
    assert set(held.values()) == {"held"}
    times = fake_times()
    times[0]["rules"]["ctma(median)"] = (0.005, 0.02)
    failed = claims(write_page(plan, made_up(plan, lambda s: 1 - good(s)), times, facts(), tmp_path)[0].read_text())
    assert len(failed) == len(held) == 16
    for claim, verdict in failed.items():
        if "needs less tuning" not in claim and "+CTMA" not in claim:
            assert verdict in ("the opposite held", "did not hold"), claim
    equal = claims(write_page(plan, made_up(plan, lambda s: 0.5), times, facts(), tmp_path)[0].read_text())
    for claim, verdict in equal.items():
        if "at least as good" not in claim and "no worse" not in claim and "costs less" not in claim:
            assert verdict in ("no clear difference", "mixed"), claim


def test_differences_that_are_clear() -> None:
    assert compare([([0.9, 0.9, 0.9], [0.8, 0.8, 0.8])])[:3] == (1, 0, 0)
    assert compare([([0.8, 0.8], [0.9, 0.9])])[:3] == (0, 1, 0)
    assert compare([([0.905, 0.905], [0.9, 0.9])])[:3] == (0, 0, 1)  # less than a point
    assert compare([([0.95, 0.85, 0.97], [0.8, 0.9, 0.85])])[:3] == (0, 0, 1)  # less than its error
    nothing = compare([])
    assert nothing.pairs == 0
    assert (_verdict(nothing), _no_worse(nothing)) == ("not tested", "not tested")


@pytest.mark.parametrize(
    ("counts", "better", "no_worse"),
    [
        ((10, 0, 0), "held", "held"),
        ((5, 1, 4), "held", "held mostly"),
        ((0, 6, 4), "the opposite held", "did not hold"),
        ((2, 0, 8), "no clear difference", "held"),
        ((4, 0, 6), "held in part", "held"),
        ((4, 3, 3), "mixed", "mixed"),
        ((1, 4, 5), "did not hold", "mixed"),
    ],
)
def test_verdicts(counts: tuple[int, int, int], better: str, no_worse: str) -> None:
    comparison = Comparison(*counts, 0.01, -0.1, 0.2)
    assert (_verdict(comparison), _no_worse(comparison)) == (better, no_worse)
    assert f"better in {counts[0]}, worse in {counts[1]}" in str(comparison)


def test_learning_rates_that_come_near_the_best() -> None:
    plan = dataclasses.replace(TINY, rates=(0.01, 0.1, 1.0))
    best = {"mu2sgd": {0.01: 0.91, 0.1: 0.95, 1.0: 0.5}, "momentum": {0.01: 0.2, 0.1: 0.9, 1.0: 0.89}}
    results = Results(plan, made_up(plan, lambda s: best[s.optimizer][s.lr]))
    assert results.tolerant_rates(3, "alie", "ctma(median)", "mu2sgd", 0.05) == 2
    assert results.tolerant_rates(3, "alie", "ctma(median)", "momentum", 0.06) == 2


def test_a_run_that_diverges_says_so() -> None:
    def bad(settings: Settings) -> Record:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reproduction.Simulation, "round", diverges)
            return train_once(settings)

    def diverges(self: Any) -> None:
        raise reproduction.RobustkernError("too many rows hold a NaN")

    record = bad(Settings(model="softmax", rounds=5))
    assert record["failed"] == "round 1: too many rows hold a NaN"
    assert record["loss"] is None
    assert 0 <= record["accuracy"] <= 1


def test_times_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduction, "_wide", lambda hidden, wide=reproduction._wide: wide(20))
    for entry in measure_times(rounds=1):
        assert entry["gradients"] > 0
        assert entry["momenta"] > 0
        assert all(ours > 0 and naive > 0 for ours, naive in entry["rules"].values())
    monkeypatch.setattr(reproduction, "naive_rules", lambda f: dict.fromkeys(["median"], lambda x: x[0] + 1))
    with pytest.raises(RuntimeError, match="median: the plain NumPy version differs"):
        measure_times(rounds=1)


def test_the_page_in_the_docs_is_of_the_full_plan() -> None:
    docs = Path(__file__).parent.parent / "docs"
    text = (docs / "reproduction.md").read_text()
    plan = Plan()
    assert f"{len(plan.runs())} trainings: scikit-learn's digits" in text
    assert f"{plan.rounds} rounds, {plan.seeds} seeds" in text
    assert len(claims(text)) == 16
    for name in re.findall(r"\((reproduction-[a-z]+\.png)\)", text):
        assert (docs / name).stat().st_size > 10_000


def lives(process: str) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False


def test_a_kill_leaves_nobody_behind(tmp_path: Path) -> None:
    """The processes of the pool end with the one that started them, and the same command goes on."""
    command = [sys.executable, "-m", "robustkern", "reproduce", "--quick", "--jobs", "2"]
    started = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    runs = tmp_path / "reproduction" / "runs.jsonl"
    deadline = time.monotonic() + 200
    while not (runs.exists() and runs.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    assert len(children) >= 2
    started.kill()
    started.wait()
    while any(map(lives, children)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(lives, children))
    assert runs.read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_quick_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "robustkern", "reproduce", "--quick", "--out", "out"],
        capture_output=True,
        text=True,
        timeout=850,
        cwd=tmp_path,
        check=False,
        env={**os.environ, "COLUMNS": "150"},
    )
    assert done.returncode == 0, done.stderr
    assert "out: reproduction.md, reproduction-rules.png, reproduction-rates.png" in done.stdout
    lines = (tmp_path / "out" / "runs.jsonl").read_text().splitlines()
    assert {json.loads(line)["settings"]["rounds"] for line in lines} == {100}
