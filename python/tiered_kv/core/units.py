"""Byte sizes as people write them."""

from __future__ import annotations

import math
import re

from tiered_kv.core.errors import ConfigError

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

_FACTORS = {
    "": 1,
    "b": 1,
    "k": 10**3,
    "kb": 10**3,
    "kib": KIB,
    "m": 10**6,
    "mb": 10**6,
    "mib": MIB,
    "g": 10**9,
    "gb": 10**9,
    "gib": GIB,
    "t": 10**12,
    "tb": 10**12,
    "tib": TIB,
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-zA-Z]*)\s*")


def parse_bytes(size: str | int | float) -> int:
    """Whole bytes of `size`: a number of bytes, or a text such as "8GB", "512 MiB" or "1.5g".

    K, M, G, T and KB .. TB are powers of 1000; KiB .. TiB are powers of 1024. Fractions of a byte
    are rounded down. Raises ConfigError for anything else, negative and non-finite values included.
    """
    if isinstance(size, int | float) and not isinstance(size, bool):
        if not math.isfinite(size) or size < 0:
            raise ConfigError(f"A size must be a finite number of bytes, at least 0, not {size!r}.")
        return int(size)
    matched = _SIZE.fullmatch(size) if isinstance(size, str) else None
    factor = _FACTORS.get(matched[2].lower()) if matched else None
    if matched is None or factor is None:
        raise ConfigError(
            f"{size!r} is not a size; write bytes or a number with a unit, such as 8GB or 512MiB."
        )
    number = matched[1]
    return int(number) * factor if number.isdigit() else int(float(number) * factor)


def format_bytes(n_bytes: int) -> str:
    """`n_bytes` for people, in powers of 1024 with at most one decimal: "512 B", "1.5 GiB"."""
    size = float(n_bytes)
    units = ["TiB", "GiB", "MiB", "KiB", "B"]
    # 1023.95 would be shown as "1024.0": it belongs to the next unit.
    while len(units) > 1 and abs(size) >= 1023.95:
        size /= 1024
        units.pop()
    return f"{size:.1f}".removesuffix(".0") + f" {units[-1]}"


_SECONDS = {"ms": 1e-3, "": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-z]*)\s*")


def parse_seconds(duration: str) -> float:
    """Seconds of a text such as "500ms", "2s", "30m", "1.5h" or "2". Raises ConfigError."""
    matched = _DURATION.fullmatch(duration)
    factor = _SECONDS.get(matched[2]) if matched else None
    if matched is None or factor is None:
        raise ConfigError(f"{duration!r} is not a time; write for example 500ms, 2s or 30m.")
    return float(matched[1]) * factor
