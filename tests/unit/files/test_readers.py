"""Tests of the readers: rows of each kind of file with their places, and what is wrong in one."""

import csv
import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfed.files.kinds import READ
from sfed.files.readers import Fault, read_rows, scan
from sfed.utils.errors import DataError, UserError


def save(folder, content, name="rows.jsonl"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def mistake_in(path):
    with pytest.raises(UserError) as caught:
        list(read_rows(path))
    return str(caught.value)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_jsonl_file_gives_rows_with_their_lines_and_passes_over_blank_ones(tmp_path, end):
    path = save(tmp_path, end.join(['{"a": 1}', "", "   ", '{"a": "é"}', "[2]"]))
    assert list(read_rows(path)) == [
        (f"{path}, line 1", {"a": 1}),
        (f"{path}, line 4", {"a": "é"}),
        (f"{path}, line 5", [2]),
    ]


def test_a_separator_of_unicode_within_a_row_does_not_end_it(tmp_path):
    row = {"text": "a\u2028b\u0085c"}
    path = save(tmp_path, json.dumps(row, ensure_ascii=False) + "\n")
    assert list(read_rows(path)) == [(f"{path}, line 1", row)]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_file_gives_the_rows_of_its_list(tmp_path, indent):
    path = save(tmp_path, json.dumps([{"a": 1}, {"a": 2}], indent=indent), "rows.json")
    assert list(read_rows(path)) == [(f"{path}, row 1", {"a": 1}), (f"{path}, row 2", {"a": 2})]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_file_without_rows_gives_none(tmp_path, name):
    assert list(read_rows(save(tmp_path, "[]" if name == "rows.json" else "\n\n", name))) == []


def test_a_line_that_is_not_json_is_refused_by_file_and_line(tmp_path):
    path = save(tmp_path, '{"a": 1}\n\n{"a": 2\n')
    assert mistake_in(path).startswith(f"{path}, line 3: not JSON")


def test_rows_before_a_malformed_line_are_read(tmp_path):
    rows = read_rows(save(tmp_path, '{"a": 1}\nnonsense\n'))
    assert next(rows)[1] == {"a": 1}
    with pytest.raises(UserError, match="line 2"):
        next(rows)


@pytest.mark.parametrize(
    ("content", "part"),
    [('[{"a": 1}', "not JSON"), ('{"a": 1}', "holds a list of rows; name it .jsonl")],
)
def test_a_json_file_that_holds_no_list_is_refused_by_its_name(tmp_path, content, part):
    path = save(tmp_path, content, "rows.json")
    message = mistake_in(path)
    assert message.startswith(str(path)) and part in message


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_file_that_is_not_utf8_is_refused_by_its_name(tmp_path, name):
    path = save(tmp_path, b'[{"a": "\xe9"}]\n', name)
    assert mistake_in(path).startswith(f"{path}: not UTF-8 text")
    assert "save it as UTF-8" in mistake_in(path)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_file_that_is_not_there_or_is_a_folder_is_refused_by_its_name(tmp_path, name):
    assert mistake_in(tmp_path / name).startswith(f"{tmp_path / name}: cannot be read")
    (tmp_path / name).mkdir()
    assert mistake_in(tmp_path / name).startswith(f"{tmp_path / name}: cannot be read")


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "a", "text": "b"}',
        '{"text": "a", "more": {"x": 1, "x": 1}}',
        '{"text": "a", "n": ' + "9" * 5000 + "}",
    ],
)
def test_a_line_that_loses_something_when_it_is_read_is_named(tmp_path, line):
    message = mistake_in(save(tmp_path, f'{{"text": "a"}}\n{line}\n'))
    assert message.startswith(f"{tmp_path / 'rows.jsonl'}, line 2: not JSON")
    message = mistake_in(save(tmp_path, f"[{line}]", "rows.json"))
    assert message.startswith(f"{tmp_path / 'rows.json'}: not JSON")


