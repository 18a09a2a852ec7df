"""The tables of one run: facts, means, clients, samples, time. Needs no torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from sfed.observability import metrics
from sfed.report.series import evaluated_of, last_samples, sample_of
from sfed.storage.card_facts import privacy_of
from sfed.storage.run_record import (
    KINDS,
    LOSS,
    Event,
    RunRecord,
    clients_of,
    held_out,
    look,
    number,
    words_of,
)
from sfed.utils.text import duration, span

MEANS = {
    "unweighted": metrics.UNWEIGHTED,
    "by training examples": metrics.BY_EXAMPLES,
    "pooled": "",
}
MOST_SAMPLED_CLIENTS, MOST_SAMPLES, MOST_CHARACTERS = 8, 2, 600
NONE = "\N{EN DASH}"


@dataclass(frozen=True)
class Table:
    """A table of plain text; the page's templates escape it."""

    head: Sequence[str]
    """The heading of each column."""
    rows: Sequence[Sequence[str]]
    text_columns: int = 1
    """So many columns from the left hold text; the others hold numbers, aligned at the right."""
    groups: Sequence[tuple[str, int]] = ()
    """Headings above ``head``: each with the number of columns that it spans."""
    style: str = ""
    """A class of the page's style sheet."""


def show(value: float | None, form: str = ".4f") -> str:
    """A number as text, a dash for None."""
    if value is None:
        return NONE
    return f"{value:.4g}" if form == ".4f" and abs(value) >= 1e4 else f"{value:{form}}"


def lora_facts(story: RunRecord) -> tuple[str, str]:
    """LoRA rank and gamma of a run; the least and the most where clients have their own."""
    ranks, gammas = story.ranks, story.gammas
    return span(ranks) if ranks else NONE, span(gammas, ".4g") if gammas else NONE


def what_of(story: RunRecord, what: str) -> str:
    """The name of a score, or the loss and its unit."""
    return f"loss ({story.unit})" if what == LOSS else words_of(what)


def clients_tables(story: RunRecord) -> list[Table]:
    """Each client before training and after the last evaluated round; none before there is one.

    The main score and the loss stand side by side, further scores in tables of their own.
    """
    if not story.evaluated:
        return []
    shown = [*story.score_names[:1], LOSS, *story.score_names[1:]]
    return [_clients_table(story, shown[i : i + 2]) for i in range(0, len(shown), 2)]


def _clients_table(story: RunRecord, shown: Sequence[str]) -> Table:
    last, first = story.evaluated[-1], story.evaluated[0]
    before = clients_of(first) if first["round"] == 0 else []
    old = {entry["client"]: entry for entry in before}
    rows = [
        [
            str(entry["client"]),
            story.holds(entry["client"]) or NONE,
            show(number(entry, "examples"), ",.0f"),
            *(
                cell
                for what in shown
                for cell in _before_and_after(old.get(entry["client"], {}), entry, what)
            ),
        ]
        for entry in evaluated_of(last)
    ]
    head = ["client", "holds", "train examples"]
    parts = ["before", "after", "change", "global"] * len(shown)
    groups = [("", len(head)), *((what_of(story, what), 4) for what in shown)]
    return Table([*head, *parts], rows, text_columns=2, groups=groups, style="clients")


def _before_and_after(old: Event, new: Event, what: str) -> list[str]:
    """Before, after, change (of a loss in per cent, of a score as it is) and the global adapter."""
    key = "eval_loss" if what == LOSS else _personal_key(new, what)
    was, now = number(old, key), number(new, key)
    change = None if was is None or now is None else now - was
    text = show(change, "+.4f")
    if what == LOSS:
        text = f"{100 * change / was:+.1f} %" if was and change is not None else NONE
    return [show(was), show(now), text, show(number(new, f"global_{what}"))]


def _personal_key(entry: Event, what: str) -> str:
    personal = f"personal_{what}"
    return personal if personal in entry else f"global_{what}"


def means_table(story: RunRecord) -> Table:
    """Means over clients after the last evaluated round, and the best round beside them.

    The best of the rounds that evaluated the same clients: means over others tell nothing of it.
    """
    last = story.evaluated[-1] if story.evaluated else {}
    rows = []
    for what in story.held:
        named = ""
        for kind, meaning in KINDS.items():
            best = _best(story, kind, what)
            means = [held_out(last, kind, what, mean) for mean in MEANS.values()]
            if best == NONE and all(mean is None for mean in means):
                continue
            cells = [show(mean) for mean in means]
            name = "" if named == what else what_of(story, what)
            named = what
            rows.append([name, meaning, *cells, best])
    head = ["", "adapter and data", *MEANS, "best round, unweighted"]
    return Table(head, rows, text_columns=2, style="means")


def sample_words(story: RunRecord) -> str:
    """Of which clients the last evaluation is, where that is a sample; empty where it is all."""
    last = story.evaluated[-1] if story.evaluated else {}
    sample = sample_of(last)
    if sample is None:
        return ""
    return f"a sample of {len(sample):,} of {len(clients_of(last)):,} clients"


def pooled_over(story: RunRecord) -> str:
    """What a pooled mean counts."""
    if not story.by_token:
        return "examples"
    return "tokens (loss) or examples (scores)" if story.score_names else "tokens"


def _best(story: RunRecord, kind: str, what: str) -> str:
    same = sample_of(story.evaluated[-1]) if story.evaluated else None
    events = [event for event in story.evaluated if sample_of(event) == same]
    known = [(x, e["round"]) for e in events if (x := held_out(e, kind, what)) is not None]
    if not known:
        return NONE
    # the first of equal rounds, whichever way is better
    best, at = min(known) if what == LOSS else max(known, key=lambda pair: (pair[0], -pair[1]))
    return f"{show(best)} (round {at})"


