"""Orders from anywhere: what is meant, and one sentence for what cannot be."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiered_kv.api.cache_order import (
    KNOWN,
    MESSAGES_MAX,
    TIERS,
    CacheOrder,
    merged,
    parse_order,
)
from tiered_kv.api.fields import TermsError


def parsed(body: object) -> CacheOrder:
    return parse_order(body, most_seconds=600.0, most_tokens=1000)


def test_what_is_meant() -> None:
    assert parsed({"action": "inspect", "text": "a"}) == CacheOrder("inspect", text="a")
    order = parsed(
        {
            "action": "keep",
            "messages": [{"role": "user", "content": "a"}],
            "tools": [],
            "seconds": 600,
            "tenant": "blue",
            "cache_salt": "s",
            "extra_key": None,
            "lora_path": "l",
        }
    )
    assert (order.tier, order.seconds, order.tenant) == ("host", 600.0, "blue")
    assert (order.cache_salt, order.extra_key, order.lora_path) == ("s", None, "l")
    assert order.chat == {"tools": []}
    tiers = [
        parsed({"action": action, "text": "a", "seconds": None}).tier
        for action in TIERS
        if action != "keep"
    ]
    assert tiers == [None, "host", "disk", None]


@pytest.mark.parametrize("word", ["session_id", "program_id", "prompt_cache_key"])
def test_a_session_in_the_words_of_the_api(word: str) -> None:
    assert parsed({"action": "drop", word: "s"}).session_id == "s"


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ([], "The body must be an object"),
        (None, "The body must be an object"),
        ({}, "action must be one of inspect, prefetch, keep, demote, drop, not None."),
        ({"action": ["drop"], "text": "a"}, "action must be one of"),
        (
            {"action": "drop"},
            "what the order is about; none came.",
        ),
        ({"action": "drop", "text": "a", "session_id": "s"}, "text and session_id came."),
        ({"action": "drop", "session_id": "s", "program_id": "t"}, "name the same thing"),
        ({"action": "drop", "session_id": "s", "cache_salt": "t"}, "a session knows its own"),
        ({"action": "drop", "text": ""}, "text must be a text of 1 to"),
        ({"action": "drop", "text": 7}, "text must be a text of 1 to"),
        ({"action": "drop", "text": "a", "x" * 500: 1}, "is not known"),
        ({"action": "drop", "text": "a", "tools": []}, "tools goes with messages"),
        ({"action": "drop", "token_ids": []}, "token_ids must be a list of 1 to 1000"),
        ({"action": "drop", "token_ids": [1] * 1001}, "token_ids must be a list of 1 to 1000"),
        ({"action": "drop", "token_ids": [1, True]}, "True is none."),
        ({"action": "drop", "token_ids": [1.0]}, "1.0 is none."),
        ({"action": "drop", "token_ids": [-1]}, "-1 is none."),
        ({"action": "drop", "token_ids": [2**31]}, "is none."),
        ({"action": "drop", "token_ids": [10**4000]}, "is none."),
        ({"action": "drop", "token_ids": {"a": 1}}, "token_ids must be a list"),
        ({"action": "drop", "messages": "a"}, "messages must be a list"),
        ({"action": "drop", "messages": [{}] * (MESSAGES_MAX + 1)}, "messages must be a list"),
        ({"action": "drop", "text": "a", "tier": "host"}, "tier does not go with drop"),
        ({"action": "keep", "text": "a", "tier": "device", "seconds": 1}, "one of host, disk"),
        ({"action": "keep", "text": "a", "tier": ["host"], "seconds": 1}, "one of host, disk"),
        ({"action": "drop", "text": "a", "seconds": 1}, "seconds does not go with drop"),
        ({"action": "keep", "text": "a"}, "keep wants seconds, from 0"),
        ({"action": "keep", "text": "a", "seconds": 601}, "from 0 to 600"),
        ({"action": "keep", "text": "a", "seconds": float("nan")}, "from 0 to 600"),
        ({"action": "keep", "text": "a", "seconds": "1"}, "from 0 to 600"),
        ({"action": "keep", "text": "a", "seconds": True}, "from 0 to 600"),
        ({"action": "drop", "text": "a", "tenant": "t" * 65}, "tenant must be"),
        ({"action": "drop", "text": "a", "lora_path": {}}, "lora_path must be"),
    ],
)
def test_what_cannot_be(body: object, sentence: str) -> None:
    with pytest.raises(TermsError) as error:
        parsed(body)
    assert sentence in str(error.value)
    assert len(str(error.value)) < 600
    assert str(error.value).endswith(".")


def test_a_server_that_keeps_nothing() -> None:
    with pytest.raises(TermsError, match="--tiered-kv-keep-seconds is 0"):
        parse_order({"action": "keep", "text": "a", "seconds": 0}, most_seconds=0, most_tokens=9)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@given(ANYTHING | st.dictionaries(st.sampled_from([*KNOWN, "more"]), ANYTHING))
def test_anything_is_an_order_or_a_sentence(body: Any) -> None:
    with suppress(TermsError):
        assert parsed(body).action in TIERS


def test_replicas_are_one_server() -> None:
    def outcome(**fields: Any) -> dict[str, Any]:
        return {
            "prompts": 1,
            "tokens": 100,
            "tiers": {"device": 64, "host": 0},
            "nowhere": 36,
            "kept": {"host": {"tokens": 64, "ends_in_s": 5.0}},
            "next_use_s": None,
            "next_use_probability": None,
            **fields,
        }

    both = [outcome(), outcome(kept={}, next_use_s=3.0, next_use_probability=0.5)]
    assert merged(both, is_session=False) == {
        "replicas": 2,
        "prompts": 1,
        "tokens": 100,
        "tiers": {"device": 128, "host": 0},
        "nowhere": 72,
        "kept": {"host": {"tokens": 64, "ends_in_s": 5.0}},
        "next_use_s": 3.0,
        "next_use_probability": 0.5,
    }
    assert merged(both, is_session=True)["prompts"] == 2
