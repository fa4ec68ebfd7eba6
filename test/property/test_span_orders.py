"""Orders of texts that commute: permutations, decided by what was sent, in bounded memory."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tiered_kv.api.span_orders import SpanOrders, name_of

TEXTS = st.lists(st.text("ab", max_size=3), max_size=8)
SENT = st.lists(
    st.tuples(st.sampled_from([b"one", b"other"]), st.sampled_from([b"x", b"y"]), TEXTS),
    max_size=30,
)


@given(SENT)
def test_every_order_is_a_permutation_and_the_past_decides(
    sent: list[tuple[bytes, bytes, list[str]]],
) -> None:
    first, second = SpanOrders(n_max=20), SpanOrders(n_max=20)
    for scope, before, texts in sent:
        order = first.arrange(scope, scope + before, texts)
        assert sorted(order) == list(range(len(texts)))
        assert order == second.arrange(scope, scope + before, texts)
        assert len(first) <= 20


@given(SENT, TEXTS)
def test_what_one_sends_is_not_seen_in_another_s_orders(
    sent: list[tuple[bytes, bytes, list[str]]], texts: list[str]
) -> None:
    orders, fresh = SpanOrders(), SpanOrders()
    for _, before, others in sent:
        orders.arrange(b"theirs", b"theirs" + before, others)
    assert orders.arrange(b"mine", b"mine", texts) == fresh.arrange(b"mine", b"mine", texts)


@given(TEXTS, st.randoms(use_true_random=False))
def test_the_same_texts_are_the_same_prompt_from_the_second_time_on(
    texts: list[str], random: object
) -> None:
    orders = SpanOrders()
    sent = [texts[i] for i in orders.arrange(b"s", b"s", texts)]
    assert sent == texts
    random.shuffle(texts)  # type: ignore[attr-defined]
    assert [texts[i] for i in orders.arrange(b"s", b"s", texts)] == sent


def test_what_is_known_comes_first_and_the_most_used_of_the_rest() -> None:
    orders = SpanOrders()

    def sent(before: str, texts: str) -> str:
        order = orders.arrange(b"s", name_of(before), list(texts))
        return "".join(texts[i] for i in order)

    assert sent("x", "abc") == "abc"
    assert sent("x", "dba") == "abd"
    # Behind something else nothing is known; a and b were sent most.
    assert sent("y", "cdba") == "bacd"


def test_the_longest_run_counts_and_not_the_first() -> None:
    orders = SpanOrders()
    assert orders.arrange(b"s", b"s", ["short"]) == (0,)
    assert orders.arrange(b"s", b"s", ["a longer text", "another"]) == (0, 1)
    assert orders.arrange(b"s", b"s", ["short", "another", "a longer text"]) == (2, 1, 0)


def test_many_texts_that_are_all_known_take_little_work() -> None:
    orders = SpanOrders()
    texts = [f"text {i}" for i in range(64)]
    for i in range(64):
        orders.arrange(b"s", b"s", [*texts[i:], *texts[:i]])
    assert sorted(orders.arrange(b"s", b"s", texts[::-1])) == list(range(64))
