"""Prompts that arrive while others decode: in passes of both kinds, or in turns.

Two servers with --tiered-kv, one of them with --enable-mixed-chunk; the same arrivals at each, in
turns. What counts: the time per output token of those who decode, the longest they wait for one,
and the time to first token of those who arrive.
"""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

from benchmark.gpu import systems
from benchmark.gpu.record import Record
from benchmark.gpu.setting import Setting
from benchmark.simulation.probe import Answer, Probe
from harness.server import Server

MODES = {"in turns": (), "mixed": ("--enable-mixed-chunk",)}


@dataclass(frozen=True)
class Load:
    """n_decodes answers of `new` tokens each; meanwhile a prompt every `every_s`."""

    n_decodes: int
    context: int
    new: int
    n_prompts: int
    prompt: int
    every_s: float
    turns: int


LARGE = Load(32, 1024, 400, 20, 2048, 0.15, 3)
SMALL = Load(2, 32, 24, 3, 64, 0.1, 1)


def measure(setting: Setting, notes: Record) -> dict[str, Any]:
    """Rows, one for each mode and turn."""
    load = SMALL if setting.is_small else LARGE
    model = systems.write_model(setting.folder / "model", setting.is_small)
    n_tokens = load.n_decodes * (load.context + load.new) + load.n_prompts * load.prompt
    common = systems.common_flags(setting, 64 if setting.on_gpu else 16, 2 * n_tokens)
    common += systems.tiered_flags(setting, 1 << 30 if setting.on_gpu else 64 << 20, None)
    if setting.on_gpu:
        common += ["--cuda-graph-max-bs-decode", "64"]
    servers = {
        name: systems.server_of("mixing", name.replace(" ", "_"), setting, model, [*common, *flags])
        for name, flags in MODES.items()
    }
    rows: list[dict[str, Any]] = []
    with systems.all_up(servers) as up:
        for turn, (name, server) in itertools.product(range(load.turns + 1), up.items()):
            row = {"mode": name, **one_turn(server, load, turn)}
            if turn:  # the first warms up
                rows.append(row)
            notes.so_far({"load": asdict(load), "rows": rows})
        return {"load": asdict(load), "rows": rows, "trouble": systems.trouble(up)}


def one_turn(server: Server, load: Load, seed: int) -> dict[str, float]:
    """The same requests at every server for the same seed."""
    probe = Probe(server.url, seed=seed)
    contexts = [probe.tokens(load.context) for _ in range(load.n_decodes)]
    prompts = [probe.tokens(load.prompt) for _ in range(load.n_prompts)]
    decoded: list[Answer] = []
    arrived: list[Answer] = []

    def decode(prompt: list[int]) -> None:
        decoded.append(probe.ask(prompt, load.new))

    def arrive(prompt: list[int]) -> None:
        arrived.append(probe.ask(prompt, 1))

    threads = [threading.Thread(target=decode, args=(prompt,)) for prompt in contexts]
    for thread in threads:
        thread.start()
    time.sleep(2 * load.every_s)
    for prompt in prompts:
        threads.append(threading.Thread(target=arrive, args=(prompt,)))
        threads[-1].start()
        time.sleep(load.every_s)
    for thread in threads:
        thread.join()
    if len(decoded) < load.n_decodes or len(arrived) < load.n_prompts:
        raise RuntimeError("the server did not answer every request; see its log")
    gaps = sorted(b - a for answer in decoded for a, b in itertools.pairwise(answer.token_times_s))
    return {
        "tpot_s": statistics.fmean(gaps),
        "gap_p99_s": gaps[min(len(gaps) - 1, int(0.99 * len(gaps)))],
        "gap_most_s": gaps[-1],
        "ttft_s": statistics.median(answer.ttft_s for answer in arrived),
    }
