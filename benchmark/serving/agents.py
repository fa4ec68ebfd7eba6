"""Agents that share instructions and wait for tools: when tasks end, by the order of the queue.

    python -m benchmark.serving.agents --model MODEL          SGLang 0.5.23: 0.5.17 has no hrrn

More agents than the device has room for arrive within seconds. Each makes several calls, every one
with all of its history as text, and between them waits for a tool. Compared, in turns: --tiered-kv
with its own order (slack) and with SGLang's (fcfs, lpm, hrrn), and plain SGLang (fcfs, no tiers).
Slack is asked in three ways, which differ in what callers say and in nothing else:

  named      which program a call is of; after what pause a call follows usually, and how often
  unnamed    nothing; the server sees by itself which call goes on from which (on a server of its
             own: texts that it has seen before would say nothing of programs)
  single     a program name of its own for every call: no order of programs at all

All requests are of class batch, which only slack reads: no token has a deadline that this hardware
could keep, and what counts is when tasks end. Servers stay up and one works at a time; before every
run its caches are emptied; texts are new in each turn, the same for all, and so must be the answers
(greedy). Ratios are within turns. Writes NAME.json and NAME.md. Needs 3.2 GB of memory per server.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import requests
from tqdm import tqdm

from benchmark.command_line import RESULTS, parser_of
from benchmark.serving.multiturn_report import machine
from benchmark.serving.streams import pieces
from benchmark.serving.systems import plain_and_tiered
from harness.demo_model import host_size
from harness.prompts import story
from harness.server import BASE_ARGS, Server
from harness.servers import servers_up

#: Sentences, of about 20 tokens each.
INSTRUCTIONS, TASK, TOOL = 10, 6, 4
KINDS = 3
CALLS = (2, 5)
ANSWER_TOKENS = (6, 20)
ARRIVALS_S, TOOL_S = 0.4, 1.0
PAGE_SIZE = 16
UPSTREAM_ORDERS = ("fcfs", "lpm", "hrrn")
BASELINE = "fcfs"
TIERS = ("device", "host", "disk")


@dataclass(frozen=True)
class System:
    """A server, by name, and what a call says to it of its program."""

    what: str
    server: str
    hints: Callable[[Agent, int], dict[str, Any]] = lambda agent, step: {}  # noqa: ARG005


@dataclass(frozen=True)
class Agent:
    """One task. pauses_s: the tool's, after every call but the last."""

    name: str
    arrival_s: float
    prompt: str
    answer_tokens: tuple[int, ...]
    pauses_s: tuple[float, ...]

    def tool_says(self, step: int) -> str:
        return f"\nTool: {story(f'{self.name} {step}', TOOL)}\nStep {step + 2}:"


def _named(agent: Agent, _step: int) -> dict[str, Any]:
    calls = statistics.mean(CALLS)
    return {
        "session_id": agent.name,
        "next_call_in_s": TOOL_S,
        "next_call_probability": (calls - 1) / calls,
    }


def _single(agent: Agent, step: int) -> dict[str, Any]:
    return {"session_id": f"{agent.name}, call {step}"}


SYSTEMS = {
    "plain": System("plain SGLang, fcfs", "plain"),
    "fcfs": System("--tiered-kv, SGLang's fcfs", "fcfs"),
    "lpm": System("--tiered-kv, SGLang's lpm", "lpm"),
    "hrrn": System("--tiered-kv, SGLang's hrrn", "hrrn"),
    "slack single": System("--tiered-kv, slack, each call a program of its own", "slack", _single),
    "slack unnamed": System("--tiered-kv, slack, callers say nothing of programs", "unnamed"),
    "slack named": System("--tiered-kv, slack, callers name their programs", "slack", _named),
}


@dataclass(frozen=True)
class Call:
    """Times in seconds; tokens of the prompt by the tier that had them."""

    ttft_s: float
    e2e_s: float
    prompt_tokens: int
    device: int
    host: int
    disk: int


@dataclass
class Run:
    """One system in one turn. tasks_s: from an agent's arrival to its last answer, in order."""

    system: str
    turn: int
    tasks_s: list[float]
    calls: list[Call]
    texts: list[str] = field(repr=False)


def agents_of(n: int, seed: str) -> list[Agent]:
    rng = random.Random(seed)
    found, now_s = [], 0.0
    for number in range(n):
        n_calls = rng.randint(*CALLS)
        name = f"{seed} agent {number}"
        instructions = story(f"{seed} instructions {number % KINDS}", INSTRUCTIONS)
        found.append(
            Agent(
                name,
                now_s,
                f"{instructions}\nThese were the instructions.\n{story(name, TASK)}\nStep 1:",
                tuple(rng.randint(*ANSWER_TOKENS) for _ in range(n_calls)),
                tuple(TOOL_S * rng.uniform(0.5, 1.5) for _ in range(n_calls - 1)),
            )
        )
        now_s += rng.expovariate(1 / ARRIVALS_S)
    return found


