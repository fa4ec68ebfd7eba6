"""The part of `hooks.HOOKS` for models that draft what another verifies."""

from __future__ import annotations

from tiered_kv.plugin.hooks.hook import Hook, Process

DRAFT_HOOKS = (
    Hook(
        target="sglang.srt.speculative.base_spec_worker.BaseSpecWorker.alloc_memory_pool",
        kind="after",
        function="tiered_kv.plugin.cache.drafts:note",
        process=Process.SCHEDULER,
        why="a draft's KV would be left behind by that of the model",
    ),
    Hook(
        target="sglang.srt.mem_cache.kv_cache_builder.maybe_register_hicache_draft",
        kind="around",
        function="tiered_kv.plugin.cache.drafts:register",
        process=Process.SCHEDULER,
        why="SGLang would look for the draft's place in a host pool that is not there",
    ),
)
