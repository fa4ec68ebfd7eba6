"""Whether reading shared KV together is worth its launches and merges, and in how many levels.

Decoding is bound by memory traffic, so both sides are counted in tokens of KV that one layer could
read meanwhile. A level saves (rows - tiles) x shared tokens; it costs the merge of every row's
partial results, and the overhead of its launches, which does not depend on the tokens. The overhead
is a default stated here, or what measured break-even points say. Each figure is for one rank.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from tiered_kv.attention.grouping import Context, GroupingCosts, best_plans, saving
from tiered_kv.attention.plan import CascadePlan
from tiered_kv.core.device_spec import DeviceSpec

MIN_SHARED_TOKENS = 256
"""Shortest shared part that is ever read together, whatever the model below says.

On an L20, FlashInfer's cascade at batch 128 took twice the time of plain attention (0.52x) at 128
shared tokens and a quarter (4.2x) at 512: break-even is near 256 (TensorRT-LLM issue 14396).
"""

QUERY_TILE = 128
"""Query rows, one for each head that shares a KV head, that FlashInfer's largest tile takes."""

CPU_BANDWIDTH = 2e9
"""Bytes of KV that a core reads per second for long contexts: it computes as much as it reads.

Measured by benchmark/micro/cascade_attention.py, one thread of a shared 2.8 GHz Xeon with AVX-512,
without groups: 0.82 us a token of 1,536 bytes in float32, 0.60 us of 768 bytes in bfloat16.
"""

