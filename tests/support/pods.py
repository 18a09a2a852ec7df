"""The pods that the two Kubeflow controllers would make of a job, and what a kubelet would run.

Only what the trainer sees of them: names, commands, environment, files. The training operator (v1)
is followed at 1.9, Kubeflow Trainer (v2) at 2.3 with its runtime ``torch-distributed``.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Document = dict[str, Any]
Environment = dict[str, str]

_TRAINER_PORT = 29500


def pods(job: Document) -> list[Document]:
    """The pods of a PyTorchJob or a TrainJob, the one of process 0 first."""
    make = {"PyTorchJob": _of_pytorchjob, "TrainJob": _of_trainjob}[job["kind"]]
    return make(job)


def _pod(name: str, template: Document, container: str, environment: Environment) -> Document:
    """A pod of a template; the environment goes into the container of this name, or into all."""
    metadata, spec = copy.deepcopy(template.get("metadata", {})), copy.deepcopy(template["spec"])
    for part in spec["containers"]:
        if container in (part["name"], "*"):
            added = [{"name": key, "value": value} for key, value in environment.items()]
            part["env"] = [*part.get("env", []), *added]
    metadata["name"] = name
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


# --- training operator, v1 ------------------------------------------------------------------------


def _of_pytorchjob(job: Document) -> list[Document]:
    name, spec = job["metadata"]["name"], job["spec"]
    replicas = spec["pytorchReplicaSpecs"]
    made = []
    for kind in ("Master", "Worker"):
        for index in range(replicas[kind].get("replicas", 1) if kind in replicas else 0):
            environment = {"PYTHONUNBUFFERED": "1"}
            if "Master" in replicas:
                environment |= _master_environment(job, node=index + (kind == "Worker"))
            environment["PET_NPROC_PER_NODE"] = str(spec.get("nprocPerNode", "auto"))
            if "elasticPolicy" in spec:
                environment |= _elastic_environment(job)
            else:
                environment["PET_NNODES"] = str(_count(replicas))
            template = replicas[kind]["template"]
            pod = _pod(f"{name}-{kind.lower()}-{index}", template, "*", environment)
            # ExitCode is the controller's own business, so the kubelet must not restart.
            policy = replicas[kind].get("restartPolicy", "OnFailure")
            pod["spec"]["restartPolicy"] = "Never" if policy == "ExitCode" else policy
            made.append(pod)
    return made


def _count(replicas: Document) -> int:
    return sum(replica.get("replicas", 1) for replica in replicas.values())


def _port(template: Document) -> int:
    trainers = [part for part in template["spec"]["containers"] if part["name"] == "pytorch"]
    ports = [port for part in trainers for port in part.get("ports", [])]
    named = [port["containerPort"] for port in ports if port["name"] == "pytorchjob-port"]
    return named[0] if named else 23456


def _master_environment(job: Document, node: int) -> Environment:
    """What pods learn of a Master; RANK and WORLD_SIZE here are no process's own."""
    replicas, processes = job["spec"]["pytorchReplicaSpecs"], job["spec"].get("nprocPerNode", "1")
    per_node = int(processes) if processes.isdigit() else 1
    address, port = f"{job['metadata']['name']}-master-0", _port(replicas["Master"]["template"])
    return {
        "MASTER_ADDR": address,
        "PET_MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "PET_MASTER_PORT": str(port),
        "WORLD_SIZE": str(_count(replicas) * per_node),
        "RANK": str(node),
        "PET_NODE_RANK": str(node),
    }


