"""Tests of the configuration: files, ``key=value``, help, and every kind of mistake."""

import inspect
import json
import math
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfed.config import fields, schema
from sfed.config import load as config_load
from sfed.config.diff import comparable, differences
from sfed.config.foreign_keys import FOREIGN_KEYS
from sfed.config.schema import Config
from sfed.config.sections.backbone import DEAD_DEEPSPEED_KEYS
from sfed.config.sections.clients import ClientSection
from sfed.config.sections.lora import LoraSection
from sfed.utils import command
from sfed.utils.errors import UserError
from tests.support import launchers

REPOSITORY = Path(__file__).resolve().parents[3]

positive = st.floats(min_value=1e-12, max_value=1e6)
whole = st.integers(min_value=1, max_value=10**6)
names = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FFF, categories=["L", "N", "Z"]))
# Keys whose value does not depend on another key, and the values they take.
VALUES: dict[str, st.SearchStrategy] = {
    "seed": st.integers(min_value=0, max_value=2**63),
    "model.name": names,
    "model.dtype": st.sampled_from(["bf16", "fp32"]),
    "data.max_tokens": whole,
    "data.eval_fraction": st.floats(min_value=0, max_value=1, exclude_min=True, exclude_max=True),
    "lora.rank": st.integers(min_value=1, max_value=fields.MOST_RANK),
    "lora.alpha": st.none() | positive,
    "lora.dropout": st.floats(min_value=0, max_value=1, exclude_max=True),
    "lora.target_modules": names | st.lists(names).map(tuple),
    "lora.scaling": st.sampled_from(["auto", "lora", "rslora", "sfed"])
    | st.tuples(st.floats(-4, 4), st.floats(-4, 4)),
    "federated.num_rounds": whole,
    "train.lr": positive,
    "train.weight_decay": st.floats(min_value=0, max_value=10),
    "train.max_grad_norm": st.none() | positive,
    "backbone.gradient_checkpointing": st.booleans(),
    "evaluation.adapters": st.lists(st.sampled_from(["personal", "global"])).map(tuple),
    "output.name": st.none() | st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,20}\Z"),
}
one_setting = st.sampled_from(sorted(VALUES)).flatmap(
    lambda key: st.tuples(st.just(key), VALUES[key])
)


def written(key, value):
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


def with_value(settings, key, value):
    section, _, leaf = key.rpartition(".")
    if not section:
        return {**settings, key: value}
    return {**settings, section: {**settings[section], leaf: value}}


DEMO = "data.task=demo"
TEXT = ["data.task=text", "data.train_files=a.jsonl", "model.name=x", "partition.kind=iid"]
NO_MODEL = "model.name: no default; set model.name, or data.task=demo (Hub id or folder"
NO_TASK = "data.task: no default; set data.task (Form of the examples"


def mistake_of(*arguments):
    """The message about these arguments, over the demo where there is no file among them."""
    if not any(os.path.isfile(word) or "=" not in word for word in arguments):
        arguments = (DEMO, *arguments)
    return told(*arguments)


def told(*arguments):
    with pytest.raises(UserError) as caught:
        config_load.parse(arguments)
    return str(caught.value)


