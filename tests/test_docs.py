"""The documentation: its site builds without a warning, its examples run, its gallery draws what it says."""

from __future__ import annotations

import doctest
import importlib
import json
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import robustkern as rk
from robustkern.cli.commands import app

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", ["quickstart.md", "index.md", "architecture.md", "../README.md"])
def test_the_examples_of_a_page_run(page: str, own_rules: None) -> None:
    for module in ("flwr", "torch"):
        pytest.importorskip(module)
    found = blocks(DOCS / page)
    assert len(found) >= 1
    for block in found:  # each by itself
        names: dict[str, Any] = {}
        exec(block, names)


def test_the_first_example_of_the_readme_says_what_it_returns() -> None:
    for text in ((ROOT / "README.md").read_text(), (DOCS / "index.md").read_text()):
        (block,) = re.findall(r"```python\n(import numpy.*?)```", text, flags=re.S)[:1]
        *lines, last = block.strip().splitlines()
        names: dict[str, Any] = {}
        exec("\n".join(lines), names)
        call, said = last.split("  # ")
        assert repr(eval(call, names)) == said


def test_examples_in_docstrings(own_rules: None) -> None:
    found: dict[str, int] = {}
    for module in pkgutil.walk_packages(rk.__path__, "robustkern."):
        if module.name.rsplit(".", maxsplit=1)[-1] in ("_cpu", "_cuda", "_jax", "__main__"):
            continue
        source = Path(importlib.util.find_spec(module.name).origin)  # type: ignore[union-attr, arg-type]
        if ">>> " not in source.read_text():
            continue
        try:
            loaded = importlib.import_module(module.name)
        except ImportError:  # an extra that is not here
            continue
        found[module.name] = doctest.testmod(loaded, raise_on_error=True).attempted
    assert {"robustkern.functions", "robustkern.server", "robustkern.stream"} <= found.keys()
    assert sum(found.values()) > 40


def test_the_example_of_ranks_runs(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    (block,) = [text for text in blocks(DOCS / "distributed.md") if "torchrun" in text]
    assert block.rstrip().endswith("dist.destroy_process_group()")
    # Without what Python does as it exits: there a process with a hook in Python aborts now and then ("terminate called
    # without an active exception"), with torch's own `allreduce_hook` in 2 of 20 runs.
    (tmp_path / "this.py").write_text(f"{block}\nimport os\n\nos._exit(0)\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4", str(tmp_path / "this.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("as_json", [True, False])
def test_the_rule_of_the_gallery_can_be_imported(tmp_path: Path, as_json: bool) -> None:
    """By the command line, where reading it says and draws nothing."""
    command = [sys.executable, "-m", "robustkern", "rules", "--import", str(DOCS / "gallery" / "own_rule.py")]
    command += ["--json"] if as_json else []
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True, cwd=tmp_path)
    assert "tightest" in done.stdout
    if as_json:
        json.loads(done.stdout)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.xdist_group("site")
def test_the_site_builds(tmp_path: Path) -> None:
    """Without a warning; the gallery's scripts, which check what they say, run for it."""
    pytest.importorskip("sphinx")
    for module in ("furo", "myst_parser", "flwr", "jax", "torch", "sklearn", "matplotlib"):
        pytest.importorskip(module)
    docs = tmp_path / "docs"
    shutil.copytree(DOCS, docs, ignore=shutil.ignore_patterns("made", "__pycache__"))
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    site = tmp_path / "site"
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", str(docs), str(site)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    scripts = sorted((docs / "gallery").glob("*.py"))
    assert len(scripts) == 6
    for script in scripts:
        assert (site / "_images" / f"{script.stem}.png").stat().st_size > 5000
        assert (site / "made" / f"{script.stem}.html").exists()
    api = (site / "made" / "api.html").read_text()
    for name in rk.__all__:
        if callable(getattr(rk, name)):
            assert f'id="robustkern.{name}"' in api, name
    commands = (docs / "made" / "commands.md").read_text()
    for command_info in app.registered_commands:
        assert f"## robustkern {command_info.callback.__name__}" in commands  # type: ignore[union-attr]
    assert "`--weights-from`" in commands
    for page in site.glob("*.html"):
        # No page needs another server but for formulas.
        assert not [url for url in re.findall(r'(?:src|rel="stylesheet" href)="(https?://[^"]+)"', page.read_text()) if "mathjax" not in url], page  # fmt: skip
