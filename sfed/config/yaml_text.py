"""YAML as people expect it, and bounded: whoever wrote it, it is read or refused at once."""

from __future__ import annotations

import re
from typing import Any

import yaml

from sfed.utils.errors import ConfigError
from sfed.utils.text import printable

MOST_VALUES = 50_000
"""Keys and values of a document, after aliases are expanded."""
MOST_DEPTH = 50
"""Lists and mappings within each other."""
_MERGE = "tag:yaml.org,2002:merge"  # the key "<<"
# What PyYAML's constructors raise for a scalar that is not of its tag, such as 2024-13-45.
_OF_A_SCALAR = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError)


class _TwiceError(Exception):
    """A key stands twice."""


class _BoundError(Exception):
    """The document is larger or deeper than is allowed."""


class _Loader(yaml.SafeLoader):
    """1e-4 is a number, a key that stands twice is an error, and size and depth have bounds."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        self._values += 1
        if self._depth > MOST_DEPTH:
            raise _BoundError(f"lists and mappings are nested more than {MOST_DEPTH} deep")
        if self._values > MOST_VALUES:
            raise _BoundError(f"it holds more than {MOST_VALUES:,} keys and values")
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None and _expanded(node, {}) > MOST_VALUES:
            raise _BoundError(f"its aliases expand to more than {MOST_VALUES:,} values")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [
            _MERGE if key.tag == _MERGE else self.construct_object(key, deep=True)
            for key, _ in node.value
        ]
        seen = set()
        for (key_node, _), key in zip(node.value, keys, strict=True):
            if not isinstance(key, str | int | float | bool | None):
                continue  # refused as a key by PyYAML, or later as no text
            if key in seen and key != _MERGE:
                line = key_node.start_mark.line + 1
                raise _TwiceError(f"line {line}: the key {key!r} stands twice; remove one of them")
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1, which PyYAML follows, reads 1e-4 as a string; YAML 1.2 reads it as a number.
_FLOAT = re.compile(
    r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$|^[-+]?(\d+\.\d*|\.\d+)$|^\.nan$|^[-+]?\.inf$"
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
# YAML 1.1 also reads 010 as 8 and 1:30 as 90; YAML 1.2 reads 10, and a text.
_INT_TAG = "tag:yaml.org,2002:int"
_INT = re.compile(r"^[-+]?([0-9][0-9_]*|0x[0-9a-fA-F_]+|0o[0-7_]+|0b[01_]+)$")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag != _INT_TAG]
    for first, known in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INT_TAG, _INT, list("-+0123456789"))


def _whole(loader: _Loader, node: yaml.ScalarNode) -> int:
    """Read a whole number; one without a prefix is decimal, whatever zeros it begins with."""
    text = str(loader.construct_scalar(node)).replace("_", "")
    prefix = text.lstrip("+-")[:2].lower()
    return int(text, {"0x": 16, "0o": 8, "0b": 2}.get(prefix, 10))


_Loader.add_constructor(_INT_TAG, _whole)


def parse(text: str, name: str) -> Any:
    """Read one YAML document.

    Args:
        text: of the document.
        name: what it is, for messages.

    Raises:
        ConfigError: where it is none, or larger or deeper than the bounds, in one line. It quotes
            no value, which may be a secret.
    """
    try:
        return _Loader(text).get_single_data()
    except _TwiceError as error:
        raise ConfigError(f"{name}, {error}") from None
    except _BoundError as error:
        reason = str(error)
    except yaml.MarkedYAMLError as error:
        reason = _where(error)
    except yaml.YAMLError as error:  # of a character that YAML does not allow
        position = getattr(error, "position", 0)
        reason = f"{getattr(error, 'reason', 'it is no YAML')} (character {position + 1})"
    except _OF_A_SCALAR as error:
        reason = f"a value is not of its type ({type(error).__name__})"
    raise ConfigError(f"{name} is not readable as YAML or JSON: {reason}")


def _where(error: yaml.MarkedYAMLError) -> str:
    mark, began = error.problem_mark or error.context_mark, error.context_mark
    what = printable(error.problem or error.context or "it is no YAML")
    if mark is None:
        return what
    # What has no end is found at the end of the file; where it began is of more use.
    begun = ""
    if began is not None and began.line != mark.line:
        begun = f" (in what begins in line {began.line + 1})"
    return f"line {mark.line + 1}, column {mark.column + 1}: {what}{begun}"


def _expanded(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for; one that holds itself is past every bound."""
    if id(node) not in known:
        known[id(node)] = MOST_VALUES + 1  # while it is counted: only an alias in it comes back
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            inner = [one for pair in inner for one in pair]
        known[id(node)] = 1 + sum(_expanded(one, known) for one in inner)
    return known[id(node)]
