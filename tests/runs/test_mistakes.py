"""Malformed inputs: each gets one plain message, none hangs, none breaks the next start."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from sfed import train
from sfed.config import load as config_load
from sfed.federated import local, preflight
from sfed.models.backbone import Backbone
from sfed.utils.command import EXIT_MISTAKE
from sfed.utils.errors import UserError
from tests.support import launchers, runs, tiny
from tests.support.deadlines import HANG_SECONDS
from tests.support.processes import free_port, on_processes
from tests.support.selection import full

GOOD_ROW = '{"prompt": "a:", "completion": " b", "kind": "x"}\n'
LONG_ROW = json.dumps({"prompt": "p" * 200, "completion": "c"}) + "\n"


@pytest.fixture(autouse=True)
def _deadline_and_tidy_process() -> Iterator[None]:
    """A hang is a failure; what a session changes of its process is put back."""

    def too_late(_signal: int, _frame: object) -> None:
        raise TimeoutError(f"no answer within {HANG_SECONDS:g} s")

    on_alarm, on_terminate = (
        signal.signal(signal.SIGALRM, too_late),
        signal.getsignal(signal.SIGTERM),
    )
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
    with warnings.catch_warnings():
        yield
    logging.captureWarnings(False)
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    signal.signal(signal.SIGALRM, on_alarm)
    signal.signal(signal.SIGTERM, on_terminate)


@pytest.fixture
def folder(tmp_path: Path, tiny_folder: Path) -> Path:
    """A folder of its own with ``model`` and ``rows.jsonl`` (20 rows of 4 kinds)."""
    fill(tmp_path, tiny_folder)
    return tmp_path


def fill(folder: Path, tiny_folder: Path) -> None:
    shutil.copytree(tiny_folder / "model", folder / "model")
    tiny.save_rows(folder / "rows.jsonl", 20, kinds=4)


def filled(value: Any, folder: Path) -> Any:
    """The same with FOLDER replaced, in lists too."""
    if isinstance(value, str):
        return value.replace("FOLDER", str(folder))
    return [filled(inner, folder) for inner in value] if isinstance(value, list) else value


def quick_settings(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Settings of the quickest run, with ``section.key`` changes over them."""
    settings = tiny.settings(
        folder,
        federated={"num_clients": 2, "num_rounds": 1},
        train={"local_steps": 1, "batch_size": 2},
        evaluation={"max_examples": 2},
    )
    settings["output"]["report"] = False
    for dotted, value in changes.items():
        section, _, key = dotted.rpartition(".")
        target = settings.setdefault(section, {}) if section else settings
        target[key] = filled(value, folder)
    return settings


def written(folder: Path, changes: dict[str, Any]) -> list[str]:
    """Command line of a run: a file with ``quick_settings``."""
    path = folder / "config.json"
    path.write_text(json.dumps(quick_settings(folder, changes)), encoding="utf-8")
    return [str(path)]


def assert_next_start_is_good(folder: Path, tiny_folder: Path) -> None:
    """With the mistake put right, the same output folder trains and writes adapters."""
    shutil.rmtree(folder / "model")
    fill(folder, tiny_folder)
    train.main(written(folder, {}))
    for client in ("client-0000", "client-0001", "global"):
        assert_finite(folder / "runs" / "run" / "adapters" / client)


