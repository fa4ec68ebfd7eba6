"""Does it serve? Greedy answers of --tiered-kv against those of plain SGLang.

A prompt is asked when it is new, again at once (its prefix is on the device), again after others
have pushed it out (host), and again after a flush (disk). Plain SGLang answers when it is new and
again: what a prefix of the same bytes gives must be equal to the token, wherever it came from.
Prompts that are asked together are batched otherwise on either side, and rounded otherwise: they
are judged by how far plain SGLang agrees with itself, alone and together.

What is stored is loaded, whatever computing it would take, and prompts come in the pieces that
plain SGLang takes: one in two pieces is rounded otherwise than one in a piece.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import requests

from benchmark.gpu import systems
from benchmark.gpu.record import Record
from benchmark.gpu.setting import Setting
from benchmark.simulation.probe import Probe
from harness.metrics import wait_for_disk
from harness.server import Server, ServerError

FRESH, DEVICE, HOST, DISK = "new", "again", "after others", "after a flush"
STATES = (FRESH, DEVICE, HOST, DISK)
TIERS = {DEVICE: "device", HOST: "host", DISK: "storage"}
FLUSH_TIMEOUT_S = 60.0
STEP = "answers"
#: What a server is to load, and in which passes it computes: no choice of ours.
AS_PLAIN = ("--tiered-kv-load-policy", "always", "--tiered-kv-policy", "fcfs")
#: Together, a system must agree with plain SGLang by at least this part of what that does itself.
AGREEMENT_MIN = 0.5
#: And a few prompts, alone, where the passes have other shapes. Wrong KV shows in the first token.
FEW_AGREEMENT_MIN = 0.2


@dataclass(frozen=True)
class Sizes:
    """In tokens. Prompts are a prefix of their own and the same end."""

    n_prompts: int
    prefix: int
    end: int
    new: int
    page: int
    device: int
    host: int
    token_bytes: int
    gang: int
    """How many are asked together."""
    gang_new: int


LARGE = Sizes(3, 2048, 37, 24, 64, 12 * 1024, 64 * 1024, 131072, 8, 32)
SMALL = Sizes(2, 128, 5, 6, 16, 640, 4096, 1024, 4, 8)


@dataclass
class Answers:
    """What one system said: token ids, by state and prompt; and where the prefix was found."""

    tokens: dict[str, list[list[int]]] = field(default_factory=dict)
    by_tier: dict[str, list[dict[str, int]]] = field(default_factory=dict)
    gang: list[list[int]] = field(default_factory=list)
    """Asked together: one prefix, ends of their own."""
    gang_alone: list[list[int]] = field(default_factory=list)
    strangers: list[list[int]] = field(default_factory=list)
    """Asked together, with nothing in common, on a pool that is too small for them."""


def sizes_of(setting: Setting) -> Sizes:
    return SMALL if setting.is_small else LARGE


class Questions:
    """The same for every system."""

    def __init__(self, sizes: Sizes) -> None:
        draw = Probe("", seed=11)
        self.sizes = sizes
        end = draw.tokens(sizes.end)
        self.prompts = [draw.tokens(sizes.prefix) + end for _ in range(sizes.n_prompts)]
        # Together they fill the device.
        n_pushers = -(-sizes.device // sizes.prefix)
        self.pushers = [draw.tokens(sizes.prefix) for _ in range(n_pushers)]
        trunk = draw.tokens(sizes.prefix)
        self.gang = [trunk + draw.tokens(sizes.end) for _ in range(sizes.gang)]
        self.strangers = [draw.tokens(sizes.prefix) for _ in range(sizes.gang)]


def ask_states(
    server: Server, questions: Questions, states: Sequence[str], found: Answers
) -> Iterator[None]:
    """Asks the prompts in these states, of STATES; yields after each state."""
    sizes = questions.sizes
    for state in states:
        if state == HOST:
            for pusher in questions.pushers:
                ask(server, pusher, 1)
        elif state == DISK:
            flush(server)
        # The one that was used the longest ago first.
        answers = [ask(server, prompt, sizes.new) for prompt in questions.prompts]
        found.tokens[state] = [tokens for tokens, _ in answers]
        found.by_tier[state] = [tiers for _, tiers in answers]
        yield


def ask_gangs(server: Server, questions: Questions, found: Answers) -> None:
    """One prefix alone and together; then strangers."""
    n_new = questions.sizes.gang_new
    found.gang_alone = [ask(server, prompt, n_new)[0] for prompt in questions.gang]
    found.gang = together(server, questions.gang, n_new)
    found.strangers = together(server, questions.strangers, n_new)


@contextlib.contextmanager
def gives_up(name: str, result: dict[str, Any]) -> Iterator[None]:
    """A server that does not answer is what is wrong with it, and no reason to ask no other."""
    try:
        yield
    except (ServerError, requests.RequestException) as error:
        print(error, flush=True)
        result["wrong"][name] = [f"did not answer: {str(error).splitlines()[0]}"]


def ask(server: Server, prompt: Sequence[int], n_new: int) -> tuple[list[int], dict[str, int]]:
    """The answer, and how many tokens of the prompt were cached where."""
    sampling = {"temperature": 0, "max_new_tokens": n_new, "ignore_eos": True}
    body = {"input_ids": list(prompt), "sampling_params": sampling}
    response = server.post("/generate", body)
    response.raise_for_status()
    answer = response.json()
    details = answer["meta_info"].get("cached_tokens_details") or {}
    return answer["output_ids"], {k: n for k, n in details.items() if isinstance(n, int) and n}


def together(server: Server, prompts: Sequence[Sequence[int]], n_new: int) -> list[list[int]]:
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda prompt: ask(server, prompt, n_new)[0], prompts))


def flush(server: Server) -> None:
    """Empties device and host, once everything is on disk: a busy server refuses."""
    if "--tiered-kv" in server.args:
        wait_for_disk(server, timeout_s=FLUSH_TIMEOUT_S)
    server.flush_cache(FLUSH_TIMEOUT_S)


def agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """How far answers are the same, from their first tokens on: 1 if all are equal."""
    shares = []
    for a, b in zip(ours, theirs, strict=True):
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
        shares.append(len(list(same)) / max(len(a), len(b), 1))
    return statistics.fmean(shares)


def compared(
    found: Answers, plain: Mapping[str, Any], *, rounds_alike: bool = True
) -> dict[str, Any]:
    """What is wrong with a system's answers, if anything, and the figures that say so.

    rounds_alike: whether its passes have the shapes of plain SGLang's. Those of a system without
    CUDA graphs are not padded: what it loads must give the answers of its own device, and these
    must agree with plain SGLang's as far as those of a gang.
    """
    wrong: list[str] = []
    equal: dict[str, str] = {}
    agreed: dict[str, float] = {}
    noise = agreement(plain["gang"], plain["gang_alone"])

    def must_agree(name: str, ours: Sequence[Sequence[int]], theirs: Any, least: float) -> None:
        agreed[name] = agreement(ours, theirs)
        if agreed[name] < least * noise:
            wrong.append(
                f"{name}: {agreed[name]:.2f} of the answers agree, and {noise:.2f} of plain "
                "SGLang's with its own"
            )

    for state, tokens in found.tokens.items():
        expected = plain["tokens"][FRESH if state == FRESH else DEVICE]
        if not rounds_alike and state in (FRESH, DEVICE):
            must_agree(state, tokens, expected, FEW_AGREEMENT_MIN)
        else:
            expected = expected if rounds_alike else found.tokens[DEVICE]
            n_equal = sum(a == b for a, b in zip(tokens, expected, strict=True))
            equal[state] = f"{n_equal} of {len(tokens)}"
            if n_equal < len(tokens):
                wrong.append(f"{len(tokens) - n_equal} answers differ, {state}")
        tier = TIERS.get(state)
        if tier is not None and not all(tiers.get(tier) for tiers in found.by_tier[state]):
            wrong.append(f"{state}: not all came from the {tier}")
    for name in ("gang", "strangers"):
        if ours := getattr(found, name):
            must_agree(name, ours, plain[name], AGREEMENT_MIN)
    return {"equal": equal, "agreement": agreed, "noise": 1 - noise, "wrong": wrong}


def depends_on_prefix(plain: Answers) -> bool:
    """Whether prompts that differ in their prefixes alone are answered differently: else equal
    answers say nothing."""
    answers = plain.tokens[DEVICE]
    return len({tuple(tokens) for tokens in answers}) == len(answers)


def measure(setting: Setting, notes: Record) -> dict[str, Any]:
    """Both servers at once: what counts is what they say. Raises RuntimeError if it is wrong."""
    sizes, questions = sizes_of(setting), Questions(sizes_of(setting))
    model = systems.write_model(setting.folder / "model", setting.is_small)
    result: dict[str, Any] = {"sizes": asdict(sizes), "start_s": {}, "wrong": {}}
    with systems.emptied(setting.folder / "answers_disk") as disk:
        common = systems.common_flags(setting, sizes.page, sizes.device)
        tiered = systems.tiered_flags(setting, sizes.host * sizes.token_bytes, disk)
        tiered += AS_PLAIN
        servers = {
            "plain": systems.server_of(STEP, "plain", setting, model, common),
            "tiered": systems.server_of(STEP, "tiered", setting, model, [*common, *tiered]),
        }
        with systems.up_together(servers) as (up, failed):
            result["failed"] = failed
            result["start_s"] = {name: server.start_seconds for name, server in up.items()}
            result["captures"] = {name: systems.captures(server) for name, server in up.items()}
            notes.so_far(result)
            for name, server in up.items():
                found, states = Answers(), (FRESH, DEVICE) if name == "plain" else STATES
                with gives_up(name, result):
                    for _ in ask_states(server, questions, states, found):
                        result[name] = asdict(found)
                        notes.so_far(result)
                    ask_gangs(server, questions, found)
                    result[name] = asdict(found)
                    if name == "plain":
                        result["depends_on_prefix"] = depends_on_prefix(found)
                    elif result.get("plain", {}).get("strangers"):
                        result[f"{name}_compared"] = compared(found, result["plain"])
                        result["wrong"][name] = result[f"{name}_compared"]["wrong"]
                notes.so_far(result)
            result["trouble"] = systems.trouble(up)
            notes.so_far(result)
    check(result)
    return result


def check(result: Mapping[str, Any]) -> None:
    """Raises RuntimeError that says what is wrong."""
    wrong = [f"{name}: {', '.join(what)}" for name, what in result["wrong"].items() if what]
    wrong += [f"{name} did not start: {why}" for name, why in result["failed"].items()]
    if not result.get("depends_on_prefix", True):
        wrong.append("the model's answers do not depend on the prefix, so they say nothing")
    if wrong:
        raise RuntimeError("; ".join(wrong))
