"""What sessions that callers name have had is remembered, in the tree that it is in."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("sglang")

from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH

from support_plugin.mini_scheduler import MiniScheduler, request
from support_tiers.tier_rig import Rig, tokens_of
from tiered_kv.api.hints import Hints
from tiered_kv.api.terms import Terms
from tiered_kv.forest.inputs import PromptKey
from tiered_kv.forest.key import TreeKey

PROMPT = tokens_of(1, 2, 3)
TREE = TreeKey(salt=b"s" * 32)


def ended(scheduler: MiniScheduler, rig: Rig, session: str | None, key: Any, reason: Any) -> None:
    tree = key.tree if isinstance(key, PromptKey) else key
    rig.serve(PROMPT, tree)
    req = request("a", PROMPT)
    req.tiered_kv_terms = Terms(hints=Hints(session_id=session), tenant="blue")
    req.extra_key, req.finished_reason = key, reason
    last = rig.hierarchy.match(rig.hierarchy.root(tree), PROMPT).last
    scheduler.tiered_kv_order.released(req, last)


@pytest.mark.parametrize("key", [None, TREE, PromptKey(TREE, ())], ids=["none", "salt", "images"])
def test_a_call_that_has_ended(scheduler: MiniScheduler, rig: Rig, key: Any) -> None:
    ended(scheduler, rig, "s", key, FINISH_LENGTH(1))
    (prompt,) = scheduler.tiered_kv_order.sessions.find("s", "blue")
    assert prompt.tokens == PROMPT
    assert prompt.tree_key == (None if key is None else TREE)


def test_those_without_a_name_or_an_answer(scheduler: MiniScheduler, rig: Rig) -> None:
    ended(scheduler, rig, None, None, FINISH_LENGTH(1))
    ended(scheduler, rig, "s", None, FINISH_ABORT())
    assert len(scheduler.tiered_kv_order.sessions) == 0
