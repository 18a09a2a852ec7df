"""Dropout masks: their definition, written once more, and what makes them look like chance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfed.kernels.interface import DropoutMask
from sfed.kernels.plain.dropout import dropout
from sfed.utils.rng import mix

WORD = 2**32


def is_dropped(key: int, number: int, probability: float) -> bool:
    """Of one number, in whole numbers without a bound."""
    first, second = key % WORD, key // WORD % WORD
    z = (first + number * 0x9E3779B9) % WORD
    z = (z ^ z >> 16) * 0x85EBCA6B % WORD
    z = (z ^ second ^ (z ^ second) >> 13) * 0xC2B2AE35 % WORD
    signed = z - WORD if z >= WORD // 2 else z
    return signed < round(probability * WORD) - WORD // 2


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(1, 40),
    st.sampled_from([0.0, 0.05, 0.3, 0.9]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_masks_are_those_of_the_definition(
    keys: list[int], word: int, width: int, probability: float, dtype: torch.dtype
) -> None:
    x = torch.arange(1.0, 1.0 + width, dtype=dtype).repeat(len(keys), 1)
    (found,) = dropout(DropoutMask(torch.tensor(keys), probability, word), x)
    for key, row in zip(keys, found, strict=True):
        for number, value in enumerate(row):
            kept = x[0, number] * (1.0 / (1.0 - probability))
            dropped = is_dropped((key ^ word) % 2**64, number, probability)
            assert value == (0.0 if dropped else kept)


def test_vectors_beyond_a_piece_have_the_masks_of_their_own_keys() -> None:
    keys_V = torch.arange(700) * 2**33 + 5
    x = torch.ones(700, 400)
    (together,) = dropout(DropoutMask(keys_V, 0.4), x)
    for vector in (0, 326, 327, 328, 699):
        (alone,) = dropout(DropoutMask(keys_V[vector : vector + 1], 0.4), x[:1])
        assert torch.equal(alone[0], together[vector])


def test_the_same_numbers_of_two_tensors_are_dropped() -> None:
    mask = DropoutMask(torch.arange(700) * 2**33 + 5, 0.4)
    x, other = torch.randn(2, 350, 400) + 9.0, torch.randn(700, 400) + 9.0
    together = dropout(mask, x, other)
    for tensor, dropped in zip((x, other), together, strict=True):
        assert torch.equal(dropped, dropout(mask, tensor)[0])
        assert dropped.shape == tensor.shape
    assert torch.equal(together[0].view(700, 400) == 0.0, together[1] == 0.0)


# Mixed as batches mix the places of tokens; and a counter in the first word, which is harder.
@pytest.mark.parametrize("is_mixed", [True, False])
@pytest.mark.parametrize("step", [1, 2**16, 0x9E3779B9])
@pytest.mark.parametrize("probability", [0.05, 0.5, 0.9])
def test_numbers_are_dropped_at_the_rate_and_independently(
    step: int, probability: float, is_mixed: bool
) -> None:
    """Bounds are five standard deviations, of 2 million numbers."""
    vectors, width = 2048, 1024
    places = np.arange(vectors, dtype=np.uint64) * np.uint64(step)
    keys_V = torch.from_numpy((mix(places) if is_mixed else places).view(np.int64))
    (numbers,) = dropout(DropoutMask(keys_V, probability), torch.ones(vectors, width))
    surplus = (numbers == 0.0).double() - probability
    variance = probability * (1 - probability)
    assert abs(float(surplus.mean())) < 5 * math.sqrt(variance / surplus.numel())
    for dim, count in ((0, vectors), (1, width)):  # of a number over vectors, and of a vector
        means = surplus.mean(dim=dim)
        assert float(means.abs().max()) < 5.5 * math.sqrt(variance / count)
        assert float(means.square().mean()) == pytest.approx(variance / count, rel=0.3)
    for shifted in ((0, 1), (1, 0), (0, 2), (1, 1), (16, 0), (0, 256), (64, 3)):
        together = surplus * surplus.roll(shifted, (0, 1))
        assert abs(float(together.mean())) < 5 * variance / math.sqrt(surplus.numel()), shifted


def test_a_layers_word_gives_masks_without_relation() -> None:
    keys_V = torch.arange(512) * 0x9E3779B97F4A7C15 % 2**61
    words = (0, 1, -7046029254386353131)
    surplus = [
        (dropout(DropoutMask(keys_V, 0.3, word), torch.ones(512, 1024))[0] == 0.0).double() - 0.3
        for word in words
    ]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert abs(float((surplus[one] * surplus[other]).mean())) < 5 * 0.21 / math.sqrt(2**19)
