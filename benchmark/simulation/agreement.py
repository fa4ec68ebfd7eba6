"""Holds the simulator against the real server: one workload, three orders of the waiting queue.

    python -m benchmark.simulation.agreement --model-path MODEL

First measures the server's forward passes (`measure.py`), then replays a workload on it under
each policy, and simulates the same with what was measured. Prints both side by side and writes
`benchmark/results/simulator_agreement.{md,json}`, and `simulator_agreement_server.json` for the
simulator's `--measured`. Exit code 1 if TTFT (mean, p90) or hit tokens of any policy are further
apart than 15%, or the policies rank differently. About ten minutes on two cores, on which nothing
else should run. Run it in the root of the repository.

The workload: questions on six documents of unequal length and popularity come in waves, each when
the one before has been answered, so that policies have a queue to choose from; the device's pool
holds about half of the documents. All servers are up and take turns, wave by wave. How fast the
machine was meanwhile is taken from each wave's own passes, all prefills together and all decodes
together (`own_passes.py`), and the simulator's passes are scaled by these two factors: so what is
held to 15% is who is computed when, with whom and after which hits. The report says beside it what
follows from reference passes around each wave (`pace.py`), which a machine that others use as well
throws off, and how well single passes fit. The servers run with `--tiered-kv`, so that forest,
eviction and policies are the same on both; nothing is loaded from the host, so that hits are what
the policy made of the device's pool.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from openai import AsyncOpenAI
from tqdm import tqdm

from benchmark.command_line import RESULTS, parser_of
from benchmark.replay.client import Client, Options
from benchmark.replay.driver import replay
from benchmark.replay.prompts import PromptMaker, load_tokenizer
from benchmark.replay.records import Record
from benchmark.simulation.agreement_report import (
    Comparison,
    Figures,
    as_json,
    broken,
    report,
)
from benchmark.simulation.measure import (
    PAGE_TOKENS,
    SERVER_ARGS,
    Measurements,
    measure,
    measured_server,
    n_probes,
)
from benchmark.simulation.own_passes import own_pace, read_passes
from benchmark.simulation.pace import Pace, PaceMaker, at_pace, between, warm_servers
from tiered_kv.core.device_spec import find_device
from tiered_kv.simulation.engine import Simulation
from tiered_kv.simulation.live import RequestRecord
from tiered_kv.simulation.measured_server import MeasuredServer
from tiered_kv.simulation.settings import CacheSettings, InstanceSettings
from tiered_kv.simulation.workload.catalog import open_workload
from tiered_kv.simulation.workload.request import RecordedWorkload

POLICIES = ("fcfs", "lpm", "k-lpm")
QUESTIONS = (
    "rag,requests=60,documents=6,zipf=1.0,retrieved=1,document_tokens=384,system_tokens=64,"
    "question_tokens=48,output_tokens=6,block_tokens=64,arrivals=at-once"
)
SEED = 8
N_WAVES = 3
#: Seconds between the requests of a wave: all are there before the first has been computed.
SPACING_S = 0.02
#: Between waves, when simulated: all of one is answered long before the next.
APART_S = 1e4
POOL_TOKENS = 1792
CHUNK_TOKENS = 1024
MAX_RUNNING = 16
TIER_ARGS = (
    *("--tiered-kv", "--tiered-kv-host-ratio", "1", "--tiered-kv-disk-dir", "none"),
    *("--tiered-kv-load-policy", "never", "--enable-cache-report"),
)
#: Measuring has prefixes of its own, all of which must fit, and wants no policy in its way.
MEASURING_ARGS = (
    *(*TIER_ARGS, "--tiered-kv-policy", "fcfs"),
    *("--max-total-tokens", "8192", "--chunked-prefill-size", "2048"),
)
REPLAY_ARGS = (
    *(*TIER_ARGS, "--chunked-prefill-size", str(CHUNK_TOKENS)),
    *("--max-prefill-tokens", str(CHUNK_TOKENS), "--max-running-requests", str(MAX_RUNNING)),
)


def waves() -> list[RecordedWorkload]:
    """The workload; each wave's times count from its own start."""
    source = open_workload(QUESTIONS, SEED)
    requests = list(source.initial())
    per_wave = -(-len(requests) // N_WAVES)
    return [
        RecordedWorkload(
            "wave",
            source.block_tokens,
            [
                replace(request, arrival_s=at * SPACING_S)
                for at, request in enumerate(requests[start : start + per_wave])
            ],
        )
        for start in range(0, len(requests), per_wave)
    ]


def in_a_row(parts: Sequence[RecordedWorkload]) -> RecordedWorkload:
    """All waves as one workload, each when the one before is answered."""
    requests = [
        replace(request, arrival_s=request.arrival_s + at * APART_S)
        for at, part in enumerate(parts)
        for request in part.requests
    ]
    return RecordedWorkload("waves", parts[0].block_tokens, requests)


def load_in_words() -> str:
    """For a report."""
    n_requests = sum(len(wave) for wave in waves())
    return f"{n_requests} requests in {N_WAVES} waves; a pool of {POOL_TOKENS:,} tokens."


def settings_for(
    server: MeasuredServer, policy: str, pool_tokens: int = POOL_TOKENS
) -> InstanceSettings:
    """The server of `policy_args`."""
    model = server.model_spec()
    pool_bytes = int(pool_tokens * model.kv_bytes_per_token)
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


@dataclass(frozen=True)
class Replayed:
    """One policy's replay, all waves of it."""

    records: list[Record]
    paces: list[Pace]
    """Of each wave's own passes."""
    around: list[Pace]
    """Of reference passes around each wave."""


def simulate(server: MeasuredServer, policy: str, paces: Sequence[Pace]) -> list[RequestRecord]:
    """The same workload in the simulator, with each wave at its own pace."""
    parts, found = waves(), []
    for at, pace in enumerate(paces):
        paced = at_pace(server, pace)
        records = Simulation(in_a_row(parts), settings_for(paced, policy)).run().records
        mine = [r for r in records if at * APART_S <= r.arrival_s < (at + 1) * APART_S]
        found += [_as_seen(record, paced.request_overhead_s, at * APART_S) for record in mine]
    return found


def _as_seen(record: RequestRecord, overhead_s: float, start_s: float) -> RequestRecord:
    """What clients see besides passes and waiting is added; times count from the wave's start."""
    if record.first_token_s is None or record.finish_s is None:
        raise RuntimeError("the simulated server refused a request that the real one takes")
    return replace(
        record,
        arrival_s=record.arrival_s - start_s,
        first_token_s=record.first_token_s + overhead_s - start_s,
        finish_s=record.finish_s + overhead_s - start_s,
    )


def simulated(records: Sequence[RequestRecord]) -> Figures:
    """The simulator's answer."""
    ttfts = [r.ttft_s for r in records if r.ttft_s is not None]
    return Figures(
        statistics.fmean(ttfts),
        float(np.percentile(ttfts, 90)),
        sum(record.device_hit_tokens for record in records),
        statistics.fmean(r.mean_tbt_s for r in records if r.mean_tbt_s is not None),
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
    )


def compare(policy: str, replayed: Replayed, server: MeasuredServer) -> Comparison:
    """A replay, and the same requests simulated."""
    by_id = {record.request_id: record for record in replayed.records}
    found = simulate(server, policy, replayed.paces)
    requests = tuple(
        {
            "request": s.request_id,
            "prompt_tokens": s.input_tokens,
            "measured_ttft_s": by_id[s.request_id].ttft_s or 0.0,
            "simulated_ttft_s": s.ttft_s or 0.0,
            "measured_hit_tokens": by_id[s.request_id].cached_tokens or 0,
            "simulated_hit_tokens": s.device_hit_tokens,
        }
        for s in found
    )
    return Comparison(
        policy,
        measured(replayed.records),
        simulated(found),
        simulated(simulate(server, policy, replayed.around)),
        requests,
        tuple(replayed.paces),
        tuple(replayed.around),
    )


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
        # The demo model's completions add no token; `measured` would notice.
        texts = {request.request_id: maker.text(request, 0) for request in workload.requests}
        return await replay(
            workload, client.send, lambda request: texts[request.request_id], done=done
        )


def policy_args(policy: str, pool_tokens: int = POOL_TOKENS) -> list[str]:
    """Flags of a server on which a workload is replayed. pool_tokens: of the device."""
    pool = ("--max-total-tokens", str(pool_tokens))
    return [*SERVER_ARGS, *REPLAY_ARGS, *pool, "--tiered-kv-policy", policy]


def run(
    model_path: Path, folder: Path, *, repeats: int = 3
) -> tuple[Measurements, MeasuredServer, list[Comparison]]:
    """Measure, replay, simulate; logs of the servers go to `folder`."""
    reference = {"reference": [*SERVER_ARGS, *MEASURING_ARGS]}
    with warm_servers(model_path, reference, folder) as up:
        url = up["reference"].url
        with tqdm(total=n_probes(repeats), unit=" probes", desc="measuring") as bar:
            samples = measure(url, repeats=repeats, progress=bar.update)
        server = measured_server(samples)
        traces = {policy: folder / f"{policy}_trace.json" for policy in POLICIES}
        args_of = {
            policy: [*policy_args(policy), "--tiered-kv-trace-file", str(traces[policy])]
            for policy in POLICIES
        }
        with warm_servers(model_path, args_of, folder) as replayed:
            urls = {policy: replayed[policy].url for policy in POLICIES}
            turns = replay_in_turn(model_path, urls, PaceMaker(url, server))
    comparisons = []
    for policy, waves_of in turns.items():
        passes = read_passes(traces[policy])
        replay_of = Replayed(
            [record for turn in waves_of for record in turn.records],
            [own_pace(passes, turn.start_s, turn.end_s, server.times) for turn in waves_of],
            [turn.around for turn in waves_of],
        )
        comparisons.append(compare(policy, replay_of, server))
    return samples, server, comparisons


@dataclass(frozen=True)
class Turn:
    """One wave on one server; times of `time.perf_counter`."""

    records: list[Record]
    start_s: float
    end_s: float
    around: Pace


def replay_in_turn(
    model_path: Path, urls: Mapping[str, str], pace_maker: PaceMaker
) -> dict[str, list[Turn]]:
    """Every wave on every server, by policy."""
    turns: dict[str, list[Turn]] = {policy: [] for policy in urls}
    parts = waves()
    with tqdm(total=len(urls) * sum(map(len, parts)), unit=" requests") as bar:
        before = pace_maker.measure()
        for wave in parts:
            for policy, url in urls.items():
                bar.set_description(policy)
                start_s = time.perf_counter()
                records = asyncio.run(
                    replay_on(url, model_path, wave, lambda _: bar.update() and None)
                )
                end_s = time.perf_counter()
                after = pace_maker.measure()
                turns[policy].append(Turn(records, start_s, end_s, between(before, after)))
                before = after
    return turns


def main() -> int:
    """Run, print and write."""
    parser = parser_of("benchmark.simulation.agreement", __doc__)
    parser.add_argument(
        "--model-path", type=Path, required=True,
        help="folder of the demo model (`./scripts/get_demo_model --where`)",
    )  # fmt: skip
    parser.add_argument(
        "--repeats", type=int, default=3, help="of the probes that measure the server (default 3)"
    )
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "simulator_agreement",
        help="path of the results without suffix",
    )  # fmt: skip
    options = parser.parse_args()
    began = time.monotonic()
    logs = Path(tempfile.mkdtemp(prefix="tiered_kv_agreement_"))
    print(f"logs: {logs}", file=sys.stderr)
    found = run(options.model_path, logs, repeats=options.repeats)
    samples, server, comparisons = found
    text = report(samples, server, load_in_words(), comparisons)
    options.output.with_suffix(".md").write_text(text)
    document = as_json(samples, comparisons)
    options.output.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    server_file = options.output.with_name(f"{options.output.name}_server.json")
    server_file.write_text(json.dumps(server.to_json(), indent=1) + "\n")
    print(text)
    minutes = (time.monotonic() - began) / 60
    print(f"{minutes:.1f} minutes; written: {options.output}.md, .json, {server_file.name}")
    return 1 if broken(comparisons) else 0


if __name__ == "__main__":
    sys.exit(main())
