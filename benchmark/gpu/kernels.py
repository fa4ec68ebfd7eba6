"""Gathering, scattering and converting pages: every format against its reference, and bytes/s.

The rates are those of benchmark/micro/kernels.py, with rows on the device and in pinned memory.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

import torch

from benchmark.gpu.record import Record
from benchmark.gpu.setting import NotHereError, Setting

#: Quantised elements may fall to the next step where the reference rounds the other way.
APART_MAX = 0.02
#: The reference takes half a second a layer and format on a CPU core for these: of so many layers.
SLOW_TO_CHECK, CHECKED_LAYERS = ("int4", "int2", "kitty"), 2
#: Where rows lie while the rates are measured.
ON_DEVICE, PINNED = "device", "pinned host"


def measure(setting: Setting, notes: Record) -> dict[str, Any]:
    """Every format against its reference; rates of those that are used most, rows on the device.

    Raises NotHereError where the kernels are not installed.
    """
    return rates_of(setting, notes, ("raw", "fp8"), (ON_DEVICE,), checks=True)


def more(setting: Setting, notes: Record) -> dict[str, Any]:
    """Rates of all formats, rows in pinned memory as well where there is a GPU."""
    places = (ON_DEVICE, PINNED) if setting.on_gpu else (ON_DEVICE,)
    return rates_of(setting, notes, None, places, checks=False)


def rates_of(
    setting: Setting,
    notes: Record,
    names: tuple[str, ...] | None,
    places: tuple[str, ...],
    *,
    checks: bool,
) -> dict[str, Any]:
    """names: of formats, all by default."""
    try:
        from benchmark.micro import kernels
        from sgl_kernel_ext.formats import Format
    except ImportError as error:
        raise NotHereError(f"sgl_kernel_ext is not installed ({error})") from None
    formats = [format_ for format_ in Format if names is None or str(format_) in names]
    found: dict[str, Any] = {"shape": setting.shape.name, "correct": {}, "rows": []}
    for place in places:
        options = options_for(setting)
        options.pinned = place == PINNED
        bench = kernels.Bench(options)
        for format_ in Format if checks else ():
            is_right = agrees_with_reference(setting, *to_check(bench, format_))
            found["correct"][str(format_)] = is_right
            notes.so_far(found)
        for result in kernels.measure(bench, formats, options.turns):
            found["rows"].append({"place": place, **asdict(result)})
        notes.so_far(found)
    return found


def options_for(setting: Setting) -> argparse.Namespace:
    sizes = {"page_size": 16, "pages": 2, "turns": 2, "pool": "demo"}
    if not setting.is_small:
        sizes = {"page_size": 64, "pages": 64, "turns": 9, "pool": "llama-8b"}
    return argparse.Namespace(device=setting.device.type, **sizes)


def to_check(bench: Any, format_: Any) -> tuple[list[torch.Tensor], Any]:
    """The buffers, and the layout of a page of them."""
    from sgl_kernel_ext.formats import Role
    from sgl_kernel_ext.ops import layout_of

    if str(format_) not in SLOW_TO_CHECK:
        return bench.buffers, bench.layout(format_)
    buffers = bench.buffers[: 2 * CHECKED_LAYERS]
    layers = [layer for layer in range(CHECKED_LAYERS) for _ in range(2)]
    roles = [Role.KEY, Role.VALUE] * CHECKED_LAYERS
    return buffers, layout_of(format_, bench.page_size, buffers, layers, roles)


def agrees_with_reference(setting: Setting, buffers: list[torch.Tensor], layout: Any) -> bool:
    """Two pages there and back, on the device and by the slow reference on the CPU.

    Raw must be equal to the bit. Lossy formats may differ where rounding does, in few elements.
    """
    from sgl_kernel_ext import ops, reference

    n_rows = 3 * layout.page_size
    expected = [buffer[:n_rows].cpu() for buffer in buffers]
    found = [buffer[:n_rows].clone() for buffer in buffers]
    pages = [2, 0]
    data = torch.zeros((2, layout.page_bytes), dtype=torch.uint8)
    reference.gather(expected, layout, pages, data)
    reference.scatter(expected, layout, pages, data)
    pool = ops.PagePool(found, layout)
    index = torch.tensor(pages, device=setting.device)
    on_device = torch.zeros_like(data, device=setting.device)
    ops.gather_pages(pool, index, on_device)
    ops.scatter_pages(pool, index, on_device)
    pairs = [(a.cpu(), b) for a, b in zip(found, expected, strict=True)]
    if not layout.format.is_lossy:
        return all(torch.equal(a, b) for a, b in pairs)
    apart = sum(int((~torch.isclose(a, b, rtol=2e-2, atol=2e-3)).sum()) for a, b in pairs)
    return apart <= APART_MAX * sum(a.numel() for a, _ in pairs)
