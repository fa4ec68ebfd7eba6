"""What a runner is told: which rows of a decode batch attend to which shared tokens together.

A level is one pass over shared KV. A row is in at most one group per level; the groups of a level
lie inside those of the level before, and continue where these end. What is left of a row's context
after its last group is its suffix, attended to by itself, and never empty.

The results of all passes are put together by their log-sum-exp (LSE), which is exact: Hydragen
(arXiv 2402.05099), FlashInfer (arXiv 2501.01005).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Group:
    """Rows whose contexts hold the same tokens, in the same slots, from `start` on."""

    rows: tuple[int, ...]
    """Rows of the batch, ascending, at least two."""

    start: int
    """First shared token that this level reads; the levels before read those up to it."""

    length: int
    """Tokens that this level reads, at least one."""

    def __post_init__(self) -> None:
        if len(self.rows) < 2 or any(
            a >= b for a, b in zip(self.rows, self.rows[1:], strict=False)
        ):
            raise ValueError(f"A group needs two rows or more, ascending, not {self.rows}.")
        if self.rows[0] < 0 or self.start < 0 or self.length < 1:
            raise ValueError(
                f"A group needs rows and a start of at least 0 and a length of at least 1, not row "
                f"{self.rows[0]}, start {self.start} and length {self.length}."
            )

    @property
    def leader(self) -> int:
        """The row through whose page table the group's slots are found."""
        return self.rows[0]

    @property
    def end(self) -> int:
        """First token that this level does not read."""
        return self.start + self.length

    @property
    def is_contiguous(self) -> bool:
        return self.rows[-1] - self.rows[0] == len(self.rows) - 1


@dataclass(frozen=True, slots=True)
class LevelLayout:
    """A level for a kernel that takes all rows of the batch in order; each tuple is one column.

    Rows in no group are in groups of length 0, whose LSE is minus infinity, or nearly.
    """

    qo_indptr: tuple[int, ...]
    """First row of each group, then the number of rows: FlashInfer's query offsets."""

    leaders: tuple[int, ...]
    """Row through whose page table each group's slots are found."""

    starts: tuple[int, ...]
    """First shared token of each group."""

    lengths: tuple[int, ...]
    """Shared tokens of each group; 0 for rows that are in none."""


@dataclass(frozen=True, slots=True)
class Level:
    """One pass over shared KV: disjoint groups, by their first rows."""

    groups: tuple[Group, ...]

    @property
    def n_rows(self) -> int:
        """Rows in its groups."""
        return sum(len(group.rows) for group in self.groups)

    def layout(self, n_rows: int) -> LevelLayout:
        """The level for a batch of `n_rows` rows, padding included.

        Raises ValueError unless each group's rows are consecutive: put the batch in the plan's
        `order` before planning.
        """
        indptr, leaders, starts, lengths = [0], list[int](), list[int](), list[int]()

        def add(end: int, start: int, length: int) -> None:
            leaders.append(indptr[-1])
            starts.append(start)
            lengths.append(length)
            indptr.append(end)

        for group in self.groups:
            if not group.is_contiguous:
                raise ValueError(
                    f"The rows {group.rows} of a group are not consecutive; order the batch by "
                    "groups first."
                )
            if group.leader > indptr[-1]:
                add(group.leader, 0, 0)
            add(group.rows[-1] + 1, group.start, group.length)
        if indptr[-1] > n_rows:
            raise ValueError(f"The plan has row {indptr[-1] - 1}, the batch only {n_rows} rows.")
        if indptr[-1] < n_rows:
            add(n_rows, 0, 0)
        return LevelLayout(tuple(indptr), tuple(leaders), tuple(starts), tuple(lengths))


@dataclass(frozen=True, slots=True)
class CascadePlan:
    """How one decode batch attends, in every layer; valid while the batch keeps its requests."""

    n_rows: int
    """Requests of the batch."""

    levels: tuple[Level, ...] = ()
    """From the beginnings of the contexts on; none means that nothing is shared that pays."""

    def __post_init__(self) -> None:
        ends = [0] * self.n_rows
        for level in self.levels:
            seen: set[int] = set()
            if not level.groups:
                raise ValueError("A level without groups must be left out of a plan.")
            if [group.leader for group in level.groups] != sorted(g.leader for g in level.groups):
                raise ValueError(
                    "The groups of a level must come in the order of their first rows."
                )
            for group in level.groups:
                if group.rows[-1] >= self.n_rows or not seen.isdisjoint(group.rows):
                    raise ValueError(
                        f"The rows {group.rows} of a group must be below {self.n_rows} and in no "
                        "other group of their level."
                    )
                if any(ends[row] != group.start for row in group.rows):
                    raise ValueError(
                        f"The group of rows {group.rows} must start where the level before ends "
                        f"for each of them, not at token {group.start}."
                    )
                seen.update(group.rows)
            for group in level.groups:
                for row in group.rows:
                    ends[row] = group.end

    @property
    def shared_tokens(self) -> tuple[int, ...]:
        """Of each row, the tokens that the levels read: its suffix begins there."""
        ends = [0] * self.n_rows
        for level in self.levels:
            for group in level.groups:
                for row in group.rows:
                    ends[row] = group.end
        return tuple(ends)

    @property
    def saved_tokens(self) -> int:
        """Tokens of KV that one layer need not read, if each group is read exactly once."""
        return sum(
            (len(group.rows) - 1) * group.length for level in self.levels for group in level.groups
        )

    @property
    def order(self) -> tuple[int, ...]:
        """The rows so ordered that each group's are consecutive, at every level.

        Deepest groups first within their parents, rows in no group last; otherwise as they are.
        """
        keys: list[tuple[int, ...]] = [()] * self.n_rows
        for level in self.levels:
            leader_of = {row: group.leader for group in level.groups for row in group.rows}
            for row in range(self.n_rows):
                keys[row] += (leader_of.get(row, self.n_rows),)
        return tuple(sorted(range(self.n_rows), key=lambda row: (keys[row], row)))

    def in_order(self) -> CascadePlan:
        """The plan of the same batch with its rows in `order`: all groups are consecutive."""
        place = {row: i for i, row in enumerate(self.order)}

        def moved(group: Group) -> Group:
            return Group(tuple(sorted(place[row] for row in group.rows)), group.start, group.length)

        return CascadePlan(
            self.n_rows,
            tuple(
                Level(tuple(sorted(map(moved, level.groups), key=lambda group: group.leader)))
                for level in self.levels
            ),
        )
