"""Tokenised rows: made once, kept in ``datasets``' cache, mapped into memory by every process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
from sfed.tasks import TASKS, Pair, checked_pair, read_rows

# Part of every cache key: raise it when the tokens of a row would come out differently.
_FORM_OF_TOKENS = "1"
_CALL_SETTINGS = {"truncation": None, "padding": None}
_ROWS_AT_ONCE = 1000
DEMO_TRAIN_PER_KIND, DEMO_EVAL_PER_KIND, DEMO_SEED = 400, 64, 0

Split = Literal["train", "eval"]


@dataclass(frozen=True)
class Tokens:
    """Rows of tokens without padding: row i is ``flat[starts[i]:starts[i + 1]]``."""

    flat: NDArray[np.int32]
    starts: NDArray[np.int64]
    prompt_lengths: NDArray[np.int32]
    """Leading tokens of a row that are read but not supervised."""
    keys: tuple[str, ...] | None
    """The value of ``partition.key`` in each row, where one is configured."""
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

    def row(self, position: int) -> tuple[NDArray[np.int32], int]:
        """Return (token ids, number of leading unsupervised tokens) of one example."""
        index = self.indices[position]
        start, end = self.table.starts[index], self.table.starts[index + 1]
        return self.table.flat[start:end], int(self.table.prompt_lengths[index])


def has_split(config: Config, split: Split) -> bool:
    """Whether the task or the configured files have this split of their own."""
    if split == "train" or config.files(split) or config.data.task == "demo":
        return True
    # Local training files come with local held-out files or with none.
    return not config.files("train") and TASKS[config.data.task].eval_split is not None


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
        source = ((f"demo row {i}", row) for i, row in enumerate(demo_rows))
        identity = repr(demo_rows)
    else:
        hub_rows = _hub_rows(config, split)
        source = ((f"{split} row {i}", row) for i, row in enumerate(hub_rows))
        identity = hub_rows._fingerprint
    try:
        dataset = datasets.Dataset.from_generator(
            lambda: _tokenised(config, tokenizer, source),
            features=datasets.Features(
                {
                    "ids": datasets.List(datasets.Value("int32")),
                    "prompt_length": datasets.Value("int32"),
                    "key": datasets.Value("string"),
                }
            ),
            fingerprint=_digest(config, tokenizer, split, identity),
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    return _as_tokens(dataset, split, with_keys=config.partition.key is not None)


def _digest(config: Config, tokenizer: PreTrainedTokenizerFast, split: Split, identity: str) -> str:
    """Digest of all that the tokens depend on: the key of the cache."""
    sha = hashlib.sha256()
    settings = (config.data.task, split, config.data.max_tokens, config.partition.key)
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


def _file_rows(files: tuple[str, ...], key: str) -> Iterator[tuple[str, Any]]:
    num_rows = 0
    for name in files:
        for row in read_rows(Path(name)):
            num_rows += 1
            yield row
    if not num_rows:
        raise UserError(f"{key}: {', '.join(files)} hold no rows")


def _hub_rows(config: Config, split: Split) -> datasets.Dataset:
    task = TASKS[config.data.task]
    name = task.eval_split if split == "eval" else "train"
    try:
        return datasets.load_dataset(task.hub, task.hub_config, split=name)
    except (OSError, ValueError) as error:
        raise UserError(
            f"data.task={config.data.task}: {task.hub} cannot be loaded from the hub "
            f"({' '.join(str(error).split())[:200]}); give data.train_files for local files"
        ) from None


def _tokenised(
    config: Config, tokenizer: PreTrainedTokenizerFast, rows: Iterable[tuple[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Tokenise row by row; a row without a completion keeps its place, empty."""
    task, key = TASKS[config.data.task], config.partition.key
    for some in _batched(rows, _ROWS_AT_ONCE):
        pairs = [checked_pair(task, row, where) for where, row in some]
        keys = [None if key is None else _key_of(row, key, where) for where, row in some]
        encoded = _encode(pairs, tokenizer)
        for pair, (ids, prompt_length), value in zip(pairs, encoded, keys, strict=True):
            ids = ids[: config.data.max_tokens] if pair.completion.strip() else []
            # The first token of a row is never predicted, so it does not count as supervised.
            supervised = len(ids) - max(prompt_length, 1)
            yield {
                "ids": ids if supervised > 0 else [],
                "prompt_length": prompt_length,
                "key": value,
            }


def _batched(rows: Iterable[tuple[str, Any]], size: int) -> Iterator[list[tuple[str, Any]]]:
    some: list[tuple[str, Any]] = []
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


def _as_tokens(dataset: datasets.Dataset, split: Split, *, with_keys: bool) -> Tokens:
    """Map the Arrow columns into numpy, without the rows that have nothing to learn."""
    ids: pa.ListArray = dataset.data.column("ids").combine_chunks()
    starts = ids.offsets.to_numpy()
    kept = np.flatnonzero(np.diff(starts) > 0)
    flat = ids.flatten().to_numpy()  # empty rows take no room in it
    lengths = np.diff(starts)[kept]
    keys = dataset.data.column("key").to_pylist() if with_keys else None
    if not len(kept):
        raise UserError(
            f"no row of the {split} data has a completion within data.max_tokens; raise it, or "
            "look at the rows"
        )
    return Tokens(
        flat=flat,
        starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        prompt_lengths=dataset.data.column("prompt_length").to_numpy()[kept],
        keys=None if keys is None else tuple(keys[row] for row in kept),
        left_out=len(dataset) - len(kept),
    )
