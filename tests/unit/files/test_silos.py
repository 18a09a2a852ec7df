"""Tests of the clients of by_file: their files, their names, their number, who is left out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfed.config import load as config_load
from sfed.files.names import adapter_folders, distinct_names
from sfed.files.silos import num_clients_of, silos_of
from sfed.utils.errors import DataError


def make(folder, **rows):
    folder.mkdir(exist_ok=True)
    for name, count in rows.items():
        (folder / f"{name}.jsonl").write_text('{"text": "a"}\n' * count)
    return str(folder)


def config_of(train, num_clients=None, **data):
    return config_load.validate(
        {
            "data": {"task": "text", "train_files": train, **data},
            "partition": {"kind": "by_file"},
            "federated": {"num_clients": num_clients},
        }
    )


def refusal(config):
    with pytest.raises(DataError) as raised:
        silos_of(config, None)
    return str(raised.value)


def test_each_file_of_a_folder_is_a_client_with_its_name(tmp_path):
    folder = make(tmp_path / "d", b=3, a=4)
    config = config_of(folder)
    found = silos_of(config, None)
    assert num_clients_of(config) == 2
    assert found.names == ("a", "b") and found.held_out == () and not found.left_out
    assert found.train == (f"{folder}/a.jsonl", f"{folder}/b.jsonl")
    assert silos_of(config, 2) == silos_of(config_of(folder, 2), None) == found
    for wrong in (config_of(folder, 3), config_of(folder, 1)):
        assert "names 2 files for" in refusal(wrong)


def test_a_pattern_with_client_numbers_them_without_names():
    config = config_of("d/{client}.jsonl", 3, eval_files="e/{client}.jsonl")
    found = silos_of(config, 3)
    assert num_clients_of(config) == 3 and found.names == ("", "", "")
    assert found.train == tuple(f"d/{i}.jsonl" for i in range(3))
    assert found.held_out == tuple(f"e/{i}.jsonl" for i in range(3))
    assert num_clients_of(config_of("d/{client}.jsonl")) is None


def test_files_with_too_few_rows_are_left_out_where_that_is_asked(tmp_path):
    folder = make(tmp_path / "d", a=0, b=2, c=3, d=1, e=9)
    config = config_of(folder, on_small_client="skip")
    assert silos_of(config, None).left_out == ("a", "b", "d")
    assert silos_of(config, None).names == ("c", "e") and num_clients_of(config) == 2
    # With held-out files of their own two rows are enough; theirs are left out with them.
    held = make(tmp_path / "held", a=1, b=1, c=1, d=1, e=1)
    found = silos_of(config_of(folder, on_small_client="skip", eval_files=held), None)
    assert found.names == ("b", "c", "e")
    assert found.held_out == tuple(f"{held}/{name}.jsonl" for name in "bce")
    assert "none of the 2 files" in refusal(
        config_of(make(tmp_path / "f", a=0, b=1), on_small_client="skip")
    )


def test_a_file_that_cannot_be_read_is_not_taken_for_a_small_one(tmp_path):
    folder = make(tmp_path / "d", a=3, b=3)
    (tmp_path / "d" / "c.jsonl").write_bytes(b"\xff\xff\n")
    assert silos_of(config_of(folder, on_small_client="skip"), None).names == ("a", "b", "c")


def test_held_out_files_belong_by_name_in_a_folder_by_place_in_a_list_and_one_to_all(tmp_path):
    folder = make(tmp_path / "d", a=3, b=3)
    held = make(tmp_path / "held", b=1, a=1)
    a, b = f"{held}/a.jsonl", f"{held}/b.jsonl"
    assert silos_of(config_of(folder, eval_files=held), None).held_out == (a, b)
    assert silos_of(config_of(folder, eval_files=f"{held}/*"), None).held_out == (a, b)
    assert silos_of(config_of(folder, eval_files=[b, a]), None).held_out == (b, a)
    turned = [f"{folder}/b.jsonl", f"{folder}/a.jsonl"]
    assert silos_of(config_of(turned, eval_files=held), None).held_out == (b, a)
    common = silos_of(config_of(folder, eval_files=a), None)
    assert common.held_out == (a, a) and common.shares_held_out
    assert "3 files for 2" in refusal(
        config_of(folder, eval_files=[a, b, make(tmp_path / "x", a=1) + "/a.jsonl"])
    )
    make(tmp_path / "held", c=1)
    assert "no training file for 'c'" in refusal(config_of(folder, eval_files=held))
    assert "{client} and data.train_files has not" in refusal(
        config_of(folder, eval_files="e/{client}.jsonl")
    )


@pytest.mark.parametrize("train", [["hub:a/b", "hub:c/d"], ["{client}.jsonl", "{client}.csv"]])
def test_what_is_no_file_is_no_client(train):
    assert "is no file of a client" in refusal(config_of(train))


# --- names ---------------------------------------------------------------------------------------


def test_two_files_of_one_name_are_told_apart_by_their_folders_or_ends():
    assert distinct_names(["a/x.jsonl", "b/x.jsonl"]) == ["a_x", "b_x"]
    assert distinct_names(["x.jsonl", "x.csv.gz"]) == ["x_jsonl", "x_csv_gz"]


def test_the_folder_of_an_adapter_is_safe_and_its_own():
    names = ["klinik-gr\u00fcn", "", "a/b", "a b", "A b", "global", "\u5317\u4eac", "con", "../x"]
    assert adapter_folders(names) == [
        "klinik-grun",
        "client-0001",
        "a-b",
        "a-b-2",
        "A-b-3",
        "global-2",
        "client-0006",
        "con-2",
        "x",
    ]
    assert adapter_folders(["client-0001", ""]) == ["client-0001-2", "client-0001"]


@given(st.lists(st.text(max_size=80), min_size=1, max_size=8))
def test_folders_of_adapters_are_distinct_on_every_file_system(names):
    found = adapter_folders(names)
    assert len({name.casefold() for name in found}) == len(names)
    for name in found:
        assert name.isascii() and name.strip("-.") == name and 0 < len(name) < 70
        assert not set(name) & set('/\\:*?"<>| \n\0') and name != "global"
