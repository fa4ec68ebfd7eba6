"""Salt and extra key as two parts, from whatever says them to the scheduler.

Guarantee: two requests have one key if, and only if, they named the same salt and the same extra
key; a salt that would not be honoured is refused.
"""

from __future__ import annotations

import asyncio
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("sglang")

import msgspec
from fastapi import HTTPException
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest
from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
from sglang.srt.managers.io_struct import GenerateReqInput

from tiered_kv.api.fields import TermsError
from tiered_kv.api.slo import DEFAULT_CLASSES
from tiered_kv.api.trust import Trust
from tiered_kv.forest.key import TreeKey
from tiered_kv.plugin.requests import adapter as request_adapter
from tiered_kv.plugin.requests import salts
from tiered_kv.plugin.requests.salts import key_of, key_of_body, parts_of, put_key

ON = SimpleNamespace(tiered_kv=True, slo_classes=lambda: DEFAULT_CLASSES, trust=Trust)
OFF = SimpleNamespace(tiered_kv=False)
PART = st.none() | st.text(max_size=3) | st.sampled_from(["tiered-kv:", "-", ":", "\ud800"])


# -- one key -----------------------------------------------------------------------------------


@given(PART, PART, PART, PART)
def test_keys_are_equal_if_both_parts_are(
    salt: str | None, key: str | None, other_salt: str | None, other_key: str | None
) -> None:
    same = (salt or None, key or None) == (other_salt or None, other_key or None)
    one, other = key_of(salt, key), key_of(other_salt, other_key)
    assert (one == other) == same
    assert (parts_of(one) == parts_of(other)) == same
    assert (parts_of(one)[0] is None, parts_of(one)[1] is None) == (not salt, not key)


@given(st.text(min_size=1, max_size=80))
def test_text_that_is_no_key_is_an_extra_key(text: str) -> None:
    assert parts_of(text) == parts_of(key_of(None, text))


def test_a_key_is_short_whatever_was_sent() -> None:
    key = key_of("s" * 10**6, "k" * 10**6)
    assert key is not None
    assert len(key) < 200


# -- bodies ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"text": "x"}, None),
        ({"text": "x", "cache_salt": "", "extra_key": None}, None),
        ({"text": "x", "cache_salt": "a"}, key_of("a", None)),
        ({"messages": [], "extra_key": "a"}, key_of(None, "a")),
        ({"input": "x", "cache_salt": "a", "extra_key": "b"}, key_of("a", "b")),
        ({"prompt": ["x", "y"], "cache_salt": "a"}, key_of("a", None)),
        ({"prompt": ["x", "y"], "cache_salt": ["a", "b"]}, [key_of("a", None), key_of("b", None)]),
        (
            {"input_ids": [[1], [2]], "cache_salt": ["a", None], "extra_key": "k"},
            [key_of("a", "k"), key_of(None, "k")],
        ),
        (
            {"text": ["x", "y"], "cache_salt": ["a", "b"], "extra_key": ["k", "l"]},
            [key_of("a", "k"), key_of("b", "l")],
        ),
        ({"input_embeds": [[[0.1]], [[0.2]]], "extra_key": ["a", None]}, [key_of(None, "a"), None]),
        ({"model": "m", "prompt": "x", "options": {"cache_salt": "a"}}, key_of("a", None)),
        (
            {"instances": [{"text": "x"}], "parameters": {"cache_salt": "a", "extra_key": "b"}},
            key_of("a", "b"),
        ),
        (
            {"instances": [{}, {}], "parameters": {"cache_salt": ["a", "b"]}},
            [key_of("a", None), key_of("b", None)],
        ),
        ({"cache_salt": "a", "parameters": {"cache_salt": "b"}}, key_of("a", None)),
        ([1, 2], None),
        ("text", None),
        ({"parameters": 5, "options": [], "instances": {}}, None),
    ],
)  # fmt: skip
def test_a_body_says(body: Any, expected: Any) -> None:
    assert key_of_body(body) == expected


@pytest.mark.parametrize("field", ["cache_salt", "extra_key"])
@pytest.mark.parametrize(
    ("prompts", "value"),
    [
        ({"text": "x"}, 5),
        ({"text": "x"}, {"a": 1}),
        ({"text": "x"}, True),
        ({"text": "x"}, ["a"]),
        ({"messages": [{}, {}]}, ["a", "b"]),
        ({"input_ids": [1, 2]}, ["a", "b"]),
        ({"input_embeds": [[0.1], [0.2]]}, ["a", "b"]),
        ({"text": []}, ["a"]),
        ({"text": ["x", "y"]}, ["a"]),
        ({"text": ["x", "y"]}, ["a", 5]),
        ({"text": ["x", "y"]}, []),
        ({"query": "x", "items": ["y", "z"]}, ["a", "b"]),
    ],
)
def test_what_is_no_text_is_refused(field: str, prompts: dict[str, Any], value: Any) -> None:
    with pytest.raises(TermsError, match=rf"^{field} .*\.$"):
        key_of_body({**prompts, field: value})


