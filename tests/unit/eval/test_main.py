"""What ``sfed eval`` prints."""

from __future__ import annotations

from typing import Any

import pytest

from sfed.eval import __main__ as evaluation


def test_the_line_above_the_table_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    names = ("base model", "sums")
    entries: list[dict[str, Any]] = [
        {"name": name, "loss": loss, "perplexity": 10.0}
        for name, loss in zip(names, (2.0, 1.0), strict=True)
    ]
    evaluation._show(
        {
            "notes": [],
            "adapters": entries,
            "scores": [],
            "examples": 512,
            "loss_unit": "nats per token",
        }
    )
    first, *table = capsys.readouterr().out.splitlines()
    assert first == "held-out examples: 512; losses in nats per token"
    assert table[1].split() == ["|", "adapter", "|", "loss", "|", "change", "|", "perplexity", "|"]
    assert "-50.0%" in table[-2]
