"""Checkpoints of recurrent state that come back to the device with wrong bytes.

The negative control of the comparisons with plain SGLang: if states are wrong, they must fail.
"""

from __future__ import annotations

from typing import Any

TARGET = "tiered_kv.plugin.cache.state_pool"


def inject(module: Any) -> None:
    copier = module.StatePoolCopier
    restore = copier.restore

    def corrupted(self: Any, memory: Any, device_slot: Any) -> None:
        wrong = memory.copy()
        # The sign bits of every float32.
        wrong[3::4] ^= 0x80
        restore(self, wrong, device_slot)

    copier.restore = corrupted
    print("corrupt_states: checkpoints come back with wrong bytes", flush=True)
