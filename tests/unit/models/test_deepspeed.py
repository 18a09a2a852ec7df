"""Property 5: a backbone stored once over all processes trains the same adapters."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from sfed.distributed import world as distributed
from sfed.lora import adapters
from sfed.lora.adapters import LoraSpec
from sfed.lora.targets import num_weights, transformer_layers
from sfed.models import backbone, synthetic
from sfed.models.backbone import Backbone
from sfed.models.deepspeed import (
    deepspeed_settings,
    most_gathered,
    own_share,
    prepare_deepspeed,
)
from sfed.models.hf_config import MetaModel, Sharding
from sfed.utils.errors import UserError
from tests.support import glue, runs, tiny
from tests.support.backbones import digest, stored_bytes
from tests.support.deadlines import RUN_SECONDS
from tests.support.processes import on_processes
from tests.support.selection import full

pytestmark = pytest.mark.dist

# The persistence threshold of 0 lets nothing stay gathered, however small.
EXACT = {"deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
SGD = {"optimizer": "sgd", "lr": 0.1, "local_steps": 3, "batch_size": 4}


def train(folder: Path, out: Path, num: int, sharding: str, **sections: object) -> dict:
    sections.setdefault("train", SGD)
    own = {"sharding": sharding, **sections.pop("backbone", {})}
    output = {"dir": str(out), "name": f"{sharding}-{num}"}
    settings = tiny.settings(folder, output=output, backbone=own, **sections)
    return runs.adapters(runs.run(num, settings))


@pytest.mark.full  # with other settings in each of test_zero3_agrees_under
@pytest.mark.parametrize("num_processes", [2, 4])
def test_zero3_trains_the_adapters_of_a_replica(
    tiny_folder: Path, tmp_path: Path, num_processes: int
) -> None:
    plain = train(tiny_folder, tmp_path, 1, "none")
    sharded = train(tiny_folder, tmp_path, num_processes, "zero3", backbone=EXACT)
    assert runs.relative_difference(plain, sharded) <= 5e-6


@pytest.fixture(scope="module")
def on_shards(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The adapters of two processes on shards, in fp32."""
    return train(tiny_folder, tmp_path_factory.mktemp("shards"), 2, "zero3", backbone=EXACT)


def secondary(size: int) -> dict:
    zero = EXACT["deepspeed"]["zero_optimization"] | {"zero_hpz_partition_size": size}
    return {"deepspeed": {"zero_optimization": zero}}


def test_a_secondary_partition_trains_the_same_bits(
    tiny_folder: Path, tmp_path: Path, on_shards: dict
) -> None:
    second = train(tiny_folder, tmp_path, 2, "zero3", backbone=secondary(2))
    assert runs.identical(on_shards, second)


def refused(settings: dict) -> str:
    with pytest.raises(UserError) as mistake:
        runs.train_settings(settings)
    return str(mistake.value)


def test_a_secondary_partition_that_does_not_divide_the_processes_is_refused(
    tiny_folder: Path, tmp_path: Path
) -> None:
    own = {"sharding": "zero3", **secondary(2)}
    output = {"dir": str(tmp_path), "name": "run"}
    settings = tiny.settings(tiny_folder, output=output, backbone=own)
    for message in on_processes(3, refused, settings):
        assert "zero_hpz_partition_size = 2 does not divide the 3 processes" in message


UNEQUAL = {
    "train": {**SGD, "local_steps": None, "local_epochs": 1},
    "partition": {"kind": "dirichlet", "key": "kind", "concentration": 0.5},
}
ALONE: dict[str, dict] = {
    "gradient checkpointing": {"backbone": {"gradient_checkpointing": True}},
    "accumulation": {"train": {**SGD, "micro_batch_size": 2}},
    "dropout": {"lora": {"rank": 4, "dropout": 0.2}},
    "two targets": {"lora": {"rank": 4, "target_modules": ["q_proj", "v_proj"]}},
    "cpu offload": {"backbone": {"offload": "cpu"}},
    "partial participation": {
        "federated": {"num_clients": 4, "num_rounds": 3, "clients_per_round": 1}
    },
}
TOGETHER: dict[str, dict] = {
    "checkpointing, accumulation, dropout and two targets": {
        "backbone": {"gradient_checkpointing": True},
        "train": {**SGD, "micro_batch_size": 2},
        "lora": {"rank": 4, "dropout": 0.2, "target_modules": ["q_proj", "v_proj"]},
    },
    "cpu offload and partial participation": {
        **ALONE["cpu offload"],
        **ALONE["partial participation"],
    },
    "unequal clients, so that one process keeps the other company": UNEQUAL,
}


