"""A grid file: which configurations a sweep is made of, and what each of them is called.

Reading it changes nothing and needs no torch: all mistakes of all cells are found before the first
one runs.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfed.config import load as config_load
from sfed.config.diff import flatten
from sfed.config.schema import Config
from sfed.config.sections.clients import ClientSection
from sfed.files.silos import num_clients_of
from sfed.storage import origin
from sfed.sweep.cell_names import Choice, name_cells
from sfed.utils.errors import UserError

_KEYS = ("name", "base", "set", "grid", "variants")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_MOST_CELLS = 10_000
# The sweep says where its runs are: a folder each, below a folder of its own.
_OWN_KEYS = ("output.dir", "output.name", "output.resume")


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    name: str
    config: Config

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.output.dir) / self.config.run_name

    def value(self, key: str) -> Any:
        """The value that the configuration has under a dotted key, below a section or deeper."""
        found: Any = json.loads(self.config.model_dump_json())
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        return found

    def num_clients(self, num_processes: int) -> int:
        """Number of clients N, where null stands for one per process."""
        return num_clients_of(self.config) or num_processes


@dataclass(frozen=True)
class Grid:
    """A grid file, read and checked."""

    folder: Path
    """Where the cells' run folders are."""
    keys: tuple[str, ...]
    """Keys that vary, as dotted names: the method first, the seed last."""
    cells: tuple[Cell, ...]


Check = Callable[[Config], object]


def read(path: Path, overrides: Sequence[str], num_processes: int, check: Check) -> Grid:
    """Read a grid file and check every cell.

    Args:
        path: of the grid file.
        overrides: ``key=value``, over the configuration of every cell.
        num_processes: of the launcher.
        check: raises UserError where a configuration cannot run.

    Raises:
        UserError: with all mistakes at once, each with its cells.
    """
    data = config_load.read_mapping(path)
    axes, variants = _check_form(path, data)
    keys = _ordered([*axes, *(key for variant in variants for key in variant)])
    common = _common(path, data, overrides, keys)
    choices = _choices(axes, variants)
    names = name_cells(choices, keys)
    sweep_name = data.get("name", path.stem)
    cells, mistakes = [], dict[str, list[str]]()
    for name, choice in zip(names, choices, strict=True):
        cell, lines = _try_cell(common, _following(choice, path), name, sweep_name, check)
        cells += [] if cell is None else [cell]
        for line in lines:
            mistakes.setdefault(line, []).append(name)
    mistakes |= _duplicates(cells, num_processes)
    if mistakes:
        raise UserError(_explain(path, mistakes, len(choices)))
    return Grid(cells[0].folder.parent, keys, tuple(cells))


def _check_form(
    path: Path, data: Mapping[str, Any]
) -> tuple[dict[str, list[Any]], list[dict[str, Any]]]:
    """Check everything but the cells; returns the lists of ``grid`` and the ``variants``."""
    try:
        json.dumps(data, default=str)
    except (ValueError, RecursionError, TypeError):
        raise UserError(
            f"{path}: a key is not text, or a YAML alias refers to itself in a circle"
        ) from None
    axes, variants = data.get("grid", {}), data.get("variants", [])
    mistakes = [*_odd_keys(data), *_odd_name(data.get("name", path.stem))]
    mistakes += _odd_axes(axes) if isinstance(axes, dict) else [_not_a_mapping("grid", axes)]
    mistakes += _odd_variants(variants, axes)
    if not isinstance(data.get("set", {}), dict):
        mistakes.append(_not_a_mapping("set", data["set"]))
    if not isinstance(data.get("base", ""), str):
        mistakes.append(f"base = {data['base']!r}: the path of a configuration file is wanted")
    if not axes and not variants:
        mistakes.append("nothing varies; give grid, such as grid: {seed: [0, 1]}, or variants")
    if not mistakes:
        count = math.prod(len(values) for values in axes.values()) * max(1, len(variants))
        if count > _MOST_CELLS:
            mistakes.append(f"the grid has {count:,} cells; the most is {_MOST_CELLS:,}")
    if mistakes:
        raise UserError(_explain(path, dict.fromkeys(mistakes, ()), 0))
    return axes, variants


