"""Time to the first token by where a prompt's KV is: on the real server, with random weights.

Three systems, each a step of its own, same model and pools: plain SGLang, HiCache with its file
backend, and --tiered-kv. Each answers the same questions: prompts it has never seen, again at once
(KV on the device), again after others filled the device (host), again after a flush (disk). What
has no such tier computes. Several answers are decoded at once, for the time per output token; with
--tiered-kv also while what was just computed is written to host and disk. What takes a disk comes
after what does not: nobody knows how slow it is.
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
from harness.server import Server, ServerError

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
    decode_context: int
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
    decode_context=2048,
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
    decode_context=64,
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
        with systems.all_up({name: server}):
            result["start_s"] = server.start_seconds

            def note(samples: Iterator[Sample]) -> None:
                for sample in samples:
                    result["samples"].append(asdict(sample))
                    notes.so_far(result)

            questions = Questions(server, name, sizes)
            note(questions.computed())
            if name == "plain":
                # It computes all that follows, too: what else there is to know comes first.
                result["decoding"][name] = output_tokens(server, sizes)
            note(questions.after_others())
            if name != "plain":
                result["decoding"][name] = output_tokens(server, sizes)
            notes.so_far(result)
            try:
                note(questions.after_a_flush())
                for found in interference(server, sizes) if name == "tiered" else ():
                    result["interference"] = found
                    notes.so_far(result)
            except ServerError as error:
                # A slow disk: all else is known by now.
                result["gave_up"] = str(error).splitlines()[0]
            result["trouble"] = systems.trouble({name: server})
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


class Questions:
    """Every length in every state, to be asked in the order of the methods.

    The device holds one prompt of the longest length, or one of each of the others. So a prompt of
    the longest length pushes out all others, whether it is computed or loaded.
    """

    def __init__(self, server: Server, name: str, sizes: Sizes) -> None:
        self._server, self._name, self._sizes = server, name, sizes
        self._probe = Probe(server.url, seed=7)
        self._prompts: dict[int, list[int]] = {}
        self._pusher = self._probe.tokens(sizes.lengths[-1] - 1)
        self._last_tokens = itertools.count(1)
        # Plain SGLang computes them all again: once says enough.
        self._repeats = 1 if name == "plain" else sizes.repeats

    def computed(self) -> Iterator[Sample]:
        """New, and again at once."""
        sizes, (*shorter, longest) = self._sizes, self._sizes.lengths
        warm_up(self._probe, sizes)
        for n in (longest, *shorter):
            # What is computed is written to disk: only short prompts are computed several times.
            for _ in range(sizes.repeats if n <= sizes.short_tokens else 1):
                self._prompts[n] = self._probe.tokens(n - 1)
                yield self._ask(FRESH, n)
                yield self._ask(DEVICE, n)

    def after_others(self) -> Iterator[Sample]:
        """When others have filled the device."""
        for _ in range(self._repeats):
            self._probe.ask([*self._pusher, next(self._last_tokens)])
            yield from self._ask_all(HOST)

    def after_a_flush(self) -> Iterator[Sample]:
        """Raises ServerError if that takes too long."""
        for _ in range(self._repeats):
            flush(self._server)
            yield from self._ask_all(DISK)

    def _ask_all(self, state: str) -> Iterator[Sample]:
        # From long to short: the longest leaves room for what of the others comes after it.
        for n in reversed(self._sizes.lengths):
            yield self._ask(state, n)

    def _ask(self, state: str, n: int) -> Sample:
        answer = self._probe.ask([*self._prompts[n], next(self._last_tokens)])
        return sample_of(self._name, state, n, answer)


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
    prompts = [probe.tokens(sizes.decode_context) for _ in range(sizes.n_decodes)]
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
        "context_tokens": sizes.decode_context + sizes.decode_tokens // 2,
    }


def interference(server: Server, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Time per output token while a long prompt's pages are written, and while none are; what is
    known after each turn.

    The prompt is computed before; writing it to host and disk goes on while the answers come.
    Raises ServerError where the disk is so slow that there is no quiet before a turn.
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
        yield {"quiet_s": quiet, "busy_s": busy, "longer_by": share}
