"""Classification heads: found on the model and taken off it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sfed.config.schema import Config
from sfed.data.tasks import task_of
from sfed.lora.head import Head, StackedHead
from sfed.models.hf_config import classes_of_checkpoint
from sfed.utils.errors import UserError
from sfed.utils.rng import Stream, derive

# Names under which transformers keeps the head of a sequence classifier.
_NAMES = ("classifier", "score")
_POOLER, _PRE_CLASSIFIER, _HIDDEN = "pooler", "pre_classifier", "of_other_classes"
_STD = 0.02
Whole = Callable[[list[nn.Parameter]], AbstractContextManager[None]]


def hide_mismatched_head(config: Config, name: str) -> dict[str, str] | None:
    """Renames that hide a checkpoint's head of other classes.

    Loading into shards refuses what is of another size, whatever ``ignore_mismatched_sizes`` says.
    """
    task = task_of(config)
    if not task.is_classification or classes_of_checkpoint(config, name) == task.num_outputs:
        return None
    return {rf"^({'|'.join(_NAMES)})\.": rf"{_HIDDEN}.\1."}


def name_of(config: Config, model: PreTrainedModel) -> str | None:
    """The module that is the classification head; None for tasks without one."""
    if not task_of(config).is_classification:
        return None
    for name in _NAMES:
        if hasattr(model, name):
            return name
    raise UserError(
        f"model.name: {type(model).__name__} keeps its head in none of {', '.join(_NAMES)}; use a "
        "BERT, RoBERTa or LLaMA model"
    )


def _refuse_random(loading: Mapping[str, Any], drawn: Sequence[str], name: str) -> set[str]:
    """Refuse a model whose files lack weights of other modules than these; returns what they lack.

    Raises:
        UserError: transformers would train on random numbers in their place.
    """
    absent = {*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])}
    allowed = tuple(f"{module}." for module in drawn)
    if missing := sorted(key for key in absent if not key.startswith(allowed)):
        raise UserError(
            f"model.name = {name!r}: its files lack {len(missing)} weights that its config.json "
            f"asks for, such as {missing[0]}"
        )
    return absent


def modules_of(config: Config, model: PreTrainedModel, absent: Collection[str] = ()) -> list[str]:
    """The modules that each client trains whole: the head, and what belongs to it; else none.

    A pooler of which the checkpoint holds no weight belongs to the head, and DistilBERT's
    ``pre_classifier`` always does: PEFT saves every module whose name ends as that of a head.

    Args:
        config: of the run.
        model: with its head.
        absent: weights that the checkpoint does not hold.

    Raises:
        UserError: where the head is not found.
    """
    head = name_of(config, model)
    if head is None:
        return []
    found = [head]
    for name, module in model.named_modules():
        leaf, weights = name.rpartition(".")[2], [key for key, _ in module.named_parameters()]
        is_new = bool(weights) and all(f"{name}.{key}" in absent for key in weights)
        if leaf == _PRE_CLASSIFIER or (leaf == _POOLER and is_new):
            found.append(name)
    return found


def _is_replaced(loading: Mapping[str, Any], name: str) -> bool:
    """Whether the checkpoint has a head of other classes, which was not loaded."""
    others = [key for key, *_ in loading["mismatched_keys"]]
    hidden = [key for key in loading.get("unexpected_keys", ()) if key.startswith(f"{_HIDDEN}.")]
    return bool(hidden) or any(key.startswith(f"{name}.") for key in others)


def detach_head(
    config: Config, model: PreTrainedModel, loading: Mapping[str, Any], whole: Whole
) -> Head | None:
    """Put a head with the clients' own weights in the place of the model's, before it is sharded.

    A head that the model's files hold is where every client starts; a new one is drawn from the
    seed, the same for all. A pooler that the files do not hold is drawn and trained like it.

    Args:
        config: of the run.
        model: changed in place.
        loading: what transformers says of the weights that it did not find, or of another size.
        whole: gathers parameters that were loaded into shards. Collective where so.

    Returns:
        The head; None for tasks without one.

    Raises:
        UserError: where other weights than the head's are missing, or the head is not found.
    """
    modules = modules_of(config, model, set(loading["missing_keys"]))
    absent = _refuse_random(loading, modules, config.model.name)
    if not modules:
        return None
    name = modules[0]
    std = float(getattr(model.config, "initializer_range", _STD))
    generator = torch.Generator().manual_seed(derive(Stream.INIT_HEAD, config.seed))
    layers: dict[str, StackedHead] = {}
    initial: dict[str, torch.Tensor] = {}
    for module in modules:
        template = model.get_submodule(module)
        named = dict(template.named_parameters())
        with whole(list(named.values())):
            own = {key: weight.detach().float().cpu().clone() for key, weight in named.items()}
        if any(key.startswith(f"{module}.") for key in absent):
            _draw(own, std, generator)
        prefix = "" if module == name else f"{module}."
        initial |= {prefix + key: weight for key, weight in own.items()}
        layers[module] = StackedHead(template)
        model.set_submodule(module, layers[module])
    return Head(name, layers.pop(name), initial, layers, _is_replaced(loading, name))


def outline_head(config: Config, model: PreTrainedModel, *, with_new_layers: bool) -> Head | None:
    """Take the head off a model without weights, as ``detach_head`` does: its shapes alone.

    Args:
        config: of the run.
        model: on torch's meta device; changed in place.
        with_new_layers: whether the checkpoint lacks the layers that belong to a head only where
            they are new, such as BERT's pooler.

    Returns:
        The head, whose first weights are on the meta device; None for tasks without one.
    """
    everything = {name for name, _ in model.named_parameters()} if with_new_layers else set[str]()
    modules = modules_of(config, model, everything)
    if not modules:
        return None
    layers: dict[str, StackedHead] = {}
    shapes: dict[str, torch.Tensor] = {}
    for module in modules:
        template = model.get_submodule(module)
        prefix = "" if module == modules[0] else f"{module}."
        shapes |= {prefix + key: weight for key, weight in template.named_parameters()}
        layers[module] = StackedHead(template)
        model.set_submodule(module, layers[module])
    return Head(modules[0], layers.pop(modules[0]), shapes, layers)


def _draw(weights: Mapping[str, torch.Tensor], std: float, generator: torch.Generator) -> None:
    """Draw new weights in place as transformers does: biases begin at 0."""
    for _, weight in sorted(weights.items()):
        weight.normal_(0.0, std, generator=generator) if weight.dim() > 1 else weight.zero_()
