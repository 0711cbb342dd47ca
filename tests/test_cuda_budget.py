"""What the compiler made of the CUDA kernels is within csrc/cuda/budget.json; and what is not is reported (no GPU needed)."""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import budget
import pytest
from support import REQUIRED

MEDIAN = "_ZN2rk4cuda17select_by_networkI{}Li{}ELb1EEEvNS0_9SelectionE"
LIMITS = {
    "slack": 8,
    "columns": {
        "select_by_network<float, *, median>": {"32": 4, "64": 1},
        "select_by_network<double, *, median>": {"32": 2},
        "select_by_network<[HB]*, *, median>": {"16": 8, "32": 4},
        "weighted_sums<float, *>": {"0": 4},
    },
    "split_stores": [],
    "architectures": ["sm_80", "sm_90"],
    "limits": [{"kernels": "select_by_network<float, 4, median>", "shared": 2048, "registers": [70, 64]}],
}


# ---- the installed module ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiled_kernels_are_within_their_budget() -> None:
    try:
        module = budget.installed_module()
        for tool in ("cuobjdump", "nvdisasm"):
            budget.tool(tool)
    except FileNotFoundError as reason:
        if "cuda-static" in REQUIRED:
            pytest.fail(f"ROBUSTKERN_REQUIRE=cuda-static, but {reason}")
        pytest.skip(str(reason))
    limits = json.loads(budget.BUDGET.read_text())
    # Whoever builds for the GPU at hand alone is held to what is said of it; CI to everything.
    found = budget.problems(budget.read_module(module), limits, every="cuda-static" in REQUIRED)
    assert not found, "\n".join(found)


def test_budget_file_is_as_the_script_writes_it() -> None:
    text = budget.BUDGET.read_text()
    limits = json.loads(text)
    assert budget.written(limits) == text
    assert all(len(line["registers"]) == len(limits["architectures"]) for line in limits["limits"])


# ---- the checker -------------------------------------------------------------------------------------------------


def dumps(code: dict[str, int], mangled: str, registers: int, shared: int, stack: int) -> tuple[list[str], list[str]]:
    """Return what cuobjdump prints of one kernel, for two architectures: resources, and instructions."""
    resources, listing = [], []
    for architecture, reserved in ("sm_80", 0), ("sm_90", 1024):
        head = ["", "Fatbin elf code:", "================", f"arch = {architecture}", "code version = [1,8]", ""]
        resources += [*head, "Resource usage:", " Common:", "  GLOBAL:0", f" Function {mangled}:"]
        resources += [f"  REG:{registers} STACK:{stack} SHARED:{shared + reserved} LOCAL:0 CONSTANT[0]:440 TEXTURE:0"]
        listing += [*head, f"\tcode for {architecture}", f"\t\tFunction : {mangled}"]
        instructions = [name for name, count in code.items() for _ in range(count)]
        for at, instruction in enumerate(instructions):
            guard = ("", "@P0", "@!UP1")[at % 3]
            address, encoding = f"        /*{16 * at:04x}*/", "/* 0x00000a00ff017624 */"
            listing += [f"{address} {guard:>17} {instruction} R1, [R2.64] ;   {encoding}", " " * 88 + encoding]
        listing += ["\t\t.........."]
    return resources, listing


def kernels_of(
    code: dict[str, int], mangled: str = MEDIAN.format("f", 4), registers: int = 64, shared: int = 2048, stack: int = 0
) -> list[budget.Kernel]:
    resources, listing = dumps(code, mangled, registers, shared, stack)
    kernels, found = list(budget.read_resources(resources)), budget.read_code(listing)
    for kernel in kernels:
        kernel.code = found[kernel.architecture, kernel.mangled]
    return kernels


GOOD = {"LDG.E.64": 9, "LD.E.128": 4, "FMNMX": 32, "ST.E.128": 1, "LD.E": 20, "ST.E": 4, "EXIT": 1}


def test_what_is_read() -> None:
    kernels = kernels_of(GOOD | {"LDL.64": 1, "DFMA": 3, "FMNMX3": 2, "STG.E.ENL2.256": 1, "LDS.128": 5, "LDGSTS.E": 1})
    assert [kernel.architecture for kernel in kernels] == ["sm_80", "sm_90"]
    for k in kernels:
        assert k.name == "select_by_network<float, 4, median>"
        assert (k.registers, k.stack, k.shared, k.spills, k.fma64, k.min_max) == (64, 0, 2048, 1, 3, 36)
        assert (k.accesses(budget.LOADS, 16), k.accesses(budget.LOADS, 8), k.accesses(budget.LOADS, 4)) == (4, 9, 20)
        assert k.accesses(budget.STORES, 16) == 3
    (head, first, second) = budget.table(kernels)
    assert head.split()[0] == "regs"
    assert first.split()[:5] == ["sm_80", "select_by_network<float,", "4,", "median>", "64"]
    assert second.startswith("sm_90 ")


