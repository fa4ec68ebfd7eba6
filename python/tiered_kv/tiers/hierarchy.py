"""The three tiers as one cache: what the engine's prefix cache calls.

One thread owns a hierarchy (the scheduler's). Every call returns without waiting for I/O, but for
`settle_*`, which wait for memory copies that are already running, and not for ever.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tiered_kv.core.errors import TieredKVError
from tiered_kv.core.ids import Tier
from tiered_kv.forest.key import SHARED_TREE, TreeKey, tree_hash
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import Residency
from tiered_kv.forest.results import InsertResult
from tiered_kv.memory.demand import DemandForecast
from tiered_kv.scheduler.calibration import StepObservation
from tiered_kv.tiers.context import TierContext
from tiered_kv.tiers.device import DeviceSlots
from tiered_kv.tiers.disk_pages import DiskPages
from tiered_kv.tiers.load_back import LoadBack
from tiered_kv.tiers.prefetch import Prefetch
from tiered_kv.tiers.timeline import transfer_spans
from tiered_kv.tiers.transfer import LONGEST_JOB_S, Completion, J, SingleRank, TransferQueue
from tiered_kv.tiers.write_back import WriteBack

#: A copy between memories takes milliseconds; one that takes this long will never end.
SETTLE_TIMEOUT_S = 60.0
#: How long a flush waits for what is still to be written to the disk.
FLUSH_TIMEOUT_S = 10.0
#: Observed forward passes that may wait to be learned from.
STEPS_MAX = 16
#: Longest rest of an idle loop, in seconds: what a request that comes then may wait longer.
REST_S = 0.001


class TransferTimeoutError(TieredKVError, RuntimeError):
    """A transfer hangs; its pages can be neither used nor freed."""


@dataclass(frozen=True, slots=True)
class UsablePrefix:
    """What a prompt can reuse: `device` nodes now, then `host` nodes after a load.

    Nodes LOADING on the device count as device nodes: the batch that runs over them waits at the
    gate, layer by layer.
    """

    root: Node
    device: tuple[Node, ...]
    host: tuple[Node, ...]

    @property
    def last_device(self) -> Node:
        return self.device[-1] if self.device else self.root

    @property
    def last(self) -> Node:
        return self.host[-1] if self.host else self.last_device

    @property
    def n_host_tokens(self) -> int:
        return sum(node.n_tokens for node in self.host)


class KVHierarchy:
    """Forest, policy and tiers, wired together.

    namespace: 32 bytes naming everything that makes KV reusable at all (the model's weights and
    configuration, dtype, page layout, shard); a request's own key (adapter, tenant salt) picks the
    tree within it.
    """

    def __init__(self, context: TierContext, namespace: bytes) -> None:
        self.context = context
        self.write_back = WriteBack(context)
        self.load_back = LoadBack(context)
        self.prefetch = Prefetch(context)
        self._namespace = namespace
        self._started_at = time.monotonic()
        self._steps: list[StepObservation] = []
        # What becomes of a finished transfer, in the order in which a poll looks at the queues.
        self._finish: dict[TransferQueue[Any], Callable[[Completion[Any]], None]] = {
            self.write_back.to_host: self.write_back.host_written,
            self.load_back.queue: self.load_back.loaded,
            self.write_back.to_disk: self.write_back.disk_written,
            self.prefetch.lookups: self.prefetch.looked_up,
            self.prefetch.queue: self.prefetch.finished,
        }
        if context.timeline is not None:
            for queue in self._finish:
                queue.observe = transfer_spans(context.timeline)

    # -- trees --------------------------------------------------------------------------------

    def root(self, key: TreeKey | None = None) -> Node:
        """The root of the tree that requests with this key share; None is `SHARED_TREE`."""
        key = key or SHARED_TREE
        return self.context.forest.root(tree_hash(self._namespace, key), key)

    def set_namespace(self, namespace: bytes, disk: DiskPages | None) -> None:
        """After a flush: the weights have changed, and nothing cached before may be matched."""
        self._namespace = namespace
        self.context.disk = disk

    def suspend_disk(self) -> None:
        """The weights are changing: pages computed from now on have no name until a flush."""
        self.context.disk = None

    # -- what a request does ------------------------------------------------------------------

    def match(self, root: Node, tokens: array[int], limit: int | None = None) -> UsablePrefix:
        """The longest prefix of `tokens[:limit]` that device, then host, can provide now."""
        path = self.context.forest.match(root, tokens, limit).path
        n_device, n_usable = _usable(path)
        return UsablePrefix(root, path[:n_device], path[n_device:n_usable])

    def peek(self, root: Node, tokens: array[int]) -> Node:
        """The last node that such a prefix goes through to its end; looking is no use of it."""
        path = self.context.forest.peek(root, tokens).path
        _, n_usable = _usable(path)
        return path[n_usable - 1] if n_usable else root

    def insert(self, root: Node, tokens: array[int], slots: torch.Tensor) -> InsertResult:
        """Takes over those device slots of `tokens` (whole pages) that the tree lacks.

        They are written through to the other tiers from here on; so is what an earlier attempt
        left unwritten (the tier had failed, or was full), for as long as it is in use. The caller
        frees those of `slots[:resident_tokens]` that are not the tree's own.
        """
        if self.load_back.n_open:
            # The tree's slots replace the caller's: they must hold the KV by then.
            self.settle_loads()
        result = self.context.forest.insert(root, tokens, DeviceSlots(slots))
        self.context.stored(result.adopted, Tier.DEVICE)
        self.write_back.inserted(result.adopted or (result.last,))
        self.write_back.resident_on_host((result.last,))
        return result

    def evict_device(self, n_tokens: int) -> int:
        """Frees at least `n_tokens` device slots if unpinned pages allow it; returns how many."""
        freed = self.context.evict_device(n_tokens)
        if freed < n_tokens and (self.write_back.to_host.in_flight or self.load_back.n_open):
            # Pages that a copy still holds: copies are short, and running out of slots is fatal.
            self.settle_host_writes()
            self.settle_loads()
            freed += self.context.evict_device(n_tokens - freed)
        return freed

    def forecast(self, forecast: DemandForecast) -> None:
        """What is expected to be needed is protected, and brought nearer into room that is free."""
        context = self.context
        free = context.allocator.available() // context.page_size
        for action in context.manager.on_forecast(forecast, free):
            if self.load_back.carry_out(action) is None:
                break
            for node_id in action.node_ids:
                context.forest.mark_ahead(context.forest.node(node_id), Tier.DEVICE)

    # -- progress -----------------------------------------------------------------------------

    def poll(self) -> None:
        """Acknowledges finished transfers and starts what waited for room; never blocks.

        Under tensor parallelism every rank must call it at the same points of its loop.
        """
        if any(queue.in_flight for queue in self._finish) or self.prefetch.wants_time:
            ready = [queue.ready() for queue in self._finish]
            agreed = iter(self._agree([value for values in ready for value in values]))
            for queue, values in zip(self._finish, ready, strict=True):
                self._acknowledge(queue, [next(agreed) for _ in values])
        self.load_back.advance()
        self.write_back.advance()
        self.prefetch.advance()

    def rest(self) -> None:
        """Gives the interpreter to the transfers under way, until one is done or REST_S is over.

        For a loop with nothing else to do: were it to spin, every transfer would wait for it after
        each of its calls to the disk, for up to 5 ms (`sys.getswitchinterval`).
        """
        busy = [queue for queue in self._finish if queue.in_flight]
        if busy and not any(queue.n_ready for queue in busy):
            # What a request waits for, if there is such a thing.
            (self.prefetch.queue if self.prefetch.queue in busy else busy[0]).wait_for_one(REST_S)

    def _agree(self, ready: list[int]) -> list[int]:
        """One minimum over the ranks for all that a poll has to agree on.

        Besides the transfers that are done: the time, and how long the forward passes took that
        were observed since; as negative values, so that the slowest rank's count.
        """
        context = self.context
        steps, self._steps = self._steps, []
        now_us = int((time.monotonic() - self._started_at) * 1e6)
        step_us = [-int(step.seconds * 1e6) for step in steps]
        agreed = context.collective.minimum([*ready, now_us, *step_us])
        context.now_s = agreed[len(ready)] / 1e6
        if context.calibrator is not None:
            for step, negative_us in zip(steps, agreed[len(ready) + 1 :], strict=True):
                context.calibrator.observe_step(
                    step.prefills,
                    step.decode_contexts_tokens,
                    step.n_decodes,
                    -negative_us / 1e6,
                    step.shared_tokens_saved,
                )
        return agreed[: len(ready)]

    def learn(self) -> None:
        """Learns now from the passes observed since the last poll with a transfer under way.

        Every rank must call it at the same points of its loop.
        """
        self._agree([])

    def observe_step(self, step: StepObservation) -> None:
        """A forward pass was observed, in the same order on every rank.

        It is learned from at the next poll with a transfer under way, or by `learn`.
        """
        if self.context.calibrator is not None:
            self._steps.append(step)
            del self._steps[:-STEPS_MAX]

    def settle_host_writes(self) -> None:
        """Waits for the device -> host copies under way. Raises TransferTimeoutError."""
        self._settle(self.write_back.to_host)

    def settle_loads(self) -> None:
        """Waits for the host -> device copies asked for. Raises TransferTimeoutError."""
        self.load_back.start()
        self._settle(self.load_back.queue)

    def settle_disk(self) -> None:
        """Waits for all disk I/O under way. Raises TransferTimeoutError."""
        self._settle(self.write_back.to_disk)
        self._settle(self.prefetch.lookups)
        self._settle(self.prefetch.queue)

    def _settle(self, queue: TransferQueue[Any]) -> None:
        with self.context.pacer.hurry():
            is_over = queue.wait(SETTLE_TIMEOUT_S)
        if not is_over:
            raise TransferTimeoutError(
                f"A {queue.name} transfer did not end within {SETTLE_TIMEOUT_S:.0f} s: the device "
                "or the disk hangs; look at the kernel's log and restart the server."
            )
        self._acknowledge(queue, queue.everything())

    def _acknowledge(self, queue: TransferQueue[Any], ready: list[int]) -> None:
        """These transfers of a queue are done, on all ranks (`TransferQueue.ready`)."""
        for completion in self._agreed(queue.take(ready)):
            self._finish[queue](completion)

    def _agreed(self, completions: list[Completion[J]]) -> list[Completion[J]]:
        """A page counts as moved only if it moved on every rank, a job as long as on the slowest.

        Both in one minimum: what is learned from the times decides, so ranks must learn alike.
        """
        if not completions:
            return completions
        counts = [c.n_done for c in completions]
        times_us = [-int(c.service_s * 1e6) for c in completions]
        agreed = self.context.collective.minimum([*counts, *times_us])
        n = len(completions)
        return [
            replace(c, n_done=n_done, service_s=-negative_us / 1e6)
            for c, n_done, negative_us in zip(completions, agreed[:n], agreed[n:], strict=True)
        ]

    # -- whole-cache operations ---------------------------------------------------------------

    def flush(self) -> None:
        """Empties device and host bookkeeping; the disk keeps its pages, and gets what waits.

        The caller has no request in flight, and resets the engine's allocator itself. Raises
        TransferTimeoutError if a transfer hangs.
        """
        self.settle_loads()
        self.prefetch.clear()
        deadline = time.monotonic() + FLUSH_TIMEOUT_S
        while True:
            self.settle_host_writes()
            self.settle_disk()
            n_waiting = self.write_back.n_deferred
            # Whether time is up must be agreed: ranks that part here would wait for each other.
            (more,) = self.context.collective.minimum([int(time.monotonic() < deadline)])
            if not (n_waiting and more):
                break
            self.write_back.advance()
            if not (self.write_back.to_host.in_flight or self.write_back.to_disk.in_flight):
                break
        self.write_back.clear()
        self.context.forest.clear()
        self.context.host.clear()

    def forget_disk(self) -> None:
        """The disk is being cleared: no node may claim to be there."""
        self.settle_disk()
        for node in self.context.forest.nodes():
            if node.state(Tier.DISK) is Residency.RESIDENT:
                self.context.forest.evict(node, Tier.DISK)

    def close(self, timeout_s: float, end_s: float = LONGEST_JOB_S) -> None:
        """Lets what is still to be written reach the disk, as far as the time allows, and stops.

        The jobs under way then get `end_s` to end, all together.
        """
        # Ranks shut down on their own: nobody to agree with any more.
        self.context.collective = SingleRank()
        self.context.pacer.stop()
        deadline = time.monotonic() + timeout_s
        queues = (self.write_back.to_host, self.write_back.to_disk)
        while time.monotonic() < deadline:
            for queue in queues:
                queue.wait(max(0.0, deadline - time.monotonic()))
            self.poll()
            if not any(queue.in_flight for queue in queues) and not self.write_back.n_deferred:
                break
        for open_queue in self._finish:
            open_queue.end()
        deadline = time.monotonic() + end_s
        for open_queue in self._finish:
            open_queue.close(max(0.0, deadline - time.monotonic()))


def _usable(path: Sequence[Node]) -> tuple[int, int]:
    """How many leading nodes the device can provide, and how many it and then the host can."""
    n_device = 0
    for node in path:
        if node.state(Tier.DEVICE) is Residency.ABSENT:
            break
        n_device += 1
    n_usable = n_device
    for node in path[n_device:]:
        if node.state(Tier.HOST) is not Residency.RESIDENT:
            break
        n_usable += 1
    return n_device, n_usable
