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
from sfed.data.forms import chat
from sfed.data.forms import encode as encoding
from sfed.data.forms.pair import Columns, Pair
from sfed.data.partition import Indices, form_of_key, value_of
from sfed.data.sources import Place, source_of
from sfed.data.tasks import checked_pair, task_of
from sfed.data.tokenizer import identity_of, unchanged
from sfed.files.listing import Split
from sfed.utils.errors import DataError

# Part of every cache key: raise it when what is kept of a row would come out differently.
_FORM_OF_TOKENS = "6"
_ROWS_AT_ONCE = 1000
# Of the texts of one call of the tokenizer, which no signal interrupts.
_CHARACTERS_AT_ONCE = 200_000
_FEATURES = datasets.Features(
    {
        "ids": datasets.List(datasets.Value("int32")),
        "prompt_length": datasets.Value("int32"),
        "gaps": datasets.List(datasets.Value("int32")),
        "whole_length": datasets.Value("int32"),
        "lost": datasets.Value("int32"),
        "key": datasets.Value("string"),
        "target": datasets.Value("float64"),
        "part": datasets.Value("string"),
        "columns": datasets.Value("string"),
    }
)
"""What is kept of a row in the cache."""


class Row(NamedTuple):
    """One example."""

    ids: NDArray[np.int32]
    prompt_length: int
    """Leading tokens that are only read: the prompt, or the first of two texts."""
    target: float | None = None
    """The class or value to predict, where the completion is not what is learned."""
    gaps: NDArray[np.int32] | None = None
    """(gaps, 2) first token, and the one after the last, of each stretch behind the prompt that is
    only read too, such as a user's next turn; None = there is none."""

    @property
    def is_learned(self) -> NDArray[np.bool_]:
        """(tokens,) which tokens are labels; the first of a row is one that nothing predicts."""
        learned = np.arange(len(self.ids)) >= self.prompt_length
        for start, end in () if self.gaps is None else self.gaps:
            learned[start:end] = False
        return learned

    @property
    def answer(self) -> slice:
        """The tokens of the last answer: all before them is the prompt to it."""
        start, end = self.prompt_length, len(self.ids)
        for first, stop in () if self.gaps is None else self.gaps:
            start, end = (start, int(first)) if stop == len(self.ids) else (int(stop), end)
        return slice(start, end)