@pytest.mark.parametrize(
    ("mangled", "name"),
    [
        (MEDIAN.format("NS_4HalfE", 32), "select_by_network<Half, 32, median>"),
        ("_ZN2rk4cuda18select_by_countingIdLb1ELb0EEEvNS0_9SelectionE", "select_by_counting<double, weighted, reread>"),
        ("_ZN2rk4cuda13gram_productsINS_6BfloatEfLi24EEEvNS0_8GramArgsE", "gram_products<Bfloat, float, 24>"),
        ("_ZN2rk4cuda13weighted_sumsINS_6BfloatES2_Li4EEEvNS0_5TableEPKPvb", "weighted_sums<Bfloat, Bfloat, 4>"),
        ("_ZN2rk4cuda5plainEv", "plain"),
        ("_Z5otherv", "_Z5otherv"),
    ],
)
def test_names(mangled: str, name: str) -> None:
    assert budget.Kernel("sm_90", mangled, 0, 0, 0, 0).name == name


def test_an_argument_of_another_kind_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"cannot read follows \['float'\]"):
        budget.readable("_ZN2rk4cuda5otherIfLj3EEEv")


def test_good_kernels_pass() -> None:
    assert budget.problems(kernels_of(GOOD), LIMITS) == []
    assert budget.problems(kernels_of(GOOD, registers=72), LIMITS) == []  # the slack


@pytest.mark.parametrize(
    ("code", "resources", "message"),
    [
        ({"STL": 1, "LDL": 2}, {}, "spill instructions: found 3, allowed at most 0"),
        ({}, {"stack": 16}, "bytes of stack: found 16, allowed at most 0"),
        ({}, {"registers": 79}, "registers: found 79, allowed at most {registers}"),
        ({}, {"shared": 4096}, "bytes of shared memory: found 4096, allowed at most 2048"),
        ({"LD.E.128": 3, "LD.E": 24}, {}, "16-byte loads: found 3, allowed at least 4"),
        ({"LD.E.128": 0, "LD.E.64": 8}, {}, "16-byte loads: found 0, allowed at least 4"),
        ({"ST.E.128": 0, "ST.E.64": 2}, {}, "16-byte stores: found 0, allowed at least 1"),
        ({"FMNMX": 45}, {}, "min/max of the network: found 45, allowed 32 or 36 or 40 or 44"),
        ({"FMNMX": 31}, {}, "min/max of the network: found 31, allowed 32 or 36 or 40 or 44"),
    ],
)
def test_a_regression_is_reported_by_name(code: dict[str, int], resources: dict[str, int], message: str) -> None:
    found = budget.problems(kernels_of(GOOD | code, **resources), LIMITS)
    allowed = {"sm_80": 78, "sm_90": 72}
    assert found == [
        f"{a} select_by_network<float, 4, median>: {message.format(registers=allowed[a])}" for a in allowed
    ]


@pytest.mark.parametrize(
    ("mangled", "good", "bad", "message"),
    [
        (MEDIAN.format("d", 4), {"LD.E.128": 4, "DSETP.GEU.AND": 10, "DSETP.NEU.AND": 7, "ST.E.128": 1}, {"DSETP.GT.AND": 1},
         "select_by_network<double, 4, median>: comparisons of the network: found 11, allowed 10"),
        (MEDIAN.format("NS_4HalfE", 20), {"LD.E.64": 20, "LD.E.U16": 80, "FMNMX": 600}, {"LD.E.U16": 180},
         "select_by_network<Half, 20, median>: 2-byte loads: found 180, allowed at most 176"),
        (MEDIAN.format("NS_4HalfE", 12), {"LD.E.128": 12, "FMNMX": 480, "ST.E.128": 1}, {"FMNMX": 473},
         "select_by_network<Half, 12, median>: min/max of the network: found 473, allowed 480 or 464 or 488 or 472 or 496 or 504"),
        ("_ZN2rk4cuda13gram_productsIfdLi8EEEvNS0_8GramArgsE", {"FMNMX": 25, "FMNMX3": 1}, {"FMNMX": 26},
         "gram_products<float, double, 8>: min/max of the network: found 28, allowed 27"),
        ("_ZN2rk4cuda13weighted_sumsIfdLi4EEEvNS0_5TableE", {"LD.E.128": 7, "ST.E.128": 8}, {"ST.E.128": 7},
         "weighted_sums<float, double, 4>: 16-byte stores: found 7, allowed at least 8"),
    ],
)  # fmt: skip
def test_other_kernels(mangled: str, good: dict[str, int], bad: dict[str, int], message: str) -> None:
    limits = budget.updated(kernels_of(good, mangled), LIMITS)
    assert budget.problems(kernels_of(good, mangled), limits) == []
    assert budget.problems(kernels_of(good | bad, mangled), limits) == [f"sm_80 {message}", f"sm_90 {message}"]


