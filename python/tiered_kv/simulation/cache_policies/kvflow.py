"""Steps to execution, after KVFlow (NeurIPS 2025): a workflow says when its next call will come.

Each session's hint (`Request.next_use_hint_s`) stamps the nodes of its prefix; a node is expected
when the first of its sessions is. Without hints all are equal, which leaves least recently used.
"""

from __future__ import annotations

import math
from weakref import WeakKeyDictionary

from tiered_kv.forest.forest import Forest
from tiered_kv.forest.node import Node
from tiered_kv.simulation.live import LiveRequest


class WorkflowKnowledge:
    """When each session's prefix is expected again."""

    def __init__(self) -> None:
        self._expected_s: WeakKeyDictionary[Node, dict[int, float]] = WeakKeyDictionary()

    def next_use_s(self, node: Node) -> float:
        """See `Foresight.next_use_s`."""
        expected = self._expected_s.get(node)
        return min(expected.values()) if expected else math.inf

    def on_admission(self, live: LiveRequest) -> None:
        """Nothing to do: the finish brings the next hint."""

    def on_finish(self, live: LiveRequest, forest: Forest, now_s: float) -> None:  # noqa: ARG002
        """The session's next call is expected, or its last one was this."""
        session, hint_s = live.request.session, live.request.next_use_hint_s
        if session is None:
            return
        node = live.pinned
        while node is not None and not node.is_root:
            if hint_s is not None:
                self._expected_s.setdefault(node, {})[session] = now_s + hint_s
            elif node in self._expected_s:
                self._expected_s[node].pop(session, None)
            node = node.parent