def test_a_salt_for_an_instance_of_vertex_is_refused() -> None:
    with pytest.raises(TermsError, match=r"^cache_salt belongs into parameters"):
        key_of_body({"instances": [{"text": "x"}, {"text": "y", "cache_salt": "a"}]})


# -- requests ----------------------------------------------------------------------------------


class Request:
    """As much of an HTTP request as the hooks use."""

    def __init__(self, body: Any) -> None:
        self.body = body
        self.headers: dict[str, str] = {}
        self.scope: dict[str, Any] = {}

    async def json(self) -> Any:
        return self.body


@pytest.fixture(autouse=True)
def http_server(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.entrypoints import http_server

    state = SimpleNamespace(tokenizer_manager=SimpleNamespace(server_args=ON))
    monkeypatch.setattr(http_server, "_global_state", state)


def received(body: Any) -> Request:
    request = Request(body)
    asyncio.run(request_adapter.check_http_request(Request.json, request))
    return request


def lifted(obj: GenerateReqInput, request: Any = None) -> Any:
    manager = SimpleNamespace(server_args=ON, preferred_sampling_params=None)
    request_adapter.lift_fields(lambda *args: None, manager, obj, request)
    return obj.extra_key


def test_what_the_body_says_counts_whatever_the_route_made_of_it() -> None:
    request = received({"messages": [], "cache_salt": "ab", "extra_key": "c"})
    assert lifted(GenerateReqInput(text="x", extra_key="abc"), request) == key_of("ab", "c")
    # A loop over tools goes on with the key of the turn before.
    again = GenerateReqInput(text="x", extra_key=key_of("ab", "c"))
    assert lifted(again, request) == key_of("ab", "c")


def test_a_key_without_a_body_is_one_part() -> None:
    assert lifted(GenerateReqInput(text="x")) is None
    assert lifted(GenerateReqInput(text="x", extra_key="k")) == key_of(None, "k")
    assert lifted(GenerateReqInput(text=["x", "y"], extra_key=["k", ""])) == [
        key_of(None, "k"),
        "",
    ]
    with pytest.raises(ValueError, match="not a list"):
        lifted(GenerateReqInput(text="x", extra_key=["k"]))


def test_nobody_can_send_a_key_as_it_travels() -> None:
    forged = str(key_of("victim", None))
    assert lifted(GenerateReqInput(text="x", extra_key=forged)) == key_of(None, forged)
    request = received({"text": "x", "extra_key": forged})
    assert lifted(GenerateReqInput(text="x", extra_key=forged), request) == key_of(None, forged)


def test_a_key_is_plain_text_to_sglangs_encoder() -> None:
    for obj in (
        GenerateReqInput(text="x", extra_key="k"),
        GenerateReqInput(text=["x"], extra_key=["k"]),
    ):
        lifted(obj)
        obj.normalize_batch_and_arguments()
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(obj.extra_key)) == obj.extra_key


@pytest.mark.parametrize("n", [1, 3])
def test_every_row_and_every_choice_has_its_key(n: int) -> None:
    request = received({"text": ["x", "y"], "cache_salt": ["a", "b"], "extra_key": "k"})
    obj = GenerateReqInput(text=["x", "y"], sampling_params={"n": n}, extra_key="k")
    lifted(obj, request)
    obj.normalize_batch_and_arguments()
    rows = [obj[i] for i in range(2 * n)]
    expected = {"x": key_of("a", "k"), "y": key_of("b", "k")}
    assert [(row.text, row.extra_key) for row in rows] == [
        (text, expected[text]) for text in itertools.chain.from_iterable([["x", "y"]] * n)
    ]


def test_vertex_parameters_lose_the_salt_that_sglang_would_stumble_over() -> None:
    body = {"instances": [{"text": "x"}], "parameters": {"cache_salt": "a", "extra_key": "b"}}
    request = received(body)
    obj = GenerateReqInput(text=["x"], **body["parameters"])  # type: ignore[arg-type]
    assert lifted(obj, request) == key_of("a", "b")


@pytest.mark.parametrize("salt", [5, ["a"], {"a": 1}])
def test_a_bad_salt_is_400_before_the_route_runs(salt: Any) -> None:
    with pytest.raises(HTTPException) as error:
        received({"text": "x", "stream": True, "cache_salt": salt})
    assert error.value.status_code == 400
    assert error.value.detail.startswith("cache_salt must be a string")


# -- OpenAI's routes without an HTTP request, as gRPC calls them -----------------------------------


