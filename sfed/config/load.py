"""From the command line to a Config: YAML or JSON file, ``key=value`` overrides, help, mistakes.

All mistakes of a configuration are collected into one ``ConfigError``. Needs no torch.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from sfed.config import yaml_text
from sfed.config.foreign_keys import FOREIGN_KEYS
from sfed.config.paths import follow
from sfed.config.schema import DEMO, REQUIRED, Config
from sfed.config.sections.clients import ClientSection
from sfed.utils.errors import ConfigError
from sfed.utils.launcher import launch
from sfed.utils.redaction import MASK, is_secret_name, masked
from sfed.utils.text import shown

_LOG = logging.getLogger(__name__)
_MOST_BYTES = 2**22
"""Of a configuration file: thousands of file names fit."""
_MOST_SHOWN = 200
"""Characters of a value in a message."""


def parse(arguments: Sequence[str]) -> Config | None:
    """Read ``[CONFIG.yaml] [key=value ...]``; None where ``--help`` was asked for.

    Raises:
        ConfigError: with all mistakes of the configuration at once.
    """
    words = split(arguments)
    return None if words is None else load(*words)


def split(arguments: Sequence[str]) -> tuple[str | None, list[str]] | None:
    """Tell the file from the ``key=value`` overrides; None where ``--help`` was asked for."""
    path: str | None = None
    overrides: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            return None
        if re.fullmatch(r"--local[-_]rank(=\d+)?", word):  # the deepspeed launcher adds it
            if "=" not in word and rest:
                rest.pop(0)
        elif word.startswith("-"):
            raise ConfigError(_unknown_option(word, rest))
        elif "=" in word and not os.path.isfile(word):
            overrides.append(word)
        elif path is not None:
            raise ConfigError(
                f"two configuration files, {path!r} and {word!r}; give one, and key=value for "
                "what differs"
            )
        else:
            path = word
    return path, overrides


def _unknown_option(word: str, rest: Sequence[str]) -> str:
    """Say how what an option of other programs asks for is asked for here."""
    name, _, value = word.lstrip("-").partition("=")
    value = value or next((one for one in rest[:1] if not one.startswith("-")), "")
    if name in ("config", "config-file", "config_file", "c"):
        return (
            f"unknown option {word!r}; the configuration file stands by itself: {value or 'FILE'}"
        )
    key = name.replace("-", "_")
    if key in {known for known, _, _ in list_keys()}:
        return f"unknown option {word!r}; settings are given as key=value: {key}={value or '...'}"
    return f"unknown option {word!r}{suggestion(key)}; settings are given as key=value, see --help"


def load(path: str | None, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file and apply ``key=value`` overrides.

    Args:
        path: of the file, which stands on its own. Without it the overrides stand on the demo's
            configuration if they say data.task=demo, or if there are none, and else on nothing.
        overrides: ``key=value``; the last one for a key counts.

    Raises:
        ConfigError: with all mistakes at once; model.name and data.task have no default.
    """
    data = {} if path is None else read_settings(Path(path))
    data = _overridden(data, overrides)
    if path is None and (not overrides or _task(data) == "demo"):
        data = _overridden(DEMO, overrides)
    return complete(data)


