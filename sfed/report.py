"""Report: ``python -m sfed.report RUN [RUN ...]`` turns run folders into one ``report.html``.

The page holds its figures and loads nothing. It works on a run that is still going on. Needs no
torch.
"""

from __future__ import annotations

import argparse
import base64
import math
import re
import statistics
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NoReturn

from sfed import cli, metrics
from sfed.cli import UserError
from sfed.console import duration
from sfed.pictures import Picture, comparisons, pictures_of
from sfed.stories import (
    KINDS,
    Group,
    Story,
    clients_of,
    deviation,
    group,
    held_out,
    look,
    number,
    read_story,
)

MEANS = {"unweighted": "_unweighted", "by training examples": "_by_examples", "by tokens": ""}
_NONE = "\N{EN DASH}"
_CSS = """
body { font: 15px/1.45 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: #111;
  background: #fff; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; } h3 { font-size: 1rem; }
table { border-collapse: collapse; margin: .5rem 0; font-size: .9rem; }
th, td { text-align: left; padding: .15rem .8rem .15rem 0; border-bottom: 1px solid #ddd;
  vertical-align: top; }
th:empty { padding: 0; } th { font-weight: 600; border-bottom: 1.5px solid #111; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
figure { margin: 1.2rem 0; } img { max-width: 100%; height: auto; }
figcaption, .note { color: #444; font-size: .85rem; }
@media print {
  @page { margin: 15mm; } body { max-width: none; margin: 0; padding: 0; font-size: 10pt; }
  section + section { break-before: page; } h2, h3 { break-after: avoid; }
  figure, tr { break-inside: avoid; } a { color: inherit; text-decoration: none; } }
"""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A table of cells that are HTML already; all columns but the first ``words`` are numbers."""

    def line(tag: str, cells: Sequence[str]) -> str:
        inner = "".join(
            f"<{tag}{'' if i < words else ' class=n'}>{cell}</{tag}>"
            for i, cell in enumerate(cells)
        )
        return f"<tr>{inner}</tr>"

    body = "\n".join(line("td", row) for row in rows)
    return f"<table><thead>{line('th', head)}</thead>\n<tbody>{body}</tbody></table>"


def show(value: float | None, form: str = ".4f") -> str:
    """A number as text, a dash for None."""
    if value is None:
        return _NONE
    return f"{value:.4g}" if form == ".4f" and abs(value) >= 1e4 else f"{value:{form}}"


def clients_table(story: Story) -> str:
    """Each client before training and after the last evaluated round."""
    if not story.evaluated:
        return "<p>No round has been evaluated yet.</p>"
    last, first = story.evaluated[-1], story.evaluated[0]
    before = clients_of(first) if first["round"] == 0 else []
    old = {entry["client"]: number(entry, "eval_loss") for entry in before}
    rows = []
    for entry in clients_of(last):
        was, now = old.get(entry["client"]), number(entry, "eval_loss")
        change = f"{100 * (now / was - 1):+.1f} %" if was and now is not None else _NONE
        rows.append(
            [
                str(entry["client"]),
                escape(story.holds(entry["client"])) or _NONE,
                show(number(entry, "examples"), ",.0f"),
                show(was),
                show(now),
                change,
                show(number(entry, "global_loss")),
            ]
        )
    head = ["client", "holds", "examples", "before", "after", "change", "global adapter"]
    return (
        f"<h3>Each client after round {last['round']}</h3>{table(head, rows, words=2)}"
        "<p class=note>Held-out loss in nats per token; before = before any training, global "
        "adapter = its loss on this client's data.</p>"
    )


def means_table(story: Story) -> str:
    """Means over clients after the last evaluated round, and the best round beside them."""
    if not story.evaluated:
        return ""
    last = story.evaluated[-1]
    rows = []
    for kind, meaning in KINDS.items():
        if held_out(last, kind) is None:
            continue
        all_rounds = [(x, e["round"]) for e in story.evaluated if (x := held_out(e, kind))]
        best, at = min(all_rounds)
        means = [show(held_out(last, kind, mean)) for mean in MEANS.values()]
        rows.append([meaning, *means, f"{show(best)} (round {at})"])
    head = ["adapter and data", *MEANS, "best round, unweighted"]
    return (
        f"<h3>Means over clients after round {last['round']}</h3>{table(head, rows)}"
        "<p class=note>Held-out loss in nats per token. The result is that of the last round; the "
        "best round is chosen with the held-out data itself, and so looks too good.</p>"
    )


def facts_table(story: Story) -> str:
    """What was run, in two columns."""
    config, last = story.config, story.rounds[-1] if story.rounds else {}
    speeds = [v for e in story.rounds if (v := number(e, metrics.TOKENS_PER_SECOND))]
    peaks = [v for e in story.rounds if (v := number(e, metrics.PEAK_BYTES))]
    model, task, kind = (
        str(look(config, name) or _NONE) for name in ("model.name", "data.task", "partition.kind")
    )
    facts = {
        "rounds": story.progress,
        "model, data, partition": f"{model}, {task}, {kind}",
        "seed": show(number(config, "seed"), ".0f"),
        "training examples": show(float(sum(story.sizes.values())) or None, ",.0f"),
        "numbers in an adapter": show(number(config, "resolved.adapter_parameters"), ",.0f"),
        "processes": f"{show(number(config, 'resolved.world_size'), '.0f')} "
        f"({look(config, 'resolved.device') or _NONE}, {look(config, 'resolved.dtype') or _NONE})",
        "training loss of the last round": show(number(last, metrics.TRAIN_LOSS)),
        "time of all rounds": duration(total(story, metrics.ROUND_SECONDS)),
        "sent by the federation": mebibytes(total(story, metrics.UPLOADED_BYTES)),
        "median speed": f"{statistics.median(speeds):,.0f} tokens/s" if speeds else _NONE,
        "most memory of a process": mebibytes(max(peaks)) if peaks else _NONE,
    }
    return table(["", ""], [[escape(name), escape(text)] for name, text in facts.items()], words=2)


def total(story: Story, key: str) -> float:
    """The sum of a number over all rounds."""
    return math.fsum(number(event, key) or 0.0 for event in story.rounds)


def mebibytes(size: float) -> str:
    """Bytes as MiB with three digits."""
    return f"{size / 2**20:.3g} MiB" if size < 1000 * 2**20 else f"{size / 2**20:,.0f} MiB"


def excluded_note(story: Story) -> str:
    """Who was left out of a mean because its numbers were not finite."""
    left_out = [
        f"client {entry['client']} in round {event['round']}"
        for event in story.rounds
        for entry in clients_of(event)
        if entry.get("excluded") is True
    ]
    text = ", ".join(left_out[:20]) + (", ..." if len(left_out) > 20 else "")
    return f"<p><b>Left out of the mean, not finite:</b> {text}.</p>" if left_out else ""


def heading(story: Story) -> str:
    """Name, method, N, r and gamma of a run, as plain text."""
    gamma, lora_rank = number(story.config, "resolved.gamma"), number(story.config, "lora.rank")
    return (
        f"{story.name}: {story.method}, N = {show(story.num_clients, 'g')}, "
        f"r = {show(lora_rank, 'g')}, gamma = {show(gamma, '.4g')}, {story.progress}"
    )


def images(pictures: Sequence[Picture]) -> str:
    """Figures with their captions; the numbers are in the page itself."""
    return "\n".join(
        f'<figure><img alt="{escape(p.caption)}" src="data:image/png;base64,'
        f'{base64.b64encode(p.png).decode()}"><figcaption>{escape(p.caption)}</figcaption></figure>'
        for p in pictures
    )


def run_section(story: Story, anchor: str, pictures: Sequence[Picture]) -> str:
    """All about one run."""
    return (
        f'<section id="{anchor}"><h2>{escape(heading(story))}</h2>\n{facts_table(story)}'
        f"{excluded_note(story)}{means_table(story)}{clients_table(story)}"
        f"<h3>Figures</h3>{images(pictures)}</section>"
    )


def comparison_section(stories: Sequence[Story], pictures: Sequence[Picture]) -> str:
    """Several runs against each other."""
    rows = [
        [
            f'<a href="#run-{i}">{escape(story.name)}</a>',
            escape(story.method),
            show(number(story.config, "seed"), ".0f"),
            show(story.num_clients, "g"),
            show(number(story.config, "lora.rank"), "g"),
            show(number(story.config, "resolved.gamma"), ".4g"),
            str(story.evaluated[-1]["round"]) if story.evaluated else _NONE,
            *(show(next(iter(Group("", [story]).last(kind)), None)) for kind in KINDS),
            mebibytes(total(story, metrics.UPLOADED_BYTES)),
            duration(total(story, metrics.ROUND_SECONDS)),
        ]
        for i, story in enumerate(stories, start=1)
    ]
    head = ["run", "method", "seed", "N", "r", "gamma", "round", *KINDS, "sent", "time"]
    seeds = [
        [escape(one.label), str(len(one.stories)), *(_mean_and_deviation(one, k) for k in KINDS)]
        for one in group(stories)
        if len(one.stories) > 1
    ]
    over = ["settings", "seeds", *KINDS]
    return (
        "<section><h2>Comparison</h2>"
        f"{table(head, rows, words=2)}<p class=note>personal and global: held-out loss of the last "
        "evaluated round in nats per token, unweighted mean over clients.</p>"
        + (
            f"<h3>Runs that differ only in the seed</h3>{table(over, seeds)}"
            "<p class=note>Mean over the runs and one standard deviation (n - 1).</p>"
            if seeds
            else ""
        )
        + f"{images(pictures)}</section>"
    )


def _mean_and_deviation(one: Group, kind: str) -> str:
    losses = one.last(kind)
    if not losses:
        return _NONE
    return f"{show(statistics.fmean(losses))} ± {show(deviation(losses))}"


def page(title: str, sections: Sequence[str]) -> str:
    """The whole page; its policy forbids loading anything."""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<style>{_CSS}</style></head>
<body>
<h1>{escape(title)}</h1>
{"".join(sections)}
</body></html>
"""


