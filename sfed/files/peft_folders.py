"""LoRA adapters that PEFT, or sfed, has saved: what their files say of themselves.

Configuration and header are read, no values. What this trainer would not compute as PEFT does is
refused by name. Needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from sfed.files.names import ADAPTER_CONFIG, ADAPTER_FILE, CLIENT_FILE
from sfed.lora.card import LABELS_FILE
from sfed.utils import json_text
from sfed.utils.errors import ConfigError
from sfed.utils.files import describe
from sfed.utils.redaction import mask
from sfed.utils.text import one_line, shown

PREFIX = "base_model.model."
"""Before the name of every tensor that PEFT saves."""
_MOST_BYTES = 2**22
"""Of a configuration: the names of a hundred thousand layers fit."""
_MOST_NAMED = 8
_READ = (
    *("peft_type", "r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora"),
    *("target_modules", "exclude_modules", "layers_to_transform"),
)
_WITHOUT_EFFECT = (
    *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type"),
    *("lora_dropout", "fan_in_fan_out", "modules_to_save", "peft_version", "megatron_core"),
    *("qalora_group_size", "runtime_config", "layers_pattern"),
)
"""Keys that the numbers do not depend on; modules_to_save shows in the tensors."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    # Other ways to start also change the weights of the base model.
    "init_lora_weights": (True, False, "gaussian"),
}
"""What else a key may be than null, false or empty, without an effect."""
_DTYPES = ("F32", "F16", "BF16", "F64")
_FACTORS = {"A": ".lora_A.weight", "B": ".lora_B.weight"}
_PATTERNS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}
"""Keys whose value layers may have each their own of, and the keys that say so."""
_END_OF_NAME = re.compile(r"\^?[\w.-]+")
"""A key of a pattern that is no other regular expression than the end of a layer's name."""


@dataclass(frozen=True)
class PeftFolder:
    """One adapter."""

    path: Path
    lora_rank: int
    """r, the largest where layers differ in it."""
    gamma: float
    """The factor of B A x in all layers."""
    targets: tuple[str, ...] | str
    """Names of the adapted layers, as PEFT takes them."""
    base_name: str
    """Of the model that it was trained for, as the adapter says; perhaps empty."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of each tensor by its name in the model: LAYER.lora_A.weight, or a weight of a head."""
    client: str | None = None
    """Name of the client as sfed recorded it; None where no file says one."""
    labels: tuple[str | int, ...] | None = None
    """Of a classifier's classes in order; None where no file says them."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Full names of the adapted layers."""
        end = _FACTORS["A"]
        return tuple(sorted(n.removesuffix(end) for n in self.shapes if n.endswith(end)))

    @property
    def ranks(self) -> tuple[int, ...]:
        """The different LoRA ranks of its layers, the smallest first."""
        return tuple(sorted({s[0] for name, s in self.shapes.items() if factor_of(name) == "A"}))

    @property
    def head(self) -> tuple[str, ...]:
        """Names of the weights that were trained whole."""
        return tuple(sorted(name for name in self.shapes if factor_of(name) == "head"))

    def digest(self) -> str:
        """A digest of the bytes of its two files.

        Raises:
            OSError: where they cannot be read.
        """
        files = [describe(self.path / name) for name in (ADAPTER_CONFIG, ADAPTER_FILE)]
        return hashlib.blake2b(json.dumps(files).encode(), digest_size=8).hexdigest()


def factor_of(name: str) -> str:
    """Which factor a tensor is of: A, B or head."""
    return next((factor for factor, end in _FACTORS.items() if name.endswith(end)), "head")


def is_adapter(folder: Path) -> bool:
    """Whether a folder is to be that of an adapter."""
    return (folder / ADAPTER_CONFIG).is_file()


def find(folder: Path, key: str) -> list[PeftFolder]:
    """Read the adapter of a folder, or those of its subfolders.

    Args:
        folder: itself an adapter, or one with adapters.
        key: that names it, for errors.

    Raises:
        ConfigError: where there is none, or one that cannot be used.
    """
    said = f"{key} = {str(folder)!r}"
    if not folder.is_dir():
        raise ConfigError(f"{said}: the folder does not exist")
    try:
        inside = [] if is_adapter(folder) else sorted(filter(is_adapter, folder.iterdir()))
    except OSError as error:
        raise ConfigError(f"{said}: it cannot be read ({error.strerror})") from None
    if inside:
        return [read(path, key) for path in inside]
    if is_adapter(folder):
        return [read(folder, key)]
    beside = folder / "adapters"
    hint = f"; did you mean {beside}?" if beside.is_dir() else ""
    raise ConfigError(
        f"{said}: neither it nor a folder in it holds {ADAPTER_CONFIG}, so there is no adapter of "
        f"PEFT{hint}"
    )


