"""`sglang.Engine`, which keeps the class of its arguments as it was when its module was loaded."""

from __future__ import annotations

import sys
from typing import Any


def loaded_engine() -> Any:
    """The class, or None where its module is not loaded yet: loading it would cost seconds.

    It bound the class of its arguments, where replacing module attributes cannot reach it.
    """
    return getattr(sys.modules.get("sglang.srt.entrypoints.engine"), "Engine", None)
