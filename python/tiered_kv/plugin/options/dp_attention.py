"""DP attention: what does not go with it and `--tiered-kv`.

Ranks have requests, and KV, of their own, and run each pass together: what becomes of a pass must
be what SGLang has told the other ranks of it.
"""

from __future__ import annotations

from typing import Any

from tiered_kv.plugin.options import combinations
from tiered_kv.plugin.upstream.current import arguments

RULES: combinations.Rules = (
    combinations.SOME_DECODE,
    ("--enable-mixed-chunk", lambda a: a.enable_mixed_chunk),
    ("--speculative-algorithm", lambda a: a.speculative_algorithm is not None),
    ("--enable-lora", lambda a: bool(a.enable_lora)),
    ("--nnodes above 1", lambda a: a.nnodes > 1),
    combinations.RECURRENT_STATE,
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
    if is_on(arguments.resolved(ctx.server_args)):
        combinations.check_sees_nothing(ctx, "DP attention")
