"""Requests' lives on SGLang's own loop, of a model with a draft that has KV of its own.

Method: `support_plugin.lives`, with SGLang's own EAGLE worker. The draft compares every row that
it reads with what it must be.
Guarantee: every answer is what a loop that does not speculate says to the request alone; the
draft's KV of a prefix, from whatever tier, is that of this prefix, hidden states included; at the
end nothing is held. Controls: a cache that leaves the draft's rows behind, and one that names pages
by their own tokens alone, do not pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

from support_plugin.decode_loop import PretendDisk, publish_arguments
from support_plugin.decode_requests import Oracle
from support_plugin.drafting_loop import DraftingLoop, plain_batches
from support_plugin.lives import check_happened, run_some
from support_plugin.speculating_lives import SpeculatingHistory

N_STEPS = 3
#: (page size, device pages, chunk, disk)
SHAPES: list[tuple[int, int, int | None, bool]] = [
    (4, 32, 8, True),
    (1, 110, 8, False),
    (4, 40, None, False),
    (8, 18, 16, True),
]


@pytest.fixture(scope="module")
def drafting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    torch.compiler.set_stance("force_eager")
    folder: Path = tmp_path_factory.mktemp("model")
    yield publish_arguments(
        folder,
        speculative_algorithm="EAGLE",
        speculative_draft_model_path=str(folder),
        speculative_num_steps=N_STEPS,
        speculative_eagle_topk=1,
        speculative_num_draft_tokens=N_STEPS + 1,
    )
    torch.compiler.set_stance("default")


def run_all(args: Any, n_histories: int, **changes: Any) -> Counter[str]:
    totals: Counter[str] = Counter()
    with plain_batches():
        for shape, (page_size, n_pages, chunk, has_disk) in enumerate(SHAPES):
            disk = PretendDisk() if has_disk else None
            loop = DraftingLoop(
                args,
                page_size=page_size,
                n_pages=n_pages,
                n_host_pages=2 * n_pages,
                chunk_tokens=chunk,
                disk=disk,
                **changes,
            )
            oracle = Oracle(args, overlap=False)
            numbers = range(shape, n_histories, len(SHAPES))
            totals += run_some(loop, oracle, disk, numbers, SpeculatingHistory)
            totals["rows checked"] += loop.draft.n_checked
    return totals


def check(totals: Counter[str], n_histories: int) -> None:
    check_happened(totals, n_histories)
    assert totals["accepted"] > totals["verified"], totals
    assert totals["rows checked"] > 200 * n_histories


def test_answers_and_drafts_are_those_without_tiers(drafting: Any) -> None:
    check(run_all(drafting, 60), 60)


@pytest.mark.parametrize("change", ["keeps_drafts", "in_pairs"])
def test_what_is_left_out_is_noticed(drafting: Any, change: str) -> None:
    with pytest.raises(AssertionError, match="draft"):
        run_all(drafting, 60, **{change: False})


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_answers_and_drafts_are_those_without_tiers_a_thousand_times(drafting: Any) -> None:
    check(run_all(drafting, 1000), 1000)
