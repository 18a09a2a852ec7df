"""The prompts of the tasks as they are written, and the answers that follow them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from string import Formatter

from sfed.data.forms.pair import Pair, Row, text_of


@dataclass(frozen=True)
class Written:
    """How an example is written: what is filled in stands in braces."""

    prompt: str
    """What is read; of a classification task the first text."""
    completion: str = ""
    """What is learned, with eos behind it; of a classification task the second text."""
    condition: str = ""
    """When it is written so; empty = always."""

    def renamed(self, names: Mapping[str, str]) -> Written:
        """The same with other names of columns."""
        own = {name: f"{{{names.get(name, name)}}}" for name in self.columns}
        return replace(
            self, prompt=self.prompt.format(**own), completion=self.completion.format(**own)
        )

    @property
    def columns(self) -> set[str]:
        """The columns that are filled in."""
        return {name for _, name, _, _ in Formatter().parse(self.prompt + self.completion) if name}


QUESTION = Written("Question: {question}\nAnswer:", " {answer}")
_REQUEST = "Write a response that appropriately completes the request."
INSTRUCTION = Written(
    "Below is an instruction that describes a task. " + _REQUEST + "\n\n"
    "### Instruction:\n{instruction}\n\n"
    "### Response:\n",
    "{output}",
    "without an input",
)
"""The form in which Alpaca (tatsu-lab) was trained."""
INSTRUCTION_WITH_INPUT = Written(
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. " + _REQUEST + "\n\n"
    "### Instruction:\n{instruction}\n\n"
    "### Input:\n{input}\n\n"
    "### Response:\n",
    "{output}",
    "with an input",
)
PAIR = Written("{prompt}", "{completion}")
TEXT = Written("", "{text}")


def question(row: Row) -> Pair:
    """A question and its worked answer, without the space around them."""
    texts = {name: text_of(row, name).strip() for name in ("question", "answer")}
    return Pair(QUESTION.prompt.format(**texts), QUESTION.completion.format(**texts))


def instruction(row: Row) -> Pair:
    """An instruction with or without an input; null and "" are none."""
    context = row.get("input") or ""
    if not isinstance(context, str):
        raise TypeError(f"'input' holds {type(context).__name__}, not text")
    written = INSTRUCTION_WITH_INPUT if context else INSTRUCTION
    prompt = written.prompt.format(instruction=text_of(row, "instruction"), input=context)
    return Pair(prompt, text_of(row, "output"))
