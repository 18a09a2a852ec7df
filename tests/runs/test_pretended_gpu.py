"""Whole runs as on GPUs (tests/support/pretended_gpu): nothing CUDA refuses, no race, few waits."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.support import glue, launchers, runs, tiny
from tests.support.pretended_gpu import PretendedGpu
from tests.support.pretended_runs import ENVIRONMENT, Seen, Settings, watched
from tests.support.processes import ends_of

# Upper bounds. They may only be lowered: a higher one is slower training.
MOST_WAITS_OF_A_STEP = {"padded": 0, "packed": 0, "fp8 products": 0}
"""Waits of the host for the device in an optimizer step of one pass, whatever the clients."""
MOST_LAUNCHES_OF_A_LAYER = {"forward": 31, "backward": 50}
"""Kernels of a LLaMA layer with adapters on all its linear layers, in bf16, for all clients."""
MOST_LAUNCHES_BESIDE_LAYERS = 124
"""Kernels of the rest of an optimizer step: embedding, head, loss, AdamW with clipping."""

NOTHING_STAYS_GATHERED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
ZERO3 = {"sharding": "zero3", "deepspeed": NOTHING_STAYS_GATHERED}
QUICK: dict[str, dict[str, Any]] = {
    "federated": {"num_clients": 4, "num_rounds": 2},
    "train": {"local_steps": 2, "batch_size": 4, "lr": 1e-2},
    "evaluation": {"max_examples": 2},
}
NEVER = {"evaluation": {"every_rounds": 9}}
IN_TURNS = {"clients_per_pass": 1, "clients_per_round": 3, "num_rounds": 3}
SCENARIOS: dict[str, dict[str, dict[str, Any]]] = {
    "in turns, partial cohorts": {"federated": IN_TURNS},
    "two of five": {"federated": {**IN_TURNS, "num_clients": 5, "clients_per_pass": 2}},
    "checkpointing, dropout, micro passes": {
        "backbone": {"gradient_checkpointing": True},
        "lora": {"dropout": 0.1},
        "train": {"micro_batch_size": 2},
    },
    "rolora": {
        "federated": {"clients_per_pass": 2, "method": "rolora", "optimizer_state": "reset"}
    },
    "local terms, server optimizer": {
        "federated": {"prox_mu": 0.1, "scaffold": True, "server_optimizer": "fedadam", **IN_TURNS}
    },
    "generation": {"evaluation": {"generate": True, "max_new_tokens": 3}},
    "fp32": {"model": {"dtype": "fp32"}, "train": {"optimizer": "sgd"}},
    "int8 codes": {"model": {"quantization": "int8"}},
    "offload": {"backbone": {**ZERO3, "offload": "cpu"}},
}
IN_FULL = ("two of five", "rolora", "llama")
BROKEN = {
    "before the passes": ("aside", {"federated": {"clients_per_pass": 1}}),
    "passes before the copies": ("wait", {"federated": {"clients_per_pass": 1}}),
    "the host before the copies": ("finish", {"federated": {"clients_per_pass": 1}}),
    "checkpoint before the passes": ("aside", {}),
    "checkpoint file before the copies": ("finish", {}),
}
"""What goes on too early, the method of ``HostOffload`` that would make it wait, and the run."""


TRIED = ("roberta", "a resumed run", *(name for name in SCENARIOS if name not in IN_FULL))


def merged(*many: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    keys = {key for one in many for key in one}
    return {key: {k: v for one in many for k, v in one.get(key, {}).items()} for key in keys}


def named(name: str) -> str:
    return name.replace(" ", "-").replace(",", "")


def settings_of(tiny_folder: Path, out: Path, name: str, **sections: Any) -> Settings:
    output = {"output": {"dir": str(out), "name": named(name)}}
    return tiny.settings(tiny_folder, **merged(QUICK, sections, output))


@pytest.fixture(scope="module")
def settings(tiny_folder: Path, glue_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The settings of every scenario, in the order in which one process can run them."""
    out = tmp_path_factory.mktemp("pretended")
    found: dict[str, Settings] = {}
    for family in ("roberta", "llama"):
        found[family] = glue.settings(glue_folder, family, "sst2", out / family)
    for name, sections in SCENARIOS.items():
        found[name] = settings_of(tiny_folder, out, name, **sections)
        if name == "in turns, partial cohorts":
            longer = {**found[name]["federated"], "num_rounds": 4}
            found["a resumed run"] = {**found[name], "federated": longer}
    return found


@pytest.fixture(scope="module")
def seen(settings: dict[str, Settings]) -> dict[str, Seen]:
    """What was noted of the scenarios of the test command; all in one process."""
    [found] = watched({name: one for name, one in settings.items() if name not in IN_FULL})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", TRIED)
