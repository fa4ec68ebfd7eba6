"""DP attention: what does not go with it and `--tiered-kv`.

Ranks have requests, and KV, of their own, and run each pass together: what becomes of a pass must
be what SGLang has told the other ranks of it.
"""

from __future__ import annotations

from typing import Any

from tiered_kv.core.errors import ConfigError
from tiered_kv.plugin.options import combinations, decode
from tiered_kv.plugin.upstream.current import arguments

RULES: combinations.Rules = (
    (decode.OPTION, lambda a: a.tiered_kv_iteration_policy != decode.EVERYONE),
    ("--enable-mixed-chunk", lambda a: a.enable_mixed_chunk),
    ("--speculative-algorithm", lambda a: a.speculative_algorithm is not None),
    ("--enable-lora", lambda a: bool(a.enable_lora)),
    ("--nnodes above 1", lambda a: a.nnodes > 1),
    (
        "models with recurrent state (Mamba, linear attention)",
        lambda a: getattr(a, "uses_mamba_radix_cache", False),
    ),
)


def is_on(outcome: Any) -> bool:
    """Of resolved arguments."""
    return arguments.attention_groups(outcome) > 1


def check_resolved(outcome: Any) -> None:
    """Raise ConfigError for what does not go with it."""
    if is_on(outcome):
        combinations.check("with DP attention", RULES, outcome)


def check_model(ctx: Any) -> None:
    """Raise ConfigError for a model that was not tried with it.

    `ctx` is SGLang's `TreeCacheBuildContext`.
    """
    if ctx.model_config.is_multimodal and is_on(arguments.resolved(ctx.server_args)):
        raise ConfigError(
            "--tiered-kv does not support DP attention with multimodal models; drop one of both."
        )
