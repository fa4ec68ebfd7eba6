"""Host memory is aligned, there, and keeps what is in it: the kernel is asked."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from tiered_kv.tiers import host_memory
from tiered_kv.tiers.host_memory import HUGE_PAGE_BYTES, map_private, numa_node_of, prepare

pytestmark = pytest.mark.timeout(60)

N_BYTES = 6 * HUGE_PAGE_BYTES + 4096 * 3


def n_there(memory: npt.NDArray[np.uint8]) -> int:
    """How many of its pages of 4 KiB are there."""
    n_pages = -(-len(memory) // 4096)
    found = (ctypes.c_uint8 * n_pages)()
    address = ctypes.c_void_p(memory.ctypes.data)
    assert ctypes.CDLL(None).mincore(address, ctypes.c_size_t(len(memory)), found) == 0
    return sum(page & 1 for page in found)


def is_there(memory: npt.NDArray[np.uint8]) -> bool:
    return n_there(memory) * 4096 >= len(memory)


def huge_kb() -> int:
    """Of this process."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))


def test_a_mapping_is_aligned_and_takes_no_memory_yet() -> None:
    memory = map_private(N_BYTES)
    assert memory.shape == (N_BYTES,)
    assert memory.ctypes.data % HUGE_PAGE_BYTES == 0
    assert n_there(memory) == 0
    memory[-1] = 7
    assert memory[0] == 0


def test_prepared_memory_is_there_with_what_was_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "STRETCH_BYTES", HUGE_PAGE_BYTES)
    memory = map_private(N_BYTES)
    memory[5::4096] = 3
    prepare(memory.ctypes.data, N_BYTES)
    assert is_there(memory)
    assert (memory[5::4096] == 3).all()
    assert int(memory.sum()) == 3 * len(memory[5::4096])


def test_in_huge_pages_where_there_are_some() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this machine gives no huge pages")
    memory = map_private(N_BYTES)
    before = huge_kb()
    prepare(memory.ctypes.data, N_BYTES)
    assert (huge_kb() - before) * 1024 >= HUGE_PAGE_BYTES


def test_a_kernel_that_cannot_fault_in_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    advise = host_memory._advise

    def older(address: int, n_bytes: int, advice: int) -> int:
        if advice == host_memory._MADV_POPULATE_WRITE:
            return errno.EINVAL
        return advise(address, n_bytes, advice)

    monkeypatch.setattr(host_memory, "_advise", older)
    memory = map_private(N_BYTES)
    memory[1::4096] = 9
    prepare(memory.ctypes.data, N_BYTES)
    assert is_there(memory)
    assert (memory[1::4096] == 9).all()


def test_without_enough_memory_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        host_memory,
        "_advise",
        lambda *args: errno.ENOMEM if args[2] == host_memory._MADV_POPULATE_WRITE else 0,
    )
    memory = map_private(N_BYTES)
    with pytest.raises(OSError, match="allocate memory"):
        prepare(memory.ctypes.data, N_BYTES)


def test_several_threads_fault_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "STRETCH_BYTES", HUGE_PAGE_BYTES)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    meeting, met = threading.Barrier(2, timeout=10), []
    fault_in = host_memory._fault_in

    def meet(address: int, n_bytes: int) -> None:
        if len(met) < 2:
            met.append(threading.get_ident())
            meeting.wait()
        fault_in(address, n_bytes)

    monkeypatch.setattr(host_memory, "_fault_in", meet)
    memory = map_private(N_BYTES)
    prepare(memory.ctypes.data, N_BYTES)
    assert len(set(met)) == 2
    assert is_there(memory)


def test_a_node_is_preferred_where_there_is_such_a_thing(caplog: pytest.LogCaptureFixture) -> None:
    memory = map_private(N_BYTES)
    prepare(memory.ctypes.data, N_BYTES, numa_node=0)
    assert is_there(memory)
    if not caplog.text:
        start = f"{memory.ctypes.data:x}"
        lines = Path("/proc/self/numa_maps").read_text().splitlines()
        assert any(line.startswith(start) and "prefer" in line for line in lines)


def test_a_node_that_is_not_there_is_no_reason_not_to_start(
    caplog: pytest.LogCaptureFixture,
) -> None:
    memory = map_private(N_BYTES)
    prepare(memory.ctypes.data, N_BYTES, numa_node=63)
    assert is_there(memory)
    assert "cannot be placed on NUMA node 63" in caplog.text


@pytest.mark.parametrize(("text", "node"), [("1\n", 1), ("0\n", 0), ("-1\n", None), ("", None)])
def test_where_a_device_is_attached(tmp_path: Path, text: str, node: int | None) -> None:
    folder = tmp_path / "sys/bus/pci/devices/0000:1b:00.0"
    folder.mkdir(parents=True)
    (folder / "numa_node").write_text(text)
    assert numa_node_of("0000:1b:00.0", tmp_path) == node
    assert numa_node_of("0000:1c:00.0", tmp_path) is None
