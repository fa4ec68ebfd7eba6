"""Decodes beside prefills on SGLang's own loop: where a policy counts on them, there they are.

Method: requests arrive at random under policies that mix, some of them with log-probabilities, on
pools that are too small, with and without chunked prefill.
Guarantee: a pass that was planned to be mixed is, if anybody runs; one that was not is not. It may
be missed for want of memory, but never twice in a row: then those who run have their turn. Nobody
waits for ever, and every answer is what plain SGLang says.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from typing import Any

import pytest

pytest.importorskip("sglang")

from support_plugin.decode_loop import DecodeLoop
from support_plugin.decode_requests import Oracle, kinds, light_costs

#: (policy, overlap, device pages, chunk, configured to mix)
SHAPES: list[tuple[str, bool, int, int | None, bool]] = [
    ("slack", True, 64, 16, True),
    ("slack", False, 20, 16, True),
    ("niyama", True, 24, 16, False),
    ("slack", True, 24, None, False),
]
N_HISTORIES = 3
PATIENCE = 1500


def play(loop: DecodeLoop, dice: random.Random, oracle: Oracle) -> Counter[str]:
    """One history; counts of what its passes were."""
    order = loop.tiered_kv_order
    counts: Counter[str] = Counter()
    form, missed_last = order.form_prefill, [False]

    def formed(raw: Any, running_batch: Any) -> Any:
        n_running = len(running_batch.reqs)
        order._planned = None
        batch, after = form(raw, running_batch)
        if batch is None:
            missed_last[0] = False
            return batch, after
        is_mixed, plan = bool(batch.decoding_reqs), order._planned
        assert plan is not None
        if is_mixed:
            counts["mixed"] += 1
            assert plan.mix_decodes, "decodes are beside a prefill that nobody planned so"
            assert not batch.return_logprob
        elif n_running:
            counts["apart"] += 1
            if plan.mix_decodes:
                counts["missed"] += 1
                assert not missed_last[0], "those who run were passed over twice"
        counts["logprobs"] += bool(batch.return_logprob)
        missed_last[0] = bool(n_running and plan.mix_decodes and not is_mixed)
        return batch, after

    order.form_prefill = formed
    chosen = dice.sample(kinds(), 12)
    some = dice.sample(range(len(chosen)), 3)
    reqs = [
        (kind, dataclasses.replace(kind, has_logprobs=i in some).request(f"{i}"))
        for i, kind in enumerate(chosen)
    ]
    coming = [req for _, req in reqs]
    n_turns = 0

    def script() -> bool:
        nonlocal n_turns
        n_turns += 1
        assert n_turns < PATIENCE, "somebody waits for ever"
        while coming and dice.random() < 0.4:
            loop.arrive(coming.pop())
        return bool(coming) or not loop.is_at_rest

    loop.run(script)
    order.form_prefill = form
    for kind, req in reqs:
        assert list(req.output_ids) == oracle.answer(kind)
    loop.check_nothing_is_held()
    return counts


def test_what_is_planned_to_be_mixed_is(args: Any) -> None:
    oracles = {overlap: Oracle(args, overlap=overlap) for overlap in (False, True)}
    total: Counter[str] = Counter()
    for number, (policy, overlap, n_pages, chunk, is_mixed) in enumerate(SHAPES):
        loop = DecodeLoop(
            args, overlap=overlap, n_pages=n_pages, chunk_tokens=chunk, is_mixed=is_mixed
        )
        for history in range(N_HISTORIES):
            loop.govern(policy, "all", light_costs())
            dice = random.Random(f"{number} {history}")
            counts = play(loop, dice, oracles[overlap])
            total += counts
            assert chunk is not None or not counts["mixed"]
        loop.close()
    for oracle in oracles.values():
        oracle.close()
    # It all happened.
    assert min(total[what] for what in ("mixed", "apart", "logprobs")) > 0, total
