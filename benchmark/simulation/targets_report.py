"""The report of `targets.py`: what was to be shown, and the tables it is read from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tiered_kv.simulation import schema
from tiered_kv.simulation.tables import Column, Run, markdown, percent, seconds

OF_PROGRAMS = ("plas", "atlas", "program-fcfs", "pausing")
"""Baselines that order whole programs."""
GOODPUT_TARGET, COMPLETION_TARGET, PROGRAMS_TARGET = 1.5, 1.5, 1.2
TOP_LOAD, CROWDED = 1.2, 8.0
"""At the second nearly all sessions of agents are there at once."""
ALONE = "alone"
"""Sessions one after the other, each with the server to itself."""


def report(path: Path) -> Path:
    """Markdown beside the result file at `path`; returns its path."""
    runs = schema.read_results(path)["runs"]
    lines, details = [INTRODUCTION, "## What was to be shown", ""], list[str]()
    for key in dict.fromkeys((run["labels"]["traffic"], run["labels"]["model"]) for run in runs):
        some = [run for run in runs if (run["labels"]["traffic"], run["labels"]["model"]) == key]
        scaled = of(some, part="scaled")
        if not of(scaled, name="slack"):
            continue
        title = f"{scaled[0]['workload']['name']}, {scaled[0]['settings']['model']}"
        title += f" on {scaled[0]['settings']['device']}"
        lines += [f"**{title}**", "", *_targets(scaled, of(some, part=ALONE)), ""]
        details += [f"## {title}", "", *_section(some), ""]
    target = path.with_suffix(".md")
    target.write_text("\n".join([*lines, *details]))
    return target


def of(runs: Sequence[Run], **labels: object) -> list[Run]:
    """Those with such labels."""
    return [run for run in runs if all(run["labels"][k] == v for k, v in labels.items())]


def _baselines(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run["labels"]["name"] != "slack"]


def _best(runs: Sequence[Run]) -> Run:
    return max(_baselines(runs), key=lambda run: run["goodput_rps"])


def _loads(runs: Sequence[Run]) -> list[float]:
    return sorted({run["labels"]["load"] for run in of(runs, name="slack")})


def _calls_s(run: Run) -> float:
    return float(run["programs"]["waited_s"]["mean"])


def _completion_s(run: Run) -> float:
    return float(run["programs"]["completion_s"]["mean"])


def _gain(run: Run, runs: Sequence[Run]) -> float:
    """Goodput of `run` over that of the best baseline at its load."""
    best = _best(of(runs, load=run["labels"]["load"]))
    return float(run["goodput_rps"] / best["goodput_rps"])


def _targets(runs: Sequence[Run], alone: Sequence[Run]) -> list[str]:
    """Each target for one trace and model: met or missed, by the least over what is believed."""
    slack = of(runs, name="slack")
    top = of(runs, load=TOP_LOAD)
    best = _best(top)
    gain = min(_gain(run, runs) for run in of(top, name="slack"))
    worst = min(slack, key=lambda run: _gain(run, runs))
    lines = [
        (
            f"- {_verdict(gain >= GOODPUT_TARGET)} goodput at {TOP_LOAD:g}, at least "
            f"{GOODPUT_TARGET} of the best baseline's: {gain:.2f} of {best['labels']['name']}'s, "
            f"which meets {percent(best['attainment'])}: no order can meet more than "
            f"{1.0 / best['attainment']:.2f} times as many."
        ),
        (
            f"- {_verdict(_gain(worst, runs) >= 1.0)} goodput never below the best baseline's: at "
            f"least {_gain(worst, runs):.3f} (load {worst['labels']['load']:g}, belief "
            f"{worst['labels']['bias']:g})."
        ),
    ]
    longest = max(slack, key=lambda run: run["wait_s"]["max"])
    lines.append(
        f"- Longest wait for admission under slack: {seconds(longest['wait_s']['max'])} (load "
        f"{longest['labels']['load']:g})."
    )
    if best["programs"]["completion_s"]["n"]:
        for load in (TOP_LOAD, CROWDED):
            lines += _completion_targets(of(runs, load=load), load, alone)
    return lines


def _completion_targets(runs: Sequence[Run], load: float, alone: Sequence[Run]) -> list[str]:
    """Of sessions at `load`, by the slowest over what is believed; and what could be had at all."""
    if not runs:
        return []
    slack = max(of(runs, name="slack"), key=_completion_s)
    (fcfs,) = of(runs, name="fcfs")
    known = min((r for r in runs if r["labels"]["name"] in OF_PROGRAMS), key=_completion_s)
    lines = []
    for other, target in ((fcfs, COMPLETION_TARGET), (known, PROGRAMS_TARGET)):
        gain = _completion_s(other) / _completion_s(slack)
        lines.append(
            f"- {_verdict(gain >= target)} sessions done sooner at {load:g} than under "
            f"{other['labels']['name']}, by {target}: by {gain:.2f} "
            f"({seconds(_completion_s(other))} against {seconds(_completion_s(slack))}); the part "
            f"that callers do not spend themselves, by {_calls_s(other) / _calls_s(slack):.2f}."
            + "".join(
                f" With the server to itself a session takes {seconds(_completion_s(run))}: no "
                f"order can be sooner by more than {_completion_s(other) / _completion_s(run):.2f}."
                for run in alone
            )
        )
    return lines


def _verdict(is_met: bool) -> str:
    return "Met:" if is_met else "**Missed:**"


def _section(runs: Sequence[Run]) -> list[str]:
    """The tables of one trace and model."""
    scaled, fixed, off = (of(runs, part=part) for part in ("scaled", "fixed", "off"))
    lines = [f"{scaled[0]['n_requests']} requests. Goodput by that of the best baseline:", ""]
    lines += [_gains(scaled)]
    for load in _loads(scaled):
        lines += [f"### Load {load:g}", "", markdown(_columns(scaled), of(scaled, load=load))]
    if fixed:
        lines += [f"### Fixed objectives, load {TOP_LOAD:g}", ""]
        lines += [markdown(_columns(fixed), fixed)]
    if off:
        whole = of(scaled, name="slack", load=TOP_LOAD, bias=1.0)
        lines += [f"### Parts switched off in turn, load {TOP_LOAD:g}", ""]
        lines += [markdown(_columns(off), [*whole, *off])]
    return lines


def _gains(runs: Sequence[Run]) -> str:
    """A row for each load."""

    def gain(bias: float) -> Column:
        def cell(row: Run) -> str:
            found = of(runs, name="slack", load=row["labels"]["load"], bias=bias)
            return f"{_gain(found[0], runs):.2f}" if found else ""

        return f"slack, belief {bias:g}", cell

    best: Callable[[Run], Run] = lambda row: _best(of(runs, load=row["labels"]["load"]))  # noqa: E731
    rows = [of(runs, name="slack", load=load)[0] for load in _loads(runs)]
    columns: list[Column] = [
        ("load", lambda row: f"{row['labels']['load']:g}"),
        ("best baseline", lambda row: str(best(row)["labels"]["name"])),
        ("it meets", lambda row: percent(best(row)["attainment"])),
        *(gain(bias) for bias in sorted({run["labels"]["bias"] for run in runs})),
    ]
    return markdown(columns, rows)


def _columns(runs: Sequence[Run]) -> list[Column]:
    def name(run: Run) -> str:
        labels = run["labels"]
        is_biased = labels["name"] == "slack" and labels["part"] == "scaled"
        return f"{labels['name']}, belief {labels['bias']:g}" if is_biased else labels["name"]

    columns: list[Column] = [
        ("order", name),
        ("goodput/s", lambda run: f"{run['goodput_rps']:.3f}"),
        ("met", lambda run: percent(run["attainment"])),
        ("TTFT mean", lambda run: seconds(run["ttft_s"]["mean"])),
        ("p99", lambda run: seconds(run["ttft_s"]["p99"])),
        ("longest wait", lambda run: seconds(run["wait_s"]["max"])),
        ("hits", lambda run: percent(1.0 - run["prefill_tokens"] / run["hits"]["input"])),
    ]
    if runs[0]["programs"]["completion_s"]["n"]:
        columns += [
            ("a session takes", lambda run: seconds(_completion_s(run))),
            ("its calls take", lambda run: seconds(_calls_s(run))),
        ]
    return columns


INTRODUCTION = """\
# Slack against every baseline, under an honest belief

