"""The stacked layer is C separate LoRA layers; exported adapters are stock PEFT (property 7)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from sfed.lora import adapters
from sfed.lora.adapters import Adapters, LoraSpec
from sfed.lora.factors import Factors, PassRows
from sfed.lora.layout import Layout, Piece
from sfed.lora.linear import PassContext, StackedLoraLinear
from tests.support.keys import token_keys

CLIENTS, ROWS, TOKENS, IN, OUT, LORA_RANK, GAMMA = 3, 2, 5, 6, 10, 4, 1.7


def stacked(dropout: float = 0.0) -> tuple[StackedLoraLinear, torch.Tensor, torch.Tensor]:
    """A layer with its A and B, whose ``grad`` is where their gradients are added."""
    torch.manual_seed(0)
    layer = StackedLoraLinear(nn.Linear(IN, OUT), GAMMA, dropout, 0, PassContext())
    layer.base_layer.requires_grad_(False)
    a_piece, b_piece = (layout := Layout.of([("layer", IN, OUT)], LORA_RANK)).pieces
    values, grads = torch.randn(CLIENTS, layout.size), torch.zeros(CLIENTS, layout.size)
    rows = PassRows(values, grads, torch.float32)
    layer.siblings.bind(Factors.of(rows, [a_piece], [b_piece], "AB"))
    a, b = a_piece.of(values), b_piece.of(values)
    a.grad, b.grad = a_piece.of(grads), b_piece.of(grads)
    return layer, a, b


def test_a_pass_of_many_clients_gives_each_the_outputs_and_gradients_of_its_own() -> None:
    layer, a, b = stacked()
    x = torch.randn(CLIENTS * ROWS, TOKENS, IN)
    target = torch.randn(CLIENTS * ROWS, TOKENS, OUT)
    y = layer(x)
    (y * target).sum().backward()
    for client in range(CLIENTS):
        rows = slice(client * ROWS, (client + 1) * ROWS)
        own_a = a[client].detach().clone().requires_grad_()
        own_b = b[client].detach().clone().requires_grad_()
        own_y = layer.base_layer(x[rows]) + GAMMA * (x[rows] @ own_a.T) @ own_b.T
        (own_y * target[rows]).sum().backward()
        torch.testing.assert_close(y[rows], own_y)
        torch.testing.assert_close(a.grad[client], own_a.grad)
        torch.testing.assert_close(b.grad[client], own_b.grad)


class Transposed(nn.Linear):
    """Gives out what does not lie in memory as it is read."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight @ x.transpose(1, 2)).transpose(1, 2) + 0.0


@pytest.mark.parametrize("kind", [nn.Linear, Transposed])
def test_a_model_may_write_over_what_the_layer_gives_out(kind: type[nn.Linear]) -> None:
    layer, a, b = stacked()
    layer.base_layer = kind(IN, OUT, bias=kind is nn.Linear).requires_grad_(False)
    x = torch.randn(CLIENTS * ROWS, TOKENS, IN, requires_grad=True)

    def of_pass(*, writes: bool) -> list[torch.Tensor]:
        for tensor in (a, b, x):
            tensor.grad = None if tensor is x else tensor.grad.zero_()
        y = layer(x)
        doubled = y.mul_(2) if writes else y * 2
        doubled.square().sum().backward()
        return [doubled.detach(), *(tensor.grad.clone() for tensor in (a, b, x))]

    torch.testing.assert_close(of_pass(writes=True), of_pass(writes=False))


def test_no_gradient_crosses_from_one_client_to_another() -> None:
    layer, a, b = stacked()
    x = torch.randn(CLIENTS * ROWS, TOKENS, IN)
    layer(x)[:ROWS].sum().backward()
    for factor in (a, b):
        assert bool(factor.grad[0].any())
        assert not bool(factor.grad[1:].any())


