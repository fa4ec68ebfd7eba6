"""Learned pauses under any history: what is foretold is a time and a chance, bounded like its
memory, and what a program waits for is counted once."""

from __future__ import annotations

import math
from array import array
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.key import namespace_hash
from tiered_kv.scheduler import pauses as learned
from tiered_kv.scheduler.pauses import LearnedPauses
from tiered_kv.scheduler.request import QueuedRequest

ROOT = Forest(page_size=1, tiers=(Tier.DEVICE,)).root(namespace_hash("pauses"))
NAMES, PROGRAMS = 6, 5

CALL = st.tuples(
    st.sampled_from(["", *(f"p{i}" for i in range(8))]),
    st.sampled_from([None, (1, 2), (3,)]),
    st.sampled_from(["", *(f"t{i}" for i in range(5))]),
    st.sampled_from(["", "tenant"]),
    st.booleans(),
    st.booleans(),
    st.floats(0.0, 3 * learned.NEVER_S) | st.floats(0.0, 5.0),
)


@given(st.lists(CALL, max_size=200))
@settings(deadline=None)
def test_any_history(history: list[Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learned, "NAMES_MAX", NAMES)
        patch.setattr(learned, "PROGRAMS_MAX", PROGRAMS)
        patch.setattr(learned, "PAUSES_HALF", 8)
        pauses, now_s = LearnedPauses(), 0.0
        for number, (program, ending, tool, tenant, is_last, ends, then_s) in enumerate(history):
            request = QueuedRequest(
                number, now_s, ROOT, array("q"), 1, 1,
                program=program, tool=tool, tenant=tenant, is_last_call=is_last,
            )  # fmt: skip
            pauses.arrived(request, now_s)
            if ends:
                found = pauses.ended(request, ending, now_s)
                if found is not None:
                    assert not is_last
                    assert 0.0 <= found.in_s < math.inf
                    assert learned.LEAST_PROBABILITY <= found.probability <= 1.0
            check(pauses)
            now_s += then_s


def check(pauses: LearnedPauses) -> None:
    assert len(pauses._by_name) <= NAMES
    assert len(pauses._of_program) <= PROGRAMS
    assert len(pauses._away) <= PROGRAMS
    assert len(pauses._expected) <= 2 * PROGRAMS + 1
    known = [*pauses._by_name.values(), pauses._all]
    for one in known:
        late = sum(away.is_late and one in away.learning for away in pauses._away.values())
        assert one.late == late
    for one in (*known, *pauses._of_program.values()):
        assert one.came == pytest.approx(sum(one.counts), rel=1e-5)
        assert 0.0 <= one.came + one.never <= 2 * 8
