"""The losses of a batch: the quick way equals the plain one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from sfed import backbone, batches, distributed, objective
from sfed.tokens import Row
from tests import tiny


@pytest.fixture
def frozen(tiny_folder):
    config = tiny.config(tiny_folder)
    world = distributed.start(30.0)
    yield backbone.load(config, config.model.name, world)
    distributed.stop()


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
    for losses in (objective.row_losses, lambda own, b: plain(own.model, b)):
        outputs: list[torch.Tensor] = []

        def keep(_module, _inputs, output, outputs=outputs):
            outputs.append(output.requires_grad_())

        hook = embeddings.register_forward_hook(keep)
        value = losses(frozen, batch)
        hook.remove()
        found.append((value.detach(), *torch.autograd.grad(value.sum(), outputs)))
    (quick, quick_grad), (slow, slow_grad) = found
    assert quick.shape == (4,)
    torch.testing.assert_close(quick, slow, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(quick_grad, slow_grad, rtol=1e-5, atol=1e-7)


def test_the_head_sees_supervised_tokens_alone_and_only_for_losses(frozen):
    seen = []
    head = frozen.model.get_output_embeddings()
    head.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].shape[:2]))
    batch = batches.collate(BATCHES["unequal rows"], 2)
    objective.row_losses(frozen, batch)
    frozen.model(input_ids=batch.input_ids)
    supervised = sum(batches.supervised_count(own) for own in BATCHES["unequal rows"])
    assert seen == [(1, supervised), batch.input_ids.shape]