def test_the_input_is_not_cast_up() -> None:
    layer, _, _ = stacked()
    layer.base_layer.bfloat16()
    saved = []
    x = torch.randn(CLIENTS * ROWS, TOKENS, IN, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert {t.dtype for t in saved} == {torch.bfloat16}


def test_dropout_masks_are_a_function_of_the_client_and_the_layer() -> None:
    layer, _, _ = stacked(dropout=0.5)
    x = torch.randn(CLIENTS * ROWS, TOKENS, IN)
    layer.context.token_keys = token_keys((5, 6, 7), ROWS, TOKENS)
    y = layer(x)
    torch.testing.assert_close(y, layer(x), rtol=0, atol=0)
    torch.testing.assert_close(y.flatten(0, 1), layer(x.flatten(0, 1)), rtol=1e-6, atol=1e-6)
    layer.context.token_keys = token_keys((5, 8, 9), ROWS, TOKENS)
    again = layer(x)
    assert torch.equal(y[:ROWS], again[:ROWS])
    assert not torch.equal(y[ROWS:], again[ROWS:])
    layer._layer_word = 1
    assert not torch.equal(again, layer(x))


def mask_of(layer: StackedLoraLinear, *shape: int) -> torch.Tensor:
    """What the layer makes of ones."""
    ones = torch.ones(shape)
    drop = layer.dropout_of(ones)
    assert drop is not None
    return drop(ones)[0]


@pytest.mark.parametrize("tokens", [3, 70, 200])
def test_dropout_masks_do_not_depend_on_who_shares_the_pass(tokens: int) -> None:
    """More clients, more sequences of others, and sequences that are padded further."""
    layer, _, _ = stacked(dropout=0.5)
    layer.context.token_keys = token_keys((5, 6, 7), ROWS + 1, tokens + 90)
    masks = mask_of(layer, CLIENTS * (ROWS + 1), tokens + 90, IN)
    masks = masks.view(CLIENTS, ROWS + 1, tokens + 90, IN)
    for client, seed in enumerate((5, 6, 7)):
        layer.context.token_keys = token_keys((seed,), ROWS, tokens)
        alone = mask_of(layer, ROWS, tokens, IN)
        assert torch.equal(alone, masks[client, :ROWS, :tokens])
    sequences = masks.flatten(0, 1)
    assert not torch.equal(sequences[0], sequences[1]), "each sequence has its own"
    assert not torch.equal(sequences[0, :26], sequences[0, 26:52]), "and each token"


def test_a_layer_that_sees_no_tokens_has_a_mask_for_each_vector_of_a_client() -> None:
    layer, _, _ = stacked(dropout=0.5)
    layer.context.token_keys = token_keys((5, 6, 7), ROWS, TOKENS)
    masks = mask_of(layer, CLIENTS * ROWS, 64)
    assert len({tuple(mask) for mask in masks.tolist()}) == CLIENTS * ROWS
    layer.context.token_keys = token_keys((8, 6, 9), ROWS, TOKENS)
    again = mask_of(layer, CLIENTS * ROWS, 64)
    same = [torch.equal(one, other) for one, other in zip(masks, again, strict=True)]
    assert same == [False] * ROWS + [True] * ROWS + [False] * ROWS


def test_dropout_keeps_the_expected_value() -> None:
    layer, _, _ = stacked(dropout=0.25)
    x = torch.ones(CLIENTS, 1, IN)
    expected = layer(x)
    total = torch.zeros_like(expected)
    for seed in range(4000):
        layer.context.token_keys = token_keys((seed, seed, seed), 1, 1)
        total += layer(x)
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(total / 4000, expected, rtol=0.0, atol=0.06 * scale)


def test_the_layout_is_sorted_a_first_and_without_holes() -> None:
    layout = Layout.of([("z", 2, 3), ("b", 5, 7)], lora_rank=2)
    assert [(p.layer, p.factor, p.shape) for p in layout.pieces] == [
        ("b", "A", (2, 5)),
        ("z", "A", (2, 2)),
        ("b", "B", (7, 2)),
        ("z", "B", (3, 2)),
    ]
    starts = [piece.start for piece in layout.pieces]
    assert starts == [0, *(piece.end for piece in layout.pieces[:-1])]
    assert layout.size == layout.pieces[-1].end == 2 * (5 + 2 + 7 + 3)
    assert layout.columns("A") == slice(0, 14)
    assert layout.columns("B") == slice(14, 34)


def attached(folder: Path, **changes: object) -> tuple[nn.Module, Adapters]:
    model = AutoModelForCausalLM.from_pretrained(folder / "model").requires_grad_(False)
    request: dict = {
        "lora_rank": 4,
        "lora_scaling": 2.5,
        "dropout": 0.0,
        "target_modules": "all-linear",
        "base_name": str(folder / "model"),
    }
    return model, adapters.attach(model, LoraSpec(**{**request, **changes}))


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj"), r".*\.(k|down)_proj"])
def test_an_exported_adapter_in_stock_peft_gives_the_logits_of_the_trainer(
    tiny_folder: Path, tmp_path: Path, targets: tuple | str
) -> None:
    model, own = attached(tiny_folder, target_modules=targets)
    row = torch.randn(own.layout.size, generator=torch.Generator().manual_seed(3)) * 0.2
    own.bind(row[None])
    own.peft_form.write(tmp_path / "adapter", row)
    ids = torch.randint(2, 250, (3, 11), generator=torch.Generator().manual_seed(4))
    ours = model(ids).logits
    base = AutoModelForCausalLM.from_pretrained(tiny_folder / "model")
    plain = base(ids).logits.clone()
    stock = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert not stock.peft_config["default"].use_rslora
    assert float((ours - plain).detach().abs().max()) > 0.1, "the adapter does nothing"
    torch.testing.assert_close(stock(ids).logits, ours, rtol=1e-5, atol=1e-5)
    merged = stock.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, ours, rtol=1e-4, atol=1e-4)


