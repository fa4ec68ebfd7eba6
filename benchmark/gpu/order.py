"""The order checker's histories (docs/overlap.md) on streams that really run.

On a GPU, its own; on a CPU, threads. A few are played with a wait left out, to see that what is
wrong shows on this device.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from benchmark.gpu.record import Record
from benchmark.gpu.setting import Setting
from support_tiers.real_rig import run_real_history
from support_tiers.real_streams import CudaMachine, Machine, ThreadMachine
from support_tiers.stream_double import Removed
from tiered_kv.tiers.streams import Wait

PATHS = ("dma", "kernel")
#: Seconds for histories with all waits, and with each of the waits that are left out.
HISTORIES_S, WITHOUT_S = 7.0, 1.0
SMALL_HISTORIES_S, SMALL_WITHOUT_S = 2.0, 1.0
#: None of these makes a kernel go by indices that never came.
LEFT_OUT = (
    Removed(Wait.LAYER_FOR_LOAD),
    Removed(Wait.WRITE_FOR_LAUNCHED, of="forward"),
    Removed(Wait.WRITTEN),
)


def measure(setting: Setting, notes: Record) -> dict[str, Any]:
    """How many histories went well; after how many a wait that is missing was seen."""
    # Copies that fail are part of the histories.
    logging.disable(logging.CRITICAL)
    machine: Machine = CudaMachine() if setting.on_gpu else ThreadMachine()
    found: dict[str, Any] = {"histories": dict.fromkeys(PATHS, 0), "left_out": {}}
    deadline_s = time.monotonic() + (SMALL_HISTORIES_S if setting.is_small else HISTORIES_S)
    seed = 0
    while time.monotonic() < deadline_s or seed == 0:
        for path in PATHS:
            run_real_history(machine, seed, path=path)
            found["histories"][path] += 1
        seed += 1
        notes.so_far(found)
    for removed in LEFT_OUT:
        seconds = SMALL_WITHOUT_S if setting.is_small else WITHOUT_S
        found["left_out"][str(removed)] = seen_after(machine, removed, seconds)
        notes.so_far(found)
    machine.close()
    return found


def seen_after(machine: Machine, removed: Removed, seconds: float) -> int | None:
    """After how many histories without that wait something was wrong; None: not in that time."""
    deadline_s, seed = time.monotonic() + seconds, 0
    while time.monotonic() < deadline_s:
        try:
            run_real_history(machine, seed, removed)
        except AssertionError:
            return seed + 1
        seed += 1
    return None
