"""Disk -> host for calls that were announced: when they come, what they go on from is near.

Between two calls of an agent its context may leave device and host. The tree forgets it then, and
only its tokens find it on disk; so they are kept here until the call comes, or is not expected any
more (Continuum, arXiv 2511.02230, and KVFlow, arXiv 2507.07400, bring contexts back in time, too).
"""

from __future__ import annotations

from array import array
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tiered_kv.forest.key import TreeKey
from tiered_kv.forest.node import Node
from tiered_kv.memory.stored_pages import prompt_of

if TYPE_CHECKING:
    from tiered_kv.tiers.hierarchy import KVHierarchy

#: Tokens that are kept, of all prompts together (8 bytes each); the oldest prompts go first.
TOKENS_MAX = 1 << 22


@dataclass(slots=True)
class _Prompt:
    tree_key: TreeKey | None
    tokens: array[int]
    ticket: str | None = None
    """Of the fetch that was started."""
    is_fetched: bool = False


class AnnouncedPrompts:
    """Prompts by the node at which they ended when the call was announced."""

    def __init__(self, hierarchy: KVHierarchy) -> None:
        self._hierarchy = hierarchy
        self._prompts: dict[int, _Prompt] = {}
        self._n_tokens = 0

    def __len__(self) -> int:
        return len(self._prompts)

    def remember(self, last: Node, tree_key: TreeKey | None) -> None:
        """A call goes on from `last`, in the tree of `tree_key`."""
        self.forget([last.node_id])
        _, tokens = prompt_of(last, array("q"))
        self._prompts[last.node_id] = _Prompt(tree_key, tokens)
        self._n_tokens += len(tokens)
        while self._n_tokens > TOKENS_MAX:
            self.forget([next(iter(self._prompts))])

    def forget(self, node_ids: Iterable[int]) -> None:
        """Nobody waits for the calls after these nodes any more."""
        for node_id in node_ids:
            prompt = self._prompts.pop(node_id, None)
            if prompt is not None:
                self._n_tokens -= len(prompt.tokens)
                self._release(prompt)

    def forget_others(self, expected: Container[int]) -> None:
        """Forgets all that go on from other nodes."""
        self.forget([node_id for node_id in self._prompts if node_id not in expected])

    def fetch(self, node_id: int) -> int:
        """Has the disk's part of the prompt read, once; to be called again until it has come.

        Returns the node at which the prompt ends now: what comes from disk comes in new ones. On
        several ranks all must call it at the same points of their loops.
        """
        prompt = self._prompts.get(node_id)
        if prompt is None or prompt.is_fetched:
            return node_id
        prefetch = self._hierarchy.prefetch
        if prompt.ticket is None:
            last = self._end_of(prompt)
            prompt.ticket = f"announced call after node {node_id}"
            prefetch.request(prompt.ticket, last, prompt.tokens[last.end :], is_ahead=True)
        if not prefetch.is_settled(prompt.ticket):
            return node_id
        self._release(prompt)
        prompt.is_fetched = True
        last = self._end_of(prompt)
        if last.is_root or last.node_id == node_id:
            return node_id
        self._prompts[last.node_id] = self._prompts.pop(node_id)
        return last.node_id

    def _end_of(self, prompt: _Prompt) -> Node:
        """How far the prompt goes that device and host have now."""
        root = self._hierarchy.root(prompt.tree_key)
        return self._hierarchy.peek(root, prompt.tokens)

    def _release(self, prompt: _Prompt) -> None:
        """What it has read is ordinary cache from now on; what it has not, nobody needs."""
        if prompt.ticket is not None:
            self._hierarchy.prefetch.release(prompt.ticket)