def _overridden(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    for override in overrides:
        data = overridden(data, override)
    return data


def _task(data: Mapping[str, Any]) -> Any:
    section = data.get("data")
    return section.get("task") if isinstance(section, Mapping) else None


def complete(data: dict[str, Any]) -> Config:
    """Check what a person wrote against the schema: ``validate``, and model and task are there.

    Raises:
        ConfigError: as ``validate`` does, and one line for each of model.name and data.task that is
            not set. With data.task=demo the model is the demo's where no other is named.
    """
    if _task(data) == "demo" and "model.name" in _unset(data):
        data = put(data, "model.name", "demo", origin="data.task=demo")
    return validate(data, required=tuple(REQUIRED))


def _unset(data: Mapping[str, Any]) -> list[str]:
    """The required keys that are not there; a section of another form is a mistake by itself."""
    unset = []
    for key in REQUIRED:
        section, _, leaf = key.partition(".")
        values = data.get(section, {})
        if isinstance(values, Mapping) and leaf not in values:
            unset.append(key)
    return unset


def read_settings(path: Path) -> dict[str, Any]:
    """Read a configuration file; its paths follow it."""
    return following(read_mapping(path), path)


def following(data: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return sections that a file says, with their paths as from the folder of the command."""
    settings, warnings = follow(_with_text_keys(data), path)
    for warning in warnings if launch().rank == 0 else ():
        _LOG.warning("%s", warning)
    return settings


def _with_text_keys(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return sections that a person wrote with the numbers of clients as text.

    Raises:
        ConfigError: where a client stands twice, as a number and as text.
    """
    clients = data.get("clients")
    if not isinstance(clients, dict):
        return dict(data)
    keys = [str(key) if type(key) is int else key for key in clients]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ConfigError(f"clients.{twice[0]}: this client stands twice in the section")
    return {**data, "clients": dict(zip(keys, clients.values(), strict=True))}


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML or JSON file that holds a mapping."""
    if not path.is_file():
        problem = "is no file" if path.exists() else "does not exist"
        raise ConfigError(f"the configuration file {str(path)!r} {problem}")
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ConfigError(
                f"{path} is larger than {_MOST_BYTES:,} bytes; is it a configuration?"
            )
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            text = text.replace("\t", " ")  # the one thing in which JSON is not YAML
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not readable as YAML or JSON: {error}") from None
    data = yaml_text.parse(text, str(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds {type(data).__name__}, not a mapping of keys to values")
    return data


def overridden(data: dict[str, Any], override: str) -> dict[str, Any]:
    """Return a copy of ``data`` with one ``section.key=value`` applied."""
    dotted, _, text = override.partition("=")
    origin = f"{dotted}={MASK}" if is_secret_name(dotted) else override
    value = yaml_text.parse(text, f"{shown(origin)}: the value")
    return put(data, dotted, value, origin)


def put(data: dict[str, Any], dotted: str, value: Any, origin: str) -> dict[str, Any]:
    """Return a copy of ``data`` with the value under a dotted key; ``origin`` asked for it."""
    *parents, leaf = dotted.split(".")
    if not (leaf and all(parents)):
        raise ConfigError(f"{shown(origin)}: the key is empty or has an empty part; see --help")
    if parents[:1] == ["clients"] and len(parents) > 2:  # a name may have dots
        parents = ["clients", ".".join(parents[1:])]
    result = node = dict(data)
    for depth, parent in enumerate(parents):
        child = node.get(parent) or {}
        if not isinstance(child, dict):
            name = ".".join(parents[: depth + 1])
            raise ConfigError(
                f"{shown(origin)}: {name} is {shown(masked(child, name))}, not a section with keys"
            )
        node[parent] = dict(child)
        node = node[parent]
    node[leaf] = value
    return _with_text_keys(result) if dotted.startswith("clients") else result


def validate(data: dict[str, Any], required: Sequence[str] = ()) -> Config:
    """Check a mapping against the schema.

    Args:
        data: sections of keys.
        required: keys that have to be there; see ``complete``.

    Raises:
        ConfigError: one line per mistake: key, value, what is wrong, the nearest known key.
    """
    try:
        text = json.dumps(data, default=str)
    except (ValueError, RecursionError):
        raise ConfigError("the configuration refers to itself, or is nested too deeply") from None
    except TypeError as error:
        raise ConfigError(f"a key of the configuration is not text: {error}") from None
    unset = [key for key in _unset(data) if key in required]
    details: list[ErrorDetails] = []
    try:
        # JSON mode: strict about types, yet a list may fill a tuple.
        config = Config.model_validate_json(text)
    except ValidationError as error:
        details = _narrowed(error.errors())
    if "data.task" in unset:  # what must hold between keys depends on it
        details = [detail for detail in details if detail["loc"]]
    lines = sorted({_explain(detail) for detail in details})
    lines = [f"{key}: no default; {REQUIRED[key]}{_allowed(key)}" for key in unset] + lines
    if lines:
        count = "an error" if len(lines) == 1 else f"{len(lines)} errors"
        raise ConfigError(f"{count} in the configuration\n  " + "\n  ".join(lines))
    return config


def _narrowed(details: list[ErrorDetails]) -> list[ErrorDetails]:
    """Keep one entry per key: a union of types reports each branch that did not fit."""
    return list({_key(detail): detail for detail in reversed(details)}.values())


def _key(detail: ErrorDetails) -> str:
    parts = [str(part) for part in detail["loc"]]
    depth = 3 if parts[:1] == ["clients"] else 2 if parts and parts[0] in _sections() else 1
    return ".".join(parts[:depth])


def _explain(detail: ErrorDetails) -> str:
    key, value = _key(detail), detail["input"]
    if detail["type"] == "extra_forbidden":
        return f"{key} = {shown(_without_secrets(key, value))}: unknown key{suggestion(key)}"
    message = detail["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if not key or (key in _sections() and detail["type"] == "value_error"):
        return f"{key}.{message}" if key else message
    meaning = _allowed(key)
    if detail["type"] == "literal_error" and " One of " in meaning:
        meaning = ""  # the message lists the words
    value = json.dumps(_without_secrets(key, value), default=str)
    value = value if len(value) <= _MOST_SHOWN else f"{value[:_MOST_SHOWN]}..."
    return f"{key} = {value}: {message}{meaning}"


def _without_secrets(key: str, value: Any) -> Any:
    return MASK if value and is_secret_name(key) else masked(value, key)


def _allowed(key: str) -> str:
    key = re.sub(r"^clients\..*\.", "clients.NAME.", key)
    meaning = {known: text for known, _, text in list_keys()}.get(key)
    return f" ({' '.join(meaning.split())})" if meaning else ""


def suggestion(key: str) -> str:
    """Say which known key is meant by an unknown one, or where all keys are listed.

    The same last part comes first, then a key of another trainer, then the nearest spelling.
    """
    if key.startswith("clients."):
        return f"; a client has {', '.join(ClientSection.model_fields)}"
    known = [name for name, _, _ in list_keys() if not name.startswith("clients.")]
    leaf = key.rpartition(".")[2].replace("-", "_")  # Flower writes its keys with hyphens
    near = [name for name in known if name.rpartition(".")[2] == leaf]
    if not near and leaf in FOREIGN_KEYS:
        return f"; in sfed: {FOREIGN_KEYS[leaf]}"
    near = near or difflib.get_close_matches(key, [*known, *_sections()], n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else "; see --help for all keys"


def _sections() -> tuple[str, ...]:
    return tuple(name for name in Config.model_fields if name != "seed")


def list_keys() -> list[tuple[str, str, str]]:
    """All keys as (dotted name, default as YAML text, meaning), in the order of the schema.

    A key that has to be set has the default "required".
    """
    rows = []
    defaults = json.loads(Config().model_dump_json())
    for section, field in Config.model_fields.items():
        if section == "seed":
            rows.append(("seed", str(defaults["seed"]), field.description or ""))
            continue
        if section == "clients":
            rows += [
                (f"clients.NAME.{name}", "null", inner.description or "")
                for name, inner in ClientSection.model_fields.items()
            ]
            continue
        fields = type(getattr(Config(), section)).model_fields
        for name, inner in fields.items():
            key = f"{section}.{name}"
            default = "required" if key in REQUIRED else json.dumps(defaults[section][name])
            meaning = f"{inner.description or ''}{_choices(inner.annotation)}"
            rows.append((key, default, meaning))
    return rows


def _choices(annotation: Any) -> str:
    """The words that a key takes, where its type lists them."""
    words = get_args(annotation) if get_origin(annotation) is Literal else ()
    return f" One of {', '.join(words)}." if words else ""


def help_text(usage: str) -> str:
    """The text of ``--help``: usage, then every key with its default and its meaning."""
    lines = [
        usage,
        "",
        "Keys, with the default in brackets (required = no default). Where a key states no other",
        "bound, a number is a whole number of 1 to 1,000,000,000:",
    ]
    section = ""
    for key, default, meaning in list_keys():
        if key.partition(".")[0] != section:
            section = key.partition(".")[0]
            lines.append("")
        lines.append(f"  {key:<32} [{default}]")
        lines.append(f"      {' '.join(meaning.split())}")
    return "\n".join(lines)