def test_peft_adds_up_clients_as_the_global_adapter_does(tiny_folder: Path, tmp_path: Path) -> None:
    """PEFT's "cat" is an outside oracle for sum_i p_i gamma B_i A: with one A it is (A, mean B)."""
    model, own = attached(tiny_folder)
    a, b = own.layout.columns("A"), own.layout.columns("B")
    rows = torch.randn(2, own.layout.size, generator=torch.Generator().manual_seed(5)) * 0.2
    rows[1, a] = rows[0, a]
    mean = rows[0].clone()
    mean[b] = 0.3 * rows[0, b] + 0.7 * rows[1, b]
    for name, row in (("one", rows[0]), ("two", rows[1])):
        own.peft_form.write(tmp_path / name, row)
    own.bind(mean[None])
    ids = torch.randint(2, 250, (2, 9), generator=torch.Generator().manual_seed(6))
    ours = model(ids).logits
    base = AutoModelForCausalLM.from_pretrained(tiny_folder / "model")
    stock = PeftModel.from_pretrained(base, tmp_path / "one", adapter_name="one")
    stock.load_adapter(tmp_path / "two", adapter_name="two")
    stock.add_weighted_adapter(["one", "two"], [0.3, 0.7], "sum", combination_type="cat")
    stock.set_adapter("sum")
    torch.testing.assert_close(stock(ids).logits, ours, rtol=1e-4, atol=1e-4)


def test_peft_trains_a_single_client_to_the_same_gradients(tiny_folder: Path) -> None:
    model, own = attached(tiny_folder)
    row = torch.randn(own.layout.size, generator=torch.Generator().manual_seed(7)) * 0.2
    grads = torch.zeros(1, own.layout.size)
    own.bind(row[None], grads, ("A", "B"))
    ids = torch.randint(2, 250, (2, 9), generator=torch.Generator().manual_seed(8))
    model(input_ids=ids, labels=ids).loss.backward()
    base = AutoModelForCausalLM.from_pretrained(tiny_folder / "model")
    config = LoraConfig(r=4, lora_alpha=10, target_modules="all-linear", task_type="CAUSAL_LM")
    stock = get_peft_model(base, config)  # alpha / r = 2.5
    named = dict(stock.named_parameters())
    for piece in own.layout.pieces:
        name = f"base_model.model.{piece.layer}.lora_{piece.factor}.default.weight"
        named[name].data.copy_(row[piece.start : piece.end].view(piece.shape))
    stock(input_ids=ids, labels=ids).loss.backward()
    for piece in own.layout.pieces:
        name = f"base_model.model.{piece.layer}.lora_{piece.factor}.default.weight"
        ours = grads[0, piece.start : piece.end].view(piece.shape)
        error = float((ours - named[name].grad).abs().max())
        assert error <= 1e-5 * float(ours.abs().max()), piece


def test_a_is_drawn_as_peft_draws_it(tiny_folder: Path) -> None:
    _, own = attached(tiny_folder)
    row = own.initial_a(torch.Generator().manual_seed(0))
    for piece in own.layout.pieces:
        if piece.factor == "A":
            a = row[piece.start : piece.end]
            bound = piece.shape[1] ** -0.5
            assert float(a.abs().max()) <= bound
            assert float(a.std()) == pytest.approx(bound / 3**0.5, rel=0.25)


# --- clients of different ranks ----------------------------------------------------------------

RANKS, GAMMAS = (1, 4, 2), (2.5, 0.1298, 1.1)


