"""What an iteration policy is told of those who run and wait, on SGLang's own scheduler loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

pytest.importorskip("sglang")

from sglang.srt.managers.schedule_batch import Req

from support_plugin.decode_loop import DecodeLoop
from support_plugin.decode_requests import Kind, light_costs
from support_plugin.told import Told, kind, turns
from tiered_kv.api.slo import Slo
from tiered_kv.api.terms import Terms
from tiered_kv.plugin.queue.clock_tick import SharedClock
from tiered_kv.scheduler.calibration import DECODES_PER_OBSERVATION, Calibrator
from tiered_kv.scheduler.iteration_policy import IterationPlan, IterationState
from tiered_kv.scheduler.plan import PrefillRoom
from tiered_kv.scheduler.prefill_turns import TURN_SHARE

MakeLoop = Callable[..., DecodeLoop]


def test_totals_and_requests_agree(make_loop: MakeLoop, overlap: bool) -> None:
    loop, told = make_loop(overlap=overlap), Told()
    selection = loop.choose_by(told)
    count = iter(range(10_000))
    told.decode = lambda ids: ids if next(count) % 3 else ids[::2]
    reqs: list[Req] = [kind(i, 8 + i, tbt_s=0.1).request(str(i)) for i in range(5)]
    for req in reqs:
        loop.arrive(req)

    def goes_on() -> bool:
        if told.states:
            state, totals = told.states[-1], selection.running.totals
            assert totals.n == len(state.running)
            assert totals.context_tokens == sum(r.context_tokens for r in state.running)
            told.states.clear()
        return not loop.is_at_rest

    loop.run(goes_on)
    loop.check_nothing_is_held()


def test_a_parked_request_is_due_since_its_last_token(make_loop: MakeLoop) -> None:
    loop, told = make_loop(overlap=False), Told()
    loop.choose_by(told)
    told.decode = lambda ids: ids[:1]
    for i in range(2):
        loop.arrive(kind(i, 30, tbt_s=0.2).request(str(i)))
    loop.run(turns(8))
    first, second = told.states[-1].running
    now_s = told.states[-1].now_s
    assert now_s - first.last_token_s == pytest.approx(0.0)
    assert now_s - second.last_token_s > 0.04  # a turn takes 10 ms
    assert second.next_token_due_s == pytest.approx(second.last_token_s + 0.2)
    assert first.context_tokens > second.context_tokens


def test_the_clock_runs_while_somebody_decodes() -> None:
    clock = SharedClock(wanted=lambda: False, on_tick=lambda: None)
    assert clock.read([]) is None
    running = [False]
    clock.also_wanted(lambda: running[0])
    assert clock.read([]) is None
    running[0] = True
    assert clock.read([]) is not None


def test_decodes_are_learned_from_without_transfers(make_loop: MakeLoop, overlap: bool) -> None:
    loop = make_loop(overlap=overlap)
    loop.govern("slack", "slack", light_costs())
    calibrator = Calibrator(loop.tree_cache.parts.cost_model)
    loop.tree_cache.hierarchy.context.calibrator = calibrator
    loop.serve(*(kind(i, 120).request(str(i)) for i in range(3)))
    assert calibrator._decode.n_observations >= 120 // DECODES_PER_OBSERVATION // 2


def test_prefill_gets_the_room_that_the_chosen_leave(
    make_loop: MakeLoop, overlap: bool, answers: Callable[[Kind], list[int]]
) -> None:
    decoded_last: list[bool] = []

    class Rooms(Told):
        """No room for prefill after a prefill, and a page of it after a decode."""

        def plan(self, state: IterationState) -> IterationPlan:
            plan = super().plan(state)
            if state.prefill is None:
                return plan
            decoded_last.append(state.prefill.turns.decoded_last)
            return IterationPlan(plan.decode, PrefillRoom(4 if decoded_last[-1] else 0))

    loop, told = make_loop(overlap=overlap, chunk_tokens=64), Rooms()
    loop.govern("fcfs", "slack", light_costs())
    loop.tree_cache.decode_selection._policy = told
    told.decode = lambda ids: ids[:1]
    first, second = kind(0, 30), kind(1, 6)
    kinds = {"first": first, "second": second}
    loop.arrive(first.request("first"))
    loop.run(turns(6))
    assert all(state.prefill is None for state in told.states)
    before = len(loop.tp_worker.batch_sizes)
    req = second.request("second")
    req.tiered_kv_terms = Terms(slo=Slo(ttft_s=0.5))
    loop.arrive(req)
    loop.run(lambda: not loop.is_at_rest)
    asked = [state for state in told.states if state.prefill is not None]
    assert decoded_last[:3] == [True, False, True]
    assert all(state.prefill.least_ttft_s == 0.5 for state in asked)
    assert all(state.prefill_load >= TURN_SHARE for state in asked)
    assert len(loop.tp_worker.batch_sizes) > before + 3
    for name, one in kinds.items():
        assert list(loop.finished[name].output_ids) == answers(one)


def test_who_waits_while_the_batch_is_full_is_still_in_a_hurry(
    make_loop: MakeLoop, overlap: bool
) -> None:
    """No plan with prompts is made then; the last one counts until nobody waits."""

    class Hurried(Told):
        def plan(self, state: IterationState) -> IterationPlan:
            return replace(super().plan(state), is_hurried=state.prefill is not None)

    loop, told = make_loop(overlap=overlap, max_running=2), Hurried()
    loop.govern("fcfs", "slack", light_costs())
    loop.tree_cache.decode_selection._policy = told
    told.decode = lambda ids: ids[:1]
    first, second, third = (kind(i, n).request(f"r{i}") for i, n in enumerate((30, 30, 4)))
    loop.arrive(first)
    loop.run(turns(4))
    loop.arrive(second)
    loop.arrive(third)
    loop.run(turns(6))
    assert loop.waiting_queue == [third]
    assert any(state.prefill is not None for state in told.states)
    before = len(told.states)
    loop.run(turns(4))
    full = told.states[before:]
    assert full
    assert all(state.prefill is None and state.is_hurried for state in full)
    loop.run(lambda: not loop.is_at_rest)
    assert not told.states[-1].is_hurried
