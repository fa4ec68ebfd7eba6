"""Opening: restart, ownership, formats, foreign directories, permissions, too small a budget."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from disk_builders import (
    MIB,
    NAMESPACE,
    PAGE_BYTES,
    page_hash,
    read,
    readable,
    segment_files,
    write,
)

from tiered_kv.core.errors import DiskStateError, DiskTierError
from tiered_kv.tiers.disk.index import PageIndex
from tiered_kv.tiers.disk.index_upkeep import CAPACITY_META
from tiered_kv.tiers.disk.io_path import IoMode
from tiered_kv.tiers.disk.reclaimer import Reclaimer
from tiered_kv.tiers.disk.store import Access, DiskStore

OpenStore = Callable[..., DiskStore]


def test_pages_survive_a_restart(open_store: OpenStore, io_mode: IoMode) -> None:
    store = open_store(io_mode=io_mode)
    write(store.namespace(NAMESPACE, PAGE_BYTES), range(50))
    store.close()
    other = IoMode.BUFFERED if io_mode is IoMode.DIRECT else IoMode.DIRECT
    ns = open_store(io_mode=other).namespace(NAMESPACE, PAGE_BYTES)
    assert ns.count_prefix([page_hash(seed) for seed in range(60)]) == 50
    assert read(ns, range(50)) == 50


def test_filling_goes_on_after_a_restart(open_store: OpenStore, directory: Path) -> None:
    for first in range(0, 40, 10):
        store = open_store()
        ns = store.namespace(NAMESPACE, PAGE_BYTES)
        assert write(ns, range(first, first + 10)) == 10
        assert read(ns, range(first + 10)) == first + 10
        store.close()
    assert len(segment_files(directory)) == 1


def test_order_of_use_survives_a_restart(open_store: OpenStore) -> None:
    """The pages read in the first run are the ones kept when the second runs out of room."""
    store = open_store(capacity_bytes=8 * MIB)
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    for seed in range(150):
        write(ns, [seed])
    kept = [seed for seed in range(150) if ns.contains(page_hash(seed))]
    hot, cold = [kept[0], kept[20]], [kept[1], kept[21]]
    read(ns, hot)
    store.close()
    ns = open_store(capacity_bytes=8 * MIB).namespace(NAMESPACE, PAGE_BYTES)
    for seed in range(200, 200 + len(kept) // 2):
        write(ns, [seed])
    assert readable(ns, hot) == hot
    assert readable(ns, cold) == []


def test_another_owner_is_named(open_store: OpenStore, directory: Path) -> None:
    open_store()
    program = (
        "import sys; from pathlib import Path\n"
        "from tiered_kv.core.errors import DiskStateError, DiskTierError\n"
        "from tiered_kv.tiers.disk.store import DiskStore\n"
        "try:\n"
        "    DiskStore.open(Path(sys.argv[1]), capacity_bytes=1 << 26)\n"
        "except DiskTierError as error:\n"
        "    print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(directory)], capture_output=True, text=True, check=True
    )
    assert f"process {os.getpid()} on " in run.stdout
    assert str(directory) in run.stdout


def test_two_stores_in_one_process(open_store: OpenStore) -> None:
    store = open_store()
    with pytest.raises(DiskTierError, match=f"in use by process {os.getpid()} "):
        open_store()
    store.close()
    open_store()


def test_a_dead_owner_is_no_owner(directory: Path, open_store: OpenStore) -> None:
    program = (
        "import os, sys; from pathlib import Path\n"
        "from tiered_kv.tiers.disk.store import DiskStore\n"
        "DiskStore.open(Path(sys.argv[1]), capacity_bytes=1 << 26)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(directory)], check=False)
    open_store()


def test_newer_version_is_left_alone(open_store: OpenStore, directory: Path) -> None:
    store = open_store()
    write(store.namespace(NAMESPACE, PAGE_BYTES), [1])
    store.close()
    path = directory / "FORMAT"
    contents = json.loads(path.read_text())
    path.write_text(json.dumps({**contents, "version": 99}))
    before = {p: p.stat().st_size for p in directory.rglob("*")}
    with pytest.raises(DiskStateError, match=r"a newer version \(in format 99.*begin anew with"):
        open_store()
    assert {p: p.stat().st_size for p in directory.rglob("*")} == before
    path.write_text(json.dumps(contents))
    assert read(open_store().namespace(NAMESPACE, PAGE_BYTES), [1]) == 1


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        ('{"format": "tiered-kv-disk", "version": 0}', "by an older version (in format 0"),
        ('{"format": "tiered-kv-disk"}', "FORMAT is damaged"),
        ("", "FORMAT is damaged"),
        ("{", "FORMAT is damaged"),
        ("[]", "FORMAT is damaged"),
        ("\x00\x01", "FORMAT is damaged"),
        (None, "has lost its FORMAT file"),
    ],
)
def test_what_nobody_can_read_any_more_makes_way(
    open_store: OpenStore,
    directory: Path,
    contents: str | None,
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = open_store()
    write(store.namespace(NAMESPACE, PAGE_BYTES), range(10))
    store.close()
    if contents is None:
        (directory / "FORMAT").unlink()
    else:
        (directory / "FORMAT").write_text(contents)
    store = open_store()
    assert store.stats().pages == 0
    assert segment_files(directory) == []
    (told,) = caplog.messages
    assert reason in told
    assert "begins anew" in told
    assert write(store.namespace(NAMESPACE, PAGE_BYTES), [1]) == 1
    store.close()
    assert open_store().stats().pages == 1


@pytest.mark.parametrize("contents", ["", '{"format": "something else"}'])
@pytest.mark.parametrize("access", [Access.NORMAL, Access.AFRESH])
def test_format_file_of_somebody_else(
    open_store: OpenStore, directory: Path, contents: str, access: Access
) -> None:
    directory.mkdir()
    (directory / "FORMAT").write_text(contents)
    (directory / "index.sqlite").write_text("theirs")
    with pytest.raises(DiskTierError, match="give the disk tier an empty directory") as caught:
        open_store(access=access)
    assert not isinstance(caught.value, DiskStateError)
    assert (directory / "index.sqlite").read_text() == "theirs"
    assert (directory / "FORMAT").read_text() == contents


def test_foreign_directory_is_refused_and_untouched(open_store: OpenStore, directory: Path) -> None:
    directory.mkdir(mode=0o755)
    (directory / "thesis.txt").write_text("years of work")
    with pytest.raises(DiskTierError, match=r"holds other things \(thesis.txt\)"):
        open_store()
    assert [p.name for p in directory.iterdir()] == ["thesis.txt"]
    assert stat.S_IMODE(directory.stat().st_mode) == 0o755


def test_crash_before_the_format_was_written(open_store: OpenStore, directory: Path) -> None:
    directory.mkdir()
    (directory / "LOCK").touch()
    (directory / "FORMAT.new").write_text("{")
    assert write(open_store().namespace(NAMESPACE, PAGE_BYTES), [1]) == 1


def test_path_that_cannot_be_a_directory(directory: Path, open_store: OpenStore) -> None:
    directory.write_text("a file")
    with pytest.raises(DiskTierError, match="is not a directory"):
        open_store()
    with pytest.raises(DiskTierError, match="name another directory"):
        DiskStore.open(directory / "below", capacity_bytes=64 * MIB)


def test_directory_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(DiskTierError, match="make the directory writable"):
        DiskStore.open(Path("/proc/disk-tier"), capacity_bytes=64 * MIB)
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.geteuid() != 0:  # root may write anywhere
        with pytest.raises(DiskTierError, match="make the directory writable"):
            DiskStore.open(locked / "disk", capacity_bytes=64 * MIB)


def test_direct_io_where_there_is_none(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiered_kv.tiers.disk.io_path._supports_direct_io", lambda *_, **__: False)
    with pytest.raises(DiskTierError, match="does not support direct I/O"):
        open_store(io_mode=IoMode.DIRECT)
    assert not open_store().stats().direct_io


@pytest.mark.parametrize("capacity_bytes", [-1, 0, 1, 100_000])
def test_too_small_for_anything(open_store: OpenStore, capacity_bytes: int) -> None:
    with pytest.raises(DiskTierError, match="too small"):
        open_store(capacity_bytes=capacity_bytes)


def test_too_small_for_the_page_says_how_much_is_needed(open_store: OpenStore) -> None:
    store = open_store(capacity_bytes=2 * MIB)
    with pytest.raises(DiskTierError, match="at least ") as caught:
        store.namespace(NAMESPACE, 1 * MIB)
    store.close()
    needed = int(str(caught.value).split("at least ")[1].split()[0])
    ns = open_store(capacity_bytes=needed).namespace(NAMESPACE, 1 * MIB)
    assert write(ns, [1]) == write(ns, [2]) == write(ns, [3]) == 1
    assert readable(ns, [1, 2, 3]) == [2, 3]


def test_no_threads(open_store: OpenStore) -> None:
    with pytest.raises(DiskTierError, match="at least 1 I/O thread"):
        open_store(io_threads=0)


def test_only_the_owner_may_look(open_store: OpenStore, directory: Path) -> None:
    directory.mkdir(mode=0o777)
    old = os.umask(0)
    try:
        store = open_store()
        ns = store.namespace(NAMESPACE, PAGE_BYTES)
        write(ns, range(3))
        everything = [directory, *directory.rglob("*")]
        modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in everything}
        assert len([p for p in everything if p.suffix == ".seg"]) == 1
        assert "index.sqlite-wal" in modes
        for path in everything:
            assert modes[path.name] == (0o700 if path.is_dir() else 0o600), path
    finally:
        os.umask(old)


def test_many_namespaces_survive(open_store: OpenStore) -> None:
    store = open_store()
    ids = [hashlib.sha256(b"%d" % i).digest() for i in range(5)]
    for i, namespace_id in enumerate(ids):
        write(store.namespace(namespace_id, 4096 * (i + 1), f"model {i}"), range(i + 1))
    store.close()
    store = open_store()
    for i, namespace_id in enumerate(ids):
        ns = store.namespace(namespace_id, 4096 * (i + 1))
        assert len(ns) == i + 1
        assert read(ns, range(i + 1)) == i + 1


@pytest.mark.parametrize("step", ["budget", "shrink"])
def test_a_start_that_fails_leaves_nothing_open(
    open_store: OpenStore, directory: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """It is tried again and again: while the index is told of the budget, or has to shrink."""
    with open_store() as store:
        write(store.namespace(NAMESPACE, PAGE_BYTES), range(500))
    n_threads = threading.active_count()
    set_meta = PageIndex.set_meta

    def fail(*_: object) -> bool:
        error = sqlite3.OperationalError("injected")
        error.sqlite_errorcode = sqlite3.SQLITE_FULL
        raise error

    def set_others(index: PageIndex, name: str, value: int) -> None:
        fail() if name == CAPACITY_META else set_meta(index, name, value)

    with monkeypatch.context() as patches:
        if step == "budget":
            patches.setattr(PageIndex, "set_meta", set_others)
        else:
            patches.setattr(Reclaimer, "shrink", fail)
        # As long as the error is held, so is all that it was raised from.
        with pytest.raises(DiskStateError, match="free some space") as _held:
            open_store()
    still_open = [link.resolve() for link in Path("/proc/self/fd").iterdir()]
    assert not [path for path in still_open if directory in path.parents]
    assert threading.active_count() == n_threads
    assert read(open_store().namespace(NAMESPACE, PAGE_BYTES), range(500)) == 500
