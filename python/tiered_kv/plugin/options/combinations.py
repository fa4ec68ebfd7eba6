"""What does not go together with `--tiered-kv` and something else, said in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tiered_kv.core.errors import ConfigError

#: Of resolved arguments: (what is not supported, whether it is there).
Rules = tuple[tuple[str, Callable[[Any], bool]], ...]


def check(beside: str, rules: Rules, server_args: Any) -> None:
    """Raise ConfigError for the first of `rules` that applies. beside: what it is too much for."""
    for option, applies in rules:
        if applies(server_args):
            raise ConfigError(
                f"--tiered-kv does not support, {beside}, {option}; drop one of both."
            )
