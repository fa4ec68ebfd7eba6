"""Conversations on a cluster of two workers, one of which is killed and a new one added meanwhile.

The workers are real servers on this machine, behind the gateway with the flags of
docker/compose.yaml. All conversations take a turn in each round. In the third, while requests run,
the first worker gets SIGKILL; before the fifth another one, with empty tiers, is there. Reported
are the tiers that the prompts' KV came from, how long first tokens took, and what clients saw go
wrong: a stream that had begun on the killed worker ends with an error and is asked again.

Variants: `none` (no shared store), `store` (Valkey), `restarted` (the store is killed before the
fourth round and comes back, empty, before the fifth). Each writes its part of OUT.json; OUT.md is
made of all that are there.

Example:
  python -m benchmark.serving.cluster --variants none,store \\
      --model-path ~/.cache/tiered_kv/models/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import requests
from tqdm import tqdm

from benchmark.command_line import RESULTS, parser_of
from benchmark.serving.multiturn_report import machine
from harness.demo_model import host_size
from harness.gateway import SESSION_HEADER, Gateway
from harness.prompts import story
from harness.server import BASE_ARGS, Server
from harness.stores import Process, valkey_server

VARIANTS = {
    "none": "no shared store",
    "store": "a store (Valkey)",
    "restarted": "the store killed in round 4, back and empty in round 5",
}
KILLED_ROUND, ADDED_ROUND = 2, 4
WORDS = {
    KILLED_ROUND: "first worker killed in it",
    KILLED_ROUND + 1: "one worker",
    ADDED_ROUND: "a new worker",
}
TIERS = ("device", "host", "disk", "store")
CHAT = "/v1/chat/completions"
REQUEST_TIMEOUT_S = 300.0
N_CUT_MAX = 3


@dataclass(frozen=True)
class Turn:
    """One turn. Tokens of the prompt by the tier that their KV came from; empty if it failed."""

    round: int
    prompt_tokens: int
    cached: dict[str, int]
    ttft_s: float
    """From when the client asked first."""
    n_cut: int
    """Streams that had begun and ended with an error before one ended well."""
    error: str = ""


@dataclass
class Conversation:
    """Grows by a question and its answer. What is said next does not depend on the answer."""

    name: str
    first_sentences: int
    messages: list[dict[str, str]] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    """Further fields of every request."""

    def turn(self, gateway: Gateway, number: int) -> Turn:
        n_sentences = 6 if number else self.first_sentences
        text = f"{self.name}, {number}. {story(f'{self.name} {number}', n_sentences)}"
        self.messages.append({"role": "user", "content": text})
        n_cut, asked_s = 0, time.monotonic()
        try:
            first_s, report = self._ask(gateway)
            while report is None and n_cut < N_CUT_MAX:
                n_cut += 1
                first_s, report = self._ask(gateway)
        except requests.RequestException as error:
            return Turn(number, 0, {}, 0.0, n_cut, repr(error))
        if report is None:
            return Turn(number, 0, {}, 0.0, n_cut, "cut again and again")
        answer = story(f"{self.name} answers {number}", 2)
        self.messages.append({"role": "assistant", "content": answer})
        cached = {tier: int(report["cached_tokens"][tier]) for tier in TIERS}
        return Turn(number, int(report["prompt_tokens"]), cached, first_s - asked_s, n_cut)

    def _ask(self, gateway: Gateway) -> tuple[float, dict[str, Any] | None]:
        """When the first token was there, and the server's report; None if the stream was cut.

        Raises requests.RequestException for a request that failed.
        """
        body = {"model": "demo", "messages": self.messages, "stream": True, "max_tokens": 8}
        body |= {"temperature": 0, "ignore_eos": True, "slo": {"report": True}, **self.extra}
        first_s, report = 0.0, None
        with requests.post(
            f"{gateway.url}{CHAT}",
            json=body,
            headers={SESSION_HEADER: self.name},
            stream=True,
            timeout=REQUEST_TIMEOUT_S,
        ) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines(chunk_size=None):
                if not line.startswith(b"data: {"):
                    continue
                first_s = first_s or time.monotonic()
                piece = json.loads(line[6:])
                if "error" in piece:
                    return first_s, None
                report = ((piece.get("metadata") or {}).get("tiered_kv") or [report])[0]
        return first_s, report


class Cluster:
    """Workers by number; the third is the one that is added."""

    def __init__(self, args: argparse.Namespace, variant: str, scratch: Path) -> None:
        self.store: Process | None = None
        self._stack = ExitStack()
        store_flags: list[str] = []
        if variant != "none":
            self.store = valkey_server(scratch, maxmemory="2gb")
            store_flags = ["--tiered-kv-store", f"valkey://127.0.0.1:{self.store.port}"]
        self.workers = [
            Server(
                [
                    *BASE_ARGS,
                    *("--tiered-kv", "--tiered-kv-load-policy", args.load_policy),
                    *("--tiered-kv-host-size", host_size(args.host_tokens)),
                    *("--tiered-kv-disk-dir", str(scratch / f"disk-{n}")),
                    *("--tiered-kv-disk-size", "4GB", "--served-model-name", "demo"),
                    *("--max-total-tokens", str(args.device_tokens), *store_flags),
                ],
                scratch / f"worker-{n}.log",
                args.model_path,
                env={"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "false"},
            )
            for n in (1, 2, 3)
        ]
        self.gateway = Gateway([w.url for w in self.workers], scratch / "gateway.log")

    def __enter__(self) -> Cluster:
        with ExitStack() as stack:
            if self.store is not None:
                stack.enter_context(self.store)
            for worker in self.workers:
                stack.callback(worker.kill_9)
            for worker in self.workers[:2]:
                worker.start()
            stack.enter_context(self.gateway)
            self.gateway.wait_healthy({w.url for w in self.workers[:2]}, 60)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def rounds(
    cluster: Cluster, talks: Sequence[Conversation], args: argparse.Namespace, variant: str
) -> Iterator[list[Turn]]:
    """The turns of each round; what happens to the cluster happens in and between them."""
    killed, _, added = cluster.workers
    store = cluster.store if variant == "restarted" else None
    with ThreadPoolExecutor(args.concurrency) as pool, ThreadPoolExecutor(1) as beside:
        starting: Future[Server] | None = None
        for number in range(args.rounds):
            if number == KILLED_ROUND:
                threading.Timer(args.kill_after_s, killed.kill_9).start()
            if number == KILLED_ROUND + 1:
                starting = beside.submit(added.start)
                if store is not None:
                    store.kill_9()
            if number == ADDED_ROUND:
                assert starting is not None
                starting.result()
                if store is not None:
                    store.start()
                cluster.gateway.wait_healthy({w.url for w in cluster.workers[1:]}, 60)
            asked = [pool.submit(talk.turn, cluster.gateway, number) for talk in talks]
            yield [future.result() for future in asked]


def run(args: argparse.Namespace, variant: str) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as scratch, Cluster(args, variant, Path(scratch)) as cluster:
        talks = [Conversation(f"talk {n}", args.first_sentences) for n in range(args.conversations)]
        turns: list[Turn] = []
        for of_round in tqdm(rounds(cluster, talks, args, variant), desc=variant, leave=False):
            turns += of_round
    return [asdict(turn) for turn in turns]


def row(number: int, turns: Sequence[dict[str, Any]]) -> str:
    answered = [turn for turn in turns if not turn["error"]]
    prompt = sum(turn["prompt_tokens"] for turn in answered)
    shares = [sum(turn["cached"][tier] for turn in answered) / prompt for tier in TIERS]
    ttft = sorted(turn["ttft_s"] for turn in answered)
    cells = [f"{share:.0%}" for share in (*shares, 1 - sum(shares))]
    cells += [f"{statistics.median(ttft):.2f}", f"{ttft[-1]:.2f}"]
    cells += [str(sum(t["n_cut"] for t in turns)), str(len(turns) - len(answered))]
    return f"| {number + 1} | {WORDS.get(number, '')} | {' | '.join(cells)} |"


INTRODUCTION = """\
# Two workers, one killed and one added meanwhile

