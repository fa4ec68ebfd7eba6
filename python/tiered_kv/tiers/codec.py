"""Converting pages between formats: from one tier's bytes to another's, on a transfer thread.

The arithmetic is `sgl_kernel_ext`'s, the same for a copy to the device and for one to the disk.
"""

from __future__ import annotations

import threading

import torch

from sgl_kernel_ext.formats import PageLayout
from sgl_kernel_ext.ops import PagePool, gather_pages, scatter_pages

_thread = threading.local()


def use_one_thread() -> None:
    """From now on torch computes on the calling thread alone when that thread calls it.

    For transfer threads: the forward pass has the cores, and a conversion that spread over them
    would stall it in the middle of a layer. OpenMP keeps the number per thread, but torch also
    remembers the last one set for threads to come, so a thread that ends at once sets it back.
    """
    if getattr(_thread, "is_alone", False):
        return
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    restoring = threading.Thread(target=torch.set_num_threads, args=(n_threads,))
    restoring.start()
    restoring.join()
    _thread.is_alone = True


class PageTranscoder:
    """Converts pages from `source` to `target`, two layouts of the same device buffers.

    Through a scratch block in the device's own format, of at most `n_pages` pages: what comes out
    is what a device that held the source's page would have been written down as. Not thread-safe.
    """

    def __init__(self, source: PageLayout, target: PageLayout, n_pages: int) -> None:
        specs = [buffer.spec for buffer in source.buffers]
        if [buffer.spec for buffer in target.buffers] != specs:
            raise ValueError("two layouts of different device buffers cannot be converted")
        self.n_pages = n_pages
        n_slots = n_pages * source.page_size
        scratch = [
            torch.empty(n_slots, s.n_heads, s.head_dim, dtype=getattr(torch, s.dtype))
            for s in specs
        ]
        self._source = PagePool(scratch, source)
        self._target = PagePool(scratch, target)
        self._pages = torch.arange(n_pages)

    def convert(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Converts row i of `source` into row i of `target`: (pages, at least page bytes) of uint8.

        At most `n_pages` rows.
        """
        pages = self._pages[: len(source)]
        scatter_pages(self._source, pages, source)
        gather_pages(self._target, pages, target)
