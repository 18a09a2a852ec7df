"""Tokenised rows: made once, kept in ``datasets``' cache, mapped into memory by every process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
from datasets.exceptions import DatasetGenerationError
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from sfed import demo
from sfed.cli import UserError
from sfed.config import Config
from sfed.partition import Indices
from sfed.tasks import Pair, Task, checked_pair, read_rows, task_of

# Part of every cache key: raise it when the tokens of a row would come out differently.
_FORM_OF_TOKENS = "2"
_CALL_SETTINGS = {"truncation": None, "padding": None}
_ROWS_AT_ONCE = 1000
DEMO_TRAIN_PER_KIND, DEMO_EVAL_PER_KIND, DEMO_SEED = 400, 64, 0

Split = Literal["train", "eval"]
Place = tuple[str, str]
"""Where a row stands, for messages, and the part of a held-out set that it belongs to."""


class Row(NamedTuple):
    """One example."""

    ids: NDArray[np.int32]
    prompt_length: int
    """Leading tokens that are only read: the prompt, or the first of two texts."""
    target: float | None = None
    """The class or value to predict, where the completion is not what is learned."""


@dataclass(frozen=True)
class Tokens:
    """Rows of tokens without padding: row i is ``flat[starts[i]:starts[i + 1]]``."""

    flat: NDArray[np.int32]
    starts: NDArray[np.int64]
    prompt_lengths: NDArray[np.int32]
    """Leading tokens of a row that are read but not supervised: the prompt, or the first text."""
    keys: tuple[str, ...] | None
    """The value of ``partition.key`` in each row, where one is configured; else its class."""
    targets: NDArray[np.float64]
    """The class, value or final number of each row; NaN where there is none."""
    predicts_targets: bool
    """Whether the targets are what is learned, and not the completions."""
    parts: tuple[str, ...]
    """Names of the parts of a held-out set; one empty name where there are none."""
    part_of_row: NDArray[np.int64]
    """Number of the part that each row belongs to."""
    left_out: int
    """Rows without a completion, or with none of it within ``data.max_tokens``."""

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row."""
        return np.diff(self.starts)


