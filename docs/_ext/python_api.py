"""Writes the reference of the public Python API into ``python-api.md`` at build time.

The text is each name's docstring, read from the source: nothing of sfed is imported but the list
of public names, so the build needs no torch.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sfed

if TYPE_CHECKING:
    from sphinx.application import Sphinx

PAGE = "python-api"
PLACE = "<!-- api -->"
"""The line of the page that the reference replaces."""
GROUPS = {
    "Configurations": ("load_config", "Config", "check"),
    "Runs": ("fit", "open_run", "RunRecord", "ClientRecord"),
    "Methods": (
        *("METHODS", "Method", "SentLayer", "CommonLayer", "LocalLayer"),
        *("lora_scaling", "effective_clients"),
    ),
    "Plans and reports": ("estimate", "write_report"),
    "Errors": (
        "UserError",
        "ConfigError",
        "DataError",
        "CheckpointError",
        "MissingProcessError",
        "DivergedError",
        "TrainingFailedError",
    ),
}
_MEMBERS = {
    "RunRecord": {
        *("folder", "name", "config", "method", "num_clients", "progress"),
        *("rounds", "clients", "scores", "adapters", "note"),
    }
}
"""Of a class with members that are not public."""
_INDENT = "   "
Node = ast.FunctionDef | ast.ClassDef | ast.AnnAssign | ast.Assign


def reference(app: Sphinx) -> str:
    """Return the reference as MyST Markdown with the directives of Sphinx's Python domain."""
    parts = []
    for title, names in GROUPS.items():
        entries = "\n".join("\n".join(_entry(name, app)) for name in names)
        parts.append(
            f"### {title}\n\n```{{eval-rst}}\n.. py:currentmodule:: sfed\n\n{entries}\n```\n"
        )
    return "\n".join(parts)


def source_of(name: str) -> tuple[Node, str]:
    """Return the definition of a public name and the docstring that belongs to it."""
    module, _, there = sfed.PLACES[name].partition(":")
    spec = find_spec(module)
    body = ast.parse(Path(str(spec and spec.origin)).read_text(encoding="utf-8")).body
    found = dict(_documented(body))
    return found[there or name]


def _documented(body: list[ast.stmt]) -> Iterator[tuple[str, tuple[Node, str]]]:
    """Yield each name that a body defines: (name, (definition, docstring))."""
    for statement, following in zip(body, [*body[1:], ast.Pass()], strict=True):
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            yield statement.name, (statement, ast.get_docstring(statement) or "")
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            text = following.value if isinstance(following, ast.Expr) else None
            is_text = isinstance(text, ast.Constant) and isinstance(text.value, str)
            yield statement.target.id, (statement, inspect.cleandoc(text.value) if is_text else "")


def _entry(name: str, app: Sphinx) -> Iterator[str]:
    node, text = source_of(name)
    if isinstance(node, ast.FunctionDef):
        yield from _directive("function", name + _signature(node), text, app)
    elif isinstance(node, ast.ClassDef):
        yield from _class(name, node, text, app)
    else:
        yield from _directive("data", name, text, app)


def _class(name: str, node: ast.ClassDef, text: str, app: Sphinx) -> Iterator[str]:
    is_error = name.endswith("Error")
    if is_error:
        base = ", ".join(ast.unparse(one) for one in node.bases)
        text = f"Base: ``{base}``. {text}"
    yield from _directive("exception" if is_error else "class", name, text, app)
    for member, (definition, about) in _documented(node.body):
        if member.startswith("_") or not about or member not in _MEMBERS.get(name, {member}):
            continue
        if isinstance(definition, ast.FunctionDef):
            is_property = any(ast.unparse(one) == "property" for one in definition.decorator_list)
            kind = "property" if is_property else "method"
            signature = member if is_property else member + _signature(definition)
            lines = _directive(kind, signature, about, app)
        else:
            lines = _directive("attribute", member, about, app)
        yield from (f"{_INDENT}{line}" if line else line for line in lines)


def _signature(node: ast.FunctionDef) -> str:
    """Return the arguments as text, without ``self`` and without the module of a type."""
    arguments = node.args
    if arguments.args and arguments.args[0].arg == "self":
        arguments.args = arguments.args[1:]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"({ast.unparse(arguments)}){returns}"


def _directive(kind: str, signature: str, text: str, app: Sphinx) -> Iterator[str]:
    """Yield the lines of a directive; sections such as ``Args:`` become fields."""
    from sphinx.ext.napoleon import GoogleDocstring

    yield f".. py:{kind}:: {signature}"
    yield ""
    for line in str(GoogleDocstring(text, app.config, app, what=kind)).splitlines():
        yield f"{_INDENT}{line}" if line.strip() else ""
    yield ""


def _insert(app: Sphinx, page: str, source: list[str]) -> None:
    if page == PAGE:
        source[0] = source[0].replace(PLACE, reference(app))


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension."""
    app.setup_extension("sphinx.ext.napoleon")
    app.connect("source-read", _insert)
    return {"parallel_read_safe": True}
