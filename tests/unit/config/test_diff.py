"""Which keys a resumed run may change."""

from __future__ import annotations

from typing import Any

import pytest

from sfed.config.diff import comparable, differences
from sfed.config.load import validate
from sfed.config.schema import Config


def config_of(**model: Any) -> Config:
    return validate({"data": {"task": "demo"}, "model": model})


@pytest.mark.parametrize("before", ["sdpa", "eager", "auto"])
def test_attention_may_change_also_where_an_older_version_compared_it(before: str) -> None:
    now = comparable(config_of(attention="auto"), 2)
    assert differences(comparable(config_of(attention=before), 2), now) == []
    of_older_version = {**now, "model.attention": before}
    assert differences(of_older_version, now) == []


def test_the_type_of_the_backbone_may_not() -> None:
    before, now = (comparable(config_of(dtype=name), 2) for name in ("bf16", "fp32"))
    assert differences(before, now) == ["model.dtype: 'bf16' there, 'fp32' now"]


def test_the_arithmetic_of_the_backbone_may_not_and_its_storage_may() -> None:
    before = comparable(validate({"backbone": {"sharding": "none"}}), 2)
    now = comparable(validate({"backbone": {"compute": "fp8"}}), 2)
    assert differences(before, now) == ["backbone.compute: 'full' there, 'fp8' now"]
    of_older_version = {key: value for key, value in before.items() if "backbone" not in key}
    assert differences(of_older_version, before) == []
    assert len(differences(of_older_version, now)) == 1