def save(folder, text, name="config.yaml"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def run_python(*arguments, **environment):
    return launchers.python(*arguments, env=launchers.environment(**environment))


# --- what is accepted ----------------------------------------------------------------------------


@given(one_setting)
def test_key_value_changes_that_key_and_no_other(setting):
    key, value = setting
    before = config_load.parse([]).model_dump()
    assert config_load.parse([DEMO, written(key, value)]).model_dump() == with_value(
        before, key, value
    )
    alone = ["model.name=x", "data.task=gsm8k"]
    before = config_load.parse(alone).model_dump()
    assert config_load.parse([*alone, written(key, value)]).model_dump() == with_value(
        before, key, value
    )


@given(st.lists(one_setting, max_size=5))
def test_a_dumped_configuration_reads_back_as_the_same(settings):
    original = config_load.parse([DEMO, *(written(key, value) for key, value in settings)])
    assert config_load.validate(json.loads(original.model_dump_json())) == original
    assert config_load.validate(original.model_dump()) == original


def test_overriding_leaves_the_embedded_demo_as_it_is():
    before = json.dumps(schema.DEMO)
    config_load.parse([DEMO, "lora.rank=3", "train.lr=1", "backbone.deepspeed.x=1"])
    assert json.dumps(schema.DEMO) == before


def test_no_arguments_mean_the_embedded_demo_with_eight_clients():
    settings = config_load.parse([])
    assert (settings.data.task, settings.federated.num_clients) == ("demo", 8)


def test_a_file_of_the_demos_task_alone_means_every_default(tmp_path):
    assert config_load.parse([save(tmp_path, "data: {task: demo}\n")]) == Config()


def test_key_value_goes_over_the_file_wherever_it_stands(tmp_path):
    path = save(tmp_path, "data: {task: demo}\nlora: {rank: 3, alpha: 5.0}\n")
    for arguments in ([path, "lora.rank=4"], ["lora.rank=4", path]):
        assert config_load.parse(arguments).lora == LoraSection(rank=4, alpha=5.0)


def test_the_last_of_two_values_for_a_key_counts():
    assert config_load.parse([DEMO, "lora.rank=4", "lora.rank=5"]).lora.rank == 5


def test_a_value_may_itself_hold_an_equals_sign():
    assert config_load.parse([DEMO, "model.name=a=b"]).model.name == "a=b"


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001", ".1e-3", "+1e-4"])
def test_a_number_in_scientific_notation_is_a_number(tmp_path, text):
    assert config_load.parse([DEMO, f"train.lr={text}"]).train.lr == 1e-4
    assert config_load.parse([save(tmp_path, f"train:\n  lr: {text}\n"), DEMO]).train.lr == 1e-4


@pytest.mark.parametrize(
    ("text", "value"),
    [("[0.5, -0.5]", (0.5, -0.5)), ("[1/2, -1/2]", (0.5, -0.5)), ("[0, -1]", (0, -1))],
)
def test_an_exponent_is_a_number_or_a_fraction(text, value):
    assert config_load.parse([DEMO, f"lora.scaling={text}"]).lora.scaling == value


@pytest.mark.parametrize("indent", [None, 2, "\t"])
def test_a_json_file_is_a_configuration(tmp_path, indent):
    settings = {"seed": 3, "model": {"name": "x"}, "data": {"task": "gsm8k"}}
    settings |= {"lora": {"rank": 4, "target_modules": ["q_proj"]}, "train": {"lr": 1e-5}}
    path = save(tmp_path, json.dumps(settings, indent=indent), "config.json")
    assert config_load.parse([path]) == config_load.validate(settings)


def test_a_yaml_merge_key_is_a_mapping_taken_over(tmp_path):
    path = save(tmp_path, "backbone:\n  deepspeed:\n    a: &x {b: 1}\n    c: {<<: *x, d: 2}\n")
    assert config_load.parse([path, DEMO]).backbone.deepspeed["c"] == {"b": 1, "d": 2}


def test_a_long_value_is_a_value_and_not_the_name_of_a_file():
    files = tuple(f"customer-{i}.jsonl" for i in range(40))
    arguments = [f"data.train_files=[{', '.join(files)}]", "data.task=jsonl"]
    assert config_load.parse(["model.name=x", *arguments]).data.train_files == files


def test_a_file_with_an_equals_sign_in_its_name_is_read(tmp_path):
    path = save(tmp_path, "lora: {rank: 7}", "rank=7.yaml")
    assert config_load.parse([path, DEMO]).lora.rank == 7


@pytest.mark.parametrize(
    "words", [["--local_rank=3"], ["--local-rank=3"], ["--local_rank", "3"], ["--local-rank", "3"]]
)
def test_the_rank_that_the_deepspeed_launcher_adds_is_ignored(words):
    expected = config_load.parse([DEMO, "lora.rank=4"])
    assert config_load.parse([*words, DEMO, "lora.rank=4"]) == expected
    assert config_load.parse([DEMO, "lora.rank=4", *words]) == expected
    assert config_load.parse(words) == config_load.parse([])


@pytest.mark.parametrize("name", ["lora", "model", "seed"])
def test_a_configuration_cannot_be_changed(name):
    with pytest.raises(ValueError, match="frozen"):
        setattr(Config(), name, getattr(Config(), name))


@pytest.mark.parametrize(
    ("files", "expected"), [(None, ()), ("a.jsonl", ("a.jsonl",)), (["a", "b"], ("a", "b"))]
)
def test_files_come_as_a_tuple_whatever_form_they_were_given_in(files, expected):
    settings = config_load.validate(
        {"data": {"task": "gsm8k", "train_files": files, "eval_files": files}}
    )
    assert settings.files("train") == settings.files("eval") == expected


def test_the_run_is_named_after_task_and_method_or_as_asked():
    assert Config().run_name == "demo-sfed"
    assert config_load.validate({"output": {"name": "x"}}).run_name == "x"


# --- what keys and files stand on ----------------------------------------------------------------

DEMOS = {
    "model.name": "demo",
    "data.task": "demo",
    "data.max_tokens": 128,
    "partition.kind": "by_key",
    "partition.key": "kind",
    "federated.num_clients": 8,
    "federated.num_rounds": 5,
    "train.local_steps": 10,
    "train.lr": 3e-3,
    "evaluation.max_examples": 32,
    "output.name": "demo",
}
DEFAULTS = {
    "data.max_tokens": 512,
    "partition.kind": "iid",
    "partition.key": None,
    "federated.num_clients": None,
    "federated.num_rounds": 10,
    "train.local_steps": None,
    "train.lr": 3e-4,
    "evaluation.max_examples": None,
    "output.name": None,
}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], DEMOS),
        (["data.task=demo"], DEMOS),
        (["data.task=demo", "lora.rank=4"], {**DEMOS, "lora.rank": 4}),
        (["lora.rank=4", "data.task=demo"], {**DEMOS, "lora.rank": 4}),
        (["data.task=gsm8k", "data.task=demo"], DEMOS),
        (["data.task=demo", "model.name=x"], {**DEMOS, "model.name": "x"}),
        (["data={task: demo}"], {**DEMOS, "data.max_tokens": 512}),
        (["model.name=demo", "data.task=demo"], DEMOS),
        (["model.name=x", "data.task=gsm8k"], {**DEFAULTS, "data.task": "gsm8k"}),
        (["data.task=demo", "data.task=gsm8k", "model.name=x"], DEFAULTS),
        (
            ["model.name=x", "data.task=jsonl", "data.train_files=[a.jsonl]", "lora.rank=4"],
            {**DEFAULTS, "model.name": "x", "lora.rank": 4, "data.train_files": ("a.jsonl",)},
        ),
        (
            ["model.name=demo", "data.task=jsonl", "data.train_files=a.jsonl"],
            {**DEFAULTS, "model.name": "demo"},
        ),
    ],
)
def test_keys_stand_on_the_demo_or_on_the_defaults_of_help(arguments, expected):
    found = config_load.parse(arguments).model_dump()
    for key, value in expected.items():
        section, _, leaf = key.partition(".")
        assert found[section][leaf] == value, key


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("data: {task: demo}", [], {**DEFAULTS, "model.name": "demo"}),
        ("lora: {rank: 4}", ["data.task=demo"], {**DEFAULTS, "model.name": "demo"}),
        ("model: {name: x}\ndata: {task: gsm8k}", [], {**DEFAULTS, "model.name": "x"}),
        ("model: {name: x}\ndata: {task: demo}", [], {**DEFAULTS, "model.name": "x"}),
        ("model: {name: x}", ["data.task=gsm8k"], {**DEFAULTS, "data.task": "gsm8k"}),
        ("data: {task: gsm8k}", ["model.name=demo"], {**DEFAULTS, "model.name": "demo"}),
    ],
)
def test_a_file_stands_on_its_own(tmp_path, text, words, expected):
    found = config_load.parse([save(tmp_path, text), *words]).model_dump()
    for key, value in expected.items():
        section, _, leaf = key.partition(".")
        assert found[section][leaf] == value, key