def assert_finite(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert tensors
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


# --- what spoils a folder -------------------------------------------------------------------------


def cut_weights(folder: Path) -> None:
    path = folder / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble_weights(folder: Path) -> None:
    (folder / "model" / "model.safetensors").write_bytes(b"not a tensor " * 50)


def remove_weights(folder: Path) -> None:
    (folder / "model" / "model.safetensors").unlink()


def break_model_config(folder: Path) -> None:
    (folder / "model" / "config.json").write_text('{"model_type": "llama",')


def name_no_model_type(folder: Path) -> None:
    (folder / "model" / "config.json").write_text("{}")


def name_unknown_model_type(folder: Path) -> None:
    (folder / "model" / "config.json").write_text('{"model_type": "no-such-model"}')


def remove_tokenizer(folder: Path) -> None:
    for path in (folder / "model").glob("tokenizer*"):
        path.unlink()


def break_tokenizer(folder: Path) -> None:
    (folder / "model" / "tokenizer.json").write_text('{"model": ')


def empty_tokenizer(folder: Path) -> None:
    (folder / "model" / "tokenizer.json").write_text("{}")


def change_model_config(folder: Path, **changes: Any) -> None:
    path = folder / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def save_model_of_few_tokens(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder / "model")
    config.vocab_size = 50
    LlamaForCausalLM(config).save_pretrained(folder / "model")


def save_gpt2(folder: Path) -> None:
    sizes = {"vocab_size": 258, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 128}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(folder / "model")


def save_held_out(folder: Path, names: str) -> None:
    folder.mkdir()
    for name in names:
        (folder / f"{name}.jsonl").write_text(GOOD_ROW)


def block_adapters(folder: Path) -> None:
    (folder / "runs" / "run").mkdir(parents=True)
    (folder / "runs" / "run" / "adapters").write_text("in the way")


def finish_a_run(folder: Path) -> None:
    train.main(written(folder, {}))


# --- the table ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mistake:
    """One malformed input and what its message has to say."""

    name: str
    words: tuple[str, ...]
    """Each stands in the message; FOLDER is the test's folder, here and below."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Changes to a good configuration, by ``section.key``."""
    files: dict[str, str | bytes] = field(default_factory=dict)
    """What to write into the folder."""
    arguments: tuple[str, ...] | None = None
    """The command line instead of a file with the settings."""
    spoil: Callable[[Path], None] | None = None
    """What else to do to the folder."""
    own_process: bool = False
    """Whether it leaves traces in a process, as DeepSpeed does."""

    def made_in(self, folder: Path) -> list[str]:
        """Make the malformed input; returns the command line."""
        for name, content in self.files.items():
            raw = content if isinstance(content, bytes) else content.encode()
            (folder / name).write_bytes(raw)
        if self.spoil is not None:
            self.spoil(folder)
        if self.arguments is not None:
            return [filled(argument, folder) for argument in self.arguments]
        return written(folder, self.settings)


def by_file(**more: Any) -> dict[str, Any]:
    pattern = {"data.train_files": "FOLDER/{client}.jsonl", "partition.kind": "by_file"}
    return {**pattern, **{key.replace("__", "."): value for key, value in more.items()}}


CONFIG_MISTAKES = [
    # keys
    Mistake("unknown key", ("lora.rnak", "unknown key", "lora.rank"), {"lora.rnak": 4}),
    Mistake("unknown key without a like one", ("zzzzzz", "--help"), {"zzzzzz.q": 4}),
    Mistake("unknown section", ("lorra", "unknown key", "lora"), {"lorra.rank": 4}),
    Mistake("key of another section", ("train.rank", "lora.rank"), {"train.rank": 4}),
    Mistake(
        "two mistakes at once",
        ("2 errors", "lora.rank", "train.lr"),
        {"lora.rank": 0, "train.lr": 0},
    ),
    # types
    Mistake("wrong type", ("lora.rank", '"eight"', "integer"), {"lora.rank": "eight"}),
    Mistake("number as text", ("train.lr", '"1e-3"', "number"), {"train.lr": "1e-3"}),
    Mistake("fraction of a step", ("train.local_steps", "1.5"), {"train.local_steps": 1.5}),
    Mistake("value instead of a section", ("lora", "8"), {"lora": 8}),
    Mistake(
        "no such method", ("federated.method", "fedavg", "sfed"), {"federated.method": "fedavg"}
    ),
    Mistake("exponent that is no number", ("lora.scaling", "much"), {"lora.scaling": ["much", 0]}),
    Mistake("exponent over zero", ("lora.scaling", "1/0"), {"lora.scaling": ["1/0", 0]}),
    # bounds
    Mistake("rank 0", ("lora.rank", "0", "greater than 0"), {"lora.rank": 0}),
    Mistake("dropout 1", ("lora.dropout", "1", "less than 1"), {"lora.dropout": 1.0}),
    Mistake("negative lr", ("train.lr", "-1", "greater than 0"), {"train.lr": -1.0}),
    Mistake("infinite lr", ("train.lr", "finite"), arguments=("train.lr=.inf",)),
    Mistake("lr that is no number", ("train.lr", "NaN"), arguments=("train.lr=.nan",)),
    Mistake(
        "endless deadline",
        ("federated.deadline_seconds", "finite"),
        arguments=("federated.deadline_seconds=.inf",),
    ),
    Mistake(
        "deadline of ages",
        ("federated.deadline_seconds", "less than"),
        arguments=("federated.deadline_seconds=1e18",),
    ),
    Mistake("no rounds", ("federated.num_rounds", "greater than 0"), {"federated.num_rounds": 0}),
    Mistake("no client", ("federated.num_clients", "greater than 0"), {"federated.num_clients": 0}),
    Mistake(
        "all data held out", ("data.eval_fraction", "less than 1"), {"data.eval_fraction": 1.0}
    ),
    Mistake("run name with a path", ("output.name", "../up"), {"output.name": "../up"}),
    # keys that do not go together
    Mistake(
        "steps and epochs",
        ("train.local_steps", "train.local_epochs", "null"),
        {"train.local_epochs": 1},
    ),
    Mistake(
        "micro batch above batch",
        ("train.micro_batch_size=4", "train.batch_size=2"),
        {"train.micro_batch_size": 4},
    ),
    Mistake(
        "cohort above clients",
        ("federated.clients_per_round=3", "federated.num_clients=2"),
        {"federated.clients_per_round": 3},
    ),
    Mistake(
        "dead DeepSpeed key",
        ("backbone.deepspeed.optimizer", "train.optimizer"),
        {"backbone.deepspeed": {"optimizer": {"type": "Adam"}}},
    ),
    Mistake(
        "wrong ZeRO stage",
        ("backbone.deepspeed.zero_optimization.stage", "2", "sharding=none"),
        {"backbone.deepspeed": {"zero_optimization": {"stage": 2}}},
    ),
    Mistake(
        "ZeRO section that is no mapping",
        ("backbone.deepspeed.zero_optimization", "3"),
        {"backbone.deepspeed": {"zero_optimization": 3}},
    ),
    Mistake(
        "offload of replicas",
        ("backbone.offload=cpu", "zero3"),
        {"backbone.offload": "cpu", "backbone.sharding": "none"},
    ),
    Mistake(
        "unstable start and scaling",
        ("lora.init=shared", "lora.scaling=rslora", "lora.allow_unstable"),
        {"lora.init": "shared"},
    ),
    Mistake(
        "by_key without key",
        ("partition.kind=by_key", "partition.key"),
        {"partition.kind": "by_key"},
    ),
    Mistake(
        "by_file without {client}",
        ("partition.kind=by_file", "{client}", "data.train_files"),
        {"partition.kind": "by_file"},
    ),
    Mistake(
        "{client} without by_file",
        ("data.train_files", "{client}", "partition.kind=by_file"),
        {"data.train_files": "FOLDER/{client}.jsonl"},
    ),
    Mistake(
        "{client} in held-out files without by_file",
        ("data.eval_files", "{client}", "partition.kind=by_file"),
        {"data.eval_files": "FOLDER/{client}.jsonl"},
    ),
    Mistake("jsonl without files", ("data.train_files",), {"data.train_files": None}),
    # files that are not there
    Mistake(
        "missing train file",
        ("data.train_files", "FOLDER/none.jsonl", "does not exist"),
        {"data.train_files": "FOLDER/none.jsonl"},
    ),
    Mistake(
        "missing held-out file",
        ("data.eval_files", "FOLDER/none.jsonl", "does not exist"),
        {"data.eval_files": "FOLDER/none.jsonl"},
    ),
    Mistake(
        "train files are those of a model",
        ("data.train_files", "FOLDER/model", "model.safetensors", "not read", ".jsonl"),
        {"data.train_files": "FOLDER/model"},
    ),
    # what is in the files
    Mistake(
        "malformed held-out line",
        ("FOLDER/held.jsonl, line 3", "not JSON"),
        {"data.eval_files": "FOLDER/held.jsonl"},
        files={"held.jsonl": GOOD_ROW + GOOD_ROW + "oops\n"},
    ),
    Mistake(
        "row of another form",
        ("FOLDER/rows.jsonl, line 1", "'prompt'", "prompt, completion"),
        files={"rows.jsonl": '{"question": "a", "answer": "b"}\n'},
    ),
    Mistake(
        "prompt that is no text",
        ("FOLDER/rows.jsonl, line 2", "'prompt'", "not text"),
        files={"rows.jsonl": GOOD_ROW + '{"prompt": 3, "completion": " b"}\n'},
    ),
    Mistake(
        "row that is a list",
        ("FOLDER/rows.jsonl, line 2", "list", "prompt, completion"),
        files={"rows.jsonl": GOOD_ROW + '["a", "b"]\n'},
    ),
    Mistake(
        "half a character",
        ("FOLDER/rows.jsonl, line 2",),
        files={"rows.jsonl": GOOD_ROW + '{"prompt": "\\ud800", "completion": " b"}\n'},
    ),
    Mistake(
        "file that is not UTF-8",
        ("FOLDER/rows.jsonl", "UTF-8"),
        files={"rows.jsonl": GOOD_ROW.encode() + b'{"prompt": "\xe9", "completion": "b"}\n'},
    ),
    Mistake(
        ".json file that is no list",
        ("FOLDER/rows.json", "list of rows", ".jsonl"),
        {"data.train_files": "FOLDER/rows.json"},
        files={"rows.json": GOOD_ROW},
    ),
    Mistake(
        "wrong number of files",
        ("data.train_files", "2 files", "3 clients"),
        by_file(
            data__train_files=["FOLDER/rows.jsonl", "FOLDER/more.jsonl"], federated__num_clients=3
        ),
        files={"more.jsonl": GOOD_ROW * 4},
    ),
    Mistake(
        "file that is named twice",
        ("data.train_files", "FOLDER/rows.jsonl", "named twice"),
        {"data.train_files": ["FOLDER/rows.jsonl"] * 2},
    ),
    Mistake(
        "file of an unknown kind",
        ("data.train_files", "FOLDER/rows.xlsx", "not read", ".csv", ".parquet"),
        {"data.train_files": "FOLDER/rows.xlsx"},
        files={"rows.xlsx": b"PK"},
    ),
    Mistake(
        "glob that matches nothing",
        ("data.train_files", "FOLDER/*.tsv", "no file"),
        {"data.train_files": "FOLDER/*.tsv"},
    ),
    Mistake(
        "one file as several clients",
        ("partition.kind=by_file", "FOLDER/rows.jsonl", "{client}"),
        by_file(data__train_files="FOLDER/rows.jsonl", federated__num_clients=None),
    ),
    Mistake(
        "everything that is wrong in several files",
        (
            "2 of 3 files",
            "FOLDER/a.jsonl, line 2",
            "FOLDER/b.csv, line 3: 1 fields",
            "2 more of its",
        ),
        {"data.train_files": ["FOLDER/rows.jsonl", "FOLDER/a.jsonl", "FOLDER/b.csv"]},
        files={
            "a.jsonl": GOOD_ROW + '{"prompt": 3, "completion": "b"}\n',
            "b.csv": "prompt,completion\na,b\n" + "a\n" * 4,
        },
    ),
    Mistake(
        "all clients with too few rows",
        (
            "FOLDER/a.jsonl: it holds no rows",
            "FOLDER/b.jsonl: it holds 2 rows",
            "at least 3",
            "skip",
        ),
        by_file(data__train_files="FOLDER/?.jsonl", federated__num_clients=None),
        files={"a.jsonl": "", "b.jsonl": GOOD_ROW * 2, "c.jsonl": GOOD_ROW * 3},
    ),
    Mistake(
        "file of a client that is broken, and an empty held-out file",
        ("2 of 3 files", "FOLDER/a.json: not JSON", "FOLDER/h.csv: it holds no rows; nothing can"),
        by_file(
            data__train_files=["FOLDER/a.json", "FOLDER/rows.jsonl"],
            data__eval_files="FOLDER/h.csv",
            federated__num_clients=None,
        ),
        files={"a.json": "[", "h.csv": "prompt,completion\n"},
    ),
    Mistake(
        "held-out files of other names",
        ("data.eval_files", "no held-out file for 'b'", "no training file for 'c'"),
        by_file(
            data__train_files=["FOLDER/a.jsonl", "FOLDER/b.jsonl"],
            data__eval_files="FOLDER/held",
            federated__num_clients=None,
        ),
        files={"a.jsonl": GOOD_ROW * 3, "b.jsonl": GOOD_ROW * 3},
        spoil=lambda folder: save_held_out(folder / "held", "ac"),
    ),
    # the run folder
    Mistake(
        "resume from nowhere",
        ("output.resume", "FOLDER/none", "auto"),
        {"output.resume": "FOLDER/none"},
    ),
    # the configuration file and the command line
    Mistake(
        "missing configuration", ("FOLDER/no.yaml", "does not exist"), arguments=("FOLDER/no.yaml",)
    ),
    Mistake(
        "two configurations",
        ("two configuration files", "FOLDER/a.yaml", "FOLDER/b.yaml"),
        files={"a.yaml": "seed: 1", "b.yaml": "seed: 2"},
        arguments=("FOLDER/a.yaml", "FOLDER/b.yaml"),
    ),
    Mistake(
        "bad YAML",
        ("FOLDER/a.yaml", "line 2"),
        files={"a.yaml": "lora:\n  rank: [8\n"},
        arguments=("FOLDER/a.yaml",),
    ),
    Mistake(
        "configuration that is not text",
        ("FOLDER/a.yaml", "not readable"),
        files={"a.yaml": b"\xff\xfe\x00\x01"},
        arguments=("FOLDER/a.yaml",),
    ),
    Mistake(
        "key that stands twice",
        ("FOLDER/a.yaml", "line 3", "'rank'", "twice"),
        files={"a.yaml": "lora:\n  rank: 8\n  rank: 4\n"},
        arguments=("FOLDER/a.yaml",),
    ),
    Mistake(
        "configuration that is no mapping",
        ("FOLDER/a.yaml", "list", "mapping"),
        files={"a.yaml": "- lora\n- train\n"},
        arguments=("FOLDER/a.yaml",),
    ),
    Mistake(
        "configuration that holds itself",
        ("a.yaml", "aliases expand to more than"),
        files={"a.yaml": "lora: &lora\n  rank: *lora\n"},
        arguments=("FOLDER/a.yaml",),
    ),
    Mistake("unknown option", ("--rank", "key=value"), arguments=("--rank=8",)),
    Mistake("bad YAML in an override", ("lora.rank=[8",), arguments=("lora.rank=[8",)),
    Mistake("key below a value", ("seed.deep=1", "seed"), arguments=("seed=3", "seed.deep=1")),
]

SESSION_MISTAKES = [
    # rows
    Mistake(
        "malformed line",
        ("FOLDER/rows.jsonl, line 2", "not JSON"),
        files={"rows.jsonl": GOOD_ROW + '{"prompt": "a"\n' + GOOD_ROW},
    ),
    Mistake(
        "only empty completions",
        ("no row", "has a completion"),
        files={"rows.jsonl": '{"prompt": "a", "completion": " "}\n' * 3},
    ),
    Mistake("empty file", ("FOLDER/rows.jsonl", "no rows"), files={"rows.jsonl": ""}),
    Mistake("file of blank lines", ("FOLDER/rows.jsonl", "no rows"), files={"rows.jsonl": "\n \n"}),
    Mistake(
        "no room for a completion",
        ("data.max_tokens", "completion"),
        files={"rows.jsonl": LONG_ROW * 4},
    ),
    Mistake(
        "longer than the model's context",
        ("data.max_tokens", "256", "128"),
        {"data.max_tokens": 256},
        files={"rows.jsonl": LONG_ROW * 8},
    ),
    # clients
    Mistake(
        "more clients than examples",
        ("at least 2 training examples", "client 7 holds", "8 more", "federated.num_clients"),
        {"federated.num_clients": 16},
    ),
    Mistake(
        "empty clients of a skewed split",
        ("at least 2 training examples", "holds 0", "partition.concentration"),
        {
            "partition.kind": "dirichlet",
            "partition.concentration": 1e-4,
            "partition.key": "kind",
            "federated.num_clients": 8,
        },
    ),
    Mistake(
        "key that is not a column",
        ("FOLDER/rows.jsonl, line 1", "'colour'", "partition.key", "kind"),
        {"partition.kind": "by_key", "partition.key": "colour"},
    ),
    Mistake(
        "fewer values than clients",
        ("partition.kind=by_key", "4 values", "5 clients", "federated.num_clients"),
        {"partition.kind": "by_key", "partition.key": "kind", "federated.num_clients": 5},
    ),
    Mistake(
        "one client's file is missing",
        ("data.train_files", "FOLDER/1.jsonl"),
        by_file(),
        files={"0.jsonl": GOOD_ROW * 4},
    ),
    Mistake(
        "one client's file is short",
        ("client 1 holds 1", "files of these clients"),
        by_file(),
        files={"0.jsonl": GOOD_ROW * 4, "1.jsonl": GOOD_ROW * 2},
    ),
    Mistake(
        "cohort above one client per process",
        ("federated.clients_per_round = 2", "1 clients"),
        {"federated.num_clients": None, "federated.clients_per_round": 2},
    ),
    # the model
    Mistake("missing model folder", ("model.name", "FOLDER/no"), {"model.name": "FOLDER/no"}),
    Mistake(
        "hub id that cannot be reached",
        ("model.name", "nobody/such-model"),
        {"model.name": "nobody/such-model"},
    ),
    Mistake("broken config.json", ("model.name", "FOLDER/model"), spoil=break_model_config),
    Mistake("config.json of nothing", ("model.name", "FOLDER/model"), spoil=name_no_model_type),
    Mistake("unknown model type", ("model.name", "no-such-model"), spoil=name_unknown_model_type),
    Mistake("truncated weights", ("model.name", "FOLDER/model"), spoil=cut_weights),
    Mistake("garbled weights", ("model.name", "FOLDER/model"), spoil=garble_weights),
    Mistake(
        "weights of another shape",
        ("model.name", "FOLDER/model"),
        spoil=lambda folder: change_model_config(folder, intermediate_size=99),
    ),
    Mistake(
        "weights of fewer layers",
        ("model.name", "FOLDER/model", "layers.2"),
        spoil=lambda folder: change_model_config(folder, num_hidden_layers=3),
    ),
    Mistake(
        "config.json with a wrong type",
        ("model.name", "FOLDER/model", "hidden_size"),
        spoil=lambda folder: change_model_config(folder, hidden_size="big"),
    ),
    Mistake(
        "tokenizer with more tokens than the model",
        ("model.name", "FOLDER/model", "tokenizer", "50"),
        spoil=save_model_of_few_tokens,
    ),
    Mistake(
        "longer than a table of positions",
        ("data.max_tokens", "256", "128"),
        {"data.max_tokens": 256},
        files={"rows.jsonl": LONG_ROW * 8},
        spoil=save_gpt2,
    ),
    Mistake("missing weights", ("model.name", "FOLDER/model"), spoil=remove_weights),
    Mistake("no tokenizer", ("model.name", "FOLDER/model", "tokenizer"), spoil=remove_tokenizer),
    Mistake("broken tokenizer", ("model.name", "FOLDER/model", "tokenizer"), spoil=break_tokenizer),
    Mistake("empty tokenizer", ("model.name", "FOLDER/model", "tokenizer"), spoil=empty_tokenizer),
    Mistake(
        "key that DeepSpeed refuses",
        ("backbone.deepspeed", "stage3_max_live_parameters"),
        {
            "backbone.sharding": "zero3",
            "backbone.deepspeed": {"zero_optimization": {"stage3_max_live_parameters": "many"}},
        },
        own_process=True,
    ),
    # the adapters
    Mistake(
        "target that does not exist",
        ("lora.target_modules", "w_pack", "q_proj"),
        {"lora.target_modules": ["w_pack"]},
    ),
    Mistake(
        "one target of two that does not exist",
        ("lora.target_modules", "w_pack", "q_proj"),
        {"lora.target_modules": ["v_proj", "w_pack"]},
    ),
    Mistake("no targets", ("lora.target_modules", "q_proj"), {"lora.target_modules": []}),
    Mistake(
        "target pattern that is no pattern",
        ("lora.target_modules", "*_proj", "q_proj"),
        {"lora.target_modules": "*_proj"},
    ),
    Mistake(
        "target that is not linear",
        ("lora.target_modules", "embed_tokens", "linear"),
        {"lora.target_modules": ["embed_tokens"]},
    ),
    # the run folder
    Mistake(
        "resume from what is no checkpoint",
        ("output.resume", "FOLDER/model", "run.json"),
        {"output.resume": "FOLDER/model"},
    ),
    Mistake(
        "output below a file",
        ("output.dir", "FOLDER/rows.jsonl/runs"),
        {"output.dir": "FOLDER/rows.jsonl/runs"},
    ),
    Mistake(
        "run folder is a file",
        ("output.dir", "FOLDER/other/run"),
        {"output.dir": "FOLDER/other"},
        spoil=lambda folder: (folder / "other").mkdir() or (folder / "other/run").write_text(""),
    ),
    Mistake(
        "resume with another rank",
        ("lora.rank", "4 there", "8 now", "output.resume=never"),
        {"lora.rank": 8},
        spoil=finish_a_run,
    ),
    Mistake(
        "resume with another number of clients",
        ("federated.num_clients", "2 there", "3 now"),
        {"federated.num_clients": 3},
        spoil=finish_a_run,
    ),
]


def check_words(mistake: Mistake, message: str, folder: Path) -> None:
    for word in mistake.words:
        assert filled(word, folder) in message
    assert "Traceback" not in message


def names(mistakes: list[Mistake]) -> list[str]:
    return [mistake.name for mistake in mistakes]


@pytest.mark.parametrize("mistake", CONFIG_MISTAKES, ids=names(CONFIG_MISTAKES))
def test_a_mistake_in_the_settings_is_explained_before_anything_starts(mistake, folder):
    arguments = mistake.made_in(folder)
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError) as raised:
        preflight.check(config_load.parse(arguments))
    check_words(mistake, str(raised.value), folder)
    assert sorted(folder.rglob("*")) == before


