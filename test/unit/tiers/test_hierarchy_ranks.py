"""Two tensor-parallel ranks whose tiers behave differently must go on deciding alike.

Each rank is a rig with a thread of its own per step; agreement goes through a barrier, so a rank
that makes one collective call too few or too many fails the test at once.
"""

from __future__ import annotations

import pytest

from support_tiers.ranks import Ranks
from support_tiers.tier_rig import Rig, new_disk, tokens_of
from tiered_kv.core.ids import Tier
from tiered_kv.memory.back_off import FIRST_S

pytestmark = pytest.mark.timeout(60)

PROMPT = tokens_of(1, 2, 3, 4, tail=1)


def test_a_transfer_counts_when_it_is_done_on_both(ranks: Ranks) -> None:
    slow = ranks.rigs[1]
    slow.copier.down.hold()
    ranks.serve(PROMPT)
    ranks.rigs[0].hierarchy.write_back.to_host.wait(10.0)
    for _ in range(3):
        ranks.each(lambda rig: rig.hierarchy.poll())
    assert [rig.hierarchy.write_back.to_host.in_flight for rig in ranks] == [1, 1]
    assert [rig.hierarchy.write_back.to_host.n_ready for rig in ranks] == [1, 0]
    slow.copier.down.release()
    ranks.drain()
    assert [rig.stored_pages(PROMPT) for rig in ranks] == [4, 4]
    ranks.each(Rig.check_idle)
    ranks.each(Rig.check_disk)


def test_a_copy_to_the_host_that_fails_on_one(ranks: Ranks) -> None:
    ranks.rigs[1].copier.down.error = OSError("no such luck")
    ranks.serve(PROMPT)
    ranks.drain()
    assert [rig.host.n_free for rig in ranks] == [16, 16]
    ranks.each(Rig.check_idle)
    ranks.rigs[1].copier.down.error = None
    ranks.serve(PROMPT)
    ranks.drain()
    assert [rig.stored_pages(PROMPT) for rig in ranks] == [4, 4]


def test_a_load_that_fails_on_one_fails_on_both(ranks: Ranks) -> None:
    ranks.each(Rig.stop_clock)
    ranks.serve(PROMPT)
    ranks.drain()
    ranks.each(Rig.drop_from_device)
    ranks.rigs[1].copier.up.error = OSError("no such luck")
    assert ranks.each(lambda rig: rig.admit(PROMPT)) == [None, None]
    assert [rig.usable(PROMPT) for rig in ranks] == [(0, 4)] * 2
    ranks.each(Rig.check_idle)
    # Computed the next time, on both; after a while it works again.
    ranks.rigs[1].copier.up.error = None
    for n_host in (0, 16):
        assert [request.n_host for request in ranks.serve(PROMPT)] == [n_host] * 2
        ranks.drain()
        ranks.each(Rig.drop_from_device)
        ranks.each(lambda rig: rig.later(FIRST_S))
    ranks.each(Rig.check_idle)


@pytest.mark.parametrize("n_pages", [0, 3])
def test_a_disk_that_takes_less_on_one(ranks: Ranks, n_pages: int) -> None:
    ranks.rigs[1].disk.pages_per_write = n_pages
    ranks.serve(PROMPT)
    ranks.drain()
    assert [rig.stored_pages(PROMPT) for rig in ranks] == [4, n_pages]
    ranks.each(Rig.check_idle)
    ranks.each(Rig.drop_from_device)
    ranks.each(Rig.drop_from_host)
    assert ranks.prefetch("r", PROMPT) == [n_pages * 4] * 2
    ranks.serve(PROMPT)
    ranks.drain()
    ranks.each(Rig.check_idle)


@pytest.mark.parametrize("n_pages", [0, 1, 3])
def test_a_disk_that_reads_less_on_one(ranks: Ranks, n_pages: int) -> None:
    ranks.on_disk(PROMPT)
    ranks.rigs[0].disk.pages_per_read = n_pages
    assert ranks.prefetch("r", PROMPT) == [n_pages * 4] * 2
    assert [rig.usable(PROMPT) for rig in ranks] == [(0, n_pages)] * 2
    ranks.serve(PROMPT)
    ranks.drain()
    ranks.each(Rig.check_idle)


def test_a_disk_that_lost_everything_on_one(ranks: Ranks) -> None:
    ranks.on_disk(PROMPT)
    ranks.rigs[1].disk.namespace = new_disk().namespace
    ranks.each(lambda rig: rig.arrive("r", PROMPT))
    assert [len(rig.hierarchy.prefetch.tickets) for rig in ranks] == [0, 0]
    ranks.serve(PROMPT)
    ranks.drain()
    assert [rig.stored_pages(PROMPT) for rig in ranks] == [4, 4]
    ranks.each(Rig.check_idle)


def test_eviction_that_waits_on_one(ranks: Ranks) -> None:
    ranks.rigs[1].copier.down.delay = lambda: 0.03
    ranks.serve(PROMPT)
    assert ranks.each(lambda rig: rig.hierarchy.evict_device(8)) == [8, 8]
    ranks.drain()
    ranks.each(Rig.check_idle)


def test_flush_with_transfers_that_are_done_on_one(ranks: Ranks) -> None:
    other = tokens_of(7, 8, 9)
    ranks.on_disk(PROMPT)
    slow = ranks.rigs[0]
    slow.disk.reads.delay = slow.disk.writes.delay = slow.copier.down.delay = lambda: 0.02
    ranks.serve(other)
    ranks.each(lambda rig: rig.arrive("r", PROMPT))
    ranks.each(Rig.flush)
    assert [len(rig.forest) for rig in ranks] == [0, 0]
    ranks.drain()
    ranks.each(Rig.check_idle)
    assert ranks.prefetch("r", other) == [12, 12]
    ranks.each(Rig.check_disk)


def test_close_needs_no_agreement(ranks: Ranks) -> None:
    """Ranks shut down on their own: a rank alone must not wait for the others."""
    ranks.serve(PROMPT)
    ranks.rigs[0].hierarchy.close(5.0)
    assert ranks.rigs[0].stored_pages(PROMPT) == 4
    assert ranks.rigs[0].forest.resident_tokens(Tier.DISK) == 16