def read(folder: Path, key: str = "") -> PeftFolder:
    """Read one adapter.

    Args:
        folder: of the adapter.
        key: that names it, for errors.

    Raises:
        ConfigError: where it is damaged, or holds what this trainer does not compute.
    """
    said = f"{key}: the adapter {folder}" if key else f"the adapter {folder}"
    try:
        settings = _mapping(folder / ADAPTER_CONFIG)
        _refuse_unknown(settings)
        shapes = _shapes(folder)
        of_layers = _ranks_and_gammas(settings, shapes)
        _check_factors(shapes, {layer: lora_rank for layer, (lora_rank, _) in of_layers.items()})
        found = PeftFolder(
            path=folder,
            lora_rank=max(lora_rank for lora_rank, _ in of_layers.values()),
            gamma=_common_gamma({layer: gamma for layer, (_, gamma) in of_layers.items()}),
            targets=(),
            base_name=mask(str(settings.get("base_model_name_or_path") or "")),
            shapes=shapes,
            client=_client(folder),
            labels=_labels(folder),
        )
    except OSError as error:
        name = Path(error.filename or folder).name
        raise ConfigError(f"{said}: {name} cannot be read ({error.strerror})") from None
    except SafetensorError as error:
        raise ConfigError(f"{said}: {ADAPTER_FILE} is damaged ({one_line(error)})") from None
    except ValueError as error:
        raise ConfigError(f"{said}: {one_line(error)}") from None
    targets = settings.get("target_modules")
    is_list = isinstance(targets, list) and all(isinstance(one, str) for one in targets)
    is_narrowed = settings.get("exclude_modules") or settings.get("layers_to_transform") is not None
    if is_narrowed or not (is_list or isinstance(targets, str)) or not targets:
        targets = list(found.layers)
    names = targets if isinstance(targets, str) else tuple(sorted(targets))
    return PeftFolder(**{**vars(found), "targets": names})


def _mapping(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{path.name} is larger than {_MOST_BYTES:,} bytes")
    try:
        value = json_text.read(path)
    except ValueError as error:
        raise ValueError(f"{path.name} is damaged, it is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} holds {type(value).__name__}, not an object")  # noqa: TRY004
    return value


def _refuse_unknown(settings: Mapping[str, Any]) -> None:
    """Refuse what would make the adapter compute something else than gamma B A x."""
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"peft_type is {shown(kind)}; only LORA is supported")
    for name, value in sorted(settings.items()):
        if name in _READ or name in _WITHOUT_EFFECT or value in (None, False, "", [], {}):
            continue
        if not any(value is one or value == one for one in _NEUTRAL.get(name, ())):
            raise ValueError(
                f"{name} = {shown(value, 100)} is not supported; save an adapter of plain LoRA "
                "(PEFT: LoraConfig without it)"
            )


def _rank_and_gamma(settings: Mapping[str, Any]) -> tuple[int, float]:
    lora_rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if type(lora_rank) is not int or not 0 < lora_rank < 2**31:
        raise ValueError(f"r = {shown(lora_rank)} is no rank")
    if type(alpha) not in (int, float) or not 0 < alpha < math.inf:  # type: ignore[operator]
        raise ValueError(f"lora_alpha = {shown(alpha)} is not a number above 0")
    of_rank = math.sqrt(lora_rank) if settings.get("use_rslora") else lora_rank
    return lora_rank, float(alpha) / of_rank  # type: ignore[arg-type]


def _ranks_and_gammas(
    settings: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, float]]:
    """The LoRA rank and gamma of each layer that has a factor, as PEFT reads patterns."""
    patterns = {key: _pattern(settings, name) for key, name in _PATTERNS.items()}
    found: dict[str, tuple[int, float]] = {}
    for name in shapes:
        layer = name.removesuffix(_FACTORS.get(factor_of(name), ""))
        if layer == name or layer in found:
            continue
        own = dict(settings)
        for key, pattern in patterns.items():
            own[key] = next((v for k, v in pattern if k.match(layer)), settings.get(key))
        found[layer] = _rank_and_gamma(own)
    return found


def _pattern(settings: Mapping[str, Any], name: str) -> list[tuple[re.Pattern[str], Any]]:
    """What a key says of single layers, by the end of their names; PEFT takes the first match."""
    pattern = settings.get(name) or {}
    if not isinstance(pattern, dict):
        raise ValueError(f"{name} = {shown(pattern, 100)} is no object")  # noqa: TRY004
    if odd := [key for key in pattern if not _END_OF_NAME.fullmatch(key)]:
        raise ValueError(
            f"{name}: the regular expression {shown(odd[0], 100)} is not supported; write names of "
            "layers, or the ends of them"
        )
    return [(re.compile(rf"(.*\.)?({key})$"), value) for key, value in pattern.items()]


