"""Groups of a decode batch: the best cuts, by brute force over trees small enough for that."""

from __future__ import annotations

import itertools
import random
import time
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiered_kv.attention.grouping import Context, GroupingCosts, best_plans, path_of, saving
from tiered_kv.attention.plan import CascadePlan
from tiered_kv.forest.node import Node

FREE = GroupingCosts()


@st.composite
def batches(draw: st.DrawFn) -> list[Context]:
    """Up to six rows on a tree of at most four stretches, with and without tokens of their own."""
    parents = [draw(st.integers(-1, i - 1)) for i in range(draw(st.integers(0, 4)))]
    lengths = [draw(st.integers(1, 3)) for _ in parents]
    paths: list[tuple[tuple[int, int], ...]] = [()]
    for i, parent in enumerate(parents):
        paths.append((*paths[parent + 1], (i, lengths[i])))
    rows = draw(st.lists(st.sampled_from(paths), min_size=1, max_size=6))
    own = [draw(st.integers(0 if path else 1, 2)) for path in rows]
    return [
        Context(sum(n for _, n in path) + extra, path)
        for path, extra in zip(rows, own, strict=True)
    ]


@st.composite
def all_costs(draw: st.DrawFn) -> GroupingCosts:
    return GroupingCosts(
        per_group=draw(st.integers(0, 4)),
        per_row=draw(st.integers(0, 2)),
        rows_per_tile=draw(st.sampled_from([1, 2, 3, 100])),
        min_tokens=draw(st.integers(1, 4)),
    )


def token_ids(context: Context) -> list[tuple[int, int]]:
    """What identifies each token that may be shared: all of the path but the context's last."""
    ids = [(stretch, i) for stretch, tokens in context.path for i in range(tokens)]
    return ids[: context.n_tokens - 1]


def shared_prefixes(contexts: list[Context]) -> dict[tuple[tuple[int, int], ...], list[int]]:
    """Every prefix of two rows or more, token by token."""
    rows: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for row, context in enumerate(contexts):
        ids = token_ids(context)
        for end in range(1, len(ids) + 1):
            rows.setdefault(tuple(ids[:end]), []).append(row)
    return {prefix: found for prefix, found in rows.items() if len(found) > 1}


