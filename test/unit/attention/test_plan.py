"""Plans: what is no plan is refused, and what kernels take of one."""

from __future__ import annotations

import pytest

from tiered_kv.attention.plan import CascadePlan, Group, Level, LevelLayout


def test_a_level_is_laid_out_with_the_other_rows_in_groups_of_nothing() -> None:
    level = Level((Group((1, 2), 0, 7), Group((3, 4, 5), 4, 9)))
    assert level.layout(8) == LevelLayout(
        qo_indptr=(0, 1, 3, 6, 8),
        leaders=(0, 1, 3, 6),
        starts=(0, 0, 4, 0),
        lengths=(0, 7, 9, 0),
    )
    assert level.n_rows == 5


def test_rows_apart_cannot_be_laid_out() -> None:
    with pytest.raises(ValueError, match="not consecutive"):
        Level((Group((0, 2), 0, 7),)).layout(3)
    with pytest.raises(ValueError, match="only 2 rows"):
        Level((Group((1, 2), 0, 7),)).layout(2)


def test_groups_inside_groups_are_ordered_together() -> None:
    plan = CascadePlan(
        7,
        (
            Level((Group((0, 2, 4, 6), 0, 10), Group((1, 5), 0, 20))),
            Level((Group((2, 6), 10, 5),)),
        ),
    )
    assert plan.order == (2, 6, 0, 4, 1, 5, 3)
    assert plan.shared_tokens == (10, 20, 15, 0, 10, 20, 15)
    assert plan.saved_tokens == 3 * 10 + 20 + 5


@pytest.mark.parametrize(
    ("rows", "start", "length"),
    [
        ((1,), 0, 4),
        ((2, 1), 0, 4),
        ((1, 1), 0, 4),
        ((-1, 1), 0, 4),
        ((0, 1), -1, 4),
        ((0, 1), 0, 0),
    ],
)
def test_no_group(rows: tuple[int, ...], start: int, length: int) -> None:
    with pytest.raises(ValueError, match="A group needs"):
        Group(rows, start, length)


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ((Level(()),), "without groups"),
        ((Level((Group((0, 3), 0, 4),)),), "below 3"),
        ((Level((Group((0, 1), 0, 4), Group((1, 2), 0, 4))),), "no other group"),
        ((Level((Group((1, 2), 0, 4), Group((0, 3), 0, 4))),), "order of their first rows"),
        ((Level((Group((0, 1), 1, 4),)),), "start where the level before ends"),
        ((Level((Group((0, 1), 0, 4),)), Level((Group((1, 2), 4, 4),))), "start where"),
    ],
)
def test_no_plan(levels: tuple[Level, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CascadePlan(3, levels)
