"""Families of models that use layers in unusual ways: as stock PEFT row by row, or refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from torch import multiprocessing as mp
from torch.nn import functional
from transformers import PreTrainedModel

from sfed.config.load import validate
from sfed.data.tokenize import Row
from sfed.lora import adapters
from sfed.lora.adapters import LoraSpec
from sfed.lora.hf_blocks import patch_blocks
from sfed.models import heads, isolation
from sfed.models.backbone import Backbone
from sfed.models.hf_config import Sharding
from sfed.models.objective import objective_of
from sfed.models.trial_passes import Case, Numbers, Subject, random_adapter, together
from sfed.utils.errors import UserError
from tests.support import glue, runs, tiny
from tests.support.families import FAMILIES, FEW, Family, some
from tests.support.processes import on_processes
from tests.support.selection import some_of

WORDS, LABELS = 96, 2
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": WORDS}
DECODER = {
    **SIZES,
    "intermediate_size": 72,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 1,
}
ENCODER = {
    **SIZES,
    "intermediate_size": 72,
    "max_position_embeddings": 130,
    "num_labels": LABELS,
    "type_vocab_size": 1,
    "pad_token_id": 0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
DEBERTA = {**ENCODER, "relative_attention": True, "position_biased_input": False}
DEBERTA |= {"pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
JITTER = {"router_jitter_noise": 0.2, "input_jitter_noise": 0.2}

# A model, the layers that are adapted, and whether its clients share a pass.
RIGHT: dict[str, tuple[str, dict[str, Any], Any, bool]] = {
    "deberta-v2": ("DebertaV2ForSequenceClassification", DEBERTA, "all-linear", False),
    "deberta-v2 that shares keys": (
        "DebertaV2ForSequenceClassification",
        {**DEBERTA, "share_att_key": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm"},
        "all-linear",
        False,
    ),
    "deberta, which writes over what its layers give out": (
        "DebertaForSequenceClassification",
        DEBERTA,
        "all-linear",
        False,
    ),
    "phimoe that shakes its router": (
        "PhimoeForCausalLM",
        {**DECODER, **EXPERTS, **JITTER},
        ATTENTION,
        True,
    ),
    "mixtral that shakes its router": (
        "MixtralForCausalLM",
        {**DECODER, **EXPERTS, "router_jitter_noise": 0.2},
        ATTENTION,
        True,
    ),
    "opt that drops layers": (
        "OPTForCausalLM",
        {**SIZES, "ffn_dim": 72, "word_embed_proj_dim": 32, "layerdrop": 0.5, "dropout": 0.0},
        "all-linear",
        True,
    ),
}
# Only these cannot share a pass.
ONE_BY_ONE = ("DeBERTa-v2, DeBERTa-v3",)
REFUSED: dict[str, tuple[str, dict[str, Any], Any, str]] = {
    "xlnet as a language model": (
        "XLNetLMHeadModel",
        {
            "vocab_size": WORDS,
            "d_model": 32,
            "n_layer": 2,
            "n_head": 4,
            "d_inner": 72,
            "dropout": 0.0,
        },
        "all-linear",
        "choose a causal language model",
    ),
    "bert as a language model": (
        "BertLMHeadModel",
        {key: value for key, value in ENCODER.items() if key != "num_labels"},
        "all-linear",
        "choose a causal language model",
    ),
    "jamba": (
        "JambaForCausalLM",
        {**DECODER, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2}
        | {"mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False},
        "all-linear",
        r"lora\.target_modules: .*dt_proj",
    ),
}


def made(kind: str, settings: dict[str, Any]) -> PreTrainedModel:
    """A model with weights that are large enough to matter."""
    return Family(kind, kind, settings).made(WORDS).requires_grad_(False)


def subject_of(model: PreTrainedModel, targets: str | tuple[str, ...]) -> Subject:
    """The model as the trainer has it."""
    patch_blocks(model)
    is_classifier = hasattr(model, "classifier")
    task = {"task": "glue", "name": "rte"} if is_classifier else {"task": "text"}
    config = validate({"model": {"name": "tiny"}, "data": {**task, "train_files": "rows.jsonl"}})
    found = {"missing_keys": [], "mismatched_keys": []}
    head = heads.detach_head(config, model, found, lambda _: nullcontext())
    backbone = Backbone(model, head, Sharding("none", "one process"), None)
    attached = adapters.attach(model, LoraSpec(4, 1.5, 0.0, targets, model.name_or_path), head)
    packing, cpu = None if is_classifier else backbone.packing, torch.device("cpu")
    return Subject(backbone, attached, cpu, range(3, WORDS), 24, packing)


def checked(tried: Subject) -> isolation.Isolation:
    return isolation.check(tried, lambda reason: reason, shares_passes=True)


def rows_of(client: int, *, has_targets: bool) -> list[Row]:
    """Three rows of other lengths than the other client's."""
    drawn = np.random.default_rng(client)
    lengths = ((3, 12, 5), (17, 4, 9))[client]
    return [
        Row(
            drawn.integers(3, WORDS, size=n).astype(np.int32),
            1,
            float(n % LABELS) if has_targets else None,
        )
        for n in lengths
    ]


