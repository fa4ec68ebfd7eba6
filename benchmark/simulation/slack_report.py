"""The report of `slack.py`: targets, tables and pictures over its result files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tiered_kv.simulation import plots, schema
from tiered_kv.simulation.tables import Run, percent, results_table, seconds

GOODPUT_TARGET = 1.5
VIOLATIONS_TARGET = 0.1


def report(directory: Path) -> Path:
    """`simulation_slack.md` over the result files in `directory`."""
    lines = [INTRODUCTION]
    summary: list[str] = []
    details: list[str] = []
    for path in sorted(directory.glob("simulation_slack-*.json")):
        own = schema.read_results(path)["runs"]
        known = schema.read_results(directory / _baselines(path.stem))
        rate = known["capacity"]["rate"]
        baselines = [run for run in known["runs"] if run["labels"]["part"] == "orders"]
        for run in baselines:
            run["labels"]["load"] = round(run["workload"]["rate"] / rate, 2)
        summary += targets(own, baselines)
        details += section(path.stem, own, baselines, directory)
    target = directory / "simulation_slack.md"
    target.write_text("\n".join([*lines, "## Targets", "", *summary, *details]))
    return target


def _baselines(stem: str) -> str:
    """Name of the file with the baselines of the same trace and model."""
    return stem.replace("slack-", "").replace("-", "_") + ".json"


def title_of(run: Run) -> str:
    settings = run["settings"]
    return f"{run['workload']['name']}, {settings['model']} on {settings['device']}"


def at(runs: list[Run], load: float, part: str | None = None) -> list[Run]:
    """Those at `load`, of one part if it is named."""
    return [
        run
        for run in runs
        if abs(run["labels"]["load"] - load) < 0.01 and part in {None, run["labels"]["part"]}
    ]


def targets(own: list[Run], baselines: list[Run]) -> list[str]:
    """Each target for one trace and model, met or missed by how much."""
    name: Callable[[Run], str] = lambda run: run["labels"]["name"]  # noqa: E731
    by_load = {load: at(own, load, "orders") for load in (0.8, 1.0, 1.2)}
    slack = {load: _named(runs, "slack") for load, runs in by_load.items()}
    others = {load: at(baselines, load) for load in slack}
    best = max(others[1.2], key=lambda run: run["goodput_rps"])
    goodput = slack[1.2]["goodput_rps"] / best["goodput_rps"]
    fcfs = _named(others[1.2], "fcfs")
    missed, fcfs_missed = 1 - slack[1.2]["attainment"], 1 - fcfs["attainment"]
    alone = [run for run in own if run["labels"]["part"] == "alone"]
    floor = "".join(
        f" {percent(1 - run['attainment'])} are missed even with next to no load." for run in alone
    )
    tail = min(others[0.8], key=lambda run: run["ttft_s"]["p99"])
    p99 = slack[0.8]["ttft_s"]["p99"]
    means = ", ".join(
        f"{seconds(slack[load]['ttft_s']['mean'])} against "
        f"{seconds(_named(others[load], 'lpm')['ttft_s']['mean'])} at {load}"
        for load in slack
    )
    is_sooner = all(
        slack[load]["ttft_s"]["mean"] <= _named(others[load], "lpm")["ttft_s"]["mean"]
        for load in slack
    )
    plain = max((run for run in others[1.2] if not _mixes(run)), key=lambda run: run["goodput_rps"])
    unmixed = [
        f"{run['labels']['name']} {run['goodput_rps'] / plain['goodput_rps']:.2f}"
        for run in at(own, 1.2, "off")
        if "mixing off" in run["labels"]["name"]
    ]
    retracted = max(run["retracted_share"] for run in slack.values())
    return [
        f"**{title_of(best)}**",
        "",
        (
            f"- {_verdict(goodput >= GOODPUT_TARGET)} goodput at 1.2, at least {GOODPUT_TARGET} of "
            f"the best baseline's: {goodput:.2f} of {name(best)}'s "
            f"({slack[1.2]['goodput_rps']:.3f} against {best['goodput_rps']:.3f} requests/s)."
        ),
        (
            f"- {_verdict(missed <= VIOLATIONS_TARGET * fcfs_missed)} violations at 1.2, at most "
            f"{VIOLATIONS_TARGET} of fcfs's: {percent(missed)} against {percent(fcfs_missed)}, or "
            f"{missed / fcfs_missed:.2f}.{floor}"
        ),
        (
            f"- {_verdict(p99 <= tail['ttft_s']['p99'])} p99 TTFT at 0.8, no worse than the best "
            f"baseline's: {seconds(p99)} against {name(tail)}'s {seconds(tail['ttft_s']['p99'])}."
        ),
        f"- {_verdict(is_sooner)} mean TTFT no worse than lpm's: {means}.",
        (
            f"- {_verdict(retracted <= 0.001)} retractions, at most 0.1% of requests: "
            f"{percent(retracted)} at most."
        ),
        (
            f"- Against {name(plain)}, the best baseline that does not mix prefill and decode, "
            f"goodput at 1.2: {', '.join(unmixed) or 'not simulated'}."
        ),
        "",
    ]


def _mixes(run: Run) -> bool:
    return bool(run["settings"]["mixed_chunk"]) or run["settings"]["policy"] == "niyama"


def _named(runs: list[Run], name: str) -> Run:
    return next(run for run in runs if run["labels"]["name"] == name)


def _verdict(is_met: bool) -> str:
    return "Met:" if is_met else "**Missed:**"


def section(stem: str, own: list[Run], baselines: list[Run], directory: Path) -> list[str]:
    """Tables and pictures of one trace and model."""
    orders = [run for run in own if run["labels"]["part"] in {"orders", "caches"}]
    title = title_of(own[0])
    lines = [f"## {title}", ""]
    for load in (0.8, 1.0, 1.2):
        runs = at(orders, load) + at(baselines, load)
        lines += [f"### Load {load}", "", results_table(runs)]
    top = _named(at(orders, 1.2), "slack")
    off = [run for run in own if run["labels"]["part"] == "off"]
    if off:
        lines += ["### Load 1.2, each part off in turn", "", results_table([top, *off])]
    compared = [*orders, *baselines]
    pictures = {
        "goodput": lambda path: plots.plot_goodput(compared, path, title),
        "classes": lambda path: plots.plot_classes(at(compared, 1.2), path, f"{title}, load 1.2"),
        "wait": lambda path: plots.plot_wait_tail(at(compared, 0.8), path, f"{title}, load 0.8"),
    }
    for name, draw in pictures.items():
        draw(directory / f"{stem}-{name}.png")
        lines += [f"![{name}]({stem}-{name}.png)", ""]
    return lines


INTRODUCTION = """\
# The policy slack in simulation

