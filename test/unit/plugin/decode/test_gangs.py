"""Which running requests begin alike."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from tiered_kv.forest.node import Node
from tiered_kv.plugin.decode.gangs import gangs_of
from tiered_kv.plugin.decode.running import RunningRequests


def child(parent: Node, node_id: int, n_tokens: int) -> Node:
    return Node(node_id, parent, array("q", range(n_tokens)), [], parent.end + n_tokens, 3)


ROOT = Node.make_root(-1, b"root", 3)


def test_those_below_a_node_are_a_gang() -> None:
    document = child(ROOT, 1, 2_000)
    asked = [child(document, 2 + at, 64) for at in range(3)]
    assert gangs_of([*asked, None, ROOT]) == [(1, 2_000)] * 3 + [None, None]


def test_the_node_that_saves_most_is_the_gangs() -> None:
    system = child(ROOT, 1, 512)
    documents = [child(system, 2, 4_096), child(system, 3, 256)]
    # Two on the long document save 4,608; three on the system prompt's short one save less there
    # (2 x 768) than all five on the system prompt (4 x 512).
    found = gangs_of([documents[0]] * 2 + [documents[1]] * 3)
    assert found == [(2, 4_608)] * 2 + [(1, 512)] * 3


def test_what_is_short_is_shared_with_nobody() -> None:
    greeting = child(ROOT, 1, 192)
    assert gangs_of([greeting, child(greeting, 2, 64), child(greeting, 3, 5_000)]) == [None] * 3


def test_one_alone_is_no_gang() -> None:
    assert gangs_of([child(ROOT, 1, 5_000), child(ROOT, 2, 5_000)]) == [None, None]


class Running:
    """As much of SGLang's request as is looked at."""

    def __init__(self, last_node: Node, n_tokens: int) -> None:
        self.last_node = last_node
        self.kv_committed_len = n_tokens
        self.kv = SimpleNamespace(kv_committed_len=n_tokens)
        self.output_ids: list[int] = [1]
        self.to_finish = None

    def finished(self) -> bool:
        return False


def test_the_policy_is_told_of_gangs_and_of_what_they_save() -> None:
    document = child(ROOT, 1, 2_048)
    saved = [0]
    running = RunningRequests(lambda: saved[0])
    together: list[Any] = [Running(document, 2_100), Running(document, 2_200)]
    running.keep_up(together, 1.0)
    assert [(r.gang, r.shared_tokens) for r in running.look(together)] == [(1, 2_048)] * 2
    running.everyone_decodes(1.0)
    saved[0] = 2_048
    running.take_tokens(1.5)
    assert running.totals.shared_tokens_saved == 2_048
    # Who comes has to be looked at, and nothing is known of what all of them save together.
    three = [*together, Running(child(ROOT, 2, 640), 700)]
    running.keep_up(three, 2.0)
    assert running.totals.shared_tokens_saved == 0
    assert [r.gang for r in running.look(three)] == [1, 1, None]
    alone = three[1:]
    running.keep_up(alone, 3.0)
    assert [(r.gang, r.shared_tokens) for r in running.look(alone)] == [(None, 0)] * 2


def test_without_cascade_gangs_are_nobodys_concern() -> None:
    document = child(ROOT, 1, 2_048)
    running = RunningRequests()
    together: list[Any] = [Running(document, 2_100), Running(document, 2_200)]
    running.keep_up(together, 1.0)
    assert [r.gang for r in running.look(together)] == [None, None]
    running.everyone_decodes(1.0)
    running.take_tokens(1.5)
    assert running.totals.shared_tokens_saved == 0