`python -m benchmark.serving.cluster`, on {machine}; SmolLM2-135M-Instruct, {conversations}
conversations of six turns, {concurrency} requests at a time, streamed. Each worker has
{device_tokens:,} tokens on the device, {host_tokens:,} on the host, and 4 GB of disk; load policy
`{load_policy}`. By round: where the prompts' tokens came from; time to first token as the client
sees it, what was tried again included; streams that had begun on the killed worker, which end with
an error and are asked again by the client; requests that failed.

A conversation stays with the worker that has it; the one that is added gets those that begin then,
of which there are none here. Times are those of a machine that other programs used as well.
"""


def report(document: dict[str, Any]) -> str:
    lines = [INTRODUCTION.format(machine=document["machine"], **document["setting"])]
    heads = ("round", "", *TIERS, "computed", "TTFT median, s", "worst, s", "cut", "failed")
    for variant, turns in document["variants"].items():
        lines += [f"## With {VARIANTS[variant]}", ""]
        lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for number in sorted({turn["round"] for turn in turns}):
            lines.append(row(number, [turn for turn in turns if turn["round"] == number]))
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = parser_of("benchmark.serving.cluster", __doc__)
    parser.add_argument("--model-path", type=Path, required=True)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--conversations", type=int, default=8)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--first-sentences", type=int, default=24)
    parser.add_argument("--device-tokens", type=int, default=4096)
    parser.add_argument("--host-tokens", type=int, default=4096)
    parser.add_argument("--load-policy", choices=("cost", "always"), default="cost")
    parser.add_argument("--kill-after-s", type=float, default=2.0)
    parser.add_argument("--out", type=Path, default=RESULTS / "cluster")
    args = parser.parse_args()
    path = args.out.with_suffix(".json")
    known = {name: value for name, value in vars(args).items() if name not in ("variants", "out")}
    setting = {**known, "model_path": args.model_path.name}
    document = json.loads(path.read_text()) if path.exists() else {"variants": {}}
    if document.get("setting") != setting:
        document = {"variants": {}}
    document = {"machine": machine(), "setting": setting, "variants": document["variants"]}
    for variant in args.variants.split(","):
        document["variants"][variant] = run(args, variant)
        path.write_text(json.dumps(document, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(report(document))
    print(report(document))


if __name__ == "__main__":
    main()
