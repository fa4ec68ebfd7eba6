"""How much is prefilled at once: what a plan, and those who decode, leave of a chunk."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from support_plugin.mini_scheduler import CHUNK, MiniScheduler, Spy, request, running, three
from support_tiers.tier_rig import PAGE_SIZE
from tiered_kv.core.device_spec import DEVICES
from tiered_kv.scheduler.iteration_policy import IterationPlan
from tiered_kv.scheduler.plan import PrefillRoom


@pytest.mark.parametrize(
    ("planned", "chunk"), [(None, CHUNK), (1, 4), (11, 8), (CHUNK, CHUNK), (1000, CHUNK), (0, 4)]
)
def test_the_chunk_is_whole_pages_and_never_larger_than_configured(
    scheduler: MiniScheduler, spy: Spy, planned: int | None, chunk: int
) -> None:
    three(scheduler)
    spy.plan_fields = {"prefill_tokens": planned}
    scheduler.step()
    assert scheduler.chunk_seen == chunk
    assert scheduler.chunked_prefill_size == CHUNK


def test_no_prefill_while_somebody_decodes(scheduler: MiniScheduler, spy: Spy) -> None:
    scheduler.running_batch.reqs.append(running(scheduler, "r"))
    three(scheduler)
    spy.plan_fields = {"prefill_tokens": 0}
    assert scheduler.step() == []
    assert scheduler.offered is None
    assert scheduler.waiting == ["a", "b", "c"]


def room(plan_prefill: Any) -> Any:
    return SimpleNamespace(plan_prefill=plan_prefill, begin_pass=lambda batch: None)


@pytest.mark.parametrize(("planned", "chunk"), [(1, 16), (17, 16), (31, 16), (32, CHUNK), (0, 16)])
def test_where_prompts_are_split_at_fixed_places_chunks_are_whole_pieces(
    scheduler: MiniScheduler, spy: Spy, planned: int, chunk: int
) -> None:
    """SGLang begins no prompt whose first piece is less: it would wait for ever."""
    scheduler.truncation_align_size = 16
    three(scheduler)
    spy.plan_fields = {"prefill_tokens": planned}
    scheduler.step()
    assert scheduler.chunk_seen == chunk
    if planned > 1:
        spy.plan_fields["mix_decodes"] = True
        scheduler.step()
        assert scheduler.chunk_seen == (17 if planned <= 32 else CHUNK)


@pytest.mark.parametrize(
    ("everyone", "left", "asked", "chunk"),
    [
        (12, None, None, 12),
        (12, 8, None, 8),
        (8, 12, None, 12),
        (0, 8, None, 8),
        (None, 8, None, 8),
        (8, 12, 8, 8),
        (12, None, 8, 8),
    ],
)
def test_who_decodes_leaves_room_for_so_much_prefill(
    scheduler: MiniScheduler,
    spy: Spy,
    everyone: int | None,
    left: int | None,
    asked: int | None,
    chunk: int,
) -> None:
    """What everyone would leave counts only where nobody says what those who decode do."""
    asks: list[tuple[Any, ...]] = []

    def plan_prefill(*args: Any) -> IterationPlan:
        asks.append(args)
        return IterationPlan((1,), None if left is None else PrefillRoom(left))

    scheduler.tiered_kv_order.room = room(plan_prefill)
    three(scheduler)
    scheduler.step()
    assert asks == [], "nobody decodes"
    spy.plan_fields = {"prefill_tokens": asked, "room": PrefillRoom(everyone)}
    scheduler.step()
    assert scheduler.chunk_seen == chunk
    assert [(args[0], args[1]) for args in asks] == [(scheduler.running_batch, spy.states[-1])]


def test_the_policy_is_told_whose_turn_it_is(scheduler: MiniScheduler, spy: Spy) -> None:
    """Prefills, and what ran instead of one; nobody chooses who decodes."""
    three(scheduler)
    scheduler.tick(101.0)
    assert scheduler.step() == ["a"]
    scheduler.tick(102.0)
    turns = spy.turns
    assert scheduler.step() == ["b"]
    assert turns[-1] == (False, 0, 0.0)
    scheduler.tick(103.0)
    scheduler.admit = 0
    assert scheduler.step() == []
    scheduler.tick(104.0)
    scheduler.step()
    scheduler.tick(105.0)
    scheduler.step()
    assert turns[-2:] == [(True, 1, 104.0), (True, 2, 105.0)]


def test_decodes_leave_room_for_so_many_requests(scheduler: MiniScheduler, spy: Spy) -> None:
    scheduler.running_batch.reqs.append(running(scheduler, "r"))
    three(scheduler)
    plans = iter(
        [
            IterationPlan((1,), PrefillRoom(2 * PAGE_SIZE, 2)),
            IterationPlan((1,), PrefillRoom(100)),
        ]
    )
    selection: Any = room(lambda *_: next(plans))
    scheduler.tiered_kv_order.room = selection
    scheduler.admit = 3
    assert scheduler.step() == ["a", "b"]
    assert scheduler.chunk_seen == 2 * PAGE_SIZE
    assert scheduler.waiting == ["c"]
    spy.plan_fields = {"admit_at_most": 0}
    assert scheduler.step() == []


def test_decodes_that_leave_no_room_go_first(scheduler: MiniScheduler) -> None:
    scheduler.running_batch.reqs.append(running(scheduler, "r"))
    three(scheduler)
    plans = iter([IterationPlan((1,), PrefillRoom(0)), IterationPlan((1,), PrefillRoom(8))])
    selection: Any = room(lambda *_: next(plans))
    scheduler.tiered_kv_order.room = selection
    assert scheduler.step() == []
    assert len(scheduler.step()) == 1


def test_mixed_decodes_take_theirs_of_the_chunk(scheduler: MiniScheduler, spy: Spy) -> None:
    scheduler.is_mixed_chunk = True
    scheduler.running_batch.reqs += [running(scheduler, "r"), running(scheduler, "s")]
    three(scheduler)
    spy.plan_fields = {"prefill_tokens": 12}
    scheduler.step()
    assert scheduler.chunk_seen == 8 + 2
    spy.plan_fields = {"prefill_tokens": 2}
    assert scheduler.step() == []


def test_decodes_are_mixed_in_where_the_plan_says_so(scheduler: MiniScheduler, spy: Spy) -> None:
    scheduler.running_batch.reqs.append(running(scheduler, "r"))
    three(scheduler)
    spy.plan_fields = {"prefill_tokens": 13, "mix_decodes": True}
    assert scheduler.step() == ["a"]
    assert (scheduler.chunk_seen, scheduler.mix_seen, scheduler.mixed) == (12 + 1, True, True)
    assert not scheduler.is_mixed_chunk
    scheduler.has_decode_memory = False
    assert scheduler.step() == ["b"]
    assert (scheduler.mix_seen, scheduler.mixed) == (True, False)


def test_who_was_passed_over_has_his_turn(scheduler: MiniScheduler, spy: Spy) -> None:
    """Decodes that were to be mixed in and were not: nobody counts on it in the next pass."""
    scheduler.running_batch.reqs.append(running(scheduler, "r"))
    three(scheduler)
    spy.plan_fields = {"mix_decodes": True}
    scheduler.has_decode_memory = False
    assert scheduler.step() == ["a"]
    scheduler.step()
    assert [state.can_mix for state in spy.states] == [True, False]
    # Now everybody decodes.
    scheduler.waiting_queue.clear()
    scheduler.step()
    scheduler.arrive(request("d"))
    scheduler.step()
    assert spy.states[-1].can_mix


def test_a_plan_that_mixes_ends_before_who_cannot_be_mixed(
    scheduler: MiniScheduler, spy: Spy
) -> None:
    scheduler.running_batch.reqs.append(running(scheduler, "r"))
    reqs = three(scheduler)
    reqs[1].return_logprob = True
    scheduler.admit = 3
    spy.plan_fields = {"mix_decodes": True}
    assert scheduler.step() == ["a"]
    assert scheduler.mixed
    # It is the first: the policy is told that there is no mixing, and asked again.
    n_asked = len(spy.states)
    assert scheduler.step() == ["b", "c"]
    assert not scheduler.mixed
    assert [state.can_mix for state in spy.states[n_asked:]] == [False, False]


def test_nobody_is_mixed_with_who_runs_with_logprobs(scheduler: MiniScheduler, spy: Spy) -> None:
    other = running(scheduler, "r")
    other.return_logprob = True
    scheduler.running_batch.reqs.append(other)
    three(scheduler)
    scheduler.step()
    assert not spy.states[0].can_mix
    scheduler.running_batch.reqs.remove(other)
    scheduler.running_batch.new_tokens_required_next_decode = lambda: 10**9
    scheduler.step()
    assert not spy.states[-1].can_mix, "there is no memory for their next tokens"


def test_nobody_is_mixed_where_decodes_verify_drafts(scheduler: MiniScheduler, spy: Spy) -> None:
    running(scheduler, "r")
    three(scheduler)
    scheduler.spec_algorithm = SpeculativeAlgorithm.NGRAM
    scheduler.step()
    assert not spy.states[0].can_mix
    scheduler.spec_algorithm = SpeculativeAlgorithm.NONE
    scheduler.step()
    assert spy.states[-1].can_mix


def test_nobody_is_mixed_where_other_ranks_count_tokens(scheduler: MiniScheduler, spy: Spy) -> None:
    """DP attention: ranks with other requests run each pass together."""
    running(scheduler, "r")
    three(scheduler)
    scheduler.require_mlp_sync = True
    scheduler.step()
    assert not spy.states[0].can_mix
    scheduler.require_mlp_sync = False
    scheduler.step()
    assert spy.states[-1].can_mix


@pytest.mark.parametrize("is_configured", [False, True])
def test_mixing_is_the_default_only_where_it_was_measured(
    scheduler: MiniScheduler, spy: Spy, is_configured: bool
) -> None:
    scheduler.is_mixed_chunk = is_configured
    three(scheduler)
    scheduler.step()
    assert spy.states[0].wants_mixing is is_configured
    assert not any(device.is_mixing_measured for device in DEVICES.values())


@pytest.mark.parametrize("chunk", [None, PAGE_SIZE])
def test_decodes_are_not_mixed_into_chunks_that_have_no_room(
    scheduler: MiniScheduler, spy: Spy, chunk: int | None
) -> None:
    scheduler.chunked_prefill_size = chunk
    scheduler.running_batch.reqs.append(running(scheduler, "r"))
    three(scheduler)
    spy.plan_fields = {"mix_decodes": True}
    assert scheduler.step() == ["a"]
    assert (scheduler.chunk_seen, scheduler.mixed) == (chunk, False)


def test_without_chunked_prefill_only_a_plan_of_none_counts(
    scheduler: MiniScheduler, spy: Spy
) -> None:
    scheduler.chunked_prefill_size = None
    three(scheduler)
    spy.plan_fields = {"prefill_tokens": 8}
    scheduler.step()
    assert scheduler.chunk_seen is None
    assert spy.states[0].chunk_tokens == scheduler.max_prefill_tokens