@pytest.mark.parametrize(
    ("text", "words", "missing"),
    [
        (None, ["lora.rank=4"], [NO_MODEL, NO_TASK]),
        (None, ["seed=1"], [NO_MODEL, NO_TASK]),
        (None, ["data.max_tokens=9"], [NO_MODEL, NO_TASK]),
        (None, ["data.task=gsm8k"], [NO_MODEL]),
        (None, ["data.task=jsonl", "data.train_files=a.jsonl"], [NO_MODEL]),
        (None, ["data={task: gsm8k}"], [NO_MODEL]),
        (None, ["model.name=x"], [NO_TASK]),
        (None, ["model.name=demo"], [NO_TASK]),
        (None, ["model.name=x", "data.train_files=a.jsonl"], [NO_TASK]),
        (None, ["model.name=x", "data.name=sst2"], [NO_TASK]),
        ("", [], [NO_MODEL, NO_TASK]),
        ("lora: {rank: 4}", [], [NO_MODEL, NO_TASK]),
        ("model: {dtype: fp32}\ndata: {task: gsm8k}", [], [NO_MODEL]),
        ("model: {name: x}", [], [NO_TASK]),
        ("{}", ["train.lr=1"], [NO_MODEL, NO_TASK]),
    ],
)
def test_a_model_and_a_task_have_no_default(tmp_path, text, words, missing):
    message = told(*([] if text is None else [save(tmp_path, text)]), *words)
    head, *lines = message.split("\n  ")
    assert len(lines) == len(missing), message
    assert head.startswith("an error" if len(lines) == 1 else f"{len(lines)} errors")
    assert all(line.startswith(part) for line, part in zip(lines, missing, strict=True)), message


