"""One flow for whatever a model is made of: every tier gives the answers of plain SGLang.

Prompts computed, from the device, the host and the disk, after a restart; many requests at once on
pools that are too small. In the end the server gets a fault on purpose: what it loads is wrong, and
so must its answers be, or the comparisons would say nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from harness.client import Answer, generate_all
from harness.metrics import wait_for_disk
from harness.server import ALWAYS_LOAD, FLOAT32, Server
from harness.servers import servers_up
from support.injection import injected
from support.workload import Tokens, differences, mixed_requests, retracting, serve

#: Requests at once, of which one in six gives up (`support/workload.py`).
N_REQUESTS = 300
CONCURRENCY = 16
#: Requests that the server is asked again after its restart, at once as well.
N_AGAIN = 60

POOL = (
    *("--page-size", 16, "--max-total-tokens", 512, "--chunked-prefill-size", 64),
    # Little, so that more requests are admitted than fit and some must be retracted.
    *("--schedule-conservativeness", 0.05),
)
#: Some on top, where what few tokens a tiny model says would all fit.
RETRACTED = retracting(25)
N_TOKENS = 300
N_REUSABLE = 288
#: Of models some of whose layers have a window.
WINDOW_FAULTS = ("corrupt_windows", "corrupt_host")
#: What SGLang compiles of some models takes minutes on two cores, and computes the same.
UNCOMPILED = {"TORCHDYNAMO_DISABLE": "1"}


@dataclass(frozen=True)
class Case:
    """make: writes the model, given the demo model. args, env: of every server of it. faults: on
    purpose, each of which must show in the answers."""

    name: str
    make: Callable[[Path, Path], Path]
    args: tuple[object, ...] = ()
    faults: tuple[str, ...] = ("corrupt_host",)
    env: dict[str, str] = field(default_factory=dict)
    host_size: str = "8MB"

    def __str__(self) -> str:
        return self.name


class MakeServer(Protocol):
    def __call__(self, name: str, *args: object, **fields: object) -> Server: ...


def ids(answers: list[Answer]) -> list[tuple[int, ...]]:
    return [answer.output_ids for answer in answers]


def check_every_tier(
    case: Case, make_server: MakeServer, demo_model: Path, prompts: Tokens, folder: Path
) -> None:
    """Raises AssertionError where an answer is not plain SGLang's, or came from another tier."""
    model = case.make(demo_model, folder / "model")
    args = [*FLOAT32, *POOL, *case.args]
    env = {**UNCOMPILED, **case.env}
    tiers = ["--tiered-kv", *ALWAYS_LOAD, "--tiered-kv-host-size", case.host_size]
    tiers += ["--tiered-kv-disk-dir", folder / "disk", "--tiered-kv-disk-size", "300MB"]
    tiers += ["--tiered-kv-debug-integrity", "--enable-metrics"]
    env_of_plain = {**env, "SGLANG_PLUGINS": "tiered_kv_cpu"}
    breakable = {**env, **injected(",".join(case.faults), TIERED_KV_TEST_FAULTS=folder)}
    asked = [prompts.tokens(f"models {i}", N_TOKENS) for i in range(5)]
    load = mixed_requests(prompts, N_REQUESTS, seed=7)
    servers = {
        "plain": make_server(f"{case}_plain", *args, model=model, env=env_of_plain),
        "tiered": make_server(case.name, *args, *tiers, model=model, env={**env, **RETRACTED}),
    }
    # Two that start together take less time on two cores than one after the other.
    with servers_up(servers, at_once=True) as up:
        truths = ids(generate_all(up["plain"], asked, concurrency=1))
        alone = serve(up["plain"], [one.alone(f"alone {i}") for i, one in enumerate(load)], 4)
        up["plain"].stop()
        assert len(set(truths)) == 5, "the model ignores its prompts"
        _check_tiers(up["tiered"], asked, truths)
        answers = serve(up["tiered"], load, CONCURRENCY)
        wait_for_disk(up["tiered"])
    true_of_load = [truth.output_ids for truth in alone if truth is not None]
    _check_load(answers, true_of_load)

    with make_server(f"{case}_again", *args, *tiers, model=model, env=breakable) as server:
        _check(generate_all(server, asked, concurrency=1), truths, disk=N_REUSABLE)
        again = serve(server, load[:N_AGAIN], CONCURRENCY)
        assert not differences(again, true_of_load[:N_AGAIN])
        for fault in case.faults:
            # A small model may say the same of wrong KV, but not five times.
            assert ids(_broken(fault, folder, server, asked)) != truths, f"{fault} does not show"


def _check_tiers(
    server: Server, asked: list[tuple[int, ...]], truths: list[tuple[int, ...]]
) -> None:
    _check(generate_all(server, asked, concurrency=1), truths, cached_tokens=0)
    _check(generate_all(server, asked[-1:], concurrency=1), truths[-1:], device=N_REUSABLE)
    _check(generate_all(server, asked[:2], concurrency=1), truths[:2], host=N_REUSABLE)
    wait_for_disk(server)
    server.flush_cache()
    _check(generate_all(server, asked, concurrency=1), truths, disk=N_REUSABLE)


def _check(answers: list[Answer], truths: list[tuple[int, ...]], **tokens: int) -> None:
    """tokens: how many of each prompt came from where."""
    for tier, n_tokens in tokens.items():
        assert [getattr(answer, tier) for answer in answers] == [n_tokens] * len(answers), tier
    assert ids(answers) == truths


def _check_load(answers: list[Answer | None], truths: list[tuple[int, ...]]) -> None:
    """Raises AssertionError unless all that were answered are right, and some were retracted."""
    assert not differences(answers, truths)
    completed = [answer for answer in answers if answer is not None]
    assert len(completed) > 0.7 * len(truths)
    assert sum(answer.meta_info["num_retractions"] for answer in completed) > 0


def _broken(fault: str, folder: Path, server: Server, asked: list[tuple[int, ...]]) -> list[Answer]:
    """The answers while that is broken, all from the disk."""
    wait_for_disk(server)
    server.flush_cache()
    (folder / fault).touch()
    answers = generate_all(server, asked, concurrency=1)
    (folder / fault).unlink()
    assert [answer.disk for answer in answers] == [N_REUSABLE] * len(asked)
    return answers
