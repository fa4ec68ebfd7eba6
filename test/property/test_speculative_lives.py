"""Requests' lives on SGLang's own loop, of a model that verifies drafts.

Method: `support_plugin.lives`, with SGLang's own n-gram worker and drafts of which some
are right, some in part and some not at all. Chains on pages of several tokens, trees on pages of
one.
Guarantee: every answer is what a loop that does not speculate says to the request alone; KV that is
read, and so all that became cache, is that of accepted tokens at their own places; at the end
nothing is held.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

from support_plugin.decode_loop import PretendDisk, publish_arguments
from support_plugin.decode_requests import Oracle
from support_plugin.lives import check_happened, run_some
from support_plugin.speculating_lives import SpeculatingHistory
from support_plugin.speculating_loop import SpeculatingLoop

N_DRAFTED = 5
#: (page size, breadth of drafts, device pages, chunk, disk)
SHAPES: list[tuple[int, int, int, int | None, bool]] = [
    (4, 1, 30, 8, True),
    (1, 3, 110, 8, False),
    (4, 1, 40, None, False),
    (8, 1, 18, 16, True),
]


@pytest.fixture(scope="module")
def speculating(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    torch.compiler.set_stance("force_eager")
    yield publish_arguments(
        tmp_path_factory.mktemp("model"),
        speculative_algorithm="NGRAM",
        speculative_num_draft_tokens=N_DRAFTED,
    )
    torch.compiler.set_stance("default")


def run_all(args: Any, n_histories: int) -> None:
    totals: Counter[str] = Counter()
    for shape, (page_size, breadth, n_pages, chunk, has_disk) in enumerate(SHAPES):
        disk = PretendDisk() if has_disk else None
        loop = SpeculatingLoop(
            args,
            breadth=breadth,
            page_size=page_size,
            n_pages=n_pages,
            n_host_pages=2 * n_pages,
            chunk_tokens=chunk,
            disk=disk,
        )
        oracle = Oracle(args, overlap=False)
        numbers = range(shape, n_histories, len(SHAPES))
        totals += run_some(loop, oracle, disk, numbers, SpeculatingHistory)
    check_happened(totals, n_histories)
    assert totals["accepted"] > totals["verified"], totals


def test_answers_are_those_without_drafts(speculating: Any) -> None:
    run_all(speculating, 60)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_answers_are_those_without_drafts_a_thousand_times(speculating: Any) -> None:
    run_all(speculating, 1000)