@pytest.mark.parametrize(
    "sections",
    [*TOGETHER.values(), *(full(sections) for sections in ALONE.values())],
    ids=[*TOGETHER, *ALONE],
)
def test_zero3_agrees_under(tiny_folder: Path, tmp_path: Path, sections: dict) -> None:
    sections = dict(sections)
    of_backbone = sections.pop("backbone", {})
    none = {key: value for key, value in of_backbone.items() if key != "offload"}
    plain = train(tiny_folder, tmp_path, 1, "none", backbone=none, **sections)
    own = {**EXACT, **of_backbone}
    sharded = train(tiny_folder, tmp_path, 2, "zero3", backbone=own, **sections)
    assert runs.relative_difference(plain, sharded) <= 5e-6


def test_zero3_equals_replicas_bit_for_bit(
    tiny_folder: Path, tmp_path: Path, on_shards: dict
) -> None:
    """The same processes and passes: gathering changes no bit."""
    assert runs.identical(train(tiny_folder, tmp_path, 2, "none"), on_shards)


def test_so_it_does_in_bf16_with_factors_in_fp32(tiny_folder: Path, tmp_path: Path) -> None:
    model = {"name": str(tiny_folder / "model"), "dtype": "bf16"}
    plain = train(tiny_folder, tmp_path, 2, "none", model=model)
    sharded = train(tiny_folder, tmp_path, 2, "zero3", backbone=EXACT, model=model)
    assert runs.identical(plain, sharded)
    assert {t.dtype for t in plain["client-0000"].values()} == {torch.float32}


@pytest.mark.parametrize("family", ["roberta", full("bert"), full("llama")])
def test_so_it_does_for_classifiers(glue_folder: Path, tmp_path: Path, family: str) -> None:
    found = []
    for stored in ({"sharding": "none"}, {"sharding": "zero3", **EXACT}):
        own = glue.settings(glue_folder, family, "sst2", tmp_path / stored["sharding"])
        found.append(runs.adapters(runs.run(2, {**own, "backbone": stored})))
    assert runs.identical(*found)


SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 32}
INNER = {**SIZES, "intermediate_size": 24}
LISTS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "llama": ("LlamaForCausalLM", INNER, "model.layers"),
    "gpt 2": ("GPT2LMHeadModel", {"n_embd": 16, "n_layer": 3, "n_head": 2}, "transformer.h"),
    "roberta": ("RobertaForSequenceClassification", INNER, "roberta.encoder.layer"),
    "as many experts as layers": (
        "MixtralForCausalLM",
        {**INNER, "num_key_value_heads": 1, "num_local_experts": 3},
        "model.layers",
    ),
    "one layer that is used three times": ("AlbertForMaskedLM", INNER, None),
}


@pytest.mark.parametrize("name", LISTS)
def test_the_layers_of_a_transformer_are_found(name: str) -> None:
    kind, settings, place = LISTS[name]
    of_kind = getattr(transformers, kind)
    with torch.device("meta"):
        model = of_kind(of_kind.config_class(**settings))
    expected = [] if place is None else list(model.get_submodule(place))
    assert transformer_layers(model) == expected


class Gathers:
    """Counts gathers of frozen weights, and the weights that are gathered."""

    def __init__(self, own: Backbone) -> None:
        self._own = own
        self.count = self.weights = self.peak = 0
        gather = torch.distributed.ProcessGroup.all_gather_single

        def counted(group: Any, whole: torch.Tensor, *others: Any, **options: Any) -> Any:
            self.count += 1
            self.weights += whole.numel()
            self.peak = max(self.peak, self.now())
            return gather(group, whole, *others, **options)

        torch.distributed.ProcessGroup.all_gather_single = counted  # of this process alone

    def now(self) -> int:
        """Weights that are gathered, or about to be."""
        held = (p for p in self._own.model.parameters() if p.ds_status.name != "NOT_AVAILABLE")
        return sum(p.ds_numel for p in held)

    def of(self, make: Callable[[], object]) -> tuple[int, int]:
        """Gathers and weights of one pass."""
        count, weights = self.count, self.weights
        make()
        return self.count - count, self.weights - weights


@dataclass(frozen=True)
class Gathered:
    """What a model gathers once DeepSpeed knows the order of its layers."""

    step: tuple[int, int]
    """Gathers and weights of a forward and backward pass."""
    evaluation: tuple[int, int]
    left: int
    """Weights that are still gathered after a step."""
    released: int
    """The same, after the phase has ended."""
    peak: int
    bound: int
    """What ``sfed.plan`` counts of them."""
    layer: int
    """Weights of a layer."""


