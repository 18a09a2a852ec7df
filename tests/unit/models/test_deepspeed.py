"""Property 5: a backbone stored once over all processes trains the same adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sfed.distributed import world as distributed
from sfed.models import backbone
from sfed.utils.errors import UserError
from tests.support import runs, tiny
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


@pytest.mark.parametrize("num_processes", [2, full(4)])
def test_zero3_trains_the_adapters_of_a_replica(
    tiny_folder: Path, tmp_path: Path, num_processes: int
) -> None:
    plain = train(tiny_folder, tmp_path, 1, "none")
    sharded = train(tiny_folder, tmp_path, num_processes, "zero3", backbone=EXACT)
    assert runs.relative_difference(plain, sharded) <= 5e-6


def secondary(size: int) -> dict:
    zero = EXACT["deepspeed"]["zero_optimization"] | {"zero_hpz_partition_size": size}
    return {"deepspeed": {"zero_optimization": zero}}


def test_a_secondary_partition_trains_the_same_bits(tiny_folder: Path, tmp_path: Path) -> None:
    plain = train(tiny_folder, tmp_path / "plain", 2, "zero3", backbone=EXACT)
    second = train(tiny_folder, tmp_path / "second", 2, "zero3", backbone=secondary(2))
    assert runs.identical(plain, second)


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


def test_zero3_equals_replicas_bit_for_bit_in_bf16(tiny_folder: Path, tmp_path: Path) -> None:
    """The same processes and passes, bf16 backbone, fp32 factors: gathering changes no bit."""
    model = {"name": str(tiny_folder / "model"), "dtype": "bf16"}
    plain = train(tiny_folder, tmp_path, 2, "none", model=model)
    sharded = train(tiny_folder, tmp_path, 2, "zero3", backbone=EXACT, model=model)
    assert runs.identical(plain, sharded)
    assert {t.dtype for t in plain["client-0000"].values()} == {torch.float32}


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