@pytest.mark.parametrize("words", [["lora.rank=4"], [DEMO, "model.name=3", "partition.key=3"]])
def test_a_mistake_is_one_line_however_long_the_meaning_of_its_key(words):
    assert all(line.startswith("  ") for line in told(*words).splitlines()[1:])


def test_what_is_missing_comes_with_all_other_mistakes():
    message = told("lora.rank=0", "nonsense=1")
    assert message.startswith("4 errors")
    assert all(part in message for part in (NO_MODEL, NO_TASK, "lora.rank = 0", "nonsense = 1"))


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["model.name=null", "data.task=gsm8k"], "model.name = null: input should be"),
        (["model=x", "data.task=gsm8k"], 'model = "x"'),
        (["model.name=x", "data=demo"], 'data = "demo"'),
        (["model.name=x", "data.task=null"], "data.task = null"),
    ],
)
def test_a_model_or_task_of_another_form_is_named_with_its_value(words, part):
    message = told(*words)
    assert message.startswith("an error") and part in message


def test_the_demos_configuration_can_be_read_and_copied():
    path = REPOSITORY / "configs" / "demo.yaml"
    assert config_load.read_mapping(path) == schema.DEMO
    assert config_load.parse([str(path)]) == config_load.parse([])


# --- help ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["lora.rank=0", "--help"]])
def test_asking_for_help_gives_no_configuration(arguments):
    assert config_load.parse(arguments) is None


def test_help_lists_every_key_of_the_schema_with_default_and_meaning():
    expected = {
        f"{name}.{leaf}": getattr(section, leaf)
        for name, section in Config()
        if isinstance(section, fields.Section)
        for leaf in type(section).model_fields
    }
    expected["seed"] = 0
    expected |= {f"clients.NAME.{leaf}": None for leaf in ClientSection.model_fields}
    listed = {key: (default, meaning) for key, default, meaning in config_load.list_keys()}
    assert set(listed) == set(expected)
    lines = config_load.help_text("how to start it").splitlines()
    assert lines[0] == "how to start it"
    for key, (default, meaning) in listed.items():
        if key in schema.REQUIRED:
            assert default == "required"
        else:
            assert json.loads(default) == json.loads(json.dumps(expected[key]))
        assert len(meaning) > 10
        at = next(i for i, line in enumerate(lines) if line.split()[:1] == [key])
        assert lines[at].endswith(f"[{default}]")
        assert lines[at + 1].split() == meaning.split()


def test_every_default_in_help_is_accepted_as_a_value_for_its_key():
    for key, default, _ in config_load.list_keys():
        if key not in schema.REQUIRED and not key.startswith("clients.NAME."):
            words = [f"{key}={default}", "partition.kind=iid"]
            assert config_load.load(None, [DEMO, *words])
            assert config_load.load(
                None, ["model.name=x", "data.task=gsm8k", words[0]]
            ) == config_load.load(None, ["model.name=x", "data.task=gsm8k"])


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("federated.num-server-rounds", "federated.num_rounds"),
        ("options.num-supernodes", "federated.num_clients"),
        ("strategy.fraction-train", "federated.clients_per_round"),
        ("train.training-arguments.max-steps", "train.local_steps"),
        ("model.lora.peft-lora-r", "lora.rank"),
        ("train.learning-rate-max", "train.lr"),
        ("train.seq-length", "data.max_tokens"),
        ("llm.tok_len", "data.max_tokens"),
    ],
)
def test_keys_of_the_page_on_other_trainers_are_answered(theirs: str, ours: str):
    assert f"; in sfed: {ours}" in config_load.suggestion(theirs)


