"""The prefix cache of models that keep more of a prefix than a row for each token.

A prefix ends at a place where all of that can be had (`tiers/places.py`), and is loaded to there or
not at all.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import torch
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams, MatchResult

from tiered_kv.core.ids import Tier
from tiered_kv.forest.node import Node
from tiered_kv.memory.ticket import path_up, usable
from tiered_kv.plugin.cache.prefix_cache import WRITE_OUT_TIMEOUT_S, TieredPrefixCache
from tiered_kv.plugin.requests.inputs import as_named
from tiered_kv.tiers.context import device_slots_of
from tiered_kv.tiers.places import Places

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams

    from tiered_kv.memory.actions import Load
    from tiered_kv.plugin.cache.parts import CacheParts


class PlacedPrefixCache(TieredPrefixCache):
    """places: where prefixes may end."""

    def __init__(self, params: CacheInitParams, parts: CacheParts, places: Places) -> None:
        self._places: Places | None = None
        super().__init__(params, parts)
        self.places = self._places = places
        self._admitting: Req | None = None
        self._promised: tuple[Node, Load | None, int] | None = None
        """Of who is being admitted: where its load would end, what it is, and whence it begins."""
        self._prompts: dict[str, tuple[Node, array[int]]] = {}
        """Of those who wait for what a place needs of the disk: their tree, and the prompt."""

    # -- lookup -------------------------------------------------------------------------------

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        """As far as there is a place to go on from, if it is for a request; else all there is."""
        req = params.req
        if req is None:
            return super().match_prefix(params)
        if not self.weights.is_named:
            self.look_at_weights()
        key, hierarchy = params.key, self.hierarchy
        self._last_key = key.extra_key
        root, tokens = self._root_of(key), self._named(key)
        path, device, end = self._usable(root, tokens, key.limit)
        self.looked_up(req, path)
        on_device, end = self.places.promise(req.rid, path, device, end)
        first = hierarchy.match(root, tokens, on_device)
        last = first.last_device
        if end > on_device:
            last = hierarchy.match(root, tokens, end).last
        return self.match_result(
            [device_slots_of(node) for node in first.device],
            first.last_device,
            last,
            end - on_device,
        )

    def looked_up(self, req: Req, path: list[Node]) -> None:
        """`path` is what the tree knows of the prompt of `req`."""

    def _usable(
        self, root: Node, tokens: array[int], limit: int | None
    ) -> tuple[list[Node], int, int]:
        """(The path of a prompt, where what the device has of it ends, and the host), in tokens.

        A node in which the prompt ends is split, so that the path is the prompt's.
        """
        found = self.hierarchy.context.forest.peek(root, tokens, limit)
        path = list(found.path)
        if found.partial is not None:
            n_pages = found.common // self.page_size
            path.append(self.hierarchy.context.forest.split(found.partial, n_pages)[0])
        n_device, n_usable = usable(path)
        ends = [0, *(node.end for node in path)]
        return path, ends[n_device], ends[n_usable]

    # -- admission ----------------------------------------------------------------------------

    def note_loading(self, req: Req) -> None:
        super().note_loading(req)
        self._admitting = req

    def load_back(self, last: Node, n_tokens: int | None) -> tuple[torch.Tensor, Node]:
        """All that ends at `last` and is not the request's yet, or nothing: no place is between."""
        req = self._admitting
        assert req is not None, "SGLang loads for a request"
        start = len(req.prefix_indices)
        action = self.hierarchy.load_back.plan_whole(last, n_tokens, start)
        if not self._is_loaded(last, action):
            return self.nothing, req.last_node
        return self._slots(last, start), last

    def plan_load(self, last: Node, n_tokens: int, start: int) -> tuple[int, Node]:
        action = None
        if last.slots(Tier.DEVICE) is None:
            action = self.hierarchy.load_back.plan_whole(last, n_tokens, start)
            if action is None:
                self._promised = None
                return 0, _at(last, start)
        self._promised = last, action, start
        return last.end - start, last

    def carry_out_load(self, last: Node) -> tuple[torch.Tensor, Node]:
        promised, self._promised = self._promised, None
        if promised is None or promised[0] is not last:
            return self.nothing, self._device_part(last)
        _, action, start = promised
        if not self._is_loaded(last, action):
            return self.nothing, _at(last, start)
        return self._slots(last, start), last

    def _is_loaded(self, last: Node, action: Load | None) -> bool:
        """Whether `last` is on the device, or on its way, and somebody can go on from its end."""
        if last.slots(Tier.DEVICE) is None and (
            action is None or self.hierarchy.load_back.carry_out(action) is None
        ):
            return False
        return self.places.bring(last)

    @staticmethod
    def _slots(last: Node, start: int) -> torch.Tensor:
        own = [device_slots_of(node) for node in path_up(last) if node.start >= start]
        return torch.cat(own[::-1])

    # -- the disk -----------------------------------------------------------------------------

    def prefetch(self, rid: str, last_host_node: Node, new_input_tokens: array[int]) -> None:
        key = self._last_key
        super().prefetch(rid, last_host_node, new_input_tokens)
        self.places.wish(rid)
        tokens = array("q")
        for node in list(path_up(last_host_node))[::-1]:
            tokens.extend(node.tokens)
        context = self.hierarchy.context
        tokens.extend(as_named(new_input_tokens, key, context, last_host_node.end))
        self._prompts[rid] = last_host_node.root, tokens

    def is_prefetched(self, rid: str) -> bool:
        if not super().is_prefetched(rid):
            return False
        # While weights change, what the disk has is of others.
        if not self.places.is_wished(rid) or not self.weights.is_named:
            return True
        root, tokens = self._prompts[rid]
        return self.places.has_come(rid, *self._usable(root, tokens, None))

    def release_prefetch(self, rid: str) -> None:
        super().release_prefetch(rid)
        self.places.forget_wish(rid)
        self._prompts.pop(rid, None)

    # -- administration -----------------------------------------------------------------------

    def check_hicache_events(self) -> None:
        self.places.end_promises()
        self.places.poll()
        super().check_hicache_events()

    def reset(self) -> None:
        if self._places is not None:
            # First: what it copies holds pages of the tree.
            self._places.flush()
            self._prompts.clear()
        super().reset()

    def check_integrity(self) -> None:
        super().check_integrity()
        self.places.check_integrity()

    def release_host_resources(self) -> None:
        self.places.close(WRITE_OUT_TIMEOUT_S)
        super().release_host_resources()

    def is_lasting(self, last: Node) -> bool:
        """Whether what belongs to the path to `last` may go to the disk."""
        return self.weights.is_named and last.root.tree_key.is_lasting


def _at(last: Node, end: int) -> Node:
    """The node on the way to `last` that ends after `end` tokens."""
    while last.end > end:
        assert last.parent is not None
        last = last.parent
    return last
