"""`python -m tiered_kv.simulation`: run, sweep, compare, report."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm  # type: ignore[import-untyped]

from tiered_kv.core.errors import TieredKVError
from tiered_kv.core.units import parse_bytes
from tiered_kv.simulation import schema, tables
from tiered_kv.simulation.capacity import Capacity, Saturation, best_capacity, saturated_capacity
from tiered_kv.simulation.command_line import add_simulation_arguments, job_from
from tiered_kv.simulation.jobs import Job, run_job, run_jobs
from tiered_kv.simulation.timeline import Timeline

EXAMPLES = """\
examples:
  one run, with a timeline for chrome://tracing or ui.perfetto.dev
    python -m tiered_kv.simulation run --workload chat --policy lpm --rate 2 --timeline trace.json
  the server as it starts
    python -m tiered_kv.simulation run --server-defaults --workload chat --rate 2
  all of a trace's requests on four H200s, with a host tier
    python -m tiered_kv.simulation run --workload mooncake:mooncake_conversation.jsonl --spread 3 \\
      --model Llama-3.1-70B --device 4xH200-141 --host 1TB
  three policies at three loads, relative to what the best of them sustains
    python -m tiered_kv.simulation sweep --workload chat --policies fcfs,lpm,edf \\
      --slo-mix interactive:0.6:0.5:0.05,standard:0.3:2:0.1,batch:0.1:30:- \\
      --loads 0.8,1.0,1.2 --out sweep.json
  hit tokens against the size of the host tier
    python -m tiered_kv.simulation sweep --workload rag --evictions lru,kvflow --hosts 8GB,32GB
  tables and pictures of a sweep, and two result files run by run
    python -m tiered_kv.simulation report sweep.json --out report/
    python -m tiered_kv.simulation compare before.json after.json
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run one command; errors of the user's are one sentence on stderr."""
    options = _parser().parse_args(arguments)
    if getattr(options, "server_defaults", False):
        options = _parser(as_server=True).parse_args(arguments)
    command: Callable[[argparse.Namespace], None] = options.command
    try:
        command(options)
    except TieredKVError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


def _parser(*, as_server: bool = False) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tiered_kv.simulation",
        description="Simulates an inference server under a virtual clock: the real request "
        "policies, prefix forest and memory manager, with a cost model instead of a device.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="simulate once and print the figures")
    add_simulation_arguments(run, as_server=as_server)
    run.add_argument("--out", type=Path, help="write the result, as JSON")
    run.add_argument("--timeline", type=Path, help="write tiers and queues as a Chrome trace")
    run.set_defaults(command=_run)

    sweep = commands.add_parser("sweep", help="simulate every combination of some choices")
    add_simulation_arguments(sweep, as_server=as_server)
    sweep.add_argument("--policies", metavar="A,B", help="request policies, instead of --policy")
    sweep.add_argument("--evictions", metavar="A,B", help="eviction policies")
    sweep.add_argument("--hosts", metavar="A,B", help="sizes of the host tier")
    load = sweep.add_mutually_exclusive_group()
    load.add_argument("--rates", metavar="A,B", help="rates, instead of --rate")
    load.add_argument(
        "--loads",
        metavar="A,B",
        help="rates relative to the capacity of the best combination, which is found first",
    )
    sweep.add_argument(
        "--capacity",
        choices=("saturation", "objectives"),
        default="saturation",
        help="what --loads refer to. saturation: the rate at which a server is busy all the time; "
        "objectives: the highest rate that keeps 90%% of the objectives met on an unloaded server",
    )
    sweep.add_argument("--workers", type=int, default=1, help="processes (default 1)")
    sweep.add_argument("--out", type=Path, required=True, help="where to write the results (JSON)")
    sweep.set_defaults(command=_sweep)

    compare = commands.add_parser("compare", help="ratios of figures, second file to first")
    compare.add_argument("first", type=Path)
    compare.add_argument("second", type=Path)
    compare.set_defaults(command=_compare)

    report = commands.add_parser("report", help="tables and pictures of result files")
    report.add_argument("results", type=Path, nargs="+")
    report.add_argument("--out", type=Path, required=True, help="directory for report.md and PNGs")
    report.set_defaults(command=_report)
    return parser


def _run(options: argparse.Namespace) -> None:
    timeline = Timeline() if options.timeline else None
    job = job_from(options)
    with tqdm(unit=" requests", desc=job.settings.policy) as bar:
        run = run_job(job, progress=lambda n: _advance(bar, n), timeline=timeline)
    sys.stdout.write(tables.results_table([run]))
    if options.out:
        schema.write_results(options.out, [run])
    if timeline is not None:
        options.timeline.write_text(json.dumps(timeline.to_json()))


def _sweep(options: argparse.Namespace) -> None:
    jobs = _combinations(options)
    capacity = None
    rates = [float(rate) for rate in _list(options.rates, str(options.rate))]
    if options.loads:
        with _narrated("finding the capacity") as note:
            found: Capacity | Saturation
            if options.capacity == "saturation":
                found = saturated_capacity(jobs, progress=note)
            else:
                found = best_capacity(jobs, progress=note)
        capacity = {"by": options.capacity, **asdict(found)}
        rates = [found.rate * float(load) for load in options.loads.split(",")]
        sys.stdout.write(f"capacity: {found.best} sustains {found.rate:.3g} times the rate\n")
    planned = [job.at_rate(rate) for rate in rates for job in jobs.values()]
    with tqdm(total=len(planned), unit=" runs", desc="sweep") as bar:
        runs = run_jobs(planned, n_workers=options.workers, progress=lambda: _advance(bar, 1))
    schema.write_results(options.out, runs, capacity)
    sys.stdout.write(tables.results_table(runs))


def _combinations(options: argparse.Namespace) -> dict[str, Job]:
    """Jobs by name, one per policy, eviction and host size."""
    policies = _list(options.policies, options.policy)
    evictions = _list(options.evictions, options.eviction)
    hosts: list[int | None] = [None]
    if options.hosts:
        hosts = [parse_bytes(size) for size in options.hosts.split(",")]
    jobs = {}
    for policy in policies:
        for eviction in evictions:
            for host in hosts:
                parts = [policy]
                parts += [eviction] if len(evictions) > 1 else []
                parts += [f"{host / 1e9:g}GB"] if host is not None and len(hosts) > 1 else []
                name = " ".join(parts)
                chosen = argparse.Namespace(**vars(options))
                chosen.policy, chosen.eviction = policy, eviction
                chosen.host = options.host if host is None else host
                jobs[name] = replace(job_from(chosen), labels={"name": name})
    return jobs


def _compare(options: argparse.Namespace) -> None:
    first, second = (schema.read_results(path) for path in (options.first, options.second))
    sys.stdout.write(tables.comparison_table(first["runs"], second["runs"]))


def _report(options: argparse.Namespace) -> None:
    # Plotting libraries take a second to import; only this command needs them.
    from tiered_kv.simulation.report import write_report

    runs = [run for path in options.results for run in schema.read_results(path)["runs"]]
    sys.stdout.write(f"{write_report(runs, options.out)}\n")


def _advance(bar: tqdm, n: int) -> None:
    bar.update(n)


def _list(text: str | None, default: str) -> list[str]:
    return text.split(",") if text else [default]


@contextmanager
def _narrated(what: str) -> Iterator[Callable[[str], None]]:
    """A line on stderr that shows the latest news."""
    with tqdm(desc=what, unit=" runs") as bar:

        def note(news: str) -> None:
            bar.set_postfix_str(news)
            bar.update()

        yield note


if __name__ == "__main__":
    raise SystemExit(main())
