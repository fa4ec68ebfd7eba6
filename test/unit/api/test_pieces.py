"""Prompts in pieces: what becomes of them is what was sent, and nobody holds more than a share."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiered_kv.api import pieces
from tiered_kv.api.pieces import BYTES_EACH_MAX, IDLE_S, PROMPTS_EACH_MAX, Book, PieceError


def refused(act: Any, *args: Any) -> tuple[HTTPStatus, str]:
    with pytest.raises(PieceError) as caught:
        act(*args)
    return caught.value.status, str(caught.value)


@pytest.mark.parametrize(
    ("field", "first", "second", "path"),
    [
        ("messages", [{"role": "user"}], [{"role": "tool"}], "/v1/chat/completions"),
        ("prompt", "some ", "text", "/v1/completions"),
        ("prompt", [1, 2], [3], "/v1/completions"),
        ("text", "some ", "text", "/generate"),
        ("input_ids", [1, 2], [3], "/generate"),
    ],
)
def test_a_finished_prompt_is_the_request_of_its_route(
    field: str, first: Any, second: Any, path: str
) -> None:
    book = Book()
    prompt = book.open("me", {field: first, "model": "m", "n": 2}, 0.0)
    book.change("me", prompt.prompt_id, {field: second}, 1.0)

    found = book.finish("me", prompt.prompt_id, {"n": 1}, 2.0)

    assert found == (path, {"model": "m", "n": 1, field: first + second})
    assert refused(book.find, "me", prompt.prompt_id, 2.0)[0] == HTTPStatus.NOT_FOUND


def test_a_last_piece_may_come_with_the_end() -> None:
    book = Book()
    prompt = book.open("me", {"text": "abcdef"}, 0.0)
    assert book.finish("me", prompt.prompt_id, {"text": "X", "from": 2, "n": 1}, 0.0) == (
        "/generate",
        {"text": "abX", "n": 1},
    )


@settings(deadline=None)
@given(st.lists(st.tuples(st.text(max_size=9), st.none() | st.integers(0, 30)), max_size=20))
def test_pieces_replace_what_comes_after_their_point(sent: list[tuple[str, int | None]]) -> None:
    book, expected = Book(), ""
    prompt = book.open("me", {"text": ""}, 0.0)
    for text, at in sent:
        body = {"text": text} if at is None else {"text": text, "from": at}
        if at is not None and at > len(expected):
            status, sentence = refused(book.change, "me", prompt.prompt_id, body, 0.0)
            assert status == HTTPStatus.BAD_REQUEST
            assert f"from 0 to {len(expected)}" in sentence
            continue
        expected = expected[: len(expected) if at is None else at] + text
        assert book.change("me", prompt.prompt_id, body, 0.0).content == expected
    assert book.finish("me", prompt.prompt_id, {}, 0.0)[1] == {"text": expected}


@pytest.mark.parametrize(
    "body",
    [
        *([], None, 7, {}, {"n": 1}, {"text": None}, {"text": ["a", "b"]}, {"text": 1}),
        *({"input_ids": [[1], [2]]}, {"input_ids": "a"}, {"input_ids": [True]}, {"prompt": ["a"]}),
        *({"messages": "a"}, {"messages": ["a"]}, {"text": "a", "prompt": "a"}),
        {"text": "a", "from": 0},
    ],
)
def test_what_is_no_prompt_opens_none(body: Any) -> None:
    book = Book()
    assert refused(book.open, "me", body, 0.0)[0] == HTTPStatus.BAD_REQUEST
    assert len(book) == 0


@pytest.mark.parametrize(
    "body",
    [
        *([], {}, {"from": 0}, {"prompt": "a"}, {"text": [1]}, {"text": "a", "n": 1}),
        *({"text": "a", "from": wrong} for wrong in (-1, 5, 1.5, True, "0", [])),
    ],
)
def test_what_is_no_piece_changes_nothing(body: Any) -> None:
    book = Book()
    prompt = book.open("me", {"text": "abcd"}, 0.0)
    assert refused(book.change, "me", prompt.prompt_id, body, 0.0)[0] == HTTPStatus.BAD_REQUEST
    assert (prompt.content, prompt.version) == ("abcd", 0)


def test_ids_where_there_was_text_are_refused() -> None:
    book = Book()
    prompt = book.open("me", {"prompt": "abcd"}, 0.0)
    assert refused(book.change, "me", prompt.prompt_id, {"prompt": [1]}, 0.0)[0] == 400


def test_nobody_names_anothers_prompt() -> None:
    book = Book()
    prompt = book.open("me", {"text": "mine"}, 0.0)
    for act in (book.change, book.finish):
        assert refused(act, "you", prompt.prompt_id, {"text": "x"}, 0.0)[0] == HTTPStatus.NOT_FOUND
    assert book.find("me", prompt.prompt_id, 0.0).content == "mine"


def test_prompts_are_forgotten_when_nothing_comes() -> None:
    book = Book()
    old, kept = (book.open("me", {"text": "a"}, 0.0) for _ in range(2))
    book.change("me", kept.prompt_id, {"text": "b"}, IDLE_S - 1)
    assert refused(book.find, "me", old.prompt_id, IDLE_S)[0] == HTTPStatus.NOT_FOUND
    assert book.ids() == {kept.prompt_id}


def test_one_caller_has_a_share_of_the_prompts() -> None:
    book = Book()
    for _ in range(PROMPTS_EACH_MAX):
        book.open("me", {"text": "a"}, 0.0)
    assert refused(book.open, "me", {"text": "a"}, 0.0)[0] == HTTPStatus.TOO_MANY_REQUESTS
    book.open("you", {"text": "a"}, 0.0)


def test_all_callers_have_so_many_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PROMPTS_MAX", 3)
    book = Book()
    first, *_ = (book.open(f"caller {n}", {"text": "a"}, 0.0) for n in range(3))
    assert refused(book.open, "another", {"text": "a"}, 0.0)[0] == HTTPStatus.SERVICE_UNAVAILABLE
    book.drop(first)
    book.open("another", {"text": "a"}, 0.0)


def test_one_caller_has_a_share_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "BYTES_EACH_MAX", 1000)
    monkeypatch.setattr(pieces, "BYTES_MAX", 1500)
    book = Book()
    prompt = book.open("me", {"text": "a" * 600}, 0.0)
    piece = {"text": "b" * 500}
    assert refused(book.change, "me", prompt.prompt_id, piece, 0.0)[0] == 413
    assert prompt.content == "a" * 600
    other = book.open("you", {"text": "a" * 600}, 0.0)
    assert refused(book.open, "third", {"text": "a" * 600}, 0.0)[0] == 503
    book.drop(other)
    book.open("third", {"text": "a" * 600}, 0.0)
    assert BYTES_EACH_MAX == 64 << 20


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ocrfd"), st.integers(0, 3), st.text(max_size=20))))
def test_what_is_held_is_counted(acts: list[tuple[str, int, str]]) -> None:
    book, prompts = Book(), []
    for act, which, text in acts:
        if act == "o" or not prompts:
            prompts.append(book.open("me", {"text": text, "n": 1}, 0.0))
            continue
        prompt = prompts[which % len(prompts)]
        if act == "c":
            book.change("me", prompt.prompt_id, {"text": text}, 0.0)
        elif act == "r":
            book.change("me", prompt.prompt_id, {"text": text, "from": 0}, 0.0)
            assert prompt.n_bytes == pieces._n_bytes(prompt.request({}))
        else:
            book.finish("me", prompt.prompt_id, {}, 0.0) if act == "f" else book.drop(prompt)
            prompts.remove(prompt)
    assert book._n_bytes == sum(prompt.n_bytes for prompt in prompts)
    assert book.ids() == {prompt.prompt_id for prompt in prompts}
