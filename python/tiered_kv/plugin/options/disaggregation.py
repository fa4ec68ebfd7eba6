"""What servers that only prefill, or only decode, do not support together with `--tiered-kv`."""

from __future__ import annotations

from typing import Any

from tiered_kv.core.errors import ConfigError
from tiered_kv.plugin.options.decode import EVERYONE, OPTION

PREFILL, DECODE = "prefill", "decode"


def check(server_args: Any) -> None:
    """Raise ConfigError for arguments that such a server cannot have."""
    mode = server_args.disaggregation_mode
    if mode == "null":
        return
    given = f"--disaggregation-mode {mode} and --tiered-kv"
    if mode == DECODE:
        raise ConfigError(
            "--tiered-kv keeps KV on prefill servers, not with --disaggregation-mode decode; start "
            "the servers that decode without --tiered-kv."
        )
    if server_args.dp_size > 1:
        raise ConfigError(f"--dp-size above 1 was not tried with {given}; start several servers.")
    if server_args.optimistic_prefill_attempts > 0:
        raise ConfigError(
            f"{given} compute no prompt before a decode server has room for it; drop "
            "--optimistic-prefill-attempts."
        )
    if server_args.tiered_kv_iteration_policy not in (None, EVERYONE):
        raise ConfigError(f"nobody decodes with {given}; drop {OPTION}.")
    _check_environment(given)


def _check_environment(given: str) -> None:
    from sglang.srt.environ import envs

    if envs.SGLANG_DISAGG_STAGING_BUFFER.get():
        raise ConfigError(
            "SGLANG_DISAGG_STAGING_BUFFER wants chunks of prompts that are all of one length, and "
            f"with {given} they are not; unset it."
        )
