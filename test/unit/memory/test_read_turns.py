"""Whose pages are read next: without a thread (test_read_queue.py has those)."""

from __future__ import annotations

from tiered_kv.memory.probes import PROBE_PAGES
from tiered_kv.memory.read_turns import READ_STRETCH_PAGES, ReadTurns, Stretch


def read_all(turns: ReadTurns) -> list[tuple[int, int, int]]:
    """(op, start, stop) of all stretches, each of which arrives whole."""
    read = []
    while (stretch := turns.next()) is not None:
        read.append((stretch.op, stretch.start, stretch.stop))
        if turns.arrived(stretch, stretch.stop - stretch.start):
            turns.end(stretch.op)
    return read


def test_the_more_urgent_go_between_the_stretches_of_others() -> None:
    turns = ReadTurns()
    turns.add(1, 2 * READ_STRETCH_PAGES, (1.0, 0.0))
    stretch = turns.next()
    assert stretch == Stretch(1, 0, READ_STRETCH_PAGES, is_last=False)
    turns.add(2, 5, (0.0, 0.0))
    assert not turns.arrived(stretch, READ_STRETCH_PAGES)
    assert read_all(turns) == [(2, 0, 5), (1, READ_STRETCH_PAGES, 2 * READ_STRETCH_PAGES)]


def test_what_is_short_is_over() -> None:
    turns = ReadTurns()
    turns.add(1, 2 * READ_STRETCH_PAGES)
    stretch = turns.next()
    assert stretch is not None
    assert turns.arrived(stretch, 7)
    assert turns.end(1) == (7, False)
    assert turns.next() is None
    assert turns.pages_before((9.0, 0.0)) == 2 * READ_STRETCH_PAGES, "until it is dropped"
    turns.drop(1)
    assert turns.pages_before((9.0, 0.0)) == 0


def test_what_nobody_wants_is_not_read_but_to_see_how_long_it_takes() -> None:
    turns = ReadTurns()
    for op in (1, 2, 3):
        turns.add(op, 20, (float(op), 0.0))
    turns.forget(1)
    turns.forget(2, is_probe=True)
    assert read_all(turns) == [(1, 0, 0), (3, 0, 20), (2, 0, PROBE_PAGES)]


def test_units_of_several_pages() -> None:
    turns = ReadTurns(pages_per_unit=8.0)
    turns.add(1, 20)
    assert read_all(turns) == [(1, 0, 8), (1, 8, 16), (1, 16, 20)]
    small = ReadTurns(pages_per_unit=1000.0)
    small.add(1, 2)
    assert read_all(small) == [(1, 0, 1), (1, 1, 2)]
