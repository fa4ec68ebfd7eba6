"""What a call says of its program: sessions, branches, and what follows."""

from __future__ import annotations

import pytest

from tiered_kv.api.parse import parse_terms
from tiered_kv.api.slo import DEFAULT_CLASSES
from tiered_kv.frontend.programs import Branch, Pauses, begun


def run(pauses: Pauses | None = None) -> Branch:
    return begun(Pauses() if pauses is None else pauses, ["question"])


def test_calls_of_a_run_are_one_session_and_runs_are_not() -> None:
    a, b = run(), run()
    first, second, other = a.begin(0.0), a.begin(1.0), b.begin(0.0)
    assert first["session_id"] == second["session_id"] != other["session_id"]
    assert "parent_session_id" not in first


def test_the_first_calls_of_branches_say_how_many_there_are() -> None:
    parent = run()
    left, right = parent.fork(2)
    said = left.begin(0.0)
    assert said["parent_session_id"] == parent.session_id
    assert said["branches"] == 2
    assert right.begin(0.0)["branches"] == 2
    assert "branches" not in left.begin(1.0)
    assert left.session_id != right.session_id
    (alone,) = parent.fork(1)
    assert "branches" not in alone.begin(2.0)


def test_what_is_known_to_follow_is_said() -> None:
    branch = run()
    assert branch.begin(0.0, follows=True)["next_call_in_s"] == 0.0
    last = branch.begin(1.0, follows=False)
    assert last["session_final"] is True
    assert last["next_call_probability"] == 0.0
    assert branch.begin(2.0, follows=False, pause_s=2.5)["next_call_in_s"] == 2.5
    assert "next_call_in_s" not in branch.begin(3.0)


def test_what_is_not_known_is_learned_from_the_runs_before() -> None:
    pauses = Pauses()
    for _ in range(2):
        branch = run(pauses)
        branch.begin(0.0)
        branch.end(1.0)
        branch.begin(4.0)
        branch.end(5.0)
        branch.close()
        branch.close()
    branch = run(pauses)
    first, second = branch.begin(0.0), branch.begin(4.0)
    assert (first["next_call_in_s"], first["next_call_probability"]) == (3.0, 1.0)
    assert second["next_call_probability"] == 0.0


def test_after_a_join_the_call_of_the_parent_follows_the_first_branch() -> None:
    pauses = Pauses()
    parent = run(pauses)
    branches = parent.fork(2)
    for branch in branches:
        branch.begin(0.0)
        branch.end(1.0)
    for branch in branches:
        branch.close()
    parent.begin(2.0)
    left, right = run(pauses).fork(2)
    said = left.begin(0.0)
    assert (said["next_call_in_s"], said["next_call_probability"]) == (1.0, 1.0)
    assert right.begin(0.0)["next_call_probability"] == 0.0


def test_what_is_remembered_is_bounded() -> None:
    pauses = Pauses(n_max=3)
    for place in range(10):
        pauses.followed(place, 1.0)
    assert len(pauses) == 3
    assert pauses.expected(0) is None
    assert pauses.expected(9) == (1.0, 1.0)


@pytest.mark.parametrize("follows", [True, False, None])
def test_the_server_takes_every_word(follows: bool | None) -> None:
    pauses = Pauses()
    for _ in range(2):
        child = run(pauses).fork(1024)[0]
        said = child.begin(0.0, follows=follows)
        child.end(1.0)
        child.close()
    hints = parse_terms(None, said, DEFAULT_CLASSES).hints
    assert hints.session_id == child.session_id
    assert hints.branches == 1024
