"""The options that bound what administrators may keep (`POST /tiered_kv/cache`)."""

from __future__ import annotations

import dataclasses
import math

from sglang.srt.arg_groups.arg_utils import NS, A, Arg

from tiered_kv.core.errors import ConfigError

SECONDS_OPTION = "--tiered-kv-keep-seconds"
SHARE_OPTION = "--tiered-kv-keep-share"
SECONDS_DEFAULT = 3600.0
SECONDS_MAX = 7 * 86_400.0
#: Percent. With all of a tier kept, nothing new would stay there.
SHARE_DEFAULT = 25.0
SHARE_MAX = 90.0


@dataclasses.dataclass(init=False, repr=False, eq=False, kw_only=True)
class ControlArgs:
    """Mixed into `ServerArgs`."""

    tiered_kv_keep_seconds: A[
        float,
        Arg(
            no_cli=True,
            type_parser=float,
            help="The longest that an administrator may have a prompt kept (python -m "
            "tiered_kv.cache keep), in seconds; 0: nothing is kept on order. Default: "
            f"{SECONDS_DEFAULT:g}.",
        ),
        NS("memory"),
    ] = SECONDS_DEFAULT
    tiered_kv_keep_share: A[
        float,
        Arg(
            no_cli=True,
            type_parser=float,
            help="Percent of host memory's pages, and of the disk's, that may be kept so; one "
            "tenant may have half of them. What is kept still makes way if there is nothing else "
            f"to give up. Default: {SHARE_DEFAULT:g}.",
        ),
        NS("memory"),
    ] = SHARE_DEFAULT

    def resolve_control(self) -> None:
        """Raises ConfigError."""
        seconds, share = self.tiered_kv_keep_seconds, self.tiered_kv_keep_share
        if not _is_between(seconds, 0.0, SECONDS_MAX):
            raise ConfigError(
                f"{SECONDS_OPTION} must be a number of seconds from 0 to {SECONDS_MAX:g}, not "
                f"{seconds}."
            )
        if not _is_between(share, 0.0, SHARE_MAX) or not share:
            raise ConfigError(
                f"{SHARE_OPTION} must be a number of percent above 0 and at most {SHARE_MAX:g}, "
                f"not {share}; {SECONDS_OPTION} 0 switches keeping off."
            )


def _is_between(value: object, low: float, high: float) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and low <= value <= high
