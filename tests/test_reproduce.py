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

import numpy as np

import robustkern as rk
from robustkern.training import mechanism
from robustkern.training import reproduce as reproduction
from robustkern.training.reproduce import (
    FAMILIES,
    PARTS,
    QUICK,
    Grid,
    Mechanism,
    Part,
    Rates,
    Record,
    Turns,
    measure_times,
    reproduce,
    runs_of,
    train_once,
)
from robustkern.training.reproduction_page import (
    LEAST,
    Comparison,
    Results,
    _no_worse,
    _verdict,
    claims,
    compare,
    tolerant_rates,
    write_page,
)
from robustkern.training.settings import Settings

SHORT = dataclasses.replace(reproduction.DIGITS, rounds=6)
TINY: tuple[Part, ...] = (
    Mechanism("mechanism", dataclasses.replace(SHORT, rounds=45, rule="ctma(median)"), 1, ("ipm(epsilon=0.1)",)),
    Grid("rules", SHORT, 2, ("sign_flip", "alie"), ("mu2sgd", "momentum"), ("median",)),
    Rates("rates", dataclasses.replace(SHORT, rule="ctma(median)"), 2, ("alie",), ("mu2sgd", "sgd"), (0.01, 0.1)),
    Turns("turns", dataclasses.replace(reproduction.TURNS, rounds=6), 2, ("sign_flip",), ("mu2sgd", "sgd"),
          ("median", "ctma(median)")),
)  # fmt: skip


def made_up(parts: Any, accuracy: Any, measures: Any = None) -> list[Record]:
    """Records of runs that nobody made."""
    return [
        {"settings": s.as_dict(), "accuracy": accuracy(s), "loss": 1.0, "failed": None, "seconds": {"total": 1.0}}
        | ({"measures": measures(s)} if part.measured else {})
        for part in parts
        for s in part.runs()
    ]


def test_the_parts_are_the_papers_comparisons() -> None:
    named = {part.name: part for part in PARTS}
    assert list(named) == ["mechanism", "digits-rules", "digits-rates", "asynchronous", "mnist-rules", "mnist-rates"]
    runs = {name: part.runs() for name, part in named.items()}
    assert all(len(some) == len(set(some)) for some in runs.values())
    assert {s.split for s in runs["mechanism"]} == {"iid", "shards"}
    assert {s.split for name in list(runs)[1:] for s in runs[name]} == {"iid"}
    rules = runs["digits-rules"]
    assert {(s.workers, s.byzantine) for s in rules} == {(17, 4), (17, 8)}
    assert {s.optimizer for s in rules} == {"mu2sgd", "momentum"}
    assert {s.seed for s in rules} == {0, 1, 2, 3, 4}
    assert {s.attack for s in rules} == {attack for family in FAMILIES.values() for attack in family}
    of_four = {s.rule for s in rules if s.byzantine == 4}
    for base in ("median", "geometric_median"):
        assert {base, f"ctma({base})", f"nnm | {base}", f"bucketing | {base}", f"ctma(nnm | {base})"} <= of_four
    assert not any("bucketing" in s.rule for s in rules if s.byzantine == 8)  # buckets of one row
    assert len({s.lr for s in runs["digits-rates"]}) == 6
    assert {s.optimizer for s in runs["digits-rates"]} == {"mu2sgd", "momentum", "sgd"}
    assert {(s.data, s.model, s.rounds) for s in runs["mnist-rules"]} == {("mnist5k", "paper", 600)}
    assert {(s.arrivals, s.beta, s.gamma) for s in runs["asynchronous"]} == {("id^2", 0.25, 0.1)}
    assert {s.weights for s in runs["asynchronous"]} == {"equal", "updates"}
    assert len(runs_of(QUICK)) < 100


