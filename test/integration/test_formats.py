"""Tiers that keep KV pages in fewer bytes, on the real server.

How much is reused is exact; what is answered need not be. The first answer to a prompt is computed
on the device alone, in float32, so it is what raw tiers give: the share of its tokens that later
answers repeat is measured, printed, and must stay far above what KV mixed up or misread would give.
The device has room for 1,024 tokens: four prompts of 400 push out whatever was there before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path

import pytest

from harness.client import Answer, generate_all
from harness.demo_model import host_size
from harness.metrics import wait_for_disk
from harness.prompts import PromptMaker
from harness.server import ALWAYS_LOAD, FLOAT32, Server

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(600)]

N_TOKENS = 400
N_REUSABLE = 384
N_PROMPTS = 6
N_NEW = 16
#: Mean share of an answer's tokens up to the first that differs. Wrong KV gives about none. Of six
#: answers it is 0.15 more or less from one set of prompts, or release of torch, to the next.
AGREEMENT_MIN = {"fp8": 0.4, "int4": 0.4, "kitty": 0.1, "int2": 0.0}


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("disk")


@pytest.fixture
def start(make_server: Callable[..., Server], disk: Path) -> Callable[[str, str], Server]:
    """A server whose host and disk tier keep pages in these formats."""

    def make(host: str, on_disk: str = "same") -> Server:
        args = ["--page-size", "16", "--max-total-tokens", "1024", "--chunked-prefill-size", "256"]
        args += ["--tiered-kv", *ALWAYS_LOAD, "--tiered-kv-host-size", host_size(8192)]
        args += ["--tiered-kv-disk-dir", str(disk), "--tiered-kv-disk-size", "1GB"]
        args += ["--tiered-kv-host-format", host, "--tiered-kv-disk-format", on_disk]
        watch = ["--enable-metrics", "--tiered-kv-debug-integrity"]
        return make_server(f"formats_{host}_{on_disk}", *FLOAT32, *args, *watch)

    return make


class Asked:
    """Prompts with their exact answers, from a server that has none of their KV yet."""

    def __init__(self, server: Server, prompts: PromptMaker, seed: str) -> None:
        self.prompts = [prompts.tokens(f"{seed} {i}", N_TOKENS) for i in range(N_PROMPTS)]
        exact = ask(server, self.prompts)
        assert [answer.cached_tokens for answer in exact] == [0] * N_PROMPTS
        self.exact = [answer.output_ids for answer in exact]

    def again(self, server: Server) -> list[Answer]:
        return ask(server, self.prompts)

    def check_agreement(self, answers: Sequence[Answer], format_: str, tier: str) -> None:
        shares = []
        for answer, exact in zip(answers, self.exact, strict=True):
            pairs = zip(answer.output_ids, exact, strict=True)
            shares.append(len(list(takewhile(lambda pair: pair[0] == pair[1], pairs))) / N_NEW)
        mean = sum(shares) / len(shares)
        print(f"{format_} from {tier}: {mean:.0%} of the tokens agree, by prompt {shares}")
        assert mean >= AGREEMENT_MIN[format_]


def ask(server: Server, prompts: Sequence[tuple[int, ...]]) -> list[Answer]:
    return generate_all(server, prompts, max_new_tokens=N_NEW, concurrency=1)


def by_tier(answers: Sequence[Answer]) -> list[tuple[int, int, int]]:
    return [(answer.device, answer.host, answer.disk) for answer in answers]


@pytest.mark.long
def test_fp8_from_host_and_after_a_restart_from_disk_and_nothing_for_int4(
    start: Callable[..., Server], prompts: PromptMaker
) -> None:
    with start("fp8") as server:
        asked = Asked(server, prompts, "fp8")
        from_host = asked.again(server)
        wait_for_disk(server)
    with start("fp8") as server:
        from_disk = asked.again(server)
    # The last prompts are still on the device when they are asked for again.
    assert by_tier(from_host)[:4] == [(0, N_REUSABLE, 0)] * 4
    assert by_tier(from_disk) == [(0, 0, N_REUSABLE)] * N_PROMPTS
    asked.check_agreement(from_host, "fp8", "host")
    asked.check_agreement(from_disk, "fp8", "disk")

    with start("int4") as server:
        other = Asked(server, prompts, "fp8")
        from_host = other.again(server)
        wait_for_disk(server)
        server.flush_cache()
        from_disk = other.again(server)
    assert other.exact == asked.exact
    assert by_tier(from_host)[:4] == [(0, N_REUSABLE, 0)] * 4
    assert by_tier(from_disk) == [(0, 0, N_REUSABLE)] * N_PROMPTS
    other.check_agreement(from_host, "int4", "host")
    other.check_agreement(from_disk, "int4", "disk")


@pytest.mark.long
@pytest.mark.parametrize(("host", "on_disk"), [("raw", "fp8"), ("fp8", "int4"), ("kitty", "int2")])
def test_a_disk_with_a_format_of_its_own(
    start: Callable[..., Server], prompts: PromptMaker, host: str, on_disk: str
) -> None:
    with start(host, on_disk) as server:
        asked = Asked(server, prompts, f"{host} {on_disk}")
        from_host = asked.again(server)
        wait_for_disk(server)
    with start(host, on_disk) as server:
        from_disk = asked.again(server)
        assert by_tier(from_disk) == [(0, 0, N_REUSABLE)] * N_PROMPTS
        asked.check_agreement(from_disk, on_disk, "disk")
    assert by_tier(from_host)[:4] == [(0, N_REUSABLE, 0)] * 4
    if host == "raw":
        assert [answer.output_ids for answer in from_host] == asked.exact
    else:
        asked.check_agreement(from_host, host, "host")


@pytest.mark.long
def test_raw_pages_of_an_older_directory_serve_a_raw_server_beside_lossy_ones(
    start: Callable[..., Server], prompts: PromptMaker
) -> None:
    with start("raw") as server:
        asked = Asked(server, prompts, "older")
        wait_for_disk(server)
    with start("int2") as server:
        assert [answer.cached_tokens for answer in asked.again(server)] == [0] * N_PROMPTS
        wait_for_disk(server)
    with start("raw") as server:
        again = asked.again(server)
    assert by_tier(again) == [(0, 0, N_REUSABLE)] * N_PROMPTS
    assert [answer.output_ids for answer in again] == asked.exact
