"""Classification heads: found on the model and taken off it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
_STD = 0.02
Whole = Callable[[list[nn.Parameter]], AbstractContextManager[None]]


def hide_mismatched_head(config: Config, name: str) -> dict[str, str] | None:
    """Renames that hide a checkpoint's head of other classes.

    Loading into shards refuses what is of another size, whatever ``ignore_mismatched_sizes`` says.
    """
    task = task_of(config)
    if not task.is_classification or classes_of_checkpoint(config, name) == task.num_outputs:
        return None
    return {rf"^({'|'.join(_NAMES)})\.": r"of_other_classes.\1."}


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


def _refuse_random(loading: Mapping[str, Any], head_name: str | None, name: str) -> bool:
    """Refuse a model whose files lack weights; returns whether the head is new.

    Raises:
        UserError: transformers would train on random numbers in their place.
    """
    absent = {*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])}
    of_head = {key for key in absent if head_name and key.startswith(f"{head_name}.")}
    if missing := sorted(absent - of_head):
        raise UserError(
            f"model.name = {name!r}: its files lack {len(missing)} weights that its config.json "
            f"asks for, such as {missing[0]}"
        )
    return bool(of_head)


def detach_head(
    config: Config, model: PreTrainedModel, loading: Mapping[str, Any], whole: Whole
) -> Head | None:
    """Put a head with the clients' own weights in the place of the model's, before it is sharded.

    A head that the model's files hold is where every client starts; a new one is drawn from the
    seed, the same for all.

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
    name = name_of(config, model)
    is_new = _refuse_random(loading, name, config.model.name)
    if name is None:
        return None
    template = model.get_submodule(name)
    named = dict(template.named_parameters())
    with whole(list(named.values())):
        initial = {key: weight.detach().float().cpu().clone() for key, weight in named.items()}
    if is_new:
        std = float(getattr(model.config, "initializer_range", _STD))
        generator = torch.Generator().manual_seed(derive(Stream.INIT_HEAD, config.seed))
        for _, weight in sorted(initial.items()):  # as transformers does: biases begin at 0
            weight.normal_(0.0, std, generator=generator) if weight.dim() > 1 else weight.zero_()
    layer = StackedHead(template)
    model.set_submodule(name, layer)
    return Head(name, layer, initial)
