"""The losses of a batch: the quick way equals the plain one, and never holds all logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from sfed.bench.measure import SavedBytes
from sfed.data import batches
from sfed.data.batches import IGNORED_LABEL
from sfed.data.tokenize import Row
from sfed.distributed import world as distributed
from sfed.lora import adapters
from sfed.lora.adapters import LoraSpec
from sfed.models import backbone, losses
from sfed.models.backbone import Backbone
from sfed.models.hf_config import Sharding
from sfed.models.losses import linear_cross_entropy
from sfed.models.objective import objective_of
from tests.support import tiny
from tests.support.deadlines import RUN_SECONDS


@pytest.fixture
def frozen(tiny_folder):
    config = tiny.config(tiny_folder)
    world = distributed.start(RUN_SECONDS)
    yield backbone.load(config, config.model.name, world)
    distributed.stop(world)


def rows(*lengths: tuple[int, int]) -> list[Row]:
    generator = np.random.default_rng(0)
    return [
        Row(generator.integers(2, 200, length).astype(np.int32), prompt)
        for length, prompt in lengths
    ]


def plain(model: torch.nn.Module, batch: batches.Batch) -> torch.Tensor:
    """Logits of every token, as transformers gives them."""
    logits = model(input_ids=batch.input_ids).logits[:, :-1]
    labels = batch.labels[:, 1:]
    losses = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view(labels.shape).sum(dim=1)


BATCHES = {
    "unequal rows": [rows((9, 3), (5, 0)), rows((21, 20), (4, 2))],
    "a client without rows": [rows((9, 3), (5, 1)), []],
    "nothing to learn": [[], []],
}


@pytest.mark.parametrize("name", BATCHES)
def test_logits_of_supervised_tokens_alone_give_the_losses_and_gradients_of_all(frozen, name):
    batch = batches.collate(BATCHES[name], 2)
    embeddings = frozen.model.get_input_embeddings()
    found = []
    for way in (lambda own, b: objective_of(own).losses(b), lambda own, b: plain(own.model, b)):
        outputs: list[torch.Tensor] = []

        def keep(_module, _inputs, output, outputs=outputs):
            outputs.append(output.requires_grad_())

        hook = embeddings.register_forward_hook(keep)
        value = way(frozen, batch)
        hook.remove()
        found.append((value.detach(), *torch.autograd.grad(value.sum(), outputs)))
    (quick, quick_grad), (slow, slow_grad) = found
    assert quick.shape == (4,)
    torch.testing.assert_close(quick, slow, rtol=1e-6, atol=1e-6)
    assert float((quick_grad - slow_grad).abs().max()) <= 1e-5 * float(slow_grad.abs().max())


def test_the_head_sees_supervised_tokens_alone_and_only_for_losses(frozen):
    seen = []
    head = frozen.model.get_output_embeddings()
    head.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].shape[:2]))
    batch = batches.collate(BATCHES["unequal rows"], 2)
    objective_of(frozen).losses(batch)
    frozen.model(input_ids=batch.input_ids)
    supervised = sum(batches.supervised_count(own) for own in BATCHES["unequal rows"])
    assert seen == [(1, supervised), batch.input_ids.shape]


@pytest.mark.parametrize(
    ("num_words", "tokens"), [(32_000, 1_024), (128_256, 256), (50, 671_088 // 128 * 128)]
)
def test_chunks_are_whole_tiles_of_a_matrix_product(num_words, tokens):
    assert losses.tokens_of_chunk(num_words, losses.CHUNK_BYTES) == tokens
    assert losses.tokens_of_chunk(num_words, 4 * num_words * 100) == 100, "less than a tile fits"


# --- logits in chunks ----------------------------------------------------------------------------

TOKENS, WIDTH, WORDS = 50, 16, 300


def problem(dtype: torch.dtype, *, with_bias: bool):
    """Hidden states, weight, bias, targets (some ignored), gradients of the losses."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(WORDS, WIDTH, generator=generator).to(dtype)
    bias = torch.randn(WORDS, generator=generator).to(dtype) if with_bias else None
    targets = torch.randint(WORDS, (TOKENS,), generator=generator)
    targets[[3, 7]] = IGNORED_LABEL
    return hidden, weight, bias, targets, torch.rand(TOKENS, generator=generator)


