"""Load the tokenizer of a model, and give it the model's end mark."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerFast

from sfed.config.schema import Config
from sfed.models.hf_config import read_model_config, told_by
from sfed.utils.errors import UserError


def load_tokenizer(config: Config, name: str) -> tuple[PreTrainedTokenizerFast, str]:
    """Read the tokenizer of a model.

    A tokenizer that names no eos gets the one of generation_config.json, or of config.json, where
    its vocabulary holds it; how texts become tokens stays as it is.

    Args:
        config: of the run.
        name: hub id or folder of the model.

    Returns:
        The tokenizer, and the name of the file that its eos is from where it names none itself.

    Raises:
        UserError: where there is none, or it is no fast one.
    """
    read_model_config(config, name)  # names a model that is not there
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, trust_remote_code=config.backbone.trust_remote_code
        )
    except Exception as error:  # noqa: BLE001  (tokenizers raises Exception itself)
        raise UserError(
            f"model.name = {name!r} has no readable tokenizer: {told_by(error)}"
        ) from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"model.name = {name!r}: its tokenizer is not a fast one (tokenizer.json)")
    if tokenizer.eos_token_id is not None:
        return tokenizer, ""
    sources = {
        "generation_config.json": _generation_eos(name),
        "config.json": _configured_eos(name),
    }
    for file, found in sources.items():
        if (mark := _first_known(tokenizer, found)) is not None:
            tokenizer.eos_token = mark
            return tokenizer, file
    return tokenizer, ""


def _generation_eos(name: str) -> Any:
    """The eos of generation_config.json; None where there is no such file."""
    try:
        return GenerationConfig.from_pretrained(name).eos_token_id
    except Exception:  # noqa: BLE001  (whatever the file holds)
        return None  # many models have none


def _configured_eos(name: str) -> Any:
    """The eos that config.json itself names: a class's default may be any token of another."""
    settings, _ = PreTrainedConfig.get_config_dict(name)
    of_text = settings.get("text_config")
    inner = of_text.get("eos_token_id") if isinstance(of_text, dict) else None
    return settings.get("eos_token_id", inner)


def _first_known(tokenizer: PreTrainedTokenizerFast, found: Any) -> str | None:
    """The first of some ids that the vocabulary holds, as a token."""
    for number in found if isinstance(found, list | tuple) else [found]:
        is_id = isinstance(number, int) and not isinstance(number, bool)
        if is_id and 0 <= number < len(tokenizer):
            mark = tokenizer.convert_ids_to_tokens(number)
            if mark is not None:
                return str(mark)
    return None
