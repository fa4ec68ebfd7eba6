"""How often should a request make way for others who wait, and keep its KV?

    python -m benchmark.simulation.making_way

Simulates an 8B model on an H200 with a KV pool of a few GB: jobs without objectives hold it, and
requests of the classes interactive and standard come. For each number of times that one request may
be asked (`SWAPS_MAX`): how many went, who was in time, first tokens, and how long all of it took.
Ratios are geometric means over workloads, to never. Four minutes on a core.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from benchmark.simulation.iteration import POLICIES, Scenario, settings_of, workload_of
from tiered_kv.simulation import decode_selection
from tiered_kv.simulation.engine import Simulation
from tiered_kv.simulation.settings import GB
from tiered_kv.simulation.statistics import summarize

TIMES = (0, 1, 2, 3)
POOLS = ((8, 12, 400.0), (16, 24, 800.0))
"""GB of KV on the device, jobs, and tokens of a short answer in the median; a job's is 4 times as
long."""
LOADS = (0.25, 0.5, 0.7)
PROMPT_TOKENS = 4096


def run(pool: tuple[int, int, float], load: float, seed: int, times: int) -> dict[str, Any]:
    """The figures of one simulation."""
    size_gb, n_jobs, output_tokens = pool
    scenario = Scenario(
        f"{n_jobs} jobs",
        "8B",
        (PROMPT_TOKENS,) * 3,
        load=load,
        output_tokens=output_tokens,
        n_requests=120,
        backlog=n_jobs,
    )
    settings = settings_of(scenario)
    cache = replace(settings.cache, device_bytes=size_gb * GB, host_bytes=64 * GB)
    workload = workload_of(scenario, settings, seed)
    decode_selection.SWAPS_MAX = times
    chosen = replace(settings, **POLICIES["slack"], swap=True, cache=cache)
    return summarize(Simulation(workload, chosen).run())


def row(times: int, runs: Sequence[dict[str, Any]], never: Sequence[dict[str, Any]]) -> str:
    """A line of the table."""

    def ratio(*path: str) -> float:
        return math.exp(
            sum(
                math.log(_at(one, path) / _at(other, path))
                for one, other in zip(runs, never, strict=True)
            )
            / len(runs)
        )

    attained = sum(one["attainment"] for one in runs) / len(runs)
    return (
        f"| {times} | {sum(one['n_swaps'] for one in runs)} | {attained:.1%} | "
        f"{ratio('goodput_rps'):.3f} | {ratio('ttft_s', 'mean'):.3f} | {ratio('duration_s'):.3f} |"
    )


def _at(figures: Any, path: Sequence[str]) -> float:
    for key in path:
        figures = figures[key]
    return float(figures)


def main() -> None:
    """Simulate and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="workloads of each kind (default 3)")
    options = parser.parse_args()
    kinds = list(itertools.product(POOLS, LOADS, range(options.seeds)))
    jobs = tqdm([(times, kind) for times in TIMES for kind in kinds], unit=" runs")
    runs: dict[int, list[dict[str, Any]]] = {times: [] for times in TIMES}
    for times, kind in jobs:
        runs[times].append(run(*kind, times))
    print(f"{len(kinds)} workloads")
    print("| times | made way | in time | goodput | TTFT mean | all done |")
    print("|---|---|---|---|---|---|")
    for times in TIMES:
        print(row(times, runs[times], runs[0]))


if __name__ == "__main__":
    main()
