"""What is wanted of one of SGLang's requests."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tiered_kv.plugin.requests.view import is_named_by_tokens


@pytest.mark.parametrize(
    ("overrides", "embeds", "named"),
    [(None, None, True), (object(), None, False), (None, [[0.0]], False)],
)
def test_only_prompts_made_of_tokens_alone_are_cached(
    overrides: object, embeds: object, named: bool
) -> None:
    req = SimpleNamespace(positional_embed_overrides=overrides, input_embeds=embeds)
    assert is_named_by_tokens(req) is named
