"""The rig on a device with streams, driven as SGLang's scheduler does with overlap: passes are
launched and run later, while requests go on, end, and give their pages to others."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from sgl_kernel_ext.formats import Format, Role
from sgl_kernel_ext.ops import PagePool, layout_of
from support_tiers.doubles import PagedAllocator
from support_tiers.engine import N_LAYERS, Events, Request
from support_tiers.stream_double import Device, Removed, Schedule, stepped_queue
from support_tiers.tier_rig import Rig
from tiered_kv.core.ids import Tier
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import Residency
from tiered_kv.tiers import load_back, write_back
from tiered_kv.tiers.bus_paths import DmaPath, KernelPath
from tiered_kv.tiers.context import host_pages_of
from tiered_kv.tiers.device import Copying, LayerDone
from tiered_kv.tiers.slots import PageIds, SlotAllocator
from tiered_kv.tiers.stream_copier import StreamPageCopier
from tiered_kv.tiers.streams import After, Wait

PATHS = ("dma", "kernel")


class HotPages(PagedAllocator):
    """What was freed last is handed out first."""

    def free(self, slots: torch.Tensor) -> None:
        super().free(slots)
        n = len(slots) // self.page_size
        self.free_pages = self.free_pages[-n:] + self.free_pages[:-n]


class HotSlots(SlotAllocator):
    """The same for the host."""

    def __init__(self, n_slots: int) -> None:
        super().__init__(n_slots)
        self._free = list(range(n_slots))

    @property
    def n_free(self) -> int:
        return len(self._free)

    def alloc(self, n: int) -> PageIds | None:
        if n > len(self._free):
            return None
        taken, self._free = self._free[:n], self._free[n:]
        return np.array(taken, dtype=np.int64)

    def free(self, ids: PageIds) -> None:
        self._free = ids.tolist() + self._free


class Launched(tuple[Any, ...]):
    """Points to wait for, and indices that the scheduler's stream has yet to bring."""

    indices: Indices


class Indices:
    """Tensors that are filled when the stream comes to it."""

    def __init__(self) -> None:
        self._is_there = False
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def bring(self) -> None:
        self._is_there = True
        for later, slots in self._pairs:
            later.copy_(slots)

    def late(self, slots: torch.Tensor) -> torch.Tensor:
        """`slots`, once they are brought; zeros until then."""
        if self._is_there:
            return slots
        later = torch.zeros_like(slots)
        self._pairs.append((later, slots))
        return later


class StreamCopier(StreamPageCopier):
    """Its indices are computed by the scheduler's stream, as those of a server's are."""

    def to_host(
        self,
        device_slots: torch.Tensor,
        host_pages: PageIds,
        after: After,
        part: PageIds | None = None,
    ) -> float:
        return super().to_host(_late(device_slots, after), host_pages, after, part)

    def begin_to_device(
        self,
        host_pages: PageIds,
        device_slots: torch.Tensor,
        after: After,
        layer_done: LayerDone,
    ) -> Copying:
        slots = _late(device_slots, after)
        return super().begin_to_device(host_pages, slots, after, layer_done)


def _late(slots: torch.Tensor, after: After) -> torch.Tensor:
    assert isinstance(after, Launched)
    return after.indices.late(slots)


class HostReader(Events):
    """Reads pages as soon as they are said to be on the host: as a write to a disk does."""

    rig: StreamRig

    def stored(self, node: Node, tier: Tier) -> None:
        super().stored(node, tier)
        if tier is Tier.HOST:
            self.rig.check_on_host(node)