def test_split_stores_are_excused_until_they_are_mended() -> None:
    limits: dict[str, Any] = LIMITS | {"split_stores": ["sm_80"]}
    split = kernels_of(GOOD | {"ST.E.128": 0})
    assert budget.problems(split[:1], limits, every=False) == []
    message = "sm_90 select_by_network<float, 4, median>: 16-byte stores: found 0, allowed at least 1"
    assert budget.problems(split, limits) == [message]
    mended = "sm_80: stores are 16 bytes wide again: take it out of split_stores"
    assert budget.problems(kernels_of(GOOD), limits) == [mended]


def test_what_does_not_fit_the_module_is_reported() -> None:
    kernels, sort = kernels_of(GOOD), kernels_of({"FMNMX": 38}, MEDIAN.format("f", 8).replace("Lb1", "Lb0"))
    assert budget.problems(kernels[:1], LIMITS) == ["sm_90: the module has no code for it"]
    assert budget.problems(kernels[:1], LIMITS, every=False) == []
    unknown = "select_by_network<float, 8, sort>: no limits (python bench/budget.py --update gives it some)"
    assert budget.problems(kernels + sort, LIMITS) == [f"sm_80 {unknown}", f"sm_90 {unknown}"]
    gone = "select_by_network<float, 4, median>: limits, but no such kernel (python bench/budget.py --update)"
    assert gone in budget.problems(sort, LIMITS)


def test_update() -> None:
    sort = kernels_of({"FMNMX": 38}, MEDIAN.format("f", 8).replace("Lb1", "Lb0"), registers=99)
    kernels = kernels_of(GOOD, registers=100) + sort
    limits = budget.updated(kernels, LIMITS)
    assert limits["limits"] == [
        {"kernels": "select_by_network<float, 4, median>", "shared": 2048, "registers": [100, 100]},
        {"kernels": "select_by_network<float, 8, sort>", "shared": 2048, "registers": [99, 99]},
    ]
    assert budget.problems(kernels, limits) == []
    assert json.loads(budget.written(limits)) == limits
    assert [line["kernels"] for line in budget.updated(sort, limits)["limits"]] == ["select_by_network<float, 8, sort>"]
    with pytest.raises(ValueError, match=r"no code for sm_90: build it for all architectures"):
        budget.updated(kernels[:1], LIMITS)


def test_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "budget.json"
    file.write_text(budget.written(LIMITS))
    monkeypatch.setattr(budget, "read_module", lambda module: kernels_of(GOOD, registers=100))
    assert budget.main(["--module", "any.so", "--check", str(file)]) == 1
    assert "2 problems\nsm_80 select_by_network<float, 4, median>: registers: found 100" in capsys.readouterr().out
    assert budget.main(["--module", "any.so", "--update", str(file)]) == 0
    assert budget.main(["--module", "any.so", "--check", str(file)]) == 0
    assert "2 kernels of sm_80, sm_90; 0 problems" in capsys.readouterr().out
    assert budget.main(["--module", "any.so", "--list", "float, 4"]) == 0
    assert "sm_90 select_by_network<float, 4, median>" in capsys.readouterr().out


def test_a_missing_tool_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install nvidia-cuda-nvdisasm, or put that of CUDA 13 on PATH"):
        budget.tool("nvdisasm")


# ---- the networks behind the counts ------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 4, 8, 12, 13])
def test_networks_sort(n: int) -> None:
    """By the zero-one principle; and what is left for the middle still finds the middle."""
    whole = budget.network(n)
    short = budget.without_repeats(whole)
    assert len(short) == len(whole) - {12: 1}.get(n, 0)
    for values in product((0, 1), repeat=n):
        x = list(values)
        for low, high in short:
            x[low], x[high] = min(x[low], x[high]), max(x[low], x[high])
        assert x == sorted(values)


def test_costs_of_networks() -> None:
    assert [len(budget.network(n)) for n in (4, 8, 16, 32, 64)] == [5, 19, 63, 191, 543]  # Knuth, TAOCP 5.3.4
    assert budget.cost(budget.network(64), range(64)) == (543, 2 * 543)
    assert budget.cost(budget.network(8), (3, 4)) == (17, 28)
    assert budget.cost(budget.network(8), ()) == (0, 0)
