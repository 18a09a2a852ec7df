"""Sphinx settings. Nothing here needs torch, and the pages ask for nothing outside themselves."""

from __future__ import annotations

import sys
from pathlib import Path

_DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(_DOCS.parent), str(_DOCS / "_ext")]

import sfed  # noqa: E402  (of this checkout)

project = "sfed"
author = "The sfed developers"
release = version = sfed.__version__

extensions = ["myst_parser", "configuration_keys", "python_api"]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
nitpicky = True
# Types of other projects; their inventories are elsewhere, and the pages load nothing from there.
nitpick_ignore_regex = [("py:.*", r"(?!sfed).*")]

html_theme = "furo"
html_title = "sfed"
html_static_path = ["_static"]
html_css_files = ["sfed.css"]
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False
