"""Tests of what is recognised as a secret, and that nothing else is changed."""

import json

import pytest

from sfed.config import load as config_load
from sfed.config.diff import comparable
from sfed.observability.metrics import MetricsFile, read_events
from sfed.utils import command, redaction
from sfed.utils.errors import UserError
from sfed.utils.redaction import MASK, is_secret_name, mask, masked

TOKEN = "hf_" + "aB3dE5gH7jK9mN1pQ3sT5vX7"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"401 for {TOKEN}, retry", "401 for ***, retry"),
        ("https://ann:p@ss@host/x y@z", "https://***@host/x y@z"),
        ("'https://token@host:8080'", "'https://***@host:8080'"),
        ("wandb_v1_0123456789abcdefghij", "***"),
        ("s3://bucket/hf_model", "s3://bucket/hf_model"),
        ("hf_short and ann@example.org", "hf_short and ann@example.org"),
    ],
)
def test_a_secret_is_known_by_its_form(text, expected):
    assert mask(text) == expected


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "my_token"])
def test_a_secret_of_the_environment_is_known_whatever_its_form(monkeypatch, name):
    monkeypatch.setenv(name, "correct horse")
    assert mask("the correct horse is here: correct horse") == f"the {MASK} is here: {MASK}"


def test_of_two_secrets_of_which_one_holds_the_other_nothing_remains(monkeypatch):
    monkeypatch.setenv("A_TOKEN", "correct horse")
    monkeypatch.setenv("B_TOKEN", "correct horse battery")
    assert mask("correct horse battery") == MASK


def test_settings_of_the_environment_are_no_secrets(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "a long setting")
    monkeypatch.setenv("SOME_TOKEN", "short")
    assert mask("a long setting, short") == "a long setting, short"


def test_the_working_directory_of_a_shell_is_no_password(monkeypatch):
    for name in ("PWD", "OLDPWD"):
        monkeypatch.setenv(name, "/home/somebody/work")
    assert mask("/home/somebody/work/runs/demo") == "/home/somebody/work/runs/demo"


def test_values_under_secret_keys_and_secrets_anywhere_are_masked_the_rest_is_kept():
    value = {"comet": {"api_key": "plain", "on": True}, "files": [TOKEN, 1, None], TOKEN: 2.5}
    expected = {"comet": {"api_key": MASK, "on": True}, "files": [MASK, 1, None], MASK: 2.5}
    assert masked(value) == expected
    assert masked({"data": {"max_tokens": 8}, "wandb": {"api_key": None}}) == {
        "data": {"max_tokens": 8},
        "wandb": {"api_key": None},
    }


def test_the_environment_is_read_once_for_a_value_of_any_size(monkeypatch):
    read, reads = redaction._secrets_of_environment, []

    def counting():
        reads.append(read())
        return reads[-1]

    monkeypatch.setattr(redaction, "_secrets_of_environment", counting)
    monkeypatch.setenv("MY_TOKEN", "correct horse")
    event = {"clients": [{"client": n, "name": "a correct horse"} for n in range(50)]}
    assert masked(event)["clients"] == [{"client": n, "name": f"a {MASK}"} for n in range(50)]
    assert len(reads) == 1


def test_two_runs_that_differ_in_a_secret_only_are_the_same_run():
    settings = [
        comparable(config_load.validate({"model": {"name": f"https://{word}@host/m"}}), 2)
        for word in ("ann:old", "ann:new")
    ]
    assert settings[0] == settings[1]
    assert settings[0]["model.name"] == "https://***@host/m"


def test_two_runs_that_differ_in_a_client_called_secret_are_two_runs():
    """Under the name of a client or a class stand settings and counts, and no secrets."""
    settings = [
        comparable(config_load.validate({"clients": {"secret ward": {"lr": lr}}}), 2)
        for lr in (0.1, 0.5)
    ]
    assert settings[0] != settings[1]
    part = {"clients": [{"client": 0, "labels": {"password reset": 5, "other": 2}}]}
    assert masked(part) == part
    inside = {"clients": {"secret ward": {"lr": 0.1, "hub_token": "tok12345"}}}
    assert masked(inside) == {"clients": {"secret ward": {"lr": 0.1, "hub_token": MASK}}}


