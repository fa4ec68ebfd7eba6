"""Modules that Python processes find ahead of all others."""

from __future__ import annotations

import os
from pathlib import Path


def ahead_on_path(folder: Path) -> str:
    """PYTHONPATH with `folder` ahead of what this process was given."""
    return os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
