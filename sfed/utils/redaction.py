"""Secrets stay out of everything that is written or printed. Needs nothing but Python.

A secret is recognised by the name that it stands under (an environment variable or a key with the
word token, key, password, authorization or secret, however it is spelt) or by its form (a Hugging
Face or W&B key, a bearer token, a user and password in a URL).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

MASK = "***"
_FORMS = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bwandb_v\d+_\w{16,}|(?<=://)[^\s/'\"]+(?=@)"  # user:password@host
    r"|(?i:(?<=\bbearer )[\w.~+/=-]{8,})"
)
# name=value and name: value, with quotes or without.
_ASSIGNED = re.compile(r"(?<![\w.-])(?P<name>[\w.-]+)(?P<is>[\"']?\s*[=:]\s*)")
_VALUE = re.compile(r"\"[^\"\n]*\"|'[^'\n]*'|(?i:bearer|basic) \S+|[^\s,;)\]}]+")
_FILE = re.compile(r"(?i:\.(jsonl?|[ct]sv|parquet|gz|zst|zip|txt|xlsx?|ya?ml|py|md|safetensors))$")
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SECRET_WORDS = {"secret", "secrets", "password", "passwd", "passphrase", "pwd", "authorization"}
_SECRET_WORDS |= {"credential", "credentials", "bearer"}
_RUN_TOGETHER = ("token", "apikey", "accesskey", "secretkey", "privatekey", "password", "secret")
# Words beside "token" where it is a piece of text: eos_token, token_id, per_token.
_OF_TEXT = {"eos", "bos", "pad", "unk", "sep", "cls", "mask", "per", "id", "ids", "type", "special"}
_OF_SHELLS = ("PWD", "OLDPWD")
"""Working directories, not passwords."""
_OURS = ("partition.key", "by_key", "partition.by_key")
_NAMED_BY_DATA = ("clients", "labels")
"""Sections whose keys are names of clients and of classes."""
_CLIENT = "clients."
"""The same as a dotted name."""
# What is shorter is no secret, and as a word it would be masked wherever it stands.
_SHORTEST = 8


def mask(text: str) -> str:
    """Return a message with every secret in it replaced by asterisks."""
    return _mask_assigned(_mask_values(text, _secrets_of_environment()))


def _mask_values(text: str, secrets: Sequence[str]) -> str:
    """Replace what is known as a secret by itself, whatever stands beside it."""
    for secret in secrets:
        text = text.replace(secret, MASK)
    return _FORMS.sub(MASK, text)


def _mask_assigned(text: str) -> str:
    """Replace what stands behind the name of a secret; behind another one a secret may follow."""
    parts, position = list[str](), 0
    while found := _ASSIGNED.search(text, position):
        parts.append(text[position : found.end()])
        position = found.end()
        if _is_assigned_secret(found) and (value := _VALUE.match(text, position)):
            parts.append(MASK)
            position = value.end()
    return "".join([*parts, text[position:]])


def _is_assigned_secret(found: re.Match[str]) -> bool:
    name = found["name"]
    if (name.lower() in ("key", "token") and "=" not in found["is"]) or name == "key":
        return False  # words of a sentence, and key=value
    return is_secret_name(name) and not _is_path(found)


def _is_path(found: re.Match[str]) -> bool:
    """Whether the name ends a path, of which a sentence says something: /etc/passwd: not JSON."""
    if not re.fullmatch(r"[\"']?:\s+", found["is"]):
        return False
    before = found.string[max(0, found.start() - 1) : found.start()]
    return before in ("/", "\\") or _FILE.search(found["name"]) is not None


def masked(value: Any, under: str = "") -> Any:
    """Return a JSON value with all secrets in it replaced, in keys, values and lists.

    The environment is read once for the whole value, which may be the event of many clients.

    Args:
        value: of any form.
        under: the key that it stands under.
    """
    return _masked(value, under, _secrets_of_environment())


def _masked(value: Any, under: str, secrets: Sequence[str]) -> Any:
    """The same with the secrets of the environment."""
    if isinstance(value, str):
        return _mask_values(value, secrets)
    if isinstance(value, dict):
        return {
            _mask_values(str(key), secrets): MASK
            if inner and _is_secret_key(str(key), under)
            else _masked(inner, str(key), secrets)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [_masked(inner, under, secrets) for inner in value]
    return value


def _is_secret_key(key: str, under: str) -> bool:
    """Whether a secret stands under a key of a JSON value; none does under a name from the data."""
    if under in _NAMED_BY_DATA or key.startswith(_CLIENT):
        return False
    return is_secret_name(f"{under}.{key}" if key == "key" else key)


def _secrets_of_environment() -> list[str]:
    """Values of the environment that are secret, the longest first: one may hold another."""
    found = {
        value
        for name, value in os.environ.items()
        if name not in _OF_SHELLS and is_secret_name(name) and len(value) >= _SHORTEST
    }
    return sorted(found, key=len, reverse=True)


@lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    """Whether what stands under a name is a secret: hub_token, API-Key, authToken, a.password."""
    if name in _OURS:
        return False
    words = [word.lower() for word in _WORDS.findall(name)]
    if _SECRET_WORDS & set(words) or words[-1:] == ["key"]:
        return True
    if "token" in words:
        return not _OF_TEXT & set(words)
    return "".join(words).endswith(_RUN_TOGETHER) and not _OF_TEXT & set(words)
