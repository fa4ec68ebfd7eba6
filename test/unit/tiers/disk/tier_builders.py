"""Tiers as servers open them, for the tests of their states."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

import pytest
from disk_builders import (
    NAMESPACE,
    PAGE_BYTES,
    aligned,
    filled,
    page_hash,
    page_payload,
    wait_until,
)

from tiered_kv.tiers.disk import store as store_module
from tiered_kv.tiers.disk.index import PageIndex
from tiered_kv.tiers.disk.tier import DiskTier, TierNamespace

OpenTier = Callable[..., DiskTier]


def pages_of(tier: DiskTier) -> TierNamespace:
    return tier.namespace(NAMESPACE, PAGE_BYTES, "a model")


def write(ns: TierNamespace, seeds: range) -> int:
    return ns.write_pages([page_hash(s) for s in seeds], [filled(s, PAGE_BYTES) for s in seeds])


def read(ns: TierNamespace, seeds: range) -> int:
    buffers = [aligned(PAGE_BYTES) for _ in seeds]
    n_read = ns.read_pages([page_hash(seed) for seed in seeds], buffers)
    for seed, buffer in zip(seeds[:n_read], buffers, strict=False):
        assert buffer == page_payload(seed, PAGE_BYTES)
    return n_read


def wait_until_mended(tier: DiskTier) -> None:
    wait_until(lambda: not tier.stats().degraded)


class Disk:
    """Lets the index of stores fail as SQLite says it, until it is mended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.code: int | None = None
        disk = self

        class FailingIndex(PageIndex):
            def _connect(self) -> sqlite3.Connection:
                if disk.code is not None:
                    error = sqlite3.OperationalError("injected")
                    error.sqlite_errorcode = disk.code
                    raise error
                return super()._connect()

        monkeypatch.setattr(store_module, "PageIndex", FailingIndex)