FOLLOWED = {
    *("malformed line", "more clients than examples", "truncated weights", "broken tokenizer"),
    *("key that DeepSpeed refuses", "target that does not exist", "resume with another rank"),
}
"""A mistake of each stage of a start, after which the next one is made. All leave every file as it
was, so that for the others nothing is left to show."""


def contents(folder: Path) -> dict[Path, bytes]:
    """Every path; the lock says who held the folder last."""
    paths = (path for path in folder.rglob("*") if path.name != "lock")
    return {path: path.read_bytes() if path.is_file() else b"" for path in paths}


def test_a_mistake_of_each_stage_is_followed():
    assert set(names(SESSION_MISTAKES)) >= FOLLOWED


@pytest.mark.parametrize("mistake", SESSION_MISTAKES, ids=names(SESSION_MISTAKES))
def test_a_mistake_in_files_is_explained_and_the_next_start_is_good(mistake, folder, tiny_folder):
    arguments = mistake.made_in(folder)
    before = contents(folder)
    if mistake.own_process:
        message = on_processes(1, message_of, arguments)[0]
    else:
        message = message_of(arguments)
    check_words(mistake, message, folder)
    assert contents(folder) == before
    assert not torch.distributed.is_initialized()
    if mistake.name in FOLLOWED:
        assert_next_start_is_good(folder, tiny_folder)


