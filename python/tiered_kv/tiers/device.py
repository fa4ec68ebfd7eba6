"""The device tier: copies pages between the engine's own KV pool and the host pool.

The pool belongs to the engine; this module only reads and writes pages of it. A page is
`page_size` neighbouring token slots, so page p of a buffer is its rows [p * page_size, ...).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from tiered_kv.tiers.layer_gate import LayerEvent
from tiered_kv.tiers.page_format import PageFormat
from tiered_kv.tiers.slots import PageIds

#: Called with a layer's number once all its pages are there, or, with an event, once whoever waits
#: for the event in its own stream may read them.
LayerDone = Callable[[int, LayerEvent | None], None]

#: Points in device streams that a copy must wait for; empty where there are no streams.
After = Sequence[torch.cuda.Event]


def wait_for(after: After) -> None:
    """Blocks the calling thread until the streams have got there.

    The copier's stream would wait as well; but then nobody could tell how long the copy took.
    """
    for event in after:
        event.synchronize()


class PageCopier(Protocol):
    """Moves whole pages; both calls run on a transfer thread and return when the copy is done.

    `device_slots` are token slots as the engine's allocator gives them: int64, page by page.
    """

    page_format: PageFormat
    timed: bool
    """Whether the events of layers tell when they came about, for a timeline."""

    def to_host(self, device_slots: torch.Tensor, host_pages: PageIds, after: After) -> None: ...

    def to_device(
        self,
        host_pages: PageIds,
        device_slots: torch.Tensor,
        after: After,
        layer_done: LayerDone,
    ) -> None: ...


class DeviceSlots:
    """Token slots of consecutive pages, for the forest to slice: each slice owns its memory.

    A plain tensor slice would keep alive the whole prompt's slots that it was cut from.
    """

    __slots__ = ("tensor",)

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __len__(self) -> int:
        return int(self.tensor.shape[0])

    def __getitem__(self, index: slice, /) -> DeviceSlots:
        return DeviceSlots(self.tensor[index].clone())


def contiguous_runs(a: PageIds, b: PageIds) -> Iterator[tuple[int, int, int]]:
    """(first of a, first of b, length) of the longest stretches contiguous in both."""
    if len(a) == 0:
        return
    breaks = np.flatnonzero((np.diff(a) != 1) | (np.diff(b) != 1)) + 1
    starts = np.concatenate(([0], breaks))
    ends = np.concatenate((breaks, [len(a)]))
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        yield int(a[start]), int(b[start]), end - start


def buffer_format(
    page_size: int, layers: Sequence[int], buffers: Sequence[torch.Tensor]
) -> PageFormat:
    """The page format of token-major buffers: buffers[i] is (slots, ...) and serves layers[i]."""
    return PageFormat.of_buffers(
        page_size, layers, [b[0].numel() * b.element_size() for b in buffers]
    )


def page_ids(device_slots: torch.Tensor, page_size: int) -> PageIds:
    """The pages that whole pages of token slots lie in."""
    pages: PageIds = pages_of(device_slots, page_size).cpu().numpy()
    return pages


def pages_of(device_slots: torch.Tensor, page_size: int) -> torch.Tensor:
    """The same, where the slots are."""
    return device_slots[::page_size] // page_size


def byte_pages(buffer: torch.Tensor, page_size: int) -> torch.Tensor:
    """A (slots, ...) buffer seen as (pages, page bytes) of uint8; no copy."""
    n_pages = buffer.shape[0] // page_size
    rows = buffer[: n_pages * page_size].reshape(n_pages, -1)
    if rows.data_ptr() != buffer.data_ptr():
        raise ValueError("the device pool's buffers must be contiguous, token by token")
    return rows.view(torch.uint8)


class CpuPageCopier:
    """For a device pool that lies in main memory: plain memory copies through numpy.

    numpy rather than torch: its copies run on the calling thread alone and release the GIL, so a
    transfer takes no cores away from the forward pass's thread pool.
    """

    timed = False

    def __init__(
        self,
        page_size: int,
        layers: Sequence[int],
        buffers: Sequence[torch.Tensor],
        host: npt.NDArray[np.uint8],
    ) -> None:
        self.page_format = buffer_format(page_size, layers, buffers)
        self._buffers = [byte_pages(b, page_size).numpy() for b in buffers]
        self._host = host

    def to_host(self, device_slots: torch.Tensor, host_pages: PageIds, after: After) -> None:
        del after  # a forward pass on the CPU has returned before anyone asks for its pages
        device_pages = page_ids(device_slots, self.page_format.page_size)
        for device, host, n in contiguous_runs(device_pages, host_pages):
            for part, buffer in zip(self.page_format.parts, self._buffers, strict=True):
                end = part.offset + part.n_bytes
                self._host[host : host + n, part.offset : end] = buffer[device : device + n]

    def to_device(
        self,
        host_pages: PageIds,
        device_slots: torch.Tensor,
        after: After,
        layer_done: LayerDone,
    ) -> None:
        del after
        device_pages = page_ids(device_slots, self.page_format.page_size)
        runs = list(contiguous_runs(host_pages, device_pages))
        parts = self.page_format.parts
        for i, (part, buffer) in enumerate(zip(parts, self._buffers, strict=True)):
            end = part.offset + part.n_bytes
            for host, device, n in runs:
                buffer[device : device + n] = self._host[host : host + n, part.offset : end]
            if i + 1 == len(parts) or parts[i + 1].layer != part.layer:
                layer_done(part.layer, None)


class TorchPageCopier:
    """For a device pool on an accelerator: gather into a staging block, then one block copy.

    Runs in its own stream; `after` (a stream) is what the copy must wait for, so that pages are
    read only after the forward passes launched before have written them. With `stream=None` it
    works on any device, synchronously: that is how it is tested without an accelerator.
    """

    STAGING_BYTES = 64 << 20
    timed = False

    def __init__(
        self,
        page_size: int,
        layers: Sequence[int],
        buffers: Sequence[torch.Tensor],
        host: npt.NDArray[np.uint8],
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self._buffers = [byte_pages(b, page_size) for b in buffers]
        self._device = buffers[0].device
        self._host = torch.from_numpy(host)
        self._stream = stream
        self._use_format(buffer_format(page_size, layers, buffers))

    def _use_format(self, page_format: PageFormat) -> None:
        self.page_format = page_format
        self._chunk_pages = max(1, self.STAGING_BYTES // page_format.page_bytes)

    def _wait(self, after: After) -> None:
        if self._stream is not None:
            for event in after:
                self._stream.wait_event(event)

    def _record(self) -> torch.cuda.Event | None:
        if self._stream is None:
            return None
        event = torch.cuda.Event(enable_timing=self.timed)
        event.record(self._stream)
        return event

    def _synchronize(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    def _staging(self, n_pages: int, n_bytes: int) -> torch.Tensor:
        return torch.empty((n_pages, n_bytes), dtype=torch.uint8, device=self._device)

    def to_host(self, device_slots: torch.Tensor, host_pages: PageIds, after: After) -> None:
        page_bytes = self.page_format.page_bytes
        with torch.cuda.stream(self._stream):
            self._wait(after)
            pages = pages_of(device_slots, self.page_format.page_size)
            for at in range(0, len(host_pages), self._chunk_pages):
                chunk = slice(at, at + self._chunk_pages)
                staging = self._staging(len(host_pages[chunk]), page_bytes)
                self._gather(pages[chunk], staging)
                for row, host, n in _rows_of(host_pages[chunk]):
                    self._host[host : host + n, :page_bytes].copy_(staging[row : row + n], True)
        self._synchronize()

    def _gather(self, device_pages: torch.Tensor, staging: torch.Tensor) -> None:
        """Fills row i of `staging`, (pages, page bytes), with page i."""
        for part, buffer in zip(self.page_format.parts, self._buffers, strict=True):
            end = part.offset + part.n_bytes
            staging[:, part.offset : end] = buffer.index_select(0, device_pages)

    def to_device(
        self,
        host_pages: PageIds,
        device_slots: torch.Tensor,
        after: After,
        layer_done: LayerDone,
    ) -> None:
        runs = _rows_of(host_pages)
        with torch.cuda.stream(self._stream):
            self._wait(after)
            pages = pages_of(device_slots, self.page_format.page_size)
            for layer in range(self.page_format.n_layers):
                start, end = self.page_format.layer_bytes(layer)
                staging = self._staging(len(host_pages), end - start)
                for row, host, n in runs:
                    staging[row : row + n].copy_(self._host[host : host + n, start:end], True)
                self._scatter(layer, staging, pages)
                layer_done(layer, self._record())
        self._synchronize()

    def _scatter(self, layer: int, staging: torch.Tensor, device_pages: torch.Tensor) -> None:
        """Writes row i of `staging`, (pages, bytes of the layer), to page i."""
        start, _ = self.page_format.layer_bytes(layer)
        for part, buffer in zip(self.page_format.parts, self._buffers, strict=True):
            if part.layer == layer:
                at = part.offset - start
                buffer.index_copy_(0, device_pages, staging[:, at : at + part.n_bytes])


def _rows_of(host_pages: PageIds) -> list[tuple[int, int, int]]:
    """(row, host page, length) of the runs of neighbouring host pages in a staging block."""
    return list(contiguous_runs(np.arange(len(host_pages), dtype=np.int64), host_pages))