@dataclass(frozen=True)
class Examples:
    """Some rows of a table: what one client holds of a split."""

    table: Tokens
    indices: Indices

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example."""
        return self.table.starts[self.indices + 1] - self.table.starts[self.indices]

    @property
    def targets(self) -> NDArray[np.float64]:
        """Target of each example, NaN where there is none."""
        return self.table.targets[self.indices]

    @property
    def parts(self) -> NDArray[np.int64]:
        """Part of the held-out set that each example belongs to."""
        return self.table.part_of_row[self.indices]

    def row(self, position: int) -> Row:
        """Return one example."""
        index, table = self.indices[position], self.table
        start, end = table.starts[index], table.starts[index + 1]
        target = float(table.targets[index]) if table.predicts_targets else None
        return Row(table.flat[start:end], int(table.prompt_lengths[index]), target)


def has_split(config: Config, split: Split) -> bool:
    """Whether the task or the configured files have this split of their own."""
    if split == "train" or config.files(split) or config.data.task == "demo":
        return True
    # Local training files come with local held-out files or with none.
    return not config.files("train") and bool(task_of(config).eval_splits)


def tokenise(
    config: Config, tokenizer: PreTrainedTokenizerFast, split: Split, files: tuple[str, ...]
) -> Tokens:
    """Return the tokens of a split, from the cache where they are there.

    Args:
        config: the run's configuration.
        tokenizer: of the backbone.
        split: which one.
        files: local files; empty = the task's own source.

    Raises:
        UserError: where a file or a row is wrong, with its place.
    """
    if files:
        source = _file_rows(files, f"data.{split}_files")
        identity = repr([_file_digest(name, f"data.{split}_files") for name in files])
    elif config.data.task == "demo":
        count = DEMO_TRAIN_PER_KIND if split == "train" else DEMO_EVAL_PER_KIND
        demo_rows = demo.rows(split, count, DEMO_SEED)
        source = (((f"demo row {i}", ""), row) for i, row in enumerate(demo_rows))
        identity = repr(demo_rows)
    else:
        source, identity = _hub_rows(config, split)
    try:
        dataset = datasets.Dataset.from_generator(
            lambda: _tokenised(config, tokenizer, source),
            features=datasets.Features(
                {
                    "ids": datasets.List(datasets.Value("int32")),
                    "prompt_length": datasets.Value("int32"),
                    "key": datasets.Value("string"),
                    "target": datasets.Value("float64"),
                    "part": datasets.Value("string"),
                }
            ),
            fingerprint=_digest(config, tokenizer, split, identity),
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    return _as_tokens(config, dataset, split)


def _digest(config: Config, tokenizer: PreTrainedTokenizerFast, split: Split, identity: str) -> str:
    """Digest of all that the tokens depend on: the key of the cache."""
    sha = hashlib.sha256()
    settings = (
        config.data.task,
        config.data.name,
        split,
        config.data.max_tokens,
        config.partition.key,
    )
    marks = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    sha.update(repr((_FORM_OF_TOKENS, settings, marks, identity)).encode())
    # Settings of the latest call, not of the vocabulary: the first call changes them.
    vocabulary = {**json.loads(tokenizer.backend_tokenizer.to_str()), **_CALL_SETTINGS}
    sha.update(json.dumps(vocabulary, sort_keys=True).encode())
    return sha.hexdigest()[:32]


def _file_digest(name: str, key: str) -> str:
    sha = hashlib.sha256()
    try:
        with Path(name).open("rb") as file:
            while chunk := file.read(1 << 20):
                sha.update(chunk)
        return sha.hexdigest()
    except OSError as error:
        raise UserError(f"{key}: {name!r} cannot be read ({error.strerror})") from None


def _file_rows(files: tuple[str, ...], key: str) -> Iterator[tuple[Place, Any]]:
    num_rows = 0
    for name in files:
        part = _part(Path(name).stem) if len(files) > 1 else ""
        for where, row in read_rows(Path(name)):
            num_rows += 1
            yield (where, part), row
    if not num_rows:
        raise UserError(f"{key}: {', '.join(files)} hold no rows")


def _part(name: str) -> str:
    """The name of a part as scores carry it: mismatched, of validation_mismatched."""
    return name.removeprefix("validation_")


def _hub_rows(config: Config, split: Split) -> tuple[Iterator[tuple[Place, Any]], str]:
    """Return the rows of a split of the task's data set on the hub, and what identifies them."""
    task = task_of(config)
    names = task.eval_splits if split == "eval" else ("train",)
    try:
        tables = [datasets.load_dataset(task.hub, task.hub_config, split=name) for name in names]
    except (OSError, ValueError) as error:
        raise UserError(
            f"data.task={config.data.task}: {task.hub} cannot be loaded from the hub "
            f"({' '.join(str(error).split())[:200]}); give data.train_files for local files"
        ) from None
    parts = [_part(name) if len(names) > 1 else "" for name in names]
    source = (
        ((f"{name} row {i}", part), row)
        for name, part, table in zip(names, parts, tables, strict=True)
        for i, row in enumerate(table)
    )
    return source, repr([table._fingerprint for table in tables])


def _tokenised(
    config: Config, tokenizer: PreTrainedTokenizerFast, rows: Iterable[tuple[Place, Any]]
) -> Iterator[dict[str, Any]]:
    """Tokenise row by row; a row with nothing to learn keeps its place, empty."""
    task, key = task_of(config), config.partition.key
    for some in _batched(rows, _ROWS_AT_ONCE):
        pairs = [checked_pair(task, row, where) for (where, _), row in some]
        encoded = _encode_for(task, config.data.max_tokens, pairs, tokenizer)
        for ((where, part), row), pair, (ids, prompt_length) in zip(
            some, pairs, encoded, strict=True
        ):
            yield {
                "ids": ids,
                "prompt_length": prompt_length,
                "key": None if key is None else _key_of(row, key, where),
                "target": pair.target,
                "part": part,
            }