@dataclass(frozen=True)
class Gaps:
    """Stretches behind the prompts that are only read: ``edges[starts[i]:starts[i + 1]]``."""

    edges: NDArray[np.int32]
    """(gaps, 2) first token of its row, and the one after the last."""
    starts: NDArray[np.int64]

    def of(self, index: int) -> NDArray[np.int32] | None:
        """The stretches of a row; None = there is none."""
        found = self.edges[self.starts[index] : self.starts[index + 1]]
        return found if len(found) else None


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
    """Rows without what they need, or with none of it within ``data.max_tokens``."""
    gone: int = 0
    """Rows left out that are longer than ``data.max_tokens``, whatever they hold."""
    is_cut: NDArray[np.bool_] | None = None
    """Which rows ``data.max_tokens`` has cut something off; None = none."""
    lost: NDArray[np.int32] | None = None
    """Tokens to learn that were cut off from each row; None = none."""
    key_forms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The JSON forms (``partition.form_of_key``) of the values behind each text of ``keys``: more
    than one where values of two types read the same."""
    gaps: Gaps | None = None
    """What is only read between answers; None where no row has such."""
    whole_lengths: NDArray[np.int32] | None = None
    """Tokens before truncation of all rows with a completion, of those left out too."""
    used_columns: frozenset[str] = frozenset()
    """Columns of which some row was read."""
    other_columns: frozenset[str] = frozenset()
    """Columns that some row holds and of which nothing was read there."""
    needs: str = "completion"
    """What a row is left out without."""

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
    def num_truncated(self) -> int:
        """Examples of which ``data.max_tokens`` has cut something off."""
        cut = self.table.is_cut
        return 0 if cut is None else int(np.count_nonzero(cut[self.indices]))

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
        if table.gaps is not None:
            for number, index in enumerate(indices):
                if (gaps := table.gaps.of(index)) is not None:
                    blake.update(np.int64(number).tobytes() + gaps.tobytes())
        return blake.hexdigest()

    def row(self, position: int) -> Row:
        """Return one example."""
        index, table = self.indices[position], self.table
        start, end = table.starts[index], table.starts[index + 1]
        target = float(table.targets[index]) if table.predicts_targets else None
        gaps = None if table.gaps is None else table.gaps.of(index)
        return Row(table.flat[start:end], int(table.prompt_lengths[index]), target, gaps)


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
    forms = ""
    if config.data.is_text:
        forms = repr((config.data.template, chat.identity(config.data, tokenizer)))
    try:
        # A process whose rows are in the cache never calls its tokenizer: both end as they began.
        with unchanged(tokenizer):
            dataset = datasets.Dataset.from_generator(
                lambda: _tokenised(config, tokenizer, source),
                features=_FEATURES,
                fingerprint=_digest(config, split, identity + forms, tokenizer_identity),
            )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        if isinstance(error.__cause__, OSError):
            raise _no_cache(error.__cause__) from None
        raise
    except OSError as error:  # of the files: what is read has errors of its own
        raise _no_cache(error) from None
    return _as_tokens(config, dataset, split)


def _no_cache(error: OSError) -> DataError:
    return DataError(
        f"the tokens cannot be written to {datasets.config.HF_DATASETS_CACHE}, the cache of "
        f"datasets ({error.strerror or error}); set HF_HOME or HF_DATASETS_CACHE to a folder that "
        "can be written to and has room"
    )


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
        "text" if config.data.is_text else config.data.task,
        config.data.name,
        split,
        config.data.max_tokens,
        config.data.on_long == "drop",
        config.partition.key,
        sorted(config.data.columns.items()),
        config.data.labels,
    )
    sha.update(repr((_FORM_OF_TOKENS, settings, source)).encode())
    sha.update(tokenizer.encode())
    return sha.hexdigest()[:32]


def _tokenised(
    config: Config, tokenizer: PreTrainedTokenizerFast, rows: Iterable[tuple[Place, Any]]
) -> Iterator[dict[str, Any]]:
    """Tokenise row by row; a row with nothing to learn keeps its place, empty."""
    task, key = task_of(config, chat.renderer(config.data, tokenizer)), config.partition.key
    encode = encoding.classified_texts if task.is_classification else encoding.learned_texts
    most, drops = config.data.max_row_characters, config.data.on_long == "drop"
    seen = ((place, Columns(row) if isinstance(row, Mapping) else row) for place, row in rows)
    read_rows = ((place, row, checked_pair(task, row, place[0], most)) for place, row in seen)
    for some in _batched(read_rows):
        encoded = encode([pair for _, _, pair in some], tokenizer, config.data.max_tokens)
        for ((where, part), read, pair), one in zip(some, encoded, strict=True):
            if drops and one.whole_length > config.data.max_tokens:
                one = one._replace(ids=[])
            yield {
                **one._asdict(),
                "gaps": one.gaps if one.ids else [],
                "key": None if key is None else _key_of(read.plain, key, where),
                "target": pair.target,
                "part": part,
                "columns": json.dumps([sorted(read.used), sorted({*read} - read.used)]),
            }


def _batched(rows: Iterable[tuple[Place, Any, Pair]]) -> Iterator[list[tuple[Place, Any, Pair]]]:
    """Gather rows for one call of the tokenizer: bounded, since it cannot be interrupted."""
    some: list[tuple[Place, Any, Pair]] = []
    characters = 0
    for row in rows:
        length = len(row[2].prompt) + len(row[2].completion)
        if some and (len(some) == _ROWS_AT_ONCE or characters + length > _CHARACTERS_AT_ONCE):
            yield some
            some, characters = [], 0
        some.append(row)
        characters += length
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
    task, table = task_of(config), dataset.data
    ids: pa.ListArray = table.column("ids").combine_chunks()
    starts = ids.offsets.to_numpy()
    kept = np.flatnonzero(np.diff(starts) > 0)
    flat = ids.flatten().to_numpy()  # empty rows take no room in it
    lengths, whole_lengths = np.diff(starts)[kept], table.column("whole_length").to_numpy()
    _refuse_long(config, whole_lengths, split)
    if not len(kept):
        raise DataError(
            f"no row of the {split} data has {'' if task.texts else 'a '}{task.needs} within "
            "data.max_tokens; raise it, or look at the rows"
        )
    targets = table.column("target").to_numpy().astype(np.float64)[kept]
    keys: tuple[str, ...] | None = None
    key_forms: dict[str, tuple[str, ...]] = {}
    if config.partition.key is not None:
        column = table.column("key").to_pylist()
        keys, key_forms = _texts_of_keys([column[row] for row in kept])
    elif task.classes:
        keys = tuple(task.classes[int(target)] for target in targets)
        key_forms = {name: (name,) for name in task.classes}
    parts, part_of_row = np.unique(
        np.asarray(table.column("part").to_pylist())[kept], return_inverse=True
    )
    kinds = table.column("columns").unique().to_pylist()
    return Tokens(
        flat=flat,
        starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        prompt_lengths=table.column("prompt_length").to_numpy()[kept],
        keys=keys,
        targets=targets,
        predicts_targets=task.is_classification,
        parts=tuple(map(str, parts)),
        part_of_row=part_of_row,
        left_out=len(dataset) - len(kept),
        gone=int(np.count_nonzero(whole_lengths > config.data.max_tokens))
        - int(np.count_nonzero(whole_lengths[kept] > lengths)),
        is_cut=whole_lengths[kept] > lengths,
        lost=table.column("lost").to_numpy()[kept],
        key_forms=key_forms,
        gaps=_gaps(table.column("gaps").combine_chunks(), kept),
        whole_lengths=whole_lengths[whole_lengths > 0],
        used_columns=_names(kinds, 0),
        other_columns=_names(kinds, 1),
        needs=task.needs,
    )


def _refuse_long(config: Config, whole_lengths: NDArray[np.int32], split: Split) -> None:
    limit = config.data.max_tokens
    long = whole_lengths[whole_lengths > limit]
    if config.data.on_long == "error" and len(long):
        raise DataError(
            f"data.on_long=error: {len(long):,} of {len(whole_lengths):,} rows of the {split} data "
            f"are longer than data.max_tokens = {limit} (the longest has {long.max():,} tokens); "
            "raise it, or set data.on_long to truncate or drop"
        )


def _gaps(column: pa.ListArray, kept: Indices) -> Gaps | None:
    """The stretches of the kept rows; None where no row has any. Empty rows have none."""
    edges = column.flatten().to_numpy()
    counts = np.diff(column.offsets.to_numpy())[kept] // 2
    if not len(edges):
        return None
    return Gaps(edges.reshape(-1, 2), np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))


def _names(kinds: list[str], which: int) -> frozenset[str]:
    return frozenset(name for kind in kinds for name in json.loads(kind)[which])


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
