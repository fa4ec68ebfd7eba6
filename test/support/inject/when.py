"""When a part is broken: always, or while the folder in TIERED_KV_TEST_FAULTS has its name."""

from __future__ import annotations

import os
from pathlib import Path


def is_broken(fault: str) -> bool:
    folder = os.environ.get("TIERED_KV_TEST_FAULTS")
    return folder is None or (Path(folder) / fault).exists()
