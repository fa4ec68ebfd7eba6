"""Where the gateway sends the turns of conversations, by policy, with a header and without.

Two workers that compute nothing answer after 50 ms. 24 conversations of 5 turns share the prompt of
their system, 1,740 characters. A move is a turn that did not go where the one before it went.
Prints the table, and writes it to --out.

Example:
  python benchmark/micro/gateway.py
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmark.command_line import RESULTS
from harness.gateway import Gateway, compose_flags
from harness.stub_workers import StubWorker

SYSTEM = "You are a helpful assistant. " * 60
WORDS = ("sea", "tide", "mill", "wind", "sail", "rope", "oak")
CONVERSATIONS, TURNS, ANSWER_S = 24, 5, 0.05
AT_A_TIME = (2, 8, 16)

HEADER = ("--routing-key-headers", "x-session-id")
STICKY = ("--policy", "cache_aware", "--sticky-sessions", *HEADER)


@dataclass(frozen=True)
class Choice:
    words: str
    flags: tuple[str, ...]
    has_header: bool = True


CHOICES = (
    Choice("`compose.yaml`: sticky, `min_load`", tuple(compose_flags())),
    Choice("`compose.yaml`, no header", tuple(compose_flags()), has_header=False),
    Choice("sticky, new ones as `cache_aware` says", STICKY),
    Choice("sticky, new ones at random", (*STICKY, "--assignment-mode", "random")),
    Choice("`cache_aware`, no header", ("--policy", "cache_aware"), has_header=False),
    Choice(
        "`manual`, `min_load`", ("--policy", "manual", "--assignment-mode", "min_load", *HEADER)
    ),
    Choice("`manual`, no header", ("--policy", "manual", *HEADER), has_header=False),
    Choice("`consistent_hashing`", ("--policy", "consistent_hashing", *HEADER)),
    Choice("`prefix_hash`, no header", ("--policy", "prefix_hash"), has_header=False),
)


def talk(gateway: Gateway, number: int, *, has_header: bool) -> list[str]:
    """Who answered the turns."""
    rng = random.Random(number)
    messages = [{"role": "system", "content": SYSTEM}]
    answered_by = []
    for _ in range(TURNS):
        said = " ".join(rng.choice(WORDS) for _ in range(60))
        messages = [*messages, {"role": "user", "content": said}]
        body = {"model": "demo", "messages": messages, "tokens_after_s": ANSWER_S}
        session = f"conversation {number}" if has_header else None
        answered_by.append(gateway.post("/v1/chat/completions", body, session).json()["text"])
        messages = [*messages, {"role": "assistant", "content": "Indeed. " * 10}]
    return answered_by


def measure(choice: Choice, at_a_time: int, log: Path) -> tuple[int, int, int]:
    """(moves, requests on the one worker, on the other), of a gateway that has seen nothing yet."""
    with (
        StubWorker("a") as a,
        StubWorker("b") as b,
        Gateway([a.url, b.url], log, choice.flags) as gateway,
        ThreadPoolExecutor(at_a_time) as pool,
    ):
        gateway.wait_healthy({a.url, b.url}, 20)
        told = list(
            pool.map(
                lambda number: talk(gateway, number, has_header=choice.has_header),
                range(CONVERSATIONS),
            )
        )
    moves = sum(x != y for turns in told for x, y in itertools.pairwise(turns))
    answers = [name for turns in told for name in turns]
    return moves, answers.count("a"), answers.count("b")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "gateway_policies.md")
    args = parser.parse_args()
    about = (
        "`python benchmark/micro/gateway.py`, smg 1.13.0, two workers that compute nothing: moves, "
        f"of {CONVERSATIONS * (TURNS - 1)} later turns, and requests on each worker."
    )
    lines = ["# Where the gateway sends the turns of conversations", "", about, ""]
    lines.append("| | " + " | ".join(f"{n} at a time" for n in AT_A_TIME) + " |")
    lines.append("|---" * (1 + len(AT_A_TIME)) + "|")
    with tempfile.TemporaryDirectory() as folder:
        for choice in tqdm(CHOICES, leave=False):
            found = [measure(choice, n, Path(folder) / "log") for n in AT_A_TIME]
            cells = " | ".join(f"{moves}; {a} : {b}" for moves, a, b in found)
            lines.append(f"| {choice.words} | {cells} |")
    args.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
