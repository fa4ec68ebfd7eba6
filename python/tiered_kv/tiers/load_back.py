"""Demand loads host -> device, layer by layer under the forward pass that needs them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch

from tiered_kv.core.ids import Tier
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import Residency
from tiered_kv.memory.actions import Load
from tiered_kv.memory.loads import Loads
from tiered_kv.tiers.context import TierContext, host_pages_of, match_of
from tiered_kv.tiers.device import Copying, DeviceSlots
from tiered_kv.tiers.layer_gate import LayerGate, LoadBatch
from tiered_kv.tiers.slots import PageIds
from tiered_kv.tiers.streams import Point
from tiered_kv.tiers.timeline import draw_layers, draw_waits, layer_ends
from tiered_kv.tiers.transfer import Completion, TransferQueue


@dataclass(frozen=True, slots=True)
class Loading:
    """One request's pages on their way: nodes that carry `op`, the last of them pinned."""

    op: int
    last: Node
    host_pages: PageIds
    device_slots: torch.Tensor


@dataclass(frozen=True, slots=True)
class DeviceLoad:
    """The loads of one batch, as one job: a layer is done when it is done for all of them."""

    loads: tuple[Loading, ...]
    host_pages: PageIds
    device_slots: torch.Tensor | None
    """Kept until the load is acknowledged: a stream may still read it."""
    batch: LoadBatch
    copying: Copying
    told: list[tuple[float, Point | None]]
    """When each layer was told of, and with which point."""

    @property
    def n_pages(self) -> int:
        return len(self.host_pages)


