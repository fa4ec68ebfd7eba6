"""Parking and making way on SGLang's own scheduler loop, one situation at a time.

Random histories are in test/property/test_decode_machine.py; these tests say what must happen, not
only that nothing breaks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("sglang")

import torch
from sglang.srt.managers import scheduler
from sglang.srt.managers.io_struct import AbortReq, PauseGenerationReqInput
from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req

from support_plugin.decode_loop import DecodeLoop
from support_plugin.decode_requests import Kind, Oracle, light_costs, publish_arguments
from tiered_kv.api.slo import Slo
from tiered_kv.api.terms import Terms
from tiered_kv.plugin.passes.step_times import DECODES_PER_OBSERVATION
from tiered_kv.plugin.queue.clock_tick import SharedClock
from tiered_kv.scheduler.calibration import Calibrator
from tiered_kv.scheduler.iteration_policy import IterationPlan, IterationState, RunningTotals
from tiered_kv.scheduler.plan import PrefillRoom
from tiered_kv.scheduler.prefill_turns import TURN_SHARE

MakeLoop = Callable[..., DecodeLoop]


class Told:
    """Does as it is told; remembers what it is asked."""

    def __init__(self) -> None:
        self.states: list[IterationState] = []
        self.decode: Callable[[list[int]], list[int]] | None = None
        self.swap_out: Callable[[IterationState], list[int]] = lambda state: []
        self.everyone_fits = False

    def fits(self, totals: RunningTotals, costs: Any, now_s: float) -> bool:
        return self.everyone_fits

    def plan(self, state: IterationState) -> IterationPlan:
        self.states.append(state)
        if state.short_tokens:
            return IterationPlan(swap_out=tuple(self.swap_out(state)))
        ids = [request.request_id for request in state.running]
        if self.decode is None:
            return IterationPlan()
        return IterationPlan(tuple(self.decode(ids)))


@pytest.fixture(scope="module")
def args(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    torch.compiler.set_stance("force_eager")
    yield publish_arguments(tmp_path_factory.mktemp("model"))
    torch.compiler.set_stance("default")


@pytest.fixture
def make_loop(args: Any) -> Iterator[MakeLoop]:
    made: list[DecodeLoop] = []

    def make(**options: Any) -> DecodeLoop:
        options.setdefault("overlap", True)
        made.append(DecodeLoop(args, **options))
        return made[-1]

    yield make
    for loop in made:
        loop.close()


@pytest.fixture(params=[True, False], ids=["overlap", "no-overlap"])
def overlap(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def answers(args: Any, overlap: bool) -> Iterator[Callable[[Kind], list[int]]]:
    oracle = Oracle(args, overlap=overlap)
    yield oracle.answer
    oracle.close()


def kind(seed: int, n_new: int = 12, **fields: Any) -> Kind:
    fields.setdefault("sampling", {"ignore_eos": True})
    return Kind(family=0, seed=seed, n_own=6, max_new_tokens=n_new, **fields)


def turns(n: int) -> Callable[[], bool]:
    left = iter(range(n))
    return lambda: next(left, None) is not None


# -- parking ------------------------------------------------------------------------------------


def test_one_decodes_and_the_others_keep_their_place(make_loop: MakeLoop, overlap: bool) -> None:
    loop, told = make_loop(overlap=overlap), Told()
    loop.choose_by(told)
    told.decode = lambda ids: ids[:1]
    reqs = [kind(i).request(f"r{i}") for i in range(3)]
    for req in reqs:
        loop.arrive(req)
    loop.run(turns(6))
    batch = loop.running_batch
    assert batch.reqs == reqs
    assert len(reqs[0].output_ids) > 3
    assert [len(req.output_ids) for req in reqs[1:]] == [1, 1]
    assert loop.tp_worker.batch_sizes == [1] * len(loop.tp_worker.batch_sizes)
    # What SGLang keeps by row agrees with what it keeps by request.
    assert batch.seq_lens.tolist() == [req.kv_committed_len for req in reqs]
    assert batch.seq_lens_cpu.tolist() == batch.orig_seq_lens.tolist() == batch.seq_lens.tolist()


def test_answers_do_not_depend_on_turns(
    make_loop: MakeLoop, overlap: bool, answers: Callable[[Kind], list[int]]
) -> None:
    loop, told = make_loop(overlap=overlap), Told()
    loop.choose_by(told)
    count = iter(range(10_000))
    told.decode = lambda ids: [ids[next(count) % len(ids)]]
    kinds = [
        kind(0),
        kind(1, sampling={"frequency_penalty": 1.5, "ignore_eos": True}),
        kind(2, sampling={"repetition_penalty": 1.8, "ignore_eos": True}),
        kind(3, has_grammar=True),
    ]
    said = loop.serve(*(k.request(str(i)) for i, k in enumerate(kinds)))
    assert list(said.values()) == [answers(k) for k in kinds]
    loop.check_nothing_is_held()


def test_sglangs_own_count_of_penalties_would_be_wrong(make_loop: MakeLoop, args: Any) -> None:
    """The control: without our counting, taking turns changes what is said."""
    loop, told = make_loop(overlap=True), Told()
    loop.choose_by(told)
    loop.tree_cache.resumes_requests = False
    count = iter(range(10_000))
    told.decode = lambda ids: [ids[next(count) % len(ids)]]
    kinds = [kind(i, 20, sampling={"frequency_penalty": 1.5, "ignore_eos": True}) for i in range(4)]
    said = loop.serve(*(k.request(str(i)) for i, k in enumerate(kinds)))
    oracle = Oracle(args, overlap=True)
    assert list(said.values()) != [oracle.answer(k) for k in kinds]
    oracle.close()


def test_an_aborted_request_ends_though_it_is_parked(make_loop: MakeLoop, overlap: bool) -> None:
    loop, told = make_loop(overlap=overlap), Told()
    loop.choose_by(told)

    def first_and_musts(ids: list[int]) -> list[int]:
        musts = [r.request_id for r in told.states[-1].running if not r.can_park]
        return list(dict.fromkeys([ids[0], *musts]))

    told.decode = first_and_musts
    first, second = kind(0, 20).request("first"), kind(1, 20).request("second")
    loop.arrive(first)
    loop.arrive(second)
    loop.run(turns(5))
    loop.abort_request(AbortReq(rid="second"))
    loop.run(turns(4))
    assert isinstance(second.finished_reason, FINISH_ABORT)
    assert not first.finished()
    loop.run(lambda: not loop.is_at_rest)
    loop.check_nothing_is_held()


def test_a_pause_gives_everyone_back_to_the_queue(
    make_loop: MakeLoop, overlap: bool, answers: Callable[[Kind], list[int]]
) -> None:
    loop, told = make_loop(overlap=overlap), Told()
    loop.choose_by(told)
    told.decode = lambda ids: ids[:1]
    kinds = [kind(i) for i in range(3)]
    reqs = [k.request(str(i)) for i, k in enumerate(kinds)]
    for req in reqs:
        loop.arrive(req)
    loop.run(turns(5))
    loop.pause_generation(PauseGenerationReqInput(mode="retract"))
    assert loop.waiting_queue == reqs
    assert all(req.req_pool_idx is None for req in reqs)
    loop._engine_paused = False
    loop.run(lambda: not loop.is_at_rest)
    assert [list(req.output_ids) for req in reqs] == [answers(k) for k in kinds]
    loop.check_nothing_is_held()


# -- making way ---------------------------------------------------------------------------------


def small_loop(make_loop: MakeLoop, **options: Any) -> DecodeLoop:
    """Room for two requests of 20 new tokens, and not for three."""
    return make_loop(n_pages=20, n_host_pages=64, **options)


def test_a_loose_request_makes_way_for_a_tight_one(
    make_loop: MakeLoop, overlap: bool, answers: Callable[[Kind], list[int]]
) -> None:
    loop, told = small_loop(make_loop, overlap=overlap), Told()
    selection = loop.choose_by(told)
    told.swap_out = lambda state: [
        r.request_id for r in state.running if r.tbt_s is None and r.can_swap
    ][:1]
    loop.new_token_ratio_tracker.current = 1.0
    kinds = [kind(0, 20), kind(1, 20), kind(2, 20, tbt_s=0.05)]
    reqs = [k.request(f"r{i}") for i, k in enumerate(kinds)]
    for req in reqs[:2]:
        loop.arrive(req)
    loop.run(turns(8))
    loop.arrive(reqs[2])
    loop.run(lambda: not reqs[2].finished())
    asked = [state for state in told.states if state.short_tokens]
    assert asked, "nobody was asked to make way"
    assert asked[0].short_for_tbt_s == 0.05
    assert selection.leaving.n_swapped == 1
    loop.run(lambda: not loop.is_at_rest)
    # Who made way ends last.
    assert list(loop.finished)[-1] != "r2"
    assert [list(req.output_ids) for req in reqs] == [answers(k) for k in kinds]
    assert [req.retraction_count for req in reqs] == [0, 0, 0]
    loop.check_nothing_is_held()


def test_who_comes_back_computes_no_more_than_a_page(make_loop: MakeLoop, overlap: bool) -> None:
    loop = make_loop(overlap=overlap)
    selection = loop.choose_by(Told())
    reqs = [kind(i, 40).request(str(i)) for i in range(2)]
    for req in reqs:
        loop.arrive(req)
    loop.run(turns(15))
    selection.leaving.add(reqs[:1])
    loop.run(lambda: selection.leaving.n_swapped == 0)
    n_tokens = len(reqs[0].origin_input_ids) + len(reqs[0].output_ids)
    assert reqs[0] in loop.waiting_queue or reqs[0].req_pool_idx is not None
    loop.run(lambda: reqs[0].extend_range is None)
    assert n_tokens - reqs[0].extend_range.start <= loop.page_size + 1
    loop.run(lambda: not loop.is_at_rest)
    loop.check_nothing_is_held()


def test_it_comes_back_from_the_host(
    make_loop: MakeLoop, overlap: bool, answers: Callable[[Kind], list[int]]
) -> None:
    loop = make_loop(overlap=overlap)
    selection = loop.choose_by(Told())
    hierarchy = loop.tree_cache.hierarchy
    kinds = [kind(0, 30), kind(1, 30, sampling={"presence_penalty": 1.5, "ignore_eos": True})]
    reqs = [k.request(str(i)) for i, k in enumerate(kinds)]
    for req in reqs:
        loop.arrive(req)
    loop.run(turns(12))
    selection.leaving.add(reqs[1:])

    def until_it_waits() -> bool:
        if reqs[1] in loop.waiting_queue:
            assert hierarchy.settle_copies()
            assert hierarchy.evict_device(10_000) > 0
            return False
        return True

    loop.run(until_it_waits)
    loop.run(lambda: not loop.is_at_rest)
    assert [list(req.output_ids) for req in reqs] == [answers(k) for k in kinds]
    loop.check_nothing_is_held()


def test_retraction_keeps_what_was_produced_where_no_policy_chooses(
    make_loop: MakeLoop,
    overlap: bool,
    answers: Callable[[Kind], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scheduler, "TEST_RETRACT", True)
    monkeypatch.setattr(scheduler, "TEST_RETRACT_INTERVAL", 5)
    loop = make_loop(overlap=overlap)
    loop.tree_cache.resumes_requests = True
    starts: dict[str, list[int]] = {}
    forward = loop.model_worker.forward_batch_generation

    def watched(batch: Any, **options: Any) -> Any:
        if batch.forward_mode.is_extend():
            for req, at in zip(batch.reqs, batch.prefix_lens, strict=True):
                starts.setdefault(req.rid, []).append(at)
        return forward(batch, **options)

    monkeypatch.setattr(loop.model_worker, "forward_batch_generation", watched)
    kinds = [kind(0, 20), kind(1, 20, sampling={"frequency_penalty": 1.5, "ignore_eos": True})]
    reqs = [k.request(str(i)) for i, k in enumerate(kinds)]
    said = loop.serve(*reqs)
    monkeypatch.setattr(scheduler, "TEST_RETRACT", False)
    assert list(said.values()) == [answers(k) for k in kinds]
    retracted = max(reqs, key=lambda req: req.retraction_count)
    assert retracted.retraction_count > 1
    # It goes on behind its prompt, not at its beginning.
    assert starts[retracted.rid][-1] > len(retracted.origin_input_ids)
    loop.check_nothing_is_held()


# -- what the policy is told --------------------------------------------------------------------


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


def test_our_own_policies_have_loose_requests_make_way(
    make_loop: MakeLoop, overlap: bool, answers: Callable[[Kind], list[int]]
) -> None:
    loop = small_loop(make_loop, overlap=overlap)
    loop.govern("slack", "slack", light_costs())
    kinds = [kind(0, 40), kind(1, 40), kind(2, 20, tbt_s=0.06)]
    reqs = [k.request(f"r{i}") for i, k in enumerate(kinds)]
    for req in reqs[:2]:
        loop.arrive(req)
    loop.run(turns(20))
    loop.arrive(reqs[2])
    loop.run(lambda: not loop.is_at_rest)
    assert loop.tree_cache.decode_selection.leaving.n_swapped > 0
    assert list(loop.finished)[-1] != "r2"
    assert [list(req.output_ids) for req in reqs] == [answers(k) for k in kinds]
    loop.check_nothing_is_held()