def in_one(hidden, weight, bias, targets):
    logits = functional.linear(hidden, weight, bias).float()
    return functional.cross_entropy(logits, targets, ignore_index=IGNORED_LABEL, reduction="none")


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("chunk_tokens", [1, 7, TOKENS, 10**6])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"]
)
def test_chunks_give_the_losses_and_gradients_of_all_logits_at_once(
    dtype, tolerance, chunk_tokens, with_bias
):
    hidden, weight, bias, targets, grads = problem(dtype, with_bias=with_bias)
    chunked = linear_cross_entropy(hidden, weight, bias, targets, 4 * WORDS * chunk_tokens)
    (gradient,) = torch.autograd.grad(chunked, hidden, grads)
    expected = in_one(hidden, weight, bias, targets)
    (expected_gradient,) = torch.autograd.grad(expected, hidden, grads)
    assert chunked.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(chunked, expected, rtol=1e-6, atol=1e-6)
    scale = float(expected_gradient.abs().max())
    assert float((gradient - expected_gradient).abs().max()) <= tolerance * scale
    assert not chunked[[3, 7]].any() and not gradient[[3, 7]].any()


class Watchdog(TorchDispatchMode):
    """The largest tensor that is made, and the matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        self.products += function is torch.ops.aten.mm.default
        if isinstance(output, torch.Tensor) and not function.is_view:
            self.largest = max(self.largest, output.numel())
        return output


@pytest.mark.parametrize("chunk_tokens", [5, 10])
def test_no_tensor_holds_more_logits_than_a_chunk_and_none_are_kept(chunk_tokens):
    hidden, weight, _, targets, grads = problem(torch.float32, with_bias=False)
    with SavedBytes([weight]) as saved, Watchdog() as seen:
        chunked = linear_cross_entropy(hidden, weight, None, targets, 4 * WORDS * chunk_tokens)
    assert seen.largest == chunk_tokens * WORDS
    assert saved.total == hidden.numel() * 4
    with Watchdog() as seen:
        torch.autograd.grad(chunked, hidden, grads)
    assert seen.largest == hidden.numel() and not seen.products


def test_without_gradients_none_are_computed():
    hidden, weight, _, targets, _ = problem(torch.float32, with_bias=False)
    with torch.no_grad(), Watchdog() as seen:
        linear_cross_entropy(hidden.detach(), weight, None, targets, 4 * WORDS * 10)
    assert seen.products == TOKENS // 10


def test_a_pass_makes_its_logits_in_chunks(frozen, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * 258 * 2)
    batch = batches.collate(BATCHES["unequal rows"], 2)
    with Watchdog() as seen:
        found = objective_of(frozen).losses(batch)
    torch.testing.assert_close(found, plain(frozen.model, batch), rtol=1e-6, atol=1e-6)
    wide = [p.numel() for p in frozen.model.parameters()]
    assert seen.largest < max(2 * 258, batch.slots * 72, *wide) + 1


SMALL = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
MODELS = {
    "llama": (transformers.LlamaConfig(**SMALL), True),
    "phi, whose head has a bias": (transformers.PhiConfig(**SMALL), True),
    "cohere, which scales": (transformers.CohereConfig(**SMALL, logit_scale=0.3), False),
    "granite, which scales": (transformers.GraniteConfig(**SMALL, logits_scaling=3.0), False),
    "gemma2, which bends": (
        transformers.Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=3.0),
        False,
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_changes_its_heads_output_keeps_doing_so(name, dtype):
    shape, is_chunked = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        shape, attn_implementation="eager", dtype=dtype
    ).eval()
    own = Backbone(model.requires_grad_(False), None, Sharding("none", "a test"), None)
    batch = batches.collate(BATCHES["unequal rows"], 2)
    assert (own.model.get_output_embeddings().forward.__name__ == "_forward") == is_chunked
    with Watchdog() as seen:
        found = objective_of(own).losses(batch)
    labels = batch.labels
    given = model(input_ids=batch.input_ids, labels=labels).loss  # as transformers computes it
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    supervised = (labels[:, 1:] != IGNORED_LABEL).sum()
    torch.testing.assert_close(found.sum() / supervised, given.float(), rtol=tolerance, atol=0)
    assert seen.largest


def test_an_adapted_head_sees_the_rows_of_all_clients():
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(MODELS["llama"][0]).eval().requires_grad_(False)
    model.name_or_path = "test"
    own = Backbone(model, None, Sharding("none", "a test"), None)
    attached = adapters.attach(model, LoraSpec(2, 1.0, 0.0, ("lm_head",), "test"))
    values = torch.randn(2, attached.layout.size)
    attached.bind(values)
    batch = batches.collate(BATCHES["unequal rows"], 2)
    found = objective_of(own).losses(batch)
    torch.testing.assert_close(found, plain(model, batch), rtol=1e-5, atol=1e-5)
    attached.bind(values * 2)
    assert not torch.allclose(found, objective_of(own).losses(batch))
