"""The ops as Triton kernels: one launch for all layers' buffers that are alike."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch

from sgl_kernel_ext.formats import BufferLayout, PageLayout
from sgl_kernel_ext.triton_plan import VECTOR_BYTES, Buffers, plan_launch

if TYPE_CHECKING:
    from sgl_kernel_ext.ops import PageCopy


class AlikeBuffers:
    """Buffers that one launch serves, layer by layer.

    table: (buffers, 2) of int64 on their device: address, and offset in a page; both in bytes.
    """

    def __init__(
        self, buffers: Buffers, members: Sequence[tuple[BufferLayout, torch.Tensor]]
    ) -> None:
        addresses = [buffer.data_ptr() for _, buffer in members]
        offsets = [share.offset for share, _ in members]
        self.buffers = dataclasses.replace(buffers, align=math.gcd(VECTOR_BYTES, *addresses))
        self.layers = [share.spec.layer for share, _ in members]
        self.offsets = offsets
        self.table = torch.tensor(
            list(zip(addresses, offsets, strict=True)), device=members[0][1].device
        )

    def of_layers(self, layers: range) -> slice:
        return slice(
            bisect.bisect_left(self.layers, layers.start),
            bisect.bisect_left(self.layers, layers.stop),
        )


class TritonBackend:
    """See `ops.PagePool` for the arguments."""

    def __init__(self, buffers: Sequence[torch.Tensor], layout: PageLayout) -> None:
        alike: dict[Buffers, list[tuple[BufferLayout, torch.Tensor]]] = {}
        for share, buffer in zip(layout.buffers, buffers, strict=True):
            spec = share.spec.kind(layout.format)
            token, head, channel = buffer.stride()
            key = Buffers(layout.format, layout.page_size, spec, (token, head, channel), 1)
            alike.setdefault(key, []).append((share, buffer))
        self.groups = [AlikeBuffers(key, members) for key, members in alike.items()]
        self._device = buffers[0].device

    def gather(self, copy: PageCopy) -> None:
        self._launch(copy, to_pool=False)

    def scatter(self, copy: PageCopy) -> None:
        self._launch(copy, to_pool=True)

    def _launch(self, copy: PageCopy, *, to_pool: bool) -> None:
        row_stride = copy.data.stride(0)
        start = math.gcd(VECTOR_BYTES, copy.data.data_ptr(), row_stride)
        with on_device(self._device):
            for group in self.groups:
                members = group.of_layers(copy.layers)
                offsets = [offset - copy.first_byte for offset in group.offsets[members]]
                if not offsets:
                    continue
                launch = plan_launch(
                    group.buffers,
                    to_pool=to_pool,
                    has_rows=copy.rows is not None,
                    data_align=math.gcd(start, *offsets),
                )
                grid = (len(copy.pages) * launch.programs_per_page, len(offsets))
                launch.kernel[grid](
                    group.table[members],
                    copy.pages,
                    copy.pages if copy.rows is None else copy.rows,
                    copy.data,
                    row_stride,
                    copy.first_byte,
                    **launch.constants,
                    num_warps=launch.num_warps,
                    enable_fp_fusion=False,
                )


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the pool's."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
