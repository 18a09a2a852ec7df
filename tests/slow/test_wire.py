"""What a round puts on the wire between two nodes, by the counters of their network."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import runs
from tests.support.cables import sent, settings
from tests.support.netns import Node

pytestmark = [pytest.mark.netns, pytest.mark.dist, pytest.mark.slow]
SHORT, LONG = 1, 4
"""Rounds of two runs that differ in nothing else: start, evaluation and export drop out."""


def test_a_round_sends_a_and_under_five_percent_more_whatever_the_number_of_clients(
    nodes: tuple[Node, Node], tiny_folder: Path, tmp_path: Path
) -> None:
    """Two processes send S bytes each to sum S bytes: half of them, then half of the result.

    The five percent hold the headers, the words of the processes to each other and the ledger.
    """
    each = [(clients, rounds) for clients in (2, 8) for rounds in (SHORT, LONG)]
    cases = [settings(tiny_folder, tmp_path, clients, rounds) for clients, rounds in each]
    for traffic in sent(nodes, tmp_path, cases):
        for place, (num_clients, _) in enumerate(each[::2]):
            more = traffic[2 * place + 1].since(traffic[2 * place])
            rounds = LONG - SHORT
            folder = tmp_path / f"of-{num_clients}-for-{LONG}"
            a_factors = runs.factors(runs.adapters(folder)["client-0000"], "A")
            bytes_of_a = 4 * sum(tensor.numel() for tensor in a_factors.values())
            assert more.sent > rounds * bytes_of_a
            assert more.sent - more.resent < 1.05 * rounds * bytes_of_a
            assert runs.rounds(folder)[-1]["comm/uploaded_bytes"] == bytes_of_a
