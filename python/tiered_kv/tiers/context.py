"""What the pipelines between the tiers share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

import torch

from tiered_kv.core.ids import PageHash, Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.node import Node
from tiered_kv.forest.results import Match
from tiered_kv.memory.manager import MemoryManager
from tiered_kv.scheduler.calibration import Calibrator
from tiered_kv.tiers.device import DeviceSlots, PageCopier
from tiered_kv.tiers.host import HostPool
from tiered_kv.tiers.pacing import WriteBackPacer
from tiered_kv.tiers.page_format import PageFormat
from tiered_kv.tiers.page_store import PageStore
from tiered_kv.tiers.slots import PageIds
from tiered_kv.tiers.streams import After, Point
from tiered_kv.tiers.timeline import TimelineFile
from tiered_kv.tiers.transfer import Collective, Completion, J, Meeting, SingleRank


def host_pages_of(node: Node) -> PageIds:
    """The host slots of a node: page ids, as `HostPool.alloc` gave them to the forest."""
    return cast(PageIds, node.slots(Tier.HOST))


def device_slots_of(node: Node) -> torch.Tensor:
    """The device slots of a node: int64 token slots, as the engine gave them to the forest."""
    return cast(DeviceSlots, node.slots(Tier.DEVICE)).tensor


def match_of(last: Node) -> Match | None:
    """The path from the root to `last` as a match, or None if `last` has left the forest."""
    path: list[Node] = []
    at = last
    while not at.is_root:
        path.append(at)
        if at.parent is None:
            return None
        at = at.parent
    return Match(at, tuple(reversed(path)), last.end)


class DeviceAllocator(Protocol):
    """The engine's allocator of device token slots (int64 tensors, whole pages)."""

    def available(self) -> int: ...

    def alloc(self, n_tokens: int) -> torch.Tensor | None: ...

    def free(self, slots: torch.Tensor) -> None: ...


class TierListener(Protocol):
    """Is told when a node's pages became readable in a tier, or left it."""

    def stored(self, node: Node, tier: Tier) -> None: ...

    def removed(self, node: Node, tier: Tier) -> None: ...

    def dropped(self, page_hashes: Sequence[bytes], tier: Tier) -> None:
        """Pages left a tier by themselves; each rank is told of its own."""


class TransferObserver(Protocol):
    """Is told of every acknowledged transfer (for metrics)."""

    def transferred(
        self, source: Tier, target: Tier, n_pages: int, n_bytes: int, seconds: float
    ) -> None: ...

    def unwritten(self, target: Tier, n_pages: int) -> None:
        """So many pages were to be copied to `target`, and were not."""


@dataclass(frozen=True, slots=True)
class Epoch:
    """How often everything was forgotten. Jobs carry that of their start."""

    flushes: int = 0
    clears: int = 0
    """Of cold stores."""


class Beside(Protocol):
    """Keeps more of pages than the forest does."""

    def loading(self, nodes: Iterable[Node]) -> None:
        """`nodes` are about to be copied to the device."""

    def removed(self, node: Node) -> None:
        """`node` has left the device."""

    def forget(self, names: Sequence[PageHash]) -> None:
        """The host is not to have anything of these pages."""

    def drop_stored(self, names: Sequence[PageHash]) -> int:
        """Nor the disk; called on a thread of its own. Returns how many it had."""


class _Silent:
    def stored(self, node: Node, tier: Tier) -> None:
        pass

    def removed(self, node: Node, tier: Tier) -> None:
        pass

    def dropped(self, page_hashes: Sequence[bytes], tier: Tier) -> None:
        pass

    def transferred(
        self, source: Tier, target: Tier, n_pages: int, n_bytes: int, seconds: float
    ) -> None:
        pass

    def unwritten(self, target: Tier, n_pages: int) -> None:
        pass


