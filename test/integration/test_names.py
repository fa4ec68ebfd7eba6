"""Never somebody else's KV, and never an old one: who finds what, over real routes and restarts."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.client import Answer, generate, request_body
from harness.demo_model import host_size
from harness.metrics import scrape, wait_for_disk
from harness.prompts import PromptMaker, story
from harness.server import ALWAYS_LOAD, FLOAT32, Server
from support.adapters import write_adapter
from support.injection import injected
from support.kv_events import KvEventListener
from tiered_kv.metrics import names
from tiered_kv.plugin.upstream.installed import installed

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

MakeServer = Callable[..., Server]
#: Fields of a body beside the prompt.
Body = dict[str, Any]

#: Every route of SGLang 0.5.17 on which a language model generates or scores, with its prompt; but
#: for Ollama's /api/chat, which answers everything with 500 beside transformers 5.
ROUTES: dict[str, Callable[[str], Body]] = {
    "/v1/completions": lambda text: {"model": "m", "prompt": text, "max_tokens": 2},
    "/v1/chat/completions": lambda text: chat(text, n=1),
    # `body_of` adds the model: 0.5.17 wants one, and 0.5.23 one that is served.
    "/v1/responses": lambda text: {"input": text, "max_output_tokens": 4, "store": False},
    "/v1/messages": lambda text: chat(text, temperature=0),
    "/v1/score": lambda text: {
        "model": "m", "query": text, "items": ["yes"], "label_token_ids": [1, 2]
    },
    "/generate": lambda text: request_body(text, 2),
    "/invocations": lambda text: chat(text, n=1),
    "/vertex_generate": lambda text: {"instances": [{"text": text}], "parameters": sampling(2)},
    "/api/generate": lambda text: ollama(prompt=text),
}  # fmt: skip


def body_of(server: Server, route: str, text: str) -> Body:
    served = {"model": str(server.model)} if route == "/v1/responses" else {}
    return {**served, **ROUTES[route](text)}


def chat(text: str, **fields: Any) -> Body:
    messages = [{"role": "user", "content": text}]
    return {"model": "m", "messages": messages, "max_tokens": 2, **fields}


def sampling(n: int) -> Body:
    return {"sampling_params": {"temperature": 0, "max_new_tokens": n}}


def ollama(**prompt: Any) -> Body:
    return {"model": "m", "stream": False, "options": {"num_predict": 2}, **prompt}


def hit_tokens(server: Server) -> float:
    return scrape(server).of(names.HIT_TOKENS)


@pytest.mark.parametrize("route", ROUTES)
def test_a_salt_holds_on_every_route(three_tiers: Server, route: str) -> None:
    prompt = body_of(three_tiers, route, story(f"salt {route}", 12))

    def hits(**fields: Any) -> float:
        before = hit_tokens(three_tiers)
        response = three_tiers.post(route, {**prompt, **fields})
        assert response.status_code == 200, response.text
        return hit_tokens(three_tiers) - before

    alice = f"alice {route}"
    assert hits(cache_salt=alice) == 0
    own = hits(cache_salt=alice)
    assert own >= 48
    assert hits(cache_salt=f"bob {route}") == 0
    assert hits(cache_salt=alice[:2], extra_key=alice[2:]) == 0
    assert hits(extra_key=alice) == 0
    assert hits() <= 32, "more than a chat template that others have used"
    assert hits() == own


@pytest.mark.parametrize("route", [*ROUTES, "/api/chat"])
@pytest.mark.parametrize("value", [5, ["alice", "bob"], {"alice": "bob"}])
def test_a_salt_that_is_not_for_this_prompt_is_refused(
    three_tiers: Server, route: str, value: Any
) -> None:
    body = body_of(three_tiers, route, "x") if route in ROUTES else chat("x")
    response = three_tiers.post(route, {**body, "cache_salt": value, "stream": True})
    assert response.status_code == 400, response.text
    assert "cache_salt" in response.text


def test_salts_of_their_own_for_the_prompts_of_a_batch(three_tiers: Server) -> None:
    prompt = story("batch of salts", 4)

    def cached(route: str, body: Body) -> list[int]:
        response = three_tiers.post(route, body)
        assert response.status_code == 200, response.text
        return [one["meta_info"]["cached_tokens"] for one in response.json()]

    batch = {"text": [prompt, prompt], **sampling(2), "cache_salt": ["one", "two"]}
    assert cached("/generate", batch) == [0, 0]
    assert all(cached("/generate", batch))
    three = {**batch, "text": [prompt] * 3, "cache_salt": ["two", "three", None]}
    assert [n > 0 for n in cached("/generate", three)] == [True, False, False]
    before = hit_tokens(three_tiers)
    completions = {"model": "m", "prompt": [prompt] * 2, "max_tokens": 2, "cache_salt": ["4", "5"]}
    for _ in range(2):
        assert three_tiers.post("/v1/completions", completions).status_code == 200
    assert hit_tokens(three_tiers) > before
    for salts in (["one"], ["one", "two", "three"], []):
        refused = three_tiers.post("/generate", {**batch, "cache_salt": salts, "stream": True})
        assert refused.status_code == 400, refused.text


def test_events_tell_salts_apart(
    three_tiers: Server, prompts: PromptMaker, kv_events: KvEventListener
) -> None:
    prompt = prompts.tokens("events of salts", 40)
    kv_events.collect()
    kv_events.blocks.clear()
    for salt in (None, "one", "two"):
        generate(three_tiers, prompt, 1, cache_salt=salt)
    kv_events.collect()
    first = [
        block
        for block in kv_events.blocks
        if block["token_ids"] == list(prompt[:16]) and block["medium"] == "GPU"
    ]
    # By these routers tell trees apart; salts are said where events are for Dynamo's.
    trees = [(block["parent_block_hash"], block.get("cache_salt")) for block in first]
    assert len(trees) == len(set(trees)) == 3
    assert (None, None) in trees
    assert len({tuple(block["block_hashes"]) for block in first}) == 3
    if installed() != "0.5.17":
        assert set(trees) == {(None, None), (None, "one"), (None, "two")}


# -- adapters ----------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.timeout(600)
def test_adapters_are_known_by_what_they_contain(
    make_server: MakeServer, demo_model: Path, prompts: PromptMaker, tmp_path: Path
) -> None:
    """Trained again into its folder, loaded at run time, and other contents under one name."""
    fixed = write_adapter(tmp_path / "fixed", demo_model, seed=1)
    folders = {seed: write_adapter(tmp_path / f"seed {seed}", demo_model, seed) for seed in (2, 3)}
    args = ["--page-size", 16, "--max-total-tokens", 2048, "--chunked-prefill-size", 256]
    args += ["--tiered-kv", *ALWAYS_LOAD, "--tiered-kv-host-size", host_size(2048)]
    args += ["--tiered-kv-disk-dir", tmp_path / "disk", "--tiered-kv-disk-size", "300MB"]
    args += ["--enable-lora", "--lora-backend", "torch_native", "--max-loras-per-batch", 3]
    args += ["--lora-paths", f"fixed={fixed}", "--enable-metrics", "--tiered-kv-debug-integrity"]
    args += ["--max-loaded-loras", 3]
    server = make_server("adapters", *FLOAT32, *args, env=injected("unpinned"))
    prompt = prompts.tokens("adapters", 200)
    salts = (f"alone {i}" for i in itertools.count())

    def load(seed: int) -> None:
        body = {"lora_name": "loaded", "lora_path": str(folders[seed])}
        assert server.post("/load_lora_adapter", body).json()["success"]

    def ask(adapter: str | None, **extra: Any) -> Answer:
        path = {} if adapter is None else {"lora_path": adapter}
        return generate(server, prompt, 8, **path, **extra)

    def truth(adapter: str | None) -> tuple[int, ...]:
        cold = ask(adapter, cache_salt=next(salts))
        assert cold.cached_tokens == 0
        return cold.output_ids

    with server:
        first = ask("fixed")
        assert first.cached_tokens == 0
        # SGLang's name of the adapter, as an extra key of a request without one.
        spelled = uuid.uuid5(uuid.NAMESPACE_URL, f"fixed\0{fixed}").hex
        assert ask(None, extra_key=spelled).cached_tokens == 0
        load(2)
        second = ask("loaded")
        assert second.cached_tokens == 0
        assert server.post("/unload_lora_adapter", {"lora_name": "loaded"}).json()["success"]
        load(3)
        third = ask("loaded")
        assert third.cached_tokens == 0
        assert len({first.output_ids, second.output_ids, third.output_ids}) == 3
        assert ask("fixed").device == 192
        wait_for_disk(server)
    with server:
        assert (again := ask("fixed")).disk == 192
        load(2)
        assert (again_loaded := ask("loaded")).disk == 192
        assert (again.output_ids, again_loaded.output_ids) == (first.output_ids, second.output_ids)
        wait_for_disk(server)
    write_adapter(fixed, demo_model, seed=4)
    with server:
        retrained = ask("fixed")
        assert retrained.cached_tokens == 0
        assert retrained.output_ids == truth("fixed") != first.output_ids
        # One that KV is kept of, under a name that had other contents.
        load(3)
        assert ask("loaded").disk == 192
