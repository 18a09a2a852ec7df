"""Each family of the documents trains and its export is read again; the table says what is seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import family_runs
from tests.support.families import FAMILIES, FEW, Family, some
from tests.support.selection import full

REST = [family for family in FAMILIES if family.name not in FEW]


def test_the_table_of_the_documents_lists_all_families_and_no_others() -> None:
    listed = [row.split(" | ")[:2] for row in family_runs.rows_of_page()]
    assert listed == [[f"| {family.name}", f"`{family.kind}`"] for family in FAMILIES]


@pytest.mark.dist
@pytest.mark.parametrize("chosen", [some(FEW), full(REST)], ids=["few", "rest"])
def test_the_table_of_the_documents_says_what_a_round_and_its_export_say(
    chosen: list[Family], tmp_path: Path
) -> None:
    names = [family.name for family in FAMILIES]
    of_page = dict(zip(names, family_runs.rows_of_page(), strict=True))
    found = family_runs.rows_of_runs(tmp_path, chosen)
    assert found == [of_page[family.name] for family in chosen]
