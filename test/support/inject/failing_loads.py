"""Host -> device copies that fail while the file in TIERED_KV_TEST_LOAD_FAULT exists."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

TARGET = "tiered_kv.tiers.device"


def inject(module: Any) -> None:
    copier = module.CpuPageCopier
    to_device = copier.to_device
    control = Path(os.environ["TIERED_KV_TEST_LOAD_FAULT"])

    def faulty(self: Any, *args: Any) -> None:
        if control.exists():
            raise OSError("injected: no copy to the device")
        to_device(self, *args)

    copier.to_device = faulty
    print("failing_loads: host -> device copies can be made to fail", flush=True)
