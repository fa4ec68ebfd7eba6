"""Against a plain count: blocks of all prompts, less their distinct prefixes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tiered_kv.simulation.shared_prefixes import SharedPrefixes

PROMPTS = st.lists(st.integers(0, 2), max_size=6)


def saved(prompts: list[list[int]]) -> int:
    distinct = {tuple(p[: end + 1]) for p in prompts for end in range(len(p))}
    return sum(map(len, prompts)) - len(distinct)


@given(st.lists(st.tuples(PROMPTS, st.integers(0, 3))))
def test_as_many_are_saved_as_a_count_of_all_prefixes_says(
    steps: list[tuple[list[int], int]],
) -> None:
    shared, present = SharedPrefixes(), list[list[int]]()
    for prompt, leaving in steps:
        shared.add(prompt)
        present.append(prompt)
        assert shared.n_saved == saved(present)
        if leaving < len(present):
            shared.remove(present.pop(leaving))
            assert shared.n_saved == saved(present)
    for prompt in present:
        shared.remove(prompt)
    assert shared.n_saved == 0
