"""The servers that multiturn.py compares: the same model and flags, and what each adds to them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.server import Server
from tiered_kv.core.model_spec import ModelSpec

HERE = Path(__file__).parent
PREFETCH_POLICIES = ("best_effort", "timeout", "wait_complete")


@dataclass(frozen=True)
class Sizes:
    """Room for KV, in tokens, and what a token's KV takes, in bytes."""

    page: int
    device: int
    host: int
    limit: int
    token_bytes: int


@dataclass(frozen=True)
class System:
    """One way to serve. flags: of the server, given the sizes and a scratch directory for disk."""

    name: str
    what: str
    flags: Callable[[Sizes, Path], Sequence[object]]
    is_hicache: bool = False
    is_usual: bool = True
    """Whether a comparison has it unless it is told otherwise."""

    def server(
        self, model: Path, common: Sequence[object], sizes: Sizes, scratch: Path, log: Path
    ) -> Server:
        disk = scratch / "disk"
        disk.mkdir()
        extra: dict[str, Any] = {}
        if self.is_hicache:
            extra["launcher"] = (str(HERE / "hicache_on_cpu.py"),)
            extra["env"] = {"SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": str(disk)}
        flags = [*common, *self.flags(sizes, disk)]
        return Server([str(flag) for flag in flags], log, model, **extra)


def _device(tokens: int) -> list[object]:
    return ["--max-total-tokens", tokens]


def _plain(sizes: Sizes, _disk: Path) -> list[object]:
    return _device(sizes.device)


def _limit(sizes: Sizes, _disk: Path) -> list[object]:
    return _device(sizes.limit)


def _hicache(sizes: Sizes, _disk: Path) -> list[object]:
    ratio = sizes.host / sizes.device
    written = ["--hicache-write-policy", "write_through"]
    hicache = ["--enable-hierarchical-cache", "--hicache-ratio", ratio, *written]
    return [*_device(sizes.device), *hicache]


def _hicache_file(policy: str) -> Callable[[Sizes, Path], list[object]]:
    def flags(sizes: Sizes, disk: Path) -> list[object]:
        storage = ["--hicache-storage-backend", "file", "--hicache-storage-prefetch-policy", policy]
        return [*_hicache(sizes, disk), *storage]

    return flags


def _tiered(sizes: Sizes, disk: Path) -> list[object]:
    host = f"{sizes.host * sizes.token_bytes}B"
    tiers = ["--tiered-kv", "--tiered-kv-host-size", host, "--tiered-kv-disk-dir", disk]
    return [*_device(sizes.device), *tiers, "--tiered-kv-disk-size", "64GB"]


def _tiered_limit(sizes: Sizes, disk: Path) -> list[object]:
    return _tiered(replace(sizes, device=sizes.limit), disk)


SYSTEMS = {
    system.name: system
    for system in (
        System("limit", "plain SGLang, everything fits on the device", _limit),
        System("plain", "plain SGLang", _plain),
        System("hicache", "HiCache, device and host", _hicache, is_hicache=True),
        *(
            System(
                f"hicache_file_{policy}",
                f"HiCache, device, host and files, prefetch {policy}",
                _hicache_file(policy),
                is_hicache=True,
            )
            for policy in PREFETCH_POLICIES
        ),
        System("tiered", "--tiered-kv: device, host and disk", _tiered),
        System(
            "tiered_limit",
            "--tiered-kv, everything fits on the device: what tiers cost without being needed",
            _tiered_limit,
            is_usual=False,
        ),
    )
}


def model_of(folder: Path, element_bytes: int = 2) -> ModelSpec:
    """What the model's config.json says; `element_bytes`: of an element of its KV cache."""
    config = json.loads((folder / "config.json").read_text())
    return ModelSpec.from_hf_config(config, name=folder.name, kv_bytes_per_element=element_bytes)


def attention_per_linear(model: ModelSpec) -> float:
    """FLOPs of attending to one token of context, per FLOP of all else that a token costs.

    Per layer and token: QKVO and MLP matrices at 2 FLOPs a parameter; QK and PV at 2 each per
    query channel and context token.
    """
    q, kv = model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
    matrices = model.hidden_size * (2 * q + 2 * kv + 3 * model.intermediate_size)
    return 4 * q / (2 * matrices)


def plain_and_tiered(
    model: Path, common: Sequence[str], tiered: Sequence[str], logs: Path
) -> dict[str, Server]:
    """Plain SGLang, and a server that has `tiered` as well; not started. Flags, and a folder."""
    # Only the CPU platform: without it SGLang does not serve on a plain CPU.
    only_platform = {"SGLANG_PLUGINS": "tiered_kv_cpu"}
    return {
        "plain": Server(common, logs / "plain.log", model, env=only_platform),
        "tiered": Server([*common, *tiered], logs / "tiered.log", model),
    }
