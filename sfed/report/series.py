"""Numbers of run records as series: by round, by score and by kind of adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sfed.observability import metrics
from sfed.storage.run_record import LOSS, Event, RunRecord, clients_of, held_out, number

Reader = Callable[[RunRecord, Event], float | None]
"""Takes one number out of a round of a run."""


def reader(key: str) -> Reader:
    """Read the number under a key of the round."""
    return lambda _, event: number(event, key)


def held_out_reader(kind: str, what: str = LOSS) -> Reader:
    """Read a held-out loss or score, the unweighted mean over clients."""
    return lambda _, event: held_out(event, kind, what)


def perplexity_reader(kind: str) -> Reader:
    """Read exp(loss) where losses are nats per token."""
    return lambda story, event: (
        metrics.perplexity(held_out(event, kind)) if story.by_token else None
    )


def last_samples(story: RunRecord) -> tuple[int, list[tuple[int, Event]]]:
    """The last round with generated text, and (client, sample) pairs; round 0 and none without."""
    for event in reversed(story.rounds):
        found: list[tuple[int, Event]] = [
            (entry["client"], sample)
            for entry in clients_of(event)
            if isinstance(entry.get("samples"), list)
            for sample in entry["samples"]
            if isinstance(sample, dict)
        ]
        if found:
            return int(event["round"]), found
    return 0, []


def main_scores(stories: Sequence[RunRecord]) -> list[str]:
    """The main score of each run; a single name as a rule."""
    return list(dict.fromkeys(story.score_names[0] for story in stories if story.score_names))


def unit_of(stories: Sequence[RunRecord]) -> str:
    """The unit of the losses in brackets; nothing where runs have different ones."""
    units = {story.unit for story in stories}
    return f" ({units.pop()})" if len(units) == 1 else ""


def sample_of(event: Event) -> list[int] | None:
    """The clients that were evaluated in a round; None where all were."""
    found = event.get(metrics.SAMPLE)
    return [one for one in found if type(one) is int] if isinstance(found, list) else None


def evaluated_of(event: Event) -> list[Event]:
    """The clients of an evaluated round that were evaluated."""
    sample, entries = sample_of(event), clients_of(event)
    if sample is None:
        return entries
    asked = set(sample)
    return [entry for entry in entries if entry["client"] in asked]
