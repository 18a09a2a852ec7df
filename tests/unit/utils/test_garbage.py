"""What the garbage collector visits, and what it still finds."""

from __future__ import annotations

import gc
import weakref

import pytest

from sfed.utils import garbage


class Loop:
    """Refers to itself."""

    def __init__(self) -> None:
        self.loop = self


@pytest.fixture(autouse=True)
def _as_before():
    yield
    gc.unfreeze()
    gc.enable()


def test_nothing_is_collected_while_permanent_objects_are_made() -> None:
    with garbage.permanent():
        assert not gc.isenabled()
        kept = [Loop() for _ in range(10)]
    assert gc.isenabled()
    assert not [one for one in gc.get_objects() if one is kept], "it is visited"


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    with garbage.permanent():
        pass
    assert not gc.isenabled()


def test_the_collector_is_on_again_after_an_error() -> None:
    with pytest.raises(ImportError), garbage.permanent():
        raise ImportError
    assert gc.isenabled()


def test_rounds_collect_what_they_leave_and_nothing_else() -> None:
    before = Loop()
    garbage_before, lasting = weakref.ref(Loop()), weakref.ref(before)
    with garbage.only_of_the_body():
        assert garbage_before() is None, "garbage of the build would stay for the whole run"
        within = weakref.ref(Loop())
        del before
        gc.collect()
        assert within() is None
        assert lasting() is not None, "the objects from before are visited"
    gc.collect()
    assert lasting() is None, "what fit() made would never be freed"
