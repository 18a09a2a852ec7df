"""Tests of the report: made-up run folders in, one self-contained page and its figures out."""

from __future__ import annotations

import json
import re
import statistics
import struct
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sfed.report import __main__ as report
from sfed.report import comparison_tables, grouping, plotting, series, tables
from sfed.report.arms.convergence import reached
from sfed.report.comparison_figures import comparisons
from sfed.report.files import find_runs
from sfed.storage import run_record
from sfed.storage.run_record import open_run
from sfed.utils.command import run_command
from sfed.utils.errors import UserError
from tests.support import launchers
from tests.support.run_folders import costs, write_events, write_run

ROOT = Path(__file__).resolve().parents[3]
PERSONAL = series.held_out_reader("personal")
SINGLE = {"held-out-loss", "perplexity", "training", "cost", "partition"}


def client_entry(client: int, loss: float | None, number: int) -> dict:
    trained = number > 0 and loss is not None
    return {
        "client": client,
        "examples": 100 * (client + 1),
        "train_loss": loss if trained else None,
        "grad_norm": 0.5 if trained else None,
        "personal_loss": loss,
        "global_loss": None if loss is None else loss + 0.5,
        "eval_loss": loss,
    }


def round_event(number: int, losses: list[float]) -> dict:
    mean = statistics.fmean(losses)
    return {
        "event": "round",
        "round": number,
        "train/loss": mean if number else None,
        "adapter/grad_norm": 0.5 if number else None,
        "eval/personal_loss": mean + 0.001,
        "eval/personal_loss_unweighted": mean,
        "eval/personal_loss_by_examples": mean + 0.002,
        "eval/global_loss": mean + 0.5,
        "eval/global_loss_unweighted": mean + 0.5,
        "eval/global_loss_by_examples": mean + 0.502,
        **costs(is_trained=bool(number)),
        "clients": [client_entry(client, loss, number) for client, loss in enumerate(losses)],
    }