def message_of(arguments: list[str]) -> str:
    """The message of the mistake that a command line makes."""
    with pytest.raises(UserError) as raised:
        train.main(arguments)
    return str(raised.value)


# --- mistakes that show when it is nearly too late ------------------------------------------------


def test_adapters_that_cannot_be_written_are_explained_and_the_next_start_is_good(
    folder, tiny_folder
):
    block_adapters(folder)
    message = message_of(written(folder, {}))
    assert "output.dir" in message
    assert str(folder / "runs" / "run" / "adapters") in message
    (folder / "runs" / "run" / "adapters").unlink()
    assert_next_start_is_good(folder, tiny_folder)


def test_a_bound_above_the_models_context_is_no_mistake_while_the_rows_are_short(folder):
    save_gpt2(folder)
    train.main(written(folder, {"data.max_tokens": 256}))
    assert_finite(folder / "runs" / "run" / "adapters" / "client-0000")


# --- checkpoints that somebody damaged ------------------------------------------------------------


def a_shard(checkpoint: Path) -> Path:
    return min(checkpoint.glob("clients-*.safetensors"))


def truncate_shard(checkpoint: Path) -> None:
    a_shard(checkpoint).write_bytes(a_shard(checkpoint).read_bytes()[:-7])


def remove_shard(checkpoint: Path) -> None:
    a_shard(checkpoint).unlink()


