"""SGLang's `ServerArgs` with the `--tiered-kv` options; the entry point puts it in their place.

Without `--tiered-kv` it behaves as SGLang's own: same values, same side effects. With it, the
values that make SGLang build our cache are set before SGLang resolves the rest, and the object
prepares every process that unpickles it. When SGLang resolves, and what its class is, is for the
adapter of the release to know (`upstream/*/arguments.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import secrets
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from sglang.srt.arg_groups.arg_utils import NS, A, Arg

from tiered_kv.core.errors import ConfigError, TieredKVError
from tiered_kv.plugin.options import cascade as cascade_option
from tiered_kv.plugin.options import (
    disaggregation,
    dp_attention,
    pipeline,
    recurrent,
    refusals,
    speculation,
    values,
    windows,
)
from tiered_kv.plugin.options.callers import CallerArgs
from tiered_kv.plugin.options.control import ControlArgs
from tiered_kv.plugin.options.overlap import OverlapArgs
from tiered_kv.plugin.options.policies import SCHEDULE_POLICY_DEFAULT, PolicyArgs
from tiered_kv.plugin.options.store import StoreArgs
from tiered_kv.plugin.options.tiers import PAGE_SIZE_DEFAULT, TierArgs
from tiered_kv.plugin.options.watching import WatchingArgs
from tiered_kv.plugin.start import process_carrier
from tiered_kv.plugin.upstream.current import arguments

_MIXED_IN: tuple[Any, ...] = (
    *(TierArgs, StoreArgs, PolicyArgs, OverlapArgs, CallerArgs, WatchingArgs, ControlArgs),
)
"""In the order of the help."""

# No field: nobody chooses it, and it says nothing to who reads the arguments.
_SERVER_NUMBER = "_tiered_kv_server_number"
_SERVER_BITS = 62


def _flag(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


# The fields are declared `no_cli` because SGLang would list them among its four hundred options;
# `add_own_cli_args` adds them to a group of their own. Without a constructor, because SGLang's
# class brings one for all fields.
@dataclasses.dataclass(init=False, repr=False, eq=False, kw_only=True)
class OwnArgs(TierArgs, StoreArgs, PolicyArgs, OverlapArgs, CallerArgs, WatchingArgs, ControlArgs):
    """Our arguments, and what is done with SGLang's: mixed into SGLang's class."""

    if TYPE_CHECKING:  # SGLang's
        disable_radix_cache: bool
        radix_cache_backend: str | None
        enable_hierarchical_cache: bool
        enable_cache_report: bool
        hicache_io_backend: str
        hicache_mem_layout: str

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

    @property
    def server_number(self) -> int:
        """What all processes of this server have in common, and no other server."""
        number: int = vars(self)[_SERVER_NUMBER]
        return number

    def resolve_with(self, resolve: Callable[[], None]) -> None:
        """`resolve`, SGLang's own, among ours.

        Raises ConfigError (a ValueError) or UpstreamError for ours.
        """
        refusals.check_options_need_flag(self)
        if not self.tiered_kv:
            resolve()
            return
        process_carrier.prepare_main_process()
        vars(self)[_SERVER_NUMBER] = secrets.randbits(_SERVER_BITS)
        refusals.check_server_args(self)
        disaggregation.check(self)
        pipeline.choose_policy(self)
        self.resolve_policies()
        self.resolve_callers()
        self.resolve_watching()
        self.resolve_control()
        self.resolve_tiers()
        self.resolve_overlap()
        self._select_cache()
        windows.have_one_pool(self)
        recurrent.choose_strategy(self)
        speculation.choose_defaults(self)
        try:
            resolve()
        except ValueError as error:
            if self.disable_radix_cache:
                raise ConfigError(refusals.RADIX_CACHE_OFF) from error
            raise
        outcome = arguments.resolved(self)
        refusals.check_resolved(outcome)
        windows.check_resolved(self)
        recurrent.check_resolved(outcome)
        speculation.check_resolved(outcome)
        dp_attention.check_resolved(outcome)
        pipeline.check_resolved(outcome)
        cascade_option.check_resolved(self)

    def arrived(self) -> None:
        """The object was unpickled, perhaps in another process."""
        if self.tiered_kv:
            process_carrier.prepare_child_process()

    @staticmethod
    def add_own_cli_args(parser: argparse.ArgumentParser) -> None:
        """Add our options as a group of their own to a parser that has SGLang's."""
        group = parser.add_argument_group(
            "Tiered KV", "KV cache on device, host memory and disk (plugin sglang-tiered-kv)"
        )
        # To tell a policy that was named from the default, which `note_named_policy` puts back.
        parser.set_defaults(schedule_policy=None)
        hints = get_type_hints(OwnArgs, include_extras=True)
        for field in own_fields():
            _add_option(group, field, hints[field.name])

    @staticmethod
    def note_named_policy(args: argparse.Namespace) -> None:
        """Who names one of SGLang's policies wants no other."""
        if args.schedule_policy is None:
            args.schedule_policy = SCHEDULE_POLICY_DEFAULT
        elif args.tiered_kv and args.tiered_kv_policy is None:
            args.tiered_kv_policy = values.UPSTREAM_POLICY

    @staticmethod
    @contextlib.contextmanager
    def errors_end_the_program() -> Iterator[None]:
        """An error of ours is a message and exit code 2, as argparse's are."""
        try:
            yield
        except TieredKVError as error:
            sys.stderr.write(f"sglang serve: error: {error}\n")
            sys.exit(2)

    def _select_cache(self) -> None:
        """Set what makes SGLang's scheduler build our cache and call its hierarchical interface."""
        self.radix_cache_backend = process_carrier.RADIX_CACHE_BACKEND
        self.enable_hierarchical_cache = True
        self.enable_cache_report = True
        # We build no pool by these two; this pair passes SGLang's checks on every device.
        self.hicache_io_backend = "direct"
        self.hicache_mem_layout = "layer_first"
        for name, value in arguments.NO_HOST_POOLS.items():
            setattr(self, name, value)


ServerArgs: Any = arguments.server_args_class(OwnArgs, __name__)
"""SGLang's class, with ours mixed in."""


def own_fields() -> list[dataclasses.Field[Any]]:
    """The fields that `ServerArgs` adds to SGLang's, in the order of the help."""
    order = {f.name: n for n, mixin in enumerate(_MIXED_IN) for f in dataclasses.fields(mixin)}
    return sorted(dataclasses.fields(OwnArgs), key=lambda f: order.get(f.name, -1))


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
