"""The bench: its contestants do the same work, its counts are right; nothing timed is asserted."""

from __future__ import annotations

import json
import math
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from sfed.bench import __main__ as bench
from sfed.bench import compare, measure, round_parts, sharded, variants, workload
from sfed.bench.measure import Operations, SavedBytes, Spread, interleaved
from sfed.bench.steps import Sfed
from sfed.bench.variants import VARIANTS
from sfed.bench.workload import Workload
from sfed.distributed import world as distributed
from sfed.lora.layout import Layout
from sfed.models import shapes, synthetic
from sfed.utils.command import run_command
from sfed.utils.errors import UserError
from tests.support.deadlines import RUN_SECONDS
from tests.support.processes import on_processes

CPU = torch.device("cpu")
HOOKS, VARIED = "hooks of ZeRO-3, gathers too", "step, widths vary as packed"
LOAD = Workload(3, 2, 12, 4, "all-linear", torch.float32, seed=5)


def line_up(keys: str = "acd", load: Workload = LOAD) -> Any:
    config = synthetic.model_config("tiny", None, None)
    model = synthetic.build(config, load.dtype, load.seed, CPU)
    for weight in model.parameters():  # large enough that adapters have something to change
        weight.mul_(8.0 if weight.dim() > 1 else 1.0)
    return variants.line_up(model, load, workload.random_tokens(config, load), keys)


def losses_of_steps(contestant: Any, steps: int) -> torch.Tensor:
    """(turns, clients of a turn, steps) as (clients, steps)."""
    found = []
    for turn in range(contestant.num_turns):
        contestant.enter(turn)
        found.append(torch.stack([contestant.step() for _ in range(steps)], dim=1))
        contestant.leave()
    return torch.cat(found)


@cache
def layout() -> Layout:
    return line_up("d")["d"].clients.layout


def adapter(contestant: Any, client: int) -> torch.Tensor:
    """A copy of a client's factors, in the order of the trainer's layout."""
    if isinstance(contestant, Sfed):
        return contestant.clients.row(client).cpu()
    held = dict(contestant.model.named_parameters())
    names = (
        f"base_model.model.{piece.layer}.lora_{piece.factor}.client-{client}.weight"
        for piece in layout().pieces
    )
    return torch.cat([held[name].detach().flatten() for name in names])


def test_peft_and_the_trainer_give_every_client_the_same_losses_and_adapters() -> None:
    """What makes the comparison fair: the same work on the same numbers."""
    contestants = line_up()
    clients = range(LOAD.num_clients)
    start = torch.stack([adapter(contestants["d"], client) for client in clients])
    for key in "ac":
        for client in clients:
            assert torch.equal(adapter(contestants[key], client), start[client])
    losses = {key: losses_of_steps(one, 2) for key, one in contestants.items()}
    assert bool((losses["d"][:, 0] != losses["d"][:, 1]).all()), "the first step changed nothing"
    for key in "ac":
        torch.testing.assert_close(losses[key], losses["d"], rtol=1e-5, atol=1e-5)
        for client in clients:
            ours = adapter(contestants["d"], client)
            assert float((ours - start[client]).abs().max()) > 1e-4
            # Adam makes a step of any gradient, however small: 1e-3 is one step.
            torch.testing.assert_close(
                adapter(contestants[key], client), ours, rtol=1e-4, atol=2e-5
            )


def test_clients_differ_so_that_a_mix_up_would_show() -> None:
    contestants = line_up("ad")
    for one in contestants.values():
        losses = losses_of_steps(one, 1)[:, 0]
        assert len({round(float(loss), 4) for loss in losses}) == LOAD.num_clients
        rows = [adapter(one, client) for client in range(LOAD.num_clients)]
        assert not torch.equal(rows[0], rows[1])


def test_contestants_share_the_frozen_weights_and_leave_them_alone() -> None:
    contestants = line_up("abcde")
    weights = [
        {t.data_ptr() for t in one.frozen() if not t.requires_grad and t.dim() == 2}
        for one in contestants.values()
    ]
    assert set.intersection(*weights)
    before = [t.clone() for t in contestants["e"].frozen()]
    for one in contestants.values():
        losses_of_steps(one, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, contestants["e"].frozen(), strict=True))


