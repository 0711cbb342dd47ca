"""The documentation site: `make docs`. Pages about code are made from the code when it is built."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import pages  # noqa: E402

import robustkern  # noqa: E402

project = "robustkern"
author = copyright = "The robustkern developers"
version = release = robustkern.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["build"]
html_theme = "furo"
html_title = f"robustkern {version}"
html_theme_options = {"source_repository": "", "navigation_with_keys": True}
html_static_path: list[str] = []

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # types stand in the docstrings
autodoc_preserve_defaults = True
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
default_role = "code"


def _references(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Make references of a docstring items of a list: several on a page would have the same name."""
    for k, line in enumerate(lines):
        lines[k] = re.sub(r"\[(\d)\]_", r"[\1]", re.sub(r"^\.\. \[(\d)\] ", r"* [\1] ", line))


def setup(app: Any) -> None:
    """Make the pages that are made from code."""
    app.connect("autodoc-process-docstring", _references)
    pages.write(HERE / "made")
