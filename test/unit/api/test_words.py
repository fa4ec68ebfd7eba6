"""What others call our fields (`api/words.py`).

Guarantee: whatever a body or header says in others' words is understood as ours, or refused in the
caller's own words; our own words count instead, and of several places the most specific.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiered_kv.api.fields import TermsError
from tiered_kv.api.hints import Hints
from tiered_kv.api.parse import fields_in_body, fields_in_headers, parse_terms
from tiered_kv.api.slo import DEFAULT_CLASSES
from tiered_kv.api.words import BODY_WORDS, HEADER_WORDS, merged


def hints(body: dict[str, Any]) -> Hints:
    found = fields_in_body(body, DEFAULT_CLASSES)
    return parse_terms(found.get("slo"), found.get("hints"), DEFAULT_CLASSES).hints


@pytest.mark.parametrize(
    ("body", "understood"),
    [
        ({"session_id": "a"}, Hints(session_id="a")),
        ({"program_id": "a", "session_id": "b"}, Hints(session_id="a")),
        ({"prompt_cache_key": "a"}, Hints(session_id="a")),
        ({"session_id": "a", "prompt_cache_key": "b"}, Hints(session_id="a")),
        ({"session_id": "a", "hints": {"session_id": "b"}}, Hints(session_id="b")),
        ({"nvext": {"agent_hints": {"osl": 7}}}, Hints(7)),
        ({"nvext": {"agent_hints": {"priority": 5}}}, Hints(priority=5)),
        ({"nvext": {"agent_hints": {"speculative_prefill": True}}}, Hints()),
        ({"nvext": {"annotations": ["x"]}}, Hints()),
        ({"nvext": 5, "model": "m"}, Hints()),
        ({"nvext": {"agent_hints": {"osl": 7}}, "hints": {"priority": 1}}, Hints(7, priority=1)),
    ],
)
def test_bodies(body: dict[str, Any], understood: Hints) -> None:
    assert hints(body) == understood


def chat(*calls: str | None, results: int = 1) -> dict[str, Any]:
    """An OpenAI chat whose last turn called these tools, and had so many results."""
    made = [{"id": "1", "type": "function", "function": {"name": name}} for name in calls]
    asked: list[Any] = [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": made}]
    return {"messages": asked + [{"role": "tool", "content": "!"}] * results}


@pytest.mark.parametrize(
    ("body", "tool"),
    [
        (chat("read"), "read"),
        (chat("read", "test", results=2), "test"),
        (chat("read", results=0), None),
        (chat(), None),
        (chat(None), None),
        (chat("x" * 65), None),
        ({**chat("read"), "hints": {"tool": "search"}}, "search"),
        ({"messages": [*chat("read")["messages"], {"role": "user", "content": "?"}]}, None),
        ({"messages": [{"role": "tool"}]}, None),
        ({"messages": [None, {"role": "tool"}]}, None),
        ({"messages": [{"role": "assistant", "tool_calls": [5]}, {"role": "tool"}]}, None),
        ({"messages": "no list"}, None),
    ],
)
def test_the_tool_whose_result_openai_s_messages_end_with(
    body: dict[str, Any], tool: str | None
) -> None:
    assert hints(body).tool == tool


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (
            {"nvext": {"agent_hints": {"osl": 0}}},
            "nvext.agent_hints.osl must be a whole number from 1 to 10000000, not 0.",
        ),
        ({"program_id": 5}, "program_id must be a name of 1 to 512 characters, not 5."),
        ({"hints": {"tool": ""}}, "hints.tool must be a name of 1 to 64 characters, not ''."),
    ],
)
def test_refusals_name_what_was_sent(body: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TermsError) as error:
        hints(body)
    assert str(error.value) == sentence


def test_headers() -> None:
    found = fields_in_headers(
        {
            "x-dynamo-session-id": "run:researcher",
            "x-dynamo-parent-session-id": "run",
            "x-dynamo-session-final": "true",
            "x-slo-tpot-ms": "40",
        },
        DEFAULT_CLASSES,
    )
    assert parse_terms(found["slo"], found["hints"], DEFAULT_CLASSES).slo.tbt_s == 0.04
    assert found["hints"] == {
        "session_id": "run:researcher",
        "parent_session_id": "run",
        "session_final": True,
    }


def test_our_own_headers_count_instead() -> None:
    both = {"x-dynamo-session-id": "a", "x-hints-session-id": "b", "x-slo-tpot-ms": "9"}
    found = fields_in_headers({**both, "x-slo-tbt-ms": "8"}, DEFAULT_CLASSES)
    assert found == {"slo": {"tbt_ms": 8.0}, "hints": {"session_id": "b"}}


def test_refusals_name_the_header() -> None:
    for header, what in (("x-slo-tpot-ms", "a number"), ("x-dynamo-session-final", "true")):
        with pytest.raises(TermsError, match=f"^{header} must be {what}"):
            fields_in_headers({header: "soon"}, DEFAULT_CLASSES)


def test_hints_are_joined_and_objectives_are_not() -> None:
    outer = {"slo": {"class": "batch"}, "hints": {"session_id": "a", "priority": 1}}
    inner = {"slo": {"ttft_ms": 5}, "hints": {"priority": 2, "session_id": None}}
    assert merged(outer, inner) == {
        "slo": {"ttft_ms": 5},
        "hints": {"session_id": "a", "priority": 2},
    }
    assert merged({}, {"slo": {}}) == {"slo": {}}


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=600)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5
)
AGENT_HINTS = st.dictionaries(st.sampled_from(("osl", "priority", "other")), JSON) | JSON
BODIES = st.fixed_dictionaries(
    {},
    optional={
        **{word.path[0]: JSON for word in BODY_WORDS if len(word.path) == 1},
        "nvext": st.fixed_dictionaries({"agent_hints": AGENT_HINTS}) | JSON,
        "hints": st.none() | st.fixed_dictionaries({"session_id": st.text(max_size=3)}),
    },
)


@given(BODIES)
def test_any_body_is_understood_or_refused(body: dict[str, Any]) -> None:
    try:
        found = hints(body)
    except TermsError as refusal:
        sentence = str(refusal)
    else:
        sentence = ""
    assert len(sentence) < 300
    if sentence:
        return
    for name in (found.session_id, found.parent_session_id):
        assert name is None or 0 < len(name) <= 512
    assert found.priority is None or abs(found.priority) <= 2**31


@given(st.dictionaries(st.sampled_from([word.name for word in HEADER_WORDS]), st.text()))
def test_any_header_is_understood_or_refused(headers: dict[str, str]) -> None:
    try:
        found = fields_in_headers(headers, DEFAULT_CLASSES)
    except TermsError as refusal:
        named = str(refusal).split(" ", 1)[0]
    else:
        named = ""
    assert not named or named in headers
    if named:
        return
    parse_terms(found.get("slo"), found.get("hints"), DEFAULT_CLASSES)
