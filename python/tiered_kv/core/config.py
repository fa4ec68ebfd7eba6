"""Configuration as frozen values, one dataclass per subsystem, validated when made.

Every field has a default, and a docstring line below it that says what it is and its unit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from tiered_kv.core.errors import ConfigError

DISK_IO_MODES = ("auto", "direct", "buffered")

DISK_BYTES_DEFAULT = 32 * 10**9
"""What the disk tier takes if no size is given and there is so much room."""

LOAD_POLICIES = ("cost", "always", "never")

PAGE_FORMATS = ("raw", "fp8", "int4", "kitty", "int2")
"""What a tier may keep KV pages in (`sgl_kernel_ext.formats`), the most exact first."""

STORE_WRITES = ("value", "all", "none")
"""What goes to a store that servers share, the default first."""

SAME_FORMAT = "same"
"""The disk tier's format that means the host's."""


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ConfigError(sentence)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostConfig:
    """The host-memory tier."""

    enabled: bool = True
    """False: no host tier; nothing is written through, and disk pages cannot be brought back."""

    size_bytes: int | None = None
    """Bytes of host memory for KV pages on each rank; None derives them from `ratio`."""

    ratio: float = 2.0
    """Host bytes as a multiple of the device pool's bytes; used only if `size_bytes` is None."""

    page_format: str = "raw"
    """What pages are kept in; all but raw lose precision."""

    def __post_init__(self) -> None:
        _require(
            self.size_bytes is None or self.size_bytes > 0,
            f"The host tier's size must be positive, not {self.size_bytes} bytes; "
            "leave it out to derive it from the ratio.",
        )
        _require(
            math.isfinite(self.ratio) and self.ratio > 0,
            f"The host tier's ratio must be a positive number, not {self.ratio}.",
        )
        _require(
            self.page_format in PAGE_FORMATS,
            f"The host tier's format must be one of {', '.join(PAGE_FORMATS)}, not "
            f"{self.page_format!r}.",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskConfig:
    """The disk tier; off unless it is given a directory."""

    directory: Path | None = None
    """Directory that holds the segment files and the index; None switches the disk tier off."""

    size_bytes: int | None = None
    """Most bytes the disk tier may occupy on this machine; None lets the store choose from the free
    space."""

    io_threads: int = 4
    """Threads that read and write segments; two to four saturate a local disk."""

    io_mode: str = "auto"
    """"direct" bypasses the page cache (O_DIRECT), "buffered" uses it, "auto" lets the store decide
    by memory pressure and expected reuse."""

    key_file: Path | None = None
    """File with the key that pages are encrypted with on disk; None stores them as they are."""

    clear_on_start: bool = False
    """True deletes all stored pages when the server starts."""

    page_format: str = SAME_FORMAT
    """What pages are kept in: a format that is at most as exact as the host's, or the same."""

    def __post_init__(self) -> None:
        _require(
            self.size_bytes is None or self.size_bytes > 0,
            f"The disk tier's size must be positive, not {self.size_bytes} bytes; "
            "leave it out to let the store choose.",
        )
        _require(
            self.size_bytes is None or self.directory is not None,
            "The disk tier was given a size but no directory; name a directory or drop the size.",
        )
        _require(
            not self.clear_on_start or self.directory is not None,
            "The disk tier is to be cleared but has no directory; name a directory.",
        )
        _require(
            self.key_file is None or self.directory is not None,
            "The disk tier was given a key file but no directory; name a directory or drop the key "
            "file.",
        )
        _require(
            self.io_mode in DISK_IO_MODES,
            f"The disk tier's I/O mode must be one of {', '.join(DISK_IO_MODES)}, not "
            f"{self.io_mode!r}.",
        )
        _require(
            self.page_format in (SAME_FORMAT, *PAGE_FORMATS),
            f"The disk tier's format must be one of {', '.join((SAME_FORMAT, *PAGE_FORMATS))}, not "
            f"{self.page_format!r}.",
        )
        _require(
            self.page_format == SAME_FORMAT or self.directory is not None,
            f"The disk tier was given the format {self.page_format} but no directory; name a "
            "directory or drop the format.",
        )
        _require(
            1 <= self.io_threads <= 64,
            f"The disk tier needs between 1 and 64 I/O threads, not {self.io_threads}.",
        )

    @property
    def enabled(self) -> bool:
        """Whether there is a disk tier at all."""
        return self.directory is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig:
    """The store that servers share; there is none unless it has an address."""

    address: str | None = None
    """Which it is and where, as `--tiered-kv-store` says it; None: no store."""

    writes: str = STORE_WRITES[0]
    """What is written to it: by value, all, or none."""

    key_file: Path | None = None
    """File with the key that names and pages are protected with; None: that of the environment."""

    encrypts: bool = False
    """Whether pages are encrypted with that key."""

    def __post_init__(self) -> None:
        _require(
            self.writes in STORE_WRITES,
            f"What is written to the store must be one of {', '.join(STORE_WRITES)}, not "
            f"{self.writes!r}.",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryConfig:
    """What the memory manager decides, and how."""

    eviction_policy: str = "lru"
    """Name of a registered eviction policy, used in every tier."""

    protect_expected: bool = True
    """Whether what is forecast to be needed soon is passed over, within a share of the tier."""

    host_enabled: bool = True
    """Whether pages are written through from the device to host memory."""

    disk_enabled: bool = True
    """Whether pages that are in host memory are written through to disk."""

    load_policy: str = "cost"
    """Whether pages in a farther tier are loaded: cost (as many as pay), always or never."""

    store_writes: str = STORE_WRITES[0]
    """Which pages in host memory are written to the store that servers share."""

    def __post_init__(self) -> None:
        _require(
            self.load_policy in LOAD_POLICIES,
            f"The load policy must be one of {', '.join(LOAD_POLICIES)}, not {self.load_policy!r}.",
        )
        _require(
            bool(self.eviction_policy),
            "The eviction policy's name must not be empty; use lru.",
        )
        _require(
            self.host_enabled or not self.disk_enabled,
            "The disk tier is reached through host memory; enable the host tier or disable disk.",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TieredKVConfig:
    """Everything that this project can be told."""

    page_size: int = 64
    """Tokens per page, the unit of keys and of transfers."""

    host: HostConfig = field(default_factory=HostConfig)
    """The host-memory tier."""

    disk: DiskConfig = field(default_factory=DiskConfig)
    """The disk tier."""

    store: StoreConfig = field(default_factory=StoreConfig)
    """The store that servers share."""

    eviction_policy: str = "lru"
    """Name of a registered eviction policy, used in every tier."""

    load_policy: str = "cost"
    """Whether pages in a farther tier are loaded: cost (as many as pay), always or never."""

    def __post_init__(self) -> None:
        _require(
            self.page_size > 0, f"The page size must be at least 1 token, not {self.page_size}."
        )
        _require(
            self.host.enabled or not self.disk.enabled,
            "The disk tier is reached through host memory; enable the host tier or disable disk.",
        )
        host, disk = self.host.page_format, self.disk_page_format
        _require(
            PAGE_FORMATS.index(disk) >= PAGE_FORMATS.index(host),
            f"The disk tier cannot keep pages in {disk} if the host tier keeps them in {host}: "
            f"they pass through the host, and what {host} has lost stays lost; give the disk tier "
            f"{host} or a smaller format, or the host tier {disk}.",
        )

    @property
    def disk_page_format(self) -> str:
        """What the disk tier keeps pages in."""
        named = self.disk.page_format
        return self.host.page_format if named == SAME_FORMAT else named

    @property
    def memory(self) -> MemoryConfig:
        """What the memory manager needs to know of all this."""
        return MemoryConfig(
            eviction_policy=self.eviction_policy,
            host_enabled=self.host.enabled,
            disk_enabled=self.disk.enabled,
            load_policy=self.load_policy,
            store_writes=self.store.writes,
        )
