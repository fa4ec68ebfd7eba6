"""Swapping a running request's own KV out to the host, as blocks, and back: no recompute.

For what no tree holds: the pages of a request that is parked, its last one partly filled. What the
tree has of it is cache, is written through anyway, and need not be swapped (FastSwitch, arXiv
2411.18424, reuses such copies likewise). The mechanism only: who is swapped, and when, is decided
elsewhere. Swapped pages take at most a share of the host pool, and are not evicted.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch

from tiered_kv.core.ids import Tier
from tiered_kv.tiers.context import TierContext
from tiered_kv.tiers.device import After, wait_for
from tiered_kv.tiers.layer_gate import LayerEvent
from tiered_kv.tiers.slots import PageIds
from tiered_kv.tiers.transfer import Completion, TransferQueue

#: Swapped requests may take at most this share of the host pool: the rest stays cache.
SWAPPED_SHARE = 0.5


class Swapped(enum.Enum):
    """Where a request's own pages are."""

    LEAVING = "leaving"
    """On their way to the host: the device slots must neither be written nor freed."""

    AWAY = "away"
    """On the host: the caller may free the device slots it had."""

    RETURNING = "returning"
    """On their way into new device slots, which must not be read yet."""

    BACK = "back"
    """In the new device slots, which are the caller's from now on."""


@dataclass(slots=True)
class _Entry:
    state: Swapped
    host_pages: PageIds
    device_slots: torch.Tensor | None
    is_unwanted: bool = False


@dataclass(frozen=True, slots=True)
class SwapJob:
    """One request's pages, one way."""

    rid: str
    entry: _Entry
    device_slots: torch.Tensor
    host_pages: PageIds
    after: After
    is_return: bool

    @property
    def n_pages(self) -> int:
        return len(self.host_pages)


class Swap:
    """Requests by id. Every call returns at once; `KVHierarchy.poll` acknowledges what is done."""

    def __init__(self, context: TierContext) -> None:
        self._context = context
        self.queue: TransferQueue[SwapJob] = TransferQueue("swap", self._copy)
        self._entries: dict[str, _Entry] = {}
        self._n_pages = 0

    @property
    def n_swapped_pages(self) -> int:
        """Host pages that swapped requests hold."""
        return self._n_pages

    def state(self, rid: str) -> Swapped | None:
        """None for a request that is not swapped, also after a copy to the host that failed."""
        entry = self._entries.get(rid)
        return entry.state if entry is not None else None

    def swap_out(self, rid: str, device_slots: torch.Tensor) -> bool:
        """Starts copying whole pages of slots (int64, page by page) to the host.

        False, with nothing changed, if there is no room, or `rid` is swapped already, or the host
        keeps pages in a lossy format: the end of a page that is partly filled would decide about
        the scales of its tokens. If the copy fails, `state` becomes None: the pages are where they
        were.
        """
        context = self._context
        n_pages = len(device_slots) // context.page_size
        if n_pages * context.page_size != len(device_slots):
            raise ValueError(
                f"{len(device_slots)} slots are not whole pages of {context.page_size}"
            )
        limit = int(context.host.n_pages * SWAPPED_SHARE)
        if rid in self._entries or n_pages == 0 or self._n_pages + n_pages > limit:
            return False
        if context.copier.page_format.is_lossy:
            return False
        host_pages = context.alloc_host(n_pages)
        if host_pages is None:
            return False
        entry = _Entry(Swapped.LEAVING, host_pages, None)
        self._entries[rid] = entry
        self._n_pages += n_pages
        self._submit(rid, entry, device_slots, is_return=False)
        return True

    def swap_in(self, rid: str) -> torch.Tensor | None:
        """New device slots for a request that is AWAY, and a copy into them under way.

        None, with nothing changed, if the device has no room. If the copy fails the slots are freed
        again and the request is AWAY as before.
        """
        entry = self._entries[rid]
        if entry.state is not Swapped.AWAY:
            raise ValueError(f"request {rid} is {entry.state.value}, not away")
        context = self._context
        n_tokens = len(entry.host_pages) * context.page_size
        shortage = n_tokens - context.allocator.available()
        if shortage > 0 and context.forest.evictable_tokens(Tier.DEVICE) >= shortage:
            context.evict_device(shortage)
        slots = context.allocator.alloc(n_tokens)
        if slots is None:
            return None
        entry.state, entry.device_slots = Swapped.RETURNING, slots
        self._submit(rid, entry, slots, is_return=True)
        return slots

    def forget(self, rid: str) -> None:
        """The request is over, or has taken its slots over: its host pages are free again.

        While a copy is under way they are freed when it ends; new device slots that the request
        never took over (it is RETURNING) are freed with them.
        """
        entry = self._entries.pop(rid, None)
        if entry is None:
            return
        if entry.state in (Swapped.LEAVING, Swapped.RETURNING):
            entry.is_unwanted = True
        else:
            self._free(entry)

    def acknowledged(self, completion: Completion[SwapJob]) -> None:
        """A copy has ended on every rank, or failed on one."""
        context, job = self._context, completion.job
        entry = job.entry
        is_done = completion.n_done == job.n_pages
        source, target = (Tier.HOST, Tier.DEVICE) if job.is_return else (Tier.DEVICE, Tier.HOST)
        context.transferred(source, target, completion)
        if job.is_return and (entry.is_unwanted or not is_done):
            context.allocator.free(job.device_slots)
            entry.device_slots = None
        if entry.is_unwanted:
            self._free(entry)
        elif job.is_return:
            entry.state = Swapped.BACK if is_done else Swapped.AWAY
        elif is_done:
            entry.state = Swapped.AWAY
        else:
            del self._entries[job.rid]
            self._free(entry)

    def clear(self) -> None:
        """Forgets all requests; no copy is under way, and the pools are being emptied."""
        self._entries.clear()
        self._n_pages = 0

    def _submit(
        self, rid: str, entry: _Entry, device_slots: torch.Tensor, *, is_return: bool
    ) -> None:
        after = self._context.order_after()
        self.queue.submit(SwapJob(rid, entry, device_slots, entry.host_pages, after, is_return))

    def _free(self, entry: _Entry) -> None:
        self._context.host.free(entry.host_pages)
        self._n_pages -= len(entry.host_pages)

    def _copy(self, job: SwapJob) -> int:
        copier = self._context.copier
        wait_for(job.after)
        self.queue.restart_clock()
        if job.is_return:
            copier.to_device(job.host_pages, job.device_slots, job.after, _whole)
        else:
            copier.to_host(job.device_slots, job.host_pages, job.after)
        return job.n_pages


def _whole(layer: int, event: LayerEvent | None) -> None:
    """Nobody waits for single layers."""