class StreamRig(Rig):
    """path: see `bus_paths`. Small blocks, so that they are used again within a copy."""

    def __init__(
        self, schedule: Schedule, removed: Removed | None = None, path: str = "dma", **sizes: Any
    ) -> None:
        self.device = Device(schedule, removed)
        self.path = path
        self.wrong: list[str] = []
        before = load_back.TransferQueue, write_back.TransferQueue
        queue: Any = stepped_queue(self.device)
        load_back.TransferQueue = write_back.TransferQueue = queue  # type: ignore[misc]
        try:
            super().__init__(**sizes)
        finally:
            load_back.TransferQueue, write_back.TransferQueue = before  # type: ignore[misc]
        self._wire()

    def _wire(self) -> None:
        self.stop_clock()
        self.allocator = self.context.allocator = HotPages(self.allocator.n_pages, self.page_size)
        self.host._slots = HotSlots(self.host.n_pages)
        self.events = HostReader()
        self.events.rig = self
        self.context.listener = self.context.observer = self.events
        self.context.order_after = self._launched
        forward = self.device.streams["forward"]
        self.context.hold_passes = lambda point: forward.wait(point, Wait.PASSES_FOR_LOAD)

    def _make_copier(self, layers: list[int]) -> Any:
        path = self._paths(layers)
        return StreamCopier(path(), path(), self.device.copy_streams)

    def _paths(self, layers: list[int]) -> Callable[[], DmaPath | KernelPath]:
        """Makes ways between the buffers and the host, of the kind that `path` names."""
        roles = [Role.KEY, Role.VALUE] * N_LAYERS
        layout = layout_of(Format.RAW, self.page_size, self.buffers, layers, roles)
        pool = PagePool(self.buffers, layout)
        kernel = KernelPath(pool, self.host.pages)

        def path() -> DmaPath | KernelPath:
            if self.path == "kernel":
                return kernel
            return DmaPath(pool, self.host.pages, block_bytes=2 * layout.page_bytes)

        return path

    def _launched(self) -> After:
        schedule, forward = (self.device.streams[name] for name in ("schedule", "forward"))
        indices = Indices()
        schedule.run(indices.bring)
        launched = Launched((schedule.record(), forward.record()))
        launched.indices = indices
        return launched

    # -- passes -------------------------------------------------------------------------------

    def forward(self, request: Request) -> bool:
        """Launches a pass and goes on. False if it is thrown away for what a load did not bring."""
        gate, index = self.hierarchy.load_back.gate, request.gate_index
        # Known before the pass is launched: nobody looks at it again when it runs.
        is_void = gate.has_failed(index)
        end = len(request.tokens) // self.page_size
        begin = request.n_protected // self.page_size
        with self._a_pass() as forward:
            gate.set_consumer(index)
            for layer in range(N_LAYERS):
                gate.wait_until(layer)
                forward.run(self._layer(request, layer, begin, end, is_void))
        if index < 0 or not self.hierarchy.has_failed(index):
            return True
        assert is_void
        self.abort(request)
        self.hierarchy.leave_failed_loads()
        return False

    def decode(self, request: Request) -> None:
        """Launches a pass that reads all of the request's whole pages."""
        end = len(request.tokens) // self.page_size
        with self._a_pass() as forward:
            self.hierarchy.load_back.gate.set_consumer(-1)
            for layer in range(N_LAYERS):
                forward.run(self._layer(request, layer, end, end))

    def _a_pass(self) -> Any:
        forward = self.device.streams["forward"]
        forward.follow(self.device.streams["schedule"].record())
        return self.device.launching("forward")

    def _layer(
        self, request: Request, layer: int, n_read: int, end: int, is_void: bool = False
    ) -> Any:
        """Reads the first pages, whose bytes are known, and computes the others'."""
        pages = self.allocator.pages_of(request.slots[: end * self.page_size])
        hashes = self.hashes(request.root, request.tokens)[:end]

        def kernel() -> None:
            for position, (page_hash, page) in enumerate(zip(hashes, pages, strict=True)):
                kv = self.kv(page_hash)
                for part, buffer in zip(self.page_format.parts, self._pages, strict=True):
                    if part.layer != layer:
                        continue
                    expected = kv[part.offset : part.offset + part.n_bytes]
                    if position >= n_read:
                        buffer[page] = np.frombuffer(expected, dtype=np.uint8)
                    elif buffer[page].tobytes() != expected and not is_void:
                        self.wrong.append(f"a pass read wrong KV: layer {layer}, page {position}")

        return kernel

    # -- looking ------------------------------------------------------------------------------

    def scribble(self) -> None:
        """The host writes to its free pages: as a read from a disk does that lands there."""
        held = [
            host_pages_of(node)
            for node in self.forest.nodes()
            if node.state(Tier.HOST) is not Residency.ABSENT
        ]
        free = np.setdiff1d(np.arange(self.host.n_pages), np.concatenate([*held, []]))
        self.host.pages[free.astype(np.int64)] = 0xA5

    def read_from_disk(self, tokens: array[int]) -> None:
        """Pages that nobody knows of come to the host by the host's own hand."""
        known = self.forest.peek(self.hierarchy.root(), tokens)
        run = tokens[known.position : len(tokens) // self.page_size * self.page_size]
        parent = known.path[-1] if known.path else self.hierarchy.root()
        if known.partial is not None or not run:
            return
        pages = self.context.alloc_host(len(run) // self.page_size, keep=parent)
        if pages is None:
            return
        op = self.context.next_op()
        nodes = self.forest.extend(parent, run, Tier.HOST, Residency.LOADING, pages, op)
        for page_hash, page in zip(nodes[0].page_hashes, pages, strict=True):
            kv = np.frombuffer(self.kv(page_hash), dtype=np.uint8)
            self.host.pages[page, : len(kv)] = kv
        self.context.stored(self.forest.finish_transfer(op, Tier.HOST), Tier.HOST)

    def check_on_host(self, node: Node) -> None:
        for page_hash, page in zip(node.page_hashes, host_pages_of(node), strict=True):
            found = self.host.pages[page, : self.page_format.page_bytes].tobytes()
            assert found == self.kv(page_hash), "a page is wrong on the host"

    def check(self) -> None:
        """What must hold at any time: whatever lies on the host may be read by the host."""
        self.scribble()
        self.forest.check_integrity()
        self._check_device_slots()
        self._check_host_slots()
        for node in self.forest.nodes():
            if node.state(Tier.HOST) is Residency.RESIDENT:
                self.check_on_host(node)
        for error in self.device.errors:
            raise error
        assert not self.wrong, self.wrong[0]

    def settle(self) -> None:
        """Nothing is under way, and every page is what it should be."""
        while self.in_flight:
            self.device.finish()
            self.hierarchy.poll()
        self.device.finish()
        self.check()
        self._check_bytes()

    def close(self) -> None:
        self.device.removed = None
        for queue in self.hierarchy.queues():
            queue.close()
