"""Serve with three small tiers for a long time: nothing may grow and nothing stay behind.

    python -m benchmark.serving.soak --model-path MODEL               10 minutes
    python -m benchmark.serving.soak --model-path MODEL --minutes 30

Clients talk in conversations that share their beginnings; one in ten goes away in the middle of an
answer. Phases: warm-up (a fifth of the time), before, a burst of four times as many clients with
prompts nobody repeats, recovery, after. Every few seconds: resident memory, file descriptors and
threads of the server's processes, and its tier metrics. At the end: growth between the first and
the last third of the time after warm-up, throughput after the burst against before it (beyond what
chance does to both), pins that are left when nothing runs, and what the server logged. Exit code 1
if a bound is broken. Half an hour tells a leak from noise; three minutes only that all of it works.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import requests
from tqdm import tqdm

from benchmark.command_line import RESULTS, parser_of
from benchmark.serving.conversations import stream
from benchmark.serving.multiturn_report import machine
from benchmark.serving.systems import SYSTEMS, Sizes, model_of
from harness.metrics import scrape, wait_for_disk
from harness.server import BASE_ARGS, FLOAT32, Server, ServerError
from tiered_kv.metrics import names

#: float32: the fastest on CPUs without bfloat16 instructions.
ELEMENT_BYTES = 4
PAGE = 64
DEVICE_TOKENS, HOST_TOKENS = 4096, 8192
N_TOPICS, TOPIC_TOKENS = 24, 512
TIERS = ("device", "host", "disk")

#: Share of the whole time: warm-up, before, burst, recovery, after.
PHASES = (("warm-up", 0.2), ("before", 0.3), ("burst", 0.1), ("recovery", 0.1), ("after", 0.3))

MAX_GROWTH = {"rss_bytes": 0.05, "fds": 0.05, "threads": 0.05}
MAX_THROUGHPUT_LOSS = 0.02
#: Throughput is compared by the requests of so many seconds: their scatter says what chance does.
WINDOW_S = 10.0
#: Standard errors by which it must be lower than allowed before chance no longer explains it.
DOUBT = 2.0
#: Fewer windows in a phase say nothing.
WINDOWS_MIN = 5
PINS_TIMEOUT_S = 30.0


@dataclass
class Clients:
    """Ask without pause until told to stop; `done` holds each answer's time and phase."""

    url: str
    phase: str = "warm-up"
    stop: threading.Event = field(default_factory=threading.Event)
    done: list[tuple[float, str]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    n_gone: int = 0
    began: float = field(default_factory=time.monotonic)

    def run(self, seed: str, burst: bool) -> None:
        rng = random.Random(seed)
        with requests.Session() as session:
            while not self.stop.is_set() and (not burst or self.phase == "burst"):
                try:
                    self._ask(session, rng, burst)
                except Exception as error:
                    self.errors.append(f"{type(error).__name__}: {error}")
                    time.sleep(1)

    def _ask(self, session: requests.Session, rng: random.Random, burst: bool) -> None:
        topic = rng.random() if burst else int(N_TOPICS * rng.random() ** 2)
        shared = random.Random(f"topic {topic}")
        prompt = [shared.randrange(1000, 40000) for _ in range(TOPIC_TOKENS)]
        prompt += [rng.randrange(1000, 40000) for _ in range(rng.randrange(32, 256))]
        if rng.random() < 0.1:
            self._go_away(session, prompt)
            self.n_gone += 1
            return
        phase = self.phase
        stream(self.url, session, prompt, 16)
        self.done.append((time.monotonic(), phase if phase == self.phase else "between"))

    def _go_away(self, session: requests.Session, prompt: list[int]) -> None:
        body = {"input_ids": prompt, "stream": True}
        body |= {"sampling_params": {"max_new_tokens": 64, "ignore_eos": True}}
        with session.post(f"{self.url}/generate", json=body, stream=True, timeout=300) as response:
            next(response.iter_content(16), None)


def processes(server: Server) -> list[psutil.Process]:
    assert server.process is not None
    parent = psutil.Process(server.process.pid)
    return [parent, *parent.children(recursive=True)]


def sample(server: Server, began: float, phase: str) -> dict[str, Any]:
    """One line of the record; memory counts shared pages once (PSS)."""
    seen = processes(server)
    metrics = scrape(server)
    record: dict[str, Any] = {
        "t_s": round(time.monotonic() - began, 1),
        "phase": phase,
        "rss_bytes": sum(p.memory_full_info().pss for p in seen),
        "fds": sum(p.num_fds() for p in seen),
        "threads": sum(p.num_threads() for p in seen),
        "deferred": metrics.of(names.DEFERRED_NODES),
        "disk_bytes": metrics.of(names.DISK_BYTES),
    }
    for tier in TIERS:
        record[f"resident_{tier}"] = metrics.of(names.RESIDENT_TOKENS, tier=tier)
        if tier != "disk":
            record[f"pinned_{tier}"] = metrics.of(names.PINNED_TOKENS, tier=tier)
    return record


def growth(records: Sequence[dict[str, Any]], key: str) -> float:
    """Relative change from the median of the first third to that of the last, after warm-up."""
    values = [r[key] for r in records if r["phase"] != "warm-up"]
    third = max(1, len(values) // 3)
    first, last = sorted(values[:third])[third // 2], sorted(values[-third:])[third // 2]
    return (last - first) / max(first, 1)


def soak(server: Server, minutes: float, clients: Clients) -> list[dict[str, Any]]:
    began, total_s = clients.began, 60 * minutes
    threads = [threading.Thread(target=clients.run, args=(f"steady {i}", False)) for i in range(4)]
    for thread in threads:
        thread.start()
    records = []
    try:
        with tqdm(total=round(total_s), unit="s", desc="soak") as bar:
            ends = 0.0
            for phase, share in PHASES:
                clients.phase = phase
                ends += share * total_s
                if phase == "burst":
                    more = [
                        threading.Thread(target=clients.run, args=(f"burst {i}", True))
                        for i in range(12)
                    ]
                    for thread in more:
                        thread.start()
                    threads += more
                while (now := time.monotonic() - began) < ends:
                    records.append(sample(server, began, phase))
                    bar.set_postfix_str(phase)
                    bar.update(round(now) - bar.n)
                    time.sleep(min(5.0, max(0.1, ends - now)))
    finally:
        clients.stop.set()
        for thread in threads:
            thread.join()
    return records


def rates(clients: Clients, phase: str, records: Sequence[dict[str, Any]]) -> list[float]:
    """Answers per second in each whole window of a phase."""
    times = sorted(at for at, of in clients.done if of == phase)
    samples = [r["t_s"] + clients.began for r in records if r["phase"] == phase]
    if not samples:
        return []
    n_windows = max(1, int((samples[-1] - samples[0]) / WINDOW_S))
    counts = [0] * n_windows
    for at in times:
        window = int((at - samples[0]) / WINDOW_S)
        if 0 <= window < n_windows:
            counts[window] += 1
    return [count / WINDOW_S for count in counts]


def throughput(before: Sequence[float], after: Sequence[float]) -> dict[str, float]:
    """Means of both, their ratio, and the standard error of the ratio."""
    first, last = statistics.fmean(before or [0.0]), statistics.fmean(after or [0.0])
    errors = [
        statistics.stdev(values) / math.sqrt(len(values)) / mean if len(values) > 1 and mean else 0
        for values, mean in ((before, first), (after, last))
    ]
    ratio = last / first if first else 0.0
    return {
        "requests_per_s_before": first,
        "requests_per_s_after": last,
        "after_over_before": ratio,
        "standard_error": ratio * math.hypot(*errors),
        "windows": min(len(before), len(after)),
    }


def verdict(
    records: Sequence[dict[str, Any]], clients: Clients, minutes: float, left: dict[str, float]
) -> tuple[dict[str, Any], list[str]]:
    """All that was found, and which bounds it breaks, in words."""
    speed = throughput(*(rates(clients, phase, records) for phase in ("before", "after")))
    found: dict[str, Any] = {
        "machine": machine(),
        "minutes": minutes,
        "requests": len(clients.done),
        "gone_away": clients.n_gone,
        "errors": clients.errors[:10],
        **speed,
        "growth": {key: growth(records, key) for key in MAX_GROWTH},
        "pinned_when_idle": left,
    }
    broken = (
        [f"{len(clients.errors)} requests failed: {clients.errors[0]}"] if clients.errors else []
    )
    broken += [
        f"{key} grew by {found['growth'][key]:.1%} (bound: {bound:.0%})"
        for key, bound in MAX_GROWTH.items()
        if found["growth"][key] > bound
    ]
    ratio, doubt = speed["after_over_before"], DOUBT * speed["standard_error"]
    if speed["windows"] >= WINDOWS_MIN and ratio + doubt < 1 - MAX_THROUGHPUT_LOSS:
        broken.append(f"throughput after the burst is {ratio:.3f} (+-{doubt:.3f}) of before it")
    broken += [f"{n:.0f} tokens stay pinned on {t} when idle" for t, n in left.items() if n]
    return found, broken


def left_pinned(server: Server) -> dict[str, float]:
    """Tokens pinned by tier when nothing runs; those who went away take a moment to be noticed."""
    deadline = time.monotonic() + PINS_TIMEOUT_S
    wait_for_disk(server, timeout_s=120)
    while True:
        idle = scrape(server)
        left = {tier: idle.of(names.PINNED_TOKENS, tier=tier) for tier in TIERS[:2]}
        if not any(left.values()) or time.monotonic() > deadline:
            return left
        time.sleep(1)


def plot(records: Sequence[dict[str, Any]], clients: Clients, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(4, 1, figsize=(10, 11), sharex=True, layout="constrained")
    t = [r["t_s"] for r in records]
    axes[0].plot(t, [r["rss_bytes"] / 1e6 for r in records])
    axes[0].set_ylabel("memory (MB, PSS)")
    axes[1].plot(t, [r["fds"] for r in records], label="file descriptors")
    axes[1].plot(t, [r["threads"] for r in records], label="threads")
    for tier in TIERS:
        axes[2].plot(t, [r[f"resident_{tier}"] for r in records], label=f"{tier}, resident")
    for tier in TIERS[:2]:
        axes[2].plot(t, [r[f"pinned_{tier}"] for r in records], "--", label=f"{tier}, pinned")
    axes[2].set_yscale("symlog", linthresh=1000)
    axes[2].set_ylabel("tokens")
    window = 15.0
    times = [at - clients.began for at, _ in clients.done]
    axes[3].plot(t, [sum(1 for x in times if a - window < x <= a) / window for a in t])
    axes[3].set_ylabel(f"requests/s (last {window:.0f} s)")
    axes[3].set_xlabel("s")
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
        for begin in (r["t_s"] for last, r in pairwise(records) if last["phase"] != r["phase"]):
            axis.axvline(begin, color="gray", lw=1)
    figure.savefig(path, dpi=100)


def main() -> int:
    parser = parser_of("benchmark.serving.soak", __doc__)
    parser.add_argument("--model-path", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--output", type=Path, default=RESULTS / "soak")
    options = parser.parse_args()

    token_bytes = int(model_of(options.model_path, ELEMENT_BYTES).kv_bytes_per_token)
    sizes = Sizes(PAGE, DEVICE_TOKENS, HOST_TOKENS, 0, token_bytes)
    common = [*BASE_ARGS, *FLOAT32, "--page-size", str(PAGE), "--chunked-prefill-size", "1024"]
    common += ["--enable-metrics"]
    with tempfile.TemporaryDirectory(prefix="tiered_kv_soak_") as folder:
        scratch = Path(folder)
        log = scratch / "server.log"
        server = SYSTEMS["tiered"].server(options.model_path, common, sizes, scratch, log)
        records: list[dict[str, Any]] = []
        left: dict[str, float] = {}
        trouble: list[str] = []
        try:
            with server:
                clients = Clients(server.url)
                records = soak(server, options.minutes, clients)
                left = left_pinned(server)
        except ServerError as error:
            if not records:
                raise
            # What was measured is written all the same.
            trouble.append(" ".join(str(error).splitlines()[:3]))
    found, broken = verdict(records, clients, options.minutes, left)
    broken += trouble
    options.output.parent.mkdir(parents=True, exist_ok=True)
    document = {**found, "bounds_broken": broken, "records": records}
    options.output.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    plot(records, clients, options.output.with_suffix(".png"))
    print(json.dumps(found, indent=1))
    for line in broken:
        print(f"bound broken: {line}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
