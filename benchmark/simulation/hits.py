"""What of the hits that an infinite cache finds is found behind long queues.

    python -m benchmark.simulation.hits --mooncake mooncake_conversation.jsonl \
        --agents agent_sessions.jsonl

The same requests, below and beyond what one server bears, under orders that make them wait for
different times, with a disk that holds everything; and as it was when stores were asked on a
request's arrival only. Pages are as small as a server's. Writes simulation_hits.json, anew after
each run, and .md beside it; runs that are there are not made again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from benchmark.command_line import RESULTS, parser_of
from benchmark.simulation.baselines import MODELS
from benchmark.simulation.belief import MIXES, TRUTH, add_traffic, choices, simulate_missing
from benchmark.simulation.targets import CAPACITY, settings
from tiered_kv.simulation import schema
from tiered_kv.simulation.hit_bound import chain, in_order, infinite_hits
from tiered_kv.simulation.jobs import Job, WorkloadChoice
from tiered_kv.simulation.settings import InstanceSettings
from tiered_kv.simulation.tables import Column, Run, markdown, percent, seconds

POLICIES = ("fcfs", "hrrn", "niyama", "slack")
LOADS = (0.8, 1.2, 1.4)
PAGE_TOKENS = 64
"""A server's, and of the sessions of agents as they are; Mooncake's blocks have 512."""
AGAIN, ONCE = "again before its turn", "on arrival only"


def jobs(options: argparse.Namespace) -> list[Job]:
    """All of them, with what an infinite cache finds among their labels."""
    found = []
    for (traffic, choice), model, load in product(
        choices(options).items(), options.models, options.loads
    ):
        rated = replace(
            choice,
            rate=CAPACITY[traffic, model] * load,
            slo_mix=MIXES["scaled"],
            page_tokens=PAGE_TOKENS if traffic == "mooncake" else None,
        )
        infinite = infinite_tokens(rated, settings("fcfs", model, TRUTH))
        for policy in options.policies:
            for asked in (AGAIN, ONCE) if policy in options.once else (AGAIN,):
                of = settings(policy, model, TRUTH)
                of = replace(of, cache=replace(of.cache, look_again=asked == AGAIN))
                labels = {"traffic": traffic, "model": model, "load": load, "policy": policy}
                labels = {**labels, "asked": asked, "infinite_tokens": infinite}
                found.append(Job(workload=rated, settings=of, labels=labels))
    return found


def infinite_tokens(choice: WorkloadChoice, of: InstanceSettings) -> int:
    """Prompt tokens that a cache without limit finds, if each request is answered at once."""
    workload = choice.open(of.costs().prefill_s)
    requests = in_order(workload, lambda _: 0.0)
    size = workload.block_tokens
    work = chain(requests, size, with_partial=False, with_outputs=True)
    return infinite_hits(work) * size


def kept(run: Run) -> float:
    """Prompt tokens that were not computed, over those that an infinite cache finds."""
    return float((run["hits"]["input"] - run["prefill_tokens"]) / run["labels"]["infinite_tokens"])


def report(path: Path) -> Path:
    """Markdown beside the result file at `path`; returns its path."""
    runs = schema.read_results(path)["runs"]
    lines = [INTRODUCTION]
    for key in dict.fromkeys(_section(run) for run in runs):
        some = sorted((run for run in runs if _section(run) == key), key=_place)
        share = some[0]["labels"]["infinite_tokens"] / some[0]["hits"]["input"]
        settings = some[0]["settings"]
        lines += [f"## {key[0]}, {settings['model']} on {settings['device']}", ""]
        lines += [f"{some[0]['n_requests']} requests; an infinite cache finds {share:.1%}.", ""]
        lines += [markdown(COLUMNS, some), ""]
    target = path.with_suffix(".md")
    target.write_text("\n".join(lines))
    return target


def _section(run: Run) -> tuple[str, str]:
    return run["labels"]["traffic"], run["labels"]["model"]


def _place(run: Run) -> tuple[float, str, str]:
    labels = run["labels"]
    return labels["load"], labels["policy"], labels["asked"]


def _label(name: str) -> Column:
    return name, lambda run: str(run["labels"][name])


COLUMNS: list[Column] = [
    _label("load"),
    _label("policy"),
    _label("asked"),
    ("of the infinite cache's", lambda run: percent(kept(run))),
    ("objectives met", lambda run: percent(run["attainment"])),
    ("TTFT mean", lambda run: seconds(run["ttft_s"]["mean"])),
    ("until all are answered", lambda run: seconds(run["duration_s"])),
]

INTRODUCTION = """\
# Hits behind long queues

Made in parts by `python -m benchmark.simulation.hits` with `--mooncake mooncake_conversation.jsonl
--requests 800 --policies fcfs hrrn slack --once fcfs`, and with `--agents agent_sessions.jsonl
--sessions 24 --policies fcfs slack --once`, at load 1 `slack` alone; of 70B `--models 70b
--requests 300 --policies fcfs slack --once`. How the simulator works, and what it leaves out, is in
`docs/simulation.md`.

- Llama-3.1-8B on one H200, 70B on four; 256 GB of host memory for each, 4 TB of disk, scaled
  objectives. Load 1 is the capacity of the best baseline in `simulation_baselines.md`.
- `of the infinite cache's`: prompt tokens that were not computed, over those that a cache without
  limit finds in the very same requests, each answered at once. (A part of a trace has fewer to be
  found than the whole: 36.6% are those of all 12,031 requests of mooncake_conversation.)
- `again before its turn` is what server and simulator do: of whoever waits and has lost what was
  cached of it, the stores are asked once more when its turn is near. `on arrival only` is without.
- Pages have 64 tokens, as a server's. Mooncake's blocks of 512 are cut into such: what a prompt
  that is put back, or ends, has of a block is cached but for less than a page.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate, write the result file and the report."""
    parser = parser_of("benchmark.simulation.hits", __doc__)
    add_traffic(parser, n_requests=1000)
    parser.add_argument("--out", type=Path, default=RESULTS / "simulation_hits.json")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=("8b",))
    parser.add_argument("--loads", type=float, nargs="+", default=LOADS)
    parser.add_argument("--policies", nargs="+", default=POLICIES)
    parser.add_argument("--once", nargs="*", default=POLICIES, help="those run without as well")
    options = parser.parse_args(arguments)
    simulate_missing(jobs(options), options.out)
    print(report(options.out))


if __name__ == "__main__":
    main()
