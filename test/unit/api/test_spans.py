"""Bodies whose texts commute: what is put in order, what goes on unchanged, what is refused."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest

from tiered_kv.api.fields import TermsError
from tiered_kv.api.span_orders import SpanOrders
from tiered_kv.api.spans import SETS_MAX, TEXTS_MAX, Orders, put_in_order

CHAT = "/v1/chat/completions"


def text(words: str, commutes: object = None) -> dict[str, object]:
    part: dict[str, object] = {"type": "text", "text": words}
    return part if commutes is None else {**part, "commutes": commutes}


def chat(*parts: dict[str, object], **more: object) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}], **more}


def texts_of(body: dict[str, Any]) -> list[str]:
    return [part["text"] for part in body["messages"][0]["content"]]


def put(body: object, orders: SpanOrders | None = None, path: str = CHAT) -> Orders | None:
    orders = SpanOrders() if orders is None else orders
    return put_in_order(body, path, {"tenant": None}, orders)


def test_a_set_goes_into_the_order_that_was_sent_before() -> None:
    orders = SpanOrders()
    first = chat(text("Documents:"), text("a", True), text("b", True), text("Which?"))
    assert put(first, orders) == [[0, 1]]
    again = chat(text("Documents:"), text("b", True), text("a", True), text("Who?"))
    assert put(again, orders) == [[1, 0]]
    assert texts_of(again) == ["Documents:", "a", "b", "Who?"]
    assert all("commutes" not in part for part in again["messages"][0]["content"])
    # Behind another beginning they were never sent.
    other = chat(text("Papers:"), text("b", True), text("a", True))
    assert put(other, orders) == [[0, 1]]


@pytest.mark.parametrize("around", [{"tools": [1]}, {"chat_template_kwargs": {"think": True}}])
def test_what_a_template_makes_text_of_is_before_the_set(around: dict[str, object]) -> None:
    orders = SpanOrders()
    put(chat(text("a", True), text("b", True)), orders)
    assert put(chat(text("b", True), text("a", True)), orders) == [[1, 0]]
    assert put(chat(text("b", True), text("a", True), **around), orders) == [[0, 1]]


def test_what_stands_between_two_sets_stays_there() -> None:
    orders = SpanOrders()
    put(chat(text("a", True), text("b", True), text("-"), text("c", True), text("d", True)), orders)
    body = chat(text("b", True), text("a", True), text("-"), text("d", True), text("c", True))
    assert put(body, orders) == [[1, 0], [1, 0]]
    assert texts_of(body) == ["a", "b", "-", "c", "d"]


def test_marks_that_say_no_are_taken_away() -> None:
    body = chat(text("b", False), text("a"))
    assert put(body) == []
    assert body == chat(text("b"), text("a"))


@pytest.mark.parametrize(
    "body",
    [chat(text("a"), text("b")), {"messages": "?"}, {"text": "a"}, [1], None,
     {"messages": [{"content": "a"}, 5]}],
)  # fmt: skip
def test_what_has_no_marks_is_not_touched(body: object) -> None:
    before = copy.deepcopy(body)
    assert put(body) is None
    assert put(body, path="/generate") is None
    assert body == before


def test_generate_has_spans_in_the_place_of_text() -> None:
    orders = SpanOrders()

    def spans(*parts: object) -> dict[str, Any]:
        return {"spans": list(parts), "stream": True}

    a, b = {"text": "a.", "commutes": True}, {"text": "b.", "commutes": True}
    first, second = spans("Q: ", a, b, "A:"), spans("Q: ", dict(b), dict(a), {"text": "A:"})
    put(first, orders, "/generate")
    assert put(second, orders, "/generate") == [[1, 0]]
    assert first == second == {"text": "Q: a.b.A:", "stream": True}


IMAGE = {"type": "image_url", "image_url": {"url": "x"}, "commutes": True}
REFUSED = [
    (CHAT, chat(text("a", 1)), "commutes must be true or false, not 1"),
    (CHAT, chat(IMAGE), "only texts can commute; leave commutes out of 'image_url' parts"),
    (CHAT, chat({"type": "text", "text": 5, "commutes": True}), "only texts can commute"),
    (CHAT, chat({**text("a", True), "cache_control": 1}), "has a type and a text only"),
    (CHAT, chat(*(text(str(i), True) for i in range(TEXTS_MAX + 1))), "at most 64 neighbouring"),
    (
        CHAT,
        chat(*(text(str(i), i % 2 == 0) for i in range(2 * SETS_MAX + 1))),
        "in 16 sets of a prompt",
    ),
    ("/v1/messages", chat(text("a", True)), "known on /chat/completions and /generate only"),
    (CHAT, {"spans": ["a"]}, "spans belong to /generate"),
    ("/generate", {"spans": []}, "spans must be a list of texts, not []"),
    ("/generate", {"spans": ["a"], "text": "b"}, "spans are the prompt"),
    ("/generate", {"spans": [["a"]]}, "spans must be texts, or objects"),
    ("/generate", {"spans": [{"text": 5}]}, "spans must be texts, or objects"),
    ("/generate", {"spans": [{"text": "a", "image": "b"}]}, "spans must be texts, or objects"),
]


@pytest.mark.parametrize(("path", "body", "sentence"), REFUSED)
def test_refused(path: str, body: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TermsError, match=re.escape(sentence)):
        put(body, path=path)
