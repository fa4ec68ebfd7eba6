"""Depth first by weight: upstream's `dfs-weight` (managers/schedule_policy.py).

Walks the prefix tree depth first, into the child first below which most requests wait, so that
requests that share a cached prefix run one after the other.
"""

from __future__ import annotations

from collections import defaultdict

from tiered_kv.forest.node import Node
from tiered_kv.scheduler.plan import AdmissionPlan
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.scheduler.request_policy import QuietPolicy, SchedulerState


class DepthFirstWeight(QuietPolicy):
    """A node's requests come after those of its subtrees; among equal weights, older nodes first.

    Upstream walks the whole tree; only nodes above a waiting request matter, so only those are
    visited here.
    """

    def plan(self, state: SchedulerState, limit: int) -> AdmissionPlan:
        """See `RequestPolicy.plan`."""
        requests_at: dict[Node, list[QueuedRequest]] = defaultdict(list)
        weight: dict[Node, int] = defaultdict(int)
        children: dict[Node, dict[Node, None]] = defaultdict(dict)
        roots: dict[Node, None] = {}
        for request in state.candidates():
            node = request.last_device_node
            requests_at[node].append(request)
            weight[node] += 1
            while (parent := node.parent) is not None:
                children[parent][node] = None
                weight[parent] += 1
                node = parent
            roots[node] = None
        order: list[int] = []
        # (node, True) is left for the second time: its subtrees are done.
        stack = [(root, False) for root in sorted(roots, key=lambda n: n.node_id)]
        while stack and len(order) < limit:
            node, is_done = stack.pop()
            if is_done:
                order.extend(request.request_id for request in requests_at.get(node, ()))
                continue
            stack.append((node, True))
            by_weight = sorted(children.get(node, ()), key=lambda n: (-weight[n], n.node_id))
            stack.extend((child, False) for child in reversed(by_weight))
        return AdmissionPlan(tuple(order[:limit]))
