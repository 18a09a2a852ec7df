"""Tests of arms: what is paired, what is refused by name, rates, and counts of rounds and steps."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from sfed.report.arms import rates
from sfed.report.arms.blocks import blocks
from sfed.report.arms.convergence import local_steps, reached
from sfed.report.arms.pairing import Comparison, Measure, compare
from sfed.report.arms.section import Questions, arms_section
from sfed.report.paper import csv_text
from sfed.storage.run_record import RunRecord, open_run
from sfed.utils.errors import UserError
from tests.support.run_folders import write_events, write_run

PERSONAL = Measure("personal", "loss")
SEED_0, SEED_1, SEED_2 = ([1.0, 2.0], [1.0, 3.0], [2.0, 2.0])


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., RunRecord]:
    """Makes a run whose clients end with given personal losses; the global ones are higher by 1."""

    def make(name: str, losses: Sequence[float | None], seed: int = 0, **more) -> RunRecord:
        folder = write_run(tmp_path / name, num_clients=len(losses), seed=seed, rounds=2, **more)
        change(folder, lambda events: put(events[-1], losses))
        return open_run(folder)

    return make


def change(folder: Path, edit: Callable[[list[dict]], object]) -> None:
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    edit(events)
    write_events(folder, events)


def put(event: dict, losses: Sequence[float | None]) -> None:
    """Give the clients of a round these losses."""
    for entry, loss in zip(event["clients"], losses, strict=True):
        entry |= {"personal_loss": loss, "global_loss": None if loss is None else loss + 1}
    known = [loss for loss in losses if loss is not None]
    event["eval/personal_loss_unweighted"] = sum(known) / len(known) if known else None


def compared(stories: Sequence[RunRecord], reference: str | None = None) -> Comparison:
    (block,) = blocks(stories)
    return compare(block, PERSONAL, reference)


def pair(make, seeds: Mapping[int, Sequence[float]], shift: Sequence[float]) -> list[RunRecord]:
    """Runs of sfed with these losses, and of fedsa with a shift per seed."""
    found = [make(f"sfed-{seed}", losses, seed) for seed, losses in seeds.items()]
    return found + [
        make(f"fedsa-{seed}", [loss + by for loss in losses], seed, method="fedsa")
        for (seed, losses), by in zip(seeds.items(), shift, strict=True)
    ]


def test_an_arm_is_compared_client_by_client_with_the_first_one(make) -> None:
    seeds = {0: SEED_0, 1: SEED_1, 2: SEED_2}
    result = compared(pair(make, seeds, [1.0, 2.0, 3.0]))
    base, other = result.rows
    assert (base.label, base.word, base.difference) == ("sfed", "reference", None)
    assert base.mean == pytest.approx((1.5 + 2.0 + 2.0) / 3)
    assert base.worst == pytest.approx((2 + 3 + 2) / 3), "of each run, then over the seeds"
    assert base.tenth == base.worst, "of at most ten clients"
    assert (other.label, other.seeds, other.word) == ("fedsa", 3, "no difference shown")
    assert other.difference.mean == pytest.approx(2.0)
    assert other.difference.over_seeds == pytest.approx((-0.48414, 4.48414), abs=1e-4)
    assert not result.notes


def test_the_reference_can_be_named(make) -> None:
    stories = pair(make, {0: SEED_0, 1: SEED_1}, [1.0, 1.5])
    base, other = compared(stories, "fedsa").rows[::-1]
    assert (base.word, other.difference.mean) == ("reference", -1.25)
    with pytest.raises(UserError, match="--reference ffa: no such arm; there are 'sfed', 'fedsa'"):
        arms_section(stories, Questions(reference="ffa"))


def test_the_worst_tenth_is_rounded_up_and_ties_count_each(make) -> None:
    losses = [9.0, 9.0, *([1.0] * 9), 5.0, *([2.0] * 9)]  # 21 clients: the worst three
    (row, _) = compared([make("sfed", losses), make("fedsa", losses, method="fedsa")]).rows
    assert (row.clients, row.worst, row.tenth) == (21, 9.0, pytest.approx(23 / 3))


def test_of_a_score_the_lowest_clients_are_the_worst(make) -> None:
    measure = Measure("personal", "accuracy")
    assert measure.worst([0.5, 0.25, 0.75], 1) == 0.25
    assert PERSONAL.worst([0.5, 0.25, 0.75], 1) == 0.75


def test_a_run_without_a_partner_is_named_and_not_averaged_into_the_difference(make) -> None:
    stories = pair(make, {0: SEED_0, 1: SEED_1, 2: SEED_2}, [1.0, 1.5, 100.0])
    result = compared([story for story in stories if story.name != "sfed-2"])
    assert result.rows[1].difference.mean == 1.25
    assert result.rows[1].difference.seeds == 2
    assert result.notes == ["fedsa-2: sfed has no such run of seed 2 to pair with"]


def test_runs_on_other_data_are_not_paired(make) -> None:
    stories = pair(make, {0: SEED_0, 1: SEED_1}, [1.0, 1.5])
    path = stories[3].folder / "partition.json"
    path.write_text(path.read_text().replace("demo-2-1-1", "another"))
    result = compared([*stories[:3], open_run(stories[3].folder)])
    assert result.rows[1].word == "one seed: no interval"
    assert result.notes == [
        "fedsa-1 and sfed-1 are not paired: the examples of client 1 are not the same"
    ]


def test_runs_that_say_no_digests_are_not_paired(make) -> None:
    stories = pair(make, {0: SEED_0, 1: SEED_1}, [1.0, 1.5])
    for i in (2, 3):
        path = stories[i].folder / "partition.json"
        path.write_text(path.read_text().replace('"digest"', '"old"'))
        stories[i] = open_run(stories[i].folder)
    result = compared(stories)
    assert (result.rows[1].word, result.rows[1].difference) == ("no pair", None)
    assert "partition.json of fedsa-0 has no digests" in result.notes[0]


@pytest.mark.parametrize(
    ("key", "text"),
    [("data.max_tokens", "max_tokens = 64"), ("partition.kind", "iid"),
     ("evaluation.max_examples", "max_examples = 64")],
)  # fmt: skip
def test_arms_of_another_protocol_are_in_another_block(make, key: str, text: str) -> None:
    value = "iid" if key == "partition.kind" else 64
    stories = [make("sfed", SEED_0), make("fedsa", SEED_0, method="fedsa")]
    config = json.loads((stories[1].folder / "config.json").read_text())
    section, _, leaf = key.partition(".")
    config.setdefault(section, {})[leaf] = value
    (stories[1].folder / "config.json").write_text(json.dumps(config))
    found = blocks([stories[0], open_run(stories[1].folder)])
    assert [len(block.arms) for block in found] == [1, 1]
    assert text in found[1].condition
    assert compare(found[1], PERSONAL).rows[0].word == "nothing to compare with"


def test_arms_with_other_numbers_of_clients_are_in_another_block(make) -> None:
    found = blocks([make("two", SEED_0), make("three", [1.0, 2.0, 3.0])])
    assert [block.condition for block in found] == ["N = 2", "N = 3"]


def test_a_run_that_is_not_finished_is_left_out_by_name(make) -> None:
    stories = pair(make, {0: SEED_0, 1: SEED_1}, [1.0, 1.5])
    change(stories[3].folder, lambda events: events.pop())
    result = compared([*stories[:3], open_run(stories[3].folder)])
    assert result.rows[1].word == "one seed: no interval"
    assert "fedsa-1: 1 of 2 rounds so far (still running, or stopped)" in result.notes


def test_a_client_without_a_finite_value_gives_no_verdict(make) -> None:
    stories = pair(make, {0: SEED_0, 1: SEED_1, 2: SEED_2}, [-1.0, -1.1, -0.9])
    change(stories[5].folder, lambda events: put(events[-1], [None, 0.1]))
    result = compared([*stories[:5], open_run(stories[5].folder)])
    assert (result.rows[1].word, result.rows[1].seeds) == ("values missing", 2)
    assert result.notes[0] == "fedsa-2: no finite personal loss of client 0"


def test_a_run_that_ends_without_any_finite_value_gives_no_verdict(make) -> None:
    """Its seed is not silently left to the runs that did not diverge."""
    stories = pair(make, {0: SEED_0, 1: SEED_1, 2: SEED_2}, [-1.0, -1.1, -0.9])

    def diverge(events: list[dict]) -> None:
        put(events[-1], [None, None])
        lost = {key: None for key in events[-1] if key.startswith("eval/")}
        events[-1] |= {**lost, "eval/clients": 2}

    change(stories[5].folder, diverge)
    result = compared([*stories[:5], open_run(stories[5].folder)])
    assert (result.rows[1].word, result.rows[1].seeds) == ("values missing", 2)
    assert result.notes[0] == "fedsa-2: no finite personal loss of client 0, 1"
    alone = compared([open_run(stories[5].folder)])
    assert alone.notes == ["fedsa-2: no finite personal loss of any client"]


def test_a_method_without_a_global_adapter_is_not_measured_there(make) -> None:
    stories = [make("sfed", SEED_0), make("local", SEED_0, method="local")]
    drop = lambda events: [e.pop("global_loss") for e in events[-1]["clients"]]  # noqa: E731
    change(stories[1].folder, drop)
    (block,) = blocks([stories[0], open_run(stories[1].folder)])
    row = compare(block, Measure("global", "loss")).rows[1]
    assert (row.word, row.mean, row.difference) == ("not measured", None, None)


def lr(value: float) -> dict:
    return {"settings": {"train.lr": value}}


def grid(make, ends: Mapping[tuple[str, float], float]) -> list[RunRecord]:
    """Runs of two seeds at each method and rate; the seeds are 0.02 apart."""
    return [
        make(f"{method}-{rate}-{seed}", [end, end + 0.02 * seed], seed, method=method, **lr(rate))
        for (method, rate), end in ends.items()
        for seed in (0, 1)
    ]


GRID = {
    ("sfed", 0.1): 3.0, ("sfed", 0.2): 2.0, ("sfed", 0.3): 2.5,
    ("fedsa", 0.1): 1.0, ("fedsa", 0.2): 1.5, ("fedsa", 0.3): 4.0,
}  # fmt: skip


def test_arms_are_compared_at_each_rate_and_each_at_its_own_best(make) -> None:
    stories = grid(make, GRID)
    assert [block.condition for block in blocks(stories)] == ["lr = 0.1", "lr = 0.2", "lr = 0.3"]
    assert [arm.label for arm in blocks(stories)[0].arms] == ["sfed", "fedsa"]
    found = rates.tuned(blocks(stories, by_rate=False), PERSONAL)
    assert [(one.name, one.best.rate, one.edge) for one in found] == [
        ("sfed", 0.2, ""),
        ("fedsa", 0.1, "lowest of its grid"),
    ]
    (block,) = rates.at_best(found)
    row = compare(block, PERSONAL).rows[1]
    assert (row.label, row.difference.mean) == ("fedsa, lr = 0.1 (edge)", -1.0)


def test_where_each_arm_has_one_rate_of_its_own_all_are_compared(make) -> None:
    stories = grid(make, {("sfed", 0.1): 3.0, ("fedsa", 0.1): 2.5, ("fedsa-rslora", 0.2): 2.0})
    (block,) = blocks(stories)
    assert [arm.label for arm in block.arms] == [
        "sfed, lr = 0.1",
        "fedsa, lr = 0.1",
        "fedsa-rslora, lr = 0.2",
    ]
    rows = compare(block, PERSONAL).rows
    assert [row.difference.mean for row in rows[1:]] == [-0.5, -1.0]
    assert rates.tuned(blocks(stories, by_rate=False), PERSONAL) == []


def test_of_equal_rates_the_lowest_is_the_best(make) -> None:
    stories = grid(make, {("sfed", 0.1): 2.0, ("sfed", 0.2): 1.0, ("sfed", 0.3): 1.0})
    (one,) = rates.tuned(blocks(stories, by_rate=False), PERSONAL)
    assert (one.best.rate, one.edge) == (0.2, "")


def test_a_run_that_was_made_twice_counts_once_in_the_selection(make) -> None:
    again = make("again", [0.5, 0.5], 0, **lr(0.2))
    stories = [*grid(make, {("sfed", 0.1): 2.0, ("sfed", 0.2): 3.0}), again]
    (one,) = rates.tuned(blocks(stories, by_rate=False), PERSONAL)
    assert (one.best.rate, one.means[0.2]) == (0.1, pytest.approx(3.005))


def test_a_score_is_the_main_measure_and_more_is_better(make) -> None:
    more = {"scores": ("accuracy",), "loss_unit": "example"}
    stories = [make("sfed", SEED_0, **more), make("fedsa", SEED_0, method="fedsa", **more)]
    found = arms_section(stories, Questions())
    assert list(found.tables)[:2] == ["paired-accuracy-personal", "paired-accuracy-global"]
    assert found.entries[0].heading.startswith("Held-out accuracy, each client's own adapter")
    (block,) = blocks(stories)
    row = compare(block, Measure("personal", "accuracy")).rows[1]
    assert row.difference.mean == pytest.approx(-0.1 * (1 - math.exp(-3)))


def test_a_rate_without_all_seeds_is_not_selected(make) -> None:
    stories = [story for story in grid(make, GRID) if story.name != "fedsa-0.1-1"]
    found = rates.tuned(blocks(stories, by_rate=False), PERSONAL)
    assert (found[1].best.rate, found[1].edge, found[1].means[0.1]) == (0.2, "", None)
    assert found[1].notes == ["fedsa, lr = 0.1: not selected from, without seed 1"]


def test_the_target_is_reached_in_an_evaluated_round_or_not_at_all(make) -> None:
    story = make("sfed", SEED_0)

    def edit(events: list[dict]) -> None:
        for event, loss in zip(events, (3.0, None, 2.0), strict=True):
            event["eval/personal_loss_unweighted"] = loss
            for entry in event["clients"]:
                entry["steps"] = 10 * event["round"]

    change(story.folder, edit)
    story = open_run(story.folder)
    hit = reached(story, "personal", 2.0)
    assert (hit.round, hit.steps) == (2, 30.0), "round 1 was not evaluated, and made steps"
    missed = reached(story, "personal", 1.9)
    assert (missed.round, missed.steps, missed.lowest) == (None, None, 2.0)
    assert reached(story, "personal", 3.0).steps == 0.0, "before training"


def test_clients_that_rest_make_no_steps_and_unknown_steps_stay_unknown(make) -> None:
    story = make("sfed", SEED_0)
    assert local_steps(story, 2) is None
    change(story.folder, lambda events: [e["clients"][0].update(steps=4) for e in events])
    assert local_steps(open_run(story.folder), 2) == 4.0, "two rounds of 4 and 0"


def test_the_section_has_all_tables_and_figures(make) -> None:
    found = arms_section(grid(make, GRID), Questions(target_loss=1.2))
    assert list(found.tables) == [
        "learning-rates",
        "paired-loss-personal",
        "paired-loss-global",
        "best-rate-loss-personal",
        "best-rate-loss-global",
        "convergence",
    ]
    assert found.intro == "federated.method, train.lr, seed"
    assert "selected on the held-out data that is reported" in found.entries[0].notes[0]
    text = csv_text(found.tables["convergence"])
    assert 'lr = 0.2,sfed,yes,"0, 1",2.0050' in text
    assert ",not reached (lowest 1." in text
    assert "worst tenth" not in csv_text(found.tables["paired-loss-personal"])
    names = [picture.name for picture in found.pictures]
    assert names == [
        "paired-loss-differences", "paired-loss-curves-personal", "paired-loss-curves-global",
        "best-rate-loss-differences",
        "best-rate-loss-curves-personal", "best-rate-loss-curves-global",
    ]  # fmt: skip
    for picture in found.pictures[:2]:
        assert picture.png.startswith(b"\x89PNG")


def test_without_a_target_nothing_is_counted_and_of_one_arm_there_is_no_section(make) -> None:
    stories = pair(make, {0: SEED_0, 1: SEED_1}, [1.0, 1.5])
    found = arms_section(stories, Questions())
    assert "rounds" not in found.tables["convergence"].head
    assert "learning-rates" not in found.tables
    assert arms_section(stories[:2], Questions()) is None
    assert list(arms_section(stories[:2], Questions(target_loss=2.0)).tables) == ["convergence"]
