"""Steps to execution, after KVFlow (NeurIPS 2025): a workflow says when its next call will come.

Each session's hint (`Request.next_use_hint_s`) stamps the nodes of its prefix; a node is expected
when the first of its sessions is. Pages that no call has finished with yet are needed now; without
hints all others are equal, which leaves least recently used.
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
        self.touched: list[int] = []
        self._last: dict[int, Node | None] = {}
        self._expected_s: WeakKeyDictionary[Node, dict[int, float]] = WeakKeyDictionary()

    def next_use_s(self, node: Node) -> float:
        """See `Foresight.next_use_s`."""
        expected = self._expected_s.get(node)
        if expected is None:
            return -math.inf
        return min(expected.values(), default=math.inf)

    def on_split(self, upper: Node, lower: Node) -> None:
        """The part that stays is expected when the whole was."""
        if upper not in self._expected_s and lower in self._expected_s:
            self._expected_s[upper] = dict(self._expected_s[lower])
            self.touched.append(upper.node_id)

    def on_arrival(self, live: LiveRequest, now_s: float) -> None:
        """Nothing to do: a use is made at its admission."""

    def on_admission(self, live: LiveRequest) -> None:
        """Nothing to do: the finish brings the next hint."""

    def on_finish(self, live: LiveRequest, forest: Forest, now_s: float) -> None:  # noqa: ARG002
        """The session's next call is expected, or its last one was this."""
        session, hint_s = live.request.session, live.request.next_use_hint_s
        path = _path_to(live.pinned)
        for node in path:
            self._expected_s.setdefault(node, {})
        if session is not None:
            # Where the session went on from before this call, pages may be left that it dropped.
            for node in _path_to(self._last.pop(session, None)):
                expected = self._expected_s.get(node, {})
                if session in expected:
                    del expected[session]
                    self.touched.append(node.node_id)
            if hint_s is not None:
                for node in path:
                    self._expected_s[node][session] = now_s + hint_s
                self._last[session] = live.pinned
        self.touched.extend(node.node_id for node in path)


def _path_to(node: Node | None) -> list[Node]:
    path = []
    while node is not None and not node.is_root:
        path.append(node)
        node = node.parent
    return path
