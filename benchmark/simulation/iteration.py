"""Who decodes in an iteration: the choice by slack against decoding everyone, on H200s.

    python -m benchmark.simulation.iteration --out benchmark/results

Simulates an 8B model on one H200 and a 70B model on four, with requests of three classes (60%
interactive, 30% standard, 10% batch) over contexts from 4k to 256k tokens: private ones, ones that
eight requests share, without and with cascade attention, and contexts that grow with the class's
patience. Writes simulation_iteration.json, a report and plots. The 102 runs took 25 minutes as one
process on a busy machine with two cores; --only takes some scenarios, --resume adds what is
missing, --report makes the report alone. Run it in the root of the repository.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmark.command_line import RESULTS
from benchmark.simulation.iteration_report import MODELS, report
from tiered_kv.core.device_spec import find_device
from tiered_kv.core.model_spec import find_model
from tiered_kv.scheduler.iteration_config import IterationConfig
from tiered_kv.scheduler.policies.slack_config import SlackConfig
from tiered_kv.simulation.engine import Simulation
from tiered_kv.simulation.settings import InstanceSettings
from tiered_kv.simulation.statistics import summarize
from tiered_kv.simulation.workload.request import RecordedWorkload, Request

BLOCK_TOKENS = 512
CLASSES = ("interactive", "standard", "batch")
SHARES = (0.6, 0.3, 0.1)
TARGETS = {
    "fast": {"interactive": 0.025, "standard": 0.1, "batch": None},
    "default": {"interactive": 0.05, "standard": 0.1, "batch": None},
}
"""Token objectives in seconds. fast: 40 tokens/s; default: those a server has by itself."""
ORDER: dict[str, Any] = {"policy": "slack", "slack": SlackConfig(mix_decodes=False)}
POLICIES: dict[str, dict[str, Any]] = {
    "sglang": {"policy": "fcfs"},
    "all": ORDER,
    "chunks": {
        **ORDER,
        "iteration_policy": "slack",
        "iteration": IterationConfig(select=False),
    },
    "round-robin": {**ORDER, "iteration_policy": "round-robin"},
    "slack": {**ORDER, "iteration_policy": "slack"},
    "relegate": {
        **ORDER,
        "iteration_policy": "slack",
        "iteration": IterationConfig(relegate=True),
    },
}
"""sglang: its default order and chunks. All others: the request policy slack, which sizes chunks by
the mean decode slack; who decodes differs. chunks: all decode, but prefill also keeps each single
token in time, as it does under slack and relegate. Nobody decodes beside prefill."""


@dataclass(frozen=True)
class Scenario:
    """One workload on one model."""

    name: str
    model: str
    contexts_tokens: tuple[int, int, int]
    """Of each class."""
    gang: int = 1
    """Requests that share a context."""
    cascade: bool = False
    targets: str = "fast"
    load: float = 0.8
    """Of what the device can do if all decode in full batches, by the cost model."""
    output_tokens: float = 600.0
    """Median of an answer's length (log-normal, sigma 0.5)."""
    n_requests: int = 50
    backlog: int = 0
    """Batch requests that are there from the start, with answers four times as long; then nobody
    else is of that class."""


