"""The device tier on an accelerator: copies that are asked of streams, and waited for elsewhere.

A load is asked for as a whole by the thread that launches forward passes: for its layers in order,
each followed by a point for which that layer of a pass waits. Writes to the host are asked for by
a transfer thread. Either way the order is kept by points, on the device (`tiers.streams`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from sgl_kernel_ext.formats import PageLayout
from tiered_kv.tiers.device import Copying, LayerDone, pages_of
from tiered_kv.tiers.page_format import PageFormat
from tiered_kv.tiers.slots import PageIds
from tiered_kv.tiers.streams import After, CopyStreams, Point, Stream, Wait


class BusPath(Protocol):
    """One way for pages to cross the bus. Everything is asked of `stream`, nothing waited for.

    pages: page numbers on the device, (n,) int64, of the same stream.
    """

    layout: PageLayout

    @property
    def block_bytes(self) -> int:
        """Device memory that it keeps."""

    def to_host(self, stream: Stream, pages: torch.Tensor, host_pages: PageIds) -> None: ...

    def to_device(
        self, stream: Stream, pages: torch.Tensor, host_pages: PageIds
    ) -> Iterator[range]:
        """Yields each run of layers when all of its copies have been asked for, in order."""


class StreamPageCopier:
    """See `tiers.device.PageCopier`. down, up: how pages get to the host, and to the device."""

    def __init__(self, down: BusPath, up: BusPath, streams: CopyStreams) -> None:
        self.page_format = PageFormat.of_layout(down.layout)
        self.timed = False
        self.down = down
        self.up = up
        self._streams = streams

    def use_device(self) -> None:
        self._streams.use_device()

    def to_host(
        self,
        device_slots: torch.Tensor,
        host_pages: PageIds,
        after: After,
        part: PageIds | None = None,
    ) -> float:
        stream = self._streams.to_host
        try:
            for point in after:
                stream.wait(point, Wait.WRITE_FOR_LAUNCHED)
            began = stream.record(timed=True)
            pages = self._pages(stream, device_slots, part)
            self.down.to_host(stream, pages, host_pages if part is None else host_pages[part])
            ended = stream.record(timed=True)
        except Exception:
            stream.record().reached(Wait.WRITE_GIVEN_UP)
            raise
        ended.reached(Wait.WRITTEN)
        return began.seconds_until(ended)

    def begin_to_device(
        self,
        host_pages: PageIds,
        device_slots: torch.Tensor,
        after: After,
        layer_done: LayerDone,
    ) -> Copying:
        stream = self._streams.to_device
        try:
            for point in after:
                stream.wait(point, Wait.LOAD_FOR_LAUNCHED)
            began = stream.record(timed=True)
            # Held until the load is over: by then nobody reads its memory.
            pages = self._pages(stream, device_slots)
            for layers in self.up.to_device(stream, pages, host_pages):
                point = stream.record(timed=self.timed)
                for layer in layers:
                    layer_done(layer, point)
            ended = stream.record(timed=True)
        except Exception as error:
            return Copying(partial(_give_up, stream.record(), error), error)
        return Copying(partial(_finish, _Load(began, ended, pages, device_slots)))

    def _pages(
        self, stream: Stream, device_slots: torch.Tensor, part: PageIds | None = None
    ) -> torch.Tensor:
        page_size = self.page_format.page_size
        if part is None:
            pages = stream.empty(len(device_slots) // page_size)
            stream.run(lambda: pages.copy_(pages_of(device_slots, page_size)))
            return pages
        pages, rows = stream.empty(len(part)), stream.upload(part)
        stream.run(lambda: pages.copy_(pages_of(device_slots, page_size)[rows]))
        return pages


@dataclass(frozen=True, slots=True)
class _Load:
    began: Point
    ended: Point
    pages: torch.Tensor
    device_slots: torch.Tensor


def _finish(load: _Load) -> float:
    load.ended.reached(Wait.LOADED)
    return load.began.seconds_until(load.ended)


def _give_up(asked: Point, error: Exception) -> float:
    asked.reached(Wait.LOAD_GIVEN_UP)
    raise error
