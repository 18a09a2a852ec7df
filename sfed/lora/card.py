"""What a folder of an adapter says to people and programs beside PEFT's files: the model card.

``README.md`` says what was trained, on what, with which scores, how the model is prompted, and
shows the call that loads it. No file of PEFT names classes, so ``labels.json`` does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sfed.utils.files import write_changed
from sfed.utils.text import printable

LABELS_FILE, CARD_FILE = "labels.json", "README.md"
_SETTINGS = {
    "nf4": 'load_in_4bit=True, bnb_4bit_quant_type="nf4"',
    "int8": "load_in_8bit=True, llm_int8_threshold=0.0",
}
_MOST_NAMED = 20
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class ClassifierUse:
    """How the adapters of a classifier are loaded."""

    base_name: str
    """Hub id or folder of the base model."""
    labels: Sequence[str | int]
    """Of the classes in order; empty for a value."""
    dtype: str
    """Data type of the base model in training, as transformers names it: float32 or bfloat16."""
    max_tokens: int
    """Of a text in training."""
    example: str
    """What the tokenizer is given, as Python code."""
    pad_token_id: int | None = None
    """By which the base model finds the end of a text; perhaps it names none itself."""
    replaces_head: bool = False
    """Whether the base model has a head of other classes."""

    pipeline = "text-classification"

    def about(self, *, is_merged: bool) -> str:
        """What the files are, in two sentences."""
        named = ", ".join(f"`{printable(label)}`" for label in self.labels[:_MOST_NAMED])
        more = ", ..." if len(self.labels) > _MOST_NAMED else ""
        classes = f"{len(self.labels)} classes: {named}{more}" if self.labels else "one value"
        what = "LoRA adapter and classification head for" if not is_merged else "Classifier made of"
        return f"{what} `{self.base_name}`, trained with sfed. It predicts {classes}."

    def prompting(self) -> str:
        """How the model is prompted; a classifier is not."""
        return ""

    def code(self, *, is_merged: bool = False) -> str:
        """Python code that loads the adapter from the present folder, as ``model``."""
        if self.labels:
            reading = 'labels = json.load(open("labels.json", encoding="utf-8"))\n'
            classes = [
                "num_labels=len(labels)",
                "id2label={i: str(label) for i, label in enumerate(labels)}",
                "label2id={str(label): i for i, label in enumerate(labels)}",
            ]
            result = "labels[logits.argmax(dim=1).item()]"
        else:
            reading, classes, result = "", ["num_labels=1"], "logits.item()"
        arguments = ['"."', *([] if is_merged else classes), f'dtype="{self.dtype}"']
        if self.pad_token_id is not None and not is_merged:
            arguments.append(f"pad_token_id={self.pad_token_id}")
        if self.replaces_head and not is_merged:
            arguments.append("ignore_mismatched_sizes=True")  # of the head that is replaced
        return (
            f"{'import json' + chr(10) * 2 if self.labels else ''}"
            f"{_imports('SequenceClassification', is_merged)}\n"
            f"{reading}{_loading('SequenceClassification', arguments, is_merged)}"
            f"tokens = tokenizer({self.example}, truncation=True, max_length={self.max_tokens}, "
            'return_tensors="pt")\n'
            f"logits = model(**tokens).logits\nprint({result})\n"
        )


@dataclass(frozen=True)
class TextUse:
    """How the adapters of a language model are loaded and prompted."""

    base_name: str
    """Hub id or folder of the base model."""
    dtype: str
    """Data type of the base model in training, as transformers names it: float32 or bfloat16."""
    prompts: Sequence[tuple[str, str]] = ()
    """How a prompt is written, with the names of columns in braces, and when."""
    template_file: str | None = None
    """The chat template beside the card, where conversations were read."""
    end_marks: Sequence[str] = ()
    """The tokens that end an answer."""

    pipeline = "text-generation"

    def about(self, *, is_merged: bool) -> str:
        """What the files are, in a sentence."""
        what = "Language model made of" if is_merged else "LoRA adapter for"
        return f"{what} `{self.base_name}`, trained with sfed."

    def prompting(self) -> str:
        """How the model is prompted, as Markdown."""
        parts = []
        if self.template_file is not None:
            parts.append(
                f"Conversations are written by `{self.template_file}`, with which the adapter was "
                "trained; it may differ from the template of the base model.\n"
            )
        for prompt, condition in self.prompts:
            head = f"{condition[:1].upper()}{condition[1:]}:\n\n" if condition else ""
            shown = prompt if prompt else "(empty: the model continues a text from its start)"
            parts.append(f"{head}{fenced(shown, 'text')}")
        if not parts:
            return ""
        ends = " or ".join(f"`{mark}`" for mark in self.end_marks)
        parts.append(
            "`prompt_template.json` holds the same for programs. Nothing follows a prompt: no "
            "space and no line break that is not shown."
            + (f" An answer ends with {ends}." * bool(ends))
        )
        return "\n".join(parts) + "\n"

    def code(self, *, is_merged: bool = False) -> str:
        """Python code that loads the adapter from the present folder, as ``model``."""
        if self.template_file is not None:
            asking = (
                'turns = [{"role": "user", "content": "A question."}]\n'
                f'template = open("{self.template_file}", encoding="utf-8").read()\n'
                "tokens = tokenizer.apply_chat_template(\n"
                "    turns, chat_template=template, add_generation_prompt=True, return_dict=True,\n"
                '    return_tensors="pt",\n)\n'
            )
        else:
            prompt = self.prompts[0][0] if self.prompts else "A text."
            asking = (
                f"prompt = {prompt or 'Once'!r}  # fill in what is in braces\n"
                'tokens = tokenizer(prompt, return_tensors="pt")\n'
            )
        ends, arguments = "", ['"."', f'dtype="{self.dtype}"']
        if self.end_marks:
            ends = f"    eos_token_id=tokenizer.convert_tokens_to_ids({list(self.end_marks)!r}),\n"
        return (
            f"{_imports('CausalLM', is_merged)}\n"
            f"{_loading('CausalLM', arguments, is_merged)}"
            f"{asking}"
            "written = model.generate(\n    **tokens,\n    max_new_tokens=64,\n"
            f"    do_sample=False,\n{ends})\n"
            'answer = written[0, tokens["input_ids"].shape[1] :]\n'
            "print(tokenizer.decode(answer, skip_special_tokens=True))\n"
        )


Use = ClassifierUse | TextUse


@dataclass(frozen=True)
class ModelCard:
    """What ``README.md`` says of an adapter, or of a model that it was merged into."""

    use: Use
    facts: Sequence[tuple[str, str]] = ()
    """What was trained, on what, with which scores: names and values."""
    is_merged: bool = False
    """Whether the folder holds a whole model."""
    quantization: str = "none"
    """How the weights of the base model were stored in training; fp8 = how they were computed."""

    def write(self, folder: Path, name: str | None = None) -> None:
        """Write ``labels.json``, where there are classes, and ``README.md`` into a folder.

        Args:
            folder: that is there.
            name: of what it holds; None = its own.

        Raises:
            OSError: where a file cannot be written.
        """
        if isinstance(self.use, ClassifierUse) and self.use.labels:
            labels = json.dumps(list(self.use.labels), ensure_ascii=False)
            write_changed(folder / LABELS_FILE, f"{labels}\n")
        write_changed(folder / CARD_FILE, self._text(name or folder.name))

    def _text(self, name: str) -> str:
        about, prompting = self.use.about(is_merged=self.is_merged), self.use.prompting()
        parts = [f"{self._front()}# {name}\n\n{about}\n"]
        if self.facts:
            rows = "".join(f"| {_cell(key)} | {_cell(value)} |\n" for key, value in self.facts)
            parts.append(f"## Training\n\n| | |\n|---|---|\n{rows}")
        if prompting:
            parts.append(f"## Prompt\n\n{prompting}")
        code = fenced(self.use.code(is_merged=self.is_merged), "python")
        parts.append(
            f"## Use\n\nRun in this folder:\n\n{code}{_of_quantization(self.quantization)}"
        )
        parts.append(
            "## License\n\nNot stated. The license of the base model applies to what is made of "
            "it; state yours here and as `license:` at the top of this file before you share it.\n"
        )
        return "\n".join(parts)

    def _front(self) -> str:
        """What the hub reads; a folder of this machine is no model that it knows."""
        lines = [f"base_model: {json.dumps(self.use.base_name)}"] * is_hub_id(self.use.base_name)
        lines.append(f"library_name: {'transformers' if self.is_merged else 'peft'}")
        lines.append(f"pipeline_tag: {self.use.pipeline}")
        lines.append("tags:\n- lora\n- federated-learning\n- sfed")
        return "---\n" + "\n".join(lines) + "\n---\n\n"


def _of_quantization(scheme: str) -> str:
    """What there is to know of an adapter whose base model was quantised in training."""
    if scheme == "none":
        return ""
    if scheme == "fp8":
        return (
            "\nIn training the products of the base model's linear layers were computed in FP8 "
            "(e4m3, a scale per row; `backbone.compute=fp8`), and so are the losses above. The "
            "adapter loads on the plain base model, whose losses are near those.\n"
        )
    settings = _SETTINGS[scheme]
    return (
        f"\nIn training the weights of the base model's linear layers were stored as {scheme} "
        "codes of bitsandbytes. The adapter loads on the plain base model. On a base model that "
        f"is loaded with `BitsAndBytesConfig({settings})` its losses are near those of its "
        "training; some kernels of bitsandbytes round inputs or scales in addition.\n"
    )


def is_hub_id(name: str) -> bool:
    """Whether the name of a model is one of the hub, and not a folder of this machine."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name).is_dir()


def fenced(text: str, language: str) -> str:
    """Return a text as a fenced block of Markdown, whatever backticks it holds."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}{'' if text.endswith(chr(10)) else chr(10)}{fence}\n"


def _cell(text: str) -> str:
    return printable(text).replace("|", "\\|")


def _imports(kind: str, is_merged: bool) -> str:
    if is_merged:
        return f"from transformers import AutoModelFor{kind}, AutoTokenizer\n"
    return f"from peft import AutoPeftModelFor{kind}\nfrom transformers import AutoTokenizer\n"


def _loading(kind: str, arguments: Sequence[str], is_merged: bool) -> str:
    call = "".join(f"    {argument},\n" for argument in arguments)
    name = f"AutoModelFor{kind}" if is_merged else f"AutoPeftModelFor{kind}"
    base = '"."'
    finding = ""
    if not is_merged:
        base = "base"
        finding = "base = model.peft_config[model.active_adapter].base_model_name_or_path\n"
    return (
        f"model = {name}.from_pretrained(\n{call})\n{finding}"
        f"tokenizer = AutoTokenizer.from_pretrained({base})\n"
    )
