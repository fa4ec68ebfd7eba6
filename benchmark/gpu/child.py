"""One step in a process of its own: python -m benchmark.gpu.child STEP OUT DEVICE [--small]"""

from __future__ import annotations

import importlib
import signal
import sys
import time
from pathlib import Path
from types import FrameType

import torch

from benchmark.gpu import record
from benchmark.gpu.plan import STEPS
from benchmark.gpu.setting import NotHereError, Setting, device_name


def leave(number: int, frame: FrameType | None) -> None:
    """Out of whatever runs, so that servers are stopped on the way."""
    del number, frame
    raise KeyboardInterrupt


def main() -> int:
    name, folder, device = sys.argv[1], Path(sys.argv[2]), torch.device(sys.argv[3])
    is_small = "--small" in sys.argv[4:]
    signal.signal(signal.SIGTERM, leave)
    (step,) = (step for step in STEPS if step.name == name)
    setting = Setting(device, is_small, folder)
    notes = record.Record(folder / f"{name}.json", name, device_name(device), is_small)
    began_s = time.monotonic()

    def seconds() -> float:
        return round(time.monotonic() - began_s, 1)

    module, _, function = step.function.partition(":")
    try:
        measure = getattr(importlib.import_module(f"benchmark.gpu.{module}"), function)
        result = measure(setting, notes)
    except ModuleNotFoundError as missing:
        notes.write(record.NOT_HERE, reason=f"{missing.name} is not installed", seconds=seconds())
        return 0
    except NotHereError as missing:
        notes.write(record.NOT_HERE, reason=str(missing), seconds=seconds())
        return 0
    notes.write(record.DONE, result=result, seconds=seconds())
    return 0


if __name__ == "__main__":
    sys.exit(main())
