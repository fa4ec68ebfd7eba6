"""Whose a directory is: one server at a time, one key, and shards of as many ranks as it has."""

from __future__ import annotations

import shutil
import sqlite3
import threading
import time
from pathlib import Path

import pytest
from disk_builders import (
    MIB,
    NAMESPACE,
    PAGE_BYTES,
    PATIENCE_S,
    disk_usage,
    filled,
    page_hash,
)
from tier_builders import Disk, OpenTier, pages_of, read, wait_until_mended, write

from tiered_kv.core.errors import DiskStateError, DiskTierError
from tiered_kv.tiers.disk.shards import shard_path
from tiered_kv.tiers.disk.store import DiskStore
from tiered_kv.tiers.disk.tier import DiskTier

KEY, OTHER_KEY = bytes(range(32)), bytes(range(1, 33))


def test_in_use_by_another_server(open_tier: OpenTier) -> None:
    first = open_tier()
    with pytest.raises(DiskTierError, match="is in use by process") as caught:
        open_tier(server="b")
    assert not isinstance(caught.value, DiskStateError)
    assert write(pages_of(first), range(5)) == 5
    first.close(PATIENCE_S)
    assert not open_tier(server="b").stats().degraded


def test_in_use_though_the_number_of_ranks_is_another(open_tier: OpenTier) -> None:
    open_tier(0, 1)
    with pytest.raises(DiskTierError, match="is in use by process"):
        open_tier(0, 2, server="b")


@pytest.mark.parametrize(
    ("key", "new_key", "reason"),
    [
        (None, KEY, "are not encrypted but a key was given"),
        (KEY, None, "are encrypted: give the key file"),
        (KEY, OTHER_KEY, "The key is not the one"),
    ],
)
@pytest.mark.parametrize("is_damaged", [False, True])
def test_key_that_changed(
    directory: Path,
    open_tier: OpenTier,
    key: bytes | None,
    new_key: bytes | None,
    reason: str,
    is_damaged: bool,
) -> None:
    """Refused; with leave to delete what is there it begins anew, whatever else is wrong."""
    tier = open_tier(key=key)
    write(pages_of(tier), range(5))
    tier.close(PATIENCE_S)
    with pytest.raises(DiskTierError, match=reason) as caught:
        open_tier(key=new_key)
    assert not isinstance(caught.value, DiskStateError)
    assert "--tiered-kv-clear-disk" in str(caught.value)
    if is_damaged:
        (shard_path(directory, 0, 1) / "index.sqlite").write_bytes(b"nonsense" * 1000)
    tier = open_tier(key=new_key, afresh=True)
    ns = pages_of(tier)
    assert len(ns) == 0
    assert write(ns, range(5)) == 5
    tier.close(PATIENCE_S)
    assert read(pages_of(open_tier(key=new_key)), range(5)) == 5


def test_afresh_for_good_begins_once(written_shard: Path, open_tier: OpenTier, disk: Disk) -> None:
    """What is to be deleted is not read meanwhile, nor what came after deleted again."""
    disk.code = sqlite3.SQLITE_FULL
    tier = open_tier(afresh=True)
    ns = pages_of(tier)
    assert read(ns, range(20)) == 0
    disk.code = None
    wait_until_mended(tier)
    assert write(ns, range(5)) == 5
    shutil.rmtree(written_shard / "segments")
    time.sleep(0.2)
    assert write(ns, range(5)) == read(ns, range(5)) == 5


def test_clear_does_not_touch_what_is_not_ours(directory: Path, open_tier: OpenTier) -> None:
    shard = shard_path(directory, 0, 1)
    shard.mkdir(parents=True)
    (shard / "thesis.txt").write_text("years of work")
    with pytest.raises(DiskTierError, match=r"holds other things \(thesis.txt\)") as caught:
        open_tier(afresh=True)
    assert not isinstance(caught.value, DiskStateError)
    assert (shard / "thesis.txt").read_text() == "years of work"


def test_path_through_a_file(directory: Path, open_tier: OpenTier) -> None:
    directory.parent.mkdir(exist_ok=True)
    directory.write_text("a file")
    with pytest.raises(DiskTierError, match="name another") as caught:
        open_tier()
    assert not isinstance(caught.value, DiskStateError)


# -- other numbers of ranks


def test_shards_of_another_number_of_ranks_are_deleted(
    directory: Path, written_shard: Path, open_tier: OpenTier, caplog: pytest.LogCaptureFixture
) -> None:
    (directory / "notes.txt").write_text("not ours")
    caplog.clear()
    tiers = [open_tier(rank, 2, server="b") for rank in range(2)]
    (told,) = caplog.messages
    assert "deleted shard-0-of-1 (" in told
    assert "--tp-size" in told
    assert sorted(path.name for path in directory.iterdir()) == [
        "notes.txt", "shard-0-of-2", "shard-1-of-2", "tiered-kv.lock",
    ]  # fmt: skip
    for tier in tiers:
        assert write(pages_of(tier), range(5)) == 5
        tier.close(PATIENCE_S)
    assert not written_shard.exists()


def test_a_shard_in_use_is_not_deleted(directory: Path, open_tier: OpenTier) -> None:
    """As by a release that knows no lock on the whole directory."""
    with (
        DiskStore.open(shard_path(directory, 0, 1), capacity_bytes=64 * MIB),
        pytest.raises(DiskTierError, match="shard-0-of-1 is in use by process"),
    ):
        open_tier(0, 2)
    assert not open_tier(0, 2).stats().degraded


def test_a_directory_of_an_earlier_release_is_used(directory: Path, open_tier: OpenTier) -> None:
    """It has shards and no lock of its own."""
    with DiskStore.open(shard_path(directory, 0, 1), capacity_bytes=64 * MIB) as store:
        ns = store.namespace(NAMESPACE, PAGE_BYTES)
        ns.write_pages([page_hash(1)], [filled(1, PAGE_BYTES)])
    assert read(pages_of(open_tier()), range(1, 2)) == 1


def test_ranks_come_and_go_in_any_order(directory: Path, open_tier: OpenTier) -> None:
    """The directory is the server's for as long as one of its ranks lives."""
    results: dict[int, DiskTier] = {}
    threads = [
        threading.Thread(target=lambda rank=rank: results.update({rank: open_tier(rank, 4)}))
        for rank in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert not any(tier.stats().degraded for tier in results.values())
    for rank in (0, 2, 3):
        results[rank].close(PATIENCE_S)
        with pytest.raises(DiskTierError, match="is in use by process"):
            open_tier(0, 4, server="b")
    results[1].close(PATIENCE_S)
    open_tier(0, 4, server="b")


def test_capacity_is_kept(written_shard: Path, directory: Path, open_tier: OpenTier) -> None:
    """What a server with another number of ranks left does not come on top."""
    tier = open_tier(0, 2, server="b")
    write(pages_of(tier), range(1000))
    assert disk_usage(directory) <= 64 * MIB + 8192
