"""Two ways to the disk: past the page cache (O_DIRECT) or through it."""

from __future__ import annotations

import contextlib
import enum
import errno
import logging
import os
from pathlib import Path
from typing import Protocol

from tiered_kv.core.errors import DiskTierError
from tiered_kv.tiers.disk.buffers import AlignedBuffer
from tiered_kv.tiers.disk.io_ops import IoOps
from tiered_kv.tiers.disk.memory_pressure import MemoryPressure
from tiered_kv.tiers.disk.record import BLOCK_BYTES

logger = logging.getLogger(__name__)

PROBE_NAME = "direct-io.probe"
_REFUSALS = frozenset({errno.EINVAL, errno.EOPNOTSUPP})


class IoMode(enum.StrEnum):
    """What the user asked for."""

    AUTO = "auto"
    """Decided from I/O to I/O, see `AdaptivePath`; buffered where there is no direct I/O."""
    DIRECT = "direct"
    BUFFERED = "buffered"


class Reuse(enum.Enum):
    """When the pages of a call will be read from disk next, as far as the caller knows."""

    UNKNOWN = enum.auto()
    """A write counts as LATER; a read as SOON if its pages were read from disk lately before."""
    SOON = enum.auto()
    """Within a minute or so: worth a place in the page cache if memory is plentiful."""
    LATER = enum.auto()
    """Not soon, or the host tier is going to keep the page: a second copy would be wasted."""


class PathPolicy(Protocol):
    """Chooses the path of one I/O; free to answer differently from call to call.

    A page may be written by one path and read by the other: the kernel writes dirty cache pages
    back before a direct read, and drops cached pages after a direct write.
    """

    def use_direct(self, reuse: Reuse) -> bool: ...

    def last_direct(self, reuse: Reuse) -> bool:
        """What `use_direct` said last, for whoever watches: it looks at nothing anew."""
        ...


class FixedPath:
    """Always the same path."""

    def __init__(self, *, direct: bool) -> None:
        self._direct = direct

    def use_direct(self, reuse: Reuse) -> bool:  # noqa: ARG002
        return self._direct

    last_direct = use_direct


class AdaptivePath:
    """Through the page cache when memory is plentiful and reuse is near, past it otherwise.

    After DUAL-BLADE (arXiv 2604.26557). `pressure` brings the hysteresis: the answer for pages
    wanted soon changes at most every few seconds.
    """

    def __init__(self, pressure: MemoryPressure) -> None:
        self._pressure = pressure

    def use_direct(self, reuse: Reuse) -> bool:
        return reuse is not Reuse.SOON or not self._pressure.is_plentiful()

    def last_direct(self, reuse: Reuse) -> bool:
        return reuse is not Reuse.SOON or not self._pressure.was_plentiful()


class IoPaths:
    """The path of each I/O of one store: what its policy says, while the file system lets it.

    Some file systems accept O_DIRECT when a file is opened and refuse it when data moves, or ask
    for another alignment: who is refused goes through the page cache, from then on.
    """

    def __init__(self, policy: PathPolicy, directory: Path, *, has_direct: bool) -> None:
        self.policy = policy
        self.has_direct = has_direct
        """Can direct I/O be used at all, as far as is known?"""
        self._directory = directory

    def use_direct(self, reuse: Reuse) -> bool:
        return self.has_direct and self.policy.use_direct(reuse)

    def last_direct(self, reuse: Reuse) -> bool:
        """As `PathPolicy.last_direct`."""
        return self.has_direct and self.policy.last_direct(reuse)

    def is_refusal(self, error: OSError) -> bool:
        """Is this what a file system says that has no direct I/O? Then there is none any more."""
        if error.errno not in _REFUSALS:
            return False
        if self.has_direct:
            self.has_direct = False
            logger.warning(
                "Disk tier %s: the file system refuses direct I/O (%s); the page cache is used.",
                self._directory,
                error,
            )
        return True


def choose_path(
    directory: Path, io_ops: IoOps, *, mode: IoMode, pressure: MemoryPressure | None = None
) -> IoPaths:
    """The paths for this mode. Raises DiskTierError if direct I/O is demanded and there is none."""
    supported = _supports_direct_io(directory, io_ops)
    if mode is IoMode.DIRECT and not supported:
        raise DiskTierError(
            f"The file system of {directory} does not support direct I/O: leave the choice to the "
            "disk tier (auto) or use another directory."
        )
    if mode is IoMode.AUTO and supported:
        policy: PathPolicy = AdaptivePath(pressure or MemoryPressure())
    else:
        policy = FixedPath(direct=mode is IoMode.DIRECT)
    return IoPaths(policy, directory, has_direct=supported)


def _supports_direct_io(directory: Path, io_ops: IoOps) -> bool:
    """False only if the file system says so: a full or read-only one cannot be asked like this."""
    path = directory / PROBE_NAME
    block = AlignedBuffer(BLOCK_BYTES).view
    fd = -1
    try:
        fd = io_ops.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_DIRECT)
        return (
            io_ops.pwritev(fd, [block], 0) == BLOCK_BYTES
            and io_ops.preadv(fd, [block], 0) == BLOCK_BYTES
        )
    except OSError as error:
        return error.errno not in _REFUSALS
    finally:
        if fd >= 0:
            io_ops.close(fd)
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
