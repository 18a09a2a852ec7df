"""The rows of a file, each with its place: file and line, or file and row.

Texts are read with what Python brings, because messages name the line; parquet and zstandard are
read by pyarrow. What is wrong with a row is a ``Fault`` in its place, so that all can be named.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sfed.config.sections.data import DataSection
from sfed.files.kinds import Compression, Kind, kind_of
from sfed.utils import json_text
from sfed.utils.errors import DataError
from sfed.utils.text import one_line

_LIST_OR_LINES = "a .json file holds a list of rows; name it .jsonl if every line is a row"
_ROWS_AT_ONCE = 1000
MOST_CHARACTERS: int = DataSection().max_row_characters
"""Of a line, and of a field of a .csv or .tsv file, where an unclosed quote would otherwise take in
a whole file."""

Row = dict[str, Any]
Placed = tuple[str, Any]
"""A row and its place, for messages."""


@dataclass(frozen=True)
class Fault:
    """What is wrong in the place of a row."""

    message: str


def too_long(length: int, most: int) -> str:
    """Say that a line or a row is longer than is allowed, and what to do."""
    return (
        f"it has {length:,} characters or more, and data.max_row_characters={most:,} allows fewer; "
        "split it, or raise the key (tokens beyond data.max_tokens are cut anyway)"
    )


def read_rows(path: Path, most_characters: int = MOST_CHARACTERS) -> Iterator[Placed]:
    """Yield the rows of a file with their places; blank lines are passed over.

    Args:
        path: of the file.
        most_characters: longest line (``data.max_row_characters``); what is longer is not read.

    Raises:
        DataError: naming file and line, or row, of what is wrong first.
    """
    for where, row in scan(path, most_characters):
        if isinstance(row, Fault):
            raise DataError(f"{where}: {row.message}")
        yield where, row


def scan(path: Path, most_characters: int = MOST_CHARACTERS) -> Iterator[Placed]:
    """Yield the rows of a file with their places, and a ``Fault`` where a row cannot be read.

    Arguments as of ``read_rows``.

    Raises:
        DataError: where the file cannot be read any further.
    """
    kind = kind_of(path)
    try:
        with _parquet_errors(path):
            yield from _READERS[kind.form](path, kind, most_characters)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8, "
            "such as with iconv -f UTF-16 or iconv -f WINDOWS-1252 and -t UTF-8"
        ) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a whole .gz file ({error})") from None
    except OSError as error:
        # pyarrow's errors have no number: their text is what they say.
        reason = error.strerror or one_line(error, 200)
        raise DataError(f"{path}: cannot be read ({reason})") from None


def _jsonl(path: Path, kind: Kind, most_characters: int) -> Iterator[Placed]:
    with _text(path, kind.compression) as file:
        number = 0
        while line := file.readline(most_characters + 2):  # one for the line's end
            number += 1
            where = f"{path}, line {number}"
            if len(line) > most_characters and not line.endswith("\n"):
                raise DataError(f"{where}: {too_long(len(line) - 1, most_characters)}")
            if line.strip():
                try:
                    row = _parsed(line)
                except ValueError as error:
                    row = Fault(f"not JSON ({error})")
                yield where, row


def _json(path: Path, kind: Kind, _most_characters: int) -> Iterator[Placed]:
    with _text(path, kind.compression) as file:
        text = file.read()
    try:
        rows = _parsed(text)
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); {_LIST_OR_LINES}") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: {_LIST_OR_LINES}")
    yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))


def _table(path: Path, kind: Kind, most_characters: int) -> Iterator[Placed]:
    """Rows of text under the names of the first line; a field in quotes may hold line breaks."""
    mark = "\t" if kind.form == "tsv" else ","
    csv.field_size_limit(most_characters)  # of all of Python's csv
    with _text(path, kind.compression, newline="") as file:
        header: list[str] | None = None
        lines = csv.reader(file, delimiter=mark, strict=True)
        for number, fields in _numbered(lines, path, most_characters):
            where = f"{path}, line {number}"
            if header is None:
                header = _checked_header(fields, mark, path)
            elif len(fields) == len(header):
                yield where, dict(zip(header, fields, strict=True))
            else:
                yield where, Fault(f"{len(fields)} fields; the first line names {len(header)}")


def _numbered(lines: Any, path: Path, most_characters: int) -> Iterator[tuple[int, list[str]]]:
    """Yield the records that are not blank with the number of the line where each begins."""
    while True:
        number = lines.line_num + 1
        try:
            fields = next(lines, None)
        except csv.Error as error:
            problem = f"not readable as a table ({error})"
            if "field limit" in str(error):
                problem = (
                    f"a field is longer than data.max_row_characters={most_characters:,}; raise "
                    "the key, or look for a quote that is opened and not closed"
                )
            raise DataError(f"{path}, line {number}: {problem}") from None
        if fields is None:
            return
        if fields and (len(fields) > 1 or fields[0].strip()):
            yield number, fields


def _checked_header(names: list[str], mark: str, path: Path) -> list[str]:
    """The names of the columns.

    Raises:
        DataError: where a name is missing or is there twice, or another mark separates them.
    """
    others = [other for other in ",;\t" if other != mark and other in names[0]]
    if len(names) == 1 and others:
        raise DataError(
            f"{path}, line 1: one column, {names[0]!r}; .csv files have commas between the fields "
            "and .tsv files tabs"
        )
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DataError(f"{path}, line 1: the column {twice!r} is there twice")
    if "" in names:
        raise DataError(f"{path}, line 1: column {names.index('') + 1} has no name")
    return names


def _parquet(path: Path, kind: Kind, _most_characters: int) -> Iterator[Placed]:
    import pyarrow.parquet as parquet

    with path.open("rb") as opened, parquet.ParquetFile(opened) as file:
        names = file.schema_arrow.names
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise DataError(f"{path}: the column {twice!r} is there twice")
        number = 0
        for batch in file.iter_batches(_ROWS_AT_ONCE, use_threads=False):
            for row in _rows_of(batch, f"{path}, rows from {number + 1}"):
                number += 1
                yield f"{path}, row {number}", row


def _rows_of(batch: Any, where: str) -> list[Row]:
    """The rows of a record batch of pyarrow.

    Raises:
        DataError: naming the column that holds what Python has no value for.
    """
    names = batch.schema.names
    columns = [
        _values_of(column, f"{where}: the column {name!r}")
        for name, column in zip(names, batch.columns, strict=True)
    ]
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def without_nulls(value: Any, kept: tuple[str, ...] = ("content",)) -> Any:
    """A value of a column whose type is Arrow's, without the fields that its records do not have.

    All records of a column have the same fields there, null in those that lack them: a call of one
    tool would have the arguments of all others. What a turn says stays, as null beside its calls.

    Args:
        value: text, number, list or record.
        kept: fields of the outermost records that stay.
    """
    if isinstance(value, list):
        return [without_nulls(one, kept) for one in value]
    if not isinstance(value, dict):
        return value
    return {
        name: without_nulls(inner, ())
        for name, inner in value.items()
        if inner is not None or name in kept
    }


def _values_of(column: Any, what: str) -> list[Any]:
    """The values of a column of pyarrow.

    Raises:
        DataError: where one is no UTF-8, or, such as a date after the year 9999, no value of
            Python's.
    """
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        raise DataError(f"{what} is not UTF-8 text") from None
    except (ValueError, ArithmeticError) as error:
        raise DataError(
            f"{what}, {column.type}, cannot be read ({one_line(error, 100)}); leave the column out "
            "or write it as text"
        ) from None
    return [without_nulls(value) for value in values]


@contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    """Turn pyarrow's errors, some of which are ValueErrors, into ours."""
    try:
        yield
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        if type(error).__module__.partition(".")[0] != "pyarrow":
            raise
        reason = one_line(error, 200)
        raise DataError(f"{path}: not readable as a parquet file ({reason})") from None


_READERS = {"jsonl": _jsonl, "json": _json, "csv": _table, "tsv": _table, "parquet": _parquet}


def _text(path: Path, compression: Compression | None, newline: str | None = None) -> IO[str]:
    """Open a text that may begin with a byte order mark."""
    return io.TextIOWrapper(_bytes(path, compression), encoding="utf-8-sig", newline=newline)


def _bytes(path: Path, compression: Compression | None) -> Any:
    if compression == "gzip":
        return gzip.open(path)
    if compression == "zstd":
        import pyarrow

        return pyarrow.input_stream(str(path), compression="zstd")
    return path.open("rb")


def _parsed(text: str) -> Any:
    """Read JSON.

    Raises:
        ValueError: where it is none, or an object holds a key twice: one of the two values would
            be lost.
    """
    return json_text.parse(text, _distinct)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object holds the key {twice!r} twice")
    return found
