"""Packed rows: each client gets the losses and gradients of padded ones, whatever the attention."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from transformers import modeling_flash_attention_utils

from sfed.data.batches import Batch, collate
from sfed.data.packing import Packing, first_fit_decreasing, pack, round_up
from sfed.data.tokenize import Row
from sfed.lora import adapters
from sfed.lora.adapters import Adapters, LoraSpec
from sfed.lora.hf_blocks import patch_blocks
from sfed.lora.linear import Probe
from sfed.models.backbone import Backbone
from sfed.models.hf_config import Sharding
from sfed.models.objective import objective_of
from tests.support import runs, tiny
from tests.support.selection import full

COMMON = {"vocab_size": 96, "initializer_range": 0.2}
LLAMA = {
    **COMMON,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
WINDOW = {"sliding_window": 6}
GEMMA = "gemma2, which bends its logits"  # and knows no sdpa
SHAPES = {
    "llama": transformers.LlamaConfig(**LLAMA),
    "mistral with a window": transformers.MistralConfig(**LLAMA, **WINDOW),
    "qwen2": transformers.Qwen2Config(**LLAMA),
    "qwen2 with a window": transformers.Qwen2Config(
        **LLAMA, **WINDOW, use_sliding_window=True, max_window_layers=1
    ),
    GEMMA: transformers.Gemma2Config(**LLAMA, **WINDOW),
    "gpt2, which learns positions": transformers.GPT2Config(
        **COMMON,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        attn_pdrop=0.0,
    ),
}
UNFIT = {
    "bloom, without position ids": transformers.BloomConfig(
        **COMMON, hidden_size=32, n_layer=2, n_head=4
    ),
    "mamba, with a state that runs on": transformers.MambaConfig(
        **COMMON, hidden_size=32, num_hidden_layers=2, state_size=4
    ),
}


def make(shape: transformers.PreTrainedConfig, attention: str = "sdpa") -> Backbone:
    torch.manual_seed(0)
    if attention == "flash_attention_2":
        model = transformers.AutoModelForCausalLM.from_config(shape, attn_implementation="eager")
        model.config._attn_implementation = attention  # the package itself needs a GPU
    else:
        model = transformers.AutoModelForCausalLM.from_config(shape, attn_implementation=attention)
    model.requires_grad_(False)
    patch_blocks(model)  # as the trainer does
    model.name_or_path = "test"
    return Backbone(model, None, Sharding("none", "a test"), None)


def adapted(backbone: Backbone, num_clients: int) -> tuple[Adapters, torch.Tensor]:
    """Adapters with random factors, B's too: (num_clients, layout.size)."""
    attached = adapters.attach(backbone.model, LoraSpec(2, 1.5, 0.0, "all-linear", "test"))
    generator = torch.Generator().manual_seed(1)
    return attached, torch.randn(num_clients, attached.layout.size, generator=generator) * 0.2


def make_rows(*lengths_and_prompts: tuple[int, int]) -> list[Row]:
    generator = np.random.default_rng(len(lengths_and_prompts))
    return [
        Row(generator.integers(2, 90, length).astype(np.int32), prompt)
        for length, prompt in lengths_and_prompts
    ]


ROWS = [
    make_rows((24, 5), (9, 3), (10, 0), (5, 1), (3, 2), (8, 7)),
    make_rows((11, 2), (9, 0), (12, 4), (4, 1)),
    [],
]


def both() -> tuple[Batch, Batch]:
    packing = Packing(widest=40, even_width=math.inf)
    padded, packed = (collate(ROWS, 6, packing=packing) for packing in (None, packing))
    assert (padded.input_ids.shape, packed.input_ids.shape) == ((18, 24), (6, 32))
    return padded, packed


def passed(
    backbone: Backbone, attached: Adapters, values: torch.Tensor, batch: Batch
) -> tuple[torch.Tensor, ...]:
    """By client: losses, gradients, squares of the adapters' outputs, and how many these are."""
    grads = torch.zeros_like(values)
    attached.bind(values, grads, ("A", "B"))
    attached.context.probe = probe = Probe.of(objective_of(backbone).counted_tokens(batch))
    losses = objective_of(backbone).losses(batch).view(len(values), -1).sum(dim=1)
    attached.context.probe = None
    torch.autograd.backward(losses.sum())
    squares, count = probe.sum_squares.detach(), probe.count
    by_client = [one.view(len(values), -1).sum(dim=1) for one in (squares, count)]
    return losses.detach(), grads, *by_client


def assert_close(one: torch.Tensor, other: torch.Tensor) -> None:
    assert float((one - other).abs().max()) <= 1e-5 * float(other.abs().max())


def assert_packed_equals_padded(backbone: Backbone) -> None:
    attached, values = adapted(backbone, len(ROWS))
    padded, packed = (passed(backbone, attached, values, batch) for batch in both())
    for one, other in zip(packed, padded, strict=True):
        for client in range(2):
            assert_close(one[client], other[client])
        assert not one[2].any(), "a client without rows"


