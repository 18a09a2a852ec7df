"""Randomness as a function of what it is for, never of a generator's history.

So a resumed run draws what the uninterrupted one draws, and a client draws the same wherever it
is placed. Needs numpy only.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Stream(IntEnum):
    """What a draw is for: the first word of its seed, so that no two uses share numbers."""

    SPLIT = 1
    COHORT = 2
    HOLD_OUT = 3
    SUBSET = 4
    ORDER = 5
    INIT_A = 6
    DROPOUT = 7
    INIT_HEAD = 8
    SERVER_STEP = 9
    EVALUATED = 10


def generator(stream: Stream, *words: int) -> np.random.Generator:
    """Return a fresh generator for this use and these words, such as (seed, round, client)."""
    return np.random.default_rng([int(stream), len(words), *words])


def derive(stream: Stream, *words: int) -> int:
    """Return a 63-bit seed for a torch generator."""
    state = np.random.SeedSequence([int(stream), len(words), *words]).generate_state(1, np.uint64)
    return int(state[0]) >> 1


def mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return other words, one for each, in which every bit depends on every bit.

    SplitMix64's finalizer (Steele, Lea, Flood 2014, doi 10.1145/2660193.2660195).
    """
    words = (words ^ words >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ words >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return words ^ words >> np.uint64(31)


def mixed(word: int) -> int:
    """The signed form of one mixed word."""
    return int(mix(np.array([word], dtype=np.uint64)).view(np.int64)[0])
