"""The table of checkpoints against a naive one, over random histories."""

from __future__ import annotations

from typing import Literal, TypeAlias

from hypothesis import given, settings
from hypothesis import strategies as st

from tiered_kv.memory.checkpoints import Checkpoints

Kind: TypeAlias = Literal["reserve", "keep", "give_back", "use", "hold", "let_go", "drop", "clear"]
KINDS: list[Kind] = ["reserve", "keep", "keep", "give_back", "use", "hold", "let_go", "drop"]
STEPS = st.lists(
    st.tuples(st.sampled_from([*KINDS * 4, "clear"]), st.integers(0, 5), st.integers(0, 9)),
    min_size=10,
    max_size=80,
)


class Naive:
    """Names in the order of their use, the oldest first, each with what its slot is held by."""

    def __init__(self, n_slots: int) -> None:
        self.n_slots = n_slots
        self.kept: list[tuple[bytes, int]] = []
        self.reserved: list[int] = []
        self.held: list[int] = []

    def in_use(self) -> set[int]:
        return {*self.reserved, *self.held, *(slot for _, slot in self.kept)}

    def can_reserve(self) -> tuple[bool, bytes | None]:
        """Whether there is a slot, and the name that goes for it."""
        if len(self.in_use()) < self.n_slots:
            return True, None
        victims = [name for name, slot in self.kept if slot not in self.held]
        return bool(victims), victims[0] if victims else None

    def slot_of(self, name: bytes) -> int:
        return dict(self.kept)[name]


@settings(max_examples=300, deadline=None)
@given(STEPS, st.integers(1, 5))
def test_the_least_recently_used_makes_way_and_what_is_held_stays(
    steps: list[tuple[Kind, int, int]], n_slots: int
) -> None:
    table, naive = Checkpoints(n_slots), Naive(n_slots)
    for kind, number, pick in steps:
        change(table, naive, kind, bytes([number]) * 32, pick)
        table.check_integrity()
        assert {name for name, _ in naive.kept} == {
            name for name in (bytes([n]) * 32 for n in range(6)) if name in table
        }
        assert len(table) == len(naive.kept)


def change(table: Checkpoints, naive: Naive, kind: Kind, name: bytes, pick: int) -> None:
    known = [n for n, _ in naive.kept]
    if kind == "reserve":
        expected, victim = naive.can_reserve()
        slot = table.reserve()
        assert (slot is not None) == expected
        if slot is not None:
            naive.kept = [one for one in naive.kept if one[0] != victim]
            assert slot not in naive.in_use(), "somebody has that slot"
            naive.reserved.append(slot)
    elif kind in ("keep", "give_back") and naive.reserved:
        slot = naive.reserved.pop(pick % len(naive.reserved))
        if kind == "give_back":
            table.give_back(slot)
            return
        assert table.keep(slot, name) == (name not in known)
        if name in known:
            slot = naive.slot_of(name)
        naive.kept = [one for one in naive.kept if one[0] != name]
        naive.kept.append((name, slot))
    elif kind == "use" and name in known:
        slot = naive.slot_of(name)
        assert table.use(name) == slot
        naive.kept.remove((name, slot))
        naive.kept.append((name, slot))
    elif kind == "hold" and name in known:
        slot = naive.slot_of(name)
        table.hold(slot)
        naive.held.append(slot)
    elif kind == "let_go" and naive.held:
        table.let_go(naive.held.pop(pick % len(naive.held)))
    elif kind == "drop" and name in known:
        table.drop(name)
        naive.kept = [one for one in naive.kept if one[0] != name]
    elif kind == "clear":
        table.clear()
        naive.kept = []
