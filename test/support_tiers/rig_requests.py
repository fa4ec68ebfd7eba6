"""A request's life on the rig (`tier_rig.py`), as SGLang's scheduler and cache lead it."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from support_tiers.engine import (
    N_LAYERS,
    Request,
    tokens_of,  # noqa: F401 (tests of the rig take it from here)
)
from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.key import TreeKey
from tiered_kv.forest.node import Node
from tiered_kv.tiers.context import device_slots_of
from tiered_kv.tiers.hierarchy import KVHierarchy
from tiered_kv.tiers.page_format import PageFormat


class RigRequests:
    """Admits requests, runs them layer by layer behind the gate, and stores what they computed."""

    # The rig's own, which this is a part of.
    page_size: int
    page_format: PageFormat
    forest: Forest
    allocator: Any
    hierarchy: KVHierarchy
    requests: list[Request]
    hashes: Callable[[Node, array[int]], list[bytes]]
    kv: Callable[[bytes], bytes]
    _pages: Any

    def admit(
        self, tokens: array[int], key: TreeKey | None = None, *, run: bool = True
    ) -> Request | None:
        """Match, lock, load back, allocate, run.

        None (and nothing held) if there is no room, or what it loads never came.
        """
        hierarchy, forest = self.hierarchy, self.forest
        root = hierarchy.root(key)
        prefix = hierarchy.match(root, tokens, len(tokens) - 1)
        locked = prefix.last_device
        device = [device_slots_of(node) for node in prefix.device]
        n_device = sum(len(slots) for slots in device)
        n_host = 0
        forest.pin(locked, Tier.DEVICE)
        if prefix.host:
            loaded = hierarchy.load_back.load(prefix.last)
            if loaded is not None:
                slots, last = loaded
                n_host = len(slots)
                device.append(slots)
                forest.pin(last, Tier.DEVICE)
                forest.unpin(locked, Tier.DEVICE)
                locked = last
        missing = -(-(len(tokens) - n_device - n_host) // self.page_size) * self.page_size
        if missing > self.allocator.available():
            hierarchy.evict_device(missing - self.allocator.available())
        own = self.allocator.alloc(missing)
        if own is None:
            forest.unpin(locked, Tier.DEVICE)
            return None
        request = Request(
            tokens, root, locked, torch.cat([*device, own]), n_device + n_host, n_device, n_host
        )
        self.requests.append(request)
        request.gate_index = hierarchy.load_back.start()
        if run and not self.forward(request):
            return None
        return request

    def forward(self, request: Request) -> bool:
        """Runs all layers: each reads the prefix's KV behind the gate and writes its own.

        False if pages that it loads never came: then it is thrown away, as if it had never run.
        """
        gate, gate_index = self.hierarchy.load_back.gate, request.gate_index
        gate.set_consumer(gate_index)
        hashes = self.hashes(request.root, request.tokens)
        pages = self.allocator.pages_of(request.slots)
        n_prefix = request.n_protected // self.page_size
        for layer in range(N_LAYERS):
            gate.wait_until(layer)
            for position, (page_hash, page) in enumerate(zip(hashes, pages, strict=False)):
                kv = self.kv(page_hash)
                for segment, buffer in zip(self.page_format.parts, self._pages, strict=True):
                    if segment.layer != layer:
                        continue
                    part = kv[segment.offset : segment.offset + segment.n_bytes]
                    if position < n_prefix:
                        assert buffer[page].tobytes() == part or gate.has_failed(gate_index), (
                            f"layer {layer} of page {position} is not what was computed"
                        )
                    else:
                        buffer[page] = np.frombuffer(part, dtype=np.uint8)
            # What the partial page at the end holds is nobody's business.
        if gate_index < 0 or not self.hierarchy.has_failed(gate_index):
            return True
        self.abort(request)
        self.hierarchy.leave_failed_loads()
        return False

    def stash(self, request: Request, n_tokens: int | None = None) -> None:
        """Like `cache_unfinished_req`: whole pages join the tree, the request goes on."""
        hierarchy = self.hierarchy
        end = len(request.tokens) // self.page_size * self.page_size
        if n_tokens is not None:
            end = min(end, n_tokens // self.page_size * self.page_size)
        key = request.tokens[:end]
        result = hierarchy.insert(request.root, key, request.slots[:end].clone())
        if request.n_protected < result.resident_tokens:
            self.allocator.free(request.slots[request.n_protected : result.resident_tokens])
        prefix = hierarchy.match(request.root, key)
        slots = [device_slots_of(node) for node in prefix.device]
        shared = torch.cat(slots) if slots else torch.empty(0, dtype=torch.int64)
        assert len(shared) == end, "what was inserted is not on the device"
        request.slots = torch.cat([shared, request.slots[end:]])
        self.forest.pin(prefix.last_device, Tier.DEVICE)
        self.forest.unpin(request.locked, Tier.DEVICE)
        request.locked, request.n_protected = prefix.last_device, end

    def finish(self, request: Request) -> None:
        """Like `cache_finished_req`: whole pages join the tree, the rest is freed."""
        end = len(request.tokens) // self.page_size * self.page_size
        result = self.hierarchy.insert(
            request.root, request.tokens[:end], request.slots[:end].clone()
        )
        if request.n_protected < result.resident_tokens:
            self.allocator.free(request.slots[request.n_protected : result.resident_tokens])
        self.allocator.free(request.slots[end:])
        self.forest.unpin(request.locked, Tier.DEVICE)
        self.requests.remove(request)

    def abort(self, request: Request) -> None:
        """The request goes away without an insert (retraction, abort)."""
        self.allocator.free(request.slots[request.n_protected :])
        self.forest.unpin(request.locked, Tier.DEVICE)
        self.requests.remove(request)

    def serve(self, tokens: array[int], key: TreeKey | None = None) -> Request:
        """One request from its arrival to its end; there must be room for it."""
        request = self.admit(tokens, key)
        assert request is not None, "there is no room on the device"
        self.finish(request)
        return request

    def arrive(self, rid: str, tokens: array[int], key: TreeKey | None = None) -> None:
        """Like `_prefetch_kvcache` at enqueue, and the poll that follows in the same pass."""
        root = self.hierarchy.root(key)
        prefix = self.hierarchy.match(root, tokens, len(tokens) - 1)
        self.hierarchy.prefetch.request(rid, prefix.last, tokens[prefix.last.end :])
        self.hierarchy.poll()
