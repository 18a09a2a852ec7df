"""Which layers a model repeats, and which ones ``lora.target_modules`` names.

PEFT is not asked for this: in a mixture of experts it replaces names by those of other layers, in a
model for images and text it adapts the layers of both, and its messages print whole modules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sfed.utils.errors import UserError

_ALL_LINEAR = "all-linear"
_DIMENSIONS_OF_EXPERTS = 3  # experts, out, in

Targets = tuple[str, ...] | str
"""Names of layers, "all-linear", or a regular expression."""


def is_linear(module: nn.Module) -> bool:
    """Whether a layer can be adapted: a linear one of torch, of GPT-2, or a kind of linear layer.

    A router that is derived from torch's layer gives out more than its product.
    """
    is_derived = isinstance(module, nn.Linear) and "Linear" in type(module).__name__
    return is_derived or isinstance(module, Conv1D)


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear layer's weight is (in, out), as in GPT-2."""
    return isinstance(module, Conv1D)


def transformer_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers that the transformer repeats; [] where the model has no list of so many."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [one for one in model.modules() if isinstance(one, nn.ModuleList)]
    within = {inner for one in lists for inner in one.modules() if inner is not one}
    found = [list(one) for one in lists if len(one) == count and one not in within]
    return max(found, key=lambda layers: sum(map(num_weights, layers)), default=[])


def num_weights(module: nn.Module) -> int:
    """Weights of a module, sharded or not; those that it uses twice count once."""
    return sum(getattr(weight, "ds_numel", weight.numel()) for weight in module.parameters())


def chosen(model: Any, targets: Targets) -> list[str]:
    """Return the full names of the layers that targets name, sorted.

    In a model for images and text, "all-linear" and names without their parents mean layers of the
    language model alone.

    Args:
        model: a transformers model, before any adapter is attached.
        targets: as of the configuration.

    Raises:
        UserError: where a target names nothing, or a module that is not a linear layer.
    """
    modules, known = dict(model.named_modules()), linear_layers(model)
    if not isinstance(targets, str):
        names = _named(model, targets, known)
    elif targets.lower() == _ALL_LINEAR:
        names = known
    else:
        try:
            names = {name for name in modules if re.fullmatch(targets, name)}
        except re.error as error:
            reason = f"it is not a valid regular expression ({error})"
            raise wrong(targets, reason, known) from None
    if not names:
        raise wrong(targets, "it matches no layer of this model", known)
    for name in sorted(names):
        if not is_linear(modules[name]):
            raise wrong(targets, _not_linear(name, modules[name]), known)
    return sorted(names)


def _named(model: Any, targets: tuple[str, ...], known: set[str]) -> set[str]:
    """The modules whose names are these or end with them."""
    names, is_of_text = set[str](), _of_text(model)
    for target in targets:
        found = {
            name
            for name, _ in model.named_modules()
            if name == target or (name.endswith(f".{target}") and is_of_text(name))
        }
        if not found:
            raise wrong(targets, f"{target!r} is no layer of this model", known)
        names |= found
    return names


def linear_layers(model: Any) -> set[str]:
    """Full names of all linear layers of the language model or encoder but the output head."""
    is_of_text, output = _of_text(model), None
    if hasattr(model, "get_output_embeddings"):
        output = model.get_output_embeddings()
    return {
        name
        for name, module in model.named_modules()
        if is_linear(module) and module is not output and is_of_text(name)
    }


def _of_text(model: Any) -> Callable[[str], bool]:
    """Tell whether a module is of the part that reads text."""
    if model.config.get_text_config() is model.config:
        return lambda name: True
    part = model.get_decoder()
    prefix = next(f"{name}." if name else "" for name, m in model.named_modules() if m is part)
    return lambda name: name.startswith(prefix)


def _not_linear(name: str, module: nn.Module) -> str:
    kind = type(module).__name__
    if _holds_experts(module):
        return (
            f"{name} ({kind}) holds the weights of all experts as parameters, not as linear "
            "layers, and sfed adapts linear layers only"
        )
    return f"{name} ({kind}) is not a linear layer"


def _holds_experts(module: nn.Module) -> bool:
    weights = module.parameters(recurse=False)
    return any(weight.dim() == _DIMENSIONS_OF_EXPERTS for weight in weights)


def wrong(targets: Targets, reason: str, known: Iterable[str]) -> UserError:
    """The error of targets that cannot be adapted.

    Args:
        targets: as of the configuration.
        reason: a sentence without its full stop.
        known: layers that can be adapted; see ``linear_layers``.
    """
    shown = targets if isinstance(targets, str) else sorted(targets)
    remedy = f"name some of {', '.join(sorted(last_parts(known)))}, or choose another model.name"
    if not known:
        remedy = "no linear layer of this model can be adapted; choose another model.name"
    return UserError(f"lora.target_modules = {shown!r}: {reason}; {remedy}")


def last_parts(names: Iterable[str]) -> set[str]:
    """The names of layers within their parents."""
    return {name.rpartition(".")[2] for name in names}


def shortened(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """Names with which PEFT finds these layers and no others: last parts where those suffice."""
    elsewhere = last_parts(others)
    by_name = {name: name.rpartition(".")[2] for name in names}
    return sorted({name if last in elsewhere else last for name, last in by_name.items()})
