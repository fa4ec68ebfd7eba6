"""The option `--tiered-kv-cascade`: what it may be, and when it can be had.

`auto`, the default, is `on` where it was measured, which is on a CPU, and `off` elsewhere. In
either case a batch is read in groups only if that is predicted to pay (`attention/payoff.py`).
"""

from __future__ import annotations

from typing import Any

from tiered_kv.core.errors import ConfigError
from tiered_kv.plugin.options import combinations, dp_attention, refusals
from tiered_kv.plugin.upstream.current import arguments, hardware

MODES = ("auto", "on", "off")
OPTION = "--tiered-kv-cascade"

#: The attention backends that know how, by device. Ours go by the names of those they extend.
BACKENDS = hardware.CASCADE_BACKENDS


def cascade_mode(value: str | bool | None) -> str:
    """One of MODES; YAML turns an unquoted on or off into a boolean. Raises ConfigError."""
    if isinstance(value, bool):
        return "on" if value else "off"
    mode = "auto" if value is None else str(value).strip().lower()
    if mode not in MODES:
        raise ConfigError(f"{OPTION} must be one of {', '.join(MODES)}, not {value!r}.")
    return mode


def why_not(server_args: Any) -> str | None:
    """What keeps resolved arguments from having cascade attention, as the subject of a refusal."""
    outcome = arguments.resolved(server_args)
    backend = BACKENDS.get(outcome.device)
    found = sorted(set(arguments.attention_backends(server_args)))
    if found != [backend]:
        wanted = backend or " or ".join(BACKENDS.values())
        return f"the attention backend {' and '.join(map(str, found))}, only with {wanted}"
    if outcome.enable_deterministic_inference:
        # Results depend, in their last bits, on who shares a batch.
        return "--enable-deterministic-inference"
    if outcome.speculative_algorithm is not None:
        return "--speculative-algorithm, whose passes verify drafts"
    if dp_attention.is_on(outcome):
        # Batches are filled up to the length of other ranks'.
        return "DP attention"
    if outcome.pp_size > 1:
        return "--pp-size above 1"
    if combinations.has_recurrent_state(outcome):
        return "a model with recurrent state (Mamba, linear attention)"
    if outcome.enable_torch_compile:
        # Groups change from batch to batch.
        return "--enable-torch-compile"
    return None


def check_resolved(server_args: Any) -> None:
    """Raise ConfigError if cascade attention was asked for and cannot be had."""
    if server_args.tiered_kv_cascade != "on" or not refusals.names_a_model(server_args):
        return
    reason = why_not(server_args)
    if reason is not None:
        raise ConfigError(f"{OPTION} on does not go with {reason}; change it or drop {OPTION}.")


def is_wanted(server_args: Any) -> bool:
    """Whether this server is to use cascade attention, if the model allows it."""
    if not getattr(server_args, "tiered_kv", False):
        return False
    mode = server_args.tiered_kv_cascade
    if mode == "off" or (mode == "auto" and arguments.resolved(server_args).device != "cpu"):
        return False
    return why_not(server_args) is None
