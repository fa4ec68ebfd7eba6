"""Pipeline parallelism: what does not go with it and `--tiered-kv`.

Stages have other layers of the same requests and are passes apart, so that nothing may be decided
that is not decided alike from what all of them have agreed on passes before. That was tried for the
plain case only; all else is refused.
"""

from __future__ import annotations

import logging
from typing import Any

from tiered_kv.core.errors import ConfigError
from tiered_kv.plugin.options import combinations
from tiered_kv.plugin.options import values as option_values
from tiered_kv.plugin.upstream.current import arguments

logger = logging.getLogger(__name__)

RULES: combinations.Rules = (
    combinations.SOME_DECODE,
    combinations.RECURRENT_STATE,
    ("--dp-size above 1", lambda a: a.dp_size > 1),
    ("--enable-dp-attention", lambda a: bool(a.enable_dp_attention)),
    ("--speculative-algorithm", lambda a: a.speculative_algorithm is not None),
    ("--disaggregation-mode", lambda a: a.disaggregation_mode != "null"),
    ("--enable-mixed-chunk", lambda a: a.enable_mixed_chunk),
    ("--enable-dynamic-chunking", lambda a: a.enable_dynamic_chunking),
    ("--pp-async-batch-depth above 0", lambda a: a.pp_async_batch_depth > 0),
    ("--enable-lora", lambda a: bool(a.enable_lora)),
    ("--enable-memory-saver", lambda a: a.enable_memory_saver),
    ("--kv-events-config", lambda a: a.kv_events_config is not None),
    ("--tiered-kv-store", lambda a: a.tiered_kv_store is not None),
    (
        "--tiered-kv-host-format and --tiered-kv-disk-format in fewer bytes",
        combinations.keeps_fewer_bytes,
    ),
    ("--tiered-kv-cascade on", lambda a: a.tiered_kv_cascade == "on"),
)


def choose_policy(server_args: Any) -> None:
    """Before SGLang resolves: SGLang's own order, unless another was named, which is refused.

    Raises ConfigError.
    """
    if server_args.pp_size == 1:
        return
    if not arguments.RAN_PIPELINES:
        raise ConfigError(
            "--tiered-kv does not support --pp-size above 1 on this release of SGLang, where it "
            "was not run; use the other release (docs/releases.md), or drop one of both."
        )
    if server_args.tiered_kv_policy not in (None, option_values.UPSTREAM_POLICY):
        raise ConfigError(
            "--tiered-kv does not support, with --pp-size above 1, --tiered-kv-policy "
            f"{server_args.tiered_kv_policy}; drop one of both."
        )
    server_args.tiered_kv_policy = option_values.UPSTREAM_POLICY


def check_resolved(outcome: Any) -> None:
    """Raise ConfigError for what does not go with it; of arguments as resolved."""
    if outcome.pp_size == 1:
        return
    combinations.check("with --pp-size above 1", RULES, outcome)
    logger.info(
        "Tiered KV: stages of a pipeline keep SGLang's order of the waiting queue, load all that "
        "they find, and agree on a transfer some passes after it."
    )


def check_model(ctx: Any) -> None:
    """Raise ConfigError for a model that was not tried with it.

    `ctx` is SGLang's `TreeCacheBuildContext`.
    """
    if ctx.params.pp_size > 1:
        combinations.check_sees_nothing(ctx, "--pp-size above 1")
