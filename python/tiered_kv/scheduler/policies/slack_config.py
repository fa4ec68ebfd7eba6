"""What can be chosen about the policy `slack`."""

from __future__ import annotations

from dataclasses import dataclass

from tiered_kv.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class SlackConfig:
    """Raises ConfigError for values that make no sense."""

    max_wait_s: float = 300.0
    """Seconds after which a request is overdue, where its objective says nothing."""

    least_ttft_s: float = 0.0
    """No call inherits less time than this from its program's deadline: no client gets more hurry
    by naming a task than by asking for a first token."""

    overdue_share: float = 0.25
    """Least share of the admitted work that goes to the overdue; 1: strictly before all others."""

    patience: float = 4.0
    """Without a deadline to meet, a request waits so many times the work it exceeds another by."""

    programs: bool = True
    """Whether a call counts as having come with its program's first where no deadline decides,"""

    program_lead_s: float = 3600.0
    """but by no more than this sooner than it did."""

    working_set: bool = True
    """Whether programs pause between their calls while the contexts of those in progress fill
    device and host. It needs `slack`, and `aging`, which bounds it."""

    gangs: bool = True
    """Whether requests that share a prefix go together, and wait for one to compute it."""

    slack: bool = True
    """Whether deadlines count; else by arrival, in chunks as configured."""

    aging: bool = True
    """Whether there is a bound on waiting; else deadlines, then the shortest work."""

    forecast: bool = True
    """Whether admission looks at memory to come, and the cache at the queue."""

    mix_decodes: bool = True
    """Whether running requests decode in the iterations that prefill."""

    put_back: bool = True
    """Whether a prompt that was begun may be put back for others."""

    share_min_tokens: int = 256
    """Least tokens that somebody else must be computing for a request to be kept back."""

    pass_share: float = 0.1
    """Longest iteration with prefill, as a share of the tightest TTFT objective seen."""

    length_quantile: float = 0.7
    """Quantile of past answers' lengths that a request is predicted to reach."""

    memory_margin: float = 0.02
    """Share of the device's KV pool that the forecast leaves free."""

    def __post_init__(self) -> None:
        for name, value, is_right in (
            ("max_wait_s", self.max_wait_s, self.max_wait_s > 0),
            ("program_lead_s", self.program_lead_s, self.program_lead_s >= 0),
            ("least_ttft_s", self.least_ttft_s, self.least_ttft_s >= 0),
            ("overdue_share", self.overdue_share, 0 < self.overdue_share <= 1),
            ("patience", self.patience, self.patience >= 0),
            ("pass_share", self.pass_share, self.pass_share > 0),
            ("length_quantile", self.length_quantile, 0 <= self.length_quantile < 1),
            ("memory_margin", self.memory_margin, 0 <= self.memory_margin < 1),
        ):
            if not is_right:
                raise ConfigError(f"{name} of the policy slack can't be {value}; see its docs.")