def scenarios() -> Iterator[Scenario]:
    """All of the report."""
    by_class = (4096, 32768, 131072)
    for model, contexts, shared in (
        ("8B", (4096, 16384, 65536, 262144), (16384, 65536)),
        ("70B", (16384, 65536), (65536,)),
    ):
        for context in contexts:
            n = max(16, min(200, (1 << 21) // context))
            yield Scenario(f"private {context >> 10}k", model, (context,) * 3, n_requests=n)
        for context in shared:
            for cascade in (False, True):
                name = f"shared {context >> 10}k" + ", cascade" * cascade
                same = (context,) * 3
                yield Scenario(name, model, same, gang=8, cascade=cascade, n_requests=64)
        yield Scenario("4k, 32k, 128k by class", model, by_class, load=0.6)
    beside = Scenario(
        "4k beside 24 jobs of 32k", "8B", (4096, 4096, 32768), load=0.25, n_requests=150, backlog=24
    )
    yield beside
    same = (16384,) * 3
    yield Scenario("private 16k, 50 ms", "8B", same, targets="default", n_requests=100)
    full = {"load": 1.0, "output_tokens": 1500.0, "n_requests": 100}
    yield Scenario("private 16k, long answers", "8B", same, **full)  # type: ignore[arg-type]


def settings_of(scenario: Scenario) -> InstanceSettings:
    model, device = MODELS[scenario.model]
    return InstanceSettings(
        model=find_model(model), device=find_device(device), cascade=scenario.cascade
    )


def rate_of(scenario: Scenario, settings: InstanceSettings) -> tuple[float, float]:
    """(requests per second at the scenario's load, seconds of an iteration of a full batch)."""
    costs, gang = settings.costs(), scenario.gang
    context = float(np.dot(SHARES, scenario.contexts_tokens))
    own = context / gang + scenario.output_tokens / 2
    n = min(settings.max_running, settings.device_tokens() / own)
    read = n * (context + scenario.output_tokens / 2)
    saved = n * context * (1 - 1 / gang) if scenario.cascade else 0.0
    full_s = costs.iteration_s((), int(read), max(1, int(n)), int(saved))
    prefill_s = sum(
        share * costs.marginal_prefill_s(tokens)
        for share, tokens in zip(SHARES, scenario.contexts_tokens, strict=True)
    )
    work_s = prefill_s / gang + scenario.output_tokens * full_s / n
    return scenario.load / work_s, full_s


def workload_of(scenario: Scenario, settings: InstanceSettings, seed: int) -> RecordedWorkload:
    """Poisson arrivals; a gang's members come within seconds. First tokens have time to spare."""
    rate, _ = rate_of(scenario, settings)
    costs = settings.costs()
    random = np.random.default_rng(seed)
    n_gangs = -(-scenario.n_requests // scenario.gang)
    starts = np.cumsum(random.exponential(scenario.gang / rate, n_gangs))
    requests = []
    shares = np.array(SHARES) if not scenario.backlog else np.array((*SHARES[:2], 0.0))
    for index in range(scenario.n_requests):
        gang, is_backlog = index // scenario.gang, index < scenario.backlog
        kind = 2 if is_backlog else int(random.choice(3, p=shares / shares.sum()))
        tokens = scenario.contexts_tokens[kind]
        prefill_s = costs.prefill_s(tokens)
        base = (gang + 1) << 24
        n_blocks = tokens // BLOCK_TOKENS
        answer = scenario.output_tokens * random.lognormal(0.0, 0.5) * (4 if is_backlog else 1)
        arrival_s = starts[gang] + (random.exponential(1.0) if scenario.gang > 1 else 0.0)
        wait_s = (2.0 + 4.0 * prefill_s, 10.0 + 10.0 * prefill_s, None)[kind]
        requests.append(
            Request(
                request_id=index,
                arrival_s=0.0 if is_backlog else float(arrival_s),
                blocks=array("q", range(base, base + n_blocks)),
                input_tokens=n_blocks * BLOCK_TOKENS + 60,
                output_tokens=max(16, int(answer)),
                session=None,
                slo_class=CLASSES[kind],
                ttft_slo_s=wait_s,
                tbt_slo_s=TARGETS[scenario.targets][CLASSES[kind]],
            )
        )
    return RecordedWorkload(scenario.name, BLOCK_TOKENS, requests)


Job = tuple[Scenario, str, int]
"""Scenario, policy, seed."""


def run(job: Job) -> dict[str, Any]:
    """One simulation: the figures of the report."""
    scenario, policy, seed = job
    settings = settings_of(scenario)
    workload = workload_of(scenario, settings, seed)
    result = Simulation(workload, replace(settings, **POLICIES[policy])).run()
    rate, full_s = rate_of(scenario, settings)
    figures = summarize(result)
    kept = (
        "attainment",
        "goodput_rps",
        "output_tokens_per_s",
        "duration_s",
        "n_iterations",
        "n_retractions",
        "busy_share",
    )
    classes = {
        name: {
            **{key: own[key] for key in ("n_requests", "attainment", "ttft_attainment")},
            **{key: own[key] for key in ("tbt_attainment", "late_gap_share")},
            "mean_tbt_p50_s": own["mean_tbt_s"]["p50"],
            "p99_tbt_p50_s": own["p99_tbt_s"]["p50"],
            "ttft_p50_s": own["ttft_s"]["p50"],
        }
        for name, own in figures["classes"].items()
    }
    return {
        "scenario": asdict(scenario),
        "policy": policy,
        "seed": seed,
        "rate_rps": rate,
        "full_batch_s": full_s,
        **{key: figures[key] for key in kept},
        "busy_tokens_per_s": sum(r.output_tokens for r in result.records) / result.busy_s,
        "classes": classes,
    }


def main() -> None:
    """Simulate what was asked for and write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", help="only scenarios whose model and name contain this text")
    parser.add_argument("--seeds", type=int, default=1, help="workloads per scenario (default 1)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--resume", action="store_true", help="keep the runs already in --out")
    parser.add_argument("--report", action="store_true", help="only write the report again")
    options = parser.parse_args()
    path = options.out / "simulation_iteration.json"
    if not options.report:
        options.out.mkdir(parents=True, exist_ok=True)
        runs = json.loads(path.read_text())["runs"] if options.resume and path.exists() else []
        for one in simulated(_todo(options, runs), options.workers):
            runs.append(_rounded(one))
            path.write_text(json.dumps({"runs": runs}, indent=1) + "\n")
    print(report(path))


def _todo(options: argparse.Namespace, done: list[dict[str, Any]]) -> list[Job]:
    """What was asked for and is not in `done`."""
    known = [(json.dumps(one["scenario"]), one["policy"], one["seed"]) for one in done]
    return [
        (scenario, policy, seed)
        for scenario in scenarios()
        for policy in POLICIES
        for seed in range(options.seeds)
        if (not options.only or options.only in f"{scenario.model} {scenario.name}")
        and (json.dumps(asdict(scenario)), policy, seed) not in known
    ]


def simulated(jobs: list[Job], n_workers: int) -> Iterator[dict[str, Any]]:
    """The figures of each, with a progress bar."""
    if n_workers <= 1:
        yield from tqdm(map(run, jobs), total=len(jobs), unit=" runs")
        return
    with multiprocessing.get_context("spawn").Pool(n_workers) as pool:
        yield from tqdm(pool.imap(run, jobs), total=len(jobs), unit=" runs")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return value


if __name__ == "__main__":
    main()
