"""When memory counts as plentiful: samples come from a script, time stands still until moved."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiered_kv.tiers.disk.memory_pressure import (
    CALM_S,
    SAMPLE_S,
    KernelMemory,
    MemoryPressure,
    MemorySample,
)


class Machine:
    """A machine whose memory is told what to say."""

    def __init__(self) -> None:
        self.available_share = 0.5
        self.stalled_us: int | None = 0
        self.is_readable = True
        self.now_s = 1000.0
        self.n_samples = 0
        self.pressure = MemoryPressure(self.sample, lambda: self.now_s)

    def sample(self) -> MemorySample | None:
        self.n_samples += 1
        if not self.is_readable:
            return None
        return MemorySample(self.available_share, self.stalled_us)

    def after(self, seconds: float, stalled_share: float = 0.0) -> bool:
        """The answer after some time in which tasks were stalled for this share of it."""
        if self.stalled_us is not None:
            self.stalled_us += int(seconds * stalled_share * 1e6)
        self.now_s += seconds
        return self.pressure.is_plentiful()


@pytest.fixture
def machine() -> Machine:
    return Machine()


def test_free_memory_and_no_stalls_are_plenty(machine: Machine) -> None:
    assert machine.pressure.is_plentiful()


def test_stalls_end_plenty_at_once_though_much_is_available(machine: Machine) -> None:
    assert machine.after(1.0)
    assert not machine.after(1.0, stalled_share=0.05)


def test_little_memory_ends_plenty_though_nothing_stalls(machine: Machine) -> None:
    assert machine.after(1.0)
    machine.available_share = 0.05
    assert not machine.after(1.0)


def test_plenty_comes_back_only_after_calm(machine: Machine) -> None:
    machine.after(1.0)
    assert not machine.after(1.0, stalled_share=0.05)
    for _ in range(int(CALM_S)):
        assert not machine.after(1.0)
    assert machine.after(1.0)


def test_a_short_stall_starts_the_calm_anew(machine: Machine) -> None:
    machine.after(1.0)
    machine.after(1.0, stalled_share=0.05)
    assert not machine.after(CALM_S - 1)
    assert not machine.after(1.0, stalled_share=0.01)
    assert not machine.after(CALM_S - 1)
    assert not machine.after(2.0)
    assert machine.after(CALM_S)


@pytest.mark.parametrize("was_plentiful", [True, False])
def test_in_between_nothing_changes(machine: Machine, was_plentiful: bool) -> None:
    machine.available_share = 0.5 if was_plentiful else 0.05
    machine.after(1.0)
    machine.available_share = 0.15
    for _ in range(50):
        assert machine.after(1.0, stalled_share=0.01) is was_plentiful


def test_without_psi_available_memory_decides(machine: Machine) -> None:
    machine.stalled_us = None
    assert machine.after(1.0)
    machine.available_share = 0.05
    assert not machine.after(1.0)


def test_what_cannot_be_read_is_not_plenty(machine: Machine) -> None:
    machine.is_readable = False
    assert not machine.after(1.0)


def test_the_kernel_is_asked_seldom(machine: Machine) -> None:
    for _ in range(1000):
        machine.after(SAMPLE_S / 100)
    assert machine.n_samples <= 11


MEMINFO = "MemTotal: 1000 kB\nMemFree: 10 kB\nMemAvailable: 400 kB\nHugePages_Total: 0\n"
PSI = "some avg10=1.00 avg60=0.50 avg300=0.10 total={}\nfull avg10=0.00 avg60=0.00 total=7\n"


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "proc" / "pressure").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text(MEMINFO)
    (tmp_path / "proc" / "pressure" / "memory").write_text(PSI.format(12345))
    return tmp_path / "proc"


def test_reads_the_machine(proc: Path, tmp_path: Path) -> None:
    assert KernelMemory(tmp_path)() == MemorySample(0.4, 12345)


@pytest.mark.parametrize("contents", [None, "", "some avg10=0.00", "full total=3", "some total=x"])
def test_reads_a_kernel_without_psi(proc: Path, tmp_path: Path, contents: str | None) -> None:
    if contents is None:
        (proc / "pressure" / "memory").unlink()
    else:
        (proc / "pressure" / "memory").write_text(contents)
    assert KernelMemory(tmp_path)() == MemorySample(0.4, None)


@pytest.mark.parametrize(("limit", "share"), [("1000", 0.3), ("max", 0.4), ("1000000", 0.4)])
@pytest.mark.parametrize("name", ["", "app.slice"])
def test_a_container_counts_its_own_limit_and_stalls(
    proc: Path, tmp_path: Path, limit: str, share: float, name: str
) -> None:
    """What it has cached of files and not used lately can be had back."""
    (proc / "self").mkdir()
    (proc / "self" / "cgroup").write_text(f"0::/{name}\n")
    group = tmp_path / "sys/fs/cgroup" / name
    group.mkdir(parents=True)
    (group / "memory.max").write_text(limit + "\n")
    (group / "memory.current").write_text("900\n")
    (group / "memory.stat").write_text("anon 600\ninactive_file 200\n")
    (group / "memory.pressure").write_text(PSI.format(99))
    assert KernelMemory(tmp_path)() == MemorySample(share, 99)


@pytest.mark.parametrize("contents", ["", "nonsense", "MemTotal: x kB\n", "MemTotal: 5 kB\n"])
def test_meminfo_that_makes_no_sense(proc: Path, tmp_path: Path, contents: str) -> None:
    (proc / "meminfo").write_text(contents)
    assert KernelMemory(tmp_path)() is None


def test_this_machine_can_be_read() -> None:
    sample = KernelMemory()()
    assert sample is not None
    assert 0.0 < sample.available_share <= 1.0
