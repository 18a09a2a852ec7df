"""What of a run, and of several runs, is worth a picture. Needs no torch."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sfed import figures, metrics
from sfed.figures import Bars, Curve, Panel
from sfed.stories import (
    KINDS,
    Group,
    Story,
    clients_of,
    deviation,
    group,
    number,
    settings,
)

LOSS, PERPLEXITY, ROUND = "held-out loss (nats/token)", "perplexity per token", "round"
BYTES = {"federated message": metrics.UPLOADED_BYTES, "for evaluation": metrics.EVALUATION_BYTES}
SECONDS = {
    "local training": metrics.LOCAL_SECONDS,
    "aggregate": metrics.AGGREGATE_SECONDS,
    "evaluate": metrics.EVALUATE_SECONDS,
}
_MOST_CLIENT_LINES = 12
_MOST_LABELS = 16
_LARGEST_EXPONENT = 700


@dataclass(frozen=True)
class Picture:
    """A figure that is ready to be written and shown."""

    name: str
    caption: str
    png: bytes


def pictures_of(story: Story) -> list[Picture]:
    """All figures of one run for which there are numbers."""
    thin = "each client thin" if len(story.sizes) <= _MOST_CLIENT_LINES else "clients in grey"
    losses = [_held_out_panel(story, kind, LOSS) for kind in KINDS]
    perplexities = [_held_out_panel(story, kind, PERPLEXITY, math.exp) for kind in KINDS]
    training = [
        _panel(story, "training loss of the round", "nats/token", metrics.TRAIN_LOSS, "train_loss"),
        _panel(story, "gradient before clipping", "L2 norm", metrics.GRAD_NORM, "grad_norm"),
    ]
    made = [
        curves("held-out-loss", f"Held-out loss: mean over clients thick, {thin}.", losses),
        curves(
            "perplexity",
            f"Held-out perplexity, exp(loss): exp of the mean loss thick, {thin}.",
            perplexities,
        ),
        curves(
            "training",
            f"Training: mean (loss over tokens, norm over steps) thick, {thin}.",
            training,
        ),
        _costs(story),
        _partition(story),
    ]
    return [picture for picture in made if picture is not None]


def curves(name: str, caption: str, panels: Sequence[Panel]) -> Picture | None:
    """A picture of the panels that have curves; None where none has."""
    shown = [panel for panel in panels if panel.curves]
    share_y = len({panel.y_label for panel in shown}) == 1
    return Picture(name, caption, figures.curves(shown, ROUND, share_y=share_y)) if shown else None


def _held_out_panel(
    story: Story, kind: str, y_label: str, change: Callable[[float], float] | None = None
) -> Panel:
    keys = f"eval/{kind}_loss_unweighted", f"{kind}_loss"
    return _panel(story, KINDS[kind], y_label, *keys, change)


def _panel(
    story: Story,
    title: str,
    y_label: str,
    mean_key: str,
    client_key: str,
    change: Callable[[float], float] | None = None,
) -> Panel:
    """The mean thick and each client thin; clients in grey and without names where many."""
    lines: dict[int, list[tuple[float, float]]] = {}
    for event in story.rounds:
        entries = [(-1, number(event, mean_key))]
        entries += [(entry["client"], number(entry, client_key)) for entry in clients_of(event)]
        for client, value in entries:
            if value is not None and (change is None or value < _LARGEST_EXPONENT):
                point = float(event["round"]), change(value) if change else value
                lines.setdefault(client, []).append(point)
    role = "client" if len(story.sizes) <= _MOST_CLIENT_LINES else "crowd"
    curves = [
        Curve("mean over clients", line, role="mean")
        if client < 0
        else Curve("each client" if role == "crowd" else story.title(client), line, role=role)
        for client, line in sorted(lines.items())
    ]
    return Panel(title, y_label, curves, log=change is not None)


def _costs(story: Story) -> Picture | None:
    panels = [
        _bars(story, "bytes sent", "MiB", BYTES, 2.0**20),
        _bars(story, "time of the round", "s", SECONDS, 1.0),
    ]
    shown = [panel for panel in panels if any(map(any, panel.parts.values()))]
    caption = (
        "What a round costs: the federated message and, apart from it, what putting the global "
        "adapter together for evaluation sends; seconds of the parts of a round. Round 0 is the "
        "state before training."
    )
    return Picture("cost", caption, figures.stacked(shown)) if shown else None


def _bars(story: Story, title: str, unit: str, keys: Mapping[str, str], of: float) -> Bars:
    parts = {
        label: [(number(event, key) or 0.0) / of for event in story.rounds]
        for label, key in keys.items()
    }
    return Bars(title, ROUND, unit, [float(e["round"]) for e in story.rounds], parts)


def _partition(story: Story) -> Picture | None:
    if not any(story.sizes.values()):
        return None
    clients = sorted(story.sizes)
    totals = Counter[str]()
    for counts in story.labels.values():
        totals.update(counts)
    common = [label for label, _ in totals.most_common()]
    if len(common) > _MOST_LABELS:
        common = common[: _MOST_LABELS - 1]
    parts = {
        label: [float(story.labels.get(c, {}).get(label, 0)) for c in clients]
        for label in sorted(common, key=_natural)
    }
    rest = [
        max(0.0, float(story.sizes[c]) - sum(heights[i] for heights in parts.values()))
        for i, c in enumerate(clients)
    ]
    if any(rest):
        parts["other labels" if parts else "examples"] = rest
    title = "training examples of each client" + (" by label" if common else "")
    bars = Bars(title, "client", "examples", [float(c) for c in clients], parts)
    return Picture("partition", "Which client holds what.", figures.stacked([bars]))


def _natural(label: str) -> list[tuple[int, str]]:
    """Sort key that puts label 7 before label 28."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", label)
    ]