def by_stock_peft(base: PreTrainedModel, folder: Path, rows: list[Row]) -> tuple[float, Any]:
    """Losses summed over rows, one at a time, and the gradients by name."""
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=True).eval()
    total = 0.0
    for row in rows:
        ids = torch.from_numpy(row.ids.astype(np.int64))[None]
        read = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if getattr(model.config, "type_vocab_size", 0) > 1:
            read["token_type_ids"] = (torch.arange(len(row.ids)) >= row.prompt_length).long()[None]
        logits = model(**read).logits
        if row.target is None:
            loss = functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
        else:
            loss = functional.cross_entropy(logits, torch.tensor([int(row.target)]))
        loss.backward()
        total += float(loss.detach())
    grads = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    return total, grads


def compare(tried: Subject, found: Numbers, total: float, grads: dict[str, torch.Tensor]) -> None:
    """Within 1e-4, the loss and the gradients of each factor."""
    assert found.loss == pytest.approx(total, rel=1e-4)
    for piece in tried.adapters.layout.pieces:
        if piece.factor == "head":
            name = head_weight(tried, piece.layer)
        else:
            name = f"base_model.model.{piece.layer}.lora_{piece.factor}.default.weight"
        mine = piece.of(found.gradient[None])[0]
        theirs = torch.zeros_like(mine) if grads[name] is None else grads[name]
        assert (mine - theirs).norm() <= 1e-4 * max(1e-3, theirs.norm()), name


def head_weight(tried: Subject, layer: str) -> str:
    """What PEFT calls a weight of the head."""
    head = tried.backbone.head
    assert head is not None
    full = head.full_name(layer)
    module = next(name for name in head.modules if full.startswith(f"{name}."))
    return f"base_model.model.{module}.modules_to_save.default{full.removeprefix(module)}"


@pytest.mark.parametrize("case", RIGHT)
def test_an_unusual_model_is_as_stock_peft_row_by_row(case: str, tmp_path: Path) -> None:
    kind, settings, targets, shares = RIGHT[case]
    check_against_stock_peft(made(kind, settings), targets, tmp_path, shares=shares)


@pytest.mark.parametrize("family", some_of(FAMILIES, *some(FEW)), ids=lambda family: family.name)
def test_a_family_is_as_stock_peft_row_by_row(family: Family, tmp_path: Path) -> None:
    base = family.made(WORDS, pad_token_id=0).requires_grad_(False)
    shares = family.name not in ONE_BY_ONE
    check_against_stock_peft(base, family.targets, tmp_path, shares=shares)


def check_against_stock_peft(
    base: PreTrainedModel, targets: Any, tmp_path: Path, *, shares: bool
) -> None:
    """Losses and gradients of two clients, by the trainer and by stock PEFT."""
    tried = subject_of(copy.deepcopy(base), targets)
    assert checked(tried).clients_share_passes is shares
    generator = torch.Generator().manual_seed(1)
    values = torch.stack([random_adapter(tried, generator) for _ in range(2)])
    rows = [rows_of(client, has_targets=tried.has_targets) for client in range(2)]
    tried.backbone.training()
    found = (
        together(tried, Case(rows, values))
        if shares
        else [together(tried, Case([rows[c]], values[[c]]))[0] for c in range(2)]
    )
    for client in range(2):
        folder = tmp_path / str(client)
        tried.adapters.peft_form.write(folder, values[client])
        compare(tried, found[client], *by_stock_peft(base, folder, rows[client]))


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_would_be_wrong_is_refused_by_name(family: str) -> None:
    kind, settings, targets, words = REFUSED[family]
    tried = subject_of(made(kind, settings), targets)
    with pytest.raises(UserError, match=words):
        checked(tried)


# Tables of positions that end between two multiples of 8.
SHORT_TABLES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 20}),
    "opt": (
        "OPTForCausalLM",
        {**SIZES, "ffn_dim": 72, "word_embed_proj_dim": 32, "max_position_embeddings": 20},
    ),
    "bert": ("BertForSequenceClassification", {**ENCODER, "max_position_embeddings": 20}),
    "electra": (
        "ElectraForSequenceClassification",
        {**ENCODER, "embedding_size": 32, "max_position_embeddings": 20},
    ),
    "roberta": ("RobertaForSequenceClassification", {**ENCODER, "max_position_embeddings": 21}),
    "mpnet": (
        "MPNetForSequenceClassification",
        {**ENCODER, "max_position_embeddings": 22, "pad_token_id": 1},
    ),
}


