"""A row of ``data.task=text``: which form it has, and what becomes of it. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sfed.config.sections.data import DataSection
from sfed.config.text_forms import FORMS, OPTIONAL, PromptTemplate, form_named, parsed
from sfed.data.forms import prompts
from sfed.data.forms.pair import Columns, Pair, Row, text_of
from sfed.data.forms.prompts import Written
from sfed.data.forms.turns import Turn, are_objects, turns_of
from sfed.utils import json_text

_MOST_NAMED = 8

Render = Callable[[Sequence[Turn], list[Any] | None], Pair]
"""Makes a conversation (turns, tools) what is read and learned; raises ValueError and TypeError."""


@dataclass(frozen=True)
class TextForms:
    """How the rows of a run are read."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """Our names of columns -> those of the rows, where they differ."""
    template: PromptTemplate | None = None
    render: Render | None = None
    """None where there is no tokenizer at hand: conversations cannot be read then."""

    @staticmethod
    def of(section: DataSection, render: Render | None = None) -> TextForms:
        """The forms of a configuration."""
        template = None if section.template is None else parsed(section.template)
        return TextForms(section.column_names, template, render)

    @property
    def expected(self) -> str:
        """The form of a row, for messages, in its own names of columns."""
        if self.template is not None:
            return ", ".join([*self.template.columns, self.columns.get("completion", "completion")])
        named = form_named(self.columns)
        forms = ("messages", "prompt", "instruction", "text") if named is None else (named,)
        return "; or ".join(
            ", ".join(
                self.columns.get(name, name) + " (may be missing)" * (name in OPTIONAL)
                for name in FORMS[form]
            )
            for form in forms
        )

    @property
    def written(self) -> tuple[Written, ...]:
        """How rows without conversations are written, in their own names of columns."""
        if self.template is not None:
            completion = self.columns.get("completion", "completion")
            return (Written(self.template.text, f"{{{completion}}}"),)
        forms = {
            "instruction": (prompts.INSTRUCTION, prompts.INSTRUCTION_WITH_INPUT),
            "text": (prompts.TEXT,),
            "prompt": (prompts.PAIR,),
            "messages": (),
        }
        named = form_named(self.columns)
        found = [one for form in forms if named in (None, form) for one in forms[form]]
        return tuple(one.renamed(self.columns) for one in found)

    def has_conversations(self, used_columns: Collection[str]) -> bool:
        """Whether columns of which something is used hold conversations."""
        return self.template is None and self.columns.get("messages", "messages") in used_columns

    def to_pair(self, row: Row) -> Pair:
        """Read a row; a column that holds null counts as not there.

        Raises:
            KeyError, TypeError, ValueError: where it is of no form, or of several.
        """
        row = row if isinstance(row, Columns) else Columns(row)
        if self.template is not None:
            prompt = self.template.fill(row)
            return Pair(prompt, text_of(row.renamed(self.columns), "completion"))
        if (form := form_named(self.columns)) is None:
            form = self._form_of(row)
        row = row.renamed(self.columns)
        if form == "messages":
            return self._conversation(row)
        if form == "instruction":
            return prompts.instruction(row)
        if form == "text":
            return Pair("", text_of(row, "text"))
        return Pair(text_of(row, "prompt"), text_of(row, "completion"))

    @staticmethod
    def _form_of(row: Row) -> str:
        making = {
            form: [name for name in names if name not in OPTIONAL] for form, names in FORMS.items()
        }
        there = [
            form for form, names in making.items() if any(row.get(n) is not None for n in names)
        ]
        if len(there) > 1:
            found = [n for form in there for n in making[form] if row.get(n) is not None]
            raise ValueError(
                f"it can be read in {len(there)} ways, since it holds {_listed(found)}; name the "
                "columns to read in data.columns, such as data.columns.text=text, or leave the "
                "columns of one form, or set the others to null"
                + (
                    " (data.task=alpaca reads instruction, input, output alone)"
                    * ("instruction" in there)
                )
            )
        # Where all are null, the first that is named tells what is wrong with it.
        named = there or [form for form, names in making.items() if any(n in row for n in names)]
        if not named and "conversations" in row:
            raise ValueError(
                "it holds 'conversations'; set data.columns.messages=conversations to read them"
            )
        if not named and row:
            raise ValueError(
                f"no key 'prompt': it holds {_listed(list(row)[:_MOST_NAMED])}; name its columns "
                "in data.columns, such as data.columns.prompt=question "
                "data.columns.completion=answer"
            )
        return named[0] if named else "prompt"

    def _conversation(self, row: Row) -> Pair:
        if self.render is None:
            raise ValueError("a conversation needs the chat template of a tokenizer")
        tools = row.get("tools")
        if isinstance(tools, str):  # as in data sets whose columns have one type
            try:
                tools = json_text.parse(tools)
            except ValueError as error:
                raise ValueError(f"'tools' is text and not JSON ({error})") from None
        if tools is not None and not are_objects(tools):
            raise TypeError("'tools' is no list of JSON schemas")
        return self.render(turns_of(row["messages"]), tools or None)


def _listed(names: Sequence[str]) -> str:
    *others, last = map(repr, names)
    return f"{', '.join(others)} and {last}" if others else last
