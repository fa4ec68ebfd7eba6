"""SGLang 0.5.23's `ServerArgs`: a msgspec Struct of what the user gave.

`resolve_once` decides the rest, later than the object is made, and beside it: the fields stay as
they were given, and what was decided is asked for with `resolved`.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any, get_type_hints

import msgspec
from sglang.srt import server_args as upstream
from sglang.srt.arg_groups.arg_utils import record_fields
from sglang.srt.arg_groups.model_override_base import (
    attention_backends_of,
    model_config_of,
    record_of,
)
from sglang.srt.arg_groups.overrides import declare_resolution, resolution_result

#: SGLang's own class. In a tuple, because ours takes its place wherever a module has it by a name.
_STOCK: tuple[Any] = (upstream.ServerArgs,)
#: What is refused together with `--tiered-kv` on this release alone: (subject, whether it is
#: there, what to do), of arguments as the user gave them and as SGLang resolved them.
REFUSED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    # Front ends that objectives, hints and salts do not pass.
    ("--smg-grpc-mode", lambda a: a.smg_grpc_mode or a.grpc_mode, "drop it or --tiered-kv"),
    ("--grpc-port", lambda a: a.grpc_port is not None, "drop it or --tiered-kv"),
    # Other caches and other ways to store KV.
    (
        "--enable-unified-cache-external-linker",
        lambda a: a.enable_unified_cache_external_linker,
        "drop it or --tiered-kv",
    ),
    (
        "--hicache-host-memory-mode buffer_only",
        lambda a: a.hicache_host_memory_mode != "cache",
        "drop it or --tiered-kv",
    ),
    (
        "--prefill-only-disable-kv-cache",
        lambda a: a.prefill_only_disable_kv_cache,
        "drop it or --tiered-kv",
    ),
    (
        "--mamba-max-states-per-path",
        lambda a: a.mamba_max_states_per_path != -1,
        "drop it or --tiered-kv",
    ),
    # An answer would depend on what it went on from.
    (
        "--enable-mamba-cache-stochastic-rounding",
        lambda a: a.enable_mamba_cache_stochastic_rounding,
        "drop it or --tiered-kv",
    ),
    # Plain SGLang's needs CUDA on this release: it could not be tried.
    (
        "--disaggregation-mode on this release of SGLang",
        lambda a: a.disaggregation_mode != "null",
        "drop it, or install 0.5.17",
    ),
    # A prefill that SGLang puts off would be one that a policy has planned.
    (
        "--prefill-decode-interval",
        lambda a: bool(a.prefill_decode_interval),
        "give --prefill-decode-interval 0",
    ),
)
#: Options of its own hierarchical cache that other releases lack.
MORE_HICACHE_OPTIONS = (
    "hicache_host_memory_fraction",
    "hicache_storage_prefetch_retry_poll_interval",
    "hicache_storage_prefetch_retry_max_attempts",
)
#: What has SGLang measure no room for host pools, which we don't have: fields and their values. It
#: would refuse to start where less than 10 GiB of memory are free, and beside pools that it does
#: not know (mem_cache/hicache_auto_size.py).
NO_HOST_POOLS: dict[str, object] = {"hicache_host_memory_fraction": None}
#: Switches of SGLang's environment that choose another cache.
OTHER_CACHES: tuple[str, ...] = ()
#: Multimodal models that were looked at on this release.
MULTIMODAL_MODELS: tuple[str, ...] = (
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
)
#: Switches that choose a front end which our requests' fields do not pass.
OTHER_FRONT_ENDS = ("SGLANG_RUST_SERVER", "SGLANG_GRPC_PORT")
#: Algorithms of speculative decoding that are served.
SPECULATES: tuple[str, ...] = ("NGRAM", "EAGLE", "EAGLE3", "NEXTN", "STANDALONE")
#: Whether pipelines (`--pp-size`) were run on this release, with the tiers.
RAN_PIPELINES = True

_FROM_COMMAND_LINE = "_tiered_kv_from_command_line"


def server_args_class(own: Any, module: str) -> Any:
    """SGLang's `ServerArgs` with the fields of `own`, to be pickled as `module.ServerArgs`.

    own: a dataclass without a constructor; what it must have is said in `start/server_args.py`.
    """

    (stock,) = _STOCK

    def resolve_once(self: Any) -> None:
        """As SGLang's; with an error of ours the program ends if it was started with options."""
        if getattr(self, "_resolution_finished", False):
            return

        def resolve() -> None:
            self.resolve_with(lambda: stock.resolve_once(self))

        if not getattr(self, _FROM_COMMAND_LINE, False):
            resolve()
            return
        with own.errors_end_the_program():
            resolve()

    def reduce(self: Any) -> tuple[Any, ...]:
        return _rebuilt, (type(self), msgspec.structs.asdict(self), dict(self.__dict__))

    def add_cli_args(parser: argparse.ArgumentParser) -> None:
        """Add SGLang's options, and ours as a group of their own."""
        stock.add_cli_args(parser)
        own.add_own_cli_args(parser)

    def from_cli_args(cls: Any, args: argparse.Namespace) -> Any:
        """As SGLang's."""
        own.note_named_policy(args)
        made = stock.from_cli_args.__func__(cls, args)
        setattr(made, _FROM_COMMAND_LINE, True)
        return made

    hints = get_type_hints(own, include_extras=True)
    fields = [(field.name, hints[field.name], field.default) for field in dataclasses.fields(own)]
    namespace = {
        "__doc__": "SGLang's arguments and ours.",
        "resolve_once": resolve_once,
        "__reduce__": reduce,
        "add_cli_args": staticmethod(add_cli_args),
        "from_cli_args": classmethod(from_cli_args),
    }
    return msgspec.defstruct(
        "ServerArgs",
        fields,
        bases=(stock, own),
        module=module,
        namespace=namespace,
        dict=True,
        kw_only=True,
    )


