"""Attention of packed rows without a mask: the numbers of transformers' masks, and no mask."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel, masking_utils

from sfed.data.batches import Batch, collate
from sfed.data.packing import Packing, pack
from sfed.data.tokenize import Row
from sfed.lora import adapters, packed_attention
from sfed.lora.adapters import Adapters, LoraSpec
from sfed.lora.hf_blocks import patch_blocks
from sfed.models import isolation
from sfed.models.backbone import Backbone
from sfed.models.hf_config import Sharding
from sfed.models.objective import objective_of
from sfed.models.trial_passes import Subject
from tests.support import families
from tests.support.families import FAMILIES, WINDOW, Family
from tests.support.pretended_gpu import kernels

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WORDS = 96
LENGTHS = ((21, 1, 13, 2, 9), (40, 3, 1))
"""Tokens of the documents of each client: one row with several, and rows with one; with padding at
the end; longer than a window and shorter; of one token."""
LLAMA, MASKED = FAMILIES[0], {"OPT", "Falcon", "Gemma 2 (capped logits, sliding layers)"}
UNMASKED = [one for one in FAMILIES if not one.is_classifier and one.name not in MASKED]


def made(family: Family = LLAMA, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = family.made(WORDS, pad_token_id=0).to(dtype).requires_grad_(False)
    patch_blocks(model)
    model.name_or_path = "test"
    return model


def backbone_of(model: PreTrainedModel) -> Backbone:
    return Backbone(model, None, Sharding("none", "a test"), None)


def adapted(model: PreTrainedModel) -> tuple[Adapters, torch.Tensor]:
    """Adapters of two clients with random factors, B's too."""
    attached = adapters.attach(model, LoraSpec(2, 1.5, 0.0, "all-linear", "test"))
    generator = torch.Generator().manual_seed(1)
    return attached, torch.randn(2, attached.layout.size, generator=generator) * 0.2


def batch_of(lengths: tuple[tuple[int, ...], ...] = LENGTHS) -> Batch:
    generator = np.random.default_rng(0)
    rows = [
        [Row(generator.integers(2, WORDS, length).astype(np.int32), 1) for length in own]
        for own in lengths
    ]
    packed = collate(rows, max(map(len, rows)), Packing(48, math.inf, 0.0))
    assert packed.documents is not None
    return packed


def passed(model: PreTrainedModel, batch: Batch, *, unmasked: bool) -> list[torch.Tensor]:
    """The losses of the rows, and the gradients of the clients' adapters."""
    if unmasked:
        packed_attention.install(model, CPU)
        assert packed_attention.is_installed(model)
    backbone = backbone_of(model)
    assert backbone.packing is not None
    assert backbone.attention == "sdpa"
    attached, values = adapted(model)
    backbone.training()
    grads = torch.zeros_like(values)
    attached.bind(values, grads, ("A", "B"))
    losses = objective_of(backbone).losses(batch)
    torch.autograd.backward(losses.sum())
    return [losses.detach(), grads]


