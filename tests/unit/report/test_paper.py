"""What a paper takes from runs: vector figures, LaTeX that compiles, CSV that programs read."""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfed.report import __main__ as report
from sfed.report import plotting
from sfed.report.paper import csv_text, latex
from sfed.report.tables import NONE, Table
from tests.support.run_folders import write_run

EVIL = "a_b & 50 % #1 $x$ {y} \\z ~ ^ <t> |"
TABLE = Table(
    ["client", "holds", "examples", "before", "change"],
    [
        ["0", EVIL, "1,234", "-0.5000", "-88.2 %"],
        ["*1", "[opt]", NONE, "1.0000", NONE],
    ],
    text_columns=2,
    groups=[("", 3), ("loss (nats/token)", 2)],
)


def read(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text)))


def test_a_table_as_latex() -> None:
    assert latex(TABLE).splitlines() == [
        r"% Needs \usepackage{booktabs}.",
        r"\begin{tabular}{llrrr}",
        r"\toprule",
        r"\multicolumn{3}{c}{} & \multicolumn{2}{c}{loss (nats/token)} \\",
        r"\cmidrule(lr){4-5}",
        r"client & holds & examples & before & change \\",
        r"\midrule",
        r"0 & a\_b \& 50 \% \#1 \$x\$ \{y\} \textbackslash{}z \textasciitilde{} "
        r"\textasciicircum{} \textless{}t\textgreater{} \textbar{} & 1,234 & $-$0.5000 & "
        r"$-$88.2 \% \\",
        r"{*}1 & {[}opt] & -- & 1.0000 & -- \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_many_rows_go_over_pages() -> None:
    text = latex(Table(["a", "b"], [[str(i), "1"] for i in range(41)]))
    assert r"\usepackage{booktabs,longtable}" in text and r"\begin{longtable}{lr}" in text
    assert r"\begin{tabular}" in latex(Table(["a", "b"], [["1", "1"]] * 40))


def test_a_table_as_csv_has_plain_numbers_and_units_in_its_head() -> None:
    head, first, second = read(csv_text(TABLE))
    assert head == [
        "client", "holds", "examples", "loss (nats/token): before",
        "loss (nats/token): change (%)",
    ]  # fmt: skip
    assert first == ["0", EVIL, "1234", "-0.5000", "-88.2"]
    assert second == ["*1", "[opt]", "", "1.0000", ""]


def test_different_units_stay_with_their_numbers() -> None:
    rows = read(csv_text(Table(["a", "b"], [["x", "3 %"], ["y", "2 s"], ["z", "1 min 2 s"]])))
    assert rows == [["a", "b"], ["x", "3 %"], ["y", "2 s"], ["z", "1 min 2 s"]]
    rows = read(csv_text(Table(["a", "b"], [["x", "45 s"], ["y", NONE], ["z", "1 min 2 s"]])))
    assert rows == [["a", "b"], ["x", "45 s"], ["y", ""], ["z", "1 min 2 s"]]


@pytest.mark.parametrize("name", ["=1+1", "+cmd", "-cmd", "@x"])
def test_a_spreadsheet_obeys_no_name(name: str) -> None:
    assert read(csv_text(Table(["a", "b"], [[name, name]])))[1] == [f"'{name}", f"'{name}"]


@given(st.lists(st.text(), min_size=2, max_size=2))
def test_a_row_stays_a_row_whatever_it_holds(cells: list[str]) -> None:
    table = Table(["a", "b"], [cells], text_columns=2)
    assert len(read(csv_text(table))) == 2
    (row,) = latex(table).splitlines()[5:-2]
    without = re.sub(r"\\[&%$#_{}]|\\text\w+{}|\\ldots{}|\$\\pm\$|{[\[*]}", "", row[:-3])
    assert without.count("&") == 1 and not set(without) & set("%$#_{}\\~^*[")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``paper/`` of two runs with names and labels that LaTeX would obey."""
    folder = tmp_path_factory.mktemp("paper")
    for name, rank in (("100%_a&b", 4), ("{b}^2", 8)):
        write_run(folder / "runs" / name, rank=rank, num_clients=2, rounds=1, scores=("f_1",))
    with pytest.MonkeyPatch.context() as patch:  # drawing takes most of the time
        patch.setattr(plotting, "_png", lambda *_: b"\x89PNG")
        patch.setattr(plotting, "_vector", lambda _, kind: kind.encode())
        report.main([str(folder / "runs"), "--paper", "--out", str(folder / "out")])
    return folder / "out" / "paper"


def test_every_figure_is_there_as_svg_and_pdf(written: Path) -> None:
    stems = {path.stem for path in (written.parent / "figures").glob("*.png")}
    assert "compare-held-out-loss" in stems and len(stems) > 10
    for stem in stems:
        assert (written / f"{stem}.svg").read_bytes() == b"svg"
        assert (written / f"{stem}.pdf").read_bytes() == b"pdf"


def test_comparisons_and_runs_have_tables(written: Path) -> None:
    stems = {path.stem for path in written.glob("*.tex")}
    assert stems == {path.stem for path in written.glob("*.csv")}
    assert {"compare-runs", "01-100__a_b-clients", "02-_b_2-means"} <= stems
    rows = read((written / "compare-runs.csv").read_text(encoding="utf-8"))
    assert rows[0][:4] == ["run", "method", "seed", "N"] and rows[1][0] == "100%_a&b"
    assert rows[0][-2:] == ["sent (MiB)", "time (s)"] and rows[1][-2:] == ["2", "6"]


def test_vectors_are_what_journals_take_and_equal_where_the_numbers_are() -> None:
    panel = plotting.Panel("t", "y", [plotting.Curve("a<b>&", [(0, 1.0), (1, 2.0)])])
    svg, pdf = (plotting.curves([panel], kind) for kind in ("svg", "pdf"))
    assert ET.fromstring(svg.decode()).tag.endswith("svg")
    assert pdf.startswith(b"%PDF") and b"/Type3" not in pdf and b"CreationDate" not in pdf
    assert (svg, pdf) == tuple(plotting.curves([panel], kind) for kind in ("svg", "pdf"))


def test_nothing_of_it_is_written_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plotting, "_png", lambda *_: b"\x89PNG")
    run = write_run(tmp_path / "run", num_clients=2, rounds=1)
    report.main([str(run)])
    assert not (run / "paper").exists()


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_latex_compiles_every_table(written: Path, tmp_path: Path) -> None:
    inputs = "".join(rf"\input{{{path}}}\par " for path in sorted(written.glob("*.tex")))
    (tmp_path / "own.tex").write_text(latex(TABLE), encoding="utf-8")
    text = r"\documentclass{article}\usepackage{booktabs,longtable}\begin{document}"
    text += rf"{inputs}\input{{own.tex}}\end{{document}}"
    (tmp_path / "all.tex").write_text(text)
    words = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Missing character" not in (tmp_path / "all.log").read_text(errors="replace")
