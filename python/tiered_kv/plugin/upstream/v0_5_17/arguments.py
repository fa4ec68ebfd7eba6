"""SGLang 0.5.17's `ServerArgs`: a dataclass that resolves itself, in place, as it is made."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

from sglang.srt import server_args as upstream

#: SGLang's own class. In a tuple, because ours takes its place wherever a module has it by a name.
_STOCK: tuple[Any] = (upstream.ServerArgs,)
#: What is refused together with `--tiered-kv` on this release alone: (subject, whether it is
#: there, what to do), of arguments as the user gave them and as SGLang resolved them.
REFUSED: tuple[tuple[str, Callable[[Any], bool], str], ...] = ()
#: Options of its own hierarchical cache that other releases lack.
MORE_HICACHE_OPTIONS: tuple[str, ...] = ()
#: What has SGLang measure no room for host pools, which we don't have: fields and their values.
NO_HOST_POOLS: dict[str, object] = {}
#: Switches of SGLang's environment that choose another cache.
OTHER_CACHES = ("SGLANG_EXPERIMENTAL_CPP_RADIX_TREE", "SGLANG_ENABLE_UNIFIED_RADIX_TREE")
#: Multimodal models that were looked at: text, images and videos are attended to causally in all
#: layers, so that KV depends on what is before it alone; placeholders lie where the items say.
MULTIMODAL_MODELS = (
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
)
#: Switches that choose a front end which our requests' fields do not pass.
OTHER_FRONT_ENDS: tuple[str, ...] = ()
#: Algorithms of speculative decoding that are served.
SPECULATES: tuple[str, ...] = ("NGRAM", "EAGLE", "EAGLE3", "NEXTN", "STANDALONE")
#: Whether pipelines (`--pp-size`) were run on this release, with the tiers.
RAN_PIPELINES = False


def server_args_class(own: Any, module: str) -> Any:
    """SGLang's `ServerArgs` with the fields of `own`, to be pickled as `module.ServerArgs`.

    own: a dataclass without a constructor; what it must have is said in `start/server_args.py`.
    """

    (stock,) = _STOCK

    def resolve(self: Any) -> None:
        self.resolve_with(lambda: stock.__post_init__(self))

    def validate_no_buffer(self: Any, view: Any, model_arch: str) -> None:
        """For recurrent state SGLang's tree wants pages of one token, ours does not."""
        if self.tiered_kv:
            self.disable_overlap_schedule = True
        else:
            stock._validate_mamba_no_buffer(self, view, model_arch)

    def unpickle(self: Any, state: dict[str, Any]) -> None:
        # Not by setattr: resolved arguments are read-only.
        self.__dict__.update(state)
        self.arrived()

    def add_cli_args(parser: argparse.ArgumentParser) -> None:
        """Add SGLang's options, and ours as a group of their own."""
        stock.add_cli_args(parser)
        own.add_own_cli_args(parser)

    def from_cli_args(cls: Any, args: argparse.Namespace) -> Any:
        """As SGLang's, but an error of ours is a message and exit code 2, as argparse's are."""
        own.note_named_policy(args)
        with own.errors_end_the_program():
            return stock.from_cli_args.__func__(cls, args)

    # Defined here, rather than inherited, for the sake of other plugins that hook them: SGLang's
    # HookRegistry recognises static and class methods only in the class's own dict.
    namespace = {
        "__module__": module,
        "__qualname__": "ServerArgs",
        "__doc__": "SGLang's arguments and ours.",
        "__post_init__": resolve,
        "__setstate__": unpickle,
        "_validate_mamba_no_buffer": validate_no_buffer,
        "add_cli_args": staticmethod(add_cli_args),
        "from_cli_args": classmethod(from_cli_args),
    }
    return dataclasses.dataclass(type("ServerArgs", (stock, own), namespace))


def field_defaults(server_args: Any) -> dict[str, Any]:
    """The default of every field, SGLang's and ours, by name."""
    return {field.name: field.default for field in dataclasses.fields(server_args)}


def stock_default(name: str) -> Any:
    """The default of a field of SGLang's."""
    return getattr(_STOCK[0], name)


def given(server_args: Any, name: str) -> Any:
    """What the user gave, before SGLang resolves it."""
    return vars(server_args)[name]


def resolved(server_args: Any) -> Any:
    """Something with the arguments as SGLang resolved them."""
    return server_args


def attention_backends(server_args: Any) -> tuple[str, str]:
    """Of prefill and of decode, resolved."""
    backends: tuple[str, str] = server_args.get_attention_backends()
    return backends


def attention_groups(outcome: Any) -> int:
    """Of resolved arguments: how many groups of ranks have requests of their own, in one model."""
    return int(outcome.dp_size) if outcome.enable_dp_attention else 1


def replicas(server_args: Any) -> int:
    """How many schedulers have requests of their own."""
    outcome = resolved(server_args)
    return int(outcome.dp_size)


def model_config(server_args: Any) -> Any:
    """SGLang's ModelConfig, the object that it keeps; while it resolves, too."""
    return server_args.get_model_config()