class LoadBack:
    """Reserves device pages at admission, copies when the batch is formed, acknowledges on poll.

    A load that fails costs the batch that waits for it, which is computed again (`passed`), and
    those that would follow within a while (`Loads`).
    """

    def __init__(self, context: TierContext) -> None:
        self._context = context
        self.gate = LayerGate(context.copier.page_format.n_layers)
        self.queue: TransferQueue[DeviceLoad] = TransferQueue(
            "host-to-device", self._finish, context.copier.use_device
        )
        self._pending: list[Loading] = []
        self._failed: list[DeviceLoad] = []
        # Of acknowledged loads that failed: a pass that is being formed still counts on them.
        self._to_close: list[LoadBatch] = []
        self._decide = Loads()
        if context.timeline is not None:
            self.gate.observe = draw_waits(context.timeline)

    @property
    def wants_time(self) -> bool:
        """Whether the next poll must agree on the time: the same on every rank."""
        return self._decide.is_waiting(self._context.now_s)

    @property
    def n_open(self) -> int:
        return len(self._pending) + self.queue.in_flight

    def load(
        self, last: Node, prompt_tokens: int | None = None
    ) -> tuple[torch.Tensor, Node] | None:
        """Takes the host-resident run that ends at `last` to the device, as far as that pays.

        Returns (device token slots of the run, its last node), or None when there is nothing to
        load or no room for it. Pages are LOADING until the load is acknowledged; whoever runs a
        batch over them must first wait at the gate. prompt_tokens: the prompt's whole length, if
        more is to be computed than what follows from `last`.
        """
        action = self.plan(last, prompt_tokens)
        return None if action is None else self.carry_out(action)

    def load_whole(
        self, last: Node, prompt_tokens: int | None, start: int
    ) -> tuple[torch.Tensor, Node] | None:
        """As `load`, but all or nothing; start: whence is computed if nothing is loaded."""
        action = self.plan_whole(last, prompt_tokens, start)
        return None if action is None else self.carry_out(action)

    def plan_whole(self, last: Node, prompt_tokens: int | None, start: int) -> Load | None:
        """What `load_whole` would take to the device now, if there was room; None: nothing."""
        context, match = self._context, match_of(last)
        if match is None or self._decide.is_waiting(context.now_s):
            return None
        return context.manager.on_whole_match(
            match,
            start=start,
            prompt_tokens=prompt_tokens,
            queued_bytes=self._pages_ahead * context.copier.page_format.page_bytes,
        )

    def plan(self, last: Node, prompt_tokens: int | None = None) -> Load | None:
        """What `load` would take to the device now, if there was room; None: nothing."""
        context = self._context
        match = match_of(last)
        if match is None:
            return None
        return self._decide.wanted(
            context.manager,
            match,
            context.now_s,
            prompt_tokens=prompt_tokens,
            queued_bytes=self._pages_ahead * context.copier.page_format.page_bytes,
        )

    def load_ahead(self, action: Load) -> bool:
        """Like `load`, for nobody yet; False without room, or while loads fail."""
        return self._decide.are_working and self.carry_out(action) is not None

    def carry_out(self, action: Load) -> tuple[torch.Tensor, Node] | None:
        """Reserves what `action` names; see `load`."""
        context = self._context
        nodes = [context.forest.node(node_id) for node_id in action.node_ids]
        last, parent = nodes[-1], nodes[0].parent
        n_tokens = sum(node.n_tokens for node in nodes)
        context.forest.pin(last, Tier.HOST)
        assert parent is not None
        slots = self._alloc_device(n_tokens, keep=parent)
        if slots is None:
            context.forest.unpin(last, Tier.HOST)
            return None
        self._decide.begun(context.now_s)
        if context.beside is not None:
            context.beside.loading(nodes)
        op = context.next_op()
        at = 0
        for node in nodes:
            part = DeviceSlots(slots)[at : at + node.n_tokens]
            context.forest.start_transfer(node, Tier.DEVICE, Residency.LOADING, part, op)
            at += node.n_tokens
        context.forest.pin(last, Tier.DEVICE)
        host_pages = np.concatenate([host_pages_of(node) for node in nodes])
        self._pending.append(Loading(op, last, host_pages, slots))
        return slots, last

    @property
    def _pages_ahead(self) -> int:
        """Pages on their way to the device, or about to be."""
        return self.queue.pages_in_flight + sum(len(load.host_pages) for load in self._pending)

    def _alloc_device(self, n_tokens: int, keep: Node) -> torch.Tensor | None:
        context = self._context
        shortage = n_tokens - context.allocator.available()
        if shortage > 0:
            context.forest.pin(keep, Tier.DEVICE)
            if context.forest.evictable_tokens(Tier.DEVICE) >= shortage:
                context.evict_device(shortage)
            context.forest.unpin(keep, Tier.DEVICE)
        return context.allocator.alloc(n_tokens)

    def start(self) -> int:
        """Starts what has been reserved; returns the gate index that a batch must wait for.

        That is the newest load still open that somebody runs on, even if it is not new: pages of
        an earlier load may be in this batch too, and loads finish in order. -1 when there is
        nothing to wait for. What nobody asked for yet is not waited for, unless it came first.
        """
        if self._pending:
            loads, self._pending = tuple(self._pending), []
            self.queue.submit(self._begin(loads))
        wanted = {job.batch.index: self._is_wanted(job) for job in self.queue.open_jobs}
        # One that is open and not under way has failed: whoever counts on it must be told.
        newest = (b.index for b in self.gate.newest_first() if wanted.get(b.index, True))
        return next(newest, -1)

    def _begin(self, loads: tuple[Loading, ...]) -> DeviceLoad:
        batch = self.gate.open()
        told: list[tuple[float, Point | None]] = []

        def layer_done(layer: int, point: Point | None) -> None:
            batch.layer_done(layer, point)
            told.append((time.perf_counter(), point))

        host_pages = np.concatenate([load.host_pages for load in loads])
        device_slots: torch.Tensor | None = None
        try:
            # Before `order_after`: on a GPU the copy's stream must wait for this, too.
            device_slots = torch.cat([load.device_slots for load in loads])
            after = self._context.order_after()
            copying = self._context.copier.begin_to_device(
                host_pages, device_slots, after, layer_done
            )
        except Exception as error:
            # No memory, for one thing. It costs who counts on the load, and nobody else.
            copying = Copying(partial(_fail, error), error)
        if copying.error is not None:
            # Before the pass that counts on it runs: it is asked right after that.
            batch.fail()
        return DeviceLoad(loads, host_pages, device_slots, batch, copying, told)

    def _is_wanted(self, job: DeviceLoad) -> bool:
        """Whether somebody beside the loads themselves has pinned pages of this one."""
        return any(self._top_of(load).pins(Tier.DEVICE) > 1 for load in job.loads)

    @staticmethod
    def _top_of(load: Loading) -> Node:
        node = load.last
        while node.parent is not None and node.parent.op(Tier.DEVICE) == load.op:
            node = node.parent
        return node

    def hold_passes(self, nodes: Iterable[Node]) -> bool:
        """Passes that are launched from now on find the pages of `nodes` there.

        They wait on the device, and nobody here. False if that cannot be: copies are made by a
        thread, or have failed.
        """
        self.start()
        hold = self._context.hold_passes
        if hold is None or self._failed:
            return False
        ops = {node.op(Tier.DEVICE) for node in nodes}
        newest: Point | None = None
        for job in self.queue.open_jobs:
            at = job.batch.whole
            if at is None:
                # It takes those along that come after it.
                return False
            if any(load.op in ops for load in job.loads):
                newest = at
        if newest is not None:
            hold(newest)
        return True

    def advance(self) -> None:
        """Starts what was reserved for a batch that was not formed after all.

        Its request may be gone, and nobody else would ever start it.
        """
        if self._pending:
            self.start()

    def _finish(self, job: DeviceLoad) -> int:
        began_s = time.perf_counter()
        try:
            device_s = job.copying.finish()
        except Exception:
            job.batch.fail()
            raise
        ended_s = time.perf_counter()
        if device_s is not None:
            began_s = ended_s - device_s
            self.queue.took(device_s)
        timeline = self._context.timeline
        if timeline is not None and job.told:
            draw_layers(timeline, job.batch.index, began_s, layer_ends(job.told, ended_s))
        return job.n_pages

    def loaded(self, completion: Completion[DeviceLoad]) -> None:
        context, job = self._context, completion.job
        if completion.n_done < job.n_pages or self._failed:
            # Later loads may continue what failed.
            job.batch.fail()
            self._failed.append(job)
            self._to_close.append(job.batch)
            return
        self.gate.close(job.batch)
        self._decide.worked()
        for load in job.loads:
            nodes = context.forest.finish_transfer(load.op, Tier.DEVICE)
            context.forest.unpin(load.last, Tier.DEVICE)
            context.forest.unpin(load.last, Tier.HOST)
            context.stored(nodes, Tier.DEVICE)
        context.transferred(Tier.HOST, Tier.DEVICE, completion)

    @property
    def has_failed(self) -> bool:
        """Whether loads have failed whose pages are still in the tree."""
        return bool(self._failed)

    def close_failed(self) -> None:
        """No pass that counts on loads that failed is being formed, or under way."""
        for batch in self._to_close:
            self.gate.close(batch)
        self._to_close.clear()

    def give_up_failed(self) -> None:
        """Takes the pages that never came out of the tree; no load may be in flight."""
        context = self._context
        loads = [load for job in self._failed for load in job.loads]
        self._failed.clear()
        for load in reversed(loads):
            context.forest.unpin(load.last, Tier.DEVICE)
            context.forest.unpin(load.last, Tier.HOST)
            for _, slots in context.forest.abort_transfer(load.op, Tier.DEVICE):
                context.allocator.free(cast(DeviceSlots, slots).tensor)
        self._decide.failed(context.now_s)


def _fail(error: Exception) -> None:
    raise error
