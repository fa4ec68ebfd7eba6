"""Models some of whose layers have recurrent state (Mamba, linear attention, short convolutions).

SGLang keeps their states in a pool of its own, and checkpoints of them in its tree. Here those lie
on the host and on the disk (docs/adr/0028-recurrent-state.md), which has been tried for the plain
case only: all else is refused.
"""

from __future__ import annotations

import logging
from typing import Any

from tiered_kv.core.errors import ConfigError
from tiered_kv.plugin.options import combinations
from tiered_kv.plugin.upstream.current import arguments

logger = logging.getLogger(__name__)

AUTO = "auto"
STRATEGY = "no_buffer"
"""Of SGLang's ways to take states for its tree the one that leaves them where the last pass did."""

RULES: combinations.Rules = (
    ("--enable-mixed-chunk", lambda a: a.enable_mixed_chunk),
    ("--chunked-prefill-size -1", lambda a: a.chunked_prefill_size <= 0),
    # It cuts prompts at places of its own.
    ("--enable-deterministic-inference", lambda a: a.enable_deterministic_inference),
    ("--enable-linear-replayssm", lambda a: a.enable_linear_replayssm),
    ("--enable-int8-mamba-checkpoint", lambda a: a.enable_int8_mamba_checkpoint),
    (
        "--mamba-radix-cache-strategy other than no_buffer",
        lambda a: a.mamba_radix_cache_strategy != STRATEGY,
    ),
    ("--tiered-kv-store", lambda a: a.tiered_kv_store is not None),
    (
        "--tiered-kv-host-format and --tiered-kv-disk-format",
        combinations.keeps_fewer_bytes,
    ),
    combinations.SOME_DECODE,
)


def choose_strategy(server_args: Any) -> None:
    """Before SGLang resolves: how states are taken; means nothing to models without them."""
    if server_args.mamba_radix_cache_strategy == AUTO:
        server_args.mamba_radix_cache_strategy = STRATEGY


def check_resolved(server_args: Any) -> None:
    """Raise ConfigError for what does not go with recurrent state; of arguments as resolved."""
    if not server_args.uses_mamba_radix_cache:
        return
    combinations.check(
        "for models with recurrent state (Mamba, linear attention)", RULES, server_args
    )
    logger.info(
        "Tiered KV: this model has recurrent state: scheduling does not overlap with passes "
        "(--disable-overlap-schedule), and there is no cascade attention."
    )


def check_model(ctx: Any) -> None:
    """Raise ConfigError for pools that keep states as nobody here knows.

    `ctx` is SGLang's `TreeCacheBuildContext`.
    """
    if not ctx.is_hybrid_ssm:
        return
    outcome = arguments.resolved(ctx.server_args)
    if not outcome.uses_mamba_radix_cache or not outcome.disable_overlap_schedule:
        raise ConfigError(
            "--tiered-kv does not support this model with recurrent state, which SGLang itself "
            "has no prefix cache for; start without --tiered-kv."
        )
    from sglang.srt.mem_cache.memory_pool import (
        HybridLinearKVPool,
        HybridReqToTokenPool,
        MambaPool,
    )

    if ctx.model_config.is_multimodal:
        raise ConfigError(
            "--tiered-kv does not support models with recurrent state that take images; start "
            "without --tiered-kv."
        )
    req_to_token_pool = ctx.params.req_to_token_pool
    pools = (
        (req_to_token_pool, HybridReqToTokenPool),
        (getattr(req_to_token_pool, "mamba_pool", None), MambaPool),
        (ctx.params.token_to_kv_pool_allocator.get_kvcache(), HybridLinearKVPool),
    )
    beside = (getattr(req_to_token_pool, name, None) for name in ("short_conv_pool", "ngram_pool"))
    if any(pool is not None and pool.enabled for pool in beside):
        raise ConfigError(
            "--tiered-kv does not support this model, which keeps more of a prompt than its "
            "recurrent state; start without --tiered-kv."
        )
    for pool, known in pools:
        if type(pool) is not known:
            raise ConfigError(
                f"--tiered-kv does not know the pool {type(pool).__name__} of this model's "
                "recurrent state; start without --tiered-kv."
            )
