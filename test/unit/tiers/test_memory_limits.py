"""What can still be taken, on fabricated trees of /proc and /sys.

All have 64 GiB of which 40 can be had; groups are given in GiB.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from support_tiers.machines import GIB, Machine
from tiered_kv.tiers.memory_limits import available_bytes, memory_limits, own_group_v2


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_without_control_groups_the_machine_decides(machine: Machine) -> None:
    assert machine.available_gib() == 40


def test_v2_without_a_limit(machine: Machine) -> None:
    machine.process_is_in("0::/user.slice/session-1.scope")
    machine.v2("user.slice/session-1.scope", "max", used=20, files=1)
    machine.v2("user.slice", "max", used=50, files=1)
    assert machine.available_gib() == 40


def test_v2_container_with_a_namespace_of_its_own(machine: Machine) -> None:
    """Weights that were read fill the group with page cache, which can be had back."""
    machine.process_is_in("0::/")
    machine.v2("", 6, used=5.5, files=2.5)
    assert machine.available_gib() == 3


def test_v2_container_that_sees_the_machines_groups(machine: Machine) -> None:
    machine.process_is_in("0::/system.slice/docker-abc.scope")
    machine.v2("system.slice/docker-abc.scope", 8, used=2, files=1)
    machine.v2("system.slice/other.scope", 1, used=1, files=0)
    assert machine.available_gib() == 7


def test_v2_a_slice_above_is_the_tightest(machine: Machine) -> None:
    machine.process_is_in("0::/kubepods.slice/pod1.slice/cri-1.scope")
    machine.v2("kubepods.slice/pod1.slice/cri-1.scope", 32, used=4, files=0)
    machine.v2("kubepods.slice/pod1.slice", 12, used=10, files=0.5)
    machine.v2("kubepods.slice", 48, used=20, files=0)
    assert machine.available_gib() == 2.5


def test_v2_a_leaf_without_the_memory_controller(machine: Machine) -> None:
    machine.process_is_in("0::/app.slice/leaf")
    (machine.root / "sys/fs/cgroup/app.slice/leaf").mkdir(parents=True)
    machine.v2("app.slice", 10, used=4, files=0)
    assert machine.available_gib() == 6


def test_v2_a_group_that_is_slowed_down_above_a_mark(machine: Machine) -> None:
    machine.process_is_in("0::/app.slice")
    machine.v2("app.slice", "max", used=4, files=0, high=str(9 * GIB))
    assert machine.available_gib() == 5


def test_v1_container_sees_its_own_group_as_the_mount(machine: Machine) -> None:
    machine.process_is_in("4:cpu,cpuacct:/docker/abc", "3:memory:/docker/abc", "0::/docker/abc")
    machine.v1("", 5, used=4.5, files=2)
    assert machine.available_gib() == 2.5


def test_v1_nested_groups(machine: Machine) -> None:
    machine.process_is_in("9:name=systemd:/", "3:memory:/batch/job7")
    machine.v1("batch/job7", None, used=3, files=0)
    machine.v1("batch", 16, used=12, files=1)
    machine.v1("", None, used=30, files=10)
    assert machine.available_gib() == 5


def test_v1_a_limit_above_that_the_container_does_not_see(machine: Machine) -> None:
    machine.process_is_in("3:memory:/docker/abc")
    machine.v1("", None, used=3, files=0.5, above=4)
    assert machine.available_gib() == 1.5


def test_hybrid_the_empty_hierarchy_of_version_2_limits_nothing(machine: Machine) -> None:
    machine.process_is_in("4:memory:/job", "0::/job")
    (machine.root / "sys/fs/cgroup/unified/job").mkdir(parents=True)
    machine.v1("job", 7, used=1, files=0)
    assert machine.available_gib() == 6


def test_a_group_of_another_namespace_is_not_looked_for_outside(machine: Machine) -> None:
    machine.process_is_in("0::/../sibling")
    machine.v2("", 9, used=1, files=0)
    machine.v2("../sibling", 1, used=1, files=0)
    assert machine.available_gib() == 8


def test_a_group_that_is_full_has_nothing_and_no_less(machine: Machine) -> None:
    machine.process_is_in("0::/")
    machine.v2("", 4, used=4.2, files=0)
    assert machine.available_gib() == 0


@pytest.mark.parametrize("name", ["memory.current", "memory.stat", "memory.max"])
@pytest.mark.parametrize("text", ["", "nonsense\n", "inactive_file\n"])
def test_files_that_make_no_sense_do_no_harm(machine: Machine, name: str, text: str) -> None:
    machine.process_is_in("0::/", "what is this")
    machine.v2("", 6, used=5, files=1)
    (machine.root / "sys/fs/cgroup" / name).write_text(text)
    assert machine.available_gib() == {"memory.stat": 1}.get(name, 40)


@pytest.mark.parametrize("text", ["", "nonsense", "MemTotal: x kB\n", "MemTotal: 5 kB\n"])
def test_a_machine_that_cannot_be_read(machine: Machine, text: str) -> None:
    machine.process_is_in("0::/")
    machine.v2("", 6, used=5, files=1)
    (machine.root / "proc" / "meminfo").write_text(text)
    assert available_bytes(machine.root) is None
    assert memory_limits(machine.root) == []


def test_shares_are_of_what_each_may_use(machine: Machine) -> None:
    machine.process_is_in("0::/")
    machine.v2("", 8, used=6.5, files=0.5)
    assert sorted(limit.available_share for limit in memory_limits(machine.root)) == [0.25, 0.625]


def test_the_own_group_is_where_stalls_are_reported(machine: Machine) -> None:
    groups = machine.root / "sys/fs/cgroup"
    assert own_group_v2(machine.root) == groups
    (groups / "a.slice").mkdir()
    machine.process_is_in("3:memory:/b", "0::/a.slice")
    assert own_group_v2(machine.root) == groups / "a.slice"


def test_this_machine_can_be_read() -> None:
    found = available_bytes()
    assert found is not None
    assert 0 < found <= memory_limits()[0].limit_bytes
