"""All tiers as one cache: what the engine's prefix cache calls.

One thread owns a hierarchy (the scheduler's). No call waits for a store, or raises because of one;
`settle_*` and what needs them wait for copies between memories, and not for ever.
"""

from __future__ import annotations

import itertools
import time
from array import array
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import torch

from tiered_kv.core.errors import TieredKVError
from tiered_kv.core.ids import Tier
from tiered_kv.forest.key import SHARED_TREE, TreeKey, tree_hash
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import Residency
from tiered_kv.forest.results import InsertResult
from tiered_kv.memory.demand import DemandForecast
from tiered_kv.memory.ticket import path_up, usable
from tiered_kv.memory.write_through import STORE_WRITES_SHARE
from tiered_kv.scheduler.calibration import StepObservation
from tiered_kv.tiers.cold.tier import ColdTier
from tiered_kv.tiers.context import TierContext
from tiered_kv.tiers.device import DeviceSlots
from tiered_kv.tiers.load_back import LoadBack
from tiered_kv.tiers.page_store import PageStore
from tiered_kv.tiers.prefetch import Prefetch
from tiered_kv.tiers.progress import SETTLE_TIMEOUT_S, Finish, Progress
from tiered_kv.tiers.stages import COPY_FAILED, StagesPartedError, StagesProgress
from tiered_kv.tiers.timeline import transfer_spans
from tiered_kv.tiers.transfer import LONGEST_JOB_S, SingleRank, TransferQueue
from tiered_kv.tiers.usable_prefix import UsablePrefix
from tiered_kv.tiers.write_back import WriteBack

#: How long `drain` goes on copying to the host what had to wait for room there.
DRAIN_S = 2.0
#: The same between stages of a pipeline, which cannot agree on a time: how often it is.
DRAIN_ROUNDS = 8
#: While anything is kept, ranks agree on the time once in so many polls.
KEEPS_LOOK_POLLS = 16
#: Longest rest of an idle loop, in seconds: what a request that comes then may wait longer.
REST_S = 0.001


class TransferTimeoutError(TieredKVError, RuntimeError):
    """A transfer hangs; its pages can be neither used nor freed."""


