"""The store of a fleet: what one server wrote is there for all, and it has an end."""

from __future__ import annotations

from tiered_kv.simulation.shared_store import SharedStore

PAGES = [bytes([n]) * 32 for n in range(10)]


def test_leading_pages_are_known_once_they_are_written() -> None:
    store = SharedStore(capacity_bytes=1000, page_bytes=10)
    assert store.known(PAGES) == 0
    assert store.put(PAGES[:3]) == 3
    assert store.put(PAGES[1:5]) == 4
    assert store.known(PAGES) == 5
    assert store.known(PAGES[6:]) == 0
    assert (len(store), store.n_written) == (5, 5)


def test_the_page_used_longest_ago_goes_first() -> None:
    store = SharedStore(capacity_bytes=35, page_bytes=10)
    store.put(PAGES[:3])
    store.touch(PAGES[:1])
    store.put(PAGES[3:4])
    assert [store.known([page]) for page in PAGES[:4]] == [1, 0, 1, 1]
    assert store.put(PAGES[4:9]) == 0  # not even they fit
    assert len(store) == 3
