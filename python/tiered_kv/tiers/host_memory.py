"""Memory as copies to and from a GPU like it: in huge pages, near the GPU, there before it is used.

Pinning memory that has never been touched would fault it in page by page, on one thread.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import logging
import mmap
import os
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

logger = logging.getLogger(__name__)

HUGE_PAGE_BYTES = 2 << 20
#: More threads than that are not faster: they wait for the same memory.
THREADS_MAX = 16
#: What a thread faults in at a time.
STRETCH_BYTES = 256 << 20
#: Since Linux 5.14; Python's mmap has no name for it.
_MADV_POPULATE_WRITE = 23
_MPOL_PREFERRED = 1
_MBIND = {"x86_64": 237, "aarch64": 235}


def map_private(n_bytes: int) -> npt.NDArray[np.uint8]:
    """(n_bytes,) of zeros in memory of this process alone, from a multiple of a huge page on."""
    mapping = mmap.mmap(-1, n_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole: npt.NDArray[np.uint8] = np.frombuffer(mapping, dtype=np.uint8)
    start = -whole.ctypes.data % HUGE_PAGE_BYTES
    return whole[start : start + n_bytes]


def prepare(address: int, n_bytes: int, numa_node: int | None = None) -> None:
    """Faults memory in, on several threads, with whatever is in it.

    In huge pages and on the NUMA node as far as the system gives them. A child process will not
    have it: else the parent's next write to a page that is being copied would go to another one.
    Raises OSError if there is not enough.
    """
    if numa_node is not None and not _prefer(address, n_bytes, numa_node):
        logger.warning("Tiered KV: host memory cannot be placed on NUMA node %d.", numa_node)
    for advice in (mmap.MADV_HUGEPAGE, mmap.MADV_DONTFORK):
        # Without huge pages it works as well.
        _advise(address, n_bytes, advice)
    stretches = [
        (address + at, min(STRETCH_BYTES, n_bytes - at)) for at in range(0, n_bytes, STRETCH_BYTES)
    ]
    with ThreadPoolExecutor(min(THREADS_MAX, os.cpu_count() or 1)) as threads:
        list(threads.map(_fault_in, *zip(*stretches, strict=True)))


def numa_node_of(pci_address: str, root: Path = Path("/")) -> int | None:
    """The node of the device "0000:1b:00.0"; None where there is only one, or nobody knows."""
    try:
        node = int((root / "sys/bus/pci/devices" / pci_address / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return None if node < 0 else node


def _fault_in(address: int, n_bytes: int) -> None:
    error = _advise(address, n_bytes, _MADV_POPULATE_WRITE)
    if error == errno.EINVAL:
        # An older kernel. Read and write back: there may be something in it.
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * n_bytes).from_address(address))
        memory[:: mmap.PAGESIZE] |= 0
    elif error:
        raise OSError(error, os.strerror(error))


def _advise(address: int, n_bytes: int, advice: int) -> int:
    """0, or an errno. (Python's own call keeps the interpreter's lock.)"""
    return 0 if _libc().madvise(address, n_bytes, advice) == 0 else ctypes.get_errno()


def _prefer(address: int, n_bytes: int, numa_node: int) -> bool:
    number = _MBIND.get(platform.machine())
    if number is None or numa_node >= 64:
        return False
    nodes = ctypes.c_uint64(1 << numa_node)
    call: Callable[..., int] = _libc().syscall
    arguments = (number, address, n_bytes, _MPOL_PREFERRED, ctypes.addressof(nodes), 65, 0)
    return call(*map(ctypes.c_long, arguments)) == 0


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
