"""The gate a forward pass waits at: layer i may run when layer i of its loaded pages is there.

The engine calls `set_consumer(index)` before a batch runs and `wait_until(layer)` when a layer
reads its KV (mem_cache/memory_pool.py: get_key_buffer); index -1 means nothing to wait for.

On an accelerator a load has been asked for as a whole before its batch runs, and a layer waits in
the device's stream for a point of the load's: the thread that launches goes on. Where copies are
made by a thread, the pass waits for that.

A load that fails opens the gate: a forward pass cannot be left in its middle. Whoever ran it asks
`has_failed` afterwards, and throws away what was computed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

from tiered_kv.tiers.streams import Point, Wait

#: Is told of each wait for a layer of a load: the load's index, the layer, from when to when.
WaitObserver = Callable[[int, int, float, float], None]


class LoadBatch:
    """The progress of one load: layers [0, layers_done) have arrived, or are ordered by points."""

    def __init__(self, index: int, n_layers: int) -> None:
        self.index = index
        self.n_layers = n_layers
        self._layers_done = 0
        self._points: list[Point | None] = [None] * n_layers
        self.has_failed = False
        self._changed = threading.Condition()

    def layer_done(self, layer: int, point: Point | None = None) -> None:
        with self._changed:
            self._points[layer] = point
            self._layers_done = layer + 1
            self._changed.notify_all()

    def fail(self) -> None:
        """Lets the waiter go: its KV will never be there."""
        with self._changed:
            self.has_failed = True
            self._changed.notify_all()

    @property
    def finished(self) -> bool:
        return self._layers_done == self.n_layers

    @property
    def whole(self) -> Point | None:
        """Where all layers are there; None if that is not known, or no device's business."""
        return None if self.has_failed else self._points[-1]

    def wait(self, layer: int) -> None:
        if self._layers_done <= layer:
            with self._changed:
                self._changed.wait_for(lambda: self._layers_done > layer or self.has_failed)
        if self.has_failed:
            return
        point = self._points[layer]
        if point is not None:
            point.hold(Wait.LAYER_FOR_LOAD)


class LayerGate:
    """Hands out load batches and makes the batch that runs wait for its own."""

    def __init__(self, n_layers: int) -> None:
        self.n_layers = n_layers
        self._next_index = 0
        self._open: dict[int, LoadBatch] = {}
        self._consumed: LoadBatch | None = None
        self.observe: WaitObserver | None = None

    def open(self) -> LoadBatch:
        batch = LoadBatch(self._next_index, self.n_layers)
        self._next_index += 1
        self._open[batch.index] = batch
        return batch

    def close(self, batch: LoadBatch) -> None:
        """The load is complete and acknowledged; later consumers need not wait."""
        self._open.pop(batch.index, None)

    def has_failed(self, index: int) -> bool:
        """Whether a pass that has waited for load `index` read KV that never arrived.

        Pages of earlier loads may be in its batch, too: those that failed stay open until then.
        """
        return any(b.has_failed for b in self._open.values() if b.index <= index)

    def newest_first(self) -> Iterator[LoadBatch]:
        """The loads still open. They run one after the other: who waits for one waits for all that
        are older."""
        return reversed(self._open.values())

    def set_consumer(self, index: int) -> None:
        self._consumed = self._open.get(index) if index >= 0 else None

    def wait_until(self, layer: int) -> None:
        batch = self._consumed
        if batch is None:
            return
        if self.observe is None:
            batch.wait(layer)
            return
        began_s = time.perf_counter()
        batch.wait(layer)
        self.observe(batch.index, layer, began_s, time.perf_counter())
