"""Blocks cut into pages: equal where the blocks are, and no longer than the prompt."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import pytest

from tiered_kv.simulation.fine_pages import FinePages
from tiered_kv.simulation.workload.errors import WorkloadError
from tiered_kv.simulation.workload.request import RecordedWorkload, Request

BLOCK = 512


def request(request_id: int, blocks: Sequence[int], tokens: int, **more: object) -> Request:
    return Request(
        request_id=request_id,
        arrival_s=float(request_id),
        blocks=array("q", blocks),
        input_tokens=tokens,
        output_tokens=4,
        session=None,
        slo_class="standard",
        ttft_slo_s=None,
        tbt_slo_s=None,
        **more,  # type: ignore[arg-type]
    )


def cut(*requests: Request) -> list[Request]:
    return list(FinePages(RecordedWorkload("test", BLOCK, requests), 64).initial())


def test_pages_are_equal_where_blocks_are_and_nowhere_else() -> None:
    one, other = cut(request(0, [2**62, 1], 1024), request(1, [2**62, 9], 1024))
    assert len(one.blocks) == len(set(one.blocks)) == 16
    assert one.blocks[:8] == other.blocks[:8]
    assert not set(one.blocks[8:]) & set(other.blocks[8:])


def test_a_partly_filled_block_has_the_pages_that_its_tokens_touch() -> None:
    (short,) = cut(request(0, [1, 2], BLOCK + 65))
    assert len(short.blocks) == 8 + 2
    (whole,) = cut(request(0, [1], BLOCK + 65))
    assert len(whole.blocks) == 8, "nothing is known of the rest"


def test_it_says_the_same_each_time() -> None:
    workload = FinePages(RecordedWorkload("test", BLOCK, [request(0, [5, 6], 900)]), 64)
    assert [r.blocks for r in workload.initial()] == [r.blocks for r in workload.initial()]
    assert workload.block_tokens == 64


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(WorkloadError, match="divisor"):
        FinePages(RecordedWorkload("test", BLOCK, []), 100)
    with pytest.raises(WorkloadError, match="answers"):
        cut(request(0, [1], BLOCK, output_blocks=array("q", [2])))
