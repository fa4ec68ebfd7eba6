"""The servers that are asked: plain SGLang, HiCache, and --tiered-kv, with one model and one pool.

The model is Llama-3.1-8B's shape with random weights, made by `launcher.py`: SGLang's own dummy
weights are so small that an answer hardly depends on the KV that it reads.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import requests

from benchmark.gpu.setting import Setting
from harness.server import Server, ServerError
from tiered_kv.tiers.memory_limits import available_bytes

#: How SGLang says what its graphs took.
CAPTURED = re.compile(
    r"Capture (.+?) CUDA graph end\..*?elapsed=([\d.]+) s.*?mem usage=([\d.-]+) GB"
)
LAUNCHER = (str(Path(__file__).with_name("launcher.py")),)
#: SGLang captures some sixty sizes of prefill by default, for nothing that is asked here.
PREFILL_GRAPHS = ("--cuda-graph-bs-prefill", "64", "256", "1024", "2304", "8192")
#: Of what is free, this share is taken: of memory by all servers together, and of the disk.
SHARE_MAX, DISK_SHARE_MAX = 0.5, 0.8
DISK_BYTES = 40 * 10**9
#: Lines of a log that tell of trouble, of each server.
TROUBLE_MAX = 20

LLAMA_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "torch_dtype": "bfloat16",
}
#: The same in small, for machines without a GPU.
SMALL_CONFIG = {
    **LLAMA_CONFIG,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 42000,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_model(folder: Path, is_small: bool) -> Path:
    """A folder with nothing but a config.json: enough for --load-format dummy."""
    folder.mkdir(parents=True, exist_ok=True)
    config = SMALL_CONFIG if is_small else LLAMA_CONFIG
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return folder


def common_flags(setting: Setting, page_tokens: int, device_tokens: int) -> list[str]:
    flags = ["--load-format", "dummy", "--skip-tokenizer-init", "--skip-server-warmup"]
    flags += ["--page-size", str(page_tokens), "--max-total-tokens", str(device_tokens)]
    flags += ["--sampling-backend", "pytorch", "--grammar-backend", "none"]
    flags += ["--mm-feature-transport", "cpu"]
    if setting.on_gpu:
        flags += ["--attention-backend", "flashinfer", "--chunked-prefill-size", "8192"]
        return [*flags, "--cuda-graph-max-bs-decode", "16", *PREFILL_GRAPHS]
    flags += ["--device", "cpu", "--attention-backend", "torch_native", "--dtype", "float32"]
    return [*flags, "--sleep-on-idle", "--disable-overlap-schedule"]


def tiered_flags(
    setting: Setting, host_bytes: int, disk: Path | None, *, n_servers: int = 1
) -> list[str]:
    """n_servers: that share the machine's memory. A tier that does not fit is smaller."""
    free = available_bytes()
    if free is not None:
        host_bytes = min(host_bytes, int(SHARE_MAX * free) // n_servers)
    flags = ["--tiered-kv", "--enable-metrics", "--tiered-kv-host-size", f"{host_bytes}B"]
    flags += ["--tiered-kv-disk-dir", "none" if disk is None else str(disk)]
    if disk is not None:
        wanted = DISK_BYTES if setting.on_gpu else 10**9
        free_disk = shutil.disk_usage(next(p for p in (disk, *disk.parents) if p.exists())).free
        flags += ["--tiered-kv-disk-size", f"{min(wanted, int(DISK_SHARE_MAX * free_disk))}B"]
    if setting.is_small:
        # So small a model computes sooner than anything can be loaded. (The last one given counts.)
        flags += ["--tiered-kv-load-policy", "always"]
    return flags


def hicache_system(
    setting: Setting, host_tokens: int, host_bytes: int, device_tokens: int, disk: Path
) -> dict[str, Any]:
    """What `server_of` takes: args, and env. `launcher.py` does on a CPU what HiCache lacks."""
    flags = ["--enable-hierarchical-cache", "--hicache-write-policy", "write_through"]
    flags += ["--hicache-storage-backend", "file"]
    flags += ["--hicache-storage-prefetch-policy", "wait_complete"]
    if setting.on_gpu:
        flags += ["--hicache-size", str(max(1, -(-host_bytes // 10**9)))]
        flags += ["--hicache-io-backend", "kernel", "--hicache-mem-layout", "page_first"]
    else:
        flags += ["--hicache-ratio", str(host_tokens / device_tokens)]
        flags += ["--hicache-io-backend", "direct", "--hicache-mem-layout", "layer_first"]
    return {"args": flags, "env": {"SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": str(disk)}}


def server_of(
    step: str, name: str, setting: Setting, model: Path, args: Sequence[str],
    env: Mapping[str, str] | None = None,
) -> Server:  # fmt: skip
    """Not started; its log is OUT/STEP_server_NAME.log."""
    log = setting.folder / f"{step}_server_{name}.log"
    return Server(list(args), log, model, env=dict(env or {}), launcher=LAUNCHER)


def trouble(servers: Mapping[str, Server]) -> dict[str, list[str]]:
    """What the logs tell of errors and leaks, by server: to be looked at; figures stand as they
    are."""
    found = {name: server.trouble()[:TROUBLE_MAX] for name, server in servers.items()}
    return {name: lines for name, lines in found.items() if lines}


def captures(server: Server) -> list[dict[str, Any]]:
    """What each capture of CUDA graphs took at the start."""
    return [
        {"what": what, "seconds": float(seconds), "gb": float(gb)}
        for what, seconds, gb in CAPTURED.findall(server.log_text())
    ]


@contextlib.contextmanager
def up_together(
    servers: Mapping[str, Server],
) -> Iterator[tuple[dict[str, Server], dict[str, str]]]:
    """Starts all at once; those that are up, and why the others are not. Killed at the end."""
    with ExitStack() as stack:
        failed: dict[str, str] = {}
        up: dict[str, Server] = {}
        for server in servers.values():
            server.launch()
            stack.callback(server.kill_9)
        for name, server in servers.items():
            try:
                server.wait_until_up()
                up[name] = server
            except (ServerError, requests.RequestException) as error:
                print(error, flush=True)
                failed[name] = str(error).splitlines()[0]
                server.kill_9()
        yield up, failed


@contextlib.contextmanager
def all_up(servers: Mapping[str, Server]) -> Iterator[dict[str, Server]]:
    """As `up_together`. Raises RuntimeError unless all are up."""
    with up_together(servers) as (up, failed):
        if failed:
            raise RuntimeError(
                "; ".join(f"{name} did not start: {why}" for name, why in failed.items())
            )
        yield up


@contextlib.contextmanager
def emptied(folder: Path) -> Iterator[Path]:
    """A folder that is new, and gone afterwards: these are tens of gigabytes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
