"""Time to the first token by where a prompt's KV is: on the real server, with dummy weights.

Three systems in turn, same model and pools: plain SGLang, HiCache with its file backend, and
--tiered-kv. Each answers the same questions: prompts it has never seen, again at once (KV on the
device), again after others filled the device (host), again after a flush (disk). What has no such
tier computes. Then several answers are decoded at once, for the time per output token.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import statistics
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import requests

from benchmark.gpu.setting import Setting
from benchmark.simulation.probe import Answer, Probe
from harness.metrics import wait_for_disk
from harness.server import Server

FRESH, DEVICE, HOST, DISK = "new", "again", "after others", "after a flush"
FLUSH_TIMEOUT_S = 180.0

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


@dataclass(frozen=True)
class Sizes:
    """Prompt lengths from short to long, room for KV, and the decoding batch; tokens and bytes."""

    lengths: tuple[int, ...]
    short_tokens: int
    """Prompts up to this length are cheap to compute and to keep."""
    device_tokens: int
    host_tokens: int
    token_bytes: int
    page_tokens: int
    n_decodes: int
    decode_tokens: int
    repeats: int

    @property
    def host_bytes(self) -> int:
        return self.host_tokens * self.token_bytes


LARGE_SIZES = Sizes(
    lengths=(2048, 8192, 32768, 65536),
    short_tokens=8192,
    device_tokens=68 * 1024,
    host_tokens=240 * 1024,
    token_bytes=131072,
    page_tokens=64,
    n_decodes=8,
    decode_tokens=128,
    repeats=3,
)
SMALL_SIZES = Sizes(
    lengths=(64, 128, 256),
    short_tokens=128,
    device_tokens=320,
    host_tokens=2048,
    token_bytes=1024,
    page_tokens=16,
    n_decodes=2,
    decode_tokens=8,
    repeats=1,
)


@dataclass(frozen=True)
class Sample:
    """One first token."""

    system: str
    state: str
    tokens: int
    ttft_s: float
    cached_tokens: int
    by_tier: dict[str, int]


def write_model(folder: Path, is_small: bool) -> Path:
    """A folder with nothing but a config.json: enough for --load-format dummy."""
    folder.mkdir(parents=True, exist_ok=True)
    config = SMALL_CONFIG if is_small else LLAMA_CONFIG
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return folder


def common_flags(setting: Setting, sizes: Sizes) -> list[str]:
    flags = ["--load-format", "dummy", "--skip-tokenizer-init", "--skip-server-warmup"]
    flags += ["--page-size", str(sizes.page_tokens), "--max-total-tokens", str(sizes.device_tokens)]
    flags += ["--sampling-backend", "pytorch", "--grammar-backend", "none"]
    flags += ["--mm-feature-transport", "cpu"]
    if setting.on_gpu:
        return [*flags, "--attention-backend", "flashinfer", "--chunked-prefill-size", "8192"]
    flags += ["--device", "cpu", "--attention-backend", "torch_native", "--dtype", "float32"]
    return [*flags, "--sleep-on-idle", "--disable-overlap-schedule"]


def systems(setting: Setting, sizes: Sizes, disk: Path) -> dict[str, dict[str, Any]]:
    """Name to what `Server` takes beside the common flags: args, and for HiCache env and launcher.

    SGLang's own launcher is for GPUs; benchmark/serving/hicache_on_cpu.py does the same on a CPU.
    """
    host_gb = max(1, -(-sizes.host_bytes // 10**9))
    hicache = ["--enable-hierarchical-cache", "--hicache-write-policy", "write_through"]
    hicache += ["--hicache-storage-backend", "file"]
    hicache += ["--hicache-storage-prefetch-policy", "wait_complete"]
    more: dict[str, Any] = {}
    if setting.on_gpu:
        hicache += ["--hicache-size", str(host_gb), "--hicache-io-backend", "kernel"]
        hicache += ["--hicache-mem-layout", "page_first"]
    else:
        hicache += ["--hicache-ratio", str(sizes.host_tokens / sizes.device_tokens)]
        launcher = Path(__file__).parents[1] / "serving" / "hicache_on_cpu.py"
        more["launcher"] = (str(launcher),)
    more["env"] = {"SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": str(disk / "hicache")}
    tiered = ["--tiered-kv", "--enable-metrics", "--tiered-kv-host-size", f"{sizes.host_bytes}B"]
    tiered += ["--tiered-kv-disk-dir", str(disk / "tiered"), "--tiered-kv-disk-size", "40GB"]
    if setting.is_small:
        # So small a model computes sooner than anything can be loaded.
        tiered += ["--tiered-kv-load-policy", "always"]
    return {
        "plain": {"args": []},
        "hicache": {"args": hicache, **more},
        "tiered": {"args": tiered},
    }


def measure(setting: Setting, names: tuple[str, ...] | None = None) -> dict[str, Any]:
    """Samples of every system, and seconds per output token; a system that fails says why.

    names: the systems to measure; all by default. Where plain SGLang does not start with CUDA
    graphs, all are measured without.
    """
    sizes = SMALL_SIZES if setting.is_small else LARGE_SIZES
    scratch = setting.folder / "serving"
    model = write_model(scratch / "model", setting.is_small)
    samples: list[Sample] = []
    decoding: dict[str, Any] = {}
    starts: dict[str, float] = {}
    failed: dict[str, str] = {}
    graphs = setting.on_gpu
    for name, extra in systems(setting, sizes, scratch / "disk").items():
        if names is not None and name not in names:
            continue
        with emptied(scratch / "disk"):
            (scratch / "disk" / "hicache").mkdir()
            log = setting.folder / f"server_{name}.log"
            flags = [*common_flags(setting, sizes), *extra["args"]]
            options = {key: extra[key] for key in ("env", "launcher") if key in extra}
            try:
                server, graphs = started(setting, flags, log, model, graphs, options)
                with contextlib.ExitStack() as stack:
                    stack.push(server)
                    starts[name] = server.start_seconds
                    samples += first_tokens(server, name, sizes)
                    decoding[name] = output_tokens(server, sizes)
            except (AssertionError, requests.RequestException, RuntimeError) as error:
                failed[name] = str(error).splitlines()[0]
    return {
        "sizes": asdict(sizes),
        "cuda_graphs": graphs,
        "start_s": starts,
        "samples": [asdict(sample) for sample in samples],
        "decoding": decoding,
        "failed": failed,
    }


def started(
    setting: Setting,
    flags: list[str],
    log: Path,
    model: Path,
    graphs: bool,
    options: dict[str, Any],
) -> tuple[Server, bool]:
    """A server that answers, and whether it has CUDA graphs. Raises ServerError."""
    if graphs:
        try:
            small_graphs = ["--cuda-graph-max-bs", "16"]
            return Server([*flags, *small_graphs], log, model, **options).start(), True
        except AssertionError as error:
            first_line = str(error).splitlines()[0]
            sys.stderr.write(f"[gpu_check] not with CUDA graphs ({first_line}); trying without\n")
    without = ["--disable-cuda-graph"] if setting.on_gpu else []
    return Server([*flags, *without], log, model, **options).start(), False


@contextlib.contextmanager
def emptied(folder: Path) -> Iterator[None]:
    """A folder that is new, and gone afterwards: these are tens of gigabytes."""
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def first_tokens(server: Server, name: str, sizes: Sizes) -> Iterator[Sample]:
    """Every length in every state.

    The device holds one prompt of the longest length, or one of each of the others. So a prompt of
    the longest length pushes out all others, whether it is computed or loaded.
    """
    probe = Probe(server.url, seed=7)
    *shorter, longest = sizes.lengths
    prompts = {n: probe.tokens(n - 1) for n in sizes.lengths}
    pusher = probe.tokens(longest - 1)
    last_tokens = itertools.count(1)

    def ask(state: str, n: int, prompt: list[int]) -> Sample:
        return sample_of(name, state, n, probe.ask([*prompt, next(last_tokens)]))

    def ask_all(state: str) -> Iterator[Sample]:
        # From long to short: the longest leaves room for what of the others comes after it.
        for n in reversed(sizes.lengths):
            yield ask(state, n, prompts[n])

    warm_up(probe, sizes)
    for n in (longest, *shorter):
        # What is computed is written to disk: only short prompts are computed several times.
        for _ in range(sizes.repeats if n <= sizes.short_tokens else 1):
            prompts[n] = probe.tokens(n - 1)
            yield ask(FRESH, n, prompts[n])
            yield ask(DEVICE, n, prompts[n])
    # Plain SGLang computes them all again: once says enough.
    repeats = 1 if name == "plain" else sizes.repeats
    for _ in range(repeats):
        probe.ask([*pusher, next(last_tokens)])
        yield from ask_all(HOST)
    for _ in range(repeats):
        flush(server)
        yield from ask_all(DISK)


def sample_of(system: str, state: str, n: int, answer: Answer) -> Sample:
    by_tier = {tier: count for tier, count in answer.by_tier.items() if isinstance(count, int)}
    return Sample(system, state, n, answer.ttft_s, answer.cached_tokens, by_tier)


def warm_up(probe: Probe, sizes: Sizes) -> None:
    """Kernels are compiled and chosen at first use, by shape."""
    for n in sizes.lengths:
        if n <= sizes.short_tokens:
            prompt = probe.tokens(n - 1)
            probe.ask([*prompt, 1], 2)
            probe.ask([*prompt, 2], 2)


def flush(server: Server) -> None:
    """Empties device and host, once everything is on disk: a busy server refuses."""
    if "--tiered-kv" in server.args:
        wait_for_disk(server, timeout_s=FLUSH_TIMEOUT_S)
    server.flush_cache(FLUSH_TIMEOUT_S)


def output_tokens(server: Server, sizes: Sizes) -> dict[str, float]:
    """Seconds per token of answers decoded together, and the 99th percentile of gaps."""
    probe = Probe(server.url, seed=8)
    prompts = [probe.tokens(sizes.lengths[0]) for _ in range(sizes.n_decodes)]
    with ThreadPoolExecutor(sizes.n_decodes) as pool:
        answers = list(pool.map(lambda prompt: probe.ask(prompt, sizes.decode_tokens), prompts))
    start_s = max(answer.first_s for answer in answers)
    together = [[t for t in answer.token_times_s if t >= start_s] for answer in answers]
    gaps = sorted(b - a for times in together for a, b in itertools.pairwise(times))
    # Two tokens may reach a client in one piece: single gaps say less than what they add up to.
    means = [(times[-1] - times[0]) / (len(times) - 1) for times in together if len(times) > 1]
    if not means:
        raise RuntimeError("no two answers were decoded at the same time")
    return {
        "tpot_s": statistics.median(means),
        "tpot_p99_s": gaps[min(len(gaps) - 1, int(0.99 * len(gaps)))],
        "n_decodes": sizes.n_decodes,
        "context_tokens": sizes.lengths[0] + sizes.decode_tokens // 2,
    }
