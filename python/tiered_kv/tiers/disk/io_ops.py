"""The system calls of the disk tier, behind one object that tests replace to inject faults."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Sequence
from pathlib import Path

FILE_MODE = 0o600
DIRECTORY_MODE = 0o700

_NO_FALLOCATE = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS})

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]


class IoOps:
    """Plain system calls; every method raises OSError as the kernel reports it."""

    def open(self, path: Path, flags: int) -> int:
        """Open (or create, mode 0600) and return a file descriptor."""
        return os.open(path, flags | os.O_CLOEXEC, FILE_MODE)

    def close(self, fd: int) -> None:
        os.close(fd)

    def size(self, path: Path) -> int:
        """Bytes of a file."""
        return path.stat().st_size

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return os.preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return os.pwritev(fd, buffers, offset)

    def fdatasync(self, fd: int) -> None:
        os.fdatasync(fd)

    def allocate(self, fd: int, n_bytes: int) -> None:
        """Reserve the blocks of a new file, so that a later write cannot find the disk full.

        Where the file system cannot do that, the file gets its size and nothing is reserved.
        """
        try:
            self.fallocate(fd, n_bytes)
        except OSError as error:
            if error.errno not in _NO_FALLOCATE:
                raise
            os.ftruncate(fd, n_bytes)

    def fallocate(self, fd: int, n_bytes: int) -> None:
        # Not os.posix_fallocate: where the kernel says no, glibc writes a byte into every block.
        while _libc.fallocate(fd, 0, 0, n_bytes) != 0:
            code = ctypes.get_errno()
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code))

    def delete(self, path: Path) -> None:
        """Remove a file and give its blocks back now, even while a reader still has it open."""
        with contextlib.suppress(FileNotFoundError):
            os.truncate(path, 0)
            path.unlink()

    def sync_directory(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
