"""What of a run is worth a picture. Needs no torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from sfed.observability import metrics
from sfed.report import plotting
from sfed.report.plotting import Bars, Curve, Panel
from sfed.storage.run_record import KINDS, LOSS, RunRecord, clients_of, number, words_of
from sfed.utils.text import natural

PERPLEXITY, ROUND = "perplexity per token", "round"
BYTES = {"federated message": metrics.UPLOADED_BYTES, "for evaluation": metrics.EVALUATION_BYTES}
SECONDS = {
    "local training": metrics.LOCAL_SECONDS,
    "aggregate": metrics.AGGREGATE_SECONDS,
    "evaluate": metrics.EVALUATE_SECONDS,
}
_MOST_CLIENT_LINES = 12
_MOST_LABELS = 16

Change = Callable[[float | None], float | None]


@dataclass(frozen=True)
class Picture:
    """A figure that is ready to be drawn."""

    name: str
    caption: str
    draw: Callable[[str], bytes]
    """Takes the kind of file: png, svg or pdf."""
    folded: str = ""
    """Where it stays folded away on the page until it is asked for: under this heading."""

    @cached_property
    def png(self) -> bytes:
        """The figure as the page shows it."""
        return self.draw("png")


@dataclass(frozen=True)
class _Measured:
    """Where a round's event holds a number: that of all clients, and that of each."""

    mean_key: str
    client_key: str


_TRAIN_LOSS = _Measured(metrics.TRAIN_LOSS, "train_loss")
_GRAD_NORM = _Measured(metrics.GRAD_NORM, "grad_norm")


def pictures_of(story: RunRecord) -> list[Picture]:
    """All figures of one run for which there are numbers."""
    thin = "each client thin" if len(story.sizes) <= _MOST_CLIENT_LINES else "clients in grey"
    made = [
        *(
            curves(
                f"score-{file_name(score)}",
                f"Held-out {words_of(score)}: mean over clients thick, {thin}. Higher is better.",
                [_held_out_panel(story, kind, score, words_of(score)) for kind in KINDS],
            )
            for score in story.score_names
        ),
        curves(
            "held-out-loss",
            f"Held-out loss: mean over clients thick, {thin}.",
            [_held_out_panel(story, kind, LOSS, f"held-out loss ({story.unit})") for kind in KINDS],
        ),
        curves(
            "perplexity",
            f"Held-out perplexity, exp(loss): exp of the mean loss thick, {thin}.",
            [_held_out_panel(story, kind, LOSS, PERPLEXITY, metrics.perplexity) for kind in KINDS],
        )
        if story.by_token
        else None,
        curves(
            "training",
            f"Training: mean (loss over all, norm over steps) thick, {thin}.",
            [
                _panel(story, "training loss of the round", story.unit, _TRAIN_LOSS),
                _panel(story, "gradient before clipping", "L2 norm", _GRAD_NORM),
            ],
        ),
        _adapters(story),
        _costs(story),
        _partition(story),
    ]
    return [picture for picture in made if picture is not None]


def curves(name: str, caption: str, panels: Sequence[Panel], folded: str = "") -> Picture | None:
    """A picture of the panels that have curves; None where none has."""
    shown = [panel for panel in panels if panel.curves]
    share_y = len({panel.y_label for panel in shown}) == 1
    draw = partial(plotting.curves, shown, share_y=share_y)
    return Picture(name, caption, draw, folded) if shown else None


def file_name(text: str) -> str:
    """Text as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text)


def _held_out_panel(
    story: RunRecord, kind: str, what: str, y_label: str, change: Change | None = None
) -> Panel:
    mean_key = metrics.held_out_key(kind, what, metrics.UNWEIGHTED)
    return _panel(story, KINDS[kind], y_label, _Measured(mean_key, f"{kind}_{what}"), change)


def _panel(
    story: RunRecord, title: str, y_label: str, measured: _Measured, change: Change | None = None
) -> Panel:
    """The mean thick and each client thin; clients in grey and without names where many."""
    lines: dict[int, list[tuple[float, float]]] = {}
    for event in story.rounds:
        entries = [(-1, number(event, measured.mean_key))]
        entries += [
            (entry["client"], number(entry, measured.client_key)) for entry in clients_of(event)
        ]
        for client, value in entries:
            value = change(value) if change else value
            if value is not None:
                lines.setdefault(client, []).append((float(event["round"]), value))
    role = "client" if len(story.sizes) <= _MOST_CLIENT_LINES else "crowd"
    curves = [
        Curve("mean over clients", line, role="mean")
        if client < 0
        else Curve("each client" if role == "crowd" else story.title(client), line, role=role)
        for client, line in sorted(lines.items())
    ]
    return Panel(title, y_label, curves, log=change is not None)


def _adapters(story: RunRecord) -> Picture | None:
    """How alike the clients' factors are, and how large the adapters' output is."""
    similar = [
        _line(story, f"clients' {factor}", key) for factor, key in metrics.SIMILARITIES.items()
    ]
    size = [_line(story, "output of the adapters", metrics.OUTPUT_RMS)]
    panels = [
        Panel(
            "how alike the clients are", "mean pairwise cosine", [c for c in similar if c.points]
        ),
        Panel("size of the output", "root mean square", [c for c in size if c.points]),
    ]
    caption = (
        "Adapters: mean cosine over all pairs of clients, of A and of B, after local training and "
        "before the mean; root mean square of gamma B A x over tokens and layers."
    )
    return curves("adapters", caption, panels)


def _line(story: RunRecord, label: str, key: str) -> Curve:
    pairs = [(float(event["round"]), number(event, key)) for event in story.rounds]
    return Curve(label, [(x, y) for x, y in pairs if y is not None])


def _costs(story: RunRecord) -> Picture | None:
    panels = [
        _bars(story, "bytes sent", "MiB", BYTES, 2.0**20),
        _bars(story, "time of the round", "s", SECONDS, 1.0),
    ]
    shown = [panel for panel in panels if any(map(any, panel.parts.values()))]
    caption = (
        "What a round costs: the federated message and, apart from it, what evaluation sends to "
        "put the global adapter together and to compare the clients; seconds of its parts. "
        "Round 0 is the state before training."
    )
    return Picture("cost", caption, partial(plotting.stacked, shown)) if shown else None


def _bars(story: RunRecord, title: str, unit: str, keys: Mapping[str, str], of: float) -> Bars:
    parts = {
        label: [(number(event, key) or 0.0) / of for event in story.rounds]
        for label, key in keys.items()
    }
    return Bars(title, ROUND, unit, [float(e["round"]) for e in story.rounds], parts)


def _partition(story: RunRecord) -> Picture | None:
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
        for label in sorted(common, key=natural)
    }
    rest = [
        max(0.0, float(story.sizes[c]) - sum(heights[i] for heights in parts.values()))
        for i, c in enumerate(clients)
    ]
    if any(rest):
        parts["other labels" if parts else "examples"] = rest
    title = "training examples of each client" + (" by label" if common else "")
    bars = Bars(title, "client", "examples", [float(c) for c in clients], parts)
    return Picture("partition", "Which client holds what.", partial(plotting.stacked, [bars]))
