"""The check at every start: layers that mix clients, put into a model on purpose, and caught."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sfed.data.batches import collate
from sfed.data.packing import Packing
from sfed.data.tokenize import Row
from sfed.kernels.plain.quantise import CODES as FP8
from sfed.lora import adapters
from sfed.lora.adapters import LoraSpec
from sfed.lora.frozen import fp8
from sfed.lora.hf_blocks import patch_blocks
from sfed.models import isolation
from sfed.models.backbone import Backbone
from sfed.models.hf_config import Sharding
from sfed.models.isolation import Isolation
from sfed.models.trial_passes import Subject
from sfed.utils.errors import UserError
from tests.support import strange
from tests.support.backbones import digest


def subject(
    model: nn.Module,
    *,
    longest_row: int = 40,
    dtype: torch.dtype = torch.float32,
    checkpointing: bool = False,
    targets: str | tuple[str, ...] = "all-linear",
    **settings: float,
) -> Subject:
    """A language model with adapters, as the trainer makes them."""
    model = model.to(torch.float32 if dtype == FP8 else dtype).requires_grad_(False)
    patch_blocks(model)
    if dtype == FP8:
        fp8.convert(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    backbone = Backbone(model, None, Sharding("none", "one process"), None)
    attached = adapters.attach(
        model, LoraSpec(4, settings.get("lora_scaling", 1.5), 0.0, targets, model.name_or_path)
    )
    tokens = range(model.config.vocab_size)
    cpu = torch.device("cpu")
    return Subject(backbone, attached, cpu, tokens, longest_row, backbone.packing)


def check(tried: Subject, *, shares_passes: bool = True) -> Isolation:
    return isolation.check(tried, lambda reason: reason, shares_passes=shares_passes)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": FP8}
HARMLESS = [strange.BatchStatistics, strange.Jitter, strange.LayerDrop, strange.LooksAtDtype]
HARMLESS += [strange.Twice, strange.InPlace]
MIXES_CLIENTS = [
    (strange.Experts, r"experts\.\d"),
    (strange.RelativePositions, "position_proj"),
    (strange.TokensFirst, "proj"),
    (strange.Backwards, "proj"),
]
REFUSED = [
    (strange.MeanOverRows, "MeanOverRows"),
    (strange.RowBefore, "RowBefore"),
    (strange.LongestRow, "LongestRow"),
    (strange.AlwaysJitter, "random"),
    (strange.Counter, "calls"),
    (strange.ReadsWeight, r"lora\.target_modules.*mlp\.read_proj"),
    (strange.SeesLaterTokens, "sees the tokens after it"),
]


@pytest.mark.parametrize("layer", HARMLESS, ids=lambda layer: layer.__name__)
def test_layers_that_are_used_as_they_are_share_passes(layer):
    found = check(subject(strange.model(layer)))
    assert found.clients_share_passes and not found.reason


@pytest.mark.parametrize(
    ("layer", "name"), MIXES_CLIENTS, ids=lambda one: getattr(one, "__name__", "")
)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_layers_that_mix_clients_get_a_client_per_pass_and_are_named(layer, name, dtype):
    found = check(subject(strange.model(layer), dtype=dtype))
    assert not found.clients_share_passes
    assert re.search(rf"model\.layers\.1\.mlp\.{name}", found.reason), found.reason


@pytest.mark.parametrize(("layer", "words"), REFUSED, ids=lambda one: getattr(one, "__name__", ""))
@pytest.mark.parametrize("shares_passes", [True, False], ids=["shared", "alone"])
def test_layers_that_are_wrong_with_one_client_too_are_refused_by_name(layer, words, shares_passes):
    with pytest.raises(UserError, match=words):
        check(subject(strange.model(layer)), shares_passes=shares_passes)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (strange.LongRowsJitter, "it is random"),
        (strange.LongRowsMix, "change with other rows, of up to 40 tokens"),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
@pytest.mark.parametrize("shares_passes", [True, False], ids=["shared", "alone"])
def test_layers_that_are_wrong_from_a_length_on_are_refused_where_rows_reach_it(
    layer, words, shares_passes
):
    with pytest.raises(UserError, match=words):
        check(subject(strange.model(layer)), shares_passes=shares_passes)
    short = subject(strange.model(layer), longest_row=24)
    assert check(short, shares_passes=shares_passes).clients_share_passes is shares_passes


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize(
    ("layer", "words"),
    # What LongestRow does is not larger than the rounding of either; bytes are read by no layer.
    [one for one in REFUSED if one[0] not in (strange.LongestRow, strange.ReadsWeight)],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_coarse_numbers_hide_none_of_these(layer, words, dtype):
    with pytest.raises(UserError, match=words):
        check(subject(strange.model(layer), dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_documents_that_change_each_other_get_rows_of_their_own(dtype):
    tried = subject(strange.model(strange.LeaksThroughDocuments), dtype=dtype)
    found = check(dataclasses.replace(tried, packing=Packing(64, math.inf)))
    assert found.clients_share_passes and not found.documents_share_rows
    assert "documents in one row change each other" in found.packing_reason


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_llama_shares_passes_and_rows(dtype, checkpointing):
    tried = subject(strange.model(strange.Twice, at=0), dtype=dtype, checkpointing=checkpointing)
    found = check(tried)
    assert found == Isolation(clients_share_passes=True, documents_share_rows=True)


KINDS = [*((kind, "fine") for kind in HARMLESS), *((kind, "one") for kind, _ in MIXES_CLIENTS)]
KINDS += [(kind, "never") for kind, _ in REFUSED]


@settings(max_examples=25)
@given(
    kind=st.sampled_from(KINDS),
    at=st.integers(0, 2),
    seed=st.integers(0, 2**16),
    lora_scaling=st.sampled_from([0.1, 2.0, 50.0]),
    longest_row=st.integers(2, 64),
    checkpointing=st.booleans(),
)
def test_a_strange_layer_anywhere_is_told_from_a_harmless_one(
    kind, at, seed, lora_scaling, longest_row, checkpointing
):
    layer, verdict = kind
    tried = subject(
        strange.model(layer, at, seed),
        longest_row=longest_row,
        checkpointing=checkpointing and layer not in (strange.Counter,),
        lora_scaling=lora_scaling,
    )
    try:
        found = "fine" if check(tried).clients_share_passes else "one"
    except UserError:
        found = "never"
    assert found == verdict


def test_a_rotary_embedding_that_follows_the_longest_row_is_right_up_to_a_length():
    for longest_row, is_right in ((16, True), (17, False), (40, False)):
        tried = subject(strange.longrope(16), longest_row=longest_row)
        if is_right:
            assert check(tried).clients_share_passes
            continue
        for shares_passes in (True, False):
            with pytest.raises(UserError, match=r"longrope.*set data\.max_tokens to at most 16"):
                check(tried, shares_passes=shares_passes)


def test_the_check_draws_nothing_and_leaves_the_model_as_it_was():
    tried = subject(strange.model(strange.LooksAtDtype))
    before, state = digest(tried.backbone), torch.random.get_rng_state()
    check(tried)
    assert digest(tried.backbone) == before
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any("forward" in vars(layer) for layer in tried.adapters.layers.values())


def test_padding_of_packed_rows_has_no_position_beyond_the_documents():
    rows = [
        [Row(np.arange(1, 4, dtype=np.int32), 1)] * 3,
        [Row(np.arange(1, 6, dtype=np.int32), 1)],
    ]
    batch = collate(rows, 3, packing=Packing(64, math.inf))
    assert batch.documents is not None
    assert int(batch.documents.position_ids.max()) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_deep_model_is_not_refused_for_its_round_off(dtype):
    config = {"num_hidden_layers": 32, "hidden_size": 64, "intermediate_size": 172}
    tried = subject(strange.llama(**config), dtype=dtype)
    found = check(tried)
    assert found == Isolation(clients_share_passes=True, documents_share_rows=True)