@pytest.mark.parametrize(
    ("wrong", "suggestion"),
    [
        ("lora.rnak", "lora.rank"),
        ("rank", "lora.rank"),
        ("lora.lr", "train.lr"),
        ("federated.num_client", "federated.num_clients"),
        ("trian", "train"),
        ("evaluation.every_round", "evaluation.every_rounds"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(wrong, suggestion):
    message = mistake_of(f"{wrong}=4")
    assert f"{wrong} = 4: unknown key; did you mean {suggestion}?" in message


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["train.learning_rate=3"], "train.learning_rate = 3: unknown key; in sfed: train.lr"),
        (["strategy=fedavg"], "strategy = 'fedavg': unknown key; in sfed: federated.method"),
        (["fraction_train=0.1"], "unknown key; in sfed: federated.clients_per_round (a number"),
        (["model.load_in_4bit=true"], "unknown key; in sfed: model.quantization=nf4"),
        (["model.load_in_8bit=true"], "unknown key; in sfed: model.quantization=int8"),
        (["proximal_mu=0.01"], "unknown key; in sfed: federated.prox_mu"),
        (["prox_mu=0.01"], "unknown key; did you mean federated.prox_mu?"),
        (["num_server_rounds=3"], "unknown key; in sfed: federated.num_rounds"),
        (["train.weight_deacy=0.1"], "did you mean train.weight_decay?"),
        (["--config", "x.yaml"], "the configuration file stands by itself: x.yaml"),
        (["--config=x.yaml"], "the configuration file stands by itself: x.yaml"),
        (["--config"], "the configuration file stands by itself: FILE"),
        (["--model.name", "x"], "settings are given as key=value: model.name=x"),
        (["--train.lr=3"], "settings are given as key=value: train.lr=3"),
        (["--learning-rate=3"], "unknown option '--learning-rate=3'; in sfed: train.lr"),
    ],
)
def test_keys_and_options_of_other_programs_are_answered_with_ours(words, answer):
    assert answer in told(*words)


def test_keys_of_others_are_none_of_ours_and_name_ours():
    known = {key for key, _, _ in config_load.list_keys()}
    leaves = {key.rpartition(".")[2] for key in known}
    assert not leaves & FOREIGN_KEYS.keys()
    for theirs, ours in FOREIGN_KEYS.items():
        named = set(re.findall(r"[a-z]+\.[a-z_0-9]+", ours))
        assert named <= known, theirs
        assert named or ours.startswith("no "), theirs


def test_a_word_is_a_list_of_one_and_a_tilde_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    words = ["evaluation.adapters=global", "output.trackers=wandb", "output.dir=~/runs"]
    words += ["model.name=~/models/x", "data.train_files=[~/a.jsonl,b.jsonl]"]
    config = config_load.load(None, ["data.task=jsonl", *words])
    assert config.evaluation.adapters == ("global",)
    assert config.output.trackers == ("wandb",)
    assert config.output.dir == "/home/me/runs"
    assert config.model.name == "/home/me/models/x"
    assert config.data.train_files == ("/home/me/a.jsonl", "b.jsonl")


# --- paths in a configuration file ---------------------------------------------------------------

PATHS = """
model: {name: models/x}
data: {task: jsonl, train_files: ["{client}.jsonl"], eval_files: gone.jsonl}
partition: {kind: by_file}
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A command runs in one folder, and its configuration is in another one."""
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    (tmp_path / "there" / "config.yaml").write_text(PATHS)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def make(folder):
    (folder / "models" / "x").mkdir(parents=True)
    (folder / "0.jsonl").touch()


def test_paths_in_a_configuration_file_follow_the_file(project, caplog):
    make(project / "there")
    make(project / "here")
    config = config_load.load("../there/config.yaml")
    assert config.model.name == "../there/models/x"
    assert config.data.train_files == ("../there/{client}.jsonl",)
    assert config.data.eval_files == "gone.jsonl"
    assert not caplog.records


def test_a_path_that_is_found_from_the_command_alone_is_kept_with_a_warning(project, caplog):
    make(project / "here")
    config = config_load.load("../there/config.yaml")
    assert config.model.name == "models/x"
    assert config.data.train_files == ("{client}.jsonl",)
    assert [record.getMessage().partition(" of ")[0] for record in caplog.records] == [
        "model.name: 'models/x'",
        "data.train_files: '{client}.jsonl'",
    ]


def test_a_file_beside_the_command_says_paths_as_they_are(project, monkeypatch, caplog):
    make(project / "there")
    monkeypatch.chdir(project / "there")
    config = config_load.load("config.yaml", ["data.eval_files=other.jsonl"])
    assert config.model.name == "models/x"
    assert config.data.train_files == ("{client}.jsonl",)
    assert config.data.eval_files == "other.jsonl"
    assert not caplog.records


def test_an_unknown_key_like_no_other_points_to_help():
    assert "xyzzy = 1: unknown key; see --help" in mistake_of("xyzzy=1")


def test_all_mistakes_come_in_one_message():
    message = mistake_of("lora.rank=0", "train.lr=-1.5", "model.dtype=fp64", "nonsense=1", "seed=x")
    assert message.startswith("5 errors")
    for part in ("lora.rank = 0", "train.lr = -1.5", 'model.dtype = "fp64"', "nonsense = 1"):
        assert part in message
    assert 'seed = "x"' in message


