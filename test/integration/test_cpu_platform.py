"""Stock SGLang on the CPU platform, without --tiered-kv: everything a scheduler does works there.

The plugin isn't loaded, only the platform is. In float32, where a request's answer doesn't depend
on what runs beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest

from harness.client import Answer, generate, generate_all
from harness.prompts import PromptMaker
from harness.server import FLOAT32, Server
from tiered_kv.plugin.start.platform import has_accelerator

pytestmark = [
    pytest.mark.server,
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.skipif(has_accelerator(), reason="needs a machine without an accelerator"),
]

ONLY_PLATFORM = {"SGLANG_PLUGINS": "tiered_kv_cpu"}
# Admission expects answers of 16 tokens and they get ten times as long: three requests are admitted
# where two have room, and some must be retracted.
SHORT_ANSWERS_EXPECTED = {"SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "16"}
PROMPT_TOKENS = 100
NEW_TOKENS = 160
POOL_TOKENS = 768


@pytest.fixture(scope="module", params=[1, 64])
def server(make_server: Callable[..., Server], request: pytest.FixtureRequest) -> Iterator[Server]:
    flags = ["--page-size", request.param, "--max-total-tokens", POOL_TOKENS]
    flags += ["--chunked-prefill-size", 64]
    name = f"cpu_platform_page_{request.param}"
    env = ONLY_PLATFORM | SHORT_ANSWERS_EXPECTED
    with make_server(name, *FLOAT32, *flags, env=env) as server:
        yield server


def retractions(answers: list[Answer]) -> int:
    return sum(answer.meta_info["num_retractions"] for answer in answers)


def test_answers_survive_chunks_company_and_retraction(
    server: Server, prompts: PromptMaker
) -> None:
    tokens = [prompts.tokens(f"cpu-{number}", PROMPT_TOKENS) for number in range(6)]
    with_room = generate_all(server, tokens, NEW_TOKENS, concurrency=2)
    assert retractions(with_room) == 0
    server.flush_cache()
    crowded = generate_all(server, tokens, NEW_TOKENS, concurrency=6)
    assert [a.output_ids for a in crowded] == [a.output_ids for a in with_room]
    assert retractions(crowded) > 0


def test_a_prefix_is_found_again_and_flushed(server: Server, prompts: PromptMaker) -> None:
    prompt = prompts.tokens("cpu-prefix", 150)
    server.flush_cache()
    assert generate(server, prompt).cached_tokens == 0
    assert generate(server, prompt).cached_tokens >= 128  # whole pages, and never the last token
    server.flush_cache()
    assert generate(server, prompt).cached_tokens == 0


def test_a_json_schema_is_kept_to(server: Server) -> None:
    schema = {
        "type": "object",
        "properties": {"population": {"type": "integer", "minimum": 0, "maximum": 999}},
        "required": ["population"],
        "additionalProperties": False,
    }
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": "The population of Paris as JSON."}],
        "max_tokens": 64,
        "temperature": 0,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "city", "schema": schema},
        },
    }
    response = server.post("/v1/chat/completions", body)
    assert response.status_code == 200, response.text
    answer = json.loads(response.json()["choices"][0]["message"]["content"])
    assert 0 <= answer["population"] <= 999
