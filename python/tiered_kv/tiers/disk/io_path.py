"""Two ways to the disk: past the page cache (O_DIRECT) or through it."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Protocol

from tiered_kv.core.errors import DiskTierError
from tiered_kv.tiers.disk.buffers import AlignedBuffer
from tiered_kv.tiers.disk.io_ops import IoOps
from tiered_kv.tiers.disk.record import BLOCK_BYTES

_PROBE_NAME = "direct-io.probe"


class PathPolicy(Protocol):
    """Chooses the path of one I/O; free to answer differently from call to call."""

    def use_direct_read(self, n_bytes: int) -> bool: ...

    def use_direct_write(self, n_bytes: int) -> bool: ...


class FixedPath:
    """Always the same path."""

    def __init__(self, *, direct: bool) -> None:
        self._direct = direct

    def use_direct_read(self, n_bytes: int) -> bool:  # noqa: ARG002
        return self._direct

    def use_direct_write(self, n_bytes: int) -> bool:  # noqa: ARG002
        return self._direct


def choose_direct_io(directory: Path, io_ops: IoOps, *, wanted: bool | None) -> bool:
    """True if pages shall bypass the page cache: as wanted, or (None) if the file system can.

    Raises DiskTierError if it is wanted and the file system cannot.
    """
    if wanted is False:
        return False
    supported = _supports_direct_io(directory, io_ops)
    if wanted and not supported:
        raise DiskTierError(
            f"The file system of {directory} does not support direct I/O: leave the choice to the "
            "disk tier (direct_io=None) or use another directory."
        )
    return supported


def _supports_direct_io(directory: Path, io_ops: IoOps) -> bool:
    path = directory / _PROBE_NAME
    block = AlignedBuffer(BLOCK_BYTES).view
    fd = -1
    try:
        fd = io_ops.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_DIRECT)
        return (
            io_ops.pwritev(fd, [block], 0) == BLOCK_BYTES
            and io_ops.preadv(fd, [block], 0) == BLOCK_BYTES
        )
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return False
        raise
    finally:
        if fd >= 0:
            io_ops.close(fd)
        path.unlink(missing_ok=True)
