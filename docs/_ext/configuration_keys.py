"""Writes the reference of all configuration keys into ``configuration.md`` at build time.

The text comes from the schema itself, so it cannot differ from what ``--help`` prints. Needs
neither torch nor Sphinx to be imported.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

from sfed.config.fields import MOST_COUNT
from sfed.config.load import list_keys
from sfed.config.schema import Config

if TYPE_CHECKING:
    from sphinx.application import Sphinx

PAGE = "configuration"
PLACE = "<!-- keys -->"
"""The line of the page that the keys replace."""
_BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
}


def keys_as_markdown() -> str:
    """Return one section per configuration section: each key with its type, default and meaning."""
    schema = Config.model_json_schema()
    parts = []
    for section, rows in groupby(list_keys(), key=lambda row: row[0].partition(".")[0]):
        parts.append(f"### `{section}`\n\n{_about(section, schema)}\n")
        parts += [_entry(key, default, meaning, schema) for key, default, meaning in rows]
    return "\n".join(parts)


def _entry(key: str, default: str, meaning: str, schema: dict[str, Any]) -> str:
    stated = "**required**" if default == "required" else f"default `{default}`"
    # The words that a key takes are its type already.
    text = " ".join(meaning.split()).partition(" One of ")[0]
    text = text.replace("*", r"\*").replace("<", r"\<")
    return f"`{key}` — {_type_of(key, schema)}; {stated}\n: {text}\n"


def _about(section: str, schema: dict[str, Any]) -> str:
    """Return what the schema says of a whole section; nothing for a key without one."""
    found = schema["properties"][section]
    reference = found.get("additionalProperties", found).get("$ref", "")
    return str(schema["$defs"][reference.rpartition("/")[2]]["description"]) if reference else ""


def _type_of(key: str, schema: dict[str, Any]) -> str:
    section, _, name = key.partition(".")
    found = schema["properties"][section]
    if name:
        of_section = found.get("additionalProperties", found)["$ref"].rpartition("/")[2]
        found = schema["$defs"][of_section]["properties"][name.rpartition(".")[2]]
    return _described(found)


def _described(kind: dict[str, Any]) -> str:
    """Return a JSON schema in words, such as "integer above 0"."""
    if "anyOf" in kind:
        return " or ".join(dict.fromkeys(map(_described, sorted(kind["anyOf"], key=_order))))
    if "const" in kind:
        return f"`{kind['const']}`"
    if "enum" in kind:
        return ", ".join(f"`{word}`" for word in kind["enum"])
    if kind.get("type") == "array":
        return _described_list(kind)
    if kind.get("type") == "object":
        return "mapping"
    bounds = [
        words.format(f"{kind[bound]:g}")
        for bound, words in _BOUNDS.items()
        if bound in kind and kind[bound] != MOST_COUNT  # the page says this one once
    ]
    return f"{kind['type']} {' and '.join(bounds)}".rstrip()


def _order(kind: dict[str, Any]) -> tuple[bool, bool]:
    """Sort single values before lists, and null to the end."""
    return kind.get("type") == "null", kind.get("type") == "array"


def _described_list(kind: dict[str, Any]) -> str:
    if "prefixItems" in kind:
        return f"list of {len(kind['prefixItems'])} {_described(kind['prefixItems'][0])}s"
    items = _described(kind["items"])
    noun, space, bounds = items.partition(" ")
    return f"list of {items}" if items.startswith("`") else f"list of {noun}s{space}{bounds}"


def _insert(_: Sphinx, page: str, source: list[str]) -> None:
    if page == PAGE:
        source[0] = source[0].replace(PLACE, keys_as_markdown())


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension."""
    app.connect("source-read", _insert)
    return {"parallel_read_safe": True}
