"""How much memory can still be taken: what the machine has, and what control groups leave of it.

A process is in one group of version 2, or in one of version 1's memory controller, or in both of
which one has no limits. Limits hold for all groups on the way up to the root; the tightest counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_GROUPS = Path("sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """Bytes that the machine, or a control group, may use in all, and that can still be had.

    What it holds of files and has not used lately counts as available: taking memory drops it.
    """

    limit_bytes: int
    available_bytes: int

    @property
    def available_share(self) -> float:
        return self.available_bytes / max(self.limit_bytes, 1)


def available_bytes(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still take; None if the kernel does not say."""
    return min((limit.available_bytes for limit in memory_limits(root)), default=None)


def memory_limits(root: Path = Path("/")) -> list[MemoryLimit]:
    """The machine's memory and every group's limit that holds for this process, in no order.

    Empty if not even the machine's can be read. `root` has /proc and /sys.
    """
    try:
        meminfo = parse_table((root / "proc/meminfo").read_text())
        machine = MemoryLimit(meminfo["MemTotal:"] * 1024, meminfo["MemAvailable:"] * 1024)
    except (OSError, ValueError, KeyError):
        return []
    paths = _own_groups(root)
    return [machine, *_limits_v2(root, paths), *_limits_v1(root, paths)]


def own_group_v2(root: Path = Path("/")) -> Path:
    """The folder of this process's control group of version 2, which may not exist."""
    return next(_groups_upwards(root / _GROUPS, _own_groups(root).get("")))


def parse_table(text: str) -> dict[str, int]:
    """The first two words of each line. Raises ValueError if a second word is no number."""
    rows = (line.split() for line in text.splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1}


def _own_groups(root: Path) -> dict[str, str]:
    """This process's group by the name of the controller; version 2's has the name ''."""
    groups: dict[str, str] = {}
    try:
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _number, controllers, path = line.split(":", 2)
            groups |= dict.fromkeys(controllers.split(","), path)
    except (OSError, ValueError):
        pass
    return groups


def _groups_upwards(mount: Path, group: str | None) -> Iterator[Path]:
    """The folder of `group` and of all that are above it, `mount` last.

    A container that has no namespace of its own for groups sees the machine's name of its group,
    but its group's folder as the mount itself.
    """
    folder = mount / (group or "").lstrip("/")
    if ".." in folder.parts or not folder.is_dir():
        folder = mount
    while folder != mount:
        yield folder
        folder = folder.parent
    yield mount


def _limits_v2(root: Path, groups: dict[str, str]) -> Iterator[MemoryLimit]:
    for folder in _groups_upwards(root / _GROUPS, groups.get("")):
        # Beyond `high` a group is slowed down until it has shrunk, which is no place to be either.
        limits = [_limit_in(folder / name) for name in ("memory.max", "memory.high")]
        known = [limit for limit in limits if limit is not None]
        if known:
            yield from _what_is_left(
                folder, min(known), usage="memory.current", reclaimable="inactive_file"
            )


def _limits_v1(root: Path, groups: dict[str, str]) -> Iterator[MemoryLimit]:
    for folder in _groups_upwards(root / _GROUPS / "memory", groups.get("memory")):
        limit = _limit_in(folder / "memory.limit_in_bytes")
        if limit is None:
            continue
        try:
            # Covers groups further up that a container does not see.
            stat = parse_table((folder / "memory.stat").read_text())
            limit = min(limit, stat["hierarchical_memory_limit"])
        except (OSError, ValueError, KeyError):
            pass
        yield from _what_is_left(
            folder, limit, usage="memory.usage_in_bytes", reclaimable="total_inactive_file"
        )


def _limit_in(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such controller; or "max", which is no limit
        return None


def _what_is_left(
    folder: Path, limit: int, *, usage: str, reclaimable: str
) -> Iterator[MemoryLimit]:
    """One limit, or none if the group's usage cannot be read."""
    try:
        used = int((folder / usage).read_text())
    except (OSError, ValueError):
        return
    try:
        files = parse_table((folder / "memory.stat").read_text())[reclaimable]
    except (OSError, ValueError, KeyError):
        files = 0
    yield MemoryLimit(limit, min(max(limit - used + files, 0), limit))
