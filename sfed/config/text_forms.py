"""The forms that a record of ``data.task=text`` may have, and ``data.template``. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any

FORMS: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "tools"),
    "instruction": ("instruction", "output", "input"),
    "text": ("text",),
    "prompt": ("prompt", "completion"),
}
"""Form -> the columns it has."""
OPTIONAL = ("tools", "input")
"""Columns that a record of their form need not have, and that make no form by themselves."""
_RULE = (
    "write {name} for the column of that name, and {{ or }} for a brace; the name has no dots, "
    "brackets, ! or :"
)


def form_named(columns: Mapping[str, str]) -> str | None:
    """The form to which the columns of ``data.columns`` belong; None where it names none.

    Raises:
        ValueError: where they belong to several.
    """
    found = [form for form, names in FORMS.items() if set(names) & set(columns)]
    if len(found) > 1:
        raise ValueError(
            f"data.columns names {', '.join(columns)}, which belong to {len(found)} forms; name "
            "those of one: " + "; or ".join(", ".join(names) for names in FORMS.values())
        )
    return found[0] if found else None


def check(columns: Mapping[str, str], template: str | None) -> None:
    """Check ``data.columns`` and ``data.template``.

    Raises:
        ValueError: naming the key, the value and what it may be.
    """
    form_named(columns)
    for name, column in columns.items():
        others = [other for other, same in columns.items() if same == column and other != name]
        if others:
            raise ValueError(f"data.columns: {name} and {others[0]} are both {column!r}")
    if template is not None:
        parsed(template)
        if more := sorted(columns.keys() - {"completion"}):
            raise ValueError(
                f"data.columns names {', '.join(more)}, which data.template leaves without use: "
                "write the record's own columns into the template, and let data.columns name the "
                "completion alone"
            )


@dataclass(frozen=True)
class PromptTemplate:
    """A prompt as text and the names of columns in turn."""

    text: str
    """As it was given."""
    pieces: tuple[tuple[str, str | None], ...]
    """A text and the column that follows it; None where none does."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it names, each once, in order."""
        return tuple(dict.fromkeys(name for _, name in self.pieces if name is not None))

    def fill(self, row: Mapping[str, Any]) -> str:
        """Return the prompt of a row.

        A value is put in as it is: braces in it mean nothing.

        Raises:
            KeyError: where the row lacks a column.
            TypeError: where a value is neither text nor a number.
        """
        return "".join(
            text if name is None else text + _as_text(name, row[name]) for text, name in self.pieces
        )


def parsed(template: str) -> PromptTemplate:
    """Read a template.

    Only plain names are read: a format string could otherwise reach into the objects of a row.

    Raises:
        ValueError: where it is of another form, or names no column.
    """
    try:
        pieces = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"data.template = {template!r}: {error}; {_RULE}") from None
    for _, name, form, conversion in pieces:
        if name is not None and (form or conversion or not _is_plain(name)):
            raise ValueError(
                f"data.template = {template!r}: {name!r} is not the plain name of a column; {_RULE}"
            )
    found = PromptTemplate(template, tuple((text, name) for text, name, _, _ in pieces))
    if not found.columns:
        raise ValueError(f"data.template = {template!r} names no column; {_RULE}")
    return found


def _is_plain(name: str) -> bool:
    return bool(name.strip()) and not set(name) & set(".[]{}")


def _as_text(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        what = "null" if value is None else type(value).__name__
        raise TypeError(f"{name!r} holds {what}, not text or a number")
    return str(value)
