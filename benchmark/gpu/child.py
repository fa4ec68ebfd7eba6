"""One step in a process of its own.

python -m benchmark.gpu.child STEP MODULE:FUNCTION OUT DEVICE [--small]
"""

from __future__ import annotations

import importlib
import signal
import sys
import time
from pathlib import Path
from types import FrameType

import torch

from benchmark.gpu import record
from benchmark.gpu.setting import NotHereError, Setting, device_name


def leave(number: int, frame: FrameType | None) -> None:
    """Out of whatever runs, so that servers are stopped on the way."""
    del number, frame
    raise KeyboardInterrupt


def main() -> int:
    name, path, folder, device = *sys.argv[1:3], Path(sys.argv[3]), torch.device(sys.argv[4])
    is_small = "--small" in sys.argv[5:]
    signal.signal(signal.SIGTERM, leave)
    setting = Setting(device, is_small, folder)
    notes = record.Record(folder / f"{name}.json", name, device_name(device), is_small)
    began_s = time.monotonic()

    def seconds() -> float:
        return round(time.monotonic() - began_s, 1)

    module, _, function = path.partition(":")
    try:
        module = module if "." in module else f"benchmark.gpu.{module}"
        measure = getattr(importlib.import_module(module), function)
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
