"""Which memory the records of one I/O go to or come from, and the loop around the system call."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence

from tiered_kv.tiers.alignment import round_up
from tiered_kv.tiers.disk.buffers import Scratch, is_aligned
from tiered_kv.tiers.disk.record import BLOCK_BYTES, DIGEST_BYTES


class RecordLayout:
    """The buffers of one I/O: per page its header block, then memory for its padded payload.

    A payload goes straight to or from the caller's memory. If it ends inside a block, its tail
    takes the way through a scratch block, so that nothing is written past the caller's view;
    if direct I/O cannot use the caller's memory at all, the whole payload does.
    """

    def __init__(
        self, page_bytes: int, payloads: Sequence[memoryview], scratch: Scratch, *, direct: bool
    ) -> None:
        slot_bytes = round_up(page_bytes)
        self.buffers: list[memoryview] = []
        # Per page: (part of the caller's memory, scratch memory it is copied through).
        self._copies: list[tuple[memoryview, memoryview] | None] = []
        bounced = [direct and not is_aligned(payload) for payload in payloads]
        bounce = scratch.bounce(sum(bounced) * slot_bytes) if any(bounced) else None
        for position, payload in enumerate(payloads):
            self.buffers.append(scratch.header(position))
            if bounced[position]:
                assert bounce is not None
                through, bounce = bounce[:slot_bytes], bounce[slot_bytes:]
                self.buffers.append(through)
                self._copies.append((payload[:page_bytes], through))
            elif len(payload) == slot_bytes:
                self.buffers.append(payload)
                self._copies.append(None)
            else:
                whole = page_bytes & -BLOCK_BYTES
                tail = scratch.tail(position)
                self.buffers += [payload[:whole], tail] if whole else [tail]
                self._copies.append((payload[whole:], tail))

    def copy_in(self, position: int) -> None:
        copy = self._copies[position]
        if copy is not None:
            ours, through = copy
            through[: len(ours)] = ours

    def copy_out(self, position: int) -> None:
        copy = self._copies[position]
        if copy is not None:
            ours, through = copy
            ours[:] = through[: len(ours)]


class SealedLayout:
    """As `RecordLayout`, for payloads that are encrypted on the way: all go through scratch."""

    def __init__(self, page_bytes: int, n_pages: int, scratch: Scratch) -> None:
        slot_bytes = round_up(page_bytes)
        # A cipher puts its tag behind the payload, which may end where the slot does.
        stride = slot_bytes + BLOCK_BYTES
        area = scratch.bounce(n_pages * stride)
        self._sealed_bytes = page_bytes + DIGEST_BYTES
        self._areas = [area[i * stride : (i + 1) * stride] for i in range(n_pages)]
        self.buffers: list[memoryview] = []
        for position, page_area in enumerate(self._areas):
            self.buffers += [scratch.header(position), page_area[:slot_bytes]]

    def sealed(self, position: int) -> memoryview:
        """Where the page's ciphertext and, behind it, its tag are."""
        return self._areas[position][: self._sealed_bytes]


def transfer_all(
    call: Callable[[int, Sequence[memoryview], int], int],
    fd: int,
    buffers: Sequence[memoryview],
    offset: int,
) -> None:
    """Repeat a short read or write until everything went through; OSError if it gets stuck."""
    remaining = list(buffers)
    while remaining:
        done = call(fd, remaining, offset)
        expected = sum(map(len, remaining))
        if done >= expected:
            return
        # Direct I/O can only go on from a block boundary.
        done &= -BLOCK_BYTES
        if done <= 0:
            raise OSError(errno.EIO, f"short transfer, {os.strerror(errno.EIO)}")
        offset += done
        while done >= len(remaining[0]):
            done -= len(remaining[0])
            del remaining[0]
        if done:
            remaining[0] = remaining[0][done:]