def work(agent: Agent, url: str, system: System) -> tuple[float, list[Call], str]:
    """The task from its first call to its last answer: seconds, calls, all that was said."""
    time.sleep(agent.arrival_s)
    began, text, calls = time.perf_counter(), agent.prompt, []
    with requests.Session() as session:
        for step, n_tokens in enumerate(agent.answer_tokens):
            body = {
                "text": text,
                "sampling_params": {
                    "temperature": 0,
                    "max_new_tokens": n_tokens,
                    "ignore_eos": True,
                },
                "stream": True,
                "slo": {"class": "batch"},
                "hints": system.hints(agent, step),
            }
            call, answer = ask(url, body, session)
            calls.append(call)
            text += answer
            if step < len(agent.pauses_s):
                time.sleep(agent.pauses_s[step])
                text += agent.tool_says(step)
    return time.perf_counter() - began, calls, text


def ask(url: str, body: dict[str, Any], session: requests.Session) -> tuple[Call, str]:
    asked = time.perf_counter()
    times, answers = zip(*pieces(url, body, session), strict=True)
    ended, meta = time.perf_counter() - asked, answers[-1]["meta_info"]
    details = meta.get("cached_tokens_details") or {}
    host, disk = int(details.get("host") or 0), int(details.get("storage") or 0)
    device = int(meta["cached_tokens"]) - host - disk
    call = Call(times[0] - asked, ended, int(meta["prompt_tokens"]), device, host, disk)
    return call, str(answers[-1]["text"])


def run(name: str, turn: int, agents: Sequence[Agent], server: Server) -> Run:
    """All agents on one server, which begins with empty caches."""
    server.flush_cache()
    if SYSTEMS[name].server != "plain":
        server.post("/hicache/storage-backend/clear").raise_for_status()
    with ThreadPoolExecutor(len(agents)) as pool:
        done = list(pool.map(lambda agent: work(agent, server.url, SYSTEMS[name]), agents))
    calls = [call for _, own, _ in done for call in own]
    return Run(name, turn, [seconds for seconds, _, _ in done], calls, [text for *_, text in done])


