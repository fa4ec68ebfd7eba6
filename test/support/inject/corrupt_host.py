"""Host -> device copies that deliver wrong bytes.

The negative control of the comparisons with plain SGLang: if pages that come back from the host
are wrong, they must fail.
"""

from __future__ import annotations

from typing import Any

from when import is_broken

TARGET = "tiered_kv.tiers.device"


def inject(module: Any) -> None:
    copier = module.CpuPageCopier
    to_device = copier.to_device

    def corrupted(self: Any, host_pages: Any, *rest: Any) -> None:
        if not is_broken("corrupt_host"):
            to_device(self, host_pages, *rest)
            return
        # The sign bits of every fourth byte: a float32 keeps its size and changes its sign.
        self._host[host_pages, 3::4] ^= 0x80
        try:
            to_device(self, host_pages, *rest)
        finally:
            self._host[host_pages, 3::4] ^= 0x80

    copier.to_device = corrupted
    print("corrupt_host: host -> device copies deliver wrong bytes", flush=True)
