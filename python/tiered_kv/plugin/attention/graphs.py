"""CUDA graphs for decode batches that are read in groups, beside upstream's own.

Upstream captures one graph per batch size. Each of ours is a variant of it by `ShapeKey`'s label,
as upstream's own variants for LoRA are: the same runner captures it after its own, with the
attention backend told to attend as for a plan with so many levels. A pass whose plan fits is
replayed under that label; others run eagerly if that still pays, or as upstream's.

Source of the contract: `sglang/srt/model_executor/runner/decode_cuda_graph_runner.py` (0.5.17).
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tiered_kv.attention.flashinfer_graph import GraphLevels, GraphLevelsMaker, fits_graph
from tiered_kv.plugin.attention.cascade import planner_of

if TYPE_CHECKING:
    from tiered_kv.attention.plan import CascadePlan
    from tiered_kv.attention.runner import PageTables

logger = logging.getLogger(__name__)


def label_of(n_levels: int) -> str:
    """The label of the variant, in upstream's `ShapeKey`."""
    return f"tiered_kv_cascade_{n_levels}"


class CascadeGraphs:
    """Which graphs one rank has for plans with levels, and what they replay."""

    def __init__(self, maker: GraphLevelsMaker) -> None:
        self._maker = maker
        self._levels: dict[tuple[int, int], GraphLevels] = {}
        self._sizes: list[int] = []
        self._asked: tuple[CascadePlan | None, GraphLevels | None] = (None, None)
        self._planned: tuple[CascadePlan, GraphLevels, CascadePlan] | None = None
        self.capturing: GraphLevels | None = None
        """What the graph that is being captured attends with; None for upstream's graphs."""

    @property
    def levels_max(self) -> int:
        return self._maker.levels_max

    @contextmanager
    def capture(self, n_rows: int, n_levels: int) -> Iterator[None]:
        """While a variant is captured; it may be replayed if that ends well."""
        self.capturing = self._maker.make(n_rows, n_levels)
        self._planned = None
        try:
            yield
            self._levels[n_rows, n_levels] = self.capturing
        finally:
            self.capturing = None
        self._sizes = sorted({size for size, _ in self._levels})
        self._asked = (None, None)

    def levels_for(self, plan: CascadePlan) -> GraphLevels | None:
        """What the graph that a plan fits into attends with; None if there is no such graph.

        As upstream pads, to the next size up. Asked several times for the plan of a pass.
        """
        if self._asked[0] is not plan:
            self._asked = (plan, self._find(plan))
        return self._asked[1]

    def plan(self, plan: CascadePlan, levels: GraphLevels, tables: PageTables) -> CascadePlan:
        """Have `levels` take on a plan, unless it was the last to do so; returns it padded.

        tables: of the padded batch. All sizes share their buffers of slots.
        """
        last = self._planned
        if last is None or last[0] is not plan or last[1] is not levels:
            # Not known to hold anything if it fails half-way.
            self._planned = None
            last = self._planned = plan, levels, levels.plan(plan, tables)
        return last[2]

    def _find(self, plan: CascadePlan) -> GraphLevels | None:
        if not plan.levels or not self._sizes or plan.n_rows > self._sizes[-1]:
            return None
        n_rows = self._sizes[bisect_left(self._sizes, plan.n_rows)]
        levels = self._levels.get((n_rows, len(plan.levels)))
        return levels if levels is not None and fits_graph(plan, n_rows) else None


def graphs_of(graph_runner: Any) -> CascadeGraphs | None:
    """The graphs of a runner's attention backend, if it has any of ours."""
    return getattr(graph_runner.attn_backend, "cascade_graphs", None)


def _why_not(graph_runner: Any, stream_idx: int | None, variant_label: str | None) -> str | None:
    """What of a runner keeps it from having variants of ours."""
    if not graph_runner.capture_forward_mode.is_decode():
        return "speculative decoding"
    if type(graph_runner.backend).__name__ != "FullCudaGraphBackend":
        return "graphs in segments"
    if variant_label is not None:
        return "graphs with and without LoRA"
    if stream_idx is not None or graph_runner.enable_two_batch_overlap:
        return "batches on several streams"
    if graph_runner.require_gathered_buffer:
        # Ranks with batches of their own pad to the largest.
        return "data-parallel attention"
    if graph_runner.capture_bs[-1] < 2:
        return "graphs for single requests only"
    return None


def capture_variants(
    original: Callable[..., None],
    graph_runner: Any,
    size: int,
    forward: Callable[..., Any],
    stream_idx: int | None = None,
    variant_label: str | None = None,
    *args: Any,
    **kwargs: Any,
) -> None:
    """AROUND `DecodeCudaGraphRunner.capture_one_shape`: upstream's graph of a size, then ours."""
    original(graph_runner, size, forward, stream_idx, variant_label, *args, **kwargs)
    graphs = graphs_of(graph_runner)
    if graphs is None:
        return
    is_first = size == graph_runner.capture_bs[-1]
    reason = _why_not(graph_runner, stream_idx, variant_label)
    if reason is not None:
        if is_first:
            logger.info("Tiered KV: cascade attention without CUDA graphs, because of %s.", reason)
        return
    if size < 2:
        return
    for n_levels in range(1, graphs.levels_max + 1):
        with graphs.capture(size, n_levels):
            original(graph_runner, size, forward, stream_idx, label_of(n_levels))


def _plan_of_pass(graph_runner: Any) -> CascadePlan | None:
    planner = planner_of(graph_runner)
    planned = None if planner is None else planner.current
    return None if planned is None else planned.plan


def _levels_of_pass(graph_runner: Any) -> GraphLevels | None:
    """What the pass that has begun attends with in a graph of ours; None if in none."""
    graphs, plan = graphs_of(graph_runner), _plan_of_pass(graph_runner)
    return None if graphs is None or plan is None else graphs.levels_for(plan)


def variant_of_pass(
    original: Callable[..., str | None], graph_runner: Any, forward_batch: Any
) -> str | None:
    """AROUND `DecodeCudaGraphRunner._resolve_lora_variant`: the label of the pass's graph."""
    levels = _levels_of_pass(graph_runner)
    return original(graph_runner, forward_batch) if levels is None else label_of(levels.n_levels)


def may_run_graph(
    original: Callable[..., bool], graph_runner: Any, forward_batch: Any, *args: Any, **kwargs: Any
) -> bool:
    """AROUND `DecodeCudaGraphRunner.can_run_graph`: a pass with levels only in a graph of ours.

    The others hold upstream's attention, which would read all KV of every row.
    """
    plan = _plan_of_pass(graph_runner)
    if plan is not None and plan.levels and _levels_of_pass(graph_runner) is None:
        return False
    return original(graph_runner, forward_batch, *args, **kwargs)
