"""Threads run ahead, but not far, and nobody can tell by the results."""

from __future__ import annotations

import threading
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsca_pipeline.sites.ahead import map_ahead


@settings(deadline=None, max_examples=30)
@given(items=st.lists(st.integers(), max_size=12), ahead=st.integers(0, 4))
def test_results_come_as_map_gives_them(items: list[int], ahead: int) -> None:
    assert list(map_ahead(str, items, ahead=ahead)) == list(map(str, items))


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_no_more_is_begun_than_was_agreed(ahead: int) -> None:
    taken: list[int] = []

    results = map_ahead(str, (taken.append(item) or item for item in range(100)), ahead=ahead)

    assert list(islice(results, 2)) == ["0", "1"]
    assert len(taken) == 2 + ahead


def test_an_error_comes_at_its_item_s_turn_and_ends_the_threads() -> None:
    before = threading.active_count()
    results = map_ahead(lambda item: 1 // item, [1, 1, 0, 1], ahead=2)

    assert [next(results), next(results)] == [1, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert threading.active_count() == before


def test_work_is_done_at_the_same_time() -> None:
    # Each waits for the other: in turn they would wait for ever.
    meeting = threading.Barrier(2, timeout=60)

    assert len(list(map_ahead(lambda _: meeting.wait(), range(2), ahead=2))) == 2
