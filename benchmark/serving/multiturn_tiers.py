"""The next turn of a conversation, by where the KV of all that was said before is.

    python -m benchmark.serving.multiturn_tiers --model-path MODEL

The same systems as multiturn.py, and its requests: a chat adds 256 tokens to --history tokens, an
agent 64. The next turn comes

  device     right after the one before it
  host       after others have pushed the conversation out of the device's pool
  disk       after others have pushed it out of the host's as well
  restart    after the server was stopped and started

Pools are sized for that; where the KV was found is in the table. All servers are up at once, one
works at a time, and they take turns after every request, in an order drawn anew each time. Times
are to the first token, at the client. Needs a machine without an accelerator, 3.2 GB of memory per
system, and SGLang 0.5.23 or 0.5.17.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import requests
from tqdm import tqdm

from benchmark.command_line import RESULTS, parser_of
from benchmark.serving.conversations import Conversation, Load, Sample, Shape
from benchmark.serving.multiturn import ELEMENT_BYTES, SETTLE_S, SHAPES, servers, warm_up
from benchmark.serving.multiturn_report import machine
from benchmark.serving.systems import SYSTEMS, Sizes, model_of
from harness.server import Server
from harness.servers import servers_up

LOADS = ("chat", "agent")
PLACES = ("device", "host", "disk", "restart")
USUAL = ("plain", "hicache_file_wait_complete", "tiered")
ANSWER_TOKENS = 4
#: For the last pages to reach the disk before a server is stopped.
WRITES_S = 3.0


@dataclass(frozen=True)
class Found:
    """A conversation's second turn on one system."""

    place: str
    load: str
    number: int
    system: str
    sample: Sample


@dataclass(frozen=True)
class Talk:
    """One conversation, on every system."""

    place: str
    load: str
    number: int
    on: Mapping[str, Conversation]


def shape_of(load: str, options: argparse.Namespace) -> Shape:
    turn_tokens = int(SHAPES[load]["turn_tokens"])
    return Shape(options.conversations, 2, options.history, turn_tokens, ANSWER_TOKENS)