def test_a_mistake_says_key_value_bound_and_meaning():
    message = mistake_of("lora.dropout=1")
    assert (
        "lora.dropout = 1: input should be less than 1 (Dropout probability on the input" in message
    )


@pytest.mark.parametrize(
    "setting",
    [
        "lora.rank=true",
        'lora.rank="8"',
        "lora.rank=8.0",
        "federated.num_rounds=1e1",
        "seed=false",
        "model.name=5",
        "model.name=true",
        "train.lr=true",
        'train.lr="1e-3"',
        "backbone.gradient_checkpointing=1",
        'backbone.gradient_checkpointing="true"',
        "lora.target_modules=5",
        "lora.target_modules=[1]",
        "lora.scaling=[0.5]",
        "lora.scaling=[true, 0]",
        "lora.scaling=[half, 0]",
        "lora.scaling=[1/0, 0]",
        "lora=4",
        "evaluation.adapters=[local]",
        "output.name=../elsewhere",
        "output.name=a/b",
    ],
)
def test_a_value_of_another_type_or_form_is_refused_and_never_converted(setting):
    assert setting.partition("=")[0] in mistake_of(setting)


@pytest.mark.parametrize(
    "key", ["train.lr", "train.weight_decay", "train.loraplus_ratio", "lora.alpha"]
)
@pytest.mark.parametrize("text", [".nan", ".inf", "-.inf", "-1.0"])
def test_a_number_of_training_is_finite_and_not_negative(key, text):
    assert key in mistake_of(f"{key}={text}")


@pytest.mark.parametrize("text", [".nan", ".inf"])
def test_an_exponent_is_finite(text):
    assert "lora.scaling" in mistake_of(f"lora.scaling=[{text}, 0]")


@pytest.mark.parametrize("key", sorted(DEAD_DEEPSPEED_KEYS))
def test_a_deepspeed_key_without_effect_is_refused_with_ours(key):
    message = mistake_of(f"backbone.deepspeed.{key}={{x: 1}}")
    assert f"backbone.deepspeed.{key} has no effect here" in message
    assert f"use {DEAD_DEEPSPEED_KEYS[key]} instead" in message
    known = [name for name, _, _ in config_load.list_keys()]
    ours = DEAD_DEEPSPEED_KEYS[key].replace(",", " ").replace(" and ", " ").split()
    assert ours and set(ours) <= set(known)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (["backbone.deepspeed.zero_optimization.stage=2"], ["stage is 2", "sharding=none"]),
        (["backbone.deepspeed.zero_optimization=3"], ["zero_optimization", "mapping"]),
        (["backbone.offload=cpu", "backbone.sharding=none"], ["backbone.offload", "zero3"]),
        (["train.local_steps=2", "train.local_epochs=1"], ["train.local_steps", "local_epochs"]),
        (["train.batch_size=4", "train.micro_batch_size=5"], ["micro_batch_size=5", "size=4"]),
        (["federated.clients_per_round=9"], ["clients_per_round=9", "num_clients=8"]),
        (["partition.key=null"], ["partition.kind=by_key needs partition.key"]),
        (["partition.kind=by_file"], ["partition.kind=by_file needs data.train_files"]),
        (["data.train_files=a-{client}.jsonl"], ["{client}", "partition.kind=by_file"]),
        (["data.task=jsonl"], ["data.task=jsonl needs data.train_files"]),
        (["data.task=text"], ["data.task=text needs data.train_files"]),
        (["data.on_small_client=skip"], ["data.on_small_client=skip", "partition.kind=by_file"]),
        (["data.split=all"], ["data.split needs", "hub:org/name", "data.train_files"]),
        (["data.eval_split=all"], ["data.eval_split needs", "data.eval_files"]),
        (["data.template={q}"], ["quote a value"]),
        (["data.chat_loss=last"], ["data.chat_loss needs data.task=text"]),
        (["data.columns.text=x"], ["data.columns needs data.task=text"]),
        ([*TEXT, "data.columns.texts=x"], ["data.columns", "'messages', 'tools'"]),
        ([*TEXT, "data.columns={prompt: x, text: y}"], ["belong to 2 forms"]),
        ([*TEXT, "data.columns={prompt: x, completion: x}"], ["are both 'x'"]),
        ([*TEXT, "data.template=none"], ["'none' names no column", "{name}"]),
        ([*TEXT, "data.template=x {a.b}"], ["'a.b' is not the plain name"]),
        ([*TEXT, "data.template=x {a[0]}"], ["'a[0]' is not the plain name"]),
        ([*TEXT, "data.template=x {a!r}"], ["'a' is not the plain name"]),
        ([*TEXT, "data.template=x {a:9}"], ["'a' is not the plain name"]),
        ([*TEXT, "data.template=x {}"], ["'' is not the plain name"]),
        ([*TEXT, "data.template=x {a"], ["data.template", "before end of string"]),
        ([*TEXT, "data.template=x {a}", "data.columns.prompt=b"], ["names prompt", "completion"]),
        ([*TEXT, "data.template=x {a}", "data.chat_template=b"], ["exclude each other"]),
        (["data.train_files=a.jsonl"], ["data.task=demo makes its own data"]),
    ],
)
def test_settings_that_do_not_go_together_are_refused_with_a_remedy(settings, parts):
    message = mistake_of("train.local_steps=null", *settings)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("lora:\n  rank: 4\n  alpha: 2.0\n  rank: 8\n", 4, "rank"),
        ("seed: 1\nlora: {}\nseed: 1\n", 3, "seed"),
        ('{"lora": {"rank": 4,\n "rank": 4}}', 2, "rank"),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_its_line(tmp_path, text, line, key):
    path = save(tmp_path, text)
    message = mistake_of(path)
    assert message.startswith(f"{path}, line {line}:")
    assert f"{key!r} stands twice" in message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("lora: [\n", "not readable as YAML or JSON"),
        ("lora:\n\trank: 3\n", "not readable as YAML or JSON"),
        ("- 1\n- 2\n", "holds list, not a mapping"),
        ("{}\n---\n{}\n", "not readable as YAML or JSON"),
        ("x: !!python/object:os.system 1", "not readable as YAML or JSON"),
        ("lora: &x\n  rank: *x\n", ""),
        ("2024-01-01: 3\n", ""),
        ("? [a, b]\n: 3\n", ""),
    ],
)
def test_a_file_that_holds_no_settings_is_refused_by_its_name(tmp_path, text, part):
    path = save(tmp_path, text)
    message = mistake_of(path)
    assert part in message
    assert path in message or "configuration" in message


