"""Sizes, counts and durations as text, and sizes from text."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

_MOST_NAMED = 8
_LONGEST_SENTENCE = 3  # times the length that is asked for
# A full stop is one where a capital letter or something quoted follows: not in "e.g. this".
_SENTENCE_END = re.compile(r"[.!?][)\"'`\]]?(?= [A-Z\"'`(\[])")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([MGT]i?B)")
_UNITS = {"MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def duration(seconds: float) -> str:
    """Say a duration in words: 45 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def delta_text(delta: float, num_clients: float) -> str:
    """A delta of differential privacy, and what is wrong with one that is too large.

    Publishing all of one client, drawn at random, has epsilon 0 at delta 1 / N.
    """
    if delta < 1 / num_clients:
        return f"{delta:.4g}"
    return f"{delta:.4g}, not below 1 / N = {1 / num_clients:.4g}: this protects no single client"


def counted(count: int, noun: str) -> str:
    """A number of things: 1 client, 2 clients."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def span(values: Sequence[float], form: str = "g") -> str:
    """The least and the most of some numbers: 8, or 4 to 64."""
    least, most = f"{min(values):{form}}", f"{max(values):{form}}"
    return least if least == most else f"{least} to {most}"


def one_line(error: object, most: int = 300) -> str:
    """Return a text, such as that of an error, on one line and without what makes it too long.

    It ends with a sentence where one ends within ``most`` characters, else with the first sentence.
    A sentence that is several times longer ends after a word, with an ellipsis.
    """
    whole = " ".join(str(error).split())
    if len(whole) <= most:
        return whole
    ends = [match.end() for match in _SENTENCE_END.finditer(whole)] + [len(whole)]
    end = max((end for end in ends if end <= most), default=ends[0])
    if end <= _LONGEST_SENTENCE * most:
        return whole[:end]
    return f"{whole[:most].rsplit(' ', 1)[0]} ..."


def some_of(values: Sequence[object], form: Callable[[object], str] = repr) -> str:
    """Name the first few values, each in a form: 'a', 'b' and 3 more."""
    listed = [form(value) for value in values]
    more = f" and {len(listed) - _MOST_NAMED} more" if len(listed) > _MOST_NAMED else ""
    return ", ".join(listed[:_MOST_NAMED]) + more


def printable(text: object, keep: str = "") -> str:
    r"""Return a text in which what a terminal would obey, or cannot show, is written out.

    Control characters, line breaks, marks that turn the direction of writing, and halves of
    surrogate pairs become what Python writes for them, such as ``\x1b``.

    Args:
        text: such as a name that comes from data.
        keep: characters that stay as they are, such as line breaks of a message.
    """
    whole = str(text)
    if whole.isprintable():
        return whole
    return "".join(
        letter if letter.isprintable() or letter in keep else ascii(letter)[1:-1]
        for letter in whole
    )


def shown(value: object, most: int = 200) -> str:
    """Return a value as Python writes it, cut to about ``most`` characters: for messages."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def parse_size(text: str) -> int | None:
    """Return the bytes of a size such as 80GiB; None for other texts."""
    match = _SIZE.fullmatch(text)
    return int(float(match[1]) * _UNITS[match[2]]) if match else None


def size_text(num_bytes: float, decimals: int = 1) -> str:
    """A size as people read it: 12.6 GiB, 319.8 MiB."""
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.{decimals}f} GiB"
    return f"{num_bytes / 2**20:.{decimals}f} MiB"


def natural(text: str) -> list[tuple[int, str]]:
    """Sort key that puts label 7 before label 28."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)
    ]
