"""Secrets stay out of everything that is written or printed. Needs nothing but Python.

A secret is recognised by where it stands (an environment variable or a key that ends in TOKEN,
PASSWORD, ...) or by its form (a Hugging Face or W&B key, a user and password in a URL).
"""

from __future__ import annotations

import os
import re
from typing import Any

MASK = "***"
_FORMS = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bwandb_v\d+_\w{16,}|(?<=://)[^\s/'\"]+(?=@)"  # user:password@host
)
_ENDINGS = ("TOKEN", "SECRET", "PASSWORD", "PASSWD", "API_KEY", "ACCESS_KEY")
# What is shorter is no secret, and as a word it would be masked wherever it stands.
_SHORTEST = 8


def mask(text: str) -> str:
    """Return the text with every secret replaced by asterisks."""
    for secret in _secrets_of_environment():
        text = text.replace(secret, MASK)
    return _FORMS.sub(MASK, text)


def masked(value: Any) -> Any:
    """Return a JSON value with all secrets in it replaced, in keys, values and lists."""
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, dict):
        return {
            mask(str(key)): MASK if inner and _is_secret_name(str(key)) else masked(inner)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [masked(inner) for inner in value]
    return value


def _secrets_of_environment() -> list[str]:
    """Values of the environment that are secret, the longest first: one may hold another."""
    found = {
        value
        for name, value in os.environ.items()
        if _is_secret_name(name) and len(value) >= _SHORTEST
    }
    return sorted(found, key=len, reverse=True)


def _is_secret_name(name: str) -> bool:
    return name.upper().endswith(_ENDINGS)
