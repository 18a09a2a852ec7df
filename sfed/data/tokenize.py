"""How a record becomes tokens, and the tables of tokens that all processes read.

A prompt and its completion, or one or two texts with their marks, are encoded once, kept in
``datasets``' cache, and mapped into memory by every process.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
from datasets.exceptions import DatasetGenerationError
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from sfed.config.schema import Config
from sfed.data.partition import Indices, form_of_key, value_of
from sfed.data.sources import Place, source_of
from sfed.data.tasks import Pair, Task, checked_pair, task_of
from sfed.data.tokenizer import identity_of, unchanged
from sfed.files.listing import Split
from sfed.utils.errors import DataError

# Part of every cache key: raise it when the tokens of a row would come out differently.
_FORM_OF_TOKENS = "3"
_ROWS_AT_ONCE = 1000


class Encoded(NamedTuple):
    """The tokens of a pair."""

    ids: list[int]
    """Empty where nothing is to learn."""
    prompt_length: int
    """Leading tokens that are only read."""
    is_cut: bool
    """Whether the row had more tokens than are allowed."""


def encode(
    task: Task, max_tokens: int, pairs: list[Pair], tokenizer: PreTrainedTokenizerFast
) -> Iterator[Encoded]:
    """Yield the tokens of each pair, at most ``max_tokens``."""
    if task.is_classification:
        yield from _encode_texts(pairs, tokenizer, max_tokens)
        return
    for pair, (ids, prompt_length) in zip(
        pairs, _encode_completions(pairs, tokenizer), strict=True
    ):
        is_cut = len(ids) > max_tokens
        ids = ids[:max_tokens] if pair.completion.strip() else []
        # The first token of a row is never predicted, so it does not count as supervised.
        has_some = len(ids) > max(prompt_length, 1)
        yield Encoded(ids if has_some else [], prompt_length, is_cut)


def _encode_completions(
    pairs: list[Pair], tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[list[int], int]]:
    """Yield (token ids with a closing eos, number of tokens that belong to the prompt alone).

    Prompt and completion are tokenised as one text, as they will be read later; a token that
    reaches into the completion belongs to it. A text that holds the marks already, as one from a
    chat template does, begins with one bos and ends with one eos all the same.
    """
    texts = [pair.prompt + pair.completion for pair in pairs]
    # verbose=False: rows that are too long are cut later, which is no news.
    encoded = tokenizer(
        texts, return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for pair, ids, offsets in zip(
        pairs, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        end_of_prompt = len(pair.prompt)
        # Up to the first token of the completion; a closing special token has no span of its own.
        beyond = (i for i, (_, end) in enumerate(offsets) if end > end_of_prompt)
        prompt_length = next(beyond, len(offsets))
        more = _repeats(ids, bos)
        ids, prompt_length = ids[more:], prompt_length - min(more, max(prompt_length - 1, 0))
        supervised = ids[prompt_length:]
        ids = ids[: len(ids) - _repeats(supervised[::-1], eos)]
        if eos is not None and ids[-1:] != [eos]:
            ids = [*ids, eos]
        yield ids, prompt_length


def _repeats(ids: list[int], mark: int | None) -> int:
    """How often a mark stands at the start of some tokens, beyond once."""
    count = next((i for i, one in enumerate(ids) if one != mark), len(ids))
    return max(count - 1, 0)


def _encode_texts(
    pairs: list[Pair], tokenizer: PreTrainedTokenizerFast, max_tokens: int
) -> Iterator[Encoded]:
    """Yield the tokens with the tokenizer's own marks, the second text as what is not only read.

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
        ids, of_text = _without_repeated_marks(ids, encoded.sequence_ids(number))
        is_cut = bool(encoded.encodings[number].overflowing)
        yield Encoded(ids, of_text.index(1) if 1 in of_text else len(ids), is_cut)


