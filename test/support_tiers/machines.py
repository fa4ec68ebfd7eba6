"""Fabricated trees of /proc and /sys: how much memory a machine has, and who may have it."""

from __future__ import annotations

from pathlib import Path

from tiered_kv.tiers.memory_limits import available_bytes

GIB = 1 << 30
V1_UNLIMITED = (1 << 63) - 4096


class Machine:
    """Sizes are in GiB."""

    def __init__(self, root: Path, total: int = 64, free: float = 40) -> None:
        self.root = root
        (root / "proc" / "self").mkdir(parents=True)
        (root / "sys" / "fs" / "cgroup").mkdir(parents=True)
        (root / "proc" / "meminfo").write_text(
            f"MemTotal: {total << 20} kB\nMemFree: 5 kB\nMemAvailable: {int(free * (1 << 20))} kB\n"
            "HugePages_Total: 0\n"
        )

    def process_is_in(self, *groups: str) -> None:
        (self.root / "proc" / "self" / "cgroup").write_text("".join(f"{g}\n" for g in groups))

    def v2(
        self, path: str, limit: float | str, used: float, files: float, high: str = "max"
    ) -> None:
        self._write(
            path,
            {
                "memory.max": str(int(limit * GIB)) if not isinstance(limit, str) else limit,
                "memory.high": high,
                "memory.current": str(int(used * GIB)),
                "memory.stat": f"anon 1\ninactive_file {int(files * GIB)}\nactive_file 7\n",
            },
        )

    def v1(
        self, path: str, limit: float | None, used: float, files: float, above: float | None = None
    ) -> None:
        own = V1_UNLIMITED if limit is None else int(limit * GIB)
        hierarchical = own if above is None else int(above * GIB)
        self._write(
            f"memory/{path}",
            {
                "memory.limit_in_bytes": str(own),
                "memory.usage_in_bytes": str(int(used * GIB)),
                "memory.stat": f"inactive_file 3\nhierarchical_memory_limit {hierarchical}\n"
                f"total_inactive_file {int(files * GIB)}\n",
            },
        )

    def _write(self, path: str, files: dict[str, str]) -> None:
        folder = self.root / "sys" / "fs" / "cgroup" / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text + "\n")

    def available_gib(self) -> float:
        found = available_bytes(self.root)
        assert found is not None
        return found / GIB
