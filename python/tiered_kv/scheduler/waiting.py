"""The queue of waiting requests, with what is cached of each kept up to date incrementally.

Matching every waiting request against the tree in every step is what makes upstream give up cache-
aware orders above 128 requests (managers/schedule_policy.py). Here a request is looked up when it
arrives. When something changes, the nodes concerned are looked at once, and the requests whose
prefix goes through them get the difference; only what continues a prompt is compared with it again.
Looking is no use: it neither counts as a hit nor splits a node.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping

from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.key import page_hash
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import Residency
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.scheduler.tightest import TightestObjective

#: So many of those who wait are looked at where looking at everyone would take too long.
QUEUE_LOOK = 64
_ABSENT = Residency.ABSENT
_RESIDENT = Residency.RESIDENT


class _Place:
    """The requests whose cached prefixes end at, or inside, the same node or root."""

    __slots__ = ("ends", "node", "path", "requests")

    def __init__(self, node: Node) -> None:
        self.node = node
        self.path: tuple[Node, ...] = ()
        """Down to `node`, without the root."""
        self.requests: dict[int, QueuedRequest] = {}
        self.ends: dict[int, int] = {}
        """Where each one's prefix ends, in the forest's units."""


class WaitingQueue:
    """Requests by id in the order in which they joined, and by where their prefixes end."""

    def __init__(self, forest: Forest, *, tokens_per_unit: int = 1) -> None:
        """`tokens_per_unit`: prompt tokens that one token of the forest stands for.

        1 on a server. A simulation over traces of block ids stores a block as one token.
        """
        self.tokens_per_unit = tokens_per_unit
        self.tightest = TightestObjective()
        """Of those who joined of late."""
        self._forest = forest
        self._requests: dict[int, QueuedRequest] = {}
        # By node id: a node that left the forest must not be kept alive by an index.
        self._places: dict[int, _Place] = {}
        self._place_of: dict[int, _Place] = {}
        self._through: dict[int, dict[int, _Place]] = {}
        # By the name of the first page that they lack: whatever has that name continues them.
        self._lacking: dict[bytes, dict[int, QueuedRequest]] = {}
        self._next_page: dict[int, bytes] = {}
        self._lost: dict[int, QueuedRequest] = {}
        forest.watch_splits(self._split)

    @property
    def requests(self) -> Mapping[int, QueuedRequest]:
        """By id, in queue order."""
        return self._requests

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[QueuedRequest]:
        return iter(self._requests.values())

    def get(self, request_id: int) -> QueuedRequest:
        return self._requests[request_id]

    def add(self, request: QueuedRequest) -> None:
        """`request` joins at the end; what is cached of it is looked up."""
        self._requests[request.request_id] = request
        self.tightest.arrived(request.slo.ttft_s, request.queued_s)
        self._look_up(request, ())

    def remove(self, request: QueuedRequest) -> None:
        """`request` was admitted, or is gone."""
        del self._requests[request.request_id]
        self._lost.pop(request.request_id, None)
        self._take_out(request)

    def take_lost(self, request_ids: Iterable[int]) -> list[QueuedRequest]:
        """Those of `request_ids` of which less is cached than there was, each once.

        A store below may have what has left: worth another look for those whose turn is near.
        """
        if not self._lost:
            return []
        found = (self._lost.pop(request_id, None) for request_id in request_ids)
        return [request for request in found if request is not None]

    def changed(self, nodes: Iterable[Node]) -> list[QueuedRequest]:
        """`nodes` were added or changed tier; returns the requests of which more or less is cached.

        O(the nodes and the requests that this concerns), however many wait.
        """
        changed: dict[int, QueuedRequest] = {}
        if not self._requests:
            return []
        nodes = list(nodes)
        concerned: dict[int, _Place] = {}
        for node in nodes:
            concerned.update(self._through.get(node.node_id, ()))
        for place in concerned.values():
            self._look_again(place, changed)
        for node in nodes:
            if node.parent is not None:
                for request in list(self._lacking.get(node.page_hashes[0], {}).values()):
                    self._take_out(request)
                    if self._look_up(request, request.path):
                        changed[request.request_id] = request
        return list(changed.values())

    # -- where a prefix ends ------------------------------------------------------------------

    def _look_up(self, request: QueuedRequest, known: tuple[Node, ...]) -> bool:
        """Put `request`, which is at no place, at its own; True if more or less of it is cached.

        known: nodes, from the root on, that its prompt is known to go through.
        """
        start = known[-1] if known else request.root
        found = self._forest.peek(start, request.tokens)
        path = (*known, *found.path)
        if found.partial is not None:
            path = (*path, found.partial)
        n_usable, device, host = _provided(path)
        end = min(found.end, path[n_usable - 1].end if n_usable else 0)
        return self._put(request, path[:n_usable], end, device, host)

    def _look_again(self, place: _Place, changed: dict[int, QueuedRequest]) -> None:
        """Nodes above or at `place` changed: bring its requests up to date."""
        path = place.path
        n_usable, device, host = _provided(path)
        if n_usable == len(path):
            for request_id, request in place.requests.items():
                if self._set(request, path, place.ends[request_id], device, host):
                    changed[request_id] = request
            return
        usable, lost = path[:n_usable], path[n_usable]
        end = usable[-1].end if usable else 0
        for request_id, request in list(place.requests.items()):
            own_end = place.ends[request_id]
            self._take_out(request)
            if own_end > end:
                is_changed = self._put(request, usable, end, device, host, lost.page_hashes[0])
            else:  # its node has been split, and it ends in one of the upper parts
                own = usable[: bisect_left(usable, own_end, key=lambda node: node.end) + 1]
                is_changed = self._put(request, own, own_end, device, host)
            if is_changed:
                changed[request_id] = request

    def _put(
        self,
        request: QueuedRequest,
        path: tuple[Node, ...],
        end: int,
        device: int,
        host: int,
        next_page: bytes | None = None,
    ) -> bool:
        """`request`, which is at no place, has the cached prefix that ends on `path`, at `end`.

        next_page: the name of its page there, if that is known. True if its counts changed.
        """
        request_id = request.request_id
        node = path[-1] if path else request.root
        place = self._places.get(node.node_id)
        if place is None:
            place = self._places[node.node_id] = _Place(node)
            self._index(place, path)
        place.requests[request_id] = request
        place.ends[request_id] = end
        self._place_of[request_id] = place
        if next_page is None:
            next_page = self._name_of_page(request, node, end)
        if next_page is not None:
            self._next_page[request_id] = next_page
            self._lacking.setdefault(next_page, {})[request_id] = request
        return self._set(request, path, end, device, host)

    def _set(
        self, request: QueuedRequest, path: tuple[Node, ...], end: int, device: int, host: int
    ) -> bool:
        """Set what is cached of `request`; True if that changed.

        device, host: how far the device, and the host after it, provide the nodes of `path`.
        """
        if path and end < path[-1].end:
            n_whole = bisect_right(path, end, key=lambda node: node.end)
            request.path = path[:n_whole]
            request.inside = path[n_whole] if path[n_whole].start < end else None
        else:
            request.path, request.inside = path, None
        device, host = min(device, end), min(host, end)
        request.device_units = device
        # The last token is always computed: its logits give the first token of the answer.
        limit = request.prompt_tokens + request.output_tokens - 1
        device_tokens = min(device * self.tokens_per_unit, limit)
        host_tokens = max(0, min(host * self.tokens_per_unit, limit) - device_tokens)
        before = request.device_tokens, request.host_tokens
        request.device_tokens, request.host_tokens = device_tokens, host_tokens
        if device_tokens + host_tokens < sum(before) and request.request_id in self._requests:
            self._lost[request.request_id] = request
        return (device_tokens, host_tokens) != before

    def _name_of_page(self, request: QueuedRequest, node: Node, end: int) -> bytes | None:
        """Of the page of its prompt from `end` on; `end` is on `node`. None if there is none."""
        size = self._forest.page_size
        if end + size > len(request.tokens):
            return None
        above = node.last_page_hash
        if end < node.end:
            above = node.page_hashes[(end - node.start) // size - 1]
        return page_hash(above, request.tokens[end : end + size])

    # -- the indexes --------------------------------------------------------------------------

    def _split(self, upper: Node, lower: Node) -> None:
        """Whatever goes through `lower` goes through `upper` before."""
        places = self._through.get(lower.node_id)
        if places is None:
            return
        self._through[upper.node_id] = dict(places)
        for place in places.values():
            at = place.path.index(lower)
            place.path = (*place.path[:at], upper, *place.path[at:])

    def _index(self, place: _Place, path: tuple[Node, ...]) -> None:
        """The path down to `place` is `path` from now on."""
        node_id = place.node.node_id
        for node in place.path:
            places = self._through[node.node_id]
            del places[node_id]
            if not places:
                del self._through[node.node_id]
        place.path = path
        for node in path:
            self._through.setdefault(node.node_id, {})[node_id] = place

    def _take_out(self, request: QueuedRequest) -> None:
        """`request` is at no place."""
        request_id = request.request_id
        place = self._place_of.pop(request_id)
        del place.requests[request_id], place.ends[request_id]
        if not place.requests:
            self._index(place, ())
            del self._places[place.node.node_id]
        next_page = self._next_page.pop(request_id, None)
        if next_page is not None:
            lacking = self._lacking[next_page]
            del lacking[request_id]
            if not lacking:
                del self._lacking[next_page]


def _provided(path: tuple[Node, ...]) -> tuple[int, int, int]:
    """How many leading nodes device, then host, can provide; and how far each of them does."""
    device = host = n_nodes = 0
    for node in path:
        if host == 0 and node.records[Tier.DEVICE].state is not _ABSENT:
            device = node.end
        elif node.records[Tier.HOST].state is _RESIDENT:
            host = node.end
        else:
            break
        n_nodes += 1
    return n_nodes, device, host