Made by `python -m benchmark.simulation.targets --mooncake mooncake_conversation.jsonl --agents
agent_sessions.jsonl`; how the simulator works, and what it leaves out, is in `docs/simulation.md`,
where the baselines come from as well. These are simulated figures: a roofline with assumed
efficiencies, not measurements.

- Llama-3.1-8B on an H200, 70B on four; 256 GB of host memory for each, 4 TB of disk; LRU behind
  the queue's forecast, loads by cost, for all orders. Passes vary by 10%, and nobody is told.
- The traces are cut to their beginnings: 400 requests of mooncake_conversation for 8B, 300 for
  70B; 24 sessions of agents, their first 12 calls, pauses times 0.2. The hundred requests from
  which a server learns are counted.
- A belief of 0.7: prefill, decoding and links are taken for 0.7 of what they are at first, and
  learned by the server's own calibrator. `slack` has each belief; of the baselines only `niyama`
  and `sliding-serve` ask what things take, and they start from the right one.
- Objectives: interactive 60% (0.25 s and 3 times the prompt's own unloaded prefill; TBT 50 ms),
  standard 30% (1 s and 6 times; 100 ms), batch 10% (15 s and 20 times). Fixed ones: 0.5 s, 2 s and
  30 s.
- Load 1 is the capacity of the best baseline in `simulation_baselines.md`. Agents wait for their
  own answers: their server is behind only while many sessions are under way. At 8 nearly all of
  them are there at once. What they do is nearly the same at every belief: passes of the first
  sessions are learned from before others come.
- `atlas` is `plas` here: the calls of these sessions follow one another.
- The longest wait is bounded in work, not in seconds (`docs/scheduler.md#nobody-starves`), which
  `test/property/test_scheduler_aging.py` checks.
"""
