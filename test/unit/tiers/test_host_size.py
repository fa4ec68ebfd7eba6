"""A size that nobody has named starts anywhere and leaves the machine alive; others are kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from support_tiers.machines import GIB, Machine
from tiered_kv.core.errors import ConfigError
from tiered_kv.tiers.host_size import FREE_SHARE, RESERVE_BYTES, host_size
from tiered_kv.tiers.memory_limits import available_bytes

LEAST = 32 << 20


def free(_: Machine) -> None:
    """No control groups."""


def in_v2(machine: Machine) -> None:
    machine.process_is_in("0::/pod")
    machine.v2("pod", 32, used=12, files=4)


def in_v2_below_a_tighter_one(machine: Machine) -> None:
    machine.process_is_in("0::/slice/pod")
    machine.v2("slice", "max", used=100, files=0, high=str(116 * GIB))
    machine.v2("slice/pod", 200, used=5, files=0)


def in_v1(machine: Machine) -> None:
    machine.process_is_in("4:memory:/docker")
    machine.v1("docker", 64, used=14, files=0)


@dataclass(frozen=True)
class Situation:
    total: int
    free: float
    groups: Callable[[Machine], None]
    device: float
    n_ranks: int
    expected: float
    """GiB per rank, the ratio being 2."""


SITUATIONS = {
    "a large host": Situation(2048, 1900, free, 105, 1, 210),
    "a large host, eight ranks": Situation(2048, 1000, free, 105, 8, 1000 * FREE_SHARE / 8),
    "an H200 in a host of 128 GiB": Situation(128, 120, free, 105, 1, 120 * FREE_SHARE),
    "others have taken most of it": Situation(512, 20, free, 50, 1, 20 * FREE_SHARE),
    "a container, groups of version 2": Situation(512, 480, in_v2, 50, 1, 24 * FREE_SHARE),
    "within a tighter group": Situation(512, 480, in_v2_below_a_tighter_one, 50, 2, 6.4),
    "a container, groups of version 1": Situation(512, 480, in_v1, 50, 1, 50 * FREE_SHARE),
    "hardly anything is left": Situation(16, 0.9, free, 4, 1, LEAST / GIB),
}


def size_in(machine: Machine, n_ranks: int, device: float, named: int | None = None) -> int:
    return host_size(
        named_bytes=named,
        wished_bytes=int(2 * device * GIB),
        least_bytes=LEAST,
        free_bytes=available_bytes(machine.root),
        n_ranks=n_ranks,
    )


@pytest.mark.parametrize("name", SITUATIONS)
def test_nobody_has_named_a_size(tmp_path: Path, name: str) -> None:
    situation = SITUATIONS[name]
    machine = Machine(tmp_path, situation.total, situation.free)
    situation.groups(machine)
    size = size_in(machine, situation.n_ranks, situation.device)
    assert size / GIB == pytest.approx(situation.expected, rel=1e-6)
    left = available_bytes(tmp_path)
    assert left is not None
    assert left - size * situation.n_ranks >= min(RESERVE_BYTES, left - LEAST)


@pytest.mark.parametrize("name", SITUATIONS)
def test_a_size_that_was_named_is_taken_or_refused(tmp_path: Path, name: str) -> None:
    situation = SITUATIONS[name]
    machine = Machine(tmp_path, situation.total, situation.free)
    situation.groups(machine)
    there = available_bytes(tmp_path)
    assert there is not None
    most = max(0, there - RESERVE_BYTES) // situation.n_ranks
    assert size_in(machine, situation.n_ranks, situation.device, named=most) == most
    with pytest.raises(ConfigError, match="lower --tiered-kv-host-size, or leave it out"):
        size_in(machine, situation.n_ranks, situation.device, named=most + 1)


def test_a_system_that_does_not_say_is_trusted(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    (tmp_path / "proc/meminfo").unlink()
    assert size_in(machine, 1, 50) == 100 * GIB
    assert size_in(machine, 1, 0.001) == LEAST
    assert size_in(machine, 1, 50, named=7) == 7


def test_the_document_says_what_is_taken(tmp_path: Path) -> None:
    text = (Path(__file__).parents[3] / "docs" / "operations.md").read_text()
    for name, situation in SITUATIONS.items():
        (row,) = (line for line in text.splitlines() if line.startswith(f"| {name} |"))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert float(cells[1]) == situation.total
        assert float(cells[2]) == situation.free
        assert float(cells[4]) == situation.device
        assert int(cells[5]) == situation.n_ranks
        assert float(cells[6]) == pytest.approx(situation.expected, abs=0.05)
