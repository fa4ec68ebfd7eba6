"""What can be chosen about the iteration policy `slack`."""

from __future__ import annotations

from dataclasses import dataclass

from tiered_kv.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class IterationConfig:
    """Raises ConfigError for values that make no sense."""

    max_park_s: float = 1.0
    """Longest time without a token before a request decodes whatever else is due, where the
    request says nothing and was not promised less; what an iteration under way takes comes on top.
    """

    caution: float = 0.94
    """Share of each token objective that is planned with: predictions are not exact."""

    select: bool = True
    """Whether anyone is parked; else all decode, and only prefill follows the decode slack."""

    relegate: bool = False
    """Whether, when not everyone with the tightest objective can be in time, some of them are given
    up so that the others are. Else all decode, and all are late by a little."""

    least_throughput: float = 0.4
    """Share of the throughput that parking has to leave where nobody waits for it."""

    yields: bool = True
    """Whether token objectives give way while first tokens would be late for them."""

    prefill_share: float = 0.5
    """Of the time that the due decodes leave, what prefill gets while others wait to decode."""

    pass_share: float = 0.1
    """Longest iteration with prefill, as a share of the tightest first-token objective."""

    def __post_init__(self) -> None:
        for name, value, is_right in (
            ("max_park_s", self.max_park_s, self.max_park_s > 0),
            ("caution", self.caution, 0 < self.caution <= 1),
            ("prefill_share", self.prefill_share, 0 <= self.prefill_share <= 1),
            ("least_throughput", self.least_throughput, 0 <= self.least_throughput <= 1),
            ("pass_share", self.pass_share, self.pass_share > 0),
        ):
            if not is_right:
                raise ConfigError(
                    f"{name} of the iteration policy slack can't be {value}; see its docs."
                )
