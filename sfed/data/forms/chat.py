"""Conversations through a chat template, and which characters of them are the assistant's.

A template that marks the assistant's words itself, by ``{% generation %}``, is followed. For any
other a turn is what the template adds for it: the text up to and with the turn, less the text
before it with the header that invites an answer. So the end mark of a turn is learned, and the
header, which is part of every prompt, is not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from sfed.config.sections.data import DataSection
from sfed.data.forms.pair import Pair, Span, conversation
from sfed.data.forms.text import Render
from sfed.data.forms.turns import Turn
from sfed.utils.errors import DataError
from sfed.utils.text import one_line

TODAY = date(2024, 7, 26)
"""What a template gets that asks for the date, so that the tokens of a row are the same on another
day: the date that LLaMA 3's own template falls back on."""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ASKS_FOR_DATE = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_SAID_IN_TURN = ("assistant", "user")
"""Roles whose words no template may leave out; a system turn has no place in some."""
_PROBE = ({"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"})


@dataclass(frozen=True)
class ChatTemplate:
    """A template with the special tokens that it may write."""

    source: str
    """Jinja, with the date put in."""
    special_tokens: Mapping[str, Any]
    last_only: bool = False
    """Whether the last assistant turn alone is learned."""

    def render(self, turns: Sequence[Turn], tools: list[Any] | None = None) -> Pair:
        """Render a conversation; what is not the assistant's is read only.

        A conversation whose learned turns are all empty has an empty completion.

        Raises:
            ValueError: where the template refuses it, or what the assistant said cannot be told.
        """
        places = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        if not places:
            raise ValueError("no turn of 'messages' has the role assistant, so nothing is learned")
        places = places[-1:] if self.last_only else places
        if _GENERATION.search(self.source):
            text, spans = self._marked(turns, tools)
            spans = spans[-1:] if self.last_only else spans
        else:
            text = self._text(turns, tools)
            spans = [self._added(text, turns, place, tools) for place in places]
        spans = [(start, end) for start, end in spans if end > start]
        if not spans or not any(_says_something(turns[place]) for place in places):
            return Pair(text, "", is_chat=True)
        return conversation(text, spans)

    def leaves_out(self, role: str, turns: Sequence[Turn], tools: list[Any] | None) -> bool | None:
        """Whether it writes the same whatever the turns of a role say.

        None where no turn of the role says anything, or only beside calls of tools.

        Raises:
            ValueError: where the template refuses the conversation.
        """
        spoken = [
            turn["role"] == role
            and bool((turn.get("content") or "").strip())
            and not turn.get("tool_calls")
            for turn in turns
        ]
        if not any(spoken):
            return None
        text = self._text(turns, tools)
        others = [
            {**turn, "content": f"again {turn['content']} again"} if says else turn
            for turn, says in zip(turns, spoken, strict=True)
        ]
        try:
            return self._text(others, tools) == text
        except ValueError:
            return False  # it has looked at what they say

    def prompt(self, turns: Sequence[Turn]) -> str:
        """Render a conversation up to where the assistant answers.

        Raises:
            ValueError: where the template refuses it.
        """
        return self._text(turns, None, add_generation_prompt=True)

    def end_of_turn(self) -> str:
        """What follows an answer within what is learned, such as <|im_end|>; "" for nothing."""
        try:
            pair = self.render(_PROBE)
        except ValueError:
            return ""
        learned = pair.completion[: pair.read[0][0] if pair.read else None]
        return learned.partition("answer")[2].strip()

    def _marked(self, turns: Sequence[Turn], tools: list[Any] | None) -> tuple[str, list[Span]]:
        texts, spans = self._rendered(turns, tools, return_assistant_tokens_mask=True)
        return texts[0], [(start, end) for start, end in spans[0]]

    def _added(self, text: str, turns: Sequence[Turn], place: int, tools: list[Any] | None) -> Span:
        """The span of a rendered conversation that the template adds for one assistant turn."""
        before = self._text(turns[:place], tools, add_generation_prompt=True)
        until = self._text(turns[: place + 1], tools)
        if not (text.startswith(until) and until.startswith(before)):
            raise ValueError(
                f"the chat template writes turn {place + 1} of 'messages' otherwise when others "
                "follow it or when it is asked for, so what the assistant said cannot be told; "
                "set data.chat_loss=last, or mark the assistant's words in data.chat_template by "
                "{% generation %} and {% endgeneration %}"
            )
        return len(before), len(until)

    def _text(
        self, turns: Sequence[Turn], tools: list[Any] | None, *, add_generation_prompt: bool = False
    ) -> str:
        texts, _ = self._rendered(turns, tools, add_generation_prompt=add_generation_prompt)
        return texts[0]

    def _rendered(
        self, turns: Sequence[Turn], tools: list[Any] | None, **settings: bool
    ) -> tuple[list[str], list[list[Span]]]:
        try:
            rendered: tuple[list[str], list[list[Span]]] = render_jinja_template(
                conversations=[list(turns)],
                tools=tools,
                chat_template=self.source,
                **settings,
                **self.special_tokens,
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise ValueError(f"the chat template refuses it: {one_line(error)}") from None
        return rendered


def _says_something(turn: Turn) -> bool:
    return bool((turn.get("content") or "").strip() or turn.get("tool_calls"))


def chat_template_of(
    section: DataSection, tokenizer: PreTrainedTokenizerFast, *, has_tools: bool = False
) -> ChatTemplate | None:
    """Return the template of a run: the configured one, or else the tokenizer's; None = neither.

    Args:
        section: of the configuration.
        tokenizer: of the backbone.
        has_tools: whether a conversation has tools, for which some tokenizers have a template of
            its own.

    Raises:
        DataError: where a configured file cannot be read, or a template asks for today's date in a
            way that cannot be told.
    """
    source = None
    if section.chat_template is not None:
        source = _configured(section.chat_template)
    elif tokenizer.chat_template is not None:
        source = tokenizer.get_chat_template(tools=[{}] if has_tools else None)
    if source is None:
        return None
    source = _ASKS_FOR_DATE.sub(lambda found: repr(TODAY.strftime(found[2])), source)
    if "strftime_now(" in source:
        raise DataError(
            "the chat template asks for today's date, with which the tokens of a row change from "
            "day to day; write a date into a copy of it and name that in data.chat_template"
        )
    return ChatTemplate(source, tokenizer.special_tokens_map, section.chat_loss == "last")


def end_mark(section: DataSection, tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The special token with which a turn of the assistant ends; None where there is none.

    Raises:
        DataError: as of ``chat_template_of``.
    """
    template = chat_template_of(section, tokenizer)
    end = "" if template is None else template.end_of_turn()
    first = tokenizer(end, add_special_tokens=False)["input_ids"][:1]
    special = [number for number in first if number in tokenizer.added_tokens_decoder]
    return special[0] if special else None


@dataclass(frozen=True)
class _TriedTemplate:
    """A template that is refused where it does not use what the turns say."""

    template: ChatTemplate
    name: str
    """What it is called in a message."""
    unseen: set[str] = field(default_factory=lambda: set(_SAID_IN_TURN))
    """Roles of which no turn has said anything yet."""

    def render(self, turns: Sequence[Turn], tools: list[Any] | None) -> Pair:
        """As of ``ChatTemplate``.

        Raises:
            ValueError: also where the template writes the same whatever a role says.
        """
        for role in sorted(self.unseen):
            leaves_out = self.template.leaves_out(role, turns, tools)
            if leaves_out:
                raise ValueError(
                    f"{self.name} writes the same whatever a turn of role {role!r} says: it does "
                    "not use its 'content'; set data.chat_template to the file of a template that "
                    "does"
                )
            if leaves_out is not None:
                self.unseen.remove(role)
        return self.template.render(turns, tools)


def renderer(section: DataSection, tokenizer: PreTrainedTokenizerFast) -> Render:
    """Return what renders the conversations of a run; templates are looked up where one comes.

    Raises:
        DataError: where a conversation comes and there is no template.
    """
    templates: dict[bool, _TriedTemplate] = {}
    is_own = section.chat_template is not None
    name = "data.chat_template: the template" if is_own else "the chat template of the tokenizer"

    def render(turns: Sequence[Turn], tools: list[Any] | None) -> Pair:
        has_tools = tools is not None
        if has_tools not in templates:
            found = chat_template_of(section, tokenizer, has_tools=has_tools)
            if found is None:
                raise DataError(
                    "'messages' needs a chat template and the tokenizer of model.name has none; "
                    "set data.chat_template to the file of one, or take the instruct variant of "
                    "the model"
                )
            templates[has_tools] = _TriedTemplate(found, name)
        try:
            return templates[has_tools].render(turns, tools)
        except ValueError as error:  # of this conversation, not of the form of the row
            raise DataError(str(error)) from None

    return render


def identity(section: DataSection, tokenizer: PreTrainedTokenizerFast) -> str:
    """All that the text of a conversation depends on besides its turns.

    Raises:
        DataError: where a configured file cannot be read.
    """
    configured = None if section.chat_template is None else _configured(section.chat_template)
    special = sorted(tokenizer.special_tokens_map.items())
    return repr((configured or tokenizer.chat_template, special, section.chat_loss))


def _configured(value: str) -> str:
    """A template that is given by itself, or by its file."""
    if "{" in value:
        return value
    try:
        return Path(value).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DataError(f"data.chat_template: {value!r} cannot be read ({reason})") from None
