"""Tests of the terminal's side of ``sfed chat``."""

from __future__ import annotations

import builtins
import io
import sys
from collections.abc import Iterator

import pytest

from sfed.chat import __main__ as chat
from sfed.chat.answers import _values
from sfed.utils.errors import DataError


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
    """Let these be typed at the prompt; an exception is a key that ends."""
    coming: Iterator[str | type[BaseException]] = iter(lines)

    def read(_: str) -> str:
        line = next(coming)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(builtins, "input", read)


def answer(line: str) -> str:
    if line == "bad":
        raise DataError("the prompt has 9 tokens")
    return f"so {line}\x1b[2J\nand\x9b"


def test_what_is_typed_is_answered_until_ctrl_d(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    typed(monkeypatch, "one", "  ", "bad", "two", EOFError)
    chat._talk(answer)
    shown = capsys.readouterr()
    assert shown.out == "so one\\x1b[2J\nand\\x9b\nso two\\x1b[2J\nand\\x9b\n"
    assert "the prompt has 9 tokens" in shown.err


def test_ctrl_c_is_left_to_the_command(monkeypatch: pytest.MonkeyPatch):
    typed(monkeypatch, "one", KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        chat._talk(answer)


def test_each_line_of_a_pipe_gets_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    bytes_in = io.BytesIO("grün\n\udcff".encode("utf-8", "surrogateescape") + b"\xff\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(bytes_in, encoding="ascii"))
    chat._answer_lines(answer)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["so grün\\x1b[2J\\nand\\x9b", "so \ufffd\ufffd\\x1b[2J\\nand\\x9b"]


def test_a_line_that_cannot_be_answered_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\nbad\n"))
    with pytest.raises(DataError, match=r"^line 2: the prompt has 9 tokens"):
        chat._answer_lines(answer)


def test_a_line_fills_in_the_only_column_and_an_object_names_several():
    one, two = ("question",), ("instruction", "input")
    assert _values("What?", [one]) == {"question": "What?"}
    assert _values('{"a": 1}', [one]) == {"question": '{"a": 1}'}
    assert _values('{"question": "x"}', [one]) == {"question": "x"}
    assert _values('{"input": "b", "instruction": "a"}', [("instruction",), two]) == {
        "input": "b",
        "instruction": "a",
    }
    assert _values("plain", [("instruction",), two]) == {"instruction": "plain"}
    with pytest.raises(DataError, match=r"reads 2 texts: write them as \{\"instruction\": "):
        _values("plain", [two])