def comparisons(stories: Sequence[Story]) -> list[Picture]:
    """The figures that hold several runs against each other."""
    groups = group(stories)
    caption = "Held-out loss of all runs, unweighted mean over clients." + (
        " Line: mean over the seeds; band: one standard deviation to either side."
        if any(len(one.stories) > 1 for one in groups)
        else ""
    )
    panels = [
        Panel(KINDS[kind], LOSS, [c for one in groups if (c := one.curve(kind)).points])
        for kind in KINDS
    ]
    made = [
        curves("compare-held-out-loss", caption, panels),
        _final(stories, "lora.rank", "LoRA rank r"),
        _final(stories, "federated.num_clients", "number of clients N"),
    ]
    return [picture for picture in made if picture is not None]


def _final(stories: Sequence[Story], name: str, x_label: str) -> Picture | None:
    """Final loss against a setting, a line per method; None where the setting does not vary."""
    placed = [s for s in stories if number({"x": settings(s).get(name)}, "x")]
    ticks = sorted({float(settings(story)[name]) for story in placed})
    if len(ticks) < 2:
        return None
    panels = []
    for kind, meaning in KINDS.items():
        lines = [_final_curve(one, name, kind) for one in group(placed, ignored=[name])]
        panels.append(Panel(meaning, LOSS, [line for line in lines if line.points]))
    shown = [panel for panel in panels if panel.curves]
    if not shown:
        return None
    caption = (
        f"Loss of the last evaluated round against the {x_label}; where there are several seeds, "
        "their mean and one standard deviation."
    )
    png = figures.curves(shown, x_label, ticks, share_y=True)
    return Picture(f"compare-{name.rpartition('.')[2].replace('_', '-')}", caption, png)


def _final_curve(line: Group, name: str, kind: str) -> Curve:
    by_x: dict[float, list[float]] = {}
    for story in line.stories:
        for loss in Group("", [story]).last(kind):
            by_x.setdefault(float(settings(story)[name]), []).append(loss)
    points = [(x, statistics.fmean(ys)) for x, ys in sorted(by_x.items())]
    several = any(len(ys) > 1 for ys in by_x.values())
    spread = [deviation(by_x[x]) if len(by_x[x]) > 1 else math.nan for x, _ in points]
    return Curve(line.label, points, spread if several else [])
