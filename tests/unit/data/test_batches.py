"""Tests of the order in which a client reads its examples, and of what a batch holds."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfed.data import batches
from sfed.data.batches import IGNORED_LABEL, Order, collate, draw, supervised_count
from sfed.data.packing import Packing
from sfed.data.tokenize import Examples, Row, Tokens

seeds = st.integers(min_value=0, max_value=2**40)
clients = st.integers(min_value=0, max_value=500)
sizes = st.integers(min_value=1, max_value=60)


@st.composite
def rows(draw):
    """A row of tokens as ``sfed.data.tokenize`` makes them: at least one token is supervised."""
    length = draw(st.integers(2, 40))
    ids = np.arange(1, length + 1, dtype=np.int32) + draw(st.integers(0, 10))
    prompt_length = draw(st.integers(0, length - 1))
    inner = st.integers(prompt_length + 1, length)
    edges = sorted(draw(st.sets(inner, max_size=6))) if prompt_length + 1 < length else []
    gaps = np.array(edges[: len(edges) // 2 * 2], dtype=np.int32).reshape(-1, 2)
    return Row(ids, prompt_length, None, gaps if len(gaps) else None)


def labels_of(row):
    """A label for each token, told from the edges one by one."""
    gaps = [] if row.gaps is None else row.gaps.tolist()
    is_read = [
        place < row.prompt_length or any(start <= place < end for start, end in gaps)
        for place in range(len(row.ids))
    ]
    pairs = zip(row.ids.tolist(), is_read, strict=True)
    return [IGNORED_LABEL if read else token for token, read in pairs]


batch_of_clients = st.lists(st.lists(rows(), max_size=5), min_size=1, max_size=4)


def make_examples(count):
    lengths = 2 + np.arange(count) % 5
    starts = np.concatenate([[0], np.cumsum(lengths)])
    flat = np.arange(starts[-1], dtype=np.int32)
    nothing = np.full(count, np.nan)
    ones, whole = np.ones(count, dtype=np.int32), np.zeros(count, dtype=np.int64)
    table = Tokens(flat, starts, ones, None, nothing, False, ("",), whole, left_out=0)
    return Examples(table, np.arange(count)[::-1].copy())


# --- order ---------------------------------------------------------------------------------------


@given(seeds, clients, sizes, st.integers(0, 20))
def test_every_epoch_holds_every_example_once(seed, client, size, epoch):
    order = Order(seed, client, size)
    assert sorted(order.at(epoch * size + place) for place in range(size)) == list(range(size))


@given(seeds, clients, sizes, st.lists(st.integers(0, 500), min_size=1))
def test_what_stands_at_a_position_does_not_depend_on_what_was_read_before(
    seed, client, size, positions
):
    read = Order(seed, client, size)
    assert [read.at(p) for p in positions] == [Order(seed, client, size).at(p) for p in positions]


def test_the_order_differs_between_epochs_clients_and_seeds():
    def epoch_of(seed, client, epoch):
        order = Order(seed, client, 30)
        return tuple(order.at(epoch * 30 + place) for place in range(30))

    orders = {epoch_of(seed, client, e) for seed in (0, 1) for client in (0, 1) for e in (0, 1)}
    assert len(orders) == 8


def test_rows_are_drawn_from_the_clients_own_examples_across_the_end_of_an_epoch():
    examples, order = make_examples(7), Order(0, 3, 7)
    drawn = draw(examples, order, start=5, count=6)
    assert len(drawn) == 6
    for position, (ids, prompt_length, *_) in enumerate(drawn, start=5):
        expected, expected_length, *_ = examples.row(Order(0, 3, 7).at(position))
        assert np.array_equal(ids, expected) and prompt_length == expected_length


# --- batches -------------------------------------------------------------------------------------


@given(batch_of_clients, st.integers(0, 2))
def test_a_batch_holds_the_rows_of_the_clients_in_order_and_ignores_the_rest(by_client, more):
    per_client = max(map(len, by_client)) + more or 1
    batch = collate(by_client, per_client)
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.input_ids.shape == batch.labels.shape
    assert batch.input_ids.shape[0] == per_client * len(by_client)
    assert batch.input_ids.shape[1] % 8 == 0
    for client, own in enumerate(by_client):
        for number in range(per_client):
            at = client * per_client + number
            row = own[number] if number < len(own) else Row(np.arange(0), 0)
            ids, labels = row.ids, batch.labels[at].tolist()
            assert batch.input_ids[at, : len(ids)].tolist() == ids.tolist()
            assert labels[: len(ids)] == labels_of(row)
            assert set(labels[len(ids) :]) <= {IGNORED_LABEL}


@given(batch_of_clients)
def test_positions_are_those_from_which_a_label_is_predicted(by_client):
    batch = collate(by_client, max(map(len, by_client)) or 1)
    width = batch.labels.shape[1]
    labels = batch.labels.flatten()
    expected = [i - 1 for i, label in enumerate(labels.tolist()) if label >= 0 and i % width]
    assert batch.positions.tolist() == (expected or [0])


@given(rows())
def test_the_answer_is_the_last_stretch_of_labels(row):
    labels = labels_of(row)
    last = max((i for i, one in enumerate(labels) if one != IGNORED_LABEL), default=None)
    if last is None:
        return
    first = last
    while first and labels[first - 1] != IGNORED_LABEL:
        first -= 1
    assert (row.answer.start, row.answer.stop) == (first, last + 1)


@given(batch_of_clients)
def test_padding_goes_no_further_than_the_next_multiple_of_eight(by_client):
    width = collate(by_client, 5).input_ids.shape[1]
    longest = max((len(ids) for own in by_client for ids, *_ in own), default=0)
    assert longest <= width < longest + 8 or (longest == 0 and width == 8)


@given(batch_of_clients, st.integers(0, 9))
def test_padding_goes_no_further_than_the_context_of_the_model(by_client, room):
    longest = max((len(ids) for own in by_client for ids, *_ in own), default=0)
    context = max(8, longest + room)
    width = collate(by_client, 5, context=context).input_ids.shape[1]
    assert width == min(collate(by_client, 5).input_ids.shape[1], context)


@given(batch_of_clients)
def test_supervised_count_are_those_that_a_shifted_loss_sees(by_client):
    per_client = max(map(len, by_client)) or 1
    labels = collate(by_client, per_client).labels.view(len(by_client), per_client, -1)
    seen = (labels[:, :, 1:] != IGNORED_LABEL).sum(dim=(1, 2)).tolist()
    assert [supervised_count(own) for own in by_client] == seen


def test_ignored_tokens_are_those_that_torch_ignores():
    loss = torch.nn.CrossEntropyLoss()
    assert loss.ignore_index == IGNORED_LABEL == batches.IGNORED_LABEL


@pytest.mark.parametrize("num_clients", [1, 3])
def test_an_empty_batch_has_a_row_for_each_client_and_nothing_to_learn(num_clients):
    batch = collate([[] for _ in range(num_clients)], 1)
    assert batch.input_ids.shape == (num_clients, 8)
    assert (batch.labels == IGNORED_LABEL).all()
    assert not batch.input_ids.any()


def test_a_batch_moves_as_a_whole():
    batch = collate([[], []], 1).to(torch.device("meta"))
    assert batch.input_ids.is_meta and batch.labels.is_meta


# --- keys of tokens ------------------------------------------------------------------------------


def keys_of_examples(batch, by_client):
    """client, number of the example -> keys of its tokens."""
    per_client = len(batch.input_ids) // len(by_client)
    found = {}
    for client, examples in enumerate(by_client):
        rows = slice(client * per_client, (client + 1) * per_client)
        places, keys = batch.places[rows], batch.token_keys[rows].numpy()
        used = batch.is_token[rows].numpy()
        for number, example in enumerate(examples):
            is_own = used & (places >> np.uint64(32) == number)
            found[client, number] = keys[is_own][: len(example.ids)].tolist()
    return found


@given(batch_of_clients, st.integers(0, 2**63 - 1))
def test_keys_follow_from_the_clients_seed_the_example_and_the_position(by_client, seed):
    """Not from rows, padding or who else is there; and no two tokens have the same."""
    seeds = [(seed + 7 * client) % 2**63 for client in range(len(by_client))]
    per_client = max(map(len, by_client)) or 1
    padded = collate(by_client, per_client).with_keys(seeds)
    packed = collate(by_client, per_client, Packing(2**31, math.inf, 0.0)).with_keys(seeds)
    found = keys_of_examples(padded, by_client)
    assert found == keys_of_examples(packed, by_client)
    for client, examples in enumerate(by_client):
        alone = collate([examples], len(examples) + 2).with_keys([seeds[client]])
        own = keys_of_examples(alone, [examples])
        for number in range(len(examples)):
            assert own[0, number] == found[client, number]
            assert len(found[client, number]) == len(examples[number].ids)
    together = [key for keys in found.values() for key in keys]
    assert len(set(together)) == len(together)


@given(batch_of_clients, st.integers(1, 3))
def test_keys_of_a_step_do_not_depend_on_its_micro_passes(by_client, micro):
    seeds, most = range(len(by_client)), max(map(len, by_client)) or 1
    whole = keys_of_examples(collate(by_client, most).with_keys(seeds), by_client)
    for first in range(0, most, micro):
        some = [examples[first : first + micro] for examples in by_client]
        found = keys_of_examples(collate(some, micro).with_keys(seeds, first), some)
        for (client, number), keys in found.items():
            assert keys == whole[client, first + number]


def test_keys_move_with_a_batch_and_there_are_none_unless_they_are_asked_for():
    batch = collate([[], []], 1)
    assert batch.token_keys is None and batch.to(torch.device("meta")).token_keys is None
    keyed = batch.with_keys([1, 2])
    assert keyed.token_keys.shape == keyed.input_ids.shape and keyed.token_keys.dtype == torch.int64
    assert keyed.to(torch.device("meta")).token_keys.is_meta
