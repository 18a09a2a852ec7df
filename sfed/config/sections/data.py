"""The keys of the section ``data``: training and held-out data. Needs no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from sfed.config.fields import Count, Label, Locations, Section, as_list

CLASS_COLUMNS = ("text", "text_pair", "label")
"""What data.task=classification reads of a record."""
LEAST_LABELS, MOST_LABELS = 2, 1000

TextColumn = Literal[
    "messages",
    "tools",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "text",
    "text_pair",
    "label",
]


class DataSection(Section):
    """Training and held-out data."""

    task: Literal["demo", "gsm8k", "alpaca", "glue", "text", "jsonl", "classification"] = "demo"
    """Form of the examples. text (or its older name jsonl) = records with messages, with prompt and
    completion, with instruction, output and an optional input, or with text; glue needs data.name;
    classification = records with text, label and an optional text_pair."""
    name: Literal["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte"] | None = None
    """GLUE task, for data.task=glue only: each client trains a classification head and an
    adapter."""
    labels: Annotated[tuple[Label, ...] | None, BeforeValidator(as_list)] = None
    """Labels of data.task=classification in the order of the classes, all text or all integers.
    null = the labels of the training files, sorted."""
    train_files: Locations = None
    """Files with the training examples: names, a folder, a glob, or a list of them; .jsonl, .json,
    .csv and .tsv, each also as .gz or .zst, and .parquet. hub:org/name or hub:org/name:config = a
    data set of the hub, see data.split. {client} in a name stands for the number of a client, from
    0: one file per client. null = the data set of data.task."""
    eval_files: Locations = None
    """Files with held-out examples, named like train_files; with partition.kind=by_file one for
    each client, or a single one for all. null = the held-out split of the task's data set; with
    train_files or without such a split, data.eval_fraction of each client's training examples."""
    split: str | None = None
    """Split of a data set hub:org/name in train_files. null = train."""
    eval_split: str | None = None
    """Split of a data set hub:org/name in eval_files. null = test."""
    on_small_client: Literal["refuse", "skip"] = "refuse"
    """What happens with partition.kind=by_file to a file that holds too few examples to train on:
    refuse = the run does not start; skip = it is left out, and the report names it."""
    columns: dict[TextColumn, str] = Field(default_factory=dict)
    """Names of the columns, for data.task=text and classification: {prompt: question, completion:
    answer}, {text: note, label: diagnosis}. A record of text is then read in the form that these
    belong to; other columns keep their names."""
    template: str | None = None
    """Prompt, for data.task=text, with columns of the record in braces: "Q: {question} A:". {{ is a
    brace; quote a value that begins with one. The answer is the column completion, or the one that
    data.columns names for it."""
    chat_template: str | None = None
    """Chat template (Jinja) for records with messages: a file, or the template itself. null = the
    one of the tokenizer."""
    chat_loss: Literal["all", "last"] = "all"
    """Assistant turns of a conversation that the loss is computed on: all, or the last one."""
    max_tokens: Count = 512
    """Maximum length of a sequence in tokens; see data.on_long."""
    on_long: Literal["truncate", "drop", "error"] = "truncate"
    """What becomes of a sequence above data.max_tokens: truncate = its end is cut off, and it is
    dropped where no token of the answer is left; drop = it is dropped; error = the run is
    refused."""
    max_row_characters: Count = 1_000_000
    """Maximum length in characters of a line of a file and of the text of a row. Longer ones are
    refused before they are tokenised."""
    packing: bool = True
    """Place several short sequences of a client in one row where that is cheaper; they do not
    attend to each other. false = one padded row per sequence, as always for classification."""
    max_train_examples: Count | None = None
    """Maximum number of training examples: a random subset, drawn from the seed; with
    partition.kind=by_file of each file. null = all."""
    max_eval_examples: Count | None = None
    """Maximum number of held-out examples of all clients together: a random subset, drawn from the
    seed; with partition.kind=by_file of each file in data.eval_files. null = all."""
    eval_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Fraction of each client's training examples that is held out where there is no held-out
    split; above 0 and below 1."""

    @property
    def is_text(self) -> bool:
        """Whether records of one's own are read; jsonl is the older name of text."""
        return self.task in ("text", "jsonl")

    @property
    def column_names(self) -> dict[str, str]:
        """``columns`` as plain text."""
        return {str(name): column for name, column in self.columns.items()}


def check_labels(labels: tuple[Label, ...]) -> None:
    """Refuse labels that are no classes."""
    if len({type(label) for label in labels}) > 1:
        raise ValueError(f"data.labels={list(labels)} holds texts and integers; write them alike")
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ValueError(f"data.labels names {twice[0]!r} twice; name each label once")
    if not all(str(label).strip() for label in labels):
        raise ValueError("data.labels holds an empty text, which is no label")
    if not LEAST_LABELS <= len(labels) <= MOST_LABELS:
        raise ValueError(
            f"data.labels names {len(labels)} labels; a classification has {LEAST_LABELS} to "
            f"{MOST_LABELS}"
        )