def _without_repeated_marks(
    ids: list[int], of_text: list[int | None]
) -> tuple[list[int], list[int | None]]:
    """Take the marks out of the texts with which the tokenizer opens and closes them itself.

    Args:
        ids: of a row.
        of_text: which text each token is of; None for the tokenizer's own marks.
    """
    kept = set(range(len(ids)))
    for ahead in (range(len(ids)), range(len(ids) - 1, -1, -1)):
        first, marks = ahead[0] if ids else 0, set[int]()
        for i in ahead:
            if of_text[i] is None:  # the mark beside a text, and the outermost one
                marks = {ids[i], ids[first]} if of_text[first] is None else {ids[i]}
            elif ids[i] in marks:
                kept.discard(i)
            else:
                marks = set()
    return [ids[i] for i in sorted(kept)], [of_text[i] for i in sorted(kept)]


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
    """The value of ``partition.key`` in each row as text, where one is configured; else its
    class."""
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
    cut: int = 0
    """Rows that are kept and of which ``data.max_tokens`` has cut something off."""
    key_forms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The JSON forms (``partition.form_of_key``) of the values behind each text of ``keys``: more
    than one where values of two types read the same."""

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

    def digest(self) -> str:
        """Digest of what a client reads: tokens in order, what is supervised, and targets."""
        table, indices = self.table, self.indices
        blake = hashlib.blake2b(digest_size=8)
        for column in (self.lengths, table.prompt_lengths[indices], self.targets):
            blake.update(column.tobytes())
        for start, end in zip(table.starts[indices], table.starts[indices + 1], strict=True):
            blake.update(table.flat[start:end].tobytes())
        return blake.hexdigest()

    def row(self, position: int) -> Row:
        """Return one example."""
        index, table = self.indices[position], self.table
        start, end = table.starts[index], table.starts[index + 1]
        target = float(table.targets[index]) if table.predicts_targets else None
        return Row(table.flat[start:end], int(table.prompt_lengths[index]), target)


def tokenise(
    config: Config,
    tokenizer: PreTrainedTokenizerFast,
    split: Split,
    files: tuple[str, ...],
    tokenizer_identity: str | None = None,
) -> Tokens:
    """Return the tokens of a split, from the cache where they are there.

    Args:
        config: the run's configuration.
        tokenizer: of the backbone.
        split: which one.
        files: local files; empty = the task's own source.
        tokenizer_identity: as ``identity_of`` gives it, where several files are read: it takes half
            a second for a vocabulary of 32,000.

    Raises:
        DataError: where a file or a row is wrong, with its place.
    """
    source, identity = source_of(config, split, files)
    tokenizer_identity = tokenizer_identity or identity_of(tokenizer)
    try:
        # A process whose rows are in the cache never calls its tokenizer: both end as they began.
        with unchanged(tokenizer):
            dataset = datasets.Dataset.from_generator(
                lambda: _tokenised(config, tokenizer, source),
                features=datasets.Features(
                    {
                        "ids": datasets.List(datasets.Value("int32")),
                        "prompt_length": datasets.Value("int32"),
                        "key": datasets.Value("string"),
                        "target": datasets.Value("float64"),
                        "part": datasets.Value("string"),
                        "is_cut": datasets.Value("bool"),
                    }
                ),
                fingerprint=_digest(config, split, identity, tokenizer_identity),
            )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        raise
    return _as_tokens(config, dataset, split)


def _digest(config: Config, split: Split, source: str, tokenizer: str) -> str:
    """Digest of all that the tokens depend on: the key of the cache.

    Args:
        config: of the run.
        split: which one.
        source: identity of the rows.
        tokenizer: identity of the tokenizer.
    """
    sha = hashlib.sha256()
    settings = (
        config.data.task,
        config.data.name,
        split,
        config.data.max_tokens,
        config.partition.key,
    )
    sha.update(repr((_FORM_OF_TOKENS, settings, source)).encode())
    sha.update(tokenizer.encode())
    return sha.hexdigest()[:32]


def _tokenised(
    config: Config, tokenizer: PreTrainedTokenizerFast, rows: Iterable[tuple[Place, Any]]
) -> Iterator[dict[str, Any]]:
    """Tokenise row by row; a row with nothing to learn keeps its place, empty."""
    task, key = task_of(config), config.partition.key
    for some in _batched(rows, _ROWS_AT_ONCE):
        pairs = [checked_pair(task, row, where) for (where, _), row in some]
        encoded = encode(task, config.data.max_tokens, pairs, tokenizer)
        for ((where, part), row), pair, one in zip(some, pairs, encoded, strict=True):
            yield {
                **one._asdict(),
                "key": None if key is None else _key_of(row, key, where),
                "target": pair.target,
                "part": part,
            }


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
    """The value of a column as JSON, with its type."""
    value = json.dumps(value_of(row, key, where), default=str)
    try:
        str(json.loads(value)).encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{where}: {key!r} (partition.key) holds half a surrogate pair, which is no text"
        ) from None
    return value


def _as_tokens(config: Config, dataset: datasets.Dataset, split: Split) -> Tokens:
    """Map the Arrow columns into numpy, without the rows that have nothing to learn."""
    task = task_of(config)
    ids: pa.ListArray = dataset.data.column("ids").combine_chunks()
    starts = ids.offsets.to_numpy()
    kept = np.flatnonzero(np.diff(starts) > 0)
    flat = ids.flatten().to_numpy()  # empty rows take no room in it
    lengths = np.diff(starts)[kept]
    if not len(kept):
        raise DataError(
            f"no row of the {split} data has a completion within data.max_tokens; raise it, or "
            "look at the rows"
        )
    targets = dataset.data.column("target").to_numpy().astype(np.float64)[kept]
    keys: tuple[str, ...] | None = None
    key_forms: dict[str, tuple[str, ...]] = {}
    if config.partition.key is not None:
        column = dataset.data.column("key").to_pylist()
        keys, key_forms = _texts_of_keys([column[row] for row in kept])
    elif task.classes:
        keys = tuple(task.classes[int(target)] for target in targets)
        key_forms = {name: (name,) for name in task.classes}
    parts, part_of_row = np.unique(
        np.asarray(dataset.data.column("part").to_pylist())[kept], return_inverse=True
    )
    return Tokens(
        flat=flat,
        starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        prompt_lengths=dataset.data.column("prompt_length").to_numpy()[kept],
        keys=keys,
        targets=targets,
        predicts_targets=task.is_classification,
        parts=tuple(map(str, parts)),
        part_of_row=part_of_row,
        left_out=len(dataset) - len(kept),
        cut=int(np.count_nonzero(dataset.data.column("is_cut").to_numpy()[kept])),
        key_forms=key_forms,
    )


def _texts_of_keys(column: list[str]) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """Return each value, given as JSON, as text, and the forms of the values behind each text."""
    values = {value: json.loads(value) for value in column}
    texts = {value: str(inner) for value, inner in values.items()}
    forms: dict[str, set[str]] = {}
    for value, inner in values.items():
        forms.setdefault(texts[value], set()).add(form_of_key(inner))
    return tuple(texts[value] for value in column), {
        text: tuple(sorted(some)) for text, some in forms.items()
    }
