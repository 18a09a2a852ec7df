"""The shipped configurations: they load, they start, and they hold what the papers state."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModel, LlamaConfig, RobertaConfig

from sfed.config import load as config_load
from sfed.config.schema import Config
from sfed.federated import session
from sfed.methods import method as methods
from sfed.methods import scaling
from sfed.observability import metrics
from sfed.sweep import grid
from tests.support import tiny

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "configs"
PAPER = CONFIGS / "paper"
GRIDS = sorted(path for path in CONFIGS.rglob("*.yaml") if "grid" in config_load.read_mapping(path))
BASES = sorted(set(CONFIGS.rglob("*.yaml")) - set(GRIDS))
PAPER_BASES = [path for path in BASES if path.parent == PAPER]

Settings = dict[str, Any]


def cells(path: Path) -> dict[str, Settings]:
    """The cells of a grid file by name, each as whole settings."""
    found = grid.read(path, (), 1, methods.resolve).cells
    return {cell.name: json.loads(cell.config.model_dump_json()) for cell in found}


def over(settings: Settings, changes: Settings) -> Settings:
    """``changes`` over ``settings``, section by section."""
    merged = dict(settings)
    for key, value in changes.items():
        old = settings.get(key)
        merged[key] = over(old, value) if isinstance(old, dict) else value
    return merged


# --- all of them ---------------------------------------------------------------------------------


def settings_of(path: Path) -> dict[str, Settings]:
    return cells(path) if path in GRIDS else {"": config_load.read_mapping(path)}


def ids(path: Path) -> str:
    return str(path.relative_to(CONFIGS).with_suffix(""))


every_file = pytest.mark.parametrize("path", [*BASES, *GRIDS], ids=ids)
every_grid = pytest.mark.parametrize("path", GRIDS, ids=ids)
every_paper_base = pytest.mark.parametrize("path", PAPER_BASES, ids=ids)


def check(settings: Settings) -> Config:
    config = config_load.complete(settings)
    methods.resolve(config)
    return config


@every_file
def test_a_file_and_each_cell_of_a_grid_is_a_valid_configuration(path):
    for settings in settings_of(path).values():
        check(settings)


@every_file
def test_no_key_is_unknown(path):
    known = {key for key, _, _ in config_load.list_keys()}
    used = {
        f"{section}.{key}" if section != "seed" else section
        for settings in settings_of(path).values()
        for section, keys in settings.items()
        for key in (keys if isinstance(keys, dict) else [""])
    }
    assert used - known == set()


@every_grid
def test_a_grid_has_a_name_of_its_own(path):
    found = config_load.read_mapping(path)
    if "base" in found:  # a run folder does not hold other runs
        base = config_load.read_mapping(path.parent / found["base"])
        assert base["output"]["name"] != found["name"]


def test_no_two_run_folders_are_one():
    names = [config_load.read_mapping(path)["name"] for path in GRIDS]
    names += [config_load.read_mapping(path)["output"]["name"] for path in PAPER_BASES]
    assert len(set(names)) == len(names)


MARKS = ("# paper", "# code", "# not in the paper: our choice, because ")
OF_THE_EXPERIMENT = {"seed", "model", "data", "partition", "lora", "federated", "train"}


def unmarked(text: str) -> list[str]:
    """Values of the experiment that do not say, there or just above, where they come from."""
    missing, section, above = [], "", ""
    for line in text.splitlines():
        bare = line.strip()
        if bare.startswith("#"):
            above += bare
            continue
        key, _, value = line.partition(":")
        if not line.startswith(" "):
            section = key
        is_value = bool(value.partition("#")[0].strip())
        if is_value and section in OF_THE_EXPERIMENT and not any(m in above + line for m in MARKS):
            missing.append(line)
        above = ""
    return missing


@every_paper_base
def test_every_value_of_an_experiment_says_whether_the_paper_states_it(path):
    assert unmarked(path.read_text(encoding="utf-8")) == []
    assert unmarked("lora:\n  rank: 8\n") == ["  rank: 8"]


# --- what the papers state -----------------------------------------------------------------------

RANKS = [4, 8, 32, 128, 512]
CLIENTS = [5, 10, 15, 20]
BASELINES = {"sfed", "fedsa", "fedsa-rslora"}


def paper(name: str) -> Settings:
    return config_load.read_mapping(PAPER / f"{name}.yaml")


@pytest.mark.parametrize("task", ["alpaca", "gsm8k"])
def test_sfed_on_llama_is_what_its_paper_states(task):
    base, ranks, clients = (
        paper(f"llama2-7b-{task}{end}") for end in ("", "-grid", "-clients-grid")
    )
    assert base["model"]["name"] == "meta-llama/Llama-2-7b-hf"
    assert base["data"]["task"] == task
    assert base["partition"] == {"kind": "iid"}
    federated = base["federated"]
    assert (federated["num_clients"], federated["num_rounds"]) == (3, 100)
    assert base["train"]["local_steps"] == 10
    assert ranks["grid"] == {"lora.rank": RANKS}
    assert clients["grid"] == {"federated.num_clients": CLIENTS}
    assert clients["set"]["lora"] == {"rank": 512}
    for found in (ranks, clients):
        assert {variant["federated.method"] for variant in found["variants"]} == BASELINES


def test_sfed_on_mnli_is_what_its_paper_states():
    base, found = paper("roberta-large-mnli"), paper("roberta-large-mnli-grid")
    assert base["model"]["name"] == "FacebookAI/roberta-large"
    assert (base["data"]["task"], base["data"]["name"]) == ("glue", "mnli")
    assert base["partition"] == {"kind": "dirichlet", "concentration": 0.5}
    assert base["federated"]["num_rounds"] == 100
    assert base["train"]["local_steps"] == 10
    assert found["grid"]["federated.num_clients"] == CLIENTS
    assert set(found["grid"]["lora.rank"]) <= set(RANKS)
    assert {v["federated.method"] for v in found["variants"]} == BASELINES | {"rolora"}


def test_fedsa_on_glue_is_what_its_paper_and_its_code_state():
    base, found = paper("fedsa-roberta-large-glue"), paper("fedsa-roberta-large-glue-grid")
    assert base["model"]["name"] == "FacebookAI/roberta-large"
    assert base["partition"] == {"kind": "dirichlet", "concentration": 0.5}
    lora, federated, train = base["lora"], base["federated"], base["train"]
    assert (lora["rank"], lora["alpha"], lora["dropout"]) == (8, 16.0, 0.05)
    assert (federated["num_clients"], federated["num_rounds"]) == (3, 1000)
    assert (train["local_steps"], train["batch_size"]) == (10, 128)
    assert (train["optimizer"], train["lr"], train["max_grad_norm"]) == ("sgd", 0.02, None)
    assert base["data"]["max_tokens"] == 128
    assert found["grid"] == {"data.name": ["mnli", "sst2", "qnli", "qqp", "rte"]}
    assert {v["federated.method"] for v in found["variants"]} >= {"fedsa", "fedit", "ffa"}


def test_fedsa_on_gsm8k_is_what_its_paper_and_its_code_state():
    base = paper("fedsa-llama3-8b-gsm8k")
    assert base["model"]["name"] == "meta-llama/Meta-Llama-3-8B"
    assert (base["data"]["task"], base["data"]["max_tokens"]) == ("gsm8k", 1000)
    assert base["partition"] == {"kind": "iid"}
    lora, federated, train = base["lora"], base["federated"], base["train"]
    assert (lora["rank"], lora["alpha"], lora["dropout"]) == (8, 16.0, 0.05)
    assert (federated["num_clients"], federated["num_rounds"]) == (3, 100)
    assert (train["local_steps"], train["batch_size"]) == (30, 1)
    assert (train["optimizer"], train["lr"]) == ("sgd", 0.005)


def first_gradient(settings: Settings) -> tuple[float, int]:
    """(gamma times the size of the A that training starts from, r): what B's first gradient is
    proportional to. A mean of N independent draws is sqrt(N) smaller than one draw."""
    lora, federated = settings["lora"], settings["federated"]
    record = methods.METHODS[federated["method"]]
    exponents = scaling.EXPONENTS.get(lora.get("scaling", "auto"), record.exponents)
    independent = record.independent_init
    if lora.get("init", "auto") != "auto":
        independent = lora["init"] == "independent"
    n, r = federated["num_clients"], lora["rank"]
    gamma = scaling.lora_scaling(lora["alpha"], r, n, exponents)
    return gamma * math.sqrt(r) / (math.sqrt(n) if independent else 1.0), r


@pytest.mark.parametrize(
    "name", ["llama2-7b-alpaca-grid", "llama2-7b-gsm8k-grid", "roberta-large-mnli-grid"]
)
def test_the_methods_of_a_comparison_begin_alike_at_the_lora_rank_8(name):
    found = [first_gradient(settings) for settings in cells(PAPER / f"{name}.yaml").values()]
    at_8 = [size for size, r in found if r == 8]
    assert len(at_8) >= 3
    assert at_8 == pytest.approx([2.0 * math.sqrt(8)] * len(at_8), rel=1e-4)


@pytest.mark.parametrize("name", ["llama2-7b-alpaca", "roberta-large-mnli"])
def test_the_fair_comparison_has_every_arm_that_the_theory_asks_for(name):
    found = cells(PAPER / f"{name}-fair-grid.yaml")
    base = paper(name)["lora"]["alpha"]
    arms = {
        (
            settings["federated"]["method"],
            settings["lora"].get("init", "auto"),
            settings["lora"].get("scaling", "auto"),
        ): round(first_gradient(settings)[0] / base, 3)
        for settings in found.values()
    }
    n = {settings["federated"]["num_clients"] for settings in found.values()}.pop()
    assert arms == {
        ("sfed", "auto", "auto"): 1.0,
        ("fedsa-rslora", "auto", "auto"): 1.0,
        ("fedsa-rslora", "independent", "auto"): round(n**-0.5, 3),
        ("fedsa-rslora", "auto", "sfed"): round(n**0.5, 3),
        ("fedsa", "auto", "auto"): round(16.0 / base / math.sqrt(512), 3),
    }
    rates = sorted({settings["train"]["lr"] for settings in found.values()})
    assert rates[-1] / rates[0] >= n


# --- each of them starts -------------------------------------------------------------------------

GLUE: dict[str, tuple[tuple[str, ...], list[float]]] = {
    "mnli": (("premise", "hypothesis"), [0, 1, 2]),
    "sst2": (("sentence",), [0, 1]),
    "qnli": (("question", "sentence"), [0, 1]),
    "qqp": (("question1", "question2"), [0, 1]),
    "rte": (("sentence1", "sentence2"), [0, 1]),
    "mrpc": (("sentence1", "sentence2"), [0, 1]),
    "cola": (("sentence",), [0, 1]),
    "stsb": (("sentence1", "sentence2"), [0.0, 1.4, 2.5, 3.8, 5.0]),
}


def row(form: str, i: int) -> Settings:
    """Row i of a made-up set in the task's form."""
    word = "abcdefghij"[i % 10]
    if form == "gsm8k":
        return {"question": f"{i} and {word}?", "answer": f"{word}{i} = 5\n#### 5"}
    if form == "alpaca":
        return {"instruction": f"Say {word}{i}.", "input": word * (i % 2), "output": word * 5}
    if form == "text":
        return {"prompt": f"{i} {word}:", "completion": f" {word * (1 + i % 5)}"}
    columns, labels = GLUE[form]
    texts = {column: f"{column} {word}{i}" for column in columns}
    return {**texts, "label": labels[(i // 3) % len(labels)], "idx": i}


def write(path: Path, form: str, count: int) -> str:
    path.write_text("".join(json.dumps(row(form, i)) + "\n" for i in range(count)), "utf-8")
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models of both families and rows of every form, for all runs of this file."""
    folder = tmp_path_factory.mktemp("configs")
    tiny.save_model(folder / "llama", context=1024)
    tiny.save_roberta(folder / "roberta")
    for form in ("gsm8k", "alpaca", *GLUE):
        write(folder / f"{form}-train.jsonl", form, 1200)
        write(folder / f"{form}-eval.jsonl", form, 120)
    for kind in ("matched", "mismatched"):
        write(folder / f"validation_{kind}.jsonl", "mnli", 120)
    for client in range(16):
        write(folder / f"customer-{client}.jsonl", "text", 8)
    return folder


def started(settings: Settings, folder: Path, out: Path) -> Settings:
    """One round of one step of it, on a tiny model of its family and made-up rows of its form.

    Only names, files and sizes change.
    """
    data = settings["data"]
    form = data["name"] if data["task"] == "glue" else data["task"]
    files: Settings = {"train_files": str(folder / f"{form}-train.jsonl")}
    if form == "text":
        files = {"train_files": str(folder / "customer-{client}.jsonl")}
    elif form == "mnli":
        kinds = ("matched", "mismatched")
        files["eval_files"] = [str(folder / f"validation_{kind}.jsonl") for kind in kinds]
    elif form == "demo":
        files = {}
    elif form != "alpaca":
        files["eval_files"] = str(folder / f"{form}-eval.jsonl")
    family = "roberta" if data["task"] == "glue" else "llama"
    changes: Settings = {
        "model": {"name": str(folder / family)},
        "data": files,
        "federated": {"num_rounds": 1},
        "train": {"local_steps": 1, "local_epochs": None, "batch_size": 2, "micro_batch_size": 1},
        "evaluation": {"max_examples": 2, "max_new_tokens": 4},
        "output": {"dir": str(out), "name": "run"},
    }
    return over(settings, changes)


def run_of(settings: Settings, folder: Path, out: Path) -> Settings:
    """Run it in this process; returns the event of its round."""
    session.run_session(check(started(settings, folder, out)))
    events = list(metrics.read_events(out / "run" / "metrics.jsonl"))
    return [event for event in events if event["event"] == "round"][-1]


def assert_trained(event: Settings, settings: Settings) -> None:
    assert event["round"] == 1
    assert math.isfinite(event["train/loss"]) and event["train/loss"] > 0
    assert event["adapter/grad_norm"] > 0
    assert len(event["clients"]) == settings["federated"]["num_clients"]


@pytest.mark.parametrize("path", BASES, ids=ids)
def test_a_configuration_starts_on_a_tiny_model_of_its_family(path, folder, tmp_path):
    settings = config_load.read_mapping(path)
    assert_trained(run_of(settings, folder, tmp_path), settings)


def arms(path: Path) -> dict[str, Settings]:
    """Some cells of a grid, with every variant: all words of a list, the largest of its numbers."""
    axes = config_load.read_mapping(path)["grid"]
    wanted = {
        key: values if isinstance(values[0], str) else [max(values)] for key, values in axes.items()
    }
    return {
        name: settings
        for name, settings in cells(path).items()
        if all(value_of(settings, key) in values for key, values in wanted.items())
    }


def value_of(settings: Settings, key: str) -> Any:
    for part in key.split("."):
        settings = settings[part]
    return settings


ARMS = [
    pytest.param(settings, id=f"{ids(path)}: {name}", marks=[pytest.mark.full] if number else [])
    for path in GRIDS
    for number, (name, settings) in enumerate(arms(path).items())
]


@pytest.mark.parametrize("settings", ARMS)
def test_every_arm_of_a_grid_starts(settings, folder, tmp_path):
    assert_trained(run_of(settings, folder, tmp_path), settings)


@pytest.mark.parametrize("name", ["mrpc", "cola", "stsb"])
def test_the_glue_tasks_that_the_papers_leave_out_start_too(name, folder, tmp_path):
    settings = over(paper("fedsa-roberta-large-glue"), {"data": {"name": name}})
    assert_trained(run_of(settings, folder, tmp_path), settings)


# --- the table of the documents ------------------------------------------------------------------

LLAMA_2_7B = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
)
LLAMA_3_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
)
ROBERTA_LARGE = RobertaConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    vocab_size=50265,
    max_position_embeddings=514,
)
FULL_SIZE = {
    "meta-llama/Llama-2-7b-hf": LLAMA_2_7B,
    "meta-llama/Meta-Llama-3-8B": LLAMA_3_8B,
    "FacebookAI/roberta-large": ROBERTA_LARGE,
}


@every_paper_base
def test_the_documents_say_what_a_round_uploads(path):
    """A of the full-size model, whose shapes are there without its weights, in fp32."""
    settings = config_load.read_mapping(path)
    lora, federated, train = settings["lora"], settings["federated"], settings["train"]
    with torch.device("meta"):
        model = AutoModel.from_config(FULL_SIZE[settings["model"]["name"]])
    adapted = [
        module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in lora["target_modules"]
    ]
    uploaded = 4 * lora["rank"] * sum(module.in_features for module in adapted)
    table = (REPOSITORY / "docs" / "paper-experiments.md").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in table if line.startswith(f"| `{path.name}`")]
    assert f" {uploaded:,} " in line
    counts = (federated["num_clients"], federated["num_rounds"], train["local_steps"])
    assert " x ".join(f"{count:,}" for count in counts) in line


def test_yaml_files_have_no_tab_and_end_with_a_newline():
    for path in CONFIGS.rglob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        assert "\t" not in text and text.endswith("\n") and yaml.safe_load(text), path


# --- comparison of all methods -------------------------------------------------------------------


@pytest.mark.parametrize("task", ["demo", "gsm8k"])
def test_the_rates_of_a_comparison_are_chosen_under_its_own_protocol(task):
    rates = config_load.read_mapping(CONFIGS / "methods" / f"{task}-rates.yaml")
    best = config_load.read_mapping(CONFIGS / "methods" / f"{task}.yaml")
    assert best["set"] == rates["set"]
    assert 0 not in best["grid"]["seed"]  # the choice was made on the default seed
    tried = [float(rate) for rate in rates["grid"]["train.lr"]]
    for variant in best["variants"]:
        assert float(variant["train.lr"]) in tried


@pytest.mark.parametrize("task", ["demo", "gsm8k"])
def test_a_comparison_has_all_methods_once(task):
    best = config_load.read_mapping(CONFIGS / "methods" / f"{task}.yaml")
    assert sorted(v["federated.method"] for v in best["variants"]) == sorted(methods.METHODS)
