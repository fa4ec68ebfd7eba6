"""Measures a real server's forward passes and links, for the simulator to take its times from.

    python -m benchmark.simulation.measure --model-path MODEL --out measured.json
    python -m tiered_kv.simulation run --measured measured.json --device-kv 200MB ...

Starts the server itself (nothing else should run on the machine), times prefills over new and
cached tokens and over requests in a pass, decoding over batch and context, and what tiers cost to
read, and fits a line to each. Takes three to five minutes on two cores. Run it in the root of the
repository.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls
from tqdm import tqdm

from benchmark.command_line import parser_of
from benchmark.simulation import links
from benchmark.simulation.probe import DecodeSample, PrefillSample, Probe
from harness.server import Server
from tiered_kv.scheduler.measured_costs import PassTimes
from tiered_kv.simulation.measured_server import MeasuredServer

#: (requests in the pass, new tokens of each, cached tokens of each)
PREFILLS = (
    (1, 64, 0), (1, 256, 0), (1, 512, 0), (1, 1024, 0), (1, 64, 512), (1, 256, 512), (1, 64, 1536),
    (1, 256, 1536), (2, 128, 256), (4, 64, 0), (4, 64, 512),
)  # fmt: skip
#: (requests, cached tokens of each)
DECODES = ((1, 64), (1, 1024), (2, 512), (4, 64), (4, 1024), (8, 512))
DECODE_TOKENS = 12
MODEL_NAME = "SmolLM2-135M"
ELEMENT_BYTES = 4
#: Flags under which the simulator's loop is the server's: see docs/simulation.md.
PAGE_TOKENS = 64
SERVER_ARGS = (
    *("--device", "cpu", "--dtype", "float32", "--page-size", str(PAGE_TOKENS)),
    *("--skip-server-warmup", "--sleep-on-idle", "--disable-overlap-schedule"),
)


@dataclass(frozen=True)
class Measurements:
    """All samples of one server; seconds are medians over the repeats of one setting."""

    prefills: tuple[PrefillSample, ...]
    decodes: tuple[DecodeSample, ...]
    request_overhead_s: float


def measure(url: str, *, repeats: int = 3, progress: Callable[[], object] = int) -> Measurements:
    """Time the passes of the server at `url`, which nobody else uses.

    Repeats take turns, so that a machine that slows down does so for all settings. `progress` is
    called `n_probes(repeats)` times. Raises RuntimeError if a setting could not be measured once.
    """
    probe = Probe(url)
    probe.ask(probe.tokens(64), 4)
    prefixes = {
        n: probe.tokens(n) for n in {*(c for _, _, c in PREFILLS), *(c for _, c in DECODES)}
    }
    prefills: dict[tuple[int, int, int], list[PrefillSample]] = {}
    decodes: dict[tuple[int, int], list[DecodeSample]] = {}
    overheads = []
    for _ in range(repeats):
        for prefix in prefixes.values():
            if prefix:
                probe.ask(prefix)
        for n, new, cached in PREFILLS:
            sample = probe.prefill(n, new, prefixes[cached])
            if sample is not None:
                prefills.setdefault((n, new, cached), []).append(sample)
            progress()
        for n, cached in DECODES:
            passes = probe.decode(n, prefixes[cached], DECODE_TOKENS)
            if passes is not None:
                decodes.setdefault((n, cached), []).append(passes)
            progress()
        overheads.append(probe.ask(probe.tokens(PREFILLS[0][1])).ttft_s)
    missing = [key for key in PREFILLS if key not in prefills]
    missing += [key for key in DECODES if key not in decodes]
    if missing:
        raise RuntimeError(
            f"No probe of {missing} could be timed; is the machine busy with something else?"
        )
    alone_s = statistics.median(s.seconds for s in prefills[PREFILLS[0]])
    return Measurements(
        tuple(_middle(samples) for samples in prefills.values()),
        tuple(_middle(samples) for samples in decodes.values()),
        max(0.0, statistics.median(overheads) - alone_s),
    )


def n_probes(repeats: int = 3) -> int:
    """How many steps `measure` reports."""
    return repeats * (len(PREFILLS) + len(DECODES))


def _middle(samples: list[Any]) -> Any:
    """The sample of median duration (the lower one of two)."""
    return sorted(samples, key=lambda sample: sample.seconds)[(len(samples) - 1) // 2]


def fit(found: Measurements) -> PassTimes:
    """Least squares over relative errors, no coefficient below zero."""
    prefills = [
        (
            1.0,
            len(sample.chunks),
            sum(new for new, _ in sample.chunks),
            sum(new * (cached + (new + 1) / 2) for new, cached in sample.chunks),
            sum(cached for _, cached in sample.chunks),
        )
        for sample in found.prefills
    ]
    decodes = [(1.0, s.n_requests, s.context_tokens) for s in found.decodes]
    fixed, request, token, pair, cached = _fit(prefills, [s.seconds for s in found.prefills])
    decode_fixed, decode_request, context = _fit(decodes, [s.seconds for s in found.decodes])
    return PassTimes(
        prefill_fixed_s=fixed,
        prefill_request_s=request,
        prefill_token_s=token,
        prefill_pair_s=pair,
        prefill_cached_s=cached,
        decode_fixed_s=decode_fixed,
        decode_request_s=decode_request,
        decode_context_s=context,
    )


def _fit(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    scaled = np.array(rows) / np.array(seconds)[:, None]
    size = np.linalg.norm(scaled, axis=0)
    coefficients, _ = nnls(scaled / size, np.ones(len(seconds)))
    return [float(value) for value in coefficients / size]


def residuals(found: Measurements, times: PassTimes) -> list[tuple[str, float, float]]:
    """(setting, measured seconds, fitted seconds)."""
    rows = []
    for sample in found.prefills:
        new, cached = sample.chunks[0]
        fitted = times.prefill_pass_s(sample.chunks)
        name = f"prefill {len(sample.chunks)} x {new} after {cached}"
        rows.append((name, sample.seconds, fitted))
    for passes in found.decodes:
        fitted = times.decode_pass_s(passes.context_tokens, passes.n_requests)
        name = f"decode {passes.n_requests}, {passes.context_tokens} tokens of context"
        rows.append((name, passes.seconds, fitted))
    return rows


def table(rows: Sequence[tuple[str, float, float]]) -> str:
    """The residuals for people, in Markdown."""
    lines = ["| pass | measured, ms | fitted, ms | error |", "|---|---:|---:|---:|"]
    lines += [
        f"| {name} | {1000 * measured:.1f} | {1000 * fitted:.1f} | {fitted / measured - 1:+.1%} |"
        for name, measured, fitted in rows
    ]
    return "\n".join(lines)


def host_name() -> str:
    """The machine, in words."""
    found = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        found = names[0].split(":", 1)[1].strip() if names else found
    return f"{found}, {os.cpu_count()} cores"


def measured_server(found: Measurements, **more: Any) -> MeasuredServer:
    """What the simulator needs of `found`; `more` are links, if measured."""
    return MeasuredServer(
        host=host_name(),
        model=MODEL_NAME,
        element_bytes=ELEMENT_BYTES,
        times=fit(found),
        request_overhead_s=found.request_overhead_s,
        **more,
    )


def _measure_all(
    model_path: Path, folder: Path, repeats: int
) -> tuple[Measurements, list[links.LinkSample]]:
    """Passes on plain SGLang, links on a server with tiers."""
    args = [*SERVER_ARGS, "--max-total-tokens", "16384", "--chunked-prefill-size", "2048"]
    bar = tqdm(total=n_probes(repeats), unit=" probes", desc="passes")
    with bar, Server(args, folder / "passes.log", model_path) as server:
        found = measure(server.url, repeats=repeats, progress=bar.update)
    token_bytes = int(measured_server(found).model_spec().kv_bytes_per_token)
    tier_args = [*SERVER_ARGS, *links.server_args(folder, token_bytes)]
    bar = tqdm(total=links.n_link_probes(), unit=" probes", desc="links")
    with bar, Server(tier_args, folder / "links.log", model_path) as server:
        return found, links.measure_links(server, progress=bar.update)


def main() -> int:
    """Measure and write."""
    parser = parser_of("benchmark.simulation.measure", __doc__)
    parser.add_argument(
        "--model-path", type=Path, required=True,
        help=f"folder of {MODEL_NAME} (`./scripts/get_demo_model --where`)",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=3, help="of each setting (default 3)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tiered_kv_measure_") as folder:
        found, moved = _measure_all(options.model_path, Path(folder), options.repeats)
    host_link, disk = links.host_link(moved), links.disk(moved)
    server_times = measured_server(found, host_link=host_link, disk=disk)
    document = {
        **server_times.to_json(),
        "samples": {**asdict(found), "links": [asdict(sample) for sample in moved]},
    }
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(table(residuals(found, server_times.times)) + "\n")
    for name, bandwidth, latency_s in (
        ("host to device", host_link.bandwidth, host_link.latency_s),
        ("disk to host", disk.read_bandwidth, disk.latency_s),
        ("host to disk", disk.write_bandwidth, disk.latency_s),
    ):
        print(f"{name}: {bandwidth / 1e9:.2f} GB/s, {1000 * latency_s:.1f} ms per transfer")
    print(f"request overhead {1000 * found.request_overhead_s:.1f} ms; written: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