def test_cuda_has_nothing_against_a_run(name: str, seen: dict[str, Seen]):
    seen[name].require_clean()


@pytest.mark.full
@pytest.mark.parametrize("name", IN_FULL)
def test_cuda_has_nothing_against_other_runs(name: str, settings: dict[str, Settings]):
    [found] = watched({name: settings[name]})
    found[name].require_clean()


def test_numbers_are_those_of_a_cpu(
    settings: dict[str, Settings], seen: dict[str, Seen], tmp_path: Path
):
    on_cpu = settings["fp32"] | {"output": {"dir": str(tmp_path), "name": "cpu"}}
    pretended = Path(settings["fp32"]["output"]["dir"]) / "fp32"
    seen["fp32"].require_clean()
    plain = runs.adapters(runs.run(1, on_cpu))
    # Their RMSNorms add up in another order.
    assert runs.relative_difference(plain, runs.adapters(pretended)) < 1e-4


# --- copies that wait for nothing ----------------------------------------------------------------


@pytest.fixture(scope="module")
def seen_broken(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seen]:
    out = tmp_path_factory.mktemp("broken")
    some = {
        name: settings_of(tiny_folder, out, name, **merged(sections, NEVER))
        for name, (_, sections) in BROKEN.items()
    }
    [found] = watched(some, broken={name: method for name, (method, _) in BROKEN.items()})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_a_copy_that_does_not_wait_is_found(name: str, seen_broken: dict[str, Seen]):
    found = seen_broken[name]
    assert not found.error and not found.mixes
    assert found.races, "nobody saw that an order is missing"
    place = "sfed/lora/tensor_files.py" if "file" in name else "sfed/clients/offload.py"
    assert any(place in race for race in found.races), found.races


# --- bounds --------------------------------------------------------------------------------------


def save_uneven(folder: Path) -> Path:
    """Rows of which several short ones fit beside a long one."""
    lines = [
        {"prompt": f"{i} ", "completion": "ab" * (2 if i % 4 else 40), "kind": ""}
        for i in range(80)
    ]
    return glue.save(folder / "uneven.jsonl", lines)


@pytest.fixture(scope="module")
def steps(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seen]:
    """One round of steps each: padded and packed, and with a layer or three."""
    out = tmp_path_factory.mktemp("steps")
    rows = str(save_uneven(out))
    some: dict[str, Settings] = {}
    for name, layers, inner in (
        ("padded", 1, None),
        ("packed", 1, None),
        ("fp8 products", 1, 80),
        ("three layers", 3, None),
    ):
        model = out / f"model-{layers}-{inner}"
        if not model.exists():
            tiny.save_model(model, layers=layers, inner=inner)
        some[name] = settings_of(
            tiny_folder,
            out,
            name,
            model={"name": str(model)},
            data={"packing": name == "packed", "train_files": rows, "max_tokens": 96},
            federated={"num_rounds": 1},
            train={"batch_size": 8},
            backbone={"compute": "fp8" if inner else "full"},
            **NEVER,
        )
    [found] = watched(some)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("form", MOST_WAITS_OF_A_STEP)
def test_the_host_waits_no_more_often_than_it_did(form: str, steps: dict[str, Seen]):
    found = steps[form]
    found.require_clean()
    is_packed = found.steps[0].launches["flash_attention"] > 0
    assert is_packed == (form == "packed"), "the rows are not of the form that is bounded"
    for step in found.steps:
        assert step.host_waits.total() <= MOST_WAITS_OF_A_STEP[form], step.host_waits


@pytest.mark.slow
def test_packed_rows_are_one_kernel_of_attention_in_a_layer(steps: dict[str, Seen]):
    launches = steps["packed"].steps[0].launches
    assert launches["flash_attention"] == launches["flash_attention_backward"] == 1
    assert not [name for name in launches if "scaled_dot_product" in name]


@pytest.mark.slow
def test_a_layer_launches_no_more_kernels_than_it_did(steps: dict[str, Seen]):
    one, three = (steps[name].steps[-1] for name in ("padded", "three layers"))
    forward = Counter(three.forward_launches)
    forward.subtract(one.forward_launches)
    both = Counter(three.launches)
    both.subtract(one.launches)
    in_forward, in_both = forward.total() / 2, both.total() / 2
    assert in_forward <= MOST_LAUNCHES_OF_A_LAYER["forward"], forward
    assert in_both - in_forward <= MOST_LAUNCHES_OF_A_LAYER["backward"], both - forward
    assert one.launches.total() - in_both <= MOST_LAUNCHES_BESIDE_LAYERS, one.launches


