"""Damages the files of a disk tier, as a bad sector or a careless hand would."""

from __future__ import annotations

from pathlib import Path


def flip_bytes(path: Path, every: int, first: int = 0) -> int:
    """Inverts one byte in each stretch of `every` bytes; returns how many."""
    n_flipped = 0
    with path.open("r+b") as file:
        for at in range(first, path.stat().st_size, every):
            file.seek(at)
            byte = file.read(1)[0]
            # The rest of a preallocated file: nothing was written there.
            if byte == 0:
                continue
            file.seek(at)
            file.write(bytes([byte ^ 0xFF]))
            n_flipped += 1
    return n_flipped


def damage_segments(disk: Path) -> int:
    """Flips bytes all over every segment file below `disk`; returns how many."""
    files = [path for path in disk.rglob("segments/*") if path.is_file()]
    return sum(flip_bytes(path, every=9973) for path in files)


def damage_index(disk: Path) -> int:
    """Flips bytes in every index below `disk`, the header left alone so that it still opens."""
    return sum(flip_bytes(path, every=61, first=4096) for path in disk.rglob("index.sqlite"))