def garble_shard(checkpoint: Path) -> None:
    a_shard(checkpoint).write_bytes(b"\xff" * a_shard(checkpoint).stat().st_size)


def flip_a_bit(checkpoint: Path) -> None:
    path = a_shard(checkpoint)
    spoilt = bytearray(path.read_bytes())
    spoilt[-9] ^= 4
    path.write_bytes(spoilt)


def remove_facts(checkpoint: Path) -> None:
    (checkpoint / "run.json").unlink()


def truncate_facts(checkpoint: Path) -> None:
    text = (checkpoint / "run.json").read_text()
    (checkpoint / "run.json").write_text(text[: len(text) // 2])


def empty_facts(checkpoint: Path) -> None:
    (checkpoint / "run.json").write_text('{"files": {}}')


DAMAGES = (
    flip_a_bit,
    truncate_shard,
    remove_shard,
    garble_shard,
    remove_facts,
    truncate_facts,
    empty_facts,
)


@pytest.fixture(scope="module")
def of_two_rounds(tiny_folder, tmp_path_factory) -> Path:
    """A folder with a run of two rounds, and ``kept``, a copy of the run: only read that."""
    folder = tmp_path_factory.mktemp("damaged")
    fill(folder, tiny_folder)
    on_processes(1, train.main, written(folder, {"federated.num_rounds": 2}))
    shutil.copytree(folder / "runs", folder / "kept")
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(
    damage, of_two_rounds, capsys
):
    folder = of_two_rounds
    shutil.rmtree(folder / "runs")
    shutil.copytree(folder / "kept", folder / "runs")
    checkpoints = folder / "runs" / "run" / "checkpoints"
    damage(checkpoints / "round-000002")
    capsys.readouterr()
    train.main(written(folder, {"federated.num_rounds": 3}))
    said, complained = capsys.readouterr()
    (warning,) = [line for line in said.splitlines() if "warning: " in line]
    assert str(checkpoints / "round-000002") in warning and "passed over" in warning
    assert "resuming after round 1 " in said
    assert "Traceback" not in said + complained
    rounds = [event["round"] for event in runs.rounds(checkpoints.parent)]
    assert rounds == [0, 1, 2, 3]


def test_a_run_of_which_all_checkpoints_are_damaged_is_refused_and_left_as_it_is(
    folder, tiny_folder, capsys
):
    train.main(written(folder, {"federated.num_rounds": 2}))
    run = folder / "runs" / "run"
    for checkpoint in (run / "checkpoints").iterdir():
        truncate_shard(checkpoint)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="no checkpoint of this run can be read") as raised:
        train.main(written(folder, {"federated.num_rounds": 3}))
    for number in (1, 2):
        damage = f"round-00000{number}: clients-0000-00000{number}-0.safetensors"
        assert damage in str(raised.value)
    assert "output.resume=never" in str(raised.value)
    del before[run / "lock"]  # says who holds it
    assert all(path.read_bytes() == content for path, content in before.items())
    train.main(written(folder, {"output.resume": "never"}))
    aside = run.with_name("run.old-1")
    assert all((aside / path.relative_to(run)).read_bytes() == before[path] for path in before)
    assert_next_start_is_good(folder, tiny_folder)


def test_a_damaged_line_of_the_metrics_does_not_keep_a_run_from_going_on(folder):
    train.main(written(folder, {}))
    path = folder / "runs" / "run" / "metrics.jsonl"
    path.write_text('{"event": "round", "rou\n' + path.read_text())
    train.main(written(folder, {"federated.num_rounds": 2}))
    rounds = [event["round"] for event in runs.rounds(path.parent)]
    assert rounds == [0, 1, 2]


# --- batches that are not finite ------------------------------------------------------------------

SICK = {"federated.num_clients": 4, "federated.num_rounds": 3, "train.local_steps": 3}


def make_sick(
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    clients: list[int],
    passes: set[int],
    value: float = math.nan,
    num_in_pass: int = 4,
) -> None:
    """Make the loss or the gradient of these clients of a pass NaN in these training passes."""
    healthy, train_round, count = Backbone.token_losses, local.train, itertools.count()
    is_in_round = False

    def train_sick_round(*arguments: Any) -> None:
        nonlocal is_in_round
        is_in_round = True
        try:
            train_round(*arguments)
        finally:
            is_in_round = False

    def token_losses(self: Backbone, *batch: torch.Tensor):
        losses = healthy(self, *batch)
        if not is_in_round or next(count) not in passes:
            return losses
        factor = torch.ones(num_in_pass, len(losses) // num_in_pass)
        factor[clients] = value
        if what == "loss":
            return losses * factor.flatten()
        losses.register_hook(lambda gradient: gradient * factor.flatten())
        return losses

    monkeypatch.setattr(Backbone, "token_losses", token_losses)
    monkeypatch.setattr(local, "train", train_sick_round)


def stopped(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a run says that cannot continue: one plain message, exit code 1."""
    with pytest.raises(SystemExit) as raised:
        train.main(arguments)
    assert raised.value.code == 1
    complained = capsys.readouterr().err
    assert complained.count("sfed: ") == 1 and "Traceback" not in complained
    return complained


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_client_that_turns_nan_is_named_and_left_out_and_harms_nobody(
    what, value, folder, monkeypatch, capsys
):
    make_sick(monkeypatch, what, [2], {4}, value)  # the second step of the second round
    train.main(written(folder, SICK))
    said = capsys.readouterr().out
    assert "warning: round 2: the loss or gradient of client 2 was not finite" in said
    run = folder / "runs" / "run"
    rounds = {event["round"]: event for event in runs.rounds(run)}
    excluded = {
        (number, entry["client"])
        for number, event in rounds.items()
        for entry in event["clients"]
        if entry.get("excluded")
    }
    assert excluded == {(2, 2)}
    assert rounds[2]["clients"][2]["train_loss"] is None
    assert all(entry["train_loss"] for entry in rounds[3]["clients"])
    adapters = sorted((run / "adapters").iterdir())
    assert [path.name for path in adapters[:4]] == [f"client-000{i}" for i in range(4)]
    loaded = [load_file(path / "adapter_model.safetensors") for path in adapters]
    for tensors in loaded:
        for name, tensor in tensors.items():
            assert torch.isfinite(tensor).all()
            assert "lora_A" not in name or torch.equal(tensor, loaded[0][name])


def train_paged(arguments: list[str], what: str) -> None:
    """Train, clients one after another; client 1 turns infinite in the second step of round 2."""
    with pytest.MonkeyPatch.context() as patch:
        if os.environ["RANK"] == "0":
            # Three steps of client 0, three of client 1, and again in round 2.
            make_sick(patch, what, [0], {10}, math.inf, num_in_pass=1)
        train.main(arguments)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("what", "sharding"),
    [("loss", "none"), full("loss", "zero3"), full("gradient", "none"), ("gradient", "zero3")],
)
def test_a_client_that_turns_infinite_in_a_pass_of_its_own_is_left_out_too(what, sharding, folder):
    settings = {**SICK, "federated.clients_per_pass": 1, "backbone.sharding": sharding}
    on_processes(2, train_paged, written(folder, settings), what)
    run = folder / "runs" / "run"
    rounds = {event["round"]: event for event in runs.rounds(run)}
    excluded = {
        (number, entry["client"])
        for number, event in rounds.items()
        for entry in event["clients"]
        if entry.get("excluded")
    }
    assert excluded == {(2, 1)}
    assert all(entry["train_loss"] for entry in rounds[3]["clients"])
    for client in range(4):
        assert_finite(run / "adapters" / f"client-000{client}")


def test_a_run_in_which_no_client_is_left_stops_and_the_next_start_is_good(
    folder, tiny_folder, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        make_sick(patch, "loss", [0, 1, 2, 3], {1})
        complained = stopped(written(folder, SICK), capsys)
    for word in ("round 1", "client 0, 1, 2, 3", "No client is left", "train.lr"):
        assert word in complained
    assert_next_start_is_good(folder, tiny_folder)


def test_too_many_bad_rounds_stop_the_run_and_name_the_key(folder, monkeypatch, capsys):
    settings = {**SICK, "federated.max_bad_rounds": 1}
    with monkeypatch.context() as patch:
        make_sick(patch, "loss", [1], {0, 3})
        complained = stopped(written(folder, settings), capsys)
    for word in ("round 2", "client 1", "federated.max_bad_rounds is 1"):
        assert word in complained
    # Round 1 is on disk; with the client well again the run resumes from there.
    train.main(written(folder, settings))
    assert "resuming after round 1 " in capsys.readouterr().out
    assert_finite(folder / "runs" / "run" / "adapters" / "client-0001")


def test_a_learning_rate_that_blows_every_client_up_stops_the_run(folder, tiny_folder, capsys):
    complained = stopped(written(folder, {**SICK, "train.lr": 1e30}), capsys)
    assert "No client is left" in complained and "train.lr" in complained
    assert_next_start_is_good(folder, tiny_folder)


def test_a_step_that_overflows_the_adapter_is_noticed_before_the_mean(folder, capsys):
    # Loss and gradient of the only step are finite; the step itself is not.
    settings = {**SICK, "train.local_steps": 1, "federated.num_rounds": 1, "train.lr": 1e39}
    complained = stopped(written(folder, settings), capsys)
    assert "No client is left" in complained
    assert not (folder / "runs" / "run" / "adapters").exists()


# --- through the shell and on several processes ---------------------------------------------------


def run_command(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return launchers.python("-m", *command, env=launchers.environment(**environment))


def test_a_wrong_value_on_the_command_line_ends_with_code_2_and_a_short_message():
    done = run_command("sfed.train", "data.task=demo", "train.lr=-1")
    assert done.returncode == EXIT_MISTAKE
    assert done.stdout == ""
    first, second = done.stderr.splitlines()
    assert first == "sfed: an error in the configuration"
    assert second.startswith("  train.lr = -1: input should be greater than 0")


def test_only_process_0_prints_a_mistake():
    done = run_command("sfed.train", "data.task=demo", "train.lr=-1", RANK="1", WORLD_SIZE="2")
    assert (done.returncode, done.stdout, done.stderr) == (EXIT_MISTAKE, "", "")


def train_without_a_launcher(arguments: list[str]) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        del os.environ[name]
    train.main(arguments)


@pytest.mark.dist
def test_sharding_asked_for_without_a_launcher_is_no_mistake(folder):
    on_processes(1, train_without_a_launcher, [*written(folder, {}), "backbone.sharding=zero3"])
    assert_finite(folder / "runs" / "run" / "adapters" / "client-0000")


@pytest.mark.dist
def test_more_processes_than_clients_is_said_once_by_a_launcher_that_ends(folder):
    launcher = ("torch.distributed.run", "--nproc_per_node", "3", "--master_port", str(free_port()))
    config = written(folder, {})
    done = run_command(*launcher, "-m", "sfed.train", *config, "federated.num_clients=2")
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert said.count("federated.num_clients = 2 is less than the 3 processes") == 1
    assert "UserError" not in said
    assert not (folder / "runs").exists()


@pytest.mark.dist
def test_a_mistake_that_only_process_1_can_see_is_raised_by_both(folder):
    (folder / "0.jsonl").write_text(GOOD_ROW * 4)
    (folder / "1.jsonl").write_text(GOOD_ROW * 4 + "oops\n")
    arguments = written(folder, by_file())
    messages = on_processes(2, message_of, arguments)
    assert messages[0] == messages[1]
    assert f"{folder / '1.jsonl'}, line 5: not JSON" in messages[0]
    assert not (folder / "runs").exists()
