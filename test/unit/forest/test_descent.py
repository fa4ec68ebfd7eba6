"""Finding a prefix: against a page-by-page comparison, without comparing much more than that."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiered_kv.forest import descent
from tiered_kv.forest.descent import common_tokens, descend, whole_pages
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.key import namespace_hash

PAGE_SIZES = st.sampled_from([1, 2, 16])


def tokens_of(n_tokens: int, first: int = 0) -> array[int]:
    return array("q", range(first, first + n_tokens))


@given(
    page_size=PAGE_SIZES,
    n_run=st.integers(1, 70),
    n_prompt=st.integers(1, 70),
    begin=st.integers(0, 5),
    wrong_at=st.integers(0, 70 * 16) | st.none(),
)
def test_common_tokens_is_the_longest_common_run_of_pages(
    page_size: int, n_run: int, n_prompt: int, begin: int, wrong_at: int | None
) -> None:
    run = tokens_of(n_run * page_size)
    end = begin + n_prompt * page_size
    tokens = tokens_of(begin, first=-begin) + tokens_of(n_prompt * page_size)
    if wrong_at is not None and page_size <= wrong_at < n_prompt * page_size:
        tokens[begin + wrong_at] = -1
    expected = 0
    while (
        expected + page_size <= min(len(run), end - begin)
        and run[expected : expected + page_size]
        == tokens[begin + expected : begin + expected + page_size]
    ):
        expected += page_size
    assert common_tokens(run, tokens, begin, end, page_size) == expected


@pytest.mark.parametrize("n_common", [1, 2, 100, 2047])
def test_comparing_costs_about_what_is_common(
    n_common: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_compared = 0
    equal = descent._equal

    def counting(run: array[int], tokens: array[int], begin: int, first: int, last: int) -> bool:
        nonlocal n_compared
        n_compared += last - first
        return equal(run, tokens, begin, first, last)

    monkeypatch.setattr(descent, "_equal", counting)
    run, tokens = tokens_of(2048 * 16), tokens_of(2048 * 16)
    tokens[n_common * 16] = -1
    assert common_tokens(run, tokens, 0, len(tokens), 16) == n_common * 16
    assert n_compared <= 4 * (n_common + 1) * 16


@given(n_tokens=st.integers(0, 40), page_size=PAGE_SIZES, limit=st.none() | st.integers(-3, 50))
def test_whole_pages(n_tokens: int, page_size: int, limit: int | None) -> None:
    considered = n_tokens if limit is None else max(0, min(n_tokens, limit))
    expected = considered // page_size * page_size
    assert whole_pages(tokens_of(n_tokens), page_size, limit) == expected


def test_other_arrays_are_refused() -> None:
    with pytest.raises(TypeError, match="array\\('q'\\)"):
        whole_pages(array("i", [1, 2]), 1, None)


def test_a_prompt_that_ends_inside_a_node_is_reported_so() -> None:
    forest = Forest(4)
    root = forest.root(namespace_hash("m"))
    node = forest.insert(root, tokens_of(16), range(16)).last
    found = descend(root, tokens_of(16), 8, 4)
    assert found.path == []
    assert (found.position, found.partial, found.common) == (0, node, 8)


def test_a_prompt_that_diverges_inside_a_page_shares_only_whole_pages() -> None:
    forest = Forest(4)
    root = forest.root(namespace_hash("m"))
    node = forest.insert(root, tokens_of(16), range(16)).last
    prompt = tokens_of(16)
    prompt[11] = -1
    found = descend(root, prompt, 16, 4)
    assert (found.position, found.partial, found.common) == (0, node, 8)