@pytest.mark.parametrize("case", SHORT_TABLES)
def test_rows_are_padded_no_further_than_the_model_has_positions(case: str) -> None:
    kind, settings = SHORT_TABLES[case]
    tried = subject_of(made(kind, {"vocab_size": WORDS, **settings}), "all-linear")
    context = tried.backbone.context_tokens
    assert context == 20
    tried = dataclasses.replace(tried, longest_row=context)
    assert checked(tried).clients_share_passes
    objective = objective_of(tried.backbone, tried.packing)
    ids = np.random.default_rng(0).integers(3, WORDS, size=context).astype(np.int32)
    long, short = (Row(ids[:n], 1, 0.0 if tried.has_targets else None) for n in (context, 5))
    batch = objective.collate([[long, short], [short]], 2)
    assert batch.input_ids.shape[1] == context
    tried.adapters.bind(torch.zeros(2, tried.adapters.layout.size))
    assert torch.isfinite(objective.losses(batch)).all()


def test_a_run_whose_rows_are_as_long_as_a_table_of_100_positions(
    tiny_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_folder / "model", tmp_path / "model")
    sizes = {"vocab_size": 258, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 100}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=1)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    rows = [{"prompt": "a" * 60, "completion": "b" * (60 - n)} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = tiny.settings(tmp_path, data={"max_tokens": 100}, federated={"num_clients": 2})
    found = runs.rounds(runs.run(1, given))
    assert [one["round"] for one in found] == [0, 1, 2, 3]
    assert found[-1]["eval/personal_loss"] < found[0]["eval/personal_loss"]


@pytest.fixture(scope="module")
def deberta_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeBERTa-v2, whose clients cannot share a pass, with a tokenizer and rows."""
    folder = tmp_path_factory.mktemp("deberta")
    tiny.save_bert(folder / "deberta")  # for its tokenizer
    words = json.loads((folder / "deberta" / "config.json").read_text())["vocab_size"]
    config = transformers.DebertaV2Config(
        **{**DEBERTA, "vocab_size": words, "num_labels": 2, "initializer_range": 0.2}
    )
    torch.manual_seed(0)
    transformers.DebertaV2ForSequenceClassification(config).save_pretrained(folder / "deberta")
    for split, count in (("train", 48), ("eval", 23)):
        glue.save_rows(folder / f"rte-{split}.jsonl", "rte", count, seed=count)
    return folder


@pytest.mark.dist
def test_clients_that_cannot_share_a_pass_train_the_same_on_any_number_of_processes_and_sharded(
    deberta_folder: Path, tmp_path: Path
) -> None:
    found = {}
    for name, num_processes, sharding, clients_per_pass in (
        ("by hand", 1, "none", 1),
        ("all asked for", 1, "none", None),
        ("two", 2, "none", "auto"),
        ("sharded", 2, "zero3", "auto"),
    ):
        given = glue.settings(
            deberta_folder,
            "deberta",
            "rte",
            tmp_path / name,
            federated={"num_clients": 4, "clients_per_pass": clients_per_pass},
            partition={"kind": "iid"},
            backbone={"sharding": sharding},
            model={"attention": "eager"},
        )
        folder = runs.run(num_processes, given)
        found[name] = runs.adapters(folder)
        told = json.loads((folder / "config.json").read_text())["resolved"]
        assert told["clients_per_pass"] == 1
        assert ("key_proj" in told["clients_per_pass_reason"]) is (name != "by hand")
    assert runs.identical(found["by hand"], found["all asked for"])
    assert runs.relative_difference(found["by hand"], found["two"]) <= 5e-6
    assert runs.relative_difference(found["by hand"], found["sharded"]) <= 5e-6


@pytest.mark.dist
@pytest.mark.parametrize("sharding", ["none", "zero3"])
def test_a_model_that_is_wrong_is_refused_on_two_processes(
    tiny_folder: Path, tmp_path: Path, sharding: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder / "model", folder)
    words = json.loads((folder / "config.json").read_text())["vocab_size"]
    settings = {key: value for key, value in ENCODER.items() if key != "num_labels"}
    config = transformers.BertConfig(**{**settings, "vocab_size": words})
    transformers.BertLMHeadModel(config).save_pretrained(folder)
    given = tiny.settings(tiny_folder, model={"name": str(folder)}, backbone={"sharding": sharding})
    given["output"] = {"dir": str(tmp_path), "name": "run"}
    with pytest.raises(mp.ProcessRaisedException, match="choose a causal language model"):
        on_processes(2, runs.train_settings, given)
    assert not (tmp_path / "run" / "checkpoints").exists()
