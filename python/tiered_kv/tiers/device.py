"""The device tier: copies pages between the engine's own KV pool and the host pool.

The pool belongs to the engine; this module only reads and writes pages of it. A page is
`page_size` neighbouring token slots, so page p of a buffer is its rows [p * page_size, ...).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from tiered_kv.tiers.page_format import PageFormat
from tiered_kv.tiers.slots import PageIds
from tiered_kv.tiers.streams import After, Point

#: Called with a layer's number once all its pages are there, or, with a point of a stream, once
#: they are there for whoever waits for that point.
LayerDone = Callable[[int, Point | None], None]


@dataclass(frozen=True, slots=True)
class Copying:
    """A load that has been asked for.

    finish: called once, on a transfer thread; returns when the load is over, and how many seconds
    the device took for it, or None where no device can tell. Raises what made the load fail.
    error: why it will, if that is known already.
    """

    finish: Callable[[], float | None]
    error: Exception | None = None


class PageCopier(Protocol):
    """Moves whole pages.

    `device_slots` are token slots as the engine's allocator gives them: int64, page by page.
    after: what must have been done before.
    """

    page_format: PageFormat
    timed: bool
    """Whether the points of layers tell when they came about, for a timeline."""

    def use_device(self) -> None:
        """Called first by every transfer thread."""

    def to_host(
        self,
        device_slots: torch.Tensor,
        host_pages: PageIds,
        after: After,
        part: PageIds | None = None,
    ) -> float | None:
        """On a transfer thread; returns when the copy is over, with the device's seconds if it has
        told them. If it raises, nothing of it is under way any more.

        part: which of the pages to copy, by their places in the call; None: all of them.
        """

    def begin_to_device(
        self,
        host_pages: PageIds,
        device_slots: torch.Tensor,
        after: After,
        layer_done: LayerDone,
    ) -> Copying:
        """On the thread that launches forward passes, which it keeps from nothing.

        Where layers have points in a stream, all of them are told before it returns, but for those
        that a failure leaves out.
        """


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


Piece = TypeVar("Piece")


class HostCopier(ABC, Generic[Piece]):
    """For a device pool that lies in main memory: copies on the transfer thread.

    The loops of both kinds of them, which differ in what they move at a time.
    """

    page_format: PageFormat
    timed = False

    def use_device(self) -> None:
        pass

    def to_host(
        self,
        device_slots: torch.Tensor,
        host_pages: PageIds,
        after: After,
        part: PageIds | None = None,
    ) -> None:
        # A forward pass on the CPU has returned before anyone asks for its pages.
        del after
        device_pages = page_ids(device_slots, self.page_format.page_size)
        if part is not None:
            device_pages, host_pages = device_pages[part], host_pages[part]
        for piece in self._pieces(device_pages, host_pages):
            self._to_host(piece)

    def begin_to_device(
        self,
        host_pages: PageIds,
        device_slots: torch.Tensor,
        after: After,
        layer_done: LayerDone,
    ) -> Copying:
        del after
        return Copying(partial(self.to_device, host_pages, device_slots, layer_done))

    def to_device(
        self, host_pages: PageIds, device_slots: torch.Tensor, layer_done: LayerDone
    ) -> None:
        device_pages = page_ids(device_slots, self.page_format.page_size)
        pieces = list(self._pieces(device_pages, host_pages))
        for layer in range(self.page_format.n_layers):
            for piece in pieces:
                self._to_device(piece, layer)
            layer_done(layer, None)

    @abstractmethod
    def _pieces(self, device_pages: PageIds, host_pages: PageIds) -> Iterator[Piece]:
        """What is moved at a time."""

    @abstractmethod
    def _to_host(self, piece: Piece) -> None: ...

    @abstractmethod
    def _to_device(self, piece: Piece, layer: int) -> None: ...


class CpuPageCopier(HostCopier[tuple[int, int, int]]):
    """Plain memory copies through numpy, a run of pages at a time: (device page, host page, n).

    numpy rather than torch: its copies run on the calling thread alone and release the GIL, so a
    transfer takes no cores away from the forward pass's thread pool.
    """

    def __init__(
        self,
        page_size: int,
        layers: Sequence[int],
        buffers: Sequence[torch.Tensor],
        host: npt.NDArray[np.uint8],
    ) -> None:
        self.page_format = buffer_format(page_size, layers, buffers)
        parts = zip(
            self.page_format.parts, (byte_pages(b, page_size).numpy() for b in buffers), strict=True
        )
        self._layers: list[list[tuple[slice, npt.NDArray[np.uint8]]]] = [
            [] for _ in range(self.page_format.n_layers)
        ]
        for part, buffer in parts:
            columns = slice(part.offset, part.offset + part.n_bytes)
            self._layers[part.layer].append((columns, buffer))
        self._host = host

    def _pieces(self, device_pages: PageIds, host_pages: PageIds) -> Iterator[tuple[int, int, int]]:
        return contiguous_runs(device_pages, host_pages)

    def _to_host(self, piece: tuple[int, int, int]) -> None:
        device, host, n = piece
        for layer in self._layers:
            for columns, buffer in layer:
                self._host[host : host + n, columns] = buffer[device : device + n]

    def _to_device(self, piece: tuple[int, int, int], layer: int) -> None:
        device, host, n = piece
        for columns, buffer in self._layers[layer]:
            buffer[device : device + n] = self._host[host : host + n, columns]
