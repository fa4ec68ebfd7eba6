"""Time to the first token by where a prompt's KV is: on the real server, with random weights.

Three systems, each a step of its own, same model and pools: plain SGLang, HiCache with its file
backend, and --tiered-kv. Each answers the same questions: prompts it has never seen, again at once
(KV on the device), again after others filled the device (host), again after a flush (disk). What
has no such tier computes. Then several answers are decoded at once, for the time per output token;
with --tiered-kv also while what was just computed is written to host and disk.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmark.gpu import systems
from benchmark.gpu.answers import DEVICE, DISK, FRESH, HOST, flush
from benchmark.gpu.record import Record
from benchmark.gpu.setting import Setting
from benchmark.simulation.probe import Answer, Probe
from harness.metrics import wait_for_disk
from harness.server import Server

FLUSH_TIMEOUT_S = 60.0
#: Decodes that are timed while pages are written, and while none are, in turns.
INTERFERENCE_TURNS = 3


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
    lengths=(8192, 32768, 65536),
    short_tokens=8192,
    device_tokens=68 * 1024,
    host_tokens=240 * 1024,
    token_bytes=131072,
    page_tokens=64,
    n_decodes=8,
    decode_tokens=128,
    repeats=2,
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


def sizes_of(setting: Setting) -> Sizes:
    return SMALL_SIZES if setting.is_small else LARGE_SIZES


def plain(setting: Setting, notes: Record) -> dict[str, Any]:
    return measured(setting, notes, "plain", sizes_of(setting))


def tiered(setting: Setting, notes: Record) -> dict[str, Any]:
    return measured(setting, notes, "tiered", sizes_of(setting))


def hicache(setting: Setting, notes: Record) -> dict[str, Any]:
    return measured(setting, notes, "hicache", sizes_of(setting))


def more(setting: Setting, notes: Record) -> dict[str, Any]:
    """Plain SGLang at other lengths, for the cost model."""
    sizes = sizes_of(setting)
    lengths = (32, 96) if setting.is_small else (2048, 4096, 16384)
    return measured(setting, notes, "plain", replace(sizes, lengths=lengths), "ttft_more")


def measured(
    setting: Setting, notes: Record, name: str, sizes: Sizes, step: str | None = None
) -> dict[str, Any]:
    """Samples of one system, and seconds per output token, written as they come."""
    step = step or f"ttft_{name}"
    model = systems.write_model(setting.folder / "model", setting.is_small)
    result: dict[str, Any] = {"sizes": asdict(sizes), "samples": [], "decoding": {}}
    with systems.emptied(setting.folder / f"{step}_disk") as disk:
        system = system_of(setting, name, sizes, disk)
        flags = systems.common_flags(setting, sizes.page_tokens, sizes.device_tokens)
        flags += system["args"]
        server = systems.server_of(step, name, setting, model, flags, system.get("env"))
        with server:
            result["start_s"] = server.start_seconds
            for sample in first_tokens(server, name, sizes):
                result["samples"].append(asdict(sample))
                notes.so_far(result)
            result["decoding"][name] = output_tokens(server, sizes)
            notes.so_far(result)
            if name == "tiered":
                result["interference"] = interference(server, sizes)
    return result


def system_of(setting: Setting, name: str, sizes: Sizes, disk: Path) -> dict[str, Any]:
    """What a server takes beside the common flags: args, and env."""
    if name == "plain":
        return {"args": []}
    if name == "tiered":
        return {"args": systems.tiered_flags(setting, sizes.host_bytes, disk)}
    return systems.hicache_system(
        setting, sizes.host_tokens, sizes.host_bytes, sizes.device_tokens, disk
    )


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


def interference(server: Server, sizes: Sizes) -> dict[str, Any]:
    """Time per output token while a long prompt's pages are written, and while none are.

    The prompt is computed before; writing it to host and disk goes on while the answers come.
    """
    probe = Probe(server.url, seed=9)
    quiet: list[float] = []
    busy: list[float] = []
    for _ in range(INTERFERENCE_TURNS):
        wait_for_disk(server, timeout_s=FLUSH_TIMEOUT_S)
        quiet.append(output_tokens(server, sizes)["tpot_s"])
        probe.ask(probe.tokens(sizes.lengths[-2]))
        busy.append(output_tokens(server, sizes)["tpot_s"])
    share = statistics.median(b / q for b, q in zip(busy, quiet, strict=True)) - 1
    return {"quiet_s": quiet, "busy_s": busy, "longer_by": share}
