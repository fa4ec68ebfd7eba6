"""Gathering, scattering and converting pages: every format against its reference, and bytes/s."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from benchmark.gpu.pools import device_buffers
from benchmark.gpu.setting import NotHereError, Setting
from benchmark.gpu.timing import median_s

#: Quantised values may fall to the neighbouring step where the reference rounds the other way.
LOSSY_STEPS_APART = 0.02


@dataclass(frozen=True)
class Row:
    """One op and format at one size."""

    op: str
    format: str
    backend: str
    pages: int
    token_bytes: float
    """Of the format, scales included."""
    seconds: float
    pool_bytes_per_s: float
    """Bytes of the pool, read or written, per second."""
    share_of_copy: float
    """Against a plain copy of as many bytes within the device."""


def measure(setting: Setting) -> dict[str, Any]:
    """Raises NotHereError where the kernels are not installed."""
    try:
        from sgl_kernel_ext import formats, ops
    except ImportError as error:
        raise NotHereError(f"sgl_kernel_ext is not installed ({error})") from None
    shape, device = setting.shape, setting.device
    n_tokens = max(setting.transfer_tokens)
    n_pages = n_tokens // shape.page_tokens
    buffers = device_buffers(shape, n_tokens, device)
    layers = [layer for layer in range(shape.n_layers) for _ in range(2)]
    roles = [formats.Role.KEY, formats.Role.VALUE] * shape.n_layers
    pages = torch.randperm(n_pages, generator=torch.Generator().manual_seed(2)).to(device)
    copy_speed = plain_copy_bytes_per_s(setting, n_pages * shape.page_bytes)
    rows, correct = [], {}
    for format_ in formats.Format:
        layout = ops.layout_of(format_, shape.page_tokens, buffers, layers, roles)
        pool = ops.PagePool(buffers, layout)
        out = torch.empty((n_pages, layout.page_bytes), dtype=torch.uint8, device=device)
        correct[str(format_)] = agrees_with_reference(setting, buffers, layout)
        for op, work in (
            ("gather", lambda pool=pool, out=out: ops.gather_pages(pool, pages, out)),
            ("scatter", lambda pool=pool, out=out: ops.scatter_pages(pool, pages, out)),
        ):
            seconds = median_s(work, device, setting.repeats)
            speed = n_pages * shape.page_bytes / seconds
            rows.append(
                Row(
                    op=op,
                    format=str(format_),
                    backend=type(pool.backend).__name__,
                    pages=n_pages,
                    token_bytes=layout.token_bytes,
                    seconds=seconds,
                    pool_bytes_per_s=speed,
                    share_of_copy=speed / copy_speed,
                )
            )
    return {
        "shape": shape.name,
        "copy_bytes_per_s": copy_speed,
        "correct": correct,
        "rows": [asdict(row) for row in rows],
    }


def plain_copy_bytes_per_s(setting: Setting, n_bytes: int) -> float:
    source = torch.empty(n_bytes, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    return n_bytes / median_s(lambda: target.copy_(source), setting.device, setting.repeats)


def agrees_with_reference(setting: Setting, buffers: list[torch.Tensor], layout: Any) -> bool:
    """Two pages there and back, on the device and by the slow reference on the CPU.

    Raw must be equal to the bit. Lossy formats may differ where rounding does, in few elements.
    """
    from sgl_kernel_ext import ops, reference

    n_rows = 3 * layout.page_size
    theirs = [buffer[:n_rows].cpu().float().to(buffer.dtype) for buffer in buffers]
    ours = [buffer[:n_rows].clone() for buffer in buffers]
    pages = [2, 0]
    expected = torch.zeros((2, layout.page_bytes), dtype=torch.uint8)
    reference.gather(theirs, layout, pages, expected)
    reference.scatter(theirs, layout, pages, expected)
    pool = ops.PagePool(ours, layout)
    index = torch.tensor(pages, device=setting.device)
    data = torch.zeros((2, layout.page_bytes), dtype=torch.uint8, device=setting.device)
    ops.gather_pages(pool, index, data)
    ops.scatter_pages(pool, index, data)
    pairs = [(a.cpu(), b) for a, b in zip(ours, theirs, strict=True)]
    if not layout.format.is_lossy:
        return all(torch.equal(a, b) for a, b in pairs)
    different = sum(int((~torch.isclose(a, b, rtol=2e-2, atol=2e-3)).sum()) for a, b in pairs)
    return different <= LOSSY_STEPS_APART * sum(a.numel() for a, _ in pairs)