@dataclass(slots=True)
class TierContext:
    """The tiers and the forest, for the one thread that owns them.

    stores: the cold stores as they are at the start, nearest first.
    order_after: the points in the device's streams that a copy started now must wait for.
    hold_passes: makes forward passes that are launched from now on wait for a point.
    calibrator: learns from transfers; None where nothing asks for costs.
    epoch: changes whenever the tree is emptied or a store cleared.
    now_s: time as all ranks agree on it, of the last poll with a transfer under way.
    evicted: called with a node that left a tier, and its parent then.
    timeline: where what the tiers do is drawn, if it is to be.
    pacer: holds back what is written while requests decode.
    beside: whoever keeps more of pages than the forest does.
    moved_bytes: what was transferred so far, by (source, target).
    names_pairs: whether pages are named by pairs of tokens, as a draft's KV is made of those.
    stages: where stages of a pipeline agree, who cannot wait for each other; None: there is one.
    """

    forest: Forest
    manager: MemoryManager
    copier: PageCopier
    allocator: DeviceAllocator
    host: HostPool
    stores: tuple[PageStore, ...] = ()
    collective: Collective = field(default_factory=SingleRank)
    listener: TierListener = field(default_factory=_Silent)
    observer: TransferObserver = field(default_factory=_Silent)
    order_after: Callable[[], After] = tuple
    hold_passes: Callable[[Point], None] | None = None
    calibrator: Calibrator | None = None
    now_s: float = 0.0
    epoch: Epoch = field(default_factory=Epoch)
    evicted: Callable[[Node, Node, Tier], None] | None = None
    beside: Beside | None = None
    timeline: TimelineFile | None = None
    pacer: WriteBackPacer = field(default_factory=WriteBackPacer)
    moved_bytes: dict[tuple[Tier, Tier], int] = field(default_factory=dict)
    names_pairs: bool = False
    stages: Meeting | None = None
    _ops: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def next_op(self) -> int:
        return next(self._ops)

    @property
    def page_size(self) -> int:
        return self.forest.page_size

    def page_format(self, tier: Tier) -> PageFormat:
        """The pages in a tier below the device, which is also what moves to and from it."""
        for store in self.stores:
            if store.traits.tier is tier:
                return store.traits.page_format
        return self.copier.page_format

    def alloc_host(self, n_pages: int, keep: Node | None = None) -> PageIds | None:
        """Host slots; if they are for pages below `keep`, its path is not evicted to make room.

        None, with nothing evicted, if there is not enough that may go.
        """
        shortage = n_pages - self.host.n_free
        if shortage > 0:
            if keep is not None:
                self.forest.pin(keep, Tier.HOST)
            if self.forest.evictable_tokens(Tier.HOST) >= shortage * self.page_size:
                self.evict_host(shortage)
            if keep is not None:
                self.forest.unpin(keep, Tier.HOST)
        return self.host.alloc(n_pages)

    def free_host(self, pages: PageIds) -> None:
        self.host.free(pages)

    def evict_host(self, n_pages: int) -> None:
        """Frees host slots, as far as they may go, in the order that the policy says."""
        for drop in self.manager.on_pressure(Tier.HOST, n_pages):
            node = self.forest.node(drop.node_id)
            self.host.free(cast(PageIds, self.take_out(node, Tier.HOST)))

    def evict_device(self, n_tokens: int) -> int:
        """Frees device slots in the order that the policy says; returns the tokens freed."""
        freed = 0
        for drop in self.manager.on_pressure(Tier.DEVICE, -(-n_tokens // self.page_size)):
            node = self.forest.node(drop.node_id)
            slots = cast(DeviceSlots, self.take_out(node, Tier.DEVICE)).tensor
            self.allocator.free(slots)
            freed += len(slots)
        return freed

    def take_out(self, node: Node, tier: Tier) -> object:
        """The slots that an evictable node (`Forest.evict`) had on DEVICE or HOST, to be freed."""
        parent = node.parent
        assert parent is not None
        slots = self.forest.evict(node, tier)
        self.listener.removed(node, tier)
        if self.beside is not None and tier is Tier.DEVICE:
            self.beside.removed(node)
        if self.evicted is not None:
            self.evicted(node, parent, tier)
        return slots

    def transferred(self, source: Tier, target: Tier, completion: Completion[J]) -> None:
        """A transfer was acknowledged: it is counted, and learned from if it came as asked."""
        n_done = completion.n_done
        n_bytes = n_done * self.page_format(max(source, target)).page_bytes
        self.moved_bytes[source, target] = self.moved_bytes.get((source, target), 0) + n_bytes
        self.observer.transferred(source, target, n_done, n_bytes, completion.seconds)
        if self.calibrator is not None and n_done and completion.is_as_asked:
            self.calibrator.observe_transfer(source, target, n_bytes, completion.service_s)

    def stored(self, nodes: Sequence[Node], tier: Tier) -> None:
        for node in nodes:
            self.listener.stored(node, tier)

    def removed(self, node: Node, tier: Tier) -> None:
        self.listener.removed(node, tier)