@pytest.mark.parametrize(
    "content", ['{"a": 1}\n{"a": 2}\n', '{"a": 1}\n', '{"a": 1}', '\ufeff{"a": 1}\n\n{"a": 2}']
)
def test_lines_in_a_json_file_are_told_to_be_jsonl(tmp_path, content):
    message = mistake_in(save(tmp_path, content, "rows.json"))
    assert message.startswith(str(tmp_path / "rows.json")) and "name it .jsonl" in message


def test_every_file_may_begin_with_a_byte_order_mark(tmp_path):
    for name in ("a.jsonl", "b.jsonl", "c.json"):
        row = b'{"a": 1}'
        path = save(
            tmp_path, b"\xef\xbb\xbf" + (b"[" + row + b"]" if name[2:] == "json" else row), name
        )
        assert [row for _, row in read_rows(path)] == [{"a": 1}]


# --- the same rows in every kind of file ---------------------------------------------------------

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
# Some kinds have no cell of no text but in a row of several.
ROWS = st.lists(st.fixed_dictionaries({"a": TEXT, "b \u00e9": TEXT}), min_size=1, max_size=5)
TYPED = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**53), 2**53),
    st.floats(allow_nan=False, allow_infinity=False),
    TEXT,
    st.lists(TEXT, max_size=2),
)


def lines_of(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def table_of(rows, mark=","):
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), delimiter=mark)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


FORMS = {
    "jsonl": lines_of,
    "json": lambda rows: json.dumps(rows, indent=1),
    "csv": table_of,
    "tsv": lambda rows: table_of(rows, "\t"),
}


def zstd(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


PACKED = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=25, deadline=None)
@given(rows=ROWS, mark=st.sampled_from([b"", b"\xef\xbb\xbf"]))
def test_rows_written_in_any_kind_are_read_equal(tmp_path_factory, form, packed, rows, mark):
    content = PACKED[packed](mark + FORMS[form](rows).encode())
    path = save(tmp_path_factory.mktemp("rows"), content, f"rows.{form}{packed}")
    assert [row for _, row in read_rows(path)] == rows


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(TYPED, min_size=1, max_size=4), codec=st.sampled_from(["none", "zstd"]))
def test_a_parquet_file_keeps_the_types(tmp_path_factory, rows, codec):
    kinds = {type(value) for value in rows} - {type(None)}
    if len(kinds) > 1:  # a column has one type
        rows = [value for value in rows if type(value) is type(rows[0])]
    path = tmp_path_factory.mktemp("rows") / "rows.parquet"
    parquet.write_table(pa.table({"v": rows}), path, compression=codec)
    found = list(read_rows(path))
    assert found == [(f"{path}, row {i}", {"v": value}) for i, value in enumerate(rows, start=1)]
    assert [type(row["v"]) for _, row in found] == [type(value) for value in rows]


def test_records_in_a_parquet_file_have_the_fields_that_they_were_written_with(tmp_path):
    calls = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"content": "z"}}]
    rows = [
        {"messages": [{"role": "user", "content": "q"}], "tools": None},
        {"messages": [{"role": "assistant", "content": None, "calls": calls}], "tools": [{"a": 1}]},
        {"messages": [{"role": "user", "content": "q", "name": "n"}], "tools": [{"b": {"c": 2}}]},
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert [row for _, row in read_rows(tmp_path / "rows.parquet")] == rows


def test_values_of_a_table_stay_texts(tmp_path):
    path = save(tmp_path, "a,b\n007,1.0\n,true\n", "rows.csv")
    assert [row for _, row in read_rows(path)] == [{"a": "007", "b": "1.0"}, {"a": "", "b": "true"}]


def test_a_record_of_several_lines_is_named_by_its_first(tmp_path):
    path = save(tmp_path, 'a,b\r\n"x\r\ny",1\r\n\r\nz,2\r\n', "rows.csv")
    assert list(read_rows(path)) == [
        (f"{path}, line 2", {"a": "x\r\ny", "b": "1"}),
        (f"{path}, line 5", {"a": "z", "b": "2"}),
    ]


# --- what is wrong -------------------------------------------------------------------------------


def test_every_bad_line_is_found_and_the_rows_around_it_are_read(tmp_path):
    path = save(tmp_path, '{"a": 1}\n{"a"\n{"a": 2}\nx\n')
    found = [(where, isinstance(row, Fault)) for where, row in scan(path)]
    assert found == [(f"{path}, line {i}", i in (2, 4)) for i in range(1, 5)]
    path = save(tmp_path, "a,b\n1,2\n1\n1,2\n1,2,3\n", "rows.csv")
    found = [row.message for _, row in scan(path) if isinstance(row, Fault)]
    assert found == [f"{i} fields; the first line names 2" for i in (1, 3)]


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.csv", "a;b\n1;2\n", "line 1: one column, 'a;b'; .csv files have commas"),
        ("a.tsv", "a,b\n1,2\n", "line 1: one column, 'a,b'"),
        ("a.csv", "a,b,a\n1,2,3\n", "line 1: the column 'a' is there twice"),
        ("a.csv", "a,,c\n1,2,3\n", "line 1: column 2 has no name"),
        ("a.csv", 'a,b\n1,2\n"1,2\n3,4\n', "line 3: not readable as a table"),
        (
            "a.csv",
            "a\n" + "x" * (2**24 + 1),
            "line 2: a field is longer than data.max_row_characters",
        ),
        ("a.csv", b"a,b\n\xe9,1\n", ": not UTF-8 text"),
        ("a.jsonl.gz", b"plain", ": not a whole .gz file"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9], ": not a whole .gz file"),
        ("a.jsonl.zst", b"plain", ": cannot be read (ZSTD"),
        ("a.jsonl.zst", zstd(b'{"a": 1}\n' * 99)[:-1], ": cannot be read (Truncated"),
        ("a.parquet", b"plain", ": not readable as a parquet file"),
        ("a.parquet", b"", ": not readable as a parquet file"),
        ("a.tar.gz", b"", ": files that end in .tar.gz are not read"),
        ("a.gz", b"", ": files that end in .gz are not read"),
        ("a.xlsx", b"", f": files that end in .xlsx are not read; read are {READ}"),
        ("a", b"", f": files without an ending are not read; read are {READ}"),
        ("a.parquet.gz", b"", ": parquet files are compressed inside"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path, name, content, part):
    path = save(tmp_path, content, name)
    message = mistake_in(path)
    assert message.startswith(str(path)) and part in message and "\n" not in message


def test_a_parquet_file_with_a_column_twice_is_refused(tmp_path):
    table = pa.table([pa.array([1]), pa.array([2])], names=["a", "a"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="the column 'a' is there twice"):
        list(read_rows(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("values", "part"),
    [
        (pa.array([2**31 - 1], pa.int32()).cast(pa.date32()), "date32[day], cannot be read"),
        (pa.array([2**55], pa.timestamp("ms")), "timestamp[ms], cannot be read"),
        (pa.array([2**62], pa.duration("ms")), "duration[ms], cannot be read"),
        (pa.array([0], pa.timestamp("us", tz="No/Where")), "tz=No/Where], cannot be read"),
        (pa.array([b"\xff"]).view(pa.string()), "is not UTF-8 text"),
    ],
)
def test_a_column_of_a_parquet_file_that_python_cannot_hold_is_named(tmp_path, values, part):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"a": ["text"], "seen": values}), path)
    message = mistake_in(path)
    assert message.startswith(f"{path}, rows from 1: the column 'seen'") and part in message


def test_a_damaged_page_of_a_parquet_file_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [f"{i} " * 40 for i in range(2000)]
    parquet.write_table(pa.table({"a": texts}), path, use_dictionary=False, compression="zstd")
    content = bytearray(path.read_bytes())
    content[200:400] = b"\xff" * 200
    path.write_bytes(content)
    assert mistake_in(path).startswith(str(path))
