"""SGLang's `ServerArgs` with the `--tiered-kv` options; the entry point puts it in their place.

Without `--tiered-kv` it behaves as SGLang's own: same values, same side effects. With it, the
values that make SGLang build our cache are set before SGLang resolves the rest, and the object
prepares every process that unpickles it.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

from sglang.srt import server_args as upstream_server_args
from sglang.srt.arg_groups.arg_utils import NS, A, Arg

from tiered_kv.core.config import LOAD_POLICIES, DiskConfig, HostConfig, TieredKVConfig
from tiered_kv.core.errors import ConfigError, TieredKVError
from tiered_kv.core.registry import Registry
from tiered_kv.memory.eviction import eviction_policies
from tiered_kv.plugin.options import cascade as cascade_option
from tiered_kv.plugin.options import decode as decode_option
from tiered_kv.plugin.options import refusals
from tiered_kv.plugin.options import values as option_values
from tiered_kv.plugin.options.callers import CallerArgs
from tiered_kv.plugin.options.overlap import OverlapArgs
from tiered_kv.plugin.start import process_carrier
from tiered_kv.scheduler.iteration_policy import iteration_policies
from tiered_kv.scheduler.request_policy import request_policies

PAGE_SIZE_DEFAULT = 64
SCHEDULE_POLICY_DEFAULT: str = upstream_server_args.ServerArgs.schedule_policy


def _flag(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def _size(option: str, text: str) -> str:
    option_values.size_bytes(option, text)
    return text


def _named_in(registry: Registry[Any]) -> Callable[[str], str]:
    def check(_option: str, text: str) -> str:
        registry.get(text)
        return text

    return option_values.argument(check)


def _load_policy(text: str) -> str:
    if text not in LOAD_POLICIES:
        known = ", ".join(LOAD_POLICIES)
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {known}.")
    return text


def _cascade_mode(_option: str, text: str) -> str:
    return cascade_option.cascade_mode(text)


# The fields are declared `no_cli` because SGLang would list them among its four hundred options;
# `add_cli_args` adds them to a group of their own.
@dataclasses.dataclass
class ServerArgs(upstream_server_args.ServerArgs, OverlapArgs, CallerArgs):
    """SGLang's arguments and ours. `to_config()` gives ours as a checked value."""

    tiered_kv: A[
        bool,
        Arg(
            no_cli=True,
            help="Keep the KV cache of past prompts in three tiers: device, host memory and disk. "
            f"Makes --page-size {PAGE_SIZE_DEFAULT} unless it is given, and --enable-cache-report "
            "the default, so that a response's usage says how many prompt tokens were cached.",
        ),
        NS("memory"),
    ] = False
    tiered_kv_host_size: A[
        str | None,
        Arg(
            no_cli=True,
            type_parser=option_values.argument(_size),
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
    ] = 2.0
    tiered_kv_host_format: A[
        str,
        Arg(
            no_cli=True,
            type_parser=option_values.argument(option_values.host_format),
            help="What pages are kept in on the host: raw (default), exactly as on the device; or "
            "in fewer bytes, so that the same size holds more pages, at the price of answers that "
            "may differ: fp8 (50%% of bfloat16's), int4 (28%%), kitty (16%%) or int2 (16%%). "
            "docs/formats.md says what each costs.",
        ),
        NS("memory"),
    ] = "raw"
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
            type_parser=option_values.argument(_size),
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
            type_parser=option_values.argument(option_values.disk_io_mode),
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
            type_parser=option_values.argument(option_values.disk_format),
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
            type_parser=_named_in(eviction_policies),
            help="What leaves a tier that is full: lru (least recently used, the default), value "
            "(least cost to bring back times probability of reuse per byte), slru or s3fifo.",
        ),
        NS("memory"),
    ] = "lru"
    tiered_kv_load_policy: A[
        str,
        Arg(
            no_cli=True,
            type_parser=_load_policy,
            help="Whether KV found in host memory or on disk is loaded: cost (default: as much as "
            "is sooner loaded than computed, by measured times), always or never.",
        ),
        NS("memory"),
    ] = "cost"
    tiered_kv_policy: A[
        str | None,
        Arg(
            no_cli=True,
            type_parser=option_values.argument(option_values.request_policy),
            help="Who of the waiting requests is admitted next: "
            f"{', '.join(request_policies.names())}, or 'upstream' for what --schedule-policy "
            f"says. Default: {option_values.POLICY_DEFAULT}, but upstream if --schedule-policy or "
            "--enable-priority-scheduling is given.",
        ),
        NS("memory"),
    ] = None
    tiered_kv_iteration_policy: A[
        str,
        Arg(
            no_cli=True,
            type_parser=_named_in(iteration_policies),
            help="Who of the running requests decodes in an iteration: all (default: everyone, as "
            "SGLang does it), slack (everyone where all next tokens are in time; else those with "
            "the tightest tbt_ms always and the others in turns, which keep their KV meanwhile) or "
            "round-robin. Where memory is short, slack has loose requests make way for tight ones; "
            "they come back without recompute. Needs a --tiered-kv-policy but upstream.",
        ),
        NS("memory"),
    ] = "all"
    tiered_kv_cascade: A[
        str,
        Arg(
            no_cli=True,
            type_parser=option_values.argument(_cascade_mode),
            help="Read KV that decoding requests share once for all, where that pays: on (on a GPU "
            "with --attention-backend flashinfer), off, or auto (default: on only on a CPU).",
        ),
        NS("memory"),
    ] = "auto"
    tiered_kv_debug_integrity: A[
        bool,
        Arg(
            no_cli=True,
            help="Check the cache's bookkeeping whenever the server is idle, and stop the server "
            "if it is inconsistent. Costs time proportional to the cache.",
        ),
        NS("memory"),
    ] = False

    def __post_init__(self) -> None:
        """Resolve all arguments. Raises ConfigError (a ValueError) or UpstreamError for ours."""
        refusals.check_options_need_flag(self)
        if not self.tiered_kv:
            super().__post_init__()
            return
        process_carrier.prepare_main_process()
        refusals.check_server_args(self)
        self.tiered_kv_cascade = cascade_option.cascade_mode(self.tiered_kv_cascade)
        self._resolve_policy()
        decode_option.check(self.tiered_kv_iteration_policy, self.tiered_kv_policy)
        self.resolve_callers()
        self._resolve_tiers()
        self.resolve_overlap()
        self._select_cache()
        try:
            super().__post_init__()
        except ValueError as error:
            if self.disable_radix_cache:
                raise ConfigError(refusals.RADIX_CACHE_OFF) from error
            raise
        refusals.check_resolved(self)
        cascade_option.check_resolved(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Not by setattr: resolved arguments are read-only.
        self.__dict__.update(state)
        if self.tiered_kv:
            process_carrier.prepare_child_process()

    # The next two are defined here, rather than inherited, for the sake of other plugins that hook
    # them: SGLang's HookRegistry recognises static and class methods only in the class's own dict.

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> None:
        """Add SGLang's options, and ours as a group of their own."""
        super(ServerArgs, ServerArgs).add_cli_args(parser)
        group = parser.add_argument_group(
            "Tiered KV", "KV cache on device, host memory and disk (plugin sglang-tiered-kv)"
        )
        # To tell a policy that was named from the default, which `from_cli_args` puts back.
        parser.set_defaults(schedule_policy=None)
        hints = get_type_hints(ServerArgs, include_extras=True)
        for field in own_fields():
            _add_option(group, field, hints[field.name])

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> ServerArgs:
        """As SGLang's, but an error of ours is a message and exit code 2, as argparse's are."""
        if args.schedule_policy is None:
            args.schedule_policy = SCHEDULE_POLICY_DEFAULT
        elif args.tiered_kv and args.tiered_kv_policy is None:
            args.tiered_kv_policy = option_values.UPSTREAM_POLICY
        try:
            return super().from_cli_args(args)
        except TieredKVError as error:
            sys.stderr.write(f"sglang serve: error: {error}\n")
            sys.exit(2)

    def to_config(self) -> TieredKVConfig:
        """Our options for one rank, as the layers below take them. Raises ConfigError."""
        values = option_values
        host_size = None
        if self.tiered_kv_host_size is not None:
            host_size = values.size_bytes("--tiered-kv-host-size", self.tiered_kv_host_size)
        disk_size = None
        if self.tiered_kv_disk_size is not None:
            ranks = max(1, self.tp_size // self.nnodes)
            disk_size = (
                values.size_bytes("--tiered-kv-disk-size", self.tiered_kv_disk_size) // ranks
            )
        return TieredKVConfig(
            page_size=self.page_size,
            eviction_policy=self.tiered_kv_eviction_policy,
            load_policy=self.tiered_kv_load_policy,
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

    def _resolve_policy(self) -> None:
        """Decide who orders the waiting queue. Raises ConfigError if two are to."""
        if self.tiered_kv_policy is None:
            is_named = (
                self.schedule_policy != SCHEDULE_POLICY_DEFAULT or self.enable_priority_scheduling
            )
            self.tiered_kv_policy = (
                option_values.UPSTREAM_POLICY if is_named else option_values.POLICY_DEFAULT
            )
        option_values.request_policy("--tiered-kv-policy", self.tiered_kv_policy)
        refusals.check_one_orders_the_queue(self)

    def _resolve_tiers(self) -> None:
        """Replace defaults by what they stand for, so that every rank and /server_info agree."""
        directory = option_values.disk_directory("--tiered-kv-disk-dir", self.tiered_kv_disk_dir)
        if directory is None:
            self.tiered_kv_disk_dir = option_values.NO_DISK
        else:
            self.tiered_kv_disk_dir = str(directory)
            if self.tiered_kv_disk_size is None:
                n_bytes = option_values.default_disk_bytes(directory, self.tp_size)
                self.tiered_kv_disk_size = f"{n_bytes}B"
        given: int | None = vars(self)["page_size"]
        self.page_size = PAGE_SIZE_DEFAULT if given is None else given
        self.to_config()

    def _select_cache(self) -> None:
        """Set what makes SGLang's scheduler build our cache and call its hierarchical interface."""
        self.radix_cache_backend = process_carrier.RADIX_CACHE_BACKEND
        self.enable_hierarchical_cache = True
        self.enable_cache_report = True
        # We build no pool by these two; this pair passes SGLang's checks on every device.
        self.hicache_io_backend = "direct"
        self.hicache_mem_layout = "layer_first"


def own_fields() -> list[dataclasses.Field[Any]]:
    """The fields that `ServerArgs` adds to SGLang's."""
    fields = [f for f in dataclasses.fields(ServerArgs) if f.name.startswith("tiered_kv")]
    # A dataclass begins with what was mixed in; the help should not.
    mixed_in = {f.name for mixin in (CallerArgs, OverlapArgs) for f in dataclasses.fields(mixin)}
    return sorted(fields, key=lambda f: f.name in mixed_in)


def _add_option(
    group: argparse._ArgumentGroup, field: dataclasses.Field[Any], annotation: Any
) -> None:
    kind, arg, *_ = get_args(annotation)
    if kind is bool:
        group.add_argument(_flag(field.name), action="store_true", help=arg.help)
        return
    parser = arg.type_parser or (kind if kind in (int, float) else str)
    metavar = field.name.removeprefix("tiered_kv_").upper()
    group.add_argument(
        _flag(field.name), type=parser, default=field.default, help=arg.help, metavar=metavar
    )
