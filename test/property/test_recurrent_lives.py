"""Requests' lives on SGLang's own loop, of a model with recurrent state.

Method: `support_plugin.lives`, with room for few checkpoints.
Guarantee: in every pass the state of each request is that of its own tokens (`HybridModel`); every
answer is what a loop without a cache says; at the end no state is held.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

pytest.importorskip("sglang")

from support_plugin.decode_loop import PretendDisk
from support_plugin.decode_requests import Oracle
from support_plugin.hybrid_loop import HybridLoop
from support_plugin.lives import check_happened, run_some

#: (page size, device pages, chunk, disk, checkpoints)
SHAPES: list[tuple[int, int, int, bool, int]] = [
    (4, 16, 8, True, 6),
    (4, 24, 64, True, 40),
    (2, 40, 16, False, 12),
    (1, 60, 8, True, 30),
]


def run_all(args: Any, n_histories: int) -> None:
    totals: Counter[str] = Counter()
    for shape, (page_size, n_pages, chunk, has_disk, n_states) in enumerate(SHAPES):
        disk = PretendDisk() if has_disk else None
        loop = HybridLoop(
            args,
            n_states=n_states,
            page_size=page_size,
            n_pages=n_pages,
            n_host_pages=2 * n_pages,
            chunk_tokens=chunk,
            disk=disk,
        )
        oracle = Oracle(args, overlap=False)
        totals += run_some(loop, oracle, disk, range(shape, n_histories, len(SHAPES)))
        totals["seeded"] += loop.tp_worker.n_seeded
    check_happened(totals, n_histories, "seeded")


def test_every_state_is_that_of_its_own_tokens(args: Any) -> None:
    run_all(args, 60)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_every_state_is_that_of_its_own_tokens_a_thousand_times(args: Any) -> None:
    run_all(args, 1000)
