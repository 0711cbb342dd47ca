"""The layers of the package, the way of a call through them, and what type checkers see of its functions."""

from __future__ import annotations

import ast
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from call_path import CALLS, path_of

import robustkern as rk
from robustkern.backends import registry

PACKAGE = Path(rk.__file__).parent

#: What each layer may import of the package besides itself; "" is the package's own namespace, its public API.
LAYERS: dict[str, set[str]] = {
    "errors": {"untraced"},
    "lazy": set(),
    "scalars": set(),
    "untraced": set(),
    "contract": {"errors"},  # and nothing that is compiled
    "backends": {"contract", "errors", "scalars", "untraced", "_cpu", "_cuda"},
    "inputs": {"contract", "errors", "lazy", "_cpu"},
    "rules": {"contract", "errors", "lazy", "scalars"},
    "engine": {"contract", "errors", "backends", "rules", "scalars"},
    "functions": {"contract", "engine", "inputs", "rules", "untraced"},
    "kept": {"contract", "rules"},
    "server": {"engine", "errors", "functions", "inputs", "kept", "rules", "scalars"},
    "stream": {"engine", "errors", "functions", "inputs", "rules", "scalars"},
    "kernels": {"contract", "errors", "backends", "inputs", "scalars"},
    "products": {"contract", "backends", "engine", "rules"},
    "doctor": {"", "backends", "contract", "errors"},
    "files": {"contract", "errors", "backends", "engine", "inputs", "rules"},
}
_PUBLIC = {"", *LAYERS}
LAYERS |= {
    "adapters": {*_PUBLIC, "_jax"},  # of other frameworks
    "distributed": _PUBLIC,  # columns and rows on ranks
    "measure": {*_PUBLIC, "distributed"},
    "training": {*_PUBLIC, "measure"},
    "cli": {*_PUBLIC, "adapters", "distributed", "measure", "training"},
    "__init__": {
        "kernels",
        "backends",
        "engine",
        "errors",
        "files",
        "functions",
        "products",
        "rules",
        "server",
        "stream",
    },
    "__main__": {"cli"},
}


def imported(path: Path) -> set[str]:
    """Return the layers that a module imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "robustkern":
                names = [f"robustkern.{alias.name}" for alias in node.names if alias.name != "__version__"]
        else:
            continue
        for parts in (name.split(".") for name in names):
            if parts[0] == "robustkern":
                found.add(parts[1] if len(parts) > 1 else "")
    return found


def test_imports_go_one_way() -> None:
    modules = list(PACKAGE.rglob("*.py"))
    assert len(modules) > 50
    for path in modules:
        layer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        assert layer in LAYERS, f"{path.relative_to(PACKAGE)} belongs to no layer: name it in LAYERS"
        for name in imported(path) - {layer}:
            public = name in rk.__all__ and "" in LAYERS[layer]
            assert name in LAYERS[layer] or public, f"{path.relative_to(PACKAGE)} imports {name}"


def test_frameworks_are_imported_by_their_own_layers_only() -> None:
    for path in PACKAGE.rglob("*.py"):
        layer = path.relative_to(PACKAGE).parts[0]
        tree = ast.parse(path.read_text())
        at_import = {n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))}
        names = {
            name.split(".")[0]
            for node in at_import
            for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""])
        }
        if layer not in ("adapters", "distributed", "training"):
            assert not names & {"torch", "jax", "cupy", "flwr", "dask", "distributed", "fsspec", "ray"}, path


def test_nothing_reaches_through_the_view() -> None:
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        if path.name != "view.py":
            assert "._given" not in text, path
        assert "view.data" not in text, path


@pytest.mark.skipif(registry.info()["backends"]["cpp"] != "available", reason="no compiled backend")
def test_a_call_changes_files_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    """58 before the engine was one; `python tests/call_path.py` prints the way."""
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)  # where it is loaded, calls go around it
    changes = {name: len(path_of(call)) - 1 for name, call in CALLS.items()}
    assert changes["aggregate(x, 'geometric_median', f=1)"] < 25
    assert changes["aggregate(x, 'median')"] < 25


# ---- types -----------------------------------------------------------------------------------------------------------

RIGHT = """
from typing import assert_type