@pytest.fixture(params=["one by one", "kernel"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How documents are computed: as on a CPU, and by a stand-in of the kernel of a GPU."""
    if request.param == "kernel":
        use_kernel(monkeypatch)
    return str(request.param)


def use_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", kernels.varlen_attn)
    monkeypatch.setattr(packed_attention, "_one_by_one", packed_attention._by_kernel)
    monkeypatch.setattr(kernels, "DTYPES_OF_FLASH", [torch.bfloat16, torch.float32])


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert bool(other.any())
        assert float((one - other).abs().max()) <= 1e-5 * float(other.abs().max())


# --- the numbers ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("family", UNMASKED, ids=lambda one: one.name)
def test_losses_and_gradients_are_those_of_transformers_masks(family: Family) -> None:
    batch = batch_of()
    expected = passed(made(family), batch, unmasked=False)
    assert_close(passed(made(family), batch, unmasked=True), expected)


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("family", UNMASKED, ids=lambda one: one.name)
def test_a_row_may_be_wider_than_the_context(family: Family, is_masked: bool) -> None:
    generator, found = np.random.default_rng(0), []
    rows = [
        [Row(generator.integers(2, WORDS, length).astype(np.int32), 1) for length in own]
        for own in ((100, 60, 3), (120, 40, 11))
    ]
    for packs in (False, True):
        model = made(family)
        packed_attention.install(model, CPU)
        backbone = backbone_of(model)
        batch = collate(rows, 3, replace(backbone.packing, document_slots=0.0) if packs else None)
        if packs:
            assert batch.input_ids.shape == (2, 176)
            assert backbone.context_tokens < 176
            batch = replace(batch, documents=replace(batch.documents, is_masked=is_masked))
        losses, grads = passed(model, batch, unmasked=True)
        found.append([losses.view(2, -1).sum(dim=1), grads])
    assert_close(*found)


def test_a_model_that_is_not_known_gets_no_row_wider_than_its_context() -> None:
    backbone = backbone_of(made())
    assert backbone.why_masked is not None
    assert backbone.packing.widest == backbone.context_tokens == 128
    packed_attention.install(backbone.model, CPU)
    assert backbone_of(backbone.model).packing.widest == 2**31


def test_the_rows_of_these_tests_have_what_may_go_wrong() -> None:
    documents, width = batch_of().documents, batch_of().input_ids.shape[1]
    starts = documents.starts.tolist()
    assert documents.lengths == tuple(np.diff(starts))
    assert min(documents.lengths) == 1 and max(documents.lengths) > WINDOW
    assert batch_of().is_token.logical_not().any(), "padding"
    one_in_a_row = batch_of(((16, 3, 5), (24,)))
    assert 24 in one_in_a_row.documents.lengths and one_in_a_row.input_ids.shape[1] == 24
    assert {0, width} < set(starts)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("lengths", [((16, 3, 5), (24,)), ((4, 4), (4, 4)), ((1, 1, 1), (3,))])
def test_rows_of_one_document_and_of_equal_ones(lengths: tuple[tuple[int, ...], ...]) -> None:
    batch = batch_of(lengths)
    assert_close(passed(made(), batch, unmasked=True), passed(made(), batch, unmasked=False))


@pytest.mark.usefixtures("way")
def test_recomputed_layers_get_the_documents_too() -> None:
    batch, found = batch_of(), []
    for recomputes in (False, True):
        model = made()
        if recomputes:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        found.append(passed(model, batch, unmasked=True))
    assert_close(*found)


@pytest.mark.usefixtures("way")
def test_bf16_is_as_near_to_fp32_as_under_a_mask() -> None:
    batch = batch_of()
    exact = passed(made(dtype=torch.bfloat16).float(), batch, unmasked=False)
    masked, unmasked = (
        passed(made(dtype=torch.bfloat16), batch, unmasked=unmasked) for unmasked in (False, True)
    )
    for one, other, true in zip(unmasked, masked, exact, strict=True):
        assert float((one - true).norm()) <= 1.5 * float((other - true).norm())
        assert float((one - true).norm()) <= 0.05 * float(true.norm())


def test_the_stand_in_has_torchs_signature() -> None:
    """What the kernel computes on a GPU is seen nowhere here."""
    parameters = [
        inspect.signature(one).parameters for one in (varlen.varlen_attn, kernels.varlen_attn)
    ]
    torchs, ours = ([(p.name, p.kind, p.default) for p in one.values()] for one in parameters)
    assert torchs == ours
    assert packed_attention._has_varlen()


# --- no mask, no wait ----------------------------------------------------------------------------


class Watched(TorchDispatchMode):
    """Counts tensors of tokens x tokens, and looks of the host at a value."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self._width, self.squares, self.looks = width, 0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.looks += func is torch.ops.aten._local_scalar_dense.default
        made = func(*args, **(kwargs or {}))
        shapes = [leaf.shape[-2:] for leaf in tree_leaves(made) if torch.is_tensor(leaf)]
        self.squares += shapes.count((self._width, self._width))
        return made


@pytest.mark.parametrize("unmasked", [True, False], ids=["without", "with"])
@pytest.mark.parametrize("family", UNMASKED[:3], ids=lambda one: one.name)
def test_no_mask_is_made_and_the_host_looks_at_nothing(family: Family, unmasked: bool) -> None:
    model, batch = made(family), batch_of()
    if unmasked:
        packed_attention.install(model, CPU)
    backbone = backbone_of(model)
    with Watched(batch.input_ids.shape[1]) as watched:
        objective_of(backbone).losses(batch)
    assert (watched.squares == 0) == unmasked
    assert (watched.looks == 0) == unmasked


@pytest.mark.parametrize("family", UNMASKED, ids=lambda one: one.name)
def test_documents_that_are_to_have_a_mask_get_that_of_transformers(family: Family) -> None:
    batch = batch_of()
    batch = replace(batch, documents=replace(batch.documents, is_masked=True))
    expected = passed(made(family), batch, unmasked=False)
    with Watched(batch.input_ids.shape[1]) as watched:
        found = passed(made(family), batch, unmasked=True)
    assert watched.squares > 0
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(("length", "is_masked"), [(6, True), (120, False)])
def test_a_cpu_takes_a_mask_for_short_documents_only(length: int, is_masked: bool) -> None:
    model = made()
    packed_attention.install(model, CPU)
    [own], rows = [[length, *[length // 2] * 5]], 6
    layout = pack([own], rows, replace(backbone_of(model).packing, widest=512))
    assert layout.is_masked == is_masked


# --- everything else is sdpa ---------------------------------------------------------------------


@pytest.mark.parametrize("family", UNMASKED, ids=lambda one: one.name)
def test_padded_rows_windows_and_masks_are_those_of_sdpa(family: Family) -> None:
    ids = torch.arange(2 * 24).view(2, 24) % WORDS
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    found = []
    for unmasked in (False, True):
        model = made(family)
        if unmasked:
            packed_attention.install(model, CPU)
        with torch.no_grad():
            passes = [model(input_ids=ids, **more) for more in ({}, {"attention_mask": mask})]
        found.append([one.logits for one in passes])
    for masked, own in zip(*found, strict=True):
        assert torch.equal(masked, own)
    assert not torch.equal(found[0][0][1], found[0][1][1])


def test_answers_written_with_a_cache_are_those_of_sdpa() -> None:
    ids = torch.arange(2 * 9).view(2, 9) % WORDS
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    model = made()
    expected = model.generate(ids, attention_mask=mask, **settings)
    packed_attention.install(model, CPU)
    assert torch.equal(model.generate(ids, attention_mask=mask, **settings), expected)


# --- who gets it, and what is refused ------------------------------------------------------------


def reason(model: PreTrainedModel, device: torch.device = CPU) -> str:
    packed_attention.install(model, device)
    assert not packed_attention.is_installed(model)
    return packed_attention.why_masked(model, device) or ""


@pytest.mark.parametrize("family", families.some(tuple(MASKED)), ids=lambda one: one.name)
def test_other_models_keep_their_masks_and_that_is_said(family: Family) -> None:
    text = reason(family.made(WORDS))
    assert text == "model.attention is eager" or family.kind in text


def test_a_class_of_the_same_name_keeps_its_masks() -> None:
    class Namesake(transformers.LlamaForCausalLM):
        pass

    Namesake.__name__ = "LlamaForCausalLM"
    model = made()
    model.__class__ = Namesake
    assert "not among the models" in reason(model)


def test_attention_that_looks_ahead_keeps_its_masks() -> None:
    [gemma] = families.some(("Gemma 1",))
    model = made(gemma)
    model.config.use_bidirectional_attention = True
    assert "looks ahead" in reason(model)


def test_what_the_kernel_of_a_gpu_does_not_compute_keeps_its_masks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert packed_attention.why_masked(made(dtype=torch.bfloat16), CUDA) is None
    assert "float32" in reason(made(), CUDA)
    narrow = Family("narrow", LLAMA.kind, {**LLAMA.settings, "head_dim": 20})
    assert "width 20" in reason(made(narrow, torch.bfloat16), CUDA)
    assert "no kernel" in reason(made(), torch.device("mps"))
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, key, value, is_causal: query)
    assert "has no kernel" in reason(made(dtype=torch.bfloat16), CUDA)


REFUSED: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 30.0},
    "s_aux": {"s_aux": torch.zeros(4)},
    "dropout": {"dropout": 0.1},
    "no document_lengths": {"document_lengths": None},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_function_does_not_compute_is_refused(name: str) -> None:
    q = torch.randn(1, 4, 6, 8)
    first_places = torch.tensor([0, 2, 6], dtype=torch.int32).view(1, 1, 1, 3)
    layer, settings = made().model.layers[0].self_attn, {"document_lengths": (2, 4)}
    output, _ = packed_attention.attend(layer, q, q, q, first_places, **settings)
    assert output.shape == (1, 6, 4, 8)
    with pytest.raises(
        ValueError, match=f"LlamaAttention asks .* for {name}, .*data.packing=false"
    ):
        packed_attention.attend(layer, q, q, q, first_places, **{**settings, **REFUSED[name]})


def test_a_layer_that_looks_ahead_is_refused() -> None:
    q, first_places = torch.randn(1, 4, 6, 8), torch.tensor([[[[0, 6]]]], dtype=torch.int32)
    layer = made().model.layers[0].self_attn
    layer.is_causal = False
    with pytest.raises(ValueError, match="later tokens"):
        packed_attention.attend(layer, q, q, q, first_places, document_lengths=(6,))


def test_a_saved_model_does_not_name_the_function(tmp_path: Path) -> None:
    """It could not be read without this package."""
    model = made()
    packed_attention.install(model, CPU)
    model.save_pretrained(tmp_path)
    assert packed_attention.NAME not in (tmp_path / "config.json").read_text(encoding="utf-8")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"


# --- the checks at the start ---------------------------------------------------------------------


def leaking(compute: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Attention that takes unequal documents for one; equal ones are rows of their own."""

    def leak(qkv: Any, starts: torch.Tensor, lengths: tuple[int, ...], *rest: Any) -> torch.Tensor:
        merged = lengths if len(set(lengths)) == 1 else (sum(lengths),)
        return compute(qkv, starts, merged, *rest)

    return leak


def test_the_pass_at_the_start_finds_documents_that_see_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packed_attention, "_one_by_one", leaking(packed_attention._one_by_one))
    model = made()
    packed_attention.install(model, CPU)
    assert backbone_of(model).packing is None


def no_documents(position_ids: torch.Tensor) -> torch.Tensor:
    """In the place of what transformers finds in positions: all tokens belong together."""
    return torch.zeros_like(position_ids)


@pytest.mark.parametrize("leaks", ["", "without a mask", "under a mask"])
def test_the_start_check_compares_packed_rows_with_rows_alone(
    monkeypatch: pytest.MonkeyPatch, leaks: str
) -> None:
    """In both ways, since a CPU may take either."""
    model = made()
    packed_attention.install(model, CPU)
    backbone = backbone_of(model)
    attached, _ = adapted(model)
    subject = Subject(backbone, attached, CPU, range(WORDS), 40, backbone.packing)
    if leaks == "without a mask":
        monkeypatch.setattr(packed_attention, "_one_by_one", leaking(packed_attention._one_by_one))
    if leaks == "under a mask":
        monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", no_documents)
    found = isolation.check(subject, lambda reason: reason, shares_passes=True)
    assert found.clients_share_passes
    assert found.documents_share_rows == (not leaks)