def brute_force(contexts: list[Context], costs: GroupingCosts, max_levels: int) -> int | None:
    """The most that any set of cuts saves; None if there are too many sets to try."""
    prefixes = shared_prefixes(contexts)
    if len(prefixes) > 9:
        return None
    most = 0
    for size in range(1, len(prefixes) + 1):
        for cuts in itertools.combinations(sorted(prefixes, key=len), size):
            value, is_allowed = 0, True
            for cut in cuts:
                above = [len(c) for c in cuts if len(c) < len(cut) and cut[: len(c)] == c]
                length = len(cut) - max(above, default=0)
                is_allowed &= len(above) < max_levels and length >= costs.min_tokens
                n = len(prefixes[cut])
                tiles = -(-n // costs.rows_per_tile)
                value += (n - tiles) * length - costs.per_group - n * costs.per_row
            if is_allowed:
                most = max(most, value)
    return most


def assert_reads_what_is_shared(plan: CascadePlan, contexts: list[Context]) -> None:
    """Each group's rows hold the same tokens there; no suffix is empty."""
    for level in plan.levels:
        for group in level.groups:
            seen = {tuple(token_ids(contexts[row])[: group.end]) for row in group.rows}
            assert len(seen) == 1
            assert len(seen.pop()) == group.end
    for shared, context in zip(plan.shared_tokens, contexts, strict=True):
        assert shared < context.n_tokens


@settings(max_examples=300, deadline=None)
@given(batches(), all_costs(), st.integers(0, 3))
def test_no_cuts_save_more(contexts: list[Context], costs: GroupingCosts, n_levels: int) -> None:
    most = brute_force(contexts, costs, n_levels)
    plans = best_plans(contexts, costs, n_levels)
    assert len(plans) == n_levels + 1
    assert not plans[0].levels
    assert len(plans[-1].levels) <= n_levels
    assert_reads_what_is_shared(plans[-1], contexts)
    if most is not None:
        assert saving(plans[-1], costs) == most


@settings(max_examples=100, deadline=None)
@given(batches(), all_costs(), st.randoms(use_true_random=False))
def test_the_order_of_the_rows_changes_nothing_but_their_numbers(
    contexts: list[Context], costs: GroupingCosts, shuffler: random.Random
) -> None:
    order = list(range(len(contexts)))
    shuffler.shuffle(order)
    plan = best_plans(contexts, costs, 2)[-1]
    shuffled = best_plans([contexts[row] for row in order], costs, 2)[-1]

    def groups(of: CascadePlan, names: list[int]) -> set[tuple[int, frozenset[int], int, int]]:
        return {
            (i, frozenset(names[row] for row in g.rows), g.start, g.length)
            for i, level in enumerate(of.levels)
            for g in level.groups
        }

    assert groups(shuffled, order) == groups(plan, list(range(len(contexts))))


@settings(max_examples=100, deadline=None)
@given(batches(), all_costs())
def test_the_plan_s_order_puts_every_group_together(
    contexts: list[Context], costs: GroupingCosts
) -> None:
    order = best_plans(contexts, costs, 3)[-1].order
    assert sorted(order) == list(range(len(contexts)))
    ordered = best_plans([contexts[row] for row in order], costs, 3)[-1]
    assert all(group.is_contiguous for level in ordered.levels for group in level.groups)
    for level in ordered.levels:
        layout = level.layout(len(contexts) + 2)
        assert layout.qo_indptr[0] == 0
        assert layout.qo_indptr[-1] == len(contexts) + 2
        assert list(layout.qo_indptr) == sorted(set(layout.qo_indptr))
        assert [n for n in layout.lengths if n] == [g.length for g in level.groups]


def test_a_stretch_read_by_more_of_them_is_a_level_of_its_own() -> None:
    system, tools = (1, 1000), (2, 500)
    contexts = [Context(1600, (system, tools)) for _ in range(3)] + [Context(1100, (system,))] * 4
    one, two = best_plans(contexts, FREE, 2)[1:]
    assert [(g.rows, g.start, g.length) for g in one.levels[0].groups] == [
        ((0, 1, 2, 3, 4, 5, 6), 0, 1000)
    ]
    assert [(g.rows, g.start, g.length) for level in two.levels for g in level.groups] == [
        ((0, 1, 2, 3, 4, 5, 6), 0, 1000),
        ((0, 1, 2), 1000, 500),
    ]
    assert two.shared_tokens == (1500, 1500, 1500, 1000, 1000, 1000, 1000)
    assert two.saved_tokens == 6 * 1000 + 2 * 500


def test_where_one_level_must_do_the_deeper_cut_can_be_the_better_one() -> None:
    contexts = [Context(5000, ((1, 10), (2, 4000)))] * 3 + [Context(20, ((1, 10),))] * 5
    (group,) = best_plans(contexts, FREE, 1)[1].levels[0].groups
    assert (group.rows, group.length) == ((0, 1, 2), 4010)


def test_copies_of_one_context_keep_the_last_token_to_themselves() -> None:
    contexts = [Context(100, ((7, 60), (8, 40))), Context(100, ((7, 60), (8, 40)))]
    (group,) = best_plans(contexts, FREE, 1)[1].levels[0].groups
    assert group.length == 99


def test_tiles_read_the_shared_part_again() -> None:
    contexts = [Context(101, ((1, 100),))] * 8
    costs = GroupingCosts(rows_per_tile=4)
    assert saving(best_plans(contexts, costs, 1)[1], costs) == (8 - 2) * 100


@pytest.mark.parametrize(
    ("contexts", "message"),
    [
        ([Context(5, ((1, 6),))], "longer than its context"),
        ([Context(9, ((1, 4),)), Context(9, ((1, 5),))], "stretch 1 has 4 tokens"),
        ([Context(0)], "at least one token"),
        ([Context(3, ((1, 0),))], "at least one token"),
    ],
)
def test_contradictions_are_refused(contexts: list[Context], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        best_plans(contexts, FREE, 1)


def test_a_deep_chain_of_conversations_is_no_problem() -> None:
    """500 rows, each with four stretches more than the one before."""
    path: list[tuple[int, int]] = []
    contexts = []
    for i in range(2000):
        path.append((i, 1))
        if i % 4 == 0:
            contexts.append(Context(len(path) + 1, tuple(path)))
    plan = best_plans(contexts, FREE, 1)[1]
    (group,) = plan.levels[0].groups
    # Row k can be cut at 4k + 1 tokens with all after it.
    most = max(range(500), key=lambda k: (500 - k - 1) * (4 * k + 1))
    assert (len(group.rows), group.length) == (500 - most, 4 * most + 1)


def test_time_grows_with_the_length_of_the_paths_alone() -> None:
    def seconds(n_rows: int) -> float:
        contexts = [
            Context(10_000, ((0, 500), (1 + i % 16, 700), (100 + i, 300))) for i in range(n_rows)
        ]
        times = []
        for _ in range(3):
            start = time.perf_counter()
            best_plans(contexts, FREE, 2)
            times.append(time.perf_counter() - start)
        return min(times)

    # Quadratic would be 256 times.
    assert seconds(4096) < 80 * seconds(256)


def test_the_path_of_a_node_names_the_nodes_from_the_root_on() -> None:
    root = Node.make_root(-1, bytes(32), 1)
    upper = Node(3, root, array("q", range(8)), [b"a"], 8, 1)
    lower = Node(9, upper, array("q", range(4)), [b"b"], 12, 1)
    assert path_of(lower) == ((3, 8), (9, 4))
    assert path_of(root) == ()
