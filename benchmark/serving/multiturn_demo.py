"""One conversation, six turns, on plain SGLang and on three tiers: what was cached where, and TTFT.

Between the turns other users push the conversation out of the device, then out of host memory, and
before the fifth turn the server is restarted. Both servers get the same flags, but for those of
the tiers, and the same requests in the same order; the answers must be equal. They run in float32,
in which greedy answers don't depend on how much of a prompt was cached.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI

from harness.demo_model import host_size
from harness.prompts import story
from harness.server import Server

DEVICE_TOKENS = 2048
HOST_TOKENS = 4096
PAGE_SIZE = 64
ANSWER_TOKENS = 24


@dataclass(frozen=True)
class Turn:
    """others: how many other users ask something long before it; restart: the server is, too."""

    before: str
    question: str
    others: int = 0
    restart: bool = False


TURNS = (
    Turn("nothing: the first question", "Who repaired the bridge?"),
    Turn("nothing: a question right away", "And who sold the map?"),
    Turn("3 other users", "Why was the telescope lost?", others=3),
    Turn("6 other users", "Where was the clock hidden?", others=6),
    Turn("the server was restarted", "Which letters were measured?", restart=True),
    Turn("nothing: a question right away", "Thank you! Which one did you like most?"),
)


@dataclass(frozen=True)
class Reading:
    """What one turn showed. Token counts of the prompt."""

    prompt_tokens: int
    device: int
    host: int
    disk: int
    ttft_ms: float
    answer: str


def say(text: str) -> None:
    print(f"[demo] {text}", file=sys.stderr, flush=True)


def first_message(user: str) -> dict[str, str]:
    rules = "You answer questions about these events, briefly. "
    return {"role": "system", "content": rules + story(user, 40)}


def ask(client: OpenAI, messages: list[dict[str, str]], max_tokens: int) -> Reading:
    asked_at = time.perf_counter()
    stream: Any = client.chat.completions.create(
        model="default",
        messages=messages,
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"return_cached_tokens_details": True},
    )
    ttft, answer, prompt_tokens, details = 0.0, "", 0, {}
    for chunk in stream:
        text = chunk.choices[0].delta.content if chunk.choices else None
        if text:
            ttft = ttft or time.perf_counter() - asked_at
            answer += text
        if chunk.usage:
            prompt_tokens = chunk.usage.prompt_tokens
        extension = getattr(chunk, "sglext", None) or {}
        details = extension.get("cached_tokens_details") or details
    return Reading(
        prompt_tokens,
        details.get("device") or 0,
        details.get("host") or 0,
        details.get("storage") or 0,
        1000 * ttft,
        answer,
    )


def start(server: Server, what: str) -> None:
    say(f"{what}: starting (15 to 30 seconds; log: {server.log})")
    server.start()
    say(f"{what}: up after {server.start_seconds:.0f} s")


def converse(server: Server, what: str) -> list[Reading]:
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300, max_retries=0)
    messages = [first_message("the conversation")]
    readings: list[Reading] = []
    n_others = 0
    for number, turn in enumerate(TURNS, 1):
        for _ in range(turn.others):
            n_others += 1
            ask(client, [first_message(f"user {n_others}"), messages[1]], max_tokens=1)
        if turn.restart:
            time.sleep(3)  # the last pages reach the disk in the background
            server.stop()
            start(server, what)
        messages.append({"role": "user", "content": turn.question})
        reading = ask(client, messages, ANSWER_TOKENS)
        readings.append(reading)
        messages.append({"role": "assistant", "content": reading.answer})
        say(f"{what}: turn {number} of {len(TURNS)} ({turn.before}): {reading.ttft_ms:.0f} ms")
    return readings


def table(plain: list[Reading], tiered: list[Reading]) -> str:
    head = (
        f"{'':<45}plain SGLang        --tiered-kv\n"
        "turn  before it                       prompt   cached  TTFT ms"
        "   device  host  disk  TTFT ms  same answer"
    )
    lines = [head, "-" * 104]
    for number, (turn, p, t) in enumerate(zip(TURNS, plain, tiered, strict=True), 1):
        lines.append(
            f"{number:>4}  {turn.before:<30} {p.prompt_tokens:>7}   {p.device:>6} {p.ttft_ms:>8.0f}"
            f"   {t.device:>6} {t.host:>5} {t.disk:>5} {t.ttft_ms:>8.0f}"
            f"  {'yes' if p.answer == t.answer else 'NO'}"
        )
    return "\n".join(lines)


def transcript(readings: list[Reading]) -> str:
    lines = []
    for turn, reading in zip(TURNS, readings, strict=True):
        lines += [f"  user:      {turn.question}", f"  assistant: {reading.answer.strip()!r}"]
    return "\n".join(lines)


def has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model-path", type=Path, required=True, help="the demo model's folder")
    arguments = parser.parse_args()
    assert importlib.util.find_spec("sglang"), "run this through scripts/demo"

    flags = ["--dtype", "float32", "--page-size", str(PAGE_SIZE), "--skip-server-warmup"]
    flags += ["--max-total-tokens", str(DEVICE_TOKENS), "--chunked-prefill-size", "512"]
    # Plain SGLang reports cached tokens only if it is told to.
    flags += ["--enable-cache-report"]
    if not has_gpu():
        flags += ["--device", "cpu"]
    say(f"flags of both servers: {' '.join(flags)}")
    with tempfile.TemporaryDirectory(prefix="tiered_kv_demo_") as folder:
        disk = Path(folder) / "disk"
        tiers = ["--tiered-kv", "--tiered-kv-host-size", host_size(HOST_TOKENS)]
        tiers += ["--tiered-kv-disk-dir", str(disk), "--tiered-kv-disk-size", "2GB"]
        say(f"flags of the tiers: {' '.join(tiers)}")
        results = []
        for what, more in (("plain SGLang", []), ("--tiered-kv", tiers)):
            log = Path(folder) / f"{'tiered' if more else 'plain'}.log"
            server = Server([*flags, *more], log, arguments.model_path)
            try:
                start(server, what)
                results.append(converse(server, what))
                server.stop()
            finally:
                server.kill_9()
    plain, tiered = results
    say("done")
    print(
        f"\nRoom for {DEVICE_TOKENS} tokens on the device; with --tiered-kv also for {HOST_TOKENS}"
    )
    print("on the host and 2 GB on disk. Prompt tokens cached, by tier, and time to first token:")
    print(f"\n{table(plain, tiered)}")
    print(f"\nThe conversation with --tiered-kv:\n\n{transcript(tiered)}")
    if any(p.answer != t.answer for p, t in zip(plain, tiered, strict=True)):
        say("error: the answers differ; please report this with the output above.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