@pytest.mark.parametrize("is_training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", SHAPES)
def test_packed_rows_give_each_client_its_losses_and_gradients(name, attention, is_training):
    backbone = make(SHAPES[name], attention if name != GEMMA else "eager")
    backbone.training() if is_training else backbone.evaluating()
    assert backbone.packing is not None
    assert_packed_equals_padded(backbone)


def varlen(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, sliding_window, **_rest):
    """What flash-attn computes of sequences laid end to end: (tokens, heads, dim)."""
    assert torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q.dtype == torch.int32
    outputs = []
    for start, end in itertools.pairwise(cu_seqlens_q.tolist()):
        assert 0 < end - start <= max_seqlen_q
        i = torch.arange(end - start)
        seen = i[:, None] >= i
        if sliding_window is not None:
            seen &= i[:, None] - i < sliding_window
        heads = [x[start:end].transpose(0, 1) for x in (q, k, v)]
        attended = functional.scaled_dot_product_attention(*heads, attn_mask=seen, enable_gqa=True)
        outputs.append(attended.transpose(0, 1))
    return torch.cat(outputs)


def whole(q, k, v, **settings):
    """The same of a batch of sequences: (rows, tokens, heads, dim)."""
    rows, tokens = q.shape[:2]
    ends = torch.arange(0, (rows + 1) * tokens, tokens, dtype=torch.int32)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    lengths = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": tokens}
    return varlen(*flat, **lengths, **settings).view_as(q)


@pytest.mark.parametrize("name", ["llama", "mistral with a window"])
def test_flash_attention_is_told_where_documents_begin(monkeypatch, name):
    monkeypatch.setattr(
        modeling_flash_attention_utils,
        "lazy_import_flash_attention",
        lambda _implementation: ((whole, varlen, None, None, None), (dict, None)),
    )
    backbone = make(SHAPES[name], "flash_attention_2")
    assert backbone.packing is not None
    assert_packed_equals_padded(backbone)


@pytest.mark.parametrize("name", UNFIT)
def test_a_model_whose_documents_would_see_each_other_is_found_out(name):
    assert make(UNFIT[name], "eager").packing is None


def test_a_model_that_forgets_its_mask_is_found_out(monkeypatch):
    from transformers import masking_utils

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda _positions: None)
    assert make(SHAPES["llama"]).packing is None


# --- layout --------------------------------------------------------------------------------------

some_rows = st.lists(
    st.builds(
        lambda length, share: Row(np.arange(1, length + 1, dtype=np.int32), int(share * length)),
        st.integers(2, 40),
        st.floats(0, 0.99),
    ),
    max_size=8,
)


packings = st.builds(Packing, st.integers(40, 400), st.sampled_from([4.0, 60.0, 1e3, math.inf]))