def pool_sizes(options: argparse.Namespace) -> Sizes:
    """In whole pages, as the cache keeps them. Both turns of those who come right away fill the
    device, so that what came before them is out of it; the host has them, those who are to be found
    there, and little else."""
    page = options.page_size
    shapes = [shape_of(load, options) for load in LOADS]
    both_turns, first_turns = (
        sum(tokens // page * page * options.conversations for tokens in each)
        for each in (
            [shape.longest_tokens for shape in shapes],
            [shape.first_tokens for shape in shapes],
        )
    )
    host = 2 * both_turns + page * len(shapes) * options.conversations
    model = model_of(options.model_path, ELEMENT_BYTES[options.dtype])
    limit = 2 * len(PLACES) * both_turns
    assert host < both_turns + 2 * first_turns, "who is to be on disk would stay on the host"
    return Sizes(page, both_turns, host, limit, int(model.kv_bytes_per_token))


def talks(options: argparse.Namespace, place: str) -> list[Talk]:
    return [
        Talk(
            place,
            load,
            number,
            {
                name: Conversation(
                    shape_of(load, options),
                    random.Random(f"{options.seed}/{place}/{load}/{number}"),
                )
                for name in options.systems
            },
        )
        for number in range(options.conversations)
        for load in LOADS
    ]


class Clients:
    """Asks all servers the same, in turns."""

    def __init__(self, up: Mapping[str, Server], seed: int, bar: Any) -> None:
        self._up = up
        self._random = random.Random(seed)
        self._bar = bar

    def ask(self, asked: Iterable[Talk]) -> list[Found]:
        """The next turn of each."""
        found = []
        for talk in asked:
            for name in self._random.sample(list(self._up), len(self._up)):
                with requests.Session() as session:
                    sample = talk.on[name].ask(self._up[name].url, session)
                found.append(Found(talk.place, talk.load, talk.number, name, sample))
                self._bar.update()
                time.sleep(SETTLE_S)
        return found


def restart(up: Mapping[str, Server], load: Load) -> None:
    time.sleep(WRITES_S)
    for server in up.values():
        server.stop()
    for server in up.values():
        server.launch()
    for server in up.values():
        server.wait_until_up()
        warm_up(server.url, load)


def measure(
    options: argparse.Namespace, up: Mapping[str, Server], load: Load
) -> Iterator[list[Found]]:
    """The second turns of one place after the other."""
    waiting = {place: talks(options, place) for place in PLACES}
    n_asks = 2 * sum(map(len, waiting.values())) * len(up)
    with tqdm(total=n_asks, desc="requests", unit="req") as bar:
        clients = Clients(up, options.seed, bar)
        for place in ("disk", "restart", "host"):
            clients.ask(waiting[place])
        right_away = []
        for talk in waiting["device"]:
            clients.ask([talk])
            right_away += clients.ask([talk])
        yield right_away
        yield clients.ask(waiting["host"])
        yield clients.ask(waiting["disk"])
        restart(up, load)
        yield clients.ask(waiting["restart"])


def row(found: Sequence[Found], load: str, place: str, system: str) -> dict[str, Any]:
    here = [each for each in found if (each.load, each.place) == (load, place)]
    own = {each.number: each.sample for each in here if each.system == system}
    plain = {each.number: each.sample for each in here if each.system == "plain"}
    times = [sample.ttft_s for sample in own.values()]
    shared = [(own[number], plain[number]) for number in own if number in plain]
    before = sum(sample.prompt_tokens for sample in own.values())
    return {
        "load": load,
        "place": place,
        "system": system,
        "requests": len(own),
        "ttft_p50_s": statistics.median(times),
        "ttft_min_s": min(times),
        "ttft_max_s": max(times),
        "plain_by_ours": statistics.median(b.ttft_s / a.ttft_s for a, b in shared)
        if shared
        else None,
        "prompt_tokens": before,
        **{
            f"{tier}_tokens": sum(getattr(sample, tier) for sample in own.values())
            for tier in ("device", "host", "disk")
        },
        "equal": sum(a.output_ids == b.output_ids for a, b in shared),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = "| load | asked | system | TTFT p50, s | least | most | plain / it | found, tokens: "
    lines = [head + "device | host | disk | computed | same answer |", "|---" * 12 + "|"]
    for r in rows:
        tiers = [r[f"{tier}_tokens"] for tier in ("device", "host", "disk")]
        by_plain = "" if r["plain_by_ours"] is None else f"{r['plain_by_ours']:.2f}x"
        counts = " | ".join(f"{n:,}" for n in (*tiers, r["prompt_tokens"] - sum(tiers)))
        lines.append(
            f"| {r['load']} | {r['place']} | {r['system']} | {r['ttft_p50_s']:.3f} "
            f"| {r['ttft_min_s']:.3f} | {r['ttft_max_s']:.3f} | {by_plain} | {counts} "
            f"| {r['equal']} of {r['requests']} |"
        )
    return "\n".join(lines)


def write(options: argparse.Namespace, sizes: Sizes, found: Sequence[Found]) -> str:
    """What has been measured so far; returns the report."""
    rows = [
        row(found, load, place, system)
        for load in LOADS
        for place in PLACES
        if any(each.place == place for each in found)
        for system in options.systems
    ]
    what = "\n".join(f"- {name}: {SYSTEMS[name].what}" for name in options.systems)
    text = f"""# The next turn, by where the KV is

SGLang {version("sglang")}; {options.conversations} conversations of each kind in each place,
{options.history} tokens before the turn, {ANSWER_TOKENS} answer tokens; device {sizes.device:,}
tokens, host {sizes.host:,}; {options.model_path.name}, {options.dtype}, page {sizes.page};
{machine()}.
*plain / it*: the median of the same request's times. *Same answer*: as plain SGLang's, by token.
{options.note}

{what}

{table(rows)}

    python -m benchmark.serving.multiturn_tiers --conversations {options.conversations} \\
        --history {options.history}
"""
    document = {
        "sglang": version("sglang"),
        "machine": machine(),
        "model": options.model_path.name,
        "dtype": options.dtype,
        "pools_tokens": asdict(sizes),
        "rows": rows,
        "samples": [
            {**asdict(each), "sample": {**asdict(each.sample), "output_ids": None}}
            for each in found
        ],
    }
    options.out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(text)
    return text


def arguments() -> argparse.Namespace:
    parser = parser_of("benchmark.serving.multiturn_tiers", __doc__)
    add = parser.add_argument
    add("--model-path", type=Path, required=True, help="folder of the model")
    add("--conversations", type=int, default=3, help="of each kind in each place (default: 3)")
    add("--history", type=int, default=768, help="tokens before the turn (default: 768)")
    add("--dtype", choices=ELEMENT_BYTES, default="float32")
    add("--page-size", type=int, default=64)
    add("--seed", type=int, default=1)
    add("--systems", nargs="+", choices=SYSTEMS, default=list(USUAL), metavar="NAME",
        help=f"which to run, of: {', '.join(SYSTEMS)} (default: {', '.join(USUAL)})")  # fmt: skip
    add("--start-at-once", action="store_true", help="all servers together, not one by one")
    add("--scratch", type=Path, help="where disk tiers live meanwhile (default: the temp folder)")
    add("--note", default="", help="a sentence on the machine, for the report")
    add("--out", type=Path, default=RESULTS / "multiturn_tiers", metavar="NAME")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    sizes = pool_sizes(options)
    load = Load(shape_of("chat", options), 1, 0.0, options.seed)
    logs = Path(tempfile.mkdtemp(prefix="tiered_kv_bench_logs_"))
    print(f"device {sizes.device:,} tokens, host {sizes.host:,}; logs: {logs}", file=sys.stderr)
    with ExitStack() as stack:
        scratch = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="tiered_kv_bench_", dir=options.scratch)
        )
        up = stack.enter_context(
            servers_up(
                servers(options, sizes, Path(scratch), logs),
                lambda server: warm_up(server.url, load),
                at_once=options.start_at_once,
            )
        )
        for server in up.values():
            server.flush_cache()
        measured: list[Found] = []
        for found in measure(options, up, load):
            # After every place: what was measured is kept if the rest fails.
            measured += found
            report = write(options, sizes, measured)
        print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
