"""Two ranks with the same KV: one host pool, one disk, and each page moved by one of them.

The rigs of `test_hierarchy_ranks.py` with one pool in common. What a rank has on its device is its
own, so a page that nobody wrote, or that was overwritten under another, is wrong in the checks.
"""

from __future__ import annotations

import itertools
import random
from array import array
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from support_tiers.doubles import random_delays
from support_tiers.ranks import Ranks
from support_tiers.tier_rig import Rig, tokens_of
from tiered_kv.core.ids import Tier
from tiered_kv.tiers.device import Copying, LayerDone
from tiered_kv.tiers.page_format import PageFormat
from tiered_kv.tiers.replicas import BLOCK_PAGES, PartCopier
from tiered_kv.tiers.slots import PageIds
from tiered_kv.tiers.streams import After

pytestmark = pytest.mark.timeout(60)

PROMPT = tokens_of(1, 2, 3, 4, tail=1)
#: Blocks of both ranks' pages.
LONG = tokens_of(*range(10, 10 + BLOCK_PAGES + 4))


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    made = Ranks(have_same=True)
    yield made
    made.barrier.abort()
    for rig in made:
        rig.close()


def stored_pages(ranks: Ranks, prompt: array[int]) -> int:
    """Leading pages of the prompt on the disk of both."""
    return int(ranks.rigs[0].disk.count_prefix(page_hashes_of(ranks, prompt)))


def page_hashes_of(ranks: Ranks, prompt: array[int]) -> list[bytes]:
    ours, theirs = (rig.hashes(rig.hierarchy.root(), prompt) for rig in ranks)
    assert ours == theirs
    return ours


