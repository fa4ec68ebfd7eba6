"""What became of a request, for the caller who asked: `slo: {"report": true}`."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from tiered_kv.api.hints import NO_HINTS, Hints
from tiered_kv.api.slo import NO_SLO, Slo

NAMESPACE = "tiered_kv"
"""The field of a response that holds it: under `meta_info` in SGLang's own API, under `metadata`
in OpenAI's."""


@dataclass(slots=True)
class RequestReport:
    """Filled in while the request is served; None where nothing was measured."""

    slo: Slo = NO_SLO
    prompt_tokens: int = 0
    device_tokens: int = 0
    """Leading prompt tokens whose KV the device had when the request was admitted."""
    host_tokens: int = 0
    """Tokens after those whose KV was loaded from host memory."""
    disk_tokens: int = 0
    """Tokens after those whose KV came from disk."""
    store_tokens: int = 0
    """Tokens after those whose KV came from the store that servers share."""
    wait_s: float | None = None
    """Seconds from the server's receipt of the request until it was admitted."""
    ttft_s: float | None = None
    """Seconds from the server's receipt of the request to its first token."""
    hints: Hints = NO_HINTS
    """What the caller said, as it was understood."""

    @property
    def ttft_slack_s(self) -> float | None:
        """Seconds left at the first token until it was due; negative if it came too late."""
        if self.ttft_s is None or self.slo.ttft_s is None:
            return None
        return self.slo.ttft_s - self.ttft_s

    def as_fields(self) -> dict[str, object]:
        """The report as a response carries it: times in milliseconds, null if not known.

        `cached_tokens` is in the order of the prompt: a device run, a host run, a disk
        run, a run from the store. `hints` has those that were given.
        """
        slo, given = self.slo, asdict(self.hints)
        hints = {key: value for key, value in given.items() if value != getattr(NO_HINTS, key)}
        return {
            "slo": {
                "class": slo.slo_class,
                "ttft_ms": _milliseconds(slo.ttft_s),
                "tbt_ms": _milliseconds(slo.tbt_s),
                **({} if slo.task_s is None else {"task_ms": _milliseconds(slo.task_s)}),
            },
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": {
                "device": self.device_tokens,
                "host": self.host_tokens,
                "disk": self.disk_tokens,
                "store": self.store_tokens,
            },
            "wait_ms": _milliseconds(self.wait_s),
            "ttft_ms": _milliseconds(self.ttft_s),
            "ttft_slack_ms": _milliseconds(self.ttft_slack_s),
            **({"hints": hints} if hints else {}),
        }


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)
