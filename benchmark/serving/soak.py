"""Serve with three small tiers for a long time: nothing may grow and nothing stay behind.

    python benchmark/serving/soak.py --model-path MODEL               10 minutes
    python benchmark/serving/soak.py --model-path MODEL --minutes 60

Clients talk in conversations that share their beginnings; one in ten goes away in the middle of an
answer. Phases: warm-up (a fifth of the time), before, a burst of four times as many clients with
prompts nobody repeats, recovery, after. Every few seconds: resident memory, file descriptors and
threads of the server's processes, and its tier metrics. At the end: growth between the first and
the last third of the time after warm-up, throughput after the burst against before it, and pins
that are left when nothing runs. Exit code 1 if a bound is broken.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import requests
from conversations import stream
from multiturn_report import machine
from systems import HERE, SYSTEMS, Sizes, model_of
from tqdm import tqdm

sys.path.insert(0, str(HERE.parents[1] / "test"))

from support.metrics import scrape, wait_for_disk
from support.server import Server
from tiered_kv.metrics import names

RESULTS = HERE.parent / "results"
PAGE = 64
DEVICE_TOKENS, HOST_TOKENS = 4096, 8192
N_TOPICS, TOPIC_TOKENS = 24, 512
TIERS = ("device", "host", "disk")

#: Share of the whole time: warm-up, before, burst, recovery, after.
PHASES = (("warm-up", 0.2), ("before", 0.3), ("burst", 0.1), ("recovery", 0.1), ("after", 0.3))

MAX_GROWTH = {"rss_bytes": 0.05, "fds": 0.05, "threads": 0.05}
MAX_THROUGHPUT_LOSS = 0.02


@dataclass
class Clients:
    """`n` threads that ask without pause until told to stop; `done` holds (time, new tokens)."""

    url: str
    phase: str = "warm-up"
    stop: threading.Event = field(default_factory=threading.Event)
    done: list[tuple[float, str]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

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
    began, total_s = time.monotonic(), 60 * minutes
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


def rate(clients: Clients, phase: str, minutes: float) -> float:
    share = dict(PHASES)[phase]
    return sum(1 for _, p in clients.done if p == phase) / (60 * minutes * share)


def verdict(
    records: Sequence[dict[str, Any]], clients: Clients, minutes: float, left: dict[str, float]
) -> tuple[dict[str, Any], list[str]]:
    before, after = rate(clients, "before", minutes), rate(clients, "after", minutes)
    found: dict[str, Any] = {
        "machine": machine(),
        "minutes": minutes,
        "requests": len(clients.done),
        "errors": clients.errors[:10],
        "requests_per_s_before": before,
        "requests_per_s_after": after,
        "after_over_before": after / before,
        "growth": {key: growth(records, key) for key in MAX_GROWTH},
        "pinned_when_idle": left,
    }
    broken = [f"{len(clients.errors)} requests failed: {clients.errors[0]}"] * bool(clients.errors)
    broken += [
        f"{key} grew by {found['growth'][key]:.1%} (bound: {bound:.0%})"
        for key, bound in MAX_GROWTH.items()
        if found["growth"][key] > bound
    ]
    if after < (1 - MAX_THROUGHPUT_LOSS) * before:
        broken.append(f"throughput after the burst is {after / before:.3f} of before it")
    broken += [f"{n:.0f} tokens stay pinned on {t} when idle" for t, n in left.items() if n]
    return found, broken


def plot(records: Sequence[dict[str, Any]], clients: Clients, began: float, path: Path) -> None:
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
    times = [at - began for at, _ in clients.done]
    axes[3].plot(t, [sum(1 for x in times if a - window < x <= a) / window for a in t])
    axes[3].set_ylabel(f"requests/s (last {window:.0f} s)")
    axes[3].set_xlabel("s")
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
        for phase, _ in PHASES[1:]:
            axis.axvline(next(r["t_s"] for r in records if r["phase"] == phase), color="gray", lw=1)
    figure.savefig(path, dpi=100)


def main() -> int:
    about = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(
        description=about[0],
        epilog="\n\n".join(about[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model-path", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--output", type=Path, default=RESULTS / "soak")
    options = parser.parse_args()

    token_bytes = int(model_of(options.model_path).kv_bytes_per_token)
    sizes = Sizes(PAGE, DEVICE_TOKENS, HOST_TOKENS, 0, token_bytes)
    common = ["--device", "cpu", "--attention-backend", "torch_native", "--dtype", "bfloat16"]
    common += ["--page-size", str(PAGE), "--chunked-prefill-size", "1024", "--enable-metrics"]
    common += ["--skip-server-warmup", "--sleep-on-idle", "--max-running-requests", "16"]
    with tempfile.TemporaryDirectory(prefix="tiered_kv_soak_") as folder:
        scratch = Path(folder)
        log = scratch / "server.log"
        server = SYSTEMS["tiered"].server(options.model_path, common, sizes, scratch, log)
        with server:
            clients = Clients(server.url)
            began = time.monotonic()
            records = soak(server, options.minutes, clients)
            wait_for_disk(server)
            idle = scrape(server)
            left = {tier: idle.of(names.PINNED_TOKENS, tier=tier) for tier in TIERS[:2]}
    found, broken = verdict(records, clients, options.minutes, left)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    document = {**found, "bounds_broken": broken, "records": records}
    options.output.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    plot(records, clients, began, options.output.with_suffix(".png"))
    print(json.dumps(found, indent=1))
    for line in broken:
        print(f"bound broken: {line}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