def test_a_page_is_copied_down_by_one_and_up_by_both(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[tuple[str, int, int]] = []
    for number, rig in enumerate(ranks):
        down, up = rig.copier.to_host, rig.copier.to_device

        def to_host(*args, number=number, down=down):  # type: ignore[no-untyped-def]
            copied.append(("down", number, len(args[-1])))
            down(*args)

        def to_device(pages, *rest, number=number, up=up):  # type: ignore[no-untyped-def]
            copied.append(("up", number, len(pages)))
            up(pages, *rest)

        monkeypatch.setattr(rig.copier, "to_host", to_host)
        monkeypatch.setattr(rig.copier, "to_device", to_device)

    ranks.serve(LONG)
    ranks.drain()
    ranks.each(Rig.drop_from_device)
    assert [request.n_host for request in ranks.serve(LONG)] == [len(LONG) - 4] * 2
    ranks.drain()

    def n_pages(way: str) -> list[int]:
        return [sum(n for w, r, n in copied if (w, r) == (way, rank)) for rank in range(2)]

    assert n_pages("down") == [BLOCK_PAGES, 4]
    assert n_pages("up") == [BLOCK_PAGES + 3] * 2


def test_pages_are_on_one_disk_and_come_back_from_it_to_both(ranks: Ranks) -> None:
    ranks.on_disk(PROMPT)
    first, second = ranks.rigs
    assert stored_pages(ranks, PROMPT) == 4
    assert second.disk is None
    first.check_disk()
    assert ranks.prefetch("r", PROMPT) == [16, 16]
    assert [rig.usable(PROMPT) for rig in ranks] == [(0, 4)] * 2
    assert [request.n_host for request in ranks.serve(PROMPT)] == [16, 16]
    ranks.drain()
    ranks.each(Rig.check_idle)


def test_one_that_cannot_write_its_part(ranks: Ranks) -> None:
    ranks.rigs[1].copier.down.error = OSError("no such luck")
    ranks.serve(LONG)
    ranks.drain()
    assert [rig.host.n_free for rig in ranks] == [16 - BLOCK_PAGES] * 2
    assert stored_pages(ranks, LONG) == BLOCK_PAGES
    ranks.each(Rig.check_idle)


def test_a_page_that_one_is_still_writing_is_not_there(ranks: Ranks) -> None:
    slow = ranks.rigs[1]
    slow.copier.down.hold()
    ranks.serve(LONG)
    first = ranks.rigs[0]
    first.hierarchy.write_back.to_host.wait(10.0)
    for _ in range(3):
        ranks.each(lambda rig: rig.hierarchy.poll())
        first.writes.wait(10.0)
    assert stored_pages(ranks, LONG) == BLOCK_PAGES
    slow.copier.down.release()
    ranks.drain()
    assert stored_pages(ranks, LONG) == BLOCK_PAGES + 4


@pytest.mark.parametrize("n_pages", [0, 1, 3])
def test_the_disk_says_how_much_there_is_for_both(ranks: Ranks, n_pages: int) -> None:
    ranks.on_disk(PROMPT)
    ranks.rigs[0].disk.pages_per_read = n_pages
    assert ranks.prefetch("r", PROMPT) == [n_pages * 4] * 2
    assert [rig.usable(PROMPT) for rig in ranks] == [(0, n_pages)] * 2
    ranks.serve(PROMPT)
    ranks.drain()
    ranks.each(Rig.check_idle)


def test_what_the_disk_gives_up_is_gone_for_both(ranks: Ranks) -> None:
    ranks.serve(PROMPT)
    ranks.drain()
    assert [rig.forest.resident_tokens(Tier.DISK) for rig in ranks] == [16, 16]
    pages = ranks.rigs[0].disk.namespace
    _, _, gone, _ = page_hashes_of(ranks, PROMPT)
    del pages._store._pages[pages.namespace_id, gone]
    pages.note_dropped(gone)
    # It is heard of with the next transfer.
    ranks.serve(tokens_of(9))
    ranks.drain()
    assert [rig.forest.resident_tokens(Tier.DISK) for rig in ranks] == [4, 4]


def test_at_the_end_only_what_all_agreed_on_reaches_the_disk(ranks: Ranks) -> None:
    """Ranks stop on their own: what another one is still writing must not be taken for whole."""
    slow = ranks.rigs[1]
    ranks.serve(PROMPT)
    ranks.drain()
    slow.copier.down.hold()
    ranks.serve(LONG)
    ranks.rigs[0].hierarchy.close(5.0)
    assert stored_pages(ranks, PROMPT) == 4
    assert stored_pages(ranks, LONG) == 0
    ranks.rigs[0].check_disk()


def test_what_was_on_its_way_to_the_disk_at_the_end_arrives(ranks: Ranks) -> None:
    writes = ranks.rigs[0].disk.writes
    writes.hold()
    ranks.serve(PROMPT)
    ranks.each(lambda rig: rig.hierarchy.write_back.to_host.wait(10.0))
    ranks.each(lambda rig: rig.hierarchy.poll())
    first = ranks.rigs[0]
    assert first.writes.in_flight
    first.meanwhile(lambda: first.hierarchy.close(5.0), writes)
    assert stored_pages(ranks, PROMPT) == 4
    first.check_disk()


@pytest.mark.parametrize("seed", range(4))
def test_whatever_the_order_of_transfers_pages_are_right(ranks: Ranks, seed: int) -> None:
    """A pool much smaller than what is served: slots change hands all the time, on both ranks."""
    for number, rig in enumerate(ranks):
        rig.copier.down.delay = random_delays(seed * 2 + number, 0.004)
        rig.copier.up.delay = random_delays(seed * 2 + number + 50, 0.004)
    ranks.rigs[0].disk.reads.delay = random_delays(seed + 100, 0.004)
    ranks.rigs[0].disk.writes.delay = random_delays(seed + 200, 0.004)
    rng = random.Random(seed)
    for step in range(40):
        head = rng.randrange(4)
        prompt = tokens_of(head, *(rng.randrange(5) for _ in range(rng.randrange(9))), tail=1)
        choice = rng.random()
        if choice < 0.3:
            ranks.prefetch(f"r{step}", prompt)
        elif choice < 0.4:
            ranks.each(Rig.drop_from_host)
        elif choice < 0.5:
            ranks.each(Rig.flush)
        else:
            ranks.serve(prompt)
    ranks.drain()
    ranks.each(Rig.check_idle)
    ranks.rigs[0].check_disk()


class Copied:
    """Remembers what it was asked to copy to the host."""

    page_format = PageFormat.of_buffers(4, [0], [8])
    timed = False

    def __init__(self) -> None:
        self.pairs: dict[int, list[int]] = {}

    def to_host(
        self,
        device_slots: torch.Tensor,
        host_pages: PageIds,
        after: After,
        part: PageIds | None = None,
    ) -> None:
        assert part is not None
        assert len(part), "a call for nothing"
        rows = device_slots.reshape(-1, 4)
        for at in part.tolist():
            self.pairs[int(host_pages[at])] = rows[at].tolist()

    def use_device(self) -> None:
        pass

    def begin_to_device(
        self, host_pages: PageIds, device_slots: torch.Tensor, after: After, layer_done: LayerDone
    ) -> Copying:
        raise AssertionError("not here")


@pytest.mark.parametrize("n_holders", [2, 3, 8])
def test_each_page_has_one_writer_however_a_job_is_cut(n_holders: int) -> None:
    rng = np.random.default_rng(n_holders)
    host_pages = rng.permutation(200)[:90].astype(np.int64)
    slots = torch.arange(4 * 90).reshape(90, 4)
    written: dict[int, list[int]] = {}
    for place in range(n_holders):
        copied = Copied()
        copier = PartCopier(copied, place, n_holders)
        cuts = sorted({0, 90, *rng.integers(0, 90, 5).tolist()})
        for start, stop in itertools.pairwise(cuts):
            copier.to_host(slots[start:stop].reshape(-1), host_pages[start:stop], ())
        assert not written.keys() & copied.pairs.keys()
        written |= copied.pairs
    assert written == dict(zip(host_pages.tolist(), slots.tolist(), strict=True))


def test_whether_layers_are_timed_is_passed_on() -> None:
    copied = Copied()
    copier = PartCopier(copied, 0, 2)
    copier.timed = True
    assert copied.timed
    assert copier.timed
