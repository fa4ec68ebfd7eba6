"""The rig of `stream_rig` on streams that really run beside the host: a GPU's, or threads.

Passes compare every byte that they read on the device itself; what was wrong is told when all is
done.
"""

from __future__ import annotations

from typing import Any

import torch

from support_tiers.engine import Request
from support_tiers.overlap_history import N_STEPS, PROMPTS, Overlap, sizes_of
from support_tiers.real_streams import Machine, RealDevice
from support_tiers.stream_double import Removed
from support_tiers.stream_rig import StreamRig
from support_tiers.tier_rig import Rig
from tiered_kv.tiers.device import Copying, LayerDone, byte_pages
from tiered_kv.tiers.slots import PageIds
from tiered_kv.tiers.stream_copier import StreamPageCopier
from tiered_kv.tiers.streams import After

#: What passes can find wrong in one history, each with a place of its own.
CHECKS_MAX = 1 << 14


class RealCopier(StreamPageCopier):
    """Its indices come to the device in the scheduler's stream, as those of a server do."""

    device: RealDevice

    def _brought(self, slots: torch.Tensor, after: After) -> tuple[torch.Tensor, After]:
        """The slots on the device, and what to wait for until they are there."""
        schedule = self.device.streams["schedule"]
        with self.device.machine.launching(schedule.inner):
            there = slots.to(self.device.machine.device)
            later = torch.zeros_like(there)
        self.device.may_hold_up(schedule)
        schedule.inner.run(lambda: later.copy_(there))
        return later, (schedule.record(), *after[1:])

    def to_host(
        self,
        device_slots: torch.Tensor,
        host_pages: PageIds,
        after: After,
        part: PageIds | None = None,
    ) -> float:
        slots, after = self._brought(device_slots, after)
        return super().to_host(slots, host_pages, after, part)

    def begin_to_device(
        self,
        host_pages: PageIds,
        device_slots: torch.Tensor,
        after: After,
        layer_done: LayerDone,
    ) -> Copying:
        slots, after = self._brought(device_slots, after)
        return super().begin_to_device(host_pages, slots, after, layer_done)


class DevicePages:
    """A buffer's pages as `Rig` looks at them: page by page, as bytes on the host."""

    def __init__(self, buffer: torch.Tensor, page_size: int) -> None:
        self.bytes = byte_pages(buffer, page_size)

    def __getitem__(self, page: int) -> Any:
        return self.bytes[page].cpu().numpy()


class RealRig(StreamRig):
    """seed: which streams are held up, and when. path: see `bus_paths`."""

    device: Any

    def __init__(
        self,
        machine: Machine,
        seed: int,
        removed: Removed | None = None,
        path: str = "dma",
        **sizes: Any,
    ) -> None:
        self.device = RealDevice(machine, seed, removed)
        self.path = path
        self.wrong: list[str] = []
        self._flags = torch.zeros(CHECKS_MAX, dtype=torch.bool, device=machine.device)
        self._checks: list[str] = []
        self._known: dict[bytes, torch.Tensor] = {}
        Rig.__init__(self, **sizes)
        self._wire()
        root = self.hierarchy.root()
        for prompt in PROMPTS:
            # Before anything runs: what passes write and compare is no copy of theirs.
            for page_hash in self.hashes(root, prompt):
                self._expected(page_hash)
        self.device.finish()

    def _make_copier(self, layers: list[int]) -> Any:
        machine = self.device.machine
        self.buffers = [buffer.to(machine.device) for buffer in self.buffers]
        self._pages = [DevicePages(buffer, self.page_size) for buffer in self.buffers]
        machine.pin(self.host.pages.ctypes.data, self.host.pages.nbytes)
        path = self._paths(layers)
        copier = RealCopier(path(), path(), self.device.copy_streams)
        copier.device = self.device
        return copier

    def _launched(self) -> After:
        return tuple(self.device.streams[name].record() for name in ("schedule", "forward"))

    def _expected(self, page_hash: bytes) -> torch.Tensor:
        known = self._known.get(page_hash)
        if known is None:
            kv = torch.frombuffer(bytearray(self.kv(page_hash)), dtype=torch.uint8)
            known = self._known[page_hash] = kv.to(self.device.machine.device)
        return known

    def _layer(
        self, request: Request, layer: int, n_read: int, end: int, is_void: bool = False
    ) -> Any:
        pages = self.allocator.pages_of(request.slots[: end * self.page_size])
        hashes = self.hashes(request.root, request.tokens)[:end]
        expected = [self._expected(page_hash) for page_hash in hashes]
        first = len(self._checks)
        reads = range(0 if is_void else min(n_read, end))
        self._checks += [
            f"a pass read wrong KV: layer {layer}, page {position}" for position in reads
        ]
        assert len(self._checks) <= CHECKS_MAX
        parts = [
            (part.offset, part.n_bytes, buffer.bytes)
            for part, buffer in zip(self.page_format.parts, self._pages, strict=True)
            if part.layer == layer
        ]

        def kernel() -> None:
            for position, (kv, page) in enumerate(zip(expected, pages, strict=True)):
                for offset, n_bytes, there in parts:
                    part = kv[offset : offset + n_bytes]
                    if position >= n_read:
                        there[page].copy_(part)
                    elif not is_void:
                        self._flags[first + position] |= (there[page] != part).any()

        return kernel

    def settle(self) -> None:
        while self.in_flight:
            self.device.finish()
            self.hierarchy.poll()
        self.device.finish()
        self.wrong += [self._checks[i] for i in self._flags.nonzero().flatten().tolist()]
        self.check()
        self._check_bytes()

    def close(self) -> None:
        self.device.removed = None
        for queue in self.hierarchy.queues():
            queue.close()
        self.device.finish()
        self.device.machine.unpin(self.host.pages.ctypes.data)


def run_real_history(
    machine: Machine, seed: int, removed: Removed | None = None, path: str = "dma"
) -> None:
    """`overlap_history.run_history` on streams that really run. Raises whatever goes wrong."""
    rig = RealRig(machine, seed, removed, path, **sizes_of(seed))
    history = Overlap(rig, seed)
    schedule = rig.device.streams["schedule"].inner
    try:
        with machine.launching(schedule):
            history.run(N_STEPS)
    except BaseException as error:
        error.add_note(f"seed {seed}: {' '.join(history.log)}")
        raise
    finally:
        rig.close()
