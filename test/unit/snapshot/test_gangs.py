"""Who goes on from the same prefix."""

from __future__ import annotations

from tiered_kv.snapshot.gangs import gangs_of

#: 1 (100 tokens) with 2 (to 300) and 3 (to 110) below it, 4 (to 1000) below 2; 5 is elsewhere.
PREFIXES = {1: (-1, 100), 2: (1, 300), 3: (1, 110), 4: (2, 1000), 5: (-1, 50)}


def test_a_gang_shares_what_saves_the_most() -> None:
    assert gangs_of(PREFIXES, [2, 2, 3]) == [2, 2, 1]
    assert gangs_of(PREFIXES, [4, 4, 4, 3]) == [4, 4, 4, 1]


def test_a_long_common_prefix_beats_a_deep_one_of_few() -> None:
    # Five below 1 save 400 tokens; two below 2 save 300.
    assert gangs_of(PREFIXES, [2, 2, 3, 3, 3]) == [1, 1, 1, 1, 1]


def test_who_is_alone_has_none() -> None:
    assert gangs_of(PREFIXES, [5, 4, None]) == [None, None, None]
    assert gangs_of({}, [None, 7]) == [None, None]