def make_run(
    folder: Path,
    losses: list[list[float]],
    *,
    seed: int = 0,
    method: str = "sfed",
    rank: int = 8,
    planned: int = 2,
    labels: list[dict] | None = None,
) -> Path:
    """A run folder with the losses of each client after each round."""
    num = len(losses[0]) if losses else 2
    folder.mkdir(parents=True)
    config = {
        "seed": seed,
        "model": {"name": "demo"},
        "data": {"task": "demo"},
        "partition": {"kind": "iid"},
        "lora": {"rank": rank},
        "federated": {"method": method, "num_clients": num, "num_rounds": planned},
        "output": {"name": folder.name},
        "resolved": {"num_clients": num, "gamma": 1.2345, "world_size": 1, "device": "cpu"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    parts = [{"client": c, "train": list(range(100 * (c + 1))), "eval": []} for c in range(num)]
    for part, counts in zip(parts, labels or [], strict=False):
        part["labels"] = counts
    (folder / "partition.json").write_text(json.dumps({"clients": parts}))
    events = [round_event(number, row) for number, row in enumerate(losses)]
    write_events(folder, events)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    losses = [[2.0, 3.0], [1.0, 1.5], [1.2, 1.7]]
    return make_run(tmp_path / "one", losses, labels=[{"farm": 60, "bank": 40}, {"shop": 200}])


def make_report(*arguments: object) -> str:
    report.main([str(argument) for argument in arguments])
    out = arguments[arguments.index("--out") + 1] if "--out" in arguments else arguments[0]
    return (Path(str(out)) / "report.html").read_text(encoding="utf-8")


def text_of(html: str) -> str:
    html = re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]*>", " ", html)))


def figures(folder: Path) -> set[str]:
    return {path.stem for path in (folder / "figures").glob("*.png")}


def test_a_run_becomes_a_page_with_its_figures(run: Path, capsys) -> None:
    words = text_of(make_report(run))
    assert str(run / "report.html") in capsys.readouterr().out
    assert "one: sfed, N = 2, r = 8, gamma = 1.234, 2 of 2 rounds" in words
    assert "0 farm 60 %, bank 40 % 100 2.0000 1.2000 -40.0 % 1.7000" in words
    assert "1 shop 200 3.0000 1.7000 -43.3 % 2.2000" in words
    assert figures(run) == SINGLE
    for path in (run / "figures").iterdir():
        png = path.read_bytes()
        assert png.startswith(b"\x89PNG\r\n\x1a\n")
        width, height = struct.unpack(">II", png[16:24])
        assert width > 1000
        assert height > 400
        assert len(png) > 10_000, "more than an empty page"


def test_clients_of_different_ranks_are_told_by_the_least_and_the_most(run: Path) -> None:
    """And are no point of a figure over r."""
    path = run / "config.json"
    facts = json.loads(path.read_text())
    facts["resolved"] |= {"ranks": [64, 4], "gamma": [0.25, 1.5]}
    path.write_text(json.dumps(facts))
    assert "N = 2, r = 4 to 64, gamma = 0.25 to 1.5, 2 of 2" in text_of(make_report(run))
    assert grouping.sweeps([run_record.open_run(run)]) == []
    facts["lora"]["rank"] = 2
    facts["resolved"] |= {"ranks": [16, 16], "gamma": 0.5}
    facts["clients"] = {"0": {"rank": 16, "lr": None}, "b.c": {"rank": 16, "lr": 0.1}}
    path.write_text(json.dumps(facts))
    [swept] = grouping.sweeps([run_record.open_run(run)])
    assert list(swept.cells) == [(2.0, 16.0)], "each client has another rank than lora.rank"
    known = grouping.settings(run_record.open_run(run))
    told = {key: value for key, value in known.items() if key.startswith("clients.")}
    assert told == {"clients.0 rank": 16, "clients.b.c rank": 16, "clients.b.c lr": 0.1}


def test_the_last_round_counts_and_the_best_is_named_so(run: Path) -> None:
    words = text_of(make_report(run))
    assert "Means over clients after round 2" in words
    assert "its own data 1.4500 1.4520 1.4510 1.2500 (round 1)" in words
    assert "best round, unweighted" in words


def test_the_best_round_is_one_of_those_that_evaluated_the_same_clients(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "sampled", rounds=3)
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    events[1]["eval/personal_loss_unweighted"] = 0.001
    for event in events[2:]:
        event["evaluated_clients"] = [1, 3]
    write_events(folder, events)
    story = open_run(folder)
    [personal, *_] = tables.means_table(story).rows
    assert "(round 3)" in personal[-1] and "0.001" not in personal[-1]
    assert [row[0] for row in tables.clients_tables(story)[0].rows] == ["1", "3"]
    assert reached(story, "personal", 0.01).round is None, "a mean over other clients"


@pytest.mark.parametrize("name", ["starts.jsonl", "metrics.jsonl"])
def test_seconds_after_the_last_round_are_counted_too(run: Path, name: str) -> None:
    with (run / name).open("a") as file:  # some older versions wrote them among the rounds
        end = {"event": "end", "time/checkpoint_seconds": 7.0, "time/export_seconds": 5.0}
        file.write(json.dumps(end) + "\n")
    story = open_run(run)
    spent = {row[0]: row[1] for row in tables.time_table(story).rows}
    assert spent["writing the adapters"] == "5.0 s" and spent["checkpoints"] == "7.0 s"
    assert all(event["event"] == "round" for event in story.rounds)


def test_the_page_says_where_the_time_went(run: Path) -> None:
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for event in events:
        event |= {"time/local_seconds": 6.0, "time/evaluate_seconds": 2.0}
        event["time/aggregate_seconds"] = None
    events[0] |= {"time/local_seconds": 0.0, "time/imports_seconds": 2.0}
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    words = text_of(make_report(run))
    assert (
        "phase time share imports 2.0 s 10.0 % evaluation before training 2.0 s 10.0 % "
        "local steps 12.0 s 60.0 % evaluation 4.0 s 20.0 %"
    ) in words


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Figures are made but not drawn, which is most of the time; for tests that read words."""
    monkeypatch.setattr(plotting, "_png", lambda *_: b"\x89PNG")
    monkeypatch.setattr(plotting, "_vector", lambda *_: b"%PDF")


class Loads(HTMLParser):
    """Everything that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        assert tag not in {"script", "iframe", "object", "embed"}
        names = ("src", "srcset", "href", "data", "action", "poster")
        self.found += [value for name, value in attrs if name in names]


@pytest.mark.usefixtures("undrawn")
def test_the_page_loads_nothing_from_elsewhere(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "two", [[2.0, 2.0], [1.0, 1.0]], seed=1)
    html = make_report(run, other, "--out", tmp_path / "out")
    loads = Loads()
    loads.feed(html)
    assert len(loads.found) > 10
    assert all(value.startswith(("data:", "#")) for value in loads.found)
    assert "url(" not in html
    assert "@import" not in html
    assert "default-src 'none'" in html


@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_a_run_that_is_still_going_on(tmp_path: Path, rounds: int) -> None:
    folder = make_run(tmp_path / "young", [[2.0, 3.0]] * rounds, planned=5)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"event": "round", "rou')  # half written
    words = text_of(make_report(folder))
    assert f"{max(0, rounds - 1)} of 5 rounds so far" in words
    assert ("No round has been evaluated yet" in words) == (rounds == 0)
    assert "partition" in figures(folder)
    assert ("held-out-loss" in figures(folder)) == (rounds > 0)


def nulled(value: object) -> object:
    if isinstance(value, dict):
        return {k: v if k in ("event", "round", "client") else nulled(v) for k, v in value.items()}
    return [nulled(inner) for inner in value] if isinstance(value, list) else None


def test_numbers_may_be_null_or_absent(run: Path, tmp_path: Path) -> None:
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    write_events(run, [events[0], nulled(events[1]), events[2]])
    assert "after round 2" in text_of(make_report(run))
    write_events(run, [nulled(event) for event in events])
    assert "No round has been evaluated yet" in text_of(make_report(run))
    bare = [{"event": "round", "round": 0}, {"event": "round", "round": 1, "clients": None}]
    write_events(run, [*bare, {"event": "other"}, {"event": "round", "round": None}])
    (run / "config.json").write_text('{"lora": null, "federated": 3, "resolved": {"gamma": "x"}}')
    (run / "partition.json").unlink()
    assert "method unknown" in text_of(make_report(run))
    make_report(run, make_run(tmp_path / "b", [[1.0]]), "--out", tmp_path / "out")


def test_a_loss_that_ran_away_does_not_stop_the_report(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "lost", [[2.0, 3.0], [1e300, 2.0], [5000.0, 2.0]])
    assert "5000.0000" in text_of(make_report(folder))


def test_many_clients_many_labels_many_rounds(tmp_path: Path) -> None:
    labels = [{f"label {(7 * c + k) % 50}": 1 for k in range(20)} for c in range(40)]
    rows = [[2.0 / (1 + n) + 0.01 * c for c in range(40)] for n in range(70)]
    folder = make_run(tmp_path / "many", rows, labels=labels, planned=69)
    make_report(folder)
    assert figures(folder) == SINGLE


@pytest.mark.usefixtures("undrawn")
def test_text_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>&$x_{$"
    labels = [{evil: 5}, {"_a$b$": 2, "\u9910\u5385": 1}]
    folder = make_run(tmp_path / "a<b>&'\"", [[2.0, 3.0], [1.0, 1.0]], method=evil, labels=labels)
    other = make_run(tmp_path / "other", [[2.0, 3.0]], labels=labels)
    html = make_report(folder, other, "--out", tmp_path / "out")
    assert "<script" not in html
    assert "<b>&'" not in html
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;&amp;$x_{$" in html
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in figures(tmp_path / "out"))


@pytest.mark.usefixtures("undrawn")
def test_hostile_text_is_escaped_wherever_it_stands(tmp_path: Path) -> None:
    """Names of runs, methods, models, scores, labels, optimizers and generated text."""
    evil = "<script>alert(1)</script>"
    hostile = {
        key: f"{evil}{key}"
        for key in ("model.name", "data.task", "partition.kind", "federated.method",
                    "train.optimizer", "resolved.device")
    }  # fmt: skip
    for name, rank, seed in (("<u>a", 4, 0), ("<u>b", 16, 0), ("<u>c", 4, 1)):
        folder = write_run(
            tmp_path / "runs" / name, rank=rank, seed=seed, num_clients=2, rounds=1,
            scores=(f"{evil}score",), settings=hostile,
        )  # fmt: skip
        events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for entry in events[-1]["clients"]:
            entry["samples"] = [dict.fromkeys(("prompt", "expected", "answer"), f"{evil}sample")]
        write_events(folder, events)
        parts = json.loads((folder / "partition.json").read_text())
        for part in parts["clients"]:
            part["labels"] = {f"{evil}label": 3}
        (folder / "partition.json").write_text(json.dumps(parts))
    html = make_report(tmp_path / "runs")
    assert "The law" in html
    assert "Runs that differ only in the seed" in html
    tags = Tags()
    tags.feed(html)
    assert tags.found.isdisjoint({"script", "u"})
    shown = " ".join(tags.text)
    for what in (*hostile, "score", "sample", "label"):
        assert f"{evil}{what}" in shown, what
    assert "<u>a" in shown


class Tags(HTMLParser):
    """The tags and the text of a page, as a browser reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.found.add(tag)

    def handle_data(self, data) -> None:
        self.text.append(data)


@pytest.mark.usefixtures("undrawn")
def test_seeds_are_compared_by_mean_and_standard_deviation(tmp_path: Path) -> None:
    ends = [1.0, 1.1, 1.3]
    seeds = [
        make_run(tmp_path / f"s{i}", [[2.0, 2.0], [end, end]], seed=i) for i, end in enumerate(ends)
    ]
    other = make_run(tmp_path / "other", [[2.0, 2.0], [1.5, 1.5]], method="fedsa")
    words = text_of(make_report(*seeds, other, "--out", tmp_path / "out"))
    # mean 3.4 / 3; squares of deviations add up to 0.046667, over n - 1 = 2: 0.023333
    assert "sfed 3 1 1.1333 ± 0.1528 1.6333 ± 0.1528" in words
    assert "compare-held-out-loss" in figures(tmp_path / "out")
    found = grouping.group([run_record.open_run(folder) for folder in (*seeds, other)])
    assert [len(one.stories) for one in found] == [3, 1]
    curve = found[0].curve(PERSONAL)
    assert curve.points == [(0.0, 2.0), (1.0, pytest.approx(1.1333333))]
    assert list(curve.spread) == [0.0, pytest.approx(0.1527525)]
    assert not found[1].curve(PERSONAL).spread, "one run has no standard deviation"


def test_a_repetition_with_the_same_seed_is_no_second_seed(tmp_path: Path) -> None:
    twins = [make_run(tmp_path / name, [[2.0, 2.0]]) for name in ("a", "b")]
    found = grouping.group([run_record.open_run(folder) for folder in twins])
    assert [one.label for one in found] == ["sfed, a", "sfed, b"]


def test_the_mean_of_seeds_stops_where_one_of_them_stops(tmp_path: Path) -> None:
    long = make_run(tmp_path / "long", [[2.0], [1.0], [0.5]], seed=0)
    short = make_run(tmp_path / "short", [[2.0], [1.0]], seed=1)
    (one,) = grouping.group([run_record.open_run(long), run_record.open_run(short)])
    assert [x for x, _ in one.curve(series.held_out_reader("global")).points] == [0.0, 1.0]


def diverged(folder: Path) -> Path:
    """The last round was evaluated and gave no finite number, as a run writes it that diverged."""
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = events[-1]
    last |= {key: None for key in last if key.startswith("eval/")} | {"eval/clients": 2}
    for entry in last["clients"]:
        entry |= {key: None for key in entry if key.endswith("_loss")}
    write_events(folder, events)
    return folder


@pytest.mark.usefixtures("undrawn")
def test_a_last_round_without_a_finite_loss_is_not_replaced_by_the_one_before(run: Path) -> None:
    words = text_of(make_report(diverged(run)))
    assert "After 2 rounds no client has a finite held-out loss." in words
    assert "Means over clients after round 2" in words
    assert f"own data {tables.NONE} {tables.NONE} {tables.NONE} 1.2500 (round 1)" in words
    assert f"0 farm 60 %, bank 40 % 100 2.0000 {tables.NONE} {tables.NONE} {tables.NONE}" in words


@pytest.mark.usefixtures("undrawn")
def test_seeds_have_no_mean_where_one_has_diverged(tmp_path: Path) -> None:
    losses = [[2.0, 2.0], [1.0, 1.0], [0.5, 0.5]]
    seeds = [make_run(tmp_path / f"s{i}", losses, seed=i) for i in range(3)]
    diverged(seeds[2])
    words = text_of(make_report(*seeds, "--out", tmp_path / "out"))
    assert f"sfed 3 2 {tables.NONE} {tables.NONE}" in words


@pytest.mark.usefixtures("undrawn")
def test_seeds_are_averaged_after_the_last_round_that_all_have_evaluated(tmp_path: Path) -> None:
    losses = [[2.0, 2.0], [1.0, 1.0], [0.5, 0.5]]
    seeds = [make_run(tmp_path / f"s{i}", losses[: 3 - i], seed=i) for i in range(2)]
    words = text_of(make_report(*seeds, "--out", tmp_path / "out"))
    assert "sfed 2 1 1.0000 ± 0.0000 1.5000 ± 0.0000" in words


@pytest.mark.usefixtures("undrawn")
def test_final_loss_against_rank_and_clients_where_they_vary(tmp_path: Path) -> None:
    folders = [
        make_run(tmp_path / f"{method}-{rank}", [[2.0, 2.0], [1.0, 1.0]], method=method, rank=rank)
        for method in ("sfed", "fedsa")
        for rank in (4, 64)
    ]
    make_report(*folders, "--out", tmp_path / "a")
    assert "final-loss-by-rank" in figures(tmp_path / "a")
    assert "final-perplexity-by-rank" in figures(tmp_path / "a")
    assert "compare-grad-norm-by-rank" in figures(tmp_path / "a")
    assert not any("by-num-clients" in name for name in figures(tmp_path / "a"))
    other = make_run(tmp_path / "other", [[2.0] * 5, [1.0] * 5])
    make_report(*folders, other, "--out", tmp_path / "b")
    assert not any("by-num-clients" in name for name in figures(tmp_path / "b")), "no equal r"
    more = make_run(tmp_path / "more", [[2.0] * 5, [1.0] * 5], rank=64)
    make_report(*folders, more, "--out", tmp_path / "c")
    assert "final-loss-by-num-clients" in figures(tmp_path / "c")


@pytest.mark.usefixtures("undrawn")
def test_several_runs_go_to_a_folder_of_their_own(run: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    twin = make_run(tmp_path / "elsewhere" / "one", [[2.0, 2.0]])
    report.main([str(run), str(twin)])
    assert (tmp_path / "report" / "report.html").is_file()
    assert {"01-one-cost", "02-one-cost"} <= figures(tmp_path / "report"), "equal names"
    assert not (run / "report.html").exists()


GLUE = {"scores": ("accuracy", "f1"), "loss_unit": "example"}


@pytest.mark.usefixtures("undrawn")
def test_scores_stand_in_the_tables_and_figures(tmp_path: Path) -> None:
    run = write_run(tmp_path / "mrpc", num_clients=2, **GLUE)
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for event, ends in zip(events, ([0.5, 0.6], [0.9, 0.7], [0.7, 0.8], [0.8, 0.6]), strict=True):
        for entry, value in zip(event["clients"], ends, strict=True):
            entry["personal_accuracy"] = value
        event["eval/personal_accuracy_unweighted"] = statistics.fmean(ends)
        event["eval/personal_accuracy_by_examples"] = 0.71
        event["eval/personal_accuracy"] = 0.72
    write_events(run, events)
    words = text_of(make_report(run))
    # unweighted, by training examples, pooled, and the first of the best rounds only beside them
    assert "accuracy each client's own adapter, its own data 0.7000 0.7100 0.7200 0.8000" in words
    assert "0.8000 (round 1)" in words
    assert "0 yes 60 %, no 40 % 100 0.5000 0.8000 +0.3000" in words
    assert "1 yes 62 %, no 38 % 105 0.6000 0.6000 +0.0000" in words
    assert "loss (nats/example)" in words
    assert "over all held-out examples together" in words
    found = figures(run)
    assert {"score-accuracy", "score-f1", "held-out-loss", "adapters"} <= found
    assert "perplexity" not in found, "losses are not by token"


@pytest.mark.usefixtures("undrawn")
def test_scores_may_be_undefined(tmp_path: Path) -> None:
    names = ("pearson", "spearman")
    run = write_run(tmp_path / "stsb", scores=names, loss_unit="example", num_clients=2)
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for event in events:
        for mean in ("", "_unweighted", "_by_examples"):
            event[f"eval/personal_pearson{mean}"] = None
        for entry in event["clients"]:
            entry["personal_pearson"] = None
    write_events(run, events)
    words = text_of(make_report(run))
    assert "loss (squared error)" in words
    assert "pearson global adapter, everybody's data" in words, "the other adapter has it"
    other = write_run(tmp_path / "other", scores=names, loss_unit="example", num_clients=2, seed=1)
    words = text_of(make_report(run, other, "--out", tmp_path / "out"))
    assert "0 2 8 1 3 \N{EN DASH} 0." in words


@pytest.mark.usefixtures("undrawn")
def test_seeds_have_means_of_scores(tmp_path: Path) -> None:
    seeds = [
        write_run(tmp_path / f"s{i}", seed=i, num_clients=2, rounds=1, **GLUE) for i in range(2)
    ]
    for i, seed in enumerate(seeds):
        events = [json.loads(line) for line in (seed / "metrics.jsonl").read_text().splitlines()]
        events[-1]["eval/personal_accuracy_unweighted"] = 0.7 + 0.1 * i
        write_events(seed, events)
    words = text_of(make_report(*seeds, "--out", tmp_path / "out"))
    assert "sfed 2 1 0.7500 ± 0.0707" in words
    assert "compare-accuracy" in figures(tmp_path / "out")


@pytest.mark.usefixtures("undrawn")
def test_runs_of_different_tasks_are_compared_by_their_own_main_score(tmp_path: Path) -> None:
    a = write_run(tmp_path / "sst2", scores=("accuracy",), task="sst2", loss_unit="example")
    b = write_run(tmp_path / "cola", scores=("matthews", "accuracy"), task="cola")
    old = make_run(tmp_path / "old", [[2.0, 3.0], [1.0, 1.0]])
    words = text_of(make_report(a, b, old, "--out", tmp_path / "out"))
    assert "main score loss run method" in words, "losses have different units"
    assert re.search(r"cola sfed 0 4 8 1\.414 3 0\.\d+ matthews", words)
    assert re.search(r"sst2 sfed 0 4 8 1\.414 3 0\.\d+ accuracy", words)
    assert {"compare-accuracy", "compare-matthews"} <= figures(tmp_path / "out")


@pytest.mark.usefixtures("undrawn")
def test_many_runs_become_small_multiples(tmp_path: Path) -> None:
    for method in ("sfed", "fedsa", "fedsa-rslora"):
        for rank in (4, 64):
            for clients in (2, 3):
                write_run(
                    tmp_path / "sweep" / f"{method}-{rank}-{clients}",
                    method=method, rank=rank, num_clients=clients, rounds=2, **GLUE,
                )  # fmt: skip
    html = make_report(tmp_path / "sweep")
    found = {name for name in figures(tmp_path / "sweep") if not name[0].isdigit()}
    for other, letter, value in (("rank", "N", 2), ("num-clients", "r", 4)):
        for name in ("grad-norm", "accuracy", "loss"):
            assert f"compare-{name}-by-{other}" in found, "the largest other value"
            assert f"compare-{name}-by-{other}-{letter}-{value}" in found
        assert {f"final-accuracy-by-{other}", f"final-accuracy-by-{other}-global"} <= found
    assert not {"compare-held-out-loss", "compare-accuracy"} & found, "12 lines are too many"
    assert "compare-f1-by-rank" not in found, "the main score only"
    assert "<summary>Accuracy by r: other values of N</summary>" in html
    assert html.count("<details>") == html.count("</details>") > 3


def test_small_multiples_are_drawn(tmp_path: Path) -> None:
    """Four panels in two rows, a rank that a method lacks, seeds, a gradient of zero."""
    for method, rank in (("sfed", 4), ("sfed", 64), ("fedsa", 64), ("fedsa-rslora", 8)):
        for seed in (0, 1):
            write_run(
                tmp_path / "sweep" / f"{method}-{rank}-{seed}",
                method=method, rank=rank, seed=seed, rounds=1, num_clients=1,
            )  # fmt: skip
    write_run(tmp_path / "sweep" / "local", method="local", rank=64, num_clients=1, rounds=1)
    found = comparisons([run_record.open_run(run) for run in find_runs(tmp_path / "sweep")])
    sizes = {p.name: struct.unpack(">II", p.png[16:24]) for p in found}
    assert sizes["compare-grad-norm-by-rank"][1] > 700, "two rows"
    assert sizes["final-loss-by-rank"][1] < 600, "one row"


def test_settings_that_only_move_work_do_not_break_a_sweep(tmp_path: Path) -> None:
    for rank in (4, 64):
        settings = {"federated.clients_per_pass": rank, "train.micro_batch_size": rank}
        write_run(tmp_path / f"r{rank}", rank=rank, settings=settings)
    found = [run_record.open_run(tmp_path / f"r{rank}") for rank in (4, 64)]
    assert [list(one.cells) for one in grouping.sweeps(found)] == [[(4.0, 4.0), (4.0, 64.0)]]
    write_run(tmp_path / "lr", rank=128, settings={"train.lr": 0.5})
    found.append(run_record.open_run(tmp_path / "lr"))
    assert [one.label for one in grouping.sweeps(found)] == ["sfed, lr = 0.001", "sfed, lr = 0.5"]


@pytest.mark.usefixtures("undrawn")
def test_generated_text_is_shown_as_it_is(tmp_path: Path) -> None:
    run = write_run(tmp_path / "gsm8k", num_clients=10, rounds=2, samples=True)
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    events[1]["clients"][0]["samples"] = [{"prompt": "an older round"}]
    events[-1]["clients"][0]["samples"] = [
        {"prompt": "a <b> & c\n  indented", "answer": "x" * 700, "expected": None},
        "no sample",
        {"answer": 7},
        {"prompt": "a third"},
    ]
    events.append(events[-1] | {"round": 3, "clients": [{"client": 0, "samples": []}]})
    write_events(run, events)
    html = make_report(run)
    assert "Generated after round 2" in html
    assert "a &lt;b&gt; &amp; c\n  indented</div>" in html
    assert f"{'x' * tables.MOST_CHARACTERS}...</div>" in html
    assert "x" * (tables.MOST_CHARACTERS + 1) not in html
    assert "white-space: pre-wrap" in html
    assert "Question 1 of &lt;7&gt;?" in html
    assert "an older round" not in html
    assert "Question 0 of &lt;8&gt;" not in html, "eight clients"
    assert "a third" not in html, "two of each"
    assert "Question 2" not in html


@pytest.mark.usefixtures("undrawn")
def test_a_folder_of_runs_stands_for_all_of_them(tmp_path: Path, capsys) -> None:
    sweep = tmp_path / "sweep"
    for name in ("r-16", "r-4", "r-4.old-1"):
        write_run(sweep / name)
    (sweep / "not-started").mkdir()
    report.main([str(sweep)])
    assert str(sweep / "report.html") in capsys.readouterr().out
    words = text_of((sweep / "report.html").read_text())
    assert "2 federated runs" in words
    assert words.index("r-4 sfed") < words.index("r-16 sfed")
    assert "old-1" not in words, "what a newer run put aside"
    report.main([str(sweep), str(sweep / "r-4"), "--out", str(tmp_path / "out")])
    assert "2 federated runs" in text_of((tmp_path / "out" / "report.html").read_text())


@pytest.mark.usefixtures("undrawn")
def test_runs_of_a_sweep_stand_in_its_order_and_the_first_arm_is_the_reference(
    tmp_path: Path,
) -> None:
    sweep = tmp_path / "sweep"
    for method in ("sfed", "fedsa"):
        for seed in (0, 1):
            write_run(sweep / f"{method}-{seed}", method=method, seed=seed)
    write_run(sweep / "another", method="local")
    (sweep / "sweep.csv").write_text("cell,status\nsfed-0,complete\nsfed-1,\nfedsa-0,\nfedsa-1,\n")
    found = [run.name for run in find_runs(sweep)]
    assert found == ["sfed-0", "sfed-1", "fedsa-0", "fedsa-1", "another"]
    assert "sfed reference 2 " in text_of(make_report(sweep))
    words = text_of(make_report(sweep, "--reference", "fedsa", "--target-loss", "1.5", "--paper"))
    assert "fedsa reference 2 " in words
    assert "personal loss at most 1.5" in words
    names = {path.name for path in (sweep / "paper").iterdir()}
    assert {"paired-loss-personal.tex", "paired-loss-global.csv", "convergence.tex"} <= names
    assert {"paired-loss-differences.svg", "paired-loss-curves-personal.pdf"} <= names


@pytest.mark.parametrize("value", ["nan", "0", "-1", "inf", "low"])
def test_a_target_that_is_no_loss_is_refused(run: Path, value: str) -> None:
    with pytest.raises(UserError, match=r"--target-loss: '.*' is not a finite number above 0"):
        report.main([str(run), f"--target-loss={value}"])


@pytest.mark.parametrize("words", [("--target-loss", "2.0"), ("--reference", "sfed")])
def test_questions_about_several_runs_are_refused_of_one(run: Path, words: tuple[str, str]) -> None:
    with pytest.raises(UserError, match=f"{words[0]} {words[1]}: only one run is given"):
        report.main([str(run), *words])


def damage(name: str, text: str):
    return lambda run: (run / name).write_text(text)


def test_lines_that_are_no_events_are_named_beside_the_report(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run_record.open_run(run).rounds
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\n[1]\n" + b"[" * 100_000 + b"\n")
        file.write(b'{"event": "round", "round": 1' + b"0" * 5000 + b"}\n")
    assert run_record.open_run(run).rounds == whole
    report.main([str(run)])
    complaints = capsys.readouterr().err
    first = len(whole) + 1
    lines = ", ".join(f"line {first + i}" for i in range(4))
    assert f"metrics.jsonl: 4 lines are no events and are passed over ({lines})" in complaints


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda run: (run / "metrics.jsonl").unlink(), "holds no metrics.jsonl"),
        (lambda run: (run / "config.json").unlink(), "config.json is not readable"),
        (damage("config.json", "{"), "config.json is damaged"),
        (damage("config.json", "[1]"), "config.json is damaged: it holds list"),
        (lambda run: (run / "config.json").write_bytes(b"\xff"), "config.json is damaged"),
        (damage("partition.json", "nothing"), "partition.json is damaged"),
        (lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\n"), "metrics.jsonl is not"),
        (damage("figures", "a file"), "cannot be written"),
    ],
)
def test_a_spoilt_run_folder_is_a_plain_mistake(run: Path, spoil, words: str) -> None:
    spoil(run)
    with pytest.raises(UserError, match=words):
        report.main([str(run)])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no runs given"),
        (["nowhere"], "'nowhere' does not exist"),
        (["one", "--colour", "red"], "--colour"),
        (["one", "--out"], "--out"),
        (["one/figures"], "no run folder and no folder of runs"),
    ],
)
def test_mistakes_in_the_arguments(run: Path, monkeypatch, arguments, words: str) -> None:
    monkeypatch.chdir(run.parent)
    (run / "figures").mkdir()
    with pytest.raises(UserError, match=re.escape(words)):
        report.main(arguments)


def test_the_command_says_mistakes_plainly_and_helps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ended(word: str) -> object:
        monkeypatch.setattr(sys, "argv", ["sfed.report", word])
        try:
            run_command(report.main)
        except SystemExit as left:
            return left.code
        return 0

    assert ended("/nowhere/at/all") == 2
    said = "the run folder '/nowhere/at/all' does not exist; name one, such as runs/demo"
    assert capsys.readouterr().err == f"sfed: {said}\n"
    assert ended("/dev/null") == 2
    assert "the run folder '/dev/null' is no folder" in capsys.readouterr().err
    assert ended("--help") == 0
    assert "--out DIR" in capsys.readouterr().out


def test_no_torch_is_imported(run: Path) -> None:
    program = (
        "import sys; from sfed.report.__main__ import main; main(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'deepspeed', 'matplotlib.pyplot'};"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = launchers.python("-c", program, str(run))
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("undrawn")
def test_a_space_that_does_not_break_is_a_space(tmp_path: Path) -> None:
    for seed, rank in ((0, 4), (1, 4), (0, 8)):
        make_run(tmp_path / "runs" / f"r{rank}-{seed}", [[2.0], [1.0]], seed=seed, rank=rank)
    html = make_report(tmp_path / "runs")
    assert "r\u00a0=\u00a04" in html and "MiB</td>" in html
    assert "\\xa0" not in html


def test_epsilon_stands_beside_the_scores_of_private_runs(tmp_path: Path) -> None:
    """Without noise it is infinite; a run without privacy has none."""
    private = {"clip": 0.1, "delta": 1e-5}
    for name, noise in (("half", 0.5), ("none", 0.0), ("plain", None)):
        settings = (
            {} if noise is None else {"resolved.privacy": {**private, "noise_multiplier": noise}}
        )
        run = write_run(tmp_path / name, num_clients=2, rounds=2, settings=settings)
        events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for event in events:
            event["privacy/epsilon"] = 2.5 * event["round"] if noise else None
        write_events(run, events)
    stories = [open_run(tmp_path / name) for name in ("half", "none", "plain")]
    made = comparison_tables.runs_table(stories)
    place = made.head.index("epsilon")
    assert made.head[place : place + 4] == ["epsilon", "delta", "clip", "noise multiplier"]
    assert [row[place : place + 4] for row in made.rows] == [
        ["5", "1e-05", "0.1", "0.5"], ["inf", "1e-05", "0.1", "0"], [tables.NONE] * 4,
    ]  # fmt: skip
    assert sum(width for _, width in made.groups) == len(made.head)
    assert "epsilon" not in comparison_tables.runs_table(stories[2:]).head
