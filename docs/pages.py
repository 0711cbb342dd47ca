"""Pages that are made from code: the command line, the gallery, and what stands at the top of the repository."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import typer.main
from drawings import draw

from robustkern.cli import app

__all__ = ["GALLERY", "commands", "write"]

HERE = Path(__file__).parent
GALLERY = sorted((HERE / "gallery").glob("*.py"))


def write(folder: Path) -> None:
    """Write all pages to a folder; a page that is as it was is not touched."""
    folder.mkdir(exist_ok=True)
    _put(folder / "commands.md", commands())
    _put(folder / "api.rst", api())
    draw(folder)
    for script in GALLERY:
        _put(folder / f"{script.stem}.md", example(script, folder))
    names = "\n".join(script.stem for script in GALLERY)
    introduction = (
        "# Gallery\n\nScripts that run as they stand, and draw what they found; with the extra `[plot]`, and what each "
        "imports.\n\n"
    )
    _put(folder / "gallery.md", f"{introduction}```{{toctree}}\n:maxdepth: 1\n\n{names}\n```\n")


def _put(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


MODULES = ("robustkern", "robustkern.kernels", "robustkern.distributed", "robustkern.training")


def api() -> str:
    """Return the reference of all public names."""
    parts = ["API", "===", ""]
    seen: set[int] = set()
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        parts += [module_name, "-" * len(module_name), "", f".. currentmodule:: {module_name}", ""]
        for name in sorted(module.__all__, key=lambda name: inspect.isclass(getattr(module, name))):
            thing = getattr(module, name)
            if id(thing) in seen or not callable(thing):
                continue
            seen.add(id(thing))
            kind = "autoclass" if inspect.isclass(thing) else "autofunction"
            if inspect.isclass(thing) and issubclass(thing, BaseException):
                kind = "autoexception"
            parts += [f".. {kind}:: {name}", *(["   :members:"] if kind == "autoclass" else []), ""]
    return "\n".join(parts)


def commands() -> str:
    """Return the reference of the command line."""
    group = typer.main.get_command(app)
    parts = ["# Command line\n", _text(group.help or "")]
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        parts += [
            f"\n## robustkern {name}\n",
            _text(command.help or ""),
            "\n| option | what | default |\n|---|---|---|",
        ]
        for param in command.params:
            spelled = ", ".join(f"`{option}`" for option in (*param.opts, *param.secondary_opts))
            if param.param_type_name == "argument":
                spelled = f"`{param.name.upper()}`"
            default = (
                ""
                if param.default is None or callable(param.default)
                else f"`{getattr(param.default, 'value', param.default)}`"
            )
            help_ = getattr(param, "help", None) or ""
            parts.append(f"| {spelled} | {_cell(help_)} | {_cell(default)} |")
    return "\n".join(parts) + "\n"


def _text(help_: str) -> str:
    return " ".join(help_.split("\n")).replace("<", "\\<").replace("*", "\\*")


def _cell(text: str) -> str:
    return (
        " ".join(text.split()).replace("|", "\\|").replace("<", "\\<")
        if not text.startswith("`")
        else text.replace("|", "\\|")
    )


def example(script: Path, folder: Path) -> str:
    """Run an example, which draws its picture, and return its page."""
    picture = folder / f"{script.stem}.png"
    if not picture.exists() or picture.stat().st_mtime < script.stat().st_mtime:
        subprocess.run([sys.executable, str(script), str(picture)], check=True, timeout=300)
    source = script.read_text()
    title, _, rest = (ast.get_docstring(ast.parse(source)) or script.stem).partition("\n")
    parts = (
        f"# {title.rstrip('.')}",
        rest.strip(),
        f"![{title}]({picture.name})",
        f"```{{literalinclude}} ../gallery/{script.name}\n:language: python\n```",
    )
    return "\n\n".join(parts) + "\n"
