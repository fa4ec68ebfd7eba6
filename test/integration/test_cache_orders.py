"""What administrators order about prompts, by its effect on hits; answers stay plain SGLang's.

The device has room for 1,024 tokens, the host for 4,096.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from harness.client import Answer, generate, generate_all
from harness.metrics import scrape, wait_for_disk
from harness.prompts import PromptMaker, story
from harness.server import Server
from support.oracle import Oracle
from tiered_kv.metrics import names
from tiered_kv.scheduler.pauses import LEAST

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

N_TOKENS = 400
#: The last token of a prompt is always computed: 24 whole pages of 16 can be reused.
N_REUSABLE = 384


def order(server: Server, action: str, **body: Any) -> dict[str, Any]:
    answer = server.post("/tiered_kv/cache", {"action": action, **body})
    assert answer.status_code == 200, answer.text
    done: dict[str, Any] = answer.json()
    return done


def by_tier(answer: Answer) -> tuple[int, int, int]:
    return (answer.device, answer.host, answer.disk)


def tiers(device: int, host: int, disk: int) -> dict[str, int]:
    return {"device": device, "host": host, "disk": disk}


def test_a_quiet_prompt(three_tiers: Server, oracle: Oracle, prompts: PromptMaker) -> None:
    prompt = prompts.tokens("quiet", N_TOKENS)
    truth = oracle.output_ids(prompt)
    before = scrape(three_tiers).of(names.ORDERS)
    assert order(three_tiers, "inspect", token_ids=prompt)["nowhere"] == N_TOKENS
    answers = [generate(three_tiers, prompt)]
    wait_for_disk(three_tiers)
    found = order(three_tiers, "inspect", token_ids=prompt)
    assert found["tiers"] == tiers(N_TOKENS, N_TOKENS, N_TOKENS)

    demoted = order(three_tiers, "demote", token_ids=prompt, tier="host")
    assert demoted["tiers"] == tiers(0, N_TOKENS, N_TOKENS)
    answers.append(generate(three_tiers, prompt))
    demoted = order(three_tiers, "demote", token_ids=prompt)
    assert demoted["tiers"] == tiers(0, 0, N_TOKENS)
    answers.append(generate(three_tiers, prompt))
    order(three_tiers, "demote", token_ids=prompt)
    near = order(three_tiers, "prefetch", token_ids=prompt)
    assert near["done"] == {"host": N_TOKENS, "device": 0}
    answers.append(generate(three_tiers, prompt))
    order(three_tiers, "demote", token_ids=prompt)
    near = order(three_tiers, "prefetch", token_ids=prompt, tier="device")
    assert near["done"] == {"host": N_TOKENS, "device": N_TOKENS}
    answers.append(generate(three_tiers, prompt))
    dropped = order(three_tiers, "drop", token_ids=prompt)
    assert dropped["nowhere"] == N_TOKENS
    assert dropped["done"]["disk"] >= N_TOKENS
    answers.append(generate(three_tiers, prompt))

    assert [by_tier(answer) for answer in answers] == [
        (0, 0, 0),
        (0, N_REUSABLE, 0),
        (0, 0, N_REUSABLE),
        (0, N_REUSABLE, 0),
        (N_REUSABLE, 0, 0),
        (0, 0, 0),
    ]
    assert [answer.output_ids for answer in answers] == [truth] * 6
    assert scrape(three_tiers).of(names.ORDERS) == before + 9


@pytest.mark.long
def test_a_prompt_that_somebody_runs_with(
    three_tiers: Server, oracle: Oracle, prompts: PromptMaker
) -> None:
    shared = prompts.tokens("shared", 160)
    running, quiet = ((*shared, *prompts.tokens(name, 160)) for name in ("runs", "is quiet"))
    truths = [oracle.output_ids(running, 96), oracle.output_ids(quiet)]
    generate(three_tiers, quiet)
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(generate, three_tiers, running, 96)
        while not order(three_tiers, "inspect", token_ids=running)["in_use"]:
            assert not answer.done()
        demoted = order(three_tiers, "demote", token_ids=quiet)
        dropped = order(three_tiers, "drop", token_ids=running)
        assert not answer.done(), "make the answer longer"
    # What the two share is in use, and so is all of what runs.
    assert demoted["done"]["device"] == 160
    assert demoted["shared"] + demoted["in_use"] == 160
    assert dropped["in_use"] >= 160
    assert sum(dropped["done"].values()) == 0
    assert answer.result().output_ids == truths[0]
    wait_for_disk(three_tiers)
    assert order(three_tiers, "drop", token_ids=running)["in_use"] == 0
    again = [generate(three_tiers, running, 96), generate(three_tiers, quiet)]
    assert [answer.output_ids for answer in again] == truths
    assert again[0].cached_tokens <= 160, "what only it had is forgotten"


@pytest.mark.long
def test_what_is_kept_stays(three_tiers: Server, oracle: Oracle, prompts: PromptMaker) -> None:
    kept, other = (prompts.tokens(name, N_TOKENS) for name in ("kept", "not kept"))
    generate_all(three_tiers, [kept, other], concurrency=1)
    wait_for_disk(three_tiers)
    done = order(three_tiers, "keep", token_ids=kept, seconds=600, tenant="blue")
    assert done["done"] == {"host": N_TOKENS, "disk": N_TOKENS}
    assert 590 < done["kept"]["host"]["ends_in_s"] <= 600
    assert order(three_tiers, "keep", token_ids=other, seconds=60, tenant="blue")["beyond_bounds"]
    order(three_tiers, "keep", token_ids=other, seconds=0, tenant="blue")
    # More than the host has room for.
    others = [prompts.tokens(f"beside what is kept {i}", N_TOKENS) for i in range(11)]
    generate_all(three_tiers, others, max_new_tokens=1, concurrency=1)
    wait_for_disk(three_tiers)
    assert order(three_tiers, "inspect", token_ids=other)["tiers"]["host"] == 0
    assert scrape(three_tiers).of(names.KEPT_TOKENS, tier="host", tenant="blue") == N_TOKENS
    answers = [generate(three_tiers, prompt) for prompt in (kept, other)]
    assert [by_tier(a) for a in answers] == [(0, N_REUSABLE, 0), (0, 0, N_REUSABLE)]
    assert [a.output_ids for a in answers] == [oracle.output_ids(p) for p in (kept, other)]
    freed = order(three_tiers, "keep", token_ids=kept, seconds=0, tenant="blue")
    assert freed["kept"] == {}


def test_chats_sessions_and_salts_from_the_command_line(
    three_tiers: Server, tmp_path: Path
) -> None:
    def cache(*arguments: object) -> Any:
        url = f"http://127.0.0.1:{three_tiers.port}"
        command = [sys.executable, "-m", "tiered_kv.cache", *map(str, arguments), "--url", url]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    messages = [{"role": "user", "content": story("command line", 20)}]
    chat = {"model": "demo", "messages": messages, "max_tokens": 4, "session_id": "agent 7"}
    answer = three_tiers.post("/v1/chat/completions", chat).json()
    n_tokens = answer["usage"]["prompt_tokens"]
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(messages))
    found = json.loads(cache("inspect", "--messages", path, "--json").stdout)
    assert found["tokens"] == n_tokens
    assert found["tiers"]["device"] == n_tokens // 16 * 16
    salted = json.loads(
        cache("inspect", "--messages", path, "--cache-salt", "mine", "--json").stdout
    )
    assert salted["tiers"]["device"] == 0
    shown = cache("inspect", "--session", "agent 7")
    assert "inspect: " in shown.stdout
    assert "one prompt" in shown.stdout
    dropped = cache("drop", "--session", "agent 7")
    assert "forgotten" in dropped.stdout
    usage = three_tiers.post("/v1/chat/completions", chat).json()["usage"]
    # What every chat begins with may be another's, too.
    assert (usage["prompt_tokens_details"] or {}).get("cached_tokens", 0) <= 32
    unknown = cache("drop", "--session", "nobody's")
    assert unknown.returncode == 2
    assert unknown.stderr.startswith("No session of that name is remembered")


def test_a_call_that_nobody_announced_is_prepared_for(
    three_tiers: Server, oracle: Oracle, prompts: PromptMaker
) -> None:
    """Programs that came back soon after a tool was named teach when the next one comes."""

    def call(session: str, prompt: tuple[int, ...]) -> Answer:
        hints = {"session_id": session, "tool": "clock"}
        return generate(three_tiers, prompt, hints=hints)

    for _ in range(2):
        for number in range(LEAST):
            call(f"lesson {number}", prompts.tokens(f"lesson {number}", 32))
    prompt = prompts.tokens("agent", N_TOKENS)
    answers = [call("agent", prompt)]
    wait_for_disk(three_tiers)
    assert order(three_tiers, "inspect", token_ids=prompt)["next_use_s"] is not None
    demoted = order(three_tiers, "demote", token_ids=prompt, tier="host")
    assert demoted["tiers"]["host"] == N_TOKENS
    until_s = time.monotonic() + 10.0
    while order(three_tiers, "inspect", token_ids=prompt)["tiers"]["device"] < N_TOKENS:
        assert time.monotonic() < until_s, "nothing brought it back"
        time.sleep(0.2)
    answers.append(call("agent", prompt))
    assert answers[1].cached_tokens == N_REUSABLE
    assert [answer.output_ids for answer in answers] == [oracle.output_ids(prompt)] * 2


def test_what_cannot_be_is_refused_in_one_sentence(three_tiers: Server) -> None:
    for body, words in (
        ({"action": "explode", "text": "x"}, "action must be one of inspect"),
        ({"action": "inspect"}, "Give exactly one of"),
        ({"action": "drop", "text": "x", "force": True}, "force is not known"),
        ({"action": "keep", "text": "x", "seconds": 1e9}, "seconds must be"),
        ({"action": "inspect", "token_ids": [1] * 100_000}, "token_ids must be"),
        ({"action": "inspect", "messages": [{"role": 7}]}, "cannot be made a prompt of"),
        ({"action": "inspect", "text": "\ud800"}, "cannot be made a prompt of"),
        ({"action": "inspect", "text": "x", "lora_path": "none"}, "names no adapter"),
    ):
        answer = three_tiers.post("/tiered_kv/cache", body)
        assert answer.status_code == 400, (body, answer.text)
        assert words in answer.json()["error"]
        assert answer.json()["error"].endswith(".")