class KVHierarchy:
    """Forest, policy and tiers, wired together.

    namespace: 32 bytes naming everything that makes KV reusable at all (the model's weights and
    configuration, dtype, page layout, shard); a request's own key (adapter, tenant salt) picks the
    tree within it.
    """

    def __init__(self, context: TierContext, namespace: bytes) -> None:
        self.context = context
        share = STORE_WRITES_SHARE / max(1, len(context.stores))
        self.colds = tuple(ColdTier(context, store, share) for store in context.stores)
        """The nearest first."""
        self.write_back = WriteBack(context, self.colds)
        self.load_back = LoadBack(context)
        self.prefetch = Prefetch(context, self.colds)
        self._namespace = namespace
        self._n_polls = 0
        self._n_votes: list[int] = []
        """Of each store, in the vote under way."""
        finish: dict[TransferQueue[Any], Finish] = {
            self.write_back.to_host: self.write_back.host_written,
            self.load_back.queue: self.load_back.loaded,
        }
        finish |= {cold.writes.queue: cold.writes.written for cold in self.colds}
        finish[self.prefetch.lookups.queue] = self.prefetch.looked_up
        finish |= {cold.reads: self.prefetch.finished for cold in self.colds}
        self.progress = (
            Progress(context, finish)
            if context.stages is None
            else StagesProgress(context, finish, context.stages)
        )
        if context.timeline is not None:
            for queue in self.progress.queues():
                queue.observe = transfer_spans(context.timeline)

    # -- trees --------------------------------------------------------------------------------

    def root(self, key: TreeKey | None = None) -> Node:
        """The root of the tree that requests with this key share; None is `SHARED_TREE`."""
        key = key or SHARED_TREE
        return self.context.forest.root(tree_hash(self._namespace, key), key)

    @property
    def namespace(self) -> bytes:
        return self._namespace

    def set_namespace(self, namespace: bytes, stores: Iterable[PageStore]) -> None:
        """The weights in use are called `namespace`, and so is all that is in the tree.

        If that is another name than before, the tree must be empty. stores: where their pages go to
        and come from; tiers that are not among them stay away.
        """
        self._namespace = namespace
        by_tier = {store.traits.tier: store for store in stores}
        for cold in self.colds:
            cold.use(by_tier.get(cold.tier))

    def put_stores_away(self) -> None:
        """The weights are changing: what is computed from now on has no name until there is one.

        What is under way to a store was computed before, and arrives under the old name.
        """
        for cold in self.colds:
            cold.use(None)

    # -- what a request does ------------------------------------------------------------------

    def match(self, root: Node, tokens: array[int], limit: int | None = None) -> UsablePrefix:
        """The longest prefix of `tokens[:limit]` that device, then host, can provide now."""
        path = self.context.forest.match(root, tokens, limit).path
        n_device, n_usable = usable(path)
        return UsablePrefix(root, path[:n_device], path[n_device:n_usable])

    def peek(self, root: Node, tokens: array[int]) -> Node:
        """The last node that such a prefix goes through to its end; looking is no use of it."""
        path = self.context.forest.peek(root, tokens).path
        _, n_usable = usable(path)
        return path[n_usable - 1] if n_usable else root

    def insert(self, root: Node, tokens: array[int], slots: torch.Tensor) -> InsertResult:
        """Takes over those device slots of `tokens` (whole pages) that the tree lacks.

        They are written through to the other tiers from here on; so is what an earlier attempt
        left unwritten (the tier had failed, or was full), for as long as it is in use. The caller
        frees those of `slots[:resident_tokens]` that are not the tree's own.
        """
        if self.load_back.n_open:
            self._let_loads_come_first(root, tokens)
        result = self.context.forest.insert(root, tokens, DeviceSlots(slots))
        self.context.stored(result.adopted, Tier.DEVICE)
        self.write_back.inserted(result.adopted or (result.last,))
        self.write_back.resident_on_host(path_up(result.last))
        for cold in self.colds:
            cold.used.note(result.last)
        return result

    def _let_loads_come_first(self, root: Node, tokens: array[int]) -> None:
        """The tree's slots replace the caller's: who reads them next must find the KV there."""
        known = self.context.forest.peek(root, tokens)
        path = known.path if known.partial is None else [*known.path, known.partial]
        loading = [node for node in path if node.state(Tier.DEVICE) is Residency.LOADING]
        if not loading:
            return
        if self.context.stages is None:
            is_ordered = self.load_back.hold_passes(loading)
            if self.context.collective.minimum([int(is_ordered)])[0]:
                return
        if not self.settle_loads():
            raise TransferTimeoutError(
                f"Copies to the device did not end within {SETTLE_TIMEOUT_S:.0f} s: the device "
                "hangs; look at the kernel's log and restart the server."
            )

    def evict_device(self, n_tokens: int) -> int:
        """Frees at least `n_tokens` device slots if unpinned pages allow it; returns how many."""
        freed = self.context.evict_device(n_tokens)
        if freed < n_tokens and (self.write_back.to_host.in_flight or self.load_back.n_open):
            # Pages that a copy still holds: copies are short, and running out of slots is fatal.
            self.settle_copies()
            freed += self.context.evict_device(n_tokens - freed)
        return freed

    def last_use(self, last: Node) -> None:
        """Nobody will go on from `last`, as whoever came so far says."""
        self.context.manager.on_last_use(last)

    def forecast(self, forecast: DemandForecast) -> None:
        """What is expected to be needed is protected, and brought nearer into room that is free."""
        context = self.context
        free = context.allocator.available() // context.page_size
        for action in context.manager.on_forecast(forecast, free):
            if not self.load_back.load_ahead(action):
                break
            for node_id in action.node_ids:
                context.forest.mark_ahead(context.forest.node(node_id), Tier.DEVICE)

    # -- progress -----------------------------------------------------------------------------

    def poll(self) -> None:
        """Acknowledges finished transfers and starts what waited for room; never blocks.

        Under tensor parallelism every rank must call it at the same points of its loop.
        """
        is_looking = any(cold.dropped.is_looking for cold in self.colds)
        wants_time = self.prefetch.wants_time or self.load_back.wants_time
        wants_time |= any(cold.writes.wants_time for cold in self.colds)
        keeps = self.context.manager.keeps
        if keeps:
            self._n_polls += 1
            wants_time |= self._n_polls % KEEPS_LOOK_POLLS == 0
        self.progress.poll(wants_time or is_looking, self._votes, self._counted)
        keeps.end(self.context.now_s)
        if self.load_back.has_failed:
            self._give_up_failed_loads()
        self.load_back.close_failed()
        self.load_back.advance()
        self.write_back.advance()
        self.prefetch.advance()
        for cold in self.colds:
            cold.used.advance()

    def _votes(self) -> list[int]:
        """What the stores gave up, for the minimum over the ranks."""
        votes = [cold.dropped.votes() for cold in self.colds]
        self._n_votes = [len(own) for own in votes]
        return list(chain.from_iterable(votes))

    def _counted(self, agreed: list[int]) -> None:
        """The minimum of the last votes."""
        rest = iter(agreed)
        for cold, n_own in zip(self.colds, self._n_votes, strict=True):
            cold.dropped.counted(list(islice(rest, n_own)))

    def rest(self) -> None:
        """Gives the interpreter to the transfers under way, until one is done or REST_S is over.

        For a loop with nothing else to do: were it to spin, every transfer would wait for it after
        each of its calls to the system, for up to 5 ms (`sys.getswitchinterval`).
        """
        busy = [queue for queue in self.progress.queues() if queue.in_flight]
        if busy and not any(queue.n_ready for queue in busy):
            # What a request waits for, if there is such a thing.
            reads = [cold.reads for cold in self.colds if cold.reads.in_flight]
            [*reads, *busy][0].wait_for_one(REST_S)

    def learn(self) -> None:
        """Learns now from the passes observed since the last poll with a transfer under way.

        Every rank must call it at the same points of its loop.
        """
        self.progress.learn()

    def observe_step(self, step: StepObservation) -> None:
        """A forward pass was observed, in the same order on every rank.

        It is learned from at the next poll with a transfer under way, or by `learn`.
        """
        self.progress.observe_step(step)

    def settle_copies(self) -> bool:
        """Waits for the copies under way, both ways; False if they take too long."""
        is_over = self.progress.settle(self.write_back.to_host)
        return self.settle_loads() and is_over

    def settle_loads(self) -> bool:
        """Waits for the host -> device copies asked for; False if they take too long.

        Those that failed have left the tree then.
        """
        self.load_back.start()
        is_over = self.progress.settle(self.load_back.queue)
        if self.load_back.has_failed:
            self._give_up_failed_loads()
        return is_over

    def _give_up_failed_loads(self) -> None:
        """Later ones may build on them, and go, too."""
        self.load_back.start()
        if self.progress.settle(self.load_back.queue):
            self.load_back.give_up_failed()

    def has_failed(self, gate_index: int) -> bool:
        """Whether a forward pass that waited at the gate read KV that never came, on any rank.

        Every rank asks after each pass that had a gate index to wait for, -1 being none. If so, the
        caller throws away what the pass computed, lets go of the pages that it read, and calls
        `leave_failed_loads`, before it does anything else.
        """
        is_good = not self.load_back.gate.has_failed(gate_index)
        if self.context.stages is not None:
            if not is_good:
                raise StagesPartedError(COPY_FAILED)
            return False
        return not self.context.collective.minimum([int(is_good)])[0]

    def leave_failed_loads(self) -> None:
        """Nobody holds pages any more that never came: they leave the tree."""
        self.settle_loads()
        self.load_back.close_failed()

    # -- whole-cache operations ---------------------------------------------------------------

    def drain(self) -> bool:
        """Ends what touches the device's memory; False if a copy hangs, on any rank.

        What waits for room on the host is copied as far as there is some. Nothing waits for a
        store: what is on the host is written behind.
        """
        deadline = time.monotonic() + DRAIN_S
        to_host = self.write_back.to_host
        for n_settled in itertools.count():
            if not self.settle_copies():
                return False
            if not self._drains_on(n_settled, deadline):
                break
            self.write_back.advance()
            if not to_host.in_flight:
                break
        return True

    def _drains_on(self, n_settled: int, deadline_s: float) -> bool:
        """Whether there is time for more. That must be agreed: who parts here is waited for."""
        if self.context.stages is not None:
            return n_settled < DRAIN_ROUNDS
        return bool(self.context.collective.minimum([int(time.monotonic() < deadline_s)])[0])

    def flush(self) -> None:
        """Empties device and host; the stores keep their pages, and get those that are on the host.

        The caller has no request in flight, and resets the engine's allocator itself. Raises
        TransferTimeoutError if a copy between device and host hangs: `drain` first.
        """
        if not self.drain():
            raise TransferTimeoutError(
                "The cache cannot be emptied while a copy between device and host hangs: look at "
                "the kernel's log and restart the server."
            )
        context = self.context
        self.prefetch.clear()
        keep = self.write_back.hand_over()
        keep += [job.host_pages for cold in self.colds for job in cold.reads.open_jobs]
        context.epoch = replace(context.epoch, flushes=context.epoch.flushes + 1)
        for cold in self.colds:
            cold.dropped.forget()
        context.forest.clear()
        context.host.clear(keep)

    def forget_stored(self, tier: Tier) -> None:
        """The store is being cleared: no node may claim to be there, now or later."""
        context = self.context
        context.epoch = replace(context.epoch, clears=context.epoch.clears + 1)
        for cold in self.colds:
            if cold.tier is tier:
                cold.writes.forget()
                cold.dropped.forget()
        for node in context.forest.nodes():
            if node.state(tier) is Residency.RESIDENT:
                context.forest.evict(node, tier)
                context.removed(node, tier)

    def queues(self) -> list[TransferQueue[Any]]:
        """All there are, each with a thread of its own."""
        return [*self.progress.queues(), *(cold.used.queue for cold in self.colds)]

    def close(self, timeout_s: float, end_s: float = LONGEST_JOB_S) -> None:
        """Lets what is still to be written reach the stores, as far as the time allows, and stops.

        A store that others read gets all that only the host has.

        The jobs under way then get `end_s` to end, all together. Where other ranks share the host
        pool, only what is on its way to a store is written: they may still be filling the rest.
        """
        # Ranks shut down on their own: nobody to agree with any more.
        self.context.collective = SingleRank()
        self.context.stages = None
        self.context.pacer.stop()
        deadline = time.monotonic() + timeout_s
        is_shared = self.context.host.is_shared
        queues: list[TransferQueue[Any]] = [] if is_shared else [self.write_back.to_host]
        queues += [cold.writes.queue for cold in self.colds]
        for cold in self.colds:
            if cold.traits.is_shared:
                cold.writes.leave()
        while time.monotonic() < deadline:
            for queue in queues:
                queue.wait(max(0.0, deadline - time.monotonic()))
            if is_shared:
                break
            self.poll()
            if not any(queue.in_flight for queue in queues) and not self.write_back.n_deferred:
                break
        all_queues = self.queues()
        for open_queue in all_queues:
            open_queue.end()
        deadline = time.monotonic() + end_s
        for open_queue in all_queues:
            open_queue.close(max(0.0, deadline - time.monotonic()))
