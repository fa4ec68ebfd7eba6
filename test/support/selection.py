"""Servers on which only some of the running requests decode at a time, whatever the machine."""

from __future__ import annotations

from harness.demo_model import host_size
from harness.server import ALWAYS_LOAD, FLOAT32

#: No decode on a CPU is as short: at most a few requests decode at a time.
TIGHT_TBT_MS = 20


def selection_args(policy: str, n_tokens: int, *more: object) -> list[object]:
    """Flags of a server with this iteration policy and room for `n_tokens` on the device."""
    return [
        *FLOAT32, "--chunked-prefill-size", 512, "--max-total-tokens", n_tokens,
        "--tiered-kv", *ALWAYS_LOAD, "--tiered-kv-host-size", host_size(8192),
        "--tiered-kv-disk-dir", "none", "--tiered-kv-iteration-policy", policy,
        "--tiered-kv-debug-integrity", "--decode-log-interval", 1, *more,
    ]  # fmt: skip