def test_a_file_that_is_not_text_is_refused_by_its_name(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(b"seed: \xff\xfe")
    assert str(path) in mistake_of(str(path))


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["nowhere.yaml"], "'nowhere.yaml' does not exist"),
        (["/"], "'/' is no file"),
        (["--rank=3"], "unknown option '--rank=3'"),
        (["=3"], "'=3': the key is empty"),
        (["lora.=3"], "'lora.=3': the key is empty or has an empty part"),
        (["lora.rank=[1"], "'lora.rank=[1': the value is not readable"),
        ([DEMO, "model.name.x=1"], "model.name is 'demo', not a section"),
    ],
)
def test_a_word_that_makes_no_sense_is_refused_by_itself(arguments, part):
    assert part in mistake_of(*arguments)


def test_two_configuration_files_are_refused_by_their_names(tmp_path):
    first, second = save(tmp_path, "", "a.yaml"), save(tmp_path, "", "b.yaml")
    message = mistake_of(first, second)
    assert first in message and second in message


# --- the command ---------------------------------------------------------------------------------


def test_modules_that_answer_a_mistake_import_no_torch():
    modules = "sfed.config.load, sfed.config.schema, sfed.methods.method, sfed.data.partition"
    modules += ", sfed.observability.metrics, sfed.observability.console, sfed.observability.logs"
    modules += ", sfed.data.tasks, sfed.methods.scaling, sfed.utils.rng, sfed.train"
    code = f"import sys, {modules}; print({{'torch', 'transformers', 'peft'}} & set(sys.modules))"
    assert run_python("-c", code).stdout == "set()\n"


def test_a_wrong_key_ends_the_command_with_one_message_and_code_two():
    done = run_python("-m", "sfed.train", DEMO, "nonsense=1", RANK="0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "sfed: an error in the configuration\n"
        "  nonsense = 1: unknown key; see --help for all keys\n"
    )


@pytest.mark.parametrize("command", ["sfed.train", "sfed.plan"])
def test_keys_without_model_and_task_end_the_command_with_code_two(command):
    done = run_python("-m", command, "lora.rank=4")
    assert (done.returncode, done.stdout) == (2, "")
    assert NO_MODEL in done.stderr and NO_TASK in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_key_is_answered_without_torch():
    code = inspect.cleandoc("""
        import sys
        from sfed import train
        from sfed.utils import command
        sys.argv = ["train", "nonsense=1"]
        try:
            command.run_command(train.main)
        except SystemExit as end:
            print(end.code, {"torch", "transformers", "deepspeed", "numpy"} & set(sys.modules))
    """)
    assert run_python("-c", code).stdout in ("2 set()\n", "2 {'numpy'}\n")


