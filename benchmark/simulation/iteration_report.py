"""The report of `iteration.py`: where choosing who decodes wins, and at what price."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

from tiered_kv.core.device_spec import find_device
from tiered_kv.core.model_spec import find_model
from tiered_kv.scheduler.iteration_pace import throughput_share
from tiered_kv.scheduler.prefill_room import CAUTION
from tiered_kv.simulation.settings import InstanceSettings

Run = dict[str, Any]
POLICIES = ("sglang", "all", "chunks", "round-robin", "slack", "relegate")
COMPARED = ("sglang", "chunks", "round-robin", "slack", "relegate")
#: Goodput that differs by less is called equal.
NEUTRAL = 0.02
MODELS = {"8B": ("Llama-3.1-8B", "H200-141"), "70B": ("Llama-3.1-70B", "4xH200-141")}


def report(path: Path) -> Path:
    """The report and plots beside the result file `path`."""
    groups = _groups(json.loads(path.read_text())["runs"])
    target = path.with_suffix(".md")
    _plot(groups, path.with_name(f"{path.stem}-goodput.png"), "goodput")
    _plot(groups, path.with_name(f"{path.stem}-tbt.png"), "interactive TBT")
    lines = [INTRODUCTION, "## Where it wins", "", *_verdicts(groups), ""]
    lines += [FINDINGS, ""]
    lines += [f"![goodput]({path.stem}-goodput.png)", "", f"![tbt]({path.stem}-tbt.png)", ""]
    lines += ["## What it costs", "", *_prices(groups), "", "## All figures", ""]
    for name, runs in groups.items():
        lines += [f"### {name}", "", *_table(runs), ""]
    target.write_text("\n".join(lines))
    return target


def _groups(runs: list[Run]) -> dict[str, dict[str, Run]]:
    """By scenario, then policy; only scenarios with all policies."""
    groups: dict[str, dict[str, Run]] = {}
    for run in runs:
        scenario = run["scenario"]
        groups.setdefault(f"{scenario['model']}, {scenario['name']}", {})[run["policy"]] = run
    whole = {name: runs for name, runs in groups.items() if set(POLICIES) <= set(runs)}
    return dict(sorted(whole.items(), key=lambda item: (not item[0].startswith("8B"), item[0])))


def _verdicts(groups: dict[str, dict[str, Run]]) -> list[str]:
    """Goodput against decoding everyone in the same order, and against SGLang's defaults."""
    lines = [
        GOODPUT_NOTE,
        "",
        "| scenario | all | " + " | ".join(COMPARED) + " |",
        "|---|---|" + "---|" * len(COMPARED),
    ]
    for name, runs in groups.items():
        base = runs["all"]
        cells = [f"{base['attainment']:.0%}"]
        for policy in COMPARED:
            run = runs[policy]
            ratio = _ratio(run["goodput_rps"], base["goodput_rps"])
            cell = f"{run['attainment']:.0%}, {ratio:.2f}"
            cells.append(f"**{cell}**" if abs(ratio - 1.0) > NEUTRAL else cell)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _prices(groups: dict[str, dict[str, Run]]) -> list[str]:
    """Tokens per busy second against what the bytes of a full batch say."""
    lines = [
        PRICE_NOTE,
        "",
        "| scenario | full batch, T | d | said | chunks | slack | relegate |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, runs in groups.items():
        any_run = runs["all"]
        model, device = MODELS[any_run["scenario"]["model"]]
        costs = InstanceSettings(model=find_model(model), device=find_device(device)).costs()
        tightest_s = CAUTION * (0.05 if any_run["scenario"]["targets"] == "default" else 0.025)
        full_s = any_run["full_batch_s"]
        said = 1.0
        if full_s > tightest_s:
            said = throughput_share(costs.iteration_s((), 0, 1), tightest_s, full_s)
        shares = [
            _ratio(runs[policy]["busy_tokens_per_s"], any_run["busy_tokens_per_s"])
            for policy in ("chunks", "slack", "relegate")
        ]
        cells = " | ".join(f"{share:.2f}" for share in shares)
        lines.append(
            f"| {name} | {1e3 * full_s:.0f} ms | {1e3 * tightest_s:.1f} ms | {said:.2f} | {cells} |"
        )
    return lines


def _table(runs: dict[str, Run]) -> list[str]:
    one = runs["all"]
    scenario = one["scenario"]
    lines = [
        (
            f"Contexts of {'/'.join(str(n) for n in scenario['contexts_tokens'])} tokens, "
            f"{scenario['gang']} to a context, {scenario['n_requests']} requests at "
            f"{one['rate_rps']:.3g}/s (load {scenario['load']}), answers of "
            f"{scenario['output_tokens']:.0f} tokens in the median."
        ),
        "",
        TABLE_HEAD,
        "|---|---|---|---|---|---|---|---|",
    ]
    for policy in POLICIES:
        run = runs[policy]
        classes = run["classes"]
        cells = [
            policy,
            f"{run['attainment']:.0%}",
            f"{run['goodput_rps']:.3f}",
            f"{run['output_tokens_per_s']:.0f}",
            f"{run['n_iterations']}",
            _cell(
                classes.get("interactive"), "tbt_attainment", "late_gap_share", "ttft_attainment"
            ),
            _cell(classes.get("standard"), "tbt_attainment", "ttft_attainment"),
            _milliseconds(classes.get("batch")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _cell(figures: Run | None, *names: str) -> str:
    return "" if figures is None else ", ".join(f"{figures[name]:.0%}" for name in names)


def _milliseconds(figures: Run | None) -> str:
    seconds = None if figures is None else figures["mean_tbt_p50_s"]
    return "" if seconds is None else f"{1e3 * seconds:.0f} ms"


def _ratio(value: float, base: float) -> float:
    return value / base if base else float("nan")


def _plot(groups: dict[str, dict[str, Run]], path: Path, what: str) -> None:
    """Bars by scenario and policy."""
    mpl.use("Agg")
    figure, axes = plt.subplots(figsize=(8, 0.55 * len(groups) + 1.5))
    policies = COMPARED if what == "goodput" else POLICIES
    height = 0.8 / len(policies)
    for at, policy in enumerate(policies):
        values = [
            _ratio(runs[policy]["goodput_rps"], runs["all"]["goodput_rps"])
            if what == "goodput"
            else runs[policy]["classes"]["interactive"]["tbt_attainment"]
            for runs in groups.values()
        ]
        places = [row + (at - len(policies) / 2 + 0.5) * height for row in range(len(groups))]
        axes.barh(places, values, height, label=policy)
    axes.set_yticks(range(len(groups)), list(groups), fontsize=8)
    axes.invert_yaxis()
    if what == "goodput":
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_xlabel("goodput as a multiple of all's")
    else:
        axes.set_xlabel("share of interactive requests whose mean time between tokens is in time")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


FINDINGS = """\
Read with care: in most rows a handful of requests decides between 90% and 94%.

- **What wins most is not who decodes but when prompts are computed between two decodes**, and
  that takes no choice of who does (`all`): a prefill waits for up to four decodes if these gain
  it room for a piece that is worth a pass. Against `sglang` that is 1.7 times the goodput with
  private contexts of 64k and 256k and 1.3 where contexts differ by class (8B; 2.1 with 64k and
  1.4 by class on 70B). When prefill had its turn after every decode, with 256 tokens at least,
  the same rows of `all` had 59%, 62%, 66%, 38% and 62% in time, little more than `sglang`'s.
- **Keeping each next token in time rather than the mean** (`chunks`, `slack`) was worth 1.5 to 1.6
  against that, and is worth nothing now: 0.89 to 1.06. While nobody who waits is in a hurry its
  pieces of prefill are down to half as efficient, which shortens gaps, not means.
- **Parking wins where running requests are too many for the tightest objective.** Contexts of 16k
  that eight share, each reading its own copy: 1.40 times the goodput, 91% of all in time instead
  of 64%, at 1% of the tokens. Jobs of 32k without an objective beside short interactive requests:
  1.14, 99% instead of 87%, at no loss of tokens. (1.04 and 1.08 when throughput counted as scarce
  wherever prompts waited. Now it does where first tokens need more than a quarter of the time that
  they have.) `relegate`, which gives up a few interactive requests so that the others are in time,
  brings no more. It is a matter of bursts and backlogs: where load is steady and can be served at
  all, small prefills already keep the batch at a size that is in time, and nobody needs to be
  parked.
- **Where single requests are large, little can be saved**: of contexts of 64k that eight share,
  eight fill 25 ms. Taking turns without asking whether it pays (`round-robin`) is worst of all
  there.
- **Neutral** where all fits: on the 8B model private contexts of 4k, 16k and 256k, and objectives
  of 50 ms (the memory of an H200 is read in 33 ms). One class alone is never divided, so neutral
  by construction.
- **With cascade attention decodes gain room as well**, if what a gang shares is counted once when
  room is made: contexts of 64k that eight share have 86% in time (8B) and 77% (70B), whoever is
  asked. Counted for each, as it was, no decode seemed to gain any, and 55% and 50% were.
- **It loses where the load is more than can be served at the tightest objective**: on the 70B
  model private contexts of 16k at 0.8 of what full batches sustain (0.93 of `all`'s goodput),
  private contexts of 64k (0.89) and contexts by class (0.88). An iteration of 25 ms there sustains
  0.75 or less of what a full batch does, and smaller pieces of prefill take their part: `chunks`,
  which parks nobody, loses as much. Token objectives give way when two or more who wait would be
  late for their sake.
- **The price** in tokens per second is 0 to 5% for `slack` and up to 11% for `relegate`; the table
  below holds that against what the bytes say.
"""
TABLE_HEAD = (
    "| policy | in time | goodput, 1/s | tokens/s | iterations | interactive: TBT met, gaps late, "
    "TTFT met | standard: TBT met, TTFT met | batch: mean TBT |"
)
GOODPUT_NOTE = f"""\
Share of the requests that met both objectives, and goodput (such requests per second of the whole
run, to its last token) as a multiple of `all`'s, in bold where that differs by more than
{NEUTRAL:.0%}."""
PRICE_NOTE = """\
Output tokens per second in which a pass ran, as a share of `all`'s. *Said* is the share that full
iterations at the tightest objective, d, give of what one over a full batch, T, gives:
(1 - f/d) / (1 - f/T), f being the fixed part of an iteration with the weights it reads; 1 if the
full batch is in time. It is the price at full memory: less where memory is not full, more where
prefill runs in smaller pieces."""
INTRODUCTION = """\
# Choosing who decodes, in simulation

Made by `python -m benchmark.simulation.iteration --out benchmark/results`; what the policies do is
in `docs/scheduler.md`, how the simulator works and what it leaves out in `docs/simulation.md`.
These are simulated figures: a roofline with assumed efficiencies, one random workload of 16 to 200
requests for each row, no measurements. Differences of a few requests mean nothing.

Classes: interactive 60% with 25 ms between tokens (50 ms in the row that says so), standard 30%
with 100 ms, batch 10% without; first-token objectives are a multiple of each prompt's own prefill,
so that long contexts are not late by themselves. Prefill and decode run in separate passes.

| name | order of the queue | prefill | who decodes |
|---|---|---|---|
| sglang | fcfs | 8,192 tokens at a time | everyone |
| all | slack | what the *mean* pace of running requests leaves | everyone |
| chunks | slack | what each *next token* leaves | everyone |
| round-robin | slack | as all | turns by age, within the tightest objective |
| slack | slack | as chunks | by slack, at a pace that all objectives allow |
| relegate | slack | as chunks | the same; those who do not fit are given up |
"""
