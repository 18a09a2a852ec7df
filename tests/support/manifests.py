"""What an API server and the admission webhook would say to a manifest, without either."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

Document = dict[str, Any]
Problems = list[tuple[str, str]]
"""(path in the document, what is wrong)"""

KUBERNETES = "1.31"
# What a custom resource's own schema leaves open, because the server checks it for every object.
_METADATA = {
    "type": "object",
    "required": ["name"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string"},
        "namespace": {"type": "string"},
        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
    },
}
_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")


def documents(path: Path) -> list[Document]:
    """All documents of a file."""
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def definitions(folder: Path) -> dict[tuple[str, str], Document]:
    """The strict schema of each custom resource whose definition lies in ``folder``.

    Returns:
        JSON schemas by (apiVersion, kind).
    """
    found: dict[tuple[str, str], Document] = {}
    for path in sorted(folder.glob("*.yaml")):
        spec = yaml.load(path.read_text(encoding="utf-8"), yaml.CSafeLoader)["spec"]
        for version in spec["versions"]:
            schema = strict(version["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = _METADATA
            name = f"{spec['group']}/{version['name']}", spec["names"]["kind"]
            found[name] = schema
    return found


def strict(schema: Document) -> Document:
    """An OpenAPI schema as a JSON schema that refuses unknown fields.

    As an API server does it with fieldValidation=Strict: a field is known where ``properties`` or
    ``additionalProperties`` name it, or where the schema says that it keeps unknown ones.
    """
    result = {key: value for key, value in schema.items() if key not in ("format", "nullable")}
    if schema.get("x-kubernetes-int-or-string"):
        result["type"] = ["integer", "string"]
        result.pop("anyOf", None)
    elif schema.get("nullable"):
        result["type"] = [schema["type"], "null"]
    if "properties" in schema:
        result["properties"] = {name: strict(part) for name, part in schema["properties"].items()}
        keeps_unknown = schema.get("x-kubernetes-preserve-unknown-fields", False)
        result.setdefault("additionalProperties", bool(keeps_unknown))
    for key in ("items", "additionalProperties"):
        if isinstance(result.get(key), dict):
            result[key] = strict(result[key])
    return result


def custom_problems(document: Document, schema: Document) -> Problems:
    """What does not fit the strict schema of a custom resource."""
    errors = jsonschema.Draft4Validator(schema).iter_errors(document)
    return sorted((_path(error), error.message) for error in errors)


def plain_problems(document: Document) -> Problems:
    """What does not fit the schema of a built-in object, at most one."""
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [(_path(error), error.message)]
    return []


def _path(error: jsonschema.ValidationError) -> str:
    return "/".join(map(str, error.absolute_path))


def webhook_problems(job: Document) -> Problems:
    """What the training operator's webhook refuses in a PyTorchJob beside its schema."""
    return sorted(_webhook_problems(job))


def _webhook_problems(job: Document) -> Iterator[tuple[str, str]]:
    name, spec = job["metadata"]["name"], job["spec"]
    if not _DNS_1035.fullmatch(name):
        yield "metadata/name", f"{name!r} is no DNS-1035 label"
    replicas, elastic = spec["pytorchReplicaSpecs"], spec.get("elasticPolicy")
    if elastic is not None and "Worker" not in replicas:
        yield "spec/pytorchReplicaSpecs/Worker", "elasticPolicy needs it"
    if "nProcPerNode" in (elastic or {}) and "nprocPerNode" in spec:
        yield "spec/elasticPolicy/nProcPerNode", "stands beside spec/nprocPerNode"
    for kind, replica in replicas.items():
        path = f"spec/pytorchReplicaSpecs/{kind}"
        if kind not in ("Master", "Worker"):
            yield path, "neither Master nor Worker"
        count = replica.get("replicas", 1)
        if count < 1 or (kind == "Master" and count != 1):
            yield f"{path}/replicas", f"{count} of them"
        containers = replica.get("template", {}).get("spec", {}).get("containers", [])
        yield from _container_problems(f"{path}/template/spec/containers", containers)


def _container_problems(path: str, containers: list[Document]) -> Iterator[tuple[str, str]]:
    if all(container["name"] != "pytorch" for container in containers):
        yield path, "none has the name pytorch"
    for position, container in enumerate(containers):
        if not container.get("image"):
            yield f"{path}/{position}/image", "none"