def gathered(model: Path, sections: dict) -> Gathered:
    config = tiny.config(
        model.parent, model={"name": str(model)}, backbone={"sharding": "zero3", **sections}
    )
    meta = MetaModel.read(config, config.model.name)
    bound = most_gathered(deepspeed_settings(config, meta, torch.float32))
    world = distributed.start(RUN_SECONDS)
    try:
        own = backbone.load(config, config.model.name, world)
        attached = adapters.attach(own.model, LoraSpec(4, 1.0, 0.0, "all-linear", "base"))
        values = torch.zeros(1, attached.layout.size)
        attached.bind(values, torch.zeros_like(values), ("A", "B"))
        seen, ids = Gathers(own), torch.randint(2, 200, (2, 9))

        def forward() -> torch.Tensor:
            return own.token_losses(ids, ids, torch.arange(ids.numel() - 1)).sum()

        own.training()
        step, *_ = reversed([seen.of(lambda: forward().backward()) for _ in range(5)])
        left = seen.now()
        own.evaluating()
        released = seen.now()
        with torch.no_grad():
            evaluation, *_ = reversed([seen.of(forward) for _ in range(4)])
        layer = max(map(num_weights, transformer_layers(own.model)))
        return Gathered(step, evaluation, left, released, seen.peak, bound, layer)
    finally:
        distributed.stop(world)


def gathered_by(num_layers: int, folder: Path, sections: dict) -> Gathered:
    """The same of a model of so many layers, on two processes."""
    model = tiny.save_model(folder / f"layers-{num_layers}", layers=num_layers)
    first, second = on_processes(2, gathered, model, sections)
    assert first == second
    return first


NO_PREFETCH = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}
CHECKPOINTED = {"gradient_checkpointing": True}


@pytest.mark.parametrize("sections", [{}, full(CHECKPOINTED)], ids=["kept", "checkpointed"])
def test_a_layer_is_gathered_once_forward_and_once_backward(tmp_path: Path, sections: dict) -> None:
    without = {"deepspeed": {"zero_optimization": NO_PREFETCH}, **sections}
    few, many = (gathered_by(layers, tmp_path, without) for layers in (2, 6))
    assert many.step[0] - few.step[0] == 4 * 2
    assert many.evaluation[0] - few.evaluation[0] == 4
    assert many.step[1] - few.step[1] == 4 * 2 * many.layer
    # The first layer's input has no gradient, so it may stay until the next pass or phase.
    assert many.left <= many.layer
    assert many.released == 0


@pytest.mark.parametrize("sections", [{}, full(CHECKPOINTED)], ids=["kept", "checkpointed"])
def test_a_prefetch_gathers_no_weight_twice_and_at_most_three_layers_at_a_time(
    tmp_path: Path, sections: dict
) -> None:
    found = gathered_by(6, tmp_path, {**EXACT, **sections})
    embedding, norm = 258 * 32, 32  # the embedding is the head too, and no larger than a layer
    assert found.step[0] <= 2 * 6 + 5
    assert found.step[1] <= 2 * (6 * found.layer + norm) + 3 * embedding
    assert found.peak <= found.bound == 3 * found.layer
    assert found.left <= found.layer
    assert found.released == 0


def saved_bytes(folder: Path, sharding: str) -> int:
    """Bytes that a training pass keeps for its backward pass, beside frozen weights."""
    config = tiny.config(folder, backbone={"sharding": sharding, **EXACT})
    world = distributed.start(RUN_SECONDS)
    try:
        own = backbone.load(config, config.model.name, world)
        attached = adapters.attach(own.model, LoraSpec(4, 1.0, 0.0, "all-linear", "base"))
        values = torch.zeros(1, attached.layout.size)
        attached.bind(values, torch.zeros_like(values), ("A", "B"))
        frozen = {weight.untyped_storage().data_ptr() for weight in own.model.parameters()}
        kept: dict[int, torch.UntypedStorage] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            # A parameter holds what is gathered; a view of one would keep it from being released.
            if not isinstance(tensor, torch.nn.Parameter) and storage.data_ptr() not in frozen:
                kept[storage.data_ptr()] = storage
            return tensor

        ids = torch.randint(2, 200, (2, 9))
        own.training()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            own.token_losses(ids, ids, torch.arange(ids.numel() - 1)).sum()
        return sum(storage.nbytes() for storage in kept.values())
    finally:
        distributed.stop(world)


