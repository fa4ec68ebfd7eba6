"""The radix-cache factory, as SGLang's registry calls it in each scheduler process."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache
    from sglang.srt.mem_cache.registry import TreeCacheBuildContext


def create_tree_cache(ctx: TreeCacheBuildContext) -> BasePrefixCache:
    """The radix-cache factory, registered as "tiered_kv".

    Raises UpstreamError if a hook is missing or SGLang is not the release we know, and ConfigError
    for models that are not supported: this is the last point at which a start can be refused.
    """
    from tiered_kv.plugin.cache.build import build_tree_cache
    from tiered_kv.plugin.hooks import table as hooks
    from tiered_kv.plugin.hooks.hook import Process
    from tiered_kv.plugin.options import dp_attention, pipeline, recurrent, refusals, speculation
    from tiered_kv.plugin.upstream import release as upstream

    upstream.verify()
    hooks.verify_installed(Process.SCHEDULER)
    refusals.check_model(ctx)
    recurrent.check_model(ctx)
    speculation.check_model(ctx)
    dp_attention.check_model(ctx)
    pipeline.check_model(ctx)
    return build_tree_cache(ctx)