def _odd_keys(data: Mapping[str, Any]) -> Iterator[str]:
    for key in data:
        if key not in _KEYS:
            near = difflib.get_close_matches(str(key), _KEYS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"a grid file has {', '.join(_KEYS)}"
            if str(key).partition(".")[0] in Config.model_fields:
                hint = f"settings of every cell stand under set, as in set: {{{key}: ...}}"
            yield f"{key}: unknown key of a grid file; {hint}"


def _odd_name(name: Any) -> Iterator[str]:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        yield (
            f"name = {name!r}: the name of a folder is wanted, of letters, digits, dot, dash and "
            "underscore, with a letter or digit first"
        )


def _odd_axes(axes: Mapping[str, Any]) -> Iterator[str]:
    for key, values in axes.items():
        if isinstance(values, dict):
            inner = next(iter(values), "rank")
            yield f"grid.{key} is a mapping; write dotted keys, such as {key}.{inner}: [...]"
        elif not isinstance(values, list):
            yield f"grid: {key} = {values!r} is no list; write [{values}], or put it under set"
        elif not values:
            yield f"grid: {key} has an empty list, which makes no cell; fill or remove it"
        else:
            yield from _odd_key(f"grid: {key}", key)


def _odd_variants(variants: Any, axes: Any) -> Iterator[str]:
    if not isinstance(variants, list):
        yield f"variants = {variants!r}: a list of mappings of dotted keys is wanted"
        return
    for number, variant in enumerate(variants, start=1):
        if not isinstance(variant, dict):
            yield f"variants: number {number} is {variant!r}, not a mapping of dotted keys"
            continue
        for key in variant:
            yield from _odd_key(f"variants: {key}", key)
            if isinstance(axes, dict) and key in axes:
                yield f"{key} stands in grid and in variants; remove it from one of them"


def _odd_key(where: str, key: str) -> Iterator[str]:
    if key in _OWN_KEYS:
        yield f"{where} cannot vary; each cell has a folder of its own already"
    elif key in Config.model_fields and key != "seed":
        yield f"{where} is a section; name one of its keys, as in {key}.KEY"
    elif key.startswith("clients."):
        if key.count(".") < 2 or key.rpartition(".")[2] not in ClientSection.model_fields:
            yield f"{where}: unknown key{config_load.suggestion(key)}"
    elif not key.startswith("backbone.deepspeed.") and key not in _known_keys():
        yield f"{where}: unknown key{config_load.suggestion(key)}"


def _known_keys() -> set[str]:
    return {key for key, _, _ in config_load.list_keys()}


def _not_a_mapping(key: str, value: Any) -> str:
    return f"{key} = {value!r}: a mapping of keys to values is wanted"


def _ordered(keys: Sequence[str]) -> tuple[str, ...]:
    """Each key once: the method first, the seed last, the others as they come."""
    place = {"federated.method": 0, "seed": 2}
    return tuple(sorted(dict.fromkeys(keys), key=lambda key: place.get(key, 1)))


def _common(
    path: Path, data: Mapping[str, Any], overrides: Sequence[str], keys: Sequence[str]
) -> dict[str, Any]:
    """What all cells share: the base, ``set`` over it, ``key=value`` over both."""
    common = config_load.read_settings(path.parent / data["base"]) if "base" in data else {}
    if isinstance(common.get("output"), dict):
        common["output"] = {k: v for k, v in common["output"].items() if k != "name"}
    for section, values in config_load.following(data.get("set", {}), path).items():
        inner = values if isinstance(values, dict) and section in Config.model_fields else None
        pairs = {section: values} if inner is None else {f"{section}.{k}": inner[k] for k in inner}
        for key, value in pairs.items():
            common = config_load.put(common, key, value, origin=f"set: {key}")
    for override in overrides:
        key = override.partition("=")[0]
        clash = [one for one in keys if one == key or one.startswith(f"{key}.")]
        if clash:
            raise UserError(f"{override!r}: {clash[0]} varies in {path}; change it there")
        common = config_load.overridden(common, override)
    output = common.get("output")
    if isinstance(output, dict) and "name" in output:
        raise UserError(
            f"output.name = {output['name']!r}: a sweep names its runs itself; the name of their "
            f"folder is the key name of {path}"
        )
    return common


def _choices(axes: Mapping[str, list[Any]], variants: Sequence[Choice]) -> list[Choice]:
    """The product of all lists, once for each variant."""
    products = [
        dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())
    ]
    return [{**variant, **product} for variant in variants or [{}] for product in products]


def _following(choice: Choice, path: Path) -> dict[str, Any]:
    """A choice with its paths as from the folder of the command; names of cells keep the file's."""
    followed = {}
    for key, value in choice.items():
        section, _, leaf = key.partition(".")
        sections = config_load.following({section: {leaf: value}}, path) if leaf else {}
        followed[key] = sections[section][leaf] if leaf else value
    return followed


def _try_cell(
    common: dict[str, Any], choice: Choice, name: str, sweep_name: str, check: Check
) -> tuple[Cell | None, list[str]]:
    """Make a cell, or say what is wrong with it."""
    try:
        return _cell(common, choice, name, sweep_name, check), []
    except UserError as mistake:
        # Without the line that counts them.
        head, *rest = str(mistake).split("\n  ")
        return None, rest or head.split("\n")


def _cell(common: dict[str, Any], choice: Choice, name: str, sweep_name: str, check: Check) -> Cell:
    data = common
    for key, value in choice.items():
        data = config_load.put(data, key, value, origin=key)
    config = config_load.complete(data)
    if config.output.resume not in ("auto", "never"):
        raise UserError(
            f"output.resume = {config.output.resume!r}: a sweep takes auto, or never to begin anew "
            "what is not complete; one checkpoint cannot be that of every cell"
        )
    check(config)
    folder = str(Path(config.output.dir) / sweep_name)
    output = config.output.model_copy(update={"dir": folder, "name": name})
    return Cell(name, origin.adopted(config.model_copy(update={"output": output})))


def _duplicates(cells: Sequence[Cell], num_processes: int) -> dict[str, list[str]]:
    same: dict[str, list[str]] = {}
    for cell in cells:
        flat = flatten(cell.config) | {"federated.num_clients": cell.num_clients(num_processes)}
        settings = {key: value for key, value in flat.items() if key not in _OWN_KEYS}
        same.setdefault(json.dumps(settings, sort_keys=True), []).append(cell.name)
    return {
        f"{len(names)} cells are the same run, {' and '.join(names[:3])}; remove a value or a "
        "variant that stands twice": []
        for names in same.values()
        if len(names) > 1
    }


def _explain(path: Path, mistakes: Mapping[str, Sequence[str]], num_cells: int) -> str:
    """One line per mistake, with the cells that have it."""
    count = "an error" if len(mistakes) == 1 else f"{len(mistakes)} errors"
    lines = [f"{line}{_where(cells, num_cells)}" for line, cells in mistakes.items()]
    return f"{count} in {path}\n  " + "\n  ".join(lines)


def _where(cells: Sequence[str], num_cells: int) -> str:
    if not cells:
        return ""
    if len(cells) == num_cells > 1:
        return f" (in all {num_cells} cells)"
    more = f" and {len(cells) - 3} more" if len(cells) > 3 else ""
    return f" (cell {', '.join(cells[:3])}{more})"
