"""The server as it starts: what `--server-defaults` stands for.

What is this project's own comes from where the server has it; what is SGLang's is said here.
"""

from __future__ import annotations

from typing import Any

from tiered_kv.core.config import DISK_BYTES_DEFAULT, TieredKVConfig
from tiered_kv.core.device_spec import DeviceSpec
from tiered_kv.scheduler.request_policy import REQUEST_POLICY_DEFAULT

MAX_RUNNING = 2048
"""SGLang's least for --max-running-requests, if it is not given (kv_cache pool configurator)."""

_MIB = 1 << 20
_CHUNKS = ((35 * 1024, 2048), (60 * 1024, 4096), (160 * 1024, 8192))
"""SGLang's --chunked-prefill-size for devices below so many MiB (server_args.py)."""
_LARGEST_CHUNK = 16384


def server_defaults() -> dict[str, Any]:
    """By the names of the command line's options; None for what depends on the device."""
    config = TieredKVConfig()
    return {
        "policy": REQUEST_POLICY_DEFAULT,
        "iteration_policy": "all",
        "eviction": config.eviction_policy,
        "load_policy": config.load_policy,
        "stop_policy": "patience",
        "host": None,
        "disk": DISK_BYTES_DEFAULT,
        "chunk": None,
        "max_running": MAX_RUNNING,
        "cascade": None,
        "learn": True,
        "learn_pauses": True,
    }


def default_host_bytes(device_pool_bytes: float) -> int:
    """The host tier's, of all ranks together."""
    return int(TieredKVConfig().host.ratio * device_pool_bytes)


def default_chunk_tokens(device: DeviceSpec) -> int:
    """By the memory of one device of the group."""
    mib = device.memory_bytes / device.n_devices / _MIB
    return next((tokens for below, tokens in _CHUNKS if mib < below), _LARGEST_CHUNK)


def default_cascade(device: DeviceSpec) -> bool:
    """On only where attention runs on a CPU."""
    return device.name.startswith("CPU")
