"""What a folder of a classifier's adapter holds beside PEFT's files: its labels and how to load it.

No file of PEFT names classes, so ``labels.json`` does, and ``README.md`` shows the call that needs
them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sfed.utils.files import replacing

LABELS_FILE, CARD_FILE = "labels.json", "README.md"
_SETTINGS = {
    "nf4": 'load_in_4bit=True, bnb_4bit_quant_type="nf4"',
    "int8": "load_in_8bit=True, llm_int8_threshold=0.0",
}
_MOST_NAMED = 20


@dataclass(frozen=True)
class ClassifierCard:
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
    quantization: str = "none"
    """How the weights of the base model were stored in training."""
    started_from: str = ""
    """What the adapter started from, a line; empty where it started afresh."""

    def write(self, folder: Path) -> None:
        """Write ``labels.json``, where there are classes, and ``README.md`` into a folder.

        Raises:
            OSError: where a file cannot be written.
        """
        if self.labels:
            labels = json.dumps(list(self.labels), ensure_ascii=False)
            _write(folder / LABELS_FILE, f"{labels}\n")
        _write(folder / CARD_FILE, self._text(folder.name))

    def _text(self, name: str) -> str:
        named = ", ".join(f"`{label}`" for label in self.labels[:_MOST_NAMED])
        more = ", ..." if len(self.labels) > _MOST_NAMED else ""
        origin = f"Training {self.started_from}.\n\n" if self.started_from else ""
        about = f"{len(self.labels)} classes: {named}{more}" if self.labels else "one value"
        return (
            f"{_front(self.base_name)}# {name}\n\n"
            f"LoRA adapter and classification head for `{self.base_name}`, trained with sfed. "
            f"It predicts {about}.\n\n{origin}Run in this folder:\n\n"
            f"```python\n{self.code()}```\n{_of_quantization(self.quantization)}"
        )

    def code(self) -> str:
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
        arguments = ['"."', *classes, f'dtype="{self.dtype}"']
        if self.pad_token_id is not None:
            arguments.append(f"pad_token_id={self.pad_token_id}")
        if self.replaces_head:
            arguments.append("ignore_mismatched_sizes=True")  # of the head that is replaced
        call = "".join(f"    {argument},\n" for argument in arguments)
        return (
            f"{'import json' + chr(10) * 2 if self.labels else ''}"
            "from peft import AutoPeftModelForSequenceClassification\n"
            "from transformers import AutoTokenizer\n\n"
            f"{reading}model = AutoPeftModelForSequenceClassification.from_pretrained(\n{call})\n"
            "base = model.peft_config[model.active_adapter].base_model_name_or_path\n"
            "tokenizer = AutoTokenizer.from_pretrained(base)\n"
            f"tokens = tokenizer({self.example}, truncation=True, max_length={self.max_tokens}, "
            'return_tensors="pt")\n'
            f"logits = model(**tokens).logits\nprint({result})\n"
        )


def write_quantization(folder: Path, base_name: str, scheme: str) -> None:
    """Write the ``README.md`` of a language model's adapter, which says what it was trained on.

    Args:
        folder: of the adapter.
        base_name: name of the base model.
        scheme: nf4 or int8.

    Raises:
        OSError: where the file cannot be written.
    """
    about = f"LoRA adapter for `{base_name}`, trained with sfed.\n{_of_quantization(scheme)}"
    _write(folder / CARD_FILE, f"{_front(base_name)}# {folder.name}\n\n{about}")


def _front(base_name: str) -> str:
    return f"---\nbase_model: {json.dumps(base_name)}\nlibrary_name: peft\n---\n\n"


def _of_quantization(scheme: str) -> str:
    """What there is to know of an adapter whose base model was quantised in training."""
    if scheme == "none":
        return ""
    settings = _SETTINGS[scheme]
    return (
        f"\nIn training the weights of the base model's linear layers were stored as {scheme} "
        "codes of bitsandbytes. The adapter loads on the plain base model. On a base model that "
        f"is loaded with `BitsAndBytesConfig({settings})` its losses are near those of its "
        "training; some kernels of bitsandbytes round inputs or scales in addition.\n"
    )


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
