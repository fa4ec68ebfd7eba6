"""The options of the tiers: how large, where, in what format, and what moves between them."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from sglang.srt.arg_groups.arg_utils import NS, A, Arg

from tiered_kv.core.config import (
    LOAD_POLICIES,
    DiskConfig,
    HostConfig,
    StoreConfig,
    TieredKVConfig,
)
from tiered_kv.memory.eviction import eviction_policies
from tiered_kv.plugin.options import values
from tiered_kv.plugin.upstream.current import arguments

_DEFAULTS = TieredKVConfig()
PAGE_SIZE_DEFAULT = _DEFAULTS.page_size


def _size(option: str, text: str) -> str:
    values.size_bytes(option, text)
    return text


def _load_policy(text: str) -> str:
    if text not in LOAD_POLICIES:
        known = ", ".join(LOAD_POLICIES)
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {known}.")
    return text


@dataclasses.dataclass(init=False, repr=False, eq=False, kw_only=True)
class TierArgs:
    """Mixed into `ServerArgs`. `to_config()` gives them as a checked value."""

    if TYPE_CHECKING:  # SGLang's
        page_size: Any

        def store_config(self) -> StoreConfig: ...

    tiered_kv_host_size: A[
        str | None,
        Arg(
            no_cli=True,
            type_parser=values.argument(_size),
            help="Host memory for KV pages on each tensor-parallel rank, for example 8GB, 512MB or "
            "8GiB; a bare number is gigabytes. Overrides --tiered-kv-host-ratio.",
        ),
        NS("memory"),
    ] = None
    tiered_kv_host_ratio: A[
        float,
        Arg(
            no_cli=True,
            type_parser=float,
            help="Host memory for KV pages as a multiple of the device's KV pool. Default: 2.",
        ),
        NS("memory"),
    ] = _DEFAULTS.host.ratio
    tiered_kv_host_format: A[
        str,
        Arg(
            no_cli=True,
            type_parser=values.argument(values.host_format),
            help="What pages are kept in on the host: raw (default), exactly as on the device; or "
            "in fewer bytes, so that the same size holds more pages, at the price of answers that "
            "may differ: fp8 (50%% of bfloat16's), int4 (28%%), kitty (16%%) or int2 (16%%). "
            "docs/formats.md says what each costs.",
        ),
        NS("memory"),
    ] = _DEFAULTS.host.page_format
    tiered_kv_disk_dir: A[
        str | None,
        Arg(
            no_cli=True,
            help="Directory of the disk tier, kept across restarts; 'none' switches the tier off. "
            "Default: tiered_kv/disk under $XDG_CACHE_HOME or ~/.cache.",
        ),
        NS("memory"),
    ] = None
    tiered_kv_disk_size: A[
        str | None,
        Arg(
            no_cli=True,
            type_parser=values.argument(_size),
            help="Most disk space that the tier may take, shared by the ranks of this machine; "
            "written as the host size is. Default: 32GB, but at most 80%% of the free space.",
        ),
        NS("memory"),
    ] = None
    tiered_kv_clear_disk: A[
        bool,
        Arg(no_cli=True, help="Delete all that the disk tier holds at start, whatever its state."),
        NS("memory"),
    ] = False
    tiered_kv_disk_io_threads: A[
        int,
        Arg(no_cli=True, help="Threads that read and write the disk tier, 1 to 64. Default: 4."),
        NS("memory"),
    ] = 4
    tiered_kv_disk_io: A[
        str,
        Arg(
            no_cli=True,
            type_parser=values.argument(values.disk_io_mode),
            help="How the disk tier reads and writes: 'direct' bypasses the page cache (O_DIRECT), "
            "'buffered' uses it, 'auto' uses it for pages wanted again soon while memory is "
            "plentiful. Default: auto.",
        ),
        NS("memory"),
    ] = "auto"
    tiered_kv_disk_key_file: A[
        str | None,
        Arg(
            no_cli=True,
            help="Encrypt the pages on disk with the key in this file: 32 bytes, or 64 hexadecimal "
            "digits; only its owner may have access to it. Default: not encrypted.",
        ),
        NS("memory"),
    ] = None
    tiered_kv_disk_format: A[
        str,
        Arg(
            no_cli=True,
            type_parser=values.argument(values.disk_format),
            help="What pages are kept in on disk: 'same' as on the host (default), or one of the "
            "host's formats that is smaller, converted as pages are written and read. Pages of "
            "one format are never read as another.",
        ),
        NS("memory"),
    ] = "same"
    tiered_kv_eviction_policy: A[
        str,
        Arg(
            no_cli=True,
            type_parser=values.named_in(eviction_policies),
            help="What leaves a tier that is full: lru (default: least recently used). What the "
            "queue's order or a hint expects soon stays, up to half of a tier.",
        ),
        NS("memory"),
    ] = _DEFAULTS.eviction_policy
    tiered_kv_load_policy: A[
        str,
        Arg(
            no_cli=True,
            type_parser=_load_policy,
            help="Whether KV found in host memory, on disk or in the store is loaded: cost "
            "(default: as much as is sooner loaded than computed, by measured times), "
            "always or never.",
        ),
        NS("memory"),
    ] = _DEFAULTS.load_policy

    def to_config(self) -> TieredKVConfig:
        """Our options for one rank, as the layers below take them. Raises ConfigError."""
        host_size = None
        if self.tiered_kv_host_size is not None:
            host_size = values.size_bytes("--tiered-kv-host-size", self.tiered_kv_host_size)
        disk_size = None
        if self.tiered_kv_disk_size is not None:
            disk_size = values.size_bytes("--tiered-kv-disk-size", self.tiered_kv_disk_size)
        return TieredKVConfig(
            page_size=self.page_size,
            eviction_policy=self.tiered_kv_eviction_policy,
            load_policy=self.tiered_kv_load_policy,
            store=self.store_config(),
            host=HostConfig(
                size_bytes=host_size,
                ratio=values.number("--tiered-kv-host-ratio", self.tiered_kv_host_ratio),
                page_format=values.host_format(
                    "--tiered-kv-host-format", self.tiered_kv_host_format
                ),
            ),
            disk=DiskConfig(
                directory=values.disk_directory("--tiered-kv-disk-dir", self.tiered_kv_disk_dir),
                size_bytes=disk_size,
                io_threads=values.integer(
                    "--tiered-kv-disk-io-threads", self.tiered_kv_disk_io_threads
                ),
                io_mode=values.disk_io_mode("--tiered-kv-disk-io", self.tiered_kv_disk_io),
                key_file=values.key_file("--tiered-kv-disk-key-file", self.tiered_kv_disk_key_file),
                clear_on_start=self.tiered_kv_clear_disk,
                page_format=values.disk_format(
                    "--tiered-kv-disk-format", self.tiered_kv_disk_format
                ),
            ),
        )

    def resolve_tiers(self) -> None:
        """Replace defaults by what they stand for, so that every rank and /server_info agree."""
        directory = values.disk_directory("--tiered-kv-disk-dir", self.tiered_kv_disk_dir)
        if directory is None:
            self.tiered_kv_disk_dir = values.NO_DISK
        else:
            self.tiered_kv_disk_dir = str(directory)
            if self.tiered_kv_disk_size is None:
                n_bytes = values.default_disk_bytes(directory)
                self.tiered_kv_disk_size = f"{n_bytes}B"
        given: int | None = arguments.given(self, "page_size")
        self.page_size = PAGE_SIZE_DEFAULT if given is None else given
        self.to_config()