import numpy as np
import torch
from numpy.typing import NDArray

import robustkern as rk

x = np.zeros((5, 3), dtype=np.float32)
rows: list[NDArray[np.float64]] = [np.zeros(3)] * 5
t = torch.zeros(5, 3)
states = [{"w": t} for _ in range(5)]

a: NDArray[np.float32] = rk.median(x)
b: NDArray[np.float64] = rk.trimmed_mean(rows, f=2)
c: torch.Tensor = rk.ctma(t, f=1, anchor="median")
d: dict[str, torch.Tensor] = rk.aggregate(states, "nnm | krum", f=1)
e, info = rk.aggregate(x, rk.CTMA("median"), f=1, return_info=True)
e_is: NDArray[np.float32] = e
assert_type(info, rk.Info)
assert_type(info.weights, NDArray[np.float64] | None)
g, more = rk.bucketing(states, then=rk.Median(), size=2, seed=3, return_info=True)
assert_type(g, dict[str, torch.Tensor])
part: dict[str, torch.Tensor] = rk.ctma(
    states, f=1, anchor="median", only="w", exclude=["b*"], scope="leaf", dtype="float32", nonfinite="drop"
)
assert_type(rk.aggregate_files(["a.npz", "b.npz"], "median", out="c.npz", weights={"a": 1.0}, memory="1GiB"), rk.Info)
chain: rk.Chain = rk.NNM() | "median"
assert_type(rk.info()["backends"], dict[str, str])
assert_type(rk.info()["threads"], int)
"""
WRONG = {
    'rk.median(x, f="two")': "No overload variant",
    "rk.median(x, ff=1)": "No overload variant",
    "rk.median(x, retrun_info=True)": "No overload variant",
    'rk.aggregate(x, "median", retrun_info=True)': "No overload variant",
    'rk.aggregate(x, "median", f="two")': "No overload variant",
    'rk.median(x, even="upper")': "No overload variant",
    'rk.median(x, scope="layer")': "No overload variant",
    'rk.median(x, nonfinite="skip")': "No overload variant",
    "rk.median({})": "No overload variant",
    "y: tuple[int] = rk.median(x)": "Incompatible types",
    "z: np.ndarray = rk.median(x, return_info=True)": "Incompatible types",
    'rk.info()["thread"]': "has no key",
}


def mypy(path: Path) -> tuple[str, int]:
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--no-error-summary",
        "--cache-dir",
        str(path.parent / "cache"),
    ]
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, check=False, cwd=path.parent)
    return done.stdout + done.stderr, done.returncode


@pytest.mark.slow
def test_type_checkers_see_what_comes_back(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    pytest.importorskip("torch")
    script = tmp_path / "user.py"
    script.write_text(RIGHT)
    said, code = mypy(script)
    assert code == 0, said
    head = "import numpy as np\n\nimport robustkern as rk\n\nx = np.zeros((5, 3), dtype=np.float32)\n"
    script.write_text(head + "\n".join(WRONG) + "\n")
    said, code = mypy(script)
    assert code == 1
    for line, (call, message) in enumerate(WRONG.items(), start=head.count("\n") + 1):
        assert any(f"user.py:{line}: error" in told for told in said.splitlines()), (call, said)
        assert message in said


def test_warnings_point_at_the_callers_line(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.eye(5)

    monkeypatch.setitem(registry._loaded, "cpp", "not built (for this test)")
    calls = [lambda: rk.median(x), lambda: rk.aggregate(x, "median"), lambda: rk.kernels.gram(x)]
    for call in calls:
        monkeypatch.setattr(registry, "_warned", False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        assert [(w.filename, w.lineno) for w in caught] == [(__file__, call.__code__.co_firstlineno)]


@pytest.mark.skipif(not (PACKAGE.parent / ".git").exists(), reason="not in a checkout")
def test_nothing_else_lies_at_the_top() -> None:
    """What scripts leave where they are started is committed too easily."""
    command = ["git", "ls-files"]
    files = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=True).stdout.split("\n")
    folders = {name.split("/")[0] for name in files if "/" in name}
    assert folders == {".ci", ".github", "bench", "csrc", "docs", "packaging", "robustkern", "tests"}
