"""What `--tiered-kv` does not support, refused at the start with a sentence."""

from __future__ import annotations

import dataclasses
from typing import Any

from tiered_kv.core.errors import ConfigError

RADIX_CACHE_OFF = (
    "SGLang switches its radix cache off for this model or these options, and --tiered-kv is a "
    "radix cache; start without --tiered-kv."
)


def check_options_need_flag(server_args: Any) -> None:
    """Raise ConfigError if an option of ours was given without `--tiered-kv`."""
    if server_args.tiered_kv:
        return
    for field in dataclasses.fields(server_args):
        if (
            field.name.startswith("tiered_kv_")
            and getattr(server_args, field.name) != field.default
        ):
            flag = "--" + field.name.replace("_", "-")
            raise ConfigError(f"{flag} has no effect without --tiered-kv; add --tiered-kv.")


def check_server_args(server_args: Any) -> None:
    """Raise ConfigError for options, as the user gave them, that do not go with `--tiered-kv`."""


def check_resolved(server_args: Any) -> None:
    """Raise ConfigError if what SGLang made of the options does not go with `--tiered-kv`."""


def check_model(ctx: Any) -> None:
    """Raise ConfigError for a model that is not supported; `ctx` is a TreeCacheBuildContext."""