def test_the_metrics_file_holds_no_secret(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", None)
    file.write_event(
        {"event": "round", "round": 1, "clients": [{"samples": [{"answer": f"key {TOKEN}"}]}]}
    )
    file.close()
    assert TOKEN not in (tmp_path / "metrics.jsonl").read_text()
    (event,) = read_events(tmp_path / "metrics.jsonl")
    assert event["clients"] == [{"samples": [{"answer": "key ***"}]}]


def test_a_mistake_is_said_without_its_secret(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("sys.argv", ["train", f"model.nmae=https://ann:{TOKEN}@host"])

    def refuse(arguments):
        raise UserError(f"unknown key in {json.dumps(arguments)}")

    with pytest.raises(SystemExit):
        command.run_command(refuse)
    said = capsys.readouterr().err
    assert TOKEN not in said and "https://***@host" in said


@pytest.mark.parametrize(
    "name",
    ["model.hub_token", "hubToken", "HUB-TOKEN", "apikey", "api-key", "wandb.key", "Authorization",
     "my_secret", "dbPassword", "passwd", "AWS_ACCESS_KEY", "client_credentials"],
)  # fmt: skip
def test_a_secret_is_known_by_the_words_of_its_name(name):
    assert is_secret_name(name)
    assert "tok12345" not in mask(f"odd: {name} = 'tok12345': unknown; {name}=tok12345, and so on")
    assert "tok12345" not in json.dumps(masked({"a": [{name: "tok12345"}]}))
    section, _, leaf = name.rpartition(".")
    with pytest.raises(UserError) as refused:
        config_load.load(None, ["data.task=demo", f"{section or 'model'}.{leaf}=tok12345"])
    assert "tok12345" not in str(refused.value)
    with pytest.raises(UserError) as refused:
        config_load.load(None, ["data.task=demo", f"{section or 'model'}.{leaf}=[tok12345"])
    assert "tok12345" not in str(refused.value)


def test_a_file_with_a_slip_is_not_quoted(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model:\n  hub_token: tok12345 : x\n")
    with pytest.raises(UserError, match="line 2") as refused:
        config_load.load(str(path), [])
    assert "tok12345" not in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        "data.max_tokens = 512: too long", "partition.key: 'a' there, 'b' now", "set key=value",
        "partition.kind=by_key: the column has 3 values", "loss per token: 3.2",
        "tokens_per_second=12", "eos_token='</s>'", "the key: one of these",
    ],
)  # fmt: skip
def test_words_of_our_own_are_no_secrets(text):
    assert mask(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "/etc/passwd: files without an ending are not read",
        "data.train_files: '/data/my_token': files without an ending are not read",
        "data.train_files: 'passwords.xlsx': files that end in .xlsx are not read",
        r"C:\data\secret: no such file", "runs/secret: damaged", "my_token.yaml: line 3",
        "runs/secret/config.json: damaged", "passwd.jsonl, line 3: not JSON",
    ],
)  # fmt: skip
def test_a_path_is_no_secret_whatever_it_is_called(text):
    assert mask(text) == text
    assert mask(f"{text}; password: tok12345") == f"{text}; password: {MASK}"


@pytest.mark.parametrize(
    "text",
    [
        "/data/my_token=tok12345", "ann/password:tok12345", "https://host/a?token=tok12345",
        "/etc/passwd: password=tok12345", "/etc/passwd: password: tok12345",
        "the key: password=tok12345", "max_tokens = 'password: tok12345'",
    ],
)  # fmt: skip
def test_what_is_assigned_within_or_behind_a_path_or_a_setting_is_masked(text):
    assert "tok12345" not in mask(text)


@pytest.mark.parametrize("text", ["a" * 200_000, "key:" * 50_000, "token." * 30_000])
def test_a_long_text_is_looked_through_once(text):
    """With a square of its length it would take a quarter of an hour."""
    assert mask(text) == text


def test_a_partition_key_and_a_header_in_json():
    value = {"partition": {"key": "kind"}, "partition.key": "kind", "max_tokens": 4}
    assert masked(value) == value
    assert masked({"headers": ["Authorization: Bearer abcdefgh12345"]}) == {
        "headers": [f"Authorization: Bearer {MASK}"]
    }
