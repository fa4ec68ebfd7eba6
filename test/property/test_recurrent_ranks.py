"""Ranks that have a share of each state: they stay in step, and none goes on from a wrong share.

Method: two machines of `support_tiers.state_machine` carry the same steps out, each on a thread of
its own, with a vote as tensor-parallel ranks have it. The disk of one of them, drawn anew for each
step, loses records, finds them damaged, or is slow.
Guarantee: both go on from the same places, keep the same checkpoints in the same slots, and hold
the same of them after every step; a vote that one alone asks for breaks the test.
"""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from support_tiers.doubles import BarrierMinimum
from support_tiers.state_machine import STEPS, Machine

BROKEN = ("lose", "damage")
DELAY_S = 0.003


class Ranks:
    def __init__(self, n_slots: int) -> None:
        self._barrier = BarrierMinimum(2)
        self.machines = [Machine(n_slots, self._barrier.rank(n), 7 + n) for n in range(2)]

    def carry_out(self, kind: str, prompt: list[int], number: int, victim: int) -> None:
        if kind in BROKEN:
            self.machines[victim].break_records(kind, number)
            return
        for rank, machine in enumerate(self.machines):
            machine.disk.delay_s = DELAY_S if rank == victim and number == 1 else 0.0
        self._barrier.on_each(lambda rank: self.machines[rank].carry_out(kind, prompt, number))
        first, second = (what_is_kept(machine) for machine in self.machines)
        assert first == second

    def close(self) -> None:
        for machine in self.machines:
            machine.states.close(5.0)


def what_is_kept(machine: Machine) -> Any:
    states = machine.states
    table = states.table
    return (
        list(table._kept.items()),
        (table._free, table._reserved, table._holds, table._nameless),
        (states._unnamed, states._held, states._wishes, states._n_writes),
        machine.starts,
    )


@settings(max_examples=100, deadline=None)
@given(STEPS, st.integers(1, 4), st.data())
def test_ranks_go_on_from_the_same_places(
    steps: list[tuple[str, list[int], int]], n_slots: int, data: st.DataObject
) -> None:
    ranks = Ranks(n_slots)
    try:
        for kind, prompt, number in steps:
            ranks.carry_out(kind, prompt, number, data.draw(st.integers(0, 1)))
    finally:
        ranks.close()
