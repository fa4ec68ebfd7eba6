"""How long agents' sessions take where their contexts do not fit, by who orders their calls.

    python -m benchmark.simulation.working_sets --agents agent_sessions.jsonl

Recorded sessions of coding agents without objectives, on a device alone and with a host behind it,
under first come first served, the orders that know programs, and slack with and without working
sets. Writes simulation_working_sets.json to --out, anew after each run, and .md beside it; runs
that are there are not made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmark.command_line import RESULTS, parser_of
from benchmark.simulation.belief import CAPACITY, TRUTH, simulate_missing
from benchmark.simulation.belief import settings as server
from tiered_kv.scheduler.policies.slack_config import SlackConfig
from tiered_kv.simulation import schema
from tiered_kv.simulation.jobs import Job, WorkloadChoice
from tiered_kv.simulation.tables import Column, Run, markdown, percent, seconds

HOSTS = {"device alone": 0, "device and host": 1}
"""Tokens on the host, as multiples of the device's."""
LOADS = (0.8, 1.0, 1.2, 1.4, 8.0)
ORDERS = ("fcfs", "plas", "program-fcfs", "pausing", "slack, sets off", "slack")


def jobs(agents: Path, sessions: int) -> list[Job]:
    """All of them."""
    found = []
    for host, ratio in HOSTS.items():
        for load in LOADS:
            for order in ORDERS:
                policy = order.split(",")[0]
                of = server(policy, TRUTH)
                n_bytes = int(ratio * of.device_tokens() * of.model.kv_bytes_per_token)
                cache = replace(of.cache, host_bytes=n_bytes, disk_bytes=0)
                config = SlackConfig(working_set=order == "slack")
                workload = WorkloadChoice(
                    spec=f"agent_sessions:{agents},arrivals=poisson:0.05",
                    limit=sessions,
                    turns=12,
                    pause=0.2,
                    rate=CAPACITY["agents"] * load,
                )
                labels = {"host": host, "load": load, "order": order}
                settings = replace(of, cache=cache, slack=config)
                found.append(Job(workload=workload, settings=settings, labels=labels))
    return found


def report(path: Path) -> Path:
    """Markdown beside the result file at `path`; returns its path."""
    runs = schema.read_results(path)["runs"]
    lines = [INTRODUCTION]
    for host in dict.fromkeys(run["labels"]["host"] for run in runs):
        some = [run for run in runs if run["labels"]["host"] == host]
        lines += [f"## {host}", "", markdown(_columns(some), some), ""]
    target = path.with_suffix(".md")
    target.write_text("\n".join(lines))
    return target


def _columns(runs: Sequence[Run]) -> list[Column]:
    def completion_s(run: Run) -> float:
        return float(run["programs"]["completion_s"]["mean"])

    def gain(row: Run) -> str:
        at = [run for run in runs if run["labels"]["load"] == row["labels"]["load"]]
        slack = next((run for run in at if run["labels"]["order"] == "slack"), None)
        return "" if slack is None else f"{completion_s(row) / completion_s(slack):.2f}"

    return [
        ("load", lambda run: f"{run['labels']['load']:g}"),
        ("order", lambda run: run["labels"]["order"]),
        ("a session takes", lambda run: seconds(completion_s(run))),
        ("by slack's", gain),
        ("p99", lambda run: seconds(run["programs"]["completion_s"]["p99"])),
        ("its calls take", lambda run: seconds(run["programs"]["waited_s"]["mean"])),
        ("TTFT mean", lambda run: seconds(run["ttft_s"]["mean"])),
        ("hits", lambda run: percent(1.0 - run["prefill_tokens"] / run["hits"]["input"])),
    ]


INTRODUCTION = f"""\
# Sessions of agents whose contexts do not fit

Made by `python -m benchmark.simulation.working_sets --agents agent_sessions.jsonl`; how the
simulator works, and what it leaves out, is in `docs/simulation.md`.

- Llama-3.1-8B on an H200, 40 recorded sessions of up to 12 calls, pauses times 0.2, no objectives.
  Load 1 is {CAPACITY["agents"]} times the sessions' own rate, as in `simulation_belief.md`; at 8
  nearly all sessions are there at once.
- `sets off`: programs do not pause (`docs/scheduler.md#working-sets`). `pausing` is ThunderAgent's
  way, `plas` Agentix's (`atlas` is the same where the calls of a session follow one another),
  `program-fcfs` Continuum's order.
- `by slack's`: how many times as long a session takes in the mean.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate what is not there yet, write the result file and the report."""
    parser = parser_of("benchmark.simulation.working_sets", __doc__)
    parser.add_argument("--agents", type=Path, help="path of agent_sessions.jsonl")
    parser.add_argument("--out", type=Path, default=RESULTS / "simulation_working_sets.json")
    parser.add_argument("--sessions", type=int, default=40)
    options = parser.parse_args(arguments)
    if options.agents is not None:
        simulate_missing(jobs(options.agents, options.sessions), options.out)
    print(report(options.out))


if __name__ == "__main__":
    main()