CPU_GROUP_OVERHEAD_S = 300e-6
"""What a group of four rows takes in a layer beside reading: calls, merging. Measured likewise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """One layer's attention on one rank."""

    n_query_heads: int
    n_kv_heads: int
    head_dim: int
    element_bytes: int
    """Of the KV cache and of the partial results."""

    def __post_init__(self) -> None:
        if min(self.n_query_heads, self.n_kv_heads, self.head_dim, self.element_bytes) < 1:
            raise ValueError(f"Heads, their size and that of an element must be positive: {self}.")
        if self.n_query_heads % self.n_kv_heads:
            raise ValueError(
                f"{self.n_query_heads} query heads cannot share {self.n_kv_heads} KV heads evenly."
            )

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of one token in one layer."""
        return 2 * self.n_kv_heads * self.head_dim * self.element_bytes

    @property
    def merge_bytes(self) -> int:
        """What merging one row at one level moves: two partial outputs read, one written.

        The log-sum-exps, one float per head, are left out: a hundredth of that.
        """
        return 3 * self.n_query_heads * self.head_dim * self.element_bytes


@dataclass(frozen=True, slots=True)
class BreakEven:
    """A measurement: one group, one level; both ways of attending took the same time."""

    rows: int
    """Rows of the batch, all in the group, at least 2."""

    shared_tokens: int
    """Tokens they shared."""

    shape: AttentionShape
    """Of the model it was measured with."""

    def __post_init__(self) -> None:
        if self.rows < 2 or self.shared_tokens < 1:
            raise ValueError(f"Break-even needs 2 rows or more, and 1 token or more: {self}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class CascadeDevice:
    """What a device makes of cascade attention."""

    name: str

    bandwidth: float
    """Bytes/s that attention over long contexts reaches."""

    level_overhead_s: float
    """Seconds in each layer for each level, whatever it holds."""

    group_overhead_s: float
    """Seconds in each layer for each group, where groups are not one launch."""

    query_tile: int = QUERY_TILE
    """Query rows per KV head that one read of the KV serves."""

    measured: tuple[tuple[int, float], ...] = ()
    """(rows, seconds) by rows: overheads that take the place of `level_overhead_s`."""

    source: str
    """Where the figures come from."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.bandwidth) and self.bandwidth > 0 and self.query_tile > 0):
            raise ValueError(f"A bandwidth and a query tile must be positive: {self}.")
        if min(self.level_overhead_s, self.group_overhead_s) < 0:
            raise ValueError(f"Overheads must be at least 0: {self}.")

    def with_measured(self, points: Iterable[BreakEven], source: str) -> CascadeDevice:
        """This device with the overheads that break-even points measured on it imply.

        A point takes the place of an older one with as many rows. MIN_SHARED_TOKENS stays.
        """
        overheads = dict(self.measured)
        for point in points:
            costs = self.costs(point.shape)
            tiles = -(-point.rows // costs.rows_per_tile)
            tokens = (point.rows - tiles) * point.shared_tokens
            tokens -= costs.per_group + point.rows * costs.per_row
            seconds = tokens * point.shape.bytes_per_token / self.bandwidth
            overheads[point.rows] = max(seconds, 0.0)
        return replace(self, measured=tuple(sorted(overheads.items())), source=source)

    def overhead_s(self, rows: int) -> float:
        """Seconds in one layer for a level with `rows` rows in its groups.

        Between two measured points on the line through them; beyond them the nearest's, but never
        less per row than the last point's: what grows with the rows goes on growing.
        """
        if not self.measured:
            return self.level_overhead_s
        i = bisect.bisect_left(self.measured, (rows, -math.inf))
        if i == len(self.measured):
            last_rows, seconds = self.measured[-1]
            return seconds * rows / last_rows
        if i == 0:
            return self.measured[0][1]
        (low, low_s), (high, high_s) = self.measured[i - 1 : i + 1]
        return low_s + (high_s - low_s) * (rows - low) / (high - low)

    def costs(self, shape: AttentionShape) -> GroupingCosts:
        """What grouping must know: all costs but the levels' overhead, in tokens."""
        seconds_per_token = shape.bytes_per_token / self.bandwidth
        queries_per_row = shape.n_query_heads // shape.n_kv_heads
        return GroupingCosts(
            per_group=math.ceil(self.group_overhead_s / seconds_per_token),
            per_row=-(-shape.merge_bytes // shape.bytes_per_token),
            rows_per_tile=max(self.query_tile // queries_per_row, 1),
            min_tokens=MIN_SHARED_TOKENS,
        )


def cascade_device(spec: DeviceSpec) -> CascadeDevice:
    """What is known of `spec`, one rank's device: stated estimates where nothing was measured.

    GPU: a level takes about three launches in each layer (its attention, the merge, and the ends of
    the suffixes' kernel, which has less to fill the device with), 2.5 us each with CUDA graphs. If
    the shared KV fits the L2 cache, it is read fast without cascade too, and the saving is less.
    CPU: what was measured on one, torch calls per group instead of launches.
    """
    if spec.name.startswith("CPU"):
        return CascadeDevice(
            name=spec.name,
            bandwidth=CPU_BANDWIDTH,
            level_overhead_s=0.0,
            group_overhead_s=CPU_GROUP_OVERHEAD_S,
            source="measured on one core of a 2.8 GHz Xeon",
        )
    return CascadeDevice(
        name=spec.name,
        bandwidth=spec.memory_bandwidth * spec.bandwidth_efficiency,
        level_overhead_s=7.5e-6,
        group_overhead_s=0.0,
        source=f"estimated: 3 launches of 2.5 us a level; bandwidth: {spec.source}",
    )


def net_saving_s(plan: CascadePlan, shape: AttentionShape, device: CascadeDevice) -> float:
    """Seconds that `plan` is predicted to save in each layer; negative if it costs some."""
    seconds_per_token = shape.bytes_per_token / device.bandwidth
    overhead = sum(device.overhead_s(level.n_rows) for level in plan.levels)
    return saving(plan, device.costs(shape)) * seconds_per_token - overhead


def plan_batch(
    contexts: Sequence[Context], shape: AttentionShape, device: CascadeDevice, max_levels: int = 2
) -> CascadePlan:
    """The plan that is predicted to save most time; without levels if none saves any.

    Raises ValueError if the contexts contradict each other (`best_plans`).
    """
    plans = best_plans(contexts, device.costs(shape), max_levels)
    return max(plans, key=lambda plan: (net_saving_s(plan, shape, device), -len(plan.levels)))
