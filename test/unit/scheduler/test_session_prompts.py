"""What is remembered of sessions: their latest prompts, and never more than there is room for."""

from __future__ import annotations

from array import array

from hypothesis import given
from hypothesis import strategies as st

from tiered_kv.forest.key import TreeKey
from tiered_kv.scheduler.session_prompts import SessionPrompt, SessionPrompts


def prompt(*tokens: int, salt: bytes | None = None) -> SessionPrompt:
    return SessionPrompt(None if salt is None else TreeKey(salt=salt), array("q", tokens))


def tokens_of(sessions: SessionPrompts, *args: str) -> list[list[int]]:
    return [one.tokens.tolist() for one in sessions.find(*args)]


def test_a_prompt_that_goes_on_stands_for_those_before_it() -> None:
    sessions = SessionPrompts()
    sessions.ended("s", "", prompt(1, 2))
    sessions.ended("s", "", prompt(1, 2, 3))
    sessions.ended("s", "", prompt(1, 9))
    sessions.ended("s", "", prompt(1, 2, 3, 4, salt=b"x"))
    assert tokens_of(sessions, "s") == [[1, 2, 3], [1, 9], [1, 2, 3, 4]]
    assert tokens_of(sessions, "t") == []


def test_tenants_have_sessions_of_their_own() -> None:
    sessions = SessionPrompts()
    sessions.ended("s", "blue", prompt(1))
    sessions.ended("s", "red", prompt(2))
    assert tokens_of(sessions, "s", "red") == [[2]]
    assert tokens_of(sessions, "s") == [[1], [2]]
    sessions.forget("s", "blue")
    assert tokens_of(sessions, "s") == [[2]]
    sessions.forget("s")
    assert tokens_of(sessions, "s") == []
    assert (len(sessions), sessions.n_tokens) == (0, 0)


NAMES = st.sampled_from(["a", "b", "c", "d"])
CALLS = st.tuples(NAMES, NAMES, st.lists(st.integers(0, 2), max_size=6), st.booleans())


@given(st.lists(CALLS, max_size=40))
def test_it_is_bounded(calls: list[tuple[str, str, list[int], bool]]) -> None:
    sessions = SessionPrompts(sessions_max=3, prompts_max=2, tokens_max=12)
    for session, tenant, tokens, ends in calls:
        if ends:
            sessions.ended(session, tenant, prompt(*tokens))
            assert tokens_of(sessions, session, tenant)[-1] == tokens
        else:
            sessions.forget(session, tenant)
        known = [p for name in "abcd" for p in tokens_of(sessions, name)]
        assert sessions.n_tokens == sum(map(len, known)) <= 12
        assert len(sessions) <= 3
        assert len(known) <= 6
