"""The manifests of launch/k8s: valid as a server would have it, and the pods they make train."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sfed.config import load as config_load
from sfed.methods import method as methods
from tests.support import manifests, netns, pods, runs, tiny
from tests.support.deadlines import HANG_SECONDS
from tests.support.netns import Node
from tests.support.selection import full

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "launch" / "k8s"
FILES = sorted(FOLDER.glob("*.yaml"))
JOBS = ["pytorchjob", "pytorchjob-elastic", "trainjob"]
DEFINITIONS = ROOT.parent / "shared" / "crd"

Document = dict[str, Any]
every_job = pytest.mark.parametrize("name", JOBS)


def job_of(name: str) -> Document:
    (document,) = manifests.documents(FOLDER / f"{name}.yaml")
    return document


def support() -> dict[str, Document]:
    return {document["kind"]: document for document in manifests.documents(FOLDER / "support.yaml")}


@pytest.fixture(scope="module")
def definitions() -> dict[tuple[str, str], Document]:
    if not DEFINITIONS.is_dir():
        pytest.skip("the definitions of Kubeflow's custom resources are not at hand")
    return manifests.definitions(DEFINITIONS)


def custom_problems(document: Document, definitions: dict) -> list[tuple[str, str]]:
    schema = definitions[document["apiVersion"], document["kind"]]
    return manifests.custom_problems(document, schema)


# --- what a server would say ----------------------------------------------------------------------


def test_every_file_begins_with_its_command():
    assert {path.stem for path in FILES} == {*JOBS, "support", "kustomization"}
    for path in FILES:
        first = path.read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith("# kubectl apply -"), path
        assert path.name in first or path.stem == "kustomization", path


@every_job
def test_a_job_fits_the_definition_of_its_kind(name, definitions):
    assert custom_problems(job_of(name), definitions) == []


@every_job
def test_pods_fit_kubernetes_own_schema(name):
    for pod in pods.pods(job_of(name)):
        assert manifests.plain_problems(pod) == []


def test_what_jobs_need_fits_kubernetes_own_schema():
    for document in support().values():
        assert manifests.plain_problems(document) == []


@pytest.mark.parametrize("name", ["pytorchjob", "pytorchjob-elastic"])
def test_the_webhook_lets_a_job_in(name):
    assert manifests.webhook_problems(job_of(name)) == []


def test_kustomization_names_what_is_there():
    kustomization = manifests.documents(FOLDER / "kustomization.yaml")[0]
    assert all((FOLDER / name).is_file() for name in kustomization["resources"])
    images = {
        container["image"].rpartition(":")[0]
        for name in JOBS
        for pod in pods.pods(job_of(name))
        for container in pod["spec"]["containers"]
    }
    assert images == {image["name"] for image in kustomization["images"]}


def changed(document: Document, path: str, value: Any) -> Document:
    """A copy with one value put in, or taken out where it is None."""
    result = json.loads(json.dumps(document))  # what YAML aliases share is no longer shared
    *parents, leaf = (int(word) if word.isdigit() else word for word in path.split("/"))
    node = result
    for parent in parents:
        node = node[parent]
    if value is None:
        del node[leaf]
    else:
        node[leaf] = value
    return result


MASTER = "spec/pytorchReplicaSpecs/Master"
CONTAINER = f"{MASTER}/template/spec/containers/0"


@pytest.mark.parametrize(
    ("path", "value", "reported"),
    [
        ("spec/nprocPerNode", 8, "spec/nprocPerNode"),
        ("spec/runPolicy/ttlSecondAfterFinished", 5, "spec/runPolicy"),
        ("spec/pytorchReplicaSpecs", None, "spec"),
        (f"{MASTER}/replicas", "1", f"{MASTER}/replicas"),
        (f"{MASTER}/template/spec/volumes/2/emptyDir/medum", "Memory", None),
        (f"{CONTAINER}/env/1/value", 4, f"{CONTAINER}/env/1/value"),
        (f"{CONTAINER}/livenesProbe", {}, CONTAINER),
    ],
)
def test_a_mistake_in_a_pytorchjob_is_refused_where_it_stands(definitions, path, value, reported):
    problems = custom_problems(changed(job_of("pytorchjob"), path, value), definitions)
    assert [where for where, _ in problems] == [reported or path.rpartition("/")[0]]


@pytest.mark.parametrize(
    ("path", "value", "reported"),
    [
        ("spec/trainer/numProcPerNode", "auto", "spec/trainer/numProcPerNode"),
        ("spec/trainer/livenessProbe", {}, "spec/trainer"),
        ("spec/runtimeRef", None, "spec"),
        ("spec/podTemplateOverrides", [], "spec"),
        ("spec/runtimePatches/0/manager", None, "spec/runtimePatches/0"),
    ],
)
def test_a_mistake_in_a_trainjob_is_refused_where_it_stands(definitions, path, value, reported):
    problems = custom_problems(changed(job_of("trainjob"), path, value), definitions)
    assert [where for where, _ in problems] == [reported]


@pytest.mark.parametrize(
    ("path", "value", "reported"),
    [
        ("spec/containers/0/image_pull_policy", "Always", "spec/containers/0"),
        ("spec/containers/0/resources/limits", "8", "spec/containers/0/resources/limits"),
        ("spec/containers/0/name", None, "spec/containers/0"),
        ("spec/terminationGracePeriodSeconds", "2m", "spec/terminationGracePeriodSeconds"),
        ("spec/volumes/0/persistentVolumeClaim/claim", "x", "spec/volumes/0/persistentVolumeClaim"),
    ],
)
def test_a_mistake_in_a_pod_is_refused_where_it_stands(path, value, reported):
    pod = changed(pods.pods(job_of("pytorchjob"))[0], path, value)
    assert [where for where, _ in manifests.plain_problems(pod)] == [reported]


@pytest.mark.parametrize(
    ("name", "path", "value", "reported"),
    [
        ("pytorchjob", "metadata/name", "8-clients", "metadata/name"),
        ("pytorchjob", "metadata/name", "sfed.train", "metadata/name"),
        ("pytorchjob", "metadata/name", "s" * 64, "metadata/name"),
        ("pytorchjob", f"{MASTER}/replicas", 2, f"{MASTER}/replicas"),
        ("pytorchjob", f"{CONTAINER}/name", "sfed", f"{MASTER}/template/spec/containers"),
        ("pytorchjob", f"{CONTAINER}/image", None, f"{CONTAINER}/image"),
        ("pytorchjob", "spec/pytorchReplicaSpecs/Chief", {}, "spec/pytorchReplicaSpecs/Chief"),
        (
            "pytorchjob-elastic",
            "spec/elasticPolicy/nProcPerNode",
            8,
            "spec/elasticPolicy/nProcPerNode",
        ),
        (
            "pytorchjob-elastic",
            "spec/pytorchReplicaSpecs/Worker",
            None,
            "spec/pytorchReplicaSpecs/Worker",
        ),
    ],
)
def test_the_webhook_refuses(name, path, value, reported):
    problems = manifests.webhook_problems(changed(job_of(name), path, value))
    assert reported in [where for where, _ in problems]


# --- what must fit together -----------------------------------------------------------------------


def configuration() -> dict[str, Any]:
    return yaml.safe_load(support()["ConfigMap"]["data"]["sfed.yaml"])


@every_job
def test_the_configuration_loads_and_has_a_client_for_every_process(name, tmp_path):
    text = support()["ConfigMap"]["data"]["sfed.yaml"]
    (tmp_path / "sfed.yaml").write_text(text, encoding="utf-8")
    made = pods.pods(job_of(name))
    command = [*made[0]["spec"]["containers"][0]["args"]]
    assert command[0] == "/etc/sfed/sfed.yaml"
    config = config_load.parse([str(tmp_path / "sfed.yaml"), *command[1:]])
    methods.resolve(config)
    assert config.output.dir == "/workspace/runs"
    assert config.federated.num_clients >= 8 * len(made)
    method = methods.resolve(config)
    clients, lora_rank = config.federated.num_clients, config.lora.rank
    assert method.alpha * (clients / lora_rank) ** 0.5 == 1.0, "the comment beside alpha says so"


@every_job
def test_names_that_a_pod_refers_to_exist(name):
    there = {kind: document["metadata"]["name"] for kind, document in support().items()}
    for pod in pods.pods(job_of(name)):
        spec = pod["spec"]
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        assert (
            volumes["workspace"]["persistentVolumeClaim"]["claimName"]
            == (there["PersistentVolumeClaim"])
        )
        assert volumes["config"]["configMap"]["name"] == there["ConfigMap"]
        assert spec["serviceAccountName"] == there["ServiceAccount"]
        (container,) = spec["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)


@every_job
def test_a_pod_can_do_no_more_than_it_needs(name):
    for pod in pods.pods(job_of(name)):
        (container,) = pod["spec"]["containers"]
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert pod["spec"]["securityContext"]["runAsUser"] > 0
        own = container["securityContext"]
        assert own["readOnlyRootFilesystem"] is True
        assert own["allowPrivilegeEscalation"] is False
        assert own["capabilities"] == {"drop": ["ALL"]}
        token = next(variable for variable in container["env"] if variable["name"] == "HF_TOKEN")
        assert "value" not in token
        assert token["valueFrom"]["secretKeyRef"]["optional"] is True


@every_job
def test_a_pod_has_more_time_to_end_than_torchrun_grants_its_processes(name):
    for pod in pods.pods(job_of(name)):
        (container,) = pod["spec"]["containers"]
        values = {variable["name"]: variable.get("value") for variable in container["env"]}
        granted = int(values["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
        assert pod["spec"]["terminationGracePeriodSeconds"] >= granted + 30


def test_an_elastic_job_stands_on_its_own_store():
    """Without it a node that is back waits for an address that nobody publishes."""
    for pod in pods.pods(job_of("pytorchjob-elastic")):
        (container,) = pod["spec"]["containers"]
        assert {"name": "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "value": "1"} in container["env"]


@pytest.mark.parametrize("name", ["pytorchjob", "pytorchjob-elastic"])
def test_probes_look_at_the_age_of_the_heartbeat(name, tmp_path):
    where = places(tmp_path)
    config = config_load.validate(configuration())
    for pod in pods.pods(job_of(name)):
        container = pods.container_of(pod, where)
        heartbeat = Path(container.environment["SFED_HEARTBEAT_FILE"])
        assert heartbeat.parent == where["/tmp"], "each node its own"

        def answers(seconds: float, file: Path = heartbeat, found: Any = container) -> list[bool]:
            file.touch()
            os.utime(file, (file.stat().st_mtime - seconds,) * 2)
            probes = (found.probes[name] for name in ("startupProbe", "livenessProbe"))
            return [subprocess.run(words, timeout=HANG_SECONDS).returncode == 0 for words in probes]

        assert answers(0) == [True, True]
        assert answers(120) == [False, True]
        assert answers(config.federated.deadline_seconds) == [False, True]
        assert answers(31 * 60) == [False, False]
        heartbeat.unlink()
        assert all(subprocess.run(words).returncode for words in container.probes.values())


# --- the pods train -------------------------------------------------------------------------------


def with_processes(job: Document, per_node: int) -> Document:
    """The job with so many processes a node instead of 8."""
    text = yaml.safe_dump(job)
    assert text.count("'8'") >= 2
    small = yaml.safe_load(text.replace("'8'", f"'{per_node}'"))
    if job["kind"] == "TrainJob":
        small["spec"]["trainer"]["numProcPerNode"] = per_node
    return small


def places(folder: Path) -> dict[str, Path]:
    """A folder for each mount of the pods."""
    made = {
        "/workspace": folder / "workspace",
        "/etc/sfed": folder / "config",
        "/dev/shm": folder / "shm",
        "/tmp": folder / "tmp",
    }
    for path in made.values():
        path.mkdir(exist_ok=True)
    return made


def names_of(pod: Document) -> str:
    """What a cluster's name service calls the pod."""
    (container,) = pod["spec"]["containers"]
    values = {variable["name"]: variable.get("value", "") for variable in container["env"]}
    name = pod["metadata"]["name"]
    is_first = values.get("PET_NODE_RANK") == "0"
    address = values.get("PET_MASTER_ADDR", "")
    return f"{name} {address}" if is_first and address != name else name