def test_the_floor_computes_the_gradients_of_all_inputs() -> None:
    floor = line_up("e")["e"]
    with Operations() as seen:
        losses = floor.losses()
        forward = seen.count
        torch.autograd.backward(losses.sum())
    assert losses.shape == (LOAD.num_clients,)
    assert seen.count > 1.5 * forward


def test_adapters_of_a_bf16_backbone_are_fp32_in_a_and_bf16_in_b() -> None:
    load = Workload(1, 1, 8, 4, "all-linear", torch.bfloat16)
    contestants = line_up("abd", load)
    for key, dtype in (("a", torch.float32), ("b", torch.bfloat16)):
        factors = {t.dtype for t in contestants[key].state()}
        assert factors == {dtype}
    losses_of_steps(contestants["a"], 1)


def test_saved_bytes_of_a_known_graph() -> None:
    x = torch.ones(10, 4, requires_grad=True)
    weight = nn.Parameter(torch.ones(4, 6), requires_grad=False)
    trained = torch.ones(6, 5, requires_grad=True)
    with SavedBytes([weight]) as saved:
        hidden = x @ weight  # keeps the weight, which does not count
        assert saved.total == 0
        out = hidden @ trained  # keeps both
        assert saved.total == 4 * (10 * 6 + 6 * 5)
        squared = hidden[:, :1] * hidden[:, :1]  # looks at what is kept already
        assert saved.total == 4 * (10 * 6 + 6 * 5)
        out.exp()  # keeps its result
        assert saved.total == 4 * (10 * 6 + 6 * 5 + 10 * 5)
    (squared.sum() + out.sum()).exp()  # outside: not counted
    assert saved.total == 4 * (10 * 6 + 6 * 5 + 10 * 5)


def test_operations_of_a_known_graph() -> None:
    x, weight = torch.ones(2, 3, 4, requires_grad=True), torch.ones(5, 4)
    with Operations() as seen:
        y = nn.functional.linear(x, weight)  # view, t, mm, view: one product
        assert seen.count == 1
        y.transpose(0, 1).relu()
        assert seen.count == 2
        torch.autograd.backward(y, torch.ones(2, 3, 5))  # ones, and one product
        assert seen.count == 4


@pytest.mark.slow
@pytest.mark.full  # a minute; the figures of benchmarks.md
def test_counts_of_peft_on_llama2_7b_are_those_of_the_notes() -> None:
    config = synthetic.model_config("llama2-7b", None, None)
    load = Workload(1, 1, 8, 16, "all-linear", torch.bfloat16)
    counts = variants.count([v for v in VARIANTS if v.key in "ab"], config, load, CPU)
    assert (counts["a"].saved_bytes, counts["a"].operations) == (274_504, 203)
    assert (counts["b"].saved_bytes, counts["b"].operations) == (170_344, 168)
    assert counts["a"].saved_bytes_fixed == counts["b"].saved_bytes_fixed == 0


def test_counts_do_not_depend_on_clients_or_tokens() -> None:
    config = synthetic.model_config("tiny", None, None)
    found = []
    for clients, rows, tokens in ((1, 1, 4), (2, 3, 9)):
        load = Workload(clients, rows, tokens, 4, ("q_proj", "v_proj"), torch.bfloat16)
        found.append(variants.count(VARIANTS, config, load, CPU))
    assert found[0] == found[1]
    assert all(one.operations > 0 and one.saved_bytes > 0 for one in found[0].values())


def test_tasks_take_turns_and_the_first_turn_is_not_counted() -> None:
    order: list[str] = []

    def task(name: str) -> Any:
        def work() -> float:
            order.append(name)
            return float(len(order))

        return work

    samples = interleaved({name: task(name) for name in "abc"}, 2, None)
    assert "".join(order) == "abcabcabc"
    assert samples == {"a": [4.0, 7.0], "b": [5.0, 8.0], "c": [6.0, 9.0]}


def test_a_budget_ends_the_turns_but_leaves_one() -> None:
    samples = interleaved({"a": lambda: 1.0, "b": lambda: 2.0}, 1000, 1e-9)
    assert samples == {"a": [1.0], "b": [2.0]}


def test_spread_and_ratios_turn_by_turn() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, 3)
    assert measure.ratios([2.0, 6.0, 4.0], [1.0, 2.0, 1.0]) == Spread(3.0, 2.0, 4.0, 3)


