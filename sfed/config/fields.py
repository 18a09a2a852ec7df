"""What all sections are made of, and how values that people write are read. Needs no torch."""

from __future__ import annotations

import math
import os
from fractions import Fraction
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

MOST_COUNT = 10**9
"""Of whatever is counted: with more, a slip of the finger would be a run without end."""
MOST_RANK = 2**16
"""No layer is wider."""
MOST_BATCH = 10**6
"""Sequences of a step."""


def number(value: Any) -> Any:
    """Read "1/2" or "-1/2" as a number; leave everything else to pydantic."""
    if isinstance(value, str):
        try:  # as a fraction 1e999999999 would be a number of that many digits
            found = float(Fraction(value)) if "/" in value else float(value)
        except (ValueError, ZeroDivisionError, OverflowError):
            found = math.nan
        if not math.isfinite(found):
            raise ValueError(f"{value!r} is no finite number")
        return found
    return value


def no_fp16(value: Any) -> Any:
    """Refuse fp16 by name, in any spelling; leave everything else to pydantic."""
    if value in ("fp16", "float16", "half"):
        raise ValueError(
            "fp16 is not supported, because small gradients become 0 in it without loss scaling; "
            "use bf16, or fp32 where the device does not compute bf16"
        )
    return value


def as_list(value: Any) -> Any:
    """Read a word as a list of one; leave everything else to pydantic."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def at_home(value: Any) -> Any:
    """Read ~ as the home folder, in a path or in each of several."""
    if isinstance(value, str):
        return os.path.expanduser(value)  # noqa: PTH111  (a Path drops ./ and a last slash)
    return tuple(map(at_home, value)) if isinstance(value, list | tuple) else value


def weights_by_label(value: Any) -> Any:
    """Read labels that are integers as text; leave everything that is no mapping to pydantic."""
    if not isinstance(value, dict):
        return value
    for label, weight in value.items():
        if type(weight) not in (int, float) or not 0 < weight < math.inf:
            raise ValueError(f"the weight of {label!r} is {weight!r}, not a number above 0")
    return {str(label) if type(label) is int else label: one for label, one in value.items()}


def ranks_by_client(value: Any) -> Any:
    """Read a list of LoRA ranks; leave a number to pydantic."""
    if isinstance(value, dict):
        raise ValueError("single clients stand in a section: clients: {NAME: {rank: R}}")  # noqa: TRY004
    if not isinstance(value, list | tuple):
        return value
    for one in value:
        if type(one) is not int or not 1 <= one <= MOST_RANK:
            raise ValueError(
                f"{one!r} is no LoRA rank, which is a whole number of 1 to {MOST_RANK}"
            )
    if not value:
        raise ValueError("the list is empty; give one rank for each client")
    return tuple(value)


Count = Annotated[int, Field(gt=0, le=MOST_COUNT)]
CountOrZero = Annotated[int, Field(ge=0, le=MOST_COUNT)]
Rank = Annotated[int, Field(gt=0, le=MOST_RANK)]
BatchSize = Annotated[int, Field(gt=0, le=MOST_BATCH)]
Label = str | int
Exponent = Annotated[float, BeforeValidator(number)]
Location = Annotated[str, BeforeValidator(at_home)]
Locations = Annotated[tuple[str, ...] | str | None, BeforeValidator(at_home)]


class Section(BaseModel):
    """Base of all sections: unknown keys refused, no coercion, immutable."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )
