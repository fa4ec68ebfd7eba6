"""`python -m tiered_kv.disk` on the directory that the server is given, and where nothing may be
written."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from disk_builders import MIB, NAMESPACE, PAGE_BYTES, filled, flip, page_hash, segment_files

from tiered_kv.disk import main
from tiered_kv.tiers.disk.directory import LOCK_NAME
from tiered_kv.tiers.disk.record import BLOCK_BYTES
from tiered_kv.tiers.disk.shards import SERVER_LOCK_NAME, ServerLock, shard_path
from tiered_kv.tiers.disk.store import DiskStore


def fill(shard: Path, n_pages: int, key: bytes | None = None) -> None:
    with DiskStore.open(shard, capacity_bytes=32 * MIB, key=key) as store:
        ns = store.namespace(NAMESPACE, PAGE_BYTES, f"a model of {shard.name}")
        hashes = [page_hash(seed) for seed in range(n_pages)]
        ns.write_pages(hashes, [filled(seed, PAGE_BYTES) for seed in range(n_pages)])


@pytest.fixture
def of_two_ranks(directory: Path) -> Path:
    """What a server of two ranks has left, and one of a single rank before it."""
    lock = ServerLock(directory, 2, "a")
    for rank in range(2):
        fill(shard_path(directory, rank, 2), 10 + rank)
    lock.release()
    fill(shard_path(directory, 0, 1), 7)
    return directory


@pytest.fixture
def server(of_two_ranks: Path) -> Iterator[Path]:
    """The directory while a server has it."""
    lock = ServerLock(of_two_ranks, 2, "b")
    yield of_two_ranks
    lock.release()


def pages_in(shard: Path) -> int:
    with DiskStore.open(shard, capacity_bytes=32 * MIB) as store:
        return store.stats().pages


def test_inspect_shows_every_shard(of_two_ranks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(of_two_ranks)]) == 0
    table = capsys.readouterr().out
    rows = [line.split() for line in table.splitlines() if "a model of" in line]
    assert [(row[-1], row[1]) for row in rows] == [
        ("shard-0-of-1", "7"), ("shard-0-of-2", "10"), ("shard-1-of-2", "11"),
    ]  # fmt: skip
    first, *others = table.split("directory  ")[1:]
    assert "left by a server with another --tp-size or --dp-size" in first
    assert not any("left by" in other for other in others)


def test_inspect_shows_one_shard(of_two_ranks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(of_two_ranks / "shard-1-of-2")]) == 0
    assert capsys.readouterr().out.count("directory  ") == 1


def test_inspect_beside_a_server(server: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with DiskStore.open(shard_path(server, 0, 2), capacity_bytes=32 * MIB) as store:
        ns = store.namespace(NAMESPACE, PAGE_BYTES)
        ns.write_pages([page_hash(99)], [filled(99, PAGE_BYTES)])
        assert main(["inspect", str(server)]) == 0
    table = capsys.readouterr().out
    assert "in use by  process" in table
    assert [line.split()[1] for line in table.splitlines() if "a model of" in line] == [
        "7", "11", "11",
    ]  # fmt: skip


@pytest.mark.parametrize("command", [["verify"], ["gc"], ["clear", "--yes"]])
def test_a_server_keeps_the_tool_off(
    server: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Even of a shard that none of its ranks has open yet."""
    assert main([*command, str(server)]) == 2
    assert "is in use by process" in capsys.readouterr().err
    assert len(segment_files(server / "shard-0-of-1")) == 1


def test_verify_goes_through_all(of_two_ranks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    offset = BLOCK_BYTES + 3 * (BLOCK_BYTES + PAGE_BYTES) + 5000
    flip(segment_files(of_two_ranks / "shard-0-of-2")[0], offset)
    assert main(["verify", str(of_two_ranks)]) == 1
    lines = [line.split(": ")[1] for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "7 pages checked, 0 bad.",
        "10 pages checked, 1 bad (--repair drops them).",
        "11 pages checked, 0 bad.",
    ]


def test_one_shard_that_fails_does_not_keep_the_others_from_their_turn(
    of_two_ranks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contents = json.loads((of_two_ranks / "shard-0-of-2" / "FORMAT").read_text())
    (of_two_ranks / "shard-0-of-2" / "FORMAT").write_text(json.dumps({**contents, "version": 9}))
    assert main(["verify", str(of_two_ranks)]) == 2
    said = capsys.readouterr()
    assert "a newer version" in said.err
    assert "shard-1-of-2: 11 pages checked, 0 bad." in said.out


def test_gc_deletes_what_no_server_will_read(
    of_two_ranks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gc", "--capacity", "20MiB", str(of_two_ranks)]) == 0
    assert "given back" in capsys.readouterr().out
    assert not (of_two_ranks / "shard-0-of-1").exists()
    assert pages_in(of_two_ranks / "shard-1-of-2") == 11


@pytest.mark.parametrize("trouble", [None, "format", "index", "key"])
def test_clear_asks_once_and_mends_anything(
    of_two_ranks: Path, trouble: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = of_two_ranks / "shard-0-of-2"
    if trouble == "format":
        (shard / "FORMAT").write_text('{"format": "tiered-kv-disk", "version": 99}')
    elif trouble == "index":
        (shard / "index.sqlite").write_bytes(b"nonsense" * 1000)
    elif trouble == "key":
        shutil.rmtree(shard)
        fill(shard, 5, key=bytes(32))
    questions = []
    monkeypatch.setattr("builtins.input", lambda question: questions.append(question) or "y")
    assert main(["clear", str(of_two_ranks)]) == 0
    assert len(questions) == 1
    assert list(of_two_ranks.rglob("*.seg")) == []
    if trouble == "key":
        assert main(["inspect", str(shard)]) == 0
    else:
        assert pages_in(shard) == 0


def test_clear_leaves_alone_what_is_not_ours(
    of_two_ranks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = of_two_ranks / "shard-0-of-3"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    assert main(["clear", "--yes", str(of_two_ranks)]) == 2
    assert "holds other things (thesis.txt)" in capsys.readouterr().err
    assert (foreign / "thesis.txt").exists()
    assert pages_in(of_two_ranks / "shard-0-of-2") == 0


def test_neither_a_tier_nor_a_place_for_shards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "precious").write_text("data")
    for place in (tmp_path, tmp_path / "missing", tmp_path / "precious"):
        assert main(["inspect", str(place)]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


# -- where nothing may be written


class NoFilesBeside:
    """A file system as SQLite sees it that is read-only: no file can be made beside the index."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
        connect = sqlite3.connect

        def refuse(database: str, **options: object) -> sqlite3.Connection:
            if str(directory) in str(database) and "immutable=1" not in str(database):
                error = sqlite3.OperationalError("unable to open database file")
                error.sqlite_errorcode = sqlite3.SQLITE_CANTOPEN
                raise error
            return connect(database, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(sqlite3, "connect", refuse)


def test_inspect_where_nothing_can_be_written(
    of_two_ranks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    NoFilesBeside(monkeypatch, of_two_ranks)
    assert main(["inspect", str(of_two_ranks)]) == 0
    assert capsys.readouterr().out.count("a model of") == 3


def test_inspect_after_a_crash_where_nothing_can_be_written(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The index has a log that was never folded into it: a copy of both is looked at."""
    live = directory.parent / "live"
    shutil.rmtree(directory, ignore_errors=True)
    with DiskStore.open(live, capacity_bytes=32 * MIB) as store:
        ns = store.namespace(NAMESPACE, PAGE_BYTES, "a model")
        ns.write_pages([page_hash(seed) for seed in range(5)], [filled(0, PAGE_BYTES)] * 5)
        shutil.copytree(live, directory)
    assert (directory / "index.sqlite-wal").stat().st_size > 0
    (directory / "index.sqlite-shm").unlink()
    before = {path.name: path.stat().st_size for path in directory.iterdir()}
    NoFilesBeside(monkeypatch, directory)
    assert main(["inspect", str(directory)]) == 0
    assert next(r for r in capsys.readouterr().out.splitlines() if "a model" in r).split()[1] == "5"
    assert {path.name: path.stat().st_size for path in directory.iterdir()} == before


def test_a_look_leaves_nothing_behind(of_two_ranks: Path) -> None:
    before = sorted(of_two_ranks.rglob("*"))
    assert main(["inspect", str(of_two_ranks)]) == 0
    assert sorted(of_two_ranks.rglob("*")) == before


def test_verify_reads_where_it_cannot_write(
    of_two_ranks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    NoFilesBeside(monkeypatch, of_two_ranks)
    assert main(["verify", str(of_two_ranks)]) == 0
    assert capsys.readouterr().out.count(" 0 bad.") == 3
    assert main(["verify", "--repair", str(of_two_ranks)]) == 2
    assert "make the directory writable" in capsys.readouterr().err


def test_verify_is_advised_for_damage_only(
    of_two_ranks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = of_two_ranks / "shard-0-of-2"
    (shard / "index.sqlite").write_bytes(b"nonsense" * 1000)
    assert main(["inspect", str(shard)]) == 2
    assert "`verify` rebuilds it" in capsys.readouterr().err
    monkeypatch.setattr("tiered_kv.tiers.disk.maintenance.readable_copy", no_memory)
    assert main(["inspect", str(shard)]) == 2
    assert "free some memory" in capsys.readouterr().err


def no_memory(directory: Path) -> None:
    error = sqlite3.OperationalError("out of memory")
    error.sqlite_errorcode = sqlite3.SQLITE_NOMEM
    raise error


def test_locks_of_a_read_only_directory_can_be_looked_at(
    of_two_ranks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real_open = os.open

    def read_only(path: object, flags: int, *rest: int, **more: int) -> int:
        if str(of_two_ranks) in str(path) and flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(30, "Read-only file system")
        return real_open(path, flags, *rest, **more)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(os, "open", read_only)
    assert main(["inspect", str(of_two_ranks)]) == 0
    assert capsys.readouterr().out.count("in use by  nobody") == 3
    assert (of_two_ranks / SERVER_LOCK_NAME).exists()
    assert (of_two_ranks / "shard-0-of-2" / LOCK_NAME).exists()
