"""Samples of one workload for a fleet."""

from __future__ import annotations

from itertools import pairwise

import pytest

from support_simulation.builders import BLOCK_TOKENS, call, recorded
from tiered_kv.simulation.workload.errors import WorkloadError
from tiered_kv.simulation.workload.generators.chat import Chat
from tiered_kv.simulation.workload.request import Request, Workload
from tiered_kv.simulation.workload.tiled import TiledWorkload, conversations


def everything(workload: Workload) -> list[Request]:
    """All requests, each answered at once."""
    found = []
    for first in workload.initial():
        request: Request | None = first
        while request is not None:
            found.append(request)
            request = workload.follow_up(request, request.arrival_s)
    return found


def test_copies_share_what_many_prompts_begin_with_and_nothing_else() -> None:
    # Block 1 is everybody's, 2 belongs to two requests of a thousand.
    requests = [call(n, float(n), [1, 10 + n]) for n in range(998)]
    requests += [call(998, 998.0, [1, 2, 3]), call(999, 999.0, [1, 2, 4])]
    copies = everything(TiledWorkload(recorded(requests), 3, shift_s=5.0))
    assert len({request.request_id for request in copies}) == 3000
    assert {request.blocks[0] for request in copies} == {1}
    second = [request.blocks[1] for request in copies if len(request.blocks) == 3]
    assert sorted(second.count(block) for block in set(second)) == [2, 2, 2]
    arrivals = [request.arrival_s for request in copies]
    assert arrivals == sorted(arrivals)


def test_sessions_go_on_within_their_copy() -> None:
    inner = Chat(sessions=20).build(3)
    copies = everything(TiledWorkload(inner, 2, shift_s=0.0))
    alone = everything(inner)
    assert len(copies) == 2 * len(alone)
    by_session: dict[int | None, list[Request]] = {}
    for request in copies:
        by_session.setdefault(request.session, []).append(request)
    assert len(by_session) == 2 * 20
    for calls in by_session.values():
        for before, after in pairwise(calls):
            whole = before.input_tokens // inner.block_tokens
            assert after.blocks[:whole] == before.blocks[:whole]


def test_a_prompt_that_holds_a_whole_former_one_is_of_its_conversation() -> None:
    requests = [
        call(0, 0.0, [1, 2]),
        call(1, 1.0, [1, 3]),
        call(2, 2.0, [1, 2, 5]),
        call(3, 3.0, [1, 2, 5, 6]),
        call(4, 4.0, [1, 9]),
        call(5, 5.0, [1]),
    ]
    found = conversations(requests, {1}, BLOCK_TOKENS)
    assert [request.session for request in found] == [0, 1, 0, 0, 4, 5]


def test_a_share_takes_whole_conversations_and_others_in_each_copy() -> None:
    requests = [call(2 * n, float(n), [n + 1]) for n in range(400)]
    requests += [call(2 * n + 1, 500.0 + n, [n + 1, 1000 + n]) for n in range(400)]
    tiled = TiledWorkload(recorded(requests), 2, shift_s=0.0, share=0.25)
    chosen: dict[int, set[int]] = {}
    for request in everything(tiled):
        copy, request_id = divmod(request.request_id, 1 << 40)
        chosen.setdefault(copy, set()).add(request_id)
    for some in chosen.values():
        assert {n for n in some if n % 2 == 0} == {n - 1 for n in some if n % 2}
        assert 140 < len(some) < 260
    assert chosen[0] != chosen[1]


def test_no_copy_is_refused() -> None:
    with pytest.raises(WorkloadError, match="at least 1 copy"):
        TiledWorkload(recorded([]), 0, 0.0)