def test_only_process_zero_speaks_of_a_mistake_but_all_exit_with_two():
    done = run_python("-m", "sfed.train", "nonsense=1", RANK="1", WORLD_SIZE="2")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (
            ["model.name=x", "data.task=jsonl", "data.train_files=none.jsonl"],
            "data.train_files: 'none.jsonl'",
        ),
        ([DEMO, "output.resume=nowhere"], "output.resume = 'nowhere'"),
        ([DEMO, "lora.init=shared"], "lora.init=shared with a gamma that grows with N"),
    ],
)
def test_what_can_be_checked_without_a_model_is_checked_before_torch(arguments, part):
    done = run_python("-X", "importtime", "-m", "sfed.train", *arguments)
    assert done.returncode == 2
    assert f"{part}" in done.stderr
    assert "Traceback" not in done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "sfed.config.schema" in imported and "torch" not in imported


def test_more_processes_than_clients_are_refused_before_torch():
    done = run_python("-m", "sfed.train", WORLD_SIZE="9", RANK="0")
    assert done.returncode == 2
    assert "federated.num_clients = 8 is less than the 9 processes" in done.stderr


def test_help_is_printed_by_process_zero_alone():
    assert "federated.num_clients" in run_python("-m", "sfed.train", "--help", RANK="0").stdout
    silent = run_python("-m", "sfed.train", "--help", RANK="1", WORLD_SIZE="2")
    assert (silent.returncode, silent.stdout, silent.stderr) == (0, "", "")


def test_any_other_failure_is_not_disguised_as_a_mistake_of_the_user():
    def broken(_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        command.run_command(broken)


def test_default_numbers_are_finite():
    for key, default, _ in config_load.list_keys():
        value = None if key in schema.REQUIRED else json.loads(default)
        assert not isinstance(value, float) or math.isfinite(value), key


def test_a_resumed_run_may_call_its_task_by_either_name_and_know_no_newer_keys():
    old, new = (
        config_load.validate({"data": {"task": name, "train_files": "a.jsonl"}})
        for name in ("jsonl", "text")
    )
    before = comparable(old, 2)
    assert differences(before, comparable(new, 2)) == []
    for key in ("columns", "template", "chat_template", "chat_loss", "on_long"):
        del before[f"data.{key}"]
    assert differences(before, comparable(new, 2)) == []
    dropping = config_load.validate(
        {"data": {"task": "text", "train_files": "a.jsonl", "on_long": "drop"}}
    )
    (line,) = differences(before, comparable(dropping, 2))
    assert line == "data.on_long: 'truncate' there, 'drop' now"


@pytest.mark.parametrize(
    ("override", "most"),
    [
        ("lora.rank=65537", "65536"),
        ("lora.rank=[8, 65537]", "65536"),
        ("clients.0.rank=65537", "65536"),
        ("train.batch_size=1000001", "1000000"),
        ("evaluation.batch_size=1000001", "1000000"),
        ("federated.num_rounds=1000000001", "1000000000"),
        ("evaluation.every_rounds=1000000001", "1000000000"),
        ("data.max_tokens=100000000000000000000", "1000000000"),
    ],
)
def test_what_is_counted_has_an_upper_bound(override, most):
    with pytest.raises(UserError) as caught:
        config_load.load(None, ["data.task=demo", override])
    message = str(caught.value).replace(",", "")
    assert override.partition("=")[0] in message and most in message


@pytest.mark.parametrize("text", ["1e999999999", "1/0", "x", "nan", "9" * 400 + "/1"])
def test_an_exponent_that_is_no_finite_number_is_refused_at_once(text):
    with pytest.raises(UserError, match=r"lora\.scaling = "):
        config_load.load(None, ["data.task=demo", f"lora.scaling=['{text}', 0]"])


@pytest.mark.parametrize(
    ("text", "rank"), [("010", 10), ("08", 8), ("0x10", 16), ("0o10", 8), ("1_0", 10), ("+8", 8)]
)
def test_a_whole_number_is_decimal_unless_it_says_otherwise(text, rank):
    assert config_load.load(None, ["data.task=demo", f"lora.rank={text}"]).lora.rank == rank


@pytest.mark.parametrize("text", ["1:30", "0b", "0x", "_1", "0o9", "٣"])
def test_what_only_looks_like_a_whole_number_is_none(text):
    with pytest.raises(UserError, match=r"lora\.rank = "):
        config_load.load(None, ["data.task=demo", f"lora.rank={text}"])


def test_a_key_of_words_or_numbers_says_what_numbers_it_takes():
    assert "[p, q]" in told(DEMO, "lora.scaling=[x, 0]")
