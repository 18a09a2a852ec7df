"""Sizes and durations are written as people read them, and sizes are read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfed.utils.text import (
    counted,
    duration,
    one_line,
    parse_size,
    printable,
    shown,
    size_text,
)


@pytest.mark.parametrize(
    ("num_bytes", "decimals", "text"),
    [
        (0, 1, "0.0 MiB"),
        (2**20, 1, "1.0 MiB"),
        (2**30 - 1, 1, "1024.0 MiB"),
        (80 * 2**30, 1, "80.0 GiB"),
        (1.234 * 2**30, 2, "1.23 GiB"),
    ],
)
def test_a_size_has_one_unit_and_so_many_decimals(
    num_bytes: float, decimals: int, text: str
) -> None:
    assert size_text(num_bytes, decimals) == text


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("80GiB", 80 * 2**30), ("1.5 TB", 1_500_000_000_000), ("512MiB", 2**29), ("1GB", 10**9)],
)
def test_a_size_is_read(text: str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["80", "GiB", "80 gib", "80KiB", "-1GiB", "1e3GiB", ""])
def test_what_is_no_size_is_not_read(text: str) -> None:
    assert parse_size(text) is None


def test_a_duration_has_two_units_at_most() -> None:
    assert [duration(s) for s in (45.4, 200, 7500)] == ["45 s", "3 min 20 s", "2 h 5 min"]


def test_one_thing_is_no_plural() -> None:
    assert [counted(n, "client") for n in (0, 1, 2)] == ["0 clients", "1 client", "2 clients"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("a\nb\tc\x00", r"a\nb\tc\x00"),
        ("\u202eabc\u2066", r"\u202eabc\u2066"),
        ("\ud800", r"\ud800"),
        ("Zürich 東京 [b]", "Zürich 東京 [b]"),
    ],
)
def test_printable_writes_out_what_a_terminal_would_obey(text, expected):
    assert printable(text) == expected
    assert printable(f"{text}\n", keep="\n") == expected.replace(r"\n", "\n") + "\n"


def test_shown_is_cut():
    assert shown("ab") == "'ab'"
    assert len(shown("x" * 5000)) < 250


SENTENCES = (
    "The layer is missing. It has 3 weights, e.g. one of q_proj. Ask `them` for more! (See b.) End"
)


@pytest.mark.parametrize(
    ("most", "text"),
    [
        (200, SENTENCES),
        (60, "The layer is missing. It has 3 weights, e.g. one of q_proj."),
        (59, "The layer is missing. It has 3 weights, e.g. one of q_proj."),
        (58, "The layer is missing."),
        (12, "The layer is missing."),  # the first sentence, whole
        (80, "The layer is missing. It has 3 weights, e.g. one of q_proj. Ask `them` for more!"),
    ],
)
def test_a_text_that_is_too_long_ends_with_a_sentence(most: int, text: str) -> None:
    assert one_line(SENTENCES, most) == text


def test_a_sentence_that_is_far_too_long_ends_after_a_word_with_an_ellipsis() -> None:
    assert one_line("word " * 40, 12) == "word word ..."
    assert one_line("x" * 90, 12) == "x" * 12 + " ..."


@given(st.text(alphabet="aA. !(`\n", max_size=80), st.integers(1, 40))
def test_one_line_is_the_beginning_of_the_text_and_not_much_longer_than_asked(
    text: str, most: int
) -> None:
    whole, found = " ".join(text.split()), one_line(text, most)
    assert whole.startswith(found.removesuffix(" ..."))
    assert "\n" not in found
    assert len(found) <= max(3 * most, most + 4)
    if len(whole) <= most:
        assert found == whole
