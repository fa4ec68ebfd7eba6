"""What does not go together with `--tiered-kv` and something else, said in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tiered_kv.core.errors import ConfigError
from tiered_kv.plugin.options import decode

Rule = tuple[str, Callable[[Any], bool]]
"""Of resolved arguments: (what is not supported, whether it is there)."""
Rules = tuple[Rule, ...]


def has_recurrent_state(outcome: Any) -> bool:
    """Whether the model has any, of resolved arguments."""
    return bool(getattr(outcome, "uses_mamba_radix_cache", False))


def keeps_fewer_bytes(outcome: Any) -> bool:
    """Whether KV is kept with losses on host or disk, of resolved arguments."""
    return outcome.tiered_kv_host_format != "raw" or outcome.tiered_kv_disk_format not in (
        "same",
        "raw",
    )


SOME_DECODE: Rule = (
    decode.OPTION,
    lambda a: a.tiered_kv_iteration_policy != decode.EVERYONE,
)
RECURRENT_STATE: Rule = (
    "models with recurrent state (Mamba, linear attention)",
    has_recurrent_state,
)


def check(beside: str, rules: Rules, server_args: Any) -> None:
    """Raise ConfigError for the first of `rules` that applies. beside: what it is too much for."""
    for option, applies in rules:
        if applies(server_args):
            raise ConfigError(
                f"--tiered-kv does not support, {beside}, {option}; drop one of both."
            )


def check_sees_nothing(ctx: Any, beside: str) -> None:
    """Raise ConfigError for a multimodal model. beside: what was not tried with such.

    `ctx` is SGLang's `TreeCacheBuildContext`.
    """
    if ctx.model_config.is_multimodal:
        raise ConfigError(
            f"--tiered-kv does not support {beside} with multimodal models; drop one of both."
        )
