"""From when to when forward passes ran, for whoever wants to know: a timeline, a budget."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tiered_kv.plugin.passes.launched import LaunchedPasses, chunks_of
from tiered_kv.tiers.timeline import PASSES

if TYPE_CHECKING:
    from tiered_kv.scheduler.cost_model import CostModel
    from tiered_kv.tiers.pacing import WriteBackPacer
    from tiered_kv.tiers.timeline import TimelineFile


@dataclass(frozen=True, slots=True)
class Pass:
    """A batch's forward pass; the batch may have changed since. Seconds of time.monotonic."""

    mode: Any
    n_requests: int
    n_new_tokens: int
    context_tokens: int
    """What those who decode attend to, together."""
    n_decodes: int
    """How many decode: all in a decode, some in a pass of both kinds."""
    load_index: int
    """The load of pages whose layers it waits for, or -1."""
    start_s: float
    end_s: float = 0.0
    chunks: tuple[tuple[int, int], ...] = ()
    """Of a pass that prefills: (new tokens, tokens before them) of each request that does."""

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s


class PassLog(LaunchedPasses[Pass]):
    """Tells `observers` of every pass when it is over."""

    def __init__(self, observers: list[Callable[[Pass], None]], *, synchronous: bool) -> None:
        super().__init__(synchronous=synchronous)
        self._observers = observers

    def describe(self, batch: Any) -> Pass:
        mode, n_requests = batch.forward_mode, len(batch.reqs)
        context_tokens = n_decodes = 0
        chunks: tuple[tuple[int, int], ...] = ()
        n_new_tokens = n_requests
        if mode.is_decode():
            n_decodes = n_requests
            context_tokens = sum(len(r.origin_input_ids) + len(r.output_ids) for r in batch.reqs)
        elif mode.is_extend():
            chunks, context_tokens, n_decodes = chunks_of(batch)
            n_new_tokens = sum(batch.extend_lens)
        load_index = -1 if batch.hicache_consumer_index is None else batch.hicache_consumer_index
        return Pass(
            mode,
            n_requests,
            n_new_tokens,
            context_tokens,
            n_decodes,
            load_index,
            batch.launch_ts,
            chunks=chunks,
        )

    def over(self, described: Pass, start_s: float, end_s: float) -> None:
        over = replace(described, start_s=start_s, end_s=end_s)
        for observe in self._observers:
            observe(over)


def draw_passes(timeline: TimelineFile) -> Callable[[Pass], None]:
    """An observer that draws passes on a row of their own."""
    # The timeline's clock: both are the same on Linux, but only that is promised nowhere.
    ahead_s = time.perf_counter() - time.monotonic()

    def observe(done: Pass) -> None:
        name = f"{done.mode.name.lower()} {done.n_new_tokens}"
        start_s, end_s = done.start_s + ahead_s, done.end_s + ahead_s
        timeline.span(
            PASSES,
            name,
            start_s,
            end_s,
            requests=done.n_requests,
            load=done.load_index,
            chunks=", ".join(f"{new} after {before}" for new, before in done.chunks),
            context=done.context_tokens,
        )

    return observe


def pace_by_decodes(pacer: WriteBackPacer, cost_model: CostModel | None) -> Callable[[Pass], None]:
    """An observer that tells the pacer of passes in which somebody decodes, beside a prefill too.

    And how long each was to be expected to take.
    """

    def observe(done: Pass) -> None:
        if done.n_decodes:
            expected_s = 1.0
            if cost_model is not None:
                expected_s = cost_model.iteration_s(
                    done.chunks, done.context_tokens, done.n_decodes
                )
            pacer.observe_decode(done.seconds, expected_s)

    return observe