def samples_table(story: RunRecord) -> Table:
    """Generated text of the last round that has some, a few clients and samples."""
    _, samples = last_samples(story)
    clients = list(dict.fromkeys(client for client, _ in samples))[:MOST_SAMPLED_CLIENTS]
    rows = [
        [
            story.title(client),
            *(_text(sample.get(name)) for name in ("prompt", "expected", "answer")),
        ]
        for client in clients
        for sample in [one for owner, one in samples if owner == client][:MOST_SAMPLES]
    ]
    head = ["client", "prompt", "expected", "answer"]
    return Table(head, rows, text_columns=len(head), style="samples")


def _text(value: object) -> str:
    text = value if isinstance(value, str) else ""
    return (text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}...") or NONE


def facts_table(story: RunRecord) -> Table:
    """What was run, in two columns."""
    config, last = story.config, story.rounds[-1] if story.rounds else {}
    speeds = [v for e in story.rounds if (v := number(e, metrics.TOKENS_PER_SECOND))]
    peaks = [v for e in story.rounds if (v := number(e, metrics.PEAK_BYTES))]
    sample = sample_words(story)
    model, task, kind = (
        str(look(config, name) or NONE) for name in ("model.name", "data.task", "partition.kind")
    )
    facts = {
        "rounds": story.progress,
        "model, data, partition": f"{model}, {task}, {kind}",
        **({"started from": story.started_from} if story.started_from else {}),
        **_left_out(story),
        **({"evaluated": f"{sample}, drawn from the seed"} if sample else {}),
        **_schedule(story),
        "seed": show(number(config, "seed"), ".0f"),
        "training examples": show(float(sum(story.sizes.values())) or None, ",.0f"),
        "parameters of an adapter": ("at most " if len(set(story.ranks)) > 1 else "")
        + show(number(config, "resolved.adapter_parameters"), ",.0f"),
        "processes": f"{show(number(config, 'resolved.world_size'), '.0f')} "
        f"({look(config, 'resolved.device') or NONE}, {look(config, 'resolved.dtype') or NONE})",
        "training loss of the last round": show(number(last, metrics.TRAIN_LOSS)),
        "time of all rounds": duration(total(story, metrics.ROUND_SECONDS)),
        **_privacy(story),
        "sent for training, by a process": mebibytes(total(story, metrics.UPLOADED_BYTES)),
        "median speed": f"{statistics.median(speeds):,.0f} tokens/s" if speeds else NONE,
        **_idle(story),
        "peak memory of a process": mebibytes(max(peaks)) if peaks else NONE,
    }
    return Table(["", ""], list(facts.items()), text_columns=2)


def _privacy(story: RunRecord) -> dict[str, str]:
    """The guarantee of what was sent, after the last round; nothing where privacy is off."""
    told = privacy_of(story.config, story.rounds[-1] if story.rounds else None)
    return {"differential privacy": told} if told else {}


def _left_out(story: RunRecord) -> dict[str, str]:
    """The clients that hold too few rows, where ``data.on_small_client=skip`` left some out."""
    names = look(story.config, "resolved.left_out_clients")
    shown = ", ".join(map(str, names)) if isinstance(names, list) else ""
    return {"left out, too few examples": shown} if shown else {}


def _schedule(story: RunRecord) -> dict[str, str]:
    """The schedule of the learning rate, where its number of rounds has changed."""
    name, parts = (
        look(story.config, "train.schedule"),
        look(story.config, "resolved.schedule_rounds"),
    )
    if name in (None, "constant") or not isinstance(parts, list) or len(parts) < 2:
        return {}
    told = [
        f"{show(number(part, 'rounds'), '.0f')} rounds from round "
        f"{show(number(part, 'from_round'), '.0f')} on"
        for part in parts
    ]
    return {"learning rate": f"{name} over {', '.join(told)}"}


def _idle(story: RunRecord) -> dict[str, str]:
    """How long processes waited for each other, where there are several and events say it."""
    shares = metrics.idle_shares(story.rounds)
    if len(shares) < 2:
        return {}
    mean, most = 100 * math.fsum(shares) / len(shares), 100 * max(shares)
    return {"idle share of the local steps": f"mean {mean:.0f} %, at most {most:.0f} %"}


def time_table(story: RunRecord) -> Table:
    """Where the time of a run went, over all its starts."""
    spent = metrics.time_spent([*story.rounds, *story.ends])
    whole = math.fsum(spent.values())
    rows = [
        [phase, f"{seconds:,.1f} s", f"{100 * seconds / whole:.1f} %"]
        for phase, seconds in spent.items()
    ]
    return Table(["phase", "time", "share"], rows)


def total(story: RunRecord, key: str) -> float:
    """The sum of a number over all rounds."""
    return math.fsum(number(event, key) or 0.0 for event in story.rounds)


def mebibytes(size: float) -> str:
    """Bytes as MiB with three digits."""
    return f"{size / 2**20:.3g} MiB" if size < 999.5 * 2**20 else f"{size / 2**20:,.0f} MiB"


def excluded(story: RunRecord) -> str:
    """Name who was left out of a mean because its numbers were not finite; empty for nobody."""
    left_out = [
        f"client {entry['client']} in round {event['round']}"
        for event in story.rounds
        for entry in clients_of(event)
        if entry.get("excluded") is True
    ]
    return ", ".join(left_out[:20]) + (", ..." if len(left_out) > 20 else "")
