"""How often a store was cleared, in a file of its own.

Segments say in which generation they were made. What a crash leaves of an older one, between a
clear and the end of the deleting behind it, is never served, even if the index is lost as well.
"""

from __future__ import annotations

import os
from pathlib import Path

from tiered_kv.tiers.disk.io_ops import FILE_MODE

GENERATION_NAME = "GENERATION"
MAX_GENERATION = (1 << 32) - 1


def read_generation(directory: Path) -> int | None:
    """None if the file is damaged: then nobody can tell what was cleared. Raises OSError."""
    try:
        text = (directory / GENERATION_NAME).read_text("ascii")
    except FileNotFoundError:
        return 0
    except ValueError:
        return None
    is_number = text.endswith("\n") and text[:-1].isdecimal()
    return int(text) if is_number and int(text) <= MAX_GENERATION else None


def write_generation(directory: Path, generation: int, *, sync: bool) -> None:
    """In one step: a crash leaves the old number or the new one. Raises OSError."""
    new = directory / f"{GENERATION_NAME}.new"
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, FILE_MODE)
    try:
        os.write(fd, b"%d\n" % generation)
        if sync:
            os.fsync(fd)
    finally:
        os.close(fd)
    new.replace(directory / GENERATION_NAME)
