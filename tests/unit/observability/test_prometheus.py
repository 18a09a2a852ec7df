"""The text of a Prometheus file: a small reader of our own, and Prometheus's where it is there."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfed.observability import prometheus
from sfed.observability.prometheus import Sample, exposition

LINE = re.compile(r'([a-zA-Z_]\w*)\{((?:\w+="(?:[^"\\\n]|\\["\\n])*",?)*)\} (\S+)')
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
VALUES = st.floats(allow_nan=False)
NAMES = st.text(st.sampled_from("ab/-_+é\\\n "), min_size=1, max_size=4)
SAMPLES = st.lists(st.tuples(NAMES, st.fixed_dictionaries({"name": st.text()}), VALUES), max_size=6)


def read(text: str) -> list[tuple[str, dict[str, str], float]]:
    """The samples of a text; every metric has one HELP and one TYPE, before all of its samples."""
    found, told, current = [], [], ""
    for line in text.split("\n")[:-1]:
        if line.startswith("# HELP "):
            current = line.split(" ")[2]
            told.append(current)
        elif line.startswith("# TYPE "):
            assert line == f"# TYPE {current} gauge"
        else:
            match = LINE.fullmatch(line)
            assert match and match[1] == current, line
            labels = {
                key: re.sub(r"\\(.)", lambda m: {"n": "\n"}.get(m[1], m[1]), value)
                for key, value in LABEL.findall(match[2])
            }
            found.append((match[1], labels, float(match[3])))
    assert len(set(told)) == len(told)
    return found


@given(SAMPLES)
def test_what_is_written_is_read(samples: list[Sample]) -> None:
    found = read(exposition(iter(samples)))
    key = repr
    expected = sorted(((dict(labels), value) for _, labels, value in samples), key=key)
    assert sorted(((labels, value) for _, labels, value in found), key=key) == expected
    assert len({name for name, _, _ in found}) == len({name for name, _, _ in samples})


def test_names_that_would_be_the_same_stay_apart() -> None:
    found = read(exposition(iter([("a-b", {}, 1.0), ("a_b", {}, 2.0), ("a-b", {"x": "y"}, 3.0)])))
    assert found == [("sfed_a_b", {}, 1.0), ("sfed_a_b", {"x": "y"}, 3.0), ("sfed_a_b_2", {}, 2.0)]


@given(SAMPLES)
def test_prometheus_itself_reads_it(samples: list[Sample]) -> None:
    parser = pytest.importorskip("prometheus_client.parser", reason="prometheus_client is absent")
    families = list(parser.text_string_to_metric_families(exposition(iter(samples))))
    read_by_it = [(one.labels, one.value) for family in families for one in family.samples]
    assert all(family.type == "gauge" for family in families)
    expected = [(labels, value) for _, labels, value in samples]
    assert sorted(map(repr, read_by_it)) == sorted(map(repr, expected))


def test_a_reader_sees_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "x.prom"
    prometheus.write(path, iter([("a", {"name": "\ud800"}, math.inf)]))
    assert path.read_text() == (
        '# HELP sfed_a a as in metrics.jsonl.\n# TYPE sfed_a gauge\nsfed_a{name="?"} inf\n'
    )
    with pytest.raises(ZeroDivisionError):
        prometheus.write(path, (("a", {}, 1 / zero) for zero in (1, 0)))
    assert "inf" in path.read_text()
    assert [one.name for one in tmp_path.iterdir()] == ["x.prom"]