def _elastic_environment(job: Document) -> Environment:
    policy, worker = job["spec"]["elasticPolicy"], job["spec"]["pytorchReplicaSpecs"]["Worker"]
    fewest = policy.get("minReplicas", worker.get("replicas", 1))
    host = policy.get("rdzvHost", f"{job['metadata']['name']}-worker-0")
    port = policy.get("rdzvPort", _port(worker["template"]))
    environment = {
        "PET_RDZV_BACKEND": policy.get("rdzvBackend", "c10d"),
        "PET_RDZV_ENDPOINT": f"{host}:{port}",
        "PET_NNODES": f"{fewest}:{policy.get('maxReplicas', fewest)}",
    }
    if "maxRestarts" in policy:
        environment["PET_MAX_RESTARTS"] = str(policy["maxRestarts"])
    if "rdzvId" in policy:
        environment["PET_RDZV_ID"] = policy["rdzvId"]
    if "rdzvConf" in policy:
        pairs = [f"{pair['key']}={pair['value']}" for pair in policy["rdzvConf"]]
        environment["PET_RDZV_CONF"] = ",".join(pairs)
    return environment


# --- Kubeflow Trainer, v2 -------------------------------------------------------------------------


def _of_trainjob(job: Document) -> list[Document]:
    name, trainer = job["metadata"]["name"], job["spec"]["trainer"]
    resources = {"resources": trainer["resourcesPerNode"]} if "resourcesPerNode" in trainer else {}
    own = {key: trainer[key] for key in ("image", "command", "args", "env") if key in trainer}
    template = {"metadata": {}, "spec": {"containers": [{"name": "node", **own, **resources}]}}
    for patch in job["spec"].get("runtimePatches", []):
        for part in patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]:
            if part["name"] == "node":
                template = _merged(template, part["template"]["spec"]["template"])
    made = []
    for index in range(trainer["numNodes"]):
        environment = {
            "PET_NNODES": str(trainer["numNodes"]),
            "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
            "PET_NODE_RANK": str(index),  # of the job's completion index
            "PET_MASTER_ADDR": f"{name}-node-0-0.{name}",
            "PET_MASTER_PORT": str(_TRAINER_PORT),
        }
        taken = {variable["name"] for variable in trainer.get("env", [])} & set(environment)
        assert not taken, f"reserved for the runtime: {taken}"
        pod = _pod(f"{name}-node-0-{index}", template, "node", environment)
        pod["spec"]["restartPolicy"] = "OnFailure"
        made.append(pod)
    return made


def _merged(base: Document, patch: Document) -> Document:
    """A strategic merge: mappings key by key, lists of named things by name."""
    result = dict(base)
    for key, value in patch.items():
        old = result.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            result[key] = _merged(old, value)
        elif isinstance(old, list) and isinstance(value, list):
            named = {item["name"]: item for item in old}
            for item in value:
                named[item["name"]] = _merged(named.get(item["name"], {}), item)
            result[key] = list(named.values())
        else:
            result[key] = value
    return result


# --- kubelet --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Container:
    """What a kubelet would run in a pod's only container."""

    command: list[str]
    """With its arguments."""
    environment: Environment
    """Without optional secrets, which are absent."""
    probes: dict[str, list[str]]
    """The commands of startupProbe and livenessProbe, where the pod has them."""


def container_of(pod: Document, places: Mapping[str, Path]) -> Container:
    """What a kubelet makes of a pod.

    Args:
        pod: the pod.
        places: a folder for each path at which the container mounts something; paths below them
            in the command and the environment are turned into paths below these folders.
    """
    (container,) = pod["spec"]["containers"]
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == set(places), "every mount has its place"

    mounted = re.compile(rf"(?<![\w.])({'|'.join(map(re.escape, mounts))})(?=/|$)")

    def placed(text: str) -> str:
        return mounted.sub(lambda match: str(places[match[1]]), text)

    environment = {}
    for variable in container["env"]:  # a name that stands twice: the last one counts
        if "value" in variable:
            environment[variable["name"]] = placed(variable["value"])
        else:
            assert variable["valueFrom"]["secretKeyRef"]["optional"], variable
    probes = {
        name: [placed(word) for word in container[name]["exec"]["command"]]
        for name in ("startupProbe", "livenessProbe")
        if name in container
    }
    command = [*container["command"], *container.get("args", [])]
    return Container([placed(word) for word in command], environment, probes)
