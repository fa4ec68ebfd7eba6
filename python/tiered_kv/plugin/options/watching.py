"""The options of snapshots: who may look at the server while it runs, and what they see."""

from __future__ import annotations

import dataclasses
import ipaddress
from typing import TYPE_CHECKING

from sglang.srt.arg_groups.arg_utils import NS, A, Arg

from tiered_kv.core.errors import ConfigError
from tiered_kv.plugin.options.values import argument

OPTION = "--tiered-kv-view"
TEXT_OPTION = "--tiered-kv-view-text-tokens"
MODES = ("auto", "on", "off")
#: Enough to recognise a prompt by, and no more.
TEXT_TOKENS_MAX = 32


def view_mode(option: str, value: str | bool | None) -> str:
    """One of MODES; YAML turns an unquoted on or off into a boolean. Raises ConfigError."""
    if isinstance(value, bool):
        return "on" if value else "off"
    mode = "auto" if value is None else str(value).strip().lower()
    if mode not in MODES:
        raise ConfigError(f"{option} must be one of {', '.join(MODES)}, not {value!r}.")
    return mode


def is_loopback(host: str) -> bool:
    """Whether a server that listens on `host` is reached from its own machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@dataclasses.dataclass(init=False, repr=False, eq=False, kw_only=True)
class WatchingArgs:
    """Mixed into `ServerArgs`."""

    if TYPE_CHECKING:  # SGLang's
        host: str
        admin_api_key: str | None

    tiered_kv_view: A[
        str,
        Arg(
            no_cli=True,
            type_parser=argument(view_mode),
            help="Whether /tiered_kv/snapshot, for python -m tiered_kv.view, says what is cached "
            "where and who waits: on (for whoever may use SGLang's own administration: holders of "
            "--admin-api-key, else of --api-key, else everybody), off, or auto (default: on with "
            "an --admin-api-key or where the server listens on this machine only).",
        ),
        NS("memory"),
    ] = "auto"
    tiered_kv_view_text_tokens: A[
        int,
        Arg(
            no_cli=True,
            type_parser=int,
            help="Show the text of so many first tokens of each prefix there, up to "
            f"{TEXT_TOKENS_MAX}. Needs an --admin-api-key. Default: 0, no text: prefixes have "
            "names made of hashes.",
        ),
        NS("memory"),
    ] = 0

    def resolve_watching(self) -> None:
        """Check both, and replace auto by what it means. Raises ConfigError."""
        mode = view_mode(OPTION, self.tiered_kv_view)
        if mode == "auto":
            is_open = bool(self.admin_api_key) or is_loopback(self.host)
            mode = "on" if is_open else "off"
        self.tiered_kv_view = mode
        n_tokens = self.tiered_kv_view_text_tokens
        if isinstance(n_tokens, bool) or not 0 <= n_tokens <= TEXT_TOKENS_MAX:
            raise ConfigError(
                f"{TEXT_OPTION} must be a number of tokens from 0 to {TEXT_TOKENS_MAX}, not "
                f"{n_tokens}."
            )
        if n_tokens and not self.admin_api_key:
            raise ConfigError(
                f"{TEXT_OPTION} shows what callers wrote, so it needs an --admin-api-key; give "
                "one, or leave the option out."
            )
        if n_tokens and mode == "off":
            raise ConfigError(f"{TEXT_OPTION} shows nothing with {OPTION} off; drop one of them.")
