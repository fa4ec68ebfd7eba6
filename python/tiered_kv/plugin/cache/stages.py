"""Stages of a pipeline (`--pp-size`): each has other layers of the same requests.

A stage is a group of ranks with a tree, a host pool and shards of the disk of its own, as a replica
is; but all stages do the same, and agree on it while they are passes apart
(docs/adr/0036-pipelines.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tiered_kv.plugin.cache.parts import RankMinimum

if TYPE_CHECKING:
    from sglang.srt.mem_cache.registry import TreeCacheBuildContext


class StageMeeting:
    """`tiers.transfer.Meeting` over a group of all ranks of all stages that nobody else uses.

    A minimum is under way while passes go on; they are matched by their order, which is the same
    on all ranks.
    """

    def __init__(self, group: torch.distributed.ProcessGroup, lag: int) -> None:
        self.n_pass = 0
        self.lag = lag
        self._group = group

    def give(self, values: list[int]) -> Callable[[], list[int]]:
        tensor = torch.tensor(values, dtype=torch.int64)
        work = torch.distributed.all_reduce(
            tensor, torch.distributed.ReduceOp.MIN, group=self._group, async_op=True
        )

        def agreed() -> list[int]:
            work.wait()
            return [int(value) for value in tensor.tolist()]

        return agreed


class NoMeeting:
    """In the place of what lets ranks wait for each other: stages would wait for ever."""

    def minimum(self, values: list[int]) -> list[int]:
        raise AssertionError("stages of a pipeline cannot agree on anything in one pass")


@dataclass(frozen=True, slots=True)
class Stage:
    """The stage that this process belongs to."""

    index: int
    n_stages: int
    everyone: RankMinimum
    """All ranks of all stages: for the start, when nobody is ahead of anybody."""
    meeting: StageMeeting


def stage_of(ctx: TreeCacheBuildContext) -> Stage | None:
    """The stage that builds its cache here, None without a pipeline. Every rank makes the call."""
    n_stages = ctx.params.pp_size
    if n_stages == 1:
        return None
    group = torch.distributed.new_group(backend="gloo")
    # A stage waits in its pass k for the one before it to be in k + 1; so the first one, in its
    # pass k + n_stages, must not wait for more than the last one's pass k.
    meeting = StageMeeting(group, lag=n_stages)
    return Stage(ctx.params.pp_rank, n_stages, RankMinimum(group), meeting)


def layers_of(pool: Any, stage: Stage) -> str:
    """Which layers of the model a stage's pages are of, for their name."""
    return f"from {pool.start_layer}, {pool.layer_num} of them, stage {stage.index}"
