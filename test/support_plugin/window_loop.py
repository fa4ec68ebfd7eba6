"""SGLang's scheduler loop over a model one of whose two layers looks back a window only.

In each pass the rows that this layer reads, those of the last `window` tokens, must be of exactly
the tokens that the other layer says are there. Rows further up may be anything.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sglang.srt.managers.utils import GenerationBatchResult

from support_plugin.decode_loop import DecodeLoop, PretendDisk
from support_plugin.kv_model import KvModel
from tiered_kv.forest.key import namespace_hash
from tiered_kv.memory.windows import pages_back
from tiered_kv.plugin.cache.device_pool import DeviceBuffers, buffers_of, split_layers
from tiered_kv.plugin.cache.window_cache import WindowPrefixCache
from tiered_kv.tiers.device import CpuPageCopier
from tiered_kv.tiers.windows import WindowPages, WindowRows

#: The layer that looks back a window.
APART = 1


class WindowModel(KvModel):
    """Beside the layer of `KvModel` it has one that reads `window` tokens before each."""

    def __init__(self, pool: Any, rows: Any, *, overlap: bool, window: int) -> None:
        super().__init__(pool, rows, overlap=overlap)
        self.window = window
        self.n_unread = 0
        """Rows of other tokens that it did not have to read: there are such."""

    def forward_batch_generation(
        self, batch: Any, pp_proxy_tensors: None = None
    ) -> GenerationBatchResult:
        keys, values = self._pool.get_kv_buffer(0)
        own_keys, own_values = (
            buffer[APART] for buffer in (self._pool.k_buffer, self._pool.v_buffer)
        )
        result = super().forward_batch_generation(batch)
        if self._gate.has_failed(batch.hicache_consumer_index):
            return result
        at = batch.out_cache_loc
        own_keys[at], own_values[at] = keys[at], values[at]
        is_decode = batch.forward_mode.is_decode()
        for place, slots in enumerate(self._slots(batch)):
            first = len(slots) - 1 if is_decode else batch.prefix_lens[place]
            read = slots[max(0, first - self.window) :]
            assert torch.equal(own_keys[read], keys[read]), "a window's rows are of other tokens"
            assert torch.equal(own_values[read], values[read]), "a window's rows of other weights"
            self.n_unread += int((own_keys[slots, 0, 0] != keys[slots, 0, 0]).any())
        return result


class WindowLoop(DecodeLoop):
    """window: in tokens. n_window_pages: what the host has room for of the layer with a window."""

    n_layers = 2

    def __init__(self, args: Any, *, window: int, n_window_pages: int, **options: Any) -> None:
        self._window, self._n_window_pages = window, n_window_pages
        super().__init__(args, **options)

    def make_model(self, pool: Any, overlap: bool) -> WindowModel:
        return WindowModel(pool, self.req_to_token_pool, overlap=overlap, window=self._window)

    def paged_part(self, pool: Any) -> DeviceBuffers:
        full, self._apart = split_layers(buffers_of(pool), {APART})
        return full

    def make_cache(self, params: Any, parts: Any, disk: PretendDisk | None) -> WindowPrefixCache:
        device, page_size = self._apart, params.page_size
        page_bytes = sum(b[:page_size].nbytes for b in device.buffers)
        pages = np.zeros((self._n_window_pages, page_bytes), np.uint8)
        store: Any = None
        if disk is not None:
            store = disk.namespace(namespace_hash("windows"), page_bytes)
        windows = WindowPages(
            parts.hierarchy.context,
            WindowRows(device.buffers, pages_back(self._window, page_size)),
            CpuPageCopier(page_size, device.layers, device.buffers, pages),
            pages,
            store,
        )
        return WindowPrefixCache(params, parts, windows)

    def check_nothing_is_held(self) -> None:
        windows = self.tree_cache.windows
        windows.settle(10.0)
        super().check_nothing_is_held()
        windows.end_promises()
        files = windows._files
        while files.is_busy and files._queue.wait(10.0):
            windows.poll()
        windows.check_integrity()
        assert not windows.table._reserved
        assert not windows.table._holds

    def close(self) -> None:
        self.tree_cache.windows.close(1.0)
        super().close()
