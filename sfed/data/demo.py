"""The embedded demo: generated word problems for eight clients.

Nothing is downloaded. Each client owns one kind of arithmetic word problem in the form of GSM8K and
writes worked answers in its house style. Half of its questions come from a pool that all clients
share, so the style cannot be told from the question and one global adapter cannot suit everybody.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

Row = dict[str, str]
__all__ = ["KINDS", "pretraining_texts", "rows", "stream"]


@dataclass(frozen=True)
class House:
    """A client: how it writes a worked answer, and a question of its own."""

    opening: str
    operations: str  # the words before the annotation of a sum|difference|product|quotient
    link: str
    closing: str
    situation: tuple[str, str, str] = ("", "", "")  # question, shape of the calculation, unit


PEOPLE = ("Ann", "Ben", "Cara", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivan", "Jill", "Kim", "Leo")
THINGS = ("apples", "books", "cards", "coins", "eggs", "pens", "shells", "stamps", "toys", "cups")
SHARED = (
    ("{who} has {0} {things} and gets {1} more. How many {things} now?", "a+b", "{things}"),
    ("{who} has {0} {things} and gives away {1}. How many are left?", "a-b", "{things}"),
    ("{who} has {0} bags of {1} {things} each. How many {things}?", "a*b", "{things}"),
    ("{who} puts {0} {things} in {1} equal piles. How many per pile?", "a/b", "{things}"),
)
PLAIN = "{x} + {y} =|{x} - {y} =|{x} * {y} =|{x} / {y} ="
NEUTRAL = House("", PLAIN, "\n", "")
HOUSES = {  # a school, a shop, a kitchen, a warehouse, a bus company, a bank, a farm and a library
    "sums": House("Think step by step. ", PLAIN, ". Then ", ". So the answer is {r} {unit}.",
        ("{who} sees {0} {things} here and {1} there. How many?", "a+b", "{things}")),
    "change": House("Till receipt: ",
        "{x} plus {y} makes|{x} less {y} makes|{x} at {y} makes|{x} split {y} ways makes",
        ", next ", ". Thank you, {r} {unit}!",
        ("{who} buys {0} {things} at {1} dollars each and pays {2}. What is the change?",
         "c-a*b", "dollars")),
    "sharing": House("In our kitchen we ",
        "stir {y} into {x} for|take {y} from {x} for|lay {y} by {x} for|cut {y} ways {x} for",
        "; now ", ", so serve {r} {unit}.",
        ("{who} and friends, {1} in all, share {0} {things}. How many each?", "a/b", "{things}")),
    "packing": House("STOCK of {unit}: ", "{x}+{y}=|{x}-{y}=|{x}*{y}=|{x}/{y}=",
        " OK / ", " OK, TOTAL {r}",
        ("{who} packs {0} boxes of {1} {things} and {2} loose ones. How many?",
         "a*b+c", "{things}")),
    "travel": House("Driver log, ",
        "on from {x} by {y} to|back from {x} by {y} to|{x} for {y} legs to|{x} over {y} legs to",
        " then ", ". Arrived: {unit} {r}.",
        ("{who} drives {0} miles an hour for {1} hours. How many miles?", "a*b", "miles")),
    "savings": House("Dear customer, ",
        "credit {y} on {x}:|debit {y} on {x}:|{y} deposits of {x}:|one part in {y} of {x}:",
        " and ", ". Balance {r} {unit}, yours truly.",
        ("{who} saves {0} dollars a week for {1} weeks and spends {2}. How much is left?",
         "a*b-c", "dollars")),
    "harvest": House("Well, {unit} go ",
        "{x} and {y}, that's|{x} but {y}, that's|{x} rows by {y}, that's|{x} among {y}, that's",
        ", next ", ". A good {r}, I reckon.",
        ("{who} picks {0} {things} at dawn and {1} at dusk. How many?", "a+b", "{things}")),
    "reading": House("Note to reader: ",
        "({x} with {y}) gives|({x} without {y}) gives|({x} sets of {y}) gives|({x} in {y}) gives",
        " -> ", " -> return {r} {unit} please.",
        ("{who} has read {1} of {0} pages. How many are left?", "a-b", "pages")),
}  # fmt: skip
KINDS: tuple[str, ...] = tuple(HOUSES)
Problem = tuple[str, list[tuple[int, str, int, int]], str]  # question, steps (x, sign, y, r), unit


def _draw(house: House, rng: random.Random) -> Problem:
    """A problem whose numbers, final and intermediate, are small, whole and positive."""
    question, shape, unit = house.situation if rng.random() < 0.5 else rng.choice(SHARED)
    a, b, c, n = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 9), rng.randint(11, 40)
    p = a * b
    less, paid = min(c, p - 1), (p // 10 + 1) * 10
    numbers, steps = {
        "a+b": ((n, b), [(n, "+", b, n + b)]),
        "a-b": ((n, b), [(n, "-", b, n - b)]),
        "a*b": ((a, b), [(a, "*", b, p)]),
        "a/b": ((p, b), [(p, "/", b, a)]),
        "a*b+c": ((a, b, c), [(a, "*", b, p), (p, "+", c, p + c)]),
        "a*b-c": ((a, b, less), [(a, "*", b, p), (p, "-", less, p - less)]),
        "c-a*b": ((a, b, paid), [(a, "*", b, p), (paid, "-", p, paid - p)]),
    }[shape]
    words = {"who": rng.choice(PEOPLE), "things": rng.choice(THINGS)}
    return question.format(*numbers, **words), steps, unit.format(**words)


def _answer(problem: Problem, opening: House, working: House, closing: House) -> str:
    """The worked answer without its last line; its parts may be in the styles of several houses."""
    _, steps, unit = problem
    said = dict(zip("+-*/", working.operations.split("|"), strict=True))
    done = [f"{said[op].format(x=x, y=y)} <<{x}{op}{y}={r}>>{r}" for x, op, y, r in steps]
    end = closing.closing.format(r=steps[-1][3], unit=unit)
    return opening.opening.format(unit=unit) + working.link.join(done) + end


def stream(kind: str, seed: int, split: str = "", style: House | None = None) -> Iterator[Row]:
    """Generates endless word problems of one kind.

    A pure function of its arguments, alike in every process; some 20 microseconds per row. A
    question comes again only after a thousand draws without a new one.

    Args:
        kind: One of `KINDS`; another raises KeyError.
        seed: Another seed gives other rows.
        split: "train" or "eval"; empty for the questions of both.
        style: How answers are written; None for the style of the kind's client.

    Yields:
        A row with "question", "answer" (in the form of GSM8K) and "kind".
    """
    rng = random.Random(f"{kind}/{seed}")  # a string seeds alike in every process
    house = style or HOUSES[kind]
    seen: set[str] = set()
    misses = 0
    while True:
        problem = _draw(HOUSES[kind], rng)
        question, steps, _ = problem
        # By its digest, a question is in the same split for every kind and seed.
        belongs = "eval" if hashlib.sha256(question.encode()).digest()[0] < 64 else "train"
        if split and split != belongs:
            continue
        if question in seen and misses < 1000:
            misses += 1
            continue
        misses = 0
        seen.add(question)
        answer = f"{_answer(problem, house, house, house)}\n#### {steps[-1][3]}"
        yield {"question": question, "answer": answer, "kind": kind}


def rows(split: str, count_per_kind: int, seed: int) -> list[dict[str, str]]:
    """Generates the rows of all clients for training or for evaluation.

    As pure and as fast as `stream`. A question is in one split only, whatever kind and seed.

    Args:
        split: "train" (three quarters of all questions) or "eval"; another raises ValueError.
        count_per_kind: How many rows of each kind.
        seed: Another seed gives other rows of the same split.

    Returns:
        Rows as from `stream`, kind after kind in the order of `KINDS`.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split must be 'train' or 'eval', not {split!r}")
    streams = (stream(kind, seed, split) for kind in KINDS)
    return [row for stream in streams for row in islice(stream, count_per_kind)]


def pretraining_texts(problems_per_kind: int, remarks: int, seed: int) -> list[str]:
    """Plainly answered problems of the train split, and scraps of phrases from mixed houses."""
    streams = (stream(kind, seed, "train", NEUTRAL) for kind in KINDS)
    plain = [row for stream in streams for row in islice(stream, problems_per_kind)]
    texts = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in plain]
    rng, houses = random.Random(seed), list(HOUSES.values())
    for _ in range(remarks):
        whose, opening, working, closing = rng.choices(houses, k=4)
        texts.append(_answer(_draw(whose, rng), opening, working, closing))
    return texts