def start(
    made: list[Document], both: tuple[Node, Node], settings: Document, folder: Path
) -> list[Any]:
    """Run the pods of a job, one on each node, with ``settings`` in the place of the ConfigMap's.

    Run folders lie below ``folder / "workspace" / "runs"``.
    """
    where = places(folder)
    (where["/etc/sfed"] / "sfed.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    hosts = ["127.0.0.1 localhost"]
    hosts += [f"{node.address} {names_of(pod)}" for node, pod in zip(both, made, strict=True)]
    both[0].hosts.write_text("\n".join(hosts) + "\n", encoding="utf-8")
    started = []
    for node, pod in zip(both, made, strict=True):
        name = pod["metadata"]["name"]
        container = pods.container_of(pod, where)
        environment = dict(container.environment)
        environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment["PYTHONPATH"] = str(ROOT)
        here = dataclasses.replace(node, hostname=name)
        log = folder / f"{name}.log"
        started.append(
            here.start(*container.command, folder=folder, log=log, environment=environment)
        )
    return started


@pytest.mark.netns
@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(("name", "per_node"), [full("pytorchjob", 2), ("pytorchjob-elastic", 1)])
def test_the_pods_of_a_job_train_as_one_process_does(
    nodes: tuple[Node, Node], tiny_folder: Path, tmp_path: Path, name: str, per_node: int
) -> None:
    settings = tiny.settings(tiny_folder, train={"optimizer": "sgd", "lr": 0.1})
    alone = runs.run(1, settings | {"output": {"dir": str(tmp_path), "name": "alone"}})
    settings["output"] = {"name": "run"}
    made = pods.pods(with_processes(job_of(name), per_node))
    before = [node.traffic().sent for node in nodes]
    started = start(made, nodes, settings, tmp_path)
    logs = [(tmp_path / f"{pod['metadata']['name']}.log").read_text() for pod in made]
    assert netns.wait(started) == [0, 0], logs
    logs = [(tmp_path / f"{pod['metadata']['name']}.log").read_text() for pod in made]
    assert f"4 clients on {2 * per_node} processes" in logs[0]
    assert all(node.traffic().sent > sent for node, sent in zip(nodes, before, strict=True))
    together = runs.adapters(tmp_path / "workspace" / "runs" / "run")
    assert runs.relative_difference(runs.adapters(alone), together) <= 1e-5
