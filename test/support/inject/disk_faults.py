"""System calls of the disk tier that fail as the file in TIERED_KV_TEST_FAULT says, while it does.

The file holds one word, read before every call: see FAULTS; "none", or no file, is no fault.
"""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

TARGET = "tiered_kv.tiers.disk.io_ops"
FAULTS = ("none", "eio_on_write", "disk_full", "eio_on_read", "short_reads", "bit_flips", "stall")
STALL_S = 5.0


def fault() -> str:
    try:
        return Path(os.environ["TIERED_KV_TEST_FAULT"]).read_text().strip()
    except FileNotFoundError:
        return "none"


def inject(module: Any) -> None:
    ops = module.IoOps
    preadv, pwritev, allocate = ops.preadv, ops.pwritev, ops.allocate

    def faulty_preadv(self: Any, fd: int, buffers: Any, offset: int) -> int:
        now = fault()
        if now == "eio_on_read":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if now == "stall":
            time.sleep(STALL_S)
        n_bytes: int = preadv(self, fd, buffers, offset)
        if now == "bit_flips":
            buffers[-1][len(buffers[-1]) // 2] ^= 0x10
        return n_bytes // 2 if now == "short_reads" else n_bytes

    def faulty_pwritev(self: Any, fd: int, buffers: Any, offset: int) -> int:
        now = fault()
        if now in ("eio_on_write", "disk_full"):
            code = errno.EIO if now == "eio_on_write" else errno.ENOSPC
            raise OSError(code, os.strerror(code))
        if now == "stall":
            time.sleep(STALL_S)
        n_bytes: int = pwritev(self, fd, buffers, offset)
        return n_bytes

    def faulty_allocate(self: Any, fd: int, n_bytes: int) -> None:
        if fault() == "disk_full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        allocate(self, fd, n_bytes)

    ops.preadv, ops.pwritev, ops.allocate = faulty_preadv, faulty_pwritev, faulty_allocate
    print("disk_faults: the disk tier's system calls can be made to fail", flush=True)
