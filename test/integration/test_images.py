"""Images: KV from every tier gives the answers of plain SGLang, and none is taken for another.

Small random models in the shapes of Qwen's. The prompts are the same text: what tells them apart is
the image.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests

from harness.client import Answer, generate, in_parallel, post_generate, request_body
from harness.metrics import wait_for_disk
from harness.server import ALWAYS_LOAD, FLOAT32, Server
from support.injection import injected
from support.vision_models import (
    IMAGE,
    NO_FFMPEG,
    SIDE,
    SIDE_3,
    image,
    tiny_qwen2_5_vl,
    tiny_qwen2_vl,
    tiny_qwen3_vl,
)
from support.workload import retracting

pytestmark = [pytest.mark.server, pytest.mark.long, pytest.mark.timeout(1800)]

PAGE = 16
POOL = ("--page-size", PAGE, "--max-total-tokens", 768, "--chunked-prefill-size", 128)
#: An image of 64 tokens begins on the seventh page, and the 128th token of a chunk is in it.
BEFORE = "It was seen from far away. " * 15
PROMPT = BEFORE + IMAGE + " What is it, and what is it not? " * 10
SHARED, WHOLE = 96, 272
RETRACTED = retracting(10)
#: What makes a model, and the side of what becomes one token.
MODELS = {
    "Qwen2.5-VL": (tiny_qwen2_5_vl, SIDE),
    "Qwen2-VL": (tiny_qwen2_vl, SIDE),
    "Qwen3-VL": (tiny_qwen3_vl, SIDE_3),
}


def ask(server: Server, seed: int, side: int, **extra: Any) -> Answer:
    return generate(server, PROMPT, image_data=[image(seed, 8, 8, side)], **extra)


def ask_all(server: Server, seeds: range, side: int) -> list[Answer]:
    return [ask(server, seed, side) for seed in seeds]


class Chat:
    """Two turns, each with an image; both servers are told the same answer to the first."""

    def __init__(self, side: int) -> None:
        self._side = side
        self.messages = [self._says(f"{BEFORE} And this?", 21)]

    def _says(self, text: str, seed: int) -> dict[str, Any]:
        parts = [{"type": "image_url", "image_url": {"url": image(seed, 8, 8, self._side)}}]
        return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}

    def goes_on(self) -> None:
        self.messages.append({"role": "assistant", "content": "A house with a garden."})
        self.messages.append(self._says("And which one is that?", 22))

    def ask(self, server: Server) -> tuple[str, int, int]:
        """The answer, and tokens of the prompt: all, and those that were cached."""
        body = {"model": "m", "messages": self.messages, "temperature": 0, "max_tokens": 8}
        response = server.post("/v1/chat/completions", {**body, "ignore_eos": True})
        assert response.status_code == 200, response.text
        answer = response.json()
        usage = answer["usage"]
        cached = (usage["prompt_tokens_details"] or {}).get("cached_tokens", 0)
        return answer["choices"][0]["message"]["content"], usage["prompt_tokens"], cached


def load(n: int, seed: int, side: int) -> list[dict[str, Any]]:
    """Bodies of requests with one or two of four images, and some with none."""
    rng = random.Random(seed)
    bodies = []
    for i in range(n):
        images = [image(rng.randrange(31, 35), 8, 8, side) for _ in range(rng.choice((0, 1, 1, 2)))]
        text = BEFORE[: rng.randrange(len(BEFORE))] + IMAGE * len(images) + f" Number {i}?"
        sent = {"image_data": images} if images else {}
        bodies.append(request_body(text, rng.randrange(8, 40), **sent))
    return bodies


def answers_of(server: Server, bodies: list[dict[str, Any]], concurrency: int) -> list[Answer]:
    def one(body: dict[str, Any]) -> Answer:
        response = post_generate(server, body)
        assert response.status_code == 200, response.text
        return Answer.of(response.json())

    return in_parallel(one, bodies, concurrency)


def give_up(server: Server, seed: int) -> None:
    """A client that goes away while its image is prefilled, or soon after."""
    body = request_body(PROMPT + f" {seed}", 200, image_data=[image(seed, 8, 8)])
    with contextlib.suppress(requests.RequestException):
        requests.post(f"{server.url}/generate", json=body, timeout=0.1 + seed % 5 * 0.1)


def send_wrong_ones(server: Server) -> None:
    """What is wrong with images is answered with 400, and the server goes on."""
    good, junk = image(1), "data:image/png;base64,AAAA"
    written_out = [[0.0] * 128] * 16
    wrong: list[tuple[str, list[object]]] = [
        (IMAGE, [junk]),
        (IMAGE, ["no image"]),
        (IMAGE, [{"format": "precomputed_embedding", "feature": written_out}]),
        (IMAGE * 2, [good]),
        (IMAGE + "<|image_pad|>", [good]),
    ]
    for text, images in wrong:
        response = post_generate(server, request_body(text, 4, image_data=images))
        assert response.status_code == 400, (text, response.status_code, response.text)
        assert generate(server, "And now?", 4).finish_reason == "length"


@pytest.mark.parametrize(("make_model", "side"), MODELS.values(), ids=list(MODELS))
def test_images_from_every_tier(
    make_model: Callable[[Path, Path], Path],
    side: int,
    make_server: Callable[..., Server],
    demo_model: Path,
    tmp_path: Path,
) -> None:
    model = make_model(demo_model, tmp_path / "model")
    fields = {"model": model, "passages": NO_FFMPEG}
    # What SGLang compiles takes minutes on two cores, and computes the same.
    uncompiled = {"TORCHDYNAMO_DISABLE": "1"}
    args = [*FLOAT32, *POOL, "--enable-cache-report"]
    bodies = load(24, 3, side)
    chat = Chat(side)
    only_platform = {**uncompiled, "SGLANG_PLUGINS": "tiered_kv_cpu"}
    with make_server("images_plain", *args, **fields, env=only_platform) as plain:
        truths = [answer.output_ids for answer in ask_all(plain, range(5), side)]
        alone = answers_of(plain, bodies, 1)
        first = chat.ask(plain)
        chat.goes_on()
        second = chat.ask(plain)
    assert len(set(truths)) == 5, "the model ignores its images"

    args += ["--tiered-kv", *ALWAYS_LOAD, "--tiered-kv-host-size", "4MB", "--enable-metrics"]
    args += ["--tiered-kv-disk-dir", tmp_path / "disk", "--tiered-kv-disk-size", "300MB"]
    args += ["--tiered-kv-debug-integrity"]
    env = {**uncompiled, **RETRACTED}
    refusals = [r"http_server\] Error"]
    with make_server("images", *args, **fields, env=env, expected=refusals) as server:
        computed = ask_all(server, range(5), side)
        from_device = ask(server, 4, side)
        from_host = ask(server, 0, side)
        wait_for_disk(server)
        server.flush_cache()
        from_disk = ask_all(server, range(5), side)
        chat = Chat(side)
        assert chat.ask(server)[0] == first[0]
        chat.goes_on()
        answer, _, n_cached = chat.ask(server)
        server.flush_cache()
        send_wrong_ones(server)
        in_parallel(lambda seed: give_up(server, seed), range(41, 51), 4)
        under_load = answers_of(server, bodies, 8)
        again = answers_of(server, bodies, 8)
        wait_for_disk(server)
    wrong = {**uncompiled, **injected("corrupt_host")}
    with make_server("images_wrong", *args, **fields, env=wrong) as server:
        after_restart = ask_all(server, range(5), side)

    assert [answer.cached_tokens for answer in computed] == [0] + [SHARED] * 4
    assert from_device.device == WHOLE
    assert from_host.host >= WHOLE - SHARED, from_host
    assert from_host.host + from_host.device == WHOLE
    for from_cold in (from_disk, after_restart):
        assert [answer.cached_tokens for answer in from_cold] == [WHOLE] * 5
        assert [answer.disk for answer in from_cold] == [WHOLE] + [WHOLE - SHARED] * 4
    assert [answer.output_ids for answer in computed] == truths
    assert [from_device.output_ids, from_host.output_ids] == [truths[4], truths[0]]
    assert [answer.output_ids for answer in from_disk] == truths
    assert answer == second[0]
    assert n_cached >= first[1] // PAGE * PAGE, "the second turn computed the first one's image"
    for answers in (under_load, again):
        assert [one.output_ids for one in answers] == [one.output_ids for one in alone]
        assert sum(one.meta_info["num_retractions"] for one in answers) > 0
    # A small model may say the same of wrong KV, but not five times.
    assert [answer.output_ids for answer in after_restart] != truths, "wrong KV does not show"