def validate_no_buffer(original: Callable[..., None], view: Any, model_arch: str) -> None:
    """AROUND `validate_mamba_no_buffer`: SGLang's tree wants pages of one token, ours does not."""
    record = record_of(view)
    if getattr(record, "tiered_kv", False):
        declare_resolution(record, "tiered_kv", disable_overlap_schedule=True)
    else:
        original(view, model_arch)


def _rebuilt(cls: Any, fields: dict[str, Any], bookkeeping: dict[str, Any]) -> Any:
    """An object that was pickled, in a process that it prepares."""
    made = cls(**fields)
    made.__dict__.update(bookkeeping)
    made.arrived()
    return made


def field_defaults(server_args: Any) -> dict[str, Any]:
    """The default of every field, SGLang's and ours, by name."""
    kind = server_args if isinstance(server_args, type) else type(server_args)
    return {field.name: field.default for field in record_fields(kind)}


def stock_default(name: str) -> Any:
    """The default of a field of SGLang's."""
    return field_defaults(_STOCK[0])[name]


def given(server_args: Any, name: str) -> Any:
    """What the user gave, before SGLang resolves it."""
    return getattr(server_args, name)


class _Resolved:
    """The arguments as SGLang resolved them, as far as it has got."""

    def __init__(self, record: Any) -> None:
        self._record = record
        self._fields = frozenset(type(record).__struct_fields__)

    def __getattr__(self, name: str) -> Any:
        if name not in self._fields:
            return getattr(self._record, name)
        return resolution_result(self._record, name)


def resolved(server_args: Any) -> Any:
    """Something with the arguments as SGLang resolved them."""
    return _Resolved(server_args) if isinstance(server_args, _STOCK) else server_args


def attention_backends(server_args: Any) -> tuple[str, str]:
    """Of prefill and of decode, resolved."""
    backends: tuple[str, str] = attention_backends_of(resolved(server_args))
    return backends


def attention_groups(outcome: Any) -> int:
    """Of resolved arguments: how many groups of ranks have requests of their own, in one model."""
    return int(outcome.attn_dp_size)


def replicas(server_args: Any) -> int:
    """How many schedulers have requests of their own."""
    outcome = resolved(server_args)
    return int(outcome.dp_size * outcome.attn_dp_size)


def model_config(server_args: Any) -> Any:
    """SGLang's ModelConfig, the object that it keeps; while it resolves, too."""
    # A platform is given an object that notes what it writes, around a view of the record.
    view = getattr(server_args, "_cfg", server_args)
    return model_config_of(getattr(view, "_server_args", view))
