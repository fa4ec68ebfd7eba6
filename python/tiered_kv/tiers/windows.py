"""KV of layers that look back a window only: taken where prompts end, given back where they go on.

On the device such layers have a row for every token, as all do. Below it lies, apart from the
other layers' pages, the KV of the last window before each place where a prompt was cut or ended. So
a page that was loaded is *hollow* on the device: its rows of these layers are not its own, until
they are given to it (`bring`), or somebody has computed them (`inserted`).

The scheduler's thread owns this. Copies to the host and the disk are for threads of their own; what
is given back is a window, and is on the device before the next pass reads it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from tiered_kv.core.ids import PageHash, Tier
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import Residency
from tiered_kv.memory.checkpoints import Checkpoints
from tiered_kv.memory.ticket import path_up
from tiered_kv.memory.windows import deepest_end, names_along
from tiered_kv.tiers.cold.local_pages import LocalPages
from tiered_kv.tiers.context import TierContext, device_slots_of
from tiered_kv.tiers.device import Copying, PageCopier
from tiered_kv.tiers.progress import SETTLE_TIMEOUT_S
from tiered_kv.tiers.slots import PageIds
from tiered_kv.tiers.streams import After, Point
from tiered_kv.tiers.transfer import Completion, TransferQueue
from tiered_kv.tiers.window_files import WindowFiles

logger = logging.getLogger(__name__)

#: Of the host's pages, what may be on its way from the device at a time.
TAKEN_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Taking:
    """Pages on their way to the host: whose rows, where to, and under which names."""

    last: Node
    device_slots: torch.Tensor
    host_pages: PageIds
    names: tuple[PageHash, ...]
    after: After
    is_lasting: bool

    @property
    def n_pages(self) -> int:
        return len(self.names)


@dataclass(frozen=True, slots=True)
class Bringing:
    """Pages on their way to the device, on a stream; held until that is over."""

    copying: Copying
    device_slots: torch.Tensor
    n_pages: int


@dataclass(frozen=True, slots=True)
class WindowRows:
    """buffers: the device's, of these layers alone, token-major. n_back: pages that they look back.

    on_stream: in which copies within the device follow the passes launched so far.
    """

    buffers: Sequence[torch.Tensor]
    n_back: int
    on_stream: Callable[[], AbstractContextManager[object]] = nullcontext

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """From token slots to others on the device."""
        with self.on_stream():
            for buffer in self.buffers:
                buffer[target] = buffer[source]


class WindowPages:
    """What `tiers.places.Places` says, and more.

    pages: uint8 array of shape (pages, slot bytes); copier: between it and `rows.buffers`; store:
    None without a disk.
    """

    def __init__(
        self,
        context: TierContext,
        rows: WindowRows,
        copier: PageCopier,
        pages: npt.NDArray[np.uint8],
        store: LocalPages | None,
    ) -> None:
        self.table = Checkpoints(len(pages))
        self.hollow: set[PageHash] = set()
        self.n_back = rows.n_back
        self._context, self._rows, self._copier = context, rows, copier
        self._pages, self._page_size = pages, context.page_size
        self._page_bytes = copier.page_format.page_bytes
        self._held: dict[str, list[int]] = {}
        """By request: slots that it may need in this pass."""
        self._taken: set[PageHash] = set()
        """On their way from the device."""
        self._copies: TransferQueue[Taking | Bringing] = TransferQueue(
            "windows", self._copy, copier.use_device
        )
        self._files = WindowFiles(self.table, pages, store)
        self._postponed: list[tuple[Node, bool]] = []
        """What is to be taken when a load is over that is on the way to it."""
        context.beside = self

    # -- what becomes of pages on the device --------------------------------------------------

    def loading(self, nodes: Iterable[Node]) -> None:
        """Pages come to the device without their rows of these layers."""
        for node in nodes:
            self.hollow.update(node.page_hashes)

    def inserted(self, path: Sequence[Node], slots: torch.Tensor, own: int, resident: int) -> None:
        """Pages of `path` were computed: its tokens from `own` on, in `slots`.

        Down to token `resident` the tree had pages already and keeps them; those that are hollow
        get the rows that were computed. Called before anybody else may use `slots`.
        """
        if not self.hollow:
            return
        size = self._page_size
        source: list[torch.Tensor] = []
        target: list[torch.Tensor] = []
        for node in path:
            if node.end <= own:
                continue
            if node.start >= resident:
                self.hollow.difference_update(node.page_hashes)
                continue
            theirs = device_slots_of(node)
            for place, name in enumerate(node.page_hashes):
                at = node.start + place * size
                if at >= own and name in self.hollow:
                    self.hollow.discard(name)
                    source.append(slots[at : at + size])
                    target.append(theirs[place * size : (place + 1) * size])
        if source:
            self._rows.copy(torch.cat(source), torch.cat(target))

    def removed(self, node: Node) -> None:
        """It has left the device."""
        if self.hollow:
            self.hollow.difference_update(node.page_hashes)

    # -- taking them --------------------------------------------------------------------------

    def take(self, last: Node, *, is_lasting: bool) -> None:
        """A prompt may go on from the end of `last`, which is on the device: its window is kept."""
        if any(node.state(Tier.DEVICE) is Residency.LOADING for node in path_up(last)):
            # Should the load fail, nobody may hold what it was to bring.
            self._postponed.append((last, is_lasting))
            return
        wanted = [
            (name, slots)
            # One page more: who asks the same again goes on from before the prompt's last page.
            for name, slots in self._window(last, self.n_back + 1)
            if name not in self.hollow and name not in self._taken and not self._has(name)
        ]
        room = int(self.table.n_slots * TAKEN_SHARE) - len(self._taken)
        host_pages: list[int] = []
        kept: list[tuple[PageHash, torch.Tensor]] = []
        for name, slots in wanted[:room]:
            page = self.table.reserve()
            if page is None:
                break
            host_pages.append(page)
            kept.append((name, slots))
        if not kept:
            return
        names = tuple(name for name, _ in kept)
        self._taken.update(names)
        self._context.forest.pin(last, Tier.DEVICE)
        self._copies.submit(
            Taking(
                last,
                torch.cat([slots for _, slots in kept]),
                np.array(host_pages, dtype=np.int64),
                names,
                self._context.order_after(),
                is_lasting,
            )
        )

    def _has(self, name: PageHash) -> bool:
        if name not in self.table:
            return False
        self.table.use(name)
        return True

    def _window(self, last: Node, n_pages: int) -> list[tuple[PageHash, torch.Tensor]]:
        """The last pages on the way to the end of `last`, deepest first, and their token slots."""
        size = self._page_size
        found: list[tuple[PageHash, torch.Tensor]] = []
        for node in path_up(last):
            slots = device_slots_of(node)
            for place in range(node.n_pages - 1, -1, -1):
                if len(found) == n_pages:
                    return found
                found.append((node.page_hashes[place], slots[place * size : (place + 1) * size]))
        return found

    def _took(self, completion: Completion[Taking | Bringing]) -> None:
        job = completion.job
        if isinstance(job, Bringing):
            return
        self._context.forest.unpin(job.last, Tier.DEVICE)
        self._taken.difference_update(job.names)
        self._moved(Tier.DEVICE, Tier.HOST, completion.n_done, completion.seconds)
        for place, (name, page) in enumerate(zip(job.names, job.host_pages.tolist(), strict=True)):
            if place >= completion.n_done:
                self.table.give_back(page)
            elif self.table.keep(page, name) and job.is_lasting:
                self._files.offer(name)

    def _moved(self, source: Tier, target: Tier, n_pages: int, seconds: float) -> None:
        n_bytes = n_pages * self._page_bytes
        self._context.observer.transferred(source, target, 0, n_bytes, seconds)

    # -- giving them back ---------------------------------------------------------------------

    def promise(self, rid: str, path: Sequence[Node], device: int, usable: int) -> tuple[int, int]:
        """See `Places.promise`."""
        self._let_go(rid)
        n_device, n_usable = device // self._page_size, usable // self._page_size
        if not self.hollow and n_device == n_usable:
            return device, usable
        names = names_along(path, n_usable)
        on_device = deepest_end(n_device, self.n_back, lambda place: self._is_whole(names[place]))
        is_near = self._near(names, n_device)
        end = deepest_end(n_usable, self.n_back, is_near)
        held = self._held[rid] = []
        for place in range(max(0, end - self.n_back), end):
            if place >= n_device or not self._is_whole(names[place]):
                held.append(self.table.use(names[place]))
                self.table.hold(held[-1])
        return on_device * self._page_size, end * self._page_size

    def _near(self, names: Sequence[PageHash], n_device: int) -> Callable[[int], bool]:
        """Whether the device, which has `n_device` of these pages, or the host has one's rows."""

        def is_near(place: int) -> bool:
            name = names[place]
            return (place < n_device and self._is_whole(name)) or name in self.table

        return is_near

    def _is_whole(self, name: PageHash) -> bool:
        return name not in self.hollow

    def end_promises(self) -> None:
        for rid in list(self._held):
            self._let_go(rid)

    def _let_go(self, rid: str) -> None:
        for page in self._held.pop(rid, ()):
            self.table.let_go(page)

    def bring(self, last: Node) -> bool:
        """See `Places.bring`: the window before the end of `last` is whole, or about to be."""
        lacking = [one for one in self._window(last, self.n_back) if one[0] in self.hollow]
        if any(name not in self.table for name, _ in lacking):
            return False
        if not lacking:
            return True
        pages = np.array([self.table.use(name) for name, _ in lacking], dtype=np.int64)
        slots = torch.cat([slots for _, slots in lacking])
        try:
            self._begin(pages, slots)
        except Exception:
            # No memory, for one thing: whoever counts on it computes.
            logger.exception("Tiered KV: the KV of a window could not be copied to the device.")
            return False
        self.hollow.difference_update(name for name, _ in lacking)
        self._moved(Tier.HOST, Tier.DEVICE, len(lacking), 0.0)
        return True

    def _begin(self, host_pages: PageIds, device_slots: torch.Tensor) -> None:
        """Passes that are launched from now on find the pages there."""
        context = self._context
        newest: list[Point | None] = [None]

        def layer_done(_: int, point: Point | None) -> None:
            newest[0] = point

        after = context.order_after()
        copying = self._copier.begin_to_device(host_pages, device_slots, after, layer_done)
        if copying.error is not None:
            raise copying.error
        if context.hold_passes is None or newest[0] is None:
            copying.finish()
            return
        context.hold_passes(newest[0])
        self._copies.submit(Bringing(copying, device_slots, len(host_pages)))

    def _copy(self, job: Taking | Bringing) -> int:
        if isinstance(job, Bringing):
            job.copying.finish()
        else:
            self._copier.to_host(job.device_slots, job.host_pages, job.after)
        return job.n_pages

    # -- the disk -----------------------------------------------------------------------------

    def wish(self, rid: str) -> None:
        self._files.wish(rid)

    def is_wished(self, rid: str) -> bool:
        return self._files.is_wished(rid)

    def forget_wish(self, rid: str) -> None:
        self._files.forget_wish(rid)

    def has_come(self, rid: str, path: Sequence[Node], device: int, usable: int) -> bool:
        """See `Places.has_come`; what turns out to be damaged is passed over for what is before."""
        if not self._files.is_wished(rid):
            return True
        n_device, n_usable = device // self._page_size, usable // self._page_size
        names = names_along(path, n_usable)
        is_near = self._near(names, n_device)

        def is_there(place: int) -> bool:
            return is_near(place) or self._files.may_have(rid, names[place])

        end = deepest_end(n_usable, self.n_back, is_there)
        window = range(max(0, end - self.n_back), end)
        return self._files.has_come(rid, [names[n] for n in window if not is_near(n)])

    # -- orders -------------------------------------------------------------------------------

    def forget(self, names: Sequence[PageHash]) -> None:
        """See `Beside.forget`."""
        for name in names:
            self._files.take_back(name)
            if name in self.table:
                self.table.drop(name)

    def drop_stored(self, names: Sequence[PageHash]) -> int:
        """See `Beside.drop_stored`."""
        return self._files.drop(names)

    # -- all of them --------------------------------------------------------------------------

    def poll(self) -> None:
        """See `Places.poll`."""
        for completion in self._copies.acknowledge(self._copies.n_ready):
            self._took(completion)
        self._files.poll()
        postponed, self._postponed = self._postponed, []
        for last, is_lasting in postponed:
            if last.parent is not None and last.slots(Tier.DEVICE) is not None:
                self.take(last, is_lasting=is_lasting)

    def settle(self, timeout_s: float) -> None:
        """Waits for the copies between device and host."""
        self._copies.wait(timeout_s)
        self.poll()

    def flush(self) -> None:
        """Empties the host, and forgets what the device has."""
        self.settle(SETTLE_TIMEOUT_S)
        self.end_promises()
        self._files.forget()
        self._postponed.clear()
        self.hollow.clear()
        self.table.clear()

    def check_integrity(self) -> None:
        """Raises IntegrityError."""
        self.table.check_integrity()

    def close(self, timeout_s: float) -> None:
        """See `Places.close`."""
        deadline = time.monotonic() + timeout_s
        self.settle(timeout_s)
        self._files.close(deadline)
        self._copies.close()
