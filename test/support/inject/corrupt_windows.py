"""KV of layers with a window that comes back to the device with wrong bytes.

The negative control of the comparisons with plain SGLang: if windows are wrong, they must fail.
"""

from __future__ import annotations

from typing import Any

from when import is_broken

TARGET = "tiered_kv.tiers.windows"


def inject(module: Any) -> None:
    windows = module.WindowPages
    begin = windows._begin

    def corrupted(self: Any, host_pages: Any, device_slots: Any) -> None:
        if not is_broken("corrupt_windows"):
            begin(self, host_pages, device_slots)
            return
        # The sign bits of every float32.
        self._pages[host_pages, 3::4] ^= 0x80
        try:
            begin(self, host_pages, device_slots)
        finally:
            self._pages[host_pages, 3::4] ^= 0x80

    windows._begin = corrupted
    print("corrupt_windows: windows come back with wrong bytes", flush=True)
