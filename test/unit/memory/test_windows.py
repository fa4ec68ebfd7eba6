"""Where windows let a prompt go on: as a look at every place says."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tiered_kv.memory.windows import deepest_end, pages_back


@given(st.lists(st.booleans(), max_size=40), st.integers(0, 6))
def test_the_deepest_end_is_the_last_whose_window_is_there(there: list[bool], n_back: int) -> None:
    ends = [end for end in range(len(there) + 1) if all(there[max(0, end - n_back) : end])]
    assert deepest_end(len(there), n_back, there.__getitem__) == max(ends)


def test_no_page_is_looked_at_twice() -> None:
    looked: list[int] = []

    def is_there(place: int) -> bool:
        looked.append(place)
        return place % 5 != 0

    assert deepest_end(1000, 6, is_there) == 0
    assert len(looked) == len(set(looked))


def test_a_window_counts_the_pages_that_it_touches() -> None:
    assert [pages_back(tokens, 16) for tokens in (1, 16, 17, 1023, 1024)] == [1, 1, 2, 64, 64]
