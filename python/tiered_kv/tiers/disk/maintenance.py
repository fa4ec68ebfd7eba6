"""Looking after a disk tier's directory while no server uses it: inspect, verify, gc, clear."""

from __future__ import annotations

import contextlib
import mmap
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tiered_kv.core.errors import DiskStateError, DiskTierError
from tiered_kv.tiers.alignment import round_up
from tiered_kv.tiers.disk.directory import (
    OtherFormatError,
    OwnerLock,
    erase,
    is_owned,
    prepare_directory,
    read_format,
    read_owner,
    write_format,
)
from tiered_kv.tiers.disk.faults import is_damage, remedy
from tiered_kv.tiers.disk.frozen_index import readable_copy
from tiered_kv.tiers.disk.generation import read_generation
from tiered_kv.tiers.disk.index import INDEX_NAME, stored_meta
from tiered_kv.tiers.disk.index_upkeep import CAPACITY_META
from tiered_kv.tiers.disk.namespace import DiskNamespace
from tiered_kv.tiers.disk.segment_files import segment_paths
from tiered_kv.tiers.disk.shards import bytes_below
from tiered_kv.tiers.disk.store import Access, DiskStore

_CHECK_BYTES = 16 << 20
# Of the segments that were not cleared; 24 bits of a location are the slot.
_PAGES_PER_NAMESPACE = """
SELECT namespace, sum(length(hashes) / 32) FROM runs JOIN segments ON number = location >> 24
WHERE generation = ? GROUP BY namespace"""


@dataclass(frozen=True, slots=True)
class NamespaceReport:
    """What the index says about one namespace."""

    namespace_id: bytes
    description: str
    page_bytes: int
    pages: int


@dataclass(frozen=True, slots=True)
class DirectoryReport:
    """What lies in a disk tier's directory."""

    owner: str | None
    """The process that has it open now, in words."""
    capacity_bytes: int
    """The budget it was opened with last."""
    bytes_on_disk: int
    segments: int
    cipher: str | None
    """What the pages are encrypted with; None if they are not."""
    namespaces: tuple[NamespaceReport, ...]


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """Outcome of reading everything back."""

    pages: int
    bad: int
    dropped: int


def inspect_directory(directory: Path) -> DirectoryReport:
    """What is stored, from the index alone; works beside a running server, and where nothing can be
    written.

    Raises DiskTierError if it is no disk tier's directory or its index is damaged, OSError.
    """
    encryption = read_format(directory)
    counts: dict[int, int] = {}
    namespaces: list[NamespaceReport] = []
    capacity_bytes = 0
    try:
        if (directory / INDEX_NAME).exists():
            with _readable_index(directory) as db:
                counts = dict(db.execute(_PAGES_PER_NAMESPACE, (read_generation(directory),)))
                namespaces = [
                    NamespaceReport(
                        bytes(namespace_id), description, page_bytes, counts.get(number, 0)
                    )
                    for number, namespace_id, page_bytes, description in db.execute(
                        "SELECT number, id, page_bytes, description FROM namespaces ORDER BY number"
                    )
                ]
                capacity_bytes = stored_meta(db, CAPACITY_META) or 0
    except sqlite3.Error as error:
        how = "`verify` rebuilds it" if is_damage(error, at_open=True) else remedy(error)
        raise DiskTierError(f"The index in {directory} cannot be read ({error}): {how}.") from error
    return DirectoryReport(
        owner=read_owner(directory) if is_owned(directory) else None,
        capacity_bytes=capacity_bytes,
        bytes_on_disk=bytes_below(directory),
        segments=len(segment_paths(directory / "segments")),
        cipher=None if encryption is None else encryption.cipher,
        namespaces=tuple(namespaces),
    )


@contextlib.contextmanager
def _readable_index(directory: Path) -> Iterator[sqlite3.Connection]:
    if not is_owned(directory):
        with readable_copy(directory) as db:
            yield db
        return
    uri = f"{(directory / INDEX_NAME).absolute().as_uri()}?mode=ro"
    with contextlib.closing(sqlite3.connect(uri, uri=True)) as db:
        yield db


def open_for_maintenance(
    directory: Path,
    capacity_bytes: int | None = None,
    key: bytes | None = None,
    *,
    read_only: bool = False,
) -> DiskStore:
    """Open an existing directory, by default with the budget it had last.

    read_only: where it cannot be written, to read it is enough. Raises DiskTierError if it is no
    disk tier's directory, a server has it open, or the key is not that of its pages.
    """
    read_format(directory)
    capacity_bytes = capacity_bytes or _last_capacity(directory)
    try:
        return DiskStore.open(directory, capacity_bytes=capacity_bytes, key=key)
    except OtherFormatError:
        raise
    except DiskStateError as error:
        if not read_only:
            raise
        try:
            return DiskStore.open(
                directory, capacity_bytes=capacity_bytes, key=key, access=Access.READ_ONLY
            )
        except DiskStateError:
            raise error from None


def clear_directory(directory: Path) -> None:
    """Delete everything that a disk tier's directory holds; needs no key, and mends any damage.

    Raises DiskTierError if it is not one's, or in use, OSError.
    """
    prepare_directory(directory, read_only=True)
    lock = OwnerLock(directory)
    try:
        encryption, is_readable = None, True
        try:
            encryption = read_format(directory)
        except DiskTierError:
            is_readable = False
        erase(directory)
        if is_readable:
            # It stays a disk tier's directory, with the key it has.
            write_format(directory, encryption)
    finally:
        lock.release()


def verify(
    store: DiskStore, *, repair: bool, on_progress: Callable[[int, int], None]
) -> VerifyReport:
    """Read every page back. `repair` drops the bad ones; without it nothing changes.

    on_progress: called with (pages checked, pages found bad) since the call before.
    """
    pages = bad = dropped = 0
    for namespace in store.namespaces():
        hashes = namespace.hashes()
        per_batch = max(_CHECK_BYTES // namespace.slot_bytes, 1)
        buffers = _make_buffers(namespace, min(per_batch, len(hashes)))
        for start in range(0, len(hashes), per_batch):
            batch = hashes[start : start + per_batch]
            good = namespace.check_pages(batch, buffers[: len(batch)])
            bad_hashes = [h for h, is_good in zip(batch, good, strict=True) if not is_good]
            if repair and bad_hashes:
                dropped += namespace.drop_pages(bad_hashes)
            pages += len(batch)
            bad += len(bad_hashes)
            on_progress(len(batch), len(bad_hashes))
    return VerifyReport(pages, bad, dropped)


def _make_buffers(namespace: DiskNamespace, count: int) -> list[memoryview]:
    if count == 0:
        return []
    memory = memoryview(mmap.mmap(-1, count * namespace.slot_bytes))
    step = namespace.slot_bytes
    return [memory[i * step : (i + 1) * step] for i in range(count)]


def _last_capacity(directory: Path) -> int:
    """The budget of the last run or, if the index has lost it, what is there now and some room."""
    try:
        report = inspect_directory(directory)
        if report.capacity_bytes > 0:
            return report.capacity_bytes
    except DiskTierError:
        pass
    return round_up(bytes_below(directory) * 9 // 8 + (64 << 20))
