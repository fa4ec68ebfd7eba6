"""Pools of a server that speculates, on a CPU: made, and KV moved in them, without a kernel."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from support_plugin import on_release
from tiered_kv.plugin.upstream import cpu_speculation, release


def test_kv_of_accepted_drafts_moves_in_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_NATIVE_MOVE_KV_CACHE", raising=False)
    cpu_speculation.register()
    SpeculativeAlgorithm.from_string("NGRAM").create_worker(
        SimpleNamespace(disable_overlap_schedule=True)
    )
    # What SGLang gives to the pool: a platform's own pool on 0.5.17 does without.
    moves = {} if on_release.IS_0_5_17 else {"enable_kv_cache_copy": True}
    pool = MHATokenToKVPool(8, 1, torch.float32, 1, 2, 3, "cpu", enable_memory_saver=False, **moves)
    keys, values = pool.get_kv_buffer(2)
    keys[5], values[5] = 5.0, -5.0
    pool.move_kv_cache(torch.tensor([2]), torch.tensor([5]))
    assert (keys[2] == 5.0).all()
    assert (values[2] == -5.0).all()
    release.verify()
