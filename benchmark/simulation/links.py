"""Times the copies between the tiers of a server with `--tiered-kv`, from its own metrics.

Prompts of several lengths go down to host and disk, are pushed out of the device, and come back
from the host; then, after a flush, from the disk. What each link carried and how long it took is
in the server's metrics; one prompt is under way at a time, so no copy waits for another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

from benchmark.simulation.probe import Probe
from harness.metrics import scrape, wait_for_disk
from harness.server import Server
from tiered_kv.metrics import names
from tiered_kv.scheduler.cost_model import EdgeCost
from tiered_kv.simulation.settings import DiskSpec

Edge = tuple[str, str]
EDGES: tuple[Edge, ...] = (
    ("device", "host"), ("host", "device"), ("host", "disk"), ("disk", "host"),
)  # fmt: skip
LENGTHS = (256, 512, 1024)
#: Room for one prompt of the longest, and a little.
DEVICE_TOKENS = 1536
HOST_TOKENS = 16384


@dataclass(frozen=True)
class LinkSample:
    """What one link did during one probe."""

    edge: Edge
    n_bytes: float
    n_transfers: float
    seconds: float


def server_args(folder: Path, token_bytes: int) -> list[str]:
    """Flags of a server to be measured, beside those of every server that is measured."""
    return [
        *("--tiered-kv", "--tiered-kv-load-policy", "always", "--enable-metrics"),
        *("--tiered-kv-policy", "fcfs"),
        *("--tiered-kv-host-size", f"{HOST_TOKENS * token_bytes}B"),
        *("--tiered-kv-disk-dir", str(folder / "disk"), "--tiered-kv-disk-size", "4GB"),
        *("--max-total-tokens", str(DEVICE_TOKENS), "--chunked-prefill-size", "2048"),
    ]


def measure_links(
    server: Server, *, repeats: int = 2, progress: Callable[[], object] = int
) -> list[LinkSample]:
    """Every link, with every length. `progress` is called `n_link_probes(repeats)` times.

    Raises RuntimeError if a link carried nothing, or support's ServerError if the disk hangs.
    """
    probe, samples = Probe(server.url, seed=2), list[LinkSample]()
    for length in LENGTHS * repeats:
        prompt, other = probe.tokens(length), probe.tokens(DEVICE_TOKENS - 128)
        steps: list[Callable[[], object]] = [
            partial(probe.ask, [*prompt, 1]),
            partial(probe.ask, other),
            partial(probe.ask, [*prompt, 2]),
            server.flush_cache,
            partial(probe.ask, [*prompt, 3]),
        ]
        for step in steps:
            samples += _during(server, step)
            progress()
    missing = {edge for edge in EDGES if not any(s.edge == edge for s in samples)}
    if missing:
        raise RuntimeError(f"The links {sorted(missing)} carried nothing; see the server's log.")
    return samples


def n_link_probes(repeats: int = 2) -> int:
    """How many steps `measure_links` reports."""
    return repeats * len(LENGTHS) * 5


def _during(server: Server, step: Callable[[], object]) -> list[LinkSample]:
    """What every link did while `step` was carried out, and until all was quiet again."""
    before = scrape(server)
    step()
    time.sleep(1.2)  # gauges are refreshed once a second
    wait_for_disk(server)
    after = scrape(server)
    samples = []
    for source, target in EDGES:

        def moved(name: str, source: str = source, target: str = target) -> float:
            labels = {"source": source, "target": target}
            return after.value(name, **labels) - before.value(name, **labels)

        n_bytes = moved(names.TRANSFER_BYTES.name)
        seconds = names.TRANSFER_SECONDS.name
        if n_bytes > 0:
            samples.append(
                LinkSample(
                    (source, target), n_bytes, moved(f"{seconds}_count"), moved(f"{seconds}_sum")
                )
            )
    return samples


def fit_link(samples: Sequence[LinkSample], edge: Edge) -> EdgeCost:
    """Latency per transfer and bandwidth: least squares over relative errors, none below zero."""
    found = [sample for sample in samples if sample.edge == edge]
    seconds = np.array([sample.seconds for sample in found])
    rows = np.array([(sample.n_transfers, sample.n_bytes) for sample in found]) / seconds[:, None]
    size = np.linalg.norm(rows, axis=0)
    latency_s, s_per_byte = nnls(rows / size, np.ones(len(found)))[0] / size
    # All in the latency: so quick that the lengths probed don't show it.
    fastest = max(sample.n_bytes / sample.seconds for sample in found)
    bandwidth = 1.0 / s_per_byte if s_per_byte > 0 else 10.0 * fastest
    return EdgeCost(float(bandwidth), float(latency_s))


def host_link(samples: Sequence[LinkSample]) -> EdgeCost:
    """Between host and device, as loads have it."""
    return fit_link(samples, ("host", "device"))


def disk(samples: Sequence[LinkSample]) -> DiskSpec:
    """Of the disk tier; reads and writes share the reads' latency."""
    read, write = fit_link(samples, ("disk", "host")), fit_link(samples, ("host", "disk"))
    return DiskSpec(
        read_bandwidth=read.bandwidth, write_bandwidth=write.bandwidth, latency_s=read.latency_s
    )