def write_report(stories: Sequence[Story], out: Path) -> Path:
    """Write ``report.html`` and ``figures/`` into ``out``; returns the page."""
    several = len(stories) > 1
    sections, written = [], []
    if several:
        compared = comparisons(stories)
        sections.append(comparison_section(stories, compared))
        written += [(picture.name, picture.png) for picture in compared]
    for i, story in enumerate(stories, start=1):
        pictures = pictures_of(story)
        prefix = f"{i:02d}-{re.sub(r'[^A-Za-z0-9._-]+', '_', story.name)}-" if several else ""
        sections.append(run_section(story, f"run-{i}", pictures))
        written += [(prefix + picture.name, picture.png) for picture in pictures]
    title = f"{len(stories)} federated runs" if several else f"Federated run {stories[0].name}"
    try:
        (out / "figures").mkdir(parents=True, exist_ok=True)
        for name, png in written:
            (out / "figures" / f"{name}.png").write_bytes(png)
        path = out / "report.html"
        path.write_text(page(title, sections), encoding="utf-8")
    except OSError as error:
        raise UserError(f"the report cannot be written to {str(out)!r}: {error.strerror}") from None
    return path


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see python -m sfed.report --help")


def main(arguments: Sequence[str]) -> None:
    """Read the run folders, write the report, say where it is."""
    parser = _Parser(
        prog="python -m sfed.report",
        description="Make one self-contained report.html, and figures/*.png, of run folders.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", type=Path, help="a run folder")
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="where to write; default: the run's own folder, or ./report for several runs",
    )
    options = parser.parse_args(list(arguments))
    stories = [read_story(run) for run in {run.resolve(): run for run in options.runs}.values()]
    if not stories:
        raise UserError("no runs given; name run folders, such as runs/demo, or see --help")
    out = options.out or (Path("report") if len(stories) > 1 else stories[0].folder)
    path = write_report(stories, out)
    sys.stdout.write(f"report   {path}\nfigures  {path.parent / 'figures'}\n")


if __name__ == "__main__":
    cli.run_command(main)