@given(st.lists(some_rows, min_size=1, max_size=4), packings)
def test_a_packed_batch_holds_the_same_in_fewer_slots_at_less_cost(by_client, packing):
    per_client = max(1, *map(len, by_client))
    padded, packed = (collate(by_client, per_client, packing=p) for p in (None, packing))
    if packed.documents is None:
        assert torch.equal(packed.input_ids, padded.input_ids)
        return
    (_, padded_width), (_, width) = padded.input_ids.shape, packed.input_ids.shape
    assert packed.slots < padded.slots and padded_width <= width <= packing.widest
    assert width % 8 == 0
    assert packing.cost(packed.slots, width) < packing.cost(padded.slots, padded_width / 2)
    supervised = [
        sorted(int(t) for row in own for t in row.ids[max(1, row.prompt_length) :])
        for own in by_client
    ]
    targets = packed.labels.flatten()[packed.positions + 1].tolist()
    clients = (packed.positions // (packed.slots // len(by_client))).tolist()
    for client, expected in enumerate(supervised):
        own = sorted(t for t, at in zip(targets, clients, strict=True) if at == client)
        assert own == expected or not any(supervised)


@given(st.lists(some_rows, min_size=1, max_size=3))
def test_documents_are_the_examples_and_each_is_counted_from_0(by_client):
    packing = Packing(400, math.inf)
    packed = collate(by_client, max(1, *map(len, by_client)), packing=packing)
    if packed.documents is None:
        return
    starts, ids = packed.documents.starts.tolist(), packed.input_ids.flatten()
    positions = packed.documents.position_ids.flatten().tolist()
    assert starts[0] == 0 and starts[-1] == packed.slots
    found = []
    for start, end in itertools.pairwise(starts):
        assert positions[start:end] == list(range(end - start))
        found.append([token for token in ids[start:end].tolist() if token])  # 0 is padding
    examples = [row.ids.tolist() for own in by_client for row in own]
    assert sorted(filter(None, found)) == sorted(examples)


@given(st.lists(st.integers(1, 30), max_size=20), st.integers(30, 50))
def test_groups_fit_into_the_width_and_first_fit_leaves_no_two_half_empty(lengths, width):
    groups = first_fit_decreasing(lengths, width)
    sizes = [sum(lengths[number] for number in group) for group in groups]
    assert sorted(number for group in groups for number in group) == list(range(len(lengths)))
    assert all(0 < size <= width for size in sizes)
    assert sum(size <= width / 2 for size in sizes) <= 1


def test_rows_get_as_wide_as_pays():
    lengths = [[100] * 7 + [120], [100] * 8]
    found = pack(lengths, 8, Packing(4096, math.inf))
    assert (found.width, [len(own) for own in found.lines]) == (824, [1, 1])
    assert pack(lengths, 8, Packing(512, math.inf)).width == 432, "a narrow context"
    assert pack(lengths, 8, Packing(4096, 64.0)) is None, "attention is most of a pass"


@pytest.mark.parametrize("clients", [1, 3])
def test_documents_have_a_mask_where_each_by_itself_costs_more(clients):
    """Two rows of 40 for each client, or one of 72 with three documents, the padding being one."""
    lengths, even = [[30, 37]] * clients, 1000.0
    extra = 72 * (72 - 40 / 2) / even / 3
    assert not pack(lengths, 2, Packing(4096, even, 0.99 * extra)).is_masked
    assert pack(lengths, 2, Packing(4096, even, 1.01 * extra)).is_masked
    assert pack(lengths, 2, Packing(4096, even)).is_masked, "nothing else can be done"
    assert not pack(lengths, 2, Packing(4096, 1.0, 0.0)).is_masked, "one kernel"


def test_documents_stay_padded_where_each_costs_more_than_it_saves():
    """Four rows of 40 or one of 128, too wide for a mask."""
    lengths, even = [[30, 30, 30, 37]] * 3, 30.0
    saved = (160 - 128) * (1 + 40 / 2 / even) / 5
    assert pack(lengths, 4, Packing(4096, even, 0.99 * saved)) is not None
    assert pack(lengths, 4, Packing(4096, even, 1.01 * saved)) is None


def test_examples_of_one_length_stay_padded():
    rows = [make_rows((24, 5), (24, 3)), make_rows((24, 3), (24, 0))]
    assert collate(rows, 2, packing=Packing(400, math.inf)).documents is None


# --- whole runs ----------------------------------------------------------------------------------


def save_uneven_rows(path: Path) -> None:
    """Rows of 12 to 60 tokens, a few of them long."""
    rows = [
        {"prompt": f"{i}:", "completion": " " + "abcdefghij"[i % 10] * (45 if i % 5 == 0 else 8)}
        for i in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.dist
@pytest.mark.parametrize("dropout", [full(0.0), 0.3])
def test_a_packed_run_trains_the_adapters_of_a_padded_one(
    tiny_folder: Path, tmp_path: Path, dropout: float
):
    """One process and two with ZeRO-3; fewer slots; the same evaluation; the same dropout masks."""
    save_uneven_rows(tmp_path / "rows.jsonl")
    found, events = {}, {}
    for name, num, packing, sharding in (
        ("padded", 1, False, "none"),
        ("packed", 1, True, "none"),
        ("sharded", 2, True, "zero3"),
    ):
        settings = tiny.settings(
            tiny_folder,
            data={"packing": packing, "train_files": str(tmp_path / "rows.jsonl")},
            train={"optimizer": "sgd", "lr": 0.1, "local_steps": 3, "batch_size": 6},
            federated={"num_clients": 2, "num_rounds": 2},
            lora={"rank": 4, "dropout": dropout},
            backbone={"sharding": sharding},
            output={"dir": str(tmp_path), "name": name},
        )
        folder = runs.run(num, settings)
        found[name], events[name] = runs.adapters(folder), runs.rounds(folder)
    for name in ("packed", "sharded"):
        assert runs.relative_difference(found["padded"], found[name]) <= 5e-6
        for padded, packed in zip(events["padded"], events[name], strict=True):
            assert packed["eval/loss"] == pytest.approx(padded["eval/loss"], rel=1e-5)
        assert events["padded"][1]["tokens/fill"] < 0.7 < events[name][1]["tokens/fill"] <= 1


@given(
    st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=8), min_size=1, max_size=4),
    st.floats(16, 1e6),
    st.sampled_from([0.0, 17.0, math.inf]),
    st.integers(64, 512),
)
def test_no_row_is_wider_than_the_plan_of_memory_assumes(
    lengths_by_client: list[list[int]], even_width: float, document_slots: float, widest: int
) -> None:
    packing, longest = Packing(widest, even_width, document_slots), 60
    padded_rows = max(map(len, lengths_by_client))
    found = pack(lengths_by_client, padded_rows, packing)
    if found is not None:
        assert found.width <= packing.widest_row(padded_rows, round_up(longest))


def test_the_widest_row_is_the_last_one_that_costs_less() -> None:
    packing = Packing(10**6, 1000.0)
    least = packing.cost(8 * 512, 256)
    widest = packing.widest_row(8, 512)
    assert packing.cost(widest, widest) <= least < packing.cost(widest + 1, widest + 1)
    assert Packing(10**6, math.inf).widest_row(8, 512) == 8 * 512
    assert Packing(600, math.inf).widest_row(8, 512) == 600