def test_a_pass_on_shards_keeps_what_one_on_a_replica_keeps(tiny_folder: Path) -> None:
    (replica,) = on_processes(1, saved_bytes, tiny_folder, "none")
    assert on_processes(2, saved_bytes, tiny_folder, "zero3") == [replica, replica]


def stored(folder: Path, sharding: str) -> tuple[int, str, str]:
    """Bytes of frozen weights on this process and their digest before and after passes."""
    config = tiny.config(folder, backbone={"sharding": sharding, **EXACT})
    world = distributed.start(RUN_SECONDS)
    try:
        own = backbone.load(config, config.model.name, world)
        before = digest(own)
        size = stored_bytes(own)
        ids = torch.randint(2, 200, (2, 9))
        own.training()
        own.token_losses(ids, ids, torch.arange(ids.numel() - 1))
        own.evaluating()
        own.token_losses(ids, ids, torch.arange(ids.numel() - 1))
        own.release()
        return size, before, digest(own)
    finally:
        distributed.stop(world)


@pytest.mark.parametrize("num_processes", [2, full(4)])
def test_each_process_stores_its_share_and_the_weights_never_change(
    tiny_folder: Path, num_processes: int
) -> None:
    (whole, before, after), *_ = on_processes(1, stored, tiny_folder, "none")
    assert before == after
    for size, before, after in on_processes(num_processes, stored, tiny_folder, "zero3"):
        assert size == pytest.approx(whole / num_processes, rel=0.01)
        assert before == after


def anonymous_bytes() -> int:
    """Memory of this process that is no file's."""
    (line,) = (x for x in Path("/proc/self/status").read_text().split("\n") if "RssAnon" in x)
    return 1024 * int(line.split()[1])


def loading(folder: Path) -> tuple[int, int]:
    """The most anonymous memory while a model is loaded, and what it holds at the end."""
    ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: what is freed goes back at once
    config = tiny.config(folder, backbone={"sharding": "zero3", **EXACT})
    world = distributed.start(RUN_SECONDS)
    try:
        prepare_deepspeed(config, MetaModel.read(config, config.model.name), torch.float32)
        before, seen = anonymous_bytes(), [0]

        def counting(collective: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*arguments: Any, **options: Any) -> Any:
                seen.append(anonymous_bytes() - before)
                return collective(*arguments, **options)

            return counted

        for name in ("broadcast", "all_gather_single"):
            counted = counting(getattr(torch.distributed.ProcessGroup, name))
            setattr(torch.distributed.ProcessGroup, name, counted)
        own = backbone.load(config, config.model.name, world)
        return max(seen), stored_bytes(own)
    finally:
        distributed.stop(world)


@pytest.mark.parametrize("num_processes", [2, full(4)])
def test_no_process_holds_more_than_its_share_and_two_tensors_while_it_loads(
    tmp_path: Path, num_processes: int
) -> None:
    tiny.save_model(tmp_path / "model", hidden=512, layers=6)
    whole, tensor = (tmp_path / "model" / "model.safetensors").stat().st_size, 512 * 1032 * 4
    slack = whole // 4  # Python's own objects
    for most, share in on_processes(num_processes, loading, tmp_path):
        assert share == pytest.approx(whole / num_processes, rel=0.01)
        assert most <= share + 2 * tensor + slack


def test_a_replica_goes_to_its_gpu_tensor_by_tensor_and_stays_in_the_file_on_a_cpu() -> None:
    replica, shards = Sharding("none", ""), Sharding("zero3", "")
    gpu, cpu = torch.device("cuda", 1), torch.device("cpu")
    assert backbone.device_map(gpu, replica) == {"": gpu}
    assert backbone.device_map(cpu, replica) is None
    assert backbone.device_map(gpu, shards) is None


@pytest.mark.parametrize(("shape", "is_large"), [("stories", False), ("llama2-7b", True)])
def test_large_weights_are_gathered_one_by_one_and_small_ones_together(
    tiny_folder: Path, shape: str, is_large: bool
) -> None:
    meta = MetaModel(tiny.config(tiny_folder), synthetic.model_config(shape, None, 2))
    settings = deepspeed_settings(tiny.config(tiny_folder), meta, torch.float32)
    assert settings["zero_optimization"]["stage3_allgather_sequential"] is is_large


def test_what_fills_up_the_last_share_is_not_of_the_weight():
    weight = torch.nn.Parameter(torch.empty(0))
    assert own_share(weight, 0) is None
    weight.ds_numel, weight.ds_tensor = 6, torch.arange(4.0)
    weight.ds_tensor.ds_numel = 4
    shares = [own_share(weight, rank).tolist() for rank in range(3)]
    assert shares == [[0, 1, 2, 3], [0, 1], []]
