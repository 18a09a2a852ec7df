"""Tests of the report: made-up run folders in, one self-contained page and its figures out."""

from __future__ import annotations

import json
import re
import statistics
import struct
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sfed import report, stories
from sfed.cli import UserError

ROOT = Path(__file__).resolve().parents[1]
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
        "comm/uploaded_bytes": 2**20,
        "comm/evaluation_bytes": 2**19,
        "time/round_seconds": 3.0,
        "time/local_seconds": 2.0,
        "time/aggregate_seconds": 0.25,
        "time/evaluate_seconds": 0.5,
        "time/tokens_per_second": 1000.0 if number else None,
        "memory/peak_bytes": 2**30,
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


def write_events(folder: Path, events: list[dict]) -> None:
    text = "".join(json.dumps(event) + "\n" for event in events)
    (folder / "metrics.jsonl").write_text(text)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    losses = [[2.0, 3.0], [1.0, 1.5], [1.2, 1.7]]
    return make_run(tmp_path / "one", losses, labels=[{"farm": 60, "bank": 40}, {"shop": 200}])


def make_report(*arguments: object) -> str:
    report.main([str(argument) for argument in arguments])
    out = arguments[arguments.index("--out") + 1] if "--out" in arguments else arguments[0]
    return (Path(str(out)) / "report.html").read_text(encoding="utf-8")


def text_of(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", re.sub(r"<style>.*?</style>", "", html)))


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


def test_the_last_round_counts_and_the_best_is_named_so(run: Path) -> None:
    words = text_of(make_report(run))
    assert "Means over clients after round 2" in words
    assert "its own data 1.4500 1.4520 1.4510 1.2500 (round 1)" in words
    assert "best round, unweighted" in words


class Loads(HTMLParser):
    """Everything that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        assert tag not in {"script", "iframe", "object", "embed"}
        names = ("src", "srcset", "href", "data", "action", "poster")
        self.found += [value for name, value in attrs if name in names]


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


def test_text_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>&$x_{$"
    labels = [{evil: 5}, {"_a$b$": 2, "\u9910\u5385": 1}]
    folder = make_run(tmp_path / "a<b>&'\"", [[2.0, 3.0], [1.0, 1.0]], method=evil, labels=labels)
    other = make_run(tmp_path / "other", [[2.0, 3.0]], labels=labels)
    html = make_report(folder, other, "--out", tmp_path / "out")
    assert "<script" not in html
    assert "<b>&'" not in html
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;&amp;$x_{$" in html
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in figures(tmp_path / "out"))


def test_seeds_are_compared_by_mean_and_standard_deviation(tmp_path: Path) -> None:
    ends = [1.0, 1.1, 1.3]
    seeds = [
        make_run(tmp_path / f"s{i}", [[2.0, 2.0], [end, end]], seed=i) for i, end in enumerate(ends)
    ]
    other = make_run(tmp_path / "other", [[2.0, 2.0], [1.5, 1.5]], method="fedsa")
    words = text_of(make_report(*seeds, other, "--out", tmp_path / "out"))
    # mean 3.4 / 3; squares of deviations add up to 0.046667, over n - 1 = 2: 0.023333
    assert "sfed 3 1.1333 ± 0.1528 1.6333 ± 0.1528" in words
    assert "compare-held-out-loss" in figures(tmp_path / "out")
    groups = stories.group([stories.read_story(folder) for folder in (*seeds, other)])
    assert [len(one.stories) for one in groups] == [3, 1]
    curve = groups[0].curve("personal")
    assert curve.points == [(0.0, 2.0), (1.0, pytest.approx(1.1333333))]
    assert list(curve.spread) == [0.0, pytest.approx(0.1527525)]
    assert not groups[1].curve("personal").spread, "one run has no standard deviation"


def test_a_repetition_with_the_same_seed_is_no_second_seed(tmp_path: Path) -> None:
    twins = [make_run(tmp_path / name, [[2.0, 2.0]]) for name in ("a", "b")]
    groups = stories.group([stories.read_story(folder) for folder in twins])
    assert [one.label for one in groups] == ["sfed, a", "sfed, b"]


def test_the_mean_of_seeds_stops_where_one_of_them_stops(tmp_path: Path) -> None:
    long = make_run(tmp_path / "long", [[2.0], [1.0], [0.5]], seed=0)
    short = make_run(tmp_path / "short", [[2.0], [1.0]], seed=1)
    (one,) = stories.group([stories.read_story(long), stories.read_story(short)])
    assert [x for x, _ in one.curve("global").points] == [0.0, 1.0]


def test_final_loss_against_rank_and_clients_where_they_vary(tmp_path: Path) -> None:
    folders = [
        make_run(tmp_path / f"{method}-{rank}", [[2.0, 2.0], [1.0, 1.0]], method=method, rank=rank)
        for method in ("sfed", "fedsa")
        for rank in (4, 64)
    ]
    make_report(*folders, "--out", tmp_path / "a")
    assert "compare-rank" in figures(tmp_path / "a")
    assert "compare-num-clients" not in figures(tmp_path / "a")
    more = make_run(tmp_path / "more", [[2.0] * 5, [1.0] * 5])
    make_report(*folders, more, "--out", tmp_path / "b")
    assert "compare-num-clients" in figures(tmp_path / "b")


def test_several_runs_go_to_a_folder_of_their_own(run: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    twin = make_run(tmp_path / "elsewhere" / "one", [[2.0, 2.0]])
    report.main([str(run), str(twin)])
    assert (tmp_path / "report" / "report.html").is_file()
    assert {"01-one-cost", "02-one-cost"} <= figures(tmp_path / "report"), "equal names"
    assert not (run / "report.html").exists()


def damage(name: str, text: str):
    return lambda run: (run / name).write_text(text)


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
        (["."], "there are runs in it: one"),
    ],
)
def test_mistakes_in_the_arguments(run: Path, monkeypatch, arguments, words: str) -> None:
    monkeypatch.chdir(run.parent)
    with pytest.raises(UserError, match=re.escape(words)):
        report.main(arguments)


def command(*words: str) -> subprocess.CompletedProcess[str]:
    whole = [sys.executable, "-m", "sfed.report", *words]
    return subprocess.run(whole, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_the_command_says_mistakes_plainly_and_helps() -> None:
    done = command("/nowhere/at/all")
    assert done.returncode == 2
    assert done.stderr == "sfed: the run folder '/nowhere/at/all' does not exist\n"
    done = command("--help")
    assert done.returncode == 0
    assert "--out DIR" in done.stdout


def test_no_torch_is_imported(run: Path) -> None:
    program = (
        "import sys; from sfed import report; report.main(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'deepspeed', 'matplotlib.pyplot'};"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    words = [sys.executable, "-c", program, str(run)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