def row(name: str, runs: Sequence[Run]) -> dict[str, Any]:
    own = [each for each in runs if each.system == name]
    base = {each.turn: each for each in runs if each.system == BASELINE}
    calls = [call for each in own for call in each.calls]
    tasks = [seconds for each in own for seconds in each.tasks_s]
    prompt = sum(call.prompt_tokens for call in calls)

    def ratio(of: Callable[[Run], float]) -> float:
        pairs = [(of(each), of(base[each.turn])) for each in own if each.turn in base]
        return statistics.median(a / b for a, b in pairs) if pairs else float("nan")

    return {
        "system": name,
        "tasks": len(tasks),
        "task_mean_s": statistics.fmean(tasks),
        "task_p50_s": statistics.median(tasks),
        "task_max_s": max(tasks),
        "task_by_fcfs": ratio(lambda each: statistics.fmean(each.tasks_s)),
        "ttft_mean_s": statistics.fmean(call.ttft_s for call in calls),
        "ttft_p50_s": statistics.median(call.ttft_s for call in calls),
        "ttft_p99_s": float(np.quantile([call.ttft_s for call in calls], 0.99)),
        "ttft_by_fcfs": ratio(lambda each: statistics.fmean(call.ttft_s for call in each.calls)),
        **{f"{tier}_share": sum(getattr(call, tier) for call in calls) / prompt for tier in TIERS},
        "equal": sum(
            a == b
            for each in own
            if each.turn in base
            for a, b in zip(each.texts, base[each.turn].texts, strict=True)
        ),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    head = "| system | task mean, s | p50 | longest | mean / fcfs | TTFT mean, s | p50 | p99 "
    lines = [head + "| mean / fcfs | device, host, disk | equal |", "|---" * 11 + "|"]
    for r in rows:
        shares = ", ".join(
            f"{100 * r[f'{tier}_share']:.0f}%" for tier in ("device", "host", "disk")
        )
        lines.append(
            f"| {r['system']} | {r['task_mean_s']:.1f} | {r['task_p50_s']:.1f} "
            f"| {r['task_max_s']:.1f} | {r['task_by_fcfs']:.2f} | {r['ttft_mean_s']:.2f} "
            f"| {r['ttft_p50_s']:.2f} | {r['ttft_p99_s']:.2f} | {r['ttft_by_fcfs']:.2f} "
            f"| {shares} | {r['equal']} of {r['tasks']} |"
        )
    return "\n".join(lines)


def report(options: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> str:
    what = "\n".join(f"- {name}: {SYSTEMS[name].what}" for name in options.systems)
    return f"""# Agents, by the order of the waiting queue

{options.agents} agents of {KINDS} kinds, {CALLS[0]} to {CALLS[1]} calls each, {ANSWER_TOKENS[0]}
to {ANSWER_TOKENS[1]} tokens an answer, tools of {0.5 * TOOL_S} to {1.5 * TOOL_S} s;
{options.device_tokens:,} tokens on the device, twice as many on the host, a disk, at most
{options.running} requests running; {options.model.name}, float32; {machine()}.
{options.turns} turns, texts new in each. Tasks: from an agent's arrival to its last answer. Ratios
are medians over the turns, each within its turn. *Equal*: tasks whose text is that of fcfs, to the
letter. Shares are of the prompts' tokens.
{options.note}

{what}

{table(rows)}

    python -m benchmark.serving.agents --turns {options.turns} --agents {options.agents} \\
        --device-tokens {options.device_tokens} --running {options.running}
"""


@contextmanager
def servers(options: argparse.Namespace) -> Iterator[dict[str, Server]]:
    """Those that the chosen systems need, up."""
    common = [*BASE_ARGS, "--dtype", "float32", "--page-size", str(PAGE_SIZE)]
    common += ["--max-total-tokens", str(options.device_tokens)]
    common += ["--max-running-requests", str(options.running)]
    tiers = ["--tiered-kv", "--tiered-kv-host-size", host_size(2 * options.device_tokens)]
    needed = {SYSTEMS[name].server for name in options.systems}
    with tempfile.TemporaryDirectory(prefix="tiered_kv_agents_") as folder:
        found = {}
        for name in sorted(needed):
            own = Path(folder) / name
            own.mkdir()
            flags = [*tiers, "--tiered-kv-disk-dir", str(own), "--tiered-kv-disk-size", "4GB"]
            if name in UPSTREAM_ORDERS:
                flags += ["--schedule-policy", name]
            pair = plain_and_tiered(options.model, common, flags, own)
            found[name] = pair["plain" if name == "plain" else "tiered"]
        with servers_up(found, at_once=options.start_at_once) as up:
            yield up


def arguments() -> argparse.Namespace:
    parser = parser_of("benchmark.serving.agents", __doc__)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder of the model")
    add("--turns", type=int, default=3, help="measurements of each system (default: 3)")
    add("--agents", type=int, default=10, help="in a turn (default: 10)")
    add("--device-tokens", type=int, default=2048, help="room for KV there (default: 2048)")
    add("--running", type=int, default=4, help="requests that run at a time, at most (default: 4)")
    names = ", ".join(SYSTEMS)
    add("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), metavar="NAME",
        help=f"of: {names} (default: all)")  # fmt: skip
    add("--start-at-once", action="store_true", help="all servers together, not one by one")
    add("--seed", type=int, default=1)
    add("--note", default="", help="a sentence on the machine, for the report")
    add("--out", type=Path, default=RESULTS / "agents", metavar="NAME")
    return parser.parse_args()


def write(options: argparse.Namespace, runs: Sequence[Run]) -> str:
    """What has been measured so far; returns the table."""
    rows = [row(name, runs) for name in options.systems if any(r.system == name for r in runs)]
    document = {
        "machine": machine(),
        "model": options.model.name,
        "options": {"agents": options.agents, "device_tokens": options.device_tokens,
                    "running": options.running, "turns": options.turns, "seed": options.seed},
        "systems": rows,
        "runs": [{**asdict(each), "texts": len(each.texts)} for each in runs],
    }  # fmt: skip
    options.out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(report(options, rows))
    return table(rows)


def main() -> None:
    options = arguments()
    runs: list[Run] = []
    names = list(options.systems)
    with servers(options) as up, tqdm(total=len(names) * options.turns, desc="runs") as bar:
        # What a server does the first time only; three agents, so that orders learn as well.
        for name in {SYSTEMS[name].server: name for name in names}.values():
            run(name, 0, agents_of(3, f"warm {options.seed}"), up[SYSTEMS[name].server])
        for turn in range(1, options.turns + 1):
            agents = agents_of(options.agents, f"{options.seed} turn {turn}")
            first = (turn - 1) * 3 % len(names)
            for name in names[first:] + names[:first]:
                runs.append(run(name, turn, agents, up[SYSTEMS[name].server]))
                bar.update()
            # After every turn: what was measured is kept if the rest fails.
            text = write(options, runs)
    print(text)


if __name__ == "__main__":
    main()
