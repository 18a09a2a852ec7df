"""The known bugs can still be put into the code, and their page lists them."""

from __future__ import annotations

import pytest

from sfed.conformance.bugs import BUGS as CLASSES
from tests.support import known_bugs
from tests.support.known_bugs import BUGS, ROOT, Bug


@pytest.mark.parametrize("bug", BUGS, ids=[bug.name for bug in BUGS])
def test_a_bug_is_one_replacement_and_its_test_exists(bug: Bug) -> None:
    assert (ROOT / bug.file).read_text(encoding="utf-8").count(bug.old) == 1
    assert bug.old != bug.new
    file, _, function = bug.test.partition(" ")[0].partition("::")
    assert f"def {function}(" in (ROOT / file).read_text(encoding="utf-8")
    assert not bug.conformance or bug.conformance in {one.name for one in CLASSES}


def test_names_are_unique_and_the_page_has_their_table() -> None:
    assert len({bug.name for bug in BUGS}) == len(BUGS)
    page = (ROOT / "docs" / "known-bugs.md").read_text(encoding="utf-8")
    assert page.endswith(known_bugs.table()), "python -m tests.support.known_bugs --table"