Made by `python -m benchmark.simulation.slack --mooncake mooncake_conversation.jsonl --agents
agent_sessions.jsonl --out benchmark/results`, from the baselines, workloads and objectives of
`simulation_baselines.md`; what the policy does is in `docs/scheduler.md`, how the simulator works
and what it leaves out in `docs/simulation.md`. These are simulated figures: a roofline with assumed
efficiencies, not measurements.

- Loads are multiples of the capacity of the best baseline. `slack` has the cache of the baselines
  (LRU, loads always); `own cache` loads where that is quicker. Both pass over what the forecast
  expects.
- `slack` and `niyama` decode in the iterations that prefill. The cost model lets arithmetic and
  memory traffic of an iteration overlap perfectly, which flatters that; `mixing off` is without.
- `slack` may send a prompt that was begun back to the queue (its whole blocks stay cached), which
  no baseline does; `putting back off` is without.

Parts that a section lacks have not been simulated yet; `--resume` adds them.

Why it comes out so:

- Most goodput comes from choosing who can be in time, and from keeping the hopeless behind them:
  long prompts are most of the work but few of the requests. `slack off` is close to fcfs.
- A long prompt under way blocks everyone for seconds, whatever the order: hence `putting back off`.
- Violations cannot fall below what a server misses with next to no load: prompts whose own prefill
  takes longer than their objective. That floor alone is more than a tenth of what fcfs misses.
- Agents wait for their own answers, so that their server is never far behind, and baselines meet
  most of what can be met: there is less to gain than where arrivals do not wait.
- The price is paid by long prompts beyond hope, which wait until nobody can be helped: the p99 of
  TTFT. Where a baseline has a shorter tail, it is because it lets more requests miss.
- `aging off` has a lower mean and a longer tail: nobody is overdue, the shortest goes first.
- Gangs change little here, because requests that wait at the same moment seldom have an uncached
  prefix in common, and what is cached comes back from the host sooner than a deadline passes. Where
  many ask about one document at once the prefix is computed once (`test/simulation/test_plans.py`).
- The forecast changes little either: the pool is large against what runs, nothing is retracted in
  any order, and a device that is full leaves no free pages to load ahead into.
"""
