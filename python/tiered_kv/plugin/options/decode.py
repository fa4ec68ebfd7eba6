"""The option `--tiered-kv-iteration-policy`: what it may be, and what it needs."""

from __future__ import annotations

from tiered_kv.core.errors import ConfigError
from tiered_kv.plugin.options.values import UPSTREAM_POLICY
from tiered_kv.scheduler.iteration_policy import iteration_policies

OPTION = "--tiered-kv-iteration-policy"
EVERYONE = "all"
"""The policy that leaves SGLang's running batch alone."""


def check(iteration_policy: str, request_policy: str | None) -> None:
    """Raise ConfigError for a policy that is not known, or that cannot work beside the other."""
    iteration_policies.get(iteration_policy)
    if iteration_policy == EVERYONE:
        return
    if request_policy == UPSTREAM_POLICY:
        raise ConfigError(
            f"{OPTION} {iteration_policy} needs the clock of a --tiered-kv-policy, and upstream "
            f"has none; name another, or give {OPTION} {EVERYONE}."
        )
    from sglang.srt.environ import envs

    if envs.SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY.get():
        raise ConfigError(
            f"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY counts requests twice under {OPTION} "
            f"{iteration_policy}; unset it, or give {OPTION} {EVERYONE}."
        )
