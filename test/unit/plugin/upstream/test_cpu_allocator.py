"""The CPU allocator keeps upstream's contract: whole pages, in order, nothing lost or shared.

Checked twice: against upstream's own pure-torch reference (`alloc_extend_naive`), slot by slot, and
by properties that hold for any right allocator, over random histories of a small pool.
"""

from __future__ import annotations

import random

import pytest
import torch
from sglang.srt.mem_cache.allocator.paged import alloc_extend_naive

from tiered_kv.plugin.upstream.v0_5_17.cpu_allocator import CpuPagedTokenToKVPoolAllocator

PAGE_SIZES = (1, 16, 64)


def new_allocator(page_size: int, pages: int, need_sort: bool = False):
    allocator = CpuPagedTokenToKVPoolAllocator(
        pages * page_size,
        page_size=page_size,
        dtype=torch.bfloat16,
        device="cpu",
        kvcache=None,
        need_sort=need_sort,
    )
    allocator.debug_mode = True
    return allocator


def int64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def extend(allocator, prefix_lens, seq_lens, last_loc):
    prefix, seq = int64(prefix_lens), int64(seq_lens)
    # last_loc is a slice of upstream's int32 request-to-token table.
    last = torch.tensor(last_loc, dtype=torch.int32)
    return allocator.alloc_extend(prefix, prefix, seq, seq, last, int((seq - prefix).sum()))


def decode(allocator, seq_lens, last_loc):
    seq = int64(seq_lens)
    return allocator.alloc_decode(seq, seq, torch.tensor(last_loc, dtype=torch.int32))


class Request:
    """Slots that one request holds, token by token."""

    def __init__(self) -> None:
        self.slots: list[int] = []

    @property
    def last_loc(self) -> int:
        return self.slots[-1] if self.slots else -1


def check_layout(allocator, requests: list[Request]) -> None:
    page = allocator.page_size
    owner: dict[int, int] = {}
    for number, request in enumerate(requests):
        for position, slot in enumerate(request.slots):
            assert slot % page == position % page
            assert 1 <= slot // page <= allocator.num_pages
            assert owner.setdefault(slot // page, number) == number
            if position % page:
                assert slot == request.slots[position - 1] + 1
    assert allocator.available_size() == (allocator.num_pages - len(owner)) * page


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("seed", range(5))
def test_extend_gives_what_upstreams_reference_gives(page_size: int, seed: int) -> None:
    rng = random.Random(seed)
    prefix_lens = [rng.choice((0, rng.randrange(4 * page_size))) for _ in range(rng.randint(1, 9))]
    seq_lens = [prefix + rng.randint(1, 5 * page_size) for prefix in prefix_lens]
    # Any slot at the right offset will do as the end of a prefix; these pages are not in the pool.
    last_loc = [
        (1000 + i) * page_size + (prefix - 1) % page_size if prefix else -1
        for i, prefix in enumerate(prefix_lens)
    ]
    allocator = new_allocator(page_size, pages=200)
    free_pages = allocator.free_pages.clone()
    expected = torch.empty(sum(seq_lens) - sum(prefix_lens), dtype=torch.int64)
    alloc_extend_naive(
        int64(prefix_lens), int64(seq_lens), int64(last_loc), free_pages, expected, page_size, "cpu"
    )
    slots = extend(allocator, prefix_lens, seq_lens, last_loc)
    assert slots.dtype == torch.int64
    assert slots.tolist() == expected.tolist()


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("need_sort", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_random_history_keeps_every_page_in_one_place(
    page_size: int, need_sort: bool, seed: int
) -> None:
    rng = random.Random(seed)
    allocator = new_allocator(page_size, pages=24, need_sort=need_sort)
    live: list[Request] = []
    refused = 0
    for _ in range(200):
        action = rng.choice(("extend", "decode", "decode", "free"))
        if action == "extend":
            batch = [Request() for _ in range(rng.randint(1, 3))]
            batch += rng.sample(live, k=min(len(live), rng.randint(0, 2)))
            grown = [len(r.slots) + rng.randint(1, 3 * page_size) for r in batch]
            before = allocator.available_size()
            slots = extend(
                allocator, [len(r.slots) for r in batch], grown, [r.last_loc for r in batch]
            )
            if slots is None:
                refused += 1
                assert allocator.available_size() == before
                continue
            left = slots.tolist()
            for request, length in zip(batch, grown, strict=True):
                taken = length - len(request.slots)
                request.slots += left[:taken]
                del left[:taken]
            live += [r for r in batch if r not in live]
        elif action == "decode" and live:
            slots = decode(allocator, [len(r.slots) + 1 for r in live], [r.last_loc for r in live])
            if slots is None:
                refused += 1
                continue
            assert slots.dtype == torch.int64
            for request, slot in zip(live, slots.tolist(), strict=True):
                request.slots.append(slot)
        elif live:
            request = live.pop(rng.randrange(len(live)))
            allocator.free(int64(request.slots))
        check_layout(allocator, live)
    assert refused, "the pool was never short, so refusals were not tested"


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_last_page_can_be_taken_and_not_one_more(page_size: int) -> None:
    allocator = new_allocator(page_size, pages=2)
    assert extend(allocator, [0], [2 * page_size + 1], [-1]) is None
    assert allocator.available_size() == 2 * page_size
    slots = extend(allocator, [0], [2 * page_size], [-1])
    assert slots.tolist() == list(range(page_size, 3 * page_size))
    assert allocator.available_size() == 0
    assert decode(allocator, [2 * page_size + 1], [slots[-1].item()]) is None


def test_extend_within_the_last_page_takes_nothing_from_a_used_up_pool() -> None:
    allocator = new_allocator(16, pages=1)
    first = extend(allocator, [0], [5], [-1])
    rest = extend(allocator, [5], [16], [first[-1].item()])
    assert first.tolist() + rest.tolist() == list(range(16, 32))
    assert allocator.available_size() == 0


def test_freeing_in_a_group_gives_each_page_back_once() -> None:
    allocator = new_allocator(16, pages=4)
    slots = extend(allocator, [0], [64], [-1])
    allocator.free_group_begin()
    allocator.free(slots[:32])
    allocator.free(slots[16:])
    assert allocator.available_size() == 0
    allocator.free_group_end()
    assert allocator.available_size() == 64


def test_clear_gives_everything_back() -> None:
    allocator = new_allocator(16, pages=4)
    extend(allocator, [0, 0], [20, 20], [-1, -1])
    allocator.clear()
    assert sorted(allocator.free_pages.tolist()) == [1, 2, 3, 4]
