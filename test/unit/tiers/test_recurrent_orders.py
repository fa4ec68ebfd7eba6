"""Checkpoints of recurrent state that are to be forgotten while they are on their way."""

from __future__ import annotations

from array import array

from support_tiers.state_machine import Machine

PROMPT = [0, 1, 1, 0, 1, 0]
DELAY_S = 0.05


def names_of(machine: Machine) -> list[bytes]:
    path, _, _ = machine.path(array("q", [*PROMPT, 0]))
    return [name for node in path for name in node.page_hashes]


def test_what_is_being_written_does_not_stay_on_disk() -> None:
    machine = Machine(4)
    machine.disk.delay_s = DELAY_S
    machine.serve(PROMPT, 4, is_aborted=False)
    names = names_of(machine)
    machine.states.forget(names)
    assert machine.states.drop_stored(names)
    machine.states._queue.wait()
    assert machine.disk.written
    assert not any(machine.disk.contains(name) for name in names)
    machine.states.close(1.0)


def test_what_is_being_read_arrives_for_nobody() -> None:
    machine = Machine(4)
    machine.serve(PROMPT, 4, is_aborted=False)
    states = machine.states
    states._queue.wait()
    states.poll()
    states.flush()
    machine.disk.delay_s = DELAY_S
    tokens, names = array("q", [*PROMPT, 0]), names_of(machine)
    states.wish("one")
    assert not states.has_come("one", *machine.path(tokens)), "it is read"
    states.forget(names)
    states._queue.wait()
    states.poll()
    assert not any(name in states.table for name in names)
    assert states.drop_stored(names)
    assert states.has_come("one", *machine.path(tokens))
    states.table.check_integrity()
    states.close(1.0)


def test_a_server_without_a_disk_has_none_to_drop() -> None:
    machine = Machine(4)
    machine.states._store = None
    assert machine.states.drop_stored([bytes(32)]) == 0
    machine.states.close(1.0)
