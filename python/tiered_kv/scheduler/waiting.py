"""The queue of waiting requests, with what is cached of each kept up to date incrementally.

Matching every waiting request against the tree in every step is what makes upstream give up cache-
aware orders above 128 requests (managers/schedule_policy.py). Here a request is matched when it
arrives, and again only when something changed on its known prefix or just below that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import Residency
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.scheduler.tightest import TightestObjective

_ABSENT = Residency.ABSENT
_ON_HOST = frozenset({Residency.RESIDENT, Residency.LOADING})


class WaitingQueue:
    """Requests by id in the order in which they joined, and by the nodes of their prefixes."""

    def __init__(self, forest: Forest, *, tokens_per_unit: int = 1) -> None:
        """`tokens_per_unit`: prompt tokens that one token of the forest stands for.

        1 on a server. A simulation over traces of block ids stores a block as one token.
        """
        self.tokens_per_unit = tokens_per_unit
        self.tightest = TightestObjective()
        """Of those who joined of late."""
        self._forest = forest
        self._requests: dict[int, QueuedRequest] = {}
        # By node id: a node that left the forest must not be kept alive.
        self._through: dict[int, dict[int, QueuedRequest]] = {}
        self._ending_at: dict[int, dict[int, QueuedRequest]] = {}

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
        """`request` joins at the end; its cached tokens are looked up."""
        self._requests[request.request_id] = request
        self.tightest.arrived(request.slo.ttft_s, request.queued_s)
        self._look_up(request)

    def remove(self, request: QueuedRequest) -> None:
        """`request` was admitted, or is gone."""
        del self._requests[request.request_id]
        self._forget_place(request)

    def changed(self, nodes: Iterable[Node]) -> list[QueuedRequest]:
        """`nodes` were added or changed tier; returns the requests this concerns, looked up again.

        A request is concerned by the nodes of its path, in the forest or not any more, and by a
        node that continues it. O(those requests), however many wait.

        If a node of its path was split since, the part above is not known to be on it; but a tier
        gives up the part below first, so nothing counts as cached that is not.
        """
        concerned: dict[int, QueuedRequest] = {}
        if not self._requests:
            return []
        for node in nodes:
            concerned.update(self._through.get(node.node_id, ()))
            parent = node.parent
            if parent is not None:
                for request in self._ending_at.get(parent.node_id, {}).values():
                    if _continues(request, node):
                        concerned[request.request_id] = request
        requests = list(concerned.values())
        for request in requests:
            self._forget_place(request)
            self._look_up(request)
        return requests

    def _look_up(self, request: QueuedRequest) -> None:
        match = self._forest.match(request.root, request.tokens)
        self.place(request, match.path)
        through, request_id = self._through, request.request_id
        for node in request.path:
            through.setdefault(node.node_id, {})[request_id] = request
        last = request.path[-1] if request.path else request.root
        self._ending_at.setdefault(last.node_id, {})[request_id] = request

    def place(self, request: QueuedRequest, path: tuple[Node, ...]) -> None:
        """Set what is cached of `request` from the nodes that its prompt matched, top down.

        Its path ends with the last of them that the device or the host can provide: a node that
        neither holds may leave the forest unannounced.
        """
        device = host = n_nodes = 0
        for node in path:
            if host == 0 and node.records[Tier.DEVICE].state is not _ABSENT:
                device = node.end
            elif node.records[Tier.HOST].state in _ON_HOST:
                host = node.end
            else:
                break
            n_nodes += 1
        request.path = path[:n_nodes]
        request.device_units = device
        # The last token is always computed: its logits give the first token of the answer.
        limit = request.prompt_tokens + request.output_tokens - 1
        request.device_tokens = min(device * self.tokens_per_unit, limit)
        request.host_tokens = (
            min(host * self.tokens_per_unit, limit) - request.device_tokens if host else 0
        )

    def _forget_place(self, request: QueuedRequest) -> None:
        for node in request.path:
            _take_out(self._through, node, request)
        _take_out(self._ending_at, request.path[-1] if request.path else request.root, request)


def _take_out(
    index: dict[int, dict[int, QueuedRequest]], node: Node, request: QueuedRequest
) -> None:
    requests = index[node.node_id]
    del requests[request.request_id]
    if not requests:
        del index[node.node_id]


def _continues(request: QueuedRequest, node: Node) -> bool:
    """Whether `node` starts with what `request` has next after the node above it."""
    start = node.end - len(node.tokens)
    return start < len(request.tokens) and request.tokens[start] == node.tokens[0]
