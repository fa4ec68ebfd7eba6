"""What is wanted of one of SGLang's requests."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tiered_kv.forest.inputs import PromptKey
from tiered_kv.forest.key import TreeKey
from tiered_kv.plugin.requests.view import is_named


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, True),
        ({"positional_embed_overrides": object()}, False),
        ({"input_embeds": [[0.0]]}, False),
        ({"multimodal_inputs": object()}, False),
        ({"multimodal_inputs": object(), "extra_key": TreeKey()}, False),
        ({"multimodal_inputs": object(), "extra_key": PromptKey(TreeKey(), ())}, True),
    ],
    ids=str,
)
def test_only_prompts_that_have_names_are_cached(fields: dict[str, object], named: bool) -> None:
    absent = {"positional_embed_overrides": None, "input_embeds": None, "multimodal_inputs": None}
    assert is_named(SimpleNamespace(**{"extra_key": None, **absent, **fields})) is named