def test_weights_of_matrix_products_of_llama2_7b() -> None:
    config = synthetic.model_config("llama2-7b", None, None)
    load = Workload(1, 1, 2, 8, "all-linear", torch.bfloat16)
    model = synthetic.build(config, load.dtype, load.seed, torch.device("meta"), blank=True)
    assert synthetic.matmul_weights(model) == 6_607_077_376
    assert sum(weight.numel() for weight in model.parameters()) == 6_738_415_616


def test_models_are_ready_to_compute() -> None:
    for name in ("tiny", "stories"):
        config = synthetic.model_config(name, None, 1)
        model = synthetic.build(config, LOAD.dtype, LOAD.seed, CPU)
        assert len(model.model.layers) == 1
        loss = model(torch.randint(200, (2, 9)), labels=torch.randint(200, (2, 9))).loss
        assert float(loss) == pytest.approx(math.log(config.vocab_size), rel=0.1)
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_names_of_models_are_those_that_exist() -> None:
    assert tuple(shapes.SHAPES) == bench.MODELS


TINY = ("--model", "tiny", "--clients", "2", "--tokens", "8", "--rank", "2", "--repeat", "2")


def test_json_and_table_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    bench.main([*TINY, "--targets", "q_proj,v_proj", "--json", str(out)])
    results = json.loads(out.read_text())
    assert results["machine"]["device"]
    assert results["machine"]["cores"] >= 1
    assert results["machine"]["memory_bytes"] > 0
    assert {"torch", "transformers", "peft"} <= set(results["machine"]["versions"])
    asked = results["configuration"]
    assert (asked["num_clients"], asked["tokens"], asked["dtype"]) == (2, 8, "fp32")
    assert asked["target_modules"] == ["q_proj", "v_proj"]
    assert list(results["variants"]) == list("abcde")
    for key, one in results["variants"].items():
        assert len(one["samples_seconds"]) == one["seconds_per_step"]["count"] == 2
        spread = one["seconds_per_step"]
        assert 0 < spread["min"] <= spread["median"] <= spread["max"]
        assert one["tokens_per_second"] == pytest.approx(16 / spread["median"])
        assert one["passes_per_step"] == (1 if key in "de" else 2)
        assert one["mfu_of_measured_matmul"] > 0
        assert one["saved_bytes_of_pass"] > 0
        assert one["saved_bytes_per_token_and_layer"] > 0
        assert one["operations_per_layer"] > 0
        if not torch.cuda.is_available():
            assert one["peak_bytes"] is None
            assert one["mfu_of_datasheet"] is None
    assert set(results["ratios"]) == {"a/c", "a/d", "b/c", "b/d", "c/d", "d/e"}
    parts = {part["name"]: part for part in results["parts"]}
    assert {"aggregation of A", "optimizer, sfed", "batch assembly", VARIED} <= set(parts)
    # One process has nothing to gather, and DeepSpeed then waits for the device at each layer.
    assert HOOKS not in parts
    assert all(part["seconds"]["count"] == 2 for part in parts.values())
    assert results["configuration"]["a_bytes"] == 4 * 2 * 2 * 2 * 32  # r, layers, q and v, in
    assert any("ZeRO-3" in note for note in results["notes"])
    shown = capsys.readouterr().out
    for words in ("HF + PEFT", "sfed, one pass", "tokens/s", "d as a", "aggregation of A"):
        assert words in shown


def test_a_comparison_shows_cost_against_clients(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.json"
    bench.main([*TINY, "--compare", "clients=1,3", "--json", str(out)])
    compared = json.loads(out.read_text())["compare"]
    assert [point["value"] for point in compared["points"]] == [1, 3]
    assert compared["points"][1]["variants"]["a"]["passes_per_step"] == 3
    assert set(compared["slopes"]) == set("acd")
    assert "slope" in capsys.readouterr().out


def test_a_folder_with_a_config_gives_the_shape(tiny_folder: Path) -> None:
    config = synthetic.model_config("tiny", tiny_folder / "model", 3)
    assert (config.hidden_size, config.num_hidden_layers) == (32, 3)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--clients", "0"], "--clients"),
        (["--tokens", "1"], "--tokens"),
        (["--tokens", "9999", "--model", "tiny"], "at most 128"),
        (["--model", "gpt"], "llama2-7b"),
        (["--dtype", "int8"], "bf16"),
        (["--seconds", "-1"], "--seconds"),
        (["--layers", "two"], "--layers"),
        (["--compare", "tokens"], "clients or rank"),
        (["--compare", "rank=0"], "whole number"),
        (["--collectives"], "torchrun"),
        (["--json", "/nowhere/at/all.json"], "does not exist"),
        (["--model-config", "/nowhere/at/all"], "config.json"),
        (["--model", "tiny", "--model-config", "."], "not allowed with"),
        (["--targets", "no_such_layer", "--model", "tiny", "--tokens", "8"], "no_such_layer"),
        (["--wide"], "--wide"),
    ],
)
def test_mistakes_are_answered_with_exit_code_2(
    words: list[str],
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["sfed.bench", *words])
    with pytest.raises(SystemExit) as left:
        run_command(bench.main)
    assert left.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("sfed: ")
    assert named in message
    assert "Traceback" not in message


