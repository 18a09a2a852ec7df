"""Clients share passes, and documents rows, only where the start check found that to be right."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

from sfed.clients import store as client_store
from sfed.distributed.sync import gather_json
from sfed.distributed.world import World
from sfed.federated.context import Run
from sfed.memory.clients_per_pass import Sharing
from sfed.models.isolation import check
from sfed.models.trial_passes import Subject, ordinary_tokens


def ensure(run: Run, warn: Callable[[str], None]) -> Run:
    """Let a run share passes and rows only where that was found to be right. Collective.

    Args:
        run: of which nothing has trained.
        warn: takes a line.

    Raises:
        UserError: on every process, where the backbone cannot be trained with right numbers.
    """
    widest = max(run.sharing.of(own) for own in run.placement())
    found = check(_subject_of(run), partial(_first, run.world), shares_passes=widest > 1)
    if run.packing is not None and not found.documents_share_rows:
        warn(f"each sequence gets a row of its own: {found.packing_reason}")
        run.backbone.keep_documents_in_rows_of_their_own()
    if widest == 1 or found.clients_share_passes:
        return run
    warn(f"each client gets passes of its own: {found.reason}")
    sharing = Sharing(1, found.reason)
    rows = client_store.ClientRows(
        run.clients.own,
        run.clients.layout,
        run.world.device,
        clients_per_pass=1,
        moments=run.clients.moments,
    )
    return dataclasses.replace(run, sharing=sharing, clients=rows)


def _subject_of(run: Run) -> Subject:
    """The parts of a run that are tried."""
    rows = (some[client] for some in (run.data.train, run.data.held_out) for client in some)
    longest = max(int(max(examples.lengths, default=0)) for examples in rows)
    if run.config.evaluation.generate:
        longest = min(longest + run.config.evaluation.max_new_tokens, run.backbone.context_tokens)
    return Subject(
        run.backbone,
        run.adapters,
        run.world.device,
        ordinary_tokens(run.tokenizer, run.backbone.vocabulary_size),
        max(gather_json(run.world, "longest row", longest)),
        run.packing,
    )


def _first(world: World, reason: str | None) -> str | None:
    """The reason of the first process that has one. Collective."""
    found = gather_json(world, "checking the backbone", reason)
    return next((one for one in found if one), None)
