"""Holds the simulator against the real server: one workload, three orders of the waiting queue.

    python -m benchmark.simulation.agreement --model-path MODEL

First measures the server's forward passes (`calibrate.py`), then replays a workload on it, one
start per policy, and simulates the same with what was measured. Prints both side by side and writes
`benchmark/results/simulator_agreement.{md,json}`, and `simulator_agreement_server.json` for the
simulator's `--measured`. Exit code 1 if TTFT (mean, p90) or hit tokens of any policy are further
apart than 15%, or the policies rank differently. About ten minutes on two cores, on which nothing
else should run: a reference pass before and after each replay shows whether the machine was as fast
as when it was measured. Run it in the root of the repository.

The workload: questions on six documents of unequal length and popularity come in three waves; the
device's pool holds about half of the documents. A wave takes most of the time until the next
one in the order of arrival, so that policies have a queue to choose from, and an error of the
simulated times is not multiplied by a queue near saturation. The server runs with `--tiered-kv`, so
that forest, eviction and policies are the same on both; nothing is loaded from the host, so that
hits are what the policy made of the device's pool.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from benchmark.replay.client import Client, Options
from benchmark.replay.driver import replay
from benchmark.replay.prompts import PromptMaker, load_tokenizer
from benchmark.replay.records import Record
from benchmark.simulation.agreement_report import (
    REFERENCE_TOKENS,
    Comparison,
    Figures,
    as_json,
    broken,
    report,
)
from benchmark.simulation.calibrate import (
    PAGE_TOKENS,
    SERVER_ARGS,
    Measurements,
    measure,
    measured_server,
    n_probes,
)
from benchmark.simulation.probe import Probe
from openai import AsyncOpenAI
from tqdm import tqdm

from tiered_kv.core.device_spec import find_device
from tiered_kv.simulation.engine import Simulation, SimulationResult
from tiered_kv.simulation.measured_server import MeasuredServer
from tiered_kv.simulation.settings import CacheSettings, InstanceSettings
from tiered_kv.simulation.workload.catalog import open_workload
from tiered_kv.simulation.workload.request import RecordedWorkload

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "test"))

from support.server import Server  # noqa: E402

POLICIES = ("fcfs", "lpm", "k-lpm")
QUESTIONS = (
    "rag,requests=60,documents=6,zipf=1.0,retrieved=1,document_tokens=384,system_tokens=64,"
    "question_tokens=48,output_tokens=6,block_tokens=64,arrivals=at-once"
)
SEED = 8
N_WAVES = 3
#: Seconds between the requests of a wave: all are there before the first has been computed.
SPACING_S = 0.02
#: How much of the time between waves a wave takes in the order of arrival, as simulated.
LOAD = 0.8
POOL_TOKENS = 1792
CHUNK_TOKENS = 1024
MAX_RUNNING = 16
TIER_ARGS = (
    *("--tiered-kv", "--tiered-kv-host-ratio", "1", "--tiered-kv-disk-dir", "none"),
    *("--tiered-kv-load-policy", "never", "--enable-cache-report"),
)
#: Calibration has prefixes of its own, all of which must fit, and wants no policy in its way.
CALIBRATION_ARGS = (
    *(*TIER_ARGS, "--tiered-kv-policy", "fcfs"),
    *("--max-total-tokens", "8192", "--chunked-prefill-size", "2048"),
)
REPLAY_ARGS = (
    *TIER_ARGS,
    *("--max-total-tokens", str(POOL_TOKENS), "--chunked-prefill-size", str(CHUNK_TOKENS)),
    *("--max-prefill-tokens", str(CHUNK_TOKENS), "--max-running-requests", str(MAX_RUNNING)),
)


def waves(interval_s: float) -> RecordedWorkload:
    """The workload, with `interval_s` from one wave's start to the next."""
    source = open_workload(QUESTIONS, SEED)
    requests = list(source.initial())
    per_wave = -(-len(requests) // N_WAVES)
    spread = [
        replace(request, arrival_s=at // per_wave * interval_s + at % per_wave * SPACING_S)
        for at, request in enumerate(requests)
    ]
    return RecordedWorkload("waves", source.block_tokens, spread)


def load_in_words(interval_s: float) -> str:
    """For a report."""
    return (
        f"{len(waves(interval_s))} requests in {N_WAVES} waves, one every {interval_s:.1f} s; "
        f"a pool of {POOL_TOKENS:,} tokens."
    )


def settings_for(server: MeasuredServer, policy: str) -> InstanceSettings:
    """The server of `REPLAY_ARGS`."""
    model = server.model_spec()
    pool_bytes = int(POOL_TOKENS * model.kv_bytes_per_token)
    return server.applied_to(
        InstanceSettings(
            model=model,
            device=find_device("CPU-2"),
            cache=CacheSettings(
                device_bytes=pool_bytes, host_bytes=pool_bytes, load_policy="never"
            ),
            policy=policy,
            chunk_tokens=CHUNK_TOKENS,
            max_prefill_tokens=CHUNK_TOKENS,
            max_running=MAX_RUNNING,
            page_tokens=PAGE_TOKENS,
            max_new_tokens=None,
        )
    )


def interval_for(server: MeasuredServer) -> float:
    """Seconds between waves at which arrivals make the server as busy as `LOAD` says."""
    apart_s = 1e4
    result = Simulation(waves(apart_s), settings_for(server, "fcfs")).run()
    return result.busy_s / N_WAVES / LOAD


def simulate(server: MeasuredServer, policy: str, interval_s: float) -> SimulationResult:
    """The same workload in the simulator."""
    return Simulation(waves(interval_s), settings_for(server, policy)).run()


def simulated(server: MeasuredServer, result: SimulationResult) -> Figures:
    """The simulator's answer; what clients see besides passes and waiting is added to TTFT."""
    found = result.records
    ttfts = [r.ttft_s + server.request_overhead_s for r in found if r.ttft_s is not None]
    if len(ttfts) < len(found):
        raise RuntimeError("the simulated server refused a request that the real one takes")
    return Figures(
        statistics.fmean(ttfts),
        float(np.percentile(ttfts, 90)),
        sum(record.device_hit_tokens for record in found),
        statistics.fmean(r.mean_tbt_s for r in found if r.mean_tbt_s is not None),
        result.end_s,
    )


def measured(records: Sequence[Record]) -> Figures:
    """The same figures of a replay. Raises RuntimeError if a request failed."""
    errors = [record.error for record in records if record.error]
    if errors:
        raise RuntimeError(f"{len(errors)} requests failed, the first: {errors[0]}")
    wrong = [r.request_id for r in records if r.prompt_tokens != r.input_tokens]
    if wrong:
        raise RuntimeError(f"the server counts other lengths than the workload, as of {wrong[:3]}")
    ttfts = [record.ttft_s for record in records if record.ttft_s is not None]
    return Figures(
        statistics.fmean(ttfts),
        float(np.percentile(ttfts, 90)),
        sum(record.cached_tokens or 0 for record in records),
        statistics.fmean(r.tpot_s for r in records if r.tpot_s is not None),
        max(record.sent_s + (record.e2e_s or 0.0) for record in records),
    )


def compare(
    policy: str,
    server: MeasuredServer,
    records: Sequence[Record],
    result: SimulationResult,
    reference_s: tuple[float, ...] = (),
) -> Comparison:
    """A replay and a simulation of the same requests."""
    by_id = {record.request_id: record for record in records}
    requests = tuple(
        {
            "request": s.request_id,
            "prompt_tokens": s.input_tokens,
            "measured_ttft_s": by_id[s.request_id].ttft_s or 0.0,
            "simulated_ttft_s": s.ttft_s or 0.0,
            "measured_hit_tokens": by_id[s.request_id].cached_tokens or 0,
            "simulated_hit_tokens": s.device_hit_tokens,
        }
        for s in result.records
    )
    return Comparison(policy, measured(records), simulated(server, result), requests, reference_s)


async def replay_on(
    url: str,
    model_path: Path,
    workload: RecordedWorkload,
    done: Callable[[Record], None],
    *,
    send_slo: bool = False,
) -> list[Record]:
    """Replay `workload` on the server at `url`, with the model's own tokenizer."""
    maker = PromptMaker(load_tokenizer(model_path), workload.block_tokens)
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as connection:
        listed = await connection.models.list()
        # So that every token is a piece of the stream, end tokens too.
        body = {"skip_special_tokens": False}
        options = Options(model=listed.data[0].id, send_slo=send_slo, body=body)
        client = Client(connection, options)
        overhead = await client.overhead_tokens(maker)
        texts = {request.request_id: maker.text(request, overhead) for request in workload.requests}
        return await replay(
            workload, client.send, lambda request: texts[request.request_id], done=done
        )


def replay_policy(
    model_path: Path, policy: str, workload: RecordedWorkload, log: Path
) -> tuple[list[Record], tuple[float, ...]]:
    """Start the server with `policy`, replay, stop it; also the reference pass's seconds."""
    args = [*SERVER_ARGS, *REPLAY_ARGS, "--tiered-kv-policy", policy]
    bar = tqdm(total=len(workload), unit=" requests", desc=policy)
    with bar, Server(args, log, model_path) as server:
        # Threads and lazily imported code are not measured; prompts are not the workload's.
        probe = Probe(server.url, seed=3)
        probe.ask(probe.tokens(512), 4)
        before_s = reference_s(probe)
        server.flush_cache()
        records = asyncio.run(
            replay_on(server.url, model_path, workload, lambda _: bar.update() and None)
        )
        return records, (before_s, reference_s(probe))


def reference_s(probe: Probe) -> float:
    """Seconds of the reference pass: the median of three, infinite if none could be timed."""
    samples = [probe.prefill(1, REFERENCE_TOKENS, ()) for _ in range(3)]
    return statistics.median(s.seconds for s in samples if s) if any(samples) else math.inf


def run(
    model_path: Path, folder: Path, *, repeats: int = 3
) -> tuple[Measurements, MeasuredServer, float, list[Comparison]]:
    """Calibrate, replay, simulate; logs of the servers go to `folder`."""
    with tqdm(total=n_probes(repeats), unit=" probes", desc="calibrating") as bar:
        args = [*SERVER_ARGS, *CALIBRATION_ARGS]
        with Server(args, folder / "calibrate.log", model_path) as server:
            samples = measure(server.url, repeats=repeats, progress=bar.update)
    times = measured_server(samples)
    interval_s = interval_for(times)
    comparisons = []
    for policy in POLICIES:
        log = folder / f"{policy}.log"
        records, around_s = replay_policy(model_path, policy, waves(interval_s), log)
        result = simulate(times, policy, interval_s)
        comparisons.append(compare(policy, times, records, result, around_s))
    return samples, times, interval_s, comparisons


def main() -> int:
    """Run, print and write."""
    about = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.simulation.agreement",
        description=about[0],
        epilog="\n\n".join(about[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model-path", type=Path, required=True,
        help="folder of the demo model (`./scripts/get_demo_model --where`)",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=3, help="of calibration probes (default 3)")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmark" / "results" / "simulator_agreement",
        help="path of the results without suffix",
    )  # fmt: skip
    options = parser.parse_args()
    began = time.monotonic()
    logs = Path(tempfile.mkdtemp(prefix="tiered_kv_agreement_"))
    print(f"logs: {logs}", file=sys.stderr)
    found = run(options.model_path, logs, repeats=options.repeats)
    samples, server, interval_s, comparisons = found
    text = report(samples, server, load_in_words(interval_s), comparisons)
    options.output.with_suffix(".md").write_text(text)
    document = as_json(samples, interval_s, comparisons)
    options.output.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    server_file = options.output.with_name(f"{options.output.name}_server.json")
    server_file.write_text(json.dumps(server.to_json(), indent=1) + "\n")
    print(text)
    minutes = (time.monotonic() - began) / 60
    print(f"{minutes:.1f} minutes; written: {options.output}.md, .json, {server_file.name}")
    return 1 if broken(comparisons) else 0


if __name__ == "__main__":
    sys.exit(main())