def test_too_little_memory_is_a_mistake_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(compare, "build", full)
    with pytest.raises(UserError, match="lower --clients"):
        bench.main([*TINY])


def bench_of_links(folder: str) -> None:
    bench.main(["--collectives", "--model", "stories", "--repeat", "2", "--json", folder])


@pytest.mark.dist
def test_collectives_are_measured_among_two_processes(tmp_path: Path) -> None:
    out = tmp_path / "links.json"
    on_processes(2, bench_of_links, str(out))
    found = json.loads(out.read_text())["collectives"]
    of_a = [one for one in found if one["is_a_of_a_round"]]
    # 177,920 bytes: the message of the README's run on the same shape, r = 16, all linear layers.
    assert [(one["kind"], one["bytes"]) for one in of_a] == [
        ("all_gather", 177_920),
        ("all_reduce", 177_920),
    ]
    assert len(found) == 2 * 5
    for one in found:
        assert one["seconds"]["median"] > 0
        assert one["bus_bytes_per_second"] > 0


def gathered() -> tuple[list[float], int]:
    world = distributed.start(RUN_SECONDS)
    whole = distributed.all_gather_flat(world, torch.full((2,), float(world.rank)))
    number = len(round_parts.measure_collectives(world, 64, 1))
    distributed.stop(world)
    return whole.tolist(), number


@pytest.mark.dist
def test_flat_shares_are_gathered_in_the_order_of_processes() -> None:
    assert on_processes(2, gathered) == [([0.0, 0.0, 1.0, 1.0], 10)] * 2


def whole_bench(folder: str) -> None:
    bench.main([*TINY, "--json", folder])


def hooked_and_plain() -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Losses after two steps with ZeRO-3's hooks and without; whether torch is as it was."""
    world, linear = distributed.start(RUN_SECONDS), functional.linear
    try:
        config = synthetic.model_config("tiny", None, None)
        twins = sharded.HookedTwin(synthetic.build(config, LOAD.dtype, LOAD.seed, CPU), LOAD, world)
        twins.seconds(), twins.seconds()
        is_restored = functional.linear is linear
        return twins.shards.contestant.evaluate(), twins.plain.evaluate(), is_restored
    finally:
        distributed.stop(world)


@pytest.mark.dist
@pytest.mark.parametrize("num_processes", [1, 2])
def test_steps_with_hooks_are_the_same_steps_and_leave_torch_alone(num_processes: int) -> None:
    for hooked, plain, is_restored in on_processes(num_processes, hooked_and_plain):
        torch.testing.assert_close(hooked, plain, rtol=1e-5, atol=1e-6)
        assert is_restored


@pytest.mark.dist
def test_two_processes_measure_side_by_side(tmp_path: Path) -> None:
    out = tmp_path / "two.json"
    on_processes(2, whole_bench, str(out))
    results = json.loads(out.read_text())
    assert results["machine"]["processes"] == 2
    assert any("process 0" in note for note in results["notes"])
    assert HOOKS in {part["name"] for part in results["parts"]}


def test_the_roof_is_measured_on_random_numbers() -> None:
    """Constant matrices let a GPU clock higher than it does on real ones."""
    roof = measure.Matmul(CPU, torch.float32)
    assert roof.flops == 2.0 * 1024**3
    roof.run()
    assert roof._one.unique().numel() > 1000 and not torch.equal(roof._one, roof._other)
    assert torch.equal(roof._out, roof._one @ roof._other)
