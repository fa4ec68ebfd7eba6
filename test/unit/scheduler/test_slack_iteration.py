"""How much the policy slack has computed in an iteration, and who makes room for whom."""

from __future__ import annotations

import random

import pytest

from support_simulation.builders import Queue, cost_model
from support_simulation.slack_queue import blocks, queue
from tiered_kv.api.slo import Slo
from tiered_kv.core.device_spec import find_device
from tiered_kv.core.model_spec import find_model
from tiered_kv.scheduler.cost_model import Correction, CostModel
from tiered_kv.scheduler.plan import AdmissionPlan
from tiered_kv.scheduler.prefill_room import DECODES_AHEAD, MIN_CHUNK_TOKENS
from tiered_kv.scheduler.request import QueuedRequest

TIGHT, LOOSE = Slo("interactive", 0.5, 0.05), Slo("batch", 30.0, None)
IMPATIENT = Slo("interactive", 0.5, 0.05, max_wait_s=10.0)


class TestTheIteration:
    def plan_beside(self, request: QueuedRequest, q: Queue) -> AdmissionPlan:
        q.admit(request.request_id)
        q.running = [request]
        return q.plan()

    def test_chunks_leave_time_for_the_tightest_next_token(self) -> None:
        q = queue()
        q.arrive(0, blocks(0, 200), slo=LOOSE)
        running = q.arrive(1, blocks(1), slo=Slo("fast", 5.0, 0.03))
        running.first_token_s, running.output_tokens = 0.0, 5
        q.now_s = 0.1
        plan = self.plan_beside(running, q)
        assert plan.mix_decodes
        n_new = plan.prefill_tokens - 1
        assert MIN_CHUNK_TOKENS < n_new < 8192
        costs = cost_model()
        # Its sixth token is due at 0.15 s; some of that is kept in hand.
        assert costs.iteration_s(((n_new, 0),), running.prompt_tokens, 1) <= 0.05
        assert costs.iteration_s(((n_new + 512, 0),), running.prompt_tokens, 1) > 0.04

    def test_an_objective_that_nobody_could_keep_makes_no_chunk_smaller(self) -> None:
        def chunk(tbt_s: float | None) -> int:
            q = queue()
            q.arrive(0, blocks(0, 200))
            running = q.arrive(1, blocks(1), slo=Slo("some", None, tbt_s))
            running.first_token_s, running.output_tokens = 0.0, 5
            q.now_s = 0.1
            return self.plan_beside(running, q).prefill_tokens

        alone_s = cost_model().iteration_s((), 0, 1)
        assert chunk(0.9 * alone_s) == chunk(None)
        # Just possible alone: not beside a prefill, but then with as little of it as is worth it.
        assert chunk(1.2 * alone_s) < chunk(0.03) < chunk(None)

    def test_prefill_has_its_turn_even_if_decoding_alone_takes_too_long(self) -> None:
        q = queue(mix_decodes=False)
        q.arrive(0, blocks(0, 200), slo=LOOSE)
        running = q.arrive(1, blocks(1), slo=Slo("impossible", 5.0, 1e-4))
        running.first_token_s, running.output_tokens = 0.0, 5
        q.now_s = 0.1
        q.turns.passed(q.now_s, 0.01, decoded=True)
        plan = self.plan_beside(running, q)
        # Nobody who waits is in a hurry.
        assert 64 <= plan.prefill_tokens < MIN_CHUNK_TOKENS
        # It was prefill's turn; now, without a token in between, it is decoding's.
        q.now_s = 0.12
        q.turns.passed(q.now_s, 0.02, decoded=False)
        assert q.plan().prefill_tokens == 0

    def beside(self, prompt: int, gained_s: float, tbt_s: float) -> int:
        """Prefill tokens after a decode, for `prompt` blocks, without mixing; `gained_s`: by how
        much the running request is ahead of its objective."""
        q = queue(mix_decodes=False)
        q.arrive(0, blocks(0, prompt), slo=LOOSE)
        running = q.arrive(1, blocks(1), slo=Slo("steady", 5.0, tbt_s))
        q.now_s = 10.0
        # Of its first five tokens, the fifth was due at 10 s + `gained_s`.
        running.output_tokens, running.first_token_s = 5, q.now_s + gained_s - 4 * tbt_s
        q.turns.passed(q.now_s, tbt_s, decoded=True)
        return self.plan_beside(running, q).prefill_tokens

    def test_a_prefill_waits_for_a_few_decodes_that_gain_it_room(self) -> None:
        costs = cost_model()
        decode_s, least_s = costs.iteration_s((), 65, 1), costs.iteration_s(((256, 0),), 0, 0)
        tbt_s = 1.3 * (decode_s + least_s) / 2
        assert self.beside(200, 0.0, tbt_s) == 0
        assert self.beside(200, least_s + decode_s, tbt_s) >= 256

    def test_and_no_longer_if_they_gain_none(self) -> None:
        """Each takes as long as its tokens may, where much less was predicted."""
        q = queue(mix_decodes=False)
        q.arrive(0, blocks(0, 200), slo=LOOSE)
        running = q.arrive(1, blocks(1), slo=Slo("steady", 5.0, 0.008))
        running.output_tokens, running.first_token_s = 1, 0.0
        q.now_s = 0.008
        q.turns.passed(q.now_s, 0.008, decoded=True)
        chunks = [self.plan_beside(running, q).prefill_tokens]
        for _ in range(9):
            q.now_s += 0.008
            q.turns.passed(q.now_s, 0.008, decoded=True)
            running.output_tokens += 1
            chunks.append(q.plan().prefill_tokens)
        turns = [at for at, chunk in enumerate(chunks) if chunk]
        assert turns
        assert turns[0] == DECODES_AHEAD - 1, "one was there before"

    def test_but_not_where_decodes_gain_hardly_any(self) -> None:
        assert self.beside(200, 0.0, 1.1 * cost_model().iteration_s((), 65, 1)) >= 64

    def test_decodes_are_mixed_in_only_where_the_device_gains_by_it(self) -> None:
        def mixes(device: str) -> bool:
            q = queue()
            q.arrive(0, blocks(0, 20))
            q.running = [q.arrive(1, blocks(1))]
            q.admit(1)
            state = q.state()
            state.costs = CostModel(find_model("SmolLM2-135M"), find_device(device), {})
            return bool(q.policy.plan(state, 10).mix_decodes)

        assert mixes("H200-141")
        assert not mixes("CPU-2"), "SGLang's CPU attention takes their rows one by one as prompts"

    @pytest.mark.parametrize("seed", range(12))
    def test_where_it_cannot_mix_it_plans_as_if_it_never_did(self, seed: int) -> None:
        """Those who run are then not passed over for prompts, pass after pass."""

        def plans(*, mixes: bool) -> list[AdmissionPlan]:
            dice = random.Random(seed)
            q = queue(mix_decodes=mixes)
            q.running = []
            for i in range(6):
                tbt_s = dice.choice((None, 0.02, 0.05))
                request = q.arrive(i, blocks(i, dice.randrange(1, 200)), slo=Slo("x", 5.0, tbt_s))
                if dice.random() < 0.5:
                    request.first_token_s, request.output_tokens = 0.0, dice.randrange(1, 9)
                    q.admit(i)
                    q.running.append(request)
            found = []
            for _ in range(4):
                state = q.state()
                state.can_mix = False
                found.append(q.policy.plan(state, 10))
                q.now_s += 0.02
                q.turns.passed(q.now_s, 0.02, decoded=dice.random() < 0.5)
            return found

        assert plans(mixes=True) == plans(mixes=False)

    def test_it_mixes_where_it_is_wanted_and_pays(self) -> None:
        q = queue()
        q.arrive(0, blocks(0, 20))
        q.running = [q.arrive(1, blocks(1))]
        q.admit(1)
        state = q.state()
        for wanted in (True, False):
            state.wants_mixing = wanted
            assert q.policy.plan(state, 10).mix_decodes is wanted
        state.wants_mixing = True
        alone_s = state.costs.iteration_s(((8192, 0),), 0, 0)
        state.costs.correct(mixed=Correction(10 * alone_s))
        assert q.policy.plan(state, 10).mix_decodes is False

    def test_nobody_joins_the_first_if_that_made_it_late(self) -> None:
        q = queue(pass_share=10.0)
        first = q.arrive(0, blocks(0, 100), slo=TIGHT)
        for request_id in range(1, 4):
            q.arrive(request_id, blocks(request_id, 100), slo=LOOSE)
        q.now_s = 0.5 - 1.05 * cost_model().prefill_s(first.prompt_tokens)
        plan = q.plan()
        assert plan.order[0] == 0
        assert first.prompt_tokens <= plan.prefill_tokens <= 1.1 * first.prompt_tokens

    def test_a_long_prompt_is_put_back_if_that_saves_somebody_s_deadline(self) -> None:
        q = queue()
        long = q.arrive(0, blocks(0, 1500))
        q.admit(0)
        q.arrive(1, blocks(1), slo=TIGHT)
        state = q.state()
        state.unfinished, state.can_put_back = long, True
        assert q.policy.plan(state, 16).put_back_unfinished
        state.can_put_back = False
        assert not q.policy.plan(state, 16).put_back_unfinished
        state.can_put_back = True
        long.prefilled_tokens = long.prompt_tokens - 100
        assert not q.policy.plan(state, 16).put_back_unfinished

    @pytest.mark.parametrize("is_in_turn", [True, False])
    def test_an_overdue_prompt_admitted_in_its_turn_is_never_put_back(
        self,
        is_in_turn: bool,
    ) -> None:
        q = queue(max_wait_s=10.0, overdue_share=0.25)
        long = q.arrive(0, blocks(0, 1500))
        if not is_in_turn:
            q.arrive(9, blocks(9, 1000))
        q.now_s = 11.0
        if not is_in_turn:
            # The overdue have had more than their share now.
            q.order()
            q.arrive(8, blocks(8, 10), slo=LOOSE)
            q.order()
            q.admit(0)
            q.waiting.add(long)
            q.policy.on_arrival(long, q.now_s)
            q.order()
        q.order()
        q.admit(0)
        q.arrive(1, blocks(1), slo=TIGHT)
        state = q.state()
        state.unfinished, state.can_put_back = long, True
        assert q.policy.plan(state, 16).put_back_unfinished is not is_in_turn

    def test_admission_is_capped_by_predicted_memory(self) -> None:
        q = queue(memory_margin=0.0)
        for request_id in range(5):
            q.arrive(request_id, blocks(request_id, 1))
        state = q.state()
        # Without past answers each is taken at its limit: 65 + 100 tokens.
        state.available_tokens = 3 * 165 + 10
        assert q.policy.plan(state, 16).admit_at_most == 3