def _common_gamma(gammas: Mapping[str, float]) -> float:
    """The gamma of all layers; alpha / r of another rank may be the float beside it."""
    first = next(iter(gammas))
    for layer, gamma in gammas.items():
        if not math.isclose(gamma, gammas[first], rel_tol=1e-12):
            raise ValueError(
                f"rank_pattern, alpha_pattern: layers differ in gamma = lora_alpha / r, which is "
                f"{gammas[first]:g} of {first} and {gamma:g} of {layer}; it must be the same of "
                "all. Multiply each B by its gamma and set lora_alpha to r, or score the adapter "
                "with PEFT"
            )
    return gammas[first]


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor, from the header."""
    path = folder / ADAPTER_FILE
    if not path.is_file():
        other = next(folder.glob("adapter_model.*"), None)
        instead = f"; {other.name} is there, save it as safetensors" if other else ""
        raise ValueError(f"{ADAPTER_FILE} is missing{instead}")
    shapes: dict[str, tuple[int, ...]] = {}
    with safe_open(str(path), framework="np") as tensors:
        for name in tensors.keys():  # noqa: SIM118  (it is no mapping)
            part = tensors.get_slice(name)
            if not name.startswith(PREFIX) or part.get_dtype() not in _DTYPES:
                raise ValueError(f"tensor {shown(name)} of {part.get_dtype()} is none of LoRA")
            shapes[name.removeprefix(PREFIX)] = tuple(part.get_shape())
    return shapes


def _check_factors(shapes: Mapping[str, tuple[int, ...]], ranks: Mapping[str, int]) -> None:
    """Check that each layer has A and B of its rank, and that there is no other tensor of LoRA."""
    layers: dict[str, set[str]] = {}
    for name, shape in shapes.items():
        factor = factor_of(name)
        if factor == "head":
            if ".lora_" in name:
                raise ValueError(f"tensor {shown(name)} is not supported: only A and B of layers")
            continue
        layer = name.removesuffix(_FACTORS[factor])
        if len(shape) != 2 or shape["AB".index(factor)] != ranks[layer]:
            raise ValueError(f"{name} has the shape {list(shape)} and r is {ranks[layer]}")
        layers.setdefault(layer, set()).add(factor)
    odd = sorted(layer for layer, factors in layers.items() if len(factors) == 1)
    if odd or not layers:
        raise ValueError(f"{odd[0]} lacks A or B" if odd else f"{ADAPTER_FILE} holds no A and B")


def _client(folder: Path) -> str | None:
    path = folder / CLIENT_FILE
    if not path.is_file():
        return None
    name = _mapping(path).get("name")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{CLIENT_FILE} has no name")
    return name


def _labels(folder: Path) -> tuple[str | int, ...] | None:
    path = folder / LABELS_FILE
    if not path.is_file():
        return None
    labels = json_text.read(path)
    if not isinstance(labels, list) or not all(type(one) in (str, int) for one in labels):
        raise ValueError(f"{LABELS_FILE} is no list of labels")
    return tuple(labels)


def by_client(
    found: Sequence[PeftFolder], names: Sequence[str], folders: Sequence[str], said: str
) -> list[PeftFolder]:
    """Return the adapter of each client: that of its name, or the only one for all.

    Args:
        found: the adapters of a folder.
        names: of the clients in order; "" of one without.
        folders: what sfed calls the folder of each client's adapter.
        said: key and folder, for errors.

    Raises:
        ConfigError: with all clients that have none.
    """
    named: dict[str, PeftFolder] = {}
    for one in found:
        name = one.path.name if one.client is None else one.client
        if name in named:
            raise ConfigError(
                f"{said}: {named[name].path.name} and {one.path.name} are both of client {name!r}; "
                "remove one of them"
            )
        named[name] = one
    own: list[PeftFolder] = []
    missing: list[str] = []
    for name, folder in zip(names, folders, strict=True):
        # A folder that says its client's name is of no other client, whatever it is called.
        adapter = named.get(mask(name)) if name else None
        if adapter is None and (by_folder := named.get(folder)) and by_folder.client is None:
            adapter = by_folder
        own += [] if adapter is None else [adapter]
        missing += [name or folder] if adapter is None else []
    if missing:
        clients = f"{len(missing)} clients have" if len(missing) > 1 else "a client has"
        raise ConfigError(
            f"{said}: {clients} no adapter there: {', '.join(map(shown, missing))}; the adapters "
            f"are of {', '.join(map(shown, sorted(named)))}. Give each client one, in a folder of "
            "its name, or name one adapter's folder for all"
        )
    return own