def serving(server_args: Any = ON) -> Any:
    return SimpleNamespace(tokenizer_manager=SimpleNamespace(server_args=server_args))


def computed(request: Any, server_args: Any = ON) -> Any:
    original = OpenAIServingChat._compute_extra_key
    return salts.compute_extra_key(original, serving(server_args), request)


JOINS = hasattr(OpenAIServingChat, "_compute_extra_key")
#: 0.5.23 has a field for each from its routes to the scheduler.
joins = pytest.mark.skipif(not JOINS, reason="this release of SGLang joins no salts and keys")


@joins
def test_openais_routes_keep_salt_and_key_apart() -> None:
    chat = ChatCompletionRequest(model="m", messages=[], cache_salt="ab", extra_key="c")
    assert computed(chat) == key_of("ab", "c")
    obj = GenerateReqInput(text="x", extra_key=computed(chat))
    put_key(obj, SimpleNamespace(is_disconnected=None))
    assert obj.extra_key == key_of("ab", "c")
    rows = CompletionRequest(model="m", prompt=["x", "y"], cache_salt=["a", "b"])
    assert computed(rows) == [key_of("a", None), key_of("b", None)]
    with pytest.raises(ValueError, match="not a list"):
        computed(ChatCompletionRequest(model="m", messages=[], cache_salt=["a", "b"]))


@joins
def test_a_stock_server_joins_them_as_ever() -> None:
    chat = ChatCompletionRequest(model="m", messages=[], cache_salt="ab", extra_key="c")
    assert computed(chat, OFF) == "abc"


def test_lists_with_gaps_are_taken_out_once_the_key_is_known() -> None:
    body = {"text": ["x", "y"], "cache_salt": ["a", None], "extra_key": [None, "k"], "n": 1}
    keys = key_of_body(body)
    salts.forget_unknown(body)
    assert body == {"text": ["x", "y"], "n": 1}
    assert keys == [key_of("a", None), key_of(None, "k")]
    for kept in ({"cache_salt": ["a", "b"]}, {"cache_salt": "a"}, {"extra_key": "k"}):
        before = dict(kept)
        salts.forget_unknown(kept)
        assert kept == before


# -- a salt in a field of its own -----------------------------------------------------------------


def test_a_salt_apart_names_the_tree_that_it_names_in_a_key() -> None:
    salt, key = salts.parts_of(key_of("s", "k"))
    assert salts.salted(None, "s") == salt
    assert salts.root_key(None, "s") == TreeKey(salt)
    assert salts.root_key("k", "s") == TreeKey(salt, key)
    assert salts.root_key(None, None) is None


def test_no_salt_apart_is_lost() -> None:
    names = [None, "a", "b", "ab"]
    trees = {salts.root_key(key, salt) for key in names for salt in names}
    assert len(trees) == len(names) ** 2
    inside, _ = salts.parts_of(key_of("a", None))
    assert len({inside, salts.salted(inside, "b"), salts.salted(None, "b")}) == 3


def test_the_name_of_a_request_has_its_salt_in_it_already() -> None:
    named = TreeKey(salts.salted(None, "s"))
    assert salts.root_key(named, "s") is named


def test_a_field_for_the_salt_is_named_in_the_key_and_goes_on_in_words() -> None:
    obj = SimpleNamespace(text="x", extra_key="k", cache_salt="s")
    put_key(obj, None)
    assert (obj.extra_key, obj.cache_salt) == (key_of("s", "k"), "s")
    assert salts.root_key(obj.extra_key, obj.cache_salt) == salts.root_key(key_of("s", "k"))
    lifted = SimpleNamespace(text="x", extra_key=None, cache_salt="client's")
    scope = {salts.SCOPE_KEY: key_of("said", None)}
    put_key(lifted, SimpleNamespace(scope=scope))
    assert (lifted.extra_key, lifted.cache_salt) == (key_of("said", None), "said")


def test_a_long_salt_is_named_and_not_told() -> None:
    long = "s" * (salts.SALT_TEXT_MAX + 1)
    obj = SimpleNamespace(text=["x", "y", "z"], extra_key=None, cache_salt=[long, "s", ""])
    put_key(obj, None)
    assert obj.extra_key == [key_of(long, None), key_of("s", None), ""]
    assert obj.cache_salt == ["", "s", ""]


@pytest.mark.skipif(JOINS, reason="this release of SGLang has no field for salts")
def test_sglang_takes_the_salts_of_a_batch_in_words() -> None:
    obj = GenerateReqInput(text=["x", "y"], cache_salt=["s", ""], sampling_params={"n": 2})
    lifted(obj)
    obj.normalize_batch_and_arguments()
    assert [obj[i].cache_salt for i in range(4)] == ["s", None] * 2
