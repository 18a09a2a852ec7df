"""Values that are answered by name instead of by a list of those that are known."""

from __future__ import annotations

import pytest

from sfed.config.load import validate
from sfed.utils.errors import ConfigError


@pytest.mark.parametrize("value", ["fp16", "float16", "half"])
def test_fp16_is_refused_with_what_to_use(value: str) -> None:
    with pytest.raises(ConfigError) as refused:
        validate({"data": {"task": "demo"}, "model": {"dtype": value}})
    message = str(refused.value)
    assert f'model.dtype = "{value}": fp16 is not supported, because' in message
    assert "use bf16, or fp32 where" in message
    assert message.count("\n") == 1, "one mistake, one line"


@pytest.mark.parametrize("value", ["auto", "bf16", "fp32"])
def test_other_types_are_read_as_they_are(value: str) -> None:
    config = validate({"data": {"task": "demo"}, "model": {"dtype": value}})
    assert config.model.dtype == value
