"""Tests of the listing: which files a key names, in which order, and what is refused."""

from pathlib import Path

import pytest

from sfed.config import load as config_load
from sfed.files.kinds import READ, find_kind, stem_of
from sfed.files.listing import files_of, list_files
from sfed.utils.errors import DataError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make(*names):
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


def config_of(train, **data):
    return config_load.validate({"data": {"task": "text", "train_files": train, **data}})


def found(train):
    return list(files_of(config_of(train), "train"))


def problems(train):
    listing = list_files(config_of(train), "train")
    assert all(problem.startswith("data.train_files: ") for problem in listing.problems)
    with pytest.raises(DataError) as raised:
        found(train)
    assert str(raised.value) == "\n".join(listing.problems)
    return str(raised.value)


def test_a_folder_and_a_glob_name_their_files_in_order_without_hidden_ones():
    make("d/b.jsonl", "d/a.csv.gz", "d/c.parquet", "d/.hidden", "d/sub.jsonl")
    assert found("d") == ["d/a.csv.gz", "d/b.jsonl", "d/c.parquet", "d/sub.jsonl"]
    assert found("d/*.jsonl") == ["d/b.jsonl", "d/sub.jsonl"]
    assert found(["d/c.parquet", "d/?.jsonl"]) == ["d/c.parquet", "d/b.jsonl"]
    inside = Path("d").resolve()
    assert found(f"{inside}/*.gz") == [f"{inside}/a.csv.gz"]
    make("deep/x/1.jsonl", "deep/y/2.jsonl")
    assert found("deep/**/*.jsonl") == ["deep/x/1.jsonl", "deep/y/2.jsonl"]


def test_a_file_whose_name_looks_like_a_glob_is_that_file():
    make("a[1].jsonl", "a1.jsonl")
    assert found("a[1].jsonl") == ["a[1].jsonl"]


def test_a_file_of_another_kind_in_a_folder_is_no_client_and_no_silence():
    make("d/a.jsonl", "d/readme.md", "d/b.xlsx")
    message = problems("d")
    assert "'b.xlsx', 'readme.md'" in message and READ in message and "*.jsonl" in message
    make("e/a.jsonl", "e/f/b.jsonl")
    assert "'f': only files are read" in problems("e")
    make("g/a.jsonl")
    Path("g/b.jsonl").symlink_to("nowhere.jsonl")
    assert "'b.jsonl': it is a link to nothing" in problems("g")


@pytest.mark.parametrize(
    ("train", "part"),
    [
        ("none.jsonl", "'none.jsonl' does not exist"),
        ("none/*.jsonl", "the glob 'none/*.jsonl' matches no file"),
        ("empty", "the folder 'empty' holds no file"),
        ("a.txt", "'a.txt': files that end in .txt are not read"),
        ("{client}.txt", "'{client}.txt': files that end in .txt are not read"),
        ("hub:", "'hub:' names no data set"),
        (["a.jsonl", "./a.jsonl"], "'./a.jsonl' is named twice (also as 'a.jsonl')"),
        (["a.jsonl", "a.jsonl"], "'a.jsonl' is named twice; name each file once"),
        (["a.jsonl", "link.jsonl"], "'link.jsonl' is named twice (also as 'a.jsonl')"),
        (["hub:a/b", "hub:a/b"], "'hub:a/b' is named twice"),
    ],
)
def test_what_names_no_file_is_refused(train, part):
    Path("empty").mkdir()
    make("a.txt", "a.jsonl")
    Path("link.jsonl").symlink_to("a.jsonl")
    data = {"train_files": train}
    if "{client}" in train:
        config = {"data": {"task": "text", **data}, "partition": {"kind": "by_file"}}
        assert part in list_files(config_load.validate(config), "train").problems[0]
    else:
        assert part in problems(train)


def test_all_that_is_wrong_is_said_at_once():
    make("a.txt")
    assert len(problems(["none.jsonl", "a.txt", "*.csv"]).splitlines()) == 3


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("a.jsonl", "a"),
        ("a.b.csv.gz", "a.b"),
        ("x/A.JSONL.ZST", "A"),
        ("klinik-gr\u00fcn.parquet", "klinik-gr\u00fcn"),
        ("validation_matched", "validation_matched"),
    ],
)
def test_the_stem_is_the_name_without_what_says_the_kind(name, stem):
    assert stem_of(Path(name)) == stem


def test_the_kinds_that_are_read():
    kinds = {name: find_kind(Path(f"a{name}")) for name in (".json.gz", ".tsv.zst", ".parquet")}
    assert [(kind.form, kind.compression) for kind in kinds.values()] == [
        ("json", "gzip"),
        ("tsv", "zstd"),
        ("parquet", None),
    ]
    assert not any(find_kind(Path(n)) for n in (".jsonl", "a.gz", "a.parquet.gz", "a.jsonl.bz2"))
