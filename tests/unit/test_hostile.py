"""Files that anyone may have written: of every reader only plain errors come, and at once."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sfed.bench import __main__ as bench
from sfed.config import load as config_load
from sfed.config import yaml_text
from sfed.federated import preflight
from sfed.files.readers import read_rows
from sfed.storage import previous_run, resume
from sfed.storage.checkpoint_folder import COMMON
from sfed.storage.run_record import open_run
from sfed.utils import files, json_text
from sfed.utils.errors import ConfigError, DataError, UserError

DEMO = config_load.load(None, [])
ODD: tuple[Any, ...] = (None, True, -1, 1e308, 10**400, "x", "\ud800\x1b", [], [[]], {}, {"a": 1})
FEW = settings(max_examples=8, suppress_health_check=list(HealthCheck), deadline=None)


def text_of(value: Any) -> bytes:
    return json.dumps(value).encode()


def every_place(value: Any) -> Iterator[tuple[Any, ...]]:
    """The path to every value within a JSON value, but two of a list."""
    yield ()
    inner = value.items() if isinstance(value, dict) else ()
    inner = list(enumerate(value))[:2] if isinstance(value, list) else inner
    for key, one in inner:
        yield from ((key, *rest) for rest in every_place(one))


def put(value: Any, place: tuple[Any, ...], odd: Any) -> Any:
    if not place:
        return odd
    changed = copy.deepcopy(value)
    parent = changed
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = odd
    return changed


def events() -> list[dict[str, Any]]:
    clients = [{"client": 0, "examples": 3, "eval_loss": 0.5, "labels": {"a": 2}}]
    return [{"event": "round", "round": n, "eval/loss": 1.0, "clients": clients} for n in (0, 1)]


CONFIG = json.loads(DEMO.model_dump_json()) | {
    "resolved": {"num_clients": 2, "gamma": 1.0},
    "versions": {},
}
PARTITION = {"clients": [{"client": 0, "train": [0, 1], "eval": [2], "labels": {"a": 2}}]}


def make_run(folder: Path) -> None:
    (folder / "config.json").write_bytes(text_of(CONFIG))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in events()))
    (folder / "partition.json").write_bytes(text_of(PARTITION))
    (folder / "finished.json").write_bytes(b'{"rounds": 1}')
    inside = folder / "checkpoints" / "round-000001"
    inside.mkdir(parents=True)
    (inside / COMMON).write_bytes(b"abc")
    (inside / "run.json").write_bytes(text_of(run_json(inside)))


def run_json(folder: Path) -> dict[str, Any]:
    return {
        "finished_rounds": 1,
        "bad_rounds": 0,
        "ledger": [[0.0, 1.0]],
        "layout_size": 4,
        "config": {"federated.num_clients": 2, "seed": 0},
        "files": {COMMON: files.describe(folder / COMMON)},
        "data_digests": ["a", "b"],
        "unreported": {},
        "placement": [[0, 1]],
        "processes": 1,
        "clients_per_pass": 2,
    }


def ends_plainly(reader: Callable[[], object]) -> None:
    """Nothing but a plain error of bounded length may come out."""
    try:
        reader()
    except UserError as error:
        text = str(error)
    else:
        return
    assert len(text) < 5000


def read_run(folder: Path) -> None:
    """All readers of a run folder that start without torch, as a start and the report use them."""
    for reader in (
        lambda: open_run(folder).clients,
        lambda: previous_run.is_finished(folder, DEMO),
        lambda: previous_run.refuse_other_settings(folder, DEMO),
        lambda: previous_run.read_attempt(folder).differences(DEMO, 2),
        lambda: previous_run.began_with(folder, DEMO),
        lambda: resume.find(folder, "auto"),
    ):
        ends_plainly(reader)


@pytest.fixture(scope="module")
def run() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        make_run(Path(name))
        yield Path(name)


FILES = ("config.json", "metrics.jsonl", "partition.json", "finished.json")
RUN_JSON = "checkpoints/round-000001/run.json"


def with_content(folder: Path, name: str, content: bytes) -> None:
    path, before = folder / name, (folder / name).read_bytes()
    try:
        path.write_bytes(content)
        read_run(folder)
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("name", [*FILES, RUN_JSON])
def test_any_bytes_in_a_file_of_a_run_folder_end_in_a_plain_error_or_are_passed_over(run, name):
    whole = (run / name).read_bytes()

    @FEW
    @given(st.binary(max_size=64), st.integers(0, len(whole)), st.integers(0, len(whole)))
    def broken(noise: bytes, start: int, end: int) -> None:
        with_content(run, name, noise)
        with_content(run, name, whole[:start] + noise + whole[end:])

    broken()
    for bomb in (b"[" * 100_000, b'{"a":' * 5000 + b"1" + b"}" * 5000, b"9" * 5000, b"NaN"):
        with_content(run, name, bomb)


@pytest.mark.parametrize("name", [*FILES, RUN_JSON])
def test_any_type_at_any_key_of_a_file_of_a_run_folder_does_too(run, name):
    text = (run / name).read_text()
    value = json.loads(text.splitlines()[-1] if name == "metrics.jsonl" else text)
    places = [place for place in every_place(value) if len(place) < 5]
    for number, place in enumerate(places):
        for odd in ODD[number % 4 :: 4]:
            with_content(run, name, text_of(put(value, place, odd)) + b"\n")


@FEW
@given(
    st.one_of(
        st.binary(max_size=80), st.text(max_size=80).map(lambda t: t.encode(errors="replace"))
    )
)
def test_any_bytes_in_a_configuration_end_in_a_plain_error(noise: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.yaml"
        for before in (b"", b"data: {task: demo}\nlora:\n  rank: "):
            path.write_bytes(before + noise)
            ends_plainly(lambda: config_load.load(str(path), []))


@pytest.mark.parametrize(
    "value",
    ["2024-13-45", "!!int abc", "!!timestamp x", "!!bool x", "9" * 5000, "!!float x", "{a: *b}",
     "!!binary x", "!!set {a, b}", "!!omap [a]", "? [a]\n: b", "&a [*a]", "{<<: [1]}", "\x00"],
)  # fmt: skip
def test_a_value_that_is_not_of_its_tag_is_a_plain_error(value: str) -> None:
    with pytest.raises(ConfigError):
        config_load.load(None, ["data.task=demo", f"seed={value}"])


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for level in range(1, levels):
        aliases = ", ".join([f"*a{level - 1}"] * 10)
        lines.append(f"a{level}: &a{level} [{aliases}]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (bomb(5), "aliases expand to more than 50,000 values"),
        (bomb(40), "aliases expand to more than 50,000 values"),
        ("a: " + "[" * 20_000, "nested more than 50 deep"),
        ("a: " + "{b: " * 20_000, "nested more than 50 deep"),
        ("a: &a [1, *a]", "aliases expand to more than"),
        ("[" + "1," * 60_000 + "1]", "more than 50,000 keys and values"),
    ],
)
def test_a_document_that_is_too_large_or_too_deep_is_refused_in_one_short_line(text, reason):
    with pytest.raises(ConfigError, match=reason) as refused:
        yaml_text.parse(text, "c.yaml")
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 200


def test_values_of_a_message_are_cut():
    with pytest.raises(ConfigError) as refused:
        config_load.load(None, ["data.task=demo", f"lora.rnak=[{'x, ' * 5000}x]"])
    assert len(str(refused.value)) < 500


def test_json_keeps_what_is_within_the_bounds():
    value = json.loads("[" * json_text.MOST_DEPTH + "]" * json_text.MOST_DEPTH)
    assert json_text.parse(json.dumps(value)) == value
    with pytest.raises(ValueError, match="nested more than 100 deep"):
        json_text.parse(json.dumps([value]))
    assert json_text.parse('[10000000000000000000, 7, "[[[["]') == [10**19, 7, "[[[["]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_any_bytes_in_a_data_file_end_in_an_error_of_the_data(tmp_path, name):
    path = tmp_path / name

    @FEW
    @given(st.binary(max_size=60), st.sampled_from([b"", b'{"prompt": "a", "completion": ']))
    def broken(noise: bytes, before: bytes) -> None:
        path.write_bytes(before + noise)
        with contextlib.suppress(DataError):
            list(read_rows(path))

    broken()
    for odd in (b"[" * 100_000, b'{"a":' * 90_000, b"9" * 5000):
        path.write_bytes(odd)
        with pytest.raises(DataError):
            list(read_rows(path))


def test_a_line_that_is_too_long_is_not_read_and_the_key_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "short"}\n{"text": "' + "x" * 5000 + '"}\n')
    rows = read_rows(path, 100)
    assert next(rows)[1] == {"text": "short"}
    with pytest.raises(DataError, match=r"line 2: .*data.max_row_characters=100"):
        next(rows)
    exact = '{"text": "' + "x" * 88 + '"}'
    for end in ("\n", "", "\r\n"):
        path.write_text(exact + end, newline="")
        assert len(list(read_rows(path, 100))) == 1
    path.write_text("y" + exact)
    with pytest.raises(DataError, match="max_row_characters"):
        list(read_rows(path, 100))


@pytest.mark.parametrize(("most", "is_allowed"), [(1_000_000, False), (3_000_000, True)])
def test_the_check_before_the_start_takes_rows_as_long_as_the_key_says(tmp_path, most, is_allowed):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "' + "x" * 2_000_000 + '"}\n')
    data = {"task": "text", "train_files": str(path), "max_row_characters": most}
    settings = {"model": {"name": "demo"}, "data": data, "federated": {"num_clients": 1}}
    config = config_load.validate(settings)
    if is_allowed:
        assert "1 file checked" in preflight.check(config)
        return
    with pytest.raises(UserError, match="max_row_characters=1,000,000"):
        preflight.check(config)


def bench_results() -> dict[str, Any]:
    spread = {"median": 1.0, "min": 1.0, "max": 1.0}
    row = {"kind": "weak", "storage": "replica", "clients": 2, "seconds": spread}
    row |= {"tokens_per_second_and_process": spread, "waiting_share": None, "mean_share": None}
    job = {"processes": 1, "nodes": 1, "machine": {}, "steps_of_a_round": 3}
    job |= {"rounds": [row | {"gather_share": None}]}
    return {"scaling": [job], "configuration": {}, "notes": [], "machine": {}}


def test_results_of_the_bench_of_any_form_are_shown_or_refused(tmp_path):
    path, value = tmp_path / "r.json", bench_results()
    contents = [put(value, place, odd) for place in every_place(value) for odd in ODD[::2]]
    for content in [text_of(one) for one in contents] + [b"[" * 100_000, b"\xff"]:
        path.write_bytes(content)
        ends_plainly(lambda: bench.main(["--scaling-of", str(path)]))


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(OSError, match="it is not a file"):
        previous_run.read_attempt(tmp_path)
    assert not previous_run.is_finished(tmp_path, DEMO)


def test_a_name_of_300_letters_is_refused_before_torch():
    with pytest.raises(ConfigError, match=r"output.name .*at most 200"):
        config_load.load(None, ["data.task=demo", f"output.name={'a' * 300}"])