def _encode_for(
    task: Task, max_tokens: int, pairs: list[Pair], tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[list[int], int]]:
    """Yield (token ids, leading tokens that are only read); no ids where nothing is to learn."""
    if task.is_classification:
        yield from _encode_texts(pairs, tokenizer, max_tokens)
        return
    for pair, (ids, prompt_length) in zip(pairs, _encode(pairs, tokenizer), strict=True):
        ids = ids[:max_tokens] if pair.completion.strip() else []
        # The first token of a row is never predicted, so it does not count as supervised.
        yield ids if len(ids) > max(prompt_length, 1) else [], prompt_length


def _batched(rows: Iterable[tuple[Place, Any]], size: int) -> Iterator[list[tuple[Place, Any]]]:
    some: list[tuple[Place, Any]] = []
    for row in rows:
        some.append(row)
        if len(some) == size:
            yield some
            some = []
    if some:
        yield some


def _key_of(row: Any, key: str, where: str) -> str:
    if key not in row:
        known = ", ".join(sorted(row))
        raise UserError(f"{where}: no column {key!r} (partition.key); the columns are {known}")
    return str(row[key])


def _encode(
    pairs: list[Pair], tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[list[int], int]]:
    """Yield (token ids with a closing eos, number of tokens that belong to the prompt alone).

    Prompt and completion are tokenised as one text, as they will be read later; a token that
    reaches into the completion belongs to it.
    """
    texts = [pair.prompt + pair.completion for pair in pairs]
    # verbose=False: rows that are too long are cut below, which is no news.
    encoded = tokenizer(
        texts, return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )
    for pair, ids, offsets in zip(
        pairs, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        end_of_prompt = len(pair.prompt)
        # Up to the first token of the completion; a closing special token has no span of its own.
        beyond = (i for i, (_, end) in enumerate(offsets) if end > end_of_prompt)
        prompt_length = next(beyond, len(offsets))
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids = [*ids, tokenizer.eos_token_id]
        yield ids, prompt_length


def _encode_texts(
    pairs: list[Pair], tokenizer: PreTrainedTokenizerFast, max_tokens: int
) -> Iterator[tuple[list[int], int]]:
    """Yield (token ids with the tokenizer's own marks, tokens before the second text).

    Tokenizers without a separator, such as LLaMA's, read both texts as one, a line each. The
    longer of two texts is cut first.
    """
    firsts = [pair.prompt for pair in pairs]
    seconds: list[str] | None = [pair.completion for pair in pairs]
    if not any(pair.completion for pair in pairs):
        seconds = None
    elif tokenizer.sep_token_id is None:
        firsts, seconds = [f"{pair.prompt}\n{pair.completion}" for pair in pairs], None
    encoded = tokenizer(
        firsts, seconds, truncation=True, max_length=max_tokens, return_attention_mask=False
    )
    for number, ids in enumerate(encoded["input_ids"]):
        of_text = encoded.sequence_ids(number)
        yield ids, of_text.index(1) if 1 in of_text else len(ids)


def _as_tokens(config: Config, dataset: datasets.Dataset, split: Split) -> Tokens:
    """Map the Arrow columns into numpy, without the rows that have nothing to learn."""
    task = task_of(config)
    ids: pa.ListArray = dataset.data.column("ids").combine_chunks()
    starts = ids.offsets.to_numpy()
    kept = np.flatnonzero(np.diff(starts) > 0)
    flat = ids.flatten().to_numpy()  # empty rows take no room in it
    lengths = np.diff(starts)[kept]
    if not len(kept):
        raise UserError(
            f"no row of the {split} data has a completion within data.max_tokens; raise it, or "
            "look at the rows"
        )
    targets = dataset.data.column("target").to_numpy().astype(np.float64)[kept]
    keys: list[str] | None = None
    if config.partition.key is not None:
        column = dataset.data.column("key").to_pylist()
        keys = [column[row] for row in kept]
    elif task.classes:
        keys = [task.classes[int(target)] for target in targets]
    parts, part_of_row = np.unique(
        np.asarray(dataset.data.column("part").to_pylist())[kept], return_inverse=True
    )
    return Tokens(
        flat=flat,
        starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        prompt_lengths=dataset.data.column("prompt_length").to_numpy()[kept],
        keys=None if keys is None else tuple(keys),
        targets=targets,
        predicts_targets=task.is_classification,
        parts=tuple(map(str, parts)),
        part_of_row=part_of_row,
        left_out=len(dataset) - len(kept),
    )