@pytest.mark.slow
def test_runs_are_made_once_and_a_cut_file_is_mended(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    count = len(runs_of(TINY))
    records, facts = reproduce(TINY, tmp_path, jobs=2, progress=lambda done, total: seen.append((done, total)))
    assert len(records) == count
    assert seen[-1] == (count, count)
    assert [s["made"] for s in facts["sessions"]] == [count]
    path = tmp_path / "runs.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-2], '{"other": 1}', lines[-2][:30]]))
    (tmp_path / "sessions.jsonl").write_text((tmp_path / "sessions.jsonl").read_text() + '{"made": 7, "sec')
    again, facts = reproduce(TINY, tmp_path, jobs=1)
    assert [s["made"] for s in facts["sessions"]] == [count, 2]
    one = (dataclasses.replace(TINY[2], seeds=1),)  # type: ignore[type-var]
    assert len(reproduce(one, tmp_path, jobs=1)[0]) == count  # a part of what is there
    assert len(path.read_text().splitlines()) == count
    by_run = [
        {reproduction.key_of(r["settings"], "measures" in r): r["accuracy"] for r in some} for some in (records, again)
    ]
    assert by_run[0] == by_run[1]  # also in another process
    pages = write_page(TINY, again, fake_times(), facts, tmp_path)
    text = pages[0].read_text()
    assert f"{count + 2} trainings were made in" in text
    for picture in pages[1:]:
        assert picture.stat().st_size > 10_000
        assert f"({picture.name})" in text
    headings = (
        "## Claims", "## Why", "## Rules: digits", "### digits, mu^2-SGD, delta = 0.24", "## Asynchronous training",
        "## Learning rates: digits, `ctma(median)`",
    )  # fmt: skip
    for heading in headings:
        assert f"{heading}\n" in text
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table
    assert "None of the trainings ended early." in text
    assert "so shards of 82 and a floor of batch / shard = 0.049 of the raw spread" in text


def fake_times() -> list[Record]:
    rules = {rule: (0.001, 0.02) for rule in ("median", "ctma(median)")} | {"nnm | median": (0.004, 0.03)}
    return [{"model": "m", "d": 1000, "gradients": 0.01, "momenta": 1e-4, "momenta_naive": 5e-4, "rules": rules}]


def measures_of(spread: Any, error: float = 0.5) -> Any:
    def made(settings: Settings) -> list[mechanism.Measure]:
        return [
            {
                "round": t,
                "raw": 1.0,
                "spread": spread(settings, t),
                "square": 1.0,
                "error": error,
                "bound": 1.0,
                "kept": 0,
            }
            for t in sorted(mechanism.measured_rounds(settings.rounds))
        ]

    return made


def as_promised(settings: Settings, t: int) -> float:
    return max(1 / t, 0.005) if settings.optimizer == "mu2sgd" else 1 / 19


def test_verdicts_follow_the_runs() -> None:
    """Made-up runs in which every claim is true, and others in which every one is false."""
    worth = {"mu2sgd": 0.1, "momentum": 0.05, "sgd": 0.0}

    def good(s: Settings) -> float:
        form = 0.3 if s.rule.startswith("ctma(nnm") else 0.2 if "ctma" in s.rule else 0.15 if "|" in s.rule else 0.0
        steady = 0 if s.optimizer == "mu2sgd" or s.lr == 0.1 or s.arrivals != "together" else -0.3
        weighed = 0.1 if s.weights == "updates" else -0.1
        return 0.5 + form + worth[s.optimizer] + steady + weighed - s.byzantine / 100

    parts = list(TINY)
    held = claims(parts, made_up(parts, good, measures_of(as_promised)), fake_times())
    assert {claim.verdict for claim in held} == {"held"}
    times = fake_times()
    times[0]["rules"]["ctma(median)"] = (0.005, 0.02)
    records = made_up(parts, lambda s: 1 - good(s), measures_of(lambda s, t: 0.5, error=1.5))
    failed = claims(parts, records, times)
    assert [claim[:3] for claim in failed] == [claim[:3] for claim in held]
    for claim in failed:
        if "needs less tuning" not in claim.text:
            assert claim.verdict in ("the opposite held", "did not hold"), claim
    equal = claims(parts, made_up(parts, lambda s: 0.5, measures_of(as_promised)), times)
    for claim in equal:
        if claim.family and "at least as good" not in claim.text:
            assert claim.verdict in ("no clear difference", "mixed"), claim


@pytest.mark.parametrize(
    ("optimizer", "factor", "verdict"),
    [("mu2sgd", 1.9, "held"), ("mu2sgd", 2.1, "did not hold"), ("mu2sgd", 0.4, "did not hold"),
     ("momentum", 1.4, "held"), ("momentum", 1.6, "did not hold"), ("momentum", 0.6, "did not hold")],
)  # fmt: skip
def test_the_spreads_laws_are_checked_on_both_sides(optimizer: str, factor: float, verdict: str) -> None:
    def spread(s: Settings, t: int) -> float:
        return as_promised(s, t) * (factor if s.optimizer == optimizer else 1)

    parts = [dataclasses.replace(TINY[0], base=dataclasses.replace(TINY[0].base, rounds=700))]  # type: ignore[type-var]
    found = claims(parts, made_up(parts, lambda s: 0.5, measures_of(spread)), fake_times())
    by_start = {claim.text.split("'s V")[0]: claim.verdict for claim in found if "'s V" in claim.text}
    assert by_start == {"mu^2-SGD": "held", "momentum": "held"} | {
        {"mu2sgd": "mu^2-SGD", "momentum": "momentum"}[optimizer]: verdict
    }


def test_differences_that_are_clear() -> None:
    assert compare([([0.9, 0.9, 0.9], [0.8, 0.8, 0.8])], 0.01)[:3] == (1, 0, 0)
    assert compare([([0.8, 0.8], [0.9, 0.9])], 0.01)[:3] == (0, 1, 0)
    assert compare([([0.905, 0.905], [0.9, 0.9])], LEAST["digits"])[:3] == (0, 0, 1)  # less than a point
    assert compare([([0.915, 0.915], [0.9, 0.9])], LEAST["digits"])[:3] == (1, 0, 0)
    assert compare([([0.915, 0.915], [0.9, 0.9])], LEAST["mnist5k"])[:3] == (0, 0, 1)  # less than two
    assert compare([([0.95, 0.85, 0.97], [0.8, 0.9, 0.85])], 0.01)[:3] == (0, 0, 1)  # less than its error
    nothing = compare([], 0.01)
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
    assert f"better in {counts[0]}, worse in {counts[1]} of 10" in str(comparison)


def test_learning_rates_that_come_near_the_best() -> None:
    part = Rates("r", SHORT, 2, ("alie",), ("mu2sgd", "momentum"), (0.01, 0.1, 1.0))
    best = {"mu2sgd": {0.01: 0.91, 0.1: 0.95, 1.0: 0.5}, "momentum": {0.01: 0.2, 0.1: 0.9, 1.0: 0.89}}
    results = Results(made_up([part], lambda s: best[s.optimizer][s.lr]))
    assert tolerant_rates(part, results, "alie", "mu2sgd", 0.05) == 2
    assert tolerant_rates(part, results, "alie", "momentum", 0.06) == 2


def test_what_is_measured_in_a_round() -> None:
    """Against the definitions, and the theorem: the error is never above the bound."""
    for seed in range(20):
        random = np.random.default_rng(seed)
        rows = random.standard_normal((9, 30)).astype(np.float32)
        rows[6:] = random.standard_normal(30) * 10 ** random.uniform(-1, 1)
        for rule in ("median", "geometric_median", "mean"):
            result, info = rk.ctma(rows, f=3, anchor=rule, return_info=True)
            found = mechanism.measure(rows, 6, result, rk.aggregate(rows, rule))
            mean = rows[:6].astype(np.float64).mean(axis=0)
            assert found["spread"] == pytest.approx(((rows[:6] - mean) ** 2).sum(axis=1).mean())
            assert found["square"] == pytest.approx(mean @ mean)
            assert found["error"] == pytest.approx(((result - mean) ** 2).sum(), rel=1e-5)
            assert found["kept"] == info.kept[6:].sum()
            assert found["error"] <= found["bound"]


def test_thresholds_are_where_rules_let_attackers_in() -> None:
    ratios = (0.03, 0.5, 3.0)
    found = mechanism.thresholds(ratios, byzantine=[8], epsilons=[0.1], seeds=2, d=2000)[8, 0.1]
    for rule, good in (("ctma(median)", 1), ("ctma(geometric_median)", 1), ("nnm | median", 2)):
        errors = found[rule]
        assert max(errors[:good]) < 1e-6
        assert min(errors[good:]) > 0.9
    assert 0.01 < found["median"][0] < found["median"][1] < found["median"][2]


def test_a_measured_training_is_the_same_training() -> None:
    settings = dataclasses.replace(SHORT, rounds=30, attack="ipm(epsilon=0.1)", rule="ctma(median)")
    plain, measured = train_once(settings), train_once(settings, measured=True)
    assert plain["accuracy"] == measured["accuracy"]
    assert [m["round"] for m in measured["measures"]] == [*range(1, 21), 25, 30]
    assert all(m["error"] <= m["bound"] for m in measured["measures"])


def test_a_run_that_diverges_says_so() -> None:
    def diverges(self: Any) -> None:
        raise reproduction.RobustkernError("too many rows hold a NaN")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("robustkern.training.simulation.Simulation.round", diverges)
        record = train_once(Settings(model="softmax", rounds=5))
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


def test_the_page_in_the_docs_is_of_all_parts() -> None:
    docs = Path(__file__).parent.parent / "docs"
    text = (docs / "reproduction.md").read_text()
    assert f"{len(runs_of(PARTS))} trainings of 17 workers: parts {', '.join(part.name for part in PARTS)}" in text
    empty = made_up(PARTS, lambda s: 0.5, measures_of(as_promised))
    for claim in claims(PARTS, empty, fake_times()):
        assert f"| {claim.text.replace('|', chr(92) + '|')} | {claim.where} |" in text, claim
    pictures = re.findall(r"\((reproduction-[a-z0-9-]+\.png)\)", text)
    assert len(pictures) == len(set(pictures)) == 2 + 3 + 1 + 3 + 1
    for name in pictures:
        assert (docs / name).stat().st_size > 10_000


def test_the_hard_claims_held_here() -> None:
    """What theory says of every round, and not of accuracies: were it otherwise, something would be wrong."""
    text = (Path(__file__).parent.parent / "docs" / "reproduction.md").read_text()
    hard = [line for line in text.splitlines() if "The error never exceeds" in line or "'s V over the raw V is" in line]
    assert len(hard) == 3
    assert all("| **held** |" in line for line in hard)


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
    command = [sys.executable, "-m", "robustkern", "reproduce", "--quick", "--out", "out"]
    run = {
        "capture_output": True,
        "text": True,
        "timeout": 850,
        "cwd": tmp_path,
        "env": {**os.environ, "COLUMNS": "150"},
    }
    wrong = subprocess.run([*command, "--part", "mechanism,x"], check=False, **run)  # type: ignore[call-overload]
    assert wrong.returncode == 2
    assert "--part: 'x' is not known (known: mechanism, digits-rules, digits-rates, asynchronous)" in wrong.stderr
    done = subprocess.run([*command, "--part", "mechanism"], check=False, **run)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    assert "out: reproduction.md, reproduction-mechanism.png, reproduction-thresholds.png" in done.stdout
    lines = (tmp_path / "out" / "runs.jsonl").read_text().splitlines()
    assert {json.loads(line)["settings"]["rounds"] for line in lines} == {60}