def padded_rows(own: Adapters) -> torch.Tensor:
    """A row of each of three clients, with zeros beyond its rank."""
    rows = torch.randn(3, own.layout.size, generator=torch.Generator().manual_seed(9)) * 0.2
    for factor in "AB":
        own.layout.clear_padding([0, 1, 2], factor, rows[:, own.layout.columns(factor)])
    return rows


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_client_of_a_pass_has_its_own_gamma_and_keeps_its_zeros(
    tiny_folder: Path, dtype: torch.dtype, dropout: float
) -> None:
    """A pass of three is three passes with that gamma, and no zero beyond a rank has a gradient."""
    ids = torch.randint(2, 250, (3, 9), generator=torch.Generator().manual_seed(8))

    def trained(
        scaling: float, gammas: tuple | None, clients: list[int]
    ) -> tuple[list[float], torch.Tensor]:
        model, own = attached(
            tiny_folder, lora_scaling=scaling, client_ranks=RANKS, dropout=dropout
        )
        model.to(dtype)
        own.context.dtype = dtype
        values = padded_rows(own)[clients]
        grads = torch.zeros_like(values)
        own.context.token_keys = token_keys(clients, 1, 9) if dropout else None
        own.bind(values, grads, ("A", "B"), gammas)
        logits = model(ids[clients]).logits.float()
        losses = [logits[i].log_softmax(-1)[0, 0] for i in range(len(clients))]
        torch.stack(losses).sum().backward()
        for factor in "AB":
            part = grads[:, own.layout.columns(factor)]
            for view in own.layout.along_rank(factor, part):
                for place, client in enumerate(clients):
                    assert not view[place, :, RANKS[client] :].any()
        assert grads.any()
        return [float(loss.detach()) for loss in losses], grads

    losses, grads = trained(1.0, GAMMAS, [0, 1, 2])
    bound = 1e-5 if dtype == torch.float32 else 3e-2
    for client, gamma in enumerate(GAMMAS):
        alone, grads_alone = trained(gamma, None, [client])
        assert losses[client] == pytest.approx(alone[0], rel=bound)
        error = float((grads[client] - grads_alone[0]).norm() / grads_alone[0].norm())
        assert error < bound


def test_gamma_of_a_client_is_not_rounded_to_the_dtype_of_the_pass() -> None:
    """bf16 has 8 bits: 0.1298 itself would be off by 0.2 %, in every token alike."""
    rows = PassRows(torch.ones(1, 2), None, torch.bfloat16, gammas=[0.1298])
    layer = StackedLoraLinear(nn.Linear(1, 1, bias=False), 1.0, 0.0, 0, PassContext())
    layer.base_layer.weight.data.zero_()
    layer.bfloat16()
    a, b = Piece("l", "A", (1, 1), 0), Piece("l", "B", (1, 1), 1)
    rows.refresh()
    layer.siblings.bind(Factors.of(rows, [a], [b], ()))
    x = torch.logspace(0, 1, 4001)[:, None].bfloat16()
    y = layer(x).detach().float()
    assert float((y / x.float()).mean()) == pytest.approx(0.1298, rel=2e-4)


def test_an_adapter_of_a_smaller_rank_is_exported_at_it(tiny_folder: Path, tmp_path: Path) -> None:
    model, own = attached(tiny_folder, lora_scaling=1.0, client_ranks=RANKS, client_gammas=GAMMAS)
    rows = padded_rows(own)
    ids = torch.randint(2, 250, (3, 9), generator=torch.Generator().manual_seed(4))
    own.bind(rows, gammas=GAMMAS)
    ours = model(ids).logits
    for client, (rank, gamma) in enumerate(zip(RANKS, GAMMAS, strict=True)):
        assert own.peft_form.rank_and_gamma(client) == (rank, gamma)
        own.peft_form.write(tmp_path / str(client), rows[client], client=client)
        base = AutoModelForCausalLM.from_pretrained(tiny_folder / "model")
        stock = PeftModel.from_pretrained(base, tmp_path / str(client))
        assert stock.peft_config["default"].r == rank
        found = stock(ids[client : client + 1]).logits
        torch.testing.assert_close(found[0], ours[client], rtol=1e-5, atol=1e-5)


def test_a_client_draws_the_a_of_a_run_of_its_rank(tiny_folder: Path) -> None:
    _, wide = attached(tiny_folder)
    _, narrow = attached(tiny_folder, lora_rank=2)
    drawn = wide.initial_a(torch.Generator().manual_seed(3), 2)
    expected = narrow.initial_a(torch.Generator().manual_seed(3))
    pairs = zip(
        wide.layout.along_rank("A", drawn[None]),
        narrow.layout.along_rank("A", expected[None]),
        strict=True,
    )
    for one, other in pairs:
        assert torch.equal(one[..., :2], other) and not one[..., 2:].any()
