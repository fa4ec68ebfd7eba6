"""Steps for gpu_check's own tests: what can become of one."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

from benchmark.gpu.record import Record
from benchmark.gpu.setting import NotHereError, Setting


def works(setting: Setting, notes: Record) -> dict[str, Any]:
    print("all is well")
    return {"answer": 42, "is_small": setting.is_small}


def fails(setting: Setting, notes: Record) -> dict[str, Any]:
    notes.so_far({"rows": [1]})
    print("the first line of many")
    raise RuntimeError("kernels do not launch here")


def dies(setting: Setting, notes: Record) -> dict[str, Any]:
    """As a process does that an illegal access ends."""
    import os

    os.abort()


def hangs(setting: Setting, notes: Record) -> dict[str, Any]:
    """With a server that is in a session of its own, as servers are."""
    child = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True
    )
    notes.so_far({"child": child.pid})
    while True:
        try:
            time.sleep(600)
        except KeyboardInterrupt:
            print("does not leave")


def is_elsewhere(setting: Setting, notes: Record) -> dict[str, Any]:
    raise NotHereError("there is no such device")


def lacks(setting: Setting, notes: Record) -> dict[str, Any]:
    import no_such_package  # type: ignore[import-not-found]  # noqa: F401

    return {}