# --- several processes ---------------------------------------------------------------------------


def watched_by_two(tiny_folder: Path, out: Path, **backbone: Any) -> list[Seen]:
    """What two processes on two GPUs saw: three rounds, evaluated at the start and the end."""
    settings = settings_of(
        tiny_folder,
        out,
        "run",
        backbone={**backbone, "gradient_checkpointing": True},
        federated={"num_clients": 3, "num_rounds": 3},
        evaluation={"every_rounds": 3, "generate": True, "max_new_tokens": 2},
    )
    return [found["run"] for found in watched({"run": settings}, num_processes=2, devices=2)]


@pytest.fixture(scope="module")
def sharded(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Seen]:
    return watched_by_two(tiny_folder, tmp_path_factory.mktemp("sharded"), **ZERO3)


def collectives_of_a_round(seen: Seen) -> Counter[tuple[str, str]]:
    """From the first step of the second round to that of the third."""
    steps = QUICK["train"]["local_steps"]
    begin, end = (seen.steps[number * steps].earlier_collectives for number in (1, 2))
    return Counter({key: end[key] - begin[key] for key in end if end[key] > begin[key]})


@pytest.mark.dist
@pytest.mark.slow
def test_cuda_has_nothing_against_shards(sharded: list[Seen]):
    for rank, seen in enumerate(sharded):
        seen.require_clean()
        assert {place for _, place in seen.collectives} == {f"cuda:{rank}"}
        assert seen.collectives["all_gather_single", f"cuda:{rank}"] > 10


@pytest.mark.dist
@pytest.mark.slow
def test_a_round_reduces_once_and_on_the_gpu(sharded: list[Seen]):
    for rank, seen in enumerate(sharded):
        found = collectives_of_a_round(seen)
        assert found["allreduce", f"cuda:{rank}"] == 1, found
        assert {kind for kind, _ in found} == {"allreduce", "allgather", "all_gather_single"}


@pytest.mark.dist
@pytest.mark.full
def test_replicas_reduce_once_and_gather_sums(tiny_folder: Path, tmp_path: Path):
    for rank, seen in enumerate(watched_by_two(tiny_folder, tmp_path, sharding="none")):
        seen.require_clean()
        here = f"cuda:{rank}"
        assert collectives_of_a_round(seen) == {("allreduce", here): 1, ("allgather", here): 1}


def train_on_one_gpu(settings: Settings) -> None:
    with PretendedGpu(devices=1):
        runs.train_or_leave(settings)


@pytest.mark.dist
@pytest.mark.slow
def test_two_processes_cannot_shard_on_one_gpu(tiny_folder: Path, tmp_path: Path):
    settings = settings_of(tiny_folder, tmp_path, "run", backbone=ZERO3)
    ends = ends_of(2, train_on_one_gpu, settings, environment=ENVIRONMENT)
    assert [end.code for end in ends] == [2, 2], ends
    assert "2 processes share a GPU" in ends[0].said
    assert "one process per GPU" in ends[0].said


# --- the program ---------------------------------------------------------------------------------


@pytest.mark.full
def test_the_bench_runs_as_a_program(tmp_path: Path):
    report = tmp_path / "report.json"
    pretended = ("-m", "tests.support.pretended_gpu", "--report", str(report))
    model = ("--model", "tiny", "--layers", "1")
    size = (*model, "--clients", "2", "--tokens", "16", "--repeat", "1")
    done = launchers.python(*pretended, "-m", "sfed.bench", *size)
    assert done.returncode == 0, done.stderr
    assert "NVIDIA H100" in done.stdout
    found = json.loads(report.read_text(encoding="utf-8"))
    assert found["mixes"] == found["races"] == {} and found["launches"]["mm"] > 100


@pytest.mark.full
@pytest.mark.dist
def test_two_processes_run_as_a_program(tiny_folder: Path, tmp_path: Path):
    settings = settings_of(tiny_folder, tmp_path, "run", backbone=ZERO3)
    config = glue.save(tmp_path / "run.yaml", [settings])  # JSON is YAML
    report = tmp_path / "report.json"
    pretended = ("-m", "tests.support.pretended_gpu", "--devices", "2", "--report", str(report))
    done = launchers.torchrun(2, *pretended, "-m", "sfed.train", str(config))
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        found = json.loads(report.with_suffix(f".{rank}.json").read_text(encoding="utf-8"))
        assert found["mixes"] == found["races"] == {}
        assert f"all_gather_single | cuda:{rank}" in found["collectives"]
